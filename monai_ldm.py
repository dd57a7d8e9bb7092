"""
A peer: MONAI's latent diffusion model on the same data, by the recipe of its 2D tutorial (2d_ldm), in our own lines on
MONAI's public classes.

python monai_ldm.py --exp monai --cpu_seconds 1200     trains, then translates the validation and the test split

AutoencoderKL with PatchDiscriminator (L1, KL 1e-6, least-squares adversarial loss 0.01 after a tenth of the steps, Adam
1e-4 and 5e-4), then DiffusionModelUNet (noise, mean squared error, DDPMScheduler, latents divided by their std, Adam
1e-4). Half of the CPU seconds for each, counted as the process's: all threads. Departures: the perceptual loss needs
weights from the network and is left out; batches, flips and shifts are ours; the widths are those of the settings, or
the tutorial's with --tutorial_widths; the source enters averaged to the latent grid, beside the noisy latent. 50 DDIM
steps at inference. Writes result/<exp>/monai_{validation,test}.csv and monai.json.

MONAI is not in requirements.txt: install monai and einops into another environment and run this from there.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

import config
import dataset
import peers
import utils
from evaluate import evaluate
from translate import starting_noise

TUTORIAL = dict(aae_channels=(128, 128, 256), unet_channels=(128, 256, 512), unet_blocks=2, unet_attention=(1, 2),
                latent_channels=3)


def networks(cfg):
    """AutoencoderKL, PatchDiscriminator, DiffusionModelUNet on latent and source channels."""
    nets = peers.load_monai()[0]
    dims, targets = cfg.spatial_dims, len(cfg.targets)
    aae = nets.AutoencoderKL(dims, targets, targets, (2,) * 3, cfg.aae_channels, (False,) * 3, cfg.latent_channels, 16,
                             with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False)
    disc = nets.PatchDiscriminator(dims, 32, targets, num_layers_d=2)
    unet = nets.DiffusionModelUNet(
        dims, cfg.latent_channels + (cfg.frames or 1), cfg.latent_channels, num_res_blocks=cfg.unet_blocks,
        channels=cfg.unet_channels, attention_levels=[i in cfg.unet_attention for i in range(len(cfg.unet_channels))],
        norm_num_groups=16, num_head_channels=32)
    return aae, disc, unet


def batches(cohort, cfg, seconds):
    """(share of the CPU seconds that is spent, batch) until they are spent."""
    read, began, step = dataset.loader(cohort, cfg.batch_size, cfg.seed, 0), time.process_time(), 0
    while (spent := (time.process_time() - began) / seconds) < 1:
        utils.seed_everything(cfg.seed, step)
        yield spent, dataset.augment(next(read), None, cfg.flip, cfg.shift)
        step += 1


def train_autoencoder(cfg, run, cohort, aae, disc, seconds):
    """The tutorial's first stage; returns its number of steps."""
    adversarial = peers.load_monai()[3].PatchAdversarialLoss(criterion='least_squares')
    opt, disc_opt = torch.optim.Adam(aae.parameters(), lr=1e-4), torch.optim.Adam(disc.parameters(), lr=5e-4)
    steps = 0
    for spent, batch in batches(cohort, cfg, seconds):
        image, late = batch['target'].to(run.device), spent > 0.1
        opt.zero_grad(set_to_none=True)
        with run.autocast():
            fake, mu, sigma = aae(image)
            score = disc(fake.contiguous())[-1] if late else None
        kl = 0.5 * (mu.float() ** 2 + sigma.float() ** 2 - torch.log(sigma.float() ** 2) - 1).flatten(1).sum(1).mean()
        loss = F.l1_loss(fake.float(), image) + 1e-6 * kl
        if late:
            loss = loss + 0.01 * adversarial(score.float(), target_is_real=True, for_discriminator=False)
        run.backward(loss)
        opt.step()
        if late:
            disc_opt.zero_grad(set_to_none=True)
            with run.autocast():
                scores = [disc(x.contiguous().detach())[-1].float() for x in (fake, image)]
            pair = zip(scores, (False, True), strict=True)
            run.backward(0.005 * sum(adversarial(s, target_is_real=real, for_discriminator=True) for s, real in pair))
            disc_opt.step()
        steps += 1
    return steps


def condition(source, latent):
    """The source averaged to the latent grid: (B, C, *S) -> (B, C, *s)."""
    pool = F.adaptive_avg_pool2d if source.ndim == 4 else F.adaptive_avg_pool3d
    return pool(source, latent)


