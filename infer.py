"""
Batch inference: translate a split (or one new file) to NIfTI on each subject's own grid, in physical units, with
metrics.

python infer.py                              the test split of the experiment in config.py
python infer.py --sampler ddim --num_steps 50 --samples 4
python infer.py --input FILE --out DIR       one new subject, without truth (--input_mask FILE for its brain mask)
torchrun --nproc_per_node=4 infer.py         subjects divided among processes

Networks, task, schedule and scaling come from the checkpoints in result/<exp>, paths and sampler from the settings.
"""

import json
import shutil
import time
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import config
import dataset
import metrics
import quality
import status
import utils
from model import fingerprint
from translate import Model, Sampling, checkpoint_path, load_aae, load_model, mean_prediction, translate

# What the training scripts take from here: validation is inference by construction.
__all__ = ['Model', 'Sampling', 'load_aae', 'load_model', 'translate', 'evaluate', 'validate', 'fit_quality']


# ------------------------------------------------------------------------------------------------------------------
# Evaluation

def evaluate(run, predict, spec, ids, on_subject=None, quick=True, label='', intervals=None):
    """Rows of metrics, one a subject in the order of ids, on the subject's own grid; the processes share the subjects.

    predict(subject) -> (pred, std) in network scaling. quick: the few figures of a validation curve; else all of
    metrics.subject_row. on_subject(subject, pred, std): called for each, e.g. to write files. Errors of one subject are
    collected, not raised: returns (rows, errors).
    """
    rows, errors = [], []
    ranges = {name: dataset.scaling_range(spec, name) for name in spec.targets}
    mine = list(enumerate(ids))[run.rank::run.world]
    for i, id in tqdm(mine, desc=label or 'evaluate', leave=False, disable=not run.main, mininterval=0.5):
        try:
            subject = dataset.load_subject(spec, id, with_truth=spec.has_truth(id))
            start = time.perf_counter()
            pred, std = predict(subject)
            seconds, row = time.perf_counter() - start, dict(ID=id)
            if subject.target is not None:
                image, truth = subject.to_native(pred), subject.truth()
                mask, lesion = subject.native_mask, subject.native_lesion
                if quick:
                    row |= metrics.quick_row(image, truth, mask, lesion, ranges, spec.task, axis=subject.axial_axis)
                else:
                    row |= metrics.subject_row(image, truth, mask, lesion, subject.spacing, ranges, spec.task,
                                               axis=subject.axial_axis)
                if intervals:
                    spread = std_maps(subject, std, spec)
                    for name, fit in intervals.items():
                        coverage = quality.interval_coverage(image[name], spread[name], truth[name], mask, fit,
                                                             limits=ranges[name])
                        row |= {f'{name}_{k}': v for k, v in coverage.items()}
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
    """Means of the quick figures over the validation subjects, for a training stage; an unreadable one is an error."""
    rows, errors = evaluate(run, predict, spec, ids, label='validate')
    if errors:
        raise utils.RunError(errors[0])
    table = pd.DataFrame(rows).drop(columns=['ID', 'seconds'])
    return {name: float(table[name].mean()) for name in table}  # undefined values (no lesion) are left out of the mean


# ------------------------------------------------------------------------------------------------------------------
# Writing

def std_maps(subject, std, spec):
    """The std over samples, (N, K, *S) in network scaling or None (zeros), as physical maps on the subject's grid."""
    maps = {}
    for k, name in enumerate(spec.target_names):
        lo, hi = dataset.scaling_range(spec, name)
        maps[name] = np.zeros(subject.shape, np.float32)
        if std is not None:
            maps[name] = subject.to_native_raw(std[:, k:k + 1]) * (hi - lo) / 2 * subject.native_mask
    return maps


