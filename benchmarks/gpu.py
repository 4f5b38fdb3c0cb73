"""Speed on a GPU: both stages at several batch sizes, sampling, and the whole demo run.

    python benchmarks/gpu.py [--steps 32] [--rounds 3]

Noise for pictures, of 256x256 pixels, no margin, a 32x32 grid, 512 codes. Each row is a process of its own;
the rows are measured in turn (benchmarks/common.py) after a first time that compiles; the median over the
rounds counts. Keras runs several steps at a time, so it may run more than `--steps`: those that it ran are
counted. The demo run is `python train.py` and `python predict.py` with nothing but the embedded data, once,
with all that they compile. The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import subprocess
import tempfile
import time

import keras
import numpy as np

from benchmarks import common
from benchmarks.training import Clock
import dataset
from support import cli, devices

PEOPLE, IMAGE_SIZE = 20, 256
# A stage, or what is sampled; how many images or heads side by side; whether in bfloat16
SETTINGS = {
    "VQ-VAE, batches of 8": ("vqvae", 8, False),
    "VQ-VAE, batches of 64": ("vqvae", 64, False),
    "VQ-VAE, batches of 64, bfloat16": ("vqvae", 64, True),
    "PixelCNN, batches of 8": ("pixelcnn", 8, False),
    "sampling, 16 slices at once": ("slices", 16, False),
    "sampling, 256 slices at once": ("slices", 256, False),
    "sampling, 64 heads at once": ("heads", 64, False),
}


def training_speed(stage, split, batch_size, mixed, steps):
    """A function that trains a stage as train.py does, for so many steps, and returns the images/s."""
    vqvae, prior = common.build_both(common.vqvae_stage(split, batch_size=batch_size, mixed_precision=mixed))
    if stage == "vqvae":
        model, batches = vqvae, dataset.image_batches(split, batch_size, 0)
    else:
        model, batches = prior, dataset.code_batches(common.random_codes(split, prior), batch_size, seed=0)
    return lambda: images_per_second(model, batches, batch_size, steps)


def images_per_second(model, batches, batch_size, steps):
    """The images/s of one call of `fit`, by the steps that it ran."""
    clock, before = Clock(), int(model.optimizer.iterations)
    model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[clock])
    return (int(model.optimizer.iterations) - before) * batch_size / clock.seconds


def sampling_speed(stage, split, count):
    """A function that samples so many slices or heads side by side and returns the slices/s."""
    _, prior = common.build_both(common.vqvae_stage(split))

    def slices_per_second():
        start = time.perf_counter()
        if stage == "slices":
            codes = prior.sample(np.resize(prior.slice_positions, count), batch_size=count)
        else:
            codes = prior.sample_heads(count, batch_size=count)
        return codes[..., 0, 0].size / (time.perf_counter() - start)

    return slices_per_second


def measure(name, steps):
    """Answers every request with the images/s of a setting, in a process of its own."""
    stage, batch_size, mixed = SETTINGS[name]
    devices.prepare()
    keras.utils.set_random_seed(0)
    split = common.noise_split(PEOPLE, IMAGE_SIZE)
    if stage in ("vqvae", "pixelcnn"):
        speed = training_speed(stage, split, batch_size, mixed, steps)
    else:
        speed = sampling_speed(stage, split, batch_size)
    for _ in common.requests():
        common.answer(speed())


def demo_seconds():
    """The seconds of `python train.py` and of `python predict.py` on the embedded data, a dict."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for script in ("train.py", "predict.py"):
            command = [sys.executable, common.ROOT / script, "--run-dir", f"{folder}/demo"]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=sys.stderr)
            seconds[script] = time.perf_counter() - start
    return seconds


@cli.exit_on_user_error
def main():
    """Prints a row per setting, the demo run, then JSON."""
    parser = common.argument_parser(__doc__, default_rounds=3)
    parser.add_argument("--steps", type=cli.number(int, 1), default=32, metavar="N",
                        help="per round and stage, at least (default: 32)")
    parser.add_argument("--measure", choices=SETTINGS, help="one setting, here (the script calls itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.steps)
    if devices.kind() != "GPU":
        raise cli.UserError("TensorFlow sees no GPU; this benchmark needs one.")
    sides = {name: ("--steps", arguments.steps, "--measure", name) for name in SETTINGS}
    measured = common.ask_in_turn(__file__, sides, arguments.rounds)
    rows = {name: common.median_and_range(speeds) for name, speeds in measured.items()}
    for name, row in rows.items():
        print("{:34}{median:10.1f} images/s ({min:.1f} to {max:.1f})".format(name, **row), flush=True)
    seconds = demo_seconds()
    print("The demo: " + ", ".join(f"{script} {value:.0f} s" for script, value in seconds.items()))
    common.finish("gpu", arguments, {
        "settings": {"steps": arguments.steps, "rounds": arguments.rounds,
                     "people": PEOPLE, "image_size": IMAGE_SIZE},
        "images_per_second": rows, "demo_seconds": seconds})


if __name__ == "__main__":
    main()
