"""Reconstruction quality per bit: the followed project's VQ-VAE against ours, on the same images, for the same seconds.

    python benchmarks/reconstruction.py --data-dir DIR [--budget 240] [--rounds 12]

Each side trains from scratch in a process of its own, which waits while the other is at work: they take turns, `--rounds`
times, until each has spent the budget, compilation and the start of the codebook included. Both are then measured on all
test images. Images/s are compared turn by turn (benchmarks/common.py), but for the first, which compiles; the qualities
are those of one training each, whose spread over seeds is not measured.

Ours trains as train.py does: its settings, its Adam and its start of the codebook. Only the length of the learning rate's
schedule is a number of steps, which a budget of seconds does not give: another model of the same settings, thrown away,
is timed before the budget begins.

Two rows that need no model, the mean training image and the blurred original, show what an SSIM means on a picture that is
mostly black. The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import cli  # first: sets what TensorFlow, Keras and matplotlib read when imported

import contextlib
import math
import time

import keras
from keras import layers
import numpy as np
from scipy import ndimage
import tensorflow as tf

from benchmarks import common
import dataset
from support import devices, metrics
import modules
import train

QUALITY = "ssim", "ssim_gaussian", "ssim_foreground", "psnr"
FOLLOWED_BATCH_SIZE = 128
TIMED_STEPS = 20  # of the model that is thrown away


class FollowedVQVAE(keras.Model):
    """The followed project's model: a 64x64 grid of 128 codes, trained by the codebook loss of 2017."""

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
        self.quantizer.embeddings.assign(keras.random.uniform((128, 16), -0.05, 0.05))  # Keras' uniform start, as there

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
        num_images: per epoch, if its last batch is a short one.
    """

    def __init__(self, batch_size, num_images=math.inf):
        super().__init__()
        self.batch_size, self.num_images = batch_size, num_images
        self.asked = common.requests()
        self._begin()

    def _begin(self):
        self.wanted, self.start = next(self.asked), time.perf_counter()
        self.steps = self.images = 0

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the clock; after the turn, waits for the next."""
        self.steps += 1
        self.images += min(self.batch_size, self.num_images - batch * self.batch_size)
        seconds = time.perf_counter() - self.start
        if seconds >= self.wanted:
            common.answer({"seconds": seconds, "steps": self.steps, "images": self.images})
            self._begin()
            self.model.stop_training = self.wanted is None


def train_followed(split):
    """Trains the followed project's model: Adam 1e-3, batches of 128 float images."""
    turns = Turns(FOLLOWED_BATCH_SIZE, len(split.images))
    scaled = split.images[..., np.newaxis].astype(np.float32) / 255 - 1
    model = FollowedVQVAE(float(scaled.var()))
    model.compile(keras.optimizers.Adam(1e-3))
    model.fit(scaled, batch_size=FOLLOWED_BATCH_SIZE, epochs=10 ** 6, verbose=0, callbacks=[turns])
    return model, FOLLOWED_BATCH_SIZE


def start_ours(split, total_steps):
    """Our model as train.py begins it, its codebook started; and its batches."""
    settings = train.DEFAULTS
    batch_size = min(settings["batch_size"], len(split.images))
    model = modules.VQVAE(**train.model_settings(split, settings))
    model.compile(train.adam(settings["learning_rate"], total_steps))
    model.start_codebook(dataset.training_batches(split, batch_size, settings["seed"] + 1), train.CONSTANTS["warmup_steps"])
    return model, dataset.training_batches(split, batch_size, settings["seed"])


def steps_within(split, seconds):
    """How many steps of ours fit into the seconds, its start included: a model that is thrown away is timed."""
    start = time.perf_counter()
    model, batches = start_ours(split, 10 ** 6)
    model.fit(batches, steps_per_epoch=1, verbose=0, shuffle=False)  # compiles
    begun = time.perf_counter()
    model.fit(batches, steps_per_epoch=TIMED_STEPS, verbose=0, shuffle=False)
    ended = time.perf_counter()
    return train.CONSTANTS["warmup_steps"] + max(1, round((seconds - (begun - start)) * TIMED_STEPS / (ended - begun)))


def train_ours(split, total_steps):
    """Trains our model as train.py does, its learning rate's schedule laid over the steps."""
    keras.utils.set_random_seed(0)
    batch_size = min(train.DEFAULTS["batch_size"], len(split.images))
    turns = Turns(batch_size)
    model, batches = start_ours(split, total_steps)
    turns.steps = train.CONSTANTS["warmup_steps"]  # the start's steps are steps
    turns.images = turns.steps * batch_size
    model.fit(batches, steps_per_epoch=10 ** 6, verbose=0, shuffle=False, callbacks=[turns])
    return model, batch_size


