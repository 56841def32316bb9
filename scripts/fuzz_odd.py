"""Layers that do what few people do, in many ways, see `fuzz_ways.py`."""

import random
from typing import Any

import numpy
import torch
from fuzz_blocks import WIDTH
from fuzz_uses import Talkative
from fuzz_ways import Ways
from torch import Tensor, nn
from torch.nn import functional as F


class Switched(Ways):
    """Gradients that are switched on and off, of parameters and of tensors; leaves that are no parameters."""

    inexact = frozenset({"by_detaching_itself", "by_frozen_for_a_call", "by_bias_after", "by_bias_data_after"})

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.inner.weight
        self.flat = nn.Parameter(torch.linspace(-1, 1, WIDTH * WIDTH + WIDTH))
        self.limited = nn.Embedding(5, WIDTH, max_norm=1.0)
        self.shared = nn.Sequential(self.inner, nn.Tanh(), self.inner)

    def by_frozen_for_a_call(self, a: Tensor, net: Any) -> Tensor:
        before = [p.requires_grad for p in self.inner.parameters()]
        self.inner.requires_grad_(False)
        b = self.inner(a)
        for p, was in zip(self.inner.parameters(), before, strict=True):
            p.requires_grad_(was)
        return b + 0.5 * self.inner(a * a)

    def by_frozen_at_times(self, a: Tensor, net: Any) -> Tensor:
        before = [p.requires_grad for p in self.inner.parameters()]
        self.inner.requires_grad_(net.k % 2 == 1 and before[0])
        b = self.inner(a)
        for p, was in zip(self.inner.parameters(), before, strict=True):
            p.requires_grad_(was)
        return b + a

    def by_detaching_itself(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a) * 1.0
        b.detach_()
        return a + b

    def by_leaf_after_reading(self, a: Tensor, net: Any) -> Tensor:
        c = torch.ones_like(a)
        b = a * c
        c.requires_grad_()
        (g,) = torch.autograd.grad((c * c).sum(), c)
        return b + c * g

    def by_loose_leaves(self, a: Tensor, net: Any) -> Tensor:
        if "leaves" not in self.kept:
            self.kept["leaves"] = [torch.full((WIDTH,), 0.5 + k, dtype=a.dtype).requires_grad_() for k in range(2)]
        leaf = self.kept["leaves"][net.k % 2]
        return a * leaf

    def by_tied(self, a: Tensor, net: Any) -> Tensor:
        return self.tied(self.act(self.inner(a)))

    def by_flat_weights(self, a: Tensor, net: Any) -> Tensor:
        w, b = self.flat.split([WIDTH * WIDTH, WIDTH])
        return F.linear(a, w.view(WIDTH, WIDTH), b)

    def by_limited_embedding(self, a: Tensor, net: Any) -> Tensor:
        e = self.limited(net.index)
        return a + (e if a.ndim == 2 else e[:, None])

    def by_shared(self, a: Tensor, net: Any) -> Tensor:
        return self.shared(a)

    def by_bias_after(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a) + a
        net.once(lambda: self.add_to(self.inner.bias))
        return b

    def by_bias_data_after(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a) + a
        net.once(lambda: self.inner.bias.data.add_(0.01))
        return b

    def add_to(self, p: Tensor) -> None:
        with torch.no_grad():
            p.add_(0.01)

    def by_buffer_after(self, a: Tensor, net: Any) -> Tensor:
        b = a - net.once(lambda: self.mean)
        net.once(lambda: self.mean.add_(0.1 * a.detach().reshape(-1, WIDTH).mean(0)))
        return b

    def by_view_of_buffer_after(self, a: Tensor, net: Any) -> Tensor:
        b = a + net.once(lambda: self.bank[0])
        net.once(lambda: self.bank[:2].add_(0.1))
        return b + net.once(lambda: self.bank.sum(0)) * 0.1

    def by_buffer_given_other_memory(self, a: Tensor, net: Any) -> Tensor:
        b = a - net.once(lambda: self.mean)

        def move() -> None:
            self.mean.data = self.mean.data + 0.1

        net.once(move)
        return b + net.once(lambda: self.mean)

    def by_own_memory_of_before(self, a: Tensor, net: Any) -> Tensor:
        before = net.once(lambda: self.kept["was"].mul_(0.5) if "was" in self.kept else torch.zeros_like(self.mean))
        net.once(lambda: self.kept.update(was=a.detach().reshape(-1, WIDTH)[0]))
        return a + before

    def by_half_frozen(self, a: Tensor, net: Any) -> Tensor:
        w = torch.cat([self.inner.weight[:2].detach(), self.inner.weight[2:]])
        return F.linear(a, w, self.inner.bias)


