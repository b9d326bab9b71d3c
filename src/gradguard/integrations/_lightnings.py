"""Which Lightning to stand on: there are two import names, ``lightning.pytorch`` and ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gradguard.errors import MissingExtraError

__all__ = ["NAMESPACES", "callback_bases", "usable_namespaces"]

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def usable_namespaces() -> list[str]:
    """Return the Lightnings that are imported, else those that are installed, which are imported then.

    Raises:
        MissingExtraError: If none is installed; the message names the extra.
    """
    imported = [name for name in NAMESPACES if name in sys.modules]
    if imported:
        return imported
    installed = []
    for name in NAMESPACES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
        else:
            installed.append(name)
    if not installed:
        raise MissingExtraError(
            "GradGuardCallback needs Lightning, which is not installed. "
            "Install the extra: pip install 'gradguard[lightning]'"
        )
    return installed


def callback_bases(namespaces: Sequence[str]) -> tuple[type, ...]:
    """Return the ``Callback`` class of each namespace; either Trainer takes a callback of either."""
    return tuple(importlib.import_module(name).Callback for name in namespaces)
