"""The report: one HTML page of a run's figures, pictures and heads, which needs neither network nor other files."""

import base64
import dataclasses
import html
import io
import math

import matplotlib
import numpy as np
from PIL import Image

from support import figures, volumes
from support.images import brain_box, crop

# What each figure of metrics.json is, by the heading that it stands under.
MEANINGS = {
    "Reconstruction": {
        "ssim": "structural similarity, 7x7 window, 1 is equal",
        "ssim_gaussian": "structural similarity, Gaussian window (Wang et al. 2004), 1 is equal",
        "ssim_foreground": "the same over the original's brain only",
        "psnr": "peak signal-to-noise ratio in dB, more is better",
        "mse": "mean squared error of intensities from 0 to 1",
        "num_images": "test images measured",
    },
    "Codes and bits": {
        "bits_per_code": "code length of whole heads, given the slices below and the person, whose own bits are included",
        "bits_per_code_alone": "code length of single slices, without any context",
        "bits_per_code_train": "code length of training heads; far below that of test heads if the prior has memorised them",
        "bytes_per_image": "size of a slice, coded by the prior",
        "code_entropy": "bits per code if codes were independent",
        "perplexity": "number of equally likely codes with that entropy",
        "codes_used": "codes that occur at all",
    },
    "Samples": {
        "num_samples": "single samples measured",
        "frechet": "Fréchet distance to test people, 0 is equal",
        "kid": "kernel distance to test people, 0 is equal",
        "density": "samples that lie where people are: near 1, more if they keep to the middle",
        "coverage": "share of test images with a sample near to them",
        "ms_ssim_samples": "similarity of pairs of samples: the less, the more they differ",
        "ms_ssim_real": "the same of pairs of test people",
        "nearest_samples": "median distance to the nearest training image",
        "nearest_real": "the same of test people",
        "copy_test": "C_T: well below 0 for copies, about 0 for samples as new as a new person",
        "copy_test_says": "the same in words",
    },
}
HEAD_MEANINGS = {
    "neighbour_correlation": "correlation of neighbouring slices",
    "correlation_4_apart": "correlation of slices 4 apart",
    "correlation_8_apart": "correlation of slices 8 apart",
    "told_apart_slices": "AUC of a network that tells sampled slices from people's: 0.5 cannot be told, 1 always",
    "told_apart_slices_by_head": "the same, the mean over a head's slices",
    "told_apart_heads_by_slice": "AUC of a network that sees a slice with those 1 and 4 above it",
    "told_apart_heads": "the same, the mean over a head",
    "copy_test": "C_T of whole heads: well below 0 for copies",
    "nearest_over_second": "distance of the nearest training person over that of the second nearest: 0 for a copy",
    "membership": "AUC of the code length that tells training people from new ones: 0.5 if the prior does not remember them",
}
STATISTICS = {"dark": "dark share (ventricles, fissures)", "dark_fraction": "dark share (ventricles, fissures)",
              "brain_area": "size of the brain", "symmetry": "symmetry",
              "brightness": "brightness"}
SUFFIXES = {"mean": "mean", "sd": "spread over people", "sd_ratio": "spread over that of training people",
            "ks": "distance from the distribution of people (slices: test people; heads: training people), 0 to 1"}


@dataclasses.dataclass
class Examples:
    """Test images to look at: each original lies under its reconstruction, with its codes and their bits beside it.

    Attributes:
        originals: (N, H, W) in [0, 1].
        reconstructions: (N, H, W) in [0, 1].
        codes: int (N, g, g).
        bits: float (N, g, g), the code length of each code, given the slices below and the person.
        captions: N texts.
    """

    originals: np.ndarray
    reconstructions: np.ndarray
    codes: np.ndarray
    bits: np.ndarray
    captions: list


@dataclasses.dataclass
class Report:
    """What the page shows. What is None or empty is left out, with its heading.

    Attributes:
        title: one line.
        facts: dict of texts by what they are: run, data, date, seed, commit.
        notice: what has to be said of the run's data: see `synthetic.notice`.
        margin: pixels that the model paints black on each side; they are cut off.
        colours: (K, 3), see `figures.code_colours`.
        metrics: dict of numbers and sentences. A `NAME_sd` is shown as the spread of NAME, a `NAME_floor` beside it.
        examples: `Examples`.
        all_codes: int (...), whose use is plotted.
        samples: (M, H, W) in [0, 1].
        sample_captions: M texts.
        neighbours: uint8 (M, H, W), each sample's nearest training image.
        heads: uint8 (P, S, H, W), axial slices from the lowest up.
        head_positions: their S slice positions.
        geometry: `volumes.SliceGeometry` of the heads.
        head_table: rows of texts, the first a heading; each other begins with a key of `metrics.evaluate_heads`.
    """

    title: str
    facts: dict
    notice: str
    margin: int
    colours: np.ndarray
    metrics: dict | None = None
    examples: Examples | None = None
    all_codes: np.ndarray | None = None
    samples: np.ndarray | None = None
    sample_captions: list | None = None
    neighbours: np.ndarray | None = None
    heads: np.ndarray | None = None
    head_positions: list | None = None
    geometry: volumes.SliceGeometry = volumes.SliceGeometry()
    head_table: list | None = None


