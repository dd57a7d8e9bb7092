"""study.py: its trials are ones the scripts take, and its tables say what the figures of the subjects say."""
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import config
import status
import study
import tables
import trials
import utils


def test_trials_have_names_of_their_own_and_begin_from_known_ones():
    assert len(trials.BY_NAME) == len(trials.TRIALS)
    order = list(trials.BY_NAME)
    for trial in trials.TRIALS:
        assert trial.task in trials.TASKS and trial.about
        assert set(trial.sets) <= {*trials.SETS, *trials.FEW, 'validation'}
        for first in filter(None, (trial.start, trial.pretrained)):  # done before, with the same seeds
            assert order.index(first) < order.index(trial.name)
            assert set(trial.seeds) <= set(trials.BY_NAME[first].seeds)
    for _, reference, others, groups in tables.TABLES:
        assert {reference, *others} <= set(order)
        assert {trials.FEW.get(group, (group,))[0] for group in groups} <= set(trials.BY_NAME[reference].sets)
    assert {name for names in tables.CURVES.values() for name in names} <= set(order)


@pytest.mark.parametrize('trial', trials.TRIALS, ids=lambda trial: trial.name)
def test_every_command_of_a_trial_is_one_that_the_script_takes(trial):
    preset = ['--preset', f'{trials.TASKS[trial.task]}_demo']
    for command in trial.stages:
        script, *words = command.split()
        if command == trials.MONAI:
            continue
        assert words.count('--w_lesion') < 2 and script in (trials.AAE, trials.UNET, trials.POST)
        config.load('', [*preset, *words], {'restart': (False, '')})
    config.load('', [*preset, *trial.infer.split()], {'stage': ('auto', ''), 'only_model': (False, '')})


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Made figures of three trials: ours, a rival 1 dB below with two seeds, a control like ours."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = pd.DataFrame({'ID': [f's{i:02}' for i in range(20)]})
    for column in tables.COLUMNS['stroke']:
        base[column] = rng.normal(20, 2, 20)
    base.loc[:3, 'lesion_mae'] = np.nan

    def write(name, seed, shift):
        table = base.copy()
        table['dwi_psnr'] += shift
        path = trials.BY_NAME[name].file(seed, 'test')
        path.parent.mkdir(parents=True, exist_ok=True)
        table.sample(frac=1, random_state=seed).to_csv(path, index=False)  # in any order

    write('stroke/sure', 0, 0)
    write('stroke/ours', 0, 0)
    write('stroke/ours', 1, 0)
    write('stroke/regression', 0, -1.5)
    write('stroke/regression', 1, -0.5)
    write('stroke/lapt_loss', 0, 0)
    return base


def test_tables_average_seeds_within_subjects_and_test_pairs(figures):
    table = tables.subjects(trials.BY_NAME['stroke/regression'], 'test')
    assert list(table['ID']) == list(figures['ID'])
    np.testing.assert_allclose(table['dwi_psnr'], figures['dwi_psnr'] - 1)
    lines = tables.table_lines('Recipes', 'stroke/ours',
                               ['stroke/regression', 'stroke/lapt_loss', 'stroke/lapt'], 'test')
    ours, regression, zero = [line.split(' | ') for line in lines if line.startswith('| ') and 'seeds' not in line][1:]
    assert len(lines) == 8 and '20 subjects' in lines[0]  # what is not done is left out
    assert regression[1] == '2' and '*' in regression[3] and not any('*' in cell for cell in zero[3:])
    assert ours[3].startswith(f"{figures['dwi_psnr'].mean():.1f} (")
    assert float(regression[3].split('*')[0]) == pytest.approx(figures['dwi_psnr'].mean() - 1, abs=0.06)


def test_a_star_needs_the_same_direction_in_each_of_two_seeds_or_the_same_networks(figures):
    def star(name, shifts):
        for seed, shift in enumerate(shifts):
            table = figures.assign(dwi_psnr=figures['dwi_psnr'] + shift)
            table.to_csv(trials.BY_NAME[name].file(seed, 'test'), index=False)
        line = next(line for line in tables.table_lines('', 'stroke/ours', [name], 'test')
                    if line.startswith(f'| {trials.BY_NAME[name].about} '))
        return '*' in line.split(' | ')[3]

    assert star('stroke/regression_plain', [-2, -1]) and not star('stroke/control', [-3, 1])
    assert not star('stroke/lapt_loss', [-3]) and star('stroke/ddim50', [-3])  # trained anew; the same networks
    assert not star('stroke/stage2_not_mirrored', [-3])  # not trained for this, but other networks


