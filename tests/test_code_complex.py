"""Steps as code under nudges around a circle in the complex plane, against the plain way.

The plain way runs the record on complex states and stays as the oracle. Where code cannot, or where the function is not
analytic, what the user gets, update or error, is the plain way's.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from two_ways import CHANGING, Box, Run, apart, batches, both, cross_entropy, hopfield, mlp, small, squared, trained

import lightning_ebm as ebm
from lightning_ebm.program.complex_ops import ComplexOperations


class Smooth(nn.Module):
    """A residual block whose one activation is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.second(self.act(self.first(x))))


class Tied(nn.Module):
    """One linear layer, twice, the second time as it was written to disk: from the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.out = nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.inner(x))
        return self.out(self.act(self.inner(hidden) + F.linear(hidden, self.inner.weight.t())))


class Products(nn.Module):
    """States that multiply each other, in batches of matrices, and a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out, self.act = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(4, 3), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.act(self.one(x)).view(-1, 2, 4), self.act(self.two(x)).view(-1, 2, 4)
        weights = (a @ b.transpose(1, 2)).softmax(-1)
        return self.out((weights @ b).mean(1) / (2 + a[:, 0] * b[:, 1]))


NETS: dict[str, Callable[[], nn.Module]] = {
    "tanh": mlp,
    "sigmoid": lambda: mlp(act=nn.Sigmoid),
    "dropout": lambda: mlp(nn.Dropout(0.4)),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ),
    "batch norm of the input": lambda: nn.Sequential(nn.BatchNorm1d(6), *mlp()),
    "residual": lambda: nn.Sequential(nn.Linear(6, 6), Smooth(), nn.Linear(6, 3)),
    "tied": Tied,
    "products": Products,
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(4, 4, 2),
        nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3),
    ),
    "images": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d((1, 3)),
        nn.Conv2d(4, 4, (1, 2), groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3),
    ),
}  # fmt: skip
RELAXERS = {
    "odd-even": ebm.FixedPoint(4),
    "synchronous": ebm.FixedPoint(4, order="synchronous", damping=0.3),
    "by tolerance": ebm.FixedPoint(50, tol=1e-6),
    "euler": ebm.GradientDescent(0.1, 5),
    "errors": ebm.ErrorCoordinates(max_steps=3, lr=0.2, tol=0.0),
}


def around(points: int = 4, **parts: object) -> ebm.Algorithm:
    return ebm.algorithm(hopfield(), **{"energy": ebm.Hopfield(0.3), "nudge": ebm.Holomorphic(0.2, points), **parts})


def same(make: Callable[[], nn.Module], algorithm: ebm.Algorithm, step=cross_entropy) -> None:
    difference, run = both(make, algorithm, step)
    assert difference < 1e-10
    assert run.is_coded, run.reasons


# ------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.crossed(2)
@pytest.mark.parametrize("points", [3, 4])
@pytest.mark.parametrize("net", NETS)
def test_both_ways_on_every_net(net: str, points: int) -> None:
    same(small(NETS[net]), around(points))


@pytest.mark.crossed(3)
@pytest.mark.parametrize("relaxer", RELAXERS)
@pytest.mark.parametrize("energy", [ebm.PredictiveCoding(2.0), ebm.FenchelYoung(), ebm.Hopfield(0.3)], ids=str)
@pytest.mark.parametrize("points", [2, 5])
def test_every_relaxer_and_energy(relaxer: str, energy: ebm.Energy, points: int) -> None:
    if relaxer == "errors" and not isinstance(energy, ebm.PredictiveCoding):
        pytest.skip("errors are those of a quadratic energy")
    same(small(mlp), around(points, energy=energy, relaxer=RELAXERS[relaxer], free_relaxer=None))


PRECISIONS = {
    "by layer": {"1": 2.0, "3": torch.tensor(0.5)},
    "by unit": torch.linspace(0.5, 2, 8, dtype=torch.float64),
}


@pytest.mark.parametrize("relaxer", ["odd-even", "euler", "errors"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_as_precisions(precision: str, relaxer: str) -> None:
    same(mlp, around(energy=ebm.PredictiveCoding(PRECISIONS[precision]), relaxer=RELAXERS[relaxer]))


class Quartic(ebm.Energy):
    """One of the user's own, analytic; its gradients are autograd's."""

    divergence = True

    def layer_energy(self, state: Tensor, layer: ebm.LayerView) -> Tensor:
        error = state - layer.prediction
        return error.square() + 0.3 * error**4 + 0.1 * error.square() * layer.drive.square()


def test_an_energy_of_the_users_own() -> None:
    same(mlp, around(energy=Quartic(), relaxer=ebm.GradientDescent(0.1, 5)))


def smoothed(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], label_smoothing=0.1)


def by_class(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))


