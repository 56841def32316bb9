"""How many samples a batch has, and what factor its loss carries."""

import collections
import dataclasses
import logging
from types import MappingProxyType, SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm.step.state_memory import StateMemory

FINITE = ebm.algorithm("error-pc")


def encoder(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.ModuleDict(
        {"body": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "head": nn.Linear(8, 3)}
    ).double()


def off(found, expected):
    return ebm.metrics.alignment(found, expected)["relative_error"]


@pytest.mark.parametrize(("samples", "times"), [(4, 16), (16, 4), (5, 7)])
@pytest.mark.parametrize("pooled", ["mean", "last", "all"])
def test_time_comes_first_or_samples_do(samples, times, pooled):
    """The same network on (B, T, F) and on (T, B, F) has the same update at a finite nudge."""
    x, y = torch.randn(samples, times, 8).double(), torch.randint(3, (samples,))

    def update(batch_first):
        net, data = encoder(batch_first), x if batch_first else x.transpose(0, 1).contiguous()

        def closure():
            h = net["body"](data)
            axis = 1 if batch_first else 0
            h = h if pooled == "all" else h.mean(axis) if pooled == "mean" else h.select(axis, -1)
            out = net["head"](h)
            if pooled == "all":
                labels = y[:, None].expand(samples, times) if batch_first else y[None].expand(times, samples)
                return F.cross_entropy(out.flatten(0, 1), labels.flatten())
            return F.cross_entropy(out, y)

        learner = ebm.Learner(net, FINITE)
        found = learner.gradients(closure)
        assert len(learner.report["residual"]) == samples
        return found

    assert off(update(True), update(False)) < 1e-9


class Tagger(nn.Module):
    def __init__(self, kind, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.body, self.head = kind(6, 8, batch_first=batch_first), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(self.words(x))[0])


@pytest.mark.parametrize(("samples", "times"), [(4, 7), (7, 4)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("reads", ["all", "last"])
def test_a_layer_says_where_samples_are(kind, samples, times, reads):
    """Word by word, as many labels as words: only `batch_first` tells (T, B) from (B, T)."""
    words, labels = torch.randint(11, (samples, times)), torch.randint(5, (samples, times))

    def update(batch_first):
        net = Tagger(kind, batch_first).double()
        x, y = (words, labels) if batch_first else (words.T, labels.T)

        def closure():
            out = net(x)
            if reads == "last":
                return F.cross_entropy(out[:, -1] if batch_first else out[-1], labels[:, -1])
            return F.cross_entropy(out.flatten(0, 1), y.flatten())

        learner = ebm.Learner(net, FINITE)
        found = learner.gradients(closure)
        assert len(learner.report["residual"]) == samples
        return found

    assert off(update(True), update(False)) < 1e-9


def test_packed_sequences_have_as_many_samples_as_the_first_time_has():
    x, lengths = torch.randn(5, 3, 6).double(), torch.tensor([5, 2, 4])
    net = Tagger(nn.GRU, True).double()

    def closure():
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(net.body(packed)[0])
        return net.head(out.sum(0)).square().mean()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return closure()

    module = Whole()
    learner = ebm.Learner(module, FINITE)
    learner.gradients(lambda: module(x))
    assert len(learner.report["residual"]) == 3


class Graphs(L.LightningModule):
    """Nodes of several graphs in one tensor, and one label a graph."""

    def __init__(self):
        super().__init__()
        self.nodes = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, owner, y = batch
        pooled = torch.zeros(len(y), 8, dtype=x.dtype).index_add(0, owner, self.nodes(x))
        return F.cross_entropy(self.head(pooled), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (4, 4, 4), (1, 10, 2)])
def test_a_batch_of_graphs_has_as_many_samples_as_its_loss_has_terms(sizes):
    """Against the same training told the number of graphs."""
    x = torch.randn(sum(sizes), 4).double()
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    data = [(x, owner, torch.arange(len(sizes)) % 3)]

    def trained(**told):
        torch.manual_seed(0)
        module = Graphs().double()
        strategy = ebm.EBMStrategy(FINITE, **told)
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, strategy=strategy,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        assert len(strategy.learner.report["residual"]) == len(sizes)
        return dict(module.named_parameters())

    assert off(trained(), trained(batch_size=len(sizes))) == 0


class Messages(nn.Module):
    """Along the edges of a graph, of which it may have none."""

    def __init__(self):
        super().__init__()
        self.nodes = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.edges = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x, ends, edges):
        h = self.nodes(x)
        return self.head(h.index_add(0, ends[1], self.edges(torch.cat([h[ends[0]], edges], 1))))


def messages(edges):
    net, data = Messages().double(), (torch.randint(6, (2, edges)), torch.randn(edges, 2).double())
    x = torch.randn(6, 4).double()
    return net, lambda: F.cross_entropy(net(x, *data), torch.arange(6) % 3)


def experts(rows):
    """Parts that are called one by one; two of them see but the rows that a mask leaves."""
    net = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]).double()
    x, mask = torch.randn(6, 4).double(), torch.arange(6) < rows

    def closure():
        h = net[0](x)
        for expert in net[1:]:
            h = torch.zeros_like(h).masked_scatter(mask[:, None], expert(h[mask])) + h
        return h.square().mean()

    return net, closure


