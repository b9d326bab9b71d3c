"""GG104 no-gradient: trainable, and nothing arrives. Detached, unused, or cut off by an operation of slope zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._depth import TRUNK_ROLES
from gradguard.detectors._episodes import BoolArray, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import Trend, loss_progress
from gradguard.detectors._numbers import names_text, percent, signal
from gradguard.detectors._zeros import ZeroOwner, Zeros, zero_pattern
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History

__all__ = ["find_missing_gradients"]

_SETTLING_STEPS = 5
"""Optimizer steps after which zero-initialized branches must have come alive. Source: architecture.md, section 3;
ours."""

_UNSEEN_PATIENCE = 6
"""Observations of a run without a module's taking part before it counts as unused. Ours: stochastic depth that drops
every second block skips a given one six times in a row in 1 of 64 runs; heads that take turns show up by then."""

_GONE_PATIENCE = 4
"""Times ``growth_patience`` for which a gradient must stay away that used to come. Ours: stochastic depth with a
survival rate of 1/2 skips a block eight times in a row once in 256 observations."""

_MOST = 0.5
"""Share of the trainable entries from which a cut is an error. Ours: most of the model does not learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Missing:
    """Parameters that lack a gradient now, and since when."""

    rows: tuple[int, ...]
    first: int
    last: int
    resolved: int | None


