"""Every limit has a unit, a range and a source, and the page that lists them is true."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from gradguard.config import GuardConfig

NUMBERS = [item for item in fields(GuardConfig) if isinstance(item.default, (int, float))]
PAGE = Path(__file__).parent.parent / "docs" / "thresholds.md"


@pytest.mark.parametrize("item", NUMBERS, ids=lambda item: item.name)
def test_limit_has_unit_range_and_source(item: object) -> None:
    """A threshold without a source is a bug."""
    metadata = item.metadata  # type: ignore[attr-defined]  # a dataclass field

    assert metadata["unit"]
    assert metadata["low"] <= item.default <= metadata["high"]  # type: ignore[attr-defined]  # as above
    assert len(metadata["source"]) > 10


@pytest.mark.parametrize("item", NUMBERS, ids=lambda item: item.name)
def test_page_lists_the_limit_as_it_is(item: object) -> None:
    """The documentation's table holds the name, the default, the unit and the source in force."""
    name, default, metadata = item.name, item.default, item.metadata  # type: ignore[attr-defined]  # as above

    assert f"| `{name}` | {default:g} | {metadata['unit']} | {metadata['source']} |" in PAGE.read_text(encoding="utf-8")
