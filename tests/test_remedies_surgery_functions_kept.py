"""Models whose functions in code were replaced: in modules in modules, copied, pickled, compiled, changed again."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, cast

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
from tests.functions import Leaky, Sigmoids, X, assert_equal, code, reaction
from tests.models import classification_loss

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


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Return what is not negative, as a module of the author's own."""
        return F.relu(x)


def test_a_function_in_an_activation_of_the_authors_own_is_replaced_there() -> None:
    """It neither saturates nor grows, so that the module stays; one of torch's that calls a function is replaced."""
    model = nn.Sequential(nn.Linear(8, 8), Own(), nn.Linear(8, 8), nn.Threshold(0.1, 0.0), nn.Linear(8, 2))

    applied = replace_activations(model, "leaky-relu", batch=X)

    assert applied.changes == ("1.forward: relu once as a function > leaky_relu", "3: Threshold > LeakyReLU")
    assert float(model[1](torch.tensor(-1.0))) == pytest.approx(-0.01)


def made_inside(act: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a module of a class that is defined in a function, with a base and names from around it."""
    width = 8

    class Base(nn.Module):
        def around(self, x: Tensor) -> Tensor:
            """Add a number."""
            return x + 1.0

    class Inside(Base):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(width, width), nn.Linear(width, 2)

        def around(self, x: Tensor) -> Tensor:
            """Call a function from around the class, and the method of the base."""
            return super().around(act(self.first(x)).reshape(-1, width))

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            """Return what the last layer makes of it."""
            return self.last(self.around(x)) * scale

    torch.manual_seed(0)
    return Inside()


def test_classes_inside_functions_keep_what_is_around_them() -> None:
    """Variables of the function, ``super()`` and defaults."""
    model, twin = made_inside(torch.tanh), made_inside(F.relu)

    replace_activations(model, batch=X)

    assert_equal(reaction(model), reaction(twin))
    assert torch.equal(model(X, scale=2.0), twin(X, scale=2.0))


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
    models: tuple[nn.Module, ...] = (Sigmoids(), Blocks())
    for model in models:
        replace_activations(model, "leaky-relu", batch=X)
        compiled = cast("nn.Module", torch.compile(model, backend="aot_eager", fullgraph=True))

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

    drawn = ("first", "second", "last")
    initialize(twin, "he", batch=X, modules=drawn, generator=3)
    assert set(applied.changed) == {f"{name}.{kind}" for name in drawn for kind in ("weight", "bias")}
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
