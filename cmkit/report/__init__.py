"""The page a person opens: `report.html`, one file made of what a run's folder holds."""

from cmkit.report.figures import score
from cmkit.report.page import write_report
