"""Feedback that is not the transpose: forces go back through operators of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import is_divergence
from lightning_ebm.errors import ConfigurationError, UnsupportedModuleError
from lightning_ebm.evaluations import Around, Evaluation, Landscape
from lightning_ebm.evaluations.asymmetry import Asymmetry
from lightning_ebm.evaluations.base import Result
from lightning_ebm.evaluations.transposed import PullsToRest, Transposed
from lightning_ebm.evaluations.with_feedback import Weights, WithFeedback, behind
from lightning_ebm.nudges import Nudge
from lightning_ebm.relaxers.base import Relaxation, Relaxer
from lightning_ebm.relaxers.feedback_rules import FeedbackRule, RandomFeedback, drawn
from lightning_ebm.relaxers.wrapper import Wrapper


class Feedback(Wrapper):
    """Another relaxer, under forces in which an operator B_k takes the place of every weight W_k that they go back by.

    The force on x_l from a layer k above, -(d mu_k / dx_l)' Pi_k e_k with d mu_k / dx_l = rho' W_k, becomes
    -(rho' B_k)' Pi_k e_k; likewise -(d a_k / dx_l)' x_k of Hopfield energies, and the slope of the loss through a
    read-out. Energies, predictions and the update itself, which is local to its layer, stay what they are; but the
    forces are the slope of no energy any more, so that states settle where these forces vanish, if anywhere, and the
    update there is no gradient. How far it is from one, `GradientAlignment` logs as ever.

    Under `Sweep` or `FixedPrediction` the update is that of feedback alignment, at any nudge.

    Operators are named after the layer that their weight leads to, ``"net.2"``, with ``"#1"`` and so on where there are
    several; ``"loss"`` is the read-out's. They are no parameters of the module: they live here, follow the weights
    from step to step as the rule says, and are part of checkpoints. Where evaluations do not run as code, each takes
    one product more a layer.

    ``corrected=True`` is equilibrium propagation for such forces. In nudged phases states move under
    F(x) + (J' - J) (x - x_free) in place of F(x), with J the Jacobian of F at the free equilibrium x_free, so that
    displacements are -lambda J'^-1 dL/dx + O(lambda^2); and the update, `Displacement`, is the gradient of the loss at
    x_free as lambda goes to 0, whatever the operators are. As drives are linear in states, J' is the Jacobian of the
    network with weights and operators in each other's places, and that network relaxes, under constant pulls that let
    it rest at x_free. The slope of the loss goes back through the read-out's own weight.

    The trap: nudges have to be finite, as an infinitesimal one asks for the curvature of the energy; and relaxers that
    search by the energy are refused.

    Args:
        relaxer: moves the states.
        rule: what the operators are; `RandomFeedback()` if not given.
        corrected: for what is asymmetric in the forces; for energies whose free equilibrium has to be found.

    Raises:
        ConfigurationError: a relaxer or a nudge that needs forces to be slopes; `corrected` under an energy that is 0
            at the forward pass.
        UnsupportedModuleError: (in use) between two states lies something else than one linear operation and functions
            without weights: two products in a row, attention, a normalization with weights. With `corrected`, drives
            that are not linear in states, as behind maximum pooling.

    Source:
        Lillicrap et al. 2016 (feedback alignment); Akrout et al. 2019 (arXiv 1904.05391) for operators that learn;
        Scurria et al. 2026 (arXiv 2602.03670, its abstract) for the correction.
    """

    def __init__(self, relaxer: Relaxer, rule: FeedbackRule | None = None, corrected: bool = False) -> None:
        super().__init__(relaxer)
        rule = RandomFeedback() if rule is None else rule
        wanted = "a rule such as ebm.RandomFeedback() or ebm.KolenPollack(decay)"
        self.rule: FeedbackRule = checked.instance(self, "rule", rule, FeedbackRule, wanted)
        self.corrected: bool = checked.instance(self, "corrected", corrected, bool, "True or False")
        self.operators: dict[str, Tensor] = {}
        """B by the name of the layer that it sends back from, in the shape of the weight as its operation takes it."""
        self.asymmetry: Tensor | None = None
        """See `Asymmetry`, of the last batch; None where the rule does not look at it."""
        self._weights: dict[str, Tensor] = {}
        self._due, self._steps = False, 0

    def __repr__(self) -> str:
        return f"Feedback({self.relaxer!r}, {self.rule!r}{', corrected=True' * self.corrected})"

    @property
    def update(self) -> Any:  # type: ignore[override]  # its own, not its class's
        return "displacement" if self.corrected else super().update

    @property
    def ends_in_states(self) -> bool:
        return self.relaxer.ends_in_states

    def check(self, energy: Energy, nudge: Nudge) -> None:
        super().check(energy, nudge)
        if self.corrected and (is_divergence(energy) or not self.relaxer.ends_in_states):
            raise ConfigurationError(
                f"Feedback(corrected=True): {energy!r} under {self.relaxer!r}. The correction is of how an equilibrium"
                " that feedback has a part in is displaced. Take energy=ebm.Hopfield() and a relaxer of states, such as"
                " ebm.FixedPoint(...), or leave corrected=False."
            )
        if nudge.linear_response:
            raise ConfigurationError(
                f"{type(nudge).__name__} asks how the equilibrium moves under the energy's own curvature, in which"
                " feedback is the transpose. Take a finite nudge, such as ebm.OneSided(0.1) or ebm.Centered(0.1)."
            )

    def in_front(self, landscape: Landscape) -> Landscape:
        names = [product.name for product in landscape.weight_products]
        if not names:
            raise ConfigurationError(
                "Feedback(...): no state is multiplied by a weight anywhere above it, so that there is nothing to put"
                " an operator in the place of. ebm.summary shows where the states are."
            )
        weights: list[Tensor] = landscape.unwatched.evaluate(Weights(), landscape.no_errors, 0.0)
        self._due = self._follow(names, weights) or self._due
        return _FedBack(landscape, WithFeedback, [self.operators[name] for name in names])

    stepper = Wrapper.stepper  # single steps are taken on the network that `around` gives

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: Any) -> Relaxation:
        front = self.in_front(landscape)
        if self._due and self.rule.homeostasis:
            self._settle(landscape.unwatched, start)
            front = self.in_front(landscape)
        self._due = False
        if self.corrected and strength:
            front = self._transposed(landscape, start)
        return self.relaxer.relax(front, start, strength)

    def _transposed(self, landscape: Landscape, rest: Sequence[Tensor]) -> Landscape:
        """What nudged phases see, beginning at the free equilibrium."""
        operators = [self.operators[product.name] for product in landscape.weight_products]
        point = [*landscape.feasible(list(rest)), *operators]
        found: list[Tensor] = landscape.unwatched.evaluate(PullsToRest(len(operators)), point, 0.0)
        pulls, bent, sizes = (found[k : k + len(rest)] for k in range(0, 3 * len(rest), len(rest)))
        off = [a.norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny) for a, b in zip(bent, sizes, strict=True)]
        for name, share in zip(landscape.names, landscape.questions.ask(torch.stack(off)), strict=True):
            if share > 1e3 * landscape.rounding:
                raise UnsupportedModuleError(
                    f"Feedback(corrected=True): what drives {name!r} is not linear in the states below it (maximum"
                    " pooling, an activation that carries no state), so that the Jacobian of its forces cannot be"
                    " transposed by weights and operators that change places. Put states at every activation, pool by"
                    " means, or leave corrected=False."
                )
        return _FedBack(landscape, Transposed, operators, pulls)

    def _settle(self, landscape: Landscape, start: Sequence[Tensor]) -> None:
        """One step down the asymmetry of the forces."""
        names = [product.name for product in landscape.weight_products]
        self._steps += 1
        noise = [drawn(self._steps, k, x) for k, x in enumerate([*start, *start])]
        point = [*start, *noise, *(self.operators[name] for name in names)]
        found: list[Tensor] = landscape.evaluate(Asymmetry(len(names)), point, 0.0)
        self.asymmetry, *slopes = found
        # The asymmetry is 1/2 sum_b s_b^2 with s_b linear in B - W: up to this length no step leads away from W.
        size = torch.stack([slope.square().sum() for slope in slopes]).sum()
        longest = 2 * self.asymmetry / size.clamp_min(torch.finfo(size.dtype).tiny)
        step = longest.clamp_max(self.rule.homeostasis / landscape.batch_size)
        for name, slope in zip(names, slopes, strict=True):
            self.operators[name] = self.operators[name] - step * slope

    def _follow(self, names: Sequence[str], weights: Sequence[Tensor]) -> bool:
        """Lets the operators follow the weights; whether any of these has moved."""
        moved = False
        for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
            before, operator = self._weights.get(name), self.operators.get(name)
            if operator is None or before is None or operator.shape != weight.shape:
                self.operators[name] = self.rule.first(index, weight)
            else:
                before = before.to(weight)
                operator = operator.to(weight)
                if torch.equal(before, weight):
                    continue
                self.operators[name] = self.rule.following(index, operator, before, weight)
            self._weights[name] = weight.clone()
            moved = True
        return moved

    def state_dict(self) -> dict[str, Any]:
        """The operators, and the weights that they have followed so far."""
        own = {"operators": dict(self.operators), "weights": dict(self._weights), "steps": self._steps}
        return {"relaxer": super().state_dict(), **own}

    @property
    def kind(self) -> str:
        return f"{super().kind} by {type(self.rule).__name__}"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        super().load_state_dict(state["relaxer"])
        self.operators, self._weights = dict(state["operators"]), dict(state["weights"])
        self._steps = state["steps"]


class _FedBack(Around):
    """The landscape of the network in which forces go other ways.

    Args:
        landscape: of the network as it is.
        kind: the question about that network which a question becomes.
        operators: the feedback.
        pulls: what is given besides.
    """

    conservative = False

    def __init__(
        self,
        landscape: Landscape,
        kind: type[WithFeedback[Any]] | type[Transposed[Any]],
        operators: Sequence[Tensor],
        pulls: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(landscape)
        self._kind, self._operators, self._pulls = kind, list(operators), list(pulls)

    @property
    def unwatched(self) -> Landscape:
        return _FedBack(self.inner.unwatched, self._kind, self._operators, self._pulls)

    def answer(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        here = behind(point, self.no_errors, [*self._operators, *self._pulls])
        found: Result = self.inner.evaluate(self._kind(what, len(self._operators)), here, strength)
        return found
