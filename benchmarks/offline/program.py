"""Control-flow graph of an assembly listing, and the path that nearly every logit takes through it."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    op: str  # mnemonic with its suffixes
    kind: str = ""  # "load", "store" (of global memory), "exp2", or "" for anything else
    width: int = 0  # bytes a load or store moves per thread
    jump: str | None = None  # label it may go to
    falls_through: bool = True
    predicated: bool = False
    issues: bool = True  # False where a separate unit takes it (AMD's scalar instructions)


@dataclass(frozen=True)
class Loop:
    head: int
    back: set[int]  # where it jumps, or falls, back to the head
    body: set[int]


@dataclass
class Program:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def successors(self, i: int) -> Iterable[int]:
        instruction = self.instructions[i]
        if instruction.jump in self.labels:
            yield self.labels[instruction.jump]
        if instruction.falls_through and i + 1 < len(self.instructions):
            yield i + 1

    def shortest(self, start: int, goals: set[int], within: set[int] | None = None, avoid: int | None = None) -> list[int] | None:
        """The shortest way from `start` to one of `goals`, both included, through `within`, not `avoid`."""
        before: dict[int, int | None] = {start: None}
        queue = deque([] if start == avoid else [start])
        while queue:
            i = queue.popleft()
            if i in goals:
                way = [i]
                while (i := before[i]) is not None:
                    way.append(i)
                return way[::-1]
            for j in self.successors(i):
                if j != avoid and (within is None or j in within) and j not in before:
                    before[j] = i
                    queue.append(j)
        return None

    def loops(self) -> list[Loop]:
        """Natural loops, smallest first: an edge back to an instruction that every way to the edge has
        passed. Code moved out of line returns to one that it need not have passed, and a jump to itself is a
        trap: neither is a loop."""
        predecessors: dict[int, set[int]] = {}
        for i in range(len(self.instructions)):
            for j in self.successors(i):
                predecessors.setdefault(j, set()).add(i)
        found = []
        for head in set(self.labels.values()):
            back = {i for i in predecessors.get(head, ()) if i != head and self.shortest(head, {i}) and not self.shortest(0, {i}, avoid=head)}
            body, queue = {head}, list(back)
            while queue:
                if (i := queue.pop()) not in body:
                    body.add(i)
                    queue += predecessors.get(i, ())
            if back:
                found.append(Loop(head, back, body))
        return sorted(found, key=lambda loop: len(loop.body))

    def _blocks(self) -> list[range]:
        """Straight runs of instructions."""
        cuts = {0, len(self.instructions), *self.labels.values()}
        cuts |= {i + 1 for i, instruction in enumerate(self.instructions) if instruction.jump or not instruction.falls_through}
        edges = sorted(cuts)
        return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]

    def count(self, path: Iterable[int], kind: str) -> int:
        return sum(self.instructions[i].kind == kind for i in path)

    def _through_the_work(self, work: str, start: int, goals: set[int], within: set[int] | None = None) -> list[int]:
        """The shortest way past the block with the most instructions of that kind, or the cheapest of its
        copies."""
        blocks = {block[0]: self.count(block, work) for block in self._blocks()}
        reachable = {first: path for first, amount in blocks.items() if amount and (path := self.shortest(start, {first}, within))}
        most = max((blocks[first] for first in reachable), default=0)
        paths = []
        for first, to in reachable.items():
            onward = self.shortest(first, goals, within) if 2 * blocks[first] > most else None
            if onward:
                paths.append(to + onward[1:])
        return min(paths, key=len, default=[])

    def hot_paths(self, work: str, tile: int) -> list[list[int]]:
        """One path per sweep over a row. `tile`: how many instructions of the kind `work` a thread needs for
        one, such as an exponential for each of its logits.

        Once round each innermost loop with at least half of a tile's; in a kernel without such a loop from
        entry to exit. Rare branches (a new maximum, a masked tile) make a way longer: the shortest one has
        none of them."""
        hot: dict[int, list[int]] = {}
        for loop in self.loops():
            if not loop.body & hot.keys():
                path = self._through_the_work(work, loop.head, loop.back, loop.body)
                if 2 * self.count(path, work) >= tile:
                    hot[loop.head] = path
        if hot:
            return [hot[head] for head in sorted(hot)]
        exits = {i for i, instruction in enumerate(self.instructions) if not instruction.falls_through and not instruction.jump}
        return [path for path in [self._through_the_work(work, 0, exits)] if path]
