"""Trains a transformer on slices that vote, each sharded over `fsdp` and `model` inside.

The links inside a slice of a pod, or inside a host, are fast: there parameters are gathered and
gradients averaged in full precision, by XLA. Between slices goes one bit per parameter in each
direction, since the workers that vote are the slices. Each device votes on the block of the
parameters that it holds. At the end come the collectives of the compiled step, by what they cross,
where the size of their groups tells it: the slices must not divide the devices of one.

On this machine, three slices of 2 x 2 simulated devices, in one process or a process for each:

    python examples/pod.py
    python examples/pod.py --coordinator localhost:1234 --processes 3 --process-id 0 &
    python examples/pod.py --coordinator localhost:1234 --processes 3 --process-id 1 &
    python examples/pod.py --coordinator localhost:1234 --processes 3 --process-id 2

On a TPU pod of several slices, on every host:

    python examples/pod.py --cluster --slices 4 --fsdp 16 --model 4

Sequences are arithmetic, modulo the number of tokens. What comes next takes attention to the two
tokens before, and the second token of each is a guess.
"""

import argparse
import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import signax
from signax import diagnostics

tokens, length = 32, 16
layers, width, heads = 2, 64, 4
step_size, decay = 2e-3, 5e-2


class Block(nnx.Module):
    """Attention to what came before, then two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.inputs = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.mixed = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        split = (*x.shape[:-1], 3, heads, width // heads)
        query, key, value = jnp.moveaxis(self.inputs(self.norm1(x)).reshape(split), -3, 0)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mixed(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A decoder of a few blocks."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Linear(tokens, width, use_bias=False, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width)))
        self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, tokens, use_bias=False, rngs=rngs)

    def __call__(self, one_hots):
        x = self.embedding(one_hots) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def spec_of(path, leaf):
    """Matrices are cut along both sides; what goes back into the stream the other way round."""
    if leaf.ndim < 2:
        return PartitionSpec()
    back = any(name in jax.tree_util.keystr(path) for name in ("mixed", "down"))
    return PartitionSpec("model", "fsdp") if back else PartitionSpec("fsdp", "model")


def make_mesh(args):
    """Slices outermost, so that the slow links are those between them and no others."""
    inside, between = (1, args.fsdp, args.model), (args.slices, 1, 1)
    if args.cluster or args.processes > 1:
        # Where devices do not say in which slice they are, a process is one.
        told = {getattr(device, "slice_index", None) for device in jax.devices()}
        by_process = len(told) != args.slices
        devices = mesh_utils.create_hybrid_device_mesh(
            inside, between, process_is_granule=by_process
        )
    else:
        devices = np.reshape(jax.devices(), (args.slices, args.fsdp, args.model))
    return Mesh(devices, ("slice", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def load_batch(number, sharding, batch_size):
    """Step `number`'s sequences, of which this process makes those that its devices hold."""

    def share(index):
        rng = np.random.default_rng(number)
        start, stride = rng.integers(tokens, size=(2, batch_size, 1))
        return ((start + stride * np.arange(length + 1)) % tokens).astype(np.int32)[index]

    return jax.make_array_from_callback((batch_size, length + 1), sharding, share)


