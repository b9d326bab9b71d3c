"""Residual connections around blocks that have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard.errors import UnsupportedModelError
from gradguard.monitors._describe import clean_name, describe
from gradguard.remedies._applied import Applied
from gradguard.remedies.initialization._custom import is_activation
from gradguard.remedies.initialization._trace import Trace
from gradguard.remedies.surgery._ledger import Ledger
from gradguard.remedies.surgery._operate import Edit, checked, operate
from gradguard.remedies.surgery._survey import Call, Survey, affine, chosen, pass_over, survey
from gradguard.remedies.surgery.modules import Normalized, Residual
from gradguard.remedies.surgery.rewritten import author_class

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["add_residual"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """What gets a path around it: one module, or a run of children of one nn.Sequential.

    Attributes:
        name: Where it stands, for people.
        members: The module, or the run of children in order.
        parent: The nn.Sequential; ``None`` for one module, replaced wherever it stands.
        keys: The children's keys there.
    """

    name: str
    members: tuple[nn.Module, ...]
    parent: nn.Module | None = None
    keys: tuple[str, ...] = ()


def add_residual(  # all are keywords with defaults
    model: nn.Module,
    *,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
    modules: Iterable[str] | None = None,
    preserve: bool = False,
    scaled: bool = False,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    dry_run: bool = False,
) -> Applied:
    """Add a path around each block: the identity, or a projection where shapes differ. In place.

    Blocks are runs of layer, normalization and activation in ``nn.Sequential``, and modules of the user's own classes
    that hold layers, take one tensor and return one; or those named. A block that has a path around it already is left
    alone.

    ==================  ================================================================  ==========================
    ``preserve``        what a block computes                                             starts as
    ==================  ================================================================  ==========================
    ``False``           ``x + branch * block(x)``, or ``projection(x) + ...``             the path: branch is 0, the
                                                                                          projection copies features
    ``True``            ``block(x) + gate * x``, or ``block(x) + projection(x)``          the block: gate and
                                                                                          projection are 0
    ==================  ================================================================  ==========================

    The trade-off: as it is by default the gradient passes from the first step on, and what the blocks had learnt is out
    of play until their scalars have grown. With ``preserve=True`` the model computes at first exactly what it did, and
    a gradient that vanishes goes on vanishing until the gates have opened, the last block's first. Measured on digits
    with 20 sigmoid layers, 300 steps: accuracy 0.10 without a path and with ``preserve=True``, 0.98 (Adam) and 0.99
    (SGD) with ``preserve=False``. So the default is for a deep net that does not begin to learn, ``preserve=True`` for
    one that has learnt.

    Args:
        model: The model, changed in place.
        batch: A batch to run once, which shows shapes and what has a path around it; may be left out for a plain
            ``nn.Sequential`` of Linear layers.
        compute_loss: Where the batch holds more than the model's inputs: called as ``compute_loss(model, batch)``.
        modules: Names of modules that take one tensor and return one, in place of the blocks found.
        preserve: Whether the model is to compute the same at first; see above.
        scaled: Whether, without ``preserve``, the blocks' own outputs start at one over the root of their number and
            not at 0. They learn from the first step on, and their sum stays of one size at any depth, provided that
            each is: where they are normalized.
        optimizer: The optimizer or optimizers; what is new joins the group of the block's bias, or weight.
        dry_run: Say what would be done and change nothing.

    Returns:
        What was done, with the new names of the parameters; ``.undo()`` puts everything back.

    Raises:
        ValueError: If an argument is unknown.
        UnsupportedModelError: If a named module cannot have a path around it, or there is no block.

    Source:
        He, Zhang, Ren, Sun (2016), arXiv 1512.03385, section 3.2, for identity and projection; Bachlechner et al.
        (2021), "ReZero is All You Need", UAI, arXiv 2003.04887, for the branch that starts at 0; De and Smith (2020),
        NeurIPS, arXiv 2002.10444, for one over the root of the depth; the gate on the path that starts at 0 is ours.
    """
    optimizers = checked(model, optimizer)
    named = chosen(model, modules)
    found = survey(model, batch, compute_loss)
    edits: list[Edit] = []
    skipped: dict[str, str] = {}
    if named is None:
        blocks = _found(found, skipped)
    else:
        blocks = [_Block(name=name, members=(module,)) for name, module in named.items()]
    planned: list[tuple[_Block, Callable[[], nn.Module], str]] = []
    for block in blocks:
        skip, what = _around(found, block, preserve=preserve)
        if skip is None:
            if named is not None:
                raise UnsupportedModelError(f"{block.name} cannot have a path around it: {what}")
            skipped[block.name] = what
        else:
            planned.append((block, skip, what))
    branch = len(planned) ** -0.5 if scaled and planned else 0.0
    for block, skip, what in planned:
        kinds = ", ".join(describe(m).kind for m in block.members)
        starts = (
            f"that starts at 0 around {kinds}"
            if preserve
            else f"around {kinds}, whose own output starts at {branch:.2g}"
        )
        words = f"{block.name}: {what} {starts}"
        edits.append(Edit(words=words, make=partial(_insert, block, skip, preserve=preserve, branch=branch)))
    return operate(
        "residual", model, optimizers, edits, skipped, dry_run=dry_run, batch=batch, compute_loss=compute_loss
    )


def _found(found: Survey, skipped: dict[str, str]) -> list[_Block]:
    """Return the blocks in the order of the model's modules, none inside another.

    Of the user's own classes those count that the model has several modules of: a lone one may be the whole net.
    """
    kinds = Counter(author_class(module) for name, module in found.model.named_modules() if name and _own_block(module))
    inside = {*pass_over(found.model)}
    inside |= {id(m) for outer in found.model.modules() if isinstance(outer, Residual) for m in outer.modules()}
    blocks: list[_Block] = []
    for raw, module in found.model.named_modules():
        name = clean_name(raw)
        if id(module) in inside or isinstance(module, Normalized):
            continue
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            blocks += _runs(name, module)
        elif raw and _own_block(module) and kinds[author_class(module)] == 1:
            skipped[name] = f"it is the only {type(module).__name__}; if it is a block, name it in modules="
        elif raw and _own_block(module):
            blocks.append(_Block(name=name, members=(module,)))
    if not blocks and not skipped:
        skipped[type(found.model).__name__] = (
            "it has neither a run of layer and activation in an nn.Sequential nor several blocks of one class; name "
            "the modules to put a path around in modules="
        )
    return blocks


def _layer(module: nn.Module) -> bool:
    return affine(module) or (isinstance(module, Normalized) and affine(module.layer))


def _runs(name: str, parent: nn.Sequential) -> list[_Block]:
    """Return the runs of layer, then anything of one input and one output, then activation, and dropout behind it."""
    runs: list[_Block] = []
    run: list[tuple[str, nn.Module]] = []
    for key, child in [*parent._modules.items(), ("", None)]:
        if run and _ends(run) and not isinstance(child, nn.Dropout):
            keys = tuple(key for key, _ in run)
            title = f"{name}.{keys[0]}".lstrip(".")
            runs.append(_Block(name=title, members=tuple(m for _, m in run), parent=parent, keys=keys))
            run = []
        if child is None:
            break
        role = _role(child)
        if _layer(child):
            run = [(key, child)]
        elif run and (role in {"norm", "activation"} or isinstance(child, (nn.Dropout, nn.Identity))):
            run.append((key, child))
        else:
            run = []
    return runs


def _ends(run: Sequence[tuple[str, nn.Module]]) -> bool:
    return any(_role(module) == "activation" for _, module in run)


def _role(module: nn.Module) -> str:
    inner = module.layer if isinstance(module, Normalized) else module
    return "activation" if is_activation(inner) else describe(inner).role


def _own_block(module: nn.Module) -> bool:
    """Whether a module is of a class of the user's own, holds layers of its own and no such block again."""
    own = not type(module).__module__.startswith("torch.nn") and not isinstance(module, Residual)
    holds = any(affine(child) for child in module.children())
    again = any(child is not module and _own_block(child) for child in module.modules())
    return own and holds and not again


