"""Beside the one pass: writes that autograd does not see, other threads, iterators, generators, buffers."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_other_gradients import EXACT, FINITE, Net, X, Y, farthest, fit
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm


class GaussianLoss(Net):
    """torch's own loss clamps a copy of the variance while gradients are off."""

    def training_step(self, batch, index):
        mean, variance, _ = self.net(batch[0]).unbind(1)
        return F.gaussian_nll_loss(mean, batch[0][:, 0], 0.1 * variance.exp(), eps=0.1)


class Clamped(Net):
    """A straight-through clamp and a scale between two layers."""

    def training_step(self, batch, index):
        hidden = 2.0 * self.net[:2](batch[0])
        with torch.no_grad():
            hidden.clamp_(-0.5, 0.7).mul_(hidden.abs() + 0.1)
        return F.cross_entropy(self.net[2:](hidden), batch[1])


@pytest.mark.parametrize("make", [GaussianLoss, Clamped])
@pytest.mark.parametrize("capture", [True, False])
def test_writes_that_autograd_does_not_see_keep_their_slope(make, capture):
    stock = fit(make)
    assert farthest(stock, fit(make, ebm.EBMStrategy(EXACT, capture=capture))) < 1e-12


class Langevin(Net):
    """Samples kept from step to step move by their slopes, written where autograd does not look."""

    def __init__(self):
        super().__init__()
        self.kept = X[:8].clone()

    def moved(self, samples):
        for _ in range(2):
            (slope,) = torch.autograd.grad(self.net(samples).square().sum(), samples)
            samples.data.add_(0.1 * slope).clamp_(-2, 2)
        return samples.detach()

    def training_step(self, batch, index):
        samples = self.moved(self.kept[: len(batch[0])].clone().requires_grad_())
        self.kept[: len(samples)] = samples
        return F.cross_entropy(self.net(batch[0]), batch[1]) + self.net(samples).square().mean()


class LangevinByBackward(Langevin):
    def moved(self, samples):
        for _ in range(2):
            self.net(samples).square().sum().backward()
            with torch.no_grad():
                samples.add_(0.1 * samples.grad)
            samples.grad.detach_().zero_()
        self.zero_grad()
        return samples.detach()


class LangevinAndPenalty(Langevin):
    """The slope at where a sample has gone to is part of the loss."""

    def training_step(self, batch, index):
        samples = (2 * batch[0]).requires_grad_()
        samples.data.mul_(0.5).add_(self.moved(batch[0].clone().requires_grad_()))
        (slope,) = torch.autograd.grad(self.net(samples).sum(), samples, create_graph=True)
        return F.cross_entropy(self.net(samples), batch[1]) + slope.square().sum(1).mean()


@pytest.mark.parametrize("make", [Langevin, LangevinByBackward, LangevinAndPenalty])
@pytest.mark.parametrize("capture", [True, False])
def test_a_leaf_that_the_step_has_made_may_be_written_to(make, capture):
    stock = fit(make)
    assert farthest(stock, fit(make, ebm.EBMStrategy(EXACT, capture=capture))) < 1e-12


def test_they_are_repeated_at_other_states():
    """pc-nudge tends to autograd's gradient with the nudge, and code is the plain way."""
    module = Clamped()
    batch = X[:8], Y[:8]

    def off(strength, capture):
        algorithm = ebm.algorithm("error-pc", nudge=ebm.OneSided(strength), relaxer=ebm.ErrorCoordinates(30))
        learner = ebm.Learner(module, algorithm, capture=capture)
        for _ in range(2):
            found = learner.gradients(lambda: module.training_step(batch, 0))
        wanted = torch.autograd.grad(module.training_step(batch, 0), list(module.parameters()))
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found.values(), wanted, strict=True))

    one, other = off(1e-3, True), off(1e-4, True)
    assert 8 < one / other < 12
    assert abs(off(1e-3, False) - one) < 1e-9


