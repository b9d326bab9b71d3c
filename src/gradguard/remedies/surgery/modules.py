"""The modules that surgery puts into a model. They are public because pickles of the model name them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BareLSTM", "Normalized", "QKNormAttention", "Residual", "Standardized"]

_FARTHEST = 10.0
"""Deviations beyond which a standardized number is held. Source: VecNormalize of Stable-Baselines3, clip_obs=10. Ours:
a pixel that is dark in nearly all of 64 images lies a hundred deviations out in others, and an ELU net with SGD
diverges of it."""


class _Around(nn.Module):
    """A module around another, for code that still reads the other's attributes.

    What the wrapper does not have itself is read from, and parameters are set on, the module inside, so that
    ``self.fc1.weight`` and ``self.fc1.in_features`` in hand-written code go on working.
    """

    _inner = "layer"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get(self._inner)
            if inner is None or name.startswith("_"):
                raise
            return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get(self._inner)
        if inner is not None and name in inner._parameters:
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)


class Normalized(_Around):
    """A layer and the normalization of its output.

    Attributes:
        layer: The layer, whose parameters are now named ``layer.<name>``.
        norm: The normalization.
        axis: Where the normalization expects the features: ``"as-is"`` gives it the output as it comes, ``"rows"`` as
            ``[examples and positions, features]`` from ``[..., features]``, ``"channels-last"`` with axis 1 moved to
            the end.
    """

    def __init__(
        self, layer: nn.Module, norm: nn.Module, axis: Literal["as-is", "rows", "channels-last"] = "as-is"
    ) -> None:
        """Normalize a layer's output.

        Args:
            layer: Any module that returns one tensor.
            norm: Applied to the output.
            axis: See above.
        """
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.axis = axis
        self.training = layer.training
        norm.train(layer.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``norm(layer(...))``."""
        output: Tensor = self.layer(*args, **kwargs)
        if self.axis == "rows":
            normed: Tensor = self.norm(output.reshape(-1, output.shape[-1]))
            return normed.reshape(output.shape)
        if self.axis == "channels-last":
            normed = self.norm(output.movedim(1, -1))
            return normed.movedim(-1, 1)
        return self.norm(output)  # type: ignore[no-any-return]  # a module's result is Any to a type checker


