"""Texts that any terminal and any page can show. Names are the user's and may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from gradguard.findings import Diagnosis, Prescription

__all__ = ["printable"]

_PLAIN = MappingProxyType({"·": "-", "×": "x", "–": "-", "≤": "<=", "≥": ">="})  # noqa: RUF001  # what is replaced
"""How an ASCII terminal shows the few signs that our own texts may use."""


def printable(diagnosis: Diagnosis, *, ascii_only: bool = False) -> Diagnosis:
    r"""Return a diagnosis whose texts hold no control characters, so that a name can neither move a cursor nor fail.

    White space of any kind becomes a space; what cannot be shown becomes its Python escape, for instance ``\x1b``.
    The line breaks of code stay.

    Args:
        diagnosis: What is about to be drawn.
        ascii_only: Whether everything beyond ASCII is escaped, too.
    """
    cleaned: Diagnosis = _clean(diagnosis, ascii_only=ascii_only)
    return cleaned


def _clean(value: Any, *, ascii_only: bool) -> Any:
    if isinstance(value, str) and not isinstance(value, Enum):
        return _line(value, ascii_only=ascii_only)
    if isinstance(value, Prescription):
        lines = (_line(line, ascii_only=ascii_only) for line in value.code.expandtabs(4).split("\n"))
        return replace(
            value,
            remedy=_line(value.remedy, ascii_only=ascii_only),
            reason=_line(value.reason, ascii_only=ascii_only),
            reference=_line(value.reference, ascii_only=ascii_only),
            code="\n".join(lines),
        )
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _clean(getattr(value, f.name), ascii_only=ascii_only) for f in fields(value)})
    if isinstance(value, Mapping):
        return {_clean(key, ascii_only=ascii_only): _clean(item, ascii_only=ascii_only) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_clean(item, ascii_only=ascii_only) for item in value)
    return value


def _line(text: str, *, ascii_only: bool) -> str:
    if text.isprintable() and (text.isascii() or not ascii_only):
        return text
    return "".join(_character(character, ascii_only=ascii_only) for character in text)


def _character(character: str, *, ascii_only: bool) -> str:
    if character.isspace():
        return " "
    if ascii_only and character in _PLAIN:
        return _PLAIN[character]
    if character.isprintable() and (character.isascii() or not ascii_only):
        return character
    return character.encode("unicode_escape").decode("ascii")
