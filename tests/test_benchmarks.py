"""The benchmarks run in small, and their numbers add up."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import BENCHMARKS

import signax
from signax import diagnostics


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks, which are programs outside of any package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def start():
    """Start a benchmark, and terminate it at the end of the test so it can clean up."""
    with contextlib.ExitStack() as stack:

        def start(name, *options):
            command = [sys.executable, str(BENCHMARKS / name), *map(str, options)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
            stack.callback(process.terminate)
            return process

        yield start


def namespaces_of(process):
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir("/run/netns") if f"-{process.pid}-" in name]
    return []


def test_candidates_take_turns_and_warmup_rounds_are_not_timed(load):
    calls = []

    def candidate(name):
        return lambda: calls.append(name)

    seconds = load("report").interleave(
        {"a": candidate("a"), "b": candidate("b")}, 3, warmup=1, before=candidate("|")
    )
    assert calls == ["|", "a", "|", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert all(time > 0 for times in seconds.values() for time in times)
    calls.clear()
    load("report").interleave({"a": candidate("a"), "b": candidate("b")}, 2, warmup=0)
    assert calls == ["a", "a", "b", "b"] * 2


def test_a_summary_has_the_median_and_the_spread(load):
    assert load("report").summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "lower_quartile": 2.0,
        "median": 3.0,
        "upper_quartile": 4.0,
        "min": 1.0,
        "max": 5.0,
    }
    assert set(load("report").summary([2.0]).values()) == {2.0}


def test_parses_rates_and_rejects_others(load):
    bits_per_second = load("namespaces").bits_per_second
    assert [bits_per_second(rate) for rate in ("100mbit", "2.5gbit")] == [1e8, 2.5e9]
    assert bits_per_second("unlimited") == float("inf")
    for wrong in ("fast", "1", "0mbit", "-1gbit", "gbit", "1mbps"):
        with pytest.raises(ValueError, match="rate="):
            bits_per_second(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "fast"), "rate='fast' must be"),
        (("--delay", "soon"), "delay='soon' must be"),
        (("--workers", 1), "--workers 1 must be 2 to 127"),
        (("--rounds", 0), "must be at least 1"),
        (("--candidates", "f64 mean"), "invalid choice: 'f64 mean'"),
    ],
)
def test_rejects_invalid_options(load, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["network.py", *map(str, options)])
    with pytest.raises(SystemExit) as refusal:
        load("network").main()
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


def test_network_reports_plausible_bytes_and_times(start, tmp_path):
    workers, parameters, rate = 2, 300_001, 1e8
    process = start(
        *("network.py", "--workers", workers, "--parameters", parameters, "--rounds", 2),
        *("--rate", "100mbit", "--leaves", 3),
        *("--json", tmp_path / "out" / "network.json", "--figure", tmp_path / "network.png"),
        *("--candidates", "vote", "f32 mean", "int8 psum", "unsent vote", "none", "vote server"),
    )
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert namespaces_of(process) == []
    assert (tmp_path / "network.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "out" / "network.json").read_text())
    assert report["machine"]["jax"] == jax.__version__
    assert report["settings"]["rate"] == "100mbit"
    [result] = report["results"]
    assert (result["workers"], result["parameters"]) == (workers, parameters)
    candidates = result["candidates"]
    assert [*candidates] == ["vote", "f32 mean", "int8 psum", "unsent vote", "none", "vote server"]
    server = candidates.pop("vote server")
    assert 0 < server["min"] <= server["median"]
    assert all(0 < seconds < server["max"] for seconds in server["server_seconds"].values())

    tree = jax.ShapeDtypeStruct((parameters,), jnp.float32)
    mean = diagnostics.wire_bytes(tree, workers, scheme="mean")
    expected = {
        "vote": diagnostics.wire_bytes(tree, workers),
        "f32 mean": mean,
        "int8 psum": mean / 4,
        "unsent vote": 0,
        "none": 0,
    }
    for name, candidate in candidates.items():
        assert candidate["hlo_bytes"] == pytest.approx(expected[name], rel=0.05)
        assert len(candidate["seconds"]) == 2
        assert 0 < candidate["min"] <= candidate["median"] <= candidate["max"]
        assert f"{candidate['hlo_bytes']:,}" in printed
        beyond = candidate["median"] - candidates["none"]["median"]
        assert candidate["exposed_seconds"] == pytest.approx(beyond)
    assert candidates["vote"]["times_the_vote"] == 1
    assert 0 <= report["machine"]["idle"] <= 1

    if result["link"] == "loopback":
        assert "NO RATE LIMIT" in printed
        return
    assert result["rate_bits_per_second"] == rate
    ballots = 2 * workers * parameters  # in bits, with the decisions
    assert server["wire_seconds"] == pytest.approx(ballots / rate)
    assert server["min"] >= server["wire_seconds"] - 2 * 8 * result["burst_bytes"] / rate
    for candidate in candidates.values():
        # Headers, acknowledgements and a barrier add to the program's bytes.
        overhead = candidate["counted_bytes"] - candidate["hlo_bytes"]
        assert 0 <= overhead <= 5_000 + 0.05 * candidate["hlo_bytes"]
        beyond_the_burst = candidate["hlo_bytes"] - result["burst_bytes"]
        assert candidate["min"] >= 8 * beyond_the_burst / rate
    # A mean waits for the wire; the bound allows for a busy machine.
    assert candidates["f32 mean"]["min"] <= 5 * candidates["f32 mean"]["wire_seconds"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_namespaces(load, start, tmp_path, number):
    if reason := load("namespaces").unavailable():
        pytest.skip(reason)
    process = start("network.py", "--workers", 2, "--json", tmp_path / "network.json")
    while len(namespaces_of(process)) < 5 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)  # until workers run inside
    assert len(namespaces_of(process)) == 5  # the bridge, two workers, the vote server and a shard
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert namespaces_of(process) == []


def run(start, tmp_path, name, *options):
    """Run a benchmark, and return its report and its output."""
    report, figure = tmp_path / "out" / "report.json", tmp_path / "out" / "figure.png"
    process = start(f"{name}.py", *options, "--json", report, "--figure", figure)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert figure.read_bytes().startswith(b"\x89PNG")
    report = json.loads(report.read_text())
    assert report["benchmark"] == name
    assert report["machine"]["jax"] == jax.__version__
    return report, printed


def assert_spread(found, times=None):
    assert 0 < found["min"] <= found["median"] <= found["max"] < float("inf")
    if times is not None:
        assert len(found["seconds"]) == times


def test_a_step_lasts_as_long_as_on_the_slowest_worker(load):
    reports = [
        {"seconds": [1.0, 5.0, 3.0], "counted_bytes": 10, "hlo_bytes": 7, "parameters": "same"},
        {"seconds": [2.0, 4.0, 3.5], "counted_bytes": 20, "hlo_bytes": 7, "parameters": "same"},
    ]
    combined = load("network").combine("vote", reports)
    assert combined["seconds"] == [2.0, 5.0, 3.5]
    assert (combined["median"], combined["counted_bytes"]) == (3.5, 15)
    with pytest.raises(SystemExit, match="different parameters"):
        load("network").combine("vote", [reports[0], reports[1] | {"parameters": "other"}])


# --- kernels.py ------------------------------------------------------------------------------


def test_kernels_reports_ratios_to_the_reference(start, tmp_path):
    options = ("--parameters", 70_000, "--workers", 9, "--rounds", 2)
    report, printed = run(start, tmp_path, "kernels", *options, "--shapes", "50000", "257x99")
    found = [(result["kernel"], result["argument"]) for result in report["results"]]
    arguments = ["50000", "257x99"]
    assert found == [
        *(("pack", argument) for argument in arguments),
        ("count", "u32[9, 244]"),
        *(("apply", argument) for argument in arguments),
    ]
    for result in report["results"]:
        candidates = result["candidates"]
        assert candidates[result["reference"]]["ratio"]["median"] == 1
        for name, candidate in candidates.items():
            assert_spread(candidate, 2)
            assert_spread(candidate["ratio"])
            assert name in printed
        assert any(candidate["goal"] for candidate in candidates.values())


@pytest.mark.parametrize("workers", [2, 9, 64, 127, 128])
def test_counting_and_its_references_give_the_majority_of_participants(load, workers):
    kernels, share = load("kernels"), 100
    out = np.arange(workers) % 3 == 1
    parts = kernels.ballot_box(workers, share, out=out)
    words = np.asarray(parts).reshape(workers, -1)[:, :share]
    bits = words[:, None] >> np.arange(32, dtype=np.uint32)[:, None] & 1  # [M, 32, share]
    assert not words[out].any()
    assert words[~out].any(axis=1).all()
    sums = 2 * bits[~out].sum(axis=0).astype(int) - (~out).sum()
    won = (sums > 0) | (sums == 0)  # the coin is 1, so a tie is +1
    expected = (won.astype(np.uint32) << np.arange(32, dtype=np.uint32)[:, None]).sum(0)
    np.testing.assert_array_equal(kernels.majority(parts, share), expected)
    for add_up in kernels.sums(workers).values():
        by_sums = kernels.majority_by_sums(parts, share, add_up)
        np.testing.assert_array_equal(by_sums, expected)


def test_a_step_along_packed_words_follows_their_signs(load):
    kernels = load("kernels")
    case = kernels.applying((257, 99))
    start = np.asarray(case.candidates["p - a signs"].parameters)
    moved = np.asarray(case.candidates["p - a signs"]()) - start
    np.testing.assert_allclose(abs(moved), kernels.learning_rate, atol=1e-6)
    assert 0.4 < (moved > 0).mean() < 0.6


def test_default_shapes_have_about_the_same_size(load):
    sizes = [np.prod(shape) for shape in load("kernels").default_shapes(10_000_000)]
    assert sizes == pytest.approx([10_000_000] * 4, rel=0.01)


# --- scaling.py ------------------------------------------------------------------------------


def test_scaling_reports_bytes_counting_and_compilation(start, tmp_path):
    options = ("--parameters", 100_000, "--most-workers", 8, "--devices", 4, "--leaves", 1, 2)
    options += ("--rounds", 2, "--compilations", 1)
    report, printed = run(start, tmp_path, "scaling", *options)
    results = report["results"]
    assert [row["workers"] for row in results["bytes"]] == [2, 4, 8] * 2
    for row in results["bytes"]:
        assert f"{row['formula']:,}" in printed
        assert (row["compiled"] is None) == (row["workers"] > 4)
    assert [row["workers"] for row in results["counting"]] == [2, 4, 8]
    for row in results["counting"]:
        assert row["words"] == -(-3125 // row["workers"])
        assert_spread(row["compiling"], 1)
        assert_spread(row["running"], 2)
    found = [(row["leaves"], row["scheme"], row["workers"]) for row in results["updates"]]
    assert found == [(n, scheme, 4) for n in (1, 2) for scheme in ("vote", "mean")]
    for row in results["updates"]:
        assert_spread(row["compiling"], 1)


@pytest.mark.parametrize("scheme", ["vote", "mean"])
@pytest.mark.parametrize("workers", [2, 4, 8])
def test_compiled_programs_send_the_bytes_of_the_formula(load, workers, scheme):
    tree = jax.ShapeDtypeStruct((1_000_000,), jnp.float32)
    expected = diagnostics.wire_bytes(tree, workers, scheme=scheme)
    compiled = load("scaling").compiled_bytes(tree, workers, scheme)
    # Two workers gather whole messages, which pad the header once instead of once per part.
    assert compiled == pytest.approx(expected, abs=2048 if workers == 2 else 0)


@pytest.mark.parametrize("leaves", [1, 2, 3, 25, 200])
def test_a_transformer_has_the_requested_number_of_leaves(load, leaves):
    assert len(load("scaling").transformer(leaves)) == leaves


# --- step.py ---------------------------------------------------------------------------------


def test_step_reports_ratios_to_momentum(start, tmp_path):
    report, printed = run(start, tmp_path, "step", "--parameters", 60_000, "--rounds", 2)
    assert [result["tree"] for result in report["results"]] == ["transformer", "flat"]
    for result in report["results"]:
        assert result["parameters"] == pytest.approx(60_000, rel=0.01)
        candidates = result["candidates"]
        assert candidates["sgd, momentum"]["ratio"] == dict.fromkeys(
            ("lower_quartile", "median", "upper_quartile", "min", "max"), 1.0
        )
        for name, candidate in candidates.items():
            assert name in printed
            assert_spread(candidate, 2)
            assert_spread(candidate["ratio"])
        assert candidates["signum"]["passes"] <= candidates["adamw"]["passes"]


@pytest.mark.parametrize("name", ["signum", "signum, voted", "lion"])
def test_a_timed_step_equals_a_step_of_the_optimizer(load, name):
    step = load("step")
    params, grads = {"a": jnp.ones((40, 50))}, {"a": jnp.linspace(-1.0, 1.0, 2000).reshape(40, 50)}
    stepper = step.Stepper(step.optimizers[name](), params, grads)
    stepper()
    reference = {"lion": signax.lion}.get(name, signax.signum)(step.learning_rate)
    updates, _ = reference.update(grads, reference.init(params), params)
    expected = optax.apply_updates(params, updates)
    np.testing.assert_allclose(stepper.params["a"], expected["a"], rtol=1e-6)
    assert not params["a"].is_deleted()


@pytest.mark.parametrize("parameters", [60_000, 1_000_000, 10_000_000])
def test_a_transformer_has_about_the_requested_number_of_parameters(load, parameters):
    step = load("step")
    assert step.count(step.transformer(parameters)) == pytest.approx(parameters, rel=0.01)


# --- crossover.py ----------------------------------------------------------------------------


def modelled_sweep(machine, none=0.5):
    """The measurements of network.py on a machine that follows the model."""
    latency, memory_bandwidth, feed_rate = machine
    sweep = []
    for workers, parameters in [(w, p) for w in (2, 8) for p in (10**5, 10**6, 10**7)]:
        for rate in (1e8, 1e9, None):
            options = {
                "link_rate": min(rate or feed_rate, feed_rate),
                "latency": latency,
                "memory_bandwidth": memory_bandwidth,
            }
            tree = jax.ShapeDtypeStruct((parameters,), jnp.float32)
            seconds = {
                "vote": diagnostics.exchange_seconds(tree, workers, **options),
                "f32 mean": diagnostics.exchange_seconds(tree, workers, scheme="mean", **options),
                "none": 0.0,
            }
            medians = {name: {"median": none + value} for name, value in seconds.items()}
            setting = {"workers": workers, "parameters": parameters, "candidates": medians}
            sweep.append(setting | {"rate": rate and f"{rate:g}", "rate_bits_per_second": rate})
    return sweep


def test_a_machine_that_follows_the_model_is_predicted_exactly(load):
    crossover = load("crossover")
    machine = crossover.Machine(latency=1e-3, memory_bandwidth=5e9, feed_rate=3e9)
    machines, predictions = crossover.predict(modelled_sweep(machine))
    assert len(predictions) == 2 * 3 * 2 * 2
    for found in machines.values():
        # The smallest vote takes a little longer than its collectives.
        np.testing.assert_allclose(found, machine, rtol=0.15)
    for prediction in predictions:
        assert prediction["predicted"] == pytest.approx(prediction["measured"], rel=0.01)


def test_crossover_prints_and_plots_a_sweep(start, tmp_path):
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"results": modelled_sweep((1e-3, 5e9, 3e9))}))
    report, printed = run(start, tmp_path, "crossover", "--sweep", sweep)
    by_model = report["results"]["bf16 mean over vote"]
    assert np.shape(by_model) == (len(report["results"]["rates"]), len(report["results"]["sizes"]))
    slow, *_, fast = by_model
    assert slow[-1] > 15 > 1 > fast[0]  # one bit wins for large messages on slow links only
    assert "off by a factor of 1.0" in printed


def test_crossover_names_a_missing_sweep_and_the_command_to_make_it(start, tmp_path):
    process = start("crossover.py", "--sweep", tmp_path / "none.json")
    assert "network.py --sweep" in process.communicate()[1]
    assert process.returncode == 2
