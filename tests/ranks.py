"""What the processes of a distributed test run: many fits in one launch, as starting processes costs most.

    torchrun --nproc_per_node 2 tests/ranks.py OUT CASE...

Each rank leaves ``OUT/<case>.<rank>.pt`` with what the function of that name returned. Many of them run in one process
as well, world = 1, for comparison.
"""

import copy
import itertools
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_modules import Template, data
from since import NEWER
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "accelerator": os.environ.get("EBM_TEST_ACCELERATOR", "cpu"),
}


class LinearHopfield(ebm.Energy):
    """e = 1/2 |x|^2 - <x, rho(a)>: its free equilibrium is not the forward pass, so that two phases are relaxed."""

    def layer_energy(self, state, layer):
        return 0.5 * state.square() - state * layer.prediction


def contrastive(steps=20):
    return ebm.Algorithm(LinearHopfield(), ebm.Centered(0.1), ebm.GradientDescent(lr=0.3, max_steps=steps))


def descent(steps):
    return ebm.Algorithm(relaxer=ebm.GradientDescent(lr=0.3, max_steps=steps))


# One line each for further families; names of presets, or algorithms.
ALGORITHMS = {
    "predictive-coding": "predictive-coding",
    "pc-nudge": "pc-nudge",
    "zero-divergence": "zero-divergence",
    "contrastive": contrastive(),
    "equilibrium-propagation": ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(200, tol=1e-6)),
    "holomorphic-ep": ebm.algorithm("holomorphic-ep", relaxer=ebm.FixedPoint(200, tol=1e-6)),
}
# To the end, as where a relaxation stops within its tolerance depends a little on the other samples of the batch.
CONVERGED = ebm.algorithm("predictive-coding", relaxer=ebm.ErrorCoordinates(max_steps=400, tol=1e-6))


class Net(L.LightningModule):
    """A classifier that takes each rank's share of the joined batches; every second sample's output counts for more."""

    def __init__(self, world=1, rank=0, unused=False, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        if unused:
            self.other = nn.Linear(3, 3)
        self.world, self.rank, self.scale = world, rank, scale

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x[:, :6]) * x[:, 6:], y)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.cat([torch.randn(64, 6, generator=generator), torch.ones(64, 1)], dim=1)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
        x[::2, 6] = self.scale
        share = slice(self.rank, None, self.world)
        return DataLoader(TensorDataset(x[share], y[share]), 16 // self.world)


class Sharded(Net):
    """The same, its weights sharded over all ranks."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


class Reductions(L.Callback):
    """Counts, by a communication hook, how often each parameter is reduced in each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        names = {id(p): name for name, p in pl_module.named_parameters()}

        def hook(state, bucket):
            for p in bucket.parameters():
                self.steps[-1][names[id(p)]] = self.steps[-1].get(names[id(p)], 0) + 1
            return allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)

    def on_before_zero_grad(self, *_):
        self.steps.append({})


class Relaxed(L.Callback):
    """Relaxation steps of this rank's batches."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append(trainer.strategy.learner.report["steps"])


class Collectives(L.Callback):
    """The collectives of each batch, as torch's profiler saw them."""

    def __init__(self):
        self.names = []

    def on_train_batch_start(self, *_):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.start()

    def on_train_batch_end(self, *_):
        self.profile.stop()
        self.names.append(sorted(e.name for e in self.profile.events() if e.name.startswith("c10d::")))


FLAGS = {
    # Trainer flags, options of the strategy, options of the module, whether a hook counts
    "plain": ({}, {}, {}, True),
    "accumulation": ({"accumulate_grad_batches": 2}, {}, {}, True),
    "clipping": ({"gradient_clip_val": 0.05}, {}, {}, False),
    "unused": ({}, {"find_unused_parameters": True}, {"unused": True}, True),
    "view": ({"accumulate_grad_batches": 2}, {"gradient_as_bucket_view": True}, {}, False),
    "buckets": ({}, {"bucket_cap_mb": 1e-4}, {}, True),
    "uneven": ({}, {}, {"scale": 6.0}, True),  # ranks take different numbers of relaxation steps
    **({"sharded": ({}, {}, {}, False)} if NEWER else {}),
}


