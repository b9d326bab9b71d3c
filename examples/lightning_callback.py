"""Watch a Lightning run with one line: a deep sigmoid network on scikit-learn's digits.

Run: python examples/lightning_callback.py        Needs: pip install 'gradguard[demo,lightning]'
"""

from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradguard


class Classifier(L.LightningModule):
    """Ten hidden layers. Sigmoids shrink the gradient at each of them, so the first ones hardly learn."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(10):
            layers += [nn.Linear(64, 64), nn.Sigmoid()]
        self.net = nn.Sequential(*layers, nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; nothing in here knows of gradguard."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; gradguard finds it by itself."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


L.seed_everything(0)

# Data: 1797 images of 8 x 8 pixels, standardized.
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)
images = (images - images.mean()) / images.std()
loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True)

# The one line. A report is printed when the fit ends; at most ten numbers named gradguard/... are logged as it runs.
watcher = gradguard.GradGuardCallback()
trainer = L.Trainer(max_epochs=4, accelerator="cpu", callbacks=[watcher], logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), loader)

# The same as data.
if watcher.diagnosis is not None and watcher.diagnosis.primary is not None:
    primary = watcher.diagnosis.primary
    print(f"{primary.code} {primary.name}, caused by {primary.cause.value}")
