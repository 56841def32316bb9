"""The layer table."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ebm import notebook
from lightning_ebm.counted import counted
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.learner import Learner
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.program.locality import Judged
from lightning_ebm.program.module_walk import clean
from lightning_ebm.program.tensors import tensors_in
from lightning_ebm.program.wiring import Plan


class LayerSummary(NamedTuple):
    """One layer.

    Attributes:
        name: the module.
        call: which call of it, from 0.
        state_shape: of x_l, batch first.
        activation: class of its nonlinearity, None where the layer is a whole block.
        parameters: names of those in its drive.
        num_parameters: their elements.
        modules_between: modules with parameters between its parents' states and it; 1 is as local as can be.
        parents: what its drive is computed from, names of states or "input".
    """

    name: str
    call: int
    state_shape: tuple[int, ...]
    activation: str | None
    parameters: tuple[str, ...]
    num_parameters: int
    modules_between: int
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """The layers of a module, and what enters the loss directly. `str` gives the table, with long lists cut short.

    Attributes:
        layers: one `LayerSummary` a state, in the order of the forward pass.
        readout: names of the parameters between the last states and the loss.
        local_share: share of the weights, by elements of matrices and kernels, whose update is propagated through no
            other weight, and not around the states.
        locality: the mean over the weights of one over how many weights an update goes through, 0 where it goes around
            the states or through itself: what layers are chosen by.
        chosen: in words, the set of modules that has the states; "asked for" if it was.
        compared: the sets that it was chosen from, each with its number of states and both shares.
    """

    module: str
    layers: list[LayerSummary]
    readout: tuple[str, ...]
    local_share: float
    locality: float
    chosen: str
    compared: tuple[Judged, ...]

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [
            (
                f"{layer.name}#{layer.call}" if layer.call else layer.name,
                " x ".join(map(str, layer.state_shape)),
                layer.activation or "block",
                _told(layer.parents),
                f"{_told(layer.parameters)} ({layer.num_parameters:,})" if layer.parameters else "none",
                str(layer.modules_between),
            )
            for layer in self.layers
        ]
        return [*rows, ("(loss)", "", "read-out" if self.readout else "", "", _told(self.readout) or "none", "")]

    def __str__(self) -> str:
        table = [_HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self._title, lines[0], rule, *lines[1:], *self._why])

    def _repr_html_(self) -> str:
        return notebook.table(self._title, _HEADER, self._rows()) + "".join(f"<p>{line}</p>" for line in self._why)

    def __rich__(self) -> Any:
        """The same as a table of `rich`, for its consoles."""
        from rich.table import Table

        why = " ".join(self._why)
        table = Table(*_HEADER, title=self._title, title_justify="left", caption=why, caption_justify="left")
        for row in self._rows():
            table.add_row(*row)
        return table

    @property
    def _why(self) -> list[str]:
        """How much learns locally, and what the layers were chosen from."""
        lines = [
            f"{self.local_share:.0%} of the weights learn locally, through no other weight and not around the states;"
            f" the mean of 1 / (weights an update goes through) is {self.locality:.2f}."
        ]
        others = [f"{j.what} {j.mean:.2f} ({j.states} states)" for j in self.compared if j.what != self.chosen]
        if self.compared:
            lines.append(f"States at: {self.chosen}" + (f"; it would be {', '.join(others)}." if others else "."))
        return lines

    @property
    def _title(self) -> str:
        return f"{self.module}: {counted(len(self.layers), 'layer')} with states"


def _told(names: Sequence[str]) -> str:
    """Names for a cell of the table: of many, as a block of a Transformer has, the first and how many more."""
    told = ", ".join(names)
    return told if len(told) <= _WIDEST else f"{names[0]} and {len(names) - 1} more"


_WIDEST = 60
"""Characters of a cell, where names are several."""
_HEADER = ("layer", "state", "activation", "parents", "parameters in its drive", "modules between")


def summary(
    module: nn.Module, *example_inputs: Any, layers: Layers = None, output: Output = "auto", **named_inputs: Any
) -> Summary:
    """Finds the layers of a module by running it once on example inputs, without side effects.

    Args:
        module: any module; called as ``module(*example_inputs, **named_inputs)``.
        example_inputs: one batch of them.
        layers: as in `Learner`.
        output: as in `Learner`.
        named_inputs: those that it takes by name, as `ebm.summary(net, **batch)` for networks of transformers.

    Raises:
        LayerDiscoveryError: nothing could carry a state.
        ConfigurationError: `layers` or `output` name nothing, or the module returns nothing differentiable.
    """

    def pretended_loss() -> Tensor:
        _check_inputs(module, example_inputs, named_inputs)
        try:
            outputs = tensors_in(module(*example_inputs, **named_inputs))
        except NotImplementedError as error:
            raise ConfigurationError(
                f"{type(module).__name__} has no forward to run. Summarize the network it holds, such as"
                " ebm.summary(module.net, x); under EBMStrategy the table of a whole LightningModule is printed when"
                " fit starts."
            ) from error
        parts = [output.sum() for output in outputs if output.requires_grad]
        if parts or not any(p.requires_grad for p in module.parameters()):
            return torch.stack(parts).sum() if parts else torch.zeros(())
        raise ConfigurationError(
            f"{type(module).__name__} returned nothing that can be differentiated: the table follows what it returns"
            " back to its inputs. Return a tensor, or a tuple, mapping or dataclass of them; None, other objects and"
            " integers, as argmax gives, tell nothing."
        )

    learner = Learner(module, layers=layers, output=output)
    return of_plan(module, learner.begin(pretended_loss).examine())


def _check_inputs(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    try:
        inspect.signature(module.forward).bind(*inputs, **named)
    except ValueError:  # of a scripted one, which has none
        return
    except TypeError as error:
        raise ConfigurationError(
            f"ebm.summary(module, *inputs) calls module(*inputs), and {type(module).__name__}.forward does not take the"
            f" {len(inputs) + len(named)} that were given: {error}. Give one batch as the module takes it, such as"
            " ebm.summary(net, x) or ebm.summary(net, **batch)."
        ) from error


def of_plan(module: nn.Module, plan: Plan) -> Summary:
    """The table of layers already found."""
    sizes = {clean(name): p.numel() for name, p in module.named_parameters()}
    layers = [
        LayerSummary(
            row.key.name,
            row.key.call,
            row.state_shape,
            row.activation,
            row.parameters,
            sum(sizes[name] for name in row.parameters),
            row.modules_between,
            tuple(str(plan.states[p]) for p in row.parents) or ("input",),
        )
        for row in plan.rows
    ]
    local = plan.locality
    name = type(module).__name__
    return Summary(name, layers, plan.loss_parameters, local.share, local.mean, plan.chosen, plan.compared)
