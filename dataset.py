"""The OASIS PNG slices: found, checked, read, and fed to the networks.

The way of the data is PNG -> uint8 array -> ``tf.data`` batches of float32 in [-1, 1]. Where no OASIS slices are to be
had, a demo cohort is simulated and written as the same PNG folders, so that everything after it is the one real path.

    python dataset.py [--data-dir DIR]                             # a table of the splits, and runs/contact_sheet.png
    python dataset.py --from-oasis1 DISCS --output-dir DIR         # the PNG folders from the OASIS-1 release
    python dataset.py --from-nifti VOLUMES --output-dir DIR        # or from NIfTI volumes
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
import re
import shutil
import sys
import tempfile

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy import ndimage
from skimage import util
import tensorflow as tf
from tqdm import tqdm

SPLITS = ("train", "validate", "test")
NUM_POSITIONS = 32  # axial slices per person
SLICE_SPACING = 1.4  # mm between the slices that are simulated or cut from volumes
SEEDS = 2 ** 31  # seeds are less than this, the smallest range of the libraries that take them
STOPPED = 130  # exit status after Ctrl-C or SIGTERM, as shells have it
LARGEST_SIDE = 1024  # pixels; a bound before decoding, so that no file can fill the memory
FILE_NAME = re.compile(r"case_(\d{1,9})_slice_(\d{1,9})(?:\.nii)?\.png")
DEMO_VERSION = 1  # part of the cache folder's name: raise it whenever the simulation changes
DEMO_FIRST_CASE = {"train": 1, "validate": 402, "test": 441}  # the case numbers that OASIS gives the splits
DEMO_PEOPLE = {"train": 20, "validate": 5, "test": 5}


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """Reports a bad argument as the scripts report all bad input: in one sentence."""

    def error(self, message):
        """Raises `InputError` in place of printing the usage."""
        raise InputError(f"{message}; see --help.")


def number(kind, minimum, maximum=float("inf")):
    """An argparse type: an int or a finite float of at least `minimum` and less than `maximum`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value < maximum:
            below = f" and less than {maximum}" if maximum < float("inf") else ""
            raise argparse.ArgumentTypeError(f"expected {'an integer' if kind is int else 'a number'} "
                                             f"of at least {minimum}{below}, got {text}")
        return value

    return parse


def exit_on_input_error(main):
    """Wraps a script's main function: an `InputError` becomes one line on stderr and exit status 2, Ctrl-C one line and 130."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            said = str(error).encode(errors="backslashreplace").decode()  # file names need not be text
            print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            sys.exit(STOPPED)

    return wrapper


@contextlib.contextmanager
def report_write_errors(folder, advice):
    """Turns a failure to write into `folder` (full, forbidden, gone) into an `InputError` that ends in `advice`."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{folder} cannot be written ({reason}); {advice}.") from error


