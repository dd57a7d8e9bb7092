"""Subjects, faults, lists and labels, the cache, the loader and augmentation."""
import gzip
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from made_data import (
    OBLIQUE,
    amyloid_settings,
    settings,
    spec,
    volumes,
    write,
    write_amyloid,
    write_lists,
    write_stroke,
    write_table,
)

import dataset
import splits
import volume
from dataset import DataError


def check(capsys, cfg):
    """(exit code, fault lines, other lines) of the checker."""
    cfg.make_splits, cfg.without_truth = '', False
    code = dataset.main(cfg)
    lines = capsys.readouterr().out.splitlines()
    return (
        code,
        [line for line in lines if not line.startswith('  ')],
        [line for line in lines if line.startswith('  ')],
    )


# ----------------------------------------------------------------------------------------------------------------------
# Faults: each breaks one file in one way, and one line names the subject, the file, the values and the remedy

def load(path):
    img = nib.load(path)
    return np.asanyarray(img.dataobj).copy(), img.affine


def change(name, how, dtype=np.float32):
    """A way to break one volume of s02: its values."""
    def apply():
        array, matrix = load(f'data/s02/{name}.nii.gz')
        write(f'data/s02/{name}.nii.gz', how(array), matrix, dtype)
    return apply


def put(value, where=(0, 0, 0)):
    def how(array):
        array = array.astype(np.float32)
        array[where] = value
        return array
    return how


def regrid(name, move):
    """A way to break one volume of s02: its affine."""
    def apply():
        array, matrix = load(f'data/s02/{name}.nii.gz')
        write(f'data/s02/{name}.nii.gz', array, move(matrix))
    return apply


def damage(name, keep):
    """A way to break one file of s02: its bytes."""
    def apply():
        with open(f'data/s02/{name}.nii.gz', 'rb') as file:
            whole = file.read()
        with open(f'data/s02/{name}.nii.gz', 'wb') as file:
            file.write(keep(whole))
    return apply


def shifted(matrix):
    matrix = matrix.copy()
    matrix[0, 3] += 2.5
    return matrix


