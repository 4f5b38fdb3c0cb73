"""PNG slices: found, checked, read and fed; what is no slice is named; a person in two splits is noticed."""

import os
import re
import shutil
import struct
import zlib

from matplotlib.figure import Figure
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
import pytest
import tensorflow as tf

from benchmarks.tiny import write_cohort
import dataset
from support import cli, same_person, slices, template
from support.images import empty_margin, neighbours, to_uint8
from support.same_person import warn_of_shared_people
from tests.conftest import check_refused
from tests.small import small_prior, small_vqvae


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """The splits of the tiny cohort, for tests that do not spoil it."""
    return dataset.load_splits(write_cohort(tmp_path_factory.mktemp("data") / "cohort"))


def write_slice(folder, image, name="case_7_slice_3.nii.png"):
    """Writes a slice, uint8 (height, width), into the folder of the test split."""
    path = folder / "keras_png_slices_test" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def load_test(folder, **options):
    return dataset.load_splits(folder, ["test"], **options)["test"]


def check_named(expected, *arguments, **options):
    """Asserts that loading splits ends with one sentence, which has what is expected."""
    with pytest.raises(cli.UserError, match=expected) as error:
        dataset.load_splits(*arguments, **options)
    assert "\n" not in str(error.value)


def make_split(positions_of, side=1):
    """A split of black images from the slice positions of each person."""
    pairs = [(case, position) for case, positions in positions_of.items() for position in positions]
    cases, positions = np.array(pairs, np.int32).T
    return dataset.Split("test", np.zeros((len(cases), side, side), np.uint8), cases, positions)


def test_splits_hold_the_files_pixels_in_order_of_case_and_slice(cohort, tmp_path):
    path = cohort / "keras_png_slices_train" / "case_002_slice_3.nii.png"
    expected = np.asarray(Image.open(path))
    path.rename(path.with_suffix(".PNG"))
    path.with_name(f"._{path.name}").write_bytes(b"what macOS writes beside a file on another disk")
    splits = dataset.load_splits(cohort)
    train = splits["train"]
    assert [splits[name].num_people for name in slices.SPLITS] == [4, 2, 2]
    assert list(zip(train.cases, train.positions)) == [(case, k) for case in (1, 2, 3, 4) for k in range(8)]
    assert_array_equal(train.images[11], expected)
    assert train.images.dtype == np.uint8
    limited = dataset.load_splits(cohort, limit=2)["train"]
    assert np.unique(limited.cases).tolist() == [1, 2] and len(limited.images) == 16
    for position in (10, 9, 1):
        write_slice(tmp_path, np.full((32, 32), position, np.uint8), f"case_7_slice_{position}.nii.png")
    split = load_test(tmp_path)
    assert split.positions.tolist() == split.images[:, 0, 0].tolist() == [1, 9, 10]


@pytest.mark.parametrize("height, width, side", [(208, 176, 224), (45, 31, 64)])
def test_slices_that_are_no_squares_of_32_are_padded_turned_and_said(height, width, side, tmp_path, capsys):
    image = np.random.default_rng(0).integers(1, 256, (height, width), np.uint8)
    write_slice(tmp_path, image)
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.pad(image, ((top, side - height - top), (left, side - width - left)))
    left, right, digests = np.rot90(padded, -1), np.rot90(padded), set()
    turned = {None: padded, "up": padded, "down": padded[::-1], "left": left, "right": right}
    for front, expected in turned.items():
        for cache_dir in (None, tmp_path / "cache", tmp_path / "cache"):
            split = load_test(tmp_path, front=front, cache_dir=cache_dir)
            assert_array_equal(split.images, expected[np.newaxis])
            digests |= {dataset.fingerprints({"test": split})["test"]}
    assert len(digests) == 4
    assert set(capsys.readouterr().out.splitlines()) == {
        f"Note: slices of {width}x{height} pixels are padded with black to {side}x{side}; "
        f"how large a pixel is is not known then, and it counts as 256/{side} mm."}


def save(mode="L", size=(64, 64), file_format="PNG"):
    """A function that writes a black image to a path."""
    return lambda path: Image.new(mode, size).save(path, file_format)


SPOILERS = {  # what writes the file, and another name than case_001_slice_5.nii.png
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:200]),),
    "JPEG": (save(file_format="JPEG"),), "other size": (save(size=(64, 32)),), "16-bit": (save("I;16"),),
    "no case": (save(), "brain.png"), "slice twice": (save(), "case_1_slice_5.nii.png"),
    "out of range": (save(), "case_001_slice_256.nii.png"),
    "dangling symlink": (lambda path: path.unlink() or path.symlink_to("nowhere"),),
    "pipe": (lambda path: path.unlink() or os.mkfifo(path),),
}