def write_json(path, content):
    """Writes JSON to a temporary name, then renames it, so that the file is whole or not there."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


@dataclasses.dataclass(frozen=True)
class Split:
    """The slices of one split, ordered by case, then by slice.

    Attributes:
        name: "train", "validate" or "test".
        images: uint8 (N, height, width).
        cases: int32 (N,), the person of each image.
        positions: int32 (N,), the slice number of each image: its place in the head, 0 the lowest.
    """

    name: str
    images: np.ndarray
    cases: np.ndarray
    positions: np.ndarray

    @property
    def num_people(self):
        """The number of different people."""
        return len(np.unique(self.cases))

    def spread(self, wanted):
        """Indices of up to `wanted` images, evenly spread."""
        return np.unique(np.linspace(0, len(self.images) - 1, wanted).astype(int))

    def take(self, indices):
        """The split of these images alone."""
        return Split(self.name, self.images[indices], self.cases[indices], self.positions[indices])


def find_data(data_dir=None):
    """Finds the folder of the slices: `data_dir`, else $OASIS_DIR, else ./keras_png_slices_data, else the demo cohort.

    Returns:
        (its path, whether it is the demo cohort).

    Raises:
        InputError: if a folder that was asked for does not exist.
    """
    for folder, origin in ((data_dir, "--data-dir"), (os.environ.get("OASIS_DIR"), "the environment variable OASIS_DIR")):
        if folder:
            if not Path(folder).is_dir():
                raise InputError(f"{origin} names {folder}, which is not a folder; "
                                 "give the one that holds keras_png_slices_train, _validate and _test.")
            return Path(folder), False
    default = Path("keras_png_slices_data")
    if default.is_dir():
        return default, False
    print(f"No OASIS data found (--data-dir, OASIS_DIR, ./{default}): using the demo cohort, which is simulated from one "
          "averaged template and is no evidence about patients.", flush=True)
    return make_demo_cohort(), True


def load_splits(data_dir, names=SPLITS, limit=None, cache_dir=None):
    """Reads splits from the PNG folders.

    Args:
        data_dir: folder that holds ``keras_png_slices_{train,validate,test}``.
        names: the splits to read.
        limit: keep only the first `limit` people of each split.
        cache_dir: folder to keep the decoded images in; from there the next start maps them into memory at once.

    Returns:
        A dict of `Split` by name. All images have one size, and no person is in two splits.

    Raises:
        InputError: if a folder is missing or empty, or a file is not a slice: see `list_slices` and `read_slice`.
    """
    listed = {name: list_slices(data_dir, name, limit) for name in names}
    owner = {}
    for name, files in listed.items():
        for case, _, path in files:
            if owner.setdefault(case, name) != name:
                raise InputError(f"Person case_{case:03d} is in both the {owner[case]} and the {name} split ({path}); "
                                 "keep each person in one split, or results on held-out people mean nothing.")
    first_path = listed[names[0]][0][2]
    size = read_slice(first_path).shape
    splits = {}
    for name, files in listed.items():
        paths = [path for *_, path in files]
        try:
            images = _read_cached(paths, size, first_path, name, cache_dir) if cache_dir else _read(paths, size, first_path, name)
        except MemoryError as error:
            raise InputError(f"The {len(files):,} images of the {name} split do not fit into memory; use fewer people with "
                             "--limit.") from error
        cases, positions = np.array([file[:2] for file in files], np.int32).T
        splits[name] = Split(name, images, cases, positions)
    return splits


def _read(paths, size, like, name, images=None):
    """Decodes files in parallel (Pillow lets go of Python's lock meanwhile) into uint8 (N, height, width)."""
    images = np.empty((len(paths), *size), np.uint8) if images is None else images
    chunks = np.array_split(np.arange(len(paths)), -(-len(paths) // 32))

    def read_chunk(indices):
        for index in indices:
            images[index] = read_slice(paths[index], size, like)
        return len(indices)

    with (concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
          tqdm(total=len(paths), desc=f"Reading {name}", unit=" images", leave=False, disable=None) as progress):
        for count in pool.map(read_chunk, chunks):
            progress.update(count)
    return images


def _read_cached(paths, size, like, name, cache_dir):
    """`_read`, from a memory-mapped .npy file if these very files were decoded into it before.

    Its name is a digest of their folder and of all their names, sizes and times of change: a changed file is another cache.
    """
    listing = [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]
    digest = hashlib.sha256(json.dumps([str(paths[0].parent.resolve()), size, listing]).encode()).hexdigest()
    file = Path(cache_dir) / f"slices-{digest[:32]}.npy"
    if not file.exists():
        with report_write_errors(cache_dir, "give another --cache-dir, or none"):
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f".{file.name}-{os.getpid()}")
            try:
                images = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (len(paths), *size))
                _read(paths, size, like, name, images)
                images.flush()
                unfinished.rename(file)
            finally:
                unfinished.unlink(missing_ok=True)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def list_slices(data_dir, name, limit=None):
    """Lists one split's files as (case, position, path), ordered by case, then position.

    Raises:
        InputError: if the folder is missing or empty, a PNG's name has no case and slice, or two files are one slice.
    """
    folder = Path(data_dir) / f"keras_png_slices_{name}"
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; the data folder must hold keras_png_slices_train, _validate and _test.")
    files = {}
    for path in folder.glob("*.png"):
        match = FILE_NAME.fullmatch(path.name)
        if not match:
            raise InputError(f"{path} has no case and slice in its name; expected case_NNN_slice_K.nii.png.")
        key = int(match[1]), int(match[2])
        if key[1] >= NUM_POSITIONS:
            raise InputError(f"{path} is slice {key[1]}; slices are numbered 0 to {NUM_POSITIONS - 1}.")
        if key in files:
            raise InputError(f"{path} and {files[key]} are the same case and slice; remove one of them.")
        files[key] = path
    if not files:
        raise InputError(f"{folder} holds no PNG files; put the slices case_NNN_slice_K.nii.png of the {name} split there.")
    people = sorted({case for case, _ in files})[:limit]
    return [(case, position, files[case, position]) for case, position in sorted(files) if case in set(people)]


def read_slice(path, size=None, like=None):
    """Reads one 8-bit grayscale PNG as uint8 (height, width).

    Args:
        path: the file.
        size: the (height, width) that it must have.
        like: the file whose size that is, for the message.

    Raises:
        InputError: if it is no PNG, is damaged, has colour, alpha or another depth, or has another size.
    """
    if path.exists() and not path.is_file():  # a pipe, say, would be waited for
        raise InputError(f"{path} is not a file; remove it.")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode != "L":
                raise InputError(f"{path} is a PNG of mode {image.mode}; convert it to 8-bit grayscale (mode L).")
            found = image.height, image.width
            if size is not None and found != tuple(size):
                raise InputError(f"{path} is {found[1]}x{found[0]} pixels but {like} is {size[1]}x{size[0]}; "
                                 "all slices must have one size.")
            if max(found) > LARGEST_SIDE:
                raise InputError(f"{path} is {found[1]}x{found[0]} pixels; the largest side allowed is {LARGEST_SIDE}.")
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        what = "is not a PNG image" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({error})"
        raise InputError(f"{path} {what}; replace the file or remove it.") from error


def normalise(images):
    """uint8 in [0, 255] -> float32 in [-1, 1], as ``x / 127.5 - 1``."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


def to_uint8(images):
    """The inverse of `normalise`, for NumPy: floats in [-1, 1] (clipped) -> uint8 in [0, 255]."""
    return np.round((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def image_batches(split, batch_size):
    """A split in its order, as batches of (float32 (B, height, width, 1) in [-1, 1], int32 (B,) positions)."""
    pairs = tf.data.Dataset.from_tensor_slices(np.arange(len(split.images))).batch(batch_size)
    return _with_options(pairs.map(_gather_images(split), num_parallel_calls=2).prefetch(2))


def training_batches(split, batch_size, seed, first_epoch=0):
    """An endless run of shuffled training epochs, each without its last short batch.

    The order depends on (`seed`, epoch) alone, so a resumed run that starts at `first_epoch` sees what an uninterrupted
    one would have seen.

    Returns:
        A dataset of (float32 (B, height, width, 1) in [-1, 1], int32 (B,) positions).
    """
    return _with_options(_shuffled_indices(len(split.images), batch_size, seed, first_epoch)
                         .map(_gather_images(split), num_parallel_calls=2).prefetch(2))


def code_batches(codes, positions, batch_size, seed=None, first_epoch=0):
    """Codes for the prior: shuffled without end like `training_batches`, or once in order if `seed` is None.

    Args:
        codes: int32 (N, h, w).
        positions: int32 (N,).

    Returns:
        A dataset of dicts ``{"codes": (B, h, w), "positions": (B,)}`` of int32.
    """
    with tf.device("CPU"):
        codes, positions = tf.constant(codes, tf.int32), tf.constant(positions, tf.int32)
    if seed is None:
        indices = tf.data.Dataset.range(len(codes)).batch(batch_size)
    else:
        indices = _shuffled_indices(len(codes), batch_size, seed, first_epoch)
    return _with_options(indices.map(lambda i: {"codes": tf.gather(codes, i), "positions": tf.gather(positions, i)},
                                     num_parallel_calls=2).prefetch(2))


def _shuffled_indices(num_items, batch_size, seed, first_epoch):
    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(num_items), [tf.constant(seed, tf.int64), epoch])
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)

    return tf.data.Dataset.counter(first_epoch).flat_map(one_epoch)


def _gather_images(split):
    # Captured on the host as uint8: a quarter of the memory of floats, and no copy to a GPU.
    with tf.device("CPU"):
        images, positions = tf.constant(split.images), tf.constant(split.positions)
    return lambda i: (normalise(tf.gather(images, i))[..., tf.newaxis], tf.gather(positions, i))


def _with_options(dataset):
    # TensorFlow 2.21: tearing down an autotuned iterator waits for the autotuner's next wake-up, up to tens of seconds.
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def fingerprint(splits):
    """A SHA-256 hex digest of the splits' pixels, cases and positions: equal data, equal digest."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for array in (splits[name].images, splits[name].cases, splits[name].positions):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def pixel_statistics(images):
    """(mean, variance) of uint8 images (N, H, W), as normalised to [-1, 1]; exact, without a float copy."""
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in images)
    levels = np.arange(256) / 127.5 - 1
    mean = float(counts @ levels / counts.sum())
    return mean, float(counts @ (levels - mean) ** 2 / counts.sum())


