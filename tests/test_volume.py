"""Volumes and grids: the way to the working grid and back, headers, real-world files, intensities."""
import gzip
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
from made_data import OBLIQUE, affine, amyloid_settings, settings, spec, volumes, write

import dataset
import grid
import volume
from volume import DataError

SHIPPED = os.path.join(os.path.dirname(nib.__file__), 'tests', 'data')


# ----------------------------------------------------------------------------------------------------------------------
# There and back

GRIDS = {
    'ras': ((14, 17, 5), affine()),
    'las oblique': ((14, 17, 5), OBLIQUE),
    'anisotropic': ((21, 9, 11), affine('RAS', (1.0, 2.5, 4.0), (3, 2, -7))),
    'sagittal': ((9, 21, 13), affine('PIR', (3.0, 2.0, 2.0), (4, 0, 3))),
    'odd and larger than image_size': ((33, 31, 7), affine('LPS', (2.0, 2.0, 5.0), (0, 0, 20))),
}


def one_subject(shape, matrix, folder='new', **codes):
    """Files of one subject whose brain fits 16 x 20 voxels: source = a number of its own for each voxel."""
    arrays = volumes(tuple(min(n, 15) for n in shape))
    pads = [(n - m, 0) for n, m in zip(shape, arrays['mask'].shape, strict=True)]  # off centre
    arrays = {name: np.pad(a, pads + [(0, 0)] * (a.ndim - 3)) for name, a in arrays.items()}
    for name in ('ctp', 'dwi', 'adc', 'mask', 'lesion'):
        write(f'{folder}/n1/{name}.nii.gz', arrays[name], matrix, **codes)
    return arrays


@pytest.mark.parametrize('name', GRIDS)
def test_without_spacing_values_come_back_exactly(name):
    shape, matrix = GRIDS[name]
    arrays = one_subject(shape, matrix)
    subject = dataset.load_subject(spec('--image_size', '(32, 32)', root='new'), 'n1')
    inside = arrays['mask']
    assert subject.shape == shape and np.array_equal(subject.native_mask, inside)
    assert np.array_equal(subject.native_lesion, arrays['lesion']) and subject.lesion.sum() == arrays['lesion'].sum()
    assert subject.mask.sum() == inside.sum()  # nothing cut, nothing interpolated

    # Known pattern: the working arrays hold the scaled values, the result the file's own.
    back, truth = subject.to_native(subject.target), subject.truth()
    assert np.allclose(back['adc'][inside], arrays['adc'][inside], atol=1e-3)
    assert np.allclose(truth['adc'], arrays['adc'].astype(np.float32), atol=0)
    assert np.allclose(truth['dwi'][inside], arrays['dwi'][inside] / np.median(arrays['dwi'][inside]), rtol=1e-5)
    assert np.all(back['adc'][~inside] == 0) and np.all(
        subject.target[np.broadcast_to(subject.mask, subject.target.shape) == 0] == -1
    )
    raw = subject.to_native_raw(subject.source)
    assert raw.shape == (*shape, 6)
    assert np.abs((raw[inside] + 1) * 50 - arrays['ctp'][inside]).max() < 1e-3


@pytest.mark.parametrize('name', GRIDS)
def test_turned_to_ras(name):
    """Axis 0 of the working grid runs to the right, 1 forward, 2 up; the slices are axial."""
    shape, matrix = GRIDS[name]
    one_subject(shape, matrix)
    subject = dataset.load_subject(spec('--image_size', '(32, 32)', root='new'), 'n1')
    assert nib.aff2axcodes(subject.grid[1]) == ('R', 'A', 'S')
    assert len(subject.source) == shape[subject.axial_axis] == subject.grid[0][2]
    centre = np.argwhere(subject.native_lesion).mean(0) @ subject.affine[:3, :3].T + subject.affine[:3, 3]
    z, x, y = np.argwhere(subject.lesion[:, 0]).mean(0)
    assert np.allclose(subject.grid[1][:3, :3] @ (x, y, z) + subject.grid[1][:3, 3], centre, atol=1e-3)


