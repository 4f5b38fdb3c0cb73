"""Trains the VQ-VAE on brain slices, then the PixelCNN prior on its codes.

    python train.py                                  # OASIS if it is found, else the demo cohort (minutes)
    python train.py --data-dir DIR --run-dir runs/oasis
    python train.py --run-dir runs/oasis --resume    # goes on after the last finished epoch, or begins
    python train.py --data-dir DIR --start-from assets/pretrained    # fine-tunes trained weights

All results lie in the run folder; README.md says what each file is.
"""

if __name__ == "__main__":
    import support.environment  # noqa: F401 (first: what TensorFlow and Keras read when they are imported)

import contextlib
import dataclasses
from operator import itemgetter
import os
from pathlib import Path
import shutil

import keras
import numpy as np
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import RidgeCV
import tensorflow as tf

import dataset
import modules
from support import cli, devices, figures, judge, metrics, orientation, people, runs, sampler, stages
from support.cli import UserError
from support.files import whole_file, whole_folder, write_json
from support.images import empty_margin, FOREGROUND, in_chunks, spread, to_uint8, to_unit
from support.runs import Run
from support.synthetic import is_synthetic
from support.template import is_simulated, make_demo_cohort
from support.volumes import FRAME_MM, head_extent


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a training, kept in config.json. Most have an option; the others are changed here."""

    # data
    limit: int | None = None  # use the first N people of each split only
    orientation: str | None = None  # "front-up", ...; None: measured
    slice_spacing: float | None = None  # mm; None: measured
    # stage 1, the VQ-VAE
    num_embeddings: int = 512  # codes in the codebook
    embedding_dim: int = 16  # length of a code's vector
    downsample: int = 8  # pixels per code along each axis, 4 or 8
    epochs: int = 20
    batch_size: int = 8  # small batches train better per second on a CPU
    learning_rate: float = 2e-3  # at its peak
    autoencoder_steps: int = 60  # of plain autoencoding before the codebook starts
    decoder_epochs: int = 8  # of the decoder alone, at the end: it then sees the codes of three slices
    decoder_learning_rate: float = 2e-3
    # stage 2, the PixelCNN
    prior_epochs: int = 20
    prior_batch_size: int = 8
    prior_learning_rate: float = 3e-3
    prior_weight_decay: float = 0.1  # of its kernels, see `optimizers.Muon`
    prior_dropout: float = 0.1  # it costs 6 % of the time, and the few epochs of the demo do without
    # The share of wrong codes that the prior is told of when it samples heads. On the real slices judges
    # found heads with an AUC of 0.82 at a share of 0, of 0.73 at 0.1, of 0.86 at 0.2.
    context_noise: float = 0.1
    calibration_heads: int = 64  # sampled in each round; no more than there are training people
    calibration_rounds: int = 2
    # both
    rising_steps: int = 100  # over which the learning rate rises to its peak
    seed: int = 0  # of every draw
    mixed_precision: bool = False


SHAPE = "num_embeddings", "embedding_dim", "downsample"  # settings that --start-from takes from its run
DEMO = Settings(num_embeddings=128, epochs=4, decoder_epochs=2, prior_epochs=3, prior_dropout=0.0,
                calibration_heads=20)

# Printed at the end: what `metrics.evaluate` and `metrics.baselines` measured, for `str.format`
RESULTS = """\
Results on {num_images} images of {people} people; in brackets: the mean training image, the original blurred.
  SSIM               {ssim:.3f}     ({mean[ssim]:.3f}, {blurred[ssim]:.3f})
  SSIM in the brain  {ssim_foreground:.3f}     ({mean[ssim_foreground]:.3f}, {blurred[ssim_foreground]:.3f})
  PSNR               {psnr:.1f} dB   ({mean[psnr]:.1f}, {blurred[psnr]:.1f})
  size               {bytes_per_image:.0f} bytes per image, of {pixels:,} pixels
  code length        {bits_per_code:.2f} bits per code in a head, {bits_per_code_alone:.2f} in a lone slice"""


def parse_arguments(argv):
    """The command line; settings without an option are None."""
    parser = cli.script_parser(__doc__)
    add, default, count = parser.add_argument, Settings(), {"type": cli.number(int, 1), "metavar": "N"}
    add("--data-dir", metavar="DIR", help="folder of keras_png_slices_{train,validate,test} "
        "(default: $OASIS_DIR, ./keras_png_slices_data, or the demo cohort)")
    add("--cache-dir", metavar="DIR", help="keep the images here, mapped: data may be larger than memory")
    add("--run-dir", metavar="DIR", help="for all results (default: runs/DATE-TIME)")
    add("--epochs", **count, help=f"of the VQ-VAE (default: {default.epochs}; demo cohort: {DEMO.epochs})")
    add("--prior-epochs", **count,
        help=f"of the PixelCNN (default: {default.prior_epochs}; demo cohort: {DEMO.prior_epochs})")
    add("--batch-size", **count, help=f"images per step of the VQ-VAE (default: {default.batch_size})")
    add("--learning-rate", type=cli.number(float, 1e-9), metavar="R",
        help=f"of the VQ-VAE, at its peak (default: {default.learning_rate})")
    add("--num-embeddings", type=cli.number(int, 2), metavar="K",
        help=f"codes in the codebook (default: {default.num_embeddings}; demo cohort: {DEMO.num_embeddings})")
    add("--embedding-dim", **count, help=f"length of a code's vector (default: {default.embedding_dim})")
    add("--downsample", type=int, choices=(4, 8), help=f"pixels per code (default: {default.downsample})")
    add("--seed", type=cli.number(int, 0, cli.MAX_SEED), metavar="S", help="of every draw (default: 0)")
    add("--limit", **count, help="use the first N people of each split (default: all)")
    add("--orientation", choices=[f"front-{side}" for side in orientation.FRONTS],
        help="where the front of the head lies in the pictures (default: measured)")
    add("--slice-spacing", type=cli.number(float, 0.01), metavar="MM", help="(default: measured)")
    add("--mixed-precision", action="store_true", default=None,
        help="compute in bfloat16 (GPUs of compute capability 8.0 and up; slower on most CPUs)")
    add("--start-from", metavar="RUN", type=lambda folder: str(Path(folder).resolve()),
        help="fine-tune: begin with the weights of a finished run of the same shapes, or assets/pretrained")
    add("--resume", action="store_true",
        help="go on with the run in --run-dir, by its own settings; begin it if there is none")
    arguments = parser.parse_args(argv)
    if arguments.resume and not arguments.run_dir:
        raise UserError("--resume needs --run-dir: the folder of the run to go on with.")
    return arguments


def stated_settings(arguments):
    names = vars(Settings())
    return {name: value for name, value in vars(arguments).items() if name in names and value is not None}


# The run and its data -------------------------------------------------------------------------------------
@contextlib.contextmanager
def open_run(arguments):
    """Takes the run's folder, which the chief settles; yields (`Run`, this machine's dict of `Split`s)."""
    run, splits = None, None
    with contextlib.ExitStack() as stack:
        with devices.fail_together():
            if devices.is_chief():
                folder = stack.enter_context(runs.take_folder(arguments.run_dir, arguments.resume))
                if (folder / "config.json").exists():
                    run = Run.load(folder)
                    check_settings(run, arguments)
                else:
                    run, splits = new_run(folder, arguments)
        run = Run(*devices.on_chief(lambda: (str(run.folder), run.config)))
        with devices.fail_together():
            splits = splits or matching_splits(run, arguments)
        yield run, splits


def new_run(folder, arguments):
    """Begins a `Run` in an empty folder; returns it and its data."""
    data_dir, is_demo = dataset.find_data(arguments.data_dir)
    settings = dataclasses.replace(DEMO if is_demo else Settings(), **stated_settings(arguments))
    front = settings.orientation.removeprefix("front-") if settings.orientation else None
    front, geometry, line = dataset.find_geometry(data_dir, settings.limit, front, settings.slice_spacing)
    print(line, flush=True)
    splits = dataset.load_splits(data_dir, limit=settings.limit, cache_dir=arguments.cache_dir, front=front)
    vqvae, pixelcnn = model_arguments(splits, settings)
    old = None
    if arguments.start_from:
        old, settings, vqvae, pixelcnn = take_shapes(arguments, geometry, settings, vqvae, pixelcnn)
    data = {"folder": str(data_dir.resolve()), "is_demo": is_demo,
            "is_simulated": is_simulated(data_dir) and (not old or old.is_simulated),  # all people
            "is_synthetic": is_synthetic(data_dir), "fingerprints": dataset.fingerprints(splits),
            "front": front, "geometry": vars(geometry), "center": head_center(splits["train"], geometry),
            "people": {name: split.num_people for name, split in splits.items()}}
    start = old and {"folder": str(old.folder), "data": old.config["data"], "start_from": old.start_from}
    config = {"settings": vars(settings), "start_from": start, "condition_dropout": dataset.CONDITION_DROPOUT,
              "vqvae": modules.VQVAE(**vqvae).settings, "pixelcnn": modules.PixelCNN(**pixelcnn).settings,
              "data": data, "build": runs.build_info(), "git_commit": runs.git_commit()}
    with whole_folder(folder / "backup", "--run-dir") as backup:
        for name in runs.MODEL_FILES if old else ():  # copied, for that run may be moved or trained anew
            shutil.copyfile(old.folder / name, backup / f"start_{name}")
        write_json(folder / "config.json", config)
    return Run(folder, config), splits


def model_arguments(splits, settings):
    """The arguments of `modules.VQVAE` and of `modules.PixelCNN` by the data and the settings."""
    train = splits["train"]
    size = train.images.shape[1]
    # The border that is black in all training images gets no codes; a quarter of the side must remain.
    margin = min(empty_margin(train.images, size // 8), 3 * size // 8)
    vqvae = {"image_size": size, "margin": margin, "seed": settings.seed, "downsample": settings.downsample,
             "num_embeddings": settings.num_embeddings, "embedding_dim": settings.embedding_dim,
             "data_variance": max(dataset.pixel_statistics(train.images)[1], 1e-6)}
    pixelcnn = {"grid_size": size // settings.downsample, "num_embeddings": settings.num_embeddings,
                "dropout": settings.prior_dropout, "embedding_dim": settings.embedding_dim,
                "knows_noise": True, "context_noise": settings.context_noise,
                "num_positions": 1 + max(int(split.positions.max()) for split in splits.values()),
                "slice_positions": np.unique(train.positions).tolist()}
    return vqvae, pixelcnn


def take_shapes(arguments, geometry, settings, vqvae, pixelcnn):
    """--start-from's `Run`; settings and both models' arguments with its shapes; UserError if others."""
    folder = arguments.start_from
    if not Run.is_finished(Path(folder)):
        raise UserError(f"--start-from names {folder}, which holds no finished run; train.py makes one.")
    run = Run.load(folder)
    old, (old_vqvae, old_pixelcnn) = run.geometry, (model.settings for model in modules.load_models(run))
    shapes, stated = {**old_pixelcnn, **old_vqvae}, stated_settings(arguments)
    asked = {"image_size": vqvae["image_size"], **{name: stated[name] for name in SHAPE if name in stated},
             "num_positions": max(pixelcnn["num_positions"], shapes["num_positions"])}  # fewer fit
    for name, value in asked.items():
        if value != shapes[name]:
            raise UserError(f"{folder} has {name} {shapes[name]}, but the data or options ask for {value}; "
                            "leave out --start-from, or name a run of the same shapes.")
    apart = max(abs(geometry.spacing - old.spacing), abs(geometry.lowest - old.lowest))
    if apart > old.spacing / 2 or geometry.axes_known != old.axes_known:
        here, there = (f"lie {slices.spacing:.3g} mm apart from {slices.lowest:.3g} mm, front "
                       f"{'known' if slices.axes_known else 'unknown'}" for slices in (geometry, old))
        raise UserError(f"The data's slices {here}, but those of {folder} {there}; leave out --start-from, "
                        "or name a run whose slices lie as the data's do.")
    settings = dataclasses.replace(settings, autoencoder_steps=0, **{name: shapes[name] for name in SHAPE})
    vqvae = {**old_vqvae, "sees_neighbours": False, "data_variance": vqvae["data_variance"],
             "seed": settings.seed}
    new_names = "dropout", "slice_positions", "context_noise"
    pixelcnn = {**old_pixelcnn, **{name: pixelcnn[name] for name in new_names},
                "embedding_dim": settings.embedding_dim}  # a prior of version 1.0.0 has none
    return run, settings, vqvae, pixelcnn


def head_center(train, geometry):
    """The mean over people of the middle of their head: [down, right] in mm from the middle of the frame."""
    size, heights = train.images.shape[1], geometry.lowest + geometry.spacing * train.positions
    people = [train.cases == case for case in np.unique(train.cases)]
    extents = [head_extent(train.images[rows] > FOREGROUND * 255, heights[rows]) for rows in people]
    return ((np.mean(extents, axis=(0, 2)) - size / 2) * FRAME_MM / size).tolist()


def check_settings(run, arguments):
    """UserError if the command line states other settings than those that a run began with."""
    known = run.settings if run.start_from else {**run.settings, "start_from": None}
    for name, value in vars(arguments).items():
        if value is not None and value != known.get(name, value):
            raise UserError(f"--{name.replace('_', '-')} {value} differs from {known[name]}, with "
                            f"which {run.folder} began; resume without it or start a new run.")


def matching_splits(run, arguments):
    """The splits that a run began with; UserError if they, or what this version can set, are others now."""
    if (run.settings.keys() != vars(Settings()).keys()
            or run.config.get("condition_dropout") != dataset.CONDITION_DROPOUT):
        raise UserError(f"{run.folder} began with other settings than this version of train.py has; check "
                        f"out commit {run.config.get('git_commit')} or start a new run.")
    data = run.config["data"]
    own = None if devices.is_chief() else os.environ.get("OASIS_DIR")
    folder = arguments.data_dir or own or data["folder"]
    if data["is_demo"] and not Path(folder).is_dir():
        folder = make_demo_cohort()  # another machine than the one that began
    splits = dataset.load_splits(folder, limit=run.settings["limit"], cache_dir=arguments.cache_dir,
                                 front=data["front"])
    if dataset.fingerprints(splits) != data["fingerprints"]:
        raise UserError(f"The data in {folder} are not those that {run.folder} began with; resume with the "
                        "same data or start a new run.")
    return splits


def say_what_begins(run, splits, device):
    """Prints where the run lies, on what it runs, and what will not be possible with its data."""
    data = run.config["data"]
    counts = ", ".join(f"{split.num_people} {name}" for name, split in splits.items())
    print(f"Run folder {run.folder}; {counts} people in {data['folder']}; on {device}.")
    if run.start_from:
        print(f"It begins with the weights of {run.start_from['folder']}; predict.py --evaluate looks for no "
              "copies of that run's people and not for their membership.")
    if run.notice and not data["is_demo"]:  # of the demo cohort all was said when it was found
        print(run.notice)
    for name, split in splits.items():
        dataset.warn_of_lost_border(name, split.images, run.config["vqvae"]["margin"])


# The stages -----------------------------------------------------------------------------------------------
class VQVAEStage(stages.Stage):
    title, name = "Stage 1 of 2: VQ-VAE", "vqvae"
    plan = itemgetter("epochs", "batch_size", "learning_rate")
    monitor, better = "val_ssim", max
    line = ("SSIM {val_ssim:.3f} on validation people, error {reconstruction_loss:.3f}, "
            "{val_codes_used} codes used")
    advice = "start again with a lower --learning-rate"

    def make_model(self):
        return modules.VQVAE(**self.run.config["vqvae"], dtype=self.precision)

    def begin(self):
        vqvae = super().begin()
        if not self.run.start_from:  # which has its codebook
            # Another seed than the epochs': the first of them then sees every image afresh.
            batches = self.batches(vqvae, "train", self.batch_size, self.run.seed + 1)
            with devices.strategy().scope():
                start_codebook(vqvae, batches, self.run.settings["autoencoder_steps"])
        return vqvae

    def steps_before(self, epoch):
        return self.run.settings["autoencoder_steps"] + super().steps_before(epoch)

    def batches(self, vqvae, name, *order):
        return dataset.image_batches(self.splits[name], *order)

    def callbacks(self, first_epoch):
        measuring = [Reconstructions(self.run, self.splits)] if devices.is_chief() else []
        return [*measuring, *super().callbacks(first_epoch)]


def start_codebook(vqvae, batches, autoencoder_steps, fit_batches=8):
    """Trains a VQ-VAE as a plain autoencoder for a few steps, then starts its codebook at k-means centres."""
    # A random codebook lets most codes die unused; one fitted to vectors that mean something does not.
    batches, quantizer = iter(batches), vqvae.quantizer
    # On many devices each trains on the whole batch here; the mean of equal gradients is the gradient.
    step = tf.function(lambda images: vqvae.distribute_strategy.run(vqvae.autoencoder_step, args=(images,)))
    for _ in range(autoencoder_steps):
        step(next(batches)[0])
    vectors = []
    while len(vectors) < fit_batches or sum(map(len, vectors)) < quantizer.num_embeddings:
        vectors.append(np.reshape(vqvae.encode(next(batches)[0]), (-1, quantizer.embedding_dim)))
    vectors = np.concatenate(vectors).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise UserError("Training vqvae diverged at its start; start again with a lower --learning-rate.")
    kmeans = MiniBatchKMeans(quantizer.num_embeddings, max_iter=20, batch_size=4096, n_init=1,
                             random_state=quantizer.seed)
    counts = np.bincount(kmeans.fit_predict(vectors), minlength=quantizer.num_embeddings)
    quantizer.start(kmeans.cluster_centers_, counts)


class Reconstructions(keras.callbacks.Callback):
    """After each epoch of stage 1: SSIM and code use, a frame of the GIF, pictures for TensorBoard."""

    def __init__(self, run, splits):
        super().__init__()
        self.run, self.test, validation = run, splits["test"], splits["validate"]
        self.validation = validation.take(spread(len(validation.images), 128))
        self.examples = self.test.take(self.test.examples(4))
        self.writer = tf.summary.create_file_writer(str(run.folder / "logs" / "vqvae" / "pictures"))

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 0:
            self._draw_frame("before the first epoch", 0)

    def on_epoch_end(self, epoch, logs):
        """Adds to the logs val_ssim, val_perplexity, val_codes_used; and test_ssim, which chooses nothing."""
        logs["val_ssim"], codes, _ = self._reconstruct(self.validation)
        use = metrics.code_metrics(codes, self.model.quantizer.num_embeddings)
        logs["val_perplexity"], logs["val_codes_used"] = use["perplexity"], use["codes_used"]
        rng, count = np.random.default_rng([self.run.seed, epoch]), len(self.test.images)
        drawn = self.test.take(rng.choice(count, min(10, count), replace=False))
        logs["test_ssim"], _, _ = self._reconstruct(drawn)
        frame = self._draw_frame(f"after epoch {epoch + 1} of {self.run.settings['epochs']}", epoch + 1)
        with tf.device("CPU"), self.writer.as_default(epoch):  # the GPU's memory is not for histograms
            tf.summary.image("reconstructions", frame[np.newaxis, ..., np.newaxis])
            tf.summary.histogram("codes", codes, buckets=self.model.quantizer.num_embeddings)
        self.writer.flush()

    def _draw_frame(self, when, number):
        """A frame of the GIF, uint8 (height, width): the examples and their reconstructions."""
        ssim, _, reconstructions = self._reconstruct(self.examples)
        title = f"{when}: SSIM {ssim:.3f}"
        frame = figures.progress_frame(self.examples.images, reconstructions, self.model.margin, title)
        Image.fromarray(frame).save(self.run.frames_dir / f"{number:04d}.png")
        return frame

    def _reconstruct(self, split):
        """(mean SSIM, codes, uint8 reconstructions) of the images of a split."""
        codes = dataset.encode(self.model, split)
        decoded = in_chunks(self.model.decode_codes, codes)
        pairs = zip(split.images / 255, to_unit(decoded))
        return float(np.mean([metrics.ssim(*pair) for pair in pairs])), codes, to_uint8(decoded[..., 0])


class DecoderStage(stages.Stage):
    title, name = "Stage 1, its end: the decoder sees three slices", "decoder"
    plan = itemgetter("decoder_epochs", "batch_size", "decoder_learning_rate")
    monitor, better = "val_loss", min
    line = "loss {val_loss:.4f} on validation people, each slice in its head"
    advice = "start again with a lower decoder_learning_rate in train.py"

    def make_model(self):
        model = modules.VQVAE(**{**self.run.config["vqvae"], "sees_neighbours": True}, dtype=self.precision)
        if self.vqvae:
            model.copy_from(self.vqvae)
        return model

    def begin(self):
        return self.build()

    def batches(self, vqvae, name, *order):
        split = self.splits[name]
        return dataset.decoder_batches(dataset.encode(vqvae, split), split, *order)


class PixelCNNStage(stages.Stage):
    title, name = "Stage 2 of 2: PixelCNN prior", "pixelcnn"
    plan = itemgetter("prior_epochs", "prior_batch_size", "prior_learning_rate", "prior_weight_decay")
    monitor, better = "val_bits_per_code", min
    line = ("{val_bits_per_code:.3f} bits per code in a head, {val_bits_per_code_alone:.3f} in a slice "
            "alone, on validation people")
    advice = "start again with another --seed, or a lower prior_learning_rate in train.py"

    def make_model(self):
        quantizer = self.vqvae.quantizer
        arguments = {**self.run.config["pixelcnn"], "codebook_digest": quantizer.digest()}
        prior = modules.PixelCNN(**arguments, dtype=self.precision)
        start_embeddings(prior, quantizer.embeddings, self.run.seed)
        prior.fit_people(dataset.head_pictures(self.splits["train"], self.vqvae.margin,
                                               prior.num_positions)[0])
        return prior

    def check(self, prior):
        modules.check_match(self.vqvae, prior)

    def batches(self, prior, name, *order):
        versions = [self.splits[name]]
        # Few people: mirrored heads are as good as new ones, where it is known which way left and right lie.
        if name == "train" and self.run.config["data"]["front"]:
            versions.append(versions[0].mirrored())
        return dataset.code_batches(dataset.encode_split(self.vqvae, prior, *versions), *order)


def start_embeddings(prior, codebook, seed):
    """Starts codes' input and output weights as random projections of a codebook, (K, D), standardised."""
    # So what is learned of one code holds for its neighbours in the codebook from the first step on.
    rng, codebook = np.random.default_rng(seed), np.asarray(codebook)
    codebook = (codebook - codebook.mean(axis=0)) / codebook.std()
    length = codebook.shape[1]
    prior.code_vectors.assign(codebook)
    for embedding in (prior.code_embedding, *prior.context_embeddings):
        projected = codebook @ rng.normal(0, 0.3 / length ** 0.5, (length, prior.num_filters))
        embedding.embeddings.assign(np.pad(projected, [[0, embedding.input_dim - len(codebook)], [0, 0]]))
    kernel = prior.logits.layers[-1].kernel
    size = kernel.shape[0], length
    kernel.assign(rng.normal(0, 1 / (size[0] * length) ** 0.5, size) @ codebook.T)


