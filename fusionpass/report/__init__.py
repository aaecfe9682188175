"""What happened, and why."""

from .trace import GraphTrace, Record, Report, Site

__all__ = ["GraphTrace", "Record", "Report", "Site"]
