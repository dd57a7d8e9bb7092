"""
A model against the truth: figures of each subject, means for a validation curve, and what is fitted on training and
validation subjects: intervals around the prediction, the check of the source, the threshold of amyloid status.

Part of infer.py; the training stages validate with the very same functions.
"""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
from tqdm import tqdm

import dataset
import metrics
import quality
import status
import utils
import volume


def evaluate(run, predict, spec, ids, on_subject=None, quick=True, label='', intervals=None):
    """Rows of metrics, one a subject in the order of ids, on the subject's own grid; the processes share the subjects.

    predict(subject) -> (pred, std) in network scaling. quick: the few figures of a validation curve; else all of
    metrics.subject_row. on_subject(subject, pred, std): called for each, e.g. to write files. Errors of one subject are
    collected, not raised: returns (rows, errors).
    """
    rows, errors = [], []
    ranges = {name: dataset.scaling_range(spec, name) for name in spec.targets}
    mine = list(enumerate(ids))[run.rank::run.world]
    for i, id in tqdm(mine, desc=label or 'evaluate', leave=False, disable=not run.main, mininterval=0.5):
        try:
            subject = dataset.load_listed(spec, id)
            start = time.perf_counter()
            pred, std = predict(subject)
            seconds, row = time.perf_counter() - start, dict(ID=id)
            if subject.target is not None:
                image, truth = subject.to_native(pred), subject.truth()
                mask, lesion = subject.known_mask(), subject.native_lesion
                if quick:
                    row |= metrics.quick_row(image, truth, mask, lesion, ranges, spec.task, axis=subject.axial_axis)
                else:
                    row |= metrics.subject_row(image, truth, mask, lesion, subject.spacing, ranges, spec.task,
                                               axis=subject.axial_axis, physical=volume.in_units(spec.scaling),
                                               scales=ms_ssim_scales(spec), voxel_ml=subject.voxel_ml,
                                               rule=spec.lesion_rule)
                    row |= lesion_head_row(lesion_map(subject, pred), mask, lesion, subject.voxel_ml)
                if intervals:
                    row |= coverage_row(subject, pred, std, spec, intervals, image, truth)
            if on_subject:
                on_subject(subject, pred, std)
            rows.append((i, row | dict(seconds=seconds)))
        except Exception as err:
            if not getattr(err, 'one_sentence', False):
                raise
            errors.append(f'{id}: {str(err).removeprefix(f"{id}: ")}')
    rows = [row for _, row in sorted(run.gather(rows), key=lambda pair: pair[0])]
    return rows, run.gather(errors)


def ms_ssim_scales(spec):
    """The number of scales of MS-SSIM, one for all subjects: as many as the network's image size allows."""
    return metrics.ms_ssim_scales(spec.image_size)


def validate(run, predict, spec, ids):
    """Means of the quick figures over the validation subjects, for a training stage; an unreadable one is an error."""
    rows, errors = evaluate(run, predict, spec, ids, label='validate')
    if errors:
        raise utils.RunError(errors[0])
    if without := [row['ID'] for row in rows if set(row) == {'ID', 'seconds'}]:
        raise utils.RunError(f'{without[0]}: validation needs the targets of every subject, and it has not all of them '
                             f'({len(without)} of {len(rows)} subjects); add the files or take it off validation.txt')
    table = pd.DataFrame(rows).drop(columns=['ID', 'seconds'])
    return {name: float(table[name].mean()) for name in table}  # undefined values (no lesion) are left out of the mean


def std_maps(subject, std, spec):
    """The std of `translate`, (N, K, *S) in network scaling or None (zeros), as physical maps on the subject's grid."""
    maps = {}
    for k, name in enumerate(spec.target_names):
        lo, hi = dataset.scaling_range(spec, name)
        maps[name] = np.zeros(subject.shape, np.float32)
        if std is not None:
            maps[name] = subject.moved(std[:, k:k + 1])[0] * (hi - lo) / 2 * subject.native_mask
    return maps


def lesion_map(subject, pred):
    """The probability of a lesion (X, Y, Z), 0 outside the mask, from a prediction with K + 1 channels; None of K."""
    if pred.shape[1] == len(subject.spec.target_names):
        return None
    return np.clip(subject.moved(pred[:, -1:])[0], 0, 1) * subject.native_mask


def rule_map(subject, pred):
    """What the lesion rule finds in a prediction, (X, Y, Z) bool; None where there are no DWI and ADC in units."""
    if not {'dwi', 'adc'} <= set(subject.spec.targets) or not volume.in_units(subject.spec.scaling):
        return None
    image = subject.to_native(pred)
    rule = subject.spec.lesion_rule
    return metrics.lesion_rule(image['dwi'], image['adc'], subject.native_mask, subject.voxel_ml, rule)


