"""From a study's files to the PNG folders: which files, whose heads, and the split by person."""

import csv
import itertools
import os

import nibabel
import numpy as np
from PIL import Image
import pytest

import dataset
from support import import_volumes, template, volumes, whose_head
from support.cli import UserError
from tests.conftest import check_refused
from tests.test_volumes import expected_slices, head, save_nifti


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
    check_refused(dataset.main, ["--from-oasis1", *command[1:], "*"], "--pattern is for the files of --from-nifti", capsys)
    check_refused(dataset.main, ["--from-oasis1", *command[1:-1], "--person-pattern", "(.)"], "--person-pattern is for", capsys)
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
