"""
MONAI's networks beside ours, for benchmark.py --peer monai: equal widths, parameters and FLOPs within 10 % (the rows
state both), MONAI in the fastest of its settings on this machine.

MONAI is not in requirements.txt: install monai and einops into another environment and run benchmark.py from there.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

import optim
import timed_inference
import timing
import utils
from diffusion import Diffusion
from model import UNet, latent_grid

# Where the structures differ, the numbers of blocks are chosen so that FLOPs and parameters meet.
AAE_MATCH = {  # preset: our --aae_blocks, MONAI's num_res_blocks a level, its discriminator's layers and channels
    'ctp2dwi_demo': (2, (1, 1, 3), 2, 16), 'mri2pet_demo': (3, (1, 1, 4), 2, 8),
    'ctp2dwi': (3, (1, 1, 4), 3, 16), 'mri2pet': (3, (1, 2, 4), 2, 8)}


BETAS = dict(schedule='scaled_linear_beta', beta_start=0.0015, beta_end=0.0195)


def made_batch(cfg, device, batch):
    """Noise in the shapes of a preset: image (B, K, *S), latent z_0 (B, c, *s), cond (B, cond_channels, *s)."""
    latent = [n // 4 for n in cfg.image_size]
    shapes = (len(cfg.targets), *cfg.image_size), (cfg.latent_channels, *latent), (cfg.cond_channels, *latent)
    return [torch.randn(batch, *shape, device=device) for shape in shapes]


def our_unet(cfg, run, batch):
    """A step of our U-Net on latents with the conditioning at hand -> (step, parameters).

    As MONAI's: forward, backward, AdamW; without the clipping and the weight average of train_unet.py.
    """
    unet = UNet(cfg.spatial_dims, cfg.latent_channels, 1, cfg.unet_channels, cfg.unet_blocks, cfg.unet_attention,
                cfg.cond_channels, cfg.cond_width)
    unet.encode_source = nn.Identity()  # MONAI has none
    unet, (_, z_0, cond) = run.place(unet, latent_grid(cfg.image_size)), made_batch(cfg, run.device, batch)
    diffusion, opt = Diffusion().to(run.device), optim.make('adam', [(unet, 1)])
    utils.set_lr(opt, cfg.lr)

    def step():
        with run.autocast():
            loss = diffusion.loss(unet, z_0, cond=cond)[0].mean()
        run.backward(loss)
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step, unet


@lru_cache(1)
def load_monai():
    """MONAI's modules by name; their memory belongs to the imports. RunError where it is not installed."""
    try:
        import einops.layers.torch  # noqa: F401 (its attention needs it)
        from monai import inferers, losses
        from monai.networks import nets, schedulers
    except ImportError as err:
        raise utils.RunError(f'this needs MONAI and einops ({err}); pip install monai einops into another environment '
                             'and run the script with its python') from None
    timing.BASE.append(timing.peak_mb())
    return nets, schedulers, inferers, losses


def monai_unet_net(cfg):
    return load_monai()[0].DiffusionModelUNet(
        cfg.spatial_dims, cfg.latent_channels + cfg.cond_channels, cfg.latent_channels,
        num_res_blocks=cfg.unet_blocks, channels=cfg.unet_channels, norm_num_groups=math.gcd(32, *cfg.unet_channels),
        attention_levels=[i in cfg.unet_attention for i in range(len(cfg.unet_channels))],
        num_head_channels=math.gcd(32, *cfg.unet_channels))


def monai_unet(cfg, run, batch, place):
    """A step of MONAI's DiffusionModelUNet by its tutorial: DDPMScheduler, DiffusionInferer, MSE, Adam."""
    net, (_, z_0, cond) = place(monai_unet_net(cfg)), made_batch(cfg, run.device, batch)
    _, schedulers, inferers, _ = load_monai()
    inferer = inferers.DiffusionInferer(schedulers.DDPMScheduler(1000, **BETAS))
    opt = torch.optim.Adam(net.parameters(), lr=1e-4)

    def step():
        opt.zero_grad(set_to_none=True)
        noise, t = torch.randn_like(z_0), torch.randint(0, 1000, (batch,), device=z_0.device)
        with run.autocast():
            pred = inferer(z_0, net, noise, t, condition=cond, mode='concat')
            loss = F.mse_loss(pred.float(), noise)
        run.backward(loss)
        opt.step()

    return step, net


def monai_aae_net(cfg, preset):
    return load_monai()[0].AutoencoderKL(
        cfg.spatial_dims, len(cfg.targets), len(cfg.targets), AAE_MATCH[preset][1], cfg.aae_channels, (False,) * 3,
        cfg.latent_channels, math.gcd(32, *cfg.aae_channels), with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False)


