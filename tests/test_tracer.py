"""What is written down of an evaluation, operation by operation, against running the evaluation itself."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ebm.program.stage import Stage
from lightning_ebm.program.tracer import key_of, traced_graph

Evaluate = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
LIBRARY = torch.library.Library("lightning_ebm_tests", "FRAGMENT")
LIBRARY.define("nested(Tensor x, Tensor y) -> (Tensor, Tensor[])")
LIBRARY.impl("nested", lambda x, y: (x * y, [x + y, x.sin()]), "CompositeExplicitAutograd")


def both(evaluate: Evaluate, x: Tensor, given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What code traced at other numbers gives here, and what the evaluation gives."""
    traced, _ = traced_graph(evaluate, [torch.ones_like(x)], [torch.ones_like(given)])
    return list(Stage(traced.graph, traced.constants)([x, given])), evaluate([x.clone()], [given.clone()])


def own_writes(point: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    sums = point[0] + given[0]
    sums.mul_(2).add_(point[0])
    return [sums]


def neutral(point: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    x, zero = point[0], torch.zeros(())
    return [x * 1, 1 * x, x / 1, x + 0, x - 0, 0 - x, 1 / (2 + x), x + zero, x - zero, zero - x, x * torch.ones(())]


def integers(point: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    count = (given[0] > 0).long()
    return [point[0] * (count + 1), point[0] * ((count + 1.0) / 2), (count + 0).to(point[0]), (count + 0.0) * point[0]]


def nested(point: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    """What cuDNN's recurrent layers give back: tensors, and a list of them."""
    product, (total, sine) = torch.ops.lightning_ebm_tests.nested(point[0], given[0])
    _, (_, again) = torch.ops.lightning_ebm_tests.nested(point[0], given[0])
    return [product * 2, total.exp(), sine + again]


@pytest.mark.parametrize("evaluate", [own_writes, neutral, integers, nested])
def test_code_gives_what_the_evaluation_gives(evaluate):
    torch.manual_seed(0)
    found, expected = both(evaluate, torch.randn(4, 3), torch.randn(4, 3))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("part", [0, 1])
def test_what_writes_to_a_point_or_to_what_the_batch_fixed_is_no_code(part):
    x = torch.randn(4, 3)
    with pytest.raises(NotImplementedError, match="writes to a tensor"):
        traced_graph(lambda point, given: [[*point, *given][part].mul_(2)], [x], [x])


def test_what_writes_to_memory_that_another_value_lies_in_is_no_code():
    def evaluate(point: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        sums = point[0] + given[0]
        row = sums[0]
        sums.mul_(2)
        return [sums, row]

    with pytest.raises(NotImplementedError, match="writes to a tensor"):
        traced_graph(evaluate, [torch.randn(4, 3)], [torch.randn(4, 3)])


def test_each_draw_of_random_numbers_is_a_draw():
    traced, _ = traced_graph(
        lambda point, given: [torch.rand_like(point[0]) - torch.rand_like(point[0])], [torch.ones(9)], []
    )
    assert bool(Stage(traced.graph, traced.constants)([torch.ones(9)])[0].abs().min() > 0)


def test_an_operation_is_looked_up_with_the_kinds_of_its_numbers():
    keys = [key_of(torch.ops.aten.add.Tensor, ("x", number)) for number in (1, 1.0, True)]
    assert len(set(keys)) == 3
    assert key_of(torch.ops.aten.add.Tensor, ("x", [1])) is None


def test_code_lets_go_of_an_input_that_it_has_read_last():
    traced, _ = traced_graph(lambda point, given: [(point[0] * 2).sin().exp()], [torch.ones(9)], [])
    code, inputs = Stage(traced.graph, traced.constants), [torch.ones(9)]
    held, alive = weakref.ref(inputs[0]), []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            alive.append(held() is not None)
            return func(*args, **(kwargs or {}))

    with Looking():
        code(inputs)
    assert alive == [True, False, False]
    assert inputs == []
