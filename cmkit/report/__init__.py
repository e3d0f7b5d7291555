"""`report.html`: one page of all that a run's folder holds."""

from cmkit.report.figures import score
from cmkit.report.page import write_report
