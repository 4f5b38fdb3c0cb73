"""Does the prior know its training people? The standard attack, with a reference model.

    python benchmarks/membership.py --run-dir RUN [--data-dir DIR] [--epochs N]

Some heads cost fewer bits than others, whoever was trained on them. So the code length under the run's prior
is compared with that under a reference: a prior that train.py's stage 2 trains in the same way on every
second training person. By the difference the attack tells the other half of them, whom the run's prior alone
saw, from the test people, whom neither saw: LiRA (https://arxiv.org/abs/2112.03570) and RMIA (2312.03262) in
their simplest form. An AUC of 0.5: it cannot.

The reference costs about half of the run's stage 2. With `--epochs` it learns for fewer, its learning rate
laid over these. That raises no false alarm: members and test people are alike to every reference, as none has
seen either. But one that knows less of people may attack less well: the AUC is then a lower bound.

If the run has been judged, the figure is added to its evaluation.json. The last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import json
import tempfile

import numpy as np

from benchmarks import common
import dataset
import predict
from support import cli, devices, judge, metrics
from support.files import write_json
from support.runs import Run
import train

VALIDATION_PEOPLE = 5  # about, of the reference


def every(split, step, first=0):
    """The split of every `step`-th person, from the `first` one on."""
    return split.take(np.isin(split.cases, np.unique(split.cases)[first::step]))


def train_reference(run, vqvae, splits, epochs):
    """A prior over the codes of the run's VQ-VAE, trained by its settings, but for the epochs, on splits."""
    config = {**run.config, "start_from": None, "settings": {**run.settings, "prior_epochs": epochs}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "backup").mkdir()
        return train.PixelCNNStage(Run(folder, config), splits, vqvae).train()


def code_lengths(vqvae, prior, split):
    """The bits per code of each whole head of a split, float (people,)."""
    heads = split.head_indices(prior.slice_positions)
    return metrics.code_lengths_of_heads(prior, dataset.encode_split(vqvae, prior, split), heads)


def attack(vqvae, prior, reference, members, others):
    """The AUC of the code length less the reference's: of members, a split, and of others: a dict."""
    # Rounded: the last bits of float32 are no difference.
    scores = [np.round(code_lengths(vqvae, prior, split) - code_lengths(vqvae, reference, split), 5)
              for split in (members, others)]
    return {"num_members": len(scores[0]), "num_others": len(scores[1]),
            **judge.area_under_curve("membership_reference", scores)}


@cli.exit_on_user_error
def main():
    """Prints the figure, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--run-dir", required=True, metavar="RUN")
    parser.add_argument("--data-dir", metavar="DIR", help="of the PNG splits (default: the run's own)")
    parser.add_argument("--epochs", type=cli.number(int, 1), metavar="N",
                        help="of the reference (default: those of the run's prior)")
    arguments = parser.parse_args()
    devices.prepare(exact=True)
    run = predict.find_run(arguments.run_dir)
    if run.settings.keys() != vars(train.Settings()).keys():
        raise cli.UserError(f"{run.folder} was trained by another version of train.py, so no reference can "
                            f"be trained like it; check out commit {run.config.get('git_commit')}.")
    vqvae, prior = predict.load_models(run)
    needed = ["--evaluate", *(["--data-dir", arguments.data_dir] if arguments.data_dir else [])]
    splits = predict.load_data(predict.parse_arguments(needed), run, vqvae)
    members, half = every(splits["train"], 2), every(splits["train"], 2, first=1)
    # A few people are enough to choose the best epoch, and all would take a sixth of the time.
    few = every(splits["validate"], max(1, splits["validate"].num_people // VALIDATION_PEOPLE))
    epochs = arguments.epochs or run.settings["prior_epochs"]
    reference = train_reference(run, vqvae, {**splits, "train": half, "validate": few}, epochs)
    measured = attack(vqvae, prior, reference, members, splits["test"])
    print("{num_members} training people told from {num_others} test people: AUC {membership_reference:.2f}"
          .format(**measured))
    evaluation = run.results_path("evaluation.json")
    if evaluation.exists():
        found = {name: measured[name] for name in measured if name.startswith("membership_reference")}
        found["membership_reference_epochs"] = epochs
        write_json(evaluation, {"heads": {**json.loads(evaluation.read_text())["heads"], **found}})
    common.finish("membership", arguments, {
        "settings": {"run_dir": str(run.folder), "epochs": epochs}, **measured})


if __name__ == "__main__":
    main()
