"""The OASIS PNG slices: found, checked, read, and fed to the networks; or made, in the same folders.

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
import tensorflow as tf

from support import figures, orientation
from support.cli import exit_on_user_error, MAX_SEED, number, script_parser, UserError
from support.devices import print_on_chief
from support.images import crop, empty_margin, in_chunks, neighbours, read_slice, spread
from support.import_volumes import convert_volumes, find_nifti, find_oasis1
from support.people import PICTURE_SIDE
from support.same_person import warn_of_shared_people
from support.slices import FOLDERS, GEOMETRY_FILE, list_slices, read_geometry, read_images, SPLITS
from support.synthetic import notice_of
from support.template import DEMO_IMAGE_SIZE, make_demo_cohort, split_people, write_cohort
from support.volumes import FRAME_MM, SLAB, STACKS

# What training hides from the prior or corrupts: while sampling, the slices below are its own, with errors
CONDITION_DROPOUT = {
    "context": 0.25,  # share of the slices: all slices below hidden
    "further_context": 0.05,  # share of the slices: all slices below but the nearest hidden
    "noise": 0.3,  # of the codes of slices below, at most: replaced by one of the `NEAR_CODES`
    "no_noise": 1 / 3,  # share of the slices: nothing is replaced
    "person": 0.2,  # share of the slices: the person hidden
    "person_noise": 0.15,  # standard deviation of noise on the person, where people's is 1
}
NEAR_CODES = 12  # in the codebook, by which noise replaces a code
ALONE_SHARE = 0.1  # of the slices that the decoder learns to paint without those below and above
DEFAULT_FOLDER = Path("keras_png_slices_data")
SOURCES = "--from-oasis1", "--from-nifti", "--simulate"
# The sources that an option goes with; None is the folder of PNG slices
OPTION_SOURCES = {"--data-dir": (None,), "--output-dir": SOURCES, "--person-pattern": ("--from-nifti",),
                  "--whole-brain": SOURCES[1:], "--seed": SOURCES[:2]}


# PNG files -> Split -----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Split:
    """The slices of one split, ordered by case, then by slice."""
    name: str  # "train", "validate" or "test"
    images: np.ndarray  # uint8 (N, height, width)
    cases: np.ndarray  # int32 (N,), the person of each image
    positions: np.ndarray  # int32 (N,), the slice number of each image: its place in the head, 0 the lowest

    @classmethod
    def from_heads(cls, heads, positions):
        """A split of whole heads, uint8 (N, S, H, W), of which each has the S slice positions."""
        cases, places = np.indices(heads.shape[:2], np.int32).reshape(2, -1)
        positions = np.asarray(positions, np.int32)[places]
        return cls("heads", heads.reshape(-1, *heads.shape[2:]), cases, positions)

    @property
    def num_people(self):
        return len(np.unique(self.cases))

    def find(self, cases, positions):
        """Indices, int32 of the shape of `cases` and `positions`, of their images; N where there is none."""
        index = {key: i for i, key in enumerate(zip(self.cases.tolist(), self.positions.tolist()))}
        return np.vectorize(lambda *key: index.get(key, len(self.cases)), otypes=[np.int32])(cases, positions)

    def head_indices(self, positions):
        """Indices, int (people, len(positions)), of the images of those who have a slice at each position."""
        rows = self.find(np.unique(self.cases)[:, np.newaxis], np.asarray(positions))
        return rows[(rows < len(self.cases)).all(axis=1)]

    def examples(self, wanted):
        """Indices of up to `wanted` images, evenly spread over the people and, as these go on, upwards."""
        shares, people = (np.arange(wanted) + 0.5) / wanted, np.unique(self.cases)
        rows = [np.flatnonzero(self.cases == people[int(share * len(people))]) for share in shares]
        return np.unique([own[int(share * len(own))] for share, own in zip(shares, rows)])

    def mirrored(self):
        """The same heads, left for right."""
        return dataclasses.replace(self, images=self.images[:, :, ::-1])

    def take(self, indices):
        return Split(self.name, self.images[indices], self.cases[indices], self.positions[indices])


def find_oasis(data_dir=None):
    """The folder of the slices: `data_dir`, else $OASIS_DIR, else ./keras_png_slices_data, else None."""
    if folder := data_dir or os.environ.get("OASIS_DIR"):
        if not Path(folder).is_dir():
            origin = "--data-dir" if data_dir else "the environment variable OASIS_DIR"
            raise UserError(f"{origin} names {folder}, no folder; give one with {FOLDERS}.")
        return Path(folder)
    return DEFAULT_FOLDER if DEFAULT_FOLDER.is_dir() else None


def find_data(data_dir=None):
    """`find_oasis`, else the demo cohort: (its path, whether it is the demo cohort)."""
    if folder := find_oasis(data_dir):
        return folder, False
    print(f"No OASIS data found (--data-dir, OASIS_DIR, ./{DEFAULT_FOLDER}): using the demo cohort, which is "
          "simulated from one averaged template and is no evidence about patients.", flush=True)
    return make_demo_cohort(), True


def load_splits(data_dir, names=SPLITS, limit=None, cache_dir=None, front=None):
    """Reads splits from the PNG folders: a dict of `Split` by name, of squares of a multiple of 32 pixels.

    No case is in two, and of each are the first `limit` people; for `cache_dir` and `front` see
    `slices.read_images`. UserError if a folder is missing or empty, or a file is no slice."""
    listed = {name: list_slices(data_dir, name, limit) for name in names}
    owner = {}
    for name, files in listed.items():
        for case, _, path in files:
            if owner.setdefault(case, name) != name:
                raise UserError(f"Person case_{case:03d} is in both the {owner[case]} and the {name} split "
                                f"({path}); keep each person in one split, or results mean nothing.")
    first_path = listed[names[0]][0][2]
    splits = {}
    for name, files in listed.items():
        cases, positions, paths = zip(*files)
        images = read_images(paths, name, first_path, front, cache_dir)
        splits[name] = Split(name, images, np.array(cases, np.int32), np.array(positions, np.int32))
    (height, width), side = read_slice(first_path).shape, images.shape[1]
    if not height == width == side:
        print_on_chief(f"Note: slices of {width}x{height} pixels are padded with black to {side}x{side}; how "
                       f"large a pixel is is not known then, and it counts as {FRAME_MM}/{side} mm.")
    if len(splits) > 1:
        warn_of_shared_people(splits)
    return splits


def find_geometry(data_dir, limit=None, front=None, spacing=None):
    """Where slices lie, as known or measured: (front or None, `SliceGeometry`, a line that says it)."""
    known_front, geometry = read_geometry(data_dir)
    if geometry:  # what is stated overrules it
        front, spacing = front or known_front, spacing or geometry.spacing
        return front, dataclasses.replace(geometry, spacing=spacing), (
            f"Slices lie front-{front}, {spacing:.3g} mm apart, as stated or by {data_dir}/{GEOMETRY_FILE}.")
    files = list_slices(data_dir, "train", min(limit or orientation.MAX_PEOPLE, orientation.MAX_PEOPLE))
    _, positions, paths = zip(*files)
    images = read_images(paths, "train", paths[0])
    return orientation.find_geometry(images, np.array(positions), front, spacing)


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
        print(f"Note: some {name} images reach into the border of {margin} pixels that gets no codes; what "
              "lies there cannot be reconstructed.")


# Split -> batches of images ---------------------------------------------------------------------------------
def normalise(images):
    """uint8 in [0, 255] -> float32 in [-1, 1], as ``x / 127.5 - 1``."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


