"""Attention: entropy and logits are those of attention written out, wherever it runs, and nobody notices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradguard
from gradguard.monitors import SignalMonitor
from gradguard.monitors._hooks import top_function_mode
from gradguard.monitors._reduce import Readback
from gradguard.monitors.attention import _Watch
from tests.driving import count_hooks, observe, reraise
from tests.models import TransformerClassifier, classification_loss, digit_batch, mlp

STATISTICS = ("attention_entropy", "attention_entropy_min", "attention_logit_max")
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
PADDING = torch.zeros(2, 6, dtype=torch.bool).index_fill(1, torch.tensor([4, 5]), value=True)


class Handmade(nn.Module):
    """Attention as a user writes it: fused, or product, mask and softmax in one of several spellings."""

    def __init__(self, kind: str, *, heads: int = 4, key_heads: int = 4, scale: float | None = None) -> None:
        super().__init__()
        self.kind, self.heads, self.key_heads = kind, heads, key_heads
        self.scale = 1 / math.sqrt(4) if scale is None else scale
        self.q, self.k, self.v = nn.Linear(16, 4 * heads), nn.Linear(16, 4 * key_heads), nn.Linear(16, 4 * key_heads)
        self.out = nn.Linear(4 * heads, 16)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, shape ``[batch, heads, length, 4]``."""
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.parts(x)
        if self.kind == "causal":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.key_heads)
        elif self.kind == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        else:
            logits = q @ k.transpose(-1, -2) * self.scale
            logits = logits if mask is None else logits + mask
            weights = {
                "F": lambda: F.softmax(logits, dim=-1, dtype=torch.float32),
                "torch": lambda: torch.softmax(logits, -1),
                "method": lambda: logits.softmax(3),
                "module": lambda: nn.Softmax(dim=-1)(logits),
            }[self.kind]()
            mixed = weights @ v
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


def expected(logits: Tensor, hidden: Tensor | None = None) -> list[float]:
    """Return mean entropy, that of the lowest head and the largest logit, row by row, by the definition."""
    logits = logits.detach()
    batch, heads, length, _ = logits.shape
    hidden = torch.zeros_like(logits, dtype=torch.bool) if hidden is None else hidden.expand_as(logits)
    per_head, largest = [], []
    for head in range(heads):
        shares = []
        for entry in range(batch):
            for query in range(length):
                seen = logits[entry, head, query][~hidden[entry, head, query]].double()
                largest.extend(seen.tolist())
                if len(seen) > 1:
                    p = seen.softmax(0)
                    shares.append(float(-(p * p.log()).sum()) / math.log(len(seen)))
        per_head.append(sum(shares) / len(shares))
    return [sum(per_head) / heads, min(per_head), max(largest)]


def read(model: nn.Module, run: Callable[[], Tensor], name: str = "") -> list[float]:
    """Return what the monitor read of one layer in a forward and backward pass."""
    seen = observe(model, lambda: run().square().mean().backward()).layer(name)
    return [seen[statistic] for statistic in STATISTICS]


