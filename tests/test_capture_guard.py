"""What begins after a step was captured, and what changes on the way between inputs and loss: never trained wrongly.

The oracle is the plain engine (`capture=False`), which runs the user's code at every point.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_capture import Box, Reversed, batches, both, cross_entropy, pc
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

import lightning_ebm as ebm
from lightning_ebm.capture import tape as taping
from lightning_ebm.capture.captures import Captures
from lightning_ebm.capture.comparison import same_computation
from lightning_ebm.capture.escapes import backward_outline, recorded_pass
from lightning_ebm.capture.reuse import rows_together
from lightning_ebm.capture.tape import Tape
from lightning_ebm.capture.values import STATE

LATE = 4
"""The step from which on something is done that the captured ones did not do."""

Change = Callable[[Tensor, int], Tensor]
"""What becomes of the first hidden layer."""


def step_with(change: Change) -> Callable[..., Tensor]:
    def step(net: Box, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(net.net[2:](change(net.net[:2](batch[0]), index)), batch[1])

    return step


# ------------------------------------------------------------------------------------ values read into Python


def branch_on_the_largest(h: Tensor, index: int) -> Tensor:
    return h * 0.3 if index >= LATE and h.detach().abs().max() > 0.9 else h


def branch_that_flips_between_states(h: Tensor, index: int) -> Tensor:
    """The record is that of before wherever the first pass takes that way. Little hangs on it, or the energy rises."""
    return h * (1 + 1e-5) if index >= LATE and (1e4 * h.detach().sum()).sin() > 0 else h * 1.0


def branch_on_a_comparison_of_tensors(h: Tensor, index: int) -> Tensor:
    return h * 0.9 if index >= LATE and not torch.allclose(h, h.round(), atol=0.499) else h


def a_list_of_values(h: Tensor, index: int) -> Tensor:
    return h * (1 + max(map(abs, h.detach()[0].tolist()))) if index >= LATE else h


def values_of_an_array(h: Tensor, index: int) -> Tensor:
    return h * (1 + float(np.abs(np.asarray(h.detach())).max())) if index >= LATE else h


def an_array_in_place_of_another(h: Tensor, index: int) -> Tensor:
    """The record is the same throughout: a factor that comes from outside."""
    weights = np.abs(h.detach().numpy()) if index >= LATE else np.ones(h.shape)
    return h * torch.from_numpy(weights)


def a_number_in_place_of_another(h: Tensor, index: int) -> Tensor:
    return h * torch.tensor(float(h.detach().square().mean()) if index >= LATE else 1.0)


# ------------------------------------------------------------------------------ shapes that depend on states


def how_many_are_nonzero(h: Tensor, index: int) -> Tensor:
    return h * (1 + (h.detach() > 0).nonzero().shape[0] / h.numel()) if index >= LATE else h


def how_many_a_mask_picks(h: Tensor, index: int) -> Tensor:
    return h * (1 + h.detach()[h.detach() > 0.1].numel() / h.numel()) if index >= LATE else h


def how_many_are_selected(h: Tensor, index: int) -> Tensor:
    return h * (1 + len(torch.masked_select(h, h > 0)) / h.numel()) if index >= LATE else h


def how_many_values_there_are(h: Tensor, index: int) -> Tensor:
    return h * (1 + len((8 * h.detach()).round().unique()) / 17) if index >= LATE else h


def how_often_samples_are_repeated(h: Tensor, index: int) -> Tensor:
    return h * (1 + len(h.repeat_interleave((h.detach()[:, 0] > 0).long(), 0)) / 7) if index >= LATE else h


def how_many_counts_there_are(h: Tensor, index: int) -> Tensor:
    return h * (1 + len(torch.bincount((4 * h.detach()[0].abs()).long())) / 4) if index >= LATE else h


# ----------------------------------------------------------------------- hooks, and backward code of one's own


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        return 0.3 * slope


def a_function_in_place_of_a_cut(h: Tensor, index: int) -> Tensor:
    """Below autograd both are a view that is made while gradients are off."""
    if index >= LATE:
        return Scaled.apply(h)
    with torch.no_grad():
        return h.view_as(h)


def a_function_that_comes_late(h: Tensor, index: int) -> Tensor:
    return Reversed.apply(h, 0.5) if index >= LATE else h.view_as(h)


def a_function_behind_others(h: Tensor, index: int) -> Tensor:
    return h + 0.5 * (Scaled.apply(h * 2.0) if index >= LATE else h * 2.0)


def a_hook_on_a_tensor_that_is_gone(h: Tensor, index: int) -> Tensor:
    middle = h * 2.0
    if index >= LATE:
        middle.register_hook(lambda slope: 0.3 * slope)
    return middle * 0.5


def a_hook_on_a_view_that_is_gone(h: Tensor, index: int) -> Tensor:
    middle = h.view(-1)
    if index >= LATE:
        middle.register_hook(lambda slope: slope.clamp(-1e-3, 1e-3))
    return middle.view(h.shape)


def a_hook_on_a_node(h: Tensor, index: int) -> Tensor:
    middle = h * 2.0
    if index >= LATE:
        middle.grad_fn.register_hook(lambda given, slopes: (0.3 * given[0], *given[1:]))
    return middle * 0.5


def a_hook_before_a_node(h: Tensor, index: int) -> Tensor:
    middle = h * 2.0
    if index >= LATE:
        middle.grad_fn.register_prehook(lambda slopes: (0.3 * slopes[0], *slopes[1:]))
    return middle * 0.5


def a_hook_on_several(h: Tensor, index: int) -> Tensor:
    first, second = h * 2.0, h * 1.5
    if index >= LATE:
        register_multi_grad_hook([first, second], lambda slopes: None)
    return first - second


def other_tensors_saved(h: Tensor, index: int) -> Tensor:
    if index < LATE:
        return h * h
    with saved_tensors_hooks(lambda x: x, lambda x: 0.95 * x):
        return h * h


def tensors_saved_elsewhere(h: Tensor, index: int) -> Tensor:
    if index < LATE:
        return h.sin()
    with save_on_cpu():
        return h.sin()


def a_part_run_again(h: Tensor, index: int) -> Tensor:
    return checkpoint(torch.sin, h, use_reentrant=False) if index >= LATE else h.sin()


READ, SHAPE = "into Python", "shape depends on states"
ESCAPES = {
    branch_on_the_largest: READ,
    branch_that_flips_between_states: READ,
    branch_on_a_comparison_of_tensors: READ,
    a_list_of_values: READ,
    values_of_an_array: READ,
    an_array_in_place_of_another: READ,
    a_number_in_place_of_another: READ,
    how_many_are_nonzero: SHAPE,
    how_many_a_mask_picks: SHAPE,
    how_many_are_selected: SHAPE,
    how_many_values_there_are: SHAPE,
    how_often_samples_are_repeated: SHAPE,
    how_many_counts_there_are: SHAPE,
    a_function_in_place_of_a_cut: "custom autograd function",
    a_function_that_comes_late: "custom autograd function",
    a_function_behind_others: "custom autograd function",
    a_hook_on_a_tensor_that_is_gone: "hook",
    a_hook_on_a_view_that_is_gone: "hook",
    a_hook_on_a_node: "hook",
    a_hook_before_a_node: "hook",
    a_hook_on_several: "hook",
    other_tensors_saved: "saved_tensors_hooks",
    tensors_saved_elsewhere: "saved_tensors_hooks",
    a_part_run_again: "saved_tensors_hooks",
}
ALGORITHMS = {
    "steps": pc(),
    "errors": pc("errors"),
    "sweeps": ebm.Algorithm(ebm.Hopfield(0.5), ebm.Centered(0.3), ebm.FixedPoint(4)),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("change", ESCAPES, ids=lambda change: change.__name__)
def test_what_leaves_the_record_later_is_seen_at_once(change: Change, algorithm: str) -> None:
    difference, captures = both(Box, ALGORITHMS[algorithm], step_with(change))
    assert difference < 1e-12
    assert captures._used == 2  # of the first four steps one is captured, and the last batch is smaller
    assert ESCAPES[change] in (captures.refused or "")


@pytest.mark.parametrize("inner", [False, True], ids=["around the step", "around every step, nested"])
def test_hooks_on_saved_tensors_that_are_set_around_a_step(inner: bool) -> None:
    """They stand on a stack that no operation shows; a step between two such is captured code's again, or plain."""

    @contextmanager
    def halved(wanted: bool) -> Iterator[None]:
        with saved_tensors_hooks(lambda x: x, lambda x: 0.5 * x if x.is_floating_point() else x):
            yield

    found = {}
    for capture in (True, False):
        torch.manual_seed(0)
        net = Box().double()
        learner, updates = ebm.Learner(net, pc(), capture=capture), []
        for index, (x, y) in enumerate(batches(4)):
            closure = lambda x=x, y=y, net=net: F.cross_entropy(net(x), y)  # noqa: E731
            if index < 2:
                updates.append(learner.gradients(closure))
                continue
            with halved(True):
                if inner:
                    with saved_tensors_hooks(lambda x: x, lambda x: x):
                        updates.append(learner.gradients(closure))
                else:
                    updates.append(learner.gradients(closure))
        found[capture] = updates
    for one, other in zip(found[True], found[False], strict=True):
        for name, value in other.items():
            assert torch.allclose(one[name], value, rtol=0, atol=1e-12)


