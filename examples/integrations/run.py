"""Run every recipe beside the program that it changes, and print losses, bytes and changed lines.

make integrations
python examples/integrations/run.py --only flax_linen flax_nnx
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

here = Path(__file__).parent
recipes = ("flax_linen", "flax_nnx", "tunix", "maxtext")
most_loss = 1.2  # after a vote; each run starts above it


def changed_lines(recipe):
    """The added and removed lines, by `git diff`, with docstrings and comments."""
    files = here / f"{recipe}_before.py", here / f"{recipe}_vote.py"
    done = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", *files], capture_output=True, text=True
    )
    added, removed = done.stdout.split()[:2]
    return int(added), int(removed)


def run(program):
    """Run a program, pass its output on, and return its last loss and bytes."""
    # Deprecated calls of other packages would hide the results.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, here / program]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"{program} failed.")
    found = re.search(r"Loss ([\d.]+); a device sends ([\d,]+) bytes", lines[-1])
    return (float(found[1]), int(found[2].replace(",", ""))) if found else None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=recipes, choices=recipes, help="recipes")
    for recipe in parser.parse_args().only:
        added, removed = changed_lines(recipe)
        print(f"\n{recipe}: {added} lines added, {removed} removed", flush=True)
        if recipe == "maxtext":
            run("maxtext_compare.py")  # exits with an error where a vote is worse than it should be
            continue
        before, vote = run(f"{recipe}_before.py"), run(f"{recipe}_vote.py")
        if before is None or vote is None or vote[0] > most_loss or 10 * vote[1] > before[1]:
            sys.exit(f"{recipe}: the vote sends more than a tenth, or its loss is too large.")


if __name__ == "__main__":
    main()
