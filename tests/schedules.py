r"""Whether exchanges hide behind the backward pass, read from compiled training steps of GPT-2.

    JAX_PLATFORMS=cpu .venv-accelerators/bin/python tests/schedules.py \
        --json benchmarks/results/overlap.json

compiles a step for absent TPUs and GPUs with each exchange and number of buckets, and prints the
share of the bytes that is in flight while matrix products of the backward pass are left, beside
kernels of it. On several slices only bytes between slices count. `--targets`, `--models`,
`--exchanges` and `--buckets` choose; results are added to the JSON one by one.
"""

import argparse
import functools
import itertools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from accelerators import mesh_of
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import signax
from signax import diagnostics

CONTEXT, VOCABULARY, HEAD = 1024, 50304, 64


class Model(NamedTuple):
    """The sizes of a GPT-2, and the sequences of each device in a step."""

    layers: int
    width: int
    batch: int


MODELS = {
    "gpt2": Model(12, 768, 4),
    "gpt2-medium": Model(24, 1024, 2),
}


def shapes_of(model: Model) -> dict[str, Any]:
    """The shapes of the parameters: one entry for each layer, and embeddings."""
    width = model.width
    layer = dict.fromkeys(["query", "key", "value", "out"], (width, width))
    layer |= {"up": (width, 4 * width), "down": (4 * width, width)}
    layer |= dict.fromkeys(["norm1", "norm2"], (width,))
    return {
        "wte": (VOCABULARY, width),
        "wpe": (CONTEXT, width),
        "norm": (width,),
        **{f"layer{n}": dict(layer) for n in range(model.layers)},
    }


def loss_fn(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """The loss of a GPT in bf16; layers are computed again in the backward pass."""
    hidden = params["wte"][tokens[:, :-1]] + params["wpe"]
    hidden = hidden.astype(jnp.bfloat16)
    for n in range(len(params) - 3):
        hidden = jax.checkpoint(_layer)(params[f"layer{n}"], hidden)
    hidden = _norm(hidden, params["norm"])
    logits = (hidden @ params["wte"].T.astype(jnp.bfloat16)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def _norm(hidden: jax.Array, scale: jax.Array) -> jax.Array:
    wide = hidden.astype(jnp.float32)
    wide *= lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(jnp.bfloat16)


def _layer(params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    weights = {name: weight.astype(jnp.bfloat16) for name, weight in params.items()}
    normed = _norm(hidden, params["norm1"])
    heads = (*normed.shape[:2], -1, HEAD)
    query, key, value = ((normed @ weights[w]).reshape(heads) for w in ("query", "key", "value"))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    hidden += mixed.reshape(hidden.shape) @ weights["out"]
    normed = _norm(hidden, params["norm2"])
    return hidden + jax.nn.gelu(normed @ weights["up"]) @ weights["down"]


VOTES = {
    "vote": lambda axis, **options: signax.signum(1e-3, axis_name=axis, **options),
    "scaled signs": lambda axis: signax.ef_sign_sgd(1e-3, 0.9, axis_name=axis),
}
MEANS = {"f32 mean": jnp.float32, "bf16 mean": jnp.bfloat16}


def lower_vote(mesh: Mesh, model: Model, exchange: str, number: int) -> jax.stages.Lowered:
    """A step of `DataParallel` with a number of buckets."""
    workers, *inside = mesh.axis_names
    options = {"split_over": inside[0]} if inside and exchange == "vote" else {}
    tx: Any = VOTES[exchange](workers, **options)
    params, batch = arguments(mesh, model)
    if number > 1:
        own = jax.ShapeDtypeStruct((model.batch, CONTEXT + 1), jnp.int32)
        tx = signax.in_buckets(tx, signax.find_buckets(loss_fn, params, own, number=number))
    tx = signax.DataParallel(tx, mesh, workers)
    return tx.train_step(loss_fn).lower(params, tx.abstract_state(params), batch)


def lower_mean(mesh: Mesh, model: Model, dtype: Any) -> jax.stages.Lowered:
    """A step in plain JAX: the mean of each gradient, and SGD with momentum."""
    axes, tx = mesh.axis_names, optax.sgd(1e-3, momentum=0.9)

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        own = lax.pcast(params, axes, to="varying")
        loss, grads = jax.value_and_grad(loss_fn)(own, tokens)
        means = lax.pmean(jax.tree.map(lambda g: g.astype(dtype), grads), axes)
        means = jax.tree.map(lambda mean: mean.astype(jnp.float32), means)
        updates, state = tx.update(means, state, params)
        return optax.apply_updates(params, updates), state, lax.pmean(loss, axes)

    whole, rows = PartitionSpec(), PartitionSpec(axes)
    specs = {"in_specs": (whole, whole, rows), "out_specs": whole}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs), donate_argnums=(0, 1))
    params, batch = arguments(mesh, model)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, whole)
        ),
        jax.eval_shape(tx.init, params),
    )
    return mapped.lower(params, state, batch)


