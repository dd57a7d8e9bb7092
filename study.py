"""
Does it work? The two papers' claims on phantoms with known truth, each with its control, and the rivals.

python study.py                   trains and evaluates what is not done yet, then writes docs/RESULTS.md
python study.py --only stroke/    runs whose name contains this; --seeds 1: only their first seed
python study.py --list            what there is, and what is done
python study.py --tables          only the tables, from the figures under docs/study

A run is done when the figures of each test subject lie under docs/study; they are small and stay with the code. Two
processes at once are no harm: each takes what nobody has begun. The test sets are phantoms of other seeds, the second
of another kind (`phantom.py --kind shifted`), the third for one comparison alone. docs/RESULTS.md says what was decided
with their figures at hand.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from stage import git_state, lock
from tables import write_results
from trials import BY_NAME, FEW, OTHERS, SETS, SUBJECTS, TASKS, TRIALS
from utils import RunError, cli, write_atomic


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


def data(task, group=None, subjects=0, few=False):
    """The phantoms of a task, made if they are not there: words that name them.

    group: a test set, or None: those of training and validation, of which `subjects` are for training (0: all; more
    than there are: so many phantoms, of which all but those of the usual validation and test lists are). few: instead
    60 phantoms of another kind, of which 30 are for training and 24 for validation.
    """
    group, subjects = FEW.get(group, (group, subjects))
    cut = 'test.txt' if group else 'train.txt'
    folder, count = f"data/study_{task}_{group or 'train'}", SUBJECTS[task][bool(group)]
    usual = Path(data(task)[-1]) if subjects > count else None
    if usual:
        folder, count = f'{folder}_{subjects}', subjects
    more = (*SETS[group], '--split', '0.02,0.02,0.96') if group else ('--seed', '1')
    if few:
        folder, count, more = f'data/study_{task}_few', 60, OTHERS
    making = None
    while making is None:
        try:
            making = lock(Path('result') / f'{Path(folder).name}.phantoms')
        except RunError:  # another process makes them
            time.sleep(2)
    script('phantom.py', '--task', TASKS[task], '--out', folder, '--subjects', str(count), *more)
    making.close()
    lists = Path(folder) / 'data_info'
    if usual:
        kept = {name: (usual / name).read_text().split() for name in ('validation.txt', 'test.txt')}
        others = [f'sub-{i:04d}' for i in range(1, count + 1) if f'sub-{i:04d}' not in sum(kept.values(), [])]
        for name, ids in (kept | {cut: others}).items():
            write_atomic(lists / name, lambda f, ids=ids: f.write('\n'.join(ids) + '\n'), 'w')
    elif subjects:
        fewer = lists.with_name(f'data_info_{subjects}')
        shutil.copytree(lists, fewer, dirs_exist_ok=True)
        ids = (lists / cut).read_text().split()
        write_atomic(fewer / cut, lambda f: f.write('\n'.join(ids[:subjects]) + '\n'), 'w')
        lists = fewer
    return '--preset', f'{TASKS[task]}_demo', '--data_root', folder, '--data_info', str(lists)


def keep(table, path):
    """The figures of each subject, small enough to stay with the code."""
    table = table.drop(columns=['qc', 'num_steps', 'samples'], errors='ignore')
    write_atomic(path, lambda f: table.to_csv(f, index=False, float_format='%.5g'), 'w')


def perform(trial, seed):
    """Train a trial (resuming what was begun), evaluate it, keep the figures and what it cost."""
    exp, began, cpu = trial.exp(seed), time.time(), 0.0
    resumed = any(Path('result', exp).glob('last_*'))  # then the seconds before are not known
    source = ('--init_from', BY_NAME[trial.start].exp(seed)) if trial.start else ()
    common = ('--exp', exp, '--seed', str(seed), *source)
    if trial.pretrained:
        common += ('--pretrained', BY_NAME[trial.pretrained].exp(seed))
    for command in trial.stages:
        name, *more = command.split()
        if name == 'monai_ldm.py':  # translates by itself
            folders = [data(trial.task, group)[3] for group in trial.sets]
            script(name, *data(trial.task), *common, *more, '--also', ','.join(folders))
            cpu += float(more[more.index('--cpu_seconds') + 1])
            for group, folder in zip(trial.sets, folders, strict=True):
                keep(pd.read_csv(f'result/{exp}/monai_{Path(folder).name}.csv'), trial.file(seed, group))
            continue
        cpu += script(name, *data(trial.task, subjects=trial.subjects, few=trial.few), *common, *more)
    if trial.intervals:
        script('infer.py', *data(trial.task), *common, *trial.infer.split(), '--split', 'validation')
    for group in trial.sets:
        if not trial.file(seed, group).exists():
            split, own = ('test', group) if group in (*SETS, *FEW) else (group, None)
            script('infer.py', *data(trial.task, own), *common, *trial.infer.split(), '--split', split, '--only_model')
            name = 'test' if split == 'test' else f'infer_{split}'
            keep(pd.read_csv(f'result/{exp}/{name}.csv'), trial.file(seed, group))
    if trial.facts(seed).exists():  # trained before; only a further set was evaluated
        return
    facts = dict(name=trial.name, seed=seed, training_cpu_seconds=0 if resumed else round(cpu), commit=git_state()[:12],
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
            first = next((t for t in (trial.start, trial.pretrained) if t and not is_done(BY_NAME[t], seed)), None)
            if first:
                print(f'{trial.name}, seed {seed}: waits for {first}', flush=True)
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
