"""
The networks, for 2D slices and 3D volumes alike (`spatial_dims` 2 or 3). They know no setting, no schedule and no file.

    image  (B, K, *S)      target channels K, spatial shape S = (X, Y) or (X, Y, Z), values in [-1, 1]
    source (B, C, *S)      source channels C (CT perfusion: time frames)
    latent (B, c, *s)      c = latent_channels, s = S / 4, normalised to mean 0 and std 1 per channel

`AAE` takes images to latents and back, `Discriminator` judges its reconstructions, `UNet` denoises latents given the
source and the label, and `PixelUNet` works on the image grid: it is the detail branch of stage 3 and the regression
baseline.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from layers import Attention, PlainBlock, ResBlock, SourceWhitening, conv, conv_out, group_norm, upsample, zero_init
from prior import LabelPrior

# ------------------------------------------------------------------------------------------------------------------
# Stage 1: the adversarial autoencoder.

class Encoder(nn.Module):
    """Image (B, K, *S) -> latent (B, c, *S/4). The first convolution strides: full resolution is where time goes.

    A linear shortcut from each block of 4 x 4 (x 4) voxels to its latent lets the layers start from a projection of the
    image.
    """

    def __init__(self, dims, image_channels, latent_channels, widths, blocks=1):
        super().__init__()
        w_1, w_2 = widths[1:]
        self.layers = nn.Sequential(
            conv(dims, image_channels, w_1, kernel=5, stride=2), *[ResBlock(dims, w_1, w_1) for _ in range(blocks)],
            conv(dims, w_1, w_2, stride=2), *[ResBlock(dims, w_2, w_2) for _ in range(blocks)],
            group_norm(w_2, silu=True), zero_init(conv(dims, w_2, latent_channels)))
        self.shortcut = (nn.Conv2d if dims == 2 else nn.Conv3d)(image_channels, latent_channels, 4, stride=4)
        nn.init.orthogonal_(self.shortcut.weight)

    def forward(self, image):
        return self.layers(image) + self.shortcut(image)


class Decoder(nn.Module):
    """Latent (B, c, *s) -> image (B, K, *4s): upsample, then convolve, twice; the encoder's shortcut turned round."""

    def __init__(self, dims, image_channels, latent_channels, widths, blocks=1):
        super().__init__()
        w_0, w_1, w_2 = widths
        self.layers = nn.Sequential(
            conv(dims, latent_channels, w_2), *[ResBlock(dims, w_2, w_2) for _ in range(blocks + 1)],
            nn.Upsample(scale_factor=2), conv(dims, w_2, w_1), *[ResBlock(dims, w_1, w_1) for _ in range(blocks)],
            nn.Upsample(scale_factor=2), conv(dims, w_1, w_0), *[PlainBlock(dims, w_0) for _ in range(blocks)],
            nn.ReLU(inplace=True), conv_out(dims, w_0, image_channels))
        transposed = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.shortcut = transposed(latent_channels, image_channels, 4, stride=4)
        nn.init.orthogonal_(self.shortcut.weight)

    def forward(self, z):
        return self.layers(z) + self.shortcut(z)


