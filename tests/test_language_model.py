"""The language model: its example and its benchmark in small, and the committed results."""

import importlib
import json
import math
import runpy
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from processes import BENCHMARKS, EXAMPLES, ROOT, run_program

from signax import diagnostics

EXAMPLE = EXAMPLES / "train_language_model.py"
PARAMETERS = 998_784  # of the default model
METHODS = ("adamw", "signum", "lion", "mixed", "ef", "muon", "muon-mean")
MOMENTA = (0.6, 0.8, 0.9)  # the tuned values

small = ("--layers", 1, "--heads", 2, "--width", 16, "--context", 16, "--validation-windows", 16)
short = ("--steps", 6, "--evaluate-every", 3, "--batch-size", 8, "--workers", 4, "--seed", 3)


def train(folder, *options):
    finished = run_program(EXAMPLE, *small, *short, "--json", folder / "out.json", *options)
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "out.json").read_text()), finished


def parse(monkeypatch, program, *options):
    """Run a program in this process until it exits."""
    monkeypatch.setattr(sys, "argv", [program.name, *options])
    monkeypatch.syspath_prepend(str(program.parent))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(program), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize("program", [EXAMPLE, BENCHMARKS / "language_model.py"])
def test_help_lists_the_commands(monkeypatch, capsys, program):
    assert parse(monkeypatch, program, "--help") == 0
    assert f"python {program.parent.name}/{program.name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 0", "--layers 0 must be at least 1"),
        ("--seed -1", "--seed -1 must not be negative"),
        ("--step-size 0", "--step-size 0.0 must be above 0"),
        ("--momentum 1", "--momentum 1.0 must be in [0, 1)"),
        ("--width 100 --heads 3", "--width 100 is no multiple of --heads 3"),
        ("--vocabulary 100", "--vocabulary 100 must be at least the 128 of ASCII"),
        ("--steps 9 --stop-at 10", "--stop-at 10 is after the last of --steps 9"),
        ("--processes 2", "belong together"),
        ("--coordinator a:1 --processes 2 --process-id 2", "--process-id 2 is none of"),
        (
            "--coordinator a:1 --processes 3 --process-id 0",
            "--workers 8 is no multiple of --processes 3",
        ),
        ("--method sgd", "invalid choice: 'sgd'"),
    ],
)
def test_rejects_options_that_do_not_fit(monkeypatch, capsys, options, message):
    assert parse(monkeypatch, EXAMPLE, *options.split()) == 2
    assert message in capsys.readouterr().err


def test_accelerators_are_not_divided_into_simulated_workers(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    example = importlib.import_module("train_language_model")
    options = "--coordinator a:1 --processes 3 --process-id 0 --accelerators"
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *options.split()])
    assert example.parse_arguments(example.make_parser("")).processes == 3


