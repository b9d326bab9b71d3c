"""Which layers a remedy may touch, why it leaves others alone, and how weights are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from gradguard._arguments import check_model, check_optimizers, has_lazy_parameters
from gradguard.errors import UnsupportedModelError
from gradguard.monitors._describe import clean_name
from gradguard.monitors._targets import is_compiled
from gradguard.remedies._applied import Applied, Snapshot, tensor_names

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = [
    "Generator",
    "Layer",
    "check_arguments",
    "expand",
    "finish",
    "generator_of",
    "layers_of",
    "made_weight",
    "set_weight",
    "zero_bias",
    "zeroed",
]

Generator: TypeAlias = torch.Generator | int | None
"""A generator on the CPU, a seed for one, or ``None`` for torch's global generator."""

Layer: TypeAlias = tuple[str, nn.Module]
"""A dotted name and the module there."""

_CLOSE = 1e-3
"""Relative difference by which a parametrized weight may miss the one asked for; bfloat16 rounds by 4e-3 and is refused
no more than float16 needs. Ours."""


def check_arguments(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None, *, verb: str = "initialise"
) -> tuple[Optimizer, ...]:
    """Return the optimizers, and refuse models whose weights cannot be set in place.

    Args:
        model: The model.
        optimizer: Its optimizer or optimizers.
        verb: What the caller is about to do, for the messages.

    Raises:
        TypeError: If the model is no module or an optimizer is none.
        UnsupportedModelError: If the model is scripted, compiled, wrapped for data parallelism, on the meta device,
            sharded, or not yet materialised.
    """
    optimizers = check_optimizers(optimizer)
    check_model(model, optimizers)
    name = type(model).__name__
    if has_lazy_parameters(model):
        raise UnsupportedModelError(
            f"{name} has lazy parameters without a shape yet. Run one forward pass first, then {verb}"
        )
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{type(module).__name__} is a TorchScript module. {verb.capitalize()} the model before it is scripted"
            )
        if is_compiled(module):
            raise UnsupportedModelError(
                f"{name} is compiled. {verb.capitalize()} the model before torch.compile, or pass the module that "
                "was compiled"
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise UnsupportedModelError(
                f"{name} holds a {type(module).__name__}, whose replicas would drift apart. {verb.capitalize()} the "
                "model before it is wrapped; the wrapper then spreads the weights of rank 0"
            )
    for key, tensor in tensor_names(model).items():
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{key} is on the meta device and has no values. Call model.to_empty(device=...) first, then {verb}"
            )
        if any(base.__name__ in {"DTensor", "ShardedTensor"} for base in type(tensor.data).__mro__):
            raise UnsupportedModelError(
                f"{key} is sharded over processes. {verb.capitalize()} the model before it is sharded"
            )
        if tensor.is_inference():
            raise UnsupportedModelError(
                f"{key} was made under torch.inference_mode() and cannot be changed. Build the model outside of it"
            )
    return optimizers


def layers_of(model: nn.Module, modules: Iterable[str] | None) -> tuple[list[Layer], dict[str, str]]:
    """Return the Linear and convolution layers whose weights may be set, and why others are left alone.

    Args:
        model: The model.
        modules: Names of the layers, or of modules around them, to consider; ``None`` for all.

    Raises:
        ValueError: If a name is unknown.
    """
    chosen = None if modules is None else set(expand(model, modules))
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    inner = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    seen: dict[int, str] = {}
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    for raw, module in model.named_modules():
        name = clean_name(raw)
        if not isinstance(module, (nn.Linear, _ConvNd)) or (chosen is not None and id(module) not in chosen):
            continue
        weight = _originals(module)[0] if _originals(module) else None
        if id(module) in inner:
            skipped[name] = "it belongs to a MultiheadAttention, which initialises itself"
        elif weight is None:
            skipped[name] = (
                "its weight is made by a hook before each forward pass (old weight_norm, spectral_norm or pruning); "
                "use torch.nn.utils.parametrizations"
            )
        elif not all(p.requires_grad for p in _originals(module)):
            skipped[name] = "its weight is frozen (requires_grad is False)"
        elif id(weight) in embedded:
            skipped[name] = "its weight is tied to an embedding"
        elif id(weight) in seen:
            skipped[name] = f"its weight is that of {seen[id(weight)]}, which is set once"
        elif not weight.is_floating_point() or weight.layout != torch.strided:
            skipped[name] = f"its weight is {weight.dtype} in {weight.layout} layout, not dense floating point"
        else:
            seen[id(weight)] = name
            layers.append((name, module))
    return layers, skipped


def expand(model: nn.Module, names: Iterable[str]) -> Iterator[int]:
    """Yield the ids of the modules named and of all modules inside them.

    Raises:
        ValueError: If a name is unknown.
    """
    known = {clean_name(name): module for name, module in model.named_modules()}
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise ValueError(f"modules names {name!r}, and the {type(model).__name__} has no such module")
        yield from (id(module) for module in known[name].modules())


