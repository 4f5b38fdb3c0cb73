"""Training speed and memory of both stages: ours against the plain keras-io way, at the same batch size.

    python benchmarks/training.py [--steps 30] [--rounds 5]

The keras-io way is that of its VQ-VAE example, which the followed project took over: float images as one NumPy array into
`fit`, codes looked up by one-hot vectors and a matrix product, a codebook trained by gradient; then one-hot codes into a
PixelCNN of masked 7x7 and 3x3 convolutions. It is run twice: with its own networks, and (`same networks`) with ours. Ours
is run twice too: as train.py does, and without the deterministic operations that it asks for on a CPU. Multiply-adds per
image are counted and printed beside the speeds, for the networks differ.

Each side is a process of its own, which trains one epoch of `--steps` steps when it is asked to; the first, with its
compilation, does not count. The sides take turns (benchmarks/common.py). Memory is the peak above what imports took. For
ours the bare step on one batch is timed too, right after each epoch: the ratio says what feeding costs.

The last line is JSON; `vqvae_speedup` and `pixelcnn_speedup` are ratios of images/s, ours over keras-io with its own
networks.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import cli  # first: sets what TensorFlow, Keras and matplotlib read when imported

import contextlib
import time

import keras
from keras import layers
import numpy as np
import tensorflow as tf

from benchmarks import common
import dataset
import modules
import train
from support import devices, template

BATCH = 8  # the default of both stages
NUM_CODES = 512
SIDES = "ours", "ours, not deterministic", "keras-io", "keras-io, same networks"
STAGES = "vqvae", "pixelcnn"


class OneHotQuantizer(layers.Layer):
    """The quantiser of keras-io's example."""

    def __init__(self, num_embeddings, embedding_dim):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.embeddings = self.add_weight(shape=(embedding_dim, num_embeddings), initializer="random_uniform")

    def call(self, inputs):
        """Vectors -> quantised vectors; adds the losses of 2017."""
        flat = tf.reshape(inputs, (-1, self.embedding_dim))
        distances = (tf.reduce_sum(flat ** 2, 1, keepdims=True) + tf.reduce_sum(self.embeddings ** 2, 0)
                     - 2 * tf.matmul(flat, self.embeddings))
        one_hot = tf.one_hot(tf.argmin(distances, 1), self.num_embeddings)
        quantized = tf.reshape(tf.matmul(one_hot, self.embeddings, transpose_b=True), tf.shape(inputs))
        self.add_loss(0.25 * tf.reduce_mean((tf.stop_gradient(quantized) - inputs) ** 2)
                      + tf.reduce_mean((quantized - tf.stop_gradient(inputs)) ** 2))
        return inputs + tf.stop_gradient(quantized - inputs)


class KerasIoTrainer(keras.Model):
    """The trainer of keras-io's VQ-VAE example."""

    def __init__(self, vqvae, variance):
        super().__init__()
        self.vqvae, self.variance = vqvae, variance
        self.loss_tracker = keras.metrics.Mean("loss")

    def train_step(self, images):
        """One step on a batch of images."""
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((images - self.vqvae(images)) ** 2) / self.variance + sum(self.vqvae.losses)
        self.optimizer.apply_gradients(zip(tape.gradient(loss, self.vqvae.trainable_variables), self.vqvae.trainable_variables))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


