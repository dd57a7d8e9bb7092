"""
Batch inference: translate a split (or one new file) to NIfTI on each subject's own grid, in physical units, with metrics.

python infer.py                              the test split of the experiment in config.py
python infer.py --sampler ddim --num_steps 50 --samples 4
python infer.py --input FILE --out DIR       one new subject, without truth (--input_mask FILE for its brain mask)
torchrun --nproc_per_node=4 infer.py         subjects divided among processes

Networks, task, schedule and scaling come from the checkpoints in result/<exp>, paths and sampler from the settings.
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import amyloid
import config
import dataset
import metrics
import utils
from diffusion import Diffusion, sample
from model import AAE, PixelUNet, UNet, fingerprint

@dataclass
class Model:
    """The networks of one experiment and what is needed to apply them. `detail` is None before stage 3 or without detail branch."""
    aae: AAE
    unet: UNet = None
    diffusion: Diffusion = None
    detail: PixelUNet = None
    regression: PixelUNet = None
    prep: dict = None        # dataset.Spec.travel(): task, geometry, scaling
    mean_image: dict = None  # the training set's mean target
    origin: str = ''         # which checkpoint, for people

    def decode(self, z_0, source):
        """Latents (B, c, *s) and source (B, C, *S) -> images (B, K, *S): D(z_0), plus R(source, D(z_0)) with a detail branch."""
        pred = self.aae.decode(z_0)
        return pred if self.detail is None else pred + self.detail(torch.cat([source, pred.to(source.dtype)], dim=1))

    def eval(self):
        for net in (self.aae, self.unet, self.detail, self.regression):
            if net is not None:
                net.eval()
        return self


@dataclass
class Sampling:
    """How to sample: the settings of infer.py of the same names."""
    sampler: str = 'one_step'
    num_steps: int = 50
    samples: int = 1
    guidance: float = 1.0
    seed: int = 0
    eval_batch: int = 32

    @classmethod
    def of(cls, cfg):
        return cls(cfg.sampler, cfg.num_steps, cfg.samples, cfg.guidance, cfg.seed, cfg.eval_batch)


# ------------------------------------------------------------------------------------------------------------------
# Checkpoint -> model

def checkpoint_path(cfg, stage):
    """The checkpoint of an earlier stage: in result/<exp>, or in result/<init_from> where this experiment has none."""
    own = Path('result') / cfg.exp / f'{utils.BEST[stage]}.pth.tar'
    return Path('result') / cfg.init_from / own.name if cfg.init_from and not own.exists() else own


def load_aae(cfg, run):
    """The autoencoder of stage 1 -> (Model with only the aae, its checkpoint)."""
    data = utils.load_checkpoint(checkpoint_path(cfg, 'aae'), 'aae')
    aae = AAE(**data['args'])
    utils.load_weights(aae, data['net'], checkpoint_path(cfg, 'aae'))
    model = Model(run.place(aae).eval().requires_grad_(False), prep=data['prep'], mean_image=data['mean_image'])
    model.origin = f"{utils.BEST['aae']} at step {data['step']}"
    return model, data


def load_model(cfg, run, stage='auto'):
    """The model of a stage: 'post', 'unet', 'regression', 'aae', or 'auto' (post if there, else unet). EMA weights.

    RunError if a checkpoint is missing or belongs to another autoencoder.
    """
    if stage == 'auto':
        stage = 'post' if checkpoint_path(cfg, 'post').exists() else 'unet'
    model, aae = load_aae(cfg, run)
    if stage == 'aae':
        return model
    path = checkpoint_path(cfg, stage)
    data = utils.load_checkpoint(path, stage)
    if data.get('aae') not in (None, fingerprint(model.aae)):
        raise utils.RunError(f"{path} was trained on another autoencoder (fingerprint {data['aae']}) than {checkpoint_path(cfg, 'aae')} holds "
                             f'({fingerprint(model.aae)}); run train_unet.py --restart, then post_train.py --restart')
    model.origin, model.prep = f"{utils.BEST[stage]} (EMA weights) at step {data['step']}", data['prep']
    if stage == 'regression':
        model.regression = run.place(PixelUNet(**data['args']))
        utils.load_weights(model.regression, data['net'], path)
        return model.eval()
    model.unet, model.diffusion = run.place(UNet(**data['args'])), Diffusion(**data['diffusion']).to(run.device)
    utils.load_weights(model.unet, data['net'], path)
    if data.get('decoder'):
        utils.load_weights(model.aae.decoder, data['decoder'], path)
    if data.get('detail'):
        model.detail = run.place(PixelUNet(**data['detail_args']))
        utils.load_weights(model.detail, data['detail'], path)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------
# Source -> prediction

def starting_noise(key, shape, k, device):
    """A function drawing noise (1, c, *s) for the k-th sample of a subject, keyed by seed and subject, not by batch or process."""
    generator = torch.Generator().manual_seed(utils.seed_key('noise', *key, k))
    return lambda: torch.randn((1, *shape), generator=generator).to(device)


@torch.no_grad()
def translate(run, model, source, key, how, label=None):
    """Translate the items of one subject: source (N, C, *S) -> pred (N, K, *S), std (N, K, *S) or None, float32 arrays in [-1, 1] scaling.

    All slices start from the same noise, keyed by `key` = subject ID. how.samples latents are averaged before decoding; std is over the
    decoded samples. label: class number, or None for unknown. ValueError if one_step is asked of an eps network.
    """
    preds, stds = [], []
    for chunk in torch.from_numpy(np.ascontiguousarray(source)).split(how.eval_batch):
        chunk = chunk.to(run.device)
        with run.autocast():
            if model.regression is not None:
                preds.append(model.regression(chunk).float().cpu())
                continue
            latents = [_sample_latents(model, chunk, key, k, how, label) for k in range(how.samples)]
            preds.append(model.decode(torch.stack(latents).mean(0), chunk).float().cpu())
            if how.samples > 1:
                stds.append(torch.stack([model.decode(z, chunk).float() for z in latents]).std(0).cpu())
    return torch.cat(preds).numpy(), torch.cat(stds).numpy() if stds else None


def _sample_latents(model, source, key, k, how, label):
    """One latent for each item of a batch of slices (or volumes) of the same subject."""
    n, unet = len(source), model.unet
    shape = (model.aae.args['latent_channels'], *[s // model.aae.factor for s in source.shape[2:]])
    draw = starting_noise((how.seed, key), shape, k, source.device)
    cond = unet.encode_source(source)
    labels = None if label is None else torch.full((n,), label, device=source.device)

    def net(z_t, t):
        out = unet(z_t, t, cond=cond, label=labels).float()
        if how.guidance != 1 and labels is not None:
            unknown = unet(z_t, t, cond=cond).float()
            out = unknown + how.guidance * (out - unknown)
        return out

    def noise(z):
        return draw().expand_as(z)

    z_T = draw().expand(n, *shape)
    return sample(model.diffusion, net, z_T, how.sampler, how.num_steps, noise)


def mean_prediction(mean_image, subject):
    """The training set's mean image laid onto a subject, slices matched by their distance from the brain's middle one."""
    rows = np.flatnonzero(subject.mask.reshape(len(subject.mask), -1).any(1))
    image, offset = mean_image['image'].numpy(), mean_image['centre'] - int(rows[0] + rows[-1]) // 2
    return image[np.clip(np.arange(len(subject.mask)) + offset, 0, len(image) - 1)]


# ------------------------------------------------------------------------------------------------------------------
# Evaluation

def evaluate(run, predict, spec, ids, on_subject=None, quick=True, label=''):
    """Rows of metrics, one a subject in the order of ids, computed on the subject's own grid; the subjects are shared by the processes.

    predict(subject) -> (pred, std) in network scaling. quick: the few figures of a validation curve; else all of section "metrics".
    on_subject(subject, pred, std): called for each, e.g. to write files. Errors of one subject are collected, not raised:
    returns (rows, errors).
    """
    rows, errors = [], []
    ranges = {name: dataset.scaling_range(spec, name) for name in spec.targets}
    mine = list(enumerate(ids))[run.rank::run.world]
    for i, id in tqdm(mine, desc=label or 'evaluate', leave=False, disable=not run.main, mininterval=0.5):
        try:
            subject = dataset.load_subject(spec, id, with_truth=spec.has_truth(id))
            start = time.perf_counter()
            pred, std = predict(subject)
            seconds = time.perf_counter() - start
            row = dict(ID=id)
            if subject.target is not None:
                pred_native, truth = subject.to_native(pred), subject.truth()
                lesion = subject.native_lesion
                if quick:
                    row |= metrics.quick_row(pred_native, truth, subject.native_mask, lesion, ranges, spec.task, axis=subject.axial_axis)
                else:
                    row |= metrics.subject_row(pred_native, truth, subject.native_mask, lesion, subject.spacing, ranges, spec.task, axis=subject.axial_axis)
            if on_subject:
                on_subject(subject, pred, std)
            rows.append((i, row | dict(seconds=seconds)))
        except Exception as err:
            if not getattr(err, 'one_sentence', False):
                raise
            errors.append(f'{id}: {str(err).removeprefix(f"{id}: ")}')
    rows = [row for _, row in sorted(run.gather(rows), key=lambda pair: pair[0])]
    return rows, run.gather(errors)


def validate(run, predict, spec, ids):
    """Means of the quick figures over the validation subjects, for a training stage; an unreadable subject is an error."""
    rows, errors = evaluate(run, predict, spec, ids, label='validate')
    if errors:
        raise utils.RunError(errors[0])
    table = pd.DataFrame(rows).drop(columns=['ID', 'seconds'])
    return {name: float(table[name].mean()) for name in table}  # undefined values (no lesion) are left out of the mean


# ------------------------------------------------------------------------------------------------------------------
# Writing

def write_prediction(folder, subject, pred, std, spec, record):
    """<target>.nii.gz, <target>_std.nii.gz and prediction.json of one subject."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in subject.to_native(pred).items():
        dataset.write_volume(folder / f'{name}.nii.gz', image, subject)
    if std is not None:
        for k, name in enumerate(spec.targets):
            lo, hi = dataset.scaling_range(spec, name)
            image = subject.to_native_raw(std[:, k:k + 1]) * (hi - lo) / 2 * subject.native_mask
            dataset.write_volume(folder / f'{name}_std.nii.gz', image, subject)
    utils.write_atomic(folder / 'prediction.json', lambda f: json.dump(record | dict(id=subject.id), f, indent=1), 'w')


