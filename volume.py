"""
Volumes in and out: reading NIfTI, frames, intensity scaling and its inverse, writing on the subject's own grid. One
volume at a time: grid.py brings it from one grid onto another, subject.py puts the volumes of a subject together.
"""

import gzip
import os
import zlib
from dataclasses import dataclass

import nibabel as nib
import numpy as np

SHORTEST_STEP, LONGEST_STEP = 0.1, 60  # s between two frames of a perfusion scan
GEOMETRY_FIELDS = ('qform_code', 'sform_code', 'quatern_b', 'quatern_c', 'quatern_d', 'qoffset_x', 'qoffset_y',
                   'qoffset_z', 'srow_x', 'srow_y', 'srow_z')


class DataError(ValueError):
    """Something is wrong with the user's data; the message is one sentence with file, values and remedy."""
    one_sentence = True


# ----------------------------------------------------------------------------------------------------------------------
# Reading

@dataclass
class Volume:
    """One file: array (X, Y, Z) or (X, Y, Z, T) float32, affine, the header's geometry fields, seconds a frame."""
    path: str
    array: np.ndarray
    affine: np.ndarray
    geometry: dict
    time_step: float = 0.0      # 0: the header does not say
    time_unit: str = ''         # 'unknown': the header gives a number alone

    @property
    def shape(self):
        return self.array.shape[:3]


def _kind(raw):
    """nibabel's class for the first bytes of a NIfTI file, or None."""
    return nib.Nifti1Image if raw[344:348] == b'n+1\0' else nib.Nifti2Image if raw[4:8] == b'n+2\0' else None


def _open(path, header_only=False):
    """nibabel image of a file; looks at the bytes, not at the suffix, so that a wrong .gz does no harm."""
    if not str(path).endswith(('.nii', '.nii.gz')):
        return nib.load(path)  # .mgz, .img + .hdr and what else nibabel knows
    with open(path, 'rb') as file:
        raw = file.read(1 << 16 if header_only else -1)
        if header_only and (kind := _kind(raw)):
            file.seek(0)
            return kind.from_stream(file)  # header extensions may be longer than what was read
    if raw[:2] == b'\x1f\x8b':
        raw = zlib.decompressobj(wbits=31).decompress(raw) if header_only else gzip.decompress(raw)
    if not raw:
        raise DataError(f'{path} is empty; copy it again.')
    if kind := _kind(raw):
        return kind.from_bytes(raw)
    hint = 'it is DICOM: convert it with dcm2niix' if raw[128:132] == b'DICM' else 'convert or copy it again'
    raise DataError(f'{path} is not NIfTI; {hint}.')


def read_volume(path):
    """
    Read a file once, as float32. Axes of length 1 after the third are dropped.

    Raises DataError if the file is truncated, is no NIfTI, holds no plain numbers, has fewer than 3 or more than 4
    dimensions, an unusable affine, or NaN or infinity anywhere.
    """
    try:
        img = _open(path)
        dtype = img.get_data_dtype()
        if dtype.fields or dtype.kind == 'c':
            raise DataError(f'{path} holds {"complex numbers" if dtype.kind == "c" else "colours"}, not intensities; '
                            f'convert it to a scalar image.')
        array = np.asanyarray(img.dataobj, dtype=np.float32)
    except (EOFError, OSError, zlib.error) as error:  # a short file, a damaged gzip stream
        raise DataError(f'{path} is truncated or damaged ({_one_line(error)}); copy it again.') from error
    except nib.filebasedimages.ImageFileError as error:
        raise DataError(f'{path} is not NIfTI; convert or copy it again.') from error
    except (nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError, ValueError, OverflowError,
            MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f'{path} cannot be read ({_one_line(error)}); is its header damaged? Copy it again.') from error

    shape = array.shape[:3] + tuple(n for n in array.shape[3:] if n != 1)
    if len(shape) not in (3, 4) or 0 in shape:
        raise DataError(f'{path} has {len(shape)} dimensions {array.shape}; expected a filled 3D or 4D volume.')
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):  # the minimum of an array with NaN is NaN
        bad = int((~np.isfinite(array)).sum())
        raise DataError(f'{path} has NaN or infinity in {bad} of {array.size} voxels; replace them, for instance by 0.')
    affine = np.asarray(img.affine, float)
    if (not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9
            or None in nib.aff2axcodes(affine)):
        raise DataError(f'{path} has an unusable affine {affine[:3].tolist()}; restore its header.')
    return Volume(str(path), array.reshape(shape, order='A'), affine, _geometry(img), *_time_step(img.header))


