"""The OASIS PNG slices: found, checked, read, and fed to the networks.

From top to bottom: PNG files -> uint8 arrays (`Split`) -> batches of images -> codes (`CodedSplit`) ->
batches of codes; then the command. Without OASIS, a simulated cohort is written and read as the same folders.

    python dataset.py [--data-dir DIR]                         # a table, and runs/contact_sheet.png
    python dataset.py --from-oasis1 DISCS --output-dir DIR     # the PNG folders from the OASIS-1 release
    python dataset.py --from-nifti VOLUMES --output-dir DIR    # or from NIfTI volumes
    python dataset.py --simulate 200 --output-dir DIR          # or of simulated people
"""

if __name__ == "__main__":
    import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import util
import tensorflow as tf

from support import import_volumes, orientation, synthetic, template
from support.cli import exit_on_user_error, MAX_SEED, number, script_parser, UserError
from support.images import empty_margin, in_chunks
from support.people import PICTURE_SIDE
from support.same_person import warn_of_shared_people
from support.slices import SliceReader
from support.volumes import FILE_NAME, FRAME_MM, NUM_POSITIONS, SPLITS

# What training hides from the prior or corrupts: while sampling, the slices below are its own, with errors
CONDITION_DROPOUT = {
    "context": 0.25,  # share of the slices: all slices below hidden
    "further_context": 0.05,  # share of the slices: all slices below but the nearest hidden
    "context_codes": 0.03,  # share of the codes of slices below: replaced at random
    "person": 0.2,  # share of the slices: the person hidden
    "person_noise": 0.15,  # standard deviation of noise on the person, where people's is 1
}
DEFAULT_FOLDER = Path("keras_png_slices_data")
SOURCES = "--from-oasis1", "--from-nifti", "--simulate"
# The sources that each other option goes with; None is the folder of PNG slices
OPTION_SOURCES = {
    "--data-dir": (None,),
    "--output-dir": SOURCES,
    "--seed": ("--from-oasis1", "--from-nifti"),
    "--pattern": ("--from-nifti",),
    "--person-pattern": ("--from-nifti",),
    "--image-size": ("--simulate",),
}


