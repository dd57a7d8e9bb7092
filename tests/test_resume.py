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
WORDS = (*made_runs.STROKE, '--aae_channels', '(8, 16, 16)', '--unet_channels', '(16, 16)',  # wide enough for Muon
         *made_runs.steps(12), '--save_every', '5', '--init_from', 'base')

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
    killed = made_runs.forked(*script_of(stage, exp), before=MOMENTS[stage])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = made_runs.forked(*script_of(stage, exp))
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
    made_runs.call(*script_of('post_train', 'other', '--aae_lr', '0.5', '--lr', '0.5', '--unet_channels', '(8, 16)'))
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


# The nasty moments of a run; the script kills itself at the n-th of one kind.
MOMENTS_OF = KILL + """
import io, os, stage, torch
kind, left = {kind!r}, [{n}]
def moment(name):
    left[0] -= name == kind
    if not left[0]: kill()
save, replace, append, update, average = torch.save, os.replace, stage.append, utils.Run.update, utils.EMA.update
def in_two(text, f, name):
    f.write(text[:len(text) // 2]), f.flush()
    moment(name)
    f.write(text[len(text) // 2:])
def torch_save(data, f):
    save(data, whole := io.BytesIO())
    in_two(whole.getvalue(), f, 'inside a checkpoint')
def os_replace(a, b):
    moment('before a file is moved')
    replace(a, b)
    moment('after a file is moved')
def stage_append(path, write):
    write(text := io.StringIO(newline=''))
    append(path, lambda f: in_two(text.getvalue(), f, 'inside a row'))
    if path.suffix == '.csv': moment('between a row and its checkpoint')
def ema_update(self, net, step):
    moment('between optimiser and average')
    average(self, net, step)
torch.save, os.replace, stage.append, utils.EMA.update = torch_save, os_replace, stage_append, ema_update
"""
KINDS = ('inside a checkpoint', 'before a file is moved', 'after a file is moved', 'inside a row',
         'between a row and its checkpoint', 'between optimiser and average')


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_kills_at_ten_random_moments(stage, base, monkeypatch):
    """In every kind of nasty moment, with loading processes and without: in the end as if nothing had happened."""
    monkeypatch.chdir(base)
    exp, rng, kills = f'random_{stage}', random.Random(stage), []
    for attempt in range(60):
        kind = rng.choice(KINDS) if len(set(kills)) == len(KINDS) else rng.choice([k for k in KINDS if k not in kills])
        before = MOMENTS_OF.format(kind=kind, n=rng.randint(1, 8)) if len(kills) < 10 else ''
        run = made_runs.forked(*script_of(stage, exp, '--workers', str(rng.randint(0, 1))), before=before)
        assert run.returncode in (0, -signal.SIGKILL), run.stderr
        if run.returncode:
            kills.append(kind)
        else:
            compare(stage, exp)
            if len(kills) >= 10:
                assert set(kills) == set(KINDS)
                return
            Path('result', exp).rename(Path('result', f'{exp}_{attempt}'))  # that moment never came: begin anew
    raise AssertionError(f'killed only {len(kills)} times')
