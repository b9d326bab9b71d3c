"""GG504 epsilon-limited-update and GG703 update-rms-spike: Adam's denominator against eps, and against the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._episodes import last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import Trend, loss_progress
from gradguard.detectors._numbers import finite_median, percent
from gradguard.detectors._spikes import robust_z
from gradguard.detectors._updates import median_ratios
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["find_epsilon_limited", "find_update_rms_spike"]

_PATIENCE = 3
"""Consecutive observations. Ours: at the first step alone healthy nets show it as well."""

_LASTING = 20
"""Optimizer steps that they must cover. Ours: the first three observations are steps 1, 2 and 5."""

_SLOW = 100
"""Losses from which one that only just falls is no excuse. Ours: half a healthy run's descent."""

_SCALED_DOWN = 1e-8
"""First loss below which a classifier has not learnt: its loss was scaled down. Ours: 1 minus a probability in float32
is 0 or at least 6e-8."""

_FAR_BELOW = 0.1
"""Times ``eps`` below which the root of the second moment makes steps a tenth of what the rate says. Ours."""

_CRAWL = 10.0**-3.5
"""Update-to-weight ratio below which such steps are small by any measure. Ours: a third of what is usual; runs with an
eps of 1 whose rate was chosen for it move by more."""


def find_epsilon_limited(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find an optimizer whose ``eps``, not the gradient, sets the size of its updates.

    A tensor is limited where ten times ``eps`` exceeds the root of the second moment for more than
    ``epsilon_fraction`` of its live entries. Matrices that hold ``epsilon_fraction`` of all entries must be limited at
    the last three observations, over 20 steps, and the loss must be known not to fall well. A loss that has clearly
    fallen makes it INFO, as a large ``eps`` may be meant, unless steps are less than a tenth of what the rate says and
    small against the weights; a classifier that has learnt is left alone.

    Args:
        history: Records of one optimizer, oldest first; needs ``epsilon_fraction``, and losses.
        config: Thresholds.

    Source: Wortsman et al. (2024), "Small-scale proxies for large-scale Transformer training instabilities", ICLR,
        arXiv 2309.14322, section 3.4; the limits are ours.
    """
    shares = _matrices(history, "epsilon_fraction")
    if history.info.preflight or not np.isfinite(shares).any():
        return []
    sizes = np.array(history.parameters.sizes, dtype=np.float64)
    known = np.isfinite(shares)
    limited = known & (shares > config.epsilon_fraction)
    part = (limited * sizes).sum(axis=1) / np.maximum(1.0, (known * sizes).sum(axis=1))
    episode = last_episode(
        part >= config.epsilon_fraction, known=np.asarray(known.any(axis=1), dtype=np.bool_), patience=_PATIENCE
    )
    if episode is None or not episode.standing:
        return []
    steps = history.steps.astype(np.int64)
    loss = loss_progress(history)
    learnt = loss.learnt and loss.first > _SCALED_DOWN
    if steps[episode.last] - steps[episode.first] < _LASTING or learnt or loss.trend is Trend.UNKNOWN:
        return []
    rows = np.flatnonzero(limited[episode.last])
    first = episode.first if known[: episode.first].any() else 0  # before the first step there is nothing to see of it
    root = finite_median(_matrices(history, "second_moment_rms")[episode.last][rows])
    epsilon = _epsilon(history)
    crawls = root < _FAR_BELOW * epsilon and median_ratios(history)[episode.last] < _CRAWL
    slow = loss.stuck or crawls or (loss.trend is Trend.FALLING and history.losses[1].size >= _SLOW)
    names = tuple(dict.fromkeys(history.parameters.layers[int(row)] for row in rows))
    return [
        make_finding(
            "GG504",
            Severity.WARNING if slow else Severity.INFO,
            f"The optimizer's eps ({epsilon:.1g}) sets the updates, not the gradient (about {root:.1g}): steps are "
            f"smaller than the learning rate says, in {percent(float(part[episode.last]))} of the entries of matrices.",
            step=int(steps[first]),
            last_step=int(steps[episode.last]),
            layers=names,
            cause=Cause.LEARNING_RATE,
            confidence=0.85 if loss.stuck else 0.7,
            evidence={
                "share": Evidence(value=float(part[episode.last]), unit="fraction", note="of the entries of matrices"),
                "eps": Evidence(value=epsilon, note="of the optimizer"),
                "second_moment_rms": Evidence(value=root, note="median over the tensors that eps limits"),
                "observations": Evidence(value=episode.count, unit="observations", note="consecutive"),
                "loss_trend": Evidence(value=str(loss.trend)),
            },
        )
    ]


def find_update_rms_spike(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find an update of an Adam-like optimizer that is far larger than it intends, as its second moment is too old.

    The largest over matrices, as clipped: above ``update_rms``, above ``spike_ratio`` times its own median, and
    ``spike_z`` robust standard deviations out of its line. Embeddings are left out: a rare row has a second moment
    that says nothing. INFO; a warning at the last observation where the loss has risen as well.

    Args:
        history: Records of one optimizer, oldest first; needs ``update_rms`` at ``spike_minimum`` observations.
        config: Thresholds.

    Source: Wortsman et al. (2023), "Stable and low-precision training for large-scale vision-language models", NeurIPS,
        arXiv 2304.13013; the comparison with its own past is ours.
    """
    ratios = _matrices(history, "update_rms")
    roles = dict(zip(history.layers.names, history.layers.roles, strict=True))
    table = history.parameters
    kept = [row for row, layer in enumerate(table.layers) if roles.get(layer) != "embedding"]
    if history.info.preflight or not kept or not np.isfinite(ratios).any():
        return []
    with np.errstate(invalid="ignore", divide="ignore"):  # norms that are not finite
        cut = history.scalar("grad_norm_at_step") / history.scalar("grad_norm")
    factor = np.where(np.isfinite(cut), np.minimum(cut, 1.0), 1.0)
    spike = _newest_spike(ratios[:, kept] * factor[:, None], config)
    return [] if spike is None else [_update_spike(history, config, table.layers[kept[spike.column]], spike)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _UpdateSpike:
    """A value out of line with those before it: where it stands, what it is, and what was usual."""

    index: int
    column: int
    value: float
    usual: float
    z: float


def _newest_spike(ratios: FloatArray, config: GuardConfig) -> _UpdateSpike | None:
    """Return the spike of the newest observation that has one, of the first matrix that shows it.

    Args:
        ratios: Update RMS as clipped, shape ``[observations, matrices]``.
        config: Thresholds.
    """
    large = np.argwhere(np.nan_to_num(ratios, posinf=0.0) >= config.update_rms)
    for index, column in sorted(((int(i), int(j)) for i, j in large), key=lambda place: (-place[0], place[1])):
        series = ratios[:index, column]
        before = series[np.isfinite(series) & (series > 0.0)][-config.spike_window :]
        value = float(ratios[index, column])
        if before.size < config.spike_minimum or value <= config.spike_ratio * float(np.median(before)):
            continue
        z = robust_z(value, before)
        if z > config.spike_z:
            return _UpdateSpike(index=index, column=column, value=value, usual=float(np.median(before)), z=z)
    return None


def _update_spike(history: History, config: GuardConfig, layer: str, spike: _UpdateSpike) -> Finding:
    steps = history.steps.astype(np.int64)
    last = spike.index == len(steps) - 1
    rose = loss_progress(history).trend is Trend.RISEN and bool(np.isfinite(history.losses[1][-1]))
    return make_finding(
        "GG703",
        Severity.WARNING if last and rose else Severity.INFO,
        f"The update of {layer} at step {steps[spike.index]} was {spike.value:.2g} times what the optimizer intends: "
        f"its running mean of squares had fallen behind the gradient.",
        step=int(steps[spike.index]),
        last_step=int(steps[spike.index]),
        resolved_step=None if last else int(steps[spike.index + 1]),
        layer=layer,
        layers=(layer,),
        cause=Cause.LEARNING_RATE,
        confidence=0.7,
        evidence={
            "update_rms": Evidence(value=spike.value, unit="ratio", note=f"1 is usual, {config.update_rms:g} much"),
            "usual": Evidence(value=spike.usual, unit="ratio", note="median before it"),
            "z": Evidence(value=spike.z, note="robust standard deviations of the logarithm"),
        },
    )


def _matrices(history: History, name: str) -> FloatArray:
    """Return a parameter statistic, NaN for vectors; shape ``[observations, parameters]``."""
    matrices = np.array([dims >= 2 for dims in history.parameters.dims], dtype=np.bool_)
    return np.where(matrices, history.parameter(name), np.nan)


def _epsilon(history: History) -> float:
    known = history.info.optimizers
    return known[history.optimizer].epsilon if history.optimizer < len(known) else float("nan")
