"""PNG slices: found, checked, read and fed; what is no slice is named; a person in two splits is noticed."""

import errno
import io
import os
import re
import shutil
import struct
import zlib

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

import dataset
from support import cli, slices, template, volumes
from support.images import empty_margin, fit_to_square, to_uint8
from support.same_person import warn_of_shared_people
from tests.conftest import check_refused
from tests.small import small_prior, small_vqvae


def write_slice(folder, image, name="case_7_slice_3.nii.png", split="test"):
    """Writes a slice, uint8 (height, width), into a split's folder; returns its path."""
    path = folder / f"keras_png_slices_{split}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def load_test(folder, **options):
    """The test split of a folder."""
    return dataset.load_splits(folder, ["test"], **options)["test"]


def test_normalise_reaches_both_ends_and_comes_back():
    levels = np.arange(256, dtype=np.uint8)
    normalised = dataset.normalise(levels).numpy()
    np.testing.assert_allclose(normalised, np.linspace(-1, 1, 256), atol=1e-6)
    np.testing.assert_array_equal(to_uint8(normalised), levels)
    np.testing.assert_array_equal(to_uint8(np.array([-1.5, -0.999, 0.0, 0.9999, 7.0])), [0, 0, 128, 255, 255])


def test_splits_hold_the_files_pixels_in_order_of_case_and_slice(cohort):
    splits = dataset.load_splits(cohort)
    train = splits["train"]
    assert [splits[name].num_people for name in volumes.SPLITS] == [4, 2, 2]
    assert list(zip(train.cases, train.positions)) == [(case, k) for case in (1, 2, 3, 4) for k in range(8)]
    expected = np.asarray(Image.open(cohort / "keras_png_slices_train" / "case_002_slice_3.nii.png"))
    np.testing.assert_array_equal(train.images[11], expected)
    assert train.images.dtype == np.uint8


def test_slice_10_comes_after_slice_9(tmp_path):
    for position in (10, 9, 1):
        write_slice(tmp_path, np.full((32, 32), position, np.uint8), f"case_7_slice_{position}.nii.png")
    split = load_test(tmp_path)
    assert split.positions.tolist() == [1, 9, 10]
    assert split.images[:, 0, 0].tolist() == [1, 9, 10]


def test_limit_keeps_whole_people(cohort):
    train = dataset.load_splits(cohort, limit=2)["train"]
    assert np.unique(train.cases).tolist() == [1, 2] and len(train.images) == 16


def test_the_largest_side_and_the_last_slice_are_allowed(tmp_path):
    for size in ((1024, 32), (32, 1024)):
        write_slice(tmp_path, np.zeros(size, np.uint8), "case_7_slice_31.nii.png")
        split = load_test(tmp_path, cache_dir=tmp_path / "cache")  # a split of one image
        assert split.images.shape == (1, 1024, 1024) and split.positions.tolist() == [31]
    for height, width in ((1025, 32), (32, 1025)):
        write_slice(tmp_path, np.zeros((height, width), np.uint8), "case_7_slice_31.nii.png")
        with pytest.raises(cli.UserError, match=f"is {width}x{height} pixels; the largest side allowed"):
            load_test(tmp_path)


@pytest.mark.parametrize("height, width, side", [(208, 176, 224), (45, 31, 64), (48, 48, 64), (5, 1, 32)])
def test_slices_that_are_no_squares_of_32_are_padded_turned_and_said(height, width, side, tmp_path, capsys):
    image = np.random.default_rng(0).integers(1, 256, (height, width), np.uint8)
    write_slice(tmp_path, image)
    write_slice(tmp_path, image, split="train")
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.zeros((side, side), np.uint8)
    padded[top:top + height, left:left + width] = image
    turned = {None: padded, "up": padded, "down": padded[::-1], "left": np.rot90(padded, -1),
              "right": np.rot90(padded)}
    digests = set()
    for front, expected in turned.items():
        for cache_dir in (None, tmp_path / "cache", tmp_path / "cache"):
            split = load_test(tmp_path, front=front, cache_dir=cache_dir)
            np.testing.assert_array_equal(split.images, expected[np.newaxis])
            digests |= {dataset.fingerprints({"test": split})["test"]}
    assert len(digests) == 4
    lines = set(capsys.readouterr().out.splitlines())
    assert lines == {f"Note: slices of {width}x{height} pixels are padded with black to {side}x{side}; "
                     f"how large a pixel is is not known then, and it counts as 256/{side} mm."}
    _, geometry, _ = dataset.find_geometry(tmp_path)
    assert geometry.pixel_size == 256 / side


