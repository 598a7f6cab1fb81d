"""Processes build the same programs under different string hashes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROGRAMS = Path(__file__).with_name("programs.py")
SEEDS = 3, 16  # of the string hashes: they turn around every set of two axis names


def digests(seed):
    """The digest of each configuration's program in a process of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    finished = subprocess.run(
        [sys.executable, PROGRAMS], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return dict(line.rsplit(": ", 1) for line in finished.stdout.splitlines())


def test_programs_do_not_depend_on_string_hashes():
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(digests, SEEDS)
    orders = first.pop("order of sets"), second.pop("order of sets")
    assert all(a != b for a, b in zip(*orders, strict=True)), "choose other seeds"
    assert len(first) == 15
    assert first == second
