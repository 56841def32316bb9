"""What a host asks a device, and how many operations it gives it; counted on any machine, by tests and for the page.

A question is an operation whose result decides in Python, and so waits for all that was computed before.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
"""Where the arithmetic is."""
RARELY: tuple[str, Callable[[torch.device], bool]] = ("lightning_ebm.network.network.runs_behind", lambda device: True)
"""For `unittest.mock.patch` or `monkeypatch.setattr`: a CPU is asked as what computes while the host goes on."""


class Questions:
    """What was found: `count` of all questions, `places` by where in the library they were asked, `operations` by name.

    An operation computes: what only looks at memory in another way, or reserves it, is none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.places: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()

    def note(self, what: str) -> None:
        """A question."""
        frames = [f for f in traceback.extract_stack() if "/lightning_ebm/" in f.filename]
        where = f"{frames[-1].filename.split('/lightning_ebm/')[-1]}:{frames[-1].lineno}" if frames else "elsewhere"
        self.count += 1
        self.places[f"{where} {what}"] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.questions = questions

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(a, torch.Tensor) and a.dtype in (torch.bool, torch.uint8) for a in indices)
        if name in OPERATIONS or (by_mask and name.startswith(("index", "_index"))):
            self.questions.note(name)
        returned = [found.alias_info for found in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and not name.startswith(("empty", "new_empty")):
            self.questions.operations[name] += 1
        return func(*args, **kwargs or {})


class _Methods(TorchFunctionMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in METHODS:
            self.questions.note(METHODS[func])
        return func(*args, **kwargs or {})


@contextmanager
def questions() -> Iterator[Questions]:
    """Counts what is asked within; on any device, as it would be on one that computes while the host goes on.

    `.item()`, `bool(x)`, `float(x)` and branches are one question each, and so are `.tolist()`, `torch.equal`,
    `nonzero` and indexing by a mask.
    """
    found = Questions()
    with _Methods(found), _Operations(found):
        yield found
