"""From volumes (the OASIS-1 release, NIfTI) to the PNG folders."""

import csv

import nibabel
import numpy as np
from PIL import Image
import pytest

from tests.conftest import check_refused
import dataset
from support import volumes

SHAPE = 60, 80, 120  # x, y, z in mm, RAS
TOP = 109  # the highest slice of the head


def head(seed=0):
    """A block that says where it is: brighter to the right (x), to the front (y) and upwards (z); int16 RAS."""
    x, y, z = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    volume = 300 + 4 * x + 2 * y + z + 10 * seed
    volume[:5], volume[-5:], volume[:, :5], volume[:, -5:] = 0, 0, 0, 0
    volume[..., TOP + 1:] = 0
    return volume.astype(np.int16)


def expected_slices(volume):
    """The same by hand: plane by plane, transposed and turned so that the front is up."""
    volume = volume.astype(float)
    low = np.percentile(volume, 1)
    high = np.percentile(volume[volume > low], 99.5)
    planes = []
    for position in range(32):
        plane = volume[:, :, round(TOP - 86 + 1.4 * position)]
        pixels = np.zeros((256, 256))
        for x in range(SHAPE[0]):
            for y in range(SHAPE[1]):
                pixels[(256 - SHAPE[1]) // 2 + SHAPE[1] - 1 - y, (256 - SHAPE[0]) // 2 + x] = plane[x, y]
        planes.append(np.round(np.clip((pixels - low) / (high - low), 0, 1) * 255))
    return np.array(planes, np.uint8)


def save_nifti(path, volume, axes="RAS", zoom=1.0):
    """Writes a RAS volume stored along other axes, its affine saying so."""
    ras = nibabel.Nifti1Image(volume, np.diag([zoom, zoom, zoom, 1]))
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes))
    nibabel.save(ras.as_reoriented(turn), path)


def save_oasis1(discs, session, volume, suffix="t88_masked_gfc"):
    """Writes an Analyze pair where the release has it: x from right to left, as Analyze stores, and a fourth axis of length 1."""
    folder = discs / "disc1" / session / "PROCESSED" / "MPRAGE" / "T88_111"
    folder.mkdir(parents=True, exist_ok=True)
    image = nibabel.AnalyzeImage(volume[::-1, :, :, np.newaxis], None)
    image.header.set_zooms((1, 1, 1, 1))
    nibabel.save(image, folder / f"{session}_mpr_n4_anon_111_{suffix}.img")
    return folder