@pytest.mark.parametrize('name', GRIDS)
@pytest.mark.parametrize('resample', [False, True])
def test_with_spacing_a_smooth_pattern_comes_back(name, resample):
    """A linear pattern of world coordinates, through another spacing (resample: another grid) and back, lands on it."""
    shape, matrix = GRIDS[name]
    arrays = one_subject(shape, matrix)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing='ij'), -1)
    world = (index - np.array(shape) / 2) @ matrix[:3, :3].T
    pattern = 1000 + world @ (8.0, -6.0, 5.0)
    write('new/n1/adc.nii.gz', pattern, matrix)
    if resample:  # the first target's grid is another one, oblique to the source's
        other = affine('RPS', (2.0, 2.5, 3.0), (5, -4, 9))
        to_shape = (40, 44, 40)
        centre = matrix @ (*(np.array(shape) / 2), 1)
        other[:3, 3] = centre[:3] - other[:3, :3] @ (np.array(to_shape) / 2)
        write(
            'new/n1/dwi.nii.gz',
            grid.onto(arrays['dwi'][None].astype(np.float32), matrix, other, to_shape)[0] + 1,
            other,
        )
    words = '--spacing', '(2.2, 2.4, None)', '--image_size', '(64, 64)', '--resample', str(resample)
    subject = dataset.load_subject(spec(*words, root='new'), 'n1')
    assert np.linalg.norm(subject.grid[1][:3, :3], axis=0)[:2] == pytest.approx((2.2, 2.4))
    adc = subject.to_native(subject.target)['adc']
    assert adc.shape == shape and np.array_equal(adc != 0, arrays['mask'])
    inner = np.abs(adc - pattern)[arrays['mask']]
    assert np.median(inner) < 3 and inner.max() < 60  # 1 voxel is about 20; the rim has neighbours on one side only
    assert np.allclose(subject.truth()['adc'][arrays['mask']], pattern[arrays['mask']], atol=1e-2)
    assert abs(subject.mask.sum() * np.linalg.det(subject.grid[1][:3, :3]) / np.linalg.det(matrix[:3, :3]) /
               arrays['mask'].sum()) == pytest.approx(1, abs=0.15)


def test_requested_spacing_that_is_the_files_own_copies():
    one_subject((14, 17, 5), OBLIQUE)
    exact = dataset.load_subject(spec(root='new'), 'n1')
    same = dataset.load_subject(spec('--spacing', '(3.001, 2.999, 5)', root='new'), 'n1')
    assert np.array_equal(exact.source, same.source) and np.array_equal(exact.target, same.target)
    assert np.array_equal(exact.to_native(exact.target)['dwi'], same.to_native(same.target)['dwi'])


def test_cropping_is_around_the_mask():
    one_subject((33, 31, 7), affine())
    subject = dataset.load_subject(spec(root='new'), 'n1')  # image_size 16 x 20, the brain in a far corner
    line = np.flatnonzero(subject.mask.any(axis=(0, 1, 3)))
    assert abs((line[0] + line[-1]) / 2 - 7.5) <= 0.5
    with pytest.raises(
        DataError, match=r'n1: .*mask.nii.gz spans \(13, 13\) voxels.*image_size = \(12, 20\).*raise spacing'
    ):
        dataset.load_subject(spec('--image_size', '(12, 20)', root='new'), 'n1')


def test_tensors_are_taken_too():
    torch = pytest.importorskip('torch')
    one_subject((14, 17, 5), OBLIQUE)
    subject = dataset.load_subject(spec(root='new'), 'n1')
    pred = torch.tensor(subject.target, requires_grad=True)
    assert np.array_equal(subject.to_native(pred)['adc'], subject.to_native(subject.target)['adc'])


