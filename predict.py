"""Reconstructs test images with a trained run, measures them, and samples new brains.

    python predict.py                                        # the newest run
    python predict.py --run-dir runs/oasis --data-dir DIR --slice all
    python predict.py --evaluate                             # and are the samples good, and new?
    python predict.py --images scan.png head.nii.gz          # one's own images
    python predict.py --codes runs/oasis/images/scan_codes.npy
"""

from support import cli  # first: sets what TensorFlow, Keras and matplotlib read when imported

import argparse
import json
from pathlib import Path
import re

import numpy as np
from PIL import Image, UnidentifiedImageError
from skimage import transform
import tensorflow as tf

from support.cli import InputError
import dataset
import modules
from support import devices, figures, metrics, template, volumes

SHOWN_HEADS = 3  # in pictures
LARGEST_SIDE = 8192  # pixels of one's own images; a bound before decoding, so that no file can fill the memory


def parse_arguments(argv):
    """The command line."""
    parser = cli.script_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the PNG splits (default: the run's own, else as in train.py)")
    own = parser.add_mutually_exclusive_group()
    own.add_argument("--images", nargs="+", metavar="FILE", help="reconstruct these instead of the test split: grayscale PNGs of "
                     "any size, or NIfTI volumes")
    own.add_argument("--codes", metavar="FILE", help="decode the codes of a .npy file, as --images writes them, into images")
    parser.add_argument("--num-examples", type=cli.number(int, 1), default=10, metavar="N",
                        help="test images to show (default: 10)")
    parser.add_argument("--num-samples", type=cli.number(int, 1), default=16, metavar="N",
                        help="brains to sample (default: 16)")
    parser.add_argument("--slice", type=slice_argument, metavar="K", help="slice position of the samples, 0 (lowest) to 31, "
                        "or all for one sample of each (default: --num-samples spread over all)")
    parser.add_argument("--heads", type=cli.number(int, 0), default=1, metavar="N",
                        help="whole heads to sample, 32 slices of one new person each (default: 1)")
    parser.add_argument("--temperature", type=cli.number(float, 0), default=1.0, metavar="T",
                        help="of sampling: 1 is the model, less is blander (default: 1)")
    parser.add_argument("--seed", type=cli.number(int, 0, cli.MAX_SEED), default=0, metavar="S", help="of every draw (default: 0)")
    parser.add_argument("--evaluate", action="store_true",
                        help=f"also judge samples beside real people: a slice per test image, and up to {metrics.NUM_HEADS} heads")
    parser.add_argument("--with-neighbours", action="store_true", help="show each sample's nearest training slice in report.html")
    parser.add_argument("--export", type=cli.utf8_path, metavar="DIR",
                        help="also write encoder, decoder and sampler as TensorFlow SavedModels")
    parser.add_argument("--output-dir", metavar="DIR", help="folder for the results (default: RUN/predictions; "
                        "with --images or --codes RUN/images)")
    arguments = parser.parse_args(argv)
    if arguments.images or arguments.codes:
        for name in ("data_dir", "slice", "evaluate", "with_neighbours", "export"):
            if getattr(arguments, name) is not parser.get_default(name):  # slice 0 is given, but equals False
                raise InputError(f"--{name.replace('_', '-')} is of no use with {'--images' if arguments.images else '--codes'}; "
                                 "leave out the one or the other.")
    return arguments


def slice_argument(text):
    """An argparse type: "all" or a slice position."""
    if text == "all":
        return text
    position = cli.number(int, 0)(text)
    if position >= volumes.NUM_POSITIONS:
        raise argparse.ArgumentTypeError(f"{position} is past the last slice, {volumes.NUM_POSITIONS - 1}")
    return position


def find_run(run_dir):
    """The folder of the run: `run_dir`, or the newest in runs/ that has both models.

    Raises:
        InputError: if there is none.
    """
    if run_dir:
        if not is_run(Path(run_dir)):
            raise InputError(f"{run_dir} holds no trained run (config.json, vqvae.keras and pixelcnn.keras); "
                             "train one with train.py --run-dir.")
        return Path(run_dir)
    runs = [folder for folder in Path("runs").glob("*") if is_run(folder)]
    if not runs:
        raise InputError("There is no trained run in runs/; run train.py first, or name one with --run-dir.")
    return max(runs, key=lambda folder: (folder / "config.json").stat().st_mtime)


def is_run(folder):
    """Whether a folder holds a run with both models."""
    return all((folder / name).is_file() for name in ("config.json", "vqvae.keras", "pixelcnn.keras"))


def load_run(run_dir):
    """Loads a run's config, VQ-VAE and PixelCNN.

    Raises:
        InputError: if a file is damaged, or they do not belong together.
    """
    try:
        config = json.loads((run_dir / "config.json").read_text())
        model = config["vqvae"]
        # Needed later; if missing, fail here.
        config["settings"]["limit"], config["data"]["folder"], config["data"]["is_demo"], config["data"]["fingerprints"]
        vqvae, prior = (modules.load_model(run_dir / name, compile=False) for name in ("vqvae.keras", "pixelcnn.keras"))
        as_described = isinstance(vqvae, modules.VQVAE) and model == {name: vqvae.settings[name] for name in model}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The run in {run_dir} cannot be loaded: {error}; train it again.") from error
    if not isinstance(vqvae, modules.VQVAE) or not isinstance(prior, modules.PixelCNN):
        raise InputError(f"In {run_dir}, vqvae.keras or pixelcnn.keras holds the other's model; train it again.")
    if not as_described:
        raise InputError(f"{run_dir / 'vqvae.keras'} is not the model that config.json describes; put back the one or the other.")
    if prior.settings["codebook_digest"] != vqvae.quantizer.digest():
        raise InputError(f"{run_dir / 'pixelcnn.keras'} was trained on the codes of another codebook than that of vqvae.keras; "
                         "put back the two that belong together.")
    return config, vqvae, prior


def write_reconstructions(folder, split, vqvae, details, count, seed):
    """Writes what shows how well the split is reconstructed.

    One PNG per example, original beside reconstruction; reconstructions.png of four people at four positions; errors.png over
    all images.

    Args:
        folder: where to.
        split: a `dataset.Split`.
        vqvae: a `modules.VQVAE`.
        details: of the split, from `metrics.evaluate`.
        count: examples.
        seed: of their draw.

    Returns:
        (the indices of the first ten examples; what `figures.write_report` shows of them).
    """
    margin = vqvae.settings["margin"]
    figures.plot_errors(details["ssim"], split.positions, details["error_map"], margin, folder / "errors.png")

    def shown(indices):
        captions = [f"slice {split.positions[index]}, SSIM {details['ssim'][index]:.3f}" for index in indices]
        return split.images[indices] / 255, decode(vqvae, details["codes"][indices]), details["codes"][indices], captions

    figures.reconstruction_grid(*shown(split.examples(4)), figures.code_colours(vqvae.quantizer.embeddings), margin,
                                folder / "reconstructions.png")
    drawn = np.sort(np.random.default_rng(seed).choice(len(split.images), min(count, len(split.images)), replace=False))
    reconstructions = decode(vqvae, details["codes"][drawn])
    for number, index in enumerate(drawn):
        pair = np.hstack([split.images[index], dataset.to_uint8(reconstructions[number] * 2 - 1)])
        Image.fromarray(pair).save(folder / f"original_vs_reconstructed_{number:04d}.png")
    return drawn[:10], shown(drawn[:10])


def write_template(folder, vqvae):
    """Writes template.png: slices of the MNI152 template, which may be shown to anyone, through the model."""
    images = template.template_slices()
    positions = np.array([3, 11, 19, 27])
    codes, reconstructions = reconstruct(vqvae, images[positions])
    captions = [f"slice {position}, SSIM {metrics.ssim(image / 255, reconstruction):.3f}"
                for image, reconstruction, position in zip(images[positions], reconstructions, positions)]
    figures.reconstruction_grid(images[positions] / 255, reconstructions, codes, captions,
                                figures.code_colours(vqvae.quantizer.embeddings), vqvae.settings["margin"],
                                folder / "template.png", "An average of 152 people (MNI152), which the model never saw")


def reconstruct(vqvae, images):
    """uint8 (N, H, W) -> (codes, int32 (N, g, g); reconstructions, float (N, H, W) in [0, 1])."""
    codes = np.concatenate([vqvae.encode_to_codes(dataset.normalise(images[i:i + 16])[..., tf.newaxis])
                            for i in range(0, len(images), 16)])
    return codes, decode(vqvae, codes)


def draw_samples(vqvae, prior, positions, seed, temperature):
    """Samples one brain per slice position: float (N, H, W) in [0, 1]."""
    return decode(vqvae, prior.sample(positions, seed, temperature))


def decode(vqvae, codes):
    """Codes int (N, g, g) -> images, float (N, H, W) in [0, 1], sixteen at a time."""
    return np.concatenate([metrics.to_unit(vqvae.decode_codes(codes[i:i + 16])) for i in range(0, len(codes), 16)])


def write_samples(folder, samples, positions, margin):
    """Writes samples.png and a PNG of each sample."""
    for number, image in enumerate(samples):
        Image.fromarray(dataset.to_uint8(image * 2 - 1)).save(folder / f"sample_{number:04d}.png")
    figures.sample_grid(samples, positions, margin, folder / "samples.png")


def write_heads(folder, vqvae, prior, count, judged, seed, temperature):
    """Samples whole heads, the slices from the lowest up; writes `count` as NIfTI volumes, and head.png of the first few.

    Returns:
        uint8 (N, 32, H, W), N the larger one of `count` and `judged`.
    """
    if not max(count, judged):
        return []
    print(f"Sampling whole heads: {max(count, judged)} ...")
    codes = prior.sample_heads(max(count, judged), seed, temperature)
    # In uint8, as people's slices are: many heads do not fit into memory as floats.
    heads = np.stack([dataset.to_uint8(vqvae.decode_codes(head).numpy()[..., 0]) for head in codes])
    for number, head in enumerate(heads[:count]):
        volumes.write_nifti(head, folder / f"head_{number:03d}.nii.gz")
    if count:
        figures.head_figure(heads[:min(count, SHOWN_HEADS)], volumes.SLICE_SPACING, folder / "head.png")
    return heads


def nearest_training(samples, train):
    """The training image nearest to each sample, or its mirror image if that is nearer, uint8 (N, H, W)."""
    _, indices, mirrored = metrics.nearest_training(metrics.fit_features(train.images), samples, train.images)
    return np.where(mirrored[:, np.newaxis, np.newaxis], train.images[indices][..., ::-1], train.images[indices])


def judge_samples(folder, samples, splits):
    """Measures samples against real people, and draws what was found.

    Args:
        folder: where distances.png and tissue.png go.
        samples: one at the position of each test image, (N, H, W) in [0, 1].
        splits: dict of all three `dataset.Split`.

    Returns:
        The dict of metrics of `metrics.evaluate_samples`.
    """
    train, test = splits["train"], splits["test"]
    measured, details = metrics.evaluate_samples(samples, test.positions, splits, metrics.fit_features(train.images))
    figures.plot_distances(details["sample_distances"], details["test_distances"], folder / "distances.png")
    figures.plot_tissue(details["tissue"]["samples"], test.positions, details["tissue"]["test"], test.positions,
                        folder / "tissue.png")
    return measured


def judge_heads(folder, heads, vqvae, codes, splits):
    """Measures whole heads against people, and draws the first few, each over its nearest training person.

    Args:
        folder: where neighbours.png goes.
        heads: uint8 (N, 32, H, W), sampled.
        vqvae: the model.
        codes: int (T, g, g), of the test images.
        splits: dict of all three `dataset.Split`.

    Returns:
        The dict of metrics of `metrics.evaluate_heads`.
    """
    train = splits["train"]
    positions = np.unique(train.positions)
    rows = {name: split.heads(positions) for name, split in splits.items()}
    people = {name: split.images[rows[name]] for name, split in splits.items()}
    heads = heads[:, positions]
    reconstructions = np.stack([dataset.to_uint8(decode(vqvae, codes[head]) * 2 - 1) for head in rows["test"]])
    measured, details = metrics.evaluate_heads(heads, reconstructions, people)
    places = np.unique(np.linspace(0, len(positions) - 1, 8).round().astype(int))
    nearest = details["nearest"][:SHOWN_HEADS]
    captions = [f"case {train.cases[rows['train'][person, 0]]}, slice {positions[place]}\nhead's distance {distance:.1f}"
                for person, distance in zip(nearest, details["distances"]) for place in places]
    neighbours = [people["train"][person][places, :, ::-1 if mirrored else 1]
                  for person, mirrored in zip(nearest, details["mirrored"])]
    figures.neighbour_grid(np.concatenate(heads[:SHOWN_HEADS, places]) / 255, np.concatenate(neighbours), captions,
                           folder / "neighbours.png")
    return measured


def sample_positions(slice_, num_samples):
    """The slice positions to sample: one for all, each once, or spread evenly."""
    if slice_ == "all":
        return np.arange(volumes.NUM_POSITIONS)
    if slice_ is None:
        return np.linspace(0, volumes.NUM_POSITIONS - 1, num_samples).round().astype(int)
    return np.full(num_samples, slice_)


def load_data(arguments, config, vqvae, run_dir):
    """The splits that are needed: test; for --with-neighbours train, for --evaluate all three.

    Raises:
        InputError: if they are unusable, do not fit the model, or are not those that the judgement needs.
    """
    data_dir = arguments.data_dir or config["data"]["folder"]
    if not Path(data_dir).is_dir():  # the run was trained elsewhere
        data_dir, is_demo = dataset.find_data(arguments.data_dir)
        if is_demo and not config["data"]["is_demo"]:
            raise InputError(f"The data of {run_dir}, {config['data']['folder']}, are not here; say with --data-dir where they are.")
    names = volumes.SPLITS if arguments.evaluate else ["train", "test"] if arguments.with_neighbours else ["test"]
    splits = dataset.load_splits(data_dir, names, config["settings"]["limit"])
    height, width = splits["test"].images.shape[1:]
    if (height, width) != (vqvae.image_size, vqvae.image_size):
        raise InputError(f"The images in {data_dir} are {width}x{height} pixels but the run in {run_dir} was trained on "
                         f"{vqvae.image_size}x{vqvae.image_size}; give --data-dir or --run-dir to match.")
    for name, split in splits.items():
        if arguments.evaluate and len(split.images) <= metrics.NUM_NEIGHBOURS:
            raise InputError(f"--evaluate needs more than {metrics.NUM_NEIGHBOURS} images in each split, but {name} of {data_dir} "
                             f"has {len(split.images)}.")
        if arguments.evaluate and len(split.heads(np.unique(splits["train"].positions))) < 2:
            raise InputError(f"--evaluate needs two people with all their slices in each split, but {name} of {data_dir} has not.")
    check_people(splits, config["data"]["fingerprints"], data_dir, run_dir)
    return splits


def check_people(splits, fingerprints, data_dir, run_dir):
    """Compares the data with those that the run began with: copies can be told by its own training people alone.

    Raises:
        InputError: if the training people are needed, and are others.
    """
    found = dataset.fingerprints(splits)
    if "train" in found and found["train"] != fingerprints["train"]:
        raise InputError(f"The training people in {data_dir} are not those that {run_dir} was trained on, so --evaluate and "
                         "--with-neighbours would miss copies; give its own data as --data-dir.")
    if found["test"] != fingerprints["test"]:
        print(f"Note: the test people in {data_dir} are not those of {run_dir}.")


def evaluate_samples(folder, arguments, vqvae, prior, splits):
    """Samples a slice at the position of each test image and judges them; and what the prior spends on people it has seen."""
    train, test = splits["train"], splits["test"]
    print(f"Sampling {len(test.images)} more slices, to judge beside the test people ...")
    seen = train.take(np.flatnonzero(np.isin(train.cases, np.unique(train.cases)[:test.num_people])))
    codes_seen = np.concatenate([vqvae.encode_to_codes(images) for images, _ in dataset.image_batches(seen, 32)])
    bits = metrics.bits_per_code(prior, codes_seen, seen.positions, *dataset.head_context(seen, prior, vqvae.settings["margin"]))
    samples = draw_samples(vqvae, prior, test.positions, arguments.seed, arguments.temperature)
    return {"bits_per_code_train": bits, **judge_samples(folder, samples, splits)}


def write_predictions(folder, arguments, config, vqvae, prior, splits):
    """Writes everything into the output folder, metrics.json last; returns the metrics."""
    test = splits["test"]
    print(f"Reconstructing {len(test.images)} test images ...")
    measured, details = metrics.evaluate(vqvae, prior, dataset.image_batches(test, 32), test.positions,
                                         *dataset.head_context(test, prior, vqvae.settings["margin"]))
    codes = details["codes"]
    indices, shown = write_reconstructions(folder, test, vqvae, details, arguments.num_examples, arguments.seed)
    if vqvae.image_size == 256 and not config["data"]["is_demo"]:  # as the template; the demo cohort is made from it
        write_template(folder, vqvae)
    positions = sample_positions(arguments.slice, arguments.num_samples)
    print(f"Sampling {len(positions)} new brains ...")
    samples = draw_samples(vqvae, prior, positions, arguments.seed, arguments.temperature)
    write_samples(folder, samples, positions, vqvae.settings["margin"])
    judged = min(metrics.NUM_HEADS, splits["train"].num_people) if arguments.evaluate else 0
    heads = write_heads(folder, vqvae, prior, arguments.heads, judged, arguments.seed, arguments.temperature)
    of_heads = {}
    if arguments.evaluate:
        measured |= evaluate_samples(folder, arguments, vqvae, prior, splits)
        of_heads = {"heads": judge_heads(folder, heads[:judged], vqvae, codes, splits)}
    neighbours = nearest_training(samples, splits["train"]) if arguments.with_neighbours else None
    title = f"VQ-VAE: {len(test.images)} test images, {len(samples)} samples"
    bits = metrics.bits_per_place(prior, codes[indices], test.positions[indices])
    figures.write_report(folder / "report.html", title, measured, shown, bits, codes,
                         figures.code_colours(vqvae.quantizer.embeddings), vqvae.settings["margin"], samples,
                         [f"slice {position}" for position in positions], neighbours, heads[:min(arguments.heads, SHOWN_HEADS)],
                         volumes.SLICE_SPACING, *(metrics.head_table(found) for found in of_heads.values()))
    cli.write_json(folder / "metrics.json", measured | of_heads)
    return measured | of_heads


def print_heads(measured):
    """Prints what `metrics.evaluate_heads` found, as a table of figures with their 95 % intervals."""
    table = metrics.head_table(measured)
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"{measured['num_heads']} sampled heads, with 95 % intervals:")
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print(measured["copy_test_says"])


