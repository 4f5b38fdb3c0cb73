"""Reconstructs test images with a trained run, measures them, and samples new brains.

    python predict.py                                        # the newest run
    python predict.py --run-dir runs/oasis --data-dir DIR --slice all
    python predict.py --evaluate                             # and are the samples good, and new?
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import cli
from cli import InputError
import dataset
import figures
import metrics
import modules
import volumes

SHOWN_HEADS = 3  # in pictures


def parse_arguments(argv):
    """The command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the PNG splits (default: the run's own, else as in train.py)")
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
    parser.add_argument("--seed", type=cli.number(int, 0, cli.SEEDS), default=0, metavar="S", help="of every draw (default: 0)")
    parser.add_argument("--evaluate", action="store_true",
                        help=f"also judge samples beside real people: a slice per test image, and up to {metrics.NUM_HEADS} heads")
    parser.add_argument("--with-neighbours", action="store_true", help="show each sample's nearest training slice in report.html")
    parser.add_argument("--export", metavar="DIR", help="also write encoder, decoder and sampler as TensorFlow SavedModels")
    parser.add_argument("--output-dir", metavar="DIR", help="folder for the results (default: RUN/predictions)")
    return parser.parse_args(argv)


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
        model = config["model"]
        config["settings"]["limit"], config["data"]["folder"]  # needed later; if missing, fail here
        vqvae, prior = (modules.load_model(run_dir / name, compile=False) for name in ("vqvae.keras", "pixelcnn.keras"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The run in {run_dir} cannot be loaded: {error}; train it again.") from error
    if not isinstance(vqvae, modules.VQVAE) or not isinstance(prior, modules.PixelCNN):
        raise InputError(f"In {run_dir}, vqvae.keras or pixelcnn.keras holds the other's model; train it again.")
    if any(vqvae.settings[key] != value for key, value in model.items()):
        raise InputError(f"{run_dir / 'vqvae.keras'} is not the model that config.json describes; put back the one or the other.")
    if prior.settings["codebook_digest"] != vqvae.quantizer.digest():
        raise InputError(f"{run_dir / 'pixelcnn.keras'} was trained on the codes of another codebook than that of vqvae.keras; "
                         "put back the two that belong together.")
    return config, vqvae, prior


def write_reconstructions(folder, split, codes, reconstructions, count, seed, num_embeddings):
    """Writes original beside reconstruction as one PNG per example, and reconstructions.png of the first ten.

    Returns:
        What `figures.write_report` shows of these ten: originals, reconstructions, codes, SSIM.
    """
    drawn = np.sort(np.random.default_rng(seed).choice(len(codes), min(count, len(codes)), replace=False))
    originals = split.images[drawn] / 255
    ssims = [metrics.ssim(*pair) for pair in zip(originals, reconstructions[drawn])]
    for number, index in enumerate(drawn):
        pair = np.hstack([split.images[index], dataset.to_uint8(reconstructions[index] * 2 - 1)])
        Image.fromarray(pair).save(folder / f"original_vs_reconstructed_{number:04d}.png")
    shown = originals[:10], reconstructions[drawn[:10]], codes[drawn[:10]], ssims[:10]
    figures.reconstruction_grid(*shown, num_embeddings, folder / "reconstructions.png")
    return shown


def draw_samples(vqvae, prior, positions, seed, temperature):
    """Samples one brain per slice position: float (N, H, W) in [0, 1]."""
    codes = prior.sample(positions, seed, temperature)
    return np.concatenate([metrics.to_unit(vqvae.decode_codes(codes[i:i + 16])) for i in range(0, len(codes), 16)])


def write_samples(folder, samples, positions):
    """Writes samples.png and a PNG of each sample."""
    for number, image in enumerate(samples):
        Image.fromarray(dataset.to_uint8(image * 2 - 1)).save(folder / f"sample_{number:04d}.png")
    figures.sample_grid(samples, positions, folder / "samples.png")


def write_heads(folder, vqvae, prior, count, judged, seed, temperature):
    """Samples whole heads, the slices from the lowest up; writes `count` as NIfTI volumes, and head.png of the first few.

    Returns:
        uint8 (N, 32, H, W), N the larger one of `count` and `judged`.
    """
    if not max(count, judged):
        return []
    print(f"Sampling whole heads: {max(count, judged)} ...")
    codes = prior.sample_heads(max(count, judged), seed, temperature, batch_size=32)
    # In uint8, as people's slices are: many heads do not fit into memory as floats.
    heads = np.stack([dataset.to_uint8(vqvae.decode_codes(head).numpy()[..., 0]) for head in codes])
    for number, head in enumerate(heads[:count]):
        volumes.write_nifti(head, folder / f"head_{number:03d}.nii.gz")
    if count:
        figures.head_figure(heads[:min(count, SHOWN_HEADS)], volumes.SLICE_SPACING, folder / "head.png")
    return heads


def nearest_training(samples, train):
    """The training image nearest to each sample, uint8 (N, H, W)."""
    features_of = metrics.fit_features(train.images)
    return train.images[metrics.nearest_training(features_of(samples), features_of(train.images))[1]]


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


def judge_heads(folder, heads, reconstructions, splits):
    """Measures whole heads against people, and draws the first few, each over its nearest training person.

    Args:
        folder: where neighbours.png goes.
        heads: uint8 (N, 32, H, W), sampled.
        reconstructions: float (T, H, W) in [0, 1], of the test images.
        splits: dict of all three `dataset.Split`.

    Returns:
        The dict of metrics of `metrics.evaluate_heads`.
    """
    train, test = splits["train"], splits["test"]
    positions = np.unique(train.positions)
    rows = {name: split.heads(positions) for name, split in splits.items()}
    people = {name: split.images[rows[name]] for name, split in splits.items()}
    heads = heads[:, positions]
    measured, details = metrics.evaluate_heads(heads, dataset.to_uint8(reconstructions[rows["test"]] * 2 - 1), people)
    places = np.unique(np.linspace(0, len(positions) - 1, 8).round().astype(int))
    nearest = details["nearest"][:SHOWN_HEADS]
    captions = [f"case {train.cases[rows['train'][person, 0]]}, slice {positions[place]}\nhead's distance {distance:.1f}"
                for person, distance in zip(nearest, details["distances"]) for place in places]
    figures.neighbour_grid(np.concatenate(heads[:SHOWN_HEADS, places]) / 255, np.concatenate(people["train"][nearest][:, places]),
                           captions, folder / "neighbours.png")
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
        InputError: if they are unusable, or do not fit the model.
    """
    data_dir = arguments.data_dir or config["data"]["folder"]
    if not Path(data_dir).is_dir():  # the run was trained elsewhere
        data_dir, _ = dataset.find_data(arguments.data_dir)
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
    return splits


def evaluate_samples(folder, arguments, vqvae, prior, splits):
    """Samples a slice at the position of each test image and judges them; and what the prior spends on people it has seen."""
    train, test = splits["train"], splits["test"]
    print(f"Sampling {len(test.images)} more slices, to judge beside the test people ...")
    seen = train.take(np.flatnonzero(np.isin(train.cases, np.unique(train.cases)[:test.num_people])))
    codes_seen = np.concatenate([vqvae.encode_to_codes(images) for images, _ in dataset.image_batches(seen, 32)])
    bits = metrics.bits_per_code(prior, codes_seen, seen.positions, *dataset.head_context(seen, prior, vqvae.settings["margin"]))
    samples = draw_samples(vqvae, prior, test.positions, arguments.seed, arguments.temperature)
    return {"bits_per_code_train": bits, **judge_samples(folder, samples, splits)}


def write_predictions(folder, arguments, vqvae, prior, splits):
    """Writes everything into the output folder, metrics.json last; returns the metrics."""
    test = splits["test"]
    print(f"Reconstructing {len(test.images)} test images ...")
    measured, codes, reconstructions = metrics.evaluate(
        vqvae, prior, dataset.image_batches(test, 32), test.positions,
        *dataset.head_context(test, prior, vqvae.settings["margin"]))
    shown = write_reconstructions(folder, test, codes, reconstructions, arguments.num_examples, arguments.seed,
                                  prior.num_embeddings)
    positions = sample_positions(arguments.slice, arguments.num_samples)
    print(f"Sampling {len(positions)} new brains ...")
    samples = draw_samples(vqvae, prior, positions, arguments.seed, arguments.temperature)
    write_samples(folder, samples, positions)
    judged = min(metrics.NUM_HEADS, splits["train"].num_people) if arguments.evaluate else 0
    heads = write_heads(folder, vqvae, prior, arguments.heads, judged, arguments.seed, arguments.temperature)
    of_heads = {}
    if arguments.evaluate:
        measured |= evaluate_samples(folder, arguments, vqvae, prior, splits)
        of_heads = {"heads": judge_heads(folder, heads[:judged], reconstructions, splits)}
    neighbours = nearest_training(samples, splits["train"]) if arguments.with_neighbours else None
    title = f"VQ-VAE: {len(test.images)} test images, {len(samples)} samples"
    figures.write_report(folder / "report.html", title, measured, *shown, codes, prior.num_embeddings, samples,
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


@cli.exit_on_input_error
def main(argv=None):
    """Writes reconstructions, samples and metrics.json to the output folder."""
    arguments = parse_arguments(argv)
    run_dir = find_run(arguments.run_dir)
    config, vqvae, prior = load_run(run_dir)
    splits = load_data(arguments, config, vqvae, run_dir)
    dataset.warn_of_lost_border(splits["test"], vqvae.settings["margin"])
    folder = Path(arguments.output_dir or run_dir / "predictions")
    with cli.report_write_errors(folder, "give another --output-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        measured = write_predictions(folder, arguments, vqvae, prior, splits)
    if arguments.export:
        with cli.report_write_errors(arguments.export, "give another --export"):
            modules.export(vqvae, prior, arguments.export)
    of_heads = measured.pop("heads", None)
    print(json.dumps(measured, indent=2))
    if of_heads:
        print_heads(of_heads)
    print(f"Done: see {folder}.")


if __name__ == "__main__":
    main()
