"""Made-up diagnoses for tests of what reports look like, and strategies for any diagnosis. The numbers are invented."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from gradguard.findings import (
    Cause,
    Diagnosis,
    Effect,
    Evidence,
    Finding,
    LayerProfile,
    MatrixSpectrum,
    Prescription,
    RuledOut,
    RunSummary,
    Severity,
    Unobserved,
)
from gradguard.profiles import JacobianStretch, TimeProfile

NAN = math.nan


def stack(count: int, *, gain: float = 0.24, last: float = 3.1e-2) -> tuple[LayerProfile, ...]:
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
        )
        for index in range(count)
    )


def with_loss_at(rows: tuple[LayerProfile, ...], index: int, factor: float, mark: str = "") -> tuple[LayerProfile, ...]:
    """Return the rows with a sudden loss: everything above row ``index`` is smaller by ``factor``."""
    return tuple(
        replace(
            row,
            delta_norm=row.delta_norm * (factor if at < index else 1.0),
            gain=row.gain * factor if at == index else row.gain,
            mark=mark if at == index else row.mark,
        )
        for at, row in enumerate(rows)
    )


RUN = RunSummary(
    steps=240,
    batches=240,
    layer_count=20,
    parameter_count=79_000,
    optimizers=("Adam",),
    loss_first=2.66,
    loss_last=2.303,
    grad_norm_median=0.82,
    grad_norm_p5=0.31,
    grad_norm_p95=1.9,
    update_ratio_log10=-3.1,
    span_decades=-11.8,
    dead_fraction=0.0,
    overhead_fraction=0.008,
    overhead_s=0.21,
)

VANISHING = Finding(
    code="GG101",
    name="vanishing-gradient",
    family="vanishing",
    severity=Severity.ERROR,
    message="The gradient vanishes on its way to the input: 11.8 decades over 20 layers, a factor of 0.24 per layer.",
    layer="net.20",
    layers=tuple(f"net.{2 * index}" for index in range(20)),
    step=0,
    last_step=239,
    cause=Cause.ACTIVATION_DERIVATIVE,
    confidence=0.98,
    evidence={
        "span": Evidence(value=-11.8, unit="decades"),
        "gain_per_layer": Evidence(value=0.24, unit="ratio"),
        "activation": Evidence(value="Sigmoid"),
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
            remedy="batch-norm",
            reason="BatchNorm before each activation centres and scales every unit, where the slope is largest.",
            code=(
                "def layer(width: int) -> torch.nn.Module:\n"
                "    return torch.nn.Sequential(\n"
                "        torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Sigmoid()\n"
                "    )"
            ),
            reference="Ioffe, Szegedy (2015), Batch Normalization, ICML, arXiv 1502.03167",
        ),
        Prescription(remedy="relu", reason="The derivative of ReLU is 1 where it is on.", code="torch.nn.ReLU()"),
        Prescription(remedy="layer-norm", reason="LayerNorm sets the scale anew at every layer."),
        Prescription(remedy="residual", reason="An identity path carries the gradient past what shrinks it."),
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


def _cure(remedy: str, after: float, *, before: float = 2.3, code: str = "", reason: str = "A reason.") -> Prescription:
    effect = Effect(loss_before=before, loss_after=after, steps=60)
    return Prescription(remedy=remedy, reason=reason, code=code, effect=effect)


def tried() -> Diagnosis:
    """Return the same with measured cures, not in the order of their effect, and one that nobody tried."""
    cures = (
        _cure("clip-norm", 2.30),
        _cure("he-initialization", 0.55),
        _cure(
            "layer-norm",
            0.41,
            code="gradguard.apply(result.best, model, optimizer=optimizer)",
            reason="LayerNorm before each activation sets the scale anew at every layer.",
        ),
        _cure("higher-learning-rate", math.nan),
        _cure("residual", 3.1),
        Prescription(remedy="warm-up", reason="The first steps do most of the damage."),
    )
    return replace(sick(), findings=(replace(VANISHING, prescriptions=cures),))


def healthy() -> Diagnosis:
    """Return a healthy run with a note, and with one alarm that has cleared."""
    cleared = replace(
        VANISHING,
        severity=Severity.INFO,
        resolved_step=100,
        last_step=50,
        message="The gradient vanished on its way to the input (7.1 decades over 20 layers at step 0).",
        prescriptions=(),
    )
    note = Finding(
        code="GG104",
        name="no-gradient",
        family="no_gradient",
        severity=Severity.INFO,
        message="mask_token never gets a gradient: 64 of 79000 trainable entries.",
        step=0,
        last_step=239,
        layer="mask_token",
    )
    return Diagnosis(
        findings=(note, cleared),
        verdict="240 steps, 14 observed. The gradient keeps its size through 20 layers "
        "(0.7 decades; 3 would worry us). Nothing to do.",
        observations=14,
        sufficient=True,
        layers=stack(20, gain=0.92),
        summary=replace(RUN, loss_last=0.0512, span_decades=-0.7, dead_fraction=0.12, dead_layer="net.7"),
    )


def no_verdict() -> Diagnosis:
    """Return a run of which nothing was seen."""
    return Diagnosis(
        findings=(),
        verdict="0 optimizer steps seen after 200 backward passes. The optimizer given to gradguard.watch holds none "
        "of this model's parameters.",
        observations=0,
        sufficient=False,
        unobserved=(
            Unobserved(what="layer signals", why="no forward hook fired, because the model runs compiled"),
            Unobserved(what="loss", why="guard.record(loss=loss) was never called"),
        ),
        summary=RunSummary(batches=200),
    )


def check() -> Diagnosis:
    """Return a check before the first step that finds something."""
    summary = RunSummary(kind="check", batches=1, layer_count=20, grad_norm_median=0.5, dead_fraction=0.3)
    finding = replace(VANISHING, severity=Severity.WARNING, last_step=0, confidence=0.7)
    return replace(sick(), findings=(finding,), observations=1, summary=replace(summary, dead_layer="net.7"))


def check_healthy() -> Diagnosis:
    """Return a check before the first step that finds nothing."""
    return Diagnosis(
        findings=(),
        verdict="One forward and one backward pass. The gradient keeps its size through 3 layers "
        "(0.1 decades; 3 would worry us). Nothing to do.",
        observations=1,
        sufficient=True,
        layers=stack(3, gain=0.92),
        summary=RunSummary(kind="check", batches=1, layer_count=3, grad_norm_median=1.25, dead_fraction=0.0),
    )


STRETCH = JacobianStretch(
    source="the output of embed",
    inputs=4096,
    outputs=640,
    largest=0.21,
    smallest=2.3e-9,
    rms=0.034,
    largest_certified=True,
    smallest_certified=True,
    residual=1e-14,
    noise=1e-14,
    iterations=10,
    exact=True,
    method="torch.func",
    isometry="not isometric",
)


def check_deep() -> Diagnosis:
    """Return a deep check that finds nothing, with the Jacobian of a net that reads tokens."""
    return replace(check_healthy(), jacobian=STRETCH)


def three_layers() -> Diagnosis:
    """Return a small net whose learning rate is too high, read at the optimizer's step only."""
    finding = Finding(
        code="GG501",
        name="learning-rate-too-high",
        family="learning_rate",
        severity=Severity.ERROR,
        message="Updates are 0.41 of the weights at every step, and the loss rises.",
        step=5,
        last_step=200,
        cause=Cause.LEARNING_RATE,
        confidence=0.9,
        evidence={
            "update_ratio": Evidence(value=0.41, unit="ratio", note="update/weight, limit 0.1"),
            "observations": Evidence(value=6, unit="observations", note="consecutive"),
            "lr": Evidence(value=3.0, note="learning rate"),
            "suggested_lr": Evidence(value=7.3e-6, note="would give a ratio of about 0.001"),
        },
        prescriptions=(
            Prescription(
                remedy="lower-learning-rate",
                reason="Steps that are small against the weights let the loss fall instead of throwing them about.",
                code='for group in optimizer.param_groups:\n    group["lr"] *= 0.0024',
            ),
        ),
    )
    summary = replace(RUN, loss_first=2.3, loss_last=1.7e8, update_ratio_log10=-0.4, clip_known=False)
    return Diagnosis(
        findings=(finding,),
        verdict=finding.message,
        observations=14,
        sufficient=True,
        layers=stack(3, gain=1.3, last=0.7),
        summary=replace(summary, dead_fraction=NAN),
    )


