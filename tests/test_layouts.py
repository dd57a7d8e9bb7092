"""Path templates on trees of files named as real data sets name them, and the three lists made from them."""
import functools
import os
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from made_data import affine, settings, write, write_lists, write_stroke, write_table

import config
import dataset
import grid
import phantom
import splits
import volume
from dataset import DataError

# ----------------------------------------------------------------------------------------------------------------------
# Layouts: how the files are named, and the settings that find them

def presets_of_the_readme(repo):
    """The lines that the README tells a user to add to config.py, run: name -> preset."""
    text = (repo / 'README.md').read_text(encoding='utf-8')
    lines = re.search(r'### Layouts.*?```python\n(.*?)```', text, flags=re.S)[1]
    presets = dict(config.PRESETS)
    exec(lines, dict(PRESETS=presets))
    return {name: values for name, values in presets.items() if name not in config.PRESETS}


@functools.cache
def phantoms(task):
    """Four phantoms in 8 mm: (dict of arrays, affine) each."""
    make = phantom.stroke_subject if task == 'ctp2dwi' else phantom.amyloid_subject
    made = (make(3, index, (8.0, 8.0, 8.0)) for index in range(4))
    return [(images, brain.affine) for images, _, brain in made]


def write_lapt(root):
    ids = ['0001', '0002', 'CHUV_17', 'x y']
    for id, (images, matrix) in zip(ids, phantoms('ctp2dwi'), strict=True):
        for name in ('ctp', 'dwi', 'adc', 'mask', 'lesion'):
            write(f'{root}/{id}/{name}.nii.gz', images[name], matrix, step=3.5)
    return ids


def write_il_cldm(root):
    ids = ['002_S_0295', '002_S_0413', '011_S_0021', '127_S_0259']
    for id, (images, matrix) in zip(ids, phantoms('mri2pet'), strict=True):
        for folder, name in (('whole_MRI', 'mri'), ('whole_Abeta', 'pet'), ('mask', 'mask'), ('roi', 'roi')):
            write(f'{root}/{folder}/{id}.nii', images[name], matrix)
    write_table(f'{root}/data_info', {id: f'{i % 2},' for i, id in enumerate(ids)})
    return ids


def write_isles_2018(root):
    ids = [f'case_{number}' for number in (1, 2, 3, 10)]
    for number, (id, (images, matrix)) in enumerate(zip(ids, phantoms('ctp2dwi'), strict=True)):
        count = 43 + 2 * number
        ctp = volume.resample_time(images['ctp'], np.arange(count) / 3.5, 1)
        named = {'CT_4DPWI': ctp, 'CT_CBF': images['clean_cbf'], 'CT_Tmax': images['clean_tmax'], 'CT': ctp[..., 0],
                 'OT': images['lesion'], 'CT_CBV': images['clean_cbf'], 'CT_MTT': images['clean_tmax']}
        for i, (name, array) in enumerate(named.items()):
            image = f'{root}/TRAINING/{id}/SMIR.Brain.XX.O.{name}.{345000 + 10 * number + i}'
            write(f'{image}/{os.path.basename(image)}.nii', array, matrix, step=1.0)
            open(f'{image}/License.txt', 'w').close()
    return ids


def write_isles_24(root):
    ids = [f'sub-stroke{number:04}' for number in (1, 2, 4, 189)]
    for id, (images, matrix) in zip(ids, phantoms('ctp2dwi'), strict=True):
        derived, ctp = f'{root}/train/derivatives/{id}', images['ctp']
        write(f'{derived}/ses-01/{id}_ses-01_space-ncct_ctp.nii.gz', ctp, matrix)
        write(f'{derived}/ses-01/{id}_ses-01_space-ncct_cta.nii.gz', ctp[..., 0], matrix)
        write(f'{root}/train/raw_data/{id}/ses-01/{id}_ses-01_ctp.nii.gz', ctp, matrix)
        for name in ('tmax', 'mtt', 'cbf', 'cbv'):
            write(f'{derived}/ses-01/perfusion-maps/{id}_ses-01_space-ncct_{name}.nii.gz', images['clean_tmax'], matrix)
        for name, array in (('dwi', images['dwi']), ('adc', images['adc'] * 1e-6), ('lesion-msk', images['lesion'])):
            write(f'{derived}/ses-02/{id}_ses-02_space-ncct_{name}.nii.gz', array, matrix)
    return ids


def write_adni(root):
    ids = ['002_S_0295', '002_S_0413', '011_S_0021', '127_S_0259']
    tracer = 'AV45_Coreg,_Avg,_Std_Img_and_Vox_Siz,_Uniform_Resolution'
    for number, (id, (images, matrix)) in enumerate(zip(ids, phantoms('mri2pet'), strict=True)):
        sequence = ('MPRAGE', 'MP-RAGE', 'MPRAGE_GRAPPA2', 'MP-RAGE_REPEAT')[number]
        folder = f'{root}/ADNI/{id}/{sequence}/2011-06-02_07_56_36.0/I{240811 + number}'
        file = f'ADNI_{id}_MR_{sequence}_br_raw_20110602125224646_127_S110474_I{240811 + number}.nii'
        write(f'{folder}/{file}', images['mri'], matrix)
        shape, other = (29, 33, 31), affine('RAS', (6.1, 6.0, 6.0), (0, 4, 0))  # a grid of its own, as a scanner has
        centre = matrix @ (*(np.array(images['mri'].shape) / 2), 1)
        other[:3, 3] = centre[:3] - other[:3, :3] @ (np.array(shape) / 2)
        pet = grid.onto(images['pet'][None].astype(np.float32), matrix, other, shape)[0]
        folder = f'{root}/ADNI/{id}/{tracer}/2011-06-09_11_00_00.0/I{300000 + number}'
        write(f'{folder}/ADNI_{id}_PT_{tracer}_Br_20110610_I{300000 + number}.nii', pet, other)
        write(f'{root}/mask/{id}.nii.gz', images['mask'], matrix)
    return ids


