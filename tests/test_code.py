"""The fast way against the plain way: traced code gives what the interpreter of the same record gives, to round-off.

Two questions. Where a step runs as code, are the results the same? And where what a step does changes from batch to
batch without any shape changing, is the update of that very batch ever another one than the plain way's? What the
plain way itself is worth is asked in `test_recorder`, of autograd.
"""

import gc
import linecache
import weakref
from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
import torch
from lightning_modules import GAN, Manual, Penalised, Teacher, Template
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from two_ways import (
    CHANGING,
    NETS,
    RELAXERS,
    Box,
    Residual,
    Run,
    apart,
    batches,
    both,
    chain,
    cross_entropy,
    hopfield,
    mlp,
    pc,
    small,
    squared,
    trained,
)

import lightning_ebm as ebm


def same(make: Callable[[], nn.Module], algorithm: ebm.Algorithm, step=cross_entropy) -> None:
    difference, run = both(make, algorithm, step)
    assert difference < 1e-10
    assert run.is_coded, run.reasons


# ------------------------------------------------------------------------------------------- descent on states


@pytest.mark.parametrize("relaxer", ["euler", "errors"])
@pytest.mark.parametrize("net", NETS)
def test_descent_on_every_net(net: str, relaxer: str) -> None:
    """Weights move between the steps, masks differ, the last batch is smaller."""
    same(NETS[net], pc(relaxer))


@pytest.mark.parametrize("relaxer", RELAXERS)
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.5), ebm.Centered(0.1)], ids=["one-sided", "centred"])
def test_every_relaxer_of_predictive_coding(relaxer: str, nudge: ebm.Nudge) -> None:
    same(mlp, pc(relaxer, nudge=nudge))


def test_precision_is_part_of_it() -> None:
    same(mlp, pc(energy=ebm.PredictiveCoding(precision=2.5)))


class Cubic(ebm.Energy):
    """Not a quadratic: its gradients are autograd's."""

    divergence = True

    def layer_energy(self, state: Tensor, layer: ebm.LayerView) -> Tensor:
        error = state - layer.prediction
        return error.square() + error.abs() ** 3 + 0.1 * error.square() * layer.drive.square()


def test_own_energies_run_as_code_too() -> None:
    same(mlp, pc(energy=Cubic()))


class NoDivergence(ebm.Energy):
    """Its free equilibrium has to be found, and contributes to the update."""

    def layer_energy(self, state: Tensor, layer: ebm.LayerView) -> Tensor:
        return 0.5 * state.square() - state * layer.prediction


def test_free_phases_run_as_code_too() -> None:
    same(mlp, ebm.Algorithm(NoDivergence(), ebm.OneSided(0.2), RELAXERS["euler"], initial_state="zeros"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("make", [Template, Penalised, Teacher, GAN, Manual], ids=lambda make: make.__name__)
def test_both_ways_end_at_the_same_weights_under_the_trainer(make, precision, tmp_path) -> None:
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
    room = {"64-true": 1e-10, "32-true": 1e-5}.get(precision, 3e-2)
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, rtol=0, atol=room)


# ----------------------------------------------------------------------------------------------- best responses


NETS_THAT_SETTLE = {
    **{name: make for name, make in NETS.items() if name not in ("gelu", "prelu")},
    "residual": lambda: nn.Sequential(nn.Linear(6, 6), Residual(nn.Identity), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("net", NETS_THAT_SETTLE)
def test_centred_equilibrium_propagation_on_every_net(net: str) -> None:
    """With weak feedback: batch normalisation makes up for small weights, so that these alone make no contraction."""
    same(small(NETS_THAT_SETTLE[net], 0.3), ebm.algorithm(hopfield(), energy=ebm.Hopfield(0.1)))


LAST = {"read-out": nn.Identity, "hard": nn.Hardsigmoid, "softmax": lambda: nn.Softmax(-1)}


@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardsigmoid, nn.ReLU, nn.LeakyReLU, nn.Sigmoid])
@pytest.mark.parametrize("last", LAST)
def test_every_conjugate_pair_and_output_states(act: type[nn.Module], last: str) -> None:
    same(small(chain(act, LAST[last])), hopfield(), squared)


SWEEPS = {
    "odd-even": ebm.FixedPoint(5),
    "synchronous": ebm.FixedPoint(5, order="synchronous", damping=0.3),
    "by tolerance": ebm.FixedPoint(50, tol=1e-6),
    "accelerated": ebm.AcceleratedFixedPoint(5, tol=0.0),
    "anderson": ebm.Anderson(6, tol=0.0),
    "euler": ebm.GradientDescent(0.1, 5),
    "euler by tolerance": ebm.GradientDescent(0.3, 30, tol=1e-4),
}


@pytest.mark.parametrize("relaxer", SWEEPS)
@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardsigmoid])
def test_every_relaxer_on_a_bounded_energy(relaxer: str, act: type[nn.Module]) -> None:
    same(small(chain(act)), hopfield(relaxer=SWEEPS[relaxer], free_relaxer=None))


