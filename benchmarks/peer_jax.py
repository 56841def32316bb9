"""Predictive coding by hand in JAX, one jitted function a step: what any library on top of JAX can at best be.

Its relaxation steps are written out one after the other, so that XLA sees them all, or are a loop.
"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    noise = jax.random.normal(keys[-1], (batch, widths[0]))
    labels = jax.random.randint(keys[-2], (batch,), 0, widths[-1])
    optimizer = optax.adam(1e-4)

    def predictions(params: Parameters, x: Any, states: list[Any]) -> list[Any]:
        drives = [below @ w + b for (w, b), below in zip(params, [x, *states], strict=True)]
        return [*map(jnp.tanh, drives[:-1]), drives[-1]]

    def loss(output: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(output, y).sum()

    def forward(params: Parameters, x: Any) -> list[Any]:
        states, below = [], x
        for w, b in params[:-1]:
            below = jnp.tanh(below @ w + b)
            states.append(below)
        return states

    def energy(params: Parameters, states: list[Any], x: Any, y: Any) -> Any:
        *hidden, output = predictions(params, x, states)
        return sum(0.5 * jnp.square(s - m).sum() for s, m in zip(states, hidden, strict=True)) + loss(output, y)

    def total(params: Parameters, x: Any, y: Any) -> Any:
        return loss(predictions(params, x, forward(params, x))[-1], y) / batch

    def updated(params: Parameters, moments: Any, gradients: Any) -> tuple[Any, Any]:
        changes, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, changes), moments

    def relaxed(params: Parameters, x: Any, y: Any, unroll: int) -> Any:
        def move(states: list[Any], _: None) -> tuple[list[Any], None]:
            slopes = jax.grad(energy, 1)(params, states, x, y)
            return [s - 0.1 * g for s, g in zip(states, slopes, strict=True)], None

        states, _ = jax.lax.scan(move, forward(params, x), None, length=count, unroll=unroll)
        return jax.tree_util.tree_map(lambda g: g / batch, jax.grad(energy)(params, states, x, y))

    def stepping(gradients: Any) -> Any:
        held = [params, optimizer.init(params)]

        @jax.jit
        def train(params: Parameters, moments: Any, x: Any, y: Any) -> tuple[Any, Any]:
            return updated(params, moments, gradients(params, x, y))

        def step() -> None:
            held[:] = jax.block_until_ready(train(*held, noise, labels))

        return step

    def update(given: str, found: str) -> None:
        with np.load(given) as arrays:
            flat = [jnp.asarray(arrays[f"arr_{k}"]) for k in range(2 * len(pairs))]
            theirs = [(w.T, b) for w, b in zip(flat[::2], flat[1::2], strict=True)]
            gradients = relaxed(theirs, jnp.asarray(arrays["x"]), jnp.asarray(arrays["y"]), count)
        np.savez(found, *(np.asarray(part) for w, b in gradients for part in (w.T, b)))

    name = f"PC, {count} Euler steps"
    steps = {
        "backprop": stepping(jax.grad(total)),
        name: stepping(partial(relaxed, unroll=count)),
        f"{name}, as a loop": stepping(partial(relaxed, unroll=1)),
    }
    serve(f"jax {jax.__version__}", steps, update)


if __name__ == "__main__":
    main()
