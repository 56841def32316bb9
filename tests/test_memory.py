"""What a step takes, by the allocator's own account: exact, and the same on every machine."""

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from since import newer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import lightning_ebm as ebm
from lightning_ebm.energies.base import LayerView, reads_drive

pytestmark = newer  # older ones hold more of some operations
WIDTH, BATCH, LAYERS = 64, 512, 4
STATE = WIDTH * BATCH * 4


def euler(steps: int) -> ebm.Algorithm:
    return ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, steps))


def peak(algorithm: ebm.Algorithm, before: int = 2, layers: int = LAYERS, **options: bool) -> float:
    """Bytes at the peak of a training step, in sizes of one layer's state.

    Args:
        algorithm: how to train.
        before: steps that have been taken; at 1 the step is the one that is traced.
        layers: how many carry a state.
        options: of the learner.
    """
    torch.manual_seed(0)
    blocks = [layer for _ in range(layers) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    net = nn.Sequential(*blocks, nn.Linear(WIDTH, 10))
    x, y = torch.randn(BATCH, WIDTH), torch.arange(BATCH) % 10
    learner = ebm.Learner(net, algorithm, **options)

    def step() -> None:
        net.zero_grad()
        learner.backward(lambda: F.cross_entropy(net(x), y))

    for _ in range(before):
        step()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / STATE


@pytest.mark.slow
@pytest.mark.parametrize("capture", [True, False])
def test_more_steps_take_no_more(capture: bool) -> None:
    # Which of two tensors goes first is left to the allocator: peaks of equal steps are up to 5 % apart.
    many, few = (min(peak(euler(steps), capture=capture) for _ in range(3)) for steps in (100, 5))
    assert many < 1.04 * few


def test_code_takes_less_than_the_plain_way() -> None:
    assert peak(euler(5)) < 0.7 * peak(euler(5), capture=False)


A_LAYER = {
    "zero-divergence": 2.1,  # what the pass computed, and an error
    "error-pc": 2.0,  # the error, and what it is displaced from
    "pc-nudge": 3.1,  # two errors and their forces, and what is displaced
    "predictive-coding": 3.1,
    "dual-propagation": 5.0,  # two ends, their mean, what the pass computed, and the energies of the mean at the end
}
"""What a step holds of every layer, in sizes of its state; besides, some three of one layer at a time."""
BESIDE = 3.3


def preset(name: str) -> ebm.Algorithm:
    return euler(20) if name == "euler" else ebm.algorithm(name)


@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize("name", A_LAYER)
def test_a_step_holds_few_things_of_each_layer(name: str, layers: int) -> None:
    beside = 7.0 if name == "dual-propagation" else BESIDE  # its potentials take several operations
    assert peak(preset(name), layers=layers) < A_LAYER[name] * layers + beside


@pytest.mark.slow
@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize("relaxer", [ebm.GradientDescent(0.1, 20), ebm.ErrorCoordinates(20, 0.5, 0.0)], ids=str)
def test_steps_hold_one_point(relaxer: ebm.Relaxer, layers: int) -> None:
    """However many layers: x and one thing more, as a point that is left behind is let go of layer by layer."""
    assert peak(ebm.algorithm("predictive-coding", relaxer=relaxer), layers=layers) < 2.0 * layers + 3.3


@pytest.mark.slow
@pytest.mark.parametrize("relaxer", [ebm.GradientDescent(0.1, 20), ebm.ErrorCoordinates(20, 0.5, 0.0)], ids=str)
def test_compiled_steps_hold_hardly_more(relaxer: ebm.Relaxer) -> None:
    assert peak(ebm.algorithm("predictive-coding", relaxer=relaxer), compile=True) < 3.1 * LAYERS + 0.6


def test_of_two_phases_both_ends_are_held_and_what_their_sum_is_made_of() -> None:
    algorithm = ebm.algorithm("predictive-coding", nudge=ebm.Centered(0.1), relaxer=ebm.GradientDescent(0.1, 20))
    assert peak(algorithm) < 3 * LAYERS + 3.3


@pytest.mark.slow
def test_equilibrium_propagation_holds_what_its_search_remembers() -> None:
    """Ends of phases, the last two sweeps, and of every other layer slopes and directions."""
    assert peak(ebm.algorithm("equilibrium-propagation")) < 9.8 * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["euler", "predictive-coding", "zero-divergence", "equilibrium-propagation"])
