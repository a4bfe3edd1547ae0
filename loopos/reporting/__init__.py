"""What a finished, running or broken run tells: its records, a diagnosis, a page."""

from loopos.reporting.doctor import Diagnosis, Finding, diagnose
from loopos.reporting.page import report_page, write_report
from loopos.reporting.records import RunRecords, read_run

__all__ = [
    "Diagnosis",
    "Finding",
    "RunRecords",
    "diagnose",
    "read_run",
    "report_page",
    "write_report",
]
