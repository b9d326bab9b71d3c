"""History: the observations of a run, bounded in memory, read column by column."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Generic, TypeVar

import numpy as np

from gradguard.records import (
    FloatArray,
    LayerTable,
    MatrixTable,
    NonFiniteOrigin,
    ParameterTable,
    RunInfo,
    StepRecord,
    TemporalProfile,
)

__all__ = ["History"]

Item = TypeVar("Item")
Derived = TypeVar("Derived")
Table = TypeVar("Table", LayerTable, ParameterTable, MatrixTable)

_HEAD = 32
"""First observations, never thinned out: most illnesses show there, and "first seen" needs them."""

_TABLES: Mapping[str, Callable[[History | StepRecord], LayerTable | ParameterTable | MatrixTable]] = {
    "layer": lambda of: of.layers,
    "parameter": lambda of: of.parameters,
    "matrix": lambda of: of.matrices,
}
"""Where a group of columns has the names of its rows."""

_ORIGINS = 32
"""Origins of non-finite numbers kept: the first ones, as later ones mostly follow from them. Ours."""


class _Thinned(Generic[Item]):
    """A bounded list: the first items, the newest, and evenly spaced ones in between."""

    def __init__(self, capacity: int) -> None:
        self._head: list[Item] = []
        self._middle: list[Item] = []
        self._tail: deque[Item] = deque()
        self._tail_size = capacity // 3
        self._middle_size = capacity - _HEAD - self._tail_size
        self._stride = 1
        self._passed = 0

    def append(self, item: Item) -> None:
        if len(self._head) < _HEAD:
            self._head.append(item)
            return
        self._tail.append(item)
        if len(self._tail) <= self._tail_size:
            return
        oldest = self._tail.popleft()
        if self._passed % self._stride == 0:
            self._middle.append(oldest)
        self._passed += 1
        if len(self._middle) > self._middle_size:
            del self._middle[1::2]
            self._stride *= 2

    def items(self) -> list[Item]:
        return [*self._head, *self._middle, *self._tail]

    def __len__(self) -> int:
        return len(self._head) + len(self._middle) + len(self._tail)


class History:
    """Observations of a run, oldest first, by statistic name.

    Memory is bounded whatever the run's length. At most ``capacity`` observations are kept: the first 32, the newest
    third, and evenly spaced ones in between. At the default capacity of 256 a layer costs at most 42 KiB
    (``capacity * len(LAYER_STATISTICS) * 8`` bytes), 14 KiB more in nets with recurrent modules, and a parameter 30 KiB
    (the same with ``PARAMETER_STATISTICS``).
    Losses, recorded at every step and kept in the same way, cost at most 600 KiB in all.

    Example:
        >>> import numpy as np
        >>> from gradguard.records import LayerTable, StepRecord
        >>> table = LayerTable(names=("a",), types=("Linear",), kinds=("Linear 2>2",), roles=("affine",),
        ...                    derivative_bounds=(float("nan"),))
        >>> history = History()
        >>> for step in range(3):
        ...     history.append(StepRecord(step=step, layers=table, layer_values={"delta_norm": np.array([0.5 * step])}))
        >>> history.layer("delta_norm")[:, 0].tolist()
        [0.0, 0.5, 1.0]
    """

    def __init__(self, info: RunInfo | None = None, *, capacity: int = 256, loss_capacity: int = 4096) -> None:
        """Make an empty history.

        Args:
            info: What is true of the whole run.
            capacity: Observations to keep, at least 96.
            loss_capacity: Losses to keep, at least 96.

        Raises:
            ValueError: If a capacity is too small to keep the start and the end of a run.
        """
        for name, value in (("capacity", capacity), ("loss_capacity", loss_capacity)):
            if value < 3 * _HEAD:
                raise ValueError(f"{name} must be at least {3 * _HEAD}, to keep the start and the end, got {value!r}")
        self._derived: dict[Hashable, Any] = {}
        self.info = info if info is not None else RunInfo()
        self.capacity = capacity
        self.loss_capacity = loss_capacity
        self.optimizer = 0
        self._records: _Thinned[StepRecord] = _Thinned(capacity)
        self._losses: _Thinned[tuple[int, float, int]] = _Thinned(loss_capacity)
        self._origins: list[NonFiniteOrigin] = []
        self._finite_batches: set[int] = set()
        self._seen: Counter[int] = Counter()
        self._profiles: dict[int, Mapping[str, TemporalProfile]] = {}
        self._cache: dict[tuple[str, str], FloatArray] = {}
        self._tables: tuple[LayerTable, ParameterTable, MatrixTable] | None = None
        self._layouts: dict[str, tuple[FloatArray, Mapping[int, list[int]]]] = {}
        self._kept: tuple[StepRecord, ...] | None = None
        self._loss_columns: tuple[FloatArray, FloatArray] | None = None

    def append(self, record: StepRecord) -> None:
        """Add an observation; where there are too many, the middle is thinned out."""
        if record.profiles:
            self._profiles[record.optimizer] = record.profiles
            record = replace(record, profiles={})
        self._records.append(record)
        self._seen[record.optimizer] += 1
        self._cache.clear()
        self._derived.clear()
        self._layouts.clear()
        self._tables = self._kept = None

    def note_loss(self, step: int, loss: float, *, optimizer: int = 0) -> None:
        """Add the loss of one step; non-finite losses are kept as they are."""
        self._losses.append((step, loss, optimizer))
        self._derived.clear()
        self._loss_columns = None

    def note_origin(self, origin: NonFiniteOrigin) -> None:
        """Add what made a step's numbers non-finite; the first 32 are kept."""
        if len(self._origins) < _ORIGINS:
            self._origins.append(origin)

    def note_finite_batch(self, step: int) -> None:
        """Say that the batch of a step was looked at and is finite; kept for the first 32 steps that say so."""
        if len(self._finite_batches) < _ORIGINS:
            self._finite_batches.add(step)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def finite_batches(self) -> frozenset[int]:
        """Steps whose batch was looked at, for the loss was not finite, and held neither NaN nor infinity."""
        return frozenset(self._finite_batches)

    @property
    def origins(self) -> Sequence[NonFiniteOrigin]:
        """What made numbers non-finite, oldest first, of the steps that were searched for it."""
        return tuple(self._origins)

    @property
    def observations(self) -> int:
        """Observations made, kept or thinned out."""
        return self._seen.total()

    @property
    def records(self) -> Sequence[StepRecord]:
        """The kept observations, oldest first."""
        if self._kept is None:
            self._kept = tuple(self._records.items())
        return self._kept

    @property
    def steps(self) -> FloatArray:
        """Optimizer step of each observation, shape ``[observations]``."""
        return self._of_records("step", "", lambda record: record.step)

    @property
    def losses(self) -> tuple[FloatArray, FloatArray]:
        """Steps and losses, oldest first, each of shape ``[losses]``; kept for every step, not only observed ones."""
        if self._loss_columns is None:
            kept = self._losses.items()
            steps = np.array([step for step, *_ in kept], dtype=np.float64)
            self._loss_columns = _fixed(steps), _fixed(np.array([loss for _, loss, _ in kept], dtype=np.float64))
        return self._loss_columns

    @property
    def profiles(self) -> Mapping[str, TemporalProfile]:
        """The newest gradients through time by recurrent module; empty where none was followed."""
        return self._profiles.get(self.optimizer, {})

    @property
    def layers(self) -> LayerTable:
        """All layers seen, in the execution order of the newest observation; layers it lacks stand at the end."""
        return self._union()[0]

    @property
    def parameters(self) -> ParameterTable:
        """All parameters seen, in the order of the newest observation; parameters it lacks stand at the end."""
        return self._union()[1]

    @property
    def matrices(self) -> MatrixTable:
        """All matrices seen, in the order of the newest observation; matrices it lacks stand at the end."""
        return self._union()[2]

    def scalar(self, name: str) -> FloatArray:
        """Return a scalar per observation, shape ``[observations]``; NaN where it is unknown."""
        return self._of_records("scalar", name, lambda record: record.scalars.get(name, np.nan))

    def layer(self, name: str) -> FloatArray:
        """Return a layer statistic, shape ``[observations, layers]``; NaN where a layer was not observed."""
        return self._column("layer", name, [record.layer_values.get(name) for record in self.records])

    def parameter(self, name: str) -> FloatArray:
        """Return a parameter statistic, shape ``[observations, parameters]``; NaN where it was not observed."""
        return self._column("parameter", name, [record.parameter_values.get(name) for record in self.records])

    def matrix(self, name: str) -> FloatArray:
        """Return a matrix statistic, shape ``[observations, matrices]``; NaN where it was not observed."""
        return self._column("matrix", name, [record.matrix_values.get(name) for record in self.records])

    def derived(self, key: Hashable, compute: Callable[[], Derived]) -> Derived:
        """Return what follows from losses and observations: computed once, until there is more of either.

        Several rules ask for the same spans, ratios and trend whenever a history is judged.

        Args:
            key: What it is, with every threshold and fact of :attr:`info` that it depends on.
            compute: Computes it from this history. What it returns is shared; an array becomes read-only.
        """
        if key not in self._derived:
            found = compute()
            self._derived[key] = _fixed(found) if isinstance(found, np.ndarray) else found
        result: Derived = self._derived[key]
        return result

    def split(self) -> tuple[History, ...]:
        """Return one history per optimizer that was observed; a run with one optimizer returns itself."""
        indices = sorted({record.optimizer for record in self.records} | {owner for *_, owner in self._losses.items()})
        if len(indices) <= 1:
            self.optimizer = indices[0] if indices else 0
            return (self,)
        return tuple(self._of_optimizer(index) for index in indices)

    def _of_optimizer(self, index: int) -> History:
        part = History(self.info, capacity=self.capacity, loss_capacity=self.loss_capacity)
        part.optimizer = index
        for record in self.records:
            if record.optimizer == index:
                part.append(record)
        for step, loss, owner in self._losses.items():
            if owner == index:
                part.note_loss(step, loss, optimizer=index)
        part._origins = [origin for origin in self._origins if origin.optimizer == index]
        part._finite_batches = self._finite_batches
        part._seen[index] = self._seen[index]
        if index in self._profiles:
            part._profiles[index] = self._profiles[index]
        return part

    def _union(self) -> tuple[LayerTable, ParameterTable, MatrixTable]:
        if self._tables is None:
            self._tables = (
                _merge([record.layers for record in reversed(self.records)], LayerTable()),
                _merge([record.parameters for record in reversed(self.records)], ParameterTable()),
                _merge([record.matrices for record in reversed(self.records)], MatrixTable()),
            )
        return self._tables

    def _column(self, group: str, name: str, values: Sequence[FloatArray | None]) -> FloatArray:
        """Return the values of all observations under each other, each at the rows of the union of tables."""
        key = (group, name)
        if key not in self._cache:
            unknown, places = self._places(group)
            rows = [unknown if value is None else value for value in values]
            for index, place in places.items():  # a layer came or went since
                rows[index] = unknown.copy()
                if (value := values[index]) is not None:
                    rows[index][place] = value
            self._cache[key] = _fixed(np.array(rows, dtype=np.float64).reshape(len(rows), len(unknown)))
        return self._cache[key]

    def _places(self, group: str) -> tuple[FloatArray, Mapping[int, list[int]]]:
        """Return a row of NaN, and where the values of those observations belong whose table is not the union."""
        if group not in self._layouts:
            table_of = _TABLES[group]
            names = table_of(self).names
            position = {row: index for index, row in enumerate(names)}
            tables = [table_of(record) for record in self.records]
            self._layouts[group] = (
                np.full(len(names), np.nan),
                {
                    index: [position[row] for row in table.names]
                    for index, table in enumerate(tables)
                    if table.names != names
                },
            )
        return self._layouts[group]

    def _of_records(self, group: str, name: str, read: Callable[[StepRecord], float]) -> FloatArray:
        key = (group, name)
        if key not in self._cache:
            self._cache[key] = _fixed(np.array([read(record) for record in self.records], dtype=np.float64))
        return self._cache[key]


def _fixed(column: FloatArray) -> FloatArray:
    """Return a column that nobody can write to: the next reader gets the same."""
    column.setflags(write=False)
    return column


def _merge(tables: Sequence[Table], empty: Table) -> Table:
    """Return one table with every row of several, in the order of the first; each row as the first table has it."""
    if not tables:
        return empty
    first = tables[0]
    if all(table is first or table.names == first.names for table in tables):
        return first
    columns = [column.name for column in fields(first)]
    rows = {
        row[0]: row
        for table in reversed(tables)
        for row in zip(*(getattr(table, column) for column in columns), strict=True)
    }
    order = dict.fromkeys(name for table in tables for name in table.names)
    merged = zip(*(rows[name] for name in order), strict=True)
    return type(first)(**dict(zip(columns, merged, strict=True)))
