"""
Stage 3: lesion-aware post-training. The U-Net (with the decoder and a detail branch, if asked) is fine-tuned through
the decoder:

    L = w_diffusion * L_diffusion + lambda_t * (w_image * E_mask + w_lesion * E_lesion),  E: error of D(z_0_hat)

python post_train.py                                     settings in config.py, results in result/<exp>/
python post_train.py --exp control --init_from exp_1 --w_image 0 --w_lesion 0      a control without pixel terms
torchrun --nproc_per_node=4 post_train.py                several GPUs; run again to resume, --restart begins anew

The lesion mask (amyloid: the cortical composite) is needed in training only; task, networks and schedule come from the
checkpoints.
"""

import torch

import config
import dataset
import losses
import metrics
import utils
from infer import Model, Sampling, load_model, translate, validate
from model import PixelUNet, count_parameters, fingerprint
from stage import Stage

TERMS = ['loss', 'diffusion', 'image', 'lesion', 'grad_norm']
FIXED = ('seed', 'batch_size', 'post_lr', 'ema', 'flip', 'shift', 'label_drop', 'post_loss', 'lambda_t', 'w_diffusion',
         'w_image', 'w_lesion', 'lesion_floor', 'post_last_step_share', 'tune_decoder', 'detail_branch',
         'detail_channels', 'crop')


def lambda_of(t, timesteps, kind):
    """Weight of the pixel terms at time step t (B,): 1, or (T - t) / T as LAPT."""
    return torch.ones_like(t, dtype=torch.float32) if kind == 'constant' else (timesteps - t) / timesteps


