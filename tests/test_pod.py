"""The example of slices that vote, each sharded inside: what it learns and what it sends."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from test_examples import EXAMPLES, run_example

SMALL = ("--layers", 1, "--heads", 2, "--width", 32, "--context", 16)
SMALL += ("--steps", 40, "--evaluate-every", 8, "--batch-size", 24, "--validation-windows", 24)
SECONDS = 600  # a machine that does other things as well is slow, and not at fault


def report_of(folder, output):
    """Losses of the first and last steps, bytes sent by place and dtype, and bytes needed."""
    losses = json.loads((folder / "out.json").read_text())["curve"]["loss"]
    needed = re.search(r"needs ([\d,]+) between slices", output)
    assert needed is not None, output
    sent = {"between": {}, "inside": {}}
    for where, dtype, number in re.findall(r"  (between|inside) .* (\w+) +([\d,]+)\n", output):
        sent[where][dtype] = sent[where].get(dtype, 0) + int(number.replace(",", ""))
    return (losses[0], losses[-1]), sent, int(needed[1].replace(",", ""))


def options_of(folder):
    return (*SMALL, "--json", folder / "out.json")


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pod")
    finished = run_example("pod.py", *options_of(folder))
    assert finished.returncode == 0, finished.stderr
    return report_of(folder, finished.stdout)


def test_slices_learn_and_bits_alone_cross_them(of_one_process):
    (first, last), sent, needed = of_one_process
    assert last < first - 0.8
    assert set(sent["between"]) == {"u32", "f32"}
    # Vectors, which lie whole on every device, are voted on in a message of 128 words of their own.
    assert needed <= sent["between"]["u32"] <= needed + 2 * 128 * 4
    assert sent["between"]["f32"] <= 16  # the loss, and how many are finite
    # Inside a slice gradients are averaged and parameters gathered in full precision.
    assert sent["inside"]["f32"] > 100 * sent["between"]["u32"]


@pytest.mark.slow
def test_a_process_for_each_slice_learns_and_sends_the_same(tmp_path, of_one_process):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    env = {name: value for name, value in os.environ.items() if name[:3] not in ("JAX", "XLA")}
    env["JAX_COORDINATOR_BIND_ADDRESS"] = coordinator  # else it listens to the whole network
    command = [sys.executable, str(EXAMPLES / "pod.py"), *map(str, options_of(tmp_path))]
    command += ["--coordinator", coordinator, "--processes", "3", "--process-id"]
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(3):
            pipes = {"stdout": subprocess.PIPE if index == 0 else subprocess.DEVNULL}
            # String hashes differ between the processes, as they do on a cluster: the order of a
            # set must not reach the program.
            process = subprocess.Popen(
                [*command, str(index)],
                env={**env, "PYTHONHASHSEED": str(index + 1)},
                stderr=subprocess.DEVNULL,
                text=True,
                **pipes,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        output, _ = processes[0].communicate(timeout=SECONDS)
        assert [process.wait(SECONDS) for process in processes] == [0, 0, 0], output
    losses, sent, _ = report_of(tmp_path, output)
    expected_losses, expected_sent, _ = of_one_process
    assert losses == pytest.approx(expected_losses, rel=1e-2)
    assert sent["between"] == expected_sent["between"]


def test_an_uneven_batch_is_refused():
    finished = run_example("pod.py", "--batch-size", 100)
    assert finished.returncode == 2
    assert "--batch-size 100 is no multiple of 6 devices that share it" in finished.stderr