def deep() -> Diagnosis:
    """Return a net of a thousand layers that loses its gradient at one of them."""
    finding = replace(
        VANISHING,
        message="The gradient vanishes on its way to the input: 6.3 decades over 1000 layers, 5.0 of them at net.1000.",
        layer="net.1000",
        layers=tuple(f"net.{2 * index}" for index in range(1000)),
        cause=Cause.UNKNOWN,
        evidence={
            "span": Evidence(value=-6.3, unit="decades"),
            "gain_per_layer": Evidence(value=0.997, unit="ratio"),
            "culprit_gain": Evidence(value=1e-5, unit="ratio", note="gradient at its input over that at its output"),
        },
        prescriptions=(),
    )
    rows = with_loss_at(stack(1000, gain=0.997), 500, 1e-5, "GG101")
    return replace(sick(), findings=(finding,), verdict=finding.message, layers=rows)


def nan_forward() -> Diagnosis:
    """Return a forward pass that makes NaN, after which nothing is finite, zero or there at all in one row each."""
    sizes = (NAN, 0.0, math.inf, math.inf, 0.12)
    names = ("embed", "encoder.0", "encoder.1", "encoder.2.log", "head")
    rows = tuple(
        replace(row, name=name, delta_norm=size, gain=NAN, active_fraction=NAN, mark="GG202" if "log" in name else "")
        for row, name, size in zip(stack(5), names, sizes, strict=True)
    )
    finding = Finding(
        code="GG202",
        name="non-finite-forward",
        family="non_finite",
        severity=Severity.ERROR,
        message="encoder.2.log turns a finite input into NaN at step 57; its gradient is not finite from then on.",
        step=57,
        last_step=57,
        layer="encoder.2.log",
        layers=("encoder.2.log",),
        cause=Cause.OPERATION,
        confidence=1.0,
        evidence={
            "largest_entry": Evidence(value=math.inf),
            "smallest_input": Evidence(value=-0.0021, note="log wants more than 0"),
            "share": Evidence(value=0.004, unit="fraction", note="of its outputs"),
            "weights": Evidence(value=NAN, unit="L2 norm", note="encoder.1"),
        },
        ruled_out=(RuledOut(cause=Cause.DATA, reason="the batch is finite"),),
    )
    summary = replace(RUN, steps=58, loss_last=math.inf, grad_norm_p95=math.inf, update_ratio_log10=NAN)
    return replace(sick(), findings=(finding,), verdict=finding.message, observations=8, layers=rows, summary=summary)


