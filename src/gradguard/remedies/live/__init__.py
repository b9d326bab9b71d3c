"""Remedies that act while a run goes on: clipping, leaving out spikes, backing off with the learning rate."""
