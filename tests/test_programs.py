"""What docs/programs.md says of the recorded program: what is in it, what is a constant, what is known again.

The oracle has one hidden layer, and its state is a leaf of the test's own: what a relaxation should see of a step is
written out by hand, in plain autograd.
"""

import logging

import pytest
import torch
from since import newer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_ebm as ebm

LR, STEPS = 0.1, 5
SWEEPS = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(20))
EULER = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=LR, max_steps=STEPS, tol=0))


class Net(nn.Module):
    """One hidden layer, and something between it and the read-out."""

    def __init__(self, between) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.below, self.layer, self.above = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)
        self.between = between
        self.double()

    def forward(self, x):
        return self.above(self.between(self, self.layer(self.below(x))))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 7 * ctx.saved_tensors[0] ** 2 * gradient  # not that of a cube, and so be it


def detached(net, h, h0=None):
    return h * (h if h0 is None else h0).detach()


def without_gradients(net, h, h0=None):
    with torch.no_grad():
        scale = (h if h0 is None else h0).exp()
    return h * scale


def data(net, h, h0=None):
    return h * (h if h0 is None else h0).data


def number(net, h, h0=None):
    return h * (h if h0 is None else h0).max().item()


def branch(net, h, h0=None):
    return h * 3 if (h if h0 is None else h0)[0, 0] > 0 else h.sin()


def masked(net, h, h0=None):
    picked = (h if h0 is None else h0) > 0
    return h + 0.01 * h[picked].square().sum()


def array(net, h, h0=None):
    return h + torch.from_numpy((h if h0 is None else h0).detach().numpy() * 2)


def noise(net, h, h0=None):
    return h + torch.randn_like(h) * h


def dropout(net, h, h0=None):
    return F.dropout(h, 0.4)


def fused_dropout(net, h, h0=None):
    return torch.native_dropout(h, 0.4, True)[0]


def normalised(net, h, h0=None):
    return net.norm(h)


def in_place(net, h, h0=None):
    return h.mul(2).add_(1).tanh_()


def first_column(net, h, h0=None):
    h = h * 1
    h[:, 0] = h[:, 1] * 2
    return h


def half(net, h, h0=None):
    h = h * 1
    h[:, 3:].mul_(h[:, :3].clone())
    return h.sin()


def half_read_before(net, h, h0=None):
    h = h * 1
    part = h[:, :3]
    h.mul_(3)
    return torch.cat([part, h[:, 3:]], 1)


def turned(net, h, h0=None):
    h = h.t() * 1  # lies in memory column by column
    h[0].mul_(4)
    return h.t()


def batch_written_to(net, h, h0=None):
    with torch.no_grad():  # so that it comes from outside of the record
        factor = torch.ones(6, dtype=h.dtype)
    a = h + factor
    factor.mul_(2)
    return a * factor


def custom(net, h, h0=None):
    return Cube.apply(h)


def hook(net, h, h0=None):
    h = h * 2
    h.register_hook(lambda gradient: gradient * 0.5)
    return h


def checkpointed(net, h, h0=None):
    return checkpoint(lambda x: x.sin() * x, h, use_reentrant=False)


def inner(net, h, h0=None):
    return h + torch.autograd.grad(h.pow(3).sum(), h, create_graph=True)[0]


def inner_loop(net, h, h0=None):
    z = torch.zeros_like(h).requires_grad_()
    for _ in range(2):
        z = z - 0.3 * torch.autograd.grad(((z - h) ** 2).sum() + (z**4).sum(), z, create_graph=True)[0]
    return z


def several(net, h, h0=None):
    one, other = h.split(3, 1)
    values, _ = other.topk(2, 1)
    return torch.cat([one * values.sum(1, keepdim=True), other.cumsum(1)], 1)


KINDS = [
    detached, without_gradients, data, number, branch, masked, array, noise, dropout, fused_dropout, normalised,
    in_place, first_column, half, half_read_before, turned, batch_written_to, custom, hook, checkpointed, inner,
    inner_loop, several,
]  # fmt: skip


