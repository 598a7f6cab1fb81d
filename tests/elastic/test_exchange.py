"""Jobs that vote through a server, as threads of this process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import signax
import signax.elastic
from signax.elastic.credentials import Credentials
from signax.elastic.decider import Decider
from signax.elastic.log import Log
from signax.elastic.rounds import Options
from signax.elastic.server import VoteServer
from signax.elastic.snapshots import Snapshots

# Powers of two, so that no program rounds products: two programs may round them in two ways.
SCHEDULE = optax.piecewise_constant_schedule(2.0**-5, {50: 0.5})
OPTIMIZERS = {
    "signum": lambda **workers: signax.signum(SCHEDULE, weight_decay=0.125, **workers),
    "lion": lambda **workers: signax.lion(2.0**-7, weight_decay=2.0**-6, **workers),
    "abstain": lambda **workers: signax.signum(2.0**-7, zeros="abstain", **workers),
    "muon": lambda **workers: signax.muon(2.0**-7, consistent_rms=0.25, **workers),
    "chain": lambda **workers: optax.chain(
        optax.clip(1.0), signax.majority_vote(**workers), optax.trace(0.5), optax.scale(-(2.0**-7))
    ),
}
PARAMS = {"w": jnp.ones((130, 40)), "b": jnp.zeros(7)}


def gradient(worker, step):
    rng = np.random.default_rng((worker, step))
    drawn = {name: rng.normal(size=leaf.shape) for name, leaf in PARAMS.items()}
    drawn["b"][3:] = 0  # dead coordinates, which are dithered
    return {name: values.astype(np.float32) for name, values in drawn.items()}


class Server:
    """A vote server on a log, which can be stopped and started again."""

    def __init__(self, folder, num_workers, *, quorum=None, deadline=20.0, keep=None):
        self.folder, self.keep, self.address = folder, keep, "127.0.0.1:0"
        self.options = Options(num_workers, quorum or num_workers, deadline)
        self.start()

    def start(self):
        self.log = Log(self.folder / "log", keep=self.keep)
        decider = Decider(self.log, Snapshots(self.folder / "snapshot"), self.options)
        self.server = VoteServer(decider, self.address, Credentials())
        self.address = self.server.address
        self.server.start()

    def stop(self):
        self.server.stop()
        self.log.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(tmp_path, *args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class Job:
    """A worker's job."""

    def __init__(self, address, slot, name="signum", **options):
        self.exchange = signax.elastic.connect(address, slot, **{"give_up": 20, **options})
        self.slot, self.tx = slot, OPTIMIZERS[name](exchange=self.exchange)
        self.params, self.state = PARAMS, self.tx.init(PARAMS)

        @jax.jit
        def step(params, state, grads):
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = step

    def catch_up(self):
        self.params, self.state = self.exchange.catch_up(self.tx, self.params, self.state)

    def run(self, stop):
        """Train until the history has `stop` steps."""
        while True:
            self.catch_up()
            if self.exchange.step >= stop:
                return self
            grads = gradient(self.slot, self.exchange.step)
            self.params, self.state = self.step(self.params, self.state, grads)
            jax.block_until_ready(self.params)


def run_together(jobs, stop):
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [*pool.map(lambda job: job.run(stop), jobs)]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_vote_through_a_server_equals_one_along_an_axis(serve, name):
    num_workers, steps = 3, 100
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


@pytest.mark.parametrize("name", ["signum", "lion", "chain"])
def test_a_job_replays_what_it_has_missed(serve, name):
    server = serve(3, quorum=2, deadline=0.05)
    first, second = run_together([Job(server.address, n, name) for n in range(2)], 20)
    late = Job(server.address, 2, name)
    late.catch_up()
    assert late.exchange.step == 20
    assert_same(late.params, first.params)
    run_together([first, second, late], 30)
    assert_same(late.params, first.params)
    assert_same(second.params, first.params)


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
    run_together(fast, 60)
    stopped.set()
    thread.join()
    slow.catch_up()
    run_together(jobs, 61)
    assert_same(slow.params, fast[0].params)
    assert signax.participation(slow.state).missed > 0


def test_a_job_without_a_history_takes_a_snapshot(serve):
    server = serve(3, quorum=2, deadline=0.2, keep=20)
    members = run_together([Job(server.address, n) for n in range(2)], 50)
    late = Job(server.address, 2)
    late.catch_up()
    assert late.exchange.step == 50
    assert_same(late.params, members[0].params)
    run_together([*members, late], 60)
    assert_same(late.params, members[0].params)


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
        return job.step(job.params, job.state, grads[job.slot])

    with ThreadPoolExecutor(2) as pool:
        (params, state), (others, other) = pool.map(one_step, jobs)
    assert_same(params, others)
    assert signax.participation(state).voters == signax.participation(other).voters == 1
    assert [int(signax.participation(s).missed) for s in (state, other)] == [1, 0]


def test_another_model_is_refused(serve):
    server = serve(2)
    Job(server.address, 0).catch_up()
    with pytest.raises(signax.elastic.VoteServerError, match=r"digest .* must be those of the run"):
        Job(server.address, 1, "abstain").catch_up()


def test_an_exchange_carries_one_vote(serve):
    exchange = signax.elastic.connect(serve(1).address, 0)
    vote = signax.majority_vote(exchange=exchange)
    both = optax.partition({"w": vote, "b": vote}, {"w": "w", "b": "b"})
    with pytest.raises(ValueError, match="carries one vote for each update"):
        jax.eval_shape(both.update, PARAMS, both.init(PARAMS))
    plain = optax.sgd(0.1)
    with pytest.raises(ValueError, match="0 votes in it"):
        exchange.catch_up(plain, PARAMS, plain.init(PARAMS))


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
