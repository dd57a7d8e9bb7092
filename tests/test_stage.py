"""One stage's files: lock, curves, resuming, what stops it, what it keeps aside."""
import csv
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_data
import pytest
import torch
from torch import nn

import config
import optim
import stage as room
import utils
from stage import CsvLog, Stage, subject_keys
from utils import RunError

FOLDER = Path('result/exp_1')
METRICS = ['psnr', 'ssim']


def settings(*words):
    return config.load('', argv=['--eval_every', '4', '--save_every', '2', *words], extra={'restart': (False, '')})


class Loop:
    """A stage with a network of one number and a loop like the training scripts': what Stage promises them."""

    def __init__(self, *words, steps=8, loss=lambda step: 1.0, before=None, fixed=()):
        utils.seed_everything(0)
        self.cfg, self.run = settings(*words), utils.Run('cpu', 'fp32')
        self.net = nn.Linear(1, 1)
        self.opt, self.ema = optim.make('adam', [(self.net, 1)]), utils.EMA(self.net, 0.9)
        self.stage = Stage(self.run, self.cfg, 'unet', ('task', 'seed', 'batch_size', 'lr', *fixed), lists=7)
        try:
            self.train(steps, loss, before)
        finally:
            self.stage.lock.close()

    def train(self, steps, loss, before):
        epoch = 3 * self.cfg.batch_size  # samples
        self.going = self.stage.resume(steps, ['loss', 'grad_norm'], METRICS, epoch, unet=self.net, opt=self.opt,
                                       ema=self.ema, scaler=self.run.scaler)
        if self.going:
            self.stage.describe('a network of one number')
        self.seen = []
        for step in range(self.stage.step, steps + 1) if self.going else ():
            if self.stage.must_evaluate(step):
                row = dict(psnr=20.0 + step if step != 4 else 99.0, ssim=0.5)
                if self.stage.validated(step, row, score=row['psnr']):
                    self.stage.save_best(net=self.ema.net.state_dict())
            self.stage.save_if_due(step)
            if step == steps:
                break
            if before:
                before(self, step)
            self.seen.append(step)
            utils.seed_everything(0, 0, step)
            out = self.net(torch.randn(3, 1)).square().mean(1)
            self.run.backward(out.mean())
            utils.set_lr(self.opt, 0.1)
            norm = self.run.update(self.opt, 1.0)
            self.run.scaler_step()
            self.ema.update(self.net, step)
            value = torch.tensor(loss(step))
            self.stage.record(step, 0.1, lambda: ['sub-1', 'sub-2', 'sub-3'], loss=value, grad_norm=norm)
        if self.going:
            self.stage.close()


def rows(name):
    with open(FOLDER / name, newline='') as f:
        return list(csv.DictReader(f))


# ------------------------------------------------------------------------------------------------------------------
# Curves

def test_csv_log_drops_rows_at_or_after_the_step_and_half_a_row():
    log = CsvLog('a.csv', ['step', 'loss'], 0)
    log.add([dict(step=s, loss=s / 3, other=1) for s in range(5)])
    with open('a.csv', 'a') as f:
        f.write('5')  # what a killed run may leave
    again = CsvLog('a.csv', ['step', 'loss'], 3)
    assert Path('a.csv').read_text().split() == ['step,loss', '0,0', '1,0.333333', '2,0.666667']
    again.add([dict(step=3, loss=1.0)])
    assert Path('a.csv').read_text().split()[-1] == '3,1'
    CsvLog('a.csv', ['step', 'loss'], 0)
    assert Path('a.csv').read_text().split() == ['step,loss']


