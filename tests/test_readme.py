"""The README's Python blocks run as they stand, in order, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(?P<skip><!-- no-run -->\s*\n)?^```python\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def run_blocks(text: str, *, name: str) -> dict[str, Any]:
    """Run the Python blocks of a Markdown text in one namespace; tracebacks show the line of the text.

    Blocks under a line ``<!-- no-run -->`` are left out.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        if block["skip"] is None:
            line = text.count("\n", 0, block.start("code"))
            exec(compile("\n" * line + block["code"], name, "exec"), namespace)  # noqa: S102  # our own README
    return namespace


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pastes the README's code gets no error; files that it writes go to the working directory."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")

    run_blocks(text, name="README.md")

    assert BLOCK.search(text) is not None


def test_blocks_share_a_namespace_in_order() -> None:
    """A later block can use the names of an earlier one."""
    namespace = run_blocks("```python\na = 1\n```\ntext\n```python\na += 1\n```\n", name="text")

    assert namespace["a"] == 2


def test_marked_and_foreign_blocks_are_left_out() -> None:
    """Only Python is run, and only where no mark stands above the block."""
    text = "<!-- no-run -->\n```python\nboom\n```\n```bash\nboom\n```\n<!-- no-run -->\n\n```python\nboom\n```\n"

    assert "boom" not in run_blocks(text, name="text")


def test_failing_block_is_located() -> None:
    """An error in a block names the line in the README."""
    with pytest.raises(NameError, match="boom") as caught:
        run_blocks("# Title\n\n```python\na = 1\nboom\n```\n", name="README.md")

    assert (str(caught.traceback[-1].path).endswith("README.md"), caught.traceback[-1].lineno + 1) == (True, 5)