def two_illnesses() -> Diagnosis:
    """Return the illnesses of two optimizers, with consequences of both and a chain of two."""
    first = replace(VANISHING, optimizer="generator", prescriptions=())
    dead = Finding(
        code="GG301",
        name="dead-units",
        family="dead",
        severity=Severity.WARNING,
        message="61 % of the units of generator.2 are dead.",
        step=50,
        last_step=200,
        consequence_of="GG101",
        optimizer="generator",
    )
    chained = replace(FOLLOWING, consequence_of="GG301", optimizer="generator", step=100)
    other = replace(
        FOLLOWING,
        consequence_of=None,
        optimizer="critic",
        layer="critic.0.weight",
        layers=("critic.0.weight", "critic.0.bias"),
        cause=Cause.WIRING,
        message="2 parameters of the critic get gradients and never move: no optimizer holds them.",
    )
    slow = replace(
        FOLLOWING,
        code="GG502",
        name="learning-rate-too-low",
        message="Updates are 1e-8 of the weights.",
        consequence_of="GG503",
        optimizer="critic",
    )
    return replace(sick(), findings=(first, dead, chained, other, slow))


def _lasting(name: str, kind: str, factor: float, steps: int, **overrides: Any) -> TimeProfile:
    """Return the profile of a module that loses ``factor`` per step back."""
    memory = tuple(max(0.2 * factor**at, 1e-38) for at in range(steps))
    values: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "distance": tuple(float(at) for at in range(steps)),
        "memory": memory,
        "loss_gradient": tuple(0.1 * value for value in memory),
        "span": 0.875 * (steps - 1) * math.log10(factor),
        "factor": factor,
        "horizon": -1.0 / math.log10(factor) if factor < 1.0 else math.inf,
        "steps": steps,
        "reach": 0.0,
        "gate": NAN,
        "gate_name": "",
    }
    return TimeProfile(**(values | overrides))


