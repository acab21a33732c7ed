"""Gamma: the derivative of every column with respect to one parameter, over all of its uses.

``Gamma_t[k]`` is the gradient of ``<S_i[:,c], x_T^i>`` with respect to the control (DESIGN 2.2). A
parameter may be used by several operators (tied weights), each with its rule, and reach an
operator through a parameter-only expression (a transpose, a weight norm). Here these are one linear
map with five faces: ``gram``, ``sketched``, ``contract``, ``inner`` and ``columns``. It is never formed where the
rules avoid it: for a sketch, and with one use, through elements that are only moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ddpn_fx.passes.alike import GRAM, lane
from ddpn_fx.passes.catalogue import enabled
from ddpn_fx.passes.ir import Chain, ParamUse, Stage
from ddpn_fx.passes.linearize import Env, Parameters, rules
from ddpn_fx.passes.numeric import accumulate_dtype, summed, working_dtype
from ddpn_fx.passes.rules import Blocks, Rule
from ddpn_fx.passes.rules.base import along, gram_matrix, product_gram, sketch_of_columns
from ddpn_fx.passes.rules.embedding import lookup_gram
from ddpn_fx.passes.spare import spares

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """One use of the parameter: its stage, the use, which of its arguments, and its rule on this batch."""

    stage: int
    use: ParamUse
    position: int
    rule: Rule

    @property
    def argument(self) -> fx.Node:
        """The operator's argument node that holds the parameter or an expression of it."""
        return self.use.arguments[self.position]


