"""From a study's files to the PNG folders: which files, whose heads, and the split by person."""

import contextlib
import csv
import itertools
import os
import random

import nibabel
import numpy as np
from PIL import Image
import pytest

import dataset
from support import import_volumes, slices, volumes, whose_head
from support.cli import UserError
from tests.conftest import check_refused
from tests.test_volumes import AFFINE, expected_slices, head, phantom, save


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def convert(source, out, option="--from-nifti"):
    """Runs the command; returns the rows of cases.csv."""
    dataset.main([option, str(source), "--output-dir", str(out)])
    with open(out / "cases.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_oasis1(discs, session, volume):
    """Writes an Analyze pair as the release has it: x from right to left, and a fourth axis of length 1."""
    folder = discs / "disc1" / session / "PROCESSED" / "MPRAGE" / "T88_111"
    folder.mkdir(parents=True, exist_ok=True)
    image = nibabel.AnalyzeImage(volume[::-1, :, :, np.newaxis], None)
    image.header.set_zooms((1, 1, 1, 1))
    nibabel.save(image, folder / f"{session}_mpr_n4_anon_111_t88_masked_gfc.img")
    return folder


def test_oasis1_pairs_become_the_expected_pixels(tmp_path, capsys):
    discs, out = tmp_path / "discs", tmp_path / "out"
    sources = {f"OAS1_{number:04d}_MR1": head(number) for number in range(1, 7)}
    sources["OAS1_0003_MR2"] = head(9)
    for session, volume in sources.items():
        save_oasis1(discs, session, volume)
    (discs / "disc1" / "OAS1_0099_MR1" / "PROCESSED" / "MPRAGE" / "T88_111").mkdir(parents=True)
    next(save_oasis1(discs, "OAS1_0098_MR1", head()).glob("*.img")).write_bytes(b"short")
    rows = convert(discs, out, "--from-oasis1")
    said = capsys.readouterr().out
    assert said.startswith("Found 8 sessions of 7 people (OAS1_0001, OAS1_0002, OAS1_0003, ...).\n")
    assert len(rows) == 7 and "skipped 2." in said
    assert "OAS1_0099_MR1: no *_t88_masked_gfc.hdr" in said and "OAS1_0098_MR1" in said
    splits = dataset.load_splits(out)
    for row in rows:
        split = splits[row["split"]]
        session = row["source"].split("/")[-1].split("_mpr")[0]
        assert row["person"] == session[:-4]
        images = split.images[split.cases == int(row["case"])]
        np.testing.assert_array_equal(images, expected_slices(sources[session]))
    assert len({row["split"] for row in rows if row["person"] == "OAS1_0003"}) == 1
    folders = {f"keras_png_slices_{name}" for name in slices.SPLITS}
    assert {path.name for path in out.iterdir()} == {"cases.csv", "geometry.json", *folders}
    assert slices.read_geometry(out) == ("up", volumes.SLAB)


def test_whole_brains_have_the_same_slices_less_those_that_are_black_in_everyone(tmp_path):
    (tmp_path / "in").mkdir()
    for number, lowest in enumerate((40, 50, 45)):  # where each volume begins, in mm from the phantom's end
        save(tmp_path / "in" / f"P{number}.nii", phantom()[..., lowest:], AFFINE)
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    dataset.main(["--from-nifti", source, "--whole-brain", "--output-dir", out])
    for split in dataset.load_splits(out).values():
        assert split.images.shape == (55, 128, 128) and split.positions.tolist() == list(range(55))
    front, geometry = slices.read_geometry(out)
    assert front == "up" and geometry == volumes.SliceGeometry(2.0, 2.0, volumes.WHOLE_BRAIN.lowest + 2 * 18)


def test_of_a_bids_folder_the_t1w_volumes_are_taken_and_the_rest_is_listed(tmp_path, capsys):
    folder = tmp_path / "bids"
    t1w = [f"sub-0{number}/anat/sub-0{number}_T1w.nii.gz" for number in range(1, 5)]
    t1w.append("sub-01/ses-2/sub-01_ses-2_T1w.nii")
    other = {"sub-01/anat/sub-01_T2w.nii.gz": "is T2w by its name",
             "sub-03/anat/sub-03_angles.nii": "is not named T1",
             "sub-01/anat/sub-01_desc-brain_mask.nii.gz": "is a mask or a segmentation",
             "sub-01/anat/sub-01_ce-gadolinium_T1w.nii": "was taken with a contrast agent",
             "BraTS19_CBICA_AAB_1/BraTS19_CBICA_AAB_1_t1ce.nii.gz": "is t1ce by its name",
             "100307/T1w/T2w_acpc_dc_restore.nii.gz": "is T2w by its name", "bold/run1.nii": "is bold by",
             "sub-03_T1w_reg_T2starw.nii": "is T2starw by its name",
             "derivatives/tool/sub-02_T1w.nii.gz": "lies in a derivatives folder"}
    touch(folder, *other)
    for name in t1w:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(folder / name, head(), np.eye(4))
    sessions, left_out = import_volumes.find_nifti(folder)
    assert sorted(sessions) == sorted((name[:6], folder / name) for name in t1w)
    reasons = dict(line.split(": ", 1) for line in left_out)
    assert reasons.keys() == {str(folder / name) for name in other}
    assert all(other[name] in reasons[str(folder / name)] for name in other)
    convert(folder, tmp_path / "out")
    said = capsys.readouterr().out
    assert all(f"Skipped {line}" in said for line in left_out) and "skipped 9." in said


def split_by_person(folder, rows, seed=0):
    """Splits sessions whose one slice is black but for the number of the session."""
    folder.mkdir(exist_ok=True)
    for index in range(len(rows)):
        np.save(folder / f"{index}.npy", np.full((1, 8, 8), index, np.uint8))
    return import_volumes._split_by_person(folder, rows, seed)


def test_the_split_is_by_person_seeded_and_85_10_5(tmp_path):
    people = [f"OAS1_{number:04d}" for number in range(40)]
    rows = [(person, f"{person}_MR{session}") for person in people for session in (1, 2)]
    counts = [split_by_person(tmp_path / name, rows, seed) for name, seed in zip("abc", (0, 0, 1))]
    assert counts[0] == {"train": (68, 34), "validate": (8, 4), "test": (4, 2)}
    tables = [(tmp_path / name / "cases.csv").read_text() for name in "abc"]
    assert tables[0] == tables[1] != tables[2]
    table = list(csv.DictReader(tables[0].splitlines()))
    assert len({(row["person"], row["split"]) for row in table}) == 40
    assert [row["split"] for row in table] == 68 * ["train"] + 8 * ["validate"] + 4 * ["test"]
    for row in table:
        with Image.open(slices.slice_file(tmp_path / "a", row["split"], int(row["case"]), 0)) as image:
            assert (row["person"], row["source"]) == rows[image.getpixel((0, 0))]
    assert not list((tmp_path / "a").glob("*.npy"))
    for number, held_out in ((3, 1), (8, 2)):  # two to validate and test where there are eight
        counts = split_by_person(tmp_path / str(number), [(str(index), "") for index in range(number)])
        assert [counts[name][1] for name in slices.SPLITS] == [number - 2 * held_out, held_out, held_out]


def test_names_that_are_no_text_are_written_as_escapes(tmp_path):
    names = ["Jos\u00e9", os.fsdecode(b"odd\xff"), "plain"]
    split_by_person(tmp_path, [(name, tmp_path / name) for name in names])
    with open(tmp_path / "cases.csv", newline="", encoding="utf-8") as file:
        assert {row["person"] for row in csv.DictReader(file)} == {"Jos\u00e9", r"odd\udcff", "plain"}


def test_conversion_refuses_bad_input_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def refused(expected, *arguments):
        check_refused(dataset.main, arguments, expected, capsys)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    from_in, to_out = ("--from-nifti", "in"), ("--output-dir", "out")
    refused("nowhere holds nothing of use", "--from-nifti", "nowhere", *to_out)
    refused("--output-dir is missing", *from_in)
    refused("in holds nothing of use", "--from-oasis1", "in", *to_out)
    save(tmp_path / "in" / "a.nii", head(), np.eye(4))
    refused("in exists already", *from_in, "--output-dir", "in")
    save(tmp_path / "in" / "b.nii", 0 * head(), np.eye(4))
    with pytest.raises(SystemExit):
        convert("in", "out")
    said = capsys.readouterr()
    assert "Only 1 people have usable volumes" in said.err
    assert "Skipped in/b.nii: holds no picture" in said.out  # listed even so
    touch(tmp_path / "in", *(f"AD{n % 3}/P{n}/T1.nii" for n in range(6)))
    refused("these 6 sessions are (AD0/P0/T1.nii, AD0/P3/T1.nii, AD1/P1/T1.nii, ...).", *from_in, *to_out)
    refused("cannot be used (missing ), unterminated", *from_in, *to_out, "--person-pattern", "patient_(")
    refused("cannot be used (no such group)", *from_in, *to_out, "--person-pattern", "A")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# Whose head it is -------------------------------------------------------------------------------------------
def find_people(folder, person_pattern=None):
    """What `find_nifti` finds in a folder, as {path: person}."""
    sessions, _ = import_volumes.find_nifti(folder, person_pattern)
    return {path.relative_to(folder).as_posix(): person for person, path in sessions}


def paths(template, v, who):
    """All paths of a template, {path: its `who`}."""
    return {template.format(v=visit, who=person): str(person) for visit in v for person in who}


ADNI = "ADNI_{who}_MR_MPR__GradWarp__B1_Correction__N3__Scaled_Br_{v}_S13893_I{v}7.nii"
VISITS = "ses1 ses-M12 screening T0 followup fu2 year1 wave2 scan1 timepoint-3 2012-05-02".split()
ONE_TO_FOUR = range(1, 5)
UNDERSTOOD = {
    "visits of many kinds": paths("{who}_{v}_T1.nii", v=VISITS, who=[f"S{n:03}" for n in range(12)]),
    "UK Biobank": paths("{who}_20252_{v}_0.nii.gz", v=(2, 3), who=(1000012, 1000013, 1000014)),
    "BIDS": paths("{who}/ses-{v}/anat/{who}_ses-{v}_T1w.nii", v=(1, 2), who=("sub-01", "sub-A2")),
    "OASIS-1 and 2": {"OAS1_0001_MR1/RAW/mpr-1.nii": "OAS1_0001", "OAS2_0002_MR2_mpr.nii": "OAS2_0002"},
    "OASIS-3 and 4": paths("{who}_MR_d0{v}/anat2/sub-{who}_T1w.nii", v=(1, 7), who=("OAS30001", "OAS42001")),
    "ADNI": paths(ADNI, v=(2006, 2007), who=("002_S_0413", "130_S_2373")),
    "ADNI, two spellings": {"002_S_0413/T1.nii": "002_S_0413", "sub-ADNI002S0413/T1.nii": "002_S_0413"},
    "PPMI": paths("MPRAGE/201{v}/I{v}/{who}_MR_MPRAGE_br_raw_S{v}_I{v}.nii", v="12", who=("PPMI_3001",)),
    "HCP": paths("{who}{v}/T1w/T1w_acpc_dc_restore.nii.gz", v=("", "_V2_MR"), who=range(100206, 123456, 999)),
    "ABCD": paths("sub-{who}/ses-{v}/anat/T1w.nii", v=("baselineYear1Arm1", "2YearFollowUpYArm1"),
                  who=("NDARINV003RTV85", "NDARINV00CY2MDM")),
    "IXI and Cam-CAN": {"IXI002-Guys-0828-T1.nii.gz": "IXI002", "sub-CC110033/CC110033_T1w.nii": "CC110033"},
    "BraTS": paths("{who}-00{v}-t1n.nii.gz", v=(0, 1), who=("BraTS-GLI-00000", "BraTS-GLI-00002")),
    "PD is a patient, no contrast": {f"PD_01{n}_T1.nii": f"01{n}" for n in ONE_TO_FOUR},
    "in upper and lower case": {"V1/p01.nii": "p01", "V2/P01.nii": "p01", "V2/P02.nii": "P02"},
}
SPELLINGS = """P{n:03}/11{n:02}01_MR/T1 P{n:03}/12{n:02}05_MR/T1; 11{n:02}01_MR/P{n} 12{n:02}05_MR/P{n}
P{n}/4820{n:02}_3T P{n}/7193{n:02}_3T; P{n} P{n:02}; P{n}visit001 P{n}visit002; {n}a {n}b
sub-{n}ses2019 sub-{n}ses2021; sub-pre{n} sub-post{n}; AP{n} BP{n}; V1P{n} V2P{n}; co{n:02}MPRAGE {n:02}MPRAGE
P{n}_old P{n}_new; baseline/{n} followup/{n:02}; P{n} P_{n}; P{n}/a sub-P{n}/a; {n:03}01 {n:03}02"""
REFUSED = [sorted(files) for files in (
    paths("{v}/{who}/T1.nii", v="ABC", who=ONE_TO_FOUR), paths("scan{who}.nii", "1", ONE_TO_FOUR),
    {f"{n}/I{10 * n + v}.nii" for v in (1, 2) for n in ONE_TO_FOUR}, paths("NYU/v{v}/P.nii", "123", "1"),
    paths("V{who}/mprage_{v}.nii", "123", range(9)), paths("PPMI_{v}/{who}/T1.nii", "12", (3001, 3002, 3003)),
    paths("sub-{v}-00{who}.nii", ("OSL", "BER"), ONE_TO_FOUR), ("site_A/P1.nii", "site_A/P2.nii", "P1.nii"),
    *([f"{name}.nii".format(n=n) for n in range(1, 10) for name in names.split()]
      for names in SPELLINGS.replace("\n", "; ").split("; ")))]


@pytest.mark.parametrize("layout", UNDERSTOOD)
def test_the_person_is_told_by_the_path(tmp_path, layout):
    touch(tmp_path, *UNDERSTOOD[layout])
    assert find_people(tmp_path) == UNDERSTOOD[layout]


@pytest.mark.parametrize("files", REFUSED, ids=" ".join)
def test_what_can_be_read_in_two_ways_is_refused(files):
    with pytest.raises(UserError, match=f"It cannot be told whose heads these {len(files)} sessions are"):
        whose_head.people_of(files)


def test_people_that_are_counted_are_not_taken_for_visits():
    for names in (range(8, 21), range(100, 200), (12, 17, 23), ("0101", "0102", "0103"), range(900, 1200)):
        assert whose_head.people_of([f"{name}.nii" for name in names]) == [str(name) for name in names]


PERSON_FORMS = "{n} {n:02} {n:03} P{n:03} sub-{n:02} S_{n} pt-{n:02} AB{n}".split()
VISIT_FORMS = "V{v} m{v:02} -{v} X{v} I{i} -{i} -{d} 20{d} ses-{v} visit{v} y201{v}".split()


def test_no_layout_parts_a_person():
    """By brute force: people, visits and groups in all forms and places. It is refused, or all are whole."""
    rng, num_understood = random.Random(0), 0
    for _ in range(1000):
        names = rng.sample((rng.choice(PERSON_FORMS), rng.choice(VISIT_FORMS)), 2)
        template = rng.choice(("", "ds1/IMAGEN_")) + rng.choice(("", "", "site{g}/", "Yale{g}_", "AD/"))
        between = rng.choice(("_" if "}{" in "".join(names) else "", "/", "_"))  # no digits behind digits
        template += between.join(names) + rng.choice(("", "_T1", "/T1w/T1", "_MR/x", "s003a001"))
        is_one_day, chance, truth = rng.random() < 0.5, rng.choice((1, 0.6)), {}
        for n, v in itertools.product(range(1, rng.randint(4, 16)), range(1, rng.randint(2, 5))):
            if v == 1 or rng.random() < chance:
                date = f"{10 + v}{4 if is_one_day else n % 12 + 1:02}{12 if is_one_day else 10 + n}"
                truth[f"{template}.nii".format(n=n, v=v, g=n % 3, d=date, i=rng.randint(10000, 99999))] = n
        with contextlib.suppress(UserError):
            found = whose_head.people_of(list(truth))
            groups = len(set(zip(found, truth.values())))  # whatever the names
            assert groups == len(set(found)) == len(set(truth.values())), list(truth)
            num_understood += 1
    assert 100 < num_understood < 900


def test_the_person_by_a_pattern(tmp_path):
    touch(tmp_path, "visit1/patient_7.nii", "visit2/patient_7.nii", "visit2/patient_12.nii", "phantom.nii")
    assert find_people(tmp_path, "patient_([0-9]+)") == {
        "visit1/patient_7.nii": "7", "visit2/patient_7.nii": "7", "visit2/patient_12.nii": "12"}
    assert import_volumes.find_nifti(tmp_path, r"patient_([0-9]+)\.nii$")[1] == [
        f"{tmp_path / 'phantom.nii'}: has no person that --person-pattern finds"]


# Odd files --------------------------------------------------------------------------------------------------
def test_links_are_followed_once_and_hidden_files_passed_over(tmp_path):
    data = tmp_path / "data"
    touch(tmp_path / "elsewhere", "b/T1.nii", "._b/T1.nii")
    touch(data, "a/T1.NII.GZ", "a/._T1.nii", ".cache/T1.nii", "c/T1.hdr", "c/T1.img", "d/T1.mgz", "d/note")
    (data / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (data / "a" / "loop").symlink_to(data)
    assert find_people(data) == {"a/T1.NII.GZ": "a", "b/T1.nii": "b", "c/T1.hdr": "c", "d/T1.mgz": "d"}
    assert not import_volumes.find_nifti(data)[1]


def test_a_pipe_is_not_waited_for_and_a_broken_link_is_told(tmp_path):
    os.mkfifo(tmp_path / "T1.nii")
    (tmp_path / "P02_T1.nii").symlink_to("not fetched")
    sessions, reasons = import_volumes.find_nifti(tmp_path)
    assert sessions == [("P02", tmp_path / "P02_T1.nii")] and not reasons  # reading it says what is wrong
    with pytest.raises(volumes.VolumeError, match="cannot be read .*No such file"):
        volumes.read_slices(tmp_path / "P02_T1.nii")


def test_sampled_heads_are_converted_as_they_are(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    heads = np.random.default_rng(0).integers(0, 256, (4, 8, 16, 16), np.uint8)
    for number, written in enumerate(heads):
        written = written[np.newaxis, :, :8, :8] if number == 3 else written[np.newaxis]
        volumes.write_nifti_heads(written, range(8), volumes.SliceGeometry(), tmp_path)
        (tmp_path / "head_000.nii.gz").rename(tmp_path / "in" / f"head_{number:03d}.nii.gz")
    rows = convert(tmp_path / "in", tmp_path / "out")
    assert "head_003.nii.gz: has other slices than the first volume" in capsys.readouterr().out
    for row, position in itertools.product(rows, range(8)):
        file = slices.slice_file(tmp_path / "out", row["split"], int(row["case"]), position)
        with Image.open(file) as image:
            np.testing.assert_array_equal(image, heads[int(row["person"]), position])
