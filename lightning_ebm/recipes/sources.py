"""Where data sets lie on disk, in the formats people have them in, and how they get there."""

import gzip
import hashlib
import pickle
import shutil
import struct
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Split(NamedTuple):
    """A data set: inputs ``(N, ...)`` and labels ``(N,)``, for training and for testing."""

    train_x: NDArray[Any]
    train_y: NDArray[Any]
    test_x: NDArray[Any]
    test_y: NDArray[Any]


class DataNotFoundError(FileNotFoundError):
    """No copy of a data set where it was looked for, and none could be fetched."""


class Remote(NamedTuple):
    """A file on the network, with the md5 of what must arrive; None where its publisher gives none."""

    url: str
    md5: str | None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def fetch(title: str, files: Iterable[Remote], folder: Path, looked_for: str) -> None:
    """Downloads what `folder` lacks.

    Raises:
        DataNotFoundError: there is no network, or what arrived is not what was published; says how to get it by hand.
    """
    files = list(files)
    folder.mkdir(parents=True, exist_ok=True)
    for remote in files:
        target = folder / remote.name
        if target.exists():
            continue
        partial = target.with_name(target.name + ".part")
        try:
            request = urllib.request.Request(remote.url, headers={"User-Agent": "lightning-ebm recipes"})
            with urllib.request.urlopen(request, timeout=30) as answer, partial.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            partial.unlink(missing_ok=True)
            commands = "\n".join(f"    curl -L --create-dirs -o {folder / r.name} {r.url}" for r in files)
            raise DataNotFoundError(
                f"{title} is not in {folder.resolve()}, where {looked_for} would be read, and downloading it failed:"
                f" {error}.\nPoint --data.dir to a copy, or get one where there is a network:\n{commands}"
            ) from error
        found = hashlib.md5(partial.read_bytes(), usedforsecurity=False).hexdigest()
        if remote.md5 not in (None, found):
            partial.unlink()
            raise DataNotFoundError(
                f"{remote.url} is not the published file: its md5 is {found} instead of {remote.md5}. A proxy or login"
                f" page may have answered. Nothing was kept; put a good copy into {folder.resolve()}."
            )
        partial.replace(target)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array in MNIST's IDX format, gzipped or not."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    zero, kind, ndim = struct.unpack(">HBB", raw[:4])
    if zero != 0 or kind != 0x08:
        raise ValueError(f"{path}: not an IDX file of bytes; it starts with {raw[:4].hex()} instead of 000008.")
    shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


IDX_NAMES = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


def find_idx(folder: Path) -> list[Path] | None:
    """The four IDX files, gzipped or not, with ``-`` or ``.`` before ``idx``; None if one is missing."""
    found = []
    for name in IDX_NAMES:
        spellings = [spelt + suffix for spelt in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
        path = next((folder / s for s in spellings if (folder / s).exists()), None)
        if path is None:
            return None
        found.append(path)
    return found


def read_npz(path: Path) -> Split:
    """Keras' layout: x_train, y_train, x_test, y_test."""
    with np.load(path) as archive:
        missing = sorted({"x_train", "y_train", "x_test", "y_test"} - set(archive.files))
        if missing:
            raise ValueError(f"{path}: expected arrays x_train, y_train, x_test, y_test; {', '.join(missing)} missing.")
        return Split(archive["x_train"], archive["y_train"], archive["x_test"], archive["y_test"])


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers, and no code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of images.")


def _cifar_batch(file: IO[bytes]) -> tuple[NDArray[np.uint8], list[int]]:
    batch = _ArraysOnly(file, encoding="bytes").load()
    return np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32), list(batch[b"labels"])


def read_cifar(path: Path) -> Split:
    """CIFAR-10's Python version: the folder of pickles, or the tar.gz it comes in."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    if path.is_dir():
        batches = []
        for name in names:
            with (path / name).open("rb") as file:
                batches.append(_cifar_batch(file))
    else:
        with tarfile.open(path) as archive:
            members = {member.name.rsplit("/", 1)[-1]: member for member in archive.getmembers()}
            opened = [archive.extractfile(members[name]) for name in names]
            batches = [_cifar_batch(file) for file in opened if file is not None]
    train_x, train_y = np.concatenate([x for x, _ in batches[:5]]), np.concatenate([y for _, y in batches[:5]])
    return Split(train_x, train_y, batches[5][0], np.asarray(batches[5][1]))
