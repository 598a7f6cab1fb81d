"""Jobs that vote through a server, as threads of the test."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax

import signax
import signax.elastic
from signax.elastic.credentials import Credentials
from signax.elastic.decider import Decider
from signax.elastic.log import Log
from signax.elastic.rounds import Options
from signax.elastic.server import VoteServer
from signax.elastic.snapshots import Snapshots

# Powers of two, so that no program rounds products: two programs may round them in two ways.
SCHEDULE = optax.piecewise_constant_schedule(2.0**-5, {10: 0.5})
OPTIMIZERS = {
    "signum": lambda **workers: signax.signum(SCHEDULE, weight_decay=0.125, **workers),
    "lion": lambda **workers: signax.lion(2.0**-7, weight_decay=2.0**-6, **workers),
    "abstain": lambda **workers: signax.signum(2.0**-7, zeros="abstain", **workers),
    "muon": lambda **workers: signax.muon(
        2.0**-7, consistent_rms=0.25, others_rms=0.125, **workers
    ),
    "chain": lambda **workers: optax.chain(
        optax.clip(1.0), signax.majority_vote(**workers), optax.trace(0.5), optax.scale(-(2.0**-7))
    ),
    "adam": lambda **workers: optax.chain(
        optax.scale_by_adam(), signax.majority_vote(**workers), optax.scale(-(2.0**-7))
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


@contextlib.contextmanager
def servers_in(folder):
    """A function that starts servers, which end with the block."""
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(folder, *args, **kwargs))
        return servers[-1]

    try:
        yield start
    finally:
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