def image_batches(split, batch_size, seed=None, first_epoch=0):
    """Batches for the VQ-VAE: (float32 (B, side, side, 1) in [-1, 1], int32 (B,) positions).

    Once in order if `seed` is None; else endlessly, each epoch in an order that (`seed`, epoch) alone decide,
    without its last short batch: a run resumed at `first_epoch` sees what it would have seen."""
    def batch(_, indices):
        images, positions = _look_up(lambda rows: (split.images[rows], split.positions[rows]), indices)
        return normalise(images)[..., tf.newaxis], positions
    return _batches(batch, len(split.images), batch_size, seed, first_epoch)


def _look_up(function, *indices):
    """What a function of NumPy finds at each of `indices` (B,), as a list of tensors (B, ...)."""
    # Not in TensorFlow, which would copy the arrays: they may be memory maps, larger than memory.
    example = function(*np.zeros((len(indices), 1), np.int32))
    tensors = tf.numpy_function(function, indices, [part.dtype for part in example], stateful=False)
    return [tf.ensure_shape(tensor, (*indices[0].shape, *part.shape[1:]))
            for tensor, part in zip(tensors, example)]


def _batches(make_batch, num_items, batch_size, seed=None, first_epoch=0):
    """A dataset of ``make_batch(step, indices)``: see `image_batches`."""
    def one_epoch(epoch):
        epoch_seed = [tf.constant(seed, tf.int64), epoch]
        order = tf.random.experimental.stateless_shuffle(tf.range(num_items), epoch_seed)
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)
    if seed is None:
        indices = tf.data.Dataset.range(num_items, output_type=tf.int32).batch(batch_size)
    else:
        indices = tf.data.Dataset.counter(first_epoch).flat_map(one_epoch)
    # TensorFlow 2.21: tearing down an autotuned iterator waits up to tens of seconds for the tuner.
    options = tf.data.Options()
    options.autotune.enabled = False
    # On several machines each takes its share of every batch.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    steps = indices.enumerate(first_epoch * (num_items // batch_size))
    return steps.map(make_batch, num_parallel_calls=2).prefetch(2).with_options(options)


