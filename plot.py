"""
Figures and a report of an experiment: result/<exp>/fig/*.png and result/<exp>/report.html, one self-contained page.

python plot.py                    the experiment in config.py
python plot.py --exp exp_2        another one
python plot.py --preset mri2pet_demo

It reads what training and inference wrote, and the true images through the data settings. It works before a run is
complete, too: the page then says what is missing. Subjects are chosen by a rule that the page states, never by looks.
"""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

import charts
import config
import dataset
import metrics
import montage
import report
import utils
import volume
from experiment import Experiment

FIGURES = ('montage.png', 'montage_*.png', 'metrics.png', 'scatter.png', 'calibration.png', 'curves.png')
LESION = dict(ctp2dwi='lesion', mri2pet='composite')     # what the setting `lesion` is
BOLUS_MM = 8.0                                         # the frames are smoothed by it before the bolus is timed
RULE = 'Lesion rule: ADC < {:g}, DWI > {:g} times its in-mask median, components of {:g} ml or more.'
STAR = 'A star: differs from this model (paired Wilcoxon test, p < 0.05 after Holm over the table).'
NAMES = {'ctp2dwi': ('true lesion', 'lesion rule on the synthetic images'), 'mri2pet': ('cortical composite', '')}


def make_spec(cfg, folder, used=None):
    """How files become arrays: as inference did (`used`, what prediction.json says of it), else as the checkpoint of
    the autoencoder, or of a U-Net on the image grid alone, says; paths from the settings."""
    places = [folder, Path('result') / cfg.init_from] if cfg.init_from else [folder]
    files = [(place / f'{utils.BEST[kind]}.pth.tar', kind) for kind in ('aae', 'regression') for place in places]
    prep = next((utils.load_checkpoint(path, kind)['prep'] for path, kind in files if path.exists()), {}) | (used or {})
    if prep.get('task', cfg.task) != cfg.task:
        raise utils.RunError(f'{folder} was trained for the task {prep["task"]}, but the settings are for {cfg.task}; '
                             'add the --preset of its training')
    return dataset.Spec.from_settings(cfg, **prep)


# ----------------------------------------------------------------------------------------------------------------------
# Subjects: truth beside prediction

def load_case(spec, folder, id):
    """(Subject, montage.Case without title and sources); DataError if a file cannot be read or does not fit."""
    subject = dataset.load_listed(spec, id)
    files = {target: folder / 'pred' / id / f'{target}.nii.gz' for target in spec.target_names}
    pred = {target: read_prediction(path, subject) for target, path in files.items()}
    files = {target: path.with_name(f'{target}_std.nii.gz') for target, path in files.items()}
    std = {target: read_prediction(path, subject) for target, path in files.items() if path.exists()}
    path = folder / 'pred' / id / utils.LESION_MAP
    probability = read_prediction(path, subject) if path.exists() else None
    truth = subject.truth() if subject.target is not None else {}
    truth = {target: np.clip(image, *dataset.scaling_range(spec, target)) for target, image in truth.items()}
    found = None
    if spec.task == 'ctp2dwi' and {'dwi', 'adc'} <= set(pred) and volume.in_units(spec.scaling):
        found = metrics.lesion_rule(pred['dwi'], pred['adc'], subject.native_mask, subject.voxel_ml, spec.lesion_rule)
    return subject, montage.Case(id, '', subject.affine, subject.native_mask, [], pred, truth, std,
                                 subject.native_lesion, found, spec.task == 'ctp2dwi', probability)


def read_prediction(path, subject):
    """A predicted volume, which must lie on the subject's own grid."""
    if not path.exists():
        raise dataset.DataError(f'{path} is missing; run python infer.py again.')
    read = volume.read_volume(path)
    if read.shape != tuple(subject.shape) or np.abs(read.affine - subject.affine).max() > 1e-2:
        raise dataset.DataError(f'{path} is not on the grid of the source; run python infer.py again.')
    return read.array


def measure(spec, folder, id):
    """A row for the scatter diagram, from one subject's images."""
    subject, case = load_case(spec, folder, id)
    row, mask = dict(ID=id), case.mask
    if case.lesion is not None and case.truth and case.found is not None:
        rule = metrics.lesion_rule(case.truth['dwi'], case.truth['adc'], mask, subject.voxel_ml, spec.lesion_rule)
        regions = dict(true_ml=case.lesion, pred_ml=case.found, rule_ml=rule)
        row.update({name: np.count_nonzero(region) * subject.voxel_ml for name, region in regions.items()})
        for name, images in (('true_adc', case.truth), ('pred_adc', case.pred)):
            row[name] = float(images['adc'][case.lesion].mean()) if case.lesion.any() else np.nan
    return row


