"""The input-output Jacobian of a net or of one of its blocks: how far it stretches, and how far it shrinks.

A gradient on its way back through a block is multiplied by the block's Jacobian. Where all its singular values lie near
1 (dynamical isometry), every direction of the gradient arrives as it left, whatever the loss.

Example:
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(50)))
    >>> for layer in net:
    ...     _ = torch.nn.init.orthogonal_(layer.weight)
    >>> found = stretch(net, torch.randn(4, 8))
    >>> round(found.largest, 5), round(found.smallest, 5), found.isometry
    (1.0, 1.0, 'isometric')
"""

from __future__ import annotations

from gradguard.jacobian._probe import stretch, stretch_in_loss
from gradguard.profiles import JacobianStretch

__all__ = ["JacobianStretch", "stretch", "stretch_in_loss"]
