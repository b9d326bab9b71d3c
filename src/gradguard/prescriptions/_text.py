"""What a remedy says of itself, and the sources that several of them share."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GLOROT", "HE", "LAYER_NORM", "MIXED", "PASCANU", "QK_NORM", "RATIO", "RESNET", "SAXE", "RemedyText", "call"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemedyText:
    """A remedy's texts; names in braces (layer, parameter, factor, norm, steps, times) are filled in from the finding.

    Attributes:
        reason: Why it should help, in a sentence.
        code: Lines to paste into a training loop. Where the library can apply the remedy they do what it does.
        expected: What should be different afterwards, with the number to look at.
        reference: Where the remedy comes from.
    """

    reason: str
    code: str
    expected: str
    reference: str


def call(name: str, *, batch: bool = True, by_hand: str = "") -> str:
    """Return the line that lets the library apply a remedy, and below it how the model's own code would say it.

    Args:
        name: Name of the remedy.
        batch: Whether the remedy looks at the model running on a batch.
        by_hand: The same in plain PyTorch, for the code that builds the model.
    """
    line = f'gradguard.apply("{name}", model, optimizer=optimizer{", batch=batch" if batch else ""})'
    return f"{line}\n# by hand: {by_hand}" if by_hand else line


HE = "He, Zhang, Ren, Sun (2015), Delving Deep into Rectifiers, ICCV, arXiv 1502.01852"
GLOROT = "Glorot, Bengio (2010), Understanding the difficulty of training deep feedforward neural networks, AISTATS"
SAXE = "Saxe, McClelland, Ganguli (2014), Exact solutions to deep linear networks, ICLR, arXiv 1312.6120"
RESNET = "He, Zhang, Ren, Sun (2016), Deep Residual Learning for Image Recognition, CVPR, arXiv 1512.03385"
LAYER_NORM = "Ba, Kiros, Hinton (2016), Layer Normalization, arXiv 1607.06450"
QK_NORM = "Dehghani et al. (2023), Scaling Vision Transformers to 22 Billion Parameters, ICML, arXiv 2302.05442"
PASCANU = (
    "Pascanu, Mikolov, Bengio (2013), On the difficulty of training recurrent neural networks, ICML, arXiv 1211.5063"
)
RATIO = "Karpathy, CS231n notes, Neural networks part 3: ratio of update to weight magnitudes about 1e-3"
MIXED = "Micikevicius et al. (2018), Mixed Precision Training, ICLR, arXiv 1710.03740"
