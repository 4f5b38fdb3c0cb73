"""From a study's files to the PNG folders: which files, whose heads, and the split by person."""

import csv
import itertools
import os
import subprocess
import sys

import nibabel
import numpy as np
from PIL import Image
import pytest

import dataset
from support import import_volumes, volumes, whose_head
from support.cli import UserError
from tests.conftest import check_refused, script_environment
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
    assert said.startswith("Found 8 sessions of 7 people (OAS1_0001, OAS1_0002, OAS1_0003, ...).\n")
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
    sessions, left_out = import_volumes.find_nifti(tmp_path / "bids")
    assert sorted(sessions) == sorted((name[:6], tmp_path / "bids" / name) for name in t1w)
    reasons = dict(line.split(": ", 1) for line in left_out)
    assert reasons.keys() == {str(tmp_path / "bids" / name) for name in other}
    assert all(other[name] in reasons[str(tmp_path / "bids" / name)] for name in other)
    dataset.main(["--from-nifti", str(tmp_path / "bids"), "--output-dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert all(f"Skipped {line}" in said for line in left_out) and "Converted 5 sessions" in said and "skipped 9." in said


def test_a_pattern_takes_the_place_of_the_rules(tmp_path, capsys):
    t1w, other = make_bids(tmp_path)
    sessions, reasons = import_volumes.find_nifti(tmp_path, "derivatives/**/*.nii.gz")
    assert [path.name for _, path in sessions] == ["sub-01_space-MNI_T1w.nii.gz", "sub-02_T1w.nii.gz"]
    assert [person for person, _ in sessions] == ["sub-01", "sub-02"]
    assert len(reasons) == 12 and all(line.endswith("does not match --pattern") for line in reasons)
    check_refused(dataset.main, ["--from-nifti", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--pattern", "*_PDw.nii"],
                  "holds no .nii, .nii.gz, .hdr or .mgz files that can be used", capsys)


def test_without_t1w_names_all_but_masks_are_taken(tmp_path):
    for name in ("OAS1_0001_MR1_t88_masked_gfc.nii", "OAS1_0001_MR2.nii.gz", "IXI002.nii", "IXI002_MASK.nii", "labels.nii.gz"):
        (tmp_path / name).touch()
    sessions, reasons = import_volumes.find_nifti(tmp_path)
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
        counts.append(import_volumes._split_by_person(folder, rows, seed))
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


@pytest.mark.parametrize("number, held_out", ((3, 1), (7, 1), (8, 2), (29, 2)))
def test_validation_and_test_have_two_people_where_there_are_eight(tmp_path, number, held_out):
    for index in range(number):
        np.save(tmp_path / f"{index}.npy", np.zeros((1, 8, 8), np.uint8))
    counts = import_volumes._split_by_person(tmp_path, [(str(index), "") for index in range(number)], 0)
    assert counts["test"] == (held_out, held_out) and counts["validate"][1] == max(held_out, round(number / 10))
    assert sum(people for _, people in counts.values()) == number


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
    return {path.relative_to(folder).as_posix(): person for person, path in import_volumes.find_nifti(folder, **options)[0]}


ADNI = "ADNI_{0}_MR_MPR__GradWarp__B1_Correction__N3__Scaled_Br_{1}_S{2}_I{2}.nii"
VISITS, P = ("baseline", "month06", "month12"), range(1, 5)


def paths(template, **names):
    """All paths of a template: {path: the text of its `who`}."""
    keys = list(names)
    rows = [dict(zip(keys, values)) for values in itertools.product(*names.values())]
    return {template.format(**row): str(row["who"]) for row in rows}


UNDERSTOOD = {
    "visits above": paths("{v}/{who}/T1.nii.gz", v=VISITS, who=("000", "001", "002")),
    "visits below": paths("{who}/{v}/T1.nii.gz", v=("bl", "m12", "m120"), who=("P01", "P02", "P03")),
    "visits above files": paths("{v}/{who}_T1.nii.gz", v=("V1", "V2"), who=("000", "001", "002")),
    "visits of many kinds": paths("{who}_{v}_T1.nii", who=("S001", "S002", "S003"), v=(
        "ses1", "ses-M12", "screening", "T0", "followup", "fu2", "year1", "wave2", "scan1", "timepoint 3", "2012-05-02")),
    "classes above": {f"{c}/P{n}/T1.nii": f"P{n}" for c, n in (("AD", 1), ("AD", 2), ("CN", 3), ("MCI", 4))},
    "sites with equal numbers": {f"site{c}/{n:03}/T1.nii": f"site{c}/{n:03}" for c, n in itertools.product("12", P)},
    "controls and patients with equal numbers": {f"{c}_{n:03}.nii": f"{c}/{n:03}" for c in ("control", "patient") for n in P},
    "UK Biobank": paths("{who}_20252_{v}_0.nii.gz", v=(2, 3), who=(1000012, 1000013, 1000014)),
    "UK Biobank, folders": paths("{who}_20252_{v}_0/T1/T1.nii.gz", v=(2, 3), who=(1000012, 1000013, 1000014)),
    "BIDS": paths("{who}/ses-{v}/anat/{who}_ses-{v}_T1w.nii", v=(1, 2), who=("sub-01", "sub-A2", "sub-b")),
    "OASIS": {"OAS1_0001_MR1/RAW/mpr-1.nii": "OAS1_0001", "OAS2_0002_MR2_mpr.nii": "OAS2_0002",
              "OAS30001_MR_d0129/anat2/T1w.nii.gz": "OAS30001", "OAS30001_MR_d0757/anat2/sub-OAS30001_T1w.nii.gz": "OAS30001",
              "sub-OAS42001_ses-d3045_T1w.nii": "OAS42001"},
    "ADNI": {ADNI.format("002_S_0413", "2006", 13893): "002_S_0413", ADNI.format("002_S_0413", "2007", 25371): "002_S_0413",
             ADNI.format("130_S_2373", "2006", 14784): "130_S_2373"},
    "ADNI, one person in two classes": {"AD/003_S_1059/MP-RAGE/2006-05-02/I1.nii": "003_S_1059",
                                        "MCI/003_S_1059/MP-RAGE/2007-06-01/I2.nii": "003_S_1059"},
    "AIBL and PPMI": paths("{s}/MPRAGE/201{v}-01-02_10_11_12.0/I{v}/{who}_MR_MPRAGE_br_raw_S{v}_I{v}.nii", s=("a", "b"),
                           v=(1, 2), who=("AIBL_18", "PPMI_3001")),
    "HCP": paths("{who}{v}/T1w/T1w_acpc_dc_restore.nii.gz", v=("", "_V2_MR"), who=(100206, 100307)),
    "HCP, ageing": paths("{who}_V{v}_MR/unprocessed/T1w.nii", v=(1, 2), who=("HCA6002236", "HCD0001305")),
    "ABCD": paths("sub-{who}/ses-{v}/anat/T1w.nii", v=("baselineYear1Arm1", "2YearFollowUpYArm1"), who=("NDARINV003RTV85",)),
    "NACC": paths("{who}_{v}/mri{v}.nii", v=(100, 200), who=("NACC000034", "NACC000067")),
    "Cam-CAN": {"sub-CC110033/anat/sub-CC110033_T1w.nii": "CC110033", "CC110037_T1w.nii": "CC110037"},
    "IXI": {"IXI002-Guys-0828-T1.nii.gz": "IXI002", "IXI012-HH-1211-T1.nii.gz": "IXI012"},
    "ABIDE": {f"{c}_{n}/anat.nii": f"{n}" for k, c in enumerate(("Caltech", "Yale")) for n in range(51456 + 9 * k, 51463 + 9 * k)},
    "CoRR": paths("{who}/session_{v}/anat_1/anat.nii.gz", v=(1, 2), who=("0025427", "0025428", "0025429")),
    "AOMIC": paths("ds002785/{who}/anat/{who}_T1w.nii", who=("sub-0001", "sub-0002")),
    "FreeSurfer": {f"{who}/mri/T1.{end}": who for who, end in (("bert", "mgz"), ("ernie", "mgz"), ("anna", "nii.gz"))},
    "BraTS": paths("{who}-00{v}-t1n.nii.gz", v=(0, 1), who=("BraTS-GLI-00000", "BraTS-GLI-00002")),
    "unique names": {"healthy/p1.nii": "p1", "patients/p2.nii": "p2", "p3.nii": "p3"},
    "one word in upper and lower case": {"V1/p01.nii": "p01", "V2/P01.nii": "p01", "V2/P02.nii": "P02"},
}
REFUSED = {
    "unknown visits above": ({f"{v}/{n:03}/T1.nii" for v in "ABC" for n in P}, "4 people with 3 sessions each (such as 001)",
                             "12 people with 1 session each (such as A/001)", "3 people with 4 sessions each (such as A)"),
    "sites of unknown names": ({f"{v}/{n:03}/T1.nii" for v in ("NYU", "Yale") for n in P}, "4 people", "8 people", "2 people"),
    "unknown visits below": ({f"P{n}/{v}/T1.nii" for v in "AB" for n in P}, "4 people with 2", "8 people with 1"),
    "letters behind the number": ({f"P{n}{v}.nii" for v in "ab" for n in P}, "8 people with 1", "4 people with 2"),
    "words behind the number": ({f"P{n}_{v}.nii" for v in ("old", "new") for n in P}, "4 people with 2", "8 people with 1"),
    "equal names in classes": ({f"{v}/P{n}.nii" for v in ("AD", "MCI") for n in P}, "4 people with 2", "8 people with 1"),
    "several BIDS sets": ({f"{v}/sub-{n}/sub-{n}_T1w.nii" for v in ("ds1", "ds2") for n in P}, "4 people", "8 people"),
    "numbers of images": ({f"{n}/I{10 * n + v}.nii" for v in P for n in P}, "4 people with 4", "16 people with 1"),
    "numbers of images first": ({f"{40 + 10 * n + v}_sub{n + 233}.nii" for v in (1, 2) for n in P}, "8 people", "4 people"),
    "initials": ({f"{who}/{1000 + 9 * k + v}.nii" for k, who in enumerate(("JD", "MK", "AB")) for v in P}, "12 people", "3 people"),
    "nothing but visits": ({f"scan{n}.nii" for n in P}, "1 person with 4", "4 people with 1"),
    "too many visits": ({f"{who}/scan{n}.nii" for who in ("Caltech", "Yale", "NYU") for n in range(20)}, "3 people with 20", "60 people"),
    "some at sites": ({"site_A/P1.nii", "site_A/P2.nii", "P1.nii"}, "2 people", "3 people"),
}


@pytest.mark.parametrize("layout", UNDERSTOOD)
def test_the_person_is_told_by_the_path(tmp_path, layout):
    people = UNDERSTOOD[layout]
    touch(tmp_path, *people)
    assert find_people(tmp_path) == people


@pytest.mark.parametrize("layout", REFUSED)
def test_where_it_cannot_be_told_the_readings_are_shown(tmp_path, capsys, layout):
    files, *readings = REFUSED[layout]
    touch(tmp_path / "in", *files)
    command = ["--from-nifti", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]
    for expected in (f"whose heads these {len(files)} sessions are", "--person-pattern", *readings):
        check_refused(dataset.main, command, expected, capsys)
    assert not (tmp_path / "out").exists()


def test_no_layout_puts_a_person_into_two_splits(tmp_path):
    """By brute force: people, visits and groups at all places of a path; what is understood must not part a person."""
    people, visits, groups = [f"P{n:02}" for n in range(9)], ("V1", "month06", "A", "I7"), ("AD", "site1", "Yale", "ds2")
    num_understood = 0
    for order in itertools.permutations(("who", "visit", "group")):
        for separators in itertools.product("/_", repeat=2):
            for num_visits, num_groups in itertools.product((1, 2, 3), repeat=2):
                for equal in (False, True):  # visits are called the same for all, or each otherwise
                    truth = {}
                    for n, who in enumerate(people):
                        for v in range(num_visits):
                            words = {"who": who, "visit": visits[v if equal else (v + n) % 4], "group": groups[n % num_groups]}
                            first, second, third = (words[word] for word in order)
                            truth[f"{first}{separators[0]}{second}{separators[1]}{third}"] = who
                    try:
                        found = whose_head.people_of(list(truth))
                    except UserError:
                        continue
                    num_understood += 1
                    owners = dict(zip(truth.values(), found))
                    assert len(owners) == len(set(owners.values())) == len(set(zip(truth.values(), found))), list(truth)
    assert num_understood > 50


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
    sessions, reasons = import_volumes.find_nifti(tmp_path)
    assert {path for _, path in sessions} == {tmp_path / name for name in t1}
    assert {f"{tmp_path / name}: is {word} by its name, not T1" for name, word in other.items()} < set(reasons)
    assert len(reasons) == len(other) + 2 and "contrast agent" in " ".join(reasons)


def test_the_person_by_a_pattern(tmp_path, capsys):
    touch(tmp_path, "visit1/patient_7.nii", "visit2/patient_7.nii", "visit2/patient_12.nii", "phantom.nii")
    assert find_people(tmp_path, person_pattern="patient_([0-9]+)") == {
        "visit1/patient_7.nii": "7", "visit2/patient_7.nii": "7", "visit2/patient_12.nii": "12"}
    assert import_volumes.find_nifti(tmp_path, None, "patient_([0-9]+)")[1] == [
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
    assert not import_volumes.find_nifti(tmp_path / "data")[1]


def test_a_pipe_is_not_waited_for_and_a_broken_link_is_told(tmp_path):
    for name in ("T1.nii", "IM_0001", "series.dcm"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "P02_T1.nii").symlink_to("not fetched")
    sessions, reasons = import_volumes.find_nifti(tmp_path)
    assert sessions == [("P02", tmp_path / "P02_T1.nii")]  # reading it says what is wrong
    assert reasons == [f"{tmp_path / 'T1.nii'}: is a pipe or a device, not a file"]
    with pytest.raises(volumes.VolumeError, match="cannot be read .*No such file"):
        volumes.read_slices(tmp_path / "P02_T1.nii")


@pytest.mark.parametrize("locale", ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}), ids=("UTF-8", "C"))
def test_names_in_cases_csv_are_whole_whatever_the_locale(tmp_path, locale):
    program = ("import numpy as np, os, sys; from pathlib import Path; from support import import_volumes as i\n"
               "folder = Path(sys.argv[1])\n"
               "[np.save(folder / f'{n}.npy', np.zeros((1, 8, 8), np.uint8)) for n in range(3)]\n"
               "names = [os.fsdecode(name) for name in (b'Jos\\xc3\\xa9', b'odd\\xff', b'plain')]\n"
               "i._split_by_person(folder, [(name, Path(name)) for name in names], 0)")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=script_environment(**locale))
    with open(tmp_path / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["person"] for row in rows} == {row["source"] for row in rows} == {"Jos\u00e9", "odd\\xff", "plain"}


def test_a_folder_of_dicom_names_dcm2niix(tmp_path, capsys):
    for name in ("series1/IM_0001", "series2/1.dcm"):
        touch(tmp_path, name)
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    touch(tmp_path, "README")
    assert import_volumes.find_nifti(tmp_path)[1] == [f"{tmp_path / name}: holds DICOM files; convert them to NIfTI with dcm2niix"
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
