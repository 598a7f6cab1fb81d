"""The command `python -m signax.cost`: a longhand example, its overlap, its advice, its errors."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from signax import cost


def test_the_longhand_costs_of_a_billion_parameters():
    """Four workers send 2 (3/4) d bits or numbers, over links of 10 Gbit/s."""
    costs = cost.estimate(10**9, 4, 1e10, 0.3, latency=1e-3, memory_bandwidth=1e12)
    sent = {"f32 mean": 32, "bf16 mean": 16, cost.VOTE: 1, "mean_quantized, 4 bits": 4}
    for name, bits in sent.items():
        assert costs[name].bytes_sent == pytest.approx(1.5 * bits * 1e9 / 8, rel=1e-3)
    assert costs["vote, agreement=True"].bytes_sent == pytest.approx(2.25e9 / 8, rel=1e-3)
    # The count of four workers has three digits.
    assert costs["mean of signs (ssdm)"].bytes_sent == pytest.approx(0.75 * 4e9 / 8, rel=1e-3)
    # 1.5 Gbit in .15 s, two collectives, and 4 GB to read; nothing overlaps.
    assert costs[cost.VOTE].exchange == pytest.approx(0.15 + 0.002 + 0.004, rel=1e-3)
    assert costs[cost.VOTE].step == pytest.approx(0.456, rel=1e-3)
    # The backward pass hides .2 s of the mean's 24 Gbit and one collective.
    assert costs["bf16 mean"].exchange == pytest.approx(2.401)
    assert costs["bf16 mean"].step == pytest.approx(0.3 + 2.401 - 0.2)


def test_a_mean_that_fits_behind_the_backward_pass_costs_nothing():
    costs = cost.estimate(10**6, 8, 1e11, 0.3)
    assert 0 < costs["f32 mean"].exchange < 0.2
    assert costs["f32 mean"].step == 0.3
    assert costs[cost.VOTE].step > 0.3


def test_local_steps_divide_bytes_and_exchange_and_hide_nothing():
    once, often = (cost.estimate(10**8, 4, 1e9, 1.0, local_steps=number) for number in (8, 1))
    for name in cost.METHODS:
        assert once[name].bytes_sent == often[name].bytes_sent / 8
        assert once[name].step == pytest.approx(1 + often[name].exchange / 8)


def test_all_buckets_but_the_last_hide_behind_the_backward_pass():
    one = cost.estimate(10**9, 4, 10e9, 0.3)[cost.VOTE]
    eight = cost.estimate(10**9, 4, 10e9, 0.3, buckets=8)[cost.VOTE]
    sent = 2 * 3 / 4 * 10**9 / 8  # bytes: three quarters of a bit for each parameter, each way
    seconds = (8 * sent / 10e9 + 2 * 50e-6 + 4e9 / 1e12, 8 * sent / 10e9 + 16 * 50e-6 + 4e9 / 1e12)
    np.testing.assert_allclose((one.exchange, eight.exchange), seconds, rtol=1e-3)
    np.testing.assert_allclose(one.step, 0.3 + seconds[0], rtol=1e-3)
    np.testing.assert_allclose(eight.step, 0.3 + seconds[1] / 8, rtol=1e-3)


def test_buckets_that_take_longer_than_the_backward_pass_wait_for_the_link():
    slow = cost.estimate(10**9, 4, 1e9, 0.3, buckets=4)[cost.VOTE]
    # The link never rests after the first quarter of the backward pass, which takes 0.2 s.
    np.testing.assert_allclose(slow.step, 0.3 - 0.2 + 0.05 + slow.exchange, rtol=1e-6)


def test_half_precision_halves_what_a_vote_reads_and_changes_no_bytes():
    wide, narrow = (cost.estimate(10**9, 4, 1e18, 1.0, dtype=d) for d in ("float32", "float16"))
    assert narrow[cost.VOTE].bytes_sent == wide[cost.VOTE].bytes_sent
    read = wide[cost.VOTE].exchange - narrow[cost.VOTE].exchange
    assert read == pytest.approx(2e9 / 1e12)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ("--parameters 1e9 --workers 4 --link 10gbit --step-time 300ms", "Vote: "),
        ("--parameters 1B --workers 8 --link 450gbyte/s --step-time 0.3s", "Average "),
        ("--parameters 1B --workers 4 --link 10Gbps --step-time 0.3s", "Vote: "),
        (
            "--parameters 124M --workers 4 --link 100mbit --step-time 1s",
            "raise --buckets or --local-steps",
        ),
        ("--parameters 100k --workers 8 --link 100gbit --step-time 50us", "Average "),
    ],
)
def test_advice_follows_the_link(capsys, options, advice):
    cost.main(options.split())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(cost.METHODS) + 2
    assert advice in lines[-1]


def test_runs_as_a_module():
    options = ["--parameters=1e9", "--workers=4", "--link=10gbit", "--step-time=300ms"]
    command = [sys.executable, "-m", "signax.cost", *options]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    vote = next(line for line in found.stdout.splitlines() if line.startswith("vote (signum"))
    assert vote.split()[-7:] == ["187.5", "MB", "154", "ms", "454", "ms", "0.182"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8.3B", 8_300_000_000),
        ("1.07g", 1_070_000_000),
        ("4.1m", 4_100_000),
        ("8.03e9", 8_030_000_000),
        ("0.27T", 270_000_000_000),
        ("1,000,000", 1_000_000),
        ("124_000_000", 124_000_000),
    ],
)
def test_reads_counts_exactly(text, number):
    options = f"--workers 2 --link 1gbit --step-time 1s --parameters {text}"
    assert cost.parse_arguments(options.split()).parameters == number


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"parameters": 8e9}, TypeError),
        ({"parameters": 0}, ValueError),
        ({"buckets": 0}, ValueError),
        ({"local_steps": 0}, ValueError),
        ({"step_time": -1.0}, ValueError),
    ],
)
def test_estimate_names_a_wrong_number(wrong, error):
    good = {"parameters": 10**6, "workers": 4, "link_rate": 1e9, "step_time": 1.0}
    ((name, value),) = wrong.items()
    with pytest.raises(error, match=f"{name}={value}"):
        cost.estimate(**(good | wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--parameters", "8z"), "'8z' is no whole number from 1 to 1e15: write 8e9"),
        (("--parameters", "1.5"), "'1.5' is no whole number"),
        (("--parameters", "-5"), "'-5' is no whole number"),
        (("--parameters", "1e20"), "'1e20' is no whole number"),
        (("--parameters", "1.2.3"), "'1.2.3' is no whole number"),
        (("--parameters", "1,5B"), "'1,5B' is no whole number"),
        (("--parameters", "1e999999999"), "is no whole number"),
        (("--workers", "1"), "--workers 1 must be at least 2"),
        (("--workers", "2.5"), "'2.5' is no whole number"),
        (("--link", "10gb"), "'10gb' is no rate: write a number and bit, bps or byte with k, m"),
        (("--link", "gbit"), "'gbit' is no rate"),
        (("--link", "900GBps"), "'900GBps' is no rate: write a number and bit, bps or byte"),
        (("--link", "1e400gbit"), "'1e400gbit' is too large a rate"),
        (("--link", "1..0gbit"), "'1..0' in '1..0gbit' is no number"),
        (("--link", "0gbit"), "must be above 0"),
        (("--step-time", "500"), "'500' is no time: write a number and us, ms, s or min"),
        (("--step-time", "2h"), "'2h' is no time"),
        (("--local-steps", "0"), "'0' is no whole number"),
        (("--dtype", "int8"), "invalid choice"),
    ],
)
def test_errors_name_the_value_and_the_remedy(capsys, wrong, message):
    good = {"--parameters": "1e9", "--workers": "4", "--link": "10gbit", "--step-time": "300ms"}
    options = [word for pair in (good | dict([wrong])).items() for word in pair]
    with pytest.raises(SystemExit) as ended:
        cost.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_model_is_that_of_the_measurements():
    """The benchmark fits `exchange_seconds` to measured steps; the command applies the same."""
    root = pathlib.Path(__file__).parent.parent
    fitted = json.loads((root / "benchmarks/results/crossover.json").read_text())["results"]
    machine = fitted["machines"]["8"]
    parameters, link_rate = 10**7, 1e9
    costs = cost.estimate(
        parameters,
        8,
        link_rate,
        1e-9,
        latency=machine["latency"],
        memory_bandwidth=machine["memory_bandwidth"],
    )
    rows = [row for row in fitted["predictions"] if row["workers"] == 8]
    rows = [row for row in rows if row["parameters"] == parameters and row["rate"] == "1gbit"]
    predicted = {row["candidate"]: row["predicted"] for row in rows}
    difference = costs["f32 mean"].exchange - costs[cost.VOTE].exchange
    assert difference == pytest.approx(predicted["f32 mean"] - predicted["vote"], rel=0.01)
