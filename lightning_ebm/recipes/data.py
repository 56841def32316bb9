"""Data modules of the recipes."""

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ebm import checked
from lightning_ebm.recipes import mnist_1d
from lightning_ebm.recipes.arrays import ArrayData, Batch, check_loading
from lightning_ebm.recipes.sources import (
    IDX_NAMES,
    DataNotFoundError,
    Remote,
    Split,
    fetch,
    find_idx,
    read_cifar,
    read_idx,
    read_npz,
)


class Digits(ArrayData):
    """The 1797 handwritten digits of scikit-learn, 8 x 8, a fifth for testing; no download. Values in [0, 1]."""

    def load(self) -> Split:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 1, 8, 8) / 16
        parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
        train_x, test_x, train_y, test_y = parts
        return Split(train_x, train_y, test_x, test_y)


class MNIST1D(ArrayData):
    """4000 + 1000 signals of 40 points in ten classes, the published set, built in a second; no download."""

    def load(self) -> Split:
        split = mnist_1d.build()
        return split._replace(train_x=split.train_x[:, None], test_x=split.test_x[:, None])


class MNIST(ArrayData):
    """60000 + 10000 handwritten digits, 28 x 28.

    Args:
        dir: where the files are, or go: the four IDX files, gzipped or not, or one ``.npz`` in Keras' layout. `dir` may
            also be that file itself. What is missing is downloaded.
        options: those of `ArrayData`.
    """

    title: ClassVar[str] = "MNIST"
    remotes: ClassVar[tuple[Remote, ...]] = tuple(
        Remote(f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz", md5)
        for name, md5 in zip(
            IDX_NAMES,
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
            strict=True,
        )
    )

    def __init__(self, dir: Path = Path("data/mnist"), **options: Any) -> None:
        super().__init__(**options)
        self.dir = Path(dir).expanduser()

    def prepare_data(self) -> None:
        """Downloads what is not there; one process a machine does it."""
        if self._archive() is None and find_idx(self.dir) is None:
            fetch(self.title, self.remotes, self.dir, "IDX files (.gz or not) or an .npz")

    def _archive(self) -> Path | None:
        if self.dir.suffix == ".npz":
            return self.dir if self.dir.exists() else None
        names = (f"{self.title.lower()}.npz", f"{self.title.lower().replace('-', '_')}.npz")
        return next((self.dir / name for name in names if (self.dir / name).exists()), None)

    def load(self) -> Split:
        archive, files = self._archive(), find_idx(self.dir)
        if archive is not None:
            split = read_npz(archive)
        elif files is not None:
            train_x, train_y, test_x, test_y = (read_idx(path) for path in files)
            split = Split(train_x, train_y, test_x, test_y)
        else:
            raise DataNotFoundError(f"{self.title} is not in {self.dir.resolve()}.")
        for images, labels in ((split.train_x, split.train_y), (split.test_x, split.test_y)):
            if images.shape[1:] != (28, 28) or images.dtype != np.uint8 or len(images) != len(labels):
                raise ValueError(
                    f"{self.title} in {self.dir.resolve()}: expected bytes of shape (N, 28, 28) and N labels, found"
                    f" {images.dtype} {images.shape} and {len(labels)} labels."
                )
        return split._replace(train_x=split.train_x[:, None], test_x=split.test_x[:, None])


class FashionMNIST(MNIST):
    """60000 + 10000 pictures of clothes, 28 x 28, in ten classes.

    Args:
        dir: as for `MNIST`. Debian and Ubuntu have the files in the package dataset-fashion-mnist, which puts them into
            /usr/share/datasets/fashion-mnist.
        options: those of `ArrayData`.
    """

    title: ClassVar[str] = "Fashion-MNIST"
    remotes: ClassVar[tuple[Remote, ...]] = tuple(
        Remote(f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}.gz", md5)
        for name, md5 in zip(
            IDX_NAMES,
            (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
            strict=True,
        )
    )

    def __init__(self, dir: Path = Path("data/fashion-mnist"), **options: Any) -> None:
        super().__init__(dir, **options)


class CIFAR10(ArrayData):
    """50000 + 10000 color photographs, 32 x 32, in ten classes.

    Args:
        dir: where the data are, or go: ``cifar-10-batches-py/``, ``cifar-10-python.tar.gz`` or ``cifar10.npz`` (Keras'
            layout, channels first or last). What is missing is downloaded.
        augment: random crops and reflections of training images.
        mean: of each channel.
        std: of each channel.
        options: those of `ArrayData`.
    """

    remotes: ClassVar[tuple[Remote, ...]] = (
        Remote("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    )
    names: ClassVar[tuple[str, ...]] = ("cifar-10-batches-py", "cifar10.npz", "cifar-10-python.tar.gz")

    def __init__(
        self,
        dir: Path = Path("data/cifar10"),
        augment: bool = True,
        mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, ...] = (0.2470, 0.2435, 0.2616),
        **options: Any,
    ) -> None:
        super().__init__(mean=mean, std=std, **options)
        self.dir, self.augment = Path(dir).expanduser(), augment

    def _found(self) -> Path | None:
        if (self.dir / "data_batch_1").exists():
            return self.dir
        return next((self.dir / name for name in self.names if (self.dir / name).exists()), None)

    def prepare_data(self) -> None:
        """Downloads what is not there; one process a machine does it."""
        if self._found() is None:
            fetch("CIFAR-10", self.remotes, self.dir, f"one of {', '.join(self.names)}")

    def load(self) -> Split:
        path = self._found()
        if path is None:
            raise DataNotFoundError(f"CIFAR-10 is not in {self.dir.resolve()}.")
        split = read_npz(path) if path.suffix == ".npz" else read_cifar(path)
        train_x, test_x = (
            x.transpose(0, 3, 1, 2) if x.shape[1:] == (32, 32, 3) else x for x in (split.train_x, split.test_x)
        )
        return Split(train_x, split.train_y.reshape(-1), test_x, split.test_y.reshape(-1))


class Windows(Dataset[Tensor]):
    """Stretches of `length` + 1 tokens, `length` apart: ``(B, length + 1)``."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.windows = tokens.unfold(0, length + 1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]


class TinyShakespeare(L.LightningDataModule):
    """A million characters of Shakespeare, 65 different ones; the last tenth for validation.

    Batches are ``(x, y)``, both ``(B, context)``, y one character ahead.

    Args:
        dir: where ``input.txt`` or ``tinyshakespeare.txt`` is, or goes; or that file itself.
        batch_size: of training batches.
        context: characters of a window.
        eval_batch_size: of validation batches.
        num_workers: of the loaders.
    """

    remotes: ClassVar[tuple[Remote, ...]] = (
        Remote(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "6fb458f1232090904fb40fe944165e91",
        ),
    )

    def __init__(
        self,
        dir: Path = Path("data/tinyshakespeare"),
        batch_size: int = 64,
        context: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.dir = Path(dir).expanduser()
        self.batch_size, self.eval_batch_size = check_loading(self, batch_size, eval_batch_size, num_workers)
        self.context, self.num_workers = checked.count(self, "context", context), num_workers
        self.vocabulary = ""

    def _found(self) -> Path | None:
        if self.dir.is_file():
            return self.dir
        paths = (self.dir / name for name in ("input.txt", "tinyshakespeare.txt"))
        return next((path for path in paths if path.exists()), None)

    def prepare_data(self) -> None:
        """Downloads the text if it is not there."""
        if self._found() is None:
            fetch("Tiny Shakespeare", self.remotes, self.dir, "input.txt or tinyshakespeare.txt")

    def setup(self, stage: str) -> None:
        """Reads and cuts the text."""
        path = self._found()
        if path is None:
            raise DataNotFoundError(f"Tiny Shakespeare is not in {self.dir.resolve()}.")
        text = path.read_text()
        self.vocabulary = "".join(sorted(set(text)))
        number = {character: i for i, character in enumerate(self.vocabulary)}
        tokens = torch.tensor([number[character] for character in text])
        cut = int(0.9 * len(tokens))
        self.train, self.val = Windows(tokens[:cut], self.context), Windows(tokens[cut:], self.context)

    def _loader(self, windows: Windows, batch_size: int, shuffle: bool) -> DataLoader[Tensor]:
        return DataLoader(windows, batch_size, shuffle=shuffle, collate_fn=_shifted, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled windows."""
        return self._loader(self.train, self.batch_size, True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The last tenth of the text, in order."""
        return self._loader(self.val, self.eval_batch_size, False)


def _shifted(windows: list[Tensor]) -> Batch:
    stacked = torch.stack(windows)
    return stacked[:, :-1], stacked[:, 1:]