def train_unet(cfg, run, cohort, aae, unet, seconds):
    """The tutorial's second stage; returns (its number of steps, the factor on the latents)."""
    _, schedulers, inferers, _ = peers.load_monai()
    inferer = inferers.DiffusionInferer(schedulers.DDPMScheduler(1000, **peers.BETAS))
    opt, steps, scale = torch.optim.Adam(unet.parameters(), lr=1e-4), 0, None
    for _, batch in batches(cohort, cfg, seconds):
        with torch.no_grad(), run.autocast():
            z = aae.encode_stage_2_inputs(batch['target'].to(run.device)).float()
        scale = scale or float(1 / z.std())
        z, cond = z * scale, condition(batch['source'].to(run.device), z.shape[2:])
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),), device=z.device)
        opt.zero_grad(set_to_none=True)
        with run.autocast():
            loss = F.mse_loss(inferer(z, unet, noise, t, condition=cond, mode='concat').float(), noise)
        run.backward(loss)
        opt.step()
        steps += 1
    return steps, scale


@torch.no_grad()
def predict(cfg, run, aae, unet, scale, subject):
    """50 DDIM steps from noise that all slices share -> (pred (N, K, *S), None), as translate.translate."""
    # Its default clips z_0 at +-1. Latents have a standard deviation of 1, and yet it is the better choice: measured
    # 18.1 and 14.0 dB with it, 9.4 and 9.1 dB with clip_sample=False (it multiplies an error in the first noise by 70).
    scheduler, found = peers.load_monai()[1].DDIMScheduler(1000, **peers.BETAS), []
    scheduler.set_timesteps(50)
    latent = [n // 4 for n in subject.source.shape[2:]]
    draw = starting_noise((cfg.seed, subject.id), (cfg.latent_channels, *latent), 0, run.device)
    noise = draw()
    for source in torch.from_numpy(subject.source).split(cfg.eval_batch):
        z, cond = noise.expand(len(source), -1, *latent), condition(source.to(run.device), latent)
        with run.autocast():
            for t in scheduler.timesteps:
                pred = unet(torch.cat([z, cond], 1), torch.full((len(z),), int(t), device=z.device))
                z = scheduler.step(pred.float(), int(t), z)[0]
            found.append(aae.decode_stage_2_outputs(z / scale).float().cpu())
    return torch.cat(found).numpy(), None


def main():
    extra = {'cpu_seconds': ('1200', 'CPU seconds of training, half for each stage'),
             'tutorial_widths': (False, "the tutorial's widths instead of the settings'"),
             'only_validation': (False, 'leave the test split alone'),
             'also': ('', 'further data folders, by commas, whose test split is translated: monai_<folder>.csv')}
    cfg = config.load(__doc__, extra=extra)
    peers.load_monai()
    cfg.context = 0
    for name, value in (TUTORIAL if cfg.tutorial_widths else {}).items():
        setattr(cfg, name, value)
    run, folder = utils.Run(cfg.device, cfg.precision), Path('result') / cfg.exp
    spec = dataset.Spec.from_settings(cfg, trim=False)
    lists = {split: dataset.read_split(cfg.data_info, split) for split in ('train', 'validation', 'test')}
    cohort = dataset.Cohort(spec, lists['train'])
    utils.seed_everything(cfg.seed, 'monai weights')
    aae, disc, unet = (run.place(net) for net in networks(cfg))
    each = float(cfg.cpu_seconds) / 2
    facts = dict(aae_steps=train_autoencoder(cfg, run, cohort, aae, disc, each))
    facts['unet_steps'], facts['scale'] = train_unet(cfg, run, cohort, aae.eval(), unet, each)
    unet.eval()
    folder.mkdir(parents=True, exist_ok=True)
    groups = {split: (spec, lists[split]) for split in ('validation', 'test')[:1 if cfg.only_validation else 2]}
    for root in filter(None, cfg.also.split(',')):
        groups[Path(root).name] = replace(spec, root=root), dataset.read_split(f'{root}/data_info', 'test')
    for split, (where, ids) in groups.items():
        rows, errors = evaluate(run, lambda subject: predict(cfg, run, aae, unet, facts['scale'], subject), where, ids,
                                quick=False, label=split)
        if errors:
            raise utils.RunError(errors[0])
        table = pd.DataFrame(rows)
        table.to_csv(folder / f'monai_{split}.csv', index=False, float_format='%.6g')
        means = table.drop(columns='ID').mean().to_dict()
        facts[split] = {k: v for k, v in means.items() if k.endswith('psnr') or k in ('lesion_mae', 'seconds')}
    utils.write_atomic(folder / 'monai.json', lambda f: json.dump(facts, f, indent=1), 'w')
    print(json.dumps(facts, indent=1))


if __name__ == '__main__':
    utils.cli(main)
