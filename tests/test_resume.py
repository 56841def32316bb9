"""A run that was stopped and resumed ends bit by bit where one that was not stopped ends."""

import os
import random
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from inspect import signature
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loops import _FitLoop as FitLoop
from lightning_modules import Template, data
from torch import nn
from torch.utils.data import DataLoader

import lightning_ebm as ebm
from lightning_ebm.plain_state import RandomState
from lightning_ebm.strategies.resume import _ahead

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}
EPOCHS, BATCHES = 4, 6


class Random(Template):
    """Shuffles, drops out, and augments with numbers from every generator there is, in loading and in the step."""

    validates = False

    def train_dataloader(self):
        return DataLoader(data(), 8, shuffle=True, collate_fn=self.augmented)

    def augmented(self, samples):
        x, y = torch.utils.data.default_collate(samples)
        return x + 0.1 * torch.randn_like(x) * np.random.rand(), y

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x * (1 + 0.1 * random.random()), y), batch_idx)

    def val_dataloader(self):
        return DataLoader(data(), 8) if self.validates else []

    def validation_step(self, batch, batch_idx):
        self.log("val", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]) + torch.rand(()))


class Validates(Random):
    validates = True


class OwnPlace(Random):
    """A loader that saves its own place, as torchdata's StatefulDataLoader does; it is not to be moved twice."""

    def train_dataloader(self):
        return Stateful(data(), 8)


class Stateful(DataLoader):
    place = 0

    def __iter__(self):
        return self.rest(super().__iter__())

    def rest(self, batches):
        for index, batch in enumerate(batches):
            if index >= self.place:
                self.place = index + 1
                yield batch
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def trainer(algorithm, tmp_path, callbacks=(), **flags):
    alignment = ebm.GradientAlignment(every_n_steps=1)
    options = {"max_epochs": EPOCHS, "default_root_dir": tmp_path, **QUIET, **flags}
    made = L.Trainer(strategy=ebm.EBMStrategy(algorithm), callbacks=[alignment, *callbacks], **options)
    made.alignment = alignment
    return made


def end_of(made, make, ckpt_path=None):
    L.seed_everything(3 if ckpt_path is None else 12345, verbose=False)  # a new process starts from anywhere
    module = make()
    safely = {"weights_only": True} if ckpt_path and "weights_only" in signature(made.fit).parameters else {}
    made.fit(module, ckpt_path=ckpt_path, **safely)  # lightning 2.5 has no such argument
    left = [module.state_dict(), made.optimizers[0].state_dict()["state"], made.alignment.run.total]
    flat, _ = torch.utils._pytree.tree_flatten(left)
    generators = (
        torch.get_rng_state(),
        torch.tensor(random.getstate()[1]),
        torch.tensor(np.random.get_state()[1].copy()),
    )
    return [*(t for t in flat if isinstance(t, torch.Tensor)), *generators]


