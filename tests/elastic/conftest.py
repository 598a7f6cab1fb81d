"""Servers, in threads of the test or as processes."""

import shutil
import signal
import subprocess

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


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Keys and certificates of an authority, two servers and two workers."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which makes the certificates")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"
    openssl(*new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    for name, extra in {
        "localhost": ("-addext", "subjectAltName=DNS:localhost"),
        "worker-0": (),
        "worker-1": (),
        "guest": (),
        "main": ("-addext", "subjectAltName=DNS:localhost"),
    }.items():
        files = "-keyout", f"{name}.key", "-out", f"{name}.pem"
        signed = "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2"
        openssl(*new, *files, *signed, "-subj", f"/CN={name}", *extra)
    return folder
