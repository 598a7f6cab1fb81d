"""The README's code runs, and its tables follow from the results and the library."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from signax import diagnostics

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_code_blocks_run_in_order(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 6
    # The first block sets the number of devices, so the code needs a process of its own.
    program = "\n".join(blocks) + "\nprint(float(loss))\ntx.init({'w': jnp.ones((3, 2))})\n"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 1e-4


def test_the_example_is_about_twenty_lines_long():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert first is not None
    lines = [line for line in first[1].splitlines() if line.strip()]
    assert len(lines) <= 20


def row_of(*cells):
    return "| " + " | ".join(cells) + " |"


def number(value, bold_below=0.0):
    """A number with two or three digits."""
    text = f"{value:,.1f}" if value < 9.95 else f"{value:,.0f}"
    return f"**{text}**" if value < bold_below else text


def test_the_measured_table_matches_the_sweep():
    sweep = json.loads((RESULTS / "network-sweep.json").read_text())["results"]
    names = {"1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s", "10gbit": "10 Gbit/s"}
    sizes = {100_000: "100 k", 1_000_000: "1 M", 10_000_000: "10 M"}
    rows = []
    for setting in sweep:
        candidates = ("f32 mean", "int8 psum", "vote")
        seconds = [setting["candidates"][name]["median"] for name in candidates]
        head = str(setting["workers"]), names.get(setting["rate"], "none (memory)")
        milliseconds = [number(1e3 * value) for value in seconds]
        ratio = number(seconds[0] / seconds[-1], bold_below=0.95)
        rows.append(row_of(*head, sizes[setting["parameters"]], *milliseconds, ratio))
    printed = re.findall(r"^\| \d+ \|.*\|$", README, re.MULTILINE)
    assert len(printed) == 8
    assert set(printed) <= set(rows)


def test_the_modelled_table_matches_the_model():
    table = README[README.index("each worker's link") :]
    printed = re.findall(r"^\| (\S+) ([GT])bit/s.*\|$", table, re.MULTILINE)
    assert len(printed) == 5
    for rate, unit in printed:
        ratios = []
        for parameters in (10**5, 10**6, 10**7, 10**8, 10**9):
            seconds = functools.partial(
                diagnostics.exchange_seconds,
                num_workers=8,
                link_rate=float(rate) * {"G": 1e9, "T": 1e12}[unit],
                latency=50e-6,
                memory_bandwidth=1e12,
            )
            mean = seconds(jax.ShapeDtypeStruct((parameters,), jnp.bfloat16), scheme="mean")
            ratios.append(mean / seconds(jax.ShapeDtypeStruct((parameters,), jnp.float32)))
        cells = " | ".join(number(ratio, bold_below=0.95) for ratio in ratios)
        assert f"| {cells} |" in table


def test_every_figure_exists():
    shown = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(shown) >= 2
    for name in shown:
        assert (ROOT / name).is_file()


def test_three_quarters_of_bf16_weights_do_not_move_at_a_step_of_1e_4():
    weights = (0.1 * jax.random.normal(jax.random.key(0), (100_000,))).astype(jnp.bfloat16)
    stuck = np.mean(np.asarray(weights - jnp.bfloat16(1e-4) == weights))
    assert 0.7 < stuck < 0.8