def _originals(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters from which a layer's weight is made: the weight itself, unless it is parametrized."""
    if parametrize.is_parametrized(module, "weight"):
        return list(_parametrization(module).parameters())
    weight = module._parameters.get("weight")
    return [] if weight is None else [weight]


def _parametrization(module: nn.Module) -> Any:
    return module.parametrizations["weight"]  # type: ignore[index]  # a ModuleDict wherever is_parametrized says so


def made_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight as it is now, past any cache; the buffers of a parametrization stay as they are."""
    if not parametrize.is_parametrized(module, "weight"):
        made = module._parameters["weight"]
    else:
        before = Snapshot()
        before.keep_module(module, parameters=False)
        with torch.no_grad():
            made = _parametrization(module)()
        before.restore()
    assert isinstance(made, torch.Tensor)  # noqa: S101  # layers_of lets no other pass
    return made.detach()


def set_weight(module: nn.Module, value: Tensor) -> str | None:
    """Set a layer's weight; return why it could not be set, in which case it is as before.

    A parametrized weight is set through its ``right_inverse``, and read again: where it comes out as something else
    (spectral norm fixes its scale, an orthogonal weight has none) the layer is left alone.
    """
    with torch.no_grad():
        if not parametrize.is_parametrized(module, "weight"):
            module._parameters["weight"].copy_(value)  # type: ignore[union-attr]  # layers_of lets none pass
            return None
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in _parametrization(module))
        before = Snapshot()
        before.keep_module(module)
        try:
            module.weight = value.to(_originals(module)[0])
        except Exception as error:  # noqa: BLE001  # each parametrization raises what it likes
            before.restore()
            return f"its weight is parametrized ({kinds}) and cannot be set: {error}"
        found = made_weight(module)
        if not torch.allclose(found, value.to(found), rtol=_CLOSE, atol=_CLOSE * float(value.abs().max())):
            before.restore()
            return f"its weight is parametrized ({kinds}), which does not allow the weight asked for"
    return None


def zero_bias(module: nn.Module) -> None:
    """Set a layer's bias to zero, unless it has none or it is frozen."""
    bias = module._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        with torch.no_grad():
            bias.zero_()


def zeroed(module: nn.Module) -> str:
    """Return in words what :func:`zero_bias` does to a layer."""
    bias = module._parameters.get("bias")
    return ", bias 0" if bias is not None and bias.requires_grad else ""


def generator_of(generator: Any) -> torch.Generator | None:
    """Return the generator on the CPU that a seed or generator stands for.

    Raises:
        TypeError: If it is neither a seed, a generator nor ``None``.
        ValueError: If the generator is not on the CPU.
    """
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        if generator.device.type != "cpu":
            raise ValueError(
                f"generator is on {generator.device}; weights are drawn on the CPU, so that they are the same on every "
                "device. Pass a CPU generator or a seed"
            )
        return generator
    if isinstance(generator, int) and not isinstance(generator, bool):
        return torch.Generator().manual_seed(generator)
    raise TypeError(f"generator must be a torch.Generator, a seed or None, got {generator!r}")


def finish(  # a record's fields
    model: nn.Module,
    remedy: str,
    snapshot: Snapshot,
    optimizers: Sequence[Optimizer],
    changes: Sequence[str],
    skipped: dict[str, str],
    before: dict[str, Tensor],
) -> Applied:
    """Reset the optimizer's state for what did change, and write the record.

    Args:
        model: The model as it is now.
        remedy: The remedy's name.
        snapshot: What was kept of the model before it was changed.
        optimizers: The optimizers to reset.
        changes: What was done, in words.
        skipped: What was left alone, and why.
        before: Parameters and buffers by name, before the change.

    Raises:
        UnsupportedModelError: If nothing was changed; the message says why.
    """
    if not changes:
        why = (
            "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in skipped.items())
            or "it has no layer of the kind"
        )
        raise UnsupportedModelError(f"{remedy} found nothing to change in this {type(model).__name__}. {why}")
    changed = snapshot.changed()
    after = tensor_names(model)
    snapshot.reset_state(optimizers, (p for p in model.parameters() if id(p) in changed))
    now: dict[int, list[str]] = {}
    for name, tensor in after.items():
        now.setdefault(id(tensor), []).append(name)
    names = {}
    for name, tensor in before.items():
        places = now.get(id(tensor), [])
        if places:
            names[clean_name(name)] = clean_name(name if name in places else places[0])
    new = {id(tensor) for tensor in after.values()} - {id(tensor) for tensor in before.values()}
    return Applied(
        model=model,
        remedy=remedy,
        changes=tuple(changes),
        changed=tuple(clean_name(name) for name, tensor in after.items() if id(tensor) in changed | new),
        skipped=skipped,
        names=names,
        _snapshot=snapshot,
    )
