"""The networks and their files: vector quantiser, encoder, decoder and VQ-VAE; and the PixelCNN, the prior over the codes.

Images are float32 (B, height, width, 1) in [-1, 1]; codes are int32 (B, height / downsample, width / downsample) in
[0, num_embeddings).

References:
    [1] van den Oord et al.: Neural Discrete Representation Learning, 2017. https://arxiv.org/abs/1711.00937
    [2] Razavi et al.: Generating Diverse High-Fidelity Images with VQ-VAE-2, 2019. https://arxiv.org/abs/1906.00446
    [3] Dhariwal et al.: Jukebox, 2020 (restart of dead codes, section 3.1). https://arxiv.org/abs/2005.00341
    [4] van den Oord et al.: Conditional Image Generation with PixelCNN Decoders, 2016. https://arxiv.org/abs/1606.05328
    [5] Ho et al.: Axial Attention in Multidimensional Transformers, 2019. https://arxiv.org/abs/1912.12180
"""

import functools
import hashlib
import math

import keras
from keras import layers
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from support import people, runs, sampler
from support.devices import (
    broadcast,
    Dropout,
    fill_if_empty,
    KerasFit,
    layers_of,
    PACKAGE,
    replica,
    sum_over_replicas,
)

ATTENTION_EVERY = 3  # every third block of the PixelCNN has an attention before it


