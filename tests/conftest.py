"""A tiny cohort, and a run trained on it."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

from benchmarks.tiny import TINY, write_cohort

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cohort(tmp_path):
    """A fresh tiny cohort that the test may spoil."""
    return write_cohort(tmp_path / "cohort")


def run_script(folder, *command):
    """Runs `python command` in a folder, as a user would, and returns what became of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OASIS_DIR": ""}
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tiny cohort and runs/tiny, trained on it by `python train.py`."""
    folder = tmp_path_factory.mktemp("trained")
    write_cohort(folder / "cohort")
    done = run_script(folder, ROOT / "train.py", "--data-dir", "cohort", "--run-dir", "runs/tiny", *TINY)
    assert done.returncode == 0, done.stderr
    return folder


def check_refused(main, arguments, expected, capsys):
    """Asserts that a script's main ends with status 2 and one sentence that contains what is expected."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert expected in said and "\n" not in said and "Traceback" not in said
