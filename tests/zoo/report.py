"""`python -m tests.zoo.report [NAME ...]`: run the zoo and write docs/compatibility.md.

With names (parts of family names) only those run, and nothing is written.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from tests.zoo import FAMILIES
from tests.zoo.checks import CHECKS, applies, bench
from tests.zoo.family import Family


def run(family: Family) -> dict:
    """One row: what the chain is and which checks pass."""
    row: dict = {"name": family.name, "passed": [], "failed": {}, "seconds": {}}
    for check, function in CHECKS.items():
        if not applies(family, check):
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            function(bench(family.name))
            row["passed"].append(check)
        except Exception as error:
            row["failed"][check] = (error, traceback.format_exc())
        row["seconds"][check] = time.perf_counter() - start
    try:
        b = bench(family.name)
        row["parameters"] = sum(p.numel() for p in b.model.parameters() if p.requires_grad)
        chain = b.net.chain
        row["stages"] = len(chain.stages)
        row["rules"] = sorted({f"{op.split('.')[0]}: {rule}" for r in chain.rows() for op, rule in r["ops"]})
    except Exception:
        row.setdefault("parameters", "")
        row["stages"], row["rules"] = "", []
    return row


def main() -> None:
    """Run and write."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:]
    rows = []
    for name, family in FAMILIES.items():
        if wanted and not any(w.lower() in name.lower() for w in wanted):
            continue
        row = run(family)
        rows.append(row)
        spent = " ".join(f"{k} {v:.1f}" for k, v in row["seconds"].items() if v > 1)
        print(f"{'ok  ' if not row['failed'] else 'FAIL'} {name} ({sum(row['seconds'].values()):.1f} s: {spent})", flush=True)  # noqa: E501
        for check, (error, trace) in row["failed"].items():
            text = str(error).strip().splitlines()
            print(f"     {check}: {type(error).__name__}: {' / '.join(text[:4])[:600]}", flush=True)
            if "-v" in wanted:
                print(trace, flush=True)
    print(f"{sum(not r['failed'] for r in rows)} of {len(rows)} families pass every check")


if __name__ == "__main__":
    main()
