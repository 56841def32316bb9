"""What is off, in words, with the remedy."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.counted import counted
from lightning_ebm.nudges.base import table_of, without_draw


def low_alignment(cosine: float, times: int, step: int) -> str:
    """The update has pointed elsewhere for long."""
    return (
        f"The cosine of the update to the true gradient has been low for {times} comparisons, {cosine:.2f} at step"
        f" {step}. Either that is the method (predictive coding at a finite nudge is not backprop), or the nudge is too"
        " strong, nudge=ebm.OneSided(0.1), or the relaxation is cut off too early: see its residual with"
        " ebm.RelaxationMonitor(). (Said once.)"
    )


def unsettled(cut_off: int, monitored: int, residual: float, remedy: str) -> str:
    """Most relaxations end above their tolerance."""
    return (
        f"{cut_off} of {monitored} monitored relaxations were still moving when max_steps was reached, the last with"
        f" {residual:.2g} of the force it began with: the updates were read on the way. {remedy} (Said"
        " once.)"
    )


def stopped_relaxing(layer: str, step: int) -> str:
    """A layer's force ends larger than it began."""
    return (
        f"Layer {layer} has stopped relaxing at step {step}: its residual grew. The states' step is too large for the"
        " weights of now; lower the relaxer's lr, or take one that chooses its own:"
        " ebm.ErrorCoordinates(max_steps=64, tol=1e-3)."
    )


def unreached(layers: Sequence[str], step: int) -> str:
    """The relaxation stops before the signal has arrived, or has arrived smaller than rounding."""
    return (
        f"No signal reaches layers {', '.join(layers)} at step {step}: their error is zero, or rounding noise that an"
        " optimizer with normalized steps (Adam) turns into full updates. Take more steps, a larger step of the states,"
        " or error coordinates, in which every layer hears of the loss at once: ebm.ErrorCoordinates(...)."
    )


def dead(names: Sequence[str], step: int) -> str:
    """Parameters with an update or a true gradient of exactly zero."""
    have = "has" if len(names) == 1 else "have"
    return (
        f"Dead at step {step}: {', '.join(names)} {have} a gradient of exactly zero: nothing is learned there,"
        " and there is no alignment. Look for units that never fire (ReLU with large negative biases), or for inputs"
        " that do not vary."
    )


def _counted(names: Sequence[str]) -> str:
    """The first four by name, and how many more; with the verb."""
    more = len(names) - 4
    told = ", ".join(names[:4]) + (f" and {counted(more, 'more parameter')}" if more > 0 else "")
    return f"{told} {'has' if len(names) == 1 else 'have'}"


def before_training(algorithm: Algorithm, learning_rates: Sequence[float], dtype: torch.dtype) -> list[str]:
    """What the settings alone give away.

    Args:
        algorithm: to be trained with.
        learning_rates: of the optimizers of the parameters.
        dtype: of the parameters.
    """
    if not algorithm.rule.relaxes:
        return []
    found = []
    phases = table_of(without_draw(algorithm.nudge))
    strengths = [abs(phase.strength) for phase in phases if phase.strength and not phase.held]
    weakest = min(strengths, default=1.0)
    in_states = not algorithm.relaxer.needs_error_coordinates
    if weakest < 1e-3 and in_states and dtype != torch.float64:
        found.append(
            f"The nudge {weakest:g} is under the floor of float32 for a relaxer of states: they hold prediction + error"
            f" with a rounding of 1e-7, which is up to {1e-7 / weakest:.1g} of the error. Take ebm.ErrorCoordinates(),"
            " where the error itself is stored, a nudge of at least 1e-3, or Trainer(precision='64-true')."
        )
    largest = max(learning_rates, default=0.0)
    if weakest <= 0.01 and largest >= 0.5:
        found.append(
            f"The learning rate is {largest:g} at a nudge of {weakest:g}. The update is divided by the nudge already,"
            " so that a learning rate tuned for backprop carries over; one that was scaled by 1 / nudge, as published"
            f" code does, is too large by that factor. If it was, use {largest * weakest:g}."
        )
    return found


