"""The example of voting slices that are sharded inside: its losses and its messages."""

import contextlib
import json
import re
import subprocess
import sys

import pytest
from processes import EXAMPLES, environment, free_address, run_program

SMALL = ("--layers", 1, "--heads", 2, "--width", 32, "--context", 16)
SMALL += ("--steps", 40, "--evaluate-every", 8, "--batch-size", 24, "--validation-windows", 24)
SECONDS = 600  # generous, since the machine may be busy


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
    finished = run_program(EXAMPLES / "pod.py", *options_of(folder))
    assert finished.returncode == 0, finished.stderr
    return report_of(folder, finished.stdout)


def test_slices_learn_and_only_bits_cross_between_them(of_one_process):
    (first, last), sent, needed = of_one_process
    assert last < first - 0.8
    assert set(sent["between"]) == {"u32", "f32"}
    # Vectors are replicated within a slice, and take a message of 128 words each way.
    assert needed <= sent["between"]["u32"] <= needed + 2 * 128 * 4
    assert sent["between"]["f32"] <= 16  # the loss, and the number of finite losses
    # Inside a slice, gradients are averaged and parameters are gathered in full precision.
    assert sent["inside"]["f32"] > 100 * sent["between"]["u32"]


def test_one_process_for_each_slice_gives_the_same_losses_and_bytes(tmp_path, of_one_process):
    coordinator = free_address()
    # Without an address to bind, the coordinator listens to the whole network.
    env = environment() | {"JAX_COORDINATOR_BIND_ADDRESS": coordinator}
    command = [sys.executable, str(EXAMPLES / "pod.py"), *map(str, options_of(tmp_path))]
    command += ["--coordinator", coordinator, "--processes", "3", "--process-id"]
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(3):
            pipes = {"stdout": subprocess.PIPE if index == 0 else subprocess.DEVNULL}
            # String hashes differ between processes, as on a cluster. The order of a set must not
            # affect the program.
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


def test_tells_slices_apart_whose_number_divides_their_size(tmp_path):
    options = (*options_of(tmp_path), "--workers", 2, "--steps", 8)
    finished = run_program(EXAMPLES / "pod.py", *options)
    assert finished.returncode == 0, finished.stderr
    _, sent, needed = report_of(tmp_path, finished.stdout)
    assert set(sent["between"]) == {"u32", "f32"}
    assert needed <= sent["between"]["u32"] <= needed + 2 * 128 * 4
    assert sent["between"]["f32"] <= 16


def test_rejects_an_uneven_batch():
    finished = run_program(EXAMPLES / "pod.py", "--batch-size", 100)
    assert finished.returncode == 2
    assert "--batch-size 100 is no multiple of 6 devices that share it" in finished.stderr
