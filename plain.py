"""
model.py's networks as of the first release, of stock layers, fp32, contiguous: what benchmark.py measures ours by.

Not to be made faster. Where model.py changes what is computed, these follow (a test compares FLOPs and parameters).
"""

import math
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import timing
import train_aae
import train_unet
import utils


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


class PlainPair(nn.Module):
    """Two convolutions without norms."""

    def __init__(self, dims, c):
        super().__init__()
        self.layers = nn.Sequential(conv(dims, c, c), nn.ReLU(), conv(dims, c, c))

    def forward(self, x):
        return x + self.layers(x)


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
            up(), conv(dims, w_1, w_0), *[PlainPair(dims, w_0) for _ in range(blocks)],
            nn.ReLU(), conv(dims, w_0, image_channels))
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
        kept = min(c_in, 16)
        self.whiten = conv(dims, c_in, kept, 1)
        self.whiten.start_from = lambda source, mask: None
        self.layers = nn.Sequential(
            conv(dims, kept, w, 5, 2), Block(dims, w, w), norm(w), nn.SiLU(), conv(dims, w, 2 * w, 3, 2),
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
    with (mock.patch.object(utils.Run, 'place', lambda run, net, grid=(): net.to(run.device)),
          mock.patch.object(timing, 'AAE', PlainAAE), mock.patch.object(train_unet, 'fingerprint', lambda net: '')):
        return timing.train_step(stage, preset, [*words, '--precision', 'fp32'], swap=swap, **how)
