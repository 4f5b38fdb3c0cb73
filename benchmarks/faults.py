"""Kills tiny trainings and tiny predictions with SIGKILL at random moments, many times over, on the CPU.

    python benchmarks/faults.py [--kills 20] [--seed 0]

train.py: each trial starts a training, kills it at a moment between the time when config.json is there and
the time when metrics.json would be, resumes it to its end, and compares with an uninterrupted one: weights of
both networks, histories (but for the clock), GIF and metrics have to be the same to the bit, and no file may
be left over.

predict.py: a folder holds the results of one seed; each trial starts predict.py into it with another seed and
kills it. File by file, the folder has to hold all of the old results or all of the new. The moments are drawn
from the whole length, the later the more often, for the results are put in place at the end.

A process that ended before its kill does not count: the trial is repeated. The last line is JSON, for each of
the two scripts: `tried`, `survived`, `lost` (not resumed, or no results), `differing`, `left_over` (files at
the end).
"""

import os
from pathlib import Path
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # to the bit: on the CPU
sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import shutil
import signal
import subprocess
import tempfile
import time

import numpy as np

from benchmarks import common
from benchmarks.tiny import assert_same_run, TINY, write_cohort
from support import cli

# What a training writes, in this order: how far it had come.
MILESTONES = "config.json", "vqvae.keras", "pixelcnn.keras", "metrics.json"


def run_script(script, *arguments, begun=lambda: True, kill_after=None):
    """Runs one of the scripts; kills it `kill_after` seconds after `begun()` is true, unless that is None.

    Returns:
        (exit status, -9 if it was killed; seconds since `begun()` was true).
    """
    command = [sys.executable, common.ROOT / script, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not begun():
        time.sleep(0.005)
    start = time.perf_counter()
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait(), time.perf_counter() - start


def train(cohort, run, kill_after=None):
    """Trains the tiny cohort in the folder `run`, or goes on there, by one command; see `run_script`."""
    return run_script("train.py", "--data-dir", cohort, "--run-dir", run, *TINY, "--resume",
                      begun=(run / "config.json").exists, kill_after=kill_after)


def predict(run, results, seed, kill_after=None):
    """Writes predict.py's results of a seed into a folder; see `run_script`."""
    options = "--output-dir", results, "--num-samples", 4, "--seed", seed
    return run_script("predict.py", "--run-dir", run, *options, kill_after=kill_after)


def state(run):
    """How far a training had come: the last of `MILESTONES` that is there, or "nothing"."""
    return ([name for name in MILESTONES if (run / name).exists()] or ["nothing"])[-1]


def contents(folder):
    """Files by name with their bytes; of TensorBoard's, which hold the time, the names alone."""
    return {str(path.relative_to(folder)): b"" if "tfevents" in path.name else path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def extra_files(folder, other):
    """The names of files that lie in `folder` and not in `other`, but for TensorBoard's."""
    return sorted(name for name in contents(folder).keys() - contents(other).keys() if "tfevents" not in name)


def training_trial(cohort, run, whole, after):
    """Kills a training and resumes it; returns a row of the table, or None if it had ended before."""
    shutil.rmtree(run, ignore_errors=True)
    status, _ = train(cohort, run, after)
    reached = state(run)
    if status != -signal.SIGKILL or reached == "metrics.json":
        return None
    status, _ = train(cohort, run)
    row = {"after": after, "state": reached, "lost": status != 0, "differing": False, "left_over": []}
    if not row["lost"]:
        try:
            assert_same_run(run, whole)
        except AssertionError:
            row["differing"] = True
        row["left_over"] = extra_files(run, whole)
    return row


def prediction_trial(run, results, references, after):
    """Kills predict.py while it replaces one seed's results by the other's; returns a row, or None.

    Args:
        run: the folder of a finished run.
        results: the folder of results.
        references: the `contents` of complete results by seed, 0 and 1.
        after: seconds, when to kill.
    """
    before = int(contents(results) == references[1])
    status, _ = predict(run, results, 1 - before, after)
    if status != -signal.SIGKILL:
        return None
    found = contents(results) if results.exists() else {}
    states = {before: "all old", 1 - before: "all new"}
    kind = next((states[seed] for seed, reference in references.items() if found == reference), "mixed")
    row = {"after": after, "state": kind, "lost": not found, "differing": kind == "mixed" and bool(found)}
    if kind == "mixed":  # the next trial needs whole results again
        shutil.rmtree(results, ignore_errors=True)
        predict(run, results, before)
    return row


def repeat(trial, kills, draw):
    """So many rows of trials whose process was killed in time, each at a moment that `draw()` gives."""
    rows = []
    while len(rows) < kills:
        if row := trial(draw()):
            rows.append(row)
            print(", ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    return rows


def summarise(rows, left_over):
    """What goes to JSON of the rows of one script; `left_over` is a list of files."""
    lost, differing = (sum(row[key] for row in rows) for key in ("lost", "differing"))
    return {"tried": len(rows), "survived": len(rows) - lost - differing, "lost": lost,
            "differing": differing, "left_over": len(left_over), "rows": rows}


def try_trainings(folder, kills, rng):
    """Trains the cohort in `folder` to its end, as `folder`/whole, then kills trainings; a summary."""
    cohort, run, whole = (folder / name for name in ("cohort", "run", "whole"))
    status, seconds = train(cohort, whole)
    if status:
        raise RuntimeError("the uninterrupted training failed")
    print(f"From config.json to its end an uninterrupted training takes {seconds:.1f} s.", flush=True)
    rows = repeat(lambda after: training_trial(cohort, run, whole, after), kills,
                  lambda: rng.uniform(0, seconds))
    left_over = [name for row in rows for name in row["left_over"]]
    return {**summarise(rows, left_over), "seconds_uninterrupted": seconds}


def try_predictions(folder, kills, rng):
    """Kills predictions of the run `folder`/whole; a summary."""
    run, results, references = folder / "whole", folder / "predicted" / "results", {}
    for seed in (0, 1):
        status, seconds = predict(run, results, seed)
        if status:
            raise RuntimeError("an uninterrupted prediction failed")
        references[seed] = contents(results)
    print(f"An uninterrupted prediction takes {seconds:.1f} s.", flush=True)
    rows = repeat(lambda after: prediction_trial(run, results, references, after), kills,
                  lambda: rng.triangular(0, seconds, seconds))
    predict(run, results, 0)  # removes what killed calls have left beside the results
    left_over = [path for path in results.parent.iterdir() if path != results]
    return {**summarise(rows, left_over), "seconds_uninterrupted": seconds}


@cli.exit_on_user_error
def main():
    """Prints a row per kill, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--kills", type=cli.number(int, 1), default=20, metavar="N",
                        help="of each script (default: 20)")
    parser.add_argument("--seed", type=cli.number(int, 0, cli.MAX_SEED), default=0, metavar="S",
                        help="of the moments")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cohort(folder / "cohort")
        trainings = try_trainings(folder, arguments.kills, rng)
        predictions = try_predictions(folder, arguments.kills, rng)
    common.finish("faults", arguments, {"training": trainings, "prediction": predictions,
                                        "settings": {"seed": arguments.seed, "training": TINY}})


if __name__ == "__main__":
    main()
