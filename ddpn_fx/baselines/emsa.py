"""E-MSA: the extended method of successive approximations (Li, Chen, Tai, E 2017), on a compiled net's chain.

Pontryagin's principle, written for a minimum: with the costate ``p_T = grad phi``, ``p_t = grad_x H_t`` and the
Hamiltonian ``H_t(x, p, u) = <p, f_t(x, u)>``, an optimal u_t minimises H_t along the optimal trajectory. The method of
successive approximations simulates, solves the costates backward, and minimises H_t in u_t for every stage by itself.
That diverges where the new u leaves the trajectory behind, so the extended Hamiltonian holds it: with sample i of B,

    1/B sum_i  <p_{t+1}, f_t(x_t, u)> + rho/2 |x_{t+1} - f_t(x_t, u)|^2 + rho/2 |p_t - grad_x H_t(x_t, p_{t+1}, u)|^2

is minimised over u by a few iterations of L-BFGS. At the present u_t both penalties and their gradients are zero: the
first direction is the gradient of the loss, whatever rho. (Li et al. write H, p with the other sign, and maximise.)

x_0 is data and no state of the chain, so the first stage has no third term. p here is the costate of a sample's own
loss, B times that of the batch's mean, so that rho has the same weight at every batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ddpn_fx.baselines.stages import Baseline, BatchStages, State, floating, number, replaced
from ddpn_fx.module import CompiledModule

Program = Callable[..., list[Tensor]]


class EMSA(Baseline):
    """Extended method of successive approximations, mini-batches in the place of the whole data set.

    Args:
        net: what :func:`ddpn_fx.compile` returned, with its loss.
        rho: weight of the two penalties, which hold the new trajectory and costates near the present ones. The larger,
            the shorter the step.
        iterations: of L-BFGS, for each stage and batch (10 in the paper's comparison).
        line_search: ``"strong_wolfe"``, as in L-BFGS-B of the authors' program, or None: steps of 1.

    Raises:
        TypeError: ``net`` is no compiled module.
        ValueError: rho is negative, there is no iteration, or the line search is unknown.

    A step simulates, solves the costates, and minimises every stage's extended Hamiltonian on one batch; a stage whose
    minimisation ends in a number that is not finite keeps its control.

    Source: Li, Chen, Tai, E: Maximum principle based algorithms for deep learning, JMLR 18 (2017), Alg. 2; the row
    "E-MSA" of the paper's Table 3.
    """

    def __init__(
        self, net: CompiledModule, *, rho: float = 10.0, iterations: int = 10, line_search: str | None = "strong_wolfe"
    ) -> None:
        super().__init__(net)
        self.rho = number("EMSA", "rho", rho, least=0.0, open_=False)
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"EMSA: iterations={iterations!r} must be an integer of at least 1")
        if line_search not in (None, "strong_wolfe"):
            raise ValueError(f"EMSA: line_search={line_search!r} must be 'strong_wolfe' or None")
        self.iterations, self.line_search = iterations, line_search
        self._programs: dict[Any, tuple[Any, Program]] = {}

    def _step(self, call: str, inputs: Any, target: Any) -> Tensor:
        """Simulate, solve the costates, and minimise every stage's extended Hamiltonian."""
        stages = BatchStages(call, self.net, inputs, target)
        with torch.enable_grad():
            states, costates, loss = trajectory(stages)
        changes: dict[str, Tensor] = {}
        for t in range(len(stages)):
            changes |= self._minimise(stages, t, states, costates)
        self._assign(changes)
        return loss

    def _minimise(
        self, stages: BatchStages, t: int, states: Sequence[State], costates: Sequence[State]
    ) -> dict[str, Tensor]:
        """The controls of stage t that L-BFGS arrives at; none where they are not finite."""
        names = stages.controls[t]
        leaves = [stages.params[n].clone().requires_grad_() for n in names]
        given = (stages.context, states[t], floating(states[t + 1]), costates[t], costates[t + 1])
        value_and_gradient = self._program(stages, t, names, (leaves, self._weight(stages), *given))
        search = torch.optim.LBFGS(
            leaves,
            lr=1.0,
            max_iter=self.iterations,
            history_size=self.iterations,
            line_search_fn=self.line_search,
        )

        def closure() -> Tensor:
            value, *gradients = value_and_gradient([leaf.detach() for leaf in leaves], self._weight(stages), *given)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient.contiguous()
            return value

        search.step(closure)
        if not all(bool(leaf.isfinite().all()) for leaf in leaves):
            return {}
        return {n: leaf.detach() for n, leaf in zip(names, leaves, strict=True)}

    def _weight(self, stages: BatchStages) -> Tensor:
        like = next(iter(stages.params.values()))
        return torch.tensor(self.rho, dtype=like.dtype, device=like.device)

    def _program(self, stages: BatchStages, t: int, names: list[str], example: tuple[Any, ...]) -> Program:
        """Value and gradients of stage t's objective, traced and compiled once for each shape of a batch."""

        def program(controls: list[Tensor], rho: Tensor, context: list[Tensor], *given: list[Tensor]) -> list[Tensor]:
            def value(controls: list[Tensor]) -> Tensor:
                named = dict(zip(names, controls, strict=True))
                return extended_hamiltonian(stages, t, named, rho, *given, context=context)

            gradients, found = torch.func.grad_and_value(value)(controls)
            return [found, *gradients]

        backend = self.net._options["backend"]
        if backend is None:
            return program
        leaves, spec = pytree.tree_flatten(example)
        leaves = [leaf.detach() for leaf in leaves]
        key = (id(stages.chain), t, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        if key not in self._programs:
            graph = make_fx(lambda *flat: program(*pytree.tree_unflatten(flat, spec)))(*leaves)
            compiled = torch.compile(graph, backend=backend, fullgraph=True, dynamic=False)
            # The chain is kept, so that no other can take its id.
            self._programs[key] = (stages.chain, lambda *given: compiled(*pytree.tree_leaves(given)))
        return self._programs[key][1]


def trajectory(stages: BatchStages) -> tuple[list[State], list[State], Tensor]:
    """``(x_0 .. x_T, p_0 .. p_T, J)``: the states, and B dJ/dx_t of their floating tensors; x_0, p_0 are empty."""
    with torch.no_grad():
        states = [[], *stages.simulate()]
    end = [x.detach().requires_grad_() for x in floating(states[-1])]
    loss = stages.terminal_cost(replaced(states[-1], end))
    p = list(torch.autograd.grad(stages.batch * loss, end))
    costates = [p]
    for t in reversed(range(1, len(stages))):
        x = [v.detach().requires_grad_() for v in floating(states[t])]
        h = _inner(p, floating(stages.f(t, replaced(states[t], x), {})))
        p = list(torch.autograd.grad(h, x, materialize_grads=True))
        costates.insert(0, p)
    return states, [[], *costates], loss.detach()


def extended_hamiltonian(
    stages: BatchStages,
    t: int,
    controls: dict[str, Tensor],
    rho: Tensor,
    state: Sequence[Tensor],
    reached: Sequence[Tensor],
    p: Sequence[Tensor],
    p_next: Sequence[Tensor],
    *,
    context: Sequence[Tensor] | None = None,
) -> Tensor:
    """The extended Hamiltonian of stage t at these controls, a mean over the batch (see the head of the file).

    Args:
        stages: the batch.
        t: the stage.
        controls: of the stage, by name.
        rho: weight of the penalties, 0-d.
        state: x_t.
        reached: the floating tensors of x_{t+1} on the nominal trajectory.
        p: the costate p_t, empty for t = 0.
        p_next: p_{t+1}.
        context: as :meth:`BatchStages.f`'s.
    """

    def hamiltonian(x: list[Tensor]) -> tuple[Tensor, State]:
        found = floating(stages.f(t, replaced(state, x), controls, context))
        return _inner(p_next, found), found

    if p:
        pulled, (value, found) = _grad_and_aux(hamiltonian, floating(state))
        value = value + rho / 2 * _square(pulled, p)
    else:
        value, found = hamiltonian([])
    return (value + rho / 2 * _square(found, reached)) / stages.batch


def _grad_and_aux(function: Any, x: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, State]]:
    """The gradient in x, the value and what comes with it."""
    gradients, (value, beside) = torch.func.grad_and_value(function, has_aux=True)(x)
    return gradients, (value, beside)


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``<a, b>`` over all samples and floating tensors."""
    return torch.stack([(u * v).sum() for u, v in zip(a, b, strict=True)]).sum()


def _square(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``|a - b|^2`` over all samples and floating tensors."""
    return torch.stack([((u - v) ** 2).sum() for u, v in zip(a, b, strict=True)]).sum()
