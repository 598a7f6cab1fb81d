"""Servers, in threads of the test or as processes."""

import signal

import pytest
from clients import Command, Host


@pytest.fixture
def serve(tmp_path):
    """Start a server for two workers on `tmp_path / "votes.db"`, with further arguments."""
    commands = []

    def serve(*arguments, **kwargs):
        commands.append(Command(tmp_path / "votes.db", *arguments, **kwargs))
        return commands[-1].start()

    yield serve
    for command in commands:
        if command.process.poll() is None:
            command.end(signal.SIGKILL)


@pytest.fixture
def start(tmp_path):
    """Start a server, with options of `Host`."""
    hosts = []

    def start(**kwargs):
        hosts.append(Host(tmp_path, **kwargs).start())
        return hosts[-1]

    yield start
    for host in hosts:
        host.stop()
