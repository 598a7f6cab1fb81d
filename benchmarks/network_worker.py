"""A worker of network.py. The only argument is the worker's task, as JSON."""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from report import interleave

import signax

learning_rate = 1e-3
SERVERS = {"vote server": 0, "vote server, 1 shard": 1}  # how many shards they have
TORCH = "torch all_reduce"


def vote(gradients: Any, step: jax.Array) -> Any:
    """The majority of the workers' signs, packed."""
    return signax.pvote(gradients, "workers", step=step)


def f32_mean(gradients: Any, step: jax.Array) -> Any:
    """The f32 mean, the default of a data-parallel step."""
    del step
    return lax.pmean(gradients, "workers")


def bf16_mean(gradients: Any, step: jax.Array) -> Any:
    """The bf16 mean. It sends half the bits, unless the platform widens bf16 for the exchange."""
    del step
    means = lax.pmean(jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients), "workers")
    return jax.tree.map(lambda mean: mean.astype(jnp.float32), means)


def int8_psum(gradients: Any, step: jax.Array) -> Any:
    """The majority in plain JAX, as the sum of signs in int8. A tie is 0."""
    del step
    signs = jax.tree.map(lambda g: jnp.sign(g).astype(jnp.int8), gradients)
    return jax.tree.map(lambda s: jnp.sign(s).astype(jnp.float32), lax.psum(signs, "workers"))


def none(gradients: Any, step: jax.Array) -> Any:
    """The worker's own sign, without an exchange."""
    del step
    return jax.tree.map(jnp.sign, gradients)


def unsent_vote(gradients: Any, step: jax.Array) -> Any:
    """A vote of this worker alone: what packing and unpacking take beside the exchange."""
    alone = jax.tree.map(lambda gradient: gradient[None], gradients)
    voted = jax.vmap(lambda own: signax.pvote(own, "alone", step=step), axis_name="alone")(alone)
    return jax.tree.map(lambda sign: sign[0], voted)


EXCHANGES = {
    "vote": vote,
    "f32 mean": f32_mean,
    "bf16 mean": bf16_mean,
    "int8 psum": int8_psum,
    "unsent vote": unsent_vote,
    "none": none,
}
UNSENT = ("unsent vote", "none")  # with these parameters differ between workers


class Stepper:
    """A training loop without a model. Each step donates the parameters of the step before."""

    def __init__(self, program: Callable, parameters: Any, gradients: Any):
        self.program, self.parameters, self.gradients = program, parameters, gradients
        self.step = 0

    def __call__(self) -> Any:
        """Take one step and return the new parameters."""
        self.parameters = self.program(self.parameters, self.gradients, np.int32(self.step))
        self.step += 1
        return self.parameters


