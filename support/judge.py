"""Judges sampled heads beside people: can they be told apart, do they differ as people do, are they copies?

Heads are uint8 (N, S, H, W), slices from the lowest up. Sampled ones have passed through the decoder; so
people are compared as their reconstructions, and its blur says nothing. "New people" are those of validation
and test, whom neither network learned from."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
import functools

import keras
from keras import layers
import numpy as np
from scipy import ndimage, special, stats
from skimage.measure import block_reduce
from sklearn.metrics.pairwise import euclidean_distances
from tqdm import tqdm

from support.images import brain_box, FOREGROUND, spread

# The figures, in the order of the table, and what each is. A name and a suffix of the columns make the key of
# a number; its 95 % interval has the same key and _interval.
ROWS = {
    "told_apart_slices": "AUC of networks (judges) that tell sampled slices from new people's: 0.5 is "
                         "guessing, 1 always; median over judges, interval over heads, for these judges",
    "told_apart_heads": "the same of judges that see slices together, by the mean over each head",
    "roughness": "root mean square of the second difference from slice to slice inside the brain, of 255",
    "roughness_auc": "AUC of this number alone: 0.5 if sampled heads are as rough as new people, 1 if more",
    "dark": "dark share (ventricles) of the inner half of the brain",
    "dark_sd_ratio": "standard deviation of the dark share, over that of training people",
    "symmetry": "correlation of the brain with its mirror image",
    "distance_auc": "AUC of the distance to the nearest training person: well below 0.5 if sampled heads are "
                    "nearer than new people are",
    "nearest_over_second": "distance of the nearest training person over that of the second: 0 for a copy",
    "copies": "heads for which the figure above is below its limit",
    "membership": "AUC of the code length that tells training people from new ones: 0.5 if it cannot",
    "membership_reconstruction": "the same of the error of the reconstruction, which is stage 1's",
    "membership_reference": "the same of the code length less that by a prior which learned from others",
}
COLUMNS = {"": "sampled heads", "_train": "training people", "_new": "new people",
           "_floor": "chance"}  # new people in place of sampled heads
BESIDE = {  # in the last column, with these words
    "_range": "range over judges",
    "_fake_noise": "noise", "_fake_mean_person": "the mean person",  # fakes that the judges have to find
    "_fake_mixed_people": "slices of different people", "_fake_rougher": "slices that differ by 10 % more",
    "_limit": "limit of nearest_over_second", "_false_alarms": "share of new people below it",
    "_planted": "planted of each kind", "_found": "found of the kind that is found least",
}

NUM_HEADS = 64  # of each kind, at most; and no more sampled heads than training people
RESAMPLES = 1000  # of the people, for an interval
JUDGES = {"told_apart_slices": (0,), "told_apart_heads": (0, 1, 4)}  # how far up the slices lie that they see
ONLY_BY_HEAD = "_fake_mixed_people", "_fake_rougher"  # fakes whose single slices are people's, or nearly
JUDGE_SIDE = 128  # pixels; larger slices are averaged down
JUDGE_FILTERS = 16, 32, 64
JUDGE_BATCH, JUDGE_STEPS, JUDGE_RATE = 16, 800, 3e-3
CHECK_EVERY, LEARNED = 25, 0.05  # steps; a mean loss (nats) at which a judge has nothing more to learn
SEEDS = 0, 1, 2, 3, 4  # a judge each
COARSE_SLICES, COARSE_SIDE = 16, 32  # of the heads whose distances are measured, about
SMALL_MOVE = np.array([0.5, 0.5, 0.5, 0.03, 0.03])  # slices up, pixels down and right, radians, log of scale
FALSE_ALARMS = 0.02  # share of new people, at most, who may be taken for copies; of few people it is larger
PLANTED = 5  # copies of each kind


def with_interval(name, statistic, *groups):
    """A figure and its 95 % interval: the percentile bootstrap over draws of people.

    `statistic` makes a float of groups (N,), a value per person. Returns a dict of `name` and, unless a group
    is a single person, `NAME_interval`, [low, high]."""
    value = {name: float(statistic(*groups))}
    if min(map(len, groups)) < 2:
        return value
    drawn = stats.bootstrap(groups, statistic, n_resamples=RESAMPLES, method="percentile", random_state=0)
    return value | {f"{name}_interval": list(map(float, drawn.confidence_interval))}


def area_under_curve(name, *folds):
    """The AUC of scores that are meant to be larger for the second group of each fold, a pair.

    A group is float (N,), a score per head, or (judges, N, S): S by each judge. Returns a dict of `name`, the
    median over judges of the mean over folds; `NAME_range`, of several judges; `NAME_interval`, the 95 %
    interval over heads, unless a group is a single head."""
    pairs = []
    for fold in folds:
        first, second = (np.reshape(group, (1, -1, 1)) if np.ndim(group) == 1 else group for group in fold)
        pairs.append(np.stack([_shares_above(*scores) for scores in zip(first, second)]))
    by_judge = np.mean([fold.mean(axis=(1, 2)) for fold in pairs], axis=0)
    measured = {name: float(np.median(by_judge))}
    if len(by_judge) > 1:
        measured[f"{name}_range"] = [float(by_judge.min()), float(by_judge.max())]
    if min(min(fold.shape[1:]) for fold in pairs) > 1:
        measured[f"{name}_interval"] = _logit_interval(measured[name], [fold.mean(axis=0) for fold in pairs])
    return measured


def _shares_above(first, second):
    """The share of pairs of scores, (N, S) and (M, S), in which the second is larger (a tie: half)."""
    ranks = [[np.searchsorted(np.sort(row), second, side).mean(axis=1) for row in first]
             for side in ("left", "right")]
    return np.mean(ranks, axis=0) / first.shape[1]


def _logit_interval(auc, pairs):
    """The 95 % interval of an AUC, by the shares of `_shares_above` of each fold."""
    # The variance is DeLong's (1988), each head a cluster of slices (Obuchowski 1997). Not a bootstrap, which
    # covers 83 to 91 %: on the logit scale, by Student's t, it covers 95 % or a little more. Folds err
    # together, for each learns from the heads that the other is tried on: taken as independent they cover 84
    # to 92 %. See tests/test_judge.py.
    fewer = [min(fold.shape) for fold in pairs]
    if auc in (0, 1):  # the exact bound of a binomial of as many pairs as are independent
        bound = 0.025 ** (1 / min(fewer))
        return [bound, 1.0] if auc else [0.0, 1 - bound]
    error = np.mean([np.sqrt(fold.mean(axis=1).var(ddof=1) / len(fold) +
                             fold.mean(axis=0).var(ddof=1) / fold.shape[1]) for fold in pairs])
    half = stats.t.ppf(0.975, sum(fewer) - len(fewer)) * error / (auc * (1 - auc))
    return special.expit(special.logit(auc) + np.array([-half, half])).tolist()


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


@functools.lru_cache(maxsize=2)
def _compiled_judge(shape):
    """A judge to be trained again and again: compiling it takes seconds."""
    model, rate = _build_judge(shape, seed=0), keras.optimizers.schedules.CosineDecay(JUDGE_RATE, JUDGE_STEPS)
    model.compile(keras.optimizers.Adam(rate), keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def judge_scores(learned, tried, channels, seed=0):
    """Trains a judge on `learned`, heads (real, fake): the scores, float32 (N, S'), of each of `tried`."""
    # Larger for fakes (Lopez-Paz, Oquab 2017: https://arxiv.org/abs/1610.06545). S' have all `channels`.
    count, shape = learned[0].shape[1] - channels[-1], (*learned[0].shape[2:], len(channels))
    model, rng, loss = _compiled_judge(shape), np.random.default_rng(seed), np.inf
    for variable, start in zip(model.variables, _build_judge(shape, seed).variables):
        variable.assign(start)
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    labels = np.repeat(np.float32([[0], [1]]), JUDGE_BATCH // 2, axis=0)
    for step in range(JUDGE_STEPS):
        if step % CHECK_EVERY == 0:
            if loss < LEARNED:
                break
            model.reset_metrics()  # the loss that train_on_batch returns is a mean since then
        images = []
        for heads in learned:
            people = rng.integers(len(heads), size=JUDGE_BATCH // 2)
            lowest = rng.integers(count, size=JUDGE_BATCH // 2)
            images.append(np.stack([heads[people, lowest + above] for above in channels], axis=-1))
        images = np.concatenate(images)
        mirrored = rng.random(JUDGE_BATCH) < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
        loss = model.train_on_batch(images, labels)
    return [np.stack([model.predict_on_batch(np.stack([head[above:above + count] for above in channels], -1))
                      for head in heads])[..., 0] for heads in tried]


def mix_people(arrays, axes=1, seed=0):
    """Mixtures (N, S, ...) of people: each slice, or with 3 `axes` each code, is a random person's there."""
    people = np.random.default_rng(seed).integers(len(arrays), size=arrays.shape[:1 + axes])
    return np.take_along_axis(arrays, np.expand_dims(people, tuple(range(people.ndim, arrays.ndim))), axis=0)


def rougher(heads, by=1.1):
    """Heads whose slices differ more from each other: of middling difficulty for a judge."""
    mean = heads.mean(axis=1, keepdims=True)
    return np.uint8((mean + by * (heads - mean)).round().clip(0, 255))


def told_apart_heads(sampled, new_people, noise):
    """What judges say of sampled heads, and of fakes that they have to find; see `evaluate_heads`."""
    # In two folds: they learn from validation people and half of the sampled heads, and are tried on test
    # people and the other half; then the other way round. For "chance", half of the people are the samples.
    box, side = brain_box(np.concatenate(new_people)), -(-sampled.shape[-1] // JUDGE_SIDE)
    def small(heads):
        return np.stack([np.uint8(block_reduce(head, (1, side, side), np.mean)) for head in heads[box]])
    sampled, new_people, noise = small(sampled), [small(heads) for heads in new_people], map(small, noise)
    fakes = {"": (sampled[::2], sampled[1::2]), "_fake_noise": noise,
             "_fake_mean_person": [np.uint8(heads.mean(axis=0, keepdims=True)) for heads in new_people],
             "_fake_mixed_people": map(mix_people, new_people), "_fake_rougher": map(rougher, new_people)}
    groups = {suffix: list(zip(new_people, halves)) for suffix, halves in fakes.items()}
    shuffled = [np.random.default_rng(0).permutation(heads) for heads in new_people]
    groups["_floor"] = [(heads[::2], heads[1::2]) for heads in shuffled]
    trials = [(name, suffix, order, seed) for name in JUDGES for suffix in groups
              if name == "told_apart_heads" or suffix not in ONLY_BY_HEAD
              for order in (1, -1) for seed in (SEEDS if suffix == "" else SEEDS[:1])]
    scores, measured = defaultdict(list), {}
    for name, suffix, order, seed in tqdm(trials, "Judging", unit=" judges", leave=False, disable=None):
        channels = tuple(channel for channel in JUDGES[name] if channel < sampled.shape[1])
        pair = judge_scores(*groups[suffix][::order], channels, seed)
        if name == "told_apart_heads":
            pair = [group.mean(axis=1, keepdims=True) for group in pair]
        scores[name + suffix, order].append(pair)
    for key in (key for key, order in scores if order == 1):
        folds = ([np.stack(group) for group in zip(*scores[key, order])] for order in (1, -1))
        measured |= area_under_curve(key, *folds)
    return measured


def roughness(head):
    """The root mean square of ``s[k+1] - 2 s[k] + s[k-1]`` of a head (S, H, W) where all are brain, or 0."""
    head = np.float32(head[brain_box(head[np.newaxis])[1:]])
    below, middle, above = head[:-2], head[1:-1], head[2:]
    second = (above - 2 * middle + below)[np.minimum(np.minimum(below, middle), above) > 255 * FOREGROUND]
    return float(np.sqrt(np.mean(second ** 2))) if len(second) else 0.0


def tissue_statistics(images):
    """Anatomy of images, uint8 or float in [0, 1], (N, H, W): a dict of float64 (N,), 0 without brain.

    `dark_fraction` is the share of the deep half of the brain that is darker than half the brain's median:
    ventricles and deepest fissures; `symmetry` the correlation of the brain with its mirror image."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(("dark_fraction", "symmetry"), np.array(list(pool.map(_tissue, images))).T))


def _tissue(image):
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


def evaluate_anatomy(groups):
    """Roughness, dark share and symmetry of heads, a dict by suffix, beside people's."""
    def sd_ratio(values, reference, axis=-1):  # training people may be all alike
        return np.std(values, ddof=1, axis=axis) / np.maximum(np.std(reference, ddof=1, axis=axis), 1e-12)
    columns, measured = {}, {}
    for suffix, heads in groups.items():
        rows = []
        for head in tqdm(heads, "Measuring", unit=" heads", leave=False, disable=None):
            tissue = tissue_statistics(head[::2])
            rows.append((roughness(head), tissue["dark_fraction"].mean(), tissue["symmetry"].mean()))
        columns[suffix] = dict(zip(("roughness", "dark", "symmetry"), np.transpose(rows)))
        for name, values in columns[suffix].items():
            measured |= with_interval(name + suffix, np.mean, values)
    people, new, sampled = (columns[suffix] for suffix in ("_train", "_new", ""))
    return {**measured, **area_under_curve("roughness_auc", (new["roughness"], sampled["roughness"])),
            **with_interval("dark_sd_ratio", sd_ratio, sampled["dark"], people["dark"]),
            **with_interval("dark_sd_ratio_new", sd_ratio, new["dark"], people["dark"])}


def coarse(heads):
    """Heads (N, S, H, W) as means over blocks: float32, about 16 x 32 x 32 of the usual ones."""
    blocks = max(1, round(heads[0].shape[0] / COARSE_SLICES)), *[max(1, heads[0].shape[2] // COARSE_SIDE)] * 2
    return np.stack([block_reduce(head, blocks, np.mean).astype(np.float32) for head in heads])


def _unit(values):
    """Values as rows (N, pixels) of mean 0 and length 1: brightness and contrast do not count."""
    rows = values.reshape(len(values), -1) - values.mean(axis=(1, 2, 3))[:, np.newaxis]
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _move(head, pose):
    """A coarse head (S, H, W) moved by so many `SMALL_MOVE`."""
    *shift, angle, scale = pose * SMALL_MOVE
    cosine, sine = np.exp(scale) * np.array([np.cos(angle), np.sin(angle)])
    matrix = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    center = (np.array(head.shape) - 1) / 2
    return ndimage.affine_transform(head, matrix, center - matrix @ center + shift, order=1, mode="nearest")


class NearestPerson:
    """Finds the nearest training people of coarse heads, also where a head was moved, turned or mirrored.

    Each head is brought to the pose of the mean training head by Gauss-Newton steps, all with that mean's
    derivatives (Baker, Matthews 2004). So a copy comes to lie on its original, at one registration a head."""
    def __init__(self, train):
        mean = train.mean(axis=0)
        steps = [_unit(np.stack([_move(mean, pose), _move(mean, -pose)])) for pose in np.eye(5)]
        self.solve = np.linalg.pinv(np.stack([(ahead - behind) / 2 for ahead, behind in steps], axis=1))
        self.mean, self.train = _unit(mean[np.newaxis]), train
        self.parts_of_train = self._parts(train)

    def _parts(self, heads):
        """Registered heads as rows (N, pixels), of the whole, of both halves of the slices, of both sides."""
        poses = np.zeros((len(heads), 5))
        for _ in range(7):
            moved = np.stack(list(map(_move, heads, poses)))
            poses = (poses - (_unit(moved) - self.mean) @ self.solve.T).clip(-6, 6)  # as far as heads differ
        moved = np.stack(list(map(_move, heads, poses)))
        halves = *np.array_split(moved, 2, axis=1), *np.array_split(moved, 2, axis=3)
        return [_unit(part) for part in (moved, *halves) if part.size]  # of one slice there is one half

    def find(self, heads):
        """Distance (N,) to the nearest person, own left out; that over the second's, in the least part."""
        distances, over_second = [], []
        for *sides, people in zip(self._parts(heads), self._parts(heads[..., ::-1]), self.parts_of_train):
            of_people = np.minimum(*(euclidean_distances(side, people) for side in sides))
            if heads is self.train:
                np.fill_diagonal(of_people, np.inf)
            first, second = np.sort(of_people, axis=1)[:, :2].T
            distances.append(first)
            over_second.append(first / np.maximum(second, 1e-6))
        return distances[0], np.min(over_second, axis=0)


def plant(heads, pixel_size):
    """Copies of heads, uint8 (N, S, H, W) with pixels of so many mm, by what was done to them."""
    count, side = heads.shape[1:3]
    magnified = ndimage.zoom(heads, (1, 1, 1.07, 1.07), order=1)
    start, other = (magnified.shape[2] - side) // 2, np.roll(heads, 1, axis=0)
    return {"rotated by 3 degrees": ndimage.rotate(heads, 3, (2, 3), reshape=False, order=1),
            "shifted by 8 mm": np.roll(heads, round(8 / pixel_size), axis=3),
            "shifted by 2 slices": np.concatenate([heads[:, 2:], heads[:, -1:], heads[:, -1:]], axis=1),
            "magnified by 7 %": magnified[:, :, start:start + side, start:start + side],
            "lower half": np.concatenate([heads[:, :count // 2], other[:, count // 2:]], axis=1),
            "one side": np.concatenate([heads[..., :side // 2], other[..., side // 2:]], axis=3)}


def evaluate_copies(sampled, new_people, train, pixel_size):
    """The figures on copies of `evaluate_heads`."""
    images, indices = train
    search = NearestPerson(np.concatenate([coarse([images[rows]]) for rows in indices]))
    (distances, ratios), (new_distances, new_ratios) = map(search.find, map(coarse, (sampled, new_people)))
    # The limit is the k-th least of n people who are no copies, training people beside the others among them:
    # the next person's figure is below it with a chance of k / (n + 1).
    no_copies = np.sort(np.concatenate([new_ratios, search.find(search.train)[1]]))
    allowed = max(1, int(FALSE_ALARMS * (len(no_copies) + 1)))
    limit = no_copies[allowed - 1]
    originals = np.stack([images[rows] for rows in indices[spread(len(indices), PLANTED)]])
    planted = [search.find(coarse(heads))[1] for heads in plant(originals, pixel_size).values()]
    num_found = int(np.sum(planted < limit, axis=1).min())
    # If planted ones are missed, none means nothing: so it is where training people come in several sessions.
    copies = np.flatnonzero(ratios < limit).tolist()
    copies = {"copies": len(copies), "copies_heads": copies} if 2 * num_found > len(originals) else {}
    return {**area_under_curve("distance_auc", (new_distances, distances)),
            **with_interval("nearest_over_second", np.median, ratios),
            **with_interval("nearest_over_second_new", np.median, new_ratios),
            **copies, "copies_limit": float(limit), "copies_found": num_found,
            "copies_false_alarms": allowed / (len(no_copies) + 1), "copies_planted": len(originals)}


def evaluate_heads(sampled, originals, reconstructed, noise, train, pixel_size):
    """The figures of `ROWS` that need no code lengths, of heads (N, S, H, W), two at least of each kind.

    `originals` and `reconstructed` are dicts of `train`, `validate` and `test` people; `noise` is (validate,
    test), decoded from `mix_people` of their codes; `train` is (all its slices, its people's indices)."""
    halves = reconstructed["validate"], reconstructed["test"]
    new_people = np.concatenate(halves)
    errors = [np.array([np.square(np.float32(head) - other).mean() for head, other
                        in zip(originals[name], reconstructed[name])]) for name in ("train", "test")]
    groups = {"": sampled, "_train": reconstructed["train"], "_new": new_people}
    return {"num_heads": len(sampled), "num_people": {name: len(heads) for name, heads in originals.items()},
            **told_apart_heads(sampled, halves, noise),
            **evaluate_copies(sampled, new_people, train, pixel_size), **evaluate_anatomy(groups),
            **area_under_curve("membership_reconstruction", errors)}


def head_table(measured):
    """The figures of `evaluate_heads` and of membership as rows of texts, a heading first."""
    def cell(key):
        if key not in measured:
            return ""
        value, interval = measured[key], measured.get(f"{key}_interval")
        text = "{:.3g} to {:.3g}".format(*value) if isinstance(value, list) else f"{value:.3g}"
        return text + (" ({:.3g} to {:.3g})".format(*interval) if interval else "")
    table = [("", *COLUMNS.values(), "beside")]
    for name in (name for name in ROWS if name in measured):
        beside = {text: cell(name + suffix) for suffix, text in BESIDE.items()}
        table.append((name, *(cell(name + suffix) for suffix in COLUMNS),
                      "; ".join(f"{text}: {figure}" for text, figure in beside.items() if figure)))
    return table


def print_heads(measured):
    """Prints `head_table`, and which heads stand out as copies."""
    print("{num_heads} sampled heads beside {num_people[train]} training people and {num_people[validate]} + "
          "{num_people[test]} new people, with 95 % intervals:".format(**measured))
    table = head_table(measured)
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    if measured.get("copies"):
        print("Stand out as copies: the heads", ", ".join(map(str, measured["copies_heads"])))
