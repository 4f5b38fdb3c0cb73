"""What a synthetic data set is worth: stage 1 trained on sampled heads, beside stage 1 trained on people.

    python benchmarks/utility.py --data-dir DIR --run-dir runs/oasis [--budget 120] [--factor 10] python
    benchmarks/utility.py --data-dir DIR --synthetic DIR       # heads that predict.py --write-dataset wrote

Three sides train for the same seconds: on the training people of ``--data-dir``, on as many sampled heads,
and on ``--factor`` times as many (or all that ``--synthetic`` holds, if these are fewer). The fewer heads are
the first of the many. Each side is then measured on the test people. They train in turns, as in
benchmarks/reconstruction.py, whose functions do it.

The heads come out of a decoder that was trained on the same people: the second side learns from what the
first side's data have already taught a model. The qualities are those of one training each. The last line is
JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import contextlib
import json
import subprocess
import tempfile

import numpy as np

from benchmarks import common, reconstruction
import dataset
from support import cli, synthetic
from support.cli import UserError
from support.runs import Run
from support.slices import SPLITS

QUALITY = "ssim", "ssim_foreground", "psnr"
SIDES = "real", "as_many", "more"
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
    """The first `count` heads of a synthetic data set, of any split, as a `dataset.Split` to train on."""
    parts = []
    for name in SPLITS:  # in the order in which the heads were sampled
        if missing := count - sum(part.num_people for part in parts):
            parts.append(dataset.load_splits(folder, [name], limit=missing)[name])
    return dataset.Split("train", np.concatenate([part.images for part in parts]),
                         np.concatenate([part.cases for part in parts]),
                         np.concatenate([part.positions for part in parts]))


def numbers_of_heads(num_people, factor, available):
    """How many heads each side trains on, a dict by side.

    Raises:
        UserError: if the synthetic data set holds no more heads than there are people.
    """
    if available <= num_people:
        raise UserError(f"The synthetic data set holds {available} heads, and there are {num_people} "
                        "training people; it must hold more, so write a larger one.")
    return dict(zip(SIDES, (num_people, num_people, min(factor * num_people, available))))


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
    splits = load_people(data_dir, read_description(arguments.synthetic)["trained_on"])
    if arguments.side != "real":
        splits["train"] = load_heads(arguments.synthetic, arguments.side_heads)
    common.answer("read")
    reconstruction.run_side("ours", splits, arguments.budget)


def compare(data_dir, folder, numbers, budget, rounds):
    """Trains the sides in turns, each on as many heads as `numbers` has for it; a dict of rows by side."""
    command = "--data-dir", data_dir, "--synthetic", folder, "--budget", budget
    with contextlib.ExitStack() as stack:
        sides = {name: common.Side(__file__, *command, "--side", name, "--side-heads", number)
                 for name, number in numbers.items()}
        for side in sides.values():
            stack.enter_context(side).ask()
        rows, _ = reconstruction.train_in_turns(sides, budget, rounds)
    return {name: {"heads": numbers[name], **row} for name, row in rows.items()}


def parse_arguments(argv=None):
    """The command line."""
    parser = common.argument_parser(__doc__, default_rounds=6)
    parser.add_argument("--data-dir", metavar="DIR")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run-dir", metavar="DIR", help="sample heads from this run, which may take hours")
    source.add_argument("--synthetic", metavar="DIR", help="read the heads that --write-dataset wrote")
    parser.add_argument("--factor", type=cli.number(int, 2), default=10, metavar="F",
                        help="sampled heads per real person (default: 10)")
    parser.add_argument("--budget", type=cli.number(float, 1), default=120, metavar="SECONDS",
                        help="(default: 120)")
    parser.add_argument("--side", choices=SIDES, help="train one, in this process (the script calls itself)")
    parser.add_argument("--side-heads", type=int, help="with --side: heads to train on")
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
    num_people = splits["train"].num_people
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.synthetic or f"{name}/synthetic"
        if arguments.run_dir:
            sample(arguments.run_dir, arguments.factor * num_people, folder)
        description = read_description(folder)
        numbers = numbers_of_heads(num_people, arguments.factor, sum(description["heads"].values()))
        rows = compare(data_dir, folder, numbers, arguments.budget, arguments.rounds)
    columns = "heads", *QUALITY, "images_per_second", "steps"
    print(f"{'':10}" + "".join(f"{column:>19}" for column in columns))
    for side, row in rows.items():
        print(f"{side:10}" + "".join(f"{row[column]:19.4g}" for column in columns))
    test = splits["test"]
    common.finish("utility", arguments, {
        "rows": rows, "num_images": len(test.images), "test_people": test.num_people,
        "budget": arguments.budget, "synthetic": {key: description[key] for key in RECORDED}})


if __name__ == "__main__":
    main()
