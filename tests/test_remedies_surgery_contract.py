"""What every operation of surgery promises, whatever it does and whatever the model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguard.errors import UnsupportedModelError
from gradguard.remedies import Applied
from gradguard.remedies.initialization import initialize
from gradguard.remedies.surgery import (
    _activations,
    add_normalized_residual,
    add_qk_norm,
    add_residual,
    insert_norm,
    rename,
    replace_activations,
    standardize_input,
    swap_recurrent,
)
from gradguard.remedies.surgery._ledger import Ledger
from tests import surgery
from tests.driving import count_hooks
from tests.models import classification_loss

MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "mlp": lambda: surgery.head(64),
    "conv": surgery.ConvClassifier,
    "residual": surgery.ResidualClassifier,
    "functions": surgery.FunctionalClassifier,
    "recurrent": surgery.RecurrentClassifier,
    "transformer": surgery.TransformerClassifier,
}

OPERATIONS: Mapping[str, tuple[Callable[..., Applied], dict[str, Any], tuple[str, ...]]] = {
    "layer norm": (insert_norm, {"kind": "layer"}, tuple(MODELS)),
    "batch norm": (insert_norm, {"kind": "batch"}, tuple(MODELS)),
    "group norm": (insert_norm, {"kind": "group"}, ("mlp", "conv")),
    "rms norm": (insert_norm, {"kind": "rms"}, ("mlp", "conv")),
    "layer norm after": (insert_norm, {"kind": "layer", "where": "after"}, ("mlp", "conv")),
    "standardize input": (standardize_input, {}, ("mlp", "conv")),
    "leaky relu": (replace_activations, {"to": "leaky-relu"}, ("mlp", "functions", "conv")),
    "relu, drawn anew": (replace_activations, {"to": "relu", "initialize_layers": True}, tuple(MODELS)),
    "residual": (add_residual, {}, tuple(MODELS)),
    "residual, batch norm": (add_normalized_residual, {}, ("mlp", "conv")),
    "residual, function kept": (add_residual, {"preserve": True}, tuple(MODELS)),
    "gru": (swap_recurrent, {"to": "gru"}, ("recurrent",)),
    "lstm": (swap_recurrent, {"to": "lstm"}, ("recurrent",)),
    "qk norm": (add_qk_norm, {}, ("transformer",)),
    "qk norm, rms": (add_qk_norm, {"kind": "rms"}, ("transformer",)),
}
"""Operation, arguments, and the models that it can be done to."""

PAIRS = [(operation, model) for operation, (_, _, models) in OPERATIONS.items() for model in models]
EACH = [(operation, models[-1]) for operation, (_, _, models) in OPERATIONS.items()]
REPLACED = {"gru", "lstm"}
"""Operations that put new weights in the place of old ones."""

every_pair = pytest.mark.parametrize(("operation", "model"), PAIRS)
every_operation = pytest.mark.parametrize(("operation", "model"), EACH)


def make(name: str, seed: int = 0) -> nn.Module:
    """Return a model with reproducible weights."""
    torch.manual_seed(seed)
    return MODELS[name]()


def operate(name: str, model: nn.Module, **more: Any) -> Applied:
    """Do an operation to a model."""
    function, arguments, _ = OPERATIONS[name]
    return function(model, batch=surgery.batch(), compute_loss=classification_loss, **arguments, **more)


def trained(model: nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    """Return an Adam that has made some steps, with weight decay in one group and not in the other."""
    named = dict(model.named_parameters())
    optimizer = torch.optim.Adam(
        [
            {"params": [p for n, p in named.items() if not n.endswith("bias")], "weight_decay": 1e-3},
            {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    train(model, optimizer, steps)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Train on one batch and return the losses."""
    losses = []
    for _ in range(steps):
        loss = classification_loss(model, surgery.batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class Picture:
    """A model and its optimizer as they are: every value, every module and every hook."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.state = copy.deepcopy(model.state_dict())
        self.ids = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        self.modules = {
            name: (id(module), module.training, type(module), sorted(vars(module)))
            for name, module in model.named_modules()
        }
        self.hooks = count_hooks(model)
        self.groups = [] if optimizer is None else [[id(p) for p in g["params"]] for g in optimizer.param_groups]
        self.optimizer = None if optimizer is None else copy.deepcopy(optimizer.state_dict())

    def assert_same(self, other: Picture) -> None:
        """Compare bit for bit."""
        assert_same_state(self.state, other.state)
        assert self.ids == other.ids
        assert self.modules == other.modules
        assert self.hooks == other.hooks
        assert self.groups == other.groups
        if self.optimizer is not None and other.optimizer is not None:
            assert self.optimizer["param_groups"] == other.optimizer["param_groups"]
            assert self.optimizer["state"].keys() == other.optimizer["state"].keys()
            for key, entry in self.optimizer["state"].items():
                assert_same_state(entry, other.optimizer["state"][key])


def assert_same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Compare two state dicts bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@every_pair
def test_a_dry_run_says_the_same_and_changes_nothing(operation: str, model: str) -> None:
    """Its words are those of the real thing; the model, the optimizer and the random state stay as they are."""
    net = make(model)
    optimizer = trained(net)
    before, random = Picture(net, optimizer), torch.get_rng_state()

    plan = operate(operation, net, optimizer=optimizer, dry_run=True)

    before.assert_same(Picture(net, optimizer))
    assert torch.equal(torch.get_rng_state(), random)
    assert not plan.changed
    plan.undo()
    before.assert_same(Picture(net, optimizer))
    real = operate(operation, net, optimizer=optimizer)
    named = [line.partition(":")[0] for line in real.changes]
    assert [line.partition(":")[0] for line in plan.changes] == named
    assert plan.skipped == {name: why for name, why in real.skipped.items() if name in plan.skipped}


@every_pair
def test_each_change_is_where_it_is_said_to_be(operation: str, model: str) -> None:
    """Each line begins with a module that is another now, or whose weights are, or with a method that has other code.

    The others are the same objects.
    """
    net = make(model)
    modules = dict(net.named_modules())
    kinds = {name: type(module) for name, module in modules.items()}
    state = copy.deepcopy(net.state_dict())

    applied = operate(operation, net)

    said = {line.partition(":")[0] for line in applied.changes}
    after = dict(net.named_modules())
    now = net.state_dict()
    methods = {name for name in said if name not in after}
    for name in methods:
        place, _, method = name.rpartition(".")
        assert getattr(type(after[place]), method) is not getattr(kinds[place], method), name
    changed = {place for place, module in after.items() if place in kinds and modules[place] is module}
    assert {n.rpartition(".")[0] for n in methods} == {p for p in changed if type(after[p]) is not kinds[p]}
    for name in said - methods:
        new = after[name] is not modules[name]
        drawn = any(k.startswith(f"{name}.") and k in now and not torch.equal(v, now[k]) for k, v in state.items())
        assert new or drawn, name
    replaced = {name for name, module in modules.items() if after.get(name) is not module}
    assert all(any(name == s or name.startswith(f"{s}.") for s in said) or not _has_weights(modules[name])
               for name in replaced)  # fmt: skip


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


@every_pair
def test_an_old_checkpoint_is_loaded_by_the_map_of_names(operation: str, model: str) -> None:
    """Each old name leads to a new one, except where a weight is gone; what is missing then is what was added."""
    net, old = make(model), make(model, seed=1).state_dict()

    applied = operate(operation, net)

    gone = old.keys() - applied.names.keys()
    assert all(name.startswith("rnn.") for name in gone)
    assert bool(gone) == (operation in REPLACED)
    result = net.load_state_dict(rename(old, applied.names), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= set(applied.changed)
    for name, new in applied.names.items():
        assert torch.equal(net.state_dict()[new], old[name]), name


@every_pair
def test_what_was_changed_is_named(operation: str, model: str) -> None:
    """``changed`` holds the new names, and those whose values are others; no others."""
    net = make(model)
    before = copy.deepcopy(net.state_dict())

    applied = operate(operation, net)

    now = net.state_dict()
    back = {new: old for old, new in applied.names.items()}
    expected = {name for name, value in now.items() if name not in back or not torch.equal(value, before[back[name]])}
    assert set(applied.changed) == expected


@every_pair
def test_the_optimizer_goes_on(operation: str, model: str) -> None:
    """It holds each parameter once, keeps the state of what has not changed, and trains."""
    net = make(model)
    optimizer = trained(net)
    kept = {id(p): (p, copy.deepcopy(entry)) for p, entry in optimizer.state.items()}

    applied = operate(operation, net, optimizer=optimizer)

    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    assert len(optimizer.param_groups) == 2
    fresh = set(applied.changed)
    for name, parameter in net.named_parameters():
        if name in fresh:
            assert parameter not in optimizer.state, name
        else:
            assert_same_state(optimizer.state[parameter], kept[id(parameter)][1])
    assert all(id(p) in held for p in optimizer.state)
    values = copy.deepcopy(net.state_dict())
    losses = train(net, optimizer, 40)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(values[name], p) for name, p in net.named_parameters() if name in fresh)


@every_pair
def test_undo_restores_every_bit(operation: str, model: str) -> None:
    """Also after training, of the model as well as of the optimizer; a second time it does nothing."""
    net = make(model)
    optimizer = trained(net)
    before = Picture(net, optimizer)
    output = net.eval()(surgery.batch()[0])
    net.train()

    applied = operate(operation, net, optimizer=optimizer)
    train(net, optimizer, 3)
    assert applied.undo() is net

    before.assert_same(Picture(net, optimizer))
    assert torch.equal(net.eval()(surgery.batch()[0]), output)
    net.train()
    after = train(net, optimizer, 2)
    moved = Picture(net, optimizer)
    applied.undo()
    moved.assert_same(Picture(net, optimizer))
    twin = make(model)
    again = trained(twin)
    assert after == train(twin, again, 2)


@every_pair
def test_the_model_is_copied_and_pickled(operation: str, model: str) -> None:
    """Copies and pickles compute the same, in either mode, and saved weights load into them."""
    net = make(model)
    operate(operation, net)
    net.eval()
    x = surgery.batch()[0]

    twin, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))  # noqa: S301  # our own

    assert torch.equal(twin(x), net(x))
    assert torch.equal(pickled(x), net(x))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    assert twin.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        inference = net(x)
    torch.testing.assert_close(inference, net(x), rtol=1e-4, atol=1e-5)


@every_operation
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_model_compiles(operation: str, model: str) -> None:
    """The compiled model computes the same."""
    torch.compiler.reset()
    net = make(model)
    operate(operation, net)
    x = surgery.batch()[0]

    compiled = torch.compile(net, backend="eager")

    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@every_pair
def test_it_is_deterministic(operation: str, model: str) -> None:
    """The same again gives the same bits, whatever the random state, which is left alone."""
    one, other = make(model), make(model)
    torch.manual_seed(5)
    operate(operation, one)
    random = torch.get_rng_state()
    torch.manual_seed(6)
    operate(operation, other)

    assert_same_state(one.state_dict(), other.state_dict())
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), random)


@every_pair
def test_modes_and_types_are_those_of_the_model(operation: str, model: str) -> None:
    """What is new stands in the mode, in the type and on the device of what it stands with; no hook is left."""
    net = make(model).double().eval()
    batch = (surgery.batch()[0].double(), surgery.batch()[1])
    function, arguments, _ = OPERATIONS[operation]

    function(net, batch=batch, compute_loss=classification_loss, **arguments)

    assert not any(module.training for module in net.modules())
    assert {t.dtype for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")} == {torch.float64}
    assert count_hooks(net) == 0


STAGES = ("replace", "place", "train_beside", "inherit", "set_attribute", "_carry_over")


@every_pair
def test_a_failure_in_the_middle_leaves_everything(operation: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call of the ledger fails, first or later, after it has done its work: every bit is as it was."""
    failed = 0
    for stage in STAGES:
        for after, error in ((1, RuntimeError("out of memory")), (2, KeyboardInterrupt())):
            net = make(model)
            optimizer = trained(net)
            before = Picture(net, optimizer)
            count = 0
            original = getattr(Ledger, stage)

            def fail(
                self: Ledger,
                *args: Any,
                _original: Any = original,
                _after: int = after,
                _error: BaseException = error,
                **keywords: Any,
            ) -> None:
                nonlocal count
                _original(self, *args, **keywords)
                count += 1
                if count == _after:
                    raise _error

            with monkeypatch.context() as patch:
                patch.setattr(Ledger, stage, fail)
                try:
                    operate(operation, net, optimizer=optimizer)
                except (RuntimeError, KeyboardInterrupt) as caught:
                    failed += 1  # not every operation comes to every stage
                    notes, same = caught.__notes__, caught is error
                    assert same
                    assert "as they were" in notes[-1]
                    before.assert_same(Picture(net, optimizer))
    assert failed >= 1


def test_a_failure_of_new_weights_leaves_the_old_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU with new weights is two operations; if the second fails, the first is undone."""
    net = make("mlp")
    optimizer = trained(net)
    before = Picture(net, optimizer)

    def fail(*args: Any, **keywords: Any) -> None:
        initialize(*args, **keywords)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_activations, "initialize", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        operate("relu, drawn anew", net, optimizer=optimizer)

    before.assert_same(Picture(net, optimizer))


@every_operation
@pytest.mark.parametrize("kind", ["scripted", "compiled", "compiled in place", "parallel"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrapped_models_are_refused(operation: str, model: str, kind: str) -> None:
    """The error says that the change comes first."""
    net = make(model)
    if kind == "scripted":
        net.add_module("tail", torch.jit.script(net.get_submodule("tail")))
        wrapped: Any = net
    elif kind == "compiled":
        wrapped = torch.compile(net, backend="eager")
    elif kind == "compiled in place":
        net.compile(backend="eager")
        wrapped = net
    else:
        wrapped = nn.DataParallel(net)
    before = copy.deepcopy(net.state_dict())

    with pytest.raises(UnsupportedModelError, match=r"Change the model before|Change the\s+model before"):
        operate(operation, wrapped)
    assert_same_state(before, net.state_dict())


@every_operation
def test_an_optimizer_of_something_else_is_refused(operation: str, model: str) -> None:
    """An optimizer that holds none of the parameters, or something that is none."""
    net, other = make(model), make(model)
    before = Picture(net)

    with pytest.raises(UnsupportedModelError, match="none of them belongs to this"):
        operate(operation, net, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        operate(operation, net, optimizer="adam")
    before.assert_same(Picture(net))


@every_operation
def test_a_model_that_fails_is_left_alone(operation: str, model: str) -> None:
    """A batch that the model cannot take gives the model's own error, and nothing is changed."""
    net = make(model)
    before = Picture(net)
    function, arguments, _ = OPERATIONS[operation]

    with pytest.raises(RuntimeError, match="shape") as caught:
        function(net, batch=torch.zeros(3, 5), **arguments)
    assert "called with the batch" in "".join(caught.value.__notes__)
    before.assert_same(Picture(net))


@every_operation
def test_unknown_names_and_kinds_are_refused(operation: str, model: str) -> None:
    """The error says what is known."""
    net = make(model)
    before = Picture(net)
    function, arguments, _ = OPERATIONS[operation]

    with pytest.raises(ValueError, match="modules names 'nowhere'"):
        function(net, batch=surgery.batch(), compute_loss=classification_loss, modules=["nowhere"], **arguments)
    for option in {"kind", "to", "where"} & arguments.keys():
        with pytest.raises(ValueError, match=f"{option} must be one of"):
            function(net, batch=surgery.batch(), **{**arguments, option: "unknown"})
    before.assert_same(Picture(net))
