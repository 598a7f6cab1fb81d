"""Names of the parts of an exchange in compiled programs, where profilers read them."""

import gzip
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec
from processes import BENCHMARKS, run_program
from workers import AXIS, auto_mesh

import signax

PARTS = {f"signax.{part}" for part in ("pack", "exchange", "count", "unpack", "momentum")}
UP_AND_DOWN = ["all-gather", "all-to-all"]
# The large leaf is packed alone, the others as one bundle; one message is large enough for
# `transport="packed"`.
PARAMS = {"large": jnp.zeros((128, 130)), "small": jnp.zeros((3, 5)), "scalar": jnp.zeros(())}

TRANSFORMATIONS = {
    "signum": lambda: signax.signum(0.1, axis_name=AXIS, transport="packed"),
    "signum, gather": lambda: signax.signum(0.1, axis_name=AXIS, transport="gather"),
    "signum, agreement": lambda: signax.signum(
        0.1, axis_name=AXIS, transport="packed", agreement=True
    ),
    "lion": lambda: signax.lion(0.1, axis_name=AXIS, transport="packed"),
    "vote, sum": lambda: signax.majority_vote(AXIS, transport="sum"),
    "ssdm": lambda: signax.ssdm(0.1, key=jax.random.key(0), axis_name=AXIS, transport="packed"),
    "ef_sign_sgd": lambda: signax.ef_sign_sgd(0.1, axis_name=AXIS),
    "ef_sign_sgd, momentum": lambda: signax.ef_sign_sgd(
        0.1, momentum=0.9, axis_name=AXIS, feedback="worker"
    ),
    "4 bits": lambda: signax.mean_quantized(AXIS, bits=4, feedback="none"),
    "average": lambda: optax.chain(signax.average_updates(AXIS), optax.scale(-0.1)),
    "average, ef": lambda: optax.chain(
        signax.average_updates(AXIS), signax.error_feedback(signax.scale_by_scaled_sign())
    ),
}
EXPECTED = {  # the collectives of the exchange, and the parts that the program lacks
    "signum": (UP_AND_DOWN, set()),
    "signum, gather": (["all-gather"], set()),
    "signum, agreement": (UP_AND_DOWN, set()),
    "lion": (UP_AND_DOWN, set()),
    "vote, sum": (["all-reduce"], {"signax.count", "signax.momentum"}),
    "ssdm": (UP_AND_DOWN, set()),
    "ef_sign_sgd": (UP_AND_DOWN, set()),
    "ef_sign_sgd, momentum": (UP_AND_DOWN, set()),
    "4 bits": (UP_AND_DOWN, {"signax.momentum"}),
    "average": (["all-reduce"], PARTS - {"signax.exchange"}),
    "average, ef": (["all-reduce"], PARTS - {"signax.exchange", "signax.momentum"}),
}


def update_program(tx, mesh, **options):
    """The HLO of a compiled update, which holds no collective besides those of the exchange."""
    tx = signax.DataParallel(tx, mesh, AXIS, **options)
    rows = jax.tree.map(lambda leaf: jnp.ones((tx.num_workers, *leaf.shape)), PARAMS)
    return jax.jit(tx.update).lower(rows, tx.init(PARAMS), PARAMS).compile().as_text()


def names_of(program):
    """The name of every operation, one by one where XLA has merged several."""
    names = re.findall(r'op_name="([^"]*)"', program)
    return [name for each in names for name in each.split(";")]


def scopes_of(name):
    """The scopes in the name of an operation."""
    return re.findall(r"signax\.\w+", name)


def collectives_of(program):
    """The opcode and the operation's name of every collective."""
    found = r"= .*? (all-[a-z-]+?)(?:-start)?\(.*op_name=\"([^\"]*)\""
    return re.findall(found, program)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_every_part_of_an_exchange_is_named(name):
    program = update_program(TRANSFORMATIONS[name](), auto_mesh({AXIS: 4}))
    opcodes, lacking = EXPECTED[name]
    found = collectives_of(program)
    assert sorted({opcode for opcode, _ in found}) == opcodes
    assert all("/signax.exchange/" in operation for _, operation in found)
    scopes = [scopes_of(operation) for operation in names_of(program)]
    assert {scope for each in scopes for scope in each} == PARTS - lacking
    assert max(map(len, scopes)) == 1  # no part is within another


@pytest.mark.parametrize(
    ("split_over", "specs"),
    [("model", None), (None, {"large": (None, "model"), "small": (), "scalar": ()})],
    ids=["split", "sharded"],
)
def test_the_devices_of_a_worker_name_the_parts(split_over, specs):
    tx = signax.signum(0.1, axis_name=AXIS, transport="packed", split_over=split_over)
    specs = specs and {name: PartitionSpec(*spec) for name, spec in specs.items()}
    program = update_program(tx, auto_mesh({AXIS: 4, "model": 2}), param_specs=specs)
    sent = [name for opcode, name in collectives_of(program) if opcode in UP_AND_DOWN]
    assert len(sent) >= 3
    assert all("/signax.exchange/" in name for name in sent)
    assert {scope for name in names_of(program) for scope in scopes_of(name)} == PARTS


