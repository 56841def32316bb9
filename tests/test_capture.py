"""Captured steps against the plain engine, which runs the user's code at every point and stays as the oracle.

Two questions. Where a step is captured, are the results the same to round-off? And where what a step does changes from
batch to batch without any shape changing, is the update of that very batch ever another one than the plain engine's?
"""

import gc
import logging
import shutil
import weakref
from collections.abc import Callable

import lightning as L
import numpy as np
import pytest
import torch
from lightning_modules import GAN, Manual, Penalised, Teacher, Template
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_ebm as ebm
from lightning_ebm.capture import kernels, products
from lightning_ebm.capture.captures import Captures
from lightning_ebm.capture.program import Program

RELAXERS = {
    "euler": ebm.GradientDescent(lr=0.02, max_steps=5),
    "by tolerance": ebm.GradientDescent(lr=0.1, max_steps=8, tol=1e-6),
    "errors": ebm.ErrorCoordinates(max_steps=3, lr=0.2, tol=0.0),
    "errors by tolerance": ebm.ErrorCoordinates(max_steps=20, tol=1e-6),
    "adam": ebm.StateOptimizer(torch.optim.Adam, max_steps=4, lr=0.02),
}


class Residual(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), norm()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.norm(self.second(self.relu(self.first(x)))))


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]):
        super().__init__()
        self.cell, self.out = cell(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.reshape(len(x), 2, 3))[0][:, -1])


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=dropout, batch_first=True)
        self.act, self.out = nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.block(x[:, None] * torch.ones(3, 1))).mean(1))


class NativeDropout(nn.Module):
    """What nn.Dropout is on a GPU: one operation that draws the mask and hands it out."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.4, self.training)[0]


def mlp(*between: nn.Module, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), *between, act(), nn.Linear(8, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "tanh": mlp,
    "relu": lambda: mlp(act=nn.ReLU),
    "relu in place": lambda: mlp(act=lambda: nn.ReLU(inplace=True)),
    "gelu": lambda: mlp(act=nn.GELU),
    "prelu": lambda: mlp(act=nn.PReLU),
    "dropout": lambda: mlp(nn.Dropout(0.4)),
    "dropout as on a GPU": lambda: mlp(NativeDropout()),
    "dropout in place": lambda: mlp(nn.Dropout(0.4, inplace=True)),
    "batch norm": lambda: mlp(nn.BatchNorm1d(8)),
    "batch norm without statistics": lambda: mlp(nn.BatchNorm1d(8, track_running_stats=False)),
    "layer norm": lambda: mlp(nn.LayerNorm(8)),
    "spectral norm": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
    ),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "residual": lambda: nn.Sequential(nn.Linear(6, 6), Residual(lambda: nn.BatchNorm1d(6)), nn.Linear(6, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3),
    ),
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "attention": Attention,
    "attention with dropout": lambda: Attention(0.3),
}  # fmt: skip


def batches(count: int = 4, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """The last is smaller."""
    generator = torch.Generator().manual_seed(1)
    sizes = [7] * (count - 1) + [3]
    return [(torch.randn(n, 6, generator=generator, dtype=dtype), torch.arange(n) % 3) for n in sizes]


Step = Callable[[nn.Module, tuple[Tensor, Tensor], int], Tensor]


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def trained(
    make: Callable[[], nn.Module], algorithm: ebm.Algorithm, capture: bool, step: Step = cross_entropy, count: int = 4
) -> tuple[list[dict[str, Tensor]], Captures | None, int]:
    """Updates of two epochs; the captures; and how often the step ran."""
    torch.manual_seed(0)
    net = make().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)  # Adam makes a full step of a rounding error
    learner = ebm.Learner(net, algorithm, capture=capture)
    updates, runs = [], 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        return step(net, batch, index)

    for epoch in range(2):
        for index, batch in enumerate(batches(count), epoch * count):  # noqa: B007  # the closure reads them
            optimizer.zero_grad()
            learner.backward(closure)
            updates.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
            optimizer.step()
    return updates, learner._captures.get(0), runs


def apart(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> float:
    """The largest difference in any update, relative to the largest element of that update."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        scale = max(float(g.abs().max()) for g in b.values())
        worst = max(worst, *(float((a[name] - b[name]).abs().max()) / scale for name in a))
    return worst


