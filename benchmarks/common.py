"""What the benchmarks share: sides measured in turn, ratios with their range, and the record in assets/results.json.

Two timings minutes apart differ by more than many an effect. So the sides of a comparison are measured in turn, in several
rounds: what slows the machine for a while slows both. Each round gives one ratio; what counts is the median of the ratios,
with their range. If that range holds 1, the noise is larger than the effect, and no number is given.
"""

import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

import json
import os
from pathlib import Path
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf

import dataset
from support import cli, files, runs, volumes
from dataset import CodedSplit
from support.runs import Run
import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "assets" / "results.json"
NO_DIFFERENCE = "no difference measurable"


def argument_parser(doc):
    """The command line that all benchmarks have; `doc` is the script's docstring."""
    parser = cli.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the last line into assets/results.json")
    return parser


def add_rounds(parser, default):
    """Adds ``--rounds``: fewer than three say nothing of the noise."""
    parser.add_argument("--rounds", type=cli.number(int, 3), default=default, metavar="N",
                        help=f"in each of which every side is measured once (default: {default})")


def interleave(sides, rounds):
    """Measures every side once in each round, every second round in reverse order, so that a steady drift cancels.

    Args:
        sides: dict of functions without arguments, by name.
        rounds: how often.

    Returns:
        Dict of lists by name: what each function returned, round after round.
    """
    measured = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            measured[name].append(sides[name]())
    return measured


def ratio(ours, theirs):
    """Sums up the ratios of each round's two numbers.

    Returns:
        ``{"median", "min", "max", "rounds"}``; or, if the ratios lie on both sides of 1, ``{"verdict", "rounds"}`` alone.
    """
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    if min(ratios) <= 1 <= max(ratios):
        return {"verdict": NO_DIFFERENCE, "rounds": len(ratios)}
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": len(ratios)}


def in_words(summary):
    """A `ratio` in words."""
    if "verdict" in summary:
        return f"{summary['verdict']} in {summary['rounds']} rounds"
    return "{median:.3g} times ({min:.3g} to {max:.3g} in {rounds} rounds)".format(**summary)


def spread(values):
    """The median of a number over the rounds, with its range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Side:
    """A process that measures when it is asked to: one side of a comparison, or one row of a table.

    It is the same script with hidden arguments, which answers every one of its `requests` with a line of JSON.
    """

    def __init__(self, script, *arguments):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, script, *map(str, arguments)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        # Several sides share a GPU: none may take all of its memory.
                                        env={**os.environ, "TF_FORCE_GPU_ALLOW_GROWTH": "true"})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def ask(self, request=None):
        """Sends a request and waits for the answer.

        Raises:
            RuntimeError: if the process ended instead; says what it wrote to stderr.
        """
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(self.errors.read())
        return json.loads(line)


def requests():
    """In the process of a `Side`: what it is asked, until it is asked no more."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(row):
    """In the process of a `Side`: the answer to the last request."""
    print(json.dumps(row), flush=True)


def peak():
    """The most memory this process has held, in bytes; not getrusage's, which a child process inherits."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# What is trained ------------------------------------------------------------------------------------------------------


def noise_split(people, image_size, margin=0):
    """A `dataset.Split` of heads that show noise, inside a black border of `margin` pixels: cost does not depend on pictures."""
    heads = np.zeros((people, volumes.NUM_POSITIONS, image_size, image_size), np.uint8)
    inside = slice(margin, image_size - margin)
    rng = np.random.default_rng(0)
    for image in heads.reshape(-1, image_size, image_size):
        image[inside, inside] = rng.integers(0, 256, image[inside, inside].shape, np.uint8)
    return dataset.Split.from_heads(heads, range(volumes.NUM_POSITIONS))


def random_codes(split, prior):
    """A `dataset.CodedSplit` of the slices of a split, whose codes are random and whose persons are all average."""
    shape = 1, len(split.images), prior.grid_size, prior.grid_size
    codes = np.random.default_rng(0).integers(0, prior.num_embeddings, shape, np.int32)
    persons = np.zeros((1, len(split.images), prior.person_size), np.float32)
    return CodedSplit(codes, split.positions, dataset.context_indices(split, prior.steps_below), persons, prior.num_embeddings)


def run_without_folder(split, **options):
    """A `Run` on a split as train.py would begin it, as far as `train.new_vqvae` and `train.new_pixelcnn` ask.

    Args:
        split: a `dataset.Split`.
        **options: settings that differ from train.py's defaults.
    """
    settings = {**train.DEFAULTS, **options}
    vqvae = train.vqvae_arguments(split, settings)
    prior = {"grid_size": vqvae["image_size"] // settings["downsample"], "num_embeddings": settings["num_embeddings"]}
    return Run(ROOT, {"settings": settings, "vqvae": vqvae, "pixelcnn": prior})


# The record -----------------------------------------------------------------------------------------------------------


def hardware():
    """The machine in words."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    gpus = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
            for gpu in tf.config.list_physical_devices("GPU")]
    return (f"{os.cpu_count()} cores of {model[1].strip() if model else 'an unnamed CPU'}, {memory:.0f} GiB, "
            f"{', '.join(gpus) or 'no GPU'}")


def commit():
    """The commit that is checked out, and whether the code differs from it."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "*.py"]
    changed = subprocess.run(command, capture_output=True, text=True).stdout
    return f"{runs.git_commit()}{', with changes that are not committed' if changed else ''}"


def finish(key, arguments, result):
    """Prints the result as the last line; records it if ``--record`` asks for that.

    Args:
        key: of the benchmark in assets/results.json.
        arguments: the parsed command line.
        result: what json can write.
    """
    print(json.dumps(result))
    if arguments.record:
        script = Path(sys.argv[0]).resolve().relative_to(ROOT)
        command = shlex.join(["python", str(script), *(word for word in sys.argv[1:] if word != "--record")])
        origin = {"command": command, "commit": commit(), "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
                  "machine": runs.build_info()}
        record(RESULTS, key, {**origin, **result})


def record(path, key, entry):
    """Sets one key of the JSON file; the others stay."""
    files.write_json(path, {**json.loads(path.read_text()), key: entry})
