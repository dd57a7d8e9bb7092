"""The phantoms: the same subject whatever the number of subjects or workers, the layouts, and how hard they are."""

import contextlib
import io

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import anatomy
import describe
import metrics
import phantom
import stroke


@pytest.fixture(scope='module')
def stroke_set(tmp_path_factory):
    out = tmp_path_factory.mktemp('stroke') / 'data'
    return out, phantom.make_data_set('ctp2dwi', out, 12, 1)


@pytest.fixture(scope='module')
def amyloid_set(tmp_path_factory):
    out = tmp_path_factory.mktemp('amyloid') / 'data'
    return out, phantom.make_data_set('mri2pet', out, 12, 1)


def measured(folder):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        figures = describe.describe(folder)
    assert len(text.getvalue().splitlines()) == len(figures) + 1
    return figures


def test_stroke_layout(stroke_set):
    out, table = stroke_set
    lists = {s: (out / 'data_info' / f'{s}.txt').read_text().split() for s in ('train', 'validation', 'test')}
    assert sorted(sum(lists.values(), [])) == sorted(table.ID) and [len(v) for v in lists.values()] == [9, 1, 2]
    assert list(pd.read_csv(out / 'data_info' / 'data_info.csv').columns) == ['ID', 'label', 'patient']
    for id in table.ID:
        names = ('ctp', 'dwi', 'adc', 'mask', 'lesion', 'clean_dwi', 'clean_adc')
        images = {n: nib.load(out / id / f'{n}.nii.gz') for n in names}
        ctp, mask, lesion = images['ctp'], images['mask'].get_fdata() > 0, images['lesion'].get_fdata() > 0
        assert ctp.shape[3] == 15 and ctp.header.get_zooms() == (3, 3, 5, 3.5)
        assert ctp.header.get_xyzt_units() == ('mm', 'sec')
        for image in images.values():
            assert image.shape[:3] == mask.shape and np.allclose(image.affine, ctp.affine)
            assert np.isfinite(image.get_fdata()).all() and (image.get_fdata()[~mask] == 0).all()
        assert mask.any() and not (lesion & ~mask).any()
        assert all(np.ptp(i) + 1 <= n for i, n in zip(np.nonzero(mask), (62, 70, 28), strict=True))


def test_amyloid_layout(amyloid_set):
    out, table = amyloid_set
    for id in table.ID:
        images = [nib.load(out / n / f'{id}.nii') for n in ('whole_MRI', 'whole_Abeta', 'mask', 'roi', 'clean_Abeta')]
        mask, roi = (images[k].get_fdata() > 0 for k in (2, 3))
        assert all(i.shape == mask.shape and np.allclose(i.affine, images[0].affine) for i in images)
        assert all(np.ptp(i) + 1 <= n for i, n in zip(np.nonzero(mask), (40, 48, 40), strict=True))
        assert roi.any() and not (roi & ~mask).any()
    assert set(table.label) == {0, 1} and ((table.suvr_clean > 1.11) == (table.label == 1)).all()
    assert np.allclose(table.suvr_clean, table.suvr_drawn, atol=1e-3)


@pytest.mark.parametrize('task', ['ctp2dwi', 'mri2pet'])
def test_subject_depends_on_seed_and_index_alone(task, tmp_path, request):
    out, _ = request.getfixturevalue('stroke_set' if task == 'ctp2dwi' else 'amyloid_set')
    phantom.make_data_set(task, tmp_path / 'few', 3, 1, workers=1)
    same = [p for p in (tmp_path / 'few').rglob('*') if 'sub-' in str(p.relative_to(tmp_path)) and p.is_file()]
    assert len(same) >= 15
    assert all(p.read_bytes() == (out / p.relative_to(tmp_path / 'few')).read_bytes() for p in same)


def test_run_again_fills_gaps_only(stroke_set):
    out, table = stroke_set
    one, other = (out / id / 'dwi.nii.gz' for id in table.ID[:2])
    kept, before = one.stat().st_mtime_ns, other.read_bytes()
    other.unlink()
    again = phantom.make_data_set('ctp2dwi', out, 12, 1, workers=1)
    assert one.stat().st_mtime_ns == kept and other.read_bytes() == before
    assert again.equals(table)


def test_affines_differ(stroke_set, amyloid_set):
    for (out, table), name in ((stroke_set, '{}/dwi.nii.gz'), (amyloid_set, 'whole_MRI/{}.nii')):
        affines = [nib.load(out / name.format(id)).affine for id in table.ID]
        assert len({nib.aff2axcodes(a) for a in affines}) >= 2
        assert len({tuple(np.round(a[:3, 3], 2)) for a in affines}) == len(affines)
        assert all(np.abs(a[:3, :3]).max(0).min() < np.linalg.norm(a[:3, :3], axis=0).max() for a in affines)


