"""Writing: whole or not at all, under names that no two processes share, and with one error."""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tl_adapters.utils import files
from tl_adapters.utils.files import (
    DiskFullError,
    FolderBusyError,
    FolderExistsError,
    WriteError,
    alone_in,
    append_text,
    copy_file,
    locked,
    make_folder,
    new_folder,
    remove_own,
    replace_folder,
    replaced_folder,
    require_absent,
    require_writable,
    write_bytes,
    write_table,
    write_tensors,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def in_a_process(work: Callable[[], None]) -> int:
    """The id of a process that has done the work and ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    return child


def killed_while_writing(path: Path, folder: bool = False) -> None:
    """Write as a process does that is killed before it renames."""

    def work() -> None:
        if folder:
            with new_folder(path) as out:
                write_text(out / "part", "x")
                os._exit(0)
        files._sync = lambda path: os._exit(0)  # the module of the child alone
        write_text(path, "new")

    in_a_process(work)


def test_a_temporary_name_belongs_to_one_process_and_one_call(tmp_path: Path) -> None:
    made = {files._temporary(tmp_path / "results.json", "partial").name for _ in range(100)}
    assert len(made) == 100
    for name in made:
        found = files._TEMPORARY.fullmatch(name)
        assert found and found["name"] == "results.json" and int(found["pid"]) == os.getpid()
        assert found["host"] == files._HOST


@pytest.mark.parametrize("folder", [False, True], ids=["a file", "a folder"])
def test_what_a_killed_process_left_is_cleaned_by_the_next_writer_in_the_folder(tmp_path: Path, folder: bool) -> None:
    killed_while_writing(tmp_path / "name", folder)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".name.") and left.is_dir() == folder
    write_text(tmp_path / "other.json", "{}")
    assert names(tmp_path) == ["other.json"]


def test_leftovers_of_processes_that_live_or_cannot_be_seen_stay(tmp_path: Path) -> None:
    mine = tmp_path / f".a.{files._HOST}-{os.getpid()}-0123abcd.partial"
    elsewhere = tmp_path / ".a.otherhost-1-0123abcd.partial"
    users = tmp_path / ".a.partial"
    for path in (mine, elsewhere, users):
        path.write_text("x")
    write_text(tmp_path / "a", "new")
    assert names(tmp_path) == sorted([mine.name, elsewhere.name, users.name, "a"])
    before_us = psutil.Process().create_time() - 60  # the number of a dead process was given to this one
    os.utime(mine, (before_us, before_us))
    week_ago = time.time() - files.ABANDONED_SECONDS - 1
    os.utime(elsewhere, (week_ago, week_ago))
    write_text(tmp_path / "a", "new")
    assert names(tmp_path) == sorted([users.name, "a"])


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    earlier = tmp_path / "store"
    with new_folder(earlier) as out:
        write_text(out / "store.json", "earlier")

    def work() -> None:
        rename = os.rename

        def once(source: Path, target: Path) -> None:
            rename(source, target)
            os._exit(0)

        os.rename = once
        with replaced_folder(earlier, ["store.json"]) as out:
            write_text(out / "store.json", "new")

    in_a_process(work)
    assert not earlier.exists()
    write_text(tmp_path / "anything", "")
    assert names(tmp_path) == ["anything", "store", "store/store.json"]
    assert (earlier / "store.json").read_text() == "earlier"


def test_a_replacement_keeps_what_the_user_put_into_the_folder(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    with new_folder(pages) as out:
        for name in ("index.html", "layer_1/a.html", "layer_2/b.html"):
            write_text(out / name, "earlier")
    (pages / "NOTE.md").write_bytes(b"\xffmine")
    (pages / "drawings").mkdir()
    (pages / "drawings" / "one.svg").write_text("<svg/>")
    with replaced_folder(pages, ["index.html", "layer_*"]) as out:
        write_text(out / "index.html", "new")
    assert names(pages) == ["NOTE.md", "drawings", "drawings/one.svg", "index.html"]
    assert (pages / "NOTE.md").read_bytes() == b"\xffmine" and (pages / "index.html").read_text() == "new"
    assert names(tmp_path)[0] == "pages"


def test_no_change_of_two_processes_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_text(path, "{}")

    def work(number: int) -> None:
        for i in range(20):
            with locked(path):
                blocks = json.loads(path.read_text())
                write_text(path, json.dumps({**blocks, f"{number}-{i}": i}))

    children = []
    for number in range(3):
        if (child := os.fork()) == 0:
            try:
                work(number)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert len(json.loads(path.read_text())) == 60
    assert names(tmp_path) == ["results.json"]  # no lock and no temporary file


def test_a_lock_that_is_held_is_named_and_one_that_was_left_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.05)
    with alone_in(tmp_path), locked(tmp_path / "a.json"):
        with (
            pytest.raises(FolderBusyError, match="Another process is writing to .*Wait for it or stop it"),
            alone_in(tmp_path),
        ):
            pass
        with pytest.raises(FolderBusyError, match=r"changing .*a.json"), locked(tmp_path / "a.json"):
            pass
    assert names(tmp_path) == []
    (tmp_path / ".lock").touch()  # of a process that was killed
    with alone_in(tmp_path):
        pass
    assert names(tmp_path) == []


WRITES: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "x" * 5000),
    "pieces of bytes": lambda path: write_bytes(path, (b"x" * 1000 for _ in range(5))),
    "tensors": lambda path: write_tensors(path, {"t": torch.zeros(1000)}),
    "table": lambda path: write_table(path, {"n": int}, ({"n": range(i, i + 100)} for i in range(3)), {}),
    "append": lambda path: append_text(path, "x" * 5000),
    "copy": lambda path: copy_file(__file__, path),
    "folder": lambda path: fill(path),
    "replaced folder": lambda path: refill(path),
}


def fill(path: Path) -> None:
    with new_folder(path) as out:
        write_text(out / "a" / "b.txt", "x" * 5000)


def refill(path: Path) -> None:
    with replaced_folder(path, ["a"]) as out:
        write_text(out / "a" / "b.txt", "x" * 5000)


CALLS = ("open", "write", "replace", "rename", "fsync", "mkdir")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("what", WRITES)
def test_every_call_that_the_system_refuses_is_one_error_and_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, code: int
) -> None:
    """The n-th call to the system fails, for n = 1, 2, ... until the write succeeds."""
    real = {name: getattr(os, name) for name in CALLS}
    refused = 0
    for n in range(1, 100):
        path, left = tmp_path / str(n) / "name", n
        path.parent.mkdir()
        if what == "replaced folder":
            fill(path)
        before = names(path.parent)

        def failing(name: str) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    raise OSError(code, os.strerror(code))
                return real[name](*args, **options)

            return call

        refusal = None
        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, failing(name))
            try:
                WRITES[what](path)
            except WriteError as error:
                refusal = error
        if refusal is None:  # or it needed no such call: a folder that is there is not made
            assert (path / "a" / "b.txt" if path.is_dir() else path).stat().st_size > 1000
            if left > 0:
                break
        else:
            refused += 1
            assert isinstance(refusal, DiskFullError) == (code == errno.ENOSPC)
            assert re.search(r"name\S* cannot be written|too full to write \S*name", str(refusal))
            assert ".partial" not in str(refusal).partition("(")[0]
            if what != "append":  # which makes the file that it adds to
                assert names(path.parent) == before, n
    assert left > 0 and refused > (0 if what == "append" else 2)


def test_text_that_could_not_be_added_whole_is_not_added(tmp_path: Path) -> None:
    class Full:
        def __init__(self, file: object) -> None:
            self.file, self.written = file, 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: memoryview) -> int:
            if self.written:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.written = self.file.write(data[:5])
            return self.written

    path, real_open = tmp_path / "metrics.jsonl", open
    append_text(path, '{"step": 1}\n')
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "open", lambda *args, **options: Full(real_open(*args, **options)), raising=False)
        with pytest.raises(DiskFullError):
            append_text(path, '{"step": 2}\n')
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/inner/name", r"file/inner/name cannot be written .*a file is where a folder is needed"),
        ("folder", r"folder cannot be written .*a folder is where a file is needed"),
        ("x" * 300, r"x cannot be written .*the name is too long; choose a shorter one"),
        ("/proc/name", r"/proc/name cannot be written"),
    ],
)
def test_places_where_nothing_can_be_written_are_named(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=message):
        write_text(tmp_path / place, "x")
    assert names(tmp_path) == ["file", "folder"]
    if place != "folder":
        with pytest.raises(WriteError):
            require_writable((tmp_path / place).parent if "name" in place else tmp_path / place / "inner")
    require_writable(tmp_path / "new" / "folder")
    assert names(tmp_path) == ["file", "folder"]


def test_a_file_may_have_the_longest_name_that_the_system_allows(tmp_path: Path) -> None:
    write_text(tmp_path / ("ä" * 127), "x")
    fill(tmp_path / ("b" * 255))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_text_may_hold_halves_of_characters_and_a_name_may_not(tmp_path: Path) -> None:
    """JSON spells halves of characters, which UTF-8 lacks; safetensors would write such a name and not read it."""
    write_text(tmp_path / "file", "a\ud83db\n")
    append_text(tmp_path / "file", "\udcff")
    assert (tmp_path / "file").read_bytes() == b"a?b\n?"
    for name in (os.fsdecode(b"\xff"), os.fsdecode(b"\xff" * 255)):
        for refused in (lambda path: write_text(path, "x"), fill, lambda path: require_writable(path / "inner")):
            with pytest.raises(WriteError, match="the name is not UTF-8; choose another"):
                refused(tmp_path / name)
    assert names(tmp_path) == ["file"]


def test_private_files_are_the_owners_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "reply.json", "{}", private=True)
    write_text(tmp_path / "page.html", "")
    assert (tmp_path / "reply.json").stat().st_mode & 0o077 == 0
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_removed_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "part-1")
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)  # the process is killed here
    remove_own(tmp_path / "part-1")
    monkeypatch.undo()
    (removed,) = tmp_path.iterdir()
    assert not (tmp_path / "part-1").exists()
    removed.rename(tmp_path / removed.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))
    make_folder(tmp_path / "other")
    fill(tmp_path / "part-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "part-2"]
    remove_own(tmp_path / "never-there")
    target = tmp_path / "users"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    remove_own(tmp_path / "link")  # the link goes, and not what it leads to
    assert target.is_dir() and not (tmp_path / "link").exists()


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FolderExistsError, match="exists already"), new_folder(tmp_path / "run"):
        (tmp_path / "run" / "mine").mkdir(parents=True)
    assert names(tmp_path) == ["run", "run/mine"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderExistsError):
        require_absent(tmp_path / "dangling")
    with replaced_folder(tmp_path / "new", []) as out:
        write_text(out / "a", "x")
    replace_folder(tmp_path / "new", tmp_path / "newer", [])
    assert names(tmp_path / "newer") == ["a"]


def test_the_next_free_name_keeps_the_suffix_that_it_is_given(tmp_path: Path) -> None:
    assert files.next_free_name(tmp_path / "report.html", ".html") == tmp_path / "report.html"
    for name in ("report.html", "report-2.html", "run.v1"):
        (tmp_path / name).touch()
    (tmp_path / "run.v1-2").symlink_to("nowhere")
    assert files.next_free_name(tmp_path / "report.html", ".html") == tmp_path / "report-3.html"
    assert files.next_free_name(tmp_path / "run.v1") == tmp_path / "run.v1-3"  # a broken link is taken, too
