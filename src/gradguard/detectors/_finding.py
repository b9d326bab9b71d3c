"""Findings with the name and the family that the rule catalogue gives them."""

from __future__ import annotations

from typing import Any

from gradguard.findings import Finding, Severity
from gradguard.rules import RULES

__all__ = ["make_finding"]


def make_finding(code: str, severity: Severity, message: str, **fields: Any) -> Finding:
    """Make a finding; name and family come from :data:`gradguard.rules.RULES`.

    Args:
        code: Rule code, for instance ``"GG101"``.
        severity: How much it matters.
        message: One sentence with the numbers that matter.
        **fields: Further fields of :class:`~gradguard.findings.Finding`; ``step`` and ``last_step`` are required.
    """
    rule = RULES[code]
    return Finding(code=code, name=rule.name, family=rule.family, severity=severity, message=message, **fields)