Case = namedtuple("Case", "make when flags")
CASES = {
    "mid-epoch": Case(Random, {"every_n_train_steps": 8}, {}),
    "first step": Case(Random, {"every_n_train_steps": 1}, {}),
    "last batch of an epoch": Case(Random, {"every_n_train_steps": 12}, {}),
    "end of an epoch": Case(Random, {"every_n_epochs": 2, "save_on_train_epoch_end": True}, {}),
    "after validation": Case(Validates, {"every_n_epochs": 2, "save_on_train_epoch_end": False}, {}),
    "validation, end of an epoch": Case(Validates, {"every_n_epochs": 2, "save_on_train_epoch_end": True}, {}),
    "validation, mid-epoch": Case(Validates, {"every_n_train_steps": 8}, {}),
    "accumulation, mid-epoch": Case(Random, {"every_n_train_steps": 4}, {"accumulate_grad_batches": 2}),
    "stateful loader, mid-epoch": Case(OwnPlace, {"every_n_train_steps": 8}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_ends_bit_identical(case, tmp_path):
    if case in ("end of an epoch", "validation, end of an epoch") and not hasattr(FitLoop, "is_resuming"):
        pytest.skip("this Lightning makes the first iterator of such a run twice, and draws twice for it")
    make, when, flags = CASES[case]
    algorithm = "predictive-coding" if case == "mid-epoch" else "pc-nudge"
    whole = end_of(trainer(algorithm, tmp_path, enable_checkpointing=False, **flags), make)

    class StopsAfterSaving(ModelCheckpoint):
        """The process dies with the first checkpoint."""

        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            raise KeyError("the machine went away")

    saving = StopsAfterSaving(tmp_path, "stopped", save_top_k=-1, **when)
    with pytest.raises(KeyError, match="went away"):
        end_of(trainer(algorithm, tmp_path, [saving], **flags), make)
    resumed = end_of(trainer(algorithm, tmp_path, enable_checkpointing=False, **flags), make, tmp_path / "stopped.ckpt")
    assert len(whole) == len(resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_run_stopped_twice_in_one_epoch(tmp_path):
    whole = end_of(trainer("pc-nudge", tmp_path, enable_checkpointing=False), Random)
    path = None
    for steps in (BATCHES + 2, BATCHES + 4):  # and each time in good order, which Lightning takes for an epoch's end
        made = trainer("pc-nudge", tmp_path, max_steps=steps)
        end_of(made, Random, path)
        path = tmp_path / f"{steps}.ckpt"
        made.save_checkpoint(path)
    resumed = end_of(trainer("pc-nudge", tmp_path, enable_checkpointing=False), Random, path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("kind", [list, DataLoader])
def test_a_loader_skips_what_was_done_once_and_is_itself_again(kind):
    batches = [torch.tensor([float(k)]) for k in range(5)]
    loader = batches if kind is list else DataLoader(batches, batch_size=1)
    ahead = _ahead(loader, 2, RandomState(torch.nn.Linear(1, 1)))
    assert len(ahead) == 5
    assert isinstance(ahead, kind) or kind is list
    assert [float(batch) for batch in ahead] == [2.0, 3.0, 4.0]
    assert type(loader) is kind
    assert [float(batch) for batch in ahead] == [0.0, 1.0, 2.0, 3.0, 4.0]


class Interrupted(ebm.ErrorCoordinates):
    """Ctrl-C comes within the relaxation of one batch, once."""

    at, relaxations = -1, 0

    def relax(self, landscape, start, strength):
        Interrupted.relaxations += 1
        if Interrupted.relaxations == Interrupted.at:
            raise KeyboardInterrupt
        return super().relax(landscape, start, strength)


def until_the_end(folder, at=-1, resume=None):
    """A whole run, or one that is interrupted in the relaxation of a batch; the module as it is left."""
    Interrupted.at, Interrupted.relaxations = at, 0
    L.seed_everything(3, verbose=False)
    module = Random(batch_norm=True)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(ebm.algorithm("predictive-coding", relaxer=Interrupted(8))),
        max_epochs=3, callbacks=[OnExceptionCheckpoint(folder)], default_root_dir=folder, **QUIET,
    )  # fmt: skip
    if at > 0:
        with pytest.raises(SystemExit):
            trainer.fit(module)
    else:
        trainer.fit(module, ckpt_path=resume)
    return module


@pytest.mark.parametrize("at", [1, BATCHES, BATCHES + 1, BATCHES + 3])
def test_a_batch_that_was_cut_off_is_done_again_as_if_it_had_not_begun(at, tmp_path):
    """Its pass has moved BatchNorm's statistics and drawn numbers: a checkpoint of that moment holds neither."""
    whole = until_the_end(tmp_path)
    until_the_end(tmp_path, at)
    resumed = until_the_end(tmp_path, resume=tmp_path / "on_exception.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_an_interrupt_in_the_pass_itself_leaves_no_trace_of_it(tmp_path):
    class Broken(Template):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                self.before = self.counted
                raise KeyboardInterrupt
            self.counted = int(self.net[1].num_batches_tracked)
            return loss

    module = Broken()
    trainer = L.Trainer(strategy=ebm.EBMStrategy(), max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(SystemExit):
        trainer.fit(module)
    assert int(module.net[1].num_batches_tracked) == module.before == 2


FULL_DISK = """
import lightning as L, torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning_modules import Template
import lightning_ebm as ebm
import errno, sys

class Growing(Template):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["ballast"] = torch.zeros(self.global_step * 2000)

keeps = ModelCheckpoint("DISK", "last", every_n_train_steps=4, save_top_k=1, enable_version_counter=False)
trainer = L.Trainer(strategy=ebm.EBMStrategy(), max_epochs=4, callbacks=[keeps], logger=False, accelerator="cpu",
                    enable_progress_bar=False, enable_model_summary=False, default_root_dir="DISK")
try:
    trainer.fit(Growing())
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    kept = torch.load("DISK/last.ckpt", weights_only=True)
    import os
    print("KEPT", kept["global_step"], "FAILED", trainer.global_step, sorted(os.listdir("DISK")))
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_that_fitted(tmp_path):
    """A real one, of 200 kB, mounted in a namespace of its own; stock leaves a file that is cut off."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=200k none {disk}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("small disks cannot be mounted here")
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK.replace("DISK", str(disk)))
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"}
    command = ["unshare", "-rm", "sh", "-c", f"{mount} && exec {sys.executable} {script}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    words = re.search(r"KEPT (\d+) FAILED (\d+) (.*)", done.stdout)
    assert words is not None, done.stderr[-3000:]
    assert int(words[1]) == int(words[2]) - 4 > 0
    assert words[3] == "['last.ckpt']"


STATEFUL = {
    "random sign": lambda: ebm.algorithm("pc-nudge", nudge=ebm.RandomSign(0.1)),
    "the strongest nudge": lambda: None,
    "the cheapest relaxer": lambda: ebm.algorithm("predictive-coding", relaxer="auto"),
    "feedback": lambda: ebm.Algorithm(relaxer=ebm.Feedback(ebm.GradientDescent(0.1, 3), ebm.KolenPollack())),
    "other feedback": lambda: ebm.Algorithm(relaxer=ebm.Feedback(ebm.GradientDescent(0.1, 3), ebm.RandomFeedback())),
    "noise": lambda: ebm.Algorithm(relaxer=ebm.Noisy(ebm.GradientDescent(0.1, 3), states=0.1, seed=0)),
    "noisy feedback": lambda: ebm.Algorithm(
        relaxer=ebm.Noisy(ebm.Feedback(ebm.GradientDescent(0.1, 3), ebm.KolenPollack()), states=0.1, seed=0)
    ),
}


def _trained(algorithm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    learner = ebm.Learner(net, algorithm)
    for _ in range(2):
        learner.backward(lambda: net(x).square().mean())
    return learner, lambda: net(x).square().mean()


@pytest.mark.parametrize("resumed", STATEFUL)
def test_a_run_goes_on_by_another_algorithm(resumed, caplog):
    """What the parts of one kind carried means nothing to those of another: they begin anew, and it is said."""
    for name, begun in STATEFUL.items():
        state = _trained(begun())[0].state_dict()
        learner, closure = _trained(STATEFUL[resumed]())
        caplog.clear()
        learner.load_state_dict(state)
        learner.backward(closure)
        kinds = learner.state_dict()["kinds"]
        other = any(kind != kinds[part] and state[part] for part, kind in state["kinds"].items())
        assert ("begins anew" in caplog.text) == other, name
        assert name != resumed or not other


def test_what_is_no_state_is_refused():
    with pytest.raises(ebm.ConfigurationError, match="state=3"):
        _trained(None)[0].load_state_dict(3)
