"""The OASIS PNG slices: found, checked, read, and fed to the networks.

The data flow is PNG -> uint8 array -> ``tf.data`` batches of float32 in [-1, 1]. Where no OASIS slices are to be
had, a demo cohort is simulated and written as the same PNG folders, so that everything after it is the one real path.

    python dataset.py [--data-dir DIR]                             # a table of the splits, and runs/contact_sheet.png
    python dataset.py --from-oasis1 DISCS --output-dir DIR         # the PNG folders from the OASIS-1 release
    python dataset.py --from-nifti VOLUMES --output-dir DIR        # or from NIfTI volumes
    python dataset.py --simulate 200 --output-dir DIR              # or of simulated people
"""

if __name__ == "__main__":
    import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import util
import tensorflow as tf
from tqdm import tqdm

from support import devices, import_volumes, orientation, synthetic, template
from support.cli import exit_on_user_error, MAX_SEED, number, script_parser, UserError
from support.files import whole_file
from support.images import empty_margin, in_chunks, read_slice
from support.people import PICTURE_SIDE
from support.volumes import FILE_NAME, NUM_POSITIONS, SPLITS

# What training hides from the prior or corrupts: while sampling, the slices below are its own, with its own errors
CONDITION_DROPOUT = {
    "context": 0.25,  # share of the slices: all slices below hidden
    "further_context": 0.05,  # share of the slices: all slices below but the nearest hidden
    "context_codes": 0.03,  # share of the codes of slices below: replaced at random
    "person": 0.2,  # share of the slices: the person hidden
    "person_noise": 0.15,  # standard deviation of noise on the person, where people's is 1
}
DEFAULT_FOLDER = Path("keras_png_slices_data")


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
        """Indices of up to `wanted` images, evenly spread over the files: for figures of many images."""
        return np.unique(np.linspace(0, len(self.images) - 1, wanted).astype(int))

    def examples(self, wanted):
        """Indices of up to `wanted` images to show, the same each time: evenly spread over people and slice positions both.

        The images stand for equal shares of the positions, from the lowest to the highest, and of the people. A person
        without the slice gives the nearest that is there, and is shown again only if there are fewer people than images.
        """
        people, positions, chosen = np.unique(self.cases), np.unique(self.positions), []
        wanted = min(wanted, len(self.images))
        for share in (np.arange(wanted) + 0.5) / wanted:
            person, position = (values[int(share * len(values))] for values in (people, positions))
            free = np.setdiff1d(np.arange(len(self.images)), chosen)
            order = np.lexsort((np.abs(self.positions[free] - position), self.cases[free] != person))
            chosen.append(free[order[0]])
        return np.array(chosen)

    def mirrored(self):
        """The same heads, left for right."""
        return dataclasses.replace(self, images=self.images[:, :, ::-1])

    def take(self, indices):
        """The split of these images alone."""
        return Split(self.name, self.images[indices], self.cases[indices], self.positions[indices])

    @classmethod
    def from_heads(cls, heads, positions):
        """A split of whole heads, uint8 (N, S, H, W), of which each has the S slice positions."""
        cases, places = np.indices(heads.shape[:2], np.int32).reshape(2, -1)
        return cls("heads", heads.reshape(-1, *heads.shape[2:]), cases, np.asarray(positions, np.int32)[places])

    def head_indices(self, positions):
        """Indices, int (people, len(positions)), of the images of each person who has a slice at each of `positions`."""
        index = {key: i for i, key in enumerate(zip(self.cases.tolist(), self.positions.tolist()))}
        rows = ([index.get((case, position), -1) for position in positions] for case in np.unique(self.cases).tolist())
        return np.array([row for row in rows if -1 not in row], int).reshape(-1, len(positions))


