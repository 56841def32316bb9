"""Attention and recurrent layers that drop units: recorded by kernels that drop by an operation of its own.

On a CPU torch takes such kernels anyway; what a GPU would take is read off the switches that torch chooses by, while
the operations of the call run.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_ebm as ebm
from lightning_ebm.program.random_draws import draws


class Switches(TorchDispatchMode):
    """Notes by which switches torch chose, for every operation within."""

    def __init__(self):
        super().__init__()
        self.fused, self.cudnn = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cuda = torch.backends.cuda
        self.fused.add((cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()))
        self.cudnn.add(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


class Attends(nn.Module):
    """q, k and v are what an activation returned."""

    def __init__(self, dropout, by_name):
        super().__init__()
        self.dropout, self.by_name = dropout, by_name

    def forward(self, h):
        if self.by_name:
            return F.scaled_dot_product_attention(h, h, h, dropout_p=self.dropout)
        return F.scaled_dot_product_attention(h, h, h, None, self.dropout)


class Own(nn.MultiheadAttention):
    def __init__(self, dropout, **options):
        super().__init__(4, 2, dropout, batch_first=True, **options)

    def forward(self, h):
        return super().forward(h, h, h, need_weights=False)[0]


class Runs(nn.Module):
    def __init__(self, kind, dropout):
        super().__init__()
        self.cells = kind(4, 4, 2, dropout=dropout, batch_first=True)

    def forward(self, h):
        return self.cells(h)[0]


class Packed(Runs):
    def forward(self, h):
        packed = nn.utils.rnn.pack_padded_sequence(h, [5, 5, 4, 3, 2, 2], batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True)[0]


ATTENTION = {
    "by position": lambda p: Attends(p, False),
    "by name": lambda p: Attends(p, True),
    "multi-head": Own,
    "separate weights": lambda p: Own(p, kdim=4, vdim=4, bias=False),
    "encoder layer": lambda p: nn.TransformerEncoderLayer(4, 2, 8, p, batch_first=True),
}
RECURRENT = {
    "LSTM": lambda p: Runs(nn.LSTM, p),
    "GRU": lambda p: Runs(nn.GRU, p),
    "tanh": lambda p: Runs(nn.RNN, p),
    "packed": lambda p: Packed(nn.LSTM, p),
}


class Net(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.activation, self.between, self.last = nn.Linear(4, 4), nn.Tanh(), between, nn.Linear(4, 2)
        self.seen = Switches()

    def forward(self, x):
        h = self.activation(self.first(x))
        with self.seen:
            mixed = self.between(h)
        return self.last(mixed.mean(1))


def problem(make, dropout, training=True):
    """A network, a step that draws the same every time, and its gradient by autograd."""
    torch.manual_seed(0)
    net = Net(make(dropout)).double().train(training)
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(0, 2, (6,))

    def closure():
        torch.manual_seed(1)
        return F.cross_entropy(net(x), y)

    closure().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net.seen = Switches()
    return net, closure, expected


def stepped(make, dropout, training=True):
    """A network that a step of the exact rule has run on; how far its gradient is from autograd's."""
    net, closure, expected = problem(make, dropout, training)
    ebm.Learner(net, "zero-divergence", layers=["activation"]).backward(closure)
    return net, max(float((p.grad - expected[name]).abs().max()) for name, p in net.named_parameters())


ON = {(True, True, True)}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_that_drops_takes_no_fused_kernel_and_is_right(kind):
    net, apart = stepped(ATTENTION[kind], 0.4)
    assert (False, False, False) in net.seen.fused
    assert apart < 1e-12
    outside = Switches()
    with outside:
        torch.ones(2) + 1
    assert outside.fused == ON


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_that_drop_take_no_fused_kernel_and_are_right(kind):
    net, apart = stepped(RECURRENT[kind], 0.4)
    assert False in net.seen.cudnn
    assert apart < 1e-12
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("kind", [*ATTENTION, *RECURRENT])
@pytest.mark.parametrize("case", ["rate 0", "evaluation"])
def test_where_nothing_is_dropped_the_kernel_is_the_users_own(kind, case):
    if kind in ("by position", "by name") and case == "evaluation":
        pytest.skip("the function does not know of evaluation")
    make = {**ATTENTION, **RECURRENT}[kind]
    net, apart = stepped(make, 0.0 if case == "rate 0" else 0.4, case == "rate 0")
    assert net.seen.fused == ON
    assert net.seen.cudnn == {True}
    assert apart < 1e-12


@pytest.mark.parametrize("make", [ATTENTION["by name"], RECURRENT["LSTM"]])
def test_after_an_error_within_switches_are_as_they_were(make):
    net = Net(make(0.4)).double()
    x = torch.randn(6, 5, 4, dtype=torch.float64)

    class Fails(Switches):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise ZeroDivisionError

    net.seen = Fails()
    with pytest.raises(ZeroDivisionError):
        ebm.Learner(net, "zero-divergence").backward(lambda: net(x).sum())
    assert torch.backends.cudnn.enabled
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("kind", ["encoder layer", "LSTM"])
def test_weak_nudges_keep_the_draws(kind):
    """At other states the same units are dropped: the update tends to autograd's gradient, with slope 1 in lambda."""
    net, closure, expected = problem({**ATTENTION, **RECURRENT}[kind], 0.4)
    errors = []
    for strength in (1e-4, 1e-5):
        algorithm = ebm.algorithm("pc-nudge", nudge=ebm.OneSided(strength))
        update = ebm.Learner(net, algorithm, layers=["activation"]).gradients(closure)
        errors.append(ebm.metrics.alignment(update, expected)["relative_error"])
    assert 8 < errors[0] / errors[1] < 12


@pytest.mark.parametrize(("dropout", "train", "expected"), [(0.0, True, False), (0.3, False, False), (0.3, True, True)])
def test_the_recurrent_layers_of_cudnn_draw_where_they_drop(dropout, train, expected):
    """They are marked as random whether they drop or not, and would all be refused."""
    func, x = torch.ops.aten._cudnn_rnn.default, torch.ones(2, 2, 2)
    assert torch.Tag.nondeterministic_seeded in func.tags
    args = (x, [x], 4, None, x, None, 2, 2, 0, 1, False, dropout, train, False, [], None)
    assert draws(func, args, {}) is expected
    assert draws(func, args[:-1], {"dropout_state": None}) is expected
