"""Records a finished run of train.py, and of predict.py on it, in assets/results.json.

    python benchmarks/record.py KEY --run-dir DIR --command "python train.py ..."

KEY is `real_slices` or `demo`; what `predict.py --evaluate` found of whole heads goes under `heads`. The command is what was typed, for a run does not keep it. To be run on the same machine, for
the machine is recorded too.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import cli  # first: sets what TensorFlow, Keras and matplotlib read when imported

import csv
import json
import math
import time

from benchmarks import common


def describe(run_dir):
    """What a run folder says of itself: its commit, date, size, seconds, and all that was measured on it."""
    config = json.loads((run_dir / "config.json").read_text())
    model = config["vqvae"]
    entry = {"commit": config["git_commit"],
             "date": time.strftime("%Y-%m-%d", time.localtime((run_dir / "metrics.json").stat().st_mtime)),
             "people": config["data"]["people"], "num_embeddings": model["num_embeddings"],
             "codes_per_image": (model["image_size"] // model["downsample"]) ** 2}
    entry["bits_fixed"] = entry["codes_per_image"] * math.log2(model["num_embeddings"])
    entry["seconds"] = {name: seconds for name in ("vqvae", "pixelcnn")
                        if (seconds := seconds_of(run_dir / f"{name}_history.csv")) is not None}
    for path in (run_dir / "metrics.json", run_dir / "predictions" / "metrics.json"):
        if path.exists():
            entry |= json.loads(path.read_text())
    return entry


def seconds_of(history):
    """The seconds of all epochs of a stage, or None if its history has none."""
    with open(history, newline="") as file:
        rows = list(csv.DictReader(file))
    return sum(float(row["seconds"]) for row in rows) if "seconds" in rows[0] else None


@cli.exit_on_input_error
def main():
    """Records the run and prints what was recorded."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("key", choices=("real_slices", "demo"))
    parser.add_argument("--run-dir", required=True, metavar="DIR")
    parser.add_argument("--command", required=True, metavar="TEXT", help="what was typed to train it")
    arguments = parser.parse_args()
    run_dir = Path(arguments.run_dir)
    if not (run_dir / "metrics.json").is_file():
        raise cli.InputError(f"{run_dir} holds no finished run (metrics.json); give another --run-dir.")
    entry = {"command": arguments.command, "hardware": common.hardware(), **describe(run_dir)}
    of_heads = entry.pop("heads", None)
    common.record(common.RESULTS, arguments.key, entry)
    if of_heads and arguments.key == "real_slices":
        origin = {name: entry[name] for name in ("command", "commit", "date", "hardware")}
        common.record(common.RESULTS, "heads", {**origin, **of_heads})
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
