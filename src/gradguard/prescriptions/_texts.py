"""The remedies in words: why, what to paste, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["REMEDIES", "RemedyText"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemedyText:
    """A remedy's texts; names in braces (layer, parameter, activation, factor) are filled in from the finding."""

    reason: str
    code: str
    reference: str


_HE = "He, Zhang, Ren, Sun (2015), Delving Deep into Rectifiers, ICCV, arXiv 1502.01852"
_GLOROT = "Glorot, Bengio (2010), Understanding the difficulty of training deep feedforward neural networks, AISTATS"
_RESNET = "He, Zhang, Ren, Sun (2016), Deep Residual Learning for Image Recognition, CVPR, arXiv 1512.03385"
_BATCH_NORM = "Ioffe, Szegedy (2015), Batch Normalization, ICML, arXiv 1502.03167"
_LAYER_NORM = "Ba, Kiros, Hinton (2016), Layer Normalization, arXiv 1607.06450"
_PASCANU = (
    "Pascanu, Mikolov, Bengio (2013), On the difficulty of training recurrent neural networks, ICML, arXiv 1211.5063"
)
_WARM_UP = "Goyal et al. (2017), Accurate, Large Minibatch SGD, section 2.2, arXiv 1706.02677"
_RATIO = "Karpathy, CS231n notes, Neural networks part 3: ratio of update to weight magnitudes about 1e-3"
_AUTOGRAD = "PyTorch documentation, Autograd mechanics"
_MIXED = "Micikevicius et al. (2018), Mixed Precision Training, ICLR, arXiv 1710.03740"
_LECUN = "LeCun, Bottou, Orr, Mueller (1998), Efficient BackProp, section 4.3"

_QK_NORM = "Dehghani et al. (2023), Scaling Vision Transformers to 22 Billion Parameters, ICML, arXiv 2302.05442"
_ENTROPY = "Zhai et al. (2023), Preventing Attention Entropy Collapse, ICML, arXiv 2303.06296"

