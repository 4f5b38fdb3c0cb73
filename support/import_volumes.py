"""Volumes of a study into the PNG folders: which are T1-weighted heads, and the split by person."""

import csv
import glob
import os
from pathlib import Path
import re

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.cli import UserError
from support.files import whole_folder
from support.template import share_of_people
from support.volumes import is_dicom, read_slices, slice_file, SPLITS, VOLUME_ENDINGS, VolumeError
from support.whose_head import ENDING, OTHER_NAMES, people_of, T1_NAMES

CONTRAST = re.compile(rf"(?<![a-z0-9])(?:({T1_NAMES})|{OTHER_NAMES})(?![a-z0-9])", re.IGNORECASE)


def _walk(root):
    """Yields each folder from `root` down once, also through links: (Path, sorted names of files, hidden ones
    left out)."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), sorted(name for name in files if not name.startswith("."))


def find_oasis1(folder):
    """Lists the atlas-registered volumes of OASIS-1, one per session: the brain alone, else with its skull.

    Returns:
        (sessions, a list of (person, path); reasons, a list of texts, for what was left out).
    """
    sessions, reasons = [], []
    for atlas, files in _walk(folder):
        if atlas.parts[-3:] != ("PROCESSED", "MPRAGE", "T88_111"):
            continue
        name = atlas.parents[2].name
        headers = ([file for file in files if file.endswith("_t88_masked_gfc.hdr")]
                   or [file for file in files if file.endswith("_t88_gfc.hdr")])
        if not headers:
            reasons.append(f"{name}: no *_t88_masked_gfc.hdr nor *_t88_gfc.hdr in {atlas}")
        else:
            sessions.append((re.sub(r"_MR\d+$", "", name), atlas / headers[0]))
    return sessions, reasons


def find_nifti(folder, pattern=None, person_pattern=None):
    """Lists the T1-weighted volumes (.nii, .nii.gz, .hdr with .img, .mgz) below a folder, as `find_oasis1`.

    Left out are folders named derivatives; masks, segmentations and other contrasts by name (`read_slices`
    refuses the masks and segmentations that are not named so); and, where some files are named T1, those that
    are not.

    Args:
        folder: where to look.
        pattern: a glob relative to it, which decides in place of these rules.
        person_pattern: a regular expression whose one group, found in the path below the folder, is the
            person; by default see `whose_head.people_of`.

    Raises:
        UserError: if one of the patterns cannot be used, or it cannot be told whose the volumes are.
    """
    folder = Path(folder)
    paths, reasons = _list_volumes(folder)
    matches = None if pattern is None else _glob(folder, pattern)
    has_t1 = any(_is_t1(path) and not _why_no_head(path) for path in paths)
    heads = []
    for path in paths:
        if matches is not None:
            reason = None if path in matches else "does not match --pattern"
        else:
            reason = _why_no_head(path)
            if reason is None and has_t1 and not _is_t1(path):
                reason = "is not named T1, as others here are"
        if reason:
            reasons.append(f"{folder / path}: {reason}")
        else:
            heads.append(path)
    people = people_of([path.as_posix() for path in heads], person_pattern)
    sessions = [(person, folder / path) for person, path in zip(people, heads)]
    reasons += [f"{path}: has no person that --person-pattern finds" for name, path in sessions if not name]
    return [session for session in sessions if session[0]], reasons


def _list_volumes(folder):
    """(paths of volumes relative to `folder`, reasons why others cannot be such)."""
    paths, reasons = [], []
    for place, names in _walk(folder):
        files = [place / name for name in names]
        for path in files:
            if path.name.lower().endswith(VOLUME_ENDINGS) and path.suffix.lower() not in (".img", ".dcm"):
                if path.exists() and not path.is_file():  # reading it would wait; broken links are told later
                    reasons.append(f"{path}: is a pipe or a device, not a file")
                else:
                    paths.append(path.relative_to(folder))
        if any(is_dicom(path) for path in files if path.suffix.lower() in (".dcm", ".ima", "")):
            reasons.append(f"{place}: holds DICOM files; convert them to NIfTI with dcm2niix")
    return paths, reasons


def _glob(folder, pattern):
    """The paths relative to `folder` that a glob matches, a set."""
    if not pattern or os.path.isabs(pattern):
        raise UserError(f"--pattern {pattern!r} cannot be used; give one relative to the folder, like "
                        "'**/*_T1w.nii.gz'.")
    return set(map(Path, glob.glob(pattern, root_dir=folder, recursive=True)))


def _stem(path):
    """A volume's name without .nii and the like."""
    return ENDING.sub("", path.name)


