"""
What goes into a CSV: one row of figures per subject, and the summary over subjects.

Every image figure is taken inside the brain mask, after prediction and truth have both been clipped to the scaling
range of the target; the data range is that range, and outside the mask both images are set to its lower end. Volumes
are (X, Y, Z) arrays in physical units on the subject's own grid. A figure that is undefined for a subject (a lesion
figure without a lesion) is nan.

Whole-volume SSIM is not computed anywhere: a brain that is its own mean everywhere scores 0.84 there, 0.43 in the mask.
"""

import numpy as np
import pandas as pd
from scipy import ndimage, stats

SIGMA = 1.5                                                   # of the Gaussian window of SSIM, voxels
RADIUS = 5                                                    # int(3.5 * SIGMA + 0.5): 11 wide, as in scikit-image
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)      # of MS-SSIM (Wang 2003), finest scale first
MSE_FLOOR = 1e-10                                             # an exact prediction counts as 100 dB: finite means

RULE = 620.0, 1.25, 0.1                                       # lesion rule: see lesion_rule
RIM_MM = 6.0

QUICK = ['psnr', 'ssim', 'mae', 'lesion_mae']                 # what quick_row returns: columns of a validation curve
LESION_COLUMNS = ['lesion_mae', 'lesion_contrast_error', 'adc_lesion_bias', 'lesion_dice', 'lesion_dice_2ml',
                  'lesion_dice_ceiling', 'lesion_ml', 'lesion_avd_ml', 'lesion_detected', 'false_lesion_ml',
                  'lesion_rim_mae']
NOT_SUMMARISED = ('ID', 'qc', 'status_pred', 'label_probability', 'num_steps', 'samples', 'ms_ssim_scales', 'seconds')
UNTESTED = ('_coverage_', '_width_', '_covered')              # neither more nor less of these is better
SIGNED = ('adc_lesion_bias', 'suvr_error')                    # the summary gives |.| of these a line of its own


class MetricError(ValueError):
    """Input that cannot be measured; the message is one sentence for the user."""
    one_sentence = True


# ---------------------------------------------------------------------------------------------------------------------
# image figures: of images scaled to 0..1 and 0 outside the mask

def scaled(image, mask, limits):
    """Clip an image to limits = (lo, hi), scale it to 0..1 and set it to 0 outside the mask; float64."""
    lo, hi = limits
    image = np.asarray(image, dtype=np.float64)
    if image.shape != mask.shape:
        raise MetricError(f'an image of shape {image.shape} was to be compared within a mask of shape {mask.shape}.')
    if not np.isfinite(image[mask]).all():
        raise MetricError('an image to be compared holds NaN or infinity inside the mask.')
    return np.where(mask, (np.clip(image, lo, hi) - lo) / (hi - lo), 0.0)


def _physical(image, limits):
    """Inverse of `scaled`, in the clipped range."""
    return image * (limits[1] - limits[0]) + limits[0]


def psnr(pred, truth, mask):
    """In-mask peak signal-to-noise ratio in dB of two images scaled to 0..1; 100 dB at most."""
    return float(-10.0 * np.log10(max(np.mean((pred[mask] - truth[mask]) ** 2), MSE_FLOOR)))


def ssim(pred, truth, mask, axis=None):
    """
    In-mask mean of the SSIM map of two volumes scaled to 0..1 (Gaussian window, sigma 1.5, population covariance).

    axis: the axial direction; the window is then 2D, within each slice across that axis, and the mean is over the mask
    voxels of all slices. None: a 3D window.
    """
    pred, truth, mask = _crop(mask, axis, 1, pred, truth, mask)
    luminance, structure = _ssim_maps(pred, truth, axis)
    return float(np.mean((luminance * structure)[mask]))


def ms_ssim_scales(shape, axis=None):
    """Number of scales (1..5) at which the smallest side of a slice (or, axis None, the volume) holds the window."""
    side = min(n for i, n in enumerate(shape) if axis is None or i != axis % len(shape))
    return int(np.clip(np.floor(np.log2(max(side, 1) / (2 * RADIUS + 1))) + 1, 1, len(SCALE_WEIGHTS)))


