"""Gated cells in place of plain ones, and attention with normalized queries and keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.surgery import (
    BareLSTM,
    QKNormAttention,
    add_qk_norm,
    swap_recurrent,
)
from tests.surgery import Net


@pytest.mark.parametrize("to", ["gru", "lstm"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "num_layers": 2, "dropout": 0.5}, {"bidirectional": True, "bias": False}]
)
def test_swapped_cells_keep_the_interface(to: Any, options: dict[str, Any]) -> None:
    """Shapes of output and state, given state, packed sequences, sizes and options."""
    net = Net(lambda net, x: net.rnn(x)[0], rnn=nn.RNN(3, 5, **options))
    x = torch.randn(4, 6, 3)
    old = net.rnn
    output, state = old(x)

    swap_recurrent(net, to, batch=x)

    new = net.rnn
    assert isinstance(new, BareLSTM if to == "lstm" else nn.GRU)
    again, last = new(x)
    assert (again.shape, last.shape) == (output.shape, state.shape)
    assert new(x, torch.randn_like(state))[1].shape == state.shape
    packed = pack_padded_sequence(
        x, torch.tensor([6, 6, 4, 2] if old.batch_first else [4, 4, 3, 2, 1, 1]), batch_first=bool(old.batch_first)
    )
    assert pad_packed_sequence(new(packed)[0])[0].shape[-1] == output.shape[-1]
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(new, name) == getattr(old, name)


def test_the_bare_lstm_is_an_lstm() -> None:
    """Same weights, same numbers as torch's; a given hidden state meets a cell state of 0."""
    torch.manual_seed(0)
    ours, theirs = BareLSTM(3, 5, 2, batch_first=True), nn.LSTM(3, 5, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, h = torch.randn(4, 6, 3), torch.randn(2, 4, 5)

    assert torch.equal(ours(x)[0], theirs(x)[0])
    assert torch.equal(ours(x, h)[1], theirs(x, (h, torch.zeros_like(h)))[1][0])


@pytest.mark.parametrize(("to", "gates"), [("lstm", 4), ("gru", 3)])
def test_the_gate_that_keeps_the_state_has_a_bias_of_one(to: Any, gates: int) -> None:
    """Of the two biases that torch adds one is 1 on that gate, everything else is 0."""
    net = Net(lambda net, x: net.rnn(x)[0], rnn=nn.RNN(3, 5))

    swap_recurrent(net, to)

    total = (net.rnn.bias_ih_l0 + net.rnn.bias_hh_l0).detach().chunk(gates)
    assert [float(part.mean()) for part in total] == [float(i == 1) for i in range(gates)]


@pytest.mark.parametrize(("to", "gates"), [("lstm", 4), ("gru", 3)])
def test_gates_of_new_cells_remember_for_as_long_as_is_asked(to: Any, gates: int) -> None:
    """Biases of ln U(1, T - 1) on the gate that keeps the state; an LSTM's input gate has minus that."""
    net = Net(lambda net, x: net.rnn(x)[0], rnn=nn.RNN(3, 200))

    applied = swap_recurrent(net, to, max_time=61)

    total = (net.rnn.bias_ih_l0 + net.rnn.bias_hh_l0).detach().chunk(gates)
    memories = total[1].exp()
    assert 1.0 <= float(memories.min()) < 5.0
    assert 50.0 < float(memories.max()) <= 60.0
    assert torch.equal(total[0], -total[1] if to == "lstm" else torch.zeros(200))
    assert "biases ln U[1, 60] on the gate that keeps the state" in applied.changes[0]
    with pytest.raises(ValueError, match="max_time must be at least 3 steps, got 2"):
        swap_recurrent(Net(lambda net, x: net.rnn(x)[0], rnn=nn.RNN(3, 5)), to, max_time=2)


def test_cells_without_biases_are_swapped_whatever_the_length() -> None:
    """They have no gate to set."""
    net = Net(lambda net, x: net.rnn(x)[0], rnn=nn.RNN(3, 5, bias=False))

    applied = swap_recurrent(net, "gru", max_time=20)

    assert isinstance(net.rnn, nn.GRU)
    assert applied.changes == ("rnn: RNN 3>5 > GRU, new weights, no biases",)


def test_cells_in_a_loop() -> None:
    """A GRU cell fits the user's loop, an LSTM cell does not."""

    def forward(net: Any, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 5)
        for step in x.unbind(1):
            state = net.cell(step, state)
        return state

    net = Net(forward, cell=nn.RNNCell(3, 5))
    with pytest.raises(UnsupportedModelError, match=r"would have to carry a cell state; use to='gru'"):
        swap_recurrent(net, "lstm")
    swap_recurrent(net, "gru", batch=torch.randn(2, 6, 3))
    assert isinstance(net.cell, nn.GRUCell)


def test_what_cannot_be_swapped_says_why() -> None:
    """Tied, frozen, parametrized, hooked; a model that is itself the RNN."""
    x = torch.randn(6, 4, 5)

    def refused(rnn: nn.Module, message: str, **layers: nn.Module) -> None:
        net = Net(lambda net, x: net.rnn(x)[0], rnn=rnn, spare=nn.Linear(5, 5), **layers)
        with pytest.raises(UnsupportedModelError, match=message):
            swap_recurrent(net, batch=x)
        assert net.rnn is rnn

    rnn, other = nn.RNN(5, 5), nn.RNN(5, 5)
    other.weight_hh_l0 = rnn.weight_hh_l0
    refused(rnn, "tied to those of another module", other=other)
    refused(nn.RNN(5, 5).requires_grad_(requires_grad=False), "it is frozen")
    refused(torch.nn.utils.parametrizations.weight_norm(nn.RNN(5, 5), "weight_hh_l0"), "parametrized")
    hooked = nn.RNN(5, 5)
    hooked.register_forward_hook(lambda *_: None)
    refused(hooked, "it has hooks")
    with pytest.raises(UnsupportedModelError, match="the model is itself the RNN"):
        swap_recurrent(nn.RNN(5, 5))


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 6, "vdim": 10},
}