def test_oasis1_pairs_become_the_expected_pixels(tmp_path, capsys):
    discs, out = tmp_path / "discs", tmp_path / "out"
    sources = {f"OAS1_{number:04d}_MR1": head(number) for number in range(1, 7)}
    sources["OAS1_0003_MR2"] = head(9)
    for session, volume in sources.items():
        save_oasis1(discs, session, volume)
    save_oasis1(discs, "OAS1_0001_MR1", head(20), "t88_gfc")  # with the skull: the masked one comes first
    (discs / "disc1" / "OAS1_0099_MR1" / "PROCESSED" / "MPRAGE" / "T88_111").mkdir(parents=True)
    truncated = save_oasis1(discs, "OAS1_0098_MR1", head())
    next(truncated.glob("*.img")).write_bytes(b"short")
    dataset.main(["--from-oasis1", str(discs), "--output-dir", str(out)])
    said = capsys.readouterr().out
    assert "Converted 7 sessions" in said and "skipped 2" in said
    assert "OAS1_0099_MR1: no *_t88_masked_gfc.hdr" in said and "OAS1_0098_MR1" in said
    with open(out / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    splits = dataset.load_splits(out)
    for row in rows:
        split = splits[row["split"]]
        session = row["source"].split("/")[-1].split("_mpr")[0]
        assert row["person"] == session.removesuffix("_MR1").removesuffix("_MR2")
        np.testing.assert_array_equal(split.images[split.cases == int(row["case"])], expected_slices(sources[session]))
    assert len({row["split"] for row in rows if row["person"] == "OAS1_0003"}) == 1
    assert {path.name for path in out.iterdir()} == {"cases.csv", *(f"keras_png_slices_{name}" for name in volumes.SPLITS)}
    assert {path.name for path in tmp_path.iterdir()} == {"discs", "out"}


def test_nifti_of_any_orientation_gives_the_same_pixels(tmp_path):
    sources, out = tmp_path / "volumes", tmp_path / "out"
    sources.mkdir()
    for number, axes in enumerate(("RAS", "LPS", "PIR", "LAS")):
        save_nifti(sources / f"sub-{number}_T1w.nii{'.gz' * (number % 2)}", head(), axes)
    dataset.main(["--from-nifti", str(sources), "--output-dir", str(out)])
    expected = expected_slices(head())
    for split in dataset.load_splits(out).values():
        for case in np.unique(split.cases):
            np.testing.assert_array_equal(split.images[split.cases == case], expected)


def make_bids(folder):
    """Four people with a T1w volume each, one of them twice, among everything else that such a folder holds."""
    t1w = [f"sub-{name}/anat/sub-{name}_T1w.nii.gz" for name in ("01", "02", "03", "04")] + ["sub-01/ses-2/sub-01_ses-2_T1w.nii"]
    other = {"sub-01/anat/sub-01_T2w.nii.gz": "is not named T1w", "sub-02/anat/sub-02_FLAIR.nii": "is not named T1w",
             "sub-01/anat/sub-01_desc-brain_mask.nii.gz": "is a mask or a segmentation",
             "sub-02/anat/sub-02_dseg.nii.gz": "is a mask or a segmentation",
             "sub-02/aparc+aseg.nii": "is a mask or a segmentation",
             "derivatives/sub-01_space-MNI_T1w.nii.gz": "lies in a derivatives folder",
             "derivatives/tool/sub-02_T1w.nii.gz": "lies in a derivatives folder"}
    for name in (*t1w, *other):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_nifti(folder / name, head())
    return t1w, other


def test_of_a_bids_folder_the_t1w_volumes_are_taken_and_the_rest_is_listed(tmp_path, capsys):
    t1w, other = make_bids(tmp_path / "bids")
    found, skipped = volumes.find_nifti(tmp_path / "bids")
    assert found == sorted(((name[:6], tmp_path / "bids" / name) for name in t1w), key=lambda pair: pair[1])
    reasons = dict(line.split(": ", 1) for line in skipped)
    assert reasons.keys() == {str(tmp_path / "bids" / name) for name in other}
    assert all(other[name] in reasons[str(tmp_path / "bids" / name)] for name in other)
    dataset.main(["--from-nifti", str(tmp_path / "bids"), "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert all(f"Skipped {line}" in said for line in skipped) and "Converted 5 sessions" in said and "skipped 7." in said


def test_a_pattern_takes_the_place_of_the_rules(tmp_path, capsys):
    t1w, other = make_bids(tmp_path)
    found, skipped = volumes.find_nifti(tmp_path, "derivatives/**/*.nii.gz")
    assert [path.name for _, path in found] == ["sub-01_space-MNI_T1w.nii.gz", "sub-02_T1w.nii.gz"]
    assert [person for person, _ in found] == ["sub-01", "sub-02"]
    assert len(skipped) == 10 and all(line.endswith("does not match --pattern") for line in skipped)
    check_refused(dataset.main, ["--from-nifti", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--pattern", "*_PDw.nii"],
                  "holds no .nii or .nii.gz files that can be used", capsys)


def test_without_t1w_names_all_but_masks_are_taken(tmp_path):
    for name in ("OAS1_0001_MR1_t88_masked_gfc.nii", "OAS1_0001_MR2.nii.gz", "IXI002.nii", "IXI002_MASK.nii", "labels.nii.gz"):
        (tmp_path / name).touch()
    found, skipped = volumes.find_nifti(tmp_path)
    assert found == [("IXI002", tmp_path / "IXI002.nii"), ("OAS1_0001", tmp_path / "OAS1_0001_MR1_t88_masked_gfc.nii"),
                     ("OAS1_0001", tmp_path / "OAS1_0001_MR2.nii.gz")]
    assert [line.split(":")[0] for line in skipped] == [str(tmp_path / name) for name in ("IXI002_MASK.nii", "labels.nii.gz")]


def test_labels_are_told_from_pictures_by_their_few_whole_numbers(tmp_path):
    def read(volume):
        save_nifti(tmp_path / "volume.nii", volume)
        return volumes.read_volume(tmp_path / "volume.nii")

    ramp = np.arange(20 ** 3).reshape(20, 20, 20)
    for labels in (ramp % 2, ramp % 128):  # a mask, and the most labels
        with pytest.raises(ValueError, match=f"holds labels, not a picture .{labels.max() + 1} different whole numbers"):
            read(labels.astype(np.int16))
    for picture in (ramp % 129, ramp % 5 / 2):
        np.testing.assert_allclose(read(picture.astype(np.float32)), picture)


def test_what_is_left_out_is_listed_even_if_too_little_is_left(tmp_path, capsys):
    for number, volume in enumerate((head(1), head(2), head(3) // 70)):
        save_nifti(tmp_path / f"person{number}.nii", volume)
    with pytest.raises(SystemExit):
        dataset.main(["--from-nifti", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "Only 2 people have usable volumes" in said.err
    assert f"Skipped {tmp_path / 'person2.nii'}: holds labels" in said.out


def test_samples_as_a_volume_have_orientation_and_voxel_size(tmp_path):
    slices = np.random.default_rng(0).integers(0, 256, (32, 40, 30), np.uint8)
    volumes.write_nifti(slices, tmp_path / "samples.nii.gz")
    image = nibabel.load(tmp_path / "samples.nii.gz")
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.header.get_zooms(), (1, 1, 1.4), atol=1e-6)
    # The middle of a slice lies above the origin, the first slice 8 mm below it.
    np.testing.assert_allclose(image.affine @ [14.5, 19.5, 0, 1], (0, 0, -8, 1))
    volume = np.asarray(image.dataobj)
    assert volume.dtype == np.uint8 and volume.shape == (30, 40, 32)
    for z, row, column in ((0, 0, 0), (31, 39, 29), (7, 3, 20)):  # row 0 is the front, column 0 the left
        assert volume[column, 39 - row, z] == slices[z, row, column]


def test_volumes_of_other_voxels_are_resampled_to_1_mm(tmp_path):
    volume = np.random.default_rng(0).integers(0, 1000, (20, 25, 40)).astype(np.int16)
    save_nifti(tmp_path / "coarse.nii", volume, zoom=2.0)
    resampled = volumes.read_volume(tmp_path / "coarse.nii")
    assert resampled.shape == (39, 49, 79) and resampled.dtype == np.float32
    np.testing.assert_array_equal(resampled[::2, ::2, ::2], volume)
    np.testing.assert_allclose(resampled[1::2, ::2, ::2], (volume[1:] + volume[:-1]) / 2, atol=0.5)  # linear, rounded
    save_nifti(tmp_path / "nearly.nii", volume, zoom=1.0005)
    np.testing.assert_array_equal(volumes.read_volume(tmp_path / "nearly.nii"), volume)


def test_the_split_is_by_person_seeded_and_85_10_5(tmp_path):
    people = [f"OAS1_{number:04d}" for number in range(40)]
    rows = [(person, f"{person}_MR{session}") for person in people for session in (1, 2)]
    counts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(80):
            np.save(folder / f"{index}.npy", np.full((1, 8, 8), index, np.uint8))
        counts.append(volumes._split_by_person(folder, rows, seed))
    assert counts[0] == {"train": 68, "validate": 8, "test": 4}
    tables = [(tmp_path / name / "cases.csv").read_text() for name in "abc"]
    assert tables[0] == tables[1] != tables[2]
    table = list(csv.DictReader(tables[0].splitlines()))
    assert all(len({row["split"] for row in table if row["person"] == person}) == 1 for person in people)
    assert [int(row["case"]) for row in table] == list(range(1, 81))
    assert [row["split"] for row in table] == 68 * ["train"] + 8 * ["validate"] + 4 * ["test"]
    for row in table:
        with Image.open(volumes.slice_file(tmp_path / "a", row["split"], int(row["case"]), 0)) as image:
            assert (row["person"], row["source"]) == rows[image.getpixel((0, 0))]
    assert not list((tmp_path / "a").glob("*.npy"))


def test_three_people_are_enough_and_the_smallest_splits_have_one(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.zeros((1, 8, 8), np.uint8))
    counts = volumes._split_by_person(tmp_path, [(str(number), "") for number in range(3)], 0)
    assert counts == {"train": 1, "validate": 1, "test": 1}


def test_the_template_becomes_a_brain(tmp_path):
    from nilearn.datasets import load_mni152_template

    nibabel.save(load_mni152_template(resolution=1), tmp_path / "mni.nii.gz")
    slices = volumes.axial_slices(volumes.read_volume(tmp_path / "mni.nii.gz"))
    assert slices.shape == (32, 256, 256) and slices.dtype == np.uint8
    assert 0.65 < (slices == 0).mean() < 0.9
    middle = slices[16].astype(float)
    rows, columns = np.nonzero(middle)
    assert 150 < np.ptp(rows) < 200 and 120 < np.ptp(columns) < 160  # longer from front to back than wide, in mm
    centre = round((columns.min() + columns.max()) / 2)
    left, right = middle[:, centre - 60:centre], middle[:, centre + 1:centre + 61][:, ::-1]
    assert np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.9


def test_the_top_is_the_highest_slice_with_a_square_centimetre_of_head():
    volume = np.zeros(SHAPE, np.float32)
    volume[5:-5, 5:-5, :TOP + 1] = 100 + 8 * np.arange(TOP + 1)  # 5 mm are 10 of 255 levels
    expected = volumes.axial_slices(volume).astype(int)
    for pixels, brightness, counts in ((99, 1, False), (100, 1, True), (2000, 0.09, False), (2000, 0.11, True)):
        hat = volume.copy()
        hat[10:50, 10:60, TOP + 5] = (np.arange(2000) < pixels).reshape(40, 50) * brightness * volume.max()
        lower = np.median((expected - volumes.axial_slices(hat))[:, 128, 110:140])
        assert -12 < lower < -8 if counts else abs(lower) <= 2, (pixels, brightness)


def test_neither_the_scale_nor_the_zero_of_brightness_matters():
    expected = volumes.axial_slices(head())
    np.testing.assert_allclose(volumes.axial_slices(head() * 3 + 400).astype(int), expected, atol=1)


def test_a_head_may_end_86_mm_below_its_top_and_no_higher():
    whole = volumes.axial_slices(head()).astype(int)
    assert np.abs(volumes.axial_slices(head()[..., TOP - 86:]) - whole).max() <= 2  # the percentiles are another volume's
    with pytest.raises(ValueError, match="ends 3 mm too high"):
        volumes.axial_slices(head()[..., TOP - 83:])


@pytest.mark.parametrize("axis", (0, 1))
def test_a_dark_surplus_is_cut_off_on_both_sides(axis):
    volume, widths = head().astype(np.float32), [(0, 0)] * 3
    widths[axis] = (120, 101)  # 60 + 221 or 80 + 221 voxels
    wide = np.pad(volume, widths)
    slices = volumes.axial_slices(wide)
    assert slices.shape == (32, 256, 256)
    cut = (wide.shape[axis] - 256) // 2
    window = [slice(None)] * 3
    window[axis] = slice(cut, cut + 256) if axis == 0 else slice(wide.shape[1] - 256 - cut, wide.shape[1] - cut)
    np.testing.assert_array_equal(slices > 0, volumes.axial_slices(wide[tuple(window)]) > 0)


@pytest.mark.parametrize("volume, reason", (
    (np.zeros((20, 20, 120)), "constant"), (np.full((20, 20, 120), np.nan), "not finite"), (head()[..., 40:], "mm too high"),
    (np.pad(head(), ((150, 150), (0, 0), (0, 0)), mode="edge")[:, :, :], "along x"), (np.ones((4, 4, 4, 2)), "4 dimensions"),
), ids=("black", "no numbers", "cut off", "too wide", "four axes"))
def test_unusable_volumes_say_why(tmp_path, volume, reason):
    if reason == "along x":
        volume[:] = np.where(np.arange(volume.shape[2]) <= TOP, 500 + np.arange(len(volume))[:, np.newaxis, np.newaxis], 0)
        volume[0, 0] = 0
    nibabel.save(nibabel.Nifti1Image(volume.astype(np.float32), np.eye(4)), tmp_path / "odd.nii")
    with pytest.raises(ValueError, match=reason):
        volumes.axial_slices(volumes.read_volume(tmp_path / "odd.nii"))


def test_conversion_refuses_bad_input_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    check_refused(dataset.main, ["--from-nifti", "nowhere", "--output-dir", "out"], "nowhere is not a folder", capsys)
    check_refused(dataset.main, ["--from-nifti", "empty"], "--output-dir is missing", capsys)
    check_refused(dataset.main, ["--from-nifti", "empty", "--output-dir", "out"], "empty holds no .nii", capsys)
    check_refused(dataset.main, ["--from-oasis1", "empty", "--output-dir", "out"], "empty holds no PROCESSED", capsys)
    check_refused(dataset.main, ["--from-nifti", "empty", "--output-dir", "empty"], "empty holds no .nii", capsys)
    save_nifti(tmp_path / "empty" / "a.nii", head())
    check_refused(dataset.main, ["--from-nifti", "empty", "--output-dir", "empty"], "empty exists already", capsys)
    check_refused(dataset.main, ["--from-nifti", "empty", "--output-dir", "out"], "Only 1 people have usable volumes", capsys)
    command = ["--from-nifti", "empty", "--output-dir", "out", "--pattern"]
    check_refused(dataset.main, ["--from-oasis1", *command[1:], "*"], "--pattern chooses among", capsys)
    for pattern in ("", "/*"):
        check_refused(dataset.main, [*command, pattern], f"--pattern '{pattern}' cannot be used", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
