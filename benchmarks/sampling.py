"""Sampling speed: the cached sampler against a full forward pass for each code, same weights, same noise.

    python benchmarks/sampling.py [--run-dir RUN]

The slow side is measured on one code in each round and scaled to the whole grid; both sides take turns
(benchmarks/common.py). That both sample the same codes is checked at every grid cell: the full network, shown
the codes of the cached sampler, must choose each of them again from the same noise; as it sees only the codes
before a cell, it would by induction have sampled them itself. Where two codes tie to within float32's
rounding, either is right: so codes that differ are counted, together with the most by which the full network
prefers its own. Without a run, the prior is a fresh one of the default size, its weights moved at random. The
last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import statistics
import time

import keras
import numpy as np
import tensorflow as tf

from benchmarks import common
import modules
import predict
from support import cli, sampler

SIZES = 16, 32
BATCHES = 1, 4, 16, 64
ROUNDS = 5


def random_prior(grid_size):
    """A prior of the default size whose every weight plays a part."""
    keras.utils.set_random_seed(0)
    prior = modules.PixelCNN(grid_size)
    for weight in prior.trainable_variables:
        weight.assign_add(0.05 * tf.random.normal(weight.shape))
    prior.fit_people(np.random.default_rng(0).random((20, *prior.mean_picture.shape)))
    return prior


def seconds_of(call):
    """The seconds of a call, and what it returned."""
    start = time.perf_counter()
    returned = call()
    return time.perf_counter() - start, returned


def compare(prior, batch):
    """One row: seconds per image both ways, compilation apart, and how many codes differ."""
    numbers, grid = tf.range(batch), prior.grid_size
    positions = tf.gather(prior.slice_positions, numbers % len(prior.slice_positions))
    noise = sampler.gumbel_noise(prior, 0, "benchmark", numbers)
    person = sampler.sample_people(prior, 0, "benchmark", numbers)
    context = tf.random.stateless_uniform((batch, len(prior.steps_below), grid, grid), (0, 0),
                                          maxval=prior.num_embeddings, dtype=tf.int32)
    conditions = {"positions": positions, "context": context, "person": person}
    slow = tf.function(lambda codes: prior({"codes": codes, **conditions}))

    def fast():
        return sampler.compiled_sampler(prior)(positions, noise, tf.constant(1.0), context, person).numpy()

    compilation, codes = seconds_of(fast)
    scores = slow(codes) + noise
    # 0 where the full network chooses the same code
    excess = tf.reduce_max(scores, axis=-1) - tf.gather(scores, codes, batch_dims=3)
    measured = common.interleave({
        "fast": lambda: seconds_of(fast)[0],
        "slow": lambda: seconds_of(lambda: slow(codes)[0, 0, 0, 0].numpy())[0] * grid ** 2}, ROUNDS)
    return {"grid_size": grid, "batch": batch,
            "seconds_per_image": statistics.median(measured["fast"]) / batch,
            "slow_seconds_per_image": statistics.median(measured["slow"]) / batch,
            "speedup": common.ratio(measured["slow"], measured["fast"]), "first_call_seconds": compilation,
            "codes": codes.size, "codes_differing": int(np.count_nonzero(excess)),
            "preferred_by_at_most": float(np.max(excess))}


def time_heads(prior, count=4):
    """The seconds per slice of whole heads sampled side by side, compilation apart."""
    prior.sample_heads(count)
    seconds, _ = seconds_of(lambda: prior.sample_heads(count, seed=1))
    return seconds / (count * len(prior.slice_positions))


@cli.exit_on_user_error
def main():
    """Prints a row per grid and batch, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="take this run's prior (default: random weights)")
    arguments = parser.parse_args()
    if arguments.run_dir:
        priors = [predict.load_models(predict.find_run(arguments.run_dir))[1]]
    else:
        priors = [random_prior(size) for size in SIZES]
    rows = []
    for prior in priors:
        for batch in BATCHES:
            rows.append(compare(prior, batch))
            print("{grid_size}x{grid_size}, batch {batch:2}: {seconds_per_image:.4f} s per image against "
                  "{slow_seconds_per_image:.1f}: {words}, {codes_differing} of {codes} codes differ"
                  .format(words=common.in_words(rows[-1]["speedup"]), **rows[-1]), flush=True)
    head_seconds = time_heads(priors[-1])
    print(f"4 heads side by side: {head_seconds:.4f} s per slice", flush=True)
    chosen = next(row for row in reversed(rows) if row["batch"] == 16)
    common.finish("sampling", arguments, {
        **{name: chosen[name] for name in ("speedup", "seconds_per_image", "grid_size")},
        **{name: sum(row[name] for row in rows) for name in ("codes", "codes_differing")},
        "preferred_by_at_most": max(row["preferred_by_at_most"] for row in rows),
        "head_seconds_per_slice": head_seconds,
        "settings": {"run_dir": arguments.run_dir, "rounds": ROUNDS,
                     "slow_side": "one forward pass, scaled to one for each code"},
        "rows": rows})


if __name__ == "__main__":
    main()
