"""
Figures and a report of an experiment: result/<exp>/fig/*.png and result/<exp>/report.html, one self-contained page.

python plot.py                    the experiment in config.py
python plot.py --exp exp_2        another one
python plot.py --preset mri2pet_demo

It reads what training and inference wrote, and the true images through the data settings. It also works before a run is complete:
the page then says what is missing. Subjects are chosen by a rule that is stated on the page, never by how good they look.
"""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd

import charts
import config
import dataset
import metrics
import montage
import report
import status
import utils
from volume import read_volume

STAGES = ('aae', 'unet', 'post', 'regression')
SCRIPTS = dict(aae='train_aae.py', unet='train_unet.py', post='post_train.py', regression='train_unet.py --regression True')
COVERAGE = r'(.+)_coverage_(\d+)'
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
STROKE_PANELS = [
    ('dwi_psnr', 'DWI PSNR (dB)', 'higher'), ('adc_psnr', 'ADC PSNR (dB)', 'higher'), ('dwi_ssim', 'DWI SSIM', 'higher'),
    ('adc_ssim', 'ADC SSIM', 'higher'), ('lesion_mae', 'lesion MAE (scaled 0 to 1)', 'lower'),
    ('lesion_dice', 'lesion Dice', 'higher'), ('lesion_detected', 'lesions detected (share)', 'higher'),
    ('lesion_avd_ml', '|volume difference| (ml)', 'lower'), ('false_lesion_ml', 'false lesion (ml)', 'lower'),
    ('adc_lesion_bias', r'ADC bias in the lesion ($10^{-6}$ mm$^2$/s)', ''), ('lesion_contrast_error', 'lesion contrast error', 'lower'),
    ('lesion_rim_mae', 'MAE 6 mm around the lesion', 'lower')]
AMYLOID_PANELS = [
    ('suvr_psnr', 'PSNR (dB)', 'higher'), ('suvr_ssim', 'SSIM', 'higher'), ('suvr_ms_ssim', 'MS-SSIM', 'higher'),
    ('suvr_mae', 'MAE (SUVR)', 'lower'), ('suvr_error', 'composite SUVR error', ''), ('suvr_error_abs', '|composite SUVR error|', 'lower')]


# ----------------------------------------------------------------------------------------------------------------------
# What the run wrote

def read_table(path, needs, remedy):
    """A CSV of a run, or None if there is none; RunError naming the file if it is damaged. An incomplete last line is left out."""
    if not path.is_file():
        return None
    try:
        table = pd.read_csv(path, dtype={'ID': str}, keep_default_na=True)
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are ValueErrors
        raise utils.RunError(f'{path} is damaged ({str(error).strip().splitlines()[0]}); {remedy}') from None
    lacking = [name for name in needs if name not in table]
    if lacking:
        raise utils.RunError(f'{path} is damaged (it has no column {lacking[0]!r}); {remedy}')
    for name in table:
        if name not in ('ID', 'metric', 'qc', 'score'):
            numbers = pd.to_numeric(table[name], errors='coerce')
            wrong = table.index[numbers.isna() & table[name].notna()]
            if len(wrong):
                raise utils.RunError(f'{path} is damaged ({table[name][wrong[0]]!r} in line {wrong[0] + 2}, column {name!r}); {remedy}')
            table[name] = numbers
    return table.dropna(subset=needs) if needs else table


def read_json(path):
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except OSError:
        return {}
    except ValueError:
        raise utils.RunError(f'{path} is damaged; delete it and run the script that writes it again') from None


