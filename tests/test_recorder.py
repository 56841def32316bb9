"""What is recorded of a step, against plain autograd on the uncut module, and against states relaxed by hand.

The oracles know nothing of records: autograd differentiates the same loss once more, and a relaxation is written out
with states as leaves. Each case is asked over several steps, in which weights move and batches change.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader
from two_ways import CHANGING, Box, small

import lightning_ebm as ebm

Step = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
STEPS = 4


def batch(index: int, like: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The third is smaller."""
    generator = torch.Generator().manual_seed(index)
    count = 4 if index == 2 else 6
    return torch.randn(count, 6, generator=generator, dtype=torch.float64).to(like), torch.arange(count) % 3


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Random generators and buffers are afterwards as they were."""
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    parameters = {name: value.detach().clone() for name, value in net.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        yield
    with torch.no_grad():
        for name, value in net.named_buffers():
            value.copy_(buffers[name])
        for name, value in net.named_parameters():
            if name in parameters:
                value.copy_(parameters[name])


def by_autograd(net: nn.Module, closure: Callable[[], Tensor]) -> dict[str, Tensor]:
    with untouched(net):
        loss = closure()
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest element of all."""
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    missing = expected.keys() - found.keys()
    assert all(not bool(expected[name].any()) for name in missing), missing
    return max(float((found[name] - g).abs().max()) for name, g in expected.items() if name in found) / scale


def agrees(
    make: Callable[[], nn.Module], step: Step, room: float = 1e-10, nudged: float = 5e-3, weak="pc-nudge"
) -> None:
    """Exact rule, weak nudge, and the same by code, over some steps of training."""
    updates: dict[tuple[str, bool], list[dict[str, Tensor]]] = {}
    for preset in ("zero-divergence", "pc-nudge"):
        for capture in (False, True):
            torch.manual_seed(0)
            net = make().double()
            learner = ebm.Learner(net, weak if preset == "pc-nudge" else preset, capture=capture)
            made = updates[preset, capture] = []
            for index in range(STEPS):
                x, y = batch(index)
                runs = [0]

                def closure(net=net, x=x, y=y, index=index, runs=runs) -> Tensor:
                    runs[0] += 1
                    return step(net, x, y, index)

                expected = by_autograd(net, closure)
                found = learner.gradients(closure)
                assert runs == [2]  # once by autograd, once by the learner
                assert off(found, expected) < (room if preset == "zero-divergence" else nudged), (preset, index)
                made.append(found)
                with torch.no_grad():
                    for name, parameter in net.named_parameters():
                        if name in expected:
                            parameter -= 0.1 * expected[name]
    for preset in ("zero-divergence", "pc-nudge"):
        for plain, fast in zip(updates[preset, False], updates[preset, True], strict=True):
            assert plain.keys() == fast.keys()
            assert off(fast, plain) < (room if preset == "zero-divergence" else max(1e-9, room))


BY_COUNT = ebm.algorithm("pc-nudge", relaxer=ebm.ErrorCoordinates(6, lr=1.0, tol=0.0))
"""For gradients that are not those of the values: no relaxer that compares energies can go by them."""


def mlp(act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 3))