def test_what_a_stage_writes():
    Loop()
    assert [r['step'] for r in rows('loss_curve_unet.csv')] == [str(s) for s in range(8)]
    assert list(rows('loss_curve_unet.csv')[0]) == ['step', 'epoch', 'lr', 'loss', 'grad_norm', 'seconds']
    assert [r['epoch'] for r in rows('loss_curve_unet.csv')] == [str(s // 3) for s in range(8)]
    assert [(r['step'], r['psnr']) for r in rows('validation_unet.csv')] == [('0', '20'), ('4', '99'), ('8', '28')]
    best = utils.load_checkpoint(FOLDER / 'CHECKPOINT_Unet.pth.tar', 'unet')
    assert best['step'] == 4 and best['validation'] == dict(psnr=99.0, ssim=0.5)
    last = utils.load_checkpoint(FOLDER / 'last_unet.pth.tar', 'last_unet')
    assert last['state']['step'] == 8 and set(last['parts']) == {'unet', 'opt', 'ema', 'scaler'}
    assert (FOLDER / 'config.json').exists() and (FOLDER / 'git.txt').read_text().strip()
    text = (FOLDER / 'log.txt').read_text()
    assert 'eval_every = 4 (command line)' in text and 'a network of one number' in text
    assert 'stage unet done: best at step 4 (psnr 99, ssim 0.5)' in text


# ------------------------------------------------------------------------------------------------------------------
# Resuming

class Stop(Exception):
    """In place of a kill."""


def stop_at(last):
    def before(loop, step):
        if step == last:
            raise Stop
    return before


@pytest.mark.parametrize('killed', [1, 2, 3, 4, 5, 7])
def test_a_stopped_stage_ends_as_one_that_was_not(killed):
    straight = Loop()
    curves = [[{k: v for k, v in r.items() if k != 'seconds'} for r in rows(name)]
              for name in ('loss_curve_unet.csv', 'validation_unet.csv')]
    straight_best = utils.load_checkpoint(FOLDER / 'CHECKPOINT_Unet.pth.tar', 'unet')
    for path in FOLDER.iterdir():
        path.unlink()
    with pytest.raises(Stop):
        Loop(before=stop_at(killed))
    resumed = Loop()
    assert resumed.seen[0] == 2 * (killed // 2) and resumed.seen[-1] == 7
    for a, b in ((straight.net, resumed.net), (straight.ema.net, resumed.ema.net)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    for x, y in zip(straight.opt.state.values(), resumed.opt.state.values(), strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)
    assert curves == [[{k: v for k, v in r.items() if k != 'seconds'} for r in rows(name)]
                      for name in ('loss_curve_unet.csv', 'validation_unet.csv')]
    best = utils.load_checkpoint(FOLDER / 'CHECKPOINT_Unet.pth.tar', 'unet')
    assert best['step'] == straight_best['step']
    assert all(torch.equal(best['net'][k], straight_best['net'][k]) for k in best['net'])


def test_a_finished_stage_says_so_and_goes_on_when_the_steps_are_raised(capsys):
    Loop()
    before = (FOLDER / 'last_unet.pth.tar').read_bytes()
    capsys.readouterr()
    again = Loop()
    assert not again.going and again.seen == [] and (FOLDER / 'last_unet.pth.tar').read_bytes() == before
    assert 'stage unet is finished (8 of 8 steps); raise unet_steps to go on' in capsys.readouterr().out
    assert Loop(steps=10).seen == [8, 9]
    assert [r['step'] for r in rows('validation_unet.csv')] == ['0', '4', '8', '10']


def test_fewer_steps_than_were_made_are_refused_unless_they_were_evaluated():
    class Stop(Exception):
        pass

    def stop(loop, step):
        if step == 7:
            raise Stop

    with pytest.raises(Stop):
        Loop(before=stop)                                # saved at 6, evaluated at 4
    before = (FOLDER / 'last_unet.pth.tar').read_bytes()
    with pytest.raises(RunError) as caught:
        Loop(steps=5)
    text = str(caught.value)
    assert 'is at step 6, beyond the 5 asked for' in text and 'unet_steps to 6 or more' in text
    assert (FOLDER / 'last_unet.pth.tar').read_bytes() == before
    assert not Loop(steps=4).going                       # that many were made and evaluated
    assert Loop(steps=6).seen == [] and [r['step'] for r in rows('validation_unet.csv')] == ['0', '4', '6']


def test_a_refused_run_leaves_the_settings_of_the_one_before():
    Loop()
    kept = (FOLDER / 'config.json').read_text()
    with pytest.raises(RunError):
        Loop('--lr', '0.5', steps=10)
    assert (FOLDER / 'config.json').read_text() == kept


def test_a_finished_stage_that_goes_on_keeps_what_later_stages_were_trained_on(capsys):
    Loop()
    Loop(steps=10)
    assert not list(FOLDER.glob('old_*'))
    (FOLDER / 'CHECKPOINT_Unet_post.pth.tar').write_bytes(b'trained on it')
    best = (FOLDER / 'CHECKPOINT_Unet.pth.tar').read_bytes()
    capsys.readouterr()
    Loop(steps=12)
    assert 'CHECKPOINT_Unet_post belong to CHECKPOINT_Unet as it was, which is kept in result/exp_1/old_1' in (
        capsys.readouterr().out)
    assert (FOLDER / 'old_1/CHECKPOINT_Unet.pth.tar').read_bytes() == best


def test_a_checkpoint_knows_whom_it_was_trained_on_without_names():
    class Trained(Loop):
        def train(self, *args):
            self.stage.builds_on(['sub-1', 'sub-2'], ['sub-3'], *([subject_keys('other', ['sub-9'])] if first else []))
            super().train(*args)

    first = True
    Trained()
    data = utils.load_checkpoint(FOLDER / 'CHECKPOINT_Unet.pth.tar', 'unet')
    root = settings().data_root
    assert set(data['trained_on']) == subject_keys(root, ['sub-1', 'sub-2']) | subject_keys('other', ['sub-9'])
    assert not any('sub' in key for key in data['trained_on'])
    first = False
    Trained(steps=12)  # goes on: what it was trained on before still counts
    again = utils.load_checkpoint(FOLDER / 'last_unet.pth.tar', 'last_unet')
    assert again['trained_on'] == data['trained_on']
    with Path(FOLDER / 'log.txt').open() as f:
        assert 'validation subjects are training' not in f.read()
    one = Stage(utils.Run('cpu', 'fp32'), settings('--exp', 'other'), 'unet', ())
    one.builds_on(['sub-1'], ['sub-2', 'sub-3'], data['trained_on'])
    said = Path('result/other/log.txt').read_text()
    assert '1 of the 2 validation subjects are training subjects of the networks' in said
    one.lock.close()


def test_a_stage_may_begin_anew_with_its_own_weights():
    Loop()
    best = utils.load_checkpoint(FOLDER / 'CHECKPOINT_Unet.pth.tar', 'unet')
    stage = Stage(utils.Run('cpu', 'fp32'), config.load('', argv=['--pretrained', 'exp_1', '--restart'],
                                                        extra={'restart': (False, '')}), 'unet', ())
    net = nn.Linear(1, 1)
    (path, data), _ = stage.pretrained, stage.lock.close()
    assert path == FOLDER / 'CHECKPOINT_Unet.pth.tar' and not path.exists() and data['step'] == best['step']
    utils.load_weights(net, data['net'], path)


@pytest.mark.parametrize('words, old, new', [(('--batch_size', '5'), str(config.batch_size), '5'),
                                             (('--seed', '3'), '0', '3'), (('--lr', '0.5'), str(config.lr), '0.5')])
def test_a_changed_fixed_setting_is_refused_with_both_values(words, old, new):
    Loop()
    with pytest.raises(RunError) as caught:
        Loop(*words, steps=10)
    text = str(caught.value)
    assert f'last_unet.pth.tar was trained with {words[0][2:]} = {old}, now it is {new};' in text
    assert '--restart' in text and '\n' not in text
    assert [r['step'] for r in rows('loss_curve_unet.csv')] == [str(s) for s in range(8)]  # nothing was touched


def test_a_run_from_before_a_setting_goes_on_as_without_it():
    Loop()  # its file says nothing of trim
    with pytest.raises(RunError, match='trim = False, now it is True'):
        Loop('--trim', 'True', steps=10, fixed=('trim',))
    assert Loop('--trim', 'False', steps=10, fixed=('trim',)).seen == [8, 9]


def test_what_an_older_file_says_by_another_name_or_not_at_all():
    Loop()
    path = FOLDER / 'last_unet.pth.tar'
    data = torch.load(path)
    for name in ('resample', 'mask', 'lesion'):  # which older ones do not say
        del data['fixed'][name]
    torch.save(data | dict(fixed=data['fixed'] | dict(w_lesion=0.3)), path)
    fixed = ('regression_w_lesion',)
    with pytest.raises(RunError, match='regression_w_lesion = 0.3, now it is 0.0'):
        Loop(steps=10, fixed=fixed)
    with pytest.raises(RunError, match='predict = None'):
        Loop('--regression_w_lesion', '0.3', steps=10, fixed=(*fixed, 'predict'))
    assert Loop('--regression_w_lesion', '0.3', '--mask', 'None', steps=10, fixed=fixed).seen == [8, 9]
    with pytest.raises(RunError, match='resample = False, now it is True'):
        Loop('--regression_w_lesion', '0.3', '--mask', 'None', '--resample', 'True', steps=12, fixed=fixed)


def test_a_resumed_run_has_masks_and_lesions_as_before():
    Loop()
    for name, what in (('mask', 'a template for masks'), ('lesion', 'a template for lesions')):
        with pytest.raises(RunError, match=f'was trained with {what} = True, now it is False'):
            Loop(f'--{name}', 'None', steps=10)
    assert Loop('--mask', '{root}/other/{id}.nii', steps=10).seen == [8, 9]


def test_free_settings_may_change():
    Loop()
    words = ('--eval_every', '3', '--save_every', '1', '--num_steps', '9', '--sampler', 'ddim')
    assert Loop(*words, steps=10).seen == [8, 9]


def test_restart_keeps_the_old_run_aside(capsys):
    Loop()
    (FOLDER / 'CHECKPOINT_AAE.pth.tar').write_bytes(b'of another stage')
    old = {name: (FOLDER / name).read_bytes() for name in
           ('last_unet.pth.tar', 'CHECKPOINT_Unet.pth.tar', 'loss_curve_unet.csv', 'validation_unet.csv')}
    assert Loop('--restart', '--batch_size', '5').seen == list(range(8))  # and now another batch_size is fine
    assert {name: (FOLDER / 'old_1' / name).read_bytes() for name in old} == old
    assert (FOLDER / 'CHECKPOINT_AAE.pth.tar').exists() and 'kept in' in capsys.readouterr().out
    Loop('--restart')
    assert (FOLDER / 'old_2' / 'last_unet.pth.tar').exists()


# ------------------------------------------------------------------------------------------------------------------
# What stops it

def saved():
    return {path.name: path.read_bytes() for path in FOLDER.glob('*.pth.tar')}


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(bad):
    files = {}

    def before(loop, step):
        if step == 6:
            files.update(saved())

    with pytest.raises(RunError) as caught:
        Loop(before=before, loss=lambda step: [1.0, bad, 1.0] if step == 6 else [1.0] * 3)
    text = str(caught.value)
    assert "stage unet, step 6: 'loss' is not finite (subjects sub-2)" in text and '\n' not in text
    assert files and saved() == files  # as they were before the step that failed
    assert [r['step'] for r in rows('loss_curve_unet.csv')] == [str(s) for s in range(6)]


def test_a_gradient_that_is_not_finite_stops_it_too():
    def before(loop, step):
        if step == 3:
            loop.net.weight.grad = torch.full_like(loop.net.weight, float('nan'))

    with pytest.raises(RunError, match=r"step 3: 'grad_norm' is not finite \(subjects sub-1, sub-2, sub-3\)"):
        Loop(before=before)
    assert utils.load_checkpoint(FOLDER / 'last_unet.pth.tar', 'last_unet')['state']['step'] == 2


def test_a_full_disk_while_saving_leaves_the_last_good_file(monkeypatch):
    Loop()
    before, save = saved(), torch.save

    def full(data, f):
        f.write(b'x' * 100)
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(utils.torch, 'save', full)
    with pytest.raises(SystemExit) as caught:
        utils.cli(lambda: Loop(steps=12))
    text = str(caught.value.code)
    assert text == (f'{FOLDER}/last_unet.pth.tar: No space left on device; '
                    'free some space and run the same command again')
    assert saved() == before and not list(FOLDER.glob('*.tmp'))
    monkeypatch.setattr(utils.torch, 'save', save)
    assert Loop(steps=12).seen[0] == 8  # and it goes on from there


def test_a_full_disk_while_logging_is_one_sentence_too(monkeypatch):
    def full(path, mode='r', **more):
        return open('/dev/full' if str(path).endswith('loss_curve_unet.csv') and 'a' in mode else path, mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(room, 'open', full, raising=False)
        with pytest.raises(SystemExit) as caught:
            utils.cli(Loop)
    assert str(caught.value.code).startswith(f'{FOLDER}/loss_curve_unet.csv: No space left on device; free some space')
    assert Loop().seen[-1] == 7


HOLD = '''import os, pathlib, stage, time
held = stage.lock(pathlib.Path("result/exp_1"))
child = os.fork()  # as a loading process, which outlives its parent for a while
if child: print(child, flush=True)
time.sleep(60)'''


def test_a_second_run_in_the_same_folder_is_refused_and_the_lock_dies_with_its_process():
    holder = subprocess.Popen([sys.executable, '-c', HOLD], stdout=subprocess.PIPE, text=True)
    try:
        child = int(holder.stdout.readline())
        with pytest.raises(RunError, match='result/exp_1 is in use by another run'):
            room.lock(FOLDER)
    finally:
        holder.kill()
        holder.wait()
    room.lock(FOLDER).close()
    os.kill(child, signal.SIGKILL)
    with room.lock(FOLDER), pytest.raises(RunError, match='in use'):
        settings_stage()


def settings_stage():
    return Stage(utils.Run('cpu', 'fp32'), settings(), 'unet', ())


def test_git_state_says_the_commit_or_why_not(monkeypatch):
    assert room.git_state()
    monkeypatch.setenv('PATH', '')
    assert room.git_state() == 'git is not installed'


def test_nan_in_a_real_run_names_the_subject(monkeypatch, capsys):
    """The autoencoder's script on made subjects, one of whose cached images turns to NaN."""
    import dataset
    import train_aae
    made_data.write_stroke('data')
    get = dataset.Cohort.__getitems__

    def spoiled(self, indices):
        batch = get(self, indices)
        if len(batch['index']) == 2:  # a training batch
            for row, index in enumerate(batch['index'].tolist()):
                if self.id_of(index) == 's02':
                    batch['target'][row] = float('nan')
        return batch

    monkeypatch.setattr(dataset.Cohort, '__getitems__', spoiled)
    words = ['--data_root', 'data', '--data_info', 'data/data_info', '--image_size', '(16, 20)', '--frames', '6',
             '--spacing', '(None, None, None)', '--aae_channels', '(8, 8, 8)', '--disc_channels', '(8, 8)',
             '--aae_steps', '10', '--batch_size', '2', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', ['train_aae.py', *words])
    start = time.time()
    with pytest.raises(SystemExit) as caught:
        utils.cli(train_aae.main)
    text = str(caught.value.code)
    assert "stage aae, step " in text and "' is not finite (subjects s02)" in text
    assert time.time() - start < 60
