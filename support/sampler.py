"""Sampling from a prior: its noise, the exact cached sampler of codes, slices and heads in batches, and the exported models.

A prior is a `modules.PixelCNN`, known here by its attributes alone.
"""

import zlib

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from support import people
from support.cli import UserError
from support.devices import samples_at_once

# Random streams -------------------------------------------------------------------------------------------------------


def uniform(seed, stream, indices, shape, minval=0.0):
    """Uniform numbers in [minval, 1), float32 (N, *shape); each item's depend on (`seed`, `stream`, its index) alone.

    Args:
        seed: int, or int32 tensor.
        stream: the name of what they are for; numbers of different streams are independent.
        indices: int32 tensor (N,).
        shape: of each item.
        minval: the least value.
    """
    stream_number = zlib.crc32(stream.encode()) % 2 ** 31
    stream_seed = tf.random.experimental.stateless_fold_in(tf.stack([tf.cast(seed, tf.int32), 0]), stream_number)

    def one(index):
        return tf.random.stateless_uniform(shape, tf.random.experimental.stateless_fold_in(stream_seed, index), minval=minval)

    return tf.map_fn(one, indices, fn_output_signature=tf.float32)


def gumbel_noise(prior, seed, stream, indices):
    """Standard Gumbel noise, float32 (N, g, g, K); see `uniform`."""
    shape = prior.grid_size, prior.grid_size, prior.num_embeddings
    return -tf.math.log(-tf.math.log(uniform(seed, f"{stream} noise", indices, shape, minval=1e-20)))


def sample_people(prior, seed, stream, indices):
    """New persons, float32 (N, P); see `uniform` and `people.sample`."""
    return people.sample(prior.quantiles, uniform(seed, f"{stream} people", indices, (prior.person_size,)))


# The exact sampler ----------------------------------------------------------------------------------------------------


def sample_codes(prior, positions, noise, temperature, context=None, person=None):
    """Samples codes by the Gumbel-max trick, argmax(logits + temperature * noise), one code after the other.

    The codes are those that the full network would give, but only what is new is computed: the vertical stack once per row,
    the horizontal stack once per code, each on the last few features of every layer.

    Args:
        prior: a `modules.PixelCNN`.
        positions: int32 tensor (B,).
        noise: float32 (B, g, g, K), see `gumbel_noise`.
        temperature: float32 scalar; 1 samples from the model, 0 takes the likeliest code each time.
        context: int32 (B, S, g, g), or None for no slices below.
        person: float32 (B, P), or None for the average person.

    Returns:
        int32 (B, g, g).
    """
    size, batch, filters = prior.grid_size, tf.shape(positions)[0], prior.num_filters
    condition, places = prior.condition_features(positions, context, person)

    def sample_row(row, previous, windows, keys, codes):
        vertical = tf.gather(places, [row], axis=1) + previous
        vertical, from_vertical, windows, keys = _vertical_row(prior, vertical, condition, row, windows, keys)

        def sample_code(column, previous, windows, row_codes):
            horizontal = places[:, row, column][:, tf.newaxis, tf.newaxis] + previous
            horizontal, windows = _horizontal_code(prior, horizontal, condition, column, from_vertical, windows)
            logits = prior.logits(horizontal + tf.gather(vertical, [column], axis=2))[:, 0, 0]
            code = tf.argmax(logits + temperature * noise[:, row, column], axis=-1, output_type=tf.int32)
            previous = prior.code_embedding(code)[:, tf.newaxis, tf.newaxis]
            return column + 1, previous, windows, row_codes.write(column, code)

        start = (0, tf.zeros((batch, 1, 1, filters), places.dtype),
                 [tf.zeros((batch, 1, block.codes_left, filters), places.dtype) for block in prior.blocks],
                 tf.TensorArray(tf.int32, size, element_shape=positions.shape))
        row_codes = tf.while_loop(lambda column, *_: column < size, sample_code, start)[-1]
        row_codes = tf.transpose(row_codes.stack())
        previous = tf.reshape(prior.code_embedding(row_codes), (batch, 1, size, filters))
        return row + 1, previous, windows, keys, codes.write(row, row_codes)

    start = (0, tf.zeros((batch, 1, size, filters), places.dtype),
             [tf.zeros((batch, block.rows_up, size, filters), places.dtype) for block in prior.blocks],
             [tf.zeros((batch, size, size, 2 * filters), places.dtype) for _ in prior.attentions],
             tf.TensorArray(tf.int32, size, element_shape=(positions.shape[0], size)))
    codes = tf.while_loop(lambda row, *_: row < size, sample_row, start)[-1]
    return tf.transpose(codes.stack(), (1, 0, 2))


