"""Reconstruction quality per bit: PatternFlow's VQ-VAE against ours, same images, same seconds.

    python benchmarks/reconstruction.py --data-dir DIR [--budget 240] [--rounds 12]

Each side trains from scratch in a process of its own, which waits while another is at work: they take turns,
`--rounds` times, until each has spent the budget, compilation and the start of the codebook included. After
each turn the SSIM of some test images says whether a side still climbs; in the end all of them are measured.
Images/s are compared turn by turn (benchmarks/common.py), but for the first, which compiles; the qualities
are those of one training each, whose spread over seeds is not measured.

PatternFlow's model trains by its own batches of 128; and by batches of 8 as ours does, for within the budget
its own are few steps.

Ours trains as train.py does: its settings, optimiser and start of the codebook. Only the length of the
learning rate's schedule is a number of steps, which a budget of seconds does not give: another model of the
same settings, thrown away, is timed before the budget begins.

Two rows that need no model, the mean training image and the blurred original, show what an SSIM means on a
picture that is mostly black. PatternFlow is shakes76/PatternFlow on GitHub. The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import contextlib
import math
import time

import keras
from keras import layers
import numpy as np
import tensorflow as tf

from benchmarks import common
import dataset
import modules
from support import cli, devices, metrics
from support.images import in_chunks, spread
import train

QUALITY = "ssim", "ssim_gaussian", "ssim_foreground", "psnr"
# Images per step of each side; PatternFlow's own are 128.
SIDES = {"ours": train.Settings.batch_size, "patternflow": 128, "patternflow_small_batches": 8}
WATCHED = 64  # test images that are looked at after each turn
STEPS_TO_TIME = 20  # of the model that is thrown away


class PatternFlowVQVAE(keras.Model):
    """PatternFlow's model: a 64x64 grid of 128 codes, trained by the codebook loss of 2017."""

    def __init__(self, data_variance):
        super().__init__()
        self.data_variance = data_variance
        self.encoder = keras.Sequential([
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(16, 1)])
        self.quantizer = modules.VectorQuantizer(128, 16, commitment_cost=0.25, decay=None)
        self.decoder = keras.Sequential([
            layers.Conv2DTranspose(64, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(32, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2DTranspose(1, 3, padding="same")])
        self.encode_to_codes(tf.zeros((1, 256, 256, 1)))
        start = keras.random.uniform((128, 16), -0.05, 0.05)  # Keras' uniform start, as there
        self.quantizer.embeddings.assign(start)

    def train_step(self, data):
        """One step on images in [-1, 0]."""
        with tf.GradientTape() as tape:
            quantized = self.quantizer(self.encoder(data), training=True)
            errors = self.decoder(quantized["quantized"]) - data
            loss = tf.reduce_mean(errors ** 2) / self.data_variance + quantized["loss"]
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}

    def encode_to_codes(self, images):
        """Images in [-1, 0] -> codes."""
        return self.quantizer(self.encoder(images))["codes"]

    def decode_codes(self, codes):
        """Codes -> images in [-1, 0]."""
        return tf.clip_by_value(self.decoder(tf.gather(self.quantizer.embeddings, codes)), -1.0, 0.0)


class Turns(keras.callbacks.Callback):
    """Trains for as many seconds as each of the parent's requests asks for, and ends when it asks for none.

    The first turn begins when this is made, so that building the model and what precedes `fit` count too.

    Args:
        batch_size: images per step.
        num_images: per epoch, whose last batch may be a short one; None: there are no short ones.
        look: what to answer of the model after each turn, off the clock: a function that returns a dict.
    """

    def __init__(self, batch_size, num_images, look):
        super().__init__()
        self.batch_size, self.num_images, self.look = batch_size, num_images, look
        self.requests = common.requests()
        self.steps = 0
        self._begin()

    def _begin(self):
        self.budget, self.start = next(self.requests), time.perf_counter()
        self.first_step = self.steps

    def _images(self, steps):
        """How many images so many steps take."""
        if self.num_images is None:
            return steps * self.batch_size
        epochs, rest = divmod(steps, math.ceil(self.num_images / self.batch_size))
        return epochs * self.num_images + rest * self.batch_size

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the clock; after the turn, waits for the next."""
        self.steps = int(self.model.optimizer.iterations)  # on a GPU, several steps may lie between two calls
        seconds = time.perf_counter() - self.start
        if seconds >= self.budget:
            images = self._images(self.steps) - self._images(self.first_step)
            common.answer({"seconds": seconds, "steps": self.steps - self.first_step, "images": images,
                           **self.look(self.model)})
            self._begin()
            self.model.stop_training = self.budget is None


def train_patternflow(split, batch_size, look):
    """Trains PatternFlow's model: Adam 1e-3, float images."""
    turns = Turns(batch_size, len(split.images), look)
    scaled = split.images[..., np.newaxis].astype(np.float32) / 255 - 1
    model = PatternFlowVQVAE(float(scaled.var()))
    model.compile(keras.optimizers.Adam(1e-3))
    model.fit(scaled, batch_size=batch_size, epochs=10 ** 6, verbose=0, callbacks=[turns])
    return model


def start_ours(split, total_steps):
    """Our model as train.py begins it, its learning rate laid over so many steps; and its batches."""
    stage = common.vqvae_stage(split, epochs=1)
    stage.steps_per_epoch = max(1, total_steps - train.Settings.autoencoder_steps)
    model = stage.begin()
    return model, stage.batches(model, "train", stage.batch_size, stage.run.seed)


def steps_within(split, seconds):
    """How many steps of ours fit into the seconds, its start included; a model is timed and thrown away."""
    start = time.perf_counter()
    model, batches = start_ours(split, 10 ** 6)
    model.fit(batches, steps_per_epoch=1, verbose=0, shuffle=False)  # compiles
    begun = time.perf_counter()
    model.fit(batches, steps_per_epoch=STEPS_TO_TIME, verbose=0, shuffle=False)
    ended = time.perf_counter()
    steps = round((seconds - (begun - start)) * STEPS_TO_TIME / (ended - begun))
    return train.Settings.autoencoder_steps + max(1, steps)


def train_ours(split, total_steps, look):
    """Trains our model as train.py does."""
    keras.utils.set_random_seed(0)
    turns = Turns(SIDES["ours"], None, look)
    model, batches = start_ours(split, total_steps)
    model.fit(batches, steps_per_epoch=10 ** 6, verbose=0, shuffle=False, callbacks=[turns])
    return model


def reconstruct(model, images, scale):
    """(codes, reconstructions in [0, 1]) of uint8 (N, H, W) by a model of images ``pixels * scale - 1``."""
    codes = in_chunks(lambda chunk: model.encode_to_codes(np.float32(chunk[..., np.newaxis]) * scale - 1),
                      images)
    return codes, in_chunks(
        lambda chunk: np.float64((model.decode_codes(chunk).numpy()[..., 0] + 1) / scale / 255), codes)


def measure(model, images, scale):
    """Metrics of uint8 (N, H, W) under a model: see `reconstruct`."""
    codes, reconstructions = reconstruct(model, images, scale)
    use = metrics.code_metrics(codes, model.quantizer.num_embeddings)
    grid = codes[0].size
    return {**metrics.reconstruction_metrics(images / 255, reconstructions), **use,
            "num_embeddings": model.quantizer.num_embeddings,
            "bits_fixed": grid * math.log2(model.quantizer.num_embeddings),
            "bits_entropy": grid * use["code_entropy"]}


def run_side(name, splits, budget):
    """The process of a side: trains in turns, then answers once more, with what the test images show."""
    keras.utils.set_random_seed(0)
    next(common.requests())
    images, scale = splits["test"].images, 1 / 127.5 if name == "ours" else 1 / 255
    watched = images[spread(len(images), WATCHED)]

    def look(model):
        _, reconstructions = reconstruct(model, watched, scale)
        return {"ssim": float(np.mean([metrics.ssim(*pair) for pair in zip(watched / 255, reconstructions)]))}

    if name == "ours":
        devices.prepare()
        total_steps = steps_within(splits["train"], budget)
    common.answer("loaded")
    if name == "ours":
        model = train_ours(splits["train"], total_steps, look)
    else:
        model = train_patternflow(splits["train"], SIDES[name], look)
    common.answer({**measure(model, images, scale), "batch_size": SIDES[name]})


def train_in_turns(sides, budget, rounds):
    """Lets the sides train in turn until each has had its budget.

    Returns:
        (a row of metrics, seconds, steps, images/s and SSIM after each turn for each; each turn's images/s
        but for the first's).
    """
    spent, turns_to_come = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, rounds)

    def turn(name):
        row = sides[name].ask(max((budget - spent[name]) / turns_to_come[name], 0))
        spent[name], turns_to_come[name] = spent[name] + row["seconds"], turns_to_come[name] - 1
        return row

    for side in sides.values():
        side.ask()  # loads; from here on one side alone is at work
    turns = common.interleave({name: lambda name=name: turn(name) for name in sides}, rounds)
    rows, speeds = {}, {}
    for name, rows_of_turns in turns.items():
        steps, images = (sum(row[key] for row in rows_of_turns) for key in ("steps", "images"))
        rows[name] = {**sides[name].ask(), "seconds": spent[name], "steps": steps,
                      "ssim_after_turns": [row["ssim"] for row in rows_of_turns],
                      "images_per_second": images / spent[name]}
        speeds[name] = [row["images"] / row["seconds"] for row in rows_of_turns[1:]]
    return rows, speeds


