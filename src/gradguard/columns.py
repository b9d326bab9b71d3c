"""The columns of a record: every statistic by name, with its unit and what stands for an unknown one.

Layer statistics (one number per module and observation; the calls of a module that runs several times are pooled):

==========================  ==========================================================================================
``delta_norm``              L2 norm of the loss gradient at the module's output (Frobenius norm over the whole tensor);
                            NaN where no gradient arrived, 0 for an exact zero, inf where an entry is NaN or infinite
                            (an overflow of the squares alone is not: the norm is then estimated, and finite).
``delta_max_abs``           Upper bound of the largest absolute entry of the same gradient (exact for large tensors,
                            else the norm); NaN and inf propagate.
``input_delta_norm``        L2 norm of the loss gradient at the module's first input tensor; NaN where unknown.
``input_delta_max_abs``     Upper bound of its largest absolute entry, as above.
``block_delta_norm``        L2 norm of the loss gradient at the input of a block, in the row of the block's first module
                            to run; NaN elsewhere, and where the input has no gradient or is also another block's.
                            Blocks are those of the model's outermost stack, see :attr:`LayerTable.blocks`.
``block_delta_max_abs``     Upper bound of its largest absolute entry, as above.
``forward_rms``             Root mean square of the output; inf where an entry is NaN or infinite.
``forward_max_abs``         Upper bound of the largest absolute entry of the output (exact for large tensors and for
                            half precision, else its norm); NaN and inf propagate.
``input_max_abs``           Largest absolute entry of the input; NaN and inf propagate.
``zero_fraction``           Share of exact zeros in the output, 0..1.
``inactive_fraction``       Share of units that were 0 for every example of this observation, 0..1. Only for modules
                            whose zero output means a zero derivative (ReLU and its relatives); otherwise NaN.
``dead_fraction``           Share of units inactive in every observation of the last ``dead_patience_steps`` optimizer
                            steps (at least three observations); 0 before that many were seen, NaN where
                            ``inactive_fraction`` is.
``input_inactive_fraction`` Like ``inactive_fraction``, for an input made by functional code (``F.relu``) just before
                            this module; NaN where the input is another module's output, or raw data.
``input_dead_fraction``     Like ``dead_fraction``, for the same input.
``saturated_fraction``      Share of units whose derivative, averaged over the examples, is below 5 % of the
                            activation's largest derivative, 0..1; bounded activations only (sigmoid, tanh, ...).
``input_saturated_share``   Like ``saturated_fraction``, for an input made by ``torch.tanh`` or ``torch.sigmoid`` as a
                            function just before this module; NaN elsewhere.
``input_derivative_share``  Root mean square of the derivative of that function, over its largest, 0..1.
``attention_entropy``       Entropy of the attention weights over ln(visible keys), mean over queries and heads, 0..1:
                            1 for equal weights, 0 where each query takes one key. From at most 2 entries of the batch
                            and 8 queries, all heads and keys; NaN where the module ran no attention that could be seen
                            or its logits are not finite.
``attention_entropy_min``   The same, of the lowest head.
``attention_logit_max``     Largest logit of the same queries as the softmax gets it, masks that are added included,
                            hidden keys left out; NaN as above.
``derivative_mean``         Root mean square of the activation's derivative over this observation's pre-activations.
``calls``                   Number of calls pooled into the row.
``gradient_calls``          Number of those calls whose output received a gradient.
==========================  ==========================================================================================

Statistics of recurrent modules (further layer columns, present only in records in which one was followed through time;
NaN for other modules). They are of a slice of at most 4 sequences and 256 steps, replayed with the weights before the
update, and of the gradient of the last reading alone: the last step of a sequence whose output receives gradient. It is
looked at where it reaches the module's input.

=======================  =============================================================================================
``temporal_span``        Decades between the eighth of the steps farthest from the last reading and the nearest eighth;
                         negative where the gradient vanishes on its way back through time.
``temporal_factor``      Factor per step back (Theil-Sen); 1 keeps its size.
``temporal_horizon``     Steps back after which a decade is lost; inf where that happens at none of the steps.
``temporal_steps``       Steps looked at. A bidirectional net is judged over half of its sequence.
``temporal_reach``       How far back the loss reads outputs, as a share of the steps: 0 where it reads the last one
                         only (sequence to one), near 1 where it reads all (a loss per step, a mean, attention).
``gate_mean``            Mean forget gate (LSTM) or update gate (GRU: the share of the state that is kept), 0..1; NaN
                         for a plain RNN.
``temporal_derivative``  Root mean square of the activation's derivative, plain RNN; NaN for others.
=======================  =============================================================================================

Parameter statistics (one number per parameter and observation):

======================  ================================================================================================
``grad_norm``           L2 norm of the accumulated, unscaled gradient before clipping; NaN where ``.grad`` is None,
                        unreadable or another optimizer's; inf where an entry is NaN or infinite.
``grad_max_abs``        Upper bound of the largest absolute gradient entry (exact for large tensors, else the norm); NaN
                        and inf propagate; NaN where ``.grad`` is None.
``weight_norm``         L2 norm of the parameter before the update; inf where an entry is NaN or infinite.
``weight_max_abs``      Upper bound of the parameter's largest absolute entry before the update, as above.
``update_ratio``        L2 norm of the update over L2 norm of the weight, from at most ``sample_size`` entries; NaN
                        unknown.
``moved_fraction``      Share of sampled entries with a non-zero gradient that the step changed, 0..1; NaN unknown.
``trainable``           1 where ``requires_grad``, else 0.
``in_optimizer``        1 where a watched optimizer holds it (or there is none to ask), else 0.
``lr``                  Learning rate of its parameter group; NaN unknown.
``absent``              1 where a gradient was due (trainable, this optimizer's) and ``.grad`` is None, else 0.
``rounding_unit``       Distance from 1 to the next number of the parameter's type: 2^-23 in float32, 2^-10 in float16,
                        2^-7 in bfloat16; NaN for other types.
``underflow_fraction``  Share of sampled gradient entries below 8 x 2^-24, zeros included, as float16 computed them
                        (still scaled), where all of them lie below its normal range, 2^-14; 0 where one lies in it; NaN
                        where the gradient was not computed in float16 (an entry is no multiple of 2^-24) or has fewer
                        than 16 sampled entries other than zero. In a check: share of entries that are exactly zero and
                        are not when the loss is scaled up, measured where most entries are zero and float16 was seen.
``second_moment_rms``   Root of the mean of the optimizer's running mean of squares (Adam's v, bias-corrected) before
                        the step, from the sampled entries; NaN where it keeps none, as at the first step, and for
                        vectors.
``epsilon_fraction``    Share of sampled entries with a second moment above 0 whose root is below ten times ``eps``; NaN
                        as above.
``update_rms``          Root mean square of gradient over max(root of the second moment, ``eps``), before the step and
                        before the caller's clipping, over entries with a second moment above 0; NaN as above.
======================  ================================================================================================

Matrix statistics (one number per matrix and observation; the gates of a recurrent layer and the projections of an
attention layer are matrices of their own; see :class:`MatrixTable`). They are of the weights before the update.

===================  ==================================================================================================
``sigma_max``        Largest singular value, from below: ten power iterations at the first observation and one more at
                     each later one, from where the last ended. Of a convolution that of the operator on an input as
                     large as the last one. NaN or inf where an entry is.
``spectral_radius``  Largest absolute eigenvalue of a recurrent matrix, from the growth over 100 products at the first
                     observation and 32 more at each later one, fewer of large ones; NaN for other matrices.
===================  ==================================================================================================

Scalars: ``grad_norm`` (total over this optimizer's parameters, before clipping), ``grad_norm_at_step`` (the same when
the optimizer ran, after the caller's clipping), ``lr``, ``loss_scale`` (1 without a scaler), ``read_before_clipping``
(1 where ``record()`` read the gradients, 0 where only the step hook did), ``cost_s`` (seconds of host time that
finishing the observation took), ``float16`` (1 where a module returned float16), ``gradient_cosine`` (cosine of the
angle between this gradient, over this optimizer's parameters, and the one before it, -1..1, from 64 entries of each
tensor; the one before is that of the previous observation, or of the first one within the last ten steps),
``gradient_cosine_steps`` (optimizer steps between the two),
``skipped_steps`` (steps that the loss scaler had skipped by then, as counted by a
falling scale; only with a scaler and recorded losses). A scalar that is unknown is absent from the mapping. A step that
a loss scaler skipped gives no record. Losses are kept for every step, by :meth:`gradguard.history.History.note_loss`.
"""