def write_report(path, report):
    """Writes a `Report` as an HTML file."""
    notice = f'<p class="notice">{_text(report.notice)}</p>' if report.notice else ""
    facts = _table([[_text(name), _text(value)] for name, value in report.facts.items()])
    sections = [_metrics_section(report.metrics), _examples_section(report), _samples_section(report),
                _heads_section(report), _codebook_section(report)]
    page = PAGE.format(title=_text(report.title), notice=notice, facts=facts, sections="\n".join(filter(None, sections)))
    path.write_text(page, encoding="utf-8")


def _text(value):
    return html.escape(str(value))


def _table(rows, heading=()):
    """Rows of HTML texts as a table, the first of each row as its name."""
    lines = ["".join(f"<th>{cell}</th>" for cell in heading)] if heading else []
    lines += [f"<th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _section(heading, text, content):
    return f"<section><h2>{heading}</h2><p>{text}</p>{content}</section>"


def meaning(key):
    """A plain description of a figure by its key; empty if there is none."""
    for meanings in (*MEANINGS.values(), HEAD_MEANINGS):
        if key in meanings:
            return meanings[key]
    for statistic, words in STATISTICS.items():
        suffix = key.removeprefix(f"{statistic}_")
        if suffix != key and suffix in SUFFIXES:
            return f"{words}: {SUFFIXES[suffix]}"
    return ""


def with_spread(value, spread=None):
    """A figure as text, with its standard deviation over people if there is one: "0.917 ± 0.008"."""
    if not isinstance(value, float):
        return str(value)
    if not spread or not math.isfinite(spread):
        return f"{value:.4g}"
    decimals = max(0, math.ceil(-math.log10(spread / 2)))  # one digit of the spread; two if it begins with 1
    return f"{value:.{decimals}f} ± {spread:.{decimals}f}"


def _metrics_section(metrics):
    if not metrics:
        return ""
    own_rows = [key for key in metrics if not (key.endswith(("_sd", "_floor")) and key.rpartition("_")[0] in metrics)]
    groups = {heading: [key for key in meanings if key in own_rows] for heading, meanings in MEANINGS.items()}
    groups["Samples"] += [key for key in own_rows if key.endswith("_ks")]
    groups["Other figures"] = [key for key in own_rows if key not in sum(groups.values(), [])]
    content = ""
    for heading, keys in groups.items():
        rows = [[_text(key), _text(with_spread(metrics[key], metrics.get(f"{key}_sd"))),
                 _text(with_spread(metrics.get(f"{key}_floor", ""))), _text(meaning(key))] for key in keys]
        beside = "other people" if any(row[2] for row in rows) else ""
        if rows:
            content += f"<h3>{heading}</h3>" + _table(rows, ("", "value", beside, "what it is"))
    return _section("What was measured", "On the test people. ± is the standard deviation over people.", content)


def _image(picture, alt, kind=""):
    """An image in [0, 1], (H, W) or (H, W, 3), or uint8, as an <img> that holds its PNG."""
    if picture.dtype != np.uint8:
        picture = np.uint8(np.round(np.clip(picture, 0, 1) * 255))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return _embed(file, alt, kind)


def _embed(file, alt, kind=""):
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img{f" class={kind!r}" if kind else ""} src="data:image/png;base64,{data}" alt="{alt}">'


def _examples_section(report):
    examples = report.examples
    if examples is None:
        return ""
    top = max(1, math.ceil(np.max(examples.bits)))
    maps = matplotlib.colormaps["inferno"](examples.bits / top)[..., :3]
    originals, reconstructions = (crop(images, report.margin)
                                  for images in (examples.originals, examples.reconstructions))
    content = ""
    for index, caption in enumerate(examples.captions):
        slider = '<input type="range" value="50" aria-label="share of the original">'
        pair = _image(originals[index], "original") + _image(reconstructions[index], "reconstruction", "over")
        columns = ((f'<div class="pair">{pair}{slider}</div>', _text(caption)),
                   (_image(report.colours[examples.codes[index]], "codes", "map"), "codes"),
                   (_image(maps[index], "bits per code", "map"), f"{np.mean(examples.bits[index]):.2f} bits per code"))
        content += "".join(f"<figure>{picture}<figcaption>{words}</figcaption></figure>" for picture, words in columns)
    return _section("Reconstructions of test images", EXAMPLES.format(top=top), f'<div class="examples">{content}</div>')


def _samples_section(report):
    if report.samples is None:
        return ""
    samples, neighbours = crop(report.samples, report.margin), report.neighbours
    content = ""
    for index, caption in enumerate(report.sample_captions):
        picture = _image(samples[index], "sample")
        if neighbours is not None:
            picture += _image(crop(neighbours[index], report.margin), "nearest training image")
        content += f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>"
    below = "" if neighbours is None else " Below each sample: its nearest training image."
    return _section("Samples", f"Images of no real person, sampled from the prior one by one, by slice position.{below}",
                    f'<div class="samples">{content}</div>')


def head_viewer(head, positions, geometry):
    """A head as HTML: its axial slices under a slider, and beside them both cuts, with a line where the slice lies.

    Args:
        head: uint8 (S, H, W), axial slices from the lowest up.
        positions: their S slice positions.
        geometry: `volumes.SliceGeometry`, for the proportions and the names of the cuts.

    Returns:
        A text without references to anything outside.
    """
    head = head[brain_box(head[np.newaxis], rim=2)[1:]]
    depth, height, width = head.shape
    cuts = ""
    for name, cut in zip(figures.cut_names(geometry), figures.head_cuts(head)):
        ratio = f"{cut.shape[1] * geometry.pixel_size:.1f} / {depth * geometry.spacing:.1f}"
        cuts += f'<div class="cut" style="aspect-ratio: {ratio}">{_image(cut, name)}<i></i></div>'
    # One picture of all slices, of which a window shows one.
    slices = _image(np.concatenate(head), "slices of a sampled head")
    middle = depth // 2
    return (f'<div class="head" data-positions="{list(positions)}" style="--slices: {depth}; --slice: {middle}"><div>'
            f'<div class="slice" style="aspect-ratio: {width} / {height}">{slices}</div>'
            f'<input type="range" min="0" max="{depth - 1}" value="{middle}" aria-label="slice">'
            f"<output>slice {positions[middle]}</output></div><div>{cuts}</div></div>")


def _heads_section(report):
    content = "" if report.heads is None else "".join(head_viewer(head, report.head_positions, report.geometry) for head in report.heads)
    if report.head_table:
        heading, *rows = report.head_table
        rows = [[*map(_text, row), _text(meaning(row[0]))] for row in rows]
        content += _table(rows, [*map(_text, heading), "what it is"])
    text = HEADS.format(names=" and ".join(figures.cut_names(report.geometry)), axes=figures.axes_caption(report.geometry))
    return _section("Heads", text, content) if content else ""


def _codebook_section(report):
    if report.all_codes is None:
        return ""
    file = io.BytesIO()
    figures.code_use_plot(report.all_codes, len(report.colours)).savefig(file, format="png", dpi=figures.DPI)
    return _section("Use of the codebook", "Over all test images.", _embed(file, "use of the codes", "plot"))


EXAMPLES = """Left of the slider: the original; right of it: the reconstruction. Beside them: the codes, coloured so that
similar codes look similar; and the bits that the prior needs for each code, from 0 (black) to {top} (bright), given the
codes before it, the slices below and the person. The mean over all test images, with the bits that the person itself costs,
is the table's bits_per_code. For research only: a surprising region may be medically normal, and an abnormal one may not
surprise the model."""

HEADS = """Sampled slice by slice, from the lowest up. Beside the slices: {names}. {axes} The line shows where the
slice lies."""

# Pictures are 272 pixels wide, and as high as they have to be.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 1140px; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin-bottom: 1rem }} th {{ font-weight: 600 }}
th, td {{ text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0; border-bottom: 1px solid #ddd }}
.notice {{ background: #fff3cd; padding: .5rem 1rem; font-weight: 600 }}
.examples, .samples {{ display: grid; gap: 1rem }} .samples {{ grid-template-columns: repeat(auto-fill, 272px) }}
.examples {{ grid-template-columns: repeat(3, minmax(0, 272px)) }} figure {{ margin: 0 }} figcaption {{ text-align: center; font-size: .85rem }}
figure img, input {{ width: 100%; height: auto; display: block }} .map {{ image-rendering: pixelated }}
.pair {{ position: relative }} .pair .over {{ position: absolute; top: 0; left: 0; clip-path: inset(0 0 0 50%) }}
.head {{ display: flex; flex-wrap: wrap; gap: 1rem; background: #000; color: #ddd; padding: 1rem; margin-bottom: 1rem }}
.head > div {{ flex: 1 1 272px; max-width: 28rem }}
.slice, .cut {{ position: relative; overflow: hidden; margin-bottom: .5rem }} .cut img {{ width: 100%; height: 100% }}
.slice img {{ width: 100%; position: absolute; transform: translateY(calc(-100% * var(--slice) / var(--slices))) }}
.cut i {{ position: absolute; left: 0; right: 0; border-top: 1px solid #fb0;
  top: calc(100% * (1 - (var(--slice) + .5) / var(--slices))) }} .plot {{ max-width: 100% }}
</style></head><body>
<h1>{title}</h1>
{notice}{facts}
{sections}
<script>
document.querySelectorAll(".pair").forEach(pair => pair.querySelector("input").addEventListener("input", event =>
  pair.querySelector(".over").style.clipPath = `inset(0 0 0 ${{event.target.value}}%)`));
document.querySelectorAll(".head").forEach(head => head.querySelector("input").addEventListener("input", event => {{
  head.style.setProperty("--slice", event.target.value);
  head.querySelector("output").textContent = `slice ${{JSON.parse(head.dataset.positions)[event.target.value]}}`;
}}));
</script></body></html>
"""
