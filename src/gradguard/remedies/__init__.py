"""Remedies: what changes gradients, parameters or the model, on request only.

Every remedy that changes a model returns an :class:`Applied`, whose ``undo()`` puts back bit for bit what was changed.
"""

from gradguard.remedies._applied import Applied

__all__ = ["Applied"]