def recurrent() -> Diagnosis:
    """Return a gradient that vanishes through time in an LSTM, beneath one that keeps it; a third underflows."""
    finding = Finding(
        code="GG111",
        name="temporal-vanishing",
        family="temporal_vanishing",
        severity=Severity.ERROR,
        message="The gradient vanishes on its way back through time in encoder.rnn: 11.3 decades over 64 steps.",
        step=0,
        last_step=239,
        layer="encoder.rnn",
        layers=("encoder.rnn", "encoder.deep"),
        cause=Cause.GATES,
        confidence=0.9,
        evidence={"mean_gate": Evidence(value=0.5, unit="fraction", note="forget gate: the share kept per step")},
    )
    gates = {"gate": 0.5, "gate_name": "forget gate"}
    profiles = (
        _lasting("encoder.rnn", "LSTM 8>32", 0.62, 64, mark="GG111", **gates),
        _lasting("encoder.deep", "RNN 32>32", 0.1, 64, mark="GG111", span=-33.8),
        _lasting("decoder", "GRU 32>32", 1.05, 20, gate=0.97, gate_name="update gate"),
    )
    layers = tuple(
        LayerProfile(
            name=profile.name,
            kind=profile.kind,
            role="recurrent",
            delta_norm=0.1,
            gain=1.0,
            forward_rms=0.3,
            active_fraction=1.0,
            mark="GG111" if at == 0 else "",
        )
        for at, profile in enumerate(profiles)
    )
    return replace(
        sick(), findings=(finding,), verdict=finding.message, layers=layers, time_profiles=profiles, unobserved=()
    )


def recurrent_healthy() -> Diagnosis:
    """Return a healthy run with a note on one of two recurrent modules."""
    ill = recurrent()
    note = replace(ill.findings[0], severity=Severity.INFO, layers=("encoder.rnn",))
    others = tuple(replace(profile, mark="") for profile in ill.time_profiles[1:])
    return replace(healthy(), findings=(note,), time_profiles=(ill.time_profiles[0], *others))


LONG_NAME = "[red]encoder[/red]." + "block." * 30 + "<script>alert(1)</script>"


def hostile() -> Diagnosis:
    """Return names like markup, HTML and escape codes, longer than any terminal, in scripts of double width."""
    endings = ("", "\x1b[31m", "\n\u202e\ud800", "名前" * 20)
    names = (LONG_NAME, *(f"net.{index}.{ending}" for index, ending in enumerate(endings[1:])))
    rows = tuple(replace(row, name=name, kind=f"[b]{row.kind}") for row, name in zip(stack(4), names, strict=True))
    finding = replace(
        VANISHING,
        layer=LONG_NAME,
        layers=(LONG_NAME,),
        message=f"Something at {LONG_NAME} is [bold]wrong[/bold].",
        prescriptions=(Prescription(remedy="[i]cure[/i]", reason="Because\t[b]so[/b].", code="x = '<b>[red]\x1b'"),),
    )
    return replace(
        sick(),
        findings=(finding,),
        verdict=finding.message,
        layers=rows,
        time_profiles=(_lasting(LONG_NAME, "[b]RNN[/b]", 0.5, 30, mark="GG111"),),
        unobserved=(Unobserved(what="[link=x]y[/link]", why="<img src=x onerror=alert(1)>"),),
    )


