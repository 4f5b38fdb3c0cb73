"""Sampling from `prior`, a `modules.PixelCNN`: noise, the exact cached sampler, slices, heads, exports."""

import functools
import math
import zlib

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from support import people
from support.devices import samples_at_once
from support.images import neighbours


def uniform(seed, stream, indices, shape, minval=0.0):
    """Uniform numbers in [minval, 1), float32 (N, *shape), each item's by seed, stream and index alone."""
    fold_in = tf.random.experimental.stateless_fold_in
    stream_seed = fold_in(tf.stack([tf.cast(seed, tf.int32), 0]), zlib.crc32(stream.encode()) % 2 ** 31)
    return tf.map_fn(
        lambda index: tf.random.stateless_uniform(shape, fold_in(stream_seed, index), minval=minval),
        indices, fn_output_signature=tf.float32)


def gumbel_noise(prior, seed, stream, indices):
    """Standard Gumbel noise, float32 (N, g, g, K); see `uniform`."""
    shape = prior.grid_size, prior.grid_size, prior.num_embeddings
    return -tf.math.log(-tf.math.log(uniform(seed, f"{stream} noise", indices, shape, minval=1e-20)))


def sample_people(prior, seed, stream, indices):
    """New persons, float32 (N, P); see `uniform` and `people.sample`."""
    return people.sample(prior.quantiles, uniform(seed, f"{stream} people", indices, (prior.person_size,)))


def calibrated_people(prior, seed, stream, indices):
    """New persons as heads are conditioned on them, float32 (N, P): see `people.calibrate`."""
    return prior.person_shift + prior.person_scale * sample_people(prior, seed, stream, indices)


def steered_people(prior, ventricles, count, seed, quantile):
    """The persons of `sample_heads` of a quantile, one or (count,), by the dict of `Run.read_ventricles`."""
    weights, sizes = np.array(ventricles["weights"]), ventricles["quantiles"]
    persons = sample_people(prior, seed, "heads", tf.range(count)).numpy()
    target = np.interp(quantile, np.linspace(0, 1, len(sizes)), sizes)
    missing = target - ventricles["offset"] - persons @ weights
    persons = persons + np.outer(missing, weights) / (weights @ weights)  # the shortest way there
    return prior.person_shift.numpy() + prior.person_scale.numpy() * persons


def sample_codes(prior, positions, noise, temperature, context=None, person=None, noise_share=0.0):
    """Samples codes, int32 (B, g, g), one by one: argmax(logits + temperature * noise), the Gumbel-max trick.

    The codes are those that the full network would give in float32, whatever it trained in; on a GPU, if
    TensorFloat-32 is off while it runs: see `Network.full_float32`. Only what is new is computed: the
    vertical stack once per row, the horizontal stack once per code, each on the last few features of every
    layer. `noise` is that of `gumbel_noise`, `noise_share` a scalar; else see `PixelCNN.call`."""
    with prior.full_float32():
        size, batch, filters = prior.grid_size, tf.shape(positions)[0], prior.num_filters
        noise_shares = tf.fill([batch], noise_share)
        changes = prior.changes_below(context)
        condition, grid_features = prior.condition_features(positions, context, person, noise_shares)
        def sample_row(row, previous, windows, keys, codes):
            rows = tf.gather(grid_features, [row], axis=1) + previous
            vertical, from_vertical, windows, keys = _vertical_row(prior, rows, condition, row, windows, keys)
            def sample_code(column, previous, windows, row_codes):
                horizontal = grid_features[:, row, column][:, tf.newaxis, tf.newaxis] + previous
                new_windows = []
                for block, before, features in zip(prior.blocks, windows, from_vertical):
                    window = tf.concat([before, horizontal], axis=2)
                    new_windows.append(window[:, :, 1:])
                    above = tf.gather(features, [column], axis=2)
                    horizontal = block.horizontal(horizontal, window, above, condition)
                logits = prior.logits(horizontal + tf.gather(vertical, [column], axis=2))[:, 0, 0]
                if changes is not None:
                    logits += prior.movement * prior.movement_scores(changes[:, row, column])
                code = tf.argmax(logits + temperature * noise[:, row, column], axis=-1, output_type=tf.int32)
                previous = prior.code_embedding(code)[:, tf.newaxis, tf.newaxis]
                return column + 1, previous, new_windows, row_codes.write(column, code)
            start = (0, tf.zeros((batch, 1, 1, filters)),
                     [tf.zeros((batch, 1, block.codes_left, filters)) for block in prior.blocks],
                     tf.TensorArray(tf.int32, size, element_shape=positions.shape))
            row_codes = tf.while_loop(lambda column, *_: column < size, sample_code, start)[-1]
            row_codes = tf.transpose(row_codes.stack())
            previous = tf.reshape(prior.code_embedding(row_codes), (batch, 1, size, filters))
            return row + 1, previous, windows, keys, codes.write(row, row_codes)
        start = (0, tf.zeros((batch, 1, size, filters)),
                 [tf.zeros((batch, block.rows_up, size, filters)) for block in prior.blocks],
                 [tf.zeros((batch, size, size, 2 * filters)) for attention in prior.attentions if attention],
                 tf.TensorArray(tf.int32, size, element_shape=(positions.shape[0], size)))
        codes = tf.while_loop(lambda row, *_: row < size, sample_row, start)[-1]
        return tf.transpose(codes.stack(), (1, 0, 2))


