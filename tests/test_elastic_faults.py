"""The benchmark of jobs that die and of bad links runs in small, and its numbers add up."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from processes import BENCHMARKS, run_program

PING = """
import socket, sys, time
serves, address, size = sys.argv[1] == "serve", sys.argv[2], 20_000
if serves:
    peer, _ = socket.create_server((address, 5000)).accept()
else:
    time.sleep(0.5)
    peer = socket.create_connection((address, 5000))
for _ in range(10):
    start, got = time.monotonic(), 0
    if not serves:
        peer.sendall(bytes(size))
    while got < size:
        got += len(peer.recv(size))
    if serves:
        peer.sendall(bytes(size))
    else:
        print(time.monotonic() - start)
"""


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks, which are programs outside of any package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def namespaces(load):
    """The module, if namespaces can be made here."""
    module = load("namespaces")
    if reason := module.unavailable():
        pytest.skip(reason)
    return module


def run(tmp_path, part, *options):
    """Run a part, and return its results and its output."""
    report = tmp_path / "out" / "report.json"
    options = ("--workers", 3, "--steps", 20, "--json", report, *options)
    done = run_program(BENCHMARKS / "elastic_faults.py", part, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(report.read_text())
    assert report["benchmark"] == "elastic_faults"
    assert report["settings"][part]["steps"] == 20
    return report["results"][part], done.stdout


def test_kills_are_drawn_by_the_seed_and_leave_the_first_and_last_steps_alone(load):
    kills = load("elastic_faults_kills")
    args = SimpleNamespace(workers=8, kills=30, server_kills=5, seed=0)
    drawn = kills.draw_kills(args, 300)
    assert drawn == kills.draw_kills(args, 300)
    assert drawn != kills.draw_kills(SimpleNamespace(**vars(args) | {"seed": 1}), 300)
    assert [kill.step for kill in drawn] == sorted(kill.step for kill in drawn)
    assert 15 <= drawn[0].step <= drawn[-1].step < 255
    slots = [kill.slot for kill in drawn]
    assert slots.count(None) == 5
    assert {*slots} == {None, *range(8)}


def test_a_kill_waits_for_its_victim_and_for_a_quorum(load):
    kills = load("elastic_faults_kills")

    def make_run(*voted):
        """A run of three workers with a quorum of two; each has voted in some steps, or is dead."""
        found = object.__new__(kills.Run)
        found.args = SimpleNamespace(quorum=2)
        lines = [[{"step": n} for n in steps or ()] for steps in voted]
        found.jobs = [
            [SimpleNamespace(is_alive=steps is not None, lines=own)]
            for steps, own in zip(voted, lines, strict=True)
        ]
        return found

    first, in_step = kills.Kill(5, 0, 1.0), (8, 9, 10)
    assert make_run(in_step, in_step, in_step).may(first, 10)
    assert make_run((8, 9), in_step, (8, 9)).may(first, 10)
    assert not make_run(in_step, in_step, None).may(first, 10)  # one voter would be left
    assert not make_run(in_step, in_step, ()).may(first, 10)  # the last worker is still starting
    assert not make_run(in_step, in_step, (8, 10)).may(first, 10)  # it missed a vote
    assert not make_run(in_step, in_step, (7, 8)).may(first, 10)  # it is late
    assert not make_run((2, 3), in_step, in_step).may(first, 10)
    assert not make_run(None, in_step, in_step).may(first, 10)


def test_waits_within_an_outage_are_told_apart(load):
    kills = load("elastic_faults_kills")

    def job(*steps):
        lines = [{"start": a, "voted": a + 0.5, "end": b} for a, b in steps]
        return SimpleNamespace(lines=lines, started=0.0)

    jobs = [[job((0.0, 1.0), (1.0, 9.0), (9.0, 9.75))], [job((0.0, 0.75)), job((3.0, 8.5))]]
    run = SimpleNamespace(jobs=jobs, outages=[[4.0, 6.0]])
    found = kills.waits_of(run)
    assert found["longest_waits"] == [0.5, 0.25, 0.25]
    assert found["num_waits"] == 3
    assert found["outages"] == [8.5 - 4.0]  # to the first decision
    assert found["server_away"] == [2.0]


def test_a_worker_returns_with_its_first_counted_vote_after_the_cut(load):
    links = load("elastic_faults_links")
    others = [[{"step": n, "end": float(n)} for n in range(10)]]
    voters = [(0, 1)] * 3 + [(0,)] * 4 + [(0, 1)] * 3
    found = links.return_of(1, (2.5, 5.0), voters, others)
    assert found["first_missed"] == 3
    assert found["first_step_back"] == 7
    assert found["seconds_to_return"] == 2.0
    assert found["cut_seconds"] == 2.5


def test_jobs_with_other_parameters_are_an_error(load):
    jobs = load("elastic_faults_jobs")
    same, other, none = ([SimpleNamespace(lines=[{"parameters": p}])] for p in ("a", "b", None))
    assert len(jobs.ends_of(same * 2)) == 2
    for bad in (same + other, same + none, [*same, SimpleNamespace(lines=[])]):
        with pytest.raises(SystemExit, match="different parameters"):
            jobs.ends_of(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", 2), "--workers 2 must be at least 3"),
        (("--steps", 5), "--steps 5 must be at least 20"),
        (("--kills", -1), "must not be negative"),
        (("--deadline", 0), "--deadline above 0"),
    ],
)
def test_rejects_invalid_options(load, capsys, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["elastic_faults.py", "kills", *map(str, options)])
    with pytest.raises(SystemExit) as refusal:
        load("elastic_faults").main()
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


def test_netem_is_asked_for_delays_and_losses(load, monkeypatch):
    module, commands = load("namespaces"), []
    monkeypatch.setattr(module, "run", lambda *words: commands.append(" ".join(words)))
    module.limit("name", "bridge", "port0", "100mbit", 50.0, 0.02)
    assert "dev link0 root handle 1: netem delay 50.0ms loss 2.0% limit" in commands[0]
    assert "parent 1:1 tbf rate 100mbit" in commands[1]
    commands.clear()
    module.limit("name", "bridge", "port0", "100mbit", 0.0, 0.0)
    assert all("netem" not in command for command in commands)


def test_taps_delay_packets_and_a_worker_can_be_cut_off(namespaces):
    with namespaces.namespaces(2, "100mbit", "30ms", taps=True) as links:
        assert links.kind == "taps"
        address = links.addresses[0]
        command = [sys.executable, "-c", PING]
        serve = subprocess.Popen([*links.prefixes[0], *command, "serve", address])
        other = [*links.prefixes[1], *command, "call", address]
        try:
            called = subprocess.run(other, capture_output=True, text=True, timeout=30)
            seconds = sorted(map(float, called.stdout.split()))
            assert len(seconds) == 10, called.stderr
            assert 0.06 <= seconds[0] <= seconds[4] < 0.3
            links.unplug(1)
            ping = [*links.prefixes[1], sys.executable, "-c", "import socket, sys; "]
            ping[-1] += "socket.create_connection((sys.argv[1], 5000), timeout=0.5)"
            cut = subprocess.run([*ping, address], capture_output=True, text=True, timeout=30)
            assert "timed out" in cut.stderr or "No route" in cut.stderr
            links.plug(1)
            back = subprocess.run([*ping, address], capture_output=True, text=True, timeout=30)
            assert "refused" in back.stderr  # nobody listens any more, and says so
        finally:
            serve.kill()
            serve.wait()


def test_kills_are_survived_and_reported(tmp_path):
    options = ("--models", "digits", "--kills", 1, "--server-kills", 1)
    results, printed = run(tmp_path, "kills", *options)
    assert [*results] == ["digits, undisturbed", "digits, killed"]
    undisturbed, killed = results.values()
    assert (undisturbed["killed"], undisturbed["outages"]) == ([], [])
    assert {kill["slot"] is None for kill in killed["killed"]} == {True, False}
    assert len(killed["outages"]) == 1
    assert killed["outages"][0] > killed["server_away"][0] > 0
    for found in (undisturbed, killed):
        assert found["steps"] == 20
        assert found["kills_left"] == 0
        assert found["jobs_with_these_parameters"] == 4
        assert found["waits"]["max"] == found["longest_waits"][0] < 10
        assert found["quality"]["accuracy"] > 0.3
        assert 2 <= found["mean_voters"] <= 3
    assert undisturbed["num_waits"] == 60
    assert undisturbed["parameters"] != killed["parameters"]
    assert "digits, killed" in printed
    again, _ = run(tmp_path, "kills", *options)  # finished runs are kept
    assert again == results


def test_links_report_the_steps_of_the_other_workers(namespaces, tmp_path):
    results, printed = run(tmp_path, "links", "--cases", "2% of packets lost")
    assert namespaces.has_netem() or "NO NETEM" in printed
    (found,) = results.values()
    assert found["steps"] == 20
    assert (found["missed"], found["missed_by_others"]) == (0, 0)
    times = found["steps_of_others"]
    assert 0.1 < times["min"] <= times["median"] <= times["percentile_95"] <= times["max"]
    assert found["accuracy"] > 0.3
