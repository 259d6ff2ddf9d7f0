"""A lock on a folder that the operating system takes away when its holder ends, however that comes about."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from visionattn.errors import ConfigError

LOCK = ".lock"
"""Name of the file in a folder that is locked; it may stay there, and says who locked it last."""

_held: set[Path] = set()
"""Folders that this process holds: the lock of the system is between processes."""

_log = logging.getLogger("visionattn")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder that exists.

    Raises:
        ConfigError: another process holds it, or this one does already.
    """
    folder = folder.resolve()
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            if folder in _held:
                raise BlockingIOError
            _lock(file)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ConfigError(
                f"the run folder {folder} is being trained in by {file.read().strip() or 'another process'}; wait for "
                "it or end it, or choose another name (--set name=...)"
            ) from None
        except OSError as error:  # a file system without locks
            _log.warning(
                "%s cannot be locked (%s): see to it yourself that no other training writes there", folder, error
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


def _lock(file: IO[str]) -> None:
    """Lock without waiting. Of POSIX, a lock of the process, which the workers that it forks do not inherit."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
