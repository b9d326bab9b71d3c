"""Recurrent remedies: which slices of which tensors change, to what, and what that does to memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.initialization import chrono_initialize, forget_gate_bias, orthogonal_recurrent

GATED: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 5, num_layers=2),
    "lstm-cell": lambda: nn.LSTMCell(3, 5),
    "gru-cell": lambda: nn.GRUCell(3, 5),
    "projected": lambda: nn.LSTM(3, 5, proj_size=2),
}


def biases(module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the pairs of biases on input and on hidden state."""
    named = dict(module.named_parameters())
    return [(named[key].detach(), named[key.replace("_ih", "_hh")].detach()) for key in named if "bias_ih" in key]


@pytest.mark.parametrize("kind", GATED)
def test_forget_gate_bias_sets_that_gate_alone(kind: str) -> None:
    """The gate's two biases add up to the value, every other entry keeps its bits."""
    module = GATED[kind]()
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    forget_gate_bias(module, 1.5)

    for on_input, on_hidden in biases(module):
        assert torch.equal(on_input[5:10], torch.zeros(5))
        assert torch.equal(on_hidden[5:10], torch.full((5,), 1.5))
    for key, value in module.named_parameters():
        assert torch.equal(value[:5], before[key][:5])
        assert torch.equal(value[10:], before[key][10:])
        assert key.startswith("bias") or torch.equal(value, before[key])


@pytest.mark.parametrize("kind", ["lstm-cell", "gru-cell"])
def test_the_gate_set_is_the_one_that_keeps_the_state(kind: str) -> None:
    """With a large bias the state passes a step unchanged: it is f in LSTM and z in GRU."""
    module = GATED[kind]()
    forget_gate_bias(module, 50.0)
    h, c, x = torch.randn(2, 5), torch.randn(2, 5), torch.zeros(2, 3)
    if kind == "gru-cell":
        torch.testing.assert_close(module(x, h), h)
        return
    with torch.no_grad():
        module.bias_ih[:5] = -50.0
        module.bias_hh[:5] = -50.0  # closes the input gate
    torch.testing.assert_close(module(x, (h, c))[1], c)


@pytest.mark.parametrize("kind", GATED)
def test_chrono_biases_follow_the_paper(kind: str) -> None:
    """b_f = ln U[1, T - 1] (GRU: b_z), b_i = -b_f, all others 0."""
    module = GATED[kind]()
    chrono_initialize(module, max_time=30, generator=0)

    for on_input, on_hidden in biases(module):
        gate = on_hidden[5:10]
        assert not on_input.any()
        assert ((gate >= 0.0) & (gate <= math.log(29.0))).all()
        assert not on_hidden[10:].any()
        assert torch.equal(on_hidden[:5], -gate if "lstm" in kind or kind == "projected" else torch.zeros(5))


def test_chrono_times_are_uniform() -> None:
    """Over many units exp(b_f) has the mean, the deviation and the ends of U[1, T - 1]."""
    module = nn.LSTM(1, 4000)
    chrono_initialize(module, max_time=101, generator=0)
    times = module.bias_hh_l0.detach()[4000:8000].exp()

    assert times.mean().item() == pytest.approx(50.5, rel=0.03)
    assert times.std().item() == pytest.approx(99 / math.sqrt(12), rel=0.03)
    assert times.min().item() == pytest.approx(1.0, abs=0.2)
    assert times.max().item() == pytest.approx(100.0, abs=0.2)


def test_chrono_keeps_gradients_over_time() -> None:
    """Over 60 steps torch's default LSTM loses more than 8 decades of the gradient, chrono(64) fewer than 4."""
    torch.manual_seed(0)

    def decades(module: nn.LSTM) -> float:
        x = torch.randn(60, 8, 4, requires_grad=True)
        module(x)[0][-1].sum().backward()
        norms = x.grad.flatten(1).norm(dim=1).log10()
        return float(norms[-1] - norms[0])

    module = nn.LSTM(4, 32)
    before = decades(module)
    chrono_initialize(module, max_time=64, generator=0)

    assert before > 8.0
    assert decades(module) < 4.0


