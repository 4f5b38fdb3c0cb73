"""The page that support/report.py writes, as a browser would find it."""

import base64
from html.parser import HTMLParser
import io
import math
import re

import numpy as np
from PIL import Image
import pytest

from support import figures, judge, metrics, report
from support.volumes import SliceGeometry

SIZE, MARGIN, GRID = 32, 4, 4


class Page(HTMLParser):
    """A page's tags, the pixels of its pictures by their description, cells of tables, words and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.pictures, self.rows, self.words, self.script = [], [], {}, [], "", ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "img":
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/png;base64"
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            self.pictures.setdefault(attributes["alt"], []).append(picture)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in ("img", "input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.words += data
            if self.open[-1] in ("th", "td"):
                self.rows[-1][-1] += data


BITS = np.zeros((6, GRID, GRID))
BITS[5, 2, 3] = 6.5
HEAD = np.random.default_rng(0).integers(100, 180, (8, 40, 30), np.uint8)
HEAD[:, :3] = HEAD[:, -3:] = HEAD[..., :3] = HEAD[..., -3:] = 0
CODES, WHITE = np.arange(96).reshape(6, 4, 4) % 8, np.ones((6, SIZE, SIZE))
PLAIN = dict(title="A <title>", facts={"run": "one", "data": "<oasis>", "seed": 0, "commit": None}, notice="",
             margin=MARGIN, colours=figures.code_colours(np.arange(8.0)[:, np.newaxis]))
EXAMPLES = report.Examples(WHITE, 0 * WHITE, CODES, BITS, [f"case 7\nslice <{i}>" for i in range(6)])
HEADS = dict(heads=HEAD[np.newaxis], head_positions=range(8), geometry=SliceGeometry(2.0, 3.0))
CONTENT = dict(
    **PLAIN, **HEADS, examples=EXAMPLES,
    metrics={"ssim": 0.91663, "ssim_sd": 0.0083, "num_images": 160, "bits_per_code": 2.5},
    baselines={"mean_image": {"ssim": 0.7}, "blurred_original": {"ssim": 0.95, "psnr": 30.0}},
    samples=np.full((3, SIZE, SIZE), 0.5), sample_positions=np.array([0, 16, 31]),
    head_table=[("", "sampled heads"), ("dark_sd_ratio", "0.8 & more"), ("membership", "")])


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function that writes the report of some content and returns its text."""
    path = tmp_path_factory.mktemp("report") / "report.html"

    def write(**content):
        report.write_report(path, **content)
        return path.read_text("utf-8")

    return write


@pytest.fixture(scope="module")
def text(write):
    return write(**CONTENT)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_page_is_whole_and_needs_no_network(text, page):
    without_pictures = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"(?i)//|url\(|@import|fetch|XMLHttpRequest|import\(", without_pictures)
    assert all(value.startswith("data:") for _, attributes in page.tags for name, value in attributes.items()
               if name in ("src", "href", "srcset", "data", "action"))
    assert {name: len(pictures) for name, pictures in page.pictures.items()} == {
        "original": 4, "reconstruction": 4, "codes": 4, "0.00 bits per code": 3, "0.41 bits per code": 1,
        "sample": 3, "slice": 1, "coronal cut": 1, "sagittal cut": 1}
    assert all(words in page.words for words in ("A <title>", "case 7, slice <5>", "<oasis>", "0.8 & more"))
    assert page.rows[:3] == [["run", "one"], ["data", "<oasis>"], ["seed", "0"]]


def test_sections_come_in_order_and_those_without_content_are_left_out(write, text):
    headings = re.compile("<h2>(.*?)</h2>")
    assert headings.findall(text) == ["Sampled heads: slab of 24 mm", "Reconstruction", "Codes and bits",
                                      "Reconstructions", "Samples", "Next"]
    assert headings.findall(write(**PLAIN)) == []
    # The page of given images: nothing in it was sampled, and what slices of unknown place cost is not known.
    given = write(**PLAIN, examples=EXAMPLES._replace(bits=None), heads=HEAD[np.newaxis],
                  head_positions=range(8), geometry=SliceGeometry(2.0, 15.0))
    assert headings.findall(given) == ["Reconstructed heads: whole brain", "Reconstructions"]
    assert "sampled" not in Page(given).words and not re.search(r"\bbits\b", Page(given).words)