def crosses(record, hlo, args):
    """Whether a collective sends anything from one slice to another."""
    if record.operation != "collective-permute":
        # Its groups are as large as the axes of the mesh that they run over.
        return record.group_size % args.slices == 0
    [line] = re.findall(rf"[ %]{re.escape(record.name)} = .*", hlo)
    pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
    inside = args.fsdp * args.model  # the program counts devices in the mesh's order
    return any(int(source) // inside != int(target) // inside for source, target in pairs)


def print_collectives(compiled, blocks, args):
    """What one device sends in a step, by whether it crosses slices."""
    hlo, sent = compiled.as_text(), collections.Counter()
    for record in diagnostics.collectives(compiled):
        where = "between slices" if crosses(record, hlo, args) else "inside a slice"
        sent[where, record.operation, record.dtype] += record.bytes_sent * record.count
    print("bytes that a device sends in a step:")
    for (where, operation, dtype), total in sorted(sent.items()):
        print(f"  {where}  {operation:18} {dtype:4} {total:>10,}")
    bits, mean = (
        diagnostics.wire_bytes(blocks, args.slices, scheme=scheme) for scheme in ("vote", "mean")
    )
    print(f"a vote on its blocks needs {bits:,} between slices, a mean of f32 {mean:,}")


def train(args):
    """One process of the run."""
    mesh = make_mesh(args)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(nnx.Rngs(0))))
    specs = jax.tree.map_with_path(spec_of, abstract)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def loss_fn(params, sequences):
        # Not by indices: XLA's partitioner ends the process at a gather from what is cut over
        # `model` inside a map over slices.
        one_hots = jax.nn.one_hot(sequences, tokens)
        logits = nnx.merge(graph, params)(one_hots[:, :-1])
        return optax.softmax_cross_entropy(logits, one_hots[:, 1:]).mean()

    schedule = optax.warmup_cosine_decay_schedule(0.0, step_size, args.steps // 10, args.steps)
    optimizer = signax.signum(schedule, axis_name="slice", weight_decay=decay)
    tx = signax.DataParallel(optimizer, mesh, axis_name="slice", param_specs=specs)
    places = shardings, tx.state_shardings(abstract)

    @functools.partial(jax.jit, out_shardings=places)
    def init():
        params = nnx.split(Transformer(nnx.Rngs(args.seed)))[1]
        return params, tx.init(params)

    # Else XLA may cut what comes out in other ways than what went in, and compile once more.
    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*places, None))
    def step(params, state, sequences):
        loss, grads = tx.value_and_grad(loss_fn)(params, sequences)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = init()
    # Over `fsdp` too: the devices of a slice share its part of the batch, and XLA averages there.
    split = NamedSharding(mesh, PartitionSpec(("slice", "fsdp")))
    compiled = step.lower(params, state, load_batch(0, split, args.batch_size)).compile()
    losses = []
    progress = tqdm(range(args.steps), unit="step", disable=jax.process_index() > 0)
    for number in progress:
        params, state, loss = compiled(params, state, load_batch(number, split, args.batch_size))
        losses.append(float(loss))  # waits for the step
        progress.set_postfix(loss=losses[-1], refresh=False)

    if jax.process_index() == 0:
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"{size:,} parameters, {args.slices} slices of {args.fsdp} x {args.model} devices")
        print(f"loss: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")
        blocks = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype),
            params,
        )
        if args.fsdp * args.model % args.slices:
            print_collectives(compiled, blocks, args)
        else:
            print("Sizes of groups do not tell what crosses slices: let --slices be no divisor.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, default=3, help="slices, which vote (default 3)")
    parser.add_argument("--fsdp", type=int, default=2, help="devices that share data (default 2)")
    parser.add_argument(
        "--model", type=int, default=2, help="devices that share layers (default 2)"
    )
    parser.add_argument("--steps", type=int, default=300, help="(default 300)")
    parser.add_argument("--batch-size", type=int, default=96, help="of all slices (default 96)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters (default 0)")
    parser.add_argument("--cluster", action="store_true", help="real devices, that JAX finds")
    parser.add_argument("--coordinator", help="address and port of process 0")
    parser.add_argument("--processes", type=int, default=1, help="processes, one for each slice")
    parser.add_argument("--process-id", type=int, help="which of them this is, from 0")
    args = parser.parse_args()
    if args.batch_size % (args.slices * args.fsdp):
        parser.error(f"--batch-size {args.batch_size} is no multiple of --slices times --fsdp")

    if args.cluster:
        jax.distributed.initialize()
    else:
        inside = args.fsdp * args.model
        jax.config.update("jax_platforms", "cpu")
        jax.config.update(
            "jax_num_cpu_devices", inside if args.processes > 1 else args.slices * inside
        )
        if args.coordinator:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    train(args)


if __name__ == "__main__":
    main()
