"""Train an ordinary LightningModule on handwritten digits without backpropagation, and see how close it comes.

    python recipes/digits.py
    python recipes/digits.py --algorithm pc-nudge --epochs 20 --wandb_mode online

About 15 seconds on one CPU core: the module under the stock Trainer, then under an energy, with the same seed.
"""

import os
import warnings
from pathlib import Path
from typing import Literal

import lightning as L
import torch
import wandb
from digits_classifier import Digits, DigitsClassifier
from jsonargparse import auto_cli
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

import lightning_ebm as ebm


def main(
    algorithm: str = "predictive-coding",
    epochs: int = 20,
    hidden: tuple[int, ...] = (128,),
    lr: float = 2e-3,
    seed: int = 0,
    accelerator: str = "auto",
    wandb_mode: Literal["offline", "online"] = "offline",
    root: Path = Path("runs"),
) -> None:
    """Trains the same module twice and compares.

    Args:
        algorithm: a preset of lightning_ebm: predictive-coding, pc-nudge, zero-divergence, error-pc or backprop.
        epochs: passes over the 1437 training images.
        hidden: units of each hidden layer.
        lr: learning rate of Adam, the same for both.
        seed: of the initial weights and of the order of the batches, the same for both.
        accelerator: as Lightning names it: auto, cpu, gpu.
        wandb_mode: offline keeps the run on this disk.
        root: folder for the run's files.
    """
    torch.set_num_threads(1)  # matrices this small are slower on several
    warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
    os.environ.setdefault("WANDB_SILENT", "true")
    root.mkdir(parents=True, exist_ok=True)
    console = Console()

    def fit(trainer: L.Trainer) -> tuple[DigitsClassifier, float]:
        L.seed_everything(seed, verbose=False)
        module = DigitsClassifier(hidden, lr)
        trainer.fit(module, Digits())
        result = trainer.test(module, Digits(), verbose=False)
        return module, 100 * result[0]["test/accuracy"]

    console.rule("stock Trainer: backprop")
    stock = L.Trainer(
        max_epochs=epochs, accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False,
        default_root_dir=root,
    )  # fmt: skip
    _, stock_accuracy = fit(stock)

    console.rule(f"the same module: {algorithm}")
    logger = WandbLogger(project="digits", name=algorithm, save_dir=root, offline=wandb_mode == "offline")
    alignment = ebm.GradientAlignment(every_n_steps=10)
    energy = L.Trainer(
        strategy=ebm.EBMStrategy(algorithm),  # <- the one line that replaces backprop
        max_epochs=epochs, accelerator=accelerator, devices=1, default_root_dir=root, log_every_n_steps=10,
        logger=logger, callbacks=[alignment],
    )  # fmt: skip
    module, accuracy = fit(energy)
    run_dir = Path(logger.experiment.dir).parent
    wandb.teardown()  # finish() alone may return before the file is complete

    table = Table(
        "",
        "stock Trainer",
        algorithm,
        title="Digits",
        caption="cosines to the true gradient, over the whole run as one vector each",
    )
    table.add_row("test accuracy", f"{stock_accuracy:.2f} %", f"{accuracy:.2f} %")
    compared = alignment.run.compute()
    table.add_row("cosine of all updates together", "1", f"{compared['cosine']:.4f}", end_section=True)
    for name, _ in module.named_parameters():
        table.add_row(name, "1", f"{compared['cosine/' + name.replace('.', '/')]:.4f}")
    console.print("", table)
    console.print("\nThe line that makes the difference:")
    console.print(f'    trainer = L.Trainer(strategy=ebm.EBMStrategy("{algorithm}"))', highlight=False)
    console.print(f"\nThe run is in [bold]{run_dir}[/bold]", soft_wrap=True)
    console.print(f"  look at it here:   wandb leet run {run_dir}", soft_wrap=True, highlight=False)
    console.print(f"  or as a page:      lightning-ebm report {run_dir}", soft_wrap=True, highlight=False)
    console.print(f"  or on a server:    wandb sync {run_dir}", soft_wrap=True, highlight=False)
    console.print(
        "In a checkout these commands are in its own environment: bash scripts/with-venv COMMAND", highlight=False
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
