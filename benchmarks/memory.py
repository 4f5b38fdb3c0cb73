"""Whether data larger than memory go through the whole of train.py and of predict.py --evaluate.

    python benchmarks/memory.py [--people 40]

Simulates people in 256x256 pixels, and four times as many. Both cohorts are trained with --cache-dir for one
epoch of each stage, with narrow networks so that it takes minutes, then judged by predict.py --evaluate. What
counts is the memory of a process' own (VmData, looked at many times a second): pages of the mapped cache are
the file's, which the kernel takes back when it needs them.

The small cohort has no limit. The large one has: what the small one needed at most, and as many bytes again
as the small one's images (RLIMIT_DATA). So four times the data that fit beside the rest have to go through.
Code that holds the images once would need three times the bytes allowed more; code that holds them as floats,
many times. The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import json
import resource
import subprocess
import tempfile
import time

from benchmarks import common
from support import cli, files, template, volumes

IMAGE_SIZE, TIMES = 256, 4
NARROW = {"vqvae": {"width": 16, "num_residual_blocks": 1}, "pixelcnn": {"num_filters": 16, "num_layers": 3}}


def run_watched(script, *arguments, limit=None, stop=lambda: False):
    """Runs one of the scripts until its end, or kills it when `stop()` is true.

    Args:
        script: its name.
        *arguments: its command line.
        limit: of the memory of its own, in bytes.
        stop: looked at many times a second.

    Returns:
        The most memory of its own that it had, in bytes.

    Raises:
        RuntimeError: if it failed; says its last words.
    """
    def set_limit():
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    peak = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, common.ROOT / script, *map(str, arguments)],
                                   stdout=subprocess.DEVNULL, stderr=errors,
                                   preexec_fn=set_limit if limit else None)
        while process.poll() is None:
            try:
                peak = max(peak, common.memory("VmData", process.pid))
            except TypeError:  # it has just ended: its status has no such line any more
                break
            if stop():
                process.kill()
                break
            time.sleep(0.01)
        if process.wait() and not stop():
            errors.seek(0)
            raise RuntimeError(f"{script} failed within {limit} bytes: {errors.read()[-2000:]}")
    return peak


def narrow(config_path):
    """Makes the networks of a run that has just begun narrow."""
    config = json.loads(config_path.read_text())
    for name, arguments in NARROW.items():
        config[name].update(arguments)
    files.write_json(config_path, config)


def measure(folder, people, limits):
    """Trains and judges a simulated cohort; returns a row of peaks, in gigabytes.

    Args:
        folder: to work in.
        people: how many.
        limits: bytes for "train" and "predict", or None.
    """
    cohort, cache, run = (folder / name for name in ("cohort", "cache", "run"))
    template.write_cohort(cohort, template.split_people(people), IMAGE_SIZE)
    data = "--data-dir", cohort, "--cache-dir", cache, "--run-dir", run
    options = *data, "--epochs", 1, "--prior-epochs", 1
    config = run / "config.json"
    # train.py has no options for the width: so it is stopped when it has loaded and measured the data, and
    # resumed.
    begun = run_watched("train.py", *options, limit=limits["train"], stop=config.exists)
    narrow(config)
    peaks = {"train": max(begun, run_watched("train.py", *options, "--resume", limit=limits["train"])),
             "predict": run_watched("predict.py", *data, "--evaluate", limit=limits["predict"])}
    image_bytes = people * volumes.SLAB_SLICES * IMAGE_SIZE ** 2
    row = {"people": people, "images": people * volumes.SLAB_SLICES, "image_gigabytes": image_bytes / 1e9,
           **{f"{name}_gigabytes": peak / 1e9 for name, peak in peaks.items()},
           **{f"{name}_limit_gigabytes": limit and limit / 1e9 for name, limit in limits.items()}}
    print("{people} people, {images:,} images of {image_gigabytes:.3f} GB: train.py {train_gigabytes:.3f}, "
          "predict.py {predict_gigabytes:.3f} GB".format(**row), flush=True)
    return row, {name: peak + image_bytes for name, peak in peaks.items()}


@cli.exit_on_user_error
def main():
    """Prints a row per cohort, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--people", type=cli.number(int, 20), default=40, metavar="N",
                        help=f"of the small cohort; the large one has {TIMES} times as many (default: 40)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small, limits = measure(Path(name) / "small", arguments.people, {"train": None, "predict": None})
        large, _ = measure(Path(name) / "large", TIMES * arguments.people, limits)
    common.finish("memory", arguments, {"rows": [small, large]})


if __name__ == "__main__":
    main()
