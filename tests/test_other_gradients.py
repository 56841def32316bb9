"""Gradients that a module takes beside the Trainer's: none of them trains by backprop in silence.

The oracle of what is right is a stock Trainer; of what would be silent, that lambda = 1 ends where stock ends.
"""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm
from lightning_ebm.program.recorder import Recorder

torch.manual_seed(0)
X = torch.randn(24, 4, dtype=torch.double)
Y = torch.randint(3, (24,))


class Net(L.LightningModule):
    """Two hidden layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, index):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(make, strategy="auto", epochs=2, **options):
    module = make()
    trainer = L.Trainer(
        strategy=strategy,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **options},
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 8))
    return module


def farthest(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


EXACT, FINITE = "zero-divergence", "predictive-coding"


# ------------------------------------------------------------------------------------------- refused, outside the step


class SecondGradientInOptimizerStep(Net):
    """SAM by hand."""

    def training_step(self, batch, index):
        self.batch = batch
        return self.loss(batch)

    def optimizer_step(self, epoch, index, optimizer, closure):
        closure()
        optimizer.zero_grad()
        self.again(closure)
        optimizer.step()

    def again(self, closure):
        self.loss(self.batch).backward()


class ByFunction(SecondGradientInOptimizerStep):
    def again(self, closure):
        torch.autograd.backward([self.loss(self.batch)])


class ByInputs(SecondGradientInOptimizerStep):
    def again(self, closure):
        self.loss(self.batch).backward(inputs=list(self.parameters()))


class AfterBackward(Net):
    def training_step(self, batch, index):
        self.batch = batch
        return self.loss(batch)

    def on_after_backward(self):
        (0.5 * self.loss(self.batch)).backward()


class BeforeStep(AfterBackward):
    def on_after_backward(self):
        pass

    def on_before_optimizer_step(self, optimizer):
        self.loss(self.batch).backward()


OUTSIDE = [SecondGradientInOptimizerStep, ByFunction, ByInputs, AfterBackward, BeforeStep]


@pytest.mark.parametrize("make", OUTSIDE)
@pytest.mark.parametrize("preset", [EXACT, FINITE])
def test_backward_outside_of_the_step_is_refused_before_an_optimizer_steps_on_it(make, preset):
    began = make()
    module = make()
    with pytest.raises(ebm.ConfigurationError, match="plain backpropagation"):
        fit(lambda: module, ebm.EBMStrategy(preset))
    if make is not BeforeStep:
        assert farthest(began, module) == 0.0


@pytest.mark.parametrize("make", OUTSIDE)
def test_the_control_lets_it_pass(make):
    assert farthest(fit(make), fit(make, ebm.EBMStrategy("backprop"))) == 0.0


class ClosureTwice(SecondGradientInOptimizerStep):
    def again(self, closure):
        closure()


@pytest.mark.parametrize("preset", [EXACT, FINITE])
def test_the_closure_called_again_relaxes(preset):
    stock, ours = fit(ClosureTwice), fit(ClosureTwice, ebm.EBMStrategy(preset))
    assert farthest(stock, ours) < 1e-12 if preset == EXACT else farthest(stock, ours) > 1e-3


class Attack(Net):
    """FGSM when validating: gradients of everything, which the next zero_grad wipes."""

    def validation_step(self, batch, index):
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            F.cross_entropy(self.net(x), batch[1]).backward()
        self.log("attacked", F.cross_entropy(self.net(x + 0.1 * x.grad.sign()), batch[1]))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_backward_while_validating_is_no_matter_where_it_is_wiped(accumulated):
    def run(strategy):
        module = Attack()
        trainer = L.Trainer(
            strategy=strategy, max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulated,
            inference_mode=False, num_sanity_val_steps=0,
        )  # fmt: skip
        loader = DataLoader(TensorDataset(X, Y), 8)
        trainer.fit(module, loader, loader)
        return module

    assert farthest(run("auto"), run(ebm.EBMStrategy(EXACT))) < 1e-12


class Probe(Net):
    """A network beside, with an optimizer of its own that Lightning does not know."""

    def __init__(self):
        super().__init__()
        self.beside = [nn.Linear(6, 3).double()]
        self.optimizer = torch.optim.SGD(self.beside[0].parameters(), 0.1)

    def training_step(self, batch, index):
        self.hidden, self.labels = self.net[:2](batch[0]), batch[1]
        return F.cross_entropy(self.net[2:](self.hidden), batch[1])

    def on_train_batch_end(self, *args):
        F.cross_entropy(self.beside[0](self.hidden.detach()), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_what_no_optimizer_of_the_trainer_moves_may_learn_by_backprop():
    stock, ours = fit(Probe), fit(Probe, ebm.EBMStrategy(EXACT))
    assert farthest(stock, ours) < 1e-12
    assert farthest(stock.beside[0], ours.beside[0]) < 1e-12


# ----------------------------------------------------------------------------------------- LightningModule.backward


class Surgery(Net):
    """PCGrad's beginnings: gradients of two losses by torch.autograd.grad, in place of the one that was given."""

    def training_step(self, batch, index):
        output = self.net(batch[0])
        self.losses = [F.cross_entropy(output, batch[1]), output.square().mean()]
        return sum(self.losses)

    def backward(self, loss):
        parameters = list(self.parameters())
        found = [torch.autograd.grad(one, parameters, retain_graph=True) for one in self.losses]
        for parameter, one, other in zip(parameters, *found, strict=True):
            parameter.grad = one + other


