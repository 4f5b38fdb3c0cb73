"""The prior over the codes: the gated PixelCNN and its sampler, of single slices and of whole heads.

Apart from modules.py because the two networks are two subjects, and one file of both would be too long to read.

References:
    [1] van den Oord et al.: Conditional Image Generation with PixelCNN Decoders, 2016. https://arxiv.org/abs/1606.05328
    [2] Ho, Kalchbrenner, Weissenborn, Salimans: Axial Attention in Multidimensional Transformers, 2019.
        https://arxiv.org/abs/1912.12180
"""

import math

import keras
from keras import layers
import numpy as np
from sklearn.decomposition import PCA
import tensorflow as tf
import tensorflow_probability as tfp
from tqdm import tqdm

from support import devices
from support.devices import Distributed, Dropout, layers_of, PACKAGE

PICTURE_SIDE = 16  # pixels of the pictures of heads that tell persons apart
NUM_QUANTILES = 101  # by which the distribution of each component of persons is known
CALIBRATION_DOUBT = 4  # heads that are taken to have shown just what they were told, besides those that were seen
MOST_SHIFT, MOST_SCALE = 1, 2  # of what heads are told: training told hardly any head more


def _gate(x):
    """Halves the channels: ``tanh(a) sigmoid(b)``, [1] equation 2."""
    a, b = tf.split(x, 2, axis=-1)
    return tf.tanh(a) * tf.sigmoid(b)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedBlock(layers.Layer):
    """One layer of the gated PixelCNN: a vertical and a horizontal stack ([1] figure 2).

    At (row, column) the vertical features know all codes of the rows above, the horizontal ones these and the codes to the
    left: together everything before, so there is no blind spot. The convolutions are unpadded and take windows that the
    caller has padded: the whole grid while training, the newest row or code while sampling. So both run the same code.

    Args:
        num_filters: channels F of both stacks.
        kernel_size: odd width k of the window; the vertical stack sees k // 2 rows up per layer.
        dilation: d; the horizontal stack sees every d-th of the d (k // 2) codes to the left.
        dropout: rate on the horizontal branch.
    """

    def __init__(self, num_filters, kernel_size, dilation, dropout, **kwargs):
        super().__init__(**kwargs)
        self.settings = {"num_filters": num_filters, "kernel_size": kernel_size, "dilation": dilation, "dropout": dropout}
        self.rows_up = kernel_size // 2
        self.codes_left = dilation * self.rows_up
        self.vertical_conv = layers.Conv2D(2 * num_filters, (self.rows_up + 1, kernel_size))
        self.horizontal_conv = layers.Conv2D(2 * num_filters, (1, self.rows_up + 1), dilation_rate=(1, dilation))
        self.vertical_to_horizontal = layers.Dense(2 * num_filters)
        self.condition = layers.Dense(4 * num_filters)
        self.vertical_out = layers.Dense(num_filters, kernel_initializer="zeros")
        self.horizontal_out = layers.Dense(num_filters, kernel_initializer="zeros")
        self.dropout = Dropout(dropout)

    def build(self, input_shape=None):
        filters = self.settings["num_filters"]
        for layer in (self.vertical_conv, self.horizontal_conv, self.condition, self.vertical_out, self.horizontal_out):
            layer.build((None, None, None, filters))
        self.vertical_to_horizontal.build((None, None, None, 2 * filters))
        self.built = True

    def get_config(self):
        return {**super().get_config(), **self.settings}

    def vertical(self, window, condition):
        """One vertical step.

        Args:
            window: (B, R + k // 2, W + 2 (k // 2), F), the rows before and the R rows in question, padded at the sides.
            condition: (B, 1, 1, C), what the head is known by.

        Returns:
            The rows' new features (B, R, W, F), and what they tell the horizontal stack (B, R, W, 2F).
        """
        features = self.vertical_conv(window)
        here = window[:, self.rows_up:, self.rows_up:-self.rows_up]
        gated = _gate(features + tf.split(self.condition(condition), 2, axis=-1)[0])
        return here + self.vertical_out(gated), self.vertical_to_horizontal(features)

    def horizontal(self, window, from_vertical, condition, training=False):
        """One horizontal step.

        Args:
            window: (B, R, d (k // 2) + W, F), the codes before and the W codes in question.
            from_vertical: (B, R, W, 2F).
            condition: as in `vertical`.
            training: whether to drop out.

        Returns:
            The codes' new features (B, R, W, F).
        """
        features = self.horizontal_conv(window) + from_vertical + tf.split(self.condition(condition), 2, axis=-1)[1]
        return window[:, :, self.codes_left:] + self.horizontal_out(self.dropout(_gate(features), training=training))