@pytest.mark.parametrize("relaxer", ["odd-even", "synchronous", "accelerated", "anderson", "euler"])
@pytest.mark.parametrize("energy", [ebm.FenchelYoung(), ebm.PredictiveCoding(), ebm.Hopfield(0.3)], ids=str)
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.3), ebm.Centered(0.1)], ids=str)
def test_every_energy_and_nudge(energy: ebm.Energy, nudge: ebm.Nudge, relaxer: str) -> None:
    same(small(mlp), ebm.Algorithm(energy, nudge, SWEEPS[relaxer]))


@pytest.mark.parametrize("nudge", [lambda: ebm.Coupled(0.1), ebm.Clamped, lambda: ebm.RandomSign(0.1)])
def test_held_outputs_and_random_signs(nudge: Callable[[], ebm.Nudge]) -> None:
    make = small(chain(nn.Tanh))
    plain, fast = (trained(make, hopfield(nudge=nudge()), capture) for capture in (False, True))
    assert fast.is_coded, fast.reasons
    assert apart(fast.updates, plain.updates) < 1e-10


@pytest.mark.parametrize("start", ["zeros", "last-visit"])
def test_wherever_the_free_phase_starts(start: str) -> None:
    same(small(mlp), hopfield(initial_state=start))


def test_the_free_phase_before_a_cross_derivative() -> None:
    same(small(mlp), ebm.algorithm("recurrent-backprop", relaxer=ebm.FixedPoint(30)))


PRECISIONS = {
    "by layer": lambda: {"1": 2.0, "3": torch.tensor(0.5)},
    "by unit": lambda: torch.linspace(0.5, 2, 8, dtype=torch.float64),
    "of another type": lambda: torch.linspace(0.5, 2, 8),
    "learned": lambda: ebm.LearnedPrecision(0.3),
    "learned by unit": lambda: ebm.LearnedPrecision(0.3, per="unit"),
}


