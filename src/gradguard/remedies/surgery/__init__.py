"""Surgery: other layers in a model that exists, with its optimizer carried over.

==============================  ===================================================================================
:func:`insert_norm`             LayerNorm, BatchNorm, GroupNorm or RMSNorm before or after each hidden activation.
:func:`replace_activations`     Activations that do not saturate, or do not die, as modules or functions in code.
:func:`linear_output`           No ReLU behind the last layer.
:func:`add_residual`            A path around each block.
:func:`add_normalized_residual` Both: BatchNorm before each hidden activation and a path around each block.
:func:`swap_recurrent`          LSTM or GRU in place of a plain RNN, with its interface.
:func:`standardize_input`       Data of mean 0 and deviation 1 for the layers that read them.
:func:`add_qk_norm`             Normalized queries and keys in multi-head attention.
:func:`rename`                  Names of an old checkpoint to those of the changed model.
:data:`REMEDIES`                The operations by remedy name.
==============================  ===================================================================================

Each works in place and returns an :class:`gradguard.remedies.Applied`: in words what was done, what was left alone and
why, and under which names the parameters are now. ``dry_run=True`` says the words and changes nothing. If one raises,
model and optimizer are as they were. ``undo()`` puts back modules, values, and the optimizer's groups and state as they
were before the operation, also after training: weights that have learnt in one architecture mean nothing in the other.
For that it keeps a copy of parameters, buffers and optimizer state on the CPU; let go of the record to free it.
``.grad`` is left alone: operate between ``zero_grad()`` and the next ``backward()``. Attach a guard, compile or wrap
for several devices afterwards.

Example:
    >>> import torch
    >>> from gradguard.remedies import surgery
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 2))
    >>> applied = surgery.insert_norm(model, "layer")
    >>> print(applied)
    layer-norm
      0: LayerNorm 8 before the sigmoid behind Linear 8>8
      2: left alone, it is the output layer
    >>> applied.names["0.weight"]
    '0.layer.weight'
    >>> _ = applied.undo()
"""

from gradguard.remedies.surgery._activations import ActivationName, replace_activations
from gradguard.remedies.surgery._attention import add_qk_norm
from gradguard.remedies.surgery._deep import add_normalized_residual
from gradguard.remedies.surgery._input import standardize_input
from gradguard.remedies.surgery._norms import NormKind, Where, insert_norm
from gradguard.remedies.surgery._output import linear_output
from gradguard.remedies.surgery._recurrent import CellKind, swap_recurrent
from gradguard.remedies.surgery._rename import rename
from gradguard.remedies.surgery._residual import add_residual
from gradguard.remedies.surgery._table import REMEDIES, Operation
from gradguard.remedies.surgery.modules import BareLSTM, Normalized, QKNormAttention, Residual, Standardized

__all__ = [
    "REMEDIES",
    "ActivationName",
    "BareLSTM",
    "CellKind",
    "NormKind",
    "Normalized",
    "Operation",
    "QKNormAttention",
    "Residual",
    "Standardized",
    "Where",
    "add_normalized_residual",
    "add_qk_norm",
    "add_residual",
    "insert_norm",
    "linear_output",
    "rename",
    "replace_activations",
    "standardize_input",
    "swap_recurrent",
]