# Split -> CodedSplit -> batches of codes --------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class CodedSplit:
    """A split in codes, with what the prior is conditioned on."""
    codes: np.ndarray  # uint16 (V, N, g, g), of N slices in V versions: as they are, and mirrored, say
    positions: np.ndarray  # int32 (N,), the place of each slice in its head
    context: np.ndarray  # int32 (N, S), the indices of the slices below each slice; N where there is none
    persons: np.ndarray  # float32 (V, N, P), the person of each slice
    neighbours: np.ndarray  # int (2, N), see `images.neighbours`
    near_codes: np.ndarray  # int32 (K, 12), nearest to each; as a code of a slice below, K is "no slice"

    @property
    def num_embeddings(self):
        return len(self.near_codes)

    def decode(self, vqvae, indices):
        """The images (B, S, S, 1) of the slices `indices`, int (B,), as they are, each in its head."""
        return vqvae.decode_codes(*(self.codes[0][rows] for rows in (indices, *self.neighbours[:, indices])))

    def slices(self, indices, version=0):
        """The codes, int32 (..., g, g), at `indices`, int (...); index N gives "no slice", all K."""
        indices, count = np.asarray(indices), len(self.positions)
        codes = self.codes[version, np.minimum(indices, count - 1)].astype(np.int32)
        codes[indices == count] = self.num_embeddings
        return codes


def encode_split(vqvae, prior, *versions):
    """The `CodedSplit` of a `Split`, of which all versions are given: as it is, and mirrored, say."""
    persons = []
    for version in versions:
        pictures, head_numbers = head_pictures(version, vqvae.margin, prior.num_positions)
        persons.append(prior.encode_people(pictures)[head_numbers])
    codes, split = np.stack([encode(vqvae, version) for version in versions]), versions[0]
    return CodedSplit(codes, split.positions, context_indices(split, prior.steps_below), np.stack(persons),
                      neighbours(split.cases, split.positions), near_codes(vqvae.quantizer))


