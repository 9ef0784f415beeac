"""`plan` and `report` as the command line runs them, on a run that is trained here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.command_line import call
from tests.resources import largest_file
from tests.small_data import run_plain, run_toml, write_click_log, write_toml


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run description, its data, and the output ``run`` of training."""
    folder = tmp_path_factory.mktemp("trained")
    write_click_log(folder)
    outcome = call("train", run_toml(folder, max_steps=10, evaluation={"every_steps": 5}))
    assert outcome.code == 0, outcome.errors
    return folder


def root_of(page: Path) -> ElementTree.Element:
    """The page, parsed as XML."""
    return ElementTree.fromstring(page.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))


def rows_of(root: ElementTree.Element) -> list[list[str]]:
    """Every row of every table."""
    return [[str(cell.text) for cell in row.iter("td")] for row in root.iter("tr")]


def test_the_page_of_a_run_has_its_numbers_and_scores_of_its_test_data(trained: Path, tmp_path: Path) -> None:
    outcome = call("report", trained / "run")
    assert outcome.code == 0, outcome.errors
    page = trained / "run" / "report.html"
    assert outcome.output == f"{page}: {page.stat().st_size:,} bytes\n"
    root = root_of(page)
    result = json.loads((trained / "run" / "result.json").read_text())
    rows = rows_of(root)
    assert ["test AUC", f"{result['test_auc']:.6g}"] in rows
    segment = next(row for row in rows if row and row[0] == "all rows")
    assert segment[2] == "160"
    assert float(segment[4]) == pytest.approx(result["test_auc"], rel=1e-5)
    assert float(segment[5]) == pytest.approx(result["test_gauc"], rel=1e-5)
    text = "".join(root.itertext())
    assert "160 of 160 rows of data.test, scored with the best checkpoint" in text
    assert "torchrec 1.8.0" in text
    assert '"global_batch_size": 64' in text
    assert ["sparse features", "6"] in rows

    other = tmp_path / "both.html"
    assert call("report", trained / "run", "--compare", trained / "run", "--no-scores", "--output", other).code == 0
    assert "not scored, as --no-scores asked" in other.read_text()


def test_a_run_whose_data_are_gone_has_a_page_that_says_so(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "metrics.jsonl").write_text((trained / "run" / "metrics.jsonl").read_text())
    outcome = call("report", copy)
    assert outcome.code == 0, outcome.errors
    assert "it says what is missing" in outcome.output
    assert "not scored: there is no whole checkpoint yet" in "".join(root_of(copy / "report.html").itertext())


def test_what_is_no_run_or_cannot_be_written_is_one_line_and_the_page_before_stays(
    trained: Path, tmp_path: Path
) -> None:
    call("report", tmp_path / "gone").complains_of(r"gone is not a folder; name the output of a run")
    call("report", tmp_path).complains_of(r"is not the output of a run")
    call("report", trained / "run", "--compare", tmp_path).complains_of(r"is not the output of a run")
    page = tmp_path / "page.html"
    page.write_text("before")
    with largest_file(1000):
        call("report", trained / "run", "--no-scores", "--output", page).complains_of(r"page.html cannot be written")
    assert page.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_plan_is_printed_as_text_and_as_json(trained: Path) -> None:
    outcome = call("plan", trained / "run.toml", "--device", "h100", "--nodes", "2", "--set", "data.streams=16")
    assert outcome.code == 0, outcome.errors
    assert re.search(r"^2 x 8 ranks on NVIDIA H100.*67.2 GiB of HBM", outcome.output)
    assert "embedding.embedding.weight + linear.fc.weight" in outcome.output
    outcome = call("plan", trained / "run.toml", "--device", "h100", "--gpus", "2", "--hbm-gib", "10", "--json")
    found = json.loads(outcome.output)
    assert (found["ranks"], found["fits"], found["hbm_bytes_offered"]) == (2, True, int(8.5 * 2**30))


def test_a_plan_that_does_not_fit_ends_with_1_and_mistakes_are_one_line(trained: Path, tmp_path: Path) -> None:
    large = write_toml(tmp_path / "large.toml", run_plain(trained))
    few = ("--device", "h100", "--gpus", "1", "--hbm-gib", "1", "--set", "tables[0].rows=100000000000")
    outcome = call("plan", large, *few, "--set", "tables[1].rows=100000000000")
    assert outcome.code == 1
    assert "does not fit: the tables need" in outcome.output
    call("plan", large, "--device", "h10").complains_of(r"--device is 'h10', .* did you mean h100\?")
    call("plan", large).complains_of(r"--device is missing; expected one of a100_40")
    call("plan", large, "--device", "cpu", "--nodes", "0").complains_of(r"--nodes is 0, expected 1 or more")
