from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradguard import spectra


def ginibre(size: int, *, seed: int = 0, rows: int | None = None) -> Tensor:
    """Return a matrix of independent Gaussian entries of variance 1/size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows or size, size, generator=generator) / math.sqrt(size)


def as_dense(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return the matrix of a linear map, column by column, in float64."""
    columns = [function(e.view(shape)).detach().flatten() for e in torch.eye(math.prod(shape), dtype=torch.float64)]
    return torch.stack(columns, dim=1)


SHEAR = torch.tensor([[0.5, 100.0], [0.0, 0.5]])
TURN = 0.9 * torch.tensor([[0.0, -1.0], [1.0, 0.0]])
NILPOTENT = torch.tensor([[0.0, 5.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("matrix", "sigma", "radius"),
    [
        (TURN, 0.9, 0.9),
        (SHEAR, 100.0025, 0.5),
        (NILPOTENT, 5.0, 0.0),
        (torch.diag(torch.tensor([3.0, -2.0, 1.0])), 3.0, 3.0),
        (torch.zeros(3, 3), 0.0, 0.0),
    ],
    ids=["turn", "shear", "nilpotent", "diagonal", "zero"],
)
@pytest.mark.parametrize("exact", [True, False])
def test_known_matrices_get_their_known_spectra(matrix: Tensor, sigma: float, radius: float, exact: bool) -> None:
    """Closed forms; the iterative ways agree with the exact ones where they say that they converged."""
    assert spectra.sigma_max(matrix, exact=exact).value == pytest.approx(sigma, rel=1e-5)
    found = spectra.spectral_radius(matrix, exact=exact)
    assert found.value == pytest.approx(radius, rel=1e-3 if found.certified else 0.05, abs=1e-9)


@pytest.mark.parametrize("size", [256, 1024])
def test_gaussian_matrices_get_their_largest_singular_value_within_the_error_that_is_stated(size: int) -> None:
    """Lanczos is a lower bound within rtol of numpy's value; Gram iteration is an upper bound within 2 %."""
    matrix = ginibre(size)
    true = float(torch.linalg.matrix_norm(matrix.double(), ord=2))
    found = spectra.sigma_max(matrix, rtol=1e-3, exact=False)
    assert found.certified
    assert found.method == "lanczos"
    assert true * (1 - 1e-3) <= found.value <= true * (1 + 1e-6)
    assert true * (1 - 1e-9) <= spectra.gram_bound(matrix) <= 1.02 * true
    assert true == pytest.approx(2.0, abs=0.05)  # the law of large Gaussian matrices


def test_an_estimate_that_ran_out_of_iterations_says_so() -> None:
    """One product cannot find the largest direction of a Gaussian matrix, and the residual shows it."""
    found = spectra.sigma_max(ginibre(300), exact=False, max_iterations=1)
    assert not found.certified
    assert found.residual > 0.1
    assert found.value < 1.9


def test_an_estimate_starts_where_the_last_one_ended() -> None:
    """From the vector of an earlier estimate, a weight that drifted is followed with fewer products."""
    matrix = ginibre(512)
    first = spectra.sigma_max(matrix, exact=False, rtol=1e-5)
    drifted = matrix + 1e-4 * ginibre(512, seed=1)
    assert spectra.sigma_max(drifted, exact=False, rtol=1e-3, start=first.vector).iterations < first.iterations


@pytest.mark.parametrize("size", [256, 1200])
def test_gaussian_matrices_get_the_radius_of_the_circular_law(size: int) -> None:
    """Exactly below 1024, by Arnoldi above; LAPACK's eigenvalues are the truth."""
    matrix = ginibre(size)
    found = spectra.spectral_radius(matrix)
    true = float(torch.linalg.eigvals(matrix.double()).abs().amax())
    assert found.method == ("exact" if size <= 1024 else "arnoldi")
    assert found.certified
    assert found.value == pytest.approx(true, rel=1e-3)
    assert true == pytest.approx(1.0, abs=0.05)
    assert true <= spectra.gelfand_bound(matrix) <= 1.15 * true


def test_gelfand_bounds_have_their_known_values() -> None:
    """Closed forms, for a rotation and for a matrix far from normal."""
    assert [spectra.gelfand_bound(TURN, squarings=k) for k in (4, 8, 12)] == pytest.approx(
        [0.9197, 0.9012, 0.9001], abs=1e-4
    )
    assert [spectra.gelfand_bound(SHEAR, squarings=k) for k in (4, 8, 12)] == pytest.approx(
        [0.8280, 0.5216, 0.5017], abs=1e-4
    )
    assert spectra.gelfand_bound(NILPOTENT) == 0.0


def test_power_iteration_errors_are_those_that_were_measured() -> None:
    """27 % short after one iteration on a Gaussian matrix of 256, about 3 % after 5, 0.3 % after 20."""
    errors: dict[int, list[float]] = {1: [], 20: []}
    for seed in range(5):
        matrix = ginibre(256, seed=seed)
        true = float(torch.linalg.matrix_norm(matrix, ord=2))
        for iterations, found in errors.items():
            found.append(float(spectra.power_iteration(matrix, iterations=iterations)[0]) / true - 1)
    assert all(-0.35 < error < -0.1 for error in errors[1])
    assert all(-0.03 < error < 1e-6 for error in errors[20])


def test_warm_power_iteration_follows_a_drifting_weight() -> None:
    """One iteration per step of a drift of 1e-3 is within 1 % after 50 steps."""
    matrix, vector = ginibre(256), None
    sigma = torch.tensor(0.0)
    for step in range(60):
        matrix = matrix + 1e-3 * ginibre(256, seed=step + 1)
        sigma, vector = spectra.power_iteration(matrix, start=vector)
    assert float(sigma) == pytest.approx(float(torch.linalg.matrix_norm(matrix, ord=2)), rel=0.01)


def test_power_iteration_takes_batches_and_zeros() -> None:
    """A stack of matrices gives what each gives alone; a zero matrix gives zero, not NaN."""
    stack = torch.stack([ginibre(16), torch.zeros(16, 16)])
    sigma, vector = spectra.power_iteration(stack, iterations=30)
    alone, _ = spectra.power_iteration(stack[0], iterations=500)
    assert float(sigma[0]) == pytest.approx(float(alone), rel=0.01)
    assert float(sigma[1]) == 0.0
    assert torch.isfinite(vector).all()


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 4, 3),
    "same": nn.Conv2d(3, 4, (3, 2), padding="same"),
    "stride": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(3, 4, 3, dilation=2, padding=2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "reflect": nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"),
    "replicate": nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate", stride=2),
    "transposed": nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    "one dimension": nn.Conv1d(3, 4, 5, padding=2),
    "three dimensions": nn.Conv3d(2, 2, 3, padding=1),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_measured_as_the_operator_that_it_is(kind: str) -> None:
    """The estimate is the norm of the matrix that the module applies, with stride, padding, dilation and groups."""
    module = CONVOLUTIONS[kind].double()
    size = 4 if kind == "three dimensions" else 6
    shape = (module.in_channels, *[size] * len(module.kernel_size))
    offset = module(torch.zeros(1, *shape, dtype=torch.float64))
    dense = as_dense(lambda x: module(x.unsqueeze(0)) - offset, shape)
    found = spectra.conv_sigma_max(module, size, rtol=1e-6)
    assert found.certified
    assert found.value == pytest.approx(float(torch.linalg.matrix_norm(dense, ord=2)), rel=1e-5)
    assert torch.equal(module(torch.zeros(1, *shape, dtype=torch.float64)), offset)
    assert module.weight.grad is None


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False), 6),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False, groups=2), 5),
        (nn.Conv2d(3, 2, 3, padding=2, padding_mode="circular", bias=False, dilation=2), 7),
    ],
    ids=["plain", "grouped", "dilated"],
)
def test_circular_convolutions_have_all_their_singular_values(module: nn.Conv2d, size: int) -> None:
    """Fourier blocks give every singular value of the dense operator."""
    module = module.double()
    shape = (module.in_channels, size, size)
    dense = torch.linalg.svdvals(as_dense(lambda x: module(x.unsqueeze(0)), shape))
    found = spectra.conv_singular_values(module, size)
    assert len(found) == len(dense)
    assert torch.allclose(found, dense, atol=1e-9)