def empty_margin(images, multiple):
    """The width in pixels, rounded down to `multiple`, of the border that is black in every image uint8 (N, H, W)."""
    drawn = images.max(axis=0) > 0
    widths = []
    for axis in (0, 1):
        inked = np.flatnonzero(drawn.any(axis=1 - axis))
        widths += [inked[0], drawn.shape[axis] - 1 - inked[-1]] if inked.size else [0]
    return int(min(widths)) // multiple * multiple


def warn_of_lost_border(split, margin):
    """Prints a line if an image reaches into the border of `margin` pixels that the model paints black."""
    if empty_margin(split.images, 1) < margin:
        print(f"Note: some {split.name} images reach into the border of {margin} pixels that is black in all training images; "
              "what lies there cannot be reconstructed.")


# The demo cohort ------------------------------------------------------------------------------------------------------


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
            Image.fromarray(image).save(folder / f"keras_png_slices_{name}" / f"case_{case:03d}_slice_{position}.nii.png")

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


# From volumes to slices -----------------------------------------------------------------------------------------------


def find_oasis1(folder):
    """Lists the atlas-registered volumes of the OASIS-1 release, one per session.

    Looks for ``<session>/PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.hdr`` (brain only), else ``*_t88_gfc.hdr`` (with the skull).

    Returns:
        ([(person, path)], [reasons for what was skipped]); the person of session OAS1_0001_MR2 is OAS1_0001.
    """
    found, skipped = [], []
    for atlas in sorted(Path(folder).rglob("PROCESSED/MPRAGE/T88_111")):
        session = atlas.parents[2].name
        headers = sorted(atlas.glob("*_t88_masked_gfc.hdr")) or sorted(atlas.glob("*_t88_gfc.hdr"))
        if not headers:
            skipped.append(f"{session}: no *_t88_masked_gfc.hdr nor *_t88_gfc.hdr in {atlas}")
        else:
            found.append((re.sub(r"_MR\d+$", "", session), headers[0]))
    return found, skipped