# PNG files -> Split -----------------------------------------------------------------------------------------


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

    @classmethod
    def from_heads(cls, heads, positions):
        """A split of whole heads, uint8 (N, S, H, W), of which each has the S slice positions."""
        cases, places = np.indices(heads.shape[:2], np.int32).reshape(2, -1)
        positions = np.asarray(positions, np.int32)[places]
        return cls("heads", heads.reshape(-1, *heads.shape[2:]), cases, positions)

    @property
    def num_people(self):
        """The number of different people."""
        return len(np.unique(self.cases))

    def find(self, cases, positions):
        """Indices, int32 of the shape of `cases` and `positions`, of their images; N where there is none."""
        index = {key: i for i, key in enumerate(zip(self.cases.tolist(), self.positions.tolist()))}
        cases, positions = np.broadcast_arrays(cases, positions)
        keys = zip(cases.ravel().tolist(), positions.ravel().tolist())
        return np.array([index.get(key, len(self.cases)) for key in keys], np.int32).reshape(cases.shape)

    def head_indices(self, positions):
        """Indices, int (people, len(positions)), of the images of those who have a slice at each position."""
        rows = self.find(np.unique(self.cases)[:, np.newaxis], np.asarray(positions))
        return rows[(rows < len(self.cases)).all(axis=1)]

    def examples(self, wanted):
        """Indices of up to `wanted` images to show: equal shares of people and of positions, lowest first.

        A person without the slice gives the nearest, and comes again only if people are too few.
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


def find_oasis(data_dir=None):
    """The folder of the slices: `data_dir`, else $OASIS_DIR, else ./keras_png_slices_data, else None.

    Raises:
        UserError: if a folder that was asked for does not exist.
    """
    origins = (data_dir, "--data-dir"), (os.environ.get("OASIS_DIR"), "the environment variable OASIS_DIR")
    for folder, origin in origins:
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
    print(f"No OASIS data found (--data-dir, OASIS_DIR, ./{DEFAULT_FOLDER}): using the demo cohort, which is "
          "simulated from one averaged template and is no evidence about patients.", flush=True)
    return template.make_demo_cohort(), True


def list_slices(data_dir, name, limit=None):
    """Lists one split's files as (case, position, path), ordered by case, then position.

    Raises:
        UserError: if there are no files, one's name has no case and slice, or two are one slice.
    """
    folder = Path(data_dir) / f"keras_png_slices_{name}"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; "
                        "the data folder must hold keras_png_slices_train, _validate and _test.")
    files = {}
    for path in folder.iterdir():
        if path.suffix.lower() != ".png" or path.name.startswith("."):  # macOS writes a ._NAME beside each
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
        raise UserError(f"{folder} holds no PNG files; "
                        f"put the slices case_NNN_slice_K.nii.png of the {name} split there.")
    people = set(sorted({case for case, _ in files})[:limit])
    return [(case, position, files[case, position]) for case, position in sorted(files) if case in people]


def load_splits(data_dir, names=SPLITS, limit=None, cache_dir=None, front=None):
    """Reads splits from the PNG folders; says so if images are padded, or if splits seem to share a person.

    Args:
        data_dir: folder that holds ``keras_png_slices_{train,validate,test}``.
        names: the splits to read.
        limit: keep only the first `limit` people of each split.
        cache_dir: folder to keep the decoded images in, which the next start maps into memory at once.
        front: the side of the pictures on which the front of the head lies, which is turned up, see
            `orientation.turn`; None if it is unknown: then they stay as they are.

    Returns:
        A dict of `Split` by name. No case is in two. All images are squares of a multiple of 32 pixels.

    Raises:
        UserError: if a folder is missing or empty, or a file is no slice: see `list_slices` and `read_slice`.
    """
    listed = {name: list_slices(data_dir, name, limit) for name in names}
    owner = {}
    for name, files in listed.items():
        for case, _, path in files:
            if owner.setdefault(case, name) != name:
                raise UserError(f"Person case_{case:03d} is in both the {owner[case]} and the {name} split "
                                f"({path}); keep each person in one split, or results mean nothing.")
    reader = SliceReader(listed[names[0]][0][2], front)
    (height, width), side = reader.size, reader.shape[0]
    if (height, width) != reader.shape:
        print(f"Note: slices of {width}x{height} pixels are padded with black to {side}x{side}; how large a "
              f"pixel is is not known then, and it counts as {FRAME_MM}/{side} mm.", flush=True)
    splits = {}
    for name, files in listed.items():
        paths = [path for *_, path in files]
        try:
            images = reader.read_cached(paths, name, cache_dir) if cache_dir else reader.read(paths, name)
        except MemoryError as error:
            raise UserError(f"The {len(files):,} images of the {name} split do not fit into memory; "
                            "use fewer people with --limit.") from error
        cases, positions = np.array([file[:2] for file in files], np.int32).T
        splits[name] = Split(name, images, cases, positions)
    if len(splits) > 1:
        warn_of_shared_people(splits)
    return splits


def find_geometry(data_dir, limit=None, front=None, spacing=None):
    """`orientation.find_geometry` of the training slices, measured on the first `limit` people."""
    files = list_slices(data_dir, "train", min(limit or orientation.MAX_PEOPLE, orientation.MAX_PEOPLE))
    paths = [path for *_, path in files]
    images = SliceReader(paths[0], None).read(paths, "train")
    return orientation.find_geometry(images, np.array([position for _, position, _ in files]), front, spacing)


# Batches of images ------------------------------------------------------------------------------------------


def normalise(images):
    """uint8 in [0, 255] -> float32 in [-1, 1], as ``x / 127.5 - 1``."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


def image_batches(split, batch_size):
    """A split in its order, in batches of (float32 (B, side, side, 1) in [-1, 1], int32 (B,) positions)."""
    pairs = tf.data.Dataset.from_tensor_slices(np.arange(len(split.images))).batch(batch_size)
    return _with_options(pairs.map(_gather_images(split), num_parallel_calls=2).prefetch(2))


def training_batches(split, batch_size, seed, first_epoch=0):
    """An endless run of shuffled training epochs, each without its last short batch.

    The order depends on (`seed`, epoch) alone, so a resumed run that starts at `first_epoch` sees what an
    uninterrupted one would have seen.

    Returns:
        A dataset of (float32 (B, side, side, 1) in [-1, 1], int32 (B,) positions).
    """
    return _with_options(_shuffled_indices(len(split.images), batch_size, seed, first_epoch)
                         .map(_gather_images(split), num_parallel_calls=2).prefetch(2))


def _gather_images(split):
    """A function from indices (B,) to a batch of images and positions."""
    # Rows of the array itself, which may be a memory map larger than memory: no copy in TensorFlow.
    shape = split.images.shape[1:]

    def gather(indices):
        images = tf.numpy_function(split.images.__getitem__, [indices], tf.uint8, stateful=False)
        positions = tf.numpy_function(split.positions.__getitem__, [indices], tf.int32, stateful=False)
        images.set_shape((*indices.shape, *shape))
        positions.set_shape(indices.shape)
        return normalise(images)[..., tf.newaxis], positions

    return gather


