"""Equilibria that are looked at, and that nothing is learned from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_ebm.errors import LayerDiscoveryError
from lightning_ebm.program.calls import in_place
from lightning_ebm.program.programs import Found
from lightning_ebm.program.recorder import Recorder
from lightning_ebm.relaxers import Relaxation
from lightning_ebm.step.arithmetic import Arithmetic
from lightning_ebm.step.closure import Closure, check_closure, checked_loss, is_number
from lightning_ebm.step.phases import Phases
from lightning_ebm.step.quiet_pass import run_quietly
from lightning_ebm.step.second_run import told_of_states_in_place
from lightning_ebm.step.setup import Setup
from lightning_ebm.step.user_pass import UserPass


@contextmanager
def at_equilibrium(setup: Setup, closure: Closure, strength: float) -> Iterator[tuple[Phases, Relaxation, bool]]:
    """Gives the states of I + strength * L, of I where the pass returns no loss; and whether it returns one.

    Args:
        setup: of the learner.
        closure: runs the pass.
        strength: lambda.

    Raises:
        LayerDiscoveryError: no layer carries a state.
    """

    def find(recorder: Recorder, returned: Any) -> Found:
        if not strength and not is_number(returned):
            return setup.programs.without_loss(recorder)
        return setup.programs.of(recorder, checked_loss(returned, setup.module))

    seen, phases = _run(setup, closure, find)
    if not seen.known.plan.states:
        raise LayerDiscoveryError(
            "No layer carries a state here, as no trainable weight lies behind another: there is no equilibrium to"
            " find. Let the layers of interest be trained, or name them: layers=[...]."
        )
    has_loss = seen.known.loss is not None
    begun = phases()
    yield begun, begun.equilibrium(strength), has_loss
    seen.release()


@contextmanager
def at_free_equilibrium(setup: Setup, closure: Closure) -> Iterator[None]:
    """Within it the module computes with its states at the free equilibrium, and nothing is recorded.

    Args:
        setup: of the learner.
        closure: runs what runs within.
    """
    seen, phases = _run(setup, closure, lambda recorder, _: setup.programs.without_loss(recorder))
    if setup.is_free_forward(seen.known.plan) or seen.known.is_empty:
        yield
        return
    keys = [mark.key for mark in seen.known.program.marks]
    free = phases().relax_freely(teaches=False)
    with in_place(setup.module, dict(zip(keys, free.point, strict=True))), told_of_states_in_place():
        yield


def _run(
    setup: Setup, closure: Closure, find: Callable[[Recorder, Any], Found]
) -> tuple[UserPass, Callable[[], Phases]]:
    """A quiet pass, and what begins its phases."""
    check_closure(closure)
    setup = setup.apart()
    arithmetic = Arithmetic(setup.algorithm.rule.second_derivatives)
    seen = UserPass(setup.module, None, None)
    seen.recorded = run_quietly(setup, closure, arithmetic, find)
    return seen, lambda: seen.phases(setup, arithmetic)