def test_auc_is_the_mean_of_the_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, trial = np.random.default_rng(1), trials.BY_NAME['amyloid/ours']
    trial.file(0, 'test').parent.mkdir(parents=True)
    truth = np.where(np.arange(40) % 2, 1.4, 1.0)
    scores = [truth + rng.normal(0, 0.5, 40) for _ in range(2)]
    for seed, pred in enumerate(scores):
        pd.DataFrame(dict(ID=[f's{i:02}' for i in range(40)], suvr_true=truth, suvr_pred=pred)).to_csv(
            trial.file(seed, 'test'), index=False)
    each = [status.auc(pred, truth > 1.11) for pred in scores]
    assert status.auc(sum(scores), truth > 1.11) > np.mean(each) + 0.02  # their mean image is a better one
    cell = tables.auc_cell('amyloid/ours', 'test', {0, 1}, [f's{i:02}' for i in range(40)])
    found, low, high = (float(x) for x in cell.replace('(', '').replace(')', '').replace('..', '').split())
    assert found == pytest.approx(np.mean(each), abs=0.006) and low < found < high


def test_one_seed_is_tested_against_the_same_seed(figures):
    # A second seed of ours lies 3 dB lower: their mean is no measure for a control of the first seed alone.
    lower = pd.read_csv(trials.BY_NAME['stroke/ours'].file(0, 'test')).assign(dwi_psnr=lambda t: t['dwi_psnr'] - 3)
    lower.to_csv(trials.BY_NAME['stroke/ours'].file(1, 'test'), index=False)
    lines, seeds, p = tables.compared('stroke/ours', ['stroke/lapt_loss'], 'test')
    assert seeds == {'stroke/ours': {0}, 'stroke/lapt_loss': {0}} and not p['dwi_psnr', 'stroke/lapt_loss'] < 1
    np.testing.assert_allclose(lines['stroke/ours']['dwi_psnr'], figures['dwi_psnr'])
    lines, seeds, p = tables.compared('stroke/ours', ['stroke/regression', 'stroke/lapt_loss'], 'test')
    assert seeds['stroke/ours'] == seeds['stroke/regression'] == {0, 1} and seeds['stroke/lapt_loss'] == {0}
    np.testing.assert_allclose(lines['stroke/ours']['dwi_psnr'], figures['dwi_psnr'] - 1.5)
    assert not p['dwi_psnr', 'stroke/lapt_loss'] < 1 and p['dwi_psnr', 'stroke/regression'] < 0.05  # 0.5 dB above


def test_a_table_of_the_first_subjects_takes_theirs_from_the_whole_set(figures):
    assert tables.compared('stroke/ours', ['stroke/ddpm'], 'first10') == ({}, {}, {})  # not done
    figures[:7].assign(dwi_psnr=figures['dwi_psnr'] - 2).to_csv(trials.BY_NAME['stroke/ddpm'].file(0, 'first10'))
    lines, seeds, p = tables.compared('stroke/ours', ['stroke/ddpm'], 'first10')
    assert list(lines['stroke/ours']['ID']) == list(lines['stroke/ddpm']['ID']) == list(figures['ID'][:7])
    assert seeds['stroke/ours'] == {0} and p['dwi_psnr', 'stroke/ddpm'] < 1 / 2
    assert '7 subjects' in tables.table_lines('1000', 'stroke/ours', ['stroke/ddpm'], 'first10')[0]


def test_results_keep_what_is_written_around_the_tables(figures, tmp_path):
    (tmp_path / 'docs/RESULTS.md').write_text('# Mine\n<!-- tables: written by study.py -->\nold\n'
                                              '<!-- end of the tables -->\nWhat it means.\n')
    tables.write_results()
    text = (tmp_path / 'docs/RESULTS.md').read_text()
    assert text.startswith('# Mine') and text.endswith('What it means.\n') and 'old' not in text
    assert (tmp_path / 'docs/tradeoff.png').stat().st_size > 10000
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
    tests = tmp_path / 'data' / 'study_stroke_test' / 'data_info'
    tests.mkdir(parents=True)
    (tests / 'test.txt').write_text('\n'.join(f's{i:02}' for i in range(20)) + '\n')
    assert study.data('stroke', 'first10')[-1] == 'data/study_stroke_test/data_info_10'
    assert (tests.with_name('data_info_10') / 'test.txt').read_text().split() == [f's{i:02}' for i in range(10)]
    assert (few / 'train.txt').read_text() == 'b\na\n' and (few / 'validation.txt').read_text() == 'd\n'


