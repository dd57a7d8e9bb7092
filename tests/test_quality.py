"""Intervals that cover what they promise, and a source check that flags what does not belong."""
import json
from pathlib import Path

import made_runs
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage, stats

import config
import dataset
import evaluate
import phantom
import quality


def predictions(n, spread, extra, seed):
    """n subjects whose errors have the variance std^2 + extra^2; std varies over the image up to 2 x spread."""
    rng = np.random.default_rng(seed)
    truth = [rng.random((12, 14, 10)) for _ in range(n)]
    std = [spread * 2 * rng.random(t.shape) for t in truth]
    pred = [t + np.sqrt(s ** 2 + extra ** 2) * rng.standard_normal(t.shape) for t, s in zip(truth, std, strict=True)]
    return pred, std, truth, [rng.random(t.shape) > 0.3 for t in truth]


# ---------------------------------------------------------------------------------------------------------------------
# intervals

def test_intervals_find_the_noise_and_cover_new_subjects():
    fit = quality.interval_fit(*predictions(6, spread=0.1, extra=0.05, seed=0))
    for half, z in zip(fit['half'], (stats.norm.ppf(0.75), stats.norm.ppf(0.95)), strict=True):
        assert half == pytest.approx(z * np.hypot(fit['std'], 0.05), rel=0.1)
    assert json.loads(json.dumps(fit)) == fit
    for subject in zip(*predictions(3, spread=0.1, extra=0.05, seed=1), strict=True):
        cover = quality.interval_coverage(*subject, fit)
        assert cover['coverage_50'] == pytest.approx(0.5, abs=0.05)
        assert cover['coverage_90'] == pytest.approx(0.9, abs=0.04)
        assert cover['width_90'] > cover['width_50'] > 0
    assert quality.interval_coverage(subject[0] + 0.5, *subject[1:], fit)['coverage_90'] < 0.1


def test_intervals_are_right_where_the_std_is_small_and_where_it_is_large():
    """Whatever the std's scale, also where few voxels have a large one and its errors are not normal."""
    rng = np.random.default_rng(0)

    def subjects(n):
        std = [np.where(rng.random((30, 30, 20)) < 0.02, 1.0, 0.001) for _ in range(n)]
        error = [np.where(s == 1, 3 * rng.random(s.shape), 0.1 * rng.standard_normal(s.shape)) for s in std]
        return error, std, [np.zeros(s.shape) for s in std], [np.ones(s.shape) for s in std]

    fit = quality.interval_fit(*subjects(6))
    assert fit['half'][1] == pytest.approx([0.1 * stats.norm.ppf(0.95), 2.7], rel=0.03)
    pred, std, truth, mask = (x[0] for x in subjects(1))
    assert quality.interval_coverage(pred, std, truth, mask, fit)['coverage_90'] == pytest.approx(0.9, abs=0.01)
    assert quality.interval_coverage(pred, std, truth, std == 1, fit)['coverage_90'] == pytest.approx(0.9, abs=0.05)
    half = quality.interval_fit([0 * std + (std < 1)], [std], [truth], [mask])['half'][1]
    assert half == sorted(half)  # what has the larger std never has the narrower interval
    std.flat[:2500] = np.arange(2500) / 2500  # equal ones beside others: no group is smaller than GROUP
    uneven = [x.ravel()[:9000] for x in (pred, np.where(std < 0.4, std, 0.5), truth, mask)]
    assert quality.interval_fit(*[[x] for x in uneven])['std'][-1] == 0.5
    few = quality.interval_fit(*[[x.ravel()[:999]] for x in (pred, std, truth, mask)])
    assert len(few['std']) == 1  # fewer voxels than two groups


def test_intervals_of_one_number_cover_new_subjects():
    """By rank, not by quantile: with few subjects, too, a further one is covered as often as said."""
    rng, covered, narrow = np.random.default_rng(0), [], []
    for _ in range(400):
        spread = rng.uniform(0.5, 4, 13)
        value = rng.uniform(0, 50, 13)
        numbers = np.stack([value, spread, value + spread * rng.normal(size=13)], axis=1)
        fit = quality.number_fit(numbers[:12])
        value, spread, truth = numbers[12]
        low, high = quality.number_interval(value, spread, fit)
        covered.append(low <= truth <= high)
        narrow.append((high - low, spread))
    assert 0.88 <= np.mean(covered) <= 0.97  # 12 of 12 scores: 12 / 13 = 0.92
    assert np.corrcoef(np.transpose(narrow))[0, 1] > 0.5
    fit = quality.number_fit(numbers[:8])
    assert fit['q'] == [0.5]
    with pytest.raises(quality.QualityError, match='no interval was fitted at level 0.9'):
        quality.number_interval(1.0, 1.0, fit)
    assert quality.number_fit(numbers[:1])['q'] == [0.5]
    assert quality.number_interval(1.0, 50.0, quality.number_fit(numbers), lowest=0)[0] == 0


