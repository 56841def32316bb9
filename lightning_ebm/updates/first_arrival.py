"""The error that arrives first."""

from typing import ClassVar

from lightning_ebm.updates.left_at_layers import LeftAtLayers


class FirstArrival(LeftAtLayers):
    """`-1/lambda <Pi_l d_l, dmu_l/dtheta>` at the forward pass, with d_l the error with which the signal first arrives.

    The product is backprop's gradient at any nudge. `ebm.Sweep` leaves d_l.

    Source:
        Song et al. 2020; Salvatori et al. 2022.
    """

    name: ClassVar[str] = "first-arrival"
    linear_in_loss: ClassVar[bool] = True
