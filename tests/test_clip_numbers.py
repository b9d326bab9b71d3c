"""Every clipping method against the numbers of its paper or of its reference implementation, and their known faults."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradguard import clip


def parameters_with(*gradients: Sequence[float] | Tensor) -> list[nn.Parameter]:
    """Return one zero parameter per gradient given, with that gradient."""
    made = []
    for gradient in gradients:
        values = gradient if isinstance(gradient, Tensor) else torch.tensor(gradient)
        parameter = nn.Parameter(torch.zeros_like(values))
        parameter.grad = values.clone()
        made.append(parameter)
    return made


def grad(parameter: Tensor) -> Tensor:
    """Return a gradient that must be there."""
    assert parameter.grad is not None
    return parameter.grad


def feed(clipper: clip.Clipper, parameter: Tensor, norms: Sequence[float]) -> list[clip.ClipResult]:
    """Let a clipper of one single-entry parameter see these norms."""
    results = []
    for norm in norms:
        parameter.grad = torch.tensor([norm])
        results.append(clipper.step())
    return results


def scalar() -> nn.Parameter:
    """Return a parameter of one entry, 1."""
    return nn.Parameter(torch.ones(1))


# ------------------------------------------------------------------------------------------------ norm and value


def test_norm_has_the_numbers_of_pascanu() -> None:
    """Gradients (3, 4) and (12) have norm 13 and are scaled by 1 / 13.000001."""
    first, second = parameters_with([3.0, 4.0], [12.0])

    result = clip.Norm([first, second], max_norm=1.0).step()

    assert result.norm_before == 13.0
    assert grad(first).tolist() == pytest.approx([0.230769217, 0.307692289], rel=1e-7)
    assert grad(second).tolist() == pytest.approx([0.923076868], rel=1e-7)
    assert result.norm_after == pytest.approx(1.0, rel=1e-6)
    assert result.threshold == 1.0
    assert result.engaged is True


def test_maximum_norm_is_the_largest_entry() -> None:
    """With ``norm_type=inf`` the same gradients have norm 12."""
    parameters = parameters_with([3.0, 4.0], [12.0])

    assert clip.Norm(parameters, 1.0, norm_type=math.inf).step().norm_before == 12.0
    assert grad(parameters[1]).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_norm_is_bit_equal_to_torch(seed: int) -> None:
    """Above the threshold every bit is that of ``torch.nn.utils.clip_grad_norm_``, and so is the norm."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=generator) * 10 for shape in ((64, 33), (7,), (4, 3, 3, 3), ())]
    ours, theirs = parameters_with(*gradients), parameters_with(*gradients)

    result = clip.Norm(ours, 0.37).step()
    norm = nn.utils.clip_grad_norm_(theirs, 0.37)

    assert result.norm_before == norm.item()
    assert all(torch.equal(grad(a), grad(b)) for a, b in zip(ours, theirs, strict=True))


def test_value_is_torch_s() -> None:
    """Entries are cut to the range as ``clip_grad_value_`` cuts them."""
    values = [0.5, -3.0, 1.0, -1.0, 7.0]
    (ours,), (theirs,) = parameters_with(values), parameters_with(values)

    result = clip.Value([ours], 1.0).step()
    nn.utils.clip_grad_value_([theirs], 1.0)

    assert torch.equal(grad(ours), grad(theirs))
    assert result.engaged is True
    assert result.norm_after == pytest.approx(math.sqrt(4.25))


@pytest.mark.parametrize(
    ("entries", "norm"),
    [
        pytest.param([1e20, 1e20], math.sqrt(2.0) * 1e20, id="squares overflow"),
        pytest.param([3e38, 3e38], math.sqrt(2.0) * 3e38, id="the norm itself overflows float32"),
        pytest.param([1e-25, 1e-25, 1e-25, 1e-25], 2e-25, id="squares underflow"),
    ],
)
def test_norms_beyond_the_squares_of_float32_are_right(entries: list[float], norm: float) -> None:
    """Where torch gives norm inf and gradients of 0, or norm 0, the norm is right and so are clipped gradients."""
    (parameter,) = parameters_with(entries)

    result = clip.Norm([parameter], max_norm=1e-3).step()

    assert result.norm_before == pytest.approx(norm, rel=1e-6)
    expected = np.array(entries) * min(1.0, 1e-3 / norm)
    assert grad(parameter).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("largest", [1e200, 1e-200])