def findings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the records of a run's file give away, in order of weight; each thing once, at the step it began."""
    found = [f"The run stopped at step {r['step']}: {r['stopped']}" for r in records if "stopped" in r][:1]
    traces = [(r["step"], r["relaxation"]) for r in records if "relaxation" in r]
    found += [stopped_relaxing(layer, step) for layer, step in _grown(traces).items()]
    silent = next((r for r in records if r.get("dead")), None)
    silenced = next((r for r in records if r.get("regime", {}).get("unreached")), None)
    if silent is not None:  # nothing reaches what is below a dead layer, and more steps are no remedy
        found.append(dead(list(silent["dead"]), silent["step"]))
    elif silenced is not None:
        found.append(unreached(silenced["regime"]["unreached"], silenced["step"]))
    return found + list(dict.fromkeys(r["advice"] for r in records if "advice" in r))


def verdict(records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """One word for a run, and the sentence behind it.

    The words are "diverged", "stopped", "dead", "cut off" and "stalled" (more than a quarter of the relaxations),
    "sound", and "unknown".
    """
    traces = [(r["step"], r["relaxation"]) for r in records if "relaxation" in r]
    compared = [r for r in records if "alignment" in r]
    for record in records:
        if "stopped" in record:
            return "diverged" if "Diverged" in record["stopped"] else "stopped", (
                f"the run stopped at step {record['step']}: {record['stopped'].partition(':')[0]}"
            )
    grown = _grown(traces)
    if grown:
        return "diverged", f"the residual of {', '.join(grown)} grows"
    names = next((list(r["dead"]) for r in reversed(compared[-1:]) if r["dead"]), [])
    if names:
        return "dead", f"{_counted(names)} a gradient of exactly zero"
    if not traces and not compared:
        return "unknown", "nothing was recorded; train with ebm.RelaxationMonitor() and ebm.GradientAlignment()"
    if not traces:
        return "sound", "every layer has a gradient; how states relax was not recorded"
    return _settled([relaxation for _, relaxation in traces])


def _settled(relaxations: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """How relaxations ended; "kink" is an end, as no energy is left to gain, and so is "max_steps" where none is."""
    late = [r for r in relaxations if _is_late(r)]
    stalled = [r for r in relaxations if r["status"] == "stalled"]
    whole = len(relaxations)
    if len(late) + len(stalled) <= whole / 4:
        return "sound", f"{whole - len(late) - len(stalled)} of {whole} relaxations settled, and no layer is dead"
    if len(late) >= len(stalled):
        left = f"the last with {late[-1]['residual']:.0%} of its force left"
        return "cut off", f"{len(late)} of {whole} relaxations were still moving when they ended, {left}"
    left = f"the last with {stalled[-1]['residual']:.0%} of its force left"
    return "stalled", f"{len(stalled)} of {whole} relaxations found no lower energy although forces remained, {left}"


def _is_late(relaxation: Mapping[str, Any]) -> bool:
    if relaxation["status"] == "fixed":
        return bool(relaxation["residual"] > 0.1)
    return bool(relaxation.get("cut_off", relaxation["status"] == "max_steps"))  # files of older runs do not say


def _grown(traces: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, int]:
    """Layers whose residual ends above its start at the last monitored step, and since when without a break."""
    since: dict[str, int] = {}
    for step, relaxation in traces:
        now = set()
        for phase in relaxation["phases"]:
            pairs = zip(relaxation["layers"], phase["residual"][0], phase["residual"][-1], strict=True)
            largest = max(phase["residual"][0], default=0.0)
            # A layer that nothing pulled at first is pulled by its neighbors: only forces beyond all that began count.
            now |= {name for name, first, last in pairs if last > max(first, largest)}
        since = {name: since.get(name, step) for name in now}
    return since