# After the stages -----------------------------------------------------------------------------------------
def fit_movement(prior, coded):
    """Fits the prior's `movement` to validation people, a `dataset.CodedSplit`, by maximum likelihood."""
    def derivatives(indices):
        """Of slices' log-likelihood by `movement`, (B, 2): the first one, and minus the second one."""
        codes, context = coded.slices(indices), coded.slices(coded.context[indices])
        given = coded.positions[indices], context, coded.persons[0][indices]
        noise_shares = tf.fill([len(indices)], prior.context_noise)  # as it is told when heads are sampled
        with prior.full_float32():
            probabilities = prior.distribution(codes, *given, noise_shares).probs_parameter()
            scores = prior.movement_scores(prior.changes_below(context))
        mean = tf.reduce_sum(probabilities * scores, axis=-1)
        variance = tf.reduce_sum(probabilities * scores ** 2, axis=-1) - mean ** 2
        gradient = tf.gather(scores, codes, batch_dims=3) - mean
        return tf.stack([tf.reduce_sum(part, axis=(1, 2)) for part in (gradient, variance)], axis=1)
    prior.movement.assign(0.0)  # of a run stopped after this
    indices = np.flatnonzero((coded.context[:, :2] < len(coded.positions)).all(axis=1))
    if not len(indices):
        return  # nobody has a slice with two below it
    indices = np.random.default_rng(0).permutation(indices)[:128]  # more cost time alone
    # Newton's method, by shorter steps once the slope has changed its sign: then it went beyond the maximum.
    limit, before = 1.0, 0.0
    for _ in range(20):
        slope, curvature = in_chunks(derivatives, indices, size=16).sum(axis=0)
        limit /= 1 + (slope * before < 0)
        step, before = np.clip(slope / max(curvature, 1e-8), -limit, limit), slope
        prior.movement.assign_add(step)
        if abs(step) < 1e-3:
            break


