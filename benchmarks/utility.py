"""What a synthetic data set is worth: stage 1 trained on sampled heads, beside stage 1 trained on people.

    python benchmarks/utility.py --data-dir DIR --synthetic SET [--size 128] [--budget 120]
    python benchmarks/utility.py --data-dir DIR --run-dir runs/oasis       # samples as many heads itself

SET is what `predict.py --write-dataset` wrote. The sides train for the same seconds: on the training people
of ``--data-dir``, and on as many sampled heads. Beside them stand data that should do worse, or the figures
say nothing: ten of the people; the people, blurred; as many people simulated from the MNI152 template, cut at
the same heights. Each side is then measured on the test people. They train in turns, as in
benchmarks/reconstruction.py, whose functions do it. Smaller slices (``--size``) make the seconds many epochs,
so that the data bind and not the budget.

The heads come out of a decoder that was trained on the same people: the second side learns from what the
first side's data have already taught a model. The qualities are those of one training each. The last line is
JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import contextlib
import dataclasses
import json
import subprocess
import tempfile

import numpy as np
from scipy import ndimage
from skimage.measure import block_reduce

from benchmarks import common, reconstruction
import dataset
from support import cli, synthetic, template
from support.cli import UserError
from support.runs import Run
from support.slices import SPLITS
from support.volumes import SliceGeometry

QUALITY = "ssim", "ssim_foreground", "psnr"
SIDES = "real", "sampled", "few", "blurred", "simulated"
FEW = 10  # people
BLUR = 1 / 128  # of the side: the standard deviation, as of the blurred original in `metrics.baselines`
RECORDED = "git_commit", "seed", "temperature", "ventricles"  # of the synthetic data set


def read_description(folder):
    """The dataset.json of a synthetic data set.

    Raises:
        UserError: if the folder holds none.
    """
    try:
        description = json.loads((Path(folder) / synthetic.DESCRIPTION).read_text())
        _ = sum(description["heads"].values()), [description[key] for key in RECORDED]
        trained_on = description["trained_on"]
        _ = trained_on["front"], trained_on["limit"], trained_on["fingerprints"]["test"]
        _ = SliceGeometry(**description["geometry"]), description["slice_positions"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no usable {synthetic.DESCRIPTION}"
        raise UserError(f"{folder} is no data set of predict.py --write-dataset ({reason}); "
                        "give one as --synthetic, or --run-dir to sample one.") from error
    return description


def load_people(data_dir, trained_on):
    """The training and the test people, turned as those on whom the sampled heads' model was trained.

    Args:
        data_dir: folder of the PNG splits.
        trained_on: a dict of `front`, `limit` and `fingerprints` of that model's data.

    Raises:
        UserError: if they are others than these: the model may have been trained on the test people.
    """
    splits = dataset.load_splits(data_dir, ["train", "test"], trained_on["limit"], front=trained_on["front"])
    for name, value in dataset.fingerprints(splits).items():
        if value != trained_on["fingerprints"].get(name):
            raise UserError(f"The {name} people in {data_dir} are not those of the run that sampled the "
                            "heads; give its own data as --data-dir.")
    return splits


def load_heads(folder, count):
    """The first `count` heads of PNG folders, of any split, as a `dataset.Split` to train on."""
    parts = []
    for name in SPLITS:  # in the order in which the heads were sampled
        if missing := count - sum(part.num_people for part in parts):
            parts.append(dataset.load_splits(folder, [name], limit=missing)[name])
    return dataset.Split("train", np.concatenate([part.images for part in parts]),
                         np.concatenate([part.cases for part in parts]),
                         np.concatenate([part.positions for part in parts]))


def simulate(count, image_size, description, folder):
    """`count` simulated people, cut as those of a synthetic data set's description, as a `dataset.Split`."""
    if image_size not in (128, 256):
        raise UserError(f"People are simulated at 128 or 256 pixels, and these slices have {image_size}; "
                        "give --size 128.")
    positions = description["slice_positions"]
    template.write_cohort(folder, template.split_people(count), image_size,
                          SliceGeometry(**description["geometry"]), max(positions) + 1)
    people = load_heads(folder, count)
    return people.take(np.isin(people.positions, positions))


def shrink(split, side):
    """The split with each image averaged over blocks of pixels to `side`, if it is larger.

    Raises:
        UserError: if the side does not divide that of the images.
    """
    block, rest = divmod(split.images.shape[1], side)
    if rest or not block:
        raise UserError(f"--size {side} does not divide the slices' {split.images.shape[1]} pixels; give "
                        "another.")
    images = [np.uint8(block_reduce(image, block, np.mean).round()) for image in split.images]
    return dataclasses.replace(split, images=np.stack(images))


