"""Training speed and memory of both stages: ours against the plain keras-io way, at the same batch size.

    python benchmarks/training.py [--steps 30] [--rounds 5]

The keras-io way is that of its VQ-VAE example, which PatternFlow took over: float images as one
NumPy array into `fit`, codes looked up by one-hot vectors and a matrix product, a codebook trained by
gradient; then one-hot codes into a PixelCNN of masked 7x7 and 3x3 convolutions. It is run twice: with its own
networks, and (`same networks`) with ours. Ours is run twice too: as train.py does, and without the
deterministic operations that it asks for on a CPU.

Each side is a process of its own, which trains one epoch of `--steps` steps when it is asked to; the first,
with its compilation, does not count. The sides take turns (benchmarks/common.py). Memory is the peak above
what imports took.

The networks differ, so multiply-adds per image are counted, and compared with the machine's peak: the speed
of a product of two float32 matrices of 2048x2048, which is measured in turn with the sides. Those of a
training step are counted in its own graph: the forward pass, the gradient of the weights, and the gradient of
a layer's inputs where something needs it. What optimiser and metrics do is not counted.

The last line is JSON; `vqvae_speedup` and `pixelcnn_speedup` are ratios of images/s, ours over keras-io with
its own networks.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import math
import statistics
import time

import keras
from keras import layers
import numpy as np
import tensorflow as tf

from benchmarks import common
import dataset
import modules
from support import cli, devices, volumes
import train

BATCH = train.Settings.batch_size  # of both stages
NUM_CODES = train.Settings.num_embeddings
IMAGE_SIZE, MARGIN = 256, 32  # pixels, as real slices have
MATRIX_SIDE = 2048
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
            loss = self.batch_loss(images)
        variables = self.vqvae.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def batch_loss(self, images):
        """The loss of a batch of images, a scalar."""
        return tf.reduce_mean((images - self.vqvae(images)) ** 2) / self.variance + sum(self.vqvae.losses)


class MaskedConv2D(layers.Conv2D):
    """keras-io's PixelConvLayer: a kernel that is zero from its middle (A) or right behind it (B) on."""

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


def keras_io_vqvae(own_networks, variance):
    """keras-io's trainer around its own networks (as PatternFlow has them) or around ours."""
    if own_networks:
        encoder = keras.Sequential([
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(16, 1)])
        decoder = keras.Sequential([
            layers.Conv2DTranspose(64, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(32, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(1, 3, padding="same")])
        codes = 128
    else:
        encoder = modules.build_encoder(IMAGE_SIZE, margin=MARGIN)
        decoder = modules.build_decoder(IMAGE_SIZE, margin=MARGIN)
        codes = NUM_CODES
    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 1))
    networks = keras.Model(images, decoder(OneHotQuantizer(codes, 16)(encoder(images))))
    return KerasIoTrainer(networks, variance)


def keras_io_pixelcnn(grid):
    """keras-io's PixelCNN: a masked 7x7 convolution of one-hot codes, then blocks of 3x3 and 1x1."""
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


def multiply_adds(function):
    """Millions of multiply-adds, in convolutions and products of matrices, that a function's result takes."""
    graph = tf.function(function, autograph=False).get_concrete_function().graph
    # Only what the result depends on. TensorFlow writes down the gradient of a network's inputs as well, and
    # leaves it out when it runs.
    needed, waiting = set(), [output.op for output in graph.outputs]
    while waiting:
        operation = waiting.pop()
        if operation not in needed:
            needed.add(operation)
            waiting += [tensor.op for tensor in operation.inputs]
    return sum(map(_multiply_adds_of, needed)) / 1e6