def both(
    make: Callable[[], nn.Module], algorithm: ebm.Algorithm, step: Step = cross_entropy, count: int = 4
) -> tuple[float, Captures]:
    plain, none, _ = trained(make, algorithm, False, step, count)
    fast, captures, _ = trained(make, algorithm, True, step, count)
    assert none is None
    assert captures is not None
    return apart(fast, plain), captures


def pc(relaxer: str = "euler", **parts: object) -> ebm.Algorithm:
    return ebm.algorithm("predictive-coding", **{"nudge": ebm.OneSided(0.3), "relaxer": RELAXERS[relaxer], **parts})


# ------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("relaxer", ["euler", "errors"])
@pytest.mark.parametrize("net", NETS)
def test_equals_the_plain_engine(net: str, relaxer: str) -> None:
    """Weights move between the steps, masks differ, the last batch is smaller: two captures serve all of them."""
    difference, captures = both(NETS[net], pc(relaxer))
    assert difference < 1e-12
    assert captures.refused is None
    assert (captures._made, captures._used) == (2, 6)


@pytest.mark.parametrize("relaxer", RELAXERS)
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.5), ebm.Centered(0.1)], ids=["one-sided", "centred"])
def test_equals_the_plain_engine_for_every_relaxer(relaxer: str, nudge: ebm.Nudge) -> None:
    difference, captures = both(mlp, pc(relaxer, nudge=nudge))
    assert difference < 1e-12
    assert captures.refused is None
    assert captures._used == 6


def test_precision_is_part_of_it() -> None:
    difference, captures = both(mlp, pc(energy=ebm.PredictiveCoding(precision=2.5)))
    assert difference < 1e-12
    assert captures.refused is None


class Cubic(ebm.Energy):
    """Not a quadratic: its gradients are autograd's."""

    divergence = True

    def layer_energy(self, state: Tensor, layer: ebm.LayerView) -> Tensor:
        error = state - layer.prediction
        return error.square() + error.abs() ** 3 + 0.1 * error.square() * layer.drive.square()


def test_own_energies_are_captured_too() -> None:
    difference, captures = both(mlp, pc(energy=Cubic()))
    assert difference < 1e-12
    assert captures.refused is None


class NoDivergence(ebm.Energy):
    """Its free equilibrium has to be found, and contributes to the update."""

    def layer_energy(self, state: Tensor, layer: ebm.LayerView) -> Tensor:
        return 0.5 * state.square() - state * layer.prediction


def test_free_phases_are_captured_too() -> None:
    algorithm = ebm.Algorithm(NoDivergence(), ebm.OneSided(0.2), RELAXERS["euler"], initial_state="zeros")
    difference, captures = both(mlp, algorithm)
    assert difference < 1e-12
    assert captures.refused is None
    assert captures._used == 6


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("make", [Template, Penalised, Teacher, GAN, Manual], ids=lambda make: make.__name__)
def test_equals_the_plain_engine_under_the_trainer(make, precision, tmp_path) -> None:
    """Metrics, BatchNorm, dropout, teachers, manual optimization. In float32 rounding may fall elsewhere."""
    weights = {}
    for capture in (False, True):
        L.seed_everything(0, verbose=False)
        module = make()
        strategy = ebm.EBMStrategy(pc("euler"), capture=capture)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options |= {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
        L.Trainer(strategy=strategy, max_epochs=2, precision=precision, **options).fit(module)
        weights[capture] = {name: value.double() for name, value in module.state_dict().items()}
    assert all(captures.refused is None for captures in strategy.learner._captures.values())
    assert any(captures._used for captures in strategy.learner._captures.values())
    room = {"64-true": 1e-12, "32-true": 1e-5}.get(precision, 3e-2)
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, rtol=0, atol=room)


# ---------------------------------------------------------------------------------------------- the work done


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm"):
            a, b = (t.shape for t in args[-2:])
            self.shapes.append((a[0], a[1], b[1]))
        return func(*args, **(kwargs or {}))


