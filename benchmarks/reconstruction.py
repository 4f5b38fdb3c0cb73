"""Reconstruction quality per bit: the followed project's VQ-VAE against ours, on the same images, for the same seconds.

    python benchmarks/reconstruction.py --data-dir DIR --budget 240

Both train from scratch in this process, compilation included, and are measured on all test images. Two rows that need no
model, the mean training image and the blurred original, show what an SSIM means on a picture that is mostly black. The
last line is JSON.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import math
from pathlib import Path
import sys
import time

import keras
from keras import layers
import numpy as np
from scipy import ndimage
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
import dataset
import metrics
import modules
import train

QUALITY = "ssim", "ssim_gaussian", "ssim_foreground", "psnr"


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


class Budget(keras.callbacks.Callback):
    """Stops training when the seconds are over; lets the learning rate follow them if `peak` is given.

    Args:
        start: time.perf_counter() at which the budget began.
        seconds: of the budget.
        peak: the highest learning rate, reached after 100 steps and left along a cosine.
    """

    def __init__(self, start, seconds, peak=None):
        super().__init__()
        self.start, self.seconds, self.peak = start, seconds, peak

    def on_train_batch_begin(self, batch, logs=None):
        """Sets the learning rate."""
        if self.peak:
            share = min(1.0, (time.perf_counter() - self.start) / self.seconds)
            rise = min(1.0, (int(self.model.optimizer.iterations) + 1) / train.RISING_STEPS)
            self.model.optimizer.learning_rate = self.peak * rise * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the clock."""
        self.model.stop_training = time.perf_counter() - self.start > self.seconds


def train_followed(images, seconds):
    """Trains the followed project's model: Adam 1e-3, batches of 128 float images. Returns it, and its steps."""
    start = time.perf_counter()
    scaled = images[..., np.newaxis].astype(np.float32) / 255 - 1
    model = FollowedVQVAE(float(scaled.var()))
    model.compile(keras.optimizers.Adam(1e-3))
    model.fit(scaled, batch_size=128, epochs=10 ** 6, verbose=0, callbacks=[Budget(start, seconds)])
    return model, int(model.optimizer.iterations), time.perf_counter() - start


def train_ours(split, seconds):
    """Trains our model as train.py does, with the schedule laid over the budget. Returns it, and its steps."""
    start = time.perf_counter()
    settings = train.DEFAULTS
    model = modules.VQVAE(**train.model_settings(split, settings))
    model.compile(keras.optimizers.Adam(settings["learning_rate"], beta_2=0.99, global_clipnorm=1.0))
    batch_size = min(settings["batch_size"], len(split.images))
    model.start_codebook(dataset.training_batches(split, batch_size, settings["seed"] + 1), train.WARMUP_STEPS)
    model.fit(dataset.training_batches(split, batch_size, settings["seed"]), steps_per_epoch=10 ** 6, verbose=0, shuffle=False,
              callbacks=[Budget(start, seconds, settings["learning_rate"])])
    return model, int(model.optimizer.iterations), time.perf_counter() - start


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


@cli.exit_on_input_error
def main():
    """Prints the table, then JSON."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", metavar="DIR")
    parser.add_argument("--budget", type=cli.number(float, 1), default=240, metavar="SECONDS", help="(default: 240)")
    parser.add_argument("--limit", type=cli.number(int, 1), metavar="N", help="people of each split (default: all)")
    arguments = parser.parse_args()
    data_dir, _ = dataset.find_data(arguments.data_dir)
    splits = dataset.load_splits(data_dir, ["train", "test"], arguments.limit)
    images = splits["test"].images
    rows = {}
    for name, fit, scale, shift in (
            ("followed", lambda: train_followed(splits["train"].images, arguments.budget), 1 / 255, -1),
            ("ours", lambda: train_ours(splits["train"], arguments.budget), 1 / 127.5, -1)):
        keras.utils.set_random_seed(0)
        print(f"Training {name} for {arguments.budget:.0f} s ...", flush=True)
        model, steps, seconds = fit()
        batch = 128 if name == "followed" else train.DEFAULTS["batch_size"]
        rows[name] = {**measure(model, images, scale, shift), "steps": steps, "seconds": seconds,
                      "images_per_second": steps * batch / seconds}
    originals = images / 255
    mean = splits["train"].images.mean(axis=0) / 255
    rows["mean_image"] = metrics.reconstruction_metrics(originals, np.broadcast_to(mean, originals.shape))
    rows["blurred_original"] = metrics.reconstruction_metrics(originals, ndimage.gaussian_filter(originals, (0, 2, 2)))
    columns = *QUALITY, "perplexity", "bits_fixed", "bits_entropy", "images_per_second", "steps"
    print(f"{'':18}" + "".join(f"{column:>19}" for column in columns))
    for name, row in rows.items():
        print(f"{name:18}" + "".join(f"{row[column]:19.4g}" if column in row else f"{'-':>19}" for column in columns))
    ratios = {column: rows["ours"][column] / rows["followed"][column] for column in columns}
    print(f"{'ours / followed':18}" + "".join(f"{ratios[column]:19.4g}" for column in columns))
    print(json.dumps({"settings": {"budget": arguments.budget, "people": splits["train"].num_people,
                                   "num_images": len(images), "cores": os.cpu_count(), "blur_sigma": 2},
                      **rows, "ratio": ratios}))


if __name__ == "__main__":
    main()