@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head", "padding", "padding and bool"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_without_its_norms_is_that_of_torch(name: str, need_weights: bool, mask: str) -> None:
    """Every option of the call gives torch's numbers once the norms are taken out: output, weights, gradients."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **ATTENTIONS[name])
    ours = QKNormAttention.around(theirs)
    ours.q_norm, ours.k_norm = nn.Identity(), nn.Identity()
    lengths = (3, 5)
    sizes = (8, theirs.kdim, theirs.vdim)
    query, key, value = (torch.randn(length, 4, size) for length, size in zip((3, 5, 5), sizes, strict=True))
    if theirs.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    blocked = torch.rand(lengths) < 0.3
    blocked[:, 0] = False
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    masks: dict[str, dict[str, Tensor]] = {
        "none": {},
        "bool": {"attn_mask": blocked},
        "float": {"attn_mask": torch.randn(lengths)},
        "per head": {"attn_mask": torch.randn(8, *lengths)},
        "padding": {"key_padding_mask": padding},
        "padding and bool": {"key_padding_mask": padding, "attn_mask": blocked},
    }
    arguments = {**masks[mask], "need_weights": need_weights}

    results = [attention(query, key, value, **arguments) for attention in (ours, theirs)]

    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
        each = [a(query, key, value, **arguments, average_attn_weights=False)[1] for a in (ours, theirs)]
        torch.testing.assert_close(each[0], each[1], rtol=1e-4, atol=1e-5)
    else:
        assert results[0][1] is None
    if mask == "none":
        alone = [a(*(t.select(0 if a.batch_first else 1, 0) for t in (query, key, value)))[0] for a in (ours, theirs)]
        torch.testing.assert_close(alone[0], alone[1], rtol=1e-4, atol=1e-5)


def test_logits_are_bounded_whatever_the_weights() -> None:
    """With queries and keys a thousand times as large the attention is what it was; without the norm it collapses."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    net = Net(lambda net, x: net.attention(x, x, x)[0], attention=attention)
    x = torch.randn(4, 6, 8)

    with torch.no_grad():
        attention.in_proj_weight[:16] *= 1000.0
    assert float(attention(x, x, x)[1].detach().max()) > 0.9
    add_qk_norm(net, batch=x)
    large = net.attention(x, x, x, average_attn_weights=False)[1]
    with torch.no_grad():
        attention.in_proj_weight[:16] /= 1000.0
    small = net.attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(large, small, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_evaluation_does_not_go_past_the_norm() -> None:
    """The encoder of torch computes from the weights in evaluation mode; not so here, with padding neither."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    net = Net(lambda net, x: net.encoder(x), encoder=nn.TransformerEncoder(layer, 2))
    x = torch.randn(4, 6, 8)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[0, 4:] = True
    plain = net.encoder(x)

    applied = add_qk_norm(net, batch=x)

    net.train()
    expected = net.encoder(x, src_key_padding_mask=padding)
    net.eval()
    with torch.inference_mode():
        got = net.encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net.encoder(x), plain)
    applied.undo()
    assert net.encoder.use_nested_tensor
    torch.testing.assert_close(net.train().encoder(x), plain)


def test_attention_in_code_is_reported() -> None:
    """It cannot be rewritten from outside; with a batch the place is said."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.out(F.scaled_dot_product_attention(net.q(x), net.k(x), x))

    net = Net(forward, q=nn.Linear(8, 8), k=nn.Linear(8, 8), out=nn.Linear(8, 2))
    outer = nn.Sequential(net)

    with pytest.raises(UnsupportedModelError, match=r"0\.forward: attention written by hand; normalize q and k there"):
        add_qk_norm(outer, batch=torch.randn(2, 5, 8))
    with pytest.raises(UnsupportedModelError, match=r"0 is Net, not nn\.MultiheadAttention"):
        add_qk_norm(outer, modules="0")


def test_attention_with_keys_of_its_own_is_refused() -> None:
    """There is no norm to put behind keys that are no projection."""
    net = Net(lambda net, x: net.attention(x, x, x)[0], attention=nn.MultiheadAttention(8, 2, add_bias_kv=True))

    with pytest.raises(UnsupportedModelError, match="it adds keys of its own"):
        add_qk_norm(net)
