"""Messages as bytes: they come back as they were, and nothing but a message is read."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signax.elastic.fields import ProtocolError, to_json
from signax.elastic.parts import Part
from signax.elastic.plan import MAX_WORKERS, Exchange, Plan
from signax.elastic.protocol import (
    MAX_HEADER_BYTES,
    PIECE_BYTES,
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
from signax.elastic.shard_messages import Count, Counted, Lead

PLAN = Plan("abc", 4, (Exchange((7,), "dither", "plus"), Exchange((2, 2), "abstain", "dither")))
MESSAGES = [
    Join(3, PLAN),
    Joined(1, 4, 0, None, 2, 0.5),
    Joined(1, 4, 2, 2, 2, 1e-3),
    Ballot(0, 1, 2, True, 512, "digest"),
    Ballot(0, 1, 2, True, 512, "digest", "whole"),
    Joined(1, 4, 0, None, 2, 0.5, ("one:1", "two:2")),
    Lead(Part("run", 1, 3), PLAN, None, 4),
    Count("run", 1, 4, (0, 1), (1,), ("whole",)),
    Counted((0, 2)),
    Decision(7, 9, (0, 1, 3), (), False, 28, "digest"),
    Follow(1, 2, 3),
    Leave(1, 2),
    Snapshot(0, 1, 5, 100, "digest"),
    Fetch(0, 1, 0),
    Ask(),
    Status(10, "digest"),
    Done(),
]
KINDS = [*{type(message): None for message in MESSAGES}]
BALLOT = MESSAGES[3]


def pack(header, payload=b""):
    """Bytes with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + payload


def fields(**changes):
    fields = {"type": "Ballot", **to_json(BALLOT), **changes}
    return {name: value for name, value in fields.items() if value is not ...}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back_as_they_were(message):
    payload = b"payload" if "size" in message._fields else b""
    assert from_bytes(to_bytes(message, payload), type(message)) == (message, payload)


def test_fields_of_runs_with_shards_are_left_out_of_others():
    assert to_bytes(Joined(1, 4, 0, None, 2, 0.5))[4:] == (
        b'{"type":"Joined","session":1,"sequence":4,"first":0,"snapshot":null,"quorum":2,'
        b'"deadline":0.5}'
    )
    assert to_bytes(BALLOT)[4:] == (
        b'{"type":"Ballot","slot":0,"session":1,"sequence":2,"participates":true,"size":512,'
        b'"digest":"digest"}'
    )


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 5])
def test_payloads_travel_in_pieces(size):
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    message = BALLOT._replace(size=size, digest=digest_of(payload))
    first, *pieces = to_pieces(message, payload)
    assert len(pieces) == max(0, -(-size // PIECE_BYTES) - 1)
    found, begun = from_bytes(first, Ballot)
    assert read_payload(found, begun, pieces) == payload


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([b"12"], "ends after 7 of size=10"),
        ([b"12", b"", b"345"], "ends after 7"),
        ([b"123456"], "more than size=10"),
        ([b"12345"], "digest="),
    ],
)
def test_rejects_payloads_of_another_size_or_digest(pieces, match):
    message = BALLOT._replace(size=10, digest=digest_of(b"12345 1234"))
    with pytest.raises(ProtocolError, match=match):
        read_payload(message, memoryview(b"12345"), pieces)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "shorter than its length"),
        (b"\x01\x00", "shorter than its length"),
        (struct.pack("<I", 99) + b"{}", "length is 99"),
        (struct.pack("<I", MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 1), "length is"),
        (pack(b"not json"), "no JSON"),
        (pack(b"\xff\xfe"), "no JSON"),
        (pack(b"[" * 100_000), "no JSON"),
        (pack([1, 2]), "no Ballot"),
        (pack({"type": "Join"}), "no Ballot"),
        (pack(fields(slot=...)), "must have the fields"),
        (pack(fields(more=1)), "must have the fields"),
        (pack(b'{"type": "Ballot", "slot": 1, "slot": 2}'), "a field twice"),
        (pack(fields(slot="0")), r"Ballot.slot='0' must be of type int"),
        (pack(fields(slot=True)), r"Ballot.slot=True must be of type int"),
        (pack(fields(slot=1.0)), r"Ballot.slot=1.0 must be of type int"),
        (pack(fields(slot=-1)), r"Ballot.slot=-1 must be from 0"),
        (pack(fields(slot=1 << 63)), "must be from 0"),
        (pack(fields(slot=None)), "must be of type int"),
        (pack(fields(slot=float("nan"))), "NaN, which is not finite"),
        (pack(fields(participates=1)), "participates=1 must be of type bool"),
        (pack(fields(digest="")), "must have 1 to 128 characters"),
        (pack(fields(digest="x" * 129)), "must have 1 to 128 characters"),
        (pack(b'{"slot": ' + b"9" * 5000 + b"}"), "no JSON"),
    ],
)
def test_rejects_what_is_no_message(data, match):
    with pytest.raises(ProtocolError, match=match):
        from_bytes(data, Ballot)


def test_rejects_numbers_that_are_not_finite():
    header = {"type": "Joined", **Joined(1, 4, 0, None, 2, 0.5)._asdict()}
    text = json.dumps(header).replace("0.5", "9e999").encode()
    with pytest.raises(ProtocolError, match="deadline=inf must be finite"):
        from_bytes(pack(text), Joined)


def test_rejects_a_payload_after_a_message_without_one():
    with pytest.raises(ProtocolError, match="a Leave has no payload, but 4 bytes"):
        from_bytes(to_bytes(Leave(1, 2), b"more"), Leave)


def test_the_largest_decision_fits_into_its_header():
    slots = tuple(range(MAX_WORKERS))
    decision = Decision((1 << 63) - 1, 2 * MAX_WORKERS + 1, slots, slots, True, 1 << 40, "d" * 64)
    assert from_bytes(to_bytes(decision), Decision)[0] == decision


@given(st.binary(max_size=300), st.sampled_from(KINDS))
def test_any_bytes_are_a_message_or_an_error(data, kind):
    for read in (data, struct.pack("<I", max(0, len(data) - 4)) + data[4:]):
        try:
            message, _ = from_bytes(read, kind)
        except ProtocolError:
            continue
        assert from_bytes(to_bytes(message), kind)[0] == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.data(), st.sampled_from(MESSAGES))
def test_a_message_with_a_changed_field_is_a_message_or_an_error(data, message):
    changed = {"type": type(message).__name__, **to_json(message)}
    name = data.draw(st.sampled_from([*changed]))
    changed[name] = data.draw(JSON)
    try:
        found, _ = from_bytes(pack(changed), type(message))
    except ProtocolError:
        return
    del changed["type"]  # fields with defaults may be left out
    assert {key: to_json(getattr(found, key)) for key in changed} == changed


@given(st.data(), st.sampled_from(MESSAGES))
def test_a_message_with_a_changed_byte_is_a_message_or_an_error(data, message):
    whole = bytearray(to_bytes(message))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        from_bytes(bytes(whole), type(message))
    except ProtocolError:
        return
