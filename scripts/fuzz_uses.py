"""More layers in many ways, see `fuzz_ways.py`: what is kept across steps, calls, own functions, operations."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_blocks import WIDTH
from fuzz_ways import Ways
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Remembers(Ways):
    """Buffers, lists and averaged weights that the step itself moves."""

    inexact = frozenset({"by_clipped", "by_data", "by_normalized", "by_teacher", "by_loaded", "by_power_iteration"})

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.slow = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("direction", torch.ones(WIDTH) / 2)

    def by_average(self, a: Tensor, net: Any) -> Tensor:
        flat = a.detach().reshape(-1, WIDTH)
        return a - net.once(lambda: self.mean.lerp_(flat.mean(0), 0.1))

    def by_average_assigned(self, a: Tensor, net: Any) -> Tensor:
        def move() -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * a.detach().reshape(-1, WIDTH).mean(0)
            return self.mean

        return a - net.once(move)

    def by_average_quiet(self, a: Tensor, net: Any) -> Tensor:
        def move() -> Tensor:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(a.reshape(-1, WIDTH).mean(0), alpha=0.1)
            return self.mean

        before = net.once(self.mean.clone)
        return a - net.once(move) + before * a

    def by_read_before(self, a: Tensor, net: Any) -> Tensor:
        b = a - net.once(lambda: self.mean + 0.0)
        net.once(lambda: self.mean.add_(0.1 * a.detach().reshape(-1, WIDTH).mean(0)))
        return b

    def by_queue(self, a: Tensor, net: Any) -> Tensor:
        def push() -> Tensor:
            queue = self.kept.setdefault("queue", [])
            queue.append(a.detach().reshape(-1, WIDTH).mean(0))
            del queue[:-3]
            return torch.stack(queue)

        queue = net.once(push)
        return a @ queue.t() @ queue + a

    def by_ring(self, a: Tensor, net: Any) -> Tensor:
        def push() -> Tensor:
            at = int(self.count) % 6
            self.bank[at] = a.detach().reshape(-1, WIDTH).mean(0)
            self.count += 1
            return self.bank

        return torch.softmax(a @ net.once(push).t(), -1) @ net.once(lambda: self.bank) + a

    def by_running_norm(self, a: Tensor, net: Any) -> Tensor:
        def move() -> Tensor:
            if self.training:
                with torch.no_grad():
                    self.mean += 0.1 * (a.reshape(-1, WIDTH).mean(0) - self.mean)
                    self.bank[0] += 0.1 * (a.reshape(-1, WIDTH).var(0, unbiased=False) - self.bank[0])
            return torch.stack([self.mean, self.bank[0]])

        mean, var = net.once(move)
        return (a - mean) / (var + 1.0).sqrt()

    def by_first_time(self, a: Tensor, net: Any) -> Tensor:
        def start() -> Tensor:
            if int(self.count) == 0:
                self.mean.copy_(a.detach().reshape(-1, WIDTH).mean(0))
                self.count.fill_(1)
            return self.mean

        return a - net.once(start)

    def by_teacher(self, a: Tensor, net: Any) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.inner.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
            aim = self.slow(a)
        return self.inner(a) * aim + a

    def by_clipped(self, a: Tensor, net: Any) -> Tensor:
        with torch.no_grad():
            self.inner.weight.clamp_(-0.3, 0.3)
        return self.inner(a) + a

    def by_data(self, a: Tensor, net: Any) -> Tensor:
        self.inner.weight.data.mul_(0.98)
        return self.inner(a) + a

    def by_normalized(self, a: Tensor, net: Any) -> Tensor:
        self.inner.weight.data = F.normalize(self.inner.weight.data, dim=1)
        return self.inner(a) + a

    def by_loaded(self, a: Tensor, net: Any) -> Tensor:
        self.slow.load_state_dict(self.inner.state_dict())
        return self.slow(a) + self.inner(a) * 0.5

    def by_power_iteration(self, a: Tensor, net: Any) -> Tensor:
        w = self.inner.weight
        with torch.no_grad():
            v = F.normalize(w.t() @ self.direction, dim=0)
            self.direction.copy_(F.normalize(w @ v, dim=0))
        sigma = self.direction.clone() @ w @ v
        return F.linear(a, w / sigma)

    def by_cache(self, a: Tensor, net: Any) -> Tensor:
        before = net.once(lambda: self.kept.get("cache", torch.zeros(WIDTH, dtype=a.dtype)))
        net.once(lambda: self.kept.update(cache=a.detach().reshape(-1, WIDTH)[0]))
        return a + 0.3 * before

    def by_codebook(self, a: Tensor, net: Any) -> Tensor:
        def nearest() -> Tensor:
            flat = a.detach().reshape(-1, WIDTH)
            if int(self.count) == 0:
                self.bank.copy_(torch.linspace(-1, 1, 6, dtype=a.dtype)[:, None].expand(6, WIDTH))
                self.count += 1
            chosen = torch.cdist(flat, self.bank).argmin(1)
            picked = self.bank[chosen]
            self.bank.index_add_(0, chosen, 0.1 * (flat - picked))
            return picked.view(a.shape)

        quantized = net.once(nearest)
        return a + net.once(lambda: quantized - a.detach()) + 0.2 * (a - quantized)

    def by_python_counter(self, a: Tensor, net: Any) -> Tensor:
        def count() -> int:
            self.kept["n"] = self.kept.get("n", 0) + 1
            return self.kept["n"]

        return a / net.once(count)

    def by_swap_of_buffers(self, a: Tensor, net: Any) -> Tensor:
        def swap() -> Tensor:
            self.mean, self.kept["other"] = self.kept.get("other", self.mean + 1.0), self.mean
            return self.mean

        return a * net.once(swap)

    def by_random_projection(self, a: Tensor, net: Any) -> Tensor:
        if "projection" not in self.kept:
            self.kept["projection"] = torch.linspace(-1, 1, WIDTH * WIDTH, dtype=a.dtype).view(WIDTH, WIDTH)
        return a @ self.kept["projection"] + a


@dataclass
class Answer:
    hidden: Tensor
    extra: Tensor | None = None


class Talkative(nn.Module):
    """Returns what it computes in the shape that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.act = nn.Tanh()

    def forward(self, x: Any, how: str = "tensor", *, gate: Tensor | None = None, **more: Any) -> Any:
        if isinstance(x, dict):
            x = x["hidden"]
        elif isinstance(x, tuple):
            x = x[0]
        if how == "input":
            return x
        out = self.act(self.linear(x))
        if gate is not None:
            out = out * gate
        forms = {"tuple": (out, None), "dict": {"hidden": out, "n": 3}, "answer": Answer(out), "list": [out, x]}
        return forms.get(how, out)


