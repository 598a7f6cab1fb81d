"""The documentation's code runs, and its tables follow from the results and the library."""

import functools
import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from signax import cost, diagnostics

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_code_blocks_of_a_page_run_in_order(tmp_path, name):
    devices = 'import jax\njax.config.update("jax_num_cpu_devices", 8)'
    command = [sys.executable, "-W", "error", "-c", "\n".join([devices, *BLOCKS[name]])]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr


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
        candidates = ("f32 mean", "bf16 mean", "int8 psum", "vote")
        seconds = [setting["candidates"][name]["median"] for name in candidates]
        head = str(setting["workers"]), names.get(setting["rate"], "none (memory)")
        milliseconds = [number(1e3 * value) for value in seconds]
        ratio = number(seconds[0] / seconds[-1], bold_below=0.95)
        rows.append(row_of(*head, sizes[setting["parameters"]], *milliseconds, ratio))
    printed = re.findall(r"^\| \d+ \|.*\|$", PAGES["performance"], re.MULTILINE)
    assert len(printed) == 8
    assert set(printed) <= set(rows)


def test_the_parts_of_a_step_match_the_measurement():
    measured = json.loads((RESULTS / "network.json").read_text())
    labels = {
        "f32 mean": "f32 mean",
        "bf16 mean": "bf16 mean",
        "int8 psum": "signs added up as int8",
        "vote": "vote",
        "unsent vote": "vote of each worker alone: packs and unpacks",
        "none": "own signs, nothing sent",
    }
    for name, label in labels.items():
        candidate = measured["results"][0]["candidates"][name]
        wire = candidate["wire_seconds"]
        times = (candidate["median"], wire, candidate["exposed_seconds"])
        cells = [f"{1e3 * time:,.0f}" if time is not None else "-" for time in times]
        assert row_of(label, *cells) in PAGES["performance"]
    assert f"{measured['machine']['idle']:.0%} idle" in PAGES["performance"]


def test_the_tables_of_faults_match_the_measurement():
    found = json.loads((RESULTS / "elastic_faults.json").read_text())["results"]
    page, rows = PAGES["elastic"].partition("### What a server costs")[0], []
    for model in ("digits", "language model"):
        undisturbed, killed = (found["kills"][f"{model}, {run}"] for run in RUNS_OF_FAULTS)
        assert killed["kills_left"] == 0
        servers = sum(kill["slot"] is None for kill in killed["killed"])
        assert (len(killed["killed"]) - servers, servers) == (30, 5)
        cells = [milliseconds(run["waits"]["max"]) for run in (undisturbed, killed)]
        for run in (undisturbed, killed):
            ((name, value),) = run["quality"].items()
            cells.append(f"{value:.1%}" if name == "accuracy" else f"{value:.3f}")
        rows.append(row_of(model, *cells, f"{killed['mean_voters']:.1f}"))
    for name, label in LINKS.items():
        case = found["links"][name]
        times = case["steps_of_others"]
        cells = [milliseconds(times[key]) for key in ("median", "percentile_95", "max")]
        missed = f"{case['missed']} of {case['steps']}" if "bad" in case or "cut" in case else "-"
        rows.append(row_of(label, *cells, str(case["deadline_waits"]), missed))
    printed = re.findall(r"^\|.*\d m?s \|.*\|$", page, re.MULTILINE)
    assert printed == rows
    back = found["links"]["one worker cut off for 10 s"]["seconds_to_return"]
    assert f"voted again {back:.1f} s after the cut" in " ".join(page.split())


def milliseconds(seconds):
    return f"{1e3 * seconds:,.0f} ms"


def test_the_costs_of_a_server_match_the_measurements():
    page = " ".join(PAGES["elastic"].partition("### What a server costs")[2].split())
    files = {"100 Mbit/s": "network-100mbit", "1 Gbit/s": "network", "10 Gbit/s": "network-10gbit"}
    for rate, file in files.items():
        [result] = json.loads((RESULTS / f"{file}.json").read_text())["results"]
        candidates = result["candidates"]
        cells = [milliseconds(candidates["vote"]["median"])]
        for name in ("vote server", "vote server, 1 shard"):
            times = candidates[name]
            cells += [milliseconds(times["median"]), milliseconds(times["wire_seconds"])]
        assert row_of(rate, *cells) in page
    replay = json.loads((RESULTS / "elastic_replay.json").read_text())["results"]
    assert replay["steps"] == 500
    assert f"with {replay['parameters'] / 1e6:.1f} million parameters" in page
    assert f"needs {replay['replay_seconds']:.1f} s, compiling included" in page
    assert f"took {replay['training_seconds']:.0f} s" in page


