"""The PNG slices of a data set: their names, and their pixels, in memory or in a cache mapped into memory."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import json
from pathlib import Path
import re

import numpy as np
from tqdm import tqdm

from support.cli import UserError
from support.files import unfinished, write_json
from support.images import pad_to_square, read_slice, turn
from support.volumes import SliceGeometry

FOLDERS = "keras_png_slices_train, _validate and _test"
SPLITS = ("train", "validate", "test")
FILE_NAME = re.compile(r"case_(\d{1,9})_slice_(\d{1,9})(?:\.nii)?\.png", re.IGNORECASE)
MAX_POSITIONS = 256  # slices of a head
GEOMETRY_FILE = "geometry.json"  # in the folder of a data set that was made here
BLOCK = 256  # files at a time


def slice_file(folder, split, case, position):
    """The path of one slice below a data folder: keras_png_slices_SPLIT/case_NNN_slice_K.nii.png."""
    return Path(folder) / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_{position}.nii.png"


def write_geometry(folder, geometry):
    """Writes geometry.json: where the slices of a new data set lie, front up, by their `SliceGeometry`."""
    write_json(Path(folder) / GEOMETRY_FILE, {"front": "up", **dataclasses.asdict(geometry)})


def read_geometry(folder):
    """What `write_geometry` wrote: (the side of the front, a `SliceGeometry`), or (None, None)."""
    path = Path(folder) / GEOMETRY_FILE
    if not path.is_file():
        return None, None
    try:
        content = json.loads(path.read_text())
        return content.pop("front"), SliceGeometry(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not say where slices lie; make the folder again, or remove the file: "
                        "then it is measured.") from error


def list_slices(data_dir, name, limit):
    """One split's files, [(case, position, path)], ordered by case, then position."""
    folder = Path(data_dir) / f"keras_png_slices_{name}"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; the data folder must hold {FOLDERS}.")
    files = {}
    for path in folder.iterdir():
        if path.suffix.lower() != ".png" or path.name.startswith("."):  # macOS writes a ._NAME beside each
            continue
        match = FILE_NAME.fullmatch(path.name)
        if not match or int(match[2]) >= MAX_POSITIONS:
            raise UserError(f"{path} is not named case_NNN_slice_K.nii.png, K from 0 to {MAX_POSITIONS - 1}.")
        key = int(match[1]), int(match[2])
        if key in files:
            raise UserError(f"{path} and {files[key]} are the same case and slice; remove one of them.")
        files[key] = path
    if not files:
        raise UserError(f"{folder} holds no PNG files; put the slices case_NNN_slice_K.nii.png there.")
    people = set(sorted({case for case, _ in files})[:limit])
    return [(case, position, files[case, position]) for case, position in sorted(files) if case in people]


def read_images(paths, name, first_path, front=None, cache_dir=None):
    """Decodes the N PNG files of a split, in one folder, to uint8 (N, side, side).

    They must have the size of the file `first_path`; they are padded with black to the least multiple of 32
    pixels, which the networks need, and turned front up if `front` is the side of it (see `images.turn`). In
    `cache_dir` they are kept: the next start maps them into memory."""
    size = read_slice(first_path).shape
    side = -(-max(size) // 32) * 32
    shape = len(paths), side, side
    def decode(path):
        image = pad_to_square(read_slice(path, size, first_path)[np.newaxis], side)
        return np.ascontiguousarray(turn(image, front or "up")[0])
    images = _in_parallel(decode, paths, f"Reading {name}")
    if not cache_dir:
        return np.fromiter(images, np.dtype((np.uint8, shape[1:])), len(paths))
    # Named by a digest of the files' folder, names, sizes and times of change: no cache is ever stale.
    listing = [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]
    key = json.dumps([str(paths[0].parent.resolve()), shape[1:], front, listing])
    file = Path(cache_dir) / f"slices-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        pass  # or damaged: it is ours, by its name, and written anew
    file.parent.mkdir(parents=True, exist_ok=True)
    # One name for whatever is unfinished: so what any killed process left is found and removed.
    with unfinished(file.parent / "slices") as new:
        with open(new, "wb") as stream:  # through a map, a full disk would kill the process (SIGBUS)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for image in images:
                stream.write(image)
        new.replace(file)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _in_parallel(decode, paths, title):
    """Yields what `decode` makes of each path; Pillow lets go of Python's lock meanwhile."""
    with ThreadPoolExecutor() as pool:
        # In blocks: all at once, decoded images would wait in memory for a slow disk.
        images = (image for start in range(0, len(paths), BLOCK)
                  for image in pool.map(decode, paths[start:start + BLOCK]))
        yield from tqdm(images, title, len(paths), unit=" images", leave=False, disable=None)
