"""
A digital brain: tissue fractions on a subject's own grid, from the MNI152 maps that nilearn ships.

Every subject has its own size, pose, shape, sulci and atrophy. Fractions are averaged from a finer grid, so that
borders carry partial volume; coordinates of the template (MNI mm) travel along, so that regions and vascular
territories follow the anatomy.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from threadpoolctl import threadpool_limits

CENTRE = np.array([0, -18, 8], np.float32)  # the middle of the template's brain, MNI mm
SHARPEN = 2.2                               # exponent that undoes some of the blur of a map averaged over 152 people

# Arteries (and the straight sinus) as polylines in MNI mm, right side; mirrored for the left.
# internal carotid
VESSELS = [[(12, -2, -40), (14, 0, -22), (10, 4, -16)],
           # M1 to M2
           [(10, 4, -16), (24, 4, -16), (36, 6, -12), (42, 0, -4), (44, -12, 6), (46, -26, 14), (50, -40, 18)],
           # M2 branches
           [(38, 6, -12), (42, 16, 0), (46, 14, 14)], [(40, 2, -8), (48, -8, -6), (56, -26, -2)],
           # A1 to A3
           [(10, 4, -16), (3, 10, -14), (3, 28, -4), (3, 36, 10), (3, 22, 28), (3, -6, 36), (3, -36, 40)],
           [(1, -22, -40), (1, -18, -22), (2, -16, -14)], [(2, -16, -14), (14, -18, -12), (18, -32, -8), (12, -52, 0),
                                                           (12, -74, 6)],
           # straight sinus
           [(1, -44, 6), (1, -62, 8), (1, -84, 6)]]


@dataclass
class Template:
    """The population's brain at 1 mm: maps, and what is derived from them once."""
    origin: np.ndarray          # MNI mm of voxel 0
    gm: np.ndarray              # (X, Y, Z) float32 fractions
    wm: np.ndarray
    brain: np.ndarray           # hull, cerebrospinal fluid included
    texture: np.ndarray         # normalised T1 intensity within tissue, about unit standard deviation
    ventricle: np.ndarray       # soft map of lateral and third ventricles
    vessel: np.ndarray          # soft map of the large vessels
    push: np.ndarray            # (3, X/4, Y/4, Z/4): direction to the ventricles, at most 1


@functools.cache
def template():
    """Load the maps and derive the rest; about a second, once per process (workers that are forked inherit it)."""
    from nilearn import datasets  # slow to import, and needed by nothing else
    image = datasets.load_mni152_template(resolution=1)
    box = (slice(22, 176), slice(22, 212), slice(0, 160))
    t1, gm, wm, hull = (np.asarray(i.dataobj, np.float32)[box] for i in (
        image, datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1),
        datasets.load_mni152_brain_mask(resolution=1)))
    origin = image.affine[:3, 3] + np.array([22, 22, 0])
    csf = np.clip(hull - gm - wm, 0, 1)
    x, y, z = (o + np.arange(n) for o, n in zip(origin, gm.shape, strict=True))

    # Ventricles: fluid connected to a point in either lateral ventricle, in a box without fissures and cisterns.
    room = (np.abs(x) < 40)[:, None, None] & ((y > -52) & (y < 38))[None, :, None]
    room = room & ((z > -14) & (z < 32))[None, None, :]
    lateral = (np.abs(x)[:, None, None] < np.where(y < -20, 38, 24)[None, :, None])
    cistern = (np.abs(x) < 9)[:, None, None] & (y < -22)[None, :, None] & (z < 14)[None, None, :]
    parts, _ = ndimage.label((csf > 0.5) & room & lateral & ~cistern & (hull > 0))
    seeds = {int(parts[tuple(np.round(np.array(p) - origin).astype(int))])
             for p in ((6, 2, 20), (-6, 2, 20), (6, 10, 12), (-6, 10, 12))} - {0}
    ventricle = ndimage.gaussian_filter(ndimage.binary_dilation(np.isin(parts, list(seeds)),
                                                                iterations=2).astype(np.float32), 1)
    push = np.stack(np.gradient(ndimage.gaussian_filter(ventricle, 7)[::4, ::4, ::4]))
    push /= np.sqrt((push ** 2).sum(0)).max()

    # Intensity within tissue: what is left of T1 after its regression on the fractions, without the slow part.
    parts = np.stack([gm[hull > 0], wm[hull > 0], csf[hull > 0]])
    with threadpool_limits(1):  # the same sums whoever asks
        weight = np.linalg.solve(parts @ parts.T, parts @ t1[hull > 0])
    left = np.where(hull > 0, t1 - weight[0] * gm - weight[1] * wm - weight[2] * csf, 0)
    texture = ndimage.gaussian_filter(np.where(hull > 0, left, 0), 1)  # as fine as the voxels it goes into
    texture = np.clip(texture / texture[hull > 0].std(), -2.5, 2.5)

    vessel = np.zeros_like(gm)
    for line in VESSELS:
        for a, b in zip(line[:-1], line[1:], strict=True):
            steps = np.linspace(a, b, 2 * int(np.linalg.norm(np.subtract(b, a))) + 2)
            for side in (1, -1):
                i, j, k = np.round(steps * (side, 1, 1) - origin).astype(int).T
                vessel[i, j, np.clip(k, 0, None)] = 1
    vessel = np.clip(ndimage.gaussian_filter(vessel, 1.2) * 12, 0, 1)
    soft = [ndimage.gaussian_filter(m, 0.5).astype(np.float32) for m in (gm, wm, hull)]
    return Template(origin.astype(np.float32), *soft, *(m.astype(np.float32)
                                                        for m in (texture, ventricle, vessel, push)))