def in_turn(function, ids, faults):
    """function(id) of each ID, several at a time; a subject that cannot be read becomes an entry of `faults`."""
    def attempt(id):
        try:
            return function(id)
        except Exception as error:
            if not getattr(error, 'one_sentence', False):
                raise
            faults[id] = str(error).removeprefix(f'{id}: ')
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each holds a subject in memory
        return [row for row in pool.map(attempt, ids) if row is not None]


def choose(task, facts, test, ids, suvr_positive=1.11):
    """The subjects to show, dict ID -> title, and the rule in words."""
    chosen = {}
    if task == 'ctp2dwi' and 'true_ml' in facts:
        lesions = facts[facts['true_ml'] > 0].sort_values('true_ml', ascending=False, kind='stable').to_dict('records')
        for place, word in ((0, 'largest'), (len(lesions) // 2, 'median'), (len(lesions) - 1, 'smallest')):
            if lesions:
                chosen.setdefault(lesions[place]['ID'], f'{word} lesion, {lesions[place]["true_ml"]:.3g} ml')
        chosen.update({id: 'no lesion' for id in facts.loc[facts['true_ml'] == 0, 'ID'][:1]})
        rule = 'the largest, the median and the smallest true lesion, and the first subject without a lesion'
    elif task == 'mri2pet' and test is not None and {'suvr_true', 'suvr_pred'} <= set(test):
        known = test[test['ID'].isin(ids)].dropna(subset=['suvr_true', 'suvr_pred'])
        known = known.assign(size=(known['suvr_pred'] - known['suvr_true']).abs()).sort_values('size', kind='stable')
        for word, positive in (('negative', False), ('positive', True)):
            group = known[(known['suvr_true'] > suvr_positive) == positive].to_dict('records')
            for row, error in zip([*group[:1], *group[1:][-1:]], ('smallest', 'largest'), strict=False):
                chosen[row['ID']] = (f'{word}, {error} error\nSUVR true {row["suvr_true"]:.2f}, synthetic '
                                     f'{row["suvr_pred"]:.2f}')
        rule = ('of the truly amyloid-negative and of the positive subjects, that with the smallest and that with the '
                'largest error of the composite SUVR')
    if chosen:
        return chosen, rule
    return dict.fromkeys(ids[:4], ''), 'the first four subjects that were translated'


def source_images(subject):
    """Pictures of the source: an MRI as it is; of a CT perfusion series the mean over time and when the bolus comes."""
    rule, mask = subject.spec.scaling['source'], subject.native_mask
    lo, hi = dataset.scaling_range(subject.spec, 'source')
    stroke = subject.spec.task == 'ctp2dwi'
    unit = {'range': 'HU' if stroke else '', 'median': 'multiples of the median'}.get(rule[0], 'scaled, 0 to 1')
    array = (subject.to_native_raw(subject.source) + 1) / 2 * (hi - lo) + lo
    if array.ndim == 3:
        return [montage.Image('source' if stroke else 'source MRI', array, unit)]
    frames = np.moveaxis(array, 3, 0) * mask
    sigma = [BOLUS_MM / step / 2.355 for step in subject.spacing]
    share = np.maximum(ndimage.gaussian_filter(mask.astype(np.float32), sigma), 1e-3)
    smooth = ndimage.gaussian_filter(frames, [0, *sigma]) / share
    rise = np.maximum(smooth - smooth[:2].mean(axis=0), 0) ** 2
    number = np.arange(1, len(rise) + 1).reshape(-1, 1, 1, 1)
    when = (rise * number).sum(axis=0) / np.maximum(rise.sum(axis=0), 1e-6)
    return [montage.Image('source CTP: mean', array.mean(axis=3), unit),
            montage.Image('source CTP: bolus', when, 'mean time of enhancement (frame)', 'cividis')]


def make_windows(cases, spec):
    """
    One display range a target for all subjects, true and synthetic: from the range's start to the 96 % quantile in the
    true brains, or the 90 % quantile in the lesions if that is more. Error: to the 99 % quantile of |synthetic - true|,
    std: to the 99.8 % quantile, since few voxels are in doubt.
    """
    windows = montage.Windows({}, {}, {})
    for target in spec.target_names:
        lo, hi = dataset.scaling_range(spec, target)
        shown = [(case, (case.truth or case.pred)[target]) for case in cases]
        high = np.quantile(np.concatenate([image[case.mask] for case, image in shown]), 0.96)
        lesions = [image[case.region] for case, image in shown if case.region is not None]
        if lesions and sum(map(len, lesions)):
            high = max(high, np.quantile(np.concatenate(lesions), 0.9))
        high = min(hi, float(f'{high:.2g}'))
        windows.value[target] = lo, high if high > lo else hi
        errors = [np.abs(case.pred[target] - case.truth[target])[case.mask] for case in cases if case.truth]
        stds = [case.std[target][case.mask] for case in cases if target in case.std]
        for limits, values, share in ((windows.error, errors, 0.99), (windows.std, stds, 0.998)):
            top = np.quantile(np.concatenate(values), share) if values else 1
            limits[target] = float(f'{max(top, 1e-3 * (hi - lo)):.2g}')
    return windows


# ----------------------------------------------------------------------------------------------------------------------
# Figures: each function returns a list of (path, caption)

def draw_subjects(spec, run, fig, facts, faults):
    """The overview and a montage of each chosen subject."""
    ids = [id for id in run.predicted if id not in faults]
    chosen, rule = choose(spec.task, facts, run.test, ids, run.positive)

    def prepare(id):
        subject, case = load_case(spec, run.folder, id)
        case.sources, case.title = source_images(subject), chosen[id] or run.said_of(id)
        return case

    cases = in_turn(prepare, chosen, faults)
    if not cases:
        return []
    windows, names = make_windows(cases, spec), NAMES[spec.task]
    units = {target: montage.unit_of(target, spec.scaling[target]) for target in spec.target_names}
    planes = ('axial', 'coronal', 'sagittal') if spec.spatial_dims == 3 else ('axial',)
    path = fig / 'montage.png'
    known = any(case.truth for case in cases)
    title = (f'{run.name}: source{", true" * known} and synthetic images of the {run.record.get("split", "test")} '
             'subjects')
    montage.draw_overview(path, cases, planes[:2], windows, units, title, names)
    slices = ('The slice with the largest area of the true lesion (where it is not known, of the one found), else'
              if spec.task == 'ctp2dwi' else 'Slices through')
    figures = [(path, f'One row a subject, chosen by rule: {rule}. {slices} the middle of the brain; the same grey '
                      'values in every row.')]
    for case in cases:
        path = fig / f'montage_{re.sub(r"[^A-Za-z0-9._-]", "_", case.id)}.png'
        case.title = case.title.replace('\n', '; ')
        if case.found is not None:
            ml = np.count_nonzero(case.found) * abs(np.linalg.det(case.affine[:3, :3])) / 1000
            case.title += f'{"; " if case.title else ""}the rule finds {ml:.3g} ml on the synthetic images'
        montage.draw_case(path, case, planes, windows, units, names)
        error = ' Error: synthetic minus true, white is zero.' if case.truth else ''
        figures.append((path, f'{", ".join(filter(None, [case.id, case.title]))}.{error}'))
    return figures


def draw_figures(spec, run, fig, faults):
    """Every figure for which there is something."""
    task, figures, facts = spec.task, [], pd.DataFrame()
    if run.predicted and task == 'ctp2dwi':
        facts = pd.DataFrame(in_turn(lambda id: measure(spec, run.folder, id), run.predicted, faults))
    if run.predicted:
        figures += draw_subjects(spec, run, fig, facts, faults)
    if run.summary is not None:
        lines, path = run.summary.set_index('metric'), fig / 'metrics.png'
        known = lines.index[np.isfinite(lines['mean'])]
        panels = [panel for panel in charts.PANELS[task] if panel[0] in known]
        if panels:
            charts.draw_metrics(path, lines, run.models, panels, ceilings(run.test))
            bound = ('The autoencoder has seen the true image: it bounds what goes through the latent alone, and is no '
                     'rival.' if 'aae' in run.models else '')
            text = ['Mean and bootstrap 95 % interval.', STAR if len(run.models) > 1 else '', bound,
                    'Dice: of lesions above 2 ml.' if task == 'ctp2dwi' else '']
            figures.append((path, ' '.join(filter(None, text))))
    path = fig / 'scatter.png'
    if 'true_ml' in facts:
        columns = ['lesion_ml', 'lesion_head_ml', 'lesion_head_ml_low', 'lesion_head_ml_high']
        head = None if run.test is None or not set(columns) <= set(run.test) else run.test[columns]
        charts.draw_stroke_scatter(path, facts, head)
        more = 'Bars: 90 % intervals. ' * (head is not None) + RULE.format(*spec.lesion_rule)
        figures.append((path, f'One point a test subject; the grey line is identity. {more}'))
    if run.test is not None and {'suvr_true', 'suvr_pred'} <= set(run.test):
        known = run.test.dropna(subset=['suvr_true', 'suvr_pred'])
        if len(known):
            charts.draw_amyloid_scatter(path, known, run.positive, run.threshold)
            figures.append((path, 'One point a test subject: mean SUVR in the composite; the grey line is identity.'))
    series = coverage(run.test, spec.target_names, f'in the {LESION[task]}')
    head = run.lesion_head if run.lesion_head is None else run.lesion_head[['mean_p', 'lesion_share']].dropna()
    if series or head is not None:
        charts.draw_calibration(fig / 'calibration.png', series, None if head is None else head.to_numpy().T)
        figures.append((fig / 'calibration.png',
                        'Share of voxels whose true value lies in the interval around the prediction, against '
                        'the nominal share: mean over subjects, bars to the lowest and highest one. Below the line is '
                        'overconfident.' + ' Right: voxels of all subjects, by tenths of the probability that the '
                        'lesion head gives.' * (head is not None)))
    if run.losses or run.validations:
        charts.draw_curves(fig / 'curves.png', run.losses, run.validations, run.best, LESION[task])
        figures.append((fig / 'curves.png', 'Training. The first validation of a stage is the network before it.'))
    return figures


def ceilings(test):
    """What the lesion rule scores on the real images, of the same subjects as the figure beside it: metric -> mean."""
    if test is None or not {'lesion_dice_2ml', 'lesion_dice_ceiling'} <= set(test):
        return {}
    return {'lesion_dice_2ml': test.loc[test['lesion_dice_2ml'].notna(), 'lesion_dice_ceiling'].mean()}


def coverage(test, targets, region='in the lesion'):
    """target -> series of (nominal, mean, low, high) from test.csv: in the brain and in the lesion."""
    found = {}
    for name, kind in (('in the brain', 'coverage'), (region, 'lesion_coverage')):
        for column in test if test is not None else ():
            match = re.fullmatch(rf'(.+)_{kind}_(\d+)', column)
            values = test[column].dropna() if match and match[1] in targets else ()
            if len(values):
                point = int(match[2]) / 100, values.mean(), values.min(), values.max()
                found.setdefault(match[1], {}).setdefault(name, []).append(point)
    return {target: {name: sorted(points) for name, points in series.items()} for target, series in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The page

def facts_of(spec, run):
    """Rows (what, value): checkpoint, commit, sampler, label mode, units."""
    record = run.record
    rows = [('checkpoint', record.get('checkpoint', 'no prediction yet')),
            ('commit of the training', run.commit or 'not recorded')]
    if record:
        counts = [f'{record.get(name, "?")} {word}{"" if record.get(name) == 1 else "s"}'
                  for name, word in (('num_steps', 'step'), ('samples', 'sample'))]
        label = 'none: this task has no label' if not spec.num_classes else record.get('label', '?')
        label = 'true, read from data_info.csv' if label == 'true' else label
        more = [f'{name} {record.get(name, "?")}' for name in ('guidance', 'seed')]
        more += ['latent path left out'] * bool(record.get('skip_latent'))
        sampler = [str(record.get('sampler', '?')), *counts, *more]
        sampler = ['none: a U-Net on the image grid'] if sampler[0] == 'none' else sampler
        rows += [('sampler', ', '.join(sampler + ['mean with the mirrored source'] * bool(record.get('mirror')))),
                 ('label given to the network', label), ('split', record.get('split', '-')),
                 ('units', ', '.join(f'{name}: {unit}' for name, unit in record.get('units', {}).items()))]
    checked = run.predictions if run.predictions is not None else run.test
    if checked is not None and 'qc' in checked:
        checked = checked[checked['qc'].notna() & (checked['qc'] != 'not translated')]
        flagged = ', '.join(checked.loc[checked['qc'] != 'ok', 'ID']) or 'none'
        rows.append(('sources unlike the training set', flagged if len(checked) else 'not checked'))
    return rows


def write_report(spec, run, figures, faults):
    """result/<exp>/report.html; returns its path."""
    summary, more = '', ''
    if run.summary is not None:
        labels = {model: charts.NAMES.get(model, model) for model in run.models}
        units = dict.fromkeys(spec.target_names, 'as scaled') | run.record.get('units', {})
        given = run.summary['label_given'].iloc[0] if 'label_given' in run.summary else None
        summary = report.warning(f'A label was given to the network at inference (--label {given}): these figures '
                                 'are not those of a subject whose amyloid status is unknown.') if given else ''
        summary += report.summary_table(run.summary, run.models, labels, units) + report.note(
            f'Mean and bootstrap 95 % interval over the n test subjects for whom the figure is defined. {STAR} Taken '
            'in the brain mask, prediction and truth clipped to the range of the scaling.' + (
                ' lesion_dice: without a lesion, finding none counts 1; lesion_dice_2ml: lesions above 2 ml alone. '
                f'lesion_dice_ceiling: the lesion rule on the real images. {RULE.format(*spec.lesion_rule)}'
                if spec.task == 'ctp2dwi' else ''))
    constants = json.loads(json.dumps(config.DEFAULTS))  # tuples become lists, as in the file
    changed = [(name, value, constants.get(name, '-')) for name, value in run.settings.items()
               if value != constants.get(name)]
    if run.predictions is not None:
        more += report.details(f'test_predictions.csv, {len(run.predictions)} subjects',
                               report.table(run.predictions, 'predictions'))
    if run.test is not None:
        more += report.details(f'test.csv, {len(run.test)} subjects', report.table(run.test, 'test'))
    if run.log:
        more += report.details('log.txt, the last lines', report.lines('\n'.join(run.log.splitlines()[-40:])))
    images = ' and '.join(name.upper() for name in spec.target_names)
    source = 'CT perfusion' if spec.task == 'ctp2dwi' else 'T1 MRI'
    text = report.page(f'Experiment {run.name}', f'{spec.task}: {images} from {source}', [
        ('', report.missing([*run.missing(), *(f'{id}: {text}' for id, text in faults.items())])),
        ('Test subjects', summary),
        ('This run', report.pairs(facts_of(spec, run))),
        ('Amyloid status',
         report.status_table(run.status, run.positive) if run.status is not None else ''),
        ('Figures', ''.join(report.figure(path, caption) for path, caption in figures)),
        ('Settings of the training that differ from config.py',
         report.pairs(changed, ('setting', 'this run', 'constant in config.py')) if changed else ''),
        ('Details', more)])
    path = run.folder / 'report.html'
    utils.write_atomic(path, lambda file: file.write(text), 'w')
    return path


def main():
    cfg = config.load(__doc__)
    run = Experiment(cfg.exp, cfg.suvr_positive)
    if cfg.origin.get('data_root') != 'command line':
        cfg.data_root = run.data_root(cfg.data_root)
    spec = make_spec(cfg, run.folder, run.record.get('settings'))
    fig, faults = run.folder / 'fig', {}
    fig.mkdir(exist_ok=True)
    for kind in FIGURES:  # a figure that is not drawn any more must not pass for a new one
        for old in fig.glob(kind):
            old.unlink()
    try:
        figures = draw_figures(spec, run, fig, faults)
    except OSError as err:  # matplotlib does not say which file could not be written
        raise OSError(err.errno, err.strerror, err.filename or str(fig)) from None
    for path in [*(path for path, _ in figures), write_report(spec, run, figures, faults)]:
        print(path)
    for line in run.missing():
        print(f'not there yet: {line}')
    if faults:
        print('\n'.join(f'{id}: {text}' for id, text in faults.items()), file=sys.stderr)
        raise utils.RunError(f'{len(faults)} of {len(run.predicted)} subjects could not be shown (listed above); the '
                             'figures show the others')


if __name__ == '__main__':
    utils.cli(main)
