"""A main server and a shard as processes, which are killed while jobs vote."""

import signal
import threading

import grpc
import numpy as np
import pytest
from clients import Command
from sharded_run import make_ballot, make_plan, vote_all, wait_for

from signax.elastic.__main__ import main
from signax.elastic.connection import VoteServerError
from signax.elastic.credentials import MAIN, make_token
from signax.elastic.log import Log
from signax.elastic.sharded import ShardedConnection

PLAN = make_plan(2)


@pytest.fixture
def command(tmp_path):
    """Start a command on a log in `tmp_path`."""
    commands = []

    def start(name, log, *arguments, **kwargs):
        commands.append(Command(tmp_path / log, *arguments, name=name, **kwargs))
        return commands[-1].start()

    yield start
    for one in commands:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def make_tokens(folder):
    """The tokens of two slots, and options of the servers that know them."""
    tokens, lines = zip(*map(make_token, [0, 1, MAIN]), strict=True)
    (folder / "tokens").write_text("\n".join(lines))
    (folder / "token of main").write_text(f"{tokens[2]}\n{lines[2]}\n")
    options = "--tokens", str(folder / "tokens")
    return tokens, options, (*options, "--shards-token", str(folder / "token of main"))


class Job(threading.Thread):
    """A job that votes until `stop` decisions; their words."""

    def __init__(self, address, slot, token):
        super().__init__(daemon=True)
        self.connection = ShardedConnection(address, slot, token, None, 30.0)
        self.connection.join(PLAN)
        self.slot, self.words, self.stop = slot, [], 1 << 30

    def run(self):
        while (sequence := len(self.words)) < self.stop:
            decision, words = self.connection.vote(sequence, True, make_ballot(self.slot, sequence))
            assert decision.sequence == sequence
            self.words.append(words.tobytes())


def test_servers_are_killed_while_jobs_vote(command, tmp_path, capsys):
    tokens, options, main_options = make_tokens(tmp_path)
    shard = command("shard", "part1.db", *options)
    shards = "--quorum", "2", "--deadline", "30s", "--shards", shard.address
    server = command("serve", "votes.db", *main_options, *shards)
    jobs = [Job(server.address, slot, tokens[slot]) for slot in range(2)]
    for job in jobs:
        job.start()
    for kills in range(1, 3):
        wait_for(lambda kills=kills: len(jobs[0].words) > 10 * kills)
        shard.end(signal.SIGKILL)
        shard = command("shard", "part1.db", *options, listen=shard.address)
        wait_for(lambda kills=kills: len(jobs[0].words) > 10 * kills + 5)
        server.end(signal.SIGKILL)
        server = command("serve", "votes.db", *main_options, *shards, listen=server.address)
    stop = jobs[0].stop = jobs[1].stop = len(jobs[0].words) + 10
    for job in jobs:
        job.join(30)
        job.connection.close()
    first, second = [job.words for job in jobs]
    assert first == second
    assert len(first) == stop
    (tmp_path / "token").write_text(tokens[0])
    assert main(["status", shard.address, "--token-file", str(tmp_path / "token")]) == 0
    assert f'"sequence": {stop}' in capsys.readouterr().out
    assert server.end(signal.SIGTERM) == shard.end(signal.SIGTERM) == 0
    logs = [Log(tmp_path / name) for name in ("votes.db", "part1.db")]
    for sequence in range(stop):
        entries = [log.read(sequence) for log in logs]
        assert len({entry.decision[:4] for entry in entries}) == 1
        assert b"".join([words for _, words in entries]) == first[sequence]
        assert np.frombuffer(first[sequence], np.uint32).size == 37
    for log in logs:
        log.close()


def test_a_shard_refuses_a_main_server_without_its_token(command, tmp_path):
    tokens, options, _ = make_tokens(tmp_path)
    shard = command("shard", "part1.db", *options)
    server = command("serve", "votes.db", *options, "--shards", shard.address)
    connection = ShardedConnection(server.address, 0, tokens[0], None, 1.0)
    connection.join(PLAN)
    assert "UNAUTHENTICATED" in server.wait_for("shard")["problem"]
    with pytest.raises(VoteServerError, match="not heard from the main server"):
        connection.vote(0, True, make_ballot(0))
    connection.close()


def test_a_certificate_is_the_credential_of_the_main_server(command, certificates):
    def options(name):
        files = {"cert": f"{name}.pem", "key": f"{name}.key", "clients": "ca.pem"}
        return [f"--tls-{option}={certificates / path}" for option, path in files.items()]

    def connect(slot):
        names = "ca.pem", f"worker-{slot}.key", f"worker-{slot}.pem"
        files = [(certificates / name).read_bytes() for name in names]
        channel = grpc.ssl_channel_credentials(*files)
        connection = ShardedConnection(server.address, slot, None, channel, 20.0)
        connection.join(PLAN)
        return connection

    shard = command("shard", "part1.db", *options("localhost"), listen="localhost:0")
    shards = "--shards", shard.address, "--shards-ca", str(certificates / "ca.pem")
    server = command("serve", "votes.db", *options("main"), *shards, listen="localhost:0")
    connections = [connect(slot) for slot in range(2)]
    for decision, _ in vote_all(connections, 0, [make_ballot(slot) for slot in range(2)]):
        assert decision.voters == (0, 1)
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["serve", "--shards", "7443"], "'7443' is no HOST:PORT"),
        (["serve", "--shards", "127.0.0.1:1,votes.example:2"], "without TLS requests travel"),
        (["serve", "--shards", "127.0.0.1:1", "--shards-token", "none"], "No such file"),
        (["shard", "--listen", "votes.example:0"], "--insecure"),
    ],
)
def test_rejects_options_with_a_remedy(tmp_path, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments
    given = ["--listen", "127.0.0.1:0", "--workers", "2", "--log", "votes.db"]
    assert main([name, *given, *rest]) == 2
    assert match in capsys.readouterr().err
