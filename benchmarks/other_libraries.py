"""The same update by other libraries, in one run."""

import by_hand
from contenders import euler
from networks import NETS
from page import Lines, Settings, line, table
from peers import peers
from timing import Contest, medians, threads

import lightning_ebm as ebm

HEAD = """## Other libraries

The same update everywhere: lambda = 1, 20 Euler steps of 0.1 on the states of all hidden layers from the forward
pass, cross-entropy, Adam in one kernel. Each library compiled by its own means, in a process of its own that takes
its turn; its ratio is to its own backprop. By hand in torch is autograd of the energy at every step; by hand in JAX
is one jitted function a step, unrolled and as a loop. "apart" is |its update - this library's| / |its| from the
same weights and batch, before anything is timed; the libraries draw weights of their own. At 1 thread CPU time, at
2 threads wall time."""


def other_libraries(given: Settings) -> Lines:
    """The same update by others."""
    yield HEAD
    yield table("network", "threads", "by", "ms a step", "backprop, ms", "ratio", "apart")
    absent: list[str] = []
    versions: dict[str, str] = {}
    for title in list(NETS)[:2]:
        net = NETS[title]
        name, hand = f"PC, {net.steps} Euler steps", by_hand.euler(net.steps, net.lr)
        ours = {"this library": name, "this library, compile=True": f"{name}, compile=True", "torch by hand": "by hand"}
        for count in (1, 2):
            with threads(count):
                contest = Contest(net, fused=True)
                apart = {"torch by hand": contest.distance(euler(net.steps, net.lr), hand)}
                contest.add(name, euler(net.steps, net.lr))
                if given.compile:
                    contest.add(f"{name}, compile=True", euler(net.steps, net.lr), compile=True)
                contest.add_by_hand("by hand", hand)
                with peers(net, given.pythons, count) as (others, absent):
                    contenders = dict(contest.steps)
                    for peer_name, peer in others.items():
                        versions[peer_name] = peer.versions
                        contenders |= {f"{peer_name}: {step}": take for step, take in peer.steps.items()}
                        update = peer.update(contest.module, contest.x, contest.y)
                        if update is not None:
                            expected = contest.update(euler(net.steps, net.lr))
                            apart[peer_name] = ebm.metrics.alignment(expected, update)["relative_error"]
                    found = medians(contenders, given.repeats)
            rows = [(shown, found[key], found["backprop"]) for shown, key in ours.items() if key in found]
            for peer_name, peer in others.items():
                own = found[f"{peer_name}: backprop"]
                shown = "JAX by hand" if peer_name == "jax" else peer_name
                for step in peer.steps:
                    if step != "backprop":
                        rows.append((shown + step.removeprefix(name), found[f"{peer_name}: {step}"], own))
            apart["JAX by hand"] = apart.pop("jax", float("nan"))
            for shown, value, own in rows:
                distance = apart.get(shown, float("nan"))
                yield line(
                    title, count, shown, value, own, value / own, "" if distance != distance else f"{distance:.0e}"
                )
    if versions:
        yield f"\nVersions: {'; '.join(versions.values())}."
    if absent:
        yield f"\nNot installed here, and so not measured: {', '.join(absent)}."