class Result:
    """The files of result/<exp>, as far as they are there."""

    def __init__(self, exp):
        self.folder = folder = Path('result') / exp
        if not folder.is_dir():
            near = sorted(path.name for path in Path('result').glob('*') if path.is_dir() and any(path.glob('*.csv')))
            raise utils.RunError(f'there is no experiment {folder}' + (f' (there are: {", ".join(near)})' if near else '') +
                                 '; choose another --exp, or train it with python train_aae.py')
        again = 'delete it and run python infer.py again'
        self.losses, self.validations = {}, {}
        for stage in STAGES:
            for kind, tables, needs in (('loss_curve', self.losses, ['step']), ('validation', self.validations, ['step'])):
                table = read_table(folder / f'{kind}_{stage}.csv', needs, f'delete it, or run python {SCRIPTS[stage]} --restart')
                if table is not None and len(table):
                    tables[stage] = table
        self.test = read_table(folder / 'test.csv', ['ID'], again)
        self.summary = read_table(folder / 'test_summary.csv', ['metric', 'mean', 'ci_low', 'ci_high'], again)
        self.status = read_table(folder / 'test_status.csv', [], again)
        self.settings = read_json(folder / 'config.json')
        self.predicted = sorted(path.parent.name for path in folder.glob('pred/*/prediction.json'))
        self.record = read_json(folder / 'pred' / self.predicted[0] / 'prediction.json') if self.predicted else {}
        self.log = _text(folder / 'log.txt')
        self.commit = _text(folder / 'git.txt').strip() or 'not recorded'
        done = re.findall(r' (\w+): stage \w+ done: best at step (\d+)', self.log)
        self.best = {stage: int(step) for stage, step in done}
        if not (self.losses or self.validations or self.predicted or self.test is not None or self.summary is not None):
            raise utils.RunError(f'{folder} holds no training curve, no table and no prediction; run python train_aae.py first')

    @property
    def models(self):
        """'' for this model, then the baselines of the summary, the ceiling and the mean image last."""
        found = [name[:-len('_ci_low')] for name in self.summary if name.endswith('_ci_low')]
        return sorted(['', *found], key=lambda name: ['', 'unet', 'regression', 'aae', 'mean'].index(name) if name in charts.NAMES else 2)

    def missing(self):
        """One line for each part that is not there."""
        lines = [f'training curves of stage {stage}: run python {SCRIPTS[stage]}' for stage in ('aae', 'unet', 'post')
                 if stage not in self.losses and not (stage == 'post' and self.settings.get('post_steps') == 0)]
        if not self.predicted:
            lines.append('predictions of test subjects (pred/): run python infer.py')
        if self.test is None or self.summary is None:
            lines.append('test.csv and test_summary.csv (figures against the truth): run python infer.py on a split with truth')
        return lines


def _text(path):
    return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


def make_spec(cfg, folder):
    """How the files of the data set become arrays: the travelling part from the autoencoder's checkpoint, paths from the settings."""
    own = folder / f'{utils.BEST["aae"]}.pth.tar'
    path = own if own.exists() or not cfg.init_from else Path('result') / cfg.init_from / own.name
    prep = utils.load_checkpoint(path, 'aae')['prep'] if path.exists() else {}
    if prep.get('task', cfg.task) != cfg.task:
        recorded = read_json(folder / 'config.json').get('preset', 'of that task')
        raise utils.RunError(f'{folder} was trained for the task {prep["task"]}, the settings are for {cfg.task}; add --preset {recorded}')
    return dataset.Spec.from_settings(cfg, **prep)


# ----------------------------------------------------------------------------------------------------------------------
# Test subjects: truth beside prediction

def load_case(spec, folder, id):
    """(Subject, montage.Case without title and sources); DataError if a file cannot be read or does not fit."""
    known = spec.has_truth(id)
    subject = dataset.load_subject(spec, id, with_truth=known)
    images = {}
    for end in ('', '_std'):
        images[end] = {}
        for target in spec.target_names:
            path = folder / 'pred' / id / f'{target}{end}.nii.gz'
            if path.exists() or not end:
                images[end][target] = _prediction(path, subject)
    ranges = {target: dataset.scaling_range(spec, target) for target in spec.target_names}
    truth = {target: np.clip(image, *ranges[target]) for target, image in (subject.truth() if known else {}).items()}
    found = None
    if spec.task == 'ctp2dwi' and {'dwi', 'adc'} <= set(images['']):
        found = metrics.lesion_rule(images['']['dwi'], images['']['adc'], subject.native_mask, subject.voxel_ml)
    case = montage.Case(id, '', subject.affine, subject.native_mask, [], images[''], truth, images['_std'], subject.native_lesion, found)
    return subject, case


