"""Two processes under torchrun do what one does with twice the batch, and only one of them writes."""
import csv
import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import made_data
import made_runs
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

pytestmark = pytest.mark.slow

# The noise of a step is keyed by the process. Here it is a function of the sample instead, so that both ways of
# running draw the same; and plain gradient descent, which does not blow up the rounding of tiny gradients.
WRAPPER = '''
import json, sys, torch, diffusion, made_runs, optim, stage, utils
diffusion.Diffusion.draw = lambda self, batch, device, share=None: torch.full((batch,), 600, device=device)
torch.randn_like = lambda z: 1.5 * torch.sin(7 * z + 1)
def descent(kind, nets, precision=''):
    groups = [dict(params=list(net.parameters()), lr_scale=scale) for net, scale in nets]
    return torch.optim.SGD(groups, lr=0.0)
optim.make = descent
save, stop = stage.Stage.save_if_due, sys.argv[1]
class Stop(Exception): pass
def watched(self, step):
    save(self, step)
    if step == 2 and self.cfg.exp.startswith(stop): raise Stop
stage.Stage.save_if_due = watched
for words in json.loads(sys.argv[2]):
    try:
        made_runs.call(*words)
    except Stop:
        pass
    if utils.dist.is_initialized(): utils.dist.barrier()
if utils.dist.is_initialized(): utils.dist.destroy_process_group()
'''
WORDS = (*made_runs.STROKE, *made_runs.steps(4), '--precision', 'fp32', '--flip', 'False', '--shift', '0',
         '--lr', '0.2', '--post_lr', '0.2', '--regression_lr', '0.2', '--aae_lr', '0.002', '--label_drop', '0.0',
         '--eval_batch', '2')
SCRIPTS = dict(aae=('train_aae',), unet=('train_unet',), post=('post_train',),
               regression=('train_unet', '--regression', 'True'), infer=('infer',))
STAGES = tuple(SCRIPTS)[:4]


def words(name, exp, batch, *more):
    script, *mode = SCRIPTS[name]
    return [script, *WORDS, *mode, '--exp', exp, '--batch_size', str(batch), *more]


def launch(count, *commands, stop='-'):
    """Scripts one after the other in the same processes, whose start is most of the time; experiments whose name begins
    with `stop` end at step 2."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}'] if count > 1 else []
    path = os.pathsep.join([str(made_runs.REPO / 'tests'), os.environ['PYTHONPATH']])
    run = subprocess.run([sys.executable, *torchrun, 'wrapper.py', stop, json.dumps(commands)],
                         capture_output=True, text=True, timeout=900, env=dict(os.environ, PYTHONPATH=path))
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def weights(path):
    """All tensors of the networks and averages in a last_ file, by name."""
    found = {}

    def walk(value, name):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f'{name}/{key}')

    for part, state in made_runs.loaded(path)['parts'].items():
        if 'opt' not in part:
            walk(state, part)
    return found


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder of experiments: `one` (one process, batch 4) and `two` (two processes, batch 2), all scripts; `step_1`,
    `step_2`, one large step of each stage from the same weights; `up_<stage>`, begun by one process and ended by two,
    `down_<stage>` the other way round, and `grown_unet`, whose effective batch doubles."""
    with made_runs.folder(tmp_path_factory.mktemp('torchrun')) as path:
        made_data.write_stroke('data', ids=('s01', 's02', 's03', 's04', 's05', 's06'))
        ids = [f's0{i}' for i in range(1, 7)]
        made_data.write_lists('data/data_info', ids[:2], ids[2:4], ids[4:])
        Path('wrapper.py').write_text(WRAPPER)
        said, from_one = [], ('--init_from', 'one')
        step = (*from_one, *made_runs.steps(1), '--warmup', '1', '--lr', '1', '--post_lr', '1', '--grad_clip', '1e9')
        said.append(launch(1, *[words(name, 'one', 4) for name in SCRIPTS],
                           *[words(name, f'step_1_{name}', 4, *step) for name in STAGES],
                           *[words(name, f'up_{name}', 4, *from_one) for name in STAGES], stop='up'))
        said.append(launch(2, *[words(name, 'two', 2) for name in SCRIPTS],
                           *[words(name, f'step_2_{name}', 2, *step) for name in STAGES],
                           *[words(name, f'up_{name}', 2, *from_one) for name in STAGES],
                           *[words(name, f'down_{name}', 2, *from_one) for name in STAGES], stop='down'))
        said.append(launch(1, *[words(name, f'down_{name}', 4, *from_one) for name in STAGES],
                           words('unet', 'grown_unet', 2, *from_one), stop='grown'))
        said.append(launch(2, words('unet', 'grown_unet', 2, *from_one)))
        yield path, said