def prediction_record(cfg, model, spec):
    """What a prediction.json says: checkpoint, sampler, seed, label mode, units."""
    units = {name: {'dwi': 'multiples of the in-mask median', 'adc': '1e-6 mm^2/s', 'suvr': 'SUVR'}.get(name, 'as scaled') for name in spec.targets}
    units |= {name: 'in-mask quantile range, 0..1' for name in spec.targets if spec.scaling[name][0] == 'quantile'}
    return dict(checkpoint=model.origin, aae=fingerprint(model.aae), exp=cfg.exp, sampler=cfg.sampler, num_steps=1 if cfg.sampler == 'one_step' else cfg.num_steps,
                samples=cfg.samples, guidance=cfg.guidance, label=cfg.label, seed=cfg.seed, units=units)


def keep_aside(folder, record):
    """Nothing is overwritten silently: results of other settings are moved to old_<n>, those of the same settings replaced, and said."""
    old = folder / 'inference.json'
    if not (folder / 'pred').exists():
        return None
    same = old.exists() and json.loads(old.read_text()) == json.loads(json.dumps(record))
    when = datetime.fromtimestamp((folder / 'pred').stat().st_mtime).strftime('%Y-%m-%d %H:%M')
    if same:
        return f'replacing the predictions of {when}, made with the same checkpoint and settings'
    aside = utils.old_folder(folder)
    for path in [folder / 'pred', old, *folder.glob('test*.csv')]:
        if path.exists():
            shutil.move(path, aside / path.name)
    return f"predictions of {when}, made with other settings, are kept in {aside}"


