"""What appears in a watched folder: whole updates are served in their order, each once, and the rest is one line."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.served import STEPS, exported, rows_of, served
from trainer.artifact import MANIFEST, load
from trainer.serve import Service
from trainer.watch import Watcher


class Watched:
    """A service that goes on from the first export by what is in a folder."""

    def __init__(self, first: Path, folder: Path) -> None:
        self.service = Service(load(first), wait_seconds=0.0, most_rows=1000, most_ids=9, updates=None)
        self.lines: list[str] = []
        self.watcher = Watcher(
            folder, lambda: self.service.scorer.artifact.version, self.service.take, self.lines.append
        )

    def said(self) -> list[str]:
        """What is new since the last time."""
        found, self.lines[:] = list(self.lines), []
        return found


@pytest.fixture(scope="module")
def updates(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, and the two updates that follow it one after the other."""
    folder = tmp_path_factory.mktemp("updates")
    first = exported(served_run, folder / "first", step=STEPS[0])
    exported(served_run, folder / "second", "--since", first, step=STEPS[1])
    exported(served_run, folder / "third", "--since", served_run / "run" / "checkpoints" / f"step-{STEPS[1]:08d}")
    return folder


def test_updates_are_served_in_the_order_in_which_they_follow_each_once(
    served_run: Path, updates: Path, tmp_path: Path
) -> None:
    """The later one is there first, and has the earlier name."""
    watched = Watched(updates / "first", tmp_path / "in")
    assert watched.watcher.look() == 0
    assert watched.said() == [f"{tmp_path / 'in'} cannot be looked into: No such file or directory"]
    (tmp_path / "in").mkdir()
    shutil.copytree(updates / "third", tmp_path / "in" / "a")
    for _ in range(2):
        assert watched.watcher.look() == 0
    (line,) = watched.said()
    assert line.startswith(f"{tmp_path / 'in' / 'a'} waits: it follows version ")
    shutil.copytree(updates / "second", tmp_path / "in" / "b")
    assert watched.watcher.look() == 2
    assert watched.watcher.look() == 0
    lines = watched.said()
    assert [line.split(", version")[0] for line in lines] == [
        f"{tmp_path / 'in' / 'b'} is served: step {STEPS[1]}",
        f"{tmp_path / 'in' / 'a'} is served: step {STEPS[2]}",
    ]
    rows = rows_of(served_run)
    found = watched.service.predict({"rows": rows})["probabilities"]["click"]
    whole = exported(served_run, tmp_path / "whole")
    np.testing.assert_array_equal(np.float32(found), served(whole, rows))
    assert (watched.service.counts["updates"], watched.watcher.refused) == (2, 0)


def test_what_is_half_copied_or_damaged_is_refused_once_and_taken_when_it_is_whole(
    updates: Path, tmp_path: Path
) -> None:
    watched = Watched(updates / "first", tmp_path)
    shutil.copytree(updates / "first", tmp_path / "whole")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").touch()
    copy = tmp_path / "copy"
    shutil.copytree(updates / "second", copy)
    content = (copy / "rows-0.npy").read_bytes()
    (copy / "rows-0.npy").unlink()
    manifest = (copy / MANIFEST).rename(tmp_path / "manifest")
    assert watched.watcher.look() == 0  # a folder without a manifest is no update yet
    assert watched.said() == [f"{tmp_path / 'whole'} is refused: it is a whole export, which only POST /update takes"]
    manifest.rename(copy / MANIFEST)
    for part in (content[:100], content[:-1], content[:-1] + b"?"):
        (copy / "rows-0.npy").write_bytes(part)
        assert watched.watcher.look() == 0
    (line,) = watched.said()
    assert line.startswith(f"{copy} is refused: {copy / 'rows-0.npy'} is damaged: it is not what was written")
    assert (watched.service.counts["updates"], watched.watcher.refused) == (0, 2)
    (copy / "rows-0.npy").write_bytes(content)
    ending = threading.Event()
    thread = threading.Thread(target=watched.watcher.watch, args=(0.01, ending))
    thread.start()
    while not watched.service.counts["updates"]:
        assert thread.is_alive()
    ending.set()
    thread.join()
    assert watched.said()[0].startswith(f"{copy} is served: step {STEPS[1]}, version ")