def _around(found: Survey, block: _Block, *, preserve: bool) -> tuple[Callable[[], nn.Module] | None, str]:
    """Return what makes the path around a block and how to call it, or ``None`` and what stands in the way."""
    reason = _why_not(found, block)
    if reason is not None:
        return None, reason
    if found.trace is None:
        return _by_attributes(block, preserve=preserve)
    first, last = found.calls_of(block.members[0])[0], found.calls_of(block.members[-1])[0]
    given, made = first.given_shape, last.made_shape
    if given == made:
        return nn.Identity, "an identity path"
    if len(given) != len(made):
        return None, f"shapes do not allow it: it takes {list(given)} and returns {list(made)}"
    layers = [m for member in block.members for m in member.modules() if affine(m)]
    if layers and all(isinstance(layer, nn.Linear) for layer in layers) and given[:-1] == made[:-1]:
        return _linear(given[-1], made[-1], layers[0], preserve=preserve)
    sizes, results = given[2:], made[2:]
    if layers and all(not isinstance(layer, nn.Linear) for layer in layers) and given[0] == made[0]:
        strides = tuple(max(1, -(-size // result)) for size, result in zip(sizes, results, strict=True))
        fits = all((size - 1) // s + 1 == r for size, s, r in zip(sizes, strides, results, strict=True))
        if fits and 1 <= len(sizes) <= 3:
            return _pointwise(given[1], made[1], strides, layers[0], preserve=preserve)
    return None, f"shapes do not allow it: it takes {list(given)} and returns {list(made)}"


def _by_attributes(block: _Block, *, preserve: bool) -> tuple[Callable[[], nn.Module] | None, str]:
    layers = [m for member in block.members for m in member.modules() if affine(m)]
    if not all(isinstance(layer, nn.Linear) for layer in layers) or not layers:
        return None, "shapes behind a convolution are known only from a forward pass: pass batch="
    takes, gives = layers[0].in_features, layers[-1].out_features
    if takes == gives:
        return nn.Identity, "an identity path"
    return _linear(int(takes), int(gives), layers[0], preserve=preserve)  # type: ignore[arg-type]  # a Linear's sizes


def _why_not(found: Survey, block: _Block) -> str | None:
    trainable = any(p.requires_grad for m in block.members for p in m.parameters())
    if any(isinstance(m, Residual) for m in block.members):
        return "it has one already"
    if not trainable:
        return (
            "it is frozen (requires_grad is False)"
            if any(True for _ in block.members[0].parameters())
            else ("it has no parameters")
        )
    if id(block.members[0]) in (inside := pass_over(found.model)):
        return inside[id(block.members[0])]
    if block.parent is not None:
        places = sum(child is m for m in block.members for other in found.model.modules() for child in other.children())
        if places != len(block.members):
            return "one of its modules stands at several places"
    if found.trace is None:
        return None
    calls = [found.calls_of(member) for member in block.members]
    if any(len(own) != 1 for own in calls):
        number = next(len(own) for own in calls if len(own) != 1)
        return "it did not run on the batch" if not number else f"it runs {number} times per pass"
    return _no_path(found, calls[0][0], calls[-1][0])


def _no_path(found: Survey, first: Call, last: Call) -> str | None:
    """Return why no path can go from the input of the first call to the output of the last."""
    if first.given is None or last.made is None:
        return "it does not take one tensor and return one"
    if first.in_place:
        return "it changes its input in place, so that there is nothing left to add"
    trace, outputs = found.trace, [call.made for call in found.calls_of(found.model) if call.made is not None]
    if trace is None:
        return None
    # Targets of the loss are inputs too: only what the model's own output is made of counts.
    own = trace.ancestors(outputs[0]) if outputs else set(range(len(trace.ops)))
    if _bridged(trace, own, first.given, last.made):
        return "there is a path around it already"
    return None


def _bridged(trace: Trace, own: set[int], start: int, end: int) -> bool:
    """Whether a path goes around a block already, inside it or outside.

    That is a way without layers to the block's output or what is made of it, or a way without activations to a sum with
    something that has passed one: a projection.

    Args:
        trace: The operations.
        own: Those of which the model's output is made.
        start: Behind the block's input.
        end: Behind its output.
    """
    if start == end:
        return True
    behind = (trace.descendants(end) | {end}) & own
    if _reach(trace, start, own, "layer") & behind:
        return True
    around = behind | trace.ancestors(end)
    below = trace.descendants(start)
    return any(
        len(trace.ops[index].operands) == 2
        and trace.ops[index].kind == "sum"
        and any(trace.ops[i].kind == "activation" for i in trace.ancestors(index) & below)
        for index in _reach(trace, start, own, "activation") & around
    )


def _reach(trace: Trace, start: int, own: set[int], wall: str) -> set[int]:
    """Return the operations that depend on one by a way without operations of a kind."""
    seen: set[int] = set()
    stack = [start]
    while stack:
        found = [i for i in trace.children[stack.pop()] if i in own and i not in seen and trace.ops[i].kind != wall]
        seen.update(found)
        stack += found
    return seen


def _linear(takes: int, gives: int, like: nn.Module, *, preserve: bool) -> tuple[Callable[[], nn.Module], str]:
    return partial(_projection, partial(nn.Linear, takes, gives, bias=False), like, preserve=preserve), (
        f"a projection {takes}>{gives}"
    )


def _pointwise(
    takes: int, gives: int, strides: tuple[int, ...], like: nn.Module, *, preserve: bool
) -> tuple[Callable[[], nn.Module], str]:
    kinds: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    make = partial(kinds[len(strides) - 1], takes, gives, 1, stride=strides, bias=False)
    stride = "" if set(strides) == {1} else f", stride {'x'.join(str(s) for s in strides)}"
    return partial(_projection, make, like, preserve=preserve), f"a projection {takes}>{gives} (1x1{stride})"


def _projection(make: Callable[[], nn.Module], like: nn.Module, *, preserve: bool) -> nn.Module:
    """Return a projection of 0, or one that copies features in turn, so that each is passed on at its own size."""
    with torch.random.fork_rng(devices=[]):
        new = make()
    own = next(p for p in like.parameters() if p.is_floating_point())
    weight = new.weight
    assert isinstance(weight, torch.Tensor)  # noqa: S101  # a Linear's or a convolution's
    with torch.no_grad():
        weight.zero_()
        if not preserve:
            gives, takes = weight.shape[:2]
            rows = torch.arange(gives)
            weight[rows, rows % takes] = 1.0
    return new.to(device=own.device, dtype=own.dtype)


def _insert(block: _Block, make: Callable[[], nn.Module], kept: Ledger, *, preserve: bool, branch: float) -> nn.Module:
    skip = make()
    identity = isinstance(skip, nn.Identity)
    inner = block.members[0]
    if block.parent is not None and len(block.members) > 1:
        inner = nn.Sequential(*block.members)
        inner.training = block.members[0].training  # not train(), which would set the members' own modes
    gate = 0.0 if preserve and identity else None
    new = Residual(inner, skip, gate=gate, branch=None if preserve else branch)
    if block.parent is None:
        kept.replace(inner, new)
    else:
        kept.place(block.parent, block.keys[0], new)
        for key, member in zip(block.keys[1:], block.members[1:], strict=True):
            kept.place(block.parent, key, nn.Identity().train(member.training))
    kept.train_beside(new, inner)
    return new