def test_intervals_without_any_spread():
    pred, std, truth, mask = predictions(6, spread=0.0, extra=0.05, seed=0)
    fit = quality.interval_fit(pred, std, truth, mask, q=(0.5, 0.8, 0.9))
    assert fit['std'] == [0] and len(fit['half'][0]) == 1
    half = quality.interval_half_width(std[0], fit, 0.9)
    assert half.shape == std[0].shape and np.allclose(half, 0.05 * stats.norm.ppf(0.95), rtol=0.06)
    cover = quality.interval_coverage(pred[0], std[0], truth[0], mask[0], fit)
    assert cover['coverage_80'] == pytest.approx(0.8, abs=0.05)
    exact = quality.interval_fit(truth, std, truth, mask)
    assert exact['half'] == [[0], [0]]
    with pytest.raises(quality.QualityError):
        quality.interval_half_width(std[0], fit, 0.95)
    with pytest.raises(quality.QualityError):
        quality.interval_fit([truth[0]], [std[0]], [truth[0]], [np.zeros_like(mask[0])])


def test_subjects_weigh_the_same_and_limits_clip():
    small, large = np.zeros((4, 4, 4)), np.zeros((20, 20, 20))
    pred = [small + 1.0, large + np.where(np.arange(8000).reshape(20, 20, 20) % 10 < 9, 0.1, 0.2)]
    rest = [small, large], [small, large], [small == 0, large == 0]
    fit = quality.interval_fit(pred, *rest, q=(0.4, 0.9))
    assert np.ravel(fit['half']) == pytest.approx([0.1, 1.0])                # 99 % of all voxels are below 0.2
    fit = quality.interval_fit(pred, *rest, q=(0.9,), limits=(0, 0.3))
    assert np.ravel(fit['half']) == pytest.approx(0.3)
    cover = quality.interval_coverage(pred[0], small, small, small == 0, fit, limits=(0, 0.3))
    assert cover['coverage_90'] == 1


# ---------------------------------------------------------------------------------------------------------------------
# the source check

