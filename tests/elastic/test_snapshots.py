"""The snapshot's file: what a start finds in it, and whom the server asks for the next one."""

import types

import pytest

from signax.elastic import snapshots as module
from signax.elastic.protocol import Snapshot, digest_of
from signax.elastic.snapshots import Snapshots

BYTES = b"parameters"
SNAPSHOT = Snapshot(0, 1, 3, len(BYTES), digest_of(BYTES))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "votes[1].db.snapshot"


def names_in(folder):
    return {file.name for file in folder.iterdir()}


def test_a_start_removes_what_a_killed_server_has_left_of_an_upload(path, tmp_path):
    snapshots = Snapshots(path)
    left = set()

    def pieces():
        left.update(names_in(tmp_path))
        yield BYTES

    snapshots.write(SNAPSHOT, b"", pieces())
    assert len(left) == 1
    for name in left:
        (tmp_path / name).write_bytes(BYTES)
    (tmp_path / f"{path.name}.copy").write_bytes(BYTES)
    assert Snapshots(path).newest == SNAPSHOT
    assert names_in(tmp_path) == {path.name, f"{path.name}.copy"}


@pytest.mark.parametrize("found", [b"", b"\xff\xff\xff\xff and more", b"\x02\x00\x00\x00{}"])
def test_rejects_a_file_that_holds_something_else(path, found):
    path.write_bytes(found)
    with pytest.raises(ValueError, match=r"db\.snapshot holds no snapshot.*Move the file away"):
        Snapshots(path)


def test_asks_nobody_else_while_an_upload_goes_on(path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    snapshots = Snapshots(path)
    snapshots.want()
    assert snapshots.asks(0, (0, 1))

    def pieces():
        for n in range(len(BYTES)):
            now[0] += 0.9 * module.PATIENCE
            assert not snapshots.asks(1, (0, 1))
            yield BYTES[n : n + 1]
        now[0] += 1.1 * module.PATIENCE
        assert snapshots.asks(1, (0, 1))

    snapshots.write(SNAPSHOT, b"", pieces())
    assert not snapshots.asks(0, (0, 1))
