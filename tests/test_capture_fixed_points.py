"""Captured best responses against the plain engine: Hopfield, Fenchel-Young and quadratic energies, all precisions.

The plain engine runs the user's code at every point and stays as the oracle; what is counted is what the machine is
asked to do, by a mode below autograd.
"""

from collections.abc import Callable

import pytest
import torch
from test_capture import (
    CAPTURED,
    EITHER,
    NETS,
    PLAIN,
    Box,
    Counting,
    Residual,
    apart,
    batches,
    both,
    cross_entropy,
    mlp,
    trained,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_ebm as ebm
from lightning_ebm.capture import products
from lightning_ebm.capture.elementwise import quick_tanh, quick_xlogx
from lightning_ebm.capture.tape import Tape


def small(make: Callable[[], nn.Module], gain: float = 0.5) -> Callable[[], nn.Module]:
    """Weights at which the map between the layers contracts: where it does not, rounding grows without bound."""

    def made() -> nn.Module:
        net = make()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter *= gain
        return net

    return made


def hopfield(**parts: object) -> ebm.Algorithm:
    given = {"nudge": ebm.Centered(0.25), "relaxer": ebm.FixedPoint(4), "free_relaxer": ebm.FixedPoint(6), **parts}
    return ebm.Algorithm(energy=ebm.Hopfield(), **given)  # type: ignore[arg-type]


def chain(act: Callable[[], nn.Module], last: Callable[[], nn.Module] = nn.Identity) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 3), last())


def squared(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return 0.5 * (net(batch[0]) - F.one_hot(batch[1], 3)).square().sum() / len(batch[0])


def captured(make: Callable[[], nn.Module], algorithm: ebm.Algorithm, step=cross_entropy) -> None:
    difference, captures = both(make, algorithm, step)
    assert captures.refused is None
    assert captures._used >= 6
    assert difference < 1e-12


# ------------------------------------------------------------------------------------------- the same numbers


NETS_THAT_SETTLE = {
    **{name: make for name, make in NETS.items() if name not in ("gelu", "prelu")},
    "residual": lambda: nn.Sequential(nn.Linear(6, 6), Residual(nn.Identity), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("net", NETS_THAT_SETTLE)
def test_centred_equilibrium_propagation_equals_the_plain_engine(net: str) -> None:
    """With weak feedback: batch normalisation makes up for small weights, so that these alone make no contraction."""
    captured(small(NETS_THAT_SETTLE[net], 0.3), ebm.algorithm(hopfield(), energy=ebm.Hopfield(0.1)))


@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardsigmoid, nn.ReLU, nn.LeakyReLU, nn.Sigmoid])
@pytest.mark.parametrize("last", [nn.Identity, nn.Hardsigmoid, lambda: nn.Softmax(-1)], ids=["", "hard", "softmax"])
def test_every_conjugate_pair_and_output_states(act: type[nn.Module], last: Callable[[], nn.Module]) -> None:
    captured(small(chain(act, last)), hopfield(), squared)


RELAXERS = {
    "odd-even": ebm.FixedPoint(5),
    "synchronous": ebm.FixedPoint(5, order="synchronous", damping=0.3),
    "by tolerance": ebm.FixedPoint(50, tol=1e-6),
    "accelerated": ebm.AcceleratedFixedPoint(5, tol=0.0),
    "anderson": ebm.Anderson(6, tol=0.0),
    "euler": ebm.GradientDescent(0.1, 5),
    "euler by tolerance": ebm.GradientDescent(0.3, 30, tol=1e-4),
}


@pytest.mark.parametrize("relaxer", RELAXERS)
@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardsigmoid])
def test_every_relaxer_on_a_bounded_energy(relaxer: str, act: type[nn.Module]) -> None:
    captured(small(chain(act)), hopfield(relaxer=RELAXERS[relaxer], free_relaxer=None))


