"""Gradients that are absent: trainable parameters whose ``.grad`` stays ``None``, by what their module did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._depth import TRUNK_ROLES
from gradguard.detectors._episodes import BoolArray, Episode, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._numbers import names_text, percent
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History

__all__ = ["find_absent", "share_of"]

_UNSEEN_PATIENCE = 6
"""Observations of a run without a module's taking part before it counts as unused. Ours: stochastic depth that drops
every second block skips a given one six times in a row in 1 of 64 runs; heads that take turns show up by then."""

_GONE_PATIENCE = 4
"""Times ``growth_patience`` for which a gradient must stay away that used to come. Ours: stochastic depth with a
survival rate of 1/2 skips a block eight times in a row once in 256 observations."""

_MOST = 0.5
"""Share of the trainable entries from which a cut is an error. Ours: most of the model does not learn."""

_KINDS = {
    "detached": "the module ran, and its output is cut off",
    "output unused": "the module ran, and nothing came back",
    "unused": "its module did not run, or not with it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Missing:
    """Parameters that lack a gradient for the same reason, and since when.

    Attributes:
        rows: Parameter rows.
        first: Index of the first observation.
        last: Index of the last observation.
        resolved: Index of the observation at which it was over, ``None`` while it stands.
        kind: ``"detached"``: the trunk is cut behind them. ``"output unused"``: their module ran beside the trunk, and
            nothing came back. ``"unused"``: it did not run, or not with them.
        came: Whether their gradient used to come.
    """

    rows: tuple[int, ...]
    first: int
    last: int
    resolved: int | None
    kind: str
    came: bool


def find_absent(history: History, config: GuardConfig) -> list[Finding]:
    """Find parameters at which a gradient was due and none came, grouped by the reason.

    Args:
        history: Records of one optimizer, in which some gradient arrived.
        config: Thresholds.
    """
    absent = history.parameter("absent") == 1.0
    if not absent.any():
        return []
    arrived = ~np.isnan(history.parameter("grad_norm"))
    detached = absent & _module_ran(history) & ~_module_reached(history)
    cut = {history.parameters.layers[row] for row in np.flatnonzero(detached.any(axis=0))}
    groups: dict[tuple[bool, bool, bool], list[tuple[int, Episode]]] = {}
    for row in (int(i) for i in np.flatnonzero(absent.any(axis=0))):
        ran = bool(detached[:, row].any()) or _contains_any(history.parameters.layers[row], cut)
        patience = config.growth_patience if ran else max(_UNSEEN_PATIENCE, config.growth_patience)
        known = absent[:, row] | arrived[:, row]
        episode = last_episode(absent[:, row], known=known, patience=1 if history.info.preflight else patience)
        if episode is None:
            continue
        came = bool(arrived[: episode.first, row].any())
        if not came or episode.count >= _GONE_PATIENCE * config.growth_patience:
            groups.setdefault((ran, came, episode.standing), []).append((row, episode))
    return [
        _absent_finding(history, config, _gather(history, members, ran=ran, came=came))
        for (ran, came, _), members in groups.items()
    ]


def _gather(history: History, members: list[tuple[int, Episode]], *, ran: bool, came: bool) -> _Missing:
    """Put parameters that are missing for the same reason together."""
    last = max(episode.last for _, episode in members)
    rows = tuple(row for row, _ in members)
    kind = "unused"
    if ran:
        kind = "detached" if _is_upstream(history, rows, last) else "output unused"
    return _Missing(
        rows=rows,
        first=min(episode.first for _, episode in members),
        last=last,
        resolved=None if members[0][1].standing else max(episode.resolved or 0 for _, episode in members),
        kind=kind,
        came=came,
    )


def _is_upstream(history: History, rows: tuple[int, ...], index: int) -> bool:
    """Whether the modules of these parameters ran before every layer that a gradient reached: the trunk is cut."""
    roles = history.layers.roles
    reached = ~np.isnan(history.layer("delta_norm")[index])
    owners = _owner_rows(history)
    missing = [layer for row in rows for layer in owners[row] if not reached[layer]]
    alive = [int(layer) for layer in np.flatnonzero(reached) if roles[layer] in TRUNK_ROLES]
    return bool(missing) and min(missing) < min(alive, default=len(roles))


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


def _absent_finding(history: History, config: GuardConfig, missing: _Missing) -> Finding:
    table = history.parameters
    steps = history.steps.astype(np.int64)
    names = tuple(table.names[row] for row in missing.rows)
    share = share_of(history, missing.rows, missing.last)
    detached = missing.kind == "detached"
    modules = _in_order(history, tuple(dict.fromkeys(table.layers[row] for row in missing.rows)))
    severity = Severity.WARNING if share >= config.unused_fraction else Severity.INFO
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
        if missing.came and missing.kind == "unused":
            severity = Severity.INFO
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
            "kind": Evidence(value=missing.kind, note=_KINDS[missing.kind]),
        },
        ruled_out=(RuledOut(cause=Cause.PRECISION, reason="the gradient is absent (None), not zero"),),
    )


def share_of(history: History, rows: tuple[int, ...], index: int) -> float:
    """Return the share of these parameters in the trainable entries at an observation, 0 to 1."""
    trainable = history.parameter("trainable")[index] != 0.0
    sizes = np.array(history.parameters.sizes, dtype=np.float64)
    total = float(sizes[trainable].sum())
    return float(sizes[list(rows)].sum()) / total if total else 1.0


def _in_order(history: History, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return modules in execution order where it is known; the others first."""
    order = {name: row for row, name in enumerate(history.layers.names)}
    return tuple(sorted(modules, key=lambda name: order.get(name, -1)))
