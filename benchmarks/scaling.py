"""How time and memory grow with the size of the images, the grid, the codebook and the number of people.

    python benchmarks/scaling.py [--steps 10] [--rounds 5]

One thing is changed at a time from 256x256 pixels, a 32x32 grid, 512 codes and 20 people (noise for pictures:
the cost does not depend on what they show, nor is any margin black). Each row is a process of its own, and
the rows are measured in turn (benchmarks/common.py): the images/s of both stages in steps of 8, the seconds
to sample 16 grids, all after a first time that compiles; the median over the rounds counts. Memory is the
peak above what imports took; all rows together hold about 10 GB. The last line is JSON; its `ratios` are each
row's speeds over the first row's.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import json
import time

import keras
import numpy as np
import tensorflow as tf

from benchmarks import common
import dataset
from support import cli
import train

BATCH = train.Settings.batch_size  # of both stages
BASE = {"image_size": 256, "downsample": 8, "num_embeddings": 512, "people": 20}
CHANGES = {
    "base": {},
    "128 pixels": {"image_size": 128},
    "512 pixels": {"image_size": 512},
    "grid of 64": {"downsample": 4},
    "128 codes": {"num_embeddings": 128},
    "2048 codes": {"num_embeddings": 2048},
    "200 people": {"people": 200},
}
SPEEDS = "vqvae_images_per_second", "pixelcnn_images_per_second", "sampling_seconds_per_image"


def trainer(model, batches, steps):
    """A function that trains a compiled model for so many steps of a pipeline and returns the images/s."""
    step, batches = tf.function(model.train_step), iter(batches)

    def images_per_second():
        start = time.perf_counter()
        for _ in range(steps):
            result = step(next(batches))
        next(iter(result.values())).numpy()
        return steps * BATCH / (time.perf_counter() - start)

    return images_per_second


def measure(people, image_size, steps, **settings):
    """Answers every request with a row for one setting, in a process of its own."""
    before = common.memory("VmHWM")
    keras.utils.set_random_seed(0)
    split = common.noise_split(people, image_size)
    vqvae, prior = common.build_both(common.vqvae_stage(split, **settings))
    code_batches = dataset.code_batches(common.random_codes(split, prior), BATCH, seed=0)
    vqvae_speed = trainer(vqvae, dataset.image_batches(split, BATCH, 0), steps)
    prior_speed = trainer(prior, code_batches, steps)
    for _ in common.requests():
        row = {"vqvae_images_per_second": vqvae_speed(), "pixelcnn_images_per_second": prior_speed()}
        start = time.perf_counter()
        prior.sample(np.arange(16))
        common.answer({**row, "sampling_seconds_per_image": (time.perf_counter() - start) / 16,
                       "peak_gigabytes": (common.memory("VmHWM") - before) / 1e9})


@cli.exit_on_user_error
def main():
    """Prints a row per setting, then JSON."""
    parser = common.argument_parser(__doc__, default_rounds=5)
    parser.add_argument("--steps", type=cli.number(int, 1), default=10, metavar="N",
                        help="per round and stage (default: 10)")
    parser.add_argument("--measure", type=json.loads, help="one setting, here (the script calls itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(steps=arguments.steps, **arguments.measure)
    settings = {name: {**BASE, **change} for name, change in CHANGES.items()}
    sides = {name: ("--steps", arguments.steps, "--measure", json.dumps(setting))
             for name, setting in settings.items()}
    measured = common.ask_in_turn(__file__, sides, arguments.rounds)
    speeds = {name: {key: [row[key] for row in rows] for key in SPEEDS} for name, rows in measured.items()}
    rows = {name: {**settings[name], "grid": settings[name]["image_size"] // settings[name]["downsample"],
                   **{key: common.median_and_range(values) for key, values in speeds[name].items()},
                   "peak_gigabytes": measured[name][-1]["peak_gigabytes"]} for name in settings}
    ratios = {name: {key: common.ratio(speeds[name][key], speeds["base"][key]) for key in SPEEDS}
              for name in settings if name != "base"}
    for name, row in rows.items():
        print("{:15} VQ-VAE {:.1f} images/s, PixelCNN {:.1f} images/s, sampling {:.3f} s per image, {:.2f} GB"
              .format(name, *(row[key]["median"] for key in SPEEDS), row["peak_gigabytes"]))
    for name, summaries in ratios.items():
        words = "; ".join(f"{key} {common.in_words(summary)}" for key, summary in summaries.items())
        print(f"{name} / base: {words}")
    common.finish("scaling", arguments, {
        "settings": {"batch_size": BATCH, "steps": arguments.steps, "rounds": arguments.rounds},
        "ratios": ratios, "rows": rows})


if __name__ == "__main__":
    main()
