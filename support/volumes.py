"""Heads as volumes: axial slices out of them, with the way back, and sampled heads as NIfTI."""

import dataclasses
import logging
from typing import NamedTuple

import nibabel
from nibabel.processing import resample_from_to
import numpy as np
from scipy import ndimage

FRAME_MM = 256  # mm: of the frame of all slices, so that a pixel is 256 / side mm
COMMISSURE = 78  # mm from the top of an average head down to its anterior commissure
MAX_VOXELS = 2 ** 29  # of a volume as stored, and resampled: 800 along each axis
MIN_HEAD_AREA = 2000  # mm2 of head in each slice; a brain has three times as much
MAX_TOP_AREA = 4000  # mm2 of head in the topmost plane; more of it, and the top is about 1 cm higher
WHOLE_BRAIN_MM = 110  # a stack at least as high is called a whole brain
VOLUME_ENDINGS = (".nii", ".nii.gz", ".mgz", ".hdr", ".img", ".dcm")  # read, or told how to convert
OUR_HEAD = "brain-vqvae head; "  # how the description of a volume begins that `write_nifti_heads` wrote


class VolumeError(ValueError):
    """A volume cannot be used. The text says why, to be put behind its path: "is gzipped; ..."."""


@dataclasses.dataclass(frozen=True)
class SliceGeometry:
    """Where the slices of a data set lie, in millimetres."""
    pixel_size: float = 1.0  # of the slices' square pixels
    spacing: float = 1.4  # between neighbouring slices
    lowest: float = -8.0  # height of slice 0 above the anterior commissure; negative below it
    axes_known: bool = True  # whether front is known to be up, as measured or stated; else nothing is claimed

    def heights(self, num_slices):
        """The heights, (num_slices,) in mm above the anterior commissure, of slices 0, 1 and so on."""
        return self.lowest + self.spacing * np.arange(num_slices)


SLAB, SLAB_SLICES = SliceGeometry(), 32  # what is simulated or cut from volumes by default
# From the lower end of the cerebellum to the vertex of the template and of all who are simulated from it
WHOLE_BRAIN, WHOLE_BRAIN_SLICES = SliceGeometry(2.0, 2.0, -66.0), 74
STACKS = {False: (SLAB, SLAB_SLICES), True: (WHOLE_BRAIN, WHOLE_BRAIN_SLICES)}  # by whether brains are whole


def is_whole_brain(geometry, num_slices):
    """Whether so many slices of a `SliceGeometry` are a whole brain; else they are a slab."""
    return num_slices * geometry.spacing >= WHOLE_BRAIN_MM


def stack_name(geometry, num_slices):
    """What so many slices of a `SliceGeometry` are called: "whole brain", "slab of 45 mm" or "slices"."""
    if not geometry.axes_known:  # nor how far they lie apart
        return f"{num_slices} slices"
    if is_whole_brain(geometry, num_slices):
        return "whole brain"
    return f"slab of {num_slices * geometry.spacing:.0f} mm"


class Cut(NamedTuple):
    """The axial slices of a volume, and what `write_in_input_frame` needs for the way back."""
    slices: np.ndarray  # uint8 (N, S, S), front up, left on the left, the lowest first
    geometry: SliceGeometry  # where they lie
    affine: np.ndarray  # (4, 4): column, row and number of the slice -> mm in the volume's own space
    levels: tuple  # the volume's intensities that became 0 and 255
    source: object = None  # the nibabel image, as stored


