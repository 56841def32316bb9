"""What is not the same step twice: put right, or refused by name. The oracle is stock Lightning, or plain autograd."""

import copy
import itertools
import queue
from dataclasses import dataclass, field

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, grad as imported_grad
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

EXACT = [("zero-divergence", 1e-9), ("pc-nudge", 5e-3)]
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(24) % 3


def net(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1]).double()


class Base(L.LightningModule):
    """Two hidden layers; SGD with momentum, so that a wrong step is never forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(4, 8, 6, 3)

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.log("loss", loss)
        return loss

    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fitted(make, strategy="auto", epochs=2, **options):
    L.seed_everything(5, verbose=False)
    module = make()
    trainer = L.Trainer(
        max_epochs=epochs, strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=options.pop("accumulate_grad_batches", 1),
    )  # fmt: skip
    data = options.pop("datamodule", None)
    loader = None if data is not None else DataLoader(TensorDataset(X, Y), 8)
    L.seed_everything(6, verbose=False)
    trainer.fit(module, loader, datamodule=data)
    return module, trainer


def far(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two modules' parameters, relative to how large those are."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs if a.is_floating_point())


def is_stock(make, epochs=2):
    """Both rules that equal backprop end where stock training ends."""
    stock, _ = fitted(make, epochs=epochs)
    for algorithm, room in EXACT:
        ours, _ = fitted(make, ebm.EBMStrategy(algorithm), epochs)
        assert far(stock, ours) <= room, algorithm
    return stock, ours


# ------------------------------------------------------------------------------------------------------- the wiring


class BranchJoins(Base):
    """The branch is always computed; from the second epoch on the network uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = net(4, 5, 3, seed=1), nn.Linear(3, 3).double()

    def loss(self, x, y):
        side = self.branch(x)
        return F.cross_entropy(self.net(x) + (self.head(side) if self.current_epoch else 0), y)


class TermDropped(Base):
    def loss(self, x, y):
        h = self.net[:2](x)
        out = self.net[2:](h)
        return F.cross_entropy(out, y) + (h.square().mean() if self.current_epoch < 1 else 0)


class LossesInTurn(Base):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([net(6, 5, 3, seed=2), net(6, 5, 4, seed=3)])

    def loss(self, x, y):
        h = self.net[:4](x)
        one, other = (head(h) for head in self.heads)
        return F.cross_entropy(one, y) if self.global_step % 2 else F.mse_loss(other, x)


class ParameterBegins(Base):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def loss(self, x, y):
        out = self.net(x)
        return F.cross_entropy(out * self.temperature if self.current_epoch else out, y)


class NonlinearityJoins(Base):
    """No parameter and no parent comes with it: a call that carried no state, and now should."""

    def loss(self, x, y):
        h = self.net[:4](x)
        again = self.net[3](h)
        return F.cross_entropy(self.net[4](again if self.current_epoch else h), y)


@pytest.mark.parametrize("make", [BranchJoins, TermDropped, LossesInTurn, ParameterBegins, NonlinearityJoins])
def test_a_wiring_that_changes_between_steps_is_found_again(make):
    is_stock(make, epochs=3)


@pytest.mark.parametrize("algorithm", ["predictive-coding", "equilibrium-propagation", "recurrent-backprop"])
def test_a_used_learner_gives_what_a_fresh_one_gives_when_another_head_reads_the_states(algorithm):
    body, heads = net(4, 8, 6, 5), nn.ModuleList([nn.Linear(5, 3).double(), nn.Linear(5, 3).double()])
    module = nn.ModuleList([body, nn.Hardsigmoid(), heads])
    chosen = 0
    options = {"layers": [f"0.{k}" for k in (1, 3)]}

    def closure():
        h = body(X)
        outs = [head(h) for head in heads]
        return F.cross_entropy(outs[chosen] + (body[1](outs[0])[:, :1] if chosen else 0), Y)

    used = ebm.Learner(module, algorithm, **options)
    used.gradients(closure), used.gradients(closure)
    chosen = 1
    fresh = ebm.Learner(module, algorithm, **options).gradients(closure)
    found = used.gradients(closure)
    assert found.keys() == fresh.keys()
    assert all(torch.allclose(found[name], fresh[name], rtol=1e-9, atol=1e-12) for name in fresh)


# ------------------------------------------------------------------------------- gradients taken inside of the step


