"""
Makes diffusers.json, which test_diffusion.py compares with; it needs diffusers, which nothing else here does.

alpha_bar tables and DDIM steps of the library's own scheduler. Its tables are float32; they are written as they are, at
the time steps that the samplers visit, and the steps are then computed in float64 with these tables. `net` is a
stand-in for a network. `ancestral`: one step with eta = 1 and the given noise, from the 4th of 10 trailing steps.
`ddpm`: all steps of the library's DDPM scheduler (posterior variance) with the k-th noise NOISE * cos(k), k = 0, 1, ...

The numbers of steps divide 1000. With others the library is at odds with itself: of 7 trailing steps the second is 856,
but the first leads to 999 - 1000 // 7 = 857, and the last to 0, which still carries noise.
"""
import itertools
import json
import math
from pathlib import Path

import diffusers
import torch
from diffusers.schedulers import scheduling_ddpm

STEPS = (1, 8, 50)
X = torch.tensor([1.54, -0.29, -2.18, 0.57, -1.08, -1.40], dtype=torch.float64)
NOISE = torch.linspace(-1, 1, 6, dtype=torch.float64)
PREDICTIONS = dict(v='v_prediction', z_0='sample', eps='epsilon')
SCHEDULES = dict(scaled_linear=dict(beta_schedule='scaled_linear', beta_start=0.0015, beta_end=0.0195),
                 linear=dict(beta_schedule='linear', beta_start=1e-4, beta_end=0.02),
                 cosine=dict(beta_schedule='squaredcos_cap_v2'))


def net(z, t):
    return 0.3 * z + 0.1 * (t / 1000) - 0.05 * torch.sin(3 * z)


def reference(predict, schedule):
    ddim = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=True,
                                   prediction_type=PREDICTIONS[predict], timestep_spacing='trailing',
                                   rescale_betas_zero_snr=predict != 'eps', **SCHEDULES[schedule])
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()  # the float32 values, but float64 arithmetic
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    made = dict(steps={}, ddim={})
    for n in STEPS:
        ddim.set_timesteps(n)
        z = X.clone()
        for t in ddim.timesteps:
            z = ddim.step(net(z, int(t)), t, z, eta=0.0).prev_sample
        made['steps'][n], made['ddim'][n] = ddim.timesteps.tolist(), z.tolist()
    ddim.set_timesteps(10)
    t = ddim.timesteps[3]
    made['ancestral'] = ddim.step(net(X, int(t)), t, X, eta=1.0, variance_noise=NOISE).prev_sample.tolist()
    made['ddpm'] = {n: ancestral(predict, schedule, n) for n in STEPS}
    visited = {0, 1, 10, 500, 998, 999, *ddim.timesteps.tolist()}.union(*made['steps'].values())
    made['alpha_bar'] = {t: float(ddim.alphas_cumprod[t]) for t in sorted(visited)}
    return made


def ancestral(predict, schedule, num_steps):
    """X brought to z_0 by the library's DDPM scheduler, in float64 with its own float32 table."""
    ddpm = diffusers.DDPMScheduler(num_train_timesteps=1000, clip_sample=False, variance_type='fixed_small',
                                   prediction_type=PREDICTIONS[predict], timestep_spacing='trailing',
                                   rescale_betas_zero_snr=predict != 'eps', **SCHEDULES[schedule])
    ddpm.alphas_cumprod, ddpm.one = ddpm.alphas_cumprod.double(), ddpm.one.double()
    ddpm.set_timesteps(num_steps)
    drawn = (NOISE * math.cos(k) for k in itertools.count())
    scheduling_ddpm.randn_tensor = lambda *args, **more: next(drawn)
    z = X[None]  # this scheduler looks at the channels
    for t in ddpm.timesteps:
        z = ddpm.step(net(z, int(t)), t, z).prev_sample
    return z[0].tolist()


if __name__ == '__main__':
    found = {f'{p} {s}': reference(p, s) for p in PREDICTIONS for s in SCHEDULES}
    path = Path(__file__).with_name('diffusers.json')
    facts = dict(diffusers=diffusers.__version__, x=X.tolist(), noise=NOISE.tolist())
    path.write_text(json.dumps(facts | found, indent=0).replace(',\n', ', '))