def find_nifti(folder):
    """Lists the NIfTI volumes below a folder, as `find_oasis1`.

    The person is what a BIDS name (sub-NAME_...) or an OASIS name (OAS1_NNNN_...) says, else the whole name.
    """
    found = []
    for path in sorted((*Path(folder).rglob("*.nii"), *Path(folder).rglob("*.nii.gz"))):
        named = re.match(r"sub-[A-Za-z0-9]+|OAS\d_\d{4}", path.name)
        found.append((named[0] if named else path.name.removesuffix(".gz").removesuffix(".nii"), path))
    return found, []


def read_volume(path):
    """Reads a volume, turns it to RAS (x to the right, y to the front, z up) and resamples it to 1 mm.

    Returns:
        float32 (x, y, z).

    Raises:
        ValueError: if it is damaged, not of three dimensions, or without contrast.
    """
    import nibabel  # slow to import, and needed here alone
    from nibabel.processing import resample_to_output

    try:
        image = nibabel.squeeze_image(nibabel.load(path))
        if len(image.shape) != 3:
            raise ValueError(f"has {len(image.shape)} dimensions, not 3")
        image = nibabel.as_closest_canonical(image)
        if not np.allclose(image.header.get_zooms(), 1, atol=1e-3):
            image = resample_to_output(image, 1.0, order=1)
        volume = np.asarray(image.dataobj, np.float32)
    except Exception as error:  # a damaged volume may fail in any way
        raise ValueError(str(error).splitlines()[0] if str(error) else repr(error)) from error
    if not np.isfinite(volume).all() or np.ptp(volume) == 0:
        raise ValueError("holds no picture (constant, or not finite)")
    return volume


