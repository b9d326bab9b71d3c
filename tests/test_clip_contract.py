"""What every clipper promises: in place, counted, saved, safe with NaN, None, halves, sparse and complex gradients."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradguard
from gradguard import clip
from tests.models import classification_loss, digit_batch, mlp

Maker = Callable[..., clip.Clipper]
loose: Any = clip  # for arguments that a type checker would refuse
ONE: Any = nn.Parameter(torch.ones(1))


def make_norm(parameters: Any, **options: Any) -> clip.Clipper:
    """Return a clipper: Clip at a fixed norm."""
    return clip.Norm(parameters, 0.5, **options)


def make_value(parameters: Any, **options: Any) -> clip.Clipper:
    """Return a clipper: Clip at a fixed value."""
    return clip.Value(parameters, 0.01, **options)


def make_zclip(parameters: Any, **options: Any) -> clip.Clipper:
    """Return a clipper: ZClip, warm after three steps."""
    return clip.ZClip(parameters, warmup_steps=3, **options)


def make_adaptive(parameters: Any, **options: Any) -> clip.Clipper:
    """Return a clipper: The default, warm after three steps."""
    return clip.Adaptive(parameters, window=8, warmup_steps=3, **options)


def make_adagc(parameters: Any, **options: Any) -> clip.Clipper:
    """Return a clipper: AdaGC, warm after three steps."""
    return clip.AdaGC(parameters, warmup_steps=3, **options)


MAKERS: list[Maker] = [make_norm, make_value, clip.AGC, clip.AutoClip, make_zclip, make_adagc, make_adaptive]
GLOBAL: list[Maker] = [make_norm, clip.AutoClip, make_zclip, make_adaptive]
SYNC_FREE: list[Maker] = [make_norm, make_value, clip.AGC, make_adagc]

every = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_").lower())
every_global = pytest.mark.parametrize("make", GLOBAL, ids=lambda make: make.__name__.removeprefix("make_").lower())


def set_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    """Give every parameter a random gradient, in place where it has one already."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator) * size
        if parameter.grad is None:
            parameter.grad = values
        else:
            parameter.grad.copy_(values)


def gradients(model: nn.Module) -> list[Tensor]:
    """Return a copy of every gradient."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def spoil(model: nn.Module, name: str, value: float) -> None:
    """Set one entry of a gradient."""
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    gradient.view(-1)[1] = value


def total(tensors: list[Tensor]) -> float:
    """Return the L2 norm over tensors in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def net() -> nn.Sequential:
    """Return a small net, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@every
def test_a_result_tells_what_was_done(make: Maker) -> None:
    """Norms before and after are those of the gradients, and something was clipped if and only if they differ."""
    model = net()
    clipper = make(model)
    result = None
    for step in range(8):
        set_gradients(model, step, size=0.02 if step < 6 else 5.0)
        before = gradients(model)
        result = clipper.step()
        after = gradients(model)

        assert result.norm_before == pytest.approx(total(before), rel=1e-5)
        assert result.norm_after == pytest.approx(total(after), rel=1e-5)
        changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert result.engaged is changed
        assert result.non_finite is result.skipped is False
        if not math.isnan(result.threshold) and not isinstance(clipper, clip.Value):
            assert result.norm_after <= result.threshold * (1.0 + 1e-5)
        assert clipper.last is result
    assert result is not None
    assert result.engaged, "a jump of 250 times must engage every method"
    assert clipper.steps == 8
    assert clipper.clipped_fraction == clipper.clipped_steps / 8 > 0


@every
def test_gradients_are_changed_in_place(make: Maker) -> None:
    """The tensor objects and their memory stay, as views into DDP's buckets must."""
    model = net()
    clipper = make(model)
    set_gradients(model, 0, size=30.0)
    held = [(p.grad, p.grad.data_ptr()) for p in model.parameters() if p.grad is not None]

    clipper.step()

    assert all(
        p.grad is tensor and tensor.data_ptr() == address
        for p, (tensor, address) in zip(model.parameters(), held, strict=True)
    )


