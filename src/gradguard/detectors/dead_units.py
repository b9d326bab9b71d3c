"""GG301 dead-units: ReLU units that are zero for every example, and so get no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._depth import TRUNK_ROLES
from gradguard.detectors._episodes import BoolArray, Episode, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import LossProgress, Trend, loss_progress, still_at_chance
from gradguard.detectors._numbers import names_text, percent, power_of_ten
from gradguard.detectors._updates import ratio_before
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["find_dead_units", "unit_shares"]

_ONE_LOOK_CONFIDENCE = 0.6
"""Confidence after a single observation: another batch may wake the units. Ours."""


def find_dead_units(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find layers most of whose units are dead.

    Units are judged over consecutive observations. More than ``dead_fraction_error`` of a layer is an error. More than
    ``dead_fraction_warning`` is a warning once it has stood for ``dead_patience_steps`` steps more and the loss has not
    clearly fallen: nets that train show such shares in their first steps, and some to the end. A loss that has clearly
    fallen takes one level off. Before dead units can be told from unlucky ones (three observations over
    ``dead_patience_steps`` steps), and in a check before the first step, only layers with more than
    ``dead_fraction_error`` inactive units count, as a warning, or an error where not one unit is active.

    Args:
        history: Records of one optimizer, oldest first; needs ``dead_fraction``, ``inactive_fraction`` or the columns
            with the prefix ``input_`` for functional code.
        config: Thresholds.

    Returns:
        At most one finding; its ``layer`` is the first dead layer in forward order.

    Source:
        Limits: algorithms.md, section G4, item 4. Before the first step default-initialized ReLU nets show up to 62 %.
    """
    if not len(history):
        return []
    dead, inactive = unit_shares(history, "dead_fraction"), unit_shares(history, "inactive_fraction")
    if not np.isfinite(inactive).any() and not np.isfinite(dead).any():
        return []
    proven, seen = _largest(dead), _largest(inactive)
    early = (seen > config.dead_fraction_error) & ~_settled(history, config, proven)
    certain = proven > config.dead_fraction_error
    known = ~(np.isnan(seen) & np.isnan(proven))
    severe = last_episode(early | certain, holds=(seen > config.dead_fraction_error) | certain, known=known)
    mild = _lasting(history, config, last_episode(proven > config.dead_fraction_warning, known=~np.isnan(proven)))
    found = [episode for episode in (severe, mild) if episode is not None]
    if not found:
        return []
    episode = next((e for e in found if e.standing), found[0])
    is_early = episode is severe and not bool(certain[episode.last])
    return [_finding(history, config, episode, inactive if is_early else dead, early=is_early)]


def unit_shares(history: History, name: str) -> FloatArray:
    """Return the larger of a share of units and its functional counterpart, shape ``[observations, layers]``.

    NaN where the output was not finite: a comparison with NaN says nothing.

    Args:
        history: Records of one optimizer.
        name: ``"dead_fraction"`` or ``"inactive_fraction"``.
    """
    shares = np.fmax(history.layer(name), history.layer(f"input_{name}"))
    return np.where(np.isinf(history.layer("forward_rms")), np.nan, shares)


def _largest(shares: FloatArray) -> FloatArray:
    result = np.full(len(shares), np.nan)
    for index, row in enumerate(shares):
        known = row[~np.isnan(row)]
        if known.size:
            result[index] = known.max()
    return result


def _lasting(history: History, config: GuardConfig, episode: Episode | None) -> Episode | None:
    if episode is None:
        return None
    lasted = history.steps[episode.last] - history.steps[episode.first]
    return episode if lasted >= config.dead_patience_steps else None


def _settled(history: History, config: GuardConfig, proven: FloatArray) -> BoolArray:
    """Return the observations by which dead units could have been proven, were there any; a check has none."""
    enough = history.steps - history.steps[0] >= config.dead_patience_steps
    return np.asarray(enough & ~np.isnan(proven), dtype=np.bool_)


