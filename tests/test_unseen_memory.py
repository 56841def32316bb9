"""Memory that is written to where no operation is seen: by functions in C++, by NumPy, by element-wise Python."""

import numpy as np
import pytest
import torch
from since import newer
from test_recorder import batch, by_autograd, mlp, off
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

import lightning_ebm as ebm
from lightning_ebm.program import programs

ARRAY = np.ones(6)


class Sequences(nn.Module):
    """Recurrent; the six features of a sample are two steps of three."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 4, batch_first=True), nn.Sequential(nn.Tanh(), nn.Linear(4, 3))

    def mean_of_packed(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """`pad_packed_sequence` fills the lengths that it returns by a pointer."""
        lengths = 1 + (torch.arange(len(x)) + index) % 2
        packed = rnn.pack_padded_sequence(x.reshape(len(x), 2, 3), lengths, batch_first=True, enforce_sorted=False)
        states, found = rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)
        return F.cross_entropy(self.out(states.sum(1) / found[:, None]), y)

    def connectionist(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """`ctc_loss` makes tensors of the lengths that it is given as lists."""
        states = self.cell(x.reshape(len(x), 2, 3))[0]
        lengths = [1 + (k + index) % 2 for k in range(len(x))]
        steps = self.out(states).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(steps, 1 + y[:, None] % 2, lengths, [1] * len(x), reduction="mean")


def weights_made(fill):
    """A step whose weights of features are made by `fill`, of ones and of the step's index."""

    def step(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
        return F.cross_entropy(net(x * fill(index)), y)

    return step


def applied(index: int) -> Tensor:
    return torch.ones(6, dtype=torch.float64).apply_(lambda one: one + 0.3 * index)


def applied_later(index: int) -> Tensor:
    weights = torch.ones(6, dtype=torch.float64)
    return weights.apply_(lambda one: 2.0 * index) if index > 1 else weights


def mapped(index: int) -> Tensor:
    weights = torch.ones(6, dtype=torch.float64)
    return weights.map_(torch.arange(6.0, dtype=torch.float64), lambda one, k: one + 0.1 * index * k)


def through_dlpack(index: int) -> Tensor:
    weights = torch.ones(6, dtype=torch.float64)
    np.from_dlpack(weights)[:] = 1 + 0.2 * index
    return weights


def through_storage(index: int) -> Tensor:
    weights, other = torch.ones(6, dtype=torch.float64), torch.full((6,), 1 + 0.2 * index, dtype=torch.float64)
    weights.untyped_storage().copy_(other.untyped_storage())
    return weights


def empty_by_numpy(index: int) -> Tensor:
    weights = torch.empty(6, dtype=torch.float64)
    np.asarray(weights)[:] = 1 + 0.2 * index
    return weights


def read_again(array, of) -> object:
    """NumPy writes between two passes over the same tensor."""

    def step(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
        shared = of()
        written = array if array is not None else np.from_dlpack(shared)
        written[:] = 1 + 0.1 * index
        first = F.cross_entropy(net(x + shared), y)
        written[:] = -0.2 * index
        return first + F.cross_entropy(net(x - shared), y)

    return step


def copied_again(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
    shared = torch.ones(6, dtype=torch.float64)
    first = F.cross_entropy(net(x * shared), y)
    shared.untyped_storage().copy_(torch.full((6,), 0.1 * index, dtype=torch.float64).untyped_storage())
    return first + F.cross_entropy(net(x * shared), y)


def moved_halves(like):
    """States are written into memory that was not filled."""

    def step(net: nn.Module, x: Tensor, y: Tensor, index: int) -> Tensor:
        h = net[:2](x)
        turned = like(h)
        turned[:, ::2] = h[:, 1::2] * (1 + 0.1 * index)
        turned[:, 1::2] = h[:, ::2]
        return F.cross_entropy(net[2:](turned), y)

    return step


_tensor = torch.from_numpy(ARRAY)
STEPS = {
    "apply_": (mlp, weights_made(applied)),
    "apply_ from the third step on": (mlp, weights_made(applied_later)),
    "map_": (mlp, weights_made(mapped)),
    "dlpack": (mlp, weights_made(through_dlpack)),
    "untyped_storage": (mlp, weights_made(through_storage)),
    "untyped_storage between two readings": (mlp, copied_again),
    "empty, by numpy": (mlp, weights_made(empty_by_numpy)),
    "numpy between two readings": (mlp, read_again(ARRAY, lambda: _tensor)),
    "dlpack between two readings": (mlp, read_again(None, lambda: torch.ones(6, dtype=torch.float64))),
    "empty_like": (mlp, moved_halves(torch.empty_like)),
    "new_empty": (mlp, moved_halves(lambda h: h.new_empty(h.shape))),
    "empty": (mlp, moved_halves(lambda h: torch.empty(*h.shape, dtype=h.dtype))),
    "lengths of packed sequences": (Sequences, Sequences.mean_of_packed),
    "lengths in a list": (Sequences, Sequences.connectionist),
}


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    # What older ones hand out by DLPack, NumPy does not write to.
    "case",
    [pytest.param(case, marks=newer if case.startswith("dlpack") else ()) for case in STEPS],
)
def test_what_it_holds_when_it_is_read_is_what_counts(case: str, capture: bool) -> None:
    make, step = STEPS[case]
    torch.manual_seed(0)
    net = make().double()
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for index in (0, 1, 3, 4, 5):
        x, y = batch(index)
        expected = by_autograd(net, lambda x=x, y=y, index=index: step(net, x, y, index))
        found = learner.gradients(lambda x=x, y=y, index=index: step(net, x, y, index))
        assert off(found, expected) < 1e-10, index


@pytest.mark.parametrize("case", ["empty_like", "new_empty", "empty"])
def test_memory_that_was_not_filled_is_the_same_where_a_step_runs_twice(case: str) -> None:
    torch.manual_seed(0)
    net, step = mlp().double(), STEPS[case][1]

    def without_writing(x: Tensor, y: Tensor) -> Tensor:
        h = net[:2](x)
        return F.cross_entropy(net[2:](torch.stack([h[:, 1::2], h[:, ::2]], 2).flatten(1)), y)

    x, y = batch(0)
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(20))
    found = ebm.Learner(net, algorithm).gradients(lambda: step(net, x, y, 0))
    expected = ebm.Learner(net, algorithm).gradients(lambda: without_writing(x, y))
    assert off(found, expected) < 1e-10


def by_numpy(h: Tensor) -> None:
    h.detach().numpy()[:] *= 0.5


def by_storage(h: Tensor) -> None:
    h.data.untyped_storage().fill_(0)


@pytest.mark.parametrize(
    ("write", "why"),
    [(by_numpy, "its memory where autograd does not look.*numpy"), (by_storage, "while gradients are off")],
)
def test_writes_of_others_to_what_the_step_computes_are_refused_by_that_name(write, why) -> None:
    net, (x, y) = mlp().double(), batch(0)

    def closure() -> Tensor:
        h = net[:2](x)
        write(h)
        return F.cross_entropy(net[2:](h), y)

    with pytest.raises(ebm.UnsupportedModuleError, match=why) as error:
        ebm.Learner(net, "zero-divergence").gradients(closure)
    assert "grad_fn" not in str(error.value)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("of", [torch.ones_like, lambda h: (h > -9).double()], ids=["constants", "a layer"])
def test_a_refusal_does_not_lay_grad_fn_at_the_users_door(of) -> None:
    """The write begins in C++; autograd had saved what was there before, and has another gradient than the step."""
    net, (x, y) = mlp().double(), batch(0)

    def closure() -> Tensor:
        h = net[:2](x)
        weights = of(h)
        first = F.cross_entropy(net[2:](h * weights), y)
        weights.storage()[0] = 3.0
        return first + F.cross_entropy(net[2:](h * weights), y)

    with pytest.raises(ebm.UnsupportedModuleError) as error:
        ebm.Learner(net, "zero-divergence").gradients(closure)
    assert "grad_fn" not in str(error.value)


@pytest.mark.parametrize(
    "hand_out", [lambda t: t.numpy(), pytest.param(np.from_dlpack, marks=newer)], ids=["numpy", "dlpack"]
)
@pytest.mark.parametrize("capture", [True, False])
def test_a_buffer_whose_memory_was_handed_out_is_read_at_every_use(capture: bool, hand_out) -> None:
    """Before it was read at all; and sums keep nothing of it that autograd would look at later."""
    net, (x, y) = mlp().double(), batch(0)
    shift = torch.zeros(8, dtype=torch.float64)

    def closure() -> Tensor:
        shift.zero_()
        seen, h = hand_out(shift), net[:2](x)
        first = F.cross_entropy(net[2:](h + shift), y)
        seen[:] = 0.5
        return first + F.cross_entropy(net[2:](h + shift), y)

    true = torch.autograd.grad(closure(), list(net.parameters()))
    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for _ in range(3):
        for (name, found), wanted in zip(learner.gradients(closure).items(), true, strict=True):
            assert torch.allclose(found, wanted, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    net = mlp().double()

    def closure(of_layers: bool) -> Tensor:
        x, y = batch(0)
        h = net[:2](x) if of_layers else x
        nested = torch.nested.as_nested_tensor([h[:1], h[1:]], layout=layout)
        rows = torch.nested.to_padded_tensor(nested, 0.0).flatten(0, 1)[: len(y)]
        return F.cross_entropy(net[2:](rows) if of_layers else net(rows), y)

    learner = ebm.Learner(net, "zero-divergence")
    with pytest.raises(ebm.UnsupportedModuleError, match=r"nested.*pad"):
        learner.gradients(lambda: closure(True))
    found = learner.gradients(lambda: closure(False))  # of the batch alone they may be made
    for (name, p), wanted in zip(
        net.named_parameters(), torch.autograd.grad(closure(False), list(net.parameters())), strict=True
    ):
        assert torch.allclose(found[name], wanted, rtol=0.0, atol=1e-12), (name, p.shape)


@pytest.mark.parametrize("preset", ["zero-divergence", "pc-nudge", "equilibrium-propagation"])
def test_passes_within_one_region_of_autocast_know_nothing_of_each_other(preset: str) -> None:
    """Autocast keeps the weights that one pass has cast, with their graph, until its region ends."""
    torch.manual_seed(0)
    net, (x, y) = mlp(), batch(0, torch.float32)
    learner, other = ebm.Learner(net, preset), ebm.Learner(net, preset)
    with torch.autocast("cpu", torch.bfloat16):
        first = other.gradients(lambda: F.cross_entropy(net(x), y))
    with torch.autocast("cpu", torch.bfloat16):
        for way in (torch.no_grad, torch.enable_grad):
            with way():
                net(x)
            found = learner.gradients(lambda: F.cross_entropy(net(x), y))
            assert off(found, first) == 0


def hidden_by_data(net: nn.Module, h: Tensor, x: Tensor) -> None:
    h.data.mul_(0.5)


def hidden_by_numpy(net: nn.Module, h: Tensor, x: Tensor) -> None:
    h.detach().numpy()[:] *= 0.5


def batch_by_data(net: nn.Module, h: Tensor, x: Tensor) -> None:
    x.data.mul_(0.5)


def weights_by_data(net: nn.Module, h: Tensor, x: Tensor) -> None:
    """As clipping in the step does, between the loss and its gradient."""
    for parameter in net.parameters():
        parameter.data.clamp_(-0.1, 0.1)


def weights_by_storage(net: nn.Module, h: Tensor, x: Tensor) -> None:
    weight = net[2].weight
    weight.untyped_storage().copy_((0.5 * weight.detach()).untyped_storage())


def statistics(net: nn.Module, h: Tensor, x: Tensor) -> None:
    """Torch counts no write where a batch norm in training mode writes to its running statistics."""
    net[1].train()
    net[1](h.detach())
    net[1].eval()


def nothing(net: nn.Module, h: Tensor, x: Tensor) -> None:
    """Who only looks is let be."""
    assert np.isfinite(h.detach().numpy()).all()
    assert h.data.norm() > 0


def what_nobody_keeps(net: nn.Module, h: Tensor, x: Tensor) -> None:
    """Autograd has kept no bias."""
    net[0].bias.data.mul_(0.5)


LATE_WRITES = [hidden_by_data, hidden_by_numpy, batch_by_data, weights_by_data, weights_by_storage, statistics]


class WritingLate:
    """A step that begins to write, once its loss has been computed, when the program is known already."""

    def __init__(self, write) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8).eval(), nn.Tanh(), nn.Linear(8, 3)).double()
        self.write, self.steps = write, 0

    def __call__(self) -> Tensor:
        x, y = batch(0)
        x = x.clone()
        before = self.net[:2](x)
        h = self.net[2](before)
        loss = F.cross_entropy(self.net[3](h), y)
        self.steps += 1
        if self.steps > 3:
            self.write(
                nn.Sequential(self.net[0], self.net[1], self.net[3]), before if self.write is statistics else h, x
            )
        return loss


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("write", LATE_WRITES)
def test_memory_that_autograd_has_kept_is_not_written_to_in_silence(write, capture) -> None:
    step = WritingLate(write)
    learner = ebm.Learner(step.net, "zero-divergence", capture=capture)
    for _ in range(3):
        learner.backward(step)
    with pytest.raises(ebm.UnsupportedModuleError, match="where autograd does not look"):
        learner.backward(step)


