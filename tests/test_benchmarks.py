"""What the benchmarks share: turns, ratios, processes that answer, the record."""

import json
import sys

import numpy as np
import pytest

from benchmarks import common, record


def test_sides_take_turns_in_alternating_order():
    order = []
    sides = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert common.interleave(sides, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert "".join(order) == "abbaab"


def test_ratio_is_the_median_of_the_rounds_ratios_with_their_range():
    """Not the ratio of the medians, which here would be 1.5, nor of the means."""
    ours, theirs = [10, 30, 90, 12], [5, 20, 30, 4]
    summary = common.ratio(ours, theirs)
    assert summary == {"median": 2.5, "min": 1.5, "max": 3.0, "rounds": 4}
    assert summary["median"] == np.median(np.divide(ours, theirs)) != np.median(ours) / np.median(theirs)
    assert common.say(summary) == "2.5 times (1.5 to 3 in 4 rounds)"


@pytest.mark.parametrize("ours, measurable", (([1.1, 1.2, 1.3], True), ([0.7, 0.8, 0.9], True), ([0.9, 1.5, 1.6], False),
                                              ([1.0, 1.5, 1.6], False), ([0.5, 0.6, 1.0], False)))
def test_noise_larger_than_the_effect_gets_no_number(ours, measurable):
    summary = common.ratio(ours, [1, 1, 1])
    assert ("median" in summary) == measurable == ("verdict" not in summary)
    if not measurable:
        assert summary == {"verdict": "no difference measurable", "rounds": 3}
        assert common.say(summary) == "no difference measurable in 3 rounds"


def test_rounds_that_do_not_pair_are_an_error():
    with pytest.raises(ValueError):
        common.ratio([1, 2], [1])


def test_a_side_answers_each_request_in_its_own_process(tmp_path):
    script = tmp_path / "side.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(common.ROOT)!r})
from benchmarks import common, record
for request in common.requests():
    if request == "die":
        sys.exit("out of order")
    common.answer([os.getpid(), sys.argv[1:], request])
""")
    with common.Side(script, "--steps", 3) as side:
        answers = [side.ask(), side.ask(0.5)]
        assert [answer[1:] for answer in answers] == [[["--steps", "3"], None], [["--steps", "3"], 0.5]]
        assert answers[0][0] == answers[1][0] == side.process.pid
        with pytest.raises(RuntimeError, match="out of order"):
            side.ask("die")
    with common.Side(script) as side:
        side.ask()
    assert side.process.returncode == 0  # it ended by itself when nothing more was asked


def test_finish_prints_the_last_line_and_records_it_with_its_origin(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"scaling": {"kept": 1}, "training": {"speed": 1}}))
    monkeypatch.setattr(common, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", [str(common.ROOT / "benchmarks" / "training.py"), "--steps", "2", "--record"])
    parser = common.argument_parser("Training.\n\nMore.")
    parser.add_argument("--steps")
    common.finish("training", parser.parse_args(["--steps", "2"]), {"speed": 2})
    assert json.loads(capsys.readouterr().out) == {"speed": 2}
    assert json.loads(results.read_text())["training"] == {"speed": 1}
    common.finish("training", parser.parse_args(), {"speed": 2})
    recorded = json.loads(results.read_text())
    entry = recorded.pop("training")
    assert recorded == {"scaling": {"kept": 1}}
    assert entry.keys() == {"command", "commit", "date", "hardware", "speed"}
    assert entry["command"] == "python benchmarks/training.py --steps 2" and entry["speed"] == 2
    assert " cores of " in entry["hardware"] and " GiB, " in entry["hardware"]


def test_a_run_is_described_by_its_own_files(tmp_path):
    (tmp_path / "predictions").mkdir()
    model = {"image_size": 256, "downsample": 8, "num_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps({"git_commit": "abc", "vqvae": model, "data": {"people": {"train": 3}}}))
    (tmp_path / "metrics.json").write_text('{"ssim": 0.9}')
    (tmp_path / "predictions" / "metrics.json").write_text('{"ssim": 0.9, "frechet": 13.0}')
    (tmp_path / "vqvae_history.csv").write_text("epoch,seconds\n0,60.5\n1,59.5\n")
    (tmp_path / "pixelcnn_history.csv").write_text("epoch,seconds\n0,30\n")
    entry = record.describe(tmp_path)
    assert len(entry.pop("date")) == 10
    assert entry == {"commit": "abc", "people": {"train": 3}, "num_embeddings": 512, "codes_per_image": 1024,
                     "bits_fixed": 9216.0, "seconds": {"vqvae": 120.0, "pixelcnn": 30.0}, "ssim": 0.9, "frechet": 13.0}
