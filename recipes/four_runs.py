"""Four runs, one of them sound, and a report of each: what trouble looks like.

    python recipes/four_runs.py --root runs/four

Half a minute on one CPU core. The same digits and network each time; only the relaxation, or one bias, differs. Where a
Chromium is installed, pictures of the reports are taken as well, as those of docs/reports.md were.
"""

import argparse
import logging
import shutil
import subprocess
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from digits_classifier import Digits, DigitsClassifier
from lightning.pytorch.loggers import CSVLogger

import lightning_ebm as ebm
from lightning_ebm_cli import main as command


def too_long_a_step() -> ebm.Algorithm:
    """Fixed Euler steps that suit the first weights, and not those that have grown."""
    return ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=0.5, max_steps=20))


@dataclass(frozen=True)
class Case:
    """A way to train, and whether a layer of it is silent."""

    name: str
    algorithm: ebm.Algorithm = field(default_factory=lambda: ebm.algorithm("predictive-coding"))
    silent: bool = False


CASES = (
    Case("sound", ebm.algorithm("pc-nudge")),
    Case("five_steps", ebm.algorithm("error-pc")),
    Case("diverging", too_long_a_step()),
    Case("dead_layer", silent=True),
)


def train(case: Case, root: Path, epochs: int) -> Path:
    """Trains, and returns the run's directory; a relaxation that runs away ends the run, as it should."""
    L.seed_everything(0, verbose=False)
    module = DigitsClassifier((64, 64))
    if case.silent:
        middle = module.net[2]
        assert isinstance(middle, torch.nn.Linear)
        torch.nn.init.constant_(middle.bias, -20.0)
    logger = CSVLogger(root, name="", version=case.name)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(case.algorithm), max_epochs=epochs, accelerator="cpu", devices=1, logger=logger,
        callbacks=[ebm.GradientAlignment(every_n_steps=5), ebm.RelaxationMonitor(1, regime_every_n_steps=50)],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=5,
    )  # fmt: skip
    try:
        trainer.fit(module, Digits())
        trainer.test(module, Digits(), verbose=False)
    except ebm.RelaxationDivergedError as error:
        print(f"{case.name}: {str(error).partition(';')[0]}")
    return root / case.name


def picture(page: Path) -> None:
    """The page as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium here: no pictures of the reports")
        return
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1050,2900",
            f"--user-data-dir={page.parent / 'browser'}", f"--screenshot={page.with_suffix('.png')}", page.as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    shutil.rmtree(page.parent / "browser", ignore_errors=True)


def main() -> None:
    """Trains all four and writes their reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/four"), help="folder for the runs")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_ebm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for case in CASES:
        shutil.rmtree(options.root / case.name, ignore_errors=True)
        directory = train(case, options.root, options.epochs)
        command(["report", str(directory)])
        picture((directory / "report.html").resolve())


if __name__ == "__main__":
    main()