@cli.exit_on_user_error
def main():
    """Prints the table, then JSON."""
    parser = common.argument_parser(__doc__, default_rounds=12)
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--budget", type=cli.number(float, 1), default=240, metavar="SECONDS",
                        help="(default: 240)")
    parser.add_argument("--limit", type=cli.number(int, 1), metavar="N",
                        help="people of each split (default: all)")
    parser.add_argument("--side", choices=SIDES, help="train one, in this process (the script calls itself)")
    arguments = parser.parse_args()
    data_dir, _ = dataset.find_data(arguments.data_dir)
    splits = dataset.load_splits(data_dir, ["train", "test"], arguments.limit)
    if arguments.side:
        return run_side(arguments.side, splits, arguments.budget)
    limit = ["--limit", arguments.limit] if arguments.limit else []
    command = "--data-dir", data_dir, "--budget", arguments.budget, *limit
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(common.Side(__file__, *command, "--side", name)) for name in SIDES}
        rows, speeds = train_in_turns(sides, arguments.budget, arguments.rounds)
    rows |= metrics.baselines(splits["train"].images, splits["test"].images)
    columns = *QUALITY, "perplexity", "bits_fixed", "bits_entropy", "images_per_second", "steps"
    print(f"{'':26}" + "".join(f"{column:>19}" for column in columns))
    for name, row in rows.items():
        cells = (f"{row[column]:.4g}" if column in row else "-" for column in columns)
        print(f"{name:26}" + "".join(f"{cell:>19}" for cell in cells))
    ratios = {name: common.ratio(speeds["ours"], speeds[name]) for name in SIDES if name != "ours"}
    for name, summary in ratios.items():
        print(f"images/s, ours / {name}: {common.in_words(summary)}")
    common.finish("reconstruction", arguments, {
        **rows, "images_per_second_ratios": ratios,
        "bits_ratio": rows["ours"]["bits_fixed"] / rows["patternflow"]["bits_fixed"],
        "settings": {"budget": arguments.budget, "rounds": arguments.rounds,
                     "people": splits["train"].num_people, "num_images": len(splits["test"].images)}})


if __name__ == "__main__":
    main()
