"""The training of ``gradguard demo --lightning``: a Trainer, a module, and one line for gradguard."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gradguard.errors import MissingExtraError, NothingObservedError
from gradguard.findings import Diagnosis, Finding

__all__ = ["fit"]


def fit(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    learning_rate: float,
    on_finding: Callable[[Finding], object],
    advance: Callable[[], None],
) -> Diagnosis:
    """Train a classifier through a Lightning Trainer, one optimizer step per batch.

    Args:
        model: Maps inputs to logits; its layers appear under ``net`` in the diagnosis.
        batches: Inputs and labels, in the order of the steps.
        learning_rate: That of Adam.
        on_finding: Called when a finding begins.
        advance: Called after every step.

    Returns:
        What the callback found.

    Raises:
        MissingExtraError: If no Lightning is installed.
        NothingObservedError: If the Trainer took no step, for instance because of an interrupt.
    """
    pl = _namespace()
    from gradguard.integrations.lightning import GradGuardCallback

    class Classifier(pl.LightningModule):  # type: ignore[misc,name-defined]  # which Lightning is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, labels = batch
            advance()
            return F.cross_entropy(self.net(inputs), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=learning_rate)

    callback = GradGuardCallback(report=False, on_finding=on_finding)
    with _quiet():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # A bare list would count as a collection of data loaders.
        trainer.fit(Classifier(), DataLoader(_Batches(batches), batch_size=None))
    if callback.diagnosis is None:
        raise NothingObservedError("the Trainer ended without a single step, so there is nothing to report")
    return callback.diagnosis


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batches made in advance, in order."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)


def _namespace() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise MissingExtraError(
        "demo --lightning needs Lightning, which is not installed. "
        "Install the extra: pip install 'gradguard[lightning]'"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on devices and data loaders out of the demo."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(lightning\.pytorch|pytorch_lightning)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
