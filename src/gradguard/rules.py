"""The rule catalogue: what each rule is called, what it means, the mathematics behind it, and what helps.

The table is here; the texts are Markdown files in ``_explanations``, one per code, read when they are asked for.
``gradguard rules`` prints the table, ``gradguard explain`` a text. Codes never change their meaning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType

__all__ = ["RULES", "Cure", "Rule", "resolve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cure:
    """One thing that helps.

    Attributes:
        advice: What to do, in a sentence or two.
        code: Lines of Python that do it, or an empty string where no line says it all.
    """

    advice: str
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of the catalogue.

    The longer texts are properties: they are read from package data. They are plain ASCII; a paragraph is one line, and
    formulas are lines indented by four spaces, at most 79 columns wide.

    Attributes:
        code: For instance ``"GG101"``; never changes its meaning.
        name: For instance ``"vanishing-gradient"``.
        family: For instance ``"vanishing"``; ``select`` and ``ignore`` take it as well.
        summary: What it finds, in at most 48 characters.
        minimum: What has to be observed before the rule speaks, in words.
    """

    code: str
    name: str
    family: str
    summary: str
    minimum: str

    @property
    def explanation(self) -> str:
        """What a finding of this rule means, in plain words."""
        return _unwrap(_section(self.code, "Meaning"))

    @property
    def mathematics(self) -> str:
        """The formulas behind the rule with their symbols explained, and what is measured."""
        return _unwrap(_section(self.code, "Mathematics"))

    @property
    def cures(self) -> tuple[Cure, ...]:
        """What helps, in the order in which to try it."""
        items = re.split(r"^\d+\. ", _section(self.code, "Cures"), flags=re.MULTILINE)[1:]
        return tuple(_cure(item) for item in items)

    @property
    def references(self) -> tuple[str, ...]:
        """Sources: authors, year, title, venue, arXiv number."""
        items = re.split(r"^- ", _section(self.code, "References"), flags=re.MULTILINE)[1:]
        return tuple(" ".join(item.split()) for item in items)


def _rule(code: str, name: str, family: str, summary: str, minimum: str) -> Rule:
    return Rule(code=code, name=name, family=family, summary=summary, minimum=minimum)


_CATALOGUE = (
    _rule(
        "GG101",
        "vanishing-gradient",
        "vanishing",
        "The gradient shrinks on its way to the input",
        "one observation of two layers or more; an error needs 100 steps under Adam",
    ),
    _rule(
        "GG102",
        "exploding-gradient",
        "exploding",
        "The gradient grows with depth or without bound",
        "one observation of two layers or more; an error needs 100 steps under Adam",
    ),
    _rule(
        "GG103",
        "gradient-spike",
        "spike",
        "One step's gradient or loss is far out of line",
        "25 recorded losses, or 25 observed gradients, before the spike",
    ),
    _rule(
        "GG104",
        "no-gradient",
        "no_gradient",
        "No gradient arrives at a trainable parameter",
        "two consecutive observations, three for a module that takes no part; one before the first step",
    ),
    _rule(
        "GG111",
        "temporal-vanishing",
        "temporal_vanishing",
        "The gradient dies on its way back through time",
        "a recurrent module over eight time steps or more; a run needs 100 steps and a loss that does not fall",
    ),
    _rule(
        "GG112",
        "temporal-exploding",
        "temporal_exploding",
        "The gradient grows on its way back through time",
        "one observation of a recurrent module over eight time steps or more",
    ),
    _rule("GG201", "non-finite-input", "non_finite", "The batch holds NaN or infinity", "one observation"),
    _rule(
        "GG202",
        "non-finite-forward",
        "non_finite",
        "A module turns finite numbers non-finite",
        "one observation",
    ),
    _rule(
        "GG203", "non-finite-backward", "non_finite", "The loss is finite and its gradient is not", "one observation"
    ),
    _rule("GG204", "non-finite-parameter", "non_finite", "A weight is NaN or infinite", "one observation"),
    _rule(
        "GG211",
        "half-precision-underflow",
        "precision",
        "float16 rounds small gradients to zero",
        "three observations of float16 gradients; a check: one",
    ),
    _rule(
        "GG212",
        "update-lost-to-rounding",
        "precision",
        "Updates are too small for the weights' precision",
        "three observations of steps of half-precision weights",
    ),
    _rule(
        "GG213",
        "loss-scale-collapse",
        "precision",
        "The gradient scaler lowers its scale without end",
        "20 steps tried under a gradient scaler that the guard was given, and losses",
    ),
    _rule(
        "GG301",
        "dead-units",
        "dead",
        "ReLU units are off for every example, for good",
        "three observations over 20 steps; before that one, for layers above 90 %",
    ),
    _rule(
        "GG302",
        "saturated-units",
        "saturated",
        "Units sit at the flat ends of sigmoid or tanh",
        "three consecutive observations, and losses; one before the first step",
    ),
    _rule(
        "GG401",
        "recurrent-spectral-radius",
        "spectral",
        "A recurrent matrix shrinks or grows its state",
        "one observation of a recurrent net with GG111 or GG112",
    ),
    _rule(
        "GG402",
        "spectral-norm-growth",
        "spectral",
        "A weight's largest singular value keeps growing",
        "three observations over at least 100 steps",
    ),
    _rule(
        "GG403",
        "poor-initialization",
        "initialization",
        "First weights of the wrong scale for their layer",
        "one observation of six layers or more, before or at the first step",
    ),
    _rule(
        "GG501",
        "learning-rate-too-high",
        "learning_rate",
        "Steps are large and the loss does not fall",
        "three consecutive observations of an optimizer step, and losses",
    ),
    _rule(
        "GG502",
        "learning-rate-too-low",
        "learning_rate",
        "Weights move too little per step to get anywhere",
        "three consecutive observations of an optimizer step, and losses",
    ),
    _rule(
        "GG503",
        "no-update",
        "no_update",
        "A gradient arrives and the weight never moves",
        "three observations of an optimizer step; one before the first, for what the optimizer lacks",
    ),
    _rule(
        "GG504",
        "epsilon-limited-update",
        "learning_rate",
        "Adam's eps, not the gradient, sets the update",
        "three consecutive observations over 20 steps of an optimizer with eps, and losses",
    ),
    _rule(
        "GG505",
        "loss-divergence",
        "divergence",
        "The loss has left its level and does not return",
        "40 steps with a recorded loss",
    ),
    _rule(
        "GG601",
        "clipping-never-engages",
        "clipping",
        "The clipping threshold is too high to act",
        "20 observations over 200 steps, and a known threshold",
    ),
    _rule(
        "GG602",
        "clipping-dominates",
        "clipping",
        "Most steps are cut by gradient clipping",
        "20 observations with norms before and after clipping; five where all are cut",
    ),
    _rule(
        "GG701",
        "attention-entropy-collapse",
        "attention",
        "Attention looks at one position only",
        "three consecutive observations of attention; one before the first step",
    ),
    _rule(
        "GG702",
        "attention-logit-growth",
        "attention",
        "Products of queries and keys keep growing",
        "three consecutive observations of attention, and one before them",
    ),
    _rule(
        "GG703",
        "update-rms-spike",
        "attention",
        "Adam's update is far larger than it intends",
        "25 observations of an optimizer with a running mean of squares",
    ),
)