@pytest.mark.parametrize(
    ("module", "gates"),
    [
        (nn.RNN(3, 6, nonlinearity="relu"), 1),
        (nn.RNNCell(3, 6), 1),
        (nn.LSTM(3, 6, num_layers=2, bidirectional=True), 4),
        (nn.GRU(3, 6), 3),
        (nn.LSTM(3, 6, proj_size=2), 4),
    ],
    ids=str,
)
def test_recurrent_matrices_are_orthogonal_gate_by_gate(module: nn.Module, gates: int) -> None:
    """Each gate's block has orthonormal columns times the gain; input matrices and biases keep their bits."""
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    orthogonal_recurrent(module, 0.9, generator=0)
    blocks = []
    for key, value in module.named_parameters():
        if key.startswith("weight_hh"):
            assert value.shape[0] == gates * 6
            blocks += list(value.detach().split(6))
        else:
            assert torch.equal(value, before[key])

    for block in blocks:
        torch.testing.assert_close(block.T @ block, 0.81 * torch.eye(block.shape[1]), atol=1e-5, rtol=0)
    assert all(not torch.equal(blocks[0], other) for other in blocks[1:])


def test_what_has_no_gate_or_is_frozen_is_named() -> None:
    """Plain RNNs, nets without biases, frozen and shared parameters are left alone, each with its reason."""
    lstm = nn.LSTM(3, 4, num_layers=2)
    lstm.bias_hh_l1.requires_grad_(False)
    cell = nn.LSTMCell(3, 4)
    model = nn.ModuleDict({"rnn": nn.RNN(3, 4), "bare": nn.GRU(3, 4, bias=False), "lstm": lstm, "cell": cell})
    twin = nn.LSTMCell(3, 4)
    twin.bias_ih, twin.bias_hh = cell.bias_ih, cell.bias_hh
    model["twin"] = twin
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    applied = forget_gate_bias(model)

    assert "no gates" in applied.skipped["rnn"]
    assert "no bias" in applied.skipped["bare.bias_hh_l0"]
    assert "frozen" in applied.skipped["lstm.bias_hh_l1"]
    assert "shared" in applied.skipped["twin.bias_hh"]
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed == {"lstm.bias_ih_l0", "lstm.bias_hh_l0", "cell.bias_ih", "cell.bias_hh"}


def test_modules_can_be_named() -> None:
    """Only the named modules change; naming one that has nothing to change is an error."""
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(3, 4), "c": nn.RNN(3, 4)})
    applied = orthogonal_recurrent(model, modules="b", generator=0)

    assert applied.changed == ("b.weight_hh_l0",)
    with pytest.raises(ValueError, match=r"modules names 'c'.*no gates"):
        forget_gate_bias(model, modules=["a", "c"])


def test_wrong_arguments_are_named() -> None:
    """Each error says what came and what is accepted; a net without recurrence is refused."""
    lstm = nn.LSTM(2, 2)
    with pytest.raises(ValueError, match="max_time must be at least 3 steps, got 2"):
        chrono_initialize(lstm, 2)
    with pytest.raises(ValueError, match="value must be finite, got nan"):
        forget_gate_bias(lstm, math.nan)
    with pytest.raises(ValueError, match=r"gain must be positive and finite, got 0"):
        orthogonal_recurrent(lstm, 0)
    with pytest.raises(UnsupportedModelError, match="found nothing to change"):
        forget_gate_bias(nn.Linear(2, 2))


def test_fused_kernels_use_the_new_weights() -> None:
    """The changed parameters are the ones that the kernel computes with, and a forward pass still runs."""
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    before = lstm(x)[0]
    forget_gate_bias(lstm, 3.0)

    assert not torch.allclose(lstm(x)[0], before)
