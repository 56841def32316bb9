"""How cost grows with depth, width, batch and the number of relaxation steps."""

from contenders import euler
from networks import Net, chain
from page import Lines, Settings, line, table
from timing import Contest


def scaling(given: Settings) -> Lines:
    """Depth, width, batch, number of steps."""
    yield (
        "## Depth, width, batch, steps\n\nIn backprop steps of the same network, and, of the exact rule, the"
        " milliseconds that a step costs beside backprop's; tanh MLPs on 784 inputs, CPU time at 1 thread."
    )
    yield table(
        "varied", "to", "backprop, ms", "zero-divergence", "beside backprop, ms", "predictive-coding", "PC, Euler steps"
    )
    varied: dict[str, dict[int, Net]] = {
        "depth (128 wide, batch 64)": {d: chain(64, 784, *[128] * d, 10) for d in (2, 5, 10, 20, 40)},
        "width (3 layers, batch 64)": {w: chain(64, 784, w, w, w, 10) for w in (32, 64, 256, 512, 1024)},
        "batch (3 layers of 256)": {b: chain(b, 784, 256, 256, 256, 10) for b in (1, 16, 64, 256, 1024)},
        "Euler steps (3 layers of 256, batch 64)": {
            t: chain(64, 784, 256, 256, 256, 10, steps=t) for t in (1, 5, 20, 80)
        },
    }
    for title, nets in varied.items():
        for value, net in nets.items():
            contest = Contest(net)
            contest.add("exact", "zero-divergence")
            contest.add("equilibrium", "predictive-coding")
            contest.add("euler", euler(net.steps, net.lr))
            found = contest.medians(given.repeats)
            stock = found["backprop"]
            ratios = {name: found[name] / stock for name in ("exact", "equilibrium", "euler")}
            beside = found["exact"] - stock
            yield line(title, value, stock, ratios["exact"], beside, ratios["equilibrium"], ratios["euler"])