@functools.lru_cache(maxsize=2)
def compiled_sampler(prior):
    """`sample_codes` of a prior under XLA, without TensorFloat-32; kept, for compiling it takes seconds."""
    compiled = tf.function(functools.partial(sample_codes, prior), jit_compile=True)
    def sample(positions, noise, temperature, context, person, noise_share=0.0):
        temperature, noise_share = (tf.cast(value, tf.float32) for value in (temperature, noise_share))
        with prior.full_float32():
            return compiled(positions, noise, temperature, context, person, noise_share)
    return sample


def _vertical_row(prior, vertical, condition, row, windows, keys):
    """The vertical stack on one row, (B, 1, g, F), given blocks' windows and attentions' keys before."""
    from_vertical, new_windows, new_keys = [], [], []
    for block, attention, before in zip(prior.blocks, prior.attentions, windows):
        if attention:
            above = keys[len(new_keys)]
            mask = tf.range(prior.grid_size + 1) >= prior.grid_size - row  # the last keys, and its own
            vertical, row_keys = attention(vertical, above, mask[tf.newaxis])
            new_keys.append(tf.concat([above[:, 1:], row_keys], axis=1))
        window = tf.concat([before, vertical], axis=1)
        new_windows.append(window[:, 1:])
        window = tf.pad(window, [[0, 0], [0, 0], [block.rows_up, block.rows_up], [0, 0]])
        vertical, features = block.vertical(vertical, window, condition)
        from_vertical.append(features)
    return vertical, from_vertical, new_windows, new_keys


def sample_slices(prior, positions, seed=0, temperature=1.0, batch_size=None):
    """Samples single slices, without slices below, each of a new person: codes, int32 NumPy (N, g, g).

    Sample i depends on (seed, i) alone. The persons are not calibrated: `people.calibrate` corrects what
    sampled slices below do to a head.

    Args:
        positions: int (N,), N > 0, of each sample; ValueError if training people have no slices there.
        temperature: 1 samples from the model, less is blander.
        batch_size: samples side by side; by default as many as suit the machine."""
    positions = np.asarray(positions, np.int32)
    if not np.isin(positions, prior.slice_positions).all():
        raise ValueError(f"positions must be among {list(prior.slice_positions)}, got {positions.tolist()}.")
    batches = _in_batches(prior, len(positions), batch_size, lambda indices: _slice_codes(
        prior, compiled_sampler(prior), positions, indices, seed, temperature))
    return np.concatenate(list(batches))


def sample_heads(prior, count, seed=0, temperature=1.0, batch_size=None, persons=None, stream="heads"):
    """Samples heads: codes, int32 NumPy (N, positions, g, g), of the prior's `slice_positions`.

    They are sampled from the lowest slice up, each slice given the head's person and the slices below: those
    are `persons`, float (N, P), by default new ones, calibrated. Head i depends on (seed, stream, i) alone.
    See `sample_slices`."""
    heads = heads_in_batches(prior, count, seed, temperature, batch_size, persons, stream)
    none = np.zeros((0, len(prior.slice_positions), prior.grid_size, prior.grid_size), np.int32)
    return np.concatenate([none, *heads])


def heads_in_batches(prior, count, seed=0, temperature=1.0, batch_size=None, persons=None, stream="heads"):
    """Yields the heads of `sample_heads` in batches (B, positions, g, g): all need not fit in memory."""
    return _in_batches(prior, count, batch_size, lambda indices: _head_codes(
        prior, compiled_sampler(prior), indices, seed, temperature, persons, stream))