def by_hand(net, x, y, seed=3):
    """dE/dtheta after Euler steps on the one state, divided by the number of samples."""
    torch.manual_seed(seed)
    h0 = net.layer(net.below(x)).detach()

    def energy(h):
        torch.manual_seed(seed)
        error = h - net.layer(net.below(x))
        return 0.5 * error.square().sum() + len(x) * F.mse_loss(net.above(net.between(net, h, h0)), y)

    h = h0
    for _ in range(STEPS):
        h = h.detach().requires_grad_()
        h = h - LR * torch.autograd.grad(energy(h), h)[0]
    found = torch.autograd.grad(energy(h.detach().requires_grad_()) / len(x), list(net.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(net.named_parameters(), found, strict=True) if g is not None}


def same(found, expected, tolerance=1e-11):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=tolerance), name


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(8, 5).double(), torch.randn(8, 2).double()


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("between", KINDS, ids=lambda kind: kind.__name__)
def test_a_step_is_at_other_states_what_it_is_by_hand(between, capture, batch):
    x, y = batch
    net = Net(between)
    learner = ebm.Learner(net, EULER, capture=capture)
    runs = []

    def closure():
        runs.append(1)
        torch.manual_seed(3)
        return F.mse_loss(net(x), y)

    for step in range(3):  # interpreted, traced, and from the code that is there
        net.zero_grad()
        learner.backward(closure)
        found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        same(found, by_hand(net, x, y))
        assert len(runs) == step + 1


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("algorithm", [EULER, SWEEPS], ids=["euler", "ep"])
def test_running_statistics_move_once_a_step(algorithm, capture, batch):
    x, y = batch
    net, stock = Net(normalised), Net(normalised)
    net.norm.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    seen = []
    learner = ebm.Learner(net, algorithm, capture=capture)
    for step in range(3):
        learner.backward(lambda: F.mse_loss(net(x), y))
        stock.norm(seen[-1])  # of the last run: the one that is heard
        assert torch.allclose(net.norm.running_mean, stock.norm.running_mean, rtol=0, atol=1e-12)
        assert torch.allclose(net.norm.running_var, stock.norm.running_var, rtol=0, atol=1e-12)
        assert int(net.norm.num_batches_tracked) == step + 1


def changing(net, x, k):
    """One closure a step; everything but the first two differs from its neighbours in one thing."""
    h = net.layer(net.below(x))
    return [
        lambda: (h * 2).square().mean(),
        lambda: (h * 2).square().mean(),
        lambda: (h * 3).square().mean(),
        lambda: (h * 3).square().sum() / h.numel(),
        lambda: (h.sin() * 3).square().mean(),
        lambda: (h.detach() * h).square().mean(),
        lambda: (h * net.above.weight[0]).square().mean(),
        lambda: (h * net.above.weight[1]).square().mean(),
        lambda: (h + net.norm.weight).square().mean(),
        lambda: (h + net.norm.bias).square().mean(),
        lambda: (h.t() @ h).square().mean(),
        lambda: (h @ h.t()).square().mean(),
        lambda: (h - x[:, :1]).square().mean(),
        lambda: (x[:, :1] - h).square().mean(),
        lambda: F.dropout(h, 0.5).square().mean(),
        lambda: F.dropout(h, 0.25).square().mean(),
        lambda: net.layer(net.above(h)).square().mean(),
        lambda: (h * 2.5 * 2).square().mean(),
        lambda: hook(net, h * 2.5).square().mean(),
        lambda: (h.cos() - h).square().mean(),
        lambda: (h - h.cos()).exp().mean(),
        lambda: (h.cos() - h).exp().mean(),
        lambda: (h[:1] * net.narrow).square().mean(),
        lambda: (h[:1] * net.wide).square().mean(),
        lambda: h.sin().square().mean(),
        lambda: h.cos().square().mean(),
    ][k]()