def find_missing_gradients(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find trainable parameters at which no gradient arrives.

    What is absent (``.grad`` is ``None``) splits by what its module did. It ran, and nothing came back to its output:
    detached, a warning, an error from half of the trainable entries on. It took no part in the forward pass: unused,
    INFO below ``unused_fraction`` of the trainable entries. Exact zeros count where no dead or saturated layer, no
    underflow and no zero-initialized module owns them.

    A detached part must recur for ``growth_patience`` observations, an unused one for six, one whose gradient used to
    come for longer; a check before the first step speaks after one. Where *no* gradient was read in a run, it was read
    at the wrong moment: that is no finding, and the diagnosis says so.

    Args:
        history: Records of one optimizer, oldest first; needs ``absent``, ``grad_norm``, ``delta_norm``.
        config: Thresholds.

    Source: ours (pitfalls.md, R5 and R27; architecture.md, section 3, "Exact zeros have owners").
    """
    if not len(history):
        return []
    if _nothing_arrived(history):
        return [_independent_loss(history)] if history.info.preflight else []
    findings = [*_absent(history, config), *_zeros(history, config)]
    return sorted(findings, key=lambda finding: -finding.severity)


def _nothing_arrived(history: History) -> bool:
    gradient = history.parameter("grad_norm")
    due = history.parameter("absent") == 1.0
    return bool(np.isnan(gradient).all() and due.any())


def _independent_loss(history: History) -> Finding:
    names = history.parameters.names
    return make_finding(
        "GG104",
        Severity.ERROR,
        f"No gradient reaches any of the {len(names)} parameters: the loss does not depend on them.",
        step=0,
        last_step=0,
        layers=names,
        cause=Cause.WIRING,
        confidence=0.95,
        evidence={"parameters": Evidence(value=len(names), unit="parameters")},
    )


def _absent(history: History, config: GuardConfig) -> list[Finding]:
    absent = history.parameter("absent") == 1.0
    if not absent.any():
        return []
    arrived = ~np.isnan(history.parameter("grad_norm"))
    detached = absent & _module_ran(history) & ~_module_reached(history)
    cut = {history.parameters.layers[row] for row in np.flatnonzero(detached.any(axis=0))}
    groups: dict[tuple[str, int, int, int | None], list[int]] = {}
    for row in (int(i) for i in np.flatnonzero(absent.any(axis=0))):
        kind = "detached" if detached[:, row].any() or _contains_any(history.parameters.layers[row], cut) else "unused"
        patience = config.growth_patience if kind == "detached" else max(_UNSEEN_PATIENCE, config.growth_patience)
        known = absent[:, row] | arrived[:, row]
        episode = last_episode(absent[:, row], known=known, patience=1 if history.info.preflight else patience)
        if episode is None:
            continue
        came_before = arrived[: episode.first, row].any()
        if not came_before or episode.count >= _GONE_PATIENCE * config.growth_patience:
            groups.setdefault((kind, episode.first, episode.last, episode.resolved), []).append(row)
    return [
        _absent_finding(history, config, kind, _Missing(rows=tuple(rows), first=first, last=last, resolved=resolved))
        for (kind, first, last, resolved), rows in groups.items()
    ]


def _contains_any(layer: str, modules: set[str]) -> bool:
    """Whether a parameter sits on a container of modules that were cut off, as a position embedding does."""
    prefix = f"{layer}." if layer else ""
    return any(module != layer and module.startswith(prefix) for module in modules)


def _owner_rows(history: History) -> list[list[int]]:
    """Return, per parameter, the layer rows of its module, or of what the module contains where it has no row."""
    names = history.layers.names
    position = {name: row for row, name in enumerate(names)}
    owners = []
    for layer in history.parameters.layers:
        prefix = f"{layer}." if layer else ""
        inside = [row for name, row in position.items() if name.startswith(prefix)]
        owners.append([position[layer]] if layer in position else inside)
    return owners


def _module_ran(history: History) -> BoolArray:
    """Return whether a parameter's module was called with gradients enabled, shape ``[observations, parameters]``."""
    calls = history.layer("calls") > 0.0
    return _any_of(calls, _owner_rows(history))


def _module_reached(history: History) -> BoolArray:
    """Return whether a gradient came back to its module's output, shape ``[observations, parameters]``."""
    return _any_of(~np.isnan(history.layer("delta_norm")), _owner_rows(history))


def _any_of(mask: BoolArray, owners: list[list[int]]) -> BoolArray:
    result = np.zeros((len(mask), len(owners)), dtype=np.bool_)
    for row, layers in enumerate(owners):
        result[:, row] = mask[:, layers].any(axis=1) if layers else False
    return result


def _absent_finding(history: History, config: GuardConfig, kind: str, missing: _Missing) -> Finding:
    table = history.parameters
    steps = history.steps.astype(np.int64)
    names = tuple(table.names[row] for row in missing.rows)
    share = _share(history, missing.rows, missing.last)
    detached = kind == "detached"
    modules = _in_order(history, tuple(dict.fromkeys(table.layers[row] for row in missing.rows)))
    if detached:
        where = names_text(modules[-1:])
        message = (
            f"No gradient comes back to {where}: its output is cut off from the loss, and {percent(share)} of the "
            f"trainable entries ({len(names)} parameters) get no gradient."
        )
        severity = Severity.ERROR if share >= _MOST else Severity.WARNING
    else:
        message = (
            f"{names_text(names)} {'is' if len(names) == 1 else 'are'} trainable but took no part in the loss: "
            f"{percent(share)} of the trainable entries get no gradient."
        )
        severity = Severity.WARNING if share >= config.unused_fraction else Severity.INFO
    return make_finding(
        "GG104",
        severity if missing.resolved is None else Severity.INFO,
        message,
        step=int(steps[missing.first]),
        last_step=int(steps[missing.last]),
        resolved_step=None if missing.resolved is None else int(steps[missing.resolved]),
        layer=modules[-1] if detached else (names[0] if len(names) == 1 else modules[0]),
        layers=modules if detached else names,
        cause=Cause.WIRING,
        confidence=0.9 if detached else 0.8,
        evidence={
            "share": Evidence(value=share, unit="fraction", note="of the trainable entries"),
            "parameters": Evidence(value=len(names), unit="parameters"),
            "kind": Evidence(
                value=kind, note="the module ran" if detached else "its module did not run, or not with it"
            ),
        },
        ruled_out=(RuledOut(cause=Cause.PRECISION, reason="the gradient is absent (None), not zero"),),
    )


def _share(history: History, rows: tuple[int, ...], index: int) -> float:
    trainable = history.parameter("trainable")[index] != 0.0
    sizes = np.array(history.parameters.sizes, dtype=np.float64)
    total = float(sizes[trainable].sum())
    return float(sizes[list(rows)].sum()) / total if total else 1.0


def _in_order(history: History, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return modules in execution order where it is known; the others first."""
    order = {name: row for row, name in enumerate(history.layers.names)}
    return tuple(sorted(modules, key=lambda name: order.get(name, -1)))


def _zeros(history: History, config: GuardConfig) -> list[Finding]:
    if not (history.layer("delta_norm") == 0.0).any():
        return []
    patterns = [zero_pattern(record) for record in history.records]
    found = (
        _cut_off(history, config, patterns),
        _zero_everywhere(history, config, patterns),
        _dead_branch(history, config, patterns),
    )
    return [finding for finding in found if finding is not None]


def _mask(patterns: list[Zeros], *owners: ZeroOwner) -> BoolArray:
    return np.array([pattern.owner in owners for pattern in patterns], dtype=np.bool_)


def _settled(history: History) -> BoolArray:
    """Return the observations at which zero-initialized branches must have come alive; a check has only the first."""
    if history.info.preflight:
        return np.ones(len(history), dtype=np.bool_)
    settled: BoolArray = history.steps >= _SETTLING_STEPS
    return settled


def _cut_off(history: History, config: GuardConfig, patterns: list[Zeros]) -> Finding | None:
    """Zeros from the input up to a layer that nothing explains: an operation with derivative zero stands there."""
    owners = (ZeroOwner.CUT_OFF,) if history.info.preflight else (ZeroOwner.CUT_OFF, ZeroOwner.BRANCH)
    mask = _mask(patterns, *owners)
    episode = last_episode(
        mask & _settled(history), holds=mask, patience=1 if history.info.preflight else config.growth_patience
    )
    if episode is None:
        return None
    record, zeros = history.records[episode.last], patterns[episode.last]
    names = tuple(record.layers.names[row] for row in zeros.rows)
    row = zeros.border if zeros.border is not None else zeros.rows[-1]
    border = record.layers.names[row]
    where = "in" if signal(record, at="input_delta")[row] == 0.0 else "before"
    steps = history.steps.astype(np.int64)
    return make_finding(
        "GG104",
        Severity.ERROR if episode.standing else Severity.INFO,
        f"The gradient is cut off {where} {names_text((border,))}: it is exactly zero at all {len(names)} layers from "
        f"the input up to {names_text(names[-1:])}.",
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        resolved_step=None if episode.resolved is None else int(steps[episode.resolved]),
        layer=border,
        layers=names,
        cause=Cause.WIRING,
        confidence=0.85,
        evidence={
            "zero_layers": Evidence(value=len(names), unit="layers"),
            "last_finite_delta": Evidence(value=_next_delta(history, episode.last, zeros), unit="L2 norm", note=border),
        },
        ruled_out=(
            RuledOut(cause=Cause.DEAD_UNITS, reason="no layer at the cut has all its units inactive"),
            RuledOut(cause=Cause.PRECISION, reason="the gradient does not decay towards the cut"),
        ),
    )


def _next_delta(history: History, index: int, zeros: Zeros) -> float:
    """Return the gradient at the first live row behind a prefix of zeros."""
    record = history.records[index]
    delta = signal(record)
    after = (row for row in range(max(zeros.rows) + 1, len(record.layers)) if record.layers.roles[row] in TRUNK_ROLES)
    return next((float(delta[row]) for row in after if delta[row] > 0.0), math.nan)


def _zero_everywhere(history: History, config: GuardConfig, patterns: list[Zeros]) -> Finding | None:
    """A loss whose derivative is zero from the start; one that has reached its minimum is no illness."""
    mask = _mask(patterns, ZeroOwner.EVERYWHERE)
    episode = last_episode(mask, patience=1 if history.info.preflight else config.growth_patience)
    if episode is None or episode.first > 0 or loss_progress(history).trend is Trend.FALLEN:
        return None
    steps = history.steps.astype(np.int64)
    return make_finding(
        "GG104",
        Severity.ERROR if episode.standing else Severity.INFO,
        "The loss gives no gradient: it is exactly zero at every layer.",
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        resolved_step=None if episode.resolved is None else int(steps[episode.resolved]),
        layers=tuple(history.records[episode.last].layers.names[row] for row in patterns[episode.last].rows),
        cause=Cause.LOSS,
        confidence=0.8,
        evidence={"zero_layers": Evidence(value=len(patterns[episode.last].rows), unit="layers")},
    )


def _dead_branch(history: History, config: GuardConfig, patterns: list[Zeros]) -> Finding | None:
    """Zeros between live layers that outlast the first steps: a branch whose output counts for nothing."""
    if history.info.preflight:
        return None
    mask = _mask(patterns, ZeroOwner.BETWEEN)
    episode = last_episode(mask & _settled(history), holds=mask, patience=_UNSEEN_PATIENCE)
    if episode is None or not episode.standing:
        return None
    record = history.records[episode.last]
    names = tuple(record.layers.names[row] for row in patterns[episode.last].rows)
    rows = tuple(i for i, layer in enumerate(history.parameters.layers) if layer in names)
    share = _share(history, rows, episode.last)
    if _is_dead(history, episode.last, patterns[episode.last]):
        return None
    steps = history.steps.astype(np.int64)
    return make_finding(
        "GG104",
        Severity.WARNING if share >= config.unused_fraction else Severity.INFO,
        f"{names_text(names)} get a gradient of exactly zero while layers before and after learn: the branch counts "
        f"for nothing in the loss.",
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        layer=names[-1],
        layers=names,
        cause=Cause.WIRING,
        confidence=0.6,
        evidence={"share": Evidence(value=share, unit="fraction", note="of the trainable entries")},
    )


def _is_dead(history: History, index: int, zeros: Zeros) -> bool:
    """Whether a fully inactive layer stands among the zeros: then that layer owns them."""
    record = history.records[index]
    inactive = record.layer_values.get("inactive_fraction", np.full(len(record.layers), np.nan))
    functional = record.layer_values.get("input_inactive_fraction", np.full(len(record.layers), np.nan))
    around = list(range(min(zeros.rows), min(max(zeros.rows) + 3, len(record.layers))))
    return bool((inactive[around] == 1.0).any() or (functional[around] == 1.0).any())