def arguments(mesh: Mesh, model: Model) -> tuple[Any, Any]:
    """The shapes and shardings of the parameters, and of the batch of all devices."""
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole),
        shapes_of(model),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    shape = model.batch * mesh.size, CONTEXT + 1
    return params, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)


@functools.cache
def schedule(target: str, model: str, exchange: str, number: int) -> dict[str, Any]:
    """Compile a training step with a number of buckets, and read its schedule."""
    mesh, size = mesh_of(target), MODELS[model]
    start = time.perf_counter()
    if exchange in MEANS:
        compiled = lower_mean(mesh, size, MEANS[exchange]).compile()
    else:
        compiled = lower_vote(mesh, size, exchange, number).compile()
    seconds = time.perf_counter() - start
    flights = diagnostics.in_flight(compiled, mesh=mesh, crossing=mesh.axis_names[0])
    found = [one for one in flights if one.bytes_sent > 1000]  # not the mean of the loss
    sent = sum(one.bytes_sent for one in found)
    return {
        "target": target,
        "model": model,
        "exchange": exchange,
        "buckets": number,
        "bytes_sent": sent,
        "share_in_flight": sum(one.bytes_sent for one in found if one.beside and one.after) / sent,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": round(seconds, 1),
        "collectives": [one._asdict() for one in found],
        "text": compiled.as_text(),
    }


def main() -> None:
    """Print a line for each program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--targets", nargs="+", default=["v5e-8", "v5e-256", "v5e-4x16", "h100-8"])
    add("--models", nargs="+", default=["gpt2", "gpt2-medium"])
    add("--exchanges", nargs="+", default=[*VOTES, *MEANS])
    add("--buckets", type=int, nargs="+", default=[1, 4, 8, 12])
    add("--json", metavar="FILE", help="add results to FILE")
    add("--text", metavar="FOLDER", help="write the compiled programs to FOLDER")
    args = parser.parse_args()
    path = None if args.json is None else pathlib.Path(args.json)
    results = json.loads(path.read_text())["results"] if path and path.exists() else []
    print("target    model        exchange      buckets  in flight      sent    temporary  seconds")
    for chosen in itertools.product(args.targets, args.models, args.exchanges, args.buckets):
        if chosen[2] in MEANS and chosen[3] > 1:
            continue  # XLA decides how to combine them
        target, model, exchange, number = chosen
        found = schedule(*chosen)
        text = found.pop("text")
        if args.text:
            name = "-".join(map(str, chosen)).replace(" ", "_")
            pathlib.Path(args.text, f"{name}.hlo").write_text(text)
        print(
            f"{target:9} {model:12} {exchange:13} {number:7} {found['share_in_flight']:10.1%} "
            f"{found['bytes_sent']:11,} {found['temporary_bytes']:14,} {found['seconds']:6.0f}",
            flush=True,
        )
        results = [
            r for r in results if (r["target"], r["model"], r["exchange"], r["buckets"]) != chosen
        ]
        results.append(found)
        if path:
            versions = {"jax": jax.__version__}
            path.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