def axial_slices(volume):
    """Cuts a volume as `read_volume` gives it into the slices of the PNG set.

    32 slices 1.4 mm apart, the lowest 86 mm below the top of the head (of the brain, where that was cut out): in an average
    brain, from 8 mm below the anterior commissure upwards. Intensities are scaled from the volume's 1st percentile to the
    99.5th of what is brighter than that, and clipped.

    Returns:
        uint8 (32, 256, 256): front up, the head's left side on the left, zero-padded.

    Raises:
        ValueError: if the volume does not reach low enough, or what it shows is wider than 256 mm.
    """
    low = np.percentile(volume, 1)
    high = np.percentile(volume[volume > low], 99.5)
    scaled = ((volume - low) / (high - low)).clip(0, 1)
    # The top: the highest slice with a square centimetre of something a tenth as bright as the brightest.
    top = np.flatnonzero((scaled > 0.1).sum(axis=(0, 1)) >= 100)
    heights = np.round((top[-1] if top.size else 0) - 86 + SLICE_SPACING * np.arange(NUM_POSITIONS)).astype(int)
    if heights[0] < 0:
        raise ValueError(f"ends {-heights[0]} mm too high: 86 mm below the top of the head are needed")
    slices = scaled[:, ::-1, heights].transpose(2, 1, 0)
    for axis in (1, 2):
        surplus = slices.shape[axis] - 256
        if surplus > 0:
            before, kept = np.split(slices, [surplus // 2], axis)
            slices, after = np.split(kept, [256], axis)
            if max(before.max(initial=0), after.max(initial=0)) > 0.1:
                raise ValueError(f"shows more than 256 mm along {'y' if axis == 1 else 'x'}")
    widths = [(0, 0), *(((256 - length) // 2, (257 - length) // 2) for length in slices.shape[1:])]
    return np.pad(np.round(slices * 255).astype(np.uint8), widths)


def write_nifti(slices, path):
    """Writes axial slices, uint8 (N, height, width) as `axial_slices` cuts them, as one NIfTI volume.

    Its axes are RAS, its voxels 1 x 1 x 1.4 mm; the first slice lies 8 mm below the origin, whose height is roughly that of the
    anterior commissure.
    """
    import nibabel  # slow to import

    volume = slices[:, ::-1].transpose(2, 1, 0)
    affine = np.diag([1, 1, SLICE_SPACING, 1])
    affine[:3, 3] = -(volume.shape[0] - 1) / 2, -(volume.shape[1] - 1) / 2, -8
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)


def convert_volumes(found, skipped, output_dir, seed=0):
    """Writes volumes as the three PNG folders, split by person: 85, 10 and 5 % of them.

    Args:
        found: list of (person, path); all sessions of a person go to one split, each as a case of its own.
        skipped: reasons for what was left out before.
        output_dir: folder to make. Besides the splits it gets cases.csv: which case is which session.
        seed: of the split.

    Returns:
        (dict of sessions by split, the reasons for all that was skipped).

    Raises:
        InputError: if fewer than three people are left, or the folder cannot be made.
    """
    output_dir, skipped = Path(output_dir), list(skipped)
    if output_dir.exists():
        raise InputError(f"{output_dir} exists already; give another --output-dir.")
    with report_write_errors(output_dir, "give another --output-dir"):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
        try:
            rows = _write_sessions(unfinished, found, skipped)
            counts = _split_by_person(unfinished, rows, seed)
            unfinished.rename(output_dir)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return counts, skipped


def _write_sessions(folder, found, skipped):
    """Writes every usable session's slices as N.npy; returns the (person, source) of each, and adds to `skipped`."""
    rows = []
    for person, path in tqdm(found, "Converting", unit=" volumes", leave=False, disable=None):
        try:
            slices = axial_slices(read_volume(path))
        except ValueError as error:
            skipped.append(f"{path}: {error}")
            continue
        np.save(folder / f"{len(rows)}.npy", slices)
        rows.append((person, path))
    return rows


def _split_by_person(folder, rows, seed):
    people = sorted({person for person, _ in rows})
    if len(people) < 3:
        raise InputError(f"Only {len(people)} people have usable volumes; each of the three splits needs one.")
    order = np.random.default_rng(seed).permutation(len(people))
    test = max(1, round(0.05 * len(people)))
    validate = max(1, round(0.10 * len(people)))
    split_of = {people[index]: "test" if rank < test else "validate" if rank < test + validate else "train"
                for rank, index in enumerate(order)}
    table, case = [("case", "split", "person", "source")], 0
    counts = dict.fromkeys(SPLITS, 0)
    for name in SPLITS:
        (folder / f"keras_png_slices_{name}").mkdir()
        for index, (person, path) in enumerate(rows):
            if split_of[person] == name:
                case, counts[name] = case + 1, counts[name] + 1
                for position, image in enumerate(np.load(folder / f"{index}.npy", allow_pickle=False)):
                    Image.fromarray(image).save(folder / f"keras_png_slices_{name}" / f"case_{case:03d}_slice_{position}.nii.png")
                table.append((case, name, person, path))
                (folder / f"{index}.npy").unlink()
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows(table)
    return counts


@exit_on_input_error
def main(argv=None):
    """Converts volumes; or prints a table of the splits and writes a contact sheet."""
    parser = ArgumentParser(description="Show what the data folder holds, or make one from volumes.")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the PNG splits (default: see README)")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--from-oasis1", metavar="DIR", help="convert the OASIS-1 release: the folder that holds its discs")
    sources.add_argument("--from-nifti", metavar="DIR", help="convert the NIfTI volumes in this folder")
    parser.add_argument("--output-dir", metavar="DIR", help="folder to make for the converted slices")
    parser.add_argument("--seed", type=number(int, 0, SEEDS), default=0, metavar="S", help="of the split by person (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.from_oasis1 or arguments.from_nifti:
        return report_conversion(arguments)
    data_dir, _ = find_data(arguments.data_dir)
    show(load_splits(data_dir))


def report_conversion(arguments):
    """Runs the conversion that the command line asks for, and says what was skipped and why."""
    source = arguments.from_oasis1 or arguments.from_nifti
    if not Path(source).is_dir():
        raise InputError(f"{source} is not a folder; give the one that holds the volumes.")
    if not arguments.output_dir:
        raise InputError("--output-dir is missing: the folder to make for the slices.")
    found, skipped = (find_oasis1 if arguments.from_oasis1 else find_nifti)(source)
    if not found:
        raise InputError(f"{source} holds no "
                         f"{'PROCESSED/MPRAGE/T88_111 volumes' if arguments.from_oasis1 else '.nii or .nii.gz files'}.")
    counts, skipped = convert_volumes(found, skipped, arguments.output_dir, arguments.seed)
    for reason in skipped:
        print(f"Skipped {reason}")
    print(f"Converted {sum(counts.values())} sessions into {arguments.output_dir} "
          f"({', '.join(f'{count} {name}' for name, count in counts.items())}), skipped {len(skipped)}.")


def show(splits):
    """Prints a table of the splits and writes runs/contact_sheet.png."""
    print(f"{'split':10}{'images':>8}{'people':>8}{'size':>10}{'mean':>8}{'variance':>10}   (mean, variance in [-1, 1])")
    for name, split in splits.items():
        height, width = split.images.shape[1:]
        mean, variance = pixel_statistics(split.images)
        print(f"{name:10}{len(split.images):8,}{split.num_people:8}{f'{width}x{height}':>10}{mean:8.3f}{variance:10.4f}")
    rows = [split.images[split.cases == case][np.linspace(0, (split.cases == case).sum() - 1, 8).astype(int)]
            for split in splits.values() for case in np.unique(split.cases)[:2]]
    sheet = util.montage(np.concatenate(rows), grid_shape=(len(rows), 8))
    path = Path("runs/contact_sheet.png")
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(path)
    print(f"{path}: a row per person, two of each split ({', '.join(splits)}), slices from the lowest to the highest.")


if __name__ == "__main__":
    main()
