"""
Stage 2: train the conditional U-Net on the autoencoder's latents.

python train_unet.py                       settings in config.py, results in result/<exp>/
python train_unet.py --batch_size 16       the same with one setting changed
python train_unet.py --regression True     instead a U-Net from source to target, no diffusion: stage 3 starts from it,
                                           and it is a model of its own
torchrun --nproc_per_node=4 train_unet.py  several GPUs; run any of these again to resume, --restart begins anew
"""

from dataclasses import replace

import torch

import config
import dataset
import losses
import metrics
import optim
import utils
from diffusion import Diffusion
from infer import Model, Sampling, differing, fit_quality, load_aae, translate, validate
from layers import recompute_blocks
from model import PixelUNet, UNet, count_parameters, fingerprint, latent_grid
from prior import classes_of
from stage import Stage, needs_lesion

DATA = ('task', 'targets', 'spatial_dims', 'spacing', 'image_size', 'context', 'frames', 'frame_spacing',
        'frame_interval', 'scaling', 'unit_scale', 'num_classes', 'flip', 'shift', 'source_noise', 'trim',
        'pretrained', 'ema', 'seed', 'batch_size', 'optimizer')
FIXED = DATA + ('lr', 'unet_channels', 'unet_blocks', 'unet_attention', 'cond_channels', 'cond_width', 'dropout',
                'predict', 'schedule', 'timesteps', 'loss_weight', 'last_step_share', 'label_drop')
FIXED_REGRESSION = DATA + ('regression_lr', 'regression_channels', 'w_image', 'regression_w_lesion', 'lesion_floor',
                           'lesion_head', 'w_head', 'label_head')