@dataclasses.dataclass(frozen=True)
class CodedSplit:
    """A split in codes, with what the prior is conditioned on.

    Attributes:
        codes: int32 (V, N, g, g), the codes of N slices in V versions: as they are, and mirrored, say.
        positions: int32 (N,), the place of each slice in its head.
        context: int32 (N, S), the indices of the slices below each slice; N where there is none.
        persons: float32 (V, N, P), the person of each slice.
        num_embeddings: K; as a code of a slice below, it stands for "no slice".
    """

    codes: np.ndarray
    positions: np.ndarray
    context: np.ndarray
    persons: np.ndarray
    num_embeddings: int

    def codes_with_none(self):
        """The codes, int32 (V, N + 1, g, g), the last slice being "no slice": what `context` points into."""
        none = np.full_like(self.codes[:, :1], self.num_embeddings)
        return np.concatenate([self.codes, none], axis=1)


def find_oasis(data_dir=None):
    """The folder of the slices: `data_dir`, else $OASIS_DIR, else ./keras_png_slices_data; None if there is none of them.

    Raises:
        UserError: if a folder that was asked for does not exist.
    """
    for folder, origin in ((data_dir, "--data-dir"), (os.environ.get("OASIS_DIR"), "the environment variable OASIS_DIR")):
        if folder:
            if not Path(folder).is_dir():
                raise UserError(f"{origin} names {folder}, which is not a folder; "
                                 "give the one that holds keras_png_slices_train, _validate and _test.")
            return Path(folder)
    return DEFAULT_FOLDER if DEFAULT_FOLDER.is_dir() else None


def find_data(data_dir=None):
    """`find_oasis`, else the demo cohort: (its path, whether it is the demo cohort)."""
    if folder := find_oasis(data_dir):
        return folder, False
    print(f"No OASIS data found (--data-dir, OASIS_DIR, ./{DEFAULT_FOLDER}): using the demo cohort, which is simulated from one "
          "averaged template and is no evidence about patients.", flush=True)
    return template.make_demo_cohort(), True


def find_geometry(data_dir, limit=None, front=None, spacing=None):
    """Measures on training slices which way a set lies, and where: see `orientation.find_geometry`, whose result it returns.

    Args:
        data_dir: folder that holds ``keras_png_slices_train``.
        limit: look at the first `limit` people only.
        front: the side of the front, if the user stated it; else None.
        spacing: mm between slices, if the user stated it; else None.
    """
    files = list_slices(data_dir, "train", min(limit or orientation.MAX_PEOPLE, orientation.MAX_PEOPLE))
    paths = [path for *_, path in files]
    images = _read(paths, read_slice(paths[0]).shape, paths[0], "train", None)
    return orientation.find_geometry(images, np.array([position for _, position, _ in files]), front, spacing)


def load_splits(data_dir, names=SPLITS, limit=None, cache_dir=None, front=None):
    """Reads splits from the PNG folders.

    Args:
        data_dir: folder that holds ``keras_png_slices_{train,validate,test}``.
        names: the splits to read.
        limit: keep only the first `limit` people of each split.
        cache_dir: folder to keep the decoded images in; from there the next start maps them into memory at once.
        front: the side of the pictures on which the front of the head lies, see `orientation.turn`: they are turned front up.
            None if it is unknown: then they stay as they are.

    Returns:
        A dict of `Split` by name. All images have one size, and no person is in two splits.

    Raises:
        UserError: if a folder is missing or empty, or a file is not a slice: see `list_slices` and `read_slice`.
    """
    listed = {name: list_slices(data_dir, name, limit) for name in names}
    owner = {}
    for name, files in listed.items():
        for case, _, path in files:
            if owner.setdefault(case, name) != name:
                raise UserError(f"Person case_{case:03d} is in both the {owner[case]} and the {name} split ({path}); "
                                 "keep each person in one split, or results on held-out people mean nothing.")
    first_path = listed[names[0]][0][2]
    size = read_slice(first_path).shape
    splits = {}
    for name, files in listed.items():
        paths = [path for *_, path in files]
        try:
            images = (_read_cached(paths, size, first_path, name, front, cache_dir) if cache_dir else
                      _read(paths, size, first_path, name, front))
        except MemoryError as error:
            raise UserError(f"The {len(files):,} images of the {name} split do not fit into memory; use fewer people with "
                             "--limit.") from error
        cases, positions = np.array([file[:2] for file in files], np.int32).T
        splits[name] = Split(name, images, cases, positions)
    return splits


