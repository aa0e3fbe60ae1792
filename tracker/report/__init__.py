"""How is what was found shown to a person? Self-contained pages, each with its JSON twin beside it."""

from tracker.report.attribution_page import write_attribution_report
from tracker.report.diff_page import write_diff_report
from tracker.report.misalignment_page import write_misalignment_report
from tracker.report.run_page import write_run_report, write_runs_report
from tracker.report.timeline_page import write_timeline_report

__all__ = [
    "write_attribution_report",
    "write_diff_report",
    "write_misalignment_report",
    "write_run_report",
    "write_runs_report",
    "write_timeline_report",
]
