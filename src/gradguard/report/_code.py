"""Code in narrow places: broken only where Python allows it, so that what is printed can still be pasted."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

__all__ = ["wrap_code"]

_NARROWEST = 16
"""Columns below which nothing is broken any further. Ours: an indented name does not fit into less."""

_INDENT = "    "

_BLANK = frozenset({tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER})


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a token begins: its column, the brackets open before it, and whether it is a comment."""

    column: int
    depth: int
    comment: bool


def wrap_code(code: str, width: int) -> list[str]:
    """Break those lines of Python that are longer than ``width`` cells.

    A comment behind a statement moves above it. A statement is broken inside brackets, or else before a token outside
    them with a backslash. What has no such place, and what is no Python, is cut.

    Args:
        code: Source text.
        width: Cells per line.

    Example:
        >>> wrap_code("total = combine(first_argument, second_argument)", 34)
        ['total = combine(first_argument,', '    second_argument)']
    """
    width = max(width, _NARROWEST)
    code = code.rstrip()
    places = _places(code)
    rows = enumerate((line.rstrip() for line in code.split("\n")), start=1)
    return [piece for row, line in rows for piece in _broken(line, places.get(row, ()), width)]


def _places(code: str) -> Mapping[int, list[_Place]]:
    """Return where tokens begin, by row; nothing where the text is no Python."""
    rows: dict[int, list[_Place]] = {}
    depth = inside_string = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            name = tokenize.tok_name[token.type]
            row, column = token.start
            if token.type not in _BLANK and not inside_string:
                before = token.line[column - 1 : column]
                if before in {"", " "} or (depth > 0 and before in "([{"):
                    rows.setdefault(row, []).append(_Place(column, depth, token.type == tokenize.COMMENT))
            inside_string += name.endswith("STRING_START") - name.endswith("STRING_END")
            if token.type == tokenize.OP and not inside_string:
                depth += (token.string in "([{") - (token.string in ")]}")
    except (tokenize.TokenError, SyntaxError):
        return {}
    return rows


def _broken(line: str, places: Sequence[_Place], width: int) -> Iterator[str]:
    if cell_len(line) <= width:
        yield line
        return
    first = len(line) - len(line.lstrip(" "))
    indent = " " * min(first, width // 2)
    comment = next((place.column for place in places if place.comment), len(line))
    statement = line[:comment].rstrip()
    if comment < len(line):
        yield from _comment(line[comment:], indent, width)
    if statement:
        yield from _statement(statement, [place for place in places if not place.comment], indent, width)


def _comment(text: str, indent: str, width: int) -> Iterator[str]:
    current = f"{indent}#"
    for word in text.lstrip("# ").split():
        if current.strip() != "#" and cell_len(f"{current} {word}") > width:
            yield from _cut(current, width)
            current = f"{indent}#"
        current += f" {word}"
    yield from _cut(current, width)


def _statement(line: str, places: Sequence[_Place], indent: str, width: int) -> Iterator[str]:
    start, before = len(line) - len(line.lstrip(" ")), indent
    outer = next((place.depth for place in places), 0)
    while cell_len(before + line[start:]) > width:
        ahead = [place for place in places if place.column > start]
        fitting = [place for place in ahead if cell_len(before + _piece(line, start, place)) <= width]
        chosen = max(fitting, key=lambda place: (place.depth > 0, -place.depth, place.column), default=None)
        if chosen is None:
            break
        yield before + _piece(line, start, chosen)
        start = chosen.column
        deeper = _INDENT * (2 if line.endswith(":") else 1)  # what follows a colon is indented, too
        before = indent if 0 < chosen.depth <= outer else indent + deeper
    yield from _cut(before + line[start:], width)


def _piece(line: str, start: int, place: _Place) -> str:
    piece = line[start : place.column].rstrip(" ")
    return piece if place.depth > 0 else f"{piece} \\"


def _cut(line: str, width: int) -> Iterator[str]:
    while cell_len(line) > width:
        end = next((i for i in range(len(line), 1, -1) if cell_len(line[:i]) <= width), 1)
        yield line[:end]
        line = line[end:]
    yield line
