"""The operations of one forward pass and how they hang together.

A torch function mode sees every operation, those of ``torch.nn.functional`` as well as those of modules, so an
activation counts however it is written; hooks are set on modules that are activations of their author's own, and on no
other. Layers are known by the tensor that they use as their weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from gradguard import theory
from gradguard._untouched import untouched
from gradguard.monitors._trees import floating_tensors
from gradguard.remedies.initialization._custom import custom_activations

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Op", "Trace", "call", "trace"]

_ACTIVATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "celu": ("alpha",),
        "elu": ("alpha",),
        "exp": (),
        "gelu": ("approximate",),
        "hardshrink": ("lambd",),
        "hardsigmoid": (),
        "hardswish": (),
        "hardtanh": ("min_val", "max_val"),
        "leaky_relu": ("negative_slope",),
        "logsigmoid": (),
        "log_sigmoid": (),
        "mish": (),
        "prelu": ("weight",),
        "relu": (),
        "relu6": (),
        "rrelu": ("lower", "upper"),
        "selu": (),
        "sigmoid": (),
        "silu": (),
        "softplus": ("beta", "threshold"),
        "softshrink": ("lambd",),
        "softsign": (),
        "tanh": (),
        "tanhshrink": (),
        "threshold": ("threshold", "value"),
    }
)
"""Functions that are activations, with the arguments behind the input that shape them, in torch's order."""