def test_single_slices_are_scans_too():
    one_subject((14, 17, 1), affine(angles=(0, 0, 10)))
    subject = dataset.load_subject(spec('--spacing', '(2, 2, None)', '--image_size', '(32, 32)', root='new'), 'n1')
    assert subject.source.shape == (1, 6, 32, 32) and subject.to_native(subject.target)['adc'].shape == (14, 17, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Written files

@pytest.mark.parametrize('sform, qform', [(1, 1), (2, 0), (0, 3), (4, 1), (0, 0)])
@pytest.mark.parametrize('grid, words', [
    ('las oblique', ()), ('sagittal', ('--spacing', '(2.5, 2.5, None)')), ('anisotropic', ('--resample', 'True')),
    ('odd and larger than image_size', ('--spacing', '(2.5, 2.5, 4)', '--resample', 'True'))])
def test_header_of_the_source_is_kept(sform, qform, grid, words):
    shape, matrix = GRIDS[grid]
    one_subject(shape, matrix, sform=sform, qform=qform)
    subject = dataset.load_subject(spec('--image_size', '(32, 32)', *words, root='new'), 'n1')
    dataset.write_volume('out/adc.nii.gz', subject.to_native(subject.target)['adc'], subject)
    source, written = nib.load('new/n1/ctp.nii.gz'), nib.load('out/adc.nii.gz')
    assert written.shape == source.shape[:3] and written.get_data_dtype() == np.float32
    assert np.array_equal(written.affine, source.affine)
    with gzip.open('out/adc.nii.gz') as file:  # nibabel's loaded header does not tell
        on_disk = nib.Nifti1Header.from_fileobj(file)
    assert on_disk['scl_slope'] == 1 and on_disk['scl_inter'] == 0
    if (sform, qform) == (0, 0):
        assert written.header['sform_code'] == written.header['qform_code'] == 1
        assert np.allclose(written.get_qform(), source.affine, atol=1e-4)
    else:
        for field in volume.GEOMETRY_FIELDS:
            assert np.array_equal(written.header[field], source.header[field])
        assert np.array_equal(written.get_sform(), source.get_sform())
        assert np.allclose(written.get_qform(), source.get_qform())
    assert written.header.get_zooms() == source.header.get_zooms()[:3]


def test_writing_leaves_no_half_file(monkeypatch):
    one_subject((14, 17, 5), OBLIQUE)
    subject = dataset.load_subject(spec(root='new'), 'n1')
    dataset.write_volume('out/x.nii.gz', np.zeros(subject.shape), subject)

    def full(img, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(nib, 'save', full)
    with pytest.raises(DataError, match='out/x.nii.gz cannot be written .No space left on device.; free space'):
        dataset.write_volume('out/x.nii.gz', np.ones(subject.shape), subject)
    assert os.listdir('out') == ['x.nii.gz'] and nib.load('out/x.nii.gz').get_fdata().max() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Files as they come

@pytest.mark.parametrize(
    'name, ndim',
    [
        ('anatomical.nii', 3),
        ('functional.nii', 4),
        ('standard.nii.gz', 3),
        ('example4d.nii.gz', 4),
        ('example_nifti2.nii.gz', 4),
        ('reoriented_anat_moved.nii', 3),
        ('test.mgz', 4),
    ],
)
def test_files_that_nibabel_ships(name, ndim):
    read = volume.read_volume(f'{SHIPPED}/{name}')
    img = nib.load(f'{SHIPPED}/{name}')
    assert read.array.dtype == np.float32 and read.array.ndim == ndim
    assert np.allclose(read.array, img.get_fdata().reshape(read.array.shape, order='F'), rtol=1e-6)
    assert np.allclose(read.affine, img.affine)


def test_a_shipped_file_with_nan():
    with pytest.raises(DataError, match='resampled_anat_moved.nii has NaN or infinity in 153 of 1071 voxels'):
        volume.read_volume(f'{SHIPPED}/resampled_anat_moved.nii')


@pytest.mark.parametrize(
    'kind', ['big-endian', 'int16 with slope', 'img and hdr', 'nifti2', 'wrong gz', 'gz without suffix', 'float64']
)
def test_kinds_of_nifti(kind):
    array = np.round(np.random.default_rng(0).normal(100, 20, (6, 5, 4)))
    path = {'img and hdr': 'x.img', 'gz without suffix': 'x.nii', 'float64': 'x.nii.gz'}.get(kind, 'x.nii')
    header = nib.Nifti1Header(endianness='>') if kind == 'big-endian' else None
    img = (nib.Nifti2Image if kind == 'nifti2' else nib.Nifti1Pair if kind == 'img and hdr' else nib.Nifti1Image)(
        array, OBLIQUE, header
    )
    if kind == 'int16 with slope':
        img.header.set_data_dtype(np.int16)
    nib.save(img, path)
    if kind == 'wrong gz':
        shutil.move('x.nii', path := 'x.nii.gz')
    if kind == 'gz without suffix':
        with open('x.nii', 'rb') as file:
            packed = gzip.compress(file.read())
        with open('x.nii', 'wb') as file:
            file.write(packed)
    read = volume.read_volume(path)
    assert np.allclose(read.array, array, atol=0.01) and np.allclose(read.affine, OBLIQUE, atol=1e-4)
    assert read.array.dtype == np.float32


def test_unusual_sources_end_to_end():
    """.mgz and .img sources have no qform to copy: the result carries their affine in both."""
    arrays = volumes((12, 14, 12))
    nib.save(nib.MGHImage(arrays['mri'].astype(np.float32), OBLIQUE), 'x.mgz')
    nib.save(nib.Nifti1Pair(arrays['mri'].astype(np.float32), OBLIQUE), 'x.img')
    for path in ('x.mgz', 'x.img'):
        subject = dataset.load_subject(dataset.Spec.from_settings(amyloid_settings()), files={'source': path})
        dataset.write_volume('out.nii.gz', np.ones(subject.shape), subject)
        assert np.allclose(nib.load('out.nii.gz').affine, OBLIQUE, atol=1e-4)


def test_trailing_axes_of_length_1_are_dropped():
    write('x.nii.gz', np.ones((6, 5, 4, 1)))
    assert volume.read_volume('x.nii.gz').array.shape == (6, 5, 4)
    write('y.nii.gz', np.arange(480.0).reshape(6, 5, 4, 1, 4))
    read = volume.read_volume('y.nii.gz').array
    assert read.shape == (6, 5, 4, 4) and read[1, 2, 3, 2] == np.arange(480.0).reshape(6, 5, 4, 4)[1, 2, 3, 2]


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', 'is empty'),
        (b'hello world', 'not NIfTI'),
        (bytes(128) + b'DICM' + bytes(300), 'dcm2niix'),
        (bytes(5000), 'not NIfTI'),
        (b'\x1f\x8bxxxxxxxxxxxxxxxxxx', 'truncated or damaged'),
    ],
)
def test_not_nifti(content, words):
    with open('x.nii.gz', 'wb') as file:
        file.write(content)
    with pytest.raises(DataError, match=f'x.nii.gz.*{words}'):
        volume.read_volume('x.nii.gz')


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz', '.mgz'])
def test_truncated_anywhere(suffix):
    """However much of a file is left, one sentence says so."""
    array = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    nib.save(nib.MGHImage(array, np.eye(4)) if suffix == '.mgz' else nib.Nifti1Image(array, np.eye(4)), f'x{suffix}')
    with open(f'x{suffix}', 'rb') as file:
        whole = file.read()
    for part in (
        10,
        200,
        347,
        360,
        len(whole) // 2,
        len(whole) - (9 if suffix != '.mgz' else 99),
    ):  # .mgz ends in remarks
        with open(f'x{suffix}', 'wb') as file:
            file.write(whole[:part])
        with pytest.raises(DataError, match='x[.].*(truncated|NIfTI|damaged|empty)'):
            volume.read_volume(f'x{suffix}')


