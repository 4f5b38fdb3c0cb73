"""Files and folders that are whole or not there, and folders of results in which only ours is replaced."""

import json
import os
import subprocess
import sys
import time

import pytest

from support import files
from support.cli import UserError
from tests.conftest import script_environment


def write_results(folder, **contents):
    """Writes files of some contents as results."""
    with files.results_folder(folder, "--output-dir") as new:
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
    (folder / "notes.txt").write_text("mine")
    (folder / "scans").mkdir()
    (folder / "scans" / "a.txt").write_text("mine too")
    write_results(folder, second="3")
    assert read(folder) == {"second.txt": "3", "notes.txt": "mine", "scans/a.txt": "mine too"}
    with pytest.raises(UserError, match="notes.txt is not ours"):
        write_results(folder, notes="ours")
    assert read(folder)["notes.txt"] == "mine" and names(folder.parent) == ["results"]


def test_a_folder_of_other_files_is_refused_before_anything_is_computed(tmp_path):
    foreign = tmp_path / "study"
    foreign.mkdir()
    write_results(foreign, a="an empty folder is taken")
    (foreign / files.WRITTEN).unlink()
    (tmp_path / "file").touch()
    for folder, reason in ((foreign, "no files.json"), (tmp_path / "file", "is no folder"),
                           ("/proc", "is a mount point")):
        with pytest.raises(UserError, match=reason), files.results_folder(folder, "--output-dir"):
            raise AssertionError("nothing may be begun")
    (foreign / files.WRITTEN).write_text('{"a')
    with pytest.raises(UserError, match="no files.json"):
        write_results(foreign, a="1")
    assert read(foreign) == {"a.txt": "an empty folder is taken"}


@pytest.mark.parametrize("has_exchange", (True, False))
def test_an_exchange_leaves_both_folders_whole(tmp_path, monkeypatch, has_exchange):
    if not has_exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["a", "b"] and names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]


WRITES_ON = """
import sys
from support import files
while True:
    with files.results_folder(sys.argv[1], "--output-dir") as new:
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
