"""The numbers in the pages of docs/ are computed where they stand."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_every_number_of_the_page_on_theory_is_what_its_block_gives() -> None:
    """And there are some."""
    state = torch.get_rng_state()
    try:
        results = doctest.testfile(
            str(DOCS / "theory.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE, encoding="utf-8"
        )
    finally:
        torch.set_rng_state(state)

    assert results.failed == 0
    assert results.attempted > 25
