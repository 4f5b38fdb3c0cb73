"""Trains the VQ-VAE on brain slices, then the PixelCNN prior on its codes.

    python train.py                                          # OASIS if it is found, else the demo cohort in five minutes
    python train.py --data-dir DIR --run-dir runs/oasis
    python train.py --run-dir runs/oasis --resume            # goes on after the last finished epoch

All results lie in the run folder; README.md says what each file is.
"""

if __name__ == "__main__":
    import support.environment  # noqa: F401 (first: what TensorFlow, Keras and matplotlib read when imported)

import contextlib
import dataclasses
import inspect
import json
import os
from pathlib import Path

import keras
import numpy as np
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
import tensorflow as tf

import dataset
import modules
from support import (
    callbacks,
    cli,
    devices,
    figures,
    judge,
    metrics,
    optimizers,
    orientation,
    people,
    runs,
    sampler,
    synthetic,
    template,
    volumes,
)
from support.cli import UserError
from support.devices import print_on_chief
from support.files import write_json
from support.images import empty_margin, in_chunks, to_uint8, to_unit
from support.runs import Run

# Settings, most of them options, with their values where none is given.
DEFAULTS = {
    # data
    "limit": None,
    "orientation": None,
    "slice_spacing": None,
    # model
    "num_embeddings": 512,
    "embedding_dim": 16,
    "downsample": 8,
    "prior_dropout": 0.1,  # no option; it costs 6 % of the time, and the few epochs of the demo do without
    "calibration_heads": 64,  # no option; in each round, or as many as there are training people, if these are fewer
    # optimiser: small batches train better per second on a CPU
    "epochs": 20,
    "prior_epochs": 20,
    "batch_size": 8,
    "learning_rate": 2e-3,
    # system
    "seed": 0,
    "mixed_precision": False,
}
DEMO_DEFAULTS = {**DEFAULTS, "num_embeddings": 128, "prior_dropout": 0.0, "calibration_heads": 20,
                 "epochs": 4, "prior_epochs": 3}
NONE_IN_WORDS = {"limit": "all", "slice_spacing": "measured"}
# Not options. Saved in config.json; a run with other values cannot be resumed.
CONSTANTS = {
    "autoencoder_steps": 60,  # of plain autoencoding before the codebook starts
    "rising_steps": 100,  # over which the learning rate rises to its peak
    "prior_batch_size": 8,
    "prior_learning_rate": 3e-3,
    "calibration_rounds": 2,
    "condition_dropout": dataset.CONDITION_DROPOUT,
}

Settings = dataclasses.make_dataclass("Settings", [(name, type(value), value) for name, value in {**DEFAULTS, **CONSTANTS}.items() if not isinstance(value, dict)],
                                      frozen=True)


def parse_arguments(argv):
    """The command line; settings without an option are None."""
    parser = cli.script_parser(__doc__)
    parser.add_argument("--data-dir", metavar="DIR", help="folder of keras_png_slices_{train,validate,test} "
                        "(default: $OASIS_DIR, ./keras_png_slices_data, or the demo cohort)")
    parser.add_argument("--cache-dir", metavar="DIR", help="keep the decoded images here and map them into memory: data may be "
                        "larger than memory, and the next start takes a moment")
    parser.add_argument("--run-dir", metavar="DIR", help="folder for all results (default: runs/DATE-TIME)")
    for name, kind, minimum, metavar, text in (
            ("epochs", int, 1, "N", "epochs of the VQ-VAE"), ("prior-epochs", int, 1, "N", "epochs of the PixelCNN"),
            ("batch-size", int, 1, "B", "images per step of the VQ-VAE"),
            ("learning-rate", float, 1e-9, "R", "peak learning rate of the VQ-VAE"),
            ("num-embeddings", int, 2, "K", "codes in the codebook"), ("embedding-dim", int, 1, "D", "length of a code's vector"),
            ("seed", int, 0, "S", "of every draw"), ("limit", int, 1, "N", "use the first N people of each split only"),
            ("slice-spacing", float, 0.01, "MM", "between neighbouring slices")):
        key = name.replace("-", "_")
        default = f" (default: {NONE_IN_WORDS.get(key) or DEFAULTS[key]})" if DEFAULTS[key] == DEMO_DEFAULTS[key] else (
            f" (default: {DEFAULTS[key]}; demo cohort: {DEMO_DEFAULTS[key]})")
        maximum = cli.MAX_SEED if key == "seed" else float("inf")
        parser.add_argument(f"--{name}", type=cli.number(kind, minimum, maximum), metavar=metavar, help=text + default)
    parser.add_argument("--downsample", type=int, choices=(4, 8), help="side of an image over side of its grid of codes (default: 8)")
    parser.add_argument("--orientation", choices=[f"front-{side}" for side in orientation.FRONTS],
                        help="where the front of the head lies in the pictures (default: measured)")
    parser.add_argument("--mixed-precision", action="store_true", default=None,
                        help="compute in bfloat16 (GPUs of compute capability 8.0 and up; slower on most CPUs)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, by its own settings")
    return parser.parse_args(argv)