def fit(flags, algorithm, world=1, rank=0):
    """One fit of two epochs; what it leaves."""
    trainer_flags, options, module_options, counts = FLAGS[flags]
    algorithm = {**ALGORITHMS, "converged": CONVERGED}[algorithm]
    relaxed, reductions = Relaxed(), Reductions()
    callbacks = [relaxed, reductions] if world > 1 and counts else [relaxed]
    if world == 1:
        strategy, module = ebm.EBMStrategy(algorithm), Net(**module_options)
    elif flags == "sharded":
        strategy, module = ebm.EBMFSDP2Strategy(algorithm, save_distributed_checkpoint=False), Sharded(world, rank)
    else:
        strategy, module = ebm.EBMDDPStrategy(algorithm, **options), Net(world, rank, **module_options)
    trainer = L.Trainer(strategy=strategy, devices=world, max_epochs=2, callbacks=callbacks, **trainer_flags, **QUIET)
    trainer.fit(module)
    weights = strategy.lightning_module_state_dict()  # whole, and on rank 0 alone if sharded
    return {
        "weights": {name: weight.cpu().clone() for name, weight in weights.items()},
        "gradients": {name: None if p.grad is None else 1 for name, p in module.named_parameters()},
        "loss": float(trainer.callback_metrics["loss"]),
        "relaxed": relaxed.steps,
        "steps": trainer.global_step,
        "reductions": reductions.steps,
    }


def collectives(world, rank):
    """Those of a step, for a short and for a long relaxation, in one phase and in three, weights whole and sharded."""
    found = {}
    for sharded, make, steps in itertools.product((False, True)[: 1 + NEWER], (descent, contrastive), (2, 12)):
        names = Collectives()
        kind, module = (ebm.EBMFSDP2Strategy, Sharded) if sharded else (ebm.EBMDDPStrategy, Net)
        trainer = L.Trainer(strategy=kind(make(steps)), devices=world, max_steps=1, callbacks=[names], **QUIET)
        trainer.fit(module(world, rank))
        found[sharded, make.__name__, steps] = names.names[0]
    return found


class Detour(ebm.ErrorCoordinates):
    """Asks some questions more than it has to, on each rank others."""

    def __init__(self, more, **options):
        super().__init__(**options)
        object.__setattr__(self, "more", more)

    def relax(self, landscape, start, strength):
        for _ in range(self.more):
            landscape.norms(landscape.evaluate(ebm.ErrorForces(), landscape.no_errors, strength).gradients)
        return super().relax(landscape, start, strength)


def choice(world, rank):
    """The relaxer each rank prefers after its first batch, and the one that all have after every step."""
    # By itself rank 0 takes the first and rank 1 the second; together the second costs less.
    extra = {0: (0, 1), 1: (9, 0)}[rank]
    relaxer = ebm.Cheapest(*(Detour(more, lr=lr) for more, lr in zip(extra, (1.0, 0.9), strict=True)))
    strategy = ebm.EBMDDPStrategy(ebm.Algorithm(relaxer=relaxer))
    found = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, *_):
            found.append(relaxer.chosen["nudged"].lr)

    agree, own = relaxer.agree, []
    relaxer.agree = lambda told: (own.append(relaxer.chosen["nudged"].lr), agree(told))
    gather, gathered = strategy.gather, []
    strategy.gather = lambda value: gathered.append(len(found)) or gather(value)
    L.Trainer(strategy=strategy, devices=world, max_epochs=1, callbacks=[Watch()], **QUIET).fit(Net(world, rank))
    return {"own": own, "together": found, "gathered at": gathered}


def equals_stock(world, rank):
    """Rules under DDP against stock DDP: shuffled and padded batches, BatchNorm, metrics, moved buffers."""

    class Moves(Template):
        """Inputs are centred by a running mean that each rank moves, and DDP takes rank 0's of at every step."""

        def __init__(self):
            super().__init__(dropout=0.0, optimizer="sgd")
            self.register_buffer("centre", torch.zeros(6))

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = torch.tanh(x - self.centre)  # BatchNorm would undo a mere shift
            self.centre += 0.3 * x.mean(0).detach()
            return super().training_step((x, y), batch_idx)

        def train_dataloader(self):
            return DataLoader(data(45), 8, shuffle=True)

    ends = []
    flags = {**QUIET, "use_distributed_sampler": True, "max_epochs": 3}
    for strategy in ("ddp", *map(ebm.EBMDDPStrategy, ("backprop", "zero-divergence", "pc-nudge"))):
        L.seed_everything(0, verbose=False)
        module = Moves()
        trainer = L.Trainer(strategy=strategy, devices=world, **flags)
        trainer.fit(module)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        ends.append({"weights": module.state_dict(), "metrics": metrics, "steps": trainer.global_step})
    return ends


