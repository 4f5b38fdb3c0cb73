"""The page that support/report.py writes, as a browser would find it."""

import base64
import io
import math
import re
from xml.etree import ElementTree

import numpy as np
from PIL import Image
import pytest

from support import figures, judge, metrics, report
from support.volumes import SliceGeometry

SIZE, MARGIN, GRID = 32, 4, 4


class Page:
    """A page's elements, pixels of its pictures by their description, cells of tables, words and script."""

    def __init__(self, text):
        # But for its first line and for tags that HTML does not close, the page is XML.
        xml = re.sub("<((?:img|input|meta) [^>]*)>", r"<\1/>", text.removeprefix("<!doctype html>\n"))
        root = ElementTree.fromstring(xml)
        self.elements, self.pictures = list(root.iter()), {}
        self.script = root.findtext(".//script")
        self.words = "".join(root.find("body").itertext()).replace(self.script, "")
        self.rows = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
        for image in root.iter("img"):
            kind, data = image.get("src").split(",")
            assert kind == "data:image/png;base64"
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            self.pictures.setdefault(image.get("alt"), []).append(picture)


BITS = np.zeros((4, GRID, GRID))
BITS[3, 2, 3] = 6.5
HEAD = np.random.default_rng(0).integers(100, 180, (8, 40, 30), np.uint8)
HEAD[:, :3] = HEAD[:, -3:] = HEAD[..., :3] = HEAD[..., -3:] = 0
CODES, WHITE = np.arange(64).reshape(4, 4, 4) % 8, np.ones((4, SIZE, SIZE))
PLAIN = dict(title="A <title>", facts={"run": "one", "data": "<oasis>", "seed": 0, "commit": None}, notice="",
             margin=MARGIN, colours=figures.code_colours(np.arange(8.0)[:, np.newaxis]))
EXAMPLES = report.Examples(WHITE, 0 * WHITE, CODES, BITS, [f"case 7\nslice <{i}>" for i in range(4)])
HEADS = dict(heads=HEAD[np.newaxis], head_positions=range(8), geometry=SliceGeometry(2.0, 3.0))
CONTENT = dict(
    **PLAIN, **HEADS, examples=EXAMPLES,
    metrics={"ssim": 0.91663, "ssim_sd": 0.0083, "num_images": 10_880, "bits_per_code": 2.5},
    baselines={"mean_image": {"ssim": 0.67, "num_images": 10_880}, "blurred_original": {"ssim": 0.94567}},
    samples=np.full((3, SIZE, SIZE), 0.5), sample_positions=np.array([0, 16, 31]),
    head_table=[("", "sampled heads"), ("dark_sd_ratio", "0.8 & more"), ("membership", "")])


@pytest.fixture
def write(tmp_path):
    """A function that writes the report of some content and returns its text."""
    def write(**content):
        report.write_report(tmp_path / "report.html", **content)
        return (tmp_path / "report.html").read_text("utf-8")
    return write


@pytest.fixture
def text(write):
    return write(**CONTENT)


@pytest.fixture
def page(text):
    return Page(text)


def test_page_is_whole_and_needs_no_network(text, page):
    without_pictures = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"(?i)//|url\(|@import|fetch|XMLHttpRequest|import\(", without_pictures)
    assert all(value.startswith("data:") for element in page.elements for name, value in element.items()
               if name in ("src", "href", "srcset", "data", "action"))
    assert {name: len(pictures) for name, pictures in page.pictures.items()} == {
        "original": 4, "reconstruction": 4, "codes": 4, "bits": 4,
        "sample": 3, "slice": 1, "coronal cut": 1, "sagittal cut": 1}
    assert all(words in page.words for words in ("A <title>", "case 7, slice <3>", "<oasis>", "0.8 & more"))
    assert page.rows[:3] == [["run", "one"], ["data", "<oasis>"], ["seed", "0"]]


def test_sections_come_in_order_and_those_without_content_are_left_out(write, text):
    headings = re.compile("<h2>(.*?)</h2>")
    assert headings.findall(text) == ["Sampled heads: slab of 24 mm", "Measured on the test people",
                                      "Reconstructions", "Samples", "What next"]
    assert headings.findall(write(**PLAIN)) == []
    # The page of given images: nothing in it was sampled, and what slices of unknown place cost is not known.
    given = write(**PLAIN, examples=EXAMPLES._replace(bits=None), heads=HEAD[np.newaxis],
                  head_positions=range(8), geometry=SliceGeometry(2.0, 15.0))
    assert headings.findall(given) == ["Reconstructed heads: whole brain", "Reconstructions"]
    assert "sampled" not in Page(given).words and not re.search(r"\bbits\b", Page(given).words)


def test_figures_stand_with_their_spread_yardsticks_and_meaning(page, write):
    names = {name: label for name, (label, _) in report.MEANINGS.items()}
    start = page.rows.index(["figure", "this run", "original, blurred", "mean training image", "what it is"])
    assert [row[:-1] for row in page.rows[start + 1:start + 4]] == [
        ["SSIM", "0.9166 ± 0.0083", "0.9457", "0.67"], [names["num_images"], "10,880", "–", "10,880"],
        [names["bits_per_code"], "2.5", "–", "–"]]
    assert ["figure", "sampled heads", "what it is"] in page.rows
    assert ["dark sd ratio", "0.8 & more", judge.ROWS["dark_sd_ratio"]] in page.rows
    assert ["figure", "this run", "what it is"] in Page(write(**{**CONTENT, "baselines": None})).rows
    # Every figure that is measured has a meaning.
    assert report.MEANINGS.keys() >= {*metrics.QUALITY, *metrics.code_metrics(np.arange(4), 4)}


@pytest.mark.parametrize("changes, words", (
    ({"title": "run_\udcff", "facts": {"run": "\udcff"}}, "run_\\udcff"),  # a folder's name that is no text
    ({"heads": np.zeros((1, 1, 8, 8), np.uint8), "head_positions": [3]}, "slab of 3 mm"),  # black, one slice
    ({"notice": "Simulated <people>"}, "Simulated <people>"),
    ({"geometry": SliceGeometry(axes_known=False)}, "Which way is front was not told. Left and right are")))
def test_odd_input_gives_a_page(write, changes, words):
    assert words in Page(write(**{**CONTENT, **changes})).words


def test_page_shows_what_it_was_given(page):
    originals, reconstructions, codes, (first, *_, last) = (page.pictures[name] for name in (
        "original", "reconstruction", "codes", "bits"))
    assert originals[0].shape == (SIZE - 2 * MARGIN,) * 2 and (originals[0] == 255).all()  # the margin is off
    assert (reconstructions[1] == 0).all()
    np.testing.assert_array_equal(codes[0][0, 0], codes[1][2, 0])  # code 0 in both
    assert (first == first[0, 0]).all() and last[2, 3].sum() > 400
    assert (np.delete(last.reshape(16, 3), 11, axis=0) == first[0, 0]).all()
    assert re.search(r"\b0\s+7 bits", page.words) and "mean: 0.41 bits per code" in page.words  # 6.5 / 16


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
    assert [element.get("max") for element in page.elements if element.get("max")] == ["7", "37", "27"]
    assert 'data-positions="[0, 1, 2, 3, 4, 5, 6, 7]"' in text

