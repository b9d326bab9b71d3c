"""Residual branches that start as nothing, or nearly so: Fixup, SkipInit, ReZero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard.errors import UnsupportedModelError
from gradguard.monitors._describe import clean_name
from gradguard.remedies._applied import Applied, Snapshot, tensor_names, transaction
from gradguard.remedies.initialization._branches import Branch, branches
from gradguard.remedies.initialization._draw import fans, normal
from gradguard.remedies.initialization._following import following_by_trace
from gradguard.remedies.initialization._gain import stack_gain
from gradguard.remedies.initialization._targets import (
    Generator,
    check_arguments,
    finish,
    generator_of,
    layers_of,
    made_weight,
    module_tensors,
    set_weight,
    zero_bias,
    zeroed,
)
from gradguard.remedies.initialization._trace import Trace, trace

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["ScaledBranch", "fixup", "rezero", "skip_init"]


class ScaledBranch(nn.Module):
    """A module whose output is multiplied by a learnt scalar.

    Attributes:
        module: The module, whose parameters are now named ``module.<name>``.
        alpha: The scalar, shape ``[1]``.
    """

    def __init__(self, module: nn.Module, alpha: float = 0.0) -> None:
        """Scale a module, in its dtype and on its device.

        Args:
            module: Any module that returns one tensor.
            alpha: Scalar to start from.
        """
        super().__init__()
        self.module = module
        own = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        self.alpha = nn.Parameter(torch.full((1,), alpha, dtype=own.dtype, device=own.device))
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``alpha * module(...)``."""
        output: Tensor = self.module(*args, **kwargs)
        return output * self.alpha


