"""The API reference lists every public name once, and docstrings say what a caller needs."""

import collections
import inspect
import pathlib
import re
import types

import pytest

import signax
import signax.elastic
import signax.flax

PAGES = pathlib.Path(__file__).parent.parent / "docs" / "api"
SECTIONS = ["Args", "Attributes", "Returns", "Raises", "Examples", "References"]
METHODS = {
    kind: [
        name
        for name, value in inspect.getmembers(kind, inspect.isfunction)
        if value.__module__.startswith("signax.") and not name.startswith("_")
    ]
    for kind in (signax.DataParallel, signax.DiLoCo)
}


def find_exports():
    """Every public name with what it names."""
    exports = {}
    testing = [
        name
        for name, value in vars(signax.testing).items()
        if getattr(value, "__module__", None) == "signax.testing" and not name.startswith("_")
    ]
    for module, names in (
        (signax, signax.__all__),
        (signax.diagnostics, signax.diagnostics.__all__),
        (signax.flax, signax.flax.__all__),
        (signax.testing, testing),
        *METHODS.items(),
    ):
        prefix = module.__name__ if inspect.ismodule(module) else f"signax.{module.__name__}"
        exports |= {f"{prefix}.{name}": getattr(module, name) for name in names}
    return exports


EXPORTS = find_exports()
MODULES = [name for name, value in EXPORTS.items() if inspect.ismodule(value)]
RECORDS = [  # states, and other named tuples without behaviour
    name
    for name, value in EXPORTS.items()
    if hasattr(value, "_fields") and value is not signax.DataParallel
]
OPTAXS = ["signax.scale_by_sign"]  # its docstring is Optax's
OURS = [name for name in EXPORTS if name not in (*MODULES, *OPTAXS)]
CALLABLES = [name for name in OURS if name not in RECORDS]
CLASSES = [name for name in CALLABLES if inspect.isclass(EXPORTS[name])]

# Their examples need a server: docs/elastic.md and examples/elastic_worker.py have them.
ELASTIC = {
    **{f"signax.elastic.{name}": getattr(signax.elastic, name) for name in signax.elastic.__all__},
    "signax.elastic.Exchange.catch_up": signax.elastic.Exchange.catch_up,
    "signax.elastic.Exchange.close": signax.elastic.Exchange.close,
}

WITHOUT_SOURCE = {
    "signax.DataParallel": "runs transformations, whichever paper they are from",
    "signax.average_updates": "is a plain mean",
    "signax.find_buckets": "reads a program",
    "signax.freeze": "makes zeros",
    "signax.overlap": "orders a program",
    "signax.hold_if_nonfinite": "guards a state",
    "signax.inner_rules": "edits rules of Flax",
    "signax.leave_out_nonfinite": "guards votes",
    "signax.participation": "reads a state",
    "signax.scaled_signs_memory": "makes zeros",
    "signax.skip_on_spike": "guards a state",
    "signax.state_specs": "reads the layout of a state",
    "signax.flax.value_and_grad": "is a gradient",
    "signax.diagnostics.collective_bytes": "reads a program",
    "signax.diagnostics.collectives": "reads a program",
    "signax.diagnostics.exchange_seconds": "is this project's model",
    "signax.diagnostics.in_flight": "reads a program",
    "signax.diagnostics.metrics": "reads a state",
    "signax.diagnostics.wire_bytes": "counts this project's bytes",
    **{
        f"signax.{kind.__name__}.{name}": "is a method of a class"
        for kind, names in METHODS.items()
        for name in names
    },
}


def class_of(name):
    """The class of a method, or `None`."""
    classes = [f"signax.{kind.__name__}" for kind in METHODS]
    return next((one for one in classes if name.startswith(f"{one}.")), None)


def documented_names(page):
    """The kinds and names that a page documents, members of a class included."""
    names = []
    for block in re.findall(r"^```\{eval-rst\}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for kind, name, options in re.findall(
            r"^\.\. (?:auto|py:)(\w+):: (\S+)\n((?:   :.*\n)*)", block, re.MULTILINE
        ):
            names.append((kind, name))
            members = re.search(r":members: (.*)", options)
            names += [
                ("member", f"{name}.{member}")
                for member in (members[1].split(", ") if members else [])
            ]
    return names


def split_sections(name):
    """The text of a docstring before its sections, as "", and the lines of each section."""
    sections, current = {"": []}, ""
    for line in (inspect.getdoc(EXPORTS[name]) or "").split("\n"):
        heading = re.fullmatch(r"([A-Z][a-z]+):", line)
        if heading:
            current = heading[1]
            assert current not in sections, f"{name} has two sections {current}"
            sections[current] = []
        else:
            sections[current].append(line)
    return sections