# One's own images -----------------------------------------------------------------------------------------------------


def read_images(files, size):
    """Reads one's own images, brings them to the model's size and prints what was done to each file.

    Args:
        files: paths of PNGs and of NIfTI volumes (.nii, .nii.gz), each of which gives its 32 axial slices.
        size: side in pixels.

    Returns:
        A list of (name, file, images uint8 (N, size, size), positions), a file each. The positions are a list of N; None in it
        if a PNG's name, as `volumes.FILE_NAME`, does not tell it.

    Raises:
        InputError: if a file cannot be used.
    """
    found, names = [], set()
    for path in map(Path, files):
        stem = re.sub(r"(\.nii)?\.png$|\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)
        name = next(name for number in range(1, len(files) + 1)
                    if (name := stem if number == 1 else f"{stem}_{number}") not in names)
        if not path.is_file():
            raise InputError(f"{path} is not a file; give PNG images or NIfTI volumes.")
        if path.name.lower().endswith((".nii", ".nii.gz")):
            try:
                images = volumes.axial_slices(volumes.read_volume(path))
            except ValueError as error:
                raise InputError(f"{path} cannot be used as a volume ({error}); give another.") from error
            positions, done = list(range(len(images))), [f"{len(images)} axial slices"]
        else:
            image, done = read_png(path)
            named = volumes.FILE_NAME.fullmatch(path.name)
            known = named is not None and int(named[2]) < volumes.NUM_POSITIONS
            images, positions = image[np.newaxis], [int(named[2]) if known else None]
        names |= {name, *(f"{name}_slice_{position}" for position in positions)}
        images, resized = bring_to_size(images, size)
        print(f"{path}: {', '.join([*done, *resized]) or 'taken as it is'}.")
        found.append((name, str(path), images, positions))
    return found


def read_png(path):
    """Reads a grayscale PNG of any kind as (uint8 (height, width), what was done to it, a list of texts).

    Raises:
        InputError: if it is no PNG, is damaged, too large, or has colour or transparency.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if max(image.size) > LARGEST_SIDE:
                raise InputError(f"{path} is {image.width}x{image.height} pixels; the largest side allowed is {LARGEST_SIDE}.")
            if image.mode == "L":
                return np.asarray(image), []
            if image.mode.startswith("I"):
                deep = np.asarray(image).astype(np.float64)
                brightest = int(deep.max())
                done = f"16 bits scaled to 8 (its brightest, {brightest}, becomes 255)"
                return np.uint8(np.round(deep * 255 / max(brightest, 1))), [done]
            mode, channels = image.mode, np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        what = "is not a PNG image" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({error})"
        raise InputError(f"{path} {what}; give grayscale PNG images or NIfTI volumes.") from error
    if (channels[..., 3] < 255).any():
        raise InputError(f"{path} is partly transparent; save it as grayscale without transparency.")
    if (channels[..., :3] != channels[..., :1]).any():
        raise InputError(f"{path} is in colour; the model knows gray only, so convert it.")
    return channels[..., 0], [f"mode {mode} turned to gray (all its pixels are)"]


def bring_to_size(images, size):
    """Brings images to the model's size: padded with black; resampled first if they are larger, or less than half as large.

    Args:
        images: uint8 (N, height, width).
        size: side in pixels.

    Returns:
        (uint8 (N, size, size), what was done, a list of texts).
    """
    height, width = images.shape[1:]
    done, longer = [], max(height, width)
    if longer > size or 2 * longer < size:
        shape = tuple(max(1, round(length * size / longer)) for length in (height, width))
        images = np.stack([np.uint8(np.round(transform.resize(image / 255, shape, order=1, anti_aliasing=longer > size) * 255))
                           for image in images])
        done.append(f"resampled from {width}x{height} to {shape[1]}x{shape[0]} pixels")
    height, width = images.shape[1:]
    if (height, width) != (size, size):
        done.append(f"padded with black from {width}x{height} to {size}x{size} pixels")
    sides = [((size - length) // 2, (size - length + 1) // 2) for length in (height, width)]
    return np.pad(images, ((0, 0), *sides)), done


def fewest_bits(prior, codes, position):
    """The bits that the prior spends on one slice's codes, int (g, g), and its position: if None, that of the fewest bits."""
    positions = np.arange(prior.num_positions) if position is None else np.array([position])
    bits = metrics.bits_per_place(prior, np.repeat(codes[np.newaxis], len(positions), axis=0), positions).sum(axis=(1, 2))
    which = 0 if position is not None else np.log2(prior.num_positions)  # it has to be told, too
    return float(bits.min() + which), int(positions[bits.argmin()])


def bits_of_head(prior, images, codes, margin):
    """The bits that the prior spends on each slice of one head, float (N,): given those below, and the person, told once.

    Args:
        prior: a `modules.PixelCNN`.
        images: uint8 (N, H, W), all slices from the lowest up.
        codes: int (N, g, g), of these.
        margin: pixels of border without codes.
    """
    count = len(images)
    head = dataset.Split("given", images, np.zeros(count, np.int32), np.arange(count, dtype=np.int32))
    lengths = metrics.code_lengths(prior, codes, head.positions, *dataset.head_context(head, prior, margin))
    return lengths * codes[0].size + 8 * prior.person_size / count


def predict_images(folder, found, vqvae, prior):
    """Writes the reconstructions of one's own images, as `read_images` gives them, with their codes and metrics.json.

    Prints a table: the SSIM of each image and its bytes, coded by the prior; slices of a volume as those of one head.
    """
    rows, drawn = [], []
    print(f"{'image':32}{'SSIM':>8}{'bytes':>8}  slice position")
    for name, file, images, positions in found:
        codes, reconstructions = reconstruct(vqvae, images)
        np.save(folder / f"{name}_codes.npy", codes if len(codes) > 1 else codes[0])
        billed = ([fewest_bits(prior, codes[0], positions[0])] if len(images) == 1 else
                  zip(bits_of_head(prior, images, codes, vqvae.settings["margin"]).tolist(), positions))
        for image, reconstruction, some, position, (bits, place) in zip(images, reconstructions, codes, positions, billed):
            title = name if len(images) == 1 else f"{name}_slice_{position}"
            ssim = metrics.ssim(image / 255, reconstruction)
            for kind, picture in (("original", image), ("reconstruction", dataset.to_uint8(reconstruction * 2 - 1))):
                Image.fromarray(picture).save(folder / f"{title}_{kind}.png")
            rows.append({"image": title, "file": file, "ssim": ssim, "bytes": bits / 8, "slice": place,
                         "slice_known": position is not None})
            drawn.append((image / 255, reconstruction, some, f"SSIM {ssim:.3f}"))
            guess = "" if position is not None else " (unknown: that of the fewest bytes)"
            print(f"{title:32}{ssim:8.3f}{bits / 8:8.0f}  {place}{guess}")
    shown = np.unique(np.linspace(0, len(drawn) - 1, 4).round().astype(int))
    originals, reconstructions, codes, captions = zip(*(drawn[index] for index in shown))
    figures.reconstruction_grid(np.stack(originals), np.stack(reconstructions), np.stack(codes), captions,
                                figures.code_colours(vqvae.quantizer.embeddings), vqvae.settings["margin"],
                                folder / "reconstructions.png")
    cli.write_json(folder / "metrics.json", {"images": rows})


def read_codes(path, vqvae):
    """Reads codes, int32 (N, g, g), from a .npy file that holds them, or those of one image, (g, g).

    Raises:
        InputError: if it holds anything else.
    """
    grid, count = vqvae.grid_size, vqvae.quantizer.num_embeddings
    wanted = f"integers from 0 to {count - 1} of shape ({grid}, {grid}) or (N, {grid}, {grid})"
    try:
        codes = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false shape cannot fill the memory
        shape, kind = codes.shape, codes.dtype
    except Exception as error:  # a file from a stranger may fail in any way
        raise InputError(f"{path} is not a .npy file of codes; give {wanted}.") from error
    if shape[-2:] != (grid, grid) or len(shape) not in (2, 3) or not codes.size or kind.kind not in "iu":
        raise InputError(f"{path} holds {kind} of shape {shape}; codes of this run are {wanted}.")
    if codes.min() < 0 or codes.max() >= count:
        raise InputError(f"{path} holds numbers from {codes.min()} to {codes.max()}; codes of this run are {wanted}.")
    return np.asarray(codes, np.int32).reshape(-1, grid, grid)


def write_decoded(folder, codes, stem, vqvae):
    """Writes the images of codes, int32 (N, g, g), as STEM_NNNN.png."""
    for first in range(0, len(codes), 32):
        for number, image in enumerate(vqvae.decode_codes(codes[first:first + 32]).numpy()[..., 0], first):
            Image.fromarray(dataset.to_uint8(image)).save(folder / f"{stem}_{number:04d}.png")


def predict_own(arguments, run_dir, vqvae, prior):
    """Does what --images or --codes ask for; nothing is written before all that was given is read."""
    found = read_images(arguments.images, vqvae.image_size) if arguments.images else None
    codes = read_codes(arguments.codes, vqvae) if arguments.codes else None
    if found:
        images, positions = np.concatenate([file[2] for file in found]), np.zeros(0, np.int32)
        dataset.warn_of_lost_border(dataset.Split("given", images, positions, positions), vqvae.settings["margin"])
    folder = Path(arguments.output_dir or run_dir / "images")
    with cli.report_write_errors(folder, "give another --output-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        if found:
            predict_images(folder, found, vqvae, prior)
        else:
            write_decoded(folder, codes, Path(arguments.codes).stem, vqvae)
    print(f"Done: see {folder}.")


@cli.exit_on_input_error
def main(argv=None):
    """Writes reconstructions, samples and metrics.json to the output folder."""
    arguments = parse_arguments(argv)
    devices.prepare(exact=True)
    with devices.report_failures("free the GPU, or hide it with CUDA_VISIBLE_DEVICES=-1"):
        predict(arguments)


def predict(arguments):
    """Loads the run and the data, and writes what the arguments ask for."""
    run_dir = find_run(arguments.run_dir)
    config, vqvae, prior = load_run(run_dir)
    if arguments.images or arguments.codes:
        predict_own(arguments, run_dir, vqvae, prior)
        return
    splits = load_data(arguments, config, vqvae, run_dir)
    dataset.warn_of_lost_border(splits["test"], vqvae.settings["margin"])
    folder = Path(arguments.output_dir or run_dir / "predictions")
    with cli.report_write_errors(folder, "give another --output-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        measured = write_predictions(folder, arguments, config, vqvae, prior, splits)
    if arguments.export:
        with cli.report_write_errors(arguments.export, "give another --export", [tf.errors.OpError]):
            modules.export(vqvae, prior, arguments.export)
    of_heads = measured.pop("heads", None)
    print(json.dumps(measured, indent=2))
    if of_heads:
        print_heads(of_heads)
    print(f"Done: see {folder}.")


if __name__ == "__main__":
    main()
