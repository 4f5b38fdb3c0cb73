"""Trains the VQ-VAE on brain slices, then the PixelCNN prior on its codes.

    python train.py                                          # OASIS if it is found, else the demo cohort in 7 minutes
    python train.py --data-dir DIR --run-dir runs/oasis
    python train.py --run-dir runs/oasis --resume            # goes on after the last finished epoch

Everything it makes lies in the run folder; README.md says what each file is.
"""

from support import cli  # first: sets what TensorFlow, Keras and matplotlib read when imported

import contextlib
import csv
import dataclasses
import fcntl
from importlib import metadata
import inspect
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

import keras
import numpy as np
from PIL import Image
import tensorflow as tf

from support.cli import InputError
import dataset
import modules
from support import devices, figures, metrics, template, volumes

# Without an option, a setting is what stands here; the demo cohort's take seven minutes on two CPU cores.
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
DEMO_DEFAULTS = {**DEFAULTS, "num_embeddings": 128, "epochs": 8, "prior_epochs": 4}
# What no option sets. A run remembers these too, and is not resumed by a version that has others.
CONSTANTS = {
    "warmup_steps": 60,  # of plain autoencoding before the codebook starts
    "rising_steps": 100,  # over which the learning rate rises to its peak
    "prior_batch_size": 8,
    "prior_learning_rate": 2e-3,
    "calibration_heads": 64,  # in each round, or as many as there are training people, if these are fewer
    "calibration_rounds": 2,
    **{name: getattr(dataset, name.upper())
       for name in ("without_below", "without_further", "corrupted", "without_person", "person_noise")},
}
# With which TensorFlow's own files fail; it computes with others.
WRITE_ERRORS = (tf.errors.PermissionDeniedError, tf.errors.NotFoundError, tf.errors.FailedPreconditionError, tf.errors.UnknownError,
                tf.errors.ResourceExhaustedError)
