"""The command as an operator runs it: signals, kills, TLS, tokens, pages and errors."""

import json
import signal
import urllib.error
import urllib.request

import grpc
import pytest
from clients import Client, make_bits, make_plan, reason_of

from signax.elastic.__main__ import main

PLAN = make_plan(2)


def vote_all(clients, sequence):
    calls = [client.send(sequence, make_bits(client.slot, sequence)) for client in clients]
    return [client.receive(call) for client, call in zip(clients, calls, strict=True)]


def join_all(address, **kwargs):
    clients = [Client(address, slot, plan=PLAN, **kwargs) for slot in range(2)]
    for client in clients:
        client.join()
    return clients


def read_page(address, path):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as page:
        return page.read().decode()


def test_a_run_survives_kills_and_ends_with_a_signal(serve):
    server = serve("--status", "127.0.0.1:0")
    clients = join_all(server.address)
    first, _ = vote_all(clients, 0)
    server.end(signal.SIGKILL)
    server = serve("--status", "127.0.0.1:0", listen=server.address)
    clients = join_all(server.address)
    assert clients[0].vote(0, make_bits(0, 9)).decision == first.decision
    vote_all(clients, 1)

    pages = server.serving["status"]
    assert "<h1>Step 2</h1>" in read_page(pages, "/")
    assert json.loads(read_page(pages, "/status.json"))["step"] == 2
    assert read_page(pages, "/healthz") == "ok\n"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        read_page(pages, "/other")
    metrics = read_page(pages, "/metrics")
    assert "signax_elastic_step 2\n" in metrics
    assert 'signax_elastic_voted_total{slot="1"} 1\n' in metrics

    assert server.end(signal.SIGTERM) == 0
    names = [event["event"] for event in server.events]
    assert names[:3] == ["serving", "joined", "joined"]
    assert names[-2:] == ["stopping", "stopped"]
    assert all({"time", "level"} <= set(event) for event in server.events)


