"""Files that are whole or absent, folders that one process at a time writes to, and checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from firp_cli.provenance import _now

LOCK = ".lock"


def cache_folder() -> Path:
    """Where measurements of this machine are kept: $FIRP_CACHE_DIR, else `firp` in the user's cache folder."""
    own = os.environ.get("FIRP_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firp"


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, sync, then rename to `path`: a reader sees the old file or the whole new one.

    Raises whatever `write` raises; the temporary file is removed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some writers make private files; a store is read by others too
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write JSON with two spaces of indent, atomically. NaN is refused by the encoder."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class FolderLock:
    """The right to write into a folder, until `close` or the end of the process, however it ends."""

    def __init__(self, stream: TextIO, leads: bool) -> None:
        self._stream, self._leads = stream, leads

    def share(self) -> None:
        """Let the members of this process's group in (`lock_folder(..., member=True)`); nobody else yet.

        Raises OSError when another process took the folder in between.
        """
        fcntl.flock(self._stream, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Let go. Safe to call again."""
        if self._leads and not self._stream.closed:
            self._stream.truncate(0)  # the file stays: removing it would let two processes lock two files
        self._stream.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock_folder(folder: Path, member: bool = False) -> FolderLock:
    """Take an existing folder for this process, or as a member of a group whose leader has shared it.

    The leader writes who it is into `.lock`. A folder is free when the last process of the group that held it is gone.

    Raises:
        BlockingIOError: others hold it; `strerror` says who: process, machine, since when.
        OSError: the file cannot be written, or its file system knows no locks.
    """
    stream = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if member else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        with stream:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise BlockingIOError(errno.EWOULDBLOCK, _holder(stream)) from None
    if not member:
        stream.truncate(0)
        stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}) + "\n")
        stream.flush()
    return FolderLock(stream, leads=not member)


def _holder(stream: TextIO) -> str:
    """Who a lock file says holds it; its leader may be gone while members of its group still run."""
    stream.seek(0)
    try:
        told = json.loads(stream.read())
        return f"process {told['pid']} on {told['host']} since {told['since']}, or another rank of its run"
    except (ValueError, KeyError, TypeError):
        return "a process that did not say who it is"
