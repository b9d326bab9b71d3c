"""Gradient clipping against outlier batches, on real digits: none, fixed thresholds, and thresholds that adapt.

Run it with ``python examples/clipping.py``; it needs scikit-learn (``pip install 'gradguard[demo]'``) and some seconds.
One batch in a hundred is spoilt: its images are 300 times too bright and its labels are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard import clip

torch.set_num_threads(1)

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)
images, labels = (images - images.mean()) / images.std(), torch.tensor(digits.target)
train = 1400  # the first so many images; the rest is for testing

METHODS: dict[str, Callable[[nn.Module], clip.Clipper]] = {
    "none": lambda model: clip.Norm(model, math.inf),  # measures only
    "Norm, 100": lambda model: clip.Norm(model, 100.0),
    "Norm, 1": lambda model: clip.Norm(model, 1.0),
    "Norm, 0.01": lambda model: clip.Norm(model, 0.01),
    "Value, 0.1": lambda model: clip.Value(model, 0.1),
    "AGC": clip.AGC,
    "AutoClip": clip.AutoClip,
    "ZClip": clip.ZClip,
    "AdaGC": clip.AdaGC,
    "Adaptive": clip.Adaptive,
}


def set_up() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def batch_loss(model: nn.Module, *, spoilt: bool) -> Tensor:
    rows = torch.randint(train, (64,))
    if spoilt:
        return F.cross_entropy(model(300.0 * images[rows]), torch.randint(10, (64,)))
    return F.cross_entropy(model(images[rows]), labels[rows])


print(f"{'method':<12}{'test loss':>10}{'accuracy':>10}{'spoilt batches clipped':>24}{'all steps clipped':>19}")
for name, make in METHODS.items():
    model, optimizer = set_up()
    clipper = make(model)
    caught = 0
    for step in range(600):
        spoilt = step % 100 == 99
        optimizer.zero_grad()
        batch_loss(model, spoilt=spoilt).backward()
        caught += clipper.step().engaged and spoilt
        optimizer.step()
    with torch.no_grad():
        scores = model(images[train:])
        loss = F.cross_entropy(scores, labels[train:]).item()
        accuracy = (scores.argmax(1) == labels[train:]).float().mean().item()
    print(f"{name:<12}{loss:>10.3f}{accuracy:>10.1%}{caught:>19} of 6{clipper.clipped_fraction:>19.1%}")

# Which fixed threshold would fit this net? A guard that has watched a run without spoilt batches can say.
model, optimizer = set_up()
with gradguard.watch(model, optimizer, every=1, on_finding="silent") as guard:
    for _ in range(200):
        optimizer.zero_grad()
        clean = batch_loss(model, spoilt=False)
        clean.backward()
        guard.record(loss=clean)
        optimizer.step()
print()
print(guard.suggest_clip())
