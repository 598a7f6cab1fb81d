"""The example of several processes, in processes of its own: how they end, and with what."""

import contextlib
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parents[1] / "examples" / "multihost.py"
SECONDS = 600  # a machine that does other things as well is slow, and not at fault

slow = pytest.mark.slow


class Run:
    """A run of the example under way, which writes what it prints into a folder."""

    def __init__(self, folder, options):
        self.outputs = [folder / "stdout", folder / "stderr"]
        # The test session's own choice of devices must not reach the example.
        env = {name: value for name, value in os.environ.items() if name[:3] not in ("JAX", "XLA")}
        command = [sys.executable, str(PROGRAM), *map(str, options)]
        with self.outputs[0].open("w") as stdout, self.outputs[1].open("w") as stderr:
            self.process = subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr)

    @property
    def stdout(self):
        return self.outputs[0].read_text()

    @property
    def stderr(self):
        return self.outputs[1].read_text()

    def wait(self):
        return self.process.wait(SECONDS)

    def wait_for(self, text, times=1):
        """Waits until it has printed what `text` matches so many times, and returns the match."""
        deadline = time.monotonic() + SECONDS
        while len(found := list(re.finditer(text, self.stdout + self.stderr))) < times:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.1)
        return found[times - 1]

    def workers(self, restarts=0):
        """The process ids of what the launcher has started, the last of so many times."""
        return [
            int(number) for number in self.wait_for("processes:(.*)\n", restarts + 1)[1].split()
        ]


@pytest.fixture
def start(tmp_path):
    """Starts the example, and ends it with the test."""
    with contextlib.ExitStack() as stack:

        def start(*options):
            run = Run(tmp_path, options)
            stack.callback(run.wait)
            stack.callback(run.process.terminate)  # upon which the launcher ends its processes
            return run

        yield start


@pytest.fixture
def train(start, tmp_path):
    """Runs the example to its end and returns the parameters."""

    def train(*options):
        run = start("--params", tmp_path / "params.npz", *options)
        assert run.wait() == 0, run.stderr
        return load(tmp_path / "params.npz")

    return train


