"""A skip connection around each layer and its activation, in chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from gradguard.monitors._describe import clean_name, describe
from gradguard.remedies._applied import Applied, tensor_names, transaction
from gradguard.remedies.initialization._targets import check_arguments, finish

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Residual", "add_residual"]

_SHORTEST = 2
"""Layers of the same width in a row from which skips are added. Ours: one skip alone shortens nothing."""


class Residual(nn.Module):
    """Modules in a row with a skip connection around them: ``x + branch(x)``.

    Attributes:
        branch: The modules, whose parameters are now named ``branch.<index>.<name>``.
    """

    def __init__(self, *modules: nn.Module) -> None:
        """Put a skip connection around modules."""
        super().__init__()
        self.branch = nn.Sequential(*modules)
        self.training = modules[0].training

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch's output to its input."""
        output: Tensor = x + self.branch(x)
        return output


def add_residual(
    model: nn.Module,
    *,
    batch: Any = None,  # every remedy is called alike; chains are seen without one
    compute_loss: Callable[[Any, Any], Any] | None = None,  # as above
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Applied:
    """Put an identity skip around each layer with its normalization and activation, in every ``nn.Sequential``.

    The gradient then has a way past every activation. The function of the model changes at once, and so does its
    scale: each block adds to the stream. A piece is wrapped where its layer has as many outputs as inputs (a
    convolution also keeps its size); pieces of another shape stay as they are. Code of a hand-written ``forward``
    cannot be rewritten.

    Args:
        model: The model, changed in place; the first module of each piece becomes a :class:`Residual`, the others
            ``nn.Identity``, so that every other module keeps its name.
        batch: Not needed.
        compute_loss: Not needed.
        optimizer: Checked; it holds the same parameters as before.

    Returns:
        What was done, with the new names of the parameters; ``.undo()`` puts it back.

    Raises:
        UnsupportedModelError: If no piece of the model can be wrapped; the message says why.

    Source: He, Zhang, Ren, Sun (2016), "Deep Residual Learning for Image Recognition", CVPR, arXiv 1512.03385.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> print(add_residual(model).changes[0])
        0 to 1: a skip connection around Linear 8>8, Tanh
    """
    optimizers = check_arguments(model, optimizer)
    before = tensor_names(model)
    skipped: dict[str, str] = {}
    changes = []
    with transaction() as snapshot:
        for name, chain in _chains(model):
            pieces = [piece for piece in _pieces(chain) if _keeps_shape(chain[piece[0]])]
            if len(pieces) < _SHORTEST:
                skipped[name or type(model).__name__] = "fewer than two layers of the same width stand in a row in it"
                continue
            for first, last in pieces:
                members = [chain[index] for index in range(first, last + 1)]
                snapshot.replace_child(chain, str(first), Residual(*members))
                for index in range(first + 1, last + 1):
                    snapshot.replace_child(chain, str(index), nn.Identity())
                place = f"{name}." if name else ""
                kinds = ", ".join(describe(member).kind for member in members)
                changes.append(f"{place}{first} to {place}{last}: a skip connection around {kinds}")
        if not changes and not skipped:
            skipped[type(model).__name__] = "no nn.Sequential stands in it, and a forward() cannot be rewritten"
        return finish(model, "residual", snapshot, optimizers, changes, skipped, before)


def _chains(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    """Yield the plain chains of modules named by number, with a layer among their own."""
    for name, module in model.named_modules():
        if type(module) is nn.Sequential and list(module._modules) == [str(i) for i in range(len(module))]:
            yield clean_name(name), module


def _pieces(chain: nn.Sequential) -> Iterator[tuple[int, int]]:
    """Yield the first and last index of each layer with what follows it, up to and with its activation."""
    index = 0
    while index < len(chain):
        role = describe(chain[index]).role
        following = index + 1
        while following < len(chain) and describe(chain[following]).role == "norm":
            following += 1
        ends = following < len(chain) and describe(chain[following]).role == "activation"
        if role == "affine" and ends:
            yield index, following
            index = following
        index += 1


def _keeps_shape(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
        same = layer.padding == "same" or (
            not isinstance(layer.padding, str) and all(2 * int(p) == d * (k - 1) for p, d, k in sizes)  # type: ignore[call-overload]
        )
        return layer.in_channels == layer.out_channels and same and all(stride == 1 for stride in layer.stride)
    return False
