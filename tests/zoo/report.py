"""`python -m tests.zoo.report [NAME ...]`: run the zoo in two processes and write docs/compatibility.md.

With names (parts of family names) only those run, and nothing is written; `-v` prints tracebacks.
"""

from __future__ import annotations

import platform
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import ddpn_fx
from tests.zoo import FAMILIES, REFUSALS
from tests.zoo.checks import CHECKS, applies, bench

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"


def run(name: str) -> dict:
    """One row: what the chain is and which checks pass."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    family = FAMILIES[name]
    row: dict = {
        "name": name,
        "passed": [],
        "failed": {},
        "tracebacks": {},
        "parameters": "",
        "stages": "",
        "rules": [],
    }
    start = time.perf_counter()
    for check, function in CHECKS.items():
        if not applies(family, check):
            continue
        torch.manual_seed(0)
        try:
            function(bench(name))
            row["passed"].append(check)
        except Exception as error:
            row["failed"][check] = f"{type(error).__name__}: {error}"
            row["tracebacks"][check] = traceback.format_exc()
    row["seconds"] = time.perf_counter() - start
    try:
        b = bench(name)
        row["parameters"] = sum(p.numel() for p in b.model.parameters() if p.requires_grad)
        chain = b.net.chain
        row["stages"] = len(chain.stages)
        row["rules"] = sorted({f"{op.split('.')[0]}: {rule}" for r in chain.rows() for op, rule in r["ops"]})
        row["capture"] = sum(r.seconds for r in chain.records)
        traced = next(iter(b.traced._lowered.values()), None)
        row["trace"] = sum(r.seconds for r in traced.records) if traced is not None else 0.0
    except Exception as error:
        if not row["failed"]:
            row["failed"]["chain"] = f"{type(error).__name__}: {error}"
    return row


def refused(name: str) -> dict:
    """A row of the second table: the error that a model is answered with."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    r = REFUSALS[name]
    inputs, target = (t.double() if t.is_floating_point() else t for t in r.draw(torch.Generator().manual_seed(0), 4))
    try:
        net = ddpn_fx.compile(r.build().double(), loss=r.loss, disable=True)
        ddpn_fx.DDPNOpt(net, **r.options).train_step(inputs, target)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return {"name": name, "error": f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:2])}"}
    return {"name": name, "error": "NOT REFUSED"}


def cell(text: str) -> str:
    """Text that cannot end a table's cell, with paths from the repository's root."""
    text = text.replace(f"{PAGE.parents[1]}/", "")
    return text.replace("|", "\\|").replace("<", "&lt;")


def page(rows: list[dict], refusals: list[dict]) -> str:
    """docs/compatibility.md."""
    passing = [r for r in rows if not r["failed"]]
    lines = [
        "# What it trains",
        "",
        f"{len(passing)} of {len(rows)} model families pass every check of `tests/zoo`"
        f" (torch {torch.__version__.split('+')[0]}, {platform.system()}). Written by `python -m tests.zoo.report`.",
        "",
        "| check | what it holds |",
        "|---|---|",
    ]
    explained = {
        "names": "parameters, buffers, `state_dict` keys and outputs are the module's",
        "sgd": "`feedback=False` equals autograd and `torch.optim.SGD`, and buffers equal eager's, over 2 steps",
        "gauss-newton": "the default step equals the dense damped Gauss-Newton step (where samples do not mix)",
        "batches": "batches of 6, 3 and 1 after one of 4: no new capture, and the step equals SGD's",
        "traced": "the traced program equals the untraced one",
        "coverage": "every parameter with a gradient moves; frozen and unused ones do not",
        "noise": "with dropout and noise on: the same seed gives the same step, another seed another",
        "learns": 'ten steps of `"eigen-factored"` on one batch lower its loss, and none is left out',
        "usual": "three turns of `loss.backward(); opt.step()` equal three of `train_step`, buffers too",
        "parts": "`accumulate=2`: the open loop is SGD on the mean of two losses, buffers too; the closed loop learns",
    }
    lines += [f"| {c} | {explained[c]} |" for c in CHECKS]
    lines += [
        "",
        "float64 on the CPU, tiny widths, equal to 1e-9 of the largest change. A family without a gauss-newton check",
        "has batch statistics; without a noise check it draws no random numbers. The seconds are those of capture and",
        "all passes up to the graph that a backend gets, of one step, on one thread beside another process.",
        "",
        "| family | parameters | stages | capture and passes, s | operator: rule | checks passed | status |",
        "|---|--:|--:|--:|---|---|---|",
    ]
    for r in rows:
        status = (
            "passes"
            if not r["failed"]
            else "; ".join(f"{c}: {e.splitlines()[0][:160]}" for c, e in r["failed"].items())
        )
        if len(set(r["failed"].values())) == 1:
            status = next(iter(r["failed"].values())).splitlines()[0][:200]
        rules, passed = cell(", ".join(r["rules"])), ", ".join(r["passed"])
        seconds = f"{r['capture'] + r['trace']:.1f}" if "capture" in r else ""
        shown = (cell(r["name"]), r["parameters"], r["stages"], seconds, rules, passed, cell(status))
        lines.append(f"| {' | '.join(map(str, shown))} |")
    lines += ["", "Refused, with an error that says why and what to do:", "", "| model | error |", "|---|---|"]
    lines += [f"| {cell(r['name'])} | {cell(r['error'])[:400]} |" for r in refusals]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and write."""
    wanted = [a for a in sys.argv[1:] if a != "-v"]
    names = [n for n in FAMILIES if not wanted or any(w.lower() in n.lower() for w in wanted)]
    rows = []
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(run, names):
            rows.append(row)
            capture = f", capture and passes {row['capture'] + row['trace']:.1f} s" if "capture" in row else ""
            print(f"{'FAIL' if row['failed'] else 'ok  '} {row['name']} ({row['seconds']:.1f} s{capture})", flush=True)
            for error in dict.fromkeys(row["failed"].values()):
                checks = [c for c, e in row["failed"].items() if e == error]
                print(f"     {', '.join(checks)}: {' / '.join(error.strip().splitlines()[:3])[:500]}", flush=True)
                if "-v" in sys.argv:
                    print(row["tracebacks"].get(checks[0], ""), flush=True)
        refusals = [] if wanted else list(pool.map(refused, REFUSALS))
    print(f"{sum(not r['failed'] for r in rows)} of {len(rows)} families pass every check")
    if not wanted:
        PAGE.write_text(page(rows, refusals))
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