@pytest.mark.parametrize("k", range(25))
def test_whatever_changes_between_steps_is_seen(k, batch):
    """A learner with code for one step gives of the next one what one gives that has seen no other."""
    x, _ = batch
    net = Net(lambda net, h: h)
    net.narrow, net.wide = torch.full((1, 1), 2.0).double(), torch.linspace(0, 2, 8).double()[:, None]

    def closure(k):
        torch.manual_seed(3)
        return changing(net, x, k)

    used = ebm.Learner(net, EULER)
    for one in (k, k, k, k + 1, k, k + 1):
        found = used.gradients(lambda one=one: closure(one))
        fresh = ebm.Learner(net, EULER, capture=False)
        same(found, fresh.gradients(lambda one=one: closure(one)))
        assert used.plan == fresh.plan


@pytest.mark.parametrize("kind", ["frozen", "shape", "strides", "dtype", "mode", "hook"])
def test_what_no_operation_tells_is_seen_too(kind, batch):
    x, y = batch
    net = Net(normalised)
    used = ebm.Learner(net, EULER)
    other = x, y
    handles = []

    def closure():
        return F.mse_loss(net(other[0]).float() if other[0] is not x and kind == "dtype" else net(other[0]), other[1])

    for step in range(8):
        if step == 4:
            if kind == "frozen":
                net.above.bias.requires_grad_(False)
            elif kind == "shape":
                other = x[:5], y[:5]
            elif kind == "strides":
                other = x.t().contiguous().t(), y
            elif kind == "dtype":
                other = x.clone(), y.float()
            elif kind == "mode":
                net.eval()
            else:
                handles.append(net.layer.register_full_backward_hook(lambda m, i, o: (i[0] * 0.5,)))
        found, fresh = used.gradients(closure), ebm.Learner(net, EULER, capture=False).gradients(closure)
        same(found, fresh, 1e-6 if kind == "dtype" else 1e-11)


class Weighted(ebm.Energy):
    divergence = True
    factor = 1.0

    def layer_energy(self, state, layer):
        return self.factor * (state - layer.prediction).square()


def test_settings_of_an_energy_may_change(batch):
    x, y = batch
    net, energy = Net(lambda net, h: h), Weighted()
    algorithm = ebm.Algorithm(energy, ebm.OneSided(1.0), EULER.relaxer)
    used = ebm.Learner(net, algorithm)
    for factor in (1.0, 1.0, 1.0, 3.0):
        energy.factor = factor
        found = used.gradients(lambda: F.mse_loss(net(x), y))
        same(found, ebm.Learner(net, algorithm, capture=False).gradients(lambda: F.mse_loss(net(x), y)))


def test_values_of_tensors_may_change_freely(batch, monkeypatch):
    """One program, and one piece of code for each evaluation, whatever tensors hold."""
    from lightning_ebm.program import code

    x, y = batch
    net = Net(lambda net, h: h * net.scale)
    net.register_buffer("scale", torch.ones((), dtype=torch.float64))
    learner, made = ebm.Learner(net, EULER), []
    tracer = code.traced_graph
    monkeypatch.setattr(code, "traced_graph", lambda *args: made.append(1) or tracer(*args))
    counts = []
    for step in range(5):
        net.scale.fill_(1 + step)
        with torch.no_grad():
            net.below.weight.mul_(0.9)
        moved = x + step
        found = learner.gradients(lambda moved=moved: F.mse_loss(net(moved), y))
        same(found, ebm.Learner(net, EULER, capture=False).gradients(lambda moved=moved: F.mse_loss(net(moved), y)))
        counts.append(len(made))
    assert counts[0] == 0
    assert counts[1] == counts[-1] > 0


_calls: list[int] = []


@torch.library.custom_op("lightning_ebm_tests::counting", mutates_args=())
def counting(x: torch.Tensor) -> torch.Tensor:
    """Gives another result at every call."""
    _calls.append(1)
    return x * len(_calls)


counting.register_autograd(lambda ctx, gradient: gradient)