def ms_ssim(pred, truth, mask, axis=None, scales=None):
    """
    Multi-scale SSIM of two volumes scaled to 0..1: prod_j c_j ^ w_j, j = 1..M, with c_j the in-mask mean of the
    contrast-structure map at scale j (of the full SSIM map at the last), negative means counted as 0.

    From scale to scale images are averaged over 2 x 2 (x 2) voxels; a coarse voxel is in the mask if half of it is. M
    is ms_ssim_scales(shape, axis) unless given; the standard weights w_j of the first M scales are made to sum to 1.
    """
    scales = scales or ms_ssim_scales(mask.shape, axis)
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    pred, truth, inside = _crop(mask, axis, 2 ** (scales - 1), pred, truth, mask.astype(np.float64))
    score = 1.0
    for j, weight in enumerate(weights):
        region = inside >= 0.5 if (inside >= 0.5).any() else inside > 0
        luminance, structure = _ssim_maps(pred, truth, axis)
        values = luminance * structure if j == scales - 1 else structure
        score *= max(np.mean(values[region]), 0.0) ** weight
        if j < scales - 1:
            pred, truth, inside = (_halve(x, axis) for x in (pred, truth, inside))
    return float(score)


def _ssim_maps(x, y, axis):
    """Luminance and contrast-structure maps, whose product is the SSIM map, for data range 1."""
    sigma = [0.0 if axis is not None and i == axis % x.ndim else SIGMA for i in range(x.ndim)]

    def window(image):
        return ndimage.gaussian_filter(image, sigma, mode='reflect', radius=[RADIUS if s else 0 for s in sigma])

    mean_x, mean_y = window(x), window(y)
    variances = window(x * x + y * y) - mean_x ** 2 - mean_y ** 2
    covariance = window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01 ** 2) / (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2)
    return luminance, (2 * covariance + 0.03 ** 2) / (variances + 0.03 ** 2)


