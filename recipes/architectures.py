"""Which layers each architecture gets, how faithful its updates are, and what a step costs against backprop.

    python recipes/architectures.py > docs/architectures.md

Two minutes on one CPU core. Times are process CPU time of whole training steps, medians, in one run.
"""

import logging
import platform
import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch
from zoo import ZOO, losses

import lightning_ebm as ebm


class Watch(L.Callback):
    """Loss and CPU time of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.loss: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.process_time() - self.start)
        self.loss.append(float(outputs["loss"] if outputs else trainer.callback_metrics["loss"]))


def run(make: Any, strategy: Any, callbacks: list[L.Callback], epochs: int) -> tuple[L.Trainer, Watch]:
    """Trains for a few epochs of eight steps."""
    L.seed_everything(0, verbose=False)
    watch = Watch()
    trainer = L.Trainer(
        strategy=strategy, max_epochs=epochs, accelerator="cpu", devices=1, callbacks=[watch, *callbacks], logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(make())
    return trainer, watch


def main(epochs: int = 5) -> None:
    """Prints the page as Markdown."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_ebm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("---\nhide: [toc] # room for eight columns\n---\n\n# Architectures\n")
    print('Modules of `recipes/zoo.py`, written without this library in mind. Under "pc-nudge": the cosine of its')
    print("update to backprop's over the run, float32, and the loss of the first and the last five steps. Cost of a")
    print("training step in steps of the stock Trainer (process CPU time, medians). These modules are tiny, so the")
    print("figures are mostly Python's; made by `python recipes/architectures.py`,")
    print(f"torch {torch.__version__}, one thread, {platform.processor() or platform.machine()}.\n")
    print(
        'The last column is the loss under "predictive-coding", lambda = 1, at the same learning rate: where it rises,'
    )
    print("that nudge is too strong for states as wide as these, and `nudge=ebm.OneSided(0.1)` is the remedy.\n")
    print("| module | layers | cosine | loss | zero-divergence | pc-nudge | predictive-coding | its loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for title, make in ZOO.items():
        _, stock = run(make, "auto", [], epochs)
        unit = statistics.median(stock.seconds)
        alignment = ebm.GradientAlignment(every_n_steps=1)
        _, nudged = run(make, ebm.EBMStrategy("pc-nudge"), [alignment], epochs)
        cosine = float(alignment.run.compute()["cosine"])
        costs, layers = [], ""
        for algorithm in ("zero-divergence", "pc-nudge", "predictive-coding"):
            trainer, watch = run(make, ebm.EBMStrategy(algorithm), [], epochs)
            costs.append(f"{statistics.median(watch.seconds[2:]) / unit:.1f}")
            assert isinstance(trainer.strategy, ebm.EBMStrategy)
            layers = ", ".join(f"`{name}`" for name in trainer.strategy.learner.report["layers"])
        first, last = losses(nudged.loss)
        finite = tuple(losses(watch.loss))
        cells = [
            title,
            layers,
            f"{cosine:.4f}",
            f"{first:.3f} to {last:.3f}",
            *costs,
            f"{finite[0]:.3f} to {finite[1]:.3f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
