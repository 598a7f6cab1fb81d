"""Votes of jobs through a server: they equal those along an axis, and wrong uses are errors."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jobs import OPTIMIZERS, PARAMS, Job, assert_same, gradient, run_together, servers_in

import signax
import signax.elastic

STEPS = {"signum": 100, "lion": 100, "abstain": 100, "chain": 20}


@pytest.fixture
def serve(tmp_path):
    with servers_in(tmp_path) as start:
        yield start


@pytest.mark.parametrize(("name", "steps"), STEPS.items())
def test_a_vote_through_a_server_equals_one_along_an_axis(serve, name, steps):
    num_workers = 3
    server = serve(num_workers)
    jobs = run_together([Job(server.address, n, name) for n in range(num_workers)], steps)

    tx = OPTIMIZERS[name](axis_name="workers")

    @jax.jit
    def together(params, states, grads):
        def of_worker(state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        rows, states = jax.vmap(of_worker, axis_name="workers")(states, grads)
        return jax.tree.map(lambda row: row[0], rows), states

    params = PARAMS
    states = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(num_workers))
    for step in range(steps):
        rows = [gradient(worker, step) for worker in range(num_workers)]
        rows = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        params, states = together(params, states, rows)
    for n, job in enumerate(jobs):
        assert_same(job.params, params)
        assert_same(job.state, jax.tree.map(lambda rows, n=n: rows[n], states))


def test_jobs_that_orthogonalise_hold_the_same_parameters(serve):
    """A program of all workers has other bits: `vmap` rounds products of matrices its own way."""
    server = serve(3)
    first, *others = run_together([Job(server.address, n, "muon") for n in range(3)], 10)
    for job in others:
        assert_same(job.params, first.params)
    assert not np.array_equal(first.params["w"], PARAMS["w"])


def test_a_job_of_several_devices_votes_once(serve):
    server = serve(1)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    exchange = signax.elastic.connect(server.address, 0)
    tx = signax.lion(2.0**-7, weight_decay=0.0, exchange=exchange)
    params = jax.device_put({"w": jnp.ones((8, 5))}, place(jax.P("data")))
    batch = jax.device_put(jnp.asarray(gradient(0, 0)["w"][:8, :8]), place(jax.P("data")))
    votes, send = [], exchange._connection.vote

    def count(*args):
        votes.append(args[0])
        return send(*args)

    exchange._connection.vote = count

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: jnp.sum((batch @ p["w"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = exchange.catch_up(tx, params, tx.init(params))
    alone = jax.device_get(params)
    reference = signax.lion(2.0**-7, weight_decay=0.0)
    alone_state = reference.init(alone)
    for _ in range(3):
        grads = jax.grad(lambda p: jnp.sum((jax.device_get(batch) @ p["w"]) ** 2))(alone)
        updates, alone_state = reference.update(grads, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
        params, state = step(params, state, batch)
    assert_same(jax.device_get(params), alone)
    assert votes == [0, 1, 2]
    whole = {"w": jnp.ones((8, 5))}
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        jax.eval_shape(update, whole, tx.init(whole), whole)


def test_jobs_wait_for_a_server_that_is_restarted(serve):
    server = serve(2)
    jobs = run_together([Job(server.address, n) for n in range(2)], 5)
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(run_together, jobs, 10)
        server.start()
        later.result(timeout=20)
    assert_same(jobs[0].params, jobs[1].params)


def test_a_server_that_stays_away_is_an_error(serve):
    server = serve(1)
    job = Job(server.address, 0, give_up=0.3).run(1)
    server.stop()
    with pytest.raises(Exception, match="has not answered for give_up="):
        job.run(2)
    server.start()


def test_a_worker_with_a_nan_abstains(serve):
    server = serve(2)
    jobs = [Job(server.address, n) for n in range(2)]
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), PARAMS)
    grads = [bad, gradient(1, 0)]

    def one_step(job):
        job.catch_up()
        return job.step(job.params, job.state, grads[job.slot])

    with ThreadPoolExecutor(2) as pool:
        (params, state), (others, other) = pool.map(one_step, jobs)
    assert_same(params, others)
    assert signax.participation(state).voters == signax.participation(other).voters == 1
    assert [int(signax.participation(s).missed) for s in (state, other)] == [1, 0]


def test_another_model_is_refused(serve):
    server = serve(2)
    Job(server.address, 0).catch_up()
    with pytest.raises(signax.elastic.VoteServerError, match=r"digest .* must equal the run's"):
        Job(server.address, 1, "abstain").catch_up()


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 2.0**-8},
        {"learning_rate": optax.piecewise_constant_schedule(2.0**-7, {1_000: 0.25})},
        {"weight_decay": 0.0},
        {"mask": {"w": True, "b": False}},
    ],
)
def test_other_options_behind_the_vote_are_refused(serve, options):
    """The learning rate, its schedule and the decay must be the same in all jobs."""
    server = serve(2)
    common = {
        "learning_rate": optax.piecewise_constant_schedule(2.0**-7, {1_000: 0.5}),
        "weight_decay": 0.125,
    }

    def join(slot, **options):
        with signax.elastic.connect(server.address, slot) as exchange:
            tx = signax.lion(**common | options, exchange=exchange)
            exchange.catch_up(tx, PARAMS, tx.init(PARAMS))

    join(0)
    join(1)
    join(1, b1=0.5, b2=0.75)  # a momentum before the vote is the worker's own affair
    with pytest.raises(signax.elastic.VoteServerError, match="learning rate"):
        join(1, **options)


def test_an_update_before_catching_up_is_an_error(serve):
    job = Job(serve(1).address, 0)
    with pytest.raises(ValueError, match="before the first update"):
        job.step(job.params, job.state, gradient(0, 0))


def test_an_exchange_carries_one_vote(serve):
    exchange = signax.elastic.connect(serve(1).address, 0)
    vote = signax.majority_vote(exchange=exchange)
    both = optax.partition({"w": vote, "b": vote}, {"w": "w", "b": "b"})
    with pytest.raises(ValueError, match="2 votes in it, and an exchange carries one"):
        exchange.catch_up(both, PARAMS, both.init(PARAMS))
    plain = optax.sgd(0.1)
    with pytest.raises(ValueError, match="0 votes in it"):
        exchange.catch_up(plain, PARAMS, plain.init(PARAMS))
    exchange.catch_up(vote, PARAMS, vote.init(PARAMS))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"bfloat16\[7\].* have the shapes and dtypes"):
        jax.eval_shape(vote.update, half, vote.init(PARAMS))


def test_rejects_parameters_without_coordinates(serve):
    exchange = signax.elastic.connect(serve(1).address, 0)
    tx = signax.sign_sgd(0.1, exchange=exchange)
    with pytest.raises(ValueError, match="nothing to vote on"):
        exchange.catch_up(tx, {}, tx.init({}))


@pytest.mark.parametrize("kind", ["two optimisers", "MultiSteps"])
def test_a_second_vote_in_a_step_is_an_error(serve, kind):
    job = Job(serve(1).address, 0)
    if kind == "MultiSteps":
        job.tx = optax.MultiSteps(signax.sign_sgd(0.1, exchange=job.exchange), 2)
        job.state = job.tx.init(PARAMS)
    job.catch_up()
    fresh = job.state
    _, job.state = job.step(PARAMS, fresh, gradient(0, 0))
    state = job.state if kind == "MultiSteps" else fresh
    with pytest.raises(Exception, match="an exchange belongs to one optimiser"):
        jax.block_until_ready(job.step(PARAMS, state, gradient(0, 1)))


def test_rejects_a_job_of_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="this job has 2 processes"):
        signax.elastic.connect("127.0.0.1:9", 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis_name": "workers"}, ValueError, "both say where the workers are"),
        ({"transport": "gather"}, ValueError, "transport='gather' is for workers along an axis"),
        ({"split_over": "chip"}, ValueError, "split_over='chip' is for workers along an axis"),
        ({"agreement": True}, ValueError, "agreement=True is for workers along an axis"),
        ({"weights": (1.0,)}, ValueError, "is for workers along an axis"),
        ({"exchange": "host:1"}, TypeError, "exchange='host:1' must be what signax.elastic"),
    ],
)
def test_rejects_options_of_an_axis(serve, options, error, message):
    exchange = signax.elastic.connect(serve(1).address, 0)
    with pytest.raises(error, match=message):
        signax.signum(0.1, **{"exchange": exchange, **options})


@pytest.mark.parametrize(
    ("address", "slot", "options", "error", "message"),
    [
        ("nowhere", 0, {}, ValueError, "'nowhere' is no HOST:PORT"),
        ("vote.example:7443", 0, {}, ValueError, "without credentials ballots travel in plain"),
        (None, 2, {}, ValueError, "slot=2 must be from 0 to 1"),
        (None, -1, {}, ValueError, "slot=-1 must be from 0 to 1"),
        (None, True, {}, TypeError, "slot=True must be a whole number"),
        (None, 0, {"give_up": -1.0}, ValueError, "give_up=-1.0"),
        ("127.0.0.1:9", 0, {"give_up": 0.2}, signax.elastic.VoteServerError, "has not answered"),
    ],
)
def test_rejects_bad_connections(serve, address, slot, options, error, message):
    address = address or serve(2).address
    with pytest.raises(error, match=message):
        signax.elastic.connect(address, slot, **options)
