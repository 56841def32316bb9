"""What a learner fixes for all of its steps."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from lightning_ebm import checked
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies.base import is_divergence, is_quadratic, rests_at_prediction
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.network.clamp import Clamp
from lightning_ebm.network.samples import FOUND, Samples
from lightning_ebm.program.layers import Output, check_layers
from lightning_ebm.program.programs import Programs
from lightning_ebm.program.wiring import Plan
from lightning_ebm.step.report import PhaseReport
from lightning_ebm.step.state_memory import StateMemory
from lightning_ebm.step.unsettled import Unsettled

Remember = Callable[[Sequence[str], Sequence[PhaseReport], Tensor, str], None]
Code = Literal["traced", "compiled"] | None
Observer = Callable[[Landscape], Landscape]


def unheard(names: Sequence[str], phases: Sequence[PhaseReport], loss: Tensor, runs_as: str) -> None:
    """Nobody asks how a step went."""


@dataclass(frozen=True)
class Setup:
    """The module, the algorithm, and how the one is run and the other is told.

    Attributes:
        module: the user's module.
        algorithm: how to relax and what to read off.
        programs: record the module's passes, and know them.
        quiet: silences what only the caller knows how to silence, in a pass without side effects.
        remember: told the names of the states, how the phases went, and the loss.
        loss_reduction: "mean" or "sum".
        samples: how many there are, and what factor the loss carries.
        code: whether evaluations of programs that come again run as code, "traced" or "compiled".
        memory: of the states that samples were left in; None starts all from the forward pass.
        clamp: by the name of a layer, what its units are held at in every phase; None holds nothing.
        free: names of layers without a term of their own.
        observer: put in the network's place before anything relaxes on it, to watch.
        unsettled: looks at sweeps that were cut off.
    """

    module: nn.Module
    algorithm: Algorithm
    programs: Programs
    quiet: Callable[[], AbstractContextManager[Any]]
    remember: Remember
    loss_reduction: Literal["mean", "sum"]
    samples: Samples = field(default=FOUND)
    code: Code = None
    memory: StateMemory | None = None
    observer: Observer | None = None
    clamp: Clamp | None = None
    free: Sequence[str] = ()
    unsettled: Unsettled = field(default_factory=Unsettled)

    def apart(self) -> "Setup":
        """For a step that is only looked at, and from which nothing learns."""
        return replace(self, unsettled=self.unsettled.apart)

    def is_free_forward(self, plan: Plan) -> bool:
        """Whether the free equilibrium is the forward pass, so that a relaxation that begins there stays there."""
        algorithm = self.algorithm
        if self.clamp is not None:  # what is held pulls on the rest
            return False
        if algorithm.relaxer.draws_samples and not is_quadratic(algorithm.energy):
            return False  # the normalizer of its distribution depends on parameters
        alone = rests_at_prediction(algorithm.energy) and not any(row.parents for row in plan.rows)
        return is_divergence(algorithm.energy) or (alone and algorithm.initial_state == "forward")


def check_options(layers: Any, output: Any, loss_reduction: Any, capture: Any, compile: Any) -> None:
    """Refuses settings that mean nothing, where they were written."""
    check_layers(layers)
    checked.choice("", "output", output, ("auto", "readout", "state"))
    why = (
        ", as your loss reduces over the batch; it decides by how much the nudge is multiplied, and a wrong one is a"
        " factor of the batch size"
    )
    checked.choice("", "loss_reduction", loss_reduction, ("mean", "sum"), why)
    checked.flag("", "capture", capture)
    if checked.flag("", "compile", compile) and not capture:
        checked.refuse("", "compile", compile, "False beside capture=False: what is compiled is the code of capture")


def output_for(algorithm: Algorithm, output: Output) -> Output:
    """`output`, with "auto" resolved where the nudge holds the output and so needs it to be a state."""
    if not algorithm.nudge.needs_output_state or not algorithm.rule.relaxes:
        return output
    if output == "readout":
        raise ConfigurationError(
            f'{algorithm.nudge!r} holds the output at a value, so the output must be a state: output="state", not'
            ' "readout". Leave output="auto".'
        )
    return "state"
