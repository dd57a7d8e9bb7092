"""
Stage 3: lesion-aware post-training. The U-Net (with the decoder and a detail branch, if asked) is fine-tuned through
the decoder:

    L = w_diffusion * L_diffusion + lambda_t * (w_image * E_mask + w_lesion * E_lesion [+ w_head * E_head])

E: error of D(z_0_hat), or of what the detail branch makes of it; E_head: cross entropy of its lesion head.

python post_train.py                                     settings in config.py, results in result/<exp>/
python post_train.py --exp control --init_from exp_1 --detail_branch False --w_image 0 --w_lesion 0    the control:
                                                         the latent network, trained on without pixel terms
torchrun --nproc_per_node=4 post_train.py                several GPUs; run again to resume, --restart begins anew

No lesion mask (amyloid: cortical composite) is needed to translate a new subject (infer.py --input); task, networks
and schedule come from the checkpoints.
"""

import copy
from dataclasses import replace

import numpy as np
import torch

import config
import dataset
import losses
import metrics
import optim
import utils
from infer import (
    Model,
    Sampling,
    check_sampling,
    check_task,
    checkpoint_path,
    differing,
    load_model,
    translate,
    validate,
)
from layers import recompute_blocks
from model import PixelUNet, count_parameters, fingerprint
from prior import classes_of
from stage import Stage, needs_lesion

TERMS = ['loss', 'diffusion', 'image', 'lesion', 'head', 'grad_norm']
FIXED = ('seed', 'batch_size', 'optimizer', 'post_lr', 'ema', 'flip', 'shift', 'source_noise', 'label_drop',
         'post_loss', 'lambda_t', 'w_diffusion', 'w_image', 'w_lesion', 'lesion_floor', 'post_last_step_share',
         'tune_decoder', 'detail_branch', 'detail_channels', 'detail_lr_scale', 'lesion_head', 'w_head', 'lesion_odds',
         'lesion_core', 'label_head', 'crop')


PLAIN = dict(sampler='one_step', samples=1, guidance=1.0, skip_latent=True)


def latent_adds(row, without, reads_label=False):
    """Whether validation figures are better than those without the latent path: 0.02 dB, or 0.5 % of lesion MAE.

    Two trainings of one recipe differ by ten times as much (docs/RESULTS.md). reads_label: it alone reads the label,
    which is unknown in validation, but may be given in inference.
    """
    return reads_label or row['psnr'] > without['psnr'] + 0.02 or without['lesion_mae'] > 1.005 * row['lesion_mae']


def lambda_of(t, timesteps, kind):
    """Weight of the pixel terms at time step t (B,): 1, or (T - t) / T as LAPT."""
    return torch.ones_like(t, dtype=torch.float32) if kind == 'constant' else (timesteps - t) / timesteps