IN_MASK = (7, 8, 2)
FAULTS = {
    'missing': (lambda: os.remove('data/s02/adc.nii.gz'), 'adc.nii.gz is missing .*add it'),
    'missing mask': (lambda: os.remove('data/s02/mask.nii.gz'), 'mask.nii.gz is missing'),
    'truncated': (
        damage('dwi', lambda data: data[: len(data) // 2]),
        'dwi.nii.gz is truncated or damaged .*copy it again',
    ),
    'flipped byte': (damage('dwi', lambda data: data[:-6] + b'\0\0' + data[-4:]), 'dwi.nii.gz is truncated or damaged'),
    'empty file': (damage('ctp', lambda data: b''), 'ctp.nii.gz is empty; copy it again'),
    'not NIfTI': (damage('ctp', lambda data: b'<html>404</html>' * 99), 'ctp.nii.gz is not NIfTI; convert'),
    '2D': (change('dwi', lambda a: a[:, :, 2]), r'dwi.nii.gz has 2 dimensions \(14, 17\)'),
    '4D target': (
        change('dwi', lambda a: np.stack([a, a], 3)),
        r'dwi.nii.gz has 4 dimensions \(14, 17, 5, 2\), expected 3',
    ),
    '5D': (change('ctp', lambda a: np.stack([a, a], 4)), 'ctp.nii.gz has 5 dimensions'),
    'no frames': (
        change('ctp', lambda a: a[..., 0]),
        r'ctp.nii.gz has no frames: 3 dimensions \(14, 17, 5\) where a 4D',
    ),
    'one frame': (change('ctp', lambda a: a[..., :1]), 'ctp.nii.gz has no frames'),
    'another shape': (
        change('adc', lambda a: a[:, :, :-1]),
        r'adc.nii.gz has shape \(14, 17, 4\), but .*ctp.nii.gz has shape \(14, 17, 5\); .*resample = True',
    ),
    'another affine': (
        regrid('adc', shifted),
        'adc.nii.gz has -17.5 in row 1, column 4 of the affine, but .*ctp.nii.gz has -20 '
        'in row 1, column 4 of the affine; .*resample = True',
    ),
    'odd source': (regrid('ctp', shifted), 'ctp.nii.gz has -17.5 in row 1.*but .*mask.nii.gz has -20'),
    'NaN': (change('dwi', put(np.nan, IN_MASK)), 'dwi.nii.gz has NaN or infinity in 1 of 1190 voxels'),
    'NaN outside the mask': (change('ctp', put(np.nan, (0, 0, 0, 2))), 'ctp.nii.gz has NaN or infinity in 1 of 7140'),
    'infinity': (change('adc', put(-np.inf)), 'adc.nii.gz has NaN or infinity in 1 of 1190'),
    'constant source': (change('ctp', lambda a: 30.0 * (a > 0)), r'ctp.nii.gz is constant inside the mask \(all 30\)'),
    'constant target': (change('dwi', np.zeros_like), r'dwi.nii.gz is constant inside the mask \(all 0\)'),
    'no median': (
        change('dwi', lambda a: put(5.0, IN_MASK)(a * 0)),
        'dwi.nii.gz cannot be scaled: its median in the mask is 0',
    ),
    'empty mask': (change('mask', np.zeros_like), 'mask.nii.gz is empty: no voxel is inside'),
    'mask of numbers': (
        change('mask', lambda a: a * 255, np.uint8),
        'mask.nii.gz must hold only 0 and 1 but has the value 255',
    ),
    'lesion not binary': (
        change('lesion', put(0.4, IN_MASK)),
        'lesion.nii.gz must hold only 0 and 1 but has the value 0.4; binarise',
    ),
    'lesion outside': (
        change('lesion', put(1)),
        r'lesion.nii.gz has 1 of \d+ lesion voxels outside the mask .*mask.nii.gz',
    ),
    'ADC in mm^2/s': (
        change('adc', lambda a: a * 1e-6),
        r'adc.nii.gz has an in-mask median of 0.00084\d+, expected 300..2000 in '
        r"1e-6 mm\^2/s; the likely unit is mm\^2/s: set unit_scale\['adc'\] = 1e6",
    ),
    'ADC in 1e-3': (change('adc', lambda a: a * 1e-3), r"likely unit is 1e-3 mm\^2/s: set unit_scale\['adc'\] = 1000"),
    'ADC in 1e-5': (change('adc', lambda a: a * 10), r"likely unit is 1e-7 mm\^2/s: set unit_scale\['adc'\] = 0.1"),
    'ADC is a DWI': (change('adc', lambda a: a / 8.5), 'in-mask median of .* in 1e-6 mm'),
    'CTP + 1024': (
        change('ctp', lambda a: a + 1024),
        r'ctp.nii.gz has an in-mask median of 106\d, expected 0..100 in HU; the likely '
        'unit is HU . 1024: subtract 1024',
    ),
    'CTP x 10': (change('ctp', lambda a: a * 10), r"likely unit is 1e-1 HU: set unit_scale\['source'\] = 0.1"),
    'CTP in air': (change('ctp', lambda a: a - 1000), 'in-mask median of -9.* in HU.*mask reaches into air'),
    'mask with a gap': (
        lambda: [change(name, without_slice_2)() for name in ('mask', 'lesion')],
        'mask.nii.gz is empty in 1 slices between others; fill them, or set context = 0',
    ),
    'unusable affine': (damage('dwi', lambda data: zero_sform(data)), 'dwi.nii.gz has an unusable affine'),
    'mask too large': (
        lambda: None,
        r'mask.nii.gz spans \(\d+, \d+\) voxels of the working grid, more than image_size = \(8, 8\)',
    ),
}


def without_slice_2(array):
    array = array.copy()
    array[:, :, 2] = 0
    return array


def zero_sform(data):
    """A header whose sform is all zero."""
    raw = bytearray(gzip.decompress(data))
    raw[280:328] = bytes(48)
    return gzip.compress(bytes(raw))


@pytest.mark.parametrize('name', FAULTS)
def test_fault(name, capsys):
    write_stroke()
    apply, sentence = FAULTS[name]
    apply()
    cfg = settings()
    expected = 's02'
    if name == 'mask too large':
        cfg.image_size, expected = (8, 8), 's0.'
    code, faults, _ = check(capsys, cfg)
    assert code == 1
    assert len(faults) == (4 if name == 'mask too large' else 1)
    for fault in faults:
        assert re.match(f'{expected}: data/{expected}/.*{sentence}', fault)
        assert fault.endswith('.')
    with pytest.raises(DataError) as error:  # training stops at the same sentence
        dataset.Cohort(dataset.Spec.from_settings(cfg), ['s01', 's02'])
    if name != 'mask too large':
        assert str(error.value) == faults[0]
    assert error.value.one_sentence


def test_no_fault(capsys):
    """An empty lesion is normal, so are 1e-6 of rounding in the affine, and NaN-free zeros outside the mask."""
    write_stroke()
    change('lesion', np.zeros_like)()
    regrid('adc', lambda matrix: matrix + 1e-6 * np.arange(16).reshape(4, 4) * (np.arange(4) < 3)[:, None])()
    code, faults, lines = check(capsys, settings())
    assert code == 0 and not faults
    assert any('1 of them with an empty lesion' in line for line in lines)


def test_scans_of_different_length(capsys):
    """Spread over each scan: said, with the remedy. The remedy: one scan goes on, which is said, one is too short."""
    write_stroke()  # 6 frames, 2 s apart: 10 s
    for id, count in (('s02', 12), ('s03', 4)):
        array, matrix = load(f'data/{id}/ctp.nii.gz')
        write(f'data/{id}/ctp.nii.gz', np.resize(array.T, (count, *array.T.shape[1:])).T, matrix)
    code, faults, lines = check(capsys, settings())
    assert code == 0 and '    frames: 6 (2), 12 (1), 4 (1)' in lines
    assert '    scan time: 6..22 s from the first to the last frame' in lines
    assert any('Note: scans of different length come out at different times; for the same times in all, set '
               'frame_spacing = 1.2 or less' in line for line in lines)
    assert check(capsys, settings('--frame_spacing', '1.2'))[0] == 0
    code, faults, lines = check(capsys, settings('--frame_spacing', '2'))
    assert code == 1 and len(faults) == 1
    assert faults[0].startswith('s03: data/s03/ctp.nii.gz ends after 6 s (4 frames, 2 s apart), but frames = 6 at '
                                'frame_spacing = 2 need 10 s; lower one')
    assert '    time points: 6, every 2 s, up to 10 s' in lines
    assert '    Note: 1 scans go on after that, for up to 12 s, which is left out.' in lines
    with pytest.raises(DataError, match='^s03: data/s03/ctp.nii.gz ends after 6 s'):
        dataset.Cohort(spec('--frame_spacing', '2'), ['s03'])


def test_headers_without_a_unit_of_time(capsys):
    write_stroke()
    array, matrix = load('data/s02/ctp.nii.gz')
    write('data/s02/ctp.nii.gz', array, matrix, step=2000.0, unit='unknown')  # milliseconds, it must be
    assert '    scan time: 10..10 s from the first to the last frame' in check(capsys, settings())[2]
    code, faults, lines = check(capsys, settings('--frame_spacing', '2'))
    assert code == 0
    assert '    Note: 1 headers name no unit of time; frame_interval in config.py says it for certain.' in lines
    code, faults, lines = check(capsys, settings('--frame_spacing', '2', '--frame_interval', '2'))
    assert code == 0 and not any('no unit' in line for line in lines)
    write('data/s02/ctp.nii.gz', array, matrix, step=0.0)
    assert any('some headers have no time step' in line for line in check(capsys, settings())[2])
    code, faults, lines = check(capsys, settings('--frame_spacing', '2'))
    assert code == 1 and 's02: data/s02/ctp.nii.gz has no time step between frames in its header' in faults[0]


def test_every_file_is_read_once(capsys, monkeypatch):
    write_stroke()
    read, read_volume = [], volume.read_volume
    monkeypatch.setattr(volume, 'read_volume', lambda path: (read.append(path), read_volume(path))[1])
    assert check(capsys, settings())[0] == 0
    assert sorted(read) == sorted(f'data/{id}/{name}.nii.gz' for id in ('s01', 's02', 's03', 's04')
                                  for name in ('ctp', 'dwi', 'adc', 'mask', 'lesion'))


def test_all_faults_of_a_subject_are_told(capsys):
    write_stroke()
    change('dwi', put(np.nan))()
    change('lesion', put(0.5, IN_MASK))()
    change('adc', lambda a: a * 1e-6)()
    os.remove('data/s04/mask.nii.gz')
    code, faults, lines = check(capsys, settings())
    assert code == 1 and sorted(line.split(':')[0] for line in faults) == ['s02', 's02', 's02', 's04']
    assert lines[-1] == '  4 faults in 2 places'


@pytest.mark.parametrize(
    'factor, sentence',
    [
        (1e4, 'the likely unit is Bq/ml'),
        (1000, r"likely unit is 1e-3 SUVR: set unit_scale\['suvr'\] = 0.001"),
        (100, 'percent'),
        (0.001, r"likely unit is 1e3 SUVR: set unit_scale\['suvr'\] = 1000"),
    ],
)
def test_units_of_pet(factor, sentence, capsys):
    write_amyloid()
    array, matrix = load('data/whole_Abeta/s03.nii')
    write('data/whole_Abeta/s03.nii', array * factor, matrix)
    code, faults, _ = check(capsys, amyloid_settings())
    assert (
        code == 1
        and len(faults) == 1
        and re.match(f's03: .*whole_Abeta/s03.nii has an in-mask median .* in SUVR; .*{sentence}', faults[0])
    )


def test_unit_scale_is_applied():
    write_stroke()
    wanted = dataset.load_subject(spec(), 's02').target
    change('adc', lambda a: a * 1e-6)()
    scaled = dataset.load_subject(spec('--unit_scale', "{'source': 1, 'dwi': 1, 'adc': 1e6}"), 's02')
    assert np.allclose(scaled.target, wanted, atol=1e-4) and scaled.truth()['adc'].max() > 100


LABELS = {'s01': '0,', 's02': '1,', 's03': '0,', 's04': '1,'}
LIST_FAULTS = {
    'label missing': (
        lambda: write_lists(
            'data/data_info', ['s01', 's02'], ['s03'], ['s04'], {'s01': '0,', 's02': '1,', 's03': '1,'}
        ),
        's04: data/data_info/data_info.csv has no label for it; add one of 0..1, or unknown',
    ),
    'label empty': (
        lambda: write_lists('data/data_info', ['s01', 's02'], ['s03'], ['s04'], dict(LABELS, s02=',')),
        's02: .* has no label',
    ),
    'label out of range': (
        lambda: write_lists('data/data_info', ['s01', 's02'], ['s03'], ['s04'], dict(LABELS, s02='2,')),
        "s02: .*data_info.csv has the label '2', but num_classes = 2 allows 0..1",
    ),
    'label no number': (
        lambda: write_lists('data/data_info', ['s01', 's02'], ['s03'], ['s04'], dict(LABELS, s03='AD,')),
        "s03: .*has the label 'AD'",
    ),
    'ID in two lists': (
        lambda: write_lists('data/data_info', ['s01', 's02'], ['s03'], ['s04', 's01'], LABELS),
        's01: data/data_info/test.txt and data/data_info/train.txt both name it; remove',
    ),
    'ID twice': (
        lambda: write_lists('data/data_info', ['s01', 's02', 's01'], ['s03'], ['s04'], LABELS),
        's01: .*train.txt names it 2 times',
    ),
    'an ID without patient where others have one': (
        lambda: write_lists('data/data_info', ['s01', 's02'], ['s03'], ['s04'], dict(s01='0,p', s02='1,q', s03='0,r')),
        's04: data/data_info/data_info.csv names patients, but has no row for it; add one',
    ),
    'patient in two lists': (
        lambda: write_lists('data/data_info', ['s01', 's02'], ['s03'], ['s04'],
                            dict(s01='0,a', s02='1,p', s03='0,b', s04='1,p')),
        's04: data/data_info/test.txt names it, and data/data_info/train.txt names s02, of the same patient p',
    ),
    'patient in two lists, written otherwise': (
        lambda: write_lists('data/data_info', ['s01', 's02'], ['s03'], ['s04'],
                            dict(s01='0,a', s02='1,P1', s03='0,b', s04='1,p1')),
        's04: data/data_info/test.txt names it, and data/data_info/train.txt names s02, of the same patient p1',
    ),
    'empty split': (
        lambda: write_lists('data/data_info', ['s01', 's02'], [], ['s04'], LABELS),
        'validation.txt: data/data_info/validation.txt names no subject; write',
    ),
    'list missing': (lambda: os.remove('data/data_info/test.txt'), 'test.txt: data/data_info/test.txt is missing'),
    'two rows': (
        lambda: open('data/data_info/data_info.csv', 'a').write('s01,1,\n'),
        'data_info.csv: .*has two different rows for s01',
    ),
}


@pytest.mark.parametrize('name', LIST_FAULTS)
def test_fault_in_lists(name, capsys):
    write_amyloid()
    apply, sentence = LIST_FAULTS[name]
    apply()
    code, faults, _ = check(capsys, amyloid_settings())
    also = ('two rows', 'an ID without patient where others have one')  # there the label is missing, too
    faults = [line for line in faults if not (name in also and 'label' in line)]
    assert code == 1 and len(faults) == 1 and re.match(sentence, faults[0])
    with pytest.raises(DataError) as error:
        for split in splits.SPLITS:
            dataset.read_labels('data/data_info', dataset.read_split('data/data_info', split), 2)
    assert str(error.value) == faults[0]


def test_no_table_of_labels(capsys):
    write_amyloid()
    os.remove('data/data_info/data_info.csv')
    faults = check(capsys, amyloid_settings())[1]
    assert len(faults) == 4 and all('data_info.csv is missing, and with it the label; add' in line for line in faults)


def test_a_missing_list_does_not_stop_another():
    write_stroke()
    os.remove('data/data_info/validation.txt')
    assert dataset.read_split('data/data_info', 'test') == ['s04']


def test_labels_are_not_read_without_classes(capsys):
    write_stroke()
    os.remove('data/data_info/data_info.csv')
    assert check(capsys, settings())[0] == 0


def test_command(repo):
    """The command itself: faults on standard output, progress on standard error, exit code 1, no traceback."""
    write_stroke()
    os.remove('data/s03/dwi.nii.gz')
    words = [
        sys.executable,
        str(repo / 'dataset.py'),
        '--data_root',
        'data',
        '--data_info',
        'data/data_info',
        '--image_size',
        '(16,20)',
        '--frames',
        '6',
        '--spacing',
        '(None,None,None)',
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and 'checking' in done.stderr
    starts = [line for line in done.stdout.splitlines() if not line.startswith('  ')]
    assert len(starts) == 1 and starts[0].startswith('s03: data/s03/dwi.nii.gz is missing')
    done = subprocess.run([*words[:2], '--make_splits', '1,2'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('--make_splits 1,2 must be')
    done = subprocess.run([*words, '--make_splits', '3-fold'], capture_output=True, text=True)
    assert done.returncode == 0 and '1 subjects in data/data_info_3/test.txt' in done.stdout, done.stderr
    assert 'left out s03' in done.stdout and 'need 9 validation subjects' in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# One subject

def test_new_subject_in_no_list():
    """Without truth, lesion, label or mask; the mask is derived, and the same result comes as with its own."""
    write_stroke()
    listed = dataset.load_subject(spec(), 's01')
    os.makedirs('new')
    os.rename('data/s01/ctp.nii.gz', 'new/patient.7.nii.gz')
    for mask in (None, 'data/s01/mask.nii.gz'):
        new = dataset.load_subject(spec(), files={'source': 'new/patient.7.nii.gz', 'mask': mask})
        assert new.id == 'patient' and new.target is None and new.lesion is None and new.native_lesion is None
        assert np.array_equal(new.source, listed.source) and np.array_equal(new.native_mask, listed.native_mask)
        assert new.to_native(listed.target)['dwi'].shape == new.shape
    with pytest.raises(DataError, match='without its target images'):
        new.truth()
    with pytest.raises(DataError, match='^x: nowhere.nii is missing'):
        dataset.load_subject(spec(), 'x', files={'source': 'nowhere.nii'})


def test_without_truth_the_truth_is_not_touched():
    write_stroke()
    for name in ('dwi', 'adc', 'lesion'):
        os.remove(f'data/s01/{name}.nii.gz')
    assert not spec().has_truth('s01') and spec().has_truth('s02')
    assert dataset.load_subject(spec(), 's01', with_truth=False).target is None
    with pytest.raises(DataError, match='^s01: data/s01/dwi.nii.gz is missing'):
        dataset.load_subject(spec(), 's01')


def test_a_lesion_file_is_needed_in_training_only(capsys):
    write_stroke()
    os.remove('data/s04/lesion.nii.gz')
    subject = dataset.load_subject(spec(), 's04')
    assert subject.lesion is None and subject.native_lesion is None and set(subject.truth()) == {'dwi', 'adc'}
    with pytest.raises(DataError, match='^s04: data/s04/lesion.nii.gz is missing'):
        dataset.Cohort(spec(), ['s04'])
    assert check(capsys, settings())[1][0].startswith('s04: data/s04/lesion.nii.gz is missing')


def test_resample_needs_a_common_field_of_view(capsys):
    write_stroke()
    regrid('adc', lambda matrix: matrix + np.outer([300.0, 0, 0, 0], [0, 0, 0, 1]))()
    code, faults, _ = check(capsys, settings('--resample', 'True'))
    assert code == 1 and len(faults) == 1 and re.match('s02: .*adc.nii.gz covers only 0% of the mask', faults[0])


def test_where_a_target_does_not_reach_there_is_no_truth_to_compare_with():
    arrays = volumes((14, 17, 12))
    for name in ('ctp', 'dwi', 'adc', 'mask', 'lesion'):
        write(f'data/s01/{name}.nii.gz', arrays[name])
    whole = dataset.load_subject(spec('--resample', 'True'), 's01')
    assert (whole.known_mask() == whole.native_mask).all()
    top = int(np.flatnonzero(arrays['mask'].any(axis=(0, 1)))[-1])
    write('data/s01/dwi.nii.gz', arrays['dwi'][:, :, :top])
    short = dataset.load_subject(spec('--resample', 'True'), 's01')
    assert (short.known_mask()[:, :, :top] == short.native_mask[:, :, :top]).all()
    assert short.native_mask[:, :, top].any() and not short.known_mask()[:, :, top:].any()


def test_spec_travels():
    write_stroke()
    one = spec('--spacing', '(2.5, 2.5, None)')
    kept = json.loads(json.dumps(one.travel()))
    torch.save(kept, 'spec.pt')
    again = spec(**torch.load('spec.pt', weights_only=True))
    assert again == one
    assert dataset.scaling_range(again, 'dwi') == (0, 3) and dataset.scaling_range(again, 'adc') == (0, 3000)
    lone = spec(**dict(kept, target_names=['adc', 'flair']))
    assert dataset.load_subject(lone, 's01', with_truth=False).source.shape[1] == 6
    with pytest.raises(DataError, match="no entry 'flair'"):
        dataset.load_subject(lone, 's01')


def test_slices_without_brain_are_skipped_in_training_only():
    arrays = volumes((14, 17, 9))
    for name in ('ctp', 'dwi', 'adc', 'mask', 'lesion'):
        write(f'data/s01/{name}.nii.gz', arrays[name])
    brain = int(arrays['mask'].any(axis=(0, 1)).sum())
    assert brain < 9 and len(dataset.Cohort(spec(), ['s01'])) == brain
    subject = dataset.load_subject(spec(), 's01')
    assert len(subject.source) == 9 and subject.to_native(subject.target)['adc'].shape == (14, 17, 9)


# ----------------------------------------------------------------------------------------------------------------------
# The cache

def test_samples_are_the_subjects():
    write_stroke()
    cohort = dataset.Cohort(spec(), ['s01', 's02'], {'s01': 1})
    subject = dataset.load_subject(spec(), 's02')
    first = [cohort.id_of(i) for i in range(len(cohort))].index('s02')
    brain = np.flatnonzero(subject.mask.any(axis=(1, 2, 3)))
    for place, z in enumerate(brain):
        sample = cohort[first + place]
        for name in ('source', 'target', 'mask', 'lesion'):
            wanted = subject.stacked if name == 'source' else getattr(subject, name)
            assert sample[name].dtype == torch.float32 and np.array_equal(sample[name].numpy(), wanted[z])
        assert sample['label'] == 0 and sample['index'] == first + place and sample['index'].dtype == torch.int64
    assert cohort[0]['label'] == 1
    assert (cohort.ids, cohort.source_channels, cohort.target_channels) == (['s01', 's02'], 18, 2)


@pytest.mark.parametrize('context', [0, 1, 2])
def test_slices_come_with_their_neighbours(context):
    """Training and inference see the same: the slices below, the slice, those above, background beyond the ends."""
    write_stroke()
    subject = dataset.load_subject(spec('--context', str(context)), 's02')
    n, frames = len(subject.source), 6
    assert subject.stacked.shape[1] == frames * (2 * context + 1) == subject.spec.source_channels
    for z in range(n):
        for j, at in enumerate(range(z - context, z + context + 1)):
            part = subject.stacked[z, j * frames:(j + 1) * frames]
            assert np.array_equal(part, subject.source[at]) if 0 <= at < n else (part == -1).all()
    cohort = dataset.Cohort(subject.spec, ['s01', 's02'])
    brain = subject.mask.any(axis=(1, 2, 3))
    assert np.array_equal(cohort.subject_items(1)['source'].numpy(), subject.stacked[brain])


def test_the_cache_does_not_depend_on_the_neighbours():
    write_stroke()
    files = [dataset.Cohort(spec('--context', context), ['s01']).files for context in '02']
    assert files[0] == files[1]


def test_no_lesion_file_is_a_lesion_of_zeros():
    write_stroke()
    assert dataset.Cohort(spec('--lesion', 'None'), ['s01'])[0]['lesion'].sum() == 0


def test_cache_is_built_once_and_anew_when_something_changes(monkeypatch):
    write_stroke()
    built = []
    load_subject = dataset.load_subject
    monkeypatch.setattr(dataset, 'load_subject', lambda spec, id: (built.append(id), load_subject(spec, id))[1])
    dataset.Cohort(spec(), ['s01', 's02'])
    before = dataset.Cohort(spec(), ['s02', 's01'])[0]['target'][1].max()
    assert sorted(built) == ['s01', 's02']
    change('adc', lambda a: a * 1.5)()
    assert dataset.Cohort(spec(), ['s02', 's01'])[0]['target'][1].max() > before
    assert built[2:] == ['s02']
    dataset.Cohort(spec('--frames', '4'), ['s01'])
    assert built[3:] == ['s01']
    dataset.Cohort(spec(), ['s01', 's02'])
    assert len(built) == 4


@pytest.mark.parametrize('left', ['half', 'nothing', 'rubbish', 'header'])
def test_a_broken_cache_file_is_not_believed(left):
    write_stroke()
    whole = dataset.Cohort(spec(), ['s01'])
    path = whole.files[0][0]
    wanted = whole[0]
    with open(path, 'rb') as file:
        data = file.read()
    with open(path, 'wb') as file:
        file.write(
            {'half': data[:len(data) // 2], 'nothing': b'', 'rubbish': b'x' * len(data), 'header': data[:60]}[left]
        )
    assert torch.equal(dataset.Cohort(spec(), ['s01'])[0]['source'], wanted['source'])


def test_full_disk(monkeypatch):
    """A real short write: files may not grow beyond 20 kB. One sentence, nothing left behind, then it works."""
    write_stroke()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(
            DataError, match='^s01: .*cache/s01-.*.npy cannot be written .*; free space or set another cache_dir'
        ):
            dataset.Cohort(spec(), ['s01'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir('cache') == []
    assert len(dataset.Cohort(spec(), ['s01'])) > 0


def test_killed_while_building(repo):
    """SIGKILL at any moment: what is there under its own name is whole, the rest is built by the next run."""
    ids = [f's{i:02}' for i in range(24)]
    write_stroke(ids=ids)
    code = (
        'import sys; sys.path.insert(0, sys.argv[1]); from made_data import spec; import dataset; print("go", flush=1);'
        'dataset.Cohort(spec(), dataset.read_lists("data/data_info")[0]["train"])'
    )
    process = subprocess.Popen(
        [sys.executable, '-c', code, str(repo / 'tests')], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.readline()
    while not os.path.isdir('cache') or len(os.listdir('cache')) < 3:
        assert process.poll() is None or len(os.listdir('cache')) > 2
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = dataset.Cohort(spec(), ids[:-2])
    clean = dataset.Cohort(spec('--cache_dir', 'other'), ids[:-2])
    assert all(torch.equal(found[i]['source'], clean[i]['source']) for i in range(len(clean)))


def test_remains_of_a_killed_run_are_cleared():
    write_stroke()
    os.makedirs('cache')
    open('cache/s01-abc.npy.77.tmp', 'w').close()
    os.utime('cache/s01-abc.npy.77.tmp', (0, 0))
    dataset.Cohort(spec(), ['s01'])
    assert not [name for name in os.listdir('cache') if name.endswith('.tmp')]


def test_cache_never_goes_into_the_data():
    write_stroke()
    for folder in ('data', 'data/cache', './data/../data/x'):
        with pytest.raises(DataError, match='lies inside data_root data; set cache_dir'):
            dataset.Cohort(spec('--cache_dir', folder), ['s01'])
    dataset.Cohort(spec('--cache_dir', 'data_cache'), ['s01'])
    assert sorted(os.listdir('data')) == ['data_info', 's01', 's02', 's03', 's04']
    with pytest.raises(DataError, match='the list is empty'):
        dataset.Cohort(spec(), [])


def test_memory_does_not_grow_with_the_cohort():
    """Reading every sample of a 60 MB cache leaves the process about where it was after the first ones."""
    ids = ['s01', 's02', 's03', 's04', 's05', 's06']
    write_stroke(ids=ids)
    cohort = dataset.Cohort(spec('--frames', '200', '--context', '0', '--image_size', '(64, 72)'), ids)
    assert sum(os.path.getsize(path) for path, _, _ in cohort.files) > 60e6

    def resident_after(indices):
        for i in indices:
            cohort[i]
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before = resident_after([0, 1, 2, 3] * 3)
    assert resident_after(range(len(cohort))) - before < 20e6


def test_volumes_as_samples():
    write_amyloid()
    cfg = amyloid_settings()
    labels = dataset.read_labels('data/data_info', ['s01', 's02'], 2)
    cohort = dataset.Cohort(dataset.Spec.from_settings(cfg), ['s01', 's02'], labels)
    assert len(cohort) == 2 and [int(cohort[i]['label']) for i in range(2)] == [0, 1]
    assert cohort[1]['source'].shape == (1, 16, 16, 16) and cohort[1]['target'].shape == (1, 16, 16, 16)
    assert int(dataset.Cohort(dataset.Spec.from_settings(cfg), ['s01'])[0]['label']) == 2  # unknown


def test_lists_of_a_cross_validation(capsys):
    ids = [f'p{i}_{visit}' for i in range(11) for visit in range(1 + i % 2)]
    write_table('data/data_info', {id: f'1,{id.split("_")[0]}' for id in ids})
    found = splits.make_folds(ids, 'data/data_info', 4)
    assert list(found) == [f'data/data_info_{k}' for k in (1, 2, 3, 4)]
    assert sorted(sum((lists['test'] for lists in found.values()), [])) == sorted(ids)
    assert sorted(sum((lists['validation'] for lists in found.values()), [])) == sorted(ids)
    for folder, lists in found.items():
        assert sorted(sum(lists.values(), [])) == sorted(ids) and lists == dataset.read_lists(folder)[0]
        assert not dataset.read_lists(folder)[1]
        with open(f'{folder}/data_info.csv') as mine, open('data/data_info/data_info.csv') as given:
            assert mine.read() == given.read()
        patients = [{id.split('_')[0] for id in part} for part in lists.values()]
        assert sum(map(len, patients)) == 11  # all visits of a patient in one list
    with pytest.raises(dataset.DataError, match='data/data_info_1/train.txt.* exists already'):
        splits.make_folds(ids, 'data/data_info', 3)
    with pytest.raises(dataset.DataError, match='12 folds need at least 12 patients, but the templates found 11'):
        splits.make_folds(ids, 'data/data_info', 12)
    with pytest.raises(dataset.DataError, match='needs 3 folds or more'):
        splits.make_folds(ids, 'data/data_info', 2)


def test_a_label_may_be_unknown(capsys):
    write_amyloid()
    labels = {'s01': '0,', 's02': 'unknown,', 's03': 'Unknown,', 's04': '1,'}
    write_lists('data/data_info', ['s01', 's02'], ['s03'], ['s04'], labels)
    assert dataset.read_labels('data/data_info', ['s01', 's02', 's04'], 2) == {'s01': 0, 's02': 2, 's04': 1}
    code, faults, summary = check(capsys, amyloid_settings())
    assert code == 0 and not faults and 'labels in train: 0: 1, not known: 1' in str(summary)
    with pytest.raises(dataset.DataError, match='label of none of 2 subjects'):
        dataset.read_labels('data/data_info', ['s02', 's03'], 2)
    write_lists('data/data_info', ['s02'], ['s03'], ['s01', 's04'], labels)
    code, faults, _ = check(capsys, amyloid_settings())
    assert code == 1 and len(faults) == 1 and 'knows the label of no training subject' in faults[0]


# ----------------------------------------------------------------------------------------------------------------------
# The loader and augmentation

@pytest.fixture
def cohort():
    write_stroke()
    return dataset.Cohort(spec('--trim', 'False'), ['s01', 's02', 's03'])


@pytest.fixture
def trimmed():
    write_stroke(ids=('s01', 's02', 's03', 's04'))
    return dataset.Cohort(spec(), ['s01', 's02', 's03', 's04'])


def draw(loader, steps):
    return [next(loader) for _ in range(steps)]


def same(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def test_batches_are_a_function_of_seed_rank_and_step(cohort):
    batches = draw(dataset.loader(cohort, 4, seed=5, start_step=0), 12)
    assert batches[0]['source'].shape == (4, 18, 16, 20) and batches[0]['label'].dtype == torch.int64
    assert same(batches[7:], draw(dataset.loader(cohort, 4, seed=5, start_step=7), 5))
    assert not same(batches, draw(dataset.loader(cohort, 4, seed=6, start_step=0), 12))
    count = len(cohort)
    stream = torch.cat([batch['index'] for batch in batches]).tolist()
    assert sorted(stream[:count]) == list(range(count)) == sorted(stream[count:2 * count])  # every epoch whole
    assert stream[:count] != stream[count:2 * count]


def test_ranks_share_one_stream(cohort):
    alone = draw(dataset.loader(cohort, 6, seed=1, start_step=3), 4)
    pairs = [draw(dataset.loader(cohort, 3, seed=1, start_step=3, rank=rank, world=2), 4) for rank in (0, 1)]
    for step in range(4):
        assert torch.equal(alone[step]['index'], torch.cat([pairs[0][step]['index'], pairs[1][step]['index']]))


def test_batch_larger_than_the_cohort(cohort):
    batch = next(dataset.loader(cohort, 3 * len(cohort), seed=0, start_step=0))
    assert torch.bincount(batch['index']).tolist() == [3] * len(cohort)


def test_an_error_of_a_loading_process_is_one_sentence(cohort):
    for folder, _, files in os.walk(cohort.spec.cache_dir):
        for file in files:
            os.truncate(os.path.join(folder, file), 300)
    with pytest.raises(Exception) as alone:
        draw(dataset.loader(cohort, 4, seed=2, start_step=0), 1)
    assert alone.value.one_sentence and '\n' not in str(alone.value)
    with pytest.raises(type(alone.value)) as caught:
        draw(dataset.loader(cohort, 4, seed=2, start_step=0, workers=1), 1)
    assert str(caught.value) == str(alone.value)


def test_loading_processes_leave_the_noise_of_a_step_alone(cohort):
    for workers in (0, 1):
        batches = dataset.loader(cohort, 4, seed=2, start_step=1, workers=workers)
        torch.manual_seed(5)
        next(batches)
        noise = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(noise, torch.rand(3))


def test_workers_give_the_same_batches(cohort):
    plain = draw(dataset.loader(cohort, 4, seed=2, start_step=1), 6)
    assert same(plain, draw(dataset.loader(cohort, 4, seed=2, start_step=1, workers=2), 6))


def test_boxes_hold_the_whole_brain_and_only_what_the_sample_holds(trimmed, cohort):
    whole = {name: torch.stack([cohort[i][name] for i in range(len(cohort))]) for name in dataset.BACKGROUND}
    sizes, places = set(), set()
    for batch in draw(dataset.loader(trimmed, 4, seed=0, start_step=0, shift=2), 24):
        size = batch['mask'].shape[2:]
        assert all(n % 4 == 0 and n <= m for n, m in zip(size, (16, 20), strict=True))
        for i, number in enumerate(batch['index'].tolist()):
            if number >= len(cohort):
                continue
            assert batch['mask'][i].sum() == whole['mask'][number].sum() > 0
            first = [int(torch.nonzero(m.any(axis))[0]) for m in (batch['mask'][i, 0], whole['mask'][number, 0])
                     for axis in (1, 0)]
            dx, dy = first[2] - first[0], first[3] - first[1]  # where the box starts
            for name, background in dataset.BACKGROUND.items():
                padded = torch.nn.functional.pad(whole[name][number], (20,) * 4, value=background)
                cut = padded[:, 20 + dx:20 + dx + size[0], 20 + dy:20 + dy + size[1]]
                assert torch.equal(batch[name][i], cut), name
            places.add((number, dx, dy))
        sizes.add(tuple(size))
    assert min(math.prod(s) for s in sizes) < 16 * 20 and len(places) > 2 * len({n for n, _, _ in places})


def test_trimmed_batches_are_a_function_of_seed_rank_and_step(trimmed):
    def alike(start, **how):
        return draw(dataset.loader(trimmed, 4, seed=5, start_step=start, shift=2, **how), 36 - start)
    batches = alike(0)
    for start in (7, 16, 20):
        assert same(batches[start:], alike(start))
    assert same(batches, alike(0, workers=2))
    pairs = [draw(dataset.loader(trimmed, 2, seed=5, start_step=9, rank=rank, world=2, shift=2), 10)
             for rank in (0, 1)]
    for step, both in enumerate(zip(*pairs, strict=True), start=9):
        assert torch.equal(batches[step]['source'], torch.cat([part['source'] for part in both]))
    # The samples of 4 steps are those that they are without boxes, in another order; like sizes in one batch.
    plain = dataset.Cohort(spec('--trim', 'False'), trimmed.ids)
    ordered = draw(dataset.loader(plain, 4, seed=5, start_step=0), 32)
    for window in (slice(i, i + 4) for i in range(0, 32, 4)):
        one, other = (torch.cat([b['index'] for b in part[window]]).tolist() for part in (batches, ordered))
        assert sorted(one) == sorted(other) and one != other
    area = (trimmed.extents[..., 1] - trimmed.extents[..., 0]).prod(1)
    spread = [np.mean([np.ptp(area[b['index']]) for b in part[:32]]) for part in (batches, ordered)]
    assert spread[0] < 0.5 * spread[1]
    assert {len(b['index']) for b in batches} == {4}


def test_all_samples_in_order(trimmed, cohort):
    for data in (trimmed, cohort):
        seen = torch.cat([data.__getitems__(part)['index'] for part in data.in_order(5)])
        assert sorted(seen.tolist()) == list(range(len(data)))
    assert sum(math.prod(part.size) * len(part.numbers) for part in trimmed.in_order(5)) < len(trimmed) * 16 * 20


@pytest.mark.parametrize('grid', [(16, 20), (16, 20, 24), (192, 224)])
def test_groups_of_a_subject_hold_all_of_the_mask(grid):
    rng = np.random.default_rng(0)
    mask = np.zeros((11, 1, *grid), np.float32)
    for i in range(1, 11):  # the first has no brain
        start = rng.integers(0, [n // 2 for n in grid])
        end = [int(a + rng.integers(1, n // 2)) for a, n in zip(start, grid, strict=True)]
        mask[(i, slice(None), *map(slice, start, end))] = 1
    for at_most in (1, 3, 32):
        groups = dataset.grid.batches(mask, at_most, True)
        assert sorted(n for numbers, _ in groups for n in numbers) == list(range(1, 11))
        rest = mask.copy()
        for numbers, box in groups:
            assert len(numbers) <= at_most
            assert [box] == [other for mine, other in dataset.grid.batches(mask, 32, True) if numbers[0] in mine]
            for b, n in zip(box, grid, strict=True):
                assert 0 <= b.start < b.stop <= n and (b.stop - b.start) % 4 == 0
            rest[(numbers, slice(None), *box)] = 0
        assert not rest.any()
        whole = dataset.grid.batches(mask, at_most, False)
        assert [n for numbers, _ in whole for n in numbers] == list(range(11))
        assert all(mask[(numbers, slice(None), *box)].shape[2:] == grid for numbers, box in whole)


def test_augment(cohort):
    batch = next(dataset.loader(cohort, 16, seed=0, start_step=0))
    moved = dataset.augment(batch, torch.Generator().manual_seed(3))
    again = dataset.augment(batch, torch.Generator().manual_seed(3))
    assert same([moved], [again]) and torch.equal(moved['index'], batch['index'])
    seen = set()
    for i in range(16):  # each sample is one of the allowed flips and shifts, the same for all its arrays
        for flip, dx, dy in np.ndindex(2, 5, 5):
            def expected(name, i=i, flip=flip, dx=dx - 2, dy=dy - 2):
                image = batch[name][i].flip(1) if flip else batch[name][i]
                padded = torch.nn.functional.pad(image, (2, 2, 2, 2), value=-1 if name in ('source', 'target') else 0)
                return padded[:, 2 - dx:18 - dx, 2 - dy:22 - dy]
            if all(torch.equal(moved[name][i], expected(name)) for name in ('source', 'target', 'mask', 'lesion')):
                seen.add((flip, dx, dy))
                break
        else:
            raise AssertionError(f'sample {i} is no flip and shift of itself')
    assert len(seen) > 8 and {flip for flip, _, _ in seen} == {0, 1}
    assert same([dataset.augment(batch, torch.Generator().manual_seed(3), flip=False, shift=0)], [batch])


def test_augment_noise():
    """Noise on the source alone, within the brain alone, of another strength for each sample."""
    source = torch.full((64, 3, 20, 24), -1.0)
    source[:, :, 4:16, 4:20] = torch.linspace(-0.5, 0.5, 12).view(1, 1, 12, 1)
    batch = {'source': source, 'target': torch.rand(64, 2, 20, 24), 'mask': torch.ones(64, 1, 20, 24)}
    draw = dict(flip=False, shift=0, noise=0.1)
    noisy = dataset.augment(batch, torch.Generator().manual_seed(1), **draw)
    assert same([noisy], [dataset.augment(batch, torch.Generator().manual_seed(1), **draw)])
    assert all(torch.equal(noisy[name], batch[name]) for name in ('target', 'mask'))
    inside = source > -1
    assert torch.equal(noisy['source'] > -1, inside) and (noisy['source'][~inside] == -1).all()
    assert torch.equal(batch['source'], source) and source.max() == 0.5  # the batch itself is left as it was
    grain = (noisy['source'] - source)[:, :, 4:16, 4:20]
    levels = grain.flatten(1).std(1)
    assert 0 < levels.min() < 0.02 and 0.08 < levels.max() < 0.105 and abs(levels.mean() - 0.05) < 0.01
    assert abs(grain.mean()) < 1e-3
    whole = dataset.augment(batch, torch.Generator().manual_seed(1), flip=False, shift=0, noise=50.0)['source']
    assert torch.equal(whole > -1, inside) and whole.abs().max() == 1  # however strong, the brain stays the brain


def test_augment_volumes():
    generator = torch.Generator().manual_seed(0)
    batch = {'source': torch.rand(5, 1, 6, 7, 8), 'target': torch.rand(5, 2, 6, 7, 8), 'label': torch.arange(5)}
    moved = dataset.augment(batch, generator, flip=True, shift=1)
    assert moved['source'].shape == batch['source'].shape and torch.equal(moved['label'], batch['label'])
    assert (moved['source'] == -1).any() and not torch.equal(moved['target'], batch['target'])


def test_loading_is_fast(tmp_path):
    """A batch of 32 slices of the stroke demo's size costs a few milliseconds, augmentation too."""
    write_stroke(ids=('s01', 's02', 's03'))
    cohort = dataset.Cohort(spec('--frames', '15', '--image_size', '(64, 72)'), ['s01', 's02', 's03'])
    batches, generator = dataset.loader(cohort, 32, seed=0, start_step=0), torch.Generator()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        dataset.augment(next(batches), generator)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05  # 5 ms on a quiet machine


def test_affine_of_made_data_is_oblique():
    assert nib.affines.obliquity(OBLIQUE).max() > 0.1
