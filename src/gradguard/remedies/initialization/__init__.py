"""Initialization: weights drawn or scaled anew so that signals and gradients keep their size.

==============================  ===================================================================================
:func:`initialize`              He, Xavier, LeCun, orthogonal or delta-orthogonal, with the gain that theory gives.
:func:`lsuv`                    Weights scaled to unit output deviation on one batch.
:func:`fixup`                   Residual networks without normalization.
:func:`skip_init`               A learnt scalar of 0 on each residual branch; :func:`rezero` is the same.
:func:`forget_gate_bias`        LSTM forget gates and GRU update gates that keep the state.
:func:`chrono_initialize`       Gate biases spread over the time scales of a task.
:func:`orthogonal_recurrent`    Orthogonal recurrent matrices, gate by gate.
:func:`initialize_query_key`    Queries and keys of the usual size in attention.
:func:`scale_query_key`         Queries and keys scaled down until attention logits are of usual size.
:func:`stack_gain`              The weight gain that keeps the gradient over a stack of layers.
:data:`REMEDIES`                The functions by remedy name.
==============================  ===================================================================================

Each changes the model in place, resets the optimizer's state of what it changed, and returns an
:class:`gradguard.remedies.Applied`. If one raises, model and optimizer are as they were. ``.grad`` is left alone: call
a remedy between ``zero_grad()`` and the next ``backward()``.

Example:
    >>> import torch
    >>> from gradguard.remedies import initialization
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> applied = initialization.initialize(model, "he", generator=0)
    >>> applied.changed
    ('0.weight', '0.bias', '2.weight', '2.bias')
    >>> _ = applied.undo()
"""

from gradguard.remedies.initialization._attention import initialize_query_key
from gradguard.remedies.initialization._gain import stack_gain
from gradguard.remedies.initialization._lsuv import lsuv
from gradguard.remedies.initialization._query_key import scale_query_key
from gradguard.remedies.initialization._recurrent import chrono_initialize, forget_gate_bias, orthogonal_recurrent
from gradguard.remedies.initialization._residual import ScaledBranch, fixup, rezero, skip_init
from gradguard.remedies.initialization._schemes import Scheme, initialize
from gradguard.remedies.initialization._table import REMEDIES, Remedy

__all__ = [
    "REMEDIES",
    "Remedy",
    "ScaledBranch",
    "Scheme",
    "chrono_initialize",
    "fixup",
    "forget_gate_bias",
    "initialize",
    "initialize_query_key",
    "lsuv",
    "orthogonal_recurrent",
    "rezero",
    "scale_query_key",
    "skip_init",
    "stack_gain",
]
