"""A training script as users start it, two processes by Lightning's own launcher; one of them can come to harm.

python tests/stopped.py OUT RESUME HARM STRATEGY
"""

import os
import signal
import sys
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning_modules import Template, data
from torch import nn
from torch.utils.data import DataLoader

import lightning_ebm as ebm


class Harm(nn.Tanh):
    """In the pass of the ninth batch, on rank 1."""

    harm, batch = "", -1

    def forward(self, x):
        if self.batch == 8 and not torch.is_inference_mode_enabled() and os.environ.get("LOCAL_RANK") == "1":
            if self.harm == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.harm == "raise":
                raise ValueError("it broke here")
        return super().forward(x)


class Terminated(ebm.ErrorCoordinates):
    """Within the relaxation of the ninth batch SIGTERM comes to some ranks, once."""

    ranks, late, relaxations = "", False, 0

    def relax(self, landscape, start, strength):
        Terminated.relaxations += 1
        if self.relaxations == 9 and os.environ["LOCAL_RANK"] in self.ranks:
            time.sleep(3 * self.late)  # the others are in the vote long before
            os.kill(os.getpid(), signal.SIGTERM)
        return super().relax(landscape, start, strength)


ALGORITHM = ebm.algorithm("predictive-coding", relaxer=Terminated(12))


class Module(Template):
    """Dropout, BatchNorm, and a loader that shuffles."""

    def __init__(self, harm=""):
        super().__init__()
        self.net[5] = Harm()
        self.net[5].harm = harm

    def training_step(self, batch, batch_idx):
        self.net[5].batch = self.global_step
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(data(), 4, shuffle=True)


def main(out, resume, harm, strategy):
    torch.set_num_threads(1)
    out = Path(out)
    harm, _, Terminated.ranks = harm.partition("@")
    Terminated.late = harm == "terminate late"
    L.seed_everything(1, verbose=False)  # Lightning's sampler shuffles by it
    if resume != "no":
        torch.manual_seed(99)
    logger = WandbLogger(project="p", save_dir=out, offline=True) if strategy != "ebm_ddp" else False
    alignment = ebm.GradientAlignment(every_n_steps=1)
    trainer = L.Trainer(
        # Captured steps call no module in a relaxation, where this one is to be harmed.
        strategy=ebm.EBMDDPStrategy(ALGORITHM, capture=False) if strategy == "ebm_ddp" else strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=3,
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[
            *(alignment, OnExceptionCheckpoint(out)),
            ModelCheckpoint(out, "at-{step}", every_n_train_steps=4, save_top_k=-1),
        ],
    )
    module = Module(harm)
    trainer.fit(module, ckpt_path=None if resume == "no" else resume)
    run = alignment.run.compute() if strategy == "ebm_ddp" else None
    left = {"weights": module.state_dict(), "alignment": run, "random": torch.get_rng_state()}
    torch.save(left, out / f"end.{trainer.global_rank}.pt")
    if torch.distributed.is_initialized():  # Lightning ends NCCL's groups only, and gloo's threads may abort the exit
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