def between(change: Callable[[Tensor, int], Tensor]) -> Step:
    """A step that does something to the first hidden layer."""

    def step(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
        return F.cross_entropy(net[2:](change(net[:2](x), index)), y)

    return step


# --------------------------------------------------------------------------------------------------- in place


def halves(h: Tensor, index: int) -> Tensor:
    h = h * 1.0
    first, second = h[:, :4], h.narrow(1, 4, 4)
    first.mul_(second.clone())
    second += 0.5 * index
    return h


def a_column(h: Tensor, index: int) -> Tensor:
    h = h.clone()
    h.select(1, 2).copy_(h[:, 3].exp())
    return h


def slices(h: Tensor, index: int) -> Tensor:
    h = h + 0.0
    h[:, 1:5:2] = h[:, :2] * (1 + index)
    h[0, 3] = 0.25
    return h


def a_turned_view(h: Tensor, index: int) -> Tensor:
    h = h * 2.0
    turned = h.t()
    turned[1].mul_(turned[2].clone())
    turned[4:6].tanh_()
    return h + turned.t()


def a_view_of_a_view(h: Tensor, index: int) -> Tensor:
    h = h * 2.0
    pieces = h.view(len(h), 2, 4)
    pieces[:, 0].narrow(1, 1, 2).sub_(pieces[:, 1, :2].clone().square())
    return h.flatten().view_as(h)


def through_the_flat_one(h: Tensor, index: int) -> Tensor:
    h = h * 1.0
    flat, column = h.view(-1), h[:, 0]
    flat[::2] *= 0.5
    return h * column[:, None]


def what_was_before_and_after(h: Tensor, index: int) -> Tensor:
    before = h * 1.0
    kept = before * 0.5
    before.add_(kept)
    return before + kept


def masks_filled(h: Tensor, index: int) -> Tensor:
    h = h * 1.0
    h.masked_fill_(torch.arange(8) == index, 0.3)
    h[torch.arange(len(h)), torch.arange(len(h)) % 8] = 0.1
    return h


def put_by_index(h: Tensor, index: int) -> Tensor:
    out = torch.zeros(len(h), 8, dtype=h.dtype)
    out.index_put_((torch.arange(len(h)), torch.arange(len(h)) % 8), h[:, index], accumulate=True)
    out.index_add_(1, torch.tensor([1, 2]), h[:, :2])
    out.scatter_(1, torch.full((len(h), 1), 5), h[:, 1:2])
    return out


def activations_in_place(h: Tensor, index: int) -> Tensor:
    h = h * 3.0
    return F.relu_(h.add_(1.0).mul_(0.5).clamp_(-0.2, 0.6).neg_().add_(0.4))


def addcmul_and_friends(h: Tensor, index: int) -> Tensor:
    out = torch.zeros_like(h)
    out.addcmul_(h, h, value=0.5).addcdiv_(h, h.square() + 1.0, value=0.2).lerp_(h, 0.3)
    return out.add_(h, alpha=1.0 + index)


def zeroed_and_filled(h: Tensor, index: int) -> Tensor:
    h = h * 1.0
    h[:, 0].zero_()
    h[:, 1].fill_(0.7)
    h[:, 2].fill_(h[:, 3].sum().detach())
    return h


def collected_row_by_row(h: Tensor, index: int) -> Tensor:
    out = torch.empty_like(h)
    for row in range(len(h)):
        out[row] = h[row] * (row + 1) / 3
    return out


def turned_in_place(h: Tensor, index: int) -> Tensor:
    h = h * 1.0
    h.transpose_(0, 1)
    h.unsqueeze_(0)
    return h.squeeze_(0).t()


def another_type_is_copied_in(h: Tensor, index: int) -> Tensor:
    out = torch.zeros(len(h), 8, dtype=torch.float64)
    out[:, :4] = h[:, 4:].expand(1, -1, -1)
    out[:, 4:].copy_(h[0, :4])
    return out


IN_PLACE = [halves, a_column, slices, a_turned_view, a_view_of_a_view, through_the_flat_one, what_was_before_and_after,
            masks_filled, put_by_index, activations_in_place, addcmul_and_friends, zeroed_and_filled,
            collected_row_by_row, turned_in_place, another_type_is_copied_in]  # fmt: skip


@pytest.mark.parametrize("change", IN_PLACE, ids=lambda change: change.__name__)
def test_writing_in_place(change: Callable[[Tensor, int], Tensor]) -> None:
    agrees(mlp, between(change))


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("mean", torch.zeros(8))
        self.seen = torch.zeros(8, dtype=torch.float64)


def a_running_mean(net: Buffered, x: Tensor, y: Tensor, index: int) -> Tensor:
    h = net.net[:2](x)
    with torch.no_grad():
        net.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return F.cross_entropy(net.net[2:](h - net.mean), y)


def a_buffer_replaced(net: Buffered, x: Tensor, y: Tensor, index: int) -> Tensor:
    h = net.net[:2](x)
    loss = F.cross_entropy(net.net[2:](h - net.mean), y)
    net.mean = h.detach().mean(0)
    return loss


def a_buffer_written_through_data(net: Buffered, x: Tensor, y: Tensor, index: int) -> Tensor:
    h = net.net[:2](x) - net.mean
    net.mean.data.copy_(h.detach().mean(0))
    return F.cross_entropy(net.net[2:](h), y)


def a_buffer_read_between_two_writes(net: Buffered, x: Tensor, y: Tensor, index: int) -> Tensor:
    with torch.no_grad():
        net.mean.fill_(0.1 * index)
    h = net.net[:2](x) * net.mean.exp()
    with torch.no_grad():
        net.mean[0] = 5.0
    return F.cross_entropy(net.net[2:](h), y) + (h * net.mean).square().mean()


@pytest.mark.parametrize(
    "step",
    [a_running_mean, a_buffer_replaced, a_buffer_written_through_data, a_buffer_read_between_two_writes],
    ids=lambda step: step.__name__,
)
def test_writing_to_buffers(step: Step) -> None:
    agrees(Buffered, step)


def test_writing_to_a_plain_attribute_happens_once() -> None:
    torch.manual_seed(0)
    net = Buffered().double()
    learner = ebm.Learner(net, "zero-divergence")

    def closure() -> Tensor:
        h = net.net[:2](x)
        net.seen += 1.0
        return F.cross_entropy(net.net[2:](h * net.seen), y)

    for index in range(STEPS):
        x, y = batch(index)
        before = net.seen.clone()
        learner.backward(closure)
        assert torch.equal(net.seen, before + 1)
        found = {name: p.grad.clone() for name, p in net.named_parameters()}
        net.zero_grad()
        net.seen = before
        assert off(found, by_autograd(net, closure)) < 1e-10


HIDDEN_WRITES = {
    "data": lambda h: h.data.clamp_(-0.1, 0.1),
    "a detached view": lambda h: h.detach()[:, 0].zero_(),
    "a view's data": lambda h: h[:, 0].data.zero_(),
}


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("way", HIDDEN_WRITES)
def test_writing_to_a_hidden_tensor_while_gradients_are_off_is_refused_by_name(way: str, capture: bool) -> None:
    def change(h: Tensor, index: int) -> Tensor:
        h = h * 1.0
        HIDDEN_WRITES[way](h)
        return h * 2.0

    net, (x, y) = mlp().double(), batch(0)
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    with pytest.raises(ebm.UnsupportedModuleError, match="while gradients are off"):
        learner.gradients(lambda: between(change)(net, x, y, 0))


DETACHED_WRITES = {
    "clamp": lambda h: h.detach().clamp_(-0.1, 0.1),
    "copy": lambda h: h.detach().copy_(h.detach().sign()),
    "twice": lambda h: h.detach().mul_(0.5).add_(1.0),
    "no_grad": lambda h: torch.no_grad()(h.detach().mul_)(0.5),
}


@pytest.mark.parametrize("way", DETACHED_WRITES)
def test_writing_by_a_detached_name_keeps_the_slope(way: str) -> None:
    def change(h: Tensor, index: int) -> Tensor:
        h = h * 1.0
        kept = h.detach()
        DETACHED_WRITES[way](h)
        return h * 2.0 + kept

    agrees(mlp, between(change))


def in_place_on_a_leaf(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
    """Adversarial inputs: a leaf of the step's own, moved by its gradient."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    with torch.no_grad():
        x.add_(0.1 * slope.sign())
    return F.cross_entropy(net(x.detach()), y)


def test_adversarial_inputs() -> None:
    agrees(mlp, in_place_on_a_leaf)


# ----------------------------------------------------------------------------------------------------- detach


DETACHED = {
    "a target": lambda h, index: h + (h - h.detach()).square(),
    "a factor": lambda h, index: h * h.detach().sigmoid(),
    "by data": lambda h, index: h * h.data.cos(),
    "under no_grad": lambda h, index: h + _constant(h),
    "in place": lambda h, index: h + (h * 0.5).detach_().exp(),
    "from batch to batch": lambda h, index: h + (h.detach() if index % 2 else h).sin(),
    "straight through": lambda h, index: h + (h.round() - h).detach(),
    "torch.tensor": lambda h, index: h * torch.tensor(h).cos(),
    "new_tensor": lambda h, index: h * h.new_tensor(h).cos(),
    "torch.tensor of each row": lambda h, index: h * torch.stack([torch.tensor(row) for row in h]).cos(),
    "torch.tensor, late": lambda h, index: h + (torch.tensor(h.mean(0)) if index == STEPS - 1 else 0.0),
    "nn.Parameter": lambda h, index: h * nn.Parameter(h, requires_grad=False).cos(),
    "half of it": lambda h, index: torch.cat([h[:, :4].detach(), h[:, 4:]], 1),
    "functions that save their input": lambda h, index: h.tanh() * h.exp() * F.softmax(h, 1) / h.square().add(1).sqrt(),
}


@torch.no_grad()
def _constant(h: Tensor) -> Tensor:
    return h.square().mean(0)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("way", DETACHED)
def test_what_the_user_detaches_and_nothing_else_is_cut(way: str) -> None:
    agrees(mlp, between(DETACHED[way]))


# -------------------------------------------------------------------------------------------- double backward


def penalty(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
    """Of gradients of the output with respect to the input, as critics have."""
    x = x.clone().requires_grad_()
    out = net(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.cross_entropy(out, y) + 0.1 * (slope.flatten(1).norm(dim=1) - 1).square().mean()


def curvature(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
    """A second derivative, as physics-informed networks have."""
    x = x.clone().requires_grad_()
    u = net(x)[:, 0]
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
    return (second[:, 0] + u - x[:, 1]).square().mean()


def hidden_penalty(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
    """With respect to a hidden layer."""
    h = net[:2](x)
    loss = F.cross_entropy(net[2:](h), y)
    (slope,) = torch.autograd.grad(loss, h, create_graph=True)
    return loss + slope.square().sum()


def learning_to_learn(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
    """One inner step of gradient descent on the weights, through which the outer loss is differentiated."""
    weights = dict(net.named_parameters())
    inner = F.cross_entropy(functional_call(net, weights, (x,)), y)
    slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True, allow_unused=True)
    moved = {name: w - 0.1 * s for (name, w), s in zip(weights.items(), slopes, strict=True)}
    return F.cross_entropy(functional_call(net, moved, (x.flip(0),)), y)


def conv(act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    parts = [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), act(), nn.Conv1d(4, 3, 2), act(), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(15, 3))


SMOOTH: dict[str, Callable[[], nn.Module]] = {
    "tanh": mlp,
    "softplus": lambda: mlp(nn.Softplus),
    "sigmoid": lambda: mlp(nn.Sigmoid),
    "gelu": lambda: mlp(nn.GELU),
    "silu": lambda: mlp(nn.SiLU),
    "elu": lambda: mlp(nn.ELU),
    "convolution": conv,
    "layer norm": lambda: nn.Sequential(*mlp()[:2], nn.LayerNorm(8), *mlp()[2:]),
    "batch norm": lambda: nn.Sequential(*mlp()[:2], nn.BatchNorm1d(8), *mlp()[2:]),
}


@pytest.mark.parametrize("net", SMOOTH)
@pytest.mark.parametrize("step", [penalty, curvature, learning_to_learn], ids=lambda step: step.__name__)
def test_gradients_of_gradients(step: Step, net: str) -> None:
    if net == "batch norm":
        pytest.skip("running statistics are the next test's") if step is learning_to_learn else None
        try:
            x, y = batch(0)
            by_autograd(made := SMOOTH[net]().double(), lambda: step(made, x, y, 0))
        except RuntimeError as error:
            if "order derivatives" not in str(error):
                raise
            pytest.skip(f"torch 2.14 refuses third ones: {error}")
    agrees(SMOOTH[net], step, room=1e-9, nudged=0.05)


def test_gradients_of_gradients_of_a_hidden_layer() -> None:
    agrees(mlp, hidden_penalty, nudged=0.05)


# ------------------------------------------------------------------------------------------------ random draws


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.net, self.draw = mlp(), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2:](self.draw(self.net[:2](x)))


DRAWS: dict[str, Callable[[], Callable[[Tensor], Tensor] | nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.4),
    "dropout in place": lambda: lambda h: F.dropout(h * 1.0, 0.4, inplace=True),
    "functional dropout": lambda: lambda h: F.dropout(h, 0.3),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "dropout of channels": lambda: lambda h: F.dropout1d(h.view(len(h), 4, 2), 0.4).flatten(1),
    "everything dropped": lambda: lambda h: h + F.dropout(h, 1.0),
    "rrelu": lambda: nn.RReLU(),
    "rrelu in place": lambda: lambda h: F.rrelu_(h * 1.0, training=True),
    "rrelu of evaluation": lambda: lambda h: F.rrelu(F.rrelu(h, 0.1, 0.2) + F.rrelu(h - 0.5), 0.2),
    "rrelu of evaluation in place": lambda: lambda h: F.rrelu_(h * 1.0),
    "bernoulli": lambda: lambda h: h * torch.bernoulli(h.detach().sigmoid()),
    "bernoulli of a graph": lambda: lambda h: h * torch.bernoulli(h.sigmoid()),
    "noise": lambda: lambda h: h + 0.1 * torch.randn_like(h) * torch.rand(8, dtype=h.dtype),
    "noise in place": lambda: lambda h: h + torch.empty_like(h).normal_(0, 0.1).exponential_(),
    "gumbel": lambda: lambda h: h * F.gumbel_softmax(h, hard=True),
    "reparametrised": lambda: lambda h: torch.distributions.Normal(h, h.exp()).rsample(),
    "permuted": lambda: lambda h: h[:, torch.randperm(8)],
    "multinomial": lambda: lambda h: h.gather(1, torch.multinomial(h.softmax(1), 8)),
    "native dropout": lambda: lambda h: torch.native_dropout(h, 0.4, True)[0],
    "native dropout, off": lambda: lambda h: torch.native_dropout(h, 0.4, False)[0],
}


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_those_of_the_one_pass(draw: str) -> None:
    agrees(lambda: Drawing(DRAWS[draw]()), lambda net, x, y, index: F.cross_entropy(net(x), y))


def test_a_generator_of_the_users_own_is_drawn_from_once() -> None:
    torch.manual_seed(0)
    net, generator = mlp().double(), torch.Generator().manual_seed(3)
    learner = ebm.Learner(net, "pc-nudge")

    def closure() -> Tensor:
        noise = torch.randn(8, generator=generator, dtype=torch.float64)
        return F.cross_entropy(net[2:](net[:2](x) + noise), y)

    for index in range(STEPS):
        x, y = batch(index)
        before = generator.get_state()
        learner.backward(closure)
        after = generator.get_state()
        generator.set_state(before)
        torch.randn(8, generator=generator, dtype=torch.float64)
        assert torch.equal(after, generator.get_state())


# ------------------------------------------------------------------------------------------------------- masks


MASKS = {
    "of the batch": lambda h, index: (torch.arange(len(h)) % (index + 1)) == 0,
    "of the values": lambda h, index: h[:, 0] > 0.05 * index,
    "of positions": lambda h, index: (torch.arange(len(h)) % (index + 1) == 0).nonzero()[:, 0],
}


@pytest.mark.parametrize("way", MASKS)
def test_masks_that_pick_another_number_each_step(way: str) -> None:
    def step(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
        h = net[:2](x)
        mask = MASKS[way](h, index)
        out = net[2:](h)
        return F.cross_entropy(out, y) + out[mask].square().sum() + h[mask].cos().sum()

    agrees(mlp, step)


def test_selecting_and_putting_by_mask() -> None:
    def change(h: Tensor, index: int) -> Tensor:
        mask = (torch.arange(8) + index) % 3 == 0
        h = h * 1.0
        h[:, mask] = h[:, mask] * 2.0
        h[h > 0.6] = 0.6
        return h + h.masked_select(mask).sum() + torch.where(h > 0, h, h.exp())

    agrees(mlp, between(change))


# -------------------------------------------------------------------------------------------- custom functions


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        return -ctx.alpha * slope, None


class Cube(torch.autograd.Function):
    """In the newer style."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x.square() * slope


class Two(torch.autograd.Function):
    """Two results, of one of which nothing is differentiated; options, and a list of numbers."""

    @staticmethod
    def forward(ctx, x, scales, name):
        assert name == "two"
        ctx.scales = scales
        signs = x.sign()
        ctx.mark_non_differentiable(signs)
        ctx.save_for_backward(signs)
        return x.abs() * scales[0], signs

    @staticmethod
    def backward(ctx, slope, _):
        (signs,) = ctx.saved_tensors
        return ctx.scales[1] * signs * slope, None, None


class Linear(torch.autograd.Function):
    """Parameters go in as well."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        x, weight = ctx.saved_tensors
        return slope @ weight, slope.t() @ x


def _two(h: Tensor, index: int) -> Tensor:
    size, signs = Two.apply(h, (1.0, 0.5 + index), "two")
    return size * signs + h


FUNCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a reversed gradient": lambda h, index: Reversed.apply(h, 0.1 * index + 0.1),
    "the newer style": lambda h, index: Cube.apply(h) + h,
    "several results": _two,
    "one in another": lambda h, index: Reversed.apply(Cube.apply(h), 2.0) + Cube.apply(h),
    "late": lambda h, index: Cube.apply(h) if index == STEPS - 1 else h**3,
    "on a view": lambda h, index: Cube.apply(h.view(len(h), 2, 4)[:, 0]).repeat(1, 2) + h,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_custom_functions(function: str) -> None:
    agrees(mlp, between(FUNCTIONS[function]), weak=BY_COUNT)


def test_custom_functions_run_the_plain_way() -> None:
    """Their backward code may hang on anything."""
    net, (x, y) = mlp().double(), batch(0)
    learner = ebm.Learner(net, "predictive-coding")
    for _ in range(3):
        learner.gradients(lambda: between(lambda h, index: Cube.apply(h))(net, x, y, 0))
    reasons = learner._programs.latest.traced.codes.values()
    assert {str(reason) for reason in reasons} == {"custom functions: Cube"}


def test_custom_functions_of_parameters() -> None:
    def step(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
        return F.cross_entropy(net[3:](Linear.apply(net[:2](x), net[2].weight)), y)

    agrees(mlp, step)


_bound, _reversed = Cube.apply, Reversed.apply


class Keeps(nn.Module):
    """Holds the function that its class names, as networks of spiking or binary units do."""

    def __init__(self) -> None:
        super().__init__()
        self.cube = Cube.apply

    def forward(self, h: Tensor) -> Tensor:
        return self.cube(h)


BOUND: dict[str, Callable[[Tensor, int], Tensor]] = {
    "at the head of a file": lambda h, index: _bound(h) + h,
    "one in another": lambda h, index: _reversed(_bound(h), 2.0) + Cube.apply(h),
    "by a module": lambda h, index: Keeps()(h) + h,
    "late": lambda h, index: _bound(h) if index == STEPS - 1 else h**3,
}


@pytest.mark.parametrize("function", BOUND)
def test_custom_functions_whose_apply_was_taken_before(function: str) -> None:
    agrees(mlp, between(BOUND[function]), weak=BY_COUNT)


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2.0)

    @staticmethod
    def backward(ctx, slope):
        return 2.0 * slope


def test_a_function_that_writes_to_its_input_is_refused_by_name() -> None:
    net, (x, y) = mlp().double(), batch(0)
    learner = ebm.Learner(net, "zero-divergence")
    with pytest.raises(ebm.UnsupportedModuleError, match="Dirty writes to its input"):
        learner.gradients(lambda: F.cross_entropy(net[2:](Dirty.apply(net[:2](x) * 1.0)), y))


def test_torch_is_as_it_was_after_a_step() -> None:
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.hooks import BackwardHook

    def attributes() -> list[object]:
        places = (torch.autograd.Function.__base__, "apply"), (saved_tensors_hooks, "__enter__")
        return [owner.__dict__.get(name) for owner, name in (*places, (BackwardHook, "setup_input_hook"))]

    before, (x, y) = attributes(), batch(0)
    net = mlp().double()
    learner = ebm.Learner(net, "zero-divergence")
    learner.gradients(lambda: F.cross_entropy(net(x), y))
    assert attributes() == before
    with pytest.raises(KeyError):
        learner.gradients(lambda: {}["missing"])
    assert attributes() == before


# ------------------------------------------------------------------------------------------------------- hooks


def _hooked(h: Tensor, index: int) -> Tensor:
    h = h * 1.0
    h.register_hook(lambda slope: 0.3 * slope)
    return h


def _hooked_twice(h: Tensor, index: int) -> Tensor:
    middle = h.view(-1)
    middle.register_hook(lambda slope: slope.flip(0))
    middle.register_hook(lambda slope: (1.0 + index) * slope)
    return middle.view(h.shape)


def _hooked_late(h: Tensor, index: int) -> Tensor:
    h = h * 1.0
    if index >= 2:
        h.register_hook(lambda slope: -slope)
    return h


def _hooked_then_written_to(h: Tensor, index: int) -> Tensor:
    h = h * 1.0
    h.register_hook(lambda slope: 0.5 * slope)
    h.mul_(2.0)
    return h


def _retained(h: Tensor, index: int) -> Tensor:
    h.retain_grad()
    return h


@pytest.mark.parametrize(
    "change", [_hooked, _hooked_twice, _hooked_late, _hooked_then_written_to, _retained], ids=lambda c: c.__name__
)
def test_hooks_on_tensors(change: Callable[[Tensor, int], Tensor]) -> None:
    agrees(mlp, between(change), weak=BY_COUNT)


def test_hooks_on_what_a_layer_returned_or_was_given() -> None:
    def step(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
        drive = net[0](x)
        drive.register_hook(lambda slope: 2.0 * slope)
        h = net[1](drive)
        h.register_hook(lambda slope: 0.3 * slope)
        return F.cross_entropy(net[2:](h), y)

    agrees(mlp, step, weak=BY_COUNT)


def with_hooks(register: Callable[[nn.Sequential], object]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        net = mlp()
        register(net)
        return net

    return made


MODULE_HOOKS = {
    "full backward hook": lambda net: net[2].register_full_backward_hook(lambda m, gi, go: (0.5 * gi[0],)),
    "full backward hook on an activation": lambda net: net[1].register_full_backward_hook(
        lambda m, gi, go: (0.5 * gi[0],)
    ),
    "one that only looks": lambda net: net[1].register_full_backward_hook(lambda m, gi, go: None),
    "full backward pre-hook": lambda net: net[3].register_full_backward_pre_hook(lambda m, go: (2.0 * go[0],)),
    "both": lambda net: (
        net[2].register_full_backward_pre_hook(lambda m, go: (2.0 * go[0],)),
        net[2].register_full_backward_hook(lambda m, gi, go: (0.1 * gi[0],)),
    ),
    "forward hook": lambda net: net[1].register_forward_hook(lambda m, args, out: out * 0.5),
    "forward pre-hook": lambda net: net[2].register_forward_pre_hook(lambda m, args: (args[0].sin(),)),
    "forward hook that writes": lambda net: net[0].register_forward_hook(lambda m, args, out: out.mul_(0.5)),
    "a parameter's hook": lambda net: net[2].weight.register_hook(lambda slope: 0.1 * slope),
}


@pytest.mark.parametrize("hook", MODULE_HOOKS)
def test_hooks_on_modules(hook: str) -> None:
    agrees(with_hooks(MODULE_HOOKS[hook]), lambda net, x, y, index: F.cross_entropy(net(x), y), weak=BY_COUNT)


class Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope.sign()


def _clipped(h: Tensor, bound: float) -> Tensor:
    h = h * 1.0
    h.register_hook(lambda slope: slope.clamp(-bound, bound))
    return h


NOT_PROPORTIONAL = {
    "clipped": lambda h, index: _clipped(h, 1e-3),
    "clipped where it does not show": lambda h, index: _clipped(h, 1.0),
    "signs": lambda h, index: Signs.apply(h),
}


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("way", NOT_PROPORTIONAL)
def test_backward_code_that_is_not_proportional_is_refused(way: str, capture: bool) -> None:
    """Errors between layers come in the scale of the nudge: they would be clipped elsewhere."""
    net, (x, y) = mlp().double(), batch(0)
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    with pytest.raises(ebm.UnsupportedModuleError, match="proportional"):
        learner.gradients(lambda: between(NOT_PROPORTIONAL[way])(net, x, y, 0))


def test_hooks_on_both_sides_of_a_state_are_refused() -> None:
    net, (x, y) = mlp().double(), batch(0)
    net[3].register_full_backward_pre_hook(lambda m, go: (2.0 * go[0],))
    net[3].register_full_backward_hook(lambda m, gi, go: (0.1 * gi[0],))
    learner = ebm.Learner(net, "zero-divergence")
    with pytest.raises(ebm.UnsupportedModuleError, match="backward hooks of modules"):
        learner.gradients(lambda: F.cross_entropy(net(x), y))


# -------------------------------------------------------------------------------------------------- checkpoints


class Saving(nn.Module):
    def __init__(self, reentrant: bool = False, inner: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.net, self.inner, self.reentrant = mlp(), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), inner()), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.inner, self.net[:2](x), use_reentrant=self.reentrant)
        return self.net[2:](h)


@pytest.mark.parametrize("inner", [nn.Identity, lambda: nn.Dropout(0.4), lambda: nn.LayerNorm(8)])
def test_checkpoints_that_are_not_reentrant(inner: Callable[[], nn.Module]) -> None:
    agrees(lambda: Saving(False, inner), lambda net, x, y, index: F.cross_entropy(net(x), y))


def test_checkpoints_in_a_row() -> None:
    def step(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
        return F.cross_entropy(checkpoint_sequential(net, 2, x, use_reentrant=False), y)

    agrees(mlp, step)


@pytest.mark.parametrize("capture", [True, False])
def test_reentrant_checkpoints_are_refused(capture: bool) -> None:
    net, (x, y) = Saving(True).double(), batch(0)
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    with pytest.raises(ebm.UnsupportedModuleError, match="use_reentrant"):
        learner.gradients(lambda: F.cross_entropy(net(x), y))


# -------------------------------------------------------------------------------------------------- recurrences


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.cell, self.act, self.out = cell, nn.Tanh(), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.reshape(len(x), 2, 3)
        if isinstance(self.cell, nn.RNNBase):
            return self.out(self.act(self.cell(sequence)[0][:, -1]))
        state = None
        for t in range(2):
            state = self.cell(sequence[:, t], state)
        return self.out(self.act(state[0] if isinstance(state, tuple) else state))


CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM(3, 4, batch_first=True)),
    "lstm of two layers, both ways, with dropout": lambda: Recurrent(
        nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, dropout=0.3), 8
    ),
    "lstm with a projection": lambda: Recurrent(nn.LSTM(3, 4, batch_first=True, proj_size=2), 2),
    "gru": lambda: Recurrent(nn.GRU(3, 4, batch_first=True)),
    "rnn": lambda: Recurrent(nn.RNN(3, 4, batch_first=True, nonlinearity="relu")),
    "lstm cell": lambda: Recurrent(nn.LSTMCell(3, 4)),
    "gru cell": lambda: Recurrent(nn.GRUCell(3, 4)),
    "rnn cell": lambda: Recurrent(nn.RNNCell(3, 4)),
}


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_layers(cell: str) -> None:
    agrees(CELLS[cell], lambda net, x, y, index: F.cross_entropy(net(x), y))


def test_packed_sequences() -> None:
    def step(net: Recurrent, x: Tensor, y: Tensor, index: int) -> Tensor:
        lengths = 1 + (torch.arange(len(x)) + index) % 2
        packed = rnn.pack_padded_sequence(x.reshape(len(x), 2, 3), lengths, batch_first=True, enforce_sorted=False)
        out, _ = rnn.pad_packed_sequence(net.cell(packed)[0], batch_first=True)
        return F.cross_entropy(net.out(net.act(out.sum(1))), y)

    agrees(CELLS["lstm"], step)


# --------------------------------------------------------------------------------------------------- parameters


def clamped_through_data(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
    for p in net.parameters():
        p.data.clamp_(-0.2, 0.2)
    return F.cross_entropy(net(x), y)


def clamped_between_two_uses(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
    """Autograd's own gradient is of the product as it was: it saved no weight that a constant input needs."""
    h = net[0](x).tanh()
    net[0].weight.data.clamp_(-0.1, 0.1)
    return F.cross_entropy(net[2:](net[1](h + net[0](x))), y)


def normalised_under_no_grad(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
    with torch.no_grad():
        net[2].weight.div_(net[2].weight.norm(dim=1, keepdim=True))
    return F.cross_entropy(net(x), y)


def data_replaced(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
    net[2].weight.data = net[2].weight.data.clone() * 0.9
    return F.cross_entropy(net(x), y)


@pytest.mark.parametrize(
    "step",
    [clamped_through_data, clamped_between_two_uses, normalised_under_no_grad, data_replaced],
    ids=lambda step: step.__name__,
)
def test_weights_that_the_step_writes_to(step: Step) -> None:
    agrees(mlp, step)


@pytest.mark.parametrize("capture", [True, False])
def test_parameters_replaced_frozen_and_freed_between_steps(capture: bool) -> None:
    torch.manual_seed(0)
    net = mlp().double()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(12):
        x, y = batch(index % 2)
        if index == 3:
            net[2].weight = nn.Parameter(net[2].weight.detach() * 1.5)
        if index == 5:
            net[0].requires_grad_(False)
        if index == 7:
            net[0].weight.requires_grad_(True)
            net[2].bias.requires_grad_(False)
        if index == 9:
            net[4] = nn.Linear(8, 3, bias=False).double()
            net.requires_grad_(True)
        expected = by_autograd(net, lambda x=x, y=y: F.cross_entropy(net(x), y))
        found = learner.gradients(lambda x=x, y=y: F.cross_entropy(net(x), y))
        assert found.keys() == expected.keys()
        assert off(found, expected) < 1e-10


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()
        self.again.weight = self.inner.weight
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.again(self.act(self.inner(x))))
        return self.out(self.act(self.inner(h) + F.linear(h, self.inner.weight.t())))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))


class Functional(nn.Module):
    """A network whose weights come from elsewhere: scaled, and called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: self.scale * p for name, p in self.net.named_parameters()}
        return functional_call(self.net, weights, (x,))


class Complex(nn.Module):
    """Complex weights; what is a state is real."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.act, self.after = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
        self.weight = nn.Parameter(0.3 * torch.randn(8, 8, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.before(x))
        mixed = torch.fft.fft(h, dim=1) @ self.weight
        return self.after(self.act(mixed.abs() + mixed.real))


PARAMETERS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), *mlp()[1:]),
    "older weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), *mlp()[1:]),
    "spectral norm": lambda: nn.Sequential(*mlp()[:2], parametrizations.spectral_norm(nn.Linear(8, 8)), *mlp()[3:]),
    "older spectral norm": lambda: nn.Sequential(*mlp()[:2], nn.utils.spectral_norm(nn.Linear(8, 8)), *mlp()[3:]),
    "orthogonal": lambda: nn.Sequential(*mlp()[:2], parametrizations.orthogonal(nn.Linear(8, 8)), *mlp()[3:]),
    "called as a function": Functional,
    "complex": Complex,
    "embedding": lambda: nn.Sequential(Indices(), nn.Embedding(4, 2), nn.Flatten(), nn.Linear(12, 8), *mlp()[1:]),
    "prelu": lambda: mlp(nn.PReLU),
}


