"""One row per run: what was said, when, and how the run ended. JSON Lines, appended to, so that a clinic resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from gradguard.findings import Finding, to_plain

__all__ = ["Row", "Said", "append_row", "read_rows", "source_hash"]

_WATCHED = ("src/gradguard", "benchmarks/clinic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One finding, in what the score needs.

    Attributes:
        code: Rule code.
        family: Rule family.
        severity: ``"INFO"``, ``"WARNING"`` or ``"ERROR"``.
        step: Step at which it was first seen.
        at: Step at which it was announced; -1 where it was not.
        layer: Culprit, ``None`` for none.
        cause: Cause in words.
        confidence: 0 to 1.
        standing: Whether it stood when it was said.
        consequence: Code of the finding that explains it, ``None`` for none.
        message: Its sentence.
    """

    code: str
    family: str
    severity: str
    step: int
    at: int = -1
    layer: str | None = None
    cause: str = ""
    confidence: float = 0.0
    standing: bool = True
    consequence: str | None = None
    message: str = ""

    @classmethod
    def of(cls, finding: Finding, *, at: int = -1) -> Said:
        """Return what a finding says, announced at a step."""
        return cls(
            code=finding.code,
            family=finding.family,
            severity=finding.severity.name,
            step=finding.step,
            at=at,
            layer=finding.layer,
            cause=finding.cause.value,
            confidence=finding.confidence,
            standing=finding.standing,
            consequence=finding.consequence_of,
            message=finding.message,
        )

    @property
    def is_alarm(self) -> bool:
        """Whether it is at ``WARNING`` or above."""
        return self.severity != "INFO"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run of one case.

    Attributes:
        case: Name of the case.
        seed: Of the run.
        source: Hash of the library and the clinic that made the row.
        quality: How well the trained model does; see :class:`benchmarks.clinic.case.Job`.
        steps: Optimizer steps taken.
        seconds: Wall time of the run, everything included.
        overhead: Share of the training's wall time that the guard took, by its own account; -1 unknown.
        healthy: The final verdict: ``True``, ``False``, or ``None`` where too little was observed.
        announced: Findings announced while it ran, in order.
        findings: Findings of the final diagnosis, root cause first.
        checked: Findings of the check before the first step.
        check_error: What the check raised, empty for nothing.
        error: What the run raised, empty for nothing.
        losses: Loss at up to 60 evenly spaced steps.
        profiles: Delta per trunk row and observation, for choosing the summary within an eighth.
        readings: What rivals' rules need; see :mod:`benchmarks.clinic.probe`.
        optimizer: Class name of the first optimizer.
    """

    case: str
    seed: int
    source: str
    quality: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    overhead: float = -1.0
    healthy: bool | None = None
    announced: tuple[Said, ...] = ()
    findings: tuple[Said, ...] = ()
    checked: tuple[Said, ...] = ()
    check_error: str = ""
    error: str = ""
    losses: tuple[float, ...] = ()
    profiles: tuple[Mapping[str, Any], ...] = ()
    readings: tuple[Mapping[str, Any], ...] = ()
    optimizer: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Case and seed."""
        return self.case, self.seed

    @property
    def primary(self) -> Said | None:
        """The illness of the run: the first standing finding at ``WARNING`` or above of the final diagnosis."""
        return next((said for said in self.findings if said.standing and said.is_alarm), None)


@cache
def source_hash() -> str:
    """Return a hash over the sources of the library and the clinic: rows of other sources are out of date."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in _WATCHED:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def append_row(path: Path, row: Row) -> None:
    """Add a row to a results file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(to_plain(asdict(row)), allow_nan=False) + "\n")


def read_rows(path: Path, *, source: str | None = None) -> list[Row]:
    """Return the rows of a results file, the newest of each case and seed; none where there is no file.

    Args:
        path: Results file.
        source: Leave out rows of other sources; ``None`` takes all.
    """
    rows: dict[tuple[str, int], Row] = {}
    for row in _lines(path):
        if source is None or row.source == source:
            rows[row.key] = row
    return list(rows.values())


def _lines(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    known = {item.name for item in fields(Row)}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            plain = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed while it wrote
        values = {name: _revive(value) for name, value in plain.items() if name in known}
        for name in ("announced", "findings", "checked"):
            values[name] = tuple(Said(**said) for said in values.get(name, ()))
        for name in ("losses", "profiles", "readings"):
            values[name] = tuple(values.get(name, ()))
        yield Row(**values)


def _revive(value: Any) -> Any:
    """Turn the texts that stand for non-finite numbers back into numbers."""
    if isinstance(value, list):
        return [_revive(item) for item in value]
    if isinstance(value, dict):
        return {key: _revive(item) for key, item in value.items()}
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


_NON_FINITE: Mapping[str, float] = {
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