ODD = "case_001_slice_5.nii.png"
SPOILERS = {  # the file, and what writes it
    "truncated": (ODD, lambda path: path.write_bytes(path.read_bytes()[:200])),
    "empty file": (ODD, lambda path: path.write_bytes(b"")),
    "text": (ODD, lambda path: path.write_text("no picture")),
    "JPEG in disguise": (ODD, lambda path: Image.new("L", (64, 64)).save(path, "JPEG")),
    "RGB": (ODD, lambda path: Image.new("RGB", (64, 64)).save(path)),
    "alpha": (ODD, lambda path: Image.new("LA", (64, 64)).save(path)),
    "palette": (ODD, lambda path: Image.new("P", (64, 64)).save(path)),
    "16-bit": (ODD, lambda path: Image.fromarray(np.zeros((64, 64), np.uint16)).save(path)),
    "other size": (ODD, lambda path: Image.new("L", (64, 32)).save(path)),
    "huge": ("case_001_slice_0.nii.png", lambda path: Image.new("L", (5000, 64)).save(path)),
    "no case": ("brain.png", lambda path: Image.new("L", (64, 64)).save(path)),
    "out of range": ("case_001_slice_32.nii.png", lambda path: Image.new("L", (64, 64)).save(path)),
    "slice twice": ("case_1_slice_5.nii.png", lambda path: Image.new("L", (64, 64)).save(path)),
    "symlink loop": (ODD, lambda path: path.unlink() or path.symlink_to(path)),
    "dangling symlink": (ODD, lambda path: path.unlink() or path.symlink_to("nowhere")),
    "folder": (ODD, lambda path: path.unlink() or path.mkdir()),
    "pipe": (ODD, lambda path: path.unlink() or os.mkfifo(path)),
}


@pytest.mark.parametrize("name, spoil", SPOILERS.values(), ids=SPOILERS)
def test_bad_files_are_named_in_one_sentence(name, spoil, cohort):
    spoil(cohort / "keras_png_slices_train" / name)
    with pytest.raises(cli.UserError) as error:
        dataset.load_splits(cohort)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_and_empty_splits_and_people_in_two_are_named(cohort):
    source = cohort / "keras_png_slices_train" / "case_001_slice_0.nii.png"
    (cohort / "keras_png_slices_test" / source.name).write_bytes(source.read_bytes())
    with pytest.raises(cli.UserError, match="case_001 is in both the train and the test split"):
        dataset.load_splits(cohort)
    shutil.rmtree(cohort / "keras_png_slices_test")
    with pytest.raises(cli.UserError, match="keras_png_slices_test is missing"):
        dataset.load_splits(cohort)
    (cohort / "keras_png_slices_test").mkdir()
    with pytest.raises(cli.UserError, match="keras_png_slices_test holds no PNG"):
        dataset.load_splits(cohort)