class Calls(Ways):
    """Modules called again, in other numbers, with other arguments, under hooks and parametrizations."""

    inexact = frozenset({"by_spectral_norm"})

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.talk = Talkative()
        self.stack = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.several = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("one", "two")})
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.spectral = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.tilted = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.tilted, "weight", Symmetric())

    def by_twice(self, a: Tensor, net: Any) -> Tensor:
        return self.inner(self.act(self.inner(a)))

    def by_loop(self, a: Tensor, net: Any) -> Tensor:
        for _ in range(1 + net.k % 3):
            a = self.talk(a)
        return a

    def by_keyword(self, a: Tensor, net: Any) -> Tensor:
        return self.talk(x=a, gate=torch.sigmoid(a), unused=None)

    def by_tuple(self, a: Tensor, net: Any) -> Tensor:
        return self.talk((a, None), "tuple")[0]

    def by_dict(self, a: Tensor, net: Any) -> Tensor:
        return self.talk({"hidden": a}, how="dict")["hidden"] + a

    def by_answer(self, a: Tensor, net: Any) -> Tensor:
        return self.talk(a, "answer", gate=None).hidden * 2

    def by_list(self, a: Tensor, net: Any) -> Tensor:
        one, other = self.talk(a, "list")
        return one + other

    def by_input(self, a: Tensor, net: Any) -> Tensor:
        return self.talk(self.talk(a, "input")) + self.talk(a, "input")

    def by_input_alone(self, a: Tensor, net: Any) -> Tensor:
        return self.talk(a, "input")

    def by_gate_at_times(self, a: Tensor, net: Any) -> Tensor:
        return self.talk(a, gate=a * 0.5 if net.k % 2 else None)

    def by_forward(self, a: Tensor, net: Any) -> Tensor:
        return self.talk.forward(a) + self.talk(a)

    def by_order(self, a: Tensor, net: Any) -> Tensor:
        names = ["one", "two"] if net.k % 2 else ["two", "one"]
        for name in names:
            a = torch.tanh(self.several[name](a))
        return a

    def by_one_of_two(self, a: Tensor, net: Any) -> Tensor:
        return self.several["one" if net.k % 2 else "two"](a) + a

    def by_experts(self, a: Tensor, net: Any) -> Tensor:
        flat = a.reshape(-1, WIDTH)
        chosen = torch.randint(0, 2, (len(flat),))
        out = torch.zeros_like(flat)
        for k, name in enumerate(("one", "two")):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, self.several[name](flat[rows]))
        return out.view_as(a)

    def by_stochastic_depth(self, a: Tensor, net: Any) -> Tensor:
        return a + self.talk(a) if float(torch.rand(())) < 0.5 else a * 1.1

    def by_hook(self, a: Tensor, net: Any) -> Tensor:
        handle = self.inner.register_forward_hook(lambda m, args, out: out * 0.5)
        try:
            return self.inner(a) + a
        finally:
            handle.remove()

    def by_hook_before(self, a: Tensor, net: Any) -> Tensor:
        handle = self.talk.linear.register_forward_hook(lambda m, args, out: out.mul_(0.5))
        pre = self.talk.register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
        try:
            return self.talk(a)
        finally:
            handle.remove()
            pre.remove()

    def by_hook_with_names(self, a: Tensor, net: Any) -> Tensor:
        pre = self.talk.register_forward_pre_hook(lambda m, args, kw: (args, {**kw, "gate": a}), with_kwargs=True)
        try:
            return self.talk(a)
        finally:
            pre.remove()

    def by_hook_at_times(self, a: Tensor, net: Any) -> Tensor:
        if net.k % 3 == 1:
            return self.by_hook(a, net)
        return self.inner(a) + a

    def by_weight_norm(self, a: Tensor, net: Any) -> Tensor:
        return self.normed(a) + self.normed(a * 0.5)

    def by_spectral_norm(self, a: Tensor, net: Any) -> Tensor:
        return self.spectral(a) + a if self.training else self.spectral(a)

    def by_parametrization(self, a: Tensor, net: Any) -> Tensor:
        with parametrize.cached():
            return self.tilted(a) + self.tilted(a)

    def by_functional_call(self, a: Tensor, net: Any) -> Tensor:
        given = {name: p * 0.9 for name, p in self.talk.named_parameters()}
        return torch.func.functional_call(self.talk, given, (a,), {"how": "list"})[0]

    def by_checkpoint(self, a: Tensor, net: Any) -> Tensor:
        return checkpoint(self.talk, a, use_reentrant=False, gate=torch.sigmoid(a))

    def by_checkpoint_of_draws(self, a: Tensor, net: Any) -> Tensor:
        def run(v: Tensor) -> Tensor:
            eps = torch.randn_like(v)
            eps.mul_(0.3)
            return self.talk(v) + eps

        return checkpoint(run, a, use_reentrant=False)

    def by_checkpoints(self, a: Tensor, net: Any) -> Tensor:
        return checkpoint_sequential(self.stack, 2, a, use_reentrant=False)

    def by_vmap(self, a: Tensor, net: Any) -> Tensor:
        return torch.vmap(lambda row: torch.softmax(row, -1) * row.sum())(a)

    def by_autocast(self, a: Tensor, net: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=net.k % 2 == 1):
            return (self.inner(a) + a).to(a.dtype)

    def by_parts(self, a: Tensor, net: Any) -> Tensor:
        return self.stack[:2](a) + self.stack[2](a)

    def by_weights_shared_by_hand(self, a: Tensor, net: Any) -> Tensor:
        return F.linear(F.linear(a, self.inner.weight), self.inner.weight.t(), self.inner.bias)

    def by_weights_of_others(self, a: Tensor, net: Any) -> Tensor:
        return a @ (self.inner.weight + self.several["one"].weight.detach())

    def by_bank_of_weights(self, a: Tensor, net: Any) -> Tensor:
        w = torch.stack([module.weight for module in self.several.values()])
        return torch.einsum("...i,koi->...o", a, w)

    def by_low_rank(self, a: Tensor, net: Any) -> Tensor:
        delta = self.several["one"].weight[:, :1] @ self.several["two"].weight[:1]
        return F.linear(a, self.inner.weight.detach() + delta, self.inner.bias)

    def by_swapped_attribute(self, a: Tensor, net: Any) -> Tensor:
        before, self.talk.act = self.talk.act, [nn.Tanh(), nn.ReLU()][net.k % 2]
        try:
            return self.talk(a)
        finally:
            self.talk.act = before

    def by_generator(self, a: Tensor, net: Any) -> Tensor:
        return sum(module(a) for module in self.several.values())

    def by_rows_one_by_one(self, a: Tensor, net: Any) -> Tensor:
        return torch.stack([self.talk(row) for row in a])


