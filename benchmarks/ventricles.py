"""Control by name: heads asked for ventricles of a size, and the size that they show.

    python benchmarks/ventricles.py [--run-dir RUN] [--heads 64] [--figure FILE]

Heads are sampled as ``predict.py --heads N --ventricles Q`` samples them, but each is asked for another quantile Q, spread evenly
from 0 to 1. Their ventricles are then measured as those of training people were (`train.fit_ventricles`). The figure shows three
sizes with all else the same: noise, and the person's other numbers. It needs the run alone, no data. The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import cli  # first: sets what TensorFlow, Keras and matplotlib read when imported

import json

import numpy as np
from scipy import stats

from benchmarks import common
import predict
from support import devices, figures, metrics, people, sampler

SEED = 0  # predict.py's default
PICTURED = 0.1, 0.5, 0.9  # quantiles
NUM_ROWS = 4  # of the printed table


def sample(run, vqvae, prior, count, quantile):
    """Heads asked for ventricles of a size, uint8 (count, S, H, W): those of ``predict.py --heads COUNT --ventricles QUANTILE``.

    Args:
        run: a `Run`.
        vqvae: its `modules.VQVAE`.
        prior: its `modules.PixelCNN`.
        count: how many.
        quantile: from 0 to 1; one for all, or float (count,).
    """
    persons = predict.steered_people(run, prior, count, SEED, quantile)
    return predict.decode_heads(vqvae, sampler.sample_heads(prior, count, SEED, persons=persons))


def sizes_of(heads):
    """The size of the ventricles of heads, uint8 (N, S, H, W), as `train.fit_ventricles` measures it: float64 (N,)."""
    dark = metrics.tissue_statistics(heads.reshape(-1, *heads.shape[2:]))["dark_fraction"]
    return dark.reshape(heads.shape[:2]).mean(axis=1)


def compare(asked, shown, quantiles):
    """How well the sizes that heads show are those that they were asked for.

    Args:
        asked: float (N,), the quantiles asked for, in [0, 1].
        shown: float (N,), sizes, see `sizes_of`.
        quantiles: float (Q,), of training people's sizes, evenly spaced.

    Returns:
        A dict: `rank_correlation` (Spearman) and `slope` (least squares, shown over asked size), each with its interval (see
        `metrics.with_interval`); `quantile_error`, the mean absolute difference of both as quantiles of training people;
        `asked_sizes` and `shown_sizes`, lists.
    """
    sizes, heads = people.value_at(quantiles, asked), np.arange(len(asked))

    def rank_correlation(drawn):
        return stats.spearmanr(sizes[drawn], shown[drawn]).statistic

    def slope(drawn):
        return stats.linregress(sizes[drawn], shown[drawn]).slope

    return {**metrics.with_interval("rank_correlation", rank_correlation, heads, limits=(-1, 1)),
            **metrics.with_interval("slope", slope, heads),
            "quantile_error": float(np.abs(people.share_below(quantiles, shown) - asked).mean()),
            "asked_sizes": sizes.tolist(), "shown_sizes": shown.tolist()}


def print_rows(asked, measured):
    """Prints the mean sizes, asked and shown, of the heads between two quantiles asked for."""
    print("quantiles asked for, mean size asked for, mean size shown:")
    for number, chosen in enumerate(np.array_split(np.argsort(asked), NUM_ROWS)):
        means = [np.mean(np.array(measured[name])[chosen]) for name in ("asked_sizes", "shown_sizes")]
        print("  {:.2f} to {:.2f}: {:.3f} {:.3f}".format(number / NUM_ROWS, (number + 1) / NUM_ROWS, *means))


def draw(run, vqvae, prior, quantiles, path):
    """Draws the same head asked for small, middling and large ventricles; see `compare` for `quantiles`."""
    heads = np.concatenate([sample(run, vqvae, prior, 1, quantile) for quantile in PICTURED])
    shown = people.share_below(quantiles, sizes_of(heads))
    labels = [f"asked {quantile}: shown {share:.2f}" for quantile, share in zip(PICTURED, shown)]
    figures.head_comparison(heads, prior.slice_positions, labels, "size of ventricles, as a quantile among training people", path)


@cli.exit_on_input_error
def main():
    """Prints the table, draws the figure if asked to, then prints JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--heads", type=cli.number(int, 10), default=64, metavar="N", help="to sample (default: 64)")
    parser.add_argument("--figure", metavar="FILE", help="PNG to draw (default: none)")
    arguments = parser.parse_args()
    devices.prepare(exact=True)
    run = predict.find_run(arguments.run_dir)
    vqvae, prior = predict.load_models(run)
    asked = (np.arange(arguments.heads) + 0.5) / arguments.heads
    heads = sample(run, vqvae, prior, arguments.heads, asked)
    quantiles = json.loads(run.ventricles_path.read_text())["quantiles"]
    measured = compare(asked, sizes_of(heads), quantiles)
    print_rows(asked, measured)
    print("{num_heads} heads: rank correlation of asked and shown {rank_correlation:.2f}, slope {slope:.2f}, mean error as a "
          "quantile {quantile_error:.2f}".format(num_heads=len(heads), **measured), flush=True)
    if arguments.figure:
        with cli.report_write_errors(Path(arguments.figure).parent, "give another --figure"):
            draw(run, vqvae, prior, quantiles, arguments.figure)
        print(f"Figure: {arguments.figure}")
    common.finish("ventricles", arguments, {"settings": {"run_dir": str(run.folder), "seed": SEED}, "num_heads": len(heads),
                                            **measured})


if __name__ == "__main__":
    main()