class Indices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs().long().clamp_max(3)


@pytest.mark.parametrize("net", PARAMETERS)
def test_parameters_of_every_kind(net: str) -> None:
    if net == "complex":  # `.double()` would drop the imaginary part
        torch.set_default_dtype(torch.float64)
    try:
        agrees(
            PARAMETERS[net] if net != "complex" else _double_already(Complex),
            lambda net, x, y, index: F.cross_entropy(net(x), y),
            room=1e-9,
        )
    finally:
        torch.set_default_dtype(torch.float32)


def _double_already(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        net = make()
        net.double = lambda: net
        return net

    return made


@pytest.mark.parametrize("capture", [True, False])
def test_modules_that_are_built_by_their_first_batch(capture: bool) -> None:
    torch.manual_seed(0)
    net = lazy().double()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(STEPS):
        x, y = batch(index)
        learner.backward(lambda x=x, y=y: F.cross_entropy(net(x), y))
        found = {name: p.grad for name, p in net.named_parameters()}
        net.zero_grad()
        assert off(found, by_autograd(net, lambda x=x, y=y: F.cross_entropy(net(x), y))) < 1e-10


# ----------------------------------------------------------------------------------------------- around the step


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("preset", ["predictive-coding", "zero-divergence"])
def test_running_statistics_are_updated_once_a_step(preset: str, capture: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*mlp()[:2], nn.BatchNorm1d(8), *mlp()[2:]).double()
    twin = nn.Sequential(*mlp()[:2], nn.BatchNorm1d(8), *mlp()[2:]).double()
    twin.load_state_dict(net.state_dict())
    learner = ebm.Learner(net, preset, capture=capture)
    for index in range(STEPS):
        x, y = batch(index)
        learner.backward(lambda x=x, y=y: F.cross_entropy(net(x), y))
        twin(x)
        for name, value in twin.named_buffers():
            assert torch.equal(net.get_buffer(name), value), name


def test_two_learners_in_two_threads() -> None:
    """Each records its own step, custom functions included."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
            with torch.no_grad():
                for p in net.parameters():
                    p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
            learner = ebm.Learner(net, "zero-divergence")
            for index in range(20):
                x, y = batch(100 * seed + index)
                barrier.wait()

                def closure(x=x, y=y, index=index) -> Tensor:
                    return F.cross_entropy(net[2:](Reversed.apply(net[:2](x), 1.0 + index)), y)

                found = learner.gradients(closure)
                expected = dict(
                    zip(found, torch.autograd.grad(closure(), [net.get_parameter(n) for n in found]), strict=True)
                )
                assert off(found, expected) < 1e-10
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("capture", [True, False])
def test_autocast(capture: bool) -> None:
    """Products in bfloat16, as in the user's own pass: as near to it as that rounds."""
    torch.manual_seed(0)
    net = mlp()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(STEPS):
        x, y = batch(index, torch.float32)

        def closure(x=x, y=y) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(net(x), y)

        found, expected = learner.gradients(closure), by_autograd(net, closure)
        assert off(found, expected) < 0.03
        assert {g.dtype for g in found.values()} == {torch.float32}


@pytest.mark.parametrize("capture", [True, False])
def test_train_and_eval_and_more(capture: bool) -> None:
    """Modes, shapes, types and strides that alternate: every step is its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(8), *mlp()[2:]).double()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(12):
        x, y = batch(index % 3)
        net.train(index % 4 < 2)
        x = x.t().contiguous().t() if index % 5 == 0 else x
        weights = torch.ones(len(x), dtype=(torch.float32, torch.float64)[index % 2])

        def closure(x=x, y=y, weights=weights) -> Tensor:
            return (weights * F.cross_entropy(net(x), y, reduction="none")).mean()

        expected = by_autograd(net, closure)
        assert off(learner.gradients(closure), expected) < 1e-10


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("step", CHANGING, ids=lambda step: step.__name__)
def test_steps_that_change_from_batch_to_batch_against_autograd(step, capture: bool) -> None:
    torch.manual_seed(0)
    net = small(Box)().double()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(8):
        pair = batch(index % 4)
        replaced = net.net[2].weight
        expected = by_autograd(net, lambda pair=pair, index=index: step(net, pair, index))
        net.net[2].weight = replaced
        found = learner.gradients(lambda pair=pair, index=index: step(net, pair, index))
        assert off(found, expected) < 1e-10, index


def test_a_tensor_with_a_graph_from_before_the_step_is_refused() -> None:
    net, (x, y) = mlp().double(), batch(0)
    shift = net[2].weight.sum() * 0.1
    learner = ebm.Learner(net, "zero-divergence")
    with pytest.raises(ebm.UnsupportedModuleError, match="computed before it began"):
        learner.gradients(lambda: F.cross_entropy(net(x) + shift, y))


LIKE = {
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda h: torch.full_like(h, 0.3),
    "new_zeros": lambda h: h.new_zeros(h.shape),
    "new_full": lambda h: h.new_full(h.shape, 0.3),
    "rand_like": torch.rand_like,
    "empty_like": lambda h: torch.empty_like(h).fill_(0.2),
}


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("like", LIKE)
def test_a_tensor_with_a_graph_from_before_the_step_may_give_its_shape(like: str, capture: bool) -> None:
    """As libraries of spiking networks begin a sequence, from what their last call left: also one by somebody else."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.act, self.out = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
            self.state = torch.zeros(8, 6, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            self.state = LIKE[like](self.state)
            for _ in range(2):
                self.state = self.act(self.inside(x) + 0.9 * self.state)
            return self.out(self.state)

    torch.manual_seed(0)
    net = Recurrent().double()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(4):
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
        torch.manual_seed(index)
        expected = by_autograd(net, lambda x=x, y=y: F.cross_entropy(net(x), y))
        assert net.state.grad_fn is not None
        torch.manual_seed(index)
        learner.backward(lambda x=x, y=y: F.cross_entropy(net(x), y))
        found = {name: p.grad for name, p in net.named_parameters()}
        assert off(found, expected) < 1e-10
        net.zero_grad()


def _neighbors(index: int, count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return (torch.rand(count, count, generator=generator, dtype=torch.float64) > 0.5).double() + torch.eye(count)


def _on_edges(h: Tensor, index: int) -> Tensor:
    """Edges of another graph in every batch, with weights that states have a part in."""
    edges = _neighbors(index, len(h)).to_sparse().coalesce()
    weights = edges.values() * torch.sigmoid(h[edges.indices()[0]].sum(1))
    return torch.sparse.mm(torch.sparse_coo_tensor(edges.indices(), weights, edges.shape).coalesce().t(), h)


SPARSE = {
    "coordinates": lambda h, index: torch.sparse.mm(_neighbors(index, len(h)).to_sparse(), h),
    "compressed rows": lambda h, index: _neighbors(index, len(h)).to_sparse_csr() @ h,
    "edges": _on_edges,
    "of states": lambda h, index: torch.relu(h - 0.1).to_sparse().to_dense(),
}


@pytest.mark.parametrize("way", SPARSE)
def test_sparse_matrices(way: str) -> None:
    agrees(mlp, between(SPARSE[way]), weak=BY_COUNT)


@pytest.mark.parametrize("layout", ["coordinates", "compressed rows"])
@pytest.mark.parametrize("capture", [True, False])
def test_sparse_matrices_from_outside_of_the_step(layout: str, capture: bool) -> None:
    """A graph that the module holds, and batches that are sparse themselves, with other elements in each."""
    to_sparse = Tensor.to_sparse if layout == "coordinates" else Tensor.to_sparse_csr
    net, graph = mlp().double(), to_sparse(_neighbors(0))
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(6):
        x, y = batch(index)
        given = to_sparse(x * (x > 0))

        def loss(given: Tensor = given, y: Tensor = y) -> Tensor:
            h = given @ net[0].weight.T + net[0].bias
            return F.cross_entropy(net[2:]((graph @ net[1](h).T).T), y)

        found = learner.gradients(loss)
        true = torch.autograd.grad(loss(), list(net.parameters()))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found.values(), true, strict=True))


class Image(Tensor):
    """As libraries of pictures have them: a tensor with a name."""


def test_subclasses_of_tensors_are_told_from_graphs_of_before() -> None:
    net, (x, y) = mlp().double(), batch(0)
    picture = x.as_subclass(Image)
    with pytest.raises(ebm.UnsupportedModuleError, match=r"class Image.*as_subclass\(torch\.Tensor\)"):
        ebm.Learner(net, "zero-divergence").gradients(lambda: F.cross_entropy(net(picture), y))
    plain = lambda: F.cross_entropy(net(picture.as_subclass(Tensor)), y)  # noqa: E731
    found = ebm.Learner(net, "zero-divergence").gradients(plain)
    true = torch.autograd.grad(plain(), list(net.parameters()))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found.values(), true, strict=True))


