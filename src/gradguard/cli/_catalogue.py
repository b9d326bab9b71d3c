"""The rule catalogue as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule as Line
from rich.table import Table
from rich.text import Text

from gradguard.rules import Cure, Rule

__all__ = ["print_explanations", "print_rules"]

_WIDE = 110
"""Columns from which a rule's summary fits beside its name."""

_TEXT_WIDTH = 100
"""Columns beyond which prose grows no wider: longer lines are hard to read."""


def print_rules(rules: Iterable[Rule], console: Console | None = None) -> None:
    """Print a table of rules, one per line in a wide terminal, else with the summary underneath."""
    console = console if console is not None else Console(highlight=False)
    wide = console.width >= _WIDE
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("code", no_wrap=True)
    table.add_column("rule", no_wrap=wide)
    table.add_column("family", no_wrap=True)
    if wide:
        table.add_column("what it finds")
    for rule in rules:
        status = "" if rule.available else "planned"
        name = Text(rule.name, style="bold" if rule.available else "")
        if wide:
            summary = Text(rule.summary)
            summary.append(f" ({status})" if status else "", style="dim")
            table.add_row(Text(rule.code, style="cyan"), name, rule.family, summary)
        else:
            name.append(f"\n{rule.summary}", style="not bold")
            family = Text(rule.family)
            family.append(f"\n{status}", style="dim")
            table.add_row(Text(rule.code, style="cyan"), name, family)
    console.print(table)
    console.print("\nMore on one of them: gradguard explain GG101", style="dim")


def print_explanations(rules: Iterable[Rule], console: Console | None = None) -> None:
    """Print what each rule means, its mathematics, what helps and the sources."""
    console = console if console is not None else Console(highlight=False)
    for index, rule in enumerate(rules):
        if index:
            console.print()
        _Page(console).print(rule)


class _Page:
    """One explanation, set in paragraphs of a readable width."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = min(console.width, _TEXT_WIDTH)

    def print(self, rule: Rule) -> None:
        title = Text.assemble((f"{rule.code} {rule.name}", "bold cyan"), f"   family {rule.family}")
        if not rule.available:
            title.append("   planned: this version does not apply it yet", style="dim")
        self.console.print(title)
        self.console.print(rule.summary)
        self._heading("What it means")
        self._prose(rule.explanation)
        self._heading("Mathematics")
        self._prose(rule.mathematics)
        self._heading("What helps, in this order")
        for number, cure in enumerate(rule.cures, start=1):
            self._cure(number, cure)
        self._heading("What it needs")
        self._paragraph(rule.minimum)
        self._heading("Sources")
        for reference in rule.references:
            self._item("-", reference)

    def _heading(self, text: str) -> None:
        self.console.print()
        self.console.print(Line(Text(text, style="bold"), align="left", style="dim"), width=self.width)

    def _prose(self, text: str) -> None:
        for index, block in enumerate(text.split("\n\n")):
            if index:
                self.console.print()
            if block.startswith("    "):
                self._verbatim(block)
            else:
                self._paragraph(block)

    def _paragraph(self, text: str) -> None:
        self.console.print(Text(text), width=self.width)

    def _verbatim(self, text: str) -> None:
        # Formulas and code keep their columns: a terminal that is too narrow may break them, we must not.
        self.console.print(Text(text, style="green"), soft_wrap=True)

    def _cure(self, number: int, cure: Cure) -> None:
        self._item(str(number), cure.advice)
        if cure.code:
            self._verbatim("\n".join(f"       {line}" for line in cure.code.splitlines()))

    def _item(self, mark: str, text: str) -> None:
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(width=2, justify="right", no_wrap=True)
        row.add_column()
        row.add_row(mark, Text(text))
        self.console.print(Padding(row, 0, expand=False), width=self.width)
