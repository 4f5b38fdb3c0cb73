"""A synthetic data set: its folders, what it says of itself, and who reads it."""

import json

import numpy as np
import pytest

from benchmarks.tiny import draw_head
import dataset
from support import synthetic, template
from support.runs import Run
from tests.small import new_run

GEOMETRY = {"pixel_size": 4.0, "spacing": 2.5, "lowest": 0.0, "axes_known": True}
POSITIONS = [2, 5, 9]


def make_run(folder, **data):
    data = {"is_demo": False, "is_simulated": False, "front": "down", "geometry": GEOMETRY,
            "fingerprints": {"train": "a"}, **data}
    return Run(folder, {"data": data, "git_commit": "abc", "settings": {"limit": None, "seed": 0}})


def describe(folder, positions=POSITIONS, count=3, **data):
    return synthetic.describe(make_run(folder, **data), positions, count, 3, 0.5, 0.9)


def draw_heads(count, positions=POSITIONS):
    rng = np.random.default_rng(0)
    return np.array([[draw_head(rng, position) for position in positions] for _ in range(count)])


@pytest.mark.parametrize("is_simulated, is_synthetic, words", (
    (False, False, ""), (True, False, "Simulated people: no"), (False, True, "from a model of people: no"),
    (True, True, "Synthetic heads, sampled from a model of simulated people: no evidence about patients.")))
def test_what_has_to_be_said(is_simulated, is_synthetic, words, tmp_path):
    notice = synthetic.notice(is_simulated, is_synthetic)
    assert words in notice and bool(words) == bool(notice)
    assert make_run(tmp_path, is_simulated=is_simulated, is_synthetic=is_synthetic).notice == notice


def test_a_written_set_says_what_it_is_and_where_its_slices_lie(tmp_path):
    synthetic.write_png_heads(tmp_path / "a" / "set", iter(draw_heads(11)), describe(tmp_path, count=11))
    splits = dataset.load_splits(tmp_path / "a" / "set")
    assert [np.unique(split.cases)[0] for split in splits.values()] == [1, 402, 441]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["set"]
    assert not (tmp_path / "a" / "set" / "SIMULATED.txt").exists()
    written = json.loads((tmp_path / "a" / "set" / "dataset.json").read_text())
    expected = {"kind": "synthetic", "git_commit": "abc", "seed": 3, "temperature": 0.5, "ventricles": 0.9,
                "front": "up", "slice_positions": POSITIONS, "geometry": GEOMETRY,
                "heads": template.split_people(11), "prior": None,
                "trained_on": {"is_simulated": False, "front": "down", "fingerprints": {"train": "a"},
                               "limit": None}}
    assert {key: written[key] for key in expected} == expected
    front, geometry, _ = dataset.find_geometry(tmp_path / "a" / "set")
    assert front == "up" and vars(geometry) == GEOMETRY


def test_readers_call_synthetic_heads_what_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    description = describe(tmp_path, range(8), is_simulated=True)
    synthetic.write_png_heads(tmp_path / "set", draw_heads(3, range(8)), description)
    run = Run.load(new_run(tmp_path / "run", tmp_path / "set"))
    assert run.is_simulated and run.notice == description["says"]
    dataset.main(["--data-dir", "set"])
    assert description["says"] in capsys.readouterr().out
    assert description["says"] in (tmp_path / "set" / "SYNTHETIC.txt").read_text()
    assert synthetic.notice_of("set") == description["says"]
