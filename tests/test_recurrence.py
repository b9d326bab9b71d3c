"""The replay of a recurrent net: states and gradients are those of torch, in every form that its modules take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gradguard.monitors._captures import Call, capture_call
from gradguard.monitors._recurrence import Replayed, replay

EXACT = 1e-9
"""Relative; float64 rounds at 1e-16. The promise is 1e-4."""

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn-tanh": lambda **options: nn.RNN(5, 7, **options),
    "rnn-relu": lambda **options: nn.RNN(5, 7, nonlinearity="relu", **options),
    "lstm": lambda **options: nn.LSTM(5, 7, **options),
    "lstm-projected": lambda **options: nn.LSTM(5, 7, proj_size=3, **options),
    "gru": lambda **options: nn.GRU(5, 7, **options),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def close(found: Tensor, true: Tensor) -> bool:
    """Whether two gradients agree to rounding."""
    return bool((found - true).abs().max() <= EXACT * true.abs().max())


def differentiated(
    module: nn.RNNBase, given: Tensor | PackedSequence, state: object, weigh: Callable[[Tensor], Tensor]
) -> tuple[Replayed, list[Tensor]]:
    """Return the replay of a call, and autograd's gradients at its input, with a loss on all that it returns."""
    source = given.data if isinstance(given, PackedSequence) else given
    output, last = module(given, state)
    found = capture_call(module, given, state, (output, last))
    assert found is not None
    call, places = found
    result = output.data if isinstance(output, PackedSequence) else output
    states = last if isinstance(last, tuple) else (last,)
    loss = weigh(result) + sum(weigh(part) for part in states)
    at = [tensor for _, tensor, _ in places]
    *came, at_input = torch.autograd.grad(loss, [*at, source])
    call.gradients.update({name: cut(gradient) for (name, _, cut), gradient in zip(places, came, strict=True)})
    passage = call.passage()
    assert passage is not None
    with torch.no_grad():
        return replay(passage), [at_input, call.output]


def weighted(seed: int = 1) -> Callable[[Tensor], Tensor]:
    """Return a loss that gives every entry a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda t: (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()


def at_input(found: Replayed) -> Tensor:
    """Return the loss gradient at the module's input, ``[time, batch, features]``, of whole sequences."""
    total = found.directions[0].inputs[0]
    return total if len(found.directions) == 1 else total + found.directions[1].inputs[0].flip(0)


@every_kind
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_gradient_at_the_input_and_output_are_those_of_autograd(
    kind: str, layers: int, bidirectional: bool, batch_first: bool
) -> None:
    """Layers, directions, projections and layouts; the loss reads every output and the last states."""
    torch.manual_seed(0)
    module = KINDS[kind](num_layers=layers, bidirectional=bidirectional, batch_first=batch_first).double()
    x = torch.randn((3, 11, 5) if batch_first else (11, 3, 5), dtype=torch.float64, requires_grad=True)

    found, (true, output) = differentiated(module, x, None, weighted())

    assert close(found.output, output)
    assert close(at_input(found), true.transpose(0, 1) if batch_first else true)


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("sort", [False, True], ids=["any-order", "sorted"])
def test_packed_sequences_are_followed_to_their_own_ends(kind: str, bidirectional: bool, sort: bool) -> None:
    """Sequences of 11, 9 and 3 steps, in any order: the gradient at every step of each is autograd's."""
    torch.manual_seed(0)
    lengths = [11, 9, 3] if sort else [3, 11, 9]
    module = KINDS[kind](num_layers=2, bidirectional=bidirectional).double()
    x = torch.randn(11, 3, 5, dtype=torch.float64, requires_grad=True)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=sort)

    found, (true, output) = differentiated(module, packed, None, weighted())

    by_length = sorted(lengths, reverse=True)
    padded, _ = pad_packed_sequence(PackedSequence(true, packed.batch_sizes))
    valid = torch.arange(11)[:, None] < torch.tensor(by_length)
    total = found.directions[0].inputs[0]
    if bidirectional:
        back = found.directions[1].inputs[0]
        for row, length in enumerate(by_length):
            total[:length, row] += back[:length, row].flip(0)
    assert close(total * valid[..., None], padded)
    assert close(found.output * valid[..., None], output)


