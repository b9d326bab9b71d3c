"""Initialization remedies."""

from gradguard.remedies.initialization._gain import stack_gain
from gradguard.remedies.initialization._schemes import Scheme, initialize

__all__ = ["Scheme", "initialize", "stack_gain"]