class Residual(nn.Module):
    """A path from the input around every state."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = net(4, 6, 4), nn.Linear(4, 1).double()

    def forward(self, x):
        return self.out(x + self.body(x))


def inner(kind: str, module: nn.Module):
    """A closure whose loss holds a derivative of the network's output with respect to its input."""
    single = lambda x: module(x[None]).sum()  # noqa: E731

    def closure():
        x = X.clone().requires_grad_()
        if kind == "imported":
            slope = imported_grad(module(x).sum(), x, create_graph=True)[0]
        elif kind == "backward":
            torch.autograd.backward(module(x).sum(), inputs=[x], create_graph=True)
            slope = x.grad
        elif kind == "method":
            module(x).sum().backward(create_graph=True)
            slope = x.grad
        elif kind == "functional":
            slope = torch.autograd.functional.jacobian(lambda z: module(z).sum(), x, create_graph=True)
        elif kind == "vmap":
            return torch.func.vmap(module)(X).square().mean()
        elif kind == "jvp":
            slope = torch.func.jvp(module, (X,), (torch.ones_like(X),))[1]
        elif kind == "vjp":
            slope = torch.func.vjp(lambda z: module(z).sum(), X)[1](torch.ones((), dtype=X.dtype))[0]
        elif kind == "jacrev":
            slope = torch.func.vmap(torch.func.jacrev(single))(X)
        elif kind == "func.grad":
            slope = torch.func.grad(lambda z: module(z).sum())(X)
        else:
            with forward_ad.dual_level():
                slope = forward_ad.unpack_dual(module(forward_ad.make_dual(X, torch.ones_like(X)))).tangent
                slope = torch.zeros(()) if slope is None else slope
        return module(X).mean() + slope.square().mean()

    return closure


KINDS = ["imported", "backward", "method", "functional", "vmap", "jvp", "vjp", "jacrev", "func.grad", "dual"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Residual, lambda: net(4, 6, 5, 1)], ids=["with a way around", "without"])
def test_a_derivative_through_states_is_that_of_the_step(make, kind):
    module = make()
    closure = inner(kind, module)
    for algorithm, room in EXACT:
        learner = ebm.Learner(module, algorithm)
        if kind == "method":  # backward() adds to the gradients of parameters, in stock too
            with pytest.raises(ebm.ConfigurationError, match="calls backward"):
                learner.backward(closure)
        elif kind == "vmap":  # every layer of the step runs inside of the transform
            with pytest.raises(ebm.LayerDiscoveryError):
                learner.backward(closure)
        else:
            truth = ebm.reference.backprop(module, closure)
            assert ebm.metrics.alignment(learner.gradients(closure), truth)["relative_error"] < room
    assert torch.autograd._engine_run_backward is torch.autograd.graph._engine_run_backward


def test_a_derivative_short_of_any_state_is_exact():
    """Of the read-out with respect to the states it is given, and of a network beside the layers."""
    module = nn.ModuleDict({"net": net(4, 6, 5), "out": net(5, 1), "beside": nn.Linear(4, 2).double()})

    def closure():
        h = torch.tanh(module["net"](X))
        slope, _ = (*imported_grad(module["out"](h).square().sum(), h, create_graph=True), None)
        x = X.clone().requires_grad_()
        (beside,) = torch.autograd.grad(module["beside"](x).square().sum(), x, create_graph=True)
        return module["out"](h).mean() + slope.square().mean() + beside.square().mean()

    truth = ebm.reference.backprop(module, closure)
    for algorithm, room in EXACT:
        found = ebm.Learner(module, algorithm).gradients(closure)
        assert ebm.metrics.alignment(found, truth)["relative_error"] < room


class Attacked(Base):
    """Adversarial training, whose attack is a constant of the step: its calls feed no loss, and carry no states."""

    def loss(self, x, y):
        z = x.clone().requires_grad_()
        F.cross_entropy(self.net(z), y).backward(inputs=[z])
        return F.cross_entropy(self.net(x + 0.1 * z.grad.sign()), y)


def test_an_attack_on_the_batch_is_exact():
    is_stock(Attacked)


def test_backward_beside_the_states_is_refused_where_its_gradients_would_stay():
    module = nn.ModuleDict({"net": net(4, 6, 5, 1), "beside": nn.Linear(4, 2).double()})

    def closure():
        module["beside"](X).square().mean().backward()
        return module["net"](X).square().mean()

    with pytest.raises(ebm.ConfigurationError, match="calls backward"):
        ebm.Learner(module, "pc-nudge", capture=False).backward(closure)