def crop_odds(lesion, region, size):
    """The probability of each crop of `size` voxels, (x, y, z), by its start in steps of 4 voxels; lesion, region: 3D.

    A crop lies around a random voxel, one time in two of the lesion (where there is one), else of the region, moved
    inside the image where it would stick out.
    """
    counts = [(n - s) // 4 + 1 for n, s in zip(region.shape, size, strict=True)]
    odds = []
    for voxels in (torch.nonzero(x) for x in (lesion, region)):
        starts = [((v - s // 2 + 2) // 4).clamp(0, n - 1) for v, s, n in zip(voxels.T, size, counts, strict=True)]
        place = (starts[0] * counts[1] + starts[1]) * counts[2] + starts[2]
        odds.append(torch.bincount(place, minlength=counts[0] * counts[1] * counts[2]).double() / max(1, len(voxels)))
    return (sum(odds) / sum(odds).sum()).view(counts)


def inclusion(odds, size):
    """The probability that each block of 4 x 4 x 4 voxels lies in the crop, from crop_odds: (X/4, Y/4, Z/4)."""
    for axis, s in enumerate(size):
        held = torch.ones(1, 1, s // 4, dtype=odds.dtype, device=odds.device)  # a crop is s / 4 blocks long
        lines = odds.movedim(axis, -1)
        spread = torch.nn.functional.conv_transpose1d(lines.reshape(-1, 1, lines.shape[-1]), held)
        odds = spread.view(*lines.shape[:-1], -1).movedim(-1, axis)
    return odds


def draw_crops(lesion, region, size):
    """Per sample of lesion and region (B, 1, X, Y, Z), the start of a random crop, and weights (B, 1, *size).

    The weights, 1 / inclusion, make up for lesion voxels being in the crop more often than others: the error summed
    with them is on average, over the crops, that of the whole region, and so is its gradient, but for what a decoder
    sees at the crop's border and in its group norms. With crops of 96 in 160 x 192 x 160 voxels they are about 1 to 6.
    """
    size, starts, weights = [min(s, n) for s, n in zip(size, region.shape[2:], strict=True)], [], []
    for odds in (crop_odds(a[0], b[0], size) for a, b in zip(lesion, region, strict=True)):
        place = torch.multinomial(odds.flatten(), 1).item()
        starts.append([int(i) * 4 for i in np.unravel_index(place, odds.shape)])
        weights.append(1 / inclusion(odds, size).clamp(min=1e-12))
    weights = cut(torch.stack(weights)[:, None].float(), starts, size, factor=4)
    for axis in (2, 3, 4):
        weights = weights.repeat_interleave(4, dim=axis)
    return starts, weights


def cut(x, starts, size, factor=1):
    """Crops of (B, C, *S), one a sample; factor 4 cuts the same region out of a latent."""
    parts = []
    for image, start in zip(x, starts, strict=True):
        box = [slice(a // factor, (a + s) // factor) for a, s in zip(start, size, strict=True)]
        parts.append(image[(slice(None), *box)])
    return torch.stack(parts)


def main():
    cfg = config.load(__doc__, extra={'restart': (False, 'begin anew, keep the old run aside')})
    run = utils.Run(cfg.device, cfg.precision)
    train_ids, validation_ids = (dataset.read_split(cfg.data_info, split) for split in ('train', 'validation'))
    model = load_model(cfg, run, 'unet')
    check_task(cfg, model)
    spec = dataset.Spec.from_settings(cfg, **model.prep)
    check_sampling(cfg, model, spec)
    needs_lesion(spec, cfg.w_lesion, 'post-training with w_lesion above 0', '--w_lesion 0')
    needs_lesion(spec, cfg.lesion_head and cfg.detail_branch, 'a lesion head', '--lesion_head False')
    encoder_of, began_as = fingerprint(model.aae), fingerprint(model.unet)
    # LAPT's goal is the reconstruction of stage 1: that of the tuned decoder would follow its errors.
    before = copy.deepcopy(model.aae) if cfg.post_loss == 'lapt' else None
    lists = utils.seed_key(train_ids, validation_ids)
    stage = Stage(run, cfg, 'post', FIXED, lists=lists, unet=began_as)
    with stage.main_first():
        # The labels of other splits are never read.
        labels = dataset.read_labels(cfg.data_info, train_ids, spec.num_classes) if spec.num_classes else None
        cohort = dataset.Cohort(spec, train_ids, labels)

    # Whatever is trained here sits in one module list; the encoder and the latents' mean and std stay as they are.
    utils.seed_everything(cfg.seed, 'post weights')
    as_regression = cfg.detail_branch and make_detail_branch(cfg, run, model, spec, cohort)
    stage.builds_on(train_ids, validation_ids, model.trained_on)
    trained = torch.nn.ModuleDict({'unet': model.unet})
    if cfg.tune_decoder:
        trained['decoder'] = model.aae.decoder.requires_grad_(True)
    if cfg.detail_branch:
        trained['detail'] = model.detail
    model.unet.checkpointing = cfg.checkpointing
    for net in (model.unet.encode_source, model.aae.decoder, *([model.detail] if cfg.detail_branch else [])):
        recompute_blocks(net, cfg.checkpointing)
    run.same_start(trained)
    ema = utils.EMA(trained, cfg.ema)
    model.unet.train()
    scale = dict(detail=cfg.detail_lr_scale) if as_regression else {}
    opt = optim.make(cfg.optimizer, [(net, scale.get(name, 1)) for name, net in trained.items()], run.precision)
    parts = ', '.join(f'{name} ({count_parameters(net):,})' for name, net in trained.items())
    if not stage.resume(cfg.post_steps, TERMS, metrics.QUICK, len(cohort),
                        trained=trained, opt=opt, ema=ema, scaler=run.scaler):
        return
    stage.describe(f'training {parts}, {len(cohort)} samples')
    if cfg.detail_branch and stage.step == 0:
        stage.log(f"the detail branch starts {'as the regression U-Net' if as_regression else 'at zero'}")
    batches = dataset.loader(cohort, cfg.batch_size, cfg.seed, stage.first_batch, run.rank, run.world, cfg.workers,
                             cfg.shift, pin=run.device.type == 'cuda')
    current, how, diffusion = averaged(model, ema.net), Sampling.of(cfg, spec), model.diffusion

    def predict(subject):
        return translate(run, current, subject.stacked, subject.id, how.at(subject), mask=subject.mask)

    reads_label = bool(spec.num_classes) and model.prior is None

    def without_latent(subject):
        alone, plain = replace(current, latent_adds=False), Sampling(**vars(how) | PLAIN)
        return translate(run, alone, subject.stacked, subject.id, plain.at(subject), mask=subject.mask)

    for step in range(stage.step, cfg.post_steps + 1):
        last = step == cfg.post_steps

        # Best: the lowest lesion error among those at most 0.2 dB below row 0 (stage 2, or the regression).
        if stage.must_evaluate(step):
            same = step == 0 and as_regression  # with and without the latent path, whose weights are zero
            row = validate(run, without_latent if same else predict, spec, validation_ids)
            base = stage.base or row
            score = -row['lesion_mae'] if row['lesion_mae'] == row['lesion_mae'] else row['psnr']  # nan without lesions
            if stage.validated(step, row, score if row['psnr'] >= base['psnr'] - 0.2 else -float('inf')):
                without = None if same or not cfg.detail_branch else validate(run, without_latent, spec, validation_ids)
                adds = latent_adds(row, without, reads_label) if without else not same
                if not adds:
                    stage.log(f'step {step}: the latent path adds nothing to the images; infer.py leaves it out')
                extra = {name: ema.net[name].state_dict() if name in ema.net else None
                         for name in ('decoder', 'detail')}
                stage.save_best(net=ema.net['unet'].state_dict(), args=model.unet.args, diffusion=diffusion.args,
                                aae=encoder_of, unet=began_as, prep=spec.travel(), qc=model.qc, **extra,
                                latent_adds=adds, detail_args=model.detail.args if cfg.detail_branch else None)
        stage.save_if_due(step)
        if last:
            break

        # One optimisation step.
        utils.seed_everything(cfg.seed, run.rank, step)
        batch = dataset.augment(run.to_device(next(batches)), None, cfg.flip, 0 if spec.trim else cfg.shift,
                                cfg.source_noise)
        with torch.no_grad(), run.autocast():
            z_0 = model.aae.encode(batch['target']).float()
            goal = before.decode(z_0).float() if before else batch['target']
        t, eps, label = diffusion.draws(z_0, batch['label'], spec.num_classes, cfg.label_drop, cfg.post_last_step_share)
        lr = utils.lr_at(step, cfg.post_steps, cfg.post_lr, cfg.warmup)
        utils.set_lr(opt, lr)
        parts = []
        arrays = (z_0, t, eps, batch['source'], label, goal, batch['mask'], batch['lesion'])
        for chunk in zip(*[x.chunk(cfg.accumulate) for x in arrays], strict=True):
            parts.append(batch_terms(cfg, run, model, *chunk))
            run.backward(parts[-1][0].mean() / cfg.accumulate)
        norm = run.update(opt, cfg.grad_clip)
        run.scaler_step()
        ema.update(trained, step)
        stage.record(step, lr, lambda index=batch['index']: cohort.names(index),
                     **dict(zip(TERMS, torch.cat(parts, dim=1), strict=False)), grad_norm=norm)
    stage.close()


def make_detail_branch(cfg, run, model, spec, cohort):
    """Give the model its detail branch: as the regression U-Net, if one fits (then True), or at zero."""
    model.detail = run.place(PixelUNet(spec.spatial_dims, cohort.source_channels, cohort.target_channels, True,
                                       cfg.detail_channels, feature_channels=model.unet.feature_channels,
                                       lesion_head=cfg.lesion_head, classes=classes_of(cfg, spec)))
    regression = load_model(cfg, run, 'regression') if checkpoint_path(cfg, 'regression').exists() else None
    same = ('spatial_dims', 'source_channels', 'image_channels', 'widths', 'blocks', 'lesion_head', 'classes')
    if (regression and not differing(regression.prep, spec.travel())
            and all(regression.regression.args[name] == model.detail.args[name] for name in same)):
        model.detail.start_from(regression.regression)
        model.trained_on |= regression.trained_on
        return True
    some = run.to_device(cohort.some())
    model.detail.whiten.start_from(some['source'], some['mask'])
    if model.detail.prior is not None and run.main:
        model.detail.prior.fit(cohort)
    return False


def batch_terms(cfg, run, model, z_0, t, eps, source, label, target, mask, lesion):
    """The first five of TERMS of a batch, (5, B): L, L_diffusion, E_mask, E_lesion, the head's cross entropy."""
    crop = cfg.crop if source.ndim == 5 else None  # decode only a part: memory
    if crop:  # drawn before the U-Net is at work: it waits for a GPU
        starts, weight = draw_crops(lesion, mask >= 0 if cfg.post_loss == 'lapt' else mask, crop)
    with run.autocast():
        loss, z_0_hat, features = estimate(model, z_0, t, eps, source, label)
        part, shares = {}, model.shares(source, label)
        if crop:
            part = dict(weight=weight, voxels=(losses.count(mask), losses.count(lesion)))
            z_0_hat, features = (cut(x, starts, crop, factor=4) for x in (z_0_hat, features))
            source, target, mask, lesion = (cut(x, starts, crop) for x in (source, target, mask, lesion))
        pred, logit = model.decode(z_0_hat, source, features, shares, logit=True, odds=cfg.lesion_odds)
    errors = torch.stack([*losses.post_training_error(pred.float(), target, mask, lesion, cfg.post_loss,
                                                      cfg.lesion_floor, **part),
                          losses.lesion_cross_entropy(logit, mask, lesion, **part)])  # (3, B)
    errors = lambda_of(t, model.diffusion.timesteps, cfg.lambda_t) * errors
    total = cfg.w_diffusion * loss + cfg.w_image * errors[0] + cfg.w_lesion * errors[1] + cfg.w_head * errors[2]
    return torch.stack([total, loss, *errors])


def estimate(model, z_0, t, eps, source, label):
    """The diffusion loss (B,), the estimate z_0_hat it was made with, and the U-Net's features."""
    features = []

    def net(z_t, t):
        out, more = model.unet(z_t, t, source=source, label=label, features=True)
        features.append(more)
        return out

    return *model.diffusion.loss(net, z_0, t, eps), features[0]


def averaged(model, nets):
    """The model with the averaged weights in place of those in training; the encoder is shared."""
    aae = model.aae
    if 'decoder' in nets:
        aae = type(aae)(**aae.args).to(next(aae.parameters()).device).requires_grad_(False).eval()
        aae.load_state_dict(model.aae.state_dict())
        aae.decoder = nets['decoder']
    return Model(aae, nets['unet'], model.diffusion, nets['detail'] if 'detail' in nets else None)


if __name__ == '__main__':
    utils.cli(main)
