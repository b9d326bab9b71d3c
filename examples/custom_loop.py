"""Watch a training loop of your own: a deep sigmoid network on scikit-learn's digits, and what gradguard says of it.

Run: python examples/custom_loop.py        Needs: pip install 'gradguard[demo]'
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import gradguard

torch.manual_seed(0)

# Data: 1797 images of 8 x 8 pixels, standardized.
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)

# Model: ten hidden layers. Sigmoids shrink the gradient at each of them, so the first ones hardly learn.
layers: list[nn.Module] = []
for _ in range(10):
    layers += [nn.Linear(64, 64), nn.Sigmoid()]
model = nn.Sequential(*layers, nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

# Training, with gradguard in two lines. "silent" keeps findings for the report; the default warns as they begin.
with gradguard.watch(model, optimizer, on_finding="silent") as guard:  # the first line
    for epoch in range(4):
        total = 0.0
        for rows in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            guard.record(loss=loss)  # the second: after backward, before any clipping
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch}: mean loss {total / len(images):.3f}")

# What is wrong, where, since when, why, and what helps.
diagnosis = guard.report()

# The same as data.
if diagnosis.primary is not None:
    print(f"{diagnosis.primary.code} {diagnosis.primary.name}, caused by {diagnosis.primary.cause.value}")