from __future__ import annotations

__all__ = ["LAYER_STATISTICS", "MATRIX_STATISTICS", "PARAMETER_STATISTICS", "TEMPORAL_STATISTICS"]

LAYER_STATISTICS = (
    "delta_norm",
    "delta_max_abs",
    "input_delta_norm",
    "input_delta_max_abs",
    "block_delta_norm",
    "block_delta_max_abs",
    "forward_rms",
    "forward_max_abs",
    "input_max_abs",
    "zero_fraction",
    "inactive_fraction",
    "dead_fraction",
    "input_inactive_fraction",
    "input_dead_fraction",
    "input_saturated_share",
    "input_derivative_share",
    "saturated_fraction",
    "derivative_mean",
    "attention_entropy",
    "attention_entropy_min",
    "attention_logit_max",
    "calls",
    "gradient_calls",
)

TEMPORAL_STATISTICS = (
    "temporal_span",
    "temporal_factor",
    "temporal_horizon",
    "temporal_steps",
    "temporal_reach",
    "gate_mean",
    "temporal_derivative",
)

MATRIX_STATISTICS = ("sigma_max", "spectral_radius")

PARAMETER_STATISTICS = (
    "grad_norm",
    "grad_max_abs",
    "weight_norm",
    "weight_max_abs",
    "update_ratio",
    "moved_fraction",
    "trainable",
    "in_optimizer",
    "lr",
    "absent",
    "rounding_unit",
    "underflow_fraction",
    "second_moment_rms",
    "epsilon_fraction",
    "update_rms",
)
