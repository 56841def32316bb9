"""What modules keep of their steps: the graphs behind it are let go of, as backprop lets go of them."""

import gc
import weakref

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_ebm as ebm


class Packed:
    """What autograd saves of a pass."""

    def __init__(self, tensor):
        self.tensor = tensor


KEPT = {
    "losses": lambda module, loss, o: module.kept.append(loss),
    "outputs in a mapping": lambda module, loss, o: module.kept.append({"o": o * 1.0, "loss": loss}),
    "a running total": lambda module, loss, o: setattr(module, "total", module.total + loss),
    "what is computed of outputs": lambda module, loss, o: module.kept.append(o.detach().mean() + loss.exp()),
}


class Keeps(L.LightningModule):
    """Keeps something of every step for the end of the epoch, with its graph, as many modules do."""

    way = "losses"

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.kept, self.total, self.saved, self.alive = [], 0.0, [], []

    def pack(self, tensor):
        self.alive.append(weakref.ref(packed := Packed(tensor)))
        return packed

    def count(self):
        self.alive = [ref for ref in self.alive if ref() is not None]
        return len(self.alive)

    def training_step(self, batch, index):
        before = self.count()
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda packed: packed.tensor):
            o = self.net(batch[0])
        self.saved.append((before, self.count() - before))
        loss = F.cross_entropy(o, batch[1])
        KEPT[self.way](self, loss, o)
        self.log("total", torch.as_tensor(self.total))
        return loss

    def on_train_epoch_end(self):
        losses = [kept["loss"] if isinstance(kept, dict) else kept for kept in self.kept]
        self.log("epoch", torch.stack(losses).mean() if losses else self.total)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.crossed(2)
@pytest.mark.parametrize("way", KEPT)
@pytest.mark.parametrize("preset", ["zero-divergence", "predictive-coding", "equilibrium-propagation"])
def test_what_a_module_keeps_of_its_steps_does_not_hold_their_graphs(way, preset):
    """Backprop frees them as it goes back: a loss kept for the end of the epoch is a number then, and so it is here."""

    def fitted(strategy):
        torch.manual_seed(0)
        gc.collect()
        module = type("Kept", (Keeps,), {"way": way})()
        x, y = torch.randn(8, 6, 4, dtype=torch.double), torch.randint(2, (8, 6))
        trainer = L.Trainer(
            max_epochs=1, strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(list(zip(x, y, strict=True)), batch_size=None))
        return module, trainer.callback_metrics

    stock, wanted = fitted("auto")
    assert all(before == 0 for before, _ in stock.saved)
    ours, found = fitted(ebm.EBMStrategy(preset))
    at_once = max(saved for _, saved in ours.saved)
    assert all(before <= 2 * at_once for before, _ in ours.saved)  # of the pass before, and where it runs twice
    if preset == "zero-divergence":
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0.0)


def test_what_the_loss_has_no_part_in_keeps_its_graph():
    """Backprop would not have gone through it: to compute with it in another step is refused."""
    net, other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), nn.Linear(4, 2)
    x, y, kept = torch.randn(6, 4), torch.randint(2, (6,)), []
    learner = ebm.Learner(nn.ModuleList([net, other]), "zero-divergence")

    def step():
        before = kept[-1] if kept else 0.0
        kept.append(other(x))
        return F.cross_entropy(net(x) + before, y)

    learner.backward(step)
    with pytest.raises(ebm.UnsupportedModuleError, match="before it began"):
        learner.backward(step)
    assert kept[0].requires_grad
