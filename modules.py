"""The networks: vector quantiser, encoder, decoder, VQ-VAE, and the PixelCNN prior over the codes.

Images are float32 (B, height, width, 1) in [-1, 1]; codes are int32 (B, height / downsample, width / downsample) in
[0, num_embeddings).

References:
    [1] van den Oord, Vinyals, Kavukcuoglu: Neural Discrete Representation Learning, 2017. https://arxiv.org/abs/1711.00937
    [2] Razavi, van den Oord, Vinyals: Generating Diverse High-Fidelity Images with VQ-VAE-2, 2019.
        https://arxiv.org/abs/1906.00446
    [3] van den Oord et al.: Conditional Image Generation with PixelCNN Decoders, 2016. https://arxiv.org/abs/1606.05328
    [4] Dhariwal et al.: Jukebox: A Generative Model for Music, 2020 (restart of dead codes, section 3.1).
        https://arxiv.org/abs/2005.00341
    [5] Ho, Kalchbrenner, Weissenborn, Salimans: Axial Attention in Multidimensional Transformers, 2019.
        https://arxiv.org/abs/1912.12180
"""

import contextlib
import hashlib
import math
import zipfile

import keras
from keras import layers
import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
import tensorflow as tf
import tensorflow_probability as tfp
from tqdm import tqdm

from devices import broadcast, Distributed, Dropout, PACKAGE, replica, sum_over_replicas

PICTURE_SIDE = 16  # pixels of the pictures of heads that tell persons apart
NUM_QUANTILES = 101  # by which the distribution of each component of persons is known


@contextlib.contextmanager
def _layers_of(policy):
    """Gives the layers made inside it a model's dtype policy: a saved model then comes back in the precision it was trained in."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


# Vector quantiser -----------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(PACKAGE)
class VectorQuantizer(layers.Layer):
    """Replaces each vector by the nearest row of a codebook, with a straight-through gradient.

    The codebook follows its vectors as an exponential moving average (EMA; [1] appendix A.1, [2] section 2.1):

        N_k <- decay N_k + (1 - decay) n_k,   m_k <- decay m_k + (1 - decay) sum of the z assigned to k,   e_k = m_k / N_k

    with n_k the number of vectors z assigned to code k in the batch. Codes whose N_k falls below `restart_below` times the
    mean restart at a random vector of the batch [4]. With ``decay=None`` the codebook is trained by the gradient of
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
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost
        self.decay = decay
        self.restart_below = restart_below
        self.seed = seed

    def build(self, input_shape):
        if input_shape[-1] != self.embedding_dim:
            raise ValueError(f"Inputs must end in embedding_dim={self.embedding_dim} channels, got shape {tuple(input_shape)}.")
        uniform = keras.initializers.RandomUniform(-1 / self.num_embeddings, 1 / self.num_embeddings, seed=self.seed)
        shape = self.num_embeddings, self.embedding_dim
        # What the EMA assigns is the same on every replica of a `tf.distribute` strategy, so one of them may speak for all.
        moved = {"trainable": False, "aggregation": "only_first_replica"} if self.decay is not None else {}
        self.embeddings = self.add_weight(name="embeddings", shape=shape, initializer=uniform, **moved)
        if self.decay is not None:
            self.counts = self.add_weight(name="counts", shape=shape[:1], initializer="ones", **moved)
            self.sums = self.add_weight(name="sums", shape=shape, initializer="zeros", **moved)
            self.sums.assign(self.embeddings)

    def call(self, inputs, training=False):
        """Quantises a batch of vectors; with `training`, moves the codebook too.

        Args:
            inputs: float (..., D).
            training: whether to update the codebook.

        Returns:
            A dict: `quantized`, float32 (..., D), with the straight-through gradient; `codes`, int32 (...); `loss`, the
            scalar VQ loss; `perplexity`, 2 to the entropy of the codes' use in this batch, from 1 to K.
        """
        vectors = tf.reshape(inputs, (-1, self.embedding_dim))
        codes = self.nearest(vectors)
        quantized = tf.gather(self.embeddings, codes)
        loss = self.commitment_cost * _mean_square(vectors - tf.stop_gradient(quantized))
        if self.decay is None:
            loss += _mean_square(tf.stop_gradient(vectors) - quantized)
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
        now, sums = sum_over_replicas([tf.math.unsorted_segment_sum(tf.ones_like(vectors[:, 0]), codes, self.num_embeddings),
                                        tf.math.unsorted_segment_sum(vectors, codes, self.num_embeddings)])
        counts = self.decay * self.counts + (1 - self.decay) * now
        sums = self.decay * self.sums + (1 - self.decay) * sums
        mean_count = tf.reduce_mean(counts)
        dead = counts < self.restart_below * mean_count
        counts = tf.where(dead, mean_count, counts)
        sums = tf.where(dead[:, tf.newaxis], self._draw(vectors, now) * mean_count, sums)
        self.counts.assign(counts)
        self.sums.assign(sums)
        # The floor matters only without restarts, where an unused code's count decays towards 0 / 0.
        self.embeddings.assign(sums / tf.maximum(counts, 1e-8)[:, tf.newaxis])

    def _draw(self, vectors, now):
        """K random vectors of the whole batch, (K, D), the same on every replica.

        The codes' counts of the batch seed the draw: so replicas agree, and a resumed run needs no saved state.
        """
        number = tf.range(1, self.num_embeddings + 1)
        seed = tf.reduce_sum(tf.cast(now, tf.int32) * number)
        size, replicas = tf.shape(vectors)[0], tf.distribute.get_strategy().num_replicas_in_sync
        drawn = tf.random.stateless_uniform((self.num_embeddings,), [self.seed, seed], 0, size * replicas, tf.int32)
        if replicas == 1 or tf.distribute.in_cross_replica_context():
            return tf.gather(vectors, drawn)
        own = drawn // size == replica()
        return sum_over_replicas(tf.where(own[:, tf.newaxis], tf.gather(vectors, drawn % size), 0.0))

    def fit_codebook(self, vectors):
        """Starts the codebook at the k-means centres of `vectors`, float32 NumPy (N, D), N >= K.

        Raises:
            ValueError: if there are fewer vectors than codes.
        """
        if len(vectors) < self.num_embeddings:
            raise ValueError(f"{len(vectors)} vectors cannot start {self.num_embeddings} codes; give more images or fewer codes.")
        kmeans = MiniBatchKMeans(self.num_embeddings, batch_size=4096, max_iter=20, n_init=1, random_state=self.seed)
        counts = broadcast(np.bincount(kmeans.fit_predict(vectors), minlength=self.num_embeddings).clip(1))
        self.embeddings.assign(broadcast(kmeans.cluster_centers_))
        if self.decay is not None:
            self.counts.assign(counts / counts.mean())
            self.sums.assign(self.embeddings * self.counts[:, tf.newaxis])

    def digest(self):
        """A SHA-256 hex digest of the codebook: what its codes mean to a decoder or a prior."""
        return hashlib.sha256(np.ascontiguousarray(self.embeddings, np.float32)).hexdigest()

    def get_config(self):
        return {**super().get_config(), "num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim,
                "commitment_cost": self.commitment_cost, "decay": self.decay, "restart_below": self.restart_below,
                "seed": self.seed}