def skip_init(
    model: nn.Module,
    batch: Any = None,
    *,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Applied:
    """Multiply each residual branch by a learnt scalar that starts at 0, so that every block starts as the identity.

    The last layer of each branch (or the normalization behind it) is wrapped in a :class:`ScaledBranch`; no weight
    changes. Branches are found by one forward pass on the batch, or named. The scalar joins the parameter group of the
    wrapped layer in the optimizer, and takes its learning rate and weight decay.

    Args:
        model: The model, changed in place.
        batch: A batch to run once: a mapping is passed as keywords, a tuple or list as arguments.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        modules: Names of the modules to scale, each of which returns one tensor that is added to a shortcut; in place
            of those found.
        optimizer: The optimizer that is to train the scalars.

    Returns:
        What was done, with the new names of the wrapped layers' parameters; ``.undo()`` puts it back.

    Raises:
        ValueError: If neither batch nor modules are given, or a name is unknown.
        UnsupportedModelError: If no branch can be scaled; the message says why.

    Source:
        De and Smith (2020), "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep
        Networks", NeurIPS, arXiv 2002.10444, section 4.
    """
    return _scale("skip-init", model, batch, compute_loss, modules, optimizer)


def rezero(
    model: nn.Module,
    batch: Any = None,
    *,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Applied:
    """Multiply each residual branch by a learnt scalar that starts at 0: ``x + alpha f(x)``.

    It is what :func:`skip_init` does, under the name by which it is known for transformers and fully connected nets;
    arguments, results and errors are the same. Layer normalization, which the paper leaves out as well, stays.

    Source:
        Bachlechner et al. (2021), "ReZero is All You Need: Fast Convergence at Large Depth", UAI, arXiv 2003.04887.
    """
    return _scale("rezero", model, batch, compute_loss, modules, optimizer)


def fixup(
    model: nn.Module,
    batch: Any,
    *,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    multiplier: bool = False,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    generator: Generator = None,
) -> Applied:
    """Initialise a residual network without normalization so that it can be trained at any depth.

    Rule 1: the output layer and the last layer of each branch become 0. Rule 2: every other layer is drawn with
    variance ``gain^2 / fan_in``, those on branches times ``L^(-1 / (2m - 2))`` with L branches and m layers on the
    branch. Biases become 0. Rule 3, a learnt multiplier of 1 per branch, is added on request; biases that a layer lacks
    are not.

    Args:
        model: The model, changed in place.
        batch: A batch to run once, by which branches and activations are found: a mapping is passed as keywords, a
            tuple or list as arguments.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        multiplier: Whether to wrap the last layer of each branch in a :class:`ScaledBranch` that starts at 1.
        optimizer: Its state for the changed parameters is dropped; it gets the multipliers.
        generator: A CPU generator or a seed; torch's global generator is then left alone.

    Returns:
        What was done; ``.undo()`` puts it back.

    Raises:
        UnsupportedModelError: If there is no residual branch, one has a normalization on it, or one does not end in a
            layer whose weight can be set to 0.

    Source:
        Zhang, Dauphin, Ma (2019), "Fixup Initialization: Residual Learning Without Normalization", ICLR, arXiv
        1901.09321, section 3.
    """
    optimizers = check_arguments(model, optimizer)
    draw = generator_of(generator)
    found = trace(model, batch, compute_loss)
    blocks = branches(found)
    layers, skipped = layers_of(model, None)
    free = {id(module): name for name, module in layers}
    _check_fixup(model, blocks, free)
    following = following_by_trace(found, layers)
    skipped.update({name: "it did not run on the batch" for name, _ in layers if name not in following})
    zeros = {id(block.last) for block in blocks} | _outputs(found)
    scales = {
        id(layer): len(blocks) ** (-1.0 / (2 * block.depth - 2))
        for block in blocks
        for layer in block.layers
        if block.depth > 1
    }
    names_before = tensor_names(model)
    changes = []
    with transaction() as snapshot:
        for name, module in layers:
            if name not in following:
                continue
            behind = following[name].activation
            gain = 1.0 if behind is None else stack_gain(behind, 1)
            std = 0.0 if id(module) in zeros else gain * scales.get(id(module), 1.0)
            reason = _draw(module, std, draw, snapshot)
            if reason is None:
                what = f"of gain {std:.3g}" if std else "zero"
                changes.append(f"{name}: weight {what}{_on_branch(module, scales, len(blocks), std)}{zeroed(module)}")
            elif id(module) in zeros:
                raise UnsupportedModelError(f"fixup must set the weight of {name} to 0, but {reason}")
            else:
                skipped[name] = reason
        if multiplier:
            changes += [
                _wrap(model, snapshot, optimizers, block.last, 1.0) for block in blocks if block.last is not None
            ]
            _run_again(model, batch, compute_loss)
        return finish(model, "fixup", snapshot, optimizers, changes, skipped, names_before)


def _on_branch(module: nn.Module, scales: dict[int, float], count: int, std: float) -> str:
    return f" (on one of {count} residual branches)" if std and id(module) in scales else ""


def _check_fixup(model: nn.Module, blocks: Sequence[Branch], free: dict[int, str]) -> None:
    if not blocks:
        raise UnsupportedModelError(
            f"fixup found no residual branch in this {type(model).__name__}: on the batch there ran no sum of a path "
            "with layers and a shorter one from the same origin"
        )
    for block in blocks:
        where = free.get(id(block.layers[0]), type(block.layers[0]).__name__)
        if block.norms:
            raise UnsupportedModelError(
                f"fixup replaces normalization, and the branch of {where} has {block.norms} of them. Use skip_init, or "
                "take the normalization out first"
            )
        if block.obstacle is not None:
            raise UnsupportedModelError(f"fixup cannot zero the branch of {where}: {block.obstacle}")
        if id(block.last) not in free:
            raise UnsupportedModelError(
                f"fixup must set the last layer of the branch of {where} to 0, and that is frozen, tied or neither "
                "Linear nor convolution"
            )


def _outputs(found: Trace) -> set[int]:
    """Return the layers behind which no further layer runs."""
    ids = set()
    leading = {index for op in found.ops if op.kind == "layer" for p in op.parents for index in found.ancestors(p)}
    for op in found.ops:
        if op.kind == "layer" and op.index not in leading:
            ids.add(id(op.module))
    return ids


def _draw(module: nn.Module, gain: float, draw: torch.Generator | None, snapshot: Snapshot) -> str | None:
    old = made_weight(module)
    fan_in, _ = fans(module, old.shape)
    value = normal(old.shape, old.dtype, gain / math.sqrt(fan_in), draw) if gain else torch.zeros_like(old)
    snapshot.keep(module_tensors(module))
    reason = set_weight(module, value)
    if reason is None:
        zero_bias(module)
    return reason


def _scale(
    remedy: str,
    model: nn.Module,
    batch: Any,
    compute_loss: Callable[[Any, Any], Any] | None,
    modules: Iterable[str] | None,
    optimizer: Optimizer | Sequence[Optimizer] | None,
) -> Applied:
    if batch is None and modules is None:
        raise ValueError(f"{remedy} finds residual branches on a batch: pass batch=, or name the modules with modules=")
    optimizers = check_arguments(model, optimizer)
    skipped: dict[str, str] = {}
    if modules is not None:
        targets = _named(model, modules)
    else:
        targets = _found(model, branches(trace(model, batch, compute_loss)), skipped)
    names_before = tensor_names(model)
    with transaction() as snapshot:
        changes = [_wrap(model, snapshot, optimizers, target, 0.0) for target in targets]
        if batch is not None:
            _run_again(model, batch, compute_loss)
        return finish(model, remedy, snapshot, optimizers, changes, skipped, names_before)


def _run_again(model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any] | None) -> None:
    """Run the changed model once, so that code that cannot bear the change fails here and not in training."""
    trace(model, batch, compute_loss)


def _named(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    known = {clean_name(name): module for name, module in model.named_modules() if name}
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in known:
            raise ValueError(f"modules names {name!r}, and the {type(model).__name__} has no such module inside it")
    return [known[name] for name in chosen]


def _found(model: nn.Module, blocks: Sequence[Branch], skipped: dict[str, str]) -> list[nn.Module]:
    names = {id(module): clean_name(name) for name, module in model.named_modules()}
    inner = {
        id(child)
        for module in model.modules()
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention))
        for child in module.modules()
    }
    scaled = {id(module.module) for module in model.modules() if isinstance(module, ScaledBranch)}
    targets: list[nn.Module] = []
    for block in blocks:
        name = names.get(id(block.last if block.last is not None else next(iter(block.layers), None)), "a branch")
        if block.obstacle is not None:
            skipped[name] = block.obstacle
        elif id(block.last) in inner:
            skipped[name] = "torch's transformer and attention modules read its weight directly, past any scalar"
        elif id(block.last) in scaled:
            skipped[name] = "it is scaled already"
        elif block.last is not None and not any(block.last is target for target in targets):
            targets.append(block.last)
    return targets


def _wrap(
    model: nn.Module, snapshot: Snapshot, optimizers: Sequence[Optimizer], target: nn.Module, alpha: float
) -> str:
    """Wrap a module wherever it is registered, and say so."""
    wrapper = ScaledBranch(target, alpha)
    places = [
        (clean_name(f"{name}.{key}".lstrip(".")), parent, key)
        for name, parent in model.named_modules(remove_duplicate=False)
        for key, child in parent._modules.items()
        if child is target
    ]
    for _, parent, key in places:
        snapshot.replace_child(parent, key, wrapper)
    beside = next((p for p in target.parameters() if p.requires_grad), None)
    if beside is not None:
        snapshot.add_parameter(optimizers, wrapper.alpha, beside)
    return f"{places[0][0]}: its output is multiplied by a learnt scalar that starts at {alpha:g}"