CALIBRATION_SEED = -1  # of the first round, one less for each further one: no user can give these
EXPLODED = 1e6  # no loss of a network that learns comes near


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the two trainings.

    Attributes:
        name: of its files.
        monitor: the log that tells the best epoch.
        better: `max` or `min`, which of two values of it is the better.
    """

    name: str
    monitor: str
    better: callable


VQVAE = Stage("vqvae", "val_ssim", max)
PIXELCNN = Stage("pixelcnn", "val_bits_per_code", min)
EPOCHS_FILE = "finished_epochs.json"  # in the backup's zip archive: how many epochs its weights have seen
PACKAGES = "tensorflow", "keras", "tensorflow-probability", "numpy", "scikit-image", "scikit-learn", "pillow"


def parse_arguments(argv):
    """The command line; settings that were not given are None."""
    parser = cli.script_parser(__doc__)
    parser.add_argument("--data-dir", metavar="DIR", help="folder of keras_png_slices_{train,validate,test} "
                        "(default: $OASIS_DIR, ./keras_png_slices_data, or the demo cohort)")
    parser.add_argument("--cache-dir", metavar="DIR", help="keep the decoded images here, so that the next start takes a moment")
    parser.add_argument("--run-dir", type=cli.utf8_path, metavar="DIR", help="folder for all results (default: runs/DATE-TIME)")
    for name, kind, minimum, metavar, text in (
            ("epochs", int, 1, "N", "epochs of the VQ-VAE"), ("prior-epochs", int, 1, "N", "epochs of the PixelCNN"),
            ("batch-size", int, 1, "B", "images per step of the VQ-VAE"),
            ("learning-rate", float, 1e-9, "R", "peak learning rate of the VQ-VAE"),
            ("num-embeddings", int, 2, "K", "codes in the codebook"), ("embedding-dim", int, 1, "D", "length of a code's vector"),
            ("seed", int, 0, "S", "of every draw"), ("limit", int, 1, "N", "use the first N people of each split only")):
        key = name.replace("-", "_")
        default = f" (default: {'all' if DEFAULTS[key] is None else DEFAULTS[key]})" if DEFAULTS[key] == DEMO_DEFAULTS[key] else (
            f" (default: {DEFAULTS[key]}; demo cohort: {DEMO_DEFAULTS[key]})")
        maximum = cli.MAX_SEED if key == "seed" else float("inf")
        parser.add_argument(f"--{name}", type=cli.number(kind, minimum, maximum), metavar=metavar, help=text + default)
    parser.add_argument("--downsample", type=int, choices=(4, 8), help="pixels per code along an axis (default: 8)")
    parser.add_argument("--mixed-precision", action="store_true", default=None,
                        help="compute in bfloat16 (GPUs of compute capability 8.0 and up; slower on most CPUs)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, by its own settings")
    return parser.parse_args(argv)


@contextlib.contextmanager
def open_run(arguments):
    """Settles the run's folder, settings and data, and writes config.json if the run is new.

    On several machines the chief does so alone, and tells the others, who read the same data from their own disks.

    Yields:
        (run_dir, config, splits); meanwhile no other training may use the folder.

    Raises:
        InputError: if the folder holds another run or none to resume, or the data are unusable.
    """
    given = {key: value for key in DEFAULTS if (value := getattr(arguments, key)) is not None}
    run_dir = Path(arguments.run_dir or time.strftime("runs/%Y%m%d-%H%M%S"))
    config = splits = None
    with contextlib.ExitStack() as stack:
        with devices.fail_together():
            if devices.is_chief():
                config, splits = (resume_run if arguments.resume else new_run)(run_dir, arguments, given)
                stack.enter_context(claimed(run_dir, config, arguments.resume))
        config = json.loads(devices.broadcast_text(json.dumps(config)))
        with devices.fail_together():
            if not devices.is_chief():
                devices.check_precision(config["settings"]["mixed_precision"])
                arguments.data_dir = arguments.data_dir or os.environ.get("OASIS_DIR")  # their own disk's, if it is named
                splits = matching_splits(arguments, config, run_dir)
        yield run_dir, config, splits


@contextlib.contextmanager
def claimed(run_dir, config, resumed):
    """Makes the run's folder its own: locked, and with its config.json."""
    with writing(run_dir, "give another --run-dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        if not resumed:
            with writing(run_dir, "give another --run-dir"):
                cli.write_json(run_dir / "config.json", config)
        elif (run_dir / "metrics.json").exists():
            shutil.rmtree(run_dir / "backup", ignore_errors=True)  # it may have been killed right before doing so
            raise InputError(f"{run_dir} is finished; there is nothing to resume.")
        yield


def writing(run_dir, advice=None):
    """Reports a failure to write into the run's folder: to be put around what writes, and around nothing else."""
    return cli.report_write_errors(run_dir, advice or (
        f"what was saved before is whole: mend that, then python train.py --run-dir {run_dir} --resume"), WRITE_ERRORS)


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
    devices.check_precision(settings["mixed_precision"])
    splits = dataset.load_splits(data_dir, limit=settings["limit"], cache_dir=arguments.cache_dir)
    vqvae = model_settings(splits["train"], settings)
    devices.global_batch(settings["batch_size"], len(splits["train"].images))
    config = {"settings": settings, "constants": CONSTANTS, "vqvae": with_defaults(modules.VQVAE, vqvae),
              "pixelcnn": with_defaults(modules.PixelCNN, {
                  "grid_size": vqvae["image_size"] // settings["downsample"], "num_embeddings": settings["num_embeddings"],
                  "num_positions": volumes.NUM_POSITIONS}),
              "data": {"folder": str(data_dir.resolve()), "is_demo": is_demo, "fingerprints": dataset.fingerprints(splits),
                       "images": {name: len(split.images) for name, split in splits.items()},
                       "people": {name: split.num_people for name, split in splits.items()}},
              "packages": {name: metadata.version(name) for name in PACKAGES},
              "python": sys.version.split()[0], "git_commit": git_commit()}
    return config, splits


def with_defaults(model, given):
    """All arguments of a model's constructor: those given, and the defaults of the rest."""
    parameters = inspect.signature(model).parameters.values()
    return {parameter.name: given.get(parameter.name, parameter.default) for parameter in parameters
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}


def resume_run(run_dir, arguments, given):
    """The config and data of a run that goes on, which the command line must not contradict."""
    config = resumed_config(run_dir, arguments.run_dir, given)
    devices.check_precision(config["settings"]["mixed_precision"])
    return config, matching_splits(arguments, config, run_dir)


def matching_splits(arguments, config, run_dir):
    """The splits that a run began with.

    Raises:
        InputError: if they are others.
    """
    folder = arguments.data_dir or config["data"]["folder"]
    if config["data"]["is_demo"] and not Path(folder).is_dir():
        folder = template.make_demo_cohort()  # another machine than the one that began
    splits = dataset.load_splits(folder, limit=config["settings"]["limit"], cache_dir=arguments.cache_dir)
    if dataset.fingerprints(splits) != config["data"]["fingerprints"]:
        raise InputError(f"The data in {folder} are not those that {run_dir} began with; resume with the same data or start a "
                         "new run.")
    return splits


def resumed_config(run_dir, named, given):
    """Reads the config.json of the run to resume, whose settings the command line must not contradict."""
    if not named:
        raise InputError("--resume needs --run-dir: the folder of the run to go on with.")
    if not (run_dir / "config.json").is_file():
        raise InputError(f"{run_dir} holds no run to resume (no config.json); start it without --resume.")
    try:
        config = json.loads((run_dir / "config.json").read_text())
        settings = {key: config["settings"][key] for key in DEFAULTS}
        constants = config["constants"]
        config["vqvae"], config["pixelcnn"], config["data"]["folder"], config["data"]["is_demo"], config["data"]["fingerprints"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run_dir / 'config.json'} is damaged, or of another version of train.py ({error!r}); "
                         "start a new run.") from error
    for key, value in given.items():
        if value != settings[key]:
            raise InputError(f"--{key.replace('_', '-')} {value} differs from the {settings[key]} that {run_dir} "
                             "began with; resume without it or start a new run.")
    for key in CONSTANTS.keys() | constants.keys():
        if constants.get(key) != CONSTANTS.get(key):
            raise InputError(f"{run_dir} began with {key} {constants.get(key)}, but this version of train.py has "
                             f"{CONSTANTS.get(key)}; check out commit {config.get('git_commit')} or start a new run.")
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


