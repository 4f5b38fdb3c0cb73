"""Judges whole sampled heads beside people: can they be told apart, do they differ as people do, are they copies?

Sampled heads have passed through the decoder, so people are compared as their reconstructions: the decoder's blur then says
nothing. Heads are uint8 (N, S, H, W) here, their slices from the lowest up. Suffixes of the figures' names say of whom:

    dark_mean                 sampled heads
    dark_mean_reconstructed   reconstructions of the training people
    dark_mean_test            reconstructions of the test people: new to every network
    dark_mean_originals       the training people's own slices: what the decoder's blur alone changes
    ..._floor                 what chance alone gives: people in place of the samples
    ..._noise, ..._mean, ..._stacked   fakes that the judge has to find
    ..._interval              a 95 % interval, see `metrics.with_interval`
"""

import concurrent.futures
import os
from typing import NamedTuple

import keras
from keras import layers
import numpy as np
from scipy import ndimage, stats
from skimage.measure import block_reduce
from sklearn.metrics.pairwise import euclidean_distances
from tqdm import tqdm

from support.images import brain_box, FOREGROUND

FEATURE_SIDE = 64  # pixels of the pictures whose principal components are compared
NUM_HEADS = 64  # sampled heads that are judged, or as many as there are training people, if these are fewer
RESAMPLES = 1000  # of the people, for an interval
SLICES_APART = 1, 4, 8  # of which a head's slices are compared
FLOOR_DRAWS = 200  # of people, for what chance alone gives
# The judges. Every layer is normalised: else the slice judge learns too slowly to find noise in these steps.
SLICE_JUDGE, HEAD_JUDGE = (0,), (0, 1, 4)  # the channels: a slice alone, or with the slices 1 and 4 above it
JUDGE_FILTERS = 16, 32, 64
JUDGE_BATCH, JUDGE_STEPS, JUDGE_RATE = 16, 400, 3e-3
CHECK_EVERY, LEARNED = 25, 0.05  # steps; a mean loss (nats) at which a judge has nothing more to learn
SEEDS = 0, 1, 2
JUDGES = {SLICE_JUDGE: ("told_apart_slices", "told_apart_slices_by_head"),
          HEAD_JUDGE: ("told_apart_heads_by_slice", "told_apart_heads")}  # their names by slice and by head
# Copies
COPY_MARGIN = 0.9  # a head is called a copy if its nearest over second nearest is below this times the least of new people
PLANTED = 1, 2, 5


# Distances, tissue, intervals ------------------------------------------------------------


