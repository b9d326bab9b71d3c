"""Activations that code calls as functions: hidden ones are replaced where they stand, everything else stays."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.surgery import replace_activations
from tests.functions import Leaky, Plain, Sigmoids, X, assert_equal, code, defined, reaction, spelt
from tests.surgery import Net

# ----------------------------------------------------------------------------------------------------- what it computes


def test_it_computes_what_a_class_with_the_other_function_computes() -> None:
    """Outputs and gradients, bit for bit; undone, it is of its own class again and has nothing that it had not."""
    model, before = Sigmoids(), reaction(Sigmoids())
    attributes, weights = set(vars(model)), copy.deepcopy(model.state_dict())

    applied = replace_activations(model, "leaky-relu", batch=X)

    assert applied.changes == ("forward: sigmoid once and tanh once as a function > leaky_relu",)
    assert applied.skipped == {}
    assert set(applied.names) == set(weights)
    assert all(old == new for old, new in applied.names.items())
    assert_equal(reaction(model), reaction(Leaky()))
    assert isinstance(model, Sigmoids)
    assert repr(model) == repr(Sigmoids())
    assert set(vars(model)) == attributes
    applied.undo()
    assert type(model) is Sigmoids
    assert set(vars(model)) == attributes
    assert_equal(reaction(model), before)


@pytest.mark.parametrize(
    "write",
    [
        "h = torch.sigmoid(h)",
        "h = torch.sigmoid(input=h)",
        "h = torch.nn.functional.sigmoid(h)",
        "h = F.tanh(h)",
        "h = torch.Tensor.tanh(h)",
        "h = h.sigmoid()",
        "h = h.sigmoid_()",
        "h = torch.sigmoid_(h)",
        "torch.tanh_(h)",
        "h.tanh_()",
        "h = F.logsigmoid(h)",
        "h = F.hardtanh(h, -1.0, 1.0)",
        "h = F.hardtanh(h, min_val=-2.0, inplace=True)",
        "h = F.hardsigmoid(h)",
        "h = F.softsign(h)",
        "h = F.relu(h)",
        "h = F.relu(h, inplace=True)",
        "h = F.relu(h, True)",
        "F.relu(h, inplace=True)",
        "h = torch.relu(h)",
        "h = relu(h)",
        "h = F.relu6(h)",
        "h = F.threshold(h, 0.1, 0.0)",
        "h = torch.threshold(h, 0.1, 0.0)",
        "h = torch.exp(h)",
        "h = (\n            h\n            .tanh(\n            )\n        )",
        "(lambda: h.tanh_())()",
        "h = torch.stack([row.tanh() for row in h])",
        "é = 'é'; h = h.tanh(); del é",
    ],
)
def test_every_spelling_is_known(write: str) -> None:
    """Functions, methods, in place or not, with arguments and over several lines."""
    model = spelt("spelling", write)()
    twin = spelt("twin", "h = F.leaky_relu(h, 0.01)")()

    applied = replace_activations(model, "leaky-relu", batch=X)

    assert len(applied.changes) == 1
    assert applied.skipped == {}
    torch.testing.assert_close(reaction(model), reaction(twin), rtol=1e-6, atol=1e-6)
    assert ("inplace=True" in code(model)) == ("_(" in write or "True" in write)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        ("f = torch.tanh; h = f(h)", "called through a variable"),
        ("h = {0: torch.tanh}[0](h)", "called through a variable"),
        ("h = torch.stack([f(h) for f in (torch.tanh, torch.sigmoid)]).mean(0)", "now this function, now that"),
        ("h = torch.tanh(h, out=torch.empty_like(h))", "it writes to another tensor"),
        ("h = torch.tanh(**{'input': h})", "not known before it runs"),
        ("h = torch.tanh(*[h])", "not known before it runs"),
        ("h = F.relu(h, inplace=bool(1))", "not known before it runs"),
        ("h = h.tanh() * 2.0", "it is a gate"),
        ("h = h.tanh(); self.seen = h.mean()", "its result also goes where no layer is, by mean"),
        ("h = h.tanh() - 1.0", "goes into sub,"),
        ("h = [f(h) for f in (torch.tanh,)][0]", "called through a variable"),
        ("h = torch.func.vmap(torch.tanh)(h)", "not in a plain method|through a variable|torch's own"),
        ("h = self.last(torch.tanh(h)) @ torch.ones(3, 16); return h.sigmoid()", "it is at the output"),
    ],
)
def test_other_calls_are_refused_with_the_reason(write: str, reason: str) -> None:
    """If in doubt nothing is changed."""
    model = spelt("refused", write)()
    with torch.no_grad():  # out= has no gradient
        before = model(X)

    if "at the output" in reason:
        assert reason in replace_activations(model, "leaky-relu", batch=X).skipped["forward"]
        return
    with pytest.raises(UnsupportedModelError, match=reason):
        replace_activations(model, "leaky-relu", batch=X)
    assert vars(type(model))["forward"].__code__.co_filename == "<refused>"
    with torch.no_grad():
        assert torch.equal(model(X), before)


def test_in_place_stays_in_place_and_gelu_has_none() -> None:
    """Refused, since others may hold the same tensor."""
    model = spelt("in place", "h.tanh_()")()

    with pytest.raises(UnsupportedModelError, match="it works in place, which gelu does not"):
        replace_activations(model, "gelu", batch=X)


@pytest.mark.parametrize("to", ["relu", "elu", "selu", "gelu", "silu"])
def test_the_new_function_is_that_of_the_new_module(to: Any) -> None:
    """The same as modules with the same weights."""
    model, modules = Sigmoids(), Sigmoids()
    stack = nn.Sequential(modules.first, nn.Sigmoid(), modules.second, nn.Sigmoid(), modules.last)
    replace_activations(stack, to)

    replace_activations(model, to, batch=X)

    assert_equal(reaction(model), reaction(stack))


# --------------------------------------------------------------------------------------------------------- what stays


class Cell(nn.Module):
    """An LSTM cell by hand, a layer of torch's, and a probability at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.into, self.back = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(8, 32)
        self.lstm, self.act, self.out = nn.LSTM(8, 8), nn.Tanh(), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a probability."""
        x = self.lstm(torch.tanh(self.embed(x)))[0]
        h = c = torch.zeros(5, 8)
        for _ in range(3):
            i, f, g, o = (self.into(x) + self.back(h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return torch.sigmoid(self.out(h))


def test_gates_outputs_and_layers_of_torch_stay() -> None:
    """Of a recurrent net by hand only the hidden activation before it is another."""
    model = Cell()

    applied = replace_activations(model, batch=X)

    assert applied.changes == ("forward: tanh once as a function > relu",)
    assert "sigmoid 9 times and tanh 6 times as a function, and it is a gate" in applied.skipped["forward"]
    assert "sigmoid once as a function, and it is at the output" in applied.skipped["forward"]
    assert code(model).count("gradguard_functional.relu(self.embed(x))") == 1
    assert code(model).count("torch.tanh") == 2
    assert code(model).count("torch.sigmoid") == 4


class Mixed(Plain):
    """One helper serves as a hidden activation and at the output, another line as hidden alone."""

    def act(self, x: Tensor) -> Tensor:
        """Return the sigmoid."""
        return torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return a probability."""
        return self.act(self.last(torch.tanh(self.second(self.act(self.first(x))))))


