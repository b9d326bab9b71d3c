"""What a module is: its kind for people, its role for the rules, the axis of its units."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import singledispatch

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["ModuleInfo", "clean_name", "describe"]

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module)(?:\.|$)")
_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original(\d*)")

_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.GLU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """What the monitors need to know of a module.

    Attributes:
        kind: Type and size, for instance ``"Conv2d 3>64 3x3"``.
        role: See :class:`gradguard.records.LayerTable`.
        unit_axis: Axis of the output along which units (features, channels) lie; ``None`` to take the input's.
        zero_is_dead: Whether an output of zero means a derivative of zero.
    """

    kind: str
    role: str
    unit_axis: int | None = -1
    zero_is_dead: bool = False


def clean_name(name: str, *, unwrap: bool = False) -> str:
    """Return a dotted name as the user wrote it, without the prefixes of compile, Fabric, FSDP and parametrizations.

    Args:
        name: Dotted module or parameter name.
        unwrap: Whether the model is a DataParallel-like wrapper, whose ``module.`` prefix goes as well.

    Example:
        >>> clean_name("_orig_mod.0.parametrizations.weight.original1")
        '0.weight.original1'
    """
    name = _WRAPPERS.sub("", name)
    if unwrap:
        name = re.sub(r"^module(\.|$)", "", name)
    return _PARAMETRIZED.sub(lambda match: match[1] + (f".original{match[2]}" if match[2] else ""), name)


@singledispatch
def describe(module: nn.Module) -> ModuleInfo:
    """Return what a module is; subclasses of torch's modules count as what they derive from.

    A leaf with a matrix of its own counts as affine, one with vectors only and "norm" in its name as normalization, one
    without parameters as something else.
    """
    name = type(module).__name__
    own = list(module.parameters(recurse=False))
    if "norm" in name.lower() and all(p.ndim <= 1 for p in own):
        return ModuleInfo(name, "norm")
    if any(p.ndim >= 2 for p in own):
        shape = "x".join(str(size) for size in next(p for p in own if p.ndim >= 2).shape)
        return ModuleInfo(f"{name} {shape}", "affine")
    return ModuleInfo(name, "other", None)


@describe.register
def _(module: nn.Linear) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.in_features}>{module.out_features}", "affine")


@describe.register
def _(module: nn.Bilinear) -> ModuleInfo:
    sizes = f"{module.in1_features},{module.in2_features}>{module.out_features}"
    return ModuleInfo(f"{type(module).__name__} {sizes}", "affine")


@describe.register
def _(module: _ConvNd) -> ModuleInfo:
    kernel = "x".join(str(size) for size in module.kernel_size)
    kind = f"{type(module).__name__} {module.in_channels}>{module.out_channels} {kernel}"
    return ModuleInfo(kind, "affine", -1 - len(module.kernel_size))


@describe.register
def _(module: nn.Embedding) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.num_embeddings}>{module.embedding_dim}", "embedding")


@describe.register
def _(module: nn.EmbeddingBag) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.num_embeddings}>{module.embedding_dim}", "embedding")


@describe.register
def _(module: nn.RNNBase) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.input_size}>{module.hidden_size}", "recurrent")


@describe.register
def _(module: nn.RNNCellBase) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.input_size}>{module.hidden_size}", "recurrent")


@describe.register
def _(module: nn.MultiheadAttention) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.embed_dim} x{module.num_heads}", "attention")


@describe.register
def _(module: _BatchNorm) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.num_features}", "norm", 1)


@describe.register
def _(module: _InstanceNorm) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.num_features}", "norm", 1)


@describe.register
def _(module: nn.GroupNorm) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {module.num_channels}", "norm", 1)


@describe.register
def _(module: nn.LayerNorm) -> ModuleInfo:
    return ModuleInfo(f"{type(module).__name__} {math.prod(module.normalized_shape)}", "norm")


def _activation(module: nn.Module) -> ModuleInfo:
    return ModuleInfo(
        type(module).__name__, "activation", None, zero_is_dead=isinstance(module, (nn.ReLU, nn.ReLU6, nn.Threshold))
    )


for _type in _ACTIVATIONS:
    describe.register(_type, _activation)
