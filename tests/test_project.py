"""Facts that two of the project's files state are the same in both."""

import pathlib
import re
import tomllib

import mutants
import tiers
import yaml

ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_pre_commit_pins_the_ruff_of_the_test_environment():
    requirements = PYPROJECT["project"]["optional-dependencies"]["test"]
    pins = [requirement for requirement in requirements if requirement.startswith("ruff==")]
    assert len(pins) == 1
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook.get("additional_dependencies") for hook in repository["hooks"]}
    assert hooks["ruff-check"] == hooks["ruff-format"] == pins


def test_continuous_integration_runs_every_python_of_the_classifiers():
    versions = read_yaml(".github/workflows/ci.yml")["jobs"]["versions"]
    prefix = "Programming Language :: Python :: "
    classifiers = PYPROJECT["project"]["classifiers"]
    declared = [name.removeprefix(prefix) for name in classifiers if name.startswith(f"{prefix}3.")]
    assert versions["strategy"]["matrix"]["python"] == declared
    assert PYPROJECT["project"]["requires-python"] == f">={declared[0]}"


def test_the_citation_agrees_with_the_metadata_and_cites_sources_of_the_docs():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "authors"} <= set(citation)
    assert citation["title"] == PYPROJECT["project"]["name"]
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert "version" not in citation  # signax/__init__.py is the only place for it.
    sources = " ".join((ROOT / "docs" / "claims.md").read_text(encoding="utf-8").split())
    assert len(citation["references"]) == 5
    for reference in citation["references"]:
        assert f"*{reference['title']}*" in sources
        assert reference["url"] in sources


def test_the_commit_hook_accepts_subjects_of_at_most_72_characters():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    (hook,) = [hook for hook in repository["hooks"] if hook["id"] == "commit-subject"]
    too_long = re.compile(hook["entry"].encode(), re.MULTILINE | re.DOTALL)  # as pygrep does
    body = "\n\n" + "b" * 100
    for letter in "aé":
        assert not too_long.search((letter * 72 + body).encode())
        assert too_long.search((letter * 73 + body).encode())
    assert not too_long.search(("fixup! " + "a" * 72 + body).encode())


def test_every_module_that_contributing_names_exists():
    names = re.findall(r"`([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(names) >= 10
    for name in names:
        assert (ROOT / name).is_file() or any((ROOT / "signax").rglob(name)), name


def test_every_test_that_a_tier_names_exists():
    for table in (tiers.FURTHER_CASES, tiers.THOROUGH, tiers.SLOW):
        for module, names in table.items():
            [path] = (ROOT / "tests").rglob(f"{module}.py")
            source = path.read_text()
            missing = names.keys() - set(re.findall(r"^def test_(\w+)", source, re.MULTILINE))
            assert not missing, f"{module} has no test {missing}"


def test_every_mutant_changes_code_that_occurs_once():
    for mutant in mutants.MUTANTS:
        text = (ROOT / "signax" / mutant.file).read_text()
        assert text.count(mutant.code) == 1, mutant
        assert all((ROOT / f"tests/test_{name}.py").exists() for name in mutant.tests.split())
