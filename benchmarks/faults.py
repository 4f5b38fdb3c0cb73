"""Kills a tiny training with SIGKILL at random moments and resumes it, many times over, on the CPU.

    python benchmarks/faults.py [--kills 20] [--seed 0]

Each trial starts a training, kills it at a moment drawn from the whole length of an uninterrupted one, resumes it to its
end, and compares: weights of both networks, histories (but for the clock), GIF and metrics have to be the same to the bit,
and no file may be left over. The last line is JSON: `tried`, `survived` (resumed to the same end),
`lost` (not resumed), `differing`, `left_over`.
"""

import os
from pathlib import Path
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # to the bit: on the CPU
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

import shutil
import subprocess
import tempfile
import time

import numpy as np

from benchmarks import common
from benchmarks.tiny import assert_same_run, TINY, write_cohort
from support import cli
from support.runs import Run


def command(folder, run, resume=False):
    """The command line that trains the tiny cohort in `folder`; `run` is a `Run`."""
    rest = ["--resume"] if resume else TINY
    return [sys.executable, str(ROOT / "train.py"), "--data-dir", str(folder / "cohort"), "--run-dir", str(run.folder), *rest]


def finish(folder, run, resume=False):
    """Trains to the end; returns (exit status, seconds)."""
    start = time.perf_counter()
    status = subprocess.run(command(folder, run, resume), capture_output=True).returncode
    return status, time.perf_counter() - start


def has_begun(run):
    """Whether there is something to resume."""
    return (run.folder / "config.json").exists()


def state(run):
    """How far a run had come, for the table."""
    if not has_begun(run):
        return "before config.json"
    for path in (run.metrics_path, run.backup_path("pixelcnn"), run.backup_path("vqvae")):
        if path.exists():
            return f"after {path.relative_to(run.folder)}"
    return "in the first epoch"


def files_of(run):
    """The names of all files but TensorBoard's, which hold the time."""
    return {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if "tfevents" not in path.name}


def trial(folder, whole, after):
    """Kills a training after `after` seconds and resumes it; returns a row of the table."""
    run = Run(folder / "run", None)
    shutil.rmtree(run.folder, ignore_errors=True)
    process = subprocess.Popen(command(folder, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after)
    process.kill()
    process.wait()
    row = {"after": after, "state": state(run), "lost": False, "differing": False, "left_over": []}
    was_finished = run.metrics_path.exists()
    status, _ = finish(folder, run, resume=has_begun(run))
    # Of a run that was killed at its very end, `--resume` says that it is finished, with status 2.
    row["lost"] = status != (2 if was_finished else 0)
    if not row["lost"]:
        try:
            assert_same_run(run.folder, whole.folder)
        except AssertionError:
            row["differing"] = True
        row["left_over"] = sorted(files_of(run) - files_of(whole))
    return row


@cli.exit_on_user_error
def main():
    """Prints a row per kill, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--kills", type=cli.number(int, 1), default=20, metavar="N", help="(default: 20)")
    parser.add_argument("--seed", type=cli.number(int, 0, cli.MAX_SEED), default=0, metavar="S", help="of the moments")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cohort(folder / "cohort")
        whole = Run(folder / "whole", None)
        status, seconds = finish(folder, whole)
        if status:
            raise RuntimeError("the uninterrupted training failed")
        print(f"An uninterrupted training takes {seconds:.1f} s.", flush=True)
        for after in rng.uniform(0, seconds, arguments.kills):
            rows.append(trial(folder, whole, after))
            print("killed after {after:5.1f} s, {state:28} lost: {lost}, differing: {differing}, left over: {left_over}"
                  .format(**rows[-1]), flush=True)
    lost, differing = (sum(row[key] for row in rows) for key in ("lost", "differing"))
    common.finish("faults", arguments, {
        "tried": len(rows), "survived": len(rows) - lost - differing, "lost": lost, "differing": differing,
        "left_over": sum(len(row["left_over"]) for row in rows),
        "settings": {"seed": arguments.seed, "seconds_uninterrupted": seconds, "training": TINY}, "rows": rows})


if __name__ == "__main__":
    main()
