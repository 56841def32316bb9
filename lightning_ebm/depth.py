"""Initial weights and learning rates by width and depth, for residual networks that are deep.

Letters: N_l is the fan-in of layer l, what a unit of it is computed from (inputs, or channels times kernel), and L the
number of weighted layers. Layers are taken in the order in which the module holds them: the first reads the data, the
last gives the output, those between are branches of a residual stream, x + W rho(x).
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.module_walk import clean

Role = Literal["input", "hidden", "output"]
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


class WeightedLayer(NamedTuple):
    """One layer of the table.

    Attributes:
        name: of the module.
        module: with the weights.
        role: where it stands.
        fan_in: N_l.
        scale: standard deviation of its initial weights.
    """

    name: str
    module: nn.Module
    role: Role
    fan_in: int
    scale: float


def table(module: nn.Module, *, residual: bool = True) -> list[WeightedLayer]:
    """The weighted layers with the scale of their weights: N^-1/2 for the first, (N L)^-1/2 for the hidden, 1/N last.

    These are the premultipliers of muPC, (a_1, a_l, a_L), of weights of variance 1, put into the weights themselves.

    Args:
        module: with linear and convolutional layers.
        residual: whether hidden layers are branches that are added to what goes around them; without skips N^-1/2.

    Raises:
        ConfigurationError: fewer than three weighted layers, which leave nothing to scale with depth.
    """
    checked.instance("depth", "module", module, nn.Module, "a torch.nn.Module")
    found = [(clean(name), m) for name, m in module.named_modules() if isinstance(m, _WEIGHTED)]
    if len(found) < 3:
        raise ConfigurationError(
            f"{type(module).__name__} has {len(found)} linear or convolutional layers: an input layer, an output layer"
            " and hidden ones between them are expected. A shallow network needs no scaling by depth."
        )
    return [_layer(name, m, k, len(found), residual) for k, (name, m) in enumerate(found)]


def _layer(name: str, module: nn.Module, index: int, depth: int, residual: bool) -> WeightedLayer:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    fan_in = weight[0].numel()
    if index == 0:
        return WeightedLayer(name, module, "input", fan_in, fan_in**-0.5)
    if index == depth - 1:
        return WeightedLayer(name, module, "output", fan_in, 1 / fan_in)
    return WeightedLayer(name, module, "hidden", fan_in, (fan_in * (depth if residual else 1)) ** -0.5)


@torch.no_grad()
def initialize(module: nn.Module, *, residual: bool = True) -> list[WeightedLayer]:
    """Draws weights whose forward pass and whose energy's largest curvature keep their size at any width and depth.

    Weights are normal with the deviations of `table`, biases are 0; in place, from torch's global generator.

    What it does not do: the smallest curvature of a chain of L states still falls as 1 / L^2, so that descent on the
    states of a deep network is slow under any initial weights. Relax in error coordinates.

    Args:
        module: as for `table`.
        residual: as for `table`.

    Raises:
        ConfigurationError: as `table`.

    Source:
        Innocenti, Achour, Buckley 2025 (arXiv 2505.13124), after the Depth-muP of Yang et al. and Bordelon et al.
    """
    layers = table(module, residual=residual)
    for layer in layers:
        for name, parameter in layer.module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            else:
                parameter.normal_(0.0, layer.scale)
    return layers


def parameter_groups(
    module: nn.Module,
    lr: float,
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    base_width: int,
    base_depth: int,
    residual: bool = True,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, whose learning rates move the network's function equally far at any width and depth.

    `lr` is the learning rate that was found good on a network of width N_0 = `base_width` and depth L_0 = `base_depth`,
    initialized by `initialize`; there every group has it. With n = N / N_0 and l = L / L_0:

    | | input weights | hidden weights | output weights | input bias | hidden bias | output bias |
    | --- | --- | --- | --- | --- | --- | --- |
    | adam | 1 | 1 / (n l) | 1 / n | 1 | 1 / l | 1 |
    | sgd | n | 1 / l | 1 / n | n | n / l | 1 |

    A step of Adam moves every weight by lr, so that a hidden layer's output moves by lr N and L of them by lr N L; a
    gradient of the input or of a hidden weight is as small as the output weights, 1 / N.

    Args:
        module: as for `table`. Parameters of other layers get `lr` itself.
        lr: at the base size.
        optimizer: whether steps have the size of the gradient, "sgd", or not, "adam".
        base_width: N_0.
        base_depth: L_0, weighted layers, the first and the last included.
        residual: as for `table`; False leaves out l.

    Raises:
        ConfigurationError: a size that is not positive, or as `table`.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        >>> groups = parameter_groups(net, 0.1, base_width=32, base_depth=3)
        >>> groups[2].get("lr")
        0.05
    """
    lr = checked.number("parameter_groups", "lr", lr, "a positive learning rate, such as 1.0e-3", above=0)
    base_width = checked.count("parameter_groups", "base_width", base_width)
    base_depth = checked.count("parameter_groups", "base_depth", base_depth)
    checked.choice("parameter_groups", "optimizer", optimizer, ("adam", "sgd"))
    layers = table(module, residual=residual)
    width = next(layer.fan_in for layer in layers if layer.role == "hidden") / base_width
    depth = len(layers) / base_depth if residual else 1.0
    groups = [
        {"params": [parameter], "lr": lr * _factor(optimizer, layer, name, width, depth, base_width)}
        for layer in layers
        for name, parameter in layer.module.named_parameters(recurse=False)
    ]
    return groups + list(_others(module, layers, lr))


def _factor(optimizer: str, layer: WeightedLayer, name: str, width: float, depth: float, base_width: int) -> float:
    """What a parameter's learning rate is multiplied by."""
    own = layer.fan_in / base_width if layer.role != "input" else width
    deeper = depth if layer.role == "hidden" else 1.0
    if name == "bias":
        grown = width if optimizer == "sgd" and layer.role != "output" else 1.0
        return grown / deeper
    if optimizer == "adam":
        return 1.0 if layer.role == "input" else 1 / (own * deeper)
    return {"input": width, "hidden": 1 / deeper, "output": 1 / own}[layer.role]


def _others(module: nn.Module, layers: list[WeightedLayer], lr: float) -> Iterator[dict[str, Any]]:
    held = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    rest = [p for p in module.parameters() if id(p) not in held]
    if rest:
        yield {"params": rest, "lr": lr}
