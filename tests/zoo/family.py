"""What a model family of the zoo is, and the registry that the topic files fill.

A family is a tiny model of a kind that people train, with its data and its loss. Everything is float64 and seeded, so
that the checks can compare to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

Draw = Callable[[torch.Generator, int], tuple[Any, Any]]


@dataclass(frozen=True)
class Family:
    """One model family.

    build: the freshly initialised module. draw: (generator, batch size) -> (inputs, target), target None for loss=None.
    loss: (output, target) -> scalar, or None where the module returns its loss. kind and options: the oracle's.
    terminal: the terminal factor of the Gauss-Newton check. curvature: for a loss that is not known.
    mixes: samples mix, through batch statistics ("statistics") or otherwise ("other"): no dense check.
    logits: for loss=None, (model, inputs) -> (x_T, target, oracle.Loss) where the loss is a known one.
    noisy: draws random numbers; the checks that need equal streams run with them off (`quiet`).
    tolerance: None for float64's, else of a model that leaves float64 somewhere.
    without: check -> why it does not apply.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Draw
    loss: Callable[..., Tensor] | None
    kind: str = "cross_entropy"
    terminal: str = "bound"
    curvature: float | None = None
    mixes: str = ""
    logits: Callable[[nn.Module, Any], tuple[Tensor, Tensor, Any]] | None = None
    noisy: bool = False
    slow: bool = False
    train: bool = True
    tolerance: float | None = None
    without: Mapping[str, str] = field(default_factory=dict)

    def model(self, seed: int = 0) -> nn.Module:
        """The module in float64; no parameter is at a special value (a zero scale hides what it multiplies)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build()
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.05 * torch.randn_like(p))
        return module.double().train(self.train)

    def sample(self, batch: int = 4, seed: int = 0) -> tuple[Any, Any]:
        """(inputs, target) of a batch, floats in float64."""
        drawn = self.draw(torch.Generator().manual_seed(seed), batch)
        widen = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        inputs, target = pytree.tree_map(widen, drawn)
        return inputs, target

    def objective(self, model: nn.Module, inputs: Any, target: Any) -> Tensor:
        """The scalar loss, in eager."""
        output = call(model, inputs)
        if self.loss is not None:
            return self.loss(output, target)
        return next(t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())


@dataclass(frozen=True)
class Refusal:
    """A model that cannot be served: the error's class and a pattern of its message."""

    name: str
    build: Callable[[], nn.Module]
    draw: Draw
    loss: Callable[..., Tensor] | None
    error: type[Exception]
    match: str
    options: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {}
REFUSALS: dict[str, Refusal] = {}


def family(name: str, draw: Draw, loss: Callable[..., Tensor] | None, **options: Any) -> Callable[[Any], Any]:
    """Register what is decorated (a module class or a function that builds one) as a family."""

    def register(build: Any) -> Any:
        if name in FAMILIES:
            raise ValueError(f"two families are called {name!r}")
        FAMILIES[name] = Family(name, build, draw, loss, **options)
        return build

    return register


def refusal(name: str, draw: Draw, loss: Any, error: type[Exception], match: str, **options: Any) -> Callable[..., Any]:
    """Register what is decorated as a model whose refusal is expected."""

    def register(build: Any) -> Any:
        REFUSALS[name] = Refusal(name, build, draw, loss, error, match, options)
        return build

    return register


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call with a tensor, a tuple of positional arguments or a dict of keywords."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def quiet(module: nn.Module) -> nn.Module:
    """Random draws off, in place: dropout probabilities and every attribute `noise` to 0."""
    for m in module.modules():
        for name in ("p", "dropout", "dropout_p", "attn_dropout", "noise", "drop_prob", "attention_dropout"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)
    return module


# --- data -----------------------------------------------------------------------------------------------------------


def vectors(*shape: int, classes: int = 3) -> Draw:
    """Normal inputs of a shape, class labels."""
    return lambda g, b: (torch.randn(b, *shape, generator=g), torch.randint(classes, (b,), generator=g))


def regression(*shape: int, out: tuple[int, ...] = (2,)) -> Draw:
    """Normal inputs, normal targets."""
    return lambda g, b: (torch.randn(b, *shape, generator=g), torch.randn(b, *out, generator=g))


def reconstruction(*shape: int) -> Draw:
    """The input is the target."""

    def draw(g: torch.Generator, b: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(b, *shape, generator=g)
        return x, x

    return draw


def images(size: int = 8, channels: int = 3, classes: int = 3) -> Draw:
    """Square images with class labels."""
    return vectors(channels, size, size, classes=classes)


def tokens(length: int = 5, vocabulary: int = 7, classes: int | None = None) -> Draw:
    """Sequences of tokens; the target is the next token at each position, or a class."""

    def draw(g: torch.Generator, b: int) -> tuple[Tensor, Tensor]:
        t = torch.randint(vocabulary, (b, length + 1), generator=g)
        return t[:, :-1], (t[:, 1:] if classes is None else torch.randint(classes, (b,), generator=g))

    return draw


# --- losses ---------------------------------------------------------------------------------------------------------

CE = F.cross_entropy
MSE = F.mse_loss
BCE = F.binary_cross_entropy_with_logits


def positions(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy at each position of (B, P, C)."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())
