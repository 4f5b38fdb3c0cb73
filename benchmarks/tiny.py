"""The smallest training there is, and when two of them are the same. For faults.py and the tests."""

import csv

import keras
import numpy as np
from PIL import Image

SIZE = 64
TINY = ["--epochs", "2", "--prior-epochs", "2", "--num-embeddings", "16", "--embedding-dim", "4"]


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
    for name, count, first_case in zip(("train", "validate", "test"), people, (1, 402, 441), strict=True):
        split_folder = folder / f"keras_png_slices_{name}"
        split_folder.mkdir(parents=True)
        for case in range(first_case, first_case + count):
            for position in range(slices):
                image = Image.fromarray(draw_head(rng, position, size))
                image.save(split_folder / f"case_{case:03d}_slice_{position}.nii.png")
    return folder


def read_history(path):
    """The rows of a history, dicts of strings, without the clock."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_run(run, other):
    """Bit for bit: the weights of both models, the histories but for the clock, GIF and metrics.

    Optimisers are not saved at a run's end. But what they hold decides the weights of every later step.
    """
    for name in ("vqvae", "pixelcnn"):
        variables = [[variable for variable in keras.models.load_model(folder / f"{name}.keras").variables
                      if "seed" not in variable.path] for folder in (run, other)]
        assert len(variables[0]) == len(variables[1]) > 20
        for variable, twin in zip(*variables, strict=True):
            np.testing.assert_array_equal(variable, twin, err_msg=variable.path)
        assert read_history(run / f"{name}_history.csv") == read_history(other / f"{name}_history.csv")
    for name in ("progress.gif", "metrics.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
