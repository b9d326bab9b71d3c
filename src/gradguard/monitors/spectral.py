"""Spectra of the weights: one warm power iteration per matrix and observed step.

At the reading point, before the update, from the weights alone: no hook is set, no gradient or random state touched, no
number waited for. Matrices of one shape are measured together. Embeddings are left out: a lookup picks rows, and no
vector is ever multiplied with the table. Of other modules only what is called a weight or a kernel counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from gradguard.findings import Unobserved
from gradguard.monitors._describe import clean_name
from gradguard.monitors._reduce import Handle, Readback
from gradguard.records import MATRIX_STATISTICS, FloatArray, MatrixTable
from gradguard.spectra import NamedMatrix, named_matrices, power_iteration
from gradguard.spectra._convolution import Conv, conv_power_step
from gradguard.spectra._radius import growth
from gradguard.spectra._tensors import private_start

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SpectralMonitor", "followed_modules", "is_followed", "row_name"]

_FIRST_ITERATIONS = 10
"""Power iterations at the first observation: 4 % short for Gaussian 256 x 256, 8 % for 1024. Source: algorithms C1."""

_FIRST_GROWTH, _LATER_GROWTH, _LEAST_GROWTH = 100, 32, 8
"""Products with a recurrent matrix at the first observation, at each later one, and at least. Source: algorithms C3;
ours: complex eigenvalues make 8 products jitter by 11 % at 8 x 8."""

_FIRST_ENTRIES, _LATER_ENTRIES = 1 << 27, 1 << 24
"""Entries multiplied in those products at most. Ours: about 50 and 5 ms on two CPU cores."""

_STACKED = 1 << 16
"""Matrices of up to this many entries are copied into one tensor and multiplied together. Ours."""

_WEIGHT = re.compile(r"weight|kernel")
"""Names of parameters that are multiplied with vectors, rather than positions, tokens or masks."""

_Row = tuple[str, str, NamedMatrix | None]
"""Name of a row, name of its layer, and its matrix; ``None`` for a convolution."""


class SpectralMonitor:
    """Measures the largest singular value of every matrix and convolution, and the radius of recurrent ones.

    Attributes:
        table: The rows of the present observation.
        failed: Whether a measurement failed, which switches the monitor off.
    """

    name = "spectral"

    def __init__(self, model: nn.Module, *, on_failure: Callable[[str, BaseException], None], off: bool) -> None:
        """Prepare for a model.

        Args:
            model: The model to observe.
            on_failure: Called with a place and an exception when something of ours fails.
            off: Whether nothing is wanted of it.
        """
        self._model = model
        self._on_failure = on_failure
        self.failed = off
        self._vectors: dict[tuple[str, ...], Tensor] = {}
        self._grown: dict[tuple[str, ...], Tensor] = {}
        self._forget()

    def read(self, readback: Readback, input_sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Queue the numbers of the weights as they are.

        Args:
            readback: Where the numbers wait.
            input_sizes: Spatial size of the input of each convolution, by name; others are left out.
        """
        self._forget()
        if self.failed:
            return
        try:
            with torch.no_grad():
                self._read(readback, input_sizes)
        except Exception as error:  # noqa: BLE001  # whatever fails here must not reach the user's loop
            self.failed = True
            self.close()
            self._on_failure("the spectra of the weights", error)

    def columns(self, readback: Readback) -> dict[str, FloatArray]:
        """Return an array of shape ``[matrices]`` per statistic, if anything was measured; call after the transfer."""
        if not len(self.table):
            return {}
        columns = {name: np.full(len(self.table), np.nan) for name in MATRIX_STATISTICS}
        for statistic, handles in self._handles.items():
            for row, (handle, offset) in handles.items():
                columns[statistic][row] = readback.value(handle, offset)
        return columns

    def unobserved(self) -> list[Unobserved]:
        """Return what cannot be measured in this model."""
        if self.failed:
            return []
        names = [clean_name(raw) for raw, module in self._model.named_modules() if _has_hidden_matrix(module)]
        if not names:
            return []
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        why = "its weight is parametrized or sharded, and reading it could change it or wait for other ranks"
        return [Unobserved(what=f"the spectrum of {names[0] or 'the model'}{more}", why=why)]

    def close(self) -> None:
        """Let go of tensors."""
        self._vectors, self._grown = {}, {}
        self._forget()

    def _forget(self) -> None:
        self.table = MatrixTable()
        self._handles: dict[str, dict[int, tuple[Handle, int]]] = {name: {} for name in MATRIX_STATISTICS}

    def _read(self, readback: Readback, input_sizes: Mapping[str, tuple[int, ...]]) -> None:
        rows: list[_Row] = []
        groups: dict[object, list[int]] = {}
        for layer, module in followed_modules(self._model):
            if isinstance(module, Conv):
                if layer in input_sizes:
                    self._read_conv(readback, len(rows), layer, module, input_sizes[layer])
                    rows.append((row_name(layer, "weight"), layer, None))
                continue
            for found in named_matrices(module, name=layer):
                matrix = found.matrix
                if not is_followed(found):
                    continue
                alone = len(rows) if matrix.numel() > _STACKED else -1
                groups.setdefault((matrix.shape, matrix.dtype, matrix.device, found.is_recurrent, alone), []).append(
                    len(rows)
                )
                rows.append((row_name(layer, found.name), layer, found))
        self.table = _table(rows)
        with_matrix = [row[2] for row in rows]
        for indices in groups.values():
            members = [member for index in indices if (member := with_matrix[index]) is not None]
            self._read_group(readback, indices, members)

    def _read_group(self, readback: Readback, indices: list[int], members: list[NamedMatrix]) -> None:
        key = tuple(self.table.names[index] for index in indices)
        stack = torch.stack([member.matrix for member in members]) if len(members) > 1 else members[0].matrix[None]
        if stack.dtype in (torch.float16, torch.bfloat16):
            stack = stack.float()
        with torch.autocast(stack.device.type, enabled=False):
            start = self._vectors.get(key)
            iterations = 1 if start is not None else _FIRST_ITERATIONS
            sigma, self._vectors[key] = power_iteration(stack, iterations=iterations, start=start)
            self._keep("sigma_max", readback.put_vector(sigma), indices)
            if members[0].is_recurrent and stack.shape[1] == stack.shape[2]:
                start, most, entries = self._grown.get(key), _LATER_GROWTH, _LATER_ENTRIES
                if start is None:
                    start = private_start((len(stack), stack.shape[1]), stack)
                    most, entries = _FIRST_GROWTH, _FIRST_ENTRIES
                products = min(most, max(_LEAST_GROWTH, entries // stack[0].numel()))
                radius, self._grown[key] = growth(stack, start, products)
                self._keep("spectral_radius", readback.put_vector(radius), indices)

    def _read_conv(self, readback: Readback, row: int, layer: str, module: Conv, size: tuple[int, ...]) -> None:
        key = (layer,)
        with torch.autocast(module.weight.device.type, enabled=False):
            start = self._vectors.get(key)
            sigma = None
            for _ in range(1 if start is not None else _FIRST_ITERATIONS):
                sigma, start = conv_power_step(module, size, start)
        if sigma is not None and start is not None:
            self._vectors[key] = start
            self._handles["sigma_max"][row] = readback.put(sigma), 0

    def _keep(self, statistic: str, handle: Handle, indices: list[int]) -> None:
        self._handles[statistic].update({row: (handle, offset) for offset, row in enumerate(indices)})


def is_followed(found: NamedMatrix) -> bool:
    """Whether this is a matrix that is multiplied with vectors, as far as its name tells."""
    return found.matrix.numel() > 0 and not found.matrix.is_meta and bool(_WEIGHT.search(found.parameter))


def followed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose weights are multiplied with vectors, each once, with their names; tied weights once."""
    unwrap = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    seen: set[int] = set()
    for raw, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or _has_hidden_matrix(module):
            continue
        own = {id(p) for key, p in module._parameters.items() if p is not None and p.ndim >= 2 and _WEIGHT.search(key)}
        if own and not own <= seen:
            seen |= own
            yield clean_name(raw, unwrap=unwrap), module


def _has_hidden_matrix(module: nn.Module) -> bool:
    """Whether a weight cannot be read without changing its state, waiting for other ranks, or at all."""
    return parametrize.is_parametrized(module) or any(hasattr(p, "_local_tensor") for p in module._parameters.values())


def _table(rows: list[_Row]) -> MatrixTable:
    return MatrixTable(
        names=tuple(name for name, _, _ in rows),
        layers=tuple(layer for _, layer, _ in rows),
        recurrent=tuple(found is not None and found.is_recurrent for _, _, found in rows),
        derivative_bounds=tuple(float("nan") if found is None else found.derivative_bound for _, _, found in rows),
    )


def row_name(layer: str, name: str) -> str:
    """Return the name of a matrix in its model."""
    return f"{layer}.{name}" if layer else name
