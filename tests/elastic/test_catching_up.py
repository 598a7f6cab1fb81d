"""Jobs that have missed decisions catch up with the others."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jobs import PARAMS, Job, assert_same, gradient, run_together, servers_in

import signax
from signax.elastic.tree_bytes import tree_from_bytes, tree_to_bytes


@pytest.fixture
def serve(tmp_path):
    with servers_in(tmp_path) as start:
        yield start


@pytest.mark.parametrize("name", ["signum", "lion", "chain", "adam"])
def test_a_job_replays_what_it_has_missed(serve, name):
    server = serve(3, quorum=2, deadline=0.2)
    first, second = run_together([Job(server.address, n, name) for n in range(2)], 20)
    late = Job(server.address, 2, name)
    late.catch_up()
    assert late.exchange.step == 20
    assert_same(late.params, first.params)
    run_together([first, second, late], 25)
    assert_same(late.params, first.params)
    assert_same(second.params, first.params)
    assert 20 <= signax.participation(late.state).missed < 25  # it has voted since


def test_a_job_that_is_always_late_stays_with_the_others(serve):
    server = serve(3, quorum=2, deadline=0.02)
    jobs = [Job(server.address, n) for n in range(3)]
    slow, fast = jobs[2], jobs[:2]
    stopped = threading.Event()

    def be_slow():
        while not stopped.wait(0.1):
            slow.run(slow.exchange.step + 1)

    thread = threading.Thread(target=be_slow)
    thread.start()
    run_together(fast, 40)
    stopped.set()
    thread.join()
    slow.catch_up()
    run_together(jobs, 41)
    assert_same(slow.params, fast[0].params)
    assert signax.participation(slow.state).missed > 0


def test_catching_up_leaves_the_callers_arrays_alone(serve):
    server = serve(2, quorum=1, deadline=0.1)
    Job(server.address, 0).run(3)
    late = Job(server.address, 1)
    held = late.params, late.state
    late.catch_up()
    assert late.exchange.step == 3
    assert_same(held, (PARAMS, late.tx.init(PARAMS)))


def test_leaves_without_a_vote_stay_as_they_are(serve):
    server = serve(2, quorum=1, deadline=0.1)
    votes = {"w": True, "b": False}

    def make(slot):
        job = Job(server.address, slot)
        job.tx = optax.masked(signax.sign_sgd(2.0**-7, exchange=job.exchange), votes)
        job.state = job.tx.init(PARAMS)
        return job

    first, late = make(0), make(1)
    first.catch_up()
    for step in range(3):
        grads = gradient(0, step) | {"b": jnp.zeros(7)}
        first.params, first.state = first.step(first.params, first.state, grads)
    late.catch_up()
    assert late.exchange.step == 3
    assert_same(late.params, first.params)


def test_a_job_without_a_history_takes_a_snapshot(serve):
    server = serve(3, quorum=2, deadline=0.2, keep=10)
    members = run_together([Job(server.address, n) for n in range(2)], 25)
    late = Job(server.address, 2)
    late.catch_up()
    assert late.exchange.step == 25
    assert_same(late.params, members[0].params)
    run_together([*members, late], 30)
    assert_same(late.params, members[0].params)


def test_a_job_takes_a_snapshot_if_the_log_moves_on_in_the_meantime(serve, monkeypatch):
    server = serve(2, quorum=1, deadline=0.1, keep=4)
    member = Job(server.address, 0).run(12)
    late = Job(server.address, 1)
    join = late.exchange._join
    monkeypatch.setattr(late.exchange, "_join", lambda: join()._replace(first=0))
    late.catch_up()
    assert late.exchange.step == 12
    assert_same(late.params, member.params)


def test_a_snapshot_holds_all_kinds_of_leaves():
    tree = {
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "flags": jnp.array([True, False]),
        "count": jnp.int32(7),
        "key": jax.random.key(3),
        "raw": jax.random.PRNGKey(4),
        "empty": jnp.zeros((0, 2)),
    }
    like = jax.tree.map(lambda leaf: leaf, tree) | {
        "half": np.zeros(3, jnp.bfloat16),
        "key": jax.random.key(0),
    }
    found = tree_from_bytes(tree_to_bytes(tree), like)
    assert jax.random.key_data(found.pop("key")).tolist() == [0, 3]
    assert_same(found, {name: leaf for name, leaf in tree.items() if name != "key"})
    assert [leaf.dtype for leaf in found.values()] == [tree[name].dtype for name in found]
    with pytest.raises(ValueError, match="must have the same optimiser"):
        tree_from_bytes(tree_to_bytes(tree), {"half": like["half"]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_are_voted_and_replayed(serve, dtype):
    server = serve(2, quorum=1, deadline=0.1)
    with jax.enable_x64(dtype == "float64"):
        jobs = [Job(server.address, n) for n in range(2)]
        for job in jobs:
            job.params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
            job.state = job.tx.init(job.params)
        first, late = jobs
        first.catch_up()
        for step in range(3):
            grads = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), gradient(0, step))
            first.params, first.state = first.step(first.params, first.state, grads)
        late.catch_up()
        assert late.params["w"].dtype == dtype
        assert_same(late.params, first.params)


def test_rejects_a_wrapper_that_skips_the_votes_of_a_replay(serve):
    server = serve(1)

    def make():
        job = Job(server.address, 0)
        job.tx = optax.apply_if_finite(job.tx, 5)
        job.state = job.tx.init(PARAMS)
        return job

    make().run(2)
    with pytest.raises(ValueError, match=r"led to step 0.*optax\.apply_if_finite"):
        make().catch_up()


def test_a_compiled_update_replays_and_votes(serve):
    server = serve(2, quorum=1, deadline=0.1)
    first = Job(server.address, 0).run(3)
    late = Job(server.address, 1)
    late.tx = optax.GradientTransformation(late.tx.init, jax.jit(late.tx.update))
    late.catch_up()
    assert_same(late.params, first.params)
    run_together([first, late], 6)
    assert_same(late.params, first.params)