def train_diffusion(cfg, run, spec, train_ids, validation_ids):
    """The conditional U-Net: denoise normalised latents, given the source and (sometimes) the label."""
    model, aae = load_aae(cfg, run)
    other = differing(model.prep, spec.travel(), source=False)
    if other:
        raise utils.RunError(f'the autoencoder was trained with another {", ".join(other)} than the settings have; set '
                             'it back, or train one of its own with train_aae.py (another --exp, or --restart)')
    stage = Stage(run, cfg, 'unet', FIXED, lists=utils.seed_key(train_ids, validation_ids), aae=fingerprint(model.aae))
    stage.builds_on(train_ids, validation_ids, aae.get('trained_on', ()))
    with stage.main_first():
        # The labels of other splits are never read.
        labels = dataset.read_labels(cfg.data_info, train_ids, spec.num_classes) if spec.num_classes else None
        cohort = dataset.Cohort(spec, train_ids, labels)
    utils.seed_everything(cfg.seed, 'unet weights')
    unet = run.place(UNet(cfg.spatial_dims, aae['args']['latent_channels'], cohort.source_channels, cfg.unet_channels,
                          cfg.unet_blocks, cfg.unet_attention, cfg.cond_channels, cfg.cond_width, cfg.num_classes,
                          cfg.dropout, cfg.checkpointing), latent_grid(cfg.image_size))
    recompute_blocks(unet.encode_source, cfg.checkpointing)
    diffusion = Diffusion(cfg.predict, cfg.schedule, cfg.timesteps, cfg.loss_weight, cfg.last_step_share).to(run.device)
    if not stage.start_from_pretrained(unet, spec.travel()):
        some = run.to_device(cohort.some())
        unet.encode_source.whiten.start_from(some['source'], some['mask'])
        del some
    run.same_start(unet)
    opt, ema = optim.make(cfg.optimizer, [(unet, 1)], run.precision), utils.EMA(unet, cfg.ema)
    if not stage.resume(cfg.unet_steps, ['loss', 'grad_norm'], metrics.QUICK, len(cohort),
                        unet=unet, opt=opt, ema=ema, scaler=run.scaler):
        return
    stage.describe(f'U-Net {count_parameters(unet):,} parameters, {len(train_ids)} training subjects, '
                   f'{len(cohort)} samples')
    qc = fit_quality(spec, cohort, validation_ids) if run.main else None
    batches = dataset.loader(cohort, cfg.batch_size, cfg.seed, stage.first_batch, run.rank, run.world, cfg.workers,
                             cfg.shift, pin=run.device.type == 'cuda')
    current, how = Model(model.aae, ema.net, diffusion), Sampling.of(cfg, spec)

    def predict(subject):
        return translate(run, current, subject.stacked, subject.id, how.at(subject), mask=subject.mask)

    for step in range(stage.step, cfg.unet_steps + 1):
        last = step == cfg.unet_steps  # one extra round, so that the final weights are evaluated and saved

        # Evaluate the averaged weights by the very code that inference runs; row 0 is the untrained network.
        if stage.must_evaluate(step):
            row = validate(run, predict, spec, validation_ids)
            if stage.validated(step, row, score=row['psnr']):
                stage.save_best(net=ema.net.state_dict(), args=unet.args, diffusion=diffusion.args,
                                aae=fingerprint(model.aae), prep=spec.travel(), qc=qc)
        stage.save_if_due(step)
        if last:
            break

        # One optimisation step. Everything random is keyed by (seed, rank, step): a resumed run draws the same noise.
        utils.seed_everything(cfg.seed, run.rank, step)
        batch = dataset.augment(run.to_device(next(batches)), None, cfg.flip, 0 if spec.trim else cfg.shift,
                                cfg.source_noise)
        with torch.no_grad(), run.autocast():
            z_0 = model.aae.encode(batch['target']).float()
        t, eps, label = diffusion.draws(z_0, batch['label'], cfg.num_classes, cfg.label_drop)
        lr = utils.lr_at(step, cfg.unet_steps, cfg.lr, cfg.warmup)
        utils.set_lr(opt, lr)
        parts = []
        chunks = [x.chunk(cfg.accumulate) for x in (z_0, t, eps, batch['source'], label)]
        for z, tt, e, source, y in zip(*chunks, strict=True):
            with run.autocast():
                parts.append(diffusion.loss(unet, z, tt, e, source=source, label=y)[0])
            run.backward(parts[-1].mean() / cfg.accumulate)
        norm = run.update(opt, cfg.grad_clip)
        run.scaler_step()
        ema.update(unet, step)
        stage.record(step, lr, lambda index=batch['index']: cohort.names(index), loss=torch.cat(parts), grad_norm=norm)
    stage.close()


