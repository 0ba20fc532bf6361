import errno
import os
import shutil
from pathlib import Path

import pytest

from bpo_fast.files import check_writable, new_folder, read_json, read_jsonl, take_lock, write_atomic


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomic(path, "one\u2028\r\nü")
    assert path.read_bytes() == "one\u2028\r\nü".encode()
    write_atomic(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["c.txt"]


def no_space(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_the_old_file_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "c.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError) as caught:
        write_atomic(path, "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("c.txt", "old")]


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "c.txt", "\ud83d")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "x" / "folder"
    with new_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not path.exists()
    assert (path / "sub" / "a.txt").read_text() == "a"
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


def test_a_new_folder_replaces_the_old_one_and_what_a_killed_process_left(tmp_path):
    path = tmp_path / "folder"
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "half").write_text("half")
    path.mkdir()
    (path / "old").write_text("old")
    with new_folder(path) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failed_folder_vanishes_and_the_old_one_stays(error, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")

    def fill():
        with new_folder(path) as folder:
            (folder / "new").write_text("new")
            raise error

    with pytest.raises(error):
        fill()
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (path / "old").read_text() == "old"


def test_what_is_replaced_is_whole_until_it_has_gone(tmp_path, monkeypatch):
    path, seen, remove = tmp_path / "made", [], shutil.rmtree

    def watched(folder, **options):
        assert folder != path, "a kill would leave half of it there"
        seen.append(sorted(file.name for file in path.iterdir()))
        remove(folder, **options)

    for names in (["a", "b"], ["c", "d"]):
        with new_folder(path) as folder:
            for name in names:
                (folder / name).touch()
            monkeypatch.setattr(shutil, "rmtree", watched)
        monkeypatch.setattr(shutil, "rmtree", remove)
    assert {"".join(names) for names in seen} == {"ab", "cd"}
    assert [item.name for item in tmp_path.iterdir()] == ["made"]


def test_what_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path, rename = tmp_path / "made", Path.rename
    with new_folder(path) as folder:
        (folder / "old").touch()

    def fails_for_new(folder, target):
        if (folder / "new").exists():
            raise OSError(errno.EIO, "I/O error")
        return rename(folder, target)

    monkeypatch.setattr(Path, "rename", fails_for_new)
    with pytest.raises(OSError, match="made"), new_folder(path) as folder:
        (folder / "new").touch()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert [item.name for item in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_does_not_reach_the_disk_vanishes(tmp_path, monkeypatch):
    def fill():
        with new_folder(tmp_path / "folder") as folder:
            (folder / "new").write_text("new")
            monkeypatch.setattr(os, "fsync", no_space)

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def refused(handle, *_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(handle))


def test_a_folder_that_cannot_be_begun_is_named_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(PermissionError) as caught, new_folder(tmp_path / "there" / "folder"):
        pass
    assert caught.value.filename == str(tmp_path / "there" / "folder")


def test_what_could_not_be_written_is_said_before(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folders" / "c.txt")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        check_writable(tmp_path / "file" / "c.txt")
    assert caught.value.filename == str(tmp_path / "file" / "c.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError) as caught:
        check_writable(tmp_path / "new" / "c.txt")
    assert caught.value.filename == str(tmp_path / "new" / "c.txt")


def test_a_lock_is_taken_by_one_and_let_go(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text("seed = 1\n")
    with take_lock(path, ""), pytest.raises(ValueError, match="at work"):
        take_lock(path, "at work")
    take_lock(path, "at work").close()
    assert path.read_text() == "seed = 1\n"

    def no_locks(handle, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    take_lock(path, "at work").close()


def test_what_is_no_json_is_named(tmp_path):
    path = tmp_path / "summary.json"
    for read, text in ((read_json, '{"a": 1'), (read_jsonl, '{"a": 1}\n{"b"'), (read_json, "\x00")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{path}: damaged: "):
            read(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"^{path}: damaged: "):
        read_jsonl(path)
    path.write_text('{"a": "\u2028"}\n\n[1]\n')
    assert read_jsonl(path) == [{"a": "\u2028"}, [1]]