def run_jax(task: dict[str, Any]) -> dict[str, Any]:
    """Time every JAX candidate of the task on this worker."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(task["coordinator"], task["workers"], task["worker"])
    mesh = jax.make_mesh((task["workers"],), ("workers",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("workers"), PartitionSpec()

    def compile_step(name, parameters, gradients):
        def update(parameters, gradients, step):
            direction = EXCHANGES[name](jax.tree.map(lambda g: g[0], gradients), step)
            return jax.tree.map(lambda p, d: p - learning_rate * d, parameters, direction)

        mapped = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(whole, split, whole),
            out_specs=whole,
            check_vma=name not in UNSENT,
        )
        return jax.jit(mapped, donate_argnums=0).lower(parameters, gradients, np.int32(0)).compile()

    def place(rows, spec):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows)

    rng = np.random.default_rng(task["worker"])
    sizes = leaf_sizes(task)
    gradients = [place(rng.standard_normal((1, size), np.float32), split) for size in sizes]
    steps = {}
    for name in task["candidates"]:
        zeros = [place(np.zeros(size, np.float32), whole) for size in sizes]
        steps[name] = Stepper(compile_step(name, zeros, gradients), zeros, gradients)

    one = place(np.ones(1, np.float32), split)
    add = jax.shard_map(
        lambda x: lax.psum(x, "workers"), mesh=mesh, in_specs=split, out_specs=whole
    )
    barrier = jax.jit(add).lower(one).compile()
    report = time_and_count(steps, lambda: barrier(one), task)
    for name, step in steps.items():
        sent = signax.diagnostics.collective_bytes(step.program)
        report[name] |= {"hlo_bytes": sent, "parameters": digest_of(step.parameters)}
    jax.distributed.shutdown()
    return report


def run_elastic(task: dict[str, Any]) -> dict[str, Any]:
    """Time a vote through a server on this worker, which is a job of its own."""
    import signax.elastic  # needs gRPC

    with signax.elastic.connect(task["server"], task["worker"], insecure=True) as exchange:
        tx = optax.chain(signax.majority_vote(exchange=exchange), optax.scale(-learning_rate))
        rng = np.random.default_rng(task["worker"])
        gradients = [jnp.asarray(rng.standard_normal(n, np.float32)) for n in leaf_sizes(task)]
        parameters = [jnp.zeros_like(gradient) for gradient in gradients]
        parameters, state = exchange.catch_up(tx, parameters, tx.init(parameters))

        def update(parameters, state, gradients):
            updates, state = tx.update(gradients, state)
            return optax.apply_updates(parameters, updates), state

        program = jax.jit(update, donate_argnums=(0, 1)).lower(parameters, state, gradients)
        program = program.compile()

        def step():
            nonlocal parameters, state
            parameters, state = program(parameters, state, gradients)
            return parameters

        # The last step has ended everywhere when the next decision comes, so there is no barrier.
        name = task["candidates"][0]
        report = time_and_count({name: step}, lambda: None, task)
        report[name] |= {"hlo_bytes": None, "parameters": digest_of(parameters)}
    return report


def run_torch(task: dict[str, Any]) -> dict[str, Any]:
    """Time an update by PyTorch's all_reduce over gloo on this worker."""
    os.environ["GLOO_SOCKET_IFNAME"] = task["interface"]
    torch: Any = importlib.import_module("torch")
    distributed: Any = importlib.import_module("torch.distributed")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{task['coordinator']}",
        rank=task["worker"],
        world_size=task["workers"],
    )
    generator = torch.Generator().manual_seed(task["worker"])
    gradients = [torch.randn(size, generator=generator) for size in leaf_sizes(task)]
    parameters = [torch.zeros_like(gradient) for gradient in gradients]
    sums = [torch.empty_like(gradient) for gradient in gradients]

    def step():
        for parameter, gradient, total in zip(parameters, gradients, sums, strict=True):
            total.copy_(gradient)  # all_reduce overwrites its input
            distributed.all_reduce(total)
            parameter.sub_(total, alpha=learning_rate / task["workers"])

    report = time_and_count({TORCH: step}, distributed.barrier, task)
    distributed.destroy_process_group()
    return report


def digest_of(parameters: Any) -> str:
    """The hash of this worker's parameters."""
    digest = hashlib.sha256()
    for leaf in parameters:
        digest.update(np.asarray(leaf.addressable_data(0)))
    return digest.hexdigest()


def leaf_sizes(task: dict[str, Any]) -> list[int]:
    """The sizes of leaves that hold all parameters, as equal as possible."""
    whole, rest = divmod(task["parameters"], task["leaves"])
    return [whole + (leaf < rest) for leaf in range(task["leaves"])]


def time_and_count(
    steps: dict[str, Callable[[], Any]], barrier: Callable[[], Any], task: dict[str, Any]
) -> dict[str, Any]:
    """Count the bytes of one step of each candidate, and then time the candidates in turns."""
    counter = Path("/sys/class/net", task["interface"], "statistics", "tx_bytes")
    counted = {}
    for name, step in steps.items():
        jax.block_until_ready(step())  # makes the connections
        jax.block_until_ready(barrier())
        before = int(counter.read_text())
        jax.block_until_ready(step())
        jax.block_until_ready(barrier())  # all of this worker's bytes have left it now
        counted[name] = int(counter.read_text()) - before
    seconds = interleave(steps, task["rounds"], warmup=1, before=barrier)
    return {name: {"seconds": seconds[name], "counted_bytes": counted[name]} for name in steps}


def main() -> None:
    """Run the task, and write the report to the task's output path."""
    task = json.loads(sys.argv[1])
    report = {"jax": run_jax, "elastic": run_elastic, "torch": run_torch}[task["library"]](task)
    Path(task["output"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
