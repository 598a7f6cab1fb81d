"""Jobs that break off and start again, and a server that is killed: the log stays one history."""

import random
import signal
import threading
import time

import grpc
import numpy as np
from clients import Client, majority, make_bits, make_plan

PLAN = make_plan(2)
SEQUENCES = 15


class Job(threading.Thread):
    """A job that votes until the end, and breaks off every now and then."""

    def __init__(self, address, slot):
        super().__init__(daemon=True)
        self.address, self.slot, self.answers = address, slot, {}
        self.draw = random.Random(slot)
        self.error = None

    def run(self):
        try:
            while len(self.answers) < SEQUENCES:
                self.live()
        except BaseException as error:
            self.error = error
            raise

    def live(self):
        """One life of the job: it ends with an error of a call, or by chance."""
        client = Client(self.address, self.slot, plan=PLAN)
        try:
            client.join()
            for answer in client.follow(len(self.answers)):
                self.apply(answer)
            while len(self.answers) < SEQUENCES:
                sequence = len(self.answers)
                call = client.send(sequence, make_bits(self.slot, sequence), timeout=5)
                if self.draw.random() < 0.1:
                    time.sleep(0.02 * self.draw.random())
                    call.cancel()
                    if self.draw.random() < 0.5:
                        client.leave()
                    return
                self.apply(client.receive(call))
        except (grpc.RpcError, StopIteration):
            time.sleep(0.05)
        finally:
            client.channel.close()

    def apply(self, answer):
        assert answer.decision.sequence == len(self.answers)
        self.answers[answer.decision.sequence] = answer


def test_every_job_applies_the_same_history(serve):
    options = "--quorum", "1", "--deadline", "100ms"
    server = serve(*options)
    jobs = [Job(server.address, slot) for slot in range(2)]
    for job in jobs:
        job.start()
    for kills in range(1, 3):
        while max(len(job.answers) for job in jobs) < 5 * kills:
            time.sleep(0.01)
        server.end(signal.SIGKILL)
        server = serve(*options, listen=server.address)
    for job in jobs:
        job.join(60)
        assert not job.is_alive()
        assert job.error is None
    reader = Client(server.address, 0, plan=PLAN)
    reader.join()
    log = reader.follow(0)
    assert [answer.decision.sequence for answer in log] == [*range(len(log))]
    assert len(log) >= SEQUENCES
    for sequence in range(SEQUENCES):
        decision, words = log[sequence]
        assert 1 <= len(decision.voters) == decision.header >> 1
        bits = [make_bits(slot, sequence) for slot in decision.voters]
        np.testing.assert_array_equal(words, majority(bits))
        for job in jobs:
            assert job.answers[sequence].decision == decision
            np.testing.assert_array_equal(job.answers[sequence].words, words)
