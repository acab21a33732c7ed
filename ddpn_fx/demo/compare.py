"""Train one network with several optimisers under equal conditions.

Every method of a seed starts at the same weights and sees the same batches in the same order; the only differences are
the optimiser and its step size. `DDPNOpt` takes its whole step in one compiled program, which is compiled once: the
step size is an input of it, and a new seed only loads other weights. The others are `torch.optim` on plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.data import Dataset, send

TrainStep = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """An optimiser at one step size.

    Attributes:
        name: what the table calls it; methods of one name are one line of the picture.
        lr: the step size.
        optimizer: ``optimizer(parameters, lr=lr)`` makes the optimiser; None: `DDPNOpt` at its defaults.
    """

    name: str
    lr: float
    optimizer: Callable[..., torch.optim.Optimizer] | None = None


def ddpnopt(*lrs: float) -> list[Method]:
    """`DDPNOpt` at its defaults, at each step size."""
    return [Method("DDPNOpt", lr) for lr in lrs]


def sgd(*lrs: float, momentum: float = 0.0) -> list[Method]:
    """`torch.optim.SGD` at each step size."""
    name = f"SGD, momentum {momentum:g}" if momentum else "SGD"
    return [Method(name, lr, partial(torch.optim.SGD, momentum=momentum)) for lr in lrs]


def adam(*lrs: float) -> list[Method]:
    """`torch.optim.Adam` at each step size."""
    return [Method("Adam", lr, torch.optim.Adam) for lr in lrs]


@dataclass(frozen=True)
class Run:
    """How one training ended: test accuracy in per cent, the last batch's loss, and whether a loss was not finite."""

    seed: int
    accuracy: float
    loss: float
    diverged: bool


@dataclass(frozen=True)
class Summary:
    """All seeds of one method at one step size."""

    method: str
    lr: float
    runs: tuple[Run, ...]

    @property
    def diverged(self) -> int:
        """Number of seeds whose loss was not finite."""
        return sum(run.diverged for run in self.runs)

    @property
    def mean(self) -> float:
        """Mean test accuracy over the seeds, in per cent; a diverged network counts as it stands."""
        return fmean(run.accuracy for run in self.runs)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the test accuracy; 0 for one seed."""
        return stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else 0.0

    def __str__(self) -> str:
        """Return what a table shows: mean and deviation, or that it diverged and for how many of the seeds."""
        if not self.diverged:
            return f"{self.mean:.1f}" + (f" ± {self.deviation:.1f}" if len(self.runs) > 1 else "")
        return "diverged" if self.diverged == len(self.runs) else f"diverged ({self.diverged} of {len(self.runs)})"

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for a JSON file; a loss that is not finite becomes null."""
        return {
            "method": self.method,
            "lr": self.lr,
            "mean": self.mean,
            "deviation": self.deviation,
            "accuracy": [run.accuracy for run in self.runs],
            "loss": [None if run.diverged else run.loss for run in self.runs],
            "diverged": self.diverged,
        }


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: a network this small gains nothing from more, and loses much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Comparison:
    """The network, its data and the schedule that all methods share."""

    def __init__(
        self,
        network: Callable[[], nn.Module],
        data: Dataset,
        *,
        batch_size: int,
        steps: int,
        backend: str = "inductor",
        device: str = "cpu",
    ) -> None:
        """Compile the network for `DDPNOpt`; the first step does the work.

        Args:
            network: makes the network, which maps inputs to logits, with new random weights at every call.
            data: training and test samples.
            batch_size: samples a step.
            steps: steps a training takes.
            backend: what `torch.compile` is given for `DDPNOpt`'s step.
            device: where networks and batches are.
        """
        self.network, self.data, self.batch_size, self.steps = network, data, batch_size, steps
        self.device = device
        self.controlled = network().to(device)
        self.opt = ddpn_fx.DDPNOpt(ddpn_fx.compile(self.controlled, loss=F.cross_entropy, backend=backend))

    def warm_up(self) -> None:
        """Take one step of `DDPNOpt`, so that compilation is not part of the first training."""
        for x, y in self.data.batches(self.batch_size, 1, device=self.device):
            self.opt.train_step(x, y)

    def trainings(
        self, methods: Iterable[Method], seeds: int, tick: Callable[[int], object] = lambda steps: None
    ) -> Iterator[Summary]:
        """Train with each method and seed, and yield a summary a method; `tick` is told the steps of each training."""
        for method in methods:
            runs = []
            for seed in range(seeds):
                runs.append(self.train(method, seed))
                tick(self.steps)
            yield Summary(method.name, method.lr, tuple(runs))

    def train(self, method: Method, seed: int) -> Run:
        """Train from the weights and with the batches of `seed`; stops at the first loss that is not finite."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network().to(self.device)
        if method.optimizer is None:
            self.controlled.load_state_dict(model.state_dict())
            model, train_step = self.controlled, self._ddpnopt(method)
        else:
            train_step = plain_step(model, method.optimizer(model.parameters(), lr=method.lr))
        loss = float("nan")
        for x, y in self.data.batches(self.batch_size, self.steps, seed=seed, device=self.device):
            loss = float(train_step(x, y))
            if not abs(loss) < float("inf"):
                return Run(seed, accuracy(model, self.data), loss, diverged=True)
        return Run(seed, accuracy(model, self.data), loss, diverged=False)

    def _ddpnopt(self, method: Method) -> TrainStep:
        for group in self.opt.param_groups:
            group["lr"] = method.lr
        return self.opt.train_step


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Accuracy over a data set's test samples in eval mode, in per cent; the model is in training mode afterwards."""
    model.eval()
    with torch.no_grad():
        device = next(model.parameters()).device
        chunks = zip(data.x_test.split(1000), data.y_test.split(1000), strict=True)
        right = sum(int((model(send(x, device)).argmax(1) == send(y, device)).sum()) for x, y in chunks)
    model.train()
    return 100.0 * right / len(data.y_test)


def plain_step(
    forward: Callable[[Tensor], Tensor],
    *optimizers: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> TrainStep:
    """The usual training step: forward, backward, update. It returns the loss before the update, 0-d."""

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = loss(forward(x), y)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        return value.detach()

    return train_step