def test_a_reshaped_kernel_only_bounds_the_operator() -> None:
    """R is well below the norm of the operator, which lies below R times 3 for a 3 x 3 kernel."""
    torch.manual_seed(0)
    module = nn.Conv2d(16, 16, 3, padding=1)
    lower, upper = spectra.kernel_bounds(module)
    sigma = spectra.conv_sigma_max(module, 16).value
    assert 1.2 * lower < sigma < upper
    assert upper == pytest.approx(3 * lower)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ([[[1.0, -1.0]]], 2.0),  # a difference, at the highest frequency
        ([[[0.0, 1.0, 0.0]]], 1.0),  # the identity
    ],
)
def test_simple_kernels_have_known_norms(weight: list[list[list[float]]], expected: float) -> None:
    """A circular difference over an even length has norm 2, the Dirac kernel 1."""
    kernel = torch.tensor(weight)
    module = nn.Conv1d(1, 1, kernel.shape[-1], padding="same", padding_mode="circular", bias=False)
    module.weight.data = kernel
    assert spectra.conv_sigma_max(module, 8).value == pytest.approx(expected, rel=1e-3)
    assert float(spectra.conv_singular_values(module, 8)[0]) == pytest.approx(expected, rel=1e-6)


def test_ranks_and_conditions() -> None:
    """A projection has its rank as stable rank, a Gaussian matrix n/4; a singular one an infinite condition."""
    assert spectra.stable_rank(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))) == pytest.approx(3.0)
    assert spectra.stable_rank(ginibre(400)) == pytest.approx(100, rel=0.1)
    assert spectra.condition_number(torch.diag(torch.tensor([4.0, 2.0]))) == pytest.approx(2.0)
    assert spectra.condition_number(NILPOTENT) == math.inf
    assert math.isnan(spectra.stable_rank(torch.zeros(2, 2)))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 1000), power=st.integers(-30, 30))