def test_the_drive_of_the_input_is_computed_once_and_no_weight_gradient_before_the_update() -> None:
    net = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(5, 11), torch.arange(5) % 3
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        return F.cross_entropy(net(x), y)

    learner = ebm.Learner(net, pc("euler"))
    learner.backward(closure)
    runs = 0
    with Counting() as counting:
        learner.backward(closure)
    assert runs == 1
    shapes = counting.shapes
    assert shapes.count((5, 11, 8)) == 1
    assert shapes.count((8, 5, 11)) == shapes.count((9, 5, 8)) == shapes.count((3, 5, 9)) == 1
    points = 5 + 1  # steps, and the point they end at; the first pass makes one more forward
    # The second layer moves after the first step, and so sends an error down from then on; the first layer moves after
    # the second, and so drives the second layer anew from then on.
    assert shapes.count((5, 9, 3)) == points - 1 + 1
    assert shapes.count((5, 9, 8)) == points - 1
    assert shapes.count((5, 8, 9)) == points - 2 + 1
    assert shapes.count((5, 3, 9)) == points  # the loss pulls at every point
    assert len(shapes) == 1 + 3 + 6 + 5 + 5 + 6


# ------------------------------------------------------------------------------- what changes behind its back


class Box(nn.Module):
    """A network with plain Python state that its step may look at."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.flag, self.weight, self.seen = mlp(), True, 1.0, []
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def weight_by_index(net, batch, index):
    return (1 + index) * cross_entropy(net, batch, index)


def constant_by_index(net, batch, index):
    return cross_entropy(net, batch, index) + 0.01 * index * net.net[0].weight.square().sum()


def detached_from_the_fourth_batch_on(net, batch, index):
    """The loss and every prediction stay the same number; only the gradient is cut."""
    hidden = net.net[:2](batch[0])
    return F.cross_entropy(net.net[2:](hidden.detach() if index > 3 else hidden), batch[1]) + 0 * hidden.sum()


def no_grad_from_the_fourth_batch_on(net, batch, index):
    with torch.set_grad_enabled(index <= 3):
        extra = net.net(batch[0]).square().mean()
    return cross_entropy(net, batch, index) + extra


def clamped_where_it_does_not_show(net, batch, index):
    return F.cross_entropy(net(batch[0]).clamp(-100.0 + index, 100.0), batch[1])


def branch_on_a_flag(net, batch, index):
    hidden = net.net[:2](batch[0])
    return F.cross_entropy(net.net[2:](hidden.abs() if index % 2 else hidden * hidden.sign()), batch[1])


def smoothing(net, batch, index):
    return F.cross_entropy(net(batch[0]), batch[1], label_smoothing=0.01 * index)


def dropout_rate(net, batch, index):
    return F.cross_entropy(net.net[2:](F.dropout(net.net[:2](batch[0]), 0.1 + 0.05 * index)), batch[1])


def permutation_of_the_layers(net, batch, index):
    order = [0, 1, 2] if index % 2 else [2, 1, 0]
    return F.cross_entropy(net(batch[0])[:, order], batch[1])


def number_made_into_a_tensor(net, batch, index):
    return cross_entropy(net, batch, index) * torch.tensor(1.0 + index)


def numpy_weights_of_the_samples(net, batch, index):
    weights = torch.from_numpy(np.linspace(1, 2 + index, len(batch[0])))
    return (weights * F.cross_entropy(net(batch[0]), batch[1], reduction="none")).mean()


def buffer_written_after_it_was_used(net, batch, index):
    loss = F.cross_entropy(net(batch[0]) + net.scale * torch.arange(3), batch[1])
    with torch.no_grad():
        net.scale.mul_(1.5)
    return loss


def buffer_written_before_it_is_used(net, batch, index):
    with torch.no_grad():
        net.scale.mul_(1.5)
    return net.scale * cross_entropy(net, batch, index)


def input_written_through_a_view(net, batch, index):
    x = batch[0].clone()
    x[:, index % 6] = 0.5 * index
    return F.cross_entropy(net(x), batch[1])


def hidden_written_through_a_view(net, batch, index):
    hidden = net.net[:2](batch[0]) * 1.0
    hidden[:, 0] = hidden[:, 1] * (1 + index % 2)
    return F.cross_entropy(net.net[2:](hidden), batch[1])


def random_draws(net, batch, index):
    noise = torch.randn(8, dtype=torch.float64) * torch.rand(1, dtype=torch.float64)
    return F.cross_entropy(net.net[2:](net.net[:2](batch[0]) + 0.1 * noise), batch[1])


def random_draws_from_states(net, batch, index):
    hidden = net.net[:2](batch[0])
    return F.cross_entropy(net.net[2:](hidden * torch.bernoulli(hidden.detach().sigmoid())), batch[1])


def values_read_into_python(net, batch, index):
    logits = net(batch[0])
    net.seen.append(float(logits.detach().max()))
    return F.cross_entropy(logits, batch[1]) * (2.0 if net.seen[-1] > 0.3 else 1.0)


def values_through_numpy(net, batch, index):
    hidden = net.net[:2](batch[0])
    gate = torch.from_numpy(1 / (1 + np.exp(-hidden.detach().numpy())))
    return F.cross_entropy(net.net[2:](hidden * gate), batch[1])


class Reversed(torch.autograd.Function):
    """The layer of domain-adversarial training: nothing of alpha shows in the forward pass."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        return -ctx.alpha * slope, None


