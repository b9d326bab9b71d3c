"""The clinic: labelled training runs that score gradguard. See ``python -m benchmarks.clinic --help``."""
