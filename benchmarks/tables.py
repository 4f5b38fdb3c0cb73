"""Writes the tables of README.md and benchmarks/README.md from assets/results.json.

    python benchmarks/tables.py

Each stands below a line ``<!-- results: NAME -->``, where NAME is one of `TABLES`; what stands there is
replaced. So no number of a table is copied by hand, and tests/test_readme.py sees to it that none was changed
by hand. A record that was itself written down by hand ("transcribed"), an empty cell and an empty table are
refused.
"""

import json
from pathlib import Path
import re
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.cli import exit_on_user_error, UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = tuple(ROOT / folder / "README.md" for folder in ("", "benchmarks", "assets/pretrained"))
NOT_APPLICABLE = "–"
WITHOUT_MODEL = {"mean_image": "the mean training image", "blurred_original": "the original, blurred"}
MARKED = re.compile(r"(<!-- results: (\w+) -->\n)((?:\|.*\n)*)")


def fill(text, results):
    """A document with every marked table as the results have it.

    Raises:
        KeyError: if a marker's name is none of `TABLES`.
        UserError: if a table cannot be filled: see `table`.
    """
    return MARKED.sub(lambda match: match[1] + table(match[2], results), text)


def table(name, results):
    """One of `TABLES` as Markdown.

    Raises:
        UserError: if the results lack something, or it holds nothing, or was written down by hand.
    """
    rows_of = TABLES[name]
    try:
        return render(rows_of(results))
    except (UserError, LookupError) as error:
        reason = error if isinstance(error, UserError) else f"the record has no {error}"
        raise UserError(f"The table {name} cannot be filled from assets/results.json ({reason}); "
                        "measure it again with --record.") from error


def render(rows):
    """Rows of strings, the first of them the header, as a Markdown table.

    Raises:
        UserError: if there are no rows, or a cell is empty.
    """
    header, *body = rows
    if not body:
        raise UserError("it has no rows")
    for row in body:
        if not all(row):
            raise UserError(f"an empty cell in the row {row}")
    lines = ["|".join(["", *(f" {cell} " if cell else " " for cell in row), ""]) for row in (header, *body)]
    return "".join(f"{line}\n" for line in [lines[0], "|" + "---|" * len(header), *lines[1:]])


def cells(record, formats):
    """A record in each of the formats; empty, which `render` refuses, where it has nothing of that name."""
    filled = []
    for template in formats:
        try:
            filled.append(template.format(**record))
        except KeyError:
            filled.append("")
    return filled


def summary(results):
    """The first table of all: reconstruction, beside two pictures that need no model."""
    rows = [["test images", "SSIM with neighbours (alone)", "SSIM in the brain", "PSNR",
             "SSIM, mean image", "SSIM, blurred",
             "bytes: pixels, codes, ideally coded"]]
    labels = {"real_slices": "**real people**", "pretrained": "the weights (simulated)",
              "demo": "the demo (simulated)"}
    for key, label in labels.items():
        row = results[key]
        formats = ("{ssim:.3f} ({ssim_alone:.3f})", "{ssim_foreground:.3f} ({ssim_foreground_alone:.3f})",
                   "{psnr:.1f} dB", "{baselines[mean_image][ssim]:.3f}",
                   "{baselines[blurred_original][ssim]:.3f}")
        bytes_of = row["image_size"] ** 2, row["bits_fixed"] / 8, row["bytes_per_image"]
        rows.append([label, *cells(row, formats), ", ".join(f"{number:,.0f}" for number in bytes_of)])
    return rows


def heads(results):
    """What README says of sampled heads: of real people's run, and of the weights."""
    names = {"told_apart_slices": "told apart by slice", "told_apart_heads": "told apart by head",
             "roughness_auc": "roughness (below 0.5: smoother)", "membership": "membership, by code length",
             "membership_reference": "membership, by a reference prior"}
    columns = {"real people": results["heads"], "chance": results["heads"],
               "the weights (simulated)": results["pretrained_heads"]}
    rows = [["AUC", *columns]]
    for name, label in names.items():
        if not any(name in record for record in columns.values()):
            continue  # not every run was attacked by benchmarks/membership.py
        suffixes = [name + ("_floor" if heading == "chance" else "") for heading in columns]
        rows.append([label, *(figure(record, key) for record, key in zip(columns.values(), suffixes))])
    return rows


def figure(record, name):
    """A figure with its interval, if the record has it."""
    if name not in record:
        return NOT_APPLICABLE
    low_and_high = record.get(f"{name}_interval")
    return f"{record[name]:.2f}" + (" ({:.2f}–{:.2f})".format(*low_and_high) if low_and_high else "")