@pytest.mark.parametrize(
    'dtype, words', [(np.complex64, 'complex'), ([('R', 'u1'), ('G', 'u1'), ('B', 'u1')], 'colours')]
)
def test_no_plain_numbers(dtype, words):
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), dtype), np.eye(4)), 'x.nii')
    with pytest.raises(DataError, match=words):
        volume.read_volume('x.nii')


# ----------------------------------------------------------------------------------------------------------------------
# Frames, intensities, masks

def curve(t):
    """A bolus of known shape (gamma variate, peak at 19.5 s) on a baseline of 30 HU."""
    rise = np.maximum(0, t - 10) / 9.5
    return 30 + 60 * rise ** 3 * np.exp(3 * (1 - rise))


def scan(count, step, shape=(3, 3, 2), unit='sec', course=curve, path='ctp.nii.gz'):
    """A file of `count` frames, `step` s apart, all voxels with the same time course; its header says so in `unit`."""
    write(path, np.broadcast_to(course(np.arange(count) * step), (*shape, count)), affine(), unit=unit,
          step=step / {'msec': 1e-3, 'usec': 1e-6}.get(unit, 1))
    return volume.read_volume(path)


def brought_to(read, frames, *rule):
    places, apart, _ = volume.time_points(read, frames, *rule)
    out = volume.resample_time(read.array, places, apart)
    assert out.shape == (*read.shape, frames) and out.dtype == np.float32
    assert np.ptp(out.reshape(-1, frames), axis=0).max() < 1e-3
    return out[0, 0, 0]


@pytest.mark.parametrize('count', [4, 15, 43, 49, 200])
def test_whole_scan_is_spread_over_the_time_points(count):
    """frame_spacing None: whatever the number of frames, the first and the last stay, and a straight line is one."""
    read = scan(count, 2.0, course=lambda t: 7 + 3 * t)
    assert np.allclose(brought_to(read, 15), np.linspace(7, 7 + 3 * 2 * (count - 1), 15), rtol=1e-5)
    if count == 15:
        assert volume.resample_time(read.array, *volume.time_points(read, 15)[:2]) is read.array
    assert brought_to(read, 1) == pytest.approx(7 + 3 * (count - 1), rel=1e-5)


