"""Real data that come with scikit-learn and Python: images, tables, points in the plane, and documentation text."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Data",
    "Sampler",
    "blobs",
    "breast_cancer",
    "characters",
    "circles",
    "diabetes",
    "digits",
    "parity",
    "recall",
    "sampler",
    "snippets",
    "wine",
]

Sampler: TypeAlias = Callable[[int], tuple[Tensor, Tensor]]

_MODULES = ("argparse", "collections", "difflib", "email.message", "ipaddress", "logging", "random", "unittest.mock")
"""Modules whose documentation strings are read: written by many hands, in every Python since 3.11."""

_ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;()[]'\"-_=*/+<>`#%&!?|\\{}@$^~"


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Inputs and targets, for training and held out.

    Attributes:
        x: Training inputs, shape ``[examples, features]``.
        y: Training targets, shape ``[examples]``: classes (int64) or values (float32).
        test_x: Held-out inputs.
        test_y: Held-out targets.
        classes: Number of classes, 0 for values.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int = 0


def sampler(data: Data, size: int, seed: int) -> Sampler:
    """Return a function that draws the batch of a step at random, the same whenever the step is asked for."""

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        chosen = torch.randint(0, len(data.x), (size,), generator=generator)
        return data.x[chosen], data.y[chosen]

    return draw


def _split(x: Tensor, y: Tensor, *, classes: int, share: float = 0.8) -> Data:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cut = int(share * len(x))
    x, y = x[order], y[order]
    return Data(x=x[:cut], y=y[:cut], test_x=x[cut:], test_y=y[cut:], classes=classes)


@cache
def digits() -> Data:
    """Return 1797 images of 8x8 pixels as 64 features, standardised as a whole, and their 10 classes."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    return _split((x - x.mean()) / x.std(), torch.tensor(bunch.target), classes=10)


@cache
def breast_cancer(*, scaled: bool = True) -> Data:
    """Return 569 cases with 30 features of very different size (0.001 to 4254) and 2 classes."""
    from sklearn.datasets import load_breast_cancer

    return _table(load_breast_cancer(), classes=2, scaled=scaled)


@cache
def wine(*, scaled: bool = True) -> Data:
    """Return 178 wines with 13 features (0.1 to 1680) and 3 classes."""
    from sklearn.datasets import load_wine

    return _table(load_wine(), classes=3, scaled=scaled)


def _table(bunch: Any, *, classes: int, scaled: bool) -> Data:
    x = torch.tensor(bunch.data, dtype=torch.float32)
    return _split((x - x.mean(0)) / x.std(0) if scaled else x, torch.tensor(bunch.target), classes=classes)


@cache
def diabetes() -> Data:
    """Return 442 patients with 10 standardised features and a standardised value to predict."""
    from sklearn.datasets import load_diabetes

    bunch: Any = load_diabetes()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    y = torch.tensor(bunch.target, dtype=torch.float32)
    return _split((x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std(), classes=0)


@cache
def waves(features: int = 1) -> Data:
    """Return 1000 points of a sine of so many features, generated, split 800 to 200."""
    draw = torch.Generator().manual_seed(3)
    x = 3.0 * (2.0 * torch.rand(1000, features, generator=draw) - 1.0)
    y = torch.sin(2.0 * x).sum(dim=1) / math.sqrt(features)
    return _split(x, y + 0.1 * torch.randn(1000, generator=draw), classes=0)


@cache
def blobs() -> Data:
    """Return 1000 points around 3 centres in the plane, split 700 to 300.

    Source: AUTOTRAINER's Blob, peers.md, section 3.5.
    """
    from sklearn.datasets import make_blobs

    x, y = make_blobs(1000, centers=3, cluster_std=2, random_state=2)[:2]
    return _split(torch.tensor(x, dtype=torch.float32), torch.tensor(y), classes=3, share=0.7)


@cache
def circles() -> Data:
    """Return 1000 points on two rings in the plane, split 700 to 300.

    Source: AUTOTRAINER's Circle, peers.md, section 3.5.
    """
    from sklearn.datasets import make_circles

    x, y = make_circles(1000, noise=0.1, random_state=1)
    return _split(torch.tensor(x, dtype=torch.float32), torch.tensor(y), classes=2, share=0.7)


@cache
def parity(bits: int = 8, counted: int = 3) -> Data:
    """Return every pattern of signs, and whether an odd number of the first few are negative.

    No single feature says anything of the class: the loss stays at chance until several are combined.
    """
    numbers = torch.arange(2**bits)
    x = ((numbers[:, None] >> torch.arange(bits)) & 1).float() * 2 - 1
    y = (x[:, :counted].prod(1) < 0).long()
    return Data(x=x, y=y, test_x=x, test_y=y, classes=2)


def recall(size: int, length: int, seed: int) -> Sampler:
    """Return batches of a memory task: the first symbol of four must be named after a stretch of noise.

    Args:
        size: Sequences in a batch.
        length: Steps of a sequence; inputs have shape ``[size, length, 8]``.
        seed: Of the run.
    """

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        y = torch.randint(0, 4, (size,), generator=generator)
        x = torch.zeros(size, length, 8)
        x[:, :, 4:] = torch.randn(size, length, 4, generator=generator)
        x[torch.arange(size), 0, y] = 1.0
        return x, y

    return draw


@cache
def _docstrings(module: str) -> tuple[str, ...]:
    """Return the documentation strings of a module of the standard library, read from its source."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the source of the standard library's {module} is not here: the clinic reads its documentation strings, "
            "and needs a Python installed with its sources"
        )
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return tuple(text for text in found if text and len(text) >= 40)


@cache
def characters() -> tuple[Tensor, Tensor, int]:
    """Return documentation text as character numbers: training part, held-out part, size of the alphabet."""
    text = "\n".join(text for module in _MODULES for text in _docstrings(module)).lower()
    number = {letter: index for index, letter in enumerate(_ALPHABET)}
    codes = torch.tensor([number[letter] for letter in text if letter in number])
    cut = int(0.9 * len(codes))
    return codes[:cut], codes[cut:], len(_ALPHABET)


@cache
def snippets(vocabulary: int = 600, length: int = 32) -> Data:
    """Return stretches of documentation as word numbers, and which module they are from.

    Args:
        vocabulary: Words told apart, the commonest; 0 is padding, 1 any other word.
        length: Words of a snippet, shape ``[snippets, length]``.
    """
    words = {m: [re.findall(r"[a-z_]+", text.lower()) for text in _docstrings(m)] for m in _MODULES}
    counts = Counter(word for texts in words.values() for text in texts for word in text)
    number = {word: index + 2 for index, (word, _) in enumerate(counts.most_common(vocabulary - 2))}
    rows: list[list[int]] = []
    labels: list[int] = []
    for label, texts in enumerate(words.values()):
        for text in texts:
            for start in range(0, len(text), length // 2):
                piece = [number.get(word, 1) for word in text[start : start + length]]
                if len(piece) >= 8:
                    rows.append(piece + [0] * (length - len(piece)))
                    labels.append(label)
    return _split(torch.tensor(np.array(rows)), torch.tensor(labels), classes=len(_MODULES))
