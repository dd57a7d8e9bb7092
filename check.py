"""What may be wrong with the values of a volume, and the report of `python dataset.py` about a whole data set."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
from tqdm import tqdm

from volume import DataError, time_points

# In-mask medians of a plausible volume, and its unit. The key is the volume's name; a stroke source is 'ctp'.
PLAUSIBLE = {'adc': (300, 2000, '1e-6 mm^2/s'), 'ctp': (0, 100, 'HU'), 'suvr': (0.3, 3, 'SUVR')}


# ----------------------------------------------------------------------------------------------------------------------
# One volume

def dimensions(volume, frames):
    """DataError unless a source has 4 dimensions where frames are set and 3 where not; frames None: not a source."""
    path, shape = volume.path, volume.array.shape
    if frames and len(shape) == 3:
        raise DataError(f'{path} has no frames: 3 dimensions {shape} where a 4D series is expected; give the 4D file, '
                        f'or set frames = None for a 3D source.')
    if len(shape) != (4 if frames else 3):
        more = '' if frames is None else ', or set frames for a 4D source'
        raise DataError(f'{path} has {len(shape)} dimensions {shape}, expected 3; give the 3D file{more}.')


def binary(path, array):
    """Mask or lesion as bool; DataError if it holds anything but 0 and 1."""
    inside = array > 0.5
    worst = np.abs(array - inside).max()
    if worst > 1e-3:
        odd = float(array.flat[np.abs(array - inside).argmax()])
        raise DataError(f'{path} must hold only 0 and 1 but has the value {odd:.4g}; binarise it, for instance as '
                        f'(value > 0).')
    return inside


def lesion_inside(path, lesion, mask, share, mask_path):
    """DataError if more than a share of the lesion lies outside the mask."""
    outside, count = int((lesion & ~mask).sum()), int(lesion.sum())
    if outside > share * count:
        raise DataError(f'{path} has {outside} of {count} lesion voxels outside the mask ({mask_path}); correct the '
                        f'lesion or the mask.')


def gap(path, brain, context):
    """DataError for slices without brain (N, bool) between others: training would put those around them side by side.

    None where there are none, or where the networks see single slices.
    """
    places = np.flatnonzero(brain)
    empty = places[-1] - places[0] + 1 - len(places) if context and len(places) else 0
    said = f'{path} is empty in {empty} slices between others; fill them, or set context = 0.'
    return DataError(said) if empty else None


def covers(volume, inside, own, mask, mask_path):
    """DataError if a volume's field of view holds less than 80 % of the mask, which lies on the grid of `own`."""
    voxel = [abs(np.linalg.det(one.affine[:3, :3])) for one in (volume, own)]
    share = inside.sum() * voxel[0] / (mask.sum() * voxel[1])
    if share < 0.8:
        raise DataError(f'{volume.path} covers only {share:.0%} of the mask ({mask_path}); check the affines of '
                        'both, or, where a scan covers a slab, cut mask and lesion to it.')


def varies(path, values):
    """DataError if all values in the mask are the same."""
    lo, hi = float(values.min()), float(values.max())
    if not hi > lo:
        raise DataError(f'{path} is constant inside the mask (all {lo:.4g}); replace it or leave the subject out.')


def units(path, kind, name, values, factor):
    """DataError if the in-mask median (after unit_scale) is out of the plausible range; names the likely unit."""
    if kind not in PLAUSIBLE:
        return
    lo, hi, unit = PLAUSIBLE[kind]
    median = float(np.median(values))
    if not lo <= median <= hi:
        raise DataError(f'{path} has an in-mask median of {median:.4g}, expected {lo:g}..{hi:g} in {unit}; '
                        f'{_likely_unit(kind, name, median, factor)}.')


def _likely_unit(kind, name, median, factor):
    """The remedy: the power of ten that makes the median plausible, or what else the file may hold."""
    lo, hi, unit = PLAUSIBLE[kind]
    middle = {'adc': 800, 'ctp': 32, 'suvr': 1.2}[kind]
    power = round(np.log10(middle / median)) if median > 0 else 0
    scaled = median * 10.0 ** power
    if kind == 'ctp':
        if median < 0:
            return "the mask reaches into air or the file is not in HU: check the mask, or convert to HU"
        if 900 < median < 1200:
            return 'the likely unit is HU + 1024: subtract 1024 and save again'
        lo = 10
    if kind == 'suvr' and power < -3:
        return 'the likely unit is Bq/ml: divide by the mean of the cerebellum and save as SUVR'
    if not power or not lo <= scaled <= hi:
        return f"convert the file to {unit}, or set unit_scale['{name}']"
    likely = {('adc', 6): 'mm^2/s', ('suvr', -2): 'percent'}.get(
        (kind, power), f'1e{power - 6} mm^2/s' if kind == 'adc' else f'1e{power} {unit}')
    wanted = f'{factor * 10.0 ** power:g}'.replace('e+0', 'e')
    return f"the likely unit is {likely}: set unit_scale['{name}'] = {wanted}"


def times(spec, source, notes, report):
    """Where the time points lie among the source's frames, and how far apart (volume.time_points); DataError."""
    places, apart, left = time_points(source, spec.frames, spec.frame_interval, spec.frame_spacing)
    guessed = spec.frame_spacing and not spec.frame_interval and source.time_unit == 'unknown'
    if guessed:
        notes.append(f'{source.path} names no unit of time: its frames are taken to be {source.time_step:.4g} s apart; '
                     f'frame_interval says it for certain')
    if left > 0.05 * (spec.frame_spacing or 0):
        notes.append(f'{source.path} goes on for {left:.4g} s after the last time point; that part is left out')
    if report is not None:
        report['volumes']['source'].update(left=left, guessed=bool(guessed))
    return places, apart