def calibrate_prior(run, vqvae, prior, num_people):
    """Measures how strongly sampled heads follow their person, and corrects it: see `people.calibrate`."""
    # Each round's persons, corrected by the rounds before, lie further out: no longer in proportion there.
    count, rounds = min(run.settings["calibration_heads"], num_people), run.settings["calibration_rounds"]
    conditions, outcomes = [], []
    prior.person_shift.assign(tf.zeros_like(prior.person_shift))  # of a run stopped after this
    prior.person_scale.assign(tf.ones_like(prior.person_scale))
    for number in range(1, rounds + 1):
        print(f"Calibrating by {count} sampled heads, round {number} of {rounds} ...", flush=True)
        stream = f"calibration {number}"
        conditions.append(sampler.calibrated_people(prior, run.seed, stream, tf.range(count)).numpy())
        codes = sampler.sample_heads(prior, count, run.seed, persons=conditions[-1], stream=stream)
        images = [to_uint8(vqvae.decode_head(head, prior.slice_positions)[..., 0]) for head in codes]
        heads = dataset.Split.from_heads(np.stack(images), prior.slice_positions)
        pictures, _ = dataset.head_pictures(heads, vqvae.margin, prior.num_positions)
        outcomes.append(prior.encode_people(pictures))
        shift, scale = people.calibrate(np.concatenate(conditions), np.concatenate(outcomes))
        prior.person_shift.assign(shift)
        prior.person_scale.assign(scale)