class AAE(nn.Module):
    """Adversarial autoencoder, downsampling by 4, latents normalised by the buffers `latent_mean` and `latent_std`.

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

    @torch.no_grad()
    def start_from_blocks(self, images):
        """Set both shortcuts to the principal components of blocks of 4 x 4 (x 4) voxels of the images (B, K, *S).

        Targets are weighed by the inverse std of their detail (within a block), so that each counts alike. The
        autoencoder then starts as the best linear one, and its layers learn what that one misses.
        """
        weight = self.encoder.shortcut.weight                                                 # (c, K, 4, 4[, 4])
        blocks = images.double()
        for axis in range(2, images.ndim):
            blocks = blocks.unfold(axis, 4, 4)
        blocks = blocks.movedim(1, images.ndim - 1).flatten(images.ndim).flatten(0, -3)       # (blocks, K, voxels)
        mean = blocks.mean((0, 2))                                                            # (K,)
        detail = (blocks - blocks.mean(2, keepdim=True)).square().mean((0, 2)).sqrt().clamp(min=1e-6)
        rows = ((blocks - mean[:, None]) / detail[:, None]).flatten(1)                        # (blocks, K x voxels)
        vectors = torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :len(weight)].T.reshape(-1, *weight.shape[1:])
        scale = detail.view(-1, *[1] * (weight.ndim - 2))
        n = len(vectors)
        weight[:n] = (vectors / scale).to(weight)
        self.decoder.shortcut.weight[:n] = (vectors * scale).to(weight)
        self.decoder.shortcut.weight[n:] = 0  # more channels than a block has values
        self.encoder.shortcut.bias.copy_(-(weight.flatten(2).sum(2) * mean.to(weight)).sum(1))
        self.decoder.shortcut.bias.copy_(mean)

    def encode(self, image):
        if any(n % self.factor for n in image.shape[2:]):
            size = tuple(image.shape[2:])
            raise ValueError(f'image size {size} must be a multiple of {self.factor} along every axis')
        return (self.encoder(image).float() - self.latent_mean) / self.latent_std

    def decode(self, z):
        return self.decoder(z * self.latent_std + self.latent_mean)

    def forward(self, image):
        return self.decoder(self.encoder(image))


def latent_grid(image_size):
    """The spatial size of the latents of images of a size."""
    return tuple(n // AAE.factor for n in image_size)


class Discriminator(nn.Module):
    """Patch discriminator: image (B, K, *S) -> one realness score for each patch (B, 1, *S/4; with two widths)."""

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
        self.whiten = SourceWhitening(dims, source_channels)
        self.layers = nn.Sequential(
            conv(dims, self.whiten.kept, width, kernel=5, stride=2), ResBlock(dims, width, width),
            group_norm(width, silu=True), conv(dims, width, 2 * width, stride=2), ResBlock(dims, 2 * width, 2 * width),
            group_norm(2 * width, silu=True), conv(dims, 2 * width, cond_channels))

    def forward(self, source):
        return self.layers(self.whiten(source))


class UNet(nn.Module):
    """Conditional U-Net in latent space.

    forward(z_t, t, source=..., label=...) -> what the diffusion calls the network's output
        z_t    (B, c, *s)     noisy latent
        t      (B,)           time steps, 0 the least noise
        source (B, C, *4s)    source image; or cond (B, cond_channels, *s) = encode_source(source), computed once
        label  (B,)           0..num_classes-1, or num_classes for "unknown" (a learned embedding); None: all unknown
    With features=True it returns (output, features), what the detail branch takes: (B, feature_channels, *s).
    """

    def __init__(self, spatial_dims, latent_channels, source_channels, widths=(64, 128), blocks=2, attention=(1,),
                 cond_channels=32, cond_width=32, num_classes=0, dropout=0.0, checkpointing=False):
        super().__init__()
        self.args = dict(spatial_dims=spatial_dims, latent_channels=latent_channels, source_channels=source_channels,
                         widths=list(widths),
                         blocks=blocks, attention=list(attention), cond_channels=cond_channels, cond_width=cond_width,
                         num_classes=num_classes, dropout=dropout)
        dims, emb = spatial_dims, 4 * widths[0]
        self.num_classes, self.checkpointing, self.emb_dim = num_classes, checkpointing, widths[0] - widths[0] % 2
        self.feature_channels = cond_channels + widths[0]
        self.encode_source = SourceEncoder(dims, source_channels, cond_channels, cond_width)
        self.time = nn.Sequential(nn.Linear(self.emb_dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label = nn.Embedding(num_classes + 1, emb) if num_classes else None
        if num_classes:  # "unknown" starts as nothing, and stays so where no label is dropped (label_drop = 0)
            nn.init.zeros_(self.label.weight[num_classes])
        # At t = T-1 the latent is all noise: a gate of the time step lets the network shut it out there.
        self.conv_in, self.conv_cond = conv(dims, latent_channels, widths[0]), conv(dims, cond_channels, widths[0])
        self.gate = zero_init(nn.Linear(emb, widths[0]))

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
        self.out = nn.Sequential(group_norm(c, silu=True), zero_init(conv(dims, c, latent_channels)))

    def _run(self, level, x, emb):
        """One level's layers; recomputed in the backward pass when `checkpointing` (gradient checkpointing) is on."""
        def layers(x, emb):
            for layer in level:
                x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
            return x
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layers, x, emb, use_reentrant=False, preserve_rng_state=False)
        return layers(x, emb)

    def forward(self, z_t, t, source=None, label=None, cond=None, features=False):
        emb = self.time(timestep_embedding(t, self.emb_dim))
        if self.label is not None:
            emb = emb + self.label(torch.full_like(t, self.num_classes) if label is None else label)
        emb = F.silu(emb)
        cond = self.encode_source(source) if cond is None else cond
        gate = 1 + self.gate(emb).view(len(z_t), -1, *[1] * (z_t.ndim - 2))
        x = gate * self.conv_in(z_t.contiguous()) + self.conv_cond(cond)  # memory format: that of the weights
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
        return (self.out(x), torch.cat([cond, x], dim=1)) if features else self.out(x)


