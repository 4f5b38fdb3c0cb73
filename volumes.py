"""Whole heads and the slices of them: the OASIS-1 release, NIfTI volumes in and out, and the simulated demo cohort.

All end as the same three folders of PNG slices, which `dataset.py` reads.
"""

import concurrent.futures
import csv
import os
from pathlib import Path
import re
import shutil
import tempfile

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from cli import InputError, report_write_errors

SPLITS = ("train", "validate", "test")
NUM_POSITIONS = 32  # axial slices per person
SLICE_SPACING = 1.4  # mm between the slices that are simulated or cut from volumes
MOST_LABELS = 128  # different values of a segmentation; FreeSurfer's of cortex and nuclei has 113, a picture hundreds
FILE_NAME = re.compile(r"case_(\d{1,9})_slice_(\d{1,9})(?:\.nii)?\.png")
DEMO_VERSION = 1  # part of the cache folder's name: raise it whenever the simulation changes
DEMO_FIRST_CASE = {"train": 1, "validate": 402, "test": 441}  # the case numbers that OASIS gives the splits
DEMO_PEOPLE = {"train": 20, "validate": 5, "test": 5}


def slice_file(folder, split, case, position):
    """The path of one slice below a data folder: keras_png_slices_SPLIT/case_NNN_slice_K.nii.png."""
    return Path(folder) / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_{position}.nii.png"


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


def find_nifti(folder, pattern=None):
    """Lists the T1-weighted NIfTI volumes below a folder, as `find_oasis1`.

    Left out are folders named derivatives, masks and segmentations by name (`read_volume` refuses the others) and, where some
    files have the BIDS suffix T1w, those that have not. The person is what a BIDS name (sub-NAME_...) or an OASIS name
    (OAS1_NNNN_...) says, else the whole name.

    Args:
        folder: where to look.
        pattern: a glob relative to it, which decides in place of these rules.

    Raises:
        InputError: if there can be no such pattern.
    """
    folder = Path(folder)
    names = {path: path.name.removesuffix(".gz").removesuffix(".nii")
             for path in sorted((*folder.rglob("*.nii"), *folder.rglob("*.nii.gz")))}
    if pattern is None:
        reasons = {path: _why_no_head(path.relative_to(folder), name) for path, name in names.items()}
        some_t1w = any(name.endswith("_T1w") and not reasons[path] for path, name in names.items())
    else:
        try:
            matching = set(folder.glob(pattern))
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"--pattern {pattern!r} cannot be used ({error}); give one like '**/*_T1w.nii.gz'.") from error
        reasons = {path: None if path in matching else "does not match --pattern" for path in names}
        some_t1w = False
    found, skipped = [], []
    for path, name in names.items():
        reason = reasons[path] or ("is not named T1w, as others here are" if some_t1w and not name.endswith("_T1w") else None)
        if reason:
            skipped.append(f"{path}: {reason}")
        else:
            named = re.match(r"sub-[A-Za-z0-9]+|OAS\d_\d{4}", path.name)
            found.append((named[0] if named else name, path))
    return found, skipped


def _why_no_head(path, name):
    """Why a file is no picture of a head, by its path below the folder of volumes and its name; None if it may be one."""
    if "derivatives" in path.parts[:-1]:
        return "lies in a derivatives folder"
    if re.search(r"(mask|seg|labels?)$", name, re.IGNORECASE):
        return "is a mask or a segmentation by its name"
    return None


def read_volume(path):
    """Reads a volume, turns it to RAS (x to the right, y to the front, z up) and resamples it to 1 mm.

    Returns:
        float32 (x, y, z).

    Raises:
        ValueError: if it is damaged, not of three dimensions, without contrast, or a mask or another volume of labels.
    """
    import nibabel  # slow to import, and needed here alone
    from nibabel.processing import resample_to_output

    try:
        image = nibabel.squeeze_image(nibabel.load(path))
        if len(image.shape) != 3:
            raise ValueError(f"has {len(image.shape)} dimensions, not 3")
        values = np.unique(image.dataobj)
        if 1 < len(values) <= MOST_LABELS and (values == np.round(values)).all():
            raise ValueError(f"holds labels, not a picture ({len(values)} different whole numbers)")
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
    if not (volume > low).any():
        raise ValueError("holds no picture (nearly constant)")
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
    unfinished = path.with_name(f".{path.name}")
    nibabel.save(nibabel.Nifti1Image(volume, affine), unfinished)
    unfinished.replace(path)


def convert_volumes(found, skipped, output_dir, seed=0):
    """Writes volumes as the three PNG folders, split by person: 85, 10 and 5 % of them.

    Args:
        found: list of (person, path); all sessions of a person go to one split, each as a case of its own.
        skipped: reasons for what was left out before; those for what cannot be used are added to it.
        output_dir: folder to make. Besides the splits it gets cases.csv: which case is which session.
        seed: of the split.

    Returns:
        The number of sessions by split.

    Raises:
        InputError: if fewer than three people are left, or the folder cannot be made.
    """
    output_dir = Path(output_dir)
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
    return counts


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
                    Image.fromarray(image).save(slice_file(folder, name, case, position))
                table.append((case, name, person, path))
                (folder / f"{index}.npy").unlink()
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows(table)
    return counts