def train_regression(cfg, run, spec, train_ids, validation_ids):
    """PixelUNet(source) -> target under the pixel losses of stage 3: its start, a model of its own, or a baseline.

    --regression_w_lesion 0.3: with a lesion weight; --lesion_head False --label_head False: a plain one, without heads.
    """
    needs_lesion(spec, cfg.lesion_head, 'a lesion head', '--lesion_head False')
    needs_lesion(spec, cfg.regression_w_lesion, 'a regression_w_lesion above 0', '--regression_w_lesion 0')
    stage = Stage(run, cfg, 'regression', FIXED_REGRESSION, lists=utils.seed_key(train_ids, validation_ids))
    stage.builds_on(train_ids, validation_ids)
    with stage.main_first():
        # The labels of other splits are never read.
        labels = dataset.read_labels(cfg.data_info, train_ids, spec.num_classes) if spec.num_classes else None
        cohort = dataset.Cohort(spec, train_ids, labels)
    utils.seed_everything(cfg.seed, 'regression weights')
    channels = cohort.source_channels, cohort.target_channels
    net = run.place(PixelUNet(cfg.spatial_dims, *channels, False, cfg.regression_channels,
                              lesion_head=cfg.lesion_head, classes=classes_of(cfg, spec)))
    recompute_blocks(net, cfg.checkpointing)
    if not stage.start_from_pretrained(net, spec.travel()):
        some = run.to_device(cohort.some())
        net.whiten.start_from(some['source'], some['mask'])
        del some
    if net.prior is not None and run.main:
        net.prior.fit(cohort)
    run.same_start(net)
    opt, ema = optim.make(cfg.optimizer, [(net, 1)], run.precision), utils.EMA(net, cfg.ema)
    terms = ['loss', 'image', 'lesion', 'head', 'grad_norm']
    if not stage.resume(cfg.regression_steps, terms, metrics.QUICK, len(cohort),
                        net=net, opt=opt, ema=ema, scaler=run.scaler):
        return
    stage.describe(f'regression U-Net {count_parameters(net):,} parameters, {len(cohort)} samples')
    # With these its checkpoint is complete: infer.py --stage regression needs no other.
    more = dict(qc=fit_quality(spec, cohort, validation_ids),
                mean_image=dataset.Cohort(replace(spec, context=0), train_ids).mean_image()) if run.main else {}
    batches = dataset.loader(cohort, cfg.batch_size, cfg.seed, stage.first_batch, run.rank, run.world, cfg.workers,
                             cfg.shift, pin=run.device.type == 'cuda')
    trained, current = Model(None, regression=net), Model(None, regression=ema.net)
    how = Sampling.of(cfg, spec)

    def predict(subject):
        return translate(run, current, subject.stacked, subject.id, how.at(subject), mask=subject.mask)

    for step in range(stage.step, cfg.regression_steps + 1):
        if stage.must_evaluate(step):
            row = validate(run, predict, spec, validation_ids)
            if stage.validated(step, row, score=row['psnr']):
                stage.save_best(net=ema.net.state_dict(), args=net.args, prep=spec.travel(), **more)
        stage.save_if_due(step)
        if step == cfg.regression_steps:
            break

        utils.seed_everything(cfg.seed, run.rank, step)
        batch = dataset.augment(run.to_device(next(batches)), None, cfg.flip, 0 if spec.trim else cfg.shift,
                                cfg.source_noise)
        lr = utils.lr_at(step, cfg.regression_steps, cfg.regression_lr, cfg.warmup)
        utils.set_lr(opt, lr)
        parts = []
        chunks = [batch[name].chunk(cfg.accumulate) for name in ('source', 'target', 'mask', 'lesion', 'label')]
        for source, target, mask, lesion, label in zip(*chunks, strict=True):
            with run.autocast():
                pred, logit = net(source, logit=True, shares=trained.shares(source, label))
            e_mask, e_lesion = losses.post_training_error(pred.float(), target, mask, lesion, 'l1', cfg.lesion_floor)
            e_head = losses.lesion_cross_entropy(logit, mask, lesion)
            total = cfg.w_image * e_mask + cfg.regression_w_lesion * e_lesion + cfg.w_head * e_head
            parts.append(torch.stack([total, e_mask, e_lesion, e_head]))
            run.backward(total.mean() / cfg.accumulate)
        norm = run.update(opt, cfg.grad_clip)
        run.scaler_step()
        ema.update(net, step)
        stage.record(step, lr, lambda index=batch['index']: cohort.names(index),
                     **dict(zip(terms, torch.cat(parts, dim=1), strict=False)), grad_norm=norm)
    stage.close()


def main():
    cfg = config.load(__doc__, extra={'restart': (False, 'begin anew, keep the old run aside')})
    run = utils.Run(cfg.device, cfg.precision)
    if run.main and cfg.regression and cfg.origin['w_lesion'] != 'config.py' and cfg.w_lesion:
        print(f'w_lesion = {cfg.w_lesion:g} is for stage 3; the regression has regression_w_lesion = '
              f'{cfg.regression_w_lesion:g}')
    lists = [dataset.read_split(cfg.data_info, split) for split in ('train', 'validation')]
    (train_regression if cfg.regression else train_diffusion)(cfg, run, dataset.Spec.from_settings(cfg), *lists)


if __name__ == '__main__':
    utils.cli(main)