class OneBesides(Surgery):
    def backward(self, loss):
        loss.backward()
        for parameter, gradient in zip(self.parameters(), self.grads(), strict=True):
            parameter.grad += gradient

    def grads(self):
        return torch.autograd.grad(outputs=self.losses[1], inputs=list(self.parameters()))


@pytest.mark.parametrize("make", [Surgery, OneBesides])
@pytest.mark.parametrize("preset", [EXACT, FINITE])
def test_gradients_of_other_losses_in_backward_are_refused(make, preset):
    with pytest.raises(ebm.ConfigurationError, match="differentiates another loss"):
        fit(make, ebm.EBMStrategy(preset))


class OfGiven(Net):
    """The gradient of the given loss, not by `backward`."""

    def backward(self, loss):
        parameters = list(self.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient


class NotAlways(Net):
    """Leaves out batches."""

    def backward(self, loss):
        if self.trainer.global_step != 1:
            loss.backward()


class OfInput(Net):
    """The slope of another loss in the input, for a log."""

    def training_step(self, batch, index):
        self.x = batch[0].clone().requires_grad_()
        return F.cross_entropy(self.net(self.x), batch[1])

    def backward(self, loss):
        loss.backward()
        with torch.enable_grad():
            torch.autograd.grad(self.net(self.x).sum(), self.x)


@pytest.mark.parametrize("make", [OfGiven, NotAlways, OfInput])
def test_other_ways_to_the_given_loss_are_right(make):
    assert farthest(fit(make), fit(make, ebm.EBMStrategy(EXACT))) < 1e-12


# ------------------------------------------------------------------------------------------------ manual optimization


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.back(self.loss(batch))
        optimizer.step()

    def back(self, loss):
        self.manual_backward(loss)


class Limited(Manual):
    def back(self, loss):
        loss.backward(inputs=list(self.net[2:].parameters()))


class LimitedAfterAnother(Manual):
    """Any relaxed gradient before, of any size, was once enough for the step to pass."""

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(0 * loss, retain_graph=True)
        loss.backward(inputs=list(self.parameters()))
        optimizer.step()


class LimitedByLightning(Limited):
    def back(self, loss):
        self.manual_backward(loss, inputs=list(self.net[2:].parameters()))


@pytest.mark.parametrize("make", [Limited, LimitedAfterAnother, LimitedByLightning])
def test_backward_that_is_limited_to_parameters_relaxes(make):
    stock = fit(make)
    assert farthest(stock, fit(make, ebm.EBMStrategy(EXACT))) < 1e-12
    assert farthest(stock, fit(make, ebm.EBMStrategy(FINITE))) > 1e-3


class Mixed(Manual):
    def training_step(self, batch, index):
        x = batch[0].clone().requires_grad_()
        F.cross_entropy(self.net(x), batch[1]).backward(inputs=[x, self.net[0].weight])


def test_backward_that_is_limited_to_parameters_and_others_is_refused():
    with pytest.raises(ebm.ConfigurationError, match="names parameters and other tensors"):
        fit(Mixed, ebm.EBMStrategy(EXACT))


# ------------------------------------------------------------------------------------- graphs of gradients, retain_grad


class Cached(Manual):
    """GradCache: the gradient of representations that were computed without one, then the network, part by part."""

    by_lightning = False

    def training_step(self, batch, index):
        parts = batch[0].split(3)
        with torch.no_grad():
            seen = torch.cat([self.net(part) for part in parts])
        seen.requires_grad_()
        loss = F.cross_entropy(seen @ seen.detach().T, torch.arange(len(seen)))
        self.optimizers().zero_grad()
        self.manual_backward(loss) if self.by_lightning else loss.backward()
        for part, gradient in zip(parts, seen.grad.split(3), strict=True):
            self.manual_backward((self.net(part) * gradient).sum())
        self.optimizers().step()


class CachedByLightning(Cached):
    by_lightning = True


@pytest.mark.parametrize("make", [Cached, CachedByLightning])
@pytest.mark.parametrize("capture", [True, False])
def test_a_loss_of_no_parameter_fills_the_gradients_that_it_has(make, capture):
    stock = fit(make)
    assert farthest(stock, fit(make, ebm.EBMStrategy(EXACT, capture=capture))) < 1e-12


class GraphByHand(Manual):
    def back(self, loss):
        self.manual_backward(loss, create_graph=True)


class GraphByCall(Manual):
    def back(self, loss):
        loss.backward(create_graph=True)


class GraphInBackward(Net):
    def backward(self, loss):
        loss.backward(create_graph=True)


def _several(backward):
    class Several(Net):
        """A loss for each sample, and how much each counts."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
            backward(self, losses, torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype) / len(losses))
            optimizer.step()

    return Several


WEIGHTED = {
    "by name": lambda module, losses, weights: module.manual_backward(losses, gradient=weights),
    "by position": lambda module, losses, weights: module.manual_backward(losses, weights, retain_graph=True),
    "plain": lambda module, losses, weights: losses.backward(weights),
    "by function": lambda module, losses, weights: torch.autograd.backward([losses], [weights]),
    "one": lambda module, losses, weights: module.manual_backward(losses.sum(), gradient=weights[0]),
}


@pytest.mark.parametrize("way", WEIGHTED)
@pytest.mark.parametrize("preset", ["backprop", EXACT, "pc-nudge"])
def test_several_losses_with_the_gradient_of_each(way, preset):
    make = _several(WEIGHTED[way])
    assert farthest(fit(make), fit(make, ebm.EBMStrategy(preset))) < (1e-4 if preset == "pc-nudge" else 1e-12)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("make", [GraphByHand, GraphByCall, GraphInBackward])
@pytest.mark.parametrize("capture", [True, False])
def test_a_graph_of_the_update_is_refused(make, capture):
    with pytest.raises(ebm.ConfigurationError, match="create_graph=True"):
        fit(make, ebm.EBMStrategy(EXACT, capture=capture))


class Looks(Net):
    """The gradient of an activation, as Grad-CAM and logs of gradients want it."""

    def training_step(self, batch, index):
        self.hidden = self.net[:2](batch[0])
        self.hidden.retain_grad()
        return F.cross_entropy(self.net[2:](self.hidden), batch[1])

    def on_after_backward(self):
        self.seen = [*getattr(self, "seen", []), self.hidden.grad]


@pytest.mark.parametrize("preset", ["backprop", EXACT, FINITE, "pc-nudge", "equilibrium-propagation"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_retained_gradients_of_the_first_step_are_those_of_autograd(preset, accumulated):
    """Under every algorithm; later steps have other weights."""
    options = {"accumulate_grad_batches": accumulated, "epochs": 1}
    stock, ours = fit(Looks, **options), fit(Looks, ebm.EBMStrategy(preset), **options)
    if preset == "equilibrium-propagation":  # its own pass is at another state: its slope is that of what ran
        assert all(gradient is None or gradient.shape == (8, 6) for gradient in ours.seen)
        return
    count = len(stock.seen) if preset in ("backprop", EXACT) else 1
    for one, other in zip(stock.seen[:count], ours.seen[:count], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_retained_gradients_are_there_under_incremental_updates():
    """Once a batch, however many steps its states take."""
    stock, ours = fit(Looks, epochs=1), fit(Looks, ebm.EBMStrategy("incremental-pc"), epochs=1)
    assert len(ours.seen) > len(stock.seen)  # the hook is called after every step
    torch.testing.assert_close(ours.seen[0], stock.seen[0], rtol=1e-10, atol=1e-14)


# --------------------------------------------------------------------------------------- nothing that could relax, yet


class Probing(Net):
    """Linear probing in the second epoch: all but the read-out is frozen."""

    frozen = (1,)

    def on_train_epoch_start(self):
        self.net[:4].requires_grad_(self.current_epoch not in self.frozen)


class ProbingFirst(Probing):
    frozen = (0,)


class Temperature(Manual):
    """A multiplier with a loss of its own, as in soft actor-critic."""

    def __init__(self):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros((), dtype=torch.double))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.Adam([self.log_alpha], 0.01)

    def training_step(self, batch, index):
        one, other = self.optimizers()
        output = self.net(batch[0])
        one.zero_grad()
        self.manual_backward(self.log_alpha.exp().detach() * F.cross_entropy(output, batch[1]))
        one.step()
        other.zero_grad()
        self.manual_backward(-(self.log_alpha * (output.detach().square().sum(1) - 2)).mean())
        other.step()


@pytest.mark.parametrize("make", [Probing, ProbingFirst, Temperature])
@pytest.mark.parametrize("capture", [True, False])
def test_where_no_weight_lies_behind_another_the_update_is_the_slope_of_the_loss(make, capture):
    stock = fit(make, epochs=3)
    assert farthest(stock, fit(make, ebm.EBMStrategy(EXACT, capture=capture), epochs=3)) < 1e-12
    for preset in (FINITE, "equilibrium-propagation", "incremental-pc"):
        if make is Temperature and preset == "incremental-pc":
            continue  # under manual optimization it is refused
        ours = fit(make, ebm.EBMStrategy(preset), epochs=3)
        assert farthest(stock, ours) > 1e-3  # where layers learn, they learn by its own rule


@pytest.mark.parametrize("preset", [FINITE, "equilibrium-propagation", "error-pc"])
def test_the_read_out_of_a_frozen_network_learns_as_under_stock_by_every_rule(preset):
    class Frozen(Probing):
        frozen = (0, 1)

    assert farthest(fit(Frozen), fit(Frozen, ebm.EBMStrategy(preset))) < 1e-12


def test_a_network_that_never_has_a_weight_behind_another_is_refused():
    class Single(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3)).double()

    with pytest.raises(ebm.LayerDiscoveryError, match="plain backprop"):
        fit(Single, ebm.EBMStrategy(FINITE))


# ---------------------------------------------------------------------------------- what only scales losses, transforms


class GradNorm(Manual):
    """Weights of losses with an optimizer of their own, whose gradient is torch.autograd.grad's."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.double))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.05), torch.optim.SGD([self.w], 0.05)

    def training_step(self, batch, index):
        output = self.net(batch[0])
        losses = torch.stack([F.cross_entropy(output, batch[1]), output.square().mean()])
        self.zero_grad()
        self.manual_backward((self.w.detach() * losses).sum(), retain_graph=True)
        last = self.net[4].weight
        slopes = [torch.autograd.grad(self.w[k] * losses[k], last, create_graph=True)[0] for k in range(2)]
        norms = torch.stack([slope.norm() for slope in slopes])
        self.w.grad = torch.autograd.grad((norms - norms.mean().detach()).abs().sum(), self.w)[0]
        for optimizer in self.optimizers():
            optimizer.step()


def test_weights_of_losses_may_have_gradients_of_their_own():
    assert farthest(fit(GradNorm), fit(GradNorm, ebm.EBMStrategy(EXACT))) < 1e-12


class ByHand(Manual):
    """Gradients of the network by torch.autograd.grad."""

    def slopes(self, batch):
        return torch.autograd.grad(self.loss(batch), list(self.net.parameters()))

    def training_step(self, batch, index):
        for p, gradient in zip(self.net.parameters(), self.slopes(batch), strict=True):
            p.grad = gradient
        self.optimizers().step()


class ByTransform(ByHand):
    def slopes(self, batch):
        def loss(parameters):
            return F.cross_entropy(torch.func.functional_call(self.net, parameters, batch[0]), batch[1])

        return torch.func.grad(loss)({name: p.detach() for name, p in self.net.named_parameters()}).values()


class ByCopy(ByHand):
    """First-order meta-learning: an inner loop on a copy, whose gradients the module takes."""

    def slopes(self, batch):
        fast = copy.deepcopy(self.net)
        inner = torch.optim.SGD(fast.parameters(), 0.1)
        for _ in range(2):
            inner.zero_grad()
            self.manual_backward(F.cross_entropy(fast(batch[0]), batch[1]))
            inner.step()
        return [p.grad for p in fast.parameters()]


@pytest.mark.parametrize("make", [ByHand, ByTransform, ByCopy])
def test_weights_of_the_network_may_not(make):
    fit(make)
    with pytest.raises(ebm.ConfigurationError, match="that no relaxation has given"):
        fit(make, ebm.EBMStrategy(EXACT))


class ByItself(ByHand):
    """The optimizer without Lightning around it, which sees none of its steps."""

    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=False)
        parameters = list(self.net.parameters())
        slopes = torch.autograd.grad(self.loss(batch), parameters)
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        optimizer.step()


