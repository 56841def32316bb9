"""Small products by one kernel: right for every layout, chosen by size, and weights turned once a batch."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.capture import products, recording
from lightning_ebm.capture.elementwise import compiled_tanh
from lightning_ebm.capture.products import small_product

needs_kernel = pytest.mark.skipif(
    products.torchs_kernel() is None, reason="this torch has no at::native::cpublas::brgemm of the name Linux spells"
)


def laid_out(matrix: Tensor, how: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    rows, columns = matrix.shape
    if how == "columns":
        return matrix.t().contiguous().t()
    if how == "part of wider rows":
        return torch.cat([matrix, torch.full_like(matrix, torch.nan)], 1)[:, :columns]
    if how == "every other row":
        return matrix.repeat_interleave(2, 0)[::2]
    if how == "every other column":
        return matrix.repeat_interleave(2, 1)[:, ::2]
    if how == "one row for all":
        return matrix[:1].expand(rows, columns)
    return matrix


LAYOUTS = ["rows", "columns", "part of wider rows", "every other row", "every other column", "one row for all"]


@needs_kernel
@pytest.mark.parametrize(("rows", "inner", "columns"), [(9, 17, 5), (1, 8, 3), (4, 1, 6), (33, 64, 1), (64, 100, 48)])
@pytest.mark.parametrize("layouts", itertools.product(LAYOUTS, LAYOUTS), ids=" x ".join)
def test_products_of_every_layout(layouts: tuple[str, str], rows: int, inner: int, columns: int) -> None:
    """Against float64, within what rounding may do: K eps sum |x| |w|."""
    generator = torch.Generator().manual_seed(0)
    x, matrix, many = (
        torch.randn(shape, generator=generator) for shape in ((rows, inner), (inner, columns), (rows, columns))
    )
    x, matrix = laid_out(x, layouts[0]), laid_out(matrix, layouts[1])
    room = (inner + 2) * torch.finfo(torch.float32).eps * (x.double().abs() @ matrix.double().abs() + many.abs().max())
    for term in (None, many, many[0], many.t().contiguous().t(), many[:1].expand(rows, columns)):
        before = None if term is None else term.clone()
        found = small_product(x, matrix, term)
        exact = x.double() @ matrix.double() + (0 if term is None else term.double())
        assert bool(((found.double() - exact).abs() <= room).all())
        assert term is None or torch.equal(term, before)  # it is added to, and not written to


@needs_kernel
def test_which_products_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "kernel", products.torchs_kernel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [products.is_small(n) for n in (0, 999_999, 1_000_000, 16_000_000, 16_000_001)] == [False] * 2 + [
        True,
        True,
        False,
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # it works in one thread only
    assert [products.is_small(n) for n in (1_000_000, 4_000_000, 4_000_001)] == [True, True, False]
    monkeypatch.setattr(products, "kernel", lambda: None)
    assert not products.is_small(1_000_000)


def wide(activation: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(128, 128), activation())]
    net = nn.Sequential(nn.Linear(20, 128), activation(), *hidden, nn.Linear(128, 10))
    with torch.no_grad():  # as drawn, next to nothing comes down through three sigmoids
        for parameter in net.parameters() if activation is nn.Sigmoid else ():
            parameter.mul_(4.0)
    return net


@needs_kernel
@pytest.mark.parametrize(
    ("algorithm", "activation"),
    [
        (ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 8)), nn.ReLU),
        (ebm.algorithm("predictive-coding"), nn.Sigmoid),
        (ebm.algorithm("equilibrium-propagation", nudge=ebm.Centered(0.5)), nn.Sigmoid),
    ],
    ids=["steps", "errors", "sweeps"],
)
def test_weights_are_turned_once_a_batch_and_as_they_are_in_that_batch(
    algorithm: ebm.Algorithm, activation: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each hidden weight is copied once, whatever code reads it; after a step it is the new one, smaller by a third."""
    monkeypatch.setattr(products, "kernel", products.torchs_kernel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    net = wide(activation)
    x, y = torch.randn(80, 20), torch.arange(80) % 10
    learners = {capture: ebm.Learner(net, algorithm, capture=capture) for capture in (True, False)}
    for _ in range(3):
        found = {k: learner.gradients(lambda: F.cross_entropy(net(x), y)) for k, learner in learners.items()}
        for name, gradient in found[False].items():
            assert float((found[True][name] - gradient).abs().max()) < 1e-2 * float(gradient.abs().max()), name
        network = learners[True].begin(closure := lambda: F.cross_entropy(net(x), y))
        with network.first_pass():
            loss = closure()
        network.surrogate(loss)
        copied = list(network.network._turned.values())  # type: ignore[union-attr]
        hidden = [net[2].weight, net[4].weight]
        assert len(copied) == len(hidden)
        for weight in hidden:
            assert sum(torch.equal(copy, weight.t()) and copy.is_contiguous() for copy in copied) == 1
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(0.7)


@needs_kernel
def test_other_devices_have_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's tensors must not come to a function of the processor's: there nothing is rewritten."""
    monkeypatch.setattr(products, "kernel", products.torchs_kernel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    net = wide(nn.ReLU)
    used = []
    for rewrite in (recording.faster, None):
        monkeypatch.setattr(recording, "faster", rewrite)
        learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 8)))
        learner.backward(lambda: F.cross_entropy(net(torch.ones(80, 20)), torch.arange(80) % 10))
        codes = [p for captured in learner._captures[0]._kept for p in captured.programs.values()]
        assert codes
        used.append(any(small_product in code.point.__globals__.values() or code.turned for code in codes))
    assert used == [True, False]


def test_the_tanh_of_compiled_code() -> None:
    """Within 1.5 units in the last place, the tiny and the huge included."""
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.logspace(-30, 1, 10_001), -torch.logspace(-30, 1, 10_001)])
    exact = torch.tanh(x.double())
    unit = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(exact.abs().clamp_min(1e-37)))
    assert float(((compiled_tanh(x).double() - exact) / unit).abs().max()) < 1.5
    ends = compiled_tanh(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]))
    assert torch.equal(ends[[0, 1, 3]], torch.tensor([1.0, -1.0, 0.0]))
    assert bool(ends[2].isnan())
    assert compiled_tanh(x.double()) is NotImplemented
