"""Determinism for every test, and a console that tests can read."""

from __future__ import annotations

import io
import os

import hypothesis
import pytest
import torch
from rich.console import Console

# A first call into torch can take long on a busy machine: no deadline. In CI the examples are the same on every run.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Compute on one thread: the tests' tensors are tiny, and sums come out alike whatever the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def wide_console() -> Console:
    """Return a console of 200 columns, without colour, whose text stands in ``wide_console.file.getvalue()``."""
    return Console(
        file=io.StringIO(), width=200, color_system=None, force_terminal=False, legacy_windows=False, _environ={}
    )
