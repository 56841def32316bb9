"""Where states sit by default in networks as people bring them, against what an expert would choose by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

D = 8


def tensor(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    def __init__(self, d=D, heads=2):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class BertLayer(nn.Module):
    """Normalized after the sum, GELU as a function."""

    def __init__(self, d=D):
        super().__init__()
        self.attention, self.up, self.down = Attention(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """Its one activation module is the pooler's; its table of words holds more numbers than its layers."""

    def __init__(self, d=D):
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(500, d), nn.Embedding(6, d), nn.LayerNorm(d)
        self.layer = nn.ModuleList(BertLayer(d) for _ in range(3))
        self.pooler, self.act, self.classifier = nn.Linear(d, d), nn.Tanh(), nn.Linear(d, 2)

    def forward(self, tokens):
        x = self.norm(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))
        for layer in self.layer:
            x = layer(x)
        return self.classifier(self.act(self.pooler(x[:, 0])))


class VitBlock(nn.Module):
    def __init__(self, d=D):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(d), nn.LayerNorm(d), Attention(d)
        self.fc1, self.act, self.fc2 = nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, depth=3, d=D):
        super().__init__()
        self.patch = nn.Conv2d(1, d, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 5, d))
        self.blocks = nn.Sequential(*[VitBlock(d) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNeXtBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(d, d, 3, padding=1, groups=d), nn.LayerNorm(d)
        self.pw1, self.act, self.pw2 = nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)
        self.gamma = nn.Parameter(torch.full((d,), 0.5))

    def forward(self, x):
        h = self.norm(self.dw(x).movedim(1, -1))
        return x + (self.gamma * self.pw2(self.act(self.pw1(h)))).movedim(-1, 1)


class Stage(nn.Module):
    def __init__(self, before, d, depth):
        super().__init__()
        self.down = nn.Conv2d(before, d, 2, 2)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(d) for _ in range(depth)])

    def forward(self, x):
        return self.blocks(self.down(x))


class ConvNeXt(nn.Module):
    """Rows of blocks within a row of stages: the blocks are the layers."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Stage(1, D, 2), Stage(D, 2 * D, 2)])
        self.norm, self.head = nn.LayerNorm(2 * D), nn.Linear(2 * D, 3)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x.mean((2, 3))))


class SqueezeExcite(nn.Module):
    def __init__(self, d, gate):
        super().__init__()
        self.reduce, self.act, self.expand, self.gate = (
            nn.Conv2d(d, d // 2, 1),
            nn.ReLU(),
            nn.Conv2d(d // 2, d, 1),
            gate,
        )

    def forward(self, x):
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(self, d, gate):
        super().__init__()
        self.up, self.dw = nn.Conv2d(d, 2 * d, 1, bias=False), nn.Conv2d(2 * d, 2 * d, 3, 1, 1, 1, 2 * d, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(2 * d), nn.BatchNorm2d(2 * d), nn.BatchNorm2d(d)
        self.act1, self.act2 = nn.Hardswish(), nn.Hardswish()
        self.se, self.down = SqueezeExcite(2 * d, gate), nn.Conv2d(2 * d, d, 1, bias=False)

    def forward(self, x):
        h = self.act2(self.bn2(self.dw(self.act1(self.bn1(self.up(x))))))
        return x + self.bn3(self.down(self.se(h)))


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Hardswish()
        self.blocks = nn.Sequential(InvertedResidual(4, nn.Sigmoid()), InvertedResidual(4, nn.Hardsigmoid()))
        self.last, self.act2, self.head = nn.Conv2d(4, 8, 1), nn.Hardswish(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.blocks(self.act(self.bn(self.stem(x))))
        return self.head(self.act2(self.last(x)).mean((2, 3)))


class DoubleConv(nn.Sequential):
    def __init__(self, a, b):
        super().__init__(
            nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.ELU(), nn.Conv2d(b, b, 3, padding=1), nn.ELU()
        )


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = DoubleConv(1, 4), DoubleConv(4, 8), DoubleConv(8, 4)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.avg_pool2d(a, 2))
        return self.out(self.c(torch.cat([a, self.up(b)], 1)))


class TimeBlock(nn.Module):
    """A residual block that is told the time; its activations are functions."""

    def __init__(self, a, b):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.norm1, self.norm2, self.time = nn.GroupNorm(1, a), nn.GroupNorm(1, b), nn.Linear(D, b)
        self.skip = nn.Conv2d(a, b, 1)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Ddpm(nn.Module):
    """Its one activation module belongs to the time."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, D), nn.SiLU(), nn.Linear(D, D))
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.downs = nn.ModuleList([TimeBlock(4, 4), TimeBlock(4, 8)])
        self.ups = nn.ModuleList([TimeBlock(16, 4), TimeBlock(8, 4)])

    def forward(self, x):
        t = self.time(torch.linspace(0, 1, 4 * len(x), dtype=x.dtype).reshape(len(x), 4))
        h, kept = self.first(x), []
        for down in self.downs:
            kept.append(h := down(h, t))
        for up in self.ups:
            h = up(torch.cat([h, kept.pop()], 1), t)
        return self.last(F.silu(h))