def near_codes(quantizer):
    """The codes nearest to each, in order: int32 (K, 12), of few codes (K, K - 1)."""
    embeddings, count = quantizer.embeddings.numpy(), min(NEAR_CODES, quantizer.num_embeddings - 1)
    def nearest(rows):
        distances = np.array(quantizer.distances(embeddings[rows]))
        distances[np.arange(len(rows)), rows] = np.inf
        near = np.argpartition(distances, count - 1)[:, :count]  # a tenth of the time of sorting all
        order = np.argsort(np.take_along_axis(distances, near, axis=1))
        return np.take_along_axis(near, order, axis=1).astype(np.int32)
    return in_chunks(nearest, np.arange(len(embeddings)), size=512)


def decoder_batches(codes, split, batch_size, seed=None, first_epoch=0):
    """Batches for a decoder that sees neighbours, as `image_batches`: (images, int32 codes (B, 3, g, g))."""
    # `codes`, (N, g, g), are the split's. In training, `ALONE_SHARE` of the slices have only their own.
    around = neighbours(split.cases, split.positions)
    def look_up(rows):
        return split.images[rows], np.int32(codes[np.stack([rows, *around[:, rows]], axis=1)])
    def batch(step, indices):
        images, batch_codes = _look_up(look_up, indices)
        if seed is not None:
            shape = tf.size(indices), 1, 1, 1
            drawn = tf.random.stateless_uniform(shape, [tf.constant(seed, tf.int64), step])
            batch_codes = tf.where(drawn < ALONE_SHARE, batch_codes[:, :1], batch_codes)
        return normalise(images)[..., tf.newaxis], batch_codes
    return _batches(batch, len(split.images), batch_size, seed, first_epoch)


def encode(vqvae, split):
    """The codes, uint16 (N, g, g), of a split in its order; uint32 of a codebook of more than 65,536."""
    dtype = np.promote_types(np.uint16, np.min_scalar_type(vqvae.quantizer.num_embeddings - 1))
    batches = image_batches(split, 32)
    return np.concatenate([np.asarray(vqvae.encode_to_codes(images), dtype) for images, _ in batches])


def head_pictures(split, margin, num_positions):
    """Coarse pictures of a split's heads: each slice less `margin` pixels at each side, averaged; and whose.

    (float32 (people, num_positions, 16, 16) in [0, 1], NaN without a slice; int (N,), each image's head)"""
    cases, head_numbers = np.unique(split.cases, return_inverse=True)
    shape = PICTURE_SIDE, PICTURE_SIDE
    def shrink(images):
        return tf.image.resize(crop(images, margin)[..., np.newaxis], shape, "area")[..., 0] / 255
    pictures = np.full((len(cases), num_positions, *shape), np.nan, np.float32)
    pictures[head_numbers, split.positions] = in_chunks(shrink, split.images, size=256)
    return pictures, head_numbers


def context_indices(split, steps):
    """Indices, int32 (N, S), of the slices that lie `steps` (S numbers) below each; N where there is none."""
    return split.find(split.cases[:, np.newaxis], split.positions[:, np.newaxis] - np.asarray(steps))


def code_batches(coded, batch_size, seed=None, first_epoch=0):
    """Batches for the prior, in the order of `image_batches`: the inputs of `modules.PixelCNN.call`."""
    # In training each slice's version is drawn, and its conditions are partly hidden (`CONDITION_DROPOUT`).
    def look_up(rows, version):
        context = coded.slices(coded.context[rows], version[:, np.newaxis])
        positions, persons = np.int32(coded.positions[rows]), np.float32(coded.persons[version, rows])
        return coded.slices(rows, version), positions, context, persons
    def batch(step, indices):
        version, step_seed = tf.zeros_like(indices), None
        if seed is not None:
            step_seed, count = tf.stack([tf.constant(seed, tf.int64), step]), tf.shape(indices)
            version = tf.random.stateless_uniform(count, step_seed, maxval=len(coded.codes), dtype=tf.int32)
        parts = dict(zip(("codes", "positions", "context", "person"), _look_up(look_up, indices, version)))
        return parts if seed is None else _drop_conditions(parts, coded.near_codes, step_seed)
    return _batches(batch, len(coded.positions), batch_size, seed, first_epoch)


