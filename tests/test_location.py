"""Files and where they lie: replaced whole or not at all, never outside of their folder, no secrets in their names."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.location import inside, refuse_secrets, replacing, without_secrets, write_atomically


def test_a_write_replaces_the_whole_text_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("a long first text\n" * 100, "é", ""):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_text_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full) if step == "fsync" else monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_text_is_on_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def watched_sync(descriptor: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "text")
        sync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        order.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_atomically(tmp_path / "file", "text")
    assert order == ["text", "name", "folder"]


def test_a_reader_sees_one_text_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = ["a" * 100_000, "b" * 200_000]
    write_atomically(path, texts[0])
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            write_atomically(path, texts[number % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert path.read_text(encoding="utf-8") in texts
    writer.join()


def test_what_lies_in_the_way_of_a_temporary_file_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by someone who knows the name in advance."""
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / ".file.guessed").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", "text")
    assert victim.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "file").exists()


def test_names_of_temporary_files_are_not_repeated_and_their_rights_are_those_of_any_new_file(tmp_path: Path) -> None:
    names = set()
    for _ in range(20):
        with replacing(tmp_path / "file") as file:
            names.update(path.name for path in tmp_path.iterdir())
            file.write(b"x")
    assert len(names - {"file"}) == 20
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize("name", ["../b", "a/../../b", "/etc/passwd", "", ".", "..", "out/b", "link", "shards/link"])
def test_names_and_links_that_leave_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    (folder / "shards").mkdir(parents=True)
    (tmp_path / "b").touch()
    (folder / "out").symlink_to(tmp_path)
    (folder / "link").symlink_to(tmp_path / "b")
    (folder / "shards" / "link").symlink_to("../../b")
    with pytest.raises(ValueError, match="is not within"):
        inside(folder, name)


def test_a_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there")
    assert inside(tmp_path / "here", "shards/a") == tmp_path / "here" / "shards" / "a"


# ---------------------------------------------------------------- secrets

SECRET = ("s3://key:hush@bucket/run", "memory::s3://a:hush@b", "https://h/a.parquet?X-Signature=hush", "s3://:hush@b/c")
PLAIN = (
    *("runs/a", "/a:b@c/d", "s3://bucket/a:b@c", "abfs://container@account.host/a", "s3://b/part-?.parquet"),
    *("memory://a", "data/*.parquet", "gs://b/a=1/**"),
)


@pytest.mark.parametrize("url", SECRET)
def test_a_url_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"output is a URL of .* with a password or a query in it") as caught:
        refuse_secrets(url, "output")
    assert "hush" not in str(caught.value)
    assert "hush" not in without_secrets(f"cannot read {url}: no such file")


@pytest.mark.parametrize("url", PLAIN)
def test_other_paths_and_urls_stay_as_they_are(url: str) -> None:
    refuse_secrets(url, "output")
    assert without_secrets(f"{url} is damaged; see b@c") == f"{url} is damaged; see b@c"


@given(st.text())
def test_messages_without_urls_stay_as_they_are(text: str) -> None:
    assert without_secrets(text) == text or "://" in text