def lesion_crops(lesion, mask, size):
    """Per sample, the start of a crop of `size` voxels around a random voxel of the lesion (else of the mask)."""
    starts = []
    for one, brain in zip(lesion, mask, strict=True):
        voxels = torch.nonzero(one[0] if bool(one.any()) else brain[0])
        middle = [n // 2 for n in one.shape[1:]]
        centre = voxels[torch.randint(len(voxels), (1,)).item()].tolist() if len(voxels) else middle
        sizes = zip(centre, size, one.shape[1:], strict=True)
        starts.append([max(0, min(c - s // 2, n - s)) // 4 * 4 for c, s, n in sizes])
    return starts


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
    spec = dataset.Spec.from_settings(cfg, **model.prep)
    if spec.lesion is None and cfg.w_lesion:
        raise config.SettingError('post-training with w_lesion above 0 needs the lesion template; '
                                  'set lesion, or --w_lesion 0')
    encoder_of = fingerprint(model.aae)
    lists = utils.seed_key(train_ids, validation_ids)
    stage = Stage(run, cfg, 'post', FIXED, lists=lists, unet=fingerprint(model.unet))
    with stage.main_first():
        # The labels of other splits are never read.
        labels = dataset.read_labels(cfg.data_info, train_ids, spec.num_classes) if spec.num_classes else None
        cohort = dataset.Cohort(spec, train_ids, labels)

    # Whatever is trained here sits in one module list; the encoder and the latents' mean and std stay as they are.
    utils.seed_everything(cfg.seed, 'post weights')
    if cfg.detail_branch:
        model.detail = run.place(PixelUNet(spec.spatial_dims, cohort.source_channels, cohort.target_channels, True,
                                           cfg.detail_channels))
        some = run.to_device(cohort.some())
        model.detail.whiten.start_from(some['source'], some['mask'])
    trained = torch.nn.ModuleDict({'unet': model.unet})
    if cfg.tune_decoder:
        trained['decoder'] = model.aae.decoder.requires_grad_(True)
    if cfg.detail_branch:
        trained['detail'] = model.detail
    ema = utils.EMA(trained, cfg.ema)
    model.unet.train()
    # The new branch starts from nothing and learns faster than what is already trained.
    opt = utils.adam([dict(params=net.parameters(), lr_scale=cfg.detail_lr_scale if name == 'detail' else 1.0)
                      for name, net in trained.items()])
    parts = ', '.join(f'{name} ({count_parameters(net):,})' for name, net in trained.items())
    stage.describe(f'training {parts}, {len(cohort)} samples, effective batch {cfg.batch_size * run.world}')
    if not stage.resume(cfg.post_steps, TERMS, metrics.QUICK, len(cohort) / cfg.batch_size / run.world,
                        trained=trained, opt=opt, ema=ema, scaler=run.scaler):
        return
    batches = dataset.loader(cohort, cfg.batch_size, cfg.seed, stage.step, run.rank, run.world, cfg.workers)
    current, how, diffusion = averaged(model, ema.net), Sampling.of(cfg), model.diffusion

    def predict(subject):
        return translate(run, current, subject.source, subject.id, how)

    if diffusion.predict == 'eps' and how.sampler == 'one_step':
        raise config.SettingError("sampler 'one_step' is refused: this network predicts eps; use --sampler ddim")

    for step in range(stage.step, cfg.post_steps + 1):
        last = step == cfg.post_steps

        # Best: the lowest lesion error among those at most 0.2 dB below row 0, the network this stage started from.
        if stage.must_evaluate(step):
            row = validate(run, predict, spec, validation_ids)
            base = stage.base or row
            score = -row['lesion_mae'] if row['lesion_mae'] == row['lesion_mae'] else row['psnr']  # nan without lesions
            if stage.validated(step, row, score if row['psnr'] >= base['psnr'] - 0.2 else -float('inf')):
                extra = {name: ema.net[name].state_dict() if name in ema.net else None
                         for name in ('decoder', 'detail')}
                stage.save_best(net=ema.net['unet'].state_dict(), args=model.unet.args, diffusion=diffusion.args,
                                aae=encoder_of, prep=spec.travel(), qc=model.qc, **extra,
                                detail_args=model.detail.args if cfg.detail_branch else None)
        stage.save_if_due(step)
        if last:
            break

        # One optimisation step.
        utils.seed_everything(cfg.seed, run.rank, step)
        batch = dataset.augment(run.to_device(next(batches)), None, cfg.flip, cfg.shift)
        with torch.no_grad(), run.autocast():
            z_0 = model.aae.encode(batch['target']).float()
            # LAPT compares with the reconstruction.
            goal = batch['target'] if cfg.post_loss == 'l1' else current.aae.decode(z_0).float()
        t, eps = diffusion.draw(len(z_0), z_0.device, cfg.post_last_step_share), torch.randn_like(z_0)
        label = diffusion.drop_labels(batch['label'], spec.num_classes, cfg.label_drop)
        lr = utils.lr_at(step, cfg.post_steps, cfg.post_lr, cfg.warmup)
        utils.set_lr(opt, lr)
        terms = {name: [] for name in ('diffusion', 'image', 'lesion')}
        arrays = (z_0, t, eps, batch['source'], label, goal, batch['mask'], batch['lesion'])
        for z, tt, e, source, y, target, mask, lesion in zip(*[x.chunk(cfg.accumulate) for x in arrays], strict=True):
            with run.autocast():
                loss, z_0_hat = diffusion.loss(model.unet, z, tt, e, source=source, label=y)
                if cfg.crop and spec.spatial_dims == 3:  # decode only a part: memory
                    starts = lesion_crops(lesion, mask, cfg.crop)
                    z_0_hat = cut(z_0_hat, starts, cfg.crop, factor=4)
                    source, target, mask, lesion = (cut(x, starts, cfg.crop) for x in (source, target, mask, lesion))
                pred = model.decode(z_0_hat, source).float()
            e_mask, e_lesion = losses.post_training_error(pred, target, mask, lesion, cfg.post_loss, cfg.lesion_floor)
            lam = lambda_of(tt, diffusion.timesteps, cfg.lambda_t)
            for name, value in zip(terms, (loss, lam * e_mask, lam * e_lesion), strict=True):
                terms[name].append(value)
            total = cfg.w_diffusion * loss + lam * (cfg.w_image * e_mask + cfg.w_lesion * e_lesion)
            run.backward(total.mean() / cfg.accumulate)
        norm = run.update(opt, cfg.grad_clip)
        run.scaler_step()
        ema.update(trained, step)
        terms = {name: torch.cat(values).detach() for name, values in terms.items()}
        total = cfg.w_diffusion * terms['diffusion'] + cfg.w_image * terms['image'] + cfg.w_lesion * terms['lesion']
        stage.record(step, lr, lambda batch=batch: cohort.names(batch), loss=total, **terms, grad_norm=norm)
    stage.close()


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