def inputs(batch: int = 2, length: int = 6) -> Tensor:
    """Return tokens, so large that heads differ."""
    return 3.0 * torch.randn(batch, length, 16)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": CAUSAL},
    "float": {"attn_mask": torch.randn(6, 6)},
    "per head": {"attn_mask": torch.rand(8, 6, 6) > 0.8},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.zeros(2, 6).masked_fill(PADDING, -math.inf)},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "fused": {"need_weights": False},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("kwargs", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("separate", [False, True], ids=["one projection", "three projections"])
def test_multihead_attention_is_read_as_torch_computes_it(
    kwargs: dict[str, Any], *, batch_first: bool, separate: bool
) -> None:
    """Every kind of mask, fused or not: the entropy of the weights that torch returns, the logits written out."""
    kdim = 12 if separate else 16
    mha = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=kdim)
    nn.init.normal_(mha.in_proj_bias)
    x, memory = inputs(), 2.0 * torch.randn(2, 6, kdim)
    given = (x, memory, x) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1), x.transpose(0, 1))

    mask = torch.zeros(2, 4, 6, 6)
    extra, padding = kwargs.get("attn_mask"), kwargs.get("key_padding_mask")
    extra = extra.reshape(-1, 4, 6, 6) if extra is not None and extra.ndim == 3 else extra
    for part in (extra, None if padding is None else padding[:, None, None, :]):
        if part is not None:
            mask = mask + (torch.zeros(part.shape).masked_fill(part, -math.inf) if part.dtype is torch.bool else part)
    weights = (mha.q_proj_weight, mha.k_proj_weight) if separate else mha.in_proj_weight.chunk(3)[:2]
    q, k = (
        F.linear(tokens, weight, bias).unflatten(-1, (4, 4)).transpose(1, 2)
        for tokens, weight, bias in zip((x, memory), weights, mha.in_proj_bias.chunk(3), strict=False)
    )
    logits = q @ k.transpose(-1, -2) / 2.0 + mask
    returned = mha(*given, **{**kwargs, "need_weights": True, "is_causal": False}, average_attn_weights=False)[1]
    assert torch.allclose(returned, logits.softmax(-1).nan_to_num(), atol=1e-5) or torch.isnan(returned).any()

    got = read(mha, lambda: torch.nan_to_num(mha(*given, **kwargs)[0]))

    assert got == pytest.approx(expected(logits, torch.isinf(mask)), rel=1e-4, abs=1e-5)


def test_multihead_attention_reads_unbatched_tokens_and_added_keys() -> None:
    """Tokens without a batch; ``add_bias_kv`` and ``add_zero_attn`` append a key each, visible to all."""
    mha = nn.MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True)
    x = inputs()[0]
    returned = mha(x, x, x, attn_mask=CAUSAL, average_attn_weights=False)[1]
    assert returned is not None
    weights = returned.unsqueeze(0)
    assert weights.shape == (1, 4, 6, 8)

    got = read(mha, lambda: mha(x, x, x, attn_mask=CAUSAL)[0])

    hidden = F.pad(CAUSAL, (0, 2))
    assert got[:2] == pytest.approx(expected(weights.log(), hidden)[:2], rel=1e-4)


