"""How time and memory grow with the size of the images, the grid, the codebook and the number of people.

    python benchmarks/scaling.py [--steps 10]

One thing is changed at a time from 256x256 pixels, a 32x32 grid, 512 codes and 20 people (noise for pictures: the cost
does not depend on what they show, nor is any margin black). Each row is a process of its own: the images/s of both stages
in steps of 8 after two that warm up, the seconds to sample 16 grids (compilation apart), and the peak of memory above
what imports took. The last line is JSON.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
from pathlib import Path
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training import BATCH, peak
import cli
import dataset
import modules

BASE = {"image_size": 256, "downsample": 8, "num_embeddings": 512, "people": 20}
CHANGES = [{}, {"image_size": 128}, {"image_size": 512}, {"downsample": 4}, {"num_embeddings": 128}, {"num_embeddings": 2048},
           {"people": 200}]


def images_per_second(model, batches, steps):
    """The speed of training steps over a tf.data pipeline."""
    model.compile(modules.Adam(1e-3, global_clipnorm=1.0))
    step, batches = tf.function(model.train_step), iter(batches)
    for _ in range(2):
        step(next(batches))
    start = time.perf_counter()
    for _ in range(steps):
        result = step(next(batches))
    next(iter(result.values())).numpy()
    return steps * BATCH / (time.perf_counter() - start)


def measure(setting, steps):
    """Measures one setting in this process; prints a JSON row."""
    before = peak()
    keras.utils.set_random_seed(0)
    rng, size = np.random.default_rng(0), setting["image_size"]
    count = 32 * setting["people"]
    images = np.empty((count, size, size), np.uint8)
    for image in images:
        image[:] = rng.integers(0, 256, image.shape, np.uint8)
    split = dataset.Split("train", images, np.arange(count) // 32, np.arange(count, dtype=np.int32) % 32)
    vqvae = modules.VQVAE(size, setting["num_embeddings"], downsample=setting["downsample"])
    row = {"vqvae_images_per_second": images_per_second(vqvae, dataset.training_batches(split, BATCH, 0), steps)}
    grid = vqvae.grid_size
    codes = rng.integers(0, setting["num_embeddings"], (count, grid, grid), np.int32)
    prior = modules.PixelCNN(grid, setting["num_embeddings"])
    below, persons = dataset.head_context(split, prior, 0)
    told = codes[np.newaxis], split.positions, below, persons[np.newaxis], setting["num_embeddings"]
    row["pixelcnn_images_per_second"] = images_per_second(prior, dataset.code_batches(*told, BATCH, 0), steps)
    prior.sample(np.arange(16))
    start = time.perf_counter()
    prior.sample(np.arange(16))
    row |= {"sampling_seconds_per_image": (time.perf_counter() - start) / 16, "peak_gigabytes": (peak() - before) / 1e9}
    print(json.dumps(row))


@cli.exit_on_input_error
def main():
    """Prints a row per setting, then JSON."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=cli.number(int, 1), default=10, metavar="N", help="that count (default: 10)")
    parser.add_argument("--measure", type=json.loads, help="one setting, in this process (the script calls itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.steps)
    rows = []
    for change in CHANGES:
        setting = {**BASE, **change}
        command = [sys.executable, __file__, "--steps", str(arguments.steps), "--measure", json.dumps(setting)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        rows.append({**setting, **json.loads(done.stdout.splitlines()[-1])})
        print("{image_size} pixels, grid {0}, {num_embeddings} codes, {people} people: VQ-VAE {vqvae_images_per_second:.1f} images/s, "
              "PixelCNN {pixelcnn_images_per_second:.1f} images/s, sampling {sampling_seconds_per_image:.3f} s per image, "
              "{peak_gigabytes:.2f} GB".format(setting["image_size"] // setting["downsample"], **rows[-1]), flush=True)
    print(json.dumps({"settings": {"batch_size": BATCH, "steps": arguments.steps, "cores": os.cpu_count()}, "rows": rows}))


if __name__ == "__main__":
    main()
