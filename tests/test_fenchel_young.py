"""Lifted networks: the Fenchel-Young gap G(x) + G*(a) - <x, a> as an energy of divergence type."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracles import Gradients, Problem, fitted_slope, make_problem, relative_error, worst_relative_error
from oracles_activations import ALL
from oracles_fenchel_young import internal_energy, settle, update
from oracles_hopfield import Hopfield, make_hopfield_net
from torch import Tensor, nn

import lightning_ebm as ebm

torch.set_num_threads(1)

EVERY = pytest.mark.parametrize("name", list(ALL))
OUTPUTS = pytest.mark.parametrize("output", ["readout", "state"])


def fenchel_young(lam: float) -> ebm.Algorithm:
    """The call, in one place: a single phase by fixed-point sweeps, contracting for the weak weights used here."""
    return ebm.Algorithm(energy=ebm.FenchelYoung(), nudge=ebm.OneSided(lam), relaxer=ebm.FixedPoint(60))


def library_gap(activation: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    """The energy of one layer, per sample: the call, in one place."""
    layer = SimpleNamespace(name="0", drive=a, activation=activation, prediction=activation(a))
    return ebm.FenchelYoung().layer_energy(x, layer).reshape(len(x), -1).sum(1)


def make(name: str) -> nn.Sequential:
    return make_hopfield_net((4, 6, 6, 5, 3), ALL[name][0], gain=0.4)


def learn(net: nn.Module, problem: Problem, lam: float, output: str) -> tuple[Gradients, dict]:
    layers = [str(i) for i, module in enumerate(net) if not isinstance(module, nn.Linear)]
    learner = ebm.Learner(net, fenchel_young(lam), layers=layers, output=output, loss_reduction=problem.reduction)
    return learner.gradients(lambda: problem.loss(net(problem.x), problem.y)), learner.report


def true_gradient(net: nn.Module, problem: Problem) -> Gradients:
    names, tensors = zip(*net.named_parameters(), strict=True)
    found = torch.autograd.grad(problem.loss(net(problem.x), problem.y), tensors)
    return dict(zip(names, found, strict=True))


def points(name: str) -> tuple[Tensor, Tensor]:
    """States in the range of the activation, also on its boundary, and unrelated drives."""
    generator = torch.Generator().manual_seed(4)
    source, a = (2 * torch.randn(40, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return ALL[name][1].rho(source), a


@EVERY
def test_the_gap_is_the_sum_of_the_two_potentials(name: str) -> None:
    """Number for number: a constant may move from G to G*, but not leave the sum."""
    x, a = points(name)
    torch.testing.assert_close(library_gap(ALL[name][0](), x, a), ALL[name][1].gap(x, a), rtol=1e-9, atol=1e-12)


@EVERY
def test_the_gap_is_positive_and_zero_at_the_prediction(name: str) -> None:
    """Catches a G and a G* that are no pair: the gap is then negative somewhere, or not zero at x = rho(a)."""
    activation, (x, a) = ALL[name][0](), points(name)
    assert library_gap(activation, x, a).min() > 1e-3
    assert library_gap(activation, activation(a), a).abs().max() < 1e-12


@EVERY
def test_the_gap_is_the_distance_to_the_supremum(name: str) -> None:
    """G* by brute force: no state on a fine grid (of one unit; of the simplex for softmax) gives a negative gap,
    and the best comes within the grid's spacing of zero.
    """
    activation = ALL[name][0]()
    if name == "softmax":
        share = torch.linspace(0, 1, 2001, dtype=torch.float64)
        grid = torch.stack([share, 1 - share], 1)
        drives = torch.tensor([[0.3, -0.5], [2.0, 2.0], [-4.0, 1.0]], dtype=torch.float64)
    else:
        grid = activation(torch.linspace(-8, 8, 4001, dtype=torch.float64))[:, None]
        drives = torch.tensor([[-2.3], [-0.4], [0.0], [0.7], [1.9]], dtype=torch.float64)
    for drive in drives:
        gaps = library_gap(activation, grid, drive.expand_as(grid).clone())
        assert gaps.min() > -1e-12
        assert gaps.min() < 1e-4


@EVERY
@OUTPUTS
def test_settled_update_is_the_hand_written_one(name: str, output: str) -> None:
    """At finite lambda: catches a feedback x_{l+1} - rho(a_{l+1}) without its second half (Hopfield's)."""
    net, problem, lam = make(name), make_problem("half-mse-sum"), 0.1
    chain = Hopfield.copy_of(net, output)
    states = settle(chain, problem, lam)
    found, report = learn(net, problem, lam, output)
    assert worst_relative_error(found, update(chain, problem, states, lam)) < 1e-8
    output_value = states[-1] if output == "state" else states[-1] @ net[-1].weight.T + net[-1].bias
    total = internal_energy(chain, problem, states) + lam * problem.loss(output_value, problem.y).item()
    assert report["energy_nudged"] == pytest.approx(total, rel=1e-8)
    assert report["energy_free"] == pytest.approx(0.0, abs=1e-12)  # the free phase is the forward pass


@EVERY
@OUTPUTS
@pytest.mark.parametrize("loss_name", ["half-mse-mean", "cross-entropy-mean"])
def test_one_phase_tends_to_backprop(name: str, output: str, loss_name: str) -> None:
    """Divergence type: backprop + O(lambda), kinks and all, with no derivative of rho anywhere in the rule."""
    net, problem, lambdas = make(name), make_problem(loss_name), [1e-4, 1e-3, 1e-2]
    errors = [relative_error(learn(net, problem, lam, output)[0], true_gradient(net, problem)) for lam in lambdas]
    assert fitted_slope(lambdas, errors) == pytest.approx(1.0, abs=0.05), errors