def some_ignored(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    """Other ones in every batch, and in the first none."""
    return F.cross_entropy(
        net(batch[0]), batch[1].masked_fill(torch.arange(len(batch[1])) < torch.tensor(index % 3), -100)
    )


def probabilities(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    target = (torch.arange(3.0, dtype=torch.float64) + batch[1][:, None] * torch.tensor(index)).softmax(1)
    return F.cross_entropy(net(batch[0]), target)


def by_hand(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    outputs = torch.stack([net(batch[0]), 2 * net(batch[0])]).sum(0).log_softmax(1)
    return -outputs.gather(1, batch[1][:, None]).mean() + (net(batch[0]).sin() ** 3).mean()


@pytest.mark.parametrize(
    "step", [squared, smoothed, by_class, some_ignored, probabilities, by_hand], ids=lambda s: s.__name__
)
def test_every_loss(step) -> None:
    same(small(mlp), around(), step)


@pytest.mark.parametrize("last", [nn.Sigmoid, lambda: nn.Softmax(-1)], ids=["sigmoid", "softmax"])
def test_output_states(last: Callable[[], nn.Module]) -> None:
    same(small(lambda: nn.Sequential(*mlp(), last())), around(), squared)


@pytest.mark.parametrize("relaxer", [*RELAXERS])
def test_reports_are_those_of_the_plain_way(relaxer: str) -> None:
    reports = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = small(mlp)().double()
        algorithm = around(relaxer=RELAXERS[relaxer], free_relaxer=None, energy=ebm.PredictiveCoding())
        learner = ebm.Learner(net, algorithm, capture=capture)
        for x, y in batches()[:3]:
            learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        reports.append(learner.report)
    plain, fast = reports
    assert [p["steps"] for p in fast["phases"]] == [p["steps"] for p in plain["phases"]]
    for one, other in zip(fast["phases"], plain["phases"], strict=True):
        assert one["energies"] == pytest.approx(other["energies"], rel=1e-10)
        assert one["residual"] == pytest.approx(other["residual"], rel=1e-6, abs=1e-9)


# ------------------------------------------------------------------------------- what changes behind its back


def outcome(make: Callable[[], nn.Module], capture: bool, step=cross_entropy) -> Run | str:
    """What the steps came to, or the error that there is instead."""
    try:
        return trained(make, around(energy=ebm.Hopfield(0.1)), capture, step)
    except ebm.EBMError as error:
        return str(error)


@pytest.mark.crossed(4)
@pytest.mark.parametrize("step", CHANGING, ids=lambda step: step.__name__)
def test_no_change_from_batch_to_batch_is_missed(step) -> None:
    """As for real states; kinks, and functions of the real part alone, are errors either way."""
    plain, fast = outcome(small(Box), False, step), outcome(small(Box), True, step)
    if isinstance(plain, str) or isinstance(fast, str):
        assert fast == plain
        return
    assert apart(fast.updates, plain.updates) < 1e-10


REFUSED = {
    "relu": lambda: mlp(act=nn.ReLU),
    "batch norm": lambda: mlp(nn.BatchNorm1d(8)),
    "layer norm": lambda: mlp(nn.LayerNorm(8)),
}


@pytest.mark.parametrize("net", REFUSED)
def test_what_has_no_complex_form_is_the_same_error(net: str) -> None:
    plain, fast = outcome(REFUSED[net], False), outcome(REFUSED[net], True)
    assert isinstance(plain, str)
    assert fast == plain


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Hardsigmoid])
def test_a_kink_in_the_only_layer_is_an_error_too(activation: type[nn.Module], capture: bool) -> None:
    """No pass at other states runs the activation there: the layer's response alone does."""
    net = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))
    learner = ebm.Learner(net, "holomorphic-ep", capture=capture)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"analytic.*Centered"):
        learner.backward(lambda: F.cross_entropy(net(torch.ones(2, 4)), torch.arange(2)))