def _prediction(path, subject):
    if not path.exists():
        raise dataset.DataError(f'{path} is missing; run python infer.py again.')
    array = read_volume(path).array
    if array.shape != tuple(subject.shape):
        raise dataset.DataError(f'{path} has shape {array.shape}, the source {tuple(subject.shape)}; run python infer.py again.')
    return array


def measure(spec, folder, id):
    """A row for the scatter and calibration diagrams, from one subject's images."""
    subject, case = load_case(spec, folder, id)
    row, mask = dict(ID=id), case.mask
    if case.lesion is not None and case.truth and case.found is not None:
        rule = metrics.lesion_rule(case.truth['dwi'], case.truth['adc'], mask, subject.voxel_ml)
        row.update({name: np.count_nonzero(a) * subject.voxel_ml for name, a in
                    (('true_ml', case.lesion), ('pred_ml', case.found), ('rule_ml', rule))})
        means = [float(image['adc'][case.lesion].mean()) if case.lesion.any() else np.nan for image in (case.truth, case.pred)]
        row.update(true_adc=means[0], pred_adc=means[1])
    for target in case.std if case.truth else ():
        error, std = (np.abs(case.pred[target] - case.truth[target])[mask], case.std[target][mask])
        row.update({f'{target}_raw_{level}': np.mean(error <= NormalDist().inv_cdf((1 + level) / 2) * std) for level in LEVELS})
    return row


def in_turn(function, ids, faults):
    """function(id) for each ID, several at a time; a subject that cannot be read becomes a line in `faults` and is left out."""
    def attempt(id):
        try:
            return function(id)
        except Exception as error:
            if not getattr(error, 'one_sentence', False):
                raise
            faults[id] = str(error).removeprefix(f'{id}: ')
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for row in pool.map(attempt, ids) if row is not None]


