"""
The diffusion: the forward process, what the network predicts, its loss, and the samplers.

`Diffusion` owns the goal of the regression (`net_target`), the way back (`split`) and the loss, so that training and
sampling cannot disagree. A sampler is a function of any network: net(z_t, t) -> output. Time steps run from 0 (least
noise) to T-1.

    z_t = sqrt(ab_t) z_0 + sqrt(1 - ab_t) eps             the forward process; ab is alpha_bar
    v   = sqrt(ab_t) eps - sqrt(1 - ab_t) z_0             Salimans & Ho 2022
"""

import math

import torch
from torch import nn

SCHEDULES = ('scaled_linear', 'linear', 'cosine')
PREDICTIONS = ('v', 'z_0', 'eps')
SAMPLERS = ('one_step', 'ddim', 'ddpm')


def alpha_bars(schedule, timesteps, zero_terminal_snr):
    """alpha_bar_t for t = 0..T-1, float64 (T,); with zero_terminal_snr it ends in 0 (arXiv 2305.08891, algorithm 1)."""
    if schedule == 'scaled_linear':
        betas = torch.linspace(math.sqrt(0.0015), math.sqrt(0.0195), timesteps, dtype=torch.float64) ** 2
    elif schedule == 'linear':
        betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    elif schedule == 'cosine':  # Nichol & Dhariwal 2021, equation 17
        u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule '{schedule}' is not one of {', '.join(SCHEDULES)}")
    ab = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        s = ab.sqrt()
        ab = ((s - s[-1]) * s[0] / (s[0] - s[-1])) ** 2
    return ab