@pytest.mark.parametrize("way", ["log", "metric", "print"])
def test_what_only_looks_changes_nothing(way: str) -> None:
    seen: list[object] = []

    def step(net: nn.Sequential, x: Tensor, y: Tensor, index: int) -> Tensor:
        out = net(x)
        if way == "log":
            seen.append(float(out.detach().max()))
        elif way == "metric":
            seen.append((out.argmax(1) == y).float().mean())
        else:
            seen.append(str(out))
        return F.cross_entropy(out, y)

    agrees(mlp, step)


# ----------------------------------------------------------------------------------- against states moved by hand


class ByHand:
    """A network of two hidden layers as three functions, and its module; nothing here knows of records.

    Args:
        first: the first layer's prediction, from the input.
        second: the second's, from input and first state.
        loss: from input, both states and the labels.
    """

    def __init__(self, first, second, loss) -> None:
        self.first, self.second, self.loss = first, second, loss

    def relaxed(self, net: nn.Module, x: Tensor, y: Tensor, strength: float, lr: float, steps: int):
        """The update of predictive coding: I = sum of squares / 2, E = I + strength * B * loss."""
        count = len(x)

        def energy(one: Tensor, two: Tensor) -> Tensor:
            internal = (one - self.first(net, x)).square().sum() + (two - self.second(net, x, one)).square().sum()
            return 0.5 * internal + strength * count * self.loss(net, x, one, two, y)

        with torch.no_grad():
            one = self.first(net, x)
            two = self.second(net, x, one)
        for _ in range(steps):
            one, two = one.detach().requires_grad_(), two.detach().requires_grad_()
            slopes = torch.autograd.grad(energy(one, two), (one, two))
            one, two = one - lr * slopes[0], two - lr * slopes[1]
        named = dict(net.named_parameters())
        found = torch.autograd.grad(energy(one.detach(), two.detach().requires_grad_()), list(named.values()))
        return {name: g / (strength * count) for name, g in zip(named, found, strict=True)}


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Tanh()


