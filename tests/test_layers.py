"""Which calls carry states, read off the wiring of a pass, against wirings written down by hand."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def table(module, *inputs, **options):
    found = ebm.summary(module, *(inputs or (X,)), **options)
    return [(f"{r.name}#{r.call}" if r.call else r.name, r.parents) for r in found.layers], found.readout


def exact(module, closure, tolerance=1e-12, **options):
    """Zero-divergence equals backprop for any wiring, if and only if the wiring was understood."""
    found = ebm.Learner(module, "zero-divergence", **options).gradients(closure)
    true = ebm.reference.backprop(module, closure)
    assert sorted(found) == sorted(true)
    assert ebm.metrics.alignment(found, true)["relative_error"] < tolerance


def nudged(module, closure, strength=1e-5, **options):
    """So does a relaxed weak nudge, up to O(lambda)."""
    algorithm = ebm.algorithm("pc-nudge", nudge=ebm.OneSided(strength), relaxer=ebm.ErrorCoordinates(50, tol=1e-9))
    found = ebm.Learner(module, algorithm, **options).gradients(closure)
    assert ebm.metrics.alignment(found, ebm.reference.backprop(module, closure))["relative_error"] < 1e3 * strength


def both(module, *inputs, **options):
    torch.manual_seed(3)
    closure = lambda: (module(*(inputs or (X,))) - 0.3).square().mean()  # noqa: E731
    exact(module, closure, **options)
    nudged(module, closure, **options)


class Residual(nn.Module):
    """One in-place ReLU called three times, functional skips, as torchvision's blocks."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.head = (nn.Linear(6, 6).double() for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.inner(x))
        h = self.outer(h)
        h += x
        h = self.relu(h)
        z = self.relu(self.outer(h) + h)
        return self.head(z)


def test_each_call_of_a_shared_in_place_activation_is_a_layer():
    torch.manual_seed(0)
    net = Residual()
    layers, readout = table(net)
    assert layers == [("relu", ("input",)), ("relu#1", ("relu",)), ("relu#2", ("relu#1",))]
    assert readout == ("head.weight", "head.bias")
    both(net)


class Wiring(nn.Module):
    """Two parents, a branch whose result is thrown away, and a skip straight to the output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.waste, self.out = (nn.Linear(6, 6).double() for _ in range(5))
        self.tanh, self.gelu, self.silu, self.elu = nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ELU()

    def forward(self, x):
        p, q = self.tanh(self.a(x)), self.gelu(self.b(x))
        self.elu(self.waste(p))
        r = self.silu(self.c(p * q))
        return self.out(r) + q


def test_parents_are_the_states_that_the_drive_is_computed_from():
    torch.manual_seed(0)
    net = Wiring()
    layers, readout = table(net)
    assert layers == [("tanh", ("input",)), ("gelu", ("input",)), ("silu", ("tanh", "gelu"))]
    assert readout == ("out.weight", "out.bias")
    both(net)


def test_how_local_an_update_is_counts_modules_between_states():
    net = nn.Sequential(
        nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4), nn.ReLU()
    ).double()
    rows = ebm.summary(net, X).layers
    assert [(r.name, r.state_shape, r.activation, r.modules_between, r.num_parameters) for r in rows] == [
        ("2", (5, 6), "Tanh", 2, 42 + 12),
        ("5", (5, 4), "ReLU", 2, 42 + 28),
    ]
    assert rows[0].parameters == ("0.weight", "0.bias", "1.weight", "1.bias")


TANH_END = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()).double()
LINEAR_END = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()


@pytest.mark.parametrize(
    ("net", "options", "expected"),
    [
        (TANH_END, {}, ["1", "3"]),
        (TANH_END, {"output": "readout"}, ["1"]),
        (TANH_END, {"output": "state"}, ["1", "3"]),
        (LINEAR_END, {}, ["1"]),
        (LINEAR_END, {"output": "readout"}, ["1"]),
        (LINEAR_END, {"output": "state"}, ["1", "2"]),
        (LINEAR_END, {"layers": nn.Linear}, ["0"]),
        (LINEAR_END, {"layers": nn.Linear, "output": "state"}, ["0", "2"]),
        (LINEAR_END, {"layers": ["0", "1"]}, ["0", "1"]),
        (LINEAR_END, {"layers": (nn.Tanh, nn.Linear)}, ["0", "1"]),
        (LINEAR_END, {"layers": lambda m: isinstance(m, nn.Tanh)}, ["1"]),
    ],
)
def test_the_output_is_a_state_if_the_network_ends_in_an_activation_or_if_asked(net, options, expected):
    layers, _ = table(net, **options)
    assert [name for name, _ in layers] == expected
    both(net, **options)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).double()
        self.policy = nn.Sequential(nn.Linear(8, 3), nn.Tanh()).double()
        self.value = nn.Linear(8, 1).double()

    def forward(self, *, observation):
        h = self.trunk(observation)
        return {"policy": self.policy(h), "value": self.value(h)}


def test_each_head_decides_for_itself():
    torch.manual_seed(0)
    net = TwoHeads()

    def closure():
        out = net(observation=X)
        return (out["policy"] - 0.2).square().mean() + (out["value"] - 1).abs().mean()

    def names(output):
        learner = ebm.Learner(net, output=output)
        learner.gradients(closure)
        return learner.report["layers"]

    assert names("auto") == ["trunk.1", "policy.1"]
    assert names("readout") == ["trunk.1"]
    assert names("state") == ["trunk.1", "policy.1", "value"]
    for output in ("auto", "readout", "state"):
        exact(net, closure, output=output)
        nudged(net, closure, output=output)


def test_a_penalty_on_hidden_activity_or_weights_does_not_make_an_output_of_a_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def closure():
        h = net[1](net[0](X))
        penalty = 0.1 * h.abs().mean() + 0.01 * sum(p.square().sum() for p in net.parameters())
        return net[2](h).square().mean() + penalty

    for output in ("auto", "readout"):
        learner = ebm.Learner(net, output=output)
        learner.gradients(closure)
        assert learner.report["layers"] == ["1"]
        exact(net, closure, output=output)
        nudged(net, closure, output=output)


class Functional(nn.Module):
    """Nonlinearities that are functions: states sit at the outputs of the weighted modules."""

    def __init__(self):
        super().__init__()
        self.l1, self.norm, self.l2, self.l3 = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.l3(F.relu(self.l2(torch.tanh(self.norm(self.l1(x))))))


def test_without_activation_modules_states_sit_at_the_outputs_of_weighted_modules():
    net = Functional().double()
    assert table(net) == ([("l1", ("input",)), ("l2", ("l1",))], ("l3.weight", "l3.bias"))
    both(net)


class OwnLinear(nn.Module):
    """A linear map of another library's kind, with its weight the other way round."""

    def __init__(self, a, b):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(a, b) / a**0.5), nn.Parameter(torch.zeros(b))

    def forward(self, x):
        return x @ self.weight + self.shift


