import functools

import numpy as np
import pytest

import dataset
from support import slices, template
from support.images import empty_margin
from support.volumes import WHOLE_BRAIN, WHOLE_BRAIN_SLICES


@pytest.fixture(autouse=True, scope="module")
def quick_template():
    """Prepares the template once for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "_load_template", functools.cache(template._load_template))
        yield


# Case 1 of the demo cohort: means over a grid of 4 x 4 fields of slices 3, 16 and 28.
DEMO_PERSON = (
    0, 0, 0, 0, 28.5, 28.7, 31.4, 27.3, 29.1, 90.2, 78.6, 20, 24.5, 65.7, 78.4, 22.1,
    52.1, 159.8, 149.8, 54, 109.9, 143.8, 137.7, 97.7, 160.3, 125, 135.4, 143.4, 52.6, 128.8, 128.7, 37.3,
    0, 4.5, 3.6, 0, 17.7, 113.1, 135.2, 26.5, 37.8, 138.2, 152.6, 38, 0, 29, 31.1, 0)


def test_demo_cohort_is_whole_repeatable_and_looks_like_heads(tmp_path, monkeypatch):
    monkeypatch.setattr(template, "DEMO_PEOPLE", {"train": 1, "validate": 1, "test": 1})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = template.make_demo_cohort()
    splits = dataset.load_splits(folder)
    images = splits["train"].images
    assert images.shape == (32, 128, 128)
    assert empty_margin(images, 16) == 16
    assert (images != splits["validate"].images).any()
    cases = [np.unique(splits[name].cases).tolist() for name in slices.SPLITS]
    assert cases == [[1], [402], [441]]  # as OASIS numbers them
    fields = images[[3, 16, 28], 24:104, 28:100].reshape(3, 4, 20, 4, 18).mean(axis=(2, 4))
    np.testing.assert_allclose(fields.ravel(), DEMO_PERSON, atol=0.06, err_msg="raise DEMO_VERSION")
    with monkeypatch.context() as patch:
        patch.setattr(template, "write_cohort", None)
        assert template.make_demo_cohort() == folder  # nothing is simulated again
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # nothing half-made is left


def test_people_are_split_with_two_to_validate_and_test_where_there_are_eight(tmp_path):
    assert template.split_people(50) == template.DEMO_PEOPLE
    for number, *counts in ((200, 160, 20, 20), (8, 4, 2, 2), (7, 5, 1, 1), (3, 1, 1, 1), (27, 21, 3, 3)):
        assert list(template.split_people(number).values()) == counts
    cases = template.make_splits(tmp_path, {"train": 500, "validate": 50, "test": 50})
    assert [case for _, case in cases] == list(range(1, 601))  # on, where OASIS has too few


def test_simulate_writes_the_same_people_in_cohorts_of_any_number(tmp_path, capsys):
    for number in ("3", "4"):
        folder = str(tmp_path / number)
        dataset.main(["--simulate", number, "--output-dir", folder])
    assert "3: 3 simulated people (1 train, 1 validate, 1 test)" in capsys.readouterr().out
    for path in (tmp_path / "3").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "4" / path.relative_to(tmp_path / "3")).read_bytes()


def test_a_simulated_whole_brain_is_whole_in_all_three_planes_and_says_where_its_slices_lie(tmp_path, capsys):
    folder = str(tmp_path / "brains")
    dataset.main(["--simulate", "3", "--whole-brain", "--output-dir", folder])
    assert f"{WHOLE_BRAIN_SLICES} slices each" in capsys.readouterr().out
    assert dataset.find_geometry(folder)[:2] == ("up", WHOLE_BRAIN)
    volume = dataset.load_splits(folder)["train"].images
    areas = 4 * (volume > 40).sum(axis=(1, 2))  # mm2
    assert len(volume) == WHOLE_BRAIN_SLICES and max(areas[[0, 1, -1]]) < 0.05 * areas.max()
    assert (areas[5:-6] > 0).all() and empty_margin(volume, 1) >= 16
    # It is the template's brain: at the height of each slice, and so in every plane.
    expected = template.cut_axial(*template.load_mni152(), WHOLE_BRAIN.heights(WHOLE_BRAIN_SLICES), 128, 2)
    for plane in np.s_[20], np.s_[45], np.s_[:, 64], np.s_[:, :, 55]:
        assert np.corrcoef(volume[plane].ravel(), expected[plane].ravel())[0, 1] > 0.8


def test_a_cache_that_cannot_be_written_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    with pytest.raises(OSError) as error:
        template.make_demo_cohort()
    assert "/proc/cache" in str(error.value) and "XDG_CACHE_HOME can name" in error.value.__notes__[0]