def lesion_head_row(probability, mask, lesion, voxel_ml):
    """
    Figures of a lesion head's map (X, Y, Z), 0..1, against the lesion mask; {} without a map or a lesion mask.

      lesion_head_dice    of probability > 0.5 with the lesion; both empty counts 1, one empty 0
      lesion_head_ml      the lesion's expected volume: the sum of the probabilities
      lesion_head_avd_ml  |expected volume - volume of the lesion|
    """
    if probability is None or lesion is None:
        return {}
    lesion = np.asarray(lesion, bool) & mask
    expected, volume = float(probability[mask].sum()) * voxel_ml, np.count_nonzero(lesion) * voxel_ml
    return dict(lesion_head_dice=metrics.dice((probability > 0.5) & mask, lesion), lesion_head_ml=expected,
                lesion_head_avd_ml=abs(expected - volume))


def calibration_counts(probability, mask, lesion):
    """By tenths of the probability: voxels of the mask, the sum of their probabilities, those in the lesion; (10, 3).

    Zeros without a map or a lesion mask.
    """
    if probability is None or lesion is None:
        return np.zeros((10, 3))
    p, found = probability[mask].astype(float), np.asarray(lesion, bool)[mask]
    tenth = np.minimum((p * 10).astype(int), 9)
    return np.stack([np.bincount(tenth, weight, 10) for weight in (np.ones_like(p), p, found)], axis=1)


def calibration_table(counts):
    """Is a lesion there as often as the head says? By tenths of p, from calibration_counts summed over subjects."""
    voxels, p, found = np.sum(counts, axis=0).T
    share = np.where(voxels > 0, [p, found], np.nan) / np.maximum(voxels, 1)
    return pd.DataFrame(dict(p_from=np.arange(10) / 10, voxels=voxels.astype(int), mean_p=share[0],
                             lesion_share=share[1]))


# ------------------------------------------------------------------------------------------------------------------
# Trust: intervals and the check of the source

NUMBERS = dict(ctp2dwi='lesion_head_ml', mri2pet='suvr_pred')  # the one number a subject, by task


def number_of(subject, pred, std, spec, mask=None):
    """(value, spread, truth) of a subject's one number in the mask (None: known_mask); None where it has none.

    Stroke, with a lesion head: the lesion's expected volume in ml, the sum of p; spread is the sum of p (1 - p), the
    volume in doubt. Amyloid, where the composite is known: mean SUVR there and mean of the std there. truth: nan where
    it is not known.
    """
    mask = subject.known_mask() if mask is None else mask
    lesion = None if subject.native_lesion is None else subject.native_lesion & mask
    if spec.task == 'ctp2dwi':
        if (p := lesion_map(subject, pred)) is None:
            return None
        ml, p = subject.voxel_ml, p[mask].astype(float)  # as lesion_ml
        truth = np.nan if lesion is None else np.count_nonzero(lesion) * ml
        return float(p.sum()) * ml, float((p * (1 - p)).sum()) * ml, truth
    name = spec.target_names[0]
    if lesion is None or not lesion.any() or not volume.in_units(spec.scaling):
        return None
    limits = dataset.scaling_range(spec, name)
    value, spread = subject.to_native(pred)[name][lesion].mean(), std_maps(subject, std, spec)[name][lesion].mean()
    truth = np.nan if subject.target is None else np.clip(subject.truth()[name][lesion], *limits).mean()
    return tuple(float(x) for x in (value, spread, truth))


def coverage_row(subject, pred, std, spec, intervals, image, truth):
    """
    How often the intervals of fit_intervals hold the truth of a subject; image, truth: target -> (X, Y, Z).

      <t>_coverage_<100 q>, <t>_width_<100 q>   share of the mask's voxels inside, mean half width
      <t>_lesion_coverage_<100 q>, _width_      the same in the lesion (amyloid: in the composite); nan without one
      <t>_rim_coverage_<100 q>, _width_         stroke: the same within 6 mm of the lesion
      <number>_low, <number>_high               the 90 % interval of the subject's number (NUMBERS)
      <number>_covered                          whether its truth lies inside, 0 or 1
    """
    row, spread, mask, lesion = {}, std_maps(subject, std, spec), subject.known_mask(), subject.native_lesion
    regions = {'': mask} if lesion is None else {'': mask, 'lesion_': lesion & mask}
    if lesion is not None and spec.task == 'ctp2dwi':
        regions['rim_'] = metrics.lesion_rim(lesion & mask, mask, subject.spacing)
    for name in [name for name in spec.target_names if name in intervals]:
        for region, where in regions.items():
            coverage = quality.interval_coverage(image[name], spread[name], truth[name], where, intervals[name],
                                                 limits=dataset.scaling_range(spec, name))
            row |= {f'{name}_{region}{k}': v for k, v in coverage.items()}
    if NUMBERS[spec.task] not in intervals:
        return row
    return row | number_row(number_of(subject, pred, std, spec), spec, intervals)


