"""Prints what came of the faults once all tests are over."""

from __future__ import annotations

import pytest

from tests.faults.test_faults import OUTCOMES, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        terminalreporter.write_line(f"\n{table(OUTCOMES)}")
