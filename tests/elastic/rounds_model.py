"""A model of a small vote: a network that may do anything, jobs and a server that may die.

The model is explored breadth first, as TLA+'s TLC does. The network is the set of all requests that
were ever sent. It delivers any of them at any time, again and again or never, so requests are
dropped, repeated, reordered and delayed. Slots are interchangeable: states that differ by the order
of their slots alone are one state.

A violated invariant is reported with the shortest way to it.
"""

from collections import deque
from typing import NamedTuple

from signax.elastic.refusals import RefusedError
from signax.elastic.rounds import Options, Rounds, begin
from signax.elastic.sharded_decider import reopen


class Config(NamedTuple):
    num_workers: int = 3
    quorum: int = 2
    num_exchanges: int = 1
    sequences: int = 2
    worker_failures: int = 1
    server_failures: int = 1
    restarts: bool = True  # whether another job follows on a dead one
    abstains: bool = False  # whether a job may not participate
    conflicts: bool = False  # whether a job may send other bits
    late_joins: bool = False  # whether a job's request to join may come after its death
    losses: int = 0  # how often a shard lacks a part of a closed round
    fault: str = ""


class Job(NamedTuple):
    """A slot, as everybody but the server sees it.

    The network has the requests of a job as soon as the job can send them. A request that is never
    delivered is a request that was never sent, so this leaves nothing out.
    """

    number: int = 1  # jobs that the slot has had
    alive: bool = True
    session: int = 0  # of the living job, 0 before it has joined
    applied: int = 0  # decisions that the job has applied
    sent: frozenset = frozenset()  # requests of all of the slot's jobs
    counted: tuple = ()  # the slot's bits in each decision of the log, or None
    present: tuple = ()  # whether the slot was present in each decision of the log


class State(NamedTuple):
    jobs: tuple
    rounds: Rounds | None  # None while the server is down
    logged: int = 0
    now: int = 0
    starts: int = 0
    worker_failures: int = 0
    server_failures: int = 0
    losses: int = 0


class ViolationError(Exception):
    pass


def check(holds, invariant):
    if not holds:
        raise ViolationError(invariant)


def restart(config, jobs, logged, starts):
    """The server's rounds, from nothing but the log."""
    present, voters = None, range(config.num_workers)
    if logged and config.fault != "forgets voters":
        present = [n for n, job in enumerate(jobs) if job.present[-1]]
        voters = [n for n, job in enumerate(jobs) if job.counted[-1] is not None]
    quorum = config.quorum if config.fault != "no quorum" else 1
    return begin(
        Options(config.num_workers, quorum, deadline=1),
        config.num_exchanges,
        starts=starts,
        sequence=logged,
        present=present,
        voters=voters,
    )


def go_on(config, job, applied, session):
    """A job that has applied so many decisions. Its digests name the job and the vote."""
    sent = {("join",)}
    if session and applied < config.sequences:
        ballot, bits = ("ballot", session, applied), f"{job.number}.{applied}"
        sent.add((*ballot, bits, True))
        if config.abstains:
            sent.add((*ballot, f"{bits}-", False))
        if config.conflicts:
            sent.add((*ballot, f"{bits}+", True))
    return job._replace(applied=applied, session=session, sent=job.sent | sent)


def replace_job(state, n, job, **fields):
    return state._replace(jobs=(*state.jobs[:n], job, *state.jobs[n + 1 :]), **fields)


def successors(config, state):
    """All that can happen next, with a name. A job joins as soon as it can.

    To join changes nothing for others, so it makes no difference when a job joins.
    """
    for name, new in happenings(config, state):
        rounds = new.rounds
        for n, job in enumerate(new.jobs):
            if rounds and job.alive and job.session <= rounds.base:
                rounds, session = rounds.join(n)
                new = replace_job(new, n, go_on(config, job, job.applied, session), rounds=rounds)
        yield name, new


def happenings(config, state):
    for n, job in enumerate(state.jobs):
        if job.alive and state.worker_failures < config.worker_failures:
            yield from end_job(config, state, n)
        if state.rounds is not None:
            for request in job.sent:
                yield from deliver(config, state, n, request)
    if state.rounds is None:
        rounds = restart(config, state.jobs, state.logged, state.starts)
        yield "server starts", state._replace(rounds=rounds, now=0, starts=state.starts + 1)
    else:
        yield from serve(config, state)


def end_job(config, state, n):
    """A job dies or leaves. Another one starts from nothing, or has replayed the whole log."""
    job, failures = state.jobs[n], state.worker_failures + 1
    leave = "leave", job.session
    for name, sent in {"dies": job.sent, "leaves": job.sent | {leave}}.items():
        ended = job._replace(sent=sent, alive=False)
        if not config.restarts:
            yield f"job {n} {name}", replace_job(state, n, ended, worker_failures=failures)
            continue
        for applied in {0, state.logged}:
            new = go_on(config, ended._replace(number=job.number + 1, alive=True), applied, 0)
            way = f"job {n} {name}, and the next one starts with vote {applied}"
            yield way, replace_job(state, n, new, worker_failures=failures)