@functools.cache
def spline_matrix(size, knots):
    """(size, knots) cubic B-spline basis over a line of `size` points."""
    x = np.linspace(1, knots - 2, size)[:, None] - np.arange(knots)[None]
    x = np.abs(x)
    return np.where(x < 1, 2 / 3 - x ** 2 + x ** 3 / 2, np.where(x < 2, (2 - x) ** 3 / 6, 0)).astype(np.float32)


def smooth_field(rng, shape, spacing, scale):
    """(X, Y, Z) float32 random field of zero mean and unit standard deviation, smooth over `scale` mm."""
    knots = [max(4, int(round(n * s / scale)) + 3) for n, s in zip(shape, spacing, strict=True)]
    field = rng.standard_normal(knots, np.float32)
    for n, k in zip(shape, knots, strict=True):
        # each pass turns the axes by one: three bring them back
        field = np.tensordot(field, spline_matrix(n, k), (0, 1))
    return (field - field.mean()) / field.std()


@functools.cache
def _refine_matrix(size, factor):
    """(size * factor, size) linear interpolation from voxel centres to sub-voxel centres, extrapolating at the ends."""
    x = (np.arange(size * factor) + 0.5) / factor - 0.5
    low = np.clip(np.floor(x).astype(int), 0, size - 2)
    matrix = np.zeros((size * factor, size), np.float32)
    matrix[np.arange(len(x)), low] = 1 - (x - low)
    matrix[np.arange(len(x)), low + 1] = x - low
    return matrix


def refine(array, factor):
    """(X, Y, Z) -> (fX, fY, fZ), linear."""
    for n in array.shape:
        array = np.tensordot(array, _refine_matrix(n, factor), (0, 1))
    return array


def block_mean(array, factor):
    """(fX, fY, fZ) -> (X, Y, Z): the mean over each voxel's sub-voxels."""
    for axis in range(3):
        array = np.moveaxis(array, axis, 0)
        array = np.moveaxis(sum(array[k::factor] for k in range(factor)), 0, axis)
    return array / factor ** 3


def sample(volume, origin, points, step=1):
    """Linear interpolation of a template volume at `points` (3, N) in MNI mm; 0 outside."""
    return ndimage.map_coordinates(volume, (points - origin[:, None]) / step, order=1, output=np.float32)


def rotation(angles):
    """3x3 rotation by angles (degrees) about x, y, z."""
    a, b, c = np.deg2rad(angles)
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return rz @ ry @ rx


@dataclass
class Brain:
    """One subject's anatomy on its grid, axes towards R, A, S; all maps (X, Y, Z) float32."""
    affine: np.ndarray          # 4x4, voxel to scanner mm
    spacing: tuple
    gm: np.ndarray              # fractions of the voxel; gm + wm + csf = brain
    wm: np.ndarray
    csf: np.ndarray
    brain: np.ndarray
    ventricle: np.ndarray       # part of csf
    vessel: np.ndarray
    texture: np.ndarray
    mni: np.ndarray             # (3, X, Y, Z) template coordinates in mm
    mask: np.ndarray            # bool

    def field(self, rng, scale):
        """(X, Y, Z) random field on this grid, zero mean and unit standard deviation, smooth over `scale` mm."""
        return smooth_field(rng, self.mask.shape, self.spacing, scale)

    @property
    def voxel_ml(self):
        return float(np.prod(self.spacing)) / 1000

    @property
    def ventricle_ml(self):
        return float(self.ventricle[self.mask].sum()) * self.voxel_ml

    @property
    def gm_ml(self):
        return float(self.gm[self.mask].sum()) * self.voxel_ml