def plain_first(net, x):
    return torch.tanh(net.one(x))


def skip_and_in_place(net, x, one):
    """What the module below writes in place, written out of place."""
    left, right = one[:, :4], one[:, 4:]
    return torch.tanh(net.two(torch.cat([left * right, right + 0.5], 1)) + one)


def module_in_place(net, x, y):
    one = net.act(net.one(x))
    h = one * 1.0
    left, right = h[:, :4], h[:, 4:]
    left.mul_(right.clone())
    right += 0.5
    two = net.act(net.two(h) + one)
    return F.cross_entropy(net.out(two), y)


def entropy(net, x, one, two, y):
    return F.cross_entropy(net.out(two), y)


def simple_second(net, x, one):
    return torch.tanh(net.two(one))


def with_a_penalty(net, x, one, two, y):
    """A gradient inside the loss: of the read-out with respect to the state it reads."""
    out = net.out(two).square().sum()
    two = two if two.requires_grad else two.requires_grad_()
    (slope,) = torch.autograd.grad(net.out(two).square().sum(), two, create_graph=True)
    return F.cross_entropy(net.out(two), y) + 0.01 * slope.square().mean() + 0.0 * out


def module_with_a_penalty(net, x, y):
    two = net.act(net.two(net.act(net.one(x))))
    out = net.out(two)
    (slope,) = torch.autograd.grad(out.square().sum(), two, create_graph=True)
    return F.cross_entropy(out, y) + 0.01 * slope.square().mean()


