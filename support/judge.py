"""Judges sampled heads beside people: can they be told apart, do they differ as people do, are they copies?

Heads are uint8 (N, S, H, W), slices from the lowest up. Sampled ones have passed through the decoder; so
people are compared as their reconstructions, and its blur says nothing."""

from concurrent.futures import ThreadPoolExecutor

import keras
from keras import layers
import numpy as np
from scipy import ndimage, stats
from skimage.measure import block_reduce
from sklearn.metrics.pairwise import euclidean_distances
from tqdm import tqdm

from support.images import brain_box, FOREGROUND, spread

# The figures, in the order of the table, and what each is. A name and a suffix of the columns make the key of
# a number; its 95 % interval has the same key and _interval.
ROWS = {
    "told_apart_slices": "AUC of networks that tell sampled slices from people's: 0.5 is guessing, 1 always",
    "told_apart_heads": "the same of networks that see slices together, by the mean over each head",
    "correlation_1_apart": "correlation of neighbouring slices",
    "correlation_4_apart": "correlation of slices 4 apart",
    "correlation_8_apart": "correlation of slices 8 apart",
    "dark_sd_ratio": "standard deviation of the dark share (ventricles), over that of training people",
    "dark_ks": "Kolmogorov-Smirnov distance of the dark share from that of training people",
    "symmetry": "correlation of the brain with its mirror image",
    "copy_test": "C_T: well below 0 for heads that are nearer to training people than new people are",
    "nearest_over_second": "distance of the nearest training person over that of the second: 0 for a copy",
    "copies": "heads for which the figure above is below its limit",
    "membership": "AUC of the code length that tells training people from new ones: 0.5 if it cannot",
}
COLUMNS = {
    "": "sampled heads", "_reconstructed": "training people, reconstructed",
    "_test": "test people, reconstructed",  # and validation people, in nearest_over_second
    "_floor": "chance",  # people in place of sampled heads
}
BESIDE = {  # in the last column, with these words
    "_fake_noise": "noise", "_fake_mean_person": "the mean person",  # fakes that the judges have to find
    "_fake_mixed_people": "slices of different people",
    "_originals": "training people, originals",  # what the decoder's blur alone changes
    "_test_floor": "chance for test people", "_limit": "limit of nearest_over_second",
    "_planted": "planted of each kind", "_found_mirrored": "found mirrored",
    "_found_shifted": "found shifted", "_found_brightened": "found brightened",
}

NUM_HEADS = 64  # sampled heads that are judged, or as many as there are training people, if these are fewer
RESAMPLES = 1000  # of the people, for an interval
FLOOR_DRAWS = 200  # of people, for what chance alone gives
CORRELATIONS = {"correlation_1_apart": 1, "correlation_4_apart": 4, "correlation_8_apart": 8}
JUDGES = {"told_apart_slices": (0,), "told_apart_heads": (0, 1, 4)}  # how far up the slices lie that they see
JUDGE_FILTERS = 16, 32, 64
JUDGE_BATCH, JUDGE_STEPS, JUDGE_RATE = 16, 400, 3e-3
CHECK_EVERY, LEARNED = 25, 0.05  # steps; a mean loss (nats) at which a judge has nothing more to learn
SEEDS = 0, 1, 2
FEATURE_SIDE = 64  # pixels of the coarse heads whose distances are measured
COPY_MARGIN = 0.9  # `copies_limit` is this times the least nearest_over_second of new people
PLANTED = 5  # copies of each kind


def with_interval(name, statistic, *groups, limits=(-np.inf, np.inf)):
    """A figure and its 95 % interval: the basic bootstrap (Davison, Hinkley 1997) over draws of people.

    `statistic` makes a float of the groups, arrays (N,) with a value per person; it is faster if it takes an
    `axis`. The interval is cut off at the `limits` of the figure. Returns a dict of `name`, a float, and
    `NAME_interval`, [low, high], unless a group is a single person.
    """
    value = {name: float(statistic(*groups))}
    if min(map(len, groups)) < 2:
        return value
    resampled = stats.bootstrap(groups, statistic, n_resamples=RESAMPLES, method="basic", random_state=0)
    return value | {f"{name}_interval": np.clip(resampled.confidence_interval, *limits).tolist()}


