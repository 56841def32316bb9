"""FabricPC on the same network: its own trainer's step, for predictive coding and for backprop."""

import itertools
from importlib.metadata import version
from typing import Any

import jax
import optax
from fabricpc.core.activations import IdentityActivation, SoftmaxActivation, TanhActivation
from fabricpc.core.energy import CrossEntropyEnergy
from fabricpc.core.inference import InferenceSGD
from fabricpc.core.topology import Edge
from fabricpc.graph_assembly import TaskMap, graph
from fabricpc.graph_initialization import initialize_params
from fabricpc.graph_initialization.state_initializer import FeedforwardStateInit
from fabricpc.nodes import Linear
from fabricpc.training.trainer import make_train_step
from peer import asked, serve


def main() -> None:
    """Serves both, with Adam."""
    widths, batch, count = asked()
    nodes = [Linear(shape=(widths[0],), name="input", activation=IdentityActivation())]
    nodes += [Linear(shape=(w,), name=f"hidden{i}", activation=TanhActivation()) for i, w in enumerate(widths[1:-1])]
    output = Linear(shape=(widths[-1],), name="out", activation=SoftmaxActivation(), energy=CrossEntropyEnergy())
    nodes.append(output)
    edges = [Edge(source=a, target=b.slot("in")) for a, b in itertools.pairwise(nodes)]
    structure = graph(
        nodes=nodes,
        edges=edges,
        task_map=TaskMap(x=nodes[0], y=output),
        inference=InferenceSGD(eta_infer=0.1, infer_steps=count),
        graph_state_initializer=FeedforwardStateInit(),
    )
    key = jax.random.PRNGKey(0)
    x = jax.random.normal(key, (batch, widths[0]))
    y = jax.nn.one_hot(jax.random.randint(key, (batch,), 0, widths[-1]), widths[-1])
    optimizer = optax.adam(1e-4)

    def stepping(algorithm: str) -> Any:
        params = initialize_params(structure, key)
        train_step = make_train_step(structure, optimizer, algorithm=algorithm)
        held: list[Any] = [params, optimizer.init(params)]

        def step() -> None:
            held[:] = jax.block_until_ready(train_step(*held, {"x": x, "y": y}, key))[:2]

        return step

    steps = {"backprop": stepping("backprop"), f"PC, {count} Euler steps": stepping("pc")}
    serve(f"fabricpc {version('fabricpc')}, jax {jax.__version__}", steps)


if __name__ == "__main__":
    main()
