"""Normalized queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.nn.utils import parametrize

from gradguard.errors import UnsupportedModelError
from gradguard.monitors._describe import clean_name, describe
from gradguard.remedies._applied import Applied
from gradguard.remedies.surgery._ledger import Ledger
from gradguard.remedies.surgery._operate import Edit, checked, operate
from gradguard.remedies.surgery._survey import chosen, survey
from gradguard.remedies.surgery.modules import QKNormAttention

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["add_qk_norm"]


def add_qk_norm(  # all are keywords with defaults
    model: nn.Module,
    kind: Literal["layer", "rms"] = "layer",
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    dry_run: bool = False,
) -> Applied:
    """Normalize queries and keys, per head, in each ``nn.MultiheadAttention``, in place.

    The logits are then bounded by the root of the head's size times the learnt scales, whatever the weights become.
    All weights stay, under their names; what is computed changes. torch's fused path for evaluation, which reads the
    weights directly, is no longer taken. Attention written by hand cannot be rewritten from outside; with a batch
    ``skipped`` says where it is.

    Args:
        model: The model, changed in place.
        kind: ``"layer"`` for LayerNorm without shift, ``"rms"`` for RMSNorm.
        batch: A batch to run once afterwards, so that code which cannot bear the change fails at once.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        modules: Names of the modules to change; ``None`` for all.
        optimizer: The optimizer or optimizers; the scales join the group of the attention's biases, or weights.
        dry_run: Say what would be done and change nothing.

    Returns:
        What was done; ``.undo()`` puts everything back.

    Raises:
        ValueError: If an argument is unknown.
        UnsupportedModelError: If there is nothing to change; the message says what stands in the way.

    Source:
        Dehghani et al. (2023), "Scaling Vision Transformers to 22 Billion Parameters", ICML, arXiv 2302.05442, section
        2; Henry et al. (2020), "Query-Key Normalization for Transformers", EMNLP Findings, arXiv 2010.04245.
    """
    if kind not in {"layer", "rms"}:
        raise ValueError(f"kind must be one of layer, rms, got {kind!r}")
    optimizers = checked(model, optimizer)
    named = chosen(model, modules)
    skipped = {} if batch is None else _by_hand(model, batch, compute_loss)
    edits: list[Edit] = []
    for raw, module in model.named_modules():
        name = clean_name(raw)
        if named is not None and all(module is not other for other in named.values()):
            continue
        if not isinstance(module, nn.MultiheadAttention):
            if named is not None:
                raise UnsupportedModelError(
                    f"{name} is {type(module).__name__}, not nn.MultiheadAttention: its code cannot be rewritten from "
                    "outside. Normalize q and k there, before their product"
                )
            continue
        reason = _why_not(model, module)
        if reason is not None:
            skipped[name] = reason
            continue
        title = "LayerNorm" if kind == "layer" else "RMSNorm"
        words = f"{name}: {title} {module.head_dim} on queries and keys of {describe(module).kind}"
        edits.append(Edit(words=words, make=partial(_put, model, module, kind)))
    return operate(
        "qk-norm", model, optimizers, edits, skipped, dry_run=dry_run, batch=batch, compute_loss=compute_loss
    )


def _why_not(model: nn.Module, module: nn.MultiheadAttention) -> str | None:
    if module is model:
        raise UnsupportedModelError(
            "the model is itself the MultiheadAttention and cannot be replaced in place. Put it into a module"
        )
    if isinstance(module, QKNormAttention):
        return "its queries and keys are normalized already"
    if parametrize.is_parametrized(module):
        return "its weights are parametrized"
    if type(module) is not nn.MultiheadAttention:
        return f"it is a {type(module).__name__} with code of its own"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv or add_zero_attn), which have no norm to be put behind"
    if not any(p.requires_grad for p in module.parameters()):
        return "it is frozen (requires_grad is False)"
    return None


def _by_hand(model: nn.Module, batch: Any, compute_loss: Callable[[Any, Any], Any] | None) -> dict[str, str]:
    found = survey(model, batch, compute_loss)
    inside = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}
    return {
        clean_name(f"{name}.forward".lstrip(".")): "attention written by hand; normalize q and k there, before their "
        "product"
        for name, module in model.named_modules()
        if id(module) not in inside
        and any(
            owner is module and function == "scaled_dot_product_attention" for owner, function in found.owners.values()
        )
    }


def _put(model: nn.Module, module: nn.MultiheadAttention, kind: Literal["layer", "rms"], kept: Ledger) -> nn.Module:
    new = QKNormAttention.around(module, kind)
    kept.replace(module, new)
    kept.train_beside(new, module)
    for outer in model.modules():
        # It would turn padded batches into nested tensors, which only its fused path can read.
        if isinstance(outer, nn.TransformerEncoder) and outer.use_nested_tensor:
            kept.set_attribute(outer, "use_nested_tensor", value=False)
    return new
