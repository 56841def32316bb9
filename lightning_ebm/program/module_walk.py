"""The modules below a module and their parameters, several times sooner than by torch's walks, which make names too.

They are asked for at every step, as users may add, replace and freeze parts between any two of them.
"""

from collections.abc import Iterable

from torch import nn


def modules_of(root: nn.Module) -> list[nn.Module]:
    """The module and all below it, each once, level by level."""
    found, seen = [root], {root}
    for module in found:  # grows on the way
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Those that the modules themselves hold; shared ones as often as they are held."""
    return [p for module in modules for p in module._parameters.values() if p is not None]


def is_activation(module: nn.Module) -> bool:
    """Whether a layer at this module is a nonlinearity of its drive, not a block with weights of its own."""
    return isinstance(module, nn.PReLU) or not parameters_of(modules_of(module))


def clean(name: str) -> str:
    """A parameter's or module's name as the user wrote the model, without what torch.compile puts before it."""
    return name.replace("_orig_mod.", "")


def owners_of(module: nn.Module) -> dict[int, str]:
    """Of each parameter, by its identity, the name of the weight that it belongs to.

    A module of torch's is one weight, as is one with a single matrix or kernel. Parameters in a list each stand for
    themselves; of several matrices that another module holds, each does, with the vectors that come after it.
    """
    found: dict[int, str] = {}
    for name, owner in module.named_modules():
        alone = isinstance(owner, nn.ParameterList | nn.ParameterDict)
        held = list(owner.named_parameters(recurse=False))
        matrices = [key for key, parameter in held if parameter.ndim > 1]
        several = len(matrices) > 1 and not type(owner).__module__.startswith("torch.")
        weight = matrices[0] if several else ""
        for key, parameter in held:
            weight = key if alone or (several and parameter.ndim > 1) else weight
            found[id(parameter)] = f"{name}.{weight}".strip(".") if weight else name
    return found
