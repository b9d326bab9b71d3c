"""Does the gradient keep its direction from observation to observation, and for how long?"""

from __future__ import annotations

import numpy as np

from gradguard.detectors._episodes import Episode, last_episode
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["distant_cosines", "kept_direction", "steps_kept"]

_KEPT = 0.6
"""Cosine from which a gradient has kept its direction. Ours: over 10 to 100 steps the gradients of runs at a thousandth
of the usual rate have 0.6 to 0.97, where batches agree at all; of 440 healthy runs of the clinic three have three in a
row above 0.5, and steps that are ten times as long. A net that is fine-tuned at a low rate has 0.5."""

_LOST = 0.2
"""Cosine below which a gradient that had kept its direction has lost it. Ours: single batches of such a run leave 0.35
to 0.97, healthy ones that have got anywhere -0.5 to 0.5."""

_APART = 10
"""Steps that must lie between two gradients. Ours: neighbours point the same way in any run."""

_PATIENCE = 3
"""Consecutive observations that must show it. Ours: as for the ratio."""

_LONG = 50
"""Steps over which it must have lasted. Ours: healthy twins have turned by then."""


def distant_cosines(history: History) -> FloatArray:
    """Return the cosine between gradients at least 10 steps apart, NaN for nearer ones; shape ``[observations]``."""
    distance = history.scalar("gradient_cosine_steps")
    cosines: FloatArray = np.where(distance >= _APART, history.scalar("gradient_cosine"), np.nan)
    return cosines


def kept_direction(history: History) -> Episode | None:
    """Return the stretch of observations, up to the newest, over which the gradient has kept its direction.

    Three in a row must be compared with gradients at least 10 steps before them and have a cosine of 0.6 or more; it
    ends with one below 0.2. ``None`` for less than 50 steps in all.

    Args:
        history: Records of one optimizer, oldest first; needs the scalars ``gradient_cosine`` and
            ``gradient_cosine_steps``.

    Source: ours.
    """
    cosines = distant_cosines(history)
    known = ~np.isnan(cosines)
    episode = last_episode(cosines >= _KEPT, holds=cosines >= _LOST, known=known, patience=_PATIENCE)
    if episode is None or not episode.standing:
        return None
    return episode if steps_kept(history, episode) >= _LONG else None


def steps_kept(history: History, episode: Episode) -> int:
    """Return the steps over which the gradient kept its direction, from the gradient with which the first one agrees.

    Args:
        history: Records of one optimizer.
        episode: What :func:`kept_direction` found in it.
    """
    steps = history.steps
    before = history.scalar("gradient_cosine_steps")[episode.first]
    return int(steps[episode.last] - steps[episode.first] + before)