@pytest.mark.parametrize('stage', STAGES)
def test_weights_after_a_few_steps_are_those_of_one_process(stage, runs):
    one, two = (weights(runs[0] / 'result' / exp / f'last_{stage}.pth.tar') for exp in ('one', 'two'))
    assert set(one) == set(two) and len(one) > 20
    moved = 0.0
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f'{n}: {text}')
        average = name.replace(name.split('/')[0], 'ema', 1)
        if average in one and not name.startswith('ema'):
            moved = max(moved, float((one[name] - one[average]).abs().max()))
    assert moved > 1e-3  # and they have gone somewhere


@pytest.mark.parametrize('stage', STAGES)
def test_curves_are_those_of_one_process_and_each_row_is_written_once(stage, runs):
    for kind, steps in (('loss_curve', ['0', '1', '2', '3']), ('validation', ['0', '2', '4'])):
        one, two = (made_runs.curve(runs[0] / 'result' / exp / f'{kind}_{stage}.csv') for exp in ('one', 'two'))
        assert [row[0] for row in one[1:]] == [row[0] for row in two[1:]] == steps
        for a, b in zip(one[1:], two[1:], strict=True):
            np.testing.assert_allclose([float(x or 'nan') for x in a], [float(x or 'nan') for x in b], rtol=2e-3,
                                       atol=2e-4)


def test_inference_shares_the_subjects_and_loses_none(runs):
    path, said = runs
    tables = []
    for exp in ('one', 'two'):
        with open(path / 'result' / exp / 'test.csv', newline='') as f:
            tables.append(list(csv.DictReader(f)))
    assert [row['ID'] for row in tables[0]] == [row['ID'] for row in tables[1]] == ['s05', 's06']
    names = [{p.name for p in (path / 'result' / exp).glob('test*')} for exp in ('one', 'two')]
    assert names[0] == names[1]
    for image in (path / 'result/one/pred').rglob('*.nii.gz'):
        a = np.asanyarray(nib.load(image).dataobj)
        b = np.asanyarray(nib.load(str(image).replace('/one/', '/two/')).dataobj)
        assert np.abs(a - b).max() <= 1e-3 * np.ptp(a)  # both 0 where the lesion rule finds nothing


def test_from_equal_weights_rows_gradients_and_latent_statistics_are_equal(runs):
    for name in STAGES:
        one, two = (runs[0] / 'result' / f'step_{count}_{name}' for count in (1, 2))
        for file in (f'validation_{name}.csv', f'loss_curve_{name}.csv'):
            a, b = (np.array([float(x or 'nan') for x in made_runs.curve(exp / file)[1]]) for exp in (one, two))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(one / file))
        a, b = (weights(exp / f'last_{name}.pth.tar') for exp in (one, two))  # a step of length 1 or 0.01: the gradient
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5, msg=lambda text, n=key: f'{n}: {text}')
    a, b = (made_runs.loaded(runs[0] / f'result/step_{count}_aae/CHECKPOINT_AAE.pth.tar')['net'] for count in (1, 2))
    for key in ('latent_mean', 'latent_std'):
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)
    assert float((a['latent_std'] - 1).abs().min()) > 1e-3