class Stopped(Exception):
    """What a hook of the user's ends a pass with."""

    def __init__(self, value: Tensor) -> None:
        super().__init__("stopped")
        self.value = value


class Caught(Ways):
    """Errors that the step catches, features that hooks take along, other shapes and kinds of memory."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.talk = Talkative()
        self.stack = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid())
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def by_error(self, a: Tensor, net: Any) -> Tensor:
        try:
            b = self.talk(a[..., :2])
        except RuntimeError:
            b = self.talk(a)
        return b + a

    def by_error_at_times(self, a: Tensor, net: Any) -> Tensor:
        try:
            b = self.stack(a if net.k % 2 else a[..., :3])
        except RuntimeError:
            b = a * 0.5
        return b + self.stack(a)

    def by_early_exit(self, a: Tensor, net: Any) -> Tensor:
        def leave(module: nn.Module, args: Any, out: Tensor) -> None:
            raise Stopped(out)

        handle = self.stack[1].register_forward_hook(leave)
        try:
            self.stack(a)
        except Stopped as stopped:
            return stopped.value + a
        finally:
            handle.remove()
        return a

    def by_features(self, a: Tensor, net: Any) -> Tensor:
        found: list[Tensor] = []
        handles = [m.register_forward_hook(lambda m, args, out: found.append(out)) for m in self.stack]
        try:
            out = self.stack(a)
        finally:
            for handle in handles:
                handle.remove()
        return out + found[0] * 0.3 + found[1]

    def by_recursion(self, a: Tensor, net: Any, depth: int = 0) -> Tensor:
        return a if depth == 2 else self.by_recursion(self.talk(a), net, depth + 1)

    def by_sparse(self, a: Tensor, net: Any) -> Tensor:
        n = a.shape[0]
        values = torch.ones(len(net.edges[0]), dtype=a.dtype)
        adjacency = torch.sparse_coo_tensor(torch.stack(net.edges), values, (n, n))
        return torch.sparse.mm(adjacency, a.reshape(n, -1)).view_as(a) + a

    def by_sparse_of_weights(self, a: Tensor, net: Any) -> Tensor:
        n = a.shape[0]
        values = self.inner.bias.sum().expand(len(net.edges[0]))
        adjacency = torch.sparse_coo_tensor(torch.stack(net.edges), values, (n, n))
        return torch.sparse.mm(adjacency, a.reshape(n, -1)).view_as(a) + a

    def by_packed(self, a: Tensor, net: Any) -> Tensor:
        rows = a.reshape(1, -1, WIDTH).expand(7, -1, -1)  # no size of a batch or of its steps: it would be taken for it
        lengths = torch.tensor([3, 1, 2, 1, 3, 2, 1]).clamp(max=rows.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(rows, lengths, True, False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return a + out.sum((0, 1))

    def by_empty(self, a: Tensor, net: Any) -> Tensor:
        none = self.inner(a[:0])
        return a + none.sum() + torch.cat([none, a]) * 0.5

    def by_where_it_is(self, a: Tensor, net: Any) -> Tensor:
        found = torch.where(net.mask)
        b = a.clone()
        b[found] += 1.0
        return b

    def by_layout(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a)
        if net.k % 2:
            b = b.transpose(0, -1).contiguous().transpose(0, -1)
        b.mul_(2)
        return b + b.flip(-1)

    def by_numpy_numbers(self, a: Tensor, net: Any) -> Tensor:
        return a * numpy.float64(0.5 + net.k) + numpy.float32(net.k)

    def by_memory_of_numpy(self, a: Tensor, net: Any) -> Tensor:
        array = numpy.full((WIDTH,), 0.5)
        c = torch.from_numpy(array)
        b = a * c
        array += 0.5
        return b + torch.from_numpy(array)

    def by_new_tensors(self, a: Tensor, net: Any) -> Tensor:
        return a * a.new_tensor([1.0, 0.5, net.k, 2.0]) + a.new_full((WIDTH,), net.k) * a.new_ones(WIDTH)

    def by_lists_of_indices(self, a: Tensor, net: Any) -> Tensor:
        return a[..., [3, net.k % WIDTH, 0, 1]] + a[..., net.k % WIDTH].unsqueeze(-1)

    def by_huge_numbers(self, a: Tensor, net: Any) -> Tensor:
        return (a * (2**40 + net.k)) / (2**40 + 2 * net.k) + (torch.arange(WIDTH) * 3**net.k).to(a) * 0.01

    def by_numbers_of_integers(self, a: Tensor, net: Any) -> Tensor:
        steps = torch.arange(WIDTH) * net.k + net.k
        return a + torch.sin(steps / 10000) + (steps // 3).to(a) * 0.01

    def by_actions(self, a: Tensor, net: Any) -> Tensor:
        policy = torch.distributions.Categorical(logits=a)
        action = net.once(policy.sample)
        return a + policy.log_prob(action).unsqueeze(-1) * 0.3

    def by_relaxed(self, a: Tensor, net: Any) -> Tensor:
        z = torch.distributions.RelaxedBernoulli(torch.tensor(0.7, dtype=a.dtype), logits=a).rsample()
        return z + torch.distributions.MultivariateNormal(a, torch.eye(WIDTH, dtype=a.dtype)).rsample() * 0.1

    def by_divergence(self, a: Tensor, net: Any) -> Tensor:
        p, q = torch.distributions.Normal(a, 1.0), torch.distributions.Normal(self.inner(a), 0.5 + net.k)
        return a + torch.distributions.kl_divergence(p, q) * 0.1

    def by_infinite_slope(self, a: Tensor, net: Any) -> Tensor:
        b = a - a[..., :1]
        return torch.where(b == 0, 0.0, (b.abs() + 1e-6).sqrt()) + a

    def by_grid(self, a: Tensor, net: Any) -> Tensor:
        image = a.reshape(1, 1, -1, WIDTH)
        theta = self.inner.weight[:2, :3].unsqueeze(0)
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        return F.grid_sample(image, grid, align_corners=False).view_as(a) + a

    def by_gradients_of_before(self, a: Tensor, net: Any) -> Tensor:
        g = self.inner.weight.grad
        return a if g is None else a + g.mean()

    def by_dropped_in_place(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a)
        F.dropout(b, 0.3, self.training, inplace=True)
        return b + F.alpha_dropout(a, 0.2, self.training) + F.feature_alpha_dropout(a, 0.1, self.training)

    def by_reduce(self, a: Tensor, net: Any) -> Tensor:
        target = net.edges[1]
        rows = a[net.edges[0]]
        wide = target.view(-1, *[1] * (a.ndim - 1)).expand_as(rows)
        most = torch.full_like(a, -1.0).scatter_reduce(0, wide, rows, "amax")
        return most * 0.1 + torch.ones_like(a).index_reduce(0, target, rows, "prod") + a

    def by_put(self, a: Tensor, net: Any) -> Tensor:
        b = a * 1.0
        b.put_(torch.tensor([0, 2]), a.reshape(-1)[:2] * 3)
        return b + a.take(torch.tensor([0, 1, 2, 3]))

    def by_views_of_views(self, a: Tensor, net: Any) -> Tensor:
        whole = torch.zeros(2, *a.shape, dtype=a.dtype)
        whole[0].copy_(a)
        second = whole[1]
        second.add_(whole[0]).mul_(0.5)
        whole[0][..., 0].add_(second[..., 1])
        return whole.sum(0)

    def by_write_to_expanded_source(self, a: Tensor, net: Any) -> Tensor:
        shift = self.inner.bias * 1.0
        wide = shift.expand_as(a)
        b = a + wide
        shift.mul_(0.5)
        return b + wide


class Owned(torch.autograd.Function):
    """Reads what its backward code does off its owner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Any) -> Tensor:
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor, None]:
        return gs[0] * ctx.owner["by"], None


