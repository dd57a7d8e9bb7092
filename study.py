"""
Does it work? The two papers' claims on phantoms with known truth, each with its control, and the rivals.

python study.py                   trains and evaluates what is not done yet, then writes docs/RESULTS.md
python study.py --only stroke/    runs whose name contains this; --seeds 1: only their first seed
python study.py --list            what there is, and what is done
python study.py --tables          only the tables, from the figures under docs/study

A run is done when the figures of each test subject lie under docs/study; they are small and stay with the code. Two
processes at once are no harm: each takes what nobody has begun. The test sets are phantoms of other seeds, the second
of another kind (`phantom.py --kind shifted`); nothing was ever chosen by either.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import metrics
import status
from stage import git_state, lock
from utils import RunError, cli, write_atomic

FIGURES = Path('docs/study')
SETS = {'test': ('--seed', '2'), 'shifted': ('--seed', '3', '--kind', 'shifted')}
SUBJECTS = {'stroke': (200, 60), 'amyloid': (192, 100)}  # phantoms for training and validation, and of each test set
TASKS = {'stroke': 'ctp2dwi', 'amyloid': 'mri2pet'}


# ----------------------------------------------------------------------------------------------------------------------
# The runs. Steps are set so that the recipes of one table take about the same CPU seconds; the tables state them.

@dataclass
class Trial:
    """One training (or none: only another way to sample), and how its networks are evaluated."""
    name: str                                       # task/name
    about: str
    stages: tuple = ()                              # commands: script and words
    start: str = ''                                 # the trial whose other stages it takes
    infer: str = ''                                 # words for infer.py
    seeds: tuple = (0,)
    sets: tuple = ('test',)                         # of SETS; 'validation' is that of the training phantoms
    subjects: int = 0                               # the first so many training subjects; 0: all

    task = property(lambda self: self.name.split('/')[0])
    label = property(lambda self: self.name.replace('/', '_'))

    def exp(self, seed):
        return f'study_{self.label}_{seed}'

    def file(self, seed, group):
        return FIGURES / f'{self.label}-{group}-{seed}.csv'

    def facts(self, seed):
        return FIGURES / f'{self.label}-{seed}.json'


AAE, UNET, POST = 'train_aae.py', 'train_unet.py', 'post_train.py'
REGRESSION = f'{UNET} --regression True'
ALL, THREE = (AAE, UNET, f'{REGRESSION} --w_lesion 0', POST), (0, 1, 2)
BOTH, MORE, VALIDATION = ('test', 'shifted'), ('test', 'shifted', 'validation'), ('validation',)
LATENT = f'{POST} --detail_branch False'
PLAIN = f'{REGRESSION} --regression_steps 2600 --w_lesion 0'
LAPT_LOSS = '--post_loss lapt --w_diffusion 1 --w_image 0.01 --w_lesion 0.02'
LAPT = '--predict eps --normalise_latents False --last_step_share 0 --latent_channels 3 --optimizer adam --context 0'
ILCLDM = ('--predict eps --schedule linear --normalise_latents False --last_step_share 0 --latent_channels 1 '
          '--label_drop 0 --optimizer adam')
DDIM = '--sampler ddim --num_steps 50'
PAPER_DDIM = f'{DDIM} --mirror False'
STEPS_HALF = '--aae_steps 60', '--unet_steps 60', '--regression_steps 750', '--post_steps 150'
STEPS_DOUBLE = '--aae_steps 240', '--unet_steps 240', '--regression_steps 3000', '--post_steps 600'

TRIALS = [
    # Stroke. The rivals have the time of all of our stages.
    Trial('stroke/ours', "ours, by the demo's settings", ALL, seeds=THREE, sets=MORE),
    Trial('stroke/regression', 'regression U-Net on the image grid, the same lesion weight, equal time',
          (f'{REGRESSION} --regression_steps 2600',), 'stroke/ours', '--stage regression', THREE, BOTH),
    Trial('stroke/control', 'latent network trained on as long with w_image = w_lesion = 0',
          (f'{LATENT} --w_image 0 --w_lesion 0',), 'stroke/ours', seeds=THREE, sets=BOTH),
    Trial('stroke/stage2', 'the latent network before post-training', (), 'stroke/ours', '--stage unet', THREE, BOTH),
    Trial('stroke/start', 'the plain regression that stage 3 starts from', (), 'stroke/ours', '--stage regression',
          THREE, BOTH),
    Trial('stroke/no_detail', 'post-training without detail branch', (LATENT,), 'stroke/ours'),
    Trial('stroke/regression_plain', 'the same without lesion weight',
          (PLAIN,), 'stroke/ours', '--stage regression', THREE, MORE),
    Trial('stroke/regression_slices', 'the same on single slices, not mirrored',
          (f'{REGRESSION} --regression_steps 2600 --w_lesion 0 --context 0',), 'stroke/ours',
          '--stage regression --mirror False'),
    Trial('stroke/lapt_loss', "without detail branch, LAPT's loss and weights", (f'{LATENT} {LAPT_LOSS}',),
          'stroke/ours'),
    Trial('stroke/ddim50', '50 DDIM steps', (), 'stroke/ours', DDIM),
    Trial('stroke/samples4', 'one step, mean of 4 latents', (), 'stroke/ours', '--samples 4'),
    Trial('stroke/ddim2', '2 DDIM steps', (), 'stroke/ours', '--sampler ddim --num_steps 2'),
    Trial('stroke/ddim10', '10 DDIM steps', (), 'stroke/ours', '--sampler ddim --num_steps 10'),
    Trial('stroke/frozen_decoder', 'without detail branch, decoder not tuned', (f'{LATENT} --tune_decoder False',),
          'stroke/ours'),
    Trial('stroke/no_detail_weight_2', 'without detail branch, w_lesion 2', (f'{LATENT} --w_lesion 2',), 'stroke/ours'),
    Trial('stroke/no_detail_weight_0', 'without detail branch, w_lesion 0', (f'{LATENT} --w_lesion 0',), 'stroke/ours'),
    Trial('stroke/weight_05', 'w_lesion 0.5', (f'{POST} --w_lesion 0.5',), 'stroke/ours'),
    Trial('stroke/weight_1', 'w_lesion 1', (f'{POST} --w_lesion 1',), 'stroke/ours'),
    Trial('stroke/not_mirrored', 'without the mean with the mirrored source', (), 'stroke/ours', '--mirror False'),
    Trial('stroke/from_zero', 'detail branch from zero, all of its time for post-training',
          (f'{POST} --detail_channels (32,64) --post_lr 1e-3 --post_steps 800',), 'stroke/ours'),
    Trial('stroke/latent_regression', 'regression of the latent: stage 2 at t = T-1 only, equal time',
          (f'{UNET} --last_step_share 1 --unet_steps 2000',), 'stroke/ours', '--stage unet'),
    Trial('stroke/lapt', "LAPT's recipe at the demo's size, 50 DDIM steps, equal time",
          (f'{AAE} {LAPT} {PAPER_DDIM} --aae_steps 300', f'{UNET} {LAPT} {PAPER_DDIM} --unet_steps 1200',
           f'{POST} {LAPT_LOSS} {PAPER_DDIM} --lambda_t linear --flip False --shift 0 --post_last_step_share 0 '
           '--tune_decoder False --detail_branch False --optimizer adam --post_steps 300 --post_lr 1e-4'), '',
          PAPER_DDIM),
    # What the fast settings cost.
    Trial('stroke/fp32', 'all stages and inference in fp32', tuple(f'{c} --precision fp32' for c in ALL), '',
          '--precision fp32'),
    Trial('stroke/adam', 'all stages with AdamW', tuple(f'{c} --optimizer adam' for c in ALL)),
    # How it grows; the steps are those of all stages.
    Trial('stroke/subjects_10', '10 training subjects', ALL, subjects=10),
    Trial('stroke/subjects_30', '30 training subjects', ALL, subjects=30),
    Trial('stroke/steps_half', 'half of the steps', tuple(map(' '.join, zip(ALL, STEPS_HALF, strict=True)))),
    Trial('stroke/steps_double', 'twice the steps', tuple(map(' '.join, zip(ALL, STEPS_DOUBLE, strict=True)))),
    # Learning rates, on the validation subjects.
    Trial('stroke/post_lr_half', 'ours, half the learning rate in stage 3', (f'{POST} --post_lr 2.5e-4',),
          'stroke/ours', sets=VALIDATION),
    Trial('stroke/post_lr_double', 'ours, twice the learning rate in stage 3', (f'{POST} --post_lr 1e-3',),
          'stroke/ours', sets=VALIDATION),
    Trial('stroke/regression_lr_half', 'plain regression, half the learning rate', (f'{PLAIN} --lr 5e-4',),
          'stroke/ours', '--stage regression', sets=VALIDATION),
    Trial('stroke/regression_lr_double', 'plain regression, twice the learning rate', (f'{PLAIN} --lr 2e-3',),
          'stroke/ours', '--stage regression', sets=VALIDATION),

    # Amyloid.
    Trial('amyloid/ours', "ours, by the demo's settings", ALL, seeds=THREE, sets=BOTH),
    Trial('amyloid/regression', 'regression U-Net on the image grid, the same weights, equal time',
          (f'{REGRESSION} --regression_steps 1050',), 'amyloid/ours', '--stage regression', THREE, BOTH),
    Trial('amyloid/no_label', 'labels never read', (f'{UNET} --num_classes 0', f'{POST} --num_classes 0'),
          'amyloid/ours', seeds=THREE),
    Trial('amyloid/never_dropped', "IL-CLDM's way: label never dropped in training, absent at sampling",
          (f'{UNET} --label_drop 0', f'{POST} --label_drop 0'), 'amyloid/ours', seeds=THREE),
    Trial('amyloid/stage2', 'its latent network before post-training', (), 'amyloid/ours', '--stage unet'),
    Trial('amyloid/label_given', 'the true label given at inference', (), 'amyloid/ours', '--label true', THREE),
    Trial('amyloid/guidance2', 'the true label given, guidance 2', (), 'amyloid/ours', '--label true --guidance 2'),
    Trial('amyloid/control', 'latent network trained on with w_image = w_lesion = 0',
          (f'{LATENT} --w_image 0 --w_lesion 0',), 'amyloid/ours'),
    Trial('amyloid/ddim50', '50 DDIM steps', (), 'amyloid/ours', DDIM),
    Trial('amyloid/il_cldm', "IL-CLDM's recipe at the demo's size, 50 DDIM steps",
          (f'{AAE} {ILCLDM} {PAPER_DDIM}', f'{UNET} {ILCLDM} {PAPER_DDIM} --unet_steps 700'), '', PAPER_DDIM),
]
BY_NAME = {trial.name: trial for trial in TRIALS}


# ----------------------------------------------------------------------------------------------------------------------
# Doing them

def script(*command):
    """Run one of our scripts; RunError with its last line if it fails. Returns the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = str(Path(__file__).with_name(command[0])), *command[1:]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = (done.stdout.strip().splitlines() or ['failed'])[-1]
        raise RunError(f"{' '.join([Path(command[0]).name, *command[1:]])}: {said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def data(task, group=None, subjects=0):
    """The phantoms of a task, made if they are not there: words that name them.

    group: a test set, or None: those of training and validation, of which `subjects` are for training (0: all).
    """
    folder, count = f"data/study_{task}_{group or 'train'}", SUBJECTS[task][bool(group)]
    more = (*SETS[group], '--split', '0.02,0.02,0.96') if group else ('--seed', '1')
    making = None
    while making is None:
        try:
            making = lock(Path('result') / f'{Path(folder).name}.phantoms')
        except RunError:  # another process makes them
            time.sleep(2)
    script('phantom.py', '--task', TASKS[task], '--out', folder, '--subjects', str(count), *more)
    making.close()
    lists = Path(folder) / 'data_info'
    if subjects:
        fewer = lists.with_name(f'data_info_{subjects}')
        shutil.copytree(lists, fewer, dirs_exist_ok=True)
        ids = (lists / 'train.txt').read_text().split()
        write_atomic(fewer / 'train.txt', lambda f: f.write('\n'.join(ids[:subjects]) + '\n'), 'w')
        lists = fewer
    return '--preset', f'{TASKS[task]}_demo', '--data_root', folder, '--data_info', str(lists)


def perform(trial, seed):
    """Train a trial (resuming what was begun), evaluate it, keep the figures and what it cost."""
    exp, began, cpu = trial.exp(seed), time.time(), 0.0
    source = ('--init_from', BY_NAME[trial.start].exp(seed)) if trial.start else ()
    common = ('--exp', exp, '--seed', str(seed), *source)
    for command in trial.stages:
        name, *more = command.split()
        cpu += script(name, *data(trial.task, subjects=trial.subjects), *common, *more)
    for group in trial.sets:
        if not trial.file(seed, group).exists():
            split, own = ('test', group) if group in SETS else (group, None)
            script('infer.py', *data(trial.task, own), *common, *trial.infer.split(), '--split', split, '--only_model')
            name = 'test' if split == 'test' else f'infer_{split}'
            table = pd.read_csv(f'result/{exp}/{name}.csv').drop(columns=['qc', 'num_steps', 'samples'])
            write_atomic(trial.file(seed, group), lambda f, t=table: t.to_csv(f, index=False, float_format='%.5g'), 'w')
    if trial.facts(seed).exists():  # trained before; only a further set was evaluated
        return
    facts = dict(name=trial.name, seed=seed, training_cpu_seconds=round(cpu), commit=git_state()[:12],
                 minutes=round((time.time() - began) / 60, 1), stages=trial.stages, infer=trial.infer)
    write_atomic(trial.facts(seed), lambda f: json.dump(facts, f, indent=1), 'w')


def is_done(trial, seed):
    return all(trial.file(seed, group).exists() for group in trial.sets)


def work(trials, seeds):
    """Perform all that is not done, first seeds first; a trial that another process is at, or that needs one, waits."""
    for seed in seeds:
        for trial in trials:
            if seed not in trial.seeds or is_done(trial, seed):
                continue
            if trial.start and not is_done(BY_NAME[trial.start], seed):
                print(f'{trial.name}, seed {seed}: waits for {trial.start}', flush=True)
                continue
            try:
                held = lock(Path('result') / f'{trial.exp(seed)}.study')
            except RunError:
                print(f'{trial.name}, seed {seed}: another process is at it', flush=True)
                continue
            print(f'{trial.name}, seed {seed}: {trial.about}', flush=True)
            began = time.time()
            try:
                perform(trial, seed)
                print(f'    done, {(time.time() - began) / 60:.1f} minutes', flush=True)
            except RunError as error:
                print(f'    failed: {error}', flush=True)
            held.close()


# ----------------------------------------------------------------------------------------------------------------------
# The tables

COLUMNS = {
    'stroke': dict(dwi_psnr='DWI PSNR, dB', adc_psnr='ADC PSNR, dB', dwi_ms_ssim='DWI MS-SSIM', lesion_mae='lesion MAE',
                   lesion_contrast_error='contrast error', lesion_dice_2ml='Dice above 2 ml',
                   lesion_detected='detected', false_lesion_ml='false lesion, ml', lesion_rim_mae='rim MAE'),
    'amyloid': dict(suvr_psnr='PSNR, dB', suvr_ms_ssim='MS-SSIM', suvr_error_abs='SUVR error')}
TABLES = [
    ('Post-training', 'stroke/ours', ['stroke/stage2', 'stroke/control', 'stroke/start', 'stroke/no_detail'],
     BOTH),
    ('Lesion weight', 'stroke/ours', ['stroke/weight_05', 'stroke/weight_1'], ('test',)),
    ('Loss, weights, decoder, without detail branch', 'stroke/no_detail',
     ['stroke/no_detail_weight_0', 'stroke/no_detail_weight_2', 'stroke/lapt_loss', 'stroke/frozen_decoder'],
     ('test',)),
    ('Recipes, stroke', 'stroke/ours', ['stroke/regression', 'stroke/regression_plain', 'stroke/regression_slices',
                                        'stroke/from_zero', 'stroke/latent_regression', 'stroke/lapt'], BOTH),
    ('Sampling, stroke', 'stroke/ours', ['stroke/ddim2', 'stroke/ddim10', 'stroke/ddim50', 'stroke/samples4',
                                         'stroke/not_mirrored'], ('test',)),
    ('Fast settings', 'stroke/ours', ['stroke/fp32', 'stroke/adam'], ('test',)),
    ('Subjects and steps', 'stroke/ours', ['stroke/subjects_10', 'stroke/subjects_30', 'stroke/steps_half',
                                           'stroke/steps_double'], ('test',)),
    ('Learning rates', 'stroke/ours', ['stroke/post_lr_half', 'stroke/post_lr_double', 'stroke/regression_plain',
                                       'stroke/regression_lr_half', 'stroke/regression_lr_double'], VALIDATION),
    ('Label conditioning', 'amyloid/ours', ['amyloid/no_label', 'amyloid/never_dropped', 'amyloid/label_given',
                                            'amyloid/guidance2'], ('test',)),
    ('Recipes, amyloid', 'amyloid/ours', ['amyloid/stage2', 'amyloid/control', 'amyloid/regression', 'amyloid/ddim50',
                                          'amyloid/il_cldm'], BOTH),
]


def subjects(trial, group):
    """A trial's figures on a test set, seeds averaged for each subject -> (table or None, number of seeds)."""
    files = [trial.file(seed, group) for seed in trial.seeds if trial.file(seed, group).exists()]
    tables = [pd.read_csv(f, dtype={'ID': str}) for f in files]
    if not tables:
        return None, 0
    for table in tables:
        if 'suvr_error' in table:
            table['suvr_error_abs'] = table['suvr_error'].abs()
    return pd.concat(tables).groupby('ID', sort=True).mean().reset_index(), len(files)


def auc_cell(table):
    """AUC of the synthetic composite SUVR for the true PET's status, with its interval."""
    positive = (table['suvr_true'] > status.TRUE_THRESHOLD).astype(int)
    found = status.classify(table['suvr_pred'], positive, table['suvr_pred'], positive)
    return f"{found['auc']:.2f} ({found['auc_ci_low']:.2f} .. {found['auc_ci_high']:.2f})"


def table_lines(title, reference, others, group):
    """One table in Markdown: mean and 95 % interval over subjects; * where Holm's p against the first line < 0.05."""
    trials = [BY_NAME[name] for name in (reference, *others)]
    known = {t.name: subjects(t, group) for t in trials}
    known = {name: pair for name, pair in known.items() if pair[0] is not None}
    if reference not in known or len(known) < 2:
        return []
    task = BY_NAME[reference].task
    columns, base = COLUMNS[task], known[reference][0]
    keep = ['ID', *columns]
    tests = metrics.summarise(base[keep], {n: t[keep] for n, (t, _) in known.items() if n != reference}, 0)
    tests = tests.set_index('metric')
    extra = ['AUC'] if task == 'amyloid' else []
    lines = [f'**{title}**, {len(base)} subjects of the set "{group}"', '',
             '| | seeds | CPU s | ' + ' | '.join([*columns.values(), *extra]) + ' |',
             '| --- |' + ' --- |' * (2 + len(columns) + len(extra))]
    for name, (table, seeds) in known.items():
        cells = []
        for column in columns:
            values = table[column].dropna().to_numpy()
            low, high = metrics.bootstrap_ci(values, 0)
            star = '*' if name != reference and tests[f'{name}_p_holm'][column] < 0.05 else ''
            cells.append(f'{short(values.mean())}{star} ({short(low)} .. {short(high)})')
        cells += [auc_cell(table)] if extra else []
        about = BY_NAME[name].about
        first = f'**{about}**' if name == reference else about
        lines.append(f'| {first} | {seeds} | {cpu_seconds(BY_NAME[name])} | ' + ' | '.join(cells) + ' |')
    return [*lines, '']


def short(value):
    return f'{value:.1f}' if abs(value) >= 10 else f'{value:.2f}' if abs(value) >= 1 else f'{value:.3f}'


def cpu_seconds(trial):
    """CPU seconds of training, all stages, of one seed; a trial that begins from another's stages adds theirs."""
    known = [json.loads(trial.facts(s).read_text()) for s in trial.seeds if trial.stages and trial.facts(s).exists()]
    seconds = next((facts['training_cpu_seconds'] for facts in known if facts['training_cpu_seconds']), None)
    return f'{seconds}' + '+' * bool(trial.start) if seconds else ''


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
    note = ('Mean over subjects, seeds averaged for each subject first, and 95 % bootstrap interval; * differs '
            'from the first line (paired Wilcoxon, Holm over the table, p < 0.05). CPU s: process seconds of '
            'training on one core; "+" comes on top of the stages it starts from. Made by `python study.py`.')
    text = '\n'.join([f'{head}{begin}', '', note, '', *lines, f'{end}{tail}'])
    write_atomic(path, lambda f: f.write(text), 'w')
    print(f'{path} written')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='the run of this name, or those whose name contains it')
    parser.add_argument('--seeds', type=int, default=3, help='only the first of the seeds: 1, 2 or 3')
    parser.add_argument('--list', action='store_true', help='what there is, and what is done')
    parser.add_argument('--tables', action='store_true', help='only write the tables')
    args = parser.parse_args()
    os.chdir(Path(__file__).parent)
    trials = [BY_NAME[args.only]] if args.only in BY_NAME else [t for t in TRIALS if args.only in t.name]
    if not trials:
        raise RunError(f"no run has '{args.only}' in its name; --list shows them")
    if args.list:
        for trial in trials:
            seeds = [f'{s}: {"done" if is_done(trial, s) else "to do"}' for s in trial.seeds]
            print(f'{trial.name:26} {trial.about}; seed {", ".join(seeds)}')
        return
    if not args.tables:
        work(trials, range(args.seeds))
    write_results()


if __name__ == '__main__':
    cli(main)
