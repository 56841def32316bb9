"""PCX on the same network, in the way its tutorials train: predictive coding, and backprop without states."""

import itertools
from importlib.metadata import version
from typing import Any

import jax
import optax
import pcx.functional as pxf
import pcx.nn as pxnn
import pcx.predictive_coding as pxc
import pcx.utils as pxu
from peer import asked, serve

STATES = pxc.VodeParam | pxc.VodeParam.Cache
FREE = pxu.M_hasnot(pxc.VodeParam, frozen=True)
WEIGHTS = pxu.M(pxnn.LayerParam)


class Net(pxc.EnergyModule):  # type: ignore[misc]  # of a library without types
    """A chain of linear and tanh layers, with or without a state behind each."""

    def __init__(self, widths: tuple[int, ...], with_states: bool) -> None:
        super().__init__()
        self.layers = [pxnn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        self.states = [pxc.Vode() for _ in widths[2:]] + [pxc.Vode(pxc.ce_energy)] if with_states else []
        if with_states:
            self.states[-1].h.frozen = True

    def __call__(self, x: Any, y: Any = None) -> Any:
        """Logits; sets the target where there is one."""
        for i, layer in enumerate(self.layers):
            x = layer(x) if layer is self.layers[-1] else jax.nn.tanh(layer(x))
            x = self.states[i](x) if self.states else x
        if not self.states:
            return x
        if y is not None:
            self.states[-1].set("h", y)
        return self.states[-1].get("u")


@pxf.vmap(pxu.M(STATES).to((None, 0)), in_axes=(0, 0), out_axes=0)
def forward(x: Any, y: Any, *, model: Net) -> Any:
    """The free pass, which sets every state to its prediction."""
    return model(x, y)


@pxf.vmap(pxu.M(STATES).to((None, 0)), in_axes=(0,), out_axes=(None, 0), axis_name="batch")
def energy(x: Any, *, model: Net) -> Any:
    """Of the batch."""
    output = model(x)
    return jax.lax.psum(model.energy(), "batch"), output


@pxf.vmap({"model": None}, in_axes=(0, 0), out_axes=(None, 0), axis_name="batch")
def loss(x: Any, y: Any, *, model: Net) -> Any:
    """The mean cross-entropy."""
    output = model(x)
    return jax.lax.pmean(-(y * jax.nn.log_softmax(output)).sum(), "batch"), output


@pxf.jit(static_argnums=0)
def predictive_coding(count: int, x: Any, y: Any, *, model: Net, weights: pxu.Optim, states: pxu.Optim) -> None:
    """One training step."""
    model.train()
    with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
        forward(x, y, model=model)
    states.init(FREE(model))
    for _ in range(count):
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, slopes = pxf.value_and_grad(FREE.to([False, True]), has_aux=True)(energy)(x, model=model)
        states.step(model, slopes["model"])
    states.clear()
    with pxu.step(model, clear_params=pxc.VodeParam.Cache):
        _, gradients = pxf.value_and_grad(WEIGHTS.to([False, True]), has_aux=True)(energy)(x, model=model)
    weights.step(model, gradients["model"], scale_by=1 / len(x))


@pxf.jit()
def backprop(x: Any, y: Any, *, model: Net, weights: pxu.Optim) -> None:
    """One training step."""
    model.train()
    _, gradients = pxf.value_and_grad(WEIGHTS.to([False, True]), has_aux=True)(loss)(x, y, model=model)
    weights.step(model, gradients["model"])


def main() -> None:
    """Serves both, with Adam."""
    widths, batch, count = asked()
    key = jax.random.PRNGKey(0)
    x = jax.random.normal(key, (batch, widths[0]))
    y = jax.nn.one_hot(jax.random.randint(key, (batch,), 0, widths[-1]), widths[-1])
    relaxed, stock = Net(widths, True), Net(widths, False)
    with pxu.step(relaxed, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
        forward(x, y, model=relaxed)
    optimizers = {id(net): pxu.Optim(lambda: optax.adam(1e-4), WEIGHTS(net)) for net in (relaxed, stock)}
    states = pxu.Optim(lambda: optax.sgd(0.1))

    def relax() -> None:
        predictive_coding(count, x, y, model=relaxed, weights=optimizers[id(relaxed)], states=states)
        jax.block_until_ready(jax.tree_util.tree_leaves(relaxed))

    def differentiate() -> None:
        backprop(x, y, model=stock, weights=optimizers[id(stock)])
        jax.block_until_ready(jax.tree_util.tree_leaves(stock))

    steps = {"backprop": differentiate, f"PC, {count} Euler steps": relax}
    serve(f"pcx {version('pcx')}, jax {jax.__version__}", steps)


if __name__ == "__main__":
    main()