def test_stroke_difficulty(stroke_set):
    figures = measured(stroke_set[0])
    for name in ('white-matter SNR at b = 1000', 'CTP noise, HU a voxel', 'CTP in-mask median, HU',
                 'ADC in-mask median',
                 'Dice of the lesion rule on the real images', 'false ml of the rule without a lesion'):
        value, (low, high) = figures[name]
        assert np.isnan(value) or low <= value <= high, (name, value)
    perfusion = max(v for n, (v, _) in figures.items() if 'best threshold' in n)
    assert 0.25 < perfusion < 0.85  # perfusion tells the infarct in part; the window proper is for 96 subjects


def test_amyloid_difficulty(amyloid_set):
    for name, (value, window) in measured(amyloid_set[0]).items():
        if window and name != 'share positive':
            assert window[0] <= value <= window[1], (name, value)


def test_without_a_lesion():
    index = next(i for i in range(100) if not stroke.draw_facts(phantom.stream(1, i, 0, 'default'))['lesion'])
    images, facts, brain = phantom.stroke_subject(1, index, (3.0, 3.0, 5.0))
    assert not images['lesion'].any() and facts['lesion_ml'] == 0 and not facts['lesion']
    assert describe.lesion_rule(images['dwi'], images['adc'], brain.mask, brain.voxel_ml).sum() * brain.voxel_ml < 0.5


def test_truth_without_noise(stroke_set):
    out, table = stroke_set
    for n in ('dwi', 'adc'):
        noisy, clean = (describe.read(out / table.ID[0] / f'{k}.nii.gz')[0] for k in (n, f'clean_{n}'))
        assert 0 < np.abs(noisy - clean).mean() < 0.1 * clean.mean()


def test_enhancement_is_the_convolution():
    maps = {'cbf': np.array([53.0, 10.0]), 'mtt': np.array([3.7, 12.0]), 'delay': np.array([1.0, 6.0])}
    times = np.arange(15) * 3.5
    curve, _ = stroke.enhancement(maps, times, 5, 1.5, 400)
    fine = np.arange(0, 60, 0.1)

    def gamma(t, b):
        return (np.clip(t, 0, None) / (3 * b)) ** 3 * np.exp(3 - np.clip(t, 0, None) / b)
    aif = 400 * (gamma(fine - 5, 1.5) + 0.12 * gamma(fine - 14, 4.5))
    for v in range(2):
        whole = np.convolve(aif, np.exp(-fine / maps['mtt'][v]))[:len(fine)] * 0.1 * maps['cbf'][v] / 6000
        assert np.allclose(curve[v], np.interp(times - maps['delay'][v], fine, whole), atol=0.03 * whole.max())


def test_atrophy_moves_volumes():
    small, large = (anatomy.make_brain(np.random.default_rng(0), (44, 52, 44), (4, 4, 4), atrophy=a, ventricles=a)
                    for a in (-1.5, 1.5))
    assert large.ventricle_ml > 1.5 * small.ventricle_ml and large.gm_ml < small.gm_ml
    assert np.allclose((small.gm + small.wm + small.csf)[small.mask], small.brain[small.mask], atol=1e-4)


@pytest.mark.parametrize('arguments', [['--out', '{d}'], [], ['--describe', '{d}'],
                                       ['--task', 'ctp2dwi', '--out', '{d}', '--subjects', '2'],
                                       ['--task', 'ctp2dwi', '--out', '{d}/full'],
                                       ['--task', 'ctp2dwi', '--out', '{d}/full/a'],
                                       ['--task', 'mri2pet', '--out', '{d}/other'],
                                       ['--task', 'mri2pet', '--out', '{d}/x', '--split', '1,0,0'],
                                       ['--task', 'mri2pet', '--out', '{d}/x', '--spacing', '4,4']])
def test_mistakes_are_one_sentence(arguments, tmp_path, capsys):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'a').write_text('mine')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'phantom.json').write_text('{"task": "ctp2dwi"}')
    assert phantom.main([a.format(d=tmp_path) for a in arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith('phantom.py: ') and len(said.splitlines()) == 1
    assert (tmp_path / 'full' / 'a').read_text() == 'mine' and not (tmp_path / 'x').exists()


def test_the_lesion_rule_of_describe_is_that_of_the_tables():
    rng = np.random.default_rng(0)
    mask, adc = np.ones((30, 30, 12), bool), np.where(rng.random((30, 30, 12)) < 0.06, 400.0, 800.0)
    dwi = np.where(adc < 620, 2.0, 1.0)
    found = describe.lesion_rule(dwi, adc, mask, 0.045)
    assert found.any() and np.array_equal(found, metrics.lesion_rule(dwi, adc, mask, 0.045))
