"""Nets, steps that change, and the fast way of a step beside the plain one: shared by several test files."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_ebm as ebm
from lightning_ebm.program.code import Code

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


class Run:
    """What a few steps of training came to.

    Attributes:
        updates: of every step.
        runs: how often the user's step ran.
        codes: all that evaluations were traced to, step by step: code, or why there is none.
        learner: that made them.
    """

    def __init__(self, learner: ebm.Learner) -> None:
        self.updates: list[dict[str, Tensor]] = []
        self.runs = 0
        self.codes: list[dict[object, object]] = []
        self.learner = learner

    @property
    def is_coded(self) -> bool:
        """Whether some steps ran as code, and whatever was asked for could be traced."""
        made = [code for codes in self.codes for code in codes.values()]
        return bool(made) and all(isinstance(code, Code) for code in made)

    @property
    def reasons(self) -> str:
        """Why there is no code."""
        return "; ".join({code for codes in self.codes for code in codes.values() if isinstance(code, str)})


def trained(
    make: Callable[[], nn.Module], algorithm: ebm.Algorithm, capture: bool, step: Step = cross_entropy, count: int = 4
) -> Run:
    """Two epochs, of which each last batch is smaller."""
    torch.manual_seed(0)
    net = make().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)  # Adam makes a full step of a rounding error
    run = Run(ebm.Learner(net, algorithm, capture=capture))

    def closure() -> Tensor:
        run.runs += 1
        return step(net, batch, index)

    for epoch in range(2):
        for index, batch in enumerate(batches(count), epoch * count):  # noqa: B007  # the closure reads them
            optimizer.zero_grad()
            run.learner.backward(closure)
            run.updates.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
            known = run.learner._programs.latest
            run.codes.append({} if known is None else dict(known.traced.codes))
            optimizer.step()
    return run


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
) -> tuple[float, Run]:
    """How far the two ways are apart at most, and what became of the fast one."""
    plain = trained(make, algorithm, False, step, count)
    fast = trained(make, algorithm, True, step, count)
    assert not any(plain.codes)
    return apart(fast.updates, plain.updates), fast


def pc(relaxer: str = "euler", **parts: object) -> ebm.Algorithm:
    return ebm.algorithm("predictive-coding", **{"nudge": ebm.OneSided(0.3), "relaxer": RELAXERS[relaxer], **parts})


def small(make: Callable[[], nn.Module], gain: float = 0.5) -> Callable[[], nn.Module]:
    """Weights at which the map between the layers contracts: where it does not, rounding grows without bound."""

    def made() -> nn.Module:
        net = make()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter *= gain
        return net

    return made


def hopfield(**parts: object) -> ebm.Algorithm:
    given = {"nudge": ebm.Centered(0.25), "relaxer": ebm.FixedPoint(4), "free_relaxer": ebm.FixedPoint(6), **parts}
    return ebm.Algorithm(energy=ebm.Hopfield(), **given)  # type: ignore[arg-type]


def chain(act: Callable[[], nn.Module], last: Callable[[], nn.Module] = nn.Identity) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 3), last())


def squared(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return 0.5 * (net(batch[0]) - F.one_hot(batch[1], 3)).square().sum() / len(batch[0])


# ----------------------------------------------- steps that change from batch to batch


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
    net.net[0].weight.requires_grad_(index <= 3)
    return cross_entropy(net, batch, index)


def another_parameter_from_the_fourth_batch_on(net, batch, index):
    if index == 4:
        net.net[2].weight = nn.Parameter(net.net[2].weight.detach() * 1.5)
    return cross_entropy(net, batch, index)


def weights_clamped_in_the_step(net, batch, index):
    net.net[0].weight.data.clamp_(-0.1 - 0.01 * index, 0.1)
    return cross_entropy(net, batch, index)


def written_before_and_after(net, batch, index):
    """The first product is of the batch as it came, the second of the same tensor written to since."""
    x = batch[0].clone()
    before = x @ net.net[0].weight.detach().t()
    x.mul_(2.0)
    return F.cross_entropy(net.net[1:](before + net.net[0](x)), batch[1])


def a_leaf_made_of_a_constant(net, batch, index):
    h = net.net[:2](batch[0])
    return F.cross_entropy(net.net[2:](h + h.detach().requires_grad_(index >= LATE)), batch[1])


LATE = 4
"""The step from which on something is done that the captured ones did not do."""

Change = Callable[[Tensor, int], Tensor]
"""What becomes of the first hidden layer."""


def step_with(change: Change) -> Callable[..., Tensor]:
    def step(net: Box, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(net.net[2:](change(net.net[:2](batch[0]), index)), batch[1])

    step.__name__ = change.__name__
    return step


# ------------------------------------------------------------------------------------ values read into Python


def branch_on_the_largest(h: Tensor, index: int) -> Tensor:
    return h * 0.3 if index >= LATE and h.detach().abs().max() > 0.9 else h


def branch_that_flips_between_states(h: Tensor, index: int) -> Tensor:
    """The record is that of before wherever the first pass takes that way. Little hangs on it, or the energy rises."""
    return h * (1 + 1e-5) if index >= LATE and (1e4 * h.detach().sum()).sin() > 0 else h * 1.0


def branch_on_a_comparison_of_tensors(h: Tensor, index: int) -> Tensor:
    return h * 0.9 if index >= LATE and not torch.allclose(h, h.round(), atol=0.499) else h


def a_list_of_values(h: Tensor, index: int) -> Tensor:
    return h * (1 + max(map(abs, h.detach()[0].tolist()))) if index >= LATE else h


def values_of_an_array(h: Tensor, index: int) -> Tensor:
    return h * (1 + float(np.abs(np.asarray(h.detach())).max())) if index >= LATE else h


def an_array_in_place_of_another(h: Tensor, index: int) -> Tensor:
    """The record is the same throughout: a factor that comes from outside."""
    weights = np.abs(h.detach().numpy()) if index >= LATE else np.ones(h.shape)
    return h * torch.from_numpy(weights)


def a_number_in_place_of_another(h: Tensor, index: int) -> Tensor:
    return h * torch.tensor(float(h.detach().square().mean()) if index >= LATE else 1.0)


# ------------------------------------------------------------------------------ shapes that depend on states


def how_many_are_nonzero(h: Tensor, index: int) -> Tensor:
    return h * (1 + (h.detach() > 0).nonzero().shape[0] / h.numel()) if index >= LATE else h


def how_many_a_mask_picks(h: Tensor, index: int) -> Tensor:
    return h * (1 + h.detach()[h.detach() > 0.1].numel() / h.numel()) if index >= LATE else h


def how_many_are_selected(h: Tensor, index: int) -> Tensor:
    return h * (1 + len(torch.masked_select(h, h > 0)) / h.numel()) if index >= LATE else h


def how_many_values_there_are(h: Tensor, index: int) -> Tensor:
    return h * (1 + len((8 * h.detach()).round().unique()) / 17) if index >= LATE else h


def how_often_samples_are_repeated(h: Tensor, index: int) -> Tensor:
    return h * (1 + len(h.repeat_interleave((h.detach()[:, 0] > 0).long(), 0)) / 7) if index >= LATE else h


def how_many_counts_there_are(h: Tensor, index: int) -> Tensor:
    return h * (1 + len(torch.bincount((4 * h.detach()[0].abs()).long())) / 4) if index >= LATE else h


# ----------------------------------------------------------------------- hooks, and backward code of one's own


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        return 0.3 * slope


def a_function_in_place_of_a_cut(h: Tensor, index: int) -> Tensor:
    """Below autograd both are a view that is made while gradients are off."""
    if index >= LATE:
        return Scaled.apply(h)
    with torch.no_grad():
        return h.view_as(h)


def a_function_that_comes_late(h: Tensor, index: int) -> Tensor:
    return Reversed.apply(h, 0.5) if index >= LATE else h.view_as(h)


def a_function_behind_others(h: Tensor, index: int) -> Tensor:
    return h + 0.5 * (Scaled.apply(h * 2.0) if index >= LATE else h * 2.0)


def a_hook_on_a_tensor_that_is_gone(h: Tensor, index: int) -> Tensor:
    middle = h * 2.0
    if index >= LATE:
        middle.register_hook(lambda slope: 0.3 * slope)
    return middle * 0.5


def a_hook_on_a_view_that_is_gone(h: Tensor, index: int) -> Tensor:
    middle = h.view(-1)
    if index >= LATE:
        middle.register_hook(lambda slope: 0.2 * slope.flip(0))
    return middle.view(h.shape)


def a_hook_on_a_node(h: Tensor, index: int) -> Tensor:
    middle = h * 2.0
    if index >= LATE:
        middle.grad_fn.register_hook(lambda given, slopes: (0.3 * given[0], *given[1:]))
    return middle * 0.5


def a_hook_before_a_node(h: Tensor, index: int) -> Tensor:
    middle = h * 2.0
    if index >= LATE:
        middle.grad_fn.register_prehook(lambda slopes: (0.3 * slopes[0], *slopes[1:]))
    return middle * 0.5


def a_hook_on_several(h: Tensor, index: int) -> Tensor:
    first, second = h * 2.0, h * 1.5
    if index >= LATE:
        register_multi_grad_hook([first, second], lambda slopes: None)
    return first - second


def other_tensors_saved(h: Tensor, index: int) -> Tensor:
    if index < LATE:
        return h * h
    with saved_tensors_hooks(lambda x: x, lambda x: 0.95 * x):
        return h * h


def tensors_saved_elsewhere(h: Tensor, index: int) -> Tensor:
    if index < LATE:
        return h.sin()
    with save_on_cpu():
        return h.sin()


def a_part_run_again(h: Tensor, index: int) -> Tensor:
    return checkpoint(torch.sin, h, use_reentrant=False) if index >= LATE else h.sin()


# ------------------------------------------------------------------------------ tensors of other kinds between


def picks(index: int, count: int) -> Tensor:
    """Which samples count: another number of them in every step, none in the fourth."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(index))[: (2, 2, 1, 0, 2, 3, 0, 2)[index]]] = (
        True
    )
    return mask


