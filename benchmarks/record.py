"""Records a finished run of train.py, and of predict.py on it, in assets/results.json.

    python benchmarks/record.py KEY --run-dir DIR --command "python train.py ..."

KEY is `real_slices`, `demo`, `pretrained` (the weights in assets/pretrained) or `two_cores` (the real slices,
trained on both cores: the README's minutes come from it). What `predict.py --evaluate` measured on heads goes
under `heads` and `pretrained_heads`; with `--before RUN`, beside what it measured on a run of an earlier
commit. The command is what was typed, for a run does not keep it. To be run on the machine of the training,
which is recorded too.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import json
import math
import time

from benchmarks import common
import dataset
from support import cli, metrics
from support.runs import Run

# Where the figures of whole heads go.
HEADS = {"real_slices": "heads", "pretrained": "pretrained_heads"}
STAGES = "vqvae", "decoder", "pixelcnn"
ORIGIN = "command", "commit", "date", "hardware", "machine"


def describe(run):
    """A run's commit, date, machine, size, seconds, and all that was measured on it."""
    config = run.config
    num_embeddings, codes = config["pixelcnn"]["num_embeddings"], config["pixelcnn"]["grid_size"] ** 2
    metrics_path = run.folder / "metrics.json"
    entry = {"commit": config["git_commit"],
             "date": time.strftime("%Y-%m-%d", time.localtime(metrics_path.stat().st_mtime)),
             "machine": config["build"], "people": config["data"]["people"],
             "image_size": config["vqvae"]["image_size"],
             "num_embeddings": num_embeddings, "codes_per_image": codes,
             "bits_fixed": codes * math.log2(num_embeddings),
             "seconds": {stage: float(run.read_history(stage)["seconds"].sum()) for stage in STAGES},
             "epochs": {stage: len(run.read_history(stage)) for stage in STAGES}}
    for path in (metrics_path, run.results_path("evaluation.json")):
        if path.exists():
            entry |= json.loads(path.read_text())
    return entry


def figures_before(run):
    """What `predict.py --evaluate` measured on a run, each figure under its name and `_before`."""
    evaluated = json.loads(run.results_path("evaluation.json").read_text())["heads"]
    names = "told_apart_slices", "told_apart_heads", "roughness_auc", "membership", "membership_reference"
    figures = {f"{name}_before{end}": evaluated[name + end] for name in names for end in ("", "_interval")
               if name in evaluated}
    return {**figures, "commit_before": run.config["git_commit"]}


def baselines_of(data, limit):
    """`metrics.baselines` of a run's data, which must still be where they were."""
    splits = dataset.load_splits(data["folder"], ["train", "test"], front=data["front"], limit=limit)
    return metrics.baselines(splits["train"].images, splits["test"].images)


@cli.exit_on_user_error
def main():
    """Records the run and prints what was recorded."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("key", choices=("real_slices", "demo", "pretrained", "two_cores"))
    parser.add_argument("--run-dir", required=True, metavar="DIR")
    parser.add_argument("--command", required=True, metavar="TEXT", help="what was typed to train it")
    parser.add_argument("--before", metavar="DIR", help="a run of an earlier commit, judged as well")
    arguments = parser.parse_args()
    run = Run.load(arguments.run_dir)
    if not (run.folder / "metrics.json").is_file():
        raise cli.UserError(f"{run.folder} holds no finished run (metrics.json); give another --run-dir.")
    entry = {"command": arguments.command, "hardware": common.hardware(), **describe(run),
             "baselines": baselines_of(run.config["data"], run.settings["limit"])}
    if arguments.key == "demo":  # what a newcomer installs
        entry["environment_gigabytes"] = sum(path.stat().st_size for path in Path(sys.prefix).rglob("*")
                                             if path.is_file()) / 1e9
    heads = entry.pop("heads", None)
    before = figures_before(Run.load(arguments.before)) if arguments.before else {}
    common.record(common.RESULTS, arguments.key, entry)
    if heads and arguments.key in HEADS:
        origin = {name: entry[name] for name in ORIGIN}
        origin["commit"] = f"{origin['commit']}, judged at {heads['git_commit']}"
        common.record(common.RESULTS, HEADS[arguments.key], {**origin, **heads, **before})
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
