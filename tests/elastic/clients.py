"""A client of the vote server, as small as the protocol allows, and a server to go with it."""

import contextlib
import itertools
import json
import subprocess
import sys
import time
from typing import NamedTuple

import grpc
import numpy as np
import pytest

from signax._wire.words import sealed_words
from signax.elastic.credentials import Credentials
from signax.elastic.decider import Decider
from signax.elastic.log import Log
from signax.elastic.plan import Exchange, Plan
from signax.elastic.protocol import (
    MAX_MESSAGE_BYTES,
    SERVICE,
    Ask,
    Ballot,
    Decision,
    Done,
    Fetch,
    Follow,
    Join,
    Joined,
    Leave,
    Snapshot,
    Status,
    digest_of,
    from_bytes,
    read_payload,
    to_bytes,
    to_pieces,
)
from signax.elastic.refusals import REASON_KEY
from signax.elastic.rounds import Options
from signax.elastic.server import VoteServer
from signax.elastic.snapshots import Snapshots

OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
_NUMBERS = itertools.count()
WORDS = 40  # of a ballot


def make_plan(num_workers=3, num_exchanges=1, words=WORDS, digest="a digest"):
    return Plan(digest, num_workers, (Exchange((words,), "plus", "plus"),) * num_exchanges)


def make_bits(slot, seed=0, words=WORDS):
    """A sealed message of random bits."""
    sealed = np.zeros(sealed_words(words), np.uint32)
    sealed[:words] = np.random.default_rng([slot, seed]).integers(0, 2**32, words, np.uint32)
    sealed[words] = 4 * (slot + 1) + 1
    return sealed


def majority(ballots, words=WORDS):
    """The words of the majority of sealed messages; ties are +1."""
    bits = np.stack([np.unpackbits(ballot[:words].view(np.uint8)) for ballot in ballots])
    return np.packbits(2 * bits.sum(axis=0, dtype=int) >= len(ballots)).view(np.uint32)


class Answer(NamedTuple):
    decision: Decision
    words: np.ndarray


class Client:
    def __init__(self, address, slot, *, plan=None, token=None, credentials=None):
        self.slot, self.plan, self.session = slot, plan or make_plan(), 0
        self.metadata = [("authorization", f"Bearer {token}")] if token else []
        self.channel = (
            grpc.secure_channel(address, credentials, OPTIONS)
            if credentials
            else grpc.insecure_channel(address, OPTIONS)
        )

    def call(self, name, requests, timeout=20):
        """The bytes that a call returns."""
        call = self.channel.stream_stream(f"/{SERVICE}/{name}")
        return call(iter(requests), metadata=self.metadata, timeout=timeout, wait_for_ready=True)

    def ask(self, name, message, kind):
        answer, _ = from_bytes(*self.call(name, [to_bytes(message)]), kind)
        return answer

    def read(self, pieces, kind):
        """A message with its whole payload."""
        message, first = from_bytes(next(pieces), kind)
        return message, read_payload(message, first, pieces).tobytes()

    def join(self):
        joined = self.ask("Join", Join(self.slot, self.plan), Joined)
        self.session = joined.session
        return joined

    def ballot(self, sequence, bits, session=None):
        payload = b"" if bits is None else bits.tobytes()
        session = self.session if session is None else session
        digest = digest_of(payload)
        return Ballot(self.slot, session, sequence, bits is not None, len(payload), digest), payload

    def send(self, sequence, bits, timeout=20):
        """Send a ballot; the call is in flight."""
        return self.call("Vote", to_pieces(*self.ballot(sequence, bits)), timeout)

    def receive(self, pieces):
        decision, words = self.read(pieces, Decision)
        return Answer(decision, np.frombuffer(words, np.uint32))

    def vote(self, sequence, bits, timeout=20):
        return self.receive(self.send(sequence, bits, timeout))

    def leave(self):
        return self.ask("Leave", Leave(self.slot, self.session), Done)

    def follow(self, sequence):
        pieces = self.call("Decisions", [to_bytes(Follow(self.slot, self.session, sequence))])
        answers = []
        with contextlib.suppress(StopIteration):
            while True:
                answers.append(self.receive(pieces))
        return answers

    def put_snapshot(self, step, payload):
        snapshot = Snapshot(self.slot, self.session, step, len(payload), digest_of(payload))
        answer, _ = from_bytes(*self.call("PutSnapshot", to_pieces(snapshot, payload)), Done)
        return answer

    def get_snapshot(self, step=0):
        pieces = self.call("GetSnapshot", [to_bytes(Fetch(self.slot, self.session, step))])
        return self.read(pieces, Snapshot)

    def status(self):
        return self.read(self.call("Status", [to_bytes(Ask())]), Status)[1]


