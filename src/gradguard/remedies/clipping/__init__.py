"""Gradient clipping; the public names are in :mod:`gradguard.clip`."""
