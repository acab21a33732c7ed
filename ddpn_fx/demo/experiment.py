"""The body that the comparison scripts of ``examples/`` share: arguments, trainings, the page and the record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ddpn_fx.data import load
from ddpn_fx.demo import report
from ddpn_fx.demo.compare import Comparison, Method, Summary


def arguments(description: str | None, *, seeds: int, steps: int, batch_size: int) -> argparse.ArgumentParser:
    """The parser of a comparison script, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder of the .npz file (default: the variable DDPN_FX_DATA)")
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=seeds, help="trainings of each (default: %(default)s)"
    )
    parser.add_argument("--steps", metavar="N", type=int, default=steps, help="steps a training (default: %(default)s)")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=batch_size, help="samples a step (default: %(default)s)"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    parser.add_argument("--device", default="cpu", help="where networks and batches are (default: cpu)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("examples/results"))
    return parser


def run(
    parser: argparse.ArgumentParser,
    *,
    name: str,
    data: str,
    flat: bool,
    network: Callable[[], nn.Module],
    describe: str,
    methods: Sequence[Method],
    verdict: Callable[[list[Summary]], tuple[bool, str]],
    facts: dict[str, Any],
) -> int:
    """Train with every method, write ``<name>.md`` and ``<name>.json``, print the page.

    Args:
        parser: from :func:`arguments`.
        name: of the files.
        data: the data set, for :func:`ddpn_fx.data.load`.
        flat: whether samples are vectors.
        network: makes the network with new random weights.
        describe: the network in words, for the page.
        methods: what is compared.
        verdict: whether the claim holds, and a sentence that says it.
        facts: what the record says beside.

    Returns:
        The exit status: 0 if the claim holds.
    """
    options = parser.parse_args()
    try:
        dataset = load(data, options.data, flat=flat)
    except FileNotFoundError as error:
        parser.error(str(error))
    print("compiling ...", file=sys.stderr)
    comparison = Comparison(
        network,
        dataset,
        batch_size=options.batch_size,
        steps=options.steps,
        backend=options.backend,
        device=options.device,
    )
    summaries = []
    for summary in comparison.trainings(methods, options.seeds):
        print(f"{summary.method} at {summary.lr:g}: {summary} %", file=sys.stderr, flush=True)
        summaries.append(summary)
    holds, text = verdict(summaries)
    environment = report.environment()
    setting = (
        f"{dataset.name}, {describe}, batch {options.batch_size}, {options.steps} steps, "
        f"mean ± deviation over {options.seeds} seeds, DDPNOpt at its defaults with backend {options.backend}."
    )
    page = f"{setting}\n\n{report.table(summaries)}\n\n{text}\n\n{report.describe(environment)}\n"
    record = environment | {
        "data": dataset.name,
        **facts,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "seeds": list(range(options.seeds)),
        "backend": options.backend,
        "device": report.device(options.device),
        "claim_holds": holds,
        "results": [summary.as_dict() for summary in summaries],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    report.write_json(options.out / f"{name}.json", record)
    (options.out / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)
    return 0 if holds else 1