def reason_of(error):
    """The reason of a refusal."""
    return dict(error.trailing_metadata()).get(REASON_KEY)


STATUSES = {
    "conflict": grpc.StatusCode.ALREADY_EXISTS,
    "future": grpc.StatusCode.FAILED_PRECONDITION,
    "malformed": grpc.StatusCode.INVALID_ARGUMENT,
    "no-session": grpc.StatusCode.FAILED_PRECONDITION,
    "no-snapshot": grpc.StatusCode.NOT_FOUND,
    "old-session": grpc.StatusCode.FAILED_PRECONDITION,
    "stopping": grpc.StatusCode.UNAVAILABLE,
    "too-old": grpc.StatusCode.OUT_OF_RANGE,
    "repeated": grpc.StatusCode.ABORTED,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "unready": grpc.StatusCode.UNAVAILABLE,
    "wrong-plan": grpc.StatusCode.FAILED_PRECONDITION,
    "wrong-slot": grpc.StatusCode.PERMISSION_DENIED,
}


def refused(reason, call, *args, match=None):
    """Check that a call is refused for a reason."""
    with pytest.raises(grpc.RpcError, match=match) as raised:
        list(call(*args))
    assert (raised.value.code(), reason_of(raised.value)) == (STATUSES[reason], reason)
    return raised.value


class Host:
    """A server on a log, which can be killed and restarted, and its clients."""

    def __init__(self, folder, *, plan=None, quorum=2, deadline=0.3, keep=None, tokens=None):
        self.folder, self.plan, self.keep = folder, plan or make_plan(), keep
        self.options = Options(self.plan.num_workers, quorum, deadline)
        self.credentials, self.tls = Credentials(tokens), None
        self.address = "127.0.0.1:0"
        self.server = None

    def start(self):
        self.log = Log(self.folder / "votes.db", keep=self.keep)
        self.decider = Decider(self.log, Snapshots(self.folder / "snapshot"), self.options)
        self.server = VoteServer(self.decider, self.address, self.credentials, self.tls)
        self.address = self.server.address
        self.server.start()
        return self

    def stop(self):
        self.server.stop()
        self.log.close()

    def client(self, slot, **kwargs):
        return Client(self.address, slot, **{"plan": self.plan, **kwargs})

    def clients(self):
        clients = [self.client(slot) for slot in range(self.plan.num_workers)]
        for client in clients:
            client.join()
        return clients


class Command:
    """A server that runs as a process, and the events that it writes to stderr."""

    def __init__(self, log, *arguments, listen="127.0.0.1:0", name="serve"):
        command = [name, "--listen", listen, "--log", str(log), "--workers", "2", *arguments]
        self.path = log.with_name(f"events of {next(_NUMBERS)}")
        with self.path.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "signax.elastic", *command], stderr=file
            )

    def start(self):
        self.serving = self.wait_for("serving")
        self.address = self.serving["address"]
        return self

    @property
    def events(self):
        """All events so far. gRPC may write lines of its own."""
        lines = self.path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def wait_for(self, name, seconds=30):
        """The first event of a name."""
        for _ in range(int(seconds / 0.02)):
            found = [event for event in self.events if event["event"] == name]
            if found:
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"no {name!r} in {self.path.read_text()}")

    def end(self, number):
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)
