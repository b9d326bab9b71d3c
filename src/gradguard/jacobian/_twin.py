"""A copy of a model for probing, and one part of it as a function of one tensor."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradguard.errors import UnsupportedModelError
from gradguard.monitors._trees import tensors

__all__ = ["Call", "Part", "captured", "differentiable_kernels", "twin_of"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy in the same modes, with constant parameters, without gradients, and without the hooks of others.

    Hooks of torch itself (spectral and weight normalization) stay: they are part of the function.

    Raises:
        UnsupportedModelError: If the model is scripted, has lazy parameters without a shape, or refuses to be copied.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("the model is scripted: pass the module that it was made from")
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name, None)
            if hooks:
                memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if _is_torchs(hook))
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # what a forward pass left behind cannot be copied
                memo[id(value)] = value.detach()
    for parameter in model.parameters():
        if nn.parameter.is_lazy(parameter):
            raise UnsupportedModelError("the model has lazy parameters without a shape yet: run one forward pass first")
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({error}), and the probe works on a copy, to leave no trace in "
            "the model. Name a block that can be: stretch(model.block, inputs)"
        ) from error


def _is_torchs(hook: object) -> bool:
    owner = getattr(hook, "__self__", hook)
    home = getattr(hook, "__module__", None) or type(owner).__module__
    return str(home).partition(".")[0] == "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def captured(module: nn.Module, run: Callable[[], Any]) -> Call | None:
    """Run something, and return what a module was first called with meanwhile, ``None`` where it was not called."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append(Call(args=_mapped(args, _detached), kwargs=_mapped(kwargs, _detached)))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls[0] if calls else None


class Part:
    """A module called with the same arguments but for one tensor, as a pure function of that tensor.

    Buffers are copied and random states are put back at each evaluation, so that dropout has one mask and running
    statistics never move. What is varied is the first floating-point tensor among the arguments; where there is none,
    the output of the first embedding called.
    """

    def __init__(self, module: nn.Module, call: Call, dtype: torch.dtype | None) -> None:
        """Prepare.

        Args:
            module: A module of a twin; it is converted to ``dtype``.
            call: Arguments.
            dtype: Floating-point type to compute in; ``None`` for the module's own.

        Raises:
            UnsupportedModelError: If nothing among the arguments can be varied.
        """
        self._module = module if dtype is None else module.to(dtype)
        self._dtype = dtype
        self._args, self._kwargs = (_mapped(part, self._converted) for part in (call.args, call.kwargs))
        self._states = _random_states()
        self._embedding: nn.Module | None = None
        self._pending: Tensor | None = None
        self.source = "the input"
        given = next((t for t in tensors((self._args, self._kwargs)) if t.is_floating_point() and t.numel()), None)
        if given is None:
            given = self._embedded()
        self._given = given
        self.point = given.detach().clone()

    def _converted(self, tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        return own.to(self._dtype) if self._dtype is not None and own.is_floating_point() else own

    def _embedded(self) -> Tensor:
        """Return the output of the first embedding called, which is varied from now on."""
        found: list[tuple[str, nn.Module, Tensor]] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, _: Any, output: Any) -> None:
                if not found and isinstance(output, Tensor):
                    found.append((name, module, output.detach().clone()))

            return hook

        kinds = (nn.Embedding, nn.EmbeddingBag)
        named = [(name, module) for name, module in self._module.named_modules() if isinstance(module, kinds)]
        handles = [module.register_forward_hook(note(name)) for name, module in named]
        try:
            with torch.no_grad():
                self._result(self._args, self._kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise UnsupportedModelError(
                "the Jacobian needs a floating-point input: none of the arguments is a floating-point tensor, and no "
                "nn.Embedding was called. Name a block that is given one: stretch(model, inputs, block='...')"
            )
        name, self._embedding, output = found[0]
        self.source = f"the output of {name}" if name else "the output"
        self._embedding.register_forward_hook(self._replace_embedding)
        return output

    def _replace_embedding(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        replacement, self._pending = self._pending, None
        return output if replacement is None else replacement

    def __call__(self, point: Tensor) -> Tensor:
        """Evaluate the part; returns its first floating-point output."""
        own = point.clone()  # an operation in place must not meet the caller's tensor
        if self._embedding is not None:
            self._pending = own
            return self._result(self._args, self._kwargs)
        args, kwargs = (_mapped(part, lambda t: own if t is self._given else t.clone()) for part in self._arguments)
        return self._result(args, kwargs)

    @property
    def _arguments(self) -> tuple[Any, Any]:
        return self._args, self._kwargs

    def _result(self, args: Any, kwargs: Any) -> Tensor:
        _put_back(self._states)
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        output = torch.func.functional_call(self._module, buffers, args, dict(kwargs))
        found = next((t for t in tensors(_main(output)) if t.is_floating_point()), None)
        if found is None:
            raise UnsupportedModelError("the output holds no floating-point tensor, so that it has no Jacobian")
        return found


def _main(output: Any) -> Any:
    """Return what a model predicts, where its output names it; losses and hidden states come beside it."""
    return output["logits"] if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor) else output


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested structure of tuples, lists, mappings and dataclasses with each tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        items = [_mapped(item, function) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, list):
        return [_mapped(item, function) for item in tree]
    if isinstance(tree, Mapping):
        mapped = {key: _mapped(item, function) for key, item in tree.items()}
        return mapped if type(tree) is dict else _rebuilt(tree, mapped)
    if is_dataclass(tree) and not isinstance(tree, type) and all(f.init for f in fields(tree)):
        return replace(tree, **{f.name: _mapped(getattr(tree, f.name), function) for f in fields(tree)})
    return tree


def _rebuilt(tree: Mapping[Any, Any], mapped: dict[Any, Any]) -> Any:
    twin = copy.copy(tree)
    if hasattr(twin, "update"):
        twin.update(mapped)
        return twin
    return mapped


_States = tuple[Any, Any, Tensor, list[Tensor]]


def _random_states() -> _States:
    cuda = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())] if _cuda_runs() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002  # the global state is meant


def _put_back(states: _States) -> None:
    python, numpy, own, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002  # as above
    torch.set_rng_state(own)
    for index, state in enumerate(cuda):
        torch.cuda.set_rng_state(state, index)


def _cuda_runs() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


@contextlib.contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Use kernels that can be differentiated forward and twice: nothing fused for attention or recurrence."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
