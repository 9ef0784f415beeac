"""The page of a run: parsed as what it is, compared with what was recorded, and made of damaged and unfinished runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from tests.run_output import TABLE, line, write_output
from trainer import charts
from trainer.charts import Series
from trainer.errors import OutputError
from trainer.metrics import ScoredRows, auc
from trainer.page import _SECTIONS, render
from trainer.records import Record, read
from trainer.scores import Scores, summarize

LINES = [line(5), line(10, validation_auc=0.75, validation_rows=160.0), line(15, validation_auc=0.8125)]


def scored(rows: int = 400) -> ScoredRows:
    """Rows of a few users, clicked as often as predicted."""
    generator = np.random.default_rng(0)
    probability = generator.uniform(0.02, 0.98, rows)
    labels = (generator.uniform(0, 1, rows) < probability).astype(np.float32)
    users = torch.from_numpy(generator.integers(0, 20, rows) ** 2 // 20)
    logits = torch.from_numpy(np.log(probability / (1 - probability)))
    return ScoredRows(logits, torch.from_numpy(labels), torch.ones(rows), users)


def parse(page: str) -> ElementTree.Element:
    """The page as XML, which is stricter than HTML: an unescaped or unclosed tag is an error."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def figures(root: ElementTree.Element) -> dict[str, list[str]]:
    """What is said when one points at the values of each chart, by its caption."""
    found = {}
    for figure in root.iter("figure"):
        caption = figure.find("figcaption")
        assert caption is not None
        found[str(caption.text)] = [str(title.text) for title in figure.iter("title")]
    return found


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A run of three segments that has ended."""
    return read(write_output(tmp_path / "one", LINES, result={"test_auc": 0.7, "test_rows": 80.0}))


def test_the_page_has_every_section_and_needs_nothing_from_elsewhere(record: Record) -> None:
    page = render([record], summarize(scored(), "some rows"))
    root = parse(page)
    assert [section.get("id") for section in root.iter("section")] == list(_SECTIONS)
    links = [link.get("href", "") for link in root.iter("a")]
    assert links == [f"#{name}" for name in _SECTIONS]
    assert not [tag for tag in ("script", "link", "img", "iframe", "object") if list(root.iter(tag))]
    assert not re.findall(r"https?:|url\(|@import|src=", page)
    assert "nothing recorded" not in page
    assert "prefers-color-scheme:dark" in page


def test_the_values_of_the_charts_are_those_of_metrics_jsonl(record: Record) -> None:
    found = figures(parse(render([record], None)))
    numbers = {
        caption: [(text.split(": ")[0], *map(float, re.findall(r"([-\d.e+]+)(?: at step |$)", text))) for text in texts]
        for caption, texts in found.items()
    }
    steps = [each["step"] for each in LINES]
    losses = [("train", pytest.approx(each["train_logloss_nats"], rel=1e-5), each["step"]) for each in LINES]
    assert numbers["log loss (nats)"] == losses
    assert numbers["AUC"] == [("validation", 0.75, 10), ("validation", 0.8125, 15)]
    norms = [("mlp", 0.125 * step, step) for step in steps]
    assert numbers["gradient norm"] == norms
    of_table = numbers[f"{TABLE}: grew 3 times, 14 ms in all"]
    expected = [
        (name, size * step, step)
        for name, size in (("rows in use", 10), ("capacity", 16), ("grew", 16))
        for step in steps
    ]
    assert of_table == expected
    assert found["MiB of rows and moments"] == [f"{TABLE} on rank 0: 1.5 MiB", f"{TABLE} on rank 1: 2.5 MiB"]


def test_several_runs_are_drawn_over_each_other_by_name(record: Record, tmp_path: Path) -> None:
    other = read(write_output(tmp_path / "two", [line(5, train_logloss_nats=0.5)]))
    root = parse(render([record, other], None, "left out"))
    assert {text.split(":")[0] for text in figures(root)["log loss (nats)"]} == {"one train", "two train"}
    assert "left out" in "".join(root.itertext())
    twin = read(write_output(tmp_path / "deeper" / "one", [line(5)]))
    heading = parse(render([record, twin], None)).find("body/h1")
    assert heading is not None
    assert heading.text == f"{record.path} and {twin.path}"


def test_names_are_escaped_wherever_they_come_from(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>"
    folder = write_output(
        tmp_path / "<b>&amp;",
        [line(5, **{f"diagnostics/gradient_norm/{evil}": 1.0, f"rows_in_use/{evil}": 2.0, f"train_auc/{evil}": 0.5})],
        plan=[{"table": evil, "sharding": evil, "mib_per_rank": [1.0]}],
        run={"output": evil},
    )
    root = parse(render([read(folder)], summarize(scored(), evil), evil))
    assert not list(root.iter("script"))
    assert not list(root.iter("b"))
    assert "".join(root.itertext()).count(evil) >= 6


def test_many_tables_are_drawn_as_highest_median_and_lowest_and_each_is_written_out(tmp_path: Path) -> None:
    names = [f"embedding.C{number}.weight" for number in range(26)]
    lines = []
    for step in (5, 10):
        norms = {f"diagnostics/table_gradient_norm/{name}": step + number for number, name in enumerate(names)}
        lines.append({"step": step, "diagnostics/gradient_norm/mlp": 2.0, **norms})
    lines[1]["diagnostics/table_gradient_norm/embedding.C0.weight"] = math.nan
    folder = write_output(tmp_path / "run", lines)
    root = parse(render([read(folder)], None))
    said = [f"{which} of 26: {value} at step 5" for which, value in (("highest", 30), ("median", 17.5), ("lowest", 5))]
    found = figures(root)
    assert found["gradient norm of tables"][::2] == said
    assert found["gradient norm of tables"][5] == "lowest of 26: 11 at step 10"  # not a number is left out
    assert found["gradient norm"] == ["mlp: 2 at step 5", "mlp: 2 at step 10"]
    cells = [[str(cell.text) for cell in row.iter("td")] for row in root.iter("tr")]
    assert [row[:2] for row in cells if row and row[0] in names][1:] == [
        [name, f"{10 + number:g}"] for number, name in enumerate(names) if number
    ]
    both = figures(parse(render([read(folder), read(write_output(tmp_path / "other", lines[:1]))], None)))
    assert "other median: 17.5 at step 5" in both["gradient norm of tables"]


def test_several_labels_have_a_chart_each(tmp_path: Path) -> None:
    plain = {"step": 5, "train_logloss_nats/click": 0.5, "train_logloss_nats/buy": 0.25}
    found = figures(parse(render([read(write_output(tmp_path / "run", [plain]))], None)))
    assert found["log loss (nats) of click"] == ["train: 0.5 at step 5"]
    assert found["log loss (nats) of buy"] == ["train: 0.25 at step 5"]


def test_what_is_missing_or_damaged_is_said_on_the_page(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "run", [line(5)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train_lo\n{"step": "x"}\n[1]\n{"step": 20, "train_logloss_nats": NaN}\n')
    (folder / "plan.json").write_text('[{"table"')
    (folder / "run.json").unlink()
    record = read(folder)
    assert [each["step"] for each in record.lines] == [5, 20]
    said = "".join(parse(render([record], None)).itertext())
    for text in (
        "3 of 5 lines of metrics.jsonl cannot be read",
        "plan.json is damaged and is left out",
        "run.json is not there",
        "result.json is not there: the run has not ended",
        "there is no checkpoint yet",
    ):
        assert text in said
    assert figures(parse(render([record], None)))["log loss (nats)"] == ["train: 0.65 at step 5"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    said = "".join(parse(render([read(folder)], None)).itertext())
    assert "metrics.jsonl is not there: the run has not come to the end of its first segment" in said


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nowhere is not a folder; name the output of a run"):
        read(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"has no metrics.jsonl and no run.json, so it is not the output of a run"):
        read(tmp_path)


def test_reliability_histogram_and_segments_are_those_of_the_rows() -> None:
    rows = scored()
    scores = summarize(rows, "")
    probability, clicked = rows.logits.sigmoid().numpy(), rows.labels.numpy() == 1
    assert sum(each[0] for each in scores.reliability) == len(clicked)
    tenth = np.argsort(probability)[40:80]
    expected = (
        40,
        probability[tenth].min(),
        probability[tenth].max(),
        probability[tenth].mean(),
        clicked[tenth].mean(),
    )
    assert scores.reliability[1] == pytest.approx(expected)
    first = clicked & (probability < 0.05)
    assert (scores.clicked[0], sum(scores.clicked), sum(scores.others)) == (
        first.sum(),
        clicked.sum(),
        (~clicked).sum(),
    )
    assert scores.segments[0]["auc"] == auc(rows)
    assert sum(each["rows"] for each in scores.segments[1:]) == len(clicked)
    assert rows.users is not None
    counts = np.bincount(rows.users.numpy())
    chosen = torch.from_numpy((counts >= 10) & (counts <= 29))[rows.users]
    own = next(each for each in scores.segments if each["name"] == "users of 10 to 29 rows")
    assert own["auc"] == auc(ScoredRows(rows.logits[chosen], rows.labels[chosen], rows.weights[chosen]))


def test_rows_of_one_class_have_no_auc_and_are_no_error(record: Record) -> None:
    rows = ScoredRows(torch.zeros(4), torch.zeros(4), torch.ones(4))
    scores = summarize(rows, "")
    assert scores.segments == [{"name": "all rows", "rows": 4.0, "click_rate": 0.0}]
    assert "reliability" in figures(parse(render([record], scores)))


@pytest.mark.parametrize(
    ("xs", "ys"),
    [([1], [2.0]), ([1, 2], [3.0, 3.0]), ([1, 2], [math.nan, 1.0]), ([0, 0], [0, 0]), ([1, 2], [-1e300, 1e300])],
)
def test_a_line_lies_within_its_chart_whatever_its_values(xs: list[float], ys: list[float]) -> None:
    svg = ElementTree.fromstring(charts.lines("t", [Series("a", xs, ys)], zero=True))
    circles = [(float(c.get("cx", "nan")), float(c.get("cy", "nan"))) for c in svg.iter("circle")]
    assert circles
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in circles)


def test_nothing_to_draw_is_said() -> None:
    for figure in (
        charts.lines("t", [Series("a", [1.0], [math.inf])]),
        charts.stacked("t", ["rank 0"], [("a", [0.0])], str),
        charts.histogram("t", [0, 1], [("a", [0])], "x"),
    ):
        assert "nothing recorded" in figure


def test_scores_of_a_sample_are_plain_numbers() -> None:
    scores = summarize(scored(), "")
    assert isinstance(scores, Scores)
    assert json.loads(json.dumps(scores.reliability)) == [list(each) for each in scores.reliability]
