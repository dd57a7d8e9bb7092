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
    return (_Conv2d if dims == 2 else _Conv3d)(c_in, c_out, kernel, stride, padding=kernel // 2)


class _Conv2d(nn.Conv2d):
    """nn.Conv2d, which on a CPU computes in float32 where an axis is shorter than the kernel.

    There, in bf16, oneDNN (PyTorch 2.13, a CPU with avx512_bf16 and without AMX) leaves parts of the gradient of the
    weights unwritten: they come out as whatever the memory held. In 2D that was seen with a stride of 2.
    """

    def forward(self, x):
        if x.device.type != 'cpu' or min(x.shape[2:]) >= self.kernel_size[0]:
            return super().forward(x)
        with torch.autocast('cpu', enabled=False):
            return super().forward(x.to(self.weight.dtype))


class _Conv3d(nn.Conv3d):
    """nn.Conv3d, on a CPU with two detours: that of _Conv2d, and for a single small volume.

    In float32 PyTorch does not take oneDNN for it, and needs four times as long or more; so in inference oneDNN is
    called by its name.
    """

    def forward(self, x):
        if x.device.type != 'cpu':
            return super().forward(x)
        exact = not torch.is_autocast_enabled('cpu') and x.dtype == torch.float32
        if exact and len(x) == 1 and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
            return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding, self.stride, self.dilation,
                                            self.groups)
        if min(x.shape[2:]) >= self.kernel_size[0]:
            return super().forward(x)
        with torch.autocast('cpu', enabled=False):
            return super().forward(x.to(self.weight.dtype))


class _OutConv3d(_Conv3d):
    """A 3D convolution to an image of few channels: computed with 8 where oneDNN takes a fifth of the time for them."""

    def forward(self, x):
        if x.device.type != 'cpu' or x.shape[2:].numel() <= 2 ** 20 or self.out_channels >= 8:
            return super().forward(x)
        more = 8 - self.out_channels
        weight, bias = F.pad(self.weight, [0] * 9 + [more]), F.pad(self.bias, [0, more])
        return F.conv3d(x, weight, bias, self.stride, self.padding)[:, :self.out_channels]


def conv_out(dims, c_in, c_out):
    """The last 3x3(x3) convolution of a network that gives an image; it starts at zero."""
    return zero_init(nn.Conv2d(c_in, c_out, 3, padding=1) if dims == 2 else _OutConv3d(c_in, c_out, 3, padding=1))


def zero_init(layer):
    """Start a layer at zero, so that the block it ends is the identity (or the branch adds nothing) at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def add(x, y):
    """x + y; at inference into y: new memory costs as much as the adding (training was measured slower that way)."""
    return x + y if torch.is_grad_enabled() else y.add_(x)


def _rows(x):
    """(B, C, *S) -> (B, positions, C); a view where channels lie last in memory."""
    return x.movedim(1, -1).reshape(len(x), -1, x.shape[1])


def _affine(rows, a, b):
    """rows * a + b for rows (B, positions, C), a (B or 1, C), b like a or like rows: several positions as one row."""
    n, positions, c = rows.shape
    fold = 1
    while fold * c < 1024 and positions % (2 * fold) == 0:
        fold *= 2
    long = n, positions // fold, fold * c
    a, b = (v.reshape(long) if v.ndim == 3 else v.to(rows.dtype).repeat(1, fold).unsqueeze(1) for v in (a, b))
    return torch.addcmul(b, rows.reshape(long), a).view(n, positions, c)


class _GroupNorm(torch.autograd.Function):
    """PyTorch's group norm, with a scale and shift for each channel or each sample's channels, and SiLU if asked.

    Its own backward pass takes several times as long on a CPU where channels lie last.
    dx = a dy + b x + c, with a per channel, b and c per group, from the sums over positions of dy and dy * x.
    weight, bias: (B or 1, C) float32.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        rows = _rows(x)
        n, positions, c = rows.shape
        shared = (weight[0], bias[0]) if len(weight) == 1 else (None, None)
        y, mean, rstd = torch.native_group_norm(x, *shared, n, c, positions, groups, eps)
        y = _rows(y) if len(weight) == 1 else _affine(_rows(y), weight, bias)
        ctx.save_for_backward(rows, weight, mean, rstd, *([y] if silu else []))
        ctx.groups, ctx.size, ctx.silu = groups, x.shape[2:], silu
        return (F.silu(y) if silu else y).view(n, *ctx.size, c).movedim(-1, 1)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd, *y = ctx.saved_tensors
        dy = torch.ops.aten.silu_backward(_rows(dy), y[0]) if ctx.silu else _rows(dy)
        n, positions, c = x.shape
        groups, per = ctx.groups, c // ctx.groups
        mean, rstd = (v.to(weight.dtype).view(n, groups, 1) for v in (mean, rstd))
        ones = x.new_ones(n, 1, positions)
        s_1, s_2 = (torch.bmm(ones, v).to(weight.dtype).view(n, groups, per) for v in (dy, dy * x))
        centred = (s_2 - mean * s_1) * rstd  # sum of dy * x_hat
        gamma = weight.view(-1, groups, per)
        p, q = ((gamma * v).mean(2, keepdim=True) / positions for v in (s_1, centred))
        a, b, k = gamma * rstd, -rstd ** 2 * q, -rstd * p + rstd ** 2 * q * mean
        a, b, k = (v.expand(n, groups, per).reshape(n, c) for v in (a, b, k))
        dx = _affine(dy, a, _affine(x, b, k))
        d_weight, d_bias = centred.view(n, c), s_1.view(n, c)
        if len(weight) == 1:
            d_weight, d_bias = d_weight.sum(0, keepdim=True), d_bias.sum(0, keepdim=True)
        return dx.view(n, *ctx.size, c).movedim(-1, 1), d_weight, d_bias, None, None, None


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, then the scale and shift (B, C) of an embedding, and SiLU, if asked."""

    def __init__(self, groups, channels, silu=False):
        super().__init__(groups, channels)
        self.silu = silu

    def forward(self, x, scale=None, shift=None):
        large = x.shape[2:].numel() > 1000 and not x.is_contiguous()
        if x.device.type == 'cpu' and large:
            weight, bias = self.weight[None], self.bias[None]
            if scale is not None:
                weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
            return _GroupNorm.apply(x, weight, bias, self.num_groups, self.eps, self.silu)
        y = super().forward(x)
        if scale is not None:
            scale, shift = (v.view(*v.shape, *[1] * (x.ndim - 2)) for v in (scale, shift))
            y = y * (1 + scale) + shift
        return F.silu(y) if self.silu else y


def group_norm(channels, silu=False):
    """GroupNorm with 8 channels a group or more; one group for narrow layers."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= min(8, channels))
    return GroupNorm(groups, channels, silu)