def test_scaling_and_transposing_change_the_norm_as_they_should(rows: int, columns: int, seed: int, power: int) -> None:
    """sigma(c A^T) = c sigma(A), for c far outside the range whose squares float32 holds; bounds enclose it."""
    matrix = ginibre(columns, seed=seed, rows=rows)
    sigma = spectra.sigma_max(matrix).value
    scaled = matrix.mT * 10.0**power
    for exact in (True, False):
        assert spectra.sigma_max(scaled, exact=exact).value == pytest.approx(sigma * 10.0**power, rel=1e-3)
    assert spectra.gram_bound(scaled) >= sigma * 10.0**power * (1 - 1e-5)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_radius_never_exceeds_the_norm_and_similar_matrices_share_it(size: int, seed: int) -> None:
    """rho(A) <= sigma(A); a change of basis leaves rho."""
    matrix = ginibre(size, seed=seed).double()
    radius = spectra.spectral_radius(matrix).value
    basis = torch.eye(size, dtype=torch.float64) + 0.1 * ginibre(size, seed=seed + 1).double()
    similar = basis @ matrix @ torch.linalg.inv(basis)
    assert radius <= spectra.sigma_max(matrix).value * (1 + 1e-9)
    assert spectra.spectral_radius(similar).value == pytest.approx(radius, rel=1e-6)


def test_half_precision_embeddings_and_tied_gradients_are_taken_as_they_are() -> None:
    """bfloat16 is widened, a tall table goes through its Gram matrix, and no graph is recorded."""
    table = nn.Embedding(5000, 32)
    true = float(torch.linalg.matrix_norm(table.weight.detach().double(), ord=2))
    assert spectra.sigma_max(table.weight).value == pytest.approx(true, rel=1e-6)
    assert spectra.sigma_max(table.weight.bfloat16()).value == pytest.approx(true, rel=1e-2)
    found = spectra.sigma_max(nn.Linear(300, 300).weight, exact=False)
    assert found.vector is not None
    assert not found.vector.requires_grad


