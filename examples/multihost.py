"""Train a small network by majority vote in several processes, as on a TPU pod or GPU cluster.

On this machine, four processes with one simulated device each, or one process with four devices.
Both end with the same parameters, bit for bit:

    python examples/multihost.py --processes 4
    python examples/multihost.py --devices 4

With checkpoints: stop, continue in new processes, and continue with another number of workers:

    python examples/multihost.py --processes 4 --checkpoint /tmp/digits --stop-at 100
    python examples/multihost.py --processes 4 --checkpoint /tmp/digits --stop-at 200
    python examples/multihost.py --processes 2 --checkpoint /tmp/digits --resize

Restart all processes from the last checkpoint whenever one of them is killed or hangs:

    python examples/multihost.py --processes 4 --checkpoint /tmp/others --resume

On a TPU pod, under Slurm or under Open MPI, run this on every host. The processes find each other
by jax.distributed.initialize(). On a machine outside any cluster this command starts one process,
which trains on all of the machine's devices:

    python examples/multihost.py --checkpoint /a/folder/that/all/hosts/share

On hosts whose cluster JAX cannot detect, run this on each host with its own --process-id from 0:

    python examples/multihost.py --coordinator 10.0.0.1:1234 --processes 2 --process-id 0

A checkpoint holds the parameters, the momentum of every worker, and everything else that the next
step depends on. A stopped and continued run ends like an uninterrupted run, bit for bit. With
--checkpoint a run continues from the last complete checkpoint, if there is one. On a cluster whose
scheduler restarts processes, nothing else is needed. A cluster announces by SIGTERM that it takes a
machine away. All processes then save the same step, and end with the exit code of SIGTERM, 143. The
exit code shows that the run is not finished. Processes that wait for a process that hangs or never
started end with an error after at most --timeout seconds, and show their stack traces.

The data are scikit-learn's 1,797 handwritten digits of 8x8 pixels, part of its package.
"""

import argparse
import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import signax

step_size, decay = 1e-3, 5e-2
test_images = 400
preempted_code = 128 + signal.SIGTERM  # the exit code that shells give SIGTERM


class Network(nn.Module):
    """Two hidden layers with dropout, 26,122 parameters."""

    @nn.compact
    def __call__(self, images, train):
        x = images
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
            x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10)(x)


def load_data():
    digits: Any = load_digits()  # scikit-learn does not type its result
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=test_images, stratify=labels, random_state=0)


def load_batch(images, labels, number, sharding, args):
    """The batch of step `number`. This process loads only its own share."""
    # The batch depends on the step alone: a resumed run needs no position in a stream.
    rng = np.random.default_rng((args.seed, number))
    chosen = rng.integers(len(images), size=args.batch_size)
    own = np.split(chosen, jax.process_count())[jax.process_index()]
    share = {"image": images[own], "label": labels[own]}
    return jax.make_array_from_process_local_data(sharding, share)


class Checkpoints:
    """Saved parameters and optimiser states by step, with the settings of their run."""

    def __init__(self, args):
        folder = args.checkpoint if "://" in args.checkpoint else os.path.abspath(args.checkpoint)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            cleanup_tmp_directories=True,  # incomplete writes of killed processes
            single_host_load_and_broadcast=True,  # all processes must continue from one step
        )
        self.manager = ocp.CheckpointManager(folder, options=options)
        self.settings = {name: getattr(args, name) for name in ("steps", "batch_size", "seed")}
        self.settings["workers"] = jax.device_count()  # the state has a momentum per worker
        self.resize = args.resize

    def restore(self, number, tx, abstract_params):
        """Parameters and state. Every process reads its own devices' shards."""
        composite = ocp.args.Composite(settings=ocp.args.JsonRestore())
        found: Any = self.manager.restore(number, args=composite)
        saved = found.settings
        for name, value in self.settings.items():
            if saved[name] != value and not (self.resize and name == "workers"):
                hint = "; --resize deals the momenta out" if name == "workers" else ""
                sys.exit(
                    f"error: {self.manager.directory} holds a run with {name} = {saved[name]}, "
                    f"this one has {value}: they would not continue exactly{hint}"
                )
        laid_out = abstract_params, tx.abstract_state(abstract_params, saved["workers"])
        composite = ocp.args.Composite(training=ocp.args.StandardRestore(laid_out))
        found = self.manager.restore(number, args=composite)
        params, state = found.training
        return params, tx.resize(state, params) if self.resize else state

    def save(self, number, params, state):
        """Copy parameters and state, and write the copy in the background."""
        items = ocp.args.Composite(
            training=ocp.args.StandardSave((params, state)),
            settings=ocp.args.JsonSave(self.settings),
        )
        self.manager.save(number, args=items, force=True)


