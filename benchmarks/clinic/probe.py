"""What other tools' rules need of a run, read beside the guard: plain numbers per reading.

Readings are made at each of the first ten steps and at the end of each of thirty "epochs" of equal length. They are
reduced to what :mod:`benchmarks.clinic.rivals` compares with its thresholds, with the names of the layers concerned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clinic.case import Job
from benchmarks.clinic.nets import Exponential

__all__ = ["EPOCHS", "Probe"]

EPOCHS = 30
_FIRST = 10


class Probe:
    """Reads gradients, weights and activations of some steps; changes nothing.

    Attributes:
        readings: One mapping per reading, in order.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._kernels = {name: p for name, p in job.model.named_parameters() if p.ndim >= 2}
        ends = {max(0, round((epoch + 1) * job.steps / EPOCHS) - 1) for epoch in range(EPOCHS)}
        self._epoch_ends = ends
        self._steps = ends | set(range(_FIRST))
        self._handles: list[Any] = []
        self._gradients: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}
        self._streaks: dict[str, int] = {}
        self._activations: dict[str, dict[str, float]] = {}
        self.readings: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Prepare for a step; hooks are set where it is to be read."""
        if step not in self._steps:
            return
        self._gradients, self._activations = {}, {}
        for name, module in self._job.model.named_modules():
            kind = _KINDS.get(type(module))
            if kind is not None:
                self._handles.append(module.register_forward_hook(self._hook(name, kind)))

    def read(self, step: int) -> None:
        """Read gradients and the weights before the update; called between backward and clipping."""
        if step not in self._steps:
            return
        scale = self._job.scaler.get_scale() if self._job.scaler is not None else 1.0
        for name, parameter in self._kernels.items():
            if parameter.grad is not None:
                gradient = parameter.grad.detach()
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                self._gradients[name] = dense.float() / scale
            self._before[name] = parameter.detach().float().clone()

    def end(self, step: int, loss: float) -> None:
        """Read the update and reduce everything to one reading."""
        if step not in self._steps:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        reading: dict[str, Any] = {"step": step, "epoch": step in self._epoch_ends, "loss": loss}
        with torch.no_grad():
            reading |= self._of_gradients() | self._of_weights() | self._of_activations()
        if reading["epoch"] and self._job.accuracies is not None:
            train, validation = self._job.accuracies(self._job.model)
            reading |= {"acc_train": train, "acc_val": validation}
        self.readings.append({name: _short(value) for name, value in reading.items()})

    def _hook(self, name: str, kind: str) -> Callable[..., None]:
        def measure(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled():
                self._activations[name] = _activation(kind, inputs[0].detach(), output.detach())

        return measure

    def _of_gradients(self) -> dict[str, Any]:
        named = self._gradients
        if not named:
            return {}
        means = {name: float(g.abs().mean()) for name, g in named.items()}
        spreads = {name: _spread(g) for name, g in named.items()}
        norms = [float(g.norm()) for g in named.values()]
        entries = sum(g.numel() for g in named.values())
        bad = next((name for name, mean in means.items() if not math.isfinite(mean)), "")
        return {
            "g_first": norms[0],
            "g_last": norms[-1],
            "g_zero": sum(int((g == 0).sum()) for g in named.values()) / entries,
            "g_bad": bad,
            "g_mean": min(means.values(), default=math.nan),
            "g_mean_at": min(means, key=lambda name: means[name]),
            "g_spread": min(spreads.values()),
            "g_all_zero": next((name for name, mean in means.items() if mean == 0.0), ""),
        }

    def _of_weights(self) -> dict[str, Any]:
        ratios: dict[str, float] = {}
        changes: dict[str, float] = {}
        variances: dict[str, float] = {}
        means: dict[str, float] = {}
        for name, before in self._before.items():
            now = self._kernels[name].detach().float()
            ratios[name] = float((now - before).norm() / (before.norm() + 1e-9))
            changes[name] = float((now - before).mean())
            variances[name], means[name] = float(now.var()), float(now.mean())
            last = self._last.get(name)
            same = last is not None and bool(torch.allclose(now, last, rtol=1e-5, atol=1e-8))
            self._streaks[name] = self._streaks.get(name, 0) + 1 if same else 0
            self._last[name] = now.clone()
        if not ratios:
            return {}
        values = list(variances.values())
        return {
            "lr": float(self._job.optimizers[0].param_groups[0]["lr"]),
            "ratio_max": max(ratios.values()),
            "ratio_max_at": max(ratios, key=lambda name: ratios[name]),
            "ratio_min": min(ratios.values()),
            "ratio_min_at": min(ratios, key=lambda name: ratios[name]),
            "w_var_min": min(values),
            "w_var_max": max(values),
            "w_bad": next((name for name, mean in means.items() if not math.isfinite(mean)), ""),
            "w_zero": next((name for name, mean in means.items() if mean == 0.0), ""),
            "change_zero": next((name for name, change in changes.items() if change == 0.0), ""),
            "unchanged": max(self._streaks.values()),
            "unchanged_at": max(self._streaks, key=lambda name: self._streaks[name]),
        }

    def _of_activations(self) -> dict[str, Any]:
        reading: dict[str, Any] = {}
        for statistic in ("dead_units", "non_positive", "saturated_far", "saturated_5"):
            found = {name: v[statistic] for name, v in self._activations.items() if statistic in v}
            if found:
                worst = max(found, key=lambda name: found[name])
                reading |= {statistic: found[worst], f"{statistic}_at": worst}
        odd = (name for name, v in self._activations.items() if not math.isfinite(v["mean"]) or v["mean"] == 0.0)
        reading["forward_odd"] = next(odd, "")
        return reading


_KINDS: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu",
    Exponential: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


def _activation(kind: str, given: Tensor, output: Tensor) -> dict[str, float]:
    """Return the statistics of one activation: dead and saturated shares, by two tools' definitions."""
    given, output = given.float(), output.float()
    flat = output.reshape(len(output), -1)
    result = {"mean": float(output.mean())}
    if kind == "relu":
        active = (flat > 0).float().mean(0)
        result |= {
            "dead_units": float((active < 0.01).float().mean()),
            "non_positive": float((flat <= 0).float().mean()),
        }
        return result
    low, high = (-9.4999, 9.4999) if kind == "tanh" else (-23.0, 16.99999)
    far = ((given < low) | (given > high)).float().mean()
    return result | {"saturated_far": float(far), "saturated_5": float((given.abs() > 5).float().mean())}


def _spread(gradient: Tensor) -> float:
    """Return the distance of the 5th and the 95th percentile, from at most 4096 entries."""
    flat = gradient.flatten()
    flat = flat[:: max(1, flat.numel() // 4096)]
    if not bool(torch.isfinite(flat).all()):
        return math.nan
    low, high = torch.quantile(flat, torch.tensor([0.05, 0.95])).tolist()
    return float(high - low)


def _short(value: Any) -> Any:
    """Round to four significant digits: results files hold thousands of readings."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.4g}")
    return value
