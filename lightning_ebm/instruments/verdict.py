"""In which regime an update was read, layer by layer, in numbers and in words."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_ebm import checked, notebook
from lightning_ebm.errors import ConfigurationError

Reach = Literal["signal", "rounding", "none", "read-out"]

BACKPROP, EQUILIBRIUM, BETWEEN, SAME = "backprop's direction", "equilibrium", "in between", "both: they coincide"
NEITHER = "neither: a direction of its own"


def effective_steps(energies: Sequence[float], share: float = 0.99) -> int:
    """How many steps of a relaxation counted: the first t at which `share` of the whole fall of the energy was made.

    min {t: F_0 - F_t >= share (F_0 - F_T)}, with the fall to the end; 0 where the energy has not fallen. What comes
    after is spent on the rest. It says nothing of what an equilibrium further down would have taken: that is
    `Regime.relaxed`.

    Args:
        energies: F_0 at the start and after each step, ``(T + 1,)``: `Relaxed.trace`, or those of a phase of
            `Learner.report`. Relaxers that need no energies to move, as `FixedPoint`, give the first and last alone.
        share: of the fall, in (0, 1].

    Raises:
        ConfigurationError: no energies, or a share that is none.

    Examples:
        >>> effective_steps([10.0, 4.0, 1.0, 0.1, 0.0], share=0.9)
        2
    """
    share = checked.number("effective_steps", "share", share, "a share of the fall, such as 0.99", above=0, most=1)
    values = [float(energy) for energy in energies]
    if not values:
        raise ConfigurationError(
            "effective_steps: there are no energies. Take relaxed.trace, or the energies of one phase of"
            ' learner.report["phases"].'
        )
    fall = values[0] - values[-1]
    if not fall > 0:
        return 0
    return next(t for t, energy in enumerate(values) if values[0] - energy >= share * fall or t == len(values) - 1)


@dataclass(frozen=True)
class LayerRegime:
    """One layer; g its update where the relaxation stopped, g* at equilibrium, b backprop's gradient, all parameters of
    the layer's drive as one vector.

    Attributes:
        name: of the state; "readout" for what lies between the last states and the loss.
        parameters: names of those in its drive.
        cosine_stop: of g and b.
        cosine_equilibrium: of g* and b.
        norm_ratio_stop: |g| / |b|.
        norm_ratio_equilibrium: |g*| / |b|.
        error_ratio: |e_l| / |e_l*|, how much of its equilibrium error the layer has built up; nan for the read-out.
        reach: "signal"; "none", the error is exactly zero, as nothing has arrived; "rounding", the state has moved by
            no more than its own rounding (4 eps |x_l|, over units that are not at 0), so that an optimizer that
            normalizes its steps, as Adam, trains this layer on noise; "read-out".
        toward_equilibrium: from 0, backprop's direction, to 1, equilibrium's: `angle(g, b) / (angle(g, b) + angle(g,
            g*))`; nan where the two directions coincide within two degrees, or g is dead.
        detour: `angle(g, b) + angle(g, g*) - angle(b, g*)`, degrees: 0 where g is on the arc from one to the other. It
            need not: both ends may be backprop's (a tiny nudge), and what is read on the way be another direction.
    """

    name: str
    parameters: tuple[str, ...]
    cosine_stop: float
    cosine_equilibrium: float
    norm_ratio_stop: float
    norm_ratio_equilibrium: float
    error_ratio: float
    reach: Reach
    toward_equilibrium: float
    detour: float

    @property
    def verdict(self) -> str:
        """`reach`, `detour` and `toward_equilibrium` in words."""
        if self.reach == "none":
            return "no signal"
        if self.reach == "rounding":
            return "rounding noise"
        return NEITHER if self.detour > _DETOUR else in_words(self.toward_equilibrium)


@dataclass(frozen=True)
class Regime:
    """The regime of one step.

    Attributes:
        relaxed: (F_0 - F_T) / (F_0 - F*), energies of the batch at the start, where the relaxation stopped, and at
            equilibrium, in the first nudged phase.
        layers: one a layer, from the input up, the read-out last.
        steps: taken before stopping.
        settled: whether the relaxation that stands for equilibrium converged (or is at a kink).
        effective_steps: how many of the steps made 99 % of what fell, see `effective_steps`; None where the relaxer
            needs no energies to move, and so tells none.
    """

    relaxed: float
    layers: tuple[LayerRegime, ...]
    steps: int
    settled: bool
    effective_steps: int | None = None

    @property
    def toward_equilibrium(self) -> float:
        """Mean over the layers that have one."""
        alive = [layer.toward_equilibrium for layer in self.layers if layer.reach in _ALIVE]
        found = [share for share in alive if not math.isnan(share)]
        return sum(found) / len(found) if found else math.nan

    @property
    def verdict(self) -> str:
        """`toward_equilibrium` in words, unless most layers go elsewhere."""
        alive = [layer for layer in self.layers if layer.reach in _ALIVE]
        elsewhere = sum(layer.verdict == NEITHER for layer in alive)
        return NEITHER if elsewhere > len(alive) / 2 else in_words(self.toward_equilibrium)

    @property
    def unreached(self) -> tuple[str, ...]:
        """Layers that are trained on nothing, or on rounding noise."""
        return tuple(layer.name for layer in self.layers if layer.reach not in _ALIVE)

    def __str__(self) -> str:
        lines = [
            f"{self.verdict}: relaxed {self.relaxed:.3f} of the way down in {self.steps} steps",
            f"{'layer':<24} {'cos stop':>9} {'cos eq.':>9} {'|g|/|b|':>9} {'at eq.':>9} {'error':>7}  regime",
        ]
        for layer in self.layers:
            error = "" if math.isnan(layer.error_ratio) else f"{layer.error_ratio:.3f}"
            lines.append(
                f"{layer.name:<24} {layer.cosine_stop:>9.4f} {layer.cosine_equilibrium:>9.4f}"
                f" {layer.norm_ratio_stop:>9.3g} {layer.norm_ratio_equilibrium:>9.3g} {error:>7}  {layer.verdict}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        headers = ("layer", "cosine, stop", "at equilibrium", "|g| / |b|", "at equilibrium", "regime")
        rows = [
            (
                layer.name,
                *(f"{value:.4f}" for value in (layer.cosine_stop, layer.cosine_equilibrium)),
                *(f"{value:.3g}" for value in (layer.norm_ratio_stop, layer.norm_ratio_equilibrium)),
                layer.verdict,
            )
            for layer in self.layers
        ]
        return notebook.table(str(self).partition("\n")[0], headers, rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and words, for `json.dumps`; nan as None."""
        found = asdict(self) | {"verdict": self.verdict, "unreached": list(self.unreached)}
        found["toward_equilibrium"] = self.toward_equilibrium
        found["layers"] = [asdict(layer) | {"verdict": layer.verdict} for layer in self.layers]
        plain: dict[str, Any] = _without_nan(found)
        return plain


_ALIVE = ("signal", "read-out")
_DETOUR = 20.0


def in_words(toward_equilibrium: float) -> str:
    """Below a quarter of the way, above three quarters, in between; nan is where backprop and equilibrium coincide."""
    if math.isnan(toward_equilibrium):
        return SAME
    if toward_equilibrium < 0.25:
        return BACKPROP
    return EQUILIBRIUM if toward_equilibrium > 0.75 else BETWEEN


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