def cubed_second(net, x, one):
    return torch.tanh(net.two(one**3))


def module_with_a_function(net, x, y):
    return F.cross_entropy(net.out(net.act(net.two(Cube.apply(net.act(net.one(x)))))), y)


def masked_loss(net, x, one, two, y):
    keep = torch.arange(len(x)) % 2 == 0
    return F.cross_entropy(net.out(two)[keep], y[keep]) + one[keep].square().mean()


def module_with_a_mask(net, x, y):
    one = net.act(net.one(x))
    two = net.act(net.two(one))
    keep = torch.arange(len(x)) % 2 == 0
    return F.cross_entropy(net.out(two)[keep], y[keep]) + one[keep].square().mean()


def detached_second(net, x, one):
    """What is detached is a constant of the recorded pass."""
    return torch.tanh(net.two(one) + plain_first(net, x).detach().sin())


def module_with_a_detach(net, x, y):
    one = net.act(net.one(x))
    return F.cross_entropy(net.out(net.act(net.two(one) + one.detach().sin())), y)


WRITTEN_OUT = {
    "in place, with a skip": (ByHand(plain_first, skip_and_in_place, entropy), module_in_place),
    "a gradient in the loss": (ByHand(plain_first, simple_second, with_a_penalty), module_with_a_penalty),
    "a custom function": (ByHand(plain_first, cubed_second, entropy), module_with_a_function),
    "a mask, and two ways into the loss": (ByHand(plain_first, simple_second, masked_loss), module_with_a_mask),
    "a detached state": (ByHand(plain_first, detached_second, entropy), module_with_a_detach),
}


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("case", WRITTEN_OUT)
def test_a_strong_nudge_against_states_moved_by_hand(case: str, capture: bool) -> None:
    """Far from the forward pass, where nothing but the program itself tells what the layers predict."""
    by_hand, module = WRITTEN_OUT[case]
    torch.manual_seed(0)
    net = Three().double()
    algorithm = ebm.algorithm("predictive-coding", nudge=ebm.OneSided(0.5), relaxer=ebm.GradientDescent(0.1, 7))
    learner = ebm.Learner(net, algorithm, capture=capture)
    for index in range(STEPS):
        x, y = batch(index)
        found = learner.gradients(lambda x=x, y=y: module(net, x, y))
        expected = by_hand.relaxed(net, x, y, 0.5, 0.1, 7)
        assert off(found, expected) < 1e-10
        with torch.no_grad():
            for name, p in net.named_parameters():
                p -= 0.1 * expected[name]


