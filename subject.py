"""One subject in and out: the settings that decide how files become arrays, reading, the way back to its own grid."""

import json
import os
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
import torch

import check
import grid as grids
import volume as vol
from splits import MissingFile, find_file
from volume import DataError

TRAVEL = ('task', 'spatial_dims', 'spacing', 'image_size', 'context', 'frames', 'frame_spacing', 'frame_interval',
          'resample', 'scaling', 'unit_scale', 'num_classes', 'target_names', 'trim')


# ----------------------------------------------------------------------------------------------------------------------
# How files become arrays

@dataclass
class Spec:
    """Where the files are (paths, from the settings) and how they become arrays (what travels in a checkpoint)."""
    root: str = ''
    data_info: str = ''
    cache_dir: str = 'cache'
    source: str = ''
    targets: dict = field(default_factory=dict)
    mask: str | None = None
    lesion: str | None = None
    task: str = 'ctp2dwi'
    spatial_dims: int = 2
    spacing: tuple | None = None
    image_size: tuple | None = None
    context: int = 0
    frames: int | None = None
    frame_spacing: float | None = None
    frame_interval: float | None = None
    resample: bool = False
    scaling: dict = field(default_factory=dict)
    unit_scale: dict = field(default_factory=dict)
    num_classes: int = 0
    lesion_rule: tuple = (620.0, 1.25, 0.1)
    target_names: tuple = ()
    trim: bool = False

    @classmethod
    def from_settings(cls, cfg, **override):
        """cfg: any object with the settings as attributes; override: for instance what travelled in a checkpoint."""
        values = {name: getattr(cfg, name) for name in cls.__dataclass_fields__ if hasattr(cfg, name)}
        values.update(root=cfg.data_root, target_names=tuple(cfg.targets))
        values.update(override)
        for name in ('spacing', 'image_size', 'target_names'):
            values[name] = tuple(values[name]) if values.get(name) else () if name == 'target_names' else None
        values['scaling'] = {name: tuple(rule) for name, rule in values['scaling'].items()}
        values['frames'] = int(values.get('frames') or 0) or None
        return cls(**values)

    @property
    def source_channels(self):
        """Channels of a source as the networks see it: frames, times the slices that `context` puts side by side."""
        return (self.frames or 1) * (2 * self.context + 1)

    def travel(self):
        """The part that a checkpoint keeps: plain numbers, strings, lists and dicts."""
        return json.loads(json.dumps({name: getattr(self, name) for name in TRAVEL}))  # tuples become lists

    def path(self, name, id):
        """The file of 'source', 'mask', 'lesion' or a target; DataError if it is missing or not the only one."""
        template = getattr(self, name) if name in ('source', 'mask', 'lesion') else self.targets.get(name)
        if template is None:
            raise DataError(f"targets in config.py has no entry '{name}', which the checkpoint predicts; add its path.")
        return find_file(template, self.root, id)

    def has_truth(self, id):
        """Whether all target files of a subject are there."""
        try:
            return all(self.path(name, id) for name in self.target_names)
        except MissingFile:
            return False
        except DataError:
            return True  # there, but with a fault that load_subject tells

    def names(self, with_truth=True):
        """The volumes of a subject, the source first; without truth no target, and as lesion mri2pet's composite."""
        truth = (*self.target_names, 'lesion') if with_truth else ('lesion',) if self.task == 'mri2pet' else ()
        return [name for name in ('source', 'mask', *truth) if name not in ('mask', 'lesion') or getattr(self, name)]


def scaling_range(spec, target):
    """(lo, hi) of a target's scaling in the units of a prediction: dwi (0, 3) medians, adc (0, 3000), suvr (0, 3)."""
    return vol.scaling_range(spec.scaling[target])


# ----------------------------------------------------------------------------------------------------------------------
# One subject