def infer_split(cfg, run, model, spec, folder):
    """Translate a split, write images and tables. Returns the collected errors."""
    ids = dataset.read_split(cfg.data_info, cfg.split)
    labels = dataset.read_labels(cfg.data_info, ids, cfg.num_classes) if cfg.label == 'true' else {}
    how, record = Sampling.of(cfg), prediction_record(cfg, model, spec) | dict(split=cfg.split)

    def predict(subject, model=model):
        label = None if cfg.label == 'unknown' else labels[subject.id] if cfg.label == 'true' else int(cfg.label)
        return translate(run, model, subject.source, subject.id, how, label)

    if run.main:
        note = keep_aside(folder, record)
        if note:
            print(note)
        utils.write_atomic(folder / 'inference.json', lambda f: json.dump(record, f, indent=1), 'w')
    run.barrier()
    rows, errors = evaluate(run, predict, spec, ids, quick=False, label='translate', on_subject=lambda subject, pred, std:
                            write_prediction(folder / 'pred' / subject.id, subject, pred, std, spec, record))
    prefix = '' if cfg.split == 'test' else f'{cfg.split}_'
    table = pd.DataFrame(rows)
    if table.empty or table.shape[1] <= 2:
        return errors  # no truth: images only
    table = table.assign(qc='', num_steps=record['num_steps'], samples=cfg.samples)
    good = list(table['ID'])

    # Baselines on the same subjects. The training mean and the autoencoder's ceiling are always there.
    baselines = {
        'mean': lambda s: (mean_prediction(model.mean_image, s), None),
        'aae': lambda s, ceiling=load_model(cfg, run, 'aae'): (utils.in_batches(run, ceiling.aae, cfg.eval_batch, s.target), None)}
    if 'post' in model.origin:
        baselines['unet'] = lambda s, unet=load_model(cfg, run, 'unet'): predict(s, unet)
    if checkpoint_path(cfg, 'regression').exists():
        baselines['regression'] = lambda s, net=load_model(cfg, run, 'regression'): predict(s, net)
    tables = {}
    for name, baseline in baselines.items():
        tables[name] = pd.DataFrame(evaluate(run, baseline, spec, good, quick=False, label=f'baseline {name}')[0])

    if spec.task == 'mri2pet':
        finish_amyloid(cfg, run, spec, predict, table, tables, folder)
    if run.main:
        columns = [c for c in table if c not in ('qc', 'num_steps', 'samples', 'seconds')] + ['qc', 'num_steps', 'samples', 'seconds']
        save_table(table[columns], folder / f'{prefix or "test_"}.csv'.replace('_.', '.'))
        for name, t in tables.items():
            save_table(t, folder / f'{prefix or "test_"}{name}.csv')
        summary = metrics.summarise(table, tables, cfg.seed)
        save_table(summary, folder / f'{prefix or "test_"}summary.csv')
        print(f'{len(table)} subjects of the {cfg.split} split, {record["checkpoint"]}, {cfg.sampler}'
              + (f'; the true label was given (--label {cfg.label})' if cfg.label != 'unknown' else ''))
        print(metrics.format_table(summary))
    return errors


