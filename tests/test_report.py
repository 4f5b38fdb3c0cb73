"""The page that support/report.py writes, as a browser would find it."""

import base64
from html.parser import HTMLParser
import io
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


BITS = np.zeros((2, GRID, GRID))
BITS[1, 2, 3] = 6.5
HEAD = np.zeros((8, 40, 30), np.uint8)
HEAD[:, 3:-3, 3:-3] = np.arange(100, 180, 10)[:, np.newaxis, np.newaxis]
CODES, WHITE = np.arange(32).reshape(2, 4, 4) % 8, np.ones((2, SIZE, SIZE))
CONTENT = dict(
    title="A <title>", facts={"run": "one", "data": "<oasis>", "seed": 0, "commit": None}, notice="",
    margin=MARGIN, colours=figures.code_colours(np.arange(8.0)[:, np.newaxis]), codes=CODES,
    examples=report.Examples(WHITE, 0 * WHITE, CODES, BITS, ["slice <3>", "slice 9"]),
    metrics={"ssim": 0.91663, "ssim_sd": 0.0083, "num_images": 160, "bits_per_code": 2.5, "strange": 0.5},
    samples=np.full((3, SIZE, SIZE), 0.5), sample_positions=np.array([0, 16, 31]), heads=HEAD[np.newaxis],
    head_positions=range(8), geometry=SliceGeometry(pixel_size=2.0, spacing=3.0),
    head_table=[("", "sampled heads"), ("dark_sd_ratio", "0.8 & more"), ("membership", "")])


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function that writes the report, with some changes, and returns its text."""
    path = tmp_path_factory.mktemp("report") / "report.html"

    def write(**changes):
        report.write_report(path, **{**CONTENT, **changes})
        return path.read_text("utf-8")

    return write


@pytest.fixture(scope="module")
def text(write):
    return write()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_page_is_whole_and_needs_no_network(text, page):
    without_pictures = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"(?i)//|url\(|@import|fetch|XMLHttpRequest|import\(", without_pictures)
    assert all(value.startswith("data:") for _, attributes in page.tags for name, value in attributes.items()
               if name in ("src", "href", "srcset", "data", "action"))
    assert {name: len(pictures) for name, pictures in page.pictures.items()} == {
        "original": 2, "reconstruction": 2, "codes": 2, "bits per code": 2, "sample": 3, "coronal cut": 1,
        "slices of a sampled head": 1, "sagittal cut": 1, "use of the codes": 1}
    assert all(words in page.words for words in ("A <title>", "slice <3>", "<oasis>", "0.8 & more"))
    assert page.rows[:3] == [["run", "one"], ["data", "<oasis>"], ["seed", "0"]]


def test_figures_stand_in_groups_with_their_spread_and_meaning(page):
    assert ["ssim", "0.917 ± 0.008", "structural similarity, 7x7 window, 1 is equal"] in page.rows
    assert ["dark_sd_ratio", "0.8 & more", judge.ROWS["dark_sd_ratio"]] in page.rows
    assert ["strange", "0.5", ""] in page.rows
    assert "ssim_sd" not in [row[0] for row in page.rows]  # it stands beside its figure
    words = "Reconstruction", "ssim", "Codes and bits", "bits_per_code", "Other figures", "strange"
    order = [page.words.index(word) for word in words]
    assert order == sorted(order)
    # Every figure that is measured has a meaning.
    names = {name for meanings in report.MEANINGS.values() for name in meanings}
    assert names == {*metrics.QUALITY, "num_images", "bits_per_code", "bits_per_code_alone",
                     "bytes_per_image", *metrics.code_metrics(np.arange(4), 4)}


@pytest.mark.parametrize("changes, words", (
    ({"title": "run_\udcff", "facts": {"run": "\udcff"}}, "run_\\udcff"),  # a folder's name that is no text
    ({"metrics": {"ssim": float("nan"), "ssim_sd": float("inf"), "psnr": None, "list": [1, 2]}}, "[1, 2]"),
    ({"heads": np.zeros((1, 1, 8, 8), np.uint8), "head_positions": [3]}, "slice 3"),  # black, a single slice
    ({"notice": "Simulated <people>"}, "Simulated <people>"),
    ({"samples": np.full((1, SIZE, SIZE), np.nan), "sample_positions": [0]}, "slice 0"),
    ({"examples": CONTENT["examples"]._replace(bits=np.where(CODES == 0, np.inf, BITS))}, "to 7 (bright)")))
def test_odd_input_gives_a_page(write, changes, words):
    with np.errstate(invalid="ignore"):
        assert words in Page(write(**changes)).words


@pytest.mark.parametrize("value, spread, expected", (
    (0.91663, 0.0083, "0.917 ± 0.008"), (0.91663, 0.0113, "0.917 ± 0.011"), (31.244, 0.82, "31.2 ± 0.8"),
    (321.4, 12.3, "321 ± 12"), (0.91663, 0.0, "0.9166"), (0.91663, float("nan"), "0.9166"),
    (0.91663, None, "0.9166"), (160, None, "160"), ("none", None, "none")))
def test_spread_gives_the_digits(value, spread, expected):
    assert report.with_spread(value, spread) == expected


def test_page_shows_what_it_was_given(page):
    originals, reconstructions, codes, (first, second) = (
        page.pictures[name] for name in ("original", "reconstruction", "codes", "bits per code"))
    assert originals[0].shape == (SIZE - 2 * MARGIN,) * 2 and (originals[0] == 255).all()  # the margin is off
    assert (reconstructions[1] == 0).all()
    np.testing.assert_array_equal(codes[0][0, 0], codes[1][2, 0])  # code 0 in both
    assert (first == first[0, 0]).all() and second[2, 3].sum() > 400
    assert (np.delete(second.reshape(16, 3), 11, axis=0) == first[0, 0]).all()
    assert "0.41 bits per code" in page.words and "from 0 (black) to 7 (bright)" in page.words  # 6.5 / 16


def test_sliders_move_and_pictures_are_wide_enough_and_code_maps_keep_their_squares(text, page):
    assert sum(tag == "input" and attributes["type"] == "range" for tag, attributes in page.tags) == 2 + 1
    assert sum("over" in attributes.get("class", "") for tag, attributes in page.tags) == 2
    words = '".pair"', '".head"', '"input"', '".over"', "clipPath", '"--slice"', '"output"'
    assert all(word in page.script for word in words)
    sides = [int(side) for side in re.findall(r"(\d+)px\)|1 1 (\d+)px", text) for side in side if side]
    assert len(sides) == 3 and min(sides) >= 256
    # An example's pictures stay in one row, however narrow the page.
    assert ".examples { grid-template-columns: repeat(3, minmax(0, " in text
    assert "figure img, input { width: 100%; height: auto;" in text
    assert sum(attributes.get("class") == "map" for _, attributes in page.tags) == 4
    assert re.search(r"\.map \{ image-rendering: pixelated \}", text)


def test_heads_are_shown_slice_by_slice_in_millimetres(text, page):
    assert 'max="7" value="4"' in text and "slice 4" in page.words
    cropped = HEAD[:, 1:-1, 1:-1]
    slices = page.pictures["slices of a sampled head"][0].reshape(cropped.shape)
    np.testing.assert_array_equal(slices, cropped)
    for name, cut in zip(("coronal cut", "sagittal cut"), figures.head_cuts(cropped)):
        np.testing.assert_array_equal(page.pictures[name][0], cut)
    # 38 x 28 pixels of 2 mm, 8 slices 3 mm apart
    assert re.findall("aspect-ratio: ([^\"]+)\"", text) == ["28 / 38", "56.0 / 24.0", "76.0 / 24.0"]


def test_front_is_claimed_only_where_it_is_known(write, page):
    known = "Front is up; in sagittal cuts, front is on the left. Left and right are unknown."
    assert known in page.words
    unknown = Page(write(geometry=SliceGeometry(axes_known=False)))
    assert "Which way is front was not told. Left and right are unknown." in unknown.words
    assert "cut along rows" in unknown.pictures
    assert not re.search("(?i)front is up|sagittal|coronal", unknown.words)


def test_sections_without_content_are_left_out(write, text):
    headings = re.compile("<h2>(.*?)</h2>")
    no_data = dict(metrics=None, examples=None, codes=None, head_table=[])
    assert headings.findall(text) == ["What was measured", "Reconstructions of test images", "Samples",
                                      "Heads", "Use of the codebook"]
    assert headings.findall(write(**no_data)) == ["Samples", "Heads"]
    assert headings.findall(write(**no_data, heads=[], samples=np.zeros((0, SIZE, SIZE)))) == []
