"""The launchers in examples/launch: what they ask for, and that their commands train."""

import argparse
import ast
import contextlib
import copy
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from processes import EXAMPLES, ROOT, environment, free_address, run_program

LAUNCH = EXAMPLES / "launch"
PROGRAM = EXAMPLES / "multihost.py"
SLURM, RAY = LAUNCH / "slurm.sh", LAUNCH / "ray_train.py"
JOBSET = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
SECONDS = 300  # generous, since the machine may be busy


def parse_options(monkeypatch, command):
    """The options that a launcher's command gives to multihost.py, read by its own parser."""
    words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", words[words.index("examples/multihost.py") :])
    parse_arguments = runpy.run_path(str(PROGRAM))["parse_arguments"]
    return parse_arguments(argparse.ArgumentParser())


def run_together(commands):
    """Run pairs of a command and its variables at the same time. Return the first one's output."""
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with contextlib.ExitStack() as stack:
        running = []
        for command, variables in commands:
            process = subprocess.Popen(
                command,
                env=environment() | path | variables,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
        outputs = [process.communicate(timeout=SECONDS)[0] for process in running]
        assert [process.returncode for process in running] == [0] * len(running), outputs
    return outputs[0]


# What holds for all launchers.


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.*")), ids=lambda path: path.name)
def test_the_first_comment_says_how_to_start_a_launcher(path):
    text = path.read_text()
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else "\n".join(lines)
    assert comment
    assert f"examples/launch/{path.name}" in comment
    assert "Change: " in comment
    assert f"examples/launch/{path.name}" in (ROOT / "docs" / "launching.md").read_text()


# Slurm.

# Long options of sbatch, from its manual, that this script or a user's version may contain.
SBATCH_OPTIONS = {
    "account",
    "constraint",
    "cpus-per-task",
    "error",
    "exclusive",
    "gpus-per-node",
    "job-name",
    "mem",
    "nodes",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "qos",
    "requeue",
    "signal",
    "time",
}

# Starts one process per node, with the variables that a real srun gives to each.
SRUN = """#!{python}
import os, subprocess, sys

command = sys.argv[sys.argv.index("python") :]
options = sys.argv[1 : sys.argv.index("python")]
assert options == ["--cpus-per-task=4", "--kill-on-bad-exit=1"], options
processes = []
for number in range(2):
    variables = {{
        "SLURM_STEP_NODELIST": "localhost,node[2-3]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
    }}
    processes.append(subprocess.Popen(command, env=os.environ | variables))
sys.exit(max(process.wait() for process in processes))
"""


def directives():
    """The options of the script's #SBATCH lines. Slurm ignores the lines after a command."""
    head = re.split("^[^#\n]", SLURM.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.findall("^#SBATCH (.*)$", head, re.MULTILINE)
    assert len(lines) == SLURM.read_text().count("#SBATCH ")
    return dict(re.fullmatch("--([a-z-]+)=?(.*)", line).groups() for line in lines)


def write_command(folder, name, text):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run_slurm(folder, *options, **variables):
    """Run the script as sbatch would, with the commands in a folder instead of Slurm's."""
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_CPUS_PER_TASK": directives()["cpus-per-task"]}
    command = ["bash", str(SLURM), *map(str, options)]
    variables = environment() | {"PATH": path} | slurm | variables
    return subprocess.run(
        command, env=variables, cwd=folder, capture_output=True, text=True, timeout=SECONDS
    )


def test_the_slurm_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)


def test_the_slurm_script_asks_for_one_process_per_gpu():
    options = directives()
    assert options.keys() <= SBATCH_OPTIONS
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert re.fullmatch("[0-9]{2}:[0-5][0-9]:00", options["time"])
    assert re.fullmatch("TERM@[0-9]+", options["signal"])  # without "B:", which spares the steps
    workers = int(options["nodes"]) * int(options["gpus-per-node"])
    assert 128 % workers == 0  # the default of --batch-size


def test_the_slurm_script_passes_options_that_the_program_knows(monkeypatch):
    command = SLURM.read_text().replace("\\\n", " ")
    [line] = [line for line in command.splitlines() if line.startswith("srun")]
    found = parse_options(monkeypatch, line.replace('"$@"', "--steps 7"))
    assert found.checkpoint == "signax-$SLURM_JOB_ID"  # a requeued job keeps its number
    assert found.steps == 7
    assert found.coordinator is None  # JAX detects the cluster


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (143, True)])
def test_the_slurm_script_requeues_preempted_jobs_only(tmp_path, code, requeued):
    write_command(tmp_path, "srun", f"#!/bin/sh\nexit {code}\n")
    write_command(tmp_path, "scontrol", '#!/bin/sh\necho "$@" > requeued\n')
    assert run_slurm(tmp_path).returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 4242\n"


