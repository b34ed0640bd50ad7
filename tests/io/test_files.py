"""Files that are written: complete or not there, with the mode, the owner and the links of the old
one, and nothing left beside them. Files that are read: what was opened, or an error.
"""

from __future__ import annotations

import ast
import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.files import InputFile, cut, shown, staged, write_atomically

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


class Broken(Exception):
    pass


def test_a_stage_takes_its_place_at_the_end(tmp_path: Path, monkeypatch):
    folder, moved, real = tmp_path / "a" / "b", [], os.replace
    with staged(folder, "b.json") as stage:
        assert stage.parent == folder
        assert stat.S_IMODE(stage.stat().st_mode) == 0o700
        for name in ("c", "b.json", "a"):
            put(stage / name, name.encode())
        assert names(folder) == [stage.name]
        monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), real(a, b)))
    assert moved[-1] == "b.json"
    assert names(folder) == ["a", "b.json", "c"]
    assert (folder / "c").read_bytes() == b"c"


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_stage_that_fails_leaves_what_was(tmp_path: Path, error, old: bool):
    folder = tmp_path / "a" / "b"
    if old:
        folder.mkdir(parents=True)
        put(folder / "x", b"old")
    with pytest.raises(error), staged(folder, "x") as stage:  # noqa: PT012
        put(stage / "x", b"new")
        raise error
    assert names(tmp_path) == (["a"] if old else [])
    assert not old or (names(folder) == ["x"] and (folder / "x").read_bytes() == b"old")


def test_folders_that_others_use_meanwhile_stay(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(Broken), staged(folder, "x"):  # noqa: PT012
        put(folder / "theirs", b"theirs")
        raise Broken
    assert names(folder) == ["theirs"]


def test_modes_and_links_outlast_a_stage(tmp_path: Path):
    folder, store = tmp_path / "folder", tmp_path / "store"
    folder.mkdir()
    store.mkdir()
    put(store / "blob", b"old")
    put(folder / "private", b"old")
    (folder / "private").chmod(0o600)
    (folder / "link").symlink_to(store / "blob")
    (tmp_path / "alias").symlink_to(folder)
    umask = os.umask(0o027)
    try:
        with staged(tmp_path / "alias", "") as stage:
            for name in ("private", "link", "new"):
                put(stage / name, b"new")
    finally:
        os.umask(umask)
    assert names(folder) == ["link", "new", "private"]
    assert (folder / "link").is_symlink()
    assert (store / "blob").read_bytes() == b"new"
    modes = {n: stat.S_IMODE((folder / n).stat().st_mode) for n in ("private", "new")}
    assert modes == {"private": 0o600, "new": 0o640}


def test_a_link_to_another_file_system(tmp_path: Path, monkeypatch):
    """Here one that a rename refuses to reach."""
    folder, store, real = tmp_path / "folder", tmp_path / "store", os.replace
    folder.mkdir()
    store.mkdir()
    (folder / "link").symlink_to(store / "blob")

    def replace(a: Path, b: Path) -> None:
        if a.parent != b.parent and b.parent == store:
            raise OSError(errno.EXDEV, "another file system")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with staged(folder, "") as stage:
        put(stage / "link", b"new")
        put(stage / "file", b"new")
    assert (names(folder), names(store)) == (["file", "link"], ["blob"])
    assert (store / "blob").read_bytes() == b"new"


def test_all_places_are_looked_at_before_the_first_is_taken(tmp_path: Path):
    (tmp_path / "z").mkdir()
    no_file = pytest.raises(FileExistsError, match="must be a file or a new name")
    with no_file, staged(tmp_path, "") as stage:
        for name in "az":
            put(stage / name, b"new")
    assert names(tmp_path) == ["z"]


def test_stages_of_killed_processes_are_removed_and_those_of_living_ones_not(tmp_path: Path):
    code = (
        "import os, signal, sys; from lowbit.files import staged\n"
        "with staged(sys.argv[1], '') as stage:\n"
        "    (stage / 'half').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    (tmp_path / "mine.tmp").mkdir()
    with staged(tmp_path, "") as first:
        assert names(tmp_path) == sorted([first.name, "mine.tmp"])
        assert first.name != left
        put(first / "a", b"first")
        with staged(tmp_path, "") as second:
            put(second / "b", b"second")
        assert names(tmp_path) == sorted([first.name, "b", "mine.tmp"])
    assert names(tmp_path) == ["a", "b", "mine.tmp"]


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
