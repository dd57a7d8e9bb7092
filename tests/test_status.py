"""Amyloid status of groups: against scikit-learn and made groups."""
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

import status


def group(n, shift, seed):
    rng = np.random.default_rng(seed)
    label = rng.permutation(n) % 3 == 0                      # a third is positive
    return rng.normal(1.0 + shift * label, 0.1), label.astype(int)


def test_auc_and_balanced_accuracy_equal_scikit_learn():
    fit, test = group(60, 0.15, 0), group(40, 0.15, 1)
    test = np.round(test[0], 1), test[1]                     # with ties
    figures = status.classify(*fit, *test)
    assert figures['auc'] == pytest.approx(roc_auc_score(test[1], test[0]))
    expected = balanced_accuracy_score(test[1], test[0] > figures['threshold'])
    assert figures['balanced_accuracy'] == pytest.approx(expected)
    assert figures['balanced_accuracy'] == pytest.approx((figures['sensitivity'] + figures['specificity']) / 2)
    assert [figures[k] for k in ('n_negative', 'n_positive', 'fit_negative', 'fit_positive')] == [26, 14, 40, 20]
    for name in ('auc', 'balanced_accuracy'):
        assert figures[f'{name}_ci_low'] < figures[name] < figures[f'{name}_ci_high'] <= 1
    assert status.classify(*fit, *test) == figures


def test_auc_interval_agrees_with_a_plain_bootstrap():
    score, label = group(45, 0.1, 2)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(500):
        i = np.concatenate([rng.choice(np.flatnonzero(label == c), np.sum(label == c)) for c in (0, 1)])
        draws.append(roc_auc_score(label[i], score[i]))
    figures = status.classify(score, label, score, label)
    expected = np.quantile(draws, (0.025, 0.975))
    assert [figures['auc_ci_low'], figures['auc_ci_high']] == pytest.approx(expected, abs=0.03)


def test_threshold_is_the_best_and_lies_in_the_widest_gap():
    assert status.fit_threshold([1.0, 1.1, 1.3, 1.6], [0, 0, 1, 1]) == pytest.approx(1.2)
    # (1.0 0) (1.1 1) (1.2 0) (1.6 1): 1.05 gives (1 + 1/2) / 2, 1.4 gives (1/2 + 1) / 2; the second gap is wider
    assert status.fit_threshold([1.0, 1.1, 1.2, 1.6], [0, 1, 0, 1]) == pytest.approx(1.4)
    score, label = group(50, 0.1, 3)
    best = balanced_accuracy_score(label, score > status.fit_threshold(score, label))
    assert best == pytest.approx(max(balanced_accuracy_score(label, score > t) for t in score))


def test_the_threshold_knows_nothing_of_the_test_set():
    fit = group(60, 0.5, 0)
    test = group(40, 0.5, 1)
    moved = status.classify(*fit, test[0] + 1, test[1])      # all above the threshold
    assert moved['auc'] > 0.95 and moved['balanced_accuracy'] == 0.5
    assert moved['threshold'] == status.classify(*fit, *test)['threshold']


def test_groups_that_cannot_be_judged():
    score, label = group(30, 0.1, 0)
    one_class = status.classify(score, label, score[label == 0], label[label == 0])
    assert np.isnan(one_class['auc']) and np.isnan(one_class['balanced_accuracy']) and one_class['n_positive'] == 0
    bad = ((score, 0 * label), (score, label + 1), (score[1:], label), (score * np.nan, label), (0 * score, label))
    for arguments in bad:
        with pytest.raises(status.StatusError) as error:
            status.classify(*arguments, score, label)
        assert error.value.one_sentence


def head(ventricle, seed=0):
    """A T1-like ball: white core, grey shell, fluid around it and in two central cavities of the given radius."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, 40)] * 3, indexing='ij')
    radius = np.sqrt(x ** 2 + y ** 2 + z ** 2)
    grey, fluid = (radius > 0.65) & (radius <= 0.9), (radius > 0.9) & (radius < 0.97)
    cavity = (np.abs(x) - 0.15) ** 2 + y ** 2 + z ** 2 < ventricle ** 2
    image = np.select([cavity | fluid, grey], [200, 550], 900.0) + 25 * rng.standard_normal(x.shape)
    return ndimage.gaussian_filter(image, 0.4), radius < 0.97, cavity.sum(), grey.sum()


def test_volumes_of_a_made_head():
    measured = []
    for ventricle in (0.12, 0.16, 0.2):
        image, mask, cavity, grey = head(ventricle)
        volumes = status.volume_features(image, mask, 0.008)
        assert volumes == pytest.approx([0.008 * cavity, 0.008 * grey], rel=0.2)
        turned = status.volume_features(3 * image[::-1, :, ::-1] - 70, mask[::-1, :, ::-1], 0.008)
        assert volumes == pytest.approx(turned, rel=1e-6)
        measured.append(volumes)
    assert measured[0][0] < measured[1][0] < measured[2][0]
    with pytest.raises(status.StatusError):
        status.volume_features(np.ones((5, 5, 5)), np.ones((5, 5, 5)), 1.0)


def test_logistic_regression_on_volumes():
    rng = np.random.default_rng(0)
    label = rng.permutation(90) % 2
    features = np.stack([rng.normal(30 + 12 * label, 8), rng.normal(600 - 20 * label, 40)], axis=1)
    figures, score = status.mri_baseline(features[:60], label[:60], features[60:], label[60:])
    assert figures['auc'] == pytest.approx(roc_auc_score(label[60:], score)) and figures['auc'] > 0.75
    assert score.shape == (30,) and (score > 0).all() and (score < 1).all() and 0 < figures['threshold'] < 1
    shuffled, _ = status.mri_baseline(features[:60], rng.permutation(label[:60]), features[60:], label[60:])
    assert shuffled['auc'] < figures['auc']
    units, _ = status.mri_baseline(features[:60] * 1000, label[:60], features[60:] * 1000, label[60:])
    assert units['auc'] == pytest.approx(figures['auc'])     # standardised: units do not matter
