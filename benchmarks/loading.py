"""Loading a data set of OASIS size, ours against the followed project's way; and the memory of an epoch from the disk.

    python benchmarks/loading.py [--people 354] [--rounds 3]

Makes 32 PNGs of 256x256 pixels per person in the OASIS layout (354 people are OASIS' 11,328 images), from the demo
cohort's heads, shifted. The followed project's way is a list: glob, Pillow, an array of float64 in each place, made one
array at the end; it does the same at every start. Ours is `dataset.load_splits`, first without, then with the cache of a
start before. Each runs in a process of its own, which ends by touching every image; memory is the peak of the process
above what its imports took. Files are warm for both. The ways take turns (benchmarks/common.py).

Then, for 10, 40 and 160 people, a process loads the train split through the cache, which is a memory map, starts the
codebook and trains stage 1 for one epoch, then goes once through the same images in order, as validation does. Its memory is
the peak of what belongs to the process alone (RssAnon), above what imports took: the map's own pages are the file's, which
the kernel takes back when it needs them. `epoch_memory` over 1: what 16 times the images add. The last line is JSON.
"""

import os
from pathlib import Path
import sys

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from support import cli  # first: sets what TensorFlow, Keras and matplotlib read when imported

import concurrent.futures
import json
import re
import shutil
import subprocess
import tempfile
import threading

import keras
import numpy as np
from PIL import Image

from benchmarks import common
import dataset
import modules
import train
from support import template, volumes

EPOCH_PEOPLE = 10, 40, 160  # 1, 4 and 16 times the images
SHARES = {"train": 302 / 354, "validate": 35 / 354}  # the rest is the test split

MEASURED = """
import glob, json, pathlib, re, sys, time
import numpy as np
from PIL import Image
{imports}
def peak():  # not getrusage's, which a child process inherits
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before, start = peak(), time.perf_counter()
{load}
seconds = time.perf_counter() - start
total = sum(int(image.astype(np.float64).sum() > 0) for images in splits for image in images)
print(json.dumps({{"seconds": seconds, "peak_bytes": peak() - before, "images": sum(map(len, splits)), "not_black": total}}))
"""
THEIRS = {"imports": "", "load": """
splits = []
for name in ("train", "validate", "test"):
    images = []
    for path in glob.glob(f"{sys.argv[1]}/keras_png_slices_{name}/*.png"):
        images.append(np.asarray(Image.open(path)).astype("float64") / 255)
    splits.append(np.array(images))
"""}
OURS = {"imports": "import dataset", "load": """
splits = [split.images for split in dataset.load_splits(sys.argv[1], cache_dir=sys.argv[2]).values()]
"""}


def make_data(folder, people):
    """Writes the three splits: every person a demo head, shifted by a few pixels."""
    heads = list(dataset.load_splits(template.make_demo_cohort())["train"].images.reshape(-1, volumes.NUM_POSITIONS, 256, 256))
    counts = [round(people * share) for share in SHARES.values()]
    ends = np.cumsum([*counts, people - sum(counts)])
    for name in volumes.SPLITS:
        (folder / f"keras_png_slices_{name}").mkdir()

    def write_person(case):
        name = volumes.SPLITS[int(np.searchsorted(ends, case, side="right"))]
        shift = np.random.default_rng(case).integers(-12, 13, 2)
        for position, image in enumerate(np.roll(heads[case % len(heads)], shift, (1, 2))):
            Image.fromarray(image).save(folder / f"keras_png_slices_{name}" / f"case_{case + 1:03d}_slice_{position}.nii.png")

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_person, range(people)))


def measure(way, *arguments):
    """Loads in a process of its own; returns its row."""
    done = subprocess.run([sys.executable, "-c", MEASURED.format(**way), *map(str, arguments)], capture_output=True, text=True,
                          check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout.splitlines()[-1])


