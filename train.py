"""Trains the VQ-VAE on brain slices, then the PixelCNN prior on its codes.

    python train.py                                          # OASIS if it is found, else the demo cohort in 5 minutes
    python train.py --data-dir DIR --run-dir runs/oasis
    python train.py --run-dir runs/oasis --resume            # goes on after the last finished epoch

Everything it makes lies in the run folder; README.md says what each file is.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import csv
import fcntl
from importlib import metadata
import json
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
from PIL import Image
import tensorflow as tf

import cli
from cli import InputError
import dataset
import figures
import metrics
import modules
import volumes

# Without an option, a setting is what stands here; the demo cohort's fit five minutes on two CPU cores.
DEFAULTS = {
    # data
    "limit": None,
    # model
    "num_embeddings": 512,
    "embedding_dim": 16,
    "downsample": 8,
    # optimiser: many small steps beat few large ones at equal work
    "epochs": 20,
    "prior_epochs": 20,
    "batch_size": 8,
    "learning_rate": 1e-3,
    # system
    "seed": 0,
    "mixed_precision": False,
}
DEMO_DEFAULTS = {**DEFAULTS, "num_embeddings": 128, "epochs": 4, "prior_epochs": 4}
PRIOR_BATCH_SIZE = 8
PRIOR_LEARNING_RATE = 2e-3
EXPLODED = 1e6  # no loss of a network that learns comes near
WARMUP_STEPS = 60  # of plain autoencoding before the codebook starts
RISING_STEPS = 100  # over which the learning rate rises to its peak
PACKAGES = "tensorflow", "keras", "tensorflow-probability", "numpy", "scikit-image", "scikit-learn", "pillow"


def parse_arguments(argv):
    """The command line; settings that were not given are None."""
    parser = cli.script_parser(__doc__)
    parser.add_argument("--data-dir", metavar="DIR", help="folder of keras_png_slices_{train,validate,test} "
                        "(default: $OASIS_DIR, ./keras_png_slices_data, or the demo cohort)")
    parser.add_argument("--cache-dir", metavar="DIR", help="keep the decoded images here, so that the next start takes a moment")
    parser.add_argument("--run-dir", metavar="DIR", help="folder for all results (default: runs/DATE-TIME)")
    for name, kind, minimum, metavar, text in (
            ("epochs", int, 1, "N", "epochs of the VQ-VAE"), ("prior-epochs", int, 1, "N", "epochs of the PixelCNN"),
            ("batch-size", int, 1, "B", "images per step of the VQ-VAE"),
            ("learning-rate", float, 1e-9, "R", "peak learning rate of the VQ-VAE"),
            ("num-embeddings", int, 2, "K", "codes in the codebook"), ("embedding-dim", int, 1, "D", "length of a code's vector"),
            ("seed", int, 0, "S", "of every draw"), ("limit", int, 1, "N", "use the first N people of each split only")):
        key = name.replace("-", "_")
        default = f" (default: {DEFAULTS[key] or 'all'})" if DEFAULTS[key] == DEMO_DEFAULTS[key] else (
            f" (default: {DEFAULTS[key]}; demo cohort: {DEMO_DEFAULTS[key]})")
        maximum = cli.SEEDS if key == "seed" else float("inf")
        parser.add_argument(f"--{name}", type=cli.number(kind, minimum, maximum), metavar=metavar, help=text + default)
    parser.add_argument("--downsample", type=int, choices=(4, 8), help="pixels per code along an axis (default: 8)")
    parser.add_argument("--mixed-precision", action="store_true", default=None,
                        help="compute in float16 on a GPU, bfloat16 elsewhere (slower on most CPUs)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, by its own settings")
    return parser.parse_args(argv)


@contextlib.contextmanager
def open_run(arguments):
    """Settles the run's folder, settings and data, and writes config.json if the run is new.

    Yields:
        (run_dir, config, splits); meanwhile no other training may use the folder.

    Raises:
        InputError: if the folder holds another run or none to resume, or the data are unusable.
    """
    given = {key: value for key in DEFAULTS if (value := getattr(arguments, key)) is not None}
    run_dir = Path(arguments.run_dir or time.strftime("runs/%Y%m%d-%H%M%S"))
    config, splits = (resume_run if arguments.resume else new_run)(run_dir, arguments, given)
    with cli.report_write_errors(run_dir, "give another --run-dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        if not arguments.resume:
            with cli.report_write_errors(run_dir, "give another --run-dir"):
                cli.write_json(run_dir / "config.json", config)
        elif (run_dir / "metrics.json").exists():
            shutil.rmtree(run_dir / "backup", ignore_errors=True)  # it may have been killed right before doing so
            raise InputError(f"{run_dir} is finished; there is nothing to resume.")
        yield run_dir, config, splits


@contextlib.contextmanager
def locked(run_dir):
    """Keeps other trainings out of the folder. The lock dies with the process and leaves no file.

    Raises:
        InputError: if one is at work in it.
    """
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"Another training is at work in {run_dir}; wait for its end or give another --run-dir.") from error
        yield
    finally:
        os.close(folder)


def new_run(run_dir, arguments, given):
    """The config and data of a run that begins; `given` are the settings of the command line."""
    if run_dir.exists() and (not run_dir.is_dir() or any(path.name != ".config.json" for path in run_dir.iterdir())):
        raise InputError(f"{run_dir} is not empty; give another --run-dir, or --resume to go on with the run in it.")
    data_dir, is_demo = dataset.find_data(arguments.data_dir)
    settings = {**(DEMO_DEFAULTS if is_demo else DEFAULTS), **given}
    splits = dataset.load_splits(data_dir, limit=settings["limit"], cache_dir=arguments.cache_dir)
    config = {"settings": settings, "model": model_settings(splits["train"], settings),
              "data": {"folder": str(data_dir.resolve()), "is_demo": is_demo, "fingerprint": dataset.fingerprint(splits),
                       "images": {name: len(split.images) for name, split in splits.items()},
                       "people": {name: split.num_people for name, split in splits.items()}},
              "packages": {name: metadata.version(name) for name in PACKAGES},
              "python": sys.version.split()[0], "git_commit": git_commit()}
    return config, splits


def resume_run(run_dir, arguments, given):
    """The config and data of a run that goes on, which the command line must not contradict."""
    config = resumed_config(run_dir, arguments.run_dir, given)
    folder = arguments.data_dir or config["data"]["folder"]
    splits = dataset.load_splits(folder, limit=config["settings"]["limit"], cache_dir=arguments.cache_dir)
    if dataset.fingerprint(splits) != config["data"]["fingerprint"]:
        raise InputError(f"The data in {folder} are not those that {run_dir} began with; resume with the same data or start a "
                         "new run.")
    return config, splits


def resumed_config(run_dir, named, given):
    """Reads the config.json of the run to resume, whose settings the command line must not contradict."""
    if not named:
        raise InputError("--resume needs --run-dir: the folder of the run to go on with.")
    if not (run_dir / "config.json").is_file():
        raise InputError(f"{run_dir} holds no run to resume (no config.json); start it without --resume.")
    try:
        config = json.loads((run_dir / "config.json").read_text())
        settings = {key: config["settings"][key] for key in DEFAULTS}
        config["model"], config["data"]["folder"], config["data"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run_dir / 'config.json'} is damaged ({error!r}); start a new run.") from error
    for key, value in given.items():
        if value != settings[key]:
            raise InputError(f"--{key.replace('_', '-')} {value} differs from the {settings[key]} that {run_dir} "
                             "began with; resume without it or start a new run.")
    return config


def model_settings(split, settings):
    """The arguments of `modules.VQVAE` for the training split and the settings.

    Raises:
        InputError: if no model fits the images.
    """
    height, width = split.images.shape[1:]
    if height != width or height % 32:
        raise InputError(f"The images are {width}x{height} pixels; the networks need squares of a multiple of 32, "
                         "so pad them with black.")
    return {"image_size": height, "num_embeddings": settings["num_embeddings"], "embedding_dim": settings["embedding_dim"],
            "downsample": settings["downsample"], "seed": settings["seed"],
            # The border that is black in all training images gets no codes; a quarter of the side must remain.
            "margin": min(dataset.empty_margin(split.images, height // 8), 3 * height // 8),
            "data_variance": max(dataset.pixel_statistics(split.images)[1], 1e-6)}


def git_commit():
    """The commit of this repository that is checked out, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Reconstructions(keras.callbacks.Callback):
    """After each epoch: SSIM and code use, into the logs; images and histograms for TensorBoard; the frame of the GIF.

    Args:
        splits: dict of `dataset.Split`.
        frames_dir: folder for the frames.
        logs_dir: folder for TensorBoard.
        epochs: of the whole stage, for the frames' title.
        seed: of the random test images.
    """

    def __init__(self, splits, frames_dir, logs_dir, epochs, seed):
        super().__init__()
        self.validation = splits["validate"].images[splits["validate"].spread(128)]
        self.test = splits["test"].images
        self.shown = self.test[splits["test"].examples(4)]
        self.frames_dir = frames_dir
        self.writer = tf.summary.create_file_writer(str(logs_dir))
        self.epochs = epochs
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock; before the first epoch, draws a frame to compare with."""
        if epoch == 0:
            self._draw_frame(0)
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs):
        """Adds to the logs: val_ssim, val_perplexity, val_codes_used, test_ssim and the epoch's seconds."""
        logs["val_ssim"], codes, _ = self._reconstruct(self.validation)
        use = metrics.code_metrics(codes, self.model.quantizer.num_embeddings)
        logs["val_perplexity"], logs["val_codes_used"] = use["perplexity"], use["codes_used"]
        rng = np.random.default_rng([self.seed, epoch])
        drawn = rng.choice(len(self.test), min(10, len(self.test)), replace=False)
        logs["test_ssim"], _, _ = self._reconstruct(self.test[drawn])
        frame = self._draw_frame(epoch + 1)
        with self.writer.as_default(epoch):
            tf.summary.image("reconstructions", frame[np.newaxis, ..., np.newaxis])
            tf.summary.histogram("codes", codes, buckets=self.model.quantizer.num_embeddings)
            tf.summary.histogram("codebook", self.model.quantizer.embeddings)
        logs["seconds"] = time.perf_counter() - self.start

    def _draw_frame(self, epochs):
        """Writes the frame of the GIF after so many epochs, and returns it."""
        ssim, _, shown = self._reconstruct(self.shown)
        title = f"after epoch {epochs} of {self.epochs}: SSIM {ssim:.3f}" if epochs else f"before the first epoch: SSIM {ssim:.3f}"
        frame = figures.progress_frame(self.shown, shown, self.model.settings["margin"], title)
        Image.fromarray(frame).save(self.frames_dir / f"{epochs:04d}.png")
        return frame

    def _reconstruct(self, images):
        """uint8 (N, H, W) -> (mean SSIM, codes, uint8 reconstructions)."""
        codes = np.concatenate([self.model.encode_to_codes(dataset.normalise(some)[..., tf.newaxis])
                                for some in np.array_split(images, -(-len(images) // 32))])
        decoded = np.concatenate([self.model.decode_codes(some) for some in np.array_split(codes, -(-len(codes) // 32))])
        pairs = zip(images / 255, metrics.to_unit(decoded))
        return float(np.mean([metrics.ssim(*pair) for pair in pairs])), codes, dataset.to_uint8(decoded[..., 0])


class EpochSeeds(keras.callbacks.Callback):
    """Makes every epoch's draws of dropout depend on (seed, epoch) alone, as the order of the data does.

    Keras does not save the state of its seed generators, so a resumed run would draw otherwise than an uninterrupted one.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the state of each seed generator."""
        states = [variable for variable in self.model.variables if variable.path.endswith("seed_generator_state")]
        for index, state in enumerate(states):
            state.assign(np.random.default_rng([self.seed, epoch, index]).integers(0, 2 ** 31, state.shape))


class Checkpoints(keras.callbacks.Callback):
    """After each epoch: saves the model, to resume from; and, if it is the best on validation people, as the result.

    Args:
        backup_path: .keras file of the latest epoch.
        best_path: .keras file of the best epoch.
        monitor: the log that decides; larger is better if its name ends in "ssim", else smaller.
        best: the best value of the epochs before.
    """

    def __init__(self, backup_path, best_path, monitor, best=None):
        super().__init__()
        self.backup_path = backup_path
        self.best_path = best_path
        self.monitor = monitor
        self.sign = 1 if monitor.endswith("ssim") else -1
        self.best = best

    def on_epoch_begin(self, epoch, logs=None):
        """Remembers the epoch."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs):
        """Stops at the first loss that is no number, or beyond all measure.

        Raises:
            InputError: says at which epoch and step; what was saved before stays.
        """
        if not all(abs(value) < EXPLODED for value in logs.values()):
            saved = f" The best model before is in {self.best_path}." if self.best_path.exists() else ""
            raise InputError(f"Training {self.best_path.stem} went astray in epoch {self.epoch + 1}, step {batch + 1}: its loss is "
                             f"not a number any more, or beyond {EXPLODED:.0e}.{saved} Start again with a lower --learning-rate.")

    def on_epoch_end(self, epoch, logs):
        """Saves under a temporary name, then renames."""
        if self.best is None or self.sign * logs[self.monitor] > self.sign * self.best:
            self.best = logs[self.monitor]
            self._save(self.best_path)
        self._save(self.backup_path)

    def _save(self, path):
        unfinished = self.backup_path.with_name(f"unfinished-{self.backup_path.name}")
        try:
            self.model.save(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def fit(model, batches, validation, steps_per_epoch, epochs, first_epoch, seed, run_dir, name, monitor, callbacks=()):
    """Runs Keras' fit for one stage with the histories, logs and checkpoints that both stages have."""
    history_path = run_dir / f"{name}_history.csv"
    done = trim_history(history_path, first_epoch)
    sign = max if monitor.endswith("ssim") else min
    best = sign((float(row[monitor]) for row in done), default=None)
    model.fit(batches, validation_data=validation, steps_per_epoch=steps_per_epoch, epochs=epochs, initial_epoch=first_epoch,
              shuffle=False, verbose=1 if sys.stdout.isatty() else 2,
              callbacks=[EpochSeeds(seed), *callbacks, keras.callbacks.CSVLogger(history_path, append=bool(done)),
                         keras.callbacks.TensorBoard(run_dir / "logs" / name, write_graph=False),
                         Checkpoints(run_dir / "backup" / f"{name}.keras", run_dir / f"{name}.keras", monitor, best)])


def trim_history(path, epochs):
    """Cuts a history back to its first `epochs` rows, as dicts of strings; an epoch that was not saved is run again."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))[:epochs]
    if not rows:
        path.unlink()
        return []
    unfinished = path.with_name(f".{path.name}")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
    return rows


def read_history(path):
    """A history as an array with a field per column."""
    return np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))


def load_backup(path):
    """The model of the latest epoch, with its optimiser.

    Raises:
        InputError: if the file is damaged.
    """
    try:
        return modules.load_model(path)
    except ValueError as error:
        raise InputError(f"{error}; remove it to begin this stage again.") from error


def choose_strategy():
    """All GPUs that TensorFlow sees, each with a part of every batch; with one or none, no strategy."""
    gpus = tf.config.list_logical_devices("GPU")
    return tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()


def adam(peak, total_steps):
    """Adam whose learning rate rises to `peak`, then falls to a fiftieth of it along a cosine."""
    rising = min(RISING_STEPS, total_steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(peak / RISING_STEPS, max(total_steps - rising, 1), alpha=0.02,
                                                      warmup_target=peak, warmup_steps=rising)
    return modules.Adam(schedule, beta_2=0.99, global_clipnorm=1.0)


def train_vqvae(run_dir, config, splits):
    """Stage 1; returns the VQ-VAE of the epoch with the best SSIM on validation people."""
    settings = config["settings"]
    keras.utils.set_random_seed(settings["seed"])
    backup = run_dir / "backup" / "vqvae.keras"
    strategy = choose_strategy()
    batch_size = min(settings["batch_size"], len(splits["train"].images))
    if batch_size % strategy.num_replicas_in_sync:
        raise InputError(f"A batch of {batch_size} images cannot be shared out evenly among {strategy.num_replicas_in_sync} GPUs; "
                         "give a multiple of them as --batch-size.")
    steps_per_epoch = len(splits["train"].images) // batch_size
    first_epoch = 0
    with strategy.scope():
        if backup.exists():
            vqvae = load_backup(backup)
            first_epoch = (int(vqvae.optimizer.iterations) - WARMUP_STEPS) // steps_per_epoch
        else:
            vqvae = modules.VQVAE(**config["model"])
            vqvae.compile(adam(settings["learning_rate"], WARMUP_STEPS + steps_per_epoch * settings["epochs"]))
            print(f"{WARMUP_STEPS} steps as a plain autoencoder, then the codebook starts at k-means centres ...")
            # Another seed than the epochs': the first of them then sees every image afresh.
            batches = dataset.training_batches(splits["train"], batch_size, settings["seed"] + 1)
            try:
                vqvae.start_codebook(batches, WARMUP_STEPS)
            except FloatingPointError as error:
                raise InputError(f"Training vqvae went astray at its start: {error}. "
                                 "Start again with a lower --learning-rate.") from error
    frames = run_dir / "backup" / "frames"
    if first_epoch < settings["epochs"]:
        fit(vqvae, dataset.training_batches(splits["train"], batch_size, settings["seed"], first_epoch),
            dataset.image_batches(splits["validate"], 32), steps_per_epoch, settings["epochs"], first_epoch,
            settings["seed"], run_dir, "vqvae", "val_ssim",
            [Reconstructions(splits, frames, run_dir / "logs" / "vqvae" / "pictures", settings["epochs"], settings["seed"])])
    figures.write_gif(sorted(frames.glob("*.png")), run_dir / "progress.gif")
    return load_backup(run_dir / "vqvae.keras")


def train_pixelcnn(run_dir, config, vqvae, splits):
    """Stage 2; returns the PixelCNN of the epoch with the fewest bits per code on validation people."""
    settings = config["settings"]
    keras.utils.set_random_seed(settings["seed"])  # again, for this stage may have been resumed
    codes = {name: encode(vqvae, splits[name]) for name in ("train", "validate")}
    backup = run_dir / "backup" / "pixelcnn.keras"
    strategy = choose_strategy()
    replicas = strategy.num_replicas_in_sync
    batch_size = min(max(PRIOR_BATCH_SIZE // replicas, 1) * replicas, len(codes["train"]))
    steps_per_epoch = len(codes["train"]) // batch_size
    first_epoch = 0
    with strategy.scope():
        if backup.exists():
            prior = load_backup(backup)
            first_epoch = int(prior.optimizer.iterations) // steps_per_epoch
        else:
            prior = modules.PixelCNN(vqvae.grid_size, settings["num_embeddings"], volumes.NUM_POSITIONS,
                                     codebook_digest=vqvae.quantizer.digest())
            prior.start_embeddings(vqvae.quantizer.embeddings, settings["seed"])
            prior.compile(adam(PRIOR_LEARNING_RATE, steps_per_epoch * settings["prior_epochs"]))
    if first_epoch < settings["prior_epochs"]:
        fit(prior, dataset.code_batches(codes["train"], splits["train"].positions, batch_size, settings["seed"], first_epoch),
            dataset.code_batches(codes["validate"], splits["validate"].positions, 32), steps_per_epoch,
            settings["prior_epochs"], first_epoch, settings["seed"], run_dir, "pixelcnn", "val_bits_per_code")
    return load_backup(run_dir / "pixelcnn.keras"), codes["validate"]


def encode(vqvae, split):
    """The codes, int32 (N, g, g), of a split in its order."""
    return np.concatenate([vqvae.encode_to_codes(images) for images, _ in dataset.image_batches(split, 32)])


def draw_figures(run_dir, vqvae, prior, validation_codes, test_split, codes, reconstructions):
    """Draws the run's figures/*.png from its networks, its histories and its test reconstructions."""
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    num_embeddings = prior.num_embeddings
    figures.plot_architecture(figures.outline(vqvae, prior), folder / "architecture.png")
    history = read_history(run_dir / "vqvae_history.csv")
    figures.plot_losses(history, folder / "losses.png")
    figures.plot_ssim(history, folder / "ssim.png")
    entropy = metrics.code_metrics(validation_codes, num_embeddings)["code_entropy"]
    figures.plot_prior(read_history(run_dir / "pixelcnn_history.csv"), entropy, folder / "prior.png")
    shown = test_split.examples(4)
    captions = [f"slice {test_split.positions[index]}, SSIM {metrics.ssim(test_split.images[index] / 255, reconstructions[index]):.3f}"
                for index in shown]
    figures.reconstruction_grid(test_split.images[shown] / 255, reconstructions[shown], codes[shown], captions,
                                figures.code_colours(vqvae.quantizer.embeddings), vqvae.settings["margin"],
                                folder / "reconstructions.png")


def prepare_devices(mixed_precision):
    """Sets up what TensorFlow computes on; returns its name."""
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if not gpus:
        tf.config.experimental.enable_op_determinism()  # the same seed gives the same bits; on a GPU it would cost much
    if mixed_precision:
        keras.mixed_precision.set_global_policy("mixed_float16" if gpus else "mixed_bfloat16")
    return "GPU" if gpus else "CPU"


@contextlib.contextmanager
def stoppable(run_dir):
    """Ends on SIGINT and SIGTERM with one line; every finished epoch is saved already."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(f"Stopped. All finished epochs are saved; python train.py --run-dir {run_dir} --resume goes on.", file=sys.stderr)
        sys.exit(cli.STOPPED)
    finally:
        signal.signal(signal.SIGTERM, before)


@cli.exit_on_input_error
def main(argv=None):
    """Runs both stages and measures the result on the test people."""
    with open_run(parse_arguments(argv)) as (run_dir, config, splits):
        device = prepare_devices(config["settings"]["mixed_precision"])
        people = ", ".join(f"{count} {name}" for name, count in config["data"]["people"].items())
        print(f"Run folder {run_dir}; {people} people in {config['data']['folder']}; on {device}.")
        for name in ("validate", "test"):
            dataset.warn_of_lost_border(splits[name], config["model"]["margin"])
        advice = f"what was saved before is whole: mend that, then python train.py --run-dir {run_dir} --resume"
        with stoppable(run_dir), cli.report_write_errors(run_dir, advice):
            run_stages(run_dir, config, splits)
    print(f"Done. Next: python predict.py --run-dir {run_dir}")


def run_stages(run_dir, config, splits):
    """Trains both networks, measures them on the test people and draws the figures."""
    settings = config["settings"]
    (run_dir / "backup").mkdir(exist_ok=True)
    (run_dir / "backup" / "frames").mkdir(exist_ok=True)
    print(f"Stage 1 of 2: VQ-VAE, {settings['epochs']} epochs.")
    vqvae = train_vqvae(run_dir, config, splits)
    print(f"Stage 2 of 2: PixelCNN prior, {settings['prior_epochs']} epochs.")
    prior, validation_codes = train_pixelcnn(run_dir, config, vqvae, splits)
    print("Measuring on the test people ...")
    measured, codes, reconstructions = metrics.evaluate(vqvae, prior, dataset.image_batches(splits["test"], 32))
    draw_figures(run_dir, vqvae, prior, validation_codes, splits["test"], codes, reconstructions)
    cli.write_json(run_dir / "metrics.json", measured)
    shutil.rmtree(run_dir / "backup", ignore_errors=True)
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
