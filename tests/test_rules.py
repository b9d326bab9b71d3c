"""The rule catalogue: complete, unambiguous, and with texts that hold together."""

from __future__ import annotations

import ast
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradguard
from gradguard.config import GuardConfig
from gradguard.records import FloatArray
from gradguard.rules import RULES, Rule, resolve

CATALOGUE = {
    "GG101": ("vanishing-gradient", "vanishing"),
    "GG102": ("exploding-gradient", "exploding"),
    "GG103": ("gradient-spike", "spike"),
    "GG104": ("no-gradient", "no_gradient"),
    "GG111": ("temporal-vanishing", "temporal_vanishing"),
    "GG112": ("temporal-exploding", "temporal_exploding"),
    "GG201": ("non-finite-input", "non_finite"),
    "GG202": ("non-finite-forward", "non_finite"),
    "GG203": ("non-finite-backward", "non_finite"),
    "GG204": ("non-finite-parameter", "non_finite"),
    "GG211": ("half-precision-underflow", "precision"),
    "GG212": ("update-lost-to-rounding", "precision"),
    "GG213": ("loss-scale-collapse", "precision"),
    "GG301": ("dead-units", "dead"),
    "GG302": ("saturated-units", "saturated"),
    "GG401": ("recurrent-spectral-radius", "spectral"),
    "GG402": ("spectral-norm-growth", "spectral"),
    "GG403": ("poor-initialization", "initialization"),
    "GG501": ("learning-rate-too-high", "learning_rate"),
    "GG502": ("learning-rate-too-low", "learning_rate"),
    "GG503": ("no-update", "no_update"),
    "GG504": ("epsilon-limited-update", "learning_rate"),
    "GG505": ("loss-divergence", "divergence"),
    "GG601": ("clipping-never-engages", "clipping"),
    "GG602": ("clipping-dominates", "clipping"),
    "GG701": ("attention-entropy-collapse", "attention"),
    "GG702": ("attention-logit-growth", "attention"),
    "GG703": ("update-rms-spike", "attention"),
}
"""Codes never change their meaning: an edit of this table is an edit of the contract."""

TEXTS = Path(gradguard.__file__).parent / "_explanations"
LABELS = sorted({label for code, names in CATALOGUE.items() for label in (code, *names)})

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.code)


def formulas(text: str) -> list[str]:
    """Return the lines of a text that are indented, and so printed as they stand."""
    return [line for line in text.splitlines() if line.startswith("    ")]


def title(reference: str) -> str:
    """Return what stands behind the year of a reference."""
    return re.split(r"\(\d{4}\)\. ", reference, maxsplit=1)[1].partition(". ")[0]


# ------------------------------------------------------------------------------------------------------------ the table


def test_catalogue_has_every_code_with_its_name_and_family() -> None:
    """The catalogue is the contract's, in order of code: no rule is missing, renamed or moved to another family."""
    assert {code: (rule.name, rule.family) for code, rule in RULES.items()} == CATALOGUE
    assert list(RULES) == sorted(CATALOGUE)
    assert all(rule.code == code for code, rule in RULES.items())


def test_names_are_unique() -> None:
    """A name stands for one code."""
    assert len({rule.name for rule in RULES.values()}) == len(RULES)


def test_catalogue_cannot_be_changed() -> None:
    """There is one catalogue, the same for everyone."""
    with pytest.raises(TypeError, match="does not support item assignment"):
        RULES["GG101"] = RULES["GG102"]  # type: ignore[index]  # the attempt is the test
    with pytest.raises(AttributeError, match="name"):
        RULES["GG101"].name = "other"  # type: ignore[misc]  # as above


@every_rule
def test_summary_fits_a_line_of_the_listing(rule: Rule) -> None:
    """A summary is one short line without a full stop, the minimum a phrase."""
    assert 20 <= len(rule.summary) <= 48
    assert not rule.summary.endswith(".")
    assert len(rule.minimum) > 10
    assert not rule.minimum.endswith(".")


# ------------------------------------------------------------------------------------------------------------ the texts


@every_rule
def test_every_rule_has_all_its_texts(rule: Rule) -> None:
    """Meaning, mathematics with at least one formula, cures and sources: none is empty, and none is a stub."""
    assert len(rule.explanation) > 200
    assert len(rule.mathematics) > 300
    assert formulas(rule.mathematics)
    assert len(rule.cures) >= 3
    assert all(len(cure.advice) > 10 for cure in rule.cures)
    assert any(cure.code for cure in rule.cures)
    assert len(rule.references) >= 2


def test_there_is_one_text_per_rule_and_no_other() -> None:
    """Each file is named after a code, is headed by code and name, and has the four sections in order."""
    assert {path.stem for path in TEXTS.glob("*")} == set(CATALOGUE)
    for path in TEXTS.glob("*"):
        lines = path.read_text(encoding="ascii").splitlines()
        assert lines[0] == f"# {path.stem} {CATALOGUE[path.stem][0]}"
        assert [line for line in lines if line.startswith("## ")] == [
            "## Meaning",
            "## Mathematics",
            "## Cures",
            "## References",
        ], path.name


