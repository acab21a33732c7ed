"""The claim of Table 3: DDPNOpt at or above the best baseline here, and at or above the paper's own figure.

DDPNOpt has several forms here. Which one counts is decided as its step size is, on the validation split: by the
accuracy there of the search's trainings at the chosen step size, the first of equals in the table's order. The best on
the test set stands beside it, as what the forms can reach; the baseline is the best of all on the test set, either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddpn_fx.demo import report

Summary = Mapping[str, Any]
CLAIM = "at or above the best baseline and the paper's DDPNOpt on each data set that is whole here"


def ours(name: str) -> bool:
    """Whether a row is one of DDPNOpt's forms."""
    return name.startswith("DDPNOpt")


def judge(
    summaries: Mapping[tuple[str, str], Summary | None],
    tasks: Sequence[str],
    whole: Sequence[str],
    theirs: Mapping[str, float],
) -> tuple[dict[str, bool], list[str]]:
    """Whether the claim holds for either choice of a form, and the paragraphs that say so.

    Args:
        summaries: (task, row) -> the row's means, in the table's order.
        tasks: the data sets, in order.
        whole: those that the claim is about.
        theirs: the paper's DDPNOpt, in per cent.
    """
    failed: dict[str, list[str]] = {"validation": [], "test": []}
    missing, rows, ties = [], [], []
    for task in tasks:
        have = {name: s for (key, name), s in summaries.items() if key == task and s}
        mine = {n: s for n, s in have.items() if ours(n) and s["validation"] is not None}
        others = {n: s for n, s in have.items() if not ours(n)}
        if not mine or not others:
            missing += [task] if task in whole else []
            continue
        rival = max(others, key=lambda n: others[n]["mean"])
        picked = max(mine, key=lambda n: mine[n]["validation"])
        best = max(mine, key=lambda n: mine[n]["mean"])
        least = max(others[rival]["mean"], theirs.get(task, 0.0))
        for by, form in (("validation", picked), ("test", best)):
            failed[by] += [task] if task in whole and mine[form]["mean"] < least else []
        equals = [s["mean"] for s in mine.values() if s["validation"] == mine[picked]["validation"]]
        if len(equals) > 1:
            ties.append(f"{task} ({len(equals)} forms, on the test set {min(equals):.2f} to {max(equals):.2f})")
        rows.append(
            (
                task,
                f"{picked}: {_figure(mine[picked])}",
                f"{best}: {_figure(mine[best])}",
                f"{rival}: {_figure(others[rival])}",
                f"{theirs[task]:.2f}" if task in theirs else "",
                f"{mine[picked]['mean'] - others[rival]['mean']:+.2f}",
                f"{mine[best]['mean'] - others[rival]['mean']:+.2f}",
            )
        )
    header = ("data", "form chosen on the validation split", "best form on the test set", "best baseline")
    header += ("the paper's DDPNOpt", "chosen over baseline", "best over baseline")
    lines = [
        f"The claim, {CLAIM} ({', '.join(whole)}): for the form chosen on the validation split it "
        f"{_verdict(failed['validation'], missing)}; for the best on the test set it "
        f"{_verdict(failed['test'], missing)}."
    ]
    if rows:
        lines.append(report.markdown(header, rows))
    if ties:
        lines.append(f"The validation split does not tell forms apart on {', '.join(ties)}; the first row counts.")
    return {by: not names and not missing for by, names in failed.items()}, lines


def _verdict(failed: Sequence[str], missing: Sequence[str]) -> str:
    says = f"fails on {', '.join(failed)}" if failed else "holds"
    return says + (f" (not run: {', '.join(missing)})" if missing else "")


def _figure(found: Summary) -> str:
    return f"{found['mean']:.2f} ± {found['deviation']:.2f}"