def _build_judge(shape, seed):
    """A small network from uint8 images (B, H, W, channels) to logits (B, 1)."""
    inputs = keras.Input(shape)
    x = layers.Rescaling(1 / 127.5, -1)(inputs)
    for index, filters in enumerate(JUDGE_FILTERS):
        kernel = keras.initializers.GlorotUniform(seed + index)
        x = layers.Conv2D(filters, 3, strides=2, padding="same", kernel_initializer=kernel)(x)
        # Every layer is normalised: else a judge of slices learns too slowly to find noise in these steps.
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dropout(0.3, seed=seed)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(seed))(x))


def _fit_judge(model, real, fake, channels, seed):
    """Trains a compiled judge from its start: label 1 for fakes; stops when it has learned."""
    for variable, start in zip(model.variables, _build_judge(model.input_shape[1:], seed).variables):
        variable.assign(start)
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


def judge_logits(real, fake, groups, seeds, channels):
    """Trains a judge with each seed to tell fake heads from real ones, and applies it to groups of others.

    Returns float32 (seeds, N, S') for each group, larger for fakes; S' is S less the slices that have none at
    `channels` above. Lopez-Paz, Oquab 2017: https://arxiv.org/abs/1610.06545
    """
    count = real.shape[1] - channels[-1]
    model = _build_judge((*real.shape[2:], len(channels)), seed=0)
    rate = keras.optimizers.schedules.CosineDecay(JUDGE_RATE, JUDGE_STEPS)
    model.compile(keras.optimizers.Adam(rate), keras.losses.BinaryCrossentropy(from_logits=True))

    def logits(heads):
        images = (np.stack([head[above:above + count] for above in channels], axis=-1) for head in heads)
        return np.stack([model.predict_on_batch(batch)[:, 0] for batch in images])

    by_seed = []
    for seed in tqdm(seeds, "Judging", unit=" judges", leave=False, disable=None):
        _fit_judge(model, real, fake, channels, seed)
        by_seed.append([logits(heads) for heads in groups])
    return [np.stack(group) for group in zip(*by_seed)]


def told_apart(name, real, fake):
    """The AUC of logits of real heads (seeds, N, S) and of fakes (seeds, M, S), its median over seeds.

    A dict with its interval, that of the mean over seeds, over draws of heads.
    """
    # The share of pairs of slices in which the fake has the larger logit, or half of ties: the AUC, exactly.
    signs = np.sign(fake[:, np.newaxis, :, :, np.newaxis] - real[:, :, np.newaxis, np.newaxis, :])
    by_pair = (signs.mean(axis=(3, 4), dtype=np.float64) + 1) / 2  # (seeds, N, M)
    mean = by_pair.mean(axis=0)

    def auc(rows, columns, axis=-1):
        return mean[rows[..., :, np.newaxis], columns[..., np.newaxis, :]].mean(axis=(-2, -1))

    measured = with_interval(name, auc, *map(np.arange, mean.shape), limits=(0, 1))
    return measured | {name: float(np.median(by_pair.mean(axis=(1, 2))))}


def mix_people(arrays, axes=1, seed=0):
    """As many mixtures as people, (N, S, ...): each part is drawn from any of them and keeps its place.

    `axes` after the first count the parts. 1: each slice is a random person's. 3, of codes (N, S, g, g): each
    code is a random person's at the same place, noise with the right frequencies.
    """
    people = np.random.default_rng(seed).integers(len(arrays), size=arrays.shape[:1 + axes])
    return np.take_along_axis(arrays, np.expand_dims(people, tuple(range(people.ndim, arrays.ndim))), axis=0)


