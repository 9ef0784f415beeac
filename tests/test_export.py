"""Exports against ``predict``: the same probabilities of the same rows, by torch and numpy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.command_line import call
from tests.resources import largest_file
from tests.served import STEPS, checkpoint_of, exported, predicted, rows_of, served
from trainer.artifact import ServingError, changed_by, load, read_manifest
from trainer.errors import OutputError
from trainer.export import stored_as
from trainer.scorer import Scorer


def test_an_export_predicts_what_the_trainer_does_for_all_kinds_of_ids(served_run: Path, tmp_path: Path) -> None:
    expected = predicted(served_run, tmp_path / "p")
    assert expected.std() > 0.01
    path = exported(served_run, tmp_path / "out")
    rows = rows_of(served_run)
    np.testing.assert_allclose(served(path, rows), expected, rtol=0, atol=1e-6)
    one_by_one = [served(path, [row])[0] for row in rows[:3]]
    np.testing.assert_allclose(one_by_one, expected[:3], rtol=0, atol=1e-6)
    for stored, error in (("float16", 1e-3), ("int8", 1e-2)):
        smaller = exported(served_run, tmp_path / stored, "--rows", stored)
        found = served(smaller, rows)
        assert 0 < abs(found - expected).max() < error
        bytes_of = [sum(file.stat().st_size for file in each.glob("rows-*")) for each in (path, smaller)]
        assert bytes_of[1] < 0.7 * bytes_of[0]


@pytest.mark.parametrize("stored", ["float32", "float16", "int8"])
def test_changes_one_after_the_other_are_bitwise_the_whole_export(
    served_run: Path, tmp_path: Path, stored: str
) -> None:
    """The first since an export, the second since a checkpoint."""
    first = exported(served_run, tmp_path / "first", "--rows", stored, step=STEPS[0])
    second = exported(served_run, tmp_path / "second", "--since", first, step=STEPS[1])
    before = checkpoint_of(served_run, STEPS[1])
    third = exported(served_run, tmp_path / "third", "--since", before, "--rows", stored)
    rows, model = rows_of(served_run), load(first)
    assert sum(len(np.load(path)) for path in second.glob("gone-*")) > 0
    assert 0 < len(np.load(second / "ids-1.npy")) < model.spaces["embedding.c.weight"].num_ids
    with pytest.raises(ServingError, match="apply those between, or export the model whole"):
        changed_by(model, third)
    for changes, step in ((second, STEPS[1]), (third, STEPS[2])):
        whole = exported(served_run, tmp_path / f"whole-{step}", "--rows", stored, step=step)
        old, model = model, changed_by(model, changes)
        assert model.version == load(whole).version
        scorer = Scorer(model)
        found = scorer.score(scorer.read(rows))["click"]
        np.testing.assert_array_equal(found, served(whole, rows))
        assert (found != Scorer(old).score(scorer.read(rows))["click"]).any()
    with pytest.raises(ServingError, match="has only the changes since"):
        load(second)


TOO_LARGE = r"out cannot be written: (File too large|it could not be written whole)"


def test_what_cannot_be_written_or_does_not_follow_is_one_line_and_leaves_nothing(
    served_run: Path, tmp_path: Path
) -> None:
    run, out = served_run / "run", tmp_path / "out"
    (tmp_path / "mine").mkdir()
    call("export", run, tmp_path / "mine", "--overwrite").complains_of("mine exists; name another folder or name one")
    call("export", tmp_path / "mine", out).complains_of("is neither a whole checkpoint nor the output of a run")
    with largest_file(200):
        call("export", run, out).complains_of(TOO_LARGE)
    exported(served_run, out)
    version = read_manifest(out)["version"]
    call("export", run, out).complains_of("out exists; name another folder or pass --overwrite")
    with largest_file(200):
        call("export", run, out, "--overwrite", "--rows", "int8").complains_of(TOO_LARGE)
    assert read_manifest(out)["version"] == version
    call("export", run, tmp_path / "x", "--since", out, "--rows", "int8").complains_of("stores its rows as float32")
    exported(served_run, out, "--overwrite", "--rows", "int8", step=STEPS[0])
    assert read_manifest(out)["version"] != version
    (out / "rows-0.npy").write_bytes(b"")
    call("export", run, tmp_path / "x", "--since", out).complains_of("--since: .*rows-0.npy is damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_eight_bits_are_within_half_a_step_of_each_row(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(0, 10, (1000, 7)).astype(np.float32)
    rows[3] = 1.5
    found = stored_as(rows, "int8", "t").take(np.arange(1000))
    steps = (rows.max(axis=1) - rows.min(axis=1)) / 255
    assert (abs(found - rows).max(axis=1) <= 0.51 * steps + 1e-6).all()
    assert (found[3] == 1.5).all()
    with pytest.raises(OutputError, match="t has numbers beyond float16, which ends at 65504"):
        stored_as(np.full((1, 1), 1e6, np.float32), "float16", "t")
