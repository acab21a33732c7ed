"""The tasks of target.py: data, a model, a loss, a figure of merit, and how long to train.

Held-out data are two parts: the first chooses step sizes, the second is reported.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from models import GPT, Residual, group_norm, positions
from torch import Tensor, nn

from ddpn_fx.data import load
from ddpn_fx.demo import relu_network

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt import BLOCKS, HEADS, POSITIONS, WIDTH, draw, library, text

VOCABULARY = 4096  # of words
Pair = tuple[Tensor, Tensor]
Batches = Callable[[int, int, int], Iterator[Pair]]  # (batch size, steps, seed)


@dataclass
class Loaded:
    """A task with its data in memory.

    Attributes:
        build: makes the model with new random weights.
        batches: the training batches of a seed.
        held_out: (choosing, reporting) pairs of inputs and targets.
        merit: (output, target) -> the figure of merit, a float.
    """

    build: Callable[[], nn.Module]
    batches: Batches
    held_out: tuple[Pair, Pair]
    merit: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Task:
    """A task.

    One is dear whose training takes minutes: then fewer settings are tried, of the baselines and of DDPNOpt.

    Attributes:
        key: its name.
        about: the data and the model, for people.
        load: ``load(folder)`` reads the data.
        loss: (output, target) -> scalar.
        batch: samples a step.
        steps: of every training.
        grids: the step sizes that each baseline is tuned over.
        higher: whether more merit is better.
        unit: of the figure of merit.
        dear: see above.
    """

    key: str
    about: str
    load: Callable[[str | None], Loaded]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int
    steps: int
    grids: dict[str, tuple[float, ...]] = field(default_factory=lambda: CLASSIFIER_GRIDS)
    higher: bool = True
    unit: str = "%"
    dear: bool = False


def _dear(key: str, about: str, load: Callable[[str | None], Loaded], batch: int, steps: int) -> Task:
    """A classifier that is."""
    return Task(key, about, load, F.cross_entropy, batch, steps, DEAR_GRIDS, dear=True)


CLASSIFIER_GRIDS = {"SGD": (0.03, 0.1, 0.3, 1.0), "momentum": (0.01, 0.03, 0.1), "Adam": (0.001, 0.003, 0.01)}
DEAR_GRIDS = {"SGD": (0.1, 0.3), "momentum": (0.03, 0.1), "Adam": (0.003, 0.006)}
GPT_GRIDS = {"SGD": (0.3, 1.0), "momentum": (0.1, 0.3), "Adam": (0.001, 0.003, 0.006)}
REGRESSION_GRIDS = {"SGD": (1.0, 3.0, 10.0), "momentum": (0.3, 1.0, 3.0), "Adam": (0.001, 0.003, 0.01)}


def _percent(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def images(name: str, build: Callable[[], nn.Module], *, flat: bool, held: int) -> Callable[[str | None], Loaded]:
    """A classifier of images; ``held`` of the test set choose, ``held`` others report."""

    def loaded(folder: str | None) -> Loaded:
        data = load(name, folder, flat=flat)
        x, y = data.x_test, data.y_test
        held_out = (x[:held], y[:held]), (x[held : 2 * held], y[held : 2 * held])
        return Loaded(build, lambda b, n, s: data.batches(b, n, seed=s), held_out, _percent)

    return loaded


def autoencoder(folder: str | None) -> Loaded:
    """MNIST's pixels from themselves (DESIGN 2.2's regression with many outputs)."""
    data = load("mnist", folder, flat=True)
    low, high = data.x_train.min(), data.x_train.max()
    train, test = ((x - low) / (high - low) for x in (data.x_train, data.x_test))

    def batches(batch: int, steps: int, seed: int) -> Iterator[Pair]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = train[torch.randint(len(train), (batch,), generator=generator)]
            yield x, x

    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 16), nn.Tanh()),
            *(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 784)),
        )

    held = test[:2000], test[2000:6000]
    return Loaded(build, batches, tuple((x, x) for x in held), lambda o, t: 1e3 * float(F.mse_loss(o, t)))  # type: ignore[arg-type]


def characters(folder: str | None) -> Loaded:
    """The GPT of examples/gpt.py: the next character of Python's standard library."""
    return _language(*text())