def test_so_it_is_where_the_trainer_does_not_see_the_step():
    test_weights_of_the_network_may_not(ByItself)


class RelaxedByItself(Manual):
    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_an_optimizer_without_lightning_around_it_may_step_on_what_a_relaxation_has_given():
    assert farthest(fit(RelaxedByItself), fit(RelaxedByItself, ebm.EBMStrategy(EXACT))) < 1e-12


class WithoutOptimizer(Manual):
    """Gradient descent written out."""

    relaxes = False

    def configure_optimizers(self):
        return None

    def training_step(self, batch, index):
        parameters = list(self.net.parameters())
        loss = self.loss(batch)
        if self.relaxes:
            self.manual_backward(loss)
            slopes = [p.grad for p in parameters]
        else:
            slopes = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter -= 0.1 * slope
                parameter.grad = None


class RelaxedWithoutOptimizer(WithoutOptimizer):
    relaxes = True


@pytest.mark.parametrize("make", [WithoutOptimizer, RelaxedWithoutOptimizer])
def test_it_is_said_once_where_weights_move_and_nothing_relaxes(make, caplog):
    assert farthest(fit(make), fit(make, ebm.EBMStrategy(EXACT))) < 1e-12
    told = [r.getMessage() for r in caplog.records if "nothing has relaxed in this run" in r.getMessage()]
    assert len(told) == (not make.relaxes)
    assert all("net.0.bias, net.0.weight" in text for text in told)


