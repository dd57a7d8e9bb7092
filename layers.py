"""
The layers that the networks are made of, for 2D and 3D alike (`dims` 2 or 3): x (B, C, *S) -> (B, C', *S').
"""

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
        a, b, k = gamma * rstd, -rstd ** 2 * q, -rstd * p + rstd ** 2 * q * mean
        a, b, k = (v.expand(n, groups, per).reshape(n, c, *[1] * (x.ndim - 2)).to(x.dtype) for v in (a, b, k))
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
    """x + conv(silu(norm(conv(silu(norm(x)))))); an embedding, if any, scales and shifts the second norm."""

    def __init__(self, dims, c_in, c_out, emb=0):
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(c_in), conv(dims, c_in, c_out)
        self.norm_2, self.conv_2 = group_norm(c_out), zero_init(conv(dims, c_out, c_out))
        self.skip = nn.Identity() if c_in == c_out else conv(dims, c_in, c_out, kernel=1)
        self.modulate = zero_init(nn.Linear(emb, 2 * c_out)) if emb else None

    recompute = False  # gradient checkpointing: keep only the input, compute the block again in the backward pass

    def forward(self, x, emb=None):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._block, x, emb, use_reentrant=False)
        return self._block(x, emb)

    def _block(self, x, emb):
        h = self.norm_2(self.conv_1(F.silu(self.norm_1(x))))
        if self.modulate is not None:
            scale, shift = self.modulate(emb).view(len(x), -1, *[1] * (x.ndim - 2)).chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv_2(F.silu(h))


def recompute_blocks(net, on):
    """Switch gradient checkpointing of a network's residual blocks on or off."""
    for module in net.modules():
        if isinstance(module, ResBlock):
            module.recompute = on


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
        h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())  # (B, heads, positions, c)
        return x + self.proj(h.transpose(-1, -2).reshape(x.shape))


def upsample(x, size):
    """Nearest-neighbour upsampling to an explicit size, so that odd sizes meet their skip connection."""
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode='nearest')


class SourceWhitening(nn.Module):
    """A 1 x 1 convolution on the source's channels that starts as their whitening.

    CT perfusion's few HU of contrast come to unit size: principal components over the channels, in the mask, each
    divided by sqrt(variance + median variance), so that signal comes to unit variance, components that hold noise alone
    to half of it. Trained with the rest.
    """

    def __init__(self, dims, channels):
        super().__init__()
        self.conv = conv(dims, channels, channels, kernel=1)

    @torch.no_grad()
    def start_from(self, source, mask):
        """Set the weights from sources (B, C, *S) and masks (B, 1, *S) of the training set."""
        rows = source.movedim(1, -1)[mask[:, 0] > 0].double()  # (voxels, C)
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(rows.T).view(len(mean), -1))
        weight = vectors.T / (values.clamp(min=1e-12) + values.median().clamp(min=1e-12)).sqrt()[:, None]
        self.conv.weight.copy_(weight.view_as(self.conv.weight))
        self.conv.bias.copy_(-weight @ mean)

    def forward(self, source):
        return self.conv(source)