def test_data_are_looked_for_in_the_stated_order(cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = tmp_path / "keras_png_slices_data"
    default.mkdir()
    assert dataset.find_data() == (default.relative_to(tmp_path), False)
    monkeypatch.setenv("OASIS_DIR", str(cohort))
    assert dataset.find_data() == (cohort, False)
    assert dataset.find_data(default) == (default, False)
    with pytest.raises(cli.UserError, match="--data-dir names .*nowhere"):
        dataset.find_data(tmp_path / "nowhere")


def test_cache_maps_the_same_pixels_and_is_never_stale(cohort, tmp_path, monkeypatch):
    plain, cache = dataset.load_splits(cohort), tmp_path / "cache"
    first = dataset.load_splits(cohort, cache_dir=cache)
    files = sorted(cache.iterdir())
    assert len(files) == 3 and all(file.suffix == ".npy" for file in files)
    with monkeypatch.context() as patch:
        patch.setattr(slices, "ThreadPoolExecutor", None)  # the second time, nothing is decoded
        second = dataset.load_splits(cohort, cache_dir=cache)
    for splits in (first, second):
        assert dataset.fingerprints(splits) == dataset.fingerprints(plain)
        assert isinstance(splits["train"].images, np.memmap) and not splits["train"].images.flags.writeable
    path = cohort / "keras_png_slices_train" / "case_001_slice_0.nii.png"
    before, status = path.read_bytes(), path.stat()
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(path)
    assert (dataset.load_splits(cohort, cache_dir=cache)["train"].images[0] == 9).all()
    path.write_bytes(before)
    again = dataset.load_splits(cohort, cache_dir=cache)
    np.testing.assert_array_equal(again["train"].images, plain["train"].images)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(dataset.load_splits(cohort, limit=1, cache_dir=cache)["train"].images) == 8


def test_a_failed_reading_leaves_no_cache(cohort, tmp_path):
    (cohort / "keras_png_slices_train" / "case_001_slice_5.nii.png").write_bytes(b"")
    with pytest.raises(cli.UserError, match="case_001_slice_5"):
        dataset.load_splits(cohort, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_told_and_nothing_unfinished_stays_in_the_cache(cohort, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    leftover = cache / ".slices-0123.npy-killed.unfinished"
    leftover.mkdir(parents=True)
    (leftover / "slices-0123.npy").write_bytes(bytes(1000))
    os.utime(leftover, (0, 0))

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + memoryview(data).nbytes > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(slices, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space left on device: '.*cache/slices'"):
        dataset.load_splits(cohort, cache_dir=cache)
    assert not list(cache.iterdir())


# One person in two splits


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The splits of four, two and two simulated people."""
    folder = tmp_path_factory.mktemp("simulated") / "cohort"
    template.write_cohort(folder, {"train": 4, "validate": 2, "test": 2}, 128)
    return dataset.load_splits(folder)


def save_as_jpeg(image):
    """An image after JPEG of quality 30."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file))


def add_noise(image):
    """An image with noise of 2 % of its range."""
    return np.uint8((image + np.random.default_rng(0).normal(0, 5, image.shape)).clip(0, 255))


CHANGES = {
    "none": lambda image: image,
    "JPEG": save_as_jpeg,
    "noise": add_noise,
    "darker": lambda image: image // 2,
    "brighter": lambda image: np.uint8((image * 1.5).clip(0, 255)),
    "contrast": lambda image: np.uint8(255 * (image / 255) ** 0.7),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_person_in_two_splits_is_noticed_and_different_people_are_not(change, simulated, capsys):
    warn_of_shared_people(simulated)
    assert capsys.readouterr().out == ""
    train, test = simulated["train"], simulated["test"]
    images = test.images.copy()
    images[[3, 40]] = [change(train.images[index]) for index in (70, 20)]
    warn_of_shared_people({**simulated, "test": dataset.Split("test", images, test.cases, test.positions)})
    said = capsys.readouterr().out
    # Slices next to the copied ones may be found as well.
    found = re.search(r"case_001_slice_(19|20|21) of train and case_442_slice_8 of test .*\((\d) such", said)
    assert found and 2 <= int(found[2]) <= 6 and said.count("\n") == 1


def test_small_blobs_are_one_person_only_if_they_are_equal(capsys):
    y, x = np.mgrid[:64, :64]
    blobs = np.uint8([200 * (np.hypot(x - 32, y - 32) < radius) for radius in (6, 6.4, 0)])
    equal, similar, black = (dataset.Split(str(index), blobs[[index]], np.array([index]), np.array([0]))
                             for index in range(3))
    warn_of_shared_people({"train": equal, "validate": similar, "test": black})
    warn_of_shared_people({"train": black, "test": black})
    assert capsys.readouterr().out == ""
    warn_of_shared_people({"train": equal, "test": equal.take([0])})
    assert "(1 such pairs in all)" in capsys.readouterr().out


def test_loading_warns_of_shared_people(cohort, capsys):
    source = cohort / "keras_png_slices_train" / "case_002_slice_3.nii.png"
    write_slice(cohort, np.asarray(Image.open(source)), "case_460_slice_0.nii.png")
    load_test(cohort)
    assert capsys.readouterr().out == ""
    dataset.load_splits(cohort)
    assert "case_002_slice_3 of train and case_460_slice_0 of test" in capsys.readouterr().out


# What the networks are fed


def coded_split(split, codes, persons, steps=(1, 2)):
    """A `dataset.CodedSplit` of 64 codes for codes (V, N, ...) and persons (V, N, P)."""
    context = dataset.context_indices(split, steps)
    return dataset.CodedSplit(codes.astype(np.uint16), split.positions, context, np.float32(persons), 64)


def test_each_epoch_has_every_image_once_in_an_order_of_its_own(cohort):
    train = dataset.load_splits(cohort)["train"]
    coded = coded_split(train, np.arange(64).reshape(2, 32, 1, 1), np.ones((2, 32, 3)))
    first = list(dataset.code_batches(coded, 8, seed=3).take(8))
    orders = np.concatenate([batch["codes"] for batch in first]).ravel().reshape(2, 32) % 32
    np.testing.assert_array_equal(np.sort(orders), [np.arange(32)] * 2)
    assert (orders[0] != orders[1]).any()
    resumed = list(dataset.code_batches(coded, 8, seed=3, first_epoch=1).take(4))
    for batch, again in zip(first[4:], resumed):
        for name in ("codes", "positions", "context", "person"):
            np.testing.assert_array_equal(batch[name], again[name])
    other = dataset.code_batches(coded, 8, seed=4).take(4)
    assert (np.concatenate([batch["codes"] for batch in other]).ravel() % 32 != orders[0]).any()
    batches = list(dataset.code_batches(coded, 5))  # once, in order, the short last one too
    assert [len(batch["codes"]) for batch in batches] == 6 * [5] + [2]
    assert np.concatenate([batch["codes"] for batch in batches]).ravel().tolist() == list(range(32))
    np.testing.assert_array_equal(np.concatenate([batch["positions"] for batch in batches]), train.positions)
    shuffled = list(dataset.image_batches(train, 5, seed=3).take(7))
    assert [len(images) for images, _ in shuffled] == 7 * [5]  # six of an epoch, less its last two images
    again = [dataset.image_batches(train, 5, 3, first_epoch).take(6) for first_epoch in (0, 1)]
    for (images, positions), (same, same_positions) in zip(shuffled, (*again[0], *again[1])):
        np.testing.assert_array_equal(images, same)
        np.testing.assert_array_equal(positions, same_positions)


def test_context_indices_are_the_same_persons_slices_or_none():
    cases, positions = np.array([1, 1, 1, 2, 2, 3], np.int32), np.array([0, 1, 3, 1, 2, 3], np.int32)
    split = dataset.Split("train", np.zeros((6, 8, 8), np.uint8), cases, positions)
    expected = [[6, 6], [0, 6], [6, 1], [6, 6], [3, 6], [6, 6]]
    np.testing.assert_array_equal(dataset.context_indices(split, (1, 2)), expected)


def test_head_pictures_are_means_over_areas_with_gaps_where_slices_are_missing():
    rng = np.random.default_rng(0)
    cases, positions = np.array([4, 4, 9], np.int32), np.array([0, 5, 31], np.int32)
    split = dataset.Split("train", rng.integers(0, 256, (3, 64, 64), np.uint8), cases, positions)
    pictures, heads = dataset.head_pictures(split, margin=8)
    np.testing.assert_array_equal(heads, [0, 0, 1])
    assert pictures.shape == (2, 32, 16, 16) and np.isfinite(pictures).any(axis=(2, 3)).sum() == 3
    expected = split.images[1, 8:-8, 8:-8].reshape(16, 3, 16, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(pictures[0, 5], expected, atol=1e-5)


def test_codes_are_held_once_in_as_few_bytes_as_they_need(cohort):
    test = load_test(cohort)

    class Encoder:
        grid_size = 2

        def __init__(self, num_embeddings):
            self.quantizer = self
            self.num_embeddings = num_embeddings

        def encode_to_codes(self, images):
            return tf.fill((len(images), 2, 2), self.num_embeddings - 1)

    for num_embeddings, dtype in ((16, np.uint16), (65_536, np.uint16), (65_537, np.uint32)):
        codes = dataset.encode(Encoder(num_embeddings), test)
        assert codes.dtype == dtype and codes.shape == (16, 2, 2) and (codes == num_embeddings - 1).all()
    coded = coded_split(test, np.zeros((1, 16, 2, 2)), np.ones((1, 16, 3)))
    batches = dataset.code_batches(coded, 16)
    coded.codes[:] = 7  # seen in the batches, so these hold no copy
    assert (next(iter(batches))["codes"].numpy() == 7).all()


def test_slices_below_the_lowest_hold_no_code():
    rng = np.random.default_rng(0)
    codes, version = rng.integers(0, 7, (2, 3, 2, 2)), [[0], [1], [1]]
    indices = np.array([[3, 0], [2, 1], [3, 3]])
    coded = dataset.CodedSplit(codes.astype(np.uint16), np.arange(3), indices, np.zeros((2, 3, 5)), 7)
    with_none = np.concatenate([codes, np.full((2, 1, 2, 2), 7)], axis=1)
    for found, expected in ((coded.slices(3), with_none[0, 3]),
                            (coded.slices(indices), with_none[0, indices]),
                            (coded.slices(indices, version), with_none[version, indices])):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int32


def test_a_split_is_encoded_with_its_context_and_the_persons_of_its_heads(cohort):
    test = load_test(cohort)
    vqvae, prior = small_vqvae(), small_prior(grid_size=8, num_embeddings=16, num_positions=32, person_size=3)
    coded = dataset.encode_split(vqvae, prior, test, test.mirrored())
    np.testing.assert_array_equal(coded.positions, test.positions)
    np.testing.assert_array_equal(coded.context, dataset.context_indices(test, (1, 2, 4, 8)))
    assert coded.codes.shape == (2, 16, 8, 8) and coded.persons.shape == (2, 16, 3)
    assert coded.codes.dtype == np.uint16 and coded.num_embeddings == 16
    for version, images in enumerate((test.images, test.images[..., ::-1])):
        vectors = vqvae.encoder(images[..., np.newaxis] / np.float32(127.5) - 1).numpy()
        distances = ((vectors[..., np.newaxis, :] - vqvae.quantizer.embeddings.numpy()) ** 2).sum(axis=-1)
        assert (coded.codes[version] == distances.argmin(axis=-1)).mean() > 0.999  # but for ties
        for case in np.unique(test.cases):
            picture = np.full((1, 32, 16, 16), np.nan)
            picture[0, :8] = images[test.cases == case].reshape(8, 16, 4, 16, 4).mean(axis=(2, 4)) / 255
            expected = np.repeat(prior.encode_people(picture), 8, axis=0)
            np.testing.assert_allclose(coded.persons[version, test.cases == case], expected, atol=1 / 32)


def test_prior_batches_in_order_hide_nothing_and_training_batches_hide_their_shares():
    rng, count, num_embeddings = np.random.default_rng(0), 4000, 64
    codes, positions = rng.integers(0, num_embeddings, (2, count, 4, 4)), np.arange(count) % 32
    split = dataset.Split("train", np.zeros((count, 1, 1), np.uint8), np.arange(count) // 32, positions)
    coded = coded_split(split, codes, rng.normal(size=(2, count, 3)), (1, 2, 4))
    batches = list(dataset.code_batches(coded, 600))
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in ("context", "person")}
    np.testing.assert_array_equal(whole["context"][5], codes[0, [4, 3, 1]])
    np.testing.assert_array_equal(whole["context"][33], [codes[0, 32], *np.full((2, 4, 4), num_embeddings)])
    np.testing.assert_array_equal(whole["person"], coded.persons[0])

    batches = list(dataset.code_batches(coded, 8, seed=0).take(500))
    partly = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    index = {grid.tobytes(): number for number, grid in enumerate(np.int32(coded.codes).reshape(-1, 4, 4))}
    version, order = np.divmod([index[codes.tobytes()] for codes in partly["codes"]], count)
    assert version.mean() == pytest.approx(0.5, abs=0.03)
    full, after = coded.slices(coded.context[order], version[:, np.newaxis]), partly["context"]
    before, visible = ((context[:, :, 0, 0] < num_embeddings) for context in (full, after))
    two = before[:, 1]
    shares = dataset.CONDITION_DROPOUT
    assert 1 - visible[two, 0].mean() == pytest.approx(shares["context"], abs=0.03)
    assert (visible[two, 0] & ~visible[two, 1]).mean() == pytest.approx(shares["further_context"], abs=0.02)
    assert not (visible & ~before).any() and not (visible[two, 1] & ~visible[two, 0]).any()
    three = before[:, 2]
    np.testing.assert_array_equal(visible[three, 2], visible[three, 1])  # further ones are hidden together
    changed = (full != after)[visible].mean()
    assert changed == pytest.approx(shares["context_codes"] * (1 - 1 / num_embeddings), abs=0.003)
    hidden = (partly["person"] == 0).all(axis=1)
    assert hidden.mean() == pytest.approx(shares["person"], abs=0.03)
    noise = (partly["person"] - coded.persons[version, order])[~hidden]
    assert noise.std() == pytest.approx(shares["person_noise"], rel=0.05)


def test_image_batches_are_the_normalised_images_with_their_positions(cohort):
    train = dataset.load_splits(cohort)["train"]
    batches = list(dataset.image_batches(train, 5))
    images = np.concatenate([images for images, _ in batches])
    assert images.shape == (32, 64, 64, 1) and images.dtype == np.float32
    np.testing.assert_allclose(images[..., 0], train.images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([positions for _, positions in batches]), train.positions)
    shuffled, positions = next(iter(dataset.image_batches(train, 4, seed=0)))
    for image, position in zip(to_uint8(shuffled[..., 0].numpy()), positions):
        match = (train.images == image).all(axis=(1, 2))
        assert train.positions[match].tolist() == [int(position)]


def test_empty_margin_is_the_narrowest_black_border_rounded_down():
    images = np.zeros((2, 64, 64), np.uint8)
    images[0, 17:40, 20:30] = 9
    images[1, 30, 50] = 1  # 13 pixels from the right
    assert empty_margin(images, 1) == 13
    assert empty_margin(images, 8) == 8
    images[1, 0, 0] = 1
    assert empty_margin(images, 8) == 0
    for row, column in ((3, 20), (40, 3), (60, 20), (40, 60)):  # three pixels from each side in turn
        marked = np.zeros((1, 64, 64), np.uint8)
        marked[0, 30, 30] = marked[0, row, column] = 1
        assert empty_margin(marked, 1) == 3
    assert empty_margin(np.zeros((1, 8, 8), np.uint8), 1) == 0


def test_pixel_statistics_are_numpys():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30), np.uint8)
    normalised = images / 127.5 - 1
    assert dataset.pixel_statistics(images) == pytest.approx((normalised.mean(), normalised.var()))


def test_what_lies_in_the_painted_border_is_announced(capsys):
    images = np.zeros((2, 64, 64), np.uint8)
    images[1, 30, 10] = 5  # 10 pixels from the left
    dataset.warn_of_lost_border("test", images, 10)
    assert capsys.readouterr().out == ""
    dataset.warn_of_lost_border("test", images, 11)
    assert "some test images reach into the border of 11 pixels" in capsys.readouterr().out


def test_fingerprint_changes_with_a_pixel(cohort):
    splits = dataset.load_splits(cohort)
    before = dataset.fingerprints(splits)
    assert before == dataset.fingerprints(dataset.load_splits(cohort)) and len(set(before.values())) == 3
    arrays = splits["test"].images, splits["train"].cases, splits["validate"].positions
    for name, array in zip(("test", "train", "validate"), arrays):
        array.flat[70 % array.size] ^= 1
        after = dataset.fingerprints(splits)
        assert [key for key in before if before[key] != after[key]] == [name]
        array.flat[70 % array.size] ^= 1
    assert before == dataset.fingerprints(splits)


def test_main_prints_the_table_and_writes_a_contact_sheet(cohort, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dataset.main(["--data-dir", str(cohort)])
    images = dataset.load_splits(cohort)["train"].images / 127.5 - 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train"))
    assert row.split() == ["train", "32", "4", "64x64", f"{images.mean():.3f}", f"{images.var():.4f}"]
    with Image.open("runs/contact_sheet.png") as sheet:
        rows = np.asarray(sheet).reshape(6, 64, 8, 64).swapaxes(1, 2)
    shown = [split.images[split.cases == case] for split in dataset.load_splits(cohort).values()
             for case in np.unique(split.cases)[:2]]
    np.testing.assert_array_equal(rows, shown)


def test_pipelines_do_not_autotune(cohort):
    train = dataset.load_splits(cohort)["train"]
    for batches in (dataset.image_batches(train, 4), dataset.image_batches(train, 4, 0)):
        assert isinstance(batches, tf.data.Dataset) and batches.options().autotune.enabled is False


def make_split(slices_of):
    """A split of 1x1 images from the slices that each person has."""
    cases, positions = np.array([(case, k) for case, slices in slices_of.items() for k in slices], np.int32).T
    return dataset.Split("test", np.zeros((len(cases), 1, 1), np.uint8), cases, positions)


def test_examples_are_spread_over_people_and_positions():
    split = make_split({case: range(32) for case in range(441, 461)})
    shown = split.take(split.examples(6))
    assert shown.positions.tolist() == [2, 8, 13, 18, 24, 29]  # the middles of six equal parts of 0 to 31
    assert shown.cases.tolist() == [442, 446, 449, 452, 456, 459]
    np.testing.assert_array_equal(split.examples(6), split.examples(6))
    for people, wanted in ((6, 6), (17, 8), (5, 6), (40, 3)):
        split = make_split({case: range(32) for case in range(people)})
        shown = split.take(split.examples(wanted))
        assert shown.num_people == min(people, wanted)
        assert np.ptp(np.diff(shown.positions)) <= 1 and np.diff(shown.positions).min() > 1


def test_examples_make_do_with_what_is_there():
    one = make_split({7: range(32)})
    assert one.positions[one.examples(4)].tolist() == [4, 12, 20, 28]
    gaps = make_split({1: range(0, 32, 10), 2: range(32), 3: [31]})  # 5 and 26 are missing
    shown = gaps.take(gaps.examples(3))
    assert shown.cases.tolist() == [1, 2, 3] and shown.positions.tolist() == [0, 16, 31]
    few = make_split({1: [3], 2: [4, 5]})
    assert few.examples(2).tolist() == [0, 2]
    for wanted in (3, 9):
        assert sorted(few.examples(wanted)) == [0, 1, 2]


def test_heads_are_the_people_with_all_slices():
    cases, positions = np.array([[3, 0], [3, 2], [3, 1], [5, 0], [5, 2], [8, 1], [8, 2], [8, 0], [8, 7]]).T
    split = dataset.Split("train", np.zeros((9, 8, 8), np.uint8), cases, positions)
    np.testing.assert_array_equal(split.head_indices([0, 1, 2]), [[0, 2, 1], [7, 5, 6]])
    np.testing.assert_array_equal(split.head_indices([2, 0]), [[1, 0], [4, 3], [6, 7]])
    assert split.head_indices([4, 7]).shape == (0, 2)


@pytest.mark.parametrize("size, result, changes", [
    ((64, 64), (64, 64), []), ((40, 64), (40, 64), ["padded"]),
    ((64, 128), (32, 64), ["resampled", "padded"]),
    ((31, 20), (64, 41), ["resampled", "padded"]), ((32, 32), (32, 32), ["padded"]),
    ((1, 900), (1, 64), ["resampled", "padded"])])
def test_fit_to_square_pads_and_resamples(size, result, changes):
    images, notes = fit_to_square(np.full((2, *size), 200, np.uint8), 64)
    assert images.shape == (2, 64, 64) and images.dtype == np.uint8
    assert [text.split()[0] for text in notes] == changes
    inked = np.argwhere(images[0] > 0)
    assert tuple(np.ptp(inked, axis=0) + 1) == result
    assert (np.abs(inked.mean(axis=0) - 31.5) <= 0.5).all()  # in the middle
    assert set(np.unique(images)) <= {0, 200}


# Rubbish


def test_a_split_beyond_the_memory_suggests_limit(cohort, monkeypatch):
    def empty(*_):
        raise MemoryError

    monkeypatch.setattr(slices.np, "fromiter", empty)
    with pytest.raises(cli.UserError, match="32 images of the train split do not fit into memory; .*--limit"):
        dataset.load_splits(cohort)


@pytest.mark.parametrize("arguments, expected", [
    ("--output-dir out", "--output-dir is of no use without --from-oasis1 or --from-nifti or --simulate"),
    ("--seed 0", "--seed is of no use without --from-oasis1 or --from-nifti"),
    ("--simulate 3 --output-dir out --seed 0", "--seed is of no use with --simulate"),
    ("--simulate 3 --output-dir out --data-dir in", "--data-dir is of no use with --simulate"),
    ("--from-nifti . --output-dir out --image-size 128", "--image-size is of no use with --from-nifti"),
    ("--from-oasis1 . --output-dir out --pattern *", "--pattern is of no use with --from-oasis1"),
    ("--person-pattern (.)", "--person-pattern is of no use without --from-nifti"),
    ("--simulate 3", "--output-dir is missing")])
def test_options_of_no_use_are_refused(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(dataset.main, arguments.split(), expected, capsys)
    assert not list(tmp_path.iterdir())


def write_chunks(path, header, pixels):
    """Writes a PNG with any header, its checksums right."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", *header)), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def mutate(data, rng):
    """A PNG's bytes, spoilt in one of many ways."""
    data, kind = bytearray(data), rng.integers(6)
    at = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for where in rng.integers(0, len(data), rng.integers(1, 9)):
            data[where] ^= 1 << rng.integers(8)
    elif kind == 2:
        data[at:at] = rng.bytes(int(rng.integers(1, 50)))
    elif kind == 3:
        del data[at:at + int(rng.integers(1, 50))]
    elif kind == 4:
        data[at:at + 4] = rng.bytes(4)
    else:  # the header's fields, with a checksum that fits
        data[int(rng.integers(16, 29))] = int(rng.integers(256))
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_300_spoilt_pngs_are_named_or_read_whole(cohort):
    rng = np.random.default_rng(0)
    path = cohort / "keras_png_slices_test" / "case_441_slice_3.nii.png"
    good, refused = path.read_bytes(), 0
    for number in range(300):
        path.write_bytes(mutate(good, rng))
        try:
            split = load_test(cohort)
        except cli.UserError as error:
            refused += 1
            assert path.name in str(error) and "\n" not in str(error), number
        else:
            assert split.images.shape == (16, 64, 64), number
    assert 200 < refused < 300  # the rest are harmless: a bit of metadata, a byte after the end


def test_interlaced_pngs_are_read(cohort):
    path = cohort / "keras_png_slices_test" / "case_441_slice_3.nii.png"
    # Adam7 with 64x64 pixels of value 7: seven passes, each row with its filter byte.
    passes = ((8, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (32, 64))
    rows = b"".join((b"\0" + b"\7" * width) * height for height, width in passes)
    write_chunks(path, (64, 64, 8, 0, 0, 0, 1), zlib.compress(rows))
    images = load_test(cohort).images
    assert (images[3] == 7).all()


def test_a_decompression_bomb_is_refused_before_it_is_decoded(cohort, monkeypatch):
    path = cohort / "keras_png_slices_test" / "case_441_slice_0.nii.png"
    write_chunks(path, (9000, 9000, 8, 0, 0, 0, 0), zlib.compress(bytes(9000 * 9001)))
    assert path.stat().st_size < 100_000

    def load(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(cli.UserError, match="9000x9000 pixels; the largest side allowed is 1024"):
        load_test(cohort)
    write_chunks(path, (60_000, 60_000, 8, 0, 0, 0, 0), b"")
    with pytest.raises(cli.UserError, match=path.name):
        load_test(cohort)


def test_a_name_that_is_no_text_is_reported(cohort, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = os.fsencode(cohort / "keras_png_slices_test")
    with open(folder + b"/case_\xff\xfe.png", "wb"):
        pass
    with pytest.raises(SystemExit) as stop:
        dataset.main(["--data-dir", str(cohort)])
    assert stop.value.code == 2 and "has no case and slice in its name" in capsys.readouterr().err


def test_upper_case_endings_are_read_and_hidden_files_passed_over(cohort):
    folder = cohort / "keras_png_slices_test"
    expected = dataset.load_splits(cohort)["test"]
    path = next(folder.iterdir())
    path.rename(path.with_name(path.name.replace(".png", ".PNG")))
    (folder / f"._{path.name}").write_bytes(b"what macOS writes beside a file on another disk")
    split = dataset.load_splits(cohort)["test"]
    np.testing.assert_array_equal(split.images, expected.images)
    np.testing.assert_array_equal(split.positions, expected.positions)