def gradient_reversal(net, batch, index):
    return F.cross_entropy(net.net[2:](Reversed.apply(net.net[:2](batch[0]), 0.1 * index)), batch[1])


def hook_on_a_hidden_tensor(net, batch, index):
    hidden = net.net[:2](batch[0]) * 1.0
    if index:
        hidden.register_hook(lambda slope: slope * 0.1 * index)
    return F.cross_entropy(net.net[2:](hidden), batch[1])


def hook_on_a_parameter(net, batch, index):
    if not index:
        net.net[0].weight.register_hook(lambda slope: slope.clamp(-0.01, 0.01))
    return cross_entropy(net, batch, index)


def logging_now_and_then(net, batch, index):
    logits = net(batch[0])
    if index % 2:
        net.seen.append(logits.detach().softmax(1).mean(0) * index)
    return F.cross_entropy(logits, batch[1])


def labels_of_its_own_now_and_then(net, batch, index):
    """How many labels there are depends on states: the mean is over another number of samples at every point."""
    logits = net(batch[0])
    some = (1e4 * logits.detach()[:, 0]).sin() > 0
    extra = F.cross_entropy(logits, logits.detach().argmax(1).where(some, -100))
    return cross_entropy(net, batch, index) + 1e-5 * extra  # little of what jumps, or the energy would rise


def labels_left_out(net, batch, index):
    return F.cross_entropy(net(batch[0]), batch[1].where(torch.arange(len(batch[1])) != index % 3, -100))


def frozen_from_the_fourth_batch_on(net, batch, index):
    return cross_entropy(net, batch, index)


CAPTURED = [  # every one of these is captured, however it changes
    detached_from_the_fourth_batch_on, no_grad_from_the_fourth_batch_on, branch_on_a_flag, permutation_of_the_layers,
    number_made_into_a_tensor, numpy_weights_of_the_samples, buffer_written_after_it_was_used,
    buffer_written_before_it_is_used, random_draws, logging_now_and_then, labels_left_out,
    labels_of_its_own_now_and_then,
]  # fmt: skip
PLAIN = {  # these are refused, with a reason that names the cause
    hidden_written_through_a_view: "through another view",
    random_draws_from_states: "random numbers",
    values_read_into_python: "into Python",
    values_through_numpy: "gives other values",
    gradient_reversal: "custom autograd function",
    hook_on_a_hidden_tensor: "hook",
    hook_on_a_parameter: "hook",
}
EITHER = [weight_by_index, constant_by_index, clamped_where_it_does_not_show, smoothing, dropout_rate,
          input_written_through_a_view]  # fmt: skip


@pytest.mark.parametrize("step", [*CAPTURED, *PLAIN, *EITHER], ids=lambda step: step.__name__)
def test_no_change_from_batch_to_batch_is_missed(step, caplog) -> None:
    """The shapes stay the same and the step does something else: every single update is the plain engine's."""
    with caplog.at_level(logging.WARNING, "lightning_ebm.capture.captures"):
        difference, captures = both(Box, pc(), step)
    assert difference < 1e-12
    if step in PLAIN:
        assert PLAIN[step] in (captures.refused or "")
        assert len(caplog.records) == 1
    else:
        assert captures.refused is None
    if step in CAPTURED:
        assert captures._used >= 3


