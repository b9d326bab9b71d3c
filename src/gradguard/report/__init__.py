"""Reports: a Diagnosis drawn for people. Measures nothing, judges nothing, needs no torch."""

from gradguard.report.console import print_report, render
from gradguard.report.html import to_html

__all__ = ["print_report", "render", "to_html"]