def words(folder: str | None) -> Loaded:
    """The same with words, spaces and signs: the 4,095 most frequent ones, and one for all others."""
    found = re.findall(r"\w+|\s+|[^\w\s]", library())
    code = {word: i for i, (word, _) in enumerate(Counter(found).most_common(VOCABULARY - 1))}
    codes = torch.tensor([code.get(word, VOCABULARY - 1) for word in found])
    cut = int(0.9 * len(codes))
    return _language(codes[:cut], codes[cut:], VOCABULARY, held_out=(96, 192))


def _language(train: Tensor, held: Tensor, vocabulary: int, held_out: tuple[int, int] = (256, 512)) -> Loaded:
    def batches(batch: int, steps: int, seed: int) -> Iterator[Pair]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield draw(train, batch, generator)

    generator = torch.Generator().manual_seed(1234)
    parts = draw(held, held_out[0], generator), draw(held, held_out[1], generator)
    return Loaded(
        lambda: GPT(BLOCKS, WIDTH, HEADS, POSITIONS, vocabulary), batches, parts, lambda o, t: float(positions(o, t))
    )


def convolutions(inputs: int, size: int) -> nn.Module:
    """Four convolutions of 16, 32, 32 and 32 channels, three of them before a pooling, and two dense layers."""
    side = size // 8
    return nn.Sequential(
        *(nn.Conv2d(inputs, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * side * side, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def residual(norm: Callable[[int], nn.Module]) -> nn.Module:
    """ResNet-8, widths 16, 32, 64."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm(16), nn.ReLU()),
        *(Residual(16, 16, 1, norm=norm), Residual(16, 32, 2, norm=norm)),
        *(Residual(32, 64, 2, norm=norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def _dense(name: str) -> Callable[[str | None], Loaded]:
    return images(name, lambda: relu_network(784, 32, 32, 32, 32, 10), flat=True, held=5000)


_CNN_MNIST = images("mnist", lambda: convolutions(1, 28), flat=False, held=3000)
_CNN_CIFAR = images("cifar10", lambda: convolutions(3, 32), flat=False, held=2000)
_RESNET = images("cifar10", lambda: residual(group_norm), flat=False, held=2000)
_RESNET_BN = images("cifar10", lambda: residual(nn.BatchNorm2d), flat=False, held=2000)

TASKS = [
    *(
        Task(f"mnist-{batch}", "MNIST, ReLU 784-32x4-10", _dense("mnist"), F.cross_entropy, batch, steps)
        for batch, steps in ((32, 1500), (128, 800), (512, 400), (1024, 300))
    ),
    Task("fashion-128", "Fashion-MNIST, ReLU 784-32x4-10", _dense("fashion_mnist"), F.cross_entropy, 128, 1000),
    Task("fashion-512", "Fashion-MNIST, ReLU 784-32x4-10", _dense("fashion_mnist"), F.cross_entropy, 512, 400),
    _dear("mnist-cnn-64", "MNIST, CNN", _CNN_MNIST, 64, 400),
    Task(
        "autoencoder-64",
        "MNIST, autoencoder 784-128-16-128-784, tanh",
        autoencoder,
        F.mse_loss,
        64,
        600,
        REGRESSION_GRIDS,
        False,
        "1000 MSE",
    ),
    Task("gpt-32", "characters, GPT", characters, positions, 32, 400, GPT_GRIDS, False, "nats"),
    Task("words-32", "words, GPT", words, positions, 32, 400, GPT_GRIDS, False, "nats", dear=True),
    _dear("cifar-cnn-512", "CIFAR-10 (30,000 images), CNN", _CNN_CIFAR, 512, 300),
    _dear("cifar-cnn-128", "CIFAR-10 (30,000 images), CNN", _CNN_CIFAR, 128, 600),
    _dear("cifar-resnet-128", "CIFAR-10 (30,000 images), ResNet-8 GN", _RESNET, 128, 300),
    _dear("cifar-resnet-bn-128", "CIFAR-10 (30,000 images), ResNet-8 BN", _RESNET_BN, 128, 300),
]