# The run --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_run(arguments):
    """Settles the run's folder, settings and data, and takes the folder for this training.

    On several machines the chief does so alone; the others get its config, and read the same data from their own disks.

    Yields:
        (a `Run`, dict of `dataset.Split`).

    Raises:
        UserError: if the folder holds another run or none to resume, or the data are unusable.
    """
    options = {key: value for key, value in vars(arguments).items() if key in DEFAULTS and value is not None}
    run = Run(Path(arguments.run_dir or runs.default_folder()), None)
    splits = None
    with contextlib.ExitStack() as stack:
        with devices.fail_together():
            if devices.is_chief():
                open_one = resumed_run if arguments.resume else new_run
                run, splits = open_one(run.folder, arguments, options)
                stack.enter_context(run.training(arguments.resume))
        run = Run(run.folder, json.loads(devices.broadcast_text(json.dumps(run.config))))
        with devices.fail_together():
            if not devices.is_chief():
                devices.check_precision(run.settings["mixed_precision"])
                arguments.data_dir = arguments.data_dir or os.environ.get("OASIS_DIR")  # this machine's own, if there is one
                splits = matching_splits(arguments, run)
        yield run, splits


def new_run(folder, arguments, options):
    """A `Run` that begins, and its data; `options` are the settings of the command line."""
    if folder.exists() and (not folder.is_dir() or any(path.name != ".config.json" for path in folder.iterdir())):
        raise UserError(f"{folder} is not empty; give another --run-dir, or --resume to go on with the run in it.")
    data_dir, is_demo = dataset.find_data(arguments.data_dir)
    settings = {**(DEMO_DEFAULTS if is_demo else DEFAULTS), **options}
    devices.check_precision(settings["mixed_precision"])
    front, geometry = find_geometry(data_dir, is_demo, settings)
    splits = dataset.load_splits(data_dir, limit=settings["limit"], cache_dir=arguments.cache_dir, front=front)
    train = splits["train"]
    vqvae = vqvae_arguments(train, settings)
    devices.global_batch(settings["batch_size"], len(train.images))
    prior = {"grid_size": vqvae["image_size"] // settings["downsample"], "num_embeddings": settings["num_embeddings"],
             "dropout": settings["prior_dropout"], "num_positions": volumes.NUM_POSITIONS, "slice_positions": np.unique(train.positions).tolist()}
    config = {"settings": settings, "constants": CONSTANTS, "vqvae": with_defaults(modules.VQVAE, vqvae),
              "pixelcnn": with_defaults(modules.PixelCNN, prior),
              "data": {"folder": str(data_dir.resolve()), "is_demo": is_demo, "is_simulated": template.is_simulated(data_dir),
                       "is_synthetic": synthetic.is_synthetic(data_dir), "fingerprints": dataset.fingerprints(splits),
                       "front": front, "geometry": dataclasses.asdict(geometry),
                       "images": {name: len(split.images) for name, split in splits.items()},
                       "people": {name: split.num_people for name, split in splits.items()}},
              "machine": runs.build_info(), "git_commit": runs.git_commit()}
    return Run(folder, config), splits


def find_geometry(data_dir, is_demo, settings):
    """Which side of the slices is the front, or None, and their `volumes.SliceGeometry`: as stated or measured; prints a line of it."""
    front, spacing = (settings["orientation"] or "").removeprefix("front-") or None, settings["slice_spacing"]
    if is_demo and not front and not spacing:
        return "up", volumes.SliceGeometry(pixel_size=volumes.FRAME_MM / template.DEMO_IMAGE_SIZE)  # as it was simulated
    front, geometry, line = dataset.find_geometry(data_dir, settings["limit"], front, spacing)
    print(line, flush=True)
    return front, geometry