def test_float64_is_scaled_by_its_largest_entry(largest: float) -> None:
    """Squares that leave float64 do not either."""
    (parameter,) = parameters_with(torch.tensor([3.0, 4.0], dtype=torch.float64) * largest)

    assert clip.Norm([parameter], math.inf).step().norm_before == pytest.approx(5.0 * largest, rel=1e-12)


def test_half_precision_norms_are_computed_in_float32() -> None:
    """70000 entries of 300 in float16: their norm is 79372.5, beyond the largest float16."""
    (parameter,) = parameters_with(torch.full((70000,), 300.0, dtype=torch.float16))

    result = clip.Norm([parameter], max_norm=1.0).step()

    assert result.norm_before == pytest.approx(79372.5, rel=2e-4)
    assert grad(parameter)[0].item() == pytest.approx(300.0 / 79372.5, rel=2e-3)


def test_bfloat16_norms_are_not_rounded_to_bfloat16() -> None:
    """A thousand entries of 10 have norm 316.23; bfloat16 would say 316."""
    (parameter,) = parameters_with(torch.full((1000,), 10.0, dtype=torch.bfloat16))

    assert clip.Norm([parameter], 1.0).step().norm_before == pytest.approx(316.22777, rel=1e-6)


def test_one_infinite_entry_does_not_spread_nan() -> None:
    """(inf, 1, 0) becomes (nan, 0, 0) with torch; with ``zero`` the finite entries keep what they are."""
    (parameter,) = parameters_with([math.inf, 0.5, 0.0])

    result = clip.Norm([parameter], 1.0, non_finite="zero").step()

    assert grad(parameter).tolist() == [0.0, 0.5, 0.0]
    assert result.non_finite is True
    assert math.isinf(result.norm_before)
    assert result.norm_after == 0.5


# --------------------------------------------------------------------------------------------------------- AGC

WEIGHT = [[3.0, 4.0], [0.0, 0.0], [0.3, 0.4]]
GRADIENT = [[0.03, 0.04], [1.0, 0.0], [30.0, 40.0]]


def agc_case() -> list[nn.Parameter]:
    """Return the parameters of the ground truth: a matrix, a vector and a zero scalar."""
    matrix, vector, gate = (nn.Parameter(torch.tensor(v)) for v in (WEIGHT, [3.0, 4.0], 0.0))
    matrix.grad, vector.grad, gate.grad = torch.tensor(GRADIENT), torch.tensor([3.0, 4.0]), torch.tensor(2.0)
    return [matrix, vector, gate]


def test_agc_in_parity_mode_has_timm_s_numbers() -> None:
    """Rows, vectors and scalars are units; a zero row or scalar is held to 1e-5."""
    matrix, vector, gate = agc_case()

    result = clip.AGC([matrix, vector, gate], parity="timm").step()

    expected = torch.tensor([[0.03, 0.04], [1e-5, 0.0], [0.003, 0.004]])
    assert torch.allclose(grad(matrix), expected, rtol=1e-6, atol=0.0)
    assert grad(vector).tolist() == pytest.approx([0.03, 0.04], rel=1e-6)
    assert grad(gate).item() == pytest.approx(1e-5, rel=1e-6)
    assert result.engaged is True
    assert math.isnan(result.threshold)


def test_agc_differs_from_timm_in_zero_initialised_parameters_alone() -> None:
    """Outside parity mode a parameter that is all zero is left alone, a zero row of another is not."""
    matrix, vector, gate = agc_case()

    clip.AGC([matrix, vector, gate]).step()

    assert grad(gate).item() == 2.0
    assert grad(matrix)[1].tolist() == pytest.approx([1e-5, 0.0], rel=1e-6)
    assert grad(vector).tolist() == pytest.approx([0.03, 0.04], rel=1e-6)


def reference_agc(parameters: Sequence[Tensor], clip_factor: float, eps: float) -> list[Tensor]:
    """Return what timm's ``adaptive_clip_grad`` makes of the gradients, written from its definition."""
    clipped = []
    for parameter in parameters:
        norms = []
        for tensor in (parameter.detach(), grad(parameter)):
            dims = tuple(range(1, tensor.ndim))
            norms.append(tensor.norm(2.0, dim=dims, keepdim=True) if dims else tensor.norm(2.0))
        most = norms[0].clamp(min=eps) * clip_factor
        cut = grad(parameter) * (most / norms[1].clamp(min=1e-6))
        clipped.append(torch.where(norms[1] < most, grad(parameter), cut))
    return clipped


