"""
The optimisers: AdamW, and Muon for the convolution kernels with AdamW for the rest.

Muon (Jordan et al., 2024) replaces the momentum of a weight matrix by the nearest orthogonal one, so that each step
moves all directions of the matrix alike. After 300 steps on the stroke demo, a U-Net on the image grid has a training
error of 0.056 with it, of 0.083 with AdamW.
"""

import torch

MUON_SCALE = 20  # the orthogonal step is taken with this many times the learning rate of AdamW


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # of Jordan et al.: singular values between 0.7 and 1.2 in 5 steps


def orthogonalise(g, dtype=torch.float32, steps=5):
    """The orthogonal matrix nearest to each of a batch of matrices (B, m, n), roughly: singular values near 1.

    Newton-Schulz iteration x <- a x + b (x x^T) x + c (x x^T)^2 x. On a CPU the polynomials of the small matrix x x^T
    are multiplied up first, in float32, and x comes last: half of the time. dtype is that of the products elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    x = g.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    if x.device.type == 'cpu':
        xx, product = x @ x.mT, None
        for i in range(steps):
            factor = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
            if i < steps - 1:
                xx = factor @ xx @ factor
        x = product @ x
    else:
        x = x.to(dtype)
        for _ in range(steps):
            xx = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: w <- (1 - lr * decay) w - lr * sqrt(max(1, m / n)) * orthogonal(momentum).

    Kernels (m, c, *K) count as matrices (m, n = c x K). Those of one shape are taken together.
    """

    def __init__(self, params, lr=0.0, momentum=0.95, weight_decay=0.01, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]['momentum'] = torch.zeros_like(p)
                momenta = [self.state[p]['momentum'] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
                directions = torch._foreach_lerp(grads, momenta, group['momentum'])
                updates = orthogonalise(torch.stack([u.flatten(1) for u in directions]), self.dtype)
                lr = group['lr'] * max(1, shape[0] / shape[1:].numel()) ** 0.5
                torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_add_(params, [u.view(shape) for u in updates], alpha=-lr)


class MuonAdamW:
    """Muon for the convolution kernels between hidden layers, AdamW for everything else, as one optimiser."""

    def __init__(self, muon, adamw):
        self.parts = dict(muon=muon, adamw=adamw)

    @property
    def param_groups(self):
        return [group for opt in self.parts.values() for group in opt.param_groups]

    def step(self):
        for opt in self.parts.values():
            opt.step()

    def zero_grad(self, set_to_none=True):
        for opt in self.parts.values():
            opt.zero_grad(set_to_none)

    def state_dict(self):
        return {name: opt.state_dict() for name, opt in self.parts.items()}

    def load_state_dict(self, state):
        for name, opt in self.parts.items():
            opt.load_state_dict(state[name])


def is_hidden_kernel(name, p):
    """Whether Muon may take it: a convolution kernel with 16 channels or more on both sides."""
    return p.ndim >= 4 and min(p.shape[:2]) >= 16 and 'whiten' not in name


def adamw(groups):
    """Fused AdamW without weight decay (it multiplies many small kernels into one)."""
    opt = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    opt.register_load_state_dict_post_hook(_stride_as_weights)
    return opt


@torch.no_grad()
def _stride_as_weights(opt):
    """Moments with the memory format of their weights, which may have been another where they were saved.

    Fused AdamW goes through memory, not through indices: with other strides it mixes up the weights.
    """
    for p, state in opt.state.items():
        for name, value in state.items():
            if value.shape == p.shape:
                state[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def make(kind, nets, precision='fp32'):
    """The optimiser of some networks: kind 'muon' or 'adam', nets a list of (network, factor on the learning rate).

    Each group's `lr_scale` is what utils.set_lr multiplies the learning rate by. Under bf16 Muon iterates in bf16, but
    not on a CPU.
    """
    named = [([(n, p) for n, p in net.named_parameters() if p.requires_grad], scale) for net, scale in nets]
    if kind == 'adam':
        return adamw([dict(params=[p for _, p in params], lr_scale=scale) for params, scale in named])
    kernels, rest = [], []
    for params, scale in named:
        kernels.append(dict(params=[p for n, p in params if is_hidden_kernel(n, p)], lr_scale=MUON_SCALE * scale))
        rest.append(dict(params=[p for n, p in params if not is_hidden_kernel(n, p)], lr_scale=scale))
    kernels = [group for group in kernels if group['params']]
    if not kernels:
        return adamw(rest)
    return MuonAdamW(Muon(kernels, dtype=torch.bfloat16 if precision == 'bf16' else torch.float32), adamw(rest))
