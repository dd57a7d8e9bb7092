"""The optimisers: Muon against PyTorch's own for matrices, against the singular value decomposition, and by parts."""

import copy

import pytest
import torch
from torch import nn

import optim
import utils
from model import PixelUNet, UNet


@pytest.mark.parametrize('shape', [(3, 24, 60), (2, 60, 24), (1, 32, 32)])
def test_orthogonalise_brings_the_singular_values_near_one_and_keeps_the_singular_vectors(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    out = optim.orthogonalise(g)
    values = torch.linalg.svdvals(out)
    assert out.shape == g.shape and 0.6 < values[:, :-1].min() and values.max() < 1.3
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ out @ vt.mT                      # diagonal if the vectors are the same
    off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-3
    assert torch.equal(optim.orthogonalise(g), optim.orthogonalise(g))
    assert torch.allclose(optim.orthogonalise(g[:1]), out[:1], atol=1e-4)  # matrices of a batch do not mix
    assert torch.allclose(optim.orthogonalise(1e-4 * g), out, atol=1e-2)   # the scale of the gradient does not matter


@pytest.mark.parametrize('shape', [(3, 24, 60), (2, 60, 24), (1, 32, 32)])
def test_orthogonalise_is_the_newton_schulz_iteration(shape):
    g = torch.randn(shape)
    x = g.double() / g.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    assert torch.allclose(optim.orthogonalise(g).double(), x, atol=1e-4)


@pytest.mark.parametrize('shape', [(20, 50), (50, 20)])
def test_muon_is_pytorchs_muon_for_matrices(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = optim.Muon([ours], lr=0.02, weight_decay=0.01, dtype=torch.bfloat16)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01, momentum=0.95, nesterov=True, adjust_lr_fn='original')
    for _ in range(4):
        g = torch.randn(shape)
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert moved > 0.1 and (ours - theirs).norm() < 0.02 * moved  # theirs iterates in bf16, ours not on a CPU


def test_a_kernel_counts_as_the_matrix_of_its_outputs_whatever_its_memory_format():
    torch.manual_seed(0)
    start, g = torch.randn(16, 18, 3, 3), torch.randn(16, 18, 3, 3)
    as_matrix = nn.Parameter(start.flatten(1).clone())
    kernels = [nn.Parameter(start.clone()), nn.Parameter(start.clone().to(memory_format=torch.channels_last))]
    alone, as_matrix.grad = optim.Muon([as_matrix], lr=0.1), g.flatten(1)
    together = optim.Muon(kernels, lr=0.1)
    for p in kernels:
        p.grad = g.clone()
    alone.step()
    together.step()
    for p in kernels:
        assert torch.allclose(p.flatten(1), as_matrix, atol=1e-5)
    assert kernels[1].is_contiguous(memory_format=torch.channels_last)


def test_muon_takes_the_hidden_kernels_and_adamw_all_the_rest():
    unet = UNet(2, 4, 3, (16, 32), 1, (), 16, 16, num_classes=2)
    opt = optim.make('muon', [(unet, 1.0), (PixelUNet(2, 3, 2, False, (16, 16, 16)), 3.0)])
    muon, adamw = opt.parts['muon'].param_groups, opt.parts['adamw'].param_groups
    assert all(p.ndim == 4 and min(p.shape[:2]) >= 16 for group in muon for p in group['params'])
    names = {id(p): n for n, p in unet.named_parameters()}
    taken = {names[id(p)] for p in muon[0]['params']}
    assert 'middle.0.conv_1.weight' in taken and not [n for n in taken if 'whiten' in n or 'label' in n or 'bias' in n]
    assert sum(len(group['params']) for group in muon[:1] + adamw[:1]) == len(list(unet.parameters()))
    utils.set_lr(opt, 1e-3)
    assert [round(group['lr'], 9) for group in opt.param_groups] == [0.02, 0.06, 0.001, 0.003]


@pytest.mark.parametrize('kind', ['muon', 'adam'])
def test_a_restored_optimiser_goes_on_with_equal_tensors(kind, tmp_path):
    def fresh():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.SiLU(), nn.Conv2d(16, 2, 1))
        return net, optim.make(kind, [(net, 1.0)])

    def train(net, opt, steps):
        for step in steps:
            utils.set_lr(opt, 1e-2)
            torch.manual_seed(step)
            x = torch.randn(4, 2, 8, 8)
            (net(x) - x[:, :, 2:-2, 2:-2]).square().mean().backward()
            opt.step()
            opt.zero_grad()

    straight, opt = fresh()
    train(straight, opt, range(6))
    net, opt = fresh()
    train(net, opt, range(3))
    torch.save(dict(net=net.state_dict(), opt=opt.state_dict()), tmp_path / 'last.pt')
    again, opt = fresh()
    state = torch.load(tmp_path / 'last.pt', weights_only=True)
    again.load_state_dict(state['net'])
    opt.load_state_dict(state['opt'])
    train(again, opt, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))


