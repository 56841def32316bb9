"""Phases relaxed as one batch against the same phases one after the other, and rows together against rows apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_capture import Counting, apart, batches, trained
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.capture import captures, program
from lightning_ebm.capture.abreast import Abreast
from lightning_ebm.capture.kernels import rows_together
from lightning_ebm.capture.values import CONSTANT, STATE, Value
from lightning_ebm.capture.writing import Names, Op, source
from lightning_ebm.watching import Recording

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------ operation by operation


def given(tensor: Tensor, level: int) -> Value:
    value = Value(None, level)
    value.shape, value.dtype = tensor.shape, tensor.dtype
    return value


def for_three_phases(func: Any, args: tuple[Any, ...], moves: tuple[int, ...]) -> tuple[bool, list[Any], list[Any]]:
    """Whether one call served all; what each phase gets; and what it gets from the operation itself.

    Arguments at the places `moves` differ between phases.
    """
    levels = [STATE if k in moves else CONSTANT for k in range(len(args))]
    values = [given(a, level) if isinstance(a, Tensor) else a for a, level in zip(args, levels, strict=True)]
    results = func(*args)
    several = isinstance(results, tuple)
    outs = [given(r, STATE) for r in (results if several else (results,))]
    op = Op(func, tuple(tuple(v) if isinstance(v, list) else v for v in values), {}, list(outs), not several, STATE)
    inputs = [{values[k]: given(args[k], STATE) for k in moves} for _ in range(3)]
    abreast = Abreast([op], inputs)
    wanted = [[abreast.parts(out)[k] for out in outs] for k in range(3)]
    constants = [v for k, v in enumerate(values) if type(v) is Value and k not in moves]
    rows = [[phase[values[k]] for k in moves] for phase in inputs]
    names = Names()
    text = source("point", abreast.ops, [constants, *rows], wanted, names)
    space = dict(names.constants)
    exec(text, space)
    moved = [[args[k] + torch.rand_like(args[k]) * p for k in moves] for p in range(3)]
    got = space["point"]([a for k, a in enumerate(args) if isinstance(a, Tensor) and k not in moves], *moved)
    expected = []
    for phase in moved:
        here = list(args)
        for k, tensor in zip(moves, phase, strict=True):
            here[k] = tensor
        found = func(*here)
        expected.append(found if several else (found,))
    together = sum(o.func is func for o in abreast.ops) == 1
    return together, list(got), expected


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) if shape else torch.randn(5, dtype=torch.float64)[0]


def same(together: bool, got: list[Any], expected: list[Any], wanted: bool) -> None:
    assert together is wanted
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=0, atol=1e-13)


x43 = r(4, 3)
TOGETHER: dict[str, tuple[Any, tuple[Any, ...], tuple[int, ...]]] = {
    "product": (aten.mm.default, (r(4, 3), r(3, 5)), (0,)),
    "product and bias": (aten.addmm.default, (r(5), r(4, 3), r(3, 5)), (1,)),
    "product and a shared term": (aten.addmm.default, (r(4, 5), r(4, 3), r(3, 5)), (1,)),
    "product and a term": (aten.addmm.default, (r(4, 5), r(4, 3), r(3, 5)), (0, 1)),
    "batched products": (aten.bmm.default, (r(4, 2, 3), r(4, 3, 5)), (0, 1)),
    "batched products with shared ones": (aten.bmm.default, (r(4, 2, 3), r(4, 3, 5)), (1,)),
    "convolution": (
        aten.convolution.default,
        (r(4, 2, 6, 6), r(3, 2, 3, 3), r(3), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        (0,),
    ),
    "transposed convolution": (
        aten.convolution.default,
        (r(4, 3, 6, 6), r(3, 2, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
        (0,),
    ),
    "pool": (aten.avg_pool2d.default, (r(4, 2, 6, 6), [2, 2], [2, 2]), (0,)),
    "back through a pool": (
        aten.avg_pool2d_backward.default,
        (r(4, 2, 3, 3), r(4, 2, 6, 6), [2, 2], [2, 2], [0, 0], False, True, None),
        (0,),
    ),
    "layer norm": (aten.native_layer_norm.default, (r(4, 3), [3], r(3), r(3), 1e-5), (0,)),
    "sum of rows": (aten.add.Tensor, (r(4, 3), r(4, 3)), (0, 1)),
    "with a shared tensor": (aten.mul.Tensor, (r(4, 3), r(4, 3)), (1,)),
    "with a vector": (aten.sub.Tensor, (r(4, 3), r(3)), (0,)),
    "with one row": (aten.sub.Tensor, (r(4, 3), r(1, 3)), (0,)),
    "with a column": (aten.mul.Tensor, (r(4, 3), r(4, 1)), (0, 1)),
    "with a shared column": (aten.mul.Tensor, (r(4, 3), r(4, 1)), (0,)),
    "with a number": (aten.mul.Tensor, (r(4, 3), 0.5), (0,)),
    "tanh": (aten.tanh.default, (r(4, 3),), (0,)),
    "back through tanh": (aten.tanh_backward.default, (r(4, 3), r(4, 3).tanh()), (0, 1)),
    "clamp": (aten.clamp.default, (r(4, 3), 0.0, 1.0), (0,)),
    "where": (aten.where.self, (x43 > 0, x43, r(4, 3)), (1, 2)),
    "view": (aten.view.default, (r(4, 6), [4, 2, 3]), (0,)),
    "flattened": (aten.view.default, (r(4, 2, 3), [8, 3]), (0,)),
    "view, the rest to be found": (aten.view.default, (r(4, 2, 3), [4, -1]), (0,)),
    "expand": (aten.expand.default, (r(4, 1, 3), [4, 2, 3]), (0,)),
    "permute": (aten.permute.default, (r(4, 2, 3), [0, 2, 1]), (0,)),
    "transpose": (aten.transpose.int, (r(4, 2, 3), 1, -1), (0,)),
    "sum over units": (aten.sum.dim_IntList, (r(4, 2, 3), [1, 2]), (0,)),
    "mean over units": (aten.mean.dim, (r(4, 2, 3), [-1], True), (0,)),
    "softmax": (aten._softmax.default, (r(4, 3), 1, False), (0,)),
    "log softmax": (aten._log_softmax.default, (r(4, 3), -1, False), (0,)),
    "back through log softmax": (
        aten._log_softmax_backward_data.default,
        (r(4, 3), r(4, 3).log_softmax(1), 1, torch.float64),
        (0, 1),
    ),
    "back through log softmax of shared rows": (
        aten._log_softmax_backward_data.default,
        (r(4, 3), r(4, 3).log_softmax(1), 1, torch.float64),
        (0,),
    ),
    "one sample": (aten.add.Tensor, (r(1, 3), r(1, 3)), (0,)),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_are_taken_together(name: str) -> None:
    torch.manual_seed(0)
    same(*for_three_phases(*TOGETHER[name]), wanted=True)


APART: dict[str, tuple[Any, tuple[Any, ...], tuple[int, ...]]] = {
    "weights that differ": (aten.mm.default, (r(4, 3), r(3, 5)), (1,)),
    "both factors": (aten.mm.default, (r(4, 3), r(3, 5)), (0, 1)),
    "a product to be added to": (aten.addmm.default, (r(4, 5), r(4, 3), r(3, 5)), (0,)),
    "convolution by what differs": (
        aten.convolution.default,
        (r(4, 2, 6, 6), r(3, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        (1,),
    ),
    "sum over the batch": (aten.sum.dim_IntList, (r(4, 3), [0]), (0,)),
    "sum over everything": (aten.sum.default, (r(4, 3),), (0,)),
    "mean over the batch": (aten.mean.dim, (r(4, 3), [-2]), (0,)),
    "softmax over the batch": (aten._softmax.default, (r(4, 3), 0, False), (0,)),
    "softmax over the batch from behind": (aten._softmax.default, (r(4, 3), -2, False), (0,)),
    "turned": (aten.t.default, (r(4, 3),), (0,)),
    "rows elsewhere": (aten.permute.default, (r(4, 2, 3), [1, 0, 2]), (0,)),
    "rows exchanged": (aten.transpose.int, (r(4, 2, 3), 0, 1), (0,)),
    "expanded along rows": (aten.expand.default, (r(1, 3), [4, 3]), (0,)),
    "expanded by a dimension": (aten.expand.default, (r(4, 3), [2, 4, 3]), (0,)),
    "spread over another's rows": (aten.mul.Tensor, (r(4, 3), r(3)), (1,)),
    "a number of each phase": (aten.mul.Tensor, (r(4, 3), r()), (0, 1)),
    "joined": (aten.flip.default, (r(4, 3), [0]), (0,)),
}


@pytest.mark.parametrize("name", APART)
def test_what_mixes_rows_is_done_phase_by_phase(name: str) -> None:
    torch.manual_seed(0)
    same(*for_three_phases(*APART[name]), wanted=False)


def test_rows_that_lie_together_are_not_copied() -> None:
    whole = torch.randn(6, 3)
    first, second = whole[:3], whole[3:]
    assert rows_together(first, second).data_ptr() == whole.data_ptr()
    assert torch.equal(rows_together(first, second), whole)
    columns = whole[:3, :2], whole[3:, :2]
    for parts in [(second, first), (first, first), (first, second.clone()), columns, (whole, second)]:
        got = rows_together(*parts)
        assert torch.equal(got, torch.cat(parts))
        assert got.data_ptr() not in {part.data_ptr() for part in parts}


# ------------------------------------------------------------------------------------------------- whole relaxations


def chain(
    *between: nn.Module, act: Callable[[], nn.Module] = nn.Tanh, widths: tuple[int, ...] = (8, 9)
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip((6, *widths), widths, strict=False):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers, *between, nn.Linear(widths[-1], 3))


def conv() -> nn.Module:
    parts = [nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d((1, 2), padding=(0, 1))]
    return nn.Sequential(*parts, nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def tokens() -> nn.Module:
    """A sequence of three vectors; its first layer norm and its mean are rows of their own."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    parts = [nn.Unflatten(1, (3, 2)), nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()]
    return nn.Sequential(*parts, Mean(), nn.Linear(4, 3))


