"""Which operations of a program wait for which, and where its backward pass may stop."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from signax._overlap.program import Operation, Program

BACKWARD = "transpose("  # in the name scope of every operation of a backward pass


class Graph(NamedTuple):
    """Which operations wait for which.

    Attributes:
      operations: the operations.
      backward: the operations of the backward pass.
      maker: the operation that makes each value.
      place: the place at which the outputs of each operation are ready, see `Program.places`.
      depth: the number of operations on the longest path to each operation.
      ancestors: a set of operations as the bits of an integer, for each operation.
    """

    operations: list[Operation]
    backward: set[int]
    maker: dict[int, int]
    place: list[int]
    depth: list[int]
    ancestors: list[int]

    @classmethod
    def of(cls, program: Program) -> "Graph":
        places = program.places()
        graph = cls(program.operations, set(), {}, [], [], [])
        for n, operation in enumerate(program.operations):
            makers = {graph.maker[value] for value in operation.reads if value in graph.maker}
            graph.depth.append(1 + max([graph.depth[m] for m in makers], default=0))
            bits = 0
            for m in makers:
                bits |= graph.ancestors[m] | 1 << m
            graph.ancestors.append(bits)
            graph.maker.update(dict.fromkeys(operation.outputs, n))
            graph.place.append(max([places[value] for value in operation.outputs], default=n))
            if BACKWARD in operation.scope:
                graph.backward.add(n)
        return graph

    def read(self, wanted: Collection[int]) -> list[int]:
        """The values that some operations read."""
        return [value for n in wanted for value in self.operations[n].reads]

    def made(self, wanted: Collection[int]) -> list[int]:
        """The values that some operations make."""
        return [value for n in wanted for value in self.operations[n].outputs]

    def made_by(self, makers: Collection[int], readers: Collection[int]) -> list[int]:
        """The values that some operations make and others read."""
        return [value for value in self.read(sorted(readers)) if self.maker.get(value) in makers]

    def before(self, wanted: Collection[int]) -> set[int]:
        """The operations for which some others wait."""
        bits = 0
        for n in wanted:
            bits |= self.ancestors[n]
        return {*_positions(bits)}

    def backward_between(self, first: int, last: int) -> set[int]:
        """The operations of the backward pass that are ready after one place, up to another."""
        return {n for n in self.backward if first < self.place[n] <= last}

    def narrowest(self, backward: set[int]) -> int:
        """The place in the middle half of some operations where the fewest values are in use."""
        last_use: dict[int, int] = {}
        for n, operation in enumerate(self.operations):
            last_use.update(dict.fromkeys(operation.reads, n))
        places = sorted({self.place[n] for n in backward})
        quarter = len(places) // 4

        def in_use(place: int) -> int:
            return sum(
                size
                for n in backward
                if self.place[n] <= place
                for value, size in zip(
                    self.operations[n].outputs, self.operations[n].sizes, strict=True
                )
                if last_use.get(value, -1) > place
            )

        return min(places[quarter : max(quarter + 1, len(places) - 1 - quarter)], key=in_use)

    def on_critical_path(self, finished: set[int], following: set[int]) -> list[int]:
        """The value that the following operations read on the longest path through all.

        Between two parts of a backward pass this is the gradient of an activation. An activation
        itself has a shorter path before it, and a flag a shorter path behind it.
        """
        height: dict[int, int] = {}
        best, longest = [], 0
        for n in sorted(following, reverse=True):
            height[n] = 1 + height.get(n, 0)
            for value in self.operations[n].reads:
                maker = self.maker.get(value)
                if maker in following:
                    height[maker] = max(height.get(maker, 0), height[n])
                elif maker in finished and self.depth[maker] + height[n] > longest:
                    best, longest = [value], self.depth[maker] + height[n]
        return best


def _positions(bits: int) -> Iterator[int]:
    """The positions of the bits that are set."""
    for position, bit in enumerate(reversed(bin(bits)[2:])):
        if bit == "1":
            yield position