def entries(lines):
    """The names that a section describes, such as arguments."""
    return [match[1] for line in lines if (match := re.match(r"  (\*{0,2}\w+): \S", line))]


def signature_of(name):
    """The arguments of an export, with the stars of `**extra_args`."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(EXPORTS[name]).parameters.values()
    return [f"{stars.get(p.kind, '')}{p.name}" for p in parameters if p.name != "self"]


def test_the_reference_documents_every_public_name_once_and_no_other():
    documented = [
        entry
        for path in sorted(PAGES.glob("*.md"))
        for entry in documented_names(path.read_text(encoding="utf-8"))
    ]
    counts = collections.Counter(name for _, name in documented)
    fields = {"signax.diagnostics.Collective.is_floating"}  # a property, not an export
    assert {name for name, count in counts.items() if count > 1} == set()
    assert set(counts) - fields == {*EXPORTS, *ELASTIC}


def test_the_reference_documents_each_name_by_the_directive_of_its_kind():
    for path in PAGES.glob("*.md"):
        for kind, name in documented_names(path.read_text(encoding="utf-8")):
            value = {**EXPORTS, **ELASTIC}.get(name)
            if kind == "module":
                assert isinstance(value, types.ModuleType), name
            elif kind == "class":
                assert inspect.isclass(value), name
            else:
                assert kind == "member" or inspect.isfunction(value), name


def test_the_table_of_the_reference_links_every_function():
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    linked = re.findall(r"^\| \{\w+\}`~([\w.]+)` \|", index, re.MULTILINE)
    functions = [name for name in (*CALLABLES, *OPTAXS) if class_of(name) is None]
    functions += ["signax.elastic.connect", "signax.elastic.Exchange"]
    assert sorted(linked) == sorted(functions)


@pytest.mark.parametrize("name", [*OURS, *MODULES])
def test_the_first_line_is_a_summary_in_one_sentence(name):
    summary, *rest = (inspect.getdoc(EXPORTS[name]) or "").split("\n")
    assert re.fullmatch(r"[A-Za-z`].*\.", summary), summary
    assert not summary.startswith(("That of", "The same", "Refuses")), summary
    assert rest[:1] in ([], [""]), "the summary goes on in a second line"


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_have_every_section_in_order(name):
    sections = split_sections(name)
    wanted = {"Args", "Returns", "Raises", "Examples", "References"}
    if name in CLASSES:
        wanted = wanted - {"Returns"} | {"Attributes"}
    if name in WITHOUT_SOURCE:
        wanted -= {"References"}
    if not signature_of(name):
        wanted -= {"Args"}
    found = [section for section in sections if section]
    assert found == [section for section in SECTIONS if section in wanted]
    for section in found:
        assert any(line.strip() for line in sections[section]), f"{section} is empty"


@pytest.mark.parametrize("name", CALLABLES)
def test_examples_run_or_name_the_docstring_with_the_example(name):
    examples = "\n".join(split_sections(name)["Examples"])
    if class_of(name) and ">>>" not in examples:
        (target,) = re.findall(r"^  See :(?:meth|class):`(.+)`\.$", examples.strip("\n"))
        target = target if target in EXPORTS else f"{class_of(name)}.{target}"
        examples = "\n".join(split_sections(target)["Examples"])
        assert f".{name.rpartition('.')[2]}(" in examples, f"{target} does not show {name}"
    code_and_result = r"^  (?:>>>|\.\.\.) .*\n  (?!>>>|\.\.\.)\S"
    assert re.search(code_and_result, examples, re.MULTILINE)


@pytest.mark.parametrize("name", CALLABLES)
def test_args_describes_every_argument_in_order_and_nothing_else(name):
    assert entries(split_sections(name).get("Args", [])) == signature_of(name)


@pytest.mark.parametrize("name", CALLABLES)
def test_raises_names_exceptions(name):
    raised = entries(split_sections(name)["Raises"])
    assert raised
    assert set(raised) <= {"NameError", "TypeError", "ValueError"}


@pytest.mark.parametrize("name", [name for name in CALLABLES if name not in CLASSES])
def test_returns_opens_with_no_colon_which_sphinx_takes_for_a_type(name):
    first = split_sections(name)["Returns"][0]
    assert ":" not in re.sub(r"(:\w+:)?`[^`]*`", "", first), first


@pytest.mark.parametrize("name", RECORDS)
def test_states_describe_every_field_in_order(name):
    sections = split_sections(name)
    assert list(sections) == ["", "Attributes"]
    assert entries(sections["Attributes"]) == list(EXPORTS[name]._fields)


def test_every_exception_to_the_rule_of_sources_is_in_use():
    assert set(WITHOUT_SOURCE) <= set(CALLABLES)