def read_slices(path, geometry=SLAB, num_slices=SLAB_SLICES, center=(0.0, 0.0)):
    """Cuts the axial slices of a head out of a volume that nibabel reads: a `Cut`, or a `VolumeError`.

    A head that `write_nifti_heads` wrote gives its slices as they are; for others see `axial_slices`."""
    try:
        source, image = _open(path)
    except VolumeError:
        raise
    except Exception as error:  # whatever nibabel raises on a damaged file
        raise VolumeError(f"cannot be read ({(str(error) or repr(error)).splitlines()[0]})") from error
    width, height, _ = image.shape
    sizes = [round(float(size), 4) for size in image.header.get_zooms()]
    description = image.header["descrip"].item().decode("latin-1")
    if (description.startswith(OUR_HEAD) and width == height and image.dataobj.dtype == np.uint8
            and np.allclose(image.affine[:3, :3], np.diag(sizes), atol=1e-3)):
        slices = np.ascontiguousarray(np.asarray(image.dataobj).transpose(2, 1, 0)[:, ::-1])
        own = SliceGeometry(sizes[0], sizes[2], round(float(image.affine[2, 3]), 4),
                            axes_known="all axes" not in description)
        rows_from_above = np.array([[1, 0, 0, 0], [0, -1, 0, height - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
        return Cut(slices, own, image.affine @ rows_from_above, (0, 255), source)
    return axial_slices(_to_ras(image), geometry, num_slices, center)._replace(source=source)


def _open(path):
    """The nibabel image, and the same as `Nifti1Image`, as close to RAS as its voxels go."""
    logging.getLogger("nibabel.global").disabled = True  # its remarks on damaged headers
    with open(path, "rb") as file:
        if file.read(132)[128:] == b"DICM":
            raise VolumeError("is DICOM; convert its series to NIfTI with dcm2niix")
    source = nibabel.load(path)
    shape, dtype, affine = tuple(map(int, source.shape)), source.get_data_dtype(), source.affine
    size = " x ".join(map(str, shape))
    if len(shape) < 3 or max(shape[3:], default=1) > 1:
        raise VolumeError(f"has {len(shape)} dimensions ({size}), not 3; give one volume")
    if not 0 < np.prod(shape, dtype=float) <= MAX_VOXELS:
        raise VolumeError(f"has {size} voxels by its header, none or too many; correct or resample it")
    if dtype.names or dtype.kind == "c":
        raise VolumeError("holds colours (RGB) or complex numbers; give a gray volume")
    header = source.header if isinstance(source.header, nibabel.Nifti1Header) else None
    has_axes = header is None or header["qform_code"] or header["sform_code"]
    if not has_axes or not np.isfinite(affine).all() or np.linalg.cond(affine[:3, :3]) > 1e4:
        raise VolumeError("has no usable affine: correct its sform or qform, which say how voxels lie")
    data = np.asarray(source.dataobj).reshape(shape[:3])
    return source, nibabel.as_closest_canonical(nibabel.Nifti1Image(data, affine, header, dtype=data.dtype))


def _to_ras(image):
    """Resamples to 1 mm along RAS (x right, y front, z up), as float32; what is no number is background."""
    shape, affine = nibabel.spaces.vox2out_vox((image.shape, image.affine), (1, 1, 1))
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise VolumeError(f"is {' x '.join(map(str, shape))} mm large by its header; correct its voxel sizes")
    volume = np.asarray(image.dataobj, np.float32)
    finite = np.isfinite(volume)
    volume = np.where(finite, volume, volume[finite].min(initial=0))
    equal = [_share_of_equal_neighbours(np.moveaxis(volume, axis, 0)) for axis in range(3)]
    if min(equal) > 0.6 and (volume == np.round(volume)).all():
        raise VolumeError(f"holds labels, not a picture ({min(equal):.0%} of neighbouring voxels are equal)")
    image = nibabel.Nifti1Image(volume, image.affine)
    if np.allclose(image.affine[:3, :3], np.eye(3), atol=1e-3):
        return image
    return resample_from_to(image, (shape, affine), order=1, cval=min(0, float(volume.min())))


def _share_of_equal_neighbours(planes):
    """How many of the neighbours in successive planes are equal, of those that are not background."""
    inside = np.minimum(planes[1:], planes[:-1]) > planes.min()
    return (planes[1:] == planes[:-1])[inside].mean() if inside.any() else 0.0


def _head_region(volume, low, high):
    """The head in a volume (x, y, z), a mask; empty if nothing stands out from the noise."""
    # The largest region above the noise of the upper corners, where no head reaches, and above a tenth of the
    # range from `low` to `high` (Smith 2002, BET), with what surrounds it
    x, y, z = np.ogrid[tuple(slice(-1, 1, 1j * length) for length in volume.shape)]
    corners = np.abs(x) + np.abs(y) + z > 2  # an ellipsoid that fills the volume reaches 1.73
    corners &= volume > volume.min()  # not what was filled in around a brain or a tilted field of view
    air = volume[corners] if corners.mean() > 0.02 else np.array([low])  # 2 %: a quarter of the four corners
    level = np.median(air)
    noise = level + 1.5 * 1.4826 * np.median(np.abs(air - level))  # 1.5 standard deviations, but robust
    bright = volume > max(noise, low + 0.1 * (high - low))
    # By the majority of 5 x 5 x 5: edges stay.
    labels, count = ndimage.label(ndimage.uniform_filter(bright.astype(np.float32), 5) > 0.5)
    if not count or noise >= (low + high) / 2:  # as bright as tissue: "UNI" images of MP2RAGE
        return np.zeros(volume.shape, bool)
    boxes = np.array([[(side.start, side.stop) for side in box] for box in ndimage.find_objects(labels)])
    starts, stops = boxes[np.bincount(labels.ravel())[1:].argmax()].T
    highest_starts = *starts[:2], (starts[2] + stops[2]) / 2
    # The scalp may be a region of its own around the brain.
    around = (boxes[..., 0] <= highest_starts).all(axis=1) & (boxes[..., 1] >= stops).all(axis=1)
    return np.isin(labels, 1 + np.flatnonzero(around))


def axial_slices(image, geometry, num_slices, center=(0.0, 0.0)):
    """Cuts an image of float32 (x, y, z), 1 mm, RAS, at the heights of a `SliceGeometry`: a `Cut`.

    The middle of the head is moved to `center`, (down, right) in mm from that of the frame; None leaves it.
    A `VolumeError` if there is no such stack of a head."""
    volume = np.asarray(image.dataobj)
    low = np.percentile(volume, 1)
    brighter = volume[volume > low]
    if not brighter.size:
        raise VolumeError("holds no picture (nearly constant)")
    high = np.percentile(brighter, 99.5)
    head = _head_region(volume, low, high)
    commissure = _find_commissure(head.sum(axis=(0, 1)), geometry, num_slices)
    extent = head_extent(head.T, np.arange(volume.shape[2]) - commissure)
    if np.ptp(extent, axis=1).max() > FRAME_MM:
        raise VolumeError(f"shows a head of more than {FRAME_MM} mm across")
    if center is None:
        back, left = ((np.array(volume.shape[1::-1]) - FRAME_MM) / 2).astype(int)
    else:
        back, left = np.round(extent.mean(axis=1) - FRAME_MM / 2 - np.multiply(center, (-1, 1))).astype(int)
    # A slab consists of the nearest planes; a whole brain is averaged, and black where the volume ends.
    is_whole = is_whole_brain(geometry, num_slices)
    pixel = 2 if is_whole and geometry.pixel_size >= 2 else 1
    if is_whole:
        volume = ndimage.convolve1d(volume, [0.25, 0.5, 0.25], axis=2)
    # The grid of the slices, its rows from the front on: a pixel of 2 mm lies in the middle of four voxels.
    grid = image.affine @ np.array([[pixel, 0, 0, left + (pixel - 1) / 2],
                                    [0, -pixel, 0, back + FRAME_MM - (pixel + 1) / 2],
                                    [0, 0, geometry.spacing, commissure + geometry.lowest], [0, 0, 0, 1]])
    side = FRAME_MM // pixel
    slices = resample_from_to(nibabel.Nifti1Image(volume, image.affine), ((side, side, num_slices), grid),
                              order=int(is_whole), mode="grid-constant", cval=low).dataobj.T
    slices = np.uint8(np.round(((slices - low) / (high - low)).clip(0, 1) * 255))
    geometry = dataclasses.replace(geometry, pixel_size=float(pixel), axes_known=True)
    return Cut(slices, geometry, grid, (low, high))


def head_extent(region, heights):
    """Where a head begins and ends: int ((first row, last), (first column, last)), the last ones excluded.

    Of a mask (N, H, W) at `heights` (N,) in mm count the slices above the anterior commissure (nose, chin and
    neck lie below), and the rows and columns that show over a tenth of what the fullest does."""
    region = region[heights >= 0] if region[heights >= 0].any() else region
    profiles = region.sum(axis=(0, 2)), region.sum(axis=(0, 1))
    full = [np.flatnonzero(profile >= 0.1 * profile.max()) for profile in profiles]
    return np.array([[places[0], places[-1] + 1] for places in full])


def _find_commissure(areas, geometry, num_slices):
    """The plane of the anterior commissure, given the mm2 of head in each plane of 1 mm, if all is there."""
    top = np.flatnonzero(areas >= 100)  # a square centimetre
    if not top.size:
        raise VolumeError("shows no head (nothing stands out from its noise; of MP2RAGE take the image whose "
                          "background was removed)")
    if areas[-1] > MAX_TOP_AREA:
        raise VolumeError("is cut off below the top of the head, from which heights are measured")
    heights = geometry.heights(num_slices)
    planes = np.round(top[-1] - COMMISSURE + heights).astype(int)
    num_small = num_slices - (areas[planes[(planes >= 0) & (planes < len(areas))]] >= MIN_HEAD_AREA).sum()
    if num_small > (num_slices / 2 if is_whole_brain(geometry, num_slices) else 0):
        lowest, highest = COMMISSURE - heights[[0, -1]]
        raise VolumeError(f"shows less than {MIN_HEAD_AREA // 100} cm2 of head in {num_small} of "
                          f"{num_slices} slices, from {lowest:.0f} to {highest:.0f} mm below the head's top")
    return top[-1] - COMMISSURE


def write_in_input_frame(cut, images, path):
    """Writes what became of the slices of a `Cut`, (N, H, W) in [0, 1], as NIfTI on the grid of its volume.

    It has the volume's levels of intensity, as float32; black where nothing was cut. Pixels may be larger."""
    source, pixel = cut.source, cut.slices.shape[1] / images.shape[1]
    affine = cut.affine @ np.array([[pixel, 0, 0, (pixel - 1) / 2], [0, pixel, 0, (pixel - 1) / 2],
                                    [0, 0, 1, 0], [0, 0, 0, 1]])
    stack = nibabel.Nifti1Image(np.float32(images.T), affine)
    volume = resample_from_to(stack, (source.shape[:3], source.affine), order=1, mode="grid-constant").dataobj
    low, high = map(np.float32, cut.levels)
    volume = (low + volume * (high - low)).reshape(source.shape)
    image = nibabel.Nifti1Image(volume, source.affine, source.header)
    image.set_data_dtype(np.float32)
    nibabel.save(image, path)


def write_nifti_heads(heads, positions, geometry, folder):
    """Writes heads, uint8 (N, S, H, W), front up, as head_000.nii.gz and so on: each slice at its height.

    Positions are S ascending slice numbers; where one is missing, it is black. The axes are called RAS, so
    that viewers show the head upright, but left and right are unknown, and the origin is a convention."""
    places, (height, width) = regular_positions(positions), heads.shape[2:]
    affine = np.diag([geometry.pixel_size, geometry.pixel_size, geometry.spacing * places.step, 1])
    affine[:2, 3] = -geometry.pixel_size * (np.array([width, height]) - 1) / 2
    affine[2, 3] = geometry.lowest + geometry.spacing * positions[0]
    unknown = "left and right are" if geometry.axes_known else "all axes are"
    for number, head in enumerate(heads):
        volume = np.zeros((width, height, len(places)), np.uint8)
        volume[..., np.isin(places, positions)] = head[:, ::-1].transpose(2, 1, 0)
        image = nibabel.Nifti1Image(volume, affine)
        image.set_qform(affine, "aligned")
        image.set_sform(affine, "aligned")
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = f"{OUR_HEAD}its origin is a convention, {unknown} unknown"
        image.header["intent_name"] = "L/R unknown"
        nibabel.save(image, folder / f"head_{number:03d}.nii.gz")


def regular_positions(slice_positions):
    """The slice positions of a volume, whose slices lie evenly: the range of those of training people."""
    step = int(np.gcd.reduce(np.diff(slice_positions))) if len(slice_positions) > 1 else 1
    return range(slice_positions[0], slice_positions[-1] + 1, step)
