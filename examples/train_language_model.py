r"""Train a GPT on the sources of Python's standard library, by votes or by means of gradients.

Every machine with Python has the text. A transformer of a million parameters predicts the text's
characters, on eight simulated workers. The default is Lion by votes, with one bit per parameter in
each direction. Muon by votes or with error feedback sends as much, and ends at a lower loss. AdamW
and Muon on gradients averaged in full precision are the comparison. 1-bit Adam starts as AdamW.

    python examples/train_language_model.py
    python examples/train_language_model.py --method muon
    python examples/train_language_model.py --method adamw --json adamw.json --figure adamw.png

With checkpoints: stop and continue. The continued run ends like an uninterrupted run, bit for bit:

    python examples/train_language_model.py --checkpoint /tmp/gpt --stop-at 100
    python examples/train_language_model.py --checkpoint /tmp/gpt

Wider and deeper, up to the 124 million parameters of GPT-2 small. --accelerators puts a worker on
every device that JAX finds, on all hosts of a cluster:

    python examples/train_language_model.py --layers 8 --heads 6 --width 384 --context 256
    python examples/train_language_model.py --size gpt2 --batch-size 64 --dtype bfloat16 \
        --accelerators --step-size 1e-4 --validation-windows 64

On two hosts whose cluster JAX cannot detect, run this on each host with its own --process-id from
0. Each host has two workers:

    python examples/train_language_model.py --workers 4 --coordinator 10.0.0.1:1234 \
        --processes 2 --process-id 0

Every leaf is voted on. The embedding is also the output layer, so its gradient is not sparse.
--method mixed averages the embedding, which adds three quarters of the bytes of all votes. Losses
are in nats per character. They depend on the version of Python, whose sources are the text.
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

import signax

sizes = {
    "small": {"layers": 5, "heads": 4, "width": 128, "context": 64, "vocabulary": 128},
    "gpt2": {"layers": 12, "heads": 12, "width": 768, "context": 1024, "vocabulary": 50_304},
}

# benchmarks/language_model.py tuned these values. A vote moves every parameter by the whole step
# size, and needs a smaller step size than AdamW. Muon's vote moves parameters by a fifth of it.
# Error feedback takes gradient descent's step size.
step_sizes = {"adamw": 8e-3, "signum": 2e-3, "lion": 4e-3, "mixed": 4e-3, "ef": 0.512}
step_sizes |= {"muon": 3.2e-2, "ef-muon": 3.2e-2, "muon-mean": 3.2e-2, "one-bit-adam": 8e-3}
momenta = {"adamw": 0.8, "signum": 0.8, "lion": 0.6, "mixed": 0.6, "ef": 0.6}
momenta |= {"muon": 0.8, "ef-muon": 0.8, "muon-mean": 0.8, "one-bit-adam": 0.8}

# With every method weights shrink by this share per step, step size times decay.
shrinkage = 3e-3

sampled_characters = 300


class Block(nnx.Module):
    """Attention and gated units, each with a norm before it and a residual connection."""

    def __init__(self, args, rngs: nnx.Rngs):
        def linear(fan_in, fan_out, variance=1.0):
            init = nnx.initializers.variance_scaling(variance, "fan_in", "normal")
            options = {"use_bias": False, "dtype": args.dtype, "kernel_init": init}
            return nnx.Linear(fan_in, fan_out, **options, rngs=rngs)

        width, inner = args.width, 8 * (args.width // 3)
        residual = 1 / (2 * args.layers)  # keeps the residual stream from growing with depth
        self.heads = args.heads
        self.norm1 = nnx.LayerNorm(width, use_bias=False, dtype=args.dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.mix = linear(width, width, residual)
        self.norm2 = nnx.LayerNorm(width, use_bias=False, dtype=args.dtype, rngs=rngs)
        self.up = linear(width, 2 * inner)
        self.down = linear(inner, width, residual)

    def __call__(self, x):
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.reshape(x.shape))
        # Signs train gates better than ReLUs: after a ReLU, signs move all weights in step.
        units, gates = jnp.split(self.up(self.norm2(x)), 2, axis=-1)
        return x + self.down(units * 2 * nnx.sigmoid(gates))


class GPT(nnx.Module):
    """GPT-2 with gated units and without biases: f32 parameters, computations in `args.dtype`."""

    def __init__(self, args, rngs: nnx.Rngs):
        options = {
            "dtype": args.dtype,
            "embedding_init": nnx.initializers.normal(args.width**-0.5),
            "rngs": rngs,
        }
        self.characters = nnx.Embed(args.vocabulary, args.width, **options)
        self.positions = nnx.Embed(args.context, args.width, **options)
        self.blocks = nnx.List([Block(args, rngs) for _ in range(args.layers)])
        self.norm = nnx.LayerNorm(args.width, use_bias=False, dtype=args.dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.characters(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        x = x * x.shape[-1] ** 0.5  # inputs of size one, yet small initial logits
        for block in self.blocks:
            x = block(x)
        return self.characters.attend(self.norm(x)).astype(jnp.float32)


def load_text():
    """The training text, and the validation text from every tenth file: u8 characters."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))

    def characters(files):
        text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        return np.frombuffer(text.encode("ascii", errors="replace"), np.uint8)  # others become "?"

    training = [file for number, file in enumerate(files) if number % 10 != 9]
    return characters(training), characters(files[9::10])


