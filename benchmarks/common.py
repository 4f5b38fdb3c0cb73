"""What the benchmarks share: sides measured in turn, their ratios, the record in assets/results.json.

Two timings minutes apart differ by more than many an effect. So the sides of a comparison are measured in
turn, in several rounds: what slows the machine for a while slows both. Each round gives one ratio; what
counts is the median of the ratios, with their range. If that range holds 1, the noise is larger than the
effect, and no number is given.
"""

import contextlib
import dataclasses
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
from support.images import neighbours
from support.runs import Run
import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "assets" / "results.json"
NO_DIFFERENCE = "no difference measurable"


def argument_parser(doc, default_rounds=None):
    """The command line that all benchmarks have.

    Args:
        doc: the script's docstring, whose first line describes it.
        default_rounds: adds ``--rounds`` with this default: at least three, for fewer say nothing of the
            noise.
    """
    parser = cli.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the last line into assets/results.json")
    if default_rounds:
        parser.add_argument("--rounds", type=cli.number(int, 3), default=default_rounds, metavar="N",
                            help=f"in each of which every side is measured once (default: {default_rounds})")
    return parser


def interleave(sides, rounds):
    """Measures every side once in each round, in reverse order in every second round, so that drift cancels.

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
        ``{"median", "min", "max", "rounds"}``; or ``{"verdict", "rounds"}`` if the ratios lie on both sides
        of 1.
    """
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    if min(ratios) <= 1 <= max(ratios):
        return {"verdict": NO_DIFFERENCE, "rounds": len(ratios)}
    return {**median_and_range(ratios), "rounds": len(ratios)}


def in_words(summary):
    """A `ratio` in words."""
    if "verdict" in summary:
        return f"{summary['verdict']} in {summary['rounds']} rounds"
    return "{median:.3g} times ({min:.3g} to {max:.3g} in {rounds} rounds)".format(**summary)


def median_and_range(values):
    """The median of a number over the rounds, with its range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Side:
    """A process that measures when it is asked to: one side of a comparison, or one row of a table.

    It is the same script with hidden arguments, which answers every one of its `requests` with a line of
    JSON. Other lines, such as notes on the data, are passed over.
    """

    def __init__(self, script, *arguments):
        self.errors = tempfile.TemporaryFile("w+")
        # Several sides share a GPU: none may take all of its memory.
        environment = {**os.environ, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
        self.process = subprocess.Popen([sys.executable, script, *map(str, arguments)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, env=environment)

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
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(self.errors.read())


def ask_in_turn(script, sides, rounds):
    """Starts a `Side` for each list of arguments in the dict `sides`, and measures them in turn.

    A first answer of each, for which it compiles, does not count.

    Returns:
        Dict of lists by name: the answers, round after round.
    """
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(Side(script, *arguments)) for name, arguments in sides.items()}
        for side in started.values():
            side.ask()
        return interleave({name: side.ask for name, side in started.items()}, rounds)


def requests():
    """In the process of a `Side`: what it is asked, until it is asked no more."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(row):
    """In the process of a `Side`: the answer to the last request."""
    print(json.dumps(row), flush=True)


def memory(field, process="self"):
    """A line of a process' status, such as VmHWM (the most memory it has held), in bytes.

    Not getrusage's peak, which a child process inherits.
    """
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


# What is trained --------------------------------------------------------------------------------------------


def noise_split(people, image_size, margin=0):
    """A `dataset.Split` of heads that show noise, for cost does not depend on pictures.

    Args:
        people: how many.
        image_size: side of a slice, in pixels.
        margin: width of the black border, in pixels.
    """
    heads = np.zeros((people, volumes.SLAB_SLICES, image_size, image_size), np.uint8)
    inside = slice(margin, image_size - margin)
    rng = np.random.default_rng(0)
    for image in heads.reshape(-1, image_size, image_size):
        image[inside, inside] = rng.integers(0, 256, image[inside, inside].shape, np.uint8)
    return dataset.Split.from_heads(heads, range(volumes.SLAB_SLICES))


def random_codes(split, prior):
    """A `dataset.CodedSplit` of the slices of a split: random codes, and persons that are all average."""
    shape = 1, len(split.images), prior.grid_size, prior.grid_size
    codes = np.random.default_rng(0).integers(0, prior.num_embeddings, shape, np.uint16)
    persons = np.zeros((1, len(split.images), prior.person_size), np.float32)
    context = dataset.context_indices(split, prior.steps_below)
    near_codes = np.arange(dataset.NEAR_CODES, dtype=np.int32) + np.zeros((prior.num_embeddings, 1), np.int32)
    return dataset.CodedSplit(codes, split.positions, context, persons,
                              neighbours(split.cases, split.positions), near_codes)


def vqvae_stage(split, **settings):
    """Stage 1 of train.py before it begins, on a training split, without validation people or a run folder.

    Args:
        split: a `dataset.Split`.
        **settings: what differs from the defaults of `train.Settings`.
    """
    settings = train.Settings(**settings)
    vqvae, pixelcnn = train.model_arguments({"train": split}, settings)
    config = {"settings": dataclasses.asdict(settings), "vqvae": vqvae, "pixelcnn": pixelcnn}
    return train.VQVAEStage(Run(ROOT, config), {"train": split})


def build_both(stage):
    """The networks of both stages with their optimisers, untrained; `stage` is a `vqvae_stage`."""
    vqvae = stage.build()
    return vqvae, train.PixelCNNStage(stage.run, stage.splits, vqvae).build()


# The record -------------------------------------------------------------------------------------------------


def hardware():
    """The machine in words."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    gpus = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
            for gpu in tf.config.list_physical_devices("GPU")]
    cpu = model[1].strip() if model else "an unnamed CPU"
    return f"{os.cpu_count()} cores of {cpu}, {gibibytes:.0f} GiB, {', '.join(gpus) or 'no GPU'}"


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
        origin = {"command": command, "commit": commit(), "date": time.strftime("%Y-%m-%d"),
                  "hardware": hardware(), "machine": runs.build_info()}
        record(RESULTS, key, {**origin, **result})


def record(path, key, entry):
    """Sets one key of the JSON file; the others stay."""
    files.write_json(path, {**json.loads(path.read_text()), key: entry})