class Symmetric(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


class Both(torch.autograd.Function):
    """Two results, and an attribute of the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, power: float) -> tuple[Tensor, Tensor]:
        ctx.power = power
        ctx.save_for_backward(x, y)
        return x * y, x + power * y

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        return gs[0] * y + gs[1], gs[0] * x + ctx.power * gs[1], None


class OnlyOne(torch.autograd.Function):
    """Two results of which one has no slope, and no gradients where nothing comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        order = x.argsort(-1)
        ctx.mark_non_differentiable(order)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(order)
        return x.gather(-1, order), order

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gs: Tensor) -> Tensor | None:
        if gs[0] is None:
            return None
        (order,) = ctx.saved_tensors
        return torch.zeros_like(gs[0]).scatter(-1, order, gs[0])


class Dirty(torch.autograd.Function):
    """Writes to its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(0.5)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Tensor:
        return gs[0] * 0.5


class Stored(torch.autograd.Function):
    """Keeps tensors as attributes of the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x, w
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor, Tensor]:
        g = gs[0].reshape(-1, WIDTH)
        return gs[0] @ ctx.w.t(), ctx.x.reshape(-1, WIDTH).t() @ g


class Separate(torch.autograd.Function):
    """The newer form, with a context that is set up apart."""

    @staticmethod
    def forward(x: Tensor, by: Tensor) -> Tensor:
        return x.sin() * by

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor, Tensor]:
        x, by = ctx.saved_tensors
        return gs[0] * x.cos() * by, (gs[0] * x.sin()).sum_to_size(by.shape)


