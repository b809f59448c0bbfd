"""Atomic writing of files, locks of folders, and checksums."""

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
    """Return the folder of this machine's measurements: $FIRP_CACHE_DIR, else `firp` in the user's cache folder."""
    folder = os.environ.get("FIRP_CACHE_DIR")
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firp"


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, sync, then rename to `path`: a reader sees the old file or the whole new one.

    Errors of `write` are raised; the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some writers create private files, but other users read a store
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
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write JSON with two spaces of indent, atomically. The encoder refuses NaN."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class FolderLock:
    """Lock of a folder for writing, until `close` or the end of the process."""

    def __init__(self, stream: TextIO, is_leader: bool) -> None:
        self._stream, self._is_leader = stream, is_leader

    def share(self) -> None:
        """Let members of this process's group lock the folder too, by `lock_folder(..., member=True)`.

        Raises OSError when another process has locked the folder meanwhile.
        """
        fcntl.flock(self._stream, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Release the folder. Further calls do nothing."""
        if self._is_leader and not self._stream.closed:
            self._stream.truncate(0)  # the file stays: after its removal two processes could lock two files
        self._stream.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock_folder(folder: Path, member: bool = False) -> FolderLock:
    """Lock an existing folder for this process, or as a member of a group whose leader has shared its lock.

    The leader writes its identity into `.lock`. A folder is free when the last process of the group has ended.

    Raises:
        BlockingIOError: another group has the lock; `strerror` names its process, machine and start time.
        OSError: the file cannot be written, or its file system has no locks.
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
    return FolderLock(stream, is_leader=not member)


def _holder(stream: TextIO) -> str:
    """Return the holder that a lock file names; its leader may have ended while members of its group still run."""
    stream.seek(0)
    try:
        leader = json.loads(stream.read())
        return f"process {leader['pid']} on {leader['host']} since {leader['since']}, or another rank of its run"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"