MADE: dict[str, Callable[[], nn.Module]] = {
    "one hidden layer": lambda: chain(widths=(8,)),
    "two": chain,
    "hard": lambda: chain(act=lambda: nn.Hardtanh(0.0, 1.0)),
    "convolutions": conv,
    "tokens": tokens,
    "dropout": lambda: chain(nn.Dropout(0.3)),
}
RELAXERS: dict[str, ebm.relaxers.Relaxer] = {
    "sweeps": ebm.FixedPoint(6),
    "synchronous": ebm.FixedPoint(6, "synchronous", damping=0.3),
    "sweeps by tolerance": ebm.FixedPoint(200, tol=1e-7),
    "accelerated": ebm.AcceleratedFixedPoint(200, tol=1e-7),
}


def small(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        net = make()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter *= 0.5
        return net

    return made


def centred(relaxer: str, strength: float = 0.5) -> ebm.Algorithm:
    return ebm.Algorithm(ebm.Hopfield(0.5), ebm.Centered(strength), RELAXERS[relaxer])


@pytest.fixture
def one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches phases side by side off."""
    begin = captures.Captured.__init__

    def begun(self: captures.Captured, *args: Any) -> None:
        begin(self, *args)
        self.abreast = False

    return lambda: monkeypatch.setattr(captures.Captured, "__init__", begun)


def modes(learned: captures.Captures | None) -> list[int]:
    assert learned is not None
    assert learned.refused is None
    return [mode.phases for captured in learned._kept for mode in captured.programs if mode.kind == "answers"]


@pytest.mark.parametrize("net", MADE)
@pytest.mark.parametrize("relaxer", RELAXERS)
def test_the_update_is_that_of_phases_one_after_the_other(net: str, relaxer: str, one_after_the_other) -> None:
    make = small(MADE[net])
    plain, _, _ = trained(make, centred(relaxer), False)
    fast, learned, _ = trained(make, centred(relaxer), True)
    assert 2 in modes(learned)
    one_after_the_other()
    apart_, alone, _ = trained(make, centred(relaxer), True)
    assert 2 not in modes(alone)
    assert apart(fast, apart_) < 1e-12
    assert apart(fast, plain) < (1e-10 if relaxer == "accelerated" else 1e-12)  # differences of slopes amplify rounding


def reports(capture: bool, relaxer: str = "accelerated") -> list[ebm.learner.Report]:
    torch.manual_seed(0)
    net = chain().double()
    learner = ebm.Learner(net, centred(relaxer, strength=2.0), capture=capture)
    found = []
    for x, y in batches(6):
        learner.gradients(lambda x=x, y=y: F.cross_entropy(net(x), y))
        found.append(learner.report)
    return found


@pytest.mark.parametrize("relaxer", ["accelerated", "sweeps by tolerance"])
def test_each_phase_ends_when_it_would_by_itself(relaxer: str) -> None:
    """Steps, statuses, energies and residuals; the phases of some batches are not equally long."""
    unequal = 0
    for fast, plain in zip(reports(True, relaxer), reports(False, relaxer), strict=True):
        for one, other in zip(fast["phases"], plain["phases"], strict=True):
            assert (one["nudge"], one["status"], one["steps"]) == (other["nudge"], other["status"], other["steps"])
            assert one["energies"] == pytest.approx(other["energies"], rel=1e-12)
            assert one["residual"] == pytest.approx(other["residual"], rel=1e-5, abs=1e-12)
        unequal += len({phase["steps"] for phase in fast["phases"][1:]}) > 1
    assert unequal


def test_half_the_products_for_twice_the_rows() -> None:
    net = chain()
    learner = ebm.Learner(net, centred("sweeps"))
    x, y = torch.randn(5, 6), torch.arange(5) % 3

    def closure() -> Tensor:
        return F.cross_entropy(net(x), y)

    learner.backward(closure)
    with Counting() as counting:
        learner.backward(closure)
    assert counting.shapes.count((10, 9, 8)) == counting.shapes.count((10, 8, 9)) == 6
    assert counting.shapes.count((5, 9, 8)) == 6  # of the free phase


def test_what_cannot_be_taken_together_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = trained(chain, centred("sweeps"), False)

    def fails(*args: Any) -> None:
        raise RuntimeError("no rows")

    monkeypatch.setattr(program, "Abreast", fails)
    fast, learned, _ = trained(chain, centred("sweeps"), True)
    assert set(modes(learned)) == {1}
    assert apart(fast, plain) < 1e-12


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for all phases is checked against the plain engine before it is used, like all captured code."""
    plain, _, _ = trained(chain, centred("sweeps"), False)
    parts = Abreast.parts
    monkeypatch.setattr(Abreast, "parts", lambda self, value: parts(self, value)[::-1])
    fast, learned, _ = trained(chain, centred("sweeps"), True)
    assert set(modes(learned)) == {1}
    assert apart(fast, plain) < 1e-12


@pytest.mark.parametrize("nudge", [ebm.Centered(2.0), ebm.Holomorphic(0.5, points=6)], ids=str)
def test_who_looks_on_changes_nothing_and_sees_each_phase_by_itself(nudge: ebm.Nudge) -> None:
    """Bit for bit the same update; and the traces that phases relaxed one after the other leave."""
    updates, traces = [], []
    for capture in (True, True, False):
        torch.manual_seed(0)
        net = chain().double()
        learner = ebm.Learner(net, ebm.algorithm(centred("accelerated"), nudge=nudge), capture=capture)
        recordings: list[Recording] = []

        def watch(network: Any, recordings: list[Recording] = recordings) -> Any:
            recordings.append(Recording(network))
            return recordings[-1]

        learner.observer = watch if updates else None
        x, y = batches()[0]
        updates.append([learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y)) for _ in range(2)])
        traces.append([trace.read() for trace in recordings[-1].traces] if recordings else [])
        nudges = [complex(phase["nudge"]).real for phase in learner.report["phases"]]
        assert [trace["nudge"] for trace in traces[-1]] == (nudges if recordings else [])
    for alone, seen in zip(updates[0], updates[1], strict=True):
        assert all(torch.equal(alone[name], seen[name]) for name in alone)
    assert len(traces[1]) == len(traces[2]) > 2
    for one, other in zip(traces[1], traces[2], strict=True):
        assert len(one["loss"]) == len(other["loss"])
        for key in ("internal", "loss", "residual", "residual_per_sample", "step_size", "curvature"):
            assert torch.allclose(torch.tensor(one[key]), torch.tensor(other[key]), rtol=1e-4, atol=1e-9), key
