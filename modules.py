"""The networks and their files: vector quantiser, encoder, decoder, VQ-VAE; and `PixelCNN`, the prior over the codes.

Images are float32 (B, height, width, 1) in [-1, 1]; codes are int32 (B, height / downsample, width / downsample) in
[0, num_embeddings).

References:
    [1] van den Oord, Vinyals, Kavukcuoglu: Neural Discrete Representation Learning, 2017. https://arxiv.org/abs/1711.00937
    [2] Razavi, van den Oord, Vinyals: Generating Diverse High-Fidelity Images with VQ-VAE-2, 2019.
        https://arxiv.org/abs/1906.00446
    [3] Dhariwal et al.: Jukebox: A Generative Model for Music, 2020 (restart of dead codes, section 3.1).
        https://arxiv.org/abs/2005.00341
"""

import hashlib
import zipfile

import keras
from keras import layers
import numpy as np
from sklearn.cluster import MiniBatchKMeans
import tensorflow as tf

from support.devices import broadcast, Distributed, fill_if_empty, layers_of, PACKAGE, replica, sum_over_replicas
from prior import PixelCNN


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
        with layers_of(self.dtype_policy):
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
        return self._track(self._batch_losses(fill_if_empty(data[0]), training=False), data[0])

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
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise  # not the file's fault
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
