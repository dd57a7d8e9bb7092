"""
How far an output can be trusted: calibrated intervals around a prediction, and a check whether a source image looks
like those that the networks were trained on.

Both are fitted on training or validation subjects and are plain numbers and lists, so that they can travel in a
checkpoint or a json.
"""

import numpy as np
from scipy import ndimage, optimize
from sklearn.covariance import LedoitWolf
from sklearn.isotonic import IsotonicRegression

FEATURES = ('intensity_5', 'intensity_25', 'intensity_50', 'intensity_75', 'intensity_95',
            'frame_std', 'frame_peak', 'frame_peak_time', 'asymmetry', 'tilt_x', 'tilt_y', 'tilt_z',
            'shell_y', 'shell_z', 'skew_x', 'skew_y', 'skew_z', 'noise', 'clipped')
TURNS = ('form_front_back', 'form_up_down', 'image_front_back', 'image_up_down')
CELLS = (2, 6, 4)             # distance from the midplane, y, z: the coarse grid on which a brain's form is compared
GROUP = 500                   # voxels of like std that have an interval of their own, at least
SCALE_FLOOR = 0.01            # no feature is held to be known better than this
GOOD_SHARE = 1 / 20           # of good subjects, that may be flagged at most


class QualityError(ValueError):
    """Subjects from which nothing can be fitted; the message is one sentence for the user."""

    one_sentence = True


# ---------------------------------------------------------------------------------------------------------------------
# intervals

def interval_fit(pred, std, truth, mask, q=(0.5, 0.9), limits=None, per_subject=20000):
    """
    Fit the intervals pred +- h_q(std) on validation subjects.

    pred, std, truth, mask: lists of arrays, one per subject, of one target in one unit; std says how far the truth may
    be, up to an unknown function, and may be all zero. limits = (lo, hi) clips prediction and truth, as all figures do.
    Each subject gives at most `per_subject` evenly spaced voxels and the same weight.

    The voxels are sorted by std into groups: the lower half, half of the rest, and so on while there are GROUP of them,
    so that the few of large std, around a doubtful lesion, are groups of their own. h_q of a group is the q quantile of
    its |error|: about a fraction q is covered there, not only in the mean over the brain. (About: the voxels of a group
    may come from few subjects, and those of a subject err together. Of a region chosen by the truth, as the lesion, no
    share is promised.) Over the groups h_q is made to rise (isotonic regression), and it is linear between their mean
    std. Where std is the same everywhere h_q is one number. Returns {'q': [...], 'std': [...], 'half': one list like
    std for each q}.
    """
    errors, spreads, weights = [], [], []
    for p, s, t, m in zip(pred, std, truth, mask, strict=True):
        inside = np.flatnonzero(np.asarray(m).ravel() > 0)
        if len(inside):
            inside = inside[np.linspace(0, len(inside) - 1, min(len(inside), per_subject)).astype(int)]
            p, t = (_clip(np.asarray(x, np.float64).ravel()[inside], limits) for x in (p, t))
            errors.append(np.abs(p - t))
            spreads.append(np.asarray(s, np.float64).ravel()[inside])
            weights.append(np.full(len(inside), 1 / len(inside)))
    if not errors:
        raise QualityError('intervals need at least one validation subject with a brain mask that is not empty.')
    order = np.argsort(np.concatenate(spreads), kind='stable')
    error, spread, weight = (np.concatenate(x)[order] for x in (errors, spreads, weights))
    starts, start = [0], 0
    while len(spread) - start >= 2 * GROUP:
        start = (start + len(spread)) // 2
        ends = [int(np.searchsorted(spread, spread[start], side)) for side in ('left', 'right')]
        near = min(ends, key=lambda end, at=start: abs(end - at))  # what is equal stays together
        if min(near - starts[-1], len(spread) - near) >= GROUP:
            starts.append(near)
    groups = [slice(i, j) for i, j in zip(starts, [*starts[1:], len(spread)], strict=True)]
    share = [weight[g].sum() for g in groups]
    half = [[_quantile(error[g], weight[g], level) for g in groups] for level in q]
    half = [IsotonicRegression().fit_transform(np.arange(len(groups)), h, sample_weight=share) for h in half]
    means = [float(np.average(spread[g], weights=weight[g])) for g in groups]
    return {'q': [float(level) for level in q], 'std': means, 'half': [h.tolist() for h in half]}


