"""Path templates on trees of files named as real data sets name them, and the three lists made from them."""
import os
import shutil

import numpy as np
import pytest
from made_data import IDS, OBLIQUE, affine, volumes, write, write_amyloid, write_lists, write_stroke

import config
import dataset
import grid
import splits
from dataset import DataError

# ----------------------------------------------------------------------------------------------------------------------
# Layouts: how the files are named, and the settings that find them

ISLES_2018 = dict(
    data_root='data', frames=15, mask=None, resample=False,
    source='{root}/TRAINING/{id}/SMIR.Brain.XX.O.CT_4DPWI.*/*.nii',
    targets={'cbf': '{root}/TRAINING/{id}/SMIR.Brain.XX.O.CT_CBF.*/*.nii',
             'tmax': '{root}/TRAINING/{id}/SMIR.Brain.XX.O.CT_Tmax.*/*.nii'},
    lesion='{root}/TRAINING/{id}/SMIR.Brain.XX.O.OT.*/*.nii',
    scaling={'source': ('range', 0, 100), 'cbf': ('quantile', 0, 0.99), 'tmax': ('range', 0, 20)},
    unit_scale={'source': 1, 'cbf': 1, 'tmax': 1})
_24 = '{root}/train/derivatives/{id}/ses-0'
ISLES_24 = dict(
    data_root='data', frames=15, mask=None, resample=True,
    source=_24 + '1/{id}_ses-01_space-ncct_ctp.nii.gz',
    targets={'dwi': _24 + '2/{id}_ses-02_space-ncct_dwi.nii.gz', 'adc': _24 + '2/{id}_ses-02_space-ncct_adc.nii.gz'},
    lesion=_24 + '2/{id}_ses-02_space-ncct_lesion-msk.nii.gz', unit_scale={'source': 1, 'dwi': 1, 'adc': 1e6})
ADNI = dict(
    preset='mri2pet_demo', data_root='data', mask='{root}/mask/{id}.nii', lesion=None, resample=True,
    source='{root}/ADNI/{id}/MP*RAGE*/*/*/*.nii', targets={'suvr': '{root}/ADNI/{id}/AV45*/*/*/*.nii'})


def write_isles_2018():
    for number in (1, 2, 3, 10):
        arrays = volumes((20, 20, 2), frames=43 + number % 7, seed=number)
        folder = f'data/TRAINING/case_{number}/SMIR.Brain.XX.O.'
        named = {'CT_4DPWI': arrays['ctp'], 'CT_CBF': arrays['dwi'], 'CT_Tmax': arrays['suvr'], 'OT': arrays['lesion'],
                 'CT': arrays['mri'], 'CT_CBV': arrays['suvr'], 'CT_MTT': arrays['suvr']}
        for i, (name, array) in enumerate(named.items()):
            image = f'{folder}{name}.{345000 + 10 * number + i}'
            write(f'{image}/{os.path.basename(image)}.nii', array, affine('RAS', (1.5, 1.5, 8.0)), step=1.0)
            open(f'{image}/License.txt', 'w').close()
    return [f'case_{number}' for number in (1, 10, 2, 3)]


def write_isles_24():
    ids = [f'sub-stroke{number:04}' for number in (1, 2, 4, 189)]
    for number, id in enumerate(ids):
        arrays = volumes(frames=20, seed=number)
        derived = f'data/train/derivatives/{id}'
        for name in ('ctp', 'cta'):
            write(
                f'{derived}/ses-01/{id}_ses-01_space-ncct_{name}.nii.gz',
                arrays['ctp'] if name == 'ctp' else arrays['ctp'][..., 0],
            )
        for name in ('tmax', 'mtt', 'cbf', 'cbv'):
            write(f'{derived}/ses-01/perfusion-maps/{id}_ses-01_space-ncct_{name}.nii.gz', arrays['suvr'])
        for name, array in (('dwi', arrays['dwi']), ('adc', arrays['adc'] * 1e-6), ('lesion-msk', arrays['lesion'])):
            write(f'{derived}/ses-02/{id}_ses-02_space-ncct_{name}.nii.gz', array)
        write(f'data/train/raw_data/{id}/ses-01/{id}_ses-01_ctp.nii.gz', arrays['ctp'])
    return ids


