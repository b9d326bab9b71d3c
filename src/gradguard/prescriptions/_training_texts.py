"""Remedies in the training loop: learning rate, optimizer, clipping and precision, in words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gradguard.prescriptions._text import MIXED, PASCANU, RATIO, RemedyText, call

__all__ = ["TRAINING"]

_RATE = (
    "for group in optimizer.param_groups:\n"
    '    group["lr"] *= {factor}\n'
    '    if "initial_lr" in group:  # from which a scheduler starts\n'
    '        group["initial_lr"] *= {factor}'
)

_CLIP = "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm={norm})  # between backward() and step()"

_AUTOCAST = (
    "with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):\n"
    "    loss = compute_loss(model, batch)"
)

TRAINING: Mapping[str, RemedyText] = MappingProxyType(
    {
        "lower-learning-rate": RemedyText(
            reason="Steps that are small against the weights let the loss fall instead of throwing them about.",
            code=_RATE,
            expected="Updates near a thousandth of the weights, and a loss that falls.",
            reference=RATIO,
        ),
        "higher-learning-rate": RemedyText(
            reason="Steps so short against the weights take a run of usual length nowhere; aim at a ratio of 1e-3.",
            code=_RATE,
            expected="Updates near a thousandth of the weights, and a loss that falls.",
            reference=RATIO,
        ),
        "even-learning-rates": RemedyText(
            reason="A group whose rate is {times} times that of most weights runs away from them.",
            code=call("even-learning-rates", batch=False),
            expected="The group's weights move no faster than the others, and the loss falls.",
            reference="PyTorch documentation, torch.optim, Per-parameter options",
        ),
        "set-learning-rate": RemedyText(
            reason="A group with learning rate 0 never moves; check the schedule that sets it, too.",
            code='for group in optimizer.param_groups:\n    group["lr"] = group["lr"] or 1e-3',
            expected="Every parameter with a gradient moves at the next step.",
            reference="PyTorch documentation, torch.optim, Per-parameter options",
        ),
        "warm-up": RemedyText(
            reason=(
                "The first steps do most of the damage: curvature is largest and Adam's averages are least "
                "reliable there."
            ),
            code=(
                "warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=500)\n"
                "# after each optimizer.step(): warmup.step()"
            ),
            expected="No spike and no dying units in the first hundreds of steps, at the same rate later.",
            reference="Goyal et al. (2017), Accurate, Large Minibatch SGD, section 2.2, arXiv 1706.02677",
        ),
        "weight-decay": RemedyText(
            reason="Decay pulls each weight back in proportion to its size, so that growth comes to a stop.",
            code=(
                "for group in optimizer.param_groups:\n"
                '    group["weight_decay"] = max(group.get("weight_decay", 0.0), 0.01)  # AdamW or SGD, not Adam'
            ),
            expected="Spectral norms level off instead of growing on.",
            reference="Loshchilov, Hutter (2019), Decoupled Weight Decay Regularization, ICLR, arXiv 1711.05101",
        ),
        "smaller-epsilon": RemedyText(
            reason="An eps below the size of any gradient of this model lets the optimizer set its steps again.",
            code='for group in optimizer.param_groups:\n    if "eps" in group:\n        group["eps"] = 1e-15',
            expected="Updates of the size of the learning rate again, also where gradients are tiny.",
            reference="Wortsman et al. (2024), Small-scale proxies for large Transformers, ICLR, arXiv 2309.14322",
        ),
        "lower-beta2": RemedyText(
            reason="With a shorter memory the running mean of squares follows a growing gradient sooner.",
            code=(
                "for group in optimizer.param_groups:\n"
                '    if "betas" in group:\n'
                '        group["betas"] = (group["betas"][0], min(group["betas"][1], 0.95))'
            ),
            expected="The update's RMS stays near 1, and the loss spikes that follow it stay away.",
            reference="Wortsman et al. (2023), Stable and low-precision training, NeurIPS, arXiv 2304.13013",
        ),
        "clip-norm": RemedyText(
            reason="Clipping the gradient's norm bounds what one step can do; it treats the effect, not the cause.",
            code=_CLIP,
            expected="No step follows a gradient whose norm is above {norm}; longer ones are shortened to it.",
            reference=PASCANU,
        ),
        "raise-clip-norm": RemedyText(
            reason="A threshold of twice the usual norm cuts spikes only, and leaves the learning rate its meaning.",
            code=_CLIP,
            expected="A few per cent of the steps are cut, not most of them.",
            reference=PASCANU,
        ),
        "lower-clip-norm": RemedyText(
            reason="A threshold above every norm protects from nothing; twice the largest stops the first spike.",
            code=_CLIP,
            expected="Usual steps stay as they are, and a gradient of twice the largest norm so far is cut.",
            reference=PASCANU,
        ),
        "adaptive-clip": RemedyText(
            reason="A threshold that follows the run's own norms cuts outliers only, whatever the usual norm is.",
            code=call("adaptive-clip", batch=False),
            expected="A few per cent of the steps are cut at most, and no single batch moves the weights far.",
            reference="Seetharaman et al. (2020), AutoClip, arXiv 2007.14469; the threshold is ours, docs/clipping.md",
        ),
        "bfloat16": RemedyText(
            reason="bfloat16 has the range of float32, so that numbers above 65504 stay finite.",
            code=_AUTOCAST,
            expected="No overflow below 3e38 and no underflow above 1e-38; no scaler is needed.",
            reference="Kalamkar et al. (2019), A Study of BFLOAT16 for Deep Learning Training, arXiv 1905.12322",
        ),
        "loss-scaler": RemedyText(
            reason="Multiplying the loss lifts each gradient over the edge of float16; dividing restores it exactly.",
            code=(
                "scaler = torch.amp.GradScaler(next(model.parameters()).device.type)  # once\n"
                "scaler.scale(compute_loss(model, batch)).backward()\n"
                "scaler.step(optimizer)\n"
                "scaler.update()"
            ),
            expected="Gradients down to 1e-12, not 6e-8, are kept at a scale of 65536.",
            reference=MIXED,
        ),
        "float32-weights": RemedyText(
            reason="Weights in float32 keep updates that half precision rounds away; autocast still computes in half.",
            code=f"model.float()  # before the optimizer is made\n{_AUTOCAST}",
            expected="Updates down to 1e-7 of a weight arrive, where bfloat16 loses those below 1 in 256.",
            reference=MIXED,
        ),
        "restore-checkpoint": RemedyText(
            reason="A NaN weight never heals: go back to weights and optimizer state that are finite.",
            code='model.load_state_dict(checkpoint["model"])\noptimizer.load_state_dict(checkpoint["optimizer"])',
            expected="A finite loss of the size it had when the checkpoint was made.",
            reference="PyTorch tutorials, Saving and Loading Models",
        ),
    }
)
"""Texts by remedy."""