def _drop_conditions(batch, near_codes, seed):
    """A training batch of the prior with `CONDITION_DROPOUT` applied; `noise_share`, float (B,), is new."""
    shares, num_embeddings = CONDITION_DROPOUT, len(near_codes)
    context, person, count = batch["context"], batch["person"], tf.shape(batch["person"])[0]
    seeds = [tf.random.experimental.stateless_fold_in(seed, number) for number in range(7)]
    shape = tf.shape(context)
    # Sampled slices below have errors. The network is told how many it has to expect (GameNGen, 2408.14837).
    noise = shares["noise"] * tf.random.stateless_uniform((count,), seeds[5])
    noise = tf.where(tf.random.stateless_uniform((count,), seeds[6]) < shares["no_noise"], 0.0, noise)
    is_replaced = tf.random.stateless_uniform(shape, seeds[1]) < noise[:, tf.newaxis, tf.newaxis, tf.newaxis]
    which = tf.random.stateless_uniform(shape, seeds[0], maxval=near_codes.shape[1], dtype=tf.int32)
    is_code = context < num_embeddings
    near = tf.gather_nd(near_codes, tf.stack([tf.where(is_code, context, 0), which], axis=-1))
    context = tf.where(is_replaced & is_code, near, context)
    # The nearest slice may be visible while further ones are hidden, as in the second slice of a head.
    further = shares["context"] + shares["further_context"]
    hidden_shares = [shares["context"]] + [further] * (context.shape[1] - 1)
    visible = tf.random.stateless_uniform((count, 1), seeds[2]) >= tf.constant([hidden_shares])
    context = tf.where(visible[:, :, tf.newaxis, tf.newaxis], context, num_embeddings)
    person += shares["person_noise"] * tf.random.stateless_normal(tf.shape(person), seeds[3])
    person = tf.where(tf.random.stateless_uniform((count, 1), seeds[4]) >= shares["person"], person, 0.0)
    return {**batch, "context": context, "person": person, "noise_share": noise}


# The command ------------------------------------------------------------------------------------------------
@exit_on_user_error
def main(argv=None):
    """Converts volumes; or simulates people; or prints a table of the splits and writes a contact sheet."""
    arguments = parse_arguments(argv)
    if arguments.from_oasis1 or arguments.from_nifti:
        convert(arguments)
    elif arguments.simulate:
        people, stack = split_people(arguments.simulate), STACKS[bool(arguments.whole_brain)]
        write_cohort(arguments.output_dir, people, DEMO_IMAGE_SIZE, *stack)
        counts = ", ".join(f"{people[name]} {name}" for name in SPLITS)
        print(f"{arguments.output_dir}: {arguments.simulate} simulated people ({counts}), {stack[1]} slices "
              "each. Simulated: no evidence about patients.")
    else:
        data_dir, is_demo = find_data(arguments.data_dir)
        show(load_splits(data_dir))
        if not is_demo and (notice := notice_of(data_dir)):  # of the demo all was said when it was found
            print(notice)