def test_processes_under_slurm_find_each_other_and_train(tmp_path):
    """JAX detects the cluster. The parameters equal those of one process with four devices."""
    write_command(tmp_path, "srun", SRUN.format(python=sys.executable))
    (tmp_path / "examples").symlink_to(EXAMPLES)
    address = free_address()
    run = run_slurm(
        tmp_path,
        *("--steps", 20, "--params", tmp_path / "slurm.npz"),
        JAX_COORDINATOR_BIND_ADDRESS=address,
        JAX_COORDINATOR_PORT=address.split(":")[1],
        JAX_NUM_CPU_DEVICES="2",
        JAX_PLATFORMS="cpu",
    )
    assert run.returncode == 0, run.stderr
    assert "step 20 of 20, 4 workers in 2 process(es)" in run.stdout
    assert (tmp_path / "signax-4242" / "20").is_dir()
    expected = run_program(
        PROGRAM, "--devices", 4, "--steps", 20, "--params", tmp_path / "expected.npz"
    )
    assert expected.returncode == 0, expected.stderr
    with np.load(tmp_path / "slurm.npz") as found, np.load(tmp_path / "expected.npz") as wanted:
        assert found.files == wanted.files
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], strict=True)


# Kubernetes.


def pods():
    """The replicated job, its specification, and its container."""
    [job] = JOBSET["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    return job, spec, container


def test_the_jobset_numbers_pods_and_restarts_all_of_them():
    job, spec, _ = pods()
    assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert JOBSET["kind"] == "JobSet"
    assert JOBSET["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job["replicas"] == 1
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_the_jobset_starts_the_processes_that_its_command_names(monkeypatch):
    job, spec, container = pods()
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    shell, option, command = container["command"]
    assert (shell, option) == ("sh", "-c")
    for name, value in {**variables, "JOB_COMPLETION_INDEX": "1"}.items():
        command = command.replace(f'"${name}"', value)
    found = parse_options(monkeypatch, command)
    assert found.processes == spec["parallelism"] == spec["completions"]
    assert found.process_id == 1
    host, port = found.coordinator.split(":")
    network = JOBSET["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert network["publishNotReadyAddresses"]
    # JobSet names a pod <set>-<job>-<replica>-<index>, in the domain of its headless service.
    assert host == f"{JOBSET['metadata']['name']}-{job['name']}-0-0.{network['subdomain']}"
    assert [int(port)] == [exposed["containerPort"] for exposed in container["ports"]]


def test_the_jobset_saves_checkpoints_to_a_shared_volume():
    _, spec, container = pods()
    [mount], [volume] = container["volumeMounts"], spec["template"]["spec"]["volumes"]
    [folder] = [item["value"] for item in container["env"] if item["name"] == "CHECKPOINT"]
    assert Path(mount["mountPath"]) in Path(folder).parents
    assert mount["name"] == volume["name"]
    assert "persistentVolumeClaim" in volume


def test_the_jobset_follows_the_published_schema():
    reason = "pip install kubeflow-trainer-api, which has JobSet's schema"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    parsed = models.JobsetV1alpha2JobSet.from_dict(JOBSET).to_dict()

    def assert_kept(given, found):
        """The models drop fields that the schema lacks, and add defaults."""
        if isinstance(given, dict):
            assert given.keys() <= found.keys()
            for name in given:
                assert_kept(given[name], found[name])
        elif isinstance(given, list):
            assert len(given) == len(found)
            for one, other in zip(given, found, strict=True):
                assert_kept(one, other)
        else:
            assert given == found

    assert_kept(JOBSET, parsed)


def test_two_pods_of_the_jobset_train_together(tmp_path):
    _, spec, container = pods()
    variables = {"COORDINATOR": free_address(), "CHECKPOINT": str(tmp_path / "saved")}
    assert variables.keys() == {variable["name"] for variable in container["env"]}
    variables["JAX_COORDINATOR_BIND_ADDRESS"] = variables["COORDINATOR"]
    output = run_together(
        (container["command"], variables | {"JOB_COMPLETION_INDEX": str(index)})
        for index in range(spec["completions"])
    )
    assert "step 400 of 400, 2 workers in 2 process(es)" in output
    assert (tmp_path / "saved" / "400").is_dir()


# SkyPilot.


def test_the_skypilot_task_has_valid_commands(monkeypatch):
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=SKYPILOT[name], text=True, check=True)
    command = SKYPILOT["run"].replace("\\\n", " ").splitlines()[-1]
    assert SKYPILOT["envs"] == {"CHECKPOINT": None}  # SkyPilot asks the user for it
    values = {"NUM_NODES": SKYPILOT["num_nodes"], "NODE_RANK": 1}
    for name, value in values.items():
        command = command.replace(f'"$SKYPILOT_{name}"', str(value))
    found = parse_options(monkeypatch, command)
    assert found.processes == SKYPILOT["num_nodes"] == 2
    assert found.coordinator == "$coordinator:1234"
    assert found.checkpoint == "$CHECKPOINT"


def test_the_skypilot_task_follows_its_own_schema(monkeypatch):
    sky = pytest.importorskip("sky", reason="pip install skypilot, which has the schema")
    monkeypatch.chdir(ROOT)
    folder = [("CHECKPOINT", "gs://bucket/signax")]
    task = sky.Task.from_yaml_config(copy.deepcopy(SKYPILOT), folder)  # it empties its argument
    assert task.num_nodes == SKYPILOT["num_nodes"]
    with pytest.raises(ValueError, match="CHECKPOINT"):
        sky.Task.from_yaml_config(copy.deepcopy(SKYPILOT))


def test_two_machines_of_the_skypilot_task_train_together(tmp_path):
    python = tmp_path / "signax" / "bin"
    python.mkdir(parents=True)
    write_command(python, "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    address = free_address()
    host, port = address.split(":")
    variables = {
        "HOME": str(tmp_path),
        "CHECKPOINT": str(tmp_path / "saved"),
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "SKYPILOT_NODE_IPS": f"{host}\n127.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
    }
    script = SKYPILOT["run"].replace(":1234", f":{port}")
    output = run_together(
        (["bash", "-c", script], variables | {"SKYPILOT_NODE_RANK": str(rank)}) for rank in range(2)
    )
    assert "step 400 of 400, 2 workers in 2 process(es)" in output
    assert (tmp_path / "saved" / "400").is_dir()


# Ray.


def test_submitting_to_ray_imports_no_jax():
    tree = ast.parse(RAY.read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in imports if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert names == {"argparse", "ray.train", "ray.train.v2.jax"}


def test_the_loop_for_ray_learns_the_digits(monkeypatch):
    """The loop runs in this process, without Ray."""
    reports = []
    train = types.SimpleNamespace(report=reports.append)
    jax_of_ray = types.SimpleNamespace(JaxConfig=None, JaxTrainer=None)
    modules = {"ray": types.SimpleNamespace(train=train), "ray.train": train}
    for name, module in {**modules, "ray.train.v2.jax": jax_of_ray}.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = runpy.run_path(str(RAY))["train"]({"steps": 200, "batch_size": 128})
    assert found["workers"] == 16
    assert [report["step"] for report in reports] == [50, 100, 150, 200]
    assert found["loss"] < 0.6  # a guess has log(10) = 2.3


def test_ray_trains_on_two_processes():
    pytest.importorskip("ray.train.v2.jax", reason="pip install 'ray[train]'")
    run = run_program(RAY, "--cpu", "--processes", 2, "--steps", 200)
    assert run.returncode == 0, run.stderr
    loss = re.search("^200 steps, 2 workers: loss ([0-9.]+)$", run.stdout, re.MULTILINE)
    assert loss, run.stdout
    assert float(loss[1]) < 0.6  # a guess has log(10) = 2.3