class Reversed(torch.autograd.Function):
    """Its input, and the gradient with another sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor, None]:
        return -ctx.by * gs[0], None


class Rounded(torch.autograd.Function):
    """Rounds, and lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Tensor:
        return gs[0]


class Clipped(torch.autograd.Function):
    """Its input, and a gradient that is clipped: no multiple of what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Tensor:
        return gs[0].clamp(-0.01, 0.01)


class Functions(Ways):
    """Autograd functions of the user's own."""

    inexact = frozenset({"by_reversed", "by_clipped", "by_rounded"})

    def by_both(self, a: Tensor, net: Any) -> Tensor:
        one, other = Both.apply(a, self.inner(a), 0.5 + net.k)
        return one + other

    def by_first(self, a: Tensor, net: Any) -> Tensor:
        return Both.apply(a, self.inner(a), 0.5)[0]

    def by_sorted(self, a: Tensor, net: Any) -> Tensor:
        return OnlyOne.apply(a)[0] * torch.arange(1, WIDTH + 1).to(a)

    def by_order_alone(self, a: Tensor, net: Any) -> Tensor:
        return a.gather(-1, OnlyOne.apply(a)[1])

    def by_dirty(self, a: Tensor, net: Any) -> Tensor:
        return Dirty.apply(self.inner(a))

    def by_stored(self, a: Tensor, net: Any) -> Tensor:
        return Stored.apply(a, self.inner.weight)

    def by_separate(self, a: Tensor, net: Any) -> Tensor:
        return Separate.apply(a, self.inner.bias) + a

    def by_reversed(self, a: Tensor, net: Any) -> Tensor:
        return Reversed.apply(a, 0.1 * net.k)

    def by_rounded(self, a: Tensor, net: Any) -> Tensor:
        return Rounded.apply(a)

    def by_clipped(self, a: Tensor, net: Any) -> Tensor:
        return Clipped.apply(a)

    def by_constant(self, a: Tensor, net: Any) -> Tensor:
        return a * Rounded.apply(self.mean + 0.5)

    def by_drawn(self, a: Tensor, net: Any) -> Tensor:
        eps = torch.randn_like(a)
        eps.mul_(0.5)
        return Both.apply(a, eps, 1.0)[1]

    def by_weight(self, a: Tensor, net: Any) -> Tensor:
        return F.linear(a, Rounded.apply(self.inner.weight), self.inner.bias)

    def by_twice(self, a: Tensor, net: Any) -> Tensor:
        one, other = Both.apply(a, a, 2.0)
        return Both.apply(one, other, 0.5)[1] + a