@pytest.mark.parametrize('name', STAGES)
@pytest.mark.parametrize('way', ['up', 'down'])
def test_a_run_goes_on_with_another_number_of_processes(way, name, runs):
    """From one to two processes with half the batch each, and back: as if nothing had been changed."""
    exp = runs[0] / 'result' / f'{way}_{name}'
    one, mixed = (weights(path / f'last_{name}.pth.tar') for path in (runs[0] / 'result/one', exp))
    for key in one:
        torch.testing.assert_close(one[key], mixed[key], rtol=1e-4, atol=1e-5, msg=lambda text, n=key: f'{n}: {text}')
    for kind in ('loss_curve', 'validation'):
        a, b = (made_runs.curve(path / f'{kind}_{name}.csv') for path in (runs[0] / 'result/one', exp))
        assert [row[:2 - (kind == 'validation')] for row in a] == [row[:2 - (kind == 'validation')] for row in b]
    text, processes = (exp / 'log.txt').read_text(), dict(up='1 process before, 2', down='2 processes before, 1')
    assert text.count(f'{processes[way]} now: effective batch 4 before, 4 now') == 1 and 'at step 2 of 4' in text


def test_the_effective_batch_may_change_and_is_said(runs):
    exp = runs[0] / 'result/grown_unet'
    assert '1 process before, 2 now: effective batch 2 before, 4 now' in (exp / 'log.txt').read_text()
    last = made_runs.loaded(exp / 'last_unet.pth.tar')
    assert last['processes'] == 2 and last['state']['samples'] == 2 * 2 + 2 * 4
    assert [row[0] for row in made_runs.curve(exp / 'loss_curve_unet.csv')] == ['step', '0', '1', '2', '3']


def test_images_do_not_depend_on_the_number_of_processes(runs):
    """One checkpoint, noise at every step: two processes give the images, intervals and figures of one."""
    path = runs[0]
    with made_runs.folder(path):
        for count, batch in ((1, '32'), (2, '2')):
            more = '--init_from', 'one', '--sampler', 'ddpm', '--num_steps', '4', '--samples', '2'
            launch(count, words('infer', f'by_{count}', 2, *more, '--eval_batch', batch))
    pair = path / 'result/by_1', path / 'result/by_2'
    files = sorted(str(p.relative_to(pair[0])) for p in (pair[0] / 'pred').rglob('*.nii.gz'))
    files = [name for name in files if 'half_90' not in name and 'lesion_rule' not in name]
    assert len(files) == 2 * (2 * 2 + 1)         # two subjects: image and std of each target, lesion probability
    for name in files:
        a, b = (np.asanyarray(nib.load(folder / name).dataobj) for folder in pair)
        size = np.ptp(np.asanyarray(nib.load(pair[0] / name.replace('_std', '')).dataobj))
        assert np.abs(a - b).max() <= 1e-5 * size and np.ptp(a) > 1e-3 * size, name
    one, two = (pd.read_csv(folder / 'test.csv').drop(columns='seconds') for folder in pair)
    pd.testing.assert_frame_equal(one, two, rtol=2e-4, atol=1e-4)


def test_log_says_two_processes_and_speaks_once(runs):
    for count, text in zip((1, 2, 1, 2), runs[1], strict=True):
        scripts = text.count('device cpu (')
        assert scripts == text.count(f'{count} process') - text.count(f'{count} process before') > 0
    text = (runs[0] / 'result/two/log.txt').read_text()
    assert text.count('2 processes') == len(STAGES) and text.count('effective batch 4') >= 3
    assert text.count('stage unet done') == 1


FAIL = '''import utils
update = utils.EMA.update
def watched(self, net, step):
    if step == 1: raise utils.RunError('process 1 has met a fault')
    update(self, net, step)
utils.EMA.update = watched'''


def test_when_one_process_fails_each_says_one_sentence(runs, monkeypatch):
    """As torchrun starts them, but without the list of places that torchrun itself prints when a process fails."""
    monkeypatch.chdir(runs[0])
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    script, *more = words('unet', 'failing', 2, '--init_from', 'one')

    def start(rank):
        env = dict(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        return made_runs.forked(script, *more, before=FAIL * rank, env=env)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, range(2)))
    said = [re.split('[\r\n]', run.stderr.strip())[-1].strip() for run in done]
    assert said == ['another process of this run has stopped; its sentence says why', 'process 1 has met a fault']
    assert all(run.returncode == 1 and 'Traceback' not in run.stderr for run in done)