def test_hooks_on_saved_tensors_are_seen_and_none_are_where_there_are_none() -> None:
    assert not taping._are_saved_tensors_hooked()
    with save_on_cpu():
        assert taping._are_saved_tensors_hooked()
        assert taping._are_saved_tensors_hooked()
    assert not taping._are_saved_tensors_hooked()
    with save_on_cpu():  # they are not switched off by having been looked for
        kept = torch.ones(2, requires_grad=True).exp()
    assert torch.equal(kept.detach(), torch.ones(2).exp())


class Reading(Metric):
    """Looks at the values it is given, as most metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, h: Tensor) -> None:
        if float(h.max()) > float(self.largest):
            self.largest = h.detach().max()
        h.detach().unique().tolist()

    def compute(self) -> Tensor:
        return self.largest


class Metered(Box):
    def __init__(self) -> None:
        super().__init__()
        self.metric = Reading()


@pytest.mark.parametrize("way", ["called", "updated"])
def test_a_metric_may_read_values_as_no_further_pass_runs_it(way: str) -> None:
    def step(net: Metered, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        logits = net(batch[0])
        if index >= LATE:
            (net.metric if way == "called" else net.metric.update)(logits)
        return F.cross_entropy(logits, batch[1])

    difference, captures = both(Metered, pc(), step)
    assert difference < 1e-12
    assert captures.refused is None
    assert captures._used == 6


# ------------------------------------------------------------------------------ tensors of other kinds between


def picks(index: int, count: int) -> Tensor:
    """Which samples count: another number of them in every step, none in the fourth."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(index))[: (2, 2, 1, 0, 2, 3, 0, 2)[index]]] = (
        True
    )
    return mask


