"""Remedies in the user's own code: data, loss, graph and optimizer groups, in words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gradguard.prescriptions._text import PASCANU, RemedyText, call

__all__ = ["WIRING"]

_AUTOGRAD = "PyTorch documentation, Autograd mechanics"

WIRING: Mapping[str, RemedyText] = MappingProxyType(
    {
        "add-to-optimizer": RemedyText(
            reason="Parameters made after the optimizer, or left out of it, get gradients that nobody applies.",
            code=(
                'held = {{id(p) for group in optimizer.param_groups for p in group["params"]}}\n'
                "missing = [p for p in model.parameters() if p.requires_grad and id(p) not in held]\n"
                'optimizer.add_param_group({{"params": missing}})'
            ),
            expected="Every parameter with a gradient moves at the next step.",
            reference="PyTorch documentation, torch.optim.Optimizer.add_param_group",
        ),
        "freeze": RemedyText(
            reason=(
                "What is not meant to learn is better frozen on purpose: everyone sees it, and its backward "
                "pass is saved."
            ),
            code='model.get_parameter("{parameter}").requires_grad_(False)',
            expected="The same training, said openly, and a little faster.",
            reference=_AUTOGRAD,
        ),
        "freeze-module": RemedyText(
            reason="If the cut is meant, freezing what lies behind it says so, and saves its backward pass.",
            code='model.get_submodule("{layer}").requires_grad_(False)',
            expected="The same training, said openly, and a little faster.",
            reference=_AUTOGRAD,
        ),
        "remove-detach": RemedyText(
            reason=(
                "Somewhere between {layer} and the loss .detach(), .item(), .data or torch.no_grad() drops the graph."
            ),
            code=(
                "assert output.requires_grad  # after each line between {layer} and the loss: the first to fail "
                "is the cut"
            ),
            expected="Every parameter before the cut has a gradient after backward().",
            reference=_AUTOGRAD,
        ),
        "differentiable-op": RemedyText(
            reason=(
                "Rounding, sign, argmax and comparisons have derivative zero; pass the gradient straight through them."
            ),
            code="hard = soft.round()\ny = soft + (hard - soft).detach()  # forward: hard, backward: soft",
            expected="A gradient that is not zero before the operation; the forward pass stays the same.",
            reference="Bengio, Leonard, Courville (2013), Estimating or Propagating Gradients, arXiv 1308.3432",
        ),
        "input-check": RemedyText(
            reason="Non-finite data must be found where they are loaded; one bad example ruins every weight.",
            code='assert torch.isfinite(batch).all(), "non-finite values in the batch"',
            expected="The run stops at the batch that is spoilt, before it reaches a weight.",
            reference="PyTorch documentation, torch.isfinite",
        ),
        "standardize-input": RemedyText(
            reason="Inputs of mean 0 and standard deviation 1 keep the first layers where their derivative is large.",
            code=call(
                "standardize-input",
                by_hand="batch = (batch - mean) / deviation, both of the whole data set, where data are loaded",
            ),
            expected="First layers whose units are neither all off nor at the flat ends.",
            reference="LeCun, Bottou, Orr, Mueller (1998), Efficient BackProp, section 4.3",
        ),
        "robust-scaling": RemedyText(
            reason="Median and quartiles ignore the outliers that set mean and deviation; the clamp bounds the rest.",
            code=(
                "quartiles = torch.tensor([0.25, 0.5, 0.75])\n"
                "low, middle, high = torch.quantile(batch, quartiles, dim=0)  # better: of all data\n"
                "batch = ((batch - middle) / (high - low).clamp_min(1e-6)).clamp(-10, 10)"
            ),
            expected="No input entry beyond 10: a single example no longer makes the gradient of its batch.",
            reference="Huber, Ronchetti (2009), Robust Statistics, 2nd edition, chapter 5",
        ),
        "safe-op": RemedyText(
            reason="log, division, sqrt and their like need an argument kept away from the edge, inside the function.",
            code=(
                "y = torch.log(x.clamp_min(1e-8))  # and torch.sqrt(x + 1e-12), a / (b + 1e-8), x.clamp(-1 + "
                "1e-6, 1 - 1e-6)"
            ),
            expected="Finite outputs and finite gradients at the edge as well.",
            reference=_AUTOGRAD + ", Gradients for non-differentiable functions",
        ),
        "logits-loss": RemedyText(
            reason="A loss that takes logits computes log and exp together, where neither over- nor underflows.",
            code="loss = torch.nn.functional.cross_entropy(logits, target)  # logits: no softmax before it",
            expected="A finite loss for logits of any size.",
            reference="PyTorch documentation, torch.nn.functional.cross_entropy",
        ),
        "anomaly-mode": RemedyText(
            reason=(
                "Anomaly mode names the line of the forward pass whose derivative is NaN; for one step only, it "
                "is slow."
            ),
            code="with torch.autograd.detect_anomaly():\n    compute_loss(model, batch).backward()",
            expected="An error whose traceback ends at the line to mend.",
            reference="PyTorch documentation, torch.autograd.detect_anomaly",
        ),
        "truncated-bptt": RemedyText(
            reason="Cutting a long sequence into parts bounds over how many steps a gradient can grow.",
            code=(
                "def detached(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:\n"
                "    return tuple(part.detach() for part in state)\n"
                "\n"
                "# between two parts of a sequence: output, state = rnn(part, detached(state))"
            ),
            expected="Growth over the steps of one part only; what lies further back is no longer learnt from.",
            reference=f"Williams, Peng (1990), Neural Computation 2(4); {PASCANU}",
        ),
    }
)
"""Texts by remedy."""