def anatomy(results):
    """More of the same heads, beside training people and new people."""
    names = {"roughness": "roughness from slice to slice",
             "dark_sd_ratio": "SD of ventricle size, divided by training people's",
             "distance_auc": "distance to nearest training person (AUC; below 0.5: too near)",
             "nearest_over_second": "that over the second nearest; a copy: 0",
             "membership_reconstruction": "membership by stage 1's error (AUC)"}
    record = results["heads"]
    return [["", "sampled heads", "training people", "new people"],
            *([label, *(figure(record, name + suffix) for suffix in ("", "_train", "_new"))]
              for name, label in names.items())]


def before(results):
    """The recipe of an earlier commit and today's, on the real slices, judged alike."""
    record = results["heads"]
    names = {"told_apart_slices": "told apart by slice", "told_apart_heads": "told apart by head",
             "roughness_auc": "roughness (below 0.5: smoother)", "membership": "membership, by code length"}
    return [["AUC", f"commit {record['commit_before'][:7]}", "now"],
            *([label, figure(record, f"{name}_before"), figure(record, name)]
              for name, label in names.items())]


def judges(results):
    """What the judges say of fakes that they must find, beside real people."""
    fakes = {"noise": "noise", "mean_person": "the mean person", "mixed_people": "slices of different people",
             "rougher": "slices that differ by 10 % more"}
    rows = [["AUC", *fakes.values()]]
    for name, label in (("told_apart_slices", "by slice"), ("told_apart_heads", "by head")):
        values = [results["heads"].get(f"{name}_fake_{fake}") for fake in fakes]
        rows.append([label, *(NOT_APPLICABLE if value is None else f"{value:.2f}" for value in values)])
    return rows


def pretrained(results):
    """The weights in assets/pretrained: reconstruction of new people, and sampled heads beside them."""
    run, of_heads = results["pretrained"], results["pretrained_heads"]
    rows = [("SSIM on test people", run, "{ssim:.3f}"), ("SSIM in the brain", run, "{ssim_foreground:.3f}"),
            ("PSNR", run, "{psnr:.1f} dB"), ("bits per code in a head", run, "{bits_per_code:.2f}"),
            ("bits per code of a slice alone", run, "{bits_per_code_alone:.2f}"),
            ("sampled heads told apart from people, by slice (0.5: cannot be told)", of_heads,
             "{told_apart_slices:.2f}"),
            ("the same by head", of_heads, "{told_apart_heads:.2f}"),
            ("membership AUC (0.5: the prior does not remember its people)", of_heads, "{membership:.2f}"),
            ("heads that stand out as copies", of_heads, "{copies} of {num_heads}")]
    return [["", "value"], *([label, *cells(record, [template])] for label, record, template in rows)]


def runs(results):
    """What train.py reached on the real slices, on the demo cohort, and for the pretrained weights."""
    formats = ("{num_images}", "{ssim:.3f}", "{ssim_gaussian:.3f}", "{ssim_foreground:.3f}", "{psnr:.1f} dB",
               "{bytes_fixed:,.0f} / {bytes_per_image:.0f}",
               "{codes_used} of {num_embeddings}, {perplexity:.0f}")
    rows = [["data", "command", "test images", "`ssim`", "`ssim_gaussian`", "`ssim_foreground`", "PSNR",
             "bytes, fixed / by the prior", "codes used, perplexity"]]
    people = sum(results["real_slices"]["people"].values())
    labels = {"real_slices": f"real T1 slices of {people} people", "demo": "demo cohort (simulated)",
              "pretrained": "200 simulated people (the weights in assets/pretrained)"}
    for key, label in labels.items():
        row = results[key]
        record = {**row, "bytes_fixed": row["bits_fixed"] / 8}
        command, = (part for part in row["command"].split(" && ") if "train.py" in part)
        rows.append([label, f"`{command}`", *cells(record, formats)])
    return rows


def reconstruction(results):
    """benchmarks/reconstruction.py: PatternFlow's model beside ours."""
    quality = "{ssim:.3f}", "{ssim_gaussian:.3f}", "{ssim_foreground:.3f}", "{psnr:.1f} dB"
    cost = ("{bits_fixed:,.0f}", "{perplexity:.0f} of {num_embeddings}", "{images_per_second:.1f}",
            "{steps:,} x {batch_size}")
    record = results["reconstruction"]
    rows = [["", "`ssim`", "`ssim_gaussian`", "`ssim_foreground`", "PSNR", "bits per image", "perplexity",
             "images/s", "steps x batch"]]
    for key, label in (("ours", "ours"), ("patternflow", "PatternFlow's")):
        rows.append([label, *cells(record[key], quality + cost)])
    for key, label in WITHOUT_MODEL.items():
        rows.append([label, *cells(record[key], quality), *[NOT_APPLICABLE] * len(cost)])
    return rows