def test_figures_stand_in_groups_with_their_spread_baselines_and_meaning(page):
    heading = ["figure", "value", "mean image", "blurred original", "what it is"]
    short = ["figure", "value", "what it is"]
    assert [row for row in page.rows if row[0] == "figure"] == [heading, short]
    assert ["ssim", "0.9166 ± 0.0083", "0.7", "0.95", report.MEANINGS["Reconstruction"]["ssim"]] in page.rows
    assert ["dark_sd_ratio", "0.8 & more", judge.ROWS["dark_sd_ratio"]] in page.rows
    assert "ssim_sd" not in [row[0] for row in page.rows]  # it stands beside its figure
    # Every figure that is measured has a meaning.
    names = {name for meanings in report.MEANINGS.values() for name in meanings}
    assert names == {*metrics.QUALITY, "num_images", "bits_per_code", "bits_per_code_alone",
                     "bytes_per_image", *metrics.code_metrics(np.arange(4), 4)}


@pytest.mark.parametrize("changes, words", (
    ({"title": "run_\udcff", "facts": {"run": "\udcff"}}, "run_\\udcff"),  # a folder's name that is no text
    ({"metrics": {"ssim": float("nan"), "ssim_sd": float("inf"), "psnr": None}}, "None"),
    ({"heads": np.zeros((1, 1, 8, 8), np.uint8), "head_positions": [3]}, "slab of 3 mm"),  # black, one slice
    ({"notice": "Simulated <people>"}, "Simulated <people>"),
    ({"samples": np.full((1, SIZE, SIZE), np.nan), "sample_positions": [0]}, "slice 0"),
    ({"examples": EXAMPLES._replace(bits=np.where(CODES == 0, np.inf, BITS))}, "from 0  to 7.")))
def test_odd_input_gives_a_page(write, changes, words):
    with np.errstate(invalid="ignore"):
        assert words in Page(write(**{**CONTENT, **changes})).words


def test_page_shows_what_it_was_given(text, page):
    originals, reconstructions, codes, (first, *_), (last,) = (page.pictures[name] for name in (
        "original", "reconstruction", "codes", "0.00 bits per code", "0.41 bits per code"))  # 6.5 / 16
    assert originals[0].shape == (SIZE - 2 * MARGIN,) * 2 and (originals[0] == 255).all()  # the margin is off
    assert (reconstructions[1] == 0).all()
    np.testing.assert_array_equal(codes[0][0, 0], codes[1][2, 0])  # code 0 in both
    assert (first == first[0, 0]).all() and last[2, 3].sum() > 400
    assert (np.delete(last.reshape(16, 3), 11, axis=0) == first[0, 0]).all()
    assert "from 0  to 7." in page.words
    # Code maps keep their squares, and an example's pictures stay in one row, however narrow the page.
    assert sum(attributes.get("class") == "map" for _, attributes in page.tags) == 8
    assert ".map { image-rendering: pixelated }" in text and "columns: repeat(3, minmax(0, 272px))" in text


def test_a_head_is_scrolled_in_three_planes_in_millimetres(text, page):
    cropped = HEAD[:, 1:-1, 1:-1]
    expected = {"slice": cropped, "coronal cut": cropped[::-1].transpose(1, 0, 2),
                "sagittal cut": cropped[::-1].transpose(2, 0, 1)}
    for name, cuts in expected.items():
        sheet, side = page.pictures[name][0], math.ceil(math.sqrt(len(cuts)))
        assert sheet.shape == (side * cuts.shape[1], side * cuts.shape[2])
        for index, cut in enumerate(cuts):  # as the page's script counts them
            top, left = index // side * cut.shape[0], index % side * cut.shape[1]
            np.testing.assert_array_equal(sheet[top:top + cut.shape[0], left:left + cut.shape[1]], cut)
    # 38 x 28 pixels of 2 mm, 8 slices 3 mm apart
    assert re.findall("aspect-ratio: ([^\"]+)\"", text) == ["56.0 / 76.0", "56.0 / 24.0", "76.0 / 24.0"]
    assert re.findall("flex: ([0-9.]+);", text) == ["56.0", "56.0", "76.0"]
    assert [attributes["max"] for tag, attributes in page.tags if "max" in attributes] == ["7", "37", "27"]
    assert 'data-positions="[0, 1, 2, 3, 4, 5, 6, 7]"' in text
    assert all(words in page.script for words in ("--across", "{grid, row, column}", "--share-"))


def test_front_is_claimed_only_where_it_is_known(write, page):
    known = "Front is up; in sagittal cuts, front is on the left. Left and right are unknown."
    assert known in page.words
    unknown = Page(write(**{**CONTENT, "geometry": SliceGeometry(axes_known=False)}))
    assert "Which way is front was not told. Left and right are unknown." in unknown.words
    assert "cut along rows" in unknown.pictures
    assert not re.search("(?i)front is up|sagittal|coronal", unknown.words)
