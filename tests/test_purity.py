"""Only the first pass of a step has side effects, and none of the engine's own survive, whatever happens."""

import copy
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import lightning_ebm as ebm

ALGORITHMS = [
    "zero-divergence",
    "pc-nudge",
    ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 5)),
    ebm.algorithm("pc-nudge", nudge=ebm.Centered(1e-3)),
]


class Meter:
    """A plain object with state, as found in many training scripts."""

    def __init__(self):
        self.count = 0
        self.values = defaultdict(list)

    def update(self, value):
        self.count += 1
        self.values["loss"].append(value)


class Busy(nn.Module):
    """A module with every side effect users write."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(8, 8), nn.Tanh()
        )
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
        self.register_buffer("calls_on_device", torch.zeros(()))
        self.accuracy = MulticlassAccuracy(3)
        self.metrics = MetricCollection({"a": MulticlassAccuracy(3), "b": MulticlassAccuracy(3, average="micro")})
        self.mean = MeanMetric()
        self.calls = 0
        self.history: list[float] = []
        self.seen: dict[int, int] = {}
        self.meter = Meter()
        self.nested = {"epochs": [{"losses": []}], "counter": Counter()}
        self.generator = torch.Generator().manual_seed(7)
        self.numpy_generator = np.random.default_rng(7)
        self.python_generator = random.Random(7)

    def forward(self, x):
        self.calls += 1
        self.calls_on_device += 1
        self.seen[self.calls] = len(x)
        noise = random.random() + np.random.rand() + torch.rand(())
        noise = noise + torch.rand((), generator=self.generator)
        noise = noise + self.numpy_generator.random() + self.python_generator.random()
        return self.head(self.net(x + 0.1 * noise))

    def loss(self, x, y):
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.history.append(float(loss.detach()))
        accuracy = self.accuracy(logits, y)
        self.metrics.update(logits, y)
        self.mean.update(loss.detach())
        self.meter.update(float(loss.detach()))
        self.nested["epochs"][0]["losses"].append(float(loss.detach()))
        self.nested["counter"]["steps"] += 1
        # control flow that reads a metric: another value in another pass would be another function
        return loss * (1.0 if float(accuracy) <= 1 else 2.0) * (2.0 if self.calls % 2 else 1.0)


def traces(module: Busy) -> dict[str, object]:
    return {
        "buffers": {name: b.clone() for name, b in module.named_buffers()},
        "plain": (module.calls, list(module.history), dict(module.seen)),
        "held": (module.meter.count, copy.deepcopy(dict(module.meter.values)), copy.deepcopy(module.nested)),
        "generators": (
            module.generator.get_state(),
            module.numpy_generator.bit_generator.state,
            module.python_generator.getstate(),
        ),
        "updates": (module.accuracy._update_count, module.mean._update_count, module.metrics["a"]._update_count),
        "computed": (module.accuracy.compute(), module.mean.compute(), module.metrics.compute()["b"]),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
    }


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if isinstance(a, torch.Tensor) else a == b


def seed() -> None:
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a if isinstance(a, str) else type(a.relaxer).__name__)
def test_after_steps_the_world_is_as_after_as_many_stock_steps(algorithm):
    """BatchNorm and spectral norm move once, metrics count once, masks are drawn once, counters count once."""
    stock, ours = Busy(), Busy()
    learner = ebm.Learner(ours, algorithm)
    seed()
    for _ in range(3):
        stock.loss(X, Y).backward()
    expected = traces(stock)
    seed()
    for _ in range(3):
        learner.backward(lambda: ours.loss(X, Y))
    found = traces(ours)
    assert [key for key in expected if not same(expected[key], found[key])] == []


def test_a_free_phase_sees_what_the_first_pass_will_see_whatever_was_drawn_since_the_step_was_opened():
    """The quiet pass and the user's own draw the same numbers, which are used up once."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    drawn = []

    def closure():
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return net(X).square().mean()

    learner = ebm.Learner(net, ebm.algorithm("equilibrium-propagation"), capture=False)
    learner.backward(closure)
    seed()
    step = learner.begin(closure)
    between = random.random(), np.random.rand(), float(torch.rand(()))
    drawn.clear()
    with step.first_pass():
        loss = closure()
    step.surrogate(loss)
    assert len(drawn) == 2
    after = random.random(), np.random.rand(), float(torch.rand(()))
    seed()
    expected = [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(3)]
    assert [between, drawn[0], after] == expected
    assert set(drawn) == {expected[1]}