class Standardized(_Around):
    """A layer that reads standardized data.

    Attributes:
        layer: The layer, whose parameters are now named ``layer.<name>``.
        mean: Subtracted from the input, a buffer that broadcasts over examples (and positions).
        deviation: What the input is divided by then, likewise.
    """

    def __init__(self, layer: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        """Standardize a layer's input.

        Args:
            layer: Any module whose first argument is one tensor.
            mean: Mean per feature.
            deviation: Standard deviation per feature, > 0.
        """
        super().__init__()
        self.layer = layer
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.training = layer.training

    def forward(self, data: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return ``layer((data - mean) / deviation)``, with what lies beyond 10 deviations held there."""
        return self.layer(((data - self.mean) / self.deviation).clamp(-_FARTHEST, _FARTHEST), *args, **kwargs)


class Residual(_Around):
    """A block with a path around it: ``branch * block(x) + gate * skip(x)``.

    Attributes:
        block: The block, whose parameters are now named ``block.<name>``.
        skip: The path around it: the identity, or a projection where shapes differ.
        gate: Learnt scalar on the path around, shape ``[1]``; ``None`` for 1.
        branch: Learnt scalar on the block, shape ``[1]``; ``None`` for 1.
    """

    _inner = "block"

    def __init__(
        self, block: nn.Module, skip: nn.Module, *, gate: float | None = None, branch: float | None = None
    ) -> None:
        """Put a path around a block, in its dtype and on its device.

        Args:
            block: Any module that takes and returns one tensor, and leaves its input as it is.
            skip: Makes of the input what is added to the block's output.
            gate: Scalar on the path around to start from.
            branch: Scalar on the block to start from.
        """
        super().__init__()
        self.block = block
        self.skip = skip
        own = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(0))
        for name, value in (("gate", gate), ("branch", branch)):
            scalar = None if value is None else torch.full((1,), value, dtype=own.dtype, device=own.device)
            self.register_parameter(name, None if scalar is None else nn.Parameter(scalar))
        self.training = block.training
        skip.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output and what goes around it."""
        around: Tensor = self.skip(x)
        output: Tensor = self.block(x)
        if self.gate is not None:
            around = around * self.gate
        if self.branch is not None:
            output = output * self.branch
        return output + around


class BareLSTM(nn.LSTM):
    """An LSTM with the interface of an RNN: the state is one tensor, the hidden state.

    The cell state starts at 0 in each call. A state that is handed from one call to the next carries the hidden part
    alone; where that matters (truncated backpropagation through time), use a GRU, which has no other.
    """

    def forward(  # type: ignore[override]  # the interface is the RNN's
        self,
        input: Tensor | PackedSequence,  # noqa: A002  # torch's own name
        hx: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Return output and last hidden state, of the shapes that :class:`torch.nn.RNN` gives them."""
        state = None if hx is None else (hx, torch.zeros_like(hx))
        output, (hidden, _) = super().forward(input, state)
        return output, hidden


class QKNormAttention(nn.MultiheadAttention):
    """Multi-head attention that normalizes queries and keys per head before their product.

    Takes and returns what :class:`torch.nn.MultiheadAttention` does, and has its parameters under the same names.

    Attributes:
        q_norm: Normalization of the queries over the head's size.
        k_norm: Normalization of the keys.

    Source:
        Dehghani et al. (2023), "Scaling Vision Transformers to 22 Billion Parameters", ICML, arXiv 2302.05442,
        section 2: LayerNorm on queries and keys, per head.
    """

    q_norm: nn.Module
    k_norm: nn.Module
    separate: bool

    @classmethod
    def around(cls, attention: nn.MultiheadAttention, kind: Literal["layer", "rms"] = "layer") -> QKNormAttention:
        """Return an attention with the very parameters, hooks and options of another.

        Args:
            attention: The attention to take over; it is not changed.
            kind: ``"layer"`` or ``"rms"``.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        for key, value in attention.__dict__.items():
            new.__dict__[key] = value.copy() if isinstance(value, dict) else value
        own = attention.out_proj.weight
        for name in ("q_norm", "k_norm"):
            norm = nn.RMSNorm(new.head_dim) if kind == "rms" else nn.LayerNorm(new.head_dim, bias=False)
            new.add_module(name, norm.to(device=own.device, dtype=own.dtype).train(attention.training))
        # Else torch's transformer layers would compute the attention themselves from the weights in evaluation mode.
        new.separate = not attention._qkv_same_embed_dim  # noqa: SLF001  # torch's own flag, which its layers ask for
        new._qkv_same_embed_dim = False  # noqa: SLF001  # as above
        return new

    def forward(  # torch's signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002  # torch's signature
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of :meth:`torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._heads(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = torch.softmax(logits if mask is None else logits + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split into heads, each ``[batch, heads, length, size]``; normalize queries and keys."""
        if self.separate:
            parts: list[Tensor] = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            parts = list(self.in_proj_weight.chunk(3))
        in_bias: Tensor | None = self._parameters["in_proj_bias"]
        biases = [None] * 3 if in_bias is None else list(in_bias.chunk(3))
        made = [
            F.linear(given, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for given, weight, bias in zip((query, key, value), parts, biases, strict=True)
        ]
        return self.q_norm(made[0]), self.k_norm(made[1]), made[2]

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Return what to add to the logits, ``[batch, heads, length, keys]`` or broadcast to it."""
        mask = None if attn_mask is None else _additive(attn_mask, q)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
    return mask.to(like.dtype)