def test_the_first_steps_hold_no_graph_of_the_pass(name: str) -> None:
    """The plain way, which checks a new program, and the step after it, in which code is traced.

    Equilibrium propagation besides looks once whether sweeps that were cut off have an equilibrium to come to.
    """
    room = {"euler": 6.6, "predictive-coding": 7.1, "zero-divergence": 6.6, "equilibrium-propagation": 19.0}[name]
    assert peak(preset(name), before=0) < room * LAYERS
    assert peak(preset(name), before=1) < room * LAYERS


@pytest.mark.slow
def test_nothing_that_a_pass_computed_outlives_the_step() -> None:
    """Without the garbage collector's help: what is held in circles is held for long."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for name in ("predictive-coding", "equilibrium-propagation"):
        learner, seen = ebm.Learner(net, name), []
        net[1].register_forward_hook(lambda m, a, output, seen=seen: seen.append(weakref.ref(output)))
        for _ in range(4):
            x = torch.randn(5, 3)
            gc.collect()
            gc.disable()
            try:
                learner.backward(lambda x=x: net(x).square().mean())
                assert not any(ref() is not None for ref in seen)
            finally:
                gc.enable()


def small() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    blocks = [layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.Tanh())]
    batches = [(torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3) for _ in range(6)]
    return nn.Sequential(*blocks, nn.Linear(4, 3)).double(), batches


def updates(algorithm: ebm.Algorithm, capture: bool) -> tuple[list[Tensor], ebm.Learner]:
    """Of some batches, all in one list."""
    net, batches = small()
    learner = ebm.Learner(net, algorithm, capture=capture)
    found = [learner.gradients(lambda x=x, y=y: F.cross_entropy(net(x), y)) for x, y in batches]
    return [gradient for gradients in found for gradient in gradients.values()], learner


@pytest.mark.parametrize("base", [ebm.GradientDescent(0.1, 12), ebm.ErrorCoordinates()], ids=["states", "errors"])
def test_whoever_comes_back_to_the_forward_pass_finds_it_as_it_was(base: ebm.Relaxer) -> None:
    """The network lets go of it on the way; a relaxer of the user's own may still ask. Oracle: the plain way."""
    seen: list[Tensor] = []

    class Returning(type(base)):  # type: ignore[misc]
        def relax(self, landscape: Any, start: Any, strength: Any) -> ebm.Relaxation:
            before = list(start)
            found = super().relax(landscape, start, strength)
            asked = (ebm.Forces(), before), (ebm.ErrorForces(), landscape.no_errors)
            for forces in (landscape.evaluate(*one, strength) for one in asked):
                seen.extend([*before, *forces.gradients, forces.loss])
            return found

    options = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    algorithm = ebm.algorithm("predictive-coding", relaxer=Returning(**options))
    plain, _ = updates(algorithm, False)
    half = len(seen)
    captured, _ = updates(algorithm, True)
    assert len(seen) == 2 * half
    for one, other in zip([*plain, *seen[:half]], [*captured, *seen[half:]], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("relaxer", [ebm.GradientDescent(0.6, 12), ebm.ErrorCoordinates(12, lr=1.0, tol=0.0)], ids=str)
def test_a_runaway_is_named_as_by_the_plain_way_when_nothing_but_norms_was_computed(relaxer: ebm.Relaxer) -> None:
    said = []
    for capture in (False, True):
        net, batches = small()
        learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=relaxer), capture=capture)
        for number, (x, y) in enumerate(batches):
            if number == 3:
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.mul_(12)
                with pytest.raises(ebm.RelaxationDivergedError) as raised:
                    learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
                said.append(str(raised.value))
                break
            learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
    assert said[0] == said[1]


class Gated(ebm.PredictiveCoding):
    """Looks at the drive, though its parent does not."""

    def layer_precision(self, layer: LayerView) -> Tensor:
        assert layer.activation is not None
        assert torch.equal(torch.tanh(layer.drive), layer.prediction)
        return 1 + layer.drive.detach().square()


@pytest.mark.parametrize("capture", [True, False])
def test_a_subclass_that_reads_the_drive_is_given_it(capture: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    relaxer = ebm.GradientDescent(0.05, 40)
    learner = ebm.Learner(net, ebm.Algorithm(Gated(), ebm.OneSided(1e-4), relaxer), capture=capture)
    found = learner.gradients(lambda: F.mse_loss(net(x), y))
    assert reads_drive(Gated())
    assert not reads_drive(ebm.PredictiveCoding())
    top = ebm.reference.backprop(net, lambda: F.mse_loss(net(x), y))
    assert torch.allclose(found["4.weight"], top["4.weight"], rtol=0, atol=1e-3)  # whatever the precision