def test_further_passes_see_the_same_masks_statistics_and_metrics():
    """Zero-divergence on a module full of randomness equals backprop on the very same draws, step after step."""
    stock, ours = Busy().double(), Busy().double()
    learner = ebm.Learner(ours, "pc-nudge")
    x = X.double()
    seed()
    for _ in range(2):
        stock.loss(x, Y).backward()
    seed()
    for _ in range(2):
        learner.backward(lambda: ours.loss(x, Y))
    pairs = {name: p.grad for name, p in ours.named_parameters()}, {n: p.grad for n, p in stock.named_parameters()}
    assert ebm.metrics.alignment(*pairs)["relative_error"] < 1e-3  # O(lambda); other masks would give 1


def test_gradients_leaves_no_trace_at_all():
    module = Busy()
    learner = ebm.Learner(module, "pc-nudge")
    seed()
    before = traces(module)
    first = learner.gradients(lambda: module.loss(X, Y))
    assert same(before, traces(module))
    again = learner.gradients(lambda: module.loss(X, Y))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(p.grad is None for p in module.parameters())
    ebm.reference.backprop(module, lambda: module.loss(X, Y))
    assert same(before, traces(module))


class Interrupted(ebm.Relaxer):
    """Ctrl-C in the middle of a relaxation."""

    def __init__(self, exception: BaseException) -> None:
        self.exception = exception

    def relax(self, landscape, start, strength):
        landscape.evaluate(ebm.Forces(), [x + 1 for x in start], strength)
        raise self.exception


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), RuntimeError("out of memory"), SystemExit(1)])
def test_after_any_exception_in_a_quiet_pass_the_module_is_as_before(exception):
    """The quiet pass of a Hopfield network ends half way: buffers, metrics, generators and hooks are as they were."""
    module = Busy()
    module.net[3] = nn.Tanh()

    def strike(module, args):
        raise exception

    user_hook = module.head.register_forward_pre_hook(strike)
    seed()
    before = traces(module)
    with pytest.raises(type(exception)):
        ebm.Learner(module, "equilibrium-propagation").backward(lambda: module.loss(X, Y))
    found = traces(module)
    assert [key for key in before if not same(before[key], found[key])] == []
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()) == 1
    user_hook.remove()


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), RuntimeError("out of memory"), SystemExit(1)])
def test_after_any_exception_the_module_is_as_before(exception):
    module = Busy()
    module.head.bias.requires_grad_(False)
    user_hook = module.net[0].register_forward_hook(lambda *args: None)
    algorithm = ebm.Algorithm(relaxer=Interrupted(exception))
    stock = Busy()
    seed()
    stock.loss(X, Y)  # what the one pass that the user asked for leaves behind
    expected = traces(stock)
    methods = {id(m): dict(vars(m)) for m in module.modules()}
    seed()
    with pytest.raises(type(exception)):
        ebm.Learner(module, algorithm).backward(lambda: module.loss(X, Y))
    found = traces(module)
    assert [key for key in expected if not same(expected[key], found[key])] == []
    for m in module.modules():
        hooks = len(m._forward_hooks), len(m._forward_pre_hooks)
        assert hooks == ((1, 0) if m is module.net[0] else (0, 0))
        assert "forward" not in vars(m)
        assert vars(m).get("update") is methods[id(m)].get("update")
        assert vars(m).get("compute") is methods[id(m)].get("compute")
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert all(p.grad is None for p in module.parameters())
    user_hook.remove()


