"""Named algorithms: a few lines each over the shared parts.

Letters: x_l state, mu_l = rho(a_l) prediction, e_l = x_l - mu_l error, L loss per sample, lambda nudge, theta
parameters; x_bar the forward pass, which is the free equilibrium of predictive coding.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies import PredictiveCoding
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import OneSided
from lightning_ebm.relaxers import ErrorCoordinates, Sweep


def backprop() -> Algorithm:
    """The control: the loss passes through unchanged, and autograd differentiates it as without this library."""
    return Algorithm(update="backprop")


def predictive_coding() -> Algorithm:
    """Predictive coding at a finite nudge, relaxed until it is at equilibrium.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + L, that is lambda = 1. Phase: x* = argmin_x E from x_bar.
    Update: dE/dtheta(x*). Not backprop's, and not meant to be: activities move first and weights follow them
    ("prospective configuration"). Relaxed by tolerance, as a fixed step diverges once weights have grown; the published
    fixed-step runs are `algorithm("predictive-coding", relaxer=GradientDescent(lr=0.1, max_steps=20))`.

    Source: Rao and Ballard 1999; Whittington and Bogacz 2017; Song et al. 2024 for the regime.
    """
    return Algorithm(PredictiveCoding(), OneSided(1.0), ErrorCoordinates(max_steps=64, tol=1e-3))


def pc_nudge() -> Algorithm:
    """PC-Nudge: predictive coding relaxed under a nudge so weak that states leave x_bar only infinitesimally.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + lambda L, lambda = 1e-4. Phase: x* = argmin_x E from x_bar.
    Update: 1/lambda dE/dtheta(x*) = backprop's gradient + O(lambda). Published with 50 Euler steps of .3 on the states,
    which in float32 leaves mostly round-off in the first layer; here the same equilibrium is found in error
    coordinates, where nothing cancels.

    Source: Millidge, Song, Salvatori, Lukasiewicz, Bogacz, ICLR 2023 (arXiv 2206.02629), the algorithm of its figures.
    """
    return Algorithm(PredictiveCoding(), OneSided(1e-4), ErrorCoordinates(max_steps=64, tol=1e-3))


def zero_divergence() -> Algorithm:
    """Zero-divergence inference learning: weights move with the error that arrives first. Backprop, exactly.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + lambda L, any lambda. Phase: one sweep from the output down with unit steps,
    e_l = -lambda dL/dx_l(x_bar). Update: -1/lambda sum_l <e_l, dmu_l/dtheta(x_bar)>.

    Source: Song et al., NeurIPS 2020; Salvatori et al., AAAI 2022.
    """
    return Algorithm(PredictiveCoding(), OneSided(1.0), Sweep())


def error_pc() -> Algorithm:
    """Error-based predictive coding (ePC): a fixed, small number of descent steps on the errors.

    Energy: E(e) = sum_l 1/2 |e_l|^2 + L, with x_l = mu_l + e_l. Phase: e <- e - lr dE/de, 5 steps of .1 from e = 0.
    Update: dE/dtheta at x(e), divided by lambda = 1. After so few steps this is not the equilibrium, and says so in
    the report; raise max_steps, or set tol, to get there. The number of steps is one used in published runs, the step
    size is this library's choice.

    Source: Goemaere et al. 2025 (arXiv 2505.20137).
    """
    return Algorithm(PredictiveCoding(), OneSided(1.0), ErrorCoordinates(max_steps=5, lr=0.1, tol=0.0))


PRESETS: dict[str, Callable[[], Algorithm]] = {
    "backprop": backprop,
    "predictive-coding": predictive_coding,
    "pc-nudge": pc_nudge,
    "zero-divergence": zero_divergence,
    "error-pc": error_pc,
}


def algorithm(name: str | Algorithm, **parts: Any) -> Algorithm:
    """A preset by name, with any part replaced.

    Args:
        name: one of `algorithms()`, or an `Algorithm` to vary.
        parts: fields of `Algorithm`, ``nudge=ebm.Centered(0.25)``.

    Raises:
        ConfigurationError: no such preset, or no such part.

    Example:
        >>> algorithm("pc-nudge", nudge=OneSided(1e-5)).nudge
        OneSided(strength=1e-05)
    """
    if isinstance(name, Algorithm):
        chosen = name
    elif name in PRESETS:
        chosen = PRESETS[name]()
    else:
        close = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigurationError(
            f"There is no algorithm {name!r}.{hint} There are: {', '.join(PRESETS)}; or compose one:"
            " ebm.Algorithm(energy=..., nudge=..., relaxer=...)."
        )
    fields = [field.name for field in dataclasses.fields(Algorithm)]
    if unknown := sorted(set(parts) - set(fields)):
        close = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigurationError(f"An algorithm has no part {unknown[0]!r}.{hint} It has: {', '.join(fields)}.")
    return dataclasses.replace(chosen, **parts)


def algorithms() -> tuple[str, ...]:
    """The names of all presets."""
    return tuple(PRESETS)