@pytest.mark.parametrize("kind", ["F", "torch", "method", "module", "fused"])
@pytest.mark.parametrize("masked", ["open", "-inf", "lowest", "-10000"])
def test_handmade_attention_is_read(kind: str, masked: str) -> None:
    """Fused or by softmax, however it is spelled, and whatever is added to hide a key. Its row follows its children."""
    model, x = nn.Sequential(nn.Linear(16, 16), Handmade(kind), nn.Linear(16, 16)), inputs()
    level = {"open": 0.0, "-inf": -math.inf, "lowest": torch.finfo(torch.float32).min, "-10000": -10000.0}[masked]
    mask = torch.zeros(6, 6).masked_fill(CAUSAL, level)
    inner = model[1]
    q, k, _ = inner.parts(model[0](x))
    want = expected(q @ k.transpose(-1, -2) / 2.0, CAUSAL if level else None)

    seen = observe(model, lambda: model[2](inner(model[0](x), mask)).square().mean().backward())

    assert [seen.layer("1")[statistic] for statistic in STATISTICS] == pytest.approx(want, rel=1e-4)
    assert seen.layers.names == ("0", "1.q", "1.k", "1.v", "1.out", "1", "2")
    assert math.isnan(seen.layer("1.q")["attention_entropy"])


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_causal_attention_with_shared_keys_is_read(key_heads: int) -> None:
    """``is_causal``, and groups of query heads that share one head of keys."""
    model, x = Handmade("causal", key_heads=key_heads), inputs()
    q, k, _ = model.parts(x)
    k = k.repeat_interleave(4 // key_heads, dim=1)

    assert read(model, lambda: model(x)) == pytest.approx(expected(q @ k.transpose(-1, -2) / 2.0, CAUSAL), rel=1e-4)


def test_boolean_masks_of_fused_attention_say_who_takes_part() -> None:
    """True lets a query look, unlike in ``nn.MultiheadAttention``; a scale of one's own counts."""
    model, x = Handmade("fused", scale=3.0), inputs()
    q, k, _ = model.parts(x)

    got = read(model, lambda: model(x, ~CAUSAL))

    assert got == pytest.approx(expected(3.0 * q @ k.transpose(-1, -2), CAUSAL), rel=1e-4, abs=1e-6)


def test_one_head_without_an_axis_of_heads_is_read() -> None:
    """A softmax of ``[batch, length, length]`` counts as attention, one over classes does not."""

    class OneHead(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = (x @ x.transpose(1, 2)).softmax(-1) @ x
            return result

    class Classes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1) + x.unsqueeze(1).softmax(1).squeeze(1) + x.mean(1, keepdim=True).softmax(-1)

    x = inputs().requires_grad_()
    one, other = OneHead(1, 1), Classes(1, 1)
    assert read(one, lambda: one(x)) == pytest.approx(expected((x @ x.transpose(1, 2))[:, None]), rel=1e-4, abs=1e-6)
    assert "attention_entropy" in observe(other, lambda: other(x).sum().backward()).signals
    assert math.isnan(read(other, lambda: other(x))[0])


def test_long_sequences_are_sampled_over_queries_and_batch() -> None:
    """At most two sequences and eight queries of each, the last among them: near the value over all."""
    model, x = Handmade("fused"), inputs(batch=7, length=52)
    q, k, _ = model.parts(x)
    everything = expected(q @ k.transpose(-1, -2) / 2.0)
    sampled = expected((q @ k.transpose(-1, -2) / 2.0)[::4, :, 2::7])

    got = read(model, lambda: model(x))

    assert got == pytest.approx(sampled, rel=1e-4)
    assert got[0] == pytest.approx(everything[0], rel=0.1)


def test_encoders_of_torch_are_read_in_training() -> None:
    """``nn.TransformerEncoderLayer`` calls its attention as a module; every layer has a row."""
    model, batch = TransformerClassifier(3), digit_batch(8)

    seen = observe(model, lambda: classification_loss(model, batch).backward())

    names = [name for name in seen.layers.names if not math.isnan(seen.layer(name)["attention_entropy"])]
    assert names == [f"encoder.layers.{index}.self_attn" for index in range(3)]
    assert all(0.9 < seen.layer(name)["attention_entropy"] <= 1.0 for name in names)


def test_the_fast_path_of_encoders_stays_open_in_evaluation() -> None:
    """Evaluation between armed steps has neither hooks on the encoder layer nor a mode that would close it."""
    model, batch = TransformerClassifier(1), digit_batch(4)
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()
    model.eval()
    with torch.no_grad():
        model(batch[0])

    layer = model.encoder.layers[0]
    assert count_hooks(layer) == 0
    assert top_function_mode() is None
    monitor.close()


def test_the_fast_path_of_derived_encoder_layers_stays_open() -> None:
    """A class of the user's that derives from ``nn.TransformerEncoderLayer`` gets no hook of its own either."""

    class Derived(nn.TransformerEncoderLayer):
        pass

    model, x = nn.Sequential(Derived(16, 4, 32, batch_first=True)), inputs()
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()

    assert count_hooks(model[0]) == 0
    monitor.close()
    assert not math.isnan(observe(model, lambda: model(x).sum().backward()).layer("0.self_attn")["attention_entropy"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_attention_is_read_once(*, reentrant: bool) -> None:
    """The recomputation in the backward pass is not read a second time; without gradients first, it is the one read."""
    block, x = Handmade("fused"), inputs().requires_grad_()
    model = nn.ModuleList([block])
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.reset(readback := Readback())
    monitor.arm()
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    monitor.close_step(0, 0)
    (reading,) = next(row for row in monitor.attention.place([]) if row.name == "0").heads
    readback.fetch()

    q, k, _ = block.parts(x)
    assert readback.value(reading.logit_max) == pytest.approx(
        float((q @ k.transpose(-1, -2)).detach().max()) / 2.0, rel=1e-4
    )
    assert top_function_mode() is None
    monitor.close()
    assert count_hooks(model) == 0


def test_half_precision_and_autocast_are_read() -> None:
    """In autocast and in bfloat16 the values agree with float32 up to the rounding of the inputs."""
    model, x = Handmade("fused"), inputs()
    full = read(model, lambda: model(x))

    def autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    assert read(model, autocast) == pytest.approx(full, rel=0.05)
    model.bfloat16()
    assert read(model, lambda: model(x.bfloat16())) == pytest.approx(full, rel=0.05)


def train(model: nn.Module, x: Tensor, *, watched: bool, **options: Any) -> list[Tensor]:
    """Train for 12 steps and return parameters, optimizer state and random state."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = gradguard.watch(model, optimizer, on_error="raise", on_finding="silent", every=2, **options)
    if not watched:
        guard.detach()
    for _ in range(12):
        optimizer.zero_grad()
        F.dropout(model(x), 0.1).square().mean().backward()
        optimizer.step()
    guard.detach()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*(p.detach() for p in model.parameters()), *state, torch.get_rng_state()]


@pytest.mark.parametrize("kind", ["F", "fused", "causal", "encoder"])
def test_training_is_bit_identical(kind: str) -> None:
    """Dropout included: parameters, Adam's state and the random state are the same to the last bit."""
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.2, batch_first=True)
        model: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    else:
        model = nn.Sequential(Handmade(kind), nn.Dropout(0.2), Handmade(kind))
    x, twin = inputs(4, 12), copy.deepcopy(model)

    for watched, free in zip(train(model, x, watched=True), train(twin, x, watched=False), strict=True):
        assert torch.equal(watched, free)
    assert count_hooks(model) == 0
    assert top_function_mode() is None


def test_the_mode_is_off_outside_a_forward_pass_and_on_steps_that_are_not_observed() -> None:
    """Loss, backward pass and optimizer never see it, nor does a step in between."""
    model, x = Handmade("fused"), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modes: list[object] = []
    inside = model.v.register_forward_hook(lambda *_: modes.append(top_function_mode()))
    with gradguard.watch(model, optimizer, dense_steps=(0, 2), every=100, on_error="raise", on_finding="silent"):
        for _ in range(4):
            loss = model(x).square().mean()
            assert top_function_mode() is None
            loss.backward()
            optimizer.step()
    inside.remove()

    assert [mode is not None for mode in modes] == [True, False, True, False]
    assert count_hooks(model) == 0


def test_an_error_in_the_forward_pass_arrives_and_leaves_no_mode_behind() -> None:
    """The user's exception passes unchanged, and the next pass is read as usual."""
    model = Handmade("fused")
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.reset(Readback())
    monitor.arm()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 6, 15))
    assert top_function_mode() is None
    model(inputs())
    assert monitor.attention.place([])
    monitor.close()
    assert count_hooks(model) == 0