class Twice(Manual):
    """Steps twice on the gradient of a relaxation."""

    between = staticmethod(lambda parameters: None)

    def training_step(self, batch, index):
        super().training_step(batch, index)
        self.between(list(self.parameters()))
        self.optimizers().step()


class EverySecond(Manual):
    """Steps at every batch, and looks for a new gradient at every second."""

    def training_step(self, batch, index):
        if index % 2 == 0:
            super().training_step(batch, index)
        else:
            self.optimizers().step()


@pytest.mark.parametrize("make", [Twice, EverySecond])
def test_the_gradient_of_a_relaxation_may_be_stepped_on_again(make):
    module = fit(make, ebm.EBMStrategy(EXACT))
    assert farthest(fit(make), module) < 1e-12
    pickle.dumps(module.trainer)


def _given_another(parameters):
    for p in parameters:
        p.grad = torch.ones_like(p)


def _written_to(parameters):
    for p in parameters:
        p.grad.fill_(1.0)


def _zeroed_and_filled(parameters):
    for p in parameters:
        p.grad = None
    for p in parameters:
        p.grad = torch.ones_like(p)


@pytest.mark.parametrize("between", [_given_another, _written_to, _zeroed_and_filled])
def test_but_no_other_in_its_place(between):
    class Other(Twice):
        pass

    Other.between = staticmethod(between)
    with pytest.raises(ebm.ConfigurationError, match="that no relaxation has given"):
        fit(Other, ebm.EBMStrategy(EXACT))


