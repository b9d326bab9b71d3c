"""The rule catalogue as text for a terminal."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradguard.rules import Rule

__all__ = ["print_explanations", "print_rules"]

_WIDE = 116
"""Columns from which a rule's summary fits beside its name."""

_TEXT_WIDTH = 100
"""Columns beyond which prose grows no wider: longer lines are hard to read."""


def print_rules(rules: Iterable[Rule], console: Console | None = None) -> None:
    """Print a table of rules, one per line in a wide terminal, else with the summary underneath.

    Args:
        rules: The rules, in the order of the rows.
        console: Where to print; standard output otherwise.
    """
    console = console if console is not None else _console()
    wide = console.width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("code", no_wrap=True, style="cyan")
    table.add_column("rule", no_wrap=wide)
    table.add_column("family", no_wrap=True)
    if wide:
        table.add_column("what it finds")
    for rule in rules:
        name = Text(rule.name, style="bold")
        if wide:
            table.add_row(rule.code, name, rule.family, rule.summary)
        else:
            table.add_row(rule.code, Text("\n").join((name, Text(rule.summary, style="dim"))), rule.family)
    console.print(table)
    console.print(Text("More on one of them: gradguard explain GG101", style="dim"))


def print_explanations(rules: Iterable[Rule], console: Console | None = None) -> None:
    """Print what each rule means, its mathematics, what helps and the sources.

    Args:
        rules: The rules, in the order of the pages.
        console: Where to print; standard output otherwise.
    """
    console = console if console is not None else _console()
    for index, rule in enumerate(rules):
        if index:
            console.print("\n")
        _Page(console).print(rule)


def _console() -> Console:
    # rich takes the colours out under NO_COLOR and leaves bold and dim in; plain text means plain text.
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(highlight=False, color_system=None if plain else "auto")


class _Page:
    """One explanation, set in paragraphs of a readable width."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = min(console.width, _TEXT_WIDTH)

    def print(self, rule: Rule) -> None:
        self._line(Text.assemble((f"{rule.code} {rule.name}", "bold cyan"), f"   family: {rule.family}"))
        self._paragraph(f"{rule.summary}.")
        self._heading("What it means")
        self._prose(rule.explanation)
        self._heading("Mathematics")
        self._prose(rule.mathematics)
        self._heading("What helps, in this order")
        for number, cure in enumerate(rule.cures, start=1):
            self._paragraph(cure.advice, mark=f"{number}. ")
            self._verbatim(textwrap.indent(cure.code, " " * 7))
        self._heading("What it needs to observe")
        self._paragraph(f"{rule.minimum[0].upper()}{rule.minimum[1:]}.")
        self._heading("Sources")
        for reference in rule.references:
            self._paragraph(reference, mark="- ")

    def _heading(self, text: str) -> None:
        self.console.print()
        self._line(Text.assemble((text, "bold"), " ", ("-" * (self.width - len(text) - 1), "dim")))

    def _prose(self, text: str) -> None:
        for index, block in enumerate(text.split("\n\n")):
            if index:
                self.console.print()
            if block.startswith("    "):
                self._verbatim(block)
            else:
                self._paragraph(block)

    def _paragraph(self, text: str, *, mark: str = "") -> None:
        lines = textwrap.fill(
            text,
            self.width,
            initial_indent=mark,
            subsequent_indent=" " * len(mark),
            break_long_words=False,
            break_on_hyphens=False,
        )
        self._line(Text(lines))

    def _verbatim(self, text: str) -> None:
        if text:
            self._line(Text(text, style="green"))

    def _line(self, text: Text) -> None:
        # Everything is wrapped already: a terminal that is too narrow may break a formula, we must not.
        self.console.print(text, soft_wrap=True)