def windows(text, starts, context):
    """Rows of context + 1 characters. The model reads all but the last character of a row."""
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def load(text, starts, sharding, args):
    """The windows at the given starts. This process loads only its own devices' windows."""

    def share(index):
        return windows(text, starts[index[0]], args.context)

    return jax.make_array_from_callback((len(starts), args.context + 1), sharding, share)


def load_batch(text, number, sharding, args):
    """The batch of step `number`."""
    # The batch depends on the step alone: a resumed run needs no position in a stream.
    rng = np.random.default_rng((args.seed, number))
    return load(text, rng.integers(len(text) - args.context, size=args.batch_size), sharding, args)


def load_held_out(text, sharding, args):
    """Validation windows at even distances."""
    starts = np.linspace(0, len(text) - args.context - 1, args.validation_windows).astype(int)
    return load(text, starts, sharding, args)


def label(params):
    """Label embeddings, since the gradients in rare characters' rows are mostly small."""

    def of_leaf(path, leaf):
        del leaf
        return "embedding" if "embedding" in jax.tree_util.keystr(path) else "other"

    return jax.tree.map_with_path(of_leaf, params)


def matrices(params):
    """The rows and columns of the matrices that Muon orthogonalises, all but the embeddings."""

    def of_leaf(leaf, kind):
        if kind == "embedding" or leaf.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers()

    return jax.tree.map(of_leaf, params, label(params))