def _in_batches(prior, count, batch_size, sample):
    """Yields the codes that `sample` makes of items 0 to `count` - 1, given int32 indices (B,), as NumPy."""
    # All batches have one size, for another would be compiled anew: the last is filled up, and cut.
    batch_size = batch_size or samples_at_once(4 * prior.grid_size ** 2 * prior.num_embeddings)
    size = max(1, math.ceil(count / max(1, math.ceil(count / batch_size))))  # so that little is filled up
    for first in tqdm(range(0, count, size), "Sampling", unit=" batches", leave=False, disable=None):
        yield sample(tf.range(first, first + size)).numpy()[:count - first]


def _slice_codes(prior, sample, positions, indices, seed, temperature):
    """Codes (B, g, g) of the samples `indices` of all `positions`; `sample` is `sample_codes`, compiled."""
    noise, persons = (draw(prior, seed, "slices", indices) for draw in (gumbel_noise, sample_people))
    positions = tf.gather(positions, tf.minimum(indices, tf.shape(positions)[0] - 1))
    return sample(positions, noise, temperature, prior.no_context(tf.shape(indices)[0]), persons)


def _head_codes(prior, sample, indices, seed, temperature, persons, stream):
    """Codes (B, positions, g, g) of heads `indices`, of new persons if none are given; see `_slice_codes`."""
    if persons is None:
        persons = calibrated_people(prior, seed, stream, indices)
    else:
        persons = tf.gather(tf.cast(persons, tf.float32), tf.minimum(indices, len(persons) - 1))
    sampled, no_slice = {}, prior.no_context(tf.shape(indices)[0])[:, 0]
    for position in tqdm(prior.slice_positions, "Heads", unit=" slices", leave=False, disable=None):
        noise = gumbel_noise(prior, seed, stream, indices * prior.num_positions + position)
        context = tf.stack([sampled.get(position - step, no_slice) for step in prior.steps_below], axis=1)
        positions = tf.fill(tf.shape(indices), position)
        sampled[position] = sample(positions, noise, temperature, context, persons, prior.context_noise)
    return tf.stack(list(sampled.values()), axis=1)


def export(vqvae, prior, folder):
    """Writes five TensorFlow SavedModels, which `tf.saved_model.load` opens without this repository:

        encoder(images): float32 (B, S, S, 1) in [-1, 1] -> codes, int32 (B, g, g)
        decoder(codes): int32 (B, g, g) -> images, float32 (B, S, S, 1) in [-1, 1], each by itself
        head_decoder(codes): int32 (positions, g, g) of a head -> images, as above, each beside its neighbours
        sampler(positions, seed, temperature): int32 (B,), int32, float32 -> codes, as of `sample_slices`
        head_sampler(count, seed, temperature): int32, int32, float32 -> codes, as of `sample_heads`

    On a GPU the codes are those of this repository only if the process that loads them has called
    ``tf.config.experimental.enable_tensor_float_32_execution(False)``."""
    compiled = functools.partial(tf.function(sample_codes), prior)
    around = neighbours(np.zeros(len(prior.slice_positions)), prior.slice_positions)
    def export_slices(positions, seed, temperature):
        return _slice_codes(prior, compiled, positions, tf.range(tf.shape(positions)[0]), seed, temperature)
    def export_heads(count, seed, temperature):
        return _head_codes(prior, compiled, tf.range(count), seed, temperature, None, "heads")
    def decode_head(codes):
        return vqvae.decode_codes(codes, *(tf.gather(codes, indices) for indices in around))
    images = tf.TensorSpec((None, vqvae.image_size, vqvae.image_size, 1), tf.float32, "images")
    codes, codes_of_head = (tf.TensorSpec((count, vqvae.grid_size, vqvae.grid_size), tf.int32, "codes")
                            for count in (None, len(prior.slice_positions)))
    drawn = [tf.TensorSpec((), tf.int32, "seed"), tf.TensorSpec((), tf.float32, "temperature")]
    positions, count = tf.TensorSpec((None,), tf.int32, "positions"), tf.TensorSpec((), tf.int32, "count")
    parts = {"encoder": (vqvae, vqvae.encode_to_codes, [images]),
             "decoder": (vqvae, lambda codes: vqvae.decode_codes(codes), [codes]),
             "head_decoder": (vqvae, decode_head, [codes_of_head]),
             "sampler": (prior, export_slices, [positions, *drawn]),
             "head_sampler": (prior, export_heads, [count, *drawn])}
    for number, (name, (model, function, signature)) in enumerate(parts.items(), 1):
        print(f"Exporting {name}, {number} of {len(parts)} ...", flush=True)
        module = tf.Module()
        module.weights = [variable.value for variable in model.variables]
        module.__call__ = tf.function(function, input_signature=signature)
        tf.saved_model.save(module, f"{folder}/{name}", signatures=module.__call__.get_concrete_function())
