"""Remedies that set the weights: initialization of layers, residual branches and recurrent nets, in words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gradguard.prescriptions._text import GLOROT, HE, SAXE, RemedyText, call

__all__ = ["WEIGHTS"]

_NO_DEPTH = "The span over depth falls below half a decade: a factor per layer near 1."

WEIGHTS: Mapping[str, RemedyText] = MappingProxyType(
    {
        "he-initialization": RemedyText(
            reason="Weights of variance 2/fan_in keep the size of signal and gradient from layer to layer under ReLU.",
            code=call(
                "he-initialization",
                by_hand='torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"), biases 0',
            ),
            expected="With ReLU the factor per layer goes from 0.41, which torch's default gives, to 1.",
            reference=HE,
        ),
        "xavier-initialization": RemedyText(
            reason="Weights of variance 2/(fan_in + fan_out) keep tanh units in their linear range.",
            code=call("xavier-initialization", by_hand="torch.nn.init.xavier_normal_(layer.weight), biases 0"),
            expected="With tanh the factor per layer goes from 0.58, which torch's default gives, to 1.",
            reference=GLOROT,
        ),
        "lecun-initialization": RemedyText(
            reason="SELU normalizes its signals by itself if its weights have variance 1/fan_in.",
            code=call(
                "lecun-initialization",
                by_hand='torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear"), biases 0',
            ),
            expected="Outputs of every layer keep a standard deviation near 1, gradients a factor per layer near 1.",
            reference="Klambauer et al. (2017), Self-Normalizing Neural Networks, NeurIPS, arXiv 1706.02515",
        ),
        "orthogonal-initialization": RemedyText(
            reason="Orthogonal weights keep the length of every vector, not only the average one, under tanh.",
            code=call("orthogonal-initialization", by_hand="torch.nn.init.orthogonal_(layer.weight), biases 0"),
            expected=_NO_DEPTH,
            reference=SAXE,
        ),
        "delta-orthogonal-initialization": RemedyText(
            reason="A kernel that is orthogonal at its centre and zero elsewhere keeps the length of every signal.",
            code=call("delta-orthogonal-initialization"),
            expected=_NO_DEPTH,
            reference="Xiao et al. (2018), Dynamical Isometry and a Mean Field Theory of CNNs, ICML, arXiv 1806.05393",
        ),
        "lsuv": RemedyText(
            reason="Each layer is scaled on one batch to outputs of variance 1, whatever stands behind it.",
            code=call("lsuv"),
            expected="20 ReLU layers: a span over depth of 0.1 decades instead of 7.2.",
            reference="Mishkin, Matas (2016), All you need is a good init, ICLR, arXiv 1511.06422",
        ),
        "fixup": RemedyText(
            reason="Small first weights on each residual branch keep their sum bounded, without any normalization.",
            code=call("fixup"),
            expected="Blocks start as the identity: the gradient has the same size at the input of every block.",
            reference="Zhang, Dauphin, Ma (2019), Fixup Initialization, ICLR, arXiv 1901.09321",
        ),
        "skip-init": RemedyText(
            reason="A learnt scalar of 0 on each residual branch lets every block start as the identity.",
            code=call("skip-init", by_hand="x + self.alpha * branch(x), with alpha = nn.Parameter(torch.zeros(()))"),
            expected="The gradient has the same size at the input of every block, however many there are.",
            reference="De, Smith (2020), Batch Normalization Biases Residual Blocks, NeurIPS, arXiv 2002.10444",
        ),
        "rezero": RemedyText(
            reason="A learnt scalar of 0 on each branch lets every block of a transformer start as the identity.",
            code=call("rezero", by_hand="x + self.alpha * branch(x), with alpha = nn.Parameter(torch.zeros(()))"),
            expected="The gradient has the same size at the input of every block, and no warm-up is needed.",
            reference="Bachlechner et al. (2021), ReZero is All You Need, UAI, arXiv 2003.04887",
        ),
        "orthogonal-recurrent": RemedyText(
            reason="An orthogonal recurrent matrix has spectral radius 1: it keeps the length of what it passes on.",
            code=call(
                "orthogonal-recurrent",
                batch=False,
                by_hand="torch.nn.init.orthogonal_(gate) for gate in rnn.weight_hh_l0.split(rnn.hidden_size)",
            ),
            expected="A tanh RNN of 32 units over 60 steps: 3.7 decades are lost instead of 15.5.",
            reference=f"{SAXE}; Henaff, Szlam, LeCun (2016), Recurrent Orthogonal Networks, arXiv 1602.06662",
        ),
        "forget-gate-bias": RemedyText(
            reason="A gate that keeps sigmoid(1) = 0.73 of the state, not half, remembers for twice the steps.",
            code=call(
                "forget-gate-bias",
                batch=False,
                by_hand="bias_hh_l0.chunk(4)[1].fill_(1), the same part of bias_ih_l0 0; a GRU: chunk(3)[1]",
            ),
            expected="An LSTM of 32 units over 60 steps: 5 decades are lost instead of 12.",
            reference=(
                "Jozefowicz, Zaremba, Sutskever (2015), An Empirical Exploration of Recurrent Network Architectures, "
                "ICML; Gers, Schmidhuber, Cummins (2000), Learning to Forget"
            ),
        ),
        "chrono-initialization": RemedyText(
            reason="Gate biases of ln U(1, T - 1) give the units memories of every length up to T = {steps} steps.",
            code=(
                "from gradguard.remedies.initialization import chrono_initialize\n"
                "chrono_initialize(model, max_time={steps}, optimizer=optimizer)  # {steps}: steps to remember over"
            ),
            expected="An LSTM of 32 units over 60 steps: 1 decade is lost instead of 12.",
            reference="Tallec, Ollivier (2018), Can recurrent neural networks warp time?, ICLR, arXiv 1804.11188",
        ),
        "scale-query-key": RemedyText(
            reason="Logits go with the product of two weights: each takes half of what makes them too large.",
            code=call("scale-query-key"),
            expected="A largest logit of about 5, and an entropy near that of looking at every key alike.",
            reference="Kimi Team (2025), Kimi K2, section 2.1 (QK-Clip), arXiv 2507.20534",
        ),
        "query-key-initialization": RemedyText(
            reason="Logits go with the product of two weights: usual ones start with attention spread over all keys.",
            code=call("query-key-initialization", batch=False),
            expected="Logits of a few units, and an entropy near that of looking at every key alike.",
            reference=GLOROT,
        ),
    }
)
"""Texts by remedy."""