@pytest.mark.parametrize('unit', ['sec', 'msec', 'usec', 'unknown'])
@pytest.mark.parametrize('count, step', [(49, 1.0), (43, 1.0), (25, 2.0), (13, 3.5), (90, 0.5), (15, 3.0)])
def test_scans_of_a_cohort_come_out_at_the_same_times(count, step, unit):
    """Another number of frames, step, length or unit in the header: the same bolus at 0, 3, 6 .. 42 s, in seconds."""
    times = np.arange(15) * 3.0
    out = brought_to(scan(count, step, unit=unit), 15, None, 3.0)
    # Lines between samples are off by f'' step^2 / 8 at most, the mean over a window of 3 s - step by f'' / 6 of half
    # of it squared; f'' is at most 4.5 HU/s^2 here.
    bend = np.abs(np.diff(curve(np.arange(0, 60, 0.01)), 2)).max() / 0.01 ** 2
    assert np.abs(out - curve(times)).max() <= bend * (step ** 2 / 8 + max(0, 3 - step) ** 2 / 24) < 7
    line = brought_to(scan(count, step, unit=unit, course=lambda t: 40 - t / 2), 15, None, 3.0)
    assert np.allclose(line, 40 - times / 2, atol=0.02)


def test_all_frames_count_where_there_are_more_of_them_than_time_points():
    """Between 1 s frames, time points 3 s apart are means: less noise than picking every third frame."""
    noise = np.random.default_rng(0).normal(0, 1, (20, 20, 5, 43)).astype(np.float32)
    out = volume.resample_time(noise, np.arange(15) * 3.0, 3.0)
    assert out[..., 1:-1].std() == pytest.approx((1 / 16 + 1 / 4 + 1 / 16) ** 0.5, abs=0.02)
    impulse = np.zeros((1, 1, 1, 43), np.float32)
    impulse[..., 6] = 1
    assert np.allclose(volume.resample_time(impulse, np.arange(15) * 3.0, 3.0)[0, 0, 0, :5], [0, 0, 0.5, 0, 0])


def test_frame_interval_overrides_the_header():
    """A header of another program: 1 s where the frames are 3 s apart."""
    write('ctp.nii.gz', np.broadcast_to(curve(np.arange(15) * 3.0), (3, 3, 2, 15)), affine(), step=1.0)
    out = brought_to(volume.read_volume('ctp.nii.gz'), 15, 3.0, 3.0)
    assert np.allclose(out, curve(np.arange(15) * 3.0), rtol=1e-5)


@pytest.mark.parametrize('count, step, unit, rule, sentence', [
    (20, 2.0, 'sec', (None, 3.0), r'ends after 38 s \(20 frames, 2 s apart\), but frames = 15 at frame_spacing = 3 '
                                  r'need 42 s; lower one, or leave the subject out'),
    (49, 1.0, 'sec', (0.5, 3.0), 'ends after 24 s'),
    (49, 0.0, 'sec', (None, 3.0), 'has no time step between frames in its header, .*set frame_interval'),
    (49, 2000.0, 'sec', (None, 3.0), 'has 2000 s between frames by its header, expected 0.1..60 s; .*frame_interval'),
    (49, 0.002, 'msec', (None, 3.0), 'has 0.002 s between frames by its header'),
    (49, 0.02, 'unknown', (None, 3.0), 'has 0.02 s between frames by its header'),
    (49, 2.0, 'hz', (None, 3.0), 'has no time step')])
def test_scans_that_do_not_reach_the_time_points(count, step, unit, rule, sentence):
    with pytest.raises(DataError, match=f'ctp.nii.gz {sentence}'):
        volume.time_points(scan(count, step, unit=unit), 15, *rule)


def test_a_little_short_of_the_last_time_point_is_rounding():
    assert np.allclose(brought_to(scan(15, 2.9999), 15, None, 3.0), curve(np.arange(15) * 2.9999), rtol=1e-3)


