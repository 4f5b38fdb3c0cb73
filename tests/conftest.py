"""A tiny cohort, and a run trained on it."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the tests are of the CPU, to the bit; here and in the processes they start

import support.cli  # noqa: F401 (first: sets what TensorFlow, Keras and matplotlib read when imported)

from pathlib import Path
import subprocess
import sys

import pytest

from benchmarks.tiny import TINY, write_cohort

ROOT = Path(__file__).parents[1]
# Of the libraries, each by what it says and where: tensorflow_probability and keras themselves, on every import and every save.
LIBRARY_WARNINGS = (
    "ignore:distutils Version classes are deprecated:DeprecationWarning:tensorflow_probability",
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:keras",
    "ignore:You are using a softmax over axis:UserWarning:keras",
)


def pytest_configure(config):
    """Leaves only warnings of this repository in the tests' summary."""
    for warning in LIBRARY_WARNINGS:
        config.addinivalue_line("filterwarnings", warning)


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