def make_schedule(args):
    """The step size: it rises for a tenth of the steps, and falls in the last three tenths."""
    # The length of a vote never shrinks by itself. Until the fall a large step size trains best.
    warmup, decay = max(1, args.steps // 10), max(1, args.steps * 3 // 10)
    rise = optax.linear_schedule(0.0, args.step_size, warmup)
    stay = optax.constant_schedule(args.step_size)
    fall = optax.linear_schedule(args.step_size, 0.0, decay)
    return optax.join_schedules([rise, stay, fall], [warmup, args.steps - decay])


def decay_options(args):
    """The weight decay of matrices, embeddings among them."""
    return {
        "weight_decay": shrinkage / args.step_size,
        "mask": lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    }


def make_adamw(args):
    return optax.adamw(make_schedule(args), b1=args.momentum, b2=0.95, **decay_options(args))


def make_muon(args):
    """Muon as in Optax, with AdamW for embeddings and norms."""
    options = decay_options(args)
    return optax.contrib.muon(
        make_schedule(args),
        beta=args.momentum,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
        adam_b1=args.momentum,
        adam_b2=0.95,
        weight_decay=options["weight_decay"],
        weight_decay_mask=options["mask"],
        adam_weight_decay=options["weight_decay"],
    )


def make_optimizer(args, axis, **options):
    """The optimiser of one worker, for workers along a mesh axis, with further options of it."""
    schedule, options = make_schedule(args), {**options, **decay_options(args), "axis_name": axis}
    if args.method in ("adamw", "muon-mean"):
        behind = make_adamw(args) if args.method == "adamw" else make_muon(args)
        return optax.chain(signax.average_updates(axis), behind)
    if args.method == "ef":
        return signax.ef_sign_sgd(schedule, momentum=args.momentum, **options)
    if args.method == "one-bit-adam":
        options |= {"b1": args.momentum, "b2": 0.95, "decay": 0.9}
        return signax.one_bit_adam(schedule, warmup_steps=max(1, args.steps * 3 // 10), **options)
    if args.method in ("signum", "mixed"):
        voted = signax.signum(schedule, beta=args.momentum, **options)
        averaged = optax.chain(signax.average_updates(axis), make_adamw(args))
        if args.method == "signum":
            return voted
        return optax.partition({"embedding": averaged, "other": voted}, label)
    decays = {"b1": args.momentum, "b2": (1 + args.momentum) / 2}  # twice as many steps
    if args.method == "lion":
        return signax.lion(schedule, **decays, **options)
    lion = optax.chain(optax.scale_by_lion(**decays), optax.scale_by_sign())
    muon = signax.muon if args.method == "muon" else signax.ef_muon
    numbers = {"weight_dimension_numbers": matrices, "others": lion}
    return muon(schedule, args.momentum, **numbers, **options)


class Checkpoints:
    """Saved parameters, optimiser states and curves by step, with the settings of their run."""

    def __init__(self, args, settings):
        folder = args.checkpoint if "://" in args.checkpoint else os.path.abspath(args.checkpoint)
        self.manager = ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )
        self.settings = settings

    def restore(self, number, laid_out):
        record = ocp.args.Composite(record=ocp.args.JsonRestore())
        training = ocp.args.Composite(training=ocp.args.StandardRestore(laid_out))
        saved: Any = self.manager.restore(number, args=record)
        for name, value in self.settings.items():
            if saved.record["settings"][name] != value:
                sys.exit(
                    f"error: {self.manager.directory} holds a run with {name} = "
                    f"{saved.record['settings'][name]}, this one has {value}: they would not "
                    "continue exactly"
                )
        restored: Any = self.manager.restore(number, args=training)
        return *restored.training, saved.record["curve"]

    def save(self, number, params, state, curve):
        items = ocp.args.Composite(
            training=ocp.args.StandardSave((params, state)),
            record=ocp.args.JsonSave({"settings": self.settings, "curve": curve}),
        )
        self.manager.save(number, args=items, force=True)


def whole(path, leaf):
    """The spec of a parameter that every device holds whole."""
    del path, leaf
    return PartitionSpec()


def train(args, mesh, batch_axes, spec_of=whole):
    """Train as one process of a run, whose workers lie along the first axis of a mesh.

    The batch is cut over `batch_axes`. `spec_of(path, leaf)` says how to cut a parameter inside a
    worker. Returns the compiled step and the parameters.
    """
    first = jax.process_index() == 0
    axis = mesh.axis_names[0]
    divided = NamedSharding(mesh, PartitionSpec(batch_axes))
    training_text, validation_text = load_text()

    graph, shapes = nnx.split(nnx.eval_shape(lambda: GPT(args, nnx.Rngs(args.seed))))
    specs = jax.tree.map_with_path(spec_of, shapes)
    tx = signax.DataParallel(make_optimizer(args, axis), mesh, axis, param_specs=specs)

    def init():
        params = nnx.split(GPT(args, nnx.Rngs(args.seed)))[1]
        return params, tx.init(params)

    def lay_out(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def loss_fn(params, batch):
        logits = nnx.merge(graph, params)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    evaluate = jax.jit(loss_fn)
    held_out = load_held_out(validation_text, divided, args)

    abstract_params = jax.tree.map(lay_out, shapes, specs)
    laid_out = abstract_params, tx.abstract_state(abstract_params)
    settings = settings_of(args, mesh, training_text)
    checkpoints = Checkpoints(args, settings) if args.checkpoint else None
    number = checkpoints.manager.latest_step() if checkpoints else None
    if checkpoints and number is not None:
        params, state, curve = checkpoints.restore(number, laid_out)
    else:
        number, curve = 0, {"step": [], "seconds": [], "loss": [], "validation_loss": []}
        # A compiled program creates the arrays on all devices of all processes.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, laid_out)
        params, state = jax.jit(init, out_shardings=shardings)()
    batch = load_batch(training_text, 1, divided, args)
    step = tx.train_step(loss_fn).lower(params, state, batch).compile()

    stop = args.stop_at or args.steps
    losses, seconds = [], []
    progress = tqdm(
        range(number + 1, stop + 1),
        desc=args.method,
        initial=number,
        total=args.steps,
        unit="step",
        disable=not first,
    )
    for number in progress:
        start = time.perf_counter()
        batch = load_batch(training_text, number, divided, args)
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))  # waits for the step
        seconds.append(time.perf_counter() - start)
        if number % args.evaluate_every == 0 or number == stop:
            before = curve["seconds"][-1] if curve["seconds"] else 0.0
            curve["step"].append(number)
            curve["seconds"].append(before + sum(seconds[-len(losses) :]))
            curve["loss"].append(float(np.mean(losses)))
            curve["validation_loss"].append(float(evaluate(params, held_out)))
            losses = []
            progress.set_postfix(
                loss=curve["loss"][-1], validation=curve["validation_loss"][-1], refresh=False
            )
            if checkpoints:
                checkpoints.save(number, params, state, curve)
    progress.close()
    if checkpoints:
        checkpoints.manager.close()  # waits for pending writes
    report = {
        **settings,
        "processes": jax.process_count(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "bytes_per_step": signax.diagnostics.collective_bytes(step),
        "step_seconds": float(np.median(seconds)) if seconds else None,
        "validation_loss": curve["validation_loss"][-1],
        "curve": curve,
    }
    on_one_device = multihost_utils.process_allgather(params, tiled=True)
    if first:
        print(sample(graph, on_one_device, validation_text, args))
        print_report(report)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
        if args.figure:
            save_figure(report, args.figure)
    return step, params


def settings_of(args, mesh, text):
    """The settings that determine a run's numbers."""
    names = ("method", "step_size", "momentum", "steps", "batch_size", "seed", "dtype")
    names += ("validation_windows", *sizes["small"])
    settings = {name: getattr(args, name) for name in names}
    digest = hashlib.sha256(text).hexdigest()[:16]  # another Python has another text
    return {**settings, "workers": mesh.devices.shape[0], "mesh": dict(mesh.shape), "text": digest}


def sample(graph, params, text, args):
    """A sample of the model's text after the first characters of the validation text."""
    prompt = jnp.asarray(text[: args.context], jnp.int32)

    @jax.jit
    def write(params, window, key):
        model = nnx.merge(graph, params)

        def one_more(window, key):
            following = jax.random.categorical(key, model(window[None])[0, -1])
            return jnp.append(window[1:], following), following

        return lax.scan(one_more, window, jax.random.split(key, sampled_characters))[1]

    written = write(params, prompt, jax.random.key(args.seed))
    characters = map(chr, [*np.asarray(prompt), *np.asarray(written)])
    # An untrained model writes control characters, which would confuse a terminal.
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in characters)


def print_report(report):
    print(
        f"\n{report['method']}, {report['parameters']:,} parameters, {report['workers']} workers: "
        f"validation loss {report['validation_loss']:.4f} after {report['curve']['step'][-1]} "
        f"steps\n{report['bytes_per_step']:,} bytes sent by each device per step"
    )


def save_figure(report, filename):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    curve = report["curve"]
    axes.plot(curve["step"], curve["loss"], "--", label="training")
    axes.plot(curve["step"], curve["validation_loss"], label="validation")
    sent = f"{report['bytes_per_step'] / 1000:,.0f} kB per step"
    axes.set(xlabel="step", ylabel="nats per character", title=f"{report['method']}: {sent}")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(filename, dpi=150)


def join(args, devices):
    """Connect this process to the run, whose simulated devices number `devices` together."""
    if not args.accelerators:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices // (args.processes or 1))
    if args.coordinator:
        if not args.accelerators:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    elif args.accelerators:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address" not in str(error):
                raise
            # JAX finds no cluster: the run consists of this process.


def make_parser(description):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=step_sizes, default="lion", help="(default lion)")
    add("--step-size", type=float, help=f"at the peak (defaults: {step_sizes})")
    add("--momentum", type=float, help=f"its decay, in [0, 1) (defaults: {momenta})")
    add("--steps", type=int, default=300, help="of the whole run (default %(default)s)")
    add("--stop-at", type=int, metavar="STEP", help="end after this step, to be continued")
    add("--batch-size", type=int, default=32, help="rows of all workers (default %(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches and samples (default 0)")
    add("--size", choices=sizes, default="small", help="defaults of the next five")
    for name, value in sizes["small"].items():
        add(f"--{name}", type=int, help=f"(default {value:,}; gpt2 {sizes['gpt2'][name]:,})")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
    add("--workers", type=int, default=8, help="simulated, of all processes (default %(default)s)")
    add("--accelerators", action="store_true", help="on all devices of JAX, not on simulated ones")
    add("--coordinator", metavar="HOST:PORT", help="a free port of process 0's host")
    add("--processes", type=int, metavar="N", help="how many processes there are")
    add("--process-id", type=int, metavar="I", help="which of them this one is, from 0")
    add("--evaluate-every", type=int, default=50, metavar="STEPS", help="and save (default 50)")
    add("--validation-windows", type=int, default=512, metavar="N", help="(default %(default)s)")
    add("--checkpoint", metavar="DIR", help="save to DIR, and continue from what it holds")
    add("--json", metavar="FILE", help="write losses, curves and bytes to FILE")
    add("--figure", metavar="FILE", help="draw the curves to FILE")
    return parser