def masked_mean_of_squares(net, batch, index):
    mask = picks(index, len(batch[0])).logical_or(torch.arange(len(batch[0])) == 0)  # never none: a mean of them
    return (net(batch[0]) - 1.0).square()[mask].mean()


def masked_sum(net, batch, index):
    return (net(batch[0]) - 1.0).square()[picks(index, len(batch[0]))].sum() / 7 + cross_entropy(net, batch, index)


def selected_sum(net, batch, index):
    squares = (net(batch[0]) - 1.0).square()
    return squares.masked_select(picks(index, len(batch[0]))[:, None]).sum() / 7 + cross_entropy(net, batch, index)


def masked_spread(net, batch, index):
    mask = picks(index, len(batch[0])).logical_or(torch.arange(len(batch[0])) < 2)
    return net(batch[0])[mask].var(0).sum() + cross_entropy(net, batch, index)


def by_positions(net, batch, index):
    rows = picks(index, len(batch[0])).nonzero()[:, 0]
    return net(batch[0]).square()[rows].sum() + cross_entropy(net, batch, index)


def by_lengths(net, batch, index):
    lengths = 2 * picks(index, len(batch[0])).long() + (torch.arange(len(batch[0])) == 0)
    return net(batch[0]).repeat_interleave(lengths, 0).square().mean()


