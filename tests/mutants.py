"""Breaks the library on purpose, one line at a time, and asks whether the tests notice.

    python tests/mutants.py                  # the tests of `make test`
    python tests/mutants.py --all            # and the slow ones
    python tests/mutants.py --only 3 17      # some mutants, by number

Each mutant replaces one piece of code, in a copy of the repository in a temporary folder. The tests
named with it run first, since they should notice; the others follow only if they do not. Prints one
line for each mutant.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A change that tests should notice.

    Attributes:
      file: the file under `signax`.
      code: a piece of its code, which occurs once.
      broken: the code in its stead.
      tests: the modules that should notice, without `test_`.
    """

    file: str
    code: str
    broken: str
    tests: str


WORDS, PACKING, BALLOTS = "_wire/words.py", "_wire/packing.py", "_wire/ballots.py"
SLABS = "_wire/slabs.py"
EXCHANGE, SCALED, FEEDBACK = "_wire/exchange.py", "_wire/scaled_signs.py", "_wire/feedback.py"
PARTS, LEAVES, PARTICIPATION = "_wire/parts.py", "_core/leaves.py", "_transforms/participation.py"
MAPPED, PLACEMENT = "_data_parallel/mapped.py", "_data_parallel/placement.py"
STATE = "_data_parallel/state.py"

MUTANTS = [
    # Counting and messages.
    Mutant(WORDS, "(a & b) | (half & c)", "(a & b) | (half | c)", "words"),
    Mutant(WORDS, "((plane | reached) & ~wanted)", "((plane | reached) & wanted)", "words"),
    Mutant(WORDS, "(~(plane ^ other) & above)", "((plane ^ other) & above)", "words"),
    Mutant(WORDS, "header > 0, padded, 0)", "header >= 0, padded, 0)", "words"),
    Mutant(WORDS, "4 * (worker + 1) + 2 * coin", "4 * worker + 2 * coin", "words collectives"),
    Mutant(WORDS, "extra >= voters // 2 + 1", "extra >= voters // 2", "exchange votes"),
    Mutant(WORDS, "MARGIN = 3 ", "MARGIN = 2 ", "agreement"),
    Mutant(WORDS, "if num_workers <= jnp.iinfo", "if num_workers <= 2 * jnp.iinfo", "words"),
    # Packing.
    Mutant(SLABS, "if stride % 2:", "if not stride % 2:", "packing collectives"),
    Mutant(PACKING, "return size + size % 2", "return size", "packing collectives"),
    Mutant(SLABS, "lax.slice_in_dim(bits, 0,", "lax.slice_in_dim(bits[::-1], 0,", "packing"),
    Mutant(SLABS, "take(plane) << np.uint32(n)", "take(plane) << np.uint32(0)", "packing"),
    Mutant(PACKING, "*planes, bad = (_join(", "*planes, bad = (0 * _join(", "packing"),
    # Zeros and ties.
    Mutant(BALLOTS, "rank = (worker + pair) % num_workers", "rank = worker", "ballots"),
    Mutant(BALLOTS, "(rank + step + (hashed & 1)) & 1", "(rank + step) & 1", "ballots"),
    Mutant(BALLOTS, "(drift > 0).astype", "(drift < 0).astype", "ballots"),
    Mutant(BALLOTS, "(values > 0) | (values < 0)", "values == values", "agreement"),
    Mutant(BALLOTS, "return 2 * plus - voters", "return 2 * plus + voters", "means"),
    # The exchange.
    Mutant(EXCHANGE, "finite &= jnp.all(encoded.finite)", "finite = jnp.all(encoded.finite)",
           "participation sharded_params"),
    Mutant(EXCHANGE, "return finite & active", "return finite", "exchange collectives"),
    Mutant(EXCHANGE, "plane, devices * part), position * part", "plane, devices * part), 0 * part",
           "collectives"),
    Mutant(EXCHANGE, "[jnp.max(each) for each in", "[0 * jnp.max(each) for each in",
           "participation collectives"),
    # Error feedback.
    Mutant(FEEDBACK, "jnp.where(outcome.participates, new, old)", "new", "scaled_signs"),
    Mutant(FEEDBACK, "partial(add_memory, decay=codec.decay)", "partial(add_memory, decay=1.0)",
           "scaled_signs"),
    Mutant(SCALED, "else real & (voters > 0)", "else real", "scaled_signs"),
    Mutant("_wire/messages.py", "jnp.maximum(voters, 1).astype(dtype)", "message.shape[0]",
           "scaled_signs"),
    Mutant(PARTS, "column[None] < stops", "column[None] <= stops", "scaled_signs"),
    Mutant("_transforms/memory.py", "left = jax.tree.map(lambda p, u: p - u.astype(p.dtype)",
           "left = jax.tree.map(lambda p, u: p + u.astype(p.dtype)", "memory"),
    # State and placement.
    Mutant(PARTICIPATION, "jnp.where(finite, new, old) if", "jnp.where(finite, new, new) if",
           "hold_if_nonfinite participation"),
    Mutant(PARTICIPATION, "hidden = hidden if is_alike else [self.raw]", "hidden = []",
           "participation"),
    Mutant(PARTICIPATION, "optax.safe_increment(before.missed)", "before.missed", "participation"),
    Mutant(STATE, "taken = rows[workers * old // num_workers]", "taken = rows[workers * 0]",
           "state"),
    Mutant(PLACEMENT, "jnp.where(finite, loss, 0).astype", "jnp.where(finite, loss, 1).astype",
           "gradients"),
    Mutant(MAPPED, "key = jax.random.fold_in(key, lax.axis_index(workers.axis_name))",
           "key = jax.random.fold_in(key, 0)", "gradients"),
    Mutant("_data_parallel/varying.py", "return [differs or any(column)", "return [any(column)",
           "varying layout"),
]  # fmt: skip


def run(number: int, marks: str, workdir: pathlib.Path) -> str:
    """Whether, and by which test, a mutant is noticed."""
    mutant = MUTANTS[number]
    copy = workdir / str(number)
    for folder in ("signax", "tests", "examples", "benchmarks", "notebooks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / file, copy)
    path = copy / "signax" / mutant.file
    text = path.read_text()
    if text.count(mutant.code) != 1:
        return f"{number}: {mutant.code!r} occurs {text.count(mutant.code)} times"
    path.write_text(text.replace(mutant.code, mutant.broken))
    named = [f"tests/test_{name}.py" for name in mutant.tests.split()]
    first = [name for name in named if (copy / name).exists()]
    for tests in (first, ["tests"]):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            marks,
        ]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(
            [*command, *tests], cwd=copy, env=environment, capture_output=True, text=True
        )
        if done.returncode == 1:
            failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
            shutil.rmtree(copy)
            return f"{number}: caught by {failed[0].split()[1] if failed else tests}"
    return f"{number}: SURVIVES {mutant.file}: {mutant.code} -> {mutant.broken}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="run slow tests too")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants")
    args = parser.parse_args()
    marks = "not accelerator" if args.all else "not slow and not thorough"
    numbers = args.only if args.only is not None else range(len(MUTANTS))
    with tempfile.TemporaryDirectory() as workdir, ThreadPoolExecutor(2) as pool:
        for line in pool.map(lambda n: run(n, marks, pathlib.Path(workdir)), numbers):
            print(line, flush=True)


if __name__ == "__main__":
    main()
