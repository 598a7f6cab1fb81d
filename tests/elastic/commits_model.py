"""A model of a main server and a shard that decide together, and may die at any moment.

The search is breadth first, as in `rounds_model`. The network is the set of all messages that were
ever sent. It delivers any of them at any time, again and again or never. A main server that is
replaced may live on and does not know it. Who voted is an abstract choice of the main server, made
whenever it closes a round, so that a vote that is counted again may have other voters.
"""

from collections import deque
from typing import NamedTuple

from rounds_model import ViolationError, check, way_to

from signax.elastic.commits import TURNS, Commits, recover
from signax.elastic.refusals import RefusedError


class Config(NamedTuple):
    sequences: int = 2
    starts: int = 2  # of main servers
    turns: int = 2  # of each of them
    shard_failures: int = 1
    choices: str = "ab"  # of voters
    fault: str = ""


class Main(NamedTuple):
    """A main server."""

    start: int
    next: int  # the first undecided vote, as it believes
    turn: int
    voters: str = ""  # of the closed round
    is_counted: bool = False  # whether the shard has answered


class Request(NamedTuple):
    """A request to count."""

    turn: int
    sequence: int
    voters: str


class State(NamedTuple):
    mains: tuple = ()
    starts: int = 0
    main_log: tuple = ()  # the voters of each decision
    requests: frozenset = frozenset()
    answers: frozenset = frozenset()  # turns, and whether the shard lacks parts
    commits: Commits | None = recover(0, 0)  # None while the shard is down
    waiting: frozenset = frozenset()  # requests that the shard has begun
    counting: Request | None = None  # the request that it counts
    shard_log: tuple = ()
    shard_turn: int = 0  # in the shard's log
    shard_failures: int = 0


def successors(config, state):
    """All that can happen next, with a name."""
    if state.starts < config.starts:
        start = state.starts + 1
        main = Main(start, len(state.main_log), start * TURNS)
        yield f"main {start} starts", state._replace(mains=(*state.mains, main), starts=start)
    for n, main in enumerate(state.mains):
        for name, new in lead(config, state, main):
            mains = state.mains[:n], state.mains[n + 1 :]
            mains = (*mains[0], *([new[0]] if new[0] else []), *mains[1])
            yield f"main {main.start} {name}", state._replace(mains=mains, **new[1])
    if state.commits is None:
        known = recover(len(state.shard_log), state.shard_turn)
        if config.fault == "forgets turns":
            known = known._replace(turn=0)
        if config.fault == "believes in its log":
            known = known._replace(decided=known.next)
        yield "shard starts", state._replace(commits=known)
    else:
        yield from serve(config, state)


def lead(config, state, main):
    """What a main server does: itself afterwards, or None if it dies, and what else changes."""
    yield "dies", (None, {})
    if main.next == config.sequences:
        return
    if not main.voters:
        if main.turn % TURNS < config.turns:
            for voters in config.choices:
                yield f"closes with {voters}", send(state, main, voters)
        return
    if not main.is_counted and main.turn % TURNS < config.turns:
        yield "asks again", send(state, main, main.voters)
    if (main.turn, "written") in state.answers and not main.is_counted:
        yield "hears that the shard has written", (main._replace(is_counted=True), {})
    if (main.turn, "lacks parts") in state.answers:
        yield "opens the round again", (main._replace(voters=""), {})
    # The log refuses a server that was replaced.
    is_newest = main.start == state.starts
    if (main.is_counted or config.fault == "does not wait") and is_newest:
        check(main.next == len(state.main_log), "each sequence is decided once, in order")
        new = main._replace(next=main.next + 1, voters="", is_counted=False)
        # Its turns for the next vote begin again, which makes the model smaller.
        yield (
            "decides",
            (new._replace(turn=main.turn), {"main_log": (*state.main_log, main.voters)}),
        )


def send(state, main, voters):
    turn = main.turn + 1
    request = Request(turn, main.next, voters)
    new = main._replace(turn=turn, voters=voters, is_counted=False)
    return new, {"requests": state.requests | {request}}