@newer  # older ones fail within, and are told of as of an operation that fails
def test_an_operation_with_a_state_of_its_own_is_refused_by_the_parameter(batch):
    x, y = batch
    net = Net(lambda net, h: counting(h).sin())
    with pytest.raises(ebm.UnsupportedModuleError, match=r"gradient of above\.weight"):
        ebm.Learner(net, EULER).backward(lambda: F.mse_loss(net(x), y))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("capture", [True, False])
def test_states_keep_their_digits_where_layers_compute_in_less(capture, batch):
    """bfloat16 has eight bits: differences of a small nudge would be gone."""
    x, y = (t.float() for t in batch)
    net = Net(lambda net, h: h).float()
    weak = ebm.algorithm("predictive-coding", nudge=ebm.OneSided(1e-3), relaxer=EULER.relaxer)

    def gradients(reduced):
        def closure():
            with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
                loss = F.mse_loss(net(x).float(), y)
            return loss

        learner = ebm.Learner(net, weak, capture=capture)
        return [learner.gradients(closure) for _ in range(3)][-1]

    assert ebm.metrics.alignment(gradients(True), gradients(False))["relative_error"] < 0.05


def test_what_autocast_leaves_alone_is_not_rounded(batch):
    """It casts no doubles: the step is the one outside of it, and settles as far, however it runs."""
    x, y = batch
    net = Net(lambda net, h: h)

    def gradients(capture):
        learner, found = ebm.Learner(net, "predictive-coding", capture=capture), []
        for index in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=index % 2 == 1):
                found.append(learner.gradients(lambda: F.mse_loss(net(x), y)))
        return found

    for way in (True, False):
        first, *others = gradients(way)
        assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def dirty(net, h):
    class Dirty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    return Dirty.apply(h * 1)


def attention(net, h):
    return F.scaled_dot_product_attention(h[None], h[None], h[None], dropout_p=0.3)[0]


REFUSED = [
    (lambda net, h: checkpoint(torch.sin, h, use_reentrant=True), "use_reentrant=False"),
    (dirty, "mark_dirty"),
    (lambda net, h: h * net.before, "before it began"),
]


