"""What ranks decide together, and how often they ask each other; run as `ranks.py` is."""

import sys
from datetime import timedelta

import lightning as L
import torch
from ranks import CONVERGED, QUIET, Breaks, Collectives, Fed, Net, main

import lightning_ebm as ebm

LIMIT = {"timeout": timedelta(seconds=60)}
NEGATIVE = ebm.Algorithm(nudge=ebm.OneSided(-0.5), relaxer=ebm.ErrorCoordinates(200, tol=1e-4))


def fitted(module, strategy, world, *callbacks, **flags):
    flags = {"max_epochs": 1, **flags}
    L.Trainer(strategy=strategy, devices=world, callbacks=list(callbacks), **flags, **QUIET).fit(module)
    return {name: value.clone() for name, value in module.state_dict().items()}


def asked(world, rank):
    """By accumulation and policy the collectives of each micro-batch."""
    found = {}
    cases = [("steps", "predictive-coding", "raise"), ("to a tolerance", CONVERGED, "raise")]
    cases += [("skips", "predictive-coding", "skip"), ("falls back", "predictive-coding", "backprop")]
    cases += [("chooses", None, "raise")]
    for name, given, policy in cases:
        for count in (1, 4):
            algorithm = given or ebm.algorithm("predictive-coding", relaxer="auto")
            seen = Collectives()
            strategy = ebm.EBMDDPStrategy(algorithm, on_divergence=policy, **LIMIT)
            module = Net(world, rank, scale=6.0)  # ranks take different numbers of steps
            module.log = lambda *args, **kwargs: None
            fitted(module, strategy, world, seen, accumulate_grad_batches=count, max_epochs=3)
            found[name, count] = seen.names
    return found


def broken_while_accumulating(world, rank):
    """The last rank fails at the first of four micro-batches; every user's step logs over all ranks meanwhile."""

    class Talks(Net):
        taken = 0

        def training_step(self, batch, batch_idx):
            self.taken += 1
            self.log("every", torch.ones(()), on_step=True, sync_dist=True)
            return super().training_step(batch, batch_idx)

    algorithm = ebm.algorithm("predictive-coding", relaxer=Breaks(False))
    algorithm.relaxer.breaks = rank == world - 1
    algorithm.relaxer.seen = 1
    module = Talks(world, rank)
    try:
        fitted(module, ebm.EBMDDPStrategy(algorithm, **LIMIT), world, accumulate_grad_batches=4)
    except Exception as error:
        return {"error": (type(error).__name__, str(error)), "taken": module.taken}


def broken_step_while_accumulating(world, rank):
    """The last rank's own code fails at the first of four micro-batches."""

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.rank == self.world - 1:
                raise KeyError("in the user's step")
            return super().training_step(batch, batch_idx)

    try:
        fitted(Fails(world, rank), ebm.EBMDDPStrategy(**LIMIT), world, accumulate_grad_batches=4)
    except Exception as error:
        return type(error).__name__, str(error)


def lost(world, rank):
    """Of two micro-batches a step, one cannot relax on the last rank; and the same with losses of weight 0 there."""
    generator = torch.Generator().manual_seed(rank)
    inputs = [torch.randn(8, 4, generator=generator) for _ in range(4)]
    found = {}
    for name, at in {"first": (2,), "second": (3,), "both": (2, 3)}.items():

        def batches(here, elsewhere, at=at):
            steepness = [0.1] * 4
            for k in at:
                alone = k % 2 == 0
                steepness[k] = here if rank == world - 1 else elsewhere(alone)
            return [(x, torch.full((8,), s)) for x, s in zip(inputs, steepness, strict=True)]

        given = batches(40.0, lambda alone: 0.1)
        without = batches(0.0, lambda alone: 0.1 if alone else 0.0)
        strategy = ebm.EBMDDPStrategy(NEGATIVE, on_divergence="skip", **LIMIT)
        weights = fitted(Fed(given), strategy, world, accumulate_grad_batches=2)
        plain = fitted(Fed(without), ebm.EBMDDPStrategy(NEGATIVE, **LIMIT), world, accumulate_grad_batches=2)
        found[name] = {"weights": weights, "plain": plain, "counts": strategy.learner.policy.counts}
    everywhere = [(x, torch.full((8,), s)) for x, s in zip(inputs, (0.1, 0.1, 40.0, 40.0), strict=True)]
    strategy = ebm.EBMDDPStrategy(NEGATIVE, on_divergence="skip", **LIMIT)
    weights = fitted(Fed(everywhere), strategy, world, accumulate_grad_batches=2)
    plain = fitted(Fed(everywhere[:2]), ebm.EBMDDPStrategy(NEGATIVE, **LIMIT), world, accumulate_grad_batches=2)
    found["everywhere"] = {"weights": weights, "plain": plain, "counts": strategy.learner.policy.counts}
    return found