@pytest.mark.parametrize("relaxer", ["odd-even", "synchronous", "accelerated", "anderson", "euler"])
@pytest.mark.parametrize("energy", [ebm.FenchelYoung(), ebm.PredictiveCoding(), ebm.Hopfield(0.3)], ids=str)
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.3), ebm.Centered(0.1)], ids=str)
def test_every_energy_and_nudge(energy: ebm.Energy, nudge: ebm.Nudge, relaxer: str) -> None:
    captured(small(mlp), ebm.Algorithm(energy, nudge, RELAXERS[relaxer]))


@pytest.mark.parametrize("nudge", [ebm.Coupled(0.1), ebm.Clamped(), ebm.RandomSign(0.1)], ids=str)
def test_held_outputs_and_random_signs(nudge: ebm.Nudge) -> None:
    make = small(chain(nn.Tanh))
    plain, *_ = trained(make, hopfield(nudge=nudge), False)
    fresh = ebm.RandomSign(0.1) if isinstance(nudge, ebm.RandomSign) else nudge
    fast, captures, _ = trained(make, hopfield(nudge=fresh), True)
    assert captures is not None
    assert captures.refused is None
    assert apart(fast, plain) < 1e-12


@pytest.mark.parametrize("start", ["zeros", "last-visit"])
def test_wherever_the_free_phase_starts(start: str) -> None:
    captured(small(mlp), hopfield(initial_state=start))


def test_the_free_phase_before_a_cross_derivative() -> None:
    captured(small(mlp), ebm.algorithm("recurrent-backprop", relaxer=ebm.FixedPoint(30)))


PRECISIONS = {
    "by layer": {"1": 2.0, "3": torch.tensor(0.5)},
    "by unit": torch.linspace(0.5, 2, 8, dtype=torch.float64),
    "of another type": torch.linspace(0.5, 2, 8),
    "learned": ebm.LearnedPrecision(0.3),
    "learned by unit": ebm.LearnedPrecision(0.3, per="unit"),
}


