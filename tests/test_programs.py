"""Processes build the same programs under different string hashes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).with_name("programs.py")
SEEDS = range(1, 9)


def digests(seed):
    """The digest of each configuration's program in a process of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    finished = subprocess.run(
        [sys.executable, PROGRAMS], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return dict(line.rsplit(": ", 1) for line in finished.stdout.splitlines())


@pytest.mark.slow
def test_programs_do_not_depend_on_string_hashes():
    with ThreadPoolExecutor(2) as pool:
        first, *others = pool.map(digests, SEEDS)
    assert len(first) == 15
    differing = {name for other in others for name in first if other[name] != first[name]}
    assert not differing