class MaskedConv2D(layers.Conv2D):
    """keras-io's PixelConvLayer: a convolution whose kernel is zero from the middle (A) or right behind it (B) on."""

    def __init__(self, mask, filters, kernel_size, **kwargs):
        super().__init__(filters, kernel_size, padding="same", **kwargs)
        self.mask_type = mask

    def build(self, input_shape):
        super().build(input_shape)
        height, width = self.kernel_size
        self.mask = np.zeros((height, width, 1, 1), np.float32)
        self.mask[:height // 2] = 1
        self.mask[height // 2, :width // 2 + (self.mask_type == "B")] = 1

    def convolution_op(self, inputs, kernel):
        """Convolves with what the mask leaves."""
        return super().convolution_op(inputs, kernel * self.mask)


def keras_io_vqvae(own_networks, size, variance):
    """keras-io's trainer around its own networks (as the followed project has them) or around ours."""
    if own_networks:
        encoder = keras.Sequential([layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
                                    layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"), layers.Conv2D(16, 1)])
        decoder = keras.Sequential([layers.Conv2DTranspose(64, 3, strides=2, padding="same", activation="relu"),
                                    layers.Conv2DTranspose(32, 3, strides=2, padding="same", activation="relu"),
                                    layers.Conv2DTranspose(1, 3, padding="same")])
        codes = 128
    else:
        encoder, decoder, codes = modules.build_encoder(margin=size // 8), modules.build_decoder(margin=size // 8), NUM_CODES
    images = keras.Input((size, size, 1))
    networks = keras.Model(images, decoder(OneHotQuantizer(codes, 16)(encoder(images))))
    return KerasIoTrainer(networks, variance)


def keras_io_pixelcnn(grid):
    """keras-io's PixelCNN: a masked 7x7 convolution of one-hot codes, two residual blocks, two masked 1x1 convolutions."""
    codes = keras.Input((grid, grid), dtype="int32")
    x = layers.Lambda(lambda codes: tf.one_hot(codes, NUM_CODES), output_shape=(grid, grid, NUM_CODES))(codes)
    x = MaskedConv2D("A", 128, 7, activation="relu")(x)
    for _ in range(2):
        y = layers.Conv2D(128, 1, activation="relu")(x)
        y = MaskedConv2D("B", 64, 3, activation="relu")(y)
        x = layers.Add()([x, layers.Conv2D(128, 1, activation="relu")(y)])
    for _ in range(2):
        x = MaskedConv2D("B", 128, 1, activation="relu")(x)
    return keras.Model(codes, layers.Conv2D(NUM_CODES, 1)(x))


def multiply_adds(forward, *inputs):
    """Millions of multiply-adds of a forward pass, as TensorFlow's profiler counts them in its graph."""
    graph = tf.function(forward).get_concrete_function(*inputs).graph
    profiler = tf.compat.v1.profiler
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation()).with_empty_output().build()
    return profiler.profile(graph, options=options).total_float_ops / 2e6


class Clock(keras.callbacks.Callback):
    """Keeps the seconds of the last epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        """Starts."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stops."""
        self.seconds = time.perf_counter() - self.start


def prepare(stage, side, split, codes):
    """The model, what `fit` is given, one batch for the bare step (ours alone), and the multiply-adds per image."""
    size, grid = split.images.shape[1], codes.shape[1]
    if stage == "vqvae":
        image = tf.zeros((1, size, size, 1))
        if side.startswith("ours"):
            model = modules.VQVAE(**train.model_settings(split, train.DEFAULTS))
            model.compile(train.adam(1e-3, 10 ** 6))
            batches = dataset.training_batches(split, BATCH, 0)
            return model, {"x": batches}, next(iter(batches)), multiply_adds(model, image)
        images = split.images[..., np.newaxis].astype(np.float32) / 255 - 0.5
        model = keras_io_vqvae(side == "keras-io", size, float(images.var()))
        model.compile(keras.optimizers.Adam(1e-3))
        return model, {"x": images, "batch_size": BATCH}, None, multiply_adds(model.vqvae, image)
    if side == "keras-io":
        model = keras_io_pixelcnn(grid)
        model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        count = multiply_adds(model, tf.zeros((1, grid, grid), tf.int32))
        return model, {"x": codes, "y": codes, "batch_size": BATCH}, None, count
    model = modules.PixelCNN(grid, NUM_CODES)
    if not side.startswith("ours"):
        embedding = model.code_embedding
        embedding.call = lambda codes: tf.matmul(tf.one_hot(codes, NUM_CODES), embedding.embeddings)
    model.compile(train.adam(1e-3, 10 ** 6))
    count = multiply_adds(model, {"codes": tf.zeros((1, grid, grid), tf.int32), "positions": tf.zeros(1, tf.int32)})
    below, persons = dataset.head_context(split, model, 0)
    batches = dataset.code_batches(codes[np.newaxis], split.positions, below, persons[np.newaxis], NUM_CODES, BATCH, 0)
    if side.startswith("ours"):
        return model, {"x": batches}, next(iter(batches)), count
    return model, {"x": {"codes": codes, "positions": split.positions}, "batch_size": BATCH}, None, count


def measure(stage, side, steps):
    """Answers every request with an epoch's images/s, in a process of its own."""
    before = common.peak()
    keras.utils.set_random_seed(0)
    if side == "ours":
        devices.prepare()  # which makes the operations deterministic
    split = dataset.load_splits(template.make_demo_cohort(), ["train"])["train"]  # 20 people, 640 images
    count = min(steps * BATCH, len(split.images) // BATCH * BATCH)
    split = split.take(slice(count))
    codes = np.random.default_rng(0).integers(0, NUM_CODES, (count, 32, 32), np.int32)
    model, data, batch, million = prepare(stage, side, split, codes)
    clock = Clock()
    epochs = {"steps_per_epoch": count // BATCH} if side.startswith("ours") else {}
    bare_step = tf.function(model.train_step)
    for _ in common.requests():
        model.fit(**data, **epochs, verbose=0, shuffle=not side.startswith("ours"), callbacks=[clock])
        row = {"images_per_second": count / clock.seconds, "multiply_adds_million": million,
               "peak_gigabytes": (common.peak() - before) / 1e9}
        if side == "ours":
            start = time.perf_counter()
            for _ in range(count // BATCH):
                result = bare_step(batch)
            next(iter(result.values())).numpy()
            row["bare_images_per_second"] = count / (time.perf_counter() - start)
        common.answer(row)


def compare(stage, steps, rounds):
    """Measures the sides of a stage in turn; returns their rows and the ratios of ours to each."""
    with contextlib.ExitStack() as stack:
        sides = {side: stack.enter_context(common.Side(__file__, "--steps", steps, "--measure", stage, side)) for side in SIDES}
        for side in sides.values():
            side.ask()  # compiles
        measured = common.interleave({name: side.ask for name, side in sides.items()}, rounds)
    measured["ours, bare step"] = [{**row, "images_per_second": row["bare_images_per_second"]} for row in measured["ours"]]
    speeds = {name: [row["images_per_second"] for row in rows] for name, rows in measured.items()}
    rows = {name: {"images_per_second": common.spread(speeds[name]), "multiply_adds_million": rows[-1]["multiply_adds_million"],
                   "peak_gigabytes": rows[-1]["peak_gigabytes"]} for name, rows in measured.items()}
    return rows, {name: common.ratio(speeds["ours"], speeds[name]) for name in rows if name != "ours"}


@cli.exit_on_input_error
def main():
    """Prints a row per stage and side, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--steps", type=cli.number(int, 1, 81), default=30, metavar="N",
                        help="per epoch, at most 80 (default: 30)")
    common.add_rounds(parser, 5)
    parser.add_argument("--measure", nargs=2, help="one stage and side, in this process (the script calls itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(*arguments.measure, arguments.steps)
    rows, ratios = {}, {}
    for stage in STAGES:
        rows[stage], ratios[stage] = compare(stage, arguments.steps, arguments.rounds)
        for side, row in rows[stage].items():
            print("{:9} {:25}{:8.1f} images/s,{multiply_adds_million:8,.0f} M multiply-adds per image,{peak_gigabytes:6.2f} GB"
                  .format(stage, side, row["images_per_second"]["median"], **row))
        for side, summary in ratios[stage].items():
            print(f"{stage:9} ours / {side}: {common.say(summary)}", flush=True)
    common.finish("training", arguments, {
        "vqvae_speedup": ratios["vqvae"]["keras-io"], "pixelcnn_speedup": ratios["pixelcnn"]["keras-io"], "ratios": ratios,
        "settings": {"batch_size": BATCH, "steps": arguments.steps, "rounds": arguments.rounds}, "rows": rows})


if __name__ == "__main__":
    main()
