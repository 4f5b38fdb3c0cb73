"""Volumes of a study into the PNG folders: which files are T1-weighted heads, whose they are, and the split by person."""

import collections
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
from support.volumes import is_dicom, read_slices, slice_file, SPLITS, VOLUME_ENDINGS

PERSON_NAMES = tuple(map(re.compile, (r"(?<!\d)\d{3}_S_\d{4}(?!\d)", r"IXI\d{3}(?!\d)", r"OAS(?:\d_\d{4}|\d{5})(?!\d)",
                                      r"(?<![A-Za-z0-9])sub-[A-Za-z0-9]+")))
T1_NAMES = r"t1|t1w|t1n|unit1|mp-?rage|mpr|spgr|fspgr"
OTHER_NAMES = (r"t2[a-z]*|t1(?:ce|c|gd|post|km|map|rho)|[a-z0-9]*flair|pdw?|dwi|dti|adc|bold|sbref|epi|fmri|asl|cbf|swi|mra|tof"
               r"|angio|pet|inv-?\d|phase(?:diff|\d)?|magnitude\d?|fieldmap|localizer|scout")
CONTRAST = re.compile(rf"(?<![a-z0-9])(?:({T1_NAMES})|{OTHER_NAMES})(?![a-z0-9])", re.IGNORECASE)


def _walk(root):
    """Yields each folder from `root` down as (Path, names of its files), sorted.

    Links to folders are followed, each real folder is visited once, and hidden files (such as the ._* of macOS) are left out.
    """
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
    """Lists the atlas-registered volumes of the OASIS-1 release, one per session.

    Looks for ``<session>/PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.hdr`` (brain only), else ``*_t88_gfc.hdr`` (with the skull).

    Returns:
        (sessions, a list of (person, path); reasons, a list of texts, for what was left out). The person of session
        OAS1_0001_MR2 is OAS1_0001.
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

    Left out are folders named derivatives; masks, segmentations and other contrasts by name (`read_slices` refuses the masks
    and segmentations that are not named so); and, where some files are named T1, those that are not.

    Args:
        folder: where to look.
        pattern: a glob relative to it, which decides in place of these rules.
        person_pattern: a regular expression whose one group, found in the path below the folder, is the person. By default
            what `PERSON_NAMES` find, else the folder that `_person_level` finds, else the file's name.

    Raises:
        UserError: if one of the patterns cannot be used.
    """
    folder = Path(folder)
    paths, sessions, reasons = [], [], []
    for place, files in _walk(folder):
        paths += [place.relative_to(folder) / name for name in files
                  if name.lower().endswith(VOLUME_ENDINGS) and not name.lower().endswith((".img", ".dcm"))]
        if any(is_dicom(place / name) for name in files if Path(name).suffix.lower() in (".dcm", ".ima", "")):
            reasons.append(f"{place}: holds DICOM files; convert them to NIfTI with dcm2niix")
    matches = None if pattern is None else _glob(folder, pattern)
    has_t1 = any(_is_t1(path) and not _why_no_head(path) for path in paths)
    for path, person in zip(paths, _people(paths, person_pattern)):
        if matches is not None:
            reason = None if path in matches else "does not match --pattern"
        else:
            reason = _why_no_head(path) or ("is not named T1, as others here are" if has_t1 and not _is_t1(path) else None)
        if not reason and not person:
            reason = "has no person that --person-pattern finds"
        if reason:
            reasons.append(f"{folder / path}: {reason}")
        else:
            sessions.append((person, folder / path))
    return sessions, reasons


def _glob(folder, pattern):
    """The paths relative to `folder` that a glob matches, a set."""
    if not pattern or os.path.isabs(pattern):
        raise UserError(f"--pattern {pattern!r} cannot be used; give one relative to the folder, like '**/*_T1w.nii.gz'.")
    return set(map(Path, glob.glob(pattern, root_dir=folder, recursive=True)))


def _stem(path):
    """A volume's name without .nii and the like."""
    return re.sub(r"\.(nii|nii\.gz|mgz|hdr|img)$", "", path.name, flags=re.IGNORECASE)


def _contrast(name):
    """The match of the last word of a name that tells the contrast, with a group 1 if that is T1; or None."""
    matches = list(CONTRAST.finditer(name))
    return matches[-1] if matches else None


def _is_t1(path):
    contrast = _contrast(_stem(path))
    return contrast is not None and contrast[1] is not None


def _why_no_head(path):
    """Why a file is no T1-weighted picture of a head, by its path below the folder of volumes; None if it may be one."""
    name = _stem(path)
    if "derivatives" in path.parts[:-1]:
        return "lies in a derivatives folder"
    if re.search(r"(mask|seg|labels?)$", name, re.IGNORECASE):
        return "is a mask or a segmentation by its name"
    if re.search(r"_ce-[a-z]", name, re.IGNORECASE):
        return "was taken with a contrast agent by its name"
    for part in (name, *reversed(path.parts[:-1])):  # the name of the file itself comes before those of its folders
        contrast = _contrast(part)
        if contrast:
            return None if contrast[1] else f"is {contrast[0]} by its name, not T1"
    return None