class Late(Ways):
    """Does in later steps what no operation shows."""

    inexact = frozenset(
        {"by_owner", "by_hook", "by_nodes", "by_packing", "by_data_after", "by_array", "by_storage"}
        | {"by_autocast_of_integers"}
    )

    def by_owner(self, a: Tensor, net: Any) -> Tensor:
        return Owned.apply(a, {"by": 1.0 if net.k < 2 else -0.5})

    def by_owner_kept(self, a: Tensor, net: Any) -> Tensor:
        owner = net.kept.setdefault("scales", torch.ones(()))
        owner.fill_(1.0)
        return Owned.apply(a, {"by": owner})

    def by_hook(self, a: Tensor, net: Any) -> Tensor:
        b = a * 1.5
        if net.k >= 2:
            b.register_hook(lambda g: g * 0.5)
        return b + a

    def by_hook_that_looks(self, a: Tensor, net: Any) -> Tensor:
        b = a * 1.5
        if net.k >= 2:
            b.register_hook(lambda g: None)
        return b + a

    def by_nodes(self, a: Tensor, net: Any) -> Tensor:
        b = a * 1.5
        if net.k >= 2 and b.grad_fn is not None:
            b.grad_fn.register_hook(lambda gi, go: tuple(None if g is None else g * 0.5 for g in gi))
        return b

    def by_packing(self, a: Tensor, net: Any) -> Tensor:
        # Within autocast the comparison of a program with autograd is too coarse to notice it at small gradients.
        by = 1.0 if net.k < 2 or torch.is_autocast_enabled("cpu") else 0.5
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * by)
        with hooks:
            return self.inner(a).tanh() + a

    def by_packing_later(self, a: Tensor, net: Any) -> Tensor:
        if net.k < 2:
            return self.inner(a).tanh() + a
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), lambda t: torch.from_numpy(t)):
            return self.inner(a).tanh() + a

    def by_retained(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a)
        if net.k >= 2:
            b.retain_grad()
        return b + a

    def by_data_after(self, a: Tensor, net: Any) -> Tensor:
        c = torch.ones_like(a)
        b = a * c
        if net.k >= 2:
            c.data.mul_(0.5)
        return b

    def by_array(self, a: Tensor, net: Any) -> Tensor:
        array = numpy.ones(WIDTH)
        b = a * torch.from_numpy(array)
        if net.k >= 2:
            array *= 0.5
        return b

    def by_storage(self, a: Tensor, net: Any) -> Tensor:
        c = torch.ones_like(a)
        b = a * c
        if net.k >= 2:
            c.untyped_storage().fill_(0)
        return b

    def by_same_memory(self, a: Tensor, net: Any) -> Tensor:
        one = torch.ones(WIDTH, dtype=a.dtype)
        other = one if net.k >= 2 else torch.ones(WIDTH, dtype=a.dtype)
        b = a + other
        one.add_(1.0)
        return b * other + one

    def by_views_of_one_memory(self, a: Tensor, net: Any) -> Tensor:
        memory = torch.ones(2 * WIDTH, dtype=a.dtype)
        with torch.no_grad():
            one, other = memory[:WIDTH], memory[:WIDTH] if net.k >= 2 else memory[WIDTH:]
        b = a + other
        one.data.add_(1.0)
        return b + other + one

    def by_buffers_of_one_memory(self, a: Tensor, net: Any) -> Tensor:
        def move() -> Tensor:
            self.mean.data = self.bank.data[0] if net.k >= 2 else self.mean.data.clone()
            self.bank[0].add_(0.5)
            return self.mean

        return a - net.once(move)

    def by_gradients_of_leaves(self, a: Tensor, net: Any) -> Tensor:
        c = torch.ones_like(a)
        if net.k >= 2:
            c.requires_grad_()
        return a * c

    def by_autocast_of_integers(self, a: Tensor, net: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=net.k >= 2):
            return a + (self.inner.weight.float() @ torch.ones(WIDTH)).to(a)

    def by_anomaly(self, a: Tensor, net: Any) -> Tensor:
        with torch.autograd.set_detect_anomaly(net.k >= 2):
            return self.inner(a) + a

    def by_default_dtype(self, a: Tensor, net: Any) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if net.k >= 2 else torch.float32)
        try:
            return a * torch.linspace(0, 1, WIDTH) + torch.tensor(0.1)
        finally:
            torch.set_default_dtype(before)


ODD: list[type[Ways]] = [Switched, Caught, Late]