def _multiply_adds_of(operation):
    kind, inputs, result = operation.type, operation.inputs, operation.outputs
    if kind in ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"):
        kernel = result[0] if kind == "Conv2DBackpropFilter" else inputs[1]
        convolved = result[0] if kind == "Conv2D" else inputs[2]
        return math.prod(convolved.shape) * math.prod(kernel.shape[:3])
    if kind == "MatMul":
        return math.prod(result[0].shape) * inputs[0].shape[0 if operation.get_attr("transpose_a") else 1]
    if kind == "BatchMatMulV2":
        return math.prod(result[0].shape) * inputs[0].shape[-2 if operation.get_attr("adj_x") else -1]
    if kind == "Einsum" and len(inputs) == 2:
        first, second = operation.get_attr("equation").decode().split("->")[0].split(",")
        return math.prod(dict(zip(first + second, [*inputs[0].shape, *inputs[1].shape])).values())
    return 0


def gradients(loss, variables):
    """`loss()` and its gradients: what a training step computes before the optimiser's turn."""
    with tf.GradientTape() as tape:
        value = tf.reduce_mean(loss())
    return [value, *(gradient for gradient in tape.gradient(value, variables) if gradient is not None)]


class Clock(keras.callbacks.Callback):
    """Keeps the seconds of the last epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        """Starts."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stops."""
        self.seconds = time.perf_counter() - self.start


def prepare_vqvae(side, split):
    """A side of stage 1: its model, what `fit` is given, forward pass and loss of a batch as functions."""
    if side.startswith("ours"):
        steps = len(split.images) // BATCH
        model = common.vqvae_stage(split).build()
        data = {"x": dataset.image_batches(split, BATCH, 0), "steps_per_epoch": steps, "shuffle": False}
        batch = next(iter(data["x"]))
        return model, data, lambda: model(batch[0]), lambda: model.batch_losses(*batch, training=True)["loss"]
    images = split.images[..., np.newaxis].astype(np.float32) / 255 - 0.5
    model = keras_io_vqvae(side == "keras-io", float(images.var()))
    model.compile(keras.optimizers.Adam(1e-3))
    batch = tf.constant(images[:BATCH])
    return (model, {"x": images, "batch_size": BATCH},
            lambda: model.vqvae(batch), lambda: model.batch_loss(batch))


def prepare_pixelcnn(side, split):
    """The same for stage 2."""
    steps = len(split.images) // BATCH
    _, model = common.build_both(common.vqvae_stage(split))
    coded = common.random_codes(split, model)
    codes, positions = coded.codes[0].astype(np.int32), coded.positions
    if side == "keras-io":
        model = keras_io_pixelcnn(model.grid_size)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss)
        batch = tf.constant(codes[:BATCH])
        return (model, {"x": codes, "y": codes, "batch_size": BATCH},
                lambda: model(batch), lambda: loss(batch, model(batch)))
    if side.startswith("ours"):
        data = {"x": dataset.code_batches(coded, BATCH, seed=0), "steps_per_epoch": steps, "shuffle": False}
        batch = next(iter(data["x"]))
    else:
        embedding = model.code_embedding
        embedding.call = lambda codes: tf.matmul(tf.one_hot(codes, NUM_CODES), embedding.embeddings)
        batch = {"codes": codes, "positions": positions, "context": model.no_context(len(codes)).numpy()}
        data = {"x": batch, "batch_size": BATCH}
        batch = {name: tf.constant(values[:BATCH]) for name, values in batch.items()}
    return (model, data, lambda: model(batch),
            lambda: -model.log_prob(**batch, training=True))