@dataclass
class Gamma:
    """Gamma of one parameter.

    Attributes:
        name: the parameter.
        parameters: the controls' values and parameter-only expressions.
        entries: its uses.
    """

    name: str
    parameters: Parameters
    entries: list[Entry] = field(default_factory=list)

    def gram(self, blocks: Blocks, metric: Any = None, own: Tensor | None = None) -> Tensor:
        """Gamma^T M^-1 Gamma in blocks, for a :class:`~ddpn_fx.passes.metric.Metric` or the identity: (G, n, n).

        With ``own`` that of a bias too (:func:`~ddpn_fx.passes.rules.base.product_gram`): there are :meth:`factors`.
        """
        if metric is None and not enabled("ghost-grams"):
            return gram_matrix(blocks.matrix(self.columns()))
        if metric is not None:
            found = None if metric.sides is None else self._gram_of_sides(blocks, metric.sides, own)
            if found is not None:
                return found
            whitened = getattr(metric, "whitened", None)
            columns = whitened() if whitened else self.columns()
            with lane(GRAM, self.name):
                columns = columns if whitened else metric.whiten(columns)
                return gram_matrix(blocks.matrix(_as_it_lies(columns)))
        if len(self.entries) == 1 and self.entries[0].use.isometry[self.entries[0].position]:
            return self.entries[0].rule.gram(self.entries[0].argument, blocks)
        return gram_matrix(blocks.matrix(self.columns()))

    def _gram_of_sides(self, blocks: Blocks, sides: tuple[Map, Map], own: Tensor | None) -> Tensor | None:
        """The same from products whose sides are mapped, where these are the cheaper way."""
        rows, columns = sides
        factors = self.factors(blocks)
        if factors is not None:
            x, h = (t.to(accumulate_dtype(t.dtype)) for t in factors)
            return product_gram(columns(x), rows(h), blocks, own)
        lookups = self.lookups(blocks)
        if lookups is None:
            return None
        index, h = lookups  # here h is of the second side: of the first, the map is diagonal
        h = columns(h.to(accumulate_dtype(h.dtype)))
        scale = rows(h.new_ones(self.parameters.params[self.name].shape[0]))
        return lookup_gram(index, h * scale[index][:, None, :, None], blocks)

    @property
    def plain(self) -> Gamma:
        """Gamma in the parameter's own coordinates."""
        return self

    def form(self, blocks: Blocks, sketch: int | None = None) -> None:
        """Form the columns of one use now, where these are the cheaper way to K (:meth:`~rules.Rule.form`)."""
        (entry, *others) = self.entries
        if not others and entry.argument.op == "placeholder":
            entry.rule.form(entry.argument, blocks, sketch)

    def factors(self, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """x and h of one use that is a product of both, where they are the cheaper way to K."""
        (entry, *others) = self.entries
        if not enabled("ghost-grams"):
            return None
        return None if others or entry.argument.op != "placeholder" else entry.rule.factors(entry.argument, blocks)

    def positions_of(self) -> int:
        """As :meth:`ddpn_fx.passes.rules.Rule.positions_of`, of one use; 0 of several."""
        (entry, *others) = self.entries
        return 0 if others or entry.argument.op != "placeholder" else entry.rule.positions_of(entry.argument)

    def thinned(self, right: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """As :meth:`ddpn_fx.passes.rules.Rule.thinned`, of one use with :meth:`positions_of`."""
        (entry,) = self.entries
        return entry.rule.thinned(entry.argument, right)

    def lookups(self, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """Index and h of one use that looks its argument up, where they are the cheaper way to K."""
        (entry, *others) = self.entries
        if others or entry.argument.op != "placeholder" or not enabled("ghost-grams"):
            return None
        return entry.rule.lookups(entry.argument, blocks)

    def sketch_work(self, rows: int, columns: int) -> tuple[int, int] | None:
        """As :meth:`ddpn_fx.passes.rules.Rule.sketch_work`, over the uses; None where one is made of columns."""
        found = [
            e.rule.sketch_work(e.argument, rows, columns) if e.argument.op == "placeholder" else None
            for e in self.entries
        ]
        known = [work for work in found if work is not None]
        if len(known) < len(found) or not enabled("ghost-grams"):
            return None
        sketch, formed = (sum(work) for work in zip(*known, strict=True))
        return sketch, formed

    def sketched(self, left: Tensor | None, right: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As :meth:`ddpn_fx.passes.rules.Rule.sketched`, summed over the uses: a sketch is linear in the columns."""
        if not enabled("ghost-grams"):
            return sketch_of_columns(self.columns().to(dtype), left, right)
        return summed(self._entry_sketched(e, left, right, dtype) for e in self.entries)

    def products(self) -> tuple[Tensor, Tensor] | None:
        """As :meth:`ddpn_fx.passes.rules.Rule.products`, of the one use."""
        (entry,) = self.entries
        return entry.rule.products(entry.argument)

    def product_moments(self, coefficient: Tensor, diagonal: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """As :meth:`ddpn_fx.passes.rules.Rule.product_moments`, of the one use."""
        (entry,) = self.entries
        return entry.rule.product_moments(entry.argument, coefficient, diagonal)

    def columns(self) -> Tensor:
        """Gamma itself: (B, R, *M), summed over the uses."""
        return summed(self._entry_columns(e) for e in self.entries)

    def contract(self, omega: Tensor) -> Tensor:
        """Gamma omega, of the parameter's shape; omega: (B, R)."""
        return summed(self._entry_contract(e, omega) for e in self.entries)

    def inner(self, direction: Tensor, *, first_stage: int = 0) -> Tensor | None:
        """Gamma^T D over the uses in stages from ``first_stage`` on: (B, R); None where there is none."""
        entries = [e for e in self.entries if e.stage >= first_stage]
        return summed(self._entry_inner(e, direction) for e in entries) if entries else None

    def _entry_columns(self, entry: Entry) -> Tensor:
        part = entry.rule.dense(entry.argument)
        if entry.argument.op == "placeholder":
            return part
        part = part.to(self.parameters[entry.argument].dtype)
        return self.parameters.pull(entry.argument, part, columns=True)[self.name]

    def _entry_sketched(self, entry: Entry, left: Tensor | None, right: Tensor | None, dtype: torch.dtype) -> Tensor:
        if entry.argument.op == "placeholder":
            return entry.rule.sketched(entry.argument, left, right, dtype)
        return sketch_of_columns(self._entry_columns(entry).to(dtype), left, right)

    def _entry_contract(self, entry: Entry, omega: Tensor) -> Tensor:
        if enabled("kept-gradients") and not (spares() and entry.rule.weighs(entry.argument)):
            part = entry.rule.contract(entry.argument, omega)
        else:
            part = Rule.contract(entry.rule, entry.argument, omega)
        if entry.argument.op == "placeholder":
            return part
        return self.parameters.pull(entry.argument, part.to(self.parameters[entry.argument].dtype))[self.name]

    def _entry_inner(self, entry: Entry, direction: Tensor) -> Tensor:
        pushed = self.parameters.push(entry.argument, self.name, direction)
        if pushed is not None:
            return entry.rule.inner(entry.argument, pushed)
        return along(self._entry_columns(entry), direction)


class Gammas:
    """Gamma of every trained parameter, by name, filled stage by stage as cotangents arrive."""

    def __init__(self, chain: Chain, parameters: Parameters, trained: Iterable[str], batch: int) -> None:
        self.chain, self.parameters, self.trained, self.batch = chain, parameters, set(trained), batch
        self._found: dict[str, Gamma] = {}
        self.dtype = working_dtype(parameters.params[n].dtype for n in self.trained)

    def add(self, stage: Stage, taps: dict[fx.Node, Tensor], env: Env) -> None:
        """Take in the cotangents at the parametrised operators of one stage."""
        for use, rule in rules(self.chain, stage, taps, env, self.parameters, self.batch):
            for position, names in enumerate(use.parameters):
                for name in names:
                    if name in self.trained:
                        gamma = self._found.setdefault(name, Gamma(name, self.parameters))
                        gamma.entries.append(Entry(stage.index, use, position, rule))

    def include(self, gamma: Gamma) -> None:
        """Take in the Gamma of a parameter."""
        self._found[gamma.name] = gamma

    def of(self, names: Iterable[str]) -> Iterator[Gamma]:
        """Those of the named parameters that received a cotangent."""
        return (self._found[n] for n in names if n in self._found)


def _as_it_lies(columns: Tensor) -> Tensor:
    """(B, R, *M) with the dimensions M as they lie in memory: to a Gram their order is nothing, and no copy is made."""
    order = sorted(range(2, columns.dim()), key=columns.stride, reverse=True)
    return columns if order == sorted(order) else columns.permute(0, 1, *order)
