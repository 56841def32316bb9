"""What there is to say where weights learn through each other although there are states."""

from torch import nn

from lightning_ebm.program.module_walk import owners_of
from lightning_ebm.program.wiring import Plan


def what_goes_around(plan: Plan, module: nn.Module) -> str | None:
    """One line where much of the network is trained past the states, as a residual stream past its activations."""
    if len(plan.around) <= 2:  # one or two are tied weights, or a single skip
        return None
    some = ", ".join(name or "itself" for name in plan.around[:3])
    remedy = "States at whole blocks make it local: layers=BlockType or layers=[...]."
    if all(row.activation is None for row in plan.rows):
        remedy = (
            "The states are at whole modules already, and a skip, or a second loss such as that of a router, passes by"
            " them: a state at the module that returns it, layers=[...], or layers=nn.Linear make it local."
        )
    return (
        f"{len(plan.around)} weighted modules of {type(module).__name__} reach the loss around the states as well"
        f" ({some}, ...): that part of their update is the loss's own"
        f" gradient, through each other. {remedy} ebm.summary shows the layers."
    )


def what_is_left_in_one_drive(plan: Plan, module: nn.Module) -> str | None:
    """One line where a stray activation takes the states and most weights stay between two of them."""
    weighted = set(owners_of(module).values())
    largest = max(plan.rows, key=lambda row: row.modules_between)
    if largest.activation is None or not 4 <= largest.modules_between > len(weighted) / 2:
        return None
    return (
        f"{largest.modules_between} of {len(weighted)} weighted modules of {type(module).__name__} lie in the drive of"
        f" one layer, {largest.key} ({largest.activation}): they learn by backprop through each other, as activations"
        " that are no modules (F.relu) carry no state. Put states into the body: layers=BlockType, layers=nn.Linear or"
        " layers=[...]. ebm.summary shows the layers."
    )
