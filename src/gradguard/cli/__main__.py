"""``python -m gradguard.cli`` does what ``gradguard`` does."""

from __future__ import annotations

from gradguard.cli import main

main()
