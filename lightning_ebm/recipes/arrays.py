"""Data that is held in memory as arrays, of which whole batches are cut at once."""

from abc import abstractmethod
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ebm import checked
from lightning_ebm.recipes.sources import Split

Batch = tuple[Tensor, Tensor]


class Arrays(Dataset[Batch]):
    """Inputs ``(N, C, ...)`` and labels ``(N,)``; a batch is one indexing, so that loading costs next to nothing.

    Args:
        x: bytes, which become (x / 255 - mean) / std, or floats, which stay.
        y: classes.
        mean: of each channel, ``(C,)``.
        std: of each channel, ``(C,)``.
        augment: random crops of images padded by 4, and reflections.
    """

    def __init__(self, x: Tensor, y: Tensor, mean: Tensor, std: Tensor, augment: bool = False) -> None:
        shape = (-1, *[1] * (x.ndim - 2))
        self.x, self.y, self.mean, self.std, self.augment = x, y, mean.reshape(shape), std.reshape(shape), augment

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Batch:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch; torch's loaders ask for it by this name."""
        where = torch.as_tensor(indices)
        x = self.x[where]
        if x.dtype == torch.uint8:
            x = (x.float() / 255 - self.mean) / self.std
        return (_augmented(x) if self.augment else x), self.y[where]


def _augmented(x: Tensor, padding: int = 4) -> Tensor:
    """Each image ``(B, C, H, W)`` shifted by up to `padding` pixels, zeros coming in, and half of them reflected."""
    size, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, size, 1))
    rows = (top + torch.arange(height)).reshape(size, 1, height, 1)
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(size, 1) < 0.5, columns.flip(1), columns).reshape(size, 1, 1, width)
    return padded[torch.arange(size).reshape(-1, 1, 1, 1), torch.arange(x.shape[1]).reshape(1, -1, 1, 1), rows, columns]


def check_loading(owner: object, batch_size: Any, eval_batch_size: Any, num_workers: Any) -> tuple[int, int]:
    """The two sizes of batches, if they and the number of workers can be meant."""
    checked.count(owner, "num_workers", num_workers, least=0)
    return checked.count(owner, "batch_size", batch_size), checked.count(owner, "eval_batch_size", eval_batch_size)


def whole(batch: Any) -> Any:
    return batch


class ArrayData(L.LightningDataModule):
    """A data set that fits into memory.

    Args:
        batch_size: of training batches.
        eval_batch_size: of validation and test batches.
        validation: how many training samples are held out for validation; 0: validation is the test set, as in
            published benchmarks, and the best epoch is then one chosen on the test set.
        mean: subtracted from images in [0, 1], one for each channel, or one for all.
        std: what the difference is divided by.
        drop_last: whether training leaves out an incomplete last batch.
        limit: use only so many training samples, the first ones; for trying things out.
        num_workers: of the loaders; the arrays are in memory, so 0 is fastest unless images are augmented.
    """

    augment: bool = False

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        validation: int = 0,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        drop_last: bool = False,
        limit: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = check_loading(self, batch_size, eval_batch_size, num_workers)
        self.validation = checked.count(self, "validation", validation, least=0)
        self.mean = torch.tensor([checked.number(self, "mean", m, "a number a channel") for m in mean])
        self.std = torch.tensor([checked.number(self, "std", s, "a positive number a channel", above=0) for s in std])
        self.limit = None if limit is None else checked.count(self, "limit", limit)
        self.drop_last, self.num_workers = drop_last, num_workers
        self.parts: dict[str, Arrays] = {}

    @abstractmethod
    def load(self) -> Split:
        """The arrays; inputs ``(N, C, ...)``, as bytes or as floats."""

    def setup(self, stage: str) -> None:
        """Reads the arrays once."""
        if self.parts:
            return
        arrays = (torch.from_numpy(np.array(part)) for part in self.load())
        train_x, train_y, test_x, test_y = (t.float() if t.is_floating_point() else t for t in arrays)
        train_y, test_y = train_y.long(), test_y.long()
        if self.validation >= len(train_y):
            wanted = f"fewer than the {len(train_y)} training samples, so that some are left to train on"
            checked.refuse(self, "validation", self.validation, wanted)
        for name, given in (("mean", self.mean), ("std", self.std)):
            if len(given) not in (1, train_x.shape[1]):
                wanted = f"one number, or one for each of the {train_x.shape[1]} channels"
                checked.refuse(self, name, [round(v, 6) for v in given.tolist()], wanted)
        order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0))
        held, kept = order[: self.validation], order[self.validation :].sort().values[: self.limit]
        scale = (self.mean, self.std)
        self.parts = {
            "train": Arrays(train_x[kept], train_y[kept], *scale, augment=self.augment),
            "test": Arrays(test_x, test_y, *scale),
        }
        self.parts["val"] = Arrays(train_x[held], train_y[held], *scale) if self.validation else self.parts["test"]

    @property
    def classes(self) -> int:
        """How many there are, by the largest label; known after `setup`."""
        return max(int(part.y.max()) for part in self.parts.values()) + 1

    def _loader(self, part: str) -> DataLoader[Batch]:
        train = part == "train"
        return DataLoader(
            self.parts[part],
            self.batch_size if train else self.eval_batch_size,
            shuffle=train,
            drop_last=train and self.drop_last,
            collate_fn=whole,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """What was held out, or the test set."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test set, in its own order."""
        return self._loader("test")
