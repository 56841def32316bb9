"""Processes beside the one that trains: workers that load data, W&B's service, children that are forked; some die."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning_modules import Template
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lightning_ebm as ebm

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False,
    "log_every_n_steps": 1,
}  # fmt: skip
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))


def apart(name, given, folder):
    """What a function of this file returns in a process of its own."""
    code = "import pickle, sys, test_lost_processes as own; name, given, file = sys.argv[1:]\n"
    code += "pickle.dump(getattr(own, name)(given), open(file, 'wb'))"
    path = f"{Path(ebm.__file__).parents[1]}:{Path(__file__).parent}"
    command = [sys.executable, "-c", code, name, given, str(folder / "found")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True, timeout=200)
    return pickle.loads((folder / "found").read_bytes())


class Deadly(Dataset):
    """Kills the process that loads one of its items, as the kernel does where memory ends."""

    def __init__(self, at):
        self.at = at

    def __len__(self):
        return len(X)

    def __getitem__(self, k):
        if k == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return X[k], k % 3


class Loads(Template):
    def __init__(self, at):
        super().__init__(dropout=0.0)
        self.at = at

    def train_dataloader(self):
        return DataLoader(Deadly(self.at), 4, num_workers=1, multiprocessing_context="fork")


def loaded(at, folder, strategy, resume=None):
    """What a run of two epochs of ten batches ends with, or what it holds when its worker has died."""
    L.seed_everything(4, verbose=False)
    module = Loads(at)
    keeps = ModelCheckpoint(folder, "last", every_n_train_steps=2, save_top_k=1, enable_version_counter=False)
    trainer = L.Trainer(strategy=strategy, max_epochs=2, callbacks=[keeps], logger=False, **QUIET)
    if at < 0:
        trainer.fit(module, ckpt_path=resume)
    else:
        with pytest.raises((RuntimeError, ConnectionError), match=r"DataLoader worker|reset by peer|refused"):
            trainer.fit(module)
    return module.state_dict(), trainer.global_step


def test_a_worker_that_dies_ends_the_run_as_in_stock_and_its_checkpoint_goes_on(tmp_path):
    whole, _ = loaded(-1, tmp_path / "whole", ebm.EBMStrategy("predictive-coding"))
    _, stock_steps = loaded(30, tmp_path / "stock", "auto")
    _, steps = loaded(30, tmp_path / "lost", ebm.EBMStrategy("predictive-coding"))
    assert 0 < steps <= stock_steps + 1  # how far ahead a worker is, is no one's to say
    kept = tmp_path / "lost" / "last.ckpt"
    # The signal may come between a step and the saving that belongs to it.
    saved = torch.load(kept, weights_only=True)["global_step"]
    assert saved in (steps // 2 * 2, (steps - 1) // 2 * 2)
    resumed, _ = loaded(-1, tmp_path / "resumed", ebm.EBMStrategy("predictive-coding"), resume=kept)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class LogsNothing(Template):
    """What a module logs itself ends a run without its service, under any strategy."""

    def log(self, *args, **kwargs):
        pass


class KillsService(Callback):
    """Kills the process that writes W&B's run, in mid-run."""

    killed = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            for child in children(os.getpid()):
                if "wandb" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(child, signal.SIGKILL)
                    self.killed = True


def children(parent):
    """All processes below one."""
    found, queue = [], [parent]
    while queue:
        one = queue.pop()
        for task in Path(f"/proc/{one}/task").iterdir():
            below = [int(child) for child in (task / "children").read_text().split()]
            found += below
            queue += below
    return found


def trained(folder, logger, callbacks):
    L.seed_everything(5, verbose=False)
    module = LogsNothing(dropout=0.0)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy("predictive-coding"), max_epochs=2, logger=logger, callbacks=callbacks,
        enable_checkpointing=False, default_root_dir=folder, **QUIET,
    )  # fmt: skip
    trainer.fit(module)
    return module.state_dict()


def watched(folder):
    """The end of a run that observers look at, and whether its service was killed."""
    observers = [ebm.GradientAlignment(every_n_steps=1), ebm.RelaxationMonitor(1)]
    kills = KillsService()
    found = trained(folder, WandbLogger(save_dir=str(folder), offline=True), [kills, *observers])
    return {name: value.numpy() for name, value in found.items()}, kills.killed


@pytest.mark.slow
def test_a_run_whose_service_of_wandb_is_killed_ends_where_it_would(tmp_path):
    plain = trained(tmp_path, False, [])
    # In a process of its own: W&B's service is one for all runs of a process.
    observed, killed = apart("watched", str(tmp_path), tmp_path)
    assert killed
    assert all(torch.equal(value, torch.from_numpy(observed[name])) for name, value in plain.items())


def gradients_of(learner, net, rows):
    found = learner.gradients(lambda: F.cross_entropy(net(X[rows]), torch.arange(len(rows)) % 3))
    return {name: slope.clone() for name, slope in found.items()}


def in_a_child(learner, net, rows, sends):
    sends.put({name: slope.numpy() for name, slope in gradients_of(learner, net, rows).items()})


def forked(preset):
    """What a child finds that is forked after three steps, and what its parent finds then."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(0, 1), nn.Linear(8, 3))
    learner, rows = ebm.Learner(net, preset), list(range(8))
    for _ in range(3):
        gradients_of(learner, net, rows)
    fork = multiprocessing.get_context("fork")
    received = fork.Queue()
    child = fork.Process(target=in_a_child, args=(learner, net, rows[:5], received))
    child.start()
    of_child = received.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    return of_child, {name: slope.numpy() for name, slope in gradients_of(learner, net, rows[:5]).items()}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["zero-divergence", "predictive-coding", "equilibrium-propagation"])
def test_a_child_that_is_forked_between_steps_and_its_parent_both_go_on(preset, tmp_path):
    # From a process of its own, of one thread: OpenMP does not outlive a fork where it has used several.
    of_child, of_parent = apart("forked", preset, tmp_path)
    assert of_child.keys() == of_parent.keys()
    for name, slope in of_parent.items():
        assert np.array_equal(slope, of_child[name]), name