_EXP = theory.Activation(name="exp", function=np.exp, derivative=np.exp, derivative_bound=math.inf)
_NORMS = frozenset({"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "local_response_norm"})
_SHAPES = frozenset(
    {
        "__getitem__", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
        "adaptive_max_pool2d", "adaptive_max_pool3d", "alpha_dropout", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cat",
        "channel_shuffle", "chunk", "clone", "contiguous", "dropout", "dropout1d", "dropout2d", "dropout3d", "expand",
        "feature_alpha_dropout", "flatten", "flip", "float", "interpolate", "max_pool1d", "max_pool2d", "max_pool3d",
        "boolean_dispatch", "fn", "mean", "moveaxis", "movedim", "narrow", "pad", "permute", "pixel_shuffle",
        "pixel_unshuffle", "repeat", "reshape", "roll", "select", "split", "squeeze", "stack", "swapaxes", "t", "to",
        "tensor_split", "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "upsample", "view", "view_as",
    }
)  # fmt: skip
"""Functions that move, drop or pool values and leave their scale about as it is."""
_MOVES = frozenset(
    {
        "__getitem__", "chunk", "contiguous", "expand", "expand_as", "flatten", "moveaxis", "movedim", "narrow",
        "permute", "repeat", "reshape", "select", "split", "squeeze", "swapaxes", "t", "transpose", "unbind",
        "unflatten", "unsqueeze", "view", "view_as",
    }
)  # fmt: skip
"""Functions that give out the values they take, elsewhere: a gate behind one of them is a gate."""
_BOUNDED = frozenset({"hardsigmoid", "hardtanh", "sigmoid", "softsign", "tanh"})
"""Activations that gates are made of."""
_ATTENTION = frozenset({"multi_head_attention_forward"})
_PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__", "__imul__"})
_SUMS = frozenset({"add", "__add__", "__radd__", "__iadd__"})
_LINEAR = frozenset(
    {
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear",
        "embedding", "embedding_bag", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "bmm", "einsum",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation of the forward pass.

    Attributes:
        index: Position in the order of execution.
        name: Of the function, without the underscore of one that works in place.
        kind: ``"input"``, ``"layer"``, ``"activation"``, ``"norm"``, ``"shape"``, ``"sum"``, ``"product"`` or
            ``"other"``.
        parents: Indices of the operations whose results it takes; empty for what is made from constants.
        operands: For a sum or product, the index behind each of its two operands; none if one of them is a constant.
        module: The module whose weight it uses, if any.
        activation: The activation, where it is one that the theory knows.
    """

    index: int
    kind: str
    parents: tuple[int, ...]
    name: str = ""
    operands: tuple[int, ...] = ()
    module: nn.Module | None = None
    activation: theory.Activation | None = None


@dataclass(slots=True)
class Trace:
    """The operations of one forward pass, in order.

    Attributes:
        ops: The operations; the first stands for the model's inputs.
        children: For each operation the indices of those that take its result.
    """

    ops: list[Op] = field(default_factory=list)
    children: list[list[int]] = field(default_factory=list)

    def add(self, op: Op) -> None:
        """Append an operation."""
        self.ops.append(op)
        self.children.append([])
        for parent in op.parents:
            self.children[parent].append(op.index)

    def uses(self, module: nn.Module) -> list[Op]:
        """Return the operations that use a module's weight."""
        return [op for op in self.ops if op.module is module]

    def descendants(self, index: int) -> set[int]:
        """Return all operations that depend on one."""
        return _reach(index, lambda here: self.children[here]) - {index}

    def ancestors(self, index: int) -> set[int]:
        """Return an operation and all that it depends on."""
        return _reach(index, lambda here: self.ops[here].parents)

    def gated_by(self, index: int) -> list[Op]:
        """Return the products in which the result of an activation gates something, in order.

        A bounded activation also counts where it reaches the product through reshaping and the like:
        ``h * g(h).view(h.shape)``, as in squeeze-and-excitation. In such a product ``h`` is what is gated, even if it
        is the result of an activation itself.

        Args:
            index: The activation.
        """
        reached = self._moved(index) if self.ops[index].name in _BOUNDED else {index}
        products = dict.fromkeys(child for here in sorted(reached) for child in self.children[here])
        return [
            self.ops[child]
            for child in products
            if self.ops[child].kind == "product"
            and not any(self._gates(other, index) for other in self.ops[child].operands if other not in reached)
        ]

    def _moved(self, index: int) -> set[int]:
        """Return an operation and those that only move its result; in ``gate.expand_as(h)`` that of the gate."""
        return _reach(index, lambda here: [c for c in self.children[here] if self._is_move(c, here)])

    def _is_move(self, index: int, source: int) -> bool:
        return self.ops[index].name in _MOVES and self.ops[index].parents[0] == source

    def _gates(self, index: int, gated: int) -> bool:
        """Whether an operand is a bounded activation that layers compute from the result of another operation."""
        while self.ops[index].name in _MOVES and self.ops[index].parents:
            index = self.ops[index].parents[0]
        if self.ops[index].name not in _BOUNDED:
            return False
        between = self.ancestors(index) & self.descendants(gated)
        return any(self.ops[here].kind == "layer" for here in between)


def _reach(index: int, step: Callable[[int], Sequence[int]]) -> set[int]:
    seen: set[int] = set()
    stack = [index]
    while stack:
        here = stack.pop()
        if here not in seen:
            seen.add(here)
            stack.extend(step(here))
    return seen


LayerCall = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _Recorder(TorchFunctionMode):
    """Records operations; a layer's call goes through ``on_layer``, which returns its output."""

    def __init__(self, model: nn.Module, batch: Any, on_layer: LayerCall | None) -> None:
        super().__init__()
        self.trace = Trace()
        self._on_layer = on_layer
        self._weights = _weights(model)
        self._made: Any = WeakIdKeyDictionary()
        self.trace.add(Op(index=0, kind="input", parents=()))
        for tensor in floating_tensors(batch):
            self._made[tensor] = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function and record what it was given and what it made."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = floating_tensors((args, kwargs))
        module = next((self._weights[id(t)] for t in given if id(t) in self._weights), None)
        linear = module is not None and name in _LINEAR
        if linear and module is not None and self._on_layer is not None:
            result = self._on_layer(module, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        made = floating_tensors(result)
        if name == "__setitem__" and args:
            made = floating_tensors(args[0])
        if made and name != "__get__":
            self._record(name, args, kwargs, given, made, module if linear or name in _NORMS | _ATTENTION else None)
        return result

    def _record(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
        module: nn.Module | None,
    ) -> None:
        plain = name if name.startswith("__") else name.strip("_")
        parents = tuple(dict.fromkeys(self._made[t] for t in given if t in self._made))
        op = Op(
            index=len(self.trace.ops),
            kind=_kind(plain, module),
            parents=parents,
            name=plain,
            operands=self._operands(args) if plain in _SUMS | _PRODUCTS else (),
            module=module,
            activation=_activation(plain, args, kwargs),
        )
        self.trace.add(op)
        for tensor in made:
            self._made[tensor] = op.index

    def enclose(self, first: int, output: Any, activation: theory.Activation) -> None:
        """Let the operations since one count as a single activation: those of a module that its author wrote.

        Args:
            first: Index of the first of them.
            output: What the module gave.
            activation: What it computes.
        """
        end = self._made.get(output) if isinstance(output, torch.Tensor) else None
        for index in range(first, len(self.trace.ops)):
            kind, known = ("activation", activation) if index == end else ("shape", None)
            self.trace.ops[index] = replace(self.trace.ops[index], kind=kind, activation=known)

    def _operands(self, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the operations behind two tensors that are added or multiplied, none if one of them is a constant."""
        pair = [self._made[v] for v in args[:2] if isinstance(v, torch.Tensor) and v in self._made]
        return tuple(pair) if len(pair) == 2 else ()


def _weights(model: nn.Module) -> dict[int, nn.Module]:
    """Return the module behind each weight; call it where parametrized weights are cached.

    Modules that share a weight count as the first of them.
    """
    weights: dict[int, nn.Module] = {}
    for module in model.modules():
        if "weight" in module._parameters or parametrize.is_parametrized(module, "weight"):
            weight = module.weight
            if isinstance(weight, torch.Tensor):
                weights.setdefault(id(weight), module)
        elif isinstance(module, nn.MultiheadAttention):
            for key in ("in_proj_weight", "q_proj_weight"):
                if module._parameters.get(key) is not None:
                    weights.setdefault(id(module._parameters[key]), module)
    return weights


def _kind(name: str, module: nn.Module | None) -> str:
    if name in _NORMS:
        return "norm"
    if module is not None:
        return "layer"
    if name in _ACTIVATIONS:
        return "activation"
    if name in _SUMS or name in _PRODUCTS:
        return "sum" if name in _SUMS else "product"
    return "shape" if name in _SHAPES or name.startswith(("max_pool", "adaptive_max_pool")) else "other"


def _activation(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> theory.Activation | None:
    if name not in _ACTIVATIONS:
        return None
    named = {**dict(zip(_ACTIVATIONS[name], args[1:], strict=False)), **kwargs}
    values = {key: named[key] for key in _ACTIVATIONS[name] if key in named}
    if name == "exp":
        return _EXP
    if "weight" in values:
        values["weight"] = values["weight"].detach()
    try:
        return theory.activation("logsigmoid" if name == "log_sigmoid" else name, **values)
    except (TypeError, ValueError):  # PReLU with a NaN slope: the layer counts as one with no activation behind it
        return None


def call(model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any] | None) -> Any:
    """Call the model on a batch: a mapping as keywords, a tuple or list as arguments, anything else as one argument.

    Raises:
        Exception: What the model raises, with a note on how it was called.
    """
    try:
        if compute_loss is not None:
            return compute_loss(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except Exception as error:
        how = (
            "compute_loss(model, batch)"
            if compute_loss is not None
            else "the model, called with the batch: a mapping as keywords, a tuple as arguments. Where the batch has "
            "targets as well, pass compute_loss, or the inputs only"
        )
        error.add_note(f"raised by {how}")
        raise


def trace(
    model: nn.Module,
    batch: Any,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    *,
    on_layer: LayerCall | None = None,
    seed: int = 0,
) -> Trace:
    """Run one forward pass without gradients and return its operations; buffers, modes and random states are put back.

    Args:
        model: The model; it runs in the mode that it is in.
        batch: See :func:`call`.
        compute_loss: Called as ``compute_loss(model, batch)`` in place of the model.
        on_layer: Called in place of each layer's function as ``on_layer(module, function, args, kwargs)``; returns the
            output.
        seed: Of torch's generators during the pass, so that dropout is the same each time.
    """
    own = custom_activations(model)
    with untouched(model), torch.no_grad(), parametrize.cached():
        torch.manual_seed(seed)
        recorder = _Recorder(model, batch, on_layer)
        with _enclosed(recorder, own), recorder:
            call(model, batch, compute_loss)
    return recorder.trace


@contextlib.contextmanager
def _enclosed(recorder: _Recorder, own: Mapping[nn.Module, theory.Activation]) -> Iterator[None]:
    """Let what runs in activations of the author's own count as one operation each."""
    starts: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        starts.append(len(recorder.trace.ops))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.enclose(starts.pop(), output, own[module])

    handles = [handle for m in own for handle in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
