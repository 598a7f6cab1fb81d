"""Time packing, counting, applying, whole steps and a language model on one accelerator.

    python benchmarks/accelerator.py
    python benchmarks/accelerator.py --groups card pack apply --budget 60
    python benchmarks/accelerator.py --tiny --parameters 100_000   # on a CPU, to test

The groups of rows, each against the first row of its kind:

- `card`: copy an array (read and write it), and read an array for its sum.
- `pack`: pack signs into words, with the check that all values are finite, as in a vote.
- `count`: count the words of M messages, one for each worker, into the majority's words.
- `apply`: unpack the decided words, and step along their signs in donated parameters.
- `step`: an optimiser's whole step, with voters simulated by `jax.vmap` on the one device, in the
  shapes of GPT-2 small. The reference is SGD with momentum on the mean gradient.
- `model`: a training step of the GPT of examples/train_language_model.py, in bfloat16 and with
  eight simulated workers. The reference is AdamW on the mean gradient.

`bytes` must move at least: arguments are read, results are written, and messages are written and
read. A state that a step replaces is read and written. `of copy` is the bandwidth, with these
bytes, divided by the bandwidth of the copy. `ratio` is the time divided by the reference's time.
A step of Muon also multiplies matrices, which no count of bytes covers.

The programs of a group are compiled in parallel, then timed one by one. A row that fails records
its error. Results are saved after every row, and rows beyond the budget are skipped. Simulated
workers exchange messages within the card, so nothing here says how fast a network is.
"""

import argparse
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # the model needs most of a card

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_model import Row, models, noise, steps
from kernels import learning_rate, majority, rules
from report import print_table, save

from signax._wire import packing as wire
from signax._wire.words import seal

here = Path(__file__).parent
GROUPS = ("card", "pack", "count", "apply", "step", "model")
LARGE = 1_000_000_000  # parameters of the larger arrays


def main() -> None:
    """Time all rows, and save and print their results."""
    args = parse_arguments()
    begin, results = time.perf_counter(), []
    settings = vars(args) | {"device": jax.devices()[0].device_kind, "count": jax.device_count()}
    print(f"{settings['device']}, jax {jax.__version__}", flush=True)
    # A compilation that hangs must not keep the results: see the end.
    pool = ThreadPoolExecutor(args.threads)
    for group in args.groups:
        try:
            rows = list(rows_of(group, args))
        except Exception as error:
            results.append({"group": group, "name": "all", "error": describe(error)})
            continue
        futures = {}
        if remaining(begin, args) > 0:
            futures = {row.name: pool.submit(compile_row, row) for row in rows}
            wait(list(futures.values()), begin, args)
        for row in rows:
            results.append(run_row(row, futures.get(row.name), begin, args))
            compare(results)
            save(args.json, "accelerator", settings, results)
            print(line(results[-1]), flush=True)
    save(args.json, "accelerator", settings, results)
    print_results(results)
    print(f"\n{time.perf_counter() - begin:.0f} s. Results are in {args.json}.", flush=True)
    sys.stderr.flush()
    os._exit(0)  # does not wait for compilations beyond the budget


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parameters", type=int, default=124_000_000, help="of arrays (default 124_000_000)")
    add("--voters", type=int, default=8, help="simulated in steps (default 8)")
    add("--rows", type=int, default=2, help="of 1,024 tokens per worker (default 2)")
    add("--groups", nargs="+", metavar="GROUP", choices=GROUPS, default=GROUPS, help=f"of {GROUPS}")
    add("--budget", type=float, default=240.0, help="seconds before rows are skipped (default 240)")
    add("--seconds", type=float, default=0.4, help="of timed calls per row (default 0.4)")
    add("--threads", type=int, default=os.cpu_count(), help="that compile (default: all cores)")
    add("--tiny", action="store_true", help="few and small rows, for a test")
    add("--trace", metavar="DIR", help="profile one step of signum and one of the model into DIR")
    add("--json", metavar="FILE", default=str(here / "results" / "accelerator.json"))
    args = parser.parse_args()
    if min(args.parameters, args.voters, args.rows, args.threads) < 1:
        parser.error("--parameters, --voters, --rows and --threads must be at least 1")
    return args


# Rows.