def _quantile(values, weights, level):
    """The smallest of the values that, with those below it, has this share of the weight."""
    order = np.argsort(values)
    share = np.cumsum(weights[order])
    return float(values[order][min(np.searchsorted(share, level * share[-1]), len(values) - 1)])


def interval_half_width(std, fit, q):
    """Half the width of the interval at level q, h_q(std), as an array like std."""
    if q not in fit['q']:
        raise QualityError(f'no interval was fitted at level {q}; there are {fit["q"]}.')
    return np.interp(np.asarray(std, np.float64), fit['std'], fit['half'][fit['q'].index(q)])


def interval_coverage(pred, std, truth, mask, fit, limits=None):
    """Of one subject, per level q: coverage_<100 q>, the share covered; width_<100 q>, the mean half width."""
    mask = np.asarray(mask) > 0
    pred, truth = (_clip(np.asarray(x, np.float64)[mask], limits) for x in (pred, truth))
    error = np.abs(pred - truth)
    row = {}
    for q in fit['q']:
        half = interval_half_width(np.asarray(std)[mask], fit, q)
        row[f'coverage_{round(100 * q)}'] = float(np.mean(error <= half)) if len(error) else np.nan
        row[f'width_{round(100 * q)}'] = float(np.mean(half)) if len(error) else np.nan
    return row


def number_fit(numbers, q=(0.5, 0.9)):
    """
    Fit the intervals of one number a subject, value +- k_q sqrt(spread^2 + s_0^2), on validation subjects.

    numbers: (value, spread, truth) of each. s_0 is the value of highest likelihood of errors ~ N(0, c^2
    (spread^2 + s_0^2)) with c free. k_q is the ceil((n + 1) q)-th smallest of the n scores |truth - value| /
    sqrt(spread^2 + s_0^2), for each subject with the s_0 of the others, at one mean square of these roots: a further
    subject's number is covered with probability q, about (split conformal prediction, but for s_0, and for the
    checkpoint, chosen on the same subjects). A level for which n is too small is left out: 0.9 needs 9 subjects.
    Returns {'s_0': float, 'q': [...], 'k': [...]}.
    """
    value, spread, truth = np.asarray(numbers, np.float64).reshape(-1, 3).T
    error, others = np.abs(truth - value), ~np.eye(len(value), dtype=bool)
    s_0, size = _number_floor(error, spread)
    scores = []
    for e, s, rest in zip(error, spread, others if len(error) > 1 else ~others, strict=True):
        floor, theirs = _number_floor(error[rest], spread[rest])
        scores.append(e / np.hypot(s, floor) * theirs / size)
    scores = np.sort(scores)
    ranks = {float(level): int(np.ceil((len(scores) + 1) * level - 1e-9)) for level in q}
    ranks = {level: rank for level, rank in ranks.items() if rank <= len(scores)}
    return {'s_0': s_0, 'q': list(ranks), 'k': [float(scores[rank - 1]) for rank in ranks.values()]}


def _number_floor(error, spread):
    """s_0 of number_fit, and the root mean square of sqrt(spread^2 + s_0^2)."""
    s_0 = rms = max(float(np.sqrt(np.mean(error ** 2))), 1e-12)
    if spread.max() > 0:
        def cost(log_s):
            total = spread ** 2 + np.exp(2 * log_s)
            return np.log(np.mean(error ** 2 / total) + 1e-300) + np.mean(np.log(total))
        top = np.log(max(rms, spread.max()))
        s_0 = float(np.exp(optimize.minimize_scalar(cost, bounds=(np.log(rms) - 7, top + 3), method='bounded').x))
    return s_0, float(np.sqrt(np.mean(spread ** 2 + s_0 ** 2)))


def number_interval(value, spread, fit, q=0.9, lowest=-np.inf):
    """(low, high) of a number at level q, low not below `lowest`. QualityError where number_fit left that level out."""
    if q not in fit['q']:
        raise QualityError(f'no interval was fitted at level {q}; there are {fit["q"]}.')
    half = fit['k'][fit['q'].index(q)] * float(np.hypot(spread, fit['s_0']))
    return max(value - half, lowest), value + half


