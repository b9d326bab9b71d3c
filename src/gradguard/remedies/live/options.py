"""What a guard may do to a running training, as its user asked, and the clippers that this means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.clipping._base import Clipper
from gradguard.remedies.clipping.history import Adaptive

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Clip", "LiveOptions", "make_clippers", "named_parameters"]

Clip: TypeAlias = "Literal['adaptive'] | Clipper | Callable[..., Clipper] | Sequence[Any] | None"
"""``"adaptive"``, a clipper, what makes one, or one of these (or ``None``) for each of several optimizers."""

_HALF = 0.5
"""Factor of the learning rate where ``lr_backoff=True``. Ours: PyTorch's ReduceLROnPlateau takes 0.1 and never asks
again; this may act three times."""

_ACCEPTED = 'None, "adaptive", a clipper of gradguard.clip, or what makes one, for instance gradguard.clip.AGC'


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveOptions:
    """What a guard may do to a running training; nothing by default. See :func:`gradguard.watch`."""

    clip: Clip = None
    on_spike: Literal["skip"] | None = None
    spike_budget: float = 0.05
    lr_backoff: bool | float | None = None

    def __post_init__(self) -> None:
        for item in self.clips():
            if item is not None and item != "adaptive" and not callable(item) and not isinstance(item, Clipper):
                raise TypeError(f"clip must be {_ACCEPTED}, got {item!r}")
        if self.on_spike not in (None, "skip"):
            raise ValueError(f'on_spike must be None or "skip", got {self.on_spike!r}')
        _check_share("spike_budget", self.spike_budget, low=0.01, high=0.5, what="a share of the steps")
        if self.lr_backoff is not None and not isinstance(self.lr_backoff, bool):
            _check_share("lr_backoff", self.lr_backoff, low=0.01, high=0.99, what="True, None or a factor")

    @property
    def on(self) -> bool:
        """Whether anything may be done."""
        return any(item is not None for item in self.clips()) or self.on_spike is not None or self.factor < 1.0

    @property
    def factor(self) -> float:
        """Factor on the learning rate at each backoff, 1 where it is left alone."""
        if self.lr_backoff is True:
            return _HALF
        return float(self.lr_backoff) if self.lr_backoff else 1.0

    def clips(self) -> tuple[Any, ...]:
        """Return what ``clip`` holds, one entry for all optimizers or one for each."""
        given = self.clip
        return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)


def named_parameters(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Return the parameters that an optimizer holds, each once, by their names in the model where they have one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    return [(names.get(key, f"parameter {at}"), parameter) for at, (key, parameter) in enumerate(held.items())]


def make_clippers(
    options: LiveOptions, model: nn.Module, optimizers: Sequence[Optimizer], scaler: Any
) -> list[Clipper | None]:
    """Return the clipper of each optimizer, ``None`` where none is wanted.

    Raises:
        TypeError: If what should make a clipper makes something else.
        ValueError: If there is not one entry for each optimizer, or a single clipper for several.
        UnsupportedModelError: If a clipper cannot be used here; the message says why.
    """
    wanted = options.clips()
    if len(wanted) == 1 and len(optimizers) > 1:
        if isinstance(wanted[0], Clipper):
            raise ValueError(
                f"clip is one {type(wanted[0]).__name__}, and there are {len(optimizers)} optimizers, each with norms "
                'of its own. Pass "adaptive", what makes a clipper (for instance its class), or a sequence with one '
                "entry for each optimizer"
            )
        wanted *= len(optimizers)
    if len(wanted) != len(optimizers):
        raise ValueError(f"clip must have {len(optimizers)} entries, one for each optimizer, got {len(wanted)}")
    return [_make(item, model, optimizer, scaler) for item, optimizer in zip(wanted, optimizers, strict=True)]


def _make(wanted: Any, model: nn.Module, optimizer: Optimizer, scaler: Any) -> Clipper | None:
    if wanted is None:
        return None
    if isinstance(wanted, Clipper):
        return _checked(wanted, optimizer, scaler)
    maker = Adaptive if wanted == "adaptive" else wanted
    made = maker(named_parameters(model, optimizer), scaler=scaler, optimizer=optimizer)
    if not isinstance(made, Clipper):
        raise TypeError(f"clip must make a clipper of gradguard.clip, and {wanted!r} made a {type(made).__name__}")
    return made


def _checked(clipper: Clipper, optimizer: Optimizer, scaler: Any) -> Clipper:
    name = type(clipper).__name__
    if clipper.attached:
        raise UnsupportedModelError(
            f"this {name} is attached to an optimizer already, and would clip twice. Call its detach() first, or leave "
            "clip= out"
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if held and not any(clipper.covers([p]) for p in held):
        raise UnsupportedModelError(
            f"this {name} has none of the {len(held)} parameters of the {type(optimizer).__name__}: it would clip "
            "nothing. Make it from the parameters that the optimizer updates, or pass what makes it"
        )
    scaled = scaler is not None and scaler.is_enabled() and getattr(optimizer, "_step_supports_amp_scaling", False)
    if scaled and not clipper.scaled:
        raise UnsupportedModelError(
            f"a fused {type(optimizer).__name__} gets gradients that a loss scaler has multiplied, and this {name} "
            "does not know the scaler. Make it with scaler=scaler, or pass what makes it"
        )
    return clipper


def _check_share(name: str, value: object, *, low: float, high: float, what: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be {what}, from {low:g} to {high:g}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {what}, from {low:g} to {high:g}, got {value!r}")
