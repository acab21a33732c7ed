"""A step's time, FLOPs and peak memory against SGD's, all compiled.

The steps of a model alternate in one process, ten in a row, so that what else the machine does falls on all alike and
a step finds its own data in the caches, as in a training. The table shows medians over SGD's, and means, which have in
them what is not done in every step (bases of a metric that are renewed).
SGD is one compiled program too: forward, backward and update in place. Adam, Muon and SOAP are the usual loop around a
compiled model. FLOPs are counted in the graphs (`torch.utils.flop_counter`: matrix products and convolutions), memory
in torch's allocations during one step, beside the weights, the optimizer's state and the batch.

    python examples/bench/step.py                               784-512x4-10 at batch 128: SGD and the default
    python examples/bench/step.py --models all --methods all    every model and method (half an hour)
    python examples/bench/step.py --models mlp --batch 64 128 256 512 --coupling 64
    python examples/bench/step.py --models mlp --depth 8 --width 256
    python examples/bench/step.py --models all --device cuda --mode reduce-overhead

`--methods` are of: default, sketch, sketch32, nonlinear, rank2, full (nonlinear-sketch and full-sketch with sketch=16),
diagonal, factored, eigen-factored, kronecker, eigen-kronecker, eigen-factored-exact (without sketches), groups, cg,
eigen-factored-cg, open, default-all, nonlinear-feedback, nonlinear-all and eigen-factored-all (of
`ddpn_fx.compile(recompute="all")`, or `"feedback"`), usual-loop and eigen-factored-usual-loop (`loss.backward();
opt.step()` where the others call `train_step`), sgd (the usual loop), adam, muon, soap (of `heavyball`, in the `bench`
extra). Writes all figures as JSON and the table as Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from models import Problem, problems
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import ddpn_fx
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import plain_step
from ddpn_fx.demo.timing import interleaved, peak_bytes
from ddpn_fx.passes.recompute import CHOICES

Step = Callable[[Tensor, Tensor], Tensor]
LR, LR_OF_PEERS = 0.01, 0.001
RUN = 10  # steps in a row, as a training takes them
TURNED: dict[str, Any] = {"preconditioner": "eigen-factored"}  # with its own averages: beta1 0.9, Nesterov's form
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "sketch": {"sketch": 16},
    "sketch32": {"sketch": 32},
    "nonlinear": {"rollout": "nonlinear"},
    "nonlinear-sketch": {"rollout": "nonlinear", "sketch": 16},
    "rank2": {"rank": 2},
    "full": {"rank": None},
    "full-sketch": {"rank": None, "sketch": 16},
    "diagonal": {"preconditioner": "diagonal"},
    "factored": {"preconditioner": "factored"},
    "eigen-factored": TURNED,
    "eigen-factored-exact": TURNED | {"sketch": 0},
    "kronecker": {"preconditioner": "kronecker"},
    "eigen-kronecker": {"preconditioner": "eigen-kronecker"},
    "groups": {"coupling": 64},  # the numbers of these three may come from the command line
    "cg": {"cg_iterations": 5},
    "eigen-factored-cg": TURNED | {"cg_iterations": 5},
    "open": {"feedback": False},
    "default-all": {},
    "nonlinear-feedback": {"rollout": "nonlinear"},
    "nonlinear-all": {"rollout": "nonlinear"},
    "eigen-factored-all": TURNED,
    "usual-loop": {},
    "eigen-factored-usual-loop": TURNED,
}


@dataclass
class Contestant:
    """A step and what it holds between steps.

    Attributes:
        step: runs one training step and returns the loss.
        held: the weights and the optimizer's state.
        flops: counts those of one step, where that can be done.
        turns: after how many calls a kind of step comes again.
        first: seconds of the calls that compile.
    """

    step: Step
    held: Callable[[], list[Tensor]]
    flops: Callable[[], int] | None = None
    turns: int = 1
    first: float = 0.0


Update = Callable[[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor], Tensor]  # (u, gradient, its state, lr, step)


def _momentum(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: Tensor, step: Tensor) -> Tensor:
    """torch.optim.SGD's with momentum 0.9."""
    state["velocity"] = 0.9 * state["velocity"] + gradient
    return parameter - lr * state["velocity"]


