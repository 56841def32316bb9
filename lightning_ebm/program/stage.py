"""A graph as a function."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx.graph import CodeGen


class Emptied(CodeGen):
    """Code that takes its inputs as one list, which it empties: it lets go of each when it has read it last."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The head of the function."""
        head = f"def {self._func_name}(self, inputs){maybe_return_annotation}:"
        taken = f"\n    [{', '.join(free_vars)}] = inputs" if free_vars else ""
        return f"{head}{taken}\n    inputs.clear()"


class Stage:
    """A graph as a function of one list, see `Emptied`.

    A `GraphModule` does the same, and torch keeps the text of every one that there has ever been. The graph is let go
    of: of a deep network it is many thousands of objects, for Python to look through now and then.

    Args:
        graph: its names are torch.fx's own.
        constants: by the names that its nodes get them by.
    """

    def __init__(self, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        graph.set_codegen(Emptied())
        code = graph.python_code("self")
        space = dict(code.globals)
        exec(compile(code.src, "<evaluation>", "exec"), space)
        self._run: Any = space["forward"]
        vars(self).update(_of(graph, constants))

    def __call__(self, inputs: list[Tensor]) -> Any:
        """The results.

        Args:
            inputs: in the order of the graph's placeholders; emptied.
        """
        return self._run(self, inputs)


def module_of(graph: fx.Graph, constants: Mapping[str, Tensor]) -> fx.GraphModule:
    """The same with its inputs one by one, for Inductor."""
    graph.set_codegen(CodeGen())
    return fx.GraphModule(_of(graph, constants), graph)


def _of(graph: fx.Graph, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that it gets."""
    return {node.target: constants[node.target] for node in graph.nodes if node.op == "get_attr"}
