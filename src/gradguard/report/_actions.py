"""What a report says of what was done to the run while it went on."""

from __future__ import annotations

from collections.abc import Iterable

from gradguard.actions import Action, ActionSummary
from gradguard.findings import Diagnosis
from gradguard.report._format import measured, number, share

__all__ = ["action_texts"]


def action_texts(diagnosis: Diagnosis) -> list[str]:
    """Return what was done to the steps of each optimizer, and what stood in the way; empty where nothing may be done.

    Args:
        diagnosis: A diagnosis of a run.
    """
    texts = []
    for summary in diagnosis.actions:
        name = f" ({summary.optimizer})" if summary.optimizer else ""
        texts.append(f"done during the run{name}: " + "; ".join(_acts(summary)))
        texts += [f"remark{name}: {text}" for text in summary.remarks]
    return texts


def _acts(summary: ActionSummary) -> Iterable[str]:
    newest = {act.kind: act for act in summary.newest}
    done = []
    if summary.clipped:
        done.append(f"clipped {_of(summary.clipped, summary.steps)}{_last(newest.get('clip'))}")
    skipped = summary.spikes + summary.non_finite
    if skipped:
        kinds = ((summary.spikes, "as spikes"), (summary.non_finite, "with NaN or infinity"))
        split = ", ".join(kind if count == skipped else f"{count} {kind}" for count, kind in kinds if count)
        done.append(f"skipped {_of(skipped, summary.steps)} {split}{_last(newest.get('skip'))}")
    if summary.let_through:
        done.append(f"let {_steps(summary.let_through)} with a spike through, as the budget was spent")
    if summary.lr_factor < 1.0:
        lowered = newest.get("lr")
        since = "" if lowered is None else f" since step {lowered.step} ({lowered.why})"
        done.append(f"learning rate times {number(summary.lr_factor)}{since}")
    return done or [f"nothing in {_steps(summary.steps)}" if summary.steps else "nothing"]


def _of(count: int, steps: int) -> str:
    return f"{count} of {_steps(steps)} ({share(count / steps)})"


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def _last(act: Action | None) -> str:
    if act is None:
        return ""
    after = f" > {measured(act.after)}" if act.kind == "clip" else ""
    return f", last at step {act.step} (norm {measured(act.before)}{after})"
