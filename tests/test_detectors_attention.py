"""GG701 and GG702: attention that takes one key, and logits that grow, on made-up histories and on real nets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors import find_entropy_collapse, find_logit_growth, run_detectors
from gradguard.diagnosis import diagnose
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.linking import link_findings
from gradguard.prescriptions import prescribe
from tests.histories import NAN, changed, falling, flat, observation, run_of, sequential
from tests.models import TransformerClassifier, classification_loss, digit_batch

DENSE = (0, 1, 2, 5, 10, 20, 50)
CONFIG = GuardConfig()


def attention_run(
    entropy: Callable[[int], float] | Sequence[float],
    logit: Callable[[int], float] | Sequence[float],
    *,
    losses: Sequence[float] = (),
    steps: Sequence[int] = DENSE,
    preflight: bool = False,
    classes: int = 10,
) -> History:
    """Return a run of six layers of which the third, "2", runs attention, and "4" healthy attention."""
    table = sequential(6, activation="")
    records = []
    for index, step in enumerate(steps):
        h = entropy(step) if callable(entropy) else entropy[index]
        largest = logit(step) if callable(logit) else logit[index]
        names = table.names
        columns = {
            "attention_entropy": [h if n == names[2] else 0.95 if n == names[4] else NAN for n in names],
            "attention_entropy_min": [h / 2 if n == names[2] else 0.9 if n == names[4] else NAN for n in names],
            "attention_logit_max": [largest if n == names[2] else 2.0 if n == names[4] else NAN for n in names],
        }
        arrays = {name: torch.tensor(values, dtype=torch.float64).numpy() for name, values in columns.items()}
        ones = torch.ones(len(table), dtype=torch.float64).numpy()
        records.append(observation(step, table, ones, ones, layers=arrays))
    return run_of(records, losses, preflight=preflight, classes=classes)


def found(history: History) -> list[tuple[str, Severity]]:
    """Return codes and severities of both rules."""
    return [
        (f.code, f.severity) for f in (*find_entropy_collapse(history, CONFIG), *find_logit_growth(history, CONFIG))
    ]


def test_a_collapse_before_the_first_step_is_a_warning() -> None:
    """A check of unscaled logits: the layer, the numbers, the weights as the cause and the rate ruled out."""
    (finding,) = run_detectors(attention_run([0.003], [1200.0], steps=(0,), losses=[2.3], preflight=True), CONFIG)

    assert (finding.code, finding.severity) == ("GG701", Severity.WARNING)
    assert finding.layer == sequential(6, activation="").names[2]
    assert finding.cause is Cause.WEIGHT_SCALE
    assert Cause.LEARNING_RATE in [ruled.cause for ruled in finding.ruled_out]
    assert finding.evidence["attention_entropy"].value == 0.003
    assert finding.evidence["attention_logit_max"].value == 1200.0
    assert "before the first step" in finding.message


def test_a_collapse_that_begins_in_a_run_is_a_warning_where_the_loss_is_stuck() -> None:
    """Three observations and a flat loss; the learning rate, not the first weights, is to blame."""
    run = attention_run(lambda s: 0.9 if s < 5 else 0.02, lambda s: 2.0 if s < 5 else 150.0, losses=flat(51))

    (finding, *_) = find_entropy_collapse(run, CONFIG)

    assert (finding.severity, finding.step, finding.cause) == (Severity.WARNING, 5, Cause.LEARNING_RATE)
    assert finding.evidence["observations"].value == 4


@pytest.mark.parametrize(
    ("entropy", "logit", "losses"),
    [
        ([0.98] * 7, [1.5] * 7, falling(51)),
        ([0.98] * 7, [1.5] * 7, flat(51)),
        ([0.9, 0.8, 0.5, 0.2, 0.05, 0.04, 0.04], [1, 2, 5, 10, 20, 40, 60], falling(51)),
        ([0.9, 0.8, 0.5, 0.2, 0.05, 0.04, 0.04], [1, 2, 5, 10, 20, 40, 60], flat(51)),
        ([0.02] * 7, [40.0] * 7, flat(51)),
        ([0.5] * 7, [300.0] * 7, flat(51)),
        ([0.9, 0.02, 0.9, 0.02, 0.9, 0.02, 0.9], [1.0, 200.0, 1.0, 200.0, 1.0, 200.0, 1.0], flat(51)),
        ([NAN] * 7, [NAN] * 7, flat(51)),
    ],
    ids=["initial", "stuck", "sharp and learning", "sharp", "small logits", "wide", "flickering", "not finite"],
)
def test_healthy_attention_gives_nothing(
    entropy: Sequence[float], logit: Sequence[float], losses: Sequence[float]
) -> None:
    """Sharp heads with logits of usual size, large logits that spread, single looks: no finding at all."""
    assert found(attention_run(entropy, logit, losses=losses)) == []


def test_a_collapse_while_the_loss_falls_is_a_remark() -> None:
    """What learns is not interrupted."""
    run = attention_run(
        lambda s: 0.9 if s < 5 else 0.02, lambda s: 2.0 if s < 5 else 150.0, losses=falling(51, end=1.5)
    )

    assert {severity for _, severity in found(run)} == {Severity.INFO}


@pytest.mark.parametrize("preflight", [True, False])
def test_a_model_that_was_trained_before_gets_a_remark(*, preflight: bool) -> None:
    """Its first loss is far below chance: its sharp heads are learnt."""
    steps = (0,) if preflight else DENSE
    run = attention_run(
        lambda _: 0.02, lambda _: 300.0, steps=steps, losses=[0.4] * len(range(51)), preflight=preflight
    )

    assert found(run) == [("GG701", Severity.INFO)]


def test_a_collapse_that_recovers_is_over() -> None:
    """Entropy back above twice the limit clears the finding."""
    run = attention_run([0.003, 0.01, 0.05, 0.15, 0.4, 0.7, 0.8], [1200, 900, 400, 99, 20, 9, 8], losses=falling(51))

    (finding,) = find_entropy_collapse(run, CONFIG)

    assert (finding.severity, finding.resolved_step, finding.standing) == (Severity.INFO, 10, False)


def test_growing_logits_are_a_remark_then_a_warning() -> None:
    """Beyond 100 and three times the first value; beyond 1000 even where the loss falls."""
    slow = attention_run(lambda _: 0.4, lambda s: 3.0 * (1 + s), losses=falling(51))
    assert found(slow) == []  # 153 at one look only
    steady = attention_run(lambda _: 0.4, lambda s: 30.0 * (1 + s), losses=falling(51))
    assert found(steady) == [("GG702", Severity.WARNING)]
    near = attention_run(lambda _: 0.4, lambda s: 30.0 * min(1 + s, 12), losses=falling(51))
    assert found(near) == [("GG702", Severity.INFO)]
    stuck = attention_run(lambda _: 0.4, lambda s: 30.0 * min(1 + s, 12), losses=flat(51))
    assert found(stuck) == [("GG702", Severity.WARNING)]


def test_logits_that_recede_or_were_large_from_the_start_have_not_grown() -> None:
    """A burst that is over, and an offset that a mask adds."""
    assert found(attention_run(lambda _: 0.5, [1, 200, 300, 200, 20, 5, 4], losses=flat(51))) == []
    assert found(attention_run(lambda _: 0.5, lambda s: 400.0 + s, losses=flat(51))) == []
    assert found(attention_run(lambda _: 0.5, lambda s: 80.0 + 2.0 * s, losses=flat(51))) == []


def test_a_collapse_explains_what_comes_of_it_and_follows_from_growth_and_rate() -> None:
    """One illness first."""
    run = attention_run(lambda s: 0.9 if s < 2 else 0.001, lambda s: 2.0 * 10.0 ** min(s, 4), losses=flat(51))
    growth, collapse = (find(run, CONFIG)[0] for find in (find_logit_growth, find_entropy_collapse))

    def made(code: str, step: int) -> Finding:
        rule = gradguard.rules.RULES[code]
        return Finding(
            code=code,
            name=rule.name,
            family=rule.family,
            severity=Severity.WARNING,
            message=".",
            step=step,
            last_step=50,
        )

    linked = link_findings([made("GG102", 5), collapse, growth])
    assert [(f.code, f.consequence_of) for f in linked] == [("GG702", None), ("GG701", "GG702"), ("GG102", "GG702")]
    linked = link_findings([collapse, growth, made("GG501", 0)])
    assert [(f.code, f.consequence_of) for f in linked] == [("GG501", None), ("GG702", "GG501"), ("GG701", "GG501")]


def test_both_findings_have_cures_that_run() -> None:
    """QK-norm and what the cause asks for; the lines for initialization bring the logits back."""
    model = TransformerClassifier(2)
    sharpen(model, 30.0)
    batch = digit_batch(16)

    diagnosis = gradguard.check(model, batch, classification_loss)
    (finding,) = [f for f in diagnosis.findings if f.code == "GG701"]
    names = [p.remedy for p in finding.prescriptions]
    assert names == [
        "scale-query-key",
        "scale-attention",
        "query-key-initialization",
        "xavier-initialization",
        "qk-norm",
    ]
    optimizer = torch.optim.Adam(model.parameters())
    names_in_loop = {"gradguard": gradguard, "model": model, "optimizer": optimizer}
    exec(finding.prescriptions[2].code, names_in_loop)  # noqa: S102  # what the report tells readers to paste

    assert "GG701" not in {f.code for f in gradguard.check(model, batch, classification_loss).findings}


def sharpen(model: nn.Module, factor: float, layers: Sequence[int] = (0, 1)) -> None:
    """Multiply weights of queries and keys of some encoder layers."""
    for index, layer in enumerate(model.encoder.layers):  # type: ignore[arg-type]  # an encoder's list
        if index in layers:
            with torch.no_grad():
                layer.self_attn.in_proj_weight[:64].mul_(factor)


def watched(model: nn.Module, *, lr: float = 2e-3, steps: int = 60) -> gradguard.Diagnosis:
    """Train on digits under a guard."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with gradguard.watch(model, optimizer, on_finding="silent", on_error="raise") as guard:
        for step in range(steps):
            optimizer.zero_grad()
            loss = classification_loss(model, digit_batch(32, seed=step))
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        return guard.diagnose()


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_real_net_with_large_queries_and_keys_is_found_in_a_check_and_in_a_run(*, pre_norm: bool) -> None:
    """Thirty times too large in the second layer: it is the culprit, alone."""
    model = TransformerClassifier(2, pre_norm=pre_norm)
    sharpen(model, 30.0, layers=(1,))

    for diagnosis in (gradguard.check(model, digit_batch(32), classification_loss), watched(copy.deepcopy(model))):
        primary = diagnosis.primary
        assert primary is not None
        assert (primary.code, primary.severity, primary.layer) == (
            "GG701",
            Severity.WARNING,
            "encoder.layers.1.self_attn",
        )
        assert primary.layers == ("encoder.layers.1.self_attn",)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_real_nets_are_silent(factor: float, *, pre_norm: bool) -> None:
    """Usual weights, and queries and keys three times as large: sharp heads that learn."""
    model = TransformerClassifier(2, pre_norm=pre_norm)
    sharpen(model, factor)

    codes = {f.code for f in gradguard.check(model, digit_batch(32), classification_loss).findings}
    diagnosis = watched(model)

    assert not {"GG701", "GG702"} & (codes | {f.code for f in diagnosis.findings})


def test_a_net_with_a_rate_far_too_high_has_growing_logits() -> None:
    """Adam at 0.3: each step adds 0.3 to every weight of queries and keys, and logits go with their product."""
    diagnosis = watched(TransformerClassifier(2), lr=0.3)

    assert {"GG702"} <= {f.code for f in diagnosis.findings}
    assert not diagnosis.healthy


def test_a_history_without_columns_of_attention_gives_nothing() -> None:
    """Histories of older versions, and models without attention."""
    run = changed(attention_run([0.001] * 7, [900.0] * 7), lambda r: r)
    for record in run.records:
        for name in ("attention_entropy", "attention_entropy_min", "attention_logit_max"):
            record.layer_values.pop(name)  # type: ignore[attr-defined]  # a dict here
    assert found(run) == []
    assert math.isnan(run.layer("attention_entropy")[0, 0])
    assert prescribe(diagnose(run, run_detectors(run, CONFIG), config=CONFIG)).findings == ()
