"""Reconstructs test images with a trained run, measures them, and samples new brains.

    python predict.py                                        # the newest run
    python predict.py --run-dir runs/oasis --data-dir DIR --slice all
    python predict.py --evaluate                             # and are the samples good, and new?
    python predict.py --images scan.png head.nii.gz          # one's own images
    python predict.py --codes runs/oasis/images/scan_codes.npy
    python predict.py --write-dataset DIR --heads 100        # sampled heads as a data set that train.py reads
"""

if __name__ == "__main__":
    import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

import argparse
import csv
import dataclasses
import datetime
import itertools
from pathlib import Path
import re

import numpy as np
from PIL import Image
import tensorflow as tf

import dataset
import modules
from support import (
    cli,
    devices,
    figures,
    judge,
    metrics,
    orientation,
    report,
    runs,
    sampler,
    synthetic,
    template,
    volumes,
)
from support.cli import UserError
from support.files import write_json
from support.images import fit_to_square, in_chunks, read_own_png, to_uint8, to_unit
from support.runs import Run

PICTURED_HEADS = 3  # in head.png and report.html
RESULTS = ("original_vs_reconstructed_*.png", "sample_*_slice_*.png", "head_*.nii.gz", "report.html", "metrics.json",
           "per_image.csv", *(f"{name}.png" for name in ("samples", "head", "reconstructions", "errors", "template", "distances",
                                                         "tissue", "neighbours")))
NOISE_HEADS = 32  # that the judges must find
MEMBERS = 40  # training people, at most, whose code lengths are compared with the test people's


