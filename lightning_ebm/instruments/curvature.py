"""A certificate of a training step: whether its states rest in a minimum, and how curved the loss is there."""

import dataclasses
from typing import Any

import torch

from lightning_ebm import notebook
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.instruments.spectrum import Hessian, spectrum_of
from lightning_ebm.nudges.base import without_draw
from lightning_ebm.step.step import Step
from lightning_ebm.updates.base import label


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Eigenvalues of second derivatives in the states, of the batch as a whole, where the update was read.

    Attributes:
        smallest: of d2(I + lambda L)/dx2: the states rest in a minimum if it is positive, at a saddle if it is
            negative. At kinks it is that of the piece they are on.
        largest: of the same: descent on states is stable up to a step of 2 over it.
        loss: of lambda d2L/dx2, the one that is furthest from 0: below -1 the loss alone can tip a state over in an
            energy of unit precision, and far above 1 it decides where states go.
        exact: whether Lanczos had as many steps as there are states; else the ends are those of a Krylov space, the
            smallest from above and the largest from below.
    """

    smallest: float
    largest: float
    loss: float
    exact: bool

    @property
    def verdict(self) -> str:
        """In words."""
        if self.smallest > 0:
            return "in a minimum" if self.exact else "in a minimum, as far as was seen"
        return "at a saddle"

    def __str__(self) -> str:
        return (
            f"{self.verdict}: curvatures of the energy from {self.smallest:.4g} to {self.largest:.4g}, of the loss in"
            f" it up to {self.loss:.4g}"
        )

    def _repr_html_(self) -> str:
        rows = [("smallest", f"{self.smallest:.4g}"), ("largest", f"{self.largest:.4g}"), ("loss", f"{self.loss:.4g}")]
        return notebook.table(self.verdict, ("curvature", ""), rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and words, for `json.dumps`."""
        return dataclasses.asdict(self) | {"verdict": self.verdict}


def of_step(step: Step, algorithm: Algorithm, steps: int = 32, seed: int = 0) -> Curvature:
    """The curvature of a training step, while its batch is still there: it is relaxed once more.

    Args:
        step: the last one.
        algorithm: of the learner.
        steps: of Lanczos, each of them a product of the Hessian with a vector.
        seed: of its start.

    Raises:
        ConfigurationError: nothing relaxes to real states that an energy could be differentiated at.
    """
    # Looking on must not draw the training's next sign.
    algorithm = dataclasses.replace(algorithm, nudge=without_draw(algorithm.nudge))
    if algorithm.rule.relaxes and (algorithm.nudge.complex_states or not algorithm.relaxer.ends_in_states):
        raise _undefined(algorithm)
    _, again = step.again(algorithm)
    try:
        network = again.network
        assert network is not None
        ends = [end for end in again.phases if end.phase.is_nudged and not end.phase.held] or again.phases
        if not ends:  # linear response, and updates that relax nothing
            raise _undefined(algorithm)
        # Copies: of the states themselves the network remembers a pass whose graph the update has used up.
        found = network.held(ends[0].found).in_states(lambda states: [x.clone() for x in states])
        strength = ends[0].strength.real
        nothing = [torch.zeros_like(x, dtype=torch.bool) for x in found.point]
        whole = spectrum_of(network, found, nothing, strength, steps, seed)
        loss = 0.0
        if strength:
            pulled = spectrum_of(network, found, nothing, strength, steps, seed, of=Hessian.LOSS)
            loss = max((pulled.smallest, pulled.largest), key=abs)
        exact = steps >= sum(x.numel() for x in found.point)
        return Curvature(whole.smallest, whole.largest, loss, exact)
    finally:
        again.release()


def _undefined(algorithm: Algorithm) -> ConfigurationError:
    return ConfigurationError(
        f"The curvature of update={label(algorithm.rule)!r} under {algorithm.nudge!r} is not defined: no phase of it"
        " ends at real states at which the energy could be differentiated. Measure the same energy with"
        " ebm.OneSided(...) and a relaxer that goes to its minimum."
    )