@every_global
def test_methods_with_one_factor_keep_the_direction(make: Maker) -> None:
    """All gradients are multiplied by one number."""
    model = net()
    clipper = make(model)
    for step in range(6):
        set_gradients(model, step, size=0.1)
        clipper.step()
    set_gradients(model, 9, size=50.0)
    before = torch.cat([g.flatten() for g in gradients(model)])
    assert clipper.step().engaged
    after = torch.cat([g.flatten() for g in gradients(model)])

    ratios = after / before
    assert torch.allclose(ratios, ratios[0].expand_as(ratios), rtol=1e-5)


@every
def test_state_survives_a_resume(make: Maker) -> None:
    """A clipper that loads another's state, by way of JSON or ``torch.save``, goes on exactly like it."""
    model = net()
    first = make(model)
    for step in range(7):
        set_gradients(model, step, size=0.1 * (step + 1))
        first.step()
    state = first.state_dict()
    second = make(model)
    second.load_state_dict(json.loads(json.dumps(state)))

    for step in range(7, 20):
        outcomes = []
        for clipper in (first, second):
            set_gradients(model, step, size=0.1 * (step % 5))
            result = clipper.step()
            outcomes.append((result.to_dict(), [g.tolist() for g in gradients(model)]))
        assert repr(outcomes[0]) == repr(outcomes[1])
    assert repr(first.state_dict()) == repr(second.state_dict())


@every
def test_a_state_loads_with_weights_only(make: Maker, tmp_path: Any) -> None:
    """Checkpoints read with ``weights_only=True`` may hold it."""
    model = net()
    clipper = make(model)
    set_gradients(model, 0)
    clipper.step()
    torch.save(clipper.state_dict(), tmp_path / "state.pt")

    clipper.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_state_of_another_method_is_refused() -> None:
    """The message names both methods; a state that lacks something names what."""
    model = net()
    with pytest.raises(ValueError, match=r"state is that of 'Norm', and the clipper is 'ZClip'"):
        clip.ZClip(model).load_state_dict(make_norm(model).state_dict())
    with pytest.raises(ValueError, match="lacks mean"):
        clip.ZClip(model).load_state_dict({k: v for k, v in clip.ZClip(model).state_dict().items() if k != "mean"})


@every
def test_the_same_gradients_give_the_same_bits(make: Maker) -> None:
    """Two clippers that see the same run do the same."""
    outcomes = []
    for _ in range(2):
        model = net()
        clipper = make(model)
        for step in range(10):
            set_gradients(model, step, size=1.0 + step)
            clipper.step()
        outcomes.append(gradients(model))

    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@every
def test_missing_frozen_and_tied_parameters(make: Maker) -> None:
    """``.grad`` of ``None`` stays ``None``, and a tied weight counts once."""
    tied = nn.Linear(4, 4, bias=False)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    clipper = make(
        [("a", tied.weight), ("b", tied.weight), ("frozen", frozen), ("unused", nn.Parameter(torch.ones(2)))]
    )
    tied.weight.grad = torch.ones(4, 4)

    assert clipper.step().norm_before == 4.0
    assert frozen.grad is None


@every
def test_no_gradient_at_all_is_no_step(make: Maker) -> None:
    """Nothing is counted or learnt; if it goes on from the start, one warning says when to call."""
    model = net()
    clipper = make(model)
    result = clipper.step()
    assert (result.norm_before, result.norm_after, result.engaged, clipper.steps) == (0.0, 0.0, False, 0)
    clipper.step()
    with pytest.warns(gradguard.GradGuardWarning, match=r"after backward\(\) and before zero_grad\(\)"):
        clipper.step()
    clipper.step()


@every
def test_zero_gradients_stay_zero_and_finite(make: Maker) -> None:
    """Norm 0 divides nothing."""
    model = net()
    clipper = make(model)
    for _ in range(5):
        set_gradients(model, 0, size=0.0)
        clipper.step()
    result = clipper.step()

    assert (result.norm_before, result.norm_after, result.engaged) == (0.0, 0.0, False)
    assert total(gradients(model)) == 0.0