def masked_mean_of_squares(net, batch, index):
    mask = picks(index, len(batch[0])).logical_or(torch.arange(len(batch[0])) == 0)  # never none: a mean of them
    return (net(batch[0]) - 1.0).square()[mask].mean()


def masked_sum(net, batch, index):
    return (net(batch[0]) - 1.0).square()[picks(index, len(batch[0]))].sum() / 7 + cross_entropy(net, batch, index)


def selected_sum(net, batch, index):
    squares = (net(batch[0]) - 1.0).square()
    return squares.masked_select(picks(index, len(batch[0]))[:, None]).sum() / 7 + cross_entropy(net, batch, index)


def masked_spread(net, batch, index):
    mask = picks(index, len(batch[0])).logical_or(torch.arange(len(batch[0])) < 2)
    return net(batch[0])[mask].var(0).sum() + cross_entropy(net, batch, index)


def by_positions(net, batch, index):
    rows = picks(index, len(batch[0])).nonzero()[:, 0]
    return net(batch[0]).square()[rows].sum() + cross_entropy(net, batch, index)


def by_lengths(net, batch, index):
    lengths = 2 * picks(index, len(batch[0])).long() + (torch.arange(len(batch[0])) == 0)
    return net(batch[0]).repeat_interleave(lengths, 0).square().mean()


