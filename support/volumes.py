"""Whole heads and the slices of them: the OASIS-1 release, and NIfTI volumes in and out.

All end as the same three folders of PNG slices, which `dataset.py` reads.
"""

import csv
import dataclasses
from pathlib import Path
import re
import shutil
import tempfile

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.cli import InputError, report_write_errors

SPLITS = ("train", "validate", "test")
NUM_POSITIONS = 32  # axial slices per person
SLICE_SPACING = 1.4  # mm between the slices that are simulated or cut from volumes
FRAME_WIDTH = 256  # mm: of the frame of all slices, so that a pixel is 256 / side mm
MOST_LABELS = 128  # different values of a segmentation; FreeSurfer's of cortex and nuclei has 113, a picture hundreds
FILE_NAME = re.compile(r"case_(\d{1,9})_slice_(\d{1,9})(?:\.nii)?\.png")


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where the slices of a data set lie, in millimetres.

    Attributes:
        pixel_size: of the slices' square pixels.
        spacing: between neighbouring slices.
        lowest: height of slice 0 above the anterior commissure; negative below it.
        axes_known: whether front is known to be up, as measured or stated. If not, nothing is claimed of the axes.
    """

    pixel_size: float = 1.0
    spacing: float = SLICE_SPACING
    lowest: float = -8.0
    axes_known: bool = True


def slice_file(folder, split, case, position):
    """The path of one slice below a data folder: keras_png_slices_SPLIT/case_NNN_slice_K.nii.png."""
    return Path(folder) / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_{position}.nii.png"


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
