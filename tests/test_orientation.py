import numpy as np
import pytest
from scipy import ndimage

from support import orientation, template
from support.images import turn
from support.volumes import SLAB, SliceGeometry

QUARTER_TURNS = {"up": 0, "left": 1, "down": 2, "right": 3}  # anticlockwise


@pytest.fixture(scope="module")
def people():
    """Three simulated people, uint8 (3, 32, 128, 128): front up, 1.4 mm apart from -8 mm on."""
    source = template._load_template(2)
    return np.stack([template.simulate_person(source, np.random.default_rng(case), 128, SLAB.heights(32))
                     for case in range(3)])


def other_organs():
    """Float (32, 128, 128) by name: what is no brain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128] - 63.5
    egg = 150.0 * (np.hypot(y / 1.25, x * (1 + 0.006 * y)) < 38)
    return {"noise": rng.integers(0, 256, (32, 128, 128)).astype(float),
            "egg": np.tile(ndimage.gaussian_filter(egg, 4), (32, 1, 1)), "black": np.zeros((32, 128, 128))}


@pytest.mark.parametrize("front", ("down", "left", "right"))
def test_simulated_people_are_recognised_on_each_side(front, people):
    lying = np.rot90(people.mean(axis=0), QUARTER_TURNS[front], (1, 2))
    match = orientation.match_template(lying, np.arange(32))
    assert match.front == front
    assert match.spacing == pytest.approx(1.4, rel=0.07) and match.lowest == pytest.approx(-8, abs=2)
    assert match.correlation > 0.85 and match.margin > 0.3
    sides = -1 if front == "down" else 1  # then it is a mirror that lets left come to lie on the left
    np.testing.assert_array_equal(turn(lying, front), people.mean(axis=0)[..., ::sides])


@pytest.mark.parametrize("name", ("noise", "egg", "black"))
def test_nothing_is_claimed_of_what_is_no_brain(name):
    images = other_organs()[name].round().clip(0, 255).astype(np.uint8)
    front, geometry, line = orientation.find_geometry(images, np.arange(32))
    assert front is None
    assert geometry == SliceGeometry(pixel_size=2.0, axes_known=False)
    assert line.startswith("No match with the template") and "nothing is turned" in line


def test_the_frame_is_that_of_the_mean_over_people_and_the_spacing_that_of_neighbouring_positions(people):
    """Of every second slice, and of mirrored brains."""
    images, positions = people[:, ::2, ::-1].reshape(-1, 128, 128), np.tile(np.arange(0, 32, 2), 3)
    front, geometry, line = orientation.find_geometry(images, positions)
    assert front == "down" and geometry.pixel_size == 2 and geometry.axes_known
    assert (geometry.spacing, geometry.lowest) == (pytest.approx(1.4, rel=0.07), pytest.approx(-8, abs=2))
    assert line.startswith("Slices lie front-down by the template (correlation 0.")
    assert line.endswith(f": turned; {geometry.spacing:.1f} mm apart, by the template. Which side is left "
                         "cannot be told.")
    assert orientation.match_template(people.mean(axis=0)[:7], np.arange(7)).front is None  # too few


def test_what_is_stated_overrules_the_template(monkeypatch):
    images, positions = np.ones((32, 32, 32), np.uint8), np.arange(32)
    match = orientation.Match("down", 1.1, -6.0, 0.9, 0.4)
    monkeypatch.setattr(orientation, "match_template", lambda *_: match)
    front, geometry, line = orientation.find_geometry(images, positions, spacing=3.0)
    assert (front, geometry) == ("down", SliceGeometry(8.0, 3.0, -6.0))
    assert "3.0 mm apart, as stated" in line
    front, geometry, line = orientation.find_geometry(images, positions, front="left")
    assert (front, geometry) == ("left", SliceGeometry(8.0))
    assert "front-left as stated, though the template fits front-down" in line and "not measured" in line
    match = orientation.Match(None, 1.1, -6.0, 0.1, 0.0)  # which the lambda gives from here on
    front, geometry, line = orientation.find_geometry(images, positions, front="up", spacing=2.0)
    assert (front, geometry) == ("up", SliceGeometry(8.0, 2.0))
    assert line.startswith("Slices lie front-up as stated (") and "; 2.0 mm apart, as stated." in line
    front, geometry, line = orientation.find_geometry(images, positions, spacing=2.0)
    assert (front, geometry) == (None, SliceGeometry(8.0, 2.0, axes_known=False))
    assert line.endswith("nothing is said of the axes; 2.0 mm apart, as stated.")