def utility(results):
    """benchmarks/utility.py: stage 1 trained on sampled heads beside stage 1 trained on people."""
    labels = {"real": "the training people", "as_many": "as many sampled heads", "more": "more sampled heads"}
    formats = "{heads:,}", "{ssim:.3f}", "{ssim_foreground:.3f}", "{psnr:.1f} dB", "{steps:,} x {batch_size}"
    return [["trained on", "heads", "`ssim`", "`ssim_foreground`", "PSNR", "steps x batch"],
            *([label, *cells(results["utility"]["rows"][key], formats)] for key, label in labels.items())]


def chain(results):
    """benchmarks/codecs.py: what each step of coding saves."""
    formats = ("{num_images}", "{pixels:,}", "{fixed_length:,.0f}", "{by_frequency:,.0f}",
               "{slice_alone:,.0f}", "{slice_in_head:,.0f}")
    return [["images", "pixels", "codes of fixed length", "codes by their frequency",
             "by the prior, a slice by itself", "by the prior, a slice in its head"],
            cells(results["codecs"]["chain"], formats)]


BUDGETS = {"rate weight 0": "nearest codes", "rate weight 4": "rate weight 4",
           "fixed length": "codes of fixed length"}


def budget_rows(budgets, containers):
    """What all get out of the bytes of the model: a row for each budget and method."""
    rows = [["the model's bytes", "method", "bytes", "`ssim`", "`ssim_foreground`", "PSNR",
             "within the bytes", "container, not counted"]]
    for budget, methods in budgets.items():
        label = f"{BUDGETS[budget]}, {methods['model']['bytes']:,.0f} bytes"
        for name, row in methods.items():
            quality = cells(row, ("{bytes:,.0f}", "{ssim:.3f}", "{ssim_foreground:.3f}", "{psnr:.1f} dB"))
            container = f"{containers[name]} bytes" if name in containers else NOT_APPLICABLE
            rows.append([label, name, *quality, f"{row.get('within_limit', 1):.0%}", container])
    return rows


def codecs(results):
    """benchmarks/codecs.py: image codecs within the model's bytes."""
    record = results["codecs"]
    return budget_rows(record["budgets"], record["container_bytes"])


def head_codecs(results):
    """benchmarks/codecs.py: video codecs within the model's bytes for whole heads."""
    return [row[:-1] for row in budget_rows(results["codecs"]["heads"]["budgets"], {})]


def head_bytes(results):
    """benchmarks/codecs.py: the bytes per slice of whole heads for one quality."""
    methods = "model", "HEVC", "AV1"
    rows = [["bytes per slice at", *methods]]
    for name, sizes in results["codecs"]["heads"]["bytes_at"].items():
        reached = ["not reached" if sizes[method] is None else f"{sizes[method]:.0f}" for method in methods]
        rows.append([f"`{name}` {sizes['target']}", *reached])
    return rows


def loading(results):
    """benchmarks/loading.py: seconds and memory until the images can be used."""
    labels = {"theirs": "PatternFlow's way", "ours_first": "ours, first start",
              "ours_second": "ours, from the cache"}
    formats = "{images:,}", "{seconds[median]:.3g}", "{peak_gigabytes:.2f} GB"
    rows = results["loading"]["rows"]
    return [["", "images", "seconds", "peak memory"],
            *([label, *cells(rows[key], formats)] for key, label in labels.items())]


def epochs(results):
    """benchmarks/loading.py: the memory of an epoch of stage 1 from the memory map."""
    formats = "{people}", "{images:,}", "{image_gigabytes:.2f} GB", "{peak_gigabytes:.2f} GB"
    return [["people", "images", "pixels on disk", "peak memory"],
            *(cells(row, formats) for row in results["loading"]["epochs"])]


