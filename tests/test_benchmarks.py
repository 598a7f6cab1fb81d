"""The benchmarks run as a user would run them, on something small, and their numbers add up."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from signax import diagnostics

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks, which are programs and in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def start():
    """Starts a benchmark, and ends it with the test so that it can tidy up."""
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


def test_candidates_take_turns_and_the_warmup_is_left_out(load):
    calls = []

    def candidate(name):
        return lambda: calls.append(name)

    seconds = load("report").interleave(
        {"a": candidate("a"), "b": candidate("b")}, 3, warmup=1, before=candidate("|")
    )
    assert calls == ["|", "a", "|", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert all(time > 0 for times in seconds.values() for time in times)


def test_a_summary_has_the_median_and_the_spread(load):
    assert load("report").summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "lower_quartile": 2.0,
        "median": 3.0,
        "upper_quartile": 4.0,
        "min": 1.0,
        "max": 5.0,
    }
    assert set(load("report").summary([2.0]).values()) == {2.0}


def test_a_rate_is_read_or_refused(load):
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
def test_wrong_options_are_refused(load, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["network.py", *map(str, options)])
    with pytest.raises(SystemExit) as refusal:
        load("network").main()
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_network_reports_bytes_and_times_that_make_sense(start, tmp_path):
    workers, parameters, rate = 2, 300_001, 1e8
    process = start(
        *("network.py", "--workers", workers, "--parameters", parameters, "--rounds", 2),
        *("--rate", "100mbit", "--leaves", 3),
        *("--json", tmp_path / "out" / "network.json", "--figure", tmp_path / "network.png"),
        *("--candidates", "vote", "f32 mean", "int8 psum", "none"),
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
    assert [*candidates] == ["vote", "f32 mean", "int8 psum", "none"]

    tree = jax.ShapeDtypeStruct((parameters,), jnp.float32)
    mean = diagnostics.wire_bytes(tree, workers, scheme="mean")
    expected = {
        "vote": diagnostics.wire_bytes(tree, workers),
        "f32 mean": mean,
        "int8 psum": mean / 4,
        "none": 0,
    }
    for name, candidate in candidates.items():
        assert candidate["hlo_bytes"] == pytest.approx(expected[name], rel=0.05)
        assert len(candidate["seconds"]) == 2
        assert [*map(max, zip(*candidate["seconds_by_worker"], strict=True))] == (
            candidate["seconds"]
        )
        assert 0 < candidate["min"] <= candidate["median"] <= candidate["max"]
        assert f"{candidate['hlo_bytes']:,}" in printed
    assert candidates["vote"]["times_the_vote"] == 1

    if result["link"] == "loopback":
        assert "NO RATE LIMIT" in printed
        return
    assert result["rate_bits_per_second"] == rate
    for candidate in candidates.values():
        # Headers, acknowledgements and a barrier come on top of what the program sends.
        overhead = candidate["counted_bytes"] - candidate["hlo_bytes"]
        assert 0 <= overhead <= 5_000 + 0.05 * candidate["hlo_bytes"]
        beyond_the_burst = candidate["hlo_bytes"] - result["burst_bytes"]
        assert candidate["min"] >= 8 * beyond_the_burst / rate
    # The wire is what a mean waits for, with room for whatever else this machine does.
    assert candidates["f32 mean"]["min"] <= 5 * candidates["f32 mean"]["wire_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_namespaces(load, start, tmp_path, number):
    if reason := load("namespaces").unavailable():
        pytest.skip(reason)
    process = start("network.py", "--workers", 2, "--json", tmp_path / "network.json")
    while len(namespaces_of(process)) < 3 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)  # until workers run in them
    assert len(namespaces_of(process)) == 3
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert namespaces_of(process) == []