def by_the_labels_there_are(net, batch, index):
    labels = batch[1].clamp_max(index % 3).unique()
    return net(batch[0])[:, labels].square().mean()


def in_pieces(net, batch, index):
    pieces = net(batch[0]).split([1 + index % 2, len(batch[0]) - 1 - index % 2])
    return sum(piece.square().mean() for piece in pieces)


def apart_by_samples(net, batch, index):
    hidden = net(batch[0][: 2 + index % 2])
    return sum(sample.square().mean() for sample in hidden.unbind(0))


def other_strides_between(net, batch, index):
    x = batch[0].t().contiguous().t() if index % 2 else batch[0]
    return F.cross_entropy(net(x), batch[1]) + net.net[:2](x).reshape(-1)[: 2 * len(x)].square().sum()


def a_wider_type_between(net, batch, index):
    weights = torch.ones(len(batch[0]), dtype=(torch.float32, torch.float64)[index % 2]) * (1 + index)
    return (weights * F.cross_entropy(net(batch[0]), batch[1], reduction="none")).mean()


KINDS = [masked_mean_of_squares, masked_sum, selected_sum, masked_spread, by_positions, by_lengths,
         by_the_labels_there_are, in_pieces, apart_by_samples, other_strides_between, a_wider_type_between]  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("step", KINDS, ids=lambda step: step.__name__)
def test_shapes_that_come_from_values_of_the_batch(step, algorithm: str) -> None:
    difference, captures = both(Box, ALGORITHMS[algorithm], step)
    assert difference < 1e-12
    assert captures.refused is None
    assert 2 <= captures._made <= 8


@pytest.mark.parametrize("preset", ["predictive-coding", "pc-nudge", "error-pc", "dual-propagation"])
def test_images_that_lie_otherwise_in_memory(preset: str) -> None:
    """Rows, channels last and a transposed view by turns: the same images."""

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    def step(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x = batch[0][:, :2, None, None] * torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)
        if index % 3 == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        if index % 3 == 2:
            x = x.transpose(2, 3)
        return F.cross_entropy(net(x), batch[1])

    algorithm = ebm.algorithm(preset)
    difference, captures = both(Images, algorithm, step)
    assert difference < 1e-9
    assert captures.refused is None


def test_a_mean_over_nothing_is_an_error_of_that_step_and_of_no_other() -> None:
    torch.manual_seed(0)
    net = Box().double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    learner, plain = (ebm.Learner(net, "predictive-coding", capture=capture) for capture in (True, False))
    for count in (3, 0, 3, 0, 5, 3):
        mask = torch.arange(7) < count
        closure = lambda mask=mask: ((net(x) - y) ** 2)[mask].mean()  # noqa: E731
        if not count:
            for one in (learner, plain):
                with pytest.raises(ebm.RelaxationDivergedError, match="nan"):
                    one.gradients(closure)
            continue
        found, expected = learner.gradients(closure), plain.gradients(closure)
        assert all(torch.allclose(found[name], value, rtol=0, atol=1e-12) for name, value in expected.items())


def taken(make: Callable[[Tensor], Tensor]) -> tuple[Tape, Tensor, Tensor]:
    tape, state = Tape(), torch.arange(12.0).view(4, 3).requires_grad_()
    tape.input(state, STATE)
    with recorded_pass(tape):
        result = make(state)
    return tape, state, result


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x[torch.tensor([0, 1])].sum(), lambda x: x[torch.tensor([0, 1, 2])].sum()),
        (lambda x: x[torch.tensor([True, True, False, True])].sum(), lambda x: x[torch.tensor([True] * 4)].sum()),
        (lambda x: (x * torch.ones(4, 3)).sum(), lambda x: (x * torch.ones(3, 4).t()).sum()),
        (lambda x: (x * torch.ones(4, 3)).sum(), lambda x: (x * torch.ones(4, 3).double()).sum()),
        (lambda x: torch.unbind(x[torch.tensor([0, 1])])[0].sum(), lambda x: torch.unbind(x)[0].sum()),
        (lambda x: x[torch.tensor([1])].sum(), lambda x: x[torch.tensor([], dtype=torch.int64)].sum()),
    ],
    ids=["positions", "mask", "strides", "type", "how many results", "none"],
)
def test_records_differ_where_a_tensor_between_is_of_another_kind(one, other) -> None:
    records = [taken(make) for make in (one, one, other)]
    (tape, state, result), again, different = records

    def compared(record: tuple[Tape, Tensor, Tensor]) -> object:
        known = {tape.value(state): record[0].value(record[1])}
        return same_computation([tape.value(result)], [record[0].value(record[2])], known)

    assert isinstance(compared(again), dict)
    assert isinstance(compared(different), str)


