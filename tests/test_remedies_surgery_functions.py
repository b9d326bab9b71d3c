"""Activations that code calls as functions: hidden ones are replaced where they stand, everything else stays."""

from __future__ import annotations

import abc
import copy
import inspect
import io
import linecache
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradguard
from gradguard.errors import UnsupportedModelError
from gradguard.remedies.initialization import initialize
from gradguard.remedies.surgery import add_residual, insert_norm, replace_activations, rewritten
from gradguard.remedies.surgery._ledger import Ledger
from tests.models import classification_loss
from tests.surgery import Net

X = torch.linspace(-2.0, 2.0, 5 * 8).reshape(5, 8)


class Plain(nn.Module):
    """Two hidden layers and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)


class Sigmoids(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """Call a function of torch, and a method of a tensor."""
        x = torch.sigmoid(self.first(x))
        return self.last(self.second(x).tanh())


class Leaky(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """Return what the class above is to compute with leaky ReLU."""
        x = F.leaky_relu(self.first(x), 0.01)
        return self.last(F.leaky_relu(self.second(x), 0.01))


def reaction(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    """Return outputs and gradients."""
    output = model(x)
    model.zero_grad()
    output.square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    """Compare bit for bit."""
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def code(model: nn.Module, method: str = "forward") -> str:
    """Return the code that runs."""
    return inspect.getsource(getattr(model, method))


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


def spelt(name: str, write: str) -> type[Plain]:
    """Return a class with a line of code between its layers."""
    lines = ["class Spelt(Plain):", "    def forward(self, x):", "        h = self.first(x)", f"        {write}"]
    return defined("\n".join([*lines, "        return self.last(h)", ""]), name)


def defined(text: str, name: str) -> type[Plain]:
    """Return a class from text, whose source is found as that of a notebook's cell is."""
    filename = f"<{name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    space: dict[str, Any] = {"Plain": Plain, "torch": torch, "F": F, "nn": nn, "Tensor": Tensor, "relu": F.relu}
    exec(compile(text, filename, "exec"), space)  # noqa: S102  # the text stands below
    return space["Spelt"]  # type: ignore[no-any-return]  # of a namespace


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
        ("h = torch.tanh(*[h])", "not known before it runs"),
        ("h = F.relu(h, inplace=bool(1))", "not known before it runs"),
        ("h = h.tanh() * 2.0", "it is a gate"),
        ("h = h.tanh() - 1.0", "goes into sub,"),
        ("h = [f(h) for f in (torch.tanh,)][0]", "called through a variable"),
        ("h = torch.func.vmap(torch.tanh)(h)", "not in a plain method|through a variable|torch's own"),
        ("h = self.last(torch.tanh(h)) @ torch.ones(3, 16); return h.sigmoid()", "it is at the output"),
    ],
)
def test_other_calls_are_refused_with_the_reason(write: str, reason: str) -> None:
    """If in doubt nothing is changed."""
    model = spelt("refused", write)()
    before = model(X)

    if "at the output" in reason:
        assert reason in replace_activations(model, "leaky-relu", batch=X).skipped["forward"]
        return
    with pytest.raises(UnsupportedModelError, match=reason):
        replace_activations(model, "leaky-relu", batch=X)
    assert type(model).__name__ == "Spelt"
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
    @torch.autocast("cpu", enabled=False)
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
    return space["Lost"]()  # type: ignore[no-any-return]  # of a namespace


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


# -------------------------------------------------------------------------------------- modules in modules, and methods


class Block(nn.Module):
    """A block with an attribute that is a function, a method beside forward, and a name mangled by its class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.__first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.act = F.sigmoid

    def _hidden(self, x: Tensor) -> Tensor:
        return self.act(self.__first(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of what comes in and what two layers make of it."""
        return x + F.relu(self.second(self._hidden(x)))