def _shuffled_indices(num_items, batch_size, seed, first_epoch):
    """Endless batches, int32 (B,), of indices: each epoch in an order of its own."""
    def one_epoch(epoch):
        epoch_seed = [tf.constant(seed, tf.int64), epoch]
        order = tf.random.experimental.stateless_shuffle(tf.range(num_items), epoch_seed)
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)

    return tf.data.Dataset.counter(first_epoch).flat_map(one_epoch)


def _with_options(dataset):
    # TensorFlow 2.21: tearing down an autotuned iterator waits up to tens of seconds for the tuner.
    options = tf.data.Options()
    options.autotune.enabled = False
    # On several machines each takes its share of every batch.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.with_options(options)


# Split -> CodedSplit ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CodedSplit:
    """A split in codes, with what the prior is conditioned on.

    Attributes:
        codes: uint16 (V, N, g, g), the codes of N slices in V versions: as they are, and mirrored, say.
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

    def slices(self, indices, version=0):
        """The codes of slices, int32 (..., g, g), at `indices`, int (...); index N gives "no slice", all K.

        `version` is a number, or an array that broadcasts with the indices.
        """
        indices, count = np.asarray(indices), len(self.positions)
        codes = self.codes[version, np.minimum(indices, count - 1)].astype(np.int32)
        codes[indices == count] = self.num_embeddings
        return codes


def encode_split(vqvae, prior, *versions):
    """A split in codes, with what conditions the prior.

    Args:
        vqvae: a `modules.VQVAE`.
        prior: a `modules.PixelCNN`, for its space of persons.
        *versions: a `Split` in one or several versions: as it is, and mirrored, say.

    Returns:
        A `CodedSplit`.
    """
    split, codes, persons = versions[0], [], []
    for mirrored in versions:
        pictures, head_numbers = head_pictures(mirrored, vqvae.margin)
        persons.append(prior.encode_people(pictures)[head_numbers])
        codes.append(encode(vqvae, mirrored))
    context = context_indices(split, prior.steps_below)
    return CodedSplit(np.stack(codes), split.positions, context, np.stack(persons), prior.num_embeddings)


def encode(vqvae, split):
    """The codes, uint16 (N, g, g), of a split in its order; uint32 of a codebook of more than 65,536."""
    dtype = np.promote_types(np.uint16, np.min_scalar_type(vqvae.quantizer.num_embeddings - 1))
    batches = image_batches(split, 32)
    return np.concatenate([np.asarray(vqvae.encode_to_codes(images), dtype) for images, _ in batches])


def head_pictures(split, margin):
    """Coarse pictures of the heads of a split: each slice less `margin` pixels at each side, averaged.

    Returns:
        (float32 (people, NUM_POSITIONS, 16, 16) in [0, 1], NaN without a slice; int (N,), each image's head).
    """
    cases, head_numbers = np.unique(split.cases, return_inverse=True)
    shape = PICTURE_SIDE, PICTURE_SIDE
    inside = slice(margin, split.images.shape[1] - margin)

    def shrink(images):
        return tf.image.resize(images[:, inside, inside, np.newaxis], shape, "area")[..., 0] / 255

    pictures = np.full((len(cases), NUM_POSITIONS, *shape), np.nan, np.float32)
    pictures[head_numbers, split.positions] = in_chunks(shrink, split.images, size=256)
    return pictures, head_numbers


def context_indices(split, steps):
    """Indices, int32 (N, S), of the slices that lie `steps` (S numbers) below each; N where there is none."""
    return split.find(split.cases[:, np.newaxis], split.positions[:, np.newaxis] - np.asarray(steps))


# Batches of codes -------------------------------------------------------------------------------------------


def code_batches(coded, batch_size, seed=None, first_epoch=0):
    """Batches for the prior: endless and shuffled as `training_batches`, or once in order if `seed` is None.

    For training a version of each slice is drawn each time, and its conditions are partly hidden
    (`CONDITION_DROPOUT`). All draws depend on (`seed`, step) alone.

    Args:
        coded: a `CodedSplit`.
        batch_size: B.
        seed: of order and draws.
        first_epoch: as in `training_batches`.

    Returns:
        A dataset of dicts: `codes`, int32 (B, g, g); `positions`, int32 (B,); `context`, int32 (B, S, g, g);
        `person`, float32 (B, P).
    """
    num_versions, num_slices, *grid = coded.codes.shape
    shapes = {"codes": grid, "positions": [], "context": [coded.context.shape[1], *grid],
              "person": coded.persons.shape[2:]}

    def look_up(code_index, version):
        context_index = coded.context[code_index]
        return (coded.slices(code_index, version), np.int32(coded.positions[code_index]),
                coded.slices(context_index, version[:, np.newaxis]),
                np.float32(coded.persons[version, code_index]))

    def gather(code_index, version):
        # In NumPy: TensorFlow would hold all codes a second time.
        types = tf.int32, tf.int32, tf.int32, tf.float32
        parts = tf.numpy_function(look_up, [code_index, version], types, stateful=False)
        return {name: tf.ensure_shape(part, (*code_index.shape, *shapes[name]))
                for name, part in zip(shapes, parts)}

    def training_batch(step, code_index):
        step_seed = tf.stack([tf.constant(seed, tf.int64), step])
        count = tf.shape(code_index)
        version = tf.random.stateless_uniform(count, step_seed, maxval=num_versions, dtype=tf.int32)
        return _drop_conditions(gather(code_index, version), coded.num_embeddings, step_seed)

    if seed is None:
        batches = tf.data.Dataset.range(num_slices, output_type=tf.int32).batch(batch_size).map(
            lambda code_index: gather(code_index, tf.zeros_like(code_index)), num_parallel_calls=2)
    else:
        first_step = first_epoch * (num_slices // batch_size)
        batches = _shuffled_indices(num_slices, batch_size, seed, first_epoch).enumerate(first_step).map(
            training_batch, num_parallel_calls=2)
    return _with_options(batches.prefetch(2))


def _drop_conditions(batch, num_embeddings, seed):
    """A training batch of the prior with `CONDITION_DROPOUT` applied."""
    shares = CONDITION_DROPOUT
    context, count = batch["context"], tf.shape(batch["context"])[0]
    seeds = [tf.random.experimental.stateless_fold_in(seed, number) for number in range(5)]
    shape = tf.shape(context)
    random_codes = tf.random.stateless_uniform(shape, seeds[0], maxval=num_embeddings, dtype=tf.int32)
    corrupted = tf.random.stateless_uniform(shape, seeds[1]) < shares["context_codes"]
    context = tf.where(corrupted & (context < num_embeddings), random_codes, context)
    # The nearest slice may be visible while further ones are hidden, as in the second slice of a head.
    further = shares["context"] + shares["further_context"]
    hidden_shares = [shares["context"]] + [further] * (context.shape[1] - 1)
    visible = tf.random.stateless_uniform((count, 1), seeds[2]) >= tf.constant([hidden_shares])
    context = tf.where(visible[:, :, tf.newaxis, tf.newaxis], context, num_embeddings)
    noise = tf.random.stateless_normal(tf.shape(batch["person"]), seeds[3])
    person = batch["person"] + shares["person_noise"] * noise
    person = tf.where(tf.random.stateless_uniform((count, 1), seeds[4]) >= shares["person"], person, 0.0)
    return {**batch, "context": context, "person": person}


# What is said of the data -----------------------------------------------------------------------------------


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
    """Prints a line if an image, uint8 (N, H, W), reaches into the border of `margin` black pixels."""
    if empty_margin(images, 1) < margin:
        print(f"Note: some {name} images reach into the border of {margin} pixels that is black in all "
              "training images; what lies there cannot be reconstructed.")


# The command ------------------------------------------------------------------------------------------------


@exit_on_user_error
def main(argv=None):
    """Converts volumes; or simulates people; or prints a table of the splits and writes a contact sheet."""
    arguments = parse_arguments(argv)
    if arguments.from_oasis1 or arguments.from_nifti:
        convert(arguments)
    elif arguments.simulate:
        simulate(arguments.simulate, arguments.output_dir, arguments.image_size or template.DEMO_IMAGE_SIZE)
    else:
        data_dir, is_demo = find_data(arguments.data_dir)
        show(load_splits(data_dir))
        notice = synthetic.notice_of(data_dir)
        if notice and not is_demo:  # of the demo cohort all was said when it was found
            print(notice)


def parse_arguments(argv):
    """The command line; an option that the chosen source makes no use of is refused."""
    parser = script_parser(__doc__, "Show what the data folder holds, or make one.")
    add_source = parser.add_mutually_exclusive_group().add_argument
    add_source("--from-oasis1", metavar="DIR", help="convert the OASIS-1 release: the folder of its discs")
    add_source("--from-nifti", metavar="DIR", help="convert the T1-weighted volumes (.nii, .nii.gz, .hdr "
               "with .img, .mgz) below this folder")
    add_source("--simulate", type=number(int, 3, 10 ** 6), metavar="N", help="simulate N people, as in the "
               "demo cohort: 80 %% to train, 10 %% each to validate and test; no evidence about patients")
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="without a source: the folder of keras_png_slices_{train,validate,"
        f"test}} to show (default: $OASIS_DIR, ./{DEFAULT_FOLDER}, or the demo cohort)")
    add("--output-dir", metavar="DIR", help="with a source: the folder to make for the slices")
    add("--image-size", type=int, choices=(128, 256),
        help=f"with --simulate: pixels of a side (default: {template.DEMO_IMAGE_SIZE})")
    add("--pattern", metavar="GLOB", help="with --from-nifti: the files to take, such as '**/*_T1w.nii.gz' "
        "(default: all named T1, or else all but other contrasts, masks, segmentations and derivatives)")
    add("--person-pattern", metavar="REGEX", help="with --from-nifti: what in a file's path is the person, "
        "in one group, such as 'patient_([0-9]+)' (default: an ADNI, IXI, OASIS or BIDS name, else the "
        "folder that tells files of one name apart)")
    add("--seed", type=number(int, 0, MAX_SEED), metavar="S", help="with --from-oasis1 or --from-nifti: of "
        "the split by person (default: 0)")
    arguments = parser.parse_args(argv)
    given = [f"--{name.replace('_', '-')}" for name, value in vars(arguments).items() if value is not None]
    source = next((option for option in given if option in SOURCES), None)
    for option in given:
        allowed = OPTION_SOURCES.get(option, (source,))
        if source not in allowed and source:
            raise UserError(f"{option} is of no use with {source}; leave out the one or the other.")
        if source not in allowed:
            raise UserError(f"{option} is of no use without {' or '.join(allowed)}; give both or neither.")
    if source and "--output-dir" not in given:
        raise UserError("--output-dir is missing: the folder to make for the slices.")
    return arguments


def convert(arguments):
    """Runs the conversion that the command line asks for, and says what was skipped and why."""
    source = arguments.from_oasis1 or arguments.from_nifti
    if not Path(source).is_dir():
        raise UserError(f"{source} is not a folder; give the one that holds the volumes.")
    if arguments.from_oasis1:
        kind = "PROCESSED/MPRAGE/T88_111 volumes"
        sessions, reasons = import_volumes.find_oasis1(source)
    else:
        kind = ".nii, .nii.gz, .hdr or .mgz files"
        sessions, reasons = import_volumes.find_nifti(source, arguments.pattern, arguments.person_pattern)
    try:
        if not sessions:
            raise UserError(f"{source} holds no {kind} that can be used.")
        seed = arguments.seed or 0
        counts, notes = import_volumes.convert_volumes(sessions, reasons, arguments.output_dir, seed)
    finally:
        for reason in reasons:
            print(f"Skipped {reason}")
    for note in notes:
        print(f"Note: {note}")
    print(f"{'split':10}{'sessions':>10}{'people':>8}")
    for name, (num_sessions, num_people) in counts.items():
        print(f"{name:10}{num_sessions:10,}{num_people:8,}")
    total = sum(num_sessions for num_sessions, _ in counts.values())
    print(f"Converted {total} sessions into {arguments.output_dir} (see cases.csv there), "
          f"skipped {len(reasons)}.")


def simulate(number_of_people, output_dir, image_size):
    """Writes simulated people, and says so."""
    people = template.split_people(number_of_people)
    template.write_cohort(output_dir, people, image_size)
    counts = ", ".join(f"{people[name]} {name}" for name in SPLITS)
    print(f"{output_dir}: {number_of_people} simulated people ({counts}), {NUM_POSITIONS} slices each of "
          f"{image_size}x{image_size} pixels. Simulated: no evidence about patients.")


def show(splits):
    """Prints a table of the splits and writes runs/contact_sheet.png."""
    print(f"{'split':10}{'images':>8}{'people':>8}{'size':>10}{'mean':>8}{'variance':>10}  (in [-1, 1])")
    for name, split in splits.items():
        height, width = split.images.shape[1:]
        mean, variance = pixel_statistics(split.images)
        size = f"{width}x{height}"
        print(f"{name:10}{len(split.images):8,}{split.num_people:8}{size:>10}{mean:8.3f}{variance:10.4f}")
    rows = []
    for split in splits.values():
        for case in np.unique(split.cases)[:2]:
            person = split.images[split.cases == case]
            rows.append(person[np.linspace(0, len(person) - 1, 8).astype(int)])
    sheet = util.montage(np.concatenate(rows), grid_shape=(len(rows), 8))
    path = Path("runs/contact_sheet.png")
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(path)
    print(f"{path}: a row per person, two of each split ({', '.join(splits)}), slices from the lowest up.")


if __name__ == "__main__":
    main()
