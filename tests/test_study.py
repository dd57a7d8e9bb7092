"""study.py: its trials are ones the scripts take, and its tables say what the figures of the subjects say."""
import os
import sys

import numpy as np
import pandas as pd
import pytest

import config
import study
import utils


def test_trials_have_names_of_their_own_and_begin_from_known_ones():
    assert len(study.BY_NAME) == len(study.TRIALS)
    order = list(study.BY_NAME)
    for trial in study.TRIALS:
        assert trial.task in study.TASKS and set(trial.sets) <= {*study.SETS, 'validation'} and trial.about
        if trial.start:  # done before, with the same seeds
            assert order.index(trial.start) < order.index(trial.name)
            assert set(trial.seeds) <= set(study.BY_NAME[trial.start].seeds)
    for _, reference, others, groups in study.TABLES:
        assert {reference, *others} <= set(order) and set(groups) <= set(study.BY_NAME[reference].sets)


@pytest.mark.parametrize('trial', study.TRIALS, ids=lambda trial: trial.name)
def test_every_command_of_a_trial_is_one_that_the_script_takes(trial):
    preset = ['--preset', f'{study.TASKS[trial.task]}_demo']
    for command in trial.stages:
        script, *words = command.split()
        assert words.count('--w_lesion') < 2 and script in (study.AAE, study.UNET, study.POST)
        config.load('', [*preset, *words], {'restart': (False, '')})
    config.load('', [*preset, *trial.infer.split()], {'stage': ('auto', ''), 'only_model': (False, '')})


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Made figures of three trials: ours, a rival 1 dB below with two seeds, a control like ours."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = pd.DataFrame({'ID': [f's{i:02}' for i in range(20)]})
    for column in study.COLUMNS['stroke']:
        base[column] = rng.normal(20, 2, 20)
    base.loc[:3, 'lesion_mae'] = np.nan

    def write(name, seed, shift):
        table = base.copy()
        table['dwi_psnr'] += shift
        path = study.BY_NAME[name].file(seed, 'test')
        path.parent.mkdir(parents=True, exist_ok=True)
        table.sample(frac=1, random_state=seed).to_csv(path, index=False)  # in any order

    write('stroke/ours', 0, 0)
    write('stroke/regression', 0, -1.5)
    write('stroke/regression', 1, -0.5)
    write('stroke/from_zero', 0, 0)
    return base


def test_tables_average_seeds_within_subjects_and_test_pairs(figures):
    table, seeds = study.subjects(study.BY_NAME['stroke/regression'], 'test')
    assert seeds == 2 and list(table['ID']) == list(figures['ID'])
    np.testing.assert_allclose(table['dwi_psnr'], figures['dwi_psnr'] - 1)
    lines = study.table_lines('Recipes', 'stroke/ours',
                              ['stroke/regression', 'stroke/from_zero', 'stroke/lapt'], 'test')
    ours, regression, zero = [line.split(' | ') for line in lines if line.startswith('| ') and 'seeds' not in line][1:]
    assert len(lines) == 8 and '20 subjects' in lines[0]  # what is not done is left out
    assert regression[1] == '2' and '*' in regression[3] and not any('*' in cell for cell in zero[3:])
    assert ours[3].startswith(f"{figures['dwi_psnr'].mean():.1f} (")
    assert float(regression[3].split('*')[0]) == pytest.approx(figures['dwi_psnr'].mean() - 1, abs=0.06)


def test_results_keep_what_is_written_around_the_tables(figures, tmp_path):
    (tmp_path / 'docs/RESULTS.md').write_text('# Mine\n<!-- tables: written by study.py -->\nold\n'
                                              '<!-- end of the tables -->\nWhat it means.\n')
    study.write_results()
    text = (tmp_path / 'docs/RESULTS.md').read_text()
    assert text.startswith('# Mine') and text.endswith('What it means.\n') and 'old' not in text
    assert text.count('**Recipes, stroke**') == 1 and 'Label conditioning' not in text


def test_a_trial_on_few_subjects_takes_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, 'script', lambda *words: None)
    lists = tmp_path / 'data' / 'study_stroke_train' / 'data_info'
    lists.mkdir(parents=True)
    (tmp_path / 'result').mkdir()
    (lists / 'train.txt').write_text('b\na\nc\n')
    (lists / 'validation.txt').write_text('d\n')
    assert study.data('stroke')[-1] == 'data/study_stroke_train/data_info'
    few = lists.with_name('data_info_2')
    assert study.data('stroke', subjects=2)[-1] == f'data/study_stroke_train/{few.name}'
    assert (few / 'train.txt').read_text() == 'b\na\n' and (few / 'validation.txt').read_text() == 'd\n'


def test_a_trial_is_done_once_all_its_sets_are(figures):
    ours, regression = study.BY_NAME['stroke/ours'], study.BY_NAME['stroke/from_zero']
    assert not study.is_done(ours, 0) and study.is_done(regression, 0)  # ours has two sets


def test_a_script_that_fails_is_told_by_its_sentence():
    with pytest.raises(utils.RunError, match='train_aae.py --nonsense 1.*there is no setting'):
        study.script('train_aae.py', '--nonsense', '1')


def test_list_says_what_is_done(monkeypatch, capsys):
    monkeypatch.chdir(os.getcwd())  # main goes to its own folder
    monkeypatch.setattr(sys, 'argv', ['study.py', '--list', '--only', 'amyloid/'])
    study.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(trial.task == 'amyloid' for trial in study.TRIALS)
    assert all(line.startswith('amyloid/') and ('to do' in line or 'done' in line) for line in lines)
    monkeypatch.setattr(sys, 'argv', ['study.py', '--only', 'nothing'])
    with pytest.raises(utils.RunError, match="no run has 'nothing' in its name"):
        study.main()
