"""Queries and keys of the usual size: what logits of attention are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from gradguard.errors import UnsupportedModelError
from gradguard.monitors._describe import clean_name
from gradguard.remedies._applied import Applied, tensor_names, transaction
from gradguard.remedies.initialization._draw import normal
from gradguard.remedies.initialization._schemes import refuse_chosen
from gradguard.remedies.initialization._targets import Generator, check_arguments, expand, finish, generator_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["initialize_query_key", "query_key_blocks"]

_NAMED = re.compile(r"(?:^|_)(?:q|k|query|key|queries|keys)(?:_?proj(?:ection)?|_?linear)?$|^(?:wq|wk|to_q|to_k)$")
"""Names of Linear layers that make queries or keys, as in torch, transformers, timm and hand-written code."""

_FUSED = re.compile(r"(?:^|_)qkv(?:_?proj)?$|^(?:in_proj|query_key_value|c_attn|to_qkv|wqkv)$", re.IGNORECASE)
"""Names of Linear layers that make queries, keys and values, in that order, where the output is three inputs wide."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a weight that make queries or keys."""

    name: str
    weight: nn.Parameter
    rows: slice

    @property
    def part(self) -> Tensor:
        return self.weight[self.rows]


def initialize_query_key(
    model: nn.Module,
    *,
    modules: Iterable[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    generator: Generator = None,
) -> Applied:
    """Draw the weights that make queries and keys anew at Xavier's variance, ``2 / (fan_in + fan_out)``.

    Logits are a product of two of these weights: with entries of the usual size, inputs of unit variance give logits
    of order 1 after the division by the root of the head's width, and attention begins spread over all keys. Values,
    output projections and biases are left alone.

    Args:
        model: The model. Found are ``nn.MultiheadAttention`` and Linear layers that are called query, key, q_proj,
            to_k, qkv and the like.
        modules: Names of modules inside which to look; all by default.
        optimizer: Its state for the changed parameters is dropped.
        generator: A CPU generator or a seed; torch's global generator is then left alone.

    Returns:
        What was done; ``.undo()`` puts it back bit for bit.

    Raises:
        ValueError: If a module named is one to leave alone.
        UnsupportedModelError: If nothing in the model makes queries or keys that can be drawn anew.

    Source:
        Glorot and Bengio (2010), AISTATS, equation 16; that logits grow with the norm of the product of the two
        weights: Zhai et al. (2023), ICML, arXiv 2303.06296, theorem 3.1.
    """
    draw = generator_of(generator)
    optimizers = check_arguments(model, optimizer)
    chosen = None if modules is None else set(expand(model, modules))
    blocks: list[_Block] = []
    skipped: dict[str, str] = {}
    for raw, module in model.named_modules():
        if chosen is not None and id(module) not in chosen:
            continue
        for block in query_key_blocks(clean_name(raw), module):
            reason = _why_not(module, block, blocks)
            if reason:
                skipped[block.name] = reason
            else:
                blocks.append(block)
    if not blocks:
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UnsupportedModelError(
            f"query-key-initialization found no weights of queries and keys in this {type(model).__name__}. "
            f"{why or 'No layer is called query, key, q_proj, qkv or the like'}"
        )
    before = tensor_names(model)
    with transaction() as snapshot, torch.no_grad():
        snapshot.keep({id(block.weight): block.weight for block in blocks}.values())
        changes = []
        for block in blocks:
            shape = block.part.shape
            std = math.sqrt(2.0 / sum(shape))
            block.part.copy_(normal(shape, block.weight.dtype, std, draw))
            changes.append(f"{block.name}: weight of std {std:.3g} for queries and keys")
        refuse_chosen(modules, skipped)
        return finish(model, "query-key-initialization", snapshot, optimizers, changes, skipped, before)


def query_key_blocks(name: str, module: nn.Module) -> Iterator[_Block]:
    """Yield the parts of a module's own weights that make queries or keys."""
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        for key in ("q_proj_weight", "k_proj_weight"):
            weight = getattr(module, key, None)
            if weight is not None:
                yield _Block(f"{name}.{key}".lstrip("."), weight, slice(None))
        if module.in_proj_weight is not None:
            for part, first in (("query", 0), ("key", width)):
                whole = f"{name}.in_proj_weight[{part}]".lstrip(".")
                yield _Block(whole, module.in_proj_weight, slice(first, first + width))
    elif isinstance(module, nn.Linear) and not parametrize.is_parametrized(module):
        last = name.rpartition(".")[2]
        if _NAMED.search(last):
            yield _Block(f"{name}.weight", _own(module), slice(None))
        elif _FUSED.search(last) and module.out_features == 3 * module.in_features:
            for part, first in (("query", 0), ("key", module.in_features)):
                yield _Block(f"{name}.weight[{part}]", _own(module), slice(first, first + module.in_features))


def _why_not(module: nn.Module, block: _Block, before: Sequence[_Block]) -> str:
    if parametrize.is_parametrized(module):
        return "it is parametrized; set the parametrization's own parameters"
    if not block.weight.requires_grad:
        return "it is frozen (requires_grad is False)"
    if any(other.weight is block.weight and other.rows == block.rows for other in before):
        return "it is shared with a module before it, which is set once"
    return ""


def _own(module: nn.Linear) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)  # noqa: S101  # parametrized ones do not come here
    return weight