def test_a_branch_taken_later_is_as_pure_as_the_first():
    """A BatchNorm that the first step did not call: nobody knew that passes write to it, and it moves once a step."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.norm, self.late, self.tanh = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Tanh()
            self.step = 0

        def forward(self, x):
            self.step += 1
            x = self.tanh(self.norm(self.a(x)))
            return self.out(self.tanh(self.late(self.b(x))) if self.step > 1 else x)

    for algorithm in ALGORITHMS:
        stock, ours = Branches(), Branches()
        learner = ebm.Learner(ours, algorithm)
        for _ in range(3):
            F.cross_entropy(stock(X), Y).backward()
            learner.backward(lambda net=ours: F.cross_entropy(net(X), Y))
        expected = dict(stock.named_buffers())
        assert all(torch.equal(b, expected[name]) for name, b in ours.named_buffers())
        assert ours.step == 3


class Checkpointed(nn.Module):
    """Statistics and counters in a part whose forward pass a backward pass runs again."""

    def __init__(self, by_checkpoint, hooked):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.body, self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh()), nn.Linear(6, 3)
        self.calls, self.told = 0, []
        self.by_checkpoint, self.hooked = by_checkpoint, hooked

    def counted(self, x):
        self.calls += 1
        return self.block(x)

    def forward(self, x):
        h = checkpoint(self.counted, x, use_reentrant=False) if self.by_checkpoint else self.counted(x)
        if self.hooked:
            h.register_hook(lambda gradient: self.told.append(float(gradient.norm())))
        return self.head(self.body(h))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("algorithm", ["zero-divergence", "predictive-coding", "equilibrium-propagation"])
def test_a_backward_pass_that_checks_a_record_leaves_nothing_of_what_it_computes_again(algorithm, hooked):
    """The oracle is the module without a checkpoint: what a step does to a module it does once."""
    ends = []
    for by_checkpoint in (False, True):
        module = Checkpointed(by_checkpoint, hooked).double()
        learner = ebm.Learner(module, algorithm)
        torch.manual_seed(1)
        for size in (8, 8, 5, 8):  # a record, one that comes again, another one
            x, y = torch.randn(size, 4, dtype=torch.float64), torch.arange(size) % 3
            module.zero_grad()
            learner.backward(lambda: F.cross_entropy(module(x), y))  # noqa: B023
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.1 * p.grad
        ends.append(module)
    plain, checkpointed = ends
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(checkpointed.state_dict()[name].double(), tensor.double(), rtol=1e-9, atol=0), name
    assert len(checkpointed.told) == len(plain.told) == (4 if hooked else 0)
    assert checkpointed.told == pytest.approx(plain.told)
    if not hooked:
        assert checkpointed.calls == plain.calls


class Lazy(nn.Module):
    """Everything that torch builds by the first batch, and a parameter that the module's own code makes then."""

    def __init__(self):
        super().__init__()
        parts = [nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Dropout(0.3), nn.LazyLinear(6), nn.Tanh()]
        self.body, self.head = nn.Sequential(*parts), nn.UninitializedParameter()

    def forward(self, x):
        h = self.body(x)
        if isinstance(self.head, nn.UninitializedParameter):
            self.head.materialize((3, h.shape[1]))
            nn.init.normal_(self.head, std=0.3)
        return F.linear(h, self.head)


