"""Made-up diagnoses for tests of what reports look like. The numbers are invented."""

from __future__ import annotations

import math
from dataclasses import replace

from gradguard.findings import (
    Cause,
    Diagnosis,
    Effect,
    Evidence,
    Finding,
    LayerProfile,
    Prescription,
    RuledOut,
    RunSummary,
    Severity,
    Unobserved,
)

NAN = math.nan


def stack(count: int, *, gain: float = 0.24, last: float = 3.1e-2, mark: int | None = None) -> tuple[LayerProfile, ...]:
    """Return ``count`` linear layers through which the gradient changes by ``gain`` each."""
    return tuple(
        LayerProfile(
            name=f"net.{2 * index}",
            kind="Linear 64>10" if index == count - 1 else "Linear 64>64",
            role="affine",
            delta_norm=last * gain ** (count - 1 - index),
            gain=NAN if index == 0 else gain,
            forward_rms=0.5,
            active_fraction=1.0 if index < count - 1 else NAN,
            mark="GG101" if index == mark else "",
        )
        for index in range(count)
    )


RUN = RunSummary(
    steps=240,
    batches=240,
    layer_count=20,
    parameter_count=79_000,
    optimizers=("Adam",),
    loss_first=2.303,
    loss_last=2.3,
    grad_norm_median=0.82,
    grad_norm_p5=0.31,
    grad_norm_p95=1.9,
    update_ratio_log10=-2.9,
    span_decades=-12.4,
    dead_fraction=0.12,
    dead_layer="net.7",
    overhead_fraction=0.008,
    overhead_s=0.21,
)

VANISHING = Finding(
    code="GG101",
    name="vanishing-gradient",
    family="vanishing",
    severity=Severity.ERROR,
    message="The gradient vanishes on its way to the input: 12.4 decades over 20 layers, a factor of 0.24 per layer.",
    layer="net.20",
    layers=tuple(f"net.{2 * index}" for index in range(20)),
    step=0,
    last_step=239,
    cause=Cause.ACTIVATION_DERIVATIVE,
    confidence=0.98,
    evidence={
        "span": Evidence(value=-12.4, unit="decades"),
        "gain_per_layer": Evidence(value=0.24, unit="ratio"),
        "derivative_mean": Evidence(value=0.21, unit="ratio", note="Sigmoid: at most 0.25"),
        "weight_gain": Evidence(value=1.02, unit="ratio", note="what the weights alone would pass"),
    },
    ruled_out=(
        RuledOut(cause=Cause.LEARNING_RATE, reason="update/weight 10^-3.1"),
        RuledOut(cause=Cause.DATA, reason="finite, rms 0.61"),
        RuledOut(cause=Cause.PRECISION, reason="no underflow"),
        RuledOut(cause=Cause.DEAD_UNITS, reason="0 %"),
    ),
    prescriptions=(
        Prescription(
            remedy="layer-norm",
            reason="LayerNorm before each activation sets the scale anew at every layer.",
            code="torch.nn.Sequential(\n    torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Sigmoid()\n)",
        ),
        Prescription(remedy="relu", reason="The derivative of ReLU is 1 where it is on.", code="torch.nn.ReLU()"),
    ),
)

FOLLOWING = Finding(
    code="GG503",
    name="no-update",
    family="no_update",
    severity=Severity.WARNING,
    message="14 of 20 layers move by less than 1e-6 of their size per step.",
    step=0,
    last_step=239,
    consequence_of="GG101",
)


def sick() -> Diagnosis:
    """Return a vanishing gradient with a consequence and untried cures."""
    return Diagnosis(
        findings=(VANISHING, FOLLOWING),
        verdict=f"{VANISHING.message} Cause: Sigmoid derivatives.",
        observations=14,
        sufficient=True,
        layers=stack(20),
        summary=RUN,
    )