class Grn(nn.Module):
    """Gated residual network of the temporal fusion transformer."""

    def __init__(self, d):
        super().__init__()
        self.fc1, self.elu, self.fc2, self.norm = nn.Linear(d, d), nn.ELU(), nn.Linear(d, d), nn.LayerNorm(d)
        self.gate, self.glu = nn.Linear(d, 2 * d), nn.GLU()

    def forward(self, x):
        return self.norm(x + self.glu(self.gate(self.fc2(self.elu(self.fc1(x))))))


class Tft(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Linear(3, D), nn.LSTM(D, D, batch_first=True)
        self.before, self.attn, self.after = Grn(D), Attention(), Grn(D)
        self.join, self.glu, self.out = nn.Linear(D, 2 * D), nn.GLU(), nn.Linear(D, 2)

    def forward(self, x):
        h = self.before(self.lstm(self.embed(x))[0])
        return self.out(self.after(h + self.glu(self.join(self.attn(h))))[:, -1])


class NBeatsBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(6, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU())
        self.back, self.fore = nn.Linear(D, 6), nn.Linear(D, 2)

    def forward(self, x):
        h = self.fc(x)
        return self.back(h), self.fore(h)


class NBeats(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(NBeatsBlock() for _ in range(3))

    def forward(self, x):
        total = 0
        for block in self.blocks:
            back, fore = block(x)
            x, total = x - back, total + fore
        return total


class Cells(nn.Module):
    """An encoder with an activation in front of a loop over a cell."""

    def __init__(self, kind):
        super().__init__()
        self.encode, self.act, self.cell, self.out = nn.Linear(3, 5), nn.ReLU(), kind(5, D), nn.Linear(D, 2)

    def forward(self, x):
        h = None
        for t in range(x.shape[1]):
            h = self.cell(self.act(self.encode(x[:, t])), h)
        return self.out(h[0] if isinstance(h, tuple) else h)


class Gnn(nn.Module):
    """Messages summed by index_add, activations as functions."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin2, self.out = nn.Linear(3, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])

    def forward(self, x):
        source, target = self.edges
        for lin in (self.lin1, self.lin2):
            h = lin(x)
            x = F.elu(torch.zeros_like(h).index_add(0, target, h[source]) + h)
        return self.out(x)


class Bag(nn.Module):
    """A bag of words, and the same table read word by word, with a function for a nonlinearity."""

    def __init__(self, bag=True):
        super().__init__()
        self.table = nn.EmbeddingBag(500, D) if bag else nn.Embedding(500, D)
        self.head = nn.Linear(D, 2)

    def forward(self, x):
        found = self.table(x)
        return self.head(found if found.ndim == 2 else found.mean(1).tanh())


class BasicBlock(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.bn1, self.bn2, self.skip, self.relu = nn.BatchNorm2d(b), nn.BatchNorm2d(b), nn.Conv2d(a, b, 1), nn.ReLU()

    def forward(self, x):
        return self.relu(self.skip(x) + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


def vgg():
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))


def resnet():
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), BasicBlock(4, 4), BasicBlock(4, 8)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def rows(prefix, count):
    return [f"{prefix}.{i}" for i in range(count)]


IMAGE = tensor(3, 1, 8, 8)
SEQUENCE = tensor(3, 4, 3)
TOKENS = torch.randint(500, (3, 6), generator=torch.Generator().manual_seed(1))
COMPLETED = "activations, and weighted modules behind others"
LOOP = [f"{name}{call}" for call in ("", "#1", "#2", "#3") for name in ("act", "cell")]
LSTM_LOOP = [key for a, c in zip(LOOP[::2], LOOP[1::2], strict=True) for key in (a, c, f"{c}[1]")][:-1]
GATED = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("act1", "act2", "se.act")]
CASES = {
    # A state in the pooler alone would leave fifteen weights in a row: the table of words is looked up, no product.
    "bert": (Bert, TOKENS, rows("layer", 3), "blocks", 0.5),
    # The stream passes by the activations within the blocks: with states there it is trained around them.
    "vit": (Vit, IMAGE, rows("blocks", 3), "blocks", 0.5),
    "a deep vit": (lambda: Vit(8), IMAGE, rows("blocks", 8), "blocks", 0.5),
    "convnext": (ConvNeXt, IMAGE, [f"stages.{s}.blocks.{i}" for s in (0, 1) for i in (0, 1)], "inner blocks", 0.6),
    # A gate scales a layer and is none; a block would leave three weights in a row where activations leave two.
    "mobilenet": (MobileNet, IMAGE, ["act", *GATED, "act2"], "activations", 0.8),
    "u-net": (UNet, IMAGE, ["a.2", "a.4", "b.2", "b.4", "c.2", "c.4"], "activations", 0.9),
    "ddpm": (Ddpm, IMAGE, [*rows("downs", 2), *rows("ups", 2)], "blocks", 0.7),
    "tft": (Tft, SEQUENCE, ["before.elu", "before.glu", "glu", "after.elu", "after.glu"], "activations", 0.45),
    "n-beats": (NBeats, tensor(3, 6), [f"blocks.{b}.fc.{i}" for b in range(3) for i in (1, 3)], "activations", 0.85),
    "rnn cell": (lambda: Cells(nn.RNNCell), SEQUENCE, LOOP, COMPLETED, 1.0),
    "gru cell": (lambda: Cells(nn.GRUCell), SEQUENCE, LOOP, COMPLETED, 1.0),
    "lstm cell": (lambda: Cells(nn.LSTMCell), SEQUENCE, LSTM_LOOP, COMPLETED, 1.0),
    "gnn": (Gnn, tensor(5, 3), ["lin1", "lin2"], "weighted modules", 1.0),
    # With a single product behind it, the table of words is the layer in front.
    "bag of words": (Bag, TOKENS, ["table"], "embeddings", 1.0),
    "mean of words": (lambda: Bag(False), TOKENS, ["table"], "embeddings", 1.0),
    "mlp": (mlp, tensor(3, 6), ["1", "4"], "activations", 1.0),
    "vgg": (vgg, IMAGE, ["2", "4", "7"], "activations", 1.0),
    "resnet": (resnet, IMAGE, ["2", "3.relu", "3.relu#1", "4.relu", "4.relu#1"], "activations", 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_states_sit_where_an_expert_puts_them(name):
    make, x, expected, chosen, at_least = CASES[name]
    torch.manual_seed(0)
    net = make().double()
    found = ebm.summary(net, x)
    plan = ebm.Learner(net).begin(lambda: net(x).sum()).examine()
    assert [str(key) for key in plan.states] == expected
    assert found.chosen == chosen
    assert found.locality >= at_least
    assert str(found).endswith("." if found.compared else "")
    assert f"States at: {chosen}" in str(found)


@pytest.mark.parametrize("name", CASES)
def test_on_the_layers_found_exact_rules_are_backprop_and_weak_nudges_nearly(name):
    make, x, *_ = CASES[name]
    torch.manual_seed(0)
    net = make().double()
    closure = lambda: (net(x) - 0.3).square().mean()  # noqa: E731
    true = ebm.reference.backprop(net, closure)
    exact = ebm.Learner(net, "zero-divergence").gradients(closure)
    assert sorted(exact) == sorted(true)
    assert ebm.metrics.alignment(exact, true)["relative_error"] < 1e-7
    errors = []
    for strength in (1e-3, 1e-4):
        weak = ebm.algorithm("pc-nudge", nudge=ebm.OneSided(strength), relaxer=ebm.ErrorCoordinates(60, tol=1e-9))
        errors.append(ebm.metrics.alignment(ebm.Learner(net, weak).gradients(closure), true)["relative_error"])
    assert errors[1] < 0.2 * errors[0] or errors[1] < 1e-7  # falls as lambda does
    assert errors[1] < 0.01


def by_hand(names, kept):
    """l(w) of a chain of 8 x 8 products whose outputs named in `kept` are states."""
    total = 0.0
    for start in range(len(names)):
        total += 1 / next((n + 1 for n, name in enumerate(names[start:]) if name in kept), len(names) - start)
    return total / len(names)


@pytest.mark.parametrize("kept", [["0"], ["1"], ["3"], ["0", "2"], ["1", "3"]])
def test_locality_is_the_mean_of_one_over_the_products_an_update_goes_through(kept):
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]).double()
    found = ebm.summary(net, tensor(3, 8), layers=kept)
    assert found.locality == pytest.approx(by_hand(["0", "1", "2", "3", "4"], kept))


def test_norms_tables_and_computed_weights_are_no_products_of_their_own():
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    net = nn.Sequential(nn.Embedding(50, 8), normed, nn.LayerNorm(8), nn.Tanh(), spectral, nn.PReLU(), nn.Linear(8, 2))
    found = ebm.summary(net, torch.arange(6).reshape(2, 3))
    assert (found.locality, found.local_share) == (1.0, 1.0)
    assert [layer.name for layer in found.layers] == ["3", "5"]


def test_what_is_trained_around_the_states_is_not_local():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)

        def forward(self, x):
            x = self.a(x)  # to the state, and past it to the loss
            return x + self.c(self.act(self.b(x)))

    found = ebm.summary(Around(), torch.randn(3, 8), layers=["act"])
    assert found.locality == found.local_share == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_the_length_of_a_sequence_does_not_move_the_layers(kind):
    torch.manual_seed(0)
    net = Cells(kind).double()
    chosen = {ebm.summary(net, tensor(3, length, 3)).chosen for length in (2, 3, 9)}
    assert chosen == {COMPLETED}


def test_evaluation_has_the_layers_of_training():
    """What the free phase is taken on has no loss: its own judgement could differ from that of the training step."""
    torch.manual_seed(0)
    net = Vit().double()
    learner = ebm.Learner(net, ebm.algorithm("equilibrium-propagation", relaxer=ebm.GradientDescent(0.1, 3)))
    learner.gradients(lambda: net(IMAGE).square().mean())
    with learner.free_phase(lambda: net(IMAGE)):
        net(IMAGE)
    assert learner._evaluated.latest.plan.chosen == learner.plan.chosen == "blocks"