def rows_of(group: str, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of a group."""
    if group in ("step", "model"):
        yield from {"step": steps, "model": models}[group](args)
        return
    sizes = [args.parameters] if args.tiny else [args.parameters, LARGE]
    if group == "count":
        for workers in (2, 8) if args.tiny else (2, 4, 8, 16, 32, 64):
            yield counting(args.parameters, workers)
        return
    for size in sizes:
        if group == "card":
            yield copying(size)
            yield reading(size)
            continue
        for dtype in (jnp.float32, jnp.bfloat16):
            for kind, shapes in arrays(size).items():
                make = {"pack": packing, "apply": applying}[group]
                yield make(f"{kind} {size:,} {np.dtype(dtype).name}", shapes, dtype)


def arrays(size: int) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of about `size` numbers: a flat array, matrices, and matrices that come in slabs."""
    width = 3072 if size >= 32 * 32 * 3072 else 128
    high = max(1, size // width // 256) * 256
    return {"flat": [(size,)], "matrix": [(high, width)], "slabs": [(32, high // 32, width)]}


def copying(size: int) -> Row:
    """Read and write an array."""

    def program(carry: Any, fixed: jax.Array) -> Any:
        return carry, fixed + 1

    def init():
        return (), noise((size,), jnp.float32)

    return Row("card", f"copy {size:,}", init, program, 8 * size)


def reading(size: int) -> Row:
    """Read an array."""

    def program(carry: Any, fixed: jax.Array) -> Any:
        return carry, jnp.sum(fixed)

    def init():
        return (), noise((size,), jnp.float32)

    return Row("card", f"read {size:,}", init, program, 4 * size)


def packing(name: str, shapes: list[tuple[int, ...]], dtype: Any) -> Row:
    """Pack signs, with the flag of finite values."""

    def program(carry: Any, fixed: Any) -> Any:
        leaves, coin = fixed
        return carry, wire.pack(leaves, rules, coin)

    def init():
        return (), ([noise(shape, dtype) for shape in shapes], jnp.uint32(1))

    size = sum(int(np.prod(shape)) for shape in shapes)
    return Row("pack", name, init, program, size * np.dtype(dtype).itemsize + size / 8)


def counting(parameters: int, workers: int) -> Row:
    """Count M whole messages into the majority's words."""
    share = -(-parameters // 32)

    def program(carry: Any, fixed: jax.Array) -> Any:
        return carry, majority(fixed, share)

    def init():
        headers = 4 * (jnp.arange(workers, dtype=jnp.uint32) + 1) + 1
        rows = noise((workers, share), jnp.uint32)
        return (), jax.vmap(lambda row, header: seal([row[None]], header)[0])(rows, headers)

    return Row("count", f"{workers} x {share:,} words", init, program, 4 * share * (workers + 1))


def applying(name: str, shapes: list[tuple[int, ...]], dtype: Any) -> Row:
    """Step along decided words."""

    def program(carry: list[jax.Array], fixed: Any) -> Any:
        words, voters = fixed
        bits = wire.unpack([words], carry, inverts_odd=rules.relative)
        signs = rules.signs(bits, voters, [leaf.dtype for leaf in carry])
        rate = jnp.asarray(learning_rate, dtype)
        return [leaf - rate * sign for leaf, sign in zip(carry, signs, strict=True)], ()

    def init():
        leaves = [noise(shape, dtype) for shape in shapes]
        return leaves, (noise((wire.num_words(leaves),), jnp.uint32), jnp.uint32(8))

    size = sum(int(np.prod(shape)) for shape in shapes)
    return Row("apply", name, init, program, 2 * size * np.dtype(dtype).itemsize + size / 8)


# Running.


def remaining(begin: float, args: argparse.Namespace) -> float:
    """The seconds left of the budget."""
    return args.budget - (time.perf_counter() - begin)


def wait(futures: list[Future], begin: float, args: argparse.Namespace) -> None:
    """Wait for all compilations, which would disturb the timings, but not beyond the budget."""
    for future in futures:
        try:
            future.exception(timeout=max(0.0, remaining(begin, args)))
        except TimeoutError:
            future.cancel()


def compile_row(row: Row) -> tuple[Any, Any, float]:
    """Compile a row's two programs: what makes its arguments, and what is timed."""
    start = time.perf_counter()
    carry, fixed = jax.eval_shape(row.init)
    init = jax.jit(row.init).lower().compile()
    program = jax.jit(row.program, donate_argnums=0).lower(carry, fixed).compile()
    return init, program, time.perf_counter() - start


def run_row(
    row: Row, future: Future | None, begin: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Time a row. An error becomes the row's result."""
    result: dict[str, Any] = {"group": row.group, "name": row.name, "reference": row.reference}
    if future is None or not future.done() or future.cancelled() or remaining(begin, args) <= 0:
        return result | {"error": f"skipped: the budget of {args.budget:g} s is spent"}
    try:
        init, program, compiling = future.result()
        carry, fixed = init()
        times = time_calls(carry, fixed, program, args.seconds, trace_folder(row, args))
        seconds = statistics.median(times)
        result |= {
            "milliseconds": seconds * 1e3,
            "seconds": times,
            "bytes": row.moved,
            "gigabytes_per_second": row.moved / seconds / 1e9 or None,
            "compile_seconds": compiling,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }
        return result | ({"tokens_per_second": row.tokens / seconds} if row.tokens else {})
    except Exception as error:
        traceback.print_exc()
        return result | {"error": describe(error)}


def describe(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def trace_folder(row: Row, args: argparse.Namespace) -> Path | None:
    """Where to write a row's profile, if it gets one."""
    profiled = f"signum, {args.voters} voter", "lion, voted"
    if not args.trace or row.group not in ("step", "model") or not row.name.startswith(profiled):
        return None
    return Path(args.trace) / re.sub(r"\W+", "-", f"{row.group} {row.name}")


def time_calls(
    carry: Any, fixed: Any, program: Callable, seconds: float, folder: Path | None
) -> list[float]:
    """Seconds per call, of several runs of calls. The calls of a run are not waited for singly."""

    def run(calls: int) -> float:
        nonlocal carry
        start, out = time.perf_counter(), None
        for _ in range(calls):
            carry, out = program(carry, fixed)
        jax.block_until_ready((carry, out))
        return (time.perf_counter() - start) / calls

    run(2)
    calls = min(50, max(1, int(seconds / 8 / max(run(1), 1e-6))))
    if folder:
        with jax.profiler.trace(str(folder)):
            run(1)
    return [run(calls) for _ in range(7)]


# Results.


def compare(results: list[dict[str, Any]]) -> None:
    """Add the ratios of the last result to the copy and to its reference."""
    result = results[-1]
    if "error" in result:
        return
    found = {(r["group"], r["name"]): r for r in results if "error" not in r}
    copies = [r for (group, name), r in found.items() if group == "card" and "copy" in name]
    reference = found.get((result["group"], result["reference"]))
    if copies and result["bytes"]:
        own, copy = (r["gigabytes_per_second"] for r in (result, copies[0]))
        result["of_copy"] = own / copy
    if reference:
        result["ratio"] = result["milliseconds"] / reference["milliseconds"]


def cells(result: dict[str, Any]) -> list[str]:
    """The cells of a result's row in the tables."""
    if "error" in result:
        return [result["name"], result["error"][:60], "", "", "", "", ""]
    tokens = result.get("tokens_per_second")
    return [
        result["name"],
        f"{result['milliseconds']:,.3f}",
        f"{result['gigabytes_per_second']:,.0f}" if result["bytes"] else "",
        f"{result['of_copy']:.2f}" if "of_copy" in result else "",
        f"{result['ratio']:.2f}" if "ratio" in result else "",
        f"{tokens:,.0f}" if tokens else "",
        f"{result['temporary_bytes'] / 1e6:,.0f}",
    ]


def line(result: dict[str, Any]) -> str:
    """A result as one line, shown as soon as it is known."""
    return "  ".join([result["group"], *cells(result)])


def print_results(results: list[dict[str, Any]]) -> None:
    """Print a table for each group."""
    header = ("median ms", "GB/s", "of copy", "ratio", "tokens/s", "temporary MB")
    for group in dict.fromkeys(result["group"] for result in results):
        print()
        found = [cells(result) for result in results if result["group"] == group]
        print_table((group, *header), found)


if __name__ == "__main__":
    main()
