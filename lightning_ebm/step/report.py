"""How the last step went, in plain numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from lightning_ebm import notebook
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.relaxers import Relaxation


class PhaseEntry(TypedDict):
    """One relaxation.

    Attributes:
        nudge: lambda; as text where it is complex.
        status: see `Relaxation`.
        steps: of the slowest sample.
        energies: I + lambda L of the batch at the start and after each step, its real part where the nudge is complex;
            of relaxers that need no energy to move (`FixedPoint`), at the start and the end only.
        residual: force left over force at the start, of each sample.
        gain_left: the energy still to be gained, extrapolated from the last steps, over what was gained; None where the
            relaxer makes no estimate, or its steps promise no end. A plateau, as of quasi-Newton steps, makes it too
            small.
    """

    nudge: float | str
    status: str
    steps: int
    energies: list[float]
    residual: list[float]
    gain_left: float | None


class Report(TypedDict):
    """What a step did; JSON-able.

    Attributes:
        loss: of the forward pass, in the user's own reduction.
        result: the worst status of the phases: "converged", "kink" (no energy left to gain though forces remain, as at
            kinks of ReLU), "stalled" (the energy falls no further though it is smooth and forces remain), "fixed" (as
            many steps as asked for), "max_steps" (still moving when the count was up), "none" (backprop).
        steps: of all phases together.
        residual: force left over force at the start, the worst of the phases, of each sample.
        energy_free: I of the batch at the forward pass or free equilibrium; nan where the relaxer tells no energies.
        energy_nudged: I + lambda L of the batch at the end of the first nudged phase; likewise.
        phases: each of them.
        layers: the names of the states.
        algorithm: its parts as text, with what "auto" has chosen.
        kernels: which way the relaxation ran, "plain", "traced" or "compiled", and by which instructions of the
            processor torch computes, such as "traced: AVX2".
        skipped: how many batches so far could not relax, and were left out.
        fallbacks: how many of them were taken by another algorithm.
    """

    loss: float
    result: str
    steps: int
    residual: list[float]
    energy_free: float
    energy_nudged: float
    phases: list[PhaseEntry]
    layers: list[str]
    algorithm: dict[str, str]
    kernels: str
    skipped: int
    fallbacks: int


@dataclass(frozen=True)
class PhaseReport:
    """A relaxation without its states."""

    nudge: complex
    status: str
    steps: int
    residual: Tensor
    energies: Sequence[Tensor]
    gain_left: Tensor | None = None

    @classmethod
    def of(cls, nudge: complex, found: Relaxation) -> "PhaseReport":
        """Keeps what a report needs, so that the states can be freed."""
        return cls(nudge, found.status, found.steps, found.residual.detach(), found.energies, found.gain_left)

    @property
    def ended(self) -> tuple[float, float | None]:
        """The largest residual, and the energy still to be gained as in `PhaseEntry`, read off the device at once."""
        worst = self.residual.max()
        if self.gain_left is None:
            return float(worst), None
        residual, left = torch.stack([worst, self.gain_left.to(worst)]).tolist()
        return residual, left if math.isfinite(left) else None

    def stayed(self, worst: float) -> bool:
        """Whether steps were tried, and none was taken.

        The energy is that of the start to rounding. Under a weak nudge it may be where states have moved, but then the
        largest residual, `worst`, is less than before.
        """
        if not self.steps or len(self.energies) < 2 or worst < _AS_BEFORE:
            return False
        first, last = self.energies[0], self.energies[-1]
        eps = torch.finfo(first.dtype).eps
        return bool(((first - last).abs() <= 16 * eps * first.abs()).all())


def cut_off(status: str, gain_left: float | None) -> bool:
    """Whether a budget of steps has ended before the states had arrived, with energy left that is worth gaining."""
    return status == "max_steps" and (gain_left is None or gain_left > _LEVEL)


def was_cut_off(report: Report) -> bool:
    """Whether any of its phases was, see `cut_off`."""
    return any(cut_off(phase["status"], phase["gain_left"]) for phase in report["phases"])


_LEVEL = 1e-3
"""Of the energy gained: what may be left to gain where a budget of steps has ended."""
_AS_BEFORE = 0.9
"""A residual, over the first, from which on no state can have moved to speak of."""


class Shown(dict[str, Any]):
    """A `Report` that a notebook shows as a table; to everything else it is the dictionary."""

    def _repr_html_(self) -> str:
        worst = max(self["residual"], default=0.0)
        rows = [
            ("loss", f"{self['loss']:.6g}"),
            ("steps", str(self["steps"])),
            ("force left, worst sample", f"{worst:.3g}"),
            *((f"phase at nudge {p['nudge']}", _ended(p)) for p in self["phases"]),
            *self["algorithm"].items(),
            ("kernels", self["kernels"]),
        ]
        return notebook.table(f"Last step: {self['result']}", (), rows)


def _ended(phase: PhaseEntry) -> str:
    """How a phase ended, in words."""
    told, left = f"{phase['status']} after {phase['steps']} steps", phase["gain_left"]
    return f"{told}, with {left:.2g} of what was gained still to gain" if left else told


_WORST_FIRST = ("max_steps", "fixed", "stalled", "kink", "converged")


def report_of(
    algorithm: Algorithm,
    names: Sequence[str],
    phases: Sequence[PhaseReport],
    loss: Tensor,
    runs_as: str,
    counts: Mapping[str, int],
) -> Report:
    """Reads the numbers off the device, once."""
    entries: list[PhaseEntry] = [
        {
            "nudge": str(phase.nudge) if isinstance(phase.nudge, complex) else phase.nudge,
            "status": phase.status,
            "steps": phase.steps,
            "energies": torch.stack(list(phase.energies)).tolist() if phase.energies else [],
            "residual": phase.residual.tolist(),
            "gain_left": phase.ended[1],
        }
        for phase in phases
    ]
    found = {phase["status"] for phase in entries}
    nudged = next((phase for phase in entries if phase["nudge"]), None)
    free = next((phase for phase in entries if not phase["nudge"]), None)
    residuals = [phase.residual for phase in phases]
    report: Report = {
        "loss": float(loss),
        "result": next((status for status in _WORST_FIRST if status in found), "none"),
        "steps": sum(phase["steps"] for phase in entries),
        "residual": torch.stack(residuals).amax(0).tolist() if residuals else [],
        "energy_free": _last(free) if free else 0.0,
        "energy_nudged": _last(nudged) if nudged else 0.0,
        "phases": entries,
        "layers": list(names),
        "algorithm": algorithm.describe(),
        "kernels": f"{runs_as}: {torch.backends.cpu.get_cpu_capability()}",
        "skipped": counts["skipped"],
        "fallbacks": counts["fallbacks"],
    }
    return cast(Report, Shown(report))


def _last(phase: PhaseEntry) -> float:
    """The energy at the end, if the relaxer tells it."""
    return phase["energies"][-1] if phase["energies"] else math.nan