def by_the_labels_there_are(net, batch, index):
    labels = batch[1].clamp_max(index % 3).unique()
    return net(batch[0])[:, labels].square().mean()


def in_pieces(net, batch, index):
    pieces = net(batch[0]).split([1 + index % 2, len(batch[0]) - 1 - index % 2])
    return sum(piece.square().mean() for piece in pieces)


def apart_by_samples(net, batch, index):
    hidden = net(batch[0][: 2 + index % 2])
    return sum(sample.square().mean() for sample in hidden.unbind(0))


def other_strides_between(net, batch, index):
    x = batch[0].t().contiguous().t() if index % 2 else batch[0]
    return F.cross_entropy(net(x), batch[1]) + net.net[:2](x).reshape(-1)[: 2 * len(x)].square().sum()


def a_wider_type_between(net, batch, index):
    weights = torch.ones(len(batch[0]), dtype=(torch.float32, torch.float64)[index % 2]) * (1 + index)
    return (weights * F.cross_entropy(net(batch[0]), batch[1], reduction="none")).mean()


KINDS = [masked_mean_of_squares, masked_sum, selected_sum, masked_spread, by_positions, by_lengths,
         by_the_labels_there_are, in_pieces, apart_by_samples, other_strides_between, a_wider_type_between]  # fmt: skip


LATE_CHANGES = [
    branch_on_the_largest, branch_that_flips_between_states, branch_on_a_comparison_of_tensors, a_list_of_values,
    values_of_an_array, an_array_in_place_of_another, a_number_in_place_of_another, how_many_are_nonzero,
    how_many_a_mask_picks, how_many_are_selected, how_many_values_there_are, how_often_samples_are_repeated,
    how_many_counts_there_are, a_function_in_place_of_a_cut, a_function_that_comes_late, a_function_behind_others,
    a_hook_on_a_tensor_that_is_gone, a_hook_on_a_view_that_is_gone, a_part_run_again, tensors_saved_elsewhere,
]  # fmt: skip
"""Of these something begins in the fifth step."""
GRAPH_HOOKS = [a_hook_on_a_node, a_hook_before_a_node, a_hook_on_several, other_tensors_saved]
"""Of these too, and nothing below autograd shows it."""
CHANGING = [
    detached_from_the_fourth_batch_on, no_grad_from_the_fourth_batch_on, branch_on_a_flag, permutation_of_the_layers,
    number_made_into_a_tensor, numpy_weights_of_the_samples, buffer_written_after_it_was_used,
    buffer_written_before_it_is_used, random_draws, logging_now_and_then, labels_left_out,
    labels_of_its_own_now_and_then, hidden_written_through_a_view, random_draws_from_states, values_read_into_python,
    values_through_numpy, gradient_reversal, hook_on_a_hidden_tensor, hook_on_a_parameter, weight_by_index,
    constant_by_index, clamped_where_it_does_not_show, smoothing, dropout_rate, input_written_through_a_view,
    frozen_from_the_fourth_batch_on, another_parameter_from_the_fourth_batch_on, weights_clamped_in_the_step,
    written_before_and_after, a_leaf_made_of_a_constant, *map(step_with, LATE_CHANGES), *KINDS,
]  # fmt: skip
"""Steps that do something else in every batch, or from one on, and show it in no shape of the batch."""