def parse_arguments(argv):
    """The command line."""
    parser = cli.script_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the PNG splits (default: the run's own, else as in train.py)")
    own = parser.add_mutually_exclusive_group()
    own.add_argument("--images", nargs="+", metavar="FILE", help="reconstruct these instead of the test split: grayscale PNGs of "
                     "any size, or NIfTI volumes")
    own.add_argument("--codes", metavar="FILE", help="decode the codes of a .npy file, as --images writes them, into images")
    own.add_argument("--write-dataset", metavar="DIR", help="write --heads sampled heads, and nothing else, as PNG splits")
    parser.add_argument("--num-examples", type=cli.number(int, 1), default=10, metavar="N",
                        help="test images to show (default: 10)")
    parser.add_argument("--num-samples", type=cli.number(int, 1), default=16, metavar="N",
                        help="single slices to sample (default: 16)")
    parser.add_argument("--slice", type=slice_argument, metavar="K", help="slice position of the samples, 0 (lowest) to 31, "
                        "or all for one sample of each (default: --num-samples spread over all)")
    parser.add_argument("--heads", type=cli.number(int, 0), default=1, metavar="N",
                        help="whole heads to sample, 32 slices of one new person each (default: 1)")
    parser.add_argument("--ventricles", type=quantile_argument, metavar="Q", help="size of the ventricles of the heads, from 0 to 1, "
                        "as a quantile among training people: the dark share of the brain's inner half, mean over slices (default: any)")
    parser.add_argument("--temperature", type=cli.number(float, 0), default=1.0, metavar="T",
                        help="of sampling: 1 is the model, less is blander (default: 1)")
    parser.add_argument("--seed", type=cli.number(int, 0, cli.MAX_SEED), default=0, metavar="S", help="of every draw (default: 0)")
    parser.add_argument("--evaluate", action="store_true",
                        help=f"also judge samples beside real people: a slice per test image, and up to {judge.NUM_HEADS} heads")
    parser.add_argument("--with-neighbours", action="store_true", help="show each sample's nearest training slice in report.html")
    parser.add_argument("--export", metavar="DIR",
                        help="also write encoder, decoder and both samplers as TensorFlow SavedModels")
    parser.add_argument("--output-dir", metavar="DIR", help="folder for the results (default: RUN/predictions; "
                        "with --images or --codes RUN/images)")
    arguments = parser.parse_args(argv)
    mode = next((f"--{name}".replace("_", "-") for name in ("images", "codes", "write_dataset")
                 if getattr(arguments, name) is not None), None)
    useless = ("output_dir", "num_samples", "num_examples") if mode == "--write-dataset" else ("ventricles",)
    for name in ("data_dir", "slice", *useless, "evaluate", "with_neighbours", "export") if mode else ():
        if getattr(arguments, name) is not parser.get_default(name):  # slice 0 equals False
            raise UserError(f"--{name.replace('_', '-')} is of no use with {mode}; leave out the one or the other.")
    if mode == "--write-dataset" and arguments.heads < len(volumes.SPLITS):
        raise UserError("--write-dataset needs --heads: how many to sample, at least 3, one for each split.")
    if arguments.evaluate and arguments.ventricles is not None:
        raise UserError("--evaluate judges the heads as the model samples them; leave out --ventricles.")
    return arguments


def quantile_argument(text):
    """An argparse type: a number from 0 to 1."""
    value = cli.number(float, 0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def slice_argument(text):
    """An argparse type: "all" or a slice position."""
    if text == "all":
        return text
    position = cli.number(int, 0)(text)
    if position >= volumes.NUM_POSITIONS:
        raise argparse.ArgumentTypeError(f"{position} is past the last slice, {volumes.NUM_POSITIONS - 1}")
    return position


# The run and its data -------------------------------------------------------------------------------------------------


def find_run(run_dir):
    """The `Run` in a folder, or the newest in runs/ that has both models, or the pretrained one.

    Raises:
        UserError: if there is none.
    """
    if run_dir is None:
        run_dir = runs.newest()
        if run_dir is None and Run.has_models(runs.PRETRAINED):
            print("There is no trained run in runs/: using the pretrained weights, of simulated people.")
            run_dir = runs.PRETRAINED
        if run_dir is None:
            raise UserError("There is no trained run in runs/; run train.py first, or name one with --run-dir.")
    if not Run.has_models(Path(run_dir)):
        raise UserError(f"{run_dir} holds no trained run (config.json, vqvae.keras and pixelcnn.keras); "
                         "train one with train.py --run-dir.")
    return Run.load(run_dir)


def load_models(run):
    """Loads a run's VQ-VAE and PixelCNN.

    Raises:
        UserError: if a file is damaged, or they do not belong together.
    """
    try:
        vqvae, prior = (modules.load_model(run.model_path(name), compile=False) for name in ("vqvae", "pixelcnn"))
    except ValueError as error:
        raise UserError(f"The run in {run.folder} cannot be loaded: {error}; train it again.") from error
    if not isinstance(vqvae, modules.VQVAE) or not isinstance(prior, modules.PixelCNN):
        raise UserError(f"In {run.folder}, vqvae.keras or pixelcnn.keras holds the other's model; train it again.")
    expected = run.config["vqvae"]
    if expected != {name: vqvae.settings.get(name) for name in expected}:
        raise UserError(f"{run.model_path('vqvae')} is not the model that config.json describes; put back the one or the other.")
    try:
        modules.check_match(vqvae, prior)
    except ValueError as error:
        raise UserError(f"{run.model_path('pixelcnn')} does not go with vqvae.keras: {error}; put back the two that belong "
                         "together.") from error
    return vqvae, prior


def find_data(arguments, run):
    """The folder of the splits: --data-dir, else the run's own, else as in train.py; None if its data are not here.

    Raises:
        UserError: if they are not here, but an option needs them.
    """
    own = run.config["data"]
    if arguments.data_dir or not Path(own["folder"]).is_dir():
        if own["is_demo"] and not arguments.data_dir:
            return template.make_demo_cohort()
        if folder := dataset.find_oasis(arguments.data_dir):
            return folder
        if arguments.evaluate or arguments.with_neighbours:
            raise UserError(f"The data of {run.folder}, {own['folder']}, are not here; say with --data-dir where they are.")
        return None
    return Path(own["folder"])


def load_data(arguments, run, vqvae):
    """The splits that are needed: test; for --with-neighbours train, for --evaluate all three; or None if there are no data.

    Raises:
        UserError: if they are unusable, do not fit the model, or are not those that the judgement needs.
    """
    data_dir = find_data(arguments, run)
    says = (f"The data of {run.folder}, {run.config['data']['folder']}, are not here, so this run is not measured and nothing is "
            "reconstructed; it samples only. With --data-dir it does both.")
    if data_dir is None:
        print(says)
        return None
    names = volumes.SPLITS if arguments.evaluate else ["train", "test"] if arguments.with_neighbours else ["test"]
    splits = dataset.load_splits(data_dir, names, run.settings["limit"], front=run.config["data"]["front"])
    height, width = splits["test"].images.shape[1:]
    if (height, width) != (vqvae.image_size, vqvae.image_size):
        if not arguments.data_dir and not arguments.evaluate and not arguments.with_neighbours:
            print(says)  # others were found in their place
            return None
        raise UserError(f"The images in {data_dir} are {width}x{height} pixels but the run in {run.folder} was trained on "
                         f"{vqvae.image_size}x{vqvae.image_size}; give --data-dir or --run-dir to match.")
    for name, split in splits.items() if arguments.evaluate else ():
        if len(split.images) <= metrics.NUM_NEIGHBOURS:
            raise UserError(f"--evaluate needs more than {metrics.NUM_NEIGHBOURS} images in each split, but {name} of {data_dir} "
                             f"has {len(split.images)}.")
        if not np.isin(split.positions, splits["train"].positions).all():
            raise UserError(f"--evaluate needs the same slices in each split, but {name} of {data_dir} has some that train has not.")
        if len(split.head_indices(np.unique(splits["train"].positions))) < 2:
            raise UserError(f"--evaluate needs two people with all their slices in each split, but {name} of {data_dir} has not.")
    check_people(splits, data_dir, run)
    return splits


def check_people(splits, data_dir, run):
    """Compares the data with those that the run began with: copies can only be recognised among its own training people.

    Raises:
        UserError: if the training people are needed, and are others.
    """
    expected, fingerprints = run.config["data"]["fingerprints"], dataset.fingerprints(splits)
    if "train" in fingerprints and fingerprints["train"] != expected["train"]:
        raise UserError(f"The training people in {data_dir} are not those that {run.folder} was trained on, so --evaluate and "
                         "--with-neighbours would miss copies; give its own data as --data-dir.")
    if fingerprints["test"] != expected["test"]:
        print(f"Note: the test people in {data_dir} are not those of {run.folder}.")


# Reconstructions ------------------------------------------------------------------------------------------------------


def decode(vqvae, codes):
    """Codes int (N, g, g) -> images, float (N, H, W) in [0, 1]."""
    return in_chunks(lambda chunk: to_unit(vqvae.decode_codes(chunk)), codes, size=16)


def decode_to_bytes(vqvae, codes):
    """Codes int (N, g, g) -> uint8 (N, H, W): as floats, many images would not fit into memory."""
    return in_chunks(lambda chunk: to_uint8(vqvae.decode_codes(chunk).numpy()[..., 0]), codes, size=16)


def decode_heads(vqvae, heads):
    """Codes of heads, int (N, S, g, g) -> uint8 (N, S, H, W)."""
    return np.stack([decode_to_bytes(vqvae, head) for head in heads])


def reconstruct(vqvae, images):
    """uint8 (N, H, W) -> (codes, int32 (N, g, g); reconstructions, float (N, H, W) in [0, 1])."""
    codes = in_chunks(lambda chunk: vqvae.encode_to_codes(dataset.normalise(chunk)[..., tf.newaxis]), images, size=16)
    return codes, decode(vqvae, codes)


def write_reconstructions(folder, split, vqvae, codes, details, count, seed):
    """Writes pictures and a table of the reconstructions of a split.

    One PNG per example, original beside reconstruction; reconstructions.png of four people at four positions; errors.png over
    all images; per_image.csv.

    Args:
        folder: where to.
        split: a `dataset.Split`.
        vqvae: a `modules.VQVAE`.
        codes: int (N, g, g), of the split.
        details: of the split, from `metrics.evaluate`.
        count: examples.
        seed: of their draw.

    Returns:
        The indices of the examples, int (count,).
    """
    figures.plot_errors(details["per_image"]["ssim"], split.positions, details["error_map"], vqvae.margin, folder / "errors.png")
    write_table(folder / "per_image.csv", split, details["per_image"])
    indices = split.examples(4)
    figures.reconstruction_grid(split.images[indices] / 255, decode(vqvae, codes[indices]), codes[indices],
                                example_captions(split, details, indices), figures.code_colours(vqvae.quantizer.embeddings),
                                vqvae.margin, folder / "reconstructions.png")
    indices = np.sort(np.random.default_rng(seed).choice(len(split.images), min(count, len(split.images)), replace=False))
    for index, reconstruction in zip(indices, decode(vqvae, codes[indices])):
        pair = np.hstack([split.images[index], to_uint8(reconstruction * 2 - 1)])
        name = f"case_{split.cases[index]:03d}_slice_{split.positions[index]}"
        Image.fromarray(pair).save(folder / f"original_vs_reconstructed_{name}.png")
    return indices


def example_captions(split, details, indices):
    """What stands below a reconstruction: person, slice and SSIM."""
    return [f"case {split.cases[index]}, slice {split.positions[index]}\nSSIM {details['per_image']['ssim'][index]:.3f}"
            for index in indices]


def write_table(path, split, per_image):
    """Writes what was measured of each image as CSV: case, slice, then the columns of `per_image`."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "slice", *per_image))
        for row in zip(split.cases, split.positions, *per_image.values()):
            writer.writerow((*row[:2], *(f"{value:.6g}" for value in row[2:])))


# Samples --------------------------------------------------------------------------------------------------------------


def sample_positions(slice_, num_samples, slice_positions):
    """The slice positions to sample: one for all, each once, or spread evenly.

    Raises:
        UserError: if training people have no such slice.
    """
    if slice_ == "all":
        return np.array(slice_positions)
    if slice_ is None:
        return np.array(slice_positions)[np.linspace(0, len(slice_positions) - 1, num_samples).round().astype(int)]
    if slice_ not in slice_positions:
        raise UserError(f"--slice {slice_}: the training people have the slices {', '.join(map(str, slice_positions))} only.")
    return np.full(num_samples, slice_)


def write_samples(folder, samples, positions, margin):
    """Writes samples.png and a PNG of each sample."""
    for number, (image, position) in enumerate(zip(samples, positions)):
        Image.fromarray(to_uint8(image * 2 - 1)).save(folder / f"sample_{number:04d}_slice_{position}.png")
    figures.sample_grid(samples, positions, margin, folder / "samples.png")


def geometry_of_heads(geometry, slice_positions):
    """The `volumes.SliceGeometry` of heads that have only some slice positions, in regular steps."""
    step = int(np.median(np.diff(slice_positions))) if len(slice_positions) > 1 else 1
    return dataclasses.replace(geometry, spacing=geometry.spacing * step, lowest=geometry.lowest + geometry.spacing * slice_positions[0])


def write_heads(folder, heads, positions, geometry):
    """Writes sampled heads, uint8 (N, S, H, W), of slice positions (S,), as NIfTI volumes, and head.png of the first few."""
    for number, head in enumerate(heads):
        volumes.write_nifti(head, folder / f"head_{number:03d}.nii.gz", geometry)
    if len(heads):
        figures.head_figure(heads[:PICTURED_HEADS], positions, geometry, folder / "head.png")


def write_dataset(arguments, run, vqvae, prior):
    """Does what --write-dataset asks for; head i is the one that --heads gives without it."""
    folder, count, seed, temperature = arguments.write_dataset, arguments.heads, arguments.seed, arguments.temperature
    persons = sampler.steered_people(run, prior, count, seed, arguments.ventricles)
    batches = sampler.heads_in_batches(prior, count, seed, temperature, persons=persons)
    heads = (decode_to_bytes(vqvae, head) for batch in batches for head in batch)
    geometry = geometry_of_heads(run.geometry, prior.slice_positions)
    description = synthetic.describe(run, geometry, count, seed, temperature, arguments.ventricles, prior.slice_positions)
    with cli.message_on_signals(f"Stopped: {folder} was not written."):
        synthetic.write_heads(folder, heads, description)
    counts = ", ".join(f"{number} {name}" for name, number in description["heads"].items())
    print(f"Done: {count} heads in {folder} ({counts}). {description['says']} {description['prior_says']}")


# Judgement ------------------------------------------------------------------------------------------------------------


def judge_all(folder, arguments, vqvae, prior, splits, coded, test_bits, heads):
    """Measures samples and heads beside people, all as reconstructions, and draws the results.

    Args:
        folder: where distances.png, tissue.png and neighbours.png go.
        arguments: the command line.
        vqvae: a `modules.VQVAE`.
        prior: a `modules.PixelCNN`.
        splits: dict of all three `dataset.Split`.
        coded: dict of their `dataset.CodedSplit`.
        test_bits: float (N,), the bits per code of each test image in its head.
        heads: uint8 (N, S, H, W), sampled.

    Returns:
        (metrics of single slices; metrics of heads).
    """
    reconstructed = {name: dataclasses.replace(split, images=decode_to_bytes(vqvae, coded[name].codes[0]))
                     for name, split in splits.items()}
    return judge_heads(folder, heads, vqvae, prior, splits, reconstructed, coded["train"], test_bits)


def judge_heads(folder, heads, vqvae, prior, splits, reconstructed, coded_train, test_bits):
    """Measures whole heads: see `judge.evaluate_heads` and `judge.membership`; draws the first few over the nearest people."""
    print("Judging whole heads ...")
    positions = prior.slice_positions
    image_indices = {name: split.head_indices(positions) for name, split in splits.items()}
    people_heads = {name: reconstructed[name].images[indices] for name, indices in image_indices.items()}
    originals = splits["train"].images[image_indices["train"]]
    noise_codes = judge.mix_people(coded_train.codes[0][image_indices["train"][:NOISE_HEADS]], axes=3)
    measured, details = judge.evaluate_heads(heads, people_heads, originals, decode_heads(vqvae, noise_codes))
    train_bits = metrics.code_lengths_of_heads(prior, coded_train, image_indices["train"], MEMBERS)
    measured |= {"git_commit": runs.git_commit(), "bits_per_code_train": float(train_bits.mean()),
                 **judge.membership(train_bits, test_bits[image_indices["test"]].mean(axis=1))}
    draw_neighbours(folder, heads, splits["train"], originals, image_indices["train"], positions, details)
    return measured


def draw_neighbours(folder, heads, train, originals, image_indices, positions, details):
    """Draws the first sampled heads over the training heads nearest to them."""
    columns = np.unique(np.linspace(0, len(positions) - 1, 4).round().astype(int))
    neighbours, captions = [], []
    for index, distance, is_mirrored in zip(*(details[name][:PICTURED_HEADS] for name in ("nearest", "distances", "mirrored"))):
        head = originals[index][columns]
        neighbours.append(head[..., ::-1] if is_mirrored else head)
        case = train.cases[image_indices[index, 0]]
        captions += [f"case {case}, slice {positions[column]}\nhead's distance {distance:.1f}" for column in columns]
    figures.neighbour_grid(np.concatenate(heads[:PICTURED_HEADS, columns]) / 255, np.concatenate(neighbours), captions,
                           folder / "neighbours.png")


# All together ---------------------------------------------------------------------------------------------------------


def write_predictions(folder, arguments, run, vqvae, prior, splits, persons):
    """Writes everything into the output folder, metrics.json last; returns the metrics, or None without data.

    `persons`, float (heads, P), are those of the heads; None for new ones.
    """
    geometry = run.geometry
    page = new_report(run, arguments, vqvae, geometry_of_heads(geometry, prior.slice_positions))
    page.head_positions = list(prior.slice_positions)
    measured = None
    if splits:
        names = splits if arguments.evaluate else ["test"]
        print(f"Encoding {sum(len(splits[name].images) for name in names):,} images ...")
        coded = {name: dataset.encode_split(vqvae, prior, splits[name]) for name in names}
        measured, test_bits = measure(folder, arguments, run, vqvae, prior, splits["test"], coded["test"], geometry, page)
    positions = sample_positions(arguments.slice, arguments.num_samples, prior.slice_positions)
    print(f"Sampling {len(positions)} slices ...")
    samples = decode(vqvae, prior.sample(positions, arguments.seed, arguments.temperature))
    write_samples(folder, samples, positions, vqvae.margin)
    page.samples, page.sample_captions = samples, [f"slice {position}" for position in positions]
    num_judged = min(judge.NUM_HEADS, splits["train"].num_people) if arguments.evaluate else 0
    count = max(arguments.heads, num_judged)
    if count:
        print(f"Sampling whole heads: {count} ...")
        heads = decode_heads(vqvae, sampler.sample_heads(prior, count, arguments.seed, arguments.temperature, persons=persons))
        write_heads(folder, heads[:arguments.heads], prior.slice_positions, page.geometry)
        page.heads = heads[:min(arguments.heads, PICTURED_HEADS)]
    if arguments.evaluate:
        of_heads = judge_all(folder, arguments, vqvae, prior, splits, coded, test_bits, heads[:num_judged])
        page.head_table = judge.head_table(of_heads)
    page.metrics = measured
    report.write_report(folder / "report.html", page)
    if measured and arguments.evaluate:
        measured |= {"heads": of_heads}
    if measured:
        write_json(folder / "metrics.json", measured)
    return measured


def new_report(run, arguments, vqvae, geometry):
    """An empty `report.Report` of a run."""
    data_dir = arguments.data_dir or run.config["data"]["folder"]
    facts = {"run": str(run.folder), "data": data_dir, "date": datetime.date.today().isoformat(), "seed": str(arguments.seed),
             "commit of training": str(run.config["git_commit"])}
    return report.Report(title=f"VQ-VAE and PixelCNN: {run.folder.name}", facts=facts, margin=vqvae.margin,
                         notice=synthetic.notice_of(data_dir) or run.notice, geometry=geometry,
                         colours=figures.code_colours(vqvae.quantizer.embeddings))


def measure(folder, arguments, run, vqvae, prior, test, coded, geometry, page):
    """Reconstructs and measures the test images; fills the report; returns the metrics, and the bits per code of each image."""
    print(f"Reconstructing {len(test.images)} test images ...")
    codes = coded.codes[0]
    measured, details = metrics.evaluate(vqvae, prior, dataset.image_batches(test, 32), coded, test.cases)
    indices = write_reconstructions(folder, test, vqvae, codes, details, arguments.num_examples, arguments.seed)[:10]
    page.examples = report.Examples(test.images[indices] / 255, decode(vqvae, codes[indices]), codes[indices],
                                    metrics.bits_per_place(prior, coded, indices), example_captions(test, details, indices))
    page.all_codes = codes
    return measured, details["per_image"]["bits_per_code"]


# One's own images -----------------------------------------------------------------------------------------------------


def read_images(files, run, size, slice_positions):
    """Reads one's own images, brings them to the model's size and prints what was done to each file.

    Args:
        files: paths of PNGs, and of volumes (see `volumes.read_slices`), each of which gives its axial slices.
        run: the `Run`: volumes are cut at the heights of its slices, and PNGs named like its data are turned like these.
        size: side in pixels.
        slice_positions: those of the model, which a sampled head has too.

    Returns:
        A list of (name, file, images uint8 (N, size, size), positions), a file each. The positions are a list of N; None in it
        if a PNG's name, as `volumes.FILE_NAME`, does not tell it.

    Raises:
        UserError: if a file cannot be used.
    """
    contents, names = [], set()
    for path in map(Path, files):
        stem = re.sub(r"(\.nii)?\.png$|\.nii(\.gz)?$|\.(mgz|hdr|img)$", "", path.name, flags=re.IGNORECASE)
        if not path.is_file():
            raise UserError(f"{path} is not a file; give PNG images or NIfTI volumes.")
        is_volume = path.name.lower().endswith(volumes.VOLUME_ENDINGS)
        if is_volume:
            try:
                images, notes = volumes.read_slices(path, run.geometry)
            except ValueError as error:
                raise UserError(f"{path} cannot be used as a volume: it {error}.") from error
            positions = list(slice_positions) if len(images) == len(slice_positions) else list(range(len(images)))
            notes = [f"{len(images)} axial slices", *notes]
        else:
            image, notes = read_own_png(path)
            match = volumes.FILE_NAME.fullmatch(path.name)
            position = int(match[2]) if match and int(match[2]) < volumes.NUM_POSITIONS else None
            images, positions = image[np.newaxis], [position]
            if match and run.config["data"]["front"] not in (None, "up"):
                images = orientation.turn(images, run.config["data"]["front"])
                notes.append("turned front up, as the slices of the run's data")
        candidates = (stem if number == 1 else f"{stem}_{number}" for number in itertools.count(1))
        name = next(name for name in candidates if names.isdisjoint({name, *image_titles(name, positions)}))
        names |= {name, *image_titles(name, positions)}
        images, changes = fit_to_square(images, size, is_volume)
        print(f"{path}: {', '.join([*notes, *changes]) or 'taken as it is'}.")
        contents.append((name, str(path), images, positions))
    return contents


def image_titles(name, positions):
    """The names, without ending, of what is written of each image of a file."""
    return [name] if len(positions) == 1 else [f"{name}_slice_{position}" for position in positions]


def bits_of_head(prior, coded):
    """The bits of each slice of one head, float (N,): given those below, and an equal share of the person's."""
    return (metrics.code_lengths(prior, coded) + metrics.person_bits_per_code(coded)) * coded.codes[0, 0].size


def predict_images(folder, files, vqvae, prior):
    """Writes the reconstructions of one's own images, as `read_images` gives them, with their codes and metrics.json.

    Prints a table: the SSIM of each image and its bytes, coded by the prior; slices of a volume as those of one head.
    """
    rows, examples = [], []
    print(f"{'image':32}{'SSIM':>8}{'bytes':>8}  slice position")
    for name, path, images, positions in files:
        codes, reconstructions = reconstruct(vqvae, images)
        np.save(folder / f"{name}_codes.npy", codes if len(codes) > 1 else codes[0])
        if len(images) == 1:
            costs = [(float('nan'), positions[0])]
        else:
            head = dataset.Split.from_heads(images[np.newaxis], positions)
            costs = zip(bits_of_head(prior, dataset.encode_split(vqvae, prior, head)), positions)
        rows_of_file = zip(image_titles(name, positions), images, reconstructions, codes, positions, costs)
        for title, image, reconstruction, grid, position, (bits, used_position) in rows_of_file:
            ssim = metrics.ssim(image / 255, reconstruction)
            for kind, picture in (("original", image), ("reconstruction", to_uint8(reconstruction * 2 - 1))):
                Image.fromarray(picture).save(folder / f"{title}_{kind}.png")
            rows.append({"image": title, "file": path, "ssim": ssim, "bytes": float(bits) / 8, "slice": used_position,
                         "slice_known": position is not None})
            examples.append((image / 255, reconstruction, grid, f"SSIM {ssim:.3f}"))
            guess = "" if position is not None else " (unknown: that of the fewest bytes)"
            print(f"{title:32}{ssim:8.3f}{bits / 8:8.0f}  {used_position}{guess}")
    indices = np.unique(np.linspace(0, len(examples) - 1, 4).round().astype(int))
    originals, reconstructions, codes, captions = zip(*(examples[index] for index in indices))
    figures.reconstruction_grid(np.stack(originals), np.stack(reconstructions), np.stack(codes), captions,
                                figures.code_colours(vqvae.quantizer.embeddings), vqvae.margin, folder / "reconstructions.png")
    write_json(folder / "metrics.json", {"images": rows})


def read_codes(path, vqvae):
    """Reads codes, int32 (N, g, g), from a .npy file that holds them, or those of one image, (g, g).

    Raises:
        UserError: if it holds anything else.
    """
    grid, count = vqvae.grid_size, vqvae.quantizer.num_embeddings
    wanted = f"integers from 0 to {count - 1} of shape ({grid}, {grid}) or (N, {grid}, {grid})"
    try:
        codes = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false shape cannot fill the memory
        shape, kind = codes.shape, codes.dtype
    except Exception as error:  # a file from a stranger may fail in any way
        raise UserError(f"{path} is not a .npy file of codes; give {wanted}.") from error
    if shape[-2:] != (grid, grid) or len(shape) not in (2, 3) or not codes.size or kind.kind not in "iu":
        raise UserError(f"{path} holds {kind} of shape {shape}; codes of this run are {wanted}.")
    if codes.min() < 0 or codes.max() >= count:
        raise UserError(f"{path} holds numbers from {codes.min()} to {codes.max()}; codes of this run are {wanted}.")
    return np.asarray(codes, np.int32).reshape(-1, grid, grid)


def write_decoded(folder, codes, stem, vqvae):
    """Writes the images of codes, int32 (N, g, g), as STEM_NNNN.png."""
    for first in range(0, len(codes), 32):
        for number, image in enumerate(vqvae.decode_codes(codes[first:first + 32]).numpy()[..., 0], first):
            Image.fromarray(to_uint8(image)).save(folder / f"{stem}_{number:04d}.png")


def predict_own(arguments, run, vqvae, prior):
    """Does what --images or --codes ask for; all input is read before anything is written."""
    files = read_images(arguments.images, run, vqvae.image_size, prior.slice_positions) if arguments.images else None
    codes = read_codes(arguments.codes, vqvae) if arguments.codes else None
    if files:
        dataset.warn_of_lost_border("given", np.concatenate([images for *_, images, _ in files]), vqvae.margin)
    folder = Path(arguments.output_dir or run.results_folder("images"))
    folder.mkdir(parents=True, exist_ok=True)
    if files:
        predict_images(folder, files, vqvae, prior)
    else:
        write_decoded(folder, codes, Path(arguments.codes).stem, vqvae)
    print(f"Done: see {folder}.")


@cli.exit_on_user_error
def main(argv=None):
    """Writes reconstructions, samples and metrics.json to the output folder."""
    arguments = parse_arguments(argv)
    devices.prepare(exact=True)
    with devices.report_failures("free the GPU, or hide it with CUDA_VISIBLE_DEVICES=-1"):
        predict(arguments)


def predict(arguments):
    """Loads the run and the data, and writes what the arguments ask for."""
    run = find_run(arguments.run_dir)
    vqvae, prior = load_models(run)
    if arguments.images or arguments.codes:
        predict_own(arguments, run, vqvae, prior)
        return
    if arguments.write_dataset is not None:
        write_dataset(arguments, run, vqvae, prior)
        return
    splits = load_data(arguments, run, vqvae)
    if splits:
        dataset.warn_of_lost_border("test", splits["test"].images, vqvae.margin)
    sample_positions(arguments.slice, arguments.num_samples, prior.slice_positions)  # refused before anything is written
    persons = sampler.steered_people(run, prior, arguments.heads, arguments.seed, arguments.ventricles)
    folder = Path(arguments.output_dir or run.results_folder("predictions"))
    if folder.resolve() == run.folder.resolve():
        raise UserError(f"--output-dir {folder} is the folder of the run; give another.")
    folder.mkdir(parents=True, exist_ok=True)
    remove_results(folder)
    measured = write_predictions(folder, arguments, run, vqvae, prior, splits, persons)
    if arguments.export:
        sampler.export(vqvae, prior, arguments.export)
    if measured:
        print_results(measured, splits["test"])
    print(f"Done. Open {folder / 'report.html'}")


def remove_results(folder):
    """Removes what an earlier call wrote, so that all files of a folder are of one call."""
    for pattern in RESULTS:
        for path in folder.glob(pattern):
            path.unlink()


def print_results(measured, test):
    """Prints the main results in words."""
    sd = f" ± {measured['ssim_sd']:.3f}" if "ssim_sd" in measured else ""
    print(f"Of {len(test.images)} images of {test.num_people} test people: SSIM {measured['ssim']:.3f}{sd}, inside the brain "
          f"{measured['ssim_foreground']:.3f}; {measured['bits_per_code']:.2f} bits per code, {measured['bytes_per_image']:.0f} bytes "
          "per image.")
    if "heads" in measured:
        judge.print_heads(measured["heads"])


if __name__ == "__main__":
    main()