class Tagger(nn.Module):
    """A table, two linear maps of another kind, and a read-out by the table: no activation that is a module."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.up, self.down = OwnLinear(6, 8), OwnLinear(8, 6)

    def forward(self, tokens):
        return self.down(torch.tanh(self.up(self.scale(self.table(tokens))))) @ self.table.weight.T


def test_weighted_modules_of_other_libraries_are_found_by_what_they_multiply_by():
    net = Tagger().double()
    tokens = torch.arange(12).remainder(9).view(4, 3)
    rows, readout = table(net, tokens)
    assert rows == [("up", ("input",)), ("down", ("up",))]
    assert readout == ("table.weight",)
    exact(net, lambda: F.cross_entropy(net(tokens).mT, tokens))


def test_without_activation_modules_repeated_blocks_are_layers():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True, dtype=torch.float64)
    net = nn.Sequential(nn.TransformerEncoder(block, 3), nn.Flatten(), nn.Linear(24, 2).double())
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    layers, _ = table(net, x)
    assert [name for name, _ in layers] == [f"0.layers.{i}" for i in range(3)]
    assert all(row.activation is None for row in ebm.summary(net, x).layers)
    both(net, x)


def test_every_tensor_that_a_block_returns_is_a_state():
    torch.manual_seed(0)
    lstm, head = nn.LSTM(6, 7, num_layers=2, batch_first=True).double(), nn.Linear(7, 2).double()
    net = nn.ModuleDict({"lstm": lstm, "head": head})
    x = torch.randn(5, 4, 6, dtype=torch.float64)

    def closure():
        outputs, (last, _) = lstm(x)
        return (head(outputs.mean(1) + last[-1]) - 0.3).square().mean()

    learner = ebm.Learner(net)
    learner.gradients(closure)
    assert learner.report["layers"] == ["lstm", "lstm[1]"]
    exact(net, closure)
    nudged(net, closure)


@pytest.mark.parametrize("how", ["requires_grad", "no_grad"])
def test_a_frozen_encoder_is_an_input_not_a_layer(how):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()).double()
    head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    net = nn.ModuleDict({"encoder": encoder, "head": head})
    if how == "requires_grad":
        encoder.requires_grad_(False)

    def closure():
        with torch.set_grad_enabled(how == "requires_grad"):
            features = encoder(X)
        return (head(features) - 0.3).square().mean()

    learner = ebm.Learner(net)
    learner.gradients(closure)
    assert learner.report["layers"] == ["head.1"]
    exact(net, closure)


def test_the_same_encoder_called_twice_in_a_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    closure = lambda: (net(X) - net(X.flip(0))).square().sum(1).clamp_max(2).mean() - net(X).std()  # noqa: E731
    learner = ebm.Learner(net)
    learner.gradients(closure)
    assert learner.report["layers"] == ["1", "1#1", "1#2"]
    exact(net, closure)
    nudged(net, closure)


def test_tied_weights_gather_the_updates_of_every_use():
    torch.manual_seed(0)
    embed = nn.Embedding(11, 6)
    out = nn.Linear(6, 11, bias=False)
    out.weight = embed.weight
    net = nn.Sequential(embed, nn.Linear(6, 6), nn.GELU(), out).double()
    tokens = torch.randint(11, (5, 4))
    closure = lambda: F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())  # noqa: E731
    exact(net, closure)
    nudged(net, closure)


def test_layers_are_found_again_when_modes_or_calls_change():
    torch.manual_seed(0)

    class Loop(nn.Module):
        times = 2

        def __init__(self):
            super().__init__()
            self.cell, self.tanh, self.out = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)

        def forward(self, x):
            for _ in range(self.times):
                x = self.tanh(self.cell(x))
            return self.out(x)

    net = Loop().double()
    learner = ebm.Learner(net, "zero-divergence")
    closure = lambda: net(X).square().mean()  # noqa: E731
    for times in (2, 3, 1):
        net.times = times
        found = learner.gradients(closure)
        assert len(learner.report["layers"]) == times
        assert ebm.metrics.alignment(found, ebm.reference.backprop(net, closure))["relative_error"] < 1e-12
    net.cell.requires_grad_(False)
    net.tanh.register_parameter("unused", nn.Parameter(torch.zeros(())))
    found = learner.gradients(closure)  # the read-out alone learns, and nothing lies before it that does
    assert learner.report["layers"] == []
    assert {name for name, gradient in found.items() if gradient.any()} == {"out.weight", "out.bias"}
    assert ebm.metrics.alignment(found, ebm.reference.backprop(net, closure))["relative_error"] < 1e-12


def test_a_branch_on_states_is_that_of_the_recorded_pass():
    """The energy is that of the program that ran: at a vanishing nudge its gradient is plain autograd's."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    def closure():
        h = net[1](net[0](X))
        if h.sum() < -1e-9 + closure.start:  # true once the states have moved down
            h = net[1](h)
        return net[2](h).sum()

    with torch.no_grad():
        closure.start = float(net[1](net[0](X)).sum())
        net[2].weight.fill_(1.0)
    exact(net, closure)
    ebm.Learner(net, "predictive-coding", loss_reduction="sum").gradients(closure)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_runs_as_written_and_keeps_its_names():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    net = nn.ModuleDict({"net": torch.compile(inner, backend="eager")})
    closure = lambda: net["net"](X).square().mean()  # noqa: E731
    closure()
    learner = ebm.Learner(net, "zero-divergence")
    found = learner.gradients(closure)
    assert sorted(found) == ["net.0.bias", "net.0.weight", "net.2.bias", "net.2.weight"]
    assert learner.report["layers"] == ["net.1"]
    exact(net, closure)