def choose(task, facts, test, ids):
    """The subjects to show, as a dict ID -> title, and the rule in words."""
    if task == 'ctp2dwi' and 'true_ml' in facts:
        with_lesion = facts[facts['true_ml'] > 0].sort_values('true_ml', ascending=False, kind='stable')
        without = facts[facts['true_ml'] == 0]
        places = dict(zip((0, len(with_lesion) // 2, len(with_lesion) - 1), ('largest', 'median', 'smallest'), strict=True))
        chosen = {row['ID']: f'{places[i]} lesion, {row["true_ml"]:.3g} ml' for i, row in enumerate(with_lesion.to_dict('records')) if i in places}
        chosen.update({id: 'no lesion' for id in without['ID'][:1]})
        return chosen, 'the test subjects with the largest, the median and the smallest true lesion, and the first one without a lesion'
    if task == 'mri2pet' and test is not None and {'suvr_true', 'suvr_error'} <= set(test):
        known, chosen = test[test['ID'].isin(ids)].dropna(subset=['suvr_true', 'suvr_error']), {}
        for name, group in (('negative', known[known['suvr_true'] <= status.TRUE_THRESHOLD]), ('positive', known[known['suvr_true'] > status.TRUE_THRESHOLD])):
            ordered = group.assign(size=group['suvr_error'].abs()).sort_values('size', kind='stable')
            for row, word in ((ordered[:1], 'smallest'), (ordered[1:][-1:], 'largest')):
                chosen.update({r['ID']: f'{name}, {word} error\nSUVR {r["suvr_true"]:.2f}, synthetic {r["suvr_pred"]:.2f}' for r in row.to_dict('records')})
        return chosen, ('of the truly amyloid-negative and of the positive test subjects, the one with the smallest and the one with the largest '
                        'error of the composite SUVR')
    return {id: '' for id in ids[:4]}, 'the first four subjects that were translated'


def source_images(subject):
    """Pictures of the source: an MRI as it is; of a CT perfusion series the mean over time and the time of the bolus."""
    rule = subject.spec.scaling['source']
    lo, hi = dataset.scaling_range(subject.spec, 'source')
    unit = {'range': 'HU' if subject.spec.task == 'ctp2dwi' else '', 'median': 'multiples of the median'}.get(rule[0], 'scaled, 0 to 1')
    array = (subject.to_native_raw(subject.source) + 1) / 2 * (hi - lo) + lo
    if array.ndim == 3:
        return [montage.Image('source MRI' if subject.spec.task == 'mri2pet' else 'source', array, unit)]
    rise = np.maximum(array - array[..., :2].mean(axis=3, keepdims=True), 0)
    when = (rise * np.arange(1, array.shape[3] + 1)).sum(axis=3) / np.maximum(rise.sum(axis=3), 1e-6)
    return [montage.Image('source CTP: mean', array.mean(axis=3), unit),
            montage.Image('source CTP: bolus time', when, 'mean time of enhancement (frame)', 'cividis')]


def make_windows(cases, ranges):
    """One display range a target for all cases: the truth's values from 0 (or the range's start) to their 99.5 % quantile."""
    windows = montage.Windows({}, {}, {})
    for target, (lo, hi) in ranges.items():
        reference = np.concatenate([(case.truth or case.pred)[target][case.mask] for case in cases])
        high = min(hi, float(f'{np.quantile(reference, 0.995):.2g}'))
        windows.value[target] = lo, high if high > lo else hi
        errors = [np.abs(case.pred[target] - case.truth[target])[case.mask] for case in cases if case.truth]
        windows.error[target] = float(f'{max(np.quantile(np.concatenate(errors), 0.99), 1e-3 * (hi - lo)):.2g}') if errors else 1.0
        spreads = [case.std[target][case.mask] for case in cases if target in case.std]
        windows.std[target] = max(float(np.quantile(np.concatenate(spreads), 0.99)), 1e-6) if spreads else 1.0
    return windows


def draw_subjects(spec, result, fig, facts, faults):
    """Montages of the chosen subjects -> list of (path, caption)."""
    chosen, rule = choose(spec.task, facts, result.test, [id for id in result.predicted if id not in faults])

    def prepare(id):
        subject, case = load_case(spec, result.folder, id)
        case.sources, case.title = source_images(subject), chosen[id]
        return case

    cases = in_turn(prepare, chosen, faults)
    if not cases:
        return []
    windows = make_windows(cases, {target: dataset.scaling_range(spec, target) for target in spec.target_names})
    units = {target: montage.unit_of(target, spec.scaling[target][0] == 'quantile') for target in spec.target_names}
    planes = ('axial', 'coronal', 'sagittal') if spec.spatial_dims == 3 else ('axial',)
    names = ('cortical composite', '') if spec.task == 'mri2pet' else ('true lesion', 'lesion rule on the synthetic images')
    title = f'{result.folder.name}: source, true and synthetic images of test subjects'
    montage.draw_overview(fig / 'montage.png', cases, planes[:2], windows, units, title, names)
    figures = [(fig / 'montage.png', f'One row a subject: {rule}. The slice is that with the largest area of the {names[0]} (else the middle of the '
                                     'brain); one window for true and synthetic.')]
    for case in cases:
        path = fig / f'montage_{re.sub(r"[^A-Za-z0-9._-]", "_", case.id)}.png'
        found = f'; the rule finds {np.count_nonzero(case.found) * abs(np.linalg.det(case.affine[:3, :3])) / 1000:.3g} ml' if case.found is not None else ''
        case.title = case.title.replace('\n', '; ') + found
        montage.draw_case(path, case, planes, windows, units, names)
        figures.append((path, f'{case.id}, {case.title}. Error: synthetic minus true, both clipped to the range of the scaling, zero is white.'))
    return figures


def coverage(test, facts, targets):
    """target -> series of (nominal, mean, low, high): fitted intervals from test.csv, raw spread of the samples from the std maps."""
    found = {}
    for name, table, pattern in (('fitted intervals', test, COVERAGE), ('Gaussian, std of the samples', facts, r'(.+)_raw_([\d.]+)')):
        for column in table if table is not None else ():
            match = re.fullmatch(pattern, column)
            values = table[column].dropna() if match and match[1] in targets else ()
            if len(values):
                level = float(match[2]) / (100 if pattern == COVERAGE else 1)
                found.setdefault(match[1], {}).setdefault(name, []).append((level, values.mean(), values.min(), values.max()))
    return {target: {name: sorted(points) for name, points in series.items()} for target, series in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# All figures, then the page

def draw(spec, result, fig, faults):
    """Every figure for which there is something -> list of (path, caption)."""
    figures, stroke = [], spec.task == 'ctp2dwi'
    needs_images = stroke or any(result.folder.glob('pred/*/*_std.nii.gz'))
    facts = pd.DataFrame(in_turn(lambda id: measure(spec, result.folder, id), result.predicted, faults) if needs_images else [], columns=None)
    figures += draw_subjects(spec, result, fig, facts, faults) if result.predicted else []
    if result.summary is not None:
        lines = result.summary.set_index('metric')
        panels = [panel for panel in (STROKE_PANELS if stroke else AMYLOID_PANELS) if panel[0] in lines.index and np.isfinite(lines.loc[panel[0], 'mean'])]
        if panels:
            charts.draw_metrics(fig / 'metrics.png', lines, result.models, panels, 'Test subjects: mean and bootstrap 95 % interval')
            figures.append((fig / 'metrics.png', 'Mean over test subjects and bootstrap 95 % interval; a star: differs from this model (paired Wilcoxon '
                                                 'test, p < 0.05 after Holm over the table). The AAE of the truth sees the true image: a ceiling, not a rival.'))
    if stroke and 'true_ml' in facts:
        charts.draw_stroke_scatter(fig / 'scatter.png', facts)
        figures.append((fig / 'scatter.png', f'One point a test subject. Lesion rule: ADC < {metrics.ADC_LIMIT:g}, DWI > {metrics.DWI_FACTOR:g} times its in-mask '
                                             f'median, components of {metrics.MIN_COMPONENT_ML:g} ml or more. The grey line is identity.'))
    if not stroke and result.test is not None and {'suvr_true', 'suvr_pred'} <= set(result.test):
        known = result.test.dropna(subset=['suvr_true', 'suvr_pred'])
        if len(known):
            charts.draw_amyloid_scatter(fig / 'scatter.png', known, status.TRUE_THRESHOLD, fitted_threshold(result.status))
            figures.append((fig / 'scatter.png', 'One point a test subject: SUVR of the cortical composite. The grey line is identity.'))
    series = coverage(result.test, facts, spec.target_names)
    if series:
        charts.draw_calibration(fig / 'calibration.png', series)
        figures.append((fig / 'calibration.png', 'Share of brain voxels whose true value lies in the interval around the prediction, against the nominal share: '
                                                 'mean over subjects; bars: lowest and highest subject. On the line is calibrated, below it overconfident.'))
    if result.losses or result.validations:
        charts.draw_curves(fig / 'curves.png', result.losses, result.validations, result.best)
        figures.append((fig / 'curves.png', 'Training. Validation row 0 is the network before the stage.'))
    return figures


def fitted_threshold(table):
    """The synthetic SUVR's threshold in test_status.csv, or None."""
    if table is None or not {'score', 'threshold'} <= set(table):
        return None
    values = table.loc[table['score'] == 'synthetic', 'threshold'].dropna()
    return float(values.iloc[0]) if len(values) else None


def settings_table(recorded):
    """Settings of the run that differ from the constants in config.py."""
    constants = json.loads(json.dumps(config.DEFAULTS))
    rows = [(name, value, constants.get(name, '-')) for name, value in recorded.items() if value != constants.get(name)]
    return report.pairs(rows, ('setting', 'this run', 'constant in config.py')) if rows else '<p>None: all settings are the constants.</p>' if recorded else ''


def write_report(spec, result, figures, faults):
    """result/<exp>/report.html."""
    record, parts = result.record, []
    summary = ''
    if result.summary is not None:
        labels = {model: charts.name_of(model) for model in result.models}
        summary = report.summary_table(result.summary, result.models, labels) + (
            '<p><small>Mean over test subjects, then the bootstrap 95 % interval; n: subjects for whom the figure is defined. * differs from this model: '
            'paired Wilcoxon test, p &lt; 0.05 after Holm over the table. In the brain mask, prediction and truth clipped to the range of the scaling. '
            'lesion_dice_ceiling is what the lesion rule scores on the real images.</small></p>')
    facts = [('checkpoint', record.get('checkpoint', 'no prediction yet')), ('commit of the training', result.commit)]
    if record:
        steps, count = record.get('num_steps', '?'), record.get('samples', '?')
        facts += [('sampler', f'{record.get("sampler")}, {steps} step{"s" if steps != 1 else ""}, {count} sample{"s" if count != 1 else ""}, guidance '
                              f'{record.get("guidance")}, seed {record.get("seed")}'),
                  ('label given to the network', f'{record.get("label")}' + ('' if spec.num_classes else ' (this task has no label)')),
                  ('split', record.get('split', '-')), ('units', ', '.join(f'{name}: {unit}' for name, unit in record.get('units', {}).items()))]
    lost = [f'{id}: {text}' for id, text in faults.items()]
    parts += [('', report.missing(result.missing() + lost)), ('Test subjects', summary), ('This run', report.pairs(facts)),
              ('Amyloid status', report.table(result.status, 'status') if result.status is not None else ''),
              ('Figures', ''.join(report.figure(path, caption) for path, caption in figures)),
              ('Settings that differ from config.py', settings_table(result.settings))]
    more = report.details(f'test.csv: {len(result.test)} subjects', report.table(result.test, 'test')) if result.test is not None else ''
    last = '\n'.join(result.log.splitlines()[-30:])
    more += report.details('log.txt: the last lines', f'<pre>{report.escape(last)}</pre>') if last else ''
    parts.append(('Details', more))
    lead = f'{spec.task}: {"CT perfusion" if spec.task == "ctp2dwi" else "T1 MRI"} to {" and ".join(name.upper() for name in spec.target_names)}'
    text = report.page(f'Experiment {result.folder.name}', lead, parts)
    path = result.folder / 'report.html'
    utils.write_atomic(path, lambda file: file.write(text), 'w')
    return path


def main():
    cfg = config.load(__doc__)
    result = Result(cfg.exp)
    spec, fig, faults = make_spec(cfg, result.folder), result.folder / 'fig', {}
    fig.mkdir(exist_ok=True)
    for old in fig.glob('*.png'):  # a figure that is not drawn any more must not pass for a new one
        old.unlink()
    figures = draw(spec, result, fig, faults)
    for path in [*(path for path, _ in figures), write_report(spec, result, figures, faults)]:
        print(path)
    for line in result.missing():
        print(f'missing: {line}')
    if faults:
        print('\n'.join(f'{id}: {text}' for id, text in faults.items()), file=sys.stderr)
        raise utils.RunError(f'{len(faults)} of {len(result.predicted)} subjects could not be shown (listed above); the figures show the others')


if __name__ == '__main__':
    utils.cli(main)