def test_an_interrupt_in_the_forward_pass_is_cleaned_up() -> None:
    """A keyboard interrupt skips torch's hooks; closing leaves the mode all the same."""
    model = Handmade("fused")
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.k.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(inputs())
    handle.remove()
    monitor.close()

    assert top_function_mode() is None
    assert count_hooks(model) == 0


def test_other_function_modes_keep_their_place() -> None:
    """A mode of the user's inside or around the forward pass is entered and left as without us."""

    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.calls += func is F.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    model, x = Handmade("fused"), inputs()
    with Count(), torch.device("cpu"):
        got = read(model, lambda: model(x))
        assert isinstance(top_function_mode(), TorchFunctionMode)
    assert not math.isnan(got[0])
    assert Count.calls == 1
    assert top_function_mode() is None


def test_nothing_is_computed_under_a_dispatch_mode_or_a_transform() -> None:
    """Selective checkpointing would record our operations, ``torch.func`` wraps the tensors: both pass unread."""

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model, x = nn.ModuleList([Handmade("fused"), Handmade("F")]), inputs()
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.attention.arm()
    with Record() as watched:
        model[0](x)
    torch.func.vmap(model[1])(x.unsqueeze(0))
    assert monitor.attention.place([]) == []
    monitor.attention.disarm()
    with Record() as free:
        model[0](x)

    assert watched.names == free.names