class Multiplier(Manual):
    """A multiplier of a constraint goes up by hand, and every optimizer steps, also on gradients of zero."""

    def __init__(self):
        super().__init__()
        self.multiplier = nn.Parameter(torch.zeros(()).double())
        self.other = nn.Linear(3, 3).double()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(p, 0.1, 0.9) for p in (self.net.parameters(), [self.multiplier], self.other.parameters())
        ]

    def training_step(self, batch, index):
        output = self.net(batch[0])
        if index % 2:
            output = self.other(output)
        excess = output.square().mean() - 0.1
        self.manual_backward(F.cross_entropy(output, batch[1]) + self.multiplier.detach() * excess)
        self.multiplier.grad = -excess.detach()
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


def test_what_is_no_weight_may_be_stepped_on_by_hand_and_so_may_gradients_of_zero():
    assert farthest(fit(Multiplier), fit(Multiplier, ebm.EBMStrategy(EXACT))) < 1e-12


@pytest.mark.parametrize(
    "transform",
    [
        lambda net, x: torch.vmap(net)(x),
        lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
        lambda net, x: torch.vmap(torch.func.jacrev(net))(x),
    ],
    ids=["vmap", "jvp", "jacrev"],
)
def test_layers_within_a_transform_are_refused_by_its_name(transform):
    module = Net()
    learner = ebm.Learner(module.net, EXACT)
    with pytest.raises(ebm.LayerDiscoveryError, match=r"transform of torch\.func"):
        learner.gradients(lambda: transform(module.net, X).square().mean())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_a_scripted_layer_among_others_is_exact(index):
    net = Net().net
    net[index] = torch.jit.script(net[index])
    learner = ebm.Learner(net, EXACT)
    for _ in range(4):  # torch optimizes what is scripted at its second and third call
        loss = F.cross_entropy(net(X), Y)
        wanted = torch.autograd.grad(loss, list(net.parameters()))
        found = learner.gradients(lambda: F.cross_entropy(net(X), Y))
        for one, other in zip(wanted, found.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, X[:2])])