def deliver(config, state, n, request):
    """The network delivers a request of slot n, and perhaps the answer."""
    kind, *fields = request
    rounds, job, now = state.rounds, state.jobs[n], state.now
    told = None
    try:
        if kind == "join":  # nobody uses the number
            if not config.late_joins or rounds.slots[n].offered - rounds.base >= job.number:
                return
            new, _ = rounds.join(n)
        elif kind == "leave":
            new = rounds.leave(n, *fields)
        else:
            new = receive(config, rounds, n, fields, now)
            session, sequence, *_ = fields
            if sequence < new.sequence:
                check(sequence < state.logged, "a job is told what is logged")
                if job.alive and (job.applied, job.session) == (sequence, session):
                    told = go_on(config, job, sequence + 1, session)
    except RefusedError:
        return
    now = now if new.present else 0
    name = f"server gets {request} of slot {n}"
    if told is not None:
        yield f"{name} and answers", replace_job(state, n, told, rounds=new, now=now)
    if new != rounds or now != state.now:
        yield name, state._replace(rounds=new, now=now)


def receive(config, rounds, n, ballot, now):
    new = rounds.receive(n, *ballot, now)
    received = rounds.slots[n].received
    if config.fault == "no withdrawal" and received:
        new = new._replace_slot(n, new.slots[n]._replace(received=received))
    return new


def serve(config, state):
    """What the server does by itself: it closes a round, logs the decision, opens the next."""
    rounds = state.rounds
    can_pass = rounds.due_at is not None and state.now < rounds.due_at and not rounds.closed
    if can_pass and config.fault != "no deadline":
        yield "the deadline passes", state._replace(now=rounds.due_at)
    if rounds.is_due(state.now):
        closed = rounds.close(state.now)
        check_closed(config, state, closed)
        yield "server closes", state._replace(rounds=closed)
    if rounds.closed and state.logged == rounds.sequence:
        yield "server logs", write(state)
        for n in rounds.voters if state.losses < config.losses else ():
            opened = reopen(rounds, {n})
            now = state.now if opened.present else 0
            losses = state.losses + 1
            yield (
                f"a shard lacks the part of {n}",
                state._replace(rounds=opened, now=now, losses=losses),
            )
    if rounds.closed and (state.logged > rounds.sequence or config.fault == "tells first"):
        yield "server decides", state._replace(rounds=rounds.decide(), now=0)
    if state.server_failures < config.server_failures:
        failures = state.server_failures + 1
        yield "server dies", state._replace(rounds=None, now=0, server_failures=failures)


def write(state):
    rounds = state.rounds
    jobs = []
    for n, (job, slot) in enumerate(zip(state.jobs, rounds.slots, strict=True)):
        bits = slot.received.digest if n in rounds.voters else None
        present = slot.received is not None
        jobs.append(
            job._replace(counted=(*job.counted, bits), present=(*job.present, present)),
        )
    return state._replace(jobs=tuple(jobs), logged=state.logged + 1)


def check_closed(config, state, closed):
    """Invariants of a round whose ballots are fixed."""
    check(closed.sequence == state.logged, "each sequence is decided once, in order")
    check(len(closed.present) >= config.quorum, "a decision has ballots from a quorum")
    for n in closed.present:
        slot = closed.slots[n]
        session, bits = slot.received.session, slot.received.digest
        check(session == slot.oldest, "a ballot came from the newest session of its slot")
        sent = [request for request in state.jobs[n].sent if request[1:4:2] == (session, bits)]
        check(len(sent) == 1, "a ballot was sent by its session")
        check(sent[0][2] == closed.sequence, "a ballot is for its vote")
    for n in closed.voters:
        check(closed.slots[n].received.digest[-1] != "-", "a voter participates")
        if closed.sequence % config.num_exchanges:
            check(state.jobs[n].counted[-1] is not None, "the voters of a step never grow")


def check_state(state):
    rounds = state.rounds
    check(
        rounds is None or rounds.sequence <= state.logged,
        "a round opens once the decision before it is logged",
    )
    for job in state.jobs:
        check(job.applied <= state.logged, "jobs apply what is logged")


def canonical(state, ids):
    """One state for all that differ by the order of the slots alone."""
    rounds = state.rounds
    slots = rounds.slots if rounds else (None,) * len(state.jobs)
    pairs = zip(state.jobs, slots, strict=True)
    key = sorted(ids.setdefault(pair, len(ids)) for pair in pairs)
    rest = rounds and (rounds.sequence, rounds.closed)
    return (*key, rest, *state[2:])


def explore(config, limit=1_000_000):
    """Explore all states; return how many there are, and how many have no way to the end."""
    ids, numbers, ways, backwards = {}, {}, [], []
    first = State((go_on(config, Job(), 0, 0),) * config.num_workers, None)
    queue = deque([(0, first)])
    numbers[canonical(first, ids)] = 0
    ways.append((None, "begin"))
    backwards.append([])
    ends = []
    while queue:
        number, state = queue.popleft()
        if state.logged == config.sequences:
            ends.append(number)
        try:
            check_state(state)
            for name, new in successors(config, state):
                key = canonical(new, ids)
                found = numbers.setdefault(key, len(numbers))
                if found == len(ways):
                    assert found < limit, f"more than {limit} states: make the model smaller"
                    ways.append((number, name))
                    backwards.append([])
                    queue.append((found, new))
                if found != number:
                    backwards[found].append(number)
        except ViolationError as violation:
            raise ViolationError(
                f"not so: {violation}\n" + "\n".join(way_to(ways, number))
            ) from None
    return len(numbers), len(numbers) - len(reached_from(ends, backwards))


def way_to(ways, number):
    names = []
    while number is not None:
        number, name = ways[number]
        names.append(name)
    return reversed(names)


def reached_from(starts, edges):
    found, pending = set(starts), list(starts)
    while pending:
        for number in edges[pending.pop()]:
            if number not in found:
                found.add(number)
                pending.append(number)
    return found