@pytest.mark.parametrize("step", [labels_left_out, labels_of_its_own_now_and_then], ids=lambda step: step.__name__)
def test_how_many_labels_there_are_is_known_from_the_first_pass_only_where_no_label_moves(step) -> None:
    """Best responses need the slope of the loss alone, and of its value that number."""
    difference, captures = both(Box, ebm.algorithm("predictive-coding", relaxer=ebm.FixedPoint(4, damping=0.5)), step)
    assert difference < 1e-12
    assert captures._used >= 3


def test_a_step_that_never_repeats_is_done_the_plain_way_and_that_is_said_once(caplog) -> None:
    with caplog.at_level(logging.WARNING, "lightning_ebm.capture.captures"):
        difference, captures = both(Box, pc(), weight_by_index, count=15)
    assert difference < 1e-12
    assert "aten.mul.Tensor" in (captures.refused or "")
    assert [record.getMessage().count("changes from batch to batch") for record in caplog.records] == [1]


def test_training_and_evaluation_mode_are_different_steps() -> None:
    def step(net, batch, index):
        net.train(index % 2 == 0)
        return cross_entropy(net, batch, index)

    difference, captures = both(NETS["dropout"], pc(), step)
    assert difference < 1e-12
    assert captures.refused is None


def test_without_capture_the_step_runs_at_every_point() -> None:
    """A capture looks for the layers twice, and checks each kind of code once; all else is one pass a step.

    Forces and update are checked one after the other, each with a pass that nobody holds when the other is made.
    """
    _, captures, plain = trained(mlp, pc(), False)
    _, _, fast = trained(mlp, pc(), True)
    assert captures is None
    assert plain >= 8 * 6
    assert fast <= 8 + 2 + 2 * 4  # steps of one front and of none; the forces at the end, and the update there


def test_nothing_of_the_batch_is_kept_when_the_step_is_over() -> None:
    """A captured step holds code and the outline of the record, no tensors of the batch or of the pass."""
    net = mlp()
    learner = ebm.Learner(net, pc())

    def step() -> weakref.ref[Tensor]:
        x, y = torch.randn(7, 6), torch.arange(7) % 3
        learner.backward(lambda: F.cross_entropy(net(x), y))
        return weakref.ref(x)

    gone = [step() for _ in range(2)]
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert learner._captures[0].refused is None


# ----------------------------------------------------------------------------------------- products and compilers


def wide(dtype: torch.dtype) -> nn.Sequential:
    layers = [nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(256, 10)).to(dtype)


def wide_gradients(dtype: torch.dtype, **options: bool) -> tuple[dict[str, Tensor], ebm.Learner]:
    torch.manual_seed(0)
    net = wide(dtype)
    x, y = torch.randn(64, 64, dtype=torch.float64).to(dtype), torch.arange(64) % 10
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=0.2, max_steps=15))
    learner = ebm.Learner(net, algorithm, **options)
    for _ in range(2):
        found = learner.gradients(lambda: F.cross_entropy(net(x), y))
    return {name: g.double() for name, g in found.items()}, learner


def programs(learner: ebm.Learner) -> list[Program]:
    return [program for captured in learner._captures[0]._kept for program in captured.programs.values()]


def fused(learner: ebm.Learner) -> bool:
    return any("'relu'" in program.sources["point"] for program in programs(learner))


