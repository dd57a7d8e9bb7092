"""
The tables and the figure of docs/RESULTS.md, from the figures of each subject that study.py keeps under docs/study.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

import metrics
import status
from trials import BOTH, BY_NAME, FEW, MORE, VALIDATION
from utils import write_atomic

COVERED = 'Share of voxels in their 90 % interval, stroke'  # the title of a table with columns of its own
COLUMNS = {
    'stroke': dict(dwi_psnr='DWI PSNR, dB', adc_psnr='ADC PSNR, dB', dwi_ms_ssim='DWI MS-SSIM', lesion_mae='lesion MAE',
                   lesion_contrast_error='contrast error', lesion_dice_2ml='Dice above 2 ml',
                   lesion_avd_ml='volume error, ml', lesion_head_avd_ml="the head's", lesion_detected='detected',
                   false_lesion_ml='false lesion, ml', lesion_rim_mae='rim MAE'),
    'amyloid': dict(suvr_psnr='PSNR, dB', suvr_ms_ssim='MS-SSIM', suvr_error_abs='SUVR error', suvr_bias='SUVR bias'),
    COVERED: dict(
        dwi_psnr='DWI PSNR, dB', dwi_coverage_90='DWI', dwi_lesion_coverage_90='DWI, lesion',
        dwi_rim_coverage_90='DWI, 6 mm around', adc_coverage_90='ADC', adc_lesion_coverage_90='ADC, lesion',
        adc_rim_coverage_90='ADC, 6 mm around', lesion_head_ml_covered='lesion volume',
        dwi_width_90='half width, DWI', dwi_lesion_width_90='in the lesion',
        adc_width_90='half width, ADC', adc_lesion_width_90='in the lesion')}
COLUMNS['amyloid/anew'] = COLUMNS['amyloid'] | dict(
    suvr_coverage_90='in their 90 % interval: voxels', suvr_lesion_coverage_90='voxels of the composite',
    suvr_pred_covered='composite SUVRs', suvr_width_90='half width')
TEST = ('test',)
TABLES = [  # title, the first line, the others, sets
    ('Post-training', 'stroke/sure', ['stroke/stage2', 'stroke/control', 'stroke/sure_start', 'stroke/start_odds_1'],
     BOTH),
    ('Recipes, stroke', 'stroke/sure',
     ['stroke/ours', 'stroke/regression_boxed', 'stroke/plain_boxed', 'stroke/head_boxed', 'stroke/steps_2600',
      'stroke/untrimmed', 'stroke/regression', 'stroke/regression_plain', 'stroke/regression_head', 'stroke/no_head',
      'stroke/head_odds_1', 'stroke/earlier'], BOTH),
    ('Recipes, stroke, in equal time', 'stroke/sure',
     ['stroke/ours', 'stroke/regression_boxed', 'stroke/plain_boxed', 'stroke/head_boxed'], ('fresh',)),
    ('10000 steps, stroke', 'stroke/ours_long_sure',
     ['stroke/ours_long', 'stroke/ours_long_odds_2', 'stroke/ours_long_odds_1', 'stroke/weighted_long',
      'stroke/plain_long', 'stroke/head_long_sure', 'stroke/head_long', 'stroke/head_long_odds_2',
      'stroke/head_long_odds_1', 'stroke/sure'], BOTH),
    ('Training subjects, 10000 steps', 'stroke/head_long_sure',
     ['stroke/head_long_odds_1', 'stroke/head_long_many', 'stroke/head_long_many_odds_1', 'stroke/weighted_long_many',
      'stroke/plain_long_many'], BOTH),
    ('Thirty subjects of another kind', 'stroke/few_pretrained',
     ['stroke/few_pretrained_core_5', 'stroke/few', 'stroke/phantoms', 'stroke/few_pretrained_lr_high'], ('shifted',)),
    ('How much to believe in a lesion', 'stroke/sure',
     ['stroke/sure_odds_1', 'stroke/sure_odds_2', 'stroke/sure_odds_12', 'stroke/anew', 'stroke/anew_plain'], BOTH),
    ('How much to believe in a lesion, lesion_core 0.7', 'stroke/ours',
     ['stroke/odds_1', 'stroke/odds_6', 'stroke/odds_12', 'stroke/everywhere', 'stroke/head_odds_1',
      'stroke/head_odds_1_weight_05'], BOTH),
    ('Noise on the source in training', 'stroke/start_noise_sure', ['stroke/sure_start'], BOTH),
    ('Noise on the source in training, lesion_core 0.7', 'stroke/start_noise', ['stroke/anew_start'], BOTH),
    (COVERED, 'stroke/sure', ['stroke/anew', 'stroke/anew_plain', 'stroke/anew_one_width'], BOTH),
    ('Loss, weights, decoder, without detail branch', 'stroke/no_detail',
     ['stroke/no_detail_weight_0', 'stroke/no_detail_weight_2', 'stroke/lapt_loss', 'stroke/frozen_decoder'], TEST),
    ('Recipes, stroke, one seed', 'stroke/ours',
     ['stroke/no_detail', 'stroke/regression_simple', 'stroke/latent_regression', 'stroke/lapt', 'stroke/monai'], TEST),
    ('Before the lesion head', 'stroke/earlier', ['stroke/earlier_start', 'stroke/weighted_lr_high',
                                                  'stroke/plain_lr_high'], BOTH),
    ('Before the lesion head: lesion weight', 'stroke/earlier', ['stroke/weight_05', 'stroke/weight_1'], TEST),
    ('Before the lesion head: loss', 'stroke/earlier', ['stroke/l2_l1'], MORE),
    ('Before the lesion head: sampling', 'stroke/earlier',
     ['stroke/ddim2', 'stroke/ddim5', 'stroke/ddim10', 'stroke/ddim50', 'stroke/samples4', 'stroke/samples16',
      'stroke/not_mirrored', 'stroke/stage2_not_mirrored'], TEST),
    ('Before the lesion head: 1000 steps', 'stroke/earlier', ['stroke/ddim50', 'stroke/ddpm'], tuple(FEW)),
    ('Before the lesion head: fast settings', 'stroke/earlier', ['stroke/fp32'], TEST),
    ('Before the lesion head: subjects and steps', 'stroke/earlier',
     ['stroke/subjects_10', 'stroke/subjects_30', 'stroke/steps_half', 'stroke/steps_double'], TEST),
    ("Before the lesion head: the detail branch's rate", 'stroke/earlier', ['stroke/detail_lr_1'], VALIDATION),
    ('Before the lesion head: learning rates, start', 'stroke/earlier',
     ['stroke/from_weighted', 'stroke/post_lr_half', 'stroke/post_lr_double', 'stroke/weight_05',
      'stroke/post_lr_half_weight_05', 'stroke/detail_lr_quarter_weight_05', 'stroke/plain_lr_high',
      'stroke/plain_lr_2e3'], VALIDATION),
    ('Recipes, amyloid', 'amyloid/ours',
     ['amyloid/start', 'amyloid/steps_950', 'amyloid/regression', 'amyloid/lr_high'], MORE),
    ('Amyloid in equal time, and the 90 % intervals', 'amyloid/anew', ['amyloid/anew_plain'], BOTH),
    ('Recipes, amyloid, regressions at 1e-3', 'amyloid/lr_high',
     ['amyloid/lr_high_start', 'amyloid/regression_lr_high', 'amyloid/earlier'], MORE),
    ('Label conditioning', 'amyloid/ours', ['amyloid/il_cldm', 'amyloid/label_given'], TEST),
    ('Before the label head: label conditioning', 'amyloid/earlier',
     ['amyloid/no_label', 'amyloid/never_dropped', 'amyloid/earlier_label_given'], TEST),
    ('Before the label head: guidance', 'amyloid/earlier_label_given', ['amyloid/guidance2', 'amyloid/guidance4'],
     TEST),
    ('Before the label head: regressions', 'amyloid/earlier', ['amyloid/earlier_start', 'amyloid/regression_lr_high'],
     BOTH),
    ('Before the label head: one seed', 'amyloid/earlier', ['amyloid/stage2', 'amyloid/control', 'amyloid/ddim50'],
     TEST),
]
# The figure: lesion MAE against PSNR as the lesion's weight, or its odds in inference, grow.
CURVES = {'ours: lesion_odds 1, 2, 8, 12': ('stroke/sure_odds_1', 'stroke/sure_odds_2', 'stroke/sure',
                                            'stroke/sure_odds_12'),
          'before the odds: its start, w_lesion 0.3, 0.5': ('stroke/start_odds_1', 'stroke/head_odds_1',
                                                           'stroke/head_odds_1_weight_05'),
          'before the lesion head: its start, w_lesion 0.3, 0.5, 1': ('stroke/earlier_start', 'stroke/earlier',
                                                                      'stroke/weight_05', 'stroke/weight_1'),
          'without detail branch: control, w_lesion 0, 0.3, 2': (
              'stroke/control', 'stroke/no_detail_weight_0', 'stroke/no_detail', 'stroke/no_detail_weight_2'),
          "without detail branch, LAPT's loss": ('stroke/lapt_loss',),
          'regression U-Net: w_lesion 0, 0.3': ('stroke/plain_boxed', 'stroke/regression_boxed'),
          'regression U-Net with our lesion head, lesion_core 0.7': ('stroke/head_boxed',),
          'ours, 9000 steps: lesion_odds 1, 2, 8': ('stroke/ours_long_odds_1', 'stroke/ours_long_odds_2',
                                                    'stroke/ours_long_sure'),
          'regression U-Net, 10000 steps: w_lesion 0, 0.3': ('stroke/plain_long', 'stroke/weighted_long')}


def columns_of(name, title=''):
    """column of test.csv -> its heading, of the table of this title, or those whose first line is this trial."""
    return COLUMNS.get(title) or COLUMNS.get(name) or COLUMNS[BY_NAME[name].task]


def files(trial, group):
    """A trial's figures on a set, seed -> file; of the first subjects (FEW), if it has none, those of the whole set."""
    found = {seed: trial.file(seed, group) for seed in trial.seeds if trial.file(seed, group).exists()}
    return found or (files(trial, FEW[group][0]) if group in FEW else {})