@pytest.mark.parametrize("relaxer", ["odd-even", "euler", "errors"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_as_precisions(precision: str, relaxer: str) -> None:
    """Learned ones move between the steps; those of a capture move with them."""
    relaxers = {**RELAXERS, "errors": ebm.ErrorCoordinates(max_steps=3, lr=0.2, tol=0.0)}
    results = []
    for capture in (False, True):
        given = PRECISIONS[precision]
        if isinstance(given, ebm.LearnedPrecision):
            given = ebm.LearnedPrecision(0.3, per=given.per)
        algorithm = ebm.Algorithm(ebm.PredictiveCoding(given), ebm.OneSided(0.5), relaxers[relaxer])
        updates, captures, _ = trained(mlp, algorithm, capture)
        results.append(updates)
    assert captures is not None
    assert captures.refused is None
    assert captures._used == 6
    assert apart(results[1], results[0]) < 1e-12


def test_reports_are_those_of_the_plain_engine() -> None:
    reports = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = small(mlp)().double()
        learner = ebm.Learner(net, hopfield(relaxer=ebm.FixedPoint(50, tol=1e-6)), capture=capture)
        for x, y in batches():
            learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        reports.append(learner.report)
    plain, fast = reports
    assert [p["steps"] for p in fast["phases"]] == [p["steps"] for p in plain["phases"]]
    for one, other in zip(fast["phases"], plain["phases"], strict=True):
        assert one["energies"] == pytest.approx(other["energies"], rel=1e-12)
        assert one["residual"] == pytest.approx(other["residual"], rel=1e-6, abs=1e-9)
    assert fast["energy_free"] == pytest.approx(plain["energy_free"], rel=1e-12)


def test_evaluation_at_the_free_equilibrium() -> None:
    """No loss there; batches of two sizes, dropout off, weights that moved in between."""
    outputs = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = small(NETS["dropout"])().double().eval()
        learner, found, runs = ebm.Learner(net, hopfield(), capture=capture), [], 0

        def run(x: Tensor, net: nn.Module = net) -> Tensor:
            nonlocal runs
            runs += 1
            return net(x)  # type: ignore[no-any-return]

        for x, _ in batches():
            with learner.free_phase(lambda x=x: run(x)), torch.no_grad():
                found.append(net(x))
            with torch.no_grad():
                net[0].weight *= 1.01
        outputs.append(found)
    assert learner._captures[-1].refused is None
    assert runs <= 4 + 2 + 2 * 3  # quietly at the predictions; to find layers; three kinds of code, captured twice
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(*outputs, strict=True))
    assert not torch.allclose(outputs[0][0], net(batches()[0][0]), atol=1e-3)


# ---------------------------------------------------------------------------------------------- the work done


def test_the_drive_of_the_input_once_and_one_product_for_the_contrast() -> None:
    """Half a sweep computes its own half only; no weight gradient but one, for both phases, of each weight."""
    net = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(5, 11), torch.arange(5) % 3
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        return 0.5 * (net(x) - F.one_hot(y, 3)).square().sum() / 5

    learner = ebm.Learner(net, hopfield(), output="state")
    learner.backward(closure)
    runs = 0
    with Counting() as counting:
        learner.backward(closure)
    assert runs == 2  # at the predictions, quietly, and as the user's own at the free equilibrium
    shapes = counting.shapes
    assert shapes.count((5, 11, 8)) == 1  # the second pass has it from the first
    assert shapes.count((8, 5, 11)) == 1  # the input is the same in both phases
    assert shapes.count((9, 10, 8)) == shapes.count((3, 10, 9)) == 1  # all others: two batches of 5, stacked
    free, nudged, energies = 6, 4, 4  # both signs sweep as one batch
    for up, down in (((8, 9), (9, 8)), ((9, 3), (3, 9))):
        assert shapes.count((5, *up)) == free + energies + 2
        assert shapes.count((5, *down)) == free
        assert shapes.count((10, *up)) == shapes.count((10, *down)) == nudged
    assert len(shapes) == 1 + 3 + 2 * (2 * (free + nudged) + energies + 2)


# ------------------------------------------------------------------------------- what changes behind its back


@pytest.mark.parametrize("step", [*CAPTURED, *PLAIN, *EITHER], ids=lambda step: step.__name__)
def test_no_change_from_batch_to_batch_is_missed(step) -> None:
    """As for forces; here the user's own pass is the second of the step, and has its products from the first."""
    algorithm = ebm.algorithm(hopfield(), energy=ebm.Hopfield(0.1))
    difference, captures = both(small(Box), algorithm, step)
    assert difference < 1e-12
    if step in PLAIN:
        assert PLAIN[step] in (captures.refused or "")
    else:
        assert captures.refused is None


def written_before_and_after(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    """The first product is of the batch as it came, the second of the same tensor written to since."""
    x = batch[0].clone()
    before = x @ net[0].weight.detach().t()
    x.mul_(2.0)
    return F.cross_entropy(net[1:](before + net[0](x)), batch[1])


def test_a_tensor_written_to_is_multiplied_again() -> None:
    difference, captures = both(small(mlp), hopfield(), written_before_and_after)
    assert difference < 1e-12
    assert captures.refused is None


# -------------------------------------------------------------------------------------------- faster operations


def test_quick_activations_keep_their_digits() -> None:
    """Against float64 over thirteen orders of magnitude: relative error, small arguments included."""
    x = torch.cat([torch.logspace(-12, 1.5, 4001, dtype=torch.float64), torch.tensor([88.0, 1e4], dtype=torch.float64)])
    x = torch.cat([x, -x]).float()
    expected = torch.tanh(x.double())
    eps = torch.finfo(torch.float32).eps
    assert float(((quick_tanh(x).double() - expected) / expected).abs().max()) < 3 * eps
    assert quick_tanh(torch.zeros(1)) == 0
    p = torch.linspace(0, 2, 4001)
    expected = torch.xlogy(p.double(), p.double())
    assert float((quick_xlogx(p).double() - expected).abs().max()) < 2 * eps


class Viewing(nn.Module):
    """`view` needs tensors that lie in memory as its own layers would have made them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(32, 16, 3, stride=2), nn.Tanh()
        )  # fmt: skip
        self.out = nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.convs(x)
        assert hidden.is_contiguous()
        return self.out(hidden.view(len(x), -1))


def viewing_gradients(dtype: torch.dtype, capture: bool) -> tuple[dict[str, Tensor], ebm.Learner]:
    torch.manual_seed(0)
    net = Viewing().to(dtype)
    x, y = torch.randn(8, 3, 16, 16, dtype=torch.float64).to(dtype), torch.arange(8)
    learner = ebm.Learner(net, hopfield(), capture=capture)
    for _ in range(2):
        found = learner.gradients(lambda: F.cross_entropy(net(x), y))
    return {name: g.double() for name, g in found.items()}, learner


def test_images_in_captured_code_are_nearer_to_float64_than_the_plain_way() -> None:
    """Nearer, as the phases' states are subtracted before the product with the input, not the products afterwards."""
    exact, _ = viewing_gradients(torch.float64, False)
    plain, _ = viewing_gradients(torch.float32, False)
    fast, learner = viewing_gradients(torch.float32, True)
    captures = learner._captures[0]
    assert captures.refused is None
    for name, value in exact.items():
        scale = value.abs().max()
        assert float((fast[name] - value).abs().max() / scale) < 5e-5
        assert float((plain[name] - value).abs().max() / scale) < 2e-2


def test_the_slope_of_a_convolution_of_any_shape() -> None:
    """Strides, dilations, groups and sizes that do not divide: the slope of the input is a convolution of its own."""

    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(),
            nn.Conv2d(6, 4, 2, dilation=2), nn.Tanh(), nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1),
            nn.Flatten(), nn.LazyLinear(3),
        )  # fmt: skip

    def made() -> nn.Module:
        whole = net()
        whole(torch.zeros(1, 1, 8, 7))
        return whole

    def step(module: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        image = F.pad(batch[0], (0, 50)).view(-1, 1, 8, 7)
        return F.cross_entropy(module(image), batch[1])

    captured(small(made), hopfield(), step)


class Signs(TorchDispatchMode):
    """Counts changes of sign of more than a number."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.neg.default and result.ndim > 0
        return result


@pytest.mark.parametrize("last", [nn.Identity, nn.Hardsigmoid], ids=["read-out", "state"])
def test_the_pull_of_the_loss_changes_its_sign_once_a_phase(last: Callable[[], nn.Module]) -> None:
    """A pull is minus a slope: the nudge carries the sign, not a tensor of every sweep."""
    net, (x, y) = small(chain(nn.Tanh, last))().double(), batches()[0]
    learner = ebm.Learner(net, hopfield())

    def closure() -> Tensor:
        return F.cross_entropy(net(x), y)

    learner.gradients(closure)
    step = learner.begin(closure)
    with step.first_pass():
        loss = closure()
    with Signs() as signs:
        step.surrogate(loss)
    assert signs.count == 0


@pytest.mark.parametrize("bias", [True, False])
def test_the_quiet_pass_multiplies_by_the_faster_library(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes to the same, up to rounding; what is small, or of other types, it leaves alone."""
    monkeypatch.setattr(products, "available", lambda: True)
    torch.manual_seed(0)
    layer = nn.Linear(300, 64, bias=bias)
    for x in (torch.randn(80, 300), torch.randn(2, 300), torch.randn(2, 40, 300)):
        with Tape(products.QUICK_PRODUCTS) as tape:
            got = layer(x)
        assert [str(node.func) for node in tape.nodes].count("aten.addmm.default" if bias else "aten.mm.default") == 1
        assert torch.allclose(got, layer(x), rtol=0, atol=1e-5)
        assert torch.autograd.grad(got.sum(), layer.weight)[0].shape == (64, 300)
    exact = layer.double(), torch.randn(80, 300, dtype=torch.float64)
    with Tape(products.QUICK_PRODUCTS):
        got = exact[0](exact[1])
    assert torch.equal(got, exact[0](exact[1]))
    for scales in ({"beta": 2}, {"alpha": 0.5}):
        x, w, b = torch.randn(80, 300), torch.randn(300, 64), torch.randn(64)
        with Tape(products.QUICK_PRODUCTS):
            got = torch.addmm(b, x, w, **scales)
        assert torch.equal(got, torch.addmm(b, x, w, **scales))