def other_algorithm_fails_too(world, rank):
    """The last rank's batch diverges, and so it does by the algorithm to fall back to."""
    steepness = 40.0 if rank == world - 1 else 0.1
    module = Fed([(torch.randn(8, 4), torch.full((8,), steepness))] * 2)
    try:
        fitted(module, ebm.EBMDDPStrategy(NEGATIVE, on_divergence=NEGATIVE, **LIMIT), world)
    except Exception as error:
        return type(error).__name__, str(error)


def before_the_pass(world, rank):
    """The free phase that comes before the user's pass runs away on the last rank, at the first batch of two."""

    class Settles(ebm.FixedPoint):
        def relax(self, landscape, start, strength):
            if rank == world - 1 and not getattr(self, "done", False):
                object.__setattr__(self, "done", True)
                raise ebm.RelaxationDivergedError("told to run away")
            return super().relax(landscape, start, strength)

    found = {}
    for count in (1, 2):
        algorithm = ebm.algorithm("equilibrium-propagation", relaxer=Settles(60))
        strategy = ebm.EBMDDPStrategy(algorithm, on_divergence="skip", **LIMIT)
        weights = fitted(Net(world, rank), strategy, world, accumulate_grad_batches=count)
        found[count] = {"weights": weights, "counts": strategy.learner.policy.counts}
    return found


class Steadied:
    """Of a user: finds out another size on each rank, and takes the least of what all have found."""

    def found(self, size):
        if not self.sizes:
            self.sizes, self.tried = [size], [size]

    def agree(self, told):
        self.sizes, self.tried = [min(size for one in told for size in one)], []


class Weakened(Steadied, ebm.Nudge):
    """A nudge of a strength that is found on the first batch."""

    adapts = True

    def __init__(self, own):
        self.own, self.sizes = own, []

    def phases(self):
        strength = min(self.sizes, default=self.own)
        return ebm.OneSided(strength).phases()

    def note(self, statuses):
        self.found(self.own)


class Shortened(Steadied, ebm.GradientDescent):
    """A relaxer of a step size that is found on the first batch."""

    def __init__(self, own):
        super().__init__(lr=0.2, max_steps=5)
        for name, value in {"own": own, "sizes": [], "tried": []}.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)

    def relax(self, landscape, start, strength):
        self.found(self.own)
        return ebm.GradientDescent(lr=self.sizes[0], max_steps=5).relax(landscape, start, strength)


def own_parts(world, rank):
    """What a user's own parts have found out, after each step."""
    nudge, relaxer = Weakened((0.5, 0.25)[rank]), Shortened((0.1, 0.3)[rank])
    sizes = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, *_):
            sizes.append((nudge.phases()[0].strength, relaxer.sizes[0]))

    algorithm = ebm.algorithm("predictive-coding", nudge=nudge, relaxer=relaxer)
    fitted(Net(world, rank), ebm.EBMDDPStrategy(algorithm, **LIMIT), world, Watch())
    return sizes


if __name__ == "__main__":
    main(*sys.argv[1:], known=globals())