REMEDIES: Mapping[str, RemedyText] = MappingProxyType(
    {
        "he-initialization": RemedyText(
            reason="Weights of variance 2/fan_in keep the size of signal and gradient from layer to layer under ReLU.",
            code=(
                "nn = torch.nn\n"
                "kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)\n"
                "for layer in model.modules():\n"
                "    if isinstance(layer, kinds):\n"
                '        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")\n'
                "        if layer.bias is not None:\n"
                "            nn.init.zeros_(layer.bias)"
            ),
            reference=_HE,
        ),
        "xavier-initialization": RemedyText(
            reason=(
                "Weights of variance 2/(fan_in + fan_out) keep tanh units in their linear range and the "
                "gradient's size."
            ),
            code=(
                "nn = torch.nn\n"
                "kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)\n"
                "for layer in model.modules():\n"
                "    if isinstance(layer, kinds):\n"
                "        nn.init.xavier_normal_(layer.weight)\n"
                "        if layer.bias is not None:\n"
                "            nn.init.zeros_(layer.bias)"
            ),
            reference=_GLOROT,
        ),
        "layer-norm": RemedyText(
            reason=(
                "LayerNorm before each activation sets the scale anew at every layer, so that no loss of size "
                "is passed on."
            ),
            code=(
                "def layer(width: int) -> torch.nn.Module:\n"
                "    return torch.nn.Sequential(\n"
                "        torch.nn.Linear(width, width),\n"
                "        torch.nn.LayerNorm(width),\n"
                "        torch.nn.{activation}(),\n"
                "    )"
            ),
            reference=_LAYER_NORM,
        ),
        "batch-norm": RemedyText(
            reason=(
                "BatchNorm before each activation centres and scales every unit over the batch, where the slope "
                "is largest."
            ),
            code=(
                "def layer(width: int) -> torch.nn.Module:\n"
                "    return torch.nn.Sequential(\n"
                "        torch.nn.Linear(width, width),\n"
                "        torch.nn.BatchNorm1d(width),\n"
                "        torch.nn.{activation}(),\n"
                "    )"
            ),
            reference=_BATCH_NORM,
        ),
        "residual": RemedyText(
            reason="An identity path around each block carries the gradient past what shrinks or amplifies it.",
            code=(
                "class Residual(torch.nn.Module):\n"
                "    def __init__(self, block: torch.nn.Module) -> None:\n"
                "        super().__init__()\n"
                "        self.block = block\n"
                "\n"
                "    def forward(self, x: torch.Tensor) -> torch.Tensor:\n"
                "        return x + self.block(x)"
            ),
            reference=_RESNET,
        ),
        "relu": RemedyText(
            reason="The derivative of ReLU is 1 where it is on; with He initialization the gradient keeps its size.",
            code=(
                "for parent in list(model.modules()):\n"
                "    for name, child in list(parent.named_children()):\n"
                "        if isinstance(child, torch.nn.{activation}):  # hidden layers; put an output activation back\n"
                "            setattr(parent, name, torch.nn.ReLU())\n"
                "for layer in model.modules():\n"
                "    if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):\n"
                '        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")'
            ),
            reference=_HE,
        ),
        "leaky-relu": RemedyText(
            reason="A small slope on the negative side lets a gradient through, so that units can come back.",
            code=(
                "for parent in list(model.modules()):\n"
                "    for name, child in list(parent.named_children()):\n"
                "        if isinstance(child, torch.nn.ReLU):\n"
                "            setattr(parent, name, torch.nn.LeakyReLU(0.01))"
            ),
            reference="Maas, Hannun, Ng (2013), Rectifier Nonlinearities Improve Neural Network Acoustic Models, ICML",
        ),
        "clip-norm": RemedyText(
            reason="Clipping the gradient's norm bounds what one step can do; it treats the effect, not the cause.",
            code="torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # between backward() and step()",
            reference=_PASCANU,
        ),
        "lower-learning-rate": RemedyText(
            reason="Steps that are small against the weights let the loss fall instead of throwing them about.",
            code='for group in optimizer.param_groups:\n    group["lr"] *= {factor}',
            reference=_RATIO,
        ),
        "higher-learning-rate": RemedyText(
            reason=(
                "Weights that move by a millionth of themselves per step need a million steps; aim at a ratio of 1e-3."
            ),
            code='for group in optimizer.param_groups:\n    group["lr"] *= {factor}',
            reference=_RATIO,
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
            reference=_WARM_UP,
        ),
        "set-learning-rate": RemedyText(
            reason="A group with learning rate 0 never moves; check the schedule that sets it, too.",
            code='for group in optimizer.param_groups:\n    group["lr"] = group["lr"] or 1e-3',
            reference="PyTorch documentation, torch.optim, Per-parameter options",
        ),
        "add-to-optimizer": RemedyText(
            reason="Parameters made after the optimizer, or left out of it, get gradients that nobody applies.",
            code=(
                'held = {{id(p) for group in optimizer.param_groups for p in group["params"]}}\n'
                "missing = [p for p in model.parameters() if p.requires_grad and id(p) not in held]\n"
                'optimizer.add_param_group({{"params": missing}})'
            ),
            reference="PyTorch documentation, torch.optim.Optimizer.add_param_group",
        ),
        "freeze": RemedyText(
            reason=(
                "What is not meant to learn is better frozen on purpose: everyone sees it, and its backward "
                "pass is saved."
            ),
            code='model.get_parameter("{parameter}").requires_grad_(False)',
            reference=_AUTOGRAD,
        ),
        "freeze-module": RemedyText(
            reason="If the cut is meant, freezing what lies behind it says so, and saves its backward pass.",
            code='model.get_submodule("{layer}").requires_grad_(False)',
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
            reference=_AUTOGRAD,
        ),
        "differentiable-op": RemedyText(
            reason=(
                "Rounding, sign, argmax and comparisons have derivative zero; pass the gradient straight through them."
            ),
            code="hard = soft.round()\ny = soft + (hard - soft).detach()  # forward: hard, backward: soft",
            reference="Bengio, Leonard, Courville (2013), Estimating or Propagating Gradients, arXiv 1308.3432",
        ),
        "input-check": RemedyText(
            reason="Non-finite data must be found where they are loaded; one bad example ruins every weight.",
            code='assert torch.isfinite(batch).all(), "non-finite values in the batch"',
            reference="PyTorch documentation, torch.isfinite",
        ),
        "standardize-input": RemedyText(
            reason="Inputs of mean 0 and standard deviation 1 keep the first layers where their derivative is large.",
            code="batch = (batch - batch.mean(0)) / batch.std(0).clamp_min(1e-6)",
            reference=_LECUN,
        ),
        "safe-op": RemedyText(
            reason="log, division, sqrt and their like need an argument kept away from the edge, inside the function.",
            code=(
                "y = torch.log(x.clamp_min(1e-8))  # and torch.sqrt(x + 1e-12), a / (b + 1e-8), x.clamp(-1 + "
                "1e-6, 1 - 1e-6)"
            ),
            reference=_AUTOGRAD + ", Gradients for non-differentiable functions",
        ),
        "logits-loss": RemedyText(
            reason="A loss that takes logits computes log and exp together, where neither over- nor underflows.",
            code="loss = torch.nn.functional.cross_entropy(logits, target)  # logits: no softmax before it",
            reference="PyTorch documentation, torch.nn.functional.cross_entropy",
        ),
        "anomaly-mode": RemedyText(
            reason=(
                "Anomaly mode names the line of the forward pass whose derivative is NaN; for one step only, it "
                "is slow."
            ),
            code="with torch.autograd.detect_anomaly():\n    compute_loss(model, batch).backward()",
            reference="PyTorch documentation, torch.autograd.detect_anomaly",
        ),
        "bfloat16": RemedyText(
            reason="bfloat16 has the range of float32, so that numbers above 65504 stay finite.",
            code=(
                "with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):\n"
                "    loss = compute_loss(model, batch)"
            ),
            reference="PyTorch documentation, Automatic Mixed Precision",
        ),
        "loss-scaler": RemedyText(
            reason="Multiplying the loss lifts each gradient over the edge of float16; dividing restores it exactly.",
            code=(
                "scaler = torch.amp.GradScaler(next(model.parameters()).device.type)  # once\n"
                "scaler.scale(compute_loss(model, batch)).backward()\n"
                "scaler.step(optimizer)\n"
                "scaler.update()"
            ),
            reference=_MIXED,
        ),
        "float32-weights": RemedyText(
            reason="Weights in float32 keep updates that half precision rounds away; autocast still computes in half.",
            code=(
                "model.float()  # before the optimizer is made\n"
                "with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):\n"
                "    loss = compute_loss(model, batch)"
            ),
            reference=_MIXED,
        ),
        "smaller-epsilon": RemedyText(
            reason="An eps below the size of any gradient of this model lets the optimizer set its steps again.",
            code='for group in optimizer.param_groups:\n    group["eps"] = 1e-15',
            reference="Wortsman et al. (2024), Small-scale proxies for large Transformers, arXiv 2309.14322",
        ),
        "qk-norm": RemedyText(
            reason="Queries and keys of unit size bound the logits, whatever the weights become.",
            code=(
                "norm = torch.nn.functional.layer_norm  # or nn.RMSNorm with a learned scale\n"
                "# in forward of {layer}, before the product, each of shape [batch, heads, length, size]:\n"
                "# q, k = norm(q, q.shape[-1:]), norm(k, k.shape[-1:])"
            ),
            reference=_QK_NORM,
        ),
        "scale-attention": RemedyText(
            reason="Over the root of the head's size, products of queries and keys have the variance of one factor.",
            code=(
                "# in forward of {layer}:\n"
                "# torch.nn.functional.scaled_dot_product_attention(q, k, v)  # divides by sqrt(head size) itself\n"
                "# logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # by hand"
            ),
            reference="Vaswani et al. (2017), Attention Is All You Need, NeurIPS, section 3.2.1, arXiv 1706.03762",
        ),
        "small-query-key": RemedyText(
            reason="Logits go with the product of two weights: usual ones start with attention spread over all keys.",
            code=(
                "attention = dict(model.named_modules()).get({layer!r}, model)\n"
                "for name, weight in attention.named_parameters():\n"
                "    if weight.ndim == 2 and any(part in name for part in "
                '("query", "key", "q_proj", "k_proj", "in_proj", "qkv")):\n'
                "        torch.nn.init.xavier_uniform_(weight)"
            ),
            reference=_GLOROT,
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
            reference=_ENTROPY,
        ),
        "lower-beta2": RemedyText(
            reason="With a shorter memory the running mean of squares follows a growing gradient sooner.",
            code='for group in optimizer.param_groups:\n    group["betas"] = (group.get("betas", (0.9,))[0], 0.95)',
            reference="Wortsman et al. (2023), Stable and low-precision training, NeurIPS, arXiv 2304.13013",
        ),
        "raise-clip-norm": RemedyText(
            reason="A threshold of twice the usual norm cuts spikes only, and leaves the learning rate its meaning.",
            code="torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm={norm})  # between backward() and step()",
            reference=_PASCANU,
        ),
        "orthogonal-recurrent": RemedyText(
            reason="An orthogonal recurrent matrix has spectral radius 1: it keeps the length of what it passes on.",
            code=(
                "with torch.no_grad():\n"
                "    for rnn in model.modules():\n"
                "        if isinstance(rnn, (torch.nn.RNNBase, torch.nn.RNNCellBase)):\n"
                "            for name, weight in rnn.named_parameters():\n"
                '                if name.startswith("weight_hh"):\n'
                "                    for gate in weight.split(rnn.hidden_size):\n"
                "                        torch.nn.init.orthogonal_(gate)"
            ),
            reference="Saxe, McClelland, Ganguli (2014), Exact solutions to deep linear networks, arXiv 1312.6120",
        ),
        "forget-bias": RemedyText(
            reason="A forget gate that starts at sigmoid(1) = 0.73, not at 0.5, keeps the cell for twice the steps.",
            code=(
                "with torch.no_grad():  # torch adds two biases, and orders the gates i, f, g, o\n"
                "    for rnn in model.modules():\n"
                "        if isinstance(rnn, (torch.nn.LSTM, torch.nn.LSTMCell)):\n"
                "            for name, bias in rnn.named_parameters():\n"
                '                if name.startswith("bias"):\n'
                '                    bias.chunk(4)[1].fill_(float("_ih" in name))'
            ),
            reference=(
                "Jozefowicz, Zaremba, Sutskever (2015), An Empirical Exploration of Recurrent Network Architectures, "
                "ICML; Gers, Schmidhuber, Cummins (2000), Learning to Forget"
            ),
        ),
        "chrono-bias": RemedyText(
            reason="Gate biases of ln U(1, T - 1) give the units memories of every length up to T steps.",
            code=(
                "steps = {steps}  # to remember over\n"
                "with torch.no_grad():\n"
                "    for rnn in model.modules():\n"
                "        if isinstance(rnn, (torch.nn.LSTM, torch.nn.GRU, torch.nn.LSTMCell, torch.nn.GRUCell)):\n"
                "            is_lstm = isinstance(rnn, (torch.nn.LSTM, torch.nn.LSTMCell))\n"
                "            for name, bias in rnn.named_parameters():\n"
                '                if name.startswith("bias"):\n'
                "                    bias.zero_()\n"
                '                if name.startswith("bias_ih"):\n'
                "                    first, keep = bias.chunk(4 if is_lstm else 3)[:2]\n"
                "                    keep.uniform_(1, steps - 1).log_()\n"
                "                    if is_lstm:\n"
                "                        first.copy_(-keep)"
            ),
            reference="Tallec, Ollivier (2018), Can recurrent neural networks warp time?, ICLR, arXiv 1804.11188",
        ),
        "gated-cell": RemedyText(
            reason="The state of a GRU or an LSTM is kept by a gate, not multiplied by a matrix at every step.",
            code=(
                "for parent in list(model.modules()):\n"
                "    for name, child in list(parent.named_children()):\n"
                "        if isinstance(child, torch.nn.RNN):\n"
                "            gru = torch.nn.GRU(\n"
                "                child.input_size,\n"
                "                child.hidden_size,\n"
                "                child.num_layers,\n"
                "                batch_first=child.batch_first,\n"
                "                bidirectional=child.bidirectional,\n"
                "            )\n"
                "            setattr(parent, name, gru)"
            ),
            reference="Cho et al. (2014), Learning Phrase Representations using RNN Encoder-Decoder, arXiv 1406.1078",
        ),
        "truncated-bptt": RemedyText(
            reason="Cutting a long sequence into parts bounds over how many steps a gradient can grow.",
            code=(
                "def detached(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:\n"
                "    return tuple(part.detach() for part in state)\n"
                "\n"
                "# between two parts of a sequence: output, state = rnn(part, detached(state))"
            ),
            reference="Williams, Peng (1990), An efficient gradient-based algorithm, Neural Computation 2(4)",
        ),
        "restore-checkpoint": RemedyText(
            reason="A NaN weight never heals: go back to weights and optimizer state that are finite.",
            code='model.load_state_dict(checkpoint["model"])\noptimizer.load_state_dict(checkpoint["optimizer"])',
            reference="PyTorch tutorials, Saving and Loading Models",
        ),
    }
)
