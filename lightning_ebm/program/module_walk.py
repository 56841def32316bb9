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


def owners_of(module: nn.Module) -> dict[int, str]:
    """Of each parameter, by its identity, the name of what holds it directly; those in a list each hold themselves."""
    found: dict[int, str] = {}
    for name, owner in module.named_modules():
        alone = isinstance(owner, nn.ParameterList | nn.ParameterDict)
        for key, parameter in owner.named_parameters(recurse=False):
            found[id(parameter)] = f"{name}.{key}" if alone and name else key if alone else name
    return found