def _contrast(name):
    """The match of the last word of a name that tells the contrast, with a group 1 if that is T1; or None.

    Where there are several, the last counts: "PD_017_T1" is a patient of that name.
    """
    matches = list(CONTRAST.finditer(name))
    return matches[-1] if matches else None


def _is_t1(path):
    contrast = _contrast(_stem(path))
    return contrast is not None and contrast[1] is not None


def _why_no_head(path):
    """Why a path cannot be that of a T1-weighted picture of a head; None if it can."""
    name = _stem(path)
    if "derivatives" in path.parts[:-1]:
        return "lies in a derivatives folder"
    if re.search(r"(mask|seg|labels?)$", name, re.IGNORECASE):
        return "is a mask or a segmentation by its name"
    if re.search(r"_ce-[a-z]", name, re.IGNORECASE):
        return "was taken with a contrast agent by its name"
    for part in (name, *reversed(path.parts[:-1])):  # the file's own name before those of its folders
        contrast = _contrast(part)
        if contrast:
            return None if contrast[1] else f"is {contrast[0]} by its name, not T1"
    return None


def convert_volumes(sessions, reasons, output_dir, seed=0):
    """Prints how many volumes and people there are, then writes the PNG folders: 85, 10 and 5 % of the
    people.

    Args:
        sessions: list of (person, path); all sessions of a person go to one split, each as a case of its own.
        reasons: a list of texts, to which is added why a session cannot be used.
        output_dir: folder to make. Besides the splits it gets cases.csv: which case is which session of which
            person.
        seed: of the split.

    Returns:
        ({split: (number of sessions, of people)}, notes on the volumes, a list of texts).

    Raises:
        UserError: if fewer than three people are left, or the folder exists.
    """
    people = sorted({person for person, _ in sessions})
    examples = ", ".join([*people[:3], *(["..."] if len(people) > 3 else [])])
    print(f"Found {len(sessions):,} sessions of {len(people):,} people ({examples}).", flush=True)
    with whole_folder(output_dir, "--output-dir") as unfinished:
        rows, notes = _write_sessions(unfinished, sessions, reasons)
        counts = _split_by_person(unfinished, rows, seed)
    return counts, notes


def _write_sessions(folder, sessions, reasons):
    """Writes each session's slices as N.npy, or adds to `reasons` why not: ([(person, path)], notes)."""
    rows, notes, size = [], [], None
    for person, path in tqdm(sessions, "Converting", unit=" volumes", leave=False, disable=None):
        try:
            slices, remarks = read_slices(path)
        except VolumeError as error:
            reasons.append(f"{path}: {error}")
            continue
        (height, width), size = slices.shape[1:], size or slices.shape[1:]
        if (height, width) != size:
            first = f"{size[1]}x{size[0]}"
            reasons.append(f"{path}: has slices of {width}x{height} pixels, the first one {first}")
            continue
        notes += [f"{path}: {remark}" for remark in remarks]
        np.save(folder / f"{len(rows)}.npy", slices)
        rows.append((person, path))
    return rows, notes


def _split_by_person(folder, rows, seed):
    """Writes PNG folders and cases.csv from N.npy of (person, path) N: {split: (sessions, people)}."""
    people = sorted({person for person, _ in rows})
    if len(people) < 3:
        raise UserError(f"Only {len(people)} people have usable volumes; each of the three splits needs one. "
                        "If there are more, tell them apart with --person-pattern.")
    order = np.random.default_rng(seed).permutation(len(people))
    test, validate = share_of_people(len(people), 0.05), share_of_people(len(people), 0.10)
    split_of = {people[index]: "test" if rank < test else "validate" if rank < test + validate else "train"
                for rank, index in enumerate(order)}
    table, case, counts = [("case", "split", "person", "source")], 0, {}
    for name in SPLITS:
        (folder / f"keras_png_slices_{name}").mkdir()
        members = [(index, *row) for index, row in enumerate(rows) if split_of[row[0]] == name]
        for index, person, path in members:
            case += 1
            for position, image in enumerate(np.load(folder / f"{index}.npy", allow_pickle=False)):
                Image.fromarray(image).save(slice_file(folder, name, case, position))
            table.append((case, name, _as_utf8(person), _as_utf8(path)))
            (folder / f"{index}.npy").unlink()
        counts[name] = len(members), len({person for _, person, _ in members})
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    return counts


def _as_utf8(name):
    """A file's name as text, whatever the locale; bytes that are no UTF-8 as backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