def finish_amyloid(cfg, run, spec, predict, table, tables, folder):
    """Amyloid status: the threshold on the synthetic SUVR is fitted on training + validation, then applied to the test subjects."""


def save_table(table, path):
    utils.write_atomic(path, lambda f: table.to_csv(f, index=False, float_format='%.6g'), 'w')


def infer_file(cfg, run, model, spec):
    """Translate one new subject that is in no list: source file in, images in physical units on its grid out."""
    if not cfg.out:
        raise config.SettingError('--input needs --out DIR, the folder for the images')
    files = dict(source=cfg.input, mask=cfg.input_mask)
    subject = dataset.load_subject(replace(spec, lesion=None), files=files, with_truth=False)
    label = int(cfg.label) if cfg.label.isdigit() else None
    pred, std = translate(run, model, subject.source, subject.id, Sampling.of(cfg), label)
    write_prediction(Path(cfg.out), subject, pred, std, spec, prediction_record(cfg, model, spec))
    print(f'{", ".join(f"{name}.nii.gz" for name in spec.targets)} written to {cfg.out}')


def main():
    cfg = config.load(__doc__, extra={'stage': ('auto', 'which model: auto (post if there, else unet), post, unet or regression')})
    run = utils.Run(cfg.device, cfg.precision)
    folder = Path('result') / cfg.exp
    model = load_model(cfg, run, cfg.stage)
    spec = dataset.Spec.from_settings(cfg, **model.prep)
    if model.diffusion is not None and model.diffusion.predict == 'eps' and cfg.sampler == 'one_step':
        raise config.SettingError("sampler 'one_step' is refused: this network predicts eps; use --sampler ddim")
    if run.main:
        print('\n'.join([*cfg.changes(), f'device {run.describe()}', f'model {model.origin}']))
    if cfg.input:
        infer_file(cfg, run, model, spec)
        return
    errors = infer_split(cfg, run, model, spec, folder)
    if errors and run.main:
        print('\n'.join(errors))
    if errors:
        raise utils.RunError(f'{len(errors)} of {len(dataset.read_split(cfg.data_info, cfg.split))} subjects could not be translated (listed above); all others are done')


if __name__ == '__main__':
    utils.cli(main)
