"""
Stage 1: train the adversarial autoencoder on the target images, then the latents' mean and std.

python train_aae.py                        settings in config.py, results in result/<exp>/
python train_aae.py --batch_size 16        the same with one setting changed
torchrun --nproc_per_node=4 train_aae.py   several GPUs; run any of these again to resume, --restart begins anew
"""

from dataclasses import replace

import pandas as pd
import torch

import config
import dataset
import grid
import losses
import metrics
import optim
import utils
from layers import recompute_blocks
from model import AAE, Discriminator, count_parameters
from stage import Stage

TERMS = ['loss', 'l1', 'adversarial', 'discriminator', 'grad_norm']
FIXED = ('task', 'targets', 'spatial_dims', 'spacing', 'image_size', 'scaling', 'unit_scale', 'latent_channels',
         'normalise_latents', 'aae_channels', 'aae_blocks', 'disc_channels', 'w_adversarial', 'flip', 'shift', 'trim',
         'pretrained', 'ema', 'seed', 'batch_size', 'optimizer', 'aae_lr')


def adversarial_weight(step, cfg):
    """Weight of the adversarial term: 0 until disc_start (the discriminator trains alone), then a ramp."""
    return cfg.w_adversarial * min(1, max(0, (step - cfg.disc_start + 1) / max(1, cfg.disc_ramp)))


@torch.no_grad()
def latent_statistics(run, aae, cohort, batch_size):
    """Mean and std of the latents per channel over the training set, written into the AAE's buffers."""
    aae.latent_mean.zero_()
    aae.latent_std.fill_(1)
    sums = torch.zeros(3, aae.args['latent_channels'], dtype=torch.float64)
    for some in cohort.in_order(batch_size)[run.rank::run.world]:
        image = cohort.__getitems__(some)['target'].to(run.device)
        with run.autocast():
            z = aae.encode(image).double().cpu().transpose(0, 1).flatten(1)  # (c, values)
        sums += torch.stack([z.sum(1), z.square().sum(1), torch.full((len(z),), z.shape[1], dtype=torch.float64)])
    total = run.mean(sums.to(run.device, torch.float64)).cpu()
    mean = total[0] / total[2]
    std = (total[1] / total[2] - mean ** 2).clamp(min=1e-12).sqrt()
    aae.latent_mean.copy_(mean.view_as(aae.latent_mean))
    aae.latent_std.copy_(std.view_as(aae.latent_std))


def validate(run, aae, spec, ids, batch_size):
    """Means of metrics.quick_row of the reconstructions over the validation subjects, on each subject's own grid."""
    rows, ranges = [], {name: dataset.scaling_range(spec, name) for name in spec.targets}
    for id in ids[run.rank::run.world]:
        subject = dataset.load_subject(spec, id)
        batches = grid.batches(subject.mask, batch_size, spec.trim)
        pred = subject.to_native(utils.in_batches(run, aae, batches, subject.target))
        rows.append(metrics.quick_row(pred, subject.truth(), subject.known_mask(), subject.native_lesion, ranges,
                                      spec.task, axis=subject.axial_axis))
    return pd.DataFrame(run.gather(rows)).mean().to_dict()