def training(results):
    """benchmarks/training.py: speed beside the plain keras-io way."""
    formats = ("{images_per_second[median]:.1f}", "{multiply_adds_million:,.0f}", "{share_of_peak:.0%}",
               "{peak_gigabytes:.2f} GB")
    record = results["training"]
    rows = [["", "images/s", "million multiply-adds per image", "share of the machine's peak", "peak memory",
             "ours, times as fast"]]
    for stage, name in (("vqvae", "VQ-VAE"), ("pixelcnn", "PixelCNN")):
        for side, row in record["rows"][stage].items():
            speedup = NOT_APPLICABLE if side == "ours" else ratio(record["ratios"][stage][side])
            rows.append([f"{name}, {side}", *cells(row, formats), speedup])
    return rows


def optimizers(results):
    """benchmarks/optimizers.py: Muon beside Adam, both for the same seconds."""
    record = results["optimizers"]
    rows = [["", "learning rate, times `train.py`'s", "steps", "seconds", "reconstruction loss",
             "bits per code", "`ssim`"]]
    for stage, name in (("vqvae", "VQ-VAE"), ("pixelcnn", "PixelCNN")):
        for optimizer, row in record["rows"][stage].items():
            figures = [mean_and_range(row[key], digits) if key in row else NOT_APPLICABLE for key, digits
                       in (("reconstruction_loss", 4), ("bits_per_code", 3), ("ssim", 3))]
            seconds = f"{sum(row['seconds']) / len(row['seconds']):.1f}"
            rows.append([f"{name}, {optimizer}", f"{row['factor']:.2g}", str(row["steps"]), seconds,
                         *figures])
    return rows


def mean_and_range(values, digits):
    """A list of numbers as their mean and their range."""
    return "{:.{}f} ({:.{}f} to {:.{}f})".format(
        sum(values) / len(values), digits, min(values), digits, max(values), digits)


def ratio(summary):
    """A ratio of `common.ratio` with its range, or its verdict; empty if it was not measured in rounds."""
    if "verdict" in summary:
        return summary["verdict"]
    return " ".join(cells(summary, ("{median:.3g}", "({min:.3g} to {max:.3g})"))).strip()


def scaling(results):
    """benchmarks/scaling.py: how cost grows; no number where it does not measurably differ from row one."""
    speeds = {"vqvae_images_per_second": "{median:.1f}", "pixelcnn_images_per_second": "{median:.1f}",
              "sampling_seconds_per_image": "{median:.3f}"}
    ratios = results["scaling"]["ratios"]
    rows = [["image", "grid", "codes", "people", "VQ-VAE images/s", "PixelCNN images/s",
             "sampling, s per image", "peak memory"]]
    for name, row in results["scaling"]["rows"].items():
        noise = {key for key, summary in ratios.get(name, {}).items() if "verdict" in summary}
        medians = ["no difference" if key in noise else text.format(**row[key])
                   for key, text in speeds.items()]
        rows.append([*cells(row, ("{image_size}", "{grid}x{grid}", "{num_embeddings}", "{people}")), *medians,
                     *cells(row, ["{peak_gigabytes:.1f} GB"])])
    return rows


def gpu(results):
    """benchmarks/gpu.py: both stages and sampling on a GPU."""
    record = results["gpu"]
    formats = "{median:,.0f}", "{min:,.0f} to {max:,.0f}"
    return [["", "images/s", "range over the rounds"],
            *([name, *cells(row, formats)] for name, row in record["images_per_second"].items()),
            *([f"the demo: `{script}`", f"{seconds:.0f} s in all", NOT_APPLICABLE]
              for script, seconds in record["demo_seconds"].items())]


OASIS = {"images": 9664, "heads": 64, "epochs": {"vqvae": 20, "decoder": 8, "pixelcnn": 20}}  # by default
CALIBRATION_SLICES = 2 * 32  # sampled of each head: two rounds


def minutes(results):
    """How long train.py takes: measured, or "about" so long by the recorded speeds."""
    real, both_cores = results["real_slices"], results["two_cores"]
    images = 32 * real["people"]["train"]
    real_slices = {"images": images, "heads": OASIS["heads"], "epochs": real["epochs"]}
    cpu = {stage: number * images / both_cores["seconds"][stage]
           for stage, number in both_cores["epochs"].items()}
    cpu["sampling"] = 1 / results["sampling"]["head_seconds_per_slice"]
    names = {"vqvae": "VQ-VAE, batches of 8", "pixelcnn": "PixelCNN, batches of 8",
             "sampling": "sampling, 64 heads at once"}
    gpu = {stage: results["gpu"]["images_per_second"][name]["median"] for stage, name in names.items()}
    gpu["decoder"] = gpu["vqvae"] * cpu["decoder"] / cpu["vqvae"]  # not measured: the share as on the CPU
    # The demo's whole time on the GPU is nearly all start and compilation, which each run has.
    start = results["gpu"]["demo_seconds"]["train.py"]
    rows = [["`train.py` (about: estimated)", "two CPU cores", "one H200"],
            ["the demo", in_minutes(sum(results["demo"]["seconds"].values())), in_minutes(start)]]
    for label, run in (f"real slices of {real['people']['train']} people", real_slices), ("OASIS", OASIS):
        rows.append([f"{label}, {run['epochs']['vqvae']} + {run['epochs']['pixelcnn']} epochs",
                     f"about {in_minutes(estimate(run, cpu))}",
                     f"about {in_minutes(start + estimate(run, gpu))}"])
    return rows


