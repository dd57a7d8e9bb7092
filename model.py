"""
The networks, for 2D slices and 3D volumes alike (`spatial_dims` 2 or 3). They know no setting, no schedule and no file.

    image  (B, K, *S)      target channels K, spatial shape S = (X, Y) or (X, Y, Z), values in [-1, 1]
    source (B, C, *S)      source channels C (CT perfusion: time frames)
    latent (B, c, *s)      c = latent_channels, s = S / 4, normalised to mean 0 and std 1 per channel

`AAE` takes images to latents and back, `Discriminator` judges its reconstructions, `UNet` denoises latents given the source
and the label, and `PixelUNet` works on the image grid: it is the detail branch of stage 3 and the regression baseline.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def conv(dims, c_in, c_out, kernel=3, stride=1):
    """A 2D or 3D convolution whose output has the input's size divided by the stride."""
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(c_in, c_out, kernel, stride, padding=kernel // 2)


def zero_init(layer):
    """Start a layer at zero, so that the block it ends is the identity (or the branch adds nothing) at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _GroupNorm(torch.autograd.Function):
    """PyTorch's group norm with a backward pass of matrix products: on a CPU the built-in one takes four times as long.

    dx = a dy + b x + c, with a per channel, b and c per group, from the sums over positions of dy and dy * x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        y, mean, rstd = torch.native_group_norm(x, weight, bias, x.shape[0], x.shape[1], x[0, 0].numel(), groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        n, c, positions = x.shape[0], x.shape[1], x[0, 0].numel()
        groups, per = ctx.groups, c // ctx.groups
        mean, rstd = (v.float().view(n, groups, 1) for v in (mean, rstd))
        s_1, s_2 = (_sum_positions(v).view(n, groups, per) for v in (dy, dy * x))
        centred = (s_2 - mean * s_1) * rstd  # sum of dy * x_hat
        gamma = weight.float().view(1, groups, per)
        p, q = ((gamma * v).sum(2, keepdim=True) / (per * positions) for v in (s_1, centred))
        a, b, k = gamma * rstd, (-rstd ** 2 * q).expand(n, groups, per), (-rstd * p + rstd ** 2 * q * mean).expand(n, groups, per)
        a, b, k = (v.reshape(n, c, *[1] * (x.ndim - 2)).to(x.dtype) for v in (a, b, k))
        return torch.addcmul(torch.addcmul(k, x, b), dy, a), centred.sum(0).flatten(), s_1.sum(0).flatten(), None, None


def _sum_positions(x):
    """Sum over space, (B, C, *S) -> (B, C) float32, as a product with ones where channels lie last in memory."""
    last = x.movedim(1, -1)
    if not last.is_contiguous():
        return x.flatten(2).sum(2, dtype=torch.float32)
    rows = last.reshape(len(x), -1, x.shape[1])
    return torch.bmm(torch.ones_like(rows[:, :, :1]).transpose(1, 2), rows).float().squeeze(1)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, with the faster backward pass on a CPU."""

    def forward(self, x):
        if x.device.type == 'cpu' and torch.is_grad_enabled() and x.requires_grad:
            return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


def group_norm(channels):
    """GroupNorm with 8 channels a group or more; one group for narrow layers."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= min(8, channels))
    return GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), optionally modulated by an embedding (scale and shift of the second norm)."""

    def __init__(self, dims, c_in, c_out, emb=0):
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(c_in), conv(dims, c_in, c_out)
        self.norm_2, self.conv_2 = group_norm(c_out), zero_init(conv(dims, c_out, c_out))
        self.skip = nn.Identity() if c_in == c_out else conv(dims, c_in, c_out, kernel=1)
        self.modulate = zero_init(nn.Linear(emb, 2 * c_out)) if emb else None

    def forward(self, x, emb=None):
        h = self.norm_2(self.conv_1(F.silu(self.norm_1(x))))
        if self.modulate is not None:
            scale, shift = self.modulate(emb).view(len(x), -1, *[1] * (x.ndim - 2)).chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv_2(F.silu(h))


class Attention(nn.Module):
    """Self-attention over all positions of the grid, with heads of 32 channels (fewer where they do not divide)."""

    def __init__(self, dims, channels):
        super().__init__()
        self.heads = channels // math.gcd(channels, 32)
        self.norm, self.qkv = group_norm(channels), conv(dims, channels, 3 * channels, kernel=1)
        self.proj = zero_init(conv(dims, channels, channels, kernel=1))

    def forward(self, x):
        b, c = x.shape[:2]
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, -1).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())  # (B, heads, positions, channels)
        return x + self.proj(h.transpose(-1, -2).reshape(x.shape))


def upsample(x, size):
    """Nearest-neighbour upsampling to an explicit size, so that odd sizes meet their skip connection."""
    return F.interpolate(x, size=size, mode='nearest')


# ------------------------------------------------------------------------------------------------------------------
# Stage 1: the adversarial autoencoder.

class Encoder(nn.Module):
    """Image (B, K, *S) -> latent (B, c, *S/4). The first convolution strides: full resolution is where time goes.

    A linear shortcut from each block of 4 x 4 (x 4) voxels to its latent lets the layers start from a projection of the image.
    """

    def __init__(self, dims, image_channels, latent_channels, widths, blocks=1):
        super().__init__()
        w_1, w_2 = widths[1:]
        self.layers = nn.Sequential(
            conv(dims, image_channels, w_1, kernel=5, stride=2), *[ResBlock(dims, w_1, w_1) for _ in range(blocks)],
            conv(dims, w_1, w_2, stride=2), *[ResBlock(dims, w_2, w_2) for _ in range(blocks)],
            group_norm(w_2), nn.SiLU(), zero_init(conv(dims, w_2, latent_channels)))
        self.shortcut = (nn.Conv2d if dims == 2 else nn.Conv3d)(image_channels, latent_channels, 4, stride=4)
        nn.init.orthogonal_(self.shortcut.weight)

    def forward(self, image):
        return self.layers(image) + self.shortcut(image)


class Decoder(nn.Module):
    """Latent (B, c, *s) -> image (B, K, *4s): upsample, then convolve, twice; with the encoder's shortcut the other way round."""

    def __init__(self, dims, image_channels, latent_channels, widths, blocks=1):
        super().__init__()
        w_0, w_1, w_2 = widths
        self.layers = nn.Sequential(
            conv(dims, latent_channels, w_2), *[ResBlock(dims, w_2, w_2) for _ in range(blocks + 1)],
            nn.Upsample(scale_factor=2), conv(dims, w_2, w_1), *[ResBlock(dims, w_1, w_1) for _ in range(blocks)],
            nn.Upsample(scale_factor=2), conv(dims, w_1, w_0), *[ResBlock(dims, w_0, w_0) for _ in range(blocks)],
            group_norm(w_0), nn.SiLU(), zero_init(conv(dims, w_0, image_channels)))
        self.shortcut = (nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d)(latent_channels, image_channels, 4, stride=4)
        nn.init.orthogonal_(self.shortcut.weight)

    def forward(self, z):
        return self.layers(z) + self.shortcut(z)


class AAE(nn.Module):
    """Adversarial autoencoder with a downsampling factor of 4 and latents normalised by the buffers `latent_mean`, `latent_std`.

    encode(image): (B, K, *S) -> (B, c, *S/4) with mean 0 and std 1 per channel over the training set;
    decode(z):     (B, c, *s) -> (B, K, *4s). forward is decode(encode(image)): the two normalisations cancel.
    ValueError if a spatial size is not a multiple of 4.
    """

    factor = 4

    def __init__(self, spatial_dims, image_channels, latent_channels, widths=(16, 32, 64), blocks=1):
        super().__init__()
        self.args = dict(spatial_dims=spatial_dims, image_channels=image_channels, latent_channels=latent_channels,
                         widths=list(widths), blocks=blocks)
        self.encoder = Encoder(spatial_dims, image_channels, latent_channels, widths, blocks)
        self.decoder = Decoder(spatial_dims, image_channels, latent_channels, widths, blocks)
        with torch.no_grad():  # the two shortcuts start as a projection and its transpose
            self.decoder.shortcut.weight.copy_(self.encoder.shortcut.weight)
        shape = (1, latent_channels) + (1,) * spatial_dims
        self.register_buffer('latent_mean', torch.zeros(shape))
        self.register_buffer('latent_std', torch.ones(shape))

    def encode(self, image):
        if any(n % self.factor for n in image.shape[2:]):
            raise ValueError(f'image size {tuple(image.shape[2:])} must be a multiple of {self.factor} along every axis')
        return (self.encoder(image).float() - self.latent_mean) / self.latent_std

    def decode(self, z):
        return self.decoder(z * self.latent_std + self.latent_mean)

    def forward(self, image):
        return self.decoder(self.encoder(image))


class Discriminator(nn.Module):
    """Patch discriminator: image (B, K, *S) -> one realness score for each patch (B, 1, *S/4)."""

    def __init__(self, spatial_dims, image_channels, widths=(32, 64)):
        super().__init__()
        layers, c = [], image_channels
        for w in widths:
            layers += [conv(spatial_dims, c, w, kernel=3, stride=2), nn.LeakyReLU(0.2)]
            c = w
        self.layers = nn.Sequential(*layers, conv(spatial_dims, c, c), nn.LeakyReLU(0.2), conv(spatial_dims, c, 1))

    def forward(self, image):
        return self.layers(image)


# ------------------------------------------------------------------------------------------------------------------
# Stage 2: the conditional U-Net on latents.

def timestep_embedding(t, dim):
    """Sinusoidal embedding of the time step: (B,) -> (B, dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class SourceEncoder(nn.Module):
    """Source image (B, C, *S) -> conditioning (B, cond_channels, *S/4), trained together with the U-Net."""

    def __init__(self, dims, source_channels, cond_channels, width):
        super().__init__()
        self.layers = nn.Sequential(
            conv(dims, source_channels, width, kernel=5, stride=2), ResBlock(dims, width, width),
            group_norm(width), nn.SiLU(), conv(dims, width, 2 * width, stride=2), ResBlock(dims, 2 * width, 2 * width),
            group_norm(2 * width), nn.SiLU(), conv(dims, 2 * width, cond_channels))

    def forward(self, source):
        return self.layers(source)


class UNet(nn.Module):
    """Conditional U-Net in latent space.

    forward(z_t, t, source=..., label=...) -> what the diffusion calls the network's output
        z_t    (B, c, *s)     noisy latent
        t      (B,)           time steps, 0 the least noise
        source (B, C, *4s)    source image; or cond (B, cond_channels, *s) = encode_source(source), computed once for many steps
        label  (B,)           0..num_classes-1, or num_classes for "unknown" (a learned embedding); None means unknown for all
    """

    def __init__(self, spatial_dims, latent_channels, source_channels, widths=(64, 128), blocks=2, attention=(1,),
                 cond_channels=32, cond_width=32, num_classes=0, dropout=0.0, checkpointing=False):
        super().__init__()
        self.args = dict(spatial_dims=spatial_dims, latent_channels=latent_channels, source_channels=source_channels, widths=list(widths),
                         blocks=blocks, attention=list(attention), cond_channels=cond_channels, cond_width=cond_width,
                         num_classes=num_classes, dropout=dropout)
        dims, emb = spatial_dims, 4 * widths[0]
        self.num_classes, self.checkpointing, self.emb_dim = num_classes, checkpointing, widths[0] - widths[0] % 2
        self.encode_source = SourceEncoder(dims, source_channels, cond_channels, cond_width)
        self.time = nn.Sequential(nn.Linear(self.emb_dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(num_classes + 1, emb) if num_classes else None
        self.conv_in = conv(dims, latent_channels + cond_channels, widths[0])

        def level(c_in, w, i):
            block = nn.ModuleList([ResBlock(dims, c_in, w, emb)])
            if i in attention:
                block.append(Attention(dims, w))
            return block

        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for i, w in enumerate(widths):
            for _ in range(blocks):
                self.down.append(level(c, w, i))
                skips.append(c := w)
            if i < len(widths) - 1:
                self.down.append(nn.ModuleList([conv(dims, c, c, stride=2)]))
                skips.append(c)
        self.middle = nn.ModuleList([ResBlock(dims, c, c, emb), Attention(dims, c), ResBlock(dims, c, c, emb)])
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(level(c + skips.pop(), w, i))
                c = w
            if i:
                self.up.append(nn.ModuleList([conv(dims, c, c)]))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), zero_init(conv(dims, c, latent_channels)))

    def _run(self, level, x, emb):
        """One level's layers; recomputed in the backward pass when `checkpointing` (gradient checkpointing) is on."""
        def layers(x, emb):
            for layer in level:
                x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
            return x
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layers, x, emb, use_reentrant=False)
        return layers(x, emb)

    def forward(self, z_t, t, source=None, label=None, cond=None):
        emb = self.time(timestep_embedding(t, self.emb_dim))
        if self.label is not None:
            emb = emb + self.label(torch.full_like(t, self.num_classes) if label is None else label)
        emb = F.silu(emb)
        cond = self.encode_source(source) if cond is None else cond
        x = self.conv_in(torch.cat([z_t, cond.to(z_t.dtype)], dim=1))
        skips = [x]
        for level in self.down:
            x = self._run(level, x, emb)
            skips.append(x)
        x = self.dropout(self._run(self.middle, x, emb))
        for level in self.up:
            if isinstance(level[0], ResBlock):
                x = torch.cat([x, skips.pop()], dim=1)
            else:
                x = upsample(x, skips[-1].shape[2:])
            x = self._run(level, x, emb)
        return self.out(x)


