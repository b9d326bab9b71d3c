"""Experiments that show what is known of gradients, each with a table and a picture, measured by gradguard.

Run one from the root of the repository: ``python -m examples.experiments.residual_depth``. They need scikit-learn, and
matplotlib for the pictures: ``pip install 'gradguard[examples]'``. docs/experiments.md has what they print.
"""