def main():
    cfg = config.load(__doc__, extra={'restart': (False, 'begin anew, keep the old run aside')})
    run = utils.Run(cfg.device, cfg.precision)
    spec = dataset.Spec.from_settings(cfg)
    train_ids, validation_ids = (dataset.read_split(cfg.data_info, split) for split in ('train', 'validation'))
    stage = Stage(run, cfg, 'aae', FIXED, lists=utils.seed_key(train_ids, validation_ids))
    stage.builds_on(train_ids, validation_ids)
    with stage.main_first():
        cohort = dataset.Cohort(replace(spec, context=0), train_ids)  # the source is not used

    utils.seed_everything(cfg.seed, 'aae weights')
    aae = run.place(AAE(cfg.spatial_dims, len(cfg.targets), cfg.latent_channels, cfg.aae_channels, cfg.aae_blocks))
    recompute_blocks(aae, cfg.checkpointing)
    disc = run.place(Discriminator(cfg.spatial_dims, len(cfg.targets), cfg.disc_channels))
    if stage.start_from_pretrained(aae, spec.travel()):
        aae.latent_mean.zero_()  # found anew
        aae.latent_std.fill_(1)
    else:
        aae.start_from_blocks(cohort.some()['target'].to(run.device))
    run.same_start(aae, disc)
    opt, ema = optim.make(cfg.optimizer, [(aae, 1)], run.precision), utils.EMA(aae, cfg.ema)
    disc_opt = optim.make('adam', [(disc, 1)])
    if not stage.resume(cfg.aae_steps, TERMS, metrics.QUICK, len(cohort),
                        aae=aae, disc=disc, opt=opt, disc_opt=disc_opt, ema=ema, scaler=run.scaler):
        return
    stage.describe(f'autoencoder {count_parameters(aae):,} parameters, discriminator {count_parameters(disc):,}, '
                   f'{len(train_ids)} training subjects, {len(cohort)} samples')
    mean_image = cohort.mean_image()
    batches = dataset.loader(cohort, cfg.batch_size, cfg.seed, stage.first_batch, run.rank, run.world, cfg.workers,
                             cfg.shift, pin=run.device.type == 'cuda')

    for step in range(stage.step, cfg.aae_steps + 1):
        # Evaluate the averaged weights; the row at step 0 is the untrained network.
        if stage.must_evaluate(step):
            row = validate(run, ema.net, spec, validation_ids, cfg.eval_batch)
            if stage.validated(step, row, score=row['psnr']):
                if cfg.normalise_latents:
                    latent_statistics(run, ema.net, cohort, cfg.eval_batch)
                stage.save_best(net=ema.net.state_dict(), args=aae.args, prep=spec.travel(), mean_image=mean_image)
        stage.save_if_due(step)
        if step == cfg.aae_steps:  # one extra round, so that the final weights are evaluated and saved
            break

        # One optimisation step of each network. Everything random is keyed by (seed, rank, step).
        utils.seed_everything(cfg.seed, run.rank, step)
        batch = dataset.augment(run.to_device(next(batches)), None, cfg.flip, 0 if spec.trim else cfg.shift)
        lr, weight = utils.lr_at(step, cfg.aae_steps, cfg.aae_lr, cfg.warmup), adversarial_weight(step, cfg)
        utils.set_lr(opt, lr)
        utils.set_lr(disc_opt, lr / 4)
        terms = dict(l1=[], adversarial=[], discriminator=[])
        for real, mask in zip(batch['target'].chunk(cfg.accumulate), batch['mask'].chunk(cfg.accumulate), strict=True):
            with run.autocast():
                fake = aae(real)
            l1 = losses.reconstruction_l1(fake.float(), real, mask)
            adversarial = discriminator = torch.zeros_like(l1)
            if cfg.w_adversarial > 0:
                # The generator's loss goes through the undetached fake and a frozen discriminator ...
                if weight > 0:
                    disc.requires_grad_(False)
                    with run.autocast():
                        score = disc(fake)
                    adversarial = losses.hinge_generator(score.float())
                    disc.requires_grad_(True)
                # ... the discriminator's through a detached one: neither touches the other's gradients.
                with run.autocast():
                    scores = disc(torch.cat([real, fake.detach().to(real.dtype)])).float()
                discriminator = losses.hinge_discriminator(*scores.chunk(2))
                run.backward(discriminator.mean() / cfg.accumulate)
            run.backward((100 * l1 + weight * adversarial).mean() / cfg.accumulate)
            for name, value in zip(terms, (l1, adversarial, discriminator), strict=True):
                terms[name].append(value.detach())
        norm = run.update(opt, 100 * cfg.grad_clip)  # the loss is 100 x L1
        if cfg.w_adversarial > 0:
            run.update(disc_opt, cfg.grad_clip)
        run.scaler_step()
        ema.update(aae, step)
        terms = {name: torch.cat(values).float() for name, values in terms.items()}
        total = 100 * terms['l1'] + weight * terms['adversarial']
        stage.record(step, lr, lambda index=batch['index']: cohort.names(index), loss=total, **terms, grad_norm=norm)
    stage.close()


if __name__ == '__main__':
    utils.cli(main)
