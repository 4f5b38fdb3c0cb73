"""A tiny cohort of drawn heads, in the OASIS layout, and a run trained on it."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the tests are of the CPU, to the bit; here and in the processes they start

from pathlib import Path
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

SIZE = 64
ROOT = Path(__file__).parents[1]
# Of the libraries, each by what it says and where: tensorflow_probability and keras themselves, on every import and every save.
LIBRARY_WARNINGS = (
    "ignore:distutils Version classes are deprecated:DeprecationWarning:tensorflow_probability",
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:keras",
    "ignore:You are using a softmax over axis:UserWarning:keras",
)
TINY = ["--epochs", "2", "--prior-epochs", "2", "--num-embeddings", "16", "--embedding-dim", "4"]


def pytest_configure(config):
    """Leaves only warnings of this repository in the tests' summary."""
    for warning in LIBRARY_WARNINGS:
        config.addinivalue_line("filterwarnings", warning)


def draw_head(rng, position, size=SIZE):
    """A bright ellipse with dark ventricles and noise, black outside: uint8 (size, size)."""
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    radius = np.hypot(x / rng.uniform(0.5, 0.6), y / rng.uniform(0.65, 0.74))
    head = np.where(radius < 1, 0.75 + 0.2 * np.cos(9 * x + rng.uniform(0, 6)) * np.cos(7 * y), 0)
    head[np.hypot((np.abs(x) - 0.15) / 0.08, y / (0.1 + 0.01 * position)) < 1] = 0.15
    return np.uint8(255 * np.clip(head + (radius < 1) * rng.normal(0, 0.02, head.shape), 0, 1))


def write_cohort(folder, people=(4, 2, 2), slices=8, size=SIZE):
    """Writes the three split folders and returns the folder."""
    rng = np.random.default_rng(0)
    first_cases = 1, 402, 441
    for name, count, first in zip(("train", "validate", "test"), people, first_cases):
        split_folder = folder / f"keras_png_slices_{name}"
        split_folder.mkdir(parents=True)
        for case in range(first, first + count):
            for position in range(slices):
                Image.fromarray(draw_head(rng, position, size)).save(
                    split_folder / f"case_{case:03d}_slice_{position}.nii.png")
    return folder


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