def write_prediction(folder, subject, pred, std, spec, record):
    """<target>.nii.gz, <target>_std.nii.gz and prediction.json of one subject."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in subject.to_native(pred).items():
        dataset.write_volume(folder / f'{name}.nii.gz', image, subject)
    for name, image in (std_maps(subject, std, spec) if std is not None else {}).items():
        dataset.write_volume(folder / f'{name}_std.nii.gz', image, subject)
    utils.write_atomic(folder / 'prediction.json', lambda f: json.dump(record | dict(id=subject.id), f, indent=1), 'w')


def prediction_record(cfg, model, spec):
    """What a prediction.json says: checkpoint, sampler, seed, label mode, units, how files became arrays."""
    known = {'dwi': 'multiples of the in-mask median', 'adc': '1e-6 mm^2/s', 'suvr': 'SUVR'}
    units = {name: known.get(name, 'as scaled') for name in spec.targets}
    units |= {name: 'in-mask quantile range, 0..1' for name in spec.targets if spec.scaling[name][0] == 'quantile'}
    return dict(checkpoint=model.origin, aae=fingerprint(model.aae), exp=cfg.exp, sampler=cfg.sampler,
                num_steps=1 if cfg.sampler == 'one_step' else cfg.num_steps,
                samples=cfg.samples, guidance=cfg.guidance, label=cfg.label, seed=cfg.seed, units=units,
                settings=model.prep)


def keep_aside(folder, record):
    """Nothing is overwritten silently: results of other settings move to old_<n>; replacing the same ones is said."""
    old = folder / 'inference.json'
    if not (folder / 'pred').exists():
        return None
    try:
        same = json.loads(old.read_text()) == json.loads(json.dumps(record))
    except (OSError, ValueError):  # not there, or damaged: who knows
        same = False
    when = datetime.fromtimestamp((folder / 'pred').stat().st_mtime).strftime('%Y-%m-%d %H:%M')
    if same:
        return f'replacing the predictions of {when}, made with the same checkpoint and settings'
    aside = utils.old_folder(folder)
    for path in [folder / 'pred', old, *folder.glob('test*.csv'), *folder.glob('infer_*.csv')]:
        if path.exists():
            shutil.move(path, aside / path.name)
    return f"predictions of {when}, made with other settings, are kept in {aside}"


def infer_split(cfg, run, model, spec, folder):
    """Translate a split, write images and tables. Returns the collected errors."""
    ids = dataset.read_split(cfg.data_info, cfg.split)
    # The true label of a subject reaches the network only if it is asked for, and then the summary says so.
    labels = dataset.read_labels(cfg.data_info, ids, cfg.num_classes) if cfg.label == 'true' else {}
    how, record = Sampling.of(cfg), prediction_record(cfg, model, spec) | dict(split=cfg.split)

    def predict(subject, model=model):
        label = None if cfg.label == 'unknown' else labels.get(subject.id) if cfg.label == 'true' else int(cfg.label)
        return translate(run, model, subject.source, subject.id, how, label)

    if run.main:
        note = keep_aside(folder, record)
        if note:
            print(note)
        utils.write_atomic(folder / 'inference.json', lambda f: json.dump(record, f, indent=1), 'w')
    run.barrier()
    fits = fit_intervals(cfg, run, spec, predict) if cfg.label != 'true' else {}
    qc = {}

    def keep(subject, pred, std):
        qc[subject.id] = check_source(model, subject)
        more = dict(qc=qc[subject.id], intervals=fits)
        write_prediction(folder / 'pred' / subject.id, subject, pred, std, spec, record | more)

    rows, errors = evaluate(run, predict, spec, ids, quick=False, label='translate', on_subject=keep, intervals=fits)
    qc = dict(run.gather(qc.items()))
    flagged = [f'{id}: {text}' for id, text in sorted(qc.items()) if text not in ('ok', '')]
    if flagged and run.main:
        print(f'{len(flagged)} subjects have a source unlike the training set:', *flagged, sep='\n  ')
    table = pd.DataFrame(rows)
    if table.empty or table.shape[1] <= 2:
        return errors  # no truth: images only
    table = table.assign(qc=table['ID'].map(qc), num_steps=record['num_steps'], samples=cfg.samples)

    tables = {}
    for name, baseline in baselines(cfg, run, model, predict).items():
        rows = evaluate(run, baseline, spec, list(table['ID']), quick=False, label=f'baseline {name}')[0]
        tables[name] = pd.DataFrame(rows)
    groups = amyloid_status(cfg, run, spec, predict, table) if 'suvr_pred' in table else None
    if run.main:
        # validation_*.csv are training curves.
        name = folder / (cfg.split if cfg.split == 'test' else f'infer_{cfg.split}')
        last = ['qc', 'num_steps', 'samples', 'seconds']
        save_table(table[[c for c in table if c not in last] + last], f'{name}.csv')
        for baseline, t in tables.items():
            save_table(t, f'{name}_{baseline}.csv')
        summary = metrics.summarise(table, tables, cfg.seed)
        save_table(summary, f'{name}_summary.csv')
        print(f'{len(table)} subjects of the {cfg.split} split, {record["checkpoint"]}, {cfg.sampler}'
              + (f'; the label was given (--label {cfg.label})' if cfg.label != 'unknown' else ''))
        print(metrics.format_table(summary))
        if groups is not None:
            save_table(groups, f'{name}_status.csv')
            print(groups.to_string(index=False, float_format=lambda v: f'{v:.3f}'))
    return errors


def baselines(cfg, run, model, predict):
    """What the model is compared with on the same subjects: {name: predict}.

    The training set's mean image and the autoencoder's reconstruction of the truth (the ceiling of all that goes
    through it) are always there; the U-Net before stage 3 and the regression U-Net where they have been trained.
    """
    aae = load_model(cfg, run, 'aae').aae

    def reconstruct(subject):
        return utils.in_batches(run, aae, cfg.eval_batch, subject.target), None

    found = dict(mean=lambda subject: (mean_prediction(model.mean_image, subject), None), aae=reconstruct)
    others = ['unet'] if model.stage == 'post' else []
    if model.stage != 'regression' and checkpoint_path(cfg, 'regression').exists():
        others.append('regression')
    return found | {name: partial(predict, model=load_model(cfg, run, name)) for name in others}


def fit_intervals(cfg, run, spec, predict, voxels=20000):
    """Intervals pred +- k_q sqrt(std^2 + s_0^2), q = 50, 90 %, by target, from the validation split: {target: fit}."""
    ids = [id for id in dataset.read_split(cfg.data_info, 'validation') if spec.has_truth(id)]
    parts = []

    def keep(subject, pred, std):
        inside = np.flatnonzero(subject.native_mask)
        inside = inside[np.linspace(0, len(inside) - 1, min(voxels, len(inside))).astype(int)]
        image, spread, truth = subject.to_native(pred), std_maps(subject, std, spec), subject.truth()
        parts.append({name: [x[name].ravel()[inside] for x in (image, spread, truth)] for name in spec.targets})

    errors = evaluate(run, predict, spec, ids, label='fit intervals', on_subject=keep)[1]
    if errors:
        raise utils.RunError(errors[0])
    parts = run.gather(parts)
    fits = {}
    for name in spec.targets if parts else ():
        pred, std, truth = zip(*[p[name] for p in parts], strict=True)
        ones = [np.ones_like(p) for p in pred]
        fits[name] = quality.interval_fit(pred, std, truth, ones, limits=dataset.scaling_range(spec, name))
    return fits


def amyloid_status(cfg, run, spec, predict, table):
    """AUC and balanced accuracy of the synthetic SUVR, of a logistic regression on MRI volumes, and both class sizes.

    Status is the true PET's SUVR above 1.11; thresholds are fitted on training + validation. Fills
    table['status_pred'].
    """
    fit_ids = [id for split in ('train', 'validation') for id in dataset.read_split(cfg.data_info, split)]
    volumes = []

    def measure(subject, pred, std):
        mri = subject.to_native_raw(subject.source) + 1
        volumes.append((subject.id, status.volume_features(mri, subject.native_mask, subject.voxel_ml).tolist()))

    def rows_of(ids, predict, label):
        return pd.DataFrame(evaluate(run, predict, spec, ids, quick=False, label=label, on_subject=measure)[0])

    fit = rows_of(fit_ids, predict, 'fit threshold')
    rows_of(list(table['ID']), predict, 'MRI volumes')
    volumes = dict(run.gather(volumes))
    positive = [(t['suvr_true'] > status.TRUE_THRESHOLD).astype(int) for t in (fit, table)]
    lines = dict(synthetic=status.classify(fit['suvr_pred'], positive[0], table['suvr_pred'], positive[1], cfg.seed))
    table['status_pred'] = (table['suvr_pred'] > lines['synthetic']['threshold']).astype(int)
    fit_volumes, table_volumes = ([volumes[id] for id in t['ID']] for t in (fit, table))
    lines['mri_volumes'] = status.mri_baseline(fit_volumes, positive[0], table_volumes, positive[1], cfg.seed)[0]
    return pd.DataFrame([dict(score=name) | line for name, line in lines.items()])


def check_source(model, subject):
    """Is the source like the training set's? 'ok', 'unlike training: what lies farthest out', or '' if not known."""
    if not model.qc:
        return ''
    features = source_features(subject.source, subject.mask)
    return f'unlike training: {quality.qc_reason(features, model.qc)}' if quality.qc_flag(features, model.qc) else 'ok'