def gated(rows):
    """A layer that hangs on no sample beside those that do."""
    gate = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
    net = nn.ModuleList([gate, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))]).double()
    given, x = torch.ones(1, 2).double(), torch.randn(rows, 4).double()
    net.forward = lambda x: net[1](x * net[0](given))
    return net, lambda: net(x).square().sum() / 6 + net[0](given).square().mean()


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("make", [messages, experts, gated])
def test_what_there_is_none_of_is_not_what_samples_are_counted_by(make, capture):
    """Several times each, as programs that come again run as code."""
    for rows in (0, 3):
        net, closure = make(rows)
        for name, most in (("zero-divergence", 1e-12), ("pc-nudge", 1e-3)):
            learner = ebm.Learner(net, name, capture=capture)
            for _ in range(3):
                assert off(learner.gradients(closure), ebm.reference.backprop(net, closure)) < most
            assert len(learner.report["residual"]) > 0


class Boxes(L.LightningModule):
    """Several terms of the loss for each picture, and a tensor of the batch that has as many rows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        pictures, owner, y = batch
        return F.cross_entropy(self.net(pictures)[owner], y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_several_terms_for_each_sample_are_no_samples():
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    data = [(torch.randn(4, 4).double(), owner, torch.arange(7) % 3)]
    strategy = ebm.EBMStrategy(FINITE)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, strategy=strategy,
    )  # fmt: skip
    trainer.fit(Boxes().double(), torch.utils.data.DataLoader(data, batch_size=None))
    assert len(strategy.learner.report["residual"]) == 4


def test_one_observation_without_a_dimension_for_samples_is_one_sample():
    """As policies are called in loops of reinforcement learning; against the same observation as a batch of one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(5).double()

    def update(observation):
        return ebm.Learner(net, FINITE).gradients(lambda: -F.log_softmax(net(observation), -1)[..., 1].sum())

    assert off(update(x), update(x[None])) < 1e-12


def test_the_number_of_samples_may_be_a_function_of_what_the_module_is_called_with():
    """A graph batch: six nodes of two graphs; lambda counts graphs. The oracle multiplies the nudge by hand."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    nodes, owner = torch.randn(6, 4).double(), torch.tensor([0, 0, 0, 1, 1, 1])

    def closure():
        per_graph = torch.zeros(2, 1).double().index_add(0, owner, net(nodes))
        return (per_graph - 1).square().mean()

    def euler(strength):
        return ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(strength), ebm.GradientDescent(0.05, 12))

    told = ebm.Learner(net, euler(0.5), batch_size=lambda batch: len(batch) // 3).gradients(closure)
    counted = ebm.Learner(net, euler(0.5), batch_size=2).gradients(closure)
    by_nodes = ebm.Learner(net, euler(0.5 * 2 / 6), batch_size=6).gradients(closure)
    assert off(told, counted) == 0
    assert off(told, by_nodes) < 1e-12


@pytest.mark.parametrize("algorithm", ["pc-nudge", "predictive-coding", "error-pc", "equilibrium-propagation"])
@pytest.mark.parametrize("factor", [65536.0, 0.25])
def test_a_factor_that_the_loss_carries_is_not_seen_by_the_relaxation(algorithm, factor):
    """The update of s times the loss, told of s, is s times the update of the loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Hardsigmoid(), nn.Linear(8, 8), nn.Hardsigmoid(), nn.Linear(8, 2)).double()
    x, y = torch.randn(8, 4).double(), torch.randint(2, (8,))
    plain = ebm.Learner(net, algorithm).gradients(lambda: F.cross_entropy(net(x), y))
    for told in (factor, lambda: factor):
        learner = ebm.Learner(net, algorithm, scale=told)
        found = learner.gradients(lambda: factor * F.cross_entropy(net(x), y))
        assert off({name: g / factor for name, g in found.items()}, plain) < 1e-9


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -3}, {"scale": 0.0}, {"scale": -1.0}])
def test_numbers_that_cannot_be_are_refused_where_they_are_written(wrong):
    with pytest.raises(ebm.ConfigurationError, match=next(iter(wrong))):
        ebm.Learner(nn.Linear(2, 2), **wrong)