def make_brain(rng, shape, spacing, atrophy=0.0, ventricles=0.0, deform=1.0, tilt=4.0, scale=0.93, centre=CENTRE,
               fine=None):
    """
    Draw one subject's anatomy.

    atrophy, ventricles : standard deviations from the mean of old age: width of the sulci, size of the ventricles
    deform : factor on the smooth nonlinear deformation;  tilt : standard deviation of the head's angles, degrees
    scale : mean head size over the template's (MNI152 is larger than most heads);  centre : MNI mm in the middle of the
    grid
    fine : sub-voxels per voxel and axis from which fractions are averaged (default: 2, or 1 where voxels are small)
    """
    base = template()
    spacing = np.asarray(spacing, float)
    fine = fine or (2 if spacing.min() >= 2 else 1)

    # The grid in the scanner, and the head in the grid: template mm = head @ (scanner mm - place) + centre.
    turn = rotation(rng.normal(0, 2.5, 3))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    place = rng.normal(0, 12, 3)
    affine[:3, 3] = place - affine[:3, :3] @ ((np.array(shape) - 1) / 2) + rng.normal(0, 1.5, 3)
    shear = np.eye(3) + np.triu(rng.normal(0, 0.015, (3, 3)), 1)
    size = np.clip(rng.normal(scale, 0.02), scale - 0.04, scale + 0.04) * np.clip(rng.normal(1, 0.012, 3), 0.97, 1.03)
    angles = np.clip(rng.normal(0, tilt, 3), -2 * tilt, 2 * tilt) * (1, 0.6, 1)
    head = np.linalg.inv(rotation(angles) @ turn @ shear @ np.diag(size))
    step = (head @ affine[:3, :3]).astype(np.float32)
    start = (head @ (affine[:3, 3] - place)).astype(np.float32) + np.asarray(centre, np.float32)
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing='ij', sparse=True)
    mni = np.stack([start[a] + sum(step[a, b] * axes[b] for b in range(3)) for a in range(3)])
    for a in range(3):
        mni[a] += deform * (2.2 * smooth_field(rng, shape, spacing, 45) + 1.0 * smooth_field(rng, shape, spacing, 18))

    # Larger ventricles: points around them take their tissue from further inside; twice, as a flow that follows itself.
    flat = mni.reshape(3, -1)
    near = ndimage.binary_dilation(sample(base.brain, base.origin, flat).reshape(shape) > 0.02, iterations=1)
    within = flat[:, near.ravel()]
    for _ in range(2):
        within += (1.1 + 1.3 * ventricles) * np.stack([sample(p, base.origin, within, 4) for p in base.push])
    flat[:, near.ravel()] = within

    # Fractions on the finer grid, inside the (generous) hull only.
    inside = np.repeat(np.repeat(np.repeat(near, fine, 0), fine, 1), fine, 2)
    points = np.stack([refine(c, fine)[inside] for c in mni])
    gm, wm, brain = (sample(m, base.origin, points) for m in (base.gm, base.wm, base.brain))
    shape_fine = inside.shape
    folds = smooth_field(rng, shape, spacing, 11)
    for axis in range(3):
        folds = np.repeat(folds, fine, axis)
    # sulci: the odds of fluid, subject by subject and place by place
    wide = np.exp(0.2 + 0.45 * atrophy + 0.5 * deform * folds[inside])
    fluid = np.clip(brain - gm - wm, 1e-4, 1)
    odds = np.stack([gm ** SHARPEN, wm ** SHARPEN, wide * fluid ** SHARPEN])
    odds *= (brain > 0.5) / (odds.sum(0) + 1e-6)

    def to_grid(values):
        full = np.zeros(shape_fine, np.float32)
        full[inside] = values
        return block_mean(full, fine)

    gm, wm, csf = (to_grid(v) for v in odds)
    hull = gm + wm + csf
    part, _ = ndimage.label(hull > 0.5)
    mask = part == 1 + np.argmax(np.bincount(part.ravel())[1:])
    ventricle, vessel, texture = np.zeros((3, *shape), np.float32)
    for values, volume in ((ventricle, base.ventricle), (vessel, base.vessel), (texture, base.texture)):
        values[near] = sample(volume, base.origin, within)
    return Brain(affine, tuple(float(s) for s in spacing), gm, wm, csf, hull, csf * ventricle, vessel, texture, mni,
                 mask)
