"""Figures against scikit-image, scipy and cases worked out by hand."""
import time

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage, stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics

RANGES = {'dwi': (0, 3), 'adc': (0, 3000)}
SPACING = (2.0, 2.0, 5.0)                                    # 0.02 ml a voxel


def scene(shape=(40, 44, 12), seed=0):
    """A smooth random brain with a noisy prediction and a box of a lesion that the lesion rule finds exactly."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    mask[4:-4, 5:-3, 1:-1] = True
    lesion = np.zeros(shape, bool)
    lesion[10:18, 12:22, 4:8] = True                         # 320 voxels, 6.4 ml
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), 2)
    smooth = smooth / np.abs(smooth).max()
    truth = {'dwi': 1 + 0.15 * smooth, 'adc': 800 + 60 * smooth}
    truth['dwi'][lesion] = 2.0
    truth['adc'][lesion] = 450.0
    pred = {t: truth[t] + noise * rng.standard_normal(shape) for t, noise in (('dwi', 0.05), ('adc', 30))}
    return pred, truth, mask, lesion


def row(pred, truth, mask, lesion, task='ctp2dwi', ranges=RANGES, **more):
    return metrics.subject_row(pred, truth, mask, lesion, SPACING, ranges, task, **more)


def library_ssim(a, b):
    return structural_similarity(a, b, full=True, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                 data_range=1.0)[1]


# ---------------------------------------------------------------------------------------------------------------------
# image figures

@pytest.mark.parametrize('axis', [0, 1, 2, None])
def test_ssim_and_psnr_equal_scikit_image(axis):
    rng = np.random.default_rng(1)
    shape = (30, 34, 28)
    mask = rng.random(shape) > 0.3
    mask[:3] = mask[:, 30:] = mask[:, :, :8] = False         # so that the crop to the mask has something to cut
    a, b = (metrics.scaled(rng.random(shape), mask, (0, 1)) for _ in range(2))
    b = 0.7 * a + 0.3 * b
    if axis is None:
        expected = library_ssim(a, b)
    else:
        slices = [library_ssim(np.take(a, i, axis), np.take(b, i, axis)) for i in range(shape[axis])]
        expected = np.stack(slices, axis)
    assert metrics.ssim(a, b, mask, axis) == pytest.approx(expected[mask].mean(), abs=1e-10)
    assert metrics.psnr(a, b, mask) == pytest.approx(peak_signal_noise_ratio(a[mask], b[mask], data_range=1), abs=1e-9)


def test_ms_ssim_equals_its_formula_and_orders_noise():
    rng = np.random.default_rng(2)
    shape, mask = (48, 44, 46), np.ones((48, 44, 46), bool)
    a = np.clip(0.5 + 0.2 * ndimage.zoom(rng.standard_normal((12, 11, 23)), (4, 4, 2), order=1), 0, 1)
    noise = rng.standard_normal(shape)
    assert metrics.ms_ssim_scales(shape) == 3 and metrics.ms_ssim_scales((64, 72, 5), axis=2) == 3
    assert [metrics.ms_ssim_scales((n, n)) for n in (8, 21, 22, 43, 44, 175, 176, 999)] == [1, 1, 2, 2, 3, 4, 5, 5]
    assert metrics.ms_ssim(a, a, mask) == pytest.approx(1.0, abs=1e-12)
    scores = [metrics.ms_ssim(a, np.clip(a + s * noise, 0, 1), mask) for s in (0.02, 0.1, 0.3)]
    assert 1 > scores[0] > scores[1] > scores[2] > 0

    # Two scales by hand: the structure term from the library's map over the luminance term, then the library's own map.
    b = np.clip(a + 0.1 * noise, 0, 1)
    mean_a, mean_b = (ndimage.gaussian_filter(x, 1.5, truncate=3.5) for x in (a, b))
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a ** 2 + mean_b ** 2 + 1e-4)
    fine = (library_ssim(a, b) / luminance).mean()
    coarse = library_ssim(*(x.reshape(24, 2, 22, 2, 23, 2).mean((1, 3, 5)) for x in (a, b))).mean()
    weights = np.array([0.0448, 0.2856]) / (0.0448 + 0.2856)
    assert metrics.ms_ssim(a, b, mask, scales=2) == pytest.approx(fine ** weights[0] * coarse ** weights[1], abs=1e-9)


@pytest.mark.parametrize('axis', [2, None])
def test_empty_space_around_the_brain_changes_nothing(axis):
    rng = np.random.default_rng(3)
    mask = np.zeros((92, 92, 92), bool)
    mask[22:67, 25:66, 22:68] = True                         # farther from the border than three scales' windows reach
    a, b = (metrics.scaled(rng.random(mask.shape), mask, (0, 1)) for _ in range(2))
    wide = [np.pad(x, 16) for x in (a, b, mask)]             # the crop to the mask undoes this, at a multiple of 4
    for measure in (metrics.ssim, lambda *x: metrics.ms_ssim(*x, scales=3)):
        assert measure(*wide, axis) == pytest.approx(measure(a, b, mask, axis), abs=1e-12)


def test_a_constant_brain_scores_low_in_the_mask():
    _, truth, mask, _ = scene((64, 72, 16))
    noisy = {'dwi': truth['dwi'] + 0.15 * np.random.default_rng(0).standard_normal(mask.shape)}
    flat = {'dwi': np.full(mask.shape, noisy['dwi'][mask].mean())}
    inside = row(flat, noisy, mask, None)['dwi_ssim']
    images = [np.moveaxis(metrics.scaled(x['dwi'], mask, (0, 3)), 2, 0) for x in (flat, noisy)]
    whole = np.mean([library_ssim(a, b) for a, b in zip(*images, strict=True)])
    assert inside < 0.5 and whole > inside + 0.15


def test_both_images_are_clipped_to_the_range_and_blanked_outside_the_mask():
    pred, truth, mask, lesion = scene()
    expected = row(pred, truth, mask, lesion)
    wild_truth, wild_pred = ({t: x[t].copy() for t in x} for x in (truth, pred))
    for x in (wild_truth, wild_pred):
        x['dwi'][~mask], x['adc'][~mask] = 1e6, np.nan       # what lies outside does not count
    assert row(wild_pred, wild_truth, mask, lesion) == pytest.approx(expected, nan_ok=True)
    low, high = {t: x.copy() for t, x in truth.items()}, {t: x.copy() for t, x in truth.items()}
    low['adc'][20, 20, 5], high['adc'][20, 20, 5] = 3000, 9000
    assert row(low, high, mask, lesion)['adc_mae'] == 0
    assert row(low, high, mask, lesion)['adc_psnr'] == 100   # exact: the cap, not infinity
    high['adc'][20, 20, 5] = 2400                            # 600 in one voxel
    assert row(low, high, mask, lesion)['adc_mae'] == pytest.approx(600 / mask.sum())


def test_ms_ssim_of_a_volume_thinner_than_its_scales():
    """The scales are those of the network's image size; a subject's own grid may have fewer voxels along an axis."""
    rng = np.random.default_rng(0)
    truth = rng.random((96, 96, 6))
    scores = [metrics.ms_ssim(truth + noise * rng.random(truth.shape), truth, np.ones(truth.shape, bool), scales=4)
              for noise in (0, 0.1, 0.3)]
    assert 1 >= scores[0] > scores[1] > scores[2] > 0


def test_scales_of_ms_ssim_may_be_given_and_suvr_needs_its_unit():
    rng = np.random.default_rng(0)
    truth = {'suvr': 1 + rng.random((44, 44, 44))}
    pred = {'suvr': truth['suvr'] + 0.2 * rng.random((44, 44, 44))}
    mask = np.ones((44, 44, 44), bool)
    lesion, ranges = np.zeros_like(mask), {'suvr': (0, 3)}
    lesion[10:20, 10:20, 10:20] = True
    own, two, three = (metrics.subject_row(pred, truth, mask, lesion, (4, 4, 4), ranges, 'mri2pet', scales=m)
                       for m in (None, 2, 3))
    assert own == three and two['suvr_ms_ssim'] != own['suvr_ms_ssim'] and two['suvr_error'] == own['suvr_error']
    other = metrics.subject_row(pred, truth, mask, lesion, (4, 4, 4), ranges, 'mri2pet', physical=False)
    assert np.isnan([other[k] for k in ('suvr_true', 'suvr_pred', 'suvr_error')]).all() and own['suvr_true'] > 1


def test_axis_names_the_axial_direction():
    pred, truth, mask, lesion = scene()
    expected = row(pred, truth, mask, lesion)

    def turn(x):
        return np.moveaxis(x, 2, 0)
    images = ({t: turn(image) for t, image in x.items()} for x in (pred, truth))
    turned = metrics.subject_row(*images, turn(mask), turn(lesion), (5.0, 2.0, 2.0), RANGES, 'ctp2dwi', axis=0)
    assert turned == pytest.approx(expected, rel=1e-9)
    assert abs(row(pred, truth, mask, lesion, axis=0)['dwi_ssim'] - expected['dwi_ssim']) > 1e-4


def test_bad_images_are_one_sentence():
    pred, truth, mask, lesion = scene()
    pred['dwi'][20, 20, 5] = np.nan
    for images, where in ((pred, mask), (truth, np.zeros_like(mask)), (truth, mask[:-1])):
        with pytest.raises(ValueError) as error:
            row(images, truth, where, None)
        assert error.value.one_sentence and str(error.value).count('.') == 1


# ---------------------------------------------------------------------------------------------------------------------
# lesions

def test_lesion_errors_by_hand():
    _, truth, mask, lesion = scene()
    pred = {t: x.copy() for t, x in truth.items()}
    pred['adc'][lesion] += 90                                # 450 -> 540: still found by the rule
    pred['dwi'][lesion] -= 0.3                               # 2.0 -> 1.7
    figures = row(pred, truth, mask, lesion)
    assert figures['adc_lesion_mae'] == pytest.approx(90) and figures['adc_lesion_bias'] == pytest.approx(90)
    assert figures['dwi_lesion_mae'] == pytest.approx(0.3)
    assert figures['lesion_mae'] == pytest.approx((0.1 + 0.03) / 2)
    rest = truth['dwi'][mask & ~lesion].mean()
    assert figures['lesion_contrast_error'] == pytest.approx(0.3 / rest)
    assert figures['lesion_rim_mae'] == 0
    assert (figures['lesion_dice'], figures['lesion_dice_ceiling'], figures['lesion_avd_ml']) == (1, 1, 0)
    assert (figures['lesion_detected'], figures['false_lesion_ml']) == (1, 0)
    pred['adc'][lesion] = 360                                # below the truth: the bias has a sign
    assert row(pred, truth, mask, lesion)['adc_lesion_bias'] == pytest.approx(-90)
    pred['adc'][lesion] = 640                                # above 620: missed
    figures = row(pred, truth, mask, lesion)
    assert (figures['lesion_dice'], figures['lesion_detected'], figures['false_lesion_ml']) == (0, 0, 0)
    assert figures['lesion_avd_ml'] == pytest.approx(6.4) and figures['lesion_dice_ceiling'] == 1


def test_a_lesion_one_voxel_off_and_a_false_one():
    _, truth, mask, lesion = scene()
    pred = {t: np.roll(x, 1, axis=0) for t, x in truth.items()}
    figures = row(pred, truth, mask, lesion)
    assert figures['lesion_dice'] == pytest.approx(7 / 8)    # a box 8 voxels wide
    assert figures['lesion_avd_ml'] == 0 and figures['false_lesion_ml'] == 0
    pred['dwi'][30:34, 30, 5], pred['adc'][30:34, 30, 5] = 2, 450                      # 4 voxels, 0.08 ml: too small
    assert row(pred, truth, mask, lesion)['false_lesion_ml'] == 0
    pred['dwi'][34, 31, 6], pred['adc'][34, 31, 6] = 2, 450                            # a fifth, over a corner: 0.10 ml
    figures = row(pred, truth, mask, lesion)
    assert figures['false_lesion_ml'] == pytest.approx(0.1) and figures['lesion_avd_ml'] == pytest.approx(0.1)
    assert figures['lesion_dice'] == pytest.approx(2 * 280 / (320 + 325)) and figures['lesion_detected'] == 1


def test_the_rule_needs_both_images_and_uses_the_median():
    _, truth, mask, lesion = scene()
    assert np.array_equal(metrics.lesion_rule(7 * truth['dwi'], truth['adc'], mask, 0.02), lesion)    # any unit of DWI
    assert not metrics.lesion_rule(truth['dwi'], np.full(mask.shape, 620.0), mask, 0.02).any()
    assert not metrics.lesion_rule(np.full(mask.shape, 7.0), truth['adc'], mask, 0.02).any()
    median = np.median(truth['dwi'][mask])
    for factor, found in ((1.24, False), (1.26, True)):
        dwi = np.where(lesion, factor * median, truth['dwi'])
        assert metrics.lesion_rule(dwi, truth['adc'], mask, 0.02).any() == found


def test_the_rule_may_be_another():
    dwi, adc, mask = np.ones((6, 6, 6)), np.full((6, 6, 6), 800.0), np.ones((6, 6, 6), bool)
    dwi[:3, :3, :3], adc[:3, :3, :3] = 1.2, 700
    adc[5, 5, 5], dwi[5, 5, 5] = 100, 3
    for rule, voxels in ((metrics.RULE, 0), ((750, 1.1, 0.02), 27), ((750, 1.1, 0.001), 28), ((750, 1.1, 0.03), 0)):
        assert metrics.lesion_rule(dwi, adc, mask, 0.001, rule).sum() == voxels, rule
    images = {'dwi': dwi, 'adc': adc}, {'dwi': dwi, 'adc': adc}
    lesion, ranges = adc == 700, {'dwi': (0, 3), 'adc': (0, 3000)}
    row = metrics.subject_row(*images, mask, lesion, (1, 1, 1), ranges, 'ctp2dwi', rule=(750, 1.1, 0.02))
    assert row['lesion_dice'] == row['lesion_dice_ceiling'] == 1 and row['false_lesion_ml'] == 0
    assert metrics.subject_row(*images, mask, lesion, (1, 1, 1), ranges, 'ctp2dwi')['lesion_detected'] == 0


def test_rim_of_a_ball():
    x, y, z = np.meshgrid(*[np.arange(41) - 20] * 3, indexing='ij')
    radius = np.sqrt(x ** 2 + y ** 2 + z ** 2)
    ball, mask = radius <= 8, np.ones((41, 41, 41), bool)
    rim = metrics.lesion_rim(ball, mask, (1, 1, 1))
    assert not (rim & ball).any() and rim[34, 20, 20] and not rim[35, 20, 20]          # 8 + 6 = 14 from the centre
    assert rim.sum() == pytest.approx(4 / 3 * np.pi * (14 ** 3 - 8 ** 3), rel=0.06)
    thick = metrics.lesion_rim(ball, mask, (1, 1, 7))
    assert thick[34, 20, 20] and not thick[20, 20, 29]                             # the next slice is 7 mm away
    mask[:20] = False
    assert not metrics.lesion_rim(ball, mask, (1, 1, 1))[:20].any()

    _, truth, mask, lesion = scene()
    pred = {t: x.copy() for t, x in truth.items()}
    pred['adc'][metrics.lesion_rim(lesion, mask, SPACING)] += 300
    figures = row(pred, truth, mask, lesion)
    assert figures['lesion_rim_mae'] == pytest.approx(0.05) and figures['lesion_mae'] == 0


def test_subjects_without_lesion():
    _, truth, mask, lesion = scene()
    healthy = {'dwi': np.where(lesion, 1.0, truth['dwi']), 'adc': np.where(lesion, 800.0, truth['adc'])}
    empty = np.zeros_like(lesion)
    undefined = ['dwi_lesion_mae', 'adc_lesion_mae', 'lesion_mae', 'lesion_contrast_error', 'adc_lesion_bias',
                 'lesion_detected', 'lesion_rim_mae']
    right, wrong = row(healthy, healthy, mask, empty), row(truth, healthy, mask, empty)
    assert all(np.isnan(figures[c]) for figures in (right, wrong) for c in undefined)
    defined = ('lesion_dice', 'lesion_dice_ceiling', 'lesion_avd_ml', 'false_lesion_ml')
    assert [right[c] for c in defined] == [1, 1, 0, 0]
    assert (wrong['lesion_dice'], wrong['lesion_dice_ceiling']) == (0, 1)
    assert wrong['lesion_avd_ml'] == wrong['false_lesion_ml'] == pytest.approx(6.4)
    unknown = row(truth, healthy, mask, None)
    assert list(unknown) == list(right) and all(np.isnan(v) for c, v in unknown.items() if 'lesion' in c)


def test_amyloid_columns():
    rng = np.random.default_rng(0)
    shape = (24, 26, 24)
    truth = 1 + 0.2 * rng.random(shape)
    roi, mask = np.zeros(shape, bool), np.ones(shape, bool)
    roi[5:10, 5:10, 5:10] = True
    pred = truth - 0.1 * roi
    figures = row({'suvr': pred}, {'suvr': truth}, mask, roi, 'mri2pet', {'suvr': (0, 3)})
    assert list(figures) == [f'suvr_{c}' for c in ('mae', 'psnr', 'ssim', 'ms_ssim', 'true', 'pred', 'error')]
    assert figures['suvr_error'] == pytest.approx(-0.1) and figures['suvr_true'] == pytest.approx(truth[roi].mean())
    assert figures['suvr_ssim'] == pytest.approx(library_ssim(pred / 3, truth / 3).mean(), abs=1e-9)     # 3D


@pytest.mark.parametrize('task', ['ctp2dwi', 'mri2pet'])
def test_quick_row_agrees_with_subject_row_and_is_quick(task):
    pred, truth, mask, lesion = scene((64, 72, 26))
    quick = metrics.quick_row(pred, truth, mask, lesion, RANGES, task)
    full = row(pred, truth, mask, lesion, task)
    assert list(quick) == metrics.QUICK == ['psnr', 'ssim', 'mae', 'lesion_mae']
    assert quick['psnr'] == pytest.approx(np.mean([full['dwi_psnr'], full['adc_psnr']]))
    assert quick['ssim'] == pytest.approx(np.mean([full['dwi_ssim'], full['adc_ssim']]))
    assert quick['mae'] == pytest.approx(np.mean([full['dwi_mae'] / 3, full['adc_mae'] / 3000]))
    if task == 'ctp2dwi':
        assert quick['lesion_mae'] == pytest.approx(full['lesion_mae'])
        times = []
        for _ in range(3):
            start = time.process_time()
            metrics.quick_row(pred, truth, mask, lesion, RANGES, task)
            times.append(time.process_time() - start)
        assert min(times) < 0.15
    assert np.isnan(metrics.quick_row(pred, truth, mask, np.zeros_like(mask), RANGES, task)['lesion_mae'])


# ---------------------------------------------------------------------------------------------------------------------
# the summary

def tables(n=30):
    rng = np.random.default_rng(5)
    model = pd.DataFrame({'ID': [f's{i:02d}' for i in range(n)], 'adc_psnr': rng.normal(25, 2, n),
                          'suvr_error': rng.normal(0, 0.1, n), 'lesion_dice': rng.random(n),
                          'qc': 'ok', 'seconds': 1.0})
    model.loc[:4, 'lesion_dice'] = np.nan
    other = model.copy()
    other['adc_psnr'] += rng.normal(-1, 0.5, n)
    other['lesion_dice'] += rng.normal(0, 0.1, n)
    other['suvr_error'] += 0.3
    return model, other


def test_what_intervals_hold_is_not_tested_against_others():
    rng = np.random.default_rng(0)
    mine, theirs = (pd.DataFrame(dict(ID=range(12), dwi_mae=rng.random(12), dwi_lesion_coverage_90=rng.random(12),
                                      lesion_head_ml_low=0.0, lesion_head_ml_covered=1.0)) for _ in range(2))
    table = metrics.summarise(mine, dict(other=theirs), 0).set_index('metric')
    assert list(table.index) == ['dwi_mae', 'dwi_lesion_coverage_90', 'lesion_head_ml_covered']
    assert np.isfinite(table['other_mean']).all() and list(np.isfinite(table['other_p'])) == [True, False, False]
    assert table['other_p_holm']['dwi_mae'] == table['other_p']['dwi_mae']  # one test only


def test_bootstrap_interval_agrees_with_scipy():
    x = np.random.default_rng(4).gamma(2, 1, 40)
    low, high = metrics.bootstrap_ci(x, seed=0)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=5000, method='percentile', rng=np.random.default_rng(1))
    theirs = theirs.confidence_interval
    tolerance = 0.1 * (theirs.high - theirs.low)
    assert abs(low - theirs.low) < tolerance and abs(high - theirs.high) < tolerance
    assert metrics.bootstrap_ci(x, seed=0) == (low, high) != metrics.bootstrap_ci(x, seed=1)
    assert np.isnan(metrics.bootstrap_ci(x[:1], seed=0)).all()


def test_equal_differences_are_ties_whatever_their_rounding():
    steps = np.array([1, 1, 1, -1, 2, 2, 3, -2, 1, 1, 4, -1])
    base = np.random.default_rng(0).random(12)
    lines = [pd.DataFrame(dict(ID=[f's{i}' for i in range(12)], x=x)) for x in (base + 0.1 * steps, base)]
    found = metrics.summarise(lines[0], {'other': lines[1]}, seed=0)['other_p'][0]
    assert found == pytest.approx(stats.wilcoxon(steps).pvalue, rel=1e-9)


def test_no_lesion_rule_without_physical_units():
    pred, truth, mask, lesion = scene()
    quantiles = {t: {'dwi': x['dwi'] / 3, 'adc': x['adc'] / 3000} for t, x in (('pred', pred), ('truth', truth))}
    found = row(*quantiles.values(), mask, lesion, ranges={'dwi': (0, 1), 'adc': (0, 1)}, physical=False)
    known = row(pred, truth, mask, lesion)
    assert found.keys() == known.keys() and found['lesion_mae'] == pytest.approx(known['lesion_mae'])
    rule = [name for name in known if name.startswith(('lesion_d', 'false', 'adc_lesion_bias', 'lesion_contrast'))]
    assert len(rule) >= 7 and all(np.isnan(found[name]) and np.isfinite(known[name]) for name in rule)


def test_holm_by_hand():
    corrected = metrics.holm([0.01, np.nan, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, np.nan, 0.06, 0.06, 0.02], nan_ok=True)
    assert metrics.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert np.isnan(metrics.holm([np.nan])).all()


def test_summarise():
    model, other = tables()
    shuffled = other.sample(frac=1, random_state=0)          # a baseline is matched by ID, not by line
    table = metrics.summarise(model, {'regression': shuffled, 'same': model}, seed=0)
    assert list(table['metric']) == ['adc_psnr', 'suvr_error', 'suvr_error_abs', 'lesion_dice']
    assert list(table.columns) == ['metric', 'n', 'mean', 'ci_low', 'ci_high'] + [
        f'{name}_{c}' for name in ('regression', 'same') for c in ('mean', 'ci_low', 'ci_high', 'p', 'p_holm')]
    table = table.set_index('metric')
    assert table.loc['lesion_dice', 'n'] == 25 and table.loc['adc_psnr', 'n'] == 30
    assert table.loc['lesion_dice', 'mean'] == pytest.approx(model['lesion_dice'].mean())
    assert table.loc['suvr_error_abs', 'mean'] == pytest.approx(model['suvr_error'].abs().mean())
    assert table.loc['adc_psnr', 'regression_mean'] == pytest.approx(other['adc_psnr'].mean())
    assert table.loc['adc_psnr', 'ci_low'] < table.loc['adc_psnr', 'mean'] < table.loc['adc_psnr', 'ci_high']
    p = table['regression_p']
    assert p['adc_psnr'] == pytest.approx(stats.wilcoxon(model['adc_psnr'], other['adc_psnr']).pvalue)
    both = model['lesion_dice'].notna()
    pairs = model['lesion_dice'][both], other['lesion_dice'][both]
    assert p['lesion_dice'] == pytest.approx(stats.wilcoxon(*pairs).pvalue)
    assert table['same_p'].isna().all()                      # nothing differs: no test, and none that Holm counts
    assert table['regression_p_holm'].to_numpy() == pytest.approx(metrics.holm(p.to_numpy()))
    assert (table['regression_p_holm'] >= p).all()
    again = metrics.summarise(model, {'regression': other, 'same': model}, seed=0)
    pd.testing.assert_frame_equal(table.reset_index(), again)


def test_summarise_without_baselines_with_gaps_and_twins():
    model, other = tables()
    assert list(metrics.summarise(model, {}, seed=0).columns) == ['metric', 'n', 'mean', 'ci_low', 'ci_high']
    one = metrics.summarise(model.iloc[:1], {'x': other.iloc[5:]}, seed=0).set_index('metric')
    assert one.loc['adc_psnr', 'n'] == 1
    assert np.isnan(one.loc['adc_psnr', 'ci_low']) and np.isnan(one.loc['adc_psnr', 'x_mean'])
    assert one.loc['lesion_dice', 'n'] == 0 and np.isnan(one.loc['lesion_dice', 'mean'])
    with pytest.raises(metrics.MetricError, match='s03'):
        metrics.summarise(pd.concat([model, model[3:4]]), {}, seed=0)


def test_format_table():
    model, other = tables()
    text = metrics.format_table(metrics.summarise(model, {'regression': other}, seed=0))
    lines = text.splitlines()
    assert lines[0].split() == ['metric', 'n', 'this', 'model', '95', '%', 'CI', 'regression']
    psnr = next(line for line in lines if line.startswith('adc_psnr'))
    assert f'{model["adc_psnr"].mean():.2f}' in psnr and psnr.endswith(f'{other["adc_psnr"].mean():.2f}*')
    assert 'Wilcoxon' in lines[-1] and max(map(len, lines)) <= 100


def test_the_volume_of_a_voxel_on_a_sheared_grid():
    """Less than the product of the spacings: all volumes go with it."""
    images = scene()
    whole, half = row(*images), row(*images, voxel_ml=float(np.prod(SPACING)) / 2000)
    assert half['lesion_ml'] == pytest.approx(whole['lesion_ml'] / 2) and whole['lesion_ml'] > 0
    assert half['lesion_avd_ml'] == pytest.approx(whole['lesion_avd_ml'] / 2)