def write_adni():
    ids = ['002_S_0295', '002_S_0413', '011_S_0021', '127_S_0259']
    tracer = 'AV45_Coreg,_Avg,_Std_Img_and_Vox_Siz,_Uniform_Resolution'
    for number, id in enumerate(ids):
        arrays = volumes((12, 14, 12), seed=number)
        sequence = ('MPRAGE', 'MP-RAGE', 'MPRAGE_GRAPPA2', 'MP-RAGE_REPEAT')[number]
        folder = f'data/ADNI/{id}/{sequence}/2011-06-02_07_56_36.0/I{240811 + number}'
        file = f'ADNI_{id}_MR_{sequence}_br_raw_20110602125224646_127_S110474_I{240811 + number}.nii'
        write(f'{folder}/{file}', arrays['mri'])
        shape, matrix = (22, 24, 26), affine('RAS', (3.1, 3.0, 3.0), (0, 4, 0))  # a grid of its own, as a scanner has
        matrix[:3, 3] = (OBLIQUE @ (6, 7, 6, 1))[:3] - matrix[:3, :3] @ (11, 12, 13)
        pet = grid.onto(arrays['suvr'][None].astype(np.float32), OBLIQUE, matrix, shape)[0]
        folder = f'data/ADNI/{id}/{tracer}/2011-06-09_11_00_00.0/I{300000 + number}'
        write(f'{folder}/ADNI_{id}_PT_{tracer}_Br_20110610_I{300000 + number}.nii', pet, matrix)
        write(f'data/mask/{id}.nii.gz', arrays['mask'])
    return ids


def lapt():
    write_stroke()
    return list(IDS)


def il_cldm():
    write_amyloid()
    return list(IDS)


LAYOUTS = {
    'lapt': (lapt, dict(data_root='data')),
    'il-cldm': (il_cldm, dict(preset='mri2pet_demo', data_root='data')),
    'isles 2018': (write_isles_2018, ISLES_2018),
    'isles 24': (write_isles_24, ISLES_24),
    'adni': (write_adni, ADNI),
}


def settings(values, *words):
    """Settings of a layout with a small image and no labels; values as in config.py."""
    cfg = config.load('', argv=['--preset', values.get('preset', 'ctp2dwi_demo'), '--num_classes', '0', *words])
    for name, value in values.items():
        setattr(cfg, name, value)
    cfg.data_info, cfg.spacing, cfg.image_size = 'lists', None, (20,) * cfg.spatial_dims
    return cfg


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layout(layout, capsys):
    """The lists are made from the files found, every file is read, and training samples come out."""
    make, values = LAYOUTS[layout]
    ids = make()
    cfg = settings(values)
    cfg.make_splits = '0.5,0.25,0.25'
    assert dataset.main(cfg) == 0
    lists = {split: dataset.read_split('lists', split) for split in splits.SPLITS}
    assert sorted(id for names in lists.values() for id in names) == sorted(ids)
    assert [len(names) for names in lists.values()] == [2, 1, 1]

    cfg.make_splits = ''
    capsys.readouterr()
    assert dataset.main(cfg) == 0, capsys.readouterr().out
    spec = dataset.Spec.from_settings(cfg)
    cohort = dataset.Cohort(spec, ids)
    assert cohort[0]['source'].shape[0] == (cfg.frames or 1) and cohort[0]['target'].shape[0] == len(cfg.targets)
    subject = dataset.load_subject(spec, ids[0])
    assert set(subject.to_native(subject.target)) == set(cfg.targets)


def test_summary_is_indented(capsys):
    lapt()
    cfg = settings(dict(data_root='data'))
    cfg.data_info, cfg.make_splits = 'data/data_info', ''
    assert dataset.main(cfg) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith('  ') for line in out.splitlines())
    for words in (
        'Subjects: 2 in train, 1 in validation, 1 in test',
        'shape: 14 x 17 x 5 (4)',
        'orientation: LAS (4)',
        'frames: 6 (4)',
        'scan time: 10..10 s',
        'lesion: 4 subjects',
        'No fault in 4 subjects',
    ):
        assert words in out
    assert 'checking' in err


# ----------------------------------------------------------------------------------------------------------------------
# Templates

def test_suffixes_find_each_other():
    write('data/a/x.nii.gz', np.ones((3, 3, 3)))
    write('data/b/x.nii', np.ones((3, 3, 3)))
    for id, suffix in (('a', '.nii.gz'), ('b', '.nii')):
        for wanted in ('.nii', '.nii.gz'):
            assert splits.find_file('{root}/{id}/x' + wanted, 'data', id) == f'data/{id}/x{suffix}'
            assert splits.find_file('{root}/{id}/*' + wanted, 'data/', id) == f'data/{id}/x{suffix}'
    shutil.copy('data/a/x.nii.gz', 'data/b/')  # both: the one that is named
    assert splits.find_file('{root}/{id}/x.nii', 'data', 'b') == 'data/b/x.nii'


def test_star_must_match_one_file():
    for name in ('ADNI_1.nii', 'ADNI_2.nii'):
        write(f'data/a/{name}', np.ones((3, 3, 3)))
    with pytest.raises(
        DataError, match=r'2 files match .data/a/\*.nii. \(data/a/ADNI_1.nii, data/a/ADNI_2.nii\); keep one'
    ):
        splits.find_file('{root}/{id}/*.nii', 'data', 'a')
    with pytest.raises(DataError, match=r'data/b/\*.nii is missing'):
        splits.find_file('{root}/{id}/*.nii', 'data', 'b')


