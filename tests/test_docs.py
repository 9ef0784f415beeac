"""Pages of docs/ that say they are runnable: each command succeeds in a fresh folder and prints what the page shows.

A line that is shown must be among those printed once the numbers in both are made the same, and spaces and rules of
tables one long: figures and times differ between machines, words do not. `...` stands for anything.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.command_line import call
from tests.real_data import real_data

ROOT = Path(__file__).parent.parent
RUNNABLE = "<!-- runnable"
TRAINER = "python -m trainer "
LONGEST_SECONDS = 60

PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.read_text().startswith(RUNNABLE))


def steps(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page, each with the lines that follow it."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def masked(line: str) -> str:
    """A line without its numbers, widths and rules."""
    line = re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "0", line)
    return re.sub(r"-{2,}", "--", " ".join(line.split()))


def printed(command: str, folder: Path) -> str:
    """What a command prints; the trainer's run in this process, as importing torch takes seconds."""
    if command.startswith(TRAINER):
        outcome = call(*shlex.split(command.removeprefix(TRAINER)))
        assert outcome.code == 0, f"{command}: exit code {outcome.code}\n{outcome.errors}"
        return outcome.errors + "\n" + outcome.output
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stderr}"
    return done.stderr + "\n" + done.stdout


def missing(shown: list[str], text: str) -> list[str]:
    """The lines that are shown and were not printed."""
    lines = {masked(line) for line in re.split(r"[\r\n]", text)}
    return [line for line in shown if line not in ("...", "") and masked(line) not in lines]


def test_the_tutorial_is_runnable_and_every_runnable_page_has_commands() -> None:
    assert "tutorial.md" in {page.name for page in PAGES}
    assert all(len(steps(page)) > 1 for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_does_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = real_data("criteo").parent
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(data.resolve())
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for command, shown in steps(page):
        text = printed(command, folder)
        assert not missing(shown, text), f"{command} does not print {missing(shown, text)}, but:\n{text}"


def test_a_number_may_differ_and_a_word_may_not() -> None:
    text = "step 5/5  1,421 rows/s  AUC 0.7\n---  -----\na\rb"
    assert missing(["step 63/63 9 rows/s AUC 0.81", "----  --", "...", "b"], text) == []
    assert missing(["step 5/5 rows/s AUC 0.7"], text) == ["step 5/5 rows/s AUC 0.7"]
    assert missing(["step 5/5  1,421 rows/s  GAUC 0.7"], text) != []
