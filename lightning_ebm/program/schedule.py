"""The order in which code runs its operations, so that little is held at once; results stay the same to the bit."""

import operator
from collections.abc import Collection, Iterable, Sequence
from heapq import heappop, heappush

from torch import Tensor, fx

from lightning_ebm.program.operations import traits

_BYTES = "bytes"
"""What a node's `meta` calls the size of its result."""


def note_size(node: fx.Node, result: Tensor) -> None:
    """Notes how large what a node computes is."""
    node.meta[_BYTES] = result.numel() * result.element_size()


def size_of(node: fx.Node) -> int:
    """Bytes of what a node computes, as far as anybody has noted it."""
    size: int = node.meta.get(_BYTES, 0)
    return size


def _memory(node: fx.Node) -> fx.Node:
    """The node whose result is the memory that this one's lies in."""
    while node.op == "call_function":
        operation = node
        while operation.target is operator.getitem:
            operation = operation.all_input_nodes[0]
        if not traits(operation.target).views:
            break
        node = operation.all_input_nodes[0]
    return node


class Reads:
    """What operations read, whatever the order in which they run.

    Args:
        nodes: all that are to run.
        given: inputs that nobody else holds: they are let go of when they have been read for the last time.
        end: what the code returns is held.

    Attributes:
        memory: the node whose memory each one's result lies in.
        of: the memory that each one reads.
        times: how often each memory is read.
        own: the memory that can be let go of.
    """

    def __init__(self, nodes: Iterable[fx.Node], given: Collection[fx.Node], end: fx.Node) -> None:
        self.given = given
        self.memory = {node: _memory(node) for node in nodes}
        self.of = {node: {_memory(source) for source in node.all_input_nodes} for node in self.memory}
        self.times: dict[fx.Node, int] = {}
        returned = [_memory(source) for source in end.all_input_nodes]
        for memory in (*(m for read in self.of.values() for m in read), *returned):
            self.times[memory] = self.times.get(memory, 0) + 1
        self.own = self.of.keys() | set(given)


class Held:
    """What is held while operations run one after the other.

    Args:
        reads: what they read.
    """

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._left = dict(reads.times)

    def taken(self, node: fx.Node) -> int:
        """What running an operation adds."""
        return size_of(node) if self._reads.memory[node] is node else 0

    def freed(self, node: fx.Node) -> int:
        """What nobody reads any more once it has run."""
        last = (m for m in self._reads.of[node] if self._left[m] == 1 and m in self._reads.own)
        unread = 0 if self._left.get(self._reads.memory[node], 0) else self.taken(node)
        return sum(size_of(m) for m in last) + unread

    def run(self, node: fx.Node) -> list[fx.Node]:
        """Notes that it has run; gives the memory that goes with the one operation that is yet to read it."""
        read = self._reads.of[node]
        for memory in read:
            self._left[memory] -= 1
        return [memory for memory in read if self._left[memory] == 1 and memory in self._reads.own]


def peak(order: Sequence[fx.Node], reads: Reads) -> int:
    """Bytes at the peak of running the operations in this order, beside what others hold."""
    held = Held(reads)
    now = most = sum(size_of(node) for node in reads.given)
    for node in order:
        now += held.taken(node)
        most = max(most, now)
        now -= held.freed(node)
        held.run(node)
    return most


def sparing(nodes: Sequence[fx.Node], given: Collection[fx.Node], end: fx.Node) -> list[fx.Node]:
    """The order, of some that are tried, whose peak is lowest.

    Args:
        nodes: the operations, in an order in which they can run.
        given: inputs that nobody else holds.
        end: the node that returns.
    """
    outputs = list(dict.fromkeys(end.all_input_nodes))
    large = sorted(outputs, key=lambda node: -size_of(node))
    own, reads, groups = set(nodes), Reads(nodes, given, end), _groups(nodes)
    orders = [list(nodes), _greedy(nodes, reads, groups)]
    orders += [_reduced_at_once(_output_by_output(ends, own), groups) for ends in (outputs, large, outputs[::-1])]
    return min(orders, key=lambda order: peak(order, reads))


