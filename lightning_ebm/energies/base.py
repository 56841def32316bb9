"""The one method an internal energy consists of, and what it may say besides."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.part import Part
from lightning_ebm.promises import is_kept


@dataclass(frozen=True)
class LayerView:
    """What an energy may know of a layer in one pass. Shapes: ``B`` samples first, the rest as the layer has it.

    Attributes:
        name: qualified name of the module, ``"net.1"``.
        call: which call of that module within the pass, from 0.
        drive: a_l, what arrived at the layer, ``(B, ...)``; a function of the parents' states and of the parameters.
        prediction: mu_l = rho(a_l), what the layer would emit in a plain forward pass; the shape of the state.
        activation: the module rho itself, or None where the layer is a whole block (then drive is prediction).
        above: how many layers lie on the longest way from this one to the loss, 0 for the last: L - l in a chain.
    """

    name: str
    call: int
    drive: Tensor
    prediction: Tensor
    activation: nn.Module | None
    above: int = 0

    @property
    def state_name(self) -> str:
        """The name of this call's state in `ebm.summary`: "act" for the first call, then "act#1"."""
        return f"{self.name}#{self.call}" if self.call else self.name


class Energy(Part, ABC):
    """Internal energy I(x, theta) = sum_l sum_b e(x_l, a_l, rho_l).

    A subclass writes ``layer_energy``. Everything else (which layers, which parents, batching, gradients) is the
    network's affair, so an energy never sees a module it would have to call. With ``best_response`` as well, relaxers
    of the fixed-point kind can use it.

    What a class promises of its methods (the attributes below, and `best_response`) holds for a subclass as long as
    the subclass does not override what the promise is about. One that writes another ``layer_energy`` promises nothing
    until it says so itself.
    """

    divergence: ClassVar[bool] = False
    """True promises e >= 0, and e = 0 with zero gradient exactly at x = rho(a): then the free equilibrium is the
    feed-forward pass, costs nothing, and contributes nothing to the update (theory: dI/dtheta vanishes there)."""

    reads_drive: ClassVar[bool] = True
    """False promises that no method here looks at ``layer.drive``, which then is not kept: memory."""

    rests_at_prediction: ClassVar[bool] = False
    """True promises that argmin_x e(x, a) is rho(a), to rounding: a layer that nothing pulls emits what it does in a
    forward pass. Where no layer reads another's state, that is the free equilibrium."""

    @abstractmethod
    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        """e(x_l, a_l, rho_l), batch first. Any trailing shape: it is summed over all but the batch dimension.

        Args:
            state: x_l, ``(B, ...)``.
            layer: its drive a_l, its prediction rho(a_l) and its activation.
        """

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        """`argmin_x e(x, a_l) - <pull, x>`: where the layer goes if everything around it stays.

        Args:
            pull: what all the other terms pull by, -d/dx_l [sum_{k != l} e_k + lambda L], in the shape of the state.
            layer: as for `layer_energy`.

        Raises:
            ConfigurationError: this energy has no closed form for it.
        """
        raise ConfigurationError(
            f"{type(self).__name__} does not say where a layer goes under a given pull (Energy.best_response), which"
            " fixed-point relaxers iterate. Write that method, or relax by ebm.GradientDescent(...)."
        )

    @property
    def learns(self) -> bool:
        """Whether it follows what it observes, so that another process would come to another energy."""
        return False

    def check_layers(self, names: Collection[str]) -> None:
        """Told the names of the layers that carry states, once they are known; refuses settings for others."""

    def observe(self, errors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Offered x_l - rho(a_l) of each layer at the end of the first nudged phase of a step that is taken.

        Calling `errors` may cost an evaluation, so that only an energy that learns from them should.
        """

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        """The nearest state at which e is finite; the state itself unless e has a bounded domain."""
        return state

    def tangent(self, gradient: Tensor, state: Tensor, layer: LayerView) -> Tensor:
        """The gradient without what descent along it would leave the domain by; all of it unless e is bounded."""
        return gradient


_READERS = ("layer_energy", "layer_precision", "best_response", "feasible", "tangent")
"""Methods that are given a `LayerView`."""


def refuse_shapeless(energy: Energy, found: Any, layer: LayerView, batch_size: int) -> None:
    """Refuses what a layer is said to cost if samples cannot be told apart in it.

    Raises:
        ConfigurationError: it is no tensor, or its first dimension is not that of the samples.
    """
    if not isinstance(found, Tensor) or not found.ndim or not len(found) or len(found) % batch_size:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else checked.shown(found)
        raise ConfigurationError(
            f"{type(energy).__name__}.layer_energy returned {got} for layer {layer.name!r}; expected one number a unit,"
            f" in the shape of the state, or any shape that starts with the {batch_size} samples: what each of them"
            " costs is told apart, so leave sums and means over samples out."
        )


def is_divergence(energy: Energy) -> bool:
    """Whether e >= 0 is zero exactly at the forward pass, as a class says that still has the energy it says it of."""
    return is_quadratic(energy) or (bool(energy.divergence) and is_kept(energy, "divergence", "layer_energy"))


def reads_drive(energy: Energy) -> bool:
    """Whether the energy may look at the drives: unless it promises that it does not."""
    return bool(energy.reads_drive) or not is_kept(energy, "reads_drive", *_READERS)


def rests_at_prediction(energy: Energy) -> bool:
    """Whether the energy promises that a layer that nothing pulls is at its prediction."""
    return bool(energy.rests_at_prediction) and is_kept(energy, "rests_at_prediction", "layer_energy", "feasible")


def has_best_response(energy: Energy) -> bool:
    """Whether the energy says where layers go, and says it of the energy that it has."""
    return type(energy).best_response is not Energy.best_response and is_kept(energy, "best_response", "layer_energy")


def best_response(energy: Energy, pull: Tensor, layer: LayerView) -> Tensor:
    """`Energy.best_response`, unless it is that of another energy.

    Raises:
        ConfigurationError: a subclass overrides `layer_energy` and inherits the response that belonged to its parent's.
    """
    if not is_kept(energy, "best_response", "layer_energy"):
        name = type(energy).__name__
        raise ConfigurationError(
            f"{name} overrides layer_energy and inherits best_response, which is the minimum of its parent's energy:"
            f" fixed-point relaxers would relax the parent's energy and never see {name}'s. Write"
            f" {name}.best_response too, or relax by ebm.GradientDescent(...), which asks for layer_energy alone."
        )
    return energy.best_response(pull, layer)


def is_bounded(energy: Energy) -> bool:
    """Whether the energy's class restricts states to a domain."""
    return type(energy).feasible is not Energy.feasible


class QuadraticEnergy(Energy):
    """A divergence e = 1/2 Pi_l |x_l - rho(a_l)|^2, which can be written in the errors e_l = x_l - rho(a_l).

    In these coordinates nothing is ever subtracted, so a nudge of 1e-5 costs no digits in float32; relaxers that work
    on errors (`ErrorCoordinates`, `Sweep`) ask for this class. A subclass may write another ``layer_precision``; with
    another ``layer_energy`` it is no quadratic any more, and those relaxers refuse it.
    """

    divergence: ClassVar[bool] = True

    @abstractmethod
    def layer_precision(self, layer: LayerView) -> float | Tensor:
        """Pi_l > 0, a number or a tensor that broadcasts over the batch."""

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        return 0.5 * precision_of(self, layer) * (state - layer.prediction).square()

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return layer.prediction + pull / precision_of(self, layer)


def is_quadratic(energy: Energy) -> bool:
    """Whether e is 1/2 Pi |x - rho(a)|^2, so that Pi and the errors are all there is to know of it."""
    if not isinstance(energy, QuadraticEnergy) or "layer_energy" in vars(energy):
        return False
    return type(energy).layer_energy is QuadraticEnergy.layer_energy


def precision_of(energy: Energy, layer: LayerView) -> float | Tensor:
    """Pi_l of a quadratic energy, which relaxers and updates in error coordinates treat as a constant.

    Raises:
        ConfigurationError: it is a function of states or parameters that autograd would differentiate.
    """
    assert isinstance(energy, QuadraticEnergy)
    precision = energy.layer_precision(layer)
    if isinstance(precision, Tensor) and precision.requires_grad:
        name = type(energy).__name__
        raise ConfigurationError(
            f"{name}.layer_precision of layer {layer.name!r} has a gradient, as a function of parameters or states: the"
            " energy 1/2 Pi |x - rho(a)|^2 is written in errors with Pi as a constant, and its slope in Pi would be"
            f" left out. Return precision.detach(); or override {name}.layer_energy and take a relaxer of states, such"
            " as ebm.GradientDescent(...)."
        )
    return precision