@every_kind
def test_first_states_and_missing_biases_are_respected(kind: str) -> None:
    """A state that is handed in changes every gradient after it."""
    torch.manual_seed(0)
    module = KINDS[kind](bias=False).double()
    x = torch.randn(9, 2, 5, dtype=torch.float64, requires_grad=True)
    wide = module.proj_size or 7
    first = torch.randn(1, 2, wide, dtype=torch.float64)
    state = (first, torch.randn(1, 2, 7, dtype=torch.float64)) if isinstance(module, nn.LSTM) else first

    found, (true, output) = differentiated(module, x, state, weighted())

    assert close(found.output, output)
    assert close(at_input(found), true)


def unrolled(module: nn.RNNBase, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the hidden and the cell states of one layer, step by step, with their gradients kept."""
    weights = [getattr(module, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    h = c = torch.zeros(x.shape[1], 7, dtype=x.dtype)
    hidden, cells = [], []
    for step in x:
        if isinstance(module, nn.LSTM):
            h, c = torch.lstm_cell(step, (h, c), *weights)
            c.retain_grad()
            cells.append(c)
        elif isinstance(module, nn.GRU):
            h = torch.gru_cell(step, h, *weights)
        elif module.nonlinearity == "relu":
            h = torch.rnn_relu_cell(step, h, *weights)
        else:
            h = torch.rnn_tanh_cell(step, h, *weights)
        h.retain_grad()
        hidden.append(h)
    return hidden, cells


def hooked(module: nn.RNNBase, x: Tensor, output_gradient: Tensor) -> Replayed:
    """Return the replay of a whole call with a given gradient at its output."""
    call = Call(
        module=module,
        inputs=x,
        output=module(x)[0].detach(),
        hidden=None,
        cell=None,
        lengths=None,
        whole=True,
        gradients={"output": output_gradient},
    )
    passage = call.passage()
    assert passage is not None
    with torch.no_grad():
        return replay(passage)


@pytest.mark.parametrize("kind", ["rnn-tanh", "rnn-relu", "lstm", "gru"])
@pytest.mark.parametrize("reads", ["last", "all"])
def test_gradients_at_hidden_and_cell_states_are_those_of_the_unrolled_cell(kind: str, reads: str) -> None:
    """dL/dh_t and dL/dc_t, which no fused kernel shows, for a loss at the last step and for one at each."""
    torch.manual_seed(0)
    module = KINDS[kind]().double()
    x = torch.randn(20, 3, 5, dtype=torch.float64)
    given = torch.randn(20, 3, 7, dtype=torch.float64)
    if reads == "last":
        given[:-1] = 0
    hidden, cells = unrolled(module, x)
    loss = sum((h * g).sum() for h, g in zip(hidden, given, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()  # an output's share included: retain_grad gives the whole gradient at a state

    found = hooked(module, x, given).directions[0]

    for t, h in enumerate(hidden):
        assert h.grad is not None
        assert close(found.hidden[0][0, t], h.grad)
    for t, c in enumerate(cells):
        assert c.grad is not None
        assert close(found.cell[0][0, t], c.grad)


@pytest.mark.parametrize("kind", ["rnn-tanh", "lstm", "gru"])
def test_memory_is_the_gradient_of_the_last_reading_alone(kind: str) -> None:
    """With a loss at every step: as if only the last step were read, with a gradient of length 1 per sequence."""
    torch.manual_seed(0)
    module = KINDS[kind]().double()
    x = torch.randn(20, 3, 5, dtype=torch.float64, requires_grad=True)
    given = torch.randn(20, 3, 7, dtype=torch.float64)
    given[15:, 1] = 0.0  # this sequence is read up to step 14
    output, _ = module(x)
    ends = [(19, 0), (14, 1), (19, 2)]
    loss = sum((output[t, b] * given[t, b] / given[t, b].norm()).sum() for t, b in ends)
    assert isinstance(loss, Tensor)
    (true,) = torch.autograd.grad(loss, [x])

    found = hooked(module, x.detach(), given).directions[0]

    assert found.ends.tolist() == [19, 14, 19]
    assert close(found.inputs[1], true)
