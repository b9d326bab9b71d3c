"""Remedies that change what a model is made of: normalizations, other activations, skip connections.

=============================  =====================================================================================
:func:`insert_norm`            A normalization behind each hidden layer, before its activation.
:func:`replace_activations`    Other activation modules, and weights that suit them.
:func:`add_residual`           A skip connection around each layer and its activation, where shapes allow one.
=============================  =====================================================================================

Each takes the model apart only where it can see what stands where, says what it left alone and why, carries the
optimizer over, and can be undone bit for bit.
"""

from gradguard.remedies.surgery._activations import replace_activations
from gradguard.remedies.surgery._norms import Normed, insert_norm
from gradguard.remedies.surgery._skips import Residual, add_residual

__all__ = ["Normed", "Residual", "add_residual", "insert_norm", "replace_activations"]