@pytest.mark.parametrize("relaxer", ["odd-even", "euler", "errors", "frozen"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_as_precisions(precision: str, relaxer: str) -> None:
    """Learned ones move between the steps; those of code move with them, or there is none."""
    relaxers = {**SWEEPS, "errors": RELAXERS["errors"], "frozen": ebm.FixedPrediction(6, lr=0.4, tol=0.0)}
    results = []
    for capture in (False, True):
        energy = ebm.PredictiveCoding(PRECISIONS[precision]())
        if relaxer == "frozen":
            algorithm = ebm.algorithm("fixed-prediction", energy=energy, relaxer=relaxers[relaxer])
        else:
            algorithm = ebm.Algorithm(energy, ebm.OneSided(0.5), relaxers[relaxer])
        results.append(trained(mlp, algorithm, capture).updates)
    assert apart(results[1], results[0]) < 1e-10


# --------------------------------------------------------------------------- pairs of states, frozen predictions


def dual(relaxer: ebm.Relaxer | None = None, **parts: object) -> ebm.Algorithm:
    return ebm.algorithm("dual-propagation", relaxer=relaxer or ebm.Dyadic(5, tol=0.0), **parts)


def frozen(relaxer: ebm.Relaxer | None = None, **parts: object) -> ebm.Algorithm:
    return ebm.algorithm("fixed-prediction", relaxer=relaxer or ebm.FixedPrediction(), **parts)


FAMILY = {"dual": dual, "frozen": frozen}


@pytest.mark.parametrize("algorithm", FAMILY)
@pytest.mark.parametrize("net", NETS_THAT_SETTLE)
def test_pairs_and_frozen_predictions_on_every_net(net: str, algorithm: str) -> None:
    """Pairs drift apart where the loop's gain is high, as behind a normalisation: there the pull is weak."""
    nudge = {"nudge": ebm.OneSided(0.01)} if algorithm == "dual" and "norm" in net else {}
    same(small(NETS_THAT_SETTLE[net]), FAMILY[algorithm](**nudge))


@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardsigmoid, nn.ReLU, nn.LeakyReLU, nn.Sigmoid])
@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("algorithm", FAMILY)
def test_pairs_and_frozen_predictions_of_every_activation(algorithm: str, act: type[nn.Module], last: str) -> None:
    same(small(chain(act, LAST[last])), FAMILY[algorithm](), squared)


@pytest.mark.parametrize("energy", [ebm.FenchelYoung(), ebm.PredictiveCoding(2.0), ebm.PredictiveCoding()], ids=str)
@pytest.mark.parametrize("nudge", [ebm.OneSided(0.3), ebm.OneSided(-0.3), ebm.Centered(0.1)], ids=str)
@pytest.mark.parametrize("relaxer", [ebm.Dyadic(6), ebm.Dyadic(50, tol=1e-5), ebm.Dyadic(1, tol=0.0)], ids=str)
def test_pairs_of_every_energy_and_nudge(energy: ebm.Energy, nudge: ebm.Nudge, relaxer: ebm.Relaxer) -> None:
    same(small(mlp), dual(relaxer, energy=energy, nudge=nudge))


# ----------------------------------------------------------------------------------------------------- reports


REPORTED = {
    "hopfield": lambda: hopfield(relaxer=ebm.FixedPoint(50, tol=1e-6)),
    "dual": dual,
    "frozen": frozen,
    "euler": pc,
    "errors": lambda: pc("errors by tolerance"),
}


@pytest.mark.parametrize("algorithm", REPORTED)
def test_reports_are_those_of_the_plain_way(algorithm: str) -> None:
    reports = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = small(mlp)().double()
        learner = ebm.Learner(net, REPORTED[algorithm](), capture=capture)
        for x, y in batches()[:3]:
            learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        reports.append(learner.report)
    plain, fast = reports
    assert [p["steps"] for p in fast["phases"]] == [p["steps"] for p in plain["phases"]]
    assert [p["status"] for p in fast["phases"]] == [p["status"] for p in plain["phases"]]
    for one, other in zip(fast["phases"], plain["phases"], strict=True):
        assert one["energies"] == pytest.approx(other["energies"], rel=1e-10)
        assert one["residual"] == pytest.approx(other["residual"], rel=1e-6, abs=1e-9)


def test_evaluation_at_the_free_equilibrium() -> None:
    """No loss there; batches of two sizes, dropout off, weights that moved in between."""
    outputs = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = small(NETS["dropout"])().double().eval()
        learner, found, runs = ebm.Learner(net, hopfield(), capture=capture), [], 0

        def run(x: Tensor, net: nn.Module = net) -> Tensor:
            nonlocal runs
            runs += 1
            return net(x)  # type: ignore[no-any-return]

        for x, _ in batches():
            with learner.free_phase(lambda x=x: run(x)), torch.no_grad():
                found.append(net(x))
            with torch.no_grad():
                net[0].weight *= 1.01
        outputs.append(found)
        assert runs == 4  # quietly, once a batch
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*outputs, strict=True))
    assert not torch.allclose(outputs[0][0], net(batches()[0][0]), atol=1e-3)


