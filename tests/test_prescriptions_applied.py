"""Prescriptions: every rule has cures for every cause, and what is pasted does what the library does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import gradguard
from gradguard.findings import Cause, Evidence, Finding, LayerProfile, Prescription, Severity
from gradguard.prescriptions import plain_prescription, prescriptions_for
from gradguard.prescriptions._choice import CURES
from gradguard.prescriptions._texts import REMEDIES
from gradguard.remedies import catalogue
from gradguard.rules import RULES

EVIDENCE: tuple[dict[str, float | str], ...] = (
    {},
    {"activation": "Sigmoid", "update_ratio": 2.0},
    {"activation": "Tanh", "update_ratio": 1e-8, "time_steps": 12},
    {"activation": "SELU", "blocks": 12, "usual_norm": 3.0},
    {"mean_gate": 0.5, "largest_norm": 0.1},
    {"derivative": 0.9},
    {"highest_lr": 0.3, "usual_lr": 1e-3},
    {"kind": "unused"},
    {"kind": "detached"},
)
"""What findings may know, as far as the choice of cures depends on it."""

MODELS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("Linear 4>4", "affine"),),
    (("Conv2d 4>4 3x3", "affine"), ("BatchNorm2d 4", "norm")),
    (("MultiheadAttention 4", "attention"), ("RMSNorm 4", "norm")),
    (("LSTM 4>8", "recurrent"),),
    (("RNN 4>8", "recurrent"),),
    (("ReLU", "activation"),),
)
"""What models may be made of, in the same way."""


def found(code: str, cause: Cause, evidence: dict[str, float | str]) -> Finding:
    """Return a made-up standing finding."""
    rule = RULES[code]
    return Finding(
        code=code,
        name=rule.name,
        family=rule.family,
        severity=Severity.ERROR,
        message=".",
        step=0,
        last_step=10,
        layer="0",
        layers=("0.weight", "0.bias"),
        cause=cause,
        evidence={name: Evidence(value=value, note="forget gate") for name, value in evidence.items()},
    )


def rows(kinds: tuple[tuple[str, str], ...]) -> list[LayerProfile]:
    """Return a made-up profile of a model."""
    return [
        LayerProfile(name=str(i), kind=kind, role=role, delta_norm=1.0, gain=1.0, forward_rms=1.0, active_fraction=1.0)
        for i, (kind, role) in enumerate(kinds)
    ]


@cache
def everything() -> list[tuple[str, Cause, list[Prescription]]]:
    """Return the cures of every rule for every cause, with whatever the finding knows, in every kind of model."""
    return [
        (code, cause, list(prescriptions_for(found(code, cause, evidence), rows(kinds))))
        for code in RULES
        for cause in Cause
        for evidence in EVIDENCE
        for kinds in MODELS
    ]


def test_every_rule_has_cures_for_every_cause_in_every_kind_of_model() -> None:
    """At least one, each once, complete: reason, lines to paste, what to expect, source. Nothing was tried yet."""
    for code, cause, cures in everything():
        names = [cure.remedy for cure in cures]
        assert names, (code, cause)
        assert len(set(names)) == len(names), (code, cause, names)
        for cure in cures:
            assert cure.reason.endswith("."), cure.remedy
            assert cure.expected.endswith("."), cure.remedy
            assert cure.code, cure.remedy
            assert cure.reference, cure.remedy
            assert cure.effect is None
            assert "{" not in cure.reason + cure.expected, cure.remedy
            compile(cure.code, cure.remedy, "exec")


def test_every_remedy_is_prescribed_for_something() -> None:
    """What the library can apply some finding asks for, and no text is left without one."""
    prescribed = {cure.remedy for _, _, cures in everything() for cure in cures}

    assert set(catalogue.names()) - prescribed == set()
    assert set(REMEDIES) == prescribed
    assert {code for code, _ in CURES} == set(RULES)


OUT_OF_ORDER = {
    ("GG101", Cause.ACTIVATION_DERIVATIVE),  # algorithms.md, section K: BatchNorm before ReLU before LayerNorm
    ("GG102", Cause.NORMALIZATION),  # normalization is the cause here, so that more of it comes second
}
"""Where promise, not invasiveness, decides."""

AGAINST_THE_EFFECT = {"clip-norm", "adaptive-clip", "lower-learning-rate"}
"""What comes last where the cause lies in the net."""


def test_cures_are_ordered_from_the_least_invasive() -> None:
    """Initialization before normalization before activation before a path before another cell."""
    for (code, cause), names in CURES.items():
        known = [remedy for name in names if (remedy := catalogue.find(name)) and name not in AGAINST_THE_EFFECT]
        levels = [remedy.level for remedy in known]
        assert levels == sorted(levels) or (code, cause) in OUT_OF_ORDER, (code, cause, names)


# ------------------------------------------------------------------------------------------------ pasted and applied


class Blocks(nn.Module):
    """Residual blocks without normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3))
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.out(x)
        return out


