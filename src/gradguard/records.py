"""What one observation says: plain numbers and numpy arrays, no tensors.

A run is a sequence of :class:`StepRecord`. Each belongs to one optimizer step of one optimizer and holds three groups
of numbers: scalars, a column per layer statistic, and a column per parameter statistic. Tables name the rows; they are
shared between records as long as the model does not change.

The columns are listed in :mod:`gradguard.columns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradguard.columns import LAYER_STATISTICS, MATRIX_STATISTICS, PARAMETER_STATISTICS, TEMPORAL_STATISTICS
from gradguard.origins import NonFiniteOrigin, TensorRange

__all__ = [
    "LAYER_STATISTICS",
    "MATRIX_STATISTICS",
    "PARAMETER_STATISTICS",
    "TEMPORAL_STATISTICS",
    "FloatArray",
    "LayerTable",
    "MatrixTable",
    "NonFiniteOrigin",
    "OptimizerInfo",
    "ParameterTable",
    "RunInfo",
    "StepRecord",
    "TemporalProfile",
    "TensorRange",
]

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Names of the layer rows of a record, in execution order (by first call).

    Attributes:
        names: Dotted module names, unique.
        types: Class names, for instance ``"Linear"``.
        kinds: Type and size for people, for instance ``"Linear 64>10"``.
        roles: ``"affine"``, ``"norm"``, ``"activation"``, ``"recurrent"``, ``"embedding"``, ``"attention"`` or
            ``"other"``.
        derivative_bounds: Largest derivative of the activation (0.25 for a sigmoid); NaN for other modules.
        blocks: Dotted name of the block of the trunk that the module is or lies in, for instance ``"encoder.3"``; empty
            outside of blocks, and in a model that is not stacked from at least four of them. None given means empty
            throughout.
    """

    names: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    derivative_bounds: tuple[float, ...] = ()
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.blocks:
            object.__setattr__(self, "blocks", ("",) * len(self.names))
        columns = (self.names, self.types, self.kinds, self.roles, self.derivative_bounds, self.blocks)
        lengths = {len(column) for column in columns}
        if len(lengths) > 1:
            raise ValueError(f"the columns of a LayerTable must have one length, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterTable:
    """Names of the parameter rows of a record, in registration order.

    Attributes:
        names: Dotted parameter names, unique; a tied parameter stands once, under its first name.
        aliases: Further names of a tied parameter, per row.
        layers: Dotted name of the owning module, per row.
        sizes: Number of entries.
        dims: Number of dimensions.
        outputs: Size of the first dimension, the units that a Linear or Conv leads to; 0 where unknown.
    """

    names: tuple[str, ...] = ()
    aliases: tuple[tuple[str, ...], ...] = ()
    layers: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.aliases), len(self.layers), len(self.sizes), len(self.dims)}
        if not self.outputs:
            object.__setattr__(self, "outputs", (0,) * len(self.names))
        lengths.add(len(self.outputs))
        if len(lengths) > 1:
            raise ValueError(f"the columns of a ParameterTable must have one length, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixTable:
    """Names of the matrix rows of a record, in registration order.

    Attributes:
        names: Dotted parameter names, with the part in brackets where it is one of several, for instance
            ``"rnn.weight_hh_l0[forget]"``.
        layers: Dotted name of the owning module, per row.
        recurrent: Whether it maps a recurrent net's state to the next one, or to a gate.
        derivative_bounds: Largest derivative of the nonlinearity behind it in a recurrent net; NaN for other matrices.
    """

    names: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    recurrent: tuple[bool, ...] = ()
    derivative_bounds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.layers), len(self.recurrent), len(self.derivative_bounds)}
        if len(lengths) > 1:
            raise ValueError(f"the columns of a MatrixTable must have one length, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerInfo:
    """What the rules need to know of an optimizer.

    Attributes:
        name: Class name, for instance ``"AdamW"``.
        label: How reports call it where there are several, for instance ``"generator"``; empty for a single one.
        adaptive: Whether it divides by a running gradient magnitude (Adam and relatives), so that scale hardly matters.
        epsilon: Its ``eps``, NaN where it has none.
    """

    name: str
    label: str = ""
    adaptive: bool = False
    epsilon: float = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What is true of a whole run.

    Attributes:
        model: Class name of the model.
        parameter_count: Trainable scalars.
        optimizers: One per optimizer, in the order in which they were given; empty where none was given.
        preflight: Whether this is a check before the first step rather than a run.
        expects_updates: Whether optimizer steps are observed (False for a check).
        classes: Width of the output where the loss looks like a classification, else 0.
        skipped_steps: Steps that the loss scaler has skipped so far, those before the first clean step not counted.
        skipped_in_a_row: Steps that it has skipped since the last clean one.
        loss_scale: Its scale when last looked at, NaN without a scaler.
        clip_norm: Norm above which the caller clips, where that is known, else NaN.
    """

    model: str = ""
    parameter_count: int = 0
    optimizers: tuple[OptimizerInfo, ...] = ()
    preflight: bool = False
    expects_updates: bool = True
    classes: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_scale: float = float("nan")
    clip_norm: float = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalProfile:
    """The gradient at the time steps of a recurrent module, for drawing; at most 64 points.

    Arrays of shape ``[points]``, over the sequences of the slice, unscaled. A bidirectional module's directions are
    joined, each in its own time.

    Attributes:
        distance: Steps back from the last reading, from 0.
        injected: L2 norm of the gradient that the loss puts in at that step's output.
        hidden: L2 norm of the loss gradient at the hidden states, over all layers.
        cell: The same at the cell states; NaN without cells.
        input: The same at the module's input.
        memory: Gradient of the last reading alone at the input, for a reading of length 1 per sequence.
    """

    distance: FloatArray
    injected: FloatArray
    hidden: FloatArray
    cell: FloatArray
    input: FloatArray
    memory: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One observation: everything read around one optimizer step.

    Attributes:
        step: Optimizer step of this optimizer, from 0.
        batch: Backward passes seen before this step, from 0.
        optimizer: Index into :attr:`RunInfo.optimizers`; 0 where none was given.
        scalars: Numbers of the whole step, by name.
        layers: Names of the layer rows.
        layer_values: Per statistic an array of shape ``[len(layers)]``.
        parameters: Names of the parameter rows.
        parameter_values: Per statistic an array of shape ``[len(parameters)]``.
        profiles: Gradients through time by module; a history keeps only the newest.
        matrices: Names of the matrix rows.
        matrix_values: Per statistic an array of shape ``[len(matrices)]``.
    """

    step: int
    batch: int = 0
    optimizer: int = 0
    scalars: Mapping[str, float] = field(default_factory=dict)
    layers: LayerTable = field(default_factory=LayerTable)
    layer_values: Mapping[str, FloatArray] = field(default_factory=dict)
    parameters: ParameterTable = field(default_factory=ParameterTable)
    parameter_values: Mapping[str, FloatArray] = field(default_factory=dict)
    profiles: Mapping[str, TemporalProfile] = field(default_factory=dict)
    matrices: MatrixTable = field(default_factory=MatrixTable)
    matrix_values: Mapping[str, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, table, values in (
            ("layer", self.layers, self.layer_values),
            ("parameter", self.parameters, self.parameter_values),
            ("matrix", self.matrices, self.matrix_values),
        ):
            for name, column in values.items():
                if column.shape != (len(table),):
                    raise ValueError(
                        f"{kind} column {name!r} of step {self.step} has shape {column.shape}, "
                        f"expected ({len(table)},): one number for each of the table's rows"
                    )
