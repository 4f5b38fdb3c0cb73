"""Files and folders that are whole or not there, and folders of results in which only ours is replaced."""

import os
from pathlib import Path
import subprocess
import sys
import time
import types

import pytest

from support import files
from support.cli import UserError
from tests.conftest import script_environment


def write_results(folder, made_by="predict.py", **contents):
    """Writes files of some contents as results."""
    with files.results_folder(folder, "--output-dir", made_by) as new:
        for name, text in contents.items():
            (new / f"{name}.txt").write_text(text)


def read(folder):
    """All files below a folder, by name, but for the list."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*")
            if path.is_file() and path.name != files.WRITTEN}


@pytest.mark.parametrize("can_exchange", (True, False))
def test_results_replace_what_was_ours_and_nothing_else(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:  # as on NFS
        library = types.SimpleNamespace(renameat2=lambda *_: -1, renamex_np=lambda *_: -1)
        monkeypatch.setattr(files.ctypes, "CDLL", lambda _: library)
    folder = tmp_path / "new" / "results"
    write_results(folder, first="1", second="2")
    assert read(folder) == {"first.txt": "1", "second.txt": "2"}
    folder.chmod(0o2770)
    (folder / "notes.txt").write_text("mine")
    log = open(folder / "log.txt", "w")  # as of a queue, which goes on writing
    with files.results_folder(folder, "--output-dir", "predict.py") as new:
        (new / "second.txt").write_text("3")
        (folder / "late.txt").write_text("mine too")  # while it computes
    log.write("still here")
    log.close()
    expected = {"second.txt": "3", "notes.txt": "mine", "late.txt": "mine too", "log.txt": "still here"}
    assert read(folder) == expected and folder.stat().st_mode & 0o7777 == 0o2770
    with pytest.raises(UserError, match="notes.txt is not ours"):
        write_results(folder, notes="ours")
    assert read(folder) == expected and list(folder.parent.iterdir()) == [folder]
    for name in ("scans/mine.txt", "model/mine.txt"):  # in a folder of the user's, in one of ours
        with files.results_folder(tmp_path / name[:5], "--export", "predict.py --export") as new:
            (new / "model").mkdir()
            (new / "model" / "weights").write_text("1")
        (tmp_path / name[:5] / name).parent.mkdir(exist_ok=True)
        (tmp_path / name[:5] / name).write_text("mine")
        with pytest.raises(UserError, match="which is not ours and could not stay"):
            files.check_results_folder(tmp_path / name[:5], "--export", "predict.py --export")


def test_a_folder_of_other_files_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    def refused(folder, reason, made_by="predict.py"):
        before = read(tmp_path)
        with pytest.raises(UserError, match=reason), files.results_folder(folder, "--output-dir", made_by):
            raise AssertionError("nothing may be begun")
        assert read(tmp_path) == before

    folder = tmp_path / "study"
    folder.mkdir()
    (folder / ".DS_Store").write_text("of the system: no obstacle")
    write_results(folder, a="1")
    assert read(folder) == {"a.txt": "1", ".DS_Store": "of the system: no obstacle"}
    refused(folder, "holds what predict.py wrote", made_by="predict.py --images")
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        refused(".", "where you are now")
    (folder / files.WRITTEN).write_text('{"a.txt": {}}')  # a list, but not ours
    refused(folder, "no files.json of ours")
    (folder / files.WRITTEN).unlink()
    refused(folder, "no files.json of ours")
    refused(folder / "a.txt", "is no folder")
    refused("/proc", "is a mount point")


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
    assert list(tmp_path.iterdir()) == [folder]  # what the killed ones left is gone


def test_a_folder_or_a_file_is_whole_or_not_there(tmp_path):
    folder, file = tmp_path / "new" / "set", tmp_path / ("y" * 249)  # as long as names may nearly be
    umask = os.umask(0o022)
    with files.whole_folder(folder, "--output-dir") as unfinished:
        (unfinished / "a.txt").write_text("a")
        assert not folder.exists()
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o755  # for everyone to read
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (folder, tmp_path / "link"):
        with pytest.raises(UserError, match="exists already; give another --output-dir"):
            with files.whole_folder(taken, "--output-dir"):
                raise AssertionError("nothing may be begun")
    with pytest.raises(OSError, match="not empty"), files.whole_folder(tmp_path / "twice", "--output-dir"):
        (tmp_path / "twice" / "of another process").mkdir(parents=True)
    files.write_json(file, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.whole_file(file) as new:
        new.write_text("half")
        1 / 0  # noqa: B018
    assert file.read_text() == '{\n  "a": 1\n}\n' and Path(folder / "a.txt").read_text() == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new", "twice", file.name]


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
