"""Breaking text into lines: between words, between items, never inside a word; what is too long loses its middle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.text import Text

__all__ = ["elide", "flow", "hang", "join", "pad", "wrap"]

_GAP = "..."

_WORD = re.compile(r"\S+(?: %\S*)?")
"""A word; a number keeps its per cent sign."""


def elide(text: str, width: int) -> str:
    """Shorten a text in its middle to at most ``width`` cells.

    Of a dotted name whole parts stay: the last one, then the numbers (which tell layers apart), then the first, then
    those nearest to the end.

    Example:
        >>> elide("encoder.layers.11.attention.output.dense", 31)
        'encoder...11...output.dense'
        >>> elide("encoder.layers.11.attention.output.dense", 24)
        'encoder...11...dense'
        >>> elide("an_overlong_name", 10)
        'an_o...ame'
    """
    if cell_len(text) <= width:
        return text
    return _elide_name(text.split("."), width) or _elide_middle(text, width)


def _elide_name(parts: Sequence[str], width: int) -> str:
    if len(parts) < 3 or not all(parts):
        return ""
    last = len(parts) - 1
    order = [i for i in range(last) if parts[i].isdigit()] + [0, *range(last - 1, 0, -1)]
    kept = {last}
    for index in order:
        if cell_len(_assembled(parts, kept | {index})) <= width:
            kept.add(index)
    shortened = _assembled(parts, kept)
    return shortened if cell_len(shortened) <= width else ""


def _assembled(parts: Sequence[str], kept: set[int]) -> str:
    text, previous = "", -1
    for index in sorted(kept):
        text += (_GAP if index > previous + 1 else "." if index else "") + parts[index]
        previous = index
    return text


def _elide_middle(text: str, width: int) -> str:
    if width <= len(_GAP) + 2:
        return _head(text, width)
    right = (width - len(_GAP)) // 2
    return _head(text, width - len(_GAP) - right) + _GAP + _tail(text, right)


def _head(text: str, width: int) -> str:
    """Return as much of the beginning as fits into ``width`` cells."""
    end = 0
    while end < len(text) and cell_len(text[: end + 1]) <= width:
        end += 1
    return text[:end]


def _tail(text: str, width: int) -> str:
    """Return as much of the end as fits into ``width`` cells."""
    start = len(text)
    while start > 0 and cell_len(text[start - 1 :]) <= width:
        start -= 1
    return text[start:]


def wrap(content: Text | str, width: int) -> list[Text]:
    """Break a paragraph into lines of at most ``width`` cells, at spaces only; overlong words lose their middle."""
    text, words = _shortened(content if isinstance(content, Text) else Text(content), width)
    lines: list[Text] = []
    first = 0
    for index in range(1, len(words) + 1):
        start = words[first][0]
        if index == len(words) or cell_len(text.plain[start : words[index][1]]) > width:
            lines.append(text[start : words[index - 1][1]])
            first = index
    return lines


def _shortened(text: Text, width: int) -> tuple[Text, list[tuple[int, int]]]:
    """Return a text whose words fit into ``width`` cells, and where they begin and end."""
    result, words, end = Text(style=text.style), [], 0
    for word in _WORD.finditer(text.plain):
        result.append_text(text[end : word.start()])
        start, end = len(result), word.end()
        if cell_len(word.group()) > width:
            result.append(elide(word.group(), width))
        else:
            result.append_text(text[word.start() : end])
        words.append((start, len(result)))
    return result, words


def flow(items: Iterable[Text | str], width: int, separator: str) -> list[Text]:
    """Set items side by side, breaking lines between them; an item that is longer than a line is wrapped by itself."""
    lines: list[Text] = []
    for item in items:
        pieces = wrap(item, width)
        if not pieces:
            continue
        if lines and len(pieces) == 1 and cell_len(lines[-1].plain + separator + pieces[0].plain) <= width:
            lines[-1] = Text.assemble(lines[-1], separator, pieces[0])
        else:
            lines.extend(pieces)
    return lines


def pad(text: Text | str, width: int, *, right: bool = False) -> Text:
    """Fill a text with spaces up to ``width`` cells, on its left side if it is to stand on the right."""
    content = text if isinstance(text, Text) else Text(text)
    blank = " " * max(0, width - cell_len(content.plain))
    return Text.assemble(blank, content) if right else Text.assemble(content, blank)


def hang(lines: Sequence[Text], first: Text | str, rest: int) -> list[Text]:
    """Put ``first`` before the first line and ``rest`` spaces before the others."""
    return [Text.assemble(first if index == 0 else " " * rest, line) for index, line in enumerate(lines)]


def join(lines: Iterable[Text]) -> Text:
    """Return lines as one text that rich prints as it is, without trailing spaces."""
    result = Text("\n", no_wrap=True, overflow="ignore").join(lines)
    result.no_wrap, result.overflow = True, "ignore"
    return result
