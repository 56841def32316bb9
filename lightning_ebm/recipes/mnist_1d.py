"""MNIST-1D, built rather than downloaded: ten templates, padded, stretched, shifted, sheared and buried in noise.

Source: Greydanus and Kobak, "Scaling down deep learning with MNIST-1D", ICML 2024 (arXiv 2011.14439). Random numbers
are drawn in the order of the published generator: seed 42 gives the published 4000 + 1000 samples, to the bit.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from lightning_ebm.recipes.sources import Split

Array = NDArray[np.float64]

TEMPLATES = [
    [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
    [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
    [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
    [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
    [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
    [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
    [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
    [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
]


def templates() -> Array:
    """The ten shapes, whitened, each starting at 0: ``(10, 12)``."""
    shapes = np.asarray(TEMPLATES, np.float64)
    shapes -= shapes.mean(1, keepdims=True)
    shapes /= shapes.std(1, keepdims=True)
    shapes -= shapes[:, :1]
    return shapes / 6


def resampled(signal: Array, points: int) -> Array:
    """The signal at other points of the same interval, by straight lines."""
    return np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(signal)), signal)


def sample(template: Array, random: np.random.RandomState) -> Array:
    """One drawing of a template: 40 points."""
    signal = np.concatenate([template + 1e-8, np.zeros(36 + int(random.rand() * 25))])
    signal = resampled(signal, 72)
    signal *= 1 + 0.4 * (random.rand() - 0.5)
    shift = random.choice(48)
    signal = np.concatenate([signal[-shift:], signal[:-shift]])
    here = signal != 0
    signal = np.where(here, signal, gaussian_filter(0.25 * random.randn(72), 2))
    signal = signal + 0.02 * random.randn(72)
    signal = signal - 0.75 * (random.rand() - 0.5) * np.linspace(-0.5, 0.5, 72)
    return resampled(signal, 40)


def build(samples: int = 5000, seed: int = 42) -> Split:
    """The data set: standardized, shuffled, four fifths for training."""
    random = np.random.RandomState(seed)
    per_class = samples // 10
    signals = np.stack([sample(template, random) for template in templates() for _ in range(per_class)])
    labels = np.repeat(np.arange(10), per_class)
    order = random.permutation(len(labels))
    signals, labels = signals[order], labels[order]
    signals = (signals - signals.mean()) / signals.std()
    cut = int(0.8 * len(labels))
    return Split(signals[:cut], labels[:cut], signals[cut:], labels[cut:])