def measure(stage, side, steps):
    """Answers every request with an epoch's images/s, in a process of its own."""
    before = common.memory("VmHWM")
    keras.utils.set_random_seed(0)
    if side == "ours":
        devices.prepare()  # which makes the operations deterministic
    count = steps * BATCH
    split = common.noise_split(-(-count // volumes.SLAB_SLICES), IMAGE_SIZE, MARGIN).take(slice(count))
    prepare = prepare_vqvae if stage == "vqvae" else prepare_pixelcnn
    model, data, forward, loss = prepare(side, split)
    million = multiply_adds(forward) / BATCH
    of_step = multiply_adds(lambda: gradients(loss, model.trainable_variables)) / BATCH
    clock = Clock()
    for _ in common.requests():
        model.fit(**data, verbose=0, callbacks=[clock])
        common.answer({"images_per_second": count / clock.seconds, "multiply_adds_million": million,
                       "forward_passes_per_step": of_step / million,
                       "peak_gigabytes": (common.memory("VmHWM") - before) / 1e9})


def measure_machine():
    """Answers every request with the million multiply-adds/s of a large matrix product: the best of five."""
    matrix = tf.random.normal((MATRIX_SIDE, MATRIX_SIDE))
    product = tf.function(tf.matmul)
    for _ in common.requests():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            product(matrix, matrix)[0, 0].numpy()
            seconds.append(time.perf_counter() - start)
        common.answer(MATRIX_SIDE ** 3 / min(seconds) / 1e6)


def compare(stage, steps, rounds):
    """Measures the sides of a stage in turn, and the machine.

    Returns:
        (a row for each side, the ratios of ours to each other side, the machine's multiply-adds per second in
        millions).
    """
    sides = {side: ("--steps", steps, "--measure", stage, side) for side in SIDES}
    measured = common.ask_in_turn(__file__, {**sides, "machine": ("--measure", "machine", "peak")}, rounds)
    machine = measured.pop("machine")
    speeds = {name: [row["images_per_second"] for row in rows] for name, rows in measured.items()}
    rows = {name: summarise(speeds[name], rows[-1], machine) for name, rows in measured.items()}
    ratios = {name: common.ratio(speeds["ours"], speeds[name]) for name in SIDES[1:]}
    return rows, ratios, common.median_and_range(machine)


def summarise(speeds, last, machine):
    """A side's row: its images/s, and the share of the machine's peak that it reached, in the median."""
    million = last["multiply_adds_million"] * last["forward_passes_per_step"]
    shares = [million * speed / peak for speed, peak in zip(speeds, machine)]
    return {**last, "images_per_second": common.median_and_range(speeds),
            "share_of_peak": statistics.median(shares)}


@cli.exit_on_user_error
def main():
    """Prints a row per stage and side, then JSON."""
    parser = common.argument_parser(__doc__, default_rounds=5)
    parser.add_argument("--steps", type=cli.number(int, 1), default=30, metavar="N",
                        help="per epoch (default: 30)")
    parser.add_argument("--measure", nargs=2, help="one stage and side, here (the script calls itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        stage, side = arguments.measure
        return measure_machine() if stage == "machine" else measure(stage, side, arguments.steps)
    rows, ratios, machine = {}, {}, {}
    for stage in STAGES:
        rows[stage], ratios[stage], machine[stage] = compare(stage, arguments.steps, arguments.rounds)
        peak = 2 * machine[stage]["median"] / 1e3
        print(f"The machine's peak beside {stage}: {peak:.0f} GFLOP/s (float32 matrix product)")
        for side, row in rows[stage].items():
            print("{:9} {:25}{:8.1f} images/s,{multiply_adds_million:8,.0f} M multiply-adds per image,"
                  "{forward_passes_per_step:5.2f} forward passes per step,{share_of_peak:5.0%} of the peak,"
                  "{peak_gigabytes:6.2f} GB"
                  .format(stage, side, row["images_per_second"]["median"], **row))
        for side, summary in ratios[stage].items():
            print(f"{stage:9} ours / {side}: {common.in_words(summary)}", flush=True)
    common.finish("training", arguments, {
        "vqvae_speedup": ratios["vqvae"]["keras-io"], "pixelcnn_speedup": ratios["pixelcnn"]["keras-io"],
        "ratios": ratios,
        "machine_multiply_adds_million_per_second": machine,
        "settings": {"batch_size": BATCH, "steps": arguments.steps, "rounds": arguments.rounds},
        "rows": rows})


if __name__ == "__main__":
    main()