def by(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Products by "torch", by "oneDNN", or those that are small by "kernel", whatever is fastest here."""
    monkeypatch.setattr(products, "available", lambda: library != "torch")
    monkeypatch.setattr(products, "kernel", products.torchs_kernel if library == "kernel" else lambda: None)


def test_products_by_faster_libraries_are_as_near_to_float64_as_the_others(monkeypatch) -> None:
    """How far the paths are apart, and that none is the worse one: against float64, layer by layer."""
    exact, learner = wide_gradients(torch.float64)
    assert not fused(learner)
    results = {}
    for library in ("torch", "oneDNN", "kernel"):
        by(monkeypatch, library)
        results[library], learner = wide_gradients(torch.float32)
        assert fused(learner) == (library == "oneDNN")
        codes = [program.point.__globals__ for program in programs(learner)]
        small = any(products.small_product in code.values() for code in codes)
        assert small == (library == "kernel" and products.torchs_kernel() is not None)
    for name, value in exact.items():
        scale = value.abs().max()
        for found in results.values():
            assert float((found[name] - value).abs().max() / scale) < 5e-5
            assert float((found[name] - results["torch"][name]).abs().max() / scale) < 2e-4


def test_the_activation_behind_a_product_is_part_of_it(monkeypatch) -> None:
    by(monkeypatch, "oneDNN")
    _, learner = wide_gradients(torch.float32)
    whole = [mode for mode in learner._captures[0]._kept[0].programs if mode.lr and mode.moved is None]
    point = learner._captures[0]._kept[0].programs[whole[0]].sources["point"]
    assert "'relu'" in point
    assert "'sigmoid'" in point
    assert "'tanh'" not in point  # the drive of the first layer is the input's


def test_the_faster_ways_give_what_they_stand_for() -> None:
    """In float64, where rounding hides nothing, except for the library that knows float32 alone."""
    x, matrix, term = torch.randn(9, 17), torch.randn(17, 5), torch.randn(9, 5)
    exact = x.double() @ matrix.double()
    assert torch.allclose(products.product(x, matrix, None, "none").double(), exact, atol=1e-5)
    assert torch.allclose(products.product(x, matrix, term[0], "tanh").double(), (exact + term[0]).tanh(), atol=1e-5)
    assert torch.allclose(products.product_and(x, matrix, term).double(), exact + term, atol=1e-5)
    image, weight, bias = torch.randn(2, 4, 9, 7), torch.randn(6, 2, 3, 3), torch.randn(6)
    sizes = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    slow = F.conv2d(image.double(), weight.double(), bias.double(), **sizes).sigmoid()
    assert torch.allclose(
        kernels.convolution(image, weight, bias, *sizes.values(), "sigmoid").double(), slow, atol=1e-5
    )
    even = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.equal(kernels.mean_of_four(even), F.avg_pool2d(even, 2))
    (slope,) = torch.autograd.grad(F.avg_pool2d(even, 2), even, gradient := torch.randn(2, 3, 3, 4).double())
    assert torch.equal(kernels.quarter_to_four(gradient), slope)


@pytest.mark.parametrize(
    ("pool", "known"),
    [
        (nn.AvgPool2d(2), True),
        (nn.AvgPool2d((2, 2), stride=2), True),
        (nn.AvgPool2d(2, stride=1), False),
        (nn.AvgPool2d(2, padding=1), False),
        (nn.AvgPool2d(3, ceil_mode=True), False),
        (nn.AvgPool2d(2, divisor_override=3), False),
    ],
    ids=str,
)
def test_windows_of_two_by_two_and_no_others_are_four_views(pool: nn.Module, known: bool) -> None:
    def images() -> nn.Sequential:
        return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Upsample(scale_factor=2), nn.Conv2d(1, 2, 3, padding=1),
                             nn.Tanh(), pool, nn.Flatten(), nn.LazyLinear(3))  # fmt: skip

    torch.manual_seed(0)
    net = images().double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 3
    net(x)
    found = {}
    for capture in (False, True):
        learner = ebm.Learner(net, pc(), capture=capture)
        for _ in range(2):
            found[capture] = learner.gradients(lambda: F.cross_entropy(net(x), y))
    assert max(float((found[True][n] - g).abs().max()) for n, g in found[False].items()) < 1e-12
    assert any(kernels.mean_of_four in program.point.__globals__.values() for program in programs(learner)) == known


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_code_gives_the_same(dtype: torch.dtype) -> None:
    plain, _ = wide_gradients(dtype)
    compiled, learner = wide_gradients(dtype, compile=True)
    assert learner._captures[0].refused is None
    for name, value in plain.items():
        assert float((compiled[name] - value).abs().max() / value.abs().max()) < {torch.float64: 1e-12}.get(dtype, 2e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"compile": True}], ids=["captured", "graphs"])
def test_the_same_on_a_gpu(options: dict[str, bool]) -> None:
    results = []
    for device, kind in (("cpu", {"capture": False}), ("cuda", options)):
        torch.manual_seed(0)
        net = wide(torch.float64)
        x, y = torch.randn(64, 64, dtype=torch.float64), torch.arange(64) % 10
        net, x, y = net.to(device), x.to(device), y.to(device)
        learner = ebm.Learner(net, pc(), **kind)
        for _ in range(3):
            found = learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        results.append([{name: g.cpu() for name, g in found.items()}])
    assert learner._captures[0].refused is None
    assert apart(results[1], results[0]) < 1e-11
