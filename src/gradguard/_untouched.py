"""Running a user's model without leaving a trace in it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from gradguard.errors import GradGuardError

__all__ = ["FAILURES", "cuda_devices", "untouched"]

FAILURES = (GradGuardError, RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""How a user's model, its loss or a remedy may fail; what else is raised is the user's to see."""


def cuda_devices(model: nn.Module) -> list[int]:
    """Return the CUDA devices of a model's parameters, in order: those whose generators running it moves."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back buffers, random states and modes as they were, also after an exception.

    Random states are those of torch (CPU, and the CUDA devices of the model's parameters), numpy and ``random``.
    """
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  # the user's global state is meant
    try:
        with torch.random.fork_rng(devices=cuda_devices(model)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002  # as above
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                if buffer is not None and before is not None and not torch.equal(buffer, before):
                    buffer.copy_(before)
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