@every_rule
def test_texts_are_plain_and_fit_80_columns(rule: Rule) -> None:
    """ASCII prints anywhere; what is printed as it stands is at most 79 columns wide; nothing is shouted."""
    text = "\n".join((rule.explanation, rule.mathematics, *(cure.advice for cure in rule.cures), *rule.references))
    code = [f"       {line}" for cure in rule.cures for line in cure.code.splitlines()]

    assert text.isascii()
    assert "!" not in text
    assert max(len(line) for line in (*formulas(rule.mathematics), *code)) <= 79


@every_rule
def test_prose_comes_as_one_line_per_paragraph(rule: Rule) -> None:
    """Whoever prints the text wraps it; only formulas keep their lines."""
    for block in f"{rule.explanation}\n\n{rule.mathematics}".split("\n\n"):
        assert block.startswith("    ") or "\n" not in block


@every_rule
def test_code_of_cures_is_python(rule: Rule) -> None:
    """A line to paste parses."""
    for cure in rule.cures:
        ast.parse(cure.code)


@every_rule
def test_other_rules_that_a_text_names_exist(rule: Rule) -> None:
    """A pointer to another rule leads somewhere."""
    text = f"{rule.explanation} {rule.mathematics} {' '.join(cure.advice for cure in rule.cures)}"

    assert set(re.findall(r"\bGG\d+\b", text)) <= set(CATALOGUE)


@every_rule
def test_references_can_be_found(rule: Rule) -> None:
    """A source has authors, a year and a title, or an address."""
    for reference in rule.references:
        assert re.match(r"[^()]+\((19|20)\d\d\)\. \S.*\.$", reference) or "https://" in reference


def test_an_arxiv_number_stands_for_one_title() -> None:
    """The same number never has two titles, nor the same title two numbers."""
    titles, numbers = defaultdict(set), defaultdict(set)
    for rule in RULES.values():
        for reference in rule.references:
            for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", reference):
                titles[number].add(title(reference))
                numbers[title(reference)].add(number)

    assert len(titles) > 20
    assert {number: names for number, names in titles.items() if len(names) > 1} == {}
    assert {name: found for name, found in numbers.items() if len(found) > 1} == {}


def test_authors_named_in_the_text_are_among_the_sources() -> None:
    """``(Name et al. year)`` in the prose has its entry in the list."""
    for rule in RULES.values():
        text = f"{rule.explanation} {rule.mathematics}"
        for name, year in re.findall(r"([A-Z][a-z]+)(?: et al\.| and [A-Z][a-z]+)?,? \(?((?:19|20)\d\d)\b", text):
            assert any(f"{name}, " in source and f"({year})" in source for source in rule.references), (name, year)


# --------------------------------------------------------------------------------------------- the numbers in the texts


def squared_gain(
    activation: Callable[[FloatArray], FloatArray], derivative: Callable[[FloatArray], FloatArray], variance: float
) -> float:
    """Return chi for weights of this variance times fan-in, at the fixed point of the forward variance."""
    z = np.linspace(-12.0, 12.0, 200_001)
    weight = np.exp(-z * z / 2.0) / np.sqrt(2.0 * np.pi)
    q = 1.0
    for _ in range(60):
        q = variance * float(np.trapezoid(activation(np.sqrt(q) * z) ** 2 * weight, z))
    return variance * float(np.trapezoid(derivative(np.sqrt(q) * z) ** 2 * weight, z))


def sigmoid(x: FloatArray) -> FloatArray:
    """Return the logistic function."""
    return 1.0 / (1.0 + np.exp(-x))


def test_factors_of_the_depth_table_are_those_of_mean_field_theory() -> None:
    """The chi and the factor per layer that GG101 states for the sigmoid come out of its own formula."""
    text = RULES["GG101"].mathematics
    chi = squared_gain(sigmoid, lambda x: sigmoid(x) * (1.0 - sigmoid(x)), 1.0)
    wide = squared_gain(sigmoid, lambda x: sigmoid(x) * (1.0 - sigmoid(x)), 16.0)

    assert f"chi {chi:.4f}   factor {chi**0.5:.3f}" in text
    assert f"chi = {wide:.3f}" in text
    assert f"(1/4)^19 = {0.25**19:.0e}" in text
    assert f"factor {(1 / 6) ** 0.5:.3f}" in text


def test_factors_of_explosion_are_those_of_mean_field_theory() -> None:
    """So do those of GG102 for tanh, and the law of batch normalization."""
    text = RULES["GG102"].mathematics
    law = np.pi / (np.pi - 1.0)
    for variance in (4.0, 25.0 / 9.0):
        chi = squared_gain(np.tanh, lambda x: 1.0 - np.tanh(x) ** 2, variance)
        assert f"chi {chi:.3f}    factor {chi**0.5:.3f}" in text
    assert f"chi {law:.3f}    factor {law**0.5:.3f}" in text
    assert f"a factor of {law ** (19 / 2):.0f} over 19 layers" in text