@dataclass
class Subject:
    """One subject on the working grid (RAS, spacing, image_size), and the way back to its own, the source file's.

    2D: N axial slices of (X, Y), C = frames. 3D: N = 1 volume of (X, Y, Z).
    """
    id: str
    spec: Spec
    source: np.ndarray             # (N, C, *S) in [-1, 1], background -1
    mask: np.ndarray               # (N, 1, *S) 0 or 1
    target: np.ndarray | None      # (N, K, *S) in [-1, 1], background -1
    lesion: np.ndarray | None      # (N, 1, *S) 0 or 1
    native_mask: np.ndarray        # (X, Y, Z) bool
    native_lesion: np.ndarray | None
    shape: tuple                   # native grid
    affine: np.ndarray
    geometry: dict                 # qform and sform fields of the source's header
    grid: tuple                    # working grid: shape (X, Y, Z), affine
    volumes: dict                  # target -> (Volume, mask on its grid, limits of its scaling)
    notes: list                    # sentences: what was assumed or left out on reading

    @property
    def stacked(self):
        """The source as the networks see it: (N, (2 context + 1) C, *S), each slice between its neighbours."""
        return grids.stack_slices(self.source, self.spec.context)

    @property
    def spacing(self):
        """mm per native voxel."""
        return tuple(float(x) for x in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self):
        """Millilitres per native voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def axial_axis(self):
        """The native axis whose direction is nearest to head-foot."""
        return int(np.flatnonzero(nib.io_orientation(self.affine)[:, 0] == 2)[0])

    def to_native(self, pred):
        """pred (N, K, *S) in [-1, 1] -> dict target -> (X, Y, Z) float32 on the native grid, 0 outside the mask, in
        physical units, clipped to the scaling range: 'median' gives multiples of the median, 'quantile' 0..1."""
        native = self.moved(pred[:, :len(self.spec.target_names)])  # without a lesion head's probability
        return {name: np.where(self.native_mask, vol.unscale(image, self.spec.scaling[name]), np.float32(0))
                for name, image in zip(self.spec.target_names, native, strict=True)}

    def moved(self, array):
        """array (N, C, *S) -> (C, X, Y, Z) on the native grid, from what lies in the mask alone."""
        array, mask = (_as_volume(x, self.spec.spatial_dims) for x in (array, self.mask))
        native, share = grids.onto_inside(array, mask[0] > 0.5, self.grid[1], self.affine, self.shape)
        return grids.fill_nearest(native, share[0] > 0.01, self.native_mask)  # its rim, rounded away on a coarser grid

    def to_native_raw(self, array):
        """array (N, C, *S) -> (X, Y, Z), or (X, Y, Z, C) if C > 1: geometry only."""
        native = grids.onto(_as_volume(array, self.spec.spatial_dims), self.grid[1], self.affine, self.shape)
        return native[0] if len(native) == 1 else np.moveaxis(native, 0, -1)

    def known_mask(self):
        """The native mask less what a target on a grid of its own does not reach."""
        known = self.native_mask
        for volume, mask, _ in self.volumes.values():
            if volume.affine is not self.affine:
                share = grids.onto(mask[None].astype(np.float32), volume.affine, self.affine, self.shape)[0]
                known = known & (share > 0.01)
        return known

    def truth(self):
        """dict target -> (X, Y, Z) float32 in the units of `to_native`, not clipped, on the native grid."""
        if not self.volumes:
            raise DataError(f'{self.id}: was read without its target images.')
        truth = {}
        for name, (volume, mask, limits) in self.volumes.items():
            array = volume.array
            if volume.affine is not self.affine:  # another grid, with resample
                moved, share = grids.onto_inside(array[None], mask, volume.affine, self.affine, self.shape)
                array = grids.fill_nearest(moved, share[0] > 0.01, self.native_mask)[0]
            truth[name] = vol.to_units(array, self.spec.scaling[name], limits)
        return truth


def _as_volume(array, spatial_dims):
    """(N, C, *S), array or tensor -> (C, X, Y, Z) float32; 2D slices are stacked along Z."""
    array = array.detach().cpu().float().numpy() if torch.is_tensor(array) else np.asarray(array, np.float32)
    return array.transpose(1, 2, 3, 0) if spatial_dims == 2 else array[0]


def load_subject(spec, id=None, files=None, with_truth=True, report=None):
    """Read and preprocess one subject: by ID through the templates, or, in no list, files = {name: path or None} of
    'source', 'mask', 'lesion'. with_truth: Spec.names. A lesion file may be absent (the cohort needs it).

    Raises DataError 'ID: sentence' at the first fault. With report, a dict, all faults are gathered in report['faults']
    and what was read is described in report['volumes'] instead, and nothing is returned.
    """
    if files is not None:
        id, with_truth = id or os.path.basename(files['source']).split('.')[0], False

    def fault(error):
        if report is None:
            raise DataError(f'{id}: {error}') from error
        report['faults'].append(str(error))

    volumes = _read_files(spec, id, files, with_truth, fault, report)
    has_mask_file = bool(spec.mask if files is None else files.get('mask'))
    if 'source' not in volumes or has_mask_file and 'mask' not in volumes:
        return None  # without them nothing more can be said
    source, targets = volumes['source'], [name for name in spec.target_names if name in volumes]

    # The mask, and the lesion, each on its own grid.
    own = volumes['mask'] if has_mask_file else source
    mask_path = own.path if has_mask_file else f'{own.path} > 0'
    try:
        mask = check.binary(own.path, own.array) if has_mask_file else grids.derive_mask(_mean_image(own.array))
        if not mask.any():
            raise DataError(f'{mask_path} is empty: no voxel is inside the mask; replace it or leave the subject out.')
    except DataError as error:
        fault(error)
        return None
    masks, lesion = {name: _move_mask(mask, own, volumes[name]) for name in volumes}, None
    if drawn := volumes.get('lesion'):
        try:
            lesion = check.binary(drawn.path, drawn.array)
            same_grid = has_mask_file and drawn.affine is own.affine
            check.lesion_inside(drawn.path, lesion, masks['lesion'], 0 if same_grid else 0.05, mask_path)
            lesion &= masks['lesion']
        except DataError as error:
            fault(error)
    limits, notes, times = {}, [], None
    for name in ('source', *targets):
        try:
            check.covers(volumes[name], masks[name], own, mask, mask_path)
            limits[name] = _limits(spec, name, volumes[name], masks[name], report)
        except DataError as error:
            fault(error)
    try:
        times = check.times(spec, source, notes, report) if spec.frames else None
    except DataError as error:
        fault(error)
    if spec.mask and not has_mask_file:
        notes.append(f'no --input_mask was given, though the settings have mask = {spec.mask}: the mask is source > 0')

    # The working grid: that of the source (resample: of the first target, where it is there), turned, spaced, cropped.
    shape, affine = _reference(spec, id, files, volumes)
    if spec.resample and not targets and None in spec.spacing and affine is source.affine:
        notes.append('no target: the slices are those of the source; in training they were those of the first target')
    shape, affine = grids.turn_and_space(shape, affine, spec.spacing)
    working = grids.onto(mask[None].astype(np.float32), own.affine, affine, shape)[0] >= 0.5
    size = (*(spec.image_size or (None,) * spec.spatial_dims), None)[:3]
    extent = np.diff(grids.extent(working))[:, 0].tolist()
    if report is not None and (gap := check.gap(mask_path, working.any(axis=(0, 1)), spec.context)):
        fault(gap)
    if not working.any():
        fault(DataError(f'{mask_path} is empty on the working grid; check its affine, lower spacing = {spec.spacing}.'))
    elif any(n and n < m for n, m in zip(size, extent, strict=True)):
        fault(DataError(f'{mask_path} spans {tuple(extent[:spec.spatial_dims])} voxels of the working grid, more than '
                        f'image_size = {spec.image_size}; raise image_size, or raise spacing = {spec.spacing}.'))
    if report is not None:
        report['extent'] = extent
        if lesion is not None:
            report['lesion_ml'] = lesion.sum() * abs(np.linalg.det(volumes['lesion'].affine[:3, :3])) / 1000
        return None
    grid = grids.crop_to_mask(working, affine, size)

    flat = spec.spatial_dims == 2
    work_mask = _binary_onto(mask, own.affine, grid, flat)

    def image_onto(name, array):
        """array (C, X, Y, Z) of a volume -> (N, C, *S), scaled, -1 outside the mask."""
        out, view = _empty(len(array), grid, flat)
        grids.onto_inside(array, masks[name], volumes[name].affine, grid[1], grid[0], view)
        vol.scale(out, limits[name])
        np.copyto(out, -1, where=work_mask == 0)
        return out

    target = [image_onto(name, volumes[name].array[None]) for name in targets]
    frames = vol.resample_time(source.array, *times) if times else source.array[..., None]
    return Subject(
        id=id, spec=spec, mask=work_mask, source=image_onto('source', np.moveaxis(frames, -1, 0)),
        target=np.concatenate(target, axis=1) if target else None,
        lesion=None if lesion is None else _binary_onto(lesion, volumes['lesion'].affine, grid, flat) * work_mask,
        native_mask=masks['source'],
        native_lesion=None if lesion is None else _move_mask(lesion, volumes['lesion'], source),
        shape=source.shape, affine=source.affine, geometry=source.geometry, grid=grid,
        volumes={name: (volumes[name], masks[name], limits[name]) for name in targets}, notes=notes)


def _limits(spec, name, volume, mask, report):
    """The values that become -1 and 1; DataError if those inside the mask do not vary or are in another unit."""
    values = volume.array.T[..., mask.T]  # the file's own order of voxels: no strided reads
    check.varies(volume.path, values)
    few = values.ravel()[::max(1, values.size // 200_000)]  # enough for a look at the unit
    kind = {'ctp2dwi': 'ctp'}.get(spec.task) if name == 'source' else name
    check.units(volume.path, kind, name, few, spec.unit_scale.get(name, 1))
    if report is not None:
        report['volumes'][name]['percentiles'] = np.percentile(few, (1, 50, 99))
    try:
        return vol.scaling_limits(spec.scaling[name], values)
    except ValueError as error:
        raise DataError(f'{volume.path} cannot be scaled: {error}; correct it, or scaling in config.py.') from error


def _reference(spec, id, files, volumes):
    """Shape and affine of the grid that the working grid is made from."""
    if spec.resample and files is None and spec.target_names:
        first = volumes.get(spec.target_names[0])
        try:
            return (first.shape, first.affine) if first else vol.read_grid(spec.path(spec.target_names[0], id))
        except MissingFile:
            pass  # an ID without truth
    return volumes['source'].shape, volumes['source'].affine


def _empty(channels, grid, flat):
    """An array (N, C, *S) and its view as (C, X, Y, Z)."""
    (x, y, z), _ = grid
    out = np.empty((z, channels, x, y) if flat else (1, channels, x, y, z), np.float32)
    return out, out.transpose(1, 2, 3, 0) if flat else out[0]


def _binary_onto(array, affine, grid, flat):
    """A mask (X, Y, Z) bool -> (N, 1, *S) float32 0 or 1."""
    out, view = _empty(1, grid, flat)
    grids.onto(array[None].astype(np.float32), affine, grid[1], grid[0], view)
    return (out >= 0.5).astype(np.float32)


def _read_files(spec, id, files, with_truth, fault, report):
    """dict name -> Volume of all files that can be read and lie on one grid (or anywhere, with resample)."""
    volumes = {}
    for name in spec.names(with_truth) if files is None else list(filter(files.get, ('source', 'mask', 'lesion'))):
        try:
            path = spec.path(name, id) if files is None else files[name]
            if not os.path.isfile(path):
                raise DataError(f'{path} is missing; correct the path.')
            volume = vol.read_volume(path)
            check.dimensions(volume, bool(spec.frames) if name == 'source' else None)
            if (factor := spec.unit_scale.get(name, 1)) != 1:
                volume.array *= np.float32(factor)
            if report is not None:
                report['volumes'][name] = check.facts(volume, spec.frame_interval)
            volumes[name] = volume
        except DataError as error:
            if name == 'lesion' and not (report and with_truth) and isinstance(error, MissingFile):
                continue  # needed in training only: Cohort asks for it
            fault(error)
    return _same_grid(volumes, spec.resample, fault)


def _same_grid(volumes, resample, fault):
    """The volumes that lie on the grid of most of them (resample: all), without differences below the tolerance."""
    groups = []  # volumes on one grid; that of the source comes first
    for volume in volumes.values():
        for group in groups:
            if not grids.difference(volume.shape, volume.affine, group[0].shape, group[0].affine):
                volume.affine = group[0].affine
                group.append(volume)
                break
        else:
            groups.append([volume])
    most = max(groups, key=len, default=None)
    for group in groups:
        if group is not most and not resample:
            here, there = grids.difference(group[0].shape, group[0].affine, most[0].shape, most[0].affine)
            for volume in group:
                fault(DataError(f'{volume.path} has {here}, but {most[0].path} has {there}; correct one, or set '
                                f"resample = True to bring all onto the first target's grid."))
                volumes = {name: other for name, other in volumes.items() if other is not volume}
    return volumes


def _mean_image(array):
    return array if array.ndim == 3 else array.mean(axis=3, dtype=np.float32)


def _move_mask(mask, own, other):
    """A mask on its own volume's grid -> bool on another volume's grid."""
    if own.affine is other.affine:
        return mask
    return grids.onto(mask[None].astype(np.float32), own.affine, other.affine, other.shape)[0] >= 0.5
