"""What a step computes from the batch alone is the batch: it may be done in another way in every step.

The oracle is autograd's gradient of that very step, and how often layers were looked for: once.
"""

import random
from collections.abc import Callable

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm
from lightning_ebm.program import programs

STEPS = 8
X = torch.randn(STEPS, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Sigmoid()
        self.table = nn.Buffer(torch.randn(STEPS, 6))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


def indexed(net: Net, x: Tensor, step: int) -> Tensor:
    return X[step][:, :6] * net.table[step]


def cropped(net: Net, x: Tensor, step: int) -> Tensor:
    start = random.Random(step).randint(0, 3)
    return x[:, start : start + 6]


def rolled_or_flipped(net: Net, x: Tensor, step: int) -> Tensor:
    return x[:, :6].flip(1) if random.Random(step).random() < 0.5 else x[:, :6].roll(step, 1)


def as_often_as_it_says(net: Net, x: Tensor, step: int) -> Tensor:
    for _ in range(step):
        x = x.sin() + 0.1
    return x[:, :6]


def written_in_place(net: Net, x: Tensor, step: int) -> Tensor:
    x = x[:, :6].clone()
    x[:, step % 6] = 0.0
    x[1 : 1 + step % 3].mul_(-1)
    return x


def by_numpy(net: Net, x: Tensor, step: int) -> Tensor:
    return torch.from_numpy(np.roll(x[:, :6].numpy(), step)).clone()


def by_a_sparse_matrix(net: Net, x: Tensor, step: int) -> Tensor:
    kept = torch.eye(9, dtype=x.dtype)[:, step % 4 : step % 4 + 6].to_sparse()
    return torch.sparse.mm(kept.t(), x.t()).t()


def by_a_decomposition(net: Net, x: Tensor, step: int) -> Tensor:
    return torch.linalg.svd(x[:, :6] * (1 + step), full_matrices=False)[2][:5] + step


def without_gradients(net: Net, x: Tensor, step: int) -> Tensor:
    with torch.no_grad():
        return x.roll(step, 0)[:, :6]


WAYS = [
    indexed, cropped, rolled_or_flipped, as_often_as_it_says, written_in_place, by_numpy, by_a_sparse_matrix,
    by_a_decomposition, without_gradients,
]  # fmt: skip
Way = Callable[[Net, Tensor, int], Tensor]


def targets(step: int) -> Tensor:
    return F.one_hot((torch.arange(5) + step) % 3, 3).double().roll(step, 0)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a new program was compared with autograd."""
    found: list[int] = []
    check = programs.check_against_autograd
    monkeypatch.setattr(programs, "check_against_autograd", lambda *args: found.append(1) or check(*args))
    return found


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_another_way_each_time_is_no_other_program(way: Way, capture: bool, looked: list[int]) -> None:
    net = Net()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for step in range(STEPS):

        def loss(step: int = step) -> Tensor:
            return F.cross_entropy(net(way(net, X[step], step)), targets(step))

        found, expected = learner.gradients(loss), torch.autograd.grad(loss(), list(net.parameters()))
        for (name, _), wanted in zip(net.named_parameters(), expected, strict=True):
            assert torch.allclose(found[name], wanted, rtol=0, atol=1e-13), (name, step)
    assert len(looked) == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_at_an_equilibrium_it_is_what_comes_of_the_same_batch_made_before(way: Way, looked: list[int]) -> None:
    net, settled = Net(), ebm.AcceleratedFixedPoint(200, tol=1e-13)
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=settled)
    inside, before = ebm.Learner(net, algorithm), ebm.Learner(net, algorithm)
    for step in range(STEPS):
        x, y = way(net, X[step], step), targets(step)
        wanted = before.gradients(lambda x=x, y=y: F.cross_entropy(net(x), y))
        found = inside.gradients(lambda step=step: F.cross_entropy(net(way(net, X[step], step)), targets(step)))
        for name, slope in wanted.items():
            assert torch.allclose(found[name], slope, rtol=0, atol=1e-11), (name, step)
    assert len(looked) == 2


CHANGING: list[Callable[[Net, int], Tensor]] = [
    lambda net, call: net(X[call % 2][:, :6]),
    lambda net, call: net(X[0][:, call : call + 6]),
    lambda net, call: net(X[0][:, :6].roll(call, 0)),
    lambda net, call: net(X[0][:, :6].cos() if call % 2 else X[0][:, :6].sin()),
]


@pytest.mark.parametrize("run", CHANGING)
def test_two_runs_of_one_step_that_are_given_other_numbers_are_refused(run: Callable[[Net, int], Tensor]) -> None:
    net, calls = Net(), iter(range(100))
    with pytest.raises(ebm.UnsupportedModuleError, match="differ in what they were given"):
        ebm.Learner(net, "equilibrium-propagation").backward(lambda: F.cross_entropy(run(net, next(calls)), targets(0)))


# What a layer gives may be written into memory that was the batch's alone.


def beside_another_part(h: Tensor, x: Tensor, step: int) -> Tensor:
    out = x.clone()
    part, other = out[:, step % 2 :][:, :4], out[:, 3:]
    part.mul_(h[:, :4])
    return out + other.sum(1, keepdim=True)


def read_before_and_after(h: Tensor, x: Tensor, step: int) -> Tensor:
    out = x * 2
    turned = out.t()
    before = out[:2].sum() * h[0, 0]
    turned[1 : 4 + step % 2].add_(h.t()[1 : 4 + step % 2])
    return out.square() + before + turned.t()[:, :1]


def row_by_row(h: Tensor, x: Tensor, step: int) -> Tensor:
    out = torch.zeros_like(x)
    for row in range(5):
        out[row] = h[(row + step) % 5] * x[row]
    return out


def into_a_drawn_one(h: Tensor, x: Tensor, step: int) -> Tensor:
    noise = torch.randn(5, 6, dtype=x.dtype, generator=torch.Generator().manual_seed(step))
    halves = noise.view(5, 2, 3)
    halves[:, step % 2] *= h[:, :3]
    return noise + halves.reshape(5, 6)


def filled_by_a_mask(h: Tensor, x: Tensor, step: int) -> Tensor:
    out = x.clone()
    view = out.view(30)
    view[:12] = h.reshape(30)[step : step + 12]
    return torch.where(x > 0, out, view.reshape(5, 6) * h)


def beside_a_detached_name(h: Tensor, x: Tensor, step: int) -> Tensor:
    out = x.clone()
    name = out.detach()[:, 1:]
    out[:, : 3 + step % 2].mul_(h[:, : 3 + step % 2])
    return out + F.pad(name, (1, 0))


WRITES = [
    beside_another_part, read_before_and_after, row_by_row, into_a_drawn_one, filled_by_a_mask, beside_a_detached_name,
]  # fmt: skip


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_what_is_written_into_the_batchs_memory_is_computed(
    write: Callable[[Tensor, Tensor, int], Tensor], capture: bool
) -> None:
    net = Net()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    weak = ebm.Learner(net, ebm.algorithm("pc-nudge", nudge=ebm.Centered(1e-4)), capture=capture)
    for step in range(STEPS):

        def loss(step: int = step) -> Tensor:
            x = X[step][:, :6]
            h = net.act(net.a(x))
            return F.cross_entropy(net.c(net.act(net.b(write(h, x, step)))), targets(step))

        expected = torch.autograd.grad(loss(), list(net.parameters()))
        for one, room in ((learner, 1e-13), (weak, 1e-5)):
            found = one.gradients(loss)
            for (name, _), wanted in zip(net.named_parameters(), expected, strict=True):
                assert torch.allclose(found[name], wanted, rtol=0, atol=room), (name, step)


Samples = tuple[Tensor, Tensor]


class Prepared(L.LightningModule):
    """Time comes first in its layers, and the samples do in the batch that it is given."""

    def __init__(self, prepare: Callable[[Tensor, Tensor], Samples]) -> None:
        super().__init__()
        self.net, self.prepare = Net(), prepare

    def training_step(self, batch: Samples) -> Tensor:
        x, y = self.prepare(*batch)
        return F.cross_entropy(self.net(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def time_first(x: Tensor, y: Tensor) -> Samples:
    return (x.double() / 255).transpose(0, 1).contiguous(), y.t().clone()


@pytest.mark.parametrize("prepare", [time_first, torch.no_grad()(time_first)], ids=["plain", "without gradients"])
def test_the_batch_counts_its_samples_however_it_is_prepared(prepare: Callable[[Tensor, Tensor], Samples]) -> None:
    draws = torch.Generator().manual_seed(3)
    x, y = torch.randint(255, (8, 4, 6), generator=draws), torch.randint(3, (8, 4), generator=draws)
    strategy = ebm.EBMStrategy("predictive-coding")
    trainer = L.Trainer(
        max_steps=2, strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Prepared(prepare), DataLoader(TensorDataset(x, y), 8))
    assert len(strategy.learner.report["phases"][-1]["residual"]) == 8
