"""A generative net on MNIST: images filled in, recalled and classified by relaxing states.

    python recipes/generative.py --data_dir data/mnist
    python recipes/generative.py --data_dir data/mnist --part recall

10-256-256-784 from a latent state to pixels, tanh, tanh, sigmoid. Everything is predictive coding,
E = 1/2 |z - z_0|^2 + sum_l 1/2 |x_l - mu_l|^2 + lambda/2 |image - mu|^2, where z, the state at the input, is inferred
or held at a label.

* fill: the lower half of an image is inferred from its upper half. No labels, and two ways to learn: "whole images",
  where states are inferred from all pixels and weights follow; and "completion", where states are inferred from the
  upper half, once more with the lower half as a weak nudge in both directions, and weights follow the difference.
* recall: 64 images are stored as whole images, and recalled from their upper half, and from noise upon them.
* labels: the latent is held at the label in training, and of a test image the label is the one of ten that costs the
  least energy ("whole images"); or the image is held in training and the free latent pulled at, and the label of a test
  image is the largest unit of the latent at rest ("contrast").

Trained weights stay in --out, and a part whose weights are there is not trained again. No part trains on the last
1000 training images, which are there to choose settings on; figures are of test images.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from torch import Tensor, nn

import lightning_ebm as ebm
from lightning_ebm.recipes.data import MNIST, FashionMNIST

mpl.use("Agg")
HIDDEN = ["2", "4"]
UPPER = torch.arange(784) < 392
Pair = tuple[Tensor, Tensor]
"""Latents and images."""


class Images:
    """Pixels in [0, 1] and labels, training and test."""

    def __init__(self, data: MNIST) -> None:
        data.setup("fit")
        train, self.test = (data.parts[name].x.flatten(1).float() / 255 for name in ("train", "test"))
        self.train = train[:-1000]
        self.labels, self.test_labels = data.parts["train"].y[:-1000], data.parts["test"].y

    def batches(self, count: int, size: int = 100) -> Iterator[Tensor]:
        """Indices of training images, `count` times, in a new order every epoch."""
        while count > 0:
            yield from torch.split(torch.randperm(len(self.train)), size)[:count]
            count -= len(self.train) // size


class Generator:
    """The net, and what is asked of it.

    Hidden layers and the latent have precision 1; how precise pixels are beside them, lambda, decides what the net is.
    It predicts the mean image at first: what weights then learn is how images differ from it.

    Args:
        mean: image, ``(784,)``.
        pixels: lambda, the precision of pixels.
        free_latent: whether the state at the input moves while whole images are learned.
        nudge: lambda of what is learned by contrast, weak beside the precision of what it pulls at.
        steps: of each phase of that after the free one, which takes twice as many.
    """

    def __init__(
        self, mean: Tensor, pixels: float, free_latent: bool = True, nudge: float = 0.3, steps: int = 8
    ) -> None:
        self.net = nn.Sequential(
            nn.Identity(),
            nn.Linear(10, 256),
            nn.Tanh(),
            nn.Linear(256, 256),
            nn.Tanh(),
            nn.Linear(256, 784),
            nn.Sigmoid(),
        )
        for layer, gain in (("1", 0.3), ("3", 1.0), ("5", 0.5)):
            linear: Any = self.net.get_submodule(layer)
            nn.init.normal_(linear.weight, std=gain / linear.in_features**0.5)
            nn.init.zeros_(linear.bias)
        linear.bias.data = torch.logit(mean.clamp(0.01, 0.99))
        self.pixels, layers = pixels, (["0"] if free_latent else []) + HIDDEN
        relaxer = ebm.QuasiNewton(12, 5, tol=1e-3)
        algorithm = ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(pixels), relaxer)
        self.learner = ebm.Learner(self.net, algorithm, layers=layers, output="readout")
        self.contrast_by(nudge, 2 * steps, steps)

    def contrast_by(self, nudge: float, free: int, steps: int, memory: int = 5, tol: float = 1e-3) -> None:
        """How phases relax from now on where something is learned by contrast: by so many steps to such a tolerance.

        The nudge is weak, and of both signs from one free state: what of the free phase is not settled is in both
        phases, and in no update.
        """
        contrast = ebm.Algorithm(
            ebm.PredictiveCoding({"6": self.pixels}),
            ebm.Centered(nudge),
            ebm.QuasiNewton(steps, memory, tol=tol, coordinates="states"),
            free_relaxer=ebm.QuasiNewton(free, memory, tol=tol),
        )
        self.contrast = ebm.Learner(self.net, contrast, layers=["0", *HIDDEN, "6"], output="state")

    def loss(self, latent: Tensor, image: Tensor, seen: Tensor | None = None) -> Tensor:
        """1/2 |image - mu|^2 over the pixels that are seen, averaged over images."""
        error = self.net(latent) - image
        loss: Tensor = 0.5 * (error if seen is None else error[:, seen]).square().sum(1).mean()
        return loss

    def inferred(
        self,
        latent: Tensor,
        image: Tensor,
        seen: Tensor | None = None,
        pixels: float | None = None,
    ) -> ebm.Relaxed:
        """The states that explain the pixels that are seen, which are as precise as in training or as said."""
        loss, relaxer = (lambda: self.loss(latent, image, seen)), ebm.QuasiNewton(100, 8, tol=1e-3)
        return self.learner.relax(loss, nudge=pixels or self.pixels, relaxer=relaxer)

    @torch.no_grad()
    def image(self, found: ebm.Relaxed) -> Tensor:
        """What the states predict."""
        readout: Tensor = self.net[5:](found.states["4"])
        return readout

    def learn_whole(self, latent: Tensor, image: Tensor) -> None:
        """Unsupervised where the latent is free: states relax under the whole image."""
        self.learner.backward(lambda: self.loss(latent, image))

    def learn_to_complete(self, latent: Tensor, image: Tensor) -> None:
        """The upper half is held; how the energy changes when the lower half is pulled at is what weights follow."""
        self.contrast.backward(lambda: self.loss(latent, image, ~UPPER), clamp={"6": (image, UPPER)})

    def learn_to_label(self, label: Tensor, image: Tensor) -> None:
        """The image is held; weights follow how the energy changes when the free latent is pulled at."""

        def loss() -> Tensor:
            latent = self.net[0](torch.full_like(label, 0.1))
            errors = [latent - label, self.net[1:](latent) - image]  # the second is 0, as the image is held
            pulled: Tensor = 0.5 * torch.cat(errors, 1).square().sum(1).mean()
            return pulled

        self.contrast.backward(loss, clamp={"6": image})

    def trained(
        self, weights: Path, learn: Callable[[Tensor, Tensor], None], pairs: Iterable[Pair], updates: int, lr: float,
        decay: float = 0.3,
    ) -> "Generator":  # fmt: skip
        """Trained on latents and images by Adam, with one cycle of its learning rate, unless the weights are there."""
        if weights.exists():
            self.net.load_state_dict(torch.load(weights))
            return self
        adam = torch.optim.AdamW(self.net.parameters(), lr, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, updates)
        for latent, image in pairs:
            adam.zero_grad()
            learn(latent, image)
            adam.step()
            schedule.step()
        torch.save(self.net.state_dict(), weights)
        return self


def fill(images: Images, out: Path, updates: int) -> dict[str, float]:
    """Mean squared errors of the lower half, by both ways to learn and by the mean image."""
    mean, image = images.train.mean(0), images.test
    latent = torch.zeros(1000, 10)
    blank = float((image - mean)[:, ~UPPER].square().mean())
    result = {"mean image": blank}
    rows = {"image": image, "upper half": torch.where(UPPER, image, 0.5)}
    for name, steps in (("whole images", max(3, updates // 10)), ("completion", updates)):
        generator = Generator(mean, 30.0, nudge=3.0, steps=16)
        learn = generator.learn_to_complete if name == "completion" else generator.learn_whole
        pairs = ((torch.zeros(len(batch), 10), images.train[batch]) for batch in images.batches(steps))
        if name == "completion":
            generator.trained(out / "completion-rough.pt", learn, pairs, steps, 2e-3, 1.0)
            torch.manual_seed(torch.initial_seed() + 1)
            steps = max(3, round(0.12 * steps))
            pairs = ((torch.zeros(len(batch), 10), images.train[batch]) for batch in images.batches(steps))
            generator.contrast_by(0.3, 64, 64, memory=10, tol=1e-4)  # near enough to equilibrium for the gradient there
        generator.trained(out / f"{name.replace(' ', '-')}.pt", learn, pairs, steps, 1e-3)
        parts = image.split(len(latent))
        found = torch.cat([generator.image(generator.inferred(latent[: len(part)], part)) for part in parts])
        result[f"{name}: image explained by its states"] = float((found - image).square().mean())
        filled = torch.cat([generator.image(generator.inferred(latent[: len(part)], part, UPPER)) for part in parts])
        result[f"{name}: lower half"] = error = float((filled - image)[:, ~UPPER].square().mean())
        result[f"{name}: share of the mean image's error"] = error / blank
        rows[name] = torch.where(UPPER, image, filled)
    picture(out / "generative_fill.png", {name: row[:14] for name, row in rows.items()})
    return result


def recall(images: Images, out: Path, updates: int) -> dict[str, float]:
    """Shares of 64 stored images that what is recalled is nearest to, and with an error below 0.01 a pixel as well."""
    stored, latent = images.train[:64], torch.zeros(64, 10)
    generator = Generator(stored.mean(0), 0.3)
    generator.trained(out / "recall.pt", generator.learn_whole, [(latent, stored)] * updates, updates, 2e-3)
    noise = (stored + 0.5 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    result, rows = {}, {"stored": stored}
    # Pixels under noise are less precise than those that were stored.
    for name, cue, seen, precision in (("upper half", stored, UPPER, 0.3), ("noise", noise, None, 0.1)):
        shown = cue if seen is None else torch.where(seen, cue, 0.5)
        found = generator.image(generator.inferred(latent, cue, seen, precision))
        nearest = torch.cdist(found, stored).argmin(1) == torch.arange(64)
        error = (found - stored).square().mean(1)
        result[f"nearest is right from {name}"] = float(nearest.float().mean())
        result[f"recalled from {name}"] = float((nearest & (error < 0.01)).float().mean())
        result[f"error of the cue, {name}"] = float((shown - stored).square().mean())
        result[f"error from {name}"] = float(error.mean())
        rows |= {f"cue: {name}": shown, f"from {name}": found}
    picture(out / "generative_recall.png", {name: row[:14] for name, row in rows.items()})
    return result


def labels(images: Images, out: Path, updates: int) -> dict[str, float]:
    """Shares of test images whose label is inferred, in two ways, and what each label looks like."""
    kinds, count, mean = torch.eye(10), min(1000, len(images.test)), images.train.mean(0)
    image, true = images.test[:count], images.test_labels[:count]
    result, undecided = {}, torch.full((count, 10), 0.1)
    for name, steps, lr in (("whole images", updates * 3 // 5, 1e-3), ("contrast", updates, 1.5e-3)):
        generator = Generator(mean, 1.0, free_latent=name == "contrast")
        learn = generator.learn_to_label if name == "contrast" else generator.learn_whole
        pairs = ((kinds[images.labels[batch]], images.train[batch]) for batch in images.batches(steps))
        generator.trained(out / f"labels-{name.replace(' ', '-')}.pt", learn, pairs, steps, lr)
        if name == "contrast":
            guess = generator.inferred(undecided, image).states["0"].argmax(1)
        else:
            guess = torch.cat([cheapest(generator, part, kinds) for part in image.split(100)])
            with torch.no_grad():
                picture(out / "generative_labels.png", {"label to image": generator.net(kinds)})
        result[name] = float((guess == true).float().mean())
    return result


def cheapest(generator: Generator, image: Tensor, kinds: Tensor) -> Tensor:
    """The label whose equilibrium costs the least energy, of each image."""
    every, given = image.repeat_interleave(len(kinds), 0), kinds.repeat(len(image), 1)
    found = generator.inferred(given, every)
    errors = (generator.image(found) - every).square().sum(1)
    return (found.energy + 0.5 * generator.pixels * errors).reshape(-1, len(kinds)).argmin(1)


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


PARTS = {"fill": (fill, 5000), "recall": (recall, 1200), "labels": (labels, 1000)}
"""Each part, and how many updates of the weights its longest training takes."""


def main(
    data_dir: Path = Path("data/mnist"),
    out: Path = Path("runs/generative"),
    part: Literal["all", "fill", "recall", "labels"] = "all",
    data: Literal["mnist", "fashion-mnist"] = "mnist",
    share: float = 1.0,
    seed: int = 0,
    threads: int = 1,
) -> dict[str, dict[str, float]]:
    """Trains, asks, and draws; figures go to result.json.

    Args:
        data_dir: where the data set is, or goes.
        out: for weights, pictures and result.json.
        part: which of the three.
        data: which data set. Settings were chosen on MNIST.
        share: of the updates of each training, for trying things out.
        seed: of weights and of the order of images.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    images = Images((MNIST if data == "mnist" else FashionMNIST)(data_dir))
    results: dict[str, dict[str, float]] = {}
    for name in PARTS if part == "all" else [part]:
        run, updates = PARTS[name]
        torch.manual_seed(seed)
        results[name] = run(images, out, max(3, round(share * updates)))
        (out / f"result-{name}.json").write_text(json.dumps(results[name], indent=1))
        print(name, json.dumps(results[name]), flush=True)
    return results


if __name__ == "__main__":
    auto_cli(main)