def test_what_the_signals_compute_does_not_pass_through_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of the model do, one by one; ours would take twice as long there. No mode is left on."""
    seen: list[str] = []
    passed_on = _Watch.__torch_function__

    def noted(self: _Watch, func: Any, *args: Any) -> Any:
        seen.append(func.__name__)
        return passed_on(self, func, *args)

    monkeypatch.setattr(_Watch, "__torch_function__", noted)
    model, x = nn.Sequential(Handmade("method"), nn.ReLU()), inputs()
    read = observe(model, lambda: model(x).sum().backward())

    assert seen.count("linear") == 4
    assert seen.count("softmax") == 1
    assert not {"vector_norm", "linalg_vector_norm", "aminmax", "amax", "detach"} & set(seen)
    assert not math.isnan(read.layer("0")["attention_entropy"])
    assert not math.isnan(read.layer("0.q")["delta_norm"])
    assert top_function_mode() is None


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # from torch, of inputs that are no leaves
def test_models_that_hold_compiled_modules_are_left_alone() -> None:
    """A mode would make torch compile again: no hook in the compiled module, none around it."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free = Handmade("fused")
            self.fast = torch.compile(Handmade("fused"), backend=backend)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fast(self.free(x))
            return result

    model, x = Outer(), inputs()
    seen = observe(model, lambda: model(x).sum().backward())
    model(x)

    assert len(graphs) == 1
    assert not math.isnan(seen.layer("free")["attention_entropy"])
    assert not any(name.startswith("fast") for name in seen.layers.names)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # from torch, of inputs that are no leaves
def test_a_compiled_function_inside_still_runs_whole() -> None:
    """``fullgraph`` holds under the mode; one more graph is compiled for it, and no more."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def sharpen(x: Tensor) -> Tensor:
        return F.softmax(2.0 * x, -1)

    class Uses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sharpen(x)

    model, x = nn.Sequential(nn.Linear(16, 16), Uses()), inputs()
    want = F.softmax(2.0 * model[0](x), -1)
    for _ in range(3):
        observe(model, lambda: model(x).sum().backward())
        assert torch.equal(model(x), want)

    assert len(graphs) == 2


def test_copies_of_a_watched_model_are_not_read() -> None:
    """A deep copy made while hooks are set computes as before, in silence."""
    model, x = Handmade("fused"), inputs()
    monitor = SignalMonitor(model, on_failure=reraise)
    monitor.arm()
    twin = copy.deepcopy(model)

    assert torch.equal(twin(x), model(x))
    (row,) = monitor.attention.place([])
    assert len(row.heads) == 1
    monitor.close()


def test_a_failure_of_ours_does_not_reach_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading goes off with a note, the other monitors go on, training too."""

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("gradguard.monitors._attention_math.head_statistics", broken)
    model, x = Handmade("fused"), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer)
    with pytest.warns(gradguard.GradGuardWarning, match="Attention logits are no longer observed; training goes on"):
        model(x).square().mean().backward()
    optimizer.step()
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()

    assert [note.what for note in guard.diagnose().unobserved] == ["attention logits"]
    assert len(guard.history) == 3
    assert not math.isnan(guard.history.layer("delta_norm")[-1][0])
    guard.detach()
    assert count_hooks(model) == 0


def test_rules_that_are_ignored_cost_nothing() -> None:
    """Where neither rule may speak no mode is entered."""
    model, x = Handmade("fused"), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradguard.watch(model, optimizer, ignore=("attention",), on_error="raise") as guard:
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()

    assert "" not in guard.history.layers.names


def test_models_without_attention_have_no_numbers_of_it() -> None:
    """Columns are there, and empty."""
    model, batch = mlp(3), digit_batch(4)
    seen = observe(model, lambda: classification_loss(model, batch).backward())

    assert all(math.isnan(value) for statistic in STATISTICS for value in seen.signals[statistic])
