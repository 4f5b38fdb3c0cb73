"""Files and folders that are whole or not there, and folders of results in which only ours is replaced."""

import contextlib
import json
import os
from pathlib import Path
import subprocess
import sys
import time

import pytest

from support import files
from support.cli import UserError
from tests.conftest import script_environment


def write_results(folder, **contents):
    """Writes files of some contents as results."""
    with files.results_folder(folder, "--output-dir", "predict.py") as new:
        for name, text in contents.items():
            (new / f"{name}.txt").write_text(text)


def read(folder):
    """All files below a folder, by name, but for the list."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*")
            if path.is_file() and path.name != files.WRITTEN}


def names(folder):
    """The names of what lies in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def test_results_replace_what_was_ours_and_nothing_else(tmp_path):
    folder = tmp_path / "new" / "results"
    write_results(folder, first="1", second="2")
    assert read(folder) == {"first.txt": "1", "second.txt": "2"}
    folder.chmod(0o2770)
    (folder / "notes.txt").write_text("mine")
    with files.results_folder(folder, "--output-dir", "predict.py") as new:
        (new / "second.txt").write_text("3")
        (folder / "late.txt").write_text("mine too")  # while it computes
    assert read(folder) == {"second.txt": "3", "notes.txt": "mine", "late.txt": "mine too"}
    assert folder.stat().st_mode & 0o7777 == 0o2770
    with pytest.raises(UserError, match="notes.txt is not ours"):
        write_results(folder, notes="ours")
    assert read(folder)["notes.txt"] == "mine" and names(folder.parent) == ["results"]


def test_a_folder_of_other_files_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    def refused(folder, reason, made_by="predict.py"):
        folder = Path(folder)
        before = read(folder) if folder.is_dir() and folder != Path("/proc") else None
        with pytest.raises(UserError, match=reason), files.results_folder(folder, "--output-dir", made_by):
            raise AssertionError("nothing may be begun")
        assert before is None or read(folder) == before

    folder = tmp_path / "study"
    folder.mkdir()
    (folder / ".DS_Store").write_text("of the system: no obstacle")
    write_results(folder, a="1")
    assert read(folder) == {"a.txt": "1", ".DS_Store": "of the system: no obstacle"}
    refused(folder, "holds what predict.py wrote", made_by="predict.py --images")
    monkeypatch.chdir(folder)
    refused(".", "where you are now")
    monkeypatch.chdir(tmp_path)
    (folder / "scans").mkdir()
    refused(folder, "scans is a folder or somebody else's")
    (folder / "scans").rmdir()
    for text in ('{"a', '["a.txt"]', '{"a.txt": {}}'):  # a list, but not ours
        (folder / files.WRITTEN).write_text(text)
        refused(folder, "files.json is not ours")
    (folder / files.WRITTEN).unlink()
    refused(folder, "no files.json")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is no folder")
    refused("/proc", "is a mount point")


@pytest.mark.parametrize("fails_at", (None, 0, 1, 2))
def test_a_system_that_cannot_exchange_loses_nothing(tmp_path, monkeypatch, fails_at):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    write_results(tmp_path / "results", old="1")
    (tmp_path / "results" / "notes.txt").write_text("mine")
    rename, calls = Path.rename, []

    def fail(path, target):
        calls.append(path)
        if len(calls) - 1 == fails_at:
            raise KeyboardInterrupt
        return rename(path, target)

    with contextlib.suppress(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        write_results(tmp_path / "results", new="2")
    new = {"new.txt": "2"} if fails_at in (None, 2) else {"old.txt": "1"}
    assert read(tmp_path / "results") == {**new, "notes.txt": "mine"}


WRITES_ON = """
import sys
from support import files
while True:
    with files.results_folder(sys.argv[1], "--output-dir", "predict.py") as new:
        for number in range(200):
            (new / f"{number}.txt").write_text(sys.argv[2])
"""


def test_two_writers_and_a_kill_at_any_moment_leave_the_results_of_one(tmp_path):
    folder = tmp_path / "results"
    for seed in range(4):
        command = [sys.executable, "-c", WRITES_ON, str(folder)]
        writers = [subprocess.Popen([*command, text], env=script_environment()) for text in "ab"]
        while not folder.exists():
            time.sleep(0.001)
        time.sleep(0.1 + 0.037 * seed)
        for writer in writers:
            writer.kill()
            writer.wait()
        contents = read(folder)
        assert len(contents) == 200 and len(set(contents.values())) == 1
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    write_results(folder, end="1")
    assert names(tmp_path) == ["results"]  # what the killed ones left is gone


def test_a_folder_is_whole_or_not_there(tmp_path):
    before = os.umask(0o022)
    try:
        with files.whole_folder(tmp_path / "new" / "set", "--output-dir") as unfinished:
            (unfinished / "a.txt").write_text("a")
            assert not (tmp_path / "new" / "set").exists()
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "set").stat().st_mode & 0o777 == 0o755  # for everyone to read
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["set", "a.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already; give another --output-dir"):
        with files.whole_folder(tmp_path / "link", "--output-dir"):
            raise AssertionError("nothing may be begun")
    with (pytest.raises(OSError, match="too long.*xxx"),
          files.whole_folder(tmp_path / ("x" * 300), "--output-dir")):
        pass
    with files.whole_folder(tmp_path / ("y" * 249), "--output-dir"):  # as long as names may nearly be
        pass
    twice = tmp_path / "twice"
    with pytest.raises(UserError, match="exists already"), files.whole_folder(twice, "--output-dir"):
        twice.mkdir()  # by another process
    assert names(tmp_path) == ["link", "new", "twice", "y" * 249]


def test_a_failed_write_names_what_the_user_knows(tmp_path):
    target = tmp_path / "full.json"
    target.write_text("old")
    for error, path in ((lambda new: OSError(28, "No space left on device", str(new)), target),
                        (lambda _: OSError(28, "No space left on device"), target),
                        (lambda _: RuntimeError("write failed: errno = 28"), target),
                        (lambda _: FileNotFoundError(2, "No such file", "mine.png"), "mine.png")):
        with pytest.raises(OSError) as failed, files.whole_file(target) as new:
            new.write_text("half")
            raise error(new)
        assert failed.value.filename == str(path)
    with pytest.raises(ZeroDivisionError), files.whole_file(target):
        1 / 0  # noqa: B018
    assert target.read_text() == "old" and names(tmp_path) == ["full.json"]
    files.write_json(target, {"a": 1})
    assert json.loads(target.read_text()) == {"a": 1}


def test_what_a_killed_process_leaves_is_swept_and_a_living_ones_is_not(tmp_path):
    folder, left = tmp_path / "set[1]", tmp_path / f".set[1]-abc{files.UNFINISHED}"
    left.mkdir()
    with files.unfinished(folder):
        assert left.exists()  # it may have been made a moment ago
    os.utime(left, (1, 1))
    with files.unfinished(folder) as living:
        os.utime(living.parent, (1, 1))
        assert not left.exists()
        with files.whole_folder(folder, "--output-dir"):
            assert living.parent.exists()
    assert list(tmp_path.iterdir()) == [folder]