def test_estimates_are_reproducible_and_leave_the_random_state_alone() -> None:
    """Two calls give the same number, and the user's generator goes on as if nothing had happened."""
    matrix = ginibre(300)
    before = torch.get_rng_state()
    first = spectra.sigma_max(matrix, exact=False).value
    assert spectra.sigma_max(matrix, exact=False).value == first
    spectra.spectral_radius(matrix, exact=False)
    spectra.conv_sigma_max(CONVOLUTIONS["plain"], 8)
    spectra.power_iteration(matrix)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: spectra.sigma_max(torch.zeros(2, 3, 3)), ValueError, "conv_sigma_max"),
        (lambda: spectra.sigma_max(torch.tensor([[math.nan]])), ValueError, "NaN or infinite"),
        (lambda: spectra.sigma_max(torch.zeros(2, 2, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: spectra.sigma_max([[1.0]]), TypeError, "list"),  # type: ignore[arg-type]
        (lambda: spectra.sigma_max(torch.ones(2, 2), rtol=0.0), ValueError, "rtol"),
        (lambda: spectra.sigma_max(ginibre(300), start=torch.zeros(300)), ValueError, "zero"),
        (lambda: spectra.sigma_max(ginibre(300), start=torch.ones(3)), ValueError, "300"),
        (lambda: spectra.sigma_max(torch.empty(2, 2, device="meta")), ValueError, "meta"),
        (lambda: spectra.spectral_radius(torch.ones(2, 3)), ValueError, "square"),
        (lambda: spectra.conv_sigma_max(nn.Linear(2, 2), 3), TypeError, "Linear"),
        (lambda: spectra.conv_sigma_max(nn.Conv2d(1, 1, 5), 3), ValueError, "smaller than the kernel"),
        (lambda: spectra.conv_sigma_max(nn.Conv2d(1, 1, 3), (8, 8, 8)), ValueError, "2 dimensions"),
        (lambda: spectra.conv_singular_values(nn.Conv2d(1, 1, 3, padding=1), 8), ValueError, "circular"),
        (lambda: spectra.kernel_bounds(nn.ConvTranspose1d(1, 1, 3)), TypeError, "transposed"),
        (lambda: spectra.power_iteration(torch.ones(2, 2), iterations=0), ValueError, "at least 1"),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_is_accepted(
    call: Callable[[], object], error: type[Exception], words: str
) -> None:
    """Errors name the value and the remedy."""
    with pytest.raises(error, match=words):
        call()


def matrices(module: nn.Module, name: str = "") -> dict[str, spectra.NamedMatrix]:
    """Return the matrices of a module by name."""
    return {matrix.name: matrix for matrix in spectra.named_matrices(module, name=name)}


def test_gates_are_told_apart_in_the_order_of_torch() -> None:
    """The forget gate of an LSTM is its second block, the candidate of a GRU its third; gamma of a sigmoid is 1/4."""
    lstm, gru = nn.LSTM(3, 5, 2), nn.GRUCell(3, 5)
    found = matrices(lstm)
    assert torch.equal(found["weight_hh_l1[forget]"].matrix, dict(lstm.named_parameters())["weight_hh_l1"][5:10])
    assert found["weight_hh_l0[forget]"].derivative_bound == 0.25
    assert found["weight_hh_l0[cell]"].derivative_bound == 1.0
    assert torch.equal(matrices(gru)["weight_hh[candidate]"].matrix, gru.weight_hh[10:])
    assert not found["weight_ih_l0[input]"].is_recurrent


def test_a_projection_is_part_of_the_recurrent_matrix() -> None:
    """With proj_size the state that comes back is the projected one: the recurrent matrix is their product, square."""
    lstm = nn.LSTM(3, 5, proj_size=2)
    weights = dict(lstm.named_parameters())
    found = matrices(lstm)["weight_hh_l0[forget]"].matrix
    assert torch.allclose(found, weights["weight_hh_l0"][5:10] @ weights["weight_hr_l0"])


def test_fused_projections_are_told_apart() -> None:
    """MultiheadAttention and linear layers called qkv hold three matrices; other wide layers are one."""
    attention = nn.MultiheadAttention(4, 2)
    assert torch.equal(matrices(attention)["in_proj_weight[key]"].matrix, attention.in_proj_weight[4:8])
    assert set(matrices(nn.Linear(4, 12), "blocks.0.attn.qkv")) == {f"weight[{p}]" for p in ("query", "key", "value")}
    assert set(matrices(nn.Linear(4, 12), "head")) == {"weight"}


def test_parametrized_weights_are_left_alone() -> None:
    """Asking for a spectrally normalized weight in training mode would advance its power iteration."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert not matrices(layer)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_sharded_weights_are_gathered() -> None:
    """A DTensor gives what the whole weight gives; every rank that holds a part of it has to ask."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        matrix = ginibre(40)
        sharded = distribute_tensor(matrix, init_device_mesh("cpu", (1,)), [Shard(0)])
        assert spectra.sigma_max(sharded).value == spectra.sigma_max(matrix).value
        assert spectra.spectral_radius(sharded).value == spectra.spectral_radius(matrix).value
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_any_geometry_agrees_with_the_dense_operator(stride: int, padding: int, dilation: int, groups: int) -> None:
    """Over every combination, and inputs from 5 x 5 to 8 x 8, the norm is that of the matrix built column by column."""
    torch.manual_seed(stride + 4 * padding + 16 * dilation + 64 * groups)
    module = nn.Conv2d(4, 6, 3, stride, padding, dilation, groups, bias=False, dtype=torch.float64)
    for size in (5, 8):
        basis = torch.eye(4 * size * size, dtype=torch.float64).view(-1, 4, size, size)
        dense = module(basis).detach().flatten(1)
        found = spectra.conv_sigma_max(module, size)
        assert found.certified
        assert found.value == pytest.approx(float(torch.linalg.matrix_norm(dense, ord=2)), rel=1e-3)


CONV_KINDS: tuple[tuple[Literal["circular", "zeros"], int], ...] = (("circular", 1), ("zeros", 1), ("zeros", 2))
"""Padding and stride of the three operators."""


@pytest.mark.parametrize(
    ("channels", "kernel", "size", "circular", "zeros", "strided", "reshaped"),
    [(16, 3, 8, 3.013, 2.889, 2.209, 1.849), (32, 5, 16, 2.934, 2.867, 2.125, 1.677)],
)
def test_he_initialized_convolutions_have_the_norms_that_were_measured(
    channels: int, kernel: int, size: int, circular: float, zeros: float, strided: float, reshaped: float
) -> None:
    """Means over five draws are within 5 % of the table, which is of one draw; the norm exceeds R by half or more."""
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        weight = torch.randn(channels, channels, kernel, kernel) * math.sqrt(2 / (channels * kernel**2))
        norms = []
        module = nn.Conv2d(channels, channels, kernel, bias=False)
        for mode, stride in CONV_KINDS:
            module = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, padding_mode=mode, bias=False)
            module.weight.data = weight
            norms.append(spectra.conv_sigma_max(module, size).value)
        norms.append(spectra.kernel_bounds(module)[0])
        found.append(norms)
    means = torch.tensor(found).mean(0).tolist()
    assert means == pytest.approx([circular, zeros, strided, reshaped], rel=0.05)
    assert 1.5 < means[0] / means[3] < 1.8


MEASURED = [
    (256, 8, {1: 1.41, 2: 0.41, 3: 0.13, 4: 0.036, 5: 0.007}, {4: 0.115, 6: 0.014, 8: 0.0035}),
    (1024, 3, {1: 2.38, 2: 0.66, 3: 0.22, 4: 0.074, 5: 0.023}, {4: 0.21, 6: 0.037, 8: 0.007}),
]
"""Size, draws, and by how much bounds exceeded norm and radius of one Gaussian matrix, by iterations."""


@pytest.mark.parametrize(("size", "draws", "gram", "gelfand"), MEASURED)
def test_bounds_exceed_by_what_was_measured(
    size: int, draws: int, gram: dict[int, float], gelfand: dict[int, float]
) -> None:
    """The measured draw lies among ours for Gram iteration, and within a factor of two of their mean for Gelfand."""
    matrices = [ginibre(size, seed=seed).double() for seed in range(draws)]
    norms = [float(torch.linalg.matrix_norm(matrix, ord=2)) for matrix in matrices]
    for iterations, expected in gram.items():
        pairs = zip(matrices, norms, strict=True)
        found = [spectra.gram_bound(matrix, iterations=iterations) / norm - 1 for matrix, norm in pairs]
        assert 0.95 * min(found) <= expected <= 1.05 * max(found)
    radii = [float(torch.linalg.eigvals(matrix).abs().amax()) for matrix in matrices[:4]]
    for squarings, expected in gelfand.items():
        excess = [
            spectra.gelfand_bound(matrix, squarings=squarings) / radius - 1
            for matrix, radius in zip(matrices, radii, strict=False)
        ]
        assert 0.5 < sum(excess) / len(excess) / expected < 2.0


def test_orthogonal_matrices_have_radius_and_norm_one() -> None:
    """Every singular value and every eigenvalue has size 1, whatever the way of computing it."""
    torch.manual_seed(0)
    matrix = nn.init.orthogonal_(torch.empty(300, 300))
    for exact in (True, False):
        assert spectra.sigma_max(matrix, exact=exact).value == pytest.approx(1.0, abs=1e-5)
        assert spectra.spectral_radius(matrix, exact=exact).value == pytest.approx(1.0, abs=1e-3)
    assert spectra.condition_number(matrix) == pytest.approx(1.0, abs=1e-4)