def train(args):
    """Train as one process of the run, and return the exit code."""
    first = jax.process_index() == 0
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    train_images, held_out_images, train_labels, held_out_labels = load_data()
    network: Any = Network()  # Flax does not type the output

    def loss_fn(params, batch, key):
        logits = network.apply(params, batch["image"], train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    # The schedule covers --steps, even if --stop-at ends the run earlier.
    schedule = optax.warmup_cosine_decay_schedule(0.0, step_size, args.steps // 20, args.steps)
    optimizer = signax.signum(schedule, axis_name="data", weight_decay=decay)
    tx = signax.DataParallel(optimizer, mesh)

    def init(key):
        params = network.init(key, train_images[:1], train=False)
        return params, tx.init(params)

    key = jax.random.key(args.seed)
    abstract_params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(init, key)[0],
    )
    checkpoints = Checkpoints(args) if args.checkpoint else None
    number = checkpoints.manager.latest_step() if checkpoints else None
    if checkpoints and number is not None:
        params, state = checkpoints.restore(number, tx, abstract_params)
    else:
        number = 0
        # A compiled program creates the arrays on all devices of all processes.
        shardings = replicated, tx.state_shardings(abstract_params)
        params, state = jax.jit(init, out_shardings=shardings)(key)

    watch(args.timeout)
    stop = args.stop_at or args.steps
    step = tx.train_step(loss_fn)
    progress = tqdm(
        range(number + 1, stop + 1),
        initial=number,
        total=args.steps,
        unit="step",
        disable=not first,
    )
    for number in progress:
        batch = load_batch(train_images, train_labels, number, split, args)
        dropout_key = jax.random.fold_in(key, number)
        params, state, loss = step(params, state, batch, key=dropout_key)
        if number % 10 == 0:
            progress.set_postfix(loss=float(loss))  # waits for the step of all processes
            watch(args.timeout)
        preempted = multihost_utils.reached_preemption_sync_point(number)
        if checkpoints and (preempted or number == stop or number % args.checkpoint_every == 0):
            checkpoints.save(number, params, state)
        if preempted:
            break
    progress.close()
    if checkpoints:
        checkpoints.manager.close()  # waits for pending writes
    if number < stop:
        if first:
            print(f"stopped by SIGTERM after step {number} of {args.steps}", file=sys.stderr)
        return preempted_code

    if first:
        params = jax.device_get(params)
        predicted = network.apply(params, held_out_images, train=False).argmax(axis=-1)
        print(
            f"step {number} of {args.steps}, {jax.device_count()} workers in "
            f"{jax.process_count()} process(es): {np.mean(predicted == held_out_labels):.2%} of "
            f"the held-out digits are recognised"
        )
        if args.params:
            named = {
                jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)
            }
            with open(args.params, "wb") as file:
                np.savez(file, **named)
    return 0


def watch(seconds):
    """Show a traceback and end this process after some seconds, unless called again before."""
    # Both calls work without Python's lock, which hanging code may hold.
    faulthandler.dump_traceback_later(seconds)
    signal.alarm(seconds + 1)


def join(args):
    """Connect this process to the other processes of the run."""
    watch(args.timeout)
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.coordinator:
        jax.distributed.initialize(
            args.coordinator, args.processes, args.process_id, initialization_timeout=args.timeout
        )
    elif not args.devices:
        try:
            jax.distributed.initialize(initialization_timeout=args.timeout)
        except ValueError as error:
            if "coordinator_address" not in str(error):
                raise
            # JAX finds no cluster: the run consists of this process.


def launch(args):
    """Run all processes on this machine, restart them if some died, and return the exit code."""
    stopped = []  # signals: an exception might arrive between a start and its record
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    restarts_left = args.resume
    while True:
        codes = run_processes(args, stopped)
        preempted = preempted_code in codes
        killed = any(code is not None and code < 0 for code in codes)
        if stopped:
            return 128 + stopped[0]
        if not (killed or preempted) or not restarts_left:  # an error would only recur
            return preempted_code if preempted and not killed else int(any(codes))
        restarts_left -= 1
        print("all processes start again from the last checkpoint", file=sys.stderr, flush=True)