# ---------------------------------------------------------------------------------------------- the work done


class Counting(TorchDispatchMode):
    """Notes the sizes of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm"):
            a, b = (t.shape for t in args[-2:])
            self.shapes.append((a[0], a[1], b[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm", ["euler", "errors", "dual", "frozen"])
def test_the_drive_of_the_input_is_computed_once_and_no_weight_gradient_before_the_update(algorithm: str) -> None:
    net = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(5, 11), torch.arange(5) % 3
    learner = ebm.Learner(net, FAMILY[algorithm]() if algorithm in FAMILY else pc(algorithm))
    for _ in range(2):
        learner.backward(lambda: F.cross_entropy(net(x), y))
    with Counting() as counting:
        learner.backward(lambda: F.cross_entropy(net(x), y))
    shapes = counting.shapes
    assert shapes.count((5, 11, 8)) == 1
    assert shapes.count((8, 5, 11)) == shapes.count((9, 5, 8)) == shapes.count((3, 5, 9)) == 1


@pytest.mark.parametrize("algorithm", ["euler", "frozen", "dual"])
def test_code_multiplies_less_often_than_the_plain_way(algorithm: str) -> None:
    counts = []
    for capture in (True, False):
        net = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
        x, y = torch.randn(5, 11), torch.arange(5) % 3
        learner = ebm.Learner(net, FAMILY[algorithm]() if algorithm in FAMILY else pc(algorithm), capture=capture)
        for _ in range(2):
            learner.backward(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        with Counting() as counting:
            learner.backward(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        counts.append(len(counting.shapes))
    assert counts[0] < counts[1]


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    ("algorithm", "times"), [(pc(), 1), (dual(), 1), (frozen(), 1), (hopfield(), 2)], ids=["pc", "dual", "frozen", "ep"]
)
def test_how_often_the_users_step_runs(algorithm: ebm.Algorithm, times: int, capture: bool) -> None:
    """Once; twice where the free equilibrium is not the forward pass: quietly, then with the states in place."""
    assert trained(small(mlp), algorithm, capture).runs == 8 * times


def test_nothing_of_the_batch_is_kept_when_the_step_is_over() -> None:
    """What is known of a program is code and the outline of the record, no tensors of the batch or of the pass."""
    net = mlp()
    learner = ebm.Learner(net, pc())

    def step() -> weakref.ref[Tensor]:
        x, y = torch.randn(7, 6), torch.arange(7) % 3
        learner.backward(lambda: F.cross_entropy(net(x), y))
        return weakref.ref(x)

    gone = [step() for _ in range(3)]
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


# --------------------------------------------------------------------------- steps that change from batch to batch


ALGORITHMS = {
    "descent": lambda: pc(),
    "errors": lambda: pc("errors"),
    "sweeps": lambda: ebm.algorithm(hopfield(), energy=ebm.Hopfield(0.1)),
    "dual": dual,
    "frozen": frozen,
}


@pytest.mark.crossed(5)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("step", CHANGING, ids=lambda step: step.__name__)
def test_no_change_from_batch_to_batch_is_missed(step, algorithm: str) -> None:
    """The shapes stay the same and the step does something else: every single update is the plain way's.

    Where the step runs twice it must be the same step both times; else it is refused, by either way.
    """
    found: list[Run | str] = []
    for capture in (False, True):
        try:
            found.append(trained(small(Box), ALGORITHMS[algorithm](), capture, step))
        except ebm.UnsupportedModuleError as error:
            found.append(str(error))
    plain, fast = found
    if isinstance(plain, str) or isinstance(fast, str):
        assert algorithm == "sweeps"
        assert "The two runs differ" in str(plain)
        assert fast == plain
    else:
        assert apart(fast.updates, plain.updates) < 1e-10


def test_a_step_that_never_repeats_is_done_the_plain_way() -> None:
    def bounded_by_index(net, batch, index):  # a bound is no number that becomes an input
        return cross_entropy(net, batch, index) + net(batch[0]).clamp(max=1 + 0.01 * index).square().mean()

    difference, run = both(Box, pc(), bounded_by_index, count=15)
    assert difference < 1e-10
    assert not any(run.codes)


def test_training_and_evaluation_mode_are_different_steps() -> None:
    def step(net, batch, index):
        net.train(index % 2 == 0)
        return cross_entropy(net, batch, index)

    difference, _ = both(NETS["dropout"], pc(), step)
    assert difference < 1e-10


@pytest.mark.parametrize("preset", ["predictive-coding", "pc-nudge", "error-pc", "dual-propagation"])
def test_images_that_lie_otherwise_in_memory(preset: str) -> None:
    """Rows, channels last and a transposed view by turns: the same images."""

    def images() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))

    def step(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x = batch[0][:, :2, None, None] * torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)
        if index % 3 == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        if index % 3 == 2:
            x = x.transpose(2, 3)
        return F.cross_entropy(net(x), batch[1])

    difference, _ = both(images, ebm.algorithm(preset), step)
    assert difference < 1e-9


def test_convolutions_of_any_shape() -> None:
    """Strides, dilations, groups and sizes that do not divide."""

    def made() -> nn.Module:
        whole = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(),
            nn.Conv2d(6, 4, 2, dilation=2), nn.Tanh(), nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1),
            nn.Flatten(), nn.LazyLinear(3),
        )  # fmt: skip
        whole(torch.zeros(1, 1, 8, 7))
        return whole

    def step(module: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        image = F.pad(batch[0], (0, 50)).view(-1, 1, 8, 7)
        return F.cross_entropy(module(image), batch[1])

    same(small(made), hopfield(), step)
    same(small(made), pc(), step)


POOLS = [nn.AvgPool2d(2), nn.AvgPool2d(2, stride=1), nn.AvgPool2d(2, padding=1), nn.AvgPool2d(3, ceil_mode=True),
         nn.AvgPool2d(2, divisor_override=3), nn.MaxPool2d(2)]  # fmt: skip


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_windows_of_every_kind(pool: nn.Module) -> None:
    def made() -> nn.Module:
        parts = [nn.Unflatten(1, (1, 2, 3)), nn.Upsample(scale_factor=2), nn.Conv2d(1, 2, 3, padding=1), nn.Tanh()]
        net = nn.Sequential(*parts, pool, nn.Flatten(), nn.LazyLinear(3))
        net(torch.zeros(1, 6))
        return net

    same(made, pc())


class Viewing(nn.Module):
    """`view` needs tensors that lie in memory as its own layers would have made them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(32, 16, 3, stride=2), nn.Tanh()
        )  # fmt: skip
        self.out = nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.convs(x)
        assert hidden.is_contiguous()
        return self.out(hidden.view(len(x), -1))


