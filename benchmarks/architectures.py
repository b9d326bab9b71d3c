"""Real architectures with random weights: does gradguard crash on them, and does it cry wolf?

Builds small versions of the model families of ``transformers`` and torch's own modules, checks each before the first
step and watches 20 training steps (AdamW, random tokens or pixels). Every finding at WARNING or above is listed::

    pip install transformers
    python -m benchmarks.architectures [PATTERN ...]
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import gradguard

SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "intermediate_size": 64,
    "d_ff": 64,
    "d_kv": 8,
    "head_dim": 8,
    "ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "hidden_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 64,
    "patch_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "rotary_dim": 4,
    "attention_window": 8,
}

CAUSAL = (
    "GPT2 GPTNeoX GPTNeo GPTJ OPT Bloom Llama Mistral Mixtral Qwen2 Qwen3 Gemma Gemma2 Phi Phi3 Falcon StableLm "
    "Olmo Olmo2 Cohere Starcoder2 CodeGen XGLM MptForCausalLM Persimmon Granite BioGpt CTRL Mamba Qwen2Moe SmolLM3 "
    "Helium Glm"
)
MASKED = (
    "Bert Roberta DistilBert Albert Electra MobileBert Deberta DebertaV2 ConvBert MPNet XLMRoberta Camembert LayoutLM "
    "RoFormer SqueezeBert YosoForMaskedLM Nystromformer MegatronBert ModernBert Ernie IBert RemBert FNet"
)
VISION = "ViT DeiT Beit Swin ConvNext ConvNextV2 ResNet RegNet MobileNetV2 PoolFormer Dinov2 Levit"
SEQ2SEQ = "T5 Bart Pegasus Marian MT5 Blenderbot PLBart MBart"


@dataclass(frozen=True)
class Subject:
    """A model with a batch and a loss."""

    name: str
    build: Callable[[], tuple[nn.Module, Any, Callable[[Any, Any], torch.Tensor]]]


def model_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def small_config(kind: type) -> Any:
    """Make a small configuration: known sizes where the class has them."""
    config = kind()
    known = {
        name: value
        for name, value in SMALL.items()
        if isinstance(getattr(config, name, None), (int, type(None)))
        and hasattr(config, name)
        and not isinstance(getattr(kind, name, None), property)
    }
    if hasattr(config, "attention_types"):  # GPT-Neo states the kind of attention of every layer
        known["attention_types"] = [[["global", "local"], 2]]
    if kind.__name__ in {"LevitConfig", "SwinConfig"}:  # sizes of a pyramid, which must agree with each other
        known = {}
    made = kind(**known)
    if getattr(made, "is_encoder_decoder", False):
        made.decoder_start_token_id = 1
    return made


def family(name: str, head: str, batch: Callable[[Any], dict[str, torch.Tensor]]) -> Subject:
    def build() -> tuple[nn.Module, Any, Callable[[Any, Any], torch.Tensor]]:
        import transformers

        stem = name.removesuffix(head)
        config = small_config(getattr(transformers, f"{stem}Config"))
        model = getattr(transformers, f"{stem}{head}")(config)
        return model, batch(config), model_loss

    return Subject(f"{name.removesuffix(head)}{head}", build)


def tokens(_config: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (4, 32))
    return {"input_ids": ids, "labels": ids}


def pixels(config: Any) -> dict[str, torch.Tensor]:
    size = getattr(config, "image_size", 64)
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.randint(0, 2, (4,))}


def own_modules() -> Iterator[Subject]:
    """Torch's own building blocks."""

    def regression(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], tuple[Any, Any, Any]]:
        def loss(net: Any, x: torch.Tensor) -> torch.Tensor:
            out = net(x)
            return (out[0] if isinstance(out, tuple) else out).square().mean()

        return lambda: (model, torch.randn(shape), loss)

    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    yield Subject("torch TransformerEncoder", regression(nn.TransformerEncoder(layer, 6), (4, 16, 32)))
    yield Subject("torch LSTM", regression(nn.LSTM(16, 32, 3, batch_first=True, dropout=0.1), (4, 20, 16)))
    yield Subject("torch GRU", regression(nn.GRU(16, 32, 2, bidirectional=True), (20, 4, 16)))
    yield Subject("torch RNN", regression(nn.RNN(16, 32), (12, 4, 16)))

    class Seq2Seq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Feed the same sequence to both sides."""
            return self.net(x, x)

    yield Subject("torch Transformer", regression(Seq2Seq(), (4, 10, 32)))


def subjects() -> Iterator[Subject]:
    yield from own_modules()
    for names, head, batch in (
        (CAUSAL, "ForCausalLM", tokens),
        (MASKED, "ForMaskedLM", tokens),
        (VISION, "ForImageClassification", pixels),
        (SEQ2SEQ, "ForConditionalGeneration", tokens),
    ):
        for name in names.split():
            special = {"GPT2": "LMHeadModel", "CTRL": "LMHeadModel", "Marian": "MTModel"}.get(name, head)
            yield family(name, special, batch)


@dataclass(frozen=True)
class Outcome:
    """What was said of one model."""

    name: str
    checked: str
    watched: str
    detail: str = ""


def describe(diagnosis: gradguard.Diagnosis) -> tuple[str, str]:
    standing = [f for f in diagnosis.findings if f.standing and f.severity >= gradguard.Severity.WARNING]
    lines = "\n".join(f"{f.code} {f.severity.name} {f.layer}: {f.message}" for f in standing)
    return {True: "healthy", False: " ".join(f.code for f in standing), None: "no verdict"}[diagnosis.healthy], lines


def examine(subject: Subject) -> Outcome:
    torch.manual_seed(0)
    try:
        model, batch, loss = subject.build()
    except Exception as error:  # noqa: BLE001  # a family that cannot be built this small is no fault of gradguard
        return Outcome(subject.name, "not built", "", f"{type(error).__name__}: {error}"[:120])
    try:
        model.train()
        loss(model, batch)
    except Exception as error:  # noqa: BLE001  # as above
        return Outcome(subject.name, "not run", "", f"{type(error).__name__}: {error}"[:120])
    try:
        checked, first = describe(gradguard.check(model, batch, loss))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with gradguard.watch(model, optimizer, on_error="raise", on_finding="silent") as guard:
            for _ in range(21):
                optimizer.zero_grad()
                value = loss(model, batch)
                value.backward()
                guard.record(loss=value)
                optimizer.step()
            watched, second = describe(guard.diagnose())
    except Exception:  # noqa: BLE001  # reported as what it is
        return Outcome(subject.name, "CRASH", "", traceback.format_exc(limit=-3))
    return Outcome(subject.name, checked, watched, "\n".join(part for part in (first, second) if part))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    patterns = [pattern.lower() for pattern in sys.argv[1:]]
    table = Table("model", "check", "after 21 steps", "detail")
    counts: dict[str, int] = {}
    for subject in subjects():
        if patterns and not any(pattern in subject.name.lower() for pattern in patterns):
            continue
        outcome = examine(subject)
        table.add_row(outcome.name, outcome.checked, outcome.watched, outcome.detail)
        counts[outcome.checked] = counts.get(outcome.checked, 0) + 1
    console = Console(width=150)
    console.print(table)
    console.print("check: ", counts)


if __name__ == "__main__":
    main()