def test_agc_parity_is_bit_equal_over_kinds_of_layers() -> None:
    """Linear, convolutional, norm and scalar parameters come out bit for bit as in timm."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv1d(8, 4, 2), nn.Linear(4, 5), nn.PReLU())
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) * 0.1
    expected = reference_agc(list(net.parameters()), 0.02, 1e-3)

    clip.AGC(net, clip_factor=0.02, parity="timm").step()

    assert all(torch.equal(grad(p), e) for p, e in zip(net.parameters(), expected, strict=True))


def test_agc_frozen_numbers_of_timm() -> None:
    """Numbers of timm 1.0's formula, frozen: a 2 x 3 weight at 0.01."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0, 2.0], [0.1, 0.0, 0.0]]))
    weight.grad = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 5e-4]])

    clip.AGC([weight], parity="timm").step()

    assert weight.grad.flatten().tolist() == pytest.approx([0.018, 0.0, 0.024, 0.0, 0.0, 5e-4], rel=1e-6)


def test_agc_does_not_freeze_a_zero_initialised_gate() -> None:
    """Under SGD a gate that starts at 0 learns, and goes on after it has left 0; with timm's rule it cannot."""
    final = {}
    for parity in (None, "timm"):
        gate = nn.Parameter(torch.zeros(()))
        optimizer = torch.optim.SGD([gate], lr=0.1)
        clipper = clip.AGC([gate], parity=parity)
        for _ in range(100):
            optimizer.zero_grad()
            (gate - 1.0).square().backward()
            clipper.step()
            optimizer.step()
        final[parity] = gate.item()

    assert final[None] == pytest.approx(1.0, abs=1e-3)
    assert abs(final["timm"]) < 1e-3


def test_agc_still_leaves_the_gate_alone_after_a_resume() -> None:
    """Which parameters began at zero is part of the state: after a resume they are not zero any more."""
    gate = nn.Parameter(torch.zeros(()))
    gate.grad = torch.tensor(1.0)
    clipper = clip.AGC([("gate", gate)])
    clipper.step()
    resumed = clip.AGC([("gate", gate)])
    resumed.load_state_dict(clipper.state_dict())

    gate.data.fill_(1e-3)
    gate.grad = torch.tensor(1.0)
    resumed.step()

    assert gate.grad.item() == 1.0


def test_agc_leaves_out_what_is_excluded() -> None:
    """A pattern over names leaves the head alone, as the paper does."""
    net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)

    clip.AGC(net, exclude=["head.*"]).step()

    assert torch.equal(grad(net.get_parameter("head.weight")), torch.ones(2, 2))
    assert grad(net.get_parameter("body.weight")).max() < 0.1


# ------------------------------------------------------------------------------------------ AutoClip and ZClip


def test_autoclip_takes_the_percentile_of_all_norms_so_far() -> None:
    """After norms 1 to 10 the tenth percentile is 1.9, the present norm included."""
    weight = scalar()

    results = feed(clip.AutoClip([weight], percentile=10), weight, [float(n) for n in range(1, 11)])

    assert results[-1].threshold == pytest.approx(1.9, rel=1e-12)
    assert results[-1].norm_after == pytest.approx(1.9, rel=1e-6)
    thresholds = [np.percentile(np.arange(1.0, n + 2.0), 10) for n in range(10)]
    assert [r.threshold for r in results] == pytest.approx(thresholds, rel=1e-12)


def test_autoclip_never_clips_constant_norms() -> None:
    """Constant norms lie at their percentile, not above it."""
    weight = scalar()

    assert not any(r.engaged for r in feed(clip.AutoClip([weight]), weight, [3.0] * 50))


def test_autoclip_clips_a_spike_to_the_level_before() -> None:
    """One spike of 100 after 99 norms of 1 is clipped to 1."""
    weight = scalar()

    assert feed(clip.AutoClip([weight]), weight, [1.0] * 99 + [100.0])[-1].threshold == 1.0