class Collocation(L.LightningModule):
    """All of its samples are its own; the batch is there because a Trainer wants one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.register_buffer("points", torch.randn(12, 2).double())

    def training_step(self, batch, index):
        return (self.net(self.points) - 1.0).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


@pytest.mark.parametrize("dummy", [[0], [torch.zeros(3)], range(5)])
def test_a_batch_that_nobody_reads_has_no_say(dummy, tmp_path):
    """The oracle says how many samples there are; under the Trainer it is the record that does."""
    module = Collocation()
    learner = ebm.Learner(module, FINITE, batch_size=12)
    update = learner.gradients(lambda: module.training_step(None, 0))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(FINITE), max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(dummy, batch_size=len(dummy)))
    moved = {name: before[name] - p.detach() for name, p in module.named_parameters()}
    assert off(moved, update) < 1e-12
    assert (
        off(update, ebm.Learner(module, FINITE, batch_size=1).gradients(lambda: module.training_step(None, 0))) > 1e-3
    )


@pytest.mark.parametrize(("said", "warned"), [({}, True), ({"batch_size": 4}, False), ({"batch_size": 7}, False)])
def test_two_readings_of_a_batch_are_warned_of_once(said, warned, caplog):
    """Words of sentences, each with a label: nothing in the record tells words from sentences."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(4, 7, 8).double(), torch.randint(0, 3, (4, 7))
    learner = ebm.Learner(net, FINITE, **said)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            learner.gradients(lambda: F.cross_entropy(net(x).flatten(0, 1), y.flatten()))
    told = [r.getMessage() for r in caplog.records if "could as well" in r.getMessage()]
    assert len(told) == warned
    if warned:
        assert "taken for 4 samples, and could as well be 7" in told[0]


