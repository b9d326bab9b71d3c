"""Which of several alike remedies suits the model: by its activations, its layers and its cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gradguard.findings import Cause, Finding, LayerProfile

__all__ = ["activation_of", "suited"]

_ZERO_CENTRED = frozenset({"Tanh", "Softsign", "Hardtanh"})
"""Activations for which Xavier, not He, is the initialization that keeps the variance, and orthogonal weights keep
every length. Source: Glorot and Bengio (2010); Pennington, Schoenholz, Ganguli (2017), NeurIPS, arXiv 1711.04735."""

_SIGMOIDS = frozenset({"Sigmoid", "Hardsigmoid", "LogSigmoid"})
"""Activations that no scale of the weights makes pass the gradient. Source: ours, algorithms.md, section D: LSUV leaves
7 of 11 decades lost."""

_AT_THE_ENDS = frozenset({"GG302", "GG403"})
"""Illnesses of activations at their ends, where they say what those pass: of one or two layers, not lost over depth."""

_BY_EXAMPLE = ("LayerNorm", "RMSNorm")
_MADE_BY_STEPS = frozenset({"GG101", "GG102", "GG301", "GG302"})
"""Illnesses of layers that good first weights do not have, and steps that are too large make."""

_GATED = ("LSTM", "GRU")
_PLAIN = "RNN"


def suited(names: Iterable[str], finding: Finding, layers: Sequence[LayerProfile]) -> tuple[str, ...]:
    """Return the remedies that suit the model, in the order given, each once.

    Args:
        names: Remedies for the finding's code and cause.
        finding: What they are for.
        layers: The model's layers; empty where unknown.
    """
    names = _for_groups(_for_onset(_for_missing_gradients(names, finding), finding), finding)
    names = _for_cells(names, finding, layers)
    changes = {
        **_initializations(finding, layers),
        **_normalization(finding, layers),
        **_paths(finding, layers),
        **_attention(finding, layers),
        **_output(finding, layers),
    }
    found = [choice for name in names for choice in changes.get(name, (name,))]
    return tuple(dict.fromkeys(found))


def activation_of(finding: Finding) -> str:
    """Return the class name of the activation concerned, ReLU where it is not known."""
    evidence = finding.evidence.get("activation")
    return str(evidence.value) if evidence is not None else "ReLU"


def _for_missing_gradients(names: Iterable[str], finding: Finding) -> tuple[str, ...]:
    kind = finding.evidence.get("kind")
    if finding.code == "GG104" and kind is not None:
        names = ("freeze",) if kind.value == "unused" else ("remove-detach", "freeze-module")
    return tuple(name for name in names if finding.layer or name != "freeze-module")


def _for_onset(names: Iterable[str], finding: Finding) -> tuple[str, ...]:
    """Begin with the learning rate where training has made what was not there before the first step."""
    made = finding.code in _MADE_BY_STEPS and finding.step > 0 and finding.cause is not Cause.DATA
    return tuple(dict.fromkeys(("lower-learning-rate", *names))) if made else tuple(names)


def _for_groups(names: Iterable[str], finding: Finding) -> tuple[str, ...]:
    """Begin with the rates of groups where one is far above the others."""
    return ("even-learning-rates", *names) if "highest_lr" in finding.evidence else tuple(names)


def _for_cells(names: Iterable[str], finding: Finding, layers: Sequence[LayerProfile]) -> tuple[str, ...]:
    """Leave out gates for what has none, and cells with gates for what is one."""
    kind = _kind_of(finding, layers)
    gated = "mean_gate" in finding.evidence or kind.startswith(_GATED)
    plain = kind.startswith(_PLAIN) or (finding.code == "GG111" and "derivative" in finding.evidence)
    without: set[str] = set()
    if gated:
        without = {"gated-cell", "lstm"}
    elif plain:
        without = {"chrono-initialization", "forget-gate-bias"}
    return tuple(name for name in names if name not in without)


def _initializations(finding: Finding, layers: Sequence[LayerProfile]) -> dict[str, tuple[str, ...]]:
    """Choose by activation. LSUV leaves tanh where it bends, which serves nets that are not deep.

    Ours: in 8 regressions with tanh or sigmoid at their ends LSUV ends at 0.95 to 1.05 of what the healthy net does,
    orthogonal weights at 0.80 to 1.03, Xavier's at 0.60 to 1.05.
    """
    activation = activation_of(finding)
    orthogonal = "delta-orthogonal-initialization" if _convolutional(finding, layers) else "orthogonal-initialization"
    if activation in _ZERO_CENTRED and finding.code in _AT_THE_ENDS and "activation_gain" in finding.evidence:
        return {"he-initialization": ("xavier-initialization",)}
    if activation in _ZERO_CENTRED:
        return {"he-initialization": ("xavier-initialization",), "lsuv": (orthogonal,)}
    if activation in _SIGMOIDS:
        return {"lsuv": ("batch-norm",)}
    return {"he-initialization": ("lecun-initialization",)} if activation == "SELU" else {}


def _normalization(finding: Finding, layers: Sequence[LayerProfile]) -> dict[str, tuple[str, ...]]:
    """Stay with the normalization that the model has; over channels GroupNorm is what LayerNorm is over features."""
    if any(row.kind.startswith("RMSNorm") for row in layers):
        return {"layer-norm": ("rms-norm",)}
    return {"layer-norm": ("group-norm",)} if _convolutional(finding, layers) else {}


def _paths(finding: Finding, layers: Sequence[LayerProfile]) -> dict[str, tuple[str, ...]]:
    """Blocks with residual paths need no further path, but branches that start small; LayerNorm stays what it is."""
    if "blocks" not in finding.evidence:
        by_example = any(row.role == "attention" or row.kind.startswith(_BY_EXAMPLE) for row in layers)
        return {"residual-batch-norm": ("residual",)} if by_example else {}
    scaled = "rezero" if any(row.role == "attention" for row in layers) else "skip-init"
    normalized = any(row.role == "norm" for row in layers)
    choices = (scaled,) if normalized else (scaled, "fixup")
    return {"residual": choices, "residual-batch-norm": choices}


def _attention(finding: Finding, layers: Sequence[LayerProfile]) -> dict[str, tuple[str, ...]]:
    about_attention = finding.family == "attention" or any(row.role == "attention" for row in layers)
    return {} if about_attention else {"qk-norm": ()}


def _output(finding: Finding, layers: Sequence[LayerProfile]) -> dict[str, tuple[str, ...]]:
    """An activation dies at the output where it is the last of all layers."""
    last = layers[-1].name if layers and layers[-1].role == "activation" else None
    return {} if last is not None and last in (finding.layer, *finding.layers) else {"linear-output": ()}


def _convolutional(finding: Finding, layers: Sequence[LayerProfile]) -> bool:
    concerned = [row for row in layers if row.name in finding.layers] or layers
    return any(row.kind.startswith("Conv") for row in concerned)


def _kind_of(finding: Finding, layers: Sequence[LayerProfile]) -> str:
    """Return the kind of the layer that the finding names, or that owns the parameter it names; empty if unknown."""
    name = finding.layer or next(iter(finding.layers), "")
    owners = [row for row in layers if name == row.name or name.startswith(f"{row.name}.")]
    return max(owners, key=lambda row: len(row.name)).kind if owners and name else ""
