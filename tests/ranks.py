"""What the processes of a distributed test run: many fits in one launch, as starting processes costs most.

    torchrun --nproc_per_node 2 tests/ranks.py OUT CASE...

Each rank leaves ``OUT/<case>.<rank>.pt``. The same fits run in one process for comparison, see `fit`.
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

torch.set_num_threads(1)
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "accelerator": "cpu",
}


class LinearHopfield(ebm.Energy):
    """e = 1/2 |x|^2 - <x, rho(a)>: its free equilibrium is not the forward pass, so that two phases are relaxed."""

    def layer_energy(self, state, layer):
        return 0.5 * state.square() - state * layer.prediction


ALGORITHMS = {
    "predictive-coding": "predictive-coding",
    "pc-nudge": "pc-nudge",
    "zero-divergence": "zero-divergence",
    "contrastive": ebm.Algorithm(LinearHopfield(), ebm.Centered(0.1), ebm.GradientDescent(lr=0.3, max_steps=60)),
}


class Net(L.LightningModule):
    """A classifier that takes each rank's share of the joined batches."""

    def __init__(self, world=1, rank=0, unused=False, batch=16):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        if unused:
            self.other = nn.Linear(3, 3)
        self.world, self.rank, self.batch = world, rank, batch

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 6, generator=generator)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
        share = slice(self.rank, None, self.world)
        return DataLoader(TensorDataset(x[share], y[share]), self.batch // self.world)


class Reductions(L.Callback):
    """Counts, by a communication hook, how often each parameter is reduced in each optimizer step."""

    def __init__(self):
        self.steps = []
        self.count = {}

    def on_train_start(self, trainer, pl_module):
        names = {id(p): name for name, p in pl_module.named_parameters()}

        def hook(state, bucket):
            for p in bucket.parameters():
                self.count[names[id(p)]] = self.count.get(names[id(p)], 0) + 1
            return allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if self.count:
            self.steps.append(dict(self.count))
            self.count.clear()


class Steps(L.Callback):
    """Relaxation steps of this rank's batches."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append(trainer.strategy.learner.report["steps"])


# Trainer flags, options of the strategy, options of the module, whether a hook counts
CASES = {
    "plain": ({}, {}, {}, True),
    "accumulation": ({"accumulate_grad_batches": 2}, {}, {}, True),
    "clipping": ({"gradient_clip_val": 0.05}, {}, {}, False),
    "find unused": ({}, {"find_unused_parameters": True}, {"unused": True}, True),
    "bucket view": ({"accumulate_grad_batches": 2}, {"gradient_as_bucket_view": True}, {}, False),
    "small buckets": ({}, {"bucket_cap_mb": 1e-4}, {}, True),
}


def fit(case, algorithm, world=1, rank=0):
    """One fit of two epochs; what it leaves."""
    flags, options, module_options, counts = CASES[case]
    module = Net(world, rank, **module_options)
    steps = Steps()
    callbacks = [steps]
    if world == 1:
        strategy = ebm.EBMStrategy(ALGORITHMS[algorithm])
    else:
        strategy = ebm.EBMDDPStrategy(ALGORITHMS[algorithm], **options)
        callbacks += [Reductions()] if counts else []
    trainer = L.Trainer(strategy=strategy, devices=world, max_epochs=2, callbacks=callbacks, **flags, **QUIET)
    trainer.fit(module)
    return {
        "weights": module.state_dict(),
        "loss": float(trainer.callback_metrics["loss"]),
        "steps": steps.steps,
        "optimizer steps": trainer.global_step,
        "reductions": callbacks[-1].steps if world > 1 and counts else None,
    }


def main(out, *cases):
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for case in cases:
        torch.save(fit(*case.split("/"), world, rank), Path(out) / f"{case.replace('/', '.')}.{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