@pytest.mark.parametrize("write", [nothing, what_nobody_keeps])
def test_memory_that_is_looked_at_or_that_autograd_has_not_kept_is_no_matter(write) -> None:
    step, other = WritingLate(write), WritingLate(write)
    learner = ebm.Learner(step.net, "zero-divergence")
    for _ in range(5):
        found = learner.gradients(step)
        expected = torch.autograd.grad(other(), list(other.net.parameters()))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found.values(), expected, strict=True))
        step.net.load_state_dict(other.net.state_dict())


TAKEN = {
    "from_numpy": torch.from_numpy, "as_tensor": torch.as_tensor, "dlpack": torch.from_dlpack,
    "buffer": lambda array: torch.frombuffer(array, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("way", TAKEN)
def test_memory_that_was_others_from_the_first_is_not_written_to_in_silence(way, capture) -> None:
    """As an environment does that hands out the same array for every observation."""
    net, (x, y) = mlp().double(), batch(0)
    array, late = np.ones(8), False

    def closure() -> Tensor:
        array[:] = 0.5
        loss = F.cross_entropy(net[2:](net[:2](x) * TAKEN[way](array)), y)
        array[:] = 1.0 if late else array
        return loss

    learner = ebm.Learner(net, "zero-divergence", capture=capture)
    for _ in range(3):
        assert off(learner.gradients(closure), by_autograd(net, closure)) < 1e-12
    late = True
    with pytest.raises(ebm.UnsupportedModuleError, match="where autograd does not look"):
        learner.backward(closure)


def test_memory_of_others_that_autograd_has_not_kept_is_no_matter() -> None:
    net, (x, y) = mlp().double(), batch(0)
    array = np.ones(8)

    def closure() -> Tensor:
        array[:] = [np.nan, *[0.5] * 7]
        loss = F.cross_entropy(net[2:](net[:2](x) + torch.from_numpy(array).nan_to_num()), y)
        array[1:] = 1.0
        return loss

    learner = ebm.Learner(net, "zero-divergence")
    for _ in range(4):
        assert off(learner.gradients(closure), by_autograd(net, closure)) < 1e-12


class Gated(nn.Module):
    """torch writes the gates in place, each a part of one product whose parts autograd counts by themselves."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.activation = nn.Linear(6, 6), nn.Tanh()
        self.cells, self.out = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(self.activation(self.first(x)).reshape(len(x), 2, 3))[0].sum(1))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_checked_once(kind, monkeypatch) -> None:
    """A step that writes where autograd does not look is checked every time, which takes as long as backprop."""
    torch.manual_seed(0)
    net, checks = Gated(kind).double(), []
    learner = ebm.Learner(net, "zero-divergence")
    check = programs.check_against_autograd
    monkeypatch.setattr(programs, "check_against_autograd", lambda *given: checks.append(given) or check(*given))
    for index in (0, 1, 3, 4, 5, 6):  # of one size
        x, y = batch(index)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(net(x), y)

        assert off(learner.gradients(closure), by_autograd(net, closure)) < 1e-12
    assert len(checks) == 1


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_that_autograd_has_kept_is_not_written_to_in_silence(part) -> None:
    """`unsafe_chunk` gives parts that are no views: what is written to one through `.data` is counted nowhere."""
    torch.manual_seed(0)
    net, steps = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double(), []

    def closure() -> Tensor:
        x, y = batch(0)
        parts = torch.unsafe_chunk(net(x), 2, 1)
        loss = (parts[0] * parts[1]).square().sum(1).mean() + 0 * y.sum()
        steps.append(loss)
        if len(steps) > 3:
            parts[part].data.mul_(0.5)
        return loss

    learner = ebm.Learner(net, "zero-divergence")
    for _ in range(3):
        learner.backward(closure)
    with pytest.raises(ebm.UnsupportedModuleError, match="where autograd does not look"):
        learner.backward(closure)