@pytest.mark.parametrize("spoiler", SPOILERS.values(), ids=SPOILERS)
def test_bad_files_are_named_in_one_sentence(spoiler, cohort):
    spoil, name = (*spoiler, "case_001_slice_5.nii.png")[:2]
    spoil(cohort / "keras_png_slices_train" / name)
    check_named(name, cohort)


def test_splits_that_are_missing_or_empty_or_share_a_person_are_named(cohort):
    test = cohort / "keras_png_slices_test"
    shutil.copy(cohort / "keras_png_slices_train" / "case_001_slice_0.nii.png", test)
    check_named("case_001 is in both the train and the test split", cohort)
    shutil.rmtree(test)
    check_named("keras_png_slices_test is missing", cohort)
    test.mkdir()
    check_named("keras_png_slices_test holds no PNG", cohort)


def test_data_are_looked_for_in_the_stated_order(cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = tmp_path / "keras_png_slices_data"
    default.mkdir()
    assert dataset.find_data() == (default.relative_to(tmp_path), False)
    monkeypatch.setenv("OASIS_DIR", str(cohort))
    assert dataset.find_data() == (cohort, False)
    assert dataset.find_data(default) == (default, False)
    monkeypatch.setenv("OASIS_DIR", "nowhere")
    for folder, origin in (("elsewhere", "--data-dir names elsewhere"), (None, "OASIS_DIR names nowhere")):
        with pytest.raises(cli.UserError, match=origin):
            dataset.find_data(folder)


def test_cache_maps_the_same_pixels_and_is_never_stale(cohort, tmp_path, monkeypatch):
    plain, cache = dataset.load_splits(cohort), tmp_path / "cache"
    dataset.load_splits(cohort, cache_dir=cache)
    assert [file.suffix for file in cache.iterdir()] == 3 * [".npy"]
    with monkeypatch.context() as patch:
        patch.setattr(slices, "ThreadPoolExecutor", None)  # the second time, nothing is decoded
        mapped = dataset.load_splits(cohort, cache_dir=cache)
    assert dataset.fingerprints(mapped) == dataset.fingerprints(plain)
    assert isinstance(mapped["train"].images, np.memmap) and not mapped["train"].images.flags.writeable
    path = cohort / "keras_png_slices_train" / "case_001_slice_0.nii.png"
    before = path.read_bytes()
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(path)
    assert (dataset.load_splits(cohort, cache_dir=cache)["train"].images[0] == 9).all()
    path.write_bytes(before)
    assert_array_equal(dataset.load_splits(cohort, cache_dir=cache)["train"].images, plain["train"].images)


def test_a_failure_is_told_and_nothing_unfinished_stays_in_the_cache(cohort, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(slices, "open", lambda *_: open("/dev/full", "wb"), raising=False)
        with pytest.raises(OSError, match="No space left on device: '.*cache/slices'"):
            dataset.load_splits(cohort, cache_dir=cache)
    assert not list(cache.iterdir())
    (cohort / "keras_png_slices_train" / "case_001_slice_5.nii.png").write_bytes(b"")
    check_named("case_001_slice_5", cohort, cache_dir=cache)
    assert not list(cache.iterdir())


# One person in two splits
@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The splits of two, one and one simulated people."""
    folder = tmp_path_factory.mktemp("simulated") / "cohort"
    template.write_cohort(folder, {"train": 2, "validate": 1, "test": 1}, 128)
    return dataset.load_splits(folder)


def test_a_person_in_two_splits_is_noticed_others_are_not(simulated, capsys, monkeypatch):
    monkeypatch.setattr(same_person, "CHUNK", 16)
    warn_of_shared_people(simulated)
    assert capsys.readouterr().out == ""
    train, test = simulated["train"], simulated["test"]
    images = test.images.copy()
    images[3] = 255 * (train.images[50] / 255) ** 0.7  # of other contrast, and noisier
    images[24] = (train.images[20] + np.random.default_rng(0).normal(0, 5, (128, 128))).clip(0, 255)
    warn_of_shared_people({**simulated, "test": dataset.Split("test", images, test.cases, test.positions)})
    said = capsys.readouterr().out
    # Slices next to the copied ones may be found as well.
    found = re.search(r"case_001_slice_(19|20|21) of train and case_441_slice_24 of test .*\((\d) such", said)
    assert found and 2 <= int(found[2]) <= 6 and said.count("\n") == 1


@pytest.mark.parametrize("size, expected", [(4, ""), (30, "case_002_slice_0 of test and case_001_slice_0")])
def test_only_images_with_enough_brain_are_compared(size, expected, capsys):
    split = make_split({1: [0], 2: [0]}, side=64)  # 4: a few bright pixels, as on top of a whole brain
    split.images[:, 9:9 + size, 9:9 + size] = np.random.default_rng(0).integers(100, 200, (size, size))
    warn_of_shared_people({"train": split.take([0]), "test": split.take([1])})
    said = capsys.readouterr().out
    assert expected in said and bool(expected) == bool(said)


def test_loading_warns_of_shared_people(cohort, capsys):
    source = cohort / "keras_png_slices_train" / "case_002_slice_3.nii.png"
    shutil.copy(source, cohort / "keras_png_slices_test" / "case_460_slice_0.nii.png")
    dataset.load_splits(cohort)
    assert "case_002_slice_3 of train and case_460_slice_0 of test" in capsys.readouterr().out


# What the networks are fed
def coded_split(split, codes, persons, steps=(1, 2)):
    """A `dataset.CodedSplit` of 64 codes for codes (V, N, ...) and persons (V, N, P)."""
    context = dataset.context_indices(split, steps)
    around = neighbours(split.cases, split.positions)
    near_codes = np.int32(np.arange(64)[:, np.newaxis] ^ [1, 2])
    return dataset.CodedSplit(codes.astype(np.uint16), split.positions, context, np.float32(persons), around,
                              near_codes)


def together(batches):
    """Batches as one, in NumPy."""
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)


def check_same(batches, others):
    tf.nest.map_structure(assert_array_equal, together(batches), together(others))


def test_each_epoch_has_every_image_once_in_an_order_of_its_own(splits):
    train = splits["train"]
    coded = coded_split(train, np.arange(64).reshape(2, 32, 1, 1), np.ones((2, 32, 3)))
    first = list(dataset.code_batches(coded, 8, seed=3).take(8))
    orders = together(first)["codes"].reshape(2, 32) % 32
    assert_array_equal(np.sort(orders), [np.arange(32)] * 2)
    assert (orders[0] != orders[1]).any()
    check_same(first[4:], dataset.code_batches(coded, 8, seed=3, first_epoch=1).take(4))
    assert (together(dataset.code_batches(coded, 8, seed=4).take(4))["codes"].ravel() % 32 != orders[0]).any()
    batches = list(dataset.code_batches(coded, 5))  # once, in order, the short last one too
    assert [len(batch["codes"]) for batch in batches] == 6 * [5] + [2]
    assert together(batches)["codes"].ravel().tolist() == list(range(32))
    batches = dataset.code_batches(coded, 8)
    coded.codes[:] = 7  # of which batches hold no copy
    assert (next(iter(batches))["codes"].numpy() == 7).all()
    batches = dataset.image_batches(train, 5, seed=3)
    assert batches.options().autotune.enabled is False
    shuffled = list(batches.take(7))
    assert [len(images) for images, _ in shuffled] == 7 * [5]  # six of an epoch, less its last two images
    for image, position in zip(*together(shuffled)):
        match = (train.images == to_uint8(image[..., 0])).all(axis=(1, 2))
        assert train.positions[match].tolist() == [position]
    check_same(shuffled[6:], dataset.image_batches(train, 5, 3, first_epoch=1).take(1))


def test_gray_levels_become_numbers_from_minus_one_to_one_and_come_back():
    levels = np.arange(256, dtype=np.uint8)
    assert_allclose(dataset.normalise(levels), np.linspace(-1, 1, 256), atol=1e-6)
    assert_array_equal(to_uint8(dataset.normalise(levels).numpy()), levels)
    assert_array_equal(to_uint8(np.array([-1.5, -0.999, 0.0, 0.9999, 7.0])), [0, 0, 128, 255, 255])


def test_neighbours_slices_below_and_heads_are_found():
    split = make_split({1: [0, 1, 3], 2: [4, 5, 6]})
    expected = [[0, 0, 2, 3, 3, 4], [1, 1, 2, 4, 5, 5]]
    assert_array_equal(neighbours(split.cases, split.positions), expected)
    split = make_split({1: [0, 1, 3], 2: [1, 2], 3: [3]})
    expected = [[6, 6], [0, 6], [6, 1], [6, 6], [3, 6], [6, 6]]
    assert_array_equal(dataset.context_indices(split, (1, 2)), expected)
    split = make_split({3: [0, 2, 1], 5: [0, 2], 8: [1, 2, 0, 7]})
    assert_array_equal(split.head_indices([0, 1, 2]), [[0, 2, 1], [7, 5, 6]])
    assert_array_equal(split.head_indices([2, 0]), [[1, 0], [4, 3], [6, 7]])
    assert split.head_indices([4, 7]).shape == (0, 2)


def test_a_split_is_encoded_with_its_context_and_the_persons_of_its_heads(splits):
    test, vqvae = splits["test"], small_vqvae(margin=8)
    prior = small_prior(grid_size=8, num_embeddings=16, num_positions=32, person_size=3)
    coded = dataset.encode_split(vqvae, prior, test, test.mirrored())
    assert_array_equal(coded.positions, test.positions)
    assert_array_equal(coded.context, dataset.context_indices(test, (1, 2, 4, 8)))
    assert coded.codes.shape == (2, 16, 8, 8) and coded.codes.dtype == np.uint16
    embeddings = vqvae.quantizer.embeddings.numpy()
    distances = np.linalg.norm(embeddings[:, np.newaxis] - embeddings, axis=-1)
    assert_array_equal(coded.near_codes, distances.argsort(axis=1)[:, 1:13])
    for version, images in enumerate((test.images, test.images[..., ::-1])):
        vectors = vqvae.encoder(images[..., np.newaxis] / np.float32(127.5) - 1).numpy()
        distances = ((vectors[..., np.newaxis, :] - vqvae.quantizer.embeddings.numpy()) ** 2).sum(axis=-1)
        assert (coded.codes[version] == distances.argmin(axis=-1)).mean() > 0.999  # but for ties
        pictures = np.full((2, 32, 16, 16), np.nan)
        pictures[:, :8] = images[:, 8:-8, 8:-8].reshape(2, 8, 16, 3, 16, 3).mean(axis=(3, 5)) / 255
        expected = np.repeat(prior.encode_people(pictures), 8, axis=0)
        assert_allclose(coded.persons[version], expected, atol=1 / 32)


def test_prior_batches_in_order_hide_nothing_and_those_of_training_hide_their_shares():
    rng, count, num_embeddings = np.random.default_rng(0), 4000, 64
    codes = rng.integers(0, num_embeddings, (2, count, 4, 4))
    split = make_split({case: range(32) for case in range(count // 32)})
    coded = coded_split(split, codes, rng.normal(size=(2, count, 3)), (1, 2, 4))
    whole = together(dataset.code_batches(coded, 600))
    assert_array_equal(whole["context"][5], codes[0, [4, 3, 1]])
    assert_array_equal(whole["context"][33], [codes[0, 32], *np.full((2, 4, 4), num_embeddings)])
    assert_array_equal(whole["person"], coded.persons[0])
    partly = together(dataset.code_batches(coded, 8, seed=0).take(500))
    index = {grid.tobytes(): number for number, grid in enumerate(np.int32(coded.codes).reshape(-1, 4, 4))}
    version, order = np.divmod([index[codes.tobytes()] for codes in partly["codes"]], count)
    assert version.mean() == pytest.approx(0.5, abs=0.03)
    full, after = coded.slices(coded.context[order], version[:, np.newaxis]), partly["context"]
    before, visible = ((context[:, :, 0, 0] < num_embeddings) for context in (full, after))
    two, three = before[:, 1], before[:, 2]
    assert not (visible & ~before).any() and not (visible[two, 1] & ~visible[two, 0]).any()
    assert_array_equal(visible[three, 2], visible[three, 1])  # further ones are hidden together
    hidden = (partly["person"] == 0).all(axis=1)
    noise = (partly["person"] - coded.persons[version, order])[~hidden]
    found = {"context": (1 - visible[two, 0].mean(), 0.03),  # with what it may be off
             "further_context": ((visible[two, 0] & ~visible[two, 1]).mean(), 0.02),
             "no_noise": ((partly["noise_share"] == 0).mean(), 0.03),
             "noise": (partly["noise_share"].max(), 0.005),
             "person": (hidden.mean(), 0.03), "person_noise": (noise.std(), 0.0075)}
    for name, (value, error) in found.items():
        assert value == pytest.approx(dataset.CONDITION_DROPOUT[name], abs=error)
    is_changed = visible[:, :, np.newaxis, np.newaxis] & (full != after)
    assert set(np.unique((full ^ after)[is_changed])) == {1, 2}  # by near codes alone
    noise_share = np.broadcast_to(partly["noise_share"][:, np.newaxis], visible.shape)[visible]
    changed_share = is_changed.mean(axis=(2, 3))[visible]
    assert not changed_share[noise_share == 0].any()
    slope, offset = np.polyfit(noise_share, changed_share, 1)  # what is told is what happens
    assert slope == pytest.approx(1, abs=0.02) and offset == pytest.approx(0, abs=0.003)


def test_decoder_batches_hold_three_slices_codes_and_in_training_some_their_own_thrice(splits):
    train, codes = splits["train"], np.arange(32).reshape(32, 1, 1)
    images, triples = together(dataset.decoder_batches(codes, train, 5))
    assert_array_equal(images[..., 0], dataset.normalise(train.images))
    expected = np.stack([np.arange(32), *neighbours(train.cases, train.positions)], axis=1)
    assert_array_equal(triples[..., 0, 0], expected)
    _, triples = together(dataset.decoder_batches(codes, train, 8, seed=0).take(200))
    triples = triples[..., 0, 0]
    is_alone = (triples == triples[:, :1]).all(axis=1)
    assert_array_equal(triples[~is_alone], expected[triples[~is_alone, 0]])
    assert is_alone.mean() == pytest.approx(dataset.ALONE_SHARE, abs=0.03)


def test_empty_margin_is_the_narrowest_black_border_and_what_lies_in_it_is_announced(capsys):
    assert empty_margin(np.zeros((1, 8, 8), np.uint8), 1) == 0
    for row, column in ((13, 20), (40, 13), (50, 20), (40, 50)):  # 13 pixels from each side in turn
        images = np.zeros((2, 64, 64), np.uint8)
        images[0, 30, 30] = images[1, row, column] = 1
        assert empty_margin(images, 1) == 13 and empty_margin(images, 8) == 8
        dataset.warn_of_lost_border("test", images, 13)
        assert capsys.readouterr().out == ""
        dataset.warn_of_lost_border("test", images, 14)
        assert "some test images reach into the border of 14 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("name, field", [("test", "images"), ("train", "cases"), ("validate", "positions")])
def test_fingerprint_changes_with_a_pixel(name, field, cohort, splits):
    before, changed = dataset.fingerprints(splits), dataset.load_splits(cohort)
    assert dataset.fingerprints(changed) == before and len(set(before.values())) == 3
    getattr(changed[name], field).flat[-1] ^= 1
    after = dataset.fingerprints(changed)
    assert [key for key in before if before[key] != after[key]] == [name]


def test_main_prints_the_table_and_writes_a_contact_sheet(cohort, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    dataset.main(["--data-dir", str(cohort)])
    splits = dataset.load_splits(cohort)
    images = splits["train"].images / 127.5 - 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train"))
    assert row.split() == ["train", "32", "4", "64x64", f"{images.mean():.3f}", f"{images.var():.4f}"]
    figure, = drawn
    people = [(name, case) for name, split in splits.items() for case in np.unique(split.cases)[:2]]
    for row, (name, case) in zip(np.reshape(figure.axes, (len(people), 8)), people, strict=True):
        images = splits[name].images[splits[name].cases == case]
        assert_array_equal([axes.images[0].get_array() for axes in row], images)
        assert row[0].get_ylabel() == f"{name}\ncase {case}"
        assert [axes.get_title() for axes in row] == [f"slice {position}" for position in range(8)]


def test_examples_are_spread_over_people_and_positions_as_far_as_there_are_such():
    split = make_split({case: range(32) for case in range(441, 461)})
    shown = split.take(split.examples(6))
    assert shown.positions.tolist() == [2, 8, 13, 18, 24, 29]  # the middles of six equal parts of 0 to 31
    assert shown.cases.tolist() == [442, 446, 449, 452, 456, 459]
    few = make_split({1: [3], 2: [4, 5]})
    assert few.examples(2).tolist() == [0, 2] and set(few.examples(9)) == {0, 2}


@pytest.mark.parametrize("arguments, expected", [
    ("--output-dir out", "--output-dir is of no use without a source"),
    ("--simulate 3 --output-dir out --seed 0", "--seed is of no use with --simulate"),
    ("--from-oasis1 . --output-dir out --person-pattern (.)", "--person-pattern is of no use with"),
    ("--simulate 2", "of at least 3"), ("--simulate 3", "--output-dir is missing")])
def test_options_of_no_use_are_refused(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(dataset.main, arguments.split(), expected, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width, height, expected", [
    (8193, 64, "8193x64 pixels; the largest side"), (9000, 9000, "the largest side allowed is 8192"),
    (60_000, 60_000, "cannot be read .*decompression")])
def test_too_large_pngs_are_refused_before_they_are_decoded(width, height, expected, cohort, monkeypatch):
    path = cohort / "keras_png_slices_test" / "case_441_slice_0.nii.png"
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)  # of the header, whose checksum follows
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    monkeypatch.setattr(Image.Image, "load", None)
    check_named(expected, cohort, ["test"])
