"""Sampling speed: the cached sampler against a full forward pass for each code, on the same weights and noise.

    python benchmarks/sampling.py [--run-dir RUN]

The slow side is measured on a few codes and scaled to the whole grid. That both draw the same codes is checked at every
place: the full network, shown the codes of the cached sampler, must choose each of them again from the same noise; as it
sees only the codes before a place, it would by induction have drawn them itself. Without a run, the prior is a fresh one
of the default size, its weights moved at random. The last line is JSON.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
from pathlib import Path
import sys
import time

import keras
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
import modules
import predict

SIZES = 16, 32
BATCHES = 1, 4, 16, 64
REPEATS = 5  # of the slow side's forward passes


def random_prior(grid_size):
    """A prior of the default size whose every weight plays a part."""
    keras.utils.set_random_seed(0)
    prior = modules.PixelCNN(grid_size)
    for weight in prior.trainable_variables:
        weight.assign_add(0.05 * tf.random.normal(weight.shape))
    return prior


def compare(prior, batch):
    """One row: seconds per image both ways, compilation apart, and whether the codes are the same."""
    positions = tf.range(batch) % prior.num_positions
    noise = prior.gumbel_noise(0, tf.range(batch))
    fast = tf.function(prior.sample_from_noise, jit_compile=True)
    slow = tf.function(lambda codes: prior({"codes": codes, "positions": positions}))
    start = time.perf_counter()
    codes = fast(positions, noise, tf.constant(1.0))
    compilation = time.perf_counter() - start
    again = tf.argmax(slow(codes) + noise, axis=-1, output_type=tf.int32)
    start = time.perf_counter()
    fast(positions, noise, tf.constant(1.0)).numpy()
    fast_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(REPEATS):
        slow(codes)
    slow_seconds = (time.perf_counter() - start) / REPEATS * prior.grid_size ** 2
    return {"grid_size": prior.grid_size, "batch": batch, "seconds_per_image": fast_seconds / batch,
            "slow_seconds_per_image": slow_seconds / batch, "speedup": slow_seconds / fast_seconds,
            "first_call_seconds": compilation, "codes_identical": bool(np.array_equal(codes, again))}


@cli.exit_on_input_error
def main():
    """Prints a row per grid and batch, then JSON."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run-dir", metavar="DIR", help="take the prior of this run (default: random weights)")
    arguments = parser.parse_args()
    if arguments.run_dir:
        priors = [predict.load_run(predict.find_run(arguments.run_dir))[2]]
    else:
        priors = [random_prior(size) for size in SIZES]
    rows = []
    for prior in priors:
        for batch in BATCHES:
            rows.append(compare(prior, batch))
            print("{grid_size}x{grid_size}, batch {batch:2}: {seconds_per_image:.4f} s per image against "
                  "{slow_seconds_per_image:.1f} ({speedup:.0f} times), codes identical: {codes_identical}".format(**rows[-1]),
                  flush=True)
    chosen = next(row for row in reversed(rows) if row["batch"] == 16)
    print(json.dumps({"speedup": chosen["speedup"], "seconds_per_image": chosen["seconds_per_image"],
                      "codes_identical": all(row["codes_identical"] for row in rows),
                      "settings": {"run_dir": arguments.run_dir, "cores": os.cpu_count(), "slow_side": f"{REPEATS} forward passes, scaled to "
                                   "one for each code"}, "rows": rows}))


if __name__ == "__main__":
    main()