class Diffusion(nn.Module):
    """The forward process q(z_t | z_0) and the three ways of writing what the network predicts.

    predict: 'v', 'z_0' or 'eps'. v and z_0 use a schedule rescaled to zero terminal SNR; eps never (it could not be
    inverted).
    last_step_share: the fraction of training draws at t = T-1, where v makes the network a plain regression of z_0.
    """

    def __init__(self, predict='v', schedule='scaled_linear', timesteps=1000, loss_weight='none', last_step_share=0.15):
        super().__init__()
        if predict not in PREDICTIONS:
            raise ValueError(f"predict '{predict}' is not one of {', '.join(PREDICTIONS)}")
        if loss_weight not in ('none', 'min_snr'):
            raise ValueError(f"loss_weight '{loss_weight}' is not one of none, min_snr")
        self.args = dict(predict=predict, schedule=schedule, timesteps=timesteps, loss_weight=loss_weight,
                         last_step_share=last_step_share)
        self.predict, self.timesteps = predict, timesteps
        self.loss_weight, self.last_step_share = loss_weight, last_step_share
        ab = alpha_bars(schedule, timesteps, zero_terminal_snr=predict != 'eps')
        self.register_buffer('alpha_bar', ab, persistent=False)

    def _ab(self, t, like):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like`, in float32 at least."""
        ab = self.alpha_bar[t].view(-1, *[1] * (like.ndim - 1))
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        return ab.sqrt().to(dtype), (1 - ab).sqrt().to(dtype)

    def add_noise(self, z_0, eps, t):
        """z_t, the noisy latent."""
        a, s = self._ab(t, z_0)
        return a * z_0 + s * eps

    def net_target(self, z_0, eps, t):
        """What the network regresses on."""
        a, s = self._ab(t, z_0)
        return {'eps': eps, 'z_0': z_0, 'v': a * eps - s * z_0}[self.predict]

    def split(self, net_out, z_t, t):
        """Network output -> (z_0_hat, eps_hat)."""
        a, s = self._ab(t, z_t)
        if self.predict == 'v':
            return a * z_t - s * net_out, s * z_t + a * net_out
        if self.predict == 'eps':
            return (z_t - s * net_out) / a, net_out
        return net_out, (z_t - a * net_out) / s  # s is never 0: even t = 0 carries noise

    def weight(self, t):
        """Loss weight of a time step (B,): 1, or min-SNR with g = 5 (arXiv 2303.09556), for v 1 and not 0 at SNR 0."""
        if self.loss_weight == 'none':
            return torch.ones_like(t, dtype=torch.float32)
        ab = self.alpha_bar[t]
        snr = ab / (1 - ab)
        return {'eps': snr.clamp(max=5) / snr.clamp(min=1e-12),
                'z_0': (snr + 1).clamp(max=5),
                'v': (snr + 1).clamp(max=5) / (snr + 1)}[self.predict].float()

    def draw(self, batch, device, share=None):
        """Random time steps (B,): a share of them at T-1 (never for eps), the rest uniform over 0..T-1."""
        t = torch.randint(0, self.timesteps, (batch,), device=device)
        share = 0 if self.predict == 'eps' else self.last_step_share if share is None else share
        return torch.where(torch.rand(batch, device=device) < share, self.timesteps - 1, t)

    @staticmethod
    def drop_labels(labels, unknown, p):
        """Replace labels (B,) by `unknown` with probability p, so that the network also learns to do without."""
        return torch.where(torch.rand(len(labels), device=labels.device) < p, unknown, labels)

    def draws(self, z_0, labels, unknown, drop, share=None):
        """What a training step draws for latents z_0: time steps (B,), noise like z_0, labels (B,), some dropped."""
        t, eps = self.draw(len(z_0), z_0.device, share), torch.randn_like(z_0)
        return t, eps, self.drop_labels(labels, unknown, drop)

    def loss(self, net, z_0, t=None, eps=None, **cond):
        """Per-sample diffusion loss (B,) and the estimate z_0_hat it was made with; cond goes to the network."""
        t = self.draw(len(z_0), z_0.device) if t is None else t
        eps = torch.randn_like(z_0) if eps is None else eps
        z_t = self.add_noise(z_0, eps, t)
        net_out = net(z_t, t, **cond).float()
        loss = (net_out - self.net_target(z_0, eps, t)).square().flatten(1).mean(1) * self.weight(t)
        return loss, self.split(net_out, z_t, t)[0]


# ------------------------------------------------------------------------------------------------------------------
# Samplers. Latents are never clipped.

def trailing_steps(timesteps, num_steps):
    """num_steps time steps in descending order, T-1 first (arXiv 2305.08891, "trailing")."""
    if not 1 <= num_steps <= timesteps:
        raise ValueError(f'num_steps {num_steps} must lie in 1..{timesteps}')
    return [round(timesteps - i * timesteps / num_steps) - 1 for i in range(num_steps)]


def one_step(diffusion, net, z_T):
    """The network's estimate of z_0 from pure noise: a plain regression of the mean."""
    if diffusion.predict == 'eps':
        raise ValueError("sampler 'one_step' needs predict 'v' or 'z_0': an error of eps is multiplied by "
                         "sqrt((1-ab)/ab) at t = T-1; use 'ddim'")
    t = torch.full((len(z_T),), diffusion.timesteps - 1, device=z_T.device)
    return diffusion.split(net(z_T, t).to(z_T.dtype), z_T, t)[0]


def ddim_sample(diffusion, net, z_T, num_steps=50, eta=0.0, noise=torch.randn_like):
    """Denoise z_T to z_0 at trailing steps, T-1 first (DDIM, Song 2021, equation 12); eta 0: deterministic, 1: DDPM.

    noise(z) draws fresh noise shaped like z; it is only called where eta > 0 and not at the last step.
    """
    steps = trailing_steps(diffusion.timesteps, num_steps)
    z_t = z_T
    for t, t_next in zip(steps, steps[1:] + [-1], strict=True):
        tt = torch.full((len(z_T),), t, device=z_T.device)
        z_0_hat, eps_hat = diffusion.split(net(z_t, tt).to(z_T.dtype), z_t, tt)
        if t_next < 0:
            return z_0_hat
        ab, ab_next = diffusion.alpha_bar[t], diffusion.alpha_bar[t_next]
        sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt()
        direction = (1 - ab_next - sigma ** 2).clamp(min=0).sqrt()
        z_t = ab_next.sqrt().to(z_T.dtype) * z_0_hat + direction.to(z_T.dtype) * eps_hat
        if eta > 0:
            z_t = z_t + sigma.to(z_T.dtype) * noise(z_t)


def ddpm_sample(diffusion, net, z_T, num_steps=1000, noise=torch.randn_like):
    """Ancestral sampling (DDPM, Ho 2020, algorithm 2, posterior variance) at trailing steps: DDIM with eta = 1."""
    return ddim_sample(diffusion, net, z_T, num_steps, eta=1.0, noise=noise)


def sample(diffusion, net, z_T, sampler='one_step', num_steps=50, noise=torch.randn_like):
    """Run one of the samplers by name."""
    if sampler == 'one_step':
        return one_step(diffusion, net, z_T)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler '{sampler}' is not one of {', '.join(SAMPLERS)}")
    return ddim_sample(diffusion, net, z_T, num_steps, eta=float(sampler == 'ddpm'), noise=noise)
