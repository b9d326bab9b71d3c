"""Transformers: encoders of digits and decoders of text, and what goes wrong in attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clinic.case import Job, healthy, sick
from benchmarks.clinic.data import characters, digits
from benchmarks.clinic.nets_sequence import Attention, Decoder, DigitTransformer
from benchmarks.clinic.tasks import MakeOptimizer, adam, adamw, classify, language, warm_up

__all__ = ["CASES"]


def encoder(
    layers: int, optimizer: MakeOptimizer, *, warm: int = 0, steps: int = 160, **options: Any
) -> Callable[[int], Job]:
    """Return a builder of an encoder on digits, with a warm-up of ``warm`` steps."""

    def build(seed: int) -> Job:
        job = classify(DigitTransformer(layers, **options), digits(), optimizer, seed, size=32, steps=steps)
        if warm:
            job.before_step = warm_up(job.optimizers[0], warm)
        return job

    return build


def torch_encoder(seed: int) -> Job:
    """Torch's own encoder, with its fused attention."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 32)
            self.position = nn.Parameter(torch.randn(8, 32) * 0.02)
            block = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
            self.head = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x.reshape(-1, 8, 8)) + self.position
            logits: Tensor = self.head(self.encoder(tokens).mean(1))
            return logits

    return classify(Wrapped(), digits(), adam(2e-3), seed, size=32, steps=200)


def decoder(optimizer: MakeOptimizer, **options: Any) -> Callable[[int], Job]:
    """Return a builder of a language model on documentation text."""

    def build(seed: int) -> Job:
        shape = {key: options[key] for key in ("layers", "tied", "dropout") if key in options}
        rest = {key: value for key, value in options.items() if key not in shape}
        return language(Decoder(characters()[2], **shape), optimizer, seed, **rest)

    return build


