"""What networks, losses and samplers make on the way lies on the device of what they are given. The second device is
PyTorch's 'meta', which holds no values but refuses to mix with the CPU, as a GPU does (only an index into a table may
come from the CPU): no GPU is needed."""
import contextlib
from types import SimpleNamespace

import pytest
import torch

import config
import losses
import post_train
import translate
import utils
from diffusion import Diffusion
from model import AAE, Discriminator, PixelUNet, UNet

SIZE = {'ctp2dwi_demo': (32, 40), 'mri2pet_demo': (16, 16, 24)}
RUN = SimpleNamespace(autocast=contextlib.nullcontext)


@pytest.fixture(params=SIZE)
def made(request, monkeypatch):
    """Settings, networks and a batch of a preset, on the other device."""
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: contextlib.nullcontext())  # there is none on meta
    cfg, size = config.load('', argv=['--preset', request.param]), SIZE[request.param]
    dims, targets, sources = len(size), len(cfg.targets), 5
    heads = dict(lesion_head=cfg.lesion_head, classes=cfg.num_classes)
    with torch.device('meta'):
        unet = UNet(dims, 4, sources, (16, 32), 1, (1,), 8, 8, cfg.num_classes)
        nets = SimpleNamespace(
            aae=AAE(dims, targets, 4), discriminator=Discriminator(dims, targets), unet=unet,
            regression=PixelUNet(dims, sources, targets, False, (8, 8, 8), **heads),
            detail=PixelUNet(dims, sources, targets, True, (8, 8, 8), feature_channels=unet.feature_channels, **heads))
        batch = SimpleNamespace(source=torch.zeros(2, sources, *size), target=torch.zeros(2, targets, *size),
                                mask=torch.zeros(2, 1, *size), lesion=torch.zeros(2, 1, *size),
                                label=torch.zeros(2, dtype=torch.long))
    batch.z_0 = nets.aae.encode(batch.target).detach()
    nets.diffusion = Diffusion(cfg.predict, cfg.schedule, cfg.timesteps, 'min_snr', cfg.last_step_share).to('meta')
    return cfg, nets, batch


def test_the_other_device_refuses_to_mix():
    with pytest.raises(RuntimeError, match='device'):
        torch.zeros(2, device='meta') + torch.zeros(2)


def test_the_loss_of_every_stage(made):
    cfg, nets, batch = made
    again = nets.aae(batch.target)
    fakes, reals = nets.discriminator(again), nets.discriminator(batch.target)
    stages = [losses.reconstruction_l1(again, batch.target, batch.mask) + losses.hinge_generator(fakes),
              losses.hinge_discriminator(reals, nets.discriminator(again.detach()))]
    t, eps, label = nets.diffusion.draws(batch.z_0, batch.label, cfg.num_classes, 0.3)
    stages.append(nets.diffusion.loss(nets.unet, batch.z_0, t, eps, source=batch.source, label=label)[0])
    model = translate.Model(None, regression=nets.regression)
    pred, logit = nets.regression(batch.source, logit=True, shares=model.shares(batch.source, batch.label))
    stages += losses.post_training_error(pred, batch.target, batch.mask, batch.lesion, 'l1', cfg.lesion_floor)
    stages.append(losses.lesion_cross_entropy(logit, batch.mask, batch.lesion))
    cfg.crop, model = None, translate.Model(nets.aae, nets.unet, nets.diffusion, nets.detail)
    stages += post_train.batch_terms(cfg, RUN, model, batch.z_0, t, eps, batch.source, label, batch.target, batch.mask,
                                     batch.lesion)
    for loss in stages:
        assert loss.device.type == 'meta'
        assert loss.shape == (2,)
    sum(loss.sum() for loss in stages).backward()
    for net in (nets.aae, nets.discriminator, nets.unet, nets.regression, nets.detail):
        utils.EMA(net, 0.99).update(net, 3)
        assert {p.grad.device.type for p in net.parameters() if p.grad is not None} == {'meta'}


@pytest.mark.parametrize('sampler', ['one_step', 'ddim', 'ddpm'])
@torch.no_grad()
def test_every_sampler(made, sampler):
    cfg, nets, batch = made
    how = SimpleNamespace(seed=0, samples=2, sampler=sampler, num_steps=3, guidance=2.0, skip_latent=True)
    alone = SimpleNamespace(**vars(how) | dict(samples=1, sampler='one_step', guidance=1.0))  # the detail branch
    box = tuple(slice(0, n) for n in batch.source.shape[2:])
    for model, way in ((translate.Model(nets.aae, nets.unet, nets.diffusion, nets.detail), how),
                       (translate.Model(nets.aae, None, nets.diffusion, nets.detail, latent_adds=False), alone),
                       (translate.Model(nets.aae, nets.unet, nets.diffusion), how),
                       (translate.Model(None, regression=nets.regression), how)):
        for label in (None, 1) if cfg.num_classes else (None,):
            for image in translate._translate_items(model, batch.source, 'key', way, label, batch.source.shape[2:],
                                                    box):
                assert {x.device.type for x in image if x is not None} == {'meta'}
