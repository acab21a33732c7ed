"""Tasks and trainings under equal conditions.

A **task** is a data set with a network and a batch size. An **arena** makes both once: every method trains the same
module, from the weights and with the batches of a seed, so that a program is compiled once for each method and shared
by its step sizes and seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.data import IMAGES, Dataset, load
from ddpn_fx.demo.compare import accuracy

VALIDATION = 1 / 6  # of the training set
CURVE_SAMPLES = 1000  # of the training set, for the loss of a curve
TrainStep = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A data set with its network.

    Attributes:
        key: its name in the record and on the command line.
        data: the data set, for `ddpn_fx.data.load`.
        widths: of a feed-forward network's hidden layers; empty: the convolutional network.
        activation: ``"relu"`` or ``"tanh"``.
        output: ``"identity"`` or ``"sigmoid"``: what the last layer is followed by.
        batch_size: samples a step.
        steps: steps of a training that is reported.
        search_steps: steps of a training that chooses a step size.
        seeds: trainings that are reported.
        search_seeds: trainings of each step size in the search.
        backend: of torch.compile.
    """

    key: str
    data: str
    widths: tuple[int, ...]
    activation: str
    output: str
    batch_size: int
    steps: int
    search_steps: int
    seeds: int
    search_seeds: int = 1
    backend: str = "inductor"

    @property
    def convolutional(self) -> bool:
        """Whether the network is the convolutional one."""
        return not self.widths

    @property
    def images(self) -> bool:
        """Whether the data are photographs or scans of some size, not tables or 8x8 digits."""
        return self.data in IMAGES

    def network(self, data: Dataset) -> nn.Sequential:
        """The network with new random weights, from a sample to the classes' logits."""
        activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[self.activation]
        layers: list[nn.Module] = []
        if self.convolutional:
            channels, side = data.x_train.shape[1:3]
            for inputs in (channels, 32, 32, 32):
                stride = 2 if len(layers) < 4 else 1
                layers += [nn.Conv2d(inputs, 32, 3, stride=stride, padding=1), activation()]
                side = (side + stride - 1) // stride
            layers += [nn.Flatten(), nn.Linear(32 * side * side, 64), activation(), nn.Linear(64, data.classes)]
        else:
            for inputs, outputs in pairwise((data.x_train[0].numel(), *self.widths)):
                layers += [nn.Linear(inputs, outputs), activation()]
            layers.append(nn.Linear(self.widths[-1], data.classes))
        if self.output == "sigmoid":
            layers.append(nn.Sigmoid())
        return nn.Sequential(*layers)

    def describe(self, *, search: bool = True) -> str:
        """The task in a line, without the name of its data."""
        if self.convolutional:
            shape = "4 convolutions 3x3 of 32 channels (strides 2, 2, 1, 1), dense 64 and the classes"
        else:
            shape = "hidden layers " + "-".join(map(str, self.widths))
        sigmoid = ", sigmoid output" if self.output == "sigmoid" else ""
        searched = f" ({self.search_steps} and {self.search_seeds} in the search)" if search else ""
        return (
            f"{shape}, {self.activation}{sigmoid}, batch {self.batch_size}, {self.steps} steps, {self.seeds} seeds"
            f"{searched}, backend {self.backend}"
        )


@dataclass(frozen=True)
class Method:
    """An optimiser with the step sizes that are searched.

    Attributes:
        name: its row.
        grid: step sizes (or the number named by ``unit``).
        make: ``make(arena, value)`` is a training step on the arena's module in its present state.
        few: the part of the grid that is searched where a step is dear: on convolutional networks, and by a slow
            method on any images.
        only: keys of the tasks it is run on; None: all.
        unit: what the grid's numbers are.
        share: of the others' steps that it takes, for one whose steps are many times as dear.
        slow: whether a step is dear on images, where a layer's factors are large. On convolutional networks it is not
            compiled: its few large products gain little by that, and to compile them takes minutes.
    """

    name: str
    grid: tuple[float, ...]
    make: Callable[[Arena, float], TrainStep]
    few: tuple[float, ...] = ()
    only: tuple[str, ...] | None = None
    unit: str = "step size"
    share: float = 1.0
    slow: bool = False

    def adapted(self, task: Task) -> Task:
        """The task with fewer steps, and three seeds at most, for a method with a share of the steps; see ``slow``."""
        if self.slow and task.convolutional:
            task = replace(task, backend="eager")
        if self.share == 1.0:
            return task
        steps, search_steps = (max(1, round(self.share * n)) for n in (task.steps, task.search_steps))
        return replace(task, steps=steps, search_steps=search_steps, seeds=min(3, task.seeds), search_seeds=1)

    def grid_on(self, task: Task) -> tuple[float, ...]:
        """The step sizes that are searched on a task."""
        return self.few if self.few and (task.convolutional or self.dear(task)) else self.grid

    def dear(self, task: Task) -> bool:
        """Whether a step takes many times as long as SGD's on a task: a slow method on images."""
        return self.slow and task.images