def test_parametrizations_get_the_gradient_of_their_own_parameters():
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    net = nn.Sequential(normed, nn.Tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 2))).double()
    both(net)
    both(net.eval())


def test_gradient_penalties_are_exact_and_scripted_networks_are_refused_by_name():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def penalised():
        x = X.clone().requires_grad_()
        out = net(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.mean() + slope.square().mean()

    exact(net, penalised)
    scripted = nn.ModuleDict({"inner": torch.jit.trace(net, X)})
    with pytest.raises(ebm.EBMError):
        ebm.Learner(scripted).gradients(lambda: scripted["inner"](X).sum())


def test_what_goes_around_the_states_is_said(caplog):
    """A residual stream passes by the activations of its blocks, which is why the blocks get the states."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act, self.mix = nn.Linear(6, 6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)

        def forward(self, x):
            x = x + self.mix(x)
            return x + self.b(self.act(self.a(x)))

    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block(), Block(), nn.Linear(6, 2)).double()
    both(net, layers=nn.GELU)
    assert "5 weighted modules" in caplog.text
    caplog.clear()
    layers, readout = table(net)
    assert layers == [("0", ("input",)), ("1", ("0",)), ("2", ("1",))]
    assert readout == ("3.weight", "3.bias")
    assert not caplog.records
    both(net)


def test_a_second_loss_around_states_at_blocks_is_not_told_to_take_blocks(caplog):
    """As a router's loss of balance: the blocks have the states, and it reads what lies within them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 2), nn.Linear(6, 24), nn.Linear(24, 6)

        def forward(self, x):
            self.balance = (weights := self.gate(x).softmax(-1)).var()
            return x + self.down(torch.relu(self.up(x))) * weights[:, :1]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), Block(), Block(), Block(), nn.Linear(6, 2)).double()
    closure = lambda: net(X).square().mean() + sum(net[i].balance for i in (1, 2, 3))  # noqa: E731
    learner = ebm.Learner(net, layers=Block)
    learner.gradients(closure)
    assert "weighted modules of Sequential reach the loss around" in caplog.text
    assert "whole modules already" in caplog.text
    assert "layers=BlockType" not in caplog.text
    caplog.clear()
    ebm.Learner(net, layers=nn.Linear).gradients(closure)  # the remedy
    assert "reach the loss around" not in caplog.text