# ------------------------------------------------------------------------------------------------------------------
# The image grid: the detail branch of stage 3 and the regression baseline.

class PixelUNet(nn.Module):
    """A plain U-Net on the image grid: source (B, C, *S) [and an image (B, K, *S)] -> (B, K, *S).

    As the regression baseline it takes the source alone, and starts at zero. As the detail branch (with_image) it takes
    the decoded prediction beside it, and at a quarter of the size the latent U-Net's features (B, feature_channels,
    *S/4); it gives back what the latent space lost, pred = g D(z_0_hat) + R(source, D(z_0_hat), features), and starts
    as D(z_0_hat): g (one number a target) at 1 and R at zero. Without image and features the latent adds nothing: g and
    all weights that read it count as zero.

    With lesion_head the last layer gives two images and a logit: pred = healthy + q * change. The logit is trained to
    tell the lesion (losses.lesion_cross_entropy): p = sigmoid(logit) is its probability, and what is there is decided,
    not averaged. q = sigmoid(logit + log(odds)): of a lesion's odds, p / (1 - p), the image holds `odds` times as much.
    In the detail branch the error of the image does not reach the logit: its lesion weight would make p too large.
    forward(..., logit=True) -> (pred, logit (B, 1, *S), or None without lesion_head); forward(..., apart=True) ->
    (healthy, change, logit, spread), to be put together later (translate.decide); without a head None in its place.

    With classes (the label head) it gives one image a class, pred = image_0 + sum over c of share_c * change_c, so that
    what a label decides is not guessed by the network: shares (B, classes) are those of the known labels in training,
    of LabelPrior where they are not known. spread (B, K, *S) is how far the image is from that of the class, which is
    c with chances[:, c] (B, classes): sqrt(sum over c of chances_c (image_c - pred)^2); None without chances.
    """

    def __init__(self, spatial_dims, source_channels, image_channels, with_image, widths=(32, 64, 96), blocks=1,
                 feature_channels=0, lesion_head=False, classes=0):
        super().__init__()
        self.args = dict(spatial_dims=spatial_dims, source_channels=source_channels, image_channels=image_channels,
                         with_image=with_image, widths=list(widths), blocks=blocks, feature_channels=feature_channels,
                         lesion_head=lesion_head, classes=classes)
        dims = spatial_dims
        self.whiten = SourceWhitening(dims, source_channels)
        self.share = nn.Parameter(torch.ones(image_channels)) if with_image else None  # g
        self.conv_in = conv(dims, self.whiten.kept + image_channels * with_image, widths[0])
        self.down, self.shrink, self.grow, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, w in enumerate(widths):
            self.down.append(nn.Sequential(*self.level(dims, i, w, blocks)))
            if i < len(widths) - 1:
                self.shrink.append(conv(dims, w, widths[i + 1], stride=2))
                self.grow.append(conv(dims, widths[i + 1], w, kernel=1))
                self.up.append(nn.Sequential(conv(dims, 2 * w, w), *self.level(dims, i, w, blocks)))
        self.join_at = min(2, len(widths) - 1)  # the level at a quarter of the size, or the coarsest
        self.join = conv(dims, feature_channels, widths[self.join_at], kernel=1) if feature_channels else None
        self.prior = LabelPrior(source_channels, classes) if classes else None
        self.parts = [image_channels, *[image_channels, 1] * lesion_head, *[image_channels] * (classes - 1)]
        self.out = nn.Sequential(nn.ReLU(inplace=True), conv_out(dims, widths[0], sum(self.parts)))
        if lesion_head:
            with torch.no_grad():
                self.out[-1].bias[2 * image_channels] = -3  # p = 0.05: a lesion is rare

    @staticmethod
    def level(dims, i, w, blocks):
        return [ResBlock(dims, w, w) if i else PlainBlock(dims, w) for _ in range(blocks)]

    def forward(self, source, image=None, features=None, logit=False, odds=1.0, shares=None, apart=False,
                chances=None):
        latent = image is not None
        if self.share is not None and not latent:
            image = source.new_zeros(len(source), self.args['image_channels'], *source.shape[2:])
        if self.prior is not None and shares is None:
            shares = self.prior.shares(source)
        x = self.whiten(source)
        x, skips = self.conv_in(x if image is None else torch.cat([x, image.to(x.dtype)], dim=1)), []
        for i, block in enumerate(self.down):
            if i == self.join_at and features is not None and self.join is not None:
                x = x + upsample(self.join(features), x.shape[2:])
            x = block(x)
            if i < len(self.shrink):
                skips.append(x)
                x = self.shrink[i](x)
        for i in reversed(range(len(self.up))):
            x = upsample(self.grow[i](x), skips[i].shape[2:])
            x = self.up[i](torch.cat([x, skips[i]], dim=1))
        pred, *more = self.out(x).split(self.parts, dim=1)
        change, lesion_logit = more[:2] if self.args['lesion_head'] else (None, None)
        changes = more[len(more) + 1 - self.args['classes']:] if self.args['classes'] else []  # of classes 1, 2 ..
        mixed = sum(_times(shares[:, c], x) for c, x in enumerate(changes, start=1))
        pred = pred + mixed if changes else pred
        if latent:
            pred = pred + self.share.view(-1, *[1] * (image.ndim - 2)) * image
        if apart:
            spread = None
            if chances is not None:
                squares = [_times(chances[:, c], (x - mixed).float() ** 2) for c, x in enumerate([0, *changes])]
                spread = sum(squares).sqrt()
            return pred, change, lesion_logit, spread
        if change is not None:
            q = (lesion_logit.float() + math.log(odds)).sigmoid()
            pred = pred + (q if image is None else q.detach()) * change
        return (pred, lesion_logit) if logit else pred

    @torch.no_grad()
    def start_from(self, regression):
        """Start the detail branch as a regression baseline of its widths: g and what that one has not begin at zero."""
        theirs = dict(regression.named_parameters())
        for name, p in self.named_parameters():
            if name == 'conv_in.weight':
                p.zero_()[:, :theirs[name].shape[1]] = theirs[name]
            else:
                p.copy_(theirs[name]) if name in theirs else p.zero_()
        if self.prior is not None:
            self.prior.load_state_dict(regression.prior.state_dict())


def _times(weight, image):
    """weight (B,) times image (B, K, *S)."""
    return weight.view(-1, *[1] * (image.ndim - 1)) * image


def fingerprint(net):
    """A short hash of a network's (or a state_dict's) weights and buffers: which autoencoder does a U-Net belong to?"""
    digest = hashlib.sha256()
    for name, tensor in sorted((net if isinstance(net, dict) else net.state_dict()).items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def count_parameters(net):
    """Number of trainable parameters."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)
