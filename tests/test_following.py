"""A pass is followed along a known one as long as it is the same, and not one operation further."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.program import record as records

LATE = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.one, self.two = nn.Buffer(torch.full((6,), 0.5)), nn.Buffer(torch.full((6,), 1.5))
        self.act, self.drop = nn.Tanh(), nn.Dropout(0.3)
        self.other = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.ones(6))
        self.double()


Change = Callable[[Net, Tensor, Tensor, int], Tensor]


def another_constant(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return F.leaky_relu(h, 0.1 if index < LATE else 0.4)


def a_sign(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h.clamp(-0.1 if index < LATE else -0.3, 0.2)


def another_operation(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h.sin() if index < LATE else h.cos()


def operands_the_other_way_round(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h.tanh() - x if index < LATE else x - h.tanh()


def another_input_of_the_same_kind(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    first, second = h.sin(), h.exp()
    return first * (first if index < LATE else second)


def the_same_tensor_twice(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    one = torch.full_like(x, 0.5)
    other = torch.full_like(x, 1.5) if index < LATE else one
    return h * one + h.square() * other


def two_tensors_where_there_was_one(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h * net.one + h.square() * (net.one if index < LATE else net.two)


def another_parameter(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h * (net.scale if index < LATE else net.other)


def a_frozen_parameter(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h * net.scale + (net.other if index < LATE else net.other.detach())


def a_parameter_that_is_frozen(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    net.scale.requires_grad_(index < LATE)
    return h * net.scale + net.other


def a_parameter_of_another_shape(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    if index == LATE and net.scale.ndim == 1:
        net.scale.data = net.scale.data.view(1, 6)
    return h * net.scale


def a_leaf_that_the_step_makes(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    made = x * 0.1
    if index >= LATE:
        made.requires_grad_()
        (slope,) = torch.autograd.grad((made.square() * h.detach()).sum(), made)
        return h + slope + made
    return h + made


def other_strides(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    weights = torch.arange(36.0, dtype=h.dtype).view(6, 6) / 36
    return h @ (weights if index < LATE else weights.t())


def a_call_that_is_missing(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return net.act(h) if index < LATE else torch.tanh(h)


def a_detour(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """What a logger computes now and then, in between."""
    if index % 3 == 2:
        (h.square().sum() * 2).detach()
    return h.sin()


def dropout(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return net.drop(h)


def drawn_and_written_over(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """torch detaches what is drawn like a tensor that requires a gradient: it goes by two names."""
    noise = torch.randn_like(h)
    noise.mul_(h if index < LATE else h.sin())
    return noise.add_(x)


def drawn_and_written_through_a_view(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    noise = torch.rand_like(h)
    noise[:, : 3 if index < LATE else 2].mul_(h[:, : 3 if index < LATE else 2])
    return noise + h


def drawn_and_blotted_out(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    noise = torch.randn_like(h).masked_fill_(x > 0, 0.0)
    return noise.addcmul_(h, h if index < LATE else x)


def written_beside_a_detached_name(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """Which is a constant, of what is there when it is read."""
    out = h * 1.0
    cut = out.detach() if index % 2 else out.data
    before = cut * 2.0
    out.mul_(x if index < LATE else h)
    return out + cut * 0.3 + before


def written_beside_a_detached_view(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    out = x.clone()
    cut = out.detach()[:, :3]
    before = cut * 2.0
    out[:, 1:].mul_(h[:, 1:] if index < LATE else h[:, :5])
    return out + (cut + before).repeat(1, 2)


def written_beside_a_view_without_gradients(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """torch refuses whoever uses it afterwards."""
    out = net.b(h)
    with torch.no_grad():
        view = out[:, :3]
    shown = (view * 1.0).detach()
    return out.tanh_() + shown.mean() * (index >= LATE)


def written_in_place(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    h = h * 1.0
    h += x
    return F.relu_(h * (1.0 + index))


def written_through_a_view_late(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    h = h * 1.0
    part = h[:, :3] if index >= LATE else h
    part.mul_(0.5)
    return h.sin()


def batch_norm(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    net.train(index != LATE)
    return net.norm(h)


def noise(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h + 0.1 * torch.randn_like(h) * torch.rand(6, dtype=h.dtype) + torch.bernoulli(h.sigmoid())


def in_place_late(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    h = h * 1.0
    return h.sin_() if index >= LATE else h.sin()


def a_hook_that_begins(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    h = h * 1.0
    if index >= LATE:
        h.register_hook(lambda slope: 0.3 * slope)
    return h.sin()


def gradients_off(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    with torch.set_grad_enabled(index < LATE):
        gate = h.sigmoid()
    return h * gate


def another_batch(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h[: 5 if index < LATE else 3].repeat(5, 1)[:5] * 1.0


def a_lookup(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h[h > 0].sum() * h if index % 2 else h[:, [index % 3, 0, 1, 2, 3, 4]]


def attention(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """torch counts it among what draws, for its dropout."""
    q = h.view(5, 1, 2, 3)
    return F.scaled_dot_product_attention(q, q, x.view(5, 1, 2, 3), is_causal=index < LATE).reshape(5, 6)


def attention_under_a_mask(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """As nn.MultiheadAttention makes it of truth values: by a write to a tensor that has just been made."""
    hidden = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1 if index < LATE else 2)
    bias = torch.zeros_like(hidden, dtype=h.dtype).masked_fill_(hidden, float("-inf"))
    return h + (h.unsqueeze(2) * x.unsqueeze(1) + bias).softmax(-1).sum(1)


def written_where_it_is_a_view(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """What it is a view of, and another view, are read after it; later also before."""
    base = h.sin()
    view, other = base.view(6, 5), base[:, 2:]
    part = other.exp() if index >= LATE else None
    view += 0.1
    view.mul_(x.view(6, 5))
    return base * (other.sum() if part is None else part.sum())


def gates_written_in_place(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    gates = torch.cat([h.sin(), h.cos(), x], 1)
    first, second, third = gates[:, :6], gates[:, 6:12], gates[:, 12:]
    (first if index < LATE else second).add_(third)
    return first.sigmoid() * second.tanh()


def a_view_that_is_gone(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """Before the write that the other one sees."""
    both = torch.cat([h.sin(), x], 1)
    views = [both[:, :6], both[:, 6:]]
    if index >= LATE:
        views[0] = views[1]
    both *= 2.0
    return views[1] * h


def another_parameter_in_turn(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h.sin() * (x if index % 2 else net.other if index < LATE else net.scale)


def copied_over(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    """What was there had a slope, which is zero from there on."""
    out = net.scale * x
    return out.copy_(x.sin() if index < LATE else h) + h


def copied_into_a_slice(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    out = h.sin()
    out[:, : 2 if index < LATE else 3] = h[:, :1] * x[:, :1]
    return out


def collected(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    out = torch.zeros(5, 6, dtype=h.dtype)
    out[:, :3] = h[:, 3:]
    out[:, 3:] = h[:, :3] * x[:, :3] if index < LATE else h[:, 3:].sum(1, keepdim=True)
    return out


def picked_at_positions(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    rows = torch.arange(5) if index < LATE else torch.arange(5) % 3
    return h[rows] * h[:, torch.tensor([1, 0, 3, 2, 5, 4])]


def put_at_positions(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    sums = torch.zeros(3, 6, dtype=h.dtype).index_put((torch.arange(5) % 3,), h, accumulate=index < LATE)
    return sums[torch.arange(5) % 3]


def blotted_out(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    h = h.clone()
    h[x < 0.3 * (index >= LATE)] = 0.5
    return h.sin()


def blotted_out_itself(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    h = h * 1.0
    h[h < 0.1 * (index >= LATE)] = 0.0
    return h.sin()


def sloped(net: Net, h: Tensor, leaf: Tensor, index: int) -> Tensor:
    """The gradient at a leaf, of which the loss is made."""
    (slope,) = torch.autograd.grad(net.act(net.b(leaf)).square().sum(), leaf, create_graph=True)
    return h + slope * (1 if index < LATE else leaf)


def a_leaf_that_is_cut_off(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return sloped(net, h, x.detach().requires_grad_(), index)


def a_leaf_that_is_drawn(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return sloped(net, h, torch.rand_like(x).requires_grad_(), index)


def a_leaf_that_is_computed_without_gradients(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    with torch.no_grad():
        leaf = x.sin() + x
    return sloped(net, h, leaf.requires_grad_(), index)


def a_leaf_that_is_called_a_parameter(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return sloped(net, h, nn.Parameter(x.clone()), index)


def a_leaf_in_turn_with_a_parameter(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h.sin() * (net.scale if index % 2 else x[0].detach().requires_grad_())


LEAVES: list[Change] = [
    a_leaf_that_is_cut_off, a_leaf_that_is_drawn, a_leaf_that_is_computed_without_gradients,
    a_leaf_that_is_called_a_parameter,
]  # fmt: skip
COMES_AGAIN = [
    copied_over, drawn_and_written_over, drawn_and_written_through_a_view, drawn_and_blotted_out,
    *LEAVES,
    attention, attention_under_a_mask, written_where_it_is_a_view, gates_written_in_place, copied_into_a_slice,
    collected, picked_at_positions, put_at_positions, blotted_out, blotted_out_itself,
]  # fmt: skip
CHANGES = [
    another_constant, a_sign, another_operation, operands_the_other_way_round, another_input_of_the_same_kind,
    the_same_tensor_twice, two_tensors_where_there_was_one, another_parameter, a_frozen_parameter,
    a_parameter_that_is_frozen, a_parameter_of_another_shape, a_leaf_that_the_step_makes, other_strides,
    a_call_that_is_missing, a_detour, dropout, written_in_place, written_through_a_view_late, batch_norm, noise,
     in_place_late, a_hook_that_begins, gradients_off,
    another_batch, a_lookup, *COMES_AGAIN, written_beside_a_detached_name, written_beside_a_detached_view,
    written_beside_a_view_without_gradients, a_view_that_is_gone, another_parameter_in_turn,
    a_leaf_in_turn_with_a_parameter,
]  # fmt: skip


def step(net: Net, change: Change, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(index)
    h = net.act(net.a(x))
    return F.cross_entropy(net.c(net.act(net.b(change(net, h, x, index)))), torch.arange(5) % 3)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_steps_is_never_missed(change: Change, capture: bool) -> None:
    """The exact rule is autograd's gradient of that very step."""
    net = Net()
    learner = ebm.Learner(net, "zero-divergence", layers=["a", "b"] if change is a_call_that_is_missing else None,
                          capture=capture)  # fmt: skip
    for index in range(2 * LATE):
        found = learner.gradients(lambda index=index: step(net, change, index))
        named = {name: p for name, p in net.named_parameters() if name in found}
        true = torch.autograd.grad(step(net, change, index), list(named.values()))
        for name, wanted in zip(named, true, strict=True):
            assert torch.allclose(found[name], wanted, rtol=0, atol=1e-12), (name, index)