# Vector quantiser -----------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(PACKAGE)
class VectorQuantizer(layers.Layer):
    """Replaces each vector by the nearest row of a codebook, with a straight-through gradient.

    The codebook follows its vectors as an exponential moving average (EMA; [1] appendix A.1, [2] section 2.1):

        N_k <- decay N_k + (1 - decay) n_k,   m_k <- decay m_k + (1 - decay) sum of the z assigned to k,   e_k = m_k / N_k

    with n_k the number of vectors z assigned to code k in the batch. Codes whose N_k falls below `restart_below` times the
    mean restart at a random vector of the batch [3]. With ``decay=None`` the codebook is trained by the gradient of
    ``mean((sg[z] - e)^2)`` instead ([1] equation 3). All of it stays float32 under mixed precision.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the length of a code's vector.
        commitment_cost: beta, the weight of ``mean((z - sg[e])^2)`` in the loss.
        decay: of the EMA, in (0, 1); None for the gradient codebook loss.
        restart_below: share of the mean use below which a code counts as dead; 0 turns restarts off.
        seed: of the restarts.
    """

    def __init__(self, num_embeddings=512, embedding_dim=16, commitment_cost=0.25, decay=0.99, restart_below=0.3, seed=0,
                 **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"num_embeddings and embedding_dim must be at least 1, got {num_embeddings}, {embedding_dim}.")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, or be None for the gradient codebook loss, got {decay}.")
        self.settings = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim, "commitment_cost": commitment_cost,
                         "decay": decay, "restart_below": restart_below, "seed": seed}
        for name, value in self.settings.items():
            setattr(self, name, value)

    def build(self, input_shape):
        if input_shape[-1] != self.embedding_dim:
            raise ValueError(f"Inputs must end in embedding_dim={self.embedding_dim} channels, got shape {tuple(input_shape)}.")
        uniform = keras.initializers.RandomUniform(-1 / self.num_embeddings, 1 / self.num_embeddings, seed=self.seed)
        shape = self.num_embeddings, self.embedding_dim
        # What the EMA assigns is the same on every replica of a `tf.distribute` strategy, so the first one's value counts.
        by_average = {"trainable": False, "aggregation": "only_first_replica"} if self.decay is not None else {}
        self.embeddings = self.add_weight(name="embeddings", shape=shape, initializer=uniform, **by_average)
        if self.decay is not None:
            self.counts = self.add_weight(name="counts", shape=shape[:1], initializer="ones", **by_average)
            self.sums = self.add_weight(name="sums", shape=shape, initializer="zeros", **by_average)
            self.sums.assign(self.embeddings)

    def call(self, inputs, training=False):
        """Quantises vectors, float (..., D); with `training`, moves the codebook too.

        Returns:
            A dict: `quantized`, float32 (..., D), with the straight-through gradient; `codes`, int32 (...); `loss`, the
            scalar VQ loss; `perplexity`, 2 to the entropy of the codes' use in this batch, from 1 to K.
        """
        vectors = tf.reshape(inputs, (-1, self.embedding_dim))
        codes = self.nearest(vectors)
        quantized = tf.gather(self.embeddings, codes)
        loss = self.commitment_cost * tf.reduce_mean(tf.square(vectors - tf.stop_gradient(quantized)))
        if self.decay is None:
            loss += tf.reduce_mean(tf.square(tf.stop_gradient(vectors) - quantized))
        elif training:
            self._update(tf.stop_gradient(vectors), codes)
        # Not bincount, which XLA does not compile.
        use = sum_over_replicas(tf.math.unsorted_segment_sum(tf.ones_like(codes, tf.float32), codes, self.num_embeddings))
        use = tf.math.divide_no_nan(use, tf.reduce_sum(use))
        quantized = vectors + tf.stop_gradient(quantized - vectors)
        return {
            "quantized": tf.reshape(quantized, tf.shape(inputs)),
            "codes": tf.reshape(codes, tf.shape(inputs)[:-1]),
            "loss": loss,
            "perplexity": tf.exp(-tf.reduce_sum(tf.math.xlogy(use, use))),
        }

    def distances(self, vectors):
        """|z - e|^2 - |z|^2 of vectors float32 (..., D) to all codes, (..., K); |z|^2 is the same for all."""
        return tf.reduce_sum(self.embeddings ** 2, 1) - 2 * tf.matmul(vectors, self.embeddings, transpose_b=True)

    def nearest(self, vectors):
        """The codes, int32 (...), whose rows are nearest to vectors float32 (..., D)."""
        return tf.argmin(self.distances(vectors), axis=-1, output_type=tf.int32)

    def _update(self, vectors, codes):
        batch_counts = tf.math.unsorted_segment_sum(tf.ones_like(vectors[:, 0]), codes, self.num_embeddings)
        sums = tf.math.unsorted_segment_sum(vectors, codes, self.num_embeddings)
        batch_counts, sums = sum_over_replicas([batch_counts, sums])
        counts = self.decay * self.counts + (1 - self.decay) * batch_counts
        sums = self.decay * self.sums + (1 - self.decay) * sums
        mean_count = tf.reduce_mean(counts)
        dead = counts < self.restart_below * mean_count
        counts = tf.where(dead, mean_count, counts)
        sums = tf.where(dead[:, tf.newaxis], self._random_vectors(vectors, batch_counts) * mean_count, sums)
        self.counts.assign(counts)
        self.sums.assign(sums)
        # The floor matters only without restarts, where an unused code's count decays towards 0 / 0.
        self.embeddings.assign(sums / tf.maximum(counts, 1e-8)[:, tf.newaxis])

    def _random_vectors(self, vectors, batch_counts):
        """K random vectors of the whole batch, (K, D), the same on every replica.

        The codes' counts of the batch seed the draw: so replicas agree, and a resumed run needs no saved state.
        """
        number = tf.range(1, self.num_embeddings + 1)
        seed = tf.reduce_sum(tf.cast(batch_counts, tf.int32) * number)
        size, replicas = tf.shape(vectors)[0], tf.distribute.get_strategy().num_replicas_in_sync
        indices = tf.random.stateless_uniform((self.num_embeddings,), [self.seed, seed], 0, size * replicas, tf.int32)
        if replicas == 1 or tf.distribute.in_cross_replica_context():
            return tf.gather(vectors, indices)
        own = indices // size == replica()
        return sum_over_replicas(tf.where(own[:, tf.newaxis], tf.gather(vectors, indices % size), 0.0))

    def start(self, centers, counts):
        """Starts the codebook at the centers (K, D) of clusters with counts (K,) of vectors."""
        counts = broadcast(counts.clip(1))
        self.embeddings.assign(broadcast(centers))
        if self.decay is not None:
            self.counts.assign(counts / counts.mean())
            self.sums.assign(self.embeddings * self.counts[:, tf.newaxis])

    def digest(self):
        """A SHA-256 hex digest of the codebook: what its codes mean to a decoder or a prior."""
        return hashlib.sha256(np.ascontiguousarray(self.embeddings, np.float32)).hexdigest()

    def get_config(self):
        return {**super().get_config(), **self.settings}


def _residual_block(x, width, inner_width=None):
    y = layers.Activation("relu")(x)
    y = layers.Conv2D(inner_width or width, 3, padding="same")(y)
    y = layers.Activation("relu")(y)
    # Starts as the identity, so that depth costs no early training.
    y = layers.Conv2D(width, 3, padding="same", kernel_initializer="zeros")(y)
    return layers.Add()([x, y])


def _stem_stride(image_size, margin):
    stride, rest = divmod(4 * (image_size - 2 * margin), image_size)
    if rest or stride < 1 or image_size % 8:
        raise ValueError(f"image_size must be a multiple of 8 and margin 0, 1/8, 2/8 or 3/8 of it, got {image_size}, {margin}.")
    return stride