def monai_aae(cfg, run, batch, place, preset):
    """A step of AutoencoderKL and PatchDiscriminator by MONAI's tutorial: L1, KL, adversarial (perceptual loss off)."""
    nets, _, _, losses = load_monai()
    layers, channels = AAE_MATCH[preset][2:]
    net = place(monai_aae_net(cfg, preset))
    disc = place(nets.PatchDiscriminator(cfg.spatial_dims, channels, len(cfg.targets), num_layers_d=layers))
    image, adversarial = made_batch(cfg, run.device, batch)[0], losses.PatchAdversarialLoss(criterion='least_squares')
    opts = [torch.optim.Adam(net.parameters(), lr=1e-4), torch.optim.Adam(disc.parameters(), lr=5e-4)]

    def step():
        opts[0].zero_grad(set_to_none=True)
        with run.autocast():
            fake, mu, sigma = net(image)
            score = disc(fake.contiguous())[-1]
        kl = 0.5 * (mu.float() ** 2 + sigma.float() ** 2 - torch.log(sigma.float() ** 2) - 1).flatten(1).sum(1).mean()
        generator = adversarial(score.float(), target_is_real=True, for_discriminator=False)
        run.backward(F.l1_loss(fake.float(), image) + 1e-6 * kl + 0.01 * generator)
        opts[0].step()
        opts[1].zero_grad(set_to_none=True)
        with run.autocast():
            scores = [disc(x.contiguous().detach())[-1].float() for x in (fake, image)]
        pair = zip(scores, (False, True), strict=True)
        run.backward(0.005 * sum(adversarial(s, target_is_real=real, for_discriminator=True) for s, real in pair))
        opts[1].step()

    return step, nn.ModuleList([net, disc])


def layouts(cfg):
    """The ways to run MONAI: (precision, channels-last or not)."""
    fast = utils.Run(cfg.device).precision
    return [(p, last) for p in dict.fromkeys(('fp32', fast)) for last in (False, True)]


def placer(cfg, run, last):
    form = (torch.channels_last if cfg.spatial_dims == 2 else torch.channels_last_3d) if last else None
    return lambda net: net.to(run.device, **(dict(memory_format=form) if last else {}))


def best_way(cfg, build, preset, probe):
    """The fastest of MONAI's settings on this machine, tried with few samples or a crop: (run, last, name)."""
    small, found, ways = timing.settings(preset, probe), {}, layouts(cfg)
    for precision, last in ways * 3:  # three rounds, the fastest counts: other processes come and go
        run = utils.Run(cfg.device, precision)
        step = build(small, run, small.batch_size, placer(small, run, last))[0]
        seconds = timing.repeat(step, warm=0, least=2, budget=0.2, trial=True)['seconds_step']
        found[precision, last] = min(seconds, found.get((precision, last), seconds))
    precision, last = min(found, key=found.get)
    return utils.Run(cfg.device, precision), last, f'{precision} {"channels_last" if last else "contiguous"}'


def pair_step(stage, preset, who, words=(), probe=(), **how):
    """A training step of the pair: who 'ours' or 'monai', stage 'aae' or 'unet' (its conditioning at hand)."""
    cfg = timing.settings(preset, words)
    batch, note = cfg.batch_size, 'conditioning at hand' if stage == 'unet' else ''
    if who == 'ours' and stage == 'aae':
        return timing.train_step('aae', preset, [*words, '--optimizer', 'adam', '--aae_blocks',
                                                  str(AAE_MATCH[preset][0])], **how)
    if who == 'ours':
        run = utils.Run(cfg.device, cfg.precision)
        step, net = our_unet(cfg, run, batch)
    else:
        def build(*args):
            return monai_aae(*args, preset) if stage == 'aae' else monai_unet(*args)
        run, last, name = best_way(cfg, build, preset, [*words, *probe])
        step, net = build(cfg, run, batch, placer(cfg, run, last))
        note = f'{name}, the fastest of its settings; {note}'.rstrip('; ')
    row = timing.repeat(step, **how)
    return row | dict(parameters=sum(p.numel() for p in net.parameters()), batch=batch, note=note, loading=None,
                      precision=run.precision)


def monai_sampler_rows(preset, words=(), probe=(), items=None, ddim=(2, 10), ddpm=(2, 10), **how):
    """One subject by MONAI's DDIM and DDPM schedulers and its decoder, extrapolated from a few steps."""
    schedulers = load_monai()[1]
    cfg = timing.settings(preset, words)
    whole = timing.items_of(cfg)
    items, kinds = items or whole, dict(ddim=(schedulers.DDIMScheduler, 50, ddim),
                                       ddpm=(schedulers.DDPMScheduler, 1000, ddpm))

    @torch.no_grad()
    def subject(net, aae, cond, z, sampler, steps, run):
        scheduler = kinds[sampler][0](1000, **BETAS)
        scheduler.set_timesteps(kinds[sampler][1])
        with run.autocast():
            for t in scheduler.timesteps[:steps]:
                pred = net(torch.cat([z, cond], 1), torch.full((len(z),), int(t), device=z.device))
                z = scheduler.step(pred.float(), int(t), z)[0]
            return aae.decode(z).float().cpu()

    def build(cfg, run, batch, place):
        net, aae = place(monai_unet_net(cfg)).eval(), place(monai_aae_net(cfg, preset)).eval()
        _, z, cond = made_batch(cfg, run.device, batch)
        return lambda: subject(net, aae, cond, z, 'ddim', 1, run), (net, aae, cond, z)

    run, last, name = best_way(cfg, build, preset, [*words, *probe])
    parts, rows = build(cfg, run, items, placer(cfg, run, last))[1], []
    for sampler, (_, wanted, counts) in kinds.items():
        row = timed_inference.extrapolate(sampler, wanted, lambda n, sampler=sampler: timing.repeat(
            lambda: subject(*parts, sampler, n, run), **how), counts)
        row['note'] = f'{name}; {row["note"]}' + f'; {items} slices, scaled to {whole}' * (items != whole)
        for key in ('seconds_subject', 'tflop'):
            row[key] *= whole / items
        rows.append(row | dict(batch=items, precision=run.precision,
                               parameters=sum(p.numel() for p in parts[0].parameters())))
    return rows