def fit_ventricles(run, prior, train, margin):
    """Writes ventricles.json: how heads' mean `dark_fraction` follows from persons. No network gets it."""
    if train.num_people < 3:
        return  # a line through two people says nothing
    pictures, head_numbers = dataset.head_pictures(train, margin, prior.num_positions)
    dark = judge.tissue_statistics(train.images)["dark_fraction"]
    sizes = np.bincount(head_numbers, dark) / np.bincount(head_numbers)
    ridge = RidgeCV(alphas=np.geomspace(0.1, 1000, 9)).fit(prior.encode_people(pictures), sizes)
    quantiles = np.quantile(sizes, np.linspace(0, 1, people.NUM_QUANTILES))
    write_json(run.folder / "ventricles.json",
               {"weights": ridge.coef_.tolist(), "offset": float(ridge.intercept_),
                "quantiles": quantiles.tolist()})


def finish(run, vqvae, prior, splits):
    """Fits, calibrates, saves, measures. A run with metrics.json, which is written last, is finished."""
    train, test = splits["train"], splits["test"]
    print("Fitting the movement from slice to slice on validation people ...", flush=True)
    fit_movement(prior, dataset.encode_split(vqvae, prior, splits["validate"]))
    calibrate_prior(run, vqvae, prior, train.num_people)
    fit_ventricles(run, prior, train, vqvae.margin)
    with whole_file(run.model_path("pixelcnn")) as new:
        prior.save(new)
    print("Measuring on the test people ...", flush=True)
    coded = dataset.encode_split(vqvae, prior, test)
    measured, _ = metrics.evaluate(vqvae, prior, dataset.image_batches(test, 32), coded, test.cases)
    baselines = metrics.baselines(train.images, test.images)
    draw_figures(run, vqvae, prior, splits, coded)
    with whole_file(run.model_path("vqvae")) as new:  # not before: `DecoderStage` begins with the one there
        vqvae.save(new)
    write_json(run.folder / "metrics.json", measured | {"baselines": baselines,
                                                       "movement": float(prior.movement)})
    shutil.rmtree(run.folder / "backup", ignore_errors=True)
    print(RESULTS.format(**measured, mean=baselines["mean_image"], blurred=baselines["blurred_original"],
                         people=test.num_people, pixels=vqvae.image_size ** 2), flush=True)


