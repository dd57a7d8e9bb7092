"""
Grids: the way from a subject's own grid to the networks' working grid and back.

A grid is a shape (X, Y, Z) and a 4 x 4 affine (voxel -> mm). The working grid is the subject's grid turned to the
nearest RAS, at the requested spacing, cropped or padded around the mask's centre. One function, `onto`, serves the way
there and the way back: the two affines say whether voxels are copied, or interpolated along the axes, or obliquely.
"""

import nibabel as nib
import numpy as np
from scipy import ndimage

TOGETHER = 8      # items of one subject in one box (batches)
TOLERANCE = 1e-3  # affine entries (mm), relative spacings and voxel offsets closer than this are the same


def difference(shape, affine, other_shape, other_affine):
    """None if two grids are the same, else what differs, in words for each: shapes or the affines' worst entry."""
    if tuple(shape) != tuple(other_shape):
        return f'shape {tuple(shape)}', f'shape {tuple(other_shape)}'
    difference = np.abs(affine - other_affine)
    if difference.max() <= TOLERANCE:
        return None
    row, column = np.unravel_index(difference.argmax(), (4, 4))
    where = f'in row {row + 1}, column {column + 1} of the affine'
    return f'{affine[row, column]:.6g} {where}', f'{other_affine[row, column]:.6g} {where}'


def turn_and_space(shape, affine, spacing):
    """The grid turned to the nearest RAS (an exact rearrangement), then at `spacing` mm; None keeps an axis."""
    turn = nib.orientations.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    shape = [shape[i] for i in np.argsort(turn[:, 0])]
    for axis, wanted in enumerate(spacing or ()):
        ratio = 1.0 if wanted is None else wanted / np.linalg.norm(affine[:3, axis])
        if abs(ratio - 1) > TOLERANCE:
            size = max(1, round(shape[axis] / ratio))
            step = np.eye(4)
            step[axis, axis] = ratio
            step[axis, 3] = (shape[axis] - 1) / 2 - (size - 1) / 2 * ratio  # the fields of view share their centre
            affine, shape[axis] = affine @ step, size
    return tuple(shape), affine


def crop_to_mask(mask, affine, size):
    """The part (shape, affine) of `size` voxels around the mask's centre; a size of None keeps that axis."""
    shape, shift = list(mask.shape), np.eye(4)
    for axis, (wanted, (first, end)) in enumerate(zip(size, extent(mask), strict=True)):
        if wanted is not None:
            shift[axis, 3] = (first + end - wanted) // 2
            shape[axis] = wanted
    return tuple(shape), affine @ shift


def extent(mask):
    """First voxel and end of a mask along each axis, (dims, 2); 0, 0 where it is empty."""
    axes, found = range(mask.ndim), []
    for axis in axes:
        line = np.flatnonzero(mask.any(axis=tuple(other for other in axes if other != axis)))
        found.append((line[0], line[-1] + 1) if len(line) else (0, 0))
    return np.array(found)


def _axis_weights(scale, offset, size, to_size):
    """Rows of linear interpolation weights (to_size, size); widened to an average where the new voxels are larger."""
    x = offset + scale * np.arange(to_size)
    inside = (x > -0.501) & (x < size - 0.499)
    distance = np.abs(np.clip(x, 0, size - 1)[:, None] - np.arange(size))
    weights = np.maximum(0, 1 - distance / max(1.0, abs(scale)))
    weights *= inside[:, None] / np.maximum(weights.sum(1, keepdims=True), 1e-6)
    return weights.astype(np.float32)


def onto(array, affine, to_affine, to_shape, out=None):
    """
    array (C, X, Y, Z) float32 on the grid `affine` -> (C, *to_shape) on the grid `to_affine`; 0 outside its view.

    Where one grid is a rearrangement of the other (turn, flip, crop, pad), voxels are copied exactly. Else linear
    interpolation, averaging over the larger voxel where the new grid is coarser.
    """
    to_shape = tuple(to_shape)
    if out is None:
        out = np.empty((len(array), *to_shape), np.float32)
    matrix = np.linalg.inv(affine) @ to_affine  # voxel of the new grid -> voxel of the old
    linear, offset = matrix[:3, :3], matrix[:3, 3]
    source_axis = np.abs(linear).argmax(axis=0)  # the old axis along which each new axis runs
    scale = linear[source_axis, range(3)]
    rest = linear.copy()
    rest[source_axis, range(3)] = 0
    if sorted(source_axis) != [0, 1, 2] or (np.abs(rest) * to_shape).max() > 0.01:
        return _onto_oblique(array, linear, offset, to_shape, out)

    array = array.transpose(0, *(source_axis + 1))
    offset = offset[source_axis]
    take, put, weights = [slice(None)], [slice(None)], {}
    for axis in range(3):
        size, to_size, sign, start = array.shape[axis + 1], to_shape[axis], round(scale[axis]), round(offset[axis])
        if abs(sign) == 1 and max(abs(scale[axis] - sign) * to_size, abs(offset[axis] - start)) < TOLERANCE:
            index = np.arange(to_size) * sign + start
            inside = np.flatnonzero((index >= 0) & (index < size))
            if not len(inside):
                out[...] = 0
                return out
            first, last = index[inside[0]], index[inside[-1]]
            stop = last + sign
            take.append(slice(first, stop if stop >= 0 else None, sign))
            put.append(slice(inside[0], inside[-1] + 1))
        else:
            weights[axis] = _axis_weights(scale[axis], offset[axis], size, to_size)
            take.append(slice(None))
            put.append(slice(None))
    array = array[tuple(take)]
    for axis, matrix in weights.items():
        array = np.moveaxis(np.matmul(np.moveaxis(array, axis + 1, -1), matrix.T), -1, axis + 1)
    if array.shape != out.shape:
        out[...] = 0
    out[tuple(put)] = array
    return out