class Cell(nn.Module):
    """Four steps of a recurrent layer on sequences, each of which is told its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.act, self.head = nn.Linear(6 + 5, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 5)
        told = []
        for step in range(4):
            h = self.act(self.cell(torch.cat([x[:, step], h], 1)))
            told.append(self.head(h))
        return told


@pytest.mark.parametrize("kind", ["a sample a call", "a bag a call", "two views", "steps of a sequence", "one sample"])
def test_loops_that_call_the_module_for_each_sample_are_told_of_both_readings(kind, caplog):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
    cells, sequence = Cell().double(), torch.randn(1, 4, 6, dtype=torch.float64)
    losses = {
        "a sample a call": lambda: torch.stack(
            [F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) for i in range(8)]
        ).mean(),
        "a bag a call": lambda: torch.stack([F.cross_entropy(net(b).mean(0), y[0]) for b in (x[:5], x[5:])]).mean(),
        "two views": lambda: F.cross_entropy(torch.cat([net(x), net(x + 1)]), torch.cat([y, y])),
        "steps of a sequence": lambda: torch.stack([F.cross_entropy(out, y[:1]) for out in cells(sequence)]).mean(),
        "one sample": lambda: F.cross_entropy(net(x[:1]), y[:1]),
    }
    learner = ebm.Learner(cells if kind == "steps of a sequence" else net, "predictive-coding")
    for _ in range(2):
        learner.gradients(losses[kind])
    told = [r.getMessage() for r in caplog.records if "could as well be" in r.getMessage()]
    expected = {
        "a sample a call": "taken for 1 sample, and could as well be 8",
        "a bag a call": "5 samples, and could as well be 2",
    }
    assert len(told) == (kind in expected)
    assert all(expected[kind] in text for text in told)
    if kind == "a sample a call":  # said so, it is the update of one call with all of them
        expect = ebm.Learner(net, "predictive-coding").gradients(lambda: F.cross_entropy(net(x), y))
        found = ebm.Learner(net, "predictive-coding", batch_size=8).gradients(losses[kind])
        for name, gradient in expect.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-4)


FOLDED = {
    "pooled after": (lambda net, x, y: F.cross_entropy(net(x.flatten(0, 1)).view(*x.shape[:2], 3).mean(1), y), 4),
    "by index": (
        lambda net, x, y: F.cross_entropy(
            torch.zeros(4, 3).to(x).index_add(0, torch.arange(28) // 7, net(x.flatten(0, 1))), y
        ),
        4,
    ),
    "each has its target": (lambda net, x, y: F.cross_entropy(net(x.flatten(0, 1)), y.repeat_interleave(7)), None),
    "summed": (lambda net, x, y: net(x.flatten(0, 1)).view(4, -1).sum(1).square().sum(), None),
    "one number": (lambda net, x, y: net(x.flatten(0, 1)).mean().square(), None),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_rows_that_are_pooled_before_the_loss_are_told_of_both_readings(kind, caplog):
    """The network sees (B T, F), as every closure may hand it; nothing else says that B samples are meant."""
    loss, other = FOLDED[kind]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(4, 7, 6, dtype=torch.float64), torch.arange(4) % 3
    learner = ebm.Learner(net, "predictive-coding", loss_reduction="sum" if kind == "summed" else "mean")
    for _ in range(2):
        learner.gradients(lambda: loss(net, x, y))
    told = [r.getMessage() for r in caplog.records if "could as well be" in r.getMessage()]
    assert len(told) == (other is not None)
    assert all(f"taken for 28 samples, and could as well be {other}" in text for text in told)


@dataclasses.dataclass(slots=True)
class Slots:
    x: torch.Tensor
    y: torch.Tensor
    graph: torch.Tensor


class Within:
    """An object that keeps its tensors in another one, which knows where it belongs."""

    def __init__(self, **parts):
        self._frame = SimpleNamespace(**parts, owner=self)

    def __getattr__(self, name):
        return getattr(self.__dict__["_frame"], name)


PACKED = {
    "a dict": dict,
    "a mapping that is no dict": lambda **parts: collections.UserDict(parts),
    "a read-only mapping": lambda **parts: MappingProxyType(parts),
    "a namespace": SimpleNamespace,
    "a dataclass with slots": Slots,
    "an object within an object": Within,
    "objects in a list": lambda **parts: [SimpleNamespace(x=parts["x"], rest=[parts["y"], {"graph": parts["graph"]}])],
    "a list that is none": lambda **parts: collections.UserList([parts["x"], parts["y"], parts["graph"]]),
    "a named tuple": collections.namedtuple("Packed", ["x", "y", "graph"]),
}


def unpacked(batch):
    if isinstance(batch, list):
        return batch[0].x, batch[0].rest[0], batch[0].rest[1]["graph"]
    if isinstance(batch, collections.UserList):
        return tuple(batch)
    if hasattr(batch, "keys"):
        return batch["x"], batch["y"], batch["graph"]
    return batch.x, batch.y, batch.graph


class Pooling(L.LightningModule):
    """Nodes of several graphs, pooled by graph: the samples are the graphs, of which only the batch knows how many."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).double()
        self.head = nn.Linear(8, 3).double()

    def training_step(self, batch, batch_idx):
        x, y, graph = unpacked(batch)
        pooled = torch.zeros(len(y), 8, dtype=x.dtype).index_add(0, graph, self.body(x))
        return F.mse_loss(self.head(pooled), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


@pytest.mark.parametrize("kind", PACKED)
def test_the_number_of_samples_does_not_hang_on_what_the_batch_is_packed_in(kind):
    torch.manual_seed(1)
    parts = {"x": torch.randn(20, 4).double(), "y": torch.randn(5, 3).double(), "graph": torch.arange(20) // 4}

    def trained(batch, **options):
        module, finite = Pooling(), ebm.algorithm("predictive-coding", nudge=ebm.OneSided(0.5))
        trainer = L.Trainer(
            strategy=ebm.EBMStrategy(finite, **options), max_epochs=1, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader([batch], batch_size=None, collate_fn=lambda batch: batch)
        trainer.fit(module, loader)
        return dict(module.named_parameters())

    found, said = trained(PACKED[kind](**parts)), trained(parts, batch_size=5)
    for name, wanted in said.items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", PACKED)
def test_samples_are_recognized_whatever_the_batch_is_packed_in(kind):
    names = StateMemory().names
    parts = {"x": torch.randn(5, 4), "y": torch.randn(5), "graph": torch.arange(5)}
    seen = names(PACKED[kind](**parts), 5)
    assert len(set(seen)) == 5
    turned = {name: part.flip(0) for name, part in parts.items()}
    assert names(PACKED[kind](**turned), 5) == seen[::-1]


class FeaturesFirst(nn.Module):
    """y = V tanh(W x) with samples as columns; or the same with samples as rows."""

    def __init__(self, columns):
        super().__init__()
        self.columns = columns
        torch.manual_seed(0)
        self.w, self.v = (nn.Parameter(torch.randn(*shape).double()) for shape in ((8, 4), (2, 8)))
        self.act = nn.Tanh()

    def forward(self, x):
        return self.v @ self.act(self.w @ x) if self.columns else self.act(x @ self.w.T) @ self.v.T


@pytest.mark.parametrize("batch_size", [None, 5])
def test_samples_as_columns_are_warned_of_and_right_where_they_are_counted(batch_size, caplog):
    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()

    def update(columns, size):
        net = FeaturesFirst(columns)
        given, target = (x.T.contiguous(), y.T.contiguous()) if columns else (x, y)
        learner = ebm.Learner(net, FINITE, batch_size=size)
        return learner.gradients(lambda: F.mse_loss(net(given), target))

    expected = update(False, None)
    assert "could as well be" not in caplog.text
    found = update(True, batch_size)
    if batch_size is None:
        assert "could as well be 5" in caplog.text
    else:
        assert off(found, expected) < 1e-12
        assert "could as well be" not in caplog.text
