"""Writes to one part of a tensor's memory, where others hold other parts of it."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_ebm as ebm
from lightning_ebm.program.aliasing import meet


def test_parts_meet_where_they_have_an_element_in_common() -> None:
    """Against memory in which the elements of both are marked: any strides, overlapping ones and none included."""
    draw = random.Random(0)

    def part() -> tuple[list[int], list[int], int]:
        while True:
            shape = [draw.randint(draw.random() > 0.05, 4) for _ in range(draw.randint(0, 4))]
            strides = [draw.choice([0, 1, 2, 3, 4, 5, 6, 8, 12, 16]) for _ in shape]
            reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
            if reach < 60:
                return shape, strides, draw.randint(0, 63 - reach)

    found = set()
    for _ in range(500):
        parts = part(), part()
        marks = [torch.zeros(64, dtype=torch.bool) for _ in parts]
        for mark, where in zip(marks, parts, strict=True):
            mark.as_strided(*where).fill_(True)
        expected = bool((marks[0] & marks[1]).any())
        memory = torch.zeros(64)
        assert meet(*(memory.as_strided(*where) for where in parts)) is expected, parts
        found.add(expected)
    assert found == {True, False}


def test_parts_of_other_number_formats_meet_by_their_bytes() -> None:
    numbers = torch.zeros(6, dtype=torch.complex128)
    pairs = torch.view_as_real(numbers)
    assert not meet(numbers[2:4], pairs[:2])
    assert not meet(numbers.real, numbers.imag)
    assert meet(numbers[2:4], pairs[3, 1])


def _halves(h: Tensor) -> Tensor:
    """Two writes to interleaved halves, each of which autograd keeps; what it keeps is no view."""
    both = 2 * h
    first, second = both.unsafe_chunk(2, 1)
    first = first.add_(1).sigmoid_()
    return torch.cat([first, second.mul_(first).tanh_()], 1)


def _kept_column(h: Tensor) -> Tensor:
    both = 2 * h
    kept = both[:, 3:].detach()
    both[:, :3].add_(kept)
    return both + kept.sum(1, keepdim=True)


CELLS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]]] = {
    "gru": lambda: (nn.GRU(6, 6, batch_first=True), lambda m, h: m(h.unsqueeze(1))[0][:, 0]),
    "gru cell": lambda: (nn.GRUCell(6, 6), lambda m, h: m(h, 0.5 * h)),
    "lstm": lambda: (nn.LSTM(6, 6, batch_first=True, bidirectional=True), lambda m, h: m(h.unsqueeze(1))[0][:, 0, :6]),
    "lstm cell": lambda: (nn.LSTMCell(6, 6), lambda m, h: m(h)[0]),
    "halves": lambda: (nn.Linear(6, 6), lambda m, h: _halves(m(h))),
    "a column that is kept": lambda: (nn.Linear(6, 6), lambda m, h: _kept_column(m(h))),
}


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "plain"])
@pytest.mark.parametrize("name", CELLS)
def test_slopes_through_cells_that_write_to_parts_are_differentiated(name: str, capture: bool) -> None:
    """Gates are chunks of one tensor, each written to in place: what autograd keeps of one is not written by others."""
    torch.manual_seed(0)
    cell, call = CELLS[name]()
    net = nn.ModuleDict({"first": nn.Linear(4, 6), "act": nn.Tanh(), "cell": cell, "last": nn.Linear(6, 2)}).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss() -> Tensor:
        h = net["act"](net["first"](x))
        out = net["last"](call(net["cell"], h)).square().sum(1).mean()
        (slope,) = torch.autograd.grad(out, h, create_graph=True)
        penalized: Tensor = out + slope.square().sum()
        return penalized

    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for _ in range(3):
        true, found = ebm.reference.backprop(net, loss), learner.gradients(loss)
        for key, gradient in true.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)


def _through(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def replaced(q: Tensor, h: Tensor) -> Tensor:
        q = 1.0 * q
        view(q).copy_(view(h.clone()))
        return q

    return replaced


def _read_where_it_was_written(q: Tensor, h: Tensor) -> Tensor:
    column = (1.0 * q)[:, None][:, 0]
    column.copy_(h)
    return column


REPLACED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "itself": _through(lambda q: q),
    "flat": _through(lambda q: q.view(-1)),
    "transposed": _through(lambda q: q.T),
    "an only column": _through(lambda q: q[:, None][:, 0]),
    "read where it was written": _read_where_it_was_written,
}


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "plain"])
@pytest.mark.parametrize("way", REPLACED)
def test_what_a_copy_replaces_through_a_view_of_all_of_it_is_reached_with_a_slope_of_zero(
    way: str, capture: bool
) -> None:
    """As by autograd: an optimizer decays weights whose gradient is zero, and leaves alone those that have none."""
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 6), "act": nn.Tanh(), "lost": nn.Linear(6, 6), "last": nn.Linear(6, 2)}
    net = nn.ModuleDict(layers).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss() -> Tensor:
        h = net["act"](net["first"](x))
        out: Tensor = net["last"](REPLACED[way](net["lost"](h), h))
        return out.square().mean()

    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for _ in range(3):
        true, found = ebm.reference.backprop(net, loss), learner.gradients(loss)
        assert set(found) == set(true) == {name for name, _ in net.named_parameters()}
        assert not found["lost.weight"].any()
        for key, gradient in true.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)


def _seen_before(h: Tensor) -> Tensor:
    with torch.no_grad():
        column = h[:, 0]
    scale = 1 + column.square().mean()
    return scale * torch.relu_(h)


def _of_itself(h: Tensor) -> Tensor:
    with torch.no_grad():
        h.index_copy_(1, torch.tensor([1]), h[:, :1])
    return h.square()


def _seen_twice(h: Tensor) -> Tensor:
    with torch.no_grad():
        rows, flat = h.unbind(0), h.view(-1)
    total = rows[0].sum() + flat.as_strided((3,), (2,)).sum()
    h[:, 1:] *= 0.5
    return h + total.tanh()


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "plain"])
@pytest.mark.parametrize("preset", ["zero-divergence", "predictive-coding"])
@pytest.mark.parametrize("way", [_seen_before, _of_itself, _seen_twice])
def test_views_made_without_gradients_are_constants_though_what_they_view_is_written_to(
    way: Callable[[Tensor], Tensor], preset: str, capture: bool
) -> None:
    """Of such a view torch says that it is a leaf that requires a gradient; after a write it does not say even that."""
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 6), "act": nn.Tanh(), "mid": nn.Linear(6, 6), "last": nn.Linear(6, 2)}
    net = nn.ModuleDict(layers).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss() -> Tensor:
        out: Tensor = net["last"](way(net["mid"](net["act"](net["first"](x)))))
        return out.square().mean()

    learner = ebm.Learner(net, preset, capture=capture)
    for _ in range(4):
        true, found = ebm.reference.backprop(net, loss), learner.gradients(loss)
        assert set(found) == set(true)
        if preset == "zero-divergence":
            for key, gradient in true.items():
                torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", [lambda v: v, lambda v: v[:, 0], lambda v: v.view(-1)], ids=["all", "column", "flat"])
def test_what_has_a_gradient_written_to_a_detached_tensor_is_refused_by_its_name(
    part: Callable[[Tensor], Tensor],
) -> None:
    """It was refused as a tensor from before the step."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"first": nn.Linear(4, 6), "act": nn.Tanh(), "other": nn.Linear(4, 6), "last": nn.Linear(6, 2)})
    x = torch.randn(5, 4)

    def loss(copied: bool) -> Tensor:
        h = net["act"](net["first"](x))
        kept = h.detach().clone() if copied else h.detach()
        part(kept).add_(part(net["other"](x)))
        out: Tensor = net["last"](kept).square().mean() + h.square().mean()
        return out

    with pytest.raises(ebm.UnsupportedModuleError, match=r"detached tensor.*detach\(\)\.clone\(\)"):
        ebm.Learner(net, "zero-divergence").gradients(lambda: loss(False))
    found, true = (of(net, lambda: loss(True)) for of in (_exact, ebm.reference.backprop))
    assert all(torch.allclose(found[name], true[name], atol=1e-6) for name in true)


def _exact(net: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    return ebm.Learner(net, "zero-divergence").gradients(loss)