def alignment(world, rank):
    """Logged figures of the first step, and of all of them."""
    found = {}
    for name, flags in {"one": {"max_steps": 1}, "accumulated": {"max_steps": 1, "accumulate_grad_batches": 2}}.items():
        callback = ebm.GradientAlignment(every_n_steps=1)
        strategy = ebm.EBMDDPStrategy("predictive-coding")
        trainer = L.Trainer(strategy=strategy, devices=world, callbacks=[callback], **flags, **QUIET)
        trainer.fit(Net(world, rank))
        found[name] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        assert float(callback.run.compute()["cosine"]) == float(callback._steps[0].compute()["cosine"])
    return found


def monitored(world, rank):
    """What a rank's own report of the first step says, and what is logged of it."""
    own = {}

    class Reports(L.Callback):
        def on_after_backward(self, trainer, module):
            report = trainer.strategy.learner.report
            residual = report["residual"]
            own.update({
                "ebm/energy_nudged": report["energy_nudged"], "ebm/steps": float(report["steps"]),
                "ebm/residual": sum(residual) / len(residual), "ebm/residual_max": max(residual),
            })  # fmt: skip
            regime = trainer.strategy.regime()
            own.update(
                {
                    "ebm/relaxed": regime.relaxed,
                    "ebm/toward_equilibrium": regime.toward_equilibrium,
                    "ebm/toward_equilibrium/layer/net/1": regime.layers[0].toward_equilibrium,
                }
            )

    callbacks = [ebm.RelaxationMonitor(1, regime_every_n_steps=1), Reports()]
    strategy = ebm.EBMDDPStrategy(CONVERGED)
    trainer = L.Trainer(strategy=strategy, devices=world, max_steps=1, callbacks=callbacks, **QUIET)
    trainer.fit(Net(world, rank, scale=6.0))
    return {"own": own, "logged": {key: float(value) for key, value in trainer.callback_metrics.items()}}


def evaluation(world, rank):
    """Validated at the free equilibrium between training steps: ranks need different numbers of sweeps."""

    class Evaluated(Net):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("valid", F.cross_entropy(self.net(x[:, :6]) * x[:, 6:], y), sync_dist=True)

        def val_dataloader(self):
            return self.train_dataloader()

    module = Evaluated(world, rank)
    kind = ebm.EBMDDPStrategy if world > 1 else ebm.EBMStrategy
    strategy = kind(ALGORITHMS["equilibrium-propagation"])
    trainer = L.Trainer(strategy=strategy, devices=world, max_epochs=2, **QUIET)
    trainer.fit(module)
    return {"valid": float(trainer.callback_metrics["valid"]), "weights": module.state_dict()}


def overflow(world, rank):
    """fp16 with a scaler; the loss of rank 1 is infinite at its second batch."""

    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            factor = float("inf") if batch_idx == 1 and self.rank == 1 else 1.0
            return factor * super().training_step((x, y), batch_idx)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    weights = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))

    trainer = L.Trainer(
        strategy=ebm.EBMDDPStrategy("predictive-coding"),
        devices=world,
        max_epochs=1,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[Keep()],
        **QUIET,
    )
    module = Overflows(world, rank)
    module.log = lambda *args, **kwargs: None
    trainer.fit(module)
    return {"scale": scaler.get_scale(), "weights": weights}