def _turned_shape(size, front):
    return size[::-1] if front in ("left", "right") else size


def _read(paths, size, reference, name, front, images=None):
    """Decodes files in parallel (Pillow lets go of Python's lock meanwhile) into uint8 (N, height, width), turned front up."""
    images = np.empty((len(paths), *_turned_shape(size, front)), np.uint8) if images is None else images
    chunks = np.array_split(np.arange(len(paths)), -(-len(paths) // 32))

    def read_chunk(indices):
        for index in indices:
            images[index] = orientation.turn(read_slice(paths[index], size, reference)[np.newaxis], front or "up")[0]
        return len(indices)

    with (concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
          tqdm(total=len(paths), desc=f"Reading {name}", unit=" images", leave=False, disable=None) as progress):
        for count in pool.map(read_chunk, chunks):
            progress.update(count)
    return images


def _read_cached(paths, size, reference, name, front, cache_dir):
    """`_read`, from a memory-mapped .npy file if these very files were decoded into it before.

    Its name is a digest of their folder and of all their names, sizes and times of change: a changed file is another cache.
    """
    listing = [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]
    digest = hashlib.sha256(json.dumps([str(paths[0].parent.resolve()), size, front, listing]).encode()).hexdigest()
    file = Path(cache_dir) / f"slices-{digest[:32]}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as unfinished:
            images = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (len(paths), *_turned_shape(size, front)))
            _read(paths, size, reference, name, front, images)
            images.flush()
    return np.load(file, mmap_mode="r", allow_pickle=False)


def list_slices(data_dir, name, limit=None):
    """Lists one split's files as (case, position, path), ordered by case, then position.

    Raises:
        UserError: if the folder is missing or empty, a PNG's name has no case and slice, or two files are one slice.
    """
    folder = Path(data_dir) / f"keras_png_slices_{name}"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; the data folder must hold keras_png_slices_train, _validate and _test.")
    files = {}
    for path in folder.iterdir():
        if path.suffix.lower() != ".png" or path.name.startswith("."):  # hidden files: macOS writes one, ._NAME, beside each
            continue
        match = FILE_NAME.fullmatch(path.name)
        if not match:
            raise UserError(f"{path} has no case and slice in its name; expected case_NNN_slice_K.nii.png.")
        key = int(match[1]), int(match[2])
        if key[1] >= NUM_POSITIONS:
            raise UserError(f"{path} is slice {key[1]}; slices are numbered 0 to {NUM_POSITIONS - 1}.")
        if key in files:
            raise UserError(f"{path} and {files[key]} are the same case and slice; remove one of them.")
        files[key] = path
    if not files:
        raise UserError(f"{folder} holds no PNG files; put the slices case_NNN_slice_K.nii.png of the {name} split there.")
    people = set(sorted({case for case, _ in files})[:limit])
    return [(case, position, files[case, position]) for case, position in sorted(files) if case in people]


def normalise(images):
    """uint8 in [0, 255] -> float32 in [-1, 1], as ``x / 127.5 - 1``."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


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


def context_indices(split, steps):
    """Where the slices below each slice lie.

    Args:
        split: a `Split`.
        steps: S numbers, how far below, each at least 1.

    Returns:
        int32 (N, S), indices into the split; N where that person has no such slice.
    """
    index = {key: i for i, key in enumerate(zip(split.cases.tolist(), split.positions.tolist()))}
    return np.array([[index.get((case, position - step), len(index)) for step in steps] for case, position in index],
                    np.int32).reshape(-1, len(steps))


def head_pictures(split, margin):
    """Coarse pictures of the heads of a split: each slice less its border of `margin` pixels, averaged over areas.

    Returns:
        (float32 (people, NUM_POSITIONS, 16, 16) in [0, 1], NaN where a slice is missing; int (N,), whose head each image is of).
    """
    cases, head_numbers = np.unique(split.cases, return_inverse=True)
    shape = PICTURE_SIDE, PICTURE_SIDE
    inside = slice(margin, split.images.shape[1] - margin)

    def shrink(images):
        return tf.image.resize(images[:, inside, inside, np.newaxis], shape, "area")[..., 0] / 255

    pictures = np.full((len(cases), NUM_POSITIONS, *shape), np.nan, np.float32)
    pictures[head_numbers, split.positions] = in_chunks(shrink, split.images, size=256)
    return pictures, head_numbers


def encode(vqvae, split):
    """The codes, int32 (N, g, g), of a split in its order."""
    with devices.full_float32():
        return np.concatenate([vqvae.encode_to_codes(images) for images, _ in image_batches(split, 32)])


def encode_split(vqvae, prior, *versions):
    """A split in codes, with what conditions the prior.

    Args:
        vqvae: a `modules.VQVAE`.
        prior: a `modules.PixelCNN`, for its space of persons.
        *versions: a `Split` in one or several versions: as it is, and mirrored, say.

    Returns:
        A `dataset.CodedSplit`.
    """
    persons = []
    for split in versions:
        pictures, head_numbers = head_pictures(split, vqvae.margin)
        persons.append(prior.encode_people(pictures)[head_numbers])
    return CodedSplit(np.stack([encode(vqvae, split) for split in versions]), versions[0].positions,
                      context_indices(versions[0], prior.steps_below), np.stack(persons), prior.num_embeddings)


def code_batches(coded, batch_size, seed=None, first_epoch=0):
    """Batches for the prior: shuffled without end like `training_batches`, or once in order if `seed` is None.

    For training a version of each slice is drawn each time, and its conditions are partly hidden (`CONDITION_DROPOUT`). All
    draws depend on (`seed`, step) alone.

    Args:
        coded: a `dataset.CodedSplit`.
        batch_size: B.
        seed: of order and draws.
        first_epoch: as in `training_batches`.

    Returns:
        A dataset of dicts: `codes`, int32 (B, g, g); `positions`, int32 (B,); `context`, int32 (B, S, g, g); `person`, float32
        (B, P).
    """
    with tf.device("CPU"):
        codes, positions = tf.constant(coded.codes_with_none(), tf.int32), tf.constant(coded.positions, tf.int32)
        context, persons = tf.constant(coded.context, tf.int32), tf.constant(coded.persons, tf.float32)

    def gather(indices, version):
        one = tf.stack([version, indices], axis=-1)
        below = tf.gather(context, indices)
        of_context = tf.stack([tf.broadcast_to(version[:, tf.newaxis], tf.shape(below)), below], axis=-1)
        return {"codes": tf.gather_nd(codes, one), "positions": tf.gather(positions, indices),
                "context": tf.gather_nd(codes, of_context), "person": tf.gather_nd(persons, one)}

    def training_batch(step, indices):
        step_seed = tf.stack([tf.constant(seed, tf.int64), step])
        version = tf.random.stateless_uniform(tf.shape(indices), step_seed, maxval=len(codes), dtype=tf.int32)
        return _drop_conditions(gather(indices, version), coded.num_embeddings, step_seed)

    if seed is None:
        batches = tf.data.Dataset.range(len(positions), output_type=tf.int32).batch(batch_size).map(
            lambda indices: gather(indices, tf.zeros_like(indices)), num_parallel_calls=2)
    else:
        first_step = first_epoch * (len(positions) // batch_size)
        batches = _shuffled_indices(len(positions), batch_size, seed, first_epoch).enumerate(first_step).map(
            training_batch, num_parallel_calls=2)
    return _with_options(batches.prefetch(2))


def _drop_conditions(batch, num_embeddings, seed):
    """A training batch of the prior with `CONDITION_DROPOUT` applied."""
    shares = CONDITION_DROPOUT
    context, count = batch["context"], tf.shape(batch["context"])[0]
    seeds = [tf.random.experimental.stateless_fold_in(seed, number) for number in range(5)]
    random_codes = tf.random.stateless_uniform(tf.shape(context), seeds[0], maxval=num_embeddings, dtype=tf.int32)
    corrupted = tf.random.stateless_uniform(tf.shape(context), seeds[1]) < shares["context_codes"]
    context = tf.where(corrupted & (context < num_embeddings), random_codes, context)
    # The nearest slice may be visible while further ones are hidden, as in the second slice of a head.
    hidden_shares = [shares["context"]] + [shares["context"] + shares["further_context"]] * (context.shape[1] - 1)
    visible = tf.random.stateless_uniform((count, 1), seeds[2]) >= tf.constant([hidden_shares])
    context = tf.where(visible[:, :, tf.newaxis, tf.newaxis], context, num_embeddings)
    noise = tf.random.stateless_normal(tf.shape(batch["person"]), seeds[3])
    person = batch["person"] + shares["person_noise"] * noise
    person = tf.where(tf.random.stateless_uniform((count, 1), seeds[4]) >= shares["person"], person, 0.0)
    return {**batch, "context": context, "person": person}


def _shuffled_indices(num_items, batch_size, seed, first_epoch):
    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(num_items), [tf.constant(seed, tf.int64), epoch])
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)

    return tf.data.Dataset.counter(first_epoch).flat_map(one_epoch)


def _gather_images(split):
    # Rows of the array itself, which may be a memory map larger than the memory: a copy in TensorFlow would undo that.
    shape = split.images.shape[1:]

    def gather(indices):
        images = tf.numpy_function(split.images.__getitem__, [indices], tf.uint8, stateful=False)
        positions = tf.numpy_function(split.positions.__getitem__, [indices], tf.int32, stateful=False)
        images.set_shape((*indices.shape, *shape))
        positions.set_shape(indices.shape)
        return normalise(images)[..., tf.newaxis], positions

    return gather


def _with_options(dataset):
    # TensorFlow 2.21: tearing down an autotuned iterator waits for the autotuner's next wake-up, up to tens of seconds.
    options = tf.data.Options()
    options.autotune.enabled = False
    # On several machines each takes its share of every batch.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.with_options(options)


def fingerprints(splits):
    """A SHA-256 hex digest of each split's pixels, cases and positions, by name: equal data, equal digest."""
    digests = {}
    for name, split in splits.items():
        digest = hashlib.sha256()
        for array in (split.images, split.cases, split.positions):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        digests[name] = digest.hexdigest()
    return digests


def pixel_statistics(images):
    """(mean, variance) of uint8 images (N, H, W), as normalised to [-1, 1]; exact, without a float copy."""
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in images)
    levels = np.arange(256) / 127.5 - 1
    mean = float(counts @ levels / counts.sum())
    return mean, float(counts @ (levels - mean) ** 2 / counts.sum())


