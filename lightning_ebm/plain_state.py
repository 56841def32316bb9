"""State that is no tensor: random generators, counters, histories, meters."""

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torchmetrics import Metric, MetricCollection

from lightning_ebm.program.module_walk import modules_of, parameters_of

_OTHERWISE = (Metric, MetricCollection, torch.jit.ScriptModule, LazyModuleMixin)
"""Modules that are put aside as a whole, that hold no such attributes, or that their first batch is to build."""
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_LIBRARIES = (
    *("torch", "torchmetrics", "numpy", "wandb", "lightning", "lightning_fabric", "lightning_utilities"),
    *("pytorch_lightning", "builtins", "functools", "types", "logging", "threading", "pathlib", "lightning_ebm"),
)
_LEAVES = (int, float, str, bytes, type(None), Tensor, nn.Module, type, FunctionType, MethodType, ModuleType)
_MOST_LEAVES = frozenset({int, float, bool, str, type(None)})
"""Looked up sooner than asked for as instances."""
_WALKED_ITEMS = 256
"""Containers longer than this are copied, but not searched for containers within: histories hold numbers."""


class RandomState:
    """The global generators: torch on the CPU and on some devices, Python's, NumPy's if it is loaded.

    Args:
        of: a module, or tensors, on whose devices something draws.
    """

    def __init__(self, of: nn.Module | Iterable[Tensor]) -> None:
        parameters = parameters_of(modules_of(of)) if isinstance(of, nn.Module) else of
        held = parameters if torch.cuda.is_initialized() else []
        self._devices = sorted({p.device.index or 0 for p in held if p.device.type == "cuda"})
        self._read()

    def _read(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def of_now(self) -> "RandomState":
        """The same, read again."""
        now = copy.copy(self)
        now._read()
        return now

    def restore(self) -> None:
        """Sets the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors alone, so that checkpoints open with `weights_only=True`."""
        plain: dict[str, Any] = {"cpu": self._cpu, "cuda": self._cuda, "python": self._python}
        if self._numpy is not None:
            kind, keys, *rest = self._numpy
            plain["numpy"] = [kind, torch.tensor(keys.astype("int64")), *rest]
        return plain

    def load_state_dict(self, plain: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; `restore` then sets the generators to it."""
        version, keys, gauss = plain["python"]
        self._cpu, self._python = plain["cpu"].cpu(), (version, tuple(keys), gauss)
        if len(plain["cuda"]) == len(self._devices):
            self._cuda = [state.cpu() for state in plain["cuda"]]
        if "numpy" in plain and self._numpy is not None:
            kind, keys, *rest = plain["numpy"]
            self._numpy = (kind, keys.cpu().numpy().astype("uint32"), *rest)


_SEQUENCES: tuple[Any, ...] = (list, deque, set, tuple)


class PlainState:
    """Attributes of modules, torch's as well, and what they hold, recursively; and which modules hold which.

    Covered are lists, dicts, sets and deques (of any subclass), objects of classes that no library here defines, and
    generators (`torch.Generator`, `random.Random`, those of `numpy.random`), and NumPy arrays. Tensors are not copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._numpy = sys.modules.get("numpy")  # which nobody uses who has not imported it
        self._undo: list[Callable[[], object]] = []
        seen: set[int] = set()
        for owner in modules_of(module):
            if isinstance(owner._modules, dict):  # those of scripted modules are none, and cannot change
                self._undo.append(partial(_refill, owner._modules, dict(owner._modules)))
            if not isinstance(owner, _OTHERWISE):
                values = {k: v for k, v in vars(owner).items() if k not in _MODULE_INTERNALS}
                self._undo.append(partial(_reset_attributes, owner, values))
                for value in values.values():
                    self._read(value, seen)

    def of_now(self) -> "PlainState":
        """The same, read again."""
        return PlainState(self._module)

    def restore(self) -> None:
        """Gives every attribute, container and generator its contents back; what was added since is let go."""
        for undo in self._undo:
            undo()

    def _read(self, value: Any, seen: set[int]) -> None:
        if type(value) in _MOST_LEAVES or isinstance(value, _LEAVES) or id(value) in seen:
            return
        seen.add(id(value))
        items: list[Any] = []
        if isinstance(value, dict):
            contents = dict(value)
            self._undo.append(partial(_refill, value, contents))
            items = list(contents.values())
        elif (kind := next((kind for kind in _SEQUENCES if isinstance(value, kind)), None)) is not None:
            items = list(kind.__iter__(value))  # not its own: a subclass may refuse a length, or count as it is read
            if kind is not tuple:
                self._undo.append(partial(_refill, value, items))
        elif isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
        elif self._numpy is not None and isinstance(value, self._numpy.ndarray):
            self._undo.append(partial(_put_back, value, value.copy()))
        elif self._numpy is not None and isinstance(value, self._numpy.random.RandomState):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif self._numpy is not None and isinstance(value, self._numpy.random.Generator):
            self._undo.append(partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state)))
        elif hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in _LIBRARIES:
            attributes = dict(vars(value))
            self._undo.append(partial(_reset_attributes, value, attributes))
            items = list(attributes.values())
        if len(items) <= _WALKED_ITEMS:
            for item in items:
                self._read(item, seen)


def _put_back(array: Any, contents: Any) -> None:
    array[...] = contents


def _reset_attributes(owner: object, values: dict[str, Any]) -> None:
    present = vars(owner)
    for key in [
        k for k in present if k not in values and not (isinstance(owner, nn.Module) and k in _MODULE_INTERNALS)
    ]:
        del present[key]
    present.update(values)


def _refill(container: Any, contents: Any) -> None:
    """Puts the contents back, if others are there. Compared by identity: tensors and arrays have no truth value."""
    if isinstance(container, dict):
        same = len(container) == len(contents) and all(
            k is m and v is w for (k, v), (m, w) in zip(container.items(), contents.items(), strict=True)
        )
    else:
        same = len(container) == len(contents) and all(x is y for x, y in zip(container, contents, strict=True))
    if not same:
        container.clear()
        container.update(contents) if isinstance(container, dict | set) else container.extend(contents)
