"""Captured steps under nudges around a circle in the complex plane, against the plain engine.

The plain engine runs the user's code on complex states and stays as the oracle; the captured one carries out the record
of a real pass in complex arithmetic. Where it cannot, or where the function is not analytic, what the user gets, update
or error, is the plain engine's.
"""

from collections.abc import Callable

import pytest
import torch
from test_capture import (
    CAPTURED,
    EITHER,
    PLAIN,
    Box,
    Counting,
    apart,
    batches,
    both,
    cross_entropy,
    mlp,
    trained,
)
from test_capture_fixed_points import hopfield, small
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.capture import parts
from lightning_ebm.capture.captures import Captures
from lightning_ebm.promotion import _cross_entropy


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


def captured(make: Callable[[], nn.Module], algorithm: ebm.Algorithm, step=cross_entropy) -> None:
    difference, captures = both(make, algorithm, step)
    assert captures.refused is None
    assert captures._used >= 6
    assert any(mode.continued for kept in captures._kept for mode in kept.programs)
    assert difference < 1e-12


# ------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("points", [3, 4])
@pytest.mark.parametrize("net", NETS)
def test_equals_the_plain_engine(net: str, points: int) -> None:
    captured(small(NETS[net]), around(points))


@pytest.mark.parametrize("relaxer", RELAXERS)
@pytest.mark.parametrize("energy", [ebm.PredictiveCoding(2.0), ebm.FenchelYoung(), ebm.Hopfield(0.3)], ids=str)
@pytest.mark.parametrize("points", [2, 5])
def test_every_relaxer_and_energy(relaxer: str, energy: ebm.Energy, points: int) -> None:
    if relaxer == "errors" and not isinstance(energy, ebm.PredictiveCoding):
        pytest.skip("errors are those of a quadratic energy")
    difference, captures = both(small(mlp), around(points, energy=energy, relaxer=RELAXERS[relaxer], free_relaxer=None))
    assert captures.refused is None
    assert captures._used >= 6
    assert difference < 1e-12


PRECISIONS = {
    "by layer": {"1": 2.0, "3": torch.tensor(0.5)},
    "by unit": torch.linspace(0.5, 2, 8, dtype=torch.float64),
}


@pytest.mark.parametrize("relaxer", ["odd-even", "euler", "errors"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_as_precisions(precision: str, relaxer: str) -> None:
    captured(mlp, around(energy=ebm.PredictiveCoding(PRECISIONS[precision]), relaxer=RELAXERS[relaxer]))


class Quartic(ebm.Energy):
    """One of the user's own, analytic; its gradients are autograd's."""

    divergence = True

    def layer_energy(self, state: Tensor, layer: ebm.LayerView) -> Tensor:
        error = state - layer.prediction
        return error.square() + 0.3 * error**4 + 0.1 * error.square() * layer.drive.square()


def test_an_energy_of_the_users_own() -> None:
    captured(mlp, around(energy=Quartic(), relaxer=ebm.GradientDescent(0.1, 5)))


def squared(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return F.mse_loss(net(batch[0]), F.one_hot(batch[1], 3).double())


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
    captured(small(mlp), around(), step)


@pytest.mark.parametrize("last", [nn.Sigmoid, lambda: nn.Softmax(-1)], ids=["sigmoid", "softmax"])
def test_output_states(last: Callable[[], nn.Module]) -> None:
    captured(small(lambda: nn.Sequential(*mlp(), last())), around(), squared)


@pytest.mark.parametrize("relaxer", [*RELAXERS])
def test_reports_are_those_of_the_plain_engine(relaxer: str) -> None:
    reports = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = small(mlp)().double()
        algorithm = around(relaxer=RELAXERS[relaxer], free_relaxer=None, energy=ebm.PredictiveCoding())
        learner = ebm.Learner(net, algorithm, capture=capture)
        for x, y in batches():
            learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        reports.append(learner.report)
    plain, fast = reports
    assert [p["steps"] for p in fast["phases"]] == [p["steps"] for p in plain["phases"]]
    for one, other in zip(fast["phases"], plain["phases"], strict=True):
        assert one["energies"] == pytest.approx(other["energies"], rel=1e-12)
        assert one["residual"] == pytest.approx(other["residual"], rel=1e-6, abs=1e-9)


# ------------------------------------------------------------------------------- what changes behind its back


def outcome(
    make: Callable[[], nn.Module], capture: bool, step=cross_entropy
) -> tuple[list[dict[str, Tensor]] | str, Captures | None]:
    """The updates, or the error that there is instead."""
    try:
        updates, captures, _ = trained(make, around(energy=ebm.Hopfield(0.1)), capture, step)
    except ebm.EBMError as error:
        return str(error), None
    return updates, captures


@pytest.mark.parametrize("step", [*CAPTURED, *PLAIN, *EITHER], ids=lambda step: step.__name__)
def test_no_change_from_batch_to_batch_is_missed(step) -> None:
    """As for real states; kinks, and functions of the real part alone, are errors either way."""
    plain, fast = outcome(small(Box), False, step), outcome(small(Box), True, step)
    if isinstance(plain[0], str) or isinstance(fast[0], str):
        assert fast[0] == plain[0]
        return
    assert apart(fast[0], plain[0]) < 1e-12
    assert fast[1] is not None
    assert (fast[1].refused is not None) is (step in PLAIN)


REFUSED = {
    "relu": lambda: mlp(act=nn.ReLU),
    "batch norm": lambda: mlp(nn.BatchNorm1d(8)),
    "layer norm": lambda: mlp(nn.LayerNorm(8)),
}


@pytest.mark.parametrize("net", REFUSED)
def test_what_has_no_complex_form_is_the_same_error(net: str) -> None:
    plain, fast = outcome(REFUSED[net], False), outcome(REFUSED[net], True)
    assert isinstance(plain[0], str)
    assert fast[0] == plain[0]


def of_the_real_part(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1]) + (net(batch[0]).real ** 2).mean()


def test_what_is_not_analytic_is_an_error_in_every_step() -> None:
    """Nothing in the record of real states tells; the plain check does, as often as it is asked."""
    learner = ebm.Learner(mlp().double(), around())
    x, y = batches()[0]
    for _ in range(2):
        with pytest.raises(ebm.UnsupportedModuleError, match="analytic"):
            learner.gradients(lambda: of_the_real_part(learner.module, (x, y), 0))


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Hardsigmoid])
def test_a_kink_in_the_only_layer_is_an_error_too(activation: type[nn.Module], capture: bool) -> None:
    """No pass at other states runs the activation there: the layer's response alone does."""
    net = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))
    learner = ebm.Learner(net, "holomorphic-ep", capture=capture)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"analytic.*Centered"):
        learner.backward(lambda: F.cross_entropy(net(torch.ones(2, 4)), torch.arange(2)))


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
        assert not capture or learner._captures[0].refused is None
    for name, exact in made[torch.float64].items():
        assert float((made[torch.float32][name] - exact).abs().max()) < 5e-3 * float(exact.abs().max()), name


