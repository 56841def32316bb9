"""Multipliers of the constraint that states are predictions."""

from typing import ClassVar

from lightning_ebm.updates.left_at_layers import LeftAtLayers


class Multipliers(LeftAtLayers):
    """`-1/lambda <m_l, dmu_l/dtheta>` at the relaxed states, with m_l = Pi_l d_l the multiplier of x_l = mu_l.

    The multipliers tend to backprop's deltas at a linear rate. `ebm.AugmentedLagrangian` leaves d_l.

    Source:
        arXiv 2605.31022 (2026).
    """

    name: ClassVar[str] = "multipliers"