def _vertical_row(prior, vertical, condition, row, windows, keys):
    """The vertical stack on one new row.

    Args:
        prior: a `modules.PixelCNN`.
        vertical: (B, 1, g, F), the row's first features.
        condition: (B, 1, 1, F).
        row: its number.
        windows: of each block, the features of the rows before that it can see, (B, k // 2, g, F).
        keys: of each attention, keys and values of the g rows before, (B, g, g, 2F).

    Returns:
        (the row's last features; of each block, what the horizontal stack takes of it; windows and keys of the next row).
    """
    from_vertical, new_windows, new_keys = [], [], []
    for index, (block, before) in enumerate(zip(prior.blocks, windows)):
        if attention := prior.attention_before(index):
            above = keys[len(new_keys)]
            mask = tf.range(prior.grid_size + 1) >= prior.grid_size - row  # the `row` last keys, and its own
            vertical, own_keys = attention(vertical, above, mask[tf.newaxis])
            new_keys.append(tf.concat([above[:, 1:], own_keys], axis=1))
        window = tf.concat([before, vertical], axis=1)
        new_windows.append(window[:, 1:])
        window = tf.pad(window, [[0, 0], [0, 0], [block.rows_up, block.rows_up], [0, 0]])
        vertical, features = block.vertical(vertical, window, condition)
        from_vertical.append(features)
    return vertical, from_vertical, new_windows, new_keys


def _horizontal_code(prior, horizontal, condition, column, from_vertical, windows):
    """The horizontal stack on one new code, (B, 1, 1, F); returns its last features and the windows of the next code."""
    new_windows = []
    for block, before, features in zip(prior.blocks, windows, from_vertical):
        window = tf.concat([before, horizontal], axis=2)
        new_windows.append(window[:, :, 1:])
        horizontal = block.horizontal(horizontal, window, tf.gather(features, [column], axis=2), condition)
    return horizontal, new_windows


# Slices and heads -----------------------------------------------------------------------------------------------------


def sample_slices(prior, positions, seed=0, temperature=1.0, batch_size=None):
    """Samples single slices, without slices below, each of a new person.

    Sample i depends on (`seed`, i) alone, whatever the batch size. The persons are not calibrated: `people.calibrate`
    corrects what sampled slices below do to a head, and there are none here.

    Args:
        prior: a `modules.PixelCNN`.
        positions: int (N,), the slice position of each sample.
        seed: int; the same seed gives the same codes.
        temperature: see `sample_codes`.
        batch_size: samples side by side; by default as many as suit the machine.

    Returns:
        codes, int32 NumPy (N, g, g).

    Raises:
        ValueError: if training people have no slices at a position.
    """
    positions = np.asarray(positions, np.int32)
    if not np.isin(positions, prior.slice_positions).all():
        raise ValueError(f"positions must be among {list(prior.slice_positions)}, got {positions.tolist()}.")
    size = _batch_size(prior, batch_size, len(positions))
    codes = np.zeros((len(positions), prior.grid_size, prior.grid_size), np.int32)
    for first in tqdm(range(0, len(positions), size), "Sampling", unit=" batches", leave=False, disable=None):
        # The last batch is filled up: another size would be compiled anew.
        batch = np.resize(positions[first:first + size], size)
        indices = tf.range(first, first + size)
        sampled = prior.compiled_sampler(tf.constant(batch), gumbel_noise(prior, seed, "slices", indices),
                                         tf.constant(temperature, tf.float32), prior.no_context(size),
                                         sample_people(prior, seed, "slices", indices))
        codes[first:first + size] = sampled[:len(positions) - first]
    return codes


def sample_heads(prior, count, seed=0, temperature=1.0, batch_size=None, persons=None, stream="heads"):
    """Samples whole heads, slice by slice from the lowest up, each given its person and the sampled slices below it.

    Head i depends on (`seed`, `stream`, i) alone, whatever the batch size.

    Args:
        prior: a `modules.PixelCNN`.
        count: N.
        seed: int; the same seed gives the same heads.
        temperature: see `sample_codes`.
        batch_size: heads side by side; by default as many as suit the machine.
        persons: float (N, P), to condition the heads on; by default new ones, calibrated.
        stream: the name of the random stream.

    Returns:
        codes, int32 NumPy (N, positions, g, g), of the prior's `slice_positions`.
    """
    heads = np.zeros((count, len(prior.slice_positions), prior.grid_size, prior.grid_size), np.int32)
    first = 0
    for batch in heads_in_batches(prior, count, seed, temperature, batch_size, persons, stream):
        heads[first:first + len(batch)] = batch
        first += len(batch)
    return heads


def heads_in_batches(prior, count, seed=0, temperature=1.0, batch_size=None, persons=None, stream="heads"):
    """Yields the heads of `sample_heads` batch by batch, int32 NumPy (B, positions, g, g): all need not fit into memory."""
    slices, size = len(prior.slice_positions), _batch_size(prior, batch_size, count)
    with tqdm(total=count * slices, desc="Sampling", unit=" slices", leave=False, disable=None) as progress:
        for first in range(0, count, size):
            indices = tf.range(first, first + size)  # the last batch is filled up: another size would be compiled anew
            batch = calibrated_people(prior, seed, stream, indices) if persons is None else tf.gather(
                tf.constant(persons, tf.float32), tf.minimum(indices, count - 1))
            heads = []
            for codes in _slices_of_heads(prior, prior.compiled_sampler, indices, seed, temperature, batch, stream):
                heads.append(codes[:count - first])
                progress.update(len(heads[-1]))
            yield np.stack(heads, axis=1)