class Adapted(Base):
    """Reptile's inner loop, on a copy, is plain backpropagation: the step learns from what it has found."""

    def loss(self, x, y):
        fast = copy.deepcopy(self.net)
        inner = torch.optim.SGD(fast.parameters(), lr=0.1)
        for _ in range(2):
            inner.zero_grad()
            F.cross_entropy(fast(x), y).backward()
            inner.step()
        return F.cross_entropy(self.net(x) + fast(x).detach(), y)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_backward_in_a_copy_is_exact(accumulated):
    stock, _ = fitted(Adapted, accumulate_grad_batches=accumulated)
    ours, _ = fitted(Adapted, ebm.EBMStrategy("zero-divergence"), accumulate_grad_batches=accumulated)
    assert far(stock, ours) < 1e-9


@pytest.mark.parametrize("capture", [True, False])
def test_others_may_learn_by_backward_in_a_closure(capture):
    """An inner loop, and a critic that the closure trains: neither adds to the gradients of the learner's module."""
    module, critic = Adapted(), net(3, 4, 1, seed=4)
    learner = ebm.Learner(module, "zero-divergence", capture=capture)

    def closure():
        critic(module.net(X).detach()).square().mean().backward()
        return module.loss(X, Y) + critic(module.net(X)).mean()

    weights = [*module.parameters(), *critic.parameters()]
    for _ in range(3):
        found = []
        for run in (lambda: closure().backward(), lambda: learner.backward(closure)):
            for p in weights:
                p.grad = None
            run()
            found.append([p.grad for p in weights])
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


# -------------------------------------------------------------------------------------- what further passes find


@dataclass(slots=True)
class Walker:
    """An environment: positions that each step moves."""

    at: np.ndarray = field(default_factory=lambda: np.zeros(4))
    steps: int = 0

    def step(self, by):
        self.steps += 1
        self.at += by
        return torch.from_numpy(self.at.copy())


class Holding(Base):
    """Holds everything that a step may write to."""

    shared = torch.zeros(4).double()

    def __init__(self) -> None:
        super().__init__()
        self.array, self.bank = np.zeros(4), {"mean": torch.zeros(4).double(), "more": (torch.zeros(2), [np.zeros(1)])}
        self.walker, self.inbox, self.bytes = Walker(), queue.Queue(), bytearray(2)
        for k in range(200):
            self.inbox.put(0.01 * k)
        Holding.shared.zero_()

    def loss(self, x, y):
        self.array[:] = 0.9 * self.array + 0.1 * x.mean(0).numpy()
        self.bank["mean"].mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.bank["more"][0].add_(1)
        self.bank["more"][1][0] += 1
        self.shared.add_(0.01)
        self.bytes[0] += 1
        shift = torch.from_numpy(self.array) + self.bank["mean"] + self.walker.step(0.1) + self.shared
        scale = 1 + self.inbox.get() + 0.01 * float(self.bank["more"][0][0]) + 0.01 * self.bytes[0]
        return scale * F.cross_entropy(self.net(x - shift + self.bank["more"][1][0]), y)


def test_what_a_module_holds_is_written_to_once_a_step():
    stock, ours = is_stock(Holding)
    assert ours.walker.steps == stock.walker.steps == 6
    assert np.array_equal(ours.array, stock.array)
    assert torch.equal(ours.bank["mean"], stock.bank["mean"])
    assert ours.inbox.qsize() == stock.inbox.qsize()
    assert torch.equal(ours.shared, stock.shared)


