"""Where on the way from backprop to equilibrium do published settings of predictive coding train?

    python recipes/regimes.py --data-dir FOLDER_WITH_MNIST_NPZ --output docs

Trains each setting of `published_settings.py` for some hundred updates, measures its regime on the next batch, and
writes regimes.md and a picture. Ten minutes on one CPU core with MNIST; without `--data-dir`, scikit-learn's digits.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_settings import SETTINGS, Setting
from torch import Tensor

import lightning_ebm as ebm
from lightning_ebm import plots, regime

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
    shift, scale = setting.normalise
    images = (images - shift) / scale
    network = setting.network(images.shape[1])
    size = min(setting.batch_size, len(images) // 2)
    batches: list[Tensor] = []
    while len(batches) <= updates:
        batches += torch.randperm(len(images)).split(size)[: len(images) // size]
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
