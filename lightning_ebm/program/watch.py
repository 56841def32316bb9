"""Which modules of the user's are watched while a pass is recorded."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_ebm.program.fast_paths import FastPaths
from lightning_ebm.program.module_walk import clean, is_activation, modules_of


class Watch:
    """Which modules are watched: found anew only when the modules, or which of them hold parameters, have changed.

    Args:
        root: the user's module.
        chosen: the modules whose calls may carry states; those with parameters of their own are watched anyway.
        suspects: modules that may act as activations, see `acting_in`: calls that keep the shape are watched.
    """

    def __init__(
        self,
        root: nn.Module,
        chosen: Callable[[], Collection[nn.Module]],
        suspects: Callable[[], Collection[nn.Module]],
    ) -> None:
        self._root = root
        self._find = chosen
        self._suspect = suspects
        self._of: list[Any] = []
        self.chosen: Collection[nn.Module] = ()
        self.suspects: Collection[nn.Module] = ()
        self.names: dict[nn.Module, str] = {}
        self.weighted: dict[nn.Module, bool] = {}
        self.activations: list[nn.Module] = []
        self.batch_first: dict[nn.Module, bool] = {}
        """What modules with torch's attribute of that name say: whether samples come before times."""
        self.encoders: list[nn.Module] = []
        self.fast_paths = FastPaths(root)
        self.compiled = False

    def renew(self) -> None:
        """Looks at the modules of now."""
        modules = modules_of(self._root)
        now = [(m, *m._modules.items(), *((name, p is None) for name, p in m._parameters.items())) for m in modules]
        if now == self._of:
            return
        self._of = now
        self.chosen = self._find()
        self.suspects = {module for module in self._suspect() if module not in self.chosen}
        self.weighted = {module: _has_weights(module) for module in modules}
        named = [(module, name) for name, module in self._root.named_modules()]
        self.names = {
            module: clean(name)
            for module, name in named
            if (self.weighted[module] or module in self.chosen or module in self.suspects)
            and not isinstance(module, torch.jit.ScriptModule)
        }  # scripted ones take no hooks
        self.activations = [module for module in self.names if is_activation(module)]
        says = {module: getattr(module, "batch_first", None) for module in self.names}
        self.batch_first = {module: first for module, first in says.items() if isinstance(first, bool)}
        self.encoders = [module for module in modules if isinstance(module, nn.TransformerEncoder)]
        # A compiled network would not see the hooks: for a pass it runs as it was written.
        self.compiled = any("_orig_mod" in module._modules for module in modules)


def _has_weights(module: nn.Module) -> bool:
    """Whether it computes with parameters of its own: a norm without affine parameters has none."""
    return is_parametrized(module) or any(p is not None for p in module._parameters.values())