class Counts(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.seen, self.history, self.weight = 0, [], np.ones(1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(X, Y), 8)


class Telling(Base):
    """Tells the datamodule and the trainer, by what it sees."""

    def loss(self, x, y):
        data = self.trainer.datamodule
        data.seen += 1
        data.weight *= 1.1
        loss = float(data.weight[0]) * super().loss(x, y)
        data.history.append(float(loss.detach()))
        self.trainer.notes = len(data.history)
        return loss


def test_what_hangs_on_the_trainer_is_told_once_a_step():
    a, b = Counts(), Counts()
    fitted(Telling, datamodule=a)
    _, trainer = fitted(Telling, ebm.EBMStrategy("zero-divergence"), datamodule=b)
    assert (b.seen, trainer.notes) == (a.seen, 6)
    assert np.allclose(b.weight, a.weight)
    assert np.allclose(a.history, b.history)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (x for x in torch.randn(400, 4).double()),
        lambda: iter(DataLoader(TensorDataset(torch.randn(400, 4).double()), 1)),
        lambda: map(torch.clone, torch.randn(400, 4).double()),
    ],
    ids=["generator object", "loader", "map"],
)
def test_an_iterator_that_a_module_draws_from_is_refused_where_a_step_runs_twice(make):
    class Draws(Base):
        def __init__(self):
            super().__init__()
            self.held = {"unlabelled": make()}

        def loss(self, x, y):
            drawn = next(self.held["unlabelled"])
            return super().loss(x, y) + self.net(drawn[0] if isinstance(drawn, list) else drawn).square().mean()

    is_stock(Draws)
    with pytest.raises(ebm.UnsupportedModuleError, match="two runs differ"):
        fitted(Draws, ebm.EBMStrategy("equilibrium-propagation"))


COUNTER = itertools.count()


def changing(module):
    """Closures of which no two runs are the same."""
    weights = iter([1.0 + 0.01 * k for k in range(1000)])
    inbox: queue.SimpleQueue[float] = queue.SimpleQueue()
    for k in range(1000):
        inbox.put(1.0 + 0.01 * k)
    rows = iter(torch.randn(1000, 24, 4, generator=torch.Generator().manual_seed(3)).double())
    return {
        "an iterator": lambda: next(weights) * F.cross_entropy(module(X), Y),
        "a queue": lambda: inbox.get() * F.cross_entropy(module(X), Y),
        "a global": lambda: F.cross_entropy(module(X + 0.1 * next(COUNTER)), Y),
        "data": lambda: F.cross_entropy(module(next(rows)), Y),
    }


@pytest.mark.parametrize("algorithm", ["zero-divergence", "pc-nudge"])
@pytest.mark.parametrize("capture", [True, False])
def test_a_loss_that_each_run_changes_is_run_once(algorithm, capture):
    module = nn.Sequential(nn.Linear(4, 6), nn.Hardsigmoid(), nn.Linear(6, 3)).double()
    for closure in changing(module).values():
        learner = ebm.Learner(module, algorithm, capture=capture)
        for _ in range(4):
            losses = []

            def kept(closure=closure, losses=losses):
                losses.append(closure())
                return losses[0]

            module.zero_grad()
            learner.backward(kept)
            assert len(losses) == 1
            ours = {name: p.grad for name, p in module.named_parameters()}
            names = dict(module.named_parameters())
            slopes = torch.autograd.grad(losses[0], list(names.values()))
            truth = dict(zip(names, slopes, strict=True))
            assert ebm.metrics.alignment(ours, truth)["relative_error"] < dict(EXACT)[algorithm]


@pytest.mark.parametrize("kind", ["an iterator", "a queue", "a global", "data"])
@pytest.mark.parametrize("capture", [True, False])
def test_it_is_found_out_where_the_step_runs_twice(kind, capture):
    squash = nn.Hardsigmoid()
    module = nn.Sequential(nn.Linear(4, 6), squash, nn.Linear(6, 5), squash, nn.Linear(5, 3)).double()
    learner = ebm.Learner(module, "equilibrium-propagation", capture=capture)
    learner.gradients(lambda: F.cross_entropy(module(X), Y))
    with pytest.raises(ebm.UnsupportedModuleError, match="two runs differ"):
        learner.gradients(changing(module)[kind])


class Late(Base):
    """An average of the network that begins in the second epoch."""

    def __init__(self, kind="parameter"):
        super().__init__()
        self.kind = kind
        self.mean = net(4, 8, 6, 3).requires_grad_(False)
        self.register_buffer("average", torch.zeros(3).double())

    def loss(self, x, y):
        if self.current_epoch and self.kind == "buffer":
            self.average.mul_(0.9).add_(self.net(x).detach().mean(0))
        elif self.current_epoch:
            for p, q in zip(self.mean.parameters(), self.net.parameters(), strict=True):
                (p if self.kind == "parameter" else p.data).mul_(0.9).add_(q.detach())
        with torch.no_grad():
            aim = self.mean(x) + self.average
        return super().loss(x, y) + F.mse_loss(self.net(x), aim)


def test_a_buffer_that_a_step_begins_to_write_to_is_written_to_once():
    is_stock(lambda: Late("buffer"), epochs=3)