# ------------------------------------------------------------------------------------------------ NaN, infinity


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skip_takes_every_gradient_away(make: Maker, bad: float) -> None:
    """One bad entry: all gradients of the clipper become ``None``, so that AdamW leaves every weight alone."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    clipper = make(model)
    for step in range(3):
        set_gradients(model, step)
        clipper.step()
        optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), clipper.state_dict()))

    set_gradients(model, 4)
    spoil(model, "0.weight", bad)
    with pytest.warns(gradguard.GradGuardWarning, match=r"1 of 4 gradients .* \(0.weight\).*1 of 4 steps skipped"):
        result = clipper.step()
    optimizer.step()

    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert repr(optimizer.state_dict()) == repr(before[1])
    assert (result.skipped, result.non_finite, result.engaged, result.norm_after) == (True, True, False, 0.0)
    assert not math.isfinite(result.norm_before)
    assert clipper.skipped_steps == 1
    assert clipper.state_dict() | {"steps": 3, "skipped_steps": 0} == before[2]


@every
def test_raise_changes_nothing(make: Maker) -> None:
    """The error names the parameter, and every gradient keeps its bits."""
    model = net()
    clipper = make(model, non_finite="raise")
    set_gradients(model, 0, size=9.0)
    spoil(model, "2.bias", math.nan)
    before = gradients(model)

    with pytest.raises(gradguard.errors.NonFiniteGradientsError, match=r"\(2.bias\)\. No gradient was changed"):
        clipper.step()

    assert all(
        torch.equal(
            a,
            b,
        )
        or bool(a.isnan().any())
        for a, b in zip(before, gradients(model), strict=True)
    )
    assert torch.equal(before[0], gradients(model)[0])


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_zero_sets_bad_entries_to_zero_and_clips_the_rest(make: Maker, bad: float) -> None:
    """The outcome is that of a gradient which had 0 there, and no history takes it in."""
    models = [net(), net()]
    clippers = [make(model, non_finite="zero") for model in models]
    for step in range(5):
        for model, clipper in zip(models, clippers, strict=True):
            set_gradients(model, step, size=0.3)
            clipper.step()
    learnt = {k: v for k, v in clippers[0].state_dict().items() if "steps" not in k}
    for model, value in zip(models, (bad, 0.0), strict=True):
        set_gradients(model, 9, size=20.0)
        spoil(model, "0.weight", value)

    result, clean = clippers[0].step(), clippers[1].step()

    assert result.non_finite is True
    assert result.skipped is False
    assert not math.isfinite(result.norm_before)
    assert math.isfinite(result.norm_after)
    assert all(bool(g.isfinite().all()) for g in gradients(models[0]))
    if not isinstance(clippers[0], clip.AutoClip):  # whose present norm belongs to its history
        assert result.norm_after == pytest.approx(clean.norm_after, rel=1e-6)
    assert {k: v for k, v in clippers[0].state_dict().items() if "steps" not in k} == learnt


def test_warnings_of_skips_thin_out() -> None:
    """A hundred skips give three warnings: the 1st, the 10th and the 100th."""
    weight = nn.Parameter(torch.ones(1))
    clipper = clip.Norm([weight], 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            weight.grad = torch.tensor([math.nan])
            clipper.step()

    assert len(caught) == 3
    assert clipper.skipped_steps == 120


# ------------------------------------------------------------------------------------------- kinds of gradients


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_other_kinds_of_numbers(make: Maker, dtype: torch.dtype) -> None:
    """Halves, doubles and complex gradients are clipped in their own kind, to finite numbers."""
    weight = nn.Parameter(torch.full((4, 3), 0.5, dtype=dtype))
    clipper = make([weight])
    results = []
    for value in (0.1, 0.1, 0.1, 0.1, 0.1, 60.0):
        weight.grad = torch.full((4, 3), value, dtype=dtype)
        results.append(clipper.step())
    result = results[-1]

    assert weight.grad is not None
    assert weight.grad.dtype is dtype
    assert result.engaged
    assert result.norm_before == pytest.approx(60.0 * math.sqrt(12.0), rel=1e-3)
    assert 0.0 < result.norm_after < result.norm_before
    assert float(weight.grad.abs().double().norm()) == pytest.approx(result.norm_after, rel=1e-2)


@every
def test_sparse_gradients_equal_dense_ones(make: Maker) -> None:
    """Uncoalesced sparse gradients of an embedding are clipped like the dense gradient they stand for."""
    results, after = [], []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=sparse)
        clipper = make(table)
        for factor in (0.1, 0.1, 0.1, 0.1, 0.1, 40.0):
            table.weight.grad = None
            (factor * table(torch.tensor([1, 4, 1])).square().sum()).backward()
            results.append(clipper.step())
        grad = table.weight.grad
        assert grad is not None
        assert grad.is_sparse is sparse
        after.append(grad.to_dense() if sparse else grad)

    assert torch.allclose(after[0], after[1], rtol=1e-5)
    assert [r.norm_before for r in results[:6]] == pytest.approx([r.norm_before for r in results[6:]], rel=1e-5)


@every
def test_a_module_may_change_its_parameters(make: Maker) -> None:
    """A head that is replaced after the clipper was made is clipped from then on."""
    model = net()
    clipper = make(model)
    for step in range(4):
        set_gradients(model, step, size=0.1)
        clipper.step()
    model[2] = nn.Linear(5, 7)
    set_gradients(model, 5, size=100.0)

    result = clipper.step()

    assert result.norm_before == pytest.approx(100.0 * math.sqrt(6 * 5 + 5 + 7 * 5 + 7), rel=0.3)
    assert total(gradients(model)) == pytest.approx(result.norm_after, rel=1e-5)
    assert result.norm_after < 0.5 * result.norm_before


# ------------------------------------------------------------------------------------------------------ attach


@every
def test_an_attached_clipper_applies_itself(make: Maker) -> None:
    """``optimizer.step()`` clips first, and after ``detach()`` no hook is left."""
    outcomes = []
    for attached in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = make(model)
        if attached:
            assert clipper.attach(optimizer) is clipper
        for step in range(5):
            set_gradients(model, step, size=3.0)
            if not attached:
                clipper.step()
            optimizer.step()
        clipper.detach()
        clipper.detach()
        set_gradients(model, 9, size=3.0)
        optimizer.step()
        assert clipper.steps == 5
        assert not optimizer._optimizer_step_pre_hooks
        outcomes.append(model.state_dict())

    assert all(torch.equal(a, b) for a, b in zip(outcomes[0].values(), outcomes[1].values(), strict=True))


def test_an_attached_clipper_follows_closures() -> None:
    """With a closure the gradients exist only inside ``step()``: each evaluation is clipped."""
    weight = nn.Parameter(torch.tensor([10.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = clip.Norm([weight], 0.5).attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    assert weight.item() == pytest.approx(9.5)
    assert clipper.last is not None
    assert clipper.last.norm_before == 20.0


def test_attaching_twice_is_refused() -> None:
    """Two hooks would clip twice."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = clip.Norm([weight], 0.5).attach(optimizer)
    with pytest.raises(gradguard.GradGuardError, match=r"attached already.*detach\(\) first"):
        clipper.attach(optimizer)
    with pytest.raises(TypeError, match="got Linear"):
        clip.Norm([weight], 0.5).attach(nn.Linear(1, 1))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- syncs


