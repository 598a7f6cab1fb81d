"""benchmarks/sweep.py: runs by vmap equal the example's runs on a mesh; committed results."""

import json
import math

import numpy as np
import pytest
from processes import BENCHMARKS, EXAMPLES, run_program

MODEL = ("--layers", 1, "--heads", 2, "--width", 16, "--context", 16)
SHORT = ("--validation-windows", 16, "--steps", 6, "--batch-size", 8, "--workers", 4)


def sweep(folder, *options):
    results = folder / "sweep.json"
    command = (*MODEL, *SHORT, "--momenta", 0.6, "--json", results, *options)
    finished = run_program(BENCHMARKS / "sweep.py", *command)
    assert finished.returncode == 0, finished.stderr
    return json.loads(results.read_text())["results"], finished.stdout


def test_runs_by_vmap_equal_runs_on_a_mesh(tmp_path):
    grid = ("--exponents", 2, 3, "--seeds", 3, 4)
    found, _ = sweep(tmp_path, "--methods", "lion", "ef-muon", "--evaluate-every", 3, *grid)
    assert len(found) == 8
    for method in ("lion", "ef-muon"):
        options = ("--method", method, "--step-size", 8e-3, "--momentum", 0.6, "--seed", 4)
        every = ("--evaluate-every", 3, "--json", tmp_path / "one.json")
        program = EXAMPLES / "train_language_model.py"
        finished = run_program(program, *MODEL, *SHORT, *every, *options)
        assert finished.returncode == 0, finished.stderr
        expected = json.loads((tmp_path / "one.json").read_text())["curve"]["validation_loss"]
        wanted = {"method": method, "step_size": 8e-3, "seed": 4}
        (run,) = [run for run in found if wanted.items() <= run.items()]
        assert run["validation_losses"] == pytest.approx(expected, rel=2e-4)


def test_methods_train_and_finished_runs_are_left_out(tmp_path):
    methods = ["muon/direction-polar/1", "adamw/ef21/1", "fault/random/others/0.2/muon"]
    methods += ["one-bit-adam/0.5", "diloco/adamw/2/4"]
    options = ("--methods", *methods, "--exponents", 3)
    found, _ = sweep(tmp_path, *options, "--decays", 0.5)
    assert [run["method"] for run in found] == methods
    assert all(math.isfinite(run["validation_losses"][-1]) for run in found)
    again, printed = sweep(tmp_path, *options, "--decays", 0.5, 1.0)
    assert again[: len(found)] == found
    added = again[len(found) :]
    assert [run["decay"] for run in added] == [1.0] * 3  # the other two have no such memories
    assert "fault/random/others/0.2/muon: finished before" in printed


@pytest.mark.parametrize(
    ("steps", "below_adamw", "above_muon"), [(300, 0.1, 0.01), (1200, 0.04, 0.02)]
)
def test_one_bit_is_near_muon_and_below_adamw(steps, below_adamw, above_muon):
    report = json.loads((BENCHMARKS / "results" / "sweep.json").read_text())
    runs = [run for run in report["results"] if run["steps"] == steps and run["parameters"] < 2e6]
    grids = {}
    for run in runs:
        losses = grids.setdefault(run["method"], {})
        setting = run["step_size"], run["momentum"]
        losses.setdefault(setting, {})[run["seed"]] = run["validation_losses"][-1]
    # The best mean over three seeds.
    best = {
        method: min(np.mean([*seeds.values()]) for seeds in losses.values() if len(seeds) == 3)
        for method, losses in grids.items()
        if method in ("adamw", "muon-mean", "muon")
    }
    assert best["muon"] < (1 - below_adamw) * best["adamw"]
    assert best["muon"] < (1 + above_muon) * best["muon-mean"]
