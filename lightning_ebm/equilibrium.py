"""A network that is evaluated at the equilibrium it was trained on, as a plain module."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.learner import Learner
from lightning_ebm.network.clamp import Clamp, checked_clamp, checked_names
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output


class Equilibrium(nn.Module):
    """forward(...) returns what `module` computes with its states at the free equilibrium, argmin_x I(x, theta).

    A network trained on a Hopfield-type energy is that equilibrium, not its forward pass; this is what to deploy, as
    what validation and test of the strategies use. Saved, loaded and moved like any module, exported by `exported`; the
    parameters are those of `module`, under ``module.``. Outputs carry no gradient: see
    `lightning_ebm.reference.equilibrium` for one. For divergence energies, such as predictive coding, it is `module`
    itself, unless units are held: then it is the equilibrium under the clamp, of any energy.

    Args:
        module: the network.
        algorithm: whose energy, free phase and initial state.
        layers: as in `Learner`; as in training.
        output: as in `Learner`; as in training.
        clamp: as in `Learner.relax`; or a function of the inputs that gives it, ``lambda x: {"3": x}``.
        free: as in `Learner.relax`.

    Raises:
        LayerDiscoveryError: (in forward) no layer found.
        RelaxationDivergedError: (in forward) states ran away.
        ConfigurationError: (in forward) torch.export, torch.onnx.export or torch.jit.trace is at work, and none of them
            can follow a relaxation; see `exported`. Where the equilibrium is the forward pass they can.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Hardtanh(0, 1), nn.Linear(8, 2))
        >>> Equilibrium(net, "equilibrium-propagation")(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        algorithm: str | Algorithm,
        *,
        layers: Layers = None,
        output: Output = "auto",
        clamp: Clamp | Callable[..., Clamp] | None = None,
        free: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.module = module
        self._clamp = clamp if clamp is None or callable(clamp) else checked_clamp(clamp)
        self._free = checked_names("free", free)
        self._settings: dict[str, Any] = {"algorithm": algorithm, "layers": layers, "output": output}
        self._learner: Learner | None = None
        algorithm = self._learned().algorithm  # refuses settings that cannot work where they are written
        self._is_forward = algorithm.rests_at_forward and self._clamp is None and not self._free

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The free-phase output for these inputs."""
        if self._is_forward:
            with torch.no_grad():
                return self.module(*args, **kwargs)
        exporting = getattr(torch.compiler, "is_exporting", bool)()  # torch 2.6 cannot tell
        if exporting or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise ConfigurationError(_EXPORT)
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = ordinary((args, kwargs))
            clamp = checked_clamp(self._clamp(*args, **kwargs)) if callable(self._clamp) else self._clamp
            learner = self._learned()
            with learner.free_phase(lambda: self.module(*args, **kwargs), clamp=clamp, free=self._free):
                return self.module(*args, **kwargs)

    def exported(self, *args: Tensor) -> torch.export.ExportedProgram:
        """The whole evaluation as one graph of tensor operations, to save with `torch.export.save` and run elsewhere.

        The graph holds the parameters of now, and needs neither this library nor autograd. It is for inputs of these
        shapes, and takes all `max_steps` sweeps, plain ones: a graph cannot ask whether it has arrived.

        Args:
            args: inputs; what they hold is of no consequence.

        Raises:
            ConfigurationError: the free phase is not that of a `FixedPoint`, accelerated or not; others choose their
                steps by looking.
        """
        algorithm = self._learned().algorithm
        relaxer = algorithm.free_relaxer or algorithm.relaxer
        if self._clamp is not None or self._free:
            raise ConfigurationError(
                "Equilibrium.exported: with units held there is no graph of it yet; export it without clamp=... and"
                " free=..., or save the module itself."
            )
        if not self._is_forward and not relaxer.goes_into_graphs:
            raise ConfigurationError(
                f"Equilibrium.exported: the free phase is relaxed by {relaxer!r}, which chooses its steps by looking at"
                " energies, as no graph can. Take free_relaxer=ebm.FixedPoint(max_steps)."
            )
        self(*args)  # the layers are found before the graph is made
        graph = make_fx(self.forward)(*args)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        with torch.no_grad():
            return torch.export.export(graph, args)

    def _learned(self) -> Learner:
        """A learner with these settings; made when it is first asked for, and not kept in copies."""
        if self._learner is None:
            self._learner = Learner(self.module, **self._settings)
        return self._learner

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be found again."""
        return {**self.__dict__, "_learner": None}


_EXPORT = (
    "A free phase is found by recording the network and differentiating an energy, which torch.export,"
    " torch.onnx.export and torch.jit.trace cannot follow. Export the evaluation as it runs instead:"
    " program = equilibrium.exported(*inputs); then torch.export.save(program, 'model.pt2'), or"
    " torch.onnx.export(program, f='model.onnx')."
)


def ordinary(batch: Any) -> Any:
    """The batch with tensors that autograd may save, which those made in inference mode are not."""
    return tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, batch)
