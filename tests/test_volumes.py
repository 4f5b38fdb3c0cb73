"""Heads out of volumes, and back: which slices, and at which heights."""

import functools
import gzip

import nibabel
import numpy as np
import pytest
from scipy import ndimage, spatial
from skimage.transform import downscale_local_mean

from support import volumes
from support.volumes import SliceGeometry, VolumeError, WHOLE_BRAIN

SHAPE = 60, 80, 120  # x, y, z in mm, RAS
TOP = 109  # the highest slice of the head
STACKS = {"slab": volumes.STACKS[False], "whole brain": volumes.STACKS[True]}


def axial_slices(volume, stack="slab", center=(0, 0)):
    """The slices that are cut of a volume of 1 mm."""
    image = nibabel.Nifti1Image(np.float32(volume), np.eye(4))
    return volumes.axial_slices(image, *STACKS[stack], center).slices


def head(seed=0):
    """A block that says where it is: brighter to the right (x), the front (y) and upwards (z); int16 RAS."""
    x, y, z = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    volume = 300 + 4 * x + 2 * y + z + 10 * seed
    volume[:5], volume[-5:], volume[:, :5], volume[:, -5:] = 0, 0, 0, 0
    volume[..., TOP + 1:] = 0
    return volume.astype(np.int16)