def test_a_trial_on_more_subjects_keeps_validation_and_test_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(study, 'script', lambda *words: made.append(words))
    usual, many = (tmp_path / 'data' / f'study_stroke_train{more}' / 'data_info' for more in ('', '_203'))
    for lists in (usual, many):
        lists.mkdir(parents=True)
    (tmp_path / 'result').mkdir()
    for name, ids in dict(train='sub-0003 sub-0001', validation='sub-0002', test='sub-0004').items():
        (usual / f'{name}.txt').write_text('\n'.join(ids.split()) + '\n')
    assert study.data('stroke', subjects=203)[-1] == 'data/study_stroke_train_203/data_info'
    assert [words[words.index('--subjects') + 1] for words in made] == ['200', '203']
    assert {words[words.index('--seed') + 1] for words in made} == {'1'}
    lists = {name: (many / f'{name}.txt').read_text().split() for name in ('train', 'validation', 'test')}
    assert lists['validation'] == ['sub-0002'] and lists['test'] == ['sub-0004'] and len(lists['train']) == 201
    assert sorted(sum(lists.values(), [])) == [f'sub-{i:04d}' for i in range(1, 204)]


def test_the_few_are_of_another_kind_and_begin_with_the_weights_of_the_many(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(study, 'script', lambda *words: calls.append(words) or 0.0)
    monkeypatch.setattr(study, 'keep', lambda table, path: path.write_text('ID\n'))
    monkeypatch.setattr(study.pd, 'read_csv', lambda path: None)
    Path('result').mkdir()
    Path('docs/study').mkdir(parents=True)
    trial = trials.BY_NAME['stroke/few_pretrained']
    study.work([trial], [0])
    assert not calls  # it waits for the many
    trials.BY_NAME['stroke/phantoms'].file(0, 'shifted').write_text('ID\n')
    study.work([trial], [0])
    made, trained, tested, translated = calls
    assert made[0] == tested[0] == 'phantom.py' and translated[0] == 'infer.py'
    assert made[made.index('--out') + 1:] == ('data/study_stroke_few', '--subjects', '60', '--seed', '11', '--kind',
                                              'shifted', '--split', '0.5,0.4,0.1')
    words = dict(zip(trained[1:-1], trained[2:], strict=True))
    assert trained[0] == 'train_unet.py' and words['--data_root'] == 'data/study_stroke_few'
    assert words['--pretrained'] == 'study_stroke_phantoms_0' and words['--exp'] == 'study_stroke_few_pretrained_0'
    assert 'data/study_stroke_shifted' in translated and study.is_done(trial, 0)


def test_a_trial_is_done_once_all_its_sets_are(figures):
    ours, regression = trials.BY_NAME['stroke/ours'], trials.BY_NAME['stroke/lapt_loss']
    assert not study.is_done(ours, 0) and study.is_done(regression, 0)  # ours has two sets


def test_a_script_that_fails_is_told_by_its_sentence():
    with pytest.raises(utils.RunError, match='train_aae.py --nonsense 1.*there is no setting'):
        study.script('train_aae.py', '--nonsense', '1')


def test_list_says_what_is_done(monkeypatch, capsys):
    monkeypatch.chdir(os.getcwd())  # main goes to its own folder
    monkeypatch.setattr(sys, 'argv', ['study.py', '--list', '--only', 'amyloid/'])
    study.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(trial.task == 'amyloid' for trial in trials.TRIALS)
    assert all(line.startswith('amyloid/') and ('to do' in line or 'done' in line) for line in lines)
    monkeypatch.setattr(sys, 'argv', ['study.py', '--only', 'nothing'])
    with pytest.raises(utils.RunError, match="no run has 'nothing' in its name"):
        study.main()