def run_processes(args, stopped):
    """Start the processes, and end all if one fails. Return the exit codes before that end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], "--devices", str(args.devices or 1)]
    command += ["--coordinator", coordinator, "--process-id"]
    # Without the address the coordinator would listen to the whole network.
    env = os.environ | {"JAX_COORDINATOR_BIND_ADDRESS": coordinator}
    processes, logs = [], []
    with contextlib.ExitStack() as stack:
        for index in range(args.processes):
            # The first process prints the run's output. Other output is shown after a failure.
            log = stack.enter_context(tempfile.TemporaryFile("w+")) if index else None
            # Processes in their own sessions do not see Ctrl-C. This process ends them.
            pipes = {"stdout": log, "stderr": log, "start_new_session": True}
            process = subprocess.Popen([*command, str(index)], env=env, **pipes)
            stack.callback(process.wait)
            stack.callback(process.kill)  # SIGTERM would look like a preemption
            processes.append(process)
            logs.append(log)
        print("processes:", *(process.pid for process in processes), flush=True)
        codes = wait(processes, stopped)
        for index, (code, log) in enumerate(zip(codes, logs, strict=True)):
            if code and code != preempted_code:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                if code == -signal.SIGALRM:
                    how = f"got no further within the {args.timeout} seconds of --timeout"
                print(f"error: process {index} {how}", file=sys.stderr)
            if code and code != preempted_code and log:
                log.seek(0)
                print(log.read()[-4000:], end="", file=sys.stderr)
    return codes


def wait(processes, stopped):
    """Wait until all processes ended, one failed, or the user stops the run. Return exit codes."""
    while True:
        codes = [process.poll() for process in processes]
        # The others would wait for a failed process. Preempted processes save and end together.
        failed = any(code not in (None, 0, preempted_code) for code in codes)
        if stopped or failed or None not in codes:
            # Poll again: the failure may follow from a failure that was not yet visible above.
            return [process.poll() for process in processes]
        time.sleep(0.05)


def parse_arguments(parser):
    add = parser.add_argument
    add("--processes", type=int, metavar="N", help="processes, started here unless --process-id")
    add("--process-id", type=int, metavar="I", help="which of them this one is, from 0")
    add("--coordinator", metavar="HOST:PORT", help="a free port of process 0's host")
    add("--devices", type=int, metavar="N", help="simulated CPU devices of each process")
    add("--steps", type=int, default=400, help="of the whole run (default 400)")
    add("--stop-at", type=int, metavar="STEP", help="end after this step, to be continued")
    add("--batch-size", type=int, default=128, help="images per step, all workers' (default 128)")
    add("--seed", type=int, default=0, help="of weights, batches and dropout (default 0)")
    add("--checkpoint", metavar="DIR", help="save to DIR, and continue from what it holds")
    add("--checkpoint-every", type=int, default=50, metavar="STEPS", help="(default 50)")
    add("--resize", action="store_true", help="continue what other numbers of workers saved")
    add(
        "--resume",
        type=int,
        nargs="?",
        const=100,
        default=0,
        metavar="N",
        help="when one of the processes started here is killed or hangs, or all get SIGTERM, "
        "start all again, at most N times (100 if not given)",
    )
    add(
        "--timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="end with an error if starting, or ten steps, take longer (default 300)",
    )
    add("--params", metavar="FILE", help="write the final parameters to FILE, as .npz")
    args = parser.parse_args()

    counts = "processes", "devices", "steps", "stop_at", "batch_size", "checkpoint_every", "timeout"
    for name in counts:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("seed", "resume"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)} must not be negative")
    if args.resize and not args.checkpoint:
        parser.error("--resize needs --checkpoint, which holds what is to be continued")
    if args.resume and None in (args.checkpoint, args.processes):
        parser.error("--resume needs --checkpoint, and --processes for it to start")
    if args.stop_at is not None and args.stop_at > args.steps:
        parser.error(f"--stop-at {args.stop_at} is after the last of --steps {args.steps}")
    by_hand = args.coordinator, args.process_id
    if any(option is not None for option in by_hand) and None in (*by_hand, args.processes):
        parser.error("--coordinator, --process-id and --processes belong together")
    if args.process_id is not None and not 0 <= args.process_id < args.processes:
        parser.error(f"--process-id {args.process_id} is none of --processes {args.processes}")
    return args


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args = parse_arguments(parser)
    launches = args.processes is not None and args.process_id is None
    if not launches:
        join(args)
    workers = (args.processes or 1) * (args.devices or 1) if launches else jax.device_count()
    if args.batch_size % workers:
        parser.error(f"--batch-size {args.batch_size} is no multiple of {workers} workers")
    sys.exit(launch(args) if launches else train(args))


if __name__ == "__main__":
    main()
