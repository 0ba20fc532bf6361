"""Files that are either whole or not there: temporary name, fsync, rename; and locks between commands."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file, all or nothing; an OSError names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # those of write() and fsync() come without a name
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError, naming it, if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def read_jsonl(path: Path) -> list[Any]:
    """What the lines of a JSONL file hold; ValueError, naming it, if one is not JSON."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def check_writable(path: Path) -> None:
    """OSError, naming `path`, if it could not be made: said before long work, rather than after it."""
    with errors_name(path):
        above = next(p for p in path.absolute().parents if p.exists())
    number = errno.EACCES if above.is_dir() else errno.ENOTDIR
    if number == errno.ENOTDIR or not os.access(above, os.W_OK | os.X_OK):
        raise OSError(number, os.strerror(number), str(path))


def take_lock(path: Path, busy: str) -> IO[str]:
    """Opens a file, made if need be, and locks it until it is closed; ValueError(busy) if it is locked already."""
    with errors_name(path):
        file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(busy) from None
    except OSError:  # of a file system without locks
        pass
    return file


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        OSError: naming `path`, whatever class the library that wrote into the folder gave it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, before = (path.with_name(f".{path.name}.{kind}") for kind in ("tmp", "before.tmp"))
    shutil.rmtree(temporary, ignore_errors=True)
    with errors_name(path):
        temporary.mkdir()
    try:
        with errors_name(path):
            yield temporary
            for file in [*temporary.rglob("*"), temporary]:
                _sync(file)
            if path.exists():  # aside first: a kill while it is removed must not leave half of it at `path`
                shutil.rmtree(before, ignore_errors=True)
                path.rename(before)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if before.exists() and not path.exists():
            before.rename(path)
        shutil.rmtree(before, ignore_errors=True)
    _sync(path.parent)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """An error of the system inside is an OSError that names `path`, whatever class a library gave it."""
    try:
        yield
    except Exception as error:
        number = _os_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def remove_temporaries(folder: Path) -> None:
    """Removes what a killed process left half-written anywhere in `folder`."""
    for path in list(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _os_error(error: Exception) -> int | None:
    """The errno in an exception; safetensors and tokenizers put it in the text of exceptions of their own."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
