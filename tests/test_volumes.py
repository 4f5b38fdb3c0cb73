"""From volumes (the OASIS-1 release, NIfTI and the like) to the PNG folders, and back."""

import csv
import gzip

import nibabel
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage, spatial

import dataset
from support import volumes
from tests.conftest import check_refused

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
    other = {"sub-01/anat/sub-01_T2w.nii.gz": "is T2w by its name", "sub-02/anat/sub-02_FLAIR.nii": "is FLAIR by its name",
             "sub-03/anat/sub-03_angles.nii": "is not named T1", "sub-03/func/sub-03_task.nii": "is not named T1",
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
    sessions, left_out = volumes.find_nifti(tmp_path / "bids")
    assert sorted(sessions) == sorted((name[:6], tmp_path / "bids" / name) for name in t1w)
    reasons = dict(line.split(": ", 1) for line in left_out)
    assert reasons.keys() == {str(tmp_path / "bids" / name) for name in other}
    assert all(other[name] in reasons[str(tmp_path / "bids" / name)] for name in other)
    dataset.main(["--from-nifti", str(tmp_path / "bids"), "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert all(f"Skipped {line}" in said for line in left_out) and "Converted 5 sessions" in said and "skipped 9." in said


def test_a_pattern_takes_the_place_of_the_rules(tmp_path, capsys):
    t1w, other = make_bids(tmp_path)
    sessions, reasons = volumes.find_nifti(tmp_path, "derivatives/**/*.nii.gz")
    assert [path.name for _, path in sessions] == ["sub-01_space-MNI_T1w.nii.gz", "sub-02_T1w.nii.gz"]
    assert [person for person, _ in sessions] == ["sub-01", "sub-02"]
    assert len(reasons) == 12 and all(line.endswith("does not match --pattern") for line in reasons)
    check_refused(dataset.main, ["--from-nifti", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--pattern", "*_PDw.nii"],
                  "holds no .nii, .nii.gz, .hdr or .mgz files that can be used", capsys)


def test_without_t1w_names_all_but_masks_are_taken(tmp_path):
    for name in ("OAS1_0001_MR1_t88_masked_gfc.nii", "OAS1_0001_MR2.nii.gz", "IXI002.nii", "IXI002_MASK.nii", "labels.nii.gz"):
        (tmp_path / name).touch()
    sessions, reasons = volumes.find_nifti(tmp_path)
    assert sessions == [("IXI002", tmp_path / "IXI002.nii"), ("OAS1_0001", tmp_path / "OAS1_0001_MR1_t88_masked_gfc.nii"),
                     ("OAS1_0001", tmp_path / "OAS1_0001_MR2.nii.gz")]
    assert [line.split(":")[0] for line in reasons] == [str(tmp_path / name) for name in ("IXI002_MASK.nii", "labels.nii.gz")]


def test_what_is_left_out_is_listed_even_if_too_little_is_left(tmp_path, capsys):
    for number, volume in enumerate((head(1), head(2), head(3) // 70)):
        save_nifti(tmp_path / f"person{number}.nii", volume)
    with pytest.raises(SystemExit):
        dataset.main(["--from-nifti", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "Only 2 people have usable volumes" in said.err
    assert f"Skipped {tmp_path / 'person2.nii'}: holds labels" in said.out


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
    assert counts[0] == {"train": (68, 34), "validate": (8, 4), "test": (4, 2)}
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
    assert counts == {"train": (1, 1), "validate": (1, 1), "test": (1, 1)}


def test_the_template_becomes_a_brain():
    from nilearn.datasets import load_mni152_template

    slices = volumes.axial_slices(load_mni152_template(resolution=1).get_fdata(dtype=np.float32))
    assert slices.shape == (32, 256, 256) and slices.dtype == np.uint8
    assert 0.65 < (slices == 0).mean() < 0.9
    middle = slices[16].astype(float)
    rows, columns = np.nonzero(middle)
    assert 150 < np.ptp(rows) < 200 and 120 < np.ptp(columns) < 160  # longer from front to back than wide, in mm
    centre = round((columns.min() + columns.max()) / 2)
    left, right = middle[:, centre - 60:centre], middle[:, centre + 1:centre + 61][:, ::-1]
    assert np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.9


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
    (np.zeros((20, 20, 120)), "constant"), (np.full((20, 20, 120), np.nan), "not numbers"), (head()[..., 40:], "mm too high"),
    (np.ones((4, 4, 4, 2)), "4 dimensions .4 x 4 x 4 x 2."),
), ids=("black", "no numbers", "ends too high", "four axes"))
def test_unusable_volumes_say_why(tmp_path, volume, reason):
    nibabel.save(nibabel.Nifti1Image(volume.astype(np.float32), np.eye(4)), tmp_path / "odd.nii")
    with pytest.raises(ValueError, match=reason):
        volumes.read_slices(tmp_path / "odd.nii")


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
    check_refused(dataset.main, ["--from-oasis1", *command[1:], "*"], "--pattern is of no use with --from-oasis1", capsys)
    check_refused(dataset.main, ["--from-oasis1", *command[1:-1], "--person-pattern", "(.)"], "--person-pattern is of no use with", capsys)
    for pattern in ("", "/*"):
        check_refused(dataset.main, [*command, pattern], f"--pattern '{pattern}' cannot be used", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# Whose head it is -----------------------------------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def find_people(folder, **options):
    """What `find_nifti` finds in a folder, as {path: person}."""
    return {path.relative_to(folder).as_posix(): person for person, path in volumes.find_nifti(folder, **options)[0]}


ADNI = "ADNI_{0}_MR_MPR__GradWarp__B1_Correction__N3__Scaled_Br_{1}_S{2}_I{2}.nii"


@pytest.mark.parametrize("people", (
    {ADNI.format("002_S_0413", "2006", 13893): "002_S_0413", ADNI.format("002_S_0413", "2007", 25371): "002_S_0413",
     ADNI.format("130_S_2373", "2006", 14784): "130_S_2373"},
    {"ADNI/002_S_0413/MP-RAGE/2006-05-02/I1.nii": "002_S_0413", "ADNI/002_S_0413/MP-RAGE/2007-06-01/I2.nii": "002_S_0413"},
    {"IXI002-Guys-0828-T1.nii.gz": "IXI002", "IXI012-HH-1211-T1.nii.gz": "IXI012"},
    {"OAS30001_MR_d0129/anat2/T1w.nii.gz": "OAS30001", "OAS30001_MR_d0757/anat2/sub-OAS30001_T1w.nii.gz": "OAS30001"},
    {"OAS2_0001_MR1/RAW/mpr-1.nii": "OAS2_0001", "OAS1_0002_MR2_mpr.nii": "OAS1_0002"},
    {"sub-01_t1w.nii": "sub-01", "sub-A2/ses-1/anat/t1w.nii": "sub-A2", "sub-A2/ses-2/anat/t1w.nii": "sub-A2"},
    {f"{subject}/mri/T1.{end}": subject for subject, end in
     (("bert", "mgz"), ("ernie", "mgz"), ("anna", "nii.gz"), ("otto", "nii.gz"))},
    {f"100{number}/T1w/T1w_acpc_dc_restore{end}": f"100{number}" for number in (206, 307)
     for end in (".nii.gz", "_brain.nii.gz")},
    {f"{subject}/session_{session}/anat_1/anat.nii.gz": subject for subject, session in
     (("0025427", 1), ("0025427", 2), ("0025428", 1), ("0025429", 2), ("0025430", 1))},
    {"0025427/session_1/anat.nii.gz": "0025427", "0025428/session_2/anat.nii.gz": "0025428"},  # only the names repeat
    {"a/mri/T1.mgz": "a", "b/mri/T1.mgz": "b", "b/mri/extra_T1.mgz": "b"},  # one file without a namesake
    {f"release/{site}/{subject}/anat.nii": f"release/{site}/{subject}" for site, subject in
     (("Caltech", "51456"), ("Caltech", "51457"), ("Yale", "50551"), ("Yale", "50552"))},
    {"healthy/p1.nii": "p1", "patients/p2.nii": "p2", "p3.nii": "p3"},
), ids=("ADNI", "ADNI folders", "IXI", "OASIS-3", "OASIS-1 and 2", "BIDS", "FreeSurfer", "HCP", "CoRR", "one session each",
        "no namesake", "sites", "unique names"))
def test_the_person_is_told_by_the_path(tmp_path, people):
    touch(tmp_path, *people)
    assert find_people(tmp_path) == people


def test_no_person_with_several_visits_is_in_two_splits(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for person in range(4):
        for visit in range(3):
            save_nifti(tmp_path / "in" / ADNI.format(f"00{person}_S_0413", 2006 + visit, 10 * person + visit), head(person))
    dataset.main(["--from-nifti", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")])
    with open(tmp_path / "out" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and len({(row["person"], row["split"]) for row in rows}) == 4
    assert all(row["person"] in row["source"] for row in rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "6", "2"] in lines and ["validate", "3", "1"] in lines and ["test", "3", "1"] in lines


def test_other_contrasts_are_left_out_by_name_whatever_the_case(tmp_path):
    t1 = ("BraTS19_CBICA_AAB_1/BraTS19_CBICA_AAB_1_t1.nii.gz", "BraTS-GLI-00000-000-t1n.nii.gz", "IXI002-Guys-0828-T1.nii.gz",
          "sub-01/anat/sub-01_t1w.nii", "sub-02/anat/sub-02_T1W.NII.GZ", "PD_017_T1.nii", "100307/T1w/T1w_acpc_dc_restore.nii.gz")
    other = {"BraTS19_CBICA_AAB_1/BraTS19_CBICA_AAB_1_t1ce.nii.gz": "t1ce", "BraTS19_CBICA_AAB_1_flair.nii.gz": "flair",
             "BraTS19_CBICA_AAB_1_t2.nii.gz": "t2", "BraTS-GLI-00000-000-t2f.nii.gz": "t2f",
             "BraTS-GLI-00000-000-t1c.nii.gz": "t1c",
             "IXI002-Guys-0828-T2.nii.gz": "T2", "IXI002-Guys-0828-PD.nii.gz": "PD", "IXI002-Guys-0828-MRA.nii.gz": "MRA",
             "sub-01/dwi/sub-01_DWI.nii": "DWI", "sub-01/func/sub-01_task-rest_bold.nii": "bold", "bold/run1.nii": "bold",
             "100307/T1w/T2w_acpc_dc_restore.nii.gz": "T2w", "sub-03_T1w_reg_T2starw.nii": "T2starw",
             "sub-03_inv-1_MP2RAGE.nii": "inv-1"}
    touch(tmp_path, *t1, *other, "sub-01/anat/sub-01_ce-gadolinium_T1w.nii", "BraTS19_CBICA_AAB_1_SEG.nii.gz")
    sessions, reasons = volumes.find_nifti(tmp_path)
    assert {path for _, path in sessions} == {tmp_path / name for name in t1}
    assert {f"{tmp_path / name}: is {word} by its name, not T1" for name, word in other.items()} < set(reasons)
    assert len(reasons) == len(other) + 2 and "contrast agent" in " ".join(reasons)


def test_the_person_by_a_pattern(tmp_path, capsys):
    touch(tmp_path, "visit1/patient_7.nii", "visit2/patient_7.nii", "visit2/patient_12.nii", "phantom.nii")
    assert find_people(tmp_path, person_pattern="patient_([0-9]+)") == {
        "visit1/patient_7.nii": "7", "visit2/patient_7.nii": "7", "visit2/patient_12.nii": "12"}
    assert volumes.find_nifti(tmp_path, None, "patient_([0-9]+)")[1] == [
        f"{tmp_path / 'phantom.nii'}: has no person that --person-pattern finds"]
    command = ["--from-nifti", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--person-pattern"]
    for pattern, expected in (("patient_(", "is no regular expression"), ("patient_.", "has 0 groups"),
                              ("(p)(a)", "has 2 groups")):
        check_refused(dataset.main, [*command, pattern], expected, capsys)


def test_links_are_followed_once_and_hidden_files_passed_over(tmp_path):
    touch(tmp_path / "elsewhere", "b/T1.nii", "._b/T1.nii")
    touch(tmp_path / "data", "a/T1.NII.GZ", "a/._T1.nii", ".cache/T1.nii", "c/T1.hdr", "c/T1.img", "d/T1.mgz", "d/notes.txt")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    expected = {"a/T1.NII.GZ": "a", "b/T1.nii": "b", "c/T1.hdr": "c", "d/T1.mgz": "d"}
    assert find_people(tmp_path / "data").keys() == expected.keys()
    assert find_people(tmp_path / "data", pattern="*/T1.*").keys() == expected.keys()
    assert not volumes.find_nifti(tmp_path / "data")[1]


def test_a_folder_of_dicom_names_dcm2niix(tmp_path, capsys):
    for name in ("series1/IM_0001", "series2/1.dcm"):
        touch(tmp_path, name)
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    touch(tmp_path, "README")
    assert volumes.find_nifti(tmp_path)[1] == [f"{tmp_path / name}: holds DICOM files; convert them to NIfTI with dcm2niix"
                                               for name in ("series1", "series2")]


# Where the head is ----------------------------------------------------------------------------------------------------

HALF_AXES = np.array([32, 40, 70])  # mm, of a rounded box about the origin: its top lies at z = 70
MARK = np.array([12, 20, 5])  # mm; slice k lies at z = 70 - 86 + 1.4 k, the mark therefore in slice 15
UPRIGHT = 80, 96, 160  # voxels of 1 mm


def phantom(shape=UPRIGHT, affine=None):
    """A textured, rounded box with a bright ball at `MARK`: (float32 volume, affine); by default of 1 mm about the origin."""
    affine = centred(shape, np.eye(3)) if affine is None else affine
    voxels = np.indices(shape, np.float32).reshape(3, -1)
    x, y, z = (affine[:3, :3].astype(np.float32) @ voxels + affine[:3, 3:].astype(np.float32)).reshape(3, *shape)
    radius = ((x / HALF_AXES[0]) ** 4 + (y / HALF_AXES[1]) ** 4 + (z / HALF_AXES[2]) ** 4) ** 0.25
    mark = np.exp(-((x - MARK[0]) ** 2 + (y - MARK[1]) ** 2 + (z - MARK[2]) ** 2) / 50)
    volume = (250 + 15 * np.cos(x / 9) * np.cos(y / 8 + z / 20) + 600 * mark) * ((1 - radius) * 60 + 0.5).clip(0, 1)
    return volume, affine


def centred(shape, axes):
    """An affine of these axes (3, 3) with the origin in the middle of the volume."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def save(path, volume, affine):
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    return path


def marked(slices):
    """Where the mark lies: (slice, millimetres to the right, millimetres to the front), its centre of mass."""
    smooth = ndimage.gaussian_filter(slices.astype(np.float32), (1, 2, 2))
    labels, count = ndimage.label(smooth > 0.95 * smooth.max())
    largest = 1 + np.argmax(ndimage.sum_labels(labels > 0, labels, range(1, count + 1)))
    position, row, column = ndimage.center_of_mass(smooth, labels, largest)
    return position, column - 127.5, 127.5 - row


EXPECTED = pytest.approx((15, 12, 20), abs=1.5)


def test_the_phantom_shows_its_mark_where_it_was_computed(tmp_path):
    slices, notes = volumes.read_slices(save(tmp_path / "a.nii", *phantom()))
    assert marked(slices) == pytest.approx((15, 12, 20), abs=0.5) and notes == []


def test_a_head_that_is_cut_off_or_wider_than_the_slices_is_refused():
    volume, _ = phantom()
    with pytest.raises(ValueError, match="is cut off below the top of the head"):
        volumes.axial_slices(volume[..., :UPRIGHT[2] // 2 + 20])
    with pytest.raises(ValueError, match="more than 256 mm along x"):
        volumes.axial_slices(np.repeat(volume[:, ::2], 5, axis=0))
    with pytest.raises(ValueError, match="more than 256 mm along y"):
        volumes.axial_slices(np.repeat(volume[::2], 5, axis=1))


def spoil(kind, rng):
    """The phantom as a scanner may show it."""
    volume, _ = phantom()
    sigma = 250 / {"signal-to-noise 25": 25, "signal-to-noise 8": 8, "signal-to-noise 5": 5}.get(kind, 100)
    if kind == "streaks":
        volume[::8, :, UPRIGHT[2] // 2 + 50:] += 200  # planes of 1 mm through the top of the head and above it
        volume[:, ::10] += 60
    if kind == "wrap-around":
        volume[20:60, 20:80, -6:] = 250 + 5 * np.arange(6)  # the neck, above a gap of 4 mm
    if kind == "MP2RAGE":  # the background is as bright as tissue on average, and all noise
        tissue, noise = volume * 6 + rng.normal(0, 100, volume.shape), rng.uniform(0, 4095, volume.shape)
        return np.where(volume > 100, tissue, noise).astype(np.float32)
    return np.hypot(volume + rng.normal(0, sigma, volume.shape), rng.normal(0, sigma, volume.shape)).astype(np.float32)


@pytest.mark.parametrize("kind", ("signal-to-noise 25", "signal-to-noise 8", "streaks", "wrap-around", "MP2RAGE"))
def test_what_lies_above_the_head_does_not_move_the_slices(kind):
    assert marked(volumes.axial_slices(spoil(kind, np.random.default_rng(0)))) == EXPECTED


def test_the_top_is_the_scalp_even_where_the_skull_parts_it_from_the_brain():
    volume, affine = phantom()
    voxels = np.indices(UPRIGHT).T @ affine[:3, :3] + affine[:3, 3]
    radius = (np.abs(voxels / HALF_AXES) ** 4).sum(axis=-1).T ** 0.25
    volume[(radius > 0.74) & (radius < 0.88)] = 0
    assert ndimage.label(volume > 100)[1] == 2
    assert marked(volumes.axial_slices(volume)) == EXPECTED


def test_zeros_in_the_corners_do_not_hide_the_noise():
    volume = spoil("signal-to-noise 5", np.random.default_rng(0))
    x, y, z = np.ogrid[tuple(slice(-1, 1, 1j * length) for length in volume.shape)]
    volume[np.abs(x) + np.abs(y) + z > 2.15] = 0  # most of each corner, as the correction of distortions may leave it
    assert marked(volumes.axial_slices(volume)) == EXPECTED


@pytest.mark.parametrize("distribution, numbers", (("rayleigh", (40,)), ("uniform", (0, 4095))), ids=("magnitude", "MP2RAGE"))
def test_noise_alone_is_no_head(distribution, numbers):
    volume = getattr(np.random.default_rng(0), distribution)(*numbers, UPRIGHT)
    with pytest.raises(ValueError, match="shows no head .nothing stands out from its noise"):
        volumes.axial_slices(volume.astype(np.float32))


def test_a_tube_is_no_head():
    volume = np.zeros(UPRIGHT, np.float32)
    volume[40:60, 50:70] = np.random.default_rng(0).uniform(300, 500, (20, 20, UPRIGHT[2]))
    with pytest.raises(ValueError, match="shows no head where the slices lie: less than 20 cm2 in 32 of 32"):
        volumes.axial_slices(volume)


@pytest.fixture(scope="module")
def upright():
    return volumes.axial_slices(phantom()[0])


@pytest.mark.parametrize("degrees, size, noise",
                         ((15, 0.9, 0), (15, 1.0, 0), (15, 1.1, 0), (15, 1.0, 20), (0, 0.9, 0), (0, 1.1, 20)))
def test_a_tilted_head_gives_the_same_slices_at_any_voxel_size(upright, tmp_path, degrees, size, noise):
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    tilt = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    shape = tuple(round(length / size) for length in (80, 130, 160))
    volume, affine = phantom(shape, centred(shape, size * tilt))
    volume += np.random.default_rng(0).rayleigh(noise, shape)
    slices, _ = volumes.read_slices(save(tmp_path / "tilted.nii", volume, affine))
    assert marked(slices) == EXPECTED
    assert noise or np.corrcoef(slices.ravel(), upright.ravel())[0, 1] > 0.97


def test_the_affine_decides_over_pixdim(tmp_path):
    shape = 40, 48, 80
    path = save(tmp_path / "a.nii", *phantom(shape, centred(shape, 2 * np.eye(3))))
    content = bytearray(path.read_bytes())
    content[80:92] = np.array([1, 1, 1], "<f4").tobytes()  # pixdim[1:4]
    content[252:254] = bytes(2)  # no qform, to which pixdim belongs
    path.write_bytes(content)
    slices, notes = volumes.read_slices(path)
    assert marked(slices) == EXPECTED
    assert notes == ["its affine and its pixdim differ: the voxels are taken as the affine says"]


def test_volumes_of_other_voxels_are_resampled_to_1_mm():
    volume = np.random.default_rng(0).integers(0, 1000, (20, 25, 40)).astype(np.int16)
    resampled = volumes._to_ras(nibabel.Nifti1Image(volume, np.diag([2, 2, 2, 1])), [])
    assert resampled.shape == (39, 49, 79) and resampled.dtype == np.float32
    np.testing.assert_array_equal(resampled[::2, ::2, ::2], volume)
    np.testing.assert_allclose(resampled[1::2, ::2, ::2], (volume[1:] + volume[:-1]) / 2, atol=1e-3)
    nearly = nibabel.Nifti1Image(volume, np.diag([1.0005, 1.0005, 1.0005, 1]))
    np.testing.assert_array_equal(volumes._to_ras(nearly, []), volume)


@pytest.mark.parametrize("unit, millimetres", (("meter", 1000), ("micron", 0.001)))
def test_units_of_length_are_honoured(tmp_path, unit, millimetres):
    volume, affine = phantom()
    image = nibabel.Nifti1Image(volume, np.diag([*[1 / millimetres] * 3, 1]) @ affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    slices, notes = volumes.read_slices(tmp_path / "a.nii")
    assert marked(slices) == EXPECTED
    assert notes == [f"its lengths are in {'metres' if unit == 'meter' else 'microns'} by its header"]


def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path):
    image = nibabel.Nifti1Image(*phantom())
    image.header.set_xyzt_units("meter")  # though its voxels are of 1 mm
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match="is 79,001 x 95,001 x 159,001 mm large by its header; correct its voxel sizes"):
        volumes.read_slices(tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[40:48] = np.array([3, 32767, 32767, 32767], "<i2").tobytes()  # dim
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(ValueError, match="has 32767 x 32767 x 32767 voxels by its header, too many for a head"):
        volumes.read_slices(tmp_path / "a.nii")


@pytest.mark.parametrize("number", (np.nan, np.inf, -np.inf))
def test_what_is_no_number_outside_of_the_head_is_background(tmp_path, number):
    volume, affine = phantom()
    outside = volume == 0
    expected, _ = volumes.read_slices(save(tmp_path / "zero.nii", volume, affine))
    volume[outside] = number
    slices, notes = volumes.read_slices(save(tmp_path / "odd.nii", volume, affine))
    np.testing.assert_array_equal(slices, expected)
    assert notes == [f"{outside.mean():.1%} of its voxels are not numbers: taken as background"]


def test_a_volume_of_which_most_is_no_number_is_refused(tmp_path):
    volume, affine = phantom()
    volume[np.random.default_rng(0).random(volume.shape) < 0.6] = np.nan
    with pytest.raises(ValueError, match="most of its voxels are not numbers"):
        volumes.read_slices(save(tmp_path / "a.nii", volume, affine))


def parcels(count):
    """The phantom cut into so many parcels, whole numbers from 1; 0 outside."""
    volume, affine = phantom()
    inside = np.argwhere(volume > 200)
    seeds = inside[np.random.default_rng(0).choice(len(inside), count, replace=False)]
    labels = np.zeros(volume.shape)
    labels[tuple(inside.T)] = 1 + spatial.KDTree(seeds).query(inside)[1]
    return labels, affine


@pytest.mark.parametrize("labels, dtype", ((1, np.uint8), (113, np.int16), (190, np.float32), (1000, np.int32)))
def test_labels_are_told_by_equal_neighbours_however_many_there_are(tmp_path, labels, dtype):
    volume, affine = parcels(labels)
    assert len(np.unique(volume)) == labels + 1
    with pytest.raises(ValueError, match="holds labels, not a picture .[0-9]+% of neighbouring voxels are equal"):
        volumes.read_slices(save(tmp_path / "a.nii", volume.astype(dtype), affine))


def test_a_phantom_of_one_brightness_is_a_picture_unless_its_numbers_are_whole(tmp_path):
    volume, affine = parcels(1)
    slices, _ = volumes.read_slices(save(tmp_path / "a.nii", (volume / 2).astype(np.float32), affine))
    assert set(np.unique(slices)) == {0, 255}


def test_a_picture_of_few_whole_numbers_is_no_labels(tmp_path):
    volume, affine = phantom()
    noisy = volume / volume.max() * 124 + np.random.default_rng(0).normal(0, 2, volume.shape)
    norm = np.where(volume > 0, noisy.clip(0, 128), 0).astype(np.uint8)  # as FreeSurfer's norm.mgz
    assert len(np.unique(norm)) < 129
    nibabel.save(nibabel.MGHImage(norm, affine), tmp_path / "norm.mgz")
    assert marked(volumes.read_slices(tmp_path / "norm.mgz")[0]) == EXPECTED


def test_every_kind_of_file_gives_the_same_slices(tmp_path):
    volume, affine = phantom()
    volume = np.round(volume).astype(np.int16)
    expected, _ = volumes.read_slices(save(tmp_path / "a.nii", volume, affine))
    nibabel.save(nibabel.Nifti1Pair(volume, affine), tmp_path / "pair.hdr")
    nibabel.save(nibabel.MGHImage(volume.astype(np.int32), affine), tmp_path / "a.mgz")
    nibabel.save(nibabel.Nifti2Image(volume, affine), tmp_path / "two.nii")
    (tmp_path / "A.NII.GZ").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes(), 1))
    for name in ("pair.hdr", "pair.img", "a.mgz", "two.nii", "A.NII.GZ"):
        slices, notes = volumes.read_slices(tmp_path / name)
        np.testing.assert_array_equal(slices, expected, err_msg=name)
        assert notes == []


def test_a_header_without_axes_is_said(tmp_path):
    volume, _ = phantom()
    slices, notes = volumes.read_slices(save(tmp_path / "a.nii", volume[::-1], None))  # then x runs from right to left
    assert notes == ["its header tells no axes (neither qform nor sform): taken as left, front, up"]
    assert marked(slices) == EXPECTED


def odd_file(folder, kind):
    """Writes a file that cannot be used."""
    path = folder / "odd.nii"
    volume = np.random.default_rng(0).integers(0, 99, (8, 9, 10)).astype(np.int16)
    if kind == "colour":
        save(path, np.zeros((8, 9, 10), [(name, "u1") for name in "RGB"]), np.eye(4))
    elif kind == "complex":
        save(path, volume.astype(np.complex64), np.eye(4))
    elif kind == "DICOM":
        path.write_bytes(bytes(128) + b"DICM" + bytes(100))
    elif kind == "empty":
        path.touch()
    else:
        save(path, volume, np.eye(4))
        content = bytearray(path.read_bytes())
        if kind == "gzipped":
            content = gzip.compress(content)
        if kind == "cut":
            content = content[:500]
        if kind == "singular":
            content[280:296] = bytes(16)  # srow_x
        if kind == "infinite":
            content[280:284] = np.array(np.nan, "<f4").tobytes()
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind, reason", (
    ("colour", r"^is in colour \(RGB\); give the gray volume"), ("complex", "^holds complex numbers; save their magnitude"),
    ("DICOM", "^is DICOM; .*dcm2niix"), ("gzipped", "^is gzipped, .*rename it to .nii.gz"),
    ("singular", "^has a singular affine"), ("infinite", "^has a singular affine"), ("cut", "."), ("empty", "Empty file")))
def test_files_that_cannot_be_used_say_why_in_one_sentence(tmp_path, kind, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        volumes.read_slices(odd_file(tmp_path, kind))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("geometry", (volumes.SliceGeometry(), volumes.SliceGeometry(2.0, 1.0, -30.0, axes_known=False)))
def test_heads_are_written_with_their_frame_and_read_back_to_the_bit(tmp_path, geometry):
    slices = np.random.default_rng(0).integers(0, 256, (32, 40, 40), np.uint8)
    volumes.write_nifti(slices, tmp_path / "head.nii.gz", geometry)
    image = nibabel.load(tmp_path / "head.nii.gz")
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == pytest.approx((geometry.pixel_size, geometry.pixel_size, geometry.spacing))
    assert image.header.get_xyzt_units()[0] == "mm"
    for affine, code in (image.get_qform(coded=True), image.get_sform(coded=True)):
        assert code > 0
        # The middle of a slice lies above the origin, the first slice at the height of the geometry.
        np.testing.assert_allclose(affine @ [19.5, 19.5, 0, 1], (0, 0, geometry.lowest, 1), atol=1e-5)
        np.testing.assert_allclose(affine @ [20.5, 19.5, 1, 1], (geometry.pixel_size, 0, geometry.lowest + geometry.spacing, 1), atol=1e-5)
    description = image.header["descrip"].item().decode()
    assert "its origin is a convention" in description and ("axes are unknown" in description) != geometry.axes_known
    volume = np.asarray(image.dataobj)
    assert volume.dtype == np.uint8 and volume.shape == (40, 40, 32)
    for z, row, column in ((0, 0, 0), (31, 39, 29), (7, 3, 20)):  # row 0 is the front, column 0 the left
        assert volume[column, 39 - row, z] == slices[z, row, column]
    turned = image.as_reoriented(nibabel.orientations.axcodes2ornt("LPS"))  # as other software may store it
    nibabel.save(turned, tmp_path / "turned.nii")
    for name in ("head.nii.gz", "turned.nii"):
        again, notes = volumes.read_slices(tmp_path / name)
        assert again.dtype == np.uint8 and notes == ["a head that predict.py wrote, its slices taken as they are"]
        np.testing.assert_array_equal(again, slices)


def test_only_heads_of_ours_are_taken_as_they_are(tmp_path):
    volume, affine = phantom()
    image = nibabel.Nifti1Image(volume, affine)
    image.header["descrip"] = volumes.OUR_HEAD + "resampled by other software, which kept the description"
    nibabel.save(image, tmp_path / "a.nii")
    slices, notes = volumes.read_slices(tmp_path / "a.nii")
    assert marked(slices) == EXPECTED and notes == []


def test_sampled_heads_are_converted_as_they_are(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    heads = np.random.default_rng(0).integers(0, 256, (4, 8, 16, 16), np.uint8)
    for number, slices in enumerate(heads):
        slices = slices[:, :8, :8] if number == 3 else slices
        volumes.write_nifti(slices, tmp_path / "in" / f"head_{number:03d}.nii.gz", volumes.SliceGeometry())
    dataset.main(["--from-nifti", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "head_003.nii.gz: has slices of 8x8 pixels, the first one 16x16" in said
    assert f"Note: {tmp_path / 'in' / 'head_000.nii.gz'}: a head that predict.py wrote" in said
    with open(tmp_path / "out" / "cases.csv", newline="") as file:
        for row in csv.DictReader(file):
            for position in range(8):
                with Image.open(volumes.slice_file(tmp_path / "out", row["split"], int(row["case"]), position)) as image:
                    np.testing.assert_array_equal(image, heads[int(row["person"][-1]), position])