def in_depth() -> Diagnosis:
    """Return a sick run with theory and singular values per layer, and with the spectra of its weights."""
    layers = tuple(
        replace(row, predicted_gain=NAN if index == 0 else 0.236, sigma=1.1 + 0.01 * index)
        for index, row in enumerate(stack(20))
    )
    gates = [
        MatrixSpectrum(
            name=f"encoder.rnn.weight_hh_l0[{gate}]",
            layer="encoder.rnn",
            shape=(256, 256),
            sigma_max=sigma,
            certified=True,
            stable_rank=31.4,
            condition=10**2.3,
            spectral_radius=0.61,
            derivative_bound=bound,
        )
        for gate, sigma, bound in (("reset", 1.08, 0.25), ("update", 0.99, 0.25), ("candidate", 1.31, 1.0))
    ]
    plain = replace(
        gates[0],
        name="decoder.weight_hh_l0",
        layer="decoder",
        sigma_max=0.84,
        spectral_radius=0.5,
        derivative_bound=1.0,
    )
    kernel = MatrixSpectrum(
        name="stem.weight", layer="stem", shape=(16, 3, 3, 3), input_size=(32, 32), sigma_max=2.9, certified=True
    )
    head = MatrixSpectrum(
        name="head.weight", layer="head", shape=(50257, 1600), sigma_max=14.2, certified=False, stable_rank=1.02,
        condition=math.inf,
    )  # fmt: skip
    return replace(sick(), layers=layers, spectra=(kernel, *gates, plain, head))


ALL = (
    sick,
    in_depth,
    tried,
    healthy,
    no_verdict,
    check,
    check_healthy,
    check_deep,
    three_layers,
    deep,
    nan_forward,
    two_illnesses,
    recurrent,
    recurrent_healthy,
    hostile,
)

# -------------------------------------------------------------------------------------------------------- strategies

numbers = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 5e-324, 1e-300, 1e300, NAN, math.inf, -math.inf]))
sizes = st.one_of(st.floats(min_value=0.0), st.sampled_from([0.0, 5e-324, 1e-14, 1.0, 1e300, NAN, math.inf]))
shares = st.one_of(st.just(NAN), st.floats(min_value=0.0, max_value=1.0))
names = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["encoder", "layers", "0", "11", "attention", "fc1"]), min_size=1, max_size=12).map(
        ".".join
    ),
)
printable_names = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=30) | st.lists(
    st.sampled_from(["encoder", "layers", "0", "11", "attention", "fc1"]), min_size=1, max_size=12
).map(".".join)
printable_sentences = st.lists(printable_names | st.sampled_from(["%", "12"]), max_size=15).map(" ".join)
sentences = st.one_of(st.text(max_size=60), st.lists(names, max_size=15).map(" ".join))
codes = st.sampled_from(["GG101", "GG104", "GG202", "GG503"])

layers = st.builds(
    LayerProfile,
    name=names,
    kind=st.text(max_size=30),
    role=st.sampled_from(["affine", "norm", "activation"]),
    delta_norm=sizes,
    gain=sizes,
    forward_rms=numbers,
    active_fraction=shares,
    trunk=st.booleans(),
    mark=st.one_of(st.just(""), codes),
)

prescriptions = st.builds(
    Prescription,
    remedy=names,
    reason=sentences,
    code=st.one_of(
        st.just(""), sentences, st.just("loss = call(argument, other_argument)  # a remark\nloss.backward()")
    ),
    reference=sentences,
    effect=st.one_of(
        st.none(),
        st.builds(Effect, loss_before=numbers, loss_after=numbers, steps=st.integers(min_value=1, max_value=99)),
    ),
)

