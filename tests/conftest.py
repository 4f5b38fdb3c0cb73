"""A tiny cohort of drawn heads, in the OASIS layout."""

import numpy as np
from PIL import Image
import pytest

SIZE = 64


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