def test_the_table_takes_inputs_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)

        def forward(self, values, mask=None):
            return self.b(self.act(self.a(values))) * (1 if mask is None else mask)

    batch = {"values": torch.randn(3, 6), "mask": torch.ones(3, 1)}
    assert str(ebm.summary(Named(), **batch)) == str(ebm.summary(Named(), *batch.values()))
    with pytest.raises(ebm.ConfigurationError, match="unexpected keyword argument 'layer'"):
        ebm.summary(Named(), batch["values"], layer=["act"])


class Functions(nn.Module):
    """Weights in a list, which functions use, and one module that takes a state."""

    def __init__(self, kind):
        super().__init__()
        held = [nn.Parameter(0.4 * torch.randn(6, 6)) for _ in range(5)]
        self.weights = nn.ParameterDict({f"w{k}": w for k, w in enumerate(held)}) if kind == "dict" else None
        self.weights = nn.ParameterList(held) if self.weights is None else self.weights
        if kind.startswith("held"):
            self.weights = None
            for k, w in enumerate(held):
                setattr(self, f"w{k}", w)
                if kind == "held with biases":
                    setattr(self, f"b{k}", nn.Parameter(torch.zeros(6)))
        self.gate = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 6), nn.Sigmoid()) if kind == "gate" else None
        self.pooler = nn.Tanh()
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        if self.weights is None:
            for k in range(5):
                x = torch.relu(x @ getattr(self, f"w{k}") + getattr(self, f"b{k}", 0.0))
            return self.head(self.pooler(x))
        for w in self.weights.values() if isinstance(self.weights, nn.ParameterDict) else self.weights:
            x = torch.relu(x @ w)
        return self.head(self.pooler(x) if self.gate is None else x * self.gate(x))


@pytest.mark.parametrize("kind", ["list", "dict", "gate", "held", "held with biases"])
def test_weights_that_functions_use_are_counted_one_by_one(kind, caplog):
    torch.manual_seed(0)
    net = Functions(kind).double()
    ebm.Learner(net).gradients(lambda: net(X).square().mean())
    if kind != "gate":
        assert ebm.summary(net, X).layers[0].modules_between == 5
    assert ("5 weighted modules" if kind == "gate" else "5 of 6 weighted modules") in caplog.text


def test_outputs_in_dataclasses_carry_states():
    @dataclass
    class Output:
        hidden: torch.Tensor
        name: str = "x"

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            return Output(hidden=torch.tanh(self.lin(x)))

    torch.manual_seed(0)
    net = nn.ModuleDict({"encoder": Encoder(), "head": nn.Linear(6, 2)}).double()
    closure = lambda: net["head"](net["encoder"](X).hidden).square().mean()  # noqa: E731
    learner = ebm.Learner(net, layers=["encoder"])
    learner.gradients(closure)
    assert learner.report["layers"] == ["encoder"]
    exact(net, closure, layers=["encoder"])
    nudged(net, closure, layers=["encoder"])
    found = ebm.summary(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Encoder()).double(), X)  # which returns one
    assert [layer.name for layer in found.layers] == ["1"]


def test_a_time_major_batch_or_a_loose_tensor_is_not_the_batch_size():
    """The nudge is per sample: a wrong B would be a wrong lambda."""
    torch.manual_seed(0)
    lstm, head = nn.LSTM(6, 7).double(), nn.Linear(7, 2).double()
    net = nn.ModuleDict({"lstm": lstm, "head": head})
    x = torch.randn(12, 5, 6, dtype=torch.float64)
    learner = ebm.Learner(net)
    step = learner.begin(lambda: head(lstm(x)[1][0][-1]).square().mean(), [torch.Size([4]), x.shape, torch.Size([5])])
    with step.first_pass():
        loss = head(lstm(x)[1][0][-1]).square().mean()
    step.surrogate(loss)
    assert len(learner.report["residual"]) == 5


def test_a_module_without_forward_is_told_what_to_summarise():
    with pytest.raises(ebm.ConfigurationError, match=r"ebm\.summary\(module\.net, x\)"):
        ebm.summary(nn.ModuleList([nn.Linear(6, 2)]), X)


def test_printed_table_names_layers_parents_and_parameters():
    text = str(ebm.summary(Residual(), X))
    assert "Residual: 3 layers with states" in text
    line = next(line for line in text.splitlines() if line.startswith("relu#1"))
    assert "5 x 6" in line
    assert "ReLU" in line
    assert "outer.weight, outer.bias (42)" in line


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(6, 7, bidirectional=True, batch_first=True), nn.Linear(14, 2)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


