"""One illness first: which finding explains which, and in what order they stand."""

from __future__ import annotations

import itertools

import pytest

from gradguard.config import GuardConfig
from gradguard.findings import Cause, Finding, Severity
from gradguard.linking import link_findings
from gradguard.rules import RULES

CONFIG = GuardConfig()


def found(
    code: str, step: int = 0, severity: Severity = Severity.WARNING, *, resolved: int | None = None, **more: object
) -> Finding:
    """Return a made-up finding."""
    rule = RULES[code]
    return Finding(
        code=code,
        name=rule.name,
        family=rule.family,
        severity=Severity.INFO if resolved is not None else severity,
        message=f"{rule.name}.",
        step=step,
        last_step=step,
        resolved_step=resolved,
        **more,  # type: ignore[arg-type]  # fields of Finding
    )


def linked(*findings: Finding) -> list[tuple[str, str | None]]:
    """Return code and cause of each finding, in the order of the diagnosis."""
    return [(f.code, f.consequence_of) for f in link_findings(findings)]


@pytest.mark.parametrize(
    ("root", "consequence"),
    [
        (found("GG202", 5), found("GG204", 6)),
        (found("GG201", 5), found("GG204", 6)),
        (found("GG201", 5), found("GG301", 7)),
        (found("GG102", 0), found("GG204", 2, cause=Cause.LEARNING_RATE)),
        (found("GG501", 0), found("GG202", 3, cause=Cause.LEARNING_RATE)),
        (found("GG501", 0), found("GG301", 1, Severity.ERROR)),
        (found("GG501", 0), found("GG102", 2)),
        (found("GG102", 0), found("GG501", 0)),
        (found("GG101", 0), found("GG501", 0)),
        (found("GG101", 0), found("GG502", 0)),
        (found("GG101", 0), found("GG302", 0)),
        (found("GG101", 0), found("GG301", 20)),
        (found("GG101", 0), found("GG503", 0, cause=Cause.PRECISION)),
        (found("GG301", 0, Severity.ERROR), found("GG101", 0)),
        (found("GG301", 0, Severity.ERROR), found("GG104", 0)),
        (found("GG104", 0), found("GG502", 0)),
        (found("GG503", 0), found("GG502", 0)),
    ],
    ids=lambda finding: finding.code,
)
def test_one_illness_is_primary_and_the_other_follows(root: Finding, consequence: Finding) -> None:
    """Whatever the order in which they are found."""
    for findings in itertools.permutations((root, consequence)):
        assert linked(*findings) == [(root.code, None), (consequence.code, root.code)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (found("GG101", 0), found("GG503", 0, cause=Cause.WIRING)),
        (found("GG501", 0), found("GG201", 9, cause=Cause.DATA)),
        (found("GG101", 0, Severity.INFO), found("GG502", 0)),
        (found("GG301", 0, Severity.WARNING), found("GG502", 5)),
        (found("GG204", 9), found("GG101", 0)),
        (found("GG101", 0, optimizer="generator"), found("GG502", 0, optimizer="discriminator")),
    ],
    ids=["forgotten in the optimizer", "bad data", "a mention", "half dead", "came before", "another optimizer"],
)
def test_what_does_not_explain_the_other_stands_beside_it(first: Finding, second: Finding) -> None:
    """An illness of its own is not put under another."""
    assert {cause for _, cause in linked(first, second)} == {None}


def test_a_chain_of_consequences_stands_under_its_root() -> None:
    """Rate, dead layer, NaN, corrupt weights; an older, cleared finding comes last."""
    findings = [
        found("GG204", 6, Severity.ERROR, cause=Cause.CORRUPT_WEIGHTS),
        found("GG202", 5, Severity.ERROR, cause=Cause.LEARNING_RATE),
        found("GG101", 0, resolved=2),
        found("GG501", 0),
    ]

    assert linked(*findings) == [("GG501", None), ("GG202", "GG501"), ("GG204", "GG501"), ("GG101", None)]


def test_a_root_is_as_severe_as_the_worst_that_follows() -> None:
    """An exploding gradient that ended in NaN is no mere warning."""
    root, follower = link_findings([found("GG102", 0), found("GG204", 2, Severity.ERROR)])

    assert (root.severity, follower.severity) == (Severity.ERROR, Severity.ERROR)


def test_the_worst_of_independent_illnesses_is_primary() -> None:
    """Severity first, then the beginning."""
    assert [code for code, _ in linked(found("GG503", 0, cause=Cause.WIRING), found("GG102", 5, Severity.ERROR))] == [
        "GG102",
        "GG503",
    ]
