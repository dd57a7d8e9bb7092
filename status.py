"""
Amyloid status of a group: how well a number per subject (the synthetic SUVR of the cortical composite) tells positive
from negative, and the plain alternative it has to beat, a logistic regression on two volumes measured on the MRI.

Thresholds and regressions are fitted on training + validation subjects and judged on test subjects.
"""

import numpy as np
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TRUE_THRESHOLD = 1.11         # florbetapir SUVR of the true PET above which a subject is positive
VENTRICLE_REACH = 0.5         # the ventricles are sought in an ellipsoid of this share of the brain's extents
RESAMPLES = 2000


class StatusError(ValueError):
    """A group that cannot be judged; the message is one sentence for the user."""

    one_sentence = True


def auc(score, label):
    """Area under the ROC curve: how often a positive scores above a negative, ties one half; nan with one class."""
    score, label = _checked(score, label)
    wins = _wins(score[label == 1], score[label == 0])
    return float(wins.mean()) if wins.size else np.nan


def mean_auc(scores, label, seed=0):
    """Mean of the AUCs of several scores of the same subjects, and its 95 % bootstrap interval: (auc, low, high).

    Subjects are resampled within each class, once for all scores. nan without subjects of both classes.
    """
    label = _checked(scores[0], label)[1]
    wins = np.mean([_wins(score[label == 1], score[label == 0]) for score in map(np.asarray, scores)], axis=0)
    if not wins.size:
        return np.nan, np.nan, np.nan
    weight_p, weight_n = _resamples(*wins.shape, seed)
    draws = np.sum(weight_p @ wins * weight_n, axis=1)
    return float(wins.mean()), *np.quantile(draws, (0.025, 0.975)).tolist()


def _resamples(positive, negative, seed):
    """How often each subject is drawn, over the class size: a resampled mean is then a product with these weights."""
    rng = np.random.default_rng(seed)
    return [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in (positive, negative)]


def fit_threshold(score, label):
    """
    The threshold with the highest balanced accuracy, (sensitivity + specificity) / 2, of `score > threshold`.

    Candidates lie midway between neighbouring scores; of equally good ones the one in the widest gap is taken. Raises
    StatusError if a class is missing or all scores are equal.
    """
    score, label = _checked(score, label)
    positive, negative = np.sum(label == 1), np.sum(label == 0)
    if not positive or not negative:
        raise StatusError('a threshold needs subjects of both classes, but training and validation hold '
                          f'{negative} negative and {positive} positive ones.')
    values = np.unique(score)
    if len(values) < 2:
        raise StatusError(f'no threshold can be fitted, because all {len(score)} scores are {values[0]:.4g}.')
    middle, gap = 0.5 * (values[1:] + values[:-1]), np.diff(values)
    above = score[:, None] > middle                                                # (subjects, candidates)
    balanced = 0.5 * (above[label == 1].mean(axis=0) + 1 - above[label == 0].mean(axis=0))
    best = np.flatnonzero(balanced > balanced.max() - 1e-9)
    return float(middle[best[np.argmax(gap[best])]])


