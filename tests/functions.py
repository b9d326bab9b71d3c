"""Models whose activations are functions in code, and what is asked of them."""

from __future__ import annotations

import inspect
import linecache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

X = torch.linspace(-2.0, 2.0, 5 * 8).reshape(5, 8)


class Plain(nn.Module):
    """Two hidden layers and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)


class Sigmoids(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """Call a function of torch, and a method of a tensor."""
        x = torch.sigmoid(self.first(x))
        return self.last(self.second(x).tanh())


class Leaky(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """Return what the class above is to compute with leaky ReLU."""
        x = F.leaky_relu(self.first(x), 0.01)
        return self.last(F.leaky_relu(self.second(x), 0.01))


def reaction(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    """Return outputs and gradients."""
    output = model(x)
    model.zero_grad()
    output.square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    """Compare bit for bit."""
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def code(model: nn.Module, method: str = "forward") -> str:
    """Return the code that runs."""
    return inspect.getsource(getattr(model, method))


def spelt(name: str, write: str) -> type[Plain]:
    """Return a class with a line of code between its layers."""
    lines = ["class Spelt(Plain):", "    def forward(self, x):", "        h = self.first(x)", f"        {write}"]
    return defined("\n".join([*lines, "        return self.last(h)", ""]), name)


def defined(text: str, name: str) -> type[Plain]:
    """Return a class from text, whose source is found as that of a notebook's cell is."""
    filename = f"<{name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    space: dict[str, Any] = {"Plain": Plain, "torch": torch, "F": F, "nn": nn, "Tensor": Tensor, "relu": F.relu}
    exec(compile(text, filename, "exec"), space)  # noqa: S102  # the text stands below
    return cast("type[Plain]", space["Spelt"])
