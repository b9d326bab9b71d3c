"""Measurements of gradguard: what it finds, and what it costs."""
