"""Time a worker's computations in a vote: packing signs, counting ballots, applying the decision.

Each kernel is compiled as in a vote, for one device. It takes turns with its reference:

- `pack`: pack an array's signs into words. `words and flag`, as in a vote, also checks that all
  values are finite; `words` does not check. The reference reads the array once, for its sum. The
  naive way is `jnp.packbits(x > 0)` and `jnp.all(jnp.isfinite(x))`.
- `count`: count the workers' messages for one part of the coordinates, once with all workers and
  once with every eighth worker excluded. The reference unpacks bits to integers, adds them up,
  compares, and packs again. Three variants do so in narrower integers. All give the same words.
- `apply`: unpack the decided words to signs, and compute `p - learning_rate * signs` in one donated
  program. The reference is `p - learning_rate * g` with a gradient in full precision.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --workers 9 --rounds 5
    python benchmarks/kernels.py --kernels pack apply --shapes 768x3072 50257x768 1000

`pack` and `apply` take one array of each shape. The default shapes have about `--parameters`
numbers: a flat array, an array that 32 slabs cut evenly, and two arrays whose slabs need padding.
Cases that differ only in arguments (excluded workers, the coin, the number of voters) share one
program.

Ratios are taken within each round. The tables show their median and range over the rounds. For
`pack` and `apply` a ratio is the kernel's time divided by the reference's time: less is better. For
`count` it is the reference's time divided by the kernel's: more is better. The tables also show
goals, which are not asserted.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from report import interleave, print_table, save, summary

from signax._wire import packing as wire
from signax._wire.ballots import Rules
from signax._wire.signs import Majority
from signax._wire.types import Context, Leaves, Worker
from signax._wire.words import WORD_BITS, part_words, seal, sum_dtype, unseal

here = Path(__file__).parent
rules = Rules("dither", "dither")
learning_rate = 1e-3


class Case(NamedTuple):
    """The candidates that are timed together.

    Attributes:
      kernel: the name of the kernel.
      argument: the shape that the candidates work on.
      candidates: the functions to call, by name.
      reference: the candidate with which the others are compared.
      goals: the ratios that some candidates should reach.
      ratio: whether times or speeds are compared.
    """

    kernel: str
    argument: str
    candidates: dict[str, Callable[[], Any]]
    reference: str
    goals: dict[str, float]
    ratio: Literal["time", "speed"]


def main() -> None:
    """Time all cases, and print, save and draw the results."""
    args = parse_arguments()
    results = []
    for kernel in args.kernels:
        cases = {
            "pack": lambda: map(packing, args.shapes),
            "count": lambda: [counting(args.parameters, args.workers)],
            "apply": lambda: map(applying, args.shapes),
        }[kernel]()
        measured = [measure(case, args.rounds) for case in cases]
        print_results(kernel, measured)
        results += measured
    save(args.json, "kernels", vars(args), results)
    draw(results, args.figure)
    print(f"\nResults are in {args.json}, the figure is {args.figure}.")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kernels = ("pack", "count", "apply")
    add = parser.add_argument
    add("--parameters", type=int, default=10_000_000, help="in f32 (default 10_000_000)")
    add("--workers", type=int, default=64, help="that are counted (default 64)")
    add("--rounds", type=int, default=21, help="timed calls of each (default 21)")
    add("--shapes", nargs="+", type=shape, metavar="RxC", help="(default: four, see above)")
    add("--kernels", nargs="+", metavar="NAME", choices=kernels, default=kernels)
    add("--json", metavar="FILE", default=str(here / "results" / "kernels.json"))
    add("--figure", metavar="FILE", default=str(here / "results" / "kernels.png"))
    args = parser.parse_args()
    if min(args.parameters, args.rounds) < 1:
        parser.error("--parameters and --rounds must be at least 1")
    if args.workers < 2:
        parser.error(f"--workers {args.workers} must be at least 2")
    args.shapes = args.shapes or default_shapes(args.parameters)
    return args


def shape(text: str) -> tuple[int, ...]:
    """Read a shape such as "768x3072"."""
    sizes = tuple(int(size) for size in text.split("x"))
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


def default_shapes(parameters: int) -> list[tuple[int, ...]]:
    """A flat array, an array that 32 slabs cut evenly, a projection, and an odd embedding."""
    even = max(1, parameters // 4096 // WORD_BITS) * WORD_BITS
    columns = {rows: -(-parameters // rows) for rows in (3072, 50_257)}
    return [(parameters,), (even, 4096), *columns.items()]


def packing(shape: tuple[int, ...]) -> Case:
    """The case of packing an array into words."""
    array = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    coin = jnp.uint32(1)

    def pack(array, coin):
        return wire.pack([array], rules, coin)

    words_and_flag = jax.jit(pack)
    words = jax.jit(lambda array, coin: pack(array, coin)[0])
    naive = jax.jit(lambda array: (jnp.packbits(array > 0), jnp.all(jnp.isfinite(array))))
    read = jax.jit(jnp.sum)
    candidates = {
        "read": lambda: read(array),
        "words and flag": lambda: words_and_flag(array, coin),
        "words": lambda: words(array, coin),
        "naive": lambda: naive(array),
    }
    goals = {"words and flag": 2.0, "words": 1.25}
    return Case("pack", text(shape), candidates, "read", goals, "time")


def counting(parameters: int, workers: int) -> Case:
    """The case of counting all workers' words into the majority's words."""
    share = part_words(-(-parameters // WORD_BITS), workers)
    boxes = {
        "all in": ballot_box(workers, share),
        "some out": ballot_box(workers, share, out=np.arange(workers) % 8 == 7),
    }
    count = jax.jit(lambda parts: majority(parts, share))
    candidates: dict[str, Callable[[], Any]] = {
        name: lambda box=box: count(box) for name, box in boxes.items()
    }
    by_sums = sums(workers)
    for name, add_up in by_sums.items():
        program = jax.jit(lambda parts, add_up=add_up: majority_by_sums(parts, share, add_up))
        candidates[name] = lambda program=program: program(boxes["all in"])
    argument = f"u32[{workers}, {share}]"
    goals = {"all in": 60.0, "some out": 20.0}
    return Case("count", argument, candidates, next(iter(by_sums)), goals, "speed")


def ballot_box(workers: int, share: int, *, out: np.ndarray | bool = False) -> jax.Array:
    """The messages to one server, u32[M, part]: random bits, and header 0 from excluded workers."""
    rows = np.random.default_rng(0).integers(0, 2**32, (workers, share), np.uint32)
    tie = 1
    headers = np.where(out, 0, 2 * (np.arange(workers) + 1) + tie).astype(np.uint32)
    return jax.jit(jax.vmap(lambda row, header: seal([row[None]], header)[0]))(rows, headers)


def majority(parts: jax.Array, share: int) -> jax.Array:
    """The majority's words as a vote counts them: u32[M, part] to u32[share]."""
    worker = Worker(*[jnp.uint32(0)] * 3)
    reply = Majority(rules).combine(parts, [share], Context(Leaves([], []), worker, []))
    return reply.planes[0]