def read_grid(path):
    """Shape (X, Y, Z) and affine of a file, without its voxels."""
    try:
        img = _open(path, header_only=True)
        return tuple(img.shape[:3]), np.asarray(img.affine, float)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged header brings about; reading the voxels says more
        raise DataError(f'{path} cannot be read ({_one_line(error)}); copy it again.') from error


def failure(error):
    """Why a file could not be written; numpy's own error says only how much was."""
    return error.strerror or f'{error}: the disk is full'


def _one_line(error):
    return ' '.join(str(error).split())[:120] or type(error).__name__


def _geometry(img):
    """The qform and sform fields of a NIfTI header, as they are; for other formats none."""
    if not isinstance(img.header, nib.Nifti1Header):
        return {'qform_code': 0, 'sform_code': 0}
    fields = {name: np.array(img.header[name]).tolist() for name in GEOMETRY_FIELDS}
    return dict(fields, pixdim=np.array(img.header['pixdim']).tolist()[:4])


# ----------------------------------------------------------------------------------------------------------------------
# Time

def _time_step(header):
    """(seconds between two frames, unit): pixdim[4] by the unit in xyzt_units; 0 if the header does not say."""
    if not isinstance(header, nib.Nifti1Header) or header['dim'][0] < 4:
        return 0.0, ''
    unit = {0: 'unknown', 8: 'sec', 16: 'msec', 24: 'usec'}.get(int(header['xyzt_units']) & 0x38, '')
    step = abs(float(header['pixdim'][4]))
    if unit == 'unknown':  # a number alone: seconds, or milliseconds where seconds cannot be
        step *= 1.0 if step <= LONGEST_STEP else 1e-3
    step *= {'msec': 1e-3, 'usec': 1e-6, '': 0.0}.get(unit, 1.0)  # '': Hz, ppm, rad/s, so that the axis is not time
    return (step, unit) if np.isfinite(step) else (0.0, unit)


def time_points(volume, frames, frame_interval=None, frame_spacing=None):
    """
    The wanted time points: their places in the file's frames (frames,), how many frames apart, seconds left over.

    frame_spacing None: evenly over the scan, from its first frame to its last, whatever the time between them (nothing
    is left over). In seconds: at 0, 1, 2, ... frame_spacing after the first frame, by the header's time step or by
    frame_interval instead; DataError if there is no sensible one, or if the scan ends before the last time point.
    """
    path, count = volume.path, volume.array.shape[3]
    if frame_spacing is None:
        places = np.linspace(0, count - 1, frames) if frames > 1 else np.array([(count - 1) / 2])
        return places, (count - 1) / max(1, frames - 1), 0.0
    step = frame_interval or volume.time_step
    if not step:
        raise DataError(f'{path} has no time step between frames in its header, which frame_spacing = '
                        f'{frame_spacing:g} needs; set frame_interval to the seconds between its frames.')
    if not frame_interval and not SHORTEST_STEP <= step <= LONGEST_STEP:
        raise DataError(f'{path} has {step:.4g} s between frames by its header, expected {SHORTEST_STEP:g}..'
                        f'{LONGEST_STEP:g} s; correct it, or set frame_interval to the seconds between its frames.')
    end, wanted = (count - 1) * step, (frames - 1) * frame_spacing
    if wanted > end + 0.05 * step:
        raise DataError(f'{path} ends after {end:.4g} s ({count} frames, {step:.4g} s apart), but frames = {frames} at '
                        f'frame_spacing = {frame_spacing:g} need {wanted:.4g} s; lower one, or leave the subject out.')
    places = np.minimum(np.arange(frames) * frame_spacing / step, count - 1)
    return places, frame_spacing / step, max(0.0, end - wanted)


def resample_time(array, places, apart):
    """
    (X, Y, Z, T) -> (X, Y, Z, len(places)): the frames, joined by straight lines, at the given places among them.

    Where places are further apart than frames, averaged over the difference, against noise; at both ends of the scan
    over less, evenly to both sides, so that no time point moves. Frames that lie at the places are copied.
    """
    count = array.shape[3]
    if count == len(places) and np.abs(places - np.arange(count)).max() < 1e-3:
        return array
    out = np.zeros((*array.shape[:3], len(places)), np.float32, order='F')
    for j, x in enumerate(places):
        weights = _window(np.arange(count) - x, min((apart - 1) / 2, x, count - 1 - x))
        for i in np.flatnonzero(weights > 1e-6):
            out[..., j] += array[..., i] * np.float32(weights[i])
    return out