def draw_figures(run, vqvae, prior, splits, coded):
    """Draws the run's progress.gif, and figures/*.png from networks, histories and the coded test people."""
    if frames := sorted(run.frames_dir.glob("*.png")):  # none if a finished run is measured again
        figures.write_gif(frames, run.folder / "progress.gif")
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    test, history = splits["test"], run.read_history("vqvae")
    figures.plot_losses(history, folder / "losses.png")
    figures.plot_ssim(history, folder / "ssim.png")
    use = metrics.code_metrics(dataset.encode(vqvae, splits["validate"]), prior.num_embeddings)
    figures.plot_prior(run.read_history("pixelcnn"), use["code_entropy"], folder / "prior.png")
    examples = test.examples(4)
    originals, reconstructions = test.images[examples] / 255, to_unit(coded.decode(vqvae, examples))
    captions = [f"slice {position}, SSIM {metrics.ssim(*pair):.3f}"
                for position, *pair in zip(test.positions[examples], originals, reconstructions)]
    colours = figures.code_colours(vqvae.quantizer.embeddings)
    figures.reconstruction_grid(originals, reconstructions, coded.codes[0][examples], captions, colours,
                                vqvae.margin, folder / "reconstructions.png")


@cli.exit_on_user_error
def main(argv=None):
    arguments = parse_arguments(argv)
    device = devices.prepare()
    if arguments.resume and devices.on_chief(Run.is_finished, Path(arguments.run_dir)):
        devices.on_chief(lambda: check_settings(Run.load(arguments.run_dir), arguments))
        devices.print_on_chief(f"{arguments.run_dir} is finished; there is nothing to resume.")
        return
    with open_run(arguments) as (run, splits):
        if devices.is_chief():
            say_what_begins(run, splits, device)
            run.frames_dir.mkdir(parents=True, exist_ok=True)
        goes_on = f"python train.py --run-dir {run.folder} --resume goes on"
        with cli.advise(f"finished epochs are saved; {goes_on}"):
            if devices.on_chief(run.has_final_vqvae):  # of a run that is measured again
                stage = DecoderStage(run, splits)
                stage.build()  # names: see `Stage.train`
                vqvae = stage.read(run.model_path("vqvae"))
            else:
                vqvae = DecoderStage(run, splits, VQVAEStage(run, splits).train()).train()
            prior = PixelCNNStage(run, splits, vqvae).train()
            devices.on_chief(finish, run, vqvae, prior, splits)  # the others wait: a cluster ends as one
    devices.print_on_chief(f"Done. Next: python predict.py --run-dir {run.folder}")


if __name__ == "__main__":
    main()
