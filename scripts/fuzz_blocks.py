"""Layers of random programs, see `fuzz_programs.py`: how each computes hangs on its kind and on flags of the step."""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 4


class Scaled(torch.autograd.Function):
    """x times a number, with a backward of its own: half the slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        ctx.save_for_backward(x)
        return x * by

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradients[0] * ctx.by * (0.5 + 0.1 * torch.tanh(x)), None


class Block(nn.Module):
    """One layer of a program: how it computes hangs on its kind and on flags that may change between steps."""

    exact = True
    """Whether its code may be run again at other states to get what the record gives."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.act: nn.Module = rng.choice([nn.Tanh, nn.GELU, nn.Softplus, nn.SiLU, nn.Sigmoid])()

    def forward(self, h: Tensor, net: Any) -> Tensor:
        return self.act(self.linear(h))  # type: ignore[no-any-return]


class Inplace(Block):
    def forward(self, h: Tensor, net: Any) -> Tensor:
        h = self.linear(h)
        if net.flag("leaky"):
            return F.leaky_relu_(h, 0.1)
        return h.tanh_() if net.flag("other") else h.sigmoid_()


class Sliced(Block):
    """Writes into views, and reads what shares their memory."""

    def forward(self, h: Tensor, net: Any) -> Tensor:
        h = self.linear(h).clone()
        part = h[..., : WIDTH // 2]
        if net.flag("order"):
            part.mul_(2.0)
            h[..., 1:].add_(part[..., :1])
        else:
            h[..., 0] = h[..., 1] * 0.5
            part.add_(0.1)
        if net.flag("transposed"):
            h.transpose(0, -1).mul_(1.5)
        return self.act(h) + part.sum(-1, keepdim=True)  # type: ignore[no-any-return]


class Residual(Block):
    def forward(self, h: Tensor, net: Any) -> Tensor:
        out = h + self.act(self.linear(h)) * net.number
        if net.flag("again"):
            out = out + self.act(self.linear(out))
        return out  # type: ignore[no-any-return]


class Normed(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor, net: Any) -> Tensor:
        return self.act(self.norm(self.linear(h)) if net.flag("norm") else self.linear(h))  # type: ignore[no-any-return]


class BatchNormed(Block):
    exact = False  # a second run would move the statistics

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.norm = nn.BatchNorm1d(WIDTH, momentum=rng.choice([0.1, None]))

    def forward(self, h: Tensor, net: Any) -> Tensor:
        return self.act(self.norm(self.linear(h).flatten(0, -2)).view_as(h))  # type: ignore[no-any-return]


class Dropped(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.drop = rng.choice([nn.Dropout(0.3), nn.Dropout(0.3, inplace=True), nn.AlphaDropout(0.2)])

    def forward(self, h: Tensor, net: Any) -> Tensor:
        return self.act(self.drop(self.linear(h)))  # type: ignore[no-any-return]


class Noisy(Block):
    def forward(self, h: Tensor, net: Any) -> Tensor:
        noise = torch.randn_like(h) if net.flag("noise") else torch.rand(h.shape, dtype=h.dtype)
        return self.act(self.linear(h) + 0.1 * noise)  # type: ignore[no-any-return]


class Masked(Block):
    """Picks by a mask of the batch, of another count at every step."""

    def forward(self, h: Tensor, net: Any) -> Tensor:
        mask = net.mask
        a = self.act(self.linear(h))
        if net.flag("put"):
            out = torch.zeros_like(a)
            out[mask] = a[mask] * 2
            return out + 0.5 * h
        if net.flag("fill"):
            return a.masked_fill(mask.view(-1, *[1] * (a.ndim - 1)), 0.3)  # type: ignore[no-any-return]
        return a + a[mask].mean()  # type: ignore[no-any-return]


class MaskedByValue(Block):
    """Picks by a mask of what it computes: how many, and which, belongs to the recorded pass."""

    exact = False

    def forward(self, h: Tensor, net: Any) -> Tensor:
        a = self.act(self.linear(h))
        if net.flag("cut"):
            return a + a[a > 0.1].sum() * 0.1  # type: ignore[no-any-return]
        if net.flag("branch"):
            return a * 2 if float(a.detach().sum()) > 0.5 else a - 0.1 * h
        return torch.where(a > 0.1, a, 0.5 * h)


class Detached(Block):
    exact = False

    def forward(self, h: Tensor, net: Any) -> Tensor:
        a = self.act(self.linear(h))
        if net.flag("through"):
            return h + (a.round() - h).detach() + 0.5 * a  # type: ignore[no-any-return]
        with torch.no_grad():
            gate = torch.sigmoid(a) if net.flag("quiet") else a.mean()
        return a * gate + a.detach() * 0.1  # type: ignore[no-any-return]


class Hooked(Block):
    exact = False  # what a hook makes of a gradient is no slope of any energy

    def forward(self, h: Tensor, net: Any) -> Tensor:
        a = self.act(self.linear(h))
        if net.flag("hook"):
            by = net.number
            a.register_hook(lambda g: g * by)
        return a * 1.5  # type: ignore[no-any-return]


class Custom(Block):
    def forward(self, h: Tensor, net: Any) -> Tensor:
        a = self.act(self.linear(h))
        return Scaled.apply(a, net.number) if net.flag("custom") else a * 0.7  # type: ignore[no-any-return, no-untyped-call]


class Checkpointed(Block):
    def forward(self, h: Tensor, net: Any) -> Tensor:
        run = lambda h: self.act(self.linear(h))  # noqa: E731
        return checkpoint(run, h, use_reentrant=False) if net.flag("checkpoint") else run(h)  # type: ignore[no-any-return]


class Recurrent(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.cell = rng.choice([nn.GRUCell, nn.RNNCell])(WIDTH, WIDTH)

    def forward(self, h: Tensor, net: Any) -> Tensor:
        flat = h.reshape(-1, WIDTH)
        s = torch.zeros_like(flat)
        for _ in range(3 if net.flag("longer") else 2):
            s = self.cell(flat, s)
        return s.view_as(h)


class Lstm(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.lstm = rng.choice([nn.LSTM, nn.GRU])(WIDTH, WIDTH, batch_first=True)

    def forward(self, h: Tensor, net: Any) -> Tensor:
        out: Tensor = self.lstm(h if h.ndim == 3 else h[:, None])[0]
        return out.view_as(h)


class Attention(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, h: Tensor, net: Any) -> Tensor:
        q = h if h.ndim == 3 else h[:, None]
        out: Tensor = self.attention(q, q, q, need_weights=net.flag("weights"))[0]
        return out.view_as(h) + h


class Convolved(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, h: Tensor, net: Any) -> Tensor:
        x = h.reshape(-1, 1, WIDTH)
        x = self.conv(x)
        if net.flag("pool"):
            x = F.avg_pool1d(x, 3, 1, 1)
        return self.act(self.linear(x.reshape(h.shape)))  # type: ignore[no-any-return]


class Embedded(Block):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.embedding = nn.Embedding(5, WIDTH, padding_idx=rng.choice([None, 0]))

    def forward(self, h: Tensor, net: Any) -> Tensor:
        e = self.embedding(net.index)
        e = e if h.ndim == 2 else e[:, None]
        return self.act(self.linear(h) + e) if net.flag("add") else self.act(self.linear(h) * e)  # type: ignore[no-any-return]


class Graph(Block):
    """Sends messages along edges of the batch."""

    def forward(self, h: Tensor, net: Any) -> Tensor:
        source, target = net.edges
        message = self.linear(h)[source]
        if net.flag("scatter"):
            index = target.view(-1, *[1] * (h.ndim - 1)).expand_as(message)
            out = torch.zeros_like(h).scatter_add(0, index, message)
        else:
            out = torch.zeros_like(h).index_add_(0, target, message)
        return self.act(out) + 0.3 * h  # type: ignore[no-any-return]


class Split(Block):
    def forward(self, h: Tensor, net: Any) -> Tensor:
        a = self.linear(h)
        left, right = a.chunk(2, -1) if net.flag("chunk") else a.split([WIDTH // 2, WIDTH // 2], -1)
        if net.flag("write"):
            left = left.clone()
            left += right
        out = torch.cat([left * torch.sigmoid(right), self.act(right)], -1)
        return out.flip(-1) if net.flag("flip") else torch.einsum("...i,...i->...i", out, h)


class Functional(Block):
    """Weights computed from weights."""

    def forward(self, h: Tensor, net: Any) -> Tensor:
        w = self.linear.weight
        if net.flag("normal"):
            w = w / w.norm(dim=1, keepdim=True)
        if net.flag("call"):
            given = {"weight": w * net.number, "bias": self.linear.bias}
            return self.act(torch.func.functional_call(self.linear, given, (h,)))  # type: ignore[no-any-return]
        return self.act(F.linear(h, w, self.linear.bias))  # type: ignore[no-any-return]


class Tied(Block):
    def forward(self, h: Tensor, net: Any) -> Tensor:
        first = net.blocks[0].linear
        return self.act(F.linear(self.act(self.linear(h)), first.weight.t() if net.flag("transpose") else first.weight))  # type: ignore[no-any-return, operator, arg-type, union-attr]


class Remembering(Block):
    """A buffer, and a plain tensor, that every step writes to."""

    exact = False

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.kept: dict[str, Any] = {}

    def forward(self, h: Tensor, net: Any) -> Tensor:
        a = self.act(self.linear(h))
        if net.flag("mean"):
            self.mean.mul_(0.9).add_(0.1 * a.detach().reshape(-1, WIDTH).mean(0))
        bank = self.kept.get("bank", torch.zeros_like(self.mean)) * 0.5 + a.detach().reshape(-1, WIDTH).amax(0)
        self.kept["bank"] = bank
        return a - self.mean + 0.1 * bank  # type: ignore[no-any-return]


class Views(Block):
    """Reads one memory through many shapes, before and after it is written to."""

    def forward(self, h: Tensor, net: Any) -> Tensor:
        a = self.linear(h)
        flat = a.view(-1)
        before = flat[:WIDTH].clone()
        if net.flag("flat"):
            flat.mul_(net.number)
        elif net.flag("diagonal"):
            a.reshape(-1, WIDTH)[0].unsqueeze(0).add_(0.5)
        a.unsqueeze(0).squeeze(0).add_(0.05)
        return self.act(flat.view_as(h)) + before + a.select(-1, 0).unsqueeze(-1)  # type: ignore[no-any-return]


KINDS: list[type[Block]] = [
    Block, Inplace, Sliced, Residual, Normed, BatchNormed, Dropped, Noisy, Masked, MaskedByValue, Detached, Hooked,
    Custom, Checkpointed, Recurrent, Lstm, Attention, Convolved, Embedded, Graph, Split, Functional, Tied, Remembering,
    Views,
]  # fmt: skip