def _severity(
    history: History, config: GuardConfig, episode: Episode, share: float, loss: LossProgress, *, early: bool
) -> Severity:
    if not episode.standing:
        return Severity.INFO
    if early:
        return Severity.ERROR if history.info.preflight and share == 1.0 else Severity.WARNING
    fallen = loss.trend is Trend.FALLEN and not still_at_chance(history)
    if share > config.dead_fraction_error:
        return Severity.WARNING if fallen else Severity.ERROR
    return Severity.INFO if fallen else Severity.WARNING


def _finding(history: History, config: GuardConfig, episode: Episode, shares: FloatArray, *, early: bool) -> Finding:
    steps = history.steps.astype(np.int64)
    row = shares[episode.last]
    limit = config.dead_fraction_error if early else config.dead_fraction_warning
    ill = [int(i) for i in np.flatnonzero(row > limit)]
    names = tuple(dict.fromkeys(_unit_owner(history, episode.last, i) for i in ill))
    share = float(np.nanmax(row))
    worst = _unit_owner(history, episode.last, int(np.nanargmax(row)))
    cause, evidence = _cause(history, config, episode)
    what = "inactive for the whole batch" if early else "dead"
    message = (
        f"{percent(share)} of the units of {names_text((worst,))} are {what}: they output zero and get no gradient."
    )
    if len(names) > 1:
        message = message[:-1] + f"; {len(names)} layers are above {percent(limit)}."
    if not episode.standing:
        message = f"Units of {names_text(names)} had died (up to {percent(share)} of a layer) and are active again."
    return make_finding(
        "GG301",
        _severity(history, config, episode, share, loss_progress(history), early=early),
        message,
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        resolved_step=None if episode.resolved is None else int(steps[episode.resolved]),
        layer=names[0],
        layers=names,
        cause=cause,
        confidence=_ONE_LOOK_CONFIDENCE if early else min(0.97, 0.7 + 0.3 * share),
        evidence={
            "dead_fraction": Evidence(value=share, unit="fraction", note=worst),
            "dead_layers": Evidence(value=len(names), unit="layers", note=f"above {percent(limit)}"),
            **evidence,
        },
        ruled_out=() if cause is Cause.LEARNING_RATE else _rate_ruled_out(history, config, episode),
    )


def _unit_owner(history: History, index: int, row: int) -> str:
    """Return the module whose units a share is about: for functional code the layer before the row."""
    names, roles = history.layers.names, history.layers.roles
    if not np.isnan(history.layer("inactive_fraction")[index, row]):
        return names[row]
    makers = [i for i in range(row) if roles[i] in TRUNK_ROLES and roles[i] != "norm"]
    return names[makers[-1]] if makers else names[row]


def _cause(history: History, config: GuardConfig, episode: Episode) -> tuple[Cause, dict[str, Evidence]]:
    """Return why units died: updates too large before, data far from 0, or weights that began so."""
    ratio = ratio_before(history, max(0, episode.first - 1))
    if history.steps[episode.first] > 0 and ratio > config.update_ratio_high:
        evidence = Evidence(
            value=ratio, unit="ratio", note=f"update/weight, above {config.update_ratio_high:g} before it"
        )
        return Cause.LEARNING_RATE, {"update_ratio": evidence}
    given = history.layer("input_max_abs")[episode.first]
    known = given[np.isfinite(given)]
    if known.size and known[0] > 100.0:
        return Cause.DATA, {
            "input_max_abs": Evidence(value=float(known[0]), note="largest entry of the first layer's input")
        }
    return (Cause.WEIGHT_SCALE if history.steps[episode.first] == 0 else Cause.UNKNOWN), {}


def _rate_ruled_out(history: History, config: GuardConfig, episode: Episode) -> tuple[RuledOut, ...]:
    if history.steps[episode.first] == 0:
        return (RuledOut(cause=Cause.LEARNING_RATE, reason="there at step 0, before any update"),)
    ratio = ratio_before(history, episode.first)
    if not ratio <= config.update_ratio_high:
        return ()
    return (RuledOut(cause=Cause.LEARNING_RATE, reason=f"update/weight at most {power_of_ten(ratio)} before it"),)