findings = st.builds(
    Finding,
    code=codes,
    name=st.sampled_from(["vanishing-gradient", "no-gradient"]),
    family=st.just("any"),
    severity=st.sampled_from(Severity),
    message=sentences,
    step=st.integers(min_value=0, max_value=10**6),
    last_step=st.integers(min_value=0, max_value=10**6),
    layer=st.one_of(st.none(), names),
    layers=st.lists(names, max_size=6).map(tuple),
    resolved_step=st.one_of(st.none(), st.integers(min_value=0, max_value=10**6)),
    cause=st.sampled_from(Cause),
    confidence=st.floats(min_value=0.0, max_value=1.0),
    evidence=st.dictionaries(
        st.sampled_from(["gain_per_layer", "culprit_gain", "update_ratio", "share", "activation"]),
        st.builds(
            Evidence,
            value=st.one_of(numbers, st.integers(min_value=-(10**9), max_value=10**9), names),
            unit=st.sampled_from(["", "ratio", "fraction", "decades", "layers", "L2 norm", "steps"]),
            note=sentences,
        ),
        max_size=5,
    ),
    ruled_out=st.lists(st.builds(RuledOut, cause=st.sampled_from(Cause), reason=sentences), max_size=3).map(tuple),
    prescriptions=st.lists(prescriptions, max_size=5).map(tuple),
    consequence_of=st.one_of(st.none(), codes),
    optimizer=st.sampled_from(["", "generator", "critic"]),
)

short_findings = st.builds(
    Finding,
    code=codes,
    name=st.just("any"),
    family=st.just("any"),
    severity=st.sampled_from(Severity),
    message=st.just("Something."),
    step=st.just(0),
    last_step=st.just(0),
    resolved_step=st.sampled_from([None, None, 5]),
    consequence_of=st.one_of(st.none(), codes),
    optimizer=st.sampled_from(["", "generator", "critic"]),
)

summaries = st.builds(
    RunSummary,
    kind=st.sampled_from(["run", "check"]),
    steps=st.integers(min_value=0, max_value=10**9),
    loss_first=numbers,
    loss_last=numbers,
    grad_norm_median=sizes,
    grad_norm_p5=sizes,
    grad_norm_p95=sizes,
    update_ratio_log10=numbers,
    dead_fraction=shares,
    dead_layer=names,
    overhead_fraction=numbers,
    overhead_s=numbers,
    clip_known=st.booleans(),
)


@st.composite
def _time_profiles(draw: st.DrawFn) -> TimeProfile:
    memory = tuple(draw(st.lists(sizes, min_size=1, max_size=64)))
    return TimeProfile(
        name=draw(names),
        kind=draw(st.text(max_size=30)),
        distance=tuple(float(at) for at in range(len(memory))),
        memory=memory,
        loss_gradient=memory,
        span=draw(numbers),
        factor=draw(numbers),
        horizon=draw(numbers),
        steps=draw(st.integers(min_value=1, max_value=10**6)),
        reach=draw(shares),
        gate=draw(numbers),
        gate_name=draw(st.sampled_from(["", "forget gate", "update gate"])),
        mark=draw(st.sampled_from(["", "GG111", "GG112"])),
    )


VERDICT = "The gradient is as described below, and nothing else was found."

diagnoses = st.builds(
    Diagnosis,
    findings=st.lists(findings, max_size=4).map(tuple),
    verdict=st.just(VERDICT),
    observations=st.integers(min_value=0, max_value=1000),
    sufficient=st.booleans(),
    unobserved=st.lists(st.builds(Unobserved, what=sentences, why=sentences), max_size=2).map(tuple),
    layers=st.lists(layers, max_size=40).map(tuple),
    summary=summaries,
    time_profiles=st.lists(_time_profiles(), max_size=5).map(tuple),
    jacobian=st.none()
    | st.builds(
        JacobianStretch,
        name=names,
        source=sentences,
        inputs=st.integers(min_value=1),
        outputs=st.integers(min_value=1),
        largest=sizes,
        smallest=sizes,
        rms=sizes,
        largest_certified=st.booleans(),
        smallest_certified=st.booleans(),
        residual=sizes,
        noise=sizes,
        iterations=st.integers(min_value=1),
        exact=st.booleans(),
        method=st.just("torch.func"),
        isometry=st.sampled_from(["isometric", "not isometric", "unknown"]),
    ),
)
