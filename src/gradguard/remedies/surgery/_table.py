"""The operations by the name that a prescription carries, all called alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

from gradguard.remedies._applied import Applied
from gradguard.remedies.surgery._activations import replace_activations
from gradguard.remedies.surgery._attention import add_qk_norm
from gradguard.remedies.surgery._deep import add_normalized_residual
from gradguard.remedies.surgery._input import standardize_input
from gradguard.remedies.surgery._norms import insert_norm
from gradguard.remedies.surgery._output import linear_output
from gradguard.remedies.surgery._recurrent import swap_recurrent
from gradguard.remedies.surgery._residual import add_residual

__all__ = ["REMEDIES", "Operation"]

Operation: TypeAlias = Callable[..., Applied]
"""Called as ``operation(model, batch=None, compute_loss=None, optimizer=None, dry_run=False)``."""

REMEDIES: Mapping[str, tuple[str, Operation]] = MappingProxyType(
    {
        "layer-norm": ("normalization", partial(insert_norm, kind="layer")),
        "batch-norm": ("normalization", partial(insert_norm, kind="batch")),
        "group-norm": ("normalization", partial(insert_norm, kind="group")),
        "rms-norm": ("normalization", partial(insert_norm, kind="rms")),
        "standardize-input": ("initialization", standardize_input),
        "qk-norm": ("normalization", add_qk_norm),
        "relu": ("activation", partial(replace_activations, to="relu", initialize_layers=True)),
        "leaky-relu": ("activation", partial(replace_activations, to="leaky-relu", initialize_layers=True)),
        "linear-output": ("activation", linear_output),
        "residual": ("residual", add_residual),
        "residual-batch-norm": ("residual", add_normalized_residual),
        "gated-cell": ("cell", partial(swap_recurrent, to="gru")),
        "lstm": ("cell", partial(swap_recurrent, to="lstm")),
    }
)
"""Level of intrusion (see ``remedies.catalogue.LEVELS``) and operation, by the name of the remedy."""