# ---------------------------------------------------------------------------------------------- under the Trainer


class Logging(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.ran = mlp(), 0

    def training_step(self, pair: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.ran += 1
        loss = F.cross_entropy(self.net(pair[0]), pair[1])
        self.log("loss", loss)
        self.log("ran", float(self.ran))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([batch(index, torch.float32) for index in range(STEPS)], batch_size=None)


def test_what_a_step_logs_is_what_it_logs_under_stock_lightning(tmp_path) -> None:
    logged = []
    for options in ({}, {"strategy": ebm.EBMStrategy("predictive-coding")}):
        L.seed_everything(0, verbose=False)
        module = Logging()
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path, **options,
        )  # fmt: skip
        trainer.fit(module)
        assert module.ran == STEPS
        logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
    assert logged[0] == logged[1]


def places() -> dict[str, object]:
    """What stands where something is put while a step is recorded."""
    hooks = torch.utils.hooks.BackwardHook
    return {
        "Function.apply": torch.autograd.Function.__base__.__dict__.get("apply"),
        "saved_tensors_hooks": torch.autograd.graph.saved_tensors_hooks.__enter__,
        "setup_input_hook": hooks.setup_input_hook,
        "setup_output_hook": hooks.setup_output_hook,
        "backward": torch.autograd.backward,
    }


@pytest.mark.parametrize("raises", [False, True])
def test_torch_is_as_it_was_after_a_step_however_it_ends(raises):
    net, (x, y), before = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), batch(0), places()
    learner, within = ebm.Learner(net, "zero-divergence"), []

    def closure() -> Tensor:
        within.append(places())
        if raises:
            raise KeyError("of the user's")
        return F.cross_entropy(net(x), y)

    for _ in range(2):
        if raises:
            with pytest.raises(KeyError):
                learner.backward(closure)
        else:
            learner.backward(closure)
        assert places() == before
    assert all(during[name] is not what for during in within for name, what in before.items())


