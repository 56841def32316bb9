"""A pass of the user's code that leaves no trace, and what it was."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from lightning_ebm.program.programs import Found
from lightning_ebm.program.recorder import Recorder
from lightning_ebm.purity import build, untouched, without_iterators
from lightning_ebm.step.arithmetic import Arithmetic
from lightning_ebm.step.closure import Closure
from lightning_ebm.step.recorded import Recorded
from lightning_ebm.step.setup import Setup


def run_quietly(
    setup: Setup,
    closure: Closure,
    arithmetic: Arithmetic,
    find: Callable[[Recorder, Any], Found],
    arguments: Any = None,
    again: bool = False,
) -> Recorded:
    """Runs a pass, finds out what it was, and undoes its side effects.

    Args:
        setup: of the learner.
        closure: runs the pass.
        arithmetic: how passes are run.
        find: tells what it was, from what recorded it and what it returned.
        arguments: see `Step`.
        again: whether the user's own is still to come.
    """
    recorder = Recorder(undoes=True)

    def returned_quietly() -> Any:
        with setup.quiet(), without_iterators(setup.module) if again else nullcontext():
            return closure()

    build(setup.module, returned_quietly)
    try:
        with untouched(setup.module, tensors=False), torch.enable_grad():
            with setup.programs.recording(recorder), arithmetic.derivatives():
                returned = returned_quietly()
            # While its graph can be differentiated: what that saved has not been written to.
            return Recorded.of(find(recorder, returned), recorder, returned, arguments)
    finally:
        recorder.contents.undo()