def test_frames_of_a_subject():
    write('a/n1/ctp.nii.gz', volumes(frames=49)['ctp'], step=1.0)
    for frames in (15, 49, 60):
        subject = dataset.load_subject(spec('--frames', str(frames)), files={'source': 'a/n1/ctp.nii.gz'})
        assert subject.source.shape[1] == frames
    words = '--frames', '15', '--frame_spacing', '3'
    subject = dataset.load_subject(spec(*words), files={'source': 'a/n1/ctp.nii.gz'})
    wanted = volume.resample_time(volume.read_volume('a/n1/ctp.nii.gz').array, np.arange(15) * 3.0, 3.0)
    back = (subject.to_native_raw(subject.source) + 1) * 50
    assert np.allclose(back[subject.native_mask], wanted[subject.native_mask], atol=1e-3)
    assert any('goes on for 6 s after the last time point; that part is left out' in note for note in subject.notes)


@pytest.mark.parametrize(
    'rule, units', [(('range', 0, 100), (0, 100)), (('median', 0, 3), (0, 3)), (('quantile', 0.01, 0.99), (0, 1))]
)
def test_scaling_and_its_inverse(rule, units):
    values = np.random.default_rng(0).gamma(9.0, 4.0, 5000).astype(np.float32)
    assert volume.scaling_range(rule) == units
    limits = volume.scaling_limits(rule, values)
    scaled = volume.scale(values.copy(), limits)
    assert scaled.min() >= -1 and scaled.max() <= 1 and scaled.dtype == np.float32
    assert np.allclose(volume.unscale(scaled, rule), np.clip(volume.to_units(values, rule, limits), *units), atol=1e-4)


def test_median_scaling_does_not_see_a_lesion():
    """The same healthy tissue has the same value with and without a lesion, which quantiles would not give."""
    healthy, ill = volumes(lesion=False), volumes(lesion=True)
    same = healthy['mask'] & ~ill['lesion']
    values = []
    for arrays in (healthy, ill):
        limits = volume.scaling_limits(('median', 0, 3), arrays['dwi'][arrays['mask']])
        values.append(volume.scale(arrays['dwi'].astype(np.float32), limits)[same])
    assert np.abs(values[0] - values[1]).max() < 0.02


def test_derived_mask():
    image = np.zeros((12, 12, 12))
    image[2:9, 2:9, 2:9] = 5
    image[5, 5, 5] = 0      # a hole
    image[11, 11, 11] = 9   # a speck
    mask = grid.derive_mask(image)
    assert mask[5, 5, 5] and not mask[11, 11, 11] and mask.sum() == 343


def test_affine_tolerance():
    assert grid.difference((4, 4, 4), OBLIQUE, (4, 4, 4), OBLIQUE + 1e-6) is None
    assert grid.difference((4, 4, 4), OBLIQUE, (4, 4, 5), OBLIQUE) == ('shape (4, 4, 4)', 'shape (4, 4, 5)')
    moved = OBLIQUE.copy()
    moved[1, 3] += 0.5
    assert grid.difference((4, 4, 4), OBLIQUE, (4, 4, 4), moved) == tuple(
        f'{value} in row 2, column 4 of the affine' for value in ('10', '10.5'))


def test_no_float64_arrays(monkeypatch):
    """A subject's arrays are float32 from the file to the network."""
    one_subject((14, 17, 5), OBLIQUE)
    assert settings().frames == 6
    subject = dataset.load_subject(spec('--spacing', '(2, 2, None)', '--image_size', '(32, 32)', root='new'), 'n1')
    arrays = subject.source, subject.target, subject.mask, subject.lesion, *subject.truth().values()
    arrays += tuple(subject.to_native(subject.target).values())
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


@pytest.mark.parametrize('scaling, known, units', [
    (dict(dwi=('median', 0, 3), adc=('range', 0, 3000)), True, ['multiples of the in-mask median', '1e-6 mm^2/s']),
    (dict(dwi=('range', 0, 2000), adc=('range', 0, 3000)), False, ['as in the files', '1e-6 mm^2/s']),
    (dict(dwi=('median', 0, 3), adc=('median', 0, 4)), False, 2 * ['multiples of the in-mask median']),
    (dict(suvr=('range', 0, 3)), True, ['SUVR']),
    (dict(suvr=('quantile', 0, 1)), False, ['in-mask quantile range, 0..1']),
    (dict(cbf=('range', 0, 9)), True, ['as in the files']), (dict(cbf=('quantile', 0, 1)), False, None)])
def test_units_follow_from_the_scaling(scaling, known, units):
    assert volume.in_units(dict(source=('quantile', 0, 1)) | scaling) == known
    assert units is None or [volume.unit_of(name, rule) for name, rule in scaling.items()] == units
