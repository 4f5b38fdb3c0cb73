"""Seconds and memory to load a data set of OASIS size: ours against the followed project's way, first and second start.

    python benchmarks/loading.py [--people 354]

Makes 32 PNGs of 256x256 pixels per person in the OASIS layout (354 people are OASIS' 11,328 images), from the demo
cohort's heads, shifted. The followed project's way is a list: glob, Pillow, an array of float64 in each place, made one
array at the end; it does the same at every start. Ours is `dataset.load_splits`, first without, then with the cache of a
start before. Each runs in a process of its own, which ends by touching every image; memory is the peak of the process
above what its imports took. Files are warm for both. The last line is JSON.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import concurrent.futures
import json
from pathlib import Path
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cli
import dataset
import volumes

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
    heads = list(dataset.load_splits(volumes.make_demo_cohort())["train"].images.reshape(-1, volumes.NUM_POSITIONS, 256, 256))
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


@cli.exit_on_input_error
def main():
    """Prints a row per way and start, then JSON."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--people", type=cli.number(int, 30), default=354, metavar="N", help="(default: 354)")
    people = parser.parse_args().people
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"Writing {32 * people:,} PNGs ...", flush=True)
        make_data(folder, people)
        rows = {}
        for label, way, arguments in (("theirs", THEIRS, [folder]), ("ours_first", OURS, [folder, folder / "cache"]),
                                      ("ours_second", OURS, [folder, folder / "cache"]), ("theirs_again", THEIRS, [folder])):
            rows[label] = measure(way, *arguments)
            print("{:14}{seconds:8.2f} s{:10.2f} GB".format(label, rows[label]["peak_bytes"] / 1e9, **rows[label]), flush=True)
    theirs = min(rows["theirs"], rows["theirs_again"], key=lambda row: row["seconds"])
    print(json.dumps({"speedup_first": theirs["seconds"] / rows["ours_first"]["seconds"],
                      "speedup_second": theirs["seconds"] / rows["ours_second"]["seconds"],
                      "memory_ratio": max(rows["ours_first"]["peak_bytes"], rows["ours_second"]["peak_bytes"]) / theirs["peak_bytes"],
                      "settings": {"people": people, "cores": os.cpu_count()}, "rows": rows}))


if __name__ == "__main__":
    main()
