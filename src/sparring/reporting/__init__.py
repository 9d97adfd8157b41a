"""The report: one HTML file, made from a run's plan and evidence alone."""

from sparring.reporting.page import write_report

__all__ = ["write_report"]
