"""From a name, a torch module or a function to its :class:`Activation`, without importing torch."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from gradguard.theory._activations import BUILDERS, Activation

__all__ = ["ACTIVATIONS", "ActivationLike", "activation"]

ACTIVATIONS: tuple[str, ...] = tuple(BUILDERS)
"""Names that :func:`activation` takes, in alphabetical order."""

ActivationLike: TypeAlias = str | Activation | Callable[..., Any]
"""An activation by name, as :class:`Activation`, as module, as module class, or as function such as ``torch.relu``."""


def _normal(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


_BY_NORMAL_NAME: Mapping[str, str] = MappingProxyType({_normal(name): name for name in ACTIVATIONS} | {"swish": "silu"})
_COUPLED = frozenset({"glu", "softmax", "softmin", "softmax2d", "logsoftmax", "multiheadattention"})


def activation(source: ActivationLike, **parameters: float | str) -> Activation:
    """Return an activation with its derivative, derivative bound and kinks.

    Args:
        source: A name as in ``torch.nn`` or ``torch.nn.functional`` (neither case nor underscores matter; ``"swish"``
            and ``"linear"`` count as well), a module of such a class or of a class derived from it, the class itself,
            a function such as ``torch.tanh``, or an :class:`Activation`, which comes back as it is. The parameters of
            a module are read from it; PReLU's slopes are pooled as their root mean square, which is what expectations
            of squares need; RReLU's is its mean slope, as in evaluation mode.
        parameters: Parameters that differ from torch's defaults, by torch's attribute names (``negative_slope``,
            ``alpha``, ``beta``, ``approximate``, ``min_val``, ...); only with a name, a class or a function.

    Raises:
        TypeError: If ``source`` is no activation, if a parameter is unknown, missing or no number, or if parameters
            are given for a module, which has its own.
        ValueError: If the name is unknown (the message has the closest one), not elementwise, or a value out of range.

    Example:
        >>> activation("sigmoid").derivative_bound
        0.25
        >>> activation("LeakyReLU", negative_slope=0.2)
        Activation(name='leaky_relu', derivative_bound=1.0, kinks=(0.0,), scale=1.0,
                   parameters=mappingproxy({'negative_slope': 0.2}))
    """
    if isinstance(source, Activation):
        _refuse(parameters, f"the activation {source.name!r}")
        return source
    if isinstance(source, str):  # "linear" is what nn.init.calculate_gain calls the identity; nn.Linear is none
        return _build("identity" if source == "linear" else _known(source), parameters)
    given = getattr(source, "__name__", None)
    if isinstance(given, str):
        return _build(_known(given), parameters)
    classes = [base.__name__ for base in type(source).__mro__]
    name = next((_BY_NORMAL_NAME[_normal(base)] for base in classes if _normal(base) in _BY_NORMAL_NAME), None)
    if name is None:
        raise TypeError(
            f"{classes[0]} is no elementwise activation that gradguard.theory knows, got {source!r}. Pass a module of "
            "torch.nn, its name, or a gradguard.theory.Activation with function, derivative and derivative_bound. "
            f"Known are: {', '.join(ACTIVATIONS)}."
        )
    _refuse(parameters, f"the {classes[0]} module")
    accepted = inspect.signature(BUILDERS[name]).parameters
    return _build(name, {key: getattr(source, key) for key in accepted if hasattr(source, key)})


def _refuse(parameters: Mapping[str, object], what: str) -> None:
    if parameters:
        raise TypeError(f"{what} has its own parameters, got {', '.join(parameters)} beside it. Pass the name instead.")


def _known(name: str) -> str:
    key = _normal(name)
    if key in _BY_NORMAL_NAME:
        return _BY_NORMAL_NAME[key]
    if key in _COUPLED:
        raise ValueError(f"{name!r} is not elementwise: a mean-field gain is defined for elementwise activations only.")
    close = difflib.get_close_matches(key, _BY_NORMAL_NAME, n=1)
    hint = f" Did you mean {_BY_NORMAL_NAME[close[0]]!r}?" if close else ""
    raise ValueError(f"unknown activation {name!r}.{hint} Known are: {', '.join(ACTIVATIONS)}.")


def _build(name: str, parameters: Mapping[str, Any]) -> Activation:
    builder = BUILDERS[name]
    accepted = inspect.signature(builder).parameters
    for key in parameters:
        if key not in accepted:
            takes = f"takes {', '.join(accepted)}" if accepted else "takes none"
            raise TypeError(f"activation {name!r} has no parameter {key!r}; it {takes}.")
    missing = [key for key, item in accepted.items() if item.default is item.empty and key not in parameters]
    if missing:
        raise TypeError(f"activation {name!r} needs {' and '.join(missing)}: activation({name!r}, {missing[0]}=...)")
    return builder(**{key: _value(name, key, value) for key, value in parameters.items()})


def _value(name: str, key: str, value: Any) -> float | str | list[float]:
    """Turn a parameter into a number, PReLU's slopes per channel into a list of numbers."""
    if isinstance(value, str) and key == "approximate":
        return value
    entries = value.reshape(-1).tolist() if hasattr(value, "reshape") else [value]
    if isinstance(value, str) or (len(entries) != 1 and not (entries and key == "weight")):
        raise TypeError(f"parameter {key!r} of activation {name!r} must be a number, got {value!r}")
    try:
        numbers = [float(entry) for entry in entries]
    except (TypeError, ValueError) as error:
        raise TypeError(f"parameter {key!r} of activation {name!r} must be a number, got {value!r}") from error
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"parameter {key!r} of activation {name!r} must be finite, got {value!r}")
    return numbers if len(numbers) > 1 else numbers[0]