RULES: Mapping[str, Rule] = MappingProxyType({rule.code: rule for rule in _CATALOGUE})
"""The whole catalogue by code, in order of code."""


def resolve(rule: str) -> frozenset[str]:
    """Return the codes that a code, a name or a family stands for.

    Args:
        rule: For instance ``"GG101"``, ``"vanishing-gradient"`` or ``"learning_rate"``. Neither case nor the choice
            between hyphen and underscore matters.

    Raises:
        TypeError: If ``rule`` is no text.
        ValueError: If the catalogue knows no such rule; the message names the closest match.

    Example:
        >>> sorted(resolve("learning_rate"))
        ['GG501', 'GG502', 'GG504']
        >>> sorted(resolve("vanishing-gradient"))
        ['GG101']
    """
    if not isinstance(rule, str):
        raise TypeError(f"a rule is named by its code, name or family, as text, got {rule!r}")
    key = _normal(rule)
    codes = frozenset(known.code for known in _CATALOGUE if key in (_normal(label) for label in _labels(known)))
    if not codes:
        raise ValueError(
            f"unknown rule {rule!r}. Accepted is a code (GG101), a name (vanishing-gradient) or a family (vanishing)."
            f"{_closest(key)} For all of them run `gradguard rules`."
        )
    return codes


def _labels(rule: Rule) -> tuple[str, str, str]:
    return rule.code, rule.name, rule.family


def _normal(text: str) -> str:
    return text.strip().lower().replace("_", "-")


def _closest(key: str) -> str:
    labels = {_normal(label): label for rule in _CATALOGUE for label in _labels(rule)}
    close = difflib.get_close_matches(key, labels, n=5)
    if not close:
        return ""
    # Among codes that differ in one digit, the one that begins alike is meant.
    best = max(close, key=lambda label: _common_start(key, label))
    return f" Did you mean {labels[best]!r}?"


def _common_start(first: str, second: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _section(code: str, title: str) -> str:
    """Return the body of one ``## title`` section of the explanation of a rule, as written."""
    from importlib.resources import files

    text = files("gradguard").joinpath("_explanations", f"{code}.md").read_text(encoding="ascii")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip("\n")


def _unwrap(text: str) -> str:
    """Join the lines of each paragraph; indented blocks stay as they are."""
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(block if block.startswith("    ") else " ".join(block.split()) for block in blocks)


def _cure(item: str) -> Cure:
    lines = item.rstrip().splitlines()
    code = [line[7:] for line in lines if line.startswith(" " * 7)]
    advice = [line for line in lines if not line.startswith(" " * 7)]
    return Cure(advice=" ".join(" ".join(advice).split()), code="\n".join(code))
