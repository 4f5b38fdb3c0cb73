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
    parser.add_argument("--temperature", type=cli.number(float, 0), default=1.0, metavar="T",
                        help="of sampling: 1 is the model, less is blander (default: 1)")
    parser.add_argument("--seed", type=cli.number(int, 0, cli.SEEDS), default=0, metavar="S", help="of every draw (default: 0)")
    parser.add_argument("--evaluate", action="store_true", help="also judge samples: one per test image, beside real people")
    parser.add_argument("--with-neighbours", action="store_true", help="show each sample's nearest training slice in report.html")
    parser.add_argument("--nifti", action="store_true", help="also write the samples as one volume, samples.nii.gz")
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


def write_reconstructions(folder, split, codes, reconstructions, count, seed, vqvae):
    """Writes what shows how well the split is reconstructed.

    One PNG per example, original beside reconstruction; reconstructions.png of four people at four positions; errors.png over
    all images.

    Returns:
        (the indices of the first ten examples; what `figures.write_report` shows of them).
    """
    margin = vqvae.settings["margin"]
    ssims = np.array([metrics.ssim(image / 255, reconstruction) for image, reconstruction in zip(split.images, reconstructions)])
    errors = np.mean([np.abs(image / 255 - reconstruction) for image, reconstruction in zip(split.images, reconstructions)], axis=0)
    figures.plot_errors(ssims, split.positions, errors, margin, folder / "errors.png")

    def shown(indices):
        captions = [f"slice {split.positions[index]}, SSIM {ssims[index]:.3f}" for index in indices]
        return split.images[indices] / 255, reconstructions[indices], codes[indices], captions

    figures.reconstruction_grid(*shown(split.examples(4)), figures.code_colours(vqvae.quantizer.embeddings), margin,
                                folder / "reconstructions.png")
    drawn = np.sort(np.random.default_rng(seed).choice(len(codes), min(count, len(codes)), replace=False))
    for number, index in enumerate(drawn):
        pair = np.hstack([split.images[index], dataset.to_uint8(reconstructions[index] * 2 - 1)])
        Image.fromarray(pair).save(folder / f"original_vs_reconstructed_{number:04d}.png")
    return drawn[:10], shown(drawn[:10])


def write_template(folder, vqvae):
    """Writes template.png: slices of the MNI152 template, which may be shown to anyone, through the model."""
    images = volumes.template_slices()
    positions = np.array([3, 11, 19, 27])
    codes, reconstructions = reconstruct(vqvae, images[positions])
    captions = [f"slice {position}, SSIM {metrics.ssim(image / 255, reconstruction):.3f}"
                for image, reconstruction, position in zip(images[positions], reconstructions, positions)]
    figures.reconstruction_grid(images[positions] / 255, reconstructions, codes, captions,
                                figures.code_colours(vqvae.quantizer.embeddings), vqvae.settings["margin"],
                                folder / "template.png", "An average of 152 people (MNI152), which the model never saw")


