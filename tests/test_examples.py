"""The digits example runs in a process of its own, as a user would run it."""

import json

from processes import EXAMPLES, run_program


def train_digits(folder, *options):
    finished = run_program(
        EXAMPLES / "train_digits.py",
        "--json",
        folder / "out.json",
        "--figure",
        folder / "out.png",
        *options,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "out.json").read_text()), finished


def test_help_lists_commands_and_options():
    finished = run_program(EXAMPLES / "train_digits.py", "--help")
    assert finished.returncode == 0
    for text in ("python examples/train_digits.py", "--seed", "--steps", "--json", "--figure"):
        assert text in finished.stdout


def test_rejects_an_uneven_batch():
    finished = run_program(EXAMPLES / "train_digits.py", "--batch-size", 100)
    assert finished.returncode == 2
    assert "--batch-size 100 is no multiple of --workers 8" in finished.stderr


def test_a_short_run_writes_its_report_and_the_vote_sends_few_bytes(tmp_path):
    report, finished = train_digits(tmp_path, "--steps", 12, "--batch-size", 16, "--seed", 3)

    settings = {name: report[name] for name in ("workers", "steps", "batch_size", "seed")}
    assert settings == {"workers": 8, "steps": 12, "batch_size": 16, "seed": 3}
    for run in (report["averaged"], report["voted"]):
        assert run["curve"]["step"] == [10, 12]
        assert all(loss > 0 for loss in run["curve"]["loss"])
        assert run["curve"]["test_accuracy"][-1] == run["test_accuracy"]
        assert 0 < run["test_accuracy"] <= 1
        assert run["step_milliseconds"] > 0
        assert run["name"] in finished.stdout
        assert f"{run['bytes_per_step']:,}" in finished.stdout
        assert "12/12" in finished.stderr  # the progress bar
    # A ring of eight workers averages 60,522 parameters in f32, and a few scalars.
    averaged, voted = report["averaged"]["bytes_per_step"], report["voted"]["bytes_per_step"]
    assert 0 <= averaged - 2 * 7 * 4 * 60_522 // 8 <= 64
    assert 0 < 25 * voted <= averaged
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_voted_run_is_as_accurate_as_adamw(tmp_path):
    report, _ = train_digits(tmp_path, "--seed", 1)
    averaged, voted = report["averaged"]["test_accuracy"], report["voted"]["test_accuracy"]
    assert min(averaged, voted) >= 0.97
    assert voted >= averaged - 0.01
