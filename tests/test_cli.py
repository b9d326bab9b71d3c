"""The torch-free part of the command line: listing, explaining, help, and usage errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner, Result

from gradguard.cli import app
from gradguard.rules import RULES

COMMANDS = ("rules", "explain", "check", "demo")
SECTIONS = ("What it means", "Mathematics", "What helps, in this order", "What it needs to observe", "Sources")


def gradguard(*arguments: str, columns: int = 80) -> Result:
    """Run a command in this process, at a width."""
    return CliRunner().invoke(app, arguments, prog_name="gradguard", env={"COLUMNS": str(columns)})


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an interpreter of its own, with standard output piped."""
    return subprocess.run(
        [sys.executable, "-m", "gradguard.cli", *arguments],
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def words(text: str) -> str:
    """Return a text without its line breaks, which depend on the width."""
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_rules_lists_every_rule_at_any_width(columns: int) -> None:
    """Code, name, family and summary of each rule are there, and no line is wider than the terminal."""
    result = gradguard("rules", columns=columns)

    assert result.exit_code == 0
    assert max(len(line) for line in result.output.splitlines()) <= columns
    text = words(result.output)
    for rule in RULES.values():
        assert f"{rule.code} {rule.name} {rule.family}" in text
    assert text.endswith("gradguard explain GG101")


def test_rules_as_json_is_one_object() -> None:
    """Programs get the listing with a schema version and nothing else on standard output."""
    result = gradguard("rules", "--json")

    data = json.loads(result.stdout)
    assert data["schema_version"] == 1
    assert [entry["code"] for entry in data["rules"]] == list(RULES)
    assert data["rules"][0] == {
        "code": "GG101",
        "name": "vanishing-gradient",
        "family": "vanishing",
        "summary": RULES["GG101"].summary,
        "minimum": RULES["GG101"].minimum,
    }


# -------------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("name", ["GG101", "gg101", "vanishing-gradient", "Vanishing_Gradient", "vanishing"])
def test_explain_takes_code_name_or_family(name: str) -> None:
    """Whatever the reader has in hand leads to the same page."""
    result = gradguard("explain", name)

    assert result.exit_code == 0
    assert result.output.startswith("GG101 vanishing-gradient   family: vanishing\n")


@pytest.mark.parametrize("code", RULES)
def test_explain_prints_every_section_in_80_columns(code: str) -> None:
    """All texts of the rule are there, formulas and code line by line, and nothing runs over the edge."""
    rule = RULES[code]
    output = gradguard("explain", code).output
    lines, text = output.splitlines(), words(output)

    assert max(len(line) for line in lines) <= 80
    positions = [next(i for i, line in enumerate(lines) if line.startswith(f"{title} --")) for title in SECTIONS]
    assert positions == sorted(positions)
    assert words(rule.explanation) in text
    assert words(rule.minimum)[1:] in text
    assert {line for line in rule.mathematics.splitlines() if line.startswith("    ")} <= set(lines)
    for number, cure in enumerate(rule.cures, start=1):
        assert f"{number}. {cure.advice}" in text
        assert {f"       {line}" for line in cure.code.splitlines()} <= set(lines)
    assert all(f"- {reference}" in text for reference in rule.references)


def test_explain_does_not_fill_a_wide_terminal() -> None:
    """Prose stays readable: at most 100 columns."""
    assert max(len(line) for line in gradguard("explain", "GG101", columns=240).output.splitlines()) == 100


def test_explain_of_a_family_explains_each_of_its_rules() -> None:
    """A family of four gives four pages, in order of code."""
    output = gradguard("explain", "non_finite").output

    titles = [line.split()[0] for line in output.splitlines() if line.endswith("family: non_finite")]
    assert titles == ["GG201", "GG202", "GG203", "GG204"]


def test_explain_as_json_has_every_text() -> None:
    """Programs get the texts unwrapped, and cures with their code apart."""
    result = gradguard("explain", "GG203", "--json")

    (entry,) = json.loads(result.stdout)["rules"]
    rule = RULES["GG203"]
    assert (entry["explanation"], entry["mathematics"]) == (rule.explanation, rule.mathematics)
    assert entry["cures"][0] == {"advice": rule.cures[0].advice, "code": "torch.sqrt(x + 1e-12)"}
    assert entry["references"] == list(rule.references)


# ----------------------------------------------------------------------------------------------------- usage and errors


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_each_command_shows_an_example(command: str, option: str) -> None:
    """A reader can copy a line and run it."""
    result = gradguard(command, option)

    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: gradguard {command}")
    example = result.output.partition("Example")[2]
    assert f"\n    gradguard {command}" in example
    assert "--json" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_help_lists_the_commands_and_an_example() -> None:
    """``gradguard`` alone and ``gradguard --help`` say the same; no description is cut off."""
    result = gradguard("--help")

    assert result.exit_code == 0
    assert all(f"\n  {command} " in result.output for command in COMMANDS)
    assert "..." not in result.output.partition("Commands:")[2]
    assert "Example: gradguard explain GG101" in result.output
    assert gradguard().output == result.output


def test_help_of_check_states_the_exit_codes() -> None:
    """Whoever puts the check into a pipeline needs them."""
    text = words(gradguard("check", "--help").output)

    assert "Exit code: 0 healthy, 1 a finding at or above --fail-on, 2 the check could not be made" in text
    assert "[default: warning]" in text


def test_version_is_printed() -> None:
    """``--version`` prints name and version."""
    assert gradguard("--version").output == f"gradguard {version('gradguard')}\n"


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["explain", "GG10"], "RULE"),
        (["check", "net:sample", "--select", "vanishing,GG10"], "--select"),
        (["check", "net:sample", "--ignore", "GG10"], "--ignore"),
    ],
)
def test_unknown_rule_is_a_usage_error_with_the_closest_match(arguments: list[str], where: str) -> None:
    """Exit code 2; the message names the option, the value, a guess, and where the list is. Nothing has run."""
    result = gradguard(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    text = words(result.stderr)
    assert f"Invalid value for '{where}': unknown rule 'GG10'." in text
    assert "Did you mean 'GG10" in text
    assert "run `gradguard rules`" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain"], "Missing argument"),
        (["explian"], "No such command 'explian'."),
        (["check", "net:sample", "--fail-on", "fatal"], "'--fail-on'"),
        (["demo", "--steps", "0"], "'--steps'"),
        (["demo", "--seed", "-1"], "'--seed'"),
        (["rules", "--jsn"], "No such option"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    """A usage error is told from a finding by its exit code, and goes to standard error."""
    result = gradguard(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in words(result.stderr)


# --------------------------------------------------------------------------------------------------------- as a process


def test_piped_output_is_plain_text() -> None:
    """No escape sequence reaches a file, and the module runs like the script."""
    for arguments in (["rules"], ["explain", "GG101"], ["--help"]):
        process = run(*arguments)
        assert (process.returncode, process.stderr) == (0, "")
        assert "\x1b" not in process.stdout
        assert len(process.stdout.splitlines()) > 10


def test_no_color_means_plain_text_on_a_terminal_too() -> None:
    """With ``NO_COLOR`` neither colour nor bold is written, even where a terminal is claimed."""
    coloured = run("explain", "GG101", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="")
    plain = run("explain", "GG101", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")

    assert "\x1b[" in coloured.stdout
    assert "\x1b" not in plain.stdout


@pytest.mark.parametrize("arguments", [["rules"], ["rules", "--json"], ["explain", "GG101"], ["check", "--help"]])
def test_no_torch_is_loaded(arguments: list[str]) -> None:
    """What needs no torch starts without it."""
    code = (
        "import sys\nfrom gradguard.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'numpy', 'lightning', 'sklearn'} & set(sys.modules)), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (process.returncode, process.stderr.strip()) == (0, "[]")
