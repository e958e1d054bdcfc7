"""Write files atomically: completely or not at all.

Importing this module imports nothing heavy, so a command can check its output file at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder, and rename it to `target` if the block succeeds.

    At every moment, `target` is either the old file or the complete new one.

    Raises:
        OSError: the file cannot be written; the error names `target`, not the temporary file.
    """
    part = None
    try:
        part = _file_beside(target)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(target)
    except BaseException as error:
        if part is not None:
            with contextlib.suppress(OSError):  # the folder may be gone
                part.unlink()
        if isinstance(error, SafetensorError) or (isinstance(error, OSError) and _is_about(error, part)):
            raise _named(error, target) from error
        raise


def check_writable(target: Path) -> None:
    """Check that a file can be written before doing the work whose result goes into it.

    Raises:
        OSError: it cannot be written; the error names `target`.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            target.lstat()  # raises if the name is too long
        _file_beside(target).unlink()
    except OSError as error:
        raise _named(error, target) from error


def _file_beside(target: Path) -> Path:
    """A new file in the same folder as `target`, with a name that is not too long."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:50]}.", suffix=".part")
    os.close(handle)
    return Path(name)


def _is_about(error: OSError, part: Path | None) -> bool:
    return part is None or error.filename in (None, str(part))


def _named(error: OSError | SafetensorError, target: Path) -> OSError:
    """The same error, about `target`. Safetensors gives the system's error number only in its message."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number is None:
        return OSError(f"cannot write {target}: {error}")
    return OSError(number, os.strerror(number), str(target))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