class Transfers(TorchDispatchMode):
    """Counts copies of a single number to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func) or "equal" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", SYNC_FREE, ids=lambda make: make.__name__.removeprefix("make_").lower())
def test_methods_without_memory_on_the_host_do_not_wait_for_the_device(make: Maker) -> None:
    """With ``zero`` nothing is copied to the host until a result is read."""
    model = net()
    clipper = make(model, non_finite="zero")
    with Transfers() as transfers:
        for step in range(6):
            set_gradients(model, step, size=4.0)
            clipper.step()
        result = clipper.last
        assert result is not None
        assert transfers.count == 0
        assert not result.on_host
        assert result.engaged is True
        assert transfers.count == 1


@every
def test_otherwise_a_step_waits_once(make: Maker) -> None:
    """The default policy copies one number per step."""
    model = net()
    clipper = make(model)
    with Transfers() as transfers:
        for step in range(6):
            set_gradients(model, step, size=4.0)
            clipper.step()

    assert transfers.count == 6


def test_without_the_host_the_outcome_is_the_same() -> None:
    """``zero`` goes through other code than ``skip``; on healthy gradients both do the same."""
    for make in SYNC_FREE:
        outcomes = []
        for policy in ("skip", "zero"):
            model = net()
            clipper = make(model, non_finite=policy)
            for step in range(6):
                set_gradients(model, step, size=4.0)
                clipper.step()
            outcomes.append(torch.cat([g.flatten() for g in gradients(model)]))
        assert torch.allclose(outcomes[0], outcomes[1], rtol=1e-6)


def test_reading_a_result_gives_python_numbers() -> None:
    """Whatever is kept on the device, a field is a ``float`` or a ``bool``."""
    model = net()
    set_gradients(model, 0)
    result = clip.Norm(model, 1.0, non_finite="zero").step()

    assert [type(v) for v in result.to_dict().values()] == [float, float, float, bool, bool, bool]
    assert result.on_host
    assert "engaged=True" in repr(result)


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda: loose.Norm([], 1.0), ValueError, "at least one parameter.*iterable is empty", id="empty"),
        pytest.param(lambda: loose.Norm(nn.ReLU(), 1.0), ValueError, "ReLU has none", id="module without parameters"),
        pytest.param(lambda: loose.Norm("weights", 1.0), TypeError, "got str", id="string for parameters"),
        pytest.param(lambda: loose.Norm(3, 1.0), TypeError, "got int", id="number for parameters"),
        pytest.param(lambda: loose.Norm([{"params": []}], 1.0), TypeError, "with a dict in it", id="groups"),
        pytest.param(lambda: loose.Norm([ONE], -1.0), ValueError, "max_norm must be above 0.*got -1.0", id="negative"),
        pytest.param(lambda: loose.Norm([ONE], 0), ValueError, "max_norm must be above 0.*got 0", id="zero"),
        pytest.param(lambda: loose.Norm([ONE], math.nan), ValueError, "got nan", id="nan"),
        pytest.param(lambda: loose.Norm([ONE], "1"), TypeError, "got '1' of type str", id="string"),
        pytest.param(lambda: loose.Norm([ONE], True), TypeError, "got True", id="bool"),
        pytest.param(lambda: loose.Norm([ONE], 1.0, norm_type=3), ValueError, "2 or math.inf, got 3", id="norm type"),
        pytest.param(
            lambda: loose.Norm([ONE], 1.0, non_finite="ignore"), ValueError, "'skip', 'raise', 'zero', got 'i"
        ),
        pytest.param(lambda: loose.Norm([ONE], 1.0, scaler=3), TypeError, "GradScaler or None, got int", id="scaler"),
        pytest.param(lambda: loose.Value([ONE], math.inf), ValueError, "clip_value.*finite", id="infinite value"),
        pytest.param(lambda: loose.AGC([ONE], parity="jax"), ValueError, "None or 'timm', got 'jax'", id="parity"),
        pytest.param(lambda: loose.AGC([ONE], exclude=["a"]), ValueError, "parameters came without", id="no names"),
        pytest.param(
            lambda: loose.AGC([("b", ONE)], exclude=["a"]), ValueError, "no parameter is called so", id="name"
        ),
        pytest.param(lambda: loose.AutoClip([ONE], 101), ValueError, "from 0 to 100, got 101", id="percentile"),
        pytest.param(lambda: loose.ZClip([ONE], alpha=1.5), ValueError, "alpha must be from 0 to 1", id="alpha"),
        pytest.param(lambda: loose.ZClip([ONE], warmup_steps=0), ValueError, "at least 1, got 0", id="warmup"),
        pytest.param(lambda: loose.ZClip([ONE], warmup_steps=2.5), TypeError, "whole number", id="half a step"),
        pytest.param(lambda: loose.Adaptive([ONE], window=5), ValueError, "window must be at least 20", id="window"),
        pytest.param(lambda: loose.AdaGC([ONE], beta=-0.1), ValueError, "beta must be from 0 to 1", id="beta"),
    ],
)
def test_wrong_arguments_are_explained(make: Callable[[], object], error: type[Exception], message: str) -> None:
    """The message says what came and what is accepted."""
    with pytest.raises(error, match=message):
        make()


@every
def test_a_single_tensor_pairs_and_modules_are_accepted(make: Maker) -> None:
    """As in torch's functions a single tensor will do, and names are optional."""
    layer = nn.Linear(2, 2)
    for parameters in (layer, layer.weight, layer.parameters(), layer.named_parameters(), iter([layer.weight])):
        layer.weight.grad = torch.ones(2, 2)
        assert make(parameters).step().norm_before == 2.0


