"""Named algorithms: a few lines each over the shared parts.

Letters: x_l state, mu_l = rho(a_l) prediction, e_l = x_l - mu_l error, L loss per sample, lambda nudge, theta
parameters; x_bar the forward pass, which is the free equilibrium of predictive coding.

Longer than 300 lines, as it is a list: a preset is a few lines of code under its formulas and sources.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from lightning_ebm import checked
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies import Energy, FenchelYoung, Hopfield, PredictiveCoding
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import Centered, Clamped, Coupled, Holomorphic, Infinitesimal, Nudge, OneSided, Strongest
from lightning_ebm.relaxers import (
    AcceleratedFixedPoint,
    AugmentedLagrangian,
    Dyadic,
    ErrorCoordinates,
    FixedPoint,
    FixedPrediction,
    GradientDescent,
    Sweep,
)
from lightning_ebm.relaxers.automatic import automatic


def backprop() -> Algorithm:
    """The control: the loss passes through unchanged, and autograd differentiates it as without this library."""
    return Algorithm(update="backprop")


def predictive_coding() -> Algorithm:
    """Predictive coding at a finite nudge, relaxed until it is at equilibrium.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + L, that is lambda = 1. Phase: x* = argmin_x E from x_bar.
    Update: dE/dtheta(x*). Not backprop's, and not meant to be: activities move first and weights follow them
    ("prospective configuration"). Relaxed by tolerance, as a fixed step diverges once weights have grown, and by 12
    evaluations after the first at most; the status says where that was too little. The published fixed-step runs are
    `algorithm("predictive-coding", relaxer=GradientDescent(lr=0.1, max_steps=20))`. Where lambda = 1 is too strong for
    a network, ``nudge="auto"`` takes the largest that is not; so do strategies and `Learner`, in 6 evaluations, when no
    algorithm is named.

    Source: Rao and Ballard 1999; Whittington and Bogacz 2017; Song et al. 2024 for the regime.
    """
    return Algorithm(PredictiveCoding(), OneSided(1.0), ErrorCoordinates(max_steps=12, tol=1e-3))


def pc_nudge() -> Algorithm:
    """PC-Nudge: predictive coding relaxed under a nudge so weak that states leave x_bar only infinitesimally.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + lambda L, lambda = 1e-4. Phase: x* = argmin_x E from x_bar.
    Update: 1/lambda dE/dtheta(x*) = backprop's gradient + O(lambda). Published with 50 Euler steps of 0.3 on the
    states, which in float32 leaves mostly round-off in the first layer; here the same equilibrium is found in error
    coordinates, where nothing cancels, and the first step is there but for O(lambda): two are the most that is taken.

    Source: Millidge, Song, Salvatori, Lukasiewicz, Bogacz, ICLR 2023 (arXiv 2206.02629), the algorithm of its figures.
    """
    return Algorithm(PredictiveCoding(), OneSided(1e-4), ErrorCoordinates(max_steps=2, tol=1e-3))


def zero_divergence() -> Algorithm:
    """Zero-divergence inference learning: weights move with the error that arrives first. Backprop, exactly.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + lambda L, any lambda. Phase: one sweep from the output down with unit steps,
    e_l = -lambda dL/dx_l(x_bar). Update: `-1/lambda sum_l <e_l, dmu_l/dtheta(x_bar)>`.

    Source: Song et al., NeurIPS 2020; Salvatori et al., AAAI 2022.
    """
    return Algorithm(PredictiveCoding(), OneSided(1.0), Sweep())


def error_pc() -> Algorithm:
    """Error-based predictive coding (ePC): a fixed, small number of descent steps on the errors.

    Energy: E(e) = sum_l 1/2 |e_l|^2 + L, with x_l = mu_l + e_l. Phase: e <- e - lr dE/de, 5 steps of 0.1 from e = 0.
    Update: dE/dtheta at x(e), divided by lambda = 1. After so few steps this is not the equilibrium, and says so in
    the report; raise max_steps, or set tol, to get there. The number of steps is one used in published runs, the step
    size is this library's choice.

    Source: Goemaere et al. 2025 (arXiv 2505.20137).
    """
    return Algorithm(PredictiveCoding(), OneSided(1.0), ErrorCoordinates(max_steps=5, lr=0.1, tol=0.0))


def fixed_prediction() -> Algorithm:
    """Predictive coding with predictions frozen at the forward pass. Backprop, exactly, at any nudge.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + lambda L, any lambda. Phase: e_l <- e_l - (e_l + lambda dL/dx_l
    - sum_k J_k' e_k), all slopes at x_bar, until nothing changes: as many steps as there are layers.
    Update: `-1/lambda sum_l <e_l, dmu_l/dtheta(x_bar)>`.

    Source: Millidge, Tschantz, Buckley 2022 (arXiv 2006.04182); Rosenbaum 2022, whose step size 1 is used.
    """
    return Algorithm(PredictiveCoding(), OneSided(1.0), FixedPrediction())


def incremental_pc() -> Algorithm:
    """Incremental predictive coding (iPC): parameters move after every step of the states.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + L. Phase: 8 times x <- x - 0.1 dE/dx and, at once,
    theta <- optimizer(dE/dtheta), both of one gradient. Update: dE/dtheta at the states before each single step, so 8
    optimizer steps a batch, all of which the Trainer counts: the first trains the last layer alone, as states start at
    x_bar. Incremental expectation maximization; no claim to be backprop's direction. `Learner.step` in plain loops;
    `Learner.backward` leaves the parameters alone and so is that of predictive coding with as many steps.
    Number of steps as in published benchmarks, step size this library's choice.

    Source: Salvatori et al., ICLR 2024 (arXiv 2212.00720).
    """
    return Algorithm(PredictiveCoding(), OneSided(1.0), GradientDescent(lr=0.1, max_steps=8), update="incremental")


def augmented_lagrangian_pc() -> Algorithm:
    """Predictive coding with multipliers (PC-ALM): errors go to zero and leave backprop's deltas behind.

    Energy: L_rho = lambda L + sum_l [mu_l' e_l + 1/2 |e_l|^2], e_l = x_l - rho(a_l), lambda = 1/rho = 0.1.
    Phases: 8 times, x <- argmin L_rho, mu <- mu + e. Update: `-1/lambda sum_l <mu_l, d rho(a_l)/dtheta>`, which tends
    to backprop's gradient at a linear rate in the outer steps, at finite lambda. Settings are this library's choice.

    Source: arXiv 2605.31022 (2026).
    """
    return Algorithm(PredictiveCoding(), OneSided(0.1), AugmentedLagrangian(outer_steps=8))


def equilibrium_propagation() -> Algorithm:
    """Equilibrium propagation (EP), centered.

    Energy: `E = sum_l [G(x_l) - <x_l, a_l>] + beta L`, G' = rho^-1. Phases: free from the forward pass, then +-beta
    from the free state, beta = 0.25, x_l <- rho(a_l + W_{l+1}' x_{l+1} - beta dL/dx_l), odd layers first, then even.
    Update: [dE/dtheta(x_+) - dE/dtheta(x_-)] / 2 beta = d L(x_bar)/dtheta + O(beta^2), the gradient at the free
    *equilibrium*, which the trained network needs at evaluation as well. Both phases until settled to 1e-4 of what
    started them, by sweeps that conjugate gradients put together: published numbers of plain sweeps (20 free, 10
    nudged) leave deep nets short of it. Those are `free_relaxer=FixedPoint(20), relaxer=FixedPoint(10)`.

    Source: Scellier and Bengio 2017; Laborieux et al. 2021 (centered); Scellier et al. 2023 for beta and the map.
    """
    settled = AcceleratedFixedPoint(max_steps=100, tol=1e-4)
    return Algorithm(Hopfield(), Centered(0.25), settled)


def equilibrium_propagation_one_sided() -> Algorithm:
    """Equilibrium propagation as first published: one nudged phase against the free one.

    Energy: `E = sum_l [G(x_l) - <x_l, a_l>] + beta L`. Phases: free, then beta = 0.1 from the free state.
    Update: [dE/dtheta(x_beta) - dE/dtheta(x_bar)] / beta = dL(x_bar)/dtheta + O(beta). Centered is cheaper for the
    same accuracy; this one suits hardware that cannot push away from a target. beta is this library's choice.

    Source: Scellier and Bengio 2017.
    """
    return dataclasses.replace(equilibrium_propagation(), nudge=OneSided(0.1))


def holomorphic_ep() -> Algorithm:
    """Holomorphic equilibrium propagation: nudges around a circle in the complex plane.

    Energy: `E = sum_l [G(x_l) - <x_l, a_l>] + beta L`, continued to complex states. Phases: free, then
    beta_k = 0.2 e^(2 pi i k/4), k = 0..3, two of them conjugate. Update: Re sum_k dE/dtheta(x_k) / (4 beta_k)
    = dL(x_bar)/dtheta + O(beta^4). Needs analytic activations. Radius and points are this library's choice.

    Source: Laborieux and Zenke, NeurIPS 2022.
    """
    return dataclasses.replace(equilibrium_propagation(), nudge=Holomorphic(0.2, points=4))


def infinitesimal() -> Algorithm:
    """The limit itself: the gradient theorem without a finite nudge.

    Energy: E = sum_l 1/2 |x_l - mu_l|^2 + lambda L, or any other. Phase: free only; dx/dlambda = -H^-1 dL/dx there.
    Update: `dL/dtheta + <dx/dlambda, d2I/dx dtheta>`. For a divergence energy that is backprop's gradient, for others
    the gradient at the free equilibrium.

    Source: the limit in Millidge et al., ICLR 2023 (arXiv 2206.02629), taken by linear response.
    """
    return Algorithm(PredictiveCoding(), Infinitesimal(), FixedPoint(max_steps=1000, tol=1e-6))


def recurrent_backprop() -> Algorithm:
    """Recurrent backpropagation: errors relax on the linearized network, then weights move.

    Energy: `I = sum_l [G(x_l) - <x_l, a_l>]`. Phases: free, then H p = dL/dx for p.
    Update: dL/dtheta - (d2I/dtheta dx) p, the gradient at the free equilibrium, without a nudge.

    Source: Almeida 1987; Pineda 1987.
    """
    return Algorithm(Hopfield(), Infinitesimal(), FixedPoint(max_steps=1000, tol=1e-6))


def contrastive_hebbian() -> Algorithm:
    """Contrastive Hebbian learning with weak feedback.

    Energy: `I = sum_l gamma^(l-L) [G(x_l) - <x_l, a_l>]`, gamma = 0.05. Phases: free; clamped, with the output held at
    o - dL/do, the target of a squared error. Update: dI/dtheta(clamped) - dI/dtheta(free), that is
    gamma^(l-L) [x x' (free) - x x' (clamped)] for a layer's weights: backprop's direction + O(gamma), with a fully
    clamped output. The output is a state. At ``energy=Hopfield(1.0)`` it is Movellan's, which descends
    I(clamped) - I(free) and not the loss.

    Source: Movellan 1991; Xie and Seung 2003.
    """
    return Algorithm(Hopfield(feedback=0.05), Clamped(), FixedPoint(max_steps=100, tol=1e-6))


def coupled_learning() -> Algorithm:
    """Coupled learning: the output is nudged towards the target and held there.

    Energy: `I = sum_l [G(x_l) - <x_l, a_l>]`. Phases: output held at o - eta dL/do and o + eta dL/do, eta = 0.1.
    Update: [dI/dtheta(x_+) - dI/dtheta(x_-)] / 2 eta. It does *not* tend to the gradient of the loss, but to that of
    the loss weighted by the stiffness of the output, see `Coupled`. The output is a state. Settings as compared with
    equilibrium propagation by Scellier et al.; eta is this library's choice.

    Source: Stern et al. 2021; Scellier et al. 2023.
    """
    return Algorithm(Hopfield(), Coupled(0.1), AcceleratedFixedPoint(max_steps=100, tol=1e-5))


def dual_propagation() -> Algorithm:
    """Dual propagation: both nudged phases at once, in pairs of states.

    Energy: `E = sum_l [G(z_l) + G*(a_l) - <z_l, a_l>] + beta L` with drives from the means of the pairs, beta = 0.1.
    Phase: z_l^+- = rho(a_l +- 1/2 W_{l+1}' (z^+ - z^-)_{l+1}), the output pulled by +-beta/2.
    Update: `-1/beta sum_l <z_l^+ - z_l^-, da_l/dtheta>` = backprop's gradient + O(beta^2), and exactly that where rho
    is linear between the pair, as for ReLU away from its kink. beta is this library's choice.

    Source: Hoier, Staudt, Zach, ICML 2023; Hoier and Zach, ICML 2024 (arXiv 2402.08573).
    """
    return Algorithm(FenchelYoung(), OneSided(0.1), Dyadic())


PRESETS: dict[str, Callable[[], Algorithm]] = {
    "backprop": backprop,
    "predictive-coding": predictive_coding,
    "pc-nudge": pc_nudge,
    "zero-divergence": zero_divergence,
    "fixed-prediction": fixed_prediction,
    "incremental-pc": incremental_pc,
    "error-pc": error_pc,
    "augmented-lagrangian-pc": augmented_lagrangian_pc,
    "equilibrium-propagation": equilibrium_propagation,
    "equilibrium-propagation-one-sided": equilibrium_propagation_one_sided,
    "holomorphic-ep": holomorphic_ep,
    "infinitesimal": infinitesimal,
    "contrastive-hebbian": contrastive_hebbian,
    "coupled-learning": coupled_learning,
    "dual-propagation": dual_propagation,
    "recurrent-backprop": recurrent_backprop,
}


def algorithm(name: str | Algorithm, **parts: Any) -> Algorithm:
    """A preset by name, with any part replaced.

    Args:
        name: one of `algorithms()`, or an `Algorithm` to vary.
        parts: fields of `Algorithm`, ``nudge=ebm.Centered(0.25)``. ``relaxer="auto"`` keeps the preset's tolerance;
            None is the preset's own part, and for `free_relaxer` none.

    Raises:
        ConfigurationError: no such preset, or no such part.

    Examples:
        >>> algorithm("pc-nudge", nudge=OneSided(1e-5)).nudge
        OneSided(strength=1e-05)
    """
    if isinstance(name, Algorithm):
        found = name
    elif isinstance(name, str) and name in PRESETS:
        found = PRESETS[name]()
    else:
        raise ConfigurationError(
            f"There is no algorithm {checked.shown(name)}.{_did_you_mean(str(name))} There are: {', '.join(PRESETS)};"
            " or compose one: ebm.Algorithm(energy=..., nudge=..., relaxer=...)."
        )
    parts = {part: value for part, value in parts.items() if value is not None or part == "free_relaxer"}
    fields = [field.name for field in dataclasses.fields(Algorithm)]
    if unknown := sorted(set(parts) - set(fields)):
        hint = _where_it_belongs(unknown[0], found, fields)
        raise ConfigurationError(f"An algorithm has no part {unknown[0]!r}.{hint} It has: {', '.join(fields)}.")
    if checked.is_word(parts.get("nudge"), "auto"):
        parts["nudge"] = Strongest(found.nudge)
    energy, nudge = parts.get("energy", found.energy), parts.get("nudge", found.nudge)
    if checked.is_word(parts.get("relaxer"), "auto") and isinstance(energy, Energy) and isinstance(nudge, Nudge):
        if not found.relaxer.ends_in_states:
            raise ConfigurationError(
                f'relaxer="auto": {type(found.relaxer).__name__} is what makes {name!r} what it is, and leaves no'
                ' choice. Leave the relaxer out, or take "pc-nudge" or "predictive-coding", which relax to equilibrium.'
            )
        tol, steps = found.relaxer.tol, found.relaxer.max_steps
        parts["relaxer"] = automatic(energy, nudge, tol or 1e-3, max(100, steps))
    return dataclasses.replace(found, **parts)


def chosen(given: str | Algorithm | None) -> Algorithm:
    """What a user hands over as an algorithm: a preset's name, an `Algorithm`, or None.

    None is predictive coding on a network that nobody tuned: at lambda = 1 residual networks with BatchNorm and
    Transformers learn little or nothing, as their states take most of the loss for themselves, and with maximum pooling
    states go on moving for long. So the strength is chosen by what 6 evaluations after the first can settle to a
    hundredth of the first force, which is about as near as the update then is to the one at equilibrium.
    """
    if given is not None:
        return algorithm(given)
    return algorithm("predictive-coding", nudge="auto", relaxer=ErrorCoordinates(max_steps=6, tol=1e-2))


def algorithms() -> tuple[str, ...]:
    """The names of all presets."""
    return tuple(PRESETS)


def _did_you_mean(name: str) -> str:
    """The preset whose initials these are, as "ep", or else the nearest."""
    initials = {"".join(word[0] for word in preset.split("-")): preset for preset in PRESETS if "-" in preset}
    near = [initials[name.lower()]] if name.lower() in initials else []
    near = near or difflib.get_close_matches(name.lower().replace("_", "-"), PRESETS, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def _where_it_belongs(name: str, found: Algorithm, fields: list[str]) -> str:
    """The part that is nearly called so, or that takes it as a setting of its own."""
    if near := difflib.get_close_matches(name, fields, n=1):
        return f" Did you mean {near[0]!r}?"
    setting = "strength" if name in ("beta", "lam", "lambda_") else name
    for part in ("nudge", "relaxer", "energy"):
        kind = type(getattr(found, part))
        if setting in inspect.signature(kind).parameters:
            return f" It is a setting of the {part}: {part}=ebm.{kind.__name__}({setting}=...)."
    return ""
