"""Files that appear under their name complete or not at all, files that are read, and how errors
quote what a file holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer; git lfs pull fetches the file itself",
    b"GGUF": "a GGUF file",
    b"lmgg": "a GGML file from before GGUF",
    b"fmgg": "a GGML file from before GGUF",
    b"tjgg": "a GGML file from before GGUF",
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x1f\x8b": "compressed by gzip",
}
_SHOWN = 200  # characters of a name in an error message


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Gives a file what `write` puts into it: it is written beside its place, flushed to the disk,
    and renamed. If anything raises, what was there before stays.

    A file that was there hands down its mode and owner; a symlink stays one, and what it points to
    is replaced. What a killed process left of the same file is removed.

    Raises:
        FileExistsError: `path` is a folder, a device or another thing that no file may replace.
    """
    target = Path(os.path.realpath(path))
    old = target.stat() if target.exists() else None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise FileExistsError(f"{target} must be a file or a new name, it is something else")
    _remove_abandoned(target)
    temporary, file = _create(target, 0o666 if old is None else stat.S_IMODE(old.st_mode))
    try:
        with file as f:
            if old is not None:
                # Only root may give a file away.
                with contextlib.suppress(PermissionError):
                    os.fchown(f.fileno(), old.st_uid, old.st_gid)
                os.fchmod(f.fileno(), stat.S_IMODE(old.st_mode))
            write(f)
            f.flush()
            os.fsync(f.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


class InputFile:
    """A file that is read at any place. It stays the file that was opened, whatever takes its name
    later.

    Attributes:
        path: its name.
        size: in bytes, when it was opened.

    Raises:
        FileNotFoundError, PermissionError: it cannot be opened.
        ValueError: it is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Opening a pipe would wait for its writer.
        if not os.path.isfile(path):
            if os.path.exists(path):
                raise ValueError(f"{path} must be a file, it is something else")
            raise FileNotFoundError(f"no file {path}")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, count: int) -> bytearray:
        """A copy of `count` bytes; ValueError if the file ends before them."""
        if not 0 <= offset <= offset + count <= self.size:
            raise ValueError(
                f"{count} bytes at offset {offset} lie outside the file of {self.size} bytes"
            )
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            got = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if got == 0:
                raise ValueError(f"the file was cut to {offset + done} bytes after it was opened")
            done += got
        return data

    @property
    def name(self) -> str:
        """A name for libraries that open files themselves and take no bytes that are not UTF-8."""
        try:
            os.fspath(self.path).encode()
        except UnicodeEncodeError:
            return f"/proc/self/fd/{self._file.fileno()}"
        return os.fspath(self.path)


def kind_of(file: InputFile) -> str:
    """What a file seems to be that is not what its reader wants, as the end of an error message."""
    start = bytes(file.read(0, min(file.size, 64)))
    for magic, kind in _KINDS.items():
        if start.startswith(magic):
            return f": it is {kind}"
    html = start.lstrip().startswith(b"<")
    return ": it is an HTML page, as a failed download leaves it" if html else ""


def shown(value: object) -> str:
    """repr(value) for an error message, cut if it is long: a damaged file holds names of any
    length.
    """
    return cut(repr(value[: _SHOWN + 1] if isinstance(value, str | bytes) else value))


def cut(text: str) -> str:
    """The start of a text that may be long, for an error message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _create(target: Path, mode: int) -> tuple[Path, BinaryIO]:
    """A new locked file beside the target, never readable to more users than `mode` says. The lock
    ends with the process: a file without one is abandoned.
    """
    while True:
        temporary = target.with_name(f"{_prefix(target)}{secrets.token_hex(6)}.tmp")
        # Not tempfile: its files are private to the user whatever the umask says.
        file = open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode), "r+b")  # noqa: SIM115
        _lock(file.fileno())
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        # Another process took it for abandoned before it was locked.
        file.close()


def _prefix(target: Path) -> str:
    # A file name has at most 255 bytes.
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}."


def _lock(descriptor: int, flags: int = 0) -> bool:
    """Whether the file is now locked; not if another holds it, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except OSError as e:
        held = errno.EWOULDBLOCK, errno.EACCES
        if e.errno not in (*held, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
        return False
    return True


def _remove_abandoned(target: Path) -> None:
    """Removes the temporary files of this target that no living process holds."""
    pattern = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{12}\.tmp")
    # A folder that may be written but not listed.
    with contextlib.suppress(PermissionError):
        for entry in list(os.scandir(target.parent)):
            if not pattern.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with (
                contextlib.suppress(FileNotFoundError, PermissionError),
                open(entry.path, "rb") as f,
            ):
                if _lock(f.fileno(), fcntl.LOCK_NB):
                    os.unlink(entry.path)


def _flush_folder(folder: Path) -> None:
    """Makes a rename last through a loss of power."""
    # A folder that may be written but not read.
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not all file systems can
                raise
        finally:
            os.close(descriptor)