def number_row(number, spec, intervals):
    """The columns of coverage_row that belong to a subject's number (number_of); {} where it has none."""
    name = NUMBERS[spec.task]
    if number is None:
        return {}
    value, spread, truth = number
    low, high = quality.number_interval(value, spread, intervals[name], lowest=0)
    covered = float(low <= truth <= high) if np.isfinite(truth) else np.nan
    return {f'{name}_low': low, f'{name}_high': high, f'{name}_covered': covered}


def predicted_row(subject, pred, std, spec, intervals):
    """
    What the images say of a subject, whether or not its truth is known; what it has not is left out.

      lesion_head_ml, suvr_pred            its number (NUMBERS), with <number>_low, _high: the 90 % interval
      lesion_head_max                      the head's highest probability of a lesion
      lesion_rule_ml                       stroke: volume that the lesion rule finds in the synthetic images
    All in the whole brain mask, whatever part of it a target reaches.
    """
    name, row = NUMBERS[spec.task], {}
    if (number := number_of(subject, pred, std, spec, subject.native_mask)) is not None:
        limits = number_row(number, spec, intervals) if name in intervals else {}
        row = {name: number[0]} | {k: v for k, v in limits.items() if not k.endswith('_covered')}
    if (p := lesion_map(subject, pred)) is not None:
        row['lesion_head_max'] = p.max()
    if (found := rule_map(subject, pred)) is not None:
        row['lesion_rule_ml'] = np.count_nonzero(found) * subject.voxel_ml
    return {key: float(x) for key, x in row.items()}


def number_record(row, spec):
    """What a prediction.json says of predicted_row: {number: {value, low_90, high_90}, another: value}."""
    name = NUMBERS[spec.task]
    said = dict(value=row.get(name), low_90=row.get(f'{name}_low'), high_90=row.get(f'{name}_high'))
    said = {key: round(x, 4) for key, x in said.items() if x is not None}
    rest = {key: round(row[key], 4) for key in ('lesion_head_max', 'lesion_rule_ml') if key in row}
    return ({name: said} if said else {}) | rest

def fitting_ids(cfg, spec, *splits):
    """The subjects with truth of the lists that are there, and not empty: a cohort for testing has no others."""
    lists = dataset.read_lists(cfg.data_info)[0]
    there = [split for split in splits if lists[split]]
    return [id for split in there for id in dataset.read_split(cfg.data_info, split) if spec.has_truth(id)]


def left_out(run, what, errors):
    """Say which subjects could not be read for something beside the translation, which goes on."""
    if errors and run.main:
        print(f'left out of {what}:', *errors, sep='\n  ')


def fit_intervals(cfg, run, spec, predict, voxels=20000):
    """
    Intervals pred +- h_q(std), q = 50, 90 %, from the validation split, {target: quality.interval_fit of its voxels},
    and, where it is known of nine subjects or more, quality.number_fit of the one number a subject, by name (NUMBERS).
    """
    ids, parts, numbers = fitting_ids(cfg, spec, 'validation'), [], []

    def keep(subject, pred, std):
        inside = np.flatnonzero(subject.known_mask())
        inside = inside[np.linspace(0, len(inside) - 1, min(voxels, len(inside))).astype(int)]
        image, spread, truth = subject.to_native(pred), std_maps(subject, std, spec), subject.truth()
        parts.append({name: [x[name].ravel()[inside] for x in (image, spread, truth)] for name in spec.targets})
        numbers.append(number_of(subject, pred, std, spec))

    errors = evaluate(run, predict, spec, ids, label='fit intervals', on_subject=keep)[1]
    left_out(run, 'the fit of the intervals', errors)
    parts, numbers = run.gather(parts), [n for n in run.gather(numbers) if n is not None and np.isfinite(n[2])]
    fits = {}
    for name in spec.targets if parts else ():
        pred, std, truth = zip(*[p[name] for p in parts], strict=True)
        ones = [np.ones_like(p) for p in pred]
        fits[name] = quality.interval_fit(pred, std, truth, ones, limits=dataset.scaling_range(spec, name))
    fit = quality.number_fit(sorted(numbers)) if numbers else dict(q=[])  # sorted: whatever the number of processes
    if 0.9 in fit['q']:
        fits[NUMBERS[spec.task]] = fit
    return fits


