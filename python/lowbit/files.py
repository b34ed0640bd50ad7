"""Files that appear under their name complete or not at all, one or all of a folder, files that are
read, and how errors quote what a file holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
import stat
import weakref
from collections.abc import Callable, Iterator
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
_STAGE = re.compile(r"\.lowbit\.[0-9a-f]{12}\.tmp")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Gives a file what `write` puts into it: it is written beside its place, flushed to the disk,
    and renamed. If anything raises, what was there before stays.

    A file that was there hands down its mode and owner; a symlink stays one, and what it points to
    is replaced. What a killed process left of the same file is removed.

    Raises:
        FileExistsError: `path` is a folder, a device or another thing that no file may replace.
    """
    target, old = _place(path)
    _remove_abandoned(target)
    temporary, file = _create(target, 0o666 if old is None else stat.S_IMODE(old.st_mode))
    try:
        with file as f:
            _hand_down(f.fileno(), old)
            write(f)
            f.flush()
            os.fsync(f.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """A new folder to write files to, which take their places in `folder` when the block ends. If the
    block raises, none does: what was in `folder` stays, and folders that were made are removed.

    The new folder lies in `folder`, which is made if needed, and is private to the user. Modes, owners,
    symlinks and what a killed process left are treated as by `write_atomically`.

    Args:
        folder: where the files are to be.
        last: the name of the file that comes last.

    Raises:
        FileExistsError: as `write_atomically`, for any of the files, before the first is moved.
    """
    target = Path(folder)
    made = [path for path in (target, *target.parents) if not path.exists()]
    target.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_stages(target)
    stage, descriptor = _create_stage(target)
    try:
        yield stage
        _move_all(sorted(stage.iterdir(), key=lambda file: file.name == last), target)
    except BaseException:
        shutil.rmtree(stage)
        for path in made:
            # Others may have put something there by now.
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    else:
        stage.rmdir()
    finally:
        os.close(descriptor)


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


def _place(path: str | os.PathLike[str]) -> tuple[Path, os.stat_result | None]:
    """Where the file of this name lies or will lie, and what is there now."""
    target = Path(os.path.realpath(path))
    old = target.stat() if target.exists() else None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise FileExistsError(f"{target} must be a file or a new name, it is something else")
    return target, old


def _hand_down(descriptor: int, old: os.stat_result | None) -> None:
    if old is not None:
        # Only root may give a file away.
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _create_stage(folder: Path) -> tuple[Path, int]:
    """A new locked folder; as `_create`."""
    while True:
        stage = folder / f".lowbit.{secrets.token_hex(6)}.tmp"
        stage.mkdir(mode=0o700)
        try:
            descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        _lock(descriptor)
        if stage.exists():
            return stage, descriptor
        os.close(descriptor)


def _remove_abandoned_stages(folder: Path) -> None:
    # A folder that may be written but not listed.
    with contextlib.suppress(PermissionError):
        for entry in list(os.scandir(folder)):
            if not _STAGE.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError, PermissionError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if _lock(descriptor, fcntl.LOCK_NB):
                        shutil.rmtree(entry.path)
                finally:
                    os.close(descriptor)


def _move_all(files: list[Path], folder: Path) -> None:
    """Moves files that are on the disk to where these names lie in a folder."""
    places = [(file, *_place(folder / file.name)) for file in files]
    for file, target, old in places:
        with file.open("rb") as f:
            _hand_down(f.fileno(), old)
            try:
                os.replace(file, target)
            except OSError as e:
                if e.errno != errno.EXDEV:
                    raise
                # A symlink to another file system.
                write_atomically(target, functools.partial(shutil.copyfileobj, f))
                file.unlink()
    for parent in {target.parent for _, target, _ in places}:
        _flush_folder(parent)


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