ASKED = {
    "summary": lambda net, loss: ebm.summary(net, torch.ones(5, 4)),
    "gradients": lambda net, loss: ebm.Learner(net, "equilibrium-propagation").gradients(loss),
    "gradients of a divergence": lambda net, loss: ebm.Learner(net, "pc-nudge").gradients(loss),
    "states": lambda net, loss: ebm.Learner(net, "pc-nudge").relax(loss),
    "reference": lambda net, loss: ebm.reference.backprop(net, loss),
    "true gradients at the equilibrium": lambda net, loss: ebm.reference.equilibrium(
        net, loss, "equilibrium-propagation"
    ),
    "equilibrium": lambda net, loss: ebm.Equilibrium(net, "equilibrium-propagation")(torch.ones(5, 4)),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("preset", ["equilibrium-propagation", "predictive-coding"])
def test_a_module_that_its_first_batch_builds_may_be_looked_at_before(asked, preset):
    """It stays built, by the first numbers drawn, and statistics have seen nothing: training is that of a built one."""
    torch.manual_seed(0)
    net = Lazy()
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    ASKED[asked](net, lambda: F.cross_entropy(net(x), y))
    seen = int(asked == "equilibrium")  # whose own pass is a real one
    assert int(net.body[1].num_batches_tracked) == seen
    assert bool(net.body[1].running_mean.any()) == seen
    built = copy.deepcopy(net)
    updates = []
    for module in (net, built):
        torch.manual_seed(1)
        ebm.Learner(module, preset).backward(lambda module=module: F.cross_entropy(module(x), y))
        updates.append([p.grad for p in module.parameters()])
        assert int(module.body[1].num_batches_tracked) == seen + 1
    assert all(torch.equal(a, b) for a, b in zip(*updates, strict=True))


@pytest.mark.parametrize("preset", ["equilibrium-propagation", "contrastive-hebbian", "predictive-coding"])
def test_a_module_that_its_first_batch_builds_trains_from_its_first_step(preset):
    torch.manual_seed(0)
    net = Lazy()
    learner = ebm.Learner(net, preset)
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    for _ in range(3):
        learner.backward(lambda: F.cross_entropy(net(x), y))
    assert int(net.body[1].num_batches_tracked) == 3
    assert all(bool(p.grad.any()) for p in net.parameters() if p.ndim > 1)


class OnTorchs(nn.Module):
    """Counters and histories that the user has put on modules of torch's own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        self.net.calls, self.net[1].history, self.net[1].last = 0, [], torch.zeros(8)

    def forward(self, x):
        self.net.calls += 1
        h = self.net[:2](x - 0.01 * self.net.calls)
        self.net[1].history.append(len(x))
        self.net[1].last = h.detach().mean(0)
        return self.net[2:](h)


def test_what_the_user_puts_on_modules_of_torch_is_put_back():
    torch.manual_seed(0)
    net = OnTorchs()
    last = net.net[1].last
    loss = lambda: F.cross_entropy(net(torch.ones(5, 4)), torch.arange(5) % 3)  # noqa: E731
    for look in (ebm.Learner(net, "pc-nudge").gradients, ebm.Learner(net, "pc-nudge").relax):
        look(loss)
        assert (net.net.calls, net.net[1].history) == (0, [])
        assert net.net[1].last is last
    learner = ebm.Learner(net, "equilibrium-propagation")  # whose step runs twice
    for steps in (1, 2, 3):
        learner.backward(loss)
        assert (net.net.calls, net.net[1].history) == (steps, [5] * steps)


class Holds(nn.Module):
    """Writes to tensors that are no buffers: its own, one in a list, one of the world's, a view, and one it returns."""

    def __init__(self, world):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.count, self.held, self.bank = torch.zeros(()), [torch.zeros(2)], torch.zeros(3, 8, dtype=torch.double)
        self.world = world

    def forward(self, x):
        self.count += 1
        self.held[0].add_(1.0)
        self.world[0][1:].mul_(2.0)
        self.bank[1, :4].copy_(x.mean(0))
        self.bank[2] += 1.0
        return self.net[2:](self.net[:2](x) + self.bank.sum(0)) * self.count

    def now(self):
        return [t.clone() for t in (self.count, self.held[0], self.world[0], self.bank)]


LOOKS = {
    "gradients": lambda net, closure: ebm.Learner(net, "predictive-coding").gradients(closure),
    "gradients of the control": lambda net, closure: ebm.Learner(net, "backprop").gradients(closure),
    "gradients, the step twice": lambda net, closure: ebm.Learner(net, "equilibrium-propagation").gradients(closure),
    "backprop": ebm.reference.backprop,
    "equilibrium": lambda net, closure: ebm.reference.equilibrium(net, closure, "predictive-coding"),
    "relax": lambda net, closure: ebm.Learner(net, "predictive-coding").relax(closure),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("look", LOOKS)
def test_tensors_that_are_no_buffers_hold_what_they_held(look, fails):
    net = Holds([torch.ones(3)])
    x, y = torch.randn(6, 4, dtype=torch.double), torch.randint(3, (6,))
    before = net.now()

    def closure():
        loss = F.cross_entropy(net(x), y)
        if fails:
            raise KeyError("of the user's")
        return loss

    if fails:
        with pytest.raises(KeyError):
            LOOKS[look](net, closure)
    else:
        LOOKS[look](net, closure)
    assert all(map(torch.equal, before, net.now()))


@pytest.mark.parametrize("preset", ["predictive-coding", "equilibrium-propagation"])
def test_writes_through_views_are_made_once_a_step(preset):
    net, other = Holds([torch.ones(3)]), Holds([torch.ones(3)])
    x, y = torch.randn(3, 6, 4, dtype=torch.double), torch.randint(3, (6,))
    learner = ebm.Learner(net, ebm.algorithm(preset, relaxer=ebm.FixedPoint(5)) if "eq" in preset else preset)
    for batch in x:
        learner.backward(lambda batch=batch: F.cross_entropy(net(batch), y))
        other(batch)
    assert all(map(torch.equal, other.now(), net.now()))


def test_what_is_looked_at_is_the_pass_that_wrote():
    """Tensors are put back after the update has been found, not before: it is that of backprop on a copy."""
    net = Holds([torch.ones(3)])
    x, y = torch.randn(6, 4, dtype=torch.double), torch.randint(3, (6,))
    other = copy.deepcopy(net)
    F.cross_entropy(other(x), y).backward()
    for found in (
        ebm.Learner(net, "zero-divergence").gradients(lambda: F.cross_entropy(net(x), y)),
        ebm.reference.backprop(net, lambda: F.cross_entropy(net(x), y)),
    ):
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-14)


class Kind(tuple):
    """As libraries make them: a tuple for what it stores, and no container to its users."""

    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        raise NotImplementedError


def test_what_the_module_holds_need_not_let_itself_be_counted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    history = []
    net.kinds = [Kind((1, -1)), Kind((0, history))]
    net[1].register_forward_hook(lambda *_: history.append(1))
    learner = ebm.Learner(net, "equilibrium-propagation")  # whose step runs twice
    learner.backward(lambda: F.cross_entropy(net(torch.ones(5, 4)), torch.arange(5) % 3))
    assert history == [1]


class Inner(nn.Module):
    """An inner step of learning, by torch.func, which writes to what it makes on the way, or by its formula."""

    def __init__(self, by_formula):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
        self.memory, self.by_formula = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), by_formula

    def slope(self, h):
        def surprise(weights, row):
            recalled = torch.zeros_like(row).copy_(row).mul_(2.0)
            return (torch.func.functional_call(self.memory, weights, (recalled,)) - row).square().sum()

        if self.by_formula:
            recalled = torch.tanh(F.linear(2 * h, self.memory[0].weight, self.memory[0].bias))
            return 2 * (recalled - h) * (1 - recalled.square())
        weights = dict(self.memory.named_parameters())
        return torch.func.vmap(torch.func.grad(surprise), (None, 0))(weights, h)["0.bias"]

    def forward(self, x):
        h = self.act(self.first(x))
        return self.last(h + 0.1 * self.slope(h))


def test_a_quiet_pass_may_write_within_a_transform():
    found = []
    for by_formula in (False, True):
        torch.manual_seed(0)
        net, x = Inner(by_formula).double(), torch.randn(5, 6).double()
        learner = ebm.Learner(net, "equilibrium-propagation", layers=["act"])
        found.append(learner.gradients(lambda net=net, x=x: F.cross_entropy(net(x), torch.arange(5) % 3)))
    assert ebm.metrics.alignment(*found)["relative_error"] < 1e-6