def reconstruct(vqvae, images):
    """uint8 (N, H, W) -> (codes, int (N, g, g); reconstructions, float (N, H, W) in [0, 1])."""
    parts = np.array_split(images, -(-len(images) // 32))
    codes = [vqvae.encode_to_codes(dataset.normalise(part)[..., np.newaxis]).numpy() for part in parts]
    return np.concatenate(codes), np.concatenate([metrics.to_unit(vqvae.decode_codes(some)) for some in codes])


def draw_samples(vqvae, prior, positions, seed, temperature):
    """Samples one brain per slice position: float (N, H, W) in [0, 1]."""
    codes = prior.sample(positions, seed, temperature)
    return np.concatenate([metrics.to_unit(vqvae.decode_codes(codes[i:i + 16])) for i in range(0, len(codes), 16)])


def write_samples(folder, samples, positions, margin):
    """Writes samples.png and a PNG of each sample."""
    for number, image in enumerate(samples):
        Image.fromarray(dataset.to_uint8(image * 2 - 1)).save(folder / f"sample_{number:04d}.png")
    figures.sample_grid(samples, positions, margin, folder / "samples.png")


def nearest_training(samples, train):
    """The training image nearest to each sample, uint8 (N, H, W)."""
    features_of = metrics.fit_features(train.images)
    return train.images[metrics.nearest_training(features_of(samples), features_of(train.images))[1]]


def judge_samples(folder, shown, samples, splits):
    """Measures samples against real people, and draws what was found.

    Args:
        folder: where neighbours.png, distances.png and tissue.png go.
        shown: samples whose nearest training slices are drawn, (N, H, W) in [0, 1].
        samples: those measured, one at the position of each test image.
        splits: dict of all three `dataset.Split`.

    Returns:
        The dict of metrics of `metrics.evaluate_samples`.
    """
    train, test = splits["train"], splits["test"]
    features_of = metrics.fit_features(train.images)
    measured, details = metrics.evaluate_samples(samples, test.positions, splits, features_of)
    distances, nearest = metrics.nearest_training(features_of(shown), features_of(train.images))
    captions = [f"case {train.cases[i]}, slice {train.positions[i]}\ndistance {distance:.1f}"
                for i, distance in zip(nearest, distances)]
    figures.neighbour_grid(shown, train.images[nearest], captions, folder / "neighbours.png")
    figures.plot_distances(details["sample_distances"], details["test_distances"], folder / "distances.png")
    figures.plot_tissue(details["tissue"]["samples"], test.positions, details["tissue"]["test"], test.positions,
                        folder / "tissue.png")
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
    return splits


def write_predictions(folder, arguments, config, vqvae, prior, splits):
    """Writes everything into the output folder, metrics.json last; returns the metrics."""
    test = splits["test"]
    print(f"Reconstructing {len(test.images)} test images ...")
    measured, codes, reconstructions = metrics.evaluate(vqvae, prior, dataset.image_batches(test, 32))
    indices, shown = write_reconstructions(folder, test, codes, reconstructions, arguments.num_examples, arguments.seed, vqvae)
    if vqvae.image_size == 256 and not config["data"].get("is_demo"):  # as the template; the demo cohort is made from it
        write_template(folder, vqvae)
    positions = sample_positions(arguments.slice, arguments.num_samples)
    print(f"Sampling {len(positions)} new brains ...")
    samples = draw_samples(vqvae, prior, positions, arguments.seed, arguments.temperature)
    write_samples(folder, samples, positions, vqvae.settings["margin"])
    if arguments.nifti:
        volumes.write_nifti(dataset.to_uint8(samples * 2 - 1), folder / "samples.nii.gz")
    if arguments.evaluate:
        print(f"Sampling {len(test.images)} more, to judge beside the test people ...")
        seen = splits["train"].take(splits["train"].spread(len(test.images)))
        measured["bits_per_code_train"] = metrics.bits_per_code(vqvae, prior, dataset.image_batches(seen, 32))
        judged = draw_samples(vqvae, prior, test.positions, arguments.seed, arguments.temperature)
        measured |= judge_samples(folder, samples, judged, splits)
    neighbours = nearest_training(samples, splits["train"]) if arguments.with_neighbours else None
    figures.write_report(folder / "report.html", f"VQ-VAE: {len(test.images)} test images, {len(samples)} samples", measured, shown,
                         metrics.bits_per_place(prior, codes[indices], test.positions[indices]), codes,
                         figures.code_colours(vqvae.quantizer.embeddings), vqvae.settings["margin"], samples,
                         [f"slice {position}" for position in positions], neighbours)
    cli.write_json(folder / "metrics.json", measured)
    return measured


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
        measured = write_predictions(folder, arguments, config, vqvae, prior, splits)
    if arguments.export:
        with cli.report_write_errors(arguments.export, "give another --export"):
            modules.export(vqvae, prior, arguments.export)
    print(json.dumps(measured, indent=2))
    print(f"Done: see {folder}.")


if __name__ == "__main__":
    main()
