"""One's own images: PNGs and volumes of any size, brought to what a run's models take."""

import itertools
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from support import slices, volumes
from support.cli import UserError
from support.images import fit_to_square, read_own_png, turn


class OwnFile(NamedTuple):
    """What a file holds."""
    path: str
    name: str  # of what is written of the file; no other file has it
    titles: list  # N names, of what is written of each image
    images: np.ndarray  # uint8 (N, size, size)
    positions: list  # N slice positions; N times None if they are unknown, or training people have none there
    cut: volumes.Cut | None = None  # of a volume, whose slices `used` are the images
    used: np.ndarray | None = None  # bool (slices of the cut,)


def read_own_files(paths, run, size, slice_positions):
    """Reads PNGs and volumes as `OwnFile`s, images of `size` x `size`, and prints what was done to each.

    Volumes are cut where a `runs.Run` has slices; PNGs with names like its data's are turned like these."""
    files, names = [], set()
    for path in map(Path, paths):
        stem = re.sub(r"(\.nii)?\.png$|\.nii(\.gz)?$|\.(mgz|hdr|img)$", "", path.name, flags=re.IGNORECASE)
        if not path.is_file():
            raise UserError(f"{path} is not a file; give PNG images or NIfTI volumes.")
        if path.name.lower().endswith(volumes.VOLUME_ENDINGS):
            images, positions, notes, *way_back = _read_volume(path, run, slice_positions)
            images, changes = fit_to_square(images, size, is_volume=True)
        else:
            image, notes = read_own_png(path)
            images, changes = fit_to_square(image[np.newaxis], size)
            positions, way_back, front = [None], [], run.config["data"]["front"]
            if match := slices.FILE_NAME.fullmatch(path.name):
                positions = [int(match[2]) if int(match[2]) in slice_positions else None]
                if front not in (None, "up"):
                    images = turn(images, front)  # after they are padded, as in training
                    changes.append("turned front up, as the slices of the run's data")
        for number in itertools.count(1):
            name = stem if number == 1 else f"{stem}_{number}"
            numbers = range(len(images)) if None in positions else positions
            titles = [f"{name}_slice_{position}" for position in numbers] if len(images) > 1 else [name]
            if names.isdisjoint({name, *titles}):
                break
        names |= {name, *titles}
        print(f"{path}: {', '.join([*notes, *changes]) or 'taken as it is'}.")
        files.append(OwnFile(str(path), name, titles, images, positions, *way_back))
    return files


def _read_volume(path, run, slice_positions):
    """(Slices where training people have some; their positions; what was done; the `Cut`; which they are)."""
    try:
        cut = volumes.read_slices(path, run.geometry, run.num_positions, run.center)
    except volumes.VolumeError as error:
        raise UserError(f"{path} cannot be used as a volume: it {error}.") from error
    count, notes = len(cut.slices), []
    if run.config["data"]["front"] is None:
        notes.append("which side is the front in the run's own slices is unknown: they may lie otherwise")
    # Those of a head that this run sampled, or of any other volume
    for positions in (volumes.regular_positions(slice_positions), range(run.num_positions)):
        heights = run.geometry.lowest + run.geometry.spacing * np.array(positions)
        if count == len(positions) and np.allclose(cut.geometry.heights(count), heights, atol=1):
            used = np.isin(positions, slice_positions)
            known = np.array(positions)[used].tolist()
            return cut.slices[used], known, [f"{len(known)} axial slices", *notes], cut, used
    # A head that another run sampled, with other slices
    notes.insert(0, f"{count} axial slices of unknown position")
    return cut.slices, [None] * count, notes, cut, np.full(count, True)