def source_features(source, mask):
    """quality.source_features of the items with brain, which are those that a training cohort holds."""
    brain = mask.reshape(len(mask), -1).any(1)
    return quality.source_features(source[brain], mask[brain])


def fit_quality(spec, cohort, validation_ids, at_most=100):
    """What a good source looks like, from up to 100 training and 100 validation subjects: quality.qc_fit, or None."""
    train = []
    for j in np.linspace(0, len(cohort.ids) - 1, min(at_most, len(cohort.ids))).astype(int):
        batch = cohort.subject_items(j)
        train.append(source_features(batch['source'].numpy(), batch['mask'].numpy()))
    good = [dataset.load_subject(spec, id, with_truth=False) for id in validation_ids[:at_most]]
    return quality.qc_fit(train, [source_features(s.source, s.mask) for s in good]) if len(train) > 1 else None


def save_table(table, path):
    utils.write_atomic(path, lambda f: table.to_csv(f, index=False, float_format='%.6g'), 'w')


def infer_file(cfg, run, model, spec):
    """Translate one new subject that is in no list: source file in, images in physical units on its grid out."""
    if not cfg.out:
        raise config.SettingError('--input needs --out DIR, the folder for the images')
    if cfg.label == 'true':
        raise config.SettingError('--label true reads data_info.csv, which does not know a new file; give its class')
    files = dict(source=cfg.input, mask=cfg.input_mask)
    subject = dataset.load_subject(replace(spec, lesion=None), files=files, with_truth=False)
    print(*(f'Note: {note}' for note in subject.notes), sep='\n', end='\n' * bool(subject.notes))
    label = int(cfg.label) if cfg.label.isdigit() else None
    pred, std = translate(run, model, subject.source, subject.id, Sampling.of(cfg), label)
    qc = check_source(model, subject)
    write_prediction(Path(cfg.out), subject, pred, std, spec, prediction_record(cfg, model, spec) | dict(qc=qc))
    if qc not in ('ok', ''):
        print(f'{subject.id}: the source is {qc}; do not trust the images')
    print(f'{", ".join(f"{name}.nii.gz" for name in spec.targets)} written to {cfg.out}')


def main():
    which = 'which model: auto (post if there, else unet), post, unet or regression'
    cfg = config.load(__doc__, extra={'stage': ('auto', which)})
    if cfg.stage not in ('auto', 'post', 'unet', 'regression'):
        raise config.SettingError(f"--stage '{cfg.stage}': {which}")
    run = utils.Run(cfg.device, cfg.precision)
    folder = Path('result') / cfg.exp
    model = load_model(cfg, run, cfg.stage)
    if model.prep['task'] != cfg.task or set(model.prep['target_names']) != set(cfg.targets):
        used = folder / 'config.json'
        used = json.loads(used.read_text())['preset'] if used.exists() else 'NAME'
        theirs, ours = ', '.join(model.prep['target_names']), ', '.join(cfg.targets)
        raise config.SettingError(f"the checkpoint in {folder} is for {theirs} ({model.prep['task']}), the settings "
                                  f'are for {ours} ({cfg.task}); give the preset it was trained with: --preset {used}')
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
        total = len(dataset.read_split(cfg.data_info, cfg.split))
        raise utils.RunError(f'{len(errors)} of {total} subjects could not be translated (listed above); '
                             'all others are done')


if __name__ == '__main__':
    utils.cli(main)
