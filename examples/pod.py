r"""Train the GPT of train_language_model.py on slices that vote, with parameters sharded inside.

The links inside a slice of a pod, or inside a host, are fast. There XLA gathers parameters and
averages gradients in full precision, over the mesh axes `fsdp` and `model`. The workers that vote
are the slices: between slices one bit per parameter travels in each direction. Each device votes
on its block of the parameters. At the end the program lists the collectives of the compiled step,
inside slices and between slices.

On this machine, three slices of 2 x 2 simulated devices, in one process or in one per slice:

    python examples/pod.py
    python examples/pod.py --coordinator localhost:1234 --processes 3 --process-id 0 &
    python examples/pod.py --coordinator localhost:1234 --processes 3 --process-id 1 &
    python examples/pod.py --coordinator localhost:1234 --processes 3 --process-id 2

GPT-2 small on a TPU pod. Run this on every host. All devices that JAX finds form slices of 16 x 4
(gs:// needs the package gcsfs):

    python examples/pod.py --accelerators --fsdp 16 --model 4 --size gpt2 --batch-size 256 \
        --validation-windows 64 --dtype bfloat16 --step-size 1e-4 --checkpoint gs://bucket/gpt2

The other options are train_language_model.py's options. The workers are slices.
"""

import collections
import sys

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec
from train_language_model import check_shares, join, make_parser, parse_arguments, train

from signax import diagnostics


def spec_of(path, leaf):
    """Cut matrices along both axes. Matrices that write to the residual stream swap the axes."""
    name = jax.tree_util.keystr(path)
    if leaf.ndim < 2:
        return PartitionSpec()
    if "embedding" in name:
        # The axis of characters stays whole, since characters are looked up: inside a map over
        # slices XLA's partitioner ends the process at a gather along an axis that is cut.
        return PartitionSpec(None, ("fsdp", "model"))
    back = any(part in name for part in ("mix", "down"))
    return PartitionSpec("model", "fsdp") if back else PartitionSpec("fsdp", "model")


def make_mesh(args, slices):
    """A mesh with slices outermost: only the axis `slice` crosses slow links."""
    shape = slices, args.fsdp, args.model
    told = {getattr(device, "slice_index", None) for device in jax.devices()}
    if len(told) == slices > 1:
        devices = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (slices, 1, 1))
    else:  # JAX orders devices by process: neighbours form a slice
        devices = np.reshape(jax.devices(), shape)
    return Mesh(devices, ("slice", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def print_collectives(compiled, params, mesh):
    """Print one device's bytes in a step, inside a slice and between slices."""
    sent = collections.Counter()
    for record in diagnostics.collectives(compiled, mesh=mesh):
        where = "between slices" if "slice" in (record.axes or ()) else "inside a slice"
        sent[where, record.operation, record.dtype] += record.bytes_sent * record.count
    print("bytes that a device sends in a step:")
    for (where, operation, dtype), total in sorted(sent.items()):
        print(f"  {where}  {operation:18} {dtype:4} {total:>10,}")
    blocks = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype),
        params,
    )
    vote, mean = (
        diagnostics.wire_bytes(blocks, mesh.shape["slice"], scheme=scheme)
        for scheme in ("vote", "mean")
    )
    print(f"a vote on its blocks needs {vote:,} between slices, a mean of f32 {mean:,}")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--fsdp", type=int, default=2, help="devices of a slice that share data (default 2)")
    add("--model", type=int, default=2, help="devices of a slice that share layers (default 2)")
    # The workers are slices.
    parser.set_defaults(workers=3, batch_size=48, validation_windows=240)
    args = parse_arguments(parser)
    if min(args.fsdp, args.model) < 1:
        parser.error(f"--fsdp {args.fsdp} and --model {args.model} must be at least 1")
    join(args, args.workers * args.fsdp * args.model)
    slices, rest = divmod(jax.device_count(), args.fsdp * args.model)
    if rest:
        sys.exit(f"error: {jax.device_count()} devices are no slices of {args.fsdp} x {args.model}")
    check_shares(parser, args, slices * args.fsdp, "devices that share it")

    mesh = make_mesh(args, slices)
    step, params = train(args, mesh, ("slice", "fsdp"), spec_of)
    if jax.process_index():
        return
    print(f"{slices} slices of {args.fsdp} x {args.model} devices")
    print_collectives(step, params, mesh)


if __name__ == "__main__":
    main()