def with_defaults(model, arguments):
    """All arguments of a model's constructor: these, and the defaults of the rest."""
    parameters = inspect.signature(model).parameters.values()
    return {parameter.name: arguments.get(parameter.name, parameter.default) for parameter in parameters
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}


def vqvae_arguments(split, settings):
    """The arguments of `modules.VQVAE` for the training split and the settings.

    Raises:
        UserError: if no model fits the images.
    """
    height, width = split.images.shape[1:]
    if height != width or height % 32:
        raise UserError(f"The images are {width}x{height} pixels; the networks need squares of a multiple of 32, "
                         "so pad them with black.")
    return {"image_size": height, "num_embeddings": settings["num_embeddings"], "embedding_dim": settings["embedding_dim"],
            "downsample": settings["downsample"], "seed": settings["seed"],
            # The border that is black in all training images gets no codes; a quarter of the side must remain.
            "margin": min(empty_margin(split.images, height // 8), 3 * height // 8),
            "data_variance": max(dataset.pixel_statistics(split.images)[1], 1e-6)}


def resumed_run(folder, arguments, options):
    """A `Run` that goes on, and its data.

    Raises:
        UserError: if there is none, the command line contradicts it, or its data are others now.
    """
    if not arguments.run_dir:
        raise UserError("--resume needs --run-dir: the folder of the run to go on with.")
    run = Run.load(folder)
    for key, value in options.items():
        if value != run.settings.get(key):
            raise UserError(f"--{key.replace('_', '-')} {value} differs from the {run.settings.get(key)} that {folder} "
                             "began with; resume without it or start a new run.")
    constants = run.config["constants"]
    for key in CONSTANTS.keys() | constants.keys():
        if constants.get(key) != CONSTANTS.get(key):
            raise UserError(f"{folder} began with {key} {constants.get(key)}, but this version of train.py has "
                             f"{CONSTANTS.get(key)}; check out commit {run.config.get('git_commit')} or start a new run.")
    devices.check_precision(run.settings["mixed_precision"])
    return run, matching_splits(arguments, run)


def matching_splits(arguments, run):
    """The splits that a run began with.

    Raises:
        UserError: if they are others.
    """
    data = run.config["data"]
    folder = arguments.data_dir or data["folder"]
    if data["is_demo"] and not Path(folder).is_dir():
        folder = template.make_demo_cohort()  # another machine than the one that began
    splits = dataset.load_splits(folder, limit=run.settings["limit"], cache_dir=arguments.cache_dir, front=data["front"])
    if dataset.fingerprints(splits) != data["fingerprints"]:
        raise UserError(f"The data in {folder} are not those that {run.folder} began with; resume with the same data or start a "
                         "new run.")
    return splits


# What is measured after each epoch ------------------------------------------------------------------------------------


class Measurements(keras.callbacks.Callback):
    """After each epoch of stage 1: SSIM and code use, into the logs. Goes before all callbacks that write logs.

    Args:
        splits: dict of `dataset.Split`.
        seed: of the random test images.

    Attributes:
        examples: uint8 (4, H, W), test images for the pictures.
        reconstructions: uint8 (4, H, W), of the examples, after the last epoch or at the start.
        examples_ssim: their mean SSIM.
        codes: int32 (N, g, g), of the validation images.
    """

    def __init__(self, splits, seed):
        super().__init__()
        self.validation = splits["validate"].images[splits["validate"].spread(128)]
        self.test = splits["test"].images
        self.examples = self.test[splits["test"].examples(4)]
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        """Before the first epoch, reconstructs, for a picture to compare with."""
        if epoch == 0:
            self.examples_ssim, _, self.reconstructions = self._reconstruct(self.examples)

    def on_epoch_end(self, epoch, logs):
        """Adds to the logs: val_ssim, val_perplexity, val_codes_used, and test_ssim."""
        logs["val_ssim"], self.codes, _ = self._reconstruct(self.validation)
        use = metrics.code_metrics(self.codes, self.model.quantizer.num_embeddings)
        logs["val_perplexity"], logs["val_codes_used"] = use["perplexity"], use["codes_used"]
        rng = np.random.default_rng([self.seed, epoch])
        indices = rng.choice(len(self.test), min(10, len(self.test)), replace=False)
        logs["test_ssim"], _, _ = self._reconstruct(self.test[indices])
        self.examples_ssim, _, self.reconstructions = self._reconstruct(self.examples)

    def _reconstruct(self, images):
        """uint8 (N, H, W) -> (mean SSIM, codes, uint8 reconstructions)."""
        codes = in_chunks(lambda chunk: self.model.encode_to_codes(dataset.normalise(chunk)[..., tf.newaxis]), images)
        decoded = in_chunks(self.model.decode_codes, codes)
        pairs = zip(images / 255, to_unit(decoded))
        return float(np.mean([metrics.ssim(*pair) for pair in pairs])), codes, to_uint8(decoded[..., 0])


class Pictures(keras.callbacks.Callback):
    """After each epoch of stage 1: the frame of the GIF; images and histograms for TensorBoard.

    Args:
        measurements: the `Measurements` that went before.
        run: the `Run`.
    """

    def __init__(self, measurements, run):
        super().__init__()
        self.measurements = measurements
        self.frames_dir, self.epochs = run.frames_dir, run.settings["epochs"]
        self.writer = tf.summary.create_file_writer(str(run.folder / "logs" / "vqvae" / "pictures"))

    def on_epoch_begin(self, epoch, logs=None):
        """Draws what the first epoch begins with."""
        if epoch == 0:
            self._draw_frame("before the first epoch", 0)

    def _draw_frame(self, when, number):
        measurements = self.measurements
        frame = figures.progress_frame(measurements.examples, measurements.reconstructions, self.model.margin,
                                       f"{when}: SSIM {measurements.examples_ssim:.3f}")
        Image.fromarray(frame).save(self.frames_dir / f"{number:04d}.png")
        return frame

    def on_epoch_end(self, epoch, logs=None):
        """Draws what was measured."""
        measurements = self.measurements
        frame = self._draw_frame(f"after epoch {epoch + 1} of {self.epochs}", epoch + 1)
        with tf.device("CPU"), self.writer.as_default(epoch):  # the GPU's memory is not for histograms
            tf.summary.image("reconstructions", frame[np.newaxis, ..., np.newaxis])
            tf.summary.histogram("codes", measurements.codes, buckets=self.model.quantizer.num_embeddings)
            tf.summary.histogram("codebook", self.model.quantizer.embeddings)
        self.writer.flush()


# The stages -----------------------------------------------------------------------------------------------------------


def fit(run, name, model, batches, validation, *, steps_per_epoch, first_epoch, monitor, mode, line, advice, pictures=None):
    """Runs Keras' fit for one stage, with the histories, logs and checkpoints that both have.

    Args:
        run: the `Run`.
        name: "vqvae" or "pixelcnn".
        model: the compiled model.
        batches: endless training batches.
        validation: validation batches.
        steps_per_epoch: of `batches`.
        first_epoch: the first one to run; those before are in the history.
        monitor: the log that tells the best epoch.
        mode: "max" or "min", which values of it are better.
        line: what is printed of an epoch's logs; see `callbacks.EpochLines`.
        advice: what to do if the loss diverges.
        pictures: the callbacks that measure and draw, on the chief only.
    """
    epochs = run.settings["epochs" if name == "vqvae" else "prior_epochs"]
    all_callbacks = [callbacks.EpochSeeds(run.seed), callbacks.StopOnDivergence(run.model_path(name), advice)]
    if devices.is_chief():
        history = run.trim_history(name, first_epoch)
        measuring, drawing = pictures() if pictures else ([], [])
        best = (max if mode == "max" else min)((float(row[monitor]) for row in history), default=None)
        writers = [*drawing, keras.callbacks.CSVLogger(run.history_path(name), append=bool(history)),
                   keras.callbacks.TensorBoard(run.folder / "logs" / name, write_graph=False),
                   callbacks.Checkpoints(run, name, monitor, mode, best)]
        # In this order: what is measured goes into the logs, then the logs are written, then the model, so that a saved
        # epoch always has its history row.
        all_callbacks += [*measuring, callbacks.Stopwatch(), callbacks.EpochLines(epochs, steps_per_epoch, line),
                 *writers]
    else:
        all_callbacks.append(callbacks.SaveWithChief())
    model.fit(batches, validation_data=validation, steps_per_epoch=steps_per_epoch, epochs=epochs, initial_epoch=first_epoch,
              shuffle=False, verbose=0, callbacks=all_callbacks)


def load_for_all(path, build):
    """The model in a file that the chief alone need have; other machines of a cluster build theirs and get its weights.

    Raises:
        UserError: if the file is damaged.
    """
    with devices.fail_together():
        try:
            model = modules.load_model(path, compile=False) if devices.is_chief() else build()
        except ValueError as error:
            raise UserError(f"{error}; put back the file, or start a new run.") from error
    devices.broadcast_variables(model.variables)
    return model


def resume_model(path, build, steps):
    """A model as `build` makes it for this machine, with weights and optimiser of a backup that the chief alone need have.

    Not the saved model itself: Keras saves how it was compiled, which may not suit other devices than those it began on.

    Args:
        path: the backup.
        build: makes the model.
        steps: what the optimiser has made, counted in steps of the batches that are used now.

    Raises:
        UserError: if the file is damaged.
    """
    with devices.new_scope():
        model = build()
        model.optimizer.build(model.trainable_variables)
    with devices.fail_together():
        try:
            if devices.is_chief():
                modules.load_weights(model, path)
        except ValueError as error:
            raise UserError(f"{error}; remove it to begin this stage again.") from error
    devices.broadcast_variables(model.variables + model.optimizer.variables)
    model.optimizer.iterations.assign(steps)
    return model


def finished_epochs(run, name):
    """`Run.finished_epochs` of the chief, on all machines."""
    with devices.fail_together():
        epochs = run.finished_epochs(name) if devices.is_chief() else 0
    return int(devices.broadcast(epochs))


def new_optimizer(peak, total_steps):
    """`optimizers.Muon` whose learning rate rises to `peak`, then falls to a fiftieth of it along a cosine."""
    steps = CONSTANTS["rising_steps"]
    rising = min(steps, total_steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(peak / steps, max(total_steps - rising, 1), alpha=0.02,
                                                      warmup_target=peak, warmup_steps=rising)
    return optimizers.Muon(schedule, beta_2=0.99, global_clipnorm=1.0)


def new_vqvae(run, steps_per_epoch):
    """A VQ-VAE with its optimiser, before any training."""
    settings = run.settings
    vqvae = modules.VQVAE(**run.config["vqvae"], dtype=devices.precision(settings["mixed_precision"]))
    total = CONSTANTS["autoencoder_steps"] + steps_per_epoch * settings["epochs"]
    vqvae.compile(new_optimizer(settings["learning_rate"], total), steps_per_execution=devices.steps_per_execution(steps_per_epoch))
    return vqvae


def start_codebook(vqvae, batches, autoencoder_steps, fit_batches=8):
    """Trains a VQ-VAE as a plain autoencoder for a few steps, then starts its codebook at k-means centres of real vectors.

    A random codebook lets most codes die unused; one fitted to vectors that already mean something does not.

    Args:
        vqvae: a compiled `modules.VQVAE`.
        batches: iterable of (images, positions); `autoencoder_steps` of them train, then `fit_batches` (more, if the codebook
            needs more vectors) are encoded.
        autoencoder_steps: optimiser steps without quantisation.
        fit_batches: batches for k-means.

    Raises:
        UserError: if the warm-up diverged.
    """
    batches, quantizer = iter(batches), vqvae.quantizer
    vqvae.optimizer.build(vqvae.trainable_variables)
    # On many devices each trains on the whole batch here; the mean of equal gradients is the gradient.
    step = tf.function(lambda images: vqvae.distribute_strategy.run(vqvae.step, args=(images, False)))
    for _ in range(autoencoder_steps):
        step(next(batches)[0])
    vectors = []
    while len(vectors) < fit_batches or sum(map(len, vectors)) < quantizer.num_embeddings:
        vectors.append(np.reshape(vqvae.encode(next(batches)[0]), (-1, quantizer.embedding_dim)))
    vectors = np.concatenate(vectors).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise UserError("Training vqvae diverged at its start: the encoder's outputs are not numbers. "
                         "Start again with a lower --learning-rate.")
    kmeans = MiniBatchKMeans(quantizer.num_embeddings, batch_size=4096, max_iter=20, n_init=1, random_state=quantizer.seed)
    counts = np.bincount(kmeans.fit_predict(vectors), minlength=quantizer.num_embeddings)
    quantizer.start(kmeans.cluster_centers_, counts)


def train_vqvae(run, splits):
    """Stage 1; returns the VQ-VAE of the epoch with the best SSIM on validation people."""
    train, epochs = splits["train"], run.settings["epochs"]
    print_on_chief(f"Stage 1 of 2: VQ-VAE, {epochs} epochs.")
    keras.utils.set_random_seed(run.seed)
    batch_size = devices.global_batch(run.settings["batch_size"], len(train.images))
    steps_per_epoch = len(train.images) // batch_size
    first_epoch = finished_epochs(run, "vqvae")

    def build():
        return new_vqvae(run, steps_per_epoch)

    def pictures():
        measurements = Measurements(splits, run.seed)
        return [measurements], [Pictures(measurements, run)]

    if first_epoch:
        vqvae = resume_model(run.backup_path("vqvae"), build, CONSTANTS["autoencoder_steps"] + first_epoch * steps_per_epoch)
    else:
        with devices.new_scope():
            vqvae = build()
            # Another seed than the epochs': the first of them then sees every image afresh.
            start_codebook(vqvae, dataset.training_batches(train, batch_size, run.seed + 1), CONSTANTS["autoencoder_steps"])
    if first_epoch < epochs:
        fit(run, "vqvae", vqvae, dataset.training_batches(train, batch_size, run.seed, first_epoch),
            dataset.image_batches(splits["validate"], 32), steps_per_epoch=steps_per_epoch, first_epoch=first_epoch,
            monitor="val_ssim", mode="max", pictures=pictures, advice="start again with a lower --learning-rate",
            line="SSIM {val_ssim:.3f} on validation people, error {reconstruction_loss:.3f}, {val_codes_used} codes used")
    if devices.is_chief():
        figures.write_gif(sorted(run.frames_dir.glob("*.png")), run.folder / "progress.gif")
    return load_for_all(run.model_path("vqvae"), build)


def start_embeddings(prior, codebook, seed):
    """Starts the codes' input and output weights from a codebook, (K, D), so that similar codes begin alike.

    All are random projections of the standardised codebook: what is learned of one code holds for its neighbours in
    the codebook from the first step on.
    """
    rng = np.random.default_rng(seed)
    codebook = np.asarray(codebook)
    codebook = (codebook - codebook.mean(axis=0)) / codebook.std()
    length = codebook.shape[1]
    for embedding in (prior.code_embedding, *prior.context_embeddings):
        projected = codebook @ rng.normal(0, 0.3 / length ** 0.5, (length, prior.num_filters))
        embedding.embeddings.assign(np.pad(projected, [[0, embedding.input_dim - len(codebook)], [0, 0]]))
    kernel = prior.logits.layers[-1].kernel
    kernel.assign(rng.normal(0, 1 / (length * kernel.shape[0]) ** 0.5, (kernel.shape[0], length)) @ codebook.T)


def new_pixelcnn(run, vqvae, train_split, steps_per_epoch):
    """A PixelCNN for the codes of a VQ-VAE, with its optimiser, before any training."""
    settings = run.settings
    prior = modules.PixelCNN(**{**run.config["pixelcnn"], "codebook_digest": vqvae.quantizer.digest()},
                             dtype=devices.precision(settings["mixed_precision"]))
    start_embeddings(prior, vqvae.quantizer.embeddings, run.seed)
    prior.fit_people(dataset.head_pictures(train_split, vqvae.margin)[0])
    total = steps_per_epoch * settings["prior_epochs"]
    prior.compile(new_optimizer(CONSTANTS["prior_learning_rate"], total),
                  steps_per_execution=devices.steps_per_execution(steps_per_epoch))
    return prior


def train_pixelcnn(run, vqvae, splits):
    """Stage 2; returns the PixelCNN of the epoch with the fewest bits per code on validation people."""
    train, epochs = splits["train"], run.settings["prior_epochs"]
    print_on_chief(f"Stage 2 of 2: PixelCNN prior, {epochs} epochs.")
    keras.utils.set_random_seed(run.seed)  # again, for this stage may have been resumed
    batch_size = devices.global_batch(CONSTANTS["prior_batch_size"], len(train.images))
    steps_per_epoch = len(train.images) // batch_size
    backup = run.backup_path("pixelcnn")
    first_epoch = finished_epochs(run, "pixelcnn")
    check_codebook(backup, vqvae, run)

    def build():
        return new_pixelcnn(run, vqvae, train, steps_per_epoch)

    if first_epoch:
        prior = resume_model(backup, build, first_epoch * steps_per_epoch)
    else:
        with devices.new_scope():
            prior = build()
    if first_epoch < epochs:
        # Few people: mirrored heads are as good as new ones, where it is known which way left and right lie.
        versions = [train, train.mirrored()] if run.config["data"]["front"] else [train]
        fit(run, "pixelcnn", prior,
            dataset.code_batches(dataset.encode_split(vqvae, prior, *versions), batch_size, run.seed, first_epoch),
            dataset.code_batches(dataset.encode_split(vqvae, prior, splits["validate"]), 32),
            steps_per_epoch=steps_per_epoch, first_epoch=first_epoch, monitor="val_bits_per_code", mode="min",
            advice="start again with another --seed, or a lower prior_learning_rate in train.py",
            line="{val_bits_per_code:.3f} bits per code in a head, {val_bits_per_code_alone:.3f} in a slice alone, on validation people")
    return load_for_all(run.model_path("pixelcnn"), build)


def check_codebook(backup, vqvae, run):
    """Compares the codebook that a prior's backup was trained on with the one there is; the chief does so for all.

    Raises:
        UserError: if it is another.
    """
    with devices.fail_together():
        if devices.is_chief() and backup.exists():
            try:
                prior = modules.load_model(backup, compile=False)
                modules.check_match(vqvae, prior)
            except ValueError as error:
                raise UserError(f"{backup} does not go with {run.model_path('vqvae')} ({error}); remove it to begin this stage "
                                 "again.") from error


def calibrate_prior(run, vqvae, prior, num_people):
    """Measures how strongly sampled heads follow their person, corrects it (see `people.calibrate`) and saves the prior.

    The first round's heads get persons without correction; those of each further round are corrected by the rounds before:
    their persons lie further out, where the outcome is no longer in proportion. All rounds are taken together.
    """
    count, rounds = min(run.settings["calibration_heads"], num_people), CONSTANTS["calibration_rounds"]
    conditions, outcomes = [], []
    prior.person_shift.assign(tf.zeros_like(prior.person_shift))  # of a run that was stopped after it was calibrated
    prior.person_scale.assign(tf.ones_like(prior.person_scale))
    for number in range(1, rounds + 1):
        print(f"Calibrating by {count} sampled heads, round {number} of {rounds} ...", flush=True)
        stream = f"calibration {number}"
        conditions.append(sampler.calibrated_people(prior, run.seed, stream, tf.range(count)).numpy())
        codes = sampler.sample_heads(prior, count, run.seed, persons=conditions[-1], stream=stream)
        images = np.stack([to_uint8(vqvae.decode_codes(head).numpy()[..., 0]) for head in codes])
        heads = dataset.Split.from_heads(images, prior.slice_positions)
        outcomes.append(prior.encode_people(dataset.head_pictures(heads, vqvae.margin)[0]))
        shift, scale = people.calibrate(np.concatenate(conditions), np.concatenate(outcomes))
        prior.person_shift.assign(shift)
        prior.person_scale.assign(scale)


def fit_ventricles(run, prior, train, margin):
    """Writes ventricles.json: how the size of ventricles follows from a person, for predict.py --ventricles; see `people`.

    Needs three people. The size is the `dark_fraction` of `judge.tissue_statistics`, the mean over a head. It is given to no network.
    """
    cases, head_numbers = np.unique(train.cases, return_inverse=True)
    if len(cases) < 3:
        return
    dark = judge.tissue_statistics(train.images)["dark_fraction"]
    sizes = np.bincount(head_numbers, dark) / np.bincount(head_numbers)
    weights, offset = people.fit_measure(prior.encode_people(dataset.head_pictures(train, margin)[0]), sizes)
    quantiles = np.quantile(sizes, np.linspace(0, 1, people.NUM_QUANTILES))
    write_json(run.ventricles_path, {"weights": weights.tolist(), "offset": offset, "quantiles": quantiles.tolist()})


# The results ----------------------------------------------------------------------------------------------------------


def measure(run, vqvae, prior, splits):
    """Writes figures/ and metrics.json, by the test people, and prints the main results."""
    print("Measuring on the test people ...", flush=True)
    test = splits["test"]
    coded = dataset.encode_split(vqvae, prior, test)
    measured, _ = metrics.evaluate(vqvae, prior, dataset.image_batches(test, 32), coded, test.cases)
    baselines = metrics.baselines(splits["train"].images, test.images)
    draw_figures(run, vqvae, prior, splits, coded.codes[0])
    write_json(run.metrics_path, measured)
    run.remove_backup()
    print_results(measured, baselines, test, vqvae)


def draw_figures(run, vqvae, prior, splits, codes):
    """Draws the run's figures/*.png from its networks, its histories and its test images' codes."""
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    test = splits["test"]
    history = run.read_history("vqvae")
    figures.plot_losses(history, folder / "losses.png")
    figures.plot_ssim(history, folder / "ssim.png")
    validation_codes = dataset.encode(vqvae, splits["validate"])
    entropy = metrics.code_metrics(validation_codes, prior.num_embeddings)["code_entropy"]
    figures.plot_prior(run.read_history("pixelcnn"), entropy, folder / "prior.png")
    examples = test.examples(4)
    originals, reconstructions = test.images[examples] / 255, to_unit(vqvae.decode_codes(codes[examples]))
    captions = [f"slice {position}, SSIM {metrics.ssim(original, reconstruction):.3f}"
                for position, original, reconstruction in zip(test.positions[examples], originals, reconstructions)]
    figures.reconstruction_grid(originals, reconstructions, codes[examples], captions,
                                figures.code_colours(vqvae.quantizer.embeddings), vqvae.margin, folder / "reconstructions.png")


def print_results(measured, baselines, test, vqvae):
    """Prints the main results in words, beside two baselines that need no model."""
    mean, blur = baselines["mean_image"], baselines["blurred_original"]
    print(f"""Results on {len(test.images)} images of {test.num_people} test people; in brackets: the mean training image, the original blurred.
  structural similarity (SSIM)  {measured['ssim']:.3f}    ({mean['ssim']:.3f}, {blur['ssim']:.3f})
  SSIM inside the brain         {measured['ssim_foreground']:.3f}    ({mean['ssim_foreground']:.3f}, {blur['ssim_foreground']:.3f})
  peak signal-to-noise ratio    {measured['psnr']:.1f} dB  ({mean['psnr']:.1f}, {blur['psnr']:.1f})
  size                          {measured['bytes_per_image']:.0f} bytes per image, of {vqvae.image_size ** 2:,} pixels
  code length                   {measured['bits_per_code']:.2f} bits per code within a head, {measured['bits_per_code_alone']:.2f} of a slice alone""")


# The command ----------------------------------------------------------------------------------------------------------


def run_stages(run, splits):
    """Trains both networks; then the chief calibrates the prior, measures on the test people and draws the figures."""
    vqvae = train_vqvae(run, splits)
    prior = train_pixelcnn(run, vqvae, splits)
    with devices.fail_together():  # the others wait: a cluster ends as one
        if devices.is_chief():
            calibrate_prior(run, vqvae, prior, splits["train"].num_people)
            fit_ventricles(run, prior, splits["train"], vqvae.margin)
            for name, model in (("vqvae", vqvae), ("pixelcnn", prior)):
                run.save(name, model)  # without the optimiser, which the results do not need
            measure(run, vqvae, prior, splits)


@cli.exit_on_user_error
def main(argv=None):
    """Runs both stages and measures the result on the test people."""
    arguments = parse_arguments(argv)
    device = devices.prepare()
    resume = f"finished epochs are saved, python train.py --run-dir {arguments.run_dir or 'RUN'} --resume goes on"
    with devices.report_failures(f"give a smaller --batch-size; {resume}", resume):
        devices.strategy()  # in a cluster it has to come before anything else of TensorFlow
        with open_run(arguments) as (run, splits):
            counts = ", ".join(f"{count} {name}" for name, count in run.config["data"]["people"].items())
            print_on_chief(f"Run folder {run.folder}; {counts} people in {run.config['data']['folder']}; on {device}.")
            if run.notice and not run.config["data"]["is_demo"]:  # of the demo cohort all was said when it was found
                print_on_chief(run.notice)
            for name in ("validate", "test") if devices.is_chief() else ():
                dataset.warn_of_lost_border(name, splits[name].images, run.config["vqvae"]["margin"])
            with cli.message_on_signals(f"Stopped. All finished epochs are saved; python train.py --run-dir {run.folder} --resume goes on."):
                run_stages(run, splits)
    print_on_chief(f"Done. Next: python predict.py --run-dir {run.folder}")


if __name__ == "__main__":
    main()