@keras.saving.register_keras_serializable(PACKAGE)
class AxialAttention(layers.Layer):
    """Lets the vertical stack look along its own row, then up its column: in two steps, at all the rows above.

    The vertical features of a row know the rows above it alone, so along the row nothing need be hidden; up the column each
    row sees itself and those before ([2], the encoder of the upper context). It spans the grid where convolutions do not, so
    that the shape of the whole head is known while its texture is drawn.

    Args:
        num_filters: channels F.
        num_heads: a divisor of F.
    """

    def __init__(self, num_filters, num_heads=4, **kwargs):
        super().__init__(**kwargs)
        self.settings = {"num_filters": num_filters, "num_heads": num_heads}
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self.along_row = layers.MultiHeadAttention(num_heads, num_filters // num_heads, attention_axes=(2,))
        self.up_column = layers.MultiHeadAttention(num_heads, num_filters // num_heads, attention_axes=(1,))

    def build(self, input_shape=None):
        shape = None, None, None, self.settings["num_filters"]
        for norm in self.norms:
            norm.build(shape)
        self.along_row.build(shape, shape)
        self.up_column.build(shape, shape)
        self.built = True

    def get_config(self):
        return {**super().get_config(), **self.settings}

    def call(self, rows, before, seen):
        """Attends from rows to themselves and to those before.

        Args:
            rows: (B, R, W, F), the rows in question.
            before: (B, S, W, F), what was returned second for the rows before.
            seen: bool (1, R, S + R), which rows of `before` and `rows` each row may look up.

        Returns:
            The rows' new features (B, R, W, F), and what later rows look up, of the same shape.
        """
        normed = self.norms[0](rows)
        rows = rows + self.along_row(normed, normed)
        normed = self.norms[1](rows)
        keys = tf.concat([before, normed], axis=1)
        return rows + self.up_column(normed, keys, attention_mask=seen), normed


def _linear_interpolation(length, new_length):
    """The matrix, float32 (new_length, length), that resamples a signal linearly over the same extent."""
    places = (np.arange(new_length) + 0.5) * length / new_length - 0.5
    return np.maximum(0, 1 - np.abs(places.clip(0, length - 1)[:, np.newaxis] - np.arange(length))).astype(np.float32)


@keras.saving.register_keras_serializable(PACKAGE)
class PixelCNN(Distributed, keras.Model):
    """The prior over codes: p(codes | position, slices below, person) as a product over the grid, row by row, left to right [1].

    Every code sees all codes before it: those of the rows above through an `AxialAttention` before every third block, those
    of its own row because the windows of the horizontal stack widen, 1, 2, 4 ... codes from block to block (needs at least
    log2 of the grid's side of them). Beside its place in the grid and its slice's position in the head it is told, if known:

    - the codes of the slices below, all over the grid, read by residual blocks: so a head is drawn slice by slice from the
      lowest up;
    - the person: what is the same throughout one head and must be decided once. A person is a short vector, the whitened
      principal components of a head's coarse picture (`start_people`). It acts on every layer, and as a picture: decoded to
      what that person's head looks like here, roughly.

    Args:
        grid_size: side g of the square grid of codes.
        num_embeddings: K, the number of codes; in `below` it stands for "none".
        num_positions: slices per head.
        num_filters: channels of each stack.
        num_layers: gated blocks.
        kernel_size: odd width of their windows.
        dropout: rate.
        codebook_digest: `VectorQuantizer.digest` of the codebook whose codes these are, if it is known.
        steps_below: how far below each of the S slices in `below` lies: the next one; the one under it and one further
            down, so that it shows which way a fold runs; and one so far that little but the anatomy is the same.
        person_size: P, the length of the person vector.
    """

    def __init__(self, grid_size=32, num_embeddings=512, num_positions=32, num_filters=64, num_layers=8, kernel_size=3,
                 dropout=0.1, codebook_digest=None, steps_below=(1, 2, 4, 8), person_size=24, **kwargs):
        super().__init__(**kwargs)
        if kernel_size % 2 == 0 or kernel_size < 3:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}.")
        self.settings = {"grid_size": grid_size, "num_embeddings": num_embeddings, "num_positions": num_positions,
                         "num_filters": num_filters, "num_layers": num_layers, "kernel_size": kernel_size, "dropout": dropout,
                         "codebook_digest": codebook_digest, "steps_below": list(steps_below), "person_size": person_size}
        self.grid_size = grid_size
        self.num_embeddings = num_embeddings
        self.num_positions = num_positions
        self.num_filters = num_filters
        self.steps_below = tuple(steps_below)
        self.person_size = person_size
        with layers_of(self.dtype_policy):
            self._make_layers(num_layers, kernel_size, dropout)
        self.to_grid = _linear_interpolation(PICTURE_SIDE, grid_size)
        self.trackers = [keras.metrics.Mean(name) for name in ("bits_per_code", "bits_per_code_alone")]
        self.compiled_sampler = tf.function(self.sample_from_noise, jit_compile=True)
        self.build()

    def _make_layers(self, num_layers, kernel_size, dropout):
        grid_size, num_filters = self.grid_size, self.num_filters
        self.code_embedding = layers.Embedding(self.num_embeddings, num_filters)
        self.below_embeddings = [layers.Embedding(self.num_embeddings + 1, num_filters) for _ in self.steps_below]
        self.picture_conv = layers.Conv2D(num_filters, 3, padding="same")
        # Three residual blocks: nothing here is hidden, so they may look all around, and at each place once, not at each code.
        self.known_convs = [layers.Conv2D(num_filters, 3, padding="same", kernel_initializer=start)
                            for start in ("glorot_uniform", "zeros") * 3]
        self.position_embedding = layers.Embedding(self.num_positions, num_filters)
        self.person_embedding = layers.Dense(num_filters, use_bias=False)
        self.place_embedding = layers.Embedding(grid_size * grid_size, num_filters)
        cycle = max(1, (grid_size - 1).bit_length())
        self.blocks = [GatedBlock(num_filters, kernel_size, 2 ** (index % cycle), dropout) for index in range(num_layers)]
        self.attentions = [AxialAttention(num_filters) for _ in range(num_layers // 3)]
        self.head = keras.Sequential([layers.Activation("relu"), layers.Dense(2 * num_filters, activation="relu"),
                                      layers.Dense(self.num_embeddings, dtype="float32")])

    def build(self, input_shape=None):
        for embedding in (self.code_embedding, *self.below_embeddings, self.position_embedding, self.place_embedding):
            embedding.build()
        for layer in (*self.blocks, *self.attentions):
            layer.build()
        self.picture_conv.build((None, None, None, 6))
        for conv in self.known_convs:
            conv.build((None, None, None, self.num_filters))
        self.person_embedding.build((None, self.person_size))
        self.head.build((None, self.grid_size, self.grid_size, self.num_filters))
        shape = self.num_positions, PICTURE_SIDE, PICTURE_SIDE
        # Not cast: the sampler, outside of `call`, takes them whole.
        fixed = {"trainable": False, "initializer": "zeros", "autocast": False}
        self.mean_picture = self.add_weight(name="mean_picture", shape=shape, **fixed)
        self.components = self.add_weight(name="components", shape=(*shape, self.person_size), **fixed)
        self.quantiles = self.add_weight(name="quantiles", shape=(NUM_QUANTILES, self.person_size), **fixed)
        self.shift = self.add_weight(name="shift", shape=(self.person_size,), **fixed)
        self.scale = self.add_weight(name="scale", shape=(self.person_size,), **{**fixed, "initializer": "ones"})
        self.built = True

    def get_config(self):
        return {**super().get_config(), **self.settings}

    def start_embeddings(self, codebook, seed=0):
        """Starts the codes' input and output weights from a codebook, (K, D), so that like codes begin alike.

        All are random projections of the standardised codebook: what is learned of one code holds for its neighbours in
        the codebook from the first step on.
        """
        rng = np.random.default_rng(seed)
        codebook = np.asarray(codebook)
        codebook = (codebook - codebook.mean(axis=0)) / codebook.std()
        length = codebook.shape[1]
        kernel = self.head.layers[-1].kernel
        for embedding in (self.code_embedding, *self.below_embeddings):
            projected = codebook @ rng.normal(0, 0.3 / length ** 0.5, (length, self.num_filters))
            embedding.embeddings.assign(np.pad(projected, [[0, embedding.input_dim - len(codebook)], [0, 0]]))
        kernel.assign(rng.normal(0, 1 / (length * kernel.shape[0]) ** 0.5, (kernel.shape[0], length)) @ codebook.T)

    # The person

    def start_people(self, pictures):
        """Makes the space of persons: the principal components of the training heads, and how each is distributed.

        Args:
            pictures: float (people, num_positions, 16, 16), the coarse pictures of heads; NaN where a slice is missing.
        """
        mean = np.nan_to_num(pictures).sum(axis=0) / np.maximum(np.isfinite(pictures).sum(axis=0), 1)
        deviations = np.nan_to_num(pictures - mean).reshape(len(pictures), -1)
        components = np.zeros((self.person_size, deviations.shape[1]))
        number = min(self.person_size, len(pictures) - 1)
        if number:
            pca = PCA(number, svd_solver="full").fit(deviations)
            components[:number] = pca.components_ * np.sqrt(pca.explained_variance_)[:, np.newaxis]
        self.mean_picture.assign(mean)
        self.components.assign(components.T.reshape(self.components.shape))
        quantiles = np.quantile(self.persons(pictures), np.linspace(0, 1, NUM_QUANTILES), axis=0)
        # Mean and variance of what `draw_persons` draws between them, to be 0 and 1 as people's are.
        lower, upper = quantiles[:-1], quantiles[1:]
        center = (lower + upper).mean(axis=0) / 2
        spread = np.sqrt((lower ** 2 + lower * upper + upper ** 2).mean(axis=0) / 3 - center ** 2)
        self.quantiles.assign((quantiles - center) / np.where(spread > 0, spread, 1))

    def persons(self, pictures):
        """The persons of heads, float32 (N, P), from their pictures (see `start_people`).

        Each number is rounded to one of 256, so that it can be told in 8 bits. Whose slices are mostly missing gets zeros,
        the average person.
        """
        components = self.components.numpy().reshape(-1, self.person_size)
        deviations = np.nan_to_num(pictures - self.mean_picture.numpy()).reshape(len(pictures), -1)
        squares = (components ** 2).sum(axis=0)
        persons = deviations @ components / np.where(squares > 0, squares, 1)
        usual = self.mean_picture.numpy().any(axis=(1, 2))  # the positions that training people have
        missing = np.isnan(pictures).any(axis=(2, 3)) & usual
        persons[missing.sum(axis=1) > usual.sum() / 2] = 0
        return (np.round(persons * 32).clip(-128, 127) / 32).astype(np.float32)

    def draw_persons(self, seed, indices):
        """New persons, float32 (N, P), each from (`seed`, its index) alone.

        Each component is drawn from its distribution among the training people, for itself: so nobody is copied whole.
        """
        uniform = tf.map_fn(lambda i: tf.random.stateless_uniform((self.person_size,), [seed, -1 - i]),
                            indices, fn_output_signature=tf.float32)
        place = tf.transpose(uniform) * (NUM_QUANTILES - 1)
        lower = tf.minimum(tf.cast(place, tf.int32), NUM_QUANTILES - 2)
        table = tf.transpose(self.quantiles)
        low, high = (tf.gather(table, lower + step, batch_dims=1) for step in (0, 1))
        return tf.transpose(low + (high - low) * (place - tf.cast(lower, tf.float32)))

    def calibrate(self, told, shown):
        """Sets what heads are told, `shift + scale * person`, so that they show persons as far apart as people are.

        The slices below drown the person out, and errors pile up from slice to slice: a sampled head shows its person
        weakened and shifted. Each component shown is taken as `offset + slope * told + noise`, by least squares; the shift
        undoes the offset, the scale makes the variance of what is shown 1 again, that of people.

        Args:
            told: float (N, P), what N sampled heads were told.
            shown: float (N, P), the `persons` of these heads.
        """
        told, shown = np.float64(told), np.float64(shown)
        across, along = told - told.mean(axis=0), shown - shown.mean(axis=0)
        slope = ((across * along).sum(axis=0) + CALIBRATION_DOUBT) / ((across ** 2).sum(axis=0) + CALIBRATION_DOUBT)
        offset = (shown - slope * told).sum(axis=0) / (len(told) + CALIBRATION_DOUBT)
        noise = (along - slope * across).var(axis=0)
        slope = np.maximum(slope, 1 / MOST_SCALE)
        self.shift.assign((-offset / slope).clip(-MOST_SHIFT, MOST_SHIFT))
        self.scale.assign((np.sqrt(np.maximum(1 - noise, 0)) / slope).clip(1, MOST_SCALE))

    def _pictures(self, positions, person):
        """The person's head here, (B, g, g, 6): of the slice and its neighbours, the mean of all people and what differs."""
        near = tf.clip_by_value(positions[:, tf.newaxis] + [-1, 0, 1], 0, self.num_positions - 1)
        mean, components = (tf.cast(picture, tf.float32) for picture in (self.mean_picture, self.components))
        scale = tf.math.rsqrt(tf.reduce_mean(tf.reduce_sum(components ** 2, axis=-1)) + 1e-12)
        mean, differs = tf.gather(mean, near), scale * tf.einsum("bdhwp,bp->bdhw", tf.gather(components, near), person)
        return tf.einsum("yh,bdhw,xw->byxd", self.to_grid, tf.concat([mean, differs], axis=1), self.to_grid)

    # The network

    def _condition(self, positions, person):
        """What every layer is told, (B, 1, 1, F)."""
        return (self.position_embedding(positions) + self.person_embedding(person))[:, tf.newaxis, tf.newaxis]

    def _places(self, positions, below, person):
        """What is known of each place before any code is, (B, g, g, F)."""
        places = self.place_embedding(tf.range(self.grid_size * self.grid_size))
        places = tf.reshape(places, (1, self.grid_size, self.grid_size, self.num_filters))
        known = self.picture_conv(self._pictures(positions, person))
        for index, embedding in enumerate(self.below_embeddings):
            known += embedding(below[:, index])
        for first, second in zip(self.known_convs[::2], self.known_convs[1::2]):
            known += second(tf.nn.relu(first(tf.nn.relu(known))))
        return places + known

    def _known(self, positions, below, person):
        """(`_condition`, `_places`); what is None is unknown."""
        count = tf.shape(positions)[0]
        below = self._none_below(count) if below is None else below
        person = tf.zeros((count, self.person_size)) if person is None else tf.cast(person, tf.float32)
        return self._condition(positions, person), self._places(positions, below, person)

    def call(self, inputs, training=False):
        """The logits of every code, given those before it.

        Args:
            inputs: a dict of `codes`, int (B, g, g); `positions`, int (B,); and, unless unknown, `below`, int (B, S, g, g), the
                codes of the slices below, one for each of `steps_below`, all K if there is none; `person`, float (B, P),
                zeros for the average person.
            training: whether to drop out.

        Returns:
            float32 (B, g, g, K).
        """
        condition, places = self._known(inputs["positions"], inputs.get("below"), inputs.get("person"))
        embedded = self.code_embedding(inputs["codes"])
        # Shifted by one, so that a row starts from the one above and a code from the one to its left.
        vertical = places + tf.pad(embedded[:, :-1], [[0, 0], [1, 0], [0, 0], [0, 0]])
        horizontal = places + tf.pad(embedded[:, :, :-1], [[0, 0], [0, 0], [1, 0], [0, 0]])
        seen = tf.linalg.band_part(tf.ones((1, self.grid_size, self.grid_size), tf.bool), -1, 0)
        for index, block in enumerate(self.blocks):
            if index % 3 == 2:
                vertical, _ = self.attentions[index // 3](vertical, vertical[:, :0], seen)
            up, left = block.rows_up, block.codes_left
            window = tf.pad(vertical, [[0, 0], [up, 0], [up, up], [0, 0]])
            vertical, from_vertical = block.vertical(window, condition)
            window = tf.pad(horizontal, [[0, 0], [0, 0], [left, 0], [0, 0]])
            horizontal = block.horizontal(window, from_vertical, condition, training)
        return self.head(horizontal + vertical)

    def distribution(self, codes, positions, below=None, person=None, training=False):
        """The codes' `tfp.distributions.Categorical`, batch shape (B, g, g), each given the codes before it; see `call`."""
        known = {"below": below, "person": person}
        inputs = {"codes": codes, "positions": positions, **{name: value for name, value in known.items() if value is not None}}
        return tfp.distributions.Categorical(logits=self(inputs, training=training))

    def log_prob(self, codes, positions, below=None, person=None, training=False):
        """log p(codes | position, slices below, person) in nats, float32 (B,); the arguments are those of `call`."""
        return tf.reduce_sum(self.distribution(codes, positions, below, person, training).log_prob(codes), axis=(1, 2))

    def _bits(self, data, training):
        """The code length of each slice, float32 (B,), in bits per code."""
        return -self.log_prob(**data, training=training) / (math.log(2) * self.grid_size ** 2)

    def train_step(self, data):
        """One step on a batch as `call` takes it; the loss is the code length in bits per code.

        Slices with a slice below count as `bits_per_code`, those without as `bits_per_code_alone`.
        """
        with tf.GradientTape() as tape:
            bits = self._bits(data, training=True)
            scaled_loss = self.optimizer.scale_loss(tf.reduce_mean(bits))
        self.optimizer.apply(tape.gradient(scaled_loss, self.trainable_variables), self.trainable_variables)
        given = (tf.cast(data["below"][:, 0, 0, 0] < self.num_embeddings, tf.float32) if "below" in data
                 else tf.zeros_like(bits))
        for tracker, weight in zip(self.trackers, (given, 1 - given)):
            tracker.update_state(bits, weight)
        return {tracker.name: tracker.result() for tracker in self.trackers}

    def test_step(self, data):
        """The code length of a batch: `bits_per_code`, with all that it tells, and `..._alone`, of the slice by itself."""
        count = tf.shape(data["codes"])[0]
        data = {name: devices.fill_if_empty(values) for name, values in data.items()}
        alone = {"codes": data["codes"], "positions": data["positions"]}
        for tracker, known in zip(self.trackers, (data, alone)):
            tracker.update_state(self._bits(known, training=False)[:count])
        return {tracker.name: tracker.result() for tracker in self.trackers}

    @property
    def metrics(self):
        return self.trackers

    def sample(self, positions, seed=0, temperature=1.0, batch_size=None):
        """Draws codes, exactly as the full network would, computing at each code only what is new.

        The vertical stack runs once per row, the horizontal stack once per code, on the last few features of each layer.
        Sample i gets its noise and its person from (`seed`, i), whatever the batch size; there is no slice below.

        Args:
            positions: int (N,), the slice position of each sample.
            seed: int; the same seed gives the same codes.
            temperature: 1 draws from the model, 0 takes the likeliest code each time.
            batch_size: samples drawn side by side; by default as many as suit the machine.

        Returns:
            codes, int32 NumPy (N, g, g).
        """
        positions = np.asarray(positions, np.int32)
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_positions:
            raise ValueError(f"positions must lie in 0 to {self.num_positions - 1}, got {positions.min()} to {positions.max()}.")
        size = max(1, min(batch_size or devices.samples_at_once(self._noise_bytes), len(positions)))
        codes = np.zeros((len(positions), self.grid_size, self.grid_size), np.int32)
        for first in tqdm(range(0, len(positions), size), "Sampling", unit=" batches", leave=False, disable=None):
            # The last batch is filled up: another size would be compiled anew.
            some = np.resize(positions[first:first + size], size)
            indices = tf.range(first, first + size)
            drawn = self.compiled_sampler(tf.constant(some), self.gumbel_noise(seed, indices), tf.constant(temperature, tf.float32),
                                          self._none_below(size), self.draw_persons(seed, indices))
            codes[first:first + size] = drawn[:len(positions) - first]
        return codes

    def sample_heads(self, count, seed=0, temperature=1.0, batch_size=None, told=None):
        """Draws whole heads, slice by slice from the lowest up, each given its person and those below it as they were drawn.

        Head i gets its noise and its person from (`seed`, i), whatever the batch size.

        Args:
            count: N.
            seed: int; the same seed gives the same heads.
            temperature: as in `sample`.
            batch_size: heads drawn side by side; by default as many as suit the machine.
            told: float (N, P), the persons to tell them as they are; by default drawn ones, see `calibrate`.

        Returns:
            codes, int32 NumPy (N, num_positions, g, g).
        """
        heads = np.zeros((count, self.num_positions, self.grid_size, self.grid_size), np.int32)
        size = max(1, min(batch_size or devices.samples_at_once(self._noise_bytes), count))
        with tqdm(total=count * self.num_positions, desc="Sampling", unit=" slices", leave=False, disable=None) as progress:
            for first in range(0, count, size):
                indices = tf.range(first, first + size)  # the last batch is filled up: another size would be compiled anew
                some = None if told is None else tf.gather(told, tf.minimum(indices, count - 1))
                for position, codes in enumerate(self._draw_heads(indices, seed, temperature, self.compiled_sampler, some)):
                    heads[first:first + size, position] = codes[:count - first]
                    progress.update(min(size, count - first))
        return heads

    def _draw_heads(self, indices, seed, temperature, sampler, told=None):
        """Yields the codes (B, g, g) of one position after the other."""
        person = self.shift + self.scale * self.draw_persons(seed, indices) if told is None else told
        drawn = []
        none = self._none_below(tf.shape(indices)[0])[:, 0]
        for position in range(self.num_positions):
            noise = self.gumbel_noise(seed, indices * self.num_positions + position)
            below = tf.stack([drawn[-step] if step <= position else none for step in self.steps_below], axis=1)
            drawn.append(sampler(tf.fill(tf.shape(indices), position), noise, tf.cast(temperature, tf.float32), below, person))
            yield drawn[-1]

    @property
    def _noise_bytes(self):
        return 4 * self.grid_size ** 2 * self.num_embeddings

    def _none_below(self, count):
        return tf.fill((count, len(self.steps_below), self.grid_size, self.grid_size), self.num_embeddings)

    def gumbel_noise(self, seed, indices):
        """Standard Gumbel noise float32 (N, g, g, K), each sample's from (`seed`, its index) alone."""
        shape = self.grid_size, self.grid_size, self.num_embeddings
        uniform = tf.map_fn(lambda i: tf.random.stateless_uniform(shape, [seed, i], minval=1e-20),
                            indices, fn_output_signature=tf.float32)
        return -tf.math.log(-tf.math.log(uniform))

    def sample_from_noise(self, positions, noise, temperature, below=None, person=None):
        """The codes, int32 (B, g, g), that Gumbel-max draws from given noise (B, g, g, K): argmax(logits + T noise)."""
        size, batch, filters = self.grid_size, tf.shape(positions)[0], self.num_filters
        condition, places = self._known(positions, below, person)
        dtype = places.dtype

        def draw_row(row, previous, rows_before, looked_up_before, codes):
            vertical = tf.gather(places, [row], axis=1) + previous
            told, rows_kept, looked_up = [], [], []
            for index, (block, before) in enumerate(zip(self.blocks, rows_before)):
                if index % 3 == 2:
                    above = looked_up_before[index // 3]
                    seen = tf.range(size + 1) >= size - row  # the last `row` of those kept, and itself
                    vertical, newest = self.attentions[index // 3](vertical, above, seen[tf.newaxis, tf.newaxis])
                    looked_up.append(tf.concat([above[:, 1:], newest], axis=1))
                window = tf.concat([before, vertical], axis=1)
                rows_kept.append(window[:, 1:])
                window = tf.pad(window, [[0, 0], [0, 0], [block.rows_up, block.rows_up], [0, 0]])
                vertical, from_vertical = block.vertical(window, condition)
                told.append(from_vertical)

            def draw_code(column, previous, codes_before, row_codes):
                horizontal = places[:, row, column][:, tf.newaxis, tf.newaxis] + previous
                codes_kept = []
                for block, before, from_vertical in zip(self.blocks, codes_before, told):
                    window = tf.concat([before, horizontal], axis=2)
                    codes_kept.append(window[:, :, 1:])
                    horizontal = block.horizontal(window, tf.gather(from_vertical, [column], axis=2), condition)
                logits = self.head(horizontal + tf.gather(vertical, [column], axis=2))[:, 0, 0]
                code = tf.argmax(logits + temperature * noise[:, row, column], axis=-1, output_type=tf.int32)
                previous = self.code_embedding(code)[:, tf.newaxis, tf.newaxis]
                return column + 1, previous, codes_kept, row_codes.write(column, code)

            start = (0, tf.zeros((batch, 1, 1, filters), dtype),
                     [tf.zeros((batch, 1, block.codes_left, filters), dtype) for block in self.blocks],
                     tf.TensorArray(tf.int32, size, element_shape=positions.shape))
            row_codes = tf.while_loop(lambda column, *_: column < size, draw_code, start)[-1]
            row_codes = tf.transpose(row_codes.stack())
            previous = tf.reshape(self.code_embedding(row_codes), (batch, 1, size, filters))
            return row + 1, previous, rows_kept, looked_up, codes.write(row, row_codes)

        start = (0, tf.zeros((batch, 1, size, filters), dtype),
                 [tf.zeros((batch, block.rows_up, size, filters), dtype) for block in self.blocks],
                 [tf.zeros((batch, size, size, filters), dtype) for _ in self.attentions],
                 tf.TensorArray(tf.int32, size, element_shape=(positions.shape[0], size)))
        codes = tf.while_loop(lambda row, *_: row < size, draw_row, start)[-1]
        return tf.transpose(codes.stack(), (1, 0, 2))

    def sample_by_full_forwards(self, positions, noise, temperature=1.0, below=None, person=None):
        """What `sample_from_noise` must equal, the slow way: a full forward pass for each code. For tests and benchmarks."""
        codes = np.zeros(noise.shape[:3], np.int32)
        forward = tf.function(lambda codes: self.distribution(codes, positions, below, person).logits)
        for row, column in np.ndindex(*codes.shape[1:]):
            logits = forward(tf.constant(codes))[:, row, column]
            codes[:, row, column] = tf.argmax(logits + temperature * noise[:, row, column], axis=-1)
        return codes
