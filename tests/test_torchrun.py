"""Two processes under torchrun do what one does with twice the batch, and only one of them writes."""
import csv
import subprocess
import sys
from pathlib import Path

import made_data
import made_runs
import nibabel as nib
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

# The noise of a step is keyed by the process. Here it is a function of the sample instead, so that both ways of
# running draw the same; and plain gradient descent, which does not blow up the rounding of tiny gradients as Adam does.
WRAPPER = '''
import runpy, sys, torch, diffusion, utils
diffusion.Diffusion.draw = lambda self, batch, device, share=None: torch.full((batch,), 600, device=device)
torch.randn_like = lambda z: 1.5 * torch.sin(7 * z + 1)
utils.adam = lambda params, **more: torch.optim.SGD(params, lr=0.0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''
WORDS = (*made_runs.STROKE, *made_runs.steps(4), '--precision', 'fp32', '--flip', 'False', '--shift', '0',
         '--lr', '0.2', '--post_lr', '0.2', '--aae_lr', '0.002', '--label_drop', '0.0', '--eval_batch', '2')
STAGES = dict(aae=('train_aae',), unet=('train_unet',), post=('post_train',),
              regression=('train_unet', '--regression', 'True'))


def launch(count, script, *words):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}'] if count > 1 else []
    run = subprocess.run([sys.executable, *torchrun, 'wrapper.py', str(made_runs.REPO / f'{script}.py'), *words],
                         capture_output=True, text=True, timeout=300)
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
    """Experiments `one` (one process, batch 4) and `two` (two processes, batch 2): all stages, and inference."""
    with made_runs.folder(tmp_path_factory.mktemp('torchrun')) as path:
        made_data.write_stroke('data', ids=('s01', 's02', 's03', 's04', 's05', 's06'))
        ids = [f's0{i}' for i in range(1, 7)]
        made_data.write_lists('data/data_info', ids[:2], ids[2:4], ids[4:])
        Path('wrapper.py').write_text(WRAPPER)
        said = []
        for count, exp, batch in ((1, 'one', '4'), (2, 'two', '2')):
            for script, *more in [*STAGES.values(), ('infer',)]:
                said.append(launch(count, script, *WORDS, *more, '--exp', exp, '--batch_size', batch))
    return path, said


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
        assert np.abs(a - b).max() < 1e-3 * np.ptp(a)
    for text in said:
        assert text.count('device cpu (') == 1  # one process speaks


def test_log_says_two_processes_and_speaks_once(runs):
    text = (runs[0] / 'result/two/log.txt').read_text()
    assert text.count('2 processes') == len(STAGES) and text.count('effective batch 4') >= 3
    assert text.count('stage unet done') == 1
