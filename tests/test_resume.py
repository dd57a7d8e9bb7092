"""Killed at any moment and run again: equal tensors and equal rows, as if nothing had happened."""
import random
import signal
from pathlib import Path

import made_data
import made_runs
import pytest

STAGES = ('train_aae', 'train_unet', 'post_train', 'regression')
FILES = dict(train_aae='aae', train_unet='unet', post_train='post', regression='regression')
BEST = dict(aae='CHECKPOINT_AAE', unet='CHECKPOINT_Unet', post='CHECKPOINT_Unet_post',
            regression='CHECKPOINT_regression')
WORDS = (*made_runs.STROKE, *made_runs.steps(12), '--save_every', '5', '--init_from', 'base')

# Python that runs before a script and kills it at a nasty moment.
KILL = 'import os, signal, utils\nkill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n'
AT_STEP = KILL + '''
update = utils.EMA.update
def watched(self, net, step):
    update(self, net, step)
    if step == 8: kill()
utils.EMA.update = watched'''
WHILE_MOVING = KILL + '''
replace, count = os.replace, []
def watched(a, b):
    if 'last_' in str(b):
        count.append(1)
        if len(count) == 3: kill()
    replace(a, b)
os.replace = watched'''
AFTER_BEST = KILL + '''
import stage
count, save = [], stage.Stage.save_if_due
def watched(self, step):
    if step == 6: kill()
    save(self, step)
stage.Stage.save_if_due = watched'''
MOMENTS = dict(train_aae=AT_STEP, train_unet=WHILE_MOVING, post_train=AFTER_BEST, regression=AT_STEP)


def script_of(stage, exp, *more):
    """Script and words of a stage in an experiment."""
    words = (*WORDS, '--exp', exp, *more)
    return ('train_unet', *words, '--regression', 'True') if stage == 'regression' else (stage, *words)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A folder with made subjects and an experiment `base`, whose stages are trained; every stage also run straight."""
    with made_runs.folder(tmp_path_factory.mktemp('resume')) as path:
        made_data.write_stroke('data')
        for stage in ('train_aae', 'train_unet'):
            made_runs.call(*script_of(stage, 'base'))
        for stage in STAGES:
            made_runs.call(*script_of(stage, f'straight_{stage}'))
    return path


def compare(stage, exp):
    """Assert that an experiment holds what the straight run of the same stage holds."""
    name, (a, b) = FILES[stage], (Path('result', f'straight_{stage}'), Path('result', exp))
    for file in (f'last_{name}.pth.tar', f'{BEST[name]}.pth.tar'):
        one, two = made_runs.loaded(a / file), made_runs.loaded(b / file)
        if 'state' in one:
            assert one['state'].pop('seconds') > 0 and two['state'].pop('seconds') > 0
            assert {'opt', 'ema'} <= set(one['parts']) and one['state']['step'] == 12
        assert made_runs.differences(one, two) == []
    for file in (f'loss_curve_{name}.csv', f'validation_{name}.csv'):
        assert made_runs.curve(a / file) == made_runs.curve(b / file)
    assert len(made_runs.curve(a / f'loss_curve_{name}.csv')) == 13
    assert [row[0] for row in made_runs.curve(a / f'validation_{name}.csv')] == ['step', '0', '6', '12']
    assert not list(b.glob('*.tmp'))  # nor does half a checkpoint stay behind


@pytest.mark.parametrize('stage', STAGES)
def test_killed_and_run_again_ends_as_if_it_had_not_been(stage, base, monkeypatch):
    monkeypatch.chdir(base)
    exp = f'killed_{stage}'
    killed = made_runs.process(*script_of(stage, exp), before=MOMENTS[stage])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = made_runs.process(*script_of(stage, exp))
    assert again.returncode == 0, again.stderr
    assert f'resuming stage {FILES[stage]} at step ' in again.stdout + again.stderr
    compare(stage, exp)


def test_a_finished_stage_goes_on_when_its_steps_are_raised(base, monkeypatch, capsys):
    monkeypatch.chdir(base)
    made_runs.call(*script_of('train_unet', 'straight_train_unet'))
    assert 'stage unet is finished (12 of 12 steps); raise unet_steps' in capsys.readouterr().out
    made_runs.call(*script_of('train_unet', 'raised', '--unet_steps', '4'))
    made_runs.call(*script_of('train_unet', 'raised', '--unet_steps', '7'))
    rows = made_runs.curve('result/raised/loss_curve_unet.csv')
    assert [row[0] for row in rows] == ['step', *map(str, range(7))]
    assert [row[0] for row in made_runs.curve('result/raised/validation_unet.csv')] == ['step', '0', '4', '6', '7']


@pytest.mark.parametrize('stage', STAGES)
def test_a_changed_batch_size_is_refused_with_both_values(stage, base, monkeypatch):
    monkeypatch.chdir(base)
    before = {p: p.read_bytes() for p in Path('result', f'straight_{stage}').glob('*.pth.tar')}
    with pytest.raises(Exception, match='trained with batch_size = 2, now it is 3.*--restart') as caught:
        made_runs.call(*script_of(stage, f'straight_{stage}', '--batch_size', '3'))
    assert caught.value.one_sentence and '\n' not in str(caught.value)
    del caught
    assert {p: p.read_bytes() for p in before} == before


def test_the_settings_of_earlier_stages_are_never_compared(base, monkeypatch):
    monkeypatch.chdir(base)
    made_runs.call(*script_of('post_train', 'other', '--aae_lr', '0.5', '--lr', '0.5', '--unet_channels', '(16, 16)'))
    parts = [made_runs.loaded(f'result/{exp}/last_post.pth.tar')['parts'] for exp in ('other', 'straight_post_train')]
    assert made_runs.differences(parts[0]['trained'], parts[1]['trained']) == []


def test_a_unet_of_another_autoencoder_is_refused(base, monkeypatch):
    monkeypatch.chdir(base)
    made_runs.call(*script_of('train_aae', 'mixed', '--seed', '5'))
    made_runs.call(*script_of('train_unet', 'mixed'))
    made_runs.call(*script_of('train_aae', 'mixed', '--seed', '6', '--restart'))
    for script in ('post_train', 'infer'):
        with pytest.raises(Exception, match='was trained on another autoencoder') as caught:
            made_runs.call(*script_of(script, 'mixed'))
        assert caught.value.one_sentence
        del caught


# Counted from where a stage's loop begins: the start of a process, most of such a short run, would be waste.
AFTER_SECONDS = KILL + '''
import stage, threading
resume = stage.Stage.resume
def watched(self, *args, **parts):
    threading.Timer({seconds}, kill).start()
    return resume(self, *args, **parts)
stage.Stage.resume = watched'''


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_ten_kills_at_random_moments(stage, base, monkeypatch):
    monkeypatch.chdir(base)
    exp, rng, kills = f'random_{stage}', random.Random(stage), 0
    whole = made_runs.loaded(f'result/straight_{stage}/last_{FILES[stage]}.pth.tar')['state']['seconds']
    for attempt in range(100):
        seconds = whole * rng.uniform(0, 1.2)
        before = AFTER_SECONDS.format(seconds=seconds) if kills < 10 else ''
        run = made_runs.process(*script_of(stage, exp), before=before)
        kills += run.returncode == -signal.SIGKILL
        assert run.returncode in (0, -signal.SIGKILL), run.stderr
        if run.returncode == 0:
            compare(stage, exp)
            if kills >= 10:
                return
            Path('result', exp).rename(Path('result', f'{exp}_{attempt}'))  # it was too quick: begin anew
    raise AssertionError(f'killed only {kills} times')
