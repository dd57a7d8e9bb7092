"""
What benchmark.py sets beside the project's networks: the same networks of stock modules (plain fp32, contiguous), and
MONAI's at equal widths, with parameters and FLOPs within 10 % of ours (the rows state both).

MONAI is not in requirements.txt: install monai and einops into another environment and run benchmark.py from there.
"""

import math
from functools import lru_cache
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import timing
import train_aae
import train_unet
import utils
from diffusion import Diffusion
from model import UNet

# ------------------------------------------------------------------------------------------------------------------
# Plain modules: model.py's networks as of the first release, of stock layers. Not to be made faster.

def conv(dims, c_in, c_out, kernel=3, stride=1):
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(c_in, c_out, kernel, stride, padding=kernel // 2)


def norm(channels):
    return nn.GroupNorm(max(g for g in range(1, 33) if channels % g == 0 and channels // g >= min(8, channels)),
                        channels)


class Block(nn.Module):
    """Residual block; an embedding, if any, scales and shifts the second norm."""

    def __init__(self, dims, c_in, c_out, emb=0):
        super().__init__()
        self.norm_1, self.act_1, self.conv_1 = norm(c_in), nn.SiLU(), conv(dims, c_in, c_out)
        self.norm_2, self.act_2, self.conv_2 = norm(c_out), nn.SiLU(), conv(dims, c_out, c_out)
        self.skip = nn.Identity() if c_in == c_out else conv(dims, c_in, c_out, 1)
        self.modulate = nn.Linear(emb, 2 * c_out) if emb else None

    def forward(self, x, emb=None):
        h = self.norm_2(self.conv_1(self.act_1(self.norm_1(x))))
        if emb is not None:
            scale, shift = self.modulate(emb).view(len(x), -1, *[1] * (x.ndim - 2)).chunk(2, 1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv_2(self.act_2(h))


class PlainAttention(nn.Module):
    """Self-attention with heads of 32 channels, as matrix products and a softmax."""

    def __init__(self, dims, c):
        super().__init__()
        self.heads, self.norm = c // math.gcd(c, 32), norm(c)
        self.qkv, self.proj = conv(dims, c, 3 * c, 1), conv(dims, c, c, 1)

    def forward(self, x):
        b, c = x.shape[:2]
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, -1).unbind(1)  # (B, heads, c, n)
        weight = (q.transpose(-1, -2) @ k / math.sqrt(q.shape[2])).softmax(-1)
        return x + self.proj((v @ weight.transpose(-1, -2)).reshape(x.shape))


class PlainAAE(nn.Module):
    """The autoencoder; same arguments and methods as model.AAE."""

    def __init__(self, dims, image_channels, latent_channels, widths=(16, 32, 64), blocks=1):
        super().__init__()
        self.args = dict(latent_channels=latent_channels)
        (w_0, w_1, w_2), up = widths, lambda: nn.Upsample(scale_factor=2)
        self.encoder = nn.Sequential(
            conv(dims, image_channels, w_1, 5, 2), *[Block(dims, w_1, w_1) for _ in range(blocks)],
            conv(dims, w_1, w_2, 3, 2), *[Block(dims, w_2, w_2) for _ in range(blocks)],
            norm(w_2), nn.SiLU(), conv(dims, w_2, latent_channels))
        self.decoder = nn.Sequential(
            conv(dims, latent_channels, w_2), *[Block(dims, w_2, w_2) for _ in range(blocks + 1)],
            up(), conv(dims, w_2, w_1), *[Block(dims, w_1, w_1) for _ in range(blocks)],
            up(), conv(dims, w_1, w_0), *[Block(dims, w_0, w_0) for _ in range(blocks)],
            norm(w_0), nn.SiLU(), conv(dims, w_0, image_channels))
        self.shrink = (nn.Conv2d if dims == 2 else nn.Conv3d)(image_channels, latent_channels, 4, 4)
        self.grow = (nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d)(latent_channels, image_channels, 4, 4)

    def start_from_blocks(self, images):
        pass

    def encode(self, image):
        return self.encoder(image) + self.shrink(image)

    def decode(self, z):
        return self.decoder(z) + self.grow(z)

    def forward(self, image):
        return self.decode(self.encode(image))


class PlainDiscriminator(nn.Module):
    """The patch discriminator."""

    def __init__(self, dims, image_channels, widths=(32, 64)):
        super().__init__()
        layers, c = [], image_channels
        for w in widths:
            layers, c = [*layers, conv(dims, c, w, 3, 2), nn.LeakyReLU(0.2)], w
        self.layers = nn.Sequential(*layers, conv(dims, c, c), nn.LeakyReLU(0.2), conv(dims, c, 1))

    def forward(self, image):
        return self.layers(image)


class PlainSourceEncoder(nn.Module):
    def __init__(self, dims, c_in, c_out, w):
        super().__init__()
        self.whiten = conv(dims, c_in, c_in, 1)
        self.whiten.start_from = lambda source, mask: None
        self.layers = nn.Sequential(
            conv(dims, c_in, w, 5, 2), Block(dims, w, w), norm(w), nn.SiLU(), conv(dims, w, 2 * w, 3, 2),
            Block(dims, 2 * w, 2 * w), norm(2 * w), nn.SiLU(), conv(dims, 2 * w, c_out))

    def forward(self, source):
        return self.layers(self.whiten(source))


class PlainUNet(nn.Module):
    """The conditional U-Net; same arguments as model.UNet, no checkpointing."""

    def __init__(self, dims, latent_channels, source_channels, widths, blocks, attention, cond_channels, cond_width,
                 num_classes=0, dropout=0.0, checkpointing=False):
        super().__init__()
        self.args, emb, c = {}, 4 * widths[0], widths[0]
        self.encode_source = PlainSourceEncoder(dims, source_channels, cond_channels, cond_width)
        self.time = nn.Sequential(nn.Linear(c, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.label = nn.Embedding(num_classes + 1, emb)
        self.conv_in, self.act = conv(dims, latent_channels + cond_channels, c), nn.SiLU()
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [c]
        for i, w in enumerate(widths):
            for _ in range(blocks):
                self.down.append(self.level(dims, c, w, emb, i in attention))
                c = w
                skips.append(c)
            if i < len(widths) - 1:
                self.down.append(nn.ModuleList([conv(dims, c, c, 3, 2)]))
                skips.append(c)
        self.middle = nn.ModuleList([Block(dims, c, c, emb), PlainAttention(dims, c), Block(dims, c, c, emb)])
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(self.level(dims, c + skips.pop(), w, emb, i in attention))
                c = w
            if i:
                self.up.append(nn.ModuleList([conv(dims, c, c)]))
        self.out = nn.Sequential(norm(c), nn.SiLU(), conv(dims, c, latent_channels))

    @staticmethod
    def level(dims, c_in, w, emb, attention):
        return nn.ModuleList([Block(dims, c_in, w, emb)] + [PlainAttention(dims, w)] * attention)

    def forward(self, z_t, t, source=None, label=None):
        half = self.time[0].in_features // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        emb = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)

        def run(level, x):
            for layer in level:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            return x

        x = self.conv_in(torch.cat([z_t, self.encode_source(source)], 1))
        skips = [x]
        for level in self.down:
            x = run(level, x)
            skips.append(x)
        x = run(self.middle, x)
        for level in self.up:
            resized = not isinstance(level[0], Block)
            x = F.interpolate(x, skips[-1].shape[2:]) if resized else torch.cat([x, skips.pop()], 1)
            x = run(level, x)
        return self.out(x)


def plain_step(stage, preset, words=(), **how):
    """The stage's own training step with these modules in fp32, contiguous."""
    swap = {name: net for name, net in dict(AAE=PlainAAE, Discriminator=PlainDiscriminator, UNet=PlainUNet).items()
            if hasattr(dict(aae=train_aae, unet=train_unet)[stage], name)}
    with (mock.patch.object(utils.Run, 'place', lambda run, net: net.to(run.device)),
          mock.patch.object(timing, 'AAE', PlainAAE), mock.patch.object(train_unet, 'fingerprint', lambda net: '')):
        return timing.train_step(stage, preset, [*words, '--precision', 'fp32'], swap=swap, **how)


# ------------------------------------------------------------------------------------------------------------------
# MONAI. Where the structures differ, the numbers of blocks are chosen so that FLOPs and parameters meet.

AAE_MATCH = {  # preset: our --aae_blocks, MONAI's num_res_blocks a level, its discriminator's layers and channels
    'ctp2dwi_demo': (2, (1, 1, 3), 2, 16), 'mri2pet_demo': (3, (1, 1, 4), 2, 8),
    'ctp2dwi': (3, (1, 1, 4), 3, 16), 'mri2pet': (3, (1, 1, 4), 2, 8)}


BETAS = dict(schedule='scaled_linear_beta', beta_start=0.0015, beta_end=0.0195)


def made_batch(cfg, device, batch):
    """Noise in the shapes of a preset: image (B, K, *S), latent z_0 (B, c, *s), cond (B, cond_channels, *s)."""
    latent = [n // 4 for n in cfg.image_size]
    shapes = (len(cfg.targets), *cfg.image_size), (cfg.latent_channels, *latent), (cfg.cond_channels, *latent)
    return [torch.randn(batch, *shape, device=device) for shape in shapes]


def our_unet(cfg, run, batch):
    """A step of our U-Net on latents with the conditioning at hand -> (step, parameters)."""
    unet = UNet(cfg.spatial_dims, cfg.latent_channels, 1, cfg.unet_channels, cfg.unet_blocks, cfg.unet_attention,
                cfg.cond_channels, cfg.cond_width)
    unet.encode_source = nn.Identity()  # MONAI has none
    unet, (_, z_0, cond) = run.place(unet), made_batch(cfg, run.device, batch)
    diffusion, opt, ema = Diffusion().to(run.device), utils.adam(unet.parameters()), utils.EMA(unet, cfg.ema)
    utils.set_lr(opt, cfg.lr)

    def step():
        with run.autocast():
            loss = diffusion.loss(unet, z_0, cond=cond)[0].mean()
        run.backward(loss)
        run.update(opt, cfg.grad_clip)
        ema.update(unet, 1)

    return step, unet


@lru_cache(1)
def load_monai():
    """MONAI's modules by name; their memory belongs to the imports. RunError where it is not installed."""
    try:
        import einops.layers.torch  # noqa: F401 (its attention needs it)
        from monai import inferers, losses
        from monai.networks import nets, schedulers
    except ImportError as err:
        raise utils.RunError(f'--peer monai needs MONAI and einops ({err}); pip install monai einops into another '
                             'environment and run benchmark.py with its python') from None
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
    small = timing.settings(preset, probe)
    found = {}
    for precision, last in layouts(cfg):
        run = utils.Run(cfg.device, precision)
        step = build(small, run, small.batch_size, placer(small, run, last))[0]
        found[precision, last] = timing.repeat(step, warm=0, least=1, budget=0)['seconds_step']
    precision, last = min(found, key=found.get)
    return utils.Run(cfg.device, precision), last, f'{precision} {"channels_last" if last else "contiguous"}'


def pair_step(stage, preset, who, words=(), probe=(), **how):
    """A training step of the pair: who 'ours' or 'monai', stage 'aae' or 'unet' (its conditioning at hand)."""
    cfg = timing.settings(preset, words)
    batch, note = cfg.batch_size, 'conditioning at hand' if stage == 'unet' else ''
    if who == 'ours' and stage == 'aae':
        return timing.train_step('aae', preset, [*words, '--aae_blocks', str(AAE_MATCH[preset][0])], **how)
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


def monai_sampler_rows(preset, words=(), probe=(), items=None, ddim=(2, 4), ddpm=(2, 4), **how):
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
        row = timing.extrapolate(sampler, wanted, lambda n, sampler=sampler: timing.repeat(
            lambda: subject(*parts, sampler, n, run), **how), counts)
        row['note'] = f'{name}; {row["note"]}' + f'; {items} slices, scaled to {whole}' * (items != whole)
        for key in ('seconds_subject', 'tflop'):
            row[key] *= whole / items
        rows.append(row | dict(batch=items, precision=run.precision,
                               parameters=sum(p.numel() for p in parts[0].parameters())))
    return rows
