"""The example training loops run in processes of their own, and learn the digits."""

import re
import runpy
import sys

import pytest
from processes import EXAMPLES, run_program

LOOPS = ("loop_linen.py", "loop_nnx.py", "loop_pmap.py", "loop_shard_map.py")

every_loop = pytest.mark.parametrize("name", LOOPS)


def train(name, *options):
    """The loss of the first step and of the last, the test accuracy, and the progress bar."""
    finished = run_program(EXAMPLES / name, *options)
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
    printed = re.fullmatch(
        r"Loss: ([\d.]+) in the first step, ([\d.]+) in the last\.\n"  # digits only: finite
        r"Test accuracy: ([\d.]+)%\n",
        finished.stdout,
    )
    assert printed, finished.stdout
    first, last, percent = map(float, printed.groups())
    return first, last, percent / 100, finished.stderr


@every_loop
def test_a_whole_run_learns_the_digits(name):
    first, last, accuracy, progress = train(name)
    assert re.search(r"\b(\d+)/\1\b", progress)
    assert last < 0.1 * first
    assert accuracy >= 0.95


def test_pmap_and_shard_map_give_the_same_results():
    """`shard_map` proves that parameters stay equal, and `pmap` keeps them equal."""
    options = "--workers", 4, "--steps", 40
    by_pmap, by_shard_map = (train(f"loop_{name}.py", *options) for name in ("pmap", "shard_map"))
    assert by_pmap[:3] == pytest.approx(by_shard_map[:3], rel=0.01)


@every_loop
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--workers", "7", "--workers 7 does not divide the batch of 128 images"),
        ("--workers", "0", "--workers and --steps must be at least 1"),
        ("--steps", "0", "--workers and --steps must be at least 1"),
        ("--steps", "many", "argument --steps: invalid int value: 'many'"),
    ],
)
def test_rejects_invalid_options(monkeypatch, capsys, name, option, value, message):
    # Options are read before JAX is used, so this process can run the program, which is faster.
    monkeypatch.setattr(sys, "argv", [name, option, value])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@every_loop
def test_help_lists_command_and_options(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for text in (f"python examples/{name}", "--workers", "--steps"):
        assert text in printed