def test_a_module_may_be_called_by_another_thread_while_a_step_is_recorded():
    module = Net()
    net = module.net
    wanted = net(X).detach()
    learner = ebm.Learner(net, EXACT)
    errors, stop = [], threading.Event()

    def serve():
        while not stop.is_set():
            try:
                if not torch.equal(net(X), wanted):
                    errors.append("differs")
            except Exception as error:
                errors.append(repr(error))

    thread = threading.Thread(target=serve)
    thread.start()
    found = [learner.gradients(lambda: F.cross_entropy(net(X), Y)) for _ in range(20)]
    stop.set()
    thread.join()
    assert not errors
    true = torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.parameters()))
    for one in found:
        for a, b in zip(one.values(), true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("algorithm", [EXACT, "equilibrium-propagation"])
def test_what_another_thread_has_computed_for_the_step_is_refused_by_that_name(algorithm):
    module = Net()

    def closure():
        with ThreadPoolExecutor() as pool:
            first, second = pool.map(module.net, (X, 2 * X))
        return F.cross_entropy(first + second, Y)

    with pytest.raises(ebm.UnsupportedModuleError, match=r"by another thread.*in its own thread"):
        ebm.Learner(module, algorithm).gradients(closure)


class Drawing(Net):
    source = staticmethod(itertools.count)

    def __init__(self):
        super().__init__()
        self.held, self.seen = type(self).source(), []

    def training_step(self, batch, index):
        self.seen.append(self.draw())
        return self.loss(batch)

    def draw(self):
        return next(self.held)


class OfGenerator(Drawing):
    source = staticmethod(lambda: (k for k in range(100)))


class OfNumPy(Drawing):
    source = staticmethod(lambda: np.random.RandomState(0))

    def draw(self):
        return self.held.rand()


@pytest.mark.parametrize("make", [Drawing, OfGenerator])
def test_an_iterator_is_not_drawn_from_twice(make):
    stock = fit(make)
    assert fit(make, ebm.EBMStrategy(FINITE)).seen == stock.seen
    module = make()
    held = module.held
    with pytest.raises(ebm.UnsupportedModuleError, match="'held'"):
        fit(lambda: module, ebm.EBMStrategy("equilibrium-propagation"))
    assert module.held is held
    assert next(held) == 0


def test_generators_of_numpy_go_on_as_under_stock():
    assert fit(OfNumPy, ebm.EBMStrategy("equilibrium-propagation")).seen == fit(OfNumPy).seen


def test_an_operation_without_a_second_derivative_is_named():
    net = Net().net
    net[1], net[3] = nn.Hardsigmoid(), nn.Hardsigmoid()
    learner = ebm.Learner(net, "infinitesimal")
    with pytest.raises(ebm.UnsupportedModuleError, match=r"hardsigmoid_backward.*nn\.Hardtanh"):
        learner.gradients(lambda: F.cross_entropy(net(X), Y))


def has_second_derivative(function) -> bool:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    try:
        torch.autograd.functional.hvp(function, x, torch.ones_like(x))
    except RuntimeError as error:
        if "not implemented" not in str(error) and "not differentiable" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("operation", ["hardsigmoid", "cdist"])
def test_a_spectrum_that_needs_one_names_it_too(operation):
    net = Net().net
    if operation == "hardsigmoid":
        net[1], net[3] = nn.Hardsigmoid(), nn.Hardsigmoid()
    others = torch.randn(5, 3, dtype=torch.float64)
    if operation == "cdist" and has_second_derivative(lambda x: torch.cdist(x, others).square().sum()):
        pytest.skip("this release of torch has it")
    with pytest.raises(ebm.UnsupportedModuleError, match=rf"\(\S*{operation}_backward\).*eigenvalues"):
        ebm.Learner(net).spectrum(lambda: torch.cdist(net(X), others).mean(1).square().mean(), nudge=1.0)


def test_nan_that_the_step_makes_is_not_the_fault_of_the_buffers_it_spoils():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(6).double())

        def training_step(self, batch, index):
            return F.cross_entropy(self.net((batch[0] - 9).log()), batch[1])

    with pytest.raises(ebm.RelaxationDivergedError, match=r"The loss of the forward pass is nan"):
        fit(Normed, ebm.EBMStrategy(FINITE))


def test_a_step_of_an_optimizer_that_calls_its_closure_relaxes_at_every_call():
    """As plain LBFGS, which evaluates the loss up to four times a step."""
    stock, net = Net().net, Net().net
    plain, ours = (torch.optim.LBFGS(one.parameters(), lr=0.3, max_iter=4) for one in (stock, net))
    learner, calls = ebm.Learner(net, EXACT), []

    def by_autograd():
        plain.zero_grad()
        loss = F.cross_entropy(stock(X), Y)
        loss.backward()
        return loss

    def closure():
        calls.append(1)
        return F.cross_entropy(net(X), Y)

    for _ in range(3):
        torch.testing.assert_close(learner.step(closure, ours), plain.step(by_autograd).detach())
    assert len(calls) > 6
    assert farthest(stock, net) < 1e-12


def nothing_in(kind):
    """A module whose every third batch, the first among them, has nothing to learn from."""

    class Skips(Net):
        def training_step(self, batch, index):
            return kind(self) if index % 3 == 0 else super().training_step(batch, index)

    return Skips


NOTHING = {
    "a leaf": lambda net: torch.zeros((), requires_grad=True),
    "of one element": lambda net: torch.tensor([0.0], requires_grad=True),
    "computed": lambda net: 3 * torch.zeros(2, requires_grad=True).sum(),
    "of all parameters": lambda net: sum(0 * p.sum() for p in net.parameters()),
    "of the network": lambda net: 0 * net.net(X[:2]).sum(),
}
"""How losses say so: those of detection, where no target is left, and where DDP is to find every parameter used."""


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("capture", [True, False])
def test_a_loss_of_zero_without_layers_has_nothing_to_learn_from_as_in_stock(name, capture):
    stock = fit(nothing_in(NOTHING[name]))
    assert farthest(stock, fit(nothing_in(NOTHING[name]), ebm.EBMStrategy(EXACT, capture=capture))) < 1e-12


@pytest.mark.parametrize("strategy", ["pc-nudge", "predictive-coding"])
def test_under_other_rules_it_moves_no_parameter(strategy):
    class Only(nothing_in(NOTHING["a leaf"])):
        def training_step(self, batch, index):
            return super().training_step(batch, 0)

    before = {name: p.detach().clone() for name, p in Only().named_parameters()}
    after = dict(fit(Only, ebm.EBMStrategy(strategy)).named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_loss_that_was_wrapped_anew_is_refused():
    """Its number is that of the loss, and nothing of the network hangs on it."""
    with pytest.raises(ebm.LayerDiscoveryError, match="values computed before"):
        fit(nothing_in(lambda net: torch.tensor(0.7, requires_grad=True)), ebm.EBMStrategy(EXACT))