def _people(paths, pattern=None):
    """The person of each path, a list of texts; None where `pattern`, a regular expression, finds none."""
    if pattern is not None:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--person-pattern {pattern!r} is no regular expression ({error}); "
                             "give one like 'patient_([0-9]+)'.") from error
        if regex.groups != 1:
            raise UserError(f"--person-pattern {pattern!r} has {regex.groups} groups; put ( ) around the person alone, "
                             "like 'patient_([0-9]+)'.")
        matches = [regex.search(path.as_posix()) for path in paths]
        return [match[1] if match else None for match in matches]
    names = [next((match[0] for regex in PERSON_NAMES if (match := regex.search(path.as_posix()))), None) for path in paths]
    level = _person_level([path for path, name in zip(paths, names) if name is None])
    people = []
    for path, name in zip(paths, names):
        if name is None:
            is_deep = level is not None and len(path.parts) > level + 1
            name = "/".join(path.parts[:level + 1]) if is_deep else _stem(path)
        people.append(name)
    return people


def _person_level(paths):
    """How deep below the root the folders lie that tell people apart: 0 for the first level; None if no level does.

    It is the first level at which most files have a namesake: the same path below another folder of that level (as in
    SUBJECT/mri/T1.mgz). Where no level has that, the first at which the same file name lies anywhere below another folder.
    """
    deepest = max((len(path.parts) - 1 for path in paths), default=0)
    for whole_path in (True, False):
        for level in range(deepest):
            deep = [path.parts for path in paths if len(path.parts) > level + 1]
            keys = [(parts[:level], parts[level + 1:] if whole_path else parts[-1]) for parts in deep]
            folders = collections.defaultdict(set)
            for parts, key in zip(deep, keys):
                folders[key].add(parts[level])
            if 2 * sum(len(folders[key]) > 1 for key in keys) > len(deep):
                return level
    return None


def convert_volumes(sessions, reasons, output_dir, seed=0):
    """Writes volumes as the three PNG folders, split by person: 85, 10 and 5 % of them.

    Args:
        sessions: list of (person, path); all sessions of a person go to one split, each as a case of its own.
        reasons: a list of texts, to which is added why a session cannot be used.
        output_dir: folder to make. Besides the splits it gets cases.csv: which case is which session of which person.
        seed: of the split.

    Returns:
        ({split: (number of sessions, of people)}, notes on the volumes, a list of texts).

    Raises:
        UserError: if fewer than three people are left, or the folder cannot be made.
    """
    with whole_folder(output_dir, "--output-dir") as unfinished:
        rows, notes = _write_sessions(unfinished, sessions, reasons)
        counts = _split_by_person(unfinished, rows, seed)
    return counts, notes


def _write_sessions(folder, sessions, reasons):
    """Writes every usable session's slices as N.npy; adds to `reasons` why the others are not.

    Returns:
        ([(person, path)] of the sessions, notes on them).
    """
    rows, notes, size = [], [], None
    for person, path in tqdm(sessions, "Converting", unit=" volumes", leave=False, disable=None):
        try:
            slices, remarks = read_slices(path)
            size = size or slices.shape[1:]
            if slices.shape[1:] != size:
                raise ValueError(f"has slices of {slices.shape[2]}x{slices.shape[1]} pixels, the first one {size[1]}x{size[0]}")
        except ValueError as error:
            reasons.append(f"{path}: {error}")
            continue
        notes += [f"{path}: {remark}" for remark in remarks]
        np.save(folder / f"{len(rows)}.npy", slices)
        rows.append((person, path))
    return rows, notes


def _split_by_person(folder, rows, seed):
    """Writes the PNG folders and cases.csv from the N.npy of (person, path) number N.

    Returns:
        {split: (number of sessions, of people)}.
    """
    people = sorted({person for person, _ in rows})
    if len(people) < 3:
        raise UserError(f"Only {len(people)} people have usable volumes; each of the three splits needs one. "
                         "If there are more, tell them apart with --person-pattern.")
    order = np.random.default_rng(seed).permutation(len(people))
    test = max(1, round(0.05 * len(people)))
    validate = max(1, round(0.10 * len(people)))
    split_of = {people[index]: "test" if rank < test else "validate" if rank < test + validate else "train"
                for rank, index in enumerate(order)}
    table, case = [("case", "split", "person", "source")], 0
    counts = {}
    for name in SPLITS:
        (folder / f"keras_png_slices_{name}").mkdir()
        for index, (person, path) in enumerate(rows):
            if split_of[person] == name:
                case += 1
                for position, image in enumerate(np.load(folder / f"{index}.npy", allow_pickle=False)):
                    Image.fromarray(image).save(slice_file(folder, name, case, position))
                table.append((case, name, person, path))
                (folder / f"{index}.npy").unlink()
        members = [person for person, _ in rows if split_of[person] == name]
        counts[name] = len(members), len(set(members))
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows(table)
    return counts