def parse_arguments(argv):
    """The command line; an option that the chosen source makes no use of is refused."""
    parser = script_parser(__doc__)
    add, add_source = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add_source("--from-oasis1", metavar="DIR", help="convert the OASIS-1 release: the folder of its discs")
    add_source("--from-nifti", metavar="DIR",
               help="convert the T1-weighted volumes (.nii, .nii.gz, .hdr with .img, .mgz) below this folder")
    add_source("--simulate", type=number(int, 3, 10 ** 6), metavar="N", help="simulate N people, as in the "
               "demo cohort: 80 %% to train, 10 %% each to validate and test; no evidence about patients")
    add("--data-dir", metavar="DIR", help="without a source: the folder of keras_png_slices_{train,validate,"
        f"test}} to show (default: $OASIS_DIR, ./{DEFAULT_FOLDER}, or the demo cohort)")
    add("--output-dir", metavar="DIR", help="with a source: the folder to make for the slices")
    add("--whole-brain", action="store_true", default=None, help="with --from-nifti or --simulate: slices of "
        "2 mm from below the cerebellum to the vertex, of 128x128 pixels (default: a slab of 32 slices, "
        f"{SLAB.spacing} mm apart)")
    add("--person-pattern", metavar="REGEX", help="with --from-nifti: what in a file's path is the person, "
        "in one group, such as 'patient_([0-9]+)'; files without one are left out (default: an ADNI, IXI, "
        "OASIS or BIDS name, else the one word that differs between the paths)")
    add("--seed", type=number(int, 0, MAX_SEED), metavar="S",
        help="with --from-oasis1 or --from-nifti: of the split by person (default: 0)")
    arguments = parser.parse_args(argv)
    given = [f"--{name.replace('_', '-')}" for name, value in vars(arguments).items() if value is not None]
    source = next((option for option in given if option in SOURCES), None)
    for option in given:
        if source not in OPTION_SOURCES.get(option, (source,)):
            raise UserError(f"{option} is of no use {f'with {source}' if source else 'without a source'}: "
                            "see --help.")
    if source and not arguments.output_dir:
        raise UserError("--output-dir is missing: the folder to make for the slices.")
    return arguments


def convert(arguments):
    """Runs the conversion that the command line asks for, and says what was skipped and why."""
    source = arguments.from_oasis1 or arguments.from_nifti
    sessions, reasons = (find_oasis1(source) if arguments.from_oasis1 else
                         find_nifti(source, arguments.person_pattern))
    try:
        if not sessions:
            raise UserError(f"{source} holds nothing of use; --from-oasis1 takes PROCESSED/MPRAGE/T88_111, "
                            "--from-nifti .nii, .nii.gz, .hdr and .mgz (dcm2niix makes them of DICOM).")
        counts = convert_volumes(sessions, reasons, arguments.output_dir, arguments.seed or 0,
                                 bool(arguments.whole_brain),
                                 center=None if arguments.from_oasis1 else (0.0, 0.0))  # None: an atlas
    finally:
        for reason in reasons:
            print(f"Skipped {reason}")
    for name, (num_sessions, num_people) in counts.items():
        print(f"{name}: {num_sessions:,} sessions of {num_people:,} people")
    print(f"Converted them into {arguments.output_dir} (see cases.csv), skipped {len(reasons)}.")


def show(splits):
    """Prints a table of the splits and writes runs/contact_sheet.png."""
    print(f"{'split':10}{'images':>8}{'people':>8}{'size':>10}{'mean':>8}{'variance':>10}  (in [-1, 1])")
    rows = []
    for name, split in splits.items():
        count, side, _ = split.images.shape
        mean, variance = pixel_statistics(split.images)
        print(f"{name:10}{count:8,}{split.num_people:8}{f'{side}x{side}':>10}{mean:8.3f}{variance:10.4f}")
        for case in np.unique(split.cases)[:2]:
            own = np.flatnonzero(split.cases == case)
            indices = own[spread(len(own), 8)]
            rows.append((f"{name}\ncase {case}", split.images[indices],
                         [f"slice {position}" for position in split.positions[indices]], figures.BYTES))
    path = Path("runs/contact_sheet.png")
    path.parent.mkdir(exist_ok=True)
    figures.draw_rows(rows)[0].savefig(path, dpi=2 * figures.DPI)  # twice the dots of a page: to zoom in
    print(f"{path}: a row per person, two of each split ({', '.join(splits)}), slices from the lowest up.")


if __name__ == "__main__":
    main()