def test_a_network_that_is_scripted_as_a_whole_is_refused_by_name(compiled):
    net = compiled(Net().net)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"torch\.jit\.script.*before scripting"):
        ebm.Learner(net, EXACT).gradients(lambda: F.cross_entropy(net(X), Y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("algorithm", [EXACT, "predictive-coding", "equilibrium-propagation"])
def test_a_scripted_block_learns_as_it_was_before_scripting(algorithm):
    plain = Net().net.double()
    net = nn.Sequential(plain[:2], torch.jit.script(plain[2:4]), nn.Identity(), plain[4])
    x, other = X.double(), nn.Sequential(plain[:2], plain[2:4], nn.Identity(), plain[4])
    learner = ebm.Learner(net, algorithm, layers=["0", "2"])  # no call inside of scripted code can be seen
    wanted = ebm.Learner(other, algorithm, layers=["0", "2"]).gradients(lambda: F.cross_entropy(other(x), Y))
    for _ in range(4):
        found = learner.gradients(lambda: F.cross_entropy(net(x), Y))
        for one, two in zip(wanted.values(), found.values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13)


@torch.jit.script
def snake(x: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    return x + (frequency + 1e-9).reciprocal() * torch.sin(frequency * x).pow(2)


@torch.jit.script
def gated(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x) * torch.tanh(x)


class Scripted(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.frequency = function, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.function(x) * self.frequency if self.function is gated else self.function(x, self.frequency)


@torch.jit.script
def branching(x: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    h = x * frequency
    h[:, 0] = 0.0
    if bool(x.mean() > 0):
        h = h * torch.tanh(h)
    for _ in range(2):
        h = h + 0.1 * frequency * torch.tanh(h)
    return h


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("function", [snake, gated, branching])
@pytest.mark.parametrize("capture", [True, False])
def test_what_scripted_functions_do_with_parameters_is_seen(function, capture):
    plain = Net().net
    net = nn.Sequential(plain[0], Scripted(function), plain[2], Scripted(function), plain[4]).double()
    x = X.double()
    learner = ebm.Learner(net, EXACT, capture=capture)
    for _ in range(5):  # torch makes one operation of many at the second and third call
        wanted = torch.autograd.grad(F.cross_entropy(net(x), Y), list(net.parameters()))
        found = learner.gradients(lambda: F.cross_entropy(net(x), Y))
        for one, other in zip(wanted, found.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_code_of_which_nothing_is_seen_is_refused_by_name(monkeypatch):
    """As where a GPU runs one kernel for many operations: here they lose sight of their parameters."""
    plain = Net().net
    net = nn.Sequential(plain[0], Scripted(snake), plain[2], Scripted(snake), plain[4]).double()
    for _ in range(3):
        F.cross_entropy(net(X.double()), Y).backward()
    monkeypatch.setattr(Recorder, "_named_again", lambda self, *both: self.contents.aliased(*both))
    with pytest.raises(ebm.UnsupportedModuleError, match=r"A function.*compiled by torch\.jit\.script.*PYTORCH_JIT=0"):
        ebm.Learner(net, EXACT).gradients(lambda: F.cross_entropy(net(X.double()), Y))


class AfterTheStep(Net):
    """Manual optimization that differentiates in a hook: the loss of the step, or one of its own."""

    own = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.kept = None if self.own else self.loss(batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch) if self.own else self.kept)
        optimizer.step()


class LossOfItsOwn(AfterTheStep):
    own = True


class BeforeTheStep(LossOfItsOwn):
    def on_train_batch_start(self, batch, batch_idx):
        self.on_train_batch_end(None, batch, batch_idx)


@pytest.mark.parametrize("make", [AfterTheStep, LossOfItsOwn, BeforeTheStep])
@pytest.mark.parametrize("preset", ["zero-divergence", "predictive-coding", "equilibrium-propagation"])
def test_manual_backward_in_a_hook_is_refused_by_name(make, preset):
    with pytest.raises(ebm.ConfigurationError, match=r"outside of training_step.*Call it in training_step"):
        fit(make, ebm.EBMStrategy(preset))


@pytest.mark.parametrize("make", [AfterTheStep, LossOfItsOwn])
def test_the_control_differentiates_in_hooks_as_stock_does(make):
    assert farthest(fit(make), fit(make, ebm.EBMStrategy("backprop"))) == 0