def _adam(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: Tensor, step: Tensor) -> Tensor:
    """torch.optim.Adam's at its default betas and eps."""
    state["mean"] = 0.9 * state["mean"] + 0.1 * gradient
    state["square"] = 0.999 * state["square"] + 0.001 * gradient * gradient
    root = (state["square"] / (1 - 0.999**step)).sqrt() + 1e-8
    return parameter - lr * state["mean"] / (1 - 0.9**step) / root


UPDATES: dict[str, tuple[tuple[str, ...], Update]] = {
    "SGD": ((), lambda parameter, gradient, state, lr, step: parameter - lr * gradient),
    "momentum": (("velocity",), _momentum),
    "Adam": (("mean", "square"), _adam),
}


def compiled_baseline(
    model: nn.Module,
    loss: Callable[..., Tensor],
    backend: str,
    rule: str = "SGD",
    rate: float = LR,
    mode: str | None = None,
) -> Step:
    """A training step of plain SGD, or another of ``UPDATES``, as one compiled program; buffers are updated too.

    Nothing of torch.optim's Python is left in it: a user's loop takes longer. With CUDA graphs it is one replay.
    """
    slots, update = UPDATES[rule]
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {name: {slot: torch.zeros_like(p) for slot in slots} for name, p in parameters.items()}
    buffers = dict(model.named_buffers())
    first = next(iter(parameters.values()))
    lr, taken = (torch.tensor(v, dtype=first.dtype, device=first.device) for v in (rate, 0.0))

    def step(
        parameters: dict[str, Tensor],
        state: dict[str, dict[str, Tensor]],
        buffers: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        lr: Tensor,
        taken: Tensor,
    ) -> Tensor:
        def objective(parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            fresh = {name: buffer.clone() for name, buffer in buffers.items()}  # a module may update them in place
            return loss(torch.func.functional_call(model, (parameters, fresh), x), y), fresh

        gradients, (value, fresh) = torch.func.grad_and_value(objective, has_aux=True)(parameters)
        taken.add_(1)
        for name, parameter in parameters.items():
            new = dict(state[name])
            parameter.copy_(update(parameter, gradients[name], new, lr, taken))
            for slot, tensor in new.items():
                state[name][slot].copy_(tensor)
        for name, buffer in buffers.items():
            buffer.copy_(fresh[name])
        return value

    lasting = [*parameters.values(), *buffers.values(), *(t for s in state.values() for t in s.values()), lr, taken]
    for tensor in lasting:  # a CUDA graph writes into what stays where it is
        torch._dynamo.mark_static_address(tensor, guard=False)
    compiled: list[Callable[..., Tensor]] = []

    def run(x: Tensor, y: Tensor) -> Tensor:
        given = parameters, state, buffers, x, y, lr, taken
        if not compiled:  # traced first: not every version of Dynamo traces torch.func
            graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*given)
            compiled.append(torch.compile(graph, backend=backend, mode=mode, fullgraph=True, dynamic=False))
        torch.compiler.cudagraph_mark_step_begin()
        return compiled[0](*given).clone()

    return run


