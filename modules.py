"""The networks: vector quantiser, encoder, decoder, VQ-VAE; and PixelCNN, the prior over its codes.

Images are float32 (B, S, S, 1) in [-1, 1]; codes are int32 (B, g, g), g = S / downsample, of num_embeddings.

References:
    [1] van den Oord et al.: Neural Discrete Representation Learning, 2017. https://arxiv.org/abs/1711.00937
    [2] Razavi et al.: Generating Diverse High-Fidelity Images with VQ-VAE-2. https://arxiv.org/abs/1906.00446
    [3] Dhariwal et al.: Jukebox, 2020 (restart of dead codes, section 3.1). https://arxiv.org/abs/2005.00341
    [4] van den Oord et al.: Image Generation with PixelCNN Decoders, 2016. https://arxiv.org/abs/1606.05328
    [5] Ho et al.: Axial Attention in Multidimensional Transformers, 2019. https://arxiv.org/abs/1912.12180
"""

import contextlib
import hashlib
import math

import keras
from keras import layers
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from support import devices, people, runs, sampler
from support.cli import UserError
from support.images import in_chunks, neighbours
from support.pixelcnn_layers import AxialAttention, GatedBlock

ATTENTION_EVERY = 3  # every third block of the PixelCNN has an attention before it
# The weight of 1 - SSIM in the loss of a decoder that sees neighbours. On the real slices SSIM became 0.9770,
# PSNR 34.15 dB; without SSIM in the loss, and at half the learning rate, they were 0.9759 and 34.20 dB.
SSIM_WEIGHT = 0.5
if (keras.backend.backend(), keras.config.image_data_format()) != ("tensorflow", "channels_last"):
    raise ImportError("The networks need Keras with backend tensorflow and image_data_format channels_last; "
                      "set both in keras.json, or before this import.")


class Network(devices.KerasFit, keras.Model):
    """What both networks share. Each is saved by its `settings`, a dict of its constructor's arguments."""

    def get_config(self):
        return {**super().get_config(), **self.settings}

    @contextlib.contextmanager
    def full_float32(self):
        """Computes in float32 inside it: not in the bfloat16 of mixed precision, and without TensorFloat-32.

        A rounded vector may have another nearest code, a rounded logit another code to sample; but the same
        image or seed has to give the same codes everywhere. What a `tf.function` traces inside it is free of
        bfloat16 for good; TensorFloat-32, a switch of the process, has to be off whenever it runs."""
        policies = [(layer, layer.dtype_policy) for layer in self._flatten_layers()]
        is_rounding = tf.config.experimental.tensor_float_32_execution_enabled()
        try:
            tf.config.experimental.enable_tensor_float_32_execution(False)
            for layer, _ in policies:
                layer.dtype_policy = "float32"
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(is_rounding)
            for layer, policy in policies:
                layer.dtype_policy = policy

    def minimise(self, losses):
        """One optimiser step on the mean of `losses()["loss"]`; returns the dict `losses()`."""
        with tf.GradientTape() as tape:
            values = losses()
            scaled = self.optimizer.scale_loss(tf.reduce_mean(values["loss"]))
        self.optimizer.apply(tape.gradient(scaled, self.trainable_variables), self.trainable_variables)
        return values

    def track(self, values, weights=None):
        """Updates the trackers that `values` names; returns what they say now, a dict."""
        for tracker in self.trackers:
            if tracker.name in values:
                tracker.update_state(values[tracker.name], weights)
        return self._get_metrics_result_or_logs(values)

    def _get_metrics_result_or_logs(self, logs):
        # An epoch's logs. Keras' own takes the last step's, of one device, unless steps log every tracker.
        return {name: value for name, value in self.get_metrics_result().items() if name in logs}