def told_apart_heads(sampled, reconstructed, noise):
    """What judges say of the sampled heads, and of fakes that they have to find; see `evaluate_heads`.

    They learn from training people and three quarters of the samples, and are tried on the rest and on test
    people; for the floor, on validation people in place of the rest.
    """
    box = brain_box(reconstructed["train"])
    train, validate, test = (reconstructed[name][box] for name in ("train", "validate", "test"))
    mean = np.uint8(train.mean(axis=0, keepdims=True).round())
    fakes, measured = {}, {}
    for suffix, heads in {"": sampled[box], "_fake_noise": noise[box]}.items():
        quarter = max(1, len(heads) // 4)
        fakes[suffix] = heads[quarter:], heads[:quarter]
    mixed = mix_people(train[:NUM_HEADS]), mix_people(test)  # no more, for this is in memory
    fakes |= {"_fake_mean_person": (mean, mean), "_fake_mixed_people": mixed}
    for name, channels in JUDGES.items():
        channels = tuple(channel for channel in channels if channel < train.shape[1])
        for suffix, (to_learn, to_try) in fakes.items():
            if suffix == "_fake_mixed_people" and len(channels) == 1:
                continue  # each slice is a person's
            seeds = SEEDS if suffix == "" else SEEDS[:1]
            logits = judge_logits(train, to_learn, (test, to_try, validate), seeds, channels)
            if name == "told_apart_heads":
                logits = [group.mean(axis=2, keepdims=True) for group in logits]
            measured |= told_apart(name + suffix, logits[0], logits[1])
            if suffix == "":
                measured |= told_apart(f"{name}_floor", logits[0], logits[2])
    return measured


def slice_correlation(head, apart=1):
    """How alike slices of a head (S, H, W) are that lie `apart` slices apart, from -1 to 1.

    The mean over pairs of the correlation of pixels in the brain of either; 0 if no pair has contrast there.
    """
    head = np.float32(head[brain_box(head[np.newaxis])[1:]]) / 255
    correlations = []
    for first, second in zip(head, head[apart:]):
        brain = (first > FOREGROUND) | (second > FOREGROUND)
        pair = np.stack([first[brain], second[brain]])
        if brain.any() and np.ptp(pair, axis=1).all():
            correlations.append(np.corrcoef(pair)[0, 1])
    return float(np.mean(correlations)) if correlations else 0.0


def tissue_statistics(images):
    """Simple anatomical statistics of each image, uint8 or float in [0, 1], (N, H, W); 0 without brain.

    Returns a dict of float64 (N,): `dark_fraction`, the share of the deep half of the brain (by distance from
    the outline of the largest region above `FOREGROUND`, holes filled) that is darker than half the brain's
    median: ventricles and deepest fissures; `symmetry`, the correlation of the brain with its mirror image.
    """
    with ThreadPoolExecutor() as pool:
        rows = np.array(list(pool.map(_tissue, images)))
    return dict(zip(("dark_fraction", "symmetry"), rows.T))


def _tissue(image):
    """(dark fraction, symmetry) of an image (H, W)."""
    image = image / 255 if image.dtype == np.uint8 else image  # here: all as floats may not fit into memory
    regions, count = ndimage.label(image > FOREGROUND)
    if not count:
        return 0.0, 0.0
    largest = np.bincount(regions.ravel())[1:].argmax()
    box = ndimage.find_objects(regions)[largest]
    image, outline = image[box], ndimage.binary_fill_holes(regions[box] == largest + 1)
    depth = ndimage.distance_transform_edt(np.pad(outline, 1))[1:-1, 1:-1]  # what lies around is no brain
    deep = outline & (depth >= np.median(depth[outline]))
    dark = (image[deep] < np.median(image[outline]) / 2).mean()
    brain, either = np.where(outline, image, 0), outline | outline[:, ::-1]
    symmetry = np.corrcoef(brain[either], brain[:, ::-1][either])[0, 1] if np.ptp(brain[either]) else 1.0
    return dark, symmetry


def compare_dark(dark):
    """How heads differ in their dark share, float (N,) by suffix, beside training people."""
    def sd_ratio(values, reference, axis=-1):
        least = np.finfo(float).eps  # training people may be all alike
        return np.std(values, ddof=1, axis=axis) / np.maximum(np.std(reference, ddof=1, axis=axis), least)

    measured, people = {}, dark["_reconstructed"]
    for suffix in ("", "_test"):
        name, values, rng = f"dark_ks{suffix}", dark[suffix], np.random.default_rng(0)
        measured |= with_interval(f"dark_sd_ratio{suffix}", sd_ratio, values, people, limits=(0, np.inf))
        # No interval: a bootstrap of a largest distance is biased; the floor says what chance alone gives.
        measured[name] = float(stats.ks_2samp(values, people).statistic)
        draws = (rng.choice(people, len(values)) for _ in range(FLOOR_DRAWS))
        floor = [stats.ks_2samp(draw, people, method="asymp").statistic for draw in draws]
        measured[f"{name}_floor"] = float(np.mean(floor))
        measured[f"{name}_floor_interval"] = np.percentile(floor, (2.5, 97.5)).tolist()
    return measured


def evaluate_anatomy(groups, mixed_people):
    """The correlations, dark share and symmetry of heads by suffix; of `mixed_people` correlations alone."""
    measured = {}
    for name, apart in CORRELATIONS.items():
        for suffix, heads in {**groups, "_fake_mixed_people": mixed_people}.items():
            if apart < heads.shape[1]:
                correlations = np.array([slice_correlation(head, apart) for head in heads])
                measured |= with_interval(name + suffix, np.mean, correlations, limits=(-1, 1))
    dark = {}
    for suffix, heads in groups.items():
        rows = [tissue_statistics(head[::2]) for head in tqdm(heads, "Measuring", leave=False, disable=None)]
        dark[suffix], symmetry = (np.array([row[name].mean() for row in rows]) for name in rows[0])
        measured |= with_interval(f"symmetry{suffix}", np.mean, symmetry, limits=(-1, 1))
    return measured | compare_dark(dark)


def membership(train, test):
    """How well bits per code tell heads of training people, float (N,), from those of test people, (M,).

    Returns a dict of `membership`, the AUC (0.5: not at all, 1: always), and its `membership_interval`.
    """
    def auc(train, test, axis=-1):  # chance that a test head costs more than a training head
        pairs = train.shape[axis] * test.shape[axis]
        return stats.mannwhitneyu(test, train, axis=axis, method="asymptotic").statistic / pairs

    return with_interval("membership", auc, train, test, limits=(0, 1))


def copy_score(distances, reference, axis=-1):
    """C_T: how many standard errors the distances of heads (..., N) lie above those of new people (..., M).

    Both are distances to training people. Meehan, Chaudhuri, Dasgupta 2020: https://arxiv.org/abs/2004.05675
    """
    n, m = distances.shape[axis], reference.shape[axis]
    u = stats.mannwhitneyu(distances, reference, axis=axis, method="asymptotic").statistic
    return (u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)


def coarse(heads):
    """Heads (N, S, H, W) as rows in [0, 1]: means over blocks, about 64 pixels a side and half the slices."""
    side = max(1, heads.shape[-1] // FEATURE_SIDE)
    return np.stack([block_reduce(head, (2, side, side), np.mean).ravel() / 255 for head in heads])


def find_nearest(heads, train_features):
    """The nearest training people, by their `coarse` rows, of heads (N, S, H, W) and of their mirror images.

    Returns a dict of (N,): `distances`; `nearest`, their indices; `mirrored`, whether their mirror image is
    nearer (the same person: the prior learns both); `over_second`, the distance over the second nearest's.
    """
    both = np.stack([euclidean_distances(coarse(either), train_features)
                     for either in (heads, heads[..., ::-1])])
    distances = both.min(axis=0)
    nearest, rows = distances.argmin(axis=1), np.arange(len(distances))
    first, second = np.partition(distances, 1, axis=1)[:, :2].T
    mirrored = both[1, rows, nearest] < both[0, rows, nearest]
    return {"distances": first, "nearest": nearest, "mirrored": mirrored,
            "over_second": first / np.maximum(second, np.finfo(float).eps)}


def evaluate_copies(sampled, reconstructed):
    """The figures on copies, and the details, of `evaluate_heads`."""
    train = reconstructed["train"]
    features = coarse(train)
    nearest, test, validate = (find_nearest(heads, features)
                               for heads in (sampled, reconstructed["test"], reconstructed["validate"]))
    new_people = np.concatenate([test["over_second"], validate["over_second"]])
    over_second = nearest.pop("over_second")
    limit = COPY_MARGIN * new_people.min()
    measured = {**with_interval("copy_test", copy_score, nearest["distances"], test["distances"]),
                **with_interval("copy_test_floor", copy_score, validate["distances"], test["distances"]),
                **with_interval("nearest_over_second", np.median, over_second, limits=(0, 1)),
                **with_interval("nearest_over_second_test", np.median, new_people, limits=(0, 1)),
                "copies": int((over_second < limit).sum()), "copies_limit": float(limit)}
    originals = train[spread(len(train), PLANTED)]
    planted = {"mirrored": originals[..., ::-1], "shifted": np.roll(originals, 1, axis=-1),
               "brightened": np.uint8((originals * 1.05).round().clip(0, 255))}
    measured["copies_planted"] = len(originals)
    for kind, heads in planted.items():
        measured[f"copies_found_{kind}"] = int((find_nearest(heads, features)["over_second"] < limit).sum())
    return measured, nearest


def evaluate_heads(sampled, reconstructed, originals, noise):
    """Measures sampled heads beside people: per head, never per slice. There are two of each kind at least.

    Args:
        sampled: the heads, uint8 (N, S, H, W).
        reconstructed: dict of the reconstructed `train`, `validate` and `test` people.
        originals: the training people's own slices.
        noise: heads decoded from `mix_people` of the training people's codes.

    Returns:
        (metrics, details). The metrics: `num_heads`, `num_people` and the figures of `ROWS` but `membership`.
        The details, (N,): `distances` of samples to the nearest training heads; `nearest`, the indices of
        these; `mirrored`, whether it is their mirror images that are so near.
    """
    train, test = reconstructed["train"], reconstructed["test"]
    groups = {"": sampled, "_reconstructed": train, "_test": test, "_originals": originals}
    copies, details = evaluate_copies(sampled, reconstructed)
    num_people = {name: len(heads) for name, heads in reconstructed.items()}
    return {"num_heads": len(sampled), "num_people": num_people,
            **told_apart_heads(sampled, reconstructed, noise),
            **evaluate_anatomy(groups, mix_people(test)), **copies}, details


def head_table(measured):
    """The figures of `evaluate_heads` and `membership` as rows of texts, a heading first."""
    def cell(key):
        if key not in measured:
            return ""
        interval = measured.get(f"{key}_interval")
        return f"{measured[key]:.3g}" + (" ({:.3g} to {:.3g})".format(*interval) if interval else "")

    table = [("", *COLUMNS.values(), "beside")]
    for name in (name for name in ROWS if name in measured):
        beside = {text: cell(name + suffix) for suffix, text in BESIDE.items()}
        table.append((name, *(cell(name + suffix) for suffix in COLUMNS),
                      "; ".join(f"{text}: {figure}" for text, figure in beside.items() if figure)))
    return table


def print_heads(measured):
    """Prints what `evaluate_heads` and `membership` measured, as a table."""
    print("{num_heads} sampled heads beside {num_people[train]} training people and {num_people[test]} test "
          "people, with 95 % intervals:".format(**measured))
    table = head_table(measured)
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
