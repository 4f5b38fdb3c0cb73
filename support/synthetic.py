"""A synthetic data set: sampled heads as the three PNG folders that `dataset.py` reads, with what has to be said of them.

Besides the folders it holds SYNTHETIC.txt, for people who find it; dataset.json, for programs; and the notice of simulated people
if the model was trained on such.
"""

import datetime
import json
from pathlib import Path

from PIL import Image

from support import template
from support.files import whole_folder, write_json
from support.volumes import slice_file

NOTICE = "SYNTHETIC.txt"  # lies in the folder of each synthetic data set
DESCRIPTION = "dataset.json"
# Of what predict.py --evaluate measures, what dataset.json holds.
MEASURED = "copies", "copies_limit", "copy_test", "copy_test_says", "told_apart_slices", "told_apart_heads", "membership"


def is_synthetic(folder):
    """Whether the data set in a folder consists of sampled heads."""
    return (Path(folder) / NOTICE).is_file()


def notice(is_simulated, is_synthetic):
    """What has to be said of a data set, in a sentence; empty if nothing.

    Args:
        is_simulated: whether its people are simulated, or sampled from a model of simulated people.
        is_synthetic: whether they are sampled.
    """
    if is_synthetic:
        people = "simulated people" if is_simulated else "people"
        return f"Synthetic heads, sampled from a model of {people}: no evidence about patients."
    return "Simulated people: no evidence about patients." if is_simulated else ""


def notice_of(folder):
    """The `notice` of the data set in a folder."""
    return notice(template.is_simulated(folder), is_synthetic(folder))


def describe(run, geometry, count, seed, temperature, ventricles, slice_positions):
    """What dataset.json says of heads: where they come from, and what was measured of the prior that sampled them.

    Args:
        run: the `runs.Run` that sampled them.
        geometry: the `volumes.SliceGeometry` of the heads.
        count: heads.
        seed: of the draw.
        temperature: of sampling.
        ventricles: the quantile that was asked for, or None.
        slice_positions: of each head.

    Returns:
        A dict that json can write. `trained_on` describes the run's data: see `Run`; `front` there is the side of their files on
        which the front lies, while all that a run makes of them lies front up.
    """
    data = run.config["data"]
    measured, says = measured_prior(run)
    return {"kind": "synthetic", "says": notice(run.is_simulated, True), "run": str(run.folder),
            "git_commit": run.config.get("git_commit"), "date": datetime.date.today().isoformat(),
            "heads": template.split_people(count), "seed": seed, "temperature": temperature, "ventricles": ventricles,
            "slice_positions": list(slice_positions), "front": "up" if data["front"] else None,
            "mm_per_pixel": geometry.pixel_size, "mm_between_slices": geometry.spacing, "axes_known": geometry.axes_known,
            "trained_on": {"is_simulated": run.is_simulated, "is_synthetic": run.is_synthetic, "front": data["front"],
                           "fingerprints": data["fingerprints"], "limit": run.settings["limit"]},
            "prior": measured, "prior_says": says}


def measured_prior(run):
    """What predict.py --evaluate measured of heads of a run's prior.

    Returns:
        (a dict of `MEASURED` with their intervals, or None if nothing was measured; a sentence that says which it is).
    """
    path = run.results_folder("predictions") / "metrics.json"
    try:
        heads = json.loads(path.read_text())["heads"]
        keys = [key for name in MEASURED for key in (name, f"{name}_interval") if key in heads]
        measured = {"num_heads": heads["num_heads"], **{key: heads[key] for key in keys}}
    except (OSError, ValueError, KeyError, TypeError):
        return None, "Not measured: the run's predictions/metrics.json holds no figures of predict.py --evaluate."
    return measured, (f"Measured by predict.py --evaluate on {measured['num_heads']} heads of this run, at the seed and "
                      "temperature of that command; the heads of this data set were not measured themselves.")


def write_heads(folder, heads, description):
    """Writes heads as the three PNG folders, split by head, in their order: the first of them to train.

    Args:
        folder: to make; whole afterwards, or not there.
        heads: an iterable of uint8 (S, H, W), which is read one head at a time.
        description: of them, from `describe`.

    Raises:
        UserError: if the folder exists, or cannot be written.
    """
    text = f"{description['says']}\n{description['prior_says']}\n"
    with whole_folder(folder, "--write-dataset") as unfinished:
        cases = template.make_splits(unfinished, description["heads"])
        for (name, case), head in zip(cases, heads, strict=True):
            for position, image in zip(description["slice_positions"], head, strict=True):
                Image.fromarray(image).save(slice_file(unfinished, name, case, position))
        (unfinished / NOTICE).write_text(f"{text}More: {DESCRIPTION}.\n")
        if description["trained_on"]["is_simulated"]:
            (unfinished / template.SIMULATED_NOTE).write_text(f"{description['says']}\n")
        write_json(unfinished / DESCRIPTION, description)
