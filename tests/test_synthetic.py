"""A synthetic data set: its folders, what it says of itself, and who reads it."""

import json

import numpy as np
from PIL import Image
import pytest

from benchmarks.tiny import draw_head
import dataset
from support import cli, synthetic, template, volumes
from support.runs import Run
from tests.small import new_run

FRAME = {"pixel_size": 4.0, "spacing": 2.5, "lowest": 0.0, "axes_known": True}
POSITIONS = [2, 5, 9]


def make_run(folder, **data):
    data = {"is_demo": False, "is_simulated": False, "front": "down", "geometry": FRAME, "fingerprints": {"train": "a"}, **data}
    return Run(folder, {"data": data, "git_commit": "abc", "settings": {"limit": None}})


def draw_heads(count, positions=POSITIONS):
    rng = np.random.default_rng(0)
    return np.array([[draw_head(rng, position) for position in positions] for _ in range(count)])


@pytest.mark.parametrize("is_simulated, is_synthetic, words", (
    (False, False, ""), (True, False, "Simulated people: no evidence about patients."),
    (False, True, "Synthetic heads, sampled from a model of people: no evidence about patients."),
    (True, True, "Synthetic heads, sampled from a model of simulated people: no evidence about patients.")))
def test_what_has_to_be_said(is_simulated, is_synthetic, words, tmp_path):
    assert synthetic.notice(is_simulated, is_synthetic) == words
    assert make_run(tmp_path, is_simulated=is_simulated, is_synthetic=is_synthetic).notice == words


def test_heads_are_written_in_order_split_by_head_with_their_slice_positions(tmp_path):
    heads, run = draw_heads(11), make_run(tmp_path)
    synthetic.write_heads(tmp_path / "a" / "set", iter(heads), synthetic.describe(run, run.geometry, 11, 3, 0.5, 0.9, POSITIONS))
    splits = dataset.load_splits(tmp_path / "a" / "set")
    assert {name: split.num_people for name, split in splits.items()} == template.split_people(11)
    assert [np.unique(split.cases)[0] for split in splits.values()] == [1, 402, 441]
    np.testing.assert_array_equal(np.concatenate([split.images for split in splits.values()]), heads.reshape(-1, 64, 64))
    assert all(set(split.positions) == set(POSITIONS) for split in splits.values())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["set"]
    description = json.loads((tmp_path / "a" / "set" / "dataset.json").read_text())
    expected = {"kind": "synthetic", "git_commit": "abc", "seed": 3, "temperature": 0.5, "ventricles": 0.9, "front": "up",
                "slice_positions": POSITIONS, "mm_per_pixel": 4.0, "mm_between_slices": 2.5, "heads": template.split_people(11)}
    assert {key: description[key] for key in expected} == expected
    assert description["trained_on"] == {"is_simulated": False, "is_synthetic": False, "front": "down", "fingerprints": {"train": "a"},
                                          "limit": None}
    assert description["prior"] is None and description["prior_says"].startswith("Not measured")


def test_what_was_measured_of_the_prior_is_copied(tmp_path):
    run = make_run(tmp_path)
    path = tmp_path / "predictions" / "metrics.json"
    path.parent.mkdir()
    for text in ("{", "[]", '{"ssim": 0.9}', '{"heads": {"copy_test": 1}}'):
        path.write_text(text)
        assert synthetic.measured_prior(run)[0] is None
    heads = {"num_heads": 64, "copy_test": 1.3, "copy_test_interval": [-0.7, 3.4], "copy_test_says": "No copies.", "membership": 0.79,
             "told_apart_slices": 0.81, "told_apart_heads": 0.94, "told_apart_heads_interval": [0.9, 1.0]}
    path.write_text(json.dumps({"ssim": 0.9, "heads": {**heads, "dark_ks": 0.1}}))
    measured, says = synthetic.measured_prior(run)
    assert measured == heads and "on 64 heads of this run" in says and "not measured themselves" in says


def test_readers_call_synthetic_heads_what_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    description = synthetic.describe(make_run(tmp_path, is_simulated=True), volumes.SliceGeometry(), 3, 0, 1.0, None, list(range(8)))
    synthetic.write_heads(tmp_path / "set", draw_heads(3, range(8)), description)
    run = Run.load(new_run(tmp_path / "run", tmp_path / "set"))
    assert run.is_synthetic and run.is_simulated and run.notice == description["says"]
    dataset.main(["--data-dir", "set"])
    assert description["says"] in capsys.readouterr().out
    assert description["says"] in (tmp_path / "set" / "SYNTHETIC.txt").read_text()


@pytest.mark.parametrize("stop", (KeyboardInterrupt, OSError(28, "No space left on device")))
def test_what_stops_leaves_nothing(stop, tmp_path):
    def stopping():
        yield from draw_heads(2)
        raise stop

    description = synthetic.describe(make_run(tmp_path), volumes.SliceGeometry(), 3, 0, 1.0, None, POSITIONS)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else cli.UserError):
        synthetic.write_heads(tmp_path / "set", stopping(), description)
    assert not list(tmp_path.iterdir())


def test_what_lies_there_already_is_refused_before_a_head_is_sampled(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("L", (1, 1)).save(tmp_path / "set" / "mine.png")

    def never():
        raise AssertionError
        yield

    with pytest.raises(cli.UserError, match="set exists already; give another --write-dataset"):
        synthetic.write_heads(tmp_path / "set", never(), synthetic.describe(make_run(tmp_path), volumes.SliceGeometry(), 3, 0, 1.0, None, POSITIONS))
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "mine.png"]
