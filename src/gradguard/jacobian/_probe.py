"""The Jacobian of a net or of a block: exactly where it is small, by its products where it is not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradguard._untouched import untouched
from gradguard.errors import GradientsUnavailableError, UnsupportedModelError
from gradguard.jacobian._krylov import Extremes, extremes
from gradguard.jacobian._maps import Differential, differential, random_like
from gradguard.jacobian._twin import Call, Part, captured, differentiable_kernels, twin_of
from gradguard.monitors._trees import tensors
from gradguard.profiles import JacobianStretch

__all__ = ["EXACT_ENTRIES", "EXACT_PASSES", "ISOMETRY", "stretch", "stretch_in_loss"]

EXACT_PASSES = 256
"""Products up to which the whole Jacobian is formed. Ours: a backward pass each."""

EXACT_ENTRIES = 2**22
"""Entries of the Jacobian (of an example, where examples are independent, times the batch) up to which it is formed:
32 MiB in float64. Ours."""

ISOMETRY = 2.0
"""Every singular value between 1/2 and 2 is called isometric. Ours: such a block changes no gradient by more than a
factor of 2, in no direction. Measured, width 64, orthogonal weights: 50 tanh layers at small inputs lie between 0.987
and 0.998, 50 tanh layers at inputs of size 1 between 3e-4 and 0.3, 10 ReLU layers of gain sqrt(2) reach 3.8 and lose
directions altogether."""

_SEED = 0


def stretch(
    model: nn.Module,
    inputs: Any,
    *,
    block: str | None = None,
    rtol: float = 1e-2,
    max_iterations: int = 40,
    dtype: torch.dtype | None = None,
) -> JacobianStretch:
    """Return the largest and the smallest singular value of the Jacobian of a model, or of one of its blocks.

    The model is copied, and the copy is probed, in float64 where the model lets itself be converted: gradients may
    shrink by more decades than float32 has digits. Modes (train or eval) are the model's; dropout keeps one mask,
    random states and buffers are left alone. Hooks that are not torch's own do not run. The Jacobian is that of the
    batch as it is given: without coupling between examples its singular values are those of all examples together, and
    with it (batch normalization in training mode) there is no Jacobian of one example.

    Where the smaller side of an example has at most ``256`` entries and the Jacobian at most ``2**22``, it is formed
    and decomposed. Elsewhere both values come from products with it (a forward and a backward pass each pair), and
    ``smallest`` is an upper bound. The derivative is taken by ``torch.func``; where that cannot go (custom autograd
    functions of the old kind, checkpointing), by differentiating the backward pass, else by finite differences. A way
    is believed only where products with the Jacobian and with its transpose agree.

    Args:
        model: Any module. It is left as it was, bit for bit, also after an error.
        inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments. The first floating-point
            tensor is varied; where there is none, the output of the first embedding called.
        block: Dotted name of a submodule, whose own first floating-point input is varied; the whole model otherwise.
        rtol: Relative accuracy of the largest singular value, > 0 and < 1.
        max_iterations: Pairs of products to spend at most, at least 1.
        dtype: Floating-point type to compute in; float64 by default, and the model's own where that fails.

    Returns:
        Both values, whether they are certified, and whether the block is isometric: all singular values between 1/2
        and 2.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If an argument is out of range, or there is no such block.
        UnsupportedModelError: If the model cannot be copied, or has no floating-point input or output.
        GradientsUnavailableError: If the derivative is not finite or cannot be taken.

    Source:
        Pennington, Schoenholz, Ganguli (2017), "Resurrecting the sigmoid in deep learning through dynamical isometry",
        NeurIPS, arXiv 1711.04735; Saxe, McClelland, Ganguli (2014), "Exact solutions to the nonlinear dynamics of
        learning in deep linear neural networks", ICLR, arXiv 1312.6120: in a deep linear orthogonal net every singular
        value is 1.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        >>> found = stretch(layer, torch.zeros(1, 2))
        >>> round(found.largest, 6), round(found.smallest, 6), round(found.condition, 6)
        (3.0, 0.5, 6.0)
    """
    args, kwargs = _arguments(inputs)
    _check_arguments(model, rtol, max_iterations)
    model = _unwrapped(model)
    if block is not None and block not in dict(model.named_modules()):
        raise ValueError(f"no block {block!r} in {type(model).__name__}: take a name of model.named_modules()")

    def call_of(twin: nn.Module) -> Call:
        found: Call | None = Call(args=args, kwargs=kwargs)
        if block:
            found = captured(twin.get_submodule(block), lambda: twin(*args, **kwargs))
        if found is None:
            raise ValueError(f"block {block!r} was not called in a forward pass of {type(model).__name__}")
        return found

    return _measured(model, block or "", call_of, rtol=rtol, max_iterations=max_iterations, dtype=dtype)


def stretch_in_loss(
    model: nn.Module,
    batch: Any,
    compute_loss: Callable[[Any, Any], Any],
    *,
    rtol: float = 1e-2,
    max_iterations: int = 40,
) -> JacobianStretch:
    """Return what :func:`stretch` does, for the arguments that a loss function first calls the model with.

    Args:
        model: See :func:`stretch`.
        batch: See :func:`gradguard.check`.
        compute_loss: Called once, as ``compute_loss(copy of the model, batch)``.
        rtol: See :func:`stretch`.
        max_iterations: See :func:`stretch`.

    Raises:
        TypeError: As :func:`stretch`.
        UnsupportedModelError: As :func:`stretch`, and where ``compute_loss`` does not call the model it is given.
        GradientsUnavailableError: As :func:`stretch`.
    """
    _check_arguments(model, rtol, max_iterations)

    def call_of(twin: nn.Module) -> Call:
        found = captured(twin, lambda: compute_loss(twin, batch))
        if found is None:
            raise UnsupportedModelError("compute_loss does not call the model that it is given")
        return found

    return _measured(model, "", call_of, rtol=rtol, max_iterations=max_iterations, dtype=None)


def _measured(
    model: nn.Module,
    name: str,
    call_of: Callable[[nn.Module], Call],
    *,
    rtol: float,
    max_iterations: int,
    dtype: torch.dtype | None,
) -> JacobianStretch:
    model = _unwrapped(model)
    with untouched(model), torch.inference_mode(mode=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about how it loads forward mode; the model's, once per product
        twin = twin_of(model)
        with torch.enable_grad():
            call = call_of(twin)
        wanted = dtype if dtype is not None else _wide(twin, call)
        with torch.autocast(_device(call).type, enabled=False), differentiable_kernels():
            try:
                found = _stretch(_part(twin, name, call, wanted), rtol=rtol, max_iterations=max_iterations)
            except Exception:
                if dtype is not None or wanted is None:
                    raise
                found = _stretch(_part(twin_of(model), name, call, None), rtol=rtol, max_iterations=max_iterations)
    return replace(found, name=name)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of what compiles or distributes it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _part(twin: nn.Module, name: str, call: Call, dtype: torch.dtype | None) -> Part:
    return Part(twin.get_submodule(name), call, dtype)


def _stretch(part: Part, *, rtol: float, max_iterations: int) -> JacobianStretch:
    """Measure one function."""
    with torch.no_grad():
        finite = bool(torch.isfinite(part(part.point)).all())  # an error of the model's own is raised here
    if not finite:
        raise GradientsUnavailableError("the output is not finite, so that it has no Jacobian")
    generator = torch.Generator().manual_seed(_SEED)
    found, disagreement = differential(part, part.point, generator)
    epsilon = torch.finfo(found.output.dtype).eps
    inputs, outputs = part.point.numel(), found.output.numel()
    noise = max(disagreement, epsilon * math.sqrt(max(inputs, outputs)))
    values = _exact(found, part.point, generator)
    if values is not None:
        reading = Extremes(
            largest=float(values.max()),
            smallest=float(values.min()),
            floor=float(values.min()),
            rms=float(values.square().mean().sqrt()),
            residual=0.0,
            closed=True,
            iterations=values.shape[-1],
        )
    else:
        wide = outputs <= inputs
        reading = extremes(
            _product(found, part.point, forward=not wide),
            _product(found, part.point, forward=wide),
            random_like(found.output if wide else part.point, generator).reshape(-1),
            rtol=rtol,
            noise=noise,
            max_iterations=max_iterations,
        )
    resolved = noise * reading.largest
    certified = reading.smallest > resolved and reading.smallest - reading.floor <= rtol * reading.smallest
    residual = max(reading.residual, noise)
    sure = residual <= rtol
    return JacobianStretch(
        source=part.source,
        inputs=inputs,
        outputs=outputs,
        largest=reading.largest,
        smallest=max(reading.smallest, resolved),
        rms=reading.rms,
        largest_certified=sure,
        smallest_certified=certified,
        residual=residual,
        noise=noise,
        iterations=reading.iterations,
        exact=values is not None,
        method=found.method,
        isometry=_verdict(reading, sure=sure and reading.smallest > resolved),
    )


def _verdict(reading: Extremes, *, sure: bool) -> str:
    """Judge by bounds alone where they suffice: the largest is never too large, the smallest never too small."""
    if reading.largest > ISOMETRY or reading.smallest < 1.0 / ISOMETRY:
        return "not isometric"
    return "isometric" if sure and reading.floor >= 1.0 / ISOMETRY else "unknown"


def _product(found: Differential, point: Tensor, *, forward: bool) -> Callable[[Tensor], Tensor]:
    """Return the product with the Jacobian, or with its transpose, of flat vectors."""
    if forward:
        return lambda vector: found.forward(vector.reshape(point.shape)).reshape(-1)
    return lambda vector: found.backward(vector.reshape(found.output.shape)).reshape(-1)


def _exact(found: Differential, point: Tensor, generator: torch.Generator) -> Tensor | None:
    """Return all singular values, of the smaller side, or ``None`` where the Jacobian is too large to be formed."""
    examples = _independent(found, point, generator)
    inputs, outputs = point.numel() // examples, found.output.numel() // examples
    count = min(inputs, outputs)
    if count > EXACT_PASSES or count == 0 or examples * inputs * outputs > EXACT_ENTRIES:
        return None
    wide = outputs <= inputs
    near = found.output if wide else point
    rows = []
    for index in range(count):
        vector = torch.zeros_like(near).reshape(examples, count)
        vector[:, index] = 1.0
        product = found.backward if wide else found.forward
        rows.append(product(vector.reshape(near.shape)).reshape(examples, -1))
    values: Tensor = torch.linalg.svdvals(torch.stack(rows, 1).double().cpu())
    return values


def _independent(found: Differential, point: Tensor, generator: torch.Generator) -> int:
    """Return the size of the first dimension where no entry of it influences another, else 1.

    Each pair of entries differs in some binary digit: the entries that have it set are varied, and the others must not
    change at all; and the other way round.
    """
    count = point.shape[0] if point.dim() and found.output.dim() and point.shape[0] == found.output.shape[0] else 1
    if count == 1:
        return 1
    index = torch.arange(count, device=point.device)
    for digit in range((count - 1).bit_length()):
        for value in (0, 1):
            varied = (index >> digit) & 1 == value
            vector = random_like(point, generator)
            vector[~varied] = 0.0
            if bool(found.forward(vector)[~varied].any()):
                return 1
    return count


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(inputs, tuple):
        return inputs, {}
    return ((), inputs) if isinstance(inputs, Mapping) else ((inputs,), {})


def _check_arguments(model: Any, rtol: float, max_iterations: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not 0.0 < rtol < 1.0:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations!r}")


def _device(call: Call) -> torch.device:
    return next((tensor.device for tensor in tensors((call.args, dict(call.kwargs)))), torch.device("cpu"))


def _wide(twin: nn.Module, call: Call) -> torch.dtype | None:
    """Return float64 where the device has it; ``None`` for the model's own type."""
    devices = {tensor.device.type for tensor in twin.parameters()} | {_device(call).type}
    return None if "mps" in devices else torch.float64
