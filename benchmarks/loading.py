"""Loading a data set of OASIS size, ours against PatternFlow's way; and the memory of an epoch from the disk.

    python benchmarks/loading.py [--people 354] [--rounds 3]

Simulates people in 256x256 pixels, 32 PNGs each, in the OASIS layout (354 people are OASIS' 11,328 images).
PatternFlow's way is a list: glob, Pillow, an array of float64 in each place, made one array at the end; it
does the same at every start. Ours is `dataset.load_splits`, first without, then with the cache of a start
before. Each start is a process of its own; its seconds end when every image was read once, its memory is the
peak above what imports took. Files are warm for both. The ways take turns (benchmarks/common.py).

Then, for 10, 40 and 160 people, a process loads the train split through the cache, which is a memory map,
starts the codebook and trains stage 1 for one epoch, then goes once through the same images in order, as
validation does. Its memory is the peak of what belongs to the process alone (RssAnon), above what imports
took: the map's own pages are the file's, which the kernel takes back when it needs them. `epoch_memory` over
1: what 16 times the images add. The whole of train.py and of predict.py is measured by benchmarks/memory.py.
The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import shutil
import tempfile
import threading
import time

import keras
import numpy as np
from PIL import Image

from benchmarks import common
import dataset
from support import cli, slices, template, volumes

EPOCH_PEOPLE = 10, 40, 160  # 1, 4 and 16 times the images
IMAGE_SIZE = 256


def load_theirs(folder, _):
    """PatternFlow's way: the images of each split, float64 (N, H, W)."""
    splits = []
    for name in slices.SPLITS:
        images = []
        for path in (Path(folder) / f"keras_png_slices_{name}").glob("*.png"):
            images.append(np.asarray(Image.open(path)).astype("float64") / 255)
        splits.append(np.array(images))
    return splits


def load_ours(folder, cache):
    """Ours: the images of each split, uint8 (N, H, W), mapped into memory."""
    return [split.images for split in dataset.load_splits(folder, cache_dir=cache).values()]


LOADERS = {"theirs": load_theirs, "ours": load_ours}


def measure_loading(way, folder, cache):
    """In a process of its own: loads, and answers with seconds and memory."""
    for _ in common.requests():
        before, start = common.memory("VmHWM"), time.perf_counter()
        splits = LOADERS[way](folder, cache)
        brightest = max(images.max() for images in splits)  # reads every image
        seconds = time.perf_counter() - start
        common.answer({"seconds": seconds, "peak_bytes": common.memory("VmHWM") - before,
                       "images": sum(map(len, splits)), "brightest": float(brightest)})


class Watch(threading.Thread):
    """Looks at this process' own memory many times a second and keeps the peak, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stop = 0, threading.Event()

    def run(self):
        """Until `stop` is set."""
        while not self.stop.wait(0.01):
            self.peak = max(self.peak, common.memory("RssAnon"))


def measure_epoch(folder, cache, people):
    """In a process of its own: trains one epoch from the memory map, and answers with its memory."""
    next(common.requests())
    before, watch = common.memory("RssAnon"), Watch()
    watch.start()
    keras.utils.set_random_seed(0)
    split = dataset.load_splits(folder, ["train"], people, cache_dir=cache)["train"]
    stage = common.vqvae_stage(split, epochs=1)
    model = stage.begin()
    batches = stage.batches(model, "train", stage.batch_size, stage.run.seed)
    model.fit(batches, steps_per_epoch=stage.steps_per_epoch, verbose=0, shuffle=False)
    for images, _ in dataset.image_batches(split, 32):
        model.encode_to_codes(images)
    watch.stop.set()
    watch.join()
    common.answer({"people": split.num_people, "images": len(split.images),
                   "image_gigabytes": split.images.nbytes / 1e9,
                   "peak_gigabytes": (watch.peak - before) / 1e9})


def ask_once(*arguments):
    """The answer of a new process of this script."""
    with common.Side(__file__, "--measure", *arguments) as side:
        return side.ask()


def compare_epochs(folder, cache, numbers):
    """A row of `measure_epoch` for each number of people."""
    rows = []
    for people in numbers:
        rows.append(ask_once("epoch", folder, cache, people))
        print("epoch of the map:{images:7,} images of {image_gigabytes:.3f} GB, peak {peak_gigabytes:.3f} GB"
              .format(**rows[-1]), flush=True)
    return rows


def compare_loading(folder, cache, rounds):
    """Loads in turn; returns the rows, and the ratios of theirs to ours."""
    def first():
        shutil.rmtree(cache, ignore_errors=True)
        return ask_once("ours", folder, cache)

    ways = {"theirs": lambda: ask_once("theirs", folder, cache), "ours_first": first,
            "ours_second": lambda: ask_once("ours", folder, cache)}
    for name in ("theirs", "ours_first"):
        ways[name]()  # warms the files, and makes a cache
    measured = common.interleave(ways, rounds)
    seconds = {name: [row["seconds"] for row in rows] for name, rows in measured.items()}
    rows = {name: {"seconds": common.median_and_range(seconds[name]), "images": starts[0]["images"],
                   "peak_gigabytes": max(row["peak_bytes"] for row in starts) / 1e9}
            for name, starts in measured.items()}
    ours = "ours_first", "ours_second"
    return rows, {name: common.ratio(seconds["theirs"], seconds[name]) for name in ours}


@cli.exit_on_user_error
def main():
    """Prints a row per way and start, then JSON."""
    parser = common.argument_parser(__doc__, default_rounds=3)
    parser.add_argument("--people", type=cli.number(int, 30), default=354, metavar="N", help="(default: 354)")
    parser.add_argument("--measure", nargs="+", help="one start or epoch, here (the script calls itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        what, folder, cache, *people = arguments.measure
        if what == "epoch":
            return measure_epoch(folder, cache, int(people[0]))
        return measure_loading(what, folder, cache)
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "people", Path(name) / "cache"
        print(f"Writing {volumes.SLAB_SLICES * arguments.people:,} PNGs ...", flush=True)
        people = template.split_people(arguments.people)
        template.write_cohort(folder, people, IMAGE_SIZE)
        rows, speedups = compare_loading(folder, cache, arguments.rounds)
        for label, row in rows.items():
            print("{:14}{:8.2f} s{peak_gigabytes:10.2f} GB".format(label, row["seconds"]["median"], **row))
        for label, summary in speedups.items():
            print(f"theirs / {label}: {common.in_words(summary)}", flush=True)
        numbers = [number for number in EPOCH_PEOPLE if number < people["train"]]
        epochs = compare_epochs(folder, cache, numbers)
    growth = {row["images"] / epochs[0]["images"]: row["peak_gigabytes"] / epochs[0]["peak_gigabytes"]
              for row in epochs}
    ours = max(rows["ours_first"]["peak_gigabytes"], rows["ours_second"]["peak_gigabytes"])
    common.finish("loading", arguments, {
        "speedup_first": speedups["ours_first"], "speedup_second": speedups["ours_second"],
        "memory_ratio": ours / rows["theirs"]["peak_gigabytes"], "epoch_memory": growth,
        "settings": {"people": arguments.people, "rounds": arguments.rounds}, "rows": rows, "epochs": epochs})


if __name__ == "__main__":
    main()
