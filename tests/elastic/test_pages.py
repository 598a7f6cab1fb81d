"""The status page: what it says, and where it is served."""

import contextlib
import socket
import urllib.request

import pytest
from sharded_run import wait_for

from signax.elastic.pages import Pages, page


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:

        def serve(address, status=dict):
            pages = Pages(address, status, lambda: True)
            stack.callback(pages.stop)
            return pages

        yield serve


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        pytest.param("[::1]", marks=pytest.mark.skipif(not has_ipv6(), reason="has no IPv6")),
    ],
)
def test_is_served_on_addresses_of_ipv4_and_ipv6(serve, host):
    pages = serve(f"{host}:0")
    assert pages.address.startswith(f"{host}:")
    with urllib.request.urlopen(f"http://{pages.address}/healthz", timeout=10) as answer:
        assert answer.read() == b"ok\n"


def test_an_address_in_use_is_an_error_that_names_it(serve):
    address = serve("127.0.0.1:0").address
    with pytest.raises(OSError, match=f"cannot listen on {address}: .*--status another"):
        serve(address)


def test_a_browser_that_goes_away_is_an_event(serve, caplog, capfd):
    def status():
        raise ConnectionResetError("gone")

    pages = serve("127.0.0.1:0", status)
    host, port = pages.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as browser:
        browser.sendall(b"GET /status.json HTTP/1.0\r\n\r\n")
        assert browser.recv(1) == b""
    wait_for(lambda: "page" in caplog.messages)
    assert "gone" in caplog.records[-1].fields["error"]
    assert capfd.readouterr().err == ""


def test_an_empty_log_has_no_decisions(start):
    host = start()
    assert "No job has joined yet." in page(host.decider.status())
    assert "<td>decisions in the log</td><td>none</td>" in page(host.decider.status())


def test_texts_of_others_are_escaped(start):
    host = start()
    host.clients()
    problem = {"address": "<b>:1", "problem": "<script>"}
    text = page({**host.decider.status(), "shards": [problem]})
    assert "Shard 1, &lt;b&gt;:1: &lt;script&gt;." in text
    assert "<script>" not in text
