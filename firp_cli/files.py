"""Atomic writing of files, outputs that are tried and reserved before the work, locks of folders, and checksums."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from firp_cli.errors import UsageError
from firp_cli.provenance import _now

LOCK = ".lock"


def cache_folder() -> Path:
    """Return the folder of this machine's measurements: $FIRP_CACHE_DIR, else `firp` in the user's cache folder.

    It may be impossible to make: a user without a home, as in some containers, has none.
    """
    if folder := os.environ.get("FIRP_CACHE_DIR"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "firp"
    try:
        return Path.home() / ".cache" / "firp"
    except RuntimeError:  # not a shared folder such as /tmp: compiled kernels are loaded from it
        return Path(os.devnull) / "firp"


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_output(path: Path, kind: Literal["folder", "file", "stream"] = "folder", option: str = "--output") -> None:
    """Try to write at the place of a result, before the work for it begins. Nothing that is made stays.

    Args:
        kind: of the result: a `folder` of files, a `file` that is replaced as a whole, or a `stream` of lines, which
            may also be a device or a pipe.

    Raises UsageError where the place is of another kind or cannot be written.
    """
    try:
        if path.exists() and path.is_dir() != (kind == "folder"):
            wrong, right = ("folder", "file") if path.is_dir() else ("file", "folder")
            raise UsageError(f"{path} is a {wrong}: {option} takes a {right}")
        if path.exists() and not path.is_dir():
            if not path.is_file() and kind == "file":
                raise UsageError(f"{path} is not a regular file: give another {option}")
            if path.is_file():
                path.open("ab").close()
            if kind == "stream":
                return
        place = path if kind == "folder" else path.parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UsageError(f"{place} is a file, not a folder: {path} cannot be made; give another {option}")
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"0")  # a full disk refuses the first byte
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be written ({os_reason(error)}): give another {option}") from error


def os_reason(error: Exception) -> str:
    """Return an error's reason without the path, which messages name themselves."""
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def reserved_folder(given: Path | None, default: Path) -> Iterator[Path]:
    """Make the folder of a report and keep other runs out of it. It is removed again if nothing is written into it.

    Args:
        given: the folder that the user names. None: `default`, with a number after it if it exists.

    Raises UsageError where it cannot be written, or another run is writing into it now.
    """
    check_output(given or default)
    folder = default if given is None else given
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while given is None:
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
            folder = default.with_name(f"{default.name}-{number}")
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock_now(descriptor, folder)
        yield folder
    finally:
        os.close(descriptor)
        for place in dict.fromkeys((*((folder,) if given is None else ()), *missing)):
            with contextlib.suppress(OSError):  # it has files, or it is the default that another run has made
                place.rmdir()


def _lock_now(descriptor: int, path: Path) -> None:
    """Lock an open file or folder until it is closed. Raises UsageError where another run has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is writing {path} now: wait for it, or give another --output") from None
    except OSError:  # a file system without such locks
        return


def open_lines(path: Path, keep: bool) -> TextIO:
    """Open a file for lines that are written one after the other, and keep other runs out of it.

    `keep`: append to its whole lines; a last line without an end is cut off. Raises UsageError where another run is
    writing it, OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a", encoding="utf-8", errors="backslashreplace")  # of a lone surrogate JSON's own escape
    try:
        if path.is_file():
            _lock_now(stream.fileno(), path)
            stream.truncate(path.read_bytes().rfind(b"\n") + 1 if keep else 0)
    except BaseException:
        stream.close()
        raise
    return stream


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


def read_json(path: Path) -> Any:
    """Return the JSON value of a file, which may begin with a byte-order mark. Raises OSError, ValueError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
