"""Muon beside Adam: both stages of the demo run, trained for the same seconds.

    python benchmarks/optimizers.py [--budget 12] [--prior-budget 24] [--seeds 3]

train.py's own stages on the demo cohort. Muon trains by train.py's rates and weight decay. Adam has none, and
the same schedule, betas and clipping; its rate is the best of three, a third of train.py's, the same, and
three times it, by validation people after a third of the budget. So the search is on Adam's side alone.

How many steps fit into the budget is measured first, in turns, on models that are thrown away; so compilation
and the start of the codebook do not count. Then each optimiser trains with every seed, in turns, and is
measured on the validation people. Both priors learn the codes of one VQ-VAE, the last that Muon trained. The
last line is JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
import support.environment  # noqa: F401

import dataclasses
import functools
import statistics
import time

import keras
import numpy as np

from benchmarks import common
import dataset
from support import cli, devices, metrics, optimizers
from support.images import in_chunks, to_unit
from support.template import make_demo_cohort
import train

STAGES = {"vqvae": "learning_rate", "pixelcnn": "prior_learning_rate"}  # and the name of its rate
OPTIMIZERS = "Muon", "Adam"
FACTORS = 1 / 3, 1, 3  # of Adam's rate, times train.py's
SEARCH = 1 / 3  # of the steps: for how long each of these is tried
STEPS_TO_TIME, ROUNDS = 10, 3


class Trial:
    """A model of a `stages.Stage` as train.py begins it, but by either optimiser, and for so many steps."""

    def __init__(self, stage, optimizer, num_steps):
        stage.epochs, stage.steps_per_epoch = 1, num_steps  # over which the learning rate is laid
        build = stage.build

        def build_with_adam():
            model = build()
            # Muon is made of Adam, and of the same arguments; but Keras' decay would be on all variables.
            config = {**model.optimizer.get_config(), "weight_decay": None}
            model.compile(optimizers.Adam.from_config(config),
                          steps_per_execution=model.steps_per_execution)
            model.optimizer.build(model.trainable_variables)
            return model

        if optimizer == "Adam":
            stage.build = build_with_adam
        keras.utils.set_random_seed(stage.run.seed)
        self.stage, self.model = stage, stage.begin()
        self.batches = stage.batches(self.model, "train", stage.batch_size, stage.run.seed)
        self.fit(1)  # compiles

    def fit(self, num_steps):
        """Trains for so many steps; returns the seconds."""
        start = time.perf_counter()
        self.model.fit(self.batches, steps_per_epoch=num_steps, verbose=0, shuffle=False)
        return time.perf_counter() - start

    def measure(self):
        """What the validation people show: a dict whose first value is the loss."""
        self.model.reset_metrics()
        for batch in self.stage.batches(self.model, "validate", 32):
            logs = self.model.test_step(batch)  # not `evaluate`, which compiles for longer than this takes
        if self.stage.name == "pixelcnn":
            return {"bits_per_code": float(logs["bits_per_code"])}
        split = self.stage.splits["validate"]
        decoded = to_unit(in_chunks(self.model.decode_codes, dataset.encode(self.model, split)))
        ssim = [metrics.ssim(*pair) for pair in zip(split.images / 255, decoded)]
        return {"reconstruction_loss": float(logs["reconstruction_loss"]), "ssim": float(np.mean(ssim))}


def train_trial(make_stage, optimizer, num_steps, seed=0, factor=1.0):
    """Trains a model from scratch for so many steps.

    Args:
        make_stage: gives the `stages.Stage` of a seed and a factor of its learning rate.

    Returns:
        (the model; a dict of the seconds of all steps but the first, and of `Trial.measure`).
    """
    trial = Trial(make_stage(seed, factor), optimizer, num_steps)
    seconds = trial.fit(num_steps - 1)
    return trial.model, {"seconds": seconds, **trial.measure()}


def steps_per_second(make_stage):
    """How many steps each optimiser makes per second, a dict, measured in turns."""
    sides = {optimizer: functools.partial(Trial(make_stage(0, 1.0), optimizer, 10 ** 6).fit, STEPS_TO_TIME)
             for optimizer in OPTIMIZERS}
    measured = common.interleave(sides, ROUNDS)
    return {name: STEPS_TO_TIME / statistics.median(seconds) for name, seconds in measured.items()}


def compare(make_stage, budget, num_seeds):
    """Both optimisers on a stage, for so many seconds each and seed.

    Returns:
        (the last model that Muon trained; the losses by which Adam's factor was chosen, a dict; a row for
        each optimiser: its steps, the factor of its rate, and what was measured, lists by seed).
    """
    steps = {name: max(2, round(budget * speed)) for name, speed in steps_per_second(make_stage).items()}
    search = {}
    for factor in FACTORS:
        _, row = train_trial(make_stage, "Adam", max(2, round(SEARCH * steps["Adam"])), factor=factor)
        search[factor] = row.get("bits_per_code", row.get("reconstruction_loss"))
    factors, models, rows = {"Muon": 1.0, "Adam": min(search, key=search.get)}, {}, {}
    seeds = {name: iter(range(num_seeds)) for name in OPTIMIZERS}

    def train_next(name):
        models[name], row = train_trial(make_stage, name, steps[name], next(seeds[name]), factors[name])
        return row

    sides = {name: functools.partial(train_next, name) for name in OPTIMIZERS}
    for name, by_seed in common.interleave(sides, num_seeds).items():
        rows[name] = {"steps": steps[name], "factor": factors[name],
                      **{key: [row[key] for row in by_seed] for key in by_seed[0]}}
    return models["Muon"], search, rows


def stage_maker(splits, name, vqvae=None):
    """A function that makes a stage of the demo run, of a seed and with a factor of its learning rate."""
    def make_stage(seed, factor):
        settings = dataclasses.asdict(train.DEMO)
        settings |= {"seed": seed, STAGES[name]: factor * settings[STAGES[name]]}
        stage = common.vqvae_stage(splits["train"], **settings)
        if vqvae:
            stage.run.config["data"] = {"front": "up"}
            return train.PixelCNNStage(stage.run, splits, vqvae)
        stage.splits = splits
        return stage
    return make_stage


@cli.exit_on_user_error
def main():
    """Prints a row per stage and optimiser, then JSON."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--budget", type=cli.number(float, 0.1), default=12, metavar="SECONDS",
                        help="of stage 1 (default: 12)")
    parser.add_argument("--prior-budget", type=cli.number(float, 0.1), default=24, metavar="SECONDS",
                        help="of stage 2 (default: 24)")
    parser.add_argument("--seeds", type=cli.number(int, 1), default=3, metavar="N", help="(default: 3)")
    arguments = parser.parse_args()
    devices.prepare()
    splits = dataset.load_splits(make_demo_cohort(), ["train", "validate"])
    budgets = dict(zip(STAGES, (arguments.budget, arguments.prior_budget)))
    vqvae, search, rows = None, {}, {}
    for name, budget in budgets.items():
        model, search[name], rows[name] = compare(stage_maker(splits, name, vqvae), budget, arguments.seeds)
        vqvae = vqvae or model
        for optimizer, row in rows[name].items():
            print(name, optimizer, row, flush=True)
    common.finish("optimizers", arguments, {
        "rows": rows, "search": search, "budgets": budgets, "seeds": arguments.seeds,
        "validation_people": splits["validate"].num_people})


if __name__ == "__main__":
    main()
