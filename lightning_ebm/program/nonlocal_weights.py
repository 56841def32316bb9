"""What is said where weights learn through each other although there are states."""

import logging

from torch import nn

from lightning_ebm.program.calls import clean
from lightning_ebm.program.wiring import Plan

log = logging.getLogger(__name__)


def say_what_goes_around(plan: Plan, module: nn.Module) -> None:
    """One line where much of the network is trained past the states, as a residual stream past its activations."""
    if len(plan.around) > 2:  # one or two are tied weights, or a single skip
        log.warning(
            "%d weighted modules of %s reach the loss around the states as well (%s, ...): that part of their update is"
            " the loss's own gradient, through each other. States at whole blocks make it local: layers=BlockType or"
            " layers=[...]. ebm.summary shows the layers.",
            len(plan.around),
            type(module).__name__,
            ", ".join(plan.around[:3]),
        )


def say_what_is_left_in_one_drive(plan: Plan, module: nn.Module) -> None:
    """One line where a stray activation takes the states and most weights stay between two of them."""
    weighted = {clean(name) for name, m in module.named_modules() if any(True for _ in m.parameters(recurse=False))}
    largest = max(plan.rows, key=lambda row: row.modules_between)
    if largest.activation is not None and 4 <= largest.modules_between > len(weighted) / 2:
        log.warning(
            "%d of %d weighted modules of %s lie in the drive of one layer, %s (%s): they learn by backprop through"
            " each other, as activations that are no modules (F.relu) carry no state. Put states into the body:"
            " layers=BlockType, layers=nn.Linear or layers=[...]. ebm.summary shows the layers.",
            largest.modules_between,
            len(weighted),
            type(module).__name__,
            largest.key,
            largest.activation,
        )
