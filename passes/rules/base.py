"""The rule's interface, the generic rule's mathematics, and the blocks of a coupling.

Shapes: B batch, R columns, N = B R, G blocks of g samples, n = g R; M a parameter's shape.
Cotangents come as ``(R, *output.shape)``; a rule hands out Gamma's columns as ``(B, R, *M)``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ddpn_fx.passes.ir import Layout
from ddpn_fx.passes.numeric import accumulate_dtype, real, worked_out


@dataclass(frozen=True)
class Blocks:
    """The blocks of a coupling: G groups of g consecutive samples, each with R columns.

    The last group may be smaller than g; it is padded with zero columns, which every formula of
    the recursion leaves zero.
    """

    batch: int
    columns: int
    group: int

    @property
    def count(self) -> int:
        """G, the number of blocks."""
        return math.ceil(self.batch / self.group)

    @property
    def size(self) -> int:
        """n, the columns of one block."""
        return self.group * self.columns

    def split(self, t: Tensor) -> Tensor:
        """(B, ...) -> (G, g, ...), padded with zeros."""
        missing = self.count * self.group - self.batch
        if missing:
            t = torch.cat([t, t.new_zeros(missing, *t.shape[1:])])
        return t.reshape(self.count, self.group, *t.shape[1:])

    def columns_of(self, t: Tensor) -> Tensor:
        """(B, R, ...) -> (G, n, ...)."""
        return self.split(t).flatten(1, 2)

    def matrix(self, t: Tensor) -> Tensor:
        """(B, R, *M) -> (G, n, M flattened); M may be a scalar's."""
        columns = self.columns_of(t)
        return columns.reshape(*columns.shape[:2], -1)

    def merge(self, t: Tensor) -> Tensor:
        """(G, n) -> (B, R)."""
        return t.reshape(-1, self.columns)[: self.batch]


def vjp(function: Callable[..., Any], *primals: Tensor) -> tuple[Any, Callable[..., Any]]:
    """``torch.func.vjp`` without ``has_aux``: the value and its pullback (torch types it as two values or three)."""
    return cast(tuple[Any, Callable[..., Any]], torch.func.vjp(function, *primals))


def torchs_own(node: fx.Node) -> bool:
    """Whether an operator's backward is torch's. A user's own may detach what it is given: it has no true adjoint."""
    return node.target is operator.getitem or getattr(node.target, "namespace", None) in ("aten", "prims")


def change(function: Callable[[Tensor], Any], primal: Tensor, direction: Tensor) -> Tensor | None:
    """The value's change along a direction, by the adjoint of its pullback; None where torch has no derivative of that.

    Of :func:`torchs_own` operators. Not by forward derivatives: where an operator's pullback is not their adjoint (an
    embedding's padding) the gradient is what the pullback says.
    """
    like = torch.zeros_like(function(primal))
    try:
        _, push = vjp(lambda cotangent: vjp(function, primal)[1](cotangent)[0], like)
        return cast(Tensor, push(direction.to(primal.dtype))[0])
    except NotImplementedError:
        return None


def along(columns: Tensor, direction: Tensor) -> Tensor:
    """Gamma^T D as one product with the columns: (B, R, *M), (*M) -> (B, R), in the accumulation dtype."""
    columns, direction = real(columns), real(direction)
    dtype = accumulate_dtype(columns.dtype)
    return columns.reshape(*columns.shape[:2], -1).to(dtype) @ direction.flatten().to(dtype)


def batch_first(t: Tensor, layout: Layout, batch: int, at: int = 0) -> Tensor:
    """Bring a value with ``at`` leading dimensions to (*leading, B, outer * inner, ...)."""
    t = t.movedim(layout.dim + at, at)
    if layout.outer == 1:
        return t.unflatten(at, (batch, layout.inner))
    return t.unflatten(at, (layout.outer, batch, layout.inner)).transpose(at, at + 1).flatten(at + 1, at + 2)


def batch_last(t: Tensor, layout: Layout) -> Tensor:
    """The inverse of :func:`batch_first`, without leading dimensions."""
    if layout.outer == 1:
        return t.flatten(0, 1).movedim(0, layout.dim)
    return t.unflatten(1, (layout.outer, layout.inner)).transpose(0, 1).flatten(0, 2).movedim(0, layout.dim)