def subjects(trial, group, seeds=None):
    """A trial's figures on a set, (these) seeds averaged for each subject; None if there are none."""
    tables = [pd.read_csv(file, dtype={'ID': str}) for seed, file in files(trial, group).items()
              if seeds is None or seed in seeds]
    if not tables:
        return None
    for table in tables:
        if 'suvr_error' in table:
            table['suvr_bias'] = table['suvr_error']
            table['suvr_error_abs'] = table['suvr_error'].abs()
    return pd.concat(tables).groupby('ID', sort=True).mean().reset_index()


def auc_cell(name, group, seeds, ids):
    """Mean of the seeds' AUCs of the synthetic composite SUVR for the true PET's status, with its interval."""
    tables = [subjects(BY_NAME[name], group, [seed]).set_index('ID').loc[ids] for seed in sorted(seeds)]
    positive = (tables[0]['suvr_true'] > status.TRUE_THRESHOLD).astype(int).to_numpy()
    found, low, high = status.mean_auc([table['suvr_pred'].to_numpy() for table in tables], positive)
    return f'{found:.2f} ({low:.2f} .. {high:.2f})'


def differs_in_each_seed(reference, name, group, column):
    """Whether a trial lies on the same side of the reference in each of two seeds or more.

    Two trainings of one recipe differ, and a test over subjects takes that for a difference between recipes. Another
    way to use the same networks needs one seed only.
    """
    trial, base = BY_NAME[name], BY_NAME[reference]
    seeds = sorted(set(files(trial, group)) & set(files(base, group)))
    sides = {np.sign(subjects(trial, group, [s])[column].mean() - subjects(base, group, [s])[column].mean())
             for s in seeds}
    same_networks = not trial.stages and '--stage' not in trial.infer
    return len(sides) == 1 and (len(seeds) > 1 or same_networks)