def test_torch_is_as_it_was_after_the_last_of_two_steps_that_overlap():
    """One thread ends its step while the other is in the midst of its own, whose record goes on."""
    before, midst, ended, found = places(), threading.Event(), threading.Event(), {}

    def step(waits: bool) -> None:
        torch.manual_seed(0)
        net, (x, y) = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), batch(0)

        def closure() -> Tensor:
            if waits:
                midst.set()
                assert ended.wait(60)
            return F.cross_entropy(net(x), y)

        found[waits] = ebm.Learner(net, "zero-divergence").gradients(closure)

    first = threading.Thread(target=step, args=(True,))
    first.start()
    assert midst.wait(60)
    step(False)
    assert places() != before
    ended.set()
    first.join(60)
    assert places() == before
    for name, gradient in found[False].items():
        assert torch.equal(found[True][name], gradient)


# ------------------------------------------------------------------------------------- operations that take functions


def chosen(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def counted(x: Tensor) -> Tensor:
    run = torch._higher_order_ops.while_loop
    return run(lambda i, z: i < 3, lambda i, z: (i + 1, z * 0.9), (torch.tensor(0), x))[1]


@pytest.mark.parametrize("operation", [chosen, counted])
@pytest.mark.parametrize("gradients", [True, False])
def test_an_operation_that_takes_functions_is_refused_by_name(operation, gradients):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = batch(0)

    def closure():
        with torch.set_grad_enabled(gradients):
            given = operation(net(x))
        return F.cross_entropy(net(x) + given, y)

    with pytest.raises(ebm.UnsupportedModuleError, match=r"operation that takes functions.*Write it in Python"):
        ebm.Learner(net, "zero-divergence").backward(closure)
    assert all(p.grad is None for p in net.parameters())