LAYOUTS = {'my_stroke': write_lapt, 'my_amyloid': write_il_cldm, 'isles24': write_isles_24,
           'isles2018': write_isles_2018, 'adni': write_adni}


def test_every_layout_of_the_readme_is_tried(repo):
    assert set(presets_of_the_readme(repo)) == set(LAYOUTS)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layout(layout, repo, monkeypatch, capsys):
    """
    By the README's lines alone, but for the size of the images: the lists are made from the files found, every file is
    read without a fault, training samples come out, and the true images, written as predictions, lie over the source.
    """
    monkeypatch.setattr(config, 'PRESETS', config.PRESETS | presets_of_the_readme(repo))
    values = config.PRESETS[layout]
    ids = LAYOUTS[layout](values['data_root'])
    dims = config.load('', ['--preset', layout], extra=dataset.FLAGS).spatial_dims
    spacing, size = ('(8, 8, 8)', (24, 28, 24)) if layout != 'adni' else ('(5, 5, 5)', (36, 44, 40))
    words = ['--preset', layout, '--spacing', spacing, '--image_size', str(size[:dims])]

    def run(*more):
        code = dataset.main(config.load('', [*words, *more], extra=dataset.FLAGS))
        return code, capsys.readouterr().out

    assert run('--make_splits', '0.5,0.25,0.25')[0] == 0
    lists = {split: dataset.read_split(values['data_info'], split) for split in splits.SPLITS}
    assert sorted(id for names in lists.values() for id in names) == sorted(ids)
    assert [len(names) for names in lists.values()] == [2, 1, 1]
    code, said = run()
    assert code == 0 and 'No fault in 4 subjects' in said, said

    cfg = config.load('', words)
    assert all(getattr(cfg, name) == value for name, value in values.items() if name not in ('spacing', 'image_size'))
    spec = dataset.Spec.from_settings(cfg)
    labels = dataset.read_labels(cfg.data_info, ids, cfg.num_classes) if cfg.num_classes else None
    sample = dataset.Cohort(spec, ids, labels)[0]
    assert sample['source'].shape[0] == spec.source_channels and sample['target'].shape[0] == len(cfg.targets)
    subject = dataset.load_subject(spec, ids[0])
    original, truth = nib.load(spec.path('source', ids[0])), subject.truth()
    for name, image in subject.to_native(subject.target).items():
        dataset.write_volume(f'out/{name}.nii.gz', image, subject)
        written = nib.load(f'out/{name}.nii.gz')
        assert written.shape == original.shape[:3] and np.array_equal(written.affine, original.affine)
        inside = subject.native_mask
        values = np.asanyarray(written.dataobj)
        assert written.get_data_dtype() == np.float32 and not values[~inside].any()
        wanted = np.clip(truth[name], *dataset.scaling_range(spec, name))
        off, *moved = (np.abs(values - np.roll(wanted, by, axis))[inside].mean()
                       for by, axis in ((0, 0), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, 2), (-1, 2)))
        assert off < 0.5 * min(moved) if layout == 'adni' else off < 1e-3 * wanted[inside].std(), (off, moved)


def test_summary_is_indented(capsys):
    write_stroke()
    cfg = settings()
    cfg.make_splits, cfg.without_truth = '', False
    assert dataset.main(cfg) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith('  ') for line in out.splitlines())
    for words in (
        'Subjects: 2 in train, 1 in validation, 1 in test',
        'shape: 14 x 17 x 5 (4)',
        'orientation: LAS (4)',
        'frames: 6 (4)',
        'scan time: 10..10 s',
        'time points: 6, spread evenly over each scan',
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
    again = splits.make_splits(list(reversed(list(rows))), 'other', '0.7,0.1,0.2', seed=3)
    assert sorted(id for names in again.values() for id in names) == sorted(rows)


def test_a_table_of_patients_must_name_them_all():
    rows = {f'v{i}': f'0,p{i // 2}' for i in range(8)}
    write_lists('lists', [], [], [], rows)
    for split in splits.SPLITS:
        os.remove(f'lists/{split}.txt')
    with pytest.raises(DataError, match=r'names patients, but has no row for new \(1 subjects in all\)'):
        splits.make_splits([*rows, 'new'], 'lists', '0.7,0.1,0.2')
    write_lists('some', ['a'], ['b'], ['c'], dict(a='0,p', b='1,', c='0,q'))
    with pytest.raises(DataError, match=r'names no patient for b \(1 rows in all\); fill the column for each ID'):
        dataset.read_split('some', 'train')
    with open('lists/data_info.csv', 'w', encoding='utf-8') as file:  # another spelling of the columns
        file.write('id,Patient\n' + ''.join(f'v{i},p{i // 2}\n' for i in range(8)))
    lists = splits.make_splits(list(rows), 'lists', '0.7,0.1,0.2')
    assert all(len(names) % 2 == 0 for names in lists.values())


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
    cfg = settings('--data_info', 'lists')
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
        file.write('0003;;p3\r\n0004;;p4\r\n')
    assert dataset.read_split('lists', 'train') == ['0001', '0002']
    assert dataset.read_labels('lists', ['0001', '0002'], 2) == {'0001': 1, '0002': 0}


def test_the_example_is_in_order(repo):
    lists, faults = dataset.read_lists(repo / 'data_info')
    assert not faults and all(lists.values())
    ids = [id for names in lists.values() for id in names]
    assert set(dataset.read_labels(repo / 'data_info', ids, 2).values()) == {0, 1}