class Blocks(nn.Module):
    """Blocks in a list, checkpointed or not, the last one of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.last = nn.Linear(8, 2)
        self.recompute = False

    def run(self, x: Tensor) -> Tensor:
        """Run the first two."""
        for block in self.blocks[:2]:
            x = torch.tanh(block(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.last(checkpoint(self.run, x, use_reentrant=False) if self.recompute else self.run(x))


def test_every_module_is_changed_by_itself() -> None:
    """Methods, attributes and mangled names; what did not run is said to be left."""
    model = Blocks()

    applied = replace_activations(model, "leaky-relu", batch=X)

    assert [line.partition(":")[0] for line in applied.changes] == [
        "blocks.0._hidden", "blocks.0.forward", "blocks.1._hidden", "blocks.1.forward",
    ]  # fmt: skip
    assert "goes" not in applied.skipped["blocks.2._hidden"]
    assert applied.skipped["blocks.2._hidden"] == "it did not run on the batch"
    assert type(model.blocks[0]) is type(model.blocks[1])
    assert type(model.blocks[2]) is Block
    assert "gradguard_functional" in code(model.blocks[0], "_hidden")
    applied.undo()
    assert {type(block) for block in model.blocks} == {Block}


def test_a_model_that_recomputes_recomputes_with_the_new_function() -> None:
    """Gradients of a checkpointed run are those of a plain one."""
    model = Blocks()
    replace_activations(model, batch=X)
    plain = reaction(model)

    model.recompute = True

    torch.testing.assert_close(reaction(model), plain)


def test_modules_may_be_named() -> None:
    """Then the code of the others stays."""
    model = Blocks()

    applied = replace_activations(model, batch=X, modules=["blocks.1"])

    assert applied.changes == ("blocks.1._hidden: sigmoid once as a function > relu",)
    assert applied.skipped == {}
    with pytest.raises(ValueError, match="'last', which is Linear and no activation"):
        replace_activations(model, batch=X, modules=["last"])


def test_again_and_back() -> None:
    """A second change works on the code of the first; undone one after the other, each is what it was."""
    model, direct = Sigmoids(), Sigmoids()
    first = replace_activations(model, "relu", batch=X)
    once = reaction(model)

    second = replace_activations(model, "leaky-relu", batch=X)

    replace_activations(direct, "leaky-relu", batch=X)
    assert second.changes == ("forward: relu 2 times as a function > leaky_relu",)
    assert_equal(reaction(model), reaction(direct))
    assert_equal(reaction(pickle.loads(pickle.dumps(model))), reaction(direct))  # noqa: S301  # our own
    second.undo()
    assert_equal(reaction(model), once)
    first.undo()
    assert type(model) is Sigmoids


# ----------------------------------------------------------------------------------------------- copies, pickles, modes


def test_copies_run_themselves() -> None:
    """Deep and shallow copies, pickles and saved models: the change is in them, and they use their own weights."""
    model = Sigmoids()
    replace_activations(model, batch=X)
    output = model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)

    copies = [
        copy.deepcopy(model),
        *(pickle.loads(pickle.dumps(model, protocol)) for protocol in range(2, 6)),  # noqa: S301  # our own
        torch.load(buffer, weights_only=False),
        copy.deepcopy(copy.deepcopy(model)),
    ]

    for twin in copies:
        assert type(twin) is type(model)
        assert torch.equal(twin(X), output)
        twin.last = nn.Linear(16, 3)
        assert not torch.equal(twin(X), output)
    assert torch.equal(model(X), output)
    assert torch.equal(copy.copy(model)(X), output)


def test_a_pickle_of_other_code_is_refused() -> None:
    """The class says now something else than when the model was saved."""
    model = Sigmoids()
    replace_activations(model, batch=X)
    change = next(iter(vars(type(model))[key] for key in vars(type(model)) if "rewriting" in key))

    with pytest.raises(UnsupportedModelError, match=r"Leaky\.forward has other code now than when"):
        rewritten.restored(Leaky, change)
    with pytest.raises(UnsupportedModelError, match="is no method"):
        rewritten.restored(nn.Module, rewritten.Rewriting(name="nothing", digest="", function="relu", calls=()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_compiles_as_one_graph() -> None:
    """Without a break, forward and backward."""
    torch.compiler.reset()
    for model in (Sigmoids(), Blocks()):
        replace_activations(model, "leaky-relu", batch=X)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

        torch.testing.assert_close(reaction(compiled), reaction(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_scripted_as_it_runs() -> None:
    """TorchScript reads the code that runs, and not that of the author."""
    model = Sigmoids()
    replace_activations(model, batch=X)

    assert torch.equal(torch.jit.script(model)(X), model(X))


def test_other_ways_to_call_it() -> None:
    """Directly, in evaluation mode, under autocast, and with weights given by hand."""
    model, twin = Sigmoids(), Leaky()
    replace_activations(model, "leaky-relu", batch=X)

    assert torch.equal(model.forward(X), twin(X))
    assert torch.equal(model.eval()(X), twin(X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(X), twin(X))
    weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert float(torch.func.functional_call(model, weights, (X,)).abs().sum()) == 0.0


def test_a_failure_while_classes_change_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the modules have been changed when it fails."""
    model = Blocks()
    before, count = model(X), 0
    original = Ledger.set_attribute

    def fail(self: Ledger, *args: Any) -> None:
        nonlocal count
        count += 1
        original(self, *args)
        if count == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "set_attribute", fail)
    with pytest.raises(KeyboardInterrupt):
        replace_activations(model, "leaky-relu", batch=X)
    assert {type(block) for block in model.blocks} == {Block}
    assert torch.equal(model(X), before)


# ----------------------------------------------------------------------------------------------------- what comes after


def test_other_operations_see_the_new_function() -> None:
    """Weights are drawn for it, norms are inserted before it, and blocks of one class are still blocks."""
    model, twin = Sigmoids(), Leaky()

    applied = replace_activations(model, "leaky-relu", batch=X, initialize_layers=True, generator=3)

    initialize(twin, "he", batch=X, modules=["first", "second"], generator=3)
    assert set(applied.changed) == {f"{name}.{kind}" for name in ("first", "second") for kind in ("weight", "bias")}
    assert_equal(reaction(model), reaction(twin))
    assert insert_norm(model, batch=X).changes == insert_norm(twin, batch=X).changes
    assert_equal(reaction(model), reaction(twin))
    blocks = Blocks()
    replace_activations(blocks, batch=X, modules=["blocks.0"])
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0, blocks\.1: there is a path around it already"):
        add_residual(blocks, batch=X)  # of one class still, and not each the only one of its own


def test_a_deep_net_of_functions_passes_gradients_afterwards() -> None:
    """Twelve sigmoids in code vanish the gradient; with ReLU and weights drawn for it, no more."""
    torch.manual_seed(0)
    model, data = Deep(), (X, torch.zeros(5, dtype=torch.long))
    before = gradguard.check(model, data, classification_loss)

    applied = gradguard.apply("relu", model, batch=X)

    after = gradguard.check(model, data, classification_loss)
    assert applied.changes[0] == "forward: sigmoid 12 times as a function > relu"
    assert "GG101" in {finding.code for finding in before.findings}
    assert "GG101" not in {finding.code for finding in after.findings}


class Deep(nn.Module):
    """Twelve layers with sigmoids as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8 if i == 0 else 32, 32) for i in range(12))
        self.last = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return self.last(x)
