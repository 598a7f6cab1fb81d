"""Programs of the repository, run in processes of their own as a user would run them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"


def environment():
    """This process's environment without its choice of devices, which must not reach a program."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "XLA"))}


def run_program(path, *options):
    """Run a Python program to its end."""
    command = [sys.executable, str(path), *map(str, options)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def free_address():
    """An address of this machine with a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