def tried() -> Diagnosis:
    """Return the same with measured cures."""
    cures = (
        Prescription(
            remedy="layer-norm", reason="x", code="x", effect=Effect(loss_before=2.30, loss_after=0.41, steps=60)
        ),
        Prescription(remedy="he-init", reason="x", effect=Effect(loss_before=2.30, loss_after=0.55, steps=60)),
        Prescription(remedy="clip-norm", reason="x", effect=Effect(loss_before=2.30, loss_after=2.30, steps=60)),
    )
    return replace(sick(), findings=(replace(VANISHING, prescriptions=cures),))


def healthy() -> Diagnosis:
    """Return a healthy run with one alarm that has cleared."""
    cleared = replace(
        VANISHING,
        severity=Severity.INFO,
        resolved_step=100,
        last_step=50,
        message="The gradient vanished on its way to the input (7.1 decades over 20 layers at step 0).",
    )
    return Diagnosis(
        findings=(cleared,),
        verdict="240 steps, 14 observed. The gradient keeps its size through 20 layers "
        "(0.7 decades; 3 would worry us). Nothing to do.",
        observations=14,
        sufficient=True,
        layers=stack(20, gain=0.96),
        summary=replace(RUN, loss_last=0.05, span_decades=-0.7),
    )


def no_verdict() -> Diagnosis:
    """Return a run of which nothing was seen."""
    return Diagnosis(
        findings=(),
        verdict="0 optimizer steps seen after 200 backward passes. The optimizer given to gradguard never stepped.",
        observations=0,
        sufficient=False,
        unobserved=(Unobserved(what="layer signals", why="no forward hook fired: the model runs compiled"),),
        summary=RunSummary(batches=200),
    )


def check() -> Diagnosis:
    """Return a check before the first step."""
    summary = RunSummary(kind="check", batches=1, layer_count=20, grad_norm_median=0.5, span_decades=-12.4)
    finding = replace(VANISHING, severity=Severity.WARNING, last_step=0, confidence=0.7)
    return replace(sick(), findings=(finding,), observations=1, summary=summary)


def three_layers() -> Diagnosis:
    """Return a small net whose gradient is not finite, not there, and exactly zero."""
    sizes = (math.inf, NAN, 0.0)
    rows = tuple(replace(row, delta_norm=size, gain=NAN) for row, size in zip(stack(3), sizes, strict=True))
    finding = replace(
        VANISHING,
        code="GG203",
        name="non-finite-backward",
        family="non_finite",
        layer="net.0",
        layers=("net.0",),
        message="The gradient is not finite from net.0 on.",
        evidence={"largest": Evidence(value=math.inf, unit="L2 norm"), "share": Evidence(value=0.004, unit="fraction")},
        ruled_out=(),
        prescriptions=(),
    )
    return replace(sick(), findings=(finding,), verdict=finding.message, layers=rows)


def deep() -> Diagnosis:
    """Return a net of a thousand layers with one culprit."""
    rows = list(stack(1000, gain=0.99, mark=500))
    rows[500] = replace(rows[500], gain=1e-5)
    finding = replace(VANISHING, evidence={**VANISHING.evidence, "culprit_gain": Evidence(value=1e-5, unit="ratio")})
    return replace(sick(), findings=(finding,), layers=tuple(rows))


def two_illnesses() -> Diagnosis:
    """Return two illnesses of two optimizers, one with a consequence."""
    other = replace(
        FOLLOWING,
        consequence_of=None,
        optimizer="critic",
        layer="critic.0.weight",
        layers=("critic.0.weight",),
        cause=Cause.WIRING,
    )
    first = replace(VANISHING, optimizer="generator", prescriptions=())
    return replace(sick(), findings=(first, replace(FOLLOWING, optimizer="generator"), other))


def hostile() -> Diagnosis:
    """Return names that look like markup and HTML, and are longer than any terminal."""
    name = "[red]encoder[/red]." + "block." * 30 + "<script>alert(1)</script>"
    rows = tuple(replace(row, name=f"{name}{index}") for index, row in enumerate(stack(4)))
    finding = replace(VANISHING, layer=name, layers=(name,), message=f"Something at {name} is [bold]wrong[/bold].")
    return replace(sick(), findings=(finding,), verdict=finding.message, layers=rows)


ALL = (sick, tried, healthy, no_verdict, check, three_layers, deep, two_illnesses, hostile)
