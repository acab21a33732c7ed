"""Metric: the matrix M_t of a control (Table 2), as what the recursion needs of it.

``K_t = Gamma_t^T M_t^-1 Gamma_t`` and ``du = -eta M_t^-1 d``: so a metric has two faces, ``whiten`` (a
linear map W with ``W^T W = M^-1``, applied to Gamma's columns) and ``solve``. A metric that is a
product of a map on rows and one on columns also says these (``sides``): then K of an outer product
needs no per-sample gradient. Which M, a preconditioner decides (``ddpn_fx.preconditioners``), from
what :class:`Moment` offers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from ddpn_fx.passes.gamma import Gamma, Map
from ddpn_fx.passes.ir import Chain, ParamUse
from ddpn_fx.passes.rewrites.moves import behind, follow
from ddpn_fx.passes.rules import rule_by_name


class Metric(Protocol):
    """M of one parameter of shape M (the tuple), or in its frame, where it has one: then (O, I) stands for M.

    It may also have ``whitened() -> (B, R, any shape)``: ``whiten`` of the columns of its moment's Gamma, where there
    is a cheaper way than through these; and ``diagonals``, (O,) and (I,) of ``M = diag(rows) (x) diag(columns)``, of
    which K may be sketched (:mod:`ddpn_fx.passes.sketch`).
    """

    def solve(self, direction: Tensor) -> Tensor:
        """M^-1 times a direction: (*M) -> (*M)."""
        ...

    def whiten(self, columns: Tensor) -> Tensor:
        """W times columns, ``W^T W = M^-1``: (B, R, *M) -> (B, R, any shape of as many elements)."""
        ...

    @property
    def sides(self) -> tuple[Map, Map] | None:
        """W as maps of (..., rows) and (..., columns) vectors, where it is a product of two, else None.

        Of a site that is ``one_hot`` the map of rows is diagonal: K is found from its values at ones.
        """
        ...


@dataclass(frozen=True)
class Site:
    """One parameter as a preconditioner sees it.

    Attributes:
        name: the parameter.
        shape: its shape.
        groups: S, where it is used once, as S products of ``rows`` outputs and ``columns`` inputs; 0 where not.
        rows: elements of one group's first side.
        columns: elements of one group's second side.
        one_hot: the first side is an index (an embedding's): its second moment is diagonal.
        categories: the first side is a list, whose entries have no neighbours: an embedding's indices, or the classes
            that a linear layer gives a cross entropy, whichever other uses there are.
    """

    name: str
    shape: tuple[int, ...]
    groups: int = 0
    rows: int = 0
    columns: int = 0
    one_hot: bool = False
    categories: bool = False


def sites(chain: Chain, params: Mapping[str, Tensor]) -> dict[str, Site]:
    """The site of every control of a chain."""
    uses: dict[str, list[tuple[Any, int]]] = {}
    for stage in chain.stages:
        for use in stage.uses:
            for position, names in enumerate(use.parameters):
                for name in names:
                    uses.setdefault(name, []).append((use, position))
    found, head = {}, _head(chain)
    for name in chain.parameter_names:
        shape = tuple(params[name].shape)
        categories = len(shape) > 1 and any(_counts_categories(use, position, head) for use, position in uses[name])
        site = Site(name, shape, categories=categories)
        if len(uses[name]) == 1 and len(shape) > 1:
            use, position = uses[name][0]
            argument = use.arguments[position]
            if argument.op == "placeholder":
                groups = rule_by_name(use.rule).product_groups(use.node, argument)
                if groups:
                    rows = shape[0] // groups
                    columns = int(torch.Size(shape[1:]).numel())
                    site = Site(name, shape, groups, rows, columns, use.rule == "embedding", categories)
        found[name] = site
    return found


def _head(chain: Chain) -> fx.Node | None:
    """The linear layer whose outputs are the classes of the loss, a cross entropy."""
    loss = chain.loss_node
    if loss is None or loss.target is not torch.ops.aten.cross_entropy_loss.default:
        return None
    logits = cast(fx.Node, loss.args[0])
    node, moves = behind(logits, casts=True)
    if node.target is not torch.ops.aten.linear.default:
        return None
    of_classes = min(1, logits.meta["val"].dim() - 1)
    return node if follow(moves, node.meta["val"].dim() - 1) == of_classes else None


def _counts_categories(use: ParamUse, position: int, head: fx.Node | None) -> bool:
    """Whether the rows of a parameter are an embedding's indices or the classes."""
    argument = use.arguments[position]
    table = use.rule == "embedding" or (use.node is head and argument is use.node.args[1])
    return table and argument.op == "placeholder"


@dataclass
class Moment:
    """What a preconditioner makes a metric from, in one step, for one parameter.

    Attributes:
        site: the parameter.
        direction: Q_u (with l_u), of the parameter's shape or in its frame.
        step: 0-d, how many steps there were with this one.
        dtype: what moments are kept in: float32, or float64 for a float64 model.
        of_samples: the parameter's Gamma and ``coefficient``; None where the batch has come in parts, of whose samples
            nothing is left (:mod:`ddpn_fx.passes.parts`), and in a lagged step.
    """

    site: Site
    direction: Tensor
    step: Tensor
    dtype: torch.dtype
    of_samples: tuple[Gamma, Tensor] | None

    @property
    def gamma(self) -> Gamma:
        """The parameter's Gamma."""
        return self._of_samples[0]

    @property
    def coefficient(self) -> Tensor:
        """(B, R): V_x of sample i is ``sum_c coefficient[i, c] Z[i, c]``.

        It is of the sample's own loss: B times its share of the batch's loss, which is taken for a mean.
        """
        return self._of_samples[1]

    @property
    def _of_samples(self) -> tuple[Gamma, Tensor]:
        if self.of_samples is None:
            raise ValueError(
                f"DDPNOpt: the preconditioner makes the metric of {self.site.name!r} from single samples, of which "
                "nothing is left when a batch comes in parts (accumulate=, process_group=); take one that is made of "
                "the gradient: 'diagonal', 'factored' or 'eigen-factored'"
            )
        return self.of_samples

    @cached_property
    def samples(self) -> Tensor:
        """(B, *M): Q_u of each sample's own loss."""
        columns = self.gamma.columns().to(self.dtype)
        return torch.einsum("br,br...->b...", self.coefficient.to(self.dtype), columns)

    def second_moments(self, diagonal: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """E[V_h V_h^T] and E[x x^T] of the two sides of a product: (S, rows, rows), (S, columns, columns).

        Args:
            diagonal: for each side, whether its diagonal alone is wanted: (S, rows), (S, columns).
        """
        return self.gamma.product_moments(self.coefficient.to(self.dtype), diagonal)


class Preconditioner(Protocol):
    """What makes M (``ddpn_fx.preconditioners``); hashable, since another one is another program.

    It may have ``frame(site, slots) -> Frame | None``: coordinates in which a parameter's directions, its metric, and
    the averages of momentum and beta1 are (:mod:`ddpn_fx.passes.frame`); ``refresh`` then turns these averages as well.
    It may have ``refresh_all(members, step)``, which takes the place of ``refresh``: of all parameters at once, each a
    (site, state), so that what is alike is worked out together.
    It may have ``exact_every``, k, and ``kept(site, state, step) -> Metric``, the metric of what is kept after so many
    steps, 0-d: then all but every k-th step have K in that (:mod:`ddpn_fx.passes.moments`).
    It may say ``needs_samples``, True where it reads a moment's ``samples``, ``second_moments`` or ``gamma``: then no
    batch comes in parts.
    It may say ``default_lr``, ``default_beta1``, ``default_nesterov``, ``default_coupling`` and ``default_sketch``,
    DDPNOpt's where it is given None; else they are 1.0, 0.0, False, ``"batch"`` and None.
    It may say ``sketches``: the metric of a parameter of two dimensions or more has ``diagonals``.
    ``moments``: ``"gradient"``: from Gamma b_T; ``"value"``: from V of the recursion, Gamma b_{t+1} (the paper).
    """

    @property
    def moments(self) -> str:
        """Where Q_u and V come from."""
        ...

    def state(self, site: Site, like: Tensor) -> dict[str, Tensor]:
        """Initial tensors that are kept for a parameter from step to step, by slot, on the device of ``like``."""
        ...

    def metric(self, moment: Moment, state: Mapping[str, Tensor]) -> tuple[Metric, dict[str, Tensor]]:
        """The metric of this step, with the batch at hand in it, and the new state."""
        ...

    def refresh(self, site: Site, state: dict[str, Tensor], step: int) -> None:
        """Work on the state that is not done in every step, in place, after step number ``step``."""
        ...
