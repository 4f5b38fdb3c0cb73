"""What the command line of predict.py takes and refuses, and where slices of samples and heads lie."""

import numpy as np
import pytest

import predict
from support import cli, volumes

OPTIONS = {"--data-dir": "x", "--cache-dir": "x", "--num-samples": "16", "--slice": "0", "--evaluate": None,
           "--export": "x", "--heads": "3", "--ventricles": "0.5", "--temperature": "1", "--seed": "0",
           "--output-dir": "x"}
USED = {"--images": {"--output-dir"}, "--codes": {"--output-dir"},
        "--write-dataset": {"--heads", "--ventricles", "--temperature", "--seed"}}


@pytest.mark.parametrize("command", USED)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_would_be_ignored_is_refused_even_with_its_default(command, option):
    heads = [] if option == "--heads" or command != "--write-dataset" else ["--heads", "3"]
    argv = [command, "file", *heads, option, *([OPTIONS[option]] if OPTIONS[option] else [])]
    if option in USED[command]:
        assert getattr(predict.parse_arguments(argv), option[2:].replace("-", "_")) is not None
    else:
        with pytest.raises(cli.UserError, match=f"{option} is of no use with {command}"):
            predict.parse_arguments(argv)


@pytest.mark.parametrize("argv, expected", (
    (["--slice", "all", "--num-samples", "3"], "--num-samples is of no use with --slice all"),
    (["--heads", "0", "--ventricles", "0.5"], "--ventricles is of no use with --heads 0"),
    (["--evaluate", "--ventricles", "0.5"], "leave out --ventricles"),
    (["--images", "a.png", "--codes", "a.npy"], "not allowed with argument")))
def test_options_that_contradict_one_another_are_refused(argv, expected):
    with pytest.raises(cli.UserError, match=expected):
        predict.parse_arguments(argv)


@pytest.mark.parametrize("slice_, count, expected", (
    (None, 3, [0, 16, 31]), ("all", 3, list(range(32))), (7, 2, [7, 7])))
def test_positions_are_spread_over_all_or_the_one_asked_for(slice_, count, expected):
    assert predict.sample_positions(slice_, count, list(range(32))).tolist() == expected


@pytest.mark.parametrize("positions, volume, step", (
    ([0, 1, 2, 6, 7], [1, 2, 3, 0, 0, 0, 4, 5], 1), ([0, 4, 5, 6], [1, 0, 0, 0, 2, 3, 4], 1),
    ([2, 6, 10], [1, 2, 3], 4), ([5], [1], 1)))
def test_gaps_between_the_slices_of_heads_are_black_at_the_true_distance(positions, volume, step):
    heads = np.ones((2, len(positions), 3, 3), np.uint8) * np.arange(1, 1 + len(positions))[:, None, None]
    geometry = volumes.SliceGeometry(spacing=1.5, lowest=-8)
    filled, filled_positions, geometry = predict.fill_gaps(heads, positions, geometry)
    assert filled[1, :, 0, 0].tolist() == volume
    assert list(filled_positions) == list(range(positions[0], positions[-1] + 1, step))
    assert geometry.spacing == 1.5 * step and geometry.lowest == -8 + 1.5 * positions[0]
