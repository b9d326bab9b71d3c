"""Code in narrow places: broken only where Python allows it, so that what is printed can still be pasted."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len

__all__ = ["wrap_code"]

_COMMENT_GAP = "  # "

_NARROWEST = 12
"""Columns below which a line is not broken any further. Ours: an indented name does not fit into less."""


def wrap_code(code: str, width: int) -> list[str]:
    """Break lines of Python that are longer than ``width``.

    A comment behind a statement moves above it. A statement is broken at a space inside brackets, else at any space
    outside strings with a backslash before the break. What has no such place is cut.

    Args:
        code: Source text.
        width: Cells per line.
    """
    width = max(width, _NARROWEST)
    return [part for line in code.rstrip().split("\n") for part in _broken(line.rstrip(), width)]


def _broken(line: str, width: int) -> Iterator[str]:
    if cell_len(line) <= width:
        yield line
        return
    indent = " " * min(len(line) - len(line.lstrip(" ")), width - _NARROWEST + 4)
    statement, comment = _without_comment(line)
    if comment:
        yield from _broken_comment(comment, indent, width)
    if statement.strip():
        yield from _broken_statement(statement, indent, width)


def _without_comment(line: str) -> tuple[str, str]:
    for index, _, quoted in _places(line):
        if line[index] == "#" and not quoted:
            return line[:index].rstrip(), line[index + 1 :].strip()
    return line, ""


def _broken_comment(comment: str, indent: str, width: int) -> Iterator[str]:
    start = f"{indent}#"
    current = start
    for word in comment.split():
        if current != start and cell_len(f"{current} {word}") > width:
            yield current
            current = start
        current += f" {word}"
    yield from _cut(current, width)


def _broken_statement(line: str, indent: str, width: int) -> Iterator[str]:
    rest, depth = indent + line.lstrip(" "), 0
    while cell_len(rest) > width:
        place, inside = _break(rest, depth, width)
        if place is None:
            break
        piece = rest[:place].rstrip(" ")
        yield piece if inside else f"{piece} \\"
        depth = max(0, _depth(piece, depth))
        rest = f"{indent}    {rest[place:].lstrip(' ')}"
    yield from _cut(rest, width)


def _break(line: str, depth: int, width: int) -> tuple[int | None, bool]:
    """Return the last place at which to break, and whether it lies inside brackets."""
    first = len(line) - len(line.lstrip(" ")) + 1
    inside = outside = None
    for index, level, quoted in _places(line):
        if quoted or index < first:
            continue
        fits = cell_len(line[:index])
        if depth + level > 0 and _may_break(line, index) and fits <= width:
            inside = index
        elif depth + level == 0 and line[index] == " " and fits <= width - 2:
            outside = index
    return (inside, True) if inside is not None else (outside, False)


def _may_break(line: str, index: int) -> bool:
    return line[index] == " " or line[index - 1] in "([{"


def _depth(line: str, depth: int) -> int:
    for index, level, quoted in _places(line):
        if index == len(line) - 1:
            return depth + level + (0 if quoted else _step(line[index]))
    return depth


def _step(character: str) -> int:
    return (character in "([{") - (character in ")]}")


def _places(line: str) -> Iterator[tuple[int, int, bool]]:
    """Walk over a line: index, brackets open before it, and whether it lies inside a string."""
    level, quote = 0, ""
    escaped = False
    for index, character in enumerate(line):
        yield index, level, bool(quote)
        if quote:
            if character == quote and not escaped:
                quote = ""
            escaped = character == "\\" and not escaped
        elif character in "\"'":
            quote = character
        else:
            level += _step(character)


def _cut(line: str, width: int) -> Iterator[str]:
    while cell_len(line) > width:
        end = next(i for i in range(len(line), 0, -1) if cell_len(line[:i]) <= width)
        yield line[:end]
        line = line[end:]
    yield line


def fits(code: str, width: int) -> bool:
    """Whether every line of a source text fits into ``width`` cells as it is."""
    return all(cell_len(line) <= width for line in re.split("\n", code))
