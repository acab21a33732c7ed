"""Ready: what a step takes beside the batch, made once and used for as long as all that it rests on is as it was.

To name the parameters, read the modules' settings (the key of a capture), look the optimizer's state up and ask every
tensor for its layout and memory takes longer than SGD's whole step of a small network. All of it is the same from step
to step, and that it is can be seen at a fraction of the price.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ddpn_fx.batch import autocast
from ddpn_fx.module import REGISTRIES
from ddpn_fx.passes.direct import Direct, settings
from ddpn_fx.passes.lower import Lowered
from ddpn_fx.passes.metric import Site
from ddpn_fx.passes.stacked import Key

_PAIR = pytree.tree_structure((0, 0))


class Given:
    """A batch as handed to ``train_step``.

    Attributes:
        spec: of ``(inputs, target)``.
        leaves: as the user has them.
        tensors: those that are tensors, without the user's autograd graph.
        plain: whether all of these are no more than their memory and layout.
    """

    def __init__(self, inputs: Any, target: Any) -> None:
        if type(inputs) is type(target) is Tensor:  # at a tenth of pytree's price
            self.leaves, self.spec, self._structure = [inputs, target], _PAIR, "pair"
        else:
            self.leaves, self.spec = pytree.tree_flatten((inputs, target))
            self._structure = str(self.spec)
        self.tensors = [normal(t) for t in self.leaves if isinstance(t, Tensor)]
        self.plain = all([type(t) is Tensor and not t.is_conj() and not t.is_neg() for t in self.tensors])

    def key(self) -> tuple[Any, ...]:
        """What a program is chosen by: structure, layouts, constants, and the settings of torch around."""
        about = [
            (type(t), t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else (type(t), repr(t))
            for t in self.leaves
        ]
        kind = self.tensors[0].device.type if self.tensors else "cpu"
        return self._structure, tuple(about), autocast(kind), settings()


def normal(t: Tensor) -> Tensor:
    """The values alone: not an inference tensor, which autograd cannot save, and no part of the user's graph.

    Always another object: a trace takes two inputs that are one object for one.
    """
    return t.clone() if t.is_inference() else t.detach()


class Watch:
    """Entries of mappings, and tensors, as they are now, and whether they still are.

    An entry is as it was if its value is the very same object; a tensor, if it has the same memory, layout and
    ``requires_grad``. A mapping with more or fewer entries is another one. A tensor of a subclass, which may have no
    memory of its own, never is as it was.
    """

    def __init__(self, entries: Iterable[tuple[dict[Any, Any], Iterable[Any]]], tensors: Iterable[Tensor]) -> None:
        found = [(mapping, list(keys)) for mapping, keys in entries]
        self._mappings = [mapping for mapping, _ in found]
        self._sizes = list(map(len, self._mappings))
        self._homes = [mapping for mapping, keys in found for _ in keys]
        self._keys = [key for _, keys in found for key in keys]
        self._values = list(map(dict.get, self._homes, self._keys))
        self._tensors = list(tensors)
        self._plain = all(type(t) in (Tensor, nn.Parameter) for t in self._tensors)
        self._layouts = self._present() if self._plain else []

    def holds(self) -> bool:
        """Whether nothing has changed: loops in C, since this is asked before every step."""
        return (
            self._plain
            and list(map(len, self._mappings)) == self._sizes
            and all(map(is_, map(dict.get, self._homes, self._keys), self._values))
            and self._present() == self._layouts
        )

    def _present(self) -> list[Any]:
        tensors = self._tensors
        return [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors), *map(_ABOUT, tensors)]


_ABOUT = attrgetter("shape", "dtype", "requires_grad")


def entries_of(model: nn.Module) -> Iterator[tuple[dict[Any, Any], Iterable[Any]]]:
    """All that says what a module's forward pass is: settings, hooks, members, parameters, buffers."""
    for module in model.modules():
        own = module.__dict__
        yield own, [name for name in own if name == "training" or name not in REGISTRIES]
        yield from ((own[name], own[name]) for name in _MEMBERS if isinstance(own.get(name), dict))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MEMBERS = ("_parameters", "_buffers", "_modules", *_HOOKS)


def hooked(model: nn.Module) -> bool:
    """Whether the user has hooks on a module or a parameter, which a program does not call."""
    return any(module.__dict__.get(name) for module in model.modules() for name in _HOOKS) or any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()
    )


class Ready:
    """A lowered step bound to weights, buffers and optimizer state.

    Attributes:
        lowered: the step.
        params: all of the model's parameters by name.
        members: the site and the state of each parameter that the preconditioner works on after a step.

    Args:
        lowered: the step.
        params: parameters by name.
        buffers: buffers by name.
        state: what the step reads and writes of the optimizer's state, by its keys.
        members: as the attribute.
        rests_on: mappings, and the keys whose values it rests on.
    """

    def __init__(
        self,
        lowered: Lowered,
        params: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        state: Mapping[Key, Tensor],
        members: Sequence[tuple[Site, dict[str, Any]]],
        rests_on: Iterable[tuple[dict[Any, Any], Iterable[Any]]],
    ) -> None:
        self.lowered, self.params, self.members = lowered, params, members
        names = lowered.signature
        self._before = [*(params[n].detach() for n in names.params), *(buffers[n] for n in names.buffers)]
        self._after = [state[n] for n in names.state]
        self._program: Any = None
        self._homes: set[int] = set()
        self._watch = Watch(rests_on, (*params.values(), *buffers.values()))

    def holds(self) -> bool:
        """Whether all it rests on is as it was."""
        return self._watch.holds()

    def run(self, given: Given, vector: Tensor) -> Tensor:
        """The statistics vector of one step on a batch; the rest is written in place."""
        flat = self._flat(given, vector)
        if self._program is not None and self._apart(given):
            return self._program(*flat)[0]
        run = self.lowered.run
        (values,) = run(*flat)
        if isinstance(run, Direct):
            self._program = run.program(flat)
        if self._program is not None:
            self._homes = {t.untyped_storage().data_ptr() for t in (*self._before, *self._after)}
        return values

    def _apart(self, given: Given) -> bool:
        """Whether the batch is in memory of its own, so that what held for the first one holds for it."""
        return given.plain and all([t.untyped_storage().data_ptr() not in self._homes for t in given.tensors])

    def first(self, given: Given) -> tuple[list[Tensor], list[Tensor]]:
        """The model's outputs, and what the second half reads of what made them, these included; nothing is written."""
        halves = self.lowered.halves
        assert halves is not None
        results = halves.first(self._flat(given, None))
        return results[: halves.outputs], [t.detach() for t in results]

    def second(self, given: Given, handed: list[Tensor], vector: Tensor) -> Tensor:
        """The statistics vector of the step whose first half has run; the rest is written in place.

        The list is empty afterwards.
        """
        halves = self.lowered.halves
        assert halves is not None
        (values,) = halves.second(self._flat(given, vector), handed)
        return values

    def _flat(self, given: Given, vector: Tensor | None) -> list[Any]:
        return [*self._before, *given.tensors, vector, *self._after]
