"""The pages that an operator sees: a plain status page, Prometheus metrics, and a health check.

They are read only, and served without TLS by the standard library.
"""

import html
import http.server
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from signax.elastic.credentials import split_address
from signax.elastic.status import log_event, to_text

Status = dict[str, Any]

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="refresh" content="2">
<title>Vote server</title>
<style>
body {{ font-family: sans-serif; margin: 2em; max-width: 60em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #ccc }}
.absent {{ color: #a00 }}
</style>
<h1>Step {step}</h1>
<p>{headline}</p>
{tables}
"""


class _Server(http.server.ThreadingHTTPServer):
    """Listens on IPv6 where the host is an address of IPv6, and logs errors as events."""

    def __init__(self, host: str, port: int, handler: Any):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request
        error = repr(sys.exc_info()[1])  # such as a browser that has gone
        log_event("page", logging.WARNING, peer=str(client_address), error=error)


class Pages:
    """Serves the pages on an address until it is stopped.

    Args:
      address: HOST:PORT; port 0 takes a free one.
      status: returns the status of the server.
      is_healthy: whether the server serves.

    Raises:
      OSError: the address cannot be listened on.
    """

    def __init__(self, address: str, status: Callable[[], Status], is_healthy: Callable[[], bool]):
        def answer(path: str) -> tuple[int, str, str]:
            if path == "/":
                return 200, "text/html; charset=utf-8", page(status())
            if path == "/metrics":
                return 200, "text/plain; version=0.0.4; charset=utf-8", metrics(status())
            if path == "/status.json":
                return 200, "application/json", to_text(status())
            if path == "/healthz":
                healthy = is_healthy()
                return (200, "text/plain", "ok\n") if healthy else (503, "text/plain", "stopping\n")
            return 404, "text/plain", "there are /, /metrics, /status.json and /healthz\n"

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10  # seconds, for a client that says nothing

            def do_GET(self) -> None:
                code, kind, text = answer(self.path.partition("?")[0])
                body = text.encode()
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args  # the server has its own log

        host, port = split_address(address)
        try:
            self._server = _Server(host, port, Handler)
        except OSError as error:
            raise OSError(
                f"the status page cannot listen on {address}: {error}. Give --status another "
                "address"
            ) from error
        self.address = f"{address.rpartition(':')[0]}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="pages", daemon=True).start()

    def stop(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


def page(status: Status) -> str:
    """The status page, as HTML."""
    tables = [_slots_table(status), _rounds_table(status), _refusals_table(status)]
    headline = html.escape(describe(status))
    return _PAGE.format(step=status["step"], headline=headline, tables="\n".join(tables))


def describe(status: Status) -> str:
    """What the server does now, in a sentence or two."""
    present, workers = len(status["present"]), status["num_workers"]
    text = f"{present} of {workers} slots have voted."
    waiting = ", ".join(map(str, status["waiting_for"]))
    if status["plan"] is None:
        return "No job has joined yet."
    if status["quorum_lacks"]:
        text += f" The quorum of {status['quorum']} lacks {status['quorum_lacks']}."
    if waiting:
        text += f" The round waits for {waiting}."
    for number, shard in enumerate(status.get("shards", ()), 1):
        if shard["problem"]:
            text += f" Shard {number}, {shard['address']}: {shard['problem']}."
    return text


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    lines += ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _slots_table(status: Status) -> str:
    waiting, present = set(status["waiting_for"]), set(status["present"])

    def state(slot: int) -> str:
        return "voted" if slot in present else "waited for" if slot in waiting else "absent"

    header = [
        "slot",
        "now",
        "votes",
        "abstained",
        "missed",
        "late",
        "joined",
        "equal bits",
        "last seen",
    ]
    rows = [
        [
            one["slot"],
            state(one["slot"]),
            one["voted"],
            one["abstained"],
            one["missed"],
            one["late"],
            one["joined"],
            "" if one["equal_bits"] is None else f"{one['equal_bits']:.1%}",
            _ago(one["seconds_since_seen"]),
        ]
        for one in status["slots"]
    ]
    return _table(header, rows)


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f} s ago"


def _rounds_table(status: Status) -> str:
    first, last = status["first"], status["sequence"] - 1
    rows = [
        ["rounds since the start", status["rounds"]],
        ["decisions in the log", f"{first} to {last}" if first <= last else "none"],
        ["snapshot after step", "none" if status["snapshot"] is None else status["snapshot"]],
        ["payload received", f"{status['bytes_in'] / 1e6:.1f} MB"],
        ["payload sent", f"{status['bytes_out'] / 1e6:.1f} MB"],
    ]
    rows += [
        [f"{name} (median)", "" if seconds is None else f"{1e3 * seconds:.1f} ms"]
        for name, seconds in status["median_seconds"].items()
    ]
    return _table(["", ""], rows)


def _refusals_table(status: Status) -> str:
    return _table(["refused", "times"], [item for item in status["refusals"].items() if item[1]])


_SLOT_COUNTERS = {
    "voted": "votes that counted the slot's ballot",
    "abstained": "votes in which the slot was present and did not take part",
    "missed": "votes without the slot",
    "late": "ballots that came too late",
    "joined": "sessions of the slot",
}


def metrics(status: Status) -> str:
    """The status in Prometheus' text format."""
    lines: list[str] = []

    def add(name: str, kind: str, about: str, values: Iterable[tuple[str, Any]]) -> None:
        lines.append(f"# HELP signax_elastic_{name} {about}")
        lines.append(f"# TYPE signax_elastic_{name} {kind}")
        lines.extend(
            f"signax_elastic_{name}{labels} {value}"
            for labels, value in values
            if value is not None
        )

    def by_slot(field: str) -> list[tuple[str, Any]]:
        return [(f'{{slot="{one["slot"]}"}}', one[field]) for one in status["slots"]]

    add("step", "gauge", "the step in hand", [("", status["step"])])
    add("sequence", "gauge", "the vote in hand", [("", status["sequence"])])
    add("quorum_lacks", "gauge", "missing ballots", [("", status["quorum_lacks"])])
    add("waiting_for", "gauge", "slots that are waited for", [("", len(status["waiting_for"]))])
    add("rounds_total", "counter", "decided votes", [("", status["rounds"])])
    add("received_bytes_total", "counter", "payload of ballots", [("", status["bytes_in"])])
    add("sent_bytes_total", "counter", "payload of decisions", [("", status["bytes_out"])])
    for field, about in _SLOT_COUNTERS.items():
        add(f"{field}_total", "counter", about, by_slot(field))
    add("equal_bits", "gauge", "mean share of bits equal to the decision", by_slot("equal_bits"))
    seconds = [(f'{{part="{n}"}}', value) for n, value in status["median_seconds"].items()]
    add("round_seconds", "gauge", "median time of the last rounds", seconds)
    refusals = [(f'{{reason="{n}"}}', value) for n, value in status["refusals"].items()]
    add("refusals_total", "counter", "refused requests", refusals)
    if "shards" in status:
        shards = enumerate(status["shards"], 1)
        values = [(f'{{shard="{n}"}}', int(one["problem"] is None)) for n, one in shards]
        add("shard_up", "gauge", "whether the shard has answered the last call", values)
    return "\n".join(lines) + "\n"