class Picked(Ways):
    """Operations of many sorts, above all those that pick, sort and mask."""

    inexact = frozenset(
        {"by_top", "by_sort", "by_cummax", "by_argmax", "by_median", "by_maximum_pool", "by_hard_mask", "by_quantile"}
    )

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.batch = nn.BatchNorm1d(WIDTH)
        self.group = nn.GroupNorm(2, WIDTH)
        self.bag = nn.EmbeddingBag(6, WIDTH, mode=rng.choice(["sum", "mean"]))
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.prelu = nn.PReLU()

    def by_top(self, a: Tensor, net: Any) -> Tensor:
        values, where = a.topk(2, -1)
        return a + values.sum(-1, keepdim=True) + a.gather(-1, where).prod(-1, keepdim=True)

    def by_sort(self, a: Tensor, net: Any) -> Tensor:
        return a.sort(-1, descending=True)[0] * torch.arange(WIDTH).to(a)

    def by_cummax(self, a: Tensor, net: Any) -> Tensor:
        return a.cummax(-1)[0] + a.cumsum(-1) * 0.3

    def by_argmax(self, a: Tensor, net: Any) -> Tensor:
        return a + F.one_hot(a.argmax(-1), WIDTH).to(a) * a

    def by_median(self, a: Tensor, net: Any) -> Tensor:
        return a - a.median(-1, keepdim=True)[0] + a.kthvalue(2, -1, keepdim=True)[0]

    def by_quantile(self, a: Tensor, net: Any) -> Tensor:
        return a - a.quantile(0.3, -1, keepdim=True)

    def by_maximum_pool(self, a: Tensor, net: Any) -> Tensor:
        return F.max_pool1d(a.reshape(-1, 1, WIDTH), 3, 1, 1).view_as(a) + a

    def by_hard_mask(self, a: Tensor, net: Any) -> Tensor:
        return torch.where(a > 0.2, a, 0.1 * a) + (a > a.mean()) * a

    def by_bmm(self, a: Tensor, net: Any) -> Tensor:
        flat = a.reshape(a.shape[0], -1, WIDTH)
        scores = torch.bmm(flat, self.inner(flat).transpose(1, 2)).softmax(-1)
        return torch.einsum("bij,bjd->bid", scores, flat).reshape(a.shape) + a

    def by_attention(self, a: Tensor, net: Any) -> Tensor:
        q = a.reshape(1, -1, WIDTH).repeat(2, 1, 1)
        mask = torch.rand(q.shape[1], q.shape[1]) > 0.4
        mask.fill_diagonal_(True)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, self.inner(q), q, attn_mask=mask)[0].view_as(a) + a

    def by_causal_attention(self, a: Tensor, net: Any) -> Tensor:
        q = a.reshape(1, 1, -1, WIDTH)
        return F.scaled_dot_product_attention(q, q, self.inner(q), is_causal=True).view_as(a) + a

    def by_bag(self, a: Tensor, net: Any) -> Tensor:
        where = torch.randint(0, 6, (a.shape[0], 3))
        e = self.bag(where)
        return a + (e if a.ndim == 2 else e[:, None])

    def by_bag_of_offsets(self, a: Tensor, net: Any) -> Tensor:
        sizes = torch.randint(1, 4, (a.shape[0],))
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
        e = self.bag(torch.randint(0, 6, (int(sizes.sum()),)), offsets)
        return a * (e if a.ndim == 2 else e[:, None])

    def by_batch_norm(self, a: Tensor, net: Any) -> Tensor:
        self.batch.train(net.k % 3 != 2)
        return net.once(lambda: self.batch.running_mean + 0.0) + (
            F.batch_norm(a.reshape(-1, WIDTH), None, None, self.batch.weight, self.batch.bias, True).view_as(a)
        )

    def by_group_norm(self, a: Tensor, net: Any) -> Tensor:
        return self.group(a.reshape(-1, WIDTH)).view_as(a)

    def by_instance_norm(self, a: Tensor, net: Any) -> Tensor:
        return F.instance_norm(a.reshape(1, -1, WIDTH)).view_as(a) + a

    def by_norm(self, a: Tensor, net: Any) -> Tensor:
        return F.normalize(a, dim=-1) + F.rms_norm(a, (WIDTH,)) * 0.5

    def by_fft(self, a: Tensor, net: Any) -> Tensor:
        f = torch.fft.rfft(a, dim=-1)
        return torch.fft.irfft(f * torch.tensor([1.0, 0.5, 0.0], dtype=a.dtype), n=WIDTH, dim=-1)

    def by_fft_size(self, a: Tensor, net: Any) -> Tensor:
        return torch.fft.fft(a, dim=-1).abs() * 0.3 + a

    def by_conv(self, a: Tensor, net: Any) -> Tensor:
        maps = self.conv(a.reshape(1, 1, -1, WIDTH))
        return (maps[:, 0] * maps[:, 1]).view_as(a) + a

    def by_shuffle(self, a: Tensor, net: Any) -> Tensor:
        grown = F.interpolate(a.reshape(-1, 1, WIDTH), scale_factor=2, mode="linear")
        return F.avg_pool1d(F.pad(grown, (1, 1), mode="reflect"), 2, 2, ceil_mode=False)[..., :WIDTH].view_as(a)

    def by_bilinear(self, a: Tensor, net: Any) -> Tensor:
        return self.prelu(self.bilinear(a, a))

    def by_distance(self, a: Tensor, net: Any) -> Tensor:
        flat = a.reshape(-1, WIDTH)
        return torch.softmax(-torch.cdist(flat, self.inner.weight), -1).view_as(a) + F.cosine_similarity(
            a, self.inner.bias.expand_as(a), -1
        ).unsqueeze(-1)

    def by_solve(self, a: Tensor, net: Any) -> Tensor:
        w = self.inner.weight @ self.inner.weight.t() + torch.eye(WIDTH, dtype=a.dtype)
        return torch.linalg.solve(w, a.reshape(-1, WIDTH).t()).t().reshape(a.shape) + torch.linalg.cholesky(w).sum()

    def by_expm(self, a: Tensor, net: Any) -> Tensor:
        return a @ torch.matrix_exp(0.3 * self.inner.weight) * torch.logdet(torch.eye(WIDTH).to(a) * 2)

    def by_svd(self, a: Tensor, net: Any) -> Tensor:
        _, s, _ = torch.linalg.svd(self.inner.weight)
        return self.inner(a) / s[0]

    def by_moments(self, a: Tensor, net: Any) -> Tensor:
        var, mean = torch.var_mean(a, -1, keepdim=True)
        return (a - mean) / (var + 0.1).sqrt() + a.std() + a.logsumexp(-1, keepdim=True)

    def by_products(self, a: Tensor, net: Any) -> Tensor:
        return a.cumprod(-1) + a.prod(-1, keepdim=True) + torch.logcumsumexp(a, -1)

    def by_mask_of_other_counts(self, a: Tensor, net: Any) -> Tensor:
        chosen = a[net.mask]
        return a + chosen.sum(0) / len(chosen) + torch.where(net.mask.any(), a, a * 2)

    def by_segments(self, a: Tensor, net: Any) -> Tensor:
        group = torch.randint(0, 2, (a.shape[0],))
        _, back = torch.unique(group, return_inverse=True)
        sums = torch.zeros(2, *a.shape[1:], dtype=a.dtype).index_add(0, back, a)
        return a - sums[back] / torch.bincount(back, minlength=2).clamp(min=1)[back].view(-1, *[1] * (a.ndim - 1))

    def by_search(self, a: Tensor, net: Any) -> Tensor:
        edges = torch.linspace(0, 1, 5, dtype=a.dtype)
        where = net.once(lambda: torch.bucketize(a.detach(), edges).clamp(max=4))
        return a * edges[where] + torch.tensor([0.1, 0.5, 1.0, 0.3, 0.2], dtype=a.dtype)[where]

    def by_packed(self, a: Tensor, net: Any) -> Tensor:
        lengths = torch.arange(1, a.shape[0] + 1).clamp(max=3)
        padded = torch.nn.utils.rnn.pad_sequence(
            [a.reshape(-1, WIDTH)[:1].expand(n, -1) for n in lengths.tolist()], True
        )
        return a + padded.sum((0, 1))

    def by_meshgrid(self, a: Tensor, net: Any) -> Tensor:
        return torch.kron(a.reshape(-1, WIDTH), torch.ones(1, 2, dtype=a.dtype))[:, ::2].reshape(a.shape) * 1.1

    def by_fold(self, a: Tensor, net: Any) -> Tensor:
        windows = F.pad(a, (1, 1)).unfold(-1, 3, 1)
        return (windows * torch.tensor([0.2, 0.5, 0.3], dtype=a.dtype)).sum(-1)

    def by_takes(self, a: Tensor, net: Any) -> Tensor:
        return torch.take_along_dim(a, torch.tensor([3, 1, 0, 2]).expand_as(a), -1) + a.index_select(
            -1, torch.tensor([0, 0, 1, 1])
        )


MORE: list[type[Ways]] = [Remembers, Calls, Functions, Picked]