def test_another_graph_of_autograd_is_another_step() -> None:
    """A leaf is made of a constant, and no operation tells: nobody takes this for the captured step."""

    def leaf(h: Tensor, index: int) -> Tensor:
        return h + h.detach().requires_grad_(index >= LATE)

    difference, captures = both(Box, pc(), step_with(leaf))
    assert difference < 1e-12
    assert captures._made == 3
    assert "parameters whose place in the record is not known" in (captures.refused or "")


def test_outlines_tell_graphs_apart() -> None:
    x, y = (torch.ones(3, requires_grad=True) for _ in range(2))
    one, again = (backward_outline([(x * 2 + y).exp().sum(), y.sin()]) for _ in range(2))
    assert one == again
    others = [(x * 2 + x).exp().sum(), (x * 2 + y.detach()).exp().sum(), (x.detach() * 2 + y).exp().sum()]
    assert all(backward_outline([other, y.sin()]) != one for other in others)
    assert backward_outline([(x * 2 + y).exp().sum(), x.sin()]) != one
    assert "Scaled" in backward_outline([Scaled.apply(x).sum()])
    assert backward_outline([torch.zeros(())]) == (-1,)


def test_rows_of_nothing_are_put_together_by_copying_nothing() -> None:
    whole = torch.empty(0, 3)
    assert rows_together(whole[:0], whole[:0]).shape == (0, 3)
    assert rows_together(torch.ones(2, 0), torch.ones(2, 0)).shape == (4, 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tensors_without_elements_beside_the_others(algorithm: str) -> None:
    """Columns of which there are none, and products over nothing: sums of nothing are 0."""

    def step(net: Box, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        hidden = net.net[:2](batch[0])
        nothing = hidden[:, :0] @ torch.ones(0, 3, dtype=torch.float64)
        extra = F.avg_pool2d(hidden[:0, None, None, :2].expand(-1, 1, 2, 2), 2).sum()
        return F.cross_entropy(net.net[2:](hidden) + nothing, batch[1]) + extra

    difference, captures = both(Box, ALGORITHMS[algorithm], step)
    assert difference < 1e-12
    assert captures.refused is None


@pytest.mark.parametrize("preset", ["predictive-coding", "pc-nudge", "error-pc", "fixed-prediction"])
def test_a_batch_without_samples_in_the_middle_of_a_run(preset: str) -> None:
    """A sum over nothing: the update is 0 in both engines, and the steps around it stay captured."""
    torch.manual_seed(0)
    net = Box().double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    learners = [ebm.Learner(net, preset, loss_reduction="sum", capture=capture) for capture in (True, False)]
    for count in (7, 7, 0, 7, 0, 7):
        closure = lambda n=count: 0.5 * (net(x[:n]) - y[:n]).square().sum()  # noqa: E731
        found, expected = (learner.gradients(closure) for learner in learners)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-12)
            assert count or not bool(value.any())
    assert learners[0]._captures[0].refused is None


def test_writing_to_nothing_is_seen_by_no_other_tensor_without_elements() -> None:
    def make(x: Tensor) -> Tensor:
        nothing, other = torch.zeros(0), torch.zeros(0)
        view, views = nothing[:0], other[:0]
        nothing.add_(1.0)
        return x.sum() + view.sum() + views.sum() + other.sum()

    tape, _, _ = taken(make)
    assert tape.problem is None
    assert not any(node.problem for node in tape.nodes)


def test_an_error_in_comparing_is_no_error_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: object) -> None:
        raise KeyError("something unforeseen")

    monkeypatch.setattr(Captures, "of", none)
    difference, captures = both(Box, pc())
    assert difference == 0.0
    assert "something unforeseen" in (captures.refused or "")
