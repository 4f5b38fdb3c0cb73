"""The MNI152 template, and the demo cohort that is simulated from it.

The cohort is written as the same three folders of PNG slices that `dataset.py` reads.
"""

import concurrent.futures
import os
from pathlib import Path
import shutil
import tempfile

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from support.cli import InputError
from support.volumes import axial_slices, NUM_POSITIONS, slice_file, SLICE_SPACING, SPLITS

DEMO_VERSION = 1  # part of the cache folder's name: raise it whenever the simulation changes
DEMO_FIRST_CASE = {"train": 1, "validate": 402, "test": 441}  # the case numbers that OASIS gives the splits
DEMO_PEOPLE = {"train": 20, "validate": 5, "test": 5}


def make_demo_cohort(cache_dir=None, people=None):
    """Simulates a cohort from the MNI152 T1 template that nilearn ships, once, and returns its folder.

    The template is one brain, averaged over 152 people (Fonov et al. 2009). Each virtual person is that brain under a
    small affine map, a smooth deformation of a few millimetres, narrower or wider ventricles, its own contrast, a bias
    field and Rician noise. Seeded: the same bytes each time.

    Args:
        cache_dir: where to keep it; by default ``$XDG_CACHE_HOME`` or ``~/.cache``.
        people: the number of people by split; by default `DEMO_PEOPLE`.

    Returns:
        The path of a folder laid out as the OASIS PNG set.

    Raises:
        InputError: if the cache cannot be written.
    """
    people = people or DEMO_PEOPLE
    cache_dir = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_dir / f"brain-vqvae-demo-v{DEMO_VERSION}-{'-'.join(str(people[name]) for name in SPLITS)}"
    if folder.is_dir():
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".brain-vqvae-demo-", dir=cache_dir))
    except OSError as error:
        raise InputError(f"The demo cohort cannot be written to {cache_dir} ({error.strerror}); "
                         "set XDG_CACHE_HOME to a folder that can be.") from error
    try:
        _write_demo_cohort(unfinished, people)
        unfinished.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process finished first, with the same bytes
            raise InputError(f"The demo cohort cannot be written to {folder} ({error.strerror}); "
                             "set XDG_CACHE_HOME to a folder with space.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_demo_cohort(folder, people):
    template = _load_template()

    def write_person(name, case):
        slices = simulate_person(template, np.random.default_rng([DEMO_VERSION, case]))
        for position, image in enumerate(slices):
            Image.fromarray(image).save(slice_file(folder, name, case, position))

    for name in SPLITS:
        (folder / f"keras_png_slices_{name}").mkdir()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        writing = [pool.submit(write_person, name, DEMO_FIRST_CASE[name] + index)
                   for name in SPLITS for index in range(people[name])]
        progress = tqdm(concurrent.futures.as_completed(writing), "Simulating the demo cohort", len(writing),
                        unit=" people", leave=False, disable=None)
        for written in progress:
            written.result()


def _load_template():
    # Slow to import, and needed here alone.
    from nilearn.datasets import load_mni152_template

    volume = load_mni152_template(resolution=1)
    intensity = volume.get_fdata(dtype=np.float32)
    # An average of 152 people is blurred: unsharp masking brings the folds back to the contrast of one person's scan.
    sharp = intensity + 1.2 * (intensity - ndimage.gaussian_filter(intensity, 1.5))
    brain = ndimage.binary_opening(intensity > 0.05, iterations=2).astype(np.float32)
    return ndimage.spline_filter(sharp.clip(0, 1.2), order=3), brain, np.linalg.inv(volume.affine)


def template_slices():
    """The 32 axial slices of the MNI152 template itself, uint8 (32, 256, 256), as `axial_slices` cuts a head.

    An average of 152 people, skull-stripped: blurred, and nobody's picture. It is shrunk by 7 %, as brains are larger in the
    MNI's frame than in Talairach's, to which OASIS-1's volumes are registered (Lancaster et al. 2007).
    """
    from nilearn.datasets import load_mni152_template  # slow to import

    return axial_slices(ndimage.zoom(load_mni152_template(resolution=1).get_fdata(dtype=np.float32), 0.93, order=1))


def simulate_person(template, rng):
    """Draws one virtual person.

    Args:
        template: spline coefficients and brain mask, float32 (x, y, z), and the map from millimetres to voxels.
        rng: a NumPy Generator, the person's only source of chance.

    Returns:
        uint8 (32, 256, 256): axial slices 1.4 mm apart, upwards from 8 mm below the anterior commissure, pixels of 1 mm;
        front up, the head's left side on the left, the outside of the brain 0.
    """
    coefficients, brain, to_voxels = template
    rows, columns = 192, 160  # the part of the frame that a head can reach
    shape = NUM_POSITIONS, rows, columns

    def smooth_field(spacing, amplitude):  # one random value every `spacing` mm, splined to the grid axis by axis
        coarse = rng.normal(0, amplitude, [max(2, round(length / spacing)) for length in shape])
        splines = [ndimage.zoom(np.eye(few), (many / few, 1), order=3, mode="nearest")
                   for few, many in zip(coarse.shape, shape)]
        return np.einsum("abc,ia,jb,kc->ijk", coarse, *splines, optimize=True).astype(np.float32)

    z, y, x = np.meshgrid(np.arange(NUM_POSITIONS) * SLICE_SPACING - 8, (rows - 1) / 2 - np.arange(rows),
                          np.arange(columns) - (columns - 1) / 2, indexing="ij")
    tilt, yaw = np.deg2rad(rng.uniform(-3, 3, 2))
    x, y = np.cos(yaw) * x - np.sin(yaw) * y, np.sin(yaw) * x + np.cos(yaw) * y
    y, z = np.cos(tilt) * y - np.sin(tilt) * z, np.sin(tilt) * y + np.cos(tilt) * z
    x, y, z = (axis * rng.uniform(0.98, 1.1) + smooth_field(18, 1.3) for axis in (x, y, z))
    y -= 18  # the middle of the brain lies behind the anterior commissure
    near_ventricles = np.exp(-((x / 22) ** 2 + ((y + 12) / 45) ** 2 + ((z - 14) / 22) ** 2))
    x *= 1 - rng.uniform(-0.15, 0.5) * near_ventricles

    voxels = np.einsum("ij,j...->i...", to_voxels[:3, :3], np.stack([x, y, z])) + to_voxels[:3, 3, None, None, None]
    signal = ndimage.map_coordinates(coefficients, voxels, order=3, prefilter=False).clip(0, 1.2)
    inside = ndimage.map_coordinates(brain, voxels, order=1) > 0.5
    signal = signal ** rng.uniform(1.2, 1.8) * np.exp(smooth_field(40, 0.06)) * rng.uniform(0.85, 1.0)
    noise = rng.normal(0, rng.uniform(0.01, 0.03), (2, *shape))
    magnitude = np.hypot(signal + noise[0], noise[1])  # Rician: the length of a complex signal with Gaussian noise
    pixels = np.round((magnitude * inside).clip(0, 1) * 255).astype(np.uint8)
    top, left = (256 - rows) // 2, (256 - columns) // 2
    return np.pad(pixels, ((0, 0), (top, top), (left, left)))