def compared(reference, others, group, title=''):
    """(name -> table of the same subjects, name -> seeds, Holm's p as (metric, name) -> p) of one table of the report.

    Each line is tested against the first one's same seeds: one seed against the mean of three would be unfair. The
    first line shows the seeds of all others together.
    """
    seeds = {name: set(files(BY_NAME[name], group)) for name in (reference, *others)}
    shared = {name: seeds[name] & seeds[reference] for name in others if seeds[name] & seeds[reference]}
    few = group in FEW and not any(BY_NAME[name].file(seed, group).exists() for name in shared for seed in shared[name])
    if not shared or few:
        return {}, {}, {}
    seeds[reference] = set().union(*shared.values())
    lines = {name: subjects(BY_NAME[name], group, seeds[name]) for name in (reference, *shared)}
    same = set.intersection(*(set(table['ID']) for table in lines.values()))

    def of_same(table):
        return table[table['ID'].isin(same)].reset_index(drop=True).reindex(columns=['ID', *columns])

    columns, moved = list(columns_of(reference, title)), {}
    lines = {name: of_same(table) for name, table in lines.items()}
    base = lines[reference]
    for name, common in shared.items():  # the first line + (this one - the first line's same seeds)
        theirs, own = (of_same(subjects(BY_NAME[n], group, common)) for n in (name, reference))
        moved[name] = base[['ID']].assign(**{c: base[c] + (theirs[c] - own[c]) for c in columns})
    tests = metrics.summarise(base[['ID', *columns]], moved, 0).set_index('metric')
    return lines, seeds, {(c, name): tests[f'{name}_p_holm'][c] for c in columns for name in shared}


