"""The README is short, its code runs, and what it links to exists."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


def test_code_blocks_run_in_order(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    # The first block sets the number of devices, so the code needs a process of its own.
    program = "\n".join([*blocks, "print(float(loss))"])
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) > 0


def test_every_link_within_the_project_leads_somewhere():
    links = [link for link in re.findall(r"\]\((.*?)\)", README) if not link.startswith("https:")]
    assert len(links) >= 12
    for link in links:
        assert (ROOT / link).is_file(), link