class VectorQuantizer(layers.Layer):
    """Replaces each vector by the nearest row of a codebook, with a straight-through gradient.

    The codebook is an exponential moving average (EMA) of its vectors ([1] appendix A.1, [2] section 2.1):

        N_k <- decay N_k + (1 - decay) n_k
        m_k <- decay m_k + (1 - decay) sum of the z assigned to k;    e_k = m_k / N_k

    with n_k the number of vectors z assigned to code k in the batch. It stays float32 in mixed precision.

    Args:
        num_embeddings, embedding_dim: K and D of the codebook, (K, D).
        commitment_cost: beta, the weight of ``mean((z - sg[e])^2)`` in the loss.
        decay: of the EMA, in (0, 1); None trains by the gradient of ``mean((sg[z] - e)^2)`` ([1] equation 3).
        restart_below: codes whose N_k is below this share of the mean restart at vectors of the batch [3].
        seed: of its start and restarts."""

    def __init__(self, num_embeddings=512, embedding_dim=16, commitment_cost=0.25, decay=0.99,
                 restart_below=0.3, seed=0, dtype="float32", **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.num_embeddings, self.embedding_dim, self.seed = num_embeddings, embedding_dim, seed
        self.commitment_cost, self.decay, self.restart_below = commitment_cost, decay, restart_below

    def build(self, input_shape):
        shape, limit = (self.num_embeddings, self.embedding_dim), 1 / self.num_embeddings
        uniform = keras.initializers.RandomUniform(-limit, limit, seed=self.seed)
        # What the EMA assigns is the same on every replica of a `tf.distribute` strategy.
        ema = {} if self.decay is None else {"trainable": False, "aggregation": "only_first_replica"}
        self.embeddings = self.add_weight(shape, uniform, name="embeddings", **ema)
        if self.decay is not None:
            self.counts = self.add_weight(shape[:1], "ones", name="counts", **ema)
            self.sums = self.add_weight(shape, "zeros", name="sums", **ema)
            self.sums.assign(self.embeddings)

    def call(self, inputs, training=False):
        """Quantises vectors, float (..., D); with `training`, moves the codebook too.

        Returns a dict: `quantized`, float32 (..., D), with the straight-through gradient; `codes`, int32
        (...); `loss`, a scalar; `perplexity`, 2 to the entropy of their use in this batch, from 1 to K."""
        vectors = tf.reshape(inputs, (-1, self.embedding_dim))
        codes = tf.argmin(self.distances(vectors), axis=-1, output_type=tf.int32)
        # Not bincount, which XLA does not compile.
        counts = tf.math.unsorted_segment_sum(tf.ones_like(codes, tf.float32), codes, self.num_embeddings)
        counts = devices.sum_over_replicas(counts)
        quantized = tf.gather(self.embeddings, codes)
        loss = self.commitment_cost * tf.reduce_mean(tf.square(vectors - tf.stop_gradient(quantized)))
        if self.decay is None:
            loss += tf.reduce_mean(tf.square(tf.stop_gradient(vectors) - quantized))
        elif training:
            self._update(tf.stop_gradient(vectors), codes, counts)
        quantized = vectors + tf.stop_gradient(quantized - vectors)
        use = tf.math.divide_no_nan(counts, tf.reduce_sum(counts))
        return {"quantized": tf.reshape(quantized, tf.shape(inputs)), "loss": loss,
                "codes": tf.reshape(codes, tf.shape(inputs)[:-1]),
                "perplexity": tf.exp(-tf.reduce_sum(tf.math.xlogy(use, use)))}

    def distances(self, vectors):
        """|z - e|^2 - |z|^2 of vectors float32 (..., D) to all codes, (..., K); |z|^2 is the same for all."""
        products = tf.matmul(vectors, self.embeddings, transpose_b=True)
        return tf.reduce_sum(self.embeddings ** 2, 1) - 2 * products

    def _update(self, vectors, codes, batch_counts):
        """Moves the codebook by vectors (N, D) of codes (N,); the counts (K,) are those of all replicas."""
        sums = devices.sum_over_replicas(tf.math.unsorted_segment_sum(vectors, codes, self.num_embeddings))
        counts = self.decay * self.counts + (1 - self.decay) * batch_counts
        sums = self.decay * self.sums + (1 - self.decay) * sums
        mean_count = tf.reduce_mean(counts)
        dead = counts < self.restart_below * mean_count
        counts = tf.where(dead, mean_count, counts)
        # The batch's counts seed the draw: so replicas agree, and a resumed run needs no saved state.
        seed = tf.reduce_sum(tf.cast(batch_counts, tf.int32) * tf.range(1, self.num_embeddings + 1))
        size, replicas = tf.shape(vectors)[0], tf.distribute.get_strategy().num_replicas_in_sync
        drawn = tf.random.stateless_uniform(counts.shape, [self.seed, seed], 0, size * replicas, tf.int32)
        is_here = drawn // size == devices.replica()
        restarts = tf.where(is_here[:, tf.newaxis], tf.gather(vectors, drawn % size), 0.0)
        restarts = devices.sum_over_replicas(restarts) * mean_count
        sums = tf.where(dead[:, tf.newaxis], restarts, sums)
        self.counts.assign(counts)
        self.sums.assign(sums)
        # The floor matters only without restarts, where an unused code's count decays towards 0 / 0.
        self.embeddings.assign(sums / tf.maximum(counts, 1e-8)[:, tf.newaxis])

    def start(self, centers, counts):
        """Starts the codebook at the centers (K, D) of clusters with counts (K,) of vectors."""
        counts = devices.broadcast(counts.clip(1))
        self.embeddings.assign(devices.broadcast(centers))
        if self.decay is not None:
            self.counts.assign(counts / counts.mean())
            self.sums.assign(self.embeddings * self.counts[:, tf.newaxis])

    def digest(self):
        return hashlib.sha256(np.ascontiguousarray(self.embeddings, np.float32)).hexdigest()


def _residual_block(x, width, inner_width=None):
    """Two 3x3 convolutions beside an identity: (B, H, W, width) -> (B, H, W, width)."""
    y = layers.Activation("relu")(x)
    y = layers.Conv2D(inner_width or width, 3, padding="same", activation="relu")(y)
    # Starts as the identity, so that depth costs no early training.
    y = layers.Conv2D(width, 3, padding="same", kernel_initializer="zeros")(y)
    return layers.Add()([x, y])


def _stem_stride(image_size, margin):
    """The stride that takes what the margin leaves of an image to a grid of S / 4."""
    stride, rest = divmod(4 * (image_size - 2 * margin), image_size)
    if rest or stride < 1 or image_size % 8:
        raise ValueError(f"margin must be 0 to 3 whole eighths of image_size; got {margin}, {image_size}.")
    return stride


def build_encoder(image_size=256, embedding_dim=16, downsample=8, margin=0, width=64, num_residual_blocks=2):
    """Images -> vectors: float (B, S, S, 1) -> (B, S / downsample, S / downsample, embedding_dim).

    The first convolution takes the image, less `margin` pixels on each side, to a grid of S / 4: work at full
    resolution is what costs. The margin, the empty border that all pictures share, gets no vectors."""
    stride = _stem_stride(image_size, margin)
    images = keras.Input((image_size, image_size, 1), name="images")
    x = layers.Cropping2D(margin)(images)
    x = layers.Conv2D(width // 2, 2 * stride, strides=stride, padding="same", activation="relu")(x)
    kernel, stride = (4, 2) if downsample == 8 else (3, 1)
    x = layers.Conv2D(width, kernel, strides=stride, padding="same")(x)
    for _ in range(num_residual_blocks):
        x = _residual_block(x, width)
    x = layers.Activation("relu")(x)
    return keras.Model(images, layers.Conv2D(embedding_dim, 1)(x), name="encoder")


def build_decoder(image_size=256, embedding_dim=16, downsample=8, margin=0, width=64, num_residual_blocks=2):
    """Vectors -> images: `build_encoder` mirrored. The margin is black (-1); other values are not clipped."""
    stride, grid = _stem_stride(image_size, margin), image_size // downsample
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
    # Black to 0 and back, so that padding with 0 is padding with black.
    x = layers.Rescaling(1.0, 1.0, dtype="float32")(x)
    x = layers.ZeroPadding2D(margin, dtype="float32")(x)
    return keras.Model(vectors, layers.Rescaling(1.0, -1.0, dtype="float32")(x), name="decoder")


def _mean_ssim(images, outputs, side=7):
    """`metrics.ssim`, data range 1, of images (B, S, S, 1) in [-1, 1] and outputs of `_paint`: a scalar."""
    # In windows at every fourth place. `tf.image.ssim`, at every place, takes three times as long: 35 ms.
    x, y = (images + 1) / 2, (tf.clip_by_value(outputs, -1.0, 1.0) + 1) / 2
    means = tf.nn.avg_pool2d(tf.concat([x, y, x * x, y * y, x * y], axis=-1), side, 4, "VALID")
    x, y, xx, yy, xy = tf.unstack(means, axis=-1)
    unbiased = side ** 2 / (side ** 2 - 1)
    luminance = (2 * x * y + 0.01 ** 2) / (x * x + y * y + 0.01 ** 2)
    variances, covariance = unbiased * (xx - x * x + yy - y * y), unbiased * (xy - x * y)
    return tf.reduce_mean(luminance * (2 * covariance + 0.03 ** 2) / (variances + 0.03 ** 2))


@keras.saving.register_keras_serializable(devices.PACKAGE)
class VQVAE(Network):
    """Compresses images to a grid of codes and back [1].

    The total loss is ``reconstruction_loss + vq_loss``: the mean squared error over `data_variance` (1
    is what painting every pixel in the mean colour would cost), plus the quantiser's loss. That of a decoder
    which sees neighbours is ``reconstruction_loss + SSIM_WEIGHT * (1 - SSIM)``.

    Args:
        image_size, margin: side of the square images, and their black border without codes, in pixels.
        num_embeddings, embedding_dim, commitment_cost, decay, seed: see `VectorQuantizer`.
        downsample: pixels per code along each axis, 4 or 8.
        width, num_residual_blocks: channels and number of the blocks on the grid of codes.
        data_variance: variance of the training pixels in [-1, 1].
        sees_neighbours: whether the decoder is given the codes of the slices right below and above, too: more
            of a slice is known without a bit more. Then training moves the decoder alone."""

    def __init__(self, image_size=256, num_embeddings=512, embedding_dim=16, downsample=8, margin=0,
                 width=64, num_residual_blocks=2, commitment_cost=0.25, decay=0.99, data_variance=1.0, seed=0,
                 sees_neighbours=False, **kwargs):
        super().__init__(**kwargs)
        shape = {"image_size": image_size, "embedding_dim": embedding_dim, "downsample": downsample,
                 "margin": margin, "width": width, "num_residual_blocks": num_residual_blocks}
        self.settings = {**shape, "num_embeddings": num_embeddings, "commitment_cost": commitment_cost,
                         "decay": decay, "data_variance": data_variance, "seed": seed,
                         "sees_neighbours": sees_neighbours}
        self.image_size, self.grid_size, self.margin = image_size, image_size // downsample, margin
        self.data_variance, self.sees_neighbours = data_variance, sees_neighbours
        with devices.layers_of(self.dtype_policy):
            self.encoder = build_encoder(**shape)
            length = 3 * embedding_dim if sees_neighbours else embedding_dim
            self.decoder = build_decoder(**{**shape, "embedding_dim": length})
        self.quantizer = VectorQuantizer(num_embeddings, embedding_dim, commitment_cost, decay, seed=seed)
        self.trackers = [keras.metrics.Mean(name)
                         for name in ("loss", "reconstruction_loss", "vq_loss", "perplexity")]
        self.quantizer.build((None, self.grid_size, self.grid_size, embedding_dim))
        if sees_neighbours:
            self.encoder.trainable = self.quantizer.trainable = False
        self.built = True

    def encode(self, images):
        """Images, floats (B, S, S, 1) -> vectors (B, g, g, D), not quantised."""
        images = tf.convert_to_tensor(images)
        if not images.dtype.is_floating:
            raise ValueError(f"images must be floats in [-1, 1], not {images.dtype.name}: dataset.normalise.")
        return self.encoder(images)

    def encode_to_codes(self, images):
        """Images (B, S, S, 1) -> codes int32 (B, g, g), in `full_float32`."""
        with self.full_float32():
            return self.quantizer(self.encode(images))["codes"]

    def decode(self, *vectors):
        """Quantised vectors, each (B, g, g, D), -> images (B, S, S, 1) in [-1, 1]; see `decode_codes`."""
        return tf.clip_by_value(self._paint(*vectors), -1.0, 1.0)

    def _paint(self, vectors, below=None, above=None):
        """As `decode`, but not clipped."""
        if self.sees_neighbours:
            below, above = (vectors if other is None else other for other in (below, above))
            vectors = tf.concat([below, vectors, above], axis=-1)
        return self.decoder(vectors)

    def decode_codes(self, codes, below=None, above=None):
        """Codes int (B, g, g) in [0, K) -> images (B, S, S, 1) in [-1, 1].

        A decoder that `sees_neighbours` takes the codes of the slices right below and above, too. Without
        them, or where there are none, a slice's own stand in for them."""
        return self.decode(*(None if part is None else self._look_up(part) for part in (codes, below, above)))

    def _look_up(self, codes):
        return tf.gather(self.quantizer.embeddings, tf.cast(codes, tf.int32))

    def decode_head(self, codes, positions=None):
        """Codes int (N, g, g) of the slices of one head -> images, NumPy (N, S, S, 1) in [-1, 1].

        Slices are neighbours if their positions, ascending (N,), differ by 1; all are, if none are given."""
        codes, count = np.asarray(codes), len(codes)
        around = neighbours(np.zeros(count), np.arange(count) if positions is None else positions)
        rows = np.stack([np.arange(count), *around], axis=1)
        return in_chunks(lambda rows: self.decode_codes(*codes[rows.T]), rows, size=16)

    def copy_from(self, vqvae):
        """Takes the weights of a trained VQ-VAE; what `sees_neighbours` adds starts at zero.

        From one that sees neighbours to one that does not: it paints as that does without them."""
        for variable, trained in zip(self.weights, vqvae.weights, strict=True):
            if variable.shape != trained.shape:  # the decoder's first kernel, (3, 3, 3 D, width) of the one
                side = tf.zeros_like(trained)
                trained = (tf.concat([side, trained, side], axis=2) if self.sees_neighbours else
                           tf.add_n(tf.split(trained, 3, axis=2)))
            variable.assign(trained)

    def call(self, images):
        return self.decode(self.quantizer(self.encode(images))["quantized"])

    def batch_losses(self, images, codes, training=False):
        """The `trackers`' values for a batch as `train_step` takes it, a dict of scalars."""
        if self.sees_neighbours:
            outputs = self._paint(*tf.unstack(self._look_up(codes), axis=1))
            error, dissimilarity = self._error(images, outputs), 1 - _mean_ssim(images, outputs)
            return {"loss": error + SSIM_WEIGHT * dissimilarity, "reconstruction_loss": error}
        result = self.quantizer(self.encoder(images), training=training)
        error = self._error(images, self._paint(result["quantized"]))
        return {"loss": error + result["loss"], "reconstruction_loss": error, "vq_loss": result["loss"],
                "perplexity": result["perplexity"]}

    def _error(self, images, outputs):
        """The reconstruction loss, a scalar, of images (B, S, S, 1) and outputs of `_paint`."""
        # Outputs are clipped to -1, so values below -1 on a black pixel are no error.
        errors = tf.where((images <= -1) & (outputs < -1), 0.0, outputs - images)
        return tf.reduce_mean(tf.square(errors)) / self.data_variance

    def autoencoder_step(self, images):
        """One optimiser step on images (B, S, S, 1) as a plain autoencoder, without the codebook."""
        # It is returned because TensorFlow fuses other operations, with other last bits, if nobody reads it.
        return self.minimise(lambda: {"loss": self._error(images, self._paint(self.encoder(images)))})

    def train_step(self, data):
        """One step on (images, positions); or (images, codes of them, below and above), if it sees those."""
        losses = self.minimise(lambda: self.batch_losses(*data, training=True))
        return self.track(losses, tf.shape(data[0])[0])

    def test_step(self, data):
        """The losses on a batch of `train_step`, of which a replica's part may be empty."""
        return self.track(self.batch_losses(*map(devices.fill_if_empty, data)), tf.shape(data[0])[0])


@keras.saving.register_keras_serializable(devices.PACKAGE)
class PixelCNN(Network):
    """The prior over codes: p(codes | position, context, person) as a product over the grid, row by row [4].

    Every code depends on all codes before it: on the rows above through an `AxialAttention` before every
    third block, on its own row because the windows of the horizontal stack widen, 1, 2, 4 ... codes from
    block to block. It is conditioned on its cell of the grid; on its slice's position; on the context, the
    codes of the slices below, all over the grid: so a head is sampled from below; and on the person, what is
    the same throughout one head (see `support.people`), who acts on every layer, and as a picture.

    Args:
        grid_size, num_positions: side g of the square grid of codes; slices per head.
        num_embeddings: K, the number of codes; in the context it stands for "no slice".
        num_filters, num_layers: channels F; number of `GatedBlock`s, at least log2 of g.
        kernel_size, dropout: of each block; the kernel size is odd.
        codebook_digest: `VectorQuantizer.digest` of the codebook whose codes these are, or None.
        steps_below: how far below each of the S slices of the context lies.
        person_size: P, the length of the person vector.
        slice_positions: those that training people have; None for all. Others cannot be sampled.
        knows_noise: whether it can be told how large a share of the context's codes is wrong.
        context_noise: the share that it is told of in sampling a head, so that it repeats less of the slices
            below.
        embedding_dim: D, length of the vectors of `movement_scores`, which `train.start_embeddings` sets;
            steps_below begins with 1, 2 then. None: without them, as runs of version 1.0.0 are."""

    def __init__(self, grid_size=32, num_embeddings=512, num_positions=32, num_filters=64, num_layers=8,
                 kernel_size=3, dropout=0.1, codebook_digest=None, steps_below=(1, 2, 4, 8), person_size=24,
                 slice_positions=None, knows_noise=False, context_noise=0.0, embedding_dim=None, **kwargs):
        super().__init__(**kwargs)
        self.grid_size, self.num_positions = grid_size, num_positions
        self.num_embeddings, self.num_filters = num_embeddings, num_filters
        self.steps_below, self.person_size = tuple(steps_below), person_size
        self.context_noise = context_noise
        self.slice_positions = tuple(range(num_positions) if slice_positions is None else slice_positions)
        self.settings = {
            "grid_size": grid_size, "num_embeddings": num_embeddings, "num_positions": num_positions,
            "num_filters": num_filters, "num_layers": num_layers, "kernel_size": kernel_size,
            "dropout": dropout, "codebook_digest": codebook_digest, "steps_below": list(steps_below),
            "person_size": person_size, "slice_positions": list(self.slice_positions),
            "knows_noise": knows_noise, "context_noise": context_noise, "embedding_dim": embedding_dim}
        with devices.layers_of(self.dtype_policy):
            self._make_layers(num_layers, kernel_size, dropout)
        self.picture_to_grid = people.picture_to_grid(grid_size)
        names = "bits_per_code", "bits_per_code_no_context", "bits_per_code_alone"
        self.trackers = [keras.metrics.Mean(name) for name in names]
        self.built = True
        self({"codes": tf.zeros((1, grid_size, grid_size), tf.int32), "positions": tf.zeros(1, tf.int32)})

    def _make_layers(self, num_layers, kernel_size, dropout):
        width = self.num_filters
        self.code_embedding = layers.Embedding(self.num_embeddings, width)
        self.context_embeddings = [layers.Embedding(self.num_embeddings + 1, width) for _ in self.steps_below]
        self.picture_conv = layers.Conv2D(width, 3, padding="same")
        # Nothing of the context is hidden: its blocks may look all around, once per slice, not once per code.
        x = around = keras.Input((self.grid_size, self.grid_size, width))
        for _ in range(3):
            x = _residual_block(x, width, width // 2)
        self.context_blocks = keras.Model(around, x)
        self.position_embedding = layers.Embedding(self.num_positions, width)
        self.person_embedding = layers.Dense(width, use_bias=False)
        # No bias: for a context without noise it adds nothing.
        self.noise_embedding = layers.Dense(width, use_bias=False) if self.settings["knows_noise"] else None
        self.place_embedding = layers.Embedding(self.grid_size ** 2, width)  # a place is a cell of the grid
        cycle = max(1, (self.grid_size - 1).bit_length())
        self.blocks = [GatedBlock(width, kernel_size, 2 ** (i % cycle), dropout) for i in range(num_layers)]
        self.attentions = [None if number % ATTENTION_EVERY else AxialAttention(width)
                           for number in range(1, num_layers + 1)]
        # The first one float32: a Sequential rounds its inputs to what the first layer was made with.
        self.logits = keras.Sequential([
            layers.Activation("relu", dtype="float32"), layers.Dense(2 * width, activation="relu"),
            layers.Dense(self.num_embeddings, dtype="float32", name="logits")])
        size, picture = self.person_size, (self.num_positions, people.PICTURE_SIDE, people.PICTURE_SIDE)
        # Not cast under mixed precision: the sampler, outside of `call`, takes them whole.
        fixed = {"trainable": False, "autocast": False}
        self.mean_picture = self.add_weight(picture, "zeros", name="mean_picture", **fixed)
        self.components = self.add_weight((*picture, size), "zeros", name="components", **fixed)
        self.quantiles = self.add_weight((people.NUM_QUANTILES, size), "zeros", name="quantiles", **fixed)
        self.person_shift = self.add_weight((size,), "zeros", name="person_shift", **fixed)
        self.person_scale = self.add_weight((size,), "ones", name="person_scale", **fixed)
        if length := self.settings["embedding_dim"]:
            vectors = self.num_embeddings, length
            self.code_vectors = self.add_weight(vectors, "zeros", name="code_vectors", **fixed)
            self.movement = self.add_weight((), "zeros", name="movement", **fixed)

    def condition_features(self, positions, context=None, person=None, noise_share=None):
        """What the slice's own codes do not change: a condition (B, 1, 1, F), grid features (B, g, g, F)."""
        count = tf.shape(positions)[0]
        context = self.no_context(count) if context is None else context
        person = tf.zeros((count, self.person_size)) if person is None else tf.cast(person, tf.float32)
        condition = self.position_embedding(positions) + self.person_embedding(person)
        if self.noise_embedding:
            share = tf.zeros(count) if noise_share is None else noise_share
            condition += self.noise_embedding(share[:, tf.newaxis])
        cells = tf.reshape(tf.range(self.grid_size ** 2), (1, self.grid_size, self.grid_size))
        pictures = people.pictures_around(positions, person, self.mean_picture, self.components)
        pictures = tf.einsum("yh,bdhw,xw->byxd", self.picture_to_grid, pictures, self.picture_to_grid)
        around = self.picture_conv(pictures)
        for index, embedding in enumerate(self.context_embeddings):
            around += embedding(context[:, index])
        return condition[:, tf.newaxis, tf.newaxis], self.place_embedding(cells) + self.context_blocks(around)

    def no_context(self, count):
        """The context of slices by themselves, int32 (count, S, g, g)."""
        return tf.fill((count, len(self.steps_below), self.grid_size, self.grid_size), self.num_embeddings)

    def fit_people(self, pictures):
        fitted = people.fit(pictures, self.person_size)
        for weight, value in zip((self.mean_picture, self.components, self.quantiles), fitted):
            weight.assign(value)

    def encode_people(self, pictures):
        return people.encode(pictures, self.mean_picture.numpy(), self.components.numpy())

    def copy_from(self, prior):
        """Takes what another prior has learned; the space of persons, another one, stays."""
        for variable, trained in zip(self.trainable_variables, prior.trainable_variables, strict=True):
            variable.assign(trained)
        # The same person has other numbers here: of each of these the kernel gives what it gave there.
        old, new = (model.components.numpy().reshape(-1, self.person_size) for model in (prior, self))
        numbers, *_ = np.linalg.lstsq(old, new, rcond=1e-5)  # `encode_people` would round and limit them
        self.person_embedding.kernel.assign(numbers.T @ prior.person_embedding.kernel)

    def call(self, inputs, training=False):
        """The logits of every code given those before it, float32 (B, g, g, K).

        The inputs are a dict of `codes`, int (B, g, g); `positions`, int (B,); and, unless unknown,
        `context`, int (B, S, g, g), the codes of the slices below for each of `steps_below`, all K where none
        is; `person`, float (B, P), zeros for the average person; `noise_share`, float (B,), the share of the
        context's codes that are wrong."""
        condition, grid = self.condition_features(
            *(inputs.get(name) for name in ("positions", "context", "person", "noise_share")))
        embedded = self.code_embedding(inputs["codes"])
        # Shifted by one, so that a row starts from the one above and a code from the one to its left.
        vertical = grid + tf.pad(embedded[:, :-1], [[0, 0], [1, 0], [0, 0], [0, 0]])
        horizontal = grid + tf.pad(embedded[:, :, :-1], [[0, 0], [0, 0], [1, 0], [0, 0]])
        causal = tf.linalg.band_part(tf.ones((self.grid_size, self.grid_size), tf.bool), -1, 0)
        no_rows = tf.zeros((tf.shape(vertical)[0], 0, self.grid_size, 2 * self.num_filters), vertical.dtype)
        for block, attention in zip(self.blocks, self.attentions):
            if attention:
                vertical, _ = attention(vertical, no_rows, causal)
            up, left = block.rows_up, block.codes_left
            window = tf.pad(vertical, [[0, 0], [up, 0], [up, up], [0, 0]])
            vertical, from_vertical = block.vertical(vertical, window, condition)
            window = tf.pad(horizontal, [[0, 0], [0, 0], [left, 0], [0, 0]])
            horizontal = block.horizontal(horizontal, window, from_vertical, condition, training)
        logits = self.logits(horizontal + vertical)
        changes = None if training else self.changes_below(inputs.get("context"))  # in training it is 0
        return logits if changes is None else logits + self.movement * self.movement_scores(changes)

    def changes_below(self, context):
        """How the vectors of the context's codes change from two slices below to one below, (B, g, g, D).

        0 where one of these slices is missing; None without a context, or if this prior has no `movement`."""
        if context is None or not self.settings["embedding_dim"]:
            return None
        below, further = context[:, 0], context[:, 1]
        is_there = (below < self.num_embeddings) & (further < self.num_embeddings)
        # Where a slice is missing both get the same code: no change.
        near, far = (tf.gather(self.code_vectors, tf.where(is_there, codes, 0)) for codes in (below, further))
        return near - far

    def movement_scores(self, changes):
        """How far each code goes on as the slices below change, (..., D): products with its vector, (..., K).

        `movement` times this is added to the logits: a number fitted to validation people after training, for
        the network learns too little of it."""
        return tf.matmul(changes, self.code_vectors, transpose_b=True)

    def distribution(self, codes, positions, context=None, person=None, noise_share=None, training=False):
        """The codes' Categorical distribution (B, g, g), in `full_float32` unless `training`; see `call`."""
        inputs = {"codes": codes, "positions": positions, "context": context, "person": person,
                  "noise_share": noise_share}
        with contextlib.nullcontext() if training else self.full_float32():
            return tfp.distributions.Categorical(logits=self(inputs, training=training))

    def log_prob(self, codes, *conditions, **options):
        """log p(codes | position, context, person) in nats, float32 (B,), by arguments of `distribution`."""
        return tf.reduce_sum(self.distribution(codes, *conditions, **options).log_prob(codes), axis=(1, 2))

    def _bits_per_code(self, batch, training=False):
        """The code length of each slice of a batch, float32 (B,)."""
        return -self.log_prob(**batch, training=training) / (math.log(2) * self.grid_size ** 2)

    def train_step(self, data):
        """One step on a batch as `call` takes it; logs the code length with context and without."""
        bits = self.minimise(lambda: {"loss": self._bits_per_code(data, training=True)})["loss"]
        below = data["context"][:, :, 0, 0] < self.num_embeddings
        has_context = tf.cast(tf.reduce_any(below, axis=1), tf.float32)
        return {**self.track({"bits_per_code": bits}, has_context),
                **self.track({"bits_per_code_no_context": bits}, 1 - has_context)}

    def test_step(self, data):
        """Logs the code length of a batch: given context and person; and alone, given neither."""
        count = tf.shape(data["codes"])[0]
        data = {name: devices.fill_if_empty(values) for name, values in data.items()}
        bits = self._bits_per_code(data)[:count]
        alone = self._bits_per_code({name: data[name] for name in ("codes", "positions")})[:count]
        return self.track({"bits_per_code": bits, "bits_per_code_alone": alone})

    sample = sampler.sample_slices
    sample_heads = sampler.sample_heads


def load_model(path, compile=True):
    """Loads a model, with its optimiser if `compile`; UserError if that fails."""
    return runs.read_model_file(path, lambda: keras.models.load_model(path, compile=compile))


def check_match(vqvae, prior):
    """Raises ValueError if a prior was trained on the codes of another codebook than the VQ-VAE's."""
    if prior.settings["codebook_digest"] != vqvae.quantizer.digest():
        raise ValueError("it was trained on the codes of another codebook")


def load_models(run):
    """The VQ-VAE and the PixelCNN of a `runs.Run`; UserError if one is damaged, or they do not match."""
    try:
        vqvae, prior = (load_model(run.model_path(name), compile=False) for name in ("vqvae", "pixelcnn"))
        if not isinstance(vqvae, VQVAE) or not isinstance(prior, PixelCNN):
            raise ValueError("vqvae.keras or pixelcnn.keras holds another model")
        check_match(vqvae, prior)
    except ValueError as error:
        raise UserError(f"The run in {run.folder} cannot be used: {error}; put back the files that belong "
                        "together, or train it again.") from error
    return vqvae, prior
