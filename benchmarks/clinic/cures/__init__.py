"""Cure score: what the recommended cure does to a sick run, beside what other ways of repairing do to it."""
