"""torch's fast path of Transformers in evaluation: what a step that leans on it is told, and what it is told to do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(6, 5, 8, generator=GENERATOR)
Y = torch.randint(3, (6,), generator=GENERATOR)
PADDING = torch.arange(5)[None] >= torch.tensor([5, 3, 2, 5, 4, 1])[:, None]


class Distilled(nn.Module):
    """A student beside a frozen teacher, whose outputs are averaged, padding and all."""

    def __init__(self, masks):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.teacher = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
        self.student = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.masks = masks

    def loss(self):
        with torch.no_grad():
            target = self.teacher(X, src_key_padding_mask=PADDING)
        if self.masks:
            target = target.masked_fill(PADDING[..., None], 0)
        return F.mse_loss(self.student(X).mean(1), target.mean(1))


@pytest.mark.parametrize("masks", [False, True])
def test_what_is_padded_is_zero_on_the_fast_path_alone_and_this_is_said_once(masks, caplog):
    module = Distilled(masks)
    wanted = torch.autograd.grad(module.loss(), list(module.student.parameters()))
    learner = ebm.Learner(module, "zero-divergence")
    for _ in range(3):
        found = learner.gradients(module.loss)
    far = max(float((a - b).norm() / b.norm()) for a, b in zip(found.values(), wanted, strict=True))
    assert far < 1e-4 if masks else far > 1e-2  # the fast path rounds otherwise
    told = [record.getMessage() for record in caplog.records if "fast path" in record.getMessage()]
    assert len(told) == 1
    assert "'teacher'" in told[0]
    assert "masked_fill" in told[0]


def test_nothing_is_said_where_torch_would_not_take_it(caplog):
    module = Distilled(True)
    module.teacher.train()
    ebm.Learner(module, "zero-divergence").gradients(module.loss)
    assert "fast path" not in caplog.text