def _output_by_output(outputs: Sequence[fx.Node], wanted: set[fx.Node]) -> list[fx.Node]:
    """The operations, each right before the first output that needs it."""
    found: dict[fx.Node, None] = {}
    for output in outputs:
        path = [output]
        while path:
            node = path[-1]
            ahead = next((s for s in node.all_input_nodes if s in wanted and s not in found), None)
            if node in found or node not in wanted or ahead is None:
                path.pop()
                if node in wanted:
                    found[node] = None
            else:
                path.append(ahead)
    return list(found)


Groups = dict[fx.Node, list[fx.Node]]


def _groups(nodes: Sequence[fx.Node]) -> Groups:
    """The operations by the last one of their group: what only leads to something small goes together with that.

    A product that is summed at once, for example.
    """
    own, group = set(nodes), dict[fx.Node, fx.Node]()
    for node in reversed(nodes):
        user = next(iter(node.users)) if len(node.users) == 1 else None
        group[node] = group[user] if user in own and _shrinks(user, [node]) else node
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(group[node], []).append(node)
    return members


def _shrinks(node: fx.Node, sources: Iterable[fx.Node]) -> bool:
    """Whether its result is small beside what it is computed from."""
    return 4 * size_of(node) <= max((size_of(s) for s in sources), default=0)


def _reduced_at_once(order: Sequence[fx.Node], groups: Groups) -> list[fx.Node]:
    """The same order, but for groups that end in something small: they run as soon as they can."""
    waiting = {
        last: {s for node in together for s in node.all_input_nodes} - set(together)
        for last, together in groups.items()
        if any(_shrinks(node, node.all_input_nodes) for node in together)
    }
    users: dict[fx.Node, list[fx.Node]] = {}
    own = set(order)
    for last, ahead in waiting.items():
        ahead &= own
        for source in ahead:
            users.setdefault(source, []).append(last)
    found: dict[fx.Node, None] = {}
    queue = [*reversed(order)]
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found[node] = None
        for last in users.get(node, ()):
            waiting[last].discard(node)
            if not waiting[last]:
                queue.extend(reversed(groups[last]))
    return list(found)


def _dependencies(
    members: Groups, group: dict[fx.Node, fx.Node]
) -> tuple[dict[fx.Node, set[fx.Node]], dict[fx.Node, list[fx.Node]]]:
    """Which groups each one waits for, and which wait for it."""
    waiting = {
        last: {group[s] for node in together for s in node.all_input_nodes if s in group} - {last}
        for last, together in members.items()
    }
    following: dict[fx.Node, list[fx.Node]] = {}
    for last, ahead in waiting.items():
        for other in ahead:
            following.setdefault(other, []).append(last)
    return waiting, following


def _greedy(nodes: Sequence[fx.Node], reads: Reads, members: Groups) -> list[fx.Node]:
    """Of the groups that can run, always the one after which least is held; among equals that with fresher inputs."""
    held, position = Held(reads), {node: k for k, node in enumerate(nodes)}
    group = {node: last for last, together in members.items() for node in together}
    waiting, following = _dependencies(members, group)
    done, reading = dict[fx.Node, int](), dict[fx.Node, set[fx.Node]]()
    costs: dict[fx.Node, tuple[int, int, int]] = {}  # of the groups that can run
    queue: list[tuple[int, int, int]] = []  # and those that they had before

    def offer(last: fx.Node) -> None:
        added = sum(held.taken(node) - held.freed(node) for node in members[last])
        fresh = max((done.get(s, 0) for node in members[last] for s in node.all_input_nodes), default=0)
        costs[last] = added, -fresh, position[last]
        heappush(queue, costs[last])

    def ready(last: fx.Node) -> None:
        for node in members[last]:
            for memory in reads.of[node]:
                reading.setdefault(memory, set()).add(last)
        offer(last)

    for last, ahead in waiting.items():
        if not ahead:
            ready(last)
    while queue:
        cost = heappop(queue)
        last = group[nodes[cost[-1]]]
        if costs.get(last) != cost:
            continue
        del costs[last]
        goes: list[fx.Node] = []
        for node in members[last]:
            done[node] = len(done)
            goes += held.run(node)
        # What others cost changes where nobody but they is to read what they read.
        for other in {g for memory in goes for g in reading[memory]}:
            if other in costs:
                offer(other)
        for user in following.get(last, ()):
            waiting[user].discard(last)
            if not waiting[user]:
                ready(user)
    return list(done)