def test_a_scattered_vote_names_its_parts():
    mapped = jax.shard_map(
        lambda rows: signax.pvote_scatter(rows[0], AXIS, step=0)[None],
        mesh=auto_mesh({AXIS: 4}),
        in_specs=PartitionSpec(AXIS),
        out_specs=PartitionSpec(AXIS),
    )
    program = jax.jit(mapped).lower(jnp.ones((4, 8, 32))).compile().as_text()
    assert [opcode for opcode, _ in collectives_of(program)] == ["all-to-all"]
    scopes = {scope for name in names_of(program) for scope in scopes_of(name)}
    assert scopes == PARTS - {"signax.momentum"}


def test_a_step_does_not_name_the_loss_and_the_gradient():
    tx = signax.DataParallel(signax.signum(0.1, axis_name=AXIS), auto_mesh({AXIS: 4}), AXIS)
    params = jnp.zeros((16, 4))
    step = tx.train_step(lambda params, batch: jnp.mean(jnp.tanh(batch @ params)))
    program = step.lower(params, tx.init(params), jnp.ones((8, 16))).compile().as_text()
    [loss] = [name for opcode, name in collectives_of(program) if opcode == "all-reduce"]
    named = [name for name in names_of(program) if "signax." in name]
    assert loss not in named
    assert not [name for name in named if "tanh" in name or "dot_general" in name]
    assert [name for name in names_of(program) if "tanh" in name]


# The profile of benchmarks/trace.py.


@pytest.fixture
def trace(monkeypatch):
    """The module, which the standard library's module of its name hides from an import."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_trace", BENCHMARKS / "trace.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def event(name, start, duration, device=None):
    operation = {} if device is None else {"hlo_op": name, "device_ordinal": str(device)}
    return {"ph": "X", "name": name, "ts": start, "dur": duration, "args": operation}


def test_events_of_a_cpu_are_named_by_the_program(trace):
    program = """
  %pack.1 = u32[8]{0} fusion(%x), metadata={op_name="jit(step)/signax.pack/jit(_pad)/pad"}
  ROOT %all-to-all.3 = u32[8]{0} all-to-all(%y), metadata={op_name="jit(f)/signax.exchange/a"}
  sum = f32[] add(a, b), metadata={op_name="jit(step)/reduce_sum"}
  %copy.4 = f32[] copy(%z)
"""
    parts = {"pack.1": "signax.pack", "all-to-all.3": "signax.exchange"}
    assert trace.parts_of(program) == parts
    events = [
        {"ph": "M", "name": "process_name"},
        event(trace.STEP, 200.0, 50.0),
        event(trace.STEP, 100.0, 60.0),
        event("pack.1", 110.0, 10.0, device=1),
        event("copy.4", 120.0, 5.0, device=0),
        event("all-to-all.3", 205.0, 40.0, device=0),
        event("pack.1", 170.0, 10.0, device=0),  # between two steps
        event("end: pack.1", 120.0, 0.1),
    ]
    assert trace.read_steps(events, parts) == [
        [(1, "pack.1", "signax.pack", 10.0, 20.0), (0, "copy.4", trace.REST, 20.0, 25.0)],
        [(0, "all-to-all.3", "signax.exchange", 5.0, 45.0)],
    ]


def test_time_that_two_operations_share_counts_once(trace):
    spans = [
        trace.Span(0, "a", "signax.pack", 0.0, 2000.0),
        trace.Span(0, "b", "signax.pack", 1000.0, 3000.0),
        trace.Span(0, "c", "signax.pack", 5000.0, 6000.0),
        trace.Span(0, "d", "signax.count", 0.0, 9000.0),
        trace.Span(1, "a", "signax.pack", 0.0, 1000.0),
    ]
    assert trace.busy_milliseconds(spans, "signax.pack") == (4 + 1) / 2
    assert trace.busy_milliseconds(spans, "signax.unpack") == 0
    assert trace.length(spans) == 9000


def test_a_profile_of_voted_steps_shows_every_part(tmp_path):
    options = ("--workers", 3, "--width", 640, "--steps", 2)
    files = ("--folder", tmp_path, "--figure", tmp_path / "step.png")
    finished = run_program(BENCHMARKS / "trace.py", *options, *files)
    assert finished.returncode == 0, finished.stderr
    header, *rows = finished.stdout.splitlines()
    assert header.split()[-3:] == ["median", "min", "max"]
    assert {row.split()[0] for row in rows if row.startswith("signax.")} == PARTS
    slowest = {row.split()[0]: float(row.split()[-1]) for row in rows}
    assert slowest["signax.pack"] > 0
    assert slowest["signax.exchange"] > 0
    [file] = tmp_path.rglob("perfetto_trace.json.gz")
    with gzip.open(file) as opened:
        events = json.load(opened)["traceEvents"]
    sent = [event for event in events if event.get("name", "").startswith("all-to-all")]
    assert len(sent) >= 3 * 2  # a worker sends once in a step
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