def test_functions_do_what_the_classes_do() -> None:
    """Each plain function is one step of its class."""
    for function, maker in (
        (lambda m: clip.clip_norm_(m, 0.5), make_norm),
        (lambda m: clip.clip_value_(m, 0.01), make_value),
        (clip.adaptive_clip_, clip.AGC),
    ):
        models = [net(), net()]
        for model in models:
            set_gradients(model, 0)
        function(models[0])
        maker(models[1]).step()
        assert all(torch.equal(a, b) for a, b in zip(gradients(models[0]), gradients(models[1]), strict=True))


@every
def test_clippers_copy_and_pickle(make: Maker) -> None:
    """A trainer may copy what it holds."""
    clipper = make(net())
    copied = copy.deepcopy(clipper)
    unpickled = pickle.loads(pickle.dumps(clipper))  # noqa: S301  # our own bytes

    assert copied.state_dict() | {} == unpickled.state_dict() | {} or repr(copied.state_dict()) == repr(
        unpickled.state_dict()
    )


# ------------------------------------------------------------------------------------------------------ laws

entries = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8)


@given(values=entries, limit=st.floats(1e-3, 1e4))
def test_clipping_by_norm_twice_is_clipping_once(values: list[float], limit: float) -> None:
    """The second call finds a norm at the threshold, to rounding, and leaves it there."""
    weight = nn.Parameter(torch.zeros(len(values)))
    weight.grad = torch.tensor(values)
    clip.clip_norm_([weight], limit)
    once = weight.grad.clone()
    clip.clip_norm_([weight], limit)

    assert torch.allclose(weight.grad, once, rtol=2e-6, atol=0.0)
    assert float(weight.grad.double().norm()) <= limit * (1.0 + 1e-6)


