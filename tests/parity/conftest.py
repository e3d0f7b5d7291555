"""After the parity tests: for each file of figures, the cases run and the worst error."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_terminal_summary(terminalreporter):
    found = defaultdict(list)
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "parity" and report.when == "call":
                file, dtype, worst = value
                found[file, dtype.removeprefix("torch.")].append(worst)
    if found:
        terminalreporter.section("parity: cases that agree, worst error / tolerance")
    for (file, dtype), worst in sorted(found.items()):
        terminalreporter.write_line(f"{file:24} {dtype:8} {len(worst):4} cases  {max(worst):.2g}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Figures in float32 follow from those in float64, but for what rounding does."""
    for item in items:
        words = item.callspec.id.split("-") if hasattr(item, "callspec") else ()
        if item.path.is_relative_to(HERE) and "f32" in words:
            item.add_marker("slow")