def check_source(model, subject):
    """Is the source like the training set's? 'ok', 'unlike training: what lies farthest out', or '' if not known."""
    if not model.qc:
        return ''
    features = source_features(subject.source, subject.mask)
    return f'unlike training: {quality.qc_reason(features, model.qc)}' if quality.qc_flag(features, model.qc) else 'ok'


def source_features(source, mask):
    """quality.source_features of the items with brain, which are those that a training cohort holds."""
    brain = mask.reshape(len(mask), -1).any(1)
    return quality.source_features(source[brain], mask[brain])


def fit_quality(spec, cohort, validation_ids, at_most=100):
    """What a good source looks like, from up to 100 training and 100 validation subjects: quality.qc_fit, or None."""
    train = []
    for j in np.linspace(0, len(cohort.ids) - 1, min(at_most, len(cohort.ids))).astype(int):
        batch = cohort.subject_items(j)
        own = batch['source'].chunk(2 * spec.context + 1, dim=1)[spec.context]  # without the slices beside it
        train.append(source_features(own.numpy(), batch['mask'].numpy()))
    spec = replace(spec, lesion=None)  # sources and masks alone are read
    good = [dataset.load_subject(spec, id, with_truth=False) for id in validation_ids[:at_most]]
    return quality.qc_fit(train, [source_features(s.source, s.mask) for s in good]) if len(train) > 1 else None


# ------------------------------------------------------------------------------------------------------------------
# Amyloid status

def mri_volumes(subject):
    """[ventricle, grey matter] of a subject's MRI as shares of the brain's volume: heads differ in size."""
    mri, mask = subject.to_native_raw(subject.source) + 1, subject.native_mask
    return (status.volume_features(mri, mask, subject.voxel_ml) / (mask.sum() * subject.voxel_ml)).tolist()


def amyloid_status(cfg, run, spec, predict, table, volumes):
    """AUC, balanced accuracy and both class sizes of three scores: the composite SUVR of the synthetic PET, that of the
    true PET, and a logistic regression on the MRI's volumes (ID -> mri_volumes). None, with the reason printed, where
    the subjects do not allow it.

    Status is the true PET's SUVR above cfg.suvr_positive; thresholds are fitted on training + validation, so that the
    true PET, too, may miss a subject near it. The synthetic PETs of training subjects may be better than those of new
    ones, so that its threshold need not be the best for these (the AUC needs none). Fills table['status_pred'].
    """
    table['status_pred'], fit_volumes = np.nan, {}
    unknown = ('it needs the true PET and the cortical composite (the setting lesion) of all training, validation and '
               'test subjects, SUVR scaled by range')
    if table['suvr_true'].isna().any():  # known before anybody is translated
        if run.main:
            print(f'amyloid status is not judged: {unknown}')
        return None

    def measure(subject, pred, std):
        fit_volumes[subject.id] = mri_volumes(subject)

    ids = fitting_ids(cfg, spec, 'train', 'validation')
    if not ids:
        if run.main:
            print('amyloid status is not judged: its thresholds are fitted on training and validation subjects with '
                  'truth, and the lists name none')
        return None
    fit, errors = evaluate(run, predict, spec, ids, quick=False, label='fit threshold', on_subject=measure)
    left_out(run, 'the threshold of amyloid status', errors)
    volumes, fit = volumes | dict(run.gather(fit_volumes.items())), pd.DataFrame(fit)
    try:
        if not len(fit) or fit['suvr_true'].isna().any():
            raise status.StatusError(f'{unknown}.')
        positive = [(t['suvr_true'] > cfg.suvr_positive).astype(int) for t in (fit, table)]
        features = [[volumes[id] for id in t['ID']] for t in (fit, table)]
        lines = dict(
            synthetic=status.classify(fit['suvr_pred'], positive[0], table['suvr_pred'], positive[1], cfg.seed),
            mri_volumes=status.mri_baseline(features[0], positive[0], features[1], positive[1], cfg.seed)[0],
            true_pet=status.classify(fit['suvr_true'], positive[0], table['suvr_true'], positive[1], cfg.seed))
    except status.StatusError as error:
        if run.main:
            print(f'amyloid status is not judged: {error}')
        return None
    table['status_pred'] = (table['suvr_pred'] > lines['synthetic']['threshold']).astype(int)
    more = dict(suvr_positive=cfg.suvr_positive)
    return pd.DataFrame([dict(score=name) | line | more for name, line in lines.items()])
