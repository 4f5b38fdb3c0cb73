"""Sampling speed: the cached sampler against a full forward pass for each code, on the same weights and noise.

    python benchmarks/sampling.py [--run-dir RUN]

The slow side is measured on one code in each round and scaled to the whole grid; both sides take turns
(benchmarks/common.py). That both sample the same codes is checked at every place: the full network, shown the codes of the
cached sampler, must choose each of them again from the same noise; as it sees only the codes before a place, it would by
induction have sampled them itself. Where two codes tie to within float32's rounding, either is right: so codes that differ are
counted, together with the most by which the full network prefers its own. Without a run, the prior is a fresh one of the
default size, its weights moved at random. The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

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


def compare(prior, batch):
    """One row: seconds per image both ways, compilation apart, and how many codes differ."""
    positions = tf.gather(prior.slice_positions, tf.range(batch) % len(prior.slice_positions))
    noise, person = (draw(prior, 0, "benchmark", tf.range(batch)) for draw in (sampler.gumbel_noise, sampler.sample_people))
    context = tf.random.stateless_uniform((batch, len(prior.steps_below), prior.grid_size, prior.grid_size), (0, 0),
                                          maxval=prior.num_embeddings, dtype=tf.int32)
    conditions = {"positions": positions, "context": context, "person": person}
    slow = tf.function(lambda codes: prior({"codes": codes, **conditions}))

    def fast():
        return prior.compiled_sampler(positions, noise, tf.constant(1.0), context, person)

    start = time.perf_counter()
    codes = fast()
    compilation = time.perf_counter() - start
    scores = slow(codes) + noise
    excess = tf.reduce_max(scores, axis=-1) - tf.gather(scores, codes, batch_dims=3)  # 0 where it chooses the same

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    measured = common.interleave({
        "fast": lambda: seconds(lambda: fast().numpy()),
        "slow": lambda: seconds(lambda: slow(codes)[0, 0, 0, 0].numpy()) * prior.grid_size ** 2}, ROUNDS)
    return {"grid_size": prior.grid_size, "batch": batch, "seconds_per_image": statistics.median(measured["fast"]) / batch,
            "slow_seconds_per_image": statistics.median(measured["slow"]) / batch,
            "speedup": common.ratio(measured["slow"], measured["fast"]), "first_call_seconds": compilation,
            "codes": codes.shape.num_elements(), "codes_differing": int(np.count_nonzero(excess)),
            "preferred_by_at_most": float(np.max(excess))}


def time_heads(prior, count=4):
    """The seconds per slice of whole heads sampled side by side, compilation apart."""
    prior.sample_heads(count)
    start = time.perf_counter()
    prior.sample_heads(count, seed=1)
    return (time.perf_counter() - start) / (count * len(prior.slice_positions))


@cli.exit_on_user_error
def main():
    """Prints a row per grid and batch, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="take the prior of this run (default: random weights)")
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
                  "{slow_seconds_per_image:.1f}: {0}, {codes_differing} of {codes} codes differ"
                  .format(common.in_words(rows[-1]["speedup"]), **rows[-1]), flush=True)
    head_seconds = time_heads(priors[-1])
    print(f"4 heads side by side: {head_seconds:.4f} s per slice", flush=True)
    chosen = next(row for row in reversed(rows) if row["batch"] == 16)
    common.finish("sampling", arguments, {
        "speedup": chosen["speedup"], "seconds_per_image": chosen["seconds_per_image"], "grid_size": chosen["grid_size"],
        **{name: sum(row[name] for row in rows) for name in ("codes", "codes_differing")},
        "preferred_by_at_most": max(row["preferred_by_at_most"] for row in rows), "head_seconds_per_slice": head_seconds,
        "settings": {"run_dir": arguments.run_dir, "rounds": ROUNDS,
                     "slow_side": "one forward pass, scaled to one for each code"},
        "rows": rows})


if __name__ == "__main__":
    main()
