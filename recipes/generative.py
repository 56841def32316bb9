"""A generative net on MNIST: images filled in, recalled and classified by relaxing states.

    python recipes/generative.py --data_dir data/mnist
    python recipes/generative.py --data_dir data/mnist --part recall

10-256-256-784 from a latent state to pixels, tanh, tanh, sigmoid. Everything is predictive coding,
E = 1/2 |z - z_0|^2 + sum_l Pi/2 |x_l - mu_l|^2 + lambda/2 |image - mu|^2, where z, the state at the input, is inferred
or held at a label.

* fill: no labels; the latent of each image is inferred, then weights move. Afterwards the lower half is inferred from
  the upper. A second stage goes on with states that saw the upper half alone and weights that see the whole image.
* recall: 64 images are stored by the same rule, and recalled from their upper half, and from noise upon them.
* labels: the latent is held at the label in training; of a test image it is the one that costs the least energy.

Trained weights stay in --out, and a part whose weights are there is not trained again.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from torch import Tensor, nn

import lightning_ebm as ebm
from lightning_ebm.recipes.data import MNIST

mpl.use("Agg")
HIDDEN = ["2", "4"]
UPPER = torch.arange(784) < 392


class Images:
    """Pixels in [0, 1] and labels, training and test."""

    def __init__(self, data_dir: Path) -> None:
        data = MNIST(data_dir)
        data.setup("fit")
        self.train, self.test = (data.parts[name].x.flatten(1).float() / 255 for name in ("train", "test"))
        self.labels, self.test_labels = data.parts["train"].y, data.parts["test"].y

    def batches(self, count: int, size: int = 100) -> Iterator[Tensor]:
        """Indices of training images, `count` times, in a new order every epoch."""
        while count > 0:
            yield from torch.split(torch.randperm(len(self.train)), size)[:count]
            count -= len(self.train) // size


class Generator:
    """The net and what is asked of it.

    Args:
        precision: of the hidden layers.
        strength: lambda, the precision of pixels.
        free_latent: whether the state at the input moves.
        steps: of a training relaxation.
    """

    def __init__(self, precision: float, strength: float, free_latent: bool, steps: int = 10) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Identity(),
            nn.Linear(10, 256),
            nn.Tanh(),
            nn.Linear(256, 256),
            nn.Tanh(),
            nn.Linear(256, 784),
            nn.Sigmoid(),
        )
        precisions = dict.fromkeys(HIDDEN, precision)
        layers = (["0"] if free_latent else []) + HIDDEN
        self.strength, self.layers = strength, layers
        relaxer = ebm.QuasiNewton(steps, 8, tol=1e-3)
        algorithm = ebm.Algorithm(ebm.PredictiveCoding(precisions), ebm.OneSided(strength), relaxer)
        self.learner = ebm.Learner(self.net, algorithm, layers=layers, output="readout")
        whole = ebm.Algorithm(ebm.PredictiveCoding({**precisions, "6": strength}), relaxer=ebm.QuasiNewton(1))
        self.whole = ebm.Learner(self.net, whole, layers=layers)

    def loss(self, latent: Tensor, image: Tensor, seen: Tensor | None = None) -> Tensor:
        """1/2 |image - mu|^2 over the pixels that are seen, averaged over images."""
        error = self.net(latent) - image
        loss: Tensor = 0.5 * (error if seen is None else error[:, seen]).square().sum(1).mean()
        return loss

    def inferred(
        self, latent: Tensor, image: Tensor, seen: Tensor | None = None, steps: int = 100, strength: float | None = None
    ) -> ebm.Relaxed:
        """The states that explain the pixels that are seen, which are as precise as in training or as said."""
        relaxer = ebm.QuasiNewton(steps, 8, tol=1e-3)
        return self.learner.relax(
            lambda: self.loss(latent, image, seen), nudge=strength or self.strength, relaxer=relaxer
        )

    @torch.no_grad()
    def pixels(self, found: ebm.Relaxed) -> Tensor:
        """What the states predict."""
        last = self.net[5]
        image: Tensor = torch.sigmoid(last(found.states["4"]))
        return image

    def trained(self, weights: Path, train: Any) -> None:
        """Trains, unless the weights are there."""
        if weights.exists():
            self.net.load_state_dict(torch.load(weights))
        else:
            train()
            torch.save(self.net.state_dict(), weights)

    def optimizer(self, updates: int, lr: float) -> tuple[torch.optim.Optimizer, Any]:
        """Adam with one cycle of its learning rate."""
        adam = torch.optim.Adam(self.net.parameters(), lr)
        return adam, torch.optim.lr_scheduler.OneCycleLR(adam, lr, updates)

    def learn(self, batches: Sequence[Tensor] | Iterator[Tensor], updates: int, lr: float, latents: Any) -> None:
        """Unsupervised where the latent is free: states relax under the whole image, weights follow."""
        adam, schedule = self.optimizer(updates, lr)
        for image, latent in map(latents, batches):
            adam.zero_grad()
            self.learner.backward(lambda latent=latent, image=image: self.loss(latent, image))  # type: ignore[misc]
            adam.step()
            schedule.step()

    def learn_to_fill(self, images: Images, updates: int, lr: float) -> None:
        """States relax under the upper half alone; weights then see the whole image with these states held."""
        adam, schedule = self.optimizer(updates, lr)
        for rows in images.batches(updates):
            image, latent = images.train[rows], torch.zeros(len(rows), 10)
            found = self.inferred(latent, image, UPPER, steps=12)
            adam.zero_grad()
            self.whole.backward(
                lambda latent=latent: self.net(latent),  # type: ignore[misc]
                clamp={**found.states, "6": image},
            )
            adam.step()
            schedule.step()


def fill(images: Images, out: Path, updates: int) -> dict[str, float]:
    """Mean squared errors of the lower half, by both stages and by the mean image."""
    count = min(500, len(images.test))
    image, latent = images.test[:count], torch.zeros(count, 10)
    mean = images.train.mean(0)
    result = {"mean image": float((image - mean)[:, ~UPPER].square().mean())}
    rows = {"image": image, "upper half": torch.where(UPPER, image, 0.5)}
    first, second = Generator(100.0, 30.0, True), Generator(20.0, 30.0, True, 12)
    everything = lambda rows: (images.train[rows], torch.zeros(len(rows), 10))  # noqa: E731
    first.trained(out / "fill-1.pt", lambda: first.learn(images.batches(updates), updates, 3e-3, everything))
    second.net.load_state_dict(first.net.state_dict())
    second.trained(out / "fill-2.pt", lambda: second.learn_to_fill(images, updates, 2e-3))
    result["whole image explained"] = float((first.pixels(first.inferred(latent, image)) - image).square().mean())
    for name, generator in (("first stage", first), ("second stage", second)):
        filled = generator.pixels(generator.inferred(latent, image, UPPER))
        result[name] = float((filled - image)[:, ~UPPER].square().mean())
        rows[name] = torch.where(UPPER, image, filled)
    picture(out / "generative_fill.png", {name: row[:14] for name, row in rows.items()})
    return result


def recall(images: Images, out: Path, updates: int) -> dict[str, float]:
    """Shares of 64 stored images that what is recalled is nearest to, and with an error below 0.01 a pixel as well."""
    stored, latent = images.train[:64], torch.zeros(64, 10)
    generator = Generator(300.0, 100.0, True, 25)
    generator.trained(
        out / "recall.pt",
        lambda: generator.learn([torch.arange(64)] * updates, updates, 5e-3, lambda _: (stored, latent)),
    )
    noise = (stored + 0.5 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    result, rows = {}, {"stored": stored}
    # Pixels under noise of standard deviation 0.5 have a precision of 4.
    for name, cue, seen, strength in (("upper half", stored, UPPER, None), ("noise", noise, None, 4.0)):
        found = generator.pixels(generator.inferred(latent, cue, seen, 200, strength))
        nearest = torch.cdist(found, stored).argmin(1) == torch.arange(64)
        error = (found - stored).square().mean(1)
        result[f"nearest is right from {name}"] = float(nearest.float().mean())
        result[f"recalled from {name}"] = float((nearest & (error < 0.01)).float().mean())
        result[f"error from {name}"] = float(error.mean())
        rows |= {f"cue: {name}": torch.where(UPPER, cue, 0.5) if seen is not None else cue, f"from {name}": found}
    picture(out / "generative_recall.png", {name: row[:14] for name, row in rows.items()})
    return result


def labels(images: Images, out: Path, updates: int) -> dict[str, float]:
    """The share of test images whose own label costs the least energy, and what each label looks like."""
    generator, kinds = Generator(10.0, 30.0, False), torch.eye(10)
    labelled = lambda rows: (images.train[rows], kinds[images.labels[rows]])  # noqa: E731
    generator.trained(out / "labels.pt", lambda: generator.learn(images.batches(updates), updates, 2e-3, labelled))
    right, count = 0, min(1000, len(images.test))
    for start in range(0, count, 100):
        image, true = images.test[start : start + 100], images.test_labels[start : start + 100]
        every, given = image.repeat_interleave(10, 0), kinds.repeat(len(image), 1)
        found = generator.inferred(given, every, steps=90)
        pixels = (generator.pixels(found) - every).square().sum(1)
        energy = (found.energy + 0.5 * generator.strength * pixels).reshape(-1, 10)
        right += int((energy.argmin(1) == true).sum())
    with torch.no_grad():
        picture(out / "generative_labels.png", {"label to image": generator.net(kinds)})
    return {"inferred labels": right / count}


def picture(path: Path, rows: dict[str, Tensor]) -> None:
    """Images side by side, one row a kind."""
    count = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.6 * count + 2.4, 0.66 * len(rows)), squeeze=False)
    for axis, (name, row) in zip(axes[:, 0], rows.items(), strict=True):
        strip = row.reshape(-1, 28, 28).permute(1, 0, 2).reshape(28, -1)
        axis.imshow(strip, cmap="gray_r", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PARTS = {"fill": (fill, 1200), "recall": (recall, 500), "labels": (labels, 1500)}
"""Each part, and how many updates of the weights its trainings take."""


def main(
    data_dir: Path = Path("data/mnist"),
    out: Path = Path("runs/generative"),
    part: Literal["all", "fill", "recall", "labels"] = "all",
    share: float = 1.0,
    threads: int = 1,
) -> dict[str, dict[str, float]]:
    """Trains, asks, and draws; figures go to result.json.

    Args:
        data_dir: where MNIST is, or goes.
        out: for weights, pictures and result.json.
        part: which of the three.
        share: of the updates of each training, for trying things out.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    images = Images(data_dir)
    results: dict[str, dict[str, float]] = {}
    for name in PARTS if part == "all" else [part]:
        run, updates = PARTS[name]
        results[name] = run(images, out, max(1, round(share * updates)))
        (out / f"result-{name}.json").write_text(json.dumps(results[name], indent=1))
        print(name, json.dumps(results[name]), flush=True)
    return results


if __name__ == "__main__":
    auto_cli(main)
