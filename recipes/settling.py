"""The README's picture: the states of a network settle under a nudge, and the learning signal arrives layer by layer.

    python recipes/settling.py --out docs/images/settling.svg

A real relaxation, one sample, predictive coding by Euler steps of the states. A unit's color is the update of its bias
where the relaxation stands: what that unit would learn by now. The last frame is the equilibrium.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import lightning_ebm as ebm

WIDTHS = (6, 6, 6, 6, 6, 6, 3)
WIDTH, HEIGHT, TOP, UNIT = 960, 416, 116, 34
SECONDS = 9.0
TITLE = "In place of a backward pass, the states of the layers settle on an energy,"
SUBTITLE = "and each layer reads its own update off what remains beside it."
INK, SOFT, BLUE, ORANGE, PALE = "#1f2937", "#64748b", (37, 99, 235), (234, 88, 12), (226, 232, 240)


@dataclass(frozen=True)
class Course:
    """A relaxation: per step the signals of each layer, ``(units,)``, and the energy."""

    signals: list[list[Tensor]]
    energies: list[float]


def course(steps: int, lr: float = 0.25) -> Course:
    """Updates of the biases where relaxations of 0, 1, 2, ... steps stop, and the energy on the way."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(WIDTHS):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    net = nn.Sequential(*layers[:-1]).double()
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, gain=1.1)
    x, y = torch.randn(1, WIDTHS[0]).double(), torch.randn(1, WIDTHS[-1]).double()
    biases = [name for name, _ in net.named_parameters() if name.endswith("bias")]
    found, energies = [[torch.zeros(width) for width in WIDTHS[1:]]], []
    for count in range(1, steps + 1):
        relaxer = ebm.GradientDescent(lr=lr, max_steps=count)
        learner = ebm.Learner(net, ebm.algorithm("predictive-coding", relaxer=relaxer))
        updates = learner.gradients(lambda: 0.5 * (net(x) - y).square().sum(1).mean())
        found.append([updates[name] for name in biases])
        energies = learner.report["phases"][0]["energies"]
    return Course(found, energies)


def mixed(value: float) -> str:
    """Pale at 0, blue at -1, orange at 1."""
    full = ORANGE if value > 0 else BLUE
    part = min(1.0, abs(value)) ** 0.7
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(PALE, full, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def animate(attribute: str, values: Sequence[str]) -> str:
    """Through the steps, then a rest at the last."""
    steps = len(values)
    times = [0.8 * k / (steps - 1) for k in range(steps)] + [1.0]
    shown = [*values, values[-1]]
    return (
        f'<animate attributeName="{attribute}" dur="{SECONDS:g}s" repeatCount="indefinite"'
        f' keyTimes="{";".join(f"{time:.3g}" for time in times)}" values="{";".join(shown)}"/>'
    )


def places(layer: int) -> list[tuple[float, float]]:
    """Where the units of a layer are drawn; layer 0 is the input."""
    count = WIDTHS[layer]
    x = 70 + layer * 112
    middle = TOP + UNIT * (max(WIDTHS) - 1) / 2
    return [(x, middle + UNIT * (unit - (count - 1) / 2)) for unit in range(count)]


def units(shown: Course) -> list[str]:
    """Every unit, and the lines between them."""
    lines = []
    for layer in range(len(WIDTHS) - 1):
        for x, y in places(layer):
            lines += [f'<path d="M{x} {y}L{u} {v}"/>' for u, v in places(layer + 1)]
    parts = [f'<g stroke="#94a3b8" stroke-opacity=".28" stroke-width="1">{"".join(lines)}</g>']
    parts += [
        f'<circle cx="{x}" cy="{y}" r="11" fill="#fff" stroke="{SOFT}" stroke-width="1.5"/>' for x, y in places(0)
    ]
    for layer in range(1, len(WIDTHS)):
        whole = max(float(step[layer - 1].abs().max()) for step in shown.signals)
        for unit, (x, y) in enumerate(places(layer)):
            colors = [mixed(float(step[layer - 1][unit]) / whole) for step in shown.signals]
            inside = animate("fill", colors)
            parts.append(f'<circle cx="{x}" cy="{y}" r="11" fill="{colors[-1]}" stroke="{SOFT}">{inside}</circle>')
    return parts


def bars(shown: Course) -> list[str]:
    """Under each layer, how much of its signal has arrived."""
    base, tall = TOP + UNIT * max(WIDTHS) + 56, 46
    words = 'signal<tspan x="70" dy="16">arrived</tspan>'
    parts = [f'<text x="70" y="{base - 14}" fill="{SOFT}" text-anchor="middle">{words}</text>']
    for layer in range(1, len(WIDTHS)):
        x = places(layer)[0][0]
        ends = [float(step[layer - 1].norm()) for step in shown.signals]
        heights = [tall * min(1.25, end / ends[-1]) for end in ends]
        moves = animate("height", [f"{h:.1f}" for h in heights]) + animate("y", [f"{base - h:.1f}" for h in heights])
        parts.append(
            f'<rect x="{x - 16}" y="{base - tall}" width="32" height="{tall}" fill="#2563eb" rx="3">{moves}</rect>'
        )
        parts.append(f'<path d="M{x - 22} {base}h44" stroke="{SOFT}"/>')
    return parts


def energy(shown: Course) -> list[str]:
    """The curve on the right, with a dot that runs down it."""
    left, right, top, bottom = 806, 930, TOP + 24, TOP + UNIT * max(WIDTHS) + 56
    values = shown.energies
    high, low = max(values), min(values)
    points = [
        (left + (right - left) * k / (len(values) - 1), bottom - 8 - (bottom - top - 40) * (value - low) / (high - low))
        for k, value in enumerate(values)
    ]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dot = animate("cx", [f"{x:.1f}" for x, _ in points]) + animate("cy", [f"{y:.1f}" for _, y in points])
    return [
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="{SOFT}"/>',
        f'<path d="{path}" fill="none" stroke="#ea580c" stroke-width="2.5"/>',
        f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="6" fill="#ea580c">{dot}</circle>',
        f'<text x="{(left + right) / 2}" y="{top - 8}" fill="{SOFT}" text-anchor="middle">energy</text>',
        f'<text x="{(left + right) / 2}" y="{bottom + 20}" fill="{SOFT}" text-anchor="middle">relaxation steps</text>',
    ]


def picture(shown: Course) -> str:
    """The whole file."""
    last = places(len(WIDTHS) - 1)[0][0]
    labels = [
        f'<text x="{places(0)[0][0]}" y="{TOP - 22}" text-anchor="middle" fill="{SOFT}">input</text>',
        f'<text x="{last}" y="{TOP + 24}" text-anchor="middle" fill="#ea580c" font-weight="600">the loss pulls</text>',
        f'<text x="32" y="38" font-size="20" font-weight="600" fill="{INK}">{TITLE}</text>',
        f'<text x="32" y="62" font-size="15" fill="{SOFT}">{SUBTITLE}</text>',
    ]
    parts = [*labels, *units(shown), *bars(shown), *energy(shown)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="14" role="img"'
        ' aria-label="Color spreads from the loss through the layers of a network while an energy falls">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Relaxes, draws, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/settling.svg"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    options.out.write_text(picture(course(options.steps)), encoding="utf-8")


if __name__ == "__main__":
    main()