@pytest.mark.parametrize(
    'template, words',
    [
        ('{root}/x.nii', 'lacks {id}'),
        ('{root}/{id}/{visit}.nii', 'may hold only'),
        ('{root}/{id}/{.nii', 'may hold only'),
    ],
)
def test_wrong_templates(template, words):
    with pytest.raises(DataError, match=words):
        splits.find_file(template, 'data', 'a')


def test_names_with_wild_characters_are_plain():
    write('da[t]a/a[1]/x?.nii', np.ones((3, 3, 3)))
    write('da[t]a/a1/xy.nii', np.ones((3, 3, 3)))
    assert splits.find_file('{root}/{id}/x*.nii', 'da[t]a', 'a[1]') == 'da[t]a/a[1]/x?.nii'
    assert splits.find_ids('{root}/{id}/x*.nii', 'da[t]a') == ['a1', 'a[1]']
    with pytest.raises(DataError, match=r'da\[t\]a/a\[2\]/x\*.nii is missing'):
        splits.find_file('{root}/{id}/x*.nii', 'da[t]a', 'a[2]')


def test_ids_are_found_where_they_repeat():
    for path in ('d/p1/p1_a.nii', 'd/p2/p2_b.nii.gz', 'd/p3/q3_b.nii', 'd/lists/train.txt'):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, 'w').close()
    assert splits.find_ids('{root}/{id}/{id}_*.nii.gz', 'd') == ['p1', 'p2']


# ----------------------------------------------------------------------------------------------------------------------
# Lists

def test_visits_of_a_patient_stay_together():
    rows = {f'v{i:02}': f'0,p{i // 3}' for i in range(30)}
    write_lists('lists', [], [], [], rows)
    for split in splits.SPLITS:
        os.remove(f'lists/{split}.txt')
    lists = splits.make_splits(list(rows), 'lists', '0.7,0.1,0.2', seed=3)
    patients = {split: {rows[id] for id in names} for split, names in lists.items()}
    assert [len(names) for names in lists.values()] == [21, 3, 6]
    assert not (patients['train'] & patients['test'] | patients['train'] & patients['validation'])
    assert lists == {split: dataset.read_split('lists', split) for split in splits.SPLITS}
    with pytest.raises(DataError, match='lists/train.txt.* exists already'):
        splits.make_splits(list(rows), 'lists', '0.7,0.1,0.2')
    again = splits.make_splits(reversed(list(rows)), 'other', '0.7,0.1,0.2', seed=3)
    assert sorted(id for names in again.values() for id in names) == sorted(rows)


@pytest.mark.parametrize('count', range(3, 12))
def test_every_list_is_filled(count):
    lists = splits.make_splits([f's{i}' for i in range(count)], f'lists{count}', '0.7,0.1,0.2')
    assert all(lists.values()) and sum(map(len, lists.values())) == count


@pytest.mark.parametrize('shares', ['0.7,0.3', '0.7,0.2,0.2', 'a,b,c', '1,0,0', '0.5,-0.1,0.6'])
def test_wrong_shares(shares):
    with pytest.raises(DataError, match='three positive shares'):
        splits.make_splits(['a', 'b', 'c'], 'lists', shares)


def test_too_few_patients():
    with pytest.raises(DataError, match='at least 3 patients, but the templates found 2'):
        splits.make_splits(['a', 'b'], 'lists', '0.7,0.1,0.2')


def test_incomplete_subjects_are_left_out_and_named(capsys):
    write_stroke(ids=('s01', 's02', 's03', 's04', 's05'))
    os.remove('data/s05/adc.nii.gz')
    cfg = settings(dict(data_root='data'))
    cfg.make_splits = '0.5,0.25,0.25'
    assert dataset.main(cfg) == 0
    assert '  left out s05: data/s05/adc.nii.gz is missing' in capsys.readouterr().out
    assert 's05' not in sum((dataset.read_split('lists', split) for split in splits.SPLITS), [])


def test_lists_and_tables_as_people_write_them():
    os.makedirs('lists')
    for split, text in (
        ('train', '\ufeff# our first\r\n0001\r\n\r\n 0002 \r\n'),
        ('validation', '0003'),
        ('test', '0004\n'),
    ):
        with open(f'lists/{split}.txt', 'w', encoding='utf-8', newline='') as file:
            file.write(text)
    with open('lists/data_info.csv', 'w', encoding='utf-8', newline='') as file:
        file.write('\ufeffID; label ;patient\r\n0001;1;p1\r\n0002;0.0;p2\r\n')  # as a spreadsheet exports it
    assert dataset.read_split('lists', 'train') == ['0001', '0002']
    assert dataset.read_labels('lists', ['0001', '0002'], 2) == {'0001': 1, '0002': 0}


def test_the_example_is_in_order(repo):
    lists, faults = dataset.read_lists(repo / 'data_info')
    assert not faults and all(lists.values())
    ids = [id for names in lists.values() for id in names]
    assert set(dataset.read_labels(repo / 'data_info', ids, 2).values()) == {0, 1}
