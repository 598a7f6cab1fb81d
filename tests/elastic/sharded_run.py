"""A run with shards: servers in threads of the test, which can be killed and restarted."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from signax._wire.words import sealed_words
from signax.elastic.counting import Counter
from signax.elastic.credentials import Credentials
from signax.elastic.log import Log
from signax.elastic.plan import Exchange, Plan
from signax.elastic.rounds import Options
from signax.elastic.server import VoteServer
from signax.elastic.shard import Shard
from signax.elastic.shard_server import ShardServer
from signax.elastic.sharded import ShardedConnection
from signax.elastic.sharded_decider import ShardedDecider
from signax.elastic.shards import Shards
from signax.elastic.snapshots import Snapshots

ABSTAIN = Exchange((37, 37), "abstain", "plus")
PLUS = Exchange((37,), "plus", "plus")


def make_plan(num_workers=3, exchange=PLUS):
    return Plan("a digest", num_workers, (exchange,))


def make_ballot(slot, seed=0, exchange=PLUS):
    """A sealed message of random bits."""
    words = sum(exchange.widths)
    draw = np.random.default_rng([slot, seed])
    sealed = np.zeros(sealed_words(words), np.uint32)
    sealed[:words] = draw.integers(0, 2**32, words, np.uint32)
    if len(exchange.widths) == 2:  # nobody votes for +1 and -1 at once
        half = words // 2
        sealed[half:words] &= ~sealed[:half]
    sealed[words] = 4 * (slot + 1) + 1
    return memoryview(sealed).cast("B")


def count_alone(plan, ballots):
    """The words that one server decides, and the header."""
    counter = Counter(plan)
    voters = [slot for slot, bits in enumerate(ballots) if bits is not None]
    for slot in voters:
        counter.put(0, slot, ballots[slot])
    counted = counter.count(0, voters)
    return counted.words, counted.header


def wait_for(condition, seconds=20):
    """Wait until a condition holds, and return what it returned."""
    for _ in range(int(seconds / 0.01)):
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it has not come about")


class ShardHost:
    """A shard on a log."""

    def __init__(self, path, num_workers, credentials=None):
        self.path, self.num_workers, self.address = path, num_workers, "127.0.0.1:0"
        self.credentials = credentials or Credentials()

    def start(self):
        self.log = Log(self.path)
        self.shard = Shard(self.log, self.num_workers)
        self.server = ShardServer(self.shard, self.address, self.credentials)
        self.address = self.server.address
        self.server.start()
        return self

    def stop(self):
        self.server.stop()
        self.log.close()


class Run:
    """The servers of a run, and connections of its workers."""

    def __init__(self, folder, *, servers=2, plan=None, quorum=None, deadline=20.0, keep=None):
        self.folder, self.plan, self.keep = folder, plan or make_plan(), keep
        num_workers = self.plan.num_workers
        self.options = Options(num_workers, quorum or num_workers, deadline)
        self.address, self.connections = "127.0.0.1:0", []
        self.shards = [ShardHost(folder / f"part{n}.db", num_workers) for n in range(1, servers)]
        for shard in self.shards:
            shard.start()
        self.start()

    def start(self):
        """Start the main server."""
        self.log = Log(self.folder / "votes.db", keep=self.keep)
        addresses = [shard.address for shard in self.shards]
        shards = Shards(addresses, self.log)
        snapshots = Snapshots(self.folder / "snapshot")
        self.decider = ShardedDecider(self.log, snapshots, self.options, shards)
        self.server = VoteServer(self.decider, self.address, Credentials())
        self.address = self.server.address
        self.server.start()

    def stop(self):
        """Stop the main server."""
        self.server.stop()
        self.log.close()

    def connect(self, slot, *, joins=True):
        connection = ShardedConnection(self.address, slot, None, None, 20.0)
        self.connections.append(connection)
        if joins:
            connection.join(self.plan)
        return connection

    def connect_all(self):
        return [self.connect(slot) for slot in range(self.plan.num_workers)]

    def entries(self, sequence):
        """A vote's entries in the logs of all servers."""
        return [log.read(sequence) for log in (self.log, *[shard.log for shard in self.shards])]

    def close(self):
        threads = [threading.Thread(target=one.close) for one in self.connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for server in (self, *self.shards):
            server.stop()


@contextlib.contextmanager
def runs_in(folder):
    """A function that starts runs, which end with the block."""
    runs = []

    def start(**kwargs):
        runs.append(Run(folder, **kwargs))
        return runs[-1]

    try:
        yield start
    finally:
        for run in runs:
            run.close()


def vote(connection, sequence, bits):
    """Vote, or abstain with `None`."""
    return connection.vote(sequence, bits is not None, memoryview(b"") if bits is None else bits)


def vote_all(connections, sequence, ballots):
    with ThreadPoolExecutor(len(connections)) as pool:
        return [*pool.map(vote, connections, [sequence] * len(connections), ballots)]