class Rule:
    """Gamma of one parametrised operator on one batch (the generic rule).

    Args:
        node: the operator.
        values: every argument node's value, batch and parameters at once.
        cotangent: (R, *output.shape), the cotangents at the operator's output.
        arguments: the parameter-only argument nodes.
        layouts: argument or operator node -> where the batch lies.
        batch: B.
    """

    name: ClassVar[str] = "generic"

    def __init__(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        cotangent: Tensor,
        arguments: Sequence[fx.Node],
        layouts: dict[fx.Node, Layout],
        batch: int,
    ) -> None:
        self.node, self.values, self.arguments = node, values, tuple(arguments)
        self.cotangent, self.layouts, self.batch = cotangent, layouts, batch
        self.columns = cotangent.shape[0]
        self._dense: dict[fx.Node, Tensor] = {}

    @classmethod
    def matches(cls, node: fx.Node, arguments: Sequence[fx.Node]) -> bool:
        """Whether the rule serves this use of the operator."""
        return True

    @classmethod
    def product_groups(cls, node: fx.Node, argument: fx.Node) -> int:
        """S, where the columns are S sums of outer products, rows x columns of the argument each; 0 where not."""
        return 0

    def product_moments(
        self, argument: fx.Node, coefficient: Tensor, diagonal: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """E[V_h V_h^T] (over samples, summed over positions) and E[x x^T] (over both) of an argument's products.

        Args:
            argument: one with :meth:`product_groups`.
            coefficient: (B, R): ``V_h = sum_c coefficient[:, c] h[c]``; its dtype is that of the moments.
            diagonal: for either side whether its diagonal alone is wanted.

        Returns:
            (S, rows, rows) or (S, rows); (S, columns, columns) or (S, columns).
        """
        raise NotImplementedError

    def products(self, argument: fx.Node) -> tuple[Tensor, Tensor] | None:
        """x (B, S, P, I) and h (B, R, S, P, O) of an argument with :meth:`product_groups`; None where x is an index."""
        return None

    def factors(self, argument: fx.Node, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """x (B, P, I) and h (B, R, P, O) of an argument's products; None where its columns are the cheaper way to K."""
        return None

    def positions_of(self, argument: fx.Node) -> int:
        """P of an argument whose columns are sums of P outer products, from shapes alone; 0 of any other."""
        return 0

    def thinned(self, argument: fx.Node, right: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """x times ``right`` (B, P, s) and h (B, R, P, O); None where columns are at hand, cheaper, or the only way.

        Args:
            argument: of two dimensions or more.
            right: (I, s), I in the order S, C (kernel before channels); None: the identity.
        """
        return None

    def lookups(self, argument: fx.Node, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
        """Indices (B, P) and h (B, R, P, O) where x is an index; None where columns are the cheaper way to K."""
        return None

    def sketch_work(self, argument: fx.Node, rows: int, columns: int) -> tuple[int, int] | None:
        """Multiply-adds of one sample's :meth:`sketched` and of its columns, by shapes alone; None: it is of these."""
        return None

    def sketched(self, argument: fx.Node, left: Tensor | None, right: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``left^T G right`` of every column G as a matrix: (B, R, s_1, s_0).

        Args:
            argument: of two dimensions or more.
            left: (O, s_0); None: the identity.
            right: (I, s_1), I in the order S, C (kernel before channels); None: the identity.
            dtype: of the result.
        """
        thinned = self.thinned(argument, right)
        if thinned is None:
            return sketch_of_columns(self.dense(argument).to(dtype), left, right)
        x, h = (t.to(dtype) for t in thinned)
        return torch.einsum("bpi,brpo->brio", x, times(h, left))

    def gram(self, argument: fx.Node, blocks: Blocks) -> Tensor:
        """K = Gamma^T Gamma in blocks: (G, n, n)."""
        return gram_matrix(blocks.matrix(self._formed(argument)))

    def contract(self, argument: fx.Node, omega: Tensor) -> Tensor:
        """Gamma omega, of the argument's shape; omega: (B, R). One VJP of the whole batch."""
        value = self.values[argument]
        _, pull = vjp(lambda p: self._apply(self.values, {argument: p}), value)
        return pull(self.weighted(omega))[0]

    def form(self, argument: fx.Node, blocks: Blocks, sketch: int | None = None) -> None:
        """Form the columns now if they are the cheaper way to K, so that a contraction before it uses them too.

        With ``sketch``, if they are the cheaper way to two contractions and a sketch of so many columns.
        """

    def weighs(self, argument: fx.Node) -> bool:
        """Whether columns take more than half of the memory of the cotangents that a contraction else is made of."""
        return 2 * self.batch * self.columns * self.values[argument].numel() > self.cotangent.numel()

    def contract_columns(self, argument: fx.Node, omega: Tensor) -> Tensor:
        """Gamma omega as one product with the columns, for a rule that has formed them or whose are small."""
        columns, value = self._formed(argument), self.values[argument]
        dtype = accumulate_dtype(columns.dtype)
        flat = omega.reshape(1, -1).to(dtype) @ columns.reshape(omega.numel(), -1).to(dtype)
        return self._ordered(flat.reshape(columns.shape[2:]), argument).to(value.dtype)

    def inner(self, argument: fx.Node, direction: Tensor) -> Tensor:
        """Gamma^T D: (B, R) for a direction D of the argument's shape. The output's change along D, or the columns."""
        if argument not in self._dense and torchs_own(self.node):
            moved = change(lambda p: self._apply(self.values, {argument: p}), self.values[argument], direction)
            if moved is not None:
                return self._by_output(moved)
        return self.inner_columns(argument, direction)

    def inner_columns(self, argument: fx.Node, direction: Tensor) -> Tensor:
        """Gamma^T D as one product with the columns, for a rule that has formed them or whose are small."""
        return along(self.dense(argument), direction)

    def _by_output(self, moved: Tensor) -> Tensor:
        """<h, change of the output> of every sample and column: (B, R)."""
        layout = self.layouts[self.node]
        h = real(batch_first(self.cotangent, layout, self.batch, at=1))
        moved = real(batch_first(moved, layout, self.batch))
        dtype = accumulate_dtype(h.dtype)
        products = h.to(dtype) * moved.to(dtype)
        return products.reshape(*products.shape[:2], -1).sum(-1).mT

    def dense(self, argument: fx.Node) -> Tensor:
        """Gamma's columns: (B, R, *M)."""
        return self._ordered(self._formed(argument), argument)

    def element_order(self, argument: fx.Node) -> Sequence[int]:
        """The dimensions of the argument in the order in which the columns are formed: for a Gram any will do."""
        return range(self.values[argument].dim())

    def _formed(self, argument: fx.Node) -> Tensor:
        """The columns as they are formed, (B, R, *M in :meth:`element_order`), once."""
        if argument not in self._dense:
            self._dense[argument] = self._columns(argument)
        return self._dense[argument]

    def _ordered(self, t: Tensor, argument: fx.Node) -> Tensor:
        """(..., *M in :meth:`element_order`) -> (..., *M)."""
        order, leading = list(self.element_order(argument)), t.dim() - self.values[argument].dim()
        if order == sorted(order):
            return t
        return t.permute(*range(leading), *(leading + order.index(d) for d in range(len(order))))

    def weighted(self, omega: Tensor) -> Tensor:
        """sum_c omega_ic h[i, c]: the cotangents weighted and summed over columns, in the output's layout."""
        layout = self.layouts[self.node]
        h = batch_first(self.cotangent, layout, self.batch, at=1)
        scale = omega.to(h.dtype).mT.reshape(self.columns, self.batch, *([1] * (h.dim() - 2)))
        weighted = (h * scale).sum(0) if self.columns > 1 else (h * scale)[0]
        return batch_last(weighted, layout)

    def _columns(self, argument: fx.Node) -> Tensor:
        """(B, R, *M in :meth:`element_order`). Per-sample VJP: vmap over samples and columns, on a batch of one."""
        mapped = [
            n
            for n in self.node.all_input_nodes
            if n in self.layouts and n not in self.arguments and isinstance(self.values[n], Tensor)
        ]
        samples = [batch_first(self.values[n], self.layouts[n], self.batch) for n in mapped]
        h = batch_first(self.cotangent, self.layouts[self.node], self.batch, at=1).movedim(0, 1)
        value = self.values[argument]
        single = _single_sample_sizes(self.node, self.values, self.batch)

        def columns(h_i: Tensor, *x_i: Tensor) -> Tensor:
            sample = {**self.values, **single}
            for n, x in zip(mapped, x_i, strict=True):
                sample[n] = x.movedim(0, self.layouts[n].dim)
            _, pull = vjp(lambda p: self._apply(sample, {argument: p}), value)
            return torch.func.vmap(lambda c: pull(c.movedim(0, self.layouts[self.node].dim))[0])(h_i)

        return torch.func.vmap(columns)(h, *samples)

    def _apply(self, values: dict[fx.Node, Any], replaced: dict[fx.Node, Tensor]) -> Tensor:
        def lookup(n: fx.Node) -> Any:
            return replaced[n] if n in replaced else values[n]

        assert callable(self.node.target)
        return self.node.target(*fx.node.map_arg(self.node.args, lookup), **fx.node.map_arg(self.node.kwargs, lookup))


def _single_sample_sizes(node: fx.Node, values: dict[fx.Node, Any], batch: int) -> dict[fx.Node, Any]:
    """Size arguments of the operator that count the batch, for a batch of one."""
    found: dict[fx.Node, Any] = {}
    for n in node.all_input_nodes:
        value = n.meta.get("val")
        if isinstance(values.get(n), int) and isinstance(value, torch.SymInt):
            expr = value.node.expr
            found[n] = int(expr.subs({s: 1 for s in expr.free_symbols}))
    return found


# Least rows of a Gram that is worked out in halves, and least elements of a row: with fewer the copy takes longer.
_LEAST_HALVED, _LEAST_LENGTH = 128, 128


def gram_matrix(columns: Tensor) -> Tensor:
    """(G, n, m) -> (G, n, n), in the accumulation dtype; one block is a plain product, faster than a batched one."""
    columns = columns.to(accumulate_dtype(columns.dtype))
    return _symmetric(columns[0])[None] if columns.shape[0] == 1 else columns @ columns.mT


def _symmetric(rows: Tensor) -> Tensor:
    """``rows @ rows.mT``: (n, m) -> (n, n). Many long rows go by halves on a CPU; what is below the diagonal is a copy.

    BLAS has a product for that, but no operator of a graph reaches it.
    """
    half = rows.shape[0] // 2
    if 2 * half < _LEAST_HALVED or rows.shape[1] < _LEAST_LENGTH or rows.device.type != "cpu":
        return rows @ rows.mT
    above, below = rows[:half], rows[half:]
    cross = above @ below.mT
    return torch.cat([torch.cat([_symmetric(above), cross], 1), torch.cat([cross.mT, _symmetric(below)], 1)])


def second_moment(vectors: Tensor, diagonal: bool) -> Tensor:
    """(S, n, d) -> (S, d, d), or (S, d) of the diagonal: the sum of outer products."""
    return (vectors * vectors).sum(1) if diagonal else vectors.mT @ vectors


def positions(t: Tensor, layout: Layout, batch: int, at: int = 0) -> Tensor:
    """(*leading, B, P, features): everything between the batch and the last dimension flattened to P."""
    t = batch_first(t, layout, batch, at)
    return t.reshape(*t.shape[: at + 1], -1, t.shape[-1])


def product_gram(x: Tensor, h: Tensor | None, blocks: Blocks, own: Tensor | None = None) -> Tensor:
    """K of outer products sum_p x_p (x) h_p, from Grams of x and h or from the products, whichever is cheaper.

    Args:
        x: (B, P, I).
        h: (B, R, P, O).
        blocks: the coupling.
        own: (B,), with one position: the squares of what a bias has for h, summed over columns. Then K is with that of
            the bias, as one more input of each sample (:mod:`ddpn_fx.passes.beside`).
    """
    assert h is not None
    dtype = accumulate_dtype(x.dtype)
    x, h = x.to(dtype), h.to(dtype)
    (_, p, i), (_, r, _, o) = x.shape, h.shape
    g = blocks.group
    if p == 1:
        gx = blocks.split(x[:, 0])
        gh = blocks.columns_of(h[:, :, 0])
        gram_x, gram_h = gram_matrix(gx), gram_matrix(gh)
        if own is not None:
            present = (h * h).flatten(1).sum(1)
            e = blocks.split(worked_out(torch.where(present > 0, own.to(dtype) / present, 0.0).sqrt()))
            gram_x = gram_x + e[:, :, None] * e[:, None]
        if r == 1:
            return gram_x * gram_h
        count = blocks.count
        # As long as the rows of h's: an index that is divided by r for each entry of K keeps its kernel from vectors.
        repeated = worked_out(gram_x[..., None].expand(count, g, g, r).reshape(count, g, 1, g * r))
        return (gram_h.view(count, g, r, g * r) * repeated).reshape(count, g * r, g * r)
    if prefer_grams(p, i, o, g, r):
        flat_x = blocks.split(x).flatten(1, 2)
        flat_h = blocks.columns_of(h).flatten(1, 2)
        count = blocks.count
        gram_x = gram_matrix(flat_x).view(count, g, 1, p, g, 1, p)
        gram_h = gram_matrix(flat_h).view(count, g, r, p, g, r, p)
        return (gram_x * gram_h).sum((3, 6)).reshape(count, g * r, g * r)
    return gram_matrix(blocks.matrix(torch.einsum("brpo,bpi->broi", h, x)))


def sketch_of_columns(columns: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """:meth:`Rule.sketched` from the columns, (B, R, O, C, *S)."""
    matrices = columns.reshape(*columns.shape[:4], -1).mT.flatten(-2)
    return times(times(matrices, right).mT, left)


def times(t: Tensor, side: Tensor | None) -> Tensor:
    """(..., n) times (n, s), as one product; None: the identity."""
    return t if side is None else (t.reshape(-1, t.shape[-1]) @ side).reshape(*t.shape[:-1], -1)


def prefer_grams(p: int, i: int, o: int, g: int, r: int) -> bool:
    """Whether Grams over positions cost less than per-sample products, in multiply-adds of one block."""
    grams = (g * p) ** 2 * (i + r * r * o + r * r)
    products = g * r * p * i * o + (g * r) ** 2 * i * o
    return grams < products


def spatial_columns(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Patches of a 2-D convolution's input: (B, C kh kw, L)."""
    return F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
