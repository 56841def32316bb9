"""Predictive coding by hand in JAX, one jitted function a step: what any library on top of JAX can at best be."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from peer import asked, serve

Parameters = list[tuple[Any, Any]]


def main() -> None:
    """Serves backprop and predictive coding, both with Adam."""
    widths, batch, count = asked()
    keys = jax.random.split(jax.random.PRNGKey(0), len(widths) + 1)
    pairs = list(itertools.pairwise(widths))
    params: Parameters = [
        (jax.random.uniform(k, (a, b), minval=-1, maxval=1) / a**0.5, jnp.zeros(b))
        for k, (a, b) in zip(keys, pairs, strict=False)
    ]
    x = jax.random.normal(keys[-1], (batch, widths[0]))
    y = jax.random.randint(keys[-2], (batch,), 0, widths[-1])
    optimizer = optax.adam(1e-4)

    def predictions(params: Parameters, states: list[Any]) -> list[Any]:
        drives = [below @ w + b for (w, b), below in zip(params, [x, *states], strict=True)]
        return [*map(jnp.tanh, drives[:-1]), drives[-1]]

    def loss(output: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(output, y).sum()

    def forward(params: Parameters) -> list[Any]:
        states, below = [], x
        for w, b in params[:-1]:
            below = jnp.tanh(below @ w + b)
            states.append(below)
        return states

    def energy(params: Parameters, states: list[Any]) -> Any:
        *hidden, output = predictions(params, states)
        return sum(0.5 * jnp.square(s - m).sum() for s, m in zip(states, hidden, strict=True)) + loss(output)

    def total(params: Parameters) -> Any:
        return loss(predictions(params, forward(params))[-1]) / batch

    def updated(params: Parameters, moments: Any, gradients: Any) -> tuple[Any, Any]:
        changes, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, changes), moments

    @jax.jit
    def backprop(params: Parameters, moments: Any) -> tuple[Any, Any]:
        return updated(params, moments, jax.grad(total)(params))

    @jax.jit
    def predictive_coding(params: Parameters, moments: Any) -> tuple[Any, Any]:
        def move(states: list[Any], _: None) -> tuple[list[Any], None]:
            slopes = jax.grad(energy, 1)(params, states)
            return [s - 0.1 * g for s, g in zip(states, slopes, strict=True)], None

        states, _ = jax.lax.scan(move, forward(params), None, length=count)
        gradients = jax.tree_util.tree_map(lambda g: g / batch, jax.grad(energy)(params, states))
        return updated(params, moments, gradients)

    def stepping(function: Any) -> Any:
        held = [params, optimizer.init(params)]

        def step() -> None:
            held[:] = jax.block_until_ready(function(*held))

        return step

    steps = {"backprop": stepping(backprop), f"PC, {count} Euler steps": stepping(predictive_coding)}
    serve(f"jax {jax.__version__}", steps)


if __name__ == "__main__":
    main()