def blur(split):
    """The split with each image blurred by a Gaussian filter."""
    sigma = BLUR * split.images.shape[1]
    images = [np.uint8(ndimage.gaussian_filter(np.float32(image), sigma).round()) for image in split.images]
    return dataclasses.replace(split, images=np.stack(images))


def train_split(side, people, folder, description):
    """What a side trains on, a `dataset.Split` as large as the slices of `people`.

    Args:
        side: one of `SIDES`.
        people: the training people.
        folder, description: of the synthetic data set.
    """
    size, count = people.images.shape[1], people.num_people
    if side == "sampled":
        heads = load_heads(folder, count)
        return heads if heads.images.shape[1] == size else shrink(heads, size)
    if side == "few":
        return people.take(np.isin(people.cases, np.unique(people.cases)[:FEW]))
    if side == "blurred":
        return blur(people)
    if side == "simulated":
        with tempfile.TemporaryDirectory() as name:
            return simulate(count, size, description, Path(name) / "simulated")
    return people


def sample(run_dir, count, folder):
    """Writes a synthetic data set by predict.py.

    Raises:
        UserError: if predict.py refused; it has said why.
    """
    script = str(common.ROOT / "predict.py")
    command = [sys.executable, script, "--run-dir", run_dir, "--write-dataset", folder, "--heads", str(count)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"predict.py could not sample from {run_dir}: see above.")


def run_side(arguments, data_dir):
    """A side's process: loads when it is asked to, for no other side is at work then; trains in turns."""
    next(common.requests())
    description = read_description(arguments.synthetic)
    splits = load_people(data_dir, description["trained_on"])
    if arguments.size:
        splits = {name: shrink(split, arguments.size) for name, split in splits.items()}
    splits["train"] = train_split(arguments.side, splits["train"], arguments.synthetic, description)
    common.answer(splits["train"].num_people)
    reconstruction.run_side("ours", splits, arguments.budget)


def compare(command, budget, rounds):
    """Trains the sides in turns by a command line; a dict of rows by side."""
    with contextlib.ExitStack() as stack:
        sides = {name: common.Side(__file__, *command, "--side", name) for name in SIDES}
        heads = {name: stack.enter_context(side).ask() for name, side in sides.items()}
        rows, _ = reconstruction.train_in_turns(sides, budget, rounds)
    return {name: {"heads": heads[name], **row} for name, row in rows.items()}


def parse_arguments(argv=None):
    """The command line."""
    parser = common.argument_parser(__doc__, default_rounds=6)
    parser.add_argument("--data-dir", metavar="DIR")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run-dir", metavar="DIR", help="sample heads from this run, which may take hours")
    source.add_argument("--synthetic", metavar="SET", help="read the heads that --write-dataset wrote")
    parser.add_argument("--size", type=cli.number(int, 32), metavar="PIXELS",
                        help="average the slices down to this side (default: as they are)")
    parser.add_argument("--budget", type=cli.number(float, 1), default=120, metavar="SECONDS",
                        help="(default: 120)")
    parser.add_argument("--side", choices=SIDES, help="train one, in this process (the script calls itself)")
    return parser.parse_args(argv)


@cli.exit_on_user_error
def main():
    """Prints the table, then JSON."""
    arguments = parse_arguments()
    data_dir, _ = dataset.find_data(arguments.data_dir)
    if arguments.side:
        return run_side(arguments, data_dir)
    if arguments.run_dir:
        run = Run.load(arguments.run_dir)
        trained_on = {**run.config["data"], "limit": run.settings["limit"]}
    else:
        trained_on = read_description(arguments.synthetic)["trained_on"]
    splits = load_people(data_dir, trained_on)
    num_people, test = splits["train"].num_people, splits["test"]
    size = ("--size", arguments.size) if arguments.size else ()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.synthetic or f"{name}/synthetic"
        if arguments.run_dir:
            sample(arguments.run_dir, num_people, folder)
        description = read_description(folder)
        if (available := sum(description["heads"].values())) < num_people:
            raise UserError(f"The synthetic data set holds {available} heads, and there are {num_people} "
                            "training people; write one of as many.")
        command = "--data-dir", data_dir, "--synthetic", folder, "--budget", arguments.budget, *size
        rows = compare(command, arguments.budget, arguments.rounds)
    columns = "heads", *QUALITY, "images_per_second", "steps"
    print(f"{'':10}" + "".join(f"{column:>19}" for column in columns))
    for side, row in rows.items():
        print(f"{side:10}" + "".join(f"{row[column]:19.4g}" for column in columns))
    common.finish("utility", arguments, {
        "rows": rows, "num_images": len(test.images), "test_people": test.num_people,
        "image_size": arguments.size or test.images.shape[1], "budget": arguments.budget,
        "synthetic": {key: description[key] for key in RECORDED}})


if __name__ == "__main__":
    main()
