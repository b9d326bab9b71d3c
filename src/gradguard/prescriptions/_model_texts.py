"""Remedies that change the model's layers: normalization, activation, residual path, cell, attention, in words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gradguard.prescriptions._text import HE, LAYER_NORM, QK_NORM, RESNET, RemedyText, call

__all__ = ["LAYERS"]

_ENTROPY = "Zhai et al. (2023), Preventing Attention Entropy Collapse, ICML, arXiv 2303.06296"

_CHRONO = "Tallec, Ollivier (2018), Can recurrent neural networks warp time?, ICLR, arXiv 1804.11188"


def _cell(kind: str, by_hand: str) -> str:
    """Return the lines that put a gated cell in place of a plain one, with memories of the length that is needed."""
    return (
        f'gradguard.remedies.surgery.swap_recurrent(model, "{kind}", max_time={{steps}}, batch=batch, '
        f"optimizer=optimizer)\n# by hand: {by_hand}"
    )


LAYERS: Mapping[str, RemedyText] = MappingProxyType(
    {
        "layer-norm": RemedyText(
            reason=(
                "LayerNorm before each activation sets the scale anew at every layer, so that no loss of size "
                "is passed on."
            ),
            code=call("layer-norm", by_hand="nn.Sequential(nn.Linear(n, n), nn.LayerNorm(n), nn.{activation}())"),
            expected="Outputs of standard deviation 1 before each activation; no layer's scale reaches the next.",
            reference=LAYER_NORM,
        ),
        "batch-norm": RemedyText(
            reason=(
                "BatchNorm before each activation centres and scales every unit over the batch, where the slope "
                "is largest."
            ),
            code=call("batch-norm", by_hand="nn.Sequential(nn.Linear(n, n), nn.BatchNorm1d(n), nn.{activation}())"),
            expected="20 sigmoid layers on digits: a span of 0.1 decades instead of 11, accuracy 0.97 instead of 0.10.",
            reference="Ioffe, Szegedy (2015), Batch Normalization, ICML, arXiv 1502.03167",
        ),
        "group-norm": RemedyText(
            reason="GroupNorm sets the scale anew at every layer, per example: small batches do it no harm.",
            code=call("group-norm", by_hand="nn.Sequential(nn.Conv2d(n, n, 3), nn.GroupNorm(n // 16, n), ...)"),
            expected="Outputs of standard deviation 1 before each activation; no layer's scale reaches the next.",
            reference="Wu, He (2018), Group Normalization, ECCV, arXiv 1803.08494",
        ),
        "rms-norm": RemedyText(
            reason="RMSNorm, which this model uses already, sets the scale anew before each activation.",
            code=call("rms-norm", by_hand="nn.Sequential(nn.Linear(n, n), nn.RMSNorm(n), nn.{activation}())"),
            expected="Outputs of root mean square 1 before each activation; no layer's scale reaches the next.",
            reference="Zhang, Sennrich (2019), Root Mean Square Layer Normalization, NeurIPS, arXiv 1910.07467",
        ),
        "relu": RemedyText(
            reason="The derivative of ReLU is 1 where it is on; with He initialization the gradient keeps its size.",
            code=call("relu", by_hand="nn.ReLU() in place of nn.{activation}() in hidden layers, He initialization"),
            expected="The factor per layer goes from 0.24, which sigmoid with Xavier weights gives, to 1.",
            reference=HE,
        ),
        "leaky-relu": RemedyText(
            reason="A small slope on the negative side lets a gradient through; weights are drawn anew, as these died.",
            code=call("leaky-relu", by_hand="nn.LeakyReLU(0.01) in place of nn.ReLU() in hidden layers"),
            expected="No unit is off for good: each gets at least a hundredth of its gradient.",
            reference="Maas, Hannun, Ng (2013), Rectifier Nonlinearities Improve Neural Network Acoustic Models, ICML",
        ),
        "linear-output": RemedyText(
            reason="A ReLU behind the last layer says nothing below zero, and where it is zero nothing is learnt.",
            code=call("linear-output", by_hand="no activation behind the last layer"),
            expected="The gradient reaches the last layer whatever it says.",
            reference="Goodfellow, Bengio, Courville (2016), Deep Learning, section 6.2.2.1",
        ),
        "residual": RemedyText(
            reason="An identity path around each block carries the gradient past what shrinks or amplifies it.",
            code=call("residual", by_hand="x = x + block(x)"),
            expected="The gradient at the first layer is of the size of that at the last, at any depth.",
            reference=RESNET,
        ),
        "residual-batch-norm": RemedyText(
            reason="A path around each block carries the gradient, and BatchNorm keeps the units behind it alive.",
            code=call("residual-batch-norm", by_hand="x = x + activation(batch_norm(linear(x)))"),
            expected="The gradient at the first layer is of the size of that at the last, at any depth.",
            reference=RESNET,
        ),
        "gated-cell": RemedyText(
            reason="The state of a GRU is kept by a gate, not multiplied by a matrix at every step.",
            code=_cell("gru", "nn.GRU(...) in place of nn.RNN(...), update gate biases ln U(1, {steps} - 1)"),
            expected="Memories of every length up to {steps} steps; a plain RNN of 32 units keeps 0.52 per step.",
            reference=(
                "Cho et al. (2014), Learning Phrase Representations using RNN Encoder-Decoder, arXiv 1406.1078; "
                f"{_CHRONO}"
            ),
        ),
        "lstm": RemedyText(
            reason="The cell of an LSTM is added to, not multiplied by a matrix at every step; a gate keeps it.",
            code=_cell("lstm", "nn.LSTM(...) in place of nn.RNN(...), forget gate biases ln U(1, {steps} - 1)"),
            expected="Memories of every length up to {steps} steps; a plain RNN of 32 units keeps 0.52 per step.",
            reference=f"Hochreiter, Schmidhuber (1997), Long Short-Term Memory, Neural Computation 9(8); {_CHRONO}",
        ),
        "qk-norm": RemedyText(
            reason="Queries and keys of unit size bound the logits, whatever the weights become.",
            code=call("qk-norm", by_hand="q, k = norm(q), norm(k) before their product, norm = nn.RMSNorm(head size)"),
            expected="The largest logit is at most the root of the head's size while the norms' scale is 1.",
            reference=QK_NORM,
        ),
        "scale-attention": RemedyText(
            reason="Over the root of the head's size, products of queries and keys have the variance of one factor.",
            code=(
                "# in forward of {layer}:\n"
                "# torch.nn.functional.scaled_dot_product_attention(q, k, v)  # divides by sqrt(head size) itself\n"
                "# logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # by hand"
            ),
            expected="Logits smaller by the root of the head's size: by 8 for heads of 64.",
            reference="Vaswani et al. (2017), Attention Is All You Need, NeurIPS, section 3.2.1, arXiv 1706.03762",
        ),
        "sigma-reparam": RemedyText(
            reason="A spectral norm of 1 times a learned scale keeps queries and keys from growing without bound.",
            code=(
                "spectral_norm = torch.nn.utils.parametrizations.spectral_norm\n"
                "attention = dict(model.named_modules()).get({layer!r}, model)\n"
                "for module in list(attention.modules()):\n"
                "    if isinstance(module, torch.nn.Linear):\n"
                "        spectral_norm(module)  # sigma-reparam also multiplies by a learned scalar"
            ),
            expected="Spectral norms stay where the learned scale puts them; entropy no longer falls.",
            reference=_ENTROPY,
        ),
        "spectral-norm": RemedyText(
            reason="Divided by its largest singular value, a weight stretches no vector, whatever training does to it.",
            code=(
                "kinds = (torch.nn.Linear, torch.nn.Conv2d)\n"
                "layers = {{name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}}\n"
                "for layer in [layers[{layer!r}]] if {layer!r} in layers else layers.values():\n"
                "    torch.nn.utils.parametrizations.spectral_norm(layer)  # before the optimizer is made"
            ),
            expected="The largest singular value of the weight is 1 from then on.",
            reference="Miyato et al. (2018), Spectral Normalization for GANs, ICLR, arXiv 1802.05957",
        ),
    }
)
"""Texts by remedy."""