def test_autoclip_forgets_the_oldest_norm_when_its_history_is_full() -> None:
    """With room for ten norms the percentile is that of the newest ten."""
    weight = scalar()
    norms = np.random.default_rng(0).lognormal(size=40)

    results = feed(clip.AutoClip([weight], history_size=10), weight, norms.tolist())

    seen = np.float32(norms).astype(float)[-10:]
    assert results[-1].threshold == pytest.approx(np.percentile(seen, 10), rel=1e-6)


def warmed_zclip(weight: nn.Parameter) -> clip.ZClip:
    """Return a ZClip whose average is 1 and whose variance is 0.005, as after warming up on 1 +- 0.0707107."""
    clipper = clip.ZClip([weight], warmup_steps=2, max_norm=None)
    feed(clipper, weight, [1.0 - math.sqrt(0.005), 1.0 + math.sqrt(0.005)])
    assert [clipper.mean, clipper.deviation] == pytest.approx([1.0, 0.0707107], rel=1e-5)
    return clipper


@pytest.mark.parametrize(
    ("norm", "left"), [(1.1, 1.1), (1.3, 1.10417), (2.0, 1.03125), (10.0, 1.00347)], ids=["even", "z=4", "2x", "10x"]
)
def test_zclip_clips_larger_spikes_harder(norm: float, left: float) -> None:
    """At mean 1 and deviation 0.0707107 a norm of 1.1 stays and 10 becomes 1.00347."""
    weight = scalar()

    result = feed(warmed_zclip(weight), weight, [norm])[0]

    assert result.norm_after == pytest.approx(left, rel=1e-4)
    assert grad(weight).item() == pytest.approx(left, rel=1e-4)
    assert result.engaged is (norm > left)


def test_zclip_s_average_takes_the_clipped_norm() -> None:
    """The mean moves by 3 % of the clipped norm's distance, and the variance by 3 % of its new square."""
    weight = scalar()
    clipper = warmed_zclip(weight)

    feed(clipper, weight, [2.0])

    mean = 0.97 + 0.03 * 1.03125
    assert clipper.mean == pytest.approx(mean, rel=1e-5)
    assert clipper.deviation**2 == pytest.approx(0.97 * 0.005 + 0.03 * (1.03125 - mean) ** 2, rel=1e-4)


def test_zclip_s_absolute_bound_holds_during_warmup_and_after() -> None:
    """``max_norm`` bounds every step; the average takes the norm before that bound."""
    weight = scalar()
    clipper = clip.ZClip([weight], warmup_steps=2, max_norm=1.0)

    results = feed(clipper, weight, [3.0, 5.0, 4.5])

    assert [r.norm_after for r in results] == pytest.approx([1.0, 1.0, 1.0], rel=1e-5)
    assert clipper.mean == pytest.approx(0.97 * 4.0 + 0.03 * 4.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["skip", "zero"])
@pytest.mark.parametrize("warm", [True, False], ids=["after warmup", "in warmup"])
def test_one_nan_does_not_switch_zclip_off(bad: float, policy: str, warm: bool) -> None:
    """A norm that is not finite leaves the average as it was, and the next spike is clipped."""
    weight = scalar()
    clipper = clip.ZClip([weight], warmup_steps=10, max_norm=None, non_finite=policy)
    norms = [1.0, 1.1] * 5
    with pytest.warns(match="1 of 1 gradients") if policy == "skip" else contextlib.nullcontext():
        feed(clipper, weight, [*norms, bad] if warm else [bad, *norms])

    assert clipper.mean == pytest.approx(1.05)
    assert feed(clipper, weight, [50.0])[0].norm_after < 1.2


# ------------------------------------------------------------------------------------------------------- AdaGC


def test_adagc_follows_its_recursion() -> None:
    """Warmup clips together and takes minima; afterwards each tensor is bounded by 1.05 times its own average."""
    first, second = scalar(), scalar()
    clipper = clip.AdaGC([("a", first), ("b", second)], warmup_steps=2)
    for pair in ([3.0, 4.0], [0.3, 0.4]):
        first.grad, second.grad = torch.tensor([pair[0]]), torch.tensor([pair[1]])
        clipper.step()
    assert clipper.averages == {"a": pytest.approx(0.3), "b": pytest.approx(0.4)}

    first.grad, second.grad = torch.tensor([30.0]), torch.tensor([0.41])
    result = clipper.step()

    assert first.grad.item() == pytest.approx(1.05 * 0.3)
    assert second.grad.item() == pytest.approx(0.41)
    assert clipper.averages["a"] == pytest.approx(0.98 * 0.3 + 0.02 * 1.05 * 0.3)
    assert clipper.averages["b"] == pytest.approx(0.98 * 0.4 + 0.02 * 0.41)
    assert result.engaged is True
    assert result.norm_after == pytest.approx(math.hypot(0.315, 0.41))