def sgd(problem: Problem, chosen: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> Contestant:
    """The baseline."""
    model = problem.build()

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            problem.loss(model(batch[0]), batch[1]).backward()
        model.zero_grad()
        return counter.get_total_flops()

    step = compiled_baseline(model, problem.loss, chosen.backend, mode=chosen.mode)
    return Contestant(step, lambda: list(model.parameters()), flops)


def plain(name: str, problem: Problem, chosen: argparse.Namespace) -> Contestant:
    """An optimizer of ``PEERS`` in the usual loop around a compiled model."""
    model = problem.build()
    optimizers = PEERS[name](model, LR_OF_PEERS)
    forward = torch.compile(model, backend=chosen.backend, mode=chosen.mode, dynamic=False)

    def held() -> list[Tensor]:
        return [*model.parameters(), *(t for o in optimizers for t in _state(o))]

    return Contestant(plain_step(forward, *optimizers, loss=problem.loss), held)


def muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, at steps of Adam's scale; Adam for the rest and for embeddings, as its authors do."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    ours = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables]
    rest = [p for p in model.parameters() if p.dim() != 2 or id(p) in tables]
    first = torch.optim.Muon(ours, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [first, *([torch.optim.Adam(rest, lr=lr)] if rest else [])]


def soap(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """SOAP at heavyball's defaults."""
    try:
        import heavyball
    except ModuleNotFoundError:
        sys.exit("SOAP needs the bench extra: pip install 'ddpn-fx[bench]'")
    return [heavyball.SOAP(model.parameters(), lr=lr)]


# Optimizers of others in the usual loop, by name, each (model, step size) -> what updates it.
PEERS: dict[str, Callable[[nn.Module, float], list[torch.optim.Optimizer]]] = {
    "sgd": lambda model, lr: [torch.optim.SGD(model.parameters(), lr=lr)],
    "adam": lambda model, lr: [torch.optim.Adam(model.parameters(), lr=lr)],
    "muon": muon,
    "soap": soap,
}


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for kept in optimizer.state.values() for t in torch.utils._pytree.tree_leaves(kept) if torch.is_tensor(t)]


def ddpnopt(
    options: dict[str, Any], problem: Problem, chosen: argparse.Namespace, *, usual: bool, recompute: str | None
) -> Contestant:
    """DDPNOpt with these options, by ``train_step`` or in the usual loop."""
    model = problem.build()
    net = ddpn_fx.compile(model, loss=problem.loss, backend=chosen.backend, mode=chosen.mode, recompute=recompute)
    opt = ddpn_fx.DDPNOpt(net, lr=LR, **options)
    step = plain_step(net, opt, loss=problem.loss) if usual else opt.train_step
    return Contestant(step, lambda: [*model.parameters(), *_state(opt)], lambda: graph_flops(opt), turns(opt))


def graph_flops(opt: ddpn_fx.DDPNOpt) -> int:
    """FLOPs of the graph behind the step that was compiled; the mean where exact and lagged steps take turns."""
    params = dict(opt.net.named_parameters(remove_duplicate=False))
    found = {}
    for lowered in opt._programs.values():
        inputs = lowered.sample(params, dict(opt.net.named_buffers(remove_duplicate=False)))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            lowered.module(*inputs)
        found[lowered.program.mode.lagged] = counter.get_total_flops()
    exact = found[False]
    return exact + (turns(opt) - 1) * (found.get(True, exact) - exact) // turns(opt)


def turns(opt: ddpn_fx.DDPNOpt) -> int:
    """Steps from an exact one to the next."""
    return getattr(opt.preconditioner, "exact_every", 1)


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


def run(name: str, problem: Problem, batch: int, chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Time every method on one model at one batch size: method -> figures."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    build, draw = problem.build, problem.draw
    problem = replace(problem, build=lambda: build().to(chosen.device))
    batches = [tuple(t.to(chosen.device) for t in draw(batch)) for _ in range(8)]
    contestants: dict[str, Contestant] = {"SGD": sgd(problem, chosen, batches[0])}
    for method in chosen.methods:
        if method in PEERS:
            made = plain(method, problem, chosen)
        else:
            given = {"coupling": chosen.coupling, "cg_iterations": chosen.iterations}
            options = {k: given.get(k, v) for k, v in OPTIONS[method].items()}
            recompute = next((choice for choice in CHOICES if method.endswith(f"-{choice}")), None)
            made = ddpnopt(options, problem, chosen, usual=method.endswith("usual-loop"), recompute=recompute)
        contestants[method] = made
    for contestant in contestants.values():
        started = time.perf_counter()
        for _ in range(min(2, contestant.turns)):  # the second step may be another program
            contestant.step(*batches[0])
        contestant.first = time.perf_counter() - started
    steps = {method: contestant.step for method, contestant in contestants.items()}
    seconds = interleaved(steps, batches, chosen.repeats, chosen.warm, run=RUN)
    rows = {}
    for method, contestant in contestants.items():
        held = size_of([*contestant.held(), *batches[0]])
        rows[method] = {
            "median_ms": 1e3 * statistics.median(seconds[method]),
            "mean_ms": 1e3 * statistics.fmean(seconds[method]),
            "deciles_ms": [1e3 * q for q in statistics.quantiles(seconds[method], n=10)[::8]],
            "flops": contestant.flops and contestant.flops(),
            "peak_bytes": held + max(peak_bytes(contestant.step, *batches[0]) for _ in range(contestant.turns)),
            "first_call_s": contestant.first,
        }
        rows[method] |= {
            "time": rows[method]["median_ms"] / rows["SGD"]["median_ms"],
            "time_of_means": rows[method]["mean_ms"] / rows["SGD"]["mean_ms"],
            "work": rows[method]["flops"] and rows[method]["flops"] / rows["SGD"]["flops"],
            "memory": rows[method]["peak_bytes"] / rows["SGD"]["peak_bytes"],
        }
        print(f"{name}, batch {batch}, {method}: {rows[method]['time']:.2f}", file=sys.stderr, flush=True)
    return rows


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The figures as a Markdown table, a line a method."""
    lines = []
    for name, rows in found.items():
        for method, row in rows.items():
            work = "" if row["work"] is None else f"{row['work']:.2f}"
            median, first = f"{row['median_ms']:.1f}", f"{row['first_call_s']:.0f}"
            times = f"{row['time']:.2f}", f"{row['time_of_means']:.2f}"
            lines.append([name, method, median, *times, work, f"{row['memory']:.2f}", first])
    header = ("model, batch", "method", "median, ms", "time", "of means", "FLOPs", "peak memory", "first call, s")
    return report.markdown(header, lines, numbers_from=2)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mlp"], help="all, or of: " + ", ".join(problems()))
    parser.add_argument("--methods", nargs="+", default=["default"], help="see above")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: the model's)")
    parser.add_argument("--width", type=int, default=512, help="of the MLP's hidden layers (default: 512)")
    parser.add_argument("--depth", type=int, default=4, help="number of the MLP's hidden layers (default: 4)")
    parser.add_argument("--coupling", type=int, default=64, help="samples in a group, for method groups (default: 64)")
    parser.add_argument("--iterations", type=int, default=5, help="of the methods with cg (default: 5)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile, for all (default: inductor)")
    parser.add_argument("--mode", help="of torch.compile, for all; on a GPU: reduce-overhead (CUDA graphs)")
    parser.add_argument("--device", default="cpu", help="where models and batches are (default: cpu)")
    parser.add_argument("--repeats", type=int, default=60, help="timed calls of each step (default: 60)")
    parser.add_argument("--warm", type=int, default=5, help="calls of each before the timed ones (default: 5)")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="call ddpn_fx.keep_freed_memory() first: for all methods alike"
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    default = Path(__file__).parents[1] / "results/bench/step.json"
    parser.add_argument("--out", metavar="FILE", type=Path, default=default)
    chosen = parser.parse_args()
    known = {"--models": ("models", [*problems()]), "--methods": ("methods", [*OPTIONS, *PEERS])}
    for flag, (name, allowed) in known.items():
        given = allowed if getattr(chosen, name) == ["all"] else getattr(chosen, name)
        wrong = [v for v in given if v not in allowed]
        if wrong:
            parser.error(f"{flag}: {wrong[0]!r} is none of {', '.join(allowed)}")
        setattr(chosen, name, given)
    return chosen


def main() -> None:
    """Compile all, time them in turn, print the table and write the figures."""
    chosen = arguments()
    if chosen.keep_freed_memory and not ddpn_fx.keep_freed_memory():
        sys.exit("step.py: --keep-freed-memory: this C library has no such setting")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    found = {}
    made = problems(width=chosen.width, depth=chosen.depth)
    for name in chosen.models:
        for batch in chosen.batch or [made[name].batch]:
            found[f"{name}, {batch}"] = run(name, made[name], batch, chosen)
            write(found, chosen)  # after each: a run may be cut short
    print(chosen.out.with_suffix(".md").read_text(encoding="utf-8"), end="")


def write(found: dict[str, dict[str, dict[str, Any]]], chosen: argparse.Namespace) -> None:
    """Write the figures as JSON and as a Markdown table."""
    environment = report.environment() | {"device": report.device(chosen.device)}
    page = f"{table(found)}\n\nTime, FLOPs and peak memory over SGD's; {chosen.repeats} interleaved repeats, "
    page += "freed memory kept, " if chosen.keep_freed_memory else ""
    page += f"mode {chosen.mode}, " if chosen.mode else ""
    page += f"backend {chosen.backend}, {torch.get_num_threads()} threads, "
    page += f"on {environment['device']}. {report.describe(environment)}\n"
    setting = {k: v for k, v in vars(chosen).items() if k != "out"}
    report.write_json(chosen.out, environment | {"setting": setting, "results": found})
    chosen.out.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
