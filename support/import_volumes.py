"""Volumes of a study into the PNG folders: which are T1-weighted heads, and the split by person."""

from collections import Counter
import csv
import dataclasses
import os
from pathlib import Path
import re

import numpy as np
from PIL import Image
from tqdm import tqdm

from support import volumes
from support.cli import UserError
from support.files import whole_folder
from support.images import FOREGROUND
from support.slices import slice_file, SPLITS, write_geometry
from support.template import make_splits, share_of_people
from support.whose_head import ENDING, OTHER_NAMES, people_of, T1_NAMES

CONTRAST = re.compile(rf"(?<![a-z0-9])(?:({T1_NAMES})|{OTHER_NAMES})(?![a-z0-9])", re.IGNORECASE)


def _walk(root):
    """Yields each folder from `root` down once, also through links: (Path, sorted names of visible files)."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        # No pipes, which would be waited for; but broken links, so that it is told that they are.
        yield Path(folder), sorted(name for name in files
                                   if not name.startswith(".") and not Path(folder, name).is_fifo())


def find_oasis1(folder):
    """The atlas-registered volumes of OASIS-1, of the brain alone, as `find_nifti`."""
    sessions, reasons = [], []
    for atlas, files in _walk(folder):
        if atlas.parts[-3:] == ("PROCESSED", "MPRAGE", "T88_111"):
            name = atlas.parents[2].name
            headers = [file for file in files if file.endswith("_t88_masked_gfc.hdr")]
            if headers:
                sessions.append((re.sub(r"_MR\d+$", "", name), atlas / headers[0]))
            else:
                reasons.append(f"{name}: no *_t88_masked_gfc.hdr in {atlas}")
    return sessions, reasons


def find_nifti(folder, person_pattern=None):
    """The T1-weighted volumes below a folder: ([(person, path)], a text for each file that is left out)."""
    folder = Path(folder)
    paths = [(place / name).relative_to(folder) for place, names in _walk(folder) for name in names
             if name.lower().endswith((".nii", ".nii.gz", ".mgz", ".hdr"))]
    why_not = {path: _why_no_head(path) for path in paths}
    contrasts = {path: _contrast(path.name) for path in paths if not why_not[path]}
    if any(contrasts.values()):  # they are all T1
        why_not |= {path: "is not named T1, as others are" for path in contrasts if not contrasts[path]}
    heads = [path for path in paths if not why_not[path]]
    people = dict(zip(heads, people_of([path.as_posix() for path in heads], person_pattern)))
    why_not |= {path: "has no person that --person-pattern finds" for path in heads if not people[path]}
    reasons = [f"{folder / path}: {reason}" for path, reason in why_not.items() if reason]
    return [(person, folder / path) for path, person in people.items() if person], reasons


def _contrast(*names):
    """Of the first name that tells a contrast the last word that does: its match, group 1 if T1; or None."""
    # The last: "PD_017_T1" is a patient of that name.
    return next((words[-1] for name in names if (words := list(CONTRAST.finditer(name)))), None)


def _why_no_head(path):
    """Why a path cannot be that of a T1-weighted picture of a head; None if it can."""
    name = ENDING.sub("", path.name)
    if "derivatives" in path.parts[:-1]:
        return "lies in a derivatives folder"
    if re.search(r"(mask|seg|labels?)$", name, re.IGNORECASE):
        return "is a mask or a segmentation by its name"
    if re.search(r"_ce-[a-z]", name, re.IGNORECASE):
        return "was taken with a contrast agent by its name"
    contrast = _contrast(*reversed(path.parts))
    return None if contrast is None or contrast[1] else f"is {contrast[0]} by its name, not T1"


def convert_volumes(sessions, reasons, output_dir, seed=0, whole_brain=False, center=(0.0, 0.0)):
    """Makes a folder of PNG splits of the volumes of [(person, path)]: {split: (volumes, people)}.

    Whole brains lose the ends that are black in everyone. `reasons` gets why a volume cannot be used; for
    `center` see `volumes.axial_slices`. A `UserError` if fewer than three people are left."""
    people = sorted({person for person, _ in sessions})
    examples = ", ".join(people[:3] + ["..."] * (len(people) > 3))
    print(f"Found {len(sessions):,} sessions of {len(people):,} people ({examples}).", flush=True)
    rows, first, areas = [], None, 0
    with whole_folder(output_dir, "--output-dir") as unfinished:
        for person, path in tqdm(sessions, "Converting", unit=" volumes", leave=False, disable=None):
            try:
                slices, geometry, *_ = volumes.read_slices(path, *volumes.STACKS[whole_brain], center)
            except volumes.VolumeError as error:
                reasons.append(f"{path}: {error}")
                continue
            first = first or (slices.shape, geometry)
            if (slices.shape, geometry) != first:  # some are heads that predict.py wrote
                reasons.append(f"{path}: has other slices than the first volume ({slices.shape}, {geometry})")
                continue
            areas = np.maximum(areas, (slices > FOREGROUND * 255).sum(axis=(1, 2)) * geometry.pixel_size ** 2)
            np.save(unfinished / f"{len(rows)}.npy", slices)
            rows.append((person, path))
        full = np.flatnonzero(np.atleast_1d(areas) >= (100 if whole_brain else 0))  # mm2 of head in anyone
        start, stop = (int(full[0]), int(full[-1]) + 1) if len(full) else (0, 0)
        counts = _split_by_person(unfinished, rows, seed, slice(start, stop))
        _, geometry = first
        geometry = dataclasses.replace(geometry, lowest=geometry.lowest + geometry.spacing * start)
        if geometry.axes_known:
            write_geometry(unfinished, geometry)
        return counts


def _split_by_person(folder, rows, seed, part=slice(None)):
    """Writes PNGs, of a part of the slices, and cases.csv from I.npy of row I: {split: (volumes, people)}."""
    people = sorted({person for person, _ in rows})
    if len(people) < 3:
        raise UserError(f"Only {len(people)} people have usable volumes; each of the three splits needs one. "
                        "If there are more, tell them apart with --person-pattern.")
    num_test, num_validate = share_of_people(len(people), 0.05), share_of_people(len(people), 0.10)
    splits = num_test * ["test"] + num_validate * ["validate"] + len(people) * ["train"]
    order = np.random.default_rng(seed).permutation(len(people))
    split_of = {people[index]: name for index, name in zip(order, splits)}  # which ends with the people
    num_sessions, num_people = Counter(split_of[person] for person, _ in rows), Counter(split_of.values())
    ordered = sorted(range(len(rows)), key=lambda index: SPLITS.index(split_of[rows[index][0]]))
    table = [("case", "split", "person", "source")]
    for (name, case), index in zip(make_splits(folder, num_sessions), ordered):
        for position, image in enumerate(np.load(folder / f"{index}.npy", allow_pickle=False)[part]):
            Image.fromarray(image).save(slice_file(folder, name, case, position))
        (folder / f"{index}.npy").unlink()
        table.append((case, name, *rows[index]))
    # A file name need not be text: what is none is written as an escape.
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows(table)
    return {name: (num_sessions[name], num_people[name]) for name in SPLITS}
