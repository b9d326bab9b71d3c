"""Which remedies to try against what, best first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gradguard.findings import Cause

__all__ = ["CURES", "RESERVES"]

_DEPTH_DEFAULT = ("he-initialization", "layer-norm", "residual")
_RATE = ("lower-learning-rate", "warm-up", "clip-norm")

CURES: Mapping[tuple[str, Cause | None], tuple[str, ...]] = MappingProxyType(
    {
        ("GG101", Cause.ACTIVATION_DERIVATIVE): ("batch-norm", "relu", "layer-norm", "residual-batch-norm"),
        ("GG101", Cause.WEIGHT_SCALE): ("he-initialization", "lsuv", "layer-norm", "residual-batch-norm"),
        ("GG101", Cause.SATURATION): ("standardize-input", "xavier-initialization", "layer-norm", "relu"),
        ("GG101", Cause.DEAD_UNITS): ("he-initialization", "batch-norm", "leaky-relu", "lower-learning-rate"),
        ("GG101", None): _DEPTH_DEFAULT,
        ("GG102", Cause.WEIGHT_SCALE): ("he-initialization", "lsuv", "layer-norm", "clip-norm"),
        ("GG102", Cause.NORMALIZATION): ("residual", "layer-norm", "clip-norm"),
        ("GG102", None): (*_DEPTH_DEFAULT, "clip-norm"),
        ("GG103", Cause.DATA): ("clip-norm", "adaptive-clip", "robust-scaling", "input-check", "restore-checkpoint"),
        ("GG103", None): ("clip-norm", "adaptive-clip", "lower-learning-rate", "warm-up"),
        ("GG104", Cause.LOSS): ("remove-detach", "differentiable-op"),
        ("GG104", None): ("remove-detach", "differentiable-op", "freeze-module"),
        ("GG111", Cause.GATES): ("chrono-initialization", "forget-gate-bias", "orthogonal-recurrent"),
        ("GG111", None): ("orthogonal-recurrent", "chrono-initialization", "gated-cell", "lstm"),
        ("GG112", None): ("orthogonal-recurrent", "clip-norm", "gated-cell", "truncated-bptt"),
        ("GG201", None): ("input-check", "standardize-input", "robust-scaling"),
        ("GG202", Cause.LOSS): ("logits-loss", "safe-op"),
        ("GG202", Cause.PRECISION): ("bfloat16", "safe-op"),
        ("GG202", Cause.WEIGHT_SCALE): ("he-initialization", "layer-norm", "lower-learning-rate"),
        ("GG202", Cause.LEARNING_RATE): _RATE,
        ("GG202", Cause.DATA): ("input-check", "robust-scaling", "safe-op"),
        ("GG202", None): ("safe-op", "logits-loss", "layer-norm", "relu", "lower-learning-rate"),
        ("GG203", Cause.LOSS): ("logits-loss", "safe-op", "anomaly-mode"),
        ("GG203", Cause.LEARNING_RATE): _RATE,
        ("GG203", Cause.PRECISION): ("loss-scaler", "bfloat16", "anomaly-mode"),
        ("GG203", None): ("safe-op", "anomaly-mode"),
        ("GG204", Cause.LEARNING_RATE): (*_RATE, "restore-checkpoint"),
        ("GG204", None): ("restore-checkpoint", "clip-norm"),
        ("GG211", None): ("loss-scaler", "bfloat16"),
        ("GG212", None): ("float32-weights", "higher-learning-rate"),
        ("GG213", None): ("bfloat16", "safe-op", "lower-learning-rate"),
        ("GG301", Cause.LEARNING_RATE): (
            "lower-learning-rate",
            "warm-up",
            "he-initialization",
            "linear-output",
            "leaky-relu",
        ),
        ("GG301", Cause.DATA): ("standardize-input", "robust-scaling", "batch-norm", "leaky-relu"),
        ("GG301", None): ("he-initialization", "batch-norm", "linear-output", "leaky-relu", "residual-batch-norm"),
        ("GG302", Cause.DATA): ("standardize-input", "robust-scaling", "layer-norm", "relu"),
        ("GG302", None): ("lsuv", "xavier-initialization", "layer-norm", "relu"),
        ("GG401", None): ("chrono-initialization", "forget-gate-bias", "orthogonal-recurrent", "gated-cell", "lstm"),
        ("GG402", None): ("lower-learning-rate", "weight-decay", "qk-norm", "spectral-norm"),
        ("GG403", None): ("he-initialization", "lsuv", "layer-norm", "residual"),
        ("GG501", None): (*_RATE, "lsuv"),
        ("GG502", None): ("higher-learning-rate",),
        ("GG503", Cause.WIRING): ("add-to-optimizer", "freeze"),
        ("GG503", Cause.LEARNING_RATE): ("set-learning-rate", "freeze"),
        ("GG503", Cause.PRECISION): ("float32-weights", "higher-learning-rate"),
        ("GG503", None): ("higher-learning-rate",),
        ("GG504", None): ("smaller-epsilon",),
        ("GG505", None): ("lower-learning-rate", "clip-norm", "warm-up", "restore-checkpoint"),
        ("GG601", None): ("lower-clip-norm", "adaptive-clip"),
        ("GG602", None): ("raise-clip-norm", "adaptive-clip"),
        ("GG701", Cause.WEIGHT_SCALE): (
            "scale-query-key",
            "scale-attention",
            "query-key-initialization",
            "xavier-initialization",
            "qk-norm",
        ),
        ("GG701", None): ("lower-learning-rate", "warm-up", "scale-query-key", "qk-norm", "sigma-reparam"),
        ("GG702", None): ("lower-learning-rate", "warm-up", "scale-query-key", "qk-norm", "sigma-reparam"),
        ("GG703", None): ("clip-norm", "adaptive-clip", "lower-beta2"),
    }
)
"""Remedies by rule and cause, best first; ``None`` stands for any other cause. What suits the model's own activations,
layers and cells is put in their place by :mod:`gradguard.prescriptions._suited`.

Source: order by the measurements of algorithms.md, sections D, E and K (BatchNorm repairs a 20-layer sigmoid net, no
initialization does; a plain RNN with orthogonal weights learns what a GRU does not); among equals the least invasive
first. What treats the effect, such as clipping against a wrong initialization, comes last."""

RESERVES = ("lsuv", "he-initialization", "layer-norm", "batch-norm", "residual", "residual-batch-norm", "relu")
"""Cures of layers in general, for models to which the prescribed ones cannot be applied (activations called as
functions, gates in place of activations), or which they leave as they are. Ours."""
