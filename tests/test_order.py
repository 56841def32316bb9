"""Operations ordered by what they lead to: the same ones, in an order that can be carried out, with less alive."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given, settings, strategies as st

from lightning_ebm.capture.order import most_held, orders, streamed
from lightning_ebm.capture.reuse import reusing
from lightning_ebm.capture.tape import STATE, Value
from lightning_ebm.capture.writing import Op


def value(size: int) -> Value:
    made = Value(None, STATE)
    made.shape, made.dtype = torch.Size([size]), torch.float32
    return made


def operation(reads: list[Value], size: int = 100) -> Op:
    return Op(torch.add, tuple(reads), {}, [value(size)], True, STATE)


def most_alive(ops: list[Op], outputs: list[Value], given: Sequence[Value] = ()) -> int:
    """The largest number of elements of results that are still to be read, or are outputs, at any time."""
    last = {v: index for index, op in enumerate(ops) for v in op.reads()}
    made = {v: v.shape.numel() for v in given}
    most = sum(made.values())
    for index, op in enumerate(ops):
        made.update({v: v.shape.numel() for v in op.results})
        most = max(most, sum(made.values()))
        made = {v: size for v, size in made.items() if v in outputs or last.get(v, -1) > index}
    return most


@st.composite
def records(draw: Any) -> tuple[list[Op], list[Value], list[Value]]:
    inputs, ops = [value(100)], []
    for _ in range(draw(st.integers(1, 25))):
        known = [*inputs, *(v for op in ops for v in op.results)]
        reads = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        ops.append(operation(reads, draw(st.sampled_from([1, 100]))))
    read = [v for v in inputs if any(v in op.reads() for op in ops)]
    return ops, draw(st.lists(st.sampled_from([op.results[0] for op in ops]), unique=True)), read


@settings(max_examples=150, deadline=None)
@given(records())
def test_the_same_operations_each_after_what_it_reads(record) -> None:
    ops, outputs, given = record
    made = {v for op in ops for v in op.results}
    for ordered in orders(ops, outputs):
        assert sorted(map(id, ordered)) == sorted(map(id, ops))
        here = set()
        for op in ordered:
            assert op.reads() & made <= here
            here.update(op.results)
        assert most_held(ordered, outputs) == most_alive(ordered, outputs)
        assert most_held(ordered, outputs, given) == most_alive(ordered, outputs, given)


def test_layers_are_finished_one_by_one() -> None:
    """x_l' from x_l, mu_l and mu_{l+1}: as recorded all mu come first, and all errors, and all pulls."""
    layers = 8
    states = [value(100) for _ in range(layers)]
    mu = [operation([x]) for x in states]
    errors = [operation([x, m.results[0]]) for x, m in zip(states[1:], mu, strict=False)]
    norms = [operation([e.results[0]], 1) for e in errors]
    pulls = [operation([e.results[0], m.results[0]]) for e, m in zip(errors, mu, strict=False)]
    new = [operation([x, p.results[0]]) for x, p in zip(states, pulls, strict=False)]
    recorded = [*mu, *errors, *pulls, *norms, *new]
    outputs = [op.results[0] for op in (*new, *norms)]
    ordered = streamed(recorded, outputs)
    assert most_alive(recorded, outputs) > 1.8 * layers * 100
    assert most_alive(ordered, outputs) < (layers + 5) * 100
    assert min(most_alive(way, outputs, states) for way in orders(recorded, outputs)) <= (layers + 4) * 100


def test_from_the_last_layer_where_predictions_are_kept() -> None:
    """Norms of all forces, and every mu for the update: from below, errors would be carried beside what is kept."""
    layers = 8
    states = [value(100) for _ in range(layers)]
    mu = [operation([x]) for x in states]
    errors = [operation([x, m.results[0]]) for x, m in zip(states[1:], mu, strict=False)]
    slopes = [operation([e.results[0], m.results[0]]) for e, m in zip(errors, mu, strict=False)]
    sent = [operation([s.results[0]]) for s in slopes]
    forces = [operation([e.results[0], s.results[0]]) for e, s in zip(errors, sent[1:], strict=False)]
    norms = [operation([f.results[0]], 1) for f in forces]
    norm = operation([n.results[0] for n in norms], 1)
    recorded = [*mu, *errors, *slopes, *sent, *forces, *norms, norm]
    outputs = [norm.results[0], *(op.results[0] for op in mu)]
    found = [most_held(way, outputs) for way in orders(recorded, outputs)]
    assert min(found) < found[0]
    assert min(found) <= (layers + 3) * 100


def test_what_is_written_to_an_operand_takes_nothing() -> None:
    large = 1 << 15
    x, mu, force = value(large), operation([value(large)], large), operation([value(large)], large)
    step = Op(torch.ops.aten.sub.Tensor, (x, force.results[0]), {"alpha": 0.1}, [value(large)], True, STATE)
    slope = Op(torch.ops.aten.tanh_backward.default, (x, mu.results[0]), {}, [value(large)], True, STATE)
    ops, outputs = [force, step, mu, slope], [step.results[0], slope.results[0]]
    assert most_held(ops, outputs) == 3 * large
    assert most_held(reusing(ops, outputs), outputs) == 2 * large
    assert reusing([*ops, operation([mu.results[0]])], outputs)[3] is slope  # read again