def measure(model, images, scale, shift):
    """Metrics of uint8 (N, H, W) under a model whose images are ``pixels * scale + shift``."""
    codes, decoded = [], []
    for some in np.array_split(images, -(-len(images) // 32)):
        codes.append(model.encode_to_codes(some[..., np.newaxis].astype(np.float32) * scale + shift).numpy())
        decoded.append((model.decode_codes(codes[-1]).numpy()[..., 0] - shift) / scale / 255)
    codes = np.concatenate(codes)
    used = metrics.code_metrics(codes, model.quantizer.num_embeddings)
    grid = codes[0].size
    return {**metrics.reconstruction_metrics(images / 255, np.concatenate(decoded).astype(np.float64)), **used,
            "bits_fixed": grid * math.log2(model.quantizer.num_embeddings), "bits_entropy": grid * used["code_entropy"]}


def run_side(name, splits, budget):
    """The process of a side: trains in turns, then answers once more, with what the test images show."""
    keras.utils.set_random_seed(0)
    next(common.requests())
    if name == "ours":
        devices.prepare()
        total_steps = steps_within(splits["train"], budget)
    common.answer("loaded")
    if name == "ours":
        (model, batch_size), scale = train_ours(splits["train"], total_steps), 1 / 127.5
    else:
        (model, batch_size), scale = train_followed(splits["train"]), 1 / 255
    common.answer({**measure(model, splits["test"].images, scale, -1), "batch_size": batch_size})


def train_in_turns(sides, budget, rounds):
    """Lets the sides train in turn until each has had its budget.

    Returns:
        (a row of metrics, seconds, steps and images/s for each; each turn's images/s but for the first's).
    """
    used, left = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, rounds)

    def turn(name):
        done = sides[name].ask(max((budget - used[name]) / left[name], 0))
        used[name], left[name] = used[name] + done["seconds"], left[name] - 1
        return done

    for side in sides.values():
        side.ask()  # loads; from here on one side alone is at work
    turns = common.interleave({name: lambda name=name: turn(name) for name in sides}, rounds)
    rows, speeds = {}, {}
    for name, done in turns.items():
        steps, images = (sum(one[key] for one in done) for key in ("steps", "images"))
        rows[name] = {**sides[name].ask(), "seconds": used[name], "steps": steps,
                      "images_per_second": images / used[name]}
        speeds[name] = [one["images"] / one["seconds"] for one in done[1:]]
    return rows, speeds


@cli.exit_on_input_error
def main():
    """Prints the table, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--budget", type=cli.number(float, 1), default=240, metavar="SECONDS", help="(default: 240)")
    parser.add_argument("--limit", type=cli.number(int, 1), metavar="N", help="people of each split (default: all)")
    common.add_rounds(parser, 12)
    parser.add_argument("--side", choices=("ours", "followed"), help="train one, in this process (the script calls itself)")
    arguments = parser.parse_args()
    data_dir, _ = dataset.find_data(arguments.data_dir)
    splits = dataset.load_splits(data_dir, ["train", "test"], arguments.limit)
    if arguments.side:
        return run_side(arguments.side, splits, arguments.budget)
    command = ["--data-dir", data_dir, "--budget", arguments.budget, *(["--limit", arguments.limit] if arguments.limit else [])]
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(common.Side(__file__, *command, "--side", name)) for name in ("ours", "followed")}
        rows, speeds = train_in_turns(sides, arguments.budget, arguments.rounds)
    originals = splits["test"].images / 255
    mean = splits["train"].images.mean(axis=0) / 255
    rows["mean_image"] = metrics.reconstruction_metrics(originals, np.broadcast_to(mean, originals.shape))
    rows["blurred_original"] = metrics.reconstruction_metrics(originals, ndimage.gaussian_filter(originals, (0, 2, 2)))
    columns = *QUALITY, "perplexity", "bits_fixed", "bits_entropy", "images_per_second", "steps"
    print(f"{'':18}" + "".join(f"{column:>19}" for column in columns))
    for name, row in rows.items():
        print(f"{name:18}" + "".join(f"{row[column]:19.4g}" if column in row else f"{'-':>19}" for column in columns))
    summary = common.ratio(speeds["ours"], speeds["followed"])
    print(f"images/s, ours / followed: {common.say(summary)}")
    common.finish("reconstruction", arguments, {
        **rows, "images_per_second_ratio": summary, "bits_ratio": rows["ours"]["bits_fixed"] / rows["followed"]["bits_fixed"],
        "settings": {"budget": arguments.budget, "rounds": arguments.rounds, "people": splits["train"].num_people,
                     "num_images": len(originals), "blur_sigma": 2}})


if __name__ == "__main__":
    main()