def attentions(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def collapsed(make: Callable[[int], Job], factor: float, layer: int | None = None) -> Callable[[int], Job]:
    """Return a builder whose query and key weights are ``factor`` times too large, in one layer or in all."""

    def build(seed: int) -> Job:
        job = make(seed)
        for index, attention in enumerate(attentions(job.model)):
            if layer is None or index == layer:
                with torch.no_grad():
                    attention.query.weight.mul_(factor)
                    attention.key.weight.mul_(factor)
        return job

    return build


def growing_logits(make: Callable[[int], Job], rate: float) -> Callable[[int], Job]:
    """Return a builder in which queries and keys learn at a rate of their own, so that their products grow."""

    def build(seed: int) -> Job:
        job = make(seed)
        chosen = {
            id(parameter)
            for attention in attentions(job.model)
            for layer in (attention.query, attention.key)
            for parameter in layer.parameters()
        }
        usual = [p for p in job.model.parameters() if id(p) not in chosen]
        fast = [p for p in job.model.parameters() if id(p) in chosen]
        lr = job.optimizers[0].param_groups[0]["lr"]
        groups: list[dict[str, Any]] = [{"params": usual}, {"params": fast, "lr": rate}]
        job.optimizers = (torch.optim.AdamW(groups, lr=lr),)
        return job

    return build


def heavy_batches(make: Callable[[int], Job], factor: float, every: int) -> Callable[[int], Job]:
    """Return a builder in which one batch in so many weighs more: Adam's updates leap at it, and starve after it."""

    def build(seed: int) -> Job:
        job = make(seed)
        usual, now = job.loss, [1.0]

        def begin(step: int) -> None:
            now[0] = factor if (step + 1) % every == 0 else 1.0

        job.loss = lambda model, batch: now[0] * usual(model, batch)
        job.before_step = begin
        return job

    return build


def all_masked(seed: int) -> Job:
    """Rows are padded where they hold no ink; some images are padded altogether."""
    job = encoder(3, adam())(seed)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        rows = x.reshape(-1, 8, 8)
        tokens = model.embed(rows) + model.position[1:]  # type: ignore[operator, index]  # known to this builder
        hidden = torch.zeros(rows.shape[:2], dtype=torch.bool)
        hidden[0] = True
        for block in model.blocks:  # type: ignore[union-attr]  # as above
            tokens = block(tokens, hidden)
        logits: Tensor = model.head(model.norm(tokens).mean(1))  # type: ignore[operator]  # as above
        return F.cross_entropy(logits, y)

    job.loss = loss
    return job


def unscaled(seed: int) -> Job:
    """Attention without 1/sqrt(d), and products of sums: logits ten times too large from the start."""
    job = decoder(adamw(2e-3))(seed)
    for attention in attentions(job.model):
        attention.scale = 300 / math.sqrt(12)
    return job


PRE_LN = encoder(6, adam())
DECODER = decoder(adamw(3e-3))

CASES = (
    healthy("transformer/pre-ln-6-adam", PRE_LN, "biases of keys have a gradient of next to nothing", learns=0.8),
    healthy("transformer/post-ln-4-adam", encoder(4, adam(2e-3), pre_norm=False, warm=30), learns=0.75),
    healthy(
        "transformer/mask-token-adamw",
        encoder(3, adamw(2e-3), mask_token=True),
        "one parameter that takes no part in this task",
        learns=0.8,
    ),
    healthy(
        "transformer/layerscale-dropout-adamw",
        encoder(4, adamw(3e-3), layer_scale=1e-4, dropout=0.1, warm=40, steps=200),
        "LayerScale, dropout and warm-up together",
        learns=0.75,
    ),
    healthy("transformer/torch-encoder-adam", torch_encoder, "fused attention", learns=0.8),
    healthy("transformer/decoder-adamw", DECODER, "documentation text, character by character", learns=0.3),
    healthy(
        "transformer/decoder-clipped-adamw",
        decoder(adamw(3e-3), layers=3, clip_norm=1.0),
        "clipping at 1 at nearly every step, as is usual",
        learns=0.3,
    ),
    healthy(
        "transformer/decoder-tied-dropout-adamw",
        decoder(adamw(3e-3), tied=True, dropout=0.1),
        "embedding and output layer share one matrix",
        learns=0.25,
    ),
    sick(
        "transformer/masked-softmax",
        all_masked,
        "one image of a batch is padded altogether: softmax over nothing but -inf",
        code="GG202",
        culprit=("blocks.0.attention", "blocks.0"),
        twin="transformer/pre-ln-6-adam",
        phase="wiring",
        cure="leave one token visible",
    ),
    sick(
        "transformer/entropy-collapse-one-layer",
        collapsed(DECODER, 30.0, layer=0),
        "queries and keys of one layer are 30 times too large: attention is one-hot",
        code="GG701",
        also=("exploding", "initialization", "saturated"),
        culprit=("blocks.0.attention",),
        twin="transformer/decoder-adamw",
        phase="initialization",
        cure="usual initialization, or QK-norm",
    ),
    sick(
        "transformer/entropy-collapse-all-layers",
        collapsed(encoder(4, adam(2e-3), pre_norm=False, warm=30), 30.0),
        "queries and keys are 30 times too large: attention is one-hot",
        code="GG701",
        also=("exploding", "initialization", "saturated"),
        twin="transformer/post-ln-4-adam",
        phase="initialization",
        cure="usual initialization, or QK-norm",
    ),
    sick(
        "transformer/logits-unscaled",
        unscaled,
        "attention logits three hundred times too large",
        code="GG702",
        twin="transformer/decoder-adamw",
        phase="initialization",
        cure="divide by sqrt(d)",
    ),
    sick(
        "transformer/logit-growth",
        growing_logits(decoder(adamw(3e-3), tied=True, dropout=0.1), 0.3),
        "queries and keys learn a hundred times faster than the rest: logits grow without bound",
        code="GG702",
        also=("learning_rate",),
        twin="transformer/decoder-tied-dropout-adamw",
        cure="one rate for all, or QK-norm",
    ),
    sick(
        "transformer/update-spike-adamw",
        heavy_batches(encoder(3, adamw(2e-3), mask_token=True), 1e4, 40),
        "one batch in forty weighs 10000 times the others: updates leap, as Adam's second moment lags behind",
        code="GG703",
        also=("spike", "learning_rate", "divergence"),
        twin="transformer/mask-token-adamw",
        onset=39,
        cure="clipping, or equal weights",
    ),
    sick(
        "transformer/update-spike-decoder",
        heavy_batches(decoder(adamw(3e-3), layers=3), 1e4, 40),
        "one batch in forty weighs 10000 times the others: updates leap, as Adam's second moment lags behind",
        code="GG703",
        also=("spike", "learning_rate", "divergence"),
        twin="transformer/decoder-clipped-adamw",
        onset=39,
        cure="clipping, or equal weights",
    ),
    sick(
        "transformer/no-warm-up-rate-too-high",
        encoder(4, adamw(0.3), layer_scale=1e-4, dropout=0.1, steps=200),
        "a learning rate a hundred times too high, without warm-up",
        code="GG501",
        also=("divergence",),
        twin="transformer/layerscale-dropout-adamw",
        cure="warm-up and a lower rate",
    ),
)