def classify(suvr_train_val, label_train_val, suvr_test, label_test, seed=0):
    """
    How well a score gives the label: threshold fitted on training + validation, figures on the test subjects.

    Labels are 0 / 1. Returns a dict: threshold; auc, auc_ci_low, auc_ci_high; balanced_accuracy with the same two;
    sensitivity; specificity; n_negative, n_positive of the test set; fit_negative, fit_positive of what the threshold
    was fitted on. Intervals are 95 % percentile bootstrap, 2000 resamples within each class, the threshold kept. With
    one class in the test set auc and balanced accuracy are nan.
    """
    fit_label = _checked(suvr_train_val, label_train_val)[1]
    score, label = _checked(suvr_test, label_test)
    threshold = fit_threshold(suvr_train_val, label_train_val)
    positive, negative = score[label == 1], score[label == 0]
    hit, rejected = positive > threshold, negative <= threshold
    result = {'threshold': threshold}
    result.update({name + end: np.nan for name in ('auc', 'balanced_accuracy') for end in ('', '_ci_low', '_ci_high')})
    if len(positive) and len(negative):
        result.update(auc=auc(score, label), balanced_accuracy=float(0.5 * (hit.mean() + rejected.mean())))
        weight_p, weight_n = _resamples(len(hit), len(rejected), seed)
        draws = {'auc': np.sum(weight_p @ _wins(positive, negative) * weight_n, axis=1),
                 'balanced_accuracy': 0.5 * (weight_p @ hit + weight_n @ rejected)}
        for name, values in draws.items():
            result[f'{name}_ci_low'], result[f'{name}_ci_high'] = np.quantile(values, (0.025, 0.975)).tolist()
    result['sensitivity'] = float(hit.mean()) if len(hit) else np.nan
    result['specificity'] = float(rejected.mean()) if len(rejected) else np.nan
    result.update(n_negative=len(negative), n_positive=len(positive),
                  fit_negative=int(np.sum(fit_label == 0)), fit_positive=int(np.sum(fit_label == 1)))
    return result


def volume_features(mri, mask, voxel_ml):
    """
    [ventricle_ml, grey_matter_ml] measured on a T1 image (X, Y, Z) of any scaling, within the brain mask.

    The in-mask intensities, clipped to their 0.5 and 99.5 % quantiles, fall into three classes by k-means (started at
    the 10, 50 and 90 % quantiles): dark is fluid, middle grey matter, bright white matter. Grey-matter volume is the
    middle class; ventricle volume is the dark class in the central ellipsoid whose axes are half of the mask's
    extents, which leaves out sulci and the surface. It is rough on purpose: a baseline that needs no atlas. The order
    and direction of the axes do not matter.
    """
    mask = np.asarray(mask) > 0
    values = np.asarray(mri, np.float64)[mask]
    if len(values) == 0 or not np.isfinite(values).all() or values.min() == values.max():
        raise StatusError('no volume can be measured on an MRI that is constant or not finite inside the brain mask.')
    values = np.clip(values, *np.quantile(values, (0.005, 0.995)))
    start = np.quantile(values, (0.1, 0.5, 0.9))[:, None]
    some = values[::max(len(values) // 50000, 1), None]
    centres = np.sort(KMeans(3, init=start, n_init=1).fit(some).cluster_centers_[:, 0])
    kind = np.searchsorted(0.5 * (centres[1:] + centres[:-1]), values)            # 0 fluid, 1 grey, 2 white
    where = np.argwhere(mask)
    low, high = np.quantile(where, (0.005, 0.995), axis=0)
    radius = np.sqrt((((where - (low + high) / 2) / np.maximum((high - low) / 2, 0.5)) ** 2).sum(axis=1))
    return np.array([np.sum((kind == 0) & (radius < VENTRICLE_REACH)), np.sum(kind == 1)]) * float(voxel_ml)


def mri_baseline(features_train_val, label_train_val, features_test, label_test, seed=0):
    """
    A logistic regression on MRI features (n, F), standardised; its probabilities are the score that classify judges.

    Returns (dict as classify gives, probabilities of the test subjects).
    """
    fit_label = np.asarray(label_train_val).astype(int)
    if len(np.unique(fit_label)) < 2:
        raise StatusError('a logistic regression needs subjects of both classes in training and validation.')
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(np.asarray(features_train_val), fit_label)
    fitted, made = (model.predict_proba(np.asarray(f))[:, 1] for f in (features_train_val, features_test))
    return classify(fitted, fit_label, made, label_test, seed), made


def _wins(positive, negative):
    """(P, N): 1 where a positive scores above a negative, 1/2 for a tie."""
    return (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)


def _checked(score, label):
    score, label = np.asarray(score, np.float64), np.asarray(label)
    if score.shape != label.shape or score.ndim != 1:
        raise StatusError(f'{score.size} scores do not belong to {label.size} labels.')
    if not np.isfinite(score).all() or not np.isin(label, (0, 1)).all():
        raise StatusError('amyloid status needs finite scores, and labels that are 0 or 1.')
    return score, label.astype(int)
