"""What a command of the command line does with errors."""

import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from bpo_fast.files import errors_name

USER_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


STANDARD_OUTPUT = "standard output"


class StandardOutput(io.TextIOWrapper):
    """Standard output; an OSError of it names it."""

    def write(self, text: str, /) -> int:
        """As that of a text file."""
        with errors_name(Path(STANDARD_OUTPUT)):
            return super().write(text)

    def flush(self) -> None:
        """As that of a text file."""
        with errors_name(Path(STANDARD_OUTPUT)):
            super().flush()


@contextmanager
def names_output() -> Iterator[None]:
    """Standard output that takes not all is one line on standard error and exit code 2, and 1 if nobody reads it.

    What a model says need not fit the terminal's encoding: it is escaped.
    """
    if sys.stdout is None:  # closed by whoever started the process
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        old = sys.stdout
        sys.stdout = StandardOutput(
            old.buffer,
            old.encoding,
            "backslashreplace",
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
    ended: SystemExit | None = None
    try:
        try:
            yield
        except SystemExit as error:
            ended = error
            raise
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename != STANDARD_OUTPUT:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter tries again to write what is left
        if ended and ended.code:  # the command has failed before, and has said so
            raise ended from None
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        print(f"error: {STANDARD_OUTPUT}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what a user can cause into one line on standard error and exit code 2; an interrupt is 130."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ValueError as error:
            _fail(str(error), 2)
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            _fail(str(error), 1)
        except OSError as error:
            if error.errno not in USER_ERRNOS or error.filename == STANDARD_OUTPUT:
                raise
            _fail(f"{error.filename or 'run folder'}: {error.strerror}", 2)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return guarded


def check_alone() -> None:
    """ValueError where a launcher has started several processes, each of which would be the whole run."""
    num = os.environ.get("WORLD_SIZE", "1")
    if num != "1":
        raise ValueError(
            f"WORLD_SIZE = {num}: a run starts its processes itself, those of run.devices and those of"
            " sampling.tensor_parallel; start it without a launcher"
        )


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code) from None
