"""Where on the way from backprop to equilibrium do published settings of predictive coding train?

    python recipes/regimes.py --data-dir FOLDER_WITH_MNIST_NPZ --output docs

Trains each setting of `published_settings.py` for some hundred updates, measures its regime on the next batch, and
writes regimes.md and a picture. Ten minutes on one CPU core with MNIST; without `--data-dir`, scikit-learn's digits.
"""

import argparse
import logging
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_settings import SETTINGS, Setting
from torch import Tensor

import lightning_ebm as ebm
from lightning_ebm import regime
from lightning_ebm.reports import plots

Data = tuple[Tensor, Tensor]


def digits() -> Data:
    """The 8 x 8 digits that come with scikit-learn, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images / 16).float(), torch.as_tensor(labels).long()


def mnist(folder: Path) -> Data:
    """The training images of mnist.npz (Keras' file; keys x_train and y_train), pixels in [0, 1]."""
    path = folder / "mnist.npz"
    if not path.exists():
        raise SystemExit(
            f"--data-dir {folder}: there is no mnist.npz in it. It is the file of keras.datasets.mnist, with the arrays"
            " x_train (60000, 28, 28) and y_train; leave --data-dir out for scikit-learn's digits."
        )
    with np.load(path) as arrays:
        images, labels = arrays["x_train"], arrays["y_train"]
    return torch.as_tensor(images).flatten(1).float() / 255, torch.as_tensor(labels).long()


def measure(setting: Setting, data: Data, updates: int, seed: int) -> dict[str, Any]:
    """Trains, measures; plain numbers."""
    torch.manual_seed(seed)
    images, labels = data
    shift, scale = setting.normalize
    images = (images - shift) / scale
    network = setting.network(images.shape[1])
    size = min(setting.batch_size, len(images) // 2)
    batches: list[Any] = []
    while len(batches) <= updates:
        new = torch.randperm(len(images)).split(size)
        batches += new[: len(images) // size]
    learner = ebm.Learner(network, setting.algorithm, layers=setting.layers, loss_reduction="sum")
    optimizer = setting.optimizer(network.parameters())
    start, diverged = time.process_time(), ""
    for step in range(updates):
        x, y = images[batches[step]], labels[batches[step]]
        optimizer.zero_grad()
        try:
            learner.backward(lambda x=x, y=y: setting.loss(network(x), y))  # type: ignore[misc]
        except ebm.RelaxationDivergedError as error:
            diverged = f"diverged at update {step}: {error}"
            break
        optimizer.step()
    x, y = images[batches[updates]], labels[batches[updates]]
    with torch.no_grad():
        accuracy = float((network(images[:5000]).argmax(1) == labels[:5000]).float().mean())
    found: dict[str, Any] = {"name": setting.name, "accuracy": accuracy, "seconds": time.process_time() - start}
    if diverged:
        return found | {"diverged": diverged}
    measured = regime.of(
        network, lambda: setting.loss(network(x), y), setting.algorithm, layers=setting.layers, loss_reduction="sum"
    )
    return found | {"regime": measured.as_dict(), "text": str(measured)}


PAGE = """# Where between backprop and equilibrium does the field train?

Predictive coding relaxes the states of a network, then reads its update off them. Stop early, and the update points
where backprop's does, only shorter the further down a layer lies; go on to equilibrium, and it points elsewhere, as the
activities it is computed from have moved. Published settings differ by what they call the same algorithm.

![Settings on the way from backprop to equilibrium](regimes.png)

A dot is a layer, the bar the mean: 0 where the update has backprop's direction, 1 where it has that of the equilibrium
the relaxation was on its way to. *Relaxed* is the part of the energy's whole fall that was made.

{summary}

Measured by `python recipes/regimes.py{data}: each setting of `recipes/published_settings.py` trained for {updates}
updates, the regime on the next batch; {seeds}; float32; states sit where the authors put them. Everything was run on
the same images, so a setting that was tuned for others is here what its numbers do on these. "From memory" marks what
we could not read in the authors' code.

| setting | network, B | relaxed | cosine at stop, by layer | cosine at equilibrium | norm ratio at stop | regime |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Layers from the input up, the read-out last; cosine and norm ratio are to backprop's gradient of the layer, weights and
biases together. Training accuracy after {updates} updates, and where the numbers come from:

{sources}

Measure yours with `ebm.regime.of(module, closure, algorithm)`, or while training with `ebm.RelaxationMonitor()`.
"""


def averaged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every number over seeds; words from the mean."""
    regimes = [run["regime"] for run in runs]
    first = regimes[0]
    layers = []
    for k, layer in enumerate(first["layers"]):
        mean = {key: mean_of([r["layers"][k][key] for r in regimes]) for key in layer if key in NUMBERS}
        silent = sum(r["layers"][k]["reach"] in ("none", "rounding") for r in regimes) > len(regimes) / 2
        layers.append(layer | mean | {"reach": "none" if silent else "signal"})
    way = mean_of([r["way"] for r in regimes])
    unreached = [layer["name"] for layer in layers if layer["reach"] == "none"]
    verdicts = [r["verdict"] for r in regimes]
    verdict = max(verdicts, key=verdicts.count)
    relaxed = mean_of([r["relaxed"] for r in regimes])
    return {"layers": layers, "way": way, "unreached": unreached, "verdict": verdict, "relaxed": relaxed}


WHERE = {
    regime.BACKPROP: "train in backprop's direction",
    regime.EQUILIBRIUM: "at equilibrium",
    regime.BETWEEN: "in between",
    regime.SAME: "where the two coincide",
    regime.NEITHER: "in a direction of its own",
}
NUMBERS = ("cosine_stop", "cosine_equilibrium", "norm_ratio_stop", "norm_ratio_equilibrium", "error_ratio", "way")


def mean_of(values: list[float | None]) -> float | None:
    """None where most are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) > len(values) / 2 else None


def series(layers: list[dict[str, Any]], key: str, digits: str) -> str:
    """One figure a layer; long ones abridged."""
    found = [format(layer[key], digits) for layer in layers]
    return " ".join(found if len(found) < 8 else [*found[:2], "...", *found[-4:]])


def shape(setting: Setting, inputs: int) -> str:
    """Parameters of the network in words."""
    network = setting.network(inputs)
    widths = [m.out_features for m in network.modules() if isinstance(m, torch.nn.Linear)]
    text = f"{inputs}-" + "-".join(map(str, widths)) if len(widths) < 8 else f"{len(widths)} layers of {widths[0]}"
    return f"{text}, {setting.batch_size}"


def main() -> None:
    """Measures, draws, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz; without it, scikit-learn's digits")
    parser.add_argument("--output", type=Path, default=Path("regimes"), help="folder for regimes.md and regimes.png")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="settings whose name contains one of these")
    options = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are slower on several
    logging.getLogger("lightning_ebm").setLevel(logging.ERROR)
    data = mnist(options.data_dir) if options.data_dir else digits()
    inputs = data[0].shape[1]
    chosen = [s for s in SETTINGS if not options.only or any(part in s.name for part in options.only)]
    rows, sources, drawn = [], [], []
    for setting in chosen:
        try:
            runs = [measure(setting, data, options.updates, seed) for seed in range(options.seeds)]
        except RuntimeError as error:
            if not isinstance(error, ebm.EBMError):
                raise
            runs = [{"diverged": str(error)}]
        failed = [run["diverged"] for run in runs if "diverged" in run]
        name = setting.name + ("" if setting.checked else " (from memory)")
        if failed:
            rows.append(f"| {name} | {shape(setting, inputs)} | | | | | {failed[0].partition(':')[0]} |")
            print(name, failed[0], flush=True)
            continue
        found = averaged(runs)
        layers = found["layers"]
        cells = [
            name,
            shape(setting, inputs),
            f"{found['relaxed']:.3f}",
            series(layers, "cosine_stop", ".4f"),
            series(layers, "cosine_equilibrium", ".3f"),
            series(layers, "norm_ratio_stop", ".2g"),
            found["verdict"] + (f"; {len(found['unreached'])} layers without signal" if found["unreached"] else ""),
        ]
        rows.append(f"| {' | '.join(cells)} |")
        accuracy = sum(run["accuracy"] for run in runs) / len(runs)
        note = f"; {setting.note}" if setting.note else ""
        sources.append(f"- {name}: {accuracy:.1%}. {setting.source}{note}.")
        drawn.append((setting.name, found))
        print(rows[-1], flush=True)
    counts: dict[str, int] = {}
    for _, found in drawn:
        counts[found["verdict"]] = counts.get(found["verdict"], 0) + 1
    parts = [f"{count} {WHERE[verdict]}" for verdict, count in sorted(counts.items(), key=lambda pair: -pair[1])]
    summary = textwrap.fill(f"Of {len(drawn)} settings, {', '.join(parts)}.", 120)
    options.output.mkdir(parents=True, exist_ok=True)
    page = PAGE.format(
        data=" --data-dir FOLDER` on MNIST, FOLDER/mnist.npz" if options.data_dir else "` on scikit-learn's digits",
        updates=options.updates,
        seeds="one seed" if options.seeds == 1 else f"means over {options.seeds} seeds",
        rows="\n".join(rows), sources="\n".join(sources), summary=summary,
    )  # fmt: skip
    (options.output / "regimes.md").write_text(page)
    plots.regimes_map(drawn).savefig(options.output / "regimes.png", dpi=150)
    print(options.output / "regimes.md")


if __name__ == "__main__":
    main()
