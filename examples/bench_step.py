"""Step time of DDPNOpt against SGD, both compiled.

The SGD step is one compiled program too: forward, backward and update in place. The two steps alternate in one process,
so that what else the machine does falls on both alike; the table shows medians. Writes all times as JSON.

    python examples/bench_step.py                                   784-512x4-10, batch 128
    python examples/bench_step.py --rollout nonlinear --rank 4
    python examples/bench_step.py --width 256 --depth 8 --batch 512 --repeats 500
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpn_fx
from ddpn_fx.demo import relu_network, report
from ddpn_fx.demo.timing import interleaved

INPUTS, CLASSES, BATCHES, LR = 784, 10, 16, 0.1


def compiled_sgd(model: nn.Module, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a training step of plain SGD as one compiled program."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    lr = torch.tensor(LR)

    def objective(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, x), y)

    def step(parameters: dict[str, Tensor], x: Tensor, y: Tensor, lr: Tensor) -> Tensor:
        gradients, loss = torch.func.grad_and_value(objective)(parameters, x, y)
        for name, parameter in parameters.items():
            parameter.copy_(parameter - lr * gradients[name])
        return loss

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    return lambda x, y: compiled(parameters, x, y, lr)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="samples a step (default: 128)")
    parser.add_argument("--width", type=int, default=512, help="width of the hidden layers (default: 512)")
    parser.add_argument("--depth", type=int, default=4, help="number of hidden layers (default: 4)")
    parser.add_argument("--rollout", choices=("linear", "nonlinear"), default="linear", help="(default: linear)")
    parser.add_argument("--rank", default="1", help="columns of the terminal factor, or all (default: 1)")
    parser.add_argument("--coupling", default="batch", help="batch, sample or a group size (default: batch)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile, for both (default: inductor)")
    parser.add_argument("--repeats", type=int, default=200, help="timed calls of each step (default: 200)")
    parser.add_argument("--warm", type=int, default=10, help="calls of each before the timed ones (default: 10)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path(__file__).parent / "results/bench_step.json")
    return parser.parse_args()


def main() -> None:
    """Compile both steps, time them in turn, print the table and write the figures."""
    chosen = options()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    rank = None if chosen.rank == "all" else int(chosen.rank)
    coupling = int(chosen.coupling) if chosen.coupling.isdecimal() else chosen.coupling
    widths = (INPUTS, *[chosen.width] * chosen.depth, CLASSES)

    torch.manual_seed(0)
    batches = [(torch.randn(chosen.batch, INPUTS), torch.randint(CLASSES, (chosen.batch,))) for _ in range(BATCHES)]
    net = ddpn_fx.compile(relu_network(*widths), loss=F.cross_entropy, backend=chosen.backend)
    opt = ddpn_fx.DDPNOpt(net, lr=LR, rank=rank, coupling=coupling, rollout=chosen.rollout)
    steps = {"SGD": compiled_sgd(relu_network(*widths), chosen.backend), "DDPNOpt": opt.train_step}
    first = {}
    for name, step in steps.items():
        started = time.perf_counter()
        step(*batches[0])
        first[name] = time.perf_counter() - started
    seconds = interleaved(steps, batches, chosen.repeats, chosen.warm)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["DDPNOpt"] / medians["SGD"]
    environment = report.environment()
    print(f"{'-'.join(map(str, widths))}, batch {chosen.batch}, rank {chosen.rank}, coupling {coupling}, ", end="")
    print(f"{chosen.rollout} rollout, backend {chosen.backend}, {chosen.repeats} repeats, interleaved\n")
    print("| step    | median, ms | 10 % to 90 %, ms | over SGD | first call, s |")
    print("|---------|------------|------------------|----------|---------------|")
    for name, times in seconds.items():
        deciles = statistics.quantiles(times, n=10)
        spread = f"{1e3 * deciles[0]:.2f} to {1e3 * deciles[-1]:.2f}"
        over = medians[name] / medians["SGD"]
        print(f"| {name:<7} | {1e3 * medians[name]:<10.2f} | {spread:<16} | {over:<8.2f} | {first[name]:<13.1f} |")
    print(f"\n{report.describe(environment)}, {torch.get_num_threads()} threads")

    setting = {name: value for name, value in vars(chosen).items() if name != "out"}
    record = environment | {
        "setting": setting | {"widths": widths},
        "median_ms": {name: 1e3 * median for name, median in medians.items()},
        "first_call_s": first,
        "ratio": ratio,
        "times_ms": {name: [round(1e3 * value, 4) for value in times] for name, times in seconds.items()},
    }
    report.write_json(chosen.out, record)


if __name__ == "__main__":
    main()
