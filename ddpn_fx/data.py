"""Real data sets for the demo, the examples and experiments, without a download.

`load("digits")` and `load("wine")` come with scikit-learn. `load("mnist")`, `"fashion_mnist"`, `"cifar10"` and
`"svhn"` read one file each, ``<name>.npz`` with the uint8 arrays ``x_train, y_train, x_test, y_test`` (images NHW or
NHWC), from the folder that the argument or the environment variable ``DDPN_FX_DATA`` names.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER_VARIABLE = "DDPN_FX_DATA"
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class _Source:
    """An image data set that lies in one .npz file."""

    title: str
    train: int  # samples of the official training set
    test: int
    site: str


IMAGES = {
    "mnist": _Source("MNIST", 60_000, 10_000, "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"),
    "fashion_mnist": _Source("Fashion-MNIST", 60_000, 10_000, "https://github.com/zalandoresearch/fashion-mnist"),
    "cifar10": _Source("CIFAR-10", 50_000, 10_000, "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "svhn": _Source("SVHN", 73_257, 26_032, "http://ufldl.stanford.edu/housenumbers"),
}
TABLES = {"digits": "DIGITS", "wine": "WINE"}


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A data set split in two, in memory.

    Attributes:
        name: what to call a result from it; a part of an official set carries its size (``"SVHN-11k"``).
        x_train: float32, zero mean and unit deviation by the training set's statistics; images are NCHW, or flat.
        y_train: int64 class labels from 0.
        x_test: as `x_train`, scaled with the training set's statistics.
        y_test: as `y_train`.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def __repr__(self) -> str:
        """Name and sizes, not the tensors themselves."""
        sample = "x".join(str(size) for size in self.x_train.shape[1:])
        return f"Dataset({self.name!r}, {len(self.x_train):,} train + {len(self.x_test):,} test samples of {sample})"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.y_train.max()) + 1

    def batches(
        self, batch_size: int, steps: int, *, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` training batches of exactly `batch_size` samples, reshuffled every epoch, on a device.

        The order depends on `seed` alone, so two optimisers can be given the same batches. What does not fill the last
        batch of an epoch is left out: every batch has one shape, and a compiled step is compiled once.

        Raises:
            ValueError: `batch_size` is not between 1 and the number of training samples.
        """
        samples = len(self.x_train)
        if not 1 <= batch_size <= samples:
            raise ValueError(f"batches: batch_size={batch_size}, but {self.name} has 1 to {samples} training samples")
        generator = torch.Generator().manual_seed(seed)
        per_epoch = samples // batch_size
        for step in range(steps):
            start = step % per_epoch * batch_size
            if start == 0:
                order = torch.randperm(samples, generator=generator)
            index = order[start : start + batch_size]
            yield send(self.x_train[index], device), send(self.y_train[index], device)


def send(batch: Tensor, device: str | torch.device) -> Tensor:
    """A tensor on a device; to a GPU from pinned memory, without waiting: the copy runs beside the step before it."""
    if torch.device(device).type == "cuda" and batch.device.type == "cpu":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


def load(name: str, folder: str | os.PathLike[str] | None = None, *, flat: bool = False) -> Dataset:
    """Load a data set by name.

    Args:
        name: ``"digits"``, ``"wine"`` (from scikit-learn; a fixed, stratified split, one fifth for the test),
            ``"mnist"``, ``"fashion_mnist"``, ``"cifar10"`` or ``"svhn"`` (from ``<name>.npz``).
        folder: where the .npz file lies; None: the folder that the environment variable DDPN_FX_DATA names.
        flat: flatten each sample to one vector.

    Returns:
        Images scaled per channel, tables per feature, to zero mean and unit deviation over the training set.

    Raises:
        ValueError: no data set of that name, or a file that does not hold what it should.
        FileNotFoundError: the file is missing; the message says which, and where it can be got from.
        ModuleNotFoundError: scikit-learn or numpy is missing.
    """
    if name in TABLES:
        title, arrays = TABLES[name], _from_scikit_learn(name)
    elif name in IMAGES:
        title, arrays = _from_file(name, folder)
    else:
        raise ValueError(f"load: no data set {name!r}; there are {', '.join([*TABLES, *IMAGES])}")
    x_train, x_test = _standardize(arrays["x_train"], arrays["x_test"])
    if flat:
        x_train, x_test = x_train.flatten(1), x_test.flatten(1)
    return Dataset(title, x_train, arrays["y_train"], x_test, arrays["y_test"])


def require(module: str, package: str | None = None) -> Any:
    """Import a module of the optional dependencies.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        message = f'{package or top} is not installed: pip install "ddpn-fx[demo]"'
        raise ModuleNotFoundError(message, name=error.name) from None


def _from_scikit_learn(name: str) -> dict[str, Tensor]:
    datasets = require("sklearn.datasets", "scikit-learn")
    selection = require("sklearn.model_selection", "scikit-learn")
    bunch = getattr(datasets, f"load_{name}")()
    x = bunch.images[:, None] if name == "digits" else bunch.data
    x_train, x_test, y_train, y_test = selection.train_test_split(
        x, bunch.target, test_size=0.2, random_state=0, stratify=bunch.target
    )
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    return {key: torch.as_tensor(array, dtype=_dtype(key)) for key, array in arrays.items()}


def _from_file(name: str, folder: str | os.PathLike[str] | None) -> tuple[str, dict[str, Tensor]]:
    np = require("numpy")
    source, file = IMAGES[name], f"{name}.npz"
    where = folder if folder is not None else os.environ.get(FOLDER_VARIABLE)
    wanted = (
        f"Make {file} with the uint8 arrays {', '.join(ARRAYS)} (images NHW or NHWC, labels from 0) from {source.site} "
        f"and name its folder by load({name!r}, folder) or the environment variable {FOLDER_VARIABLE}."
    )
    if not where:
        raise FileNotFoundError(f"load: no folder given for {file}. {wanted}")
    path = Path(where) / file
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no {path}. {wanted}")
    tensors: dict[str, Tensor] = {}
    with np.load(path) as stored:
        for key in ARRAYS:
            if key not in stored.files:
                raise ValueError(f"load: {path} has no array {key!r}. {wanted}")
            tensors[key] = torch.as_tensor(stored[key].astype("float32" if key.startswith("x") else "int64"))
    for part in ("train", "test"):
        x, y = tensors[f"x_{part}"], tensors[f"y_{part}"].flatten()
        if x.ndim not in (3, 4) or len(x) != len(y):
            raise ValueError(f"load: {path} has x_{part} of shape {tuple(x.shape)} with {len(y)} labels. {wanted}")
        tensors[f"x_{part}"] = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
        tensors[f"y_{part}"] = y
    train, test = len(tensors["y_train"]), len(tensors["y_test"])
    whole = (train, test) == (source.train, source.test)
    return source.title if whole else f"{source.title}-{(train + test) / 1000:.0f}k", tensors


def _standardize(x_train: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """Zero mean and unit deviation over the training set, per channel (dim 1) of images and per feature of tables."""
    rest = [dim for dim in range(x_train.ndim) if dim != 1]
    mean = x_train.mean(rest, keepdim=True)
    deviation = x_train.std(rest, correction=0, keepdim=True)
    deviation = torch.where(deviation > 0, deviation, 1)  # a constant feature stays zero
    return (x_train - mean) / deviation, (x_test - mean) / deviation


def _dtype(key: str) -> torch.dtype:
    return torch.float32 if key.startswith("x") else torch.int64