@pytest.mark.parametrize(("between", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_refused_says_what_to_do(between, words, batch):
    x, y = batch
    net = Net(between)
    net.before = net.above.weight.sum() * 2
    with pytest.raises(ebm.UnsupportedModuleError, match=words):
        ebm.Learner(net, EULER).backward(lambda: F.mse_loss(net(x), y))


def test_fused_attention_with_dropout_is_right_or_refused(batch):
    x, y = batch
    net = Net(attention)
    learner = ebm.Learner(net, EULER)

    def closure():
        torch.manual_seed(3)
        return F.mse_loss(net(x), y)

    try:
        found = learner.gradients(closure)
    except ebm.UnsupportedModuleError as error:
        assert "dropout" in str(error)  # noqa: PT017
    else:
        net.between = lambda net, h, h0=None: attention(net, h)
        same(found, by_hand(net, x, y))


def test_backward_inside_a_closure_is_an_error(batch):
    x, y = batch
    net = Net(lambda net, h: h)

    def closure():
        F.l1_loss(net(x), y).backward()
        return F.mse_loss(net(x), y)

    with pytest.raises(ebm.ConfigurationError, match="closure calls backward"):
        ebm.Learner(net, EULER).backward(closure)
    assert all(p.grad is None for p in net.parameters())


def test_two_runs_that_differ_are_an_error_where_the_step_runs_twice(batch):
    x, y = batch
    net = Net(lambda net, h: h)
    net.more = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    runs = []

    def closure():
        runs.append(1)
        return F.mse_loss(net.more(net(x)), y) * len(runs)

    with pytest.raises(ebm.UnsupportedModuleError, match="runs twice"):
        ebm.Learner(net, "equilibrium-propagation").backward(closure)
    assert len(runs) == 2


def test_torch_is_afterwards_as_it_was(batch):
    x, y = batch
    places = torch.autograd.Function, torch.autograd.graph.saved_tensors_hooks, torch.utils.hooks.BackwardHook
    names = "apply", "__enter__", "setup_input_hook", "setup_output_hook"
    before = [vars(place).get(name) for place in places for name in names]
    net = Net(custom)
    hooks = {module: len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()}
    ebm.Learner(net, EULER).backward(lambda: F.mse_loss(net(x), y))
    assert before == [vars(place).get(name) for place in places for name in names]
    assert hooks == {module: len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()}


def test_the_first_time_is_interpreted_and_nothing_is_said(batch, caplog):
    x, y = batch
    net = Net(several)
    with caplog.at_level(logging.WARNING):
        learner = ebm.Learner(net, EULER)
        for _ in range(3):
            learner.backward(lambda: F.mse_loss(net(x), y))
    assert not caplog.records


def test_a_number_that_is_read_off_a_layer_is_said_once(caplog) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(5, 4).double()

    def closure(times: int) -> torch.Tensor:
        hidden = net[1](net[0](x))
        if float(hidden.abs().max()) > 0.0:
            hidden = hidden * times
        return net[2](hidden).square().mean()

    learner = ebm.Learner(net, "zero-divergence")
    with caplog.at_level("INFO", logger="lightning_ebm"):
        for times in (1, 2, 3):
            learner.gradients(lambda times=times: closure(times))
    assert caplog.text.count("reads numbers off its layers") == 1


def test_a_nudge_that_is_another_one_at_every_step_does_not_pile_up_code() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(5, 4).double()

    class Rising(ebm.Nudge):
        strength = 0.1

        def phases(self):
            return (ebm.nudges.Phase(self.strength, 1 / self.strength), ebm.nudges.Phase(0.0, -1 / self.strength))

    nudge = Rising()
    learner = ebm.Learner(net, ebm.Algorithm(ebm.PredictiveCoding(), nudge, ebm.GradientDescent(0.1, 2)))
    for step in range(60):
        nudge.strength = 0.1 + 0.01 * step
        found = learner.gradients(lambda: net(x).square().mean())
    assert len(learner._programs.latest.traced.codes) <= 100
    plain = ebm.Learner(net, ebm.Algorithm(ebm.PredictiveCoding(), nudge, ebm.GradientDescent(0.1, 2)), capture=False)
    expected = plain.gradients(lambda: net(x).square().mean())
    assert all(torch.allclose(found[name], expected[name], rtol=1e-12, atol=1e-14) for name in expected)


class Doubling(torch.autograd.graph.saved_tensors_hooks):
    """Numbers that are saved for the backward pass come back twice as large."""

    def __init__(self) -> None:
        super().__init__(lambda saved: saved, lambda saved: 2 * saved if saved.is_floating_point() else saved)


@pytest.mark.parametrize("capture", [True, False])
def test_hooks_that_come_between_known_programs_are_part_of_a_program(capture):
    """A step is compared with each program that is known, also where it departs from the one that came last."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 3
    learner = ebm.Learner(net, "zero-divergence", capture=capture)

    def loss(kind: str) -> Tensor:
        def above(h: Tensor) -> Tensor:
            return F.cross_entropy(net[2:](h), y)

        if kind == "saved otherwise":
            with Doubling():
                return above(net[:2](x))
        h = net[:2](x)
        if kind == "hooked and logged":
            h.sum()  # which is no part of the program
        if kind.startswith("hooked"):
            h.register_hook(lambda gradient: 3 * gradient)
        return above(h) + (h.square().mean() if kind == "another" else 0)

    often = ["plain"] * 8  # until there is code for it
    for kind in [
        *often,
        "another",
        "hooked",
        "another",
        "plain",
        "hooked",
        "another",
        "saved otherwise",
        *often,
        "hooked and logged",
        "plain",
        "hooked",
    ]:
        if kind == "saved otherwise":  # no record could repeat that
            with pytest.raises(ebm.UnsupportedModuleError, match="off autograd's own"):
                learner.gradients(lambda kind=kind: loss(kind))
            continue
        expected = torch.autograd.grad(loss(kind), list(net.parameters()))
        found = learner.gradients(lambda kind=kind: loss(kind))
        for (name, _), gradient in zip(net.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-13, msg=f"{kind}: {name}")
