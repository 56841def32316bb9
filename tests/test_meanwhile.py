"""Hooks that write between the step and its backward pass: `on_before_zero_grad`, `on_before_backward`.

Lightning's own documentation calls the first a good place to look at weights after a step, and averaged weights are
moved there. As under stock, the gradient is that of what the step has read.
"""

import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from test_other_gradients import EXACT, Net, farthest, fit
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import lightning_ebm as ebm

HOOKS = ("on_before_zero_grad", "on_before_backward")


class Writing(Net):
    """A bias, the first weights, what is added: autograd keeps none of them, and does not complain."""

    def __init__(self, hook, late=0):
        super().__init__()
        self.register_buffer("shift", torch.ones(6).double())
        self.late = late
        setattr(self, hook, self.write)

    def loss(self, batch):
        return F.cross_entropy(self.net[2:](self.net[:2](batch[0]) + self.shift), batch[1])

    def write(self, *args):
        if self.current_epoch >= self.late:
            with torch.no_grad():
                self.net[0].weight.mul_(0.9)
                self.net[2].bias.clamp_(-0.05, 0.05)
            self.shift.mul_(0.9)


class WritingUnseen(Writing):
    """The same by calls that no operation stands for, and by the memory itself."""

    def write(self, *args):
        if self.current_epoch >= self.late:
            shrunk = 0.9 * self.shift
            self.shift.untyped_storage().copy_(shrunk.untyped_storage())
            self.net[2].bias.detach().apply_(lambda number: 0.5 * number)
            self.net[0].bias.detach().map_(self.net[0].bias.detach().clone(), lambda mine, other: 0.9 * other)


class Averaged(Net):
    """The loss reads averaged weights, which move in the hook, by their data."""

    def __init__(self, hook, late=0):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        setattr(self, hook, self.move)

    def loss(self, batch):
        wanted = self.teacher(batch[0]).softmax(1)
        return super().loss(batch) + F.kl_div(self.net(batch[0]).log_softmax(1), wanted, reduction="batchmean")

    def move(self, *args):
        for mean, now in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mean.data = 0.5 * mean.data + 0.5 * now.data


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", [Writing, Averaged])
def test_the_gradient_is_that_of_what_the_step_has_read(make, hook, late, capture):
    stock = fit(lambda: make(hook, late), epochs=3)
    ours = fit(lambda: make(hook, late), ebm.EBMStrategy(EXACT, capture=capture), epochs=3)
    assert farthest(stock, ours) < 1e-12
    weak = ebm.EBMStrategy(ebm.algorithm("pc-nudge", nudge=ebm.OneSided(1e-6)), capture=capture)
    assert farthest(stock, fit(lambda: make(hook, late), weak, epochs=3)) < 1e-4


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("late", [0, 1])
def test_so_it_is_where_nobody_could_see_the_write(late, capture):
    stock = fit(lambda: WritingUnseen("on_before_zero_grad", late), epochs=3)
    for algorithm, bound in ((EXACT, 1e-12), (ebm.algorithm("pc-nudge", nudge=ebm.OneSided(1e-6)), 1e-4)):
        ours = ebm.EBMStrategy(algorithm, capture=capture)
        assert farthest(stock, fit(lambda: WritingUnseen("on_before_zero_grad", late), ours, epochs=3)) < bound
    with pytest.raises(ebm.UnsupportedModuleError, match="where autograd does not look"):  # autograd's graph is gone
        fit(lambda: WritingUnseen("on_before_backward", late), ebm.EBMStrategy(EXACT, capture=capture))


def by_lambda(hook):
    return LambdaCallback(**{hook: lambda trainer, module, *of: module.write()})


def by_callback(hook):
    return type("Own", (L.Callback,), {hook: lambda self, trainer, module, *of: module.write()})()


def by_a_library_s(hook):
    return type("Own", (LearningRateMonitor,), {hook: lambda self, trainer, module, *of: module.write()})()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("callback", [by_lambda, by_callback, by_a_library_s])