def parse_arguments(parser):
    args = parser.parse_args()
    for name, value in sizes[args.size].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.step_size = step_sizes[args.method] if args.step_size is None else args.step_size
    args.momentum = momenta[args.method] if args.momentum is None else args.momentum
    at_least_1 = (*sizes["small"], "steps", "stop_at", "batch_size", "workers", "processes")
    for name in (*at_least_1, "evaluate_every", "validation_windows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} must not be negative")
    if not args.step_size > 0:
        parser.error(f"--step-size {args.step_size} must be above 0")
    if not 0 <= args.momentum < 1:
        parser.error(f"--momentum {args.momentum} must be in [0, 1)")
    if args.width % args.heads:
        parser.error(f"--width {args.width} is no multiple of --heads {args.heads}")
    if args.vocabulary < 128:
        parser.error(f"--vocabulary {args.vocabulary} must be at least the 128 of ASCII")
    if args.stop_at is not None and args.stop_at > args.steps:
        parser.error(f"--stop-at {args.stop_at} is after the last of --steps {args.steps}")
    by_hand = args.coordinator, args.processes, args.process_id
    if any(option is not None for option in by_hand) and None in by_hand:
        parser.error("--coordinator, --processes and --process-id belong together")
    if args.processes is not None and not 0 <= args.process_id < args.processes:
        parser.error(f"--process-id {args.process_id} is none of --processes {args.processes}")
    if not args.accelerators and args.workers % (args.processes or 1):
        parser.error(f"--workers {args.workers} is no multiple of --processes {args.processes}")
    return args


def check_shares(parser, args, parts, named):
    """Raise if the batch or the validation windows do not divide into equal parts."""
    for name in ("batch_size", "validation_windows"):
        if (value := getattr(args, name)) % parts:
            parser.error(f"--{name.replace('_', '-')} {value} is no multiple of {parts} {named}")


def main():
    parser = make_parser(__doc__)
    args = parse_arguments(parser)
    join(args, args.workers)
    workers = jax.device_count()
    check_shares(parser, args, workers, "workers")
    train(args, jax.make_mesh((workers,), ("data",), axis_types=(AxisType.Auto,)), ("data",))


if __name__ == "__main__":
    main()
