"""The main job: an ordinary module on real digits, five seeds, against the same module under the stock Trainer."""

import statistics
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

import lightning_ebm as ebm

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from digits_classifier import Digits, DigitsClassifier

pytestmark = pytest.mark.filterwarnings("ignore")
SEEDS = range(5)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Cosines(L.Callback):
    """Every logged cosine, per parameter."""

    def __init__(self):
        self.values: dict[str, list[float]] = {}

    def on_after_backward(self, trainer, module):
        for name, value in trainer.callback_metrics.items():
            if name.startswith("alignment/cosine/"):
                self.values.setdefault(name, []).append(float(value))


def accuracy(strategy, seed, callbacks=()):
    L.seed_everything(seed, verbose=False)
    module = DigitsClassifier()
    trainer = L.Trainer(
        max_epochs=20, strategy=strategy, accelerator="cpu", devices=1, callbacks=list(callbacks), **QUIET
    )
    trainer.fit(module, Digits())
    return 100 * trainer.test(module, Digits(), verbose=False)[0]["test/accuracy"]


@pytest.fixture(scope="module")
def stock():
    return [accuracy("auto", seed) for seed in SEEDS]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["predictive-coding", "pc-nudge"])
def test_accuracy_is_within_seven_tenths_of_stock(stock, algorithm):
    found = [accuracy(ebm.EBMStrategy(algorithm), seed) for seed in SEEDS]
    assert abs(statistics.mean(found) - statistics.mean(stock)) <= 0.7
    assert min(found) > 94


@pytest.mark.slow
def test_the_small_nudge_keeps_the_true_direction_in_every_layer_over_the_whole_run():
    cosines = Cosines()
    accuracy(ebm.EBMStrategy("pc-nudge"), 0, [ebm.GradientAlignment(every_n_steps=5), cosines])
    assert sorted(cosines.values) == sorted(
        f"alignment/cosine/net/{i}/{kind}" for i in (0, 2) for kind in ("weight", "bias")
    )
    for name, values in cosines.values.items():
        assert len(values) > 80, name
        assert statistics.median(values) >= 0.99, name


def test_the_module_knows_nothing_of_this_library():
    text = (Path(__file__).parents[1] / "recipes" / "digits_classifier.py").read_text()
    assert "ebm" not in text
    assert torch.load  # the module below is an ordinary one: its checkpoint keys are those of its layers
    assert list(DigitsClassifier().state_dict()) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