def norm(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return F.relu_(net.norm(h))


@pytest.mark.parametrize("capture", [True, False])
def test_the_layers_are_those_of_the_parameters_that_are_used_now(capture: bool) -> None:
    net, named = Net(), []
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(2 * LATE):
        learner.gradients(lambda index=index: step(net, another_parameter, index))
        assert learner.plan is not None
        named.append({name for row in learner.plan.rows for name in row.parameters} & {"scale", "other"})
    assert named == [{"scale"}] * LATE + [{"other"}] * LATE


def test_the_layers_are_those_of_the_parameters_that_are_used_in_turn() -> None:
    net, named = Net(), []
    learner = ebm.Learner(net, "zero-divergence")
    for index in range(2 * LATE):
        learner.gradients(lambda index=index: step(net, another_parameter_in_turn, index))
        assert learner.plan is not None
        named.append({name for row in learner.plan.rows for name in row.parameters} & {"scale", "other"})
    assert named == [{"other"}, set()] * (LATE // 2) + [{"scale"}, set()] * (LATE // 2)


@pytest.mark.parametrize("capture", [True, False])
def test_what_is_copied_over_has_a_gradient_of_zero(capture: bool) -> None:
    """As under backprop, where weight decay acts on it."""
    net = Net()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in range(2 * LATE):
        learner.backward(lambda index=index: step(net, copied_over, index))
        assert net.scale.grad is not None
        assert not net.scale.grad.any()


def test_what_is_put_back_may_be_expanded() -> None:
    """Many elements in one place, which torch lets be filled and does not copy to."""
    net, buffer = Net(), torch.zeros(1, 6, dtype=torch.float64).expand(5, 6)

    def change(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
        return h + buffer.masked_fill_(torch.ones(6, dtype=torch.bool), 0.3)

    ebm.Learner(net, "zero-divergence").gradients(lambda: step(net, change, 0))
    assert not buffer.any()


class OwnTanh(nn.Tanh):
    """Another module with the same operations."""


def test_the_layers_are_those_of_the_modules_that_are_called_now() -> None:
    net, named = Net(), []
    learner = ebm.Learner(net, "zero-divergence")
    for index in range(2 * LATE):
        if index == LATE:
            net.act = OwnTanh()
        learner.gradients(lambda index=index: step(net, lambda net, h, x, index: h * 1.0, index))
        assert learner.plan is not None
        named.append({row.activation for row in learner.plan.rows})
    assert named == [{"Tanh"}] * LATE + [{"OwnTanh"}] * LATE


@pytest.mark.parametrize("of", [lambda h, x: x * 0.1, lambda h, x: (h > 0).double()], ids=["batch", "layer"])
def test_a_leaf_that_the_step_makes_late_is_given_its_gradient(of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """By the same operations as before."""
    net = Net()
    learner = ebm.Learner(net, "zero-divergence")
    for index in range(2 * LATE):
        made: list[Tensor] = []

        def change(net: Net, h: Tensor, x: Tensor, index: int, made: list[Tensor] = made) -> Tensor:
            made.append(of(h, x).requires_grad_(index >= LATE))
            return h + made[-1]

        learner.backward(lambda index=index, change=change: step(net, change, index))
        assert (made[0].grad is not None) == (index >= LATE)
        if index >= LATE:
            loss = step(net, change, index)
            assert torch.allclose(made[0].grad, torch.autograd.grad(loss, made[1])[0], rtol=0, atol=1e-12)


def built(net: Net, change: Change, monkeypatch: pytest.MonkeyPatch, algorithm: str = "zero-divergence") -> list[int]:
    """How many operations were written down anew, step by step."""
    learner, counts = ebm.Learner(net, algorithm), []
    plain = records.Node.__init__

    def counted(self, *args, **kwargs):
        counts[-1] += 1
        plain(self, *args, **kwargs)

    monkeypatch.setattr(records.Node, "__init__", counted)
    for index in range(2 * LATE):
        counts.append(0)
        learner.gradients(lambda index=index: step(net, change, index))
    return counts


@pytest.mark.parametrize("change", [lambda net, h, x, index: h, dropout, noise, a_hook_that_begins, norm])
def test_a_pass_that_comes_again_builds_nothing(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = built(Net(), change, monkeypatch)
    assert counts[0] > 0
    late = change is a_hook_that_begins
    assert counts[1 : LATE if late else None] == [0] * (LATE - 1 if late else 2 * LATE - 1)


@pytest.mark.parametrize("change", COMES_AGAIN, ids=lambda change: change.__name__)
def test_what_networks_do_besides_computing_comes_again_as_well(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention, writes to views and slices, positions, masks. What changes is built once."""
    counts = built(Net(), change, monkeypatch)
    assert counts[0] > 0
    assert counts[1:LATE] == [0] * (LATE - 1)
    assert counts[LATE + 1 :] == [0] * (LATE - 1)


@pytest.mark.parametrize("change", LEAVES, ids=lambda change: change.__name__)
def test_a_step_that_makes_leaves_may_run_twice(change: Change) -> None:
    """They are others in both runs, and hold the same."""
    net = Net()
    found = [ebm.Learner(net, "equilibrium-propagation-one-sided", capture=capture) for capture in (True, False)]
    for index in range(LATE):
        ways = [learner.gradients(lambda index=index: step(net, change, index)) for learner in found]
        for name, wanted in ways[0].items():
            assert torch.allclose(ways[1][name], wanted, rtol=0, atol=1e-10), (name, index)


def a_leaf_that_follows_a_layer(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return sloped(net, h, h.detach().requires_grad_(), index)


def test_a_leaf_that_follows_a_layer_is_another_where_states_are_in_place() -> None:
    net = Net()
    learner = ebm.Learner(net, "equilibrium-propagation")
    with pytest.raises(ebm.UnsupportedModuleError, match="differ in what they were given"):
        learner.gradients(lambda: step(net, a_leaf_that_follows_a_layer, 0))


def lengths_in_turn(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h[: 5 - index % 3].mean(0) + h


def losses_in_turn(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h.sin() * x if index % 2 else (h * x).cos()


def modes_in_turn(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    net.train(index % 2 == 0)
    return net.norm(net.drop(h))


def one_is_the_beginning_of_the_other(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return h.sin() if index % 2 else h.sin() * x


def layers_in_turn(net: Net, h: Tensor, x: Tensor, index: int) -> Tensor:
    return net.act(h.sin()) if index % 2 else h.sin()


@pytest.mark.parametrize(
    "change", [lengths_in_turn, losses_in_turn, modes_in_turn, one_is_the_beginning_of_the_other, layers_in_turn]
)
def test_passes_that_take_turns_are_each_followed(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of several lengths, two closures of a learner, training and evaluation."""
    counts = built(Net(), change, monkeypatch)
    assert 0 < counts[1] < counts[0]  # they begin alike
    assert counts[3:] == [0] * (2 * LATE - 3)
    test_what_changes_between_steps_is_never_missed(change, True)


def test_a_pass_that_changes_builds_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = built(Net(), another_operation, monkeypatch)
    assert counts[1:LATE] == [0] * (LATE - 1)
    assert 0 < counts[LATE] < counts[0]
    assert counts[LATE + 1 :] == [0] * (LATE - 1)


class Counted(nn.Module):
    """Counts its batches in an integer, in ways of its own, and divides by what it has counted."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.how = how
        self.register_buffer("count", torch.zeros(2 if how == "one of two" else (), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        before = self.count.clone() if self.how == "and reads what it was" else None
        if self.how == "by a tensor":
            self.count += (h > 0).sum()
        elif self.how == "one of two":
            self.count[0] += 1
        elif self.how == "twice":
            self.count.add_(1)
            self.count *= 2
        else:
            self.count += 1
        total = self.count.sum() if before is None else self.count + before
        return h / (1 + total)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("how", ["by a number", "by a tensor", "one of two", "twice", "and reads what it was"])
def test_what_a_step_counts_may_be_read_in_it(how: str, capture: bool) -> None:
    """The oracle is an untouched copy, whose counter and gradients are autograd's."""
    torch.manual_seed(0)
    net = Counted(how).double()
    stock, x = copy.deepcopy(net), torch.randn(5, 3, dtype=torch.double)
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for _ in range(4):
        for one in (net, stock):
            one.zero_grad()
        learner.backward(lambda: net(x).square().mean())
        stock(x).square().mean().backward()
        assert torch.equal(net.count, stock.count)
        for ours, theirs in zip(net.parameters(), stock.parameters(), strict=True):
            assert float((ours.grad - theirs.grad).abs().max()) < 1e-12


class Active(nn.Module):
    """Divides by how many units are on, which depends on the states, and one."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[:4](x)
        on = (h > 0).sum()
        if self.in_place:
            on += 1
        else:
            on = on + 1
        return 20 * self.net[4](h) / on


def test_what_is_counted_of_states_moves_with_them() -> None:
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        net, x = Active(in_place).double(), torch.randn(5, 3, dtype=torch.double)
        euler = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 20))
        learner = ebm.Learner(net, euler)
        for _ in range(3):
            net.zero_grad()
            learner.backward(lambda net=net, x=x: (net(x) - 3).square().sum(1).mean())
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("preset", ["zero-divergence", "pc-nudge", "predictive-coding", "equilibrium-propagation"])
def test_what_is_read_for_its_shape_alone_is_given_no_gradient(preset: str, capture: bool) -> None:
    """An optimizer would let it decay: under backprop it has none, and stays as it is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    net.first, net.idle = nn.Parameter(torch.randn(1, 6).double()), nn.Linear(4, 6).double()
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    learner = ebm.Learner(net, preset, capture=capture)

    def loss() -> Tensor:
        hidden = net[1](net[0](x))
        return F.cross_entropy(net[2](hidden + torch.ones_like(net.first) + torch.zeros_like(net.idle(x))), y)

    for _ in range(4):
        learner.backward(loss)
        assert net.first.grad is None
        assert net.idle.weight.grad is None
        assert net[0].weight.grad is not None
