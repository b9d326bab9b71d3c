"""Training frameworks: each integration is optional, thin, and stands on :mod:`gradguard.guard`."""

from __future__ import annotations

__all__: list[str] = []