def warn_of_lost_border(name, images, margin):
    """Prints a line if an image, uint8 (N, H, W), reaches into the border of `margin` pixels that the model paints black."""
    if empty_margin(images, 1) < margin:
        print(f"Note: some {name} images reach into the border of {margin} pixels that is black in all training images; "
              "what lies there cannot be reconstructed.")


@exit_on_user_error
def main(argv=None):
    """Converts volumes; or simulates people; or prints a table of the splits and writes a contact sheet."""
    parser = script_parser(__doc__, "Show what the data folder holds, or make one from volumes.")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of keras_png_slices_{train,validate,test} "
                        "(default: $OASIS_DIR, ./keras_png_slices_data, or the demo cohort)")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--from-oasis1", metavar="DIR", help="convert the OASIS-1 release: the folder that holds its discs")
    sources.add_argument("--from-nifti", metavar="DIR", help="convert the T1-weighted volumes (.nii, .nii.gz, "
                         ".hdr with .img, .mgz) below this folder")
    sources.add_argument("--simulate", type=number(int, 3, 10 ** 6), metavar="N", help="simulate N people, as those of the "
                         "demo cohort: 80 %% to train, 10 %% to validate, 10 %% to test; no evidence about patients")
    parser.add_argument("--image-size", type=int, choices=(128, 256), help="with --simulate: pixels of a side (default: 128)")
    parser.add_argument("--pattern", metavar="GLOB", help="with --from-nifti: the files to take, such as '**/*_T1w.nii.gz' "
                        "(default: all named T1, or else all but other contrasts, masks, segmentations and derivatives)")
    parser.add_argument("--person-pattern", metavar="REGEX", help="with --from-nifti: what in a file's path is the person, in one "
                        "group, such as 'patient_([0-9]+)' (default: an ADNI, IXI, OASIS or BIDS name, else the folder that "
                        "tells files of one name apart)")
    parser.add_argument("--output-dir", metavar="DIR", help="folder to make for the converted or simulated slices")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, metavar="S", help="of the split by person (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.image_size and not arguments.simulate:
        raise UserError("--image-size is that of the slices that --simulate draws; give both or neither.")
    if arguments.from_oasis1 or arguments.from_nifti:
        return report_conversion(arguments)
    if arguments.simulate:
        return simulate(arguments.simulate, arguments.output_dir, arguments.image_size or template.DEMO_IMAGE_SIZE)
    data_dir, is_demo = find_data(arguments.data_dir)
    show(load_splits(data_dir))
    notice = synthetic.notice_of(data_dir)
    if notice and not is_demo:  # of the demo cohort all was said when it was found
        print(notice)