class Measurements(keras.callbacks.Callback):
    """After each epoch of stage 1: SSIM and code use, into the logs. Goes before all callbacks that write logs.

    Args:
        splits: dict of `dataset.Split`.
        seed: of the random test images.

    Attributes:
        shown: uint8 (4, H, W), test images whose reconstructions are kept.
        reconstructions: uint8 (4, H, W), those of the last epoch, or of the start.
        shown_ssim: their mean SSIM.
        codes: int32 (N, g, g), of the validation images.
    """

    def __init__(self, splits, seed):
        super().__init__()
        self.validation = splits["validate"].images[splits["validate"].spread(128)]
        self.test = splits["test"].images
        self.shown = self.test[splits["test"].examples(4)]
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        """Before the first epoch, reconstructs, for a picture to compare with."""
        if epoch == 0:
            self.shown_ssim, _, self.reconstructions = self._reconstruct(self.shown)

    def on_epoch_end(self, epoch, logs):
        """Adds to the logs: val_ssim, val_perplexity, val_codes_used, and test_ssim."""
        logs["val_ssim"], self.codes, _ = self._reconstruct(self.validation)
        use = metrics.code_metrics(self.codes, self.model.quantizer.num_embeddings)
        logs["val_perplexity"], logs["val_codes_used"] = use["perplexity"], use["codes_used"]
        rng = np.random.default_rng([self.seed, epoch])
        drawn = rng.choice(len(self.test), min(10, len(self.test)), replace=False)
        logs["test_ssim"], _, _ = self._reconstruct(self.test[drawn])
        self.shown_ssim, _, self.reconstructions = self._reconstruct(self.shown)

    def _reconstruct(self, images):
        """uint8 (N, H, W) -> (mean SSIM, codes, uint8 reconstructions)."""
        codes = np.concatenate([self.model.encode_to_codes(dataset.normalise(some)[..., tf.newaxis])
                                for some in np.array_split(images, -(-len(images) // 32))])
        decoded = np.concatenate([self.model.decode_codes(some) for some in np.array_split(codes, -(-len(codes) // 32))])
        pairs = zip(images / 255, metrics.to_unit(decoded))
        return float(np.mean([metrics.ssim(*pair) for pair in pairs])), codes, dataset.to_uint8(decoded[..., 0])


class Pictures(keras.callbacks.Callback):
    """After each epoch of stage 1: the frame of the GIF; images and histograms for TensorBoard.

    Args:
        measurements: the `Measurements` that went before.
        run_dir: the run's folder.
        epochs: of the whole stage, for the frames' title.
    """

    def __init__(self, measurements, run_dir, epochs):
        super().__init__()
        self.measurements = measurements
        self.frames_dir = run_dir / "backup" / "frames"
        self.writer = tf.summary.create_file_writer(str(run_dir / "logs" / "vqvae" / "pictures"))
        self.epochs = epochs

    def on_epoch_begin(self, epoch, logs=None):
        """Draws what the first epoch begins with."""
        if epoch == 0:
            self._draw_frame("before the first epoch", 0)

    def _draw_frame(self, when, number):
        measured = self.measurements
        frame = figures.progress_frame(measured.shown, measured.reconstructions, self.model.settings["margin"],
                                       f"{when}: SSIM {measured.shown_ssim:.3f}")
        Image.fromarray(frame).save(self.frames_dir / f"{number:04d}.png")
        return frame

    def on_epoch_end(self, epoch, logs=None):
        """Draws what was measured."""
        measured = self.measurements
        frame = self._draw_frame(f"after epoch {epoch + 1} of {self.epochs}", epoch + 1)
        with tf.device("CPU"), self.writer.as_default(epoch):  # the GPU's memory is not for histograms
            tf.summary.image("reconstructions", frame[np.newaxis, ..., np.newaxis])
            tf.summary.histogram("codes", measured.codes, buckets=self.model.quantizer.num_embeddings)
            tf.summary.histogram("codebook", self.model.quantizer.embeddings)
        self.writer.flush()


class Writers(keras.callbacks.CallbackList):
    """Callbacks that write into the run's folder and compute nothing: what fails in them is a failure to write."""

    def __init__(self, run_dir, callbacks):
        super().__init__(callbacks)
        self.run_dir = run_dir

    def on_train_begin(self, logs=None):
        """Opens the files."""
        with writing(self.run_dir):
            super().on_train_begin(logs)

    def on_epoch_begin(self, epoch, logs=None):
        """Writes what there is before the epoch."""
        with writing(self.run_dir):
            super().on_epoch_begin(epoch, logs)

    def on_test_end(self, logs=None):
        """Writes what validation gave."""
        with writing(self.run_dir):
            super().on_test_end(logs)

    def on_epoch_end(self, epoch, logs=None):
        """Writes what the epoch gave."""
        with writing(self.run_dir):
            super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        """Closes the files."""
        with writing(self.run_dir):
            super().on_train_end(logs)


class Stopwatch(keras.callbacks.Callback):
    """Adds the seconds of each epoch to the logs, all that was measured before this callback's turn included."""

    def on_epoch_begin(self, epoch, logs=None):
        """Starts."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs):
        """Stops."""
        logs["seconds"] = time.perf_counter() - self.start


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


class Explosions(keras.callbacks.Callback):
    """Stops at the first loss that is no number, or beyond all measure.

    Args:
        best_path: .keras file of the best epoch so far.
    """

    def __init__(self, best_path):
        super().__init__()
        self.best_path = best_path

    def on_epoch_begin(self, epoch, logs=None):
        """Remembers the epoch."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs):
        """Looks at the loss.

        Raises:
            InputError: says at which epoch and step; what was saved before stays.
        """
        if not all(abs(value) < EXPLODED for value in logs.values()):
            saved = f" The best model before is in {self.best_path}." if self.best_path.exists() else ""
            raise InputError(f"Training {self.best_path.stem} went astray in epoch {self.epoch + 1}, step {batch + 1}: its loss is "
                             f"not a number any more, or beyond {EXPLODED:.0e}.{saved} Start again with a lower --learning-rate.")


class Checkpoints(keras.callbacks.Callback):
    """After each epoch: saves the model, to resume from; and, if it is the best on validation people, as the result.

    Args:
        stage: the `Stage`.
        run_dir: where {stage}.keras goes, the best epoch, and backup/{stage}.keras, the latest.
        best: the best value of the monitored log in the epochs before, or None.
    """

    def __init__(self, stage, run_dir, best=None):
        super().__init__()
        self.stage = stage
        self.best_path = run_dir / f"{stage.name}.keras"
        self.backup_path = run_dir / "backup" / f"{stage.name}.keras"
        self.best = best

    def on_epoch_end(self, epoch, logs):
        """Saves once, under a temporary name; copies it if it is the best; then renames.

        Once, because on several machines all have to take part in saving, and only the chief knows whether it is the best.
        """
        unfinished, copy = (self.backup_path.with_name(f"{word}-{self.backup_path.name}") for word in ("unfinished", "copy"))
        value = logs[self.stage.monitor]
        try:
            self.model.save(unfinished)
            with zipfile.ZipFile(unfinished, "a") as archive:
                archive.writestr(EPOCHS_FILE, json.dumps(epoch + 1))
            if self.best is None or (value != self.best and self.stage.better(value, self.best) == value):
                shutil.copyfile(unfinished, copy)
                copy.replace(self.best_path)
                self.best = value
            unfinished.replace(self.backup_path)
        finally:
            unfinished.unlink(missing_ok=True)
            copy.unlink(missing_ok=True)


class SavesNothing(keras.callbacks.Callback):
    """On machines other than the chief: takes part in saving the model, into a folder that is then removed."""

    def on_epoch_end(self, epoch, logs=None):
        """Saves and forgets."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(f"{folder}/model.keras")


def fit(stage, model, batches, validation, *, steps_per_epoch, first_epoch, epochs, seed, run_dir, measurements=None):
    """Runs Keras' fit for one stage, with the histories, logs and checkpoints that both have."""
    watching = [EpochSeeds(seed), Explosions(run_dir / f"{stage.name}.keras")]
    if devices.is_chief():
        with writing(run_dir):
            history_path = run_dir / f"{stage.name}_history.csv"
            done = trim_history(history_path, first_epoch)
        best = stage.better((float(row[stage.monitor]) for row in done), default=None)
        writers = [keras.callbacks.CSVLogger(history_path, append=bool(done)),
                   keras.callbacks.TensorBoard(run_dir / "logs" / stage.name, write_graph=False),
                   Checkpoints(stage, run_dir, best)]
        if measurements:
            with writing(run_dir):
                writers.insert(0, Pictures(measurements, run_dir, epochs))
            watching.append(measurements)
        # In this order: what is measured goes into the logs, then the logs are written, then the model, so that no epoch
        # counts as saved whose history is not.
        callbacks = [*watching, Stopwatch(), Writers(run_dir, writers)]
    else:
        callbacks = [*watching, SavesNothing()]
    verbose = 0 if not devices.is_chief() else 1 if sys.stdout.isatty() else 2
    model.fit(batches, validation_data=validation, steps_per_epoch=steps_per_epoch, epochs=epochs, initial_epoch=first_epoch,
              shuffle=False, verbose=verbose, callbacks=callbacks)


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


def load_for_all(path, build):
    """The model in a file that the chief alone need have; other machines of a cluster build theirs and get its weights.

    Raises:
        InputError: if the file is damaged.
    """
    with devices.fail_together():
        try:
            model = modules.load_model(path, compile=False) if devices.is_chief() else build()
        except ValueError as error:
            raise InputError(f"{error}; put back the file, or start a new run.") from error
    devices.broadcast_variables(model.variables)
    return model


def go_on(path, build, steps):
    """A model as `build` makes it for this machine, with weights and optimiser of a backup that the chief alone need have.

    Not the loaded model itself: Keras saves how it was compiled, which may not suit other devices than those it began on.

    Args:
        path: the backup.
        build: makes the model.
        steps: what the optimiser has made, counted in steps of the batches that are used now.

    Raises:
        InputError: if the file is damaged.
    """
    with devices.fail_together():  # before any variable is made, for which machines wait for each other
        try:
            saved = modules.load_model(path) if devices.is_chief() else None
        except ValueError as error:
            raise InputError(f"{error}; remove it to begin this stage again.") from error
    with devices.new_scope():
        model = build()
        model.optimizer.build(model.trainable_variables)
    variables = model.variables + model.optimizer.variables
    if saved is not None:
        for variable, value in zip(variables, saved.variables + saved.optimizer.variables, strict=True):
            variable.assign(np.asarray(value))
    devices.broadcast_variables(variables)
    model.optimizer.iterations.assign(steps)
    return model


def finished_epochs(path):
    """How many epochs the weights in a backup have seen; 0 if there is none. On all machines what the chief finds.

    Raises:
        InputError: if the file does not tell.
    """
    epochs = 0
    with devices.fail_together():
        if devices.is_chief() and path.exists():
            try:
                with zipfile.ZipFile(path) as archive:
                    epochs = int(json.loads(archive.read(EPOCHS_FILE)))
            except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
                raise InputError(f"{path} cannot be loaded ({error}); remove it to begin this stage again.") from error
    return int(devices.broadcast(epochs))


def adam(peak, total_steps):
    """Adam whose learning rate rises to `peak`, then falls to a fiftieth of it along a cosine."""
    steps = CONSTANTS["rising_steps"]
    rising = min(steps, total_steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(peak / steps, max(total_steps - rising, 1), alpha=0.02,
                                                      warmup_target=peak, warmup_steps=rising)
    return devices.Adam(schedule, beta_2=0.99, global_clipnorm=1.0)


def new_vqvae(config, steps_per_epoch):
    """A VQ-VAE with its optimiser, before any training."""
    settings = config["settings"]
    vqvae = modules.VQVAE(**config["vqvae"], dtype=devices.precision(settings["mixed_precision"]))
    total = CONSTANTS["warmup_steps"] + steps_per_epoch * settings["epochs"]
    vqvae.compile(adam(settings["learning_rate"], total), steps_per_execution=devices.steps_per_execution(steps_per_epoch))
    return vqvae


def train_vqvae(run_dir, config, splits):
    """Stage 1; returns the VQ-VAE of the epoch with the best SSIM on validation people."""
    settings, seed = config["settings"], config["settings"]["seed"]
    keras.utils.set_random_seed(seed)
    batch_size = devices.global_batch(settings["batch_size"], len(splits["train"].images))
    steps_per_epoch = len(splits["train"].images) // batch_size
    backup = run_dir / "backup" / "vqvae.keras"
    first_epoch = finished_epochs(backup)
    if first_epoch:
        vqvae = go_on(backup, lambda: new_vqvae(config, steps_per_epoch), CONSTANTS["warmup_steps"] + first_epoch * steps_per_epoch)
    else:
        with devices.new_scope():
            vqvae = new_vqvae(config, steps_per_epoch)
            devices.print_on_chief(f"{CONSTANTS['warmup_steps']} steps as a plain autoencoder, then the codebook starts at "
                                   "k-means centres ...")
            # Another seed than the epochs': the first of them then sees every image afresh.
            batches = dataset.training_batches(splits["train"], batch_size, seed + 1)
            try:
                vqvae.start_codebook(batches, CONSTANTS["warmup_steps"])
            except FloatingPointError as error:
                raise InputError(f"Training vqvae went astray at its start: {error}. "
                                 "Start again with a lower --learning-rate.") from error
    if first_epoch < settings["epochs"]:
        validation = dataset.image_batches(splits["validate"], 32)
        fit(VQVAE, vqvae, dataset.training_batches(splits["train"], batch_size, seed, first_epoch), validation,
            steps_per_epoch=steps_per_epoch, first_epoch=first_epoch, epochs=settings["epochs"], seed=seed, run_dir=run_dir,
            measurements=Measurements(splits, seed) if devices.is_chief() else None)
    if devices.is_chief():
        with writing(run_dir):
            figures.write_gif(sorted((run_dir / "backup" / "frames").glob("*.png")), run_dir / "progress.gif")
    return load_for_all(run_dir / "vqvae.keras", lambda: new_vqvae(config, steps_per_epoch))


def new_pixelcnn(config, vqvae, train_split, steps_per_epoch):
    """A PixelCNN for the codes of a VQ-VAE, with its optimiser, before any training."""
    settings = config["settings"]
    prior = modules.PixelCNN(**{**config["pixelcnn"], "codebook_digest": vqvae.quantizer.digest()},
                             dtype=devices.precision(settings["mixed_precision"]))
    prior.start_embeddings(vqvae.quantizer.embeddings, settings["seed"])
    prior.start_people(dataset.head_pictures(train_split, vqvae.settings["margin"])[0])
    prior.compile(adam(CONSTANTS["prior_learning_rate"], steps_per_epoch * settings["prior_epochs"]),
                  steps_per_execution=devices.steps_per_execution(steps_per_epoch))
    return prior


def train_pixelcnn(run_dir, config, vqvae, splits):
    """Stage 2; returns the PixelCNN of the epoch with the fewest bits per code on validation people."""
    settings, seed = config["settings"], config["settings"]["seed"]
    keras.utils.set_random_seed(seed)  # again, for this stage may have been resumed
    # Few people: mirrored heads are as good as new ones.
    versions = {"train": [splits["train"], splits["train"].mirrored()], "validate": [splits["validate"]]}
    codes = {name: np.stack([encode(vqvae, split) for split in some]) for name, some in versions.items()}
    batch_size = devices.global_batch(CONSTANTS["prior_batch_size"], len(splits["train"].images))
    steps_per_epoch = len(splits["train"].images) // batch_size
    backup = run_dir / "backup" / "pixelcnn.keras"
    first_epoch = finished_epochs(backup)
    check_codebook(backup, vqvae, run_dir)

    def build():
        return new_pixelcnn(config, vqvae, splits["train"], steps_per_epoch)

    if first_epoch:
        prior = go_on(backup, build, first_epoch * steps_per_epoch)
    else:
        with devices.new_scope():
            prior = build()
    if first_epoch < settings["prior_epochs"]:
        told = {}
        for name, some in versions.items():
            below, persons = zip(*(dataset.head_context(split, prior, vqvae.settings["margin"]) for split in some))
            told[name] = codes[name], some[0].positions, below[0], np.stack(persons), prior.num_embeddings
        fit(PIXELCNN, prior, dataset.code_batches(*told["train"], batch_size, seed, first_epoch),
            dataset.code_batches(*told["validate"], 32),
            steps_per_epoch=steps_per_epoch, first_epoch=first_epoch, epochs=settings["prior_epochs"], seed=seed, run_dir=run_dir)
    return load_for_all(run_dir / "pixelcnn.keras", build), codes["validate"][0]


def check_codebook(backup, vqvae, run_dir):
    """Compares the codebook that a prior's backup was trained on with the one there is; the chief does so for all.

    Raises:
        InputError: if it is another.
    """
    with devices.fail_together():
        if devices.is_chief() and backup.exists():
            try:
                digest = modules.load_model(backup, compile=False).settings["codebook_digest"]
            except ValueError as error:
                raise InputError(f"{error}; remove it to begin this stage again.") from error
            if digest != vqvae.quantizer.digest():
                raise InputError(f"{backup} was trained on the codes of another codebook than that of {run_dir / 'vqvae.keras'}; "
                                 "remove it to begin this stage again.")


def encode(vqvae, split):
    """The codes, int32 (N, g, g), of a split in its order."""
    return np.concatenate([vqvae.encode_to_codes(images) for images, _ in dataset.image_batches(split, 32)])


def draw_figures(run_dir, vqvae, prior, validation_codes, test_split, codes):
    """Draws the run's figures/*.png from its networks, its histories and its test images' codes."""
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
    originals, reconstructions = test_split.images[shown] / 255, metrics.to_unit(vqvae.decode_codes(codes[shown]))
    captions = [f"slice {position}, SSIM {metrics.ssim(original, reconstruction):.3f}"
                for position, original, reconstruction in zip(test_split.positions[shown], originals, reconstructions)]
    figures.reconstruction_grid(originals, reconstructions, codes[shown], captions,
                                figures.code_colours(vqvae.quantizer.embeddings), vqvae.settings["margin"],
                                folder / "reconstructions.png")


@contextlib.contextmanager
def stoppable(run_dir):
    """Ends on SIGINT and SIGTERM with one line; every finished epoch is saved already."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(f"Stopped. All finished epochs are saved; python train.py --run-dir {run_dir} --resume goes on.", file=sys.stderr)
        sys.exit(cli.EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


@cli.exit_on_input_error
def main(argv=None):
    """Runs both stages and measures the result on the test people."""
    arguments = parse_arguments(argv)
    device = devices.prepare()
    resume = f"finished epochs are saved, python train.py --run-dir {arguments.run_dir or 'RUN'} --resume goes on"
    with devices.report_failures(f"give a smaller --batch-size; {resume}", resume):
        devices.strategy()  # in a cluster it has to come before anything else of TensorFlow
        with open_run(arguments) as (run_dir, config, splits):
            people = ", ".join(f"{count} {name}" for name, count in config["data"]["people"].items())
            devices.print_on_chief(f"Run folder {run_dir}; {people} people in {config['data']['folder']}; on {device}.")
            for name in ("validate", "test") if devices.is_chief() else ():
                dataset.warn_of_lost_border(splits[name], config["vqvae"]["margin"])
            with stoppable(run_dir):
                run_stages(run_dir, config, splits)
    devices.print_on_chief(f"Done. Next: python predict.py --run-dir {run_dir}")


def run_stages(run_dir, config, splits):
    """Trains both networks; then the chief measures them on the test people and draws the figures."""
    settings = config["settings"]
    if devices.is_chief():
        with writing(run_dir):
            (run_dir / "backup" / "frames").mkdir(parents=True, exist_ok=True)
    devices.print_on_chief(f"Stage 1 of 2: VQ-VAE, {settings['epochs']} epochs.")
    vqvae = train_vqvae(run_dir, config, splits)
    devices.print_on_chief(f"Stage 2 of 2: PixelCNN prior, {settings['prior_epochs']} epochs.")
    prior, validation_codes = train_pixelcnn(run_dir, config, vqvae, splits)
    with devices.fail_together():  # the others wait: a cluster ends as one
        if devices.is_chief():
            calibrate(run_dir, vqvae, prior, splits["train"].num_people)
            measure(run_dir, vqvae, prior, validation_codes, splits)


def calibrate(run_dir, vqvae, prior, num_people):
    """Samples heads to see how they show the persons that they are told, and saves the prior that allows for it.

    The first heads are told persons as they are. Later ones are told what the earlier ones taught: that lies further out,
    where what is shown is no longer in proportion. All rounds are taken together.
    """
    count, rounds = min(CONSTANTS["calibration_heads"], num_people), CONSTANTS["calibration_rounds"]
    told, shown = [], []
    for index in range(rounds):
        print(f"Calibrating by {count} sampled heads, round {index + 1} of {rounds} ...", flush=True)
        seed = CALIBRATION_SEED - index
        persons = prior.draw_persons(seed, tf.range(count))
        told.append(prior.shift + prior.scale * persons if index else persons)
        codes = prior.sample_heads(count, seed, told=told[-1])
        images = np.concatenate([dataset.to_uint8(vqvae.decode_codes(head).numpy()[..., 0]) for head in codes])
        heads = dataset.Split("sampled", images, *np.indices(codes.shape[:2]).reshape(2, -1))
        shown.append(prior.persons(dataset.head_pictures(heads, vqvae.settings["margin"])[0]))
        prior.calibrate(np.concatenate(told), np.concatenate(shown))
    unfinished = run_dir / "backup" / "calibrated.keras"
    with writing(run_dir):
        prior.save(unfinished)
        unfinished.replace(run_dir / "pixelcnn.keras")


def measure(run_dir, vqvae, prior, validation_codes, splits):
    """Writes figures/ and metrics.json, by the test people."""
    print("Measuring on the test people ...", flush=True)
    measured, details = metrics.evaluate(vqvae, prior, dataset.image_batches(splits["test"], 32), splits["test"].positions,
                                         *dataset.head_context(splits["test"], prior, vqvae.settings["margin"]))
    with writing(run_dir):
        draw_figures(run_dir, vqvae, prior, validation_codes, splits["test"], details["codes"])
        cli.write_json(run_dir / "metrics.json", measured)
    shutil.rmtree(run_dir / "backup", ignore_errors=True)
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