@pytest.mark.parametrize("kind", ["parameter", "data"])
def test_a_parameter_that_a_step_begins_to_write_to_is_written_to_once(kind):
    is_stock(lambda: Late(kind), epochs=3)


def test_a_large_tensor_that_is_no_buffer_is_written_to_once():
    class Large(Base):
        def __init__(self):
            super().__init__()
            self.table = torch.zeros(1 << 21)

        def loss(self, x, y):
            self.table += 1
            return super().loss(x, y) * float(self.table[0])

    is_stock(Large)


# -------------------------------------------------------------------------------------------- manual optimization


class ByHand(Base):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        self.by_hand(optimizer, lambda: F.cross_entropy(self.net(x), y), lambda: 0.3 * self.net(x).square().mean())


class Clipped(ByHand):
    def by_hand(self, optimizer, one, other):
        optimizer.zero_grad()
        self.manual_backward(one())
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        self.manual_backward(other())
        self.clip_gradients(optimizer, 0.2, "norm")
        self.manual_backward(0.5 * one())
        optimizer.step()


class Balanced(ByHand):
    """The second loss is weighted by the gradient of the first, as in GradNorm."""

    def by_hand(self, optimizer, one, other):
        optimizer.zero_grad(set_to_none=False)
        self.manual_backward(one())
        size = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
        kept = [p.grad.clone() for p in self.parameters()]
        optimizer.zero_grad()
        self.manual_backward(other() * (1 + size))
        for p, g in zip(self.parameters(), kept, strict=True):
            p.grad += g
        optimizer.step()


class Accumulating(ByHand):
    """Gradients are halved, in place, in every batch, and stepped on in every other."""

    def by_hand(self, optimizer, one, other):
        self.manual_backward(one())
        for p in self.parameters():
            p.grad *= 0.5
        self.manual_backward(other())
        self.done = getattr(self, "done", 0) + 1
        if self.done % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()


class Ascending(ByHand):
    """Sharpness-aware, by hand: weights are moved in place between two backward calls and put back."""

    def by_hand(self, optimizer, one, other):
        optimizer.zero_grad()
        self.manual_backward(one())
        with torch.no_grad():
            moves = [0.05 * p.grad / (1e-3 + p.grad.norm()) for p in self.parameters()]
            for p, move in zip(self.parameters(), moves, strict=True):
                p.add_(move)
        optimizer.zero_grad()
        self.manual_backward(one())
        with torch.no_grad():
            for p, move in zip(self.parameters(), moves, strict=True):
                p.sub_(move)
        optimizer.step()


class Plain(ByHand):
    def by_hand(self, optimizer, one, other):
        optimizer.zero_grad()
        self.manual_backward(one())
        other().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [Clipped, Balanced, Accumulating, Ascending, Plain])
def test_gradients_that_are_looked_at_and_changed_between_backward_calls(make):
    is_stock(make)


class Assigned(ByHand):
    def by_hand(self, optimizer, one, other):
        parameters = list(self.parameters())
        for p, g in zip(parameters, torch.autograd.grad(one(), parameters), strict=True):
            p.grad = g
        optimizer.step()


def test_gradients_of_no_relaxation_are_refused():
    fitted(Assigned, ebm.EBMStrategy("backprop"))
    with pytest.raises(ebm.ConfigurationError, match="no relaxation"):
        fitted(Assigned, ebm.EBMStrategy("predictive-coding"))


# ------------------------------------------------------------------------------------------------------ the batch


class Crate:
    """A batch of no kind that anybody knows."""

    def __init__(self, x, y):
        self.x, self.y = x, y


@pytest.mark.parametrize("kind", ["tensor", "array", "object", "list", "data"])
def test_a_batch_that_is_written_to_later_comes_as_it_was(kind):
    class Noisy(Base):
        def training_step(self, batch, batch_idx):
            x, y = (batch.x, batch.y) if isinstance(batch, Crate) else batch
            if self.current_epoch:
                if kind == "object":
                    batch.x = x = x * 0.5
                elif kind == "list":
                    x = batch.pop(0) * 0.5
                elif kind == "array":
                    x *= 0.5
                else:
                    (x.data if kind == "data" else x).mul_(0.5)
            x = torch.as_tensor(x)
            loss = F.cross_entropy(self.net(x), y)
            self.log("loss", loss, batch_size=len(x))
            return loss

        def train_dataloader(self):
            def collate(items):
                x, y = torch.stack([a for a, _ in items]), torch.tensor([b for _, b in items])
                return Crate(x, y) if kind == "object" else [x.numpy().copy() if kind == "array" else x, y]

            return DataLoader(TensorDataset(X, Y), 8, collate_fn=collate)

    def run(strategy):
        L.seed_everything(5, verbose=False)
        module = Noisy()
        trainer = L.Trainer(
            max_epochs=3, strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module)
        return module

    stock = run("auto")
    for algorithm, room in EXACT:
        assert far(stock, run(ebm.EBMStrategy(algorithm))) <= room