def expected_slices(volume):
    """The same by hand: plane by plane, transposed and turned so that the front is up."""
    volume = volume.astype(float)
    low = np.percentile(volume, 1)
    high = np.percentile(volume[volume > low], 99.5)
    planes = np.zeros((32, 256, 256))
    for position, plane in enumerate(planes):
        plane[88:168, 98:158] = volume[:, ::-1, round(TOP - 86 + 1.4 * position)].T  # in the middle
    return np.round(np.clip((planes - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def test_a_head_may_end_86_mm_below_its_top_and_no_higher():
    short = axial_slices(head()[..., TOP - 86:])
    assert np.abs(short - axial_slices(head()).astype(int)).max() <= 2  # its percentiles are others
    with pytest.raises(VolumeError, match="head in 2 of 32 slices, from 86 to 43 mm below the head's top"):
        axial_slices(head()[..., TOP - 83:])


@pytest.mark.parametrize("axis", (0, 1))
def test_the_head_is_brought_to_the_middle_wherever_it_lies(axis):
    volume, widths = head(), [(0, 0)] * 3
    widths[axis] = (120, 101)
    wide = np.pad(volume, widths)
    np.testing.assert_array_equal(axial_slices(wide), axial_slices(volume))
    np.testing.assert_array_equal(axial_slices(volume, center=(9, -6)),
                                  np.roll(axial_slices(volume), (9, -6), axis=(1, 2)))
    start = (wide.shape[axis] - 256) // 2  # or left where it lies
    np.testing.assert_array_equal(axial_slices(wide, center=None) > 0,
                                  axial_slices(wide.take(range(start, start + 256), axis), center=None) > 0)


# Where the head is ------------------------------------------------------------------------------------------

HALF_AXES = np.array([32, 40, 70])  # mm, of a rounded box about the origin: its top lies at z = 70
MARK = np.array([12, 20, 5])  # mm; slice k lies at z = 70 - 86 + 1.4 k, the mark therefore in slice 15
UPRIGHT = 80, 96, 160  # voxels of 1 mm


def centred(shape, axes):
    """An affine of these axes (3, 3) with the origin in the middle of the volume."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def draw_phantom(shape, affine):
    """A textured, rounded box with a bright ball at `MARK`, float32."""
    voxels = np.indices(shape, np.float32).reshape(3, -1)
    x, y, z = (np.float32(affine[:3, :3]) @ voxels + np.float32(affine[:3, 3:])).reshape(3, *shape)
    radius = ((x / HALF_AXES[0]) ** 4 + (y / HALF_AXES[1]) ** 4 + (z / HALF_AXES[2]) ** 4) ** 0.25
    mark = np.exp(-((x - MARK[0]) ** 2 + (y - MARK[1]) ** 2 + (z - MARK[2]) ** 2) / 50)
    tissue = 250 + 15 * np.cos(x / 9) * np.cos(y / 8 + z / 20) + 600 * mark
    return tissue * ((1 - radius) * 60 + 0.5).clip(0, 1)


AFFINE = centred(UPRIGHT, np.eye(3))
drawn_once = functools.cache(lambda: draw_phantom(UPRIGHT, AFFINE))


def phantom():
    """A fresh copy of the phantom at 1 mm, whose affine is `AFFINE`."""
    return drawn_once().copy()


def save(path, volume, affine):
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    return path


def read(folder, volume, affine=AFFINE):
    """The slices that `read_slices` gives of a volume that is saved as NIfTI."""
    return volumes.read_slices(save(folder / "a.nii", volume, affine)).slices


def marked(slices):
    """Where the mark lies: (slice, mm to the right, mm to the front), its centre of mass."""
    smooth = ndimage.gaussian_filter(slices.astype(np.float32), (1, 2, 2))
    labels, count = ndimage.label(smooth > 0.95 * smooth.max())
    largest = 1 + np.argmax(ndimage.sum_labels(labels > 0, labels, range(1, count + 1)))
    position, row, column = ndimage.center_of_mass(smooth, labels, largest)
    return position, column - 127.5, 127.5 - row


EXPECTED = pytest.approx((15, 12, 20), abs=2)


def test_a_head_that_is_cut_off_or_wider_than_the_slices_is_refused():
    with pytest.raises(VolumeError, match="is cut off below the top of the head"):
        axial_slices(phantom()[..., :UPRIGHT[2] // 2 + 20])
    for axis in (0, 1):
        with pytest.raises(VolumeError, match="a head of more than 256 mm across"):
            axial_slices(np.repeat(phantom()[::1 + axis, ::2 - axis], 5, axis))


def spoil(kind):
    """The phantom as a scanner may show it."""
    rng, volume = np.random.default_rng(0), phantom()
    if kind == "skull":  # it parts the scalp, which is the top, from the brain
        voxels = np.indices(UPRIGHT).T @ AFFINE[:3, :3] + AFFINE[:3, 3]
        radius = (np.abs(voxels / HALF_AXES) ** 4).sum(axis=-1).T ** 0.25
        volume[(radius > 0.74) & (radius < 0.88)] = 0
        assert ndimage.label(volume > 100)[1] == 2
        return volume
    if kind == "wrap-around":
        volume[20:60, 20:80, -6:] = 250 + 5 * np.arange(6)  # the neck, above a gap of 4 mm
    ratio = {"signal-to-noise 8": 8, "zeros in the corners": 5}.get(kind, 100)
    noise = rng.normal(0, 250 / ratio, (2, *volume.shape))
    volume = np.hypot(volume + noise[0], noise[1]).astype(np.float32)
    if kind == "zeros in the corners":  # as a correction may leave them
        x, y, z = np.ogrid[tuple(slice(-1, 1, 1j * length) for length in volume.shape)]
        volume[np.abs(x) + np.abs(y) + z > 2.15] = 0
    return volume


@pytest.mark.parametrize("kind", ("signal-to-noise 8", "zeros in the corners", "wrap-around", "skull"))
def test_what_lies_above_the_head_does_not_move_the_slices(kind):
    assert marked(axial_slices(spoil(kind))) == EXPECTED


@pytest.mark.parametrize("kind", ("noise", "MP2RAGE"))
def test_what_does_not_stand_out_from_its_noise_is_no_head(kind):
    rng, volume = np.random.default_rng(0), phantom()
    noise = rng.uniform(0, 4095, UPRIGHT)  # in MP2RAGE as bright as tissue on average
    if kind == "MP2RAGE":
        noise = np.where(volume > 100, volume * 6 + rng.normal(0, 100, UPRIGHT), noise)
    with pytest.raises(VolumeError, match="shows no head .nothing stands out from its noise"):
        axial_slices(noise)


def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path):
    save(tmp_path / "a.nii", phantom(), np.diag([1000, 1000, 1000, 1]))
    with pytest.raises(VolumeError, match="is 79001 x 95001 x 159001 mm large by its header; correct"):
        volumes.read_slices(tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[40:48] = np.array([3, 32767, 32767, 32767], "<i2").tobytes()  # dim
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match="has 32767 x 32767 x 32767 voxels by its header, none or too many"):
        volumes.read_slices(tmp_path / "a.nii")


def test_what_is_no_number_outside_of_the_head_is_background(tmp_path):
    upright = read(tmp_path, phantom())
    assert marked(upright) == pytest.approx((15, 12, 20), abs=0.5)
    for number in (np.nan, -np.inf):
        np.testing.assert_array_equal(read(tmp_path, np.where(phantom() == 0, number, phantom())), upright)


def test_every_kind_of_file_gives_the_same_slices(tmp_path):
    volume = np.round(phantom()).astype(np.int16)
    expected = read(tmp_path, volume)
    nibabel.save(nibabel.Nifti1Pair(volume, AFFINE), tmp_path / "pair.hdr")
    nibabel.save(nibabel.MGHImage(volume.astype(np.int32), AFFINE), tmp_path / "a.mgz")
    nibabel.save(nibabel.Nifti2Image(volume, AFFINE), tmp_path / "two.nii")
    (tmp_path / "A.NII.GZ").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes(), 1))
    for name in ("pair.hdr", "pair.img", "a.mgz", "two.nii", "A.NII.GZ"):
        np.testing.assert_array_equal(volumes.read_slices(tmp_path / name).slices, expected, err_msg=name)


PIXELS = np.random.default_rng(0).integers(0, 99, (8, 9, 10)).astype(np.int16)
UNUSABLE = {  # an array, or what becomes of the bytes of a whole file
    "holds colours .RGB. or complex numbers; give a gray": np.zeros((8, 9, 10), [(c, "u1") for c in "RGB"]),
    "has 4 dimensions .4 x 4 x 4 x 2., not 3; give one": np.ones((4, 4, 4, 2), np.float32),
    "is DICOM; .*dcm2niix": lambda content: bytes(128) + b"DICM" + bytes(100),
    "cannot be read": lambda content: content[:500],
    "has no usable affine": lambda content: content[:280] + bytes(16) + content[296:],  # srow_x
    "has no usable affine: ": lambda content: content[:252] + bytes(4) + content[256:],  # both codes of axes
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_files_that_cannot_be_used_say_why_in_one_sentence(tmp_path, reason):
    kind, path = UNUSABLE[reason], tmp_path / "odd.nii"
    save(path, PIXELS if callable(kind) else kind, np.eye(4))
    if callable(kind):
        path.write_bytes(kind(path.read_bytes()))
    with pytest.raises(VolumeError, match=f"^{reason}") as refusal:
        volumes.read_slices(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("geometry", (SliceGeometry(), SliceGeometry(2.0, 1.0, -30.0, axes_known=False)))
def test_heads_are_written_with_their_frame_and_read_back_to_the_bit(tmp_path, geometry):
    slices = np.random.default_rng(0).integers(0, 256, (50, 40, 40), np.uint8)
    volumes.write_nifti_heads(slices[np.newaxis], range(50), geometry, tmp_path)
    image = nibabel.load(tmp_path / "head_000.nii.gz")
    size, spacing, lowest = geometry.pixel_size, geometry.spacing, geometry.lowest
    assert image.header.get_zooms() == pytest.approx((size, size, spacing))
    for affine, code in (image.get_qform(coded=True), image.get_sform(coded=True)):
        assert code > 0
        # The middle of a slice lies above the origin, the first slice at the height of the geometry.
        np.testing.assert_allclose(affine @ [19.5, 19.5, 0, 1], (0, 0, lowest, 1), atol=1e-5)
        np.testing.assert_allclose(affine @ [20.5, 19.5, 1, 1], (size, 0, lowest + spacing, 1), atol=1e-5)
    description = image.header["descrip"].item().decode()
    assert ("a convention, left and right are unknown" in description) == geometry.axes_known
    turned = image.as_reoriented(nibabel.orientations.axcodes2ornt("LPS"))  # as other software may store it
    nibabel.save(turned, tmp_path / "turned.nii")
    for name in ("head_000.nii.gz", "turned.nii"):
        again = volumes.read_slices(tmp_path / name)
        assert again.slices.dtype == np.uint8 and again.geometry == geometry
        np.testing.assert_array_equal(again.slices, slices)
        volumes.write_in_input_frame(again, slices / 255, tmp_path / "back.nii")
        back, given = (nibabel.load(tmp_path / file) for file in ("back.nii", name))
        np.testing.assert_allclose(back.get_fdata(), given.get_fdata(), atol=1e-3)


@pytest.mark.parametrize("positions", ([0, 1, 2, 10, 11, 12], [3, 6, 9], [5]))
def test_each_slice_lies_at_its_height_whatever_positions_there_are(tmp_path, positions):
    heads = np.random.default_rng(0).integers(1, 256, (2, len(positions), 8, 8), np.uint8)
    volumes.write_nifti_heads(heads, positions, SliceGeometry(2.0, 1.5, -8.0), tmp_path)
    for number, slices in enumerate(heads):
        image = nibabel.load(tmp_path / f"head_{number:03d}.nii.gz")
        volume = np.asarray(image.dataobj)
        drawn = np.flatnonzero(volume.any(axis=(0, 1)))
        heights = image.affine[2, 3] + image.affine[2, 2] * drawn
        np.testing.assert_allclose(heights, -8.0 + 1.5 * np.array(positions), atol=1e-3)
        np.testing.assert_array_equal(volume[..., drawn].transpose(2, 1, 0)[:, ::-1], slices)


def test_only_heads_of_ours_are_taken_as_they_are(tmp_path):
    image = nibabel.Nifti1Image(phantom(), AFFINE)
    image.header["descrip"] = volumes.OUR_HEAD + "resampled by other software, which kept the description"
    nibabel.save(image, tmp_path / "a.nii")
    assert marked(volumes.read_slices(tmp_path / "a.nii").slices) == EXPECTED


# Whole brains, and the way back -----------------------------------------------------------------------------

TURNED = spatial.transform.Rotation.from_euler("xyz", (12, -8, 20), degrees=True).as_matrix()
VOXELS = {"upright": (np.eye(3), (110, 130, 170), (20, -11, 5)),  # axes, voxels, shift of the head in mm
          "oblique, of other voxels, right to left": (TURNED @ np.diag([-0.8, 1.2, 1.5]), (170, 140, 130),
                                                      (7, -9, 4))}


@functools.cache
def scan(kind):
    """The phantom as int16, of another scale and with a background of 40 or 0, and its affine."""
    axes, shape, shift = VOXELS[kind]
    affine = centred(shape, axes)
    affine[:3, 3] -= shift
    drawn = draw_phantom(shape, affine)
    affine[:3, 3] += shift
    return np.round(40 * (kind == "upright") + 3 * drawn).astype(np.int16), affine


@pytest.mark.parametrize("kind", VOXELS)
def test_a_whole_brain_is_cut_at_its_heights_wherever_and_however_it_lies(tmp_path, kind):
    found = volumes.read_slices(save(tmp_path / "a.nii", *scan(kind)), *STACKS["whole brain"])
    assert found.slices.shape == (74, 128, 128) and found.geometry == WHOLE_BRAIN
    # The commissure lies 78 mm below the top, at z = -8; row 0 is the front.
    grid = np.diag([2.0, -2, 2, 1])
    grid[:3, 3] = -127, 127, WHOLE_BRAIN.lowest - 8
    expected = draw_phantom((128, 128, 74), grid).transpose(2, 1, 0)
    assert np.corrcoef(found.slices.ravel(), expected.ravel())[0, 1] > 0.985


@pytest.mark.parametrize("kind, stack", list(zip(VOXELS, ("whole brain", "slab"))))
def test_slices_written_back_lie_on_the_volume_in_its_own_levels(tmp_path, kind, stack):
    volume, affine = scan(kind)
    cut = volumes.read_slices(save(tmp_path / "a.nii", volume, affine), *STACKS[stack])
    heights = np.indices(volume.shape).T @ affine[2, :3] + affine[2, 3]
    ends = HALF_AXES[2] + VOXELS[kind][2][2] - 78 + STACKS[stack][0].heights(STACKS[stack][1])[[0, -1]]
    inside = ((heights > ends[0]) & (heights < ends[1])).T
    outside = ((heights < ends[0] - 3) | (heights > ends[1] + 3)).T
    for images in (cut.slices / 255, downscale_local_mean(cut.slices / 255, (1, 2, 2))):
        volumes.write_in_input_frame(cut, images, tmp_path / "back.nii")
        back = nibabel.load(tmp_path / "back.nii")
        assert back.get_data_dtype() == np.float32 and back.shape == volume.shape
        np.testing.assert_allclose(back.affine, affine, atol=1e-5)
        values = back.get_fdata()
        difference = (values - volume)[inside]
        assert np.abs(difference).mean() < 0.015 * np.ptp(volume) and abs(difference.mean()) < 3
        assert np.corrcoef(values[inside], volume[inside])[0, 1] > 0.98
        assert outside.any() and (values[outside] == volume.min()).all()  # black


def test_of_a_whole_brain_half_must_be_there():
    with pytest.raises(VolumeError, match="shows less than 20 cm2 of head in 4[0-9] of 74 slices"):
        axial_slices(phantom()[..., 85:], stack="whole brain")
