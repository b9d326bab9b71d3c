"""The remedies in words: why, what to paste, what to expect, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gradguard.prescriptions._model_texts import LAYERS
from gradguard.prescriptions._text import RemedyText
from gradguard.prescriptions._training_texts import TRAINING
from gradguard.prescriptions._weight_texts import WEIGHTS
from gradguard.prescriptions._wiring_texts import WIRING

__all__ = ["REMEDIES", "RemedyText"]

REMEDIES: Mapping[str, RemedyText] = MappingProxyType({**TRAINING, **WEIGHTS, **LAYERS, **WIRING})
"""Texts by remedy; the files follow what a remedy changes: the training loop, weights, layers, the user's own code."""