def _onto_oblique(array, linear, offset, to_shape, out):
    """The general case of `onto`: the axes of the two grids are not parallel."""
    outside = np.zeros(to_shape, bool)
    index = np.ogrid[tuple(slice(n) for n in to_shape)]
    for axis, size in enumerate(array.shape[1:]):
        x = offset[axis] + sum(linear[axis, j] * index[j] for j in range(3))
        outside |= (x < -0.501) | (x > size - 0.499)
    blur = [max(0.0, (step - 1) / 2) for step in np.abs(linear).max(axis=1)]
    for channel, image in enumerate(array):
        image = ndimage.gaussian_filter(image, blur, mode='nearest') if max(blur) > 0.1 else image
        moved = ndimage.affine_transform(image, linear, offset, to_shape, np.float32, order=1, mode='nearest')
        out[channel] = np.where(outside, 0, moved)
    return out


def onto_inside(array, mask, affine, to_affine, to_shape, out=None):
    """
    `onto`, with only the voxels inside `mask` (X, Y, Z) counting: at the mask's edge nothing from outside is mixed in.

    Returns the array (C, *to_shape), and the mask's share of each voxel (1, *to_shape), 0..1; both are 0 outside.
    """
    array = onto(np.where(mask, array, np.float32(0)), affine, to_affine, to_shape, out)
    share = onto(mask[None].astype(np.float32), affine, to_affine, to_shape)
    if not ((share == 0) | (share == 1)).all():
        array /= np.where(share > 0, share, 1)
    return array, share


def fill_nearest(array, known, wanted):
    """Voxels of array (C, X, Y, Z) that are wanted but not known take the value of the nearest known one, in place."""
    missing = wanted & ~known
    if missing.any() and known.any():
        box = ndimage.find_objects(wanted.astype(np.uint8))[0]
        if not known[box].any():
            box = (slice(None),) * 3
        nearest = ndimage.distance_transform_edt(~known[box], return_distances=False, return_indices=True)
        part = array[(slice(None), *box)]
        part[:, missing[box]] = part[(slice(None), *nearest)][:, missing[box]]
    return array


def derive_mask(mean):
    """Brain mask of a volume without one: above 0, largest connected component, holes filled."""
    parts, count = ndimage.label(mean > 0)
    if count == 0:
        return np.zeros(mean.shape, bool)
    largest = np.bincount(parts.ravel())[1:].argmax() + 1
    return ndimage.binary_fill_holes(parts == largest)


def stack_slices(source, context):
    """Slices with their k = context neighbours on either side, the lowest first: (N, C, *S) -> (N, (2k + 1) C, *S).

    Beyond the first and the last slice the neighbours are background, -1.
    """
    if not context:
        return source
    beyond = np.full((context, *source.shape[1:]), -1, source.dtype)
    padded = np.concatenate([beyond, source, beyond])
    return np.concatenate([padded[i:i + len(source)] for i in range(2 * context + 1)], axis=1)


# ------------------------------------------------------------------------------------------------------------------
# Boxes: most of an image is not brain, and need not be computed

def by_size(extents):
    """The order of some extents (n, dims, 2), the smallest first."""
    return np.argsort((extents[..., 1] - extents[..., 0]).prod(1), kind='stable')


def box_size(extents, grid, more=0):
    """Voxels of the smallest box that holds every one of some extents (n, dims, 2), and `more` if the grid has them.

    In steps of a sixteenth of the grid, at least 4: an accelerator prepares itself for each new size.
    """
    step, largest = 4 * max(1, max(grid) // 64), (extents[..., 1] - extents[..., 0]).max(0)
    return tuple(min(int(n), -(-int(size + more) // step) * step) for size, n in zip(largest, grid, strict=True))


def batches(mask, at_most, trim):
    """How to go through the items of one subject, mask (N, 1, *S): [(numbers, box)], box a tuple of slices.

    trim: TOGETHER items of like size have one box, the one around them, whatever at_most is, so that it changes no
    image; items without brain have none. Otherwise all items, whole.
    """
    grid = mask.shape[2:]
    if not trim:
        numbers = list(range(len(mask)))
        return [(numbers[i:i + at_most], tuple(slice(0, n) for n in grid)) for i in range(0, len(mask), at_most)]
    extents = np.array([extent(item[0] > 0) for item in mask])
    order, found = [int(i) for i in by_size(extents) if extents[i].any()], []
    for i in range(0, len(order), TOGETHER):
        numbers = order[i:i + TOGETHER]
        first, end = extents[numbers, :, 0].min(0), extents[numbers, :, 1].max(0)
        size = box_size(np.stack([first, end], axis=1)[None], grid)
        start = [int(np.clip((a + b - s) // 2, 0, n - s)) for a, b, s, n in zip(first, end, size, grid, strict=True)]
        box = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
        found += [(numbers[j:j + at_most], box) for j in range(0, len(numbers), at_most)]
    return found
