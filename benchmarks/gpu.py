"""Speed on a GPU: both stages at several batch sizes, sampling, and the whole demo run.

    python benchmarks/gpu.py [--steps 30] [--rounds 3]

Noise for pictures, of 256x256 pixels, no margin, a 32x32 grid, 512 codes. Each row is a process of its own; the rows are
measured in turn (benchmarks/common.py) after a first time that compiles; the median over the rounds counts. The demo run is
`python train.py` and `python predict.py` with nothing but the embedded data, once, with all that they compile.
The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

import contextlib
import subprocess
import tempfile
import time

import keras
import numpy as np

from benchmarks import common
from benchmarks.training import Clock
import dataset
from support import cli, devices
import train

PEOPLE, IMAGE_SIZE = 20, 256
# A stage, or what is sampled; how many images or heads side by side; whether in bfloat16
SETTINGS = {"VQ-VAE, batches of 8": ("vqvae", 8, False), "VQ-VAE, batches of 64": ("vqvae", 64, False),
            "VQ-VAE, batches of 64, bfloat16": ("vqvae", 64, True), "PixelCNN, batches of 8": ("pixelcnn", 8, False),
            "sampling, 16 slices at once": ("slices", 16, False), "sampling, 256 slices at once": ("slices", 256, False),
            "sampling, 64 heads at once": ("heads", 64, False)}


def training_speed(stage, split, batch_size, mixed, steps):
    """A function that trains a stage for so many steps, as train.py does, and returns the images/s."""
    run = common.run_without_folder(split, batch_size=batch_size, mixed_precision=mixed)
    steps_per_epoch, clock = len(split.images) // batch_size, Clock()
    with devices.layers_of(devices.precision(mixed)):
        model = train.new_vqvae(run, steps_per_epoch)
        batches = dataset.training_batches(split, batch_size, 0)
        if stage == "pixelcnn":
            model = train.new_pixelcnn(run, model, split, steps_per_epoch)
            batches = dataset.code_batches(common.random_codes(split, model), batch_size, seed=0)

    def images_per_second():
        model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[clock])
        return steps * batch_size / clock.seconds

    return images_per_second


def sampling_speed(stage, split, count):
    """A function that samples so many slices or heads side by side and returns the slices/s."""
    run = common.run_without_folder(split)
    prior = train.new_pixelcnn(run, train.new_vqvae(run, 1), split, 1)

    def images_per_second():
        start = time.perf_counter()
        if stage == "slices":
            codes = prior.sample(np.resize(prior.slice_positions, count), batch_size=count)
        else:
            codes = prior.sample_heads(count, batch_size=count)
        return codes[..., 0, 0].size / (time.perf_counter() - start)

    return images_per_second


def measure(name, steps):
    """Answers every request with the images/s of a setting, in a process of its own."""
    stage, batch_size, mixed = SETTINGS[name]
    devices.prepare()
    keras.utils.set_random_seed(0)
    split = common.noise_split(PEOPLE, IMAGE_SIZE)
    if stage in ("vqvae", "pixelcnn"):
        images_per_second = training_speed(stage, split, batch_size, mixed, steps)
    else:
        images_per_second = sampling_speed(stage, split, batch_size)
    for _ in common.requests():
        common.answer(images_per_second())


def demo_seconds():
    """The seconds of `python train.py` and of `python predict.py` on the embedded data, a dict.

    Raises:
        subprocess.CalledProcessError: if one of them fails.
    """
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for script in ("train.py", "predict.py"):
            start = time.perf_counter()
            subprocess.run([sys.executable, common.ROOT / script, "--run-dir", f"{folder}/demo"], check=True, stdout=sys.stderr)
            seconds[script] = time.perf_counter() - start
    return seconds


@cli.exit_on_user_error
def main():
    """Prints a row per setting, the demo run, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--steps", type=cli.number(int, 1), default=30, metavar="N", help="per round and stage (default: 30)")
    common.add_rounds(parser, 3)
    parser.add_argument("--measure", choices=SETTINGS, help="one setting, in this process (the script calls itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.steps)
    if devices.kind() != "GPU":
        raise cli.UserError("TensorFlow sees no GPU; this benchmark needs one.")
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(common.Side(__file__, "--steps", arguments.steps, "--measure", name))
                 for name in SETTINGS}
        for side in sides.values():
            side.ask()  # compiles
        measured = common.interleave({name: side.ask for name, side in sides.items()}, arguments.rounds)
    rows = {name: common.spread(speeds) for name, speeds in measured.items()}
    for name, row in rows.items():
        print("{:34}{median:10.1f} images/s ({min:.1f} to {max:.1f})".format(name, **row), flush=True)
    seconds = demo_seconds()
    print("The demo: " + ", ".join(f"{script} {value:.0f} s" for script, value in seconds.items()))
    common.finish("gpu", arguments, {"settings": {"steps": arguments.steps, "rounds": arguments.rounds, "people": PEOPLE,
                                                  "image_size": IMAGE_SIZE}, "images_per_second": rows, "demo_seconds": seconds})


if __name__ == "__main__":
    main()
