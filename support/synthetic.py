"""A synthetic data set: sampled heads as the PNG folders that `dataset.py` reads, and what to say of them."""

import contextlib
import json
from pathlib import Path

from PIL import Image

from support import template
from support.files import whole_folder, write_json
from support.slices import slice_file, write_geometry
from support.volumes import SliceGeometry

SYNTHETIC_NOTE = "SYNTHETIC.txt"  # in the folder of each synthetic data set, for people who find it
DESCRIPTION = "dataset.json"  # beside it, for programs


def is_synthetic(folder):
    """Whether the data set in a folder consists of sampled heads."""
    return (Path(folder) / SYNTHETIC_NOTE).is_file()


def notice(is_simulated, is_synthetic):
    """What has to be said of a data set of simulated people or of sampled heads, a sentence; else empty."""
    if is_synthetic:
        people = "simulated people" if is_simulated else "people"
        return f"Synthetic heads, sampled from a model of {people}: no evidence about patients."
    return "Simulated people: no evidence about patients." if is_simulated else ""


def notice_of(folder):
    return notice(template.is_simulated(folder), is_synthetic(folder))


def describe(run, slice_positions, count, seed, temperature, ventricles):
    """The content of dataset.json: where heads of a `runs.Run` come from, and what was judged of others."""
    data, prior = run.config["data"], None
    with contextlib.suppress(OSError, ValueError):  # not judged, or the file is damaged
        prior = json.loads(run.results_path("evaluation.json").read_text())
    return {"kind": "synthetic", "says": notice(run.is_simulated, True),
            "heads": template.split_people(count), "seed": seed, "temperature": temperature,
            "ventricles": ventricles, "git_commit": run.config.get("git_commit"),
            "slice_positions": list(slice_positions), "geometry": vars(run.geometry),
            "front": "up" if data["front"] else None,
            "trained_on": {"is_simulated": run.is_simulated, "front": data["front"],
                           "fingerprints": data["fingerprints"], "limit": run.settings["limit"]},
            "prior": prior}


def write_png_heads(folder, heads, description):
    """Writes heads, uint8 (S, H, W) each, as the three PNG folders, by what `describe` says of them."""
    with whole_folder(folder, "--write-dataset") as new:
        for (split, case), head in zip(template.make_splits(new, description["heads"]), heads, strict=True):
            for position, image in zip(description["slice_positions"], head, strict=True):
                Image.fromarray(image).save(slice_file(new, split, case, position))
        text = f"{description['says']}\nMore: {DESCRIPTION}.\n"
        (new / SYNTHETIC_NOTE).write_text(text)
        if description["trained_on"]["is_simulated"]:
            (new / template.SIMULATED_NOTE).write_text(text)
        write_json(new / DESCRIPTION, description)
        if description["front"]:
            write_geometry(new, SliceGeometry(**description["geometry"]))