def facts(volume, frame_interval):
    """What the summary says of a file."""
    frames = volume.array.shape[3] if volume.array.ndim == 4 else None
    orientation = ''.join(nib.aff2axcodes(volume.affine))
    spacing = tuple(round(float(x), 2) for x in np.linalg.norm(volume.affine[:3, :3], axis=0))
    step = frame_interval or volume.time_step  # s; 0: not known
    return dict(shape=volume.shape, spacing=spacing, orientation=orientation, frames=frames, step=step)


# ----------------------------------------------------------------------------------------------------------------------
# The whole data set

GEOMETRY = {'shape': 'shape', 'spacing': 'spacing mm', 'orientation': 'orientation'}


def report(lists, faults, inspect, threads, spec):
    """
    Inspect every subject of every list once, print faults ('ID: sentence') and an indented summary; number of faults.

    lists: split -> IDs; faults: of the lists, as (ID, sentence); inspect: function ID -> dict(faults, volumes, ...);
    spec: subject.Spec, for what the summary says of time points.
    """
    ids = list(dict.fromkeys(id for names in lists.values() for id in names))
    with ThreadPoolExecutor(threads) as pool:
        progress = tqdm(pool.map(inspect, ids), total=len(ids), desc='checking', unit=' subjects', file=sys.stderr)
        found = dict(zip(ids, progress, strict=True))
    faults = faults + [(id, sentence) for id in ids for sentence in found[id]['faults']]
    for id, sentence in faults:
        print(f'{id}: {" ".join(sentence.split())}')
    for line in summary(lists, found, spec):
        print(f'  {line}')  # indented: no line but a fault's starts with an ID
    wrong = len({id for id, _ in faults})
    print(f'  {len(faults)} faults in {wrong} places' if faults else f'  No fault in {len(ids)} subjects.')
    return len(faults)


def summary(lists, found, spec):
    """Lines about what was read: counts, geometry, intensities, frames, lesions, labels."""
    yield 'Subjects: ' + ', '.join(f'{len(names)} in {split}' for split, names in lists.items())
    names = list(dict.fromkeys(name for one in found.values() for name in one['volumes']))
    told = None
    for name in names:
        volumes = [one['volumes'][name] for one in found.values() if name in one['volumes']]
        yield f'{name}:'
        counts = {what: Counter(volume[what] for volume in volumes).most_common() for what in GEOMETRY}
        for what, values in counts.items() if counts != told else ():
            shown = ', '.join(f'{_plain(value)} ({count})' for value, count in values[:4])
            yield f'  {GEOMETRY[what]}: {shown}' + (f' and {len(values) - 4} more' if values[4:] else '')
        if counts == told:
            yield f'  {len(volumes)} files on the grids of {names[0]}'
        told = told or counts
        frames = Counter(volume['frames'] for volume in volumes if volume['frames'])
        if frames:
            yield '  frames: ' + ', '.join(f'{value} ({count})' for value, count in frames.most_common())
        yield from _times([volume for volume in volumes if volume['frames']], spec)
        percentiles = [volume['percentiles'] for volume in volumes if 'percentiles' in volume]
        if percentiles:
            low, middle, high = np.median(percentiles, axis=0)
            yield f'  in the mask: median {middle:.4g}, 1 % {low:.4g}, 99 % {high:.4g} (each the median over subjects)'
    extents = [one['extent'] for one in found.values() if 'extent' in one]
    if extents:
        yield f'largest mask on the working grid: {_plain(tuple(np.max(extents, axis=0)))} voxels'
    lesions = np.array([one['lesion_ml'] for one in found.values() if 'lesion_ml' in one])
    if len(lesions):
        yield (f'lesion: {len(lesions)} subjects, {int((lesions == 0).sum())} of them with an empty lesion; '
               f'volume median {np.median(lesions):.3g} ml, {lesions.min():.3g}..{lesions.max():.3g} ml')
    if any('label' in one for one in found.values()):
        for split, names in lists.items():
            counts = Counter(found[id]['label'] for id in names if 'label' in found[id])
            said = {spec.num_classes: 'not known'}
            yield f'labels in {split}: ' + ', '.join(f'{said.get(k, k)}: {n}' for k, n in sorted(counts.items()))


def _times(series, spec):
    """Lines about the time course of 4D files, and what becomes of it."""
    if not series:
        return
    ends = [volume['step'] * (volume['frames'] - 1) for volume in series]
    yield f'  scan time: {min(ends):.4g}..{max(ends):.4g} s from the first to the last frame'
    left, apart = [volume.get('left', 0) for volume in series], spec.frame_spacing
    guessed = sum(volume.get('guessed', False) for volume in series)
    if apart:
        yield f'  time points: {spec.frames}, every {apart:g} s, up to {(spec.frames - 1) * apart:g} s'
        if max(left) > 0.05 * apart:
            count = sum(x > 0.05 * apart for x in left)
            yield f'  Note: {count} scans go on after that, for up to {max(left):.4g} s, which is left out.'
        if guessed:
            yield f'  Note: {guessed} headers name no unit of time; frame_interval in config.py says it for certain.'
    elif spec.frames:
        yield f'  time points: {spec.frames}, spread evenly over each scan'
        if min(ends) <= 0:
            yield '  Note: some headers have no time step between frames; frame_interval in config.py states it.'
        elif max(ends) > 1.1 * min(ends):
            yield (f'  Note: scans of different length come out at different times; for the same times in all, set '
                   f'frame_spacing = {np.floor(100 * min(ends) / max(1, spec.frames - 1)) / 100:g} or less.')


def _plain(value):
    return ' x '.join(f'{x:g}' for x in value) if isinstance(value, tuple) else value
