"""The command line: ``gradguard rules | explain | check | demo``.

It starts without torch. What needs torch lies in ``gradguard.cli_run``, which is loaded by name when ``check`` or
``demo`` is called.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from enum import StrEnum
from types import ModuleType
from typing import Annotated, Any, NoReturn

import typer

from gradguard.errors import GradGuardError
from gradguard.rules import RULES, Rule, resolve

__all__ = ["app", "main"]

SCHEMA_VERSION = 1
"""Version of the JSON form of the catalogue; it grows whenever a field changes its meaning or goes away."""

_RULES_EXAMPLES = """\b
Examples:
  gradguard rules
  gradguard rules --json
"""

_EXPLAIN_EXAMPLES = """\b
Examples:
  gradguard explain GG101
  gradguard explain vanishing-gradient
  gradguard explain non_finite --json
"""

_CHECK_EXAMPLES = """\b
Example, with this function in net.py:
  def sample():
      images, labels = next(iter(train_loader))
      loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
      return Net(), (images, labels), loss

\b
  gradguard check net.py:sample
  gradguard check my_package.net:sample --fail-on error --ignore dead

\b
For --trial, which tries cures on copies, it returns two things more:
      adam = lambda model: torch.optim.Adam(model.parameters())
      return Net(), (images, labels), loss, adam, train_loader

\b
  gradguard check net.py:sample --trial
  gradguard check net.py:sample --trial --steps 20 --seconds 60

Exit code: 0 healthy, 1 a finding at or above --fail-on, 2 the check could not be made or saw too little.
"""

_DEMO_EXAMPLES = """\b
Examples:
  gradguard demo
  gradguard demo --lightning
  gradguard demo --json --no-progress > diagnoses.json
"""

app = typer.Typer(
    name="gradguard",
    help="Say what is wrong with a network's gradients: what, where, since when, why, and what helps.",
    epilog="Example: gradguard explain GG101",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class FailOn(StrEnum):
    """Severities by the names that ``--fail-on`` takes."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def main() -> None:
    """Run the command line; the entry point of the ``gradguard`` script."""
    app(prog_name="gradguard")


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # typer hands the option's value over by position
    if wanted:
        import gradguard

        typer.echo(f"gradguard {gradguard.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Take the options that stand before any command."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command(epilog=_RULES_EXAMPLES)
def rules(*, as_json: JsonOption = False) -> None:
    """List every rule: code, name, family, what it finds."""
    if as_json:
        _print_json([_entry(rule) for rule in RULES.values()])
        return
    from gradguard.cli._catalogue import print_rules

    print_rules(RULES.values())


@app.command(epilog=_EXPLAIN_EXAMPLES)
def explain(
    rule: Annotated[
        str, typer.Argument(help="Code (GG101), name (vanishing-gradient) or family (vanishing).", metavar="RULE")
    ],
    *,
    as_json: JsonOption = False,
) -> None:
    """Explain a rule: meaning, mathematics, cures, sources."""
    try:
        found = [RULES[code] for code in sorted(resolve(rule))]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'RULE'") from error
    if as_json:
        _print_json([_entry(item) | _texts(item) for item in found])
        return
    from gradguard.cli._catalogue import print_explanations

    print_explanations(found)


@app.command(epilog=_CHECK_EXAMPLES)
def check(  # noqa: PLR0913  # every option of the command is an argument
    target: Annotated[
        str,
        typer.Argument(
            help="module:function or path/to/file.py:function, which returns (model, batch, compute_loss).",
            metavar="TARGET",
        ),
    ],
    *,
    as_json: JsonOption = False,
    fail_on: Annotated[
        FailOn, typer.Option(help="Lowest severity that makes the exit code 1.", case_sensitive=False)
    ] = FailOn.WARNING,
    select: Annotated[
        list[str] | None,
        typer.Option(help="Apply only these rules: codes, names or families, separated by commas.", metavar="RULES"),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave these rules out; wins over --select.", metavar="RULES")
    ] = None,
    trial: Annotated[
        bool, typer.Option("--trial", help="Then try the cures on copies of the model, and rank them.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Steps that a copy is trained for, with --trial; 40 by default.", min=1)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds after which a trial ends with what is known by then.", min=0.1)
    ] = None,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="Say on standard error how a trial goes.")
    ] = True,
) -> None:
    """Check a model before its first step.

    One forward and one backward pass, which leave the model as it was. TARGET names a function without arguments that
    returns the model, a batch, and a function of both that computes the scalar loss; for --trial also a function that
    makes an optimizer for a model, and training batches.
    """
    selected, ignored = _rule_list(select, "--select"), _rule_list(ignore, "--ignore")
    for option, value in (("--steps", steps), ("--seconds", seconds)):
        if value is not None and not trial:
            raise typer.BadParameter("it bounds a trial: add --trial", param_hint=f"'{option}'")
    commands = _torch_commands()
    options = commands.TrialOptions(steps=steps, seconds=seconds, progress=progress) if trial else None
    try:
        code = commands.run_check(
            target,
            as_json=as_json,
            fail_on=fail_on.value,
            select=selected,
            ignore=ignored,
            trial_options=options,
        )
    except GradGuardError as error:
        _fail(error)
    raise typer.Exit(code)


@app.command(epilog=_DEMO_EXAMPLES)
def demo(
    *,
    lightning: Annotated[bool, typer.Option("--lightning", help="Train through a Lightning Trainer.")] = False,
    as_json: JsonOption = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps for each of the two networks.", min=1)] = 240,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.", min=0)] = 0,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show a progress bar.")] = True,
) -> None:
    """Train a sick and a healthy network, report on both.

    Both have 20 layers and learn scikit-learn's digits with Adam: one of sigmoids with Xavier initialization, its
    twin of ReLUs with He initialization. With --json, one object holds both diagnoses under "sick" and "healthy".
    """
    try:
        code = _torch_commands().run_demo(
            lightning=lightning, as_json=as_json, steps=steps, seed=seed, progress=progress
        )
    except GradGuardError as error:
        _fail(error)
    raise typer.Exit(code)


def _torch_commands() -> ModuleType:
    return importlib.import_module("gradguard.cli_run")


def _fail(error: GradGuardError) -> NoReturn:
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(2) from error


def _rule_list(values: Iterable[str] | None, option: str) -> tuple[str, ...]:
    """Split comma-separated rules and check each of them, so that a misspelt one is named before anything runs."""
    names = tuple(name.strip() for value in values or () for name in value.split(",") if name.strip())
    for name in names:
        try:
            resolve(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=f"'{option}'") from error
    return names


def _print_json(entries: list[dict[str, Any]]) -> None:
    typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, "rules": entries}, indent=2))


def _entry(rule: Rule) -> dict[str, Any]:
    return {
        "code": rule.code,
        "name": rule.name,
        "family": rule.family,
        "summary": rule.summary,
        "minimum": rule.minimum,
    }


def _texts(rule: Rule) -> dict[str, Any]:
    return {
        "explanation": rule.explanation,
        "mathematics": rule.mathematics,
        "cures": [{"advice": cure.advice, "code": cure.code} for cure in rule.cures],
        "references": list(rule.references),
    }