# ---------------------------------------------------------------------------------------------- the work done


def test_real_weights_are_not_multiplied_as_complex_ones() -> None:
    """Each product with a weight is two real ones, the gradient of a weight two or, stacked, one for all phases.

    The two real phases sweep as one batch.
    """
    net = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(5, 11), torch.arange(5) % 3
    learner = ebm.Learner(net, around(relaxer=ebm.FixedPoint(4), free_relaxer=ebm.FixedPoint(6)), output="state")

    def closure() -> Tensor:
        return 0.5 * (net(x) - F.one_hot(y, 3)).square().sum() / 5

    learner.backward(closure)
    with Counting() as counting:
        learner.backward(closure)
    shapes = counting.shapes
    assert shapes.count((5, 11, 8)) == 1
    sweeps, energies = 6 + 2 * 4, 2 + 2 + 2 * 2  # the complex start is another tensor than the real one
    assert shapes.count((5, 9, 8)) == sweeps
    assert shapes.count((5, 8, 9)) == sweeps + energies + 2
    assert shapes.count((10, 9, 8)) == shapes.count((10, 8, 9)) == 4
    assert shapes.count((8, 5, 11)) == 1 + 1  # real phases, and the complex one, of which the real part counts
    assert shapes.count((9, 10, 8)) == 1
    assert shapes.count((9, 5, 8)) == 2


# ------------------------------------------------------------------------------------ functions, number for number


FUNCTIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp, "log": torch.log}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_both_parts(name: str, dtype: torch.dtype) -> None:
    """Against torch's in double precision, saturated arguments included."""
    torch.manual_seed(0)
    x, y = 4 * torch.randn(2, 4001, dtype=dtype)
    if name in ("tanh", "sigmoid"):
        x = torch.cat([x, torch.tensor([0.0, 50.0, -50.0, 700.0, -700.0], dtype=dtype)])
        y = torch.cat([y, torch.tensor([0.0, 1.0, 2.0, 3.0, -3.0], dtype=dtype)])
    expected = FUNCTIONS[name](torch.complex(x.double(), y.double()))
    real, imaginary = getattr(parts, name)(x, y)
    error = (torch.complex(real.double(), imaginary.double()) - expected).abs() / expected.abs().clamp_min(1.0)
    assert float(error.max()) < 300 * torch.finfo(dtype).eps  # 40 next to a pole, where the function is steep


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["classes", "some ignored", "probabilities", "pixels"])
def test_cross_entropy_continued_is_torchs_on_the_real_axis(
    target: str, weighted: bool, smoothing: float, reduction: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 2, dtype=torch.float64) if target == "pixels" else torch.randn(6, 4, dtype=torch.float64)
    classes = torch.randint(4, (6, 2) if target == "pixels" else (6,))
    if target == "some ignored":
        classes[::2] = -100
    y = torch.rand(6, 4, dtype=torch.float64).softmax(1) if target == "probabilities" else classes
    options = {"weight": torch.rand(4, dtype=torch.float64)} if weighted else {}
    options |= {"label_smoothing": smoothing, "reduction": reduction}  # type: ignore[dict-item]
    expected = F.cross_entropy(x, y, **options)  # type: ignore[arg-type]
    found = _cross_entropy(x.to(torch.complex128), y, **options)
    torch.testing.assert_close(found.real, expected, rtol=1e-13, atol=1e-13)
    if target != "probabilities" and not smoothing:
        from lightning_ebm.capture.continuation import _nll

        numbers = {"none": 0, "mean": 1, "sum": 2}
        again = _nll(x.log_softmax(1), y, options.get("weight"), numbers[reduction])
        torch.testing.assert_close(again, expected, rtol=1e-13, atol=1e-13)
