"""The order in which traced code runs, against the rule written out naively."""

import random

import pytest
import torch
from torch import fx

from lightning_ebm.program import schedule

_aten = torch.ops.aten


def drawn(seed: int, count: int = 40) -> tuple[list[fx.Node], list[fx.Node], fx.Node]:
    """Operations on one to three of what came before, of any size, some of them sums or views; inputs; the end."""
    chance, graph = random.Random(seed), fx.Graph()
    inputs = [graph.placeholder(f"x{k}") for k in range(3)]
    for node in inputs:
        node.meta["bytes"] = chance.choice([64, 1024])
    nodes: list[fx.Node] = []
    for _ in range(count):
        sources = chance.sample([*inputs, *nodes][-12:], k=min(chance.randint(1, 3), len(nodes) + 3))
        target = [_aten.neg.default, _aten.add.Tensor, _aten.addmm.default][len(sources) - 1]
        if len(sources) == 1 and chance.random() < 0.3:
            target = _aten.t.default
        node = graph.call_function(target, tuple(sources))
        node.meta["bytes"] = chance.choice([4, 64, 256, 1024])
        nodes.append(node)
    unread = [node for node in nodes if not node.users]
    end = graph.output(tuple({*unread, *chance.sample(nodes, 3)}))
    return nodes, inputs, end


def naive(nodes: list[fx.Node], given: list[fx.Node], end: fx.Node) -> list[fx.Node]:
    """Of all groups that can run, the one after which least is held; then that with fresher inputs; then the first."""
    held, members = schedule.Held(schedule.Reads(nodes, given, end)), schedule._groups(nodes)
    done: dict[fx.Node, int] = {}
    while len(done) < len(nodes):

        def can_run(last: fx.Node) -> bool:
            own = set(members[last])
            return all(s in done or s in own or s not in nodes for node in own for s in node.all_input_nodes)

        def cost(last: fx.Node) -> tuple[int, int, int]:
            added = sum(held.taken(node) - held.freed(node) for node in members[last])
            fresh = max((done.get(s, 0) for node in members[last] for s in node.all_input_nodes), default=0)
            return added, -fresh, nodes.index(last)

        last = min((g for g in members if g not in done and can_run(g)), key=cost)
        for node in members[last]:
            done[node] = len(done)
            held.run(node)
    return list(done)


@pytest.mark.parametrize("taken", [False, True])
def test_the_greedy_order_is_that_of_its_rule(taken):
    for seed in range(60):
        nodes, inputs, end = drawn(seed)
        given = inputs if taken else []
        found = schedule._greedy(nodes, schedule.Reads(nodes, given, end), schedule._groups(nodes))
        assert found == naive(nodes, given, end), seed


def test_the_order_that_is_taken_can_run_and_holds_no_more_than_the_given_one():
    better = 0
    for seed in range(60):
        nodes, inputs, end = drawn(seed)
        order = schedule.sparing(nodes, inputs, end)
        assert sorted(order, key=nodes.index) == nodes
        before = set(inputs)
        for node in order:
            assert before.issuperset(node.all_input_nodes)
            before.add(node)
        reads = schedule.Reads(nodes, inputs, end)
        assert schedule.peak(order, reads) <= schedule.peak(nodes, reads)
        better += schedule.peak(order, reads) < schedule.peak(nodes, reads)
    assert better > 30
