"""The same scripts on a CUDA device: every stage and precision runs, and what comes out is what a CPU computes."""
import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import made_data
import made_runs
import nibabel as nib
import numpy as np
import pytest
import torch

import optim
import prior
import timing
import utils

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')

TASKS = dict(stroke=(made_runs.STROKE, 'exp_1', ('dwi', 'adc')),
             amyloid=(made_runs.AMYLOID, 'exp_mri2pet_demo', ('suvr',)))
ON_CUDA = '--device', 'cuda'
STAGES = ('train_aae',), ('train_unet',), ('train_unet', '--regression', 'True'), ('post_train',)


def make_data(task):
    made_data.write_stroke() if task == 'stroke' else made_data.write_amyloid()


def train(words, steps, *more):
    """All stages; each is resumed where steps names more than one number."""
    for script, *mode in STAGES:
        for n in steps:
            made_runs.call(script, *words, *made_runs.steps(n), *ON_CUDA, *mode, *more)


def images(exp, targets):
    return {path.parent.name + '/' + name: nib.load(path).get_fdata() for name in targets
            for path in sorted(Path('result', exp, 'pred').glob(f'*/{name}.nii.gz'))}


def finite(exp):
    """All values of all loss curves."""
    values = [float(v) for path in Path('result', exp).glob('loss_curve_*.csv') for row in csv.DictReader(open(path))
              for v in row.values()]
    return len(values) > 0 and all(map(math.isfinite, values))


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('sampling', [('--sampler', 'one_step'), ('--sampler', 'ddim', '--num_steps', '5'),
                                      ('--sampler', 'ddpm', '--num_steps', '4', '--samples', '2')])
def test_an_image_of_the_gpu_is_that_of_the_cpu(task, sampling):
    words, exp, targets = TASKS[task]
    make_data(task)
    train(words, [6], '--precision', 'fp32')
    assert finite(exp)
    found = {}
    for device in ('cuda', 'cpu'):
        made_runs.call('infer', *words, '--precision', 'fp32', '--device', device, '--only_model', *sampling)
        found[device] = images(exp, targets)
    assert found['cpu'] and set(found['cpu']) == set(found['cuda'])
    for name, image in found['cpu'].items():
        scale = np.abs(image).max()
        assert scale > 0
        assert np.abs(image - found['cuda'][name]).max() < 2e-3 * scale, name


@pytest.mark.parametrize('precision', ['fp16', 'bf16'])
@pytest.mark.parametrize('task', TASKS)
def test_every_stage_trains_in_half_precision_and_resumes(task, precision):
    words, exp, targets = TASKS[task]
    make_data(task)
    crop = ('--crop', '(8, 8, 8)') if task == 'amyloid' else ()  # as the full-size preset has it
    train(words, [4, 8], '--precision', precision, '--checkpointing', 'True', '--accumulate', '2', *crop)
    assert finite(exp) or precision == 'fp16'  # the scaler skips a step whose gradient overflows
    for name in ('aae', 'unet', 'regression', 'post'):
        last = made_runs.loaded(f'result/{exp}/last_{name}.pth.tar')
        assert last['state']['step'] == 8
        assert all(torch.isfinite(v).all() for part in last['parts'].values() for v in part.values()
                   if isinstance(v, torch.Tensor) and v.is_floating_point())
    made_runs.call('infer', *words, *ON_CUDA, '--precision', precision)
    assert all(np.isfinite(image).all() for image in images(exp, targets).values())


@pytest.mark.parametrize('task', TASKS)
def test_an_image_in_bf16_is_that_in_fp32_but_for_rounding(task):
    words, exp, targets = TASKS[task]
    make_data(task)
    train(words, [6], '--precision', 'fp32')
    found = {}
    for precision in ('bf16', 'fp32'):
        made_runs.call('infer', *words, '--precision', precision, *ON_CUDA, '--only_model')
        found[precision] = images(exp, targets)
    assert found['fp32'] and set(found['fp32']) == set(found['bf16'])
    for name, image in found['fp32'].items():
        difference = np.abs(image - found['bf16'][name]).max() / dict(dwi=3, adc=3000, suvr=3)[name.split('/')[1]]
        assert 0 < difference < 0.04, name  # of the range; on a CPU 0.016, 0.015 and 0.003


def test_the_label_prior_of_the_gpu_is_that_of_the_cpu():
    run, net = utils.Run('cuda'), prior.LabelPrior(1, 2)  # where it is fast, products of matrices are rounded to TF32
    net.weight.normal_(generator=torch.Generator().manual_seed(0))
    source = torch.rand(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    there = net.to(run.device)(source.to(run.device)).cpu()
    assert there.std() > 0.01 and torch.allclose(net.cpu()(source), there, atol=1e-5)


def descent(kind, nets, precision=''):
    """Plain gradient descent in place of Muon and AdamW, which blow up the rounding of tiny gradients."""
    return torch.optim.SGD([dict(params=list(net.parameters()), lr_scale=scale) for net, scale in nets], lr=0.0)


def test_training_on_the_gpu_follows_training_on_the_cpu(monkeypatch):
    """The same draws and weights: after a few steps in fp32 the losses differ by rounding only."""
    monkeypatch.setattr(optim, 'make', descent)
    words = (*TASKS['stroke'][0], '--aae_lr', '0.002', '--regression_lr', '0.2')
    make_data('stroke')
    curves = {}
    for device in ('cuda', 'cpu'):
        for script, *mode in (('train_aae',), ('train_unet', '--regression', 'True')):
            made_runs.call(script, *words, *made_runs.steps(5), '--device', device, '--precision', 'fp32',
                           '--exp', device, *mode)
        curves[device] = [list(csv.DictReader(open(f'result/{device}/loss_curve_{name}.csv')))
                          for name in ('aae', 'regression')]
    for ours, theirs in zip(curves['cuda'], curves['cpu'], strict=True):
        assert len(ours) == len(theirs) == 5
        for a, b in zip(ours, theirs, strict=True):
            for key in set(a) - {'seconds'}:
                assert math.isclose(float(a[key]), float(b[key]), rel_tol=0.01, abs_tol=1e-4), (key, a, b)


def test_torchrun_on_the_gpu():
    """One process, which speaks to a group of NCCL all the same."""
    words, exp, _ = TASKS['stroke']
    make_data('stroke')
    for script, *mode in STAGES:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1',
                   str(made_runs.REPO / f'{script}.py'), *words, *made_runs.steps(3), *ON_CUDA, *mode]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
        assert run.returncode == 0, run.stderr[-2000:]
    assert finite(exp)


@pytest.mark.parametrize('stage', ['aae', 'unet', 'regression', 'post'])
@pytest.mark.parametrize('preset', ['ctp2dwi_demo', 'mri2pet_demo'])
def test_the_benchmark_times_a_step(preset, stage):
    row = timing.train_step(stage, preset, ('--device', 'cuda'), least=2, budget=0.1)
    assert row['precision'] == utils.Run('cuda').precision  # bf16 where the device is fast in it
    assert row['seconds_step'] > 0 and row['memory_mb'] > 10
