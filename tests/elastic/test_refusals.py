"""Requests that the server refuses, with a status that says why."""

import json

from clients import make_bits, make_plan, refused

from signax.elastic.credentials import hash_token
from signax.elastic.protocol import Snapshot, digest_of, to_bytes, to_pieces


def test_rejects_a_snapshot_with_another_digest(start):
    client, *_ = start().clients()
    snapshot = Snapshot(0, client.session, 0, 5, digest_of(b"other"))
    refused(
        "malformed",
        lambda: client.call("PutSnapshot", to_pieces(snapshot, b"bytes")),
        match="digest",
    )
    refused("no-snapshot", client.get_snapshot)


def test_rejects_a_job_of_another_plan(start):
    host = start()
    host.clients()
    other = host.client(0, plan=make_plan(digest="another digest"))
    error = refused("wrong-plan", lambda: [other.join()])
    assert "another digest" in error.details()
    assert "a digest" in error.details()
    fourth = host.client(0, plan=make_plan(num_workers=4))
    refused("wrong-plan", lambda: [fourth.join()])


def test_rejects_a_plan_out_of_range_as_the_first_one(start):
    host = start()
    for plan in (make_plan(4), make_plan(words=1 << 28), make_plan(num_exchanges=0)):
        client = host.client(0, plan=plan)
        refused("wrong-plan", lambda c=client: [c.join()])
    assert host.client(0).join().sequence == 0


def test_rejects_ballots_of_wrong_size_digest_sender_or_vote(start):
    client, *_ = start().clients()
    ballot, payload = client.ballot(0, make_bits(0))
    whole = to_bytes(ballot, payload)
    other_digest = to_bytes(ballot._replace(digest=digest_of(b"")), payload)
    other_slot = to_bytes(ballot._replace(slot=3), payload)

    def send(*requests):
        return client.call("Vote", requests)

    refused("malformed", client.send, 0, make_bits(0)[:100], match="size=400")
    refused("malformed", client.send, 0, make_bits(1), match="names worker 1")
    refused("malformed", send, other_digest, match="digest")
    refused("malformed", send, whole[:-8], match="ends after 504")
    refused("malformed", send, whole + b"more", match="more than size=512")
    refused("malformed", send, whole[:-8], b"nine bytes", match="more than size=512")
    refused("malformed", send, match="without a Ballot")
    refused("malformed", send, b"nonsense")
    refused("wrong-slot", send, other_slot, match="slot=3")
    refused("future", client.send, 1, make_bits(0), match="sequence=1")
    assert json.loads(client.status())["present"] == []


def test_calls_need_the_token_of_their_slot(start):
    tokens = {slot: hash_token(f"token {slot}") for slot in range(3)}
    host = start(tokens=tokens, quorum=1, deadline=0.1)
    for token in (None, "token 9"):
        client = host.client(0, token=token)
        refused("unauthenticated", lambda c=client: [c.join()])
        refused("unauthenticated", lambda c=client: c.status())
    client = host.client(0, token="token 1")
    refused("wrong-slot", lambda: [client.join()])
    client = host.client(0, token="token 0")
    client.join()
    assert client.vote(0, make_bits(0)).decision.voters == (0,)
