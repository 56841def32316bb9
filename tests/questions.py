"""What a host asks a device: every operation whose result decides in Python, and so waits for all before it."""

import traceback
from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique_consecutive",
    "_unique2", "unique_dim", "_linalg_check_errors",
}  # fmt: skip
"""Whose result, or the shape of it, is a number that lies on the device."""
METHODS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy", torch.Tensor.cpu: "cpu"}
"""Which copy to the host; on a CPU they are no operation at all."""


class Questions:
    """The questions that were asked: `count` of all, `places` by where in the library."""

    def __init__(self):
        self.count, self.places = 0, Counter()

    def note(self, what):
        frames = [f for f in traceback.extract_stack() if "/lightning_ebm/" in f.filename]
        where = f"{frames[-1].filename.split('/lightning_ebm/')[-1]}:{frames[-1].lineno}" if frames else "elsewhere"
        self.count += 1
        self.places[f"{where} {what}"] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, questions):
        super().__init__()
        self.questions = questions

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(a, torch.Tensor) and a.dtype in (torch.bool, torch.uint8) for a in indices)
        if name in OPERATIONS or (by_mask and name.startswith(("index", "_index"))):
            self.questions.note(name)
        return func(*args, **kwargs or {})


class _Methods(TorchFunctionMode):
    def __init__(self, questions):
        super().__init__()
        self.questions = questions

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            self.questions.note(METHODS[func])
        return func(*args, **kwargs or {})


@contextmanager
def questions():
    """Counts what is asked within; on any device, as it would be on one that computes while the host goes on.

    `.item()`, `bool(x)`, `float(x)` and branches are one question each, and so are `.tolist()`, `torch.equal`,
    `nonzero` and indexing by a mask.
    """
    found = Questions()
    with _Methods(found), _Operations(found):
        yield found
