"""Exports on disk: damaged ones, those with code in them, and the arithmetic of ids and changes by brute force."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.served import exported, rows_of, served
from trainer import order
from trainer.artifact import GRAPH, MANIFEST, ServingError, Space, checksum_of, load, mix64

NOTHING = np.zeros(0, dtype=np.int64)


def int64s(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_ids_are_mixed_as_in_training() -> None:
    ids = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    np.testing.assert_array_equal(mix64(ids), order.mix64(ids))


@pytest.mark.parametrize("kind", ["exact", "identity"])
def test_any_changes_one_after_the_other_give_the_rows_that_a_dictionary_does(kind: str) -> None:
    """A row stands for itself here: its content is the number of the change that it came with."""
    generator = np.random.default_rng(3)
    known = np.unique(generator.integers(-50, 50, 60)) if kind == "exact" else np.arange(60)
    space = Space(kind, 0, known if kind == "exact" else None, len(known), NOTHING, NOTHING)
    contents = ["cold 0", *(f"{id_} 0" for id_ in known)]
    expected = {int(id_): f"{id_} 0" for id_ in known}
    for change in range(1, 8):
        ids = np.unique(generator.integers(-60, 70, generator.integers(0, 20)))
        gone = np.setdiff1d(np.unique(generator.integers(-60, 70, 15)), ids)
        after, stays = space.with_changes(ids, gone)
        followers = contents[len(known) + 1 :]
        contents[len(known) + 1 :] = [
            f"cold {change}",
            *(followers[row] for row in stays),
            *(f"{id_} {change}" for id_ in ids),
        ]
        space = after
        expected |= {int(id_): f"{id_} {change}" for id_ in ids}
        for id_ in gone:
            expected.pop(int(id_), None)
        asked = np.arange(-80, 90)
        found = [contents[row] for row in space.rows_of(asked)]
        assert found == [expected.get(int(id_), f"cold {change}") for id_ in asked]
        assert len(contents) == len(known) + 1 + space.num_changed_rows


def test_looking_up_few_of_many_ids_takes_memory_for_the_few() -> None:
    ids = np.arange(0, 3_000_000, 3)
    space = Space("exact", 0, ids, len(ids), NOTHING, NOTHING)
    tracemalloc.start()
    found = space.rows_of(int64s(0, 1, 2_999_997))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tolist() == [1, 0, 1_000_000]
    assert peak < 100_000


def test_any_flipped_byte_is_refused_in_one_line(served_run: Path, tmp_path: Path) -> None:
    path = exported(served_run, tmp_path / "out", "--rows", "int8")
    names = [file.name for file in path.iterdir()]
    assert {"rows-0.npy", "scales-0.npy", "ids-0.npy", GRAPH, MANIFEST, "serve.py"} <= set(names)
    for name in names:
        content = (path / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            (path / name).write_bytes(flipped)
            with pytest.raises(ServingError, match=r"damaged|export it"):
                load(path, verify=True)
        (path / name).write_bytes(content[:-1])
        with pytest.raises(ServingError, match="damaged"):
            load(path)
        (path / name).unlink()
        with pytest.raises(ServingError, match="cannot be read"):
            load(path)
        (path / name).write_bytes(content)
    assert len(served(path, rows_of(served_run)[:2])) == 2


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def rewritten(graph: Path, edit: Callable[[str, bytes], bytes]) -> None:
    """Edit the members of an archive."""
    with zipfile.ZipFile(graph) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(graph, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, edit(name, content))


def resealed(path: Path) -> None:
    """Make the checksums those of what is there, as who changed it could."""
    import hashlib

    manifest = json.loads((path / MANIFEST).read_text())
    manifest.pop("checksum")
    content = (path / GRAPH).read_bytes()
    manifest["files"][GRAPH] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest | {"checksum": checksum_of(manifest)}))


def test_no_code_in_a_graph_is_run(served_run: Path, tmp_path: Path) -> None:
    """What torch.export.load would unpickle or evaluate is refused where it is read, and else not read."""
    touched = tmp_path / "touched"
    evil = pickle.dumps(Evil(touched))
    call = json.dumps(f"__import__('pathlib').Path('{touched}').touch()").encode()
    linear = b'"target": "torch.ops.aten.linear.default"'
    refused: list[Callable[[str, bytes], bytes]] = [
        lambda name, content: content.replace(b'"use_pickle": false', b'"use_pickle": true', 1),
        *(
            lambda name, content, target=target: content.replace(linear, b'"target": "%s"' % target, 1)
            for target in (b"os.system", b"torch.ops.aten.save.default", b"torch.ops.aten.linear.__class__")
        ),
        lambda name, content: content.replace(b'"arg": {"as_int": 1}', b'"arg": {"as_string": "a file"}'),
        lambda name, content: content.replace(b'"major": 8', b'"major": 9'),
    ]
    not_read: list[Callable[[str, bytes], bytes]] = [
        lambda name, content: evil if "sample_inputs" in name else content,
        lambda name, content: _with_expression(content, call) if name.endswith("model.json") else content,
    ]
    whole = exported(served_run, tmp_path / "out")
    rows = rows_of(served_run)[:2]
    for number, edit in enumerate([*refused, *not_read]):
        path = tmp_path / f"evil-{number}"
        shutil.copytree(whole, path)
        before = (path / GRAPH).read_bytes()
        rewritten(path / GRAPH, edit)
        assert (path / GRAPH).read_bytes() != before
        resealed(path)
        if edit in refused:
            with pytest.raises(ServingError, match=r"dense\.pt2 has .*; export it again"):
                load(path)
        else:
            np.testing.assert_array_equal(served(path, rows), served(whole, rows))
        assert not touched.exists()


def _with_expression(content: bytes, call: bytes) -> bytes:
    begin = content.index(b'"expr_str": ') + len(b'"expr_str": ')
    end = content.index(b'"', content.index(b'"', begin) + 1) + 1
    return content[:begin] + call + content[end:]