def report_conversion(arguments):
    """Runs the conversion that the command line asks for, and says what was skipped and why."""
    source = arguments.from_oasis1 or arguments.from_nifti
    if not Path(source).is_dir():
        raise UserError(f"{source} is not a folder; give the one that holds the volumes.")
    if not arguments.output_dir:
        raise UserError("--output-dir is missing: the folder to make for the slices.")
    for option in ("pattern", "person_pattern"):
        if getattr(arguments, option) is not None and not arguments.from_nifti:
            raise UserError(f"--{option.replace('_', '-')} is for the files of --from-nifti; give both or neither.")
    if arguments.from_oasis1:
        kind = "PROCESSED/MPRAGE/T88_111 volumes"
        sessions, reasons = import_volumes.find_oasis1(source)
    else:
        kind = ".nii, .nii.gz, .hdr or .mgz files"
        sessions, reasons = import_volumes.find_nifti(source, arguments.pattern, arguments.person_pattern)
    try:
        if not sessions:
            raise UserError(f"{source} holds no {kind} that can be used.")
        counts, notes = import_volumes.convert_volumes(sessions, reasons, arguments.output_dir, arguments.seed)
    finally:
        for reason in reasons:
            print(f"Skipped {reason}")
    for note in notes:
        print(f"Note: {note}")
    print(f"{'split':10}{'sessions':>10}{'people':>8}")
    for name, (num_sessions, num_people) in counts.items():
        print(f"{name:10}{num_sessions:10,}{num_people:8,}")
    print(f"Converted {sum(num_sessions for num_sessions, _ in counts.values())} sessions into {arguments.output_dir} "
          f"(see cases.csv there), skipped {len(reasons)}.")


def simulate(number_of_people, output_dir, image_size):
    """Writes simulated people, and says so."""
    if not output_dir:
        raise UserError("--output-dir is missing: the folder to make for the slices.")
    people = template.split_people(number_of_people)
    template.write_cohort(output_dir, people, image_size)
    print(f"{output_dir}: {number_of_people} simulated people ({', '.join(f'{people[name]} {name}' for name in SPLITS)}), "
          f"{NUM_POSITIONS} slices each of {image_size}x{image_size} pixels. Simulated: no evidence about patients.")


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
