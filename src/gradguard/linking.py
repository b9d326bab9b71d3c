"""Findings in order: one illness first, and what follows from it below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gradguard.findings import Cause, Finding, Severity

__all__ = ["link_findings"]

_NON_FINITE = frozenset({"GG201", "GG202", "GG203", "GG204"})

_ORDER = (
    *("GG201", "GG211", "GG213", "GG111", "GG112", "GG702", "GG701", "GG101", "GG102", "GG104", "GG103", "GG212"),
    *("GG602", "GG504", "GG501", "GG202", "GG203", "GG204", "GG301", "GG302", "GG503", "GG502", "GG403", "GG505"),
    "GG703",
)
"""Which of two findings that began at the same step may explain the other: the earlier one in this row. Dead layers
that are an error come right after a non-finite input."""

_AFTER_NON_FINITE = frozenset(
    {"GG101", "GG102", "GG103", "GG104", "GG213", "GG301", "GG302", "GG501", "GG502", "GG503", "GG505"}
    | {"GG701", "GG702", "GG703"}
)
"""What numbers that are not finite can bring about, apart from more of them."""

_AFTER_COLLAPSE = frozenset(
    {"GG101", "GG102", "GG103", "GG104", "GG302", "GG402", "GG403", "GG501", "GG502", "GG503", "GG505", "GG703"}
)
"""What a softmax that has lost its derivative can bring about: large gradients below it, none at queries and keys."""

_FOLLOWS = {
    "GG201": _NON_FINITE | _AFTER_NON_FINITE,
    "GG202": _NON_FINITE | _AFTER_NON_FINITE,
    "GG203": _NON_FINITE | _AFTER_NON_FINITE,
    "GG204": _NON_FINITE | _AFTER_NON_FINITE,
    "GG101": frozenset({"GG301", "GG302", "GG403", "GG501", "GG502", "GG503", "GG504"}),
    "GG102": frozenset({"GG103", "GG202", "GG203", "GG204", "GG301", "GG302", "GG402", "GG403", "GG501", "GG505"}),
    "GG103": frozenset({"GG101", "GG102", "GG202", "GG203", "GG204", "GG301", "GG302", "GG501", "GG505"}),
    "GG104": frozenset({"GG502", "GG503"}),
    "GG111": frozenset({"GG401", "GG403", "GG502", "GG503", "GG504"}),
    "GG112": frozenset(
        {"GG102", "GG103", "GG202", "GG203", "GG204", "GG302", "GG401", "GG402", "GG403", "GG501", "GG505"}
    ),
    "GG211": frozenset({"GG101", "GG104", "GG502", "GG503", "GG504"}),
    "GG212": frozenset({"GG502", "GG503"}),
    "GG301": frozenset({"GG101", "GG104", "GG501", "GG502", "GG503"}),
    "GG302": frozenset({"GG104", "GG502", "GG503"}),
    "GG501": frozenset(
        {"GG101", "GG102", "GG103", "GG104", "GG202", "GG203", "GG204", "GG301", "GG302", "GG503", "GG505"}
        | {"GG402", "GG701", "GG702", "GG703"}
    ),
    "GG503": frozenset({"GG502"}),
    "GG504": frozenset({"GG502", "GG503"}),
    "GG505": frozenset({"GG102", "GG103", "GG202", "GG203", "GG204", "GG402", "GG703"}),
    "GG602": frozenset({"GG502"}),
    "GG701": _AFTER_COLLAPSE,
    "GG702": _AFTER_COLLAPSE | {"GG701", "GG202", "GG203", "GG204"},
}
"""What each illness can bring about, where it came first. Source: ours, architecture.md, section 2."""


def link_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Order findings cause first, and name the cause of each that another explains.

    Only a standing finding at ``WARNING`` or above can explain others, and only what began no earlier than itself. It
    becomes as severe as the worst that follows from it.

    Args:
        findings: Findings in any order.
    """
    standing = sorted((f for f in findings if f.standing), key=_seniority)
    cleared = sorted((f for f in findings if not f.standing), key=lambda f: f.step)
    parents: dict[int, int] = {}
    for index, finding in enumerate(standing):
        parent = next((i for i in range(index) if _explains(standing[i], finding)), None)
        if parent is not None:
            parents[index] = parent
    worst = [finding.severity for finding in standing]
    for index in reversed(range(len(standing))):
        if index in parents:
            worst[parents[index]] = max(worst[parents[index]], worst[index])
    named = [
        replace(
            finding,
            severity=worst[index],
            consequence_of=standing[parents[index]].code if index in parents else finding.consequence_of,
        )
        for index, finding in enumerate(standing)
    ]
    roots = sorted((i for i in range(len(named)) if i not in parents), key=lambda i: (-named[i].severity, i))
    ordered = [named[i] for root in roots for i in _family(root, parents)]
    return (*ordered, *cleared)


def _seniority(finding: Finding) -> tuple[int, int, int]:
    """Sort by beginning; among equals by what can explain what."""
    rank = _ORDER.index(finding.code) if finding.code in _ORDER else len(_ORDER)
    if finding.code == "GG301" and finding.severity >= Severity.ERROR:
        rank = 0
    return finding.step, rank, -finding.severity


def _explains(root: Finding, other: Finding) -> bool:
    if root.severity < Severity.WARNING or other.code not in _FOLLOWS.get(root.code, frozenset()):
        return False
    both_non_finite = root.code in _NON_FINITE and other.code in _NON_FINITE
    if root.optimizer != other.optimizer and not both_non_finite:
        return False
    if root.code == "GG112" and other.code == "GG102" and other.layer not in root.layers:
        return False
    if root.code in {"GG102", "GG112", "GG501"} and other.cause is Cause.DATA:
        return False
    if root.code == "GG101" and other.code == "GG503":
        return other.cause is Cause.PRECISION
    return not (root.code == "GG301" and root.severity < Severity.ERROR)


def _family(root: int, parents: dict[int, int]) -> list[int]:
    """Return a root and everything that follows from it, each after its own cause."""
    members = [root]
    for index in sorted(parents):
        if parents[index] == root:
            members.extend(_family(index, parents))
    return members