def test_rejects_a_batch_that_workers_cannot_share():
    finished = run_program(EXAMPLE, "--workers", 3)
    assert finished.returncode == 2
    assert "--batch-size 32 is no multiple of 3 workers" in finished.stderr


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_writes_its_report(tmp_path, method):
    report, finished = train(tmp_path, "--method", method, "--figure", tmp_path / "out.png")
    assert (report["method"], report["workers"], report["seed"]) == (method, 4, 3)
    # Embeddings of 128 characters and 16 positions, four matrices of the width, three of 40 gated
    # units, three norms.
    assert report["parameters"] == (128 + 16) * 16 + 4 * 16 * 16 + 3 * 16 * 40 + 3 * 16
    curve = report["curve"]
    assert curve["step"] == [3, 6]
    assert 0 < curve["seconds"][0] < curve["seconds"][1]
    assert all(0 < loss < 10 for loss in curve["loss"])
    assert report["validation_loss"] == curve["validation_loss"][-1] < 10
    mean = 2 * 3 * report["parameters"]  # f32 in a ring of four
    least, most = (mean, mean + 64) if method in ("adamw", "muon-mean") else (1, mean / 2)
    assert least <= report["bytes_per_step"] <= most
    assert f"{report['bytes_per_step']:,} bytes" in finished.stdout
    assert "6/6" in finished.stderr  # the progress bar
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("size", "millions"), [("small", 1.0), ("gpt2", 124.0)])
def test_a_vote_on_every_leaf_sends_31_times_fewer_bytes(monkeypatch, size, millions):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    example = importlib.import_module("train_language_model")
    args = types.SimpleNamespace(**example.sizes[size], dtype="float32")
    params = nnx.state(nnx.eval_shape(lambda: example.GPT(args, nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(1e6 * millions, 0.02)
    mean = diagnostics.wire_bytes(params, 8, scheme="mean")
    assert mean >= 31 * diagnostics.wire_bytes(params, 8)


def load_arrays(folder):
    """Every array of a checkpoint by name, as NumPy arrays, since devices differ here."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_a_stopped_and_continued_run_equals_an_uninterrupted_run(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected, _ = train(tmp_path, "--checkpoint", whole)
    train(tmp_path, "--checkpoint", stopped, "--stop-at", 3)
    continued, _ = train(tmp_path, "--checkpoint", stopped)
    assert continued["curve"]["step"] == [3, 6]
    assert continued["validation_loss"] == expected["validation_loss"]
    leaves = [load_arrays(folder / "6" / "training") for folder in (whole, stopped)]
    assert leaves[0].keys() == leaves[1].keys()
    assert len(leaves[0]) > 9
    for name, leaf in leaves[0].items():
        np.testing.assert_array_equal(leaf, leaves[1][name], strict=True)

    other = run_program(EXAMPLE, *small, *short, "--checkpoint", stopped, "--step-size", 0.5)
    assert other.returncode == 1
    assert "holds a run with step_size = " in other.stderr


# The benchmark.


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("language_model")


def finished_run(method, step_size, seed, loss, curve=None, momentum=0.9):
    costs = {"bytes_per_step": 3200 if method == "adamw" else 100, "step_seconds": 0.5}
    run = {"method": method, "step_size": step_size, "momentum": momentum, "seed": seed}
    return {**run, **costs, "validation_loss": loss, "curve": curve}


def test_the_search_ends_when_the_best_has_worse_neighbours_on_both_sides(benchmark):
    for lowest in (-3, 0, 4):
        exponent, losses = 0, {}
        while exponent is not None:
            losses[exponent] = abs(exponent - lowest) if exponent < 3 else float("inf")
            exponent = benchmark.next_exponent(losses)
        best = min(losses, key=losses.__getitem__)
        assert best == min(lowest, 2)
        assert losses[best - 1] > losses[best] < losses[best + 1]


def test_the_search_descends_from_sizes_that_diverge(benchmark):
    losses, exponent = {4: float("inf")}, 4
    while exponent is not None and len(losses) < 20:
        losses[exponent] = float("inf") if exponent > 1 else 2.0 + exponent**2
        exponent = benchmark.next_exponent(losses)
    assert min(losses, key=losses.__getitem__) == 0
    assert {-1, 0, 1} <= set(losses)


def test_rejects_mixing_runs_of_different_settings(benchmark):
    args = types.SimpleNamespace(json="out.json")
    runs = [{**finished_run("lion", 2.0, 0, 2.1), "link": "namespaces"}]
    wanted = {"method": "lion", "step_size": 2.0, "seed": 0, "link": "namespaces"}
    assert benchmark.is_finished(args, runs, wanted)
    assert not benchmark.is_finished(args, runs, {**wanted, "seed": 1})
    for name, value in {"step_size": 1.0, "link": "loopback"}.items():
        with pytest.raises(SystemExit, match=f"out.json holds a run of lion with {name} = "):
            benchmark.is_finished(args, runs, {**wanted, name: value})


def test_the_best_size_is_chosen_by_the_first_seed_and_reported_for_all_seeds(benchmark):
    runs = [
        *(finished_run("adamw", 2.0, seed, loss) for seed, loss in enumerate((2.0, 2.2, 2.4))),
        finished_run("lion", 1.0, 0, 2.3),
        finished_run("lion", 2.0, 0, 2.2, momentum=0.5),
        finished_run("lion", 2.0, 0, 2.1),
        finished_run("lion", 4.0, 0, float("nan")),
        finished_run("lion", 2.0, 1, 2.5),
    ]
    assert benchmark.tuned([finished_run("ef", 1.0, 0, float("nan"))]) == {}
    found = benchmark.tuned(runs)
    assert found["adamw"]["validation_losses"] == [2.0, 2.2, 2.4]
    lion = found["lion"]
    assert (lion["step_size"], lion["momentum"]) == (2.0, 0.9)
    assert lion["validation_losses"] == [2.1, 2.5]
    assert lion["over_adamw"] == pytest.approx(2.3 / 2.2 - 1)
    assert lion["times_fewer_bytes"] == 32


def test_times_run_until_the_final_loss_of_adamw(benchmark):
    slow = {"seconds": [10.0, 20.0, 30.0], "validation_loss": [3.0, 2.5, 2.0]}
    fast = {"seconds": [2.0, 4.0, 6.0], "validation_loss": [2.9, 2.0, 1.9]}
    never = {"seconds": [2.0, 4.0], "validation_loss": [2.9, 2.1]}
    runs = [
        finished_run("adamw", 1.0, 0, 2.0, slow),
        finished_run("lion", 1.0, 0, 1.9, fast),
        finished_run("ef", 1.0, 0, 2.1, never),
        finished_run("lion", 1.0, 1, 1.9, fast),  # AdamW has not run with this seed
    ]
    rows = benchmark.times(runs)
    assert [row["seconds"] for row in rows] == [30.0, 4.0, None]
    assert [row["times_faster"] for row in rows] == [1.0, 7.5, None]


@pytest.fixture
def tune(benchmark, monkeypatch, tmp_path):
    """Run `tune` with a stub for the example, and return the options of each call."""

    def tune(*options):
        called = []

        def report(command, **pipes):
            del pipes
            words = (word.removeprefix("--").split("=") for word in command if "=" in word)
            given = dict(words)
            called.append(given)
            step_size, momentum = float(given["step-size"]), float(given["momentum"])
            loss = 2 + abs(math.log2(step_size / 2e-3)) + (momentum - 0.8) ** 2
            run = finished_run(
                given["method"], step_size, int(given["seed"]), loss, momentum=momentum
            )
            run |= {"steps": int(given["steps"]), "parameters": 1, "workers": given["workers"]}
            Path(given["json"]).write_text(json.dumps(run))
            return subprocess.CompletedProcess(command, 0)

        stub = types.SimpleNamespace(run=report, DEVNULL=None)
        monkeypatch.setattr(benchmark, "subprocess", stub)
        arguments = ["tune", "--methods", "adamw", "lion", "--json", str(tmp_path / "out.json")]
        monkeypatch.setattr(sys, "argv", ["language_model.py", *arguments, *map(str, options)])
        benchmark.main()
        names = ("step-size", "momentum", "seed")
        return [(run["method"], *(float(run[name]) for name in names)) for run in called]

    return tune


def test_tune_searches_one_grid_with_all_seeds_and_resumes(tune, tmp_path, capsys):
    called = tune("--seeds", 5, 6)
    results = tmp_path / "out.json"
    report = json.loads(results.read_text())
    for method in ("adamw", "lion"):
        own = {tuple(rest) for name, *rest in called if name == method}
        for momentum in (0.6, 0.8, 0.9):
            assert own >= {(size, momentum, 5) for size in (1e-3, 2e-3, 4e-3)}
        assert {one for one in own if one[-1] == 6} == {(2e-3, m, 6) for m in (0.6, 0.8, 0.9)}
        tuned = report["results"]["tuned"][method]
        assert (tuned["step_size"], tuned["momentum"]) == (2e-3, 0.8)
    assert "32.0" in capsys.readouterr().out

    report["results"]["runs"].pop()
    results.write_text(json.dumps(report))
    assert tune("--seeds", 5, 6) == called[-1:]
    with pytest.raises(SystemExit, match="holds results of other settings"):
        tune("--steps", 9)


def test_network_trains_in_processes_and_compares_times(tmp_path):
    tuned = {
        "adamw": {"step_size": 4e-3, "momentum": 0.9},
        "signum": {"step_size": 1e-3, "momentum": 0.5},
    }
    (tmp_path / "tuned.json").write_text(json.dumps({"results": {"tuned": tuned}}))
    finished = run_program(
        BENCHMARKS / "language_model.py",
        *("network", "--methods", "adamw", "signum", "--steps", 4, "--voted-steps", 6),
        *("--evaluate-every", 2, "--seeds", 0, "--workers", 2, "--batch-size", 4, *small),
        *("--tuned", tmp_path / "tuned.json", "--json", tmp_path / "out.json"),
    )
    assert finished.returncode == 0, finished.stderr
    files = ("--json", tmp_path / "out.json", "--figure", tmp_path / "out.png")
    assert run_program(BENCHMARKS / "language_model.py", "draw", *files).returncode == 0
    report = json.loads((tmp_path / "out.json").read_text())
    averaged, voted = report["results"]["runs"]
    assert (averaged["steps"], voted["steps"]) == (4, 6)
    for one in (averaged, voted):
        assert one["settings"]["processes"] == one["settings"]["workers"] == 2
        assert one["link"] in ("namespaces", "loopback")
        assert tuned[one["method"]].items() <= one.items()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    first = report["results"]["times"][0]
    assert first["times_faster"] == 1
    assert 0 < first["seconds"] <= averaged["curve"]["seconds"][-1]


# The committed results.


def load_results(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["results"]


@pytest.fixture(scope="module")
def results():
    return load_results("language_model")


def at(runs, momentum):
    return [run for run in runs if run["momentum"] == momentum]


def test_every_method_has_the_same_tuning_and_three_seeds(benchmark, results):
    runs = results["runs"]
    assert results["tuned"] == benchmark.tuned(runs)
    # All runs share the text, the model and the number of steps. The first ones leave two out.
    defaults = {"mesh": {"data": 8}, "validation_windows": 512}
    settings = [{**defaults, **run["settings"]} for run in runs]
    assert len({json.dumps(one, sort_keys=True) for one in settings}) == 1
    assert len({run["steps"] for run in runs}) == 1
    assert {run["parameters"] for run in runs} == {PARAMETERS}
    assert {run["momentum"] for run in runs} == set(MOMENTA)
    for momentum in MOMENTA:
        found = benchmark.tuned(at(runs, momentum))
        assert set(found) == set(METHODS)
        for method, one in found.items():
            own = [run for run in at(runs, momentum) if run["method"] == method]
            first = {run["step_size"]: run["validation_loss"] for run in own if run["seed"] == 0}
            best = one["step_size"]
            for neighbour in (best / 2, best * 2):
                assert not first[neighbour] < first[best]  # the loss may be NaN
            assert {run["seed"] for run in own if run["step_size"] == best} == {0, 1, 2}


def test_a_vote_is_within_two_percent_of_adamw_with_31_times_fewer_bytes(results):
    averaged, voted = results["tuned"]["adamw"], results["tuned"]["lion"]
    model = jax.ShapeDtypeStruct((PARAMETERS,), jax.numpy.float32)
    assert 0 <= averaged["bytes_per_step"] - diagnostics.wire_bytes(model, 8, scheme="mean") <= 64
    assert np.mean(voted["validation_losses"]) <= 1.02 * np.mean(averaged["validation_losses"])
    assert 31 * voted["bytes_per_step"] <= averaged["bytes_per_step"]


def test_voted_muon_ends_a_tenth_below_adamw_with_the_bytes_of_a_vote(results):
    tuned = results["tuned"]
    assert tuned["muon"]["validation_loss"] <= 0.9 * tuned["adamw"]["validation_loss"]
    assert tuned["muon"]["validation_loss"] <= 1.02 * tuned["muon-mean"]["validation_loss"]
    assert tuned["muon"]["bytes_per_step"] == tuned["lion"]["bytes_per_step"]


def test_the_table_in_the_docs_matches_the_results(benchmark, results):
    page = (ROOT / "docs" / "performance.md").read_text().replace("**", "")
    found = [benchmark.tuned(at(results["runs"], momentum)) for momentum in MOMENTA]
    for method, best in results["tuned"].items():
        by_momentum = [one[method] for one in found]
        losses = best["validation_losses"]
        cells = (
            method,
            *(f"{one['validation_loss']:.3f} ({one['step_size']:g})" for one in by_momentum),
            f"{min(losses):.3f} to {max(losses):.3f}",
            f"{best['over_adamw']:+.1%}",
            f"{best['bytes_per_step']:,}",
        )
        assert f"| {' | '.join(cells)} |" in page
    assert f"voted Lion ends {results['tuned']['lion']['over_adamw']:.1%} above AdamW" in page
    assert f"voted Muon ends {-results['tuned']['muon']['over_adamw']:.1%} below AdamW" in page


def test_over_slow_links_votes_reach_the_loss_of_adamw_several_times_sooner(benchmark):
    results = load_results("language_model_network")
    assert results["times"] == benchmark.times(results["runs"])
    assert {run["link"] for run in results["runs"]} == {"namespaces"}
    times = {"adamw": [], "lion": [], "muon": []}
    for row in results["times"]:
        times[row["method"]].append(row["seconds"])
    assert [len(seconds) for seconds in times.values()] == [3, 3, 3]
    assert 6 * np.mean(times["lion"]) <= np.mean(times["adamw"])
    assert 8 * np.mean(times["muon"]) <= np.mean(times["adamw"])