def one_conv(channels_last):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3))
    return net.to(memory_format=torch.channels_last) if channels_last else net


def step_of(net, opt, update, seed):
    torch.manual_seed(seed)
    utils.set_lr(opt, 1e-2)
    net(torch.randn(2, 3, 8, 8)).square().mean().backward()
    update(opt)


def same_weights(a, b):
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize('before', [False, True])
def test_moments_saved_in_another_memory_format_fit(before):
    """A run begun on a CPU (small grids contiguous) goes on on a GPU (channels-last), and the other way round."""
    straight, moved = one_conv(before), one_conv(not before)
    opts = [optim.make('adam', [(net, 1.0)]) for net in (straight, moved)]
    step_of(straight, opts[0], lambda opt: (opt.step(), opt.zero_grad()), seed=1)
    moved.load_state_dict(straight.state_dict())
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))  # as from a file
    for net, opt in zip((straight, moved), opts, strict=True):
        step_of(net, opt, lambda opt: opt.step(), seed=2)
    assert same_weights(straight, moved)


@pytest.mark.parametrize('kind', ['muon', 'adam'])
@pytest.mark.parametrize('channels_last', [False, True])
def test_two_processes_with_the_same_gradients_step_as_one(kind, channels_last, monkeypatch):
    monkeypatch.setattr(utils.dist, 'all_reduce', lambda flat: flat.mul_(2))
    nets = []
    for world in (1, 2):
        run, net = utils.Run('cpu', 'fp32'), one_conv(channels_last)
        run.world, run.torchrun, opt = world, world > 1, optim.make(kind, [(net, 1.0)])
        for seed in range(3):
            step_of(net, opt, lambda opt, run=run: run.update(opt, 1e9), seed)
        nets.append(net)
    assert same_weights(*nets) and not same_weights(nets[0], one_conv(channels_last))


def test_all_processes_start_as_the_first(monkeypatch):
    net, first = one_conv(True), one_conv(True)
    for p in net.parameters():
        p.data += 1
    sent = iter(first.parameters())
    monkeypatch.setattr(utils.dist, 'broadcast', lambda tensor, source: tensor.copy_(next(sent)))
    run = utils.Run('cpu', 'fp32')
    run.same_start(net)
    assert not same_weights(net, first)  # one process: nothing to do
    run.world, run.torchrun = 2, True
    run.same_start(net)
    assert same_weights(net, first)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_network_without_hidden_kernels_is_left_to_adamw():
    assert isinstance(optim.make('muon', [(nn.Linear(3, 3), 1.0)]), torch.optim.AdamW)


def test_the_loss_scaler_of_fp16_works_on_both_parts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 3))
    opt, scaler = optim.make('muon', [(net, 1.0)]), torch.amp.GradScaler('cpu', init_scale=1024.0)
    utils.set_lr(opt, 1e-3)

    def step(poison):
        scaler.scale(net(torch.randn(2, 2, 8, 8)).square().mean()).backward()
        if poison:
            net[2].weight.grad[0, 0, 0, 0] = float('inf')
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    for poison in (False, True, False):
        before = [p.detach().clone() for p in net.parameters()]
        step(poison)
        moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
        assert not any(moved) if poison else all(moved)  # an overflow skips the step of both
    assert scaler.get_scale() == 512.0
