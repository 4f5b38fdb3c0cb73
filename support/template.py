"""The MNI152 template, and the cohort that is simulated from it, as PNG folders that `dataset.py` reads."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import os
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from support.cli import UserError
from support.files import whole_folder
from support.images import pad_to_square
from support.slices import slice_file, SPLITS, write_geometry
from support.volumes import FRAME_MM, SLAB, SLAB_SLICES, SliceGeometry

DEMO_VERSION = 2  # in the cache folder's name and each person's seed: raise it if the simulation changes
DEMO_PEOPLE = {"train": 40, "validate": 5, "test": 5}
SIMULATED_NOTE = "SIMULATED.txt"  # lies in the folder of each simulated data set
DEMO_IMAGE_SIZE = 128  # pixels
DEMO_GEOMETRY = SliceGeometry(2.0, 4.25, -58.0)  # of its 32 slices: the cerebellum to near the vertex
HEAD = 192, 160  # mm: the rows and columns of the frame that a simulated head can reach


def make_demo_cohort():
    """Simulates the demo cohort, once, into the user's cache: its folder, laid out as the OASIS PNG set."""
    counts = "-".join(map(str, DEMO_PEOPLE.values()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / f"brain-vqvae-demo-v{DEMO_VERSION}-whole-{DEMO_IMAGE_SIZE}-{counts}"
    if not folder.is_dir():
        try:
            write_cohort(folder, DEMO_PEOPLE, DEMO_IMAGE_SIZE, DEMO_GEOMETRY)
        except (UserError, OSError) as error:
            error.add_note("XDG_CACHE_HOME can name another folder for the demo cohort")
            if not folder.is_dir():  # else another process finished first, with the same bytes
                raise
    return folder


def split_people(number):
    """The number of people by split, of `number` >= 3 in all: 80, 10 and 10 %."""
    tenth = share_of_people(number, 0.1)
    return {"train": number - 2 * tenth, "validate": tenth, "test": tenth}


def share_of_people(number, share):
    """How many of `number` people validation or test gets: at least two of eight or more."""
    return max(2 if number >= 8 else 1, round(share * number))


def is_simulated(folder):
    """Whether the people of the data set in a folder are simulated, or sampled from a model of such."""
    return (Path(folder) / SIMULATED_NOTE).is_file()


def make_splits(folder, people):
    """Makes the folders of a data set: [(split, case)] for `people` by split, in the order of `SPLITS`."""
    for name in SPLITS:
        (folder / f"keras_png_slices_{name}").mkdir()
    validate = max(402, 1 + people["train"])  # as OASIS numbers its cases, or from the next free number
    first = {"train": 1, "validate": validate, "test": max(441, validate + people["validate"])}
    return [(name, first[name] + index) for name in SPLITS for index in range(people[name])]


def write_cohort(folder, people, image_size, geometry=SLAB, num_slices=SLAB_SLICES):
    """Simulates `people`, numbers by split, and writes them into a new folder: 128 or 256 pixels of a side.

    The template, which nilearn ships, is the mean of 152 people (MNI152, Fonov et al. 2009). A virtual person
    is that brain under a small affine map, a smooth deformation of a few millimetres, narrower or wider
    ventricles, its own contrast, a bias field and Rician noise. The case number is the seed: the same bytes,
    however many people there are. Of `geometry` the size of a pixel does not count."""
    geometry = dataclasses.replace(geometry, pixel_size=FRAME_MM / image_size)
    def write_person(name, case):
        rng = np.random.default_rng([DEMO_VERSION, case])
        person = simulate_person(template, rng, image_size, geometry.heights(num_slices))
        for position, image in enumerate(person):
            Image.fromarray(image).save(slice_file(unfinished, name, case, position))
    with whole_folder(folder, "--output-dir") as unfinished:
        cases = make_splits(unfinished, people)
        write_geometry(unfinished, geometry)
        (unfinished / SIMULATED_NOTE).write_text("Simulated by dataset.py: no evidence about patients.\n")
        template = _load_template(256 // image_size)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            writing = pool.map(write_person, *zip(*cases))  # if one fails, those that wait are cancelled
            list(tqdm(writing, "Simulating", len(cases), unit=" people", leave=False, disable=None))


def _load_template(pixel_size):
    """The template for `simulate_person`: spline coefficients, brain, float32 (x, y, z), and mm to voxels."""
    intensity, to_voxels = load_mni152()
    # An average of 152 people is blurred: unsharp masking brings the folds back to one person's contrast.
    sharp = (intensity + 1.2 * (intensity - ndimage.gaussian_filter(intensity, 1.5))).clip(0, 1.2)
    brain = ndimage.binary_opening(intensity > 0.05, iterations=2).astype(np.float32)
    if pixel_size == 2:
        for axis in (0, 1):
            # The mean of the two points half a voxel to either side, each by cubic interpolation
            sharp = ndimage.convolve1d(sharp, np.array([-1, 8, 18, 8, -1]) / 32, axis)
            brain = ndimage.convolve1d(brain, [0.25, 0.5, 0.25], axis)
    return ndimage.spline_filter(sharp, order=3, output=np.float32), brain, to_voxels


def load_mni152():
    """The template of nilearn: float32 (x, y, z) in [0, 1], and the map (4, 4) from its mm to voxels."""
    from nilearn.datasets import load_mni152_template  # slow to import
    image = load_mni152_template(resolution=1)
    return image.get_fdata(dtype=np.float32), np.linalg.inv(image.affine)


def cut_axial(volume, to_voxels, heights, side, pixel_size):
    """Cuts a volume of `load_mni152` at heights (N,), in mm: float32 (N, side, side), front up, left left."""
    across = (np.arange(side) - (side - 1) / 2) * pixel_size
    # The middle of the brain lies 18 mm behind the commissure.
    grid = np.stack(np.meshgrid(heights, -across - 18, across, indexing="ij")[::-1])
    return ndimage.map_coordinates(volume, _voxels(to_voxels, grid), order=1)


def _voxels(to_voxels, points):
    """Points (3, ...), x, y and z in mm, as indices of voxels."""
    return np.einsum("ij,j...->i...", to_voxels[:3, :3], points) + to_voxels[:3, 3, None, None, None]


def simulate_person(template, rng, image_size, heights):
    """A person, uint8 (N, image_size, image_size) at even heights (N,) in mm; only noise differs by size."""
    coefficients, brain, to_voxels = template
    pixel_size = 256 // image_size
    rows, columns = HEAD[0] // pixel_size, HEAD[1] // pixel_size
    z, y, x = np.meshgrid(heights, ((rows - 1) / 2 - np.arange(rows)) * pixel_size,
                          (np.arange(columns) - (columns - 1) / 2) * pixel_size, indexing="ij")
    tilt, yaw = np.deg2rad(rng.uniform(-3, 3, 2))
    x, y = np.cos(yaw) * x - np.sin(yaw) * y, np.sin(yaw) * x + np.cos(yaw) * y
    y, z = np.cos(tilt) * y - np.sin(tilt) * z, np.sin(tilt) * y + np.cos(tilt) * z
    lengths, shape = (np.ptp(heights), *HEAD), z.shape
    def field(spacing, amplitude):
        """A random field, float32 of the grid's shape: a value every `spacing` mm, splined to the grid."""
        coarse = rng.normal(0, amplitude, [max(2, round(length / spacing)) for length in lengths])
        splines = []
        # A slice is a plane; a pixel of 2 mm is the mean of two of 1 mm.
        for few, points, many in zip(coarse.shape, (len(heights), *HEAD), shape):
            spline = ndimage.zoom(np.eye(few), (points / few, 1), order=3, mode="nearest")
            splines.append(spline.reshape(many, -1, few).mean(axis=1))
        return np.einsum("abc,ia,jb,kc->ijk", coarse, *splines, optimize=True).astype(np.float32)
    x, y, z = (axis * rng.uniform(0.98, 1.1) + field(18, 1.3) for axis in (x, y, z))
    y -= 18  # the middle of the brain lies behind the anterior commissure
    near_ventricles = np.exp(-((x / 22) ** 2 + ((y + 12) / 45) ** 2 + ((z - 14) / 22) ** 2))
    x *= 1 - rng.uniform(-0.15, 0.5) * near_ventricles
    voxels = _voxels(to_voxels, np.stack([x, y, z]))
    signal = ndimage.map_coordinates(coefficients, voxels, order=3, prefilter=False).clip(0, 1.2)
    inside = ndimage.map_coordinates(brain, voxels, order=1)
    if pixel_size == 1:
        inside = inside > 0.5
    signal = signal ** rng.uniform(1.2, 1.8) * np.exp(field(40, 0.06))
    signal *= rng.uniform(0.85, 1.0)
    noise = rng.normal(0, rng.uniform(0.01, 0.03) / pixel_size, (2, *signal.shape))  # a larger pixel has less
    magnitude = np.hypot(signal + noise[0], noise[1])  # Rician: of a complex signal with Gaussian noise
    return pad_to_square(np.round((magnitude * inside).clip(0, 1) * 255).astype(np.uint8), image_size)
