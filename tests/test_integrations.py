"""Recipes for other trainers: their files, their pins, and the numbers that the page states.

`make integrations` runs the recipes themselves, in an environment of their own.
"""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
folder = root / "examples/integrations"
recipes = sorted(path.name.removesuffix("_vote.py") for path in folder.glob("*_vote.py"))
programs = sorted(folder.glob("*.py"))
page = (root / "docs/integrations.md").read_text()
readme = (folder / "README.md").read_text()


def pins():
    lines = (folder / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def names_of(tree, name):
    """The names that a program imports from the package `name` and uses."""
    imported = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.split(".")[0] == name
    }
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & imported


@pytest.mark.parametrize("path", programs, ids=lambda path: path.name)
def test_a_program_compiles_and_says_how_to_run_it(path):
    tree = ast.parse(path.read_text(), path.name)
    compile(tree, path.name, "exec")
    manual = ast.get_docstring(tree) or ""
    assert path.name == "report.py" or f"python examples/integrations/{path.name}" in manual


@pytest.mark.parametrize("recipe", recipes)
def test_only_the_program_with_a_vote_uses_signax(recipe):
    before = ast.parse((folder / f"{recipe}_before.py").read_text())
    vote = ast.parse((folder / f"{recipe}_vote.py").read_text())
    assert not names_of(before, "signax")
    assert names_of(vote, "signax") == {"signax"}


def test_each_requirement_is_pinned_to_one_version():
    pin = re.compile(r"[A-Za-z0-9][\w.\-]*==\d[\w.+!]*")
    assert [line for line in pins() if not pin.fullmatch(line)] == []


def test_requirements_name_each_package_once_and_the_trainers_that_the_page_names():
    versions = dict(line.lower().replace("_", "-").split("==") for line in pins())
    assert len(versions) == len(pins())
    assert f"MaxText {versions['maxtext']}" in page
    assert f"Tunix {versions['google-tunix']}" in page
    assert f"Flax {versions['flax'].rsplit('.', 1)[0]}" in page
    assert not {"signax", "torch"} & versions.keys()


@pytest.mark.skipif(shutil.which("git") is None, reason="counts lines by git diff")
@pytest.mark.parametrize("recipe", recipes)
def test_the_page_and_the_readme_state_the_changed_lines(recipe):
    files = folder / f"{recipe}_before.py", folder / f"{recipe}_vote.py"
    command = ["git", "diff", "--no-index", "--numstat", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    added, removed = done.stdout.split()[:2]
    cells = rf"\|(?:[^|\n]*\|)*? {added}, {removed} \|"
    assert re.search(rf"^\| `{recipe}` {cells}", page, re.MULTILINE)
    assert re.search(rf"^\| `{recipe}_vote.py` {cells}", readme, re.MULTILINE)


def test_the_page_shows_code_of_the_recipes():
    blocks = re.findall(r"```\{code-block\} python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    programs = "\n".join(path.read_text() for path in folder.glob("*_vote.py"))
    known = {line.strip() for line in programs.splitlines()}
    for line in "\n".join(blocks).splitlines():
        assert line.strip() in known, line