def _mean_square(x):
    return tf.reduce_mean(tf.square(x))


# Encoder and decoder --------------------------------------------------------------------------------------------------


def _residual_block(x, width):
    y = layers.Activation("relu")(x)
    y = layers.Conv2D(width, 3, padding="same")(y)
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
        embedding_dim: channels of the output.
        downsample: 4 or 8.
        margin: pixels left out on each side: 0, S / 8, S / 4 or 3 S / 8.
        width: channels at the resolution of the vectors.
        num_residual_blocks: of two 3x3 convolutions each.
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


# VQ-VAE ---------------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(PACKAGE)
class VQVAE(Distributed, keras.Model):
    """Compresses images to a grid of codes and back [1].

    The total loss is ``reconstruction_loss + vq_loss``: the mean squared error over `data_variance` (1 is what painting
    every pixel in the mean colour would cost), plus the quantiser's loss.

    Args:
        image_size: side of the square images in pixels.
        num_embeddings: K, the number of codes.
        embedding_dim: D, the length of a code's vector.
        downsample: pixels of `image_size` per code along each axis, 4 or 8.
        margin: see `build_encoder`.
        width: see `build_encoder`.
        num_residual_blocks: see `build_encoder`.
        commitment_cost: see `VectorQuantizer`.
        decay: see `VectorQuantizer`.
        data_variance: variance of the training pixels in [-1, 1].
        seed: of the codebook's start and restarts.

    Example:
        >>> vqvae = VQVAE()
        >>> codes = vqvae.encode_to_codes(images)       # (B, 256, 256, 1) -> int32 (B, 32, 32)
        >>> images = vqvae.decode_codes(codes)          # and back, in [-1, 1]
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
        with _layers_of(self.dtype_policy):
            self.encoder, self.decoder = build_encoder(**shape), build_decoder(**shape)
        self.quantizer = VectorQuantizer(num_embeddings, embedding_dim, commitment_cost, decay, seed=seed)
        self.trackers = [keras.metrics.Mean(name) for name in ("loss", "reconstruction_loss", "vq_loss", "perplexity")]
        self.quantizer.build((None, self.grid_size, self.grid_size, embedding_dim))
        self.built = True

    def get_config(self):
        return {**super().get_config(), **self.settings}

    def encode(self, images):
        """Images (B, S, S, 1) in [-1, 1] -> vectors (B, g, g, D), before quantisation."""
        return self.encoder(images)

    def quantize_vectors(self, vectors):
        """Vectors (B, g, g, D) -> the dict of `VectorQuantizer.call`."""
        return self.quantizer(vectors)

    def decode(self, vectors):
        """Quantised vectors (B, g, g, D) -> images (B, S, S, 1), clipped to [-1, 1]."""
        return tf.clip_by_value(self.decoder(vectors), -1.0, 1.0)

    def encode_to_codes(self, images):
        """Images (B, S, S, 1) in [-1, 1] -> codes int32 (B, g, g)."""
        return self.quantize_vectors(self.encode(images))["codes"]

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
        # Blacker than black is black: outputs are clipped, so below -1 there is nothing to mend on a black pixel.
        errors = tf.where((images <= -1) & (outputs < -1), 0.0, outputs - images)
        reconstruction_loss = _mean_square(errors) / self.data_variance
        return [reconstruction_loss + quantized["loss"], reconstruction_loss, quantized["loss"], quantized["perplexity"]]

    def _step(self, images, quantise):
        with tf.GradientTape() as tape:
            losses = self._batch_losses(images, training=True, quantise=quantise)
            scaled_loss = self.optimizer.scale_loss(losses[0])
        self.optimizer.apply(tape.gradient(scaled_loss, self.trainable_variables), self.trainable_variables)
        return losses

    def train_step(self, data):
        """One step on a batch of (images, positions); the positions are the prior's affair."""
        return self._track(self._step(data[0], quantise=True), data[0])

    def test_step(self, data):
        """The losses on a batch of (images, positions)."""
        return self._track(self._batch_losses(data[0], training=False), data[0])

    def _track(self, values, images):
        count = tf.shape(images)[0]  # the last batch of a split may be short, and a replica's part of it empty
        for tracker, value in zip(self.trackers, values):
            tracker.update_state(tf.where(count > 0, value, 0.0), count)
        return {tracker.name: tracker.result() for tracker in self.trackers}

    @property
    def metrics(self):
        return self.trackers

    def start_codebook(self, batches, warmup_steps=60, fit_batches=8):
        """Trains as a plain autoencoder for a few steps, then starts the codebook at k-means centres of real vectors.

        A random codebook lets most codes die unused; one fitted to vectors that already mean something does not.

        Args:
            batches: iterable of (images, positions); `warmup_steps` of them train, then `fit_batches` (more, if the
                codebook needs more vectors) are encoded.
            warmup_steps: optimiser steps without quantisation.
            fit_batches: batches for k-means.

        Raises:
            FloatingPointError: if the encoder's outputs are no numbers after the warm-up.
        """
        batches = iter(batches)
        if warmup_steps:
            self.optimizer.build(self.trainable_variables)
            # On many devices each trains on the whole batch here; the mean of equal gradients is the gradient.
            step = tf.function(lambda images: self.distribute_strategy.run(self._step, args=(images, False)))
            for _ in range(warmup_steps):
                step(next(batches)[0])
        vectors = []
        while len(vectors) < fit_batches or sum(map(len, vectors)) < self.quantizer.num_embeddings:
            vectors.append(np.reshape(self.encode(next(batches)[0]), (-1, self.quantizer.embedding_dim)))
        vectors = np.concatenate(vectors).astype(np.float32)
        if not np.isfinite(vectors).all():
            raise FloatingPointError("the encoder's outputs are no numbers after the warm-up")
        self.quantizer.fit_codebook(vectors)