def build_encoder(image_size=256, embedding_dim=16, downsample=8, margin=0, width=64, num_residual_blocks=2):
    """Images -> vectors: float (B, S, S, 1) -> (B, S / downsample, S / downsample, embedding_dim).

    The first convolution takes the image, less `margin` black pixels on each side, to a grid of S / 4 at once: work at full
    resolution is what costs. The grid of vectors is laid over what the margin leaves, so that none is spent on the empty
    border that all pictures share.

    Args:
        image_size: S, in pixels; a multiple of 8.
        embedding_dim, downsample: channels of the output; 4 or 8.
        margin: pixels left out on each side: 0, S / 8, S / 4 or 3 S / 8.
        width, num_residual_blocks: channels of the vectors' grid; blocks of two 3x3 convolutions there.
    """
    if downsample not in (4, 8):
        raise ValueError(f"downsample must be 4 or 8, got {downsample}.")
    stride = _stem_stride(image_size, margin)
    images = keras.Input((image_size, image_size, 1), name="images")
    x = layers.Cropping2D(margin)(images)
    x = layers.Conv2D(width // 2, 2 * stride, strides=stride, padding="same", activation="relu")(x)
    if downsample == 8:
        x = layers.Conv2D(width, 4, strides=2, padding="same")(x)
    else:
        x = layers.Conv2D(width, 3, padding="same")(x)
    for _ in range(num_residual_blocks):
        x = _residual_block(x, width)
    x = layers.Activation("relu")(x)
    return keras.Model(images, layers.Conv2D(embedding_dim, 1)(x), name="encoder")


def build_decoder(image_size=256, embedding_dim=16, downsample=8, margin=0, width=64, num_residual_blocks=2):
    """Vectors -> images, the mirror of `build_encoder`; the margin is painted black (-1), other values are not clipped."""
    stride = _stem_stride(image_size, margin)
    grid = image_size // downsample
    vectors = keras.Input((grid, grid, embedding_dim), name="vectors")
    x = layers.Conv2D(width, 3, padding="same")(vectors)
    for _ in range(num_residual_blocks):
        x = _residual_block(x, width)
    x = layers.Activation("relu")(x)
    if downsample == 8:
        x = layers.Conv2DTranspose(width // 2, 4, strides=2, padding="same")(x)
    else:
        x = layers.Conv2D(width // 2, 3, padding="same")(x)
    x = _residual_block(x, width // 2)
    x = layers.Activation("relu")(x)
    x = layers.Conv2DTranspose(1, 2 * stride, strides=stride, padding="same", dtype="float32")(x)
    x = layers.Rescaling(1.0, 1.0, dtype="float32")(x)  # black to 0, so that padding with 0 is padding with black
    x = layers.ZeroPadding2D(margin, dtype="float32")(x)
    return keras.Model(vectors, layers.Rescaling(1.0, -1.0, dtype="float32")(x), name="decoder")


@keras.saving.register_keras_serializable(PACKAGE)
class VQVAE(KerasFit, keras.Model):
    """Compresses images to a grid of codes and back [1].

    The total loss is ``reconstruction_loss + vq_loss``: the mean squared error over `data_variance` (1 is what painting
    every pixel in the mean colour would cost), plus the quantiser's loss.

    Args:
        image_size: side of the square images in pixels.
        num_embeddings, embedding_dim: K, the number of codes, and D, the length of a code's vector.
        downsample: pixels of `image_size` per code along each axis, 4 or 8.
        margin, width, num_residual_blocks: see `build_encoder`.
        commitment_cost, decay: see `VectorQuantizer`.
        data_variance: variance of the training pixels in [-1, 1].
        seed: of the codebook's start and restarts.
    """

    def __init__(self, image_size=256, num_embeddings=512, embedding_dim=16, downsample=8, margin=0, width=64,
                 num_residual_blocks=2, commitment_cost=0.25, decay=0.99, data_variance=1.0, seed=0, **kwargs):
        super().__init__(**kwargs)
        shape = {"image_size": image_size, "embedding_dim": embedding_dim, "downsample": downsample, "margin": margin,
                 "width": width, "num_residual_blocks": num_residual_blocks}
        self.settings = {**shape, "num_embeddings": num_embeddings, "commitment_cost": commitment_cost, "decay": decay,
                         "data_variance": data_variance, "seed": seed}
        self.image_size = image_size
        self.grid_size = image_size // downsample
        self.data_variance = data_variance
        with layers_of(self.dtype_policy):
            self.encoder, self.decoder = build_encoder(**shape), build_decoder(**shape)
        self.quantizer = VectorQuantizer(num_embeddings, embedding_dim, commitment_cost, decay, seed=seed)
        self.trackers = [keras.metrics.Mean(name) for name in ("loss", "reconstruction_loss", "vq_loss", "perplexity")]
        self.quantizer.build((None, self.grid_size, self.grid_size, embedding_dim))
        self.built = True

    def get_config(self):
        return {**super().get_config(), **self.settings}

    @property
    def margin(self):
        """The border in pixels that has no codes and is painted black."""
        return self.settings["margin"]

    def encode(self, images):
        """Images (B, S, S, 1) in [-1, 1] -> vectors (B, g, g, D), before quantisation; ValueError if they are not floats."""
        images = tf.convert_to_tensor(images)
        if not images.dtype.is_floating:
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype.name}; see dataset.normalise.")
        return self.encoder(images)

    def decode(self, vectors):
        """Quantised vectors (B, g, g, D) -> images (B, S, S, 1), clipped to [-1, 1]."""
        return tf.clip_by_value(self.decoder(vectors), -1.0, 1.0)

    def encode_to_codes(self, images):
        """Images (B, S, S, 1) in [-1, 1] -> codes int32 (B, g, g)."""
        return self.quantizer(self.encode(images))["codes"]

    def decode_codes(self, codes):
        """Codes int (B, g, g) in [0, K) -> images (B, S, S, 1) in [-1, 1]."""
        return self.decode(tf.gather(self.quantizer.embeddings, codes))

    def call(self, images, training=False):
        """Reconstructs: (B, S, S, 1) -> (B, S, S, 1), in [-1, 1]."""
        return tf.clip_by_value(self._forward(images, training)[0], -1.0, 1.0)

    def _forward(self, images, training, quantise=True):
        vectors = self.encoder(images, training=training)
        quantized = self.quantizer(vectors, training=training) if quantise else {
            "quantized": vectors, "loss": 0.0, "perplexity": 0.0}
        return self.decoder(quantized["quantized"], training=training), quantized

    def _batch_losses(self, images, training, quantise=True):
        outputs, quantized = self._forward(images, training, quantise)
        # Outputs are clipped to -1, so values below -1 on a black pixel are no error.
        errors = tf.where((images <= -1) & (outputs < -1), 0.0, outputs - images)
        reconstruction_loss = tf.reduce_mean(tf.square(errors)) / self.data_variance
        return [reconstruction_loss + quantized["loss"], reconstruction_loss, quantized["loss"], quantized["perplexity"]]

    def step(self, images, quantise=True):
        """One optimiser step on images (B, S, S, 1), as a plain autoencoder without `quantise`; returns what `metrics` tracks."""
        with tf.GradientTape() as tape:
            losses = self._batch_losses(images, training=True, quantise=quantise)
            scaled_loss = self.optimizer.scale_loss(losses[0])
        self.optimizer.apply(tape.gradient(scaled_loss, self.trainable_variables), self.trainable_variables)
        return losses

    def train_step(self, data):
        """One step on a batch of (images, positions); the positions are not used."""
        return self._track(self.step(data[0]), data[0])

    def test_step(self, data):
        """The losses on a batch of (images, positions)."""
        return self._track(self._batch_losses(fill_if_empty(data[0]), training=False), data[0])

    def _track(self, values, images):
        count = tf.shape(images)[0]  # the last batch of a split may be short, and a replica's part of it empty
        for tracker, value in zip(self.trackers, values):
            tracker.update_state(tf.where(count > 0, value, 0.0), count)
        return self.logs()


# PixelCNN -------------------------------------------------------------------------------------------------------------


def _gate(x):
    """Halves the channels: ``tanh(a) sigmoid(b)``, [4] equation 2."""
    a, b = tf.split(x, 2, axis=-1)
    return tf.tanh(a) * tf.sigmoid(b)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedBlock(layers.Layer):
    """One layer of the gated PixelCNN: a vertical and a horizontal stack ([4] figure 2).

    At (row, column) the vertical features depend on all codes of the rows above, the horizontal ones on these and on the codes
    to the left: together on everything before, so there is no blind spot. Nothing is padded here; the caller pads the
    windows: the whole grid while training, the newest row or code while sampling. So both run the same code.

    Args:
        num_filters: channels F of both stacks.
        kernel_size: odd width k of the window; the vertical stack sees k // 2 rows up per layer.
        dilation: d; the horizontal stack sees every d-th of the d (k // 2) codes to the left.
        dropout: rate on the horizontal branch.
    """

    def __init__(self, num_filters, kernel_size, dilation, dropout, **kwargs):
        super().__init__(**kwargs)
        self.settings = {"num_filters": num_filters, "kernel_size": kernel_size, "dilation": dilation, "dropout": dropout}
        self.rows_up, self.dilation = kernel_size // 2, dilation
        self.codes_left = dilation * self.rows_up
        self.vertical_conv = layers.Conv2D(2 * num_filters, (self.rows_up + 1, kernel_size))
        # A dilated convolution as one matrix product over its taps: on a CPU several times as fast.
        self.horizontal_taps = layers.Dense(2 * num_filters)
        self.vertical_to_horizontal = layers.Dense(2 * num_filters)
        self.condition = layers.Dense(4 * num_filters)
        self.vertical_out = layers.Dense(num_filters, kernel_initializer="zeros")
        self.horizontal_out = layers.Dense(num_filters, kernel_initializer="zeros")
        self.dropout = Dropout(dropout)

    def build(self, input_shape=None):
        filters = self.settings["num_filters"]
        for layer in (self.vertical_conv, self.vertical_to_horizontal, self.condition, self.vertical_out, self.horizontal_out):
            layer.build((None, None, None, filters))
        self.horizontal_taps.build((None, None, None, (self.rows_up + 1) * filters))
        self.built = True

    def get_config(self):
        return {**super().get_config(), **self.settings}

    def vertical(self, rows, window, condition):
        """One vertical step on R rows.

        Args:
            rows: (B, R, W, F).
            window: (B, R + k // 2, W + 2 (k // 2), F), the rows before and these, padded at the sides.
            condition: (B, 1, 1, C), features of position and person.

        Returns:
            The rows' new features (B, R, W, F), and the horizontal stack's input from them (B, R, W, 2F).
        """
        features = self.vertical_conv(window) + tf.split(self.condition(condition), 2, axis=-1)[0]
        gated = _gate(features)
        return rows + self.vertical_out(gated), self.vertical_to_horizontal(gated)

    def horizontal(self, codes, window, from_vertical, condition, training=False):
        """One horizontal step on W codes of R rows: their new features (B, R, W, F).

        Args:
            codes: (B, R, W, F).
            window: (B, R, d (k // 2) + W, F), the codes before and these.
            from_vertical, condition: what `vertical` returned second, and its condition.
            training: whether to drop out.
        """
        shape = tf.shape(codes)  # not window[...]: the gradient of a strided slice is slow on a CPU
        taps = [tf.slice(window, [0, 0, tap * self.dilation, 0], shape) for tap in range(self.rows_up)]
        features = self.horizontal_taps(tf.concat([*taps, codes], axis=-1)) + from_vertical
        gated = _gate(features + tf.split(self.condition(condition), 2, axis=-1)[1])
        return codes + self.horizontal_out(self.dropout(gated, training=training))


@keras.saving.register_keras_serializable(PACKAGE)
class AxialAttention(layers.Layer):
    """Attention of the vertical stack along its own row, then up its column: in two steps, to all the rows above.

    The vertical features of a row depend on the rows above it alone, so along the row nothing need be masked; up the column
    each row attends to itself and those before ([5]). It spans the grid where convolutions
    do not: so the shape of the whole head is there while its texture is sampled.

    Args:
        num_filters: channels F.
        num_heads: of the attention, a divisor of F.
    """

    def __init__(self, num_filters, num_heads=4, **kwargs):
        super().__init__(**kwargs)
        self.settings = {"num_filters": num_filters, "num_heads": num_heads}
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        self.queries = [layers.Dense(num_filters) for _ in range(2)]
        self.keys_and_values = [layers.Dense(2 * num_filters) for _ in range(2)]
        self.outputs = [layers.Dense(num_filters) for _ in range(2)]

    def build(self, input_shape=None):
        for layer in (*self.norms, *self.queries, *self.keys_and_values, *self.outputs):
            layer.build((None, None, None, self.settings["num_filters"]))
        self.built = True

    def get_config(self):
        return {**super().get_config(), **self.settings}

    def call(self, rows, before, attention_mask):
        """Attends from rows to themselves and to those before.

        Args:
            rows: (B, R, W, F).
            before: (B, S, W, 2F), keys and values of the rows before: what was returned second for them.
            attention_mask: bool (R, S + R), which rows each row may attend to, those before first.

        Returns:
            The rows' new features (B, R, W, F), and their keys and values, (B, R, W, 2F).
        """
        features = self.norms[0](rows)
        rows = rows + self.outputs[0](self._attend(self.queries[0](features), self.keys_and_values[0](features)))
        features = self.norms[1](rows)
        keys_and_values = self.keys_and_values[1](features)
        columns = tf.transpose(self.queries[1](features), (0, 2, 1, 3))
        above = tf.transpose(tf.concat([before, keys_and_values], axis=1), (0, 2, 1, 3))
        attended = tf.transpose(self._attend(columns, above, attention_mask), (0, 2, 1, 3))
        return rows + self.outputs[1](attended), keys_and_values

    def _attend(self, queries, keys_and_values, attention_mask=None):
        """Softmax attention: (B, N, Q, F), (B, N, K, 2F) and bool (Q, K) -> (B, N, Q, F)."""
        # Not Keras' MultiHeadAttention, whose einsums take twice as long at this size.
        heads, filters = self.settings["num_heads"], self.settings["num_filters"]

        def split_heads(x):  # (B, N, L, heads * d) -> (B, N, heads, L, d)
            shape = tf.shape(x)
            return tf.transpose(tf.reshape(x, (shape[0], shape[1], shape[2], -1, filters // heads)), (0, 1, 3, 2, 4))

        queries = split_heads(queries * (filters // heads) ** -0.5)
        keys, values = tf.split(split_heads(keys_and_values), 2, axis=2)
        scores = tf.matmul(queries, keys, transpose_b=True)
        if attention_mask is not None:
            scores = tf.where(attention_mask, scores, scores.dtype.min)
        attended = tf.transpose(tf.matmul(tf.nn.softmax(scores), values), (0, 1, 3, 2, 4))
        return tf.reshape(attended, tf.concat([tf.shape(attended)[:3], [filters]], axis=0))


def _residual_network(grid_size, width, num_blocks):
    """Residual blocks over a grid, each through half the channels: float (B, g, g, width) -> (B, g, g, width)."""
    x = features = keras.Input((grid_size, grid_size, width))
    for _ in range(num_blocks):
        x = _residual_block(x, width, width // 2)
    return keras.Model(features, x)


@keras.saving.register_keras_serializable(PACKAGE)
class PixelCNN(KerasFit, keras.Model):
    """The prior over codes: p(codes | position, context, person) as a product over the grid, row by row, left to right [4].

    Every code depends on all codes before it: on those of the rows above through an `AxialAttention` before every third block,
    on those of its own row because the windows of the horizontal stack widen, 1, 2, 4 ... codes from block to block. It is
    conditioned on its place in the grid, its slice's position in the head and, where they are given, on

    - the context: the codes of the slices below, all over the grid. So a head is sampled slice by slice from the lowest up;
    - the person: what is the same throughout one head (see `support.people`). It acts on every layer, and as a picture: what
      that person's head looks like here, roughly.

    Args:
        grid_size: side g of the square grid of codes.
        num_embeddings: K, the number of codes; in the context it stands for "no slice".
        num_positions: slices per head.
        num_filters, kernel_size, dropout: of the gated blocks.
        num_layers: how many, at least log2 of g.
        codebook_digest: `VectorQuantizer.digest` of the codebook whose codes these are, or None.
        steps_below: how far below each of the S slices of the context lies.
        person_size: P, the length of the person vector.
        slice_positions: those that training people have; None for all. Others cannot be sampled.
    """

    def __init__(self, grid_size=32, num_embeddings=512, num_positions=32, num_filters=64, num_layers=8, kernel_size=3,
                 dropout=0.1, codebook_digest=None, steps_below=(1, 2, 4, 8), person_size=24, slice_positions=None, **kwargs):
        super().__init__(**kwargs)
        if kernel_size % 2 == 0 or kernel_size < 3:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}.")
        slice_positions = list(range(num_positions) if slice_positions is None else slice_positions)
        self.settings = {"grid_size": grid_size, "num_embeddings": num_embeddings, "num_positions": num_positions,
                         "num_filters": num_filters, "num_layers": num_layers, "kernel_size": kernel_size, "dropout": dropout,
                         "codebook_digest": codebook_digest, "steps_below": list(steps_below), "person_size": person_size,
                         "slice_positions": slice_positions}
        self.grid_size, self.num_embeddings, self.num_positions = grid_size, num_embeddings, num_positions
        self.num_filters, self.person_size = num_filters, person_size
        self.steps_below, self.slice_positions = tuple(steps_below), tuple(slice_positions)
        with layers_of(self.dtype_policy):
            self._make_layers(num_layers, kernel_size, dropout)
        self.to_grid = people.picture_to_grid(grid_size)
        self.trackers = [keras.metrics.Mean(name) for name in ("bits_per_code", "bits_per_code_alone")]
        self.compiled_sampler = tf.function(functools.partial(sampler.sample_codes, self), jit_compile=True)
        self.build()

    def _make_layers(self, num_layers, kernel_size, dropout):
        grid_size, num_filters = self.grid_size, self.num_filters
        self.code_embedding = layers.Embedding(self.num_embeddings, num_filters)
        self.context_embeddings = [layers.Embedding(self.num_embeddings + 1, num_filters) for _ in self.steps_below]
        self.picture_conv = layers.Conv2D(num_filters, 3, padding="same")
        # Nothing of the context is hidden: so its blocks may look all around, and run once per slice, not once per code.
        self.context_blocks = _residual_network(grid_size, num_filters, 3)
        self.position_embedding = layers.Embedding(self.num_positions, num_filters)
        self.person_embedding = layers.Dense(num_filters, use_bias=False)
        self.place_embedding = layers.Embedding(grid_size * grid_size, num_filters)
        cycle = max(1, (grid_size - 1).bit_length())
        self.blocks = [GatedBlock(num_filters, kernel_size, 2 ** (index % cycle), dropout) for index in range(num_layers)]
        self.attentions = [AxialAttention(num_filters) for _ in range(num_layers // ATTENTION_EVERY)]
        self.logits = keras.Sequential([layers.Activation("relu"), layers.Dense(2 * num_filters, activation="relu"),
                                        layers.Dense(self.num_embeddings, dtype="float32", name="logits")])

    def build(self, input_shape=None):
        for layer in (self.code_embedding, *self.context_embeddings, self.position_embedding, self.place_embedding,
                      *self.blocks, *self.attentions):
            layer.build(None)
        self.picture_conv.build((None, None, None, 6))
        self.person_embedding.build((None, self.person_size))
        self.logits.build((None, self.grid_size, self.grid_size, self.num_filters))
        size = self.person_size
        picture = self.num_positions, people.PICTURE_SIDE, people.PICTURE_SIDE
        shapes = {"mean_picture": picture, "components": (*picture, size), "quantiles": (people.NUM_QUANTILES, size),
                  "person_shift": (size,), "person_scale": (size,)}
        for name, shape in shapes.items():
            start = "ones" if name == "person_scale" else "zeros"
            # Not cast under mixed precision: the sampler, outside of `call`, takes them whole.
            setattr(self, name, self.add_weight(name=name, shape=shape, initializer=start, trainable=False, autocast=False))
        self.built = True

    def get_config(self):
        return {**super().get_config(), **self.settings}

    def fit_people(self, pictures):
        """Fits the space of persons to the pictures of training heads: see `people.fit`."""
        space = people.fit(pictures, self.person_size)
        for name, value in space._asdict().items():
            getattr(self, name).assign(value)

    def encode_people(self, pictures):
        """The persons of heads, float32 (N, P), from their pictures: see `people.encode`."""
        return people.encode(pictures, self.mean_picture.numpy(), self.components.numpy())

    def _person_pictures(self, positions, person):
        """Pictures of this slice and its neighbours, (B, g, g, 6): channels 0 to 2 people's mean, 3 to 5 the person's difference."""
        near = tf.clip_by_value(positions[:, tf.newaxis] + [-1, 0, 1], 0, self.num_positions - 1)
        mean, components = (tf.cast(picture, tf.float32) for picture in (self.mean_picture, self.components))
        unit = tf.math.rsqrt(tf.reduce_mean(tf.reduce_sum(components ** 2, axis=-1)) + 1e-12)
        difference = unit * tf.einsum("bdhwp,bp->bdhw", tf.gather(components, near), person)
        pictures = tf.concat([tf.gather(mean, near), difference], axis=1)
        return tf.einsum("yh,bdhw,xw->byxd", self.to_grid, pictures, self.to_grid)

    def condition_features(self, positions, context=None, person=None):
        """What does not depend on the slice's own codes; see `call` for the arguments.

        Returns:
            (features for every layer, (B, 1, 1, F); features of each place, (B, g, g, F)).
        """
        count = tf.shape(positions)[0]
        context = self.no_context(count) if context is None else context
        person = tf.zeros((count, self.person_size)) if person is None else tf.cast(person, tf.float32)
        everywhere = (self.position_embedding(positions) + self.person_embedding(person))[:, tf.newaxis, tf.newaxis]
        places = self.place_embedding(tf.range(self.grid_size * self.grid_size))
        places = tf.reshape(places, (1, self.grid_size, self.grid_size, self.num_filters))
        around = self.picture_conv(self._person_pictures(positions, person))
        for index, embedding in enumerate(self.context_embeddings):
            around += embedding(context[:, index])
        return everywhere, places + self.context_blocks(around)

    def no_context(self, count):
        """The context of slices by themselves, int32 (count, S, g, g)."""
        return tf.fill((count, len(self.steps_below), self.grid_size, self.grid_size), self.num_embeddings)

    def attention_before(self, index):
        """The `AxialAttention` before block `index`, or None."""
        return self.attentions[index // ATTENTION_EVERY] if index % ATTENTION_EVERY == ATTENTION_EVERY - 1 else None

    def call(self, inputs, training=False):
        """The logits of every code, given those before it.

        Args:
            inputs: a dict of `codes`, int (B, g, g); `positions`, int (B,); and, unless unknown, `context`, int (B, S, g, g), the
                codes of the slices below, one for each of `steps_below`, all K where there is none; `person`, float (B, P),
                zeros for the average person.
            training: whether to drop out.

        Returns:
            float32 (B, g, g, K).
        """
        condition, places = self.condition_features(inputs["positions"], inputs.get("context"), inputs.get("person"))
        embedded = self.code_embedding(inputs["codes"])
        # Shifted by one, so that a row starts from the one above and a code from the one to its left.
        vertical = places + tf.pad(embedded[:, :-1], [[0, 0], [1, 0], [0, 0], [0, 0]])
        horizontal = places + tf.pad(embedded[:, :, :-1], [[0, 0], [0, 0], [1, 0], [0, 0]])
        causal = tf.linalg.band_part(tf.ones((self.grid_size, self.grid_size), tf.bool), -1, 0)
        no_rows = tf.zeros((tf.shape(vertical)[0], 0, self.grid_size, 2 * self.num_filters), vertical.dtype)
        for index, block in enumerate(self.blocks):
            if attention := self.attention_before(index):
                vertical, _ = attention(vertical, no_rows, causal)
            up, left = block.rows_up, block.codes_left
            window = tf.pad(vertical, [[0, 0], [up, 0], [up, up], [0, 0]])
            vertical, from_vertical = block.vertical(vertical, window, condition)
            window = tf.pad(horizontal, [[0, 0], [0, 0], [left, 0], [0, 0]])
            horizontal = block.horizontal(horizontal, window, from_vertical, condition, training)
        return self.logits(horizontal + vertical)

    def distribution(self, codes, positions, context=None, person=None, training=False):
        """The codes' `tfp.distributions.Categorical`, batch shape (B, g, g), each given the codes before it; see `call`."""
        conditions = {name: value for name, value in (("context", context), ("person", person)) if value is not None}
        return tfp.distributions.Categorical(logits=self({"codes": codes, "positions": positions, **conditions}, training=training))

    def log_prob(self, codes, positions, context=None, person=None, training=False):
        """log p(codes | position, context, person) in nats, float32 (B,); the arguments are those of `call`."""
        return tf.reduce_sum(self.distribution(codes, positions, context, person, training).log_prob(codes), axis=(1, 2))

    def _bits_per_code(self, batch, training):
        """The code length of each slice of a batch, float32 (B,)."""
        return -self.log_prob(**batch, training=training) / (math.log(2) * self.grid_size ** 2)

    def train_step(self, data):
        """One step on a batch as `call` takes it; slices without context count as `bits_per_code_alone`."""
        with tf.GradientTape() as tape:
            bits = self._bits_per_code(data, training=True)
            scaled_loss = self.optimizer.scale_loss(tf.reduce_mean(bits))
        self.optimizer.apply(tape.gradient(scaled_loss, self.trainable_variables), self.trainable_variables)
        has_context = (tf.cast(tf.reduce_any(data["context"][:, :, 0, 0] < self.num_embeddings, axis=1), tf.float32)
                       if "context" in data else tf.zeros_like(bits))
        for tracker, weight in zip(self.trackers, (has_context, 1 - has_context)):
            tracker.update_state(bits, weight)
        logs = self.logs()
        return {"bits_per_code": logs["bits_per_code"], "bits_per_code_no_context": logs["bits_per_code_alone"]}

    def test_step(self, data):
        """The code length of a batch: `bits_per_code`, given context and person, and `bits_per_code_alone`, without both."""
        count = tf.shape(data["codes"])[0]
        data = {name: fill_if_empty(values) for name, values in data.items()}
        for tracker, batch in zip(self.trackers, (data, {name: data[name] for name in ("codes", "positions")})):
            tracker.update_state(self._bits_per_code(batch, training=False)[:count])
        return self.logs()

    def sample(self, positions, seed=0, temperature=1.0, batch_size=None):
        """Samples the codes of single slices, int32 NumPy (N, g, g): see `sampler.sample_slices`."""
        return sampler.sample_slices(self, positions, seed, temperature, batch_size)

    def sample_heads(self, count, seed=0, temperature=1.0, batch_size=None):
        """Samples the codes of whole heads, int32 NumPy (N, positions, g, g): see `sampler.sample_heads`."""
        return sampler.sample_heads(self, count, seed, temperature, batch_size)


def load_model(path, compile=True):
    """Loads a VQ-VAE or a PixelCNN from a .keras file, which runs no code that the file may hold.

    Args:
        path: the file.
        compile: whether to load the optimiser too.

    Raises:
        ValueError: if it is damaged, not of this repository, or would run code.
    """
    model = runs.read_model_file(path, lambda: keras.models.load_model(path, compile=compile, safe_mode=True))
    if not isinstance(model, (VQVAE, PixelCNN)):
        raise ValueError(f"{path} cannot be loaded (it holds a {type(model).__name__})")
    return model


def load_weights(model, path):
    """Loads the weights of a .keras file into a model, and into its optimiser if it is compiled; errors as in `load_model`."""
    runs.read_model_file(path, lambda: model.load_weights(path))


def check_match(vqvae, prior):
    """Raises ValueError if a prior was trained on the codes of another codebook than the VQ-VAE's."""
    if prior.settings["codebook_digest"] != vqvae.quantizer.digest():
        raise ValueError("it was trained on the codes of another codebook")
