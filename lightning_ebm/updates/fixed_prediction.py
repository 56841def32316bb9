"""Errors that settle around predictions that do not move."""

from typing import ClassVar

from lightning_ebm.updates.left_at_layers import LeftAtLayers


class FixedPrediction(LeftAtLayers):
    """`-1/lambda <Pi_l d_l, dmu_l/dtheta>` at the forward pass, with d_l the error at rest around frozen predictions.

    The product is backprop's gradient at any nudge. The relaxer `ebm.FixedPrediction` leaves d_l.

    Source:
        Millidge, Tschantz, Buckley 2022 (arXiv 2006.04182).
    """

    name: ClassVar[str] = "fixed-prediction"
