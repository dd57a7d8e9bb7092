"""What saves memory or time leaves the gradient as it is: accumulation, gradient checkpointing, loss scaling."""
import made_data
import made_runs
import pytest
import test_stage
import torch
from test_stage import Loop, Stop, stop_at

import dataset
import losses
import optim
import utils
from diffusion import Diffusion
from layers import recompute_blocks
from losses import post_training_error, reconstruction_l1
from model import AAE, PixelUNet, UNet

STAGES = dict(aae=('train_aae',), unet=('train_unet',), post=('post_train',),
              regression=('train_unet', '--regression', 'True'))


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A folder with made subjects of both tasks and, for each, an experiment `base`."""
    words = dict(stroke=made_runs.STROKE, amyloid=made_runs.AMYLOID)
    with made_runs.folder(tmp_path_factory.mktemp('gradients')) as path:
        for task, write in (('stroke', made_data.write_stroke), ('amyloid', made_data.write_amyloid)):
            with made_runs.folder(path / task):
                write('data')
                for script in ('train_aae', 'train_unet'):
                    made_runs.call(script, *words[task], *made_runs.steps(1), '--exp', 'base', '--precision', 'fp32')
    return path, words


def one_step(base, monkeypatch, task, stage, exp, *more):
    """Weights and curve after one step of plain gradient descent: the gradient, in other words."""
    path, words = base
    monkeypatch.chdir(path / task)
    monkeypatch.setattr(optim, 'make', lambda kind, nets, precision='': torch.optim.SGD(
        [dict(params=list(net.parameters()), lr_scale=scale) for net, scale in nets], lr=0.0))
    script, *mode = STAGES[stage]
    made_runs.call(script, *words[task], *made_runs.steps(1), *mode, '--exp', f'{exp}_{stage}', '--init_from', 'base',
                   '--precision', 'fp32', '--warmup', '1', '--lr', '1', '--post_lr', '1', '--aae_lr', '0.01',
                   '--grad_clip', '1e9', '--batch_size', '4', '--eval_every', '100', *more)
    parts = made_runs.loaded(f'result/{exp}_{stage}/last_{stage}.pth.tar')['parts']
    nets = {name: part for name, part in parts.items() if 'opt' not in name and name not in ('ema', 'scaler')}
    return nets, [float(x) for x in made_runs.curve(f'result/{exp}_{stage}/loss_curve_{stage}.csv')[1]]


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('task, setting', [('stroke', '--accumulate=2'), ('stroke', '--checkpointing=True'),
                                           ('amyloid', '--checkpointing=True')])
def test_the_same_step_with_less_memory(task, setting, stage, base, monkeypatch):
    plain, row = one_step(base, monkeypatch, task, stage, 'plain', '--restart')
    other, other_row = one_step(base, monkeypatch, task, stage, setting.strip('-').split('=')[0], setting)
    assert other_row == pytest.approx(row, rel=2e-5)
    for net in plain:
        for name, weight in plain[net].items():
            torch.testing.assert_close(other[net][name], weight, rtol=1e-4, atol=1e-5,
                                       msg=lambda s, n=name: f'{n}: {s}')


@pytest.mark.parametrize('dims', [2, 3])
def test_checkpointing_keeps_less_and_gives_the_same_gradient(dims):
    torch.manual_seed(0)
    size, more = (16, 24, 20)[:dims], {}
    nets = {'aae': (AAE(dims, 2, 3, (8, 8, 8), 2), (torch.randn(2, 2, *size),)),
            'detail': (PixelUNet(dims, 2, 2, True, (8, 8), 2), (torch.randn(2, 2, *size), torch.randn(2, 2, *size))),
            'unet': (UNet(dims, 3, 2, (8, 8), 1, (), 4, 8), (torch.randn(2, 3, *(n // 4 for n in size)),
                                                              torch.tensor([1, 7]), torch.randn(2, 2, *size)))}
    for name, (net, inputs) in nets.items():
        for weight in net.parameters():  # away from the zeros that they start with
            weight.data.add_(0.05 * torch.randn_like(weight))
        found = []
        for on in (False, True):
            recompute_blocks(net, on)
            net.checkpointing, kept = on, []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, k=kept: k.append(x.nbytes) or x, lambda x: x):
                out = net(*inputs, **more).square().mean()
            found.append((sum(kept), torch.autograd.grad(out, list(net.parameters()), allow_unused=True)))
        assert found[1][0] < 0.6 * found[0][0], f'{name} keeps {found[1][0]} bytes with, {found[0][0]} without'
        for a, b in zip(found[0][1], found[1][1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# fp16: what the loss scaler does, on a CPU

@pytest.fixture
def scaled(monkeypatch):
    """Every Run has the loss scaler of fp16."""
    init = utils.Run.__init__

    def with_scaler(self, device='cpu', precision='fp32'):
        init(self, device, precision)
        self.precision, self.scaler = 'fp16', torch.amp.GradScaler('cpu', init_scale=1024.0, growth_interval=3)
    monkeypatch.setattr(utils.Run, '__init__', with_scaler)


def overflow_at(last, before=None):
    """A gradient that overflows at a step."""
    def hook(loop, step):
        if step == last:
            handle = loop.net.weight.register_hook(lambda grad: handle.remove() or grad * float('inf'))
            loop.kept = [loop.net.weight.detach().clone(), int(loop.opt.state[loop.net.weight]['step'])]
        if step == last + 1:
            assert torch.equal(loop.net.weight, loop.kept[0])
            assert int(loop.opt.state[loop.net.weight]['step']) == loop.kept[1]
            assert loop.run.scaler.get_scale() == 1024  # 2048 after three good steps, halved
        if before:
            before(loop, step)
    return hook


def test_a_step_that_overflows_is_skipped_and_nothing_else(scaled):
    loop = Loop(before=overflow_at(3))
    assert torch.isfinite(loop.net.weight).all() and torch.isfinite(loop.ema.net.weight).all()
    norms = [row['grad_norm'] for row in test_stage.rows('loss_curve_unet.csv')]
    assert [norm in ('inf', 'nan') for norm in norms] == [step == 3 for step in range(8)]


def test_both_halves_of_muon_skip_it_too(scaled):
    run, net = utils.Run(), torch.nn.Conv2d(16, 16, 3)
    opt = optim.make('muon', [(net, 1)])
    utils.set_lr(opt, 0.01)
    for overflows in (False, True, False):
        before = [p.detach().clone() for p in net.parameters()]
        run.backward(net(torch.randn(2, 16, 8, 8)).square().mean())
        if overflows:
            net.bias.grad[3] = float('inf')
        run.update(opt, 1.0)
        run.scaler_step()
        assert [torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)] == [overflows] * 2


def test_the_loss_scale_is_saved_and_resumed(scaled):
    straight = Loop(before=overflow_at(3))
    for path in test_stage.FOLDER.iterdir():
        path.unlink()
    with pytest.raises(Stop):
        Loop(before=overflow_at(3, stop_at(7)))
    assert utils.load_checkpoint(test_stage.FOLDER / 'last_unet.pth.tar', 'last_unet')['parts']['scaler']['scale'] > 0
    resumed = Loop()
    assert resumed.seen[0] == 6 and torch.equal(resumed.net.weight, straight.net.weight)
    assert resumed.run.scaler.state_dict() == straight.run.scaler.state_dict()


def test_scaling_leaves_the_gradient_as_it_is(request):
    without = Loop()
    for path in test_stage.FOLDER.iterdir():
        path.unlink()
    request.getfixturevalue('scaled')
    torch.testing.assert_close(Loop().net.weight, without.net.weight, rtol=1e-6, atol=1e-7)


def test_endless_overflow_stops_the_run(scaled):
    def before(loop, step):
        loop.net.weight.register_hook(lambda grad: grad * float('inf'))

    with pytest.raises(utils.RunError, match='with fp16 the gradient stays infinite .*use --precision bf16 or fp32'):
        Loop('--eval_every', '100', '--save_every', '100', steps=40, before=before)


def test_losses_and_schedule_stay_in_float32():
    torch.manual_seed(0)
    image, mask = torch.randn(2, 1, 16, 16), torch.ones(2, 1, 16, 16)
    unet, diffusion = UNet(2, 3, 2, (8, 8), 1, (), 4, 8), Diffusion('v')
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast('cpu', dtype=dtype):
            assert unet.encode_source(torch.randn(2, 2, 16, 16)).dtype == dtype  # networks in half precision, but
            loss, z_0_hat = diffusion.loss(unet, torch.randn(2, 3, 4, 4), source=torch.randn(2, 2, 16, 16))
            pred = AAE(2, 1, 3, (8, 8, 8)).decode(z_0_hat).float()
        values = reconstruction_l1(pred, image, mask), *post_training_error(pred, image, mask, mask, 'l1')
        assert all(x.dtype == torch.float32 for x in (loss, z_0_hat, *values))
    assert diffusion.alpha_bar.dtype == torch.float64


def test_lapts_goal_is_the_reconstruction_of_stage_1_while_the_decoder_is_tuned(base, monkeypatch):
    path, words = base
    monkeypatch.chdir(path / 'stroke')
    images, goals, augment, error = [], [], dataset.augment, losses.post_training_error

    def augmented(*args):
        batch = augment(*args)
        images.append(batch['target'])
        return batch

    def recorded(pred, target, *args, **kwargs):
        goals.append(target)
        return error(pred, target, *args, **kwargs)

    monkeypatch.setattr(dataset, 'augment', augmented)
    monkeypatch.setattr(losses, 'post_training_error', recorded)
    made_runs.call('post_train', *words['stroke'], *made_runs.steps(3), '--exp', 'goal', '--init_from', 'base',
                   '--precision', 'fp32', '--post_loss', 'lapt', '--post_lr', '0.01', '--warmup', '1',
                   '--detail_branch', 'False')
    stage_1 = made_runs.loaded('result/base/CHECKPOINT_AAE.pth.tar')
    aae = AAE(**stage_1['args'])
    aae.load_state_dict(stage_1['net'])
    assert len(goals) == 3
    with torch.no_grad():
        for image, goal in zip(images, goals, strict=True):
            torch.testing.assert_close(goal, aae(image), rtol=1e-3, atol=1e-3)