def test_so_it_is_where_a_callback_writes(callback, hook, tmp_path):
    def trained(strategy):
        options = {"callbacks": [callback(hook)], "logger": CSVLogger(tmp_path)}
        return fit(lambda: Writing("on_nothing"), strategy, epochs=2, **options)

    stock = trained("auto")
    assert farthest(stock, trained(ebm.EBMStrategy(EXACT))) < 1e-12
    weak = ebm.EBMStrategy(ebm.algorithm("pc-nudge", nudge=ebm.OneSided(1e-6)))
    assert farthest(stock, trained(weak)) < 1e-4


class Manually(Averaged):
    """Two backward calls of one pass, and a third of a pass after what the hook has moved."""

    def __init__(self, hook):
        super().__init__(hook)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer, output, wanted = self.optimizers(), self.net(batch[0]), self.teacher(batch[0])
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(output, batch[1]), retain_graph=True)
        self.manual_backward(F.mse_loss(output, wanted))
        self.manual_backward(F.mse_loss(self.net(batch[0] + 0.1), self.teacher(batch[0])))
        optimizer.step()

    def move(self, *args):
        super().move()
        for mean in self.teacher.parameters():
            mean.data.mul_(0.9)
        with torch.no_grad():
            self.net[0].bias.mul_(0.9)
            self.net[2].bias.add_(0.05)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward"])
def test_so_it_is_where_a_manual_step_goes_on(hook, capture):
    stock = fit(lambda: Manually(hook), epochs=3)
    assert farthest(stock, fit(lambda: Manually(hook), ebm.EBMStrategy(EXACT, capture=capture), epochs=3)) < 1e-12
    weak = ebm.EBMStrategy(ebm.algorithm("pc-nudge", nudge=ebm.OneSided(1e-6)), capture=capture)
    assert farthest(stock, fit(lambda: Manually(hook), weak, epochs=3)) < 1e-4


class Decaying(Net):
    """By the data of weights that autograd has kept: its gradient is of old and new ones, and no function's."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.decay)

    def decay(self, *args):
        if self.current_epoch:
            for parameter in self.net.parameters():
                parameter.data.mul_(0.9)


class DecayingOne(Decaying):
    """A weight alone, of which operations read a view."""

    def decay(self, *args):
        if self.current_epoch:
            self.net[2].weight.data.mul_(0.9)


class Moving(Decaying):
    """Autograd has kept a gain, and reads what stands in its place."""

    def __init__(self, hook):
        super().__init__(hook)
        self.register_buffer("gain", torch.ones(6).double())

    def loss(self, batch):
        return F.cross_entropy(self.net[2:](self.net[:2](batch[0]) * self.gain), batch[1])

    def decay(self, *args):
        if self.current_epoch:
            self.gain.data = 0.5 * self.gain.data


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("algorithm", [EXACT, "pc-nudge"])
@pytest.mark.parametrize("make", [Decaying, DecayingOne, Moving])
def test_writes_that_autograd_does_not_see_are_refused(make, hook, algorithm):
    with pytest.raises(ebm.UnsupportedModuleError, match="where autograd does not look"):
        fit(lambda: make(hook), ebm.EBMStrategy(algorithm))


class Failing(Net):
    def on_before_zero_grad(self, optimizer):
        raise ZeroDivisionError


@pytest.mark.parametrize("accumulated", [1, 2])
def test_no_mode_stays_behind(accumulated):
    strategy = ebm.EBMStrategy(EXACT)
    with pytest.raises(ZeroDivisionError):
        fit(Failing, strategy, accumulate_grad_batches=accumulated)
    assert not _get_current_dispatch_mode_stack()
    assert not _get_current_function_mode_stack()
    pickle.dumps(strategy)


class Compressing(Net):
    """Activations are kept in half precision from the second epoch on."""

    def loss(self, batch):
        kind = torch.half if self.current_epoch else torch.double

        def pack(tensor):
            return tensor.to(kind) if tensor.is_floating_point() else tensor

        def unpack(tensor):
            return tensor.double() if tensor.is_floating_point() else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return super().loss(batch)


def test_hooks_on_saved_tensors_that_begin_to_hand_back_others_are_refused():
    with pytest.raises(ebm.UnsupportedModuleError, match="saved_tensors_hooks"):
        fit(Compressing, ebm.EBMStrategy(EXACT))
