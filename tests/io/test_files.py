"""Files that are written: complete or not there, with the mode, the owner and the links of the old
one, and nothing left beside them. Files that are read: what was opened, or an error.
"""

from __future__ import annotations

import ast
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.files import InputFile, cut, shown, write_atomically

PACKAGE = Path(__file__).parents[2] / "python" / "lowbit"


def put(path: Path, data: bytes) -> None:
    write_atomically(path, lambda f: f.write(data))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666, 0o755])
def test_the_mode_of_an_old_file_is_kept(tmp_path: Path, mode: int):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    seen = []

    def write(f) -> None:
        seen.append(stat.S_IMODE(os.fstat(f.fileno()).st_mode))
        f.write(b"new")

    write_atomically(path, write)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert seen == [mode], "nobody else can read it while it is written"
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_an_old_file_is_kept(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    os.chown(path, 1234, 4321)
    put(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "to nothing yet"])
def test_a_symlink_stays_one(tmp_path: Path, exists: bool):
    (tmp_path / "store").mkdir()
    blob, middle, link = tmp_path / "store" / "blob", tmp_path / "middle", tmp_path / "link"
    if exists:
        blob.write_bytes(b"old")
    middle.symlink_to(Path("store") / "blob")
    link.symlink_to(middle)
    put(link, b"new")
    assert link.is_symlink()
    assert middle.is_symlink()
    assert blob.read_bytes() == b"new"
    assert names(tmp_path) == ["link", "middle", "store"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    code = (
        "import os, signal, sys; from lowbit.files import write_atomically\n"
        "write_atomically(sys.argv[1], lambda f: (f.write(b'half'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    for target in (path, tmp_path / "other"):
        killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
        assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    put(path, b"new")
    left = names(tmp_path)
    assert len(left) == 2
    assert left[0].startswith(".other."), "another file's is not touched"
    assert left[1] == path.name


def test_what_a_living_process_writes_is_not_removed(tmp_path: Path):
    path = tmp_path / "a"

    def write(f) -> None:
        put(path, b"meanwhile")
        assert path.read_bytes() == b"meanwhile"
        f.write(b"last")

    write_atomically(path, write)
    assert path.read_bytes() == b"last"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, make):
    path = tmp_path / "a"
    make(path)
    with pytest.raises(FileExistsError, match="must be a file or a new name"):
        put(path, b"new")
    assert names(tmp_path) == ["a"]
    with pytest.raises(ValueError, match="must be a file, it is something else"):
        InputFile(path)


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, os.fsdecode(b"\xff\xfe.bin")])
def test_any_name_that_a_file_can_have(tmp_path: Path, name: str):
    path = tmp_path / name
    put(path, b"old")
    put(path, b"new")
    assert names(tmp_path) == [name]
    assert InputFile(path).read(0, 3) == b"new"


def test_file_and_folder_reach_the_disk(tmp_path: Path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        info = os.fstat(descriptor)
        synced.append(("folder" if stat.S_ISDIR(info.st_mode) else "file", names(tmp_path)))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    put(tmp_path / "a", b"new")
    assert [kind for kind, _ in synced] == ["file", "folder"]
    assert "a" not in synced[0][1], "the name comes after the content"
    assert synced[1][1] == ["a"], "the folder comes after the name"


def test_a_failure_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a"
    put(path, b"old")

    def fail(f) -> None:
        f.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert names(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def written(tree: ast.Module) -> set[str]:
    """The calls that put something into a file under its name."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        method = call.rpartition(".")[2]
        modes = [
            a.value
            for a in (*node.args, *(k.value for k in node.keywords))
            if isinstance(a, ast.Constant)
        ]
        writes = any(
            isinstance(m, str) and set(m) & set("wax+") and set(m) <= set("rwaxbt+") for m in modes
        )
        if method in {"write_text", "write_bytes", "savefig", "tofile"} or (
            method == "open" and writes
        ):
            found.add(call)
        if call in ("np.save", "np.savez", "torch.save"):
            found.add(call)
    return found


def test_every_file_of_the_package_is_written_atomically():
    """But those that one process leaves for another in a temporary folder of their own."""
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in PACKAGE.rglob("*.py")
        if path.name != "files.py" and (calls := written(ast.parse(path.read_text())))
    }
    temporary = "cli/baseline.py"
    assert found.keys() <= {temporary}, found


def test_reading_stays_with_the_file_that_was_opened(tmp_path: Path):
    path = tmp_path / "a"
    put(path, b"0123456789")
    file = InputFile(path)
    put(path, b"another")
    assert (file.size, file.read(2, 3)) == (10, b"234")
    with pytest.raises(ValueError, match="5 bytes at offset 6 lie outside the file of 10 bytes"):
        file.read(6, 5)


def test_a_file_that_is_cut_is_noticed(tmp_path: Path):
    path = tmp_path / "a"
    put(path, bytes(100))
    file = InputFile(path)
    os.truncate(path, 40)
    assert len(file.read(0, 40)) == 40
    with pytest.raises(ValueError, match="the file was cut to 40 bytes after it was opened"):
        file.read(0, 100)


def test_errors_quote_the_start_of_what_is_long():
    assert shown("a'b") == repr("a'b")
    assert shown(3) == "3"
    assert len(shown("x" * 10**7)) == len(shown(["x" * 1000])) == 203
    assert cut("x" * 200) == "x" * 200
    assert cut("x" * 201) == "x" * 200 + "..."
