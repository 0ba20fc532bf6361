"""What a command of the command line does with errors."""

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

USER_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


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
            if error.errno not in USER_ERRNOS:
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