class Arena:
    """One task's data, module and compiled net, which all methods and seeds train in turn."""

    def __init__(self, task: Task, data: Dataset) -> None:
        self.task, self.data = task, data
        self.validation = hold_out(data)
        self.model = task.network(data)
        self.net = ddpn_fx.compile(self.model, loss=F.cross_entropy, backend=task.backend)
        self.step: Any = None

    def train(
        self, method: Method, value: float, seed: int, *, steps: int, search: bool = False, every: int = 0
    ) -> dict[str, Any]:
        """One training: what it ended with, for the record.

        Args:
            method: the optimiser.
            value: its step size.
            seed: of the weights and of the batches' order.
            steps: at most; it ends at the first loss that is not finite.
            search: train without the validation split and measure the accuracy on it, not on the test set.
            every: steps between two points of the training curve; 0: no curve.
        """
        data = self.validation if search else self.data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model.load_state_dict(self.task.network(data).state_dict())
        torch.manual_seed(seed)
        self.step = method.make(self, value)
        curve, loss, taken, clamps, started = [], float("nan"), 0, 0.0, time.perf_counter()
        for x, y in data.batches(self.task.batch_size, steps, seed=seed):
            loss = float(self.step(x, y))
            taken += 1
            clamps += self._clamps()
            if not abs(loss) < float("inf"):
                break
            if every and taken % every == 0:
                curve.append([taken, self.train_loss(data), accuracy(self.model, data)])
        seconds = time.perf_counter() - started
        found = {"accuracy": accuracy(self.model, data), "loss": loss, "steps": taken, "seconds": round(seconds, 3)}
        if not abs(loss) < float("inf"):
            found |= {"loss": None, "diverged": True}
        if clamps:  # samples and stages a step whose value function would lose positive definiteness
            found["clamps"] = round(clamps / taken, 2)
        if curve:
            found["curve"] = curve
        return found

    def _clamps(self) -> float:
        optimizer = getattr(self.step, "__self__", None)
        return float(optimizer.stats["clamps"]) if isinstance(optimizer, ddpn_fx.DDPNOpt) else 0.0

    def train_loss(self, data: Dataset) -> float | None:
        """The loss over some of the training set; None where it is not finite."""
        with torch.no_grad():
            loss = float(F.cross_entropy(self.model(data.x_train[:CURVE_SAMPLES]), data.y_train[:CURVE_SAMPLES]))
        return loss if abs(loss) < float("inf") else None


def hold_out(data: Dataset, share: float = VALIDATION) -> Dataset:
    """A data set's training set alone, split in two: the same split every time, drawn at random."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: round(share * len(order))], order[round(share * len(order)) :]
    x, y = data.x_train, data.y_train
    return Dataset(f"{data.name}, validation", x[kept], y[kept], x[held], y[held])


class Arenas:
    """Makes each task's arena when it is first asked for, and keeps the latest alone."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self._key: Any = None
        self._arena: Arena | None = None

    def of(self, task: Task) -> Callable[[], Arena]:
        """The task's arena, made when it is called."""

        def arena() -> Arena:
            key = task.key, task.widths, task.backend
            if self._key != key:
                data = load(task.data, self.folder, flat=not task.convolutional)
                self._arena, self._key = Arena(task, data), key
            assert self._arena is not None
            return self._arena

        return arena
