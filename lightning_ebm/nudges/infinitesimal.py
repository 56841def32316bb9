"""The limit of a vanishing nudge, taken exactly."""

from dataclasses import dataclass

from lightning_ebm.nudges.base import Nudge, Phase


@dataclass(frozen=True)
class Infinitesimal(Nudge):
    """lambda -> 0: d/dlambda dE/dtheta(x_lambda) at the free equilibrium, by linearizing there.

    H dx/dlambda = -dL/dx is solved by conjugate gradients (H = d2I/dx2), and the update is
    `dL/dtheta + <dx/dlambda, d2I/dx dtheta>`: the gradient of the loss at the free equilibrium, without a finite
    difference and so without its bias and without its round-off. States are not moved, only the free phase is relaxed,
    by the algorithm's relaxer. The price is a second derivative of the network: some fused kernels have none.

    Source:
        Almeida 1987, Pineda 1987 (recurrent backpropagation); Scellier and Bengio 2019 for the equivalence.
    """

    def phases(self) -> tuple[Phase, ...]:
        return ()
