"""The certificate of a step: eigenvalues where its update was read, against a dense Hessian of an energy by hand."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm
from lightning_ebm.reports import runs
from lightning_ebm.reports.html import page

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Regressor(L.LightningModule):
    """Two hidden layers and a loss that can be made steep, or concave."""

    def __init__(self, steepness: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.steepness = steepness

    def cost(self, output, y):
        return self.steepness * (output - y).square().sum(1)

    def training_step(self, batch):
        return self.cost(self.net(batch[0]), batch[1]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fitted(module, algorithm, folder, **options):
    monitor = ebm.RelaxationMonitor(1, regime_every_n_steps=None, **options)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(algorithm), accelerator="cpu", max_steps=1,
        logger=CSVLogger(folder, name="", version="run"),
        callbacks=[monitor], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        precision="64-true", log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=3))
    return monitor, trainer


def dense(module, states, strength):
    """d2/dx2 of sum 1/2 |x_l - tanh(W_l x_{l-1} + b_l)|^2 + lambda L, and of lambda L alone, all samples at once."""
    first, _, second, _, last = module.net

    def loss(flat):
        return strength * module.cost(last(flat[15:].reshape(3, 5)), Y).sum()

    def energy(flat):
        one, two = flat[:15].reshape(3, 5), flat[15:].reshape(3, 5)
        errors = (one - torch.tanh(first(X))).square().sum() + (two - torch.tanh(second(one))).square().sum()
        return 0.5 * errors + loss(flat)

    flat = torch.cat([states["net.1"].flatten(), states["net.3"].flatten()])
    return [torch.linalg.eigvalsh(torch.func.hessian(f)(flat).detach()) for f in (energy, loss)]


@pytest.mark.parametrize(("steepness", "strength"), [(1.0, 1.0), (4.0, 0.5), (-0.02, 1.0)])
def test_the_certificate_is_that_of_the_dense_hessian_and_is_logged_and_shown(tmp_path, steepness, strength):
    module = Regressor(steepness)
    settled = ebm.ErrorCoordinates(2000, tol=1e-9)
    algorithm = ebm.algorithm("predictive-coding", nudge=ebm.OneSided(strength), relaxer=settled)
    monitor, trainer = fitted(module, algorithm, tmp_path, curvature_every_n_steps=1)
    learner = ebm.Learner(module.net, algorithm)
    rest = learner.relax(lambda: module.cost(module.net(X), Y).mean(), nudge=strength)
    states = {f"net.{name}": state for name, state in rest.states.items()}
    whole, loss = dense(module, states, strength)
    found = monitor.curvature
    assert found.exact
    assert found.smallest == pytest.approx(float(whole[0]), rel=1e-5)
    assert found.largest == pytest.approx(float(whole[-1]), rel=1e-5)
    assert found.loss == pytest.approx(float(max(loss[0], loss[-1], key=abs)), rel=1e-5)
    assert (found.verdict == "in a minimum") == (float(whole[0]) > 0)
    assert trainer.callback_metrics["ebm/curvature_smallest"] == pytest.approx(found.smallest)
    assert trainer.callback_metrics["ebm/curvature_loss"] == pytest.approx(found.loss)
    run = runs.read(tmp_path / "run")
    assert run.curvatures[0][1]["smallest"] == pytest.approx(found.smallest, rel=1e-4)
    assert f"from {found.smallest:.4g} to {found.largest:.4g}" in page(run)


def test_states_that_have_not_left_a_saddle_are_told_to_be_there(tmp_path):
    """A concave loss that outweighs the errors' energy; the relaxation takes a few steps down and is cut off."""
    module = Regressor(-8.0)
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=1e-3, max_steps=1))
    monitor, _ = fitted(module, algorithm, tmp_path, curvature_every_n_steps=1)
    whole, _ = dense(module, {"net.1": torch.tanh(module.net[0](X)), "net.3": module.net[:4](X)}, 1.0)
    assert float(whole[0]) < 0
    assert monitor.curvature.verdict == "at a saddle"
    assert monitor.curvature.smallest == pytest.approx(float(whole[0]), rel=1e-2)
    assert monitor.curvature.loss < -1


def test_looking_changes_no_update_and_what_has_no_such_states_says_so_once(tmp_path, caplog):
    seen = []
    for options in ({}, {"curvature_every_n_steps": 1}):
        module = Regressor()
        fitted(module, ebm.algorithm("predictive-coding"), tmp_path / str(len(seen)), **options)
        seen.append([p.grad.clone() for p in module.parameters()])
    for without, looked in zip(*seen, strict=True):
        torch.testing.assert_close(without, looked, rtol=0, atol=0)
    monitor, _ = fitted(Regressor(), "dual-propagation", tmp_path / "dual", curvature_every_n_steps=1)
    assert monitor.curvature is None
    assert caplog.text.count("The curvature of update") == 1


@pytest.mark.parametrize("algorithm", ["infinitesimal", "recurrent-backprop"])
def test_where_no_phase_pulls_there_is_no_curvature_and_the_run_goes_on(algorithm, tmp_path, caplog):
    """It ended the run, by an IndexError."""
    monitor, trainer = fitted(Regressor(), algorithm, tmp_path, curvature_every_n_steps=1)
    assert trainer.state.finished
    assert monitor.curvature is None
    assert caplog.text.count("is not defined: no phase of it ends at real states") == 1