PERCEPTRON = [nn.Linear(6, 8), nn.PReLU(8), nn.Dropout(0.5), nn.Linear(8, 4), nn.GLU()]
CONV = [nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.MaxPool2d(2)]
CONV += [
    nn.Dropout2d(0.3),
    nn.Conv2d(4, 4, 3, padding=1),
    nn.InstanceNorm2d(4, affine=True),
    nn.Softplus(),
    nn.AvgPool2d(1),
]


@pytest.mark.parametrize(
    ("make", "shape", "layers"),
    [
        (lambda: nn.Sequential(*CONV, nn.Flatten(), nn.Linear(36, 2)), (5, 36), ["4", "8"]),
        (lambda: nn.Sequential(*PERCEPTRON), (5, 6), ["1", "4"]),
        (SelfAttention, (5, 3, 6), ["attention"]),
        (Recurrent, (5, 3, 6), ["gru"]),
    ],
    ids=["convolutions", "prelu, dropout, glu", "attention", "gru"],
)
@pytest.mark.parametrize("training", [True, False])
def test_common_modules(make, shape, layers, training):
    torch.manual_seed(0)
    net = make().double().train(training)
    x = torch.randn(shape, dtype=torch.float64)
    assert [name for name, _ in table(net, x)[0]] == layers
    both(net, x)


class Branches(nn.Module):
    """A gate at the input, a body, a part that no loss looks at, and one for evaluation alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Identity()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.act, self.watched, self.late, self.pick = nn.Tanh(), nn.Linear(6, 3), nn.Linear(2, 2), nn.Flatten(0)
        self.double()

    def forward(self, x):
        h = self.act(self.second(self.act(self.first(self.gate(x)))))
        self.watched(h)
        self.pick((h > 0).long())
        return self.head(h) if self.training else self.late(self.head(h))


@pytest.mark.parametrize(
    ("asked", "name", "why"),
    [
        (["act", "watched"], "watched", "the loss does not depend on"),
        (["act", "late"], "late", "not called"),
        (("act", "pick"), "pick", "no floating-point tensor"),
        (["first", "head"], "head", "it is the read-out"),
        ((nn.Tanh, nn.Identity), "gate", "no trainable parameter feeds it"),
    ],
)
def test_what_is_asked_for_carries_a_state_or_an_error_says_why_not(asked, name, why):
    net = Branches()
    closure = lambda: net(X).square().mean()  # noqa: E731
    for look in (
        lambda: ebm.Learner(net, layers=asked).gradients(closure),
        lambda: ebm.summary(net, X, layers=asked),
    ):
        with pytest.raises(ebm.LayerDiscoveryError, match=rf"carries no state\. '{name}': .*{why}"):
            look()


@pytest.mark.parametrize("asked", [nn.Identity, lambda m: isinstance(m, nn.Identity)])
def test_what_matches_nothing_useful_is_an_error_with_the_reason(asked):
    net = Branches()
    with pytest.raises(ebm.LayerDiscoveryError, match=r"No layer.*'gate': no trainable parameter feeds it"):
        ebm.Learner(net, layers=asked).gradients(lambda: net(X).square().mean())


class Routed(nn.Module):
    """Each batch goes through the blocks that it names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.double()

    def forward(self, x, way):
        h = self.first(x)
        for index in way:
            h = h + self.blocks[index](h)
        return self.head(h)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("asked", [["blocks.0", "blocks.1", "blocks.2"], ["blocks.0.1", "blocks.1.1", "blocks.2.1"]])
def test_named_blocks_may_be_left_out_of_a_pass(asked, capture):
    """From the first pass on, and all of them later; each time as a learner that was asked for those alone."""
    net = Routed()
    learner = ebm.Learner(net, "predictive-coding", layers=asked, capture=capture)
    for way in ([1], [0, 2], [], [2, 1, 0], [1], []):
        found = learner.gradients(lambda way=way: net(X, way).square().mean())
        named = [asked[k] for k in way]
        if named:
            closure = lambda way=way: net(X, way).square().mean()  # noqa: E731
            wanted = ebm.Learner(net, "predictive-coding", layers=named, capture=capture).gradients(closure)
        else:
            parameters = [*net.first.named_parameters(prefix="first"), *net.head.named_parameters(prefix="head")]
            slopes = torch.autograd.grad(net(X, way).square().mean(), [p for _, p in parameters])
            wanted = {name: slope for (name, _), slope in zip(parameters, slopes, strict=True)}
        assert learner.report["layers"] == named
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-12) for name in wanted)


def test_a_named_block_whose_weights_are_used_without_calling_it_is_refused():
    """It would be a part of the next layer, and nobody would know."""
    net = Routed()

    def closure():
        h = F.linear(net.first(X), net.blocks[0][0].weight)
        return net.head(h + net.blocks[1](h)).square().mean()

    with pytest.raises(ebm.LayerDiscoveryError, match=r"'blocks\.0': it was not called"):
        ebm.Learner(net, layers=["blocks.0", "blocks.1"]).gradients(closure)