# ------------------------------------------------------------------------------------- lazy, empty, under Fabric


def test_lazy_modules_learn_from_the_step_that_gives_them_shapes():
    for algorithm, room in EXACT:
        module = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3)).double()
        closure = lambda module=module: F.cross_entropy(module(X), Y)  # noqa: E731
        ebm.Learner(module, algorithm).backward(closure)
        found = {name: p.grad for name, p in module.named_parameters()}
        truth = ebm.reference.backprop(module, closure)
        assert ebm.metrics.alignment(found, truth)["relative_error"] < room


@pytest.mark.parametrize("algorithm", ebm.algorithms())
def test_a_batch_of_no_samples_gives_what_does_not_hang_on_samples(algorithm):
    torch.manual_seed(0)
    squash = nn.Tanh() if "holo" in algorithm else nn.Hardsigmoid()
    module = nn.Sequential(nn.Linear(4, 6), squash, nn.Linear(6, 2)).double()
    learner = ebm.Learner(module, algorithm, loss_reduction="sum")
    rows = X

    def closure():
        return 0.5 * (module(rows) - 1).square().sum() + 0.1 * module[2].weight.square().sum()

    learner.gradients(closure)
    rows = X[:0]
    found = learner.gradients(closure)
    assert learner.report["loss"] == pytest.approx(float(closure().detach()))
    for name, gradient in found.items():
        expected = 0.2 * module[2].weight.detach() if name == "2.weight" else torch.zeros_like(gradient)
        assert torch.allclose(gradient, expected), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_under_fabric_a_learner_differentiates_itself(precision):
    from lightning.fabric import Fabric, wrappers

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    plain = net(4, 8, 3).float()
    module, _ = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    closure = lambda: F.cross_entropy(module(X.float()), Y)  # noqa: E731
    fabric.backward(closure())
    truth = {name: p.grad.float().clone() for name, p in module.named_parameters()}
    for algorithm in ("zero-divergence", "pc-nudge"):
        module.zero_grad()
        ebm.Learner(module, algorithm).backward(closure)
        found = {name: p.grad.float() for name, p in module.named_parameters()}
        assert ebm.metrics.alignment(found, truth)["relative_error"] < 0.05
    assert not wrappers._in_fabric_backward


@pytest.mark.parametrize("algorithm", ["zero-divergence", "pc-nudge"])
def test_under_fabric_a_loss_is_scaled_as_fabric_scales_it(algorithm):
    """With 16-bit floats: what is in .grad is the scale times the update, and a step is that of `fabric.backward`."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    def trained(backward):
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
        fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
        plain = net(4, 8, 3).float()
        module, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        closure = lambda: F.cross_entropy(module(X.float()), Y)  # noqa: E731
        backward(fabric, module, closure)
        gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        return gradients, {name: p.detach().clone() for name, p in module.named_parameters()}

    stock = trained(lambda fabric, module, closure: fabric.backward(closure()))
    found = trained(lambda fabric, module, closure: ebm.Learner(module, algorithm).backward(closure))
    for mine, theirs in zip(found, stock, strict=True):
        assert ebm.metrics.alignment(mine, theirs)["relative_error"] < 0.01
    assert max(float(g.abs().max()) for g in stock[0].values()) > 1  # it is scaled


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("algorithm", ["predictive-coding", "equilibrium-propagation"])
def test_under_fabric_relaxations_run_as_code(precision, algorithm):
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    half = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    given = {"plugins": half} if precision == "16-mixed" else {"precision": precision}
    fabric = Fabric(accelerator="cpu", devices=1, **given)
    plain = net(4, 8, 3).float()
    module, _ = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    learner = ebm.Learner(module, algorithm)
    for _ in range(3):
        learner.backward(lambda: F.cross_entropy(module(X.float()), Y))
    assert learner.report["kernels"].startswith("traced")