@given(values=entries, exponent=st.integers(-20, 20))
def test_scaling_gradients_and_threshold_alike_scales_the_outcome(values: list[float], exponent: int) -> None:
    """Clipping at c k of k g is k times clipping g at c, but for the 1e-6 beside the norm."""
    factor = 2.0**exponent
    outcomes, norm = [], 0.0
    for k in (1.0, factor):
        weight = nn.Parameter(torch.zeros(len(values)))
        weight.grad = torch.tensor(values) * k
        norm = float(weight.grad.double().norm())
        clip.clip_norm_([weight], k)
        outcomes.append(weight.grad.double() / k)
    tolerance = 4e-6 * max(1.0, 1.0 / factor) / max(norm, 1e-30)

    assert torch.allclose(outcomes[0], outcomes[1], rtol=max(1e-5, tolerance * 2), atol=1e-30)


@given(norms=st.lists(st.floats(1e-3, 1e3), min_size=25, max_size=60), factor=st.sampled_from([2.0**-8, 2.0**9]))
def test_the_default_does_not_depend_on_the_scale_of_the_loss(norms: list[float], factor: float) -> None:
    """Norms times k give thresholds times k: a loss summed instead of averaged is clipped at the same steps."""
    runs = []
    for k in (1.0, factor):
        weight = nn.Parameter(torch.zeros(1))
        clipper = clip.Adaptive([weight])
        results = []
        for norm in norms:
            weight.grad = torch.tensor([norm], dtype=torch.float32) * k
            results.append(clipper.step())
        runs.append([r.threshold / k for r in results])

    assert runs[0] == pytest.approx(runs[1], rel=1e-9)


def test_a_clipper_and_a_guard_share_a_run() -> None:
    """The guard reads norms before clipping at ``record()`` and after it at the step, bit-equal to a run without it."""
    weights = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = mlp(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = clip.Norm(model, 0.1).attach(optimizer)
        guard = gradguard.watch(model, optimizer, every=1, on_finding="silent") if watched else None
        for step in range(30):
            optimizer.zero_grad()
            loss = classification_loss(model, digit_batch(32, seed=step))
            loss.backward()
            if guard is not None:
                guard.record(loss=loss)
            optimizer.step()
        if guard is not None:
            before, after = (guard.history.scalar(c) for c in ("grad_norm", "grad_norm_at_step"))
            assert before.min() > 0.1
            assert after.tolist() == pytest.approx([0.1] * 30, rel=1e-5)
            assert "GG602" in {f.code for f in guard.diagnose().findings}
            guard.detach()
        assert clipper.clipped_steps == 30
        weights.append(model.state_dict())

    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
