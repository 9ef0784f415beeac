"""Files of a store: read in parts, replaced whole, listed anew, and every failure is an OSError of one line."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from trainer.errors import ConfigError
from trainer.location import (
    append,
    delete,
    growing_file,
    inside,
    is_folder,
    is_there,
    names_in,
    open_to_read,
    pieces_of,
    replacing,
    write_atomically,
)
from trainer.remote import Remote, failing_as_os_error


@pytest.fixture
def store() -> Iterator[Remote]:
    """A folder of a store in this process's memory."""
    folder = Remote(f"memory://{uuid4().hex}")
    yield folder
    if folder.exists():
        folder.delete()


def test_what_is_written_is_there_whole(store: Remote) -> None:
    for content in (b"first" * 100, "é".encode(), b""):
        write_atomically(store / "a", content)
        assert (store / "a").read_bytes() == content
        assert (store / "a").size() == len(content)
    assert names_in(store) == ["a"]
    assert (store / "a").is_file()
    assert is_there(store / "a")
    assert not is_folder(store / "a")


def test_what_fails_while_it_is_made_leaves_the_old_content(store: Remote) -> None:
    write_atomically(store / "a", "old")
    with pytest.raises(TypeError), replacing(store / "a") as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert (store / "a").read_text() == "old"


def test_lines_are_added_and_a_growing_file_shows_what_was_flushed(store: Remote) -> None:
    for line in ("a\n", "é\n"):
        append(store / "lines", line)
    assert (store / "lines").read_text() == "a\né\n"
    with growing_file(store / "grows") as file:
        for part in (b"one", b"two"):
            file.write(part)
            file.flush()
            assert (store / "grows").read_bytes().endswith(part)
    assert (store / "grows").read_bytes() == b"onetwo"


def test_folders_are_what_files_are_in(store: Remote) -> None:
    assert not is_folder(store)
    for name in ("b/one", "b/two", "c"):
        write_atomically(store / name, name)
    assert sorted(names_in(store)) == ["b", "c"]
    assert is_folder(store / "b")
    assert [(store / "b").name, str((store / "b" / "one").parent)] == ["b", f"{store}/b"]
    assert sorted((store / "**" / "*o*").matches()) == [f"{store}/b/one", f"{store}/b/two"]
    delete(store / "b")
    delete(store / "c")
    assert not is_there(store)
    with pytest.raises(FileNotFoundError):
        names_in(store)


def test_parts_of_a_file_are_read_from_any_place(store: Remote) -> None:
    content = os.urandom(10_000)
    write_atomically(store / "a", content)
    assert (store / "a").read_bytes(100, 200) == content[100:200]
    assert b"".join(pieces_of(store / "a")) == content
    with open_to_read(store / "a") as file:
        assert file.seek(-8, io.SEEK_END) == 9992
        assert file.read(4) == content[9992:9996]
        assert (file.tell(), file.read(99), file.read(1)) == (9996, content[9996:], b"")
        file.seek(17)
        file.seek(3, io.SEEK_CUR)
        assert file.read(5) == content[20:25]


def test_an_upload_is_there_when_it_is_closed(store: Remote) -> None:
    upload = (store / "a").upload()
    upload.write(b"abc" * 1000)
    upload.close()
    upload.close()
    assert (store / "a").read_bytes() == b"abc" * 1000


def test_what_is_not_there_is_an_error_with_its_url(store: Remote) -> None:
    for action in (lambda: (store / "a").read_bytes(), lambda: (store / "a").unlink(), lambda: (store / "a").size()):
        with pytest.raises(FileNotFoundError) as caught:
            action()
        assert caught.value.filename == f"{store}/a"
        assert caught.value.strerror
    (store / "a").unlink(missing_ok=True)


@pytest.mark.parametrize("error", [ValueError("no\nluck."), RuntimeError(), PermissionError("denied"), KeyError("x")])
def test_what_a_library_raises_is_an_os_error_of_one_line(error: Exception) -> None:
    with pytest.raises(OSError, match=r"s3://b/c") as caught, failing_as_os_error("s3://b/c"):
        raise error
    assert caught.value.strerror
    assert "\n" not in caught.value.strerror
    assert caught.value.filename == "s3://b/c"
    assert isinstance(caught.value, PermissionError) == isinstance(error, PermissionError)


def test_errors_with_a_number_keep_it() -> None:
    with pytest.raises(OSError, match="No space") as caught, failing_as_os_error("s3://b/c"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC


def test_a_scheme_that_nothing_knows_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^floppy://a/b: .*floppy.*; use s3://, gs:// or another that fsspec knows$"):
        Remote("floppy://a/b").exists()

    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ConfigError, match=r"^s3://a/b: Install s3fs to access S3; pip install s3fs$"):
        Remote("s3://a/b").exists()


@pytest.mark.parametrize("name", ["../b", "/b", "a/../../b", ""])
def test_names_that_leave_a_folder_are_refused(store: Remote, name: str) -> None:
    assert inside(store, "shards/a") == store / "shards" / "a"
    with pytest.raises(ValueError, match="is not within"):
        inside(store, name)


def test_local_files_are_added_to_and_deleted_alike(tmp_path: Path) -> None:
    append(tmp_path / "lines", "a\n")
    append(tmp_path / "lines", "b\n")
    assert b"".join(pieces_of(tmp_path / "lines")) == b"a\nb\n"
    (tmp_path / "link").symlink_to(tmp_path)
    delete(tmp_path / "link")
    delete(tmp_path / "lines")
    assert list(tmp_path.iterdir()) == []