def test_a_call_that_serves_for_two_things_stays() -> None:
    """What stands elsewhere is replaced."""
    model = Mixed()

    applied = replace_activations(model, batch=X)

    assert applied.changes == ("forward: tanh once as a function > relu",)
    assert "sigmoid 2 times as a function, and of the times that" in applied.skipped["act"]
    assert "it is at the output" in applied.skipped["act"]


class Returned(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and what a layer makes of them."""
        p = torch.sigmoid(self.first(x))
        return self.second(p), p.unsqueeze(0)


def test_what_is_returned_as_well_stays() -> None:
    """A probability that other code reads is no hidden activation."""
    with pytest.raises(UnsupportedModelError, match="at the output as well as before layers"):
        replace_activations(Returned(), batch=X)


def test_arithmetic_with_exp_stays() -> None:
    """A softmax by hand, a deviation from its logarithm, a sigmoid by hand."""
    for write in ("h = h.exp() / h.exp().sum(-1, keepdim=True)", "h = h + torch.exp(0.5 * h) * torch.randn_like(h)"):
        with pytest.raises(UnsupportedModelError, match="as a function"):
            replace_activations(spelt("arithmetic", write)(), batch=X)
    with pytest.raises(UnsupportedModelError, match="no Linear or convolution layer stands directly before it"):
        replace_activations(spelt("logistic", "h = 1.0 / (1.0 + torch.exp(-h))")(), batch=X)


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """Go one way or the other, by the numbers."""
        x = self.first(x)
        if x.abs().sum() > 1e6:
            return self.last(torch.sigmoid(self.second(x)).tanh())
        return self.last(torch.tanh(self.second(x)))


def test_a_call_that_did_not_run_stays_and_is_said_to() -> None:
    """Places are those in the code: the way that was not taken is what it was."""
    model, twin = Branching(), Branching()

    applied = replace_activations(model, batch=X)

    assert applied.changes == ("forward: tanh once as a function > relu",)
    assert "tanh once and sigmoid once as a function, and the batch did not come there" in applied.skipped["forward"]
    assert torch.equal(model(X + 1e9), twin(X + 1e9))
    assert not torch.equal(model(X), twin(X))


class Early(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """Run the second layer once more where the numbers are large."""
        x = self.second(torch.tanh(self.first(1e4 * x)))
        return self.last(self.second(x) if x.abs().max() > 100.0 else x)


def test_code_that_goes_by_the_new_numbers_is_refused() -> None:
    """What ran is not what was expected; everything is put back."""
    model, before = Early(), Early()(X)

    with pytest.raises(UnsupportedModelError, match="goes by the numbers that come out") as caught:
        replace_activations(model, batch=X)
    assert "as they were" in caught.value.__notes__[-1]
    assert type(model) is Early
    assert torch.equal(model(X), before)


def outside(x: Tensor) -> Tensor:
    """Return the sigmoid, outside of any class."""
    return torch.sigmoid(x)


class Outside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """Call a function that is no method."""
        return self.last(outside(self.first(x)))


class Derived(Sigmoids):
    def forward(self, x: Tensor) -> Tensor:
        """Call the code of the base class."""
        return super().forward(x)


class PastTheClass(Plain):
    def act(self, x: Tensor) -> Tensor:
        """Return the sigmoid."""
        return torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        """Call a method by its class."""
        return self.last(PastTheClass.act(self, self.first(x)))


class Decorated(Plain):
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]  # torch's
    def forward(self, x: Tensor) -> Tensor:
        """Run behind a decorator."""
        return self.last(torch.sigmoid(self.first(x)))


class Copied(Sigmoids):
    def __deepcopy__(self, memo: Any) -> Copied:
        """Return a new one."""
        return Copied()


class Registered(Sigmoids):
    def __init_subclass__(cls) -> None:
        """Note whatever is derived."""
        raise AssertionError("a class was derived")


class Meta(type):
    """Another kind of class."""


class Metaclass(Sigmoids, metaclass=Meta):
    """A class of that kind."""


class Abstract(Sigmoids, abc.ABC):
    """A class of a kind that is known."""


def shadowed() -> nn.Module:
    """Return a module with a forward of its own."""
    model = Sigmoids()
    model.forward = model.forward  # type: ignore[method-assign]  # what it is about
    return model


def unreadable() -> nn.Module:
    """Return a module whose source is not there."""
    space: dict[str, Any] = {"Plain": Plain, "torch": torch}
    text = "class Lost(Plain):\n    def forward(self, x):\n        return self.last(torch.tanh(self.first(x)))\n"
    exec(compile(text, "<lost>", "exec"), space)  # noqa: S102  # the text stands above
    return cast("nn.Module", space["Lost"]())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Outside, "the call is not in a plain method of Outside, but in a function from elsewhere"),
        (Derived, "it is the code of Sigmoids, which the class calls as that of its base"),
        (PastTheClass, "it calls the old function past its class"),
        (Decorated, "behind a decorator"),
        (Copied, "Copied says itself how it is copied"),
        (Registered, "Registered does something of its own whenever a class is derived"),
        (Metaclass, "Metaclass has a metaclass"),
        (shadowed, "forward has been replaced on this very module"),
        (unreadable, "its source cannot be found"),
        (
            lambda: Net(lambda net, x: net.b(torch.tanh(net.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 2)),
            "in a function from elsewhere",
        ),
    ],
)
def test_classes_that_cannot_have_other_code_are_refused(make: Callable[[], nn.Module], reason: str) -> None:
    """The reason is said, and nothing is changed."""
    model = make()
    kind, before = type(model), model(X)

    with pytest.raises(UnsupportedModelError, match=reason):
        replace_activations(model, batch=X)
    assert type(model) is kind
    assert torch.equal(model(X), before)


def test_source_that_is_not_what_runs_is_refused() -> None:
    """A file that was changed after it was imported would give other code."""
    text = "class Spelt(Plain):\n    def forward(self, x):\n        return self.last(torch.tanh(self.first(x)))\n"
    model = defined(text, "changed")()
    defined(text.replace("first(x)", "first(-x)"), "changed")

    with pytest.raises(UnsupportedModelError, match="its source is not what runs"):
        replace_activations(model, batch=X)


def test_a_plain_abstract_class_is_fine() -> None:
    """Its metaclass is a known one."""
    assert len(replace_activations(Abstract(), batch=X).changes) == 1


def test_the_encoder_layer_of_torch_keeps_its_function() -> None:
    """Its code is torch's own."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))

    with pytest.raises(UnsupportedModelError, match="relu once as a function, and it is torch's own code"):
        replace_activations(model.train(), "leaky-relu", batch=torch.randn(4, 5, 8))
