"""The benchmark of one accelerator runs in small, on a CPU, and its numbers add up."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import BENCHMARKS, run_program

PARAMETERS = 50_000


@pytest.fixture
def model(monkeypatch):
    """The module with the rows of whole steps, outside of any package as a program is."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("accelerator_model")


def run(tmp_path, *options):
    """Run the benchmark, and return its report's results and its output."""
    report = tmp_path / "out" / "report.json"
    tiny = ("--tiny", "--parameters", PARAMETERS, "--voters", 2, "--rows", 1, "--seconds", 0.01)
    done = run_program(BENCHMARKS / "accelerator.py", *tiny, "--json", report, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(report.read_text())
    assert report["benchmark"] == "accelerator"
    assert report["machine"]["jax"] == jax.__version__
    assert report["settings"]["device"] == jax.devices()[0].device_kind
    return report["results"], done.stdout


def test_rows_of_kernels_report_bandwidths(tmp_path):
    results, printed = run(tmp_path, "--groups", "card", "pack", "count", "apply")
    found = {(row["group"], row["name"]): row for row in results}
    assert len(found) == len(results) == 16
    for row in results:
        assert "error" not in row
        assert 0 < min(row["seconds"]) <= row["milliseconds"] / 1e3 <= max(row["seconds"])
        speed = row["bytes"] / row["milliseconds"] / 1e6
        assert row["gigabytes_per_second"] == pytest.approx(speed)
        assert row["of_copy"] > 0
        assert row["name"] in printed
    words = -(-PARAMETERS // 32)
    assert found["card", f"copy {PARAMETERS:,}"]["bytes"] == 8 * PARAMETERS
    for group, dtype in (("pack", "float32"), ("apply", "bfloat16")):  # the latter moves it twice
        size = found[group, f"flat {PARAMETERS:,} {dtype}"]["bytes"]
        assert size == 4 * PARAMETERS + PARAMETERS / 8
    assert found["count", f"8 x {words:,} words"]["bytes"] == 9 * 4 * words


def test_a_spent_budget_skips_rows_and_says_so(tmp_path):
    results, printed = run(tmp_path, "--groups", "count", "--budget", 0)
    assert [row["error"] for row in results] == ["skipped: the budget of 0 s is spent"] * 2
    assert "skipped" in printed


def test_steps_and_training_steps_are_compared_with_their_reference(tmp_path):
    results, _ = run(tmp_path, "--groups", "step", "model", "--trace", tmp_path / "trace")
    assert not [row["error"] for row in results if "error" in row]
    steps, models = ([r for r in results if r["group"] == group] for group in ("step", "model"))
    assert len(steps) == 6 * 2
    for row in [*steps, *models]:
        assert (row["reference"] is None) == ("ratio" not in row)
    for row in models:
        tokens = row["tokens_per_second"] * row["milliseconds"] / 1e3
        assert tokens == pytest.approx(2 * 1 * 16)
    assert [row["name"] for row in models] == ["adamw on the mean", "lion, voted", "muon, voted"]
    folders = sorted(folder.name for folder in (tmp_path / "trace").iterdir())
    assert folders == [
        "model-lion-voted",
        "step-signum-2-voters-bfloat16",
        "step-signum-2-voters-float32",
    ]


@pytest.mark.parametrize("name", ["sgd", "adamw", "signum", "lion", "ef_sign_sgd"])
def test_simulated_steps_equal_steps_of_the_optimizer_under_vmap(model, name):
    workers, shapes = 3, {"a": (5, 7), "b": (6,)}
    tx = model.optimizers(model.load_example(), workers)[name]
    row = model.step_row(f"{name}, x", tx, shapes, workers, jnp.float32, None, {})
    carry, grads = row.init()
    start = dict(zip(shapes, map(np.asarray, carry), strict=False))
    state = tx.init(start)
    for _ in range(2):
        carry, _ = row.program(carry, grads)

    def two_steps(grads):
        params, own = start, state
        for _ in range(2):
            updates, own = tx.update(grads, own, params)
            params = optax.apply_updates(params, updates)
        return params

    expected = jax.vmap(two_steps, axis_name=model.AXIS)(grads)
    for n, key in enumerate(shapes):
        assert carry[n].shape == shapes[key]  # the workers agree on parameters
        np.testing.assert_allclose(carry[n], expected[key][0], rtol=1e-6)
        assert (carry[n] != start[key]).any()


def test_only_a_workers_own_state_has_an_axis_of_workers(model):
    workers, shapes = 4, {"a": (40, 50)}
    own = {}
    example = model.load_example()
    for name, tx in model.optimizers(example, workers).items():
        row = model.step_row(f"{name}, x", tx, shapes, workers, jnp.float32, None, {})
        carry, _ = jax.eval_shape(row.init)
        own[name] = [leaf.shape for leaf in carry if leaf.ndim > 1 and leaf.shape[0] == workers]
    assert own["sgd"] == own["adamw"] == []
    assert own["signum"] == own["lion"] == [(workers, 40, 50)]
    assert len(own["ef_sign_sgd"]) == 2  # a worker's memory, and its memory as a server


def test_the_example_loads_without_packages_that_only_training_needs(model, monkeypatch):
    find_spec, hidden = importlib.util.find_spec, ("tqdm", "orbax", "orbax.checkpoint")
    fresh = (*hidden, "train_language_model")
    for name in fresh:
        monkeypatch.setitem(sys.modules, name, None)  # restored at the end of the test
        del sys.modules[name]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name)
    )
    example = model.load_example()
    assert example.ocp is None
    assert example.GPT.__module__ == "train_language_model"