def serve(config, state):
    """What the shard does."""
    commits = state.commits
    for sequence in range(commits.decided + 1, len(state.main_log) + 1):
        known = attempt(commits.learn, sequence)
        if known is not None:
            yield f"shard hears that {sequence} is next", state._replace(commits=known)
    for request in state.requests:
        if config.fault == "no turns":
            begun = attempt(commits._replace(turn=0).begin, request.turn, request.sequence)
        else:
            begun = attempt(commits.begin, request.turn, request.sequence)
        if begun is None or request in state.waiting:
            continue
        new = state._replace(commits=begun, waiting=state.waiting | {request})
        if config.fault == "answers first":
            new = new._replace(answers=state.answers | {(request.turn, "written")})
        yield f"shard begins {request}", new
    for request in state.waiting:
        yield from await_parts(config, state, request)
    if state.counting:
        turn, sequence, voters = state.counting
        log = (*state.shard_log[:sequence], voters)
        new = state._replace(commits=commits.write(), shard_log=log, shard_turn=turn, counting=None)
        written = state.answers | {(turn, "written")}
        yield f"shard writes {state.counting}", new._replace(answers=written)
    if state.shard_failures < config.shard_failures:
        failures = state.shard_failures + 1
        yield (
            "shard dies",
            state._replace(
                commits=None, waiting=frozenset(), counting=None, shard_failures=failures
            ),
        )


def await_parts(config, state, request):
    """The shard has the parts of a request, or has waited for them in vain."""
    turn, sequence, _ = request
    ended = state._replace(waiting=state.waiting - {request})
    lacks = state.answers | {(turn, "lacks parts")}
    yield f"shard lacks parts of {request}", ended._replace(answers=lacks)
    try:
        if config.fault != "no turns":
            state.commits.check(turn, sequence)
    except RefusedError:
        return
    if state.counting is None:
        yield f"shard counts {request}", ended._replace(counting=request)


def attempt(method, *args):
    try:
        return method(*args)
    except RefusedError:
        return None


def check_state(state):
    decided = len(state.main_log)
    check(len(state.shard_log) >= decided, "the shard's log lacks no decision")
    check(state.shard_log[:decided] == state.main_log, "all servers have the same voters")
    if state.commits is not None:
        check(state.commits.decided <= decided, "the shard tells what is decided")
        check(state.commits.next == len(state.shard_log), "the shard knows its log")


def explore(config, limit=400_000):
    """Explore all states, and return how many there are. From each 20th one, finish the run."""
    first = State()
    numbers, ways = {first: 0}, [(None, "begin")]
    queue = deque([(0, first)])
    while queue:
        number, state = queue.popleft()
        try:
            check_state(state)
            if number % 20 == 0 and not config.fault:
                finish(config, state)
            for name, new in successors(config, state):
                found = numbers.setdefault(new, len(numbers))
                if found == len(ways):
                    assert found < limit, f"more than {limit} states: make the model smaller"
                    ways.append((number, name))
                    queue.append((found, new))
        except ViolationError as violation:
            raise ViolationError(
                f"not so: {violation}\n" + "\n".join(way_to(ways, number))
            ) from None
    return len(numbers)


def finish(config, state):
    """Go on without further failures: the newest main server, or a new one, decides all votes."""
    is_led = any(main.start == state.starts for main in state.mains)
    config = config._replace(starts=state.starts + (not is_led), turns=99)
    for _ in range(12 * config.sequences):
        if state.commits and state.commits.decided == config.sequences:
            return
        steps = dict(successors(config, state))
        main = next((main for main in state.mains if main.start == config.starts), None)
        named = f"main {config.starts}"
        newest = main and Request(main.turn, main.next, main.voters)
        wanted = [
            "shard starts",
            f"{named} starts",
            f"{named} decides",
            f"{named} hears that the shard has written",
            f"shard writes {newest}",
            *[name for name in steps if name.startswith("shard writes")],
            f"shard counts {newest}",
            f"shard begins {newest}",
            f"shard hears that {config.sequences} is next",
            f"{named} asks again",
            f"{named} closes with a",
        ]
        name = next((name for name in wanted if name in steps), None)
        check(name is not None, "there is a way to the end")
        state = steps[name]
    check(False, "there is a short way to the end")