class Reader(nn.Module):
    """Reads a sequence and answers at its end."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(6, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.rnn(x)[0][:, -1])
        return out


class Attending(nn.Module):
    """One layer of self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.attention(x, x, x)[0][:, -1])
        return out


def stack(activation: type[nn.Module]) -> nn.Sequential:
    """Return a plain stack."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(6, 6), activation())]
    return nn.Sequential(*hidden, nn.Linear(6, 3))


def images() -> nn.Sequential:
    """Return a small convolutional net."""
    convs = (nn.Conv2d(2, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Tanh())
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(64, 3))


SEQUENCE = (
    "orthogonal-recurrent",
    "forget-gate-bias",
    "chrono-initialization",
    "gated-cell",
    "lstm",
    "qk-norm",
    "query-key-initialization",
    "scale-query-key",
)


def suitable(remedy: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a model for which a remedy is meant, and a batch."""
    torch.manual_seed(1)
    shape = (8, 7, 6) if remedy in SEQUENCE else (8, 6)
    if remedy in {"skip-init", "rezero", "fixup"}:
        return Blocks(), torch.randn(shape)
    if remedy in {"gated-cell", "lstm", "orthogonal-recurrent"}:
        return Reader(nn.RNN), torch.randn(shape)
    if remedy in {"forget-gate-bias", "chrono-initialization"}:
        return Reader(nn.LSTM), torch.randn(shape)
    if remedy in {"qk-norm", "query-key-initialization", "scale-query-key"}:
        return Attending(), torch.randn(shape) * (100.0 if remedy == "scale-query-key" else 1.0)
    if remedy in {"delta-orthogonal-initialization", "group-norm"}:
        return images(), torch.randn(8, 2, 6, 6)
    if remedy == "linear-output":
        return nn.Sequential(stack(nn.ReLU), nn.ReLU()), torch.randn(shape)
    activation = {"relu": nn.Sigmoid, "xavier-initialization": nn.Tanh, "lecun-initialization": nn.SELU}
    return stack(activation.get(remedy, nn.ReLU)), torch.randn(shape)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return a loss with gradients of a norm far above 1, so that clipping has something to do."""
    loss: torch.Tensor = 100.0 * model(batch).square().mean()
    return loss


def loop(model: nn.Module, batch: torch.Tensor) -> dict[str, Any]:
    """Return the names of a usual training loop, in working order."""
    *most, last = model.parameters()
    groups: list[dict[str, Any]] = [{"params": most}, {"params": [last], "lr": 0.2}]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    optimizer.param_groups[0]["initial_lr"] = 0.02  # as a scheduler leaves it
    return {
        "torch": torch,
        "gradguard": gradguard,
        "model": model,
        "optimizer": optimizer,
        "batch": batch,
        "compute_loss": loss_of,
        "target": torch.randint(0, 3, (8,)),
        "logits": torch.randn(8, 3, requires_grad=True),
        "output": torch.randn(8, requires_grad=True),
        "x": torch.rand(8),
        "soft": torch.rand(8, requires_grad=True),
        "checkpoint": {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
    }


def run(code: str, names: dict[str, Any]) -> None:
    """Run pasted lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anomaly mode warns that it is slow
        exec(code, names)  # noqa: S102  # the lines are ours, and meant to be run


def one_step(names: dict[str, Any], before_step: str = "") -> None:
    """Train for a step as a usual loop does."""
    names["optimizer"].zero_grad()
    loss_of(names["model"], names["batch"]).backward()
    run(before_step, names)
    names["optimizer"].step()


def variants(remedy: str) -> list[Prescription]:
    """Return a remedy as findings prescribe it, with every set of arguments and every text."""
    found = [cure for _, _, cures in everything() for cure in cures if cure.remedy == remedy]
    unique = {(repr(cure.arguments), cure.code): cure for cure in [plain_prescription(remedy), *found]}
    return list(unique.values())