RUNS_OF_FAULTS = ("undisturbed", "killed")
LINKS = {
    "undisturbed": "undisturbed",
    "2% of packets lost": "2% of packets lost",
    "50 ms delay each way": "50 ms delay each way",
    "one worker cut off for 10 s": "one worker cut off for 10 s",
    "one worker 20 times slower": "one worker computes 20 times longer",
    "one worker with input 20 times slower": "one worker's input takes 20 times longer",
    "one worker late by a moment": "one worker is late by the deadline and a moment",
}


def test_the_tables_of_schedules_match_the_compiled_programs():
    results = json.loads((RESULTS / "overlap.json").read_text())["results"]
    found = {(r["model"], r["exchange"], r["buckets"], r["target"]): r for r in results}
    names = {"vote": "vote", "scaled signs": "`ef_sign_sgd`"}

    def cells(result):
        size = f"{result['bytes_sent'] / 1e6:,.{0 if result['bytes_sent'] > 1e9 else 1}f} MB"
        share = f"{result['share_in_flight']:.0%}"
        return [size, share, f"{result['temporary_bytes'] / 1e9:.2f} GB"]

    rows = []
    for model, exchange, buckets in dict.fromkeys(key[:3] for key in found):
        name = f"{exchange}, plain JAX"
        if exchange in names:
            name = f"{names[exchange]}, {'one message' if buckets == 1 else f'{buckets} buckets'}"
        node, tpus, slices = (
            found.get((model, exchange, buckets, target))
            for target in ("h100-8", "v5e-8", "v5e-4x16")
        )
        if node and tpus:
            assert node["bytes_sent"] == tpus["bytes_sent"]
            rows.append(row_of(name, *cells(node), *cells(tpus)[1:]))
        if slices:
            rows.append(row_of(name, *cells(slices)))
    printed = re.findall(r"^\| .* [MG]B .*\|$", PAGES["overlap"].replace("**", ""), re.MULTILINE)
    assert sorted(printed) == sorted(rows)


def test_the_modelled_table_matches_the_model():
    table = PAGES["performance"]
    table = table[table.index("each worker's link") :]
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


def test_the_answers_for_other_machines_are_those_of_the_command(capsys):
    printed = re.findall(r"^\| (\d+) (?:at|on) (.*?)\|(.*)\|$", PAGES["choose"], re.MULTILINE)
    assert len(printed) == 6
    for workers, link, rest in printed:
        rate, unit = re.findall(r"([\d.]+) ([MGT]bit)/s", link)[0]
        parameters, computing, mean, vote, answer = (cell.strip() for cell in rest.split("|"))
        options = f"--parameters '{parameters}' --workers {workers} --link {rate}{unit.lower()}"
        cost.main(shlex.split(f"{options} --step-time '{computing}'"))
        advice = capsys.readouterr().out.splitlines()[-1]
        times = re.findall(r"(?:takes|mean|vote) ([\d.,]+ m?s)", advice)
        assert times == ([vote, mean] if answer.startswith("vote") else [mean, vote])
        assert advice.startswith("Vote") == answer.startswith("vote")
        assert ("--local-steps" in advice) == answer.endswith("local steps")


def test_the_advice_shown_is_what_the_command_prints(capsys):
    command, advice = re.findall(r"m signax.cost (.*)\n```\n\n```text\n(.*)\n", PAGES["choose"])[0]
    cost.main(command.split())
    assert capsys.readouterr().out.splitlines()[-1] == advice


def test_memory_matches_the_results():
    found = json.loads((RESULTS / "memory.json").read_text())
    assert found["settings"]["workers"] == 4
    rows = re.findall(r"^\| (.*?) \|(.*?)\|(.*?)\| (\d\.\d\d) \|", PAGES["choose"], re.MULTILINE)
    printed = {re.sub(r"{func}`signax\.(\w+)`", r"\1", row[0]): float(row[-1]) for row in rows}
    printed["adamw"] = printed.pop("AdamW on the mean")
    printed["muon on the mean"] = printed.pop("Muon on the mean")
    assert len(printed) == 11
    for name, copies in printed.items():
        assert copies == pytest.approx(found["results"][name]["state"], abs=0.005), name


def test_three_quarters_of_bf16_weights_do_not_move_at_a_step_of_1e_4():
    weights = (0.1 * jax.random.normal(jax.random.key(0), (100_000,))).astype(jnp.bfloat16)
    stuck = np.mean(np.asarray(weights - jnp.bfloat16(1e-4) == weights))
    assert 0.7 < stuck < 0.8
