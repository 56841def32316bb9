"""Other people's modules, swapped without a change: they learn, and a small nudge gives backprop's direction."""

import sys
from pathlib import Path

import pytest

import lightning_ebm as ebm

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from architectures import run
from zoo import ZOO, losses

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("title", ZOO)
def test_small_nudge_is_backprop_in_float32_and_the_loss_falls(title):
    alignment = ebm.GradientAlignment(every_n_steps=1)
    _, watch = run(ZOO[title], ebm.EBMStrategy("pc-nudge"), [alignment], epochs=4)
    found = alignment.run.compute()
    assert float(found["cosine"]) >= 0.99
    assert float(found["norm_ratio"]) == pytest.approx(1, abs=0.02)
    first, last = losses(watch.loss)
    assert last < first or "GAN" in title  # a game has no loss that must fall


@pytest.mark.slow
@pytest.mark.parametrize(
    "title", ["BatchNorm MLP, metrics in the step", "ResNet, one shared in-place ReLU", "LSTM classifier"]
)
def test_at_a_finite_nudge_the_loss_falls_too(title):
    _, watch = run(ZOO[title], ebm.EBMStrategy("predictive-coding"), [], epochs=4)
    first, last = losses(watch.loss)
    assert last < first


def test_the_demo_with_one_weighted_layer_learns_with_its_output_as_a_state(tmp_path):
    import lightning as L
    from lightning.pytorch.demos.boring_classes import BoringModel

    alignment = ebm.GradientAlignment(every_n_steps=1)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy("pc-nudge", output="state"),
        callbacks=[alignment],
        max_epochs=1,
        limit_train_batches=8,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(BoringModel())
    assert float(alignment.run.compute()["cosine"]) >= 0.99