def table_lines(title, reference, others, group):
    """One table in Markdown: mean and 95 % interval over subjects; * where Holm's p against the first line < 0.05."""
    lines, seeds, p_holm = compared(reference, others, group, title)
    if not lines:
        return []
    task = BY_NAME[reference].task
    columns, extra = columns_of(reference, title), ['AUC'] if task == 'amyloid' else []
    text = [f'**{title}**, {len(lines[reference])} subjects of the set "{group}"', '',
            '| | seeds | CPU s | ' + ' | '.join([*columns.values(), *extra]) + ' |',
            '| --- |' + ' --- |' * (2 + len(columns) + len(extra))]
    for name, table in lines.items():
        cells = []
        for column in columns:
            values = table[column].dropna().to_numpy()
            if not len(values):
                cells.append('')
                continue
            low, high = metrics.bootstrap_ci(values, 0)
            below = p_holm.get((column, name), 1) < 0.05
            star = '*' if below and differs_in_each_seed(reference, name, group, column) else ''
            cells.append(f'{short(values.mean())}{star} ({short(low)} .. {short(high)})')
        cells += [auc_cell(name, group, seeds[name], table['ID'])] if extra else []
        about = BY_NAME[name].about
        about = f'**{about}**' if name == reference else about
        text.append(f'| {about} | {len(seeds[name])} | {cpu_seconds(BY_NAME[name])} | ' + ' | '.join(cells) + ' |')
    return [*text, '']


def short(value):
    return f'{value:.1f}' if abs(value) >= 10 else f'{value:.2f}' if abs(value) >= 1 else f'{value:.3f}'


def cpu_seconds(trial):
    """CPU seconds of training, all stages, median of the seeds; "+": on top of those of the stages it begins from."""
    known = [json.loads(trial.facts(s).read_text()) for s in trial.seeds if trial.stages and trial.facts(s).exists()]
    seconds = [facts['training_cpu_seconds'] for facts in known if facts['training_cpu_seconds']]
    alone = all('--regression True' in command for command in trial.stages)  # the rival needs no other stage
    return f'{np.median(seconds):.0f}' + '+' * bool(trial.start and not alone) if seconds else ''


def draw_tradeoff(path):
    """Lesion MAE against PSNR (mean of DWI and ADC) of the trials of CURVES on the test set, mean of the seeds done."""
    from charts import draw_tradeoff as draw
    curves = {}
    for label, names in CURVES.items():
        points = []
        for table in filter(lambda t: t is not None, (subjects(BY_NAME[name], 'test') for name in names)):
            both = ((table['dwi_psnr'] + table['adc_psnr']) / 2).to_numpy(), table['lesion_mae'].dropna().to_numpy()
            points.append([(x.mean(), *metrics.bootstrap_ci(x, 0)) for x in both])
        if points:
            curves[label] = points
    if curves:
        draw(path, curves)


def write_results():
    """docs/RESULTS.md: the tables between the markers are written anew, what stands outside them stays."""
    lines = []
    for title, reference, others, groups in TABLES:
        for group in groups:
            lines += table_lines(title, reference, others, group)
    path = Path('docs/RESULTS.md')
    begin, end = '<!-- tables: written by study.py -->', '<!-- end of the tables -->'
    old = path.read_text(encoding='utf-8') if path.exists() else f'# Results\n\n{begin}\n{end}\n'
    head, rest = old.split(begin)
    tail = rest.split(end)[1]
    note = ('Mean over subjects, seeds averaged for each subject first, and 95 % bootstrap interval (of AUC: the mean '
            'of the seeds\'). A star: differs from the same seeds of the first line (paired Wilcoxon, Holm over it, '
            'p < 0.05), in the same direction in each of two seeds or more; one seed of another training has no star, '
            'since two trainings of one recipe differ, here by up to 0.2 dB, 0.008 in lesion MAE and 0.05 in Dice, '
            'which a test over subjects cannot know; shares and widths of intervals are not tested. CPU s: process '
            'seconds of training, median of the seeds; "+" comes on top of the stages it starts from.')
    text = '\n'.join([f'{head}{begin}', '', note, '', *lines, f'{end}{tail}'])
    write_atomic(path, lambda f: f.write(text), 'w')
    draw_tradeoff(path.with_name('tradeoff.png'))
    print(f'{path} written')