# PixelCNN prior -------------------------------------------------------------------------------------------------------


def _gate(x):
    """Halves the channels: ``tanh(a) sigmoid(b)``, [3] equation 2."""
    a, b = tf.split(x, 2, axis=-1)
    return tf.tanh(a) * tf.sigmoid(b)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedBlock(layers.Layer):
    """One layer of the gated PixelCNN: a vertical and a horizontal stack ([3] figure 2).

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
    row sees itself and those before ([5], the encoder of the upper context). It spans the grid where convolutions do not, so
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
    """The prior over codes: p(codes | position, slices below, person) as a product over the grid, row by row, left to right [3].

    Every code sees all codes before it: those of the rows above through an `AxialAttention` before every third block, those
    of its own row because the windows of the horizontal stack widen, 1, 2, 4 ... codes from block to block (needs at least
    log2 of the grid's side of them). Beside its place in the grid and its slice's position in the head it is told, if known:

    - the codes of the slices below, all over the grid: so a head is drawn slice by slice from the lowest up;
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
        steps_below: how far below each of the S slices in `below` lies; (1, 2) are the next one and the one under it.
        person_size: P, the length of the person vector.
    """

    def __init__(self, grid_size=32, num_embeddings=512, num_positions=32, num_filters=64, num_layers=8, kernel_size=3,
                 dropout=0.1, codebook_digest=None, steps_below=(1, 2), person_size=8, **kwargs):
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
        with _layers_of(self.dtype_policy):
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
        self.below_convs = [layers.Conv2D(num_filters, 3, padding="same", activation="relu"),
                            layers.Conv2D(num_filters, 3, padding="same")]
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
        for conv in self.below_convs:
            conv.build((None, None, None, self.num_filters))
        self.person_embedding.build((None, self.person_size))
        self.head.build((None, self.grid_size, self.grid_size, self.num_filters))
        shape = self.num_positions, PICTURE_SIDE, PICTURE_SIDE
        fixed = {"trainable": False, "initializer": "zeros"}
        self.mean_picture = self.add_weight(name="mean_picture", shape=shape, **fixed)
        self.components = self.add_weight(name="components", shape=(*shape, self.person_size), **fixed)
        self.quantiles = self.add_weight(name="quantiles", shape=(NUM_QUANTILES, self.person_size), **fixed)
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
        projected = codebook @ rng.normal(0, 0.3 / length ** 0.5, (length, self.num_filters))
        self.code_embedding.embeddings.assign(projected)
        kernel.assign(rng.normal(0, 1 / (length * kernel.shape[0]) ** 0.5, (kernel.shape[0], length)) @ codebook.T)
        for below in self.below_embeddings:
            below.embeddings.assign(np.pad(projected, [[0, 1], [0, 0]]))

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
        for conv in self.below_convs:
            known = conv(known)
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
        alone = {"codes": data["codes"], "positions": data["positions"]}
        for tracker, known in zip(self.trackers, (data, alone)):
            tracker.update_state(self._bits(known, training=False))
        return {tracker.name: tracker.result() for tracker in self.trackers}

    @property
    def metrics(self):
        return self.trackers

    def sample(self, positions, seed=0, temperature=1.0, batch_size=16):
        """Draws codes, exactly as the full network would, computing at each code only what is new.

        The vertical stack runs once per row, the horizontal stack once per code, on the last few features of each layer.
        Sample i gets its noise and its person from (`seed`, i), whatever the batch size; there is no slice below.

        Args:
            positions: int (N,), the slice position of each sample.
            seed: int; the same seed gives the same codes.
            temperature: 1 draws from the model, 0 takes the likeliest code each time.
            batch_size: samples drawn side by side.

        Returns:
            codes, int32 NumPy (N, g, g).
        """
        positions = np.asarray(positions, np.int32)
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_positions:
            raise ValueError(f"positions must lie in 0 to {self.num_positions - 1}, got {positions.min()} to {positions.max()}.")
        codes = np.zeros((len(positions), self.grid_size, self.grid_size), np.int32)
        for first in tqdm(range(0, len(positions), batch_size), "Sampling", unit=" batches", leave=False, disable=None):
            some = tf.constant(positions[first:first + batch_size])
            indices = tf.range(first, first + len(some))
            codes[first:first + len(some)] = self.compiled_sampler(
                some, self.gumbel_noise(seed, indices), tf.constant(temperature, tf.float32), self._none_below(len(some)),
                self.draw_persons(seed, indices))
        return codes

    def sample_heads(self, count, seed=0, temperature=1.0, batch_size=8):
        """Draws whole heads, slice by slice from the lowest up, each given its person and those below it as they were drawn.

        Head i gets its noise and its person from (`seed`, i), whatever the batch size.

        Args:
            count: N.
            seed: int; the same seed gives the same heads.
            temperature: as in `sample`.
            batch_size: heads drawn side by side.

        Returns:
            codes, int32 NumPy (N, num_positions, g, g).
        """
        heads = np.zeros((count, self.num_positions, self.grid_size, self.grid_size), np.int32)
        with tqdm(total=count * self.num_positions, desc="Sampling", unit=" slices", leave=False, disable=None) as progress:
            for first in range(0, count, batch_size):
                indices = tf.range(first, min(first + batch_size, count))
                for position, codes in enumerate(self._draw_heads(indices, seed, temperature, self.compiled_sampler)):
                    heads[first:first + len(indices), position] = codes
                    progress.update(len(indices))
        return heads

    def _draw_heads(self, indices, seed, temperature, sampler):
        """Yields the codes (B, g, g) of one position after the other."""
        person, drawn = self.draw_persons(seed, indices), []
        none = self._none_below(tf.shape(indices)[0])[:, 0]
        for position in range(self.num_positions):
            noise = self.gumbel_noise(seed, indices * self.num_positions + position)
            below = tf.stack([drawn[-step] if step <= position else none for step in self.steps_below], axis=1)
            drawn.append(sampler(tf.fill(tf.shape(indices), position), noise, tf.cast(temperature, tf.float32), below, person))
            yield drawn[-1]

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


# Files ----------------------------------------------------------------------------------------------------------------


def load_model(path, compile=True):
    """Loads a VQ-VAE or a PixelCNN from a .keras file, which runs no code that the file may hold.

    Args:
        path: the file.
        compile: whether to bring back the optimiser too.

    Raises:
        ValueError: if it is damaged, not of this repository, or would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # Keras reads weights by seeking, where Python (from 3.13 on) checks no sum
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        model = keras.models.load_model(path, compile=compile, safe_mode=True)
    except Exception as error:  # a file from a stranger may fail in any way
        reason = str(error).strip().splitlines() or [repr(error)]
        raise ValueError(f"{path} cannot be loaded ({reason[0][:200]})") from error
    if not isinstance(model, (VQVAE, PixelCNN)):
        raise ValueError(f"{path} cannot be loaded (it holds a {type(model).__name__})")
    return model


def export(vqvae, prior, folder):
    """Writes four TensorFlow SavedModels, which `tf.saved_model.load` opens without this repository.

    Each is called by the names of its inputs:

        encoder(images): float32 (B, S, S, 1) in [-1, 1] -> codes, int32 (B, g, g)
        decoder(codes): int32 (B, g, g) -> images, float32 (B, S, S, 1) in [-1, 1]
        sampler(positions, seed, temperature): int32 (B,), int32, float32 -> codes, int32 (B, g, g), those of `PixelCNN.sample`
        head_sampler(count, seed, temperature): int32, int32, float32 -> codes, int32 (count, num_positions, g, g), those of
            `PixelCNN.sample_heads`

    Args:
        vqvae: a `VQVAE`.
        prior: its `PixelCNN`.
        folder: where encoder/, decoder/, sampler/ and head_sampler/ go.
    """
    size, grid = vqvae.image_size, vqvae.grid_size

    def sample(positions, seed, temperature):
        indices = tf.range(tf.shape(positions)[0])
        return prior.sample_from_noise(positions, prior.gumbel_noise(seed, indices), temperature,
                                       person=prior.draw_persons(seed, indices))

    compiled = tf.function(prior.sample_from_noise)

    def sample_heads(count, seed, temperature):
        return tf.stack(list(prior._draw_heads(tf.range(count), seed, temperature, compiled)), axis=1)

    seed_and_temperature = [tf.TensorSpec((), tf.int32, "seed"), tf.TensorSpec((), tf.float32, "temperature")]
    parts = {
        "encoder": (vqvae, vqvae.encode_to_codes, [tf.TensorSpec((None, size, size, 1), tf.float32, "images")]),
        "decoder": (vqvae, vqvae.decode_codes, [tf.TensorSpec((None, grid, grid), tf.int32, "codes")]),
        "sampler": (prior, sample, [tf.TensorSpec((None,), tf.int32, "positions"), *seed_and_temperature]),
        "head_sampler": (prior, sample_heads, [tf.TensorSpec((), tf.int32, "count"), *seed_and_temperature])}
    for name, (model, function, signature) in parts.items():
        module = tf.Module()
        module.weights = [variable.value for variable in model.variables]
        module.__call__ = tf.function(function, input_signature=signature)
        tf.saved_model.save(module, f"{folder}/{name}", signatures=module.__call__.get_concrete_function())