# ------------------------------------------------------------------------------------------------------------------
# The image grid: the detail branch of stage 3 and the regression baseline.

class PixelUNet(nn.Module):
    """A plain U-Net on the image grid: (B, c_in, *S) -> (B, c_out, *S). Its last layer starts at zero.

    As the detail branch it takes the source beside the decoded prediction and returns what the latent space lost:
    pred = D(z_0_hat) + R(source, D(z_0_hat)). As the regression baseline it takes the source alone.
    """

    def __init__(self, spatial_dims, c_in, c_out, widths=(32, 64, 96), blocks=1):
        super().__init__()
        self.args = dict(spatial_dims=spatial_dims, c_in=c_in, c_out=c_out, widths=list(widths), blocks=blocks)
        dims = spatial_dims
        self.conv_in = conv(dims, c_in, widths[0])
        self.down, self.shrink, self.grow, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, w in enumerate(widths):
            self.down.append(nn.Sequential(*[ResBlock(dims, w, w) for _ in range(blocks)]))
            if i < len(widths) - 1:
                self.shrink.append(conv(dims, w, widths[i + 1], stride=2))
                self.grow.append(conv(dims, widths[i + 1], w, kernel=1))
                self.up.append(nn.Sequential(conv(dims, 2 * w, w), *[ResBlock(dims, w, w) for _ in range(blocks)]))
        self.out = nn.Sequential(group_norm(widths[0]), nn.SiLU(), zero_init(conv(dims, widths[0], c_out)))

    def forward(self, x):
        x, skips = self.conv_in(x), []
        for i, block in enumerate(self.down):
            x = block(x)
            if i < len(self.shrink):
                skips.append(x)
                x = self.shrink[i](x)
        for i in reversed(range(len(self.up))):
            x = upsample(self.grow[i](x), skips[i].shape[2:])
            x = self.up[i](torch.cat([x, skips[i]], dim=1))
        return self.out(x)


def fingerprint(net):
    """A short hash of a network's weights and buffers: which autoencoder does a U-Net belong to?"""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def count_parameters(net):
    """Number of trainable parameters."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)
