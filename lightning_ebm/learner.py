"""The engine: from a closure that returns a loss to local updates in `.grad`.

Longer than 300 lines, as nearly half of it is what its public methods say of themselves.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ebm import checked
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies.base import reads_drive
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.instruments.relaxed import (
    Relaxed,
    for_equilibrium,
    gradient_of,
    refuse_for_update,
    relaxed_of,
    strength_of,
)
from lightning_ebm.instruments.spectrum import Spectrum, spectrum_of
from lightning_ebm.network.clamp import Clamp, checked_clamp, checked_names
from lightning_ebm.network.recording import Recording
from lightning_ebm.network.samples import FOUND, BatchSize, Samples, Scale
from lightning_ebm.nudges import Nudge
from lightning_ebm.presets import chosen
from lightning_ebm.program.autograd_graph import named_gradients
from lightning_ebm.program.before import Undoing
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.program.programs import Programs
from lightning_ebm.program.recorder import Recorder, TakesCare
from lightning_ebm.program.seams import seams
from lightning_ebm.program.sharded import refuse_shards
from lightning_ebm.program.wiring import Plan
from lightning_ebm.purity import build, untouched
from lightning_ebm.relaxers import Relaxation, Relaxer
from lightning_ebm.step.at_rest import at_equilibrium, at_free_equilibrium
from lightning_ebm.step.closure import Closure, check_closure, is_number, refuse_backward
from lightning_ebm.step.divergence import OnDivergence, Policy
from lightning_ebm.step.outcome import Outcome
from lightning_ebm.step.phases import Phases
from lightning_ebm.step.report import Report
from lightning_ebm.step.setup import Code, Observer, Setup, check_options, output_for, unheard
from lightning_ebm.step.state_memory import StateMemory
from lightning_ebm.step.step import Step
from lightning_ebm.step.unsettled import Unsettled

log = logging.getLogger(__name__)


class Learner:
    """Gives the parameters of an untouched module local, energy-derived updates, in plain PyTorch and Fabric loops.

    E(x, theta) = sum_b I_b + lambda * (B * loss if `loss_reduction` is "mean" else loss), minimized over the states x.
    The update is sum_p weight_p dE/dtheta(x_p), divided by B for "mean": as lambda -> 0 it is what ``loss.backward()``
    would have put into ``.grad``, under either reduction, so that a learning rate tuned for backprop carries over.

    Args:
        module: any module; nothing of it is changed but `.grad`. Under Fabric what `setup` returned, or what holds it.
        algorithm: a preset's name, see `algorithms()`, or an `Algorithm`; None is predictive coding at the largest
            strength up to 1 that the network bears: ``nudge="auto"``, to 1e-2, by 6 evaluations at most.
        layers: which calls carry states: None (those of activation modules, of repeated blocks, or of modules with
            weights, by how local they make the updates, and behind the maximum pooling that alone reads an activation,
            see `summary`), or module names, module types, or a predicate.
        output: "readout" (the last drive enters the loss directly), "state" (the output is a free state, nudged by the
            loss), "auto" (a state if the network ends in an activation, else a read-out).
        loss_reduction: how the closure's loss reduces over the batch, "mean" or "sum".
        quiet: a context manager for passes without side effects, to silence what closures do besides computing.
        capture: run programs that come again, or are relaxed for long, as code traced from them; False interprets
            them at every point, slower and the same.
        compile: send that code through Inductor, which takes seconds once for every shape of batch and, on a CPU, a C++
            compiler.
        batch_size: number of samples of a batch: a number, or a function of what the module is called with; None finds
            it: the size that a layer with torch's `batch_first` declares, else the one that most layers have in common,
            or a smaller one that the loss is reduced over, as graphs of many nodes are.
        on_divergence: what is done with a batch that cannot relax, or whose loss is not finite: "raise"; "skip", which
            leaves no gradient and puts back what the pass wrote to; or a preset's name or an `Algorithm`, which takes
            that batch, unless its loss is not finite: that is still an error, as no algorithm could descend it. The
            report counts them. Incremental updates know "raise" alone.
        scale: the factor that the closure's loss already carries (a GradScaler's, 1/N of accumulation), a number or a
            function without arguments: the relaxation does not see it, the update carries it.

    Raises:
        ConfigurationError: an argument that cannot work, or a closure that does not return a usable loss.
        LayerDiscoveryError: no layer found, at the first step.
        RelaxationDivergedError: states ran away, or the loss is not finite.

    Examples:
        >>> learner = Learner(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), "pc-nudge")
        >>> loss = learner.backward(lambda: learner.module(torch.ones(2, 4)).square().mean())
    """

    def __init__(
        self,
        module: nn.Module,
        algorithm: str | Algorithm | None = None,
        *,
        layers: Layers = None,
        output: Output = "auto",
        loss_reduction: Literal["mean", "sum"] = "mean",
        quiet: Callable[[], AbstractContextManager[Any]] = nullcontext,
        capture: bool = True,
        compile: bool = False,
        batch_size: BatchSize = None,
        scale: Scale = None,
        on_divergence: OnDivergence = "raise",
    ) -> None:
        check_options(layers, output, loss_reduction, capture, compile)
        self.module: nn.Module = checked.instance(self, "module", module, nn.Module, "a torch.nn.Module")
        self.algorithm = chosen(algorithm)
        self.loss_reduction = loss_reduction
        self.capture = capture
        self.compile = compile
        self._code: Code = ("compiled" if compile else "traced") if capture else None
        self._quiet = checked.function(self, "quiet", quiet, "what makes a context manager")
        self._samples = Samples(batch_size, scale)
        self.policy = Policy(on_divergence, self.algorithm)
        energies = [one.energy for one in (self.algorithm, self.policy.fallback) if one is not None]
        pooled = not any(map(reads_drive, energies))
        self._new_programs = partial(Programs, module, layers, output_for(self.algorithm, output), pooled=pooled)
        self._programs = self._new_programs()
        self._evaluated = self._new_programs(like=self._programs)
        self._clamped: dict[frozenset[str], Programs] = {}
        self._memory = StateMemory()
        self.unsettled = Unsettled()
        """Looks at sweeps that were cut off, and says where more of them would not help."""
        self.outcome = Outcome(self.algorithm, self.policy, self.unsettled)
        self.observer: Observer | None = None
        """Told of the network of every step before it relaxes, see `Setup.observer`; None costs nothing."""

    @property
    def report(self) -> Report:
        """What the last call did: a dict of plain numbers, ready for `json.dumps`. See `Report`."""
        return self.outcome.report()

    @property
    def plan(self) -> Plan | None:
        """The layers of the last step."""
        return None if self._programs.latest is None else self._programs.latest.plan

    def backward(self, closure: Closure, *, clamp: Clamp | None = None) -> Tensor:
        """Adds the update of one batch to ``.grad``; returns the loss of the forward pass, detached.

        The closure is run once; with energies whose free equilibrium is not the forward pass twice, the first time
        with side effects undone.

        With units held by `clamp`, in every phase, the update is that of the loss at the equilibrium under the clamp.
        A closure that returns no loss (an output, or nothing) then leaves the energy itself to be learned, for
        divergence energies: dI/dtheta at x* = argmin_x I, the gradient of min_x I, unsupervised. What is returned is
        then min_x I, averaged over the batch or summed as `loss_reduction` says.

        Args:
            closure: runs the pass, and returns its loss.
            clamp: as for `relax`.
        """
        loss, surrogate, step = self._surrogate(closure, partial(refuse_backward, self.module), clamp)
        if surrogate is not None:
            torch.autograd.backward(self._scaled(surrogate))
        step.release()
        return loss

    def _surrogate(
        self, closure: Closure, on_backward: TakesCare | None = None, clamp: Clamp | None = None
    ) -> tuple[Tensor, Tensor | None, Step]:
        """The loss, a scalar whose gradient is the update, or None for a batch that is skipped, and the step."""
        fallback = self.policy.fallback
        if seams.recorder is not None:
            raise ConfigurationError(
                "This learner was asked for an update while another learner's closure, or a training step under an"
                " EBMStrategy, is recorded: the one would be a part of the other. Call learners one after the other;"
                " under an EBMStrategy call self.manual_backward(loss), or train by learners of your own under a"
                ' Trainer(strategy="auto") with automatic_optimization = False.'
            )
        if clamp and fallback is not None:
            refuse_for_update(fallback)
        self._refuse_shards()
        step, loss = self.begin(closure, clamp=clamp), torch.full((), math.nan)
        try:
            with step.first_pass(on_backward):
                losses = [closure()]
            loss = losses[0].detach() if is_number(losses[0]) else loss
            surrogate = step.surrogate(losses.pop())  # its graph is not held here
            return surrogate.detach(), surrogate, step
        except RelaxationDivergedError as error:
            if fallback is None or not step.ran:
                step.undo()
            if self.policy.raises:
                raise
            self.outcome.gave_up(error, loss)
            if fallback is None or step.ran:
                return loss, None if fallback is None else step.instead(fallback, loss), step
        step = self.begin(closure, clamp=clamp, algorithm=fallback)  # before the user's pass there was a free phase
        with step.first_pass(on_backward):
            losses = [closure()]
        surrogate = step.surrogate(losses.pop())
        return surrogate.detach(), surrogate, step

    def gradients(self, closure: Closure, *, clamp: Clamp | None = None) -> dict[str, Tensor]:
        """The update of one batch as ``{parameter name: tensor}``, without those that the loss does not reach.

        Leaves no trace: `.grad`, tensors, metrics and random generators are afterwards as they were.

        Args:
            closure: as for `backward`.
            clamp: as for `backward`.
        """
        self._refuse_shards()
        with self._quiet():
            build(self.module, closure)
        with untouched(self.module), self._quiet(), torch.enable_grad():
            step, undoing = self.begin(closure, teaches=False, clamp=clamp), Undoing()
            try:
                with step.first_pass(), undoing:
                    loss = closure()
                found = named_gradients(self.module, step.surrogate(loss), hooked=True)
            finally:
                undoing.restore()
            step.release()
            return found

    def relax(
        self,
        closure: Callable[[], Any],
        *,
        clamp: Clamp | None = None,
        free: Sequence[str] = (),
        nudge: float | Nudge | None = None,
        relaxer: Relaxer | Literal["auto"] | None = None,
        gradients: bool = False,
        record: bool = False,
    ) -> Relaxed:
        """The states at argmin_x I + lambda L over all units that are not held; nothing of the module is changed.

        Units are held wherever they are: at inputs, which are named by an `nn.Identity` that they pass through (and
        need not be in ``layers=``), at hidden layers, and at the output, by the name of its module. An input that is
        named is a state whose prediction is the data given: held, it is where the clamp puts it and not where the batch
        does; not held, it pays 1/2 Pi |x - data|^2 for leaving the data, as a Gaussian prior around it; and nothing
        where `free` lists it.

        Training mode, frozen parameters and buffers are of no consequence and stay as they are.

        Args:
            closure: runs the pass; returns its loss, or anything where no loss is needed.
            clamp: ``{name: value}`` holds a layer, ``{name: (value, mask)}`` its units where the mask is True; in the
                shape of the state, samples first, or of one sample.
            free: inputs, as a rule, that pay nothing for where they are, for divergence energies: their term is left
                out. An input carries a state once it is named, here or in ``clamp``.
            nudge: lambda, the weight of the loss per sample; a `Nudge` stands for its strongest phase; None is 0. One
                that holds the output has no such number: hold it by `clamp`.
            relaxer: None goes to the equilibrium itself, to a relative force of 1e-6 or of the algorithm's own
                tolerance where that is finer, by `QuasiNewton` for quadratic energies; an algorithm that takes a given
                number of steps, ``tol=0``, takes those. "auto" goes there whatever the algorithm. Held units are
                honored by every relaxer of states, and by a device with its own grid and noise; in error coordinates
                the errors of the free units move.
            gradients: whether to give d(I + lambda L)/dtheta at the end as well.
            record: whether to keep I, L, and the force on each layer at every evaluation on the way, `Relaxed.course`.

        Raises:
            ConfigurationError: unknown names, values or masks that do not fit, a relaxer that finds no equilibrium.
            RelaxationDivergedError: states ran away.

        Examples:
            >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
            >>> inferred = Learner(net).relax(lambda: net(torch.zeros(5, 2)), clamp={"3": torch.ones(3)}, free=["0"])
            >>> inferred.states["0"].shape
            torch.Size([5, 2])
        """
        strength = strength_of(nudge)
        checked.flag("relax", "gradients", gradients)
        recordings: list[Recording] = []

        def observed(network: Landscape) -> Landscape:
            recordings.append(Recording(network))
            return recordings[-1]

        observer = observed if checked.flag("relax", "record", record) else None
        with self._at_rest(closure, clamp, free, strength, relaxer, observer) as (phases, found, has_loss):
            slopes = {}
            if gradients:
                slopes = named_gradients(self.module, gradient_of(phases.network, found, strength))
            courses = [trace.read() for recording in recordings for trace in recording.traces]
            return relaxed_of(phases.network, found, has_loss, slopes, courses[-1] if courses else None)

    def spectrum(
        self,
        closure: Callable[[], Any],
        *,
        clamp: Clamp | None = None,
        free: Sequence[str] = (),
        nudge: float | Nudge | None = None,
        relaxer: Relaxer | Literal["auto"] | None = None,
        steps: int = 64,
        seed: int = 0,
    ) -> Spectrum:
        """Eigenvalues of d2(I + lambda L)/dx2 over the free units at the equilibrium that `relax` finds, by Lanczos.

        The largest says which step sizes of descent on states are stable, below 2 over it; largest over smallest how
        many steps it takes; a smallest below 0 that the states rest at a saddle. It takes second derivatives of the
        network, `steps` products with a vector. Nothing of the module is changed.

        Args:
            closure: as for `relax`.
            clamp: as for `relax`.
            free: as for `relax`.
            nudge: as for `relax`.
            relaxer: as for `relax`.
            steps: how many eigenvalues at most; exact where it is as many as the batch has free units, the ends long
                before.
            seed: of the start vector.

        Raises:
            ConfigurationError: as `relax`.
        """
        strength = strength_of(nudge)
        steps, seed = checked.count("spectrum", "steps", steps), checked.count("spectrum", "seed", seed, least=0)
        with self._at_rest(closure, clamp, free, strength, relaxer) as (phases, found, _):
            nothing = [torch.zeros_like(x, dtype=torch.bool) for x in found.point]
            held = nothing if phases.clamped is None else phases.clamped.is_held(found.point)
            return spectrum_of(phases.network, found, held, strength, steps, seed)

    @contextmanager
    def _at_rest(
        self,
        closure: Callable[[], Any],
        clamp: Clamp | None,
        free: Sequence[str],
        strength: float,
        relaxer: Relaxer | Literal["auto"] | None,
        observer: Observer | None = None,
    ) -> Iterator[tuple[Phases, Relaxation, bool]]:
        """Within it a network is at its equilibrium; afterwards the module is as it was."""
        self._refuse_shards()
        check_closure(closure)
        held, free = checked_clamp({} if clamp is None else clamp), checked_names("free", free)
        setup = replace(self._equilibrium_setup(held, free, strength != 0, relaxer), observer=observer)
        with self._quiet():
            build(self.module, closure)
        with torch.inference_mode(False), untouched(self.module), self._quiet(), torch.enable_grad():
            for parameter in self.module.parameters():
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.requires_grad_(True)  # until `untouched` ends: what is frozen still predicts
            with at_equilibrium(setup, closure, strength) as result:
                yield result

    def _equilibrium_setup(
        self, clamp: Clamp, free: Sequence[str], nudged: bool, relaxer: Relaxer | Literal["auto"] | None
    ) -> Setup:
        algorithm = for_equilibrium(self.algorithm, free, nudged, relaxer)
        return replace(
            self._setup(), algorithm=algorithm, programs=self._programs_with(clamp, free), remember=unheard,
            memory=None, observer=None, clamp=clamp if clamp or free else None, free=free,
        )  # fmt: skip

    def _programs_with(self, clamp: Clamp, free: Sequence[str] = ()) -> Programs:
        """The programs in which the inputs and outputs that are named carry states."""
        names = frozenset(clamp) | frozenset(free)
        if names not in self._clamped:
            self._clamped[names] = self._new_programs(also=names, like=self._programs)
        return self._clamped[names]

    def step(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Tensor:
        """One whole training step: zeroes the gradients, updates the parameters; returns the loss of the forward pass.

        For an incremental algorithm the optimizer steps once for each step of the relaxer; for all others once. Within
        a step of `torch.optim.LBFGS` the closure is called, and relaxes, several times.

        Args:
            closure: as for `backward`.
            optimizer: of the module's parameters.

        Raises:
            ConfigurationError: it is no optimizer, or has none of the module's parameters.
        """
        if isinstance(optimizer, type) or not hasattr(optimizer, "zero_grad"):  # what wraps one may not be an Optimizer
            checked.instance("", "optimizer", optimizer, torch.optim.Optimizer, _OPTIMIZER)
        _check_whose(optimizer, self.module)
        if _asks_for_closures(optimizer) and not self.algorithm.rule.incremental:

            def again() -> Tensor:
                optimizer.zero_grad()
                return self.backward(closure)

            take: Any = optimizer.step  # which torch declares for closures that return floats
            found: Tensor = take(again)
            return found
        optimizer.zero_grad()
        if not self.algorithm.rule.incremental:
            loss, surrogate, step = self._surrogate(closure)
            optimizer.zero_grad()
            if surrogate is not None:
                torch.autograd.backward(self._scaled(surrogate))
                optimizer.step()
            return loss
        self._refuse_shards()
        step = self.begin(closure)
        with step.first_pass():
            loss = closure()
        increments = step.increments(loss)
        while (surrogate := self._next(increments, step)) is not None:
            optimizer.zero_grad()
            torch.autograd.backward(self._scaled(surrogate))
            optimizer.step()
        return loss.detach()

    def _refuse_shards(self) -> None:
        if self._programs.latest is None and self.algorithm.rule.relaxes:  # else it has been looked at
            refuse_shards(self.module)

    def _next(self, increments: Iterator[Tensor], step: Step) -> Tensor | None:
        try:
            return next(increments, None)
        except RelaxationDivergedError:
            step.undo()
            raise

    def free_phase(
        self, run: Callable[[], Any], *, clamp: Clamp | None = None, free: Sequence[str] = ()
    ) -> AbstractContextManager[None]:
        """Within it the module computes at the free equilibrium of its energy, as it has to after training on it.

        ``with learner.free_phase(lambda: module(x)): output = module(x)``. What `run` runs is run once, without side
        effects, and must be what the body runs. For divergence energies the equilibrium is the forward
        pass, and nothing is done. Outside of inference mode only: states are found by gradients.

        Args:
            run: what is to be run within.
            clamp: as for `relax`: the equilibrium with these units held, of any energy.
            free: as for `relax`.
        """
        check_closure(run)
        held, free = checked_clamp({} if clamp is None else clamp), checked_names("free", free)
        if held or free:
            return at_free_equilibrium(self._equilibrium_setup(held, free, False, None), run)
        if self.algorithm.rests_at_forward:
            return nullcontext()
        setup = replace(
            self._setup(), programs=self._evaluated, remember=unheard, samples=FOUND, memory=None, observer=None
        )
        return at_free_equilibrium(setup, run)

    def _scaled(self, surrogate: Tensor) -> Tensor:
        """Under Fabric with 16-bit floats, which divides gradients by its scale before the optimizer steps."""
        scalers = self._scalers
        if len(scalers) > 1:
            raise ConfigurationError(
                "Parts of this module were set up by several Fabrics, of which each scales gradients for its optimizers"
                " alone. Set up all of them by one, or make a Learner for each."
            )
        return surrogate if not scalers else scalers[0].scale(surrogate)

    @property
    def _scalers(self) -> list[Any]:
        """Those of the Fabrics that have set up the module, a part of it, or, of a LightningModule, what wraps it."""
        parts = [vars(part) for part in self.module.modules()]
        strategies = [p.get("_strategy") or getattr(p.get("_fabric"), "strategy", None) for p in parts]
        found = [getattr(getattr(strategy, "precision", None), "scaler", None) for strategy in strategies]
        return list({id(scaler): scaler for scaler in found if scaler is not None}.values())

    def state_dict(self) -> dict[str, Any]:
        """What parts of the algorithm carry from one step to the next, such as the stand of `RandomSign`."""
        parts = self.algorithm.parts()
        kinds = {name: part.kind for name, part in parts.items()}
        states = {name: part.state_dict() for name, part in parts.items()}
        return {**states, "kinds": kinds, "states": self._memory.state_dict(), "diverged": self.policy.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; what parts of other kinds carried is left, and said."""
        state = dict(checked.instance("", "state", state, Mapping, "what `state_dict` gave"))
        self._memory.load_state_dict(state.pop("states", {}))
        self.policy.load_state_dict(state.pop("diverged", {}))
        parts, kinds = self.algorithm.parts(), state.pop("kinds", {})
        for name, held in state.items():
            if name in parts and held:
                if (kind := kinds.get(name, parts[name].kind)) == parts[name].kind:
                    parts[name].load_state_dict(held)
                else:
                    log.warning(
                        "The checkpoint's %s is %s, and here it is %s: it begins anew.", name, kind, parts[name].kind
                    )

    def recording(self, recorder: Recorder) -> AbstractContextManager[None]:
        """Records what the module computes within, for steps that begin while a pass is running."""
        self._programs.free_left()
        return self._programs.recording_own(recorder)

    def begin(
        self,
        closure: Closure,
        arguments: Any = None,
        batch: Any = None,
        teaches: bool = True,
        recorder: Recorder | None = None,
        clamp: Clamp | None = None,
        algorithm: Algorithm | None = None,
    ) -> Step:
        """Opens a step by hand: run the first pass inside `Step.first_pass`, then call `Step.surrogate`.

        Args:
            closure: runs the pass and returns its loss, for energies that need a quiet pass before.
            arguments: what the training step is called with, see `Step`.
            batch: for `Clamped(target=...)`; what the module is called with if None.
            teaches: whether the step is taken, so that what learns beside the parameters may learn from it.
            recorder: of a pass that has begun already.
            clamp: as for `backward`.
            algorithm: to take this step by another one.
        """
        setup = self._setup()
        if algorithm is not None:
            setup = replace(setup, algorithm=algorithm, remember=unheard, memory=None)
        if clamp:
            refuse_for_update(setup.algorithm)
            setup = replace(setup, programs=self._programs_with(checked_clamp(clamp)), clamp=clamp)
        return Step(setup, closure, arguments, batch, teaches, recorder)

    def _setup(self) -> Setup:
        return Setup(
            self.module, self.algorithm, self._programs, self._quiet, self.outcome.remember, self.loss_reduction,
            self._samples, self._code, self._memory, self.observer, unsettled=self.unsettled,
        )  # fmt: skip


_OPTIMIZER = "an optimizer, such as torch.optim.Adam(net.parameters(), lr=1e-3)"


def _check_whose(optimizer: Any, module: nn.Module) -> None:
    """An optimizer with parameters of others alone would step, and nothing would ever learn."""
    theirs = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group.get("params", ())}
    if theirs and not any(id(p) in theirs for p in module.parameters()):  # mostly the first is
        raise ConfigurationError(
            f"The optimizer has not one of the parameters of {type(module).__name__}, so that its steps would change"
            " nothing there. Make it of the module that the learner has, torch.optim.Adam(module.parameters()), and"
            " once more where the module is made anew or copied."
        )


def _asks_for_closures(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its `step` cannot do without, as that of LBFGS."""
    wanted = inspect.signature(optimizer.step).parameters.get("closure")
    return wanted is not None and wanted.default is wanted.empty