def test_limits_in_the_texts_are_the_defaults() -> None:
    """Whoever changes a default changes what the explanation says."""
    default = GuardConfig()
    stated = {
        "GG101": f"Below -{default.span_info:g} it is mentioned, below -{default.span_warning:g} it is a warning",
        "GG102": f"Above {default.span_info:g} decades it is mentioned, above {default.span_warning:g} it is a warning",
        "GG104": f"in {('one', 'two', 'three')[default.growth_patience - 1]} consecutive observations",
        "GG301": f"at least {default.dead_patience_steps} optimizer steps",
        "GG302": f"more than {default.saturated_fraction:.0%} of its units".replace("%", " %"),
        "GG501": f"The limit is a median over the matrices of 1e{math.log10(default.update_ratio_high):.0f}",
        "GG502": f"The limit is 1e{math.log10(default.update_ratio_low):.0f}",
    }
    for code, text in stated.items():
        assert text in RULES[code].mathematics, code
    for fraction in (default.dead_fraction_warning, default.dead_fraction_error):
        assert f"{fraction:.0%}".replace("%", " %") in RULES["GG301"].mathematics


# -------------------------------------------------------------------------------------------------------------- resolve


@pytest.mark.parametrize("code", CATALOGUE)
def test_code_and_name_resolve_to_the_rule(code: str) -> None:
    """A code or a name stands for one rule."""
    assert resolve(code) == resolve(CATALOGUE[code][0]) == {code}


@pytest.mark.parametrize("family", sorted({family for _, family in CATALOGUE.values()}))
def test_family_resolves_to_all_of_its_rules(family: str) -> None:
    """A family stands for its rules."""
    assert resolve(family) == {code for code, (_, other) in CATALOGUE.items() if other == family}


@given(label=st.sampled_from(LABELS), upper=st.booleans(), hyphen=st.booleans(), space=st.sampled_from(["", " ", "\t"]))
def test_case_and_hyphens_do_not_matter(label: str, upper: bool, hyphen: bool, space: str) -> None:
    """``Vanishing-Gradient`` and ``vanishing_gradient`` are one name."""
    written = label.upper() if upper else label.lower()
    written = written.replace("_", "-") if hyphen else written.replace("-", "_")

    assert resolve(f"{space}{written}{space}") == resolve(label)


@given(label=st.text(max_size=30))
def test_any_text_resolves_to_known_codes_or_is_refused(label: str) -> None:
    """Nothing resolves to an empty set, which would silently select no rule."""
    try:
        codes = resolve(label)
    except ValueError as error:
        assert repr(label) in str(error)  # noqa: PT017  # either outcome is right
    else:
        assert codes
        assert codes <= set(CATALOGUE)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("GG11", "GG11"),
        ("gg105", "GG10"),
        ("vanishing-gradent", "vanishing-gradient"),
        ("vanishin", "vanishing"),
        ("no_gradeint", "no"),
    ],
)
def test_unknown_rule_names_the_closest_and_what_is_accepted(typed: str, meant: str) -> None:
    """The message has the value, the accepted forms, a guess, and where the list is."""
    with pytest.raises(ValueError, match="unknown rule") as caught:
        resolve(typed)

    message = str(caught.value)
    assert message.startswith(
        f"unknown rule {typed!r}. Accepted is a code (GG101), a name (vanishing-gradient) or a family"
    )
    assert f"Did you mean '{meant}" in message
    assert message.endswith("run `gradguard rules`.")


def test_unknown_rule_without_a_close_match_makes_no_guess() -> None:
    """A wild guess would mislead."""
    with pytest.raises(ValueError, match="unknown rule 'xyzzy'") as caught:
        resolve("xyzzy")

    assert "Did you mean" not in str(caught.value)


def test_resolve_refuses_what_is_no_text() -> None:
    """A number is no rule."""
    with pytest.raises(TypeError, match=r"by its code, name or family, as text, got 101$"):
        resolve(101)  # type: ignore[arg-type]  # the wrong type is the test


def test_configuration_refuses_an_unknown_rule() -> None:
    """A misspelt rule in ``select`` fails at once, not by finding nothing."""
    with pytest.raises(ValueError, match="Did you mean 'saturated'"):
        GuardConfig(select=("saturatd",))


def test_texts_read_as_written() -> None:
    """The parser keeps the order of cures, joins wrapped lines and takes the indentation off code."""
    cures = RULES["GG101"].cures

    assert cures[0].advice.startswith("Initialize for the activation that follows")
    assert cures[0].code == 'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")'
    assert cures[-1].code == ""
    assert RULES["GG203"].cures[1].code == textwrap.dedent(
        """\
        safe = torch.where(mask, x, 1.0)
        y = torch.where(mask, torch.sqrt(safe), 0.0)"""
    )
    assert RULES["GG101"].references[1] == (
        "Glorot, X., Bengio, Y. (2010). Understanding the difficulty of training deep feedforward neural networks. "
        "AISTATS, PMLR 9:249-256."
    )