def calibrated_people(prior, seed, stream, indices):
    """New persons as heads are conditioned on them, float32 (N, P): see `people.calibrate`."""
    return prior.person_shift + prior.person_scale * sample_people(prior, seed, stream, indices)


def steered_people(prior, ventricles, count, seed, quantile):
    """The persons, float (count, P), of heads whose ventricles have a given size.

    Args:
        prior: a `modules.PixelCNN`.
        ventricles: the dict of `Run.read_ventricles`.
        count: heads.
        seed: as that of `sample_heads`.
        quantile: among training people: a number from 0 to 1 for all heads, or float (count,).
    """
    if not np.any(ventricles["weights"]):
        raise UserError("The size of ventricles does not follow from persons here; leave out --ventricles.")
    target = people.value_at(ventricles["quantiles"], quantile)
    persons = sample_people(prior, seed, "heads", tf.range(count)).numpy()
    persons = people.steer(persons, np.array(ventricles["weights"]), ventricles["offset"], target)
    return prior.person_shift.numpy() + prior.person_scale.numpy() * persons


def _slices_of_heads(prior, sampler, indices, seed, temperature, persons, stream):
    """Yields the codes, int32 (B, g, g), of one position after the other."""
    sampled, no_slice = {}, prior.no_context(tf.shape(indices)[0])[:, 0]
    for position in prior.slice_positions:
        noise = gumbel_noise(prior, seed, stream, indices * prior.num_positions + position)
        context = tf.stack([sampled.get(position - step, no_slice) for step in prior.steps_below], axis=1)
        sampled[position] = sampler(tf.fill(tf.shape(indices), position), noise, tf.cast(temperature, tf.float32), context, persons)
        yield sampled[position]


def _batch_size(prior, wanted, count):
    noise_bytes = 4 * prior.grid_size ** 2 * prior.num_embeddings
    size = max(1, min(wanted or samples_at_once(noise_bytes), count))
    num_batches = max(1, -(-count // size))
    return max(1, -(-count // num_batches))  # batches of one size, so that little has to be filled up


# Exported models ------------------------------------------------------------------------------------------------------


def export(vqvae, prior, folder):
    """Writes four TensorFlow SavedModels, which `tf.saved_model.load` opens without this repository.

    Each is called by the names of its inputs:

        encoder(images): float32 (B, S, S, 1) in [-1, 1] -> codes, int32 (B, g, g)
        decoder(codes): int32 (B, g, g) -> images, float32 (B, S, S, 1) in [-1, 1]
        sampler(positions, seed, temperature): int32 (B,), int32, float32 -> codes, int32 (B, g, g), those of `sample_slices`
        head_sampler(count, seed, temperature): int32, int32, float32 -> codes, int32 (count, positions, g, g), those of
            `sample_heads`

    Args:
        vqvae: a `modules.VQVAE`.
        prior: its `modules.PixelCNN`.
        folder: where encoder/, decoder/, sampler/ and head_sampler/ go.
    """
    size, grid = vqvae.image_size, vqvae.grid_size

    def export_slices(positions, seed, temperature):
        indices = tf.range(tf.shape(positions)[0])
        return sample_codes(prior, positions, gumbel_noise(prior, seed, "slices", indices), temperature,
                            person=sample_people(prior, seed, "slices", indices))

    compiled = tf.function(lambda *arguments: sample_codes(prior, *arguments))

    def export_heads(count, seed, temperature):
        indices = tf.range(count)
        persons = calibrated_people(prior, seed, "heads", indices)
        return tf.stack(list(_slices_of_heads(prior, compiled, indices, seed, temperature, persons, "heads")), axis=1)

    seed_and_temperature = [tf.TensorSpec((), tf.int32, "seed"), tf.TensorSpec((), tf.float32, "temperature")]
    parts = {
        "encoder": (vqvae, vqvae.encode_to_codes, [tf.TensorSpec((None, size, size, 1), tf.float32, "images")]),
        "decoder": (vqvae, vqvae.decode_codes, [tf.TensorSpec((None, grid, grid), tf.int32, "codes")]),
        "sampler": (prior, export_slices, [tf.TensorSpec((None,), tf.int32, "positions"), *seed_and_temperature]),
        "head_sampler": (prior, export_heads, [tf.TensorSpec((), tf.int32, "count"), *seed_and_temperature])}
    for name, (model, function, signature) in parts.items():
        module = tf.Module()
        module.weights = [variable.value for variable in model.variables]
        module.__call__ = tf.function(function, input_signature=signature)
        tf.saved_model.save(module, f"{folder}/{name}", signatures=module.__call__.get_concrete_function())