class Watch(threading.Thread):
    """Looks at this process' own memory many times a second and keeps the peak, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()

    def run(self):
        """Until `ended` is set."""
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now():
        """Anonymous memory, without the pages of mapped files."""
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure_epoch(folder, people):
    """Trains one epoch from the memory map, in a process of its own; prints a JSON row."""
    before, watch = Watch.now(), Watch()
    watch.start()
    keras.utils.set_random_seed(0)
    split = dataset.load_splits(folder, ["train"], people, cache_dir=Path(folder) / "cache")["train"]
    settings = train.DEFAULTS
    batch_size = settings["batch_size"]
    steps = len(split.images) // batch_size
    model = modules.VQVAE(**train.model_settings(split, settings))
    model.compile(train.adam(settings["learning_rate"], train.CONSTANTS["warmup_steps"] + steps))
    model.start_codebook(dataset.training_batches(split, batch_size, 1), train.CONSTANTS["warmup_steps"])
    model.fit(dataset.training_batches(split, batch_size, 0), steps_per_epoch=steps, verbose=0, shuffle=False)
    for images, _ in dataset.image_batches(split, 32):
        model.encode_to_codes(images)
    watch.ended.set()
    watch.join()
    print(json.dumps({"people": split.num_people, "images": len(split.images), "image_gigabytes": split.images.nbytes / 1e9,
                      "peak_gigabytes": (watch.peak - before) / 1e9}))


def compare_epochs(folder, numbers):
    """A row of `measure_epoch` for each number of people."""
    rows = []
    for people in numbers:
        done = subprocess.run([sys.executable, __file__, "--measure-epoch", folder, str(people)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print("epoch from the map:{images:7,} images of {image_gigabytes:.3f} GB, peak {peak_gigabytes:.3f} GB"
              .format(**rows[-1]), flush=True)
    return rows


def compare_loading(folder, rounds):
    """Loads in turn; returns the rows, and the ratios of theirs to ours."""
    cache = folder / "cache"

    def first():
        shutil.rmtree(cache, ignore_errors=True)
        return measure(OURS, folder, cache)

    measure(THEIRS, folder)  # warms the files
    first()
    measured = common.interleave({"theirs": lambda: measure(THEIRS, folder), "ours_first": first,
                                  "ours_second": lambda: measure(OURS, folder, cache)}, rounds)
    seconds = {name: [row["seconds"] for row in rows] for name, rows in measured.items()}
    rows = {name: {"seconds": common.spread(seconds[name]), "images": done[0]["images"],
                   "peak_gigabytes": max(row["peak_bytes"] for row in done) / 1e9} for name, done in measured.items()}
    return rows, {name: common.ratio(seconds["theirs"], seconds[name]) for name in ("ours_first", "ours_second")}


@cli.exit_on_input_error
def main():
    """Prints a row per way and start, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--people", type=cli.number(int, 30), default=354, metavar="N", help="(default: 354)")
    common.add_rounds(parser, 3)
    parser.add_argument("--measure-epoch", nargs=2, help="a folder and its people, in this process (the script calls itself)")
    arguments = parser.parse_args()
    if arguments.measure_epoch:
        return measure_epoch(arguments.measure_epoch[0], int(arguments.measure_epoch[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"Writing {32 * arguments.people:,} PNGs ...", flush=True)
        make_data(folder, arguments.people)
        rows, speedups = compare_loading(folder, arguments.rounds)
        for label, row in rows.items():
            print("{:14}{:8.2f} s{peak_gigabytes:10.2f} GB".format(label, row["seconds"]["median"], **row))
        for label, summary in speedups.items():
            print(f"theirs / {label}: {common.say(summary)}", flush=True)
        epochs = compare_epochs(folder, [people for people in EPOCH_PEOPLE if people < arguments.people * SHARES["train"]])
    growth = {row["images"] / epochs[0]["images"]: row["peak_gigabytes"] / epochs[0]["peak_gigabytes"] for row in epochs}
    ours = max(rows["ours_first"]["peak_gigabytes"], rows["ours_second"]["peak_gigabytes"])
    common.finish("loading", arguments, {
        "speedup_first": speedups["ours_first"], "speedup_second": speedups["ours_second"],
        "memory_ratio": ours / rows["theirs"]["peak_gigabytes"], "epoch_memory": growth,
        "settings": {"people": arguments.people, "rounds": arguments.rounds}, "rows": rows, "epochs": epochs})


if __name__ == "__main__":
    main()
