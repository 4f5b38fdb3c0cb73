"""Control by name: heads asked for ventricles of a size, and the size that they show.

    python benchmarks/ventricles.py [--run-dir RUN] [--heads 64] [--figure FILE]

Heads are sampled as ``predict.py --heads N --ventricles Q`` samples them, but each is asked for another
quantile Q, spread evenly from 0 to 1. Their ventricles are then measured as those of training people were
(`train.fit_ventricles`). The figure shows three sizes with all else the same: noise, and the person's other
numbers. It needs the run alone, no data. The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import numpy as np
from scipy import stats

from benchmarks import common
import predict
from support import cli, devices, figures, judge, sampler
from support.images import brain_box

SEED = 0  # predict.py's default
QUANTILES = 0.1, 0.5, 0.9  # of the heads in the figure
NUM_GROUPS = 4  # of heads, by the quantile asked for


def share_below(quantiles, value):
    """The share of people, in [0, 1], who lie below a value."""
    return np.interp(value, quantiles, np.linspace(0, 1, len(quantiles)))


def sample(vqvae, prior, measure, count, quantile):
    """The heads, uint8 (count, S, H, W), of ``predict.py --heads COUNT --ventricles QUANTILE``.

    `measure` is the dict of ventricles.json, `quantile` one for all or float (count,).
    """
    persons = sampler.steered_people(prior, measure, count, SEED, quantile)
    codes = sampler.sample_heads(prior, count, SEED, persons=persons)
    return predict.decode_heads(vqvae, codes, prior.slice_positions)


def sizes_of(heads):
    """The size of the ventricles of heads, uint8 (N, S, H, W), as `train.fit_ventricles` has it: (N,)."""
    dark = judge.tissue_statistics(heads.reshape(-1, *heads.shape[2:]))["dark_fraction"]
    return dark.reshape(heads.shape[:2]).mean(axis=1)


def compare(targets, sizes, quantiles):
    """How well the sizes of ventricles are those that were asked for.

    Args:
        targets: float (N,), the quantiles asked for, in [0, 1], ascending.
        sizes: float (N,), what the heads show, see `sizes_of`.
        quantiles: float (Q,), of training people's sizes, evenly spaced.

    Returns:
        A dict: `rank_correlation` (Spearman) and `slope` (least squares, size over target size), each with
        its interval (see `judge.with_interval`); `quantile_error`, the mean absolute difference of both as
        quantiles of training people; `groups`, the mean target size and size of four groups, ascending.
    """
    target_sizes = np.interp(targets, np.linspace(0, 1, len(quantiles)), quantiles)
    heads = np.arange(len(targets))

    def rank_correlation(cases):
        return stats.spearmanr(target_sizes[cases], sizes[cases]).statistic

    def slope(cases):
        return stats.linregress(target_sizes[cases], sizes[cases]).slope

    groups = [{"target_size": float(target_sizes[group].mean()), "size": float(sizes[group].mean())}
              for group in np.array_split(heads, NUM_GROUPS)]
    return {**judge.with_interval("rank_correlation", rank_correlation, heads),
            **judge.with_interval("slope", slope, heads),
            "quantile_error": float(np.abs(share_below(quantiles, sizes) - targets).mean()), "groups": groups}


def print_groups(measured):
    """Prints what `main` has measured: a row for each group of heads, then the summary."""
    for number, group in enumerate(measured["groups"]):
        first, last = number / NUM_GROUPS, (number + 1) / NUM_GROUPS
        print(f"asked for quantiles {first:.2f} to {last:.2f}: mean size "
              f"asked for {group['target_size']:.3f}, shown {group['size']:.3f}")
    print(f"{measured['num_heads']} heads: rank correlation of asked and shown "
          f"{measured['rank_correlation']:.2f}, slope {measured['slope']:.2f}, mean error as a quantile "
          f"{measured['quantile_error']:.2f}", flush=True)


def draw(vqvae, prior, measure, path):
    """Draws the same head asked for small, middling and large ventricles."""
    heads = np.concatenate([sample(vqvae, prior, measure, 1, quantile) for quantile in QUANTILES])
    shares = share_below(measure["quantiles"], sizes_of(heads))
    labels = [f"asked {quantile}: shown {share:.2f}" for quantile, share in zip(QUANTILES, shares)]
    heads = heads[brain_box(heads, rim=2)]
    indices = figures.inner_slices(len(prior.slice_positions), 2)
    rows = [(f"slice {prior.slice_positions[index]}", heads[:, index], captions, figures.BYTES)
            for index, captions in zip(indices, (labels, []))]
    figures.draw_rows(rows)[0].savefig(path)


@cli.exit_on_user_error
def main():
    """Prints the table, draws the figure if asked to, then prints JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the run (default: as that of predict.py)")
    parser.add_argument("--heads", type=cli.number(int, 10), default=64, metavar="N",
                        help="to sample (default: 64)")
    parser.add_argument("--figure", metavar="FILE", help="PNG to draw (default: none)")
    arguments = parser.parse_args()
    devices.prepare(exact=True)
    run = predict.find_run(arguments.run_dir)
    vqvae, prior = predict.load_models(run)
    targets = (np.arange(arguments.heads) + 0.5) / arguments.heads
    measure = run.read_ventricles()
    heads = sample(vqvae, prior, measure, arguments.heads, targets)
    measured = {"num_heads": len(heads), **compare(targets, sizes_of(heads), measure["quantiles"])}
    print_groups(measured)
    if arguments.figure:
        draw(vqvae, prior, measure, arguments.figure)
        print(f"Figure: {arguments.figure}")
    settings = {"run_dir": str(run.folder), "seed": SEED}
    common.finish("ventricles", arguments, {"settings": settings, **measured})


if __name__ == "__main__":
    main()