def majority_by_sums(
    parts: jax.Array, share: int, add_up: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The majority's words by `add_up`, which sums one integer per bit into int[32, share]."""
    (rows,), headers = unseal(parts, [share])
    voters = jnp.sum(headers > 0, dtype=jnp.int32)
    coin = jnp.where(voters % 2 == 0, jnp.max(headers & 1), 0)
    plus = add_up(rows)
    won = plus > (voters // 2).astype(plus.dtype) - coin.astype(plus.dtype)
    return jnp.sum(won.astype(jnp.uint32) << places(), axis=0, dtype=jnp.uint32)


def sums(workers: int) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Ways to add up the bits of u32[M, share] in integers: each gives int[32, share]."""
    narrow = sum_dtype(workers)

    def bits(rows, dtype):
        return ((rows[..., None, :] >> places()) & 1).astype(dtype)  # int[..., 32, share]

    def unpackbits(rows):
        places_last = jnp.unpackbits(rows[..., None].view(jnp.uint8), axis=-1, bitorder="little")
        return jnp.sum(places_last.astype(narrow), axis=0, dtype=narrow).T

    def scan(rows):
        total = jnp.zeros((WORD_BITS, rows.shape[1]), narrow)
        return lax.scan(lambda total, row: (total + bits(row, narrow), None), total, rows)[0]

    return {
        "unpack and sum": lambda rows: jnp.sum(bits(rows, jnp.int32), axis=0, dtype=jnp.int32),
        f"in {narrow}": lambda rows: jnp.sum(bits(rows, narrow), axis=0, dtype=narrow),
        f"in {narrow}, unpackbits": unpackbits,
        f"in {narrow}, row by row": scan,
    }


def places() -> jax.Array:
    """The place of each bit of a word: u32[32, 1]."""
    return lax.broadcasted_iota(jnp.uint32, (WORD_BITS, 1), 0)


def applying(shape: tuple[int, ...]) -> Case:
    """The case of applying the decided words to parameters."""
    rng = np.random.default_rng(0)
    start, gradient = (rng.standard_normal(shape, np.float32) for _ in range(2))
    words = rng.integers(0, 2**32, wire.num_words([start]), np.uint32)
    voted = Descent(apply_words, start, jnp.asarray(words), jnp.uint32(64))
    full = Descent(apply_gradient, start, jnp.asarray(gradient))
    candidates = {"p - a g": full, "p - a signs": voted}
    return Case("apply", text(shape), candidates, "p - a g", {"p - a signs": 1.25}, "time")


class Descent:
    """Repeated steps of a program, each of which donates the parameters of the step before.

    Without donation the pages of a fresh result would cost more than the step.
    """

    def __init__(self, program: Callable, parameters: np.ndarray, *arguments: jax.Array):
        self.program = jax.jit(program, donate_argnums=0)
        self.parameters, self.arguments = jnp.array(parameters), arguments

    def __call__(self) -> jax.Array:
        """Take a step."""
        self.parameters = self.program(self.parameters, *self.arguments)
        return self.parameters


def apply_words(parameters: jax.Array, words: jax.Array, voters: jax.Array) -> jax.Array:
    """A step along the decided signs."""
    bits = wire.unpack([words], [parameters], inverts_odd=rules.relative)
    [signs] = rules.signs(bits, voters, [parameters.dtype])
    return parameters - learning_rate * signs


def apply_gradient(parameters: jax.Array, gradient: jax.Array) -> jax.Array:
    """A step along a gradient in full precision."""
    return parameters - learning_rate * gradient


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time one case, and take the ratios within each round."""
    seconds = interleave(case.candidates, rounds)
    candidates = {}
    for name, times in seconds.items():
        pairs = zip(times, seconds[case.reference], strict=True)
        ratios = [own / other if case.ratio == "time" else other / own for own, other in pairs]
        candidates[name] = {
            **summary(times),
            "seconds": times,
            "ratio": summary(ratios),
            "goal": case.goals.get(name),
        }
    return {
        "kernel": case.kernel,
        "argument": case.argument,
        "reference": case.reference,
        "ratio": case.ratio,
        "candidates": candidates,
    }


def text(shape: Sequence[int]) -> str:
    """A shape in the notation of the command line."""
    return "x".join(map(str, shape))


def goal(result: dict[str, Any], name: str) -> str:
    """The goal of a candidate, with its direction."""
    value = result["candidates"][name]["goal"]
    sign = "<=" if result["ratio"] == "time" else ">="
    return "" if value is None else f"{sign} {value:g}"


def print_results(kernel: str, results: Sequence[dict[str, Any]]) -> None:
    """Print the table of one kernel."""
    rows = []
    for result in results:
        for name, found in result["candidates"].items():
            low, median, high = (found[key] * 1e3 for key in ("min", "median", "max"))
            ratio = found["ratio"]
            row = [f"{result['argument']}  {name}", f"{median:,.3f}", f"{low:,.3f}..{high:,.3f}"]
            row += [f"{ratio['median']:.2f}", f"{ratio['min']:.2f}..{ratio['max']:.2f}"]
            rows.append([*row, goal(result, name)])
    what = "time" if results[0]["ratio"] == "time" else "speed"
    references = ", ".join(dict.fromkeys(f"{result['reference']!r}" for result in results))
    print(f"\n{kernel}: {what} against {references}")
    print_table(("", "median ms", "range", f"{what} ratio", "range", "goal"), rows)


def draw(results: Sequence[dict[str, Any]], path: str) -> None:
    """Save a figure of the ratios, with their goals."""
    kinds = [kind for kind in ("time", "speed") if any(r["ratio"] == kind for r in results)]
    points = {kind: ratios(results, kind) for kind in kinds}
    heights = [0.3 * len(points[kind]) + 0.9 for kind in kinds]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        labels, found, goals = zip(*points[kind], strict=True)
        medians = [ratio["median"] for ratio in found]
        below = [ratio["median"] - ratio["min"] for ratio in found]
        above = [ratio["max"] - ratio["median"] for ratio in found]
        axes.errorbar(medians, labels, xerr=(below, above), fmt="o", capsize=3, label="measured")
        wanted = [(goal, label) for goal, label in zip(goals, labels, strict=True) if goal]
        if wanted:
            axes.scatter(*zip(*wanted, strict=True), marker="|", s=250, color="black", label="goal")
        better = {"time": "time, less is better", "speed": "speed, more is better"}[kind]
        axes.set(xscale="log", xlabel=f"times the reference's {better}: median and range")
        axes.axvline(1, color="gray", linestyle=":")
        axes.set_ylim(len(labels) - 0.4, -0.6)  # from top to bottom
        axes.grid(axis="x", alpha=0.3)
        axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def ratios(results: Sequence[dict[str, Any]], kind: str) -> list[tuple[str, Any, float | None]]:
    """The label, ratio and goal of every candidate that is compared by one kind of ratio."""
    return [
        (f"{result['kernel']} {result['argument']}: {name}", found["ratio"], found["goal"])
        for result in results
        if result["ratio"] == kind
        for name, found in result["candidates"].items()
        if name != result["reference"]
    ]


if __name__ == "__main__":
    main()