@pytest.mark.parametrize("remedy", sorted(catalogue.names()))
def test_pasted_lines_do_what_apply_does(remedy: str) -> None:
    """The same modules, the same weights, the same options, and the same weights again after a step of training."""
    for cure in variants(remedy):
        model, batch = suitable(remedy)
        untouched = copy.deepcopy(model)
        pasted, applied = loop(copy.deepcopy(model), batch), loop(model, batch)
        clipping = cure.code if remedy == "clip-norm" else ""
        torch.manual_seed(0)
        run("" if clipping else cure.code, pasted)
        torch.manual_seed(0)
        gradguard.apply(cure, model, optimizer=applied["optimizer"], batch=batch, compute_loss=loss_of)

        for _ in range(2):
            assert str(pasted["model"]) == str(model)
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(pasted["model"].state_dict()[name], tensor, rtol=0.0, atol=0.0)
            groups = [
                [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in names["optimizer"].param_groups
                ]
                for names in (pasted, applied)
            ]
            assert groups[0] == groups[1]
            torch.manual_seed(2)
            one_step(pasted, clipping)
            torch.manual_seed(2)
            one_step(applied)
        known = catalogue.find(remedy)
        if known is not None and known.acts_on == "model":
            same = str(model) == str(untouched) and all(
                torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True)
            )
            assert not same, f"{remedy} changed nothing"


@pytest.mark.parametrize("remedy", sorted(set(REMEDIES) - set(catalogue.names())))
def test_advice_that_only_the_user_can_follow_runs_as_it_stands(remedy: str) -> None:
    """Python that works in a usual training loop, whatever the finding filled in."""
    for cure in variants(remedy):
        model, batch = suitable(remedy)
        if remedy in {"freeze", "freeze-module"} and not cure.arguments.get("parameters") and "0" not in cure.code:
            continue  # there is no parameter to name without a finding
        names = loop(model, batch)
        if remedy == "add-to-optimizer":
            names["optimizer"] = torch.optim.SGD(list(model.parameters())[2:], lr=0.1)
        run(cure.code, names)


def test_wiring_cures_change_what_they_say() -> None:
    """Pasted into a loop they freeze, register, and set what they promise."""
    model, batch = suitable("freeze")
    names = loop(model, batch)
    names["optimizer"] = torch.optim.SGD([{"params": list(model.parameters())[2:], "lr": 0.0}], lr=0.1)
    lines = {cure.remedy: cure.code for cure in prescriptions_for(found("GG503", Cause.WIRING, {}))}
    lines |= {cure.remedy: cure.code for cure in prescriptions_for(found("GG503", Cause.LEARNING_RATE, {}))}

    run(lines["add-to-optimizer"], names)
    run(lines["set-learning-rate"], names)
    run(lines["freeze"], names)

    groups = names["optimizer"].param_groups
    assert sum(len(group["params"]) for group in groups) == 8
    assert all(group["lr"] > 0.0 for group in groups)
    assert not model.get_parameter("0.weight").requires_grad
    assert model.get_parameter("2.weight").requires_grad


def test_data_cures_change_what_they_say() -> None:
    """Scaled by quartiles, an outlier is bounded and the rest is not."""
    torch.manual_seed(0)
    spoilt = 50.0 + 3.0 * torch.randn(200, 4)
    spoilt[0] = 1e6
    scaled: dict[str, Any] = {"torch": torch, "batch": spoilt}
    run(plain_prescription("robust-scaling").code, scaled)

    assert scaled["batch"].abs().max() == 10.0
    assert 0.5 < scaled["batch"][1:].std() < 1.0


def test_chrono_initialization_by_name_remembers_a_hundred_steps() -> None:
    """Without a finding nobody says how long the sequences are; a finding's number is what is used."""
    torch.manual_seed(0)
    known = prescriptions_for(found("GG111", Cause.GATES, {"mean_gate": 0.5, "time_steps": 12}))[0]
    assert known.arguments == {"max_time": 12}
    longest = {}
    for key, cure in (("by name", "chrono-initialization"), ("known", known)):
        model = nn.LSTM(4, 200)
        gradguard.apply(cure, model)
        longest[key] = float(model.get_parameter("bias_hh_l0").detach().chunk(4)[1].exp().max())

    assert 90.0 < longest["by name"] <= 99.0
    assert 10.0 < longest["known"] <= 11.0


def test_spectral_norm_bounds_the_layer_that_the_finding_names() -> None:
    """The others are left alone; where no such layer is known, all are bounded."""
    model, batch = suitable("spectral-norm")
    code = next(
        cure.code for cure in prescriptions_for(found("GG402", Cause.UNKNOWN, {})) if cure.remedy == "spectral-norm"
    )
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(50.0)
    names = loop(model, batch)
    run(code, names)
    for _ in range(20):
        model(batch)  # each pass refines the power iteration

    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1.0, abs=0.02)  # type: ignore[index]
    assert not hasattr(model[2], "parametrizations")  # type: ignore[index]  # the stack is a Sequential