def _window(distance, half):
    """Weights of points at some distance (in frames) in the mean from -half to half of the lines that join them."""
    if half < 1e-3:
        return np.maximum(0, 1 - np.abs(distance))
    low, high = np.clip(distance - half, -1, 1), np.clip(distance + half, -1, 1)
    return (high - high * np.abs(high) / 2 - low + low * np.abs(low) / 2) / (2 * half)


# ----------------------------------------------------------------------------------------------------------------------
# Intensities: no state, each volume by itself

def scaling_range(rule):
    """(lo, hi) that a scaling rule maps to -1..1: physical units, multiples of the median, or 0..1 for quantiles."""
    return (0.0, 1.0) if rule[0] == 'quantile' else (float(rule[1]), float(rule[2]))


NEEDED = {'dwi': 'median', 'adc': 'range', 'suvr': 'range'}  # scalings of the lesion rule and of SUVR figures


def in_units(scaling):
    """Whether all targets of a `scaling` come out in the units that the lesion rule and the SUVR figures need."""
    return all(rule[0] == NEEDED.get(name, rule[0]) != 'quantile' for name, rule in scaling.items() if name != 'source')


def unit_of(name, rule):
    """In words, the unit in which a target scaled by `rule` is written, e.g. '1e-6 mm^2/s'."""
    if rule[0] == 'range':
        return {'adc': '1e-6 mm^2/s', 'suvr': 'SUVR'}.get(name, 'as in the files')
    return 'multiples of the in-mask median' if rule[0] == 'median' else 'in-mask quantile range, 0..1'


def scaling_limits(rule, values):
    """The file's values (lo, hi) that become -1 and 1, from those inside the mask; ValueError if they are no range."""
    kind, a, b = rule
    if kind == 'range':
        lo, hi = a, b
    elif kind == 'median':
        median = float(np.median(values))
        if median <= 0:
            raise ValueError(f'its median in the mask is {median:.4g}, so it cannot be divided by it')
        lo, hi = a * median, b * median
    elif kind == 'quantile':
        lo, hi = (float(q) for q in np.quantile(values, (a, b)))
    else:
        raise ValueError(f"scaling {kind!r} is unknown; use 'range', 'median' or 'quantile'")
    if not hi > lo:
        raise ValueError(f'its scaling {tuple(rule)} runs from {lo:.4g} to {hi:.4g}')
    return lo, hi


def scale(array, limits):
    """A file's values -> [-1, 1], clipped, in place."""
    lo, hi = limits
    array -= np.float32((lo + hi) / 2)
    array *= np.float32(2 / (hi - lo))
    return np.clip(array, -1, 1, out=array)


def unscale(array, rule):
    """[-1, 1] -> physical units (multiples of the median, 0..1 for quantiles); needs no truth."""
    lo, hi = scaling_range(rule)
    return np.clip(array, -1, 1) * np.float32((hi - lo) / 2) + np.float32((hi + lo) / 2)


def to_units(array, rule, limits):
    """A file's values -> the units of `unscale`, not clipped."""
    if rule[0] == 'range':
        return array
    (low, high), (lo, hi) = limits, scaling_range(rule)
    return (array - np.float32(low)) * np.float32((hi - lo) / (high - low)) + np.float32(lo)


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def write_volume(path, array, subject):
    """
    Write (X, Y, Z) or (X, Y, Z, C) on the subject's own grid: float32, slope 1, the source file's qform and sform.

    A source without either (both codes 0) gets both, with code 1. Written beside and moved: no half file is left.
    """
    array = np.asarray(array, np.float32)
    if array.shape[:3] != tuple(subject.shape):
        raise ValueError(f'{path}: array {array.shape} is not on the grid {tuple(subject.shape)} of {subject.id}')
    header, fields = nib.Nifti1Header(), dict(subject.geometry)
    header.set_data_shape(array.shape)
    header.set_xyzt_units('mm')
    if fields['qform_code'] == 0 and fields['sform_code'] == 0:
        header.set_qform(subject.affine, code=1)
        header.set_sform(subject.affine, code=1)
    else:
        header['pixdim'][:4] = fields.pop('pixdim')
        for name, value in fields.items():
            header[name] = value
    img = nib.Nifti1Image(array, header.get_best_affine(), header)
    img.header.set_data_dtype(np.float32)
    img.header.set_slope_inter(1, 0)
    folder, name = os.path.split(os.path.abspath(path))
    beside = os.path.join(folder, f'.{os.getpid()}.tmp.{name}')  # the suffix decides on compression
    try:
        os.makedirs(folder, exist_ok=True)
        nib.save(img, beside)
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f'{path} cannot be written ({failure(error)}); free space or choose another place.') from error
    finally:
        if os.path.exists(beside):
            os.remove(beside)
