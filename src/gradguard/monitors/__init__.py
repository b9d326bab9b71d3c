"""Monitors: from an ``nn.Module`` to numbers. They register the hooks that observe, and never modify training."""

from gradguard.monitors.gradients import GradientMonitor
from gradguard.monitors.losses import LossMonitor
from gradguard.monitors.non_finite_origin import NonFiniteMonitor
from gradguard.monitors.signals import SignalMonitor
from gradguard.monitors.spectral import SpectralMonitor
from gradguard.monitors.temporal import TemporalMonitor

__all__ = ["GradientMonitor", "LossMonitor", "NonFiniteMonitor", "SignalMonitor", "SpectralMonitor", "TemporalMonitor"]
