"""Tests of the file that makes a directory a checkpoint: whole or not there, and every damage is seen."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from trainer import manifest as manifests
from trainer.errors import CheckpointError
from trainer.manifest import Block, Manifest, checksum, damaged
from trainer.rows import Cursor


def manifest(**changes: Any) -> Manifest:
    given: dict[str, Any] = {
        "step": 500,
        "cursor": Cursor(1, 20),
        "world_size": 2,
        "config": {"seed": 3, "data": {"train": ["a", "b"]}, "tables": [{"lr": 1e-8, "name": "naïve"}]},
        "data": {"fingerprint": "abc"},
        "tables": {"embedding.t.weight": {"rows": 10, "moments": ["sum"]}},
        "spaces": {"embedding.t.weight": {"kind": "exact", "slots_used": [6, 3], "in_use": 6}},
        "dense": {"bias": [1], "scalar": []},
        "plan": [{"table": "embedding.t.weight", "mib_per_rank": [0.25, 1.5]}],
        "blocks": (Block("embedding.t.weight", "tables/t/0.0", 0, 0, 5, 0, 15), Block("t", "p", 1, 5, 4, 0, 15)),
        "evaluations": ((250, 0.1 + 0.2), (500, 0.7071067811865476)),
        "versions": {"torch": "2.13.0"},
        "files": {"shards/a": {"bytes": 3, "xxh3_128": "00"}},
    }
    return Manifest(**given | changes)


def written(folder: Path, **changes: Any) -> tuple[Path, Manifest]:
    """A directory with a manifest in it, and the file."""
    made = manifest(**changes)
    manifests.write(folder, made)
    return folder / manifests.NAME, made


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        manifests.read(folder)
    return str(caught.value)


# ---------------------------------------------------------------- there and back


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    _, made = written(tmp_path)
    assert manifests.read(tmp_path) == made
    empty = manifest(blocks=(), evaluations=(), files={}, plan=[])
    manifests.write(tmp_path, empty)
    assert manifests.read(tmp_path) == empty


def test_spaces_do_not_matter_to_the_checksum(tmp_path: Path) -> None:
    path, made = written(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7), encoding="utf-8")
    assert manifests.read(tmp_path) == made


# ---------------------------------------------------------------- damage of the manifest


def test_a_directory_without_a_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path} has no manifest.json: it is not a complete checkpoint"
    assert "has no manifest.json" in refused(tmp_path / "absent")


def test_a_manifest_that_cannot_be_opened_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / manifests.NAME).mkdir()
    assert refused(tmp_path) == f"{tmp_path / manifests.NAME} cannot be read: Is a directory"


def test_a_flipped_bit_in_any_byte_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    """A few do not: 1e-08 and 1E-08 are one number."""
    path, made = written(tmp_path)
    whole, seen = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert manifests.read(tmp_path) == made
        except CheckpointError:
            seen += 1
    assert seen > 0.99 * len(whole)


def test_every_cut_is_seen(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "manifest.json is damaged" in refused(tmp_path)


@pytest.mark.parametrize(("content", "found"), [("[]", "list"), ("3", "int"), ("{}", "None"), ('{"format": 99}', "99")])
def test_another_format_is_refused_with_both_numbers(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / manifests.NAME
    path.write_text(content, encoding="utf-8")
    assert refused(tmp_path) == f"{path} has format {found}, expected 2; use the version that wrote it"


def resealed(path: Path, **changes: Any) -> None:
    """Change keys (None removes) and put the right checksum in, as a buggy writer would."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    del plain["checksum"]
    plain = {name: value for name, value in {**plain, **changes}.items() if value is not None}
    plain["checksum"] = xxh3_128_hexdigest(json.dumps(plain).encode())
    path.write_text(json.dumps(plain), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cursor": None}, "KeyError: 'cursor'"),
        ({"step": None}, "missing 1 required positional argument: 'step'"),
        ({"extra": 1}, "unexpected keyword argument 'extra'"),
        ({"cursor": {"epoch": 1}}, "missing 1 required positional argument: 'step'"),
        ({"blocks": [{"table": "t"}]}, "missing 6 required positional arguments"),
        ({"evaluations": [[1]]}, "not enough values to unpack"),
        ({"evaluations": [["x", 1]]}, "invalid literal for int"),
    ],
)
def test_a_whole_file_with_other_fields_is_damaged_and_not_a_bug(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path, _ = written(tmp_path)
    resealed(path, **changes)
    assert re.search(f"manifest.json is damaged: .*{re.escape(message)}", refused(tmp_path))


# ---------------------------------------------------------------- damage of other files


@pytest.mark.parametrize("size", [0, 1, 1 << 22, (1 << 22) + 1, (1 << 23) + 77])
def test_a_checksum_read_in_pieces_is_that_of_the_whole(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    content = (b"0123456789abcde" * (size // 15 + 1))[:size]
    path.write_bytes(content)
    assert checksum(path) == {"bytes": size, "xxh3_128": xxh3_128_hexdigest(content)}


def files(folder: Path) -> Manifest:
    (folder / "shards").mkdir()
    for name in ("a", "b", "c"):
        (folder / "shards" / name).write_bytes(name.encode() * 1000)
    names = [f"shards/{name}" for name in ("a", "b", "c")]
    return manifest(files={name: checksum(folder / name) for name in names})


def test_files_as_they_were_written_are_not_damaged(tmp_path: Path) -> None:
    made = files(tmp_path)
    assert damaged(tmp_path, made, list(made.files)) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"^shards/b has 999 bytes, expected 1000$"),
        (lambda path: path.write_bytes(path.read_bytes() + b"b"), r"^shards/b has 1001 bytes, expected 1000$"),
        (lambda path: path.write_bytes(b""), r"^shards/b has 0 bytes, expected 1000$"),
        (lambda path: path.unlink(), r"^shards/b cannot be read \(No such file or directory\)$"),
        (
            lambda path: path.write_bytes(b"b" * 500 + b"c" + b"b" * 499),
            r"^shards/b has checksum [0-9a-f]{32}, expected [0-9a-f]{32}$",
        ),
    ],
)
def test_a_file_that_was_cut_grown_lost_or_changed_is_named(tmp_path: Path, spoil: Any, message: str) -> None:
    made = files(tmp_path)
    spoil(tmp_path / "shards" / "b")
    (found,) = damaged(tmp_path, made, list(made.files))
    assert re.search(message, found)
    assert damaged(tmp_path, made, ["shards/a", "shards/c"]) == []


def test_all_damaged_files_are_named_in_their_order(tmp_path: Path) -> None:
    made = files(tmp_path)
    for name in made.files:
        (tmp_path / name).unlink()
    found = damaged(tmp_path, made, ["shards/c", "shards/a"])
    assert [phrase.split()[0] for phrase in found] == ["shards/c", "shards/a"]


# ---------------------------------------------------------------- the best step


@pytest.mark.parametrize(
    ("evaluations", "highest", "lowest"),
    [
        ((), None, None),
        (((10, 0.5),), (10, 0.5), (10, 0.5)),
        (((10, 0.5), (20, 0.7), (30, 0.6)), (20, 0.7), (10, 0.5)),
        (((10, 0.7), (20, 0.5), (30, 0.7), (40, 0.5)), (10, 0.7), (20, 0.5)),
    ],
)
def test_the_best_is_the_earliest_of_the_best(
    evaluations: tuple[tuple[int, float], ...], highest: tuple[int, float] | None, lowest: tuple[int, float] | None
) -> None:
    made = dataclasses.replace(manifest(), evaluations=evaluations)
    assert made.best(higher_is_better=True) == highest
    assert made.best(higher_is_better=False) == lowest