def viewing_gradients(dtype: torch.dtype, capture: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = Viewing().to(dtype)
    x, y = torch.randn(8, 3, 16, 16, dtype=torch.float64).to(dtype), torch.arange(8)
    learner = ebm.Learner(net, hopfield(), capture=capture)
    for _ in range(3):
        found = learner.gradients(lambda: F.cross_entropy(net(x), y))
    return {name: g.double() for name, g in found.items()}


def test_images_in_single_precision_are_as_near_to_float64_as_the_plain_way() -> None:
    exact = viewing_gradients(torch.float64, False)
    plain = viewing_gradients(torch.float32, False)
    fast = viewing_gradients(torch.float32, True)
    for name, value in exact.items():
        scale = value.abs().max()
        assert float((plain[name] - value).abs().max() / scale) < 2e-2
        assert float((fast[name] - value).abs().max() / scale) < 2e-2


def test_tensors_without_elements_beside_the_others() -> None:
    """Columns of which there are none, and products over nothing: sums of nothing are 0."""

    def step(net: Box, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        hidden = net.net[:2](batch[0])
        nothing = hidden[:, :0] @ torch.ones(0, 3, dtype=torch.float64)
        extra = F.avg_pool2d(hidden[:0, None, None, :2].expand(-1, 1, 2, 2), 2).sum()
        return F.cross_entropy(net.net[2:](hidden) + nothing, batch[1]) + extra

    for make in ALGORITHMS.values():
        difference, _ = both(small(Box), make(), step)
        assert difference < 1e-10


@pytest.mark.parametrize("preset", ["predictive-coding", "pc-nudge", "error-pc", "fixed-prediction"])
def test_a_batch_without_samples_in_the_middle_of_a_run(preset: str) -> None:
    """A sum over nothing: the update is 0 either way."""
    torch.manual_seed(0)
    net = Box().double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    learners = [ebm.Learner(net, preset, loss_reduction="sum", capture=capture) for capture in (True, False)]
    for count in (7, 7, 0, 7, 0, 7):
        closure = lambda n=count: 0.5 * (net(x[:n]) - y[:n]).square().sum()  # noqa: E731
        found, expected = (learner.gradients(closure) for learner in learners)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-10)
            assert count or not bool(value.any())


def test_a_mean_over_nothing_is_an_error_of_that_step_and_of_no_other() -> None:
    torch.manual_seed(0)
    net = Box().double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    learner, plain = (ebm.Learner(net, "predictive-coding", capture=capture) for capture in (True, False))
    for count in (3, 0, 3, 0, 5, 3):
        mask = torch.arange(7) < count
        closure = lambda mask=mask: ((net(x) - y) ** 2)[mask].mean()  # noqa: E731
        if not count:
            for one in (learner, plain):
                with pytest.raises(ebm.RelaxationDivergedError, match="nan"):
                    one.gradients(closure)
            continue
        found, expected = learner.gradients(closure), plain.gradients(closure)
        assert all(torch.allclose(found[name], value, rtol=0, atol=1e-10) for name, value in expected.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"compile": True}], ids=["traced", "graphs"])