def head(seed, frames=6, shape=(32, 38, 20)):
    """A perfusion-like series of an egg-shaped head, flat below: (C, X, Y, Z) in 0..1, and its mask."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1.05, 1.05, n) for n in shape], indexing='ij')
    x, y, z = (c * rng.normal(1.1, 0.03) + rng.normal(0, 0.02) for c in (x, y, z))
    radius = np.sqrt((x * (1.1 + 0.25 * y)) ** 2 + y ** 2 + z ** 2)
    radius = radius + 0.6 * ndimage.gaussian_filter(rng.standard_normal(shape), 4)
    mask = (radius < 1) & (z > -0.75 + 0.2 * y)
    image = np.where(radius < 0.7, 0.3, 0.36)
    image[(np.abs(x) < 0.2) & (np.abs(y + 0.1) < 0.4) & (np.abs(z - 0.1) < 0.3)] = 0.12
    curve = rng.normal(0.1, 0.01) * np.exp(-((np.arange(frames) - rng.normal(2.5, 0.2)) / 1.2) ** 2)
    series = image + curve[:, None, None, None] * (image > 0.33) + 0.03 * rng.standard_normal((frames, *shape))
    return series, mask


def features(series, mask):
    source = np.where(mask, np.clip(2 * series - 1, -1, 1), -1)
    return quality.source_features(np.moveaxis(source, -1, 0), np.moveaxis(mask[None], -1, 0))


@pytest.fixture(scope='module')
def fit():
    good = [features(*head(i)) for i in range(44)]
    return quality.qc_fit(good[:24], good[24:])


def test_good_sources_pass(fit):
    assert json.loads(json.dumps(fit)) == fit
    flags = [quality.qc_flag(features(*head(1000 + i)), fit) for i in range(30)]
    assert np.mean(flags) <= 0.1


def other_modality(series, mask):
    image = np.select([series.mean(0) < 0.2, series.mean(0) < 0.33], [0.15, 0.9], 0.55)
    return np.repeat(image[None], len(series), 0), mask


BAD = {'another modality': other_modality,
       'upside down': lambda s, m: (s[..., ::-1], m[..., ::-1]),
       'front to back': lambda s, m: (s[:, :, ::-1], m[:, ::-1]),
       'lying on its side': lambda s, m: (np.swapaxes(s[:, :, :32], 1, 2), np.swapaxes(m[:, :32], 0, 1)),
       'noise': lambda s, m: (0.35 + 0.1 * np.random.default_rng(0).standard_normal(s.shape), m),
       'noise added': lambda s, m: (s + 0.15 * np.random.default_rng(0).standard_normal(s.shape), m),
       'values too large': lambda s, m: (s * 1000, m),
       'values too small': lambda s, m: (s / 1000, m),
       'an offset': lambda s, m: (s + 0.2, m),
       'one frame repeated': lambda s, m: (np.repeat(s[:1], len(s), 0), m)}


@pytest.mark.parametrize('fault', BAD)
def test_bad_sources_are_flagged(fit, fault):
    for seed in (2000, 2001):
        made = features(*BAD[fault](*head(seed)))
        assert np.isfinite(made).all()
        assert quality.qc_flag(made, fit), (fault, quality.qc_score(made, fit), fit['threshold'])
    assert len(quality.qc_reason(made, fit).split(', ')) == 3


def test_features_of_slices_and_of_the_volume_are_the_same():
    series, mask = head(0, frames=1)
    source = np.where(mask, 2 * series - 1, -1)
    by_volume = quality.source_features(source[None], mask[None, None])
    assert by_volume == pytest.approx(features(series, mask), rel=1e-6)
    named = dict(zip(quality.FEATURES, by_volume, strict=False))
    assert named['frame_std'] == named['frame_peak'] == 0
    assert named['intensity_50'] == pytest.approx(np.median(np.clip(series, 0, 1)[0][mask]), abs=1e-6)
    with pytest.raises(quality.QualityError):
        quality.source_features(source[None], np.zeros_like(mask)[None, None])


def test_features_by_hand():
    source = np.zeros((1, 2, 8, 12, 8))                      # 0.5 on the scale of 0..1
    source[:, :, :, 6:] = 0.2                                # the front is brighter, 0.6,
    source[:, 1] += 0.4                                      # the second frame by 0.2 everywhere
    made = quality.source_features(source, np.ones((1, 1, 8, 12, 8)))
    named = dict(zip(quality.FEATURES, made, strict=False))
    assert named['intensity_5'] == pytest.approx(0.6) and named['intensity_95'] == pytest.approx(0.7)
    assert named['frame_std'] == pytest.approx(10 * 0.1) and named['clipped'] == 0
    assert named['tilt_y'] > 1
    assert [named['tilt_x'], named['tilt_z'], named['asymmetry']] == pytest.approx([0, 0, 0], abs=1e-5)
    form, light = made[len(quality.FEATURES):].reshape(2, *quality.CELLS)
    assert form == pytest.approx(np.ones(quality.CELLS))     # every cell is full
    assert light[:, :3] == pytest.approx(-1 * np.ones((2, 3, 4)), abs=1e-5)
    assert light[:, 3:] == pytest.approx(np.ones((2, 3, 4)), abs=1e-5)


def test_threshold_lets_one_in_twenty_pass():
    rng = np.random.default_rng(0)
    size = len(quality.FEATURES) + 2 * int(np.prod(quality.CELLS))
    train, validation, new = (1 + 0.2 * rng.standard_normal((n, size)) for n in (40, 59, 400))
    fit = quality.qc_fit(train, validation)
    scores = [quality.qc_score(f, fit) for f in validation]
    assert sum(s > fit['threshold'] for s in scores) == 2    # (59 + 1) / 20 - 1: with the subject to come 3 of 60
    assert np.mean([quality.qc_flag(f, fit) for f in new]) < 0.12
    few = quality.qc_fit(train, validation[:10])
    assert few['threshold'] == pytest.approx(1.5 * max(scores[:10]))
    more = quality.qc_fit(train, validation[:30])
    assert more['threshold'] == pytest.approx(1.25 * max(scores[:30]))
    with pytest.raises(quality.QualityError):
        quality.qc_fit(train[:1], validation)


# ---------------------------------------------------------------------------------------------------------------------
# the same on the phantoms of both tasks, from files, as inference reads them

COHORTS = dict(ctp2dwi=('6,6,8', '(36, 40)'), mri2pet=('6,6,6', '(28, 36, 28)'))


@pytest.fixture(scope='module', params=COHORTS)
def cohort(request, tmp_path_factory):
    """(task, Spec, IDs of subjects that were not fitted on, their features, the fit)."""
    task, (spacing, size) = request.param, COHORTS[request.param]
    with made_runs.folder(tmp_path_factory.mktemp(task)) as path:
        phantom.main(['--task', task, '--out', 'data', '--subjects', '70', '--seed', '3', '--workers', '1', '--spacing',
                      spacing])
        words = ['--preset', f'{task}_demo', '--data_root', str(path / 'data'), '--data_info',
                 str(path / 'data/data_info'), '--spacing', '(None, None, None)', '--image_size', size]
    cfg = config.load('', argv=words)
    spec = dataset.Spec.from_settings(cfg)
    ids = sorted(id for split in ('train', 'validation', 'test') for id in dataset.read_split(cfg.data_info, split))
    found = [of(dataset.load_subject(spec, id, with_truth=False)) for id in ids]
    return task, spec, ids[51:], found, quality.qc_fit(found[:32], found[32:51])


def of(subject):
    return evaluate.source_features(subject.source, subject.mask)


@pytest.mark.slow
def test_at_most_one_good_phantom_in_twenty_is_flagged(cohort):
    task, spec, ids, found, fit = cohort
    assert sum(quality.qc_flag(f, fit) for f in found[32:51]) == 0     # 19 for validation, and with the one to come 20
    assert len(found[51:]) == 19 and sum(quality.qc_flag(f, fit) for f in found[51:]) <= 1


def stretched(image, like, mask):
    """An image with the mean and spread that `like` has in the mask, as many frames."""
    image = like[mask].mean() + (image - image[mask].mean()) / image[mask].std() * like[mask].std()
    return np.broadcast_to(image.reshape(image.shape + (1,) * (like.ndim - 3)), like.shape)


FAULTS = {                                               # source, mask, target -> source, mask
    'another modality': lambda s, m, t: (stretched(t, s, m), m),
    'upside down': lambda s, m, t: (s[:, :, ::-1], m[:, :, ::-1]),
    'front to back': lambda s, m, t: (s[:, ::-1], m[:, ::-1]),
    'noise': lambda s, m, t: (np.random.default_rng(0).normal(s[m].mean(), s[m].std(), s.shape), m),
    'a tenth': lambda s, m, t: (s / 10, m),
    'times 1000': lambda s, m, t: (s * 1000, m),
    'an offset': lambda s, m, t: (s + 20, m),
    'cut off above': lambda s, m, t: (np.minimum(s, np.quantile(s[m], 0.6)), m)}


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_faulty_files_of_both_tasks_are_flagged_or_refused(cohort, fault, tmp_path):
    """An MRI is scaled by its own quantiles: a factor or an offset gives the very same input and does no harm."""
    task, spec, ids, found, fit = cohort
    root = Path(spec.root)
    for id in ids[:4]:
        files = [root / id / f'{name}.nii.gz' for name in ('ctp', 'mask', 'adc')] if task == 'ctp2dwi' else [
            next((root / name).glob(f'{id}.nii*')) for name in ('whole_MRI', 'mask', 'whole_Abeta')]
        source, mask, target = (nib.load(file) for file in files)
        inside = mask.get_fdata() > 0
        made = FAULTS[fault](source.get_fdata(), inside, target.get_fdata())
        for name, array, kind in (('source', made[0], np.float32), ('mask', made[1], np.uint8)):
            nib.save(nib.Nifti1Image(np.ascontiguousarray(array, kind), source.affine), tmp_path / f'{name}.nii')
        try:
            subject = dataset.load_subject(spec, files={k: str(tmp_path / f'{k}.nii') for k in ('source', 'mask')})
        except dataset.DataError as error:
            assert task == 'ctp2dwi' and fault == 'times 1000' and 'HU' in str(error)
            continue
        if task == 'mri2pet' and fault in ('a tenth', 'times 1000', 'an offset'):
            good = dataset.load_subject(spec, id, with_truth=False)
            assert np.abs(subject.source - good.source).max() < 1e-4
        else:
            assert quality.qc_flag(of(subject), fit), (id, quality.qc_score(of(subject), fit), fit['threshold'])