def test_the_status_command_prints_the_status(serve, capsys):
    server = serve()
    assert main(["status", server.address]) == 0
    assert json.loads(capsys.readouterr().out)["num_workers"] == 2
    assert server.end(signal.SIGINT) == 0
    assert main(["status", server.address]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_tokens_are_made_read_and_asked_for(serve, tmp_path, capsys):
    tokens, lines = [], ["# one line for each slot"]
    for slot in range(2):
        assert main(["token", str(slot)]) == 0
        token, line = capsys.readouterr().out.splitlines()
        tokens.append(token)
        lines.append(line)
    assert tokens[0] not in lines[1]
    (tmp_path / "tokens").write_text("\n".join(lines))
    server = serve("--tokens", str(tmp_path / "tokens"))
    client = Client(server.address, 1, plan=PLAN, token=tokens[1])
    client.join()
    with pytest.raises(grpc.RpcError) as raised:
        Client(server.address, 1, plan=PLAN, token=tokens[0]).join()
    assert reason_of(raised.value) == "wrong-slot"
    for text in (tokens[0], f"{tokens[0]}\n{lines[1]}\n"):  # as `token 0 > token` writes it
        (tmp_path / "token").write_text(text)
        assert main(["status", server.address, "--token-file", str(tmp_path / "token")]) == 0


def credentials_of(folder, name=None):
    names = ("ca.pem", *((f"{name}.key", f"{name}.pem") if name else ()))
    return grpc.ssl_channel_credentials(*[(folder / name).read_bytes() for name in names])


def tls(folder):
    return "--tls-cert", str(folder / "localhost.pem"), "--tls-key", str(folder / "localhost.key")


def test_a_certificate_is_the_credential_of_a_slot(serve, certificates, capsys):
    authority = str(certificates / "ca.pem")
    server = serve(*tls(certificates), "--tls-clients", authority, listen="localhost:0")
    clients = [
        Client(
            server.address, n, plan=PLAN, credentials=credentials_of(certificates, f"worker-{n}")
        )
        for n in range(2)
    ]
    for client in clients:
        client.join()
    assert vote_all(clients, 0)[0].decision.voters == (0, 1)
    for name, reason in {"worker-1": "wrong-slot", "guest": "unauthenticated"}.items():
        other = Client(server.address, 0, plan=PLAN, credentials=credentials_of(certificates, name))
        with pytest.raises(grpc.RpcError) as raised:
            other.join()
        assert reason_of(raised.value) == reason
    without_certificate = grpc.secure_channel(server.address, credentials_of(certificates))
    for channel in (without_certificate, grpc.insecure_channel(server.address)):
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError):
            check(b"", timeout=5)
    files = [str(certificates / name) for name in ("worker-0.pem", "worker-0.key")]
    arguments = ["--tls-ca", authority, "--tls-cert", files[0], "--tls-key", files[1]]
    assert main(["status", server.address, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--listen", "7443"], "'7443' is no HOST:PORT"),
        (["--listen", "0.0.0.0:0"], "--tls-cert"),
        (["--listen", "votes.example:0"], "--insecure"),
        (["--quorum", "3"], "quorum=3"),
        (["--workers", "0"], "--workers 0 must be from 1 to 1024"),
        (["--workers", "1025"], "--workers 1025"),
        (["--keep", "0"], "keep=0"),
        (["--tls-cert", "server.pem"], "--tls-key"),
        (["--tls-clients", "ca.pem"], "--tls-clients needs"),
        (["--tokens", "tokens"], "No such file"),
        (["--tokens", "empty"], "empty has no line of a token"),
        (["--shards", "127.0.0.1:1", "--shards-token", "empty"], "empty is empty: write the token"),
        (["--tokens", "a", "--tls-clients", "b"], "exclude one another"),
        (["--shards", "127.0.0.1:1", "--shards-ca", "ca.pem"], "--shards-ca needs --tls-cert"),
        (["--log", "no such folder/votes.db"], "no such folder/votes.db"),
    ],
)
def test_rejects_options_with_a_remedy(tmp_path, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    given = ["--listen", "127.0.0.1:0", "--workers", "2", "--log", "votes.db"]
    assert main(["serve", *given, *arguments]) == 2
    assert match in capsys.readouterr().err


def test_a_shard_without_workers_is_an_error(tmp_path, capsys):
    arguments = ["--listen", "127.0.0.1:0", "--workers", "0", "--log", str(tmp_path / "part1.db")]
    assert main(["shard", *arguments]) == 2
    assert "--workers 0" in capsys.readouterr().err


@pytest.mark.parametrize("deadline", ["2", "0s", "-1s", "2 hours", "1.2.3s"])
def test_rejects_what_is_no_time(capsys, deadline):
    arguments = ["--listen", "127.0.0.1:0", "--workers", "2", "--log", "votes.db"]
    with pytest.raises(SystemExit):
        main(["serve", *arguments, f"--deadline={deadline}"])
    assert "is no time" in capsys.readouterr().err


@pytest.mark.parametrize("slot", ["-1", "first", "1.0"])
def test_rejects_tokens_for_what_is_no_slot(capsys, slot):
    with pytest.raises(SystemExit):
        main(["token", slot])
    assert f"{slot!r} is no slot" in capsys.readouterr().err


def test_an_address_in_use_is_an_error(serve, tmp_path, capsys):
    server = serve()
    arguments = ["--listen", server.address, "--workers", "2", "--log", str(tmp_path / "other.db")]
    assert main(["serve", *arguments]) == 2
    assert server.address in capsys.readouterr().err


def test_a_log_that_another_server_has_taken_over_stops_the_server(serve):
    old = serve("--deadline", "100ms", "--quorum", "1")
    client, _ = join_all(old.address)
    client.vote(0, make_bits(0))
    new = serve("--deadline", "100ms", "--quorum", "1")
    with pytest.raises(grpc.RpcError) as raised:
        client.vote(1, make_bits(0))
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "another server" in old.wait_for("failed")["error"]
    assert old.process.wait(20) == 1
    client, _ = join_all(new.address)
    assert client.vote(1, make_bits(0)).decision.sequence == 1