def errors(world, rank):
    """What each rank gets when the last one fails, in six ways; and that they can go on together."""

    class InTheFirstPass(Net):
        def training_step(self, batch, batch_idx):
            if self.rank == self.world - 1 and batch_idx == 1:
                raise KeyError("first pass")
            return super().training_step(batch, batch_idx)

    class ReturnsNone(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.rank == self.world - 1 and batch_idx == 1 else loss

    class Manual(Net):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    class Gathers(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.all_gather(torch.ones(1)).sum()

    def breaks():
        return ebm.algorithm("predictive-coding", relaxer=Breaks(rank == world - 1))

    diverges = ebm.Algorithm(relaxer=ebm.GradientDescent(lr=5.0 if rank == world - 1 else 0.1, max_steps=10))
    runs = {
        "mid-relaxation": (Net, breaks(), {}),
        "accumulation": (Net, breaks(), {"accumulate_grad_batches": 2}),
        "first pass": (InTheFirstPass, "predictive-coding", {}),
        "none": (ReturnsNone, "predictive-coding", {}),
        "manual": (Manual, breaks(), {}),
        "diverged": (Net, diverges, {}),
        "gathers": (Gathers, "predictive-coding", {}),
        "none fails": (Net, "predictive-coding", {}),
    }
    found = {}
    for name, (make, algorithm, flags) in runs.items():
        strategy = ebm.EBMDDPStrategy(algorithm, timeout=timedelta(seconds=60))
        try:
            L.Trainer(strategy=strategy, devices=world, max_epochs=1, **flags, **QUIET).fit(make(world, rank))
            found[name] = None
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    return found


class Fed(L.LightningModule):
    """A quadratic loss, trained on given batches of each rank."""

    def __init__(self, batches, breaks=-1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Hardtanh(), nn.Linear(6, 3))
        self.batches, self.breaks = batches, breaks

    def training_step(self, batch, batch_idx):
        x, steepness = batch
        if batch_idx == self.breaks:
            raise KeyError("broken in the pass")
        return 0.5 * (steepness[:, None] * (self.net(x) - 1).square()).sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*map(torch.cat, zip(*self.batches, strict=True))), 8)


def policies(world, rank):
    """One rank cannot take its second batch; what all do with it, and what they do without that batch."""
    generator = torch.Generator().manual_seed(rank)
    batches = [(torch.randn(8, 4, generator=generator), torch.full((8,), 0.1)) for _ in range(3)]
    last = rank == world - 1

    def spoiled(how):
        x, steepness = (t.clone() for t in batches[1])
        if last and how == "steep":
            steepness.fill_(40.0)
        elif last:
            x[2, 1] = float("nan")
        return [batches[0], (x, steepness), batches[2]]

    def fit(strategy, given, breaks=-1, **flags):
        module = Fed(given, breaks)
        L.Trainer(strategy=strategy, devices=world, max_epochs=1, **flags, **QUIET).fit(module)
        counts = getattr(getattr(strategy, "_learner", None), "policy", None)
        return {"weights": copy.deepcopy(module.state_dict()), "counts": counts and counts.counts}

    negative = ebm.Algorithm(nudge=ebm.OneSided(-0.5), relaxer=ebm.ErrorCoordinates(200, tol=1e-4))
    hopfield = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(60))
    found = {}
    for name, algorithm, how in (
        ("diverges", negative, "steep"), ("nan", negative, "nan"), ("nan before a free phase", hopfield, "nan"),
    ):  # fmt: skip
        limit = {"timeout": timedelta(seconds=60)}
        skips = ebm.EBMDDPStrategy(algorithm, on_divergence="skip", **limit)
        found[name] = fit(skips, spoiled(how)), fit(ebm.EBMDDPStrategy(algorithm), [batches[0], batches[2]])
    falls = ebm.EBMDDPStrategy(negative, on_divergence="backprop")
    found["falls back"] = fit(falls, spoiled("steep")[1:2]), fit("ddp", spoiled("steep")[1:2])
    try:  # one rank diverges, the other fails in another way
        strategy = ebm.EBMDDPStrategy(negative, on_divergence="skip", timeout=timedelta(seconds=60))
        fit(strategy, spoiled("steep"), breaks=-1 if last else 1)
    except Exception as error:
        found["both"] = str(error)
    return found


class Breaks(ebm.ErrorCoordinates):
    """Fails, if told to, in its second relaxation."""

    def __init__(self, breaks):
        super().__init__(max_steps=5)
        self.breaks, self.seen = breaks, 0

    def relax(self, landscape, start, strength):
        self.seen += 1
        found = super().relax(landscape, start, strength)
        if self.breaks and self.seen == 2:
            raise ValueError("broken in mid-relaxation")
        return found


def main(out, *cases, known=None):
    torch.set_num_threads(1)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for case in cases:
        name, *arguments = case.split("/")
        print(f"{case} at {time.perf_counter():.1f} s", file=sys.stderr)
        left = (known or globals())[name](*arguments, world, rank)
        torch.save(left, Path(out) / f"{case.replace('/', '.')}.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # All is saved. A worker thread of gloo that outlives the group may want the interpreter while it is torn down, and
    # aborts the process ("terminate called without an active exception").
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