class PlainBlock(nn.Module):
    """x + conv(relu(conv(x))), without norms: for full resolution, where a norm takes as long as a convolution."""

    def __init__(self, dims, channels):
        super().__init__()
        self.conv_1, self.conv_2 = conv(dims, channels, channels), zero_init(conv(dims, channels, channels))

    recompute = False

    def forward(self, x):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._block, x, use_reentrant=False, preserve_rng_state=False)
        return self._block(x)

    def _block(self, x):
        return add(x, self.conv_2(F.relu(self.conv_1(x), inplace=True)))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); an embedding, if any, scales and shifts the second norm."""

    def __init__(self, dims, c_in, c_out, emb=0):
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(c_in, silu=True), conv(dims, c_in, c_out)
        self.norm_2, self.conv_2 = group_norm(c_out, silu=True), zero_init(conv(dims, c_out, c_out))
        self.skip = nn.Identity() if c_in == c_out else conv(dims, c_in, c_out, kernel=1)
        self.modulate = zero_init(nn.Linear(emb, 2 * c_out)) if emb else None

    recompute = False  # gradient checkpointing: keep only the input, compute the block again in the backward pass

    def forward(self, x, emb=None):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._block, x, emb, use_reentrant=False, preserve_rng_state=False)
        return self._block(x, emb)

    def _block(self, x, emb):
        scale_shift = () if self.modulate is None else self.modulate(emb).chunk(2, dim=1)
        return add(self.skip(x), self.conv_2(self.norm_2(self.conv_1(self.norm_1(x)), *scale_shift)))


def recompute_blocks(net, on):
    """Switch gradient checkpointing of a network's residual blocks on or off."""
    for module in net.modules():
        if isinstance(module, (ResBlock, PlainBlock)):
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
        if x.device.type == 'cpu' and q.shape[2] <= 512:  # measured faster there
            h = (q @ k.mT / math.sqrt(q.shape[3])).softmax(-1) @ v
        else:
            h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return x + self.proj(h.transpose(-1, -2).reshape(x.shape))  # h (B, heads, positions, c)


def upsample(x, size):
    """Nearest-neighbour upsampling to an explicit size, so that odd sizes meet their skip connection."""
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode='nearest')


class SourceWhitening(nn.Module):
    """A 1 x 1 convolution from the source's channels to at most KEPT that starts as their whitening.

    CT perfusion's few HU of contrast come to unit size: the largest principal components over the channels, in the
    mask, each divided by sqrt(variance + median variance), so that signal comes to unit variance, components that hold
    noise alone to half of it. Where most channels repeat each other, noise counts as at least 1e-7 of the largest
    variance, float32's precision: rounding is not signal. Trained with the rest.
    """

    KEPT = 16  # of the 45 channels of three slices: as good as all of them, and a little faster

    def __init__(self, dims, channels):
        super().__init__()
        self.kept = min(channels, self.KEPT)
        self.conv = conv(dims, channels, self.kept, kernel=1)

    @torch.no_grad()
    def start_from(self, source, mask):
        """Set the weights from sources (B, C, *S) and masks (B, 1, *S) of the training set."""
        rows = source.movedim(1, -1)[mask[:, 0] > 0].double()  # (voxels, C)
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(rows.T).view(len(mean), -1))
        noise = torch.maximum(values.median(), 1e-7 * values[-1]).clamp(min=1e-12)
        weight = vectors.T / (values.clamp(min=0) + noise).sqrt()[:, None]
        weight = weight.flip(0)[:self.kept]  # the largest first
        self.conv.weight.copy_(weight.view_as(self.conv.weight))
        self.conv.bias.copy_(-weight @ mean)

    def forward(self, source):
        if self.conv.weight.numel() == 1:  # a convolution of one channel takes several times as long
            return source * self.conv.weight[0] + self.conv.bias
        return self.conv(source)