def test_blocks_none_of_which_is_ever_called_are_refused():
    net = Routed()
    with pytest.raises(ebm.LayerDiscoveryError, match=r"blocks\.0"):
        ebm.Learner(net, layers=["blocks.0", "blocks.1"]).gradients(lambda: net(X, []).square().mean())


class ByTensors(nn.Module):
    """Weights as bare tensors and functions of torch."""

    def __init__(self, marked):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 8))
        self.last = nn.Parameter(torch.randn(8, 2))
        self.one, self.two = (nn.Identity(), nn.Identity()) if marked else (lambda h: h, lambda h: h)
        self.double()

    def forward(self, x):
        h = self.one(torch.tanh(x @ self.first))
        return self.two(torch.tanh(h @ self.second)) @ self.last


@pytest.mark.parametrize("linear", [False, True])
def test_networks_without_calls_are_told_how_to_mark_layers_and_the_remedy_works(linear):
    net: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)).double() if linear else ByTensors(False)
    run = (lambda: F.linear(F.linear(X, net[0].weight).relu(), net[1].weight)) if linear else lambda: net(X)
    with pytest.raises(ebm.LayerDiscoveryError, match=r"used directly.*nn\.Identity\(\).*layers="):
        ebm.Learner(net).gradients(lambda: run().square().mean())
    marked = ByTensors(True)
    learner = ebm.Learner(marked, "zero-divergence", layers=["one", "two"])
    found = learner.gradients(lambda: marked(X).square().mean())
    assert learner.report["layers"] == ["one", "two"]
    slopes = torch.autograd.grad(marked(X).square().mean(), list(marked.parameters()))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found.values(), slopes, strict=True))


def test_a_network_that_calls_its_head_alone_is_told_so_too():
    net = ByTensors(False)
    net.head = nn.Linear(2, 2).double()
    with pytest.raises(ebm.LayerDiscoveryError, match=r"\(first, second, last\): tensors are used directly"):
        ebm.Learner(net).gradients(lambda: net.head(net(X)).square().mean())


def test_an_input_that_is_named_carries_a_state():
    """Nothing predicts it but the data: with a list of names somebody has said that it is to be free."""
    net = Branches()
    learner = ebm.Learner(net, layers=["gate", "act"])
    learner.gradients(lambda: net(X).square().mean())
    assert learner.report["layers"] == ["gate", "act", "act#1"]
    assert ebm.summary(net, X, layers=["gate", "act"]).layers[0].parents == ("input",)


def test_a_read_out_that_is_named_carries_a_state_if_the_output_is_one():
    net = Branches()
    learner = ebm.Learner(net, layers=["first", "head"], output="state")
    learner.gradients(lambda: net(X).square().mean())
    assert learner.report["layers"] == ["first", "head"]


def test_types_and_predicates_ask_for_no_module_in_particular():
    net = Branches()
    found = table(net, layers=nn.Linear)[0]
    assert [name for name, _ in found] == ["first", "second"]
    assert table(net, layers=lambda m: isinstance(m, nn.Linear | nn.Identity))[0] == found
    assert table(net, layers=(nn.Linear, nn.GELU))[0] == found


def test_a_frozen_part_may_be_named_and_is_said_to_carry_nothing_yet(caplog):
    """As while the body is frozen for the first epochs: once it is thawed its layers carry states."""
    net = Branches()
    net.first.requires_grad_(False)
    learner = ebm.Learner(net, layers=["first", "second"])
    closure = lambda: net(X).square().mean()  # noqa: E731
    learner.gradients(closure)
    assert learner.report["layers"] == ["second"]
    assert "'first': no trainable parameter feeds it" in caplog.text
    net.first.requires_grad_(True)
    learner.gradients(closure)
    assert learner.report["layers"] == ["first", "second"]


def test_evaluation_may_have_fewer_layers_than_training_and_other_ones():
    """A network at its free equilibrium is looked at in both modes, with one list of layers."""
    net = Branches()
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(50))
    learner = ebm.Learner(net, algorithm, layers=["second", "act"])
    learner.gradients(lambda: net(X).square().mean())
    net.eval()
    with learner.free_phase(lambda: net(X)):
        assert net(X).shape == (5, 2)


