"""Layers of random programs that compute in one of many ways, see `fuzz_programs.py`: draws, writes, leaves, numbers.

What a way computes once in a step, and what is a constant at all states, goes through `net.once`: so descent on
explicit states, which runs the user's code again, reads there what the step has read.
"""

import copy
import random
from typing import Any

import torch
from fuzz_blocks import WIDTH, Block
from torch import Tensor, nn
from torch.nn import functional as F


class Ways(Block):
    """Computes in one of several ways, its methods that begin with `by_`; a step may turn to the next one.

    Attributes:
        inexact: those that another run at other states does not give, see `Block.exact`.
        kept: what is kept across steps besides buffers.
    """

    inexact: frozenset[str] = frozenset()

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("bank", torch.zeros(6, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.kept: dict[str, Any] = {}
        self.ways = self.names()
        self.first = rng.randrange(len(self.ways))

    @classmethod
    def names(cls) -> list[str]:
        return [name for name in sorted(dir(cls)) if name.startswith("by_")]

    def way(self, turn: int) -> str:
        return self.ways[(self.first + turn) % len(self.ways)]

    def says(self, turn: int) -> str:
        return f"{type(self).__name__}.{self.way(turn)}"

    def exact_in(self, turn: int) -> bool:
        return self.way(turn) not in self.inexact

    def forward(self, h: Tensor, net: Any) -> Tensor:
        return getattr(self, self.way(net.turn))(self.act(self.linear(h)), net)


class Drawn(Ways):
    """Random draws, and what people do to them before they use them."""

    inexact = frozenset({"by_gumbel_hard", "by_mean", "by_sampled", "by_added_quietly"})

    def by_scaled(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps.mul_(0.3)
        return a + eps

    def by_view(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps.view(-1).mul_(0.5)
        eps[..., 0] = 0.0
        return a + eps

    def by_transposed(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps.transpose(0, -1).add_(0.1)
        return a * eps

    def by_bernoulli(self, a: Tensor, net: Any) -> Tensor:
        keep = torch.empty_like(a).bernoulli_(0.7)
        keep.div_(0.7)
        return a * keep

    def by_floor(self, a: Tensor, net: Any) -> Tensor:
        keep = 0.7 + torch.rand(a.shape[0], *[1] * (a.ndim - 1), dtype=a.dtype)
        keep.floor_()
        return a.div(0.7) * keep

    def by_normal(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.zeros_like(a).normal_(0, 0.5)
        eps.clamp_(-0.6, 0.6)
        return a + eps

    def by_filled(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.empty(a.shape, dtype=a.dtype)
        nn.init.normal_(eps, 0, 0.2)
        return a + eps * a

    def by_uniform(self, a: Tensor, net: Any) -> Tensor:
        return a + torch.empty_like(a).uniform_(-0.1, 0.1).abs_()

    def by_gumbel(self, a: Tensor, net: Any) -> Tensor:
        g = -torch.empty_like(a).exponential_().log()
        return torch.softmax((a + g) / 0.7, -1)

    def by_gumbel_written(self, a: Tensor, net: Any) -> Tensor:
        g = torch.rand_like(a)
        g.clamp_(1e-3, 0.999).log_().neg_().log_().neg_()
        return torch.softmax(a + g, -1)

    def by_gumbel_hard(self, a: Tensor, net: Any) -> Tensor:
        return F.gumbel_softmax(a, 0.7, hard=True) + a

    def by_permuted(self, a: Tensor, net: Any) -> Tensor:
        return a + 0.5 * a[torch.randperm(a.shape[0])]

    def by_permuted_columns(self, a: Tensor, net: Any) -> Tensor:
        order = torch.randperm(WIDTH)
        order[:2] = order[:2].flip(0)
        return a[..., order]

    def by_multinomial(self, a: Tensor, net: Any) -> Tensor:
        chosen = torch.multinomial(torch.ones(WIDTH, dtype=a.dtype), 2)
        return a + a[..., chosen].sum(-1, keepdim=True)

    def by_sampled(self, a: Tensor, net: Any) -> Tensor:
        chosen = torch.multinomial(torch.softmax(a.reshape(-1, WIDTH), -1), 1).view(*a.shape[:-1], 1)
        return a + a.gather(-1, chosen)

    def by_mean(self, a: Tensor, net: Any) -> Tensor:
        return a + torch.normal(a, 0.1)

    def by_read_and_written(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        b = a + eps
        eps.mul_(0.5)
        return b * eps

    def by_reused(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        return (a + eps) * torch.sigmoid(eps) + eps.mean()

    def by_quiet(self, a: Tensor, net: Any) -> Tensor:
        with torch.no_grad():
            eps = torch.randn_like(a)
            eps.mul_(0.1)
        eps.add_(0.1)
        return a + eps

    def by_added_quietly(self, a: Tensor, net: Any) -> Tensor:
        with torch.no_grad():
            eps = torch.randn_like(a)
            eps.add_(a)
        return a * eps

    def by_detached(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps.detach().mul_(0.3)
        return a + eps

    def by_out(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.empty_like(a)
        torch.randn(a.shape, out=eps)
        return a + 0.1 * eps

    def by_probability(self, a: Tensor, net: Any) -> Tensor:
        keep = torch.bernoulli(torch.full_like(a, 0.7))
        keep /= 0.7
        return a * keep

    def by_threshold(self, a: Tensor, net: Any) -> Tensor:
        return a.masked_fill(torch.rand_like(a) < 0.3, 0.0)

    def by_buffer(self, a: Tensor, net: Any) -> Tensor:
        noise = net.once(lambda: self.mean.mul_(0.9).add_(0.1 * torch.randn(WIDTH, dtype=a.dtype)))
        return a + noise

    def by_kept(self, a: Tensor, net: Any) -> Tensor:
        before = net.once(lambda: self.kept.get("eps", torch.zeros(WIDTH, dtype=a.dtype)))
        eps = torch.randn(WIDTH, dtype=a.dtype)
        net.once(lambda: self.kept.update(eps=eps))
        return a + before * eps

    def by_kept_and_written(self, a: Tensor, net: Any) -> Tensor:
        def draw() -> Tensor:
            eps = self.kept.setdefault("eps", torch.zeros(WIDTH, dtype=a.dtype))
            eps.normal_()
            eps[:2].mul_(0.1)
            return eps

        return a + 0.3 * net.once(draw)

    def by_expanded(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn(WIDTH, dtype=a.dtype)
        wide = eps.expand_as(a)
        eps[:2].zero_()
        return a + wide

    def by_where(self, a: Tensor, net: Any) -> Tensor:
        u = torch.rand_like(a)
        return torch.where(u > 0.5, a, 0.5 * a * u)

    def by_row(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps[0] = a[0] * 0.1
        return a + eps

    def by_masked(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps[net.mask] = a[net.mask]
        return eps

    def by_added(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps += a
        return eps

    def by_copied(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        before = eps.sum(-1, keepdim=True)
        eps.copy_(a)
        return eps * before

    def by_viewed_and_added(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        part = eps[..., 1:]
        eps[..., :2].add_(a[..., :2])
        return torch.cat([eps[..., :1], part], -1)

    def by_chunks(self, a: Tensor, net: Any) -> Tensor:
        one, other = torch.randn(*a.shape[:-1], 2 * WIDTH, dtype=a.dtype).chunk(2, -1)
        one.mul_(0.3)
        return a + one * other

    def by_unbound(self, a: Tensor, net: Any) -> Tensor:
        one, other = torch.randn(2, *a.shape, dtype=a.dtype).unbind(0)
        other.copy_(one).mul_(0.5)
        return a * one + other

    def by_foreach(self, a: Tensor, net: Any) -> Tensor:
        draws = [torch.randn_like(a) for _ in range(3)]
        torch._foreach_mul_(draws, 0.3)
        return a + draws[0] * draws[1] + draws[2]

    def by_data(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps.data.mul_(0.3)
        return a + eps

    def by_numpy(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps.numpy()[..., 0] *= 0.5
        return a * eps

    def by_generator(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn(a.shape, generator=torch.Generator().manual_seed(net.k), dtype=a.dtype)
        eps.mul_(0.5)
        return a + eps

    def by_reparametrizing(self, a: Tensor, net: Any) -> Tensor:
        mean, scale = a.chunk(2, -1)
        std = scale.mul(0.5).exp_()
        eps = torch.randn_like(std)
        return torch.cat([eps.mul(std).add_(mean), mean], -1)

    def by_standardizing(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps -= eps.mean()
        eps /= eps.std()
        return a + 0.2 * eps

    def by_integers(self, a: Tensor, net: Any) -> Tensor:
        t = torch.randint(0, 5, (a.shape[0],))
        t.clamp_(1, 3)
        weight = (1.0 - t.to(a) / 5).view(-1, *[1] * (a.ndim - 1))
        return a * weight.sqrt() + (1 - weight).sqrt() * torch.randn_like(a)

    def by_random(self, a: Tensor, net: Any) -> Tensor:
        return a + self.inner(a)[..., torch.empty(2, dtype=torch.long).random_(WIDTH)].sum(-1, keepdim=True)

    def by_rademacher(self, a: Tensor, net: Any) -> Tensor:
        signs = torch.randint(0, 2, a.shape, dtype=a.dtype)
        signs.mul_(2).sub_(1)
        return a * signs

    def by_own_dropout(self, a: Tensor, net: Any) -> Tensor:
        return F.dropout(a, 0.1 * (net.k % 3)) if self.training else a

    def by_feature_dropout(self, a: Tensor, net: Any) -> Tensor:
        return F.dropout1d(a.reshape(1, -1, WIDTH), 0.4, self.training).view_as(a)

    def by_rrelu(self, a: Tensor, net: Any) -> Tensor:
        return F.rrelu(a - 0.2, training=self.training)


class Written(Ways):
    """Writes in place to constants, to what was computed, and to views of either."""

    inexact = frozenset({"by_clamp_quietly", "by_data_of_computed"})

    def by_constant(self, a: Tensor, net: Any) -> Tensor:
        c = torch.ones_like(a)
        c.mul_(2)
        c[..., 0] = 0
        return a * c

    def by_parts(self, a: Tensor, net: Any) -> Tensor:
        out = torch.zeros_like(a)
        out[..., :2] = a[..., :2]
        out[..., 2:] = a[..., :2] * 2
        return out

    def by_rows(self, a: Tensor, net: Any) -> Tensor:
        out = torch.empty_like(a)
        for i in range(a.shape[0]):
            out[i] = a[i] * (i + 1)
        return out

    def by_unfolded(self, a: Tensor, net: Any) -> Tensor:
        b = a.clone()
        b.unfold(-1, 2, 2).mul_(1.5)
        return b

    def by_chunks(self, a: Tensor, net: Any) -> Tensor:
        c = torch.zeros_like(a)
        left, right = c.chunk(2, -1)
        left.add_(1)
        right.mul_(2).sub_(0.5)
        return a + c * a

    def by_split(self, a: Tensor, net: Any) -> Tensor:
        left, right = self.inner(a).split(2, -1)
        return torch.cat([left.clone().add_(right), right], -1)

    def by_index_put(self, a: Tensor, net: Any) -> Tensor:
        c = torch.zeros_like(a)
        source, target = net.edges
        return c.index_put_((target,), a[source], accumulate=True) + a

    def by_masked_fill(self, a: Tensor, net: Any) -> Tensor:
        b = a * 1.5
        b.masked_fill_(net.mask.view(-1, *[1] * (a.ndim - 1)), 0.2)
        return b

    def by_masked_scatter(self, a: Tensor, net: Any) -> Tensor:
        mask = net.mask.view(-1, *[1] * (a.ndim - 1)).expand_as(a)
        return torch.zeros_like(a).masked_scatter_(mask, a * 2) + a

    def by_scatter(self, a: Tensor, net: Any) -> Tensor:
        where = torch.randint(0, WIDTH, (*a.shape[:-1], 1))
        b = a.clone()
        b.scatter_(-1, where, 0.5)
        return b + torch.zeros_like(a).scatter_(-1, where, 1.0)

    def by_scatter_reduce(self, a: Tensor, net: Any) -> Tensor:
        where = torch.randint(0, WIDTH, a.shape)
        return torch.zeros_like(a).scatter_reduce_(-1, where, a, "mean", include_self=False) + a

    def by_copy_of_fewer(self, a: Tensor, net: Any) -> Tensor:
        b = a * 2
        b[..., 1:].copy_(a[..., :1].expand_as(b[..., 1:]))
        return b

    def by_out(self, a: Tensor, net: Any) -> Tensor:
        c, d = torch.ones(WIDTH, dtype=a.dtype), torch.arange(WIDTH).to(a)
        torch.add(c, d, out=c)
        c.div_(3)
        return a * c

    def by_foreach(self, a: Tensor, net: Any) -> Tensor:
        many = [a.clone(), a * 2]
        torch._foreach_add_(many, 0.1)
        torch._foreach_mul_(many, [torch.ones_like(a), torch.full_like(a, 0.5)])
        return many[0] + many[1]

    def by_foreach_returned(self, a: Tensor, net: Any) -> Tensor:
        one, other = torch._foreach_mul([a, self.inner(a)], 0.5)
        return one + other

    def by_triangle(self, a: Tensor, net: Any) -> Tensor:
        w = self.inner.weight * 1.0
        w.tril_().fill_diagonal_(0.3)
        return a @ w

    def by_clamp(self, a: Tensor, net: Any) -> Tensor:
        return self.inner(a).clamp_(-0.5, 0.5) + a

    def by_relu_of_part(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a)
        F.relu_(b[..., :2])
        b[..., 2:].sigmoid_()
        return b + a

    def by_view_first(self, a: Tensor, net: Any) -> Tensor:
        b = a + 0.1
        first = b[..., 0]
        b.mul_(2)
        return b + first.unsqueeze(-1)

    def by_swap(self, a: Tensor, net: Any) -> Tensor:
        b = a.clone()
        kept = b[..., 0].clone()
        b[..., 0] = b[..., 1]
        b[..., 1] = kept
        return b * torch.arange(1, WIDTH + 1).to(a)

    def by_diagonal(self, a: Tensor, net: Any) -> Tensor:
        gram = a.reshape(-1, WIDTH).t() @ a.reshape(-1, WIDTH)
        gram.diagonal().add_(1.0)
        return a @ torch.linalg.inv(gram)

    def by_strided(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a).contiguous()
        b.as_strided((2,), (2,)).mul_(0.5)
        return b

    def by_buffer(self, a: Tensor, net: Any) -> Tensor:
        seen = net.once(lambda: self.mean.copy_(a.detach().reshape(-1, WIDTH).mean(0)))
        return a - seen

    def by_integers(self, a: Tensor, net: Any) -> Tensor:
        order = torch.arange(WIDTH)
        order.add_(net.k).remainder_(WIDTH)
        return a[..., order] * 0.5 + a

    def by_truth_values(self, a: Tensor, net: Any) -> Tensor:
        mask = net.once(lambda: a.detach() > 0)
        mask.logical_not_()
        return a * mask + 0.1 * a

    def by_fused(self, a: Tensor, net: Any) -> Tensor:
        b = a.clone()
        b.addcmul_(a, a, value=0.5).lerp_(a, 0.3).sub_(a.mean(-1, keepdim=True))
        return b

    def by_addmm(self, a: Tensor, net: Any) -> Tensor:
        flat = a.reshape(-1, WIDTH)
        out = torch.zeros_like(flat)
        out.addmm_(flat, self.inner.weight.t()).add_(self.inner.bias)
        return out.view_as(a)

    def by_clamp_quietly(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a)
        with torch.no_grad():
            b.clamp_(-0.4, 0.4)
        return b + a

    def by_data_of_computed(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a)
        b.data.mul_(0.5)
        return b + a

    def by_index_fill(self, a: Tensor, net: Any) -> Tensor:
        b = a * 2
        b.index_fill_(-1, torch.tensor([1]), 0.3)
        b.index_copy_(-1, torch.tensor([2]), a[..., :1])
        return b.index_add_(-1, torch.tensor([3, 3]), a[..., :2], alpha=0.5)

    def by_zeroing(self, a: Tensor, net: Any) -> Tensor:
        b = a + 0.0
        total = b.sum(-1, keepdim=True)
        b.zero_()
        return b + total * a

    def by_shape(self, a: Tensor, net: Any) -> Tensor:
        b = a * 1.5
        b.unsqueeze_(0).transpose_(0, 1).squeeze_(1)
        return b.swapaxes_(0, -1).swapaxes_(0, -1)

    def by_computed_and_detached(self, a: Tensor, net: Any) -> Tensor:
        b = net.once(lambda: a.detach().clone())
        b.mul_(0.5)
        b[..., 0] = a[..., 1]
        return a + b

    def by_gradient_of_part(self, a: Tensor, net: Any) -> Tensor:
        c = torch.zeros(*a.shape[:-1], WIDTH + 2, dtype=a.dtype)
        c[..., 1:-1] = a
        c[..., 0], c[..., -1] = c[..., 1], c[..., -2]
        return c[..., 2:] - c[..., :-2] + a

    def by_list_of_rows(self, a: Tensor, net: Any) -> Tensor:
        rows = list(a.clone())
        rows[0] = rows[0] * 2
        return torch.stack(rows)

    def by_complex(self, a: Tensor, net: Any) -> Tensor:
        pairs = torch.view_as_complex(a.reshape(*a.shape[:-1], 2, 2).clone())
        pairs.mul_(1j)
        return torch.view_as_real(pairs).reshape(a.shape)

    def by_flat_copy(self, a: Tensor, net: Any) -> Tensor:
        whole = torch.zeros(a.numel() + WIDTH, dtype=a.dtype)
        whole[: a.numel()].view_as(a).copy_(a)
        whole[-WIDTH:] = self.inner.bias
        return whole[WIDTH:].view_as(a) + a

    def by_exponential(self, a: Tensor, net: Any) -> Tensor:
        return (a - a.amax(-1, keepdim=True)).mul_(-0.5).add_(1.0).sqrt_()

    def by_untyped(self, a: Tensor, net: Any) -> Tensor:
        c = torch.ones_like(a)
        c.untyped_storage().copy_(torch.full_like(a, 0.7).untyped_storage())
        return a * c

    def by_apply(self, a: Tensor, net: Any) -> Tensor:
        c = torch.ones(WIDTH, dtype=a.dtype)
        c.apply_(lambda v: v * 0.6)
        return a * c

    def by_data_of_constant(self, a: Tensor, net: Any) -> Tensor:
        c = torch.ones(WIDTH, dtype=a.dtype)
        c.data[0] = 3.0
        c.data = c.data * 0.5
        return a * c


class Made(Ways):
    """Leaves that the step makes, and slopes that it computes itself."""

    def by_slope(self, a: Tensor, net: Any) -> Tensor:
        z = net.once(lambda: a.detach()).requires_grad_()
        (g,) = torch.autograd.grad(z.pow(3).sum(), z)
        return a + 0.1 * g

    def by_slope_of_weights(self, a: Tensor, net: Any) -> Tensor:
        z = net.once(lambda: a.detach().clone()).requires_grad_()
        (g,) = torch.autograd.grad(self.inner(z).tanh().sum(), z, create_graph=True)
        return a + g

    def by_parameter(self, a: Tensor, net: Any) -> Tensor:
        p = nn.Parameter(net.once(lambda: a.detach().clone()))
        return self.inner(p).tanh() + a

    def by_descent(self, a: Tensor, net: Any) -> Tensor:
        aim = net.once(lambda: a.detach())
        z = torch.zeros_like(aim).requires_grad_()
        for _ in range(2):
            (g,) = torch.autograd.grad((z - aim).square().sum(), z)
            z = (z - 0.1 * g).detach().requires_grad_()
        return a + z

    def by_descent_in_place(self, a: Tensor, net: Any) -> Tensor:
        aim = net.once(lambda: a.detach())
        z = torch.randn_like(aim).requires_grad_()
        for _ in range(2):
            (g,) = torch.autograd.grad((z - aim).square().sum(), z)
            with torch.no_grad():
                z.sub_(0.1 * g).add_(0.01 * torch.randn_like(z))
        return a + z.detach() * 0.5

    def by_unrolled(self, a: Tensor, net: Any) -> Tensor:
        z = torch.zeros_like(a).requires_grad_()
        for _ in range(2):
            (g,) = torch.autograd.grad((self.inner(z) - a).square().sum(), z, create_graph=True)
            z = z - 0.1 * g
        return z + a

    def by_fast_weights(self, a: Tensor, net: Any) -> Tensor:
        w = self.inner.weight
        (g,) = torch.autograd.grad((a @ w).square().mean(), w, create_graph=True)
        return a @ (w - 0.5 * g)

    def by_fast_weights_of_first_order(self, a: Tensor, net: Any) -> Tensor:
        w = self.inner.weight
        g = net.once(lambda: torch.autograd.grad((a.detach() @ w).square().mean(), w)[0])
        return a @ (w - 0.5 * g)

    def by_retained(self, a: Tensor, net: Any) -> Tensor:
        b = a * 2
        b.retain_grad()
        return b

    def by_ones(self, a: Tensor, net: Any) -> Tensor:
        w = torch.ones(WIDTH, dtype=a.dtype, requires_grad=True)
        return a * w

    def by_drawn(self, a: Tensor, net: Any) -> Tensor:
        z = torch.randn_like(a).requires_grad_()
        (g,) = torch.autograd.grad(self.inner(z).square().sum(), z, create_graph=True)
        return a + 0.1 * g

    def by_func(self, a: Tensor, net: Any) -> Tensor:
        return a + 0.1 * torch.func.grad(lambda v: v.pow(3).sum())(a)

    def by_own_slope(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a).tanh()
        (g,) = torch.autograd.grad(b.sum(), a, create_graph=True)
        return b + g

    def by_copy_of_module(self, a: Tensor, net: Any) -> Tensor:
        return copy.deepcopy(self.inner)(a) + a

    def by_frozen_copy(self, a: Tensor, net: Any) -> Tensor:
        return copy.deepcopy(self.inner).requires_grad_(False)(a) + self.inner(a)

    def by_grad_on_again(self, a: Tensor, net: Any) -> Tensor:
        with torch.no_grad():
            with torch.enable_grad():
                b = self.inner(a)
            c = net.once(lambda: b.mean())
        return b + c

    def by_switch(self, a: Tensor, net: Any) -> Tensor:
        with torch.set_grad_enabled(net.k % 2 == 0):
            gate = torch.sigmoid(self.inner(net.once(lambda: a.detach())))
        return a * gate

    def by_inference(self, a: Tensor, net: Any) -> Tensor:
        with torch.inference_mode():
            gate = torch.linspace(0.5, 1.5, WIDTH, dtype=a.dtype)
        return a * gate.clone() + gate.clone()

    def by_inference_of_module(self, a: Tensor, net: Any) -> Tensor:
        def gate() -> Tensor:
            with torch.inference_mode():
                return torch.sigmoid(self.inner(a.detach()))

        return a * net.once(gate).clone()

    def by_backward(self, a: Tensor, net: Any) -> Tensor:
        z = net.once(lambda: a.detach().clone()).requires_grad_()
        z.pow(3).sum().backward()
        return a + 0.1 * z.grad

    def by_trust(self, a: Tensor, net: Any) -> Tensor:
        z = net.once(lambda: a.detach()).requires_grad_()
        g = torch.autograd.grad(F.softplus(self.inner(z)).sum(), z)[0]
        g.div_(g.norm() + 1e-3)
        return a + 0.2 * g

    def by_product_with_slope(self, a: Tensor, net: Any) -> Tensor:
        z = net.once(lambda: a.detach()).requires_grad_()
        v = torch.randn_like(z)
        (g,) = torch.autograd.grad(self.inner(z).tanh(), z, v, create_graph=True)
        return a + 0.1 * (g * v).sum(-1, keepdim=True)


class Numbers(Ways):
    """Numbers of Python's: read off tensors, of schedules, 0 first and something later, int and float."""

    def by_item(self, a: Tensor, net: Any) -> Tensor:
        s = net.once(lambda: float(a.detach().mean()))
        return a * s + s

    def by_list(self, a: Tensor, net: Any) -> Tensor:
        weights = net.once(lambda: a.detach().reshape(-1, WIDTH)[0].tolist())
        return sum(w * a.roll(i, -1) for i, w in enumerate(weights))

    def by_read_power(self, a: Tensor, net: Any) -> Tensor:
        return (a * a + 0.1) ** net.once(lambda: a.detach().mean().item())

    def by_power(self, a: Tensor, net: Any) -> Tensor:
        return a**net.k + a

    def by_sign(self, a: Tensor, net: Any) -> Tensor:
        return a * (-1) ** net.k + 0.3

    def by_count(self, a: Tensor, net: Any) -> Tensor:
        n = net.once(lambda: len((a.detach() > 0.2).nonzero()))
        return a / (n + 1) + a * n

    def by_branch(self, a: Tensor, net: Any) -> Tensor:
        return a * 2 if net.once(lambda: bool(a.detach().mean() > 0.3)) else self.inner(a)

    def by_temperature(self, a: Tensor, net: Any) -> Tensor:
        return torch.softmax(a / max(0.5, 1 - 0.1 * net.k), -1)

    def by_warming(self, a: Tensor, net: Any) -> Tensor:
        return self.inner(a) * min(1.0, net.k / 3) + a

    def by_counting(self, a: Tensor, net: Any) -> Tensor:
        return self.inner(a) * net.k + a

    def by_kind(self, a: Tensor, net: Any) -> Tensor:
        return self.inner(a) * (net.k if net.k % 2 else float(net.k)) + a + net.k

    def by_truth(self, a: Tensor, net: Any) -> Tensor:
        return self.inner(a) * (net.k % 2 == 0) + a

    def by_bound(self, a: Tensor, net: Any) -> Tensor:
        return a.clamp(-1, 0.1 + 0.1 * net.k) + a

    def by_slope(self, a: Tensor, net: Any) -> Tensor:
        return F.leaky_relu(self.inner(a), 0.1 * net.k)

    def by_alpha(self, a: Tensor, net: Any) -> Tensor:
        return torch.add(a, self.inner(a), alpha=net.k).sub(a, alpha=0.5)

    def by_reversed(self, a: Tensor, net: Any) -> Tensor:
        return (net.k - a) + 1 / (a + 3 + net.k) + (1.1 + 0.1 * net.k) ** a

    def by_lerp(self, a: Tensor, net: Any) -> Tensor:
        return torch.lerp(a, self.inner(a), 0.2 * net.k)

    def by_roll(self, a: Tensor, net: Any) -> Tensor:
        return a.roll(net.k, -1) * 0.5 + a

    def by_filled(self, a: Tensor, net: Any) -> Tensor:
        return a * torch.full_like(a, 0.5 + net.k) + torch.tensor(float(net.k), dtype=a.dtype)

    def by_tensor(self, a: Tensor, net: Any) -> Tensor:
        return self.inner(a) * torch.tensor(net.k) + a * torch.as_tensor([1.0, 0.5, 0.2, net.k]).to(a)

    def by_written(self, a: Tensor, net: Any) -> Tensor:
        b = self.inner(a)
        b *= net.k
        b += net.k
        b /= net.k + 1
        return b + a

    def by_value(self, a: Tensor, net: Any) -> Tensor:
        return torch.addcmul(a, a, self.inner(a), value=0.3 * net.k)

    def by_zero_and_one(self, a: Tensor, net: Any) -> Tensor:
        return a * 1 + a * 0 - self.inner(a) * -1.0 + 0.0

    def by_minus_zero(self, a: Tensor, net: Any) -> Tensor:
        return a + self.inner(a) * (-0.0 if net.k % 2 else 0.0) + 1e-3 * net.k

    def by_length(self, a: Tensor, net: Any) -> Tensor:
        for _ in range(net.k % 3):
            a = self.act(self.inner(a))
        return a

    def by_two(self, a: Tensor, net: Any) -> Tensor:
        return a * (0.5 + net.k) + self.inner(a) * (0.5 + net.k) - a * (net.k + 1)

    def by_two_that_part(self, a: Tensor, net: Any) -> Tensor:
        return a * (0.5 * net.k) + self.inner(a) * (0.5 * (net.k // 2))

    def by_numpy(self, a: Tensor, net: Any) -> Tensor:
        s = net.once(lambda: a.detach().numpy().mean())
        return a * s

    def by_own_counter(self, a: Tensor, net: Any) -> Tensor:
        count = net.once(lambda: self.count.add_(1).clone())
        return a * (0.9 ** int(count)) + self.inner(a) / count

    def by_slice(self, a: Tensor, net: Any) -> Tensor:
        n = 1 + net.k % WIDTH
        return torch.cat([a[..., :n] * 2, a[..., n:]], -1)

    def by_eps(self, a: Tensor, net: Any) -> Tensor:
        return F.layer_norm(self.inner(a), (WIDTH,), eps=10.0 ** -(1 + net.k))

    def by_beta(self, a: Tensor, net: Any) -> Tensor:
        return F.softplus(self.inner(a), beta=1.0 + net.k) + F.elu(a - 0.5, alpha=0.5 + net.k)

    def by_infinity(self, a: Tensor, net: Any) -> Tensor:
        mask = torch.rand(a.shape) < 0.3
        mask[..., 0] = False
        return torch.softmax(a.masked_fill(mask, -torch.inf), -1)


FIRST: list[type[Ways]] = [Drawn, Written, Made, Numbers]