def test_the_same_on_a_gpu(options: dict[str, bool]) -> None:
    results = []
    for device, kind in (("cpu", {"capture": False}), ("cuda", options)):
        torch.manual_seed(0)
        layers = [nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Sigmoid()]
        net = nn.Sequential(*layers, nn.Linear(256, 10)).double()
        x, y = torch.randn(64, 64, dtype=torch.float64), torch.arange(64) % 10
        net, x, y = net.to(device), x.to(device), y.to(device)
        learner = ebm.Learner(net, pc(), **kind)
        for _ in range(3):
            found = learner.gradients(lambda net=net, x=x, y=y: F.cross_entropy(net(x), y))
        results.append([{name: g.cpu() for name, g in found.items()}])
    assert apart(results[1], results[0]) < 1e-10


def mean_square(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()


def test_code_that_is_gone_leaves_no_text_behind():
    """torch keeps the source of every GraphModule in `linecache`: a run whose programs change would grow by each."""
    before = None
    for k in range(4):
        net = nn.Sequential(nn.Linear(4 + k, 5), nn.Tanh(), nn.Linear(5, 2))
        learner = ebm.Learner(net, "predictive-coding")
        x = torch.randn(6, 4 + k)
        for _ in range(3):
            learner.gradients(partial(mean_square, net, x))
        texts = [name for name in linecache.cache if "eval_with_key" in name]
        assert before is None or len(texts) == before
        before = len(texts)