class Dense(nn.Module):
    """A weighted module of one's own, which discovery has no reason to take for a layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x):
        return x @ self.weight


class Pooled(nn.Module):
    """A body of functions, and one activation module at its end."""

    def __init__(self, depth, body, listed):
        super().__init__()
        torch.manual_seed(0)
        layers = [body() for _ in range(depth)]
        self.body = nn.ModuleList(layers) if listed else nn.Module()
        for index, layer in enumerate(layers):
            self.body.add_module(str(index), layer)
        self.pooler, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)
        self.double()

    def forward(self, x):
        for layer in self.body.children():
            x = F.relu(layer(x))
        return self.head(self.act(self.pooler(x)))


@pytest.mark.parametrize(
    ("depth", "listed", "options", "states", "said"),
    [
        (5, True, {}, [f"body.{i}" for i in range(5)], False),
        (5, False, {}, ["act"], True),
        (1, False, {}, ["act"], False),
        (5, True, {"layers": ["act"]}, ["act"], False),
    ],
)
def test_an_activation_that_takes_all_the_states_is_said(depth, listed, options, states, said, caplog):
    """Of 7 weighted modules 6 are trained through each other; who names the layer has chosen it."""
    net = Pooled(depth, Dense, listed)
    assert [name for name, _ in table(net, **options)[0]] == states
    assert ("lie in the drive of one layer" in caplog.text) == said
    both(net, **options)


def test_stalled_states_are_said_once_with_their_residual(caplog):
    class Stalls(ebm.GradientDescent):
        def relax(self, landscape, start, strength):
            found = super().relax(landscape, start, strength)
            found.status, found.residual = "stalled", torch.full_like(found.residual, 0.25)
            return found

    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    learner = ebm.Learner(net, ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(1.0), Stalls(0.1, 5)))
    for _ in range(3):
        learner.gradients(lambda: net(X).square().mean())
    (said,) = [record.getMessage() for record in caplog.records if "stalled" in record.getMessage()]
    assert "a force of up to 0.25 of what it started with" in said


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embedding, self.encoder, self.head = nn.Embedding(9, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 9)
        self.position = nn.Parameter(torch.zeros(32, 8))
        self.double()

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens) + self.position[: tokens.shape[1]]))


SAID = {
    "around": "around the states",
    "drive": "drive of one layer",
    "absent": "carry no state as",
    "sum": "sums over",
}


@pytest.mark.parametrize("kind", SAID)
def test_what_is_said_of_a_module_is_said_once_however_many_lengths_come(kind, caplog):
    """Every length is another program, of which sixteen are kept: more of them come again, as new ones do."""
    net, layers, reduction = Text(), nn.Linear, "sum" if kind == "sum" else "mean"
    if kind == "drive":
        net, layers = Pooled(5, Dense, listed=False), None
    if kind == "absent":
        layers = ["encoder.layers.0", "encoder.layers.1"]
        for part in (net.encoder.layers[0], net.embedding):
            part.requires_grad_(False)
        net.position.requires_grad_(False)
    learner = ebm.Learner(net, "zero-divergence", layers=layers)
    for length in (*range(3, 21), 3, 4):
        tokens, rows = torch.arange(4 * length).view(4, length) % 9, X.repeat(4, 1)[:length]

        def loss():
            if kind == "drive":
                return net(rows).square().mean()  # noqa: B023
            return F.cross_entropy(net(tokens).mean(1), tokens[:, 0], reduction=reduction)  # noqa: B023

        learner.backward(loss)
    assert caplog.text.count(SAID[kind]) == 1
    assert "(, " not in caplog.text


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.full((6,), 0.125))

    def forward(self, x):
        return x + self.position


class Held(nn.Module):
    """A network with a parameter that a part of it holds, the network itself, or what it is in; or with none."""

    def __init__(self, by, body):
        super().__init__()
        self.by, self.body = by, body
        self.added = Added() if by == "part" else nn.Identity()
        if by == "itself":
            self.position = nn.Parameter(torch.full((6,), 0.125))
        elif by == "used elsewhere":
            self.log_sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        x = self.added(x)
        if self.by != "part":
            x = x + (self.position if self.by == "itself" else 0.125)
        return self.body(x).squeeze(-1)


def body(end, normed=False):
    torch.manual_seed(0)
    parts = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)]
    if normed:
        parts = [nn.utils.parametrizations.weight_norm(p) if isinstance(p, nn.Linear) else p for p in parts]
    return nn.Sequential(*parts, *end).double()


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "parametrized"])
@pytest.mark.parametrize("layers", [None, nn.Linear, ["body.1", "body.3"]], ids=str)
@pytest.mark.parametrize("output", ["auto", "readout", "state"])
@pytest.mark.parametrize("end", [[], [nn.Sigmoid()]], ids=["linear", "sigmoid"])
def test_a_parameter_that_a_network_holds_itself_makes_its_head_no_hidden_layer(end, output, layers, normed):
    """Who holds a parameter is of no consequence: with a state in place of the read-out the update is another."""
    found = []
    for by in ("part", "itself", "used elsewhere"):
        net = Held(by, body(end, normed)).double()
        learner = ebm.Learner(net, "predictive-coding", output=output, layers=layers)
        learner.backward(lambda: (net(X) - 0.3).square().mean())  # noqa: B023
        states = [str(row.key) for row in learner.plan.rows]
        found.append((states, torch.cat([p.grad.flatten() for p in net.body.parameters()])))
    assert found[0][0] == found[1][0] == found[2][0]
    assert all(torch.allclose(update, found[0][1], rtol=1e-10, atol=1e-14) for _, update in found)
    assert output != "readout" or not {"body.4", "body.5"} & set(found[0][0])


@pytest.mark.parametrize("layers", [nn.Linear, None], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3, affine=False), nn.LayerNorm(3, elementwise_affine=False)])
def test_a_norm_without_parameters_is_no_weight_behind_the_head(norm, layers):
    """As the same norm in functional form."""

    class Functional(nn.Module):
        def forward(self, x):
            if isinstance(norm, nn.LayerNorm):
                return F.layer_norm(x, (3,))
            return F.batch_norm(x, None, None, training=True)

    tables = [table(Held("part", body([last])).double(), layers=layers) for last in (norm.double(), Functional())]
    assert tables[0] == tables[1]
    assert tables[0][0][-1][0] != "body.4"


class ByHand(nn.Module):
    """Weights that are used as tensors, or by a method that no hook sees."""

    def __init__(self, body, how):
        super().__init__()
        self.body, self.how = body, how

    def forward(self, x):
        for layer in self.body:
            if isinstance(layer, nn.Linear) and self.how == "tensors":
                x = F.linear(x, layer.weight, layer.bias)
            elif isinstance(layer, nn.Linear) and self.how == "method":
                x = layer.forward(x)
            else:
                x = layer(x)
        return x


@pytest.mark.parametrize("end", [[], [nn.Sigmoid()]], ids=["linear", "sigmoid"])
@pytest.mark.parametrize("output", ["auto", "readout"])
@pytest.mark.parametrize("how", ["tensors", "method"])
def test_a_layer_in_front_of_weights_that_no_module_applies_is_no_read_out(how, output, end):
    """Of two activations the second lost its state: what the record multiplies counts, not who is called."""
    found = []
    for kind in ("calls", how):
        net = ByHand(body(end), kind)
        learner = ebm.Learner(net, "predictive-coding", output=output, layers=nn.Tanh)
        learner.backward(lambda: (net(X) - 0.3).square().mean())  # noqa: B023
        found.append(
            ([str(row.key) for row in learner.plan.rows], torch.cat([p.grad.flatten() for p in net.parameters()]))
        )
    assert found[0][0] == found[1][0] == ["body.1", "body.3"]
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", ["tensors", "method"])
@pytest.mark.parametrize(
    ("algorithm", "output"),
    [("predictive-coding", "state"), ("coupled-learning", "auto"), ("contrastive-hebbian", "auto")],
)
def test_an_output_that_no_module_returns_is_refused_as_a_state(algorithm, output, how):
    """The last hidden layer would be held in its place."""

    def states(how):
        net = ByHand(body([]), how)
        learner = ebm.Learner(net, algorithm, output=output, layers=nn.Tanh)
        learner.gradients(lambda: (net(X) - 0.3).square().mean())
        return [str(row.key) for row in learner.plan.rows]

    with pytest.raises(ebm.LayerDiscoveryError, match="Call a module there"):
        states(how)
    assert states("calls") == ["body.1", "body.3", "body.4"]


def test_a_list_may_ask_for_names_and_types_at_once():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    )
    x, y = torch.randn(5, 3), torch.randint(0, 2, (5,))
    both, by_name = (ebm.Learner(net, "zero-divergence", layers=layers) for layers in (["1", nn.ReLU], ["1", "3"]))
    for learner in (both, by_name):
        learner.gradients(lambda: nn.functional.cross_entropy(net(x), y))
    assert list(both.plan.states) == list(by_name.plan.states)
    with pytest.raises(ebm.ConfigurationError, match="a list of names of modules"):
        ebm.Learner(net, layers=["1", 3])


@pytest.mark.parametrize("name", ["zero-divergence", "pc-nudge"])
@pytest.mark.parametrize("three", [False, True])
def test_a_norm_of_groups_behind_a_state_channels_last(name, three):
    """torch ends the process where the slopes of scale and shift alone are asked for; three steps, also as code."""
    torch.manual_seed(0)
    convolution = nn.Conv3d if three else nn.Conv2d
    parts = [convolution(3, 8, 3), nn.SiLU(), nn.GroupNorm(2, 8), convolution(8, 8, 3), nn.SiLU(), nn.GroupNorm(4, 8)]
    net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(8 * 2 ** (2 + three), 4)).double()
    form = torch.channels_last_3d if three else torch.channels_last
    net = net.to(memory_format=form)
    x = torch.randn(4, 3, *[6] * (2 + three)).double().to(memory_format=form)
    y = torch.randint(4, (4,))
    learner = ebm.Learner(net, name)
    true = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    for _ in range(3):
        found = learner.gradients(lambda: F.cross_entropy(net(x), y))
        off = ebm.metrics.alignment(found, dict(zip(found, true, strict=True)))["relative_error"]
        assert off < (1e-12 if name == "zero-divergence" else 1e-2)