TARGET = torch.eye(3, dtype=torch.float64).repeat(2, 1)
REAL = {
    "norm": lambda hidden, out: (out - TARGET).norm() ** 2,
    "norm of each sample": lambda hidden, out: torch.linalg.vector_norm(out - TARGET, dim=1).mean(),
    "variance": lambda hidden, out: out.var(0).sum(),
    "deviation": lambda hidden, out: out.std(0).sum(),
    "absolute value": lambda hidden, out: F.l1_loss(out, TARGET),
    "distance": lambda hidden, out: F.pairwise_distance(out, TARGET).mean(),
    "of a hidden layer": lambda hidden, out: (out - TARGET).square().mean() + 0.01 * hidden.abs().mean(),
}


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("loss", REAL)
def test_what_is_real_at_complex_states_is_not_analytic(loss: str, capture: bool) -> None:
    """A norm takes the modulus of complex numbers: at a nudge of 1 the update was 60 % off, in silence."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    learner = ebm.Learner(net, "holomorphic-ep", capture=capture)

    def closure() -> torch.Tensor:
        hidden = net[:2](x)
        return REAL[loss](hidden, net[2:](hidden))

    for _ in range(3):  # a program that comes again runs as code, which asks nothing
        learner.relax(closure, nudge=0.1)
        with pytest.raises(ebm.UnsupportedModuleError, match=r"not an analytic function.*Centered"):
            learner.backward(closure)


def test_a_hidden_layer_that_is_real_at_complex_states_is_not_analytic() -> None:
    class Modulus(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.abs()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Modulus(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p *= 0.3
    x = torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"'4' is not an analytic function"):
        ebm.Learner(net, "holomorphic-ep").backward(lambda: (net(x) - TARGET).square().mean())


def test_a_square_is_analytic_where_the_norm_is_not() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    algorithm = ebm.algorithm(
        "holomorphic-ep", nudge=ebm.Holomorphic(0.1, points=8), relaxer=ebm.FixedPoint(500, tol=1e-12)
    )
    found = ebm.Learner(net, algorithm).gradients(lambda: (net(x) - TARGET).square().sum().sqrt() ** 2 / 18)
    truth = ebm.reference.equilibrium(net, lambda: (net(x) - TARGET).norm() ** 2 / 18, algorithm)
    assert ebm.metrics.alignment(found, truth)["relative_error"] < 1e-6


@pytest.mark.parametrize("capture", [True, False])
def test_rounding_is_not_taken_for_what_is_not_analytic(capture: bool) -> None:
    """Slopes through convolutions add many terms, and those that are nearly 0 have no digits to agree in."""
    made = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()]
        net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(256, 10)).to(dtype)
        x, y = torch.randn(16, 3, 8, 8, dtype=torch.float64).to(dtype), torch.arange(16) % 10
        learner = ebm.Learner(net, "holomorphic-ep", capture=capture)
        made[dtype] = learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
    for name, exact in made[torch.float64].items():
        assert float((made[torch.float32][name] - exact).abs().max()) < 5e-3 * float(exact.abs().max()), name


# ------------------------------------------------------------------------------------ functions, number for number


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["classes", "some ignored", "pixels"])
def test_cross_entropy_continued_is_torchs_on_the_real_axis(target: str, weighted: bool, reduction: int) -> None:
    """As it is recorded: a logarithm of softmax, and the negative log-likelihood of it."""
    torch.manual_seed(0)
    aten = torch.ops.aten
    x = torch.randn(6, 4, 2, 3, dtype=torch.float64) if target == "pixels" else torch.randn(6, 4, dtype=torch.float64)
    y = torch.randint(4, (6, 2, 3) if target == "pixels" else (6,))
    if target == "some ignored":
        y[::2] = -100
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    likelihood = aten.nll_loss2d_forward if target == "pixels" else aten.nll_loss_forward

    def of(x: Tensor) -> tuple[Tensor, Tensor]:
        return likelihood.default(aten._log_softmax.default(x, 1, False), y, weight, reduction, -100)  # type: ignore[no-any-return]

    with ComplexOperations():
        found = of(x.to(torch.complex128))
    for one, other in zip(found[: 1 if reduction == 0 else 2], of(x), strict=False):  # else torch gives no total
        torch.testing.assert_close(one.real, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_convolutions_of_complex_numbers_are_linear(transposed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 6, dtype=torch.complex128)
    weight, term = torch.randn(4, 4 if transposed else 2, 3, 3).double(), torch.randn(8 if transposed else 4).double()
    options = [2, 1], [1, 0], [1, 1], transposed, [1, 0] if transposed else [0, 0], 2

    def of(x: Tensor, term: Tensor | None) -> Tensor:
        return torch.ops.aten.convolution.default(x, weight, term, *options)  # type: ignore[no-any-return]

    with ComplexOperations():
        found = of(x, term if bias else None)
    torch.testing.assert_close(found, torch.complex(of(x.real, term if bias else None), of(x.imag, None)))