def coarse(images):
    """Images or heads averaged over blocks to about 64 pixels a side, and of heads to half the slices, as rows of numbers.

    Args:
        images: uint8 or float in [0, 1], images (N, H, W) or heads (N, S, H, W).

    Returns:
        float64 (N, pixels) in [0, 1].
    """
    side = max(1, images.shape[-1] // FEATURE_SIDE)
    block = (side, side) if images.ndim == 3 else (2, side, side)
    scale = 255 if images.dtype == np.uint8 else 1
    return np.stack([block_reduce(image, block, np.mean).ravel() / scale for image in images])


class Nearest(NamedTuple):
    """What `Neighbours.nearest` returns.

    Attributes:
        distances: float (N,), to the nearest training picture.
        indices: int (N,), of that picture.
        mirrored: bool (N,), whether its mirror image is nearer than itself.
        over_second: float (N,), the distance over that to the second nearest picture: 0 for a copy, 1 for a picture that is
            equally far from two.
    """

    distances: np.ndarray
    indices: np.ndarray
    mirrored: np.ndarray
    over_second: np.ndarray


class Neighbours:
    """Finds the training picture that is nearest to another; its mirror image counts as the picture: the prior learns both."""

    def __init__(self, train, transform=coarse):
        """Takes the training images or heads, uint8 (P, ..., W), and what turns them into rows of features."""
        self.transform = transform
        self.features = transform(train), transform(train[..., ::-1])

    def nearest(self, pictures):
        """The `Nearest` of pictures, (N, ..., W)."""
        features = self.transform(pictures)
        both = np.stack([euclidean_distances(features, reference) for reference in self.features])
        distances = both.min(axis=0)
        indices = distances.argmin(axis=1)
        rows = np.arange(len(distances))
        mirrored = both[1, rows, indices] < both[0, rows, indices]
        first, second = np.partition(distances, 1, axis=1)[:, :2].T
        return Nearest(first, indices, mirrored, first / np.maximum(second, np.finfo(float).eps))


def tissue_statistics(images):
    """Simple anatomical statistics of each image.

    Args:
        images: uint8, or float in [0, 1], (N, H, W).

    Returns:
        A dict of float64 (N,): `brain_area`, the share of the frame inside the brain's outline (the largest region brighter
        than 0.03, holes filled); `dark_fraction`, the share of the deep half of it (by distance from the outline) that is
        darker than half the brain's median: ventricles and the deepest fissures; `symmetry`, the correlation of the brain
        with its mirror image, left for right. An image without brain has 0 in all.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = np.array(list(pool.map(_tissue, images)))
    return dict(zip(("brain_area", "dark_fraction", "symmetry"), rows.T))


def _tissue(image):
    image = image / 255 if image.dtype == np.uint8 else image  # one by one: as floats, all would not fit into memory
    regions, count = ndimage.label(image > FOREGROUND)
    if not count:
        return 0.0, 0.0, 0.0
    largest = np.bincount(regions.ravel())[1:].argmax()
    # What lies beyond a black border of one pixel changes nothing below.
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in ndimage.find_objects(regions)[largest])
    size, image = image.size, image[box]
    outline = ndimage.binary_fill_holes(regions[box] == largest + 1)
    depth = ndimage.distance_transform_edt(outline)
    deep = outline & (depth >= np.median(depth[outline]))
    dark = (image[deep] < np.median(image[outline]) / 2).mean()
    columns = np.flatnonzero(outline.any(axis=0))
    brain, outline_box = (picture[:, columns[0]:columns[-1] + 1] for picture in (np.where(outline, image, 0), outline))
    either = outline_box | outline_box[:, ::-1]
    symmetry = np.corrcoef(brain[either], brain[:, ::-1][either])[0, 1] if np.ptp(brain[either]) else 1.0
    return outline.sum() / size, dark, symmetry


def say_copy_test(measured, what="Samples"):
    """What the copy test says in words, from `copy_test`, `nearest_samples`, `nearest_real` and, if there, its interval."""
    score = measured["copy_test"]
    interval = "; 95 % interval {:.1f} to {:.1f}".format(*measured["copy_test_interval"]) if "copy_test_interval" in measured else ""
    verdict = ("nearer to the training people than new people do: copies, or all near to the average" if score < -3 else
               "somewhat nearer to the training people than new people do" if score < -1 else
               "about as near to the training people as new people do: no sign of copying" if score <= 1 else
               "further from the training people than new people do: no copies, but not quite where people are")
    return (f"{what} lie {verdict} (C_T = {score:.1f}{interval}; median distance {measured['nearest_samples']:.2f}, of test people "
            f"{measured['nearest_real']:.2f}).")


def with_interval(name, statistic, *groups, limits=(-np.inf, np.inf)):
    """A figure and its 95 % interval: the basic (pivotal) bootstrap over draws of people, with replacement, from each group.

    Args:
        name: of the figure.
        statistic: a function from as many arrays as there are groups to a float; faster if it takes an `axis`.
        groups: (N,), a value per person each.
        limits: what the figure can be at least and at most; the interval is cut off there.

    Returns:
        A dict of `name`, a float, and `NAME_interval`, (low, high); without the interval if a group has a single person.

    References:
        Davison, Hinkley: Bootstrap Methods and their Application, 1997, section 5.2.1.
    """
    value = {name: float(statistic(*groups))}
    if min(map(len, groups)) < 2:
        return value
    resampled = stats.bootstrap(groups, statistic, n_resamples=RESAMPLES, method="basic", random_state=0)
    return value | {f"{name}_interval": np.clip(resampled.confidence_interval, *limits).tolist()}


# Told apart -----------------------------------------------------------------------------------------------------------


def _build_judge(shape, seed):
    inputs = keras.Input(shape)
    x = layers.Rescaling(1 / 127.5, -1)(inputs)
    for index, filters in enumerate(JUDGE_FILTERS):
        kernel = keras.initializers.GlorotUniform(seed + index)
        x = layers.Conv2D(filters, 3, strides=2, padding="same", kernel_initializer=kernel)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dropout(0.3, seed=seed)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(seed))(x))


def _fit_judge(model, real, fake, channels, seed):
    """Trains a compiled judge from its start: label 1 for fakes; stops when it has learned."""
    for layer, start in zip(model.layers, _build_judge(model.input_shape[1:], seed).layers):
        for variable, value in zip(layer.variables, start.variables):
            variable.assign(value)
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.float32([[0], [1]]), JUDGE_BATCH // 2, axis=0)

    def random_slices(heads):
        people = rng.integers(len(heads), size=JUDGE_BATCH // 2)
        lowest = rng.integers(heads.shape[1] - channels[-1], size=JUDGE_BATCH // 2)
        return np.stack([heads[people, lowest + channel] for channel in channels], axis=-1)

    loss = np.inf
    for step in range(JUDGE_STEPS):
        if step % CHECK_EVERY == 0:
            if loss < LEARNED:
                break
            model.reset_metrics()  # the loss that train_on_batch returns is a mean since then
        images = np.concatenate([random_slices(real), random_slices(fake)])
        mirrored = rng.random(JUDGE_BATCH) < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
        loss = model.train_on_batch(images, labels)


def judge_logits(real, fake, groups, seeds=SEEDS, channels=SLICE_JUDGE):
    """Trains small convolutional networks to tell fake heads from real ones, and applies them to other heads.

    Args:
        real: uint8 (N, S, H, W), heads to learn from.
        fake: uint8 (M, S, H, W), likewise.
        groups: a list of other heads, uint8 (K, S, H, W), that no judge learned from.
        seeds: one judge is trained with each.
        channels: how far above a slice the slices lie that a judge sees with it; `SLICE_JUDGE` or `HEAD_JUDGE`.

    Returns:
        A list with an array for each group, float32 (seeds, K, S'): the logit that a slice is fake; S' is S less the slices
        at the top that have none above them.

    References:
        Lopez-Paz, Oquab: Revisiting Classifier Two-Sample Tests, 2017. https://arxiv.org/abs/1610.06545
    """
    count = real.shape[1] - channels[-1]
    model = _build_judge((*real.shape[2:], len(channels)), seed=0)
    rate = keras.optimizers.schedules.CosineDecay(JUDGE_RATE, JUDGE_STEPS)
    model.compile(keras.optimizers.Adam(rate), keras.losses.BinaryCrossentropy(from_logits=True))

    def logits(heads):
        slices = (np.stack([head[channel:channel + count] for channel in channels], axis=-1) for head in heads)
        return np.stack([model.predict_on_batch(images)[:, 0] for images in slices])

    by_seed = []
    for seed in tqdm(seeds, "Judging", unit=" judges", leave=False, disable=None):
        _fit_judge(model, real, fake, channels, seed)
        by_seed.append([logits(heads) for heads in groups])
    return [np.stack(group) for group in zip(*by_seed)]


def wins(real, fake):
    """How often a fake has the larger logit, by pairs of heads.

    Args:
        real: float (seeds, N, S), see `judge_logits`.
        fake: float (seeds, M, S).

    Returns:
        float64 (seeds, N, M), the share of the S x S pairs of slices; a tie is half a win. The mean over N and M is the area
        under the ROC curve (AUC), exactly.
    """
    signs = [np.sign(b[np.newaxis, :, :, np.newaxis] - a[:, np.newaxis, np.newaxis]) for a, b in zip(real, fake)]
    return (np.stack([sign.mean(axis=(2, 3), dtype=np.float64) for sign in signs]) + 1) / 2


def told_apart(name, real, fake):
    """How well judges tell heads apart by their logits: 0.5 is chance, 1 is always.

    Args:
        name: of the figure.
        real: float (seeds, N, S), see `judge_logits`.
        fake: float (seeds, M, S).

    Returns:
        A dict of `name`, the median over the seeds of the AUC; `NAME_range`, its least and largest; `NAME_interval`, that of
        its mean over the seeds, over draws of heads.
    """
    by_pair = wins(real, fake)
    by_seed, mean = by_pair.mean(axis=(1, 2)), by_pair.mean(axis=0)

    def auc(rows, columns, axis=-1):
        return mean[rows[..., :, np.newaxis], columns[..., np.newaxis, :]].mean(axis=(-2, -1))

    measured = with_interval(name, auc, np.arange(mean.shape[0]), np.arange(mean.shape[1]), limits=(0, 1))
    return measured | {name: float(np.median(by_seed)), f"{name}_range": [float(by_seed.min()), float(by_seed.max())]}


def mix_people(arrays, axes=1, seed=0):
    """As many mixtures as there are people, each part of which is drawn from any of them; its place stays.

    Args:
        arrays: (N, S, ...), heads or their codes.
        axes: how many axes after the first count the parts. 1 stacks slices of different people; 3 of codes, (N, S, g, g),
            draws each code by how often it has this place: noise, as far as a code's place does not tell it.
        seed: of the draws.

    Returns:
        An array of the same shape and dtype.
    """
    people = np.random.default_rng(seed).integers(len(arrays), size=arrays.shape[:1 + axes])
    return np.take_along_axis(arrays, people.reshape(*people.shape, *[1] * (arrays.ndim - people.ndim)), axis=0)


def told_apart_heads(sampled, reconstructed, noise):
    """Whether sampled heads can be told from people, and whether the judges find fakes that everyone would.

    The judges learn from reconstructions of training people and three quarters of the samples, and are tried on the rest
    and on reconstructions of test people. For the floor the same judges are tried on validation people in place of samples.

    Args:
        sampled: uint8 (N, S, H, W), N at least 2.
        reconstructed: dict of the reconstructions of train, validate and test, uint8 (P, S, H, W) each.
        noise: uint8 (M, S, H, W), M at least 2, decoded from `mix_people` of codes.

    Returns:
        A dict of what `told_apart` returns, of the judge that sees one slice: `told_apart_slices`, by slice, and
        `told_apart_slices_by_head`, by the mean over each head's slices; of the judge that also sees the slices 1 and 4 above:
        `told_apart_heads_by_slice` and `told_apart_heads`, likewise. Each with `_floor`, `_noise` and `_mean` (the mean of the
        training people); of the second judge also with `_stacked` (slices of different people).
    """
    box = brain_box(reconstructed["train"])
    train, validate, test = (reconstructed[name][box] for name in ("train", "validate", "test"))
    mean = np.uint8(train.mean(axis=0, keepdims=True).round())
    quarter = {"": max(1, len(sampled) // 4), "_noise": max(1, len(noise) // 4)}
    fakes = {suffix: (heads[box][quarter[suffix]:], heads[box][:quarter[suffix]])
             for suffix, heads in (("", sampled), ("_noise", noise))}
    fakes |= {"_mean": (mean, mean), "_stacked": (mix_people(train), mix_people(test))}
    measured = {}
    for channels, names in JUDGES.items():
        channels = tuple(channel for channel in channels if channel < train.shape[1])
        for suffix, (fake_train, fake_test) in fakes.items():
            if suffix == "_stacked" and len(channels) == 1:
                continue  # each slice is a person's
            real, fake, other = judge_logits(train, fake_train, (test, fake_test, validate), SEEDS if not suffix else SEEDS[:1],
                                             channels)
            for ending, logits in {suffix: fake, **({} if suffix else {"_floor": other})}.items():
                by_slice, by_head = (name + ending for name in names)
                measured |= told_apart(by_slice, real, logits)
                measured |= told_apart(by_head, *(group.mean(axis=2, keepdims=True) for group in (real, logits)))
    return measured


# Statistics -----------------------------------------------------------------------------------------------------------


def slice_correlation(head, apart=1):
    """How much slices of one head have in common.

    Args:
        head: uint8 (S, H, W).
        apart: by how many slices the compared ones are apart, less than S.

    Returns:
        The mean over pairs of the correlation of their pixels inside the brain, where either exceeds 0.03; 0 if no pair has any
        contrast there.
    """
    head = np.float32(head[brain_box(head[np.newaxis])[1:]]) / 255
    correlations = []
    for first, second in zip(head, head[apart:]):
        brain = (first > FOREGROUND) | (second > FOREGROUND)
        pair = np.stack([first[brain], second[brain]])
        if brain.any() and np.ptp(pair, axis=1).all():
            correlations.append(np.corrcoef(pair)[0, 1])
    return float(np.mean(correlations)) if correlations else 0.0


def head_statistics(heads):
    """Simple anatomical statistics of each head.

    Args:
        heads: uint8 (N, S, H, W).

    Returns:
        A dict of float64 (N,): `dark` and `symmetry`, the means of `dark_fraction` and `symmetry` of `tissue_statistics` over
        every second slice; `brightness`, the mean of what is brighter than 0.03.
    """
    rows = []
    for head in tqdm(heads, "Measuring", unit=" heads", leave=False, disable=None):
        tissue = tissue_statistics(head[::2] / 255)
        brain = head[head > 255 * FOREGROUND]
        rows.append([tissue["dark_fraction"].mean(), tissue["symmetry"].mean(), brain.mean() / 255 if brain.size else 0.0])
    return dict(zip(("dark", "symmetry", "brightness"), np.array(rows).T))


def ks_floor(name, count, reference):
    """The Kolmogorov-Smirnov distance of `count` people drawn from a population, from that population.

    Args:
        name: of the figure.
        count: how many people are drawn.
        reference: float (N,), a value per person: the whole population.

    Returns:
        A dict of `name`, the mean over draws, and `NAME_interval`, in which 95 % of them lie.
    """
    rng = np.random.default_rng(0)
    distances = [stats.ks_2samp(rng.choice(reference, count), reference, method="asymp").statistic for _ in range(FLOOR_DRAWS)]
    return {name: float(np.mean(distances)), f"{name}_interval": np.percentile(distances, (2.5, 97.5)).tolist()}


def compare_statistic(name, values):
    """The figures of one of the `head_statistics`, see `evaluate_heads`.

    Args:
        name: of the statistic.
        values: dict of float (N,), by suffix.

    Returns:
        A dict of numbers and intervals.
    """
    def spread(values, axis=-1):
        return np.std(values, ddof=1, axis=axis)

    def spread_ratio(values, reference, axis=-1):
        return spread(values, axis) / np.maximum(spread(reference, axis), np.finfo(float).eps)

    measured, reference = {}, values["_reconstructed"]
    for suffix, column in values.items():
        measured |= with_interval(f"{name}_mean{suffix}", np.mean, column) | with_interval(f"{name}_sd{suffix}", spread, column)
    for suffix in ("", "_test"):
        column = values[suffix]
        measured |= with_interval(f"{name}_sd_ratio{suffix}", spread_ratio, column, reference)
        # No interval: a bootstrap of a largest distance is biased, and the floor says what chance alone gives.
        measured[f"{name}_ks{suffix}"] = float(stats.ks_2samp(column, reference).statistic)
        measured |= ks_floor(f"{name}_ks{suffix}_floor", len(column), reference)
    return measured


# Copies ---------------------------------------------------------------------------------------------------------------


def membership(train, test):
    """How well the code length tells whether the prior was trained on a head: only a model with a likelihood can say this.

    Args:
        train: float (N,), the bits per code of training people's heads.
        test: float (M,), those of test people.

    Returns:
        A dict of `membership`, the AUC (0.5: not at all, 1: always), and its `membership_interval`, over draws of people.
    """
    def auc(train, test, axis=-1):  # chance that a test head costs more than a training head
        pairs = train.shape[axis] * test.shape[axis]
        return stats.mannwhitneyu(test, train, axis=axis, method="asymptotic").statistic / pairs

    return with_interval("membership", auc, train, test, limits=(0, 1))


def copy_score(distances, reference, axis=-1):
    """The score of `metrics.copy_test` at a single position, of distances of heads and of new people, (..., N) and (..., M)."""
    n, m = distances.shape[axis], reference.shape[axis]
    u = stats.mannwhitneyu(distances, reference, axis=axis, method="asymptotic").statistic
    return (u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)


def plant_copies(train):
    """Copies of training heads as a sampler might make them: a dict of uint8 (5, S, H, W), or as many as there are heads."""
    heads = train[np.unique(np.linspace(0, len(train) - 1, max(PLANTED)).astype(int))]
    return {"mirrored": heads[..., ::-1], "shifted": np.roll(heads, 1, axis=-1),
            "brightened": np.uint8((heads * 1.05).round().clip(0, 255))}


def evaluate_copies(sampled, reconstructed):
    """Whether a sampled head is nearer to some training person than a new person is; and which copies would be found.

    Args:
        sampled: uint8 (N, S, H, W).
        reconstructed: dict of the reconstructions of train, validate and test, uint8 (P, S, H, W) each.

    Returns:
        (metrics, details), see `evaluate_heads`.
    """
    neighbours = Neighbours(reconstructed["train"])
    nearest, test, validate = (neighbours.nearest(heads)
                               for heads in (sampled, reconstructed["test"], reconstructed["validate"]))
    new_people = np.concatenate([test.over_second, validate.over_second])
    limit = COPY_MARGIN * new_people.min()
    measured = {"nearest_samples": float(np.median(nearest.distances)), "nearest_real": float(np.median(test.distances)),
                **with_interval("copy_test", copy_score, nearest.distances, test.distances),
                **with_interval("copy_test_floor", copy_score, validate.distances, test.distances),
                **with_interval("nearest_over_second", np.median, nearest.over_second),
                **with_interval("nearest_over_second_test", np.median, new_people),
                "copies_limit": float(limit), "copies": int((nearest.over_second < limit).sum())}
    for change, heads in plant_copies(reconstructed["train"]).items():
        planted = neighbours.nearest(heads)
        measured[f"copies_planted_{change}"] = len(heads)
        measured[f"copies_found_{change}"] = int((planted.over_second < limit).sum())
        for count in PLANTED:
            distances = np.concatenate([nearest.distances, planted.distances[:count]])
            measured[f"copy_test_{count}_{change}"] = float(copy_score(distances, test.distances))
    kinds = [name.removeprefix("copies_found_") for name in measured if name.startswith("copies_found_")]
    power = ", ".join(f"{measured[f'copies_found_{kind}']} of {measured[f'copies_planted_{kind}']} {kind}" for kind in kinds)
    measured["copy_test_says"] = (
        f"{say_copy_test(measured, 'Sampled heads')} {measured['copies']} of {len(sampled)} stand out as copies of one training "
        f"person. Of training people planted among them, the test finds {power}.")
    return measured, {"distances": nearest.distances, "nearest": nearest.indices, "mirrored": nearest.mirrored}


# All of it ------------------------------------------------------------------------------------------------------------


def evaluate_heads(sampled, reconstructed, originals, noise):
    """Measures sampled heads beside people: per head, never per slice. The suffixes of the names are told at the top.

    Args:
        sampled: uint8 (N, S, H, W), N at least 2.
        reconstructed: dict of the reconstructions of train, validate and test, uint8 (P, S, H, W) each, P at least 2.
        originals: uint8 (P, S, H, W), the training people's own slices.
        noise: uint8 (M, S, H, W), M at least 2, decoded from `mix_people` of the training people's codes.

    Returns:
        (metrics, details). The metrics: what `told_apart_heads` returns; `neighbour_correlation`, `correlation_4_apart`,
        `correlation_8_apart` (see `slice_correlation`); for each of `head_statistics`, say `dark`: `dark_mean`, `dark_sd`,
        `dark_sd_ratio` and `dark_ks` (standard deviation over that of the reconstructed training people, and
        Kolmogorov-Smirnov distance to them); `copy_test` of heads, `nearest_samples`, `nearest_real` (median distance to the
        nearest training head), `nearest_over_second` (its median; `_test` of test and validation people); `copies`, the
        number of heads whose nearest over second nearest is below `copies_limit`, which is 0.9 times the least of new people;
        `copies_found_CHANGE` of `copies_planted_CHANGE` training heads, and `copy_test_NUMBER_CHANGE`, the copy test with so
        many of them among the samples, CHANGE being mirrored, shifted or brightened; `copy_test_says`; `num_heads`,
        `num_people`. The details: `distances` (N,) of the sampled heads to the nearest training head, its index, `nearest`
        (N,), and whether it is that head's mirror image, `mirrored` (N,).
    """
    measured = {"num_heads": len(sampled), "num_people": {name: len(heads) for name, heads in reconstructed.items()}}
    measured |= told_apart_heads(sampled, reconstructed, noise)
    columns = {"": sampled, "_reconstructed": reconstructed["train"], "_test": reconstructed["test"], "_originals": originals}
    for suffix, heads in {**columns, "_stacked": mix_people(reconstructed["test"])}.items():
        for apart in (apart for apart in SLICES_APART if apart < heads.shape[1]):
            name = "neighbour_correlation" if apart == 1 else f"correlation_{apart}_apart"
            measured |= with_interval(name + suffix, np.mean, np.array([slice_correlation(head, apart) for head in heads]))
    values = {suffix: head_statistics(heads) for suffix, heads in columns.items()}
    for name in values[""]:
        measured |= compare_statistic(name, {suffix: column[name] for suffix, column in values.items()})
    copies, details = evaluate_copies(sampled, reconstructed)
    return measured | copies, details


def head_table(measured):
    """The figures of `evaluate_heads` as rows of texts, a heading first, for people to read."""
    def cell(name):
        if name not in measured:
            return ""
        interval = measured.get(f"{name}_interval")
        return f"{measured[name]:.3g}" + (" ({:.3g} to {:.3g})".format(*interval) if interval else "")

    beside = {"_noise": "noise", "_mean": "the mean person", "_stacked": "slices of different people",
              "_originals": "training people, originals", "_test_floor": "chance for test people"}
    rows = [("", "sampled heads", "training people, reconstructed", "test people, reconstructed", "chance", "beside")]
    for name in measured:
        has_partner = any(name + suffix in measured for suffix in ("_test", "_floor"))
        if name == "membership" or has_partner and name.removesuffix("_test") not in measured.keys() - {name}:
            columns = [cell(name + suffix) for suffix in ("", "_reconstructed", "_test", "_floor")]
            texts = [f"{text}: {cell(name + suffix)}" for suffix, text in beside.items() if cell(name + suffix)]
            rows.append((name, *columns, "; ".join(texts)))
    return rows


def print_heads(measured):
    """Prints what `evaluate_heads` measured, as a table of figures with their 95 % intervals."""
    table = head_table(measured)
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"{measured['num_heads']} sampled heads, with 95 % intervals:")
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print(measured["copy_test_says"])