def _crop(mask, axis, block, *arrays):
    """Crop to the mask's box plus the windows' reach at the coarsest scale: this changes no value in the mask."""
    box = []
    for i, n in enumerate(mask.shape):
        hit = np.flatnonzero(mask.any(axis=tuple(j for j in range(mask.ndim) if j != i)))
        across = axis is not None and i == axis % mask.ndim
        step, margin = (1, 0) if across else (block, (RADIUS + 1) * block)
        start = max(hit[0] - margin, 0) // step * step         # a multiple of the block: coarse voxels stay the same
        stop = min(-(-(hit[-1] + 1 + margin) // step) * step, n)
        box.append(slice(start, stop))
    return [a[tuple(box)] for a in arrays]


def _halve(x, axis):
    """Mean over 2 x 2 (x 2) voxels; an odd last row is left out, an axis of one voxel stays."""
    for i in range(x.ndim):
        if x.shape[i] > 1 and (axis is None or i != axis % x.ndim):
            n = x.shape[i] // 2 * 2
            x = 0.5 * (np.take(x, range(0, n, 2), axis=i) + np.take(x, range(1, n, 2), axis=i))
    return x


# ---------------------------------------------------------------------------------------------------------------------
# lesions

def lesion_rule(dwi, adc, mask, voxel_ml, rule=RULE):
    """
    Lesion of a pair of images, real or synthetic, by a rule (a, b, ml): ADC < a and DWI > b times its in-mask median,
    inside the mask, in 26-connected components of ml or more. dwi may be in any unit, adc is in 1e-6 mm^2/s.
    """
    mask = np.asarray(mask, bool)
    found = mask & (adc < rule[0]) & (dwi > rule[1] * np.median(dwi[mask]))
    parts, _ = ndimage.label(found, structure=np.ones((3, 3, 3)))
    large = np.bincount(parts.ravel()) * voxel_ml >= rule[2] - 1e-6      # headers hold 0.9999999 mm, too
    large[0] = False
    return large[parts]


def dice(a, b):
    """Dice of two bool arrays. Both empty is right and counts 1; one empty counts 0 (the convention of ISLES)."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2.0 * np.count_nonzero(a & b) / total if total else 1.0


def lesion_rim(lesion, mask, spacing, reach=RIM_MM):
    """Voxels in the mask, outside the lesion, whose centre is at most `reach` mm from the centre of a lesion voxel."""
    if not lesion.any():
        return np.zeros_like(mask)
    distance = ndimage.distance_transform_edt(~lesion, sampling=spacing)
    return mask & ~lesion & (distance <= reach + 1e-3)


def _lesion_columns(pred, truth, mask, lesion, spacing, ranges, physical, voxel_ml, rule):
    """The stroke columns of subject_row, from images scaled to 0..1."""
    row = dict.fromkeys([f'{t}_lesion_mae' for t in pred] + LESION_COLUMNS, np.nan)
    if lesion is None:
        return row
    error = {t: np.abs(pred[t] - truth[t]) for t in pred}
    rim = lesion_rim(lesion, mask, spacing)
    if lesion.any():
        width = {t: ranges[t][1] - ranges[t][0] for t in pred}
        row.update({f'{t}_lesion_mae': error[t][lesion].mean() * width[t] for t in pred})
        row['lesion_mae'] = np.mean([error[t][lesion].mean() for t in pred])
        if 'adc' in pred and physical:
            row['adc_lesion_bias'] = (pred['adc'] - truth['adc'])[lesion].mean() * width['adc']
    if rim.any():
        row['lesion_rim_mae'] = np.mean([error[t][rim].mean() for t in pred])
    if {'dwi', 'adc'} <= set(pred) and physical:
        pair = [{t: _physical(x[t], ranges[t]) for t in ('dwi', 'adc')} for x in (pred, truth)]
        row.update(_rule_columns(*pair, mask, lesion, voxel_ml or float(np.prod(spacing)) / 1000, rule))
    return row


def _rule_columns(pred, truth, mask, lesion, voxel_ml, rule):
    """Lesion contrast, and what the lesion rule finds, from images in physical units."""
    row = {}
    if lesion.any() and (mask & ~lesion).any():
        ratios = [x['dwi'][lesion].mean() / max(x['dwi'][mask & ~lesion].mean(), 1e-6) for x in (pred, truth)]
        row['lesion_contrast_error'] = abs(ratios[0] - ratios[1])
    found = lesion_rule(pred['dwi'], pred['adc'], mask, voxel_ml, rule)
    parts, _ = ndimage.label(found, structure=np.ones((3, 3, 3)))
    false = found & ~np.isin(parts, np.unique(parts[lesion & found]))
    row['lesion_dice'] = dice(found, lesion)
    row['lesion_dice_ceiling'] = dice(lesion_rule(truth['dwi'], truth['adc'], mask, voxel_ml, rule), lesion)
    row['lesion_ml'] = np.count_nonzero(lesion) * voxel_ml
    row['lesion_dice_2ml'] = row['lesion_dice'] if row['lesion_ml'] > 2 else np.nan
    row['lesion_avd_ml'] = abs(np.count_nonzero(found) - np.count_nonzero(lesion)) * voxel_ml
    row['lesion_detected'] = float((found & lesion).any()) if lesion.any() else np.nan
    row['false_lesion_ml'] = np.count_nonzero(false) * voxel_ml
    return row

# ---------------------------------------------------------------------------------------------------------------------
# one subject

def _prepare(pred, truth, mask, lesion, ranges):
    mask = np.asarray(mask) > 0
    if not mask.any():
        raise MetricError('the brain mask is empty, so that nothing can be compared.')
    lesion = None if lesion is None else (np.asarray(lesion) > 0) & mask
    pred, truth = ({t: scaled(x[t], mask, ranges[t]) for t in pred} for x in (pred, truth))
    return pred, truth, mask, lesion


def subject_row(pred, truth, mask, lesion, spacing, ranges, task, axis=2, physical=True, scales=None, voxel_ml=None,
                rule=RULE):
    """
    The figures of one subject, as a dict column -> float.

    pred, truth: dicts target -> (X, Y, Z) in physical units (DWI in multiples of its in-mask median); mask (X, Y, Z);
    lesion (X, Y, Z), the ischaemic lesion or the cortical composite, or None if not known; spacing: mm of the axes;
    ranges: target -> (lo, hi); task 'ctp2dwi' or 'mri2pet'; axis: the axial one; scales: of MS-SSIM; voxel_ml: of a
    voxel, None: product of spacing; physical: False where units are others (in_units): rule, ADC bias, SUVR are nan;
    rule: of lesion_rule.

    Per target: <t>_mae in physical units, <t>_psnr (dB), <t>_ssim, <t>_ms_ssim (axial slices for ctp2dwi, else 3D).
    ctp2dwi, undefined without a lesion:
      <t>_lesion_mae         mean |pred - true| in the lesion, physical units
      lesion_mae             mean over targets of the same, each scaled to 0..1
      lesion_contrast_error  |c_pred - c_true|, c = mean DWI in the lesion / mean DWI in the rest of the mask
      adc_lesion_bias        mean (pred - true) ADC in the lesion, signed, 1e-6 mm^2/s
      lesion_detected        1 if what the rule finds on the prediction overlaps the lesion, else 0; mean: sensitivity
      lesion_rim_mae         like lesion_mae, within 6 mm around the lesion, outside it, in the mask
    ctp2dwi, defined for a subject without lesion (an empty lesion), too:
      lesion_dice            of the lesion rule on the prediction with the lesion; both empty counts 1, one empty 0
      lesion_dice_ceiling    the same of the rule on the real images: what a perfect prediction would score
      lesion_dice_2ml        lesion_dice where the lesion is larger than 2 ml, else undefined
      lesion_ml              volume of the lesion
      lesion_avd_ml          |volume found - volume of the lesion|
      false_lesion_ml        volume of the components found that share no voxel with the lesion
    mri2pet:
      suvr_true, suvr_pred   mean SUVR in the composite (of the first target)
      suvr_error             suvr_pred - suvr_true, signed
    With lesion None the last three groups are nan. The lesion is cut to the mask. Raises MetricError.
    """
    pred, truth, mask, lesion = _prepare(pred, truth, mask, lesion, ranges)
    axis = axis if task == 'ctp2dwi' else None
    row = {}
    for t in pred:
        width = ranges[t][1] - ranges[t][0]
        row[f'{t}_mae'] = np.abs(pred[t] - truth[t])[mask].mean() * width
        row[f'{t}_psnr'] = psnr(pred[t], truth[t], mask)
        row[f'{t}_ssim'] = ssim(pred[t], truth[t], mask, axis)
        row[f'{t}_ms_ssim'] = ms_ssim(pred[t], truth[t], mask, axis, scales)
    if task == 'ctp2dwi':
        row.update(_lesion_columns(pred, truth, mask, lesion, spacing, ranges, physical, voxel_ml, rule))
    else:
        t, known = next(iter(pred)), physical and lesion is not None and lesion.any()
        true, made = (_physical(x[t][lesion].mean(), ranges[t]) if known else np.nan for x in (truth, pred))
        row.update({'suvr_true': true, 'suvr_pred': made, 'suvr_error': made - true})
    return {k: float(v) for k, v in row.items()}


def quick_row(pred, truth, mask, lesion, ranges, task, axis=2):
    """
    psnr, ssim, mae, lesion_mae of one subject for validation curves: means over targets, images scaled to 0..1;
    lesion_mae is nan without a lesion (mri2pet: over the cortical composite). Arguments as subject_row.
    """
    pred, truth, mask, lesion = _prepare(pred, truth, mask, lesion, ranges)
    axis = axis if task == 'ctp2dwi' else None
    error, known = {t: np.abs(pred[t] - truth[t]) for t in pred}, lesion is not None and lesion.any()
    return {'psnr': float(np.mean([psnr(pred[t], truth[t], mask) for t in pred])),
            'ssim': float(np.mean([ssim(pred[t], truth[t], mask, axis) for t in pred])),
            'mae': float(np.mean([e[mask].mean() for e in error.values()])),
            'lesion_mae': float(np.mean([e[lesion].mean() for e in error.values()])) if known else np.nan}

# ---------------------------------------------------------------------------------------------------------------------
# all subjects

def bootstrap_ci(values, seed, level=0.95, resamples=2000):
    """Percentile bootstrap interval (low, high) of the mean over subjects; nan and nan for fewer than two values."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return np.nan, np.nan
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values):
    """Holm's step-down correction; nan stays nan and does not count as a test."""
    p_values = np.asarray(p_values, dtype=np.float64)
    corrected = np.full_like(p_values, np.nan)
    known = np.flatnonzero(np.isfinite(p_values))
    order = known[np.argsort(p_values[known], kind='stable')]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return corrected


def summarise(rows, baselines, seed):
    """
    Mean and bootstrap 95 % interval over subjects of each column of `rows`, and of each baseline (test_summary.csv).

    rows: one line a subject, with the column ID; baselines: dict name -> such a table. A baseline is read for the
    subjects of `rows` only. Returns columns metric, n (subjects for whom the model's figure is defined), mean, ci_low,
    ci_high, and per baseline <name>_mean, <name>_ci_low, <name>_ci_high, <name>_p, <name>_p_holm: two-sided Wilcoxon
    signed-rank test of model against baseline on the subjects that have both (nan if no pair differs, and of intervals'
    columns, UNTESTED), corrected after Holm over all tests of the table. Signed columns are followed by a line
    <column>_abs: |.| per subject, from which "better" should be read.
    """
    rows = _numbers(rows)
    others = {name: _numbers(table).reindex(rows.index) for name, table in baselines.items()}
    lines = []
    for metric in rows.columns:
        x = rows[metric].to_numpy()
        line = {'metric': metric, 'n': int(np.isfinite(x).sum()), **_mean_and_ci(x, '', seed)}
        for name, table in others.items():
            y = table[metric].to_numpy() if metric in table else np.full(len(x), np.nan)
            difference = np.round(x - y, 9) if not any(part in metric for part in UNTESTED) else np.nan * x
            difference = difference[np.isfinite(difference) & (difference != 0)]  # rounded: ties stay ties
            line.update(_mean_and_ci(y, f'{name}_', seed))
            line[f'{name}_p'] = float(stats.wilcoxon(difference).pvalue) if len(difference) else np.nan
            line[f'{name}_p_holm'] = np.nan
        lines.append(line)
    table = pd.DataFrame(lines)
    if baselines and lines:
        raw = table[[f'{name}_p' for name in baselines]].to_numpy()
        table[[f'{name}_p_holm' for name in baselines]] = holm(raw.ravel()).reshape(raw.shape)
    return table


def _numbers(table):
    """The figures of a table of subjects as float64, indexed by ID, with |.| beside each signed column."""
    table = table.copy()
    table.index = table['ID'].astype(str)
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise MetricError(f'subject {twice} has two lines in a table that is to be summarised.')
    table = table[[c for c in table if c not in NOT_SUMMARISED and not c.endswith(('_low', '_high'))]]
    table = table.apply(pd.to_numeric).astype(np.float64)
    for column in SIGNED:
        if column in table:
            table.insert(table.columns.get_loc(column) + 1, f'{column}_abs', table[column].abs())
    return table


def _mean_and_ci(values, prefix, seed):
    values = values[np.isfinite(values)]
    low, high = bootstrap_ci(values, seed)
    return {f'{prefix}mean': float(values.mean()) if len(values) else np.nan, f'{prefix}ci_low': low,
            f'{prefix}ci_high': high}


def format_table(summary):
    """The summary as text for a terminal: mean and interval, the baselines' means, * where Holm's p is below 0.05."""
    names = [c[:-len('_p_holm')] for c in summary.columns if c.endswith('_p_holm')]
    lines = [['metric', 'n', 'this model', '95 % CI', *[{'mean': 'mean image'}.get(name, name) for name in names]]]
    for _, r in summary.iterrows():
        line = [r['metric'], str(r['n']), _short(r['mean']), f'{_short(r["ci_low"])} .. {_short(r["ci_high"])}']
        marks = ['*' if r[f'{name}_p_holm'] < 0.05 else ' ' for name in names]
        lines.append(line + [_short(r[f'{n}_mean']) + mark for n, mark in zip(names, marks, strict=True)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ['  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]
    if names:
        text.append('* differs from the model: paired Wilcoxon test, p < 0.05 after Holm over the table')
    return '\n'.join(text)


def _short(value):
    """Four significant digits, without an exponent for everyday sizes; - for nan."""
    if not np.isfinite(value):
        return '-'
    digits = 0 if value == 0 else int(np.clip(3 - np.floor(np.log10(abs(value))), 0, 4))
    return f'{value:.{digits}f}'