def test_adagc_warmup_is_a_global_clip() -> None:
    """In warmup both tensors are scaled by one factor to norm 1, and averages start from what is left."""
    first, second = parameters_with([3.0], [4.0])
    clipper = clip.AdaGC([first, second])

    clipper.step()

    assert [grad(first).item(), grad(second).item()] == pytest.approx([0.6, 0.8], rel=1e-6)
    assert list(clipper.averages.values()) == pytest.approx([0.6, 0.8], rel=1e-6)


def test_adagc_does_not_freeze_a_tensor_whose_gradient_was_zero() -> None:
    """Gradients of 0, in warmup and after it, leave the average alone: a tensor that wakes up learns."""
    sleeper, other = scalar(), scalar()
    clipper = clip.AdaGC([sleeper, other], warmup_steps=3)
    for _ in range(50):
        sleeper.grad, other.grad = torch.zeros(1), torch.tensor([0.5])
        clipper.step()
    sleeper.grad, other.grad = torch.tensor([0.2]), torch.tensor([0.5])
    clipper.step()
    assert sleeper.grad.item() == pytest.approx(0.2)
    for _ in range(500):
        sleeper.grad, other.grad = torch.zeros(1), torch.tensor([0.5])
        clipper.step()
    sleeper.grad, other.grad = torch.tensor([0.2]), torch.tensor([0.5])
    clipper.step()

    assert sleeper.grad.item() == pytest.approx(0.2)


def test_adagc_clips_a_tensor_that_wakes_after_warmup_by_itself() -> None:
    """Its first gradient is held to ``max_norm``, and its average starts from what is left."""
    sleeper, other = scalar(), scalar()
    clipper = clip.AdaGC([("sleeper", sleeper), ("other", other)], warmup_steps=2)
    for _ in range(5):
        sleeper.grad, other.grad = torch.zeros(1), torch.tensor([0.5])
        clipper.step()
    sleeper.grad, other.grad = torch.tensor([80.0]), torch.tensor([0.5])

    clipper.step()

    assert sleeper.grad.item() == pytest.approx(1.0)
    assert other.grad.item() == 0.5
    assert clipper.averages["sleeper"] == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------- Adaptive


def test_adaptive_clips_a_spike_at_twice_the_level_of_an_even_run() -> None:
    """Constant norms c give the threshold 2c, and a spike of 100c is clipped to it."""
    weight = scalar()

    results = feed(clip.Adaptive([weight]), weight, [3.0] * 40 + [300.0, 3.0])

    assert results[40].threshold == pytest.approx(6.0)
    assert results[40].norm_after == pytest.approx(6.0, rel=1e-6)
    assert [n for n, r in enumerate(results) if r.engaged] == [40]
    assert results[0].threshold == math.inf


def test_adaptive_leaves_a_noisy_healthy_run_alone() -> None:
    """Of 1000 log-normal norms of deviation 0.2 around a falling level, at most 1 % are clipped."""
    weight = scalar()
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(0.0, 0.2, 1000) - np.linspace(0.0, 3.0, 1000))

    results = feed(clip.Adaptive([weight]), weight, norms.tolist())

    assert sum(r.engaged for r in results) <= 10


def test_adaptive_follows_a_lasting_rise() -> None:
    """Norms that rise twentyfold for good are clipped for half a window and then no more."""
    weight = scalar()

    results = feed(clip.Adaptive([weight]), weight, [1.0] * 64 + [20.0] * 100)

    assert results[64].engaged
    assert not any(r.engaged for r in results[64 + 40 :])


def test_adaptive_s_bound_holds_before_there_is_a_history() -> None:
    """``max_norm`` bounds the first steps too."""
    weight = scalar()

    assert feed(clip.Adaptive([weight], max_norm=2.0), weight, [50.0])[0].norm_after == pytest.approx(2.0, rel=1e-6)
