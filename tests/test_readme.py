"""README's Python runs as it stands, and its figures follow from the library."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from signax import diagnostics

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_code_blocks_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    # In a process of its own, since the first block says how many devices there are.
    program = "\n".join(blocks) + "\nprint(float(loss))\ntx.init({'w': jnp.ones((3, 2))})\n"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 1e-4


def test_the_example_is_about_twenty_lines_long():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert first is not None
    lines = [line for line in first[1].splitlines() if line.strip()]
    assert len(lines) <= 20


def test_the_table_of_bytes_is_what_the_formula_gives():
    params = jax.ShapeDtypeStruct((10_000_000,), jnp.float32)
    half = jax.ShapeDtypeStruct((10_000_000,), jnp.bfloat16)
    for row, sent in [
        ("f32 mean (ring all-reduce)", diagnostics.wire_bytes(params, 8, scheme="mean")),
        ("bf16 mean", diagnostics.wire_bytes(half, 8, scheme="mean")),
        ("majority vote", diagnostics.wire_bytes(params, 8)),
    ]:
        assert f"| {row} | {sent / 1e6:.1f} MB |" in README


def test_three_quarters_of_bf16_weights_do_not_move_at_a_step_of_1e_4():
    weights = (0.1 * jax.random.normal(jax.random.key(0), (100_000,))).astype(jnp.bfloat16)
    stuck = np.mean(np.asarray(weights - jnp.bfloat16(1e-4) == weights))
    assert 0.7 < stuck < 0.8
