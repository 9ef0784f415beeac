"""Prints what came of the faults once all tests are over."""

from __future__ import annotations

import pytest

from tests.faults.test_faults import LEFT_OUT, OUTCOMES, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        terminalreporter.write_line(f"\n{table(OUTCOMES)}")
    if LEFT_OUT:
        terminalreporter.write_line(f"{len(LEFT_OUT)} more were planned, for which there was no time")