def _clip(x, limits):
    return x if limits is None else np.clip(x, *limits)


# ---------------------------------------------------------------------------------------------------------------------
# does the source look like those of the training set?

def source_features(source, mask):
    """
    Features of a source image, (115,) float64: the 19 of FEATURES, then form and light on a coarse grid of 2 x 6 x 4
    cells (distance from the midplane, y, z).

    source (N, C, X, Y): N axial slices of C frames, or (1, C, X, Y, Z), axes towards R, A, S, scaled to [-1, 1];
    mask (N, 1, X, Y) or (1, 1, X, Y, Z). Intensities are scaled to 0..1 first; "image" is the mean over frames,
    coordinates run from -1 to 1 over the mask's extent.
      intensity_*            5, 25, 50, 75, 95 % quantiles of the image in the mask
      frame_std              mean over the mask of the standard deviation over frames (0 for one frame), times 10
      frame_peak, _time      largest deviation of the in-mask mean curve from its median, times 10, and when, 0..1
      asymmetry              mean |left - mirrored right| over the mean deviation of the image from its mean
      tilt_x, _y, _z         slope of the image along x, y, z, in its own standard deviations: another orientation
      shell_y, _z            slope along y, z of the image within the outer shell of the mask alone
      skew_x, _y, _z         skewness of the mask along the three axes: a brain upside down or front to back
      noise                  standard deviation of the image minus its 3 x 3 x 3 mean, over its own standard deviation
      clipped                fraction of mask voxels at either end of the scale in all frames: wrong units
    """
    frames, inside = _as_volume(source), _as_volume(mask)[0] > 0
    if not inside.any():
        raise QualityError('the mask is empty, so that the source cannot be checked.')
    box = tuple(slice(hit.min(), hit.max() + 1) for hit in np.nonzero(inside))
    frames, inside = (np.clip(frames[(slice(None), *box)], -1, 1) + 1) / 2, inside[box]
    image = frames.mean(axis=0)
    values = image[inside]
    spread = max(values.std(), 1e-3)

    curve = frames[:, inside].mean(axis=1)
    deviation = np.abs(curve - np.median(curve))
    when = np.sum(deviation ** 2 * np.linspace(0, 1, len(curve))) / max(np.sum(deviation ** 2), 1e-12)
    frame = [10 * frames[:, inside].std(axis=0).mean(), 10 * deviation.max(), when]

    both = inside & inside[::-1]
    mirrored = np.abs(image - image[::-1])[both]
    asymmetry = mirrored.mean() / max(np.abs(values - values.mean()).mean(), 1e-3) if both.any() else 2.0

    grid = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in inside.shape]
    where = np.stack([g[i] for g, i in zip(grid, np.nonzero(inside), strict=True)])          # (3, voxels)
    shell = ~ndimage.binary_erosion(inside, iterations=max(min(inside.shape[:2]) // 12, 1))[inside]
    tilt = [_slope(x, values) / spread for x in where]
    tilt += [_slope(x[shell], values[shell]) / spread for x in where[1:]]
    skew = [float(np.mean((x - x.mean()) ** 3) / max(x.std(), 1e-3) ** 3) for x in where]

    filled = np.where(inside, image, values.mean())
    noise = (filled - ndimage.uniform_filter(filled, 3))[inside].std() / spread
    clipped = np.mean(((frames <= 0) | (frames >= 1)).all(axis=0)[inside])

    # How full each cell of the coarse grid is, and how bright; the nominal cell size divides: empty cells are 0.
    place = np.stack([np.abs(where[0]), (where[1] + 1) / 2, (where[2] + 1) / 2])
    cell = np.minimum((place.T * CELLS).astype(int), np.array(CELLS) - 1).T
    cell, nominal = np.ravel_multi_index(cell, CELLS), inside.size / np.prod(CELLS)
    form = np.bincount(cell, minlength=np.prod(CELLS)) / nominal
    light = np.bincount(cell, (values - values.mean()) / spread, minlength=np.prod(CELLS)) / nominal

    quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    return np.array([*quantiles, *frame, asymmetry, *tilt, *skew, noise, clipped, *form, *light], np.float64)


def qc_fit(train_features, validation_features):
    """
    What a good source looks like: the features' centre, spread and correlation in training, the threshold from
    validation.

    Two more come in for each of the coarse grids: how much of the training set's front-back and up-down differences
    the subject has, 1 as in training, -1 the other way round. All are centred on their median and divided by the
    largest of 1.4826 MAD, the standard deviation and 0.01. The score is the root mean square of these, decorrelated
    with their Ledoit-Wolf covariance (a Mahalanobis distance), or a third of the largest alone, if that is more.

    The threshold is the score that at most 1 in 20 validation subjects exceed, counted with the subject to come. The
    highest of n scores bounds 1 in 20 with a certainty of 90 % from 45 subjects on (0.95^45 = 0.1); with fewer it is
    1.25 times the highest score, with fewer than 19 1.5 times. Returns a dict of floats and lists: pattern, center,
    scale, precision, threshold.
    """
    train, validation = (np.atleast_2d(np.asarray(f, np.float64)) for f in (train_features, validation_features))
    if len(train) < 2 or not validation.size:
        raise QualityError(f'the source check needs two training subjects and one for validation, not {len(train)} and '
                           f'{len(validation) if validation.size else 0}.')
    fit = {'pattern': train[:, len(FEATURES):].mean(axis=0).tolist()}
    measures = np.array([_measures(f, fit) for f in train])
    center = np.median(measures, axis=0)
    mad = 1.4826 * np.median(np.abs(measures - center), axis=0)
    scale = np.maximum(np.maximum(mad, measures.std(axis=0)), SCALE_FLOOR)
    covariance = LedoitWolf(assume_centered=True).fit((measures - center) / scale).covariance_
    covariance = covariance + 0.1 * np.eye(len(covariance))   # a direction without spread must not rule the score
    fit.update(center=center.tolist(), scale=scale.tolist(), precision=np.linalg.inv(covariance).tolist())
    scores = np.sort([qc_score(f, fit) for f in validation])[::-1]
    allowed = int((len(scores) + 1) * GOOD_SHARE) - 1
    few = 1.5 if allowed < 0 else 1.25 if (1 - GOOD_SHARE) ** len(scores) > 0.1 else None
    fit['threshold'] = float(few * scores[0] if few else scores[allowed])
    return fit


def qc_score(features, fit):
    """Distance of a subject's features from those of the training set; about 1 is typical."""
    z = (_measures(features, fit) - fit['center']) / fit['scale']
    together = np.sqrt(z @ np.asarray(fit['precision']) @ z / len(z))
    return float(max(together, np.abs(z).max() / 3))


def qc_flag(features, fit):
    """True if the source looks unlike those of the training set, so that the output is not to be trusted."""
    return qc_score(features, fit) > fit['threshold']


def qc_reason(features, fit, count=3):
    """The `count` features that lie farthest out, for a message, such as 'tilt_y +12.1, noise +8.0'."""
    z = (_measures(features, fit) - fit['center']) / fit['scale']
    return ', '.join(f'{(FEATURES + TURNS)[i]} {z[i]:+.1f}' for i in np.argsort(-np.abs(z))[:count])


def _measures(features, fit):
    """
    The named features, then how much of the training set's front-back and up-down differences, in form and in image, is
    there: 1 as in training, 0 none, -1 the other way round.
    """
    features = np.asarray(features, np.float64)
    own, mean = (np.reshape(f, (2, *CELLS)) for f in (features[len(FEATURES):], fit['pattern']))
    turns = []
    for x, y in zip(own, mean, strict=True):
        for axis in (1, 2):
            a, b = x - np.flip(x, axis), y - np.flip(y, axis)
            turns.append(np.sum(a * b) / max(np.sum(b * b), 1e-6))
    return np.concatenate([features[:len(FEATURES)], turns])


def _as_volume(array):
    """(N, C, X, Y) slices or (1, C, X, Y, Z) to (C, X, Y, Z)."""
    array = np.asarray(array, np.float32)
    return np.moveaxis(array, 0, -1) if array.ndim == 4 else array[0]


def _slope(x, y):
    """Least-squares slope of y over x; 0 where x does not vary."""
    x = x - x.mean()
    return float(np.sum(x * y) / max(np.sum(x * x), 1e-9)) if len(x) else 0.0