def estimate(run, speeds):
    """The seconds of a run, like `OASIS`, by images/s of each stage and of sampling, which calibrates."""
    training = sum(number * run["images"] / speeds[stage] for stage, number in run["epochs"].items())
    return training + run["heads"] * CALIBRATION_SLICES / speeds["sampling"]


def in_minutes(seconds):
    """A time in minutes, or if it is long in hours."""
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def sampling(results):
    """benchmarks/sampling.py: seconds per image in batches of 16, and per slice of 4 heads."""
    row = results["sampling"]
    return [["grid", "seconds per image", "full forward passes, times as long", "codes that differ",
             "seconds per slice of whole heads"],
            [*cells(row, ("{grid_size}x{grid_size}", "{seconds_per_image:.3f}")), ratio(row["speedup"]),
             *cells(row, ("{codes_differing} of {codes:,} ({preferred_by_at_most:.0e})",
                          "{head_seconds_per_slice:.3f}"))]]


def ventricles(results):
    """benchmarks/ventricles.py: ventricles of the size that was asked for."""
    formats = ("{num_heads}", "{rank_correlation:.2f} ({rank_correlation_interval[0]:.2f} to "
               "{rank_correlation_interval[1]:.2f})",
               "{slope:.2f} ({slope_interval[0]:.2f} to {slope_interval[1]:.2f})", "{quantile_error:.2f}")
    return [["heads", "rank correlation of asked and shown", "slope of shown over asked",
             "mean error, as a quantile"],
            cells(results["ventricles"], formats)]


def faults(results):
    """benchmarks/faults.py: what became of trainings and predictions that were killed."""
    formats = "{tried}", "{survived}", "{lost}", "{differing}", "{left_over}"
    labels = {"training": ("`train.py`", "resumed to the same bits"),
              "prediction": ("`predict.py`", "all old or all new results")}
    return [["command", "what has to hold", "killed", "held", "lost", "differing or mixed",
             "files left over"],
            *([*label, *cells(results["faults"][key], formats)] for key, label in labels.items())]


def origins(results):
    """Where each key of assets/results.json comes from; its machine is in `machines`."""
    rows = [["key", "command", "commit of training", "date"]]
    for key, row in results.items():
        if "transcribed" in row:
            raise UserError(f"{key} was transcribed, not measured")
        rows.append([f"`{key}`", f"`{row['command']}`", short_commits(row["commit"]), row["date"]])
    return rows


def short_commits(text):
    """A text whose commits have ten digits."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", text)


def machines(results):
    """The machines of `origins`, each with its keys; that of the most keys comes first and names none."""
    keys = {}
    for key, row in results.items():
        machine = row["machine"]
        # All x86 CPUs have SSE.
        instructions = [name for name in machine["vector_instructions"] if not name.startswith("sse")]
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        words = (row["hardware"], ", ".join(instructions) or NOT_APPLICABLE,
                 f"Python {machine['python']}, {packages}")
        keys.setdefault(words, []).append(f"`{key}`")
    most, *others = sorted(keys, key=lambda words: -len(keys[words]))
    return [["keys", "machine", "vector instructions", "packages"],
            ["all others" if others else "all", *most],
            *([", ".join(keys[words]), *words] for words in others)]


TABLES = {function.__name__: function for function in (
    summary, heads, judges, anatomy, before, runs, pretrained, reconstruction, utility, chain, codecs,
    head_codecs, head_bytes, sampling, ventricles, loading, epochs, training, optimizers, scaling, gpu,
    minutes, faults, origins, machines)}


@exit_on_user_error
def main():
    """Rewrites both documents, if every table can be filled."""
    results = json.loads((ROOT / "assets" / "results.json").read_text())
    filled = {path: fill(path.read_text(), results) for path in DOCUMENTS}
    for path, text in filled.items():
        path.write_text(text)
        print(f"Written: {path}")


if __name__ == "__main__":
    main()
