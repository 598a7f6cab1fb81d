"""The plan of a run: what the vote server must know of a model to check and count ballots."""

from typing import Any, NamedTuple

from signax._core.checks import check_count
from signax._wire.ballots import Rules
from signax._wire.words import sealed_words

WORD_BYTES = 4
MAX_WORKERS = 1024
MAX_EXCHANGES = 1024
MAX_WORDS = 1 << 26  # of one ballot, 256 MiB: 2^31 coordinates of one bit
MAX_BYTES = 1 << 34  # of the ballots of all workers in one step, 16 GiB


class Exchange(NamedTuple):
    """One vote of an update.

    Attributes:
      widths: the words of each plane of a ballot: one plane, or two where zeros abstain.
      zeros: how zero ballots are voted, see `signax.pvote`.
      ties: how ties are decided.
    """

    widths: tuple[int, ...]
    zeros: str
    ties: str

    @property
    def rules(self) -> Rules:
        """The rules of the vote."""
        zeros: Any = self.zeros
        ties: Any = self.ties
        return Rules(zeros, ties)

    @property
    def ballot_words(self) -> int:
        """The words of a sealed message."""
        return sealed_words(sum(self.widths))

    @property
    def ballot_bytes(self) -> int:
        """The bytes of a sealed message."""
        return self.ballot_words * WORD_BYTES

    @property
    def decision_words(self) -> int:
        """The words of a decision, which has as many planes as a ballot."""
        return sum(self.widths)


class Plan(NamedTuple):
    """The votes of one update of a model.

    Attributes:
      digest: a hash of what the jobs must have in common: shapes and dtypes of the leaves, zeros,
        ties, what follows the vote, and the versions of JAX and of the library.
      num_workers: the number of slots, M.
      exchanges: the K votes of an update, in their order.
    """

    digest: str
    num_workers: int
    exchanges: tuple[Exchange, ...]

    def locate(self, sequence: int) -> tuple[int, int]:
        """The step of a vote, and the index of its exchange."""
        return divmod(sequence, len(self.exchanges))

    def exchange(self, sequence: int) -> Exchange:
        """The exchange of a vote."""
        return self.exchanges[sequence % len(self.exchanges)]

    def check(self) -> None:
        """Raise `ValueError` if a field is out of range, or if ballots need too much memory."""
        check_count("num_workers", self.num_workers)
        if self.num_workers > MAX_WORKERS:
            raise ValueError(f"num_workers={self.num_workers} exceeds the limit, {MAX_WORKERS}")
        if not 0 < len(self.exchanges) <= MAX_EXCHANGES:
            raise ValueError(f"{len(self.exchanges)} exchanges are not 1 to {MAX_EXCHANGES}")
        for n, exchange in enumerate(self.exchanges):
            try:
                _check_exchange(exchange)
            except ValueError as error:
                raise ValueError(f"exchanges[{n}]: {error}") from None
        # The server has a table of ballots for each kind of exchange.
        size = self.num_workers * sum(one.ballot_bytes for one in set(self.exchanges))
        if size > MAX_BYTES:
            raise ValueError(
                f"the ballots of {self.num_workers} workers have {size} bytes, and the limit is "
                f"{MAX_BYTES}"
            )

    def check_workers(self, num_workers: int) -> None:
        """Raise `ValueError` unless the server has as many slots as the plan."""
        if self.num_workers != num_workers:
            raise ValueError(
                f"the plan has {self.num_workers} workers, and the server {num_workers}: start it "
                f"with --workers {self.num_workers}, or on a new log"
            )


def _check_exchange(exchange: Exchange) -> None:
    exchange.rules.check()
    widths, planes = exchange.widths, exchange.rules.planes
    if len(widths) != planes or len(set(widths)) > 1 or widths[0] < 1:
        raise ValueError(
            f"widths={widths} do not fit zeros={exchange.zeros!r}: give {planes} equal numbers of "
            "at least 1"
        )
    if exchange.ballot_words > MAX_WORDS:
        raise ValueError(
            f"a ballot of {exchange.ballot_words} words exceeds the limit, {MAX_WORDS}: vote on "
            "fewer parameters at a time"
        )