def load(file):
    with np.load(file) as params:
        return dict(params)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert len(actual) == 6  # kernels and biases of three layers
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], strict=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_running(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_help_tells_the_commands_and_the_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for text in ("multihost.py --processes 4", "multihost.py --devices 4", "--checkpoint"):
        assert text in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--processes 4 --batch-size 102", "--batch-size 102 is no multiple of 4 workers"),
        ("--processes 2 --devices 3 --batch-size 8", "--batch-size 8 is no multiple of 6 workers"),
        ("--processes 0", "--processes 0 must be at least 1"),
        ("--seed -1", "--seed -1 must not be negative"),
        ("--stop-at 0", "--stop-at 0 must be at least 1"),
        ("--timeout 0", "--timeout 0 must be at least 1"),
        ("--resume -1", "--resume -1 must not be negative"),
        ("--resize", "--resize needs --checkpoint"),
        ("--resume --processes 2", "--resume needs --checkpoint"),
        ("--resume --checkpoint saved", "--resume needs --checkpoint, and --processes"),
        ("--steps 9 --stop-at 10", "--stop-at 10 is after the last of --steps 9"),
        ("--process-id 0 --processes 2", "belong together"),
        ("--coordinator localhost:1 --processes 2", "belong together"),
        (
            "--coordinator localhost:1 --processes 2 --process-id 2",
            "--process-id 2 is none of --processes 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, capsys, options, message):
    # In this process, since options are read before JAX is touched: nine imports less.
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, *options.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_devices_cannot_share_is_refused(start):
    run = start("--devices", 3, "--batch-size", 128)
    assert run.wait() == 2
    assert "--batch-size 128 is no multiple of 3 workers" in run.stderr


# What is the same, bit for bit.


def test_two_processes_stopped_and_continued_end_as_one_process_does(train, tmp_path):
    short = "--steps", 12, "--batch-size", 16, "--seed", 3
    expected = train("--devices", 2, *short)
    two = "--processes", 2, "--checkpoint", tmp_path / "saved", *short
    stopped = train(*two, "--stop-at", 6)
    with pytest.raises(AssertionError):
        assert_same(stopped, expected)
    assert_same(train(*two), expected)


@slow
@pytest.mark.parametrize(
    ("workers", "alike"),
    [
        (("--processes", 4), ("--devices", 4)),
        (("--devices", 8), ("--processes", 2, "--devices", 4)),
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(train, tmp_path, workers, alike):
    expected = train(*alike, "--steps", 100)
    saving = "--steps", 100, "--checkpoint", tmp_path / "saved", "--checkpoint-every", 20
    train(*workers, *saving, "--stop-at", 50)
    assert_same(train(*workers, *saving), expected)


@slow
def test_a_cluster_that_takes_a_machine_away_loses_no_step(start, train, tmp_path):
    """Twice: nobody starts the processes anew after the first time, the program does after that."""
    steps, params = ("--steps", 1000), tmp_path / "stopped.npz"
    options = "--processes", 2, "--checkpoint", tmp_path / "saved", "--checkpoint-every", 5000
    run = start(*options, *steps, "--params", params)
    run.wait_for("loss=")
    os.kill(run.workers()[1], signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.stderr
    number = int(run.wait_for("told to end at step ([0-9]+) of 1000")[1])
    assert number < 1000
    assert (tmp_path / "saved" / str(number)).is_dir()
    assert not params.exists()

    run = start(*options, *steps, "--params", params, "--resume")
    run.wait_for("loss=")
    os.kill(run.workers()[0], signal.SIGTERM)
    assert run.wait() == 0, run.stderr
    assert int(run.wait_for("told to end at step ([0-9]+) of 1000")[1]) > number
    assert "start anew" in run.stderr
    assert_same(load(params), train("--devices", 2, *steps))


@slow
def test_a_run_of_other_settings_is_not_continued(start, tmp_path):
    settings = {"--devices": 2, "--steps": 4, "--batch-size": 8, "--seed": 0}

    def run_with(**changes):
        changed = settings | {
            f"--{name.replace('_', '-')}": value for name, value in changes.items()
        }
        options = [part for option in changed.items() for part in option]
        run = start("--checkpoint", tmp_path / "saved", *options)
        return run.wait(), run.stderr

    code, _ = run_with()
    assert code == 0
    for name, old, changes in [
        ("steps", 4, {"steps": 5}),
        ("batch_size", 8, {"batch_size": 16}),
        ("seed", 0, {"seed": 1}),
    ]:
        code, stderr = run_with(**changes)
        assert code == 1
        assert f"holds a run with {name} = {old}" in stderr


@slow
def test_another_number_of_workers_continues_if_asked_to(start, train, tmp_path):
    options = "--steps", 8, "--batch-size", 24, "--checkpoint"
    train("--devices", 2, *options, tmp_path / "saved", "--stop-at", 4)
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")

    run = start("--devices", 3, *options, tmp_path / "saved")
    assert run.wait() == 1
    assert "holds a run with workers = 2, this one has 3" in run.stderr
    assert "--resize" in run.stderr

    resized = train("--processes", 3, *options, tmp_path / "saved", "--resize")
    assert_same(resized, train("--devices", 3, *options, tmp_path / "copy", "--resize"))
    # What it saved is of three workers, and nothing is left to ask for.
    assert_same(train("--devices", 3, *options, tmp_path / "saved"), resized)


def freeze_in_a_save(worker, saved):
    """Stops a process while a checkpoint is being written, which stays half written."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if half_written(saved):
            os.kill(worker, signal.SIGSTOP)
            time.sleep(0.2)  # for other processes to come to an end of it, if they can
            if half_written(saved):
                return
            os.kill(worker, signal.SIGCONT)
        time.sleep(0.005)
    raise AssertionError("no save was seen")


def half_written(saved):
    return list(saved.glob("*.orbax-checkpoint-tmp"))


def newest(saved):
    return max((int(step.name) for step in saved.glob("*") if step.name.isdigit()), default=0)


@slow
def test_kills_at_any_moment_leave_the_parameters_as_they_were(start, train, tmp_path):
    """Processes are killed while they start, between steps, and while a checkpoint is written.

    Four times; the environment variable SIGNAX_KILLS sets another number.
    """
    kills, saved = int(os.environ.get("SIGNAX_KILLS", "4")), tmp_path / "saved"
    rng = np.random.default_rng(0)
    steps = 200 + 25 * kills
    options = "--steps", steps, "--batch-size", 16
    expected = train("--devices", 2, *options)
    saving = "--checkpoint", saved, "--checkpoint-every", 5, "--params", tmp_path / "params.npz"
    run = start("--processes", 2, "--resume", *saving, *options)
    continued = []
    for restarts in range(kills):
        victim = int(rng.integers(2))
        workers = run.workers(restarts)
        continued.append(newest(saved))
        if restarts % 3 == 0:
            freeze_in_a_save(workers[victim], saved)
        elif restarts % 3 == 1:
            time.sleep(rng.uniform(0, 8))
        else:
            while newest(saved) == continued[-1]:
                assert run.process.poll() is None, run.stderr
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
        os.kill(workers[victim], signal.SIGKILL)
        written = newest(saved), half_written(saved)
        print(f"process {victim} killed after step {written[0]}, half written: {written[1]}")
        run.workers(restarts + 1)
        assert run.stderr.count("was killed by signal 9") == restarts + 1
    continued.append(newest(saved))
    assert run.wait() == 0, run.stderr
    for number in filter(None, continued):  # where a progress bar begins
        assert f" {number}/{steps} [00:00<?" in run.stderr
    assert not half_written(saved)
    with np.load(tmp_path / "params.npz") as found:
        assert_same(dict(found), expected)


# How a run ends that does not reach its last step.


def test_a_process_that_dies_ends_the_run(start):
    run = start("--processes", 2, "--steps", 1_000_000)
    workers = run.workers()
    assert len(workers) == 2
    run.wait_for("loss=")
    os.kill(workers[1], signal.SIGKILL)
    assert run.wait() == 1
    assert "error: process 1 was killed by signal 9" in run.stderr
    assert not any(map(is_running, workers))


def test_a_process_that_never_comes_is_not_waited_for_for_ever(start):
    run = start(
        "--coordinator",
        f"127.0.0.1:{free_port()}",
        "--processes",
        2,
        "--process-id",
        0,
        "--timeout",
        2,
    )
    assert run.wait() == -signal.SIGALRM
    assert "Timeout (0:00:02)!" in run.stderr
    assert "in initialize" in run.stderr  # where it was


@slow
def test_a_process_that_hangs_ends_the_run(start):
    run = start("--processes", 2, "--steps", 1_000_000, "--timeout", 30)
    workers = run.workers()
    run.wait_for("loss=")
    os.kill(workers[1], signal.SIGSTOP)
    stopped = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - stopped < 90
    assert "error: process 0 got no further within the 30 seconds of --timeout" in run.stderr
    assert not any(map(is_running, workers))


@slow
def test_what_a_process_died_of_is_shown(start, tmp_path):
    (tmp_path / "file").touch()
    run = start("--processes", 2, "--checkpoint", tmp_path / "file" / "folder")
    assert run.wait() == 1
    assert re.search("error: process [01] ended with 1", run.stderr)
    assert "NotADirectoryError" in run.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])
def test_an_interrupt_ends_all_processes(start, number):
    run = start("--processes", 2, "--steps", 1_000_000)
    workers = run.workers()
    run.process.send_signal(number)
    assert run.wait() == 128 + number
    assert not any(map(is_running, workers))
