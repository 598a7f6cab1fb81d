"""The example of several processes: its parameters, its checkpoints, and its failures."""

import contextlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import EXAMPLES, environment, free_address

PROGRAM = EXAMPLES / "multihost.py"
SECONDS = 600  # generous, since the machine may be busy


class Run:
    """A running example, which writes its output into a folder."""

    def __init__(self, folder, options):
        self.outputs = [folder / "stdout", folder / "stderr"]
        command = [sys.executable, str(PROGRAM), *map(str, options)]
        with self.outputs[0].open("w") as stdout, self.outputs[1].open("w") as stderr:
            self.process = subprocess.Popen(
                command, env=environment(), stdout=stdout, stderr=stderr
            )

    @property
    def stdout(self):
        return self.outputs[0].read_text()

    @property
    def stderr(self):
        return self.outputs[1].read_text()

    def wait(self):
        return self.process.wait(SECONDS)

    def wait_for(self, text, times=1):
        """Wait until the output matches a pattern `times` times, and return the last match."""
        deadline = time.monotonic() + SECONDS
        while len(found := list(re.finditer(text, self.stdout + self.stderr))) < times:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.1)
        return found[times - 1]

    def workers(self, restarts=0):
        """The process ids that the launcher started after a number of restarts."""
        return [
            int(number) for number in self.wait_for("processes:(.*)\n", restarts + 1)[1].split()
        ]


@pytest.fixture
def start(tmp_path):
    """Start the example, and terminate it at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(*options):
            run = Run(tmp_path, options)
            stack.callback(run.wait)
            stack.callback(run.process.terminate)  # then the launcher ends its processes
            return run

        yield start


@pytest.fixture
def train(start, tmp_path):
    """Run the example to its end and return the parameters."""

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


def is_running(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_help_lists_commands_and_options(monkeypatch, capsys):
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
def test_rejects_options_that_do_not_fit(monkeypatch, capsys, options, message):
    # Options are read before JAX is used, so this process can run the program, which is faster.
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, *options.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_rejects_a_batch_that_devices_cannot_share(start):
    run = start("--devices", 3, "--batch-size", 128)
    assert run.wait() == 2
    assert "--batch-size 128 is no multiple of 3 workers" in run.stderr


# Runs that must be equal, bit for bit.


@pytest.mark.parametrize(
    ("workers", "alike"),
    [
        (("--processes", 4), ("--devices", 4)),
        (("--devices", 8), ("--processes", 2, "--devices", 4)),
    ],
)
def test_a_stopped_and_continued_run_equals_an_uninterrupted_run(train, tmp_path, workers, alike):
    steps = "--steps", 40
    expected = train(*alike, *steps)
    saving = *steps, "--checkpoint", tmp_path / "saved", "--checkpoint-every", 8
    stopped = train(*workers, *saving, "--stop-at", 20)
    with pytest.raises(AssertionError):
        assert_same(stopped, expected)
    assert_same(train(*workers, *saving), expected)


def test_a_preempted_cluster_loses_no_step(start, train, tmp_path):
    """The test restarts the run after the first signal, and the launcher after the second."""
    steps, params = ("--steps", 1000), tmp_path / "stopped.npz"
    options = "--processes", 2, "--checkpoint", tmp_path / "saved", "--checkpoint-every", 5000
    run = start(*options, *steps, "--params", params)
    run.wait_for("loss=")
    os.kill(run.workers()[1], signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.stderr
    number = int(run.wait_for("stopped by SIGTERM after step ([0-9]+) of 1000")[1])
    assert number < 1000
    assert (tmp_path / "saved" / str(number)).is_dir()
    assert not params.exists()

    run = start(*options, *steps, "--params", params, "--resume")
    run.wait_for("loss=")
    os.kill(run.workers()[0], signal.SIGTERM)
    assert run.wait() == 0, run.stderr
    assert int(run.wait_for("stopped by SIGTERM after step ([0-9]+) of 1000")[1]) > number
    assert "start again" in run.stderr
    assert_same(load(params), train("--devices", 2, *steps))


def test_rejects_continuing_a_run_of_other_settings(start, tmp_path):
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


def test_resize_continues_with_another_number_of_workers(start, train, tmp_path):
    options = "--steps", 8, "--batch-size", 24, "--checkpoint"
    train("--devices", 2, *options, tmp_path / "saved", "--stop-at", 4)
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")

    run = start("--devices", 3, *options, tmp_path / "saved")
    assert run.wait() == 1
    assert "holds a run with workers = 2, this one has 3" in run.stderr
    assert "--resize" in run.stderr

    resized = train("--processes", 3, *options, tmp_path / "saved", "--resize")
    assert_same(resized, train("--devices", 3, *options, tmp_path / "copy", "--resize"))
    # The new checkpoint has three workers, so it needs no resize.
    assert_same(train("--devices", 3, *options, tmp_path / "saved"), resized)


def freeze_in_a_save(worker, saved):
    """Stop a process while it writes a checkpoint, which stays incomplete."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if half_written(saved):
            os.kill(worker, signal.SIGSTOP)
            time.sleep(0.2)  # so that the other processes can finish, if they can
            if half_written(saved):
                return
            os.kill(worker, signal.SIGCONT)
        time.sleep(0.005)
    raise AssertionError("no save was seen")


def half_written(saved):
    return list(saved.glob("*.orbax-checkpoint-tmp"))


def newest(saved):
    return max((int(step.name) for step in saved.glob("*") if step.name.isdigit()), default=0)


def test_kills_at_any_moment_do_not_change_the_parameters(start, train, tmp_path):
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
    for number in filter(None, continued):  # a progress bar begins at the restored step
        assert f" {number}/{steps} [00:00<?" in run.stderr
    assert not half_written(saved)
    with np.load(tmp_path / "params.npz") as found:
        assert_same(dict(found), expected)


# Runs that fail or are interrupted.


def test_a_process_that_dies_ends_the_run(start):
    run = start("--processes", 2, "--steps", 1_000_000)
    workers = run.workers()
    assert len(workers) == 2
    run.wait_for("loss=")
    os.kill(workers[1], signal.SIGKILL)
    assert run.wait() == 1
    assert "error: process 1 was killed by signal 9" in run.stderr
    assert not any(map(is_running, workers))


def test_a_missing_process_times_out(start):
    run = start(
        "--coordinator",
        free_address(),
        "--processes",
        2,
        "--process-id",
        0,
        "--timeout",
        2,
    )
    assert run.wait() == -signal.SIGALRM
    assert "Timeout (0:00:02)!" in run.stderr
    assert "in initialize" in run.stderr  # the traceback


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


def test_shows_the_error_of_a_process_that_died(start, tmp_path):
    (tmp_path / "file").touch()
    run = start("--processes", 2, "--checkpoint", tmp_path / "file" / "folder")
    assert run.wait() == 1
    assert re.search("error: process [01] ended with 1", run.stderr)
    assert "NotADirectoryError" in run.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_processes(start, number):
    run = start("--processes", 2, "--steps", 1_000_000)
    workers = run.workers()
    run.process.send_signal(number)
    assert run.wait() == 128 + number
    assert not any(map(is_running, workers))
