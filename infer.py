"""
Batch inference: translate a split (or one new file) to NIfTI on each subject's own grid, in physical units, with
metrics.

python infer.py                              the test split of the experiment in config.py
python infer.py --sampler ddim --num_steps 50 --samples 4
python infer.py --input FILE --out DIR       one new subject, without truth (--input_mask FILE, --input_composite FILE)
python infer.py --compare plain,other        no inference: the figures of these experiments' test.csv beside this one's
python infer.py --exp cv --pool cv_1,cv_2    no inference: the test subjects of these experiments as one table, in cv
torchrun --nproc_per_node=4 infer.py         subjects divided among processes

Networks, task, schedule and scaling come from the checkpoints in result/<exp>, paths and sampler from the settings.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import config
import dataset
import grid
import metrics
import utils
from evaluate import (
    amyloid_status,
    calibration_counts,
    calibration_table,
    check_source,
    evaluate,
    fit_intervals,
    fit_quality,
    fitting_ids,
    left_out,
    lesion_map,
    mri_volumes,
    ms_ssim_scales,
    number_record,
    predicted_row,
    validate,
)
from outputs import (
    Found,
    compare,
    keep_aside,
    known_intervals,
    leave_only,
    no_intervals,
    pool,
    prediction_record,
    predictions,
    save_table,
    settings_of,
    tables_of,
    tell,
    write_prediction,
    write_record,
)
from stage import lock, subject_keys
from translate import (
    Model,
    Sampling,
    checkpoint_path,
    differing,
    label_probability,
    load_aae,
    load_model,
    mean_prediction,
    translate,
)

# What the training scripts take from here: validation is inference by construction.
__all__ = ['Model', 'Sampling', 'check_sampling', 'checkpoint_path', 'differing', 'load_aae', 'load_model', 'translate',
           'evaluate', 'validate', 'fit_quality']


def check_task(cfg, model):
    """SettingError if the settings are for another task or other targets than the checkpoint is."""
    if model.prep['task'] != cfg.task or set(model.prep['target_names']) != set(cfg.targets):
        home = checkpoint_path(cfg, model.stage).parent
        used = settings_of(home / 'config.json').get('preset', 'NAME')
        theirs, ours = ', '.join(model.prep['target_names']), ', '.join(cfg.targets)
        raise config.SettingError(f"the checkpoint in {home} is for {theirs} ({model.prep['task']}), the settings "
                                  f'are for {ours} ({cfg.task}); give the preset it was trained with: --preset {used}')


def check_sampling(cfg, model, spec):
    """Settings that do not fit the network, or would do nothing, before anything is moved or written."""
    if model.diffusion is not None and model.diffusion.predict == 'eps' and cfg.sampler == 'one_step':
        raise config.SettingError("sampler 'one_step' is refused: this network predicts eps; use --sampler ddim")
    if model.diffusion is not None and cfg.sampler != 'one_step' and cfg.num_steps > model.diffusion.timesteps:
        raise config.SettingError(f'num_steps {cfg.num_steps} is more than the {model.diffusion.timesteps} steps of '
                                  "this network's schedule")
    if cfg.label != 'unknown' and not spec.num_classes:
        raise config.SettingError(f'label {cfg.label} was given, but this network was trained without labels')


def infer_split(cfg, run, model, spec, folder):
    """Translate a split, write images and tables. Returns the collected errors."""
    ids = dataset.read_split(cfg.data_info, cfg.split)
    # The true label of a subject reaches the network only if it is asked for, and then the summary says so.
    labels = {}
    if cfg.label == 'true':
        fitted = fitting_ids(cfg, spec, 'train', 'validation')
        labels = dataset.read_labels(cfg.data_info, list(dict.fromkeys([*ids, *fitted])), cfg.num_classes)
    how, stem, found = Sampling.of(cfg, spec), tables_of(cfg), Found()
    record = prediction_record(cfg, model, spec) | dict(split=cfg.split, data_root=cfg.data_root)

    def predict(subject, model=model):
        label = None if cfg.label == 'unknown' else labels.get(subject.id) if cfg.label == 'true' else int(cfg.label)
        return translate(run, model, subject.stacked, subject.id, how.at(subject), label, subject.mask)

    trained_on = [id for id in ids if subject_keys(cfg.data_root, [id]) <= model.trained_on]
    if trained_on and cfg.split != 'train' and run.main:
        print(f'{len(trained_on)} of these {len(ids)} subjects were trained on ({", ".join(trained_on[:5])}'
              f'{" .." * (len(trained_on) > 5)}): their figures say nothing of new subjects')
    known = run.gather([known_intervals(cfg, model, record)] if run.main else [])[0]
    if run.main:
        held = lock(folder, '.lock_infer')  # noqa: F841 (until it is out of scope; training may go on meanwhile)
        note = keep_aside(folder, record, ids, stem)
        if note:
            print(note)
        write_record(folder, record | known)
    run.barrier()
    beside = {} if cfg.only_model or not any(map(spec.has_truth, ids)) else baselines(cfg, run, model, predict)
    fits, of = intervals(cfg, run, model, spec, predict, record, known)
    if run.main:  # beside the settings they were fitted with, for the subjects to come
        write_record(folder, record | dict(intervals=fits, fitted_on=of))

    def keep(subject, pred, std):
        id = subject.id
        found.qc[id], found.notes[id] = check_source(model, subject), subject.notes
        found.predicted[id] = predicted_row(subject, pred, std, spec, fits)
        more = dict(qc=found.qc[id], intervals=fits) | number_record(found.predicted[id], spec)
        if (p := label_probability(run, model, subject.stacked)) is not None:
            more['label_probability'] = found.probable[id] = p
        write_prediction(folder / 'pred' / id, subject, pred, std, spec, record | more)
        if subject.target is None:
            return
        if spec.task == 'mri2pet':
            found.volumes[id] = mri_volumes(subject)
        found.counts[id] = calibration_counts(lesion_map(subject, pred), subject.known_mask(), subject.native_lesion)

    # Intervals and status thresholds are fitted on the training and validation subjects: judged on others only.
    unseen = cfg.split not in ('train', 'validation')
    same_data = Path(of.get('data_root', '')).resolve() == Path(cfg.data_root).resolve()
    seen = set(of.get('ids', ())) & set(ids) if same_data else set()
    if seen and unseen and run.main:
        print(f'the intervals are not judged: they were fitted on {len(seen)} of these subjects')
    rows, errors = evaluate(run, predict, spec, ids, quick=False, label='translate', on_subject=keep,
                            intervals=fits if unseen and not seen else None)
    found, without = found.gathered(run), [row['ID'] for row in rows if set(row) == {'ID', 'seconds'}]
    table = pd.DataFrame([row for row in rows if row['ID'] not in without])
    tables = {}
    if run.main:
        tell(cfg, spec, folder, ids, rows, without, found)
        save_table(predictions(ids, found), f'{stem}_predictions.csv')
        print(f'{stem}_predictions.csv: what the images say of each subject')
    if not table.empty:
        id = table['ID']
        table = table.assign(qc=id.map(found.qc), num_steps=record['num_steps'], samples=record['samples'],
                             ms_ssim_scales=ms_ssim_scales(spec))
        if spec.num_classes == 2 and found.probable:
            table['label_probability'] = [found.probable[i][1] for i in id]
        others = {}
        for name, baseline in beside.items():
            rows, failed = evaluate(run, baseline, spec, list(id), quick=False, label=f'baseline {name}')
            left_out(run, f'the baseline {name}', failed)
            if rows:
                others[name] = pd.DataFrame(rows)
        judged = 'suvr_pred' in table and unseen and not cfg.only_model
        groups = amyloid_status(cfg, run, spec, predict, table, found.volumes) if judged else None
        if run.main:
            tables |= figures(cfg, spec, record, table, others, groups, found)
    if run.main:
        for end, rows in tables.items():
            save_table(rows, f'{stem}{end}.csv')
        leave_only(stem, [f'{stem}{end}.csv' for end in ('_predictions', *tables)])
    return errors


def intervals(cfg, run, model, spec, predict, record, known):
    """(intervals, what they were fitted on): fitted now, or those known from before; says so if there are none."""
    fits = {} if cfg.only_model else fit_intervals(cfg, run, spec, predict)
    if fits:
        return fits, dict(data_root=cfg.data_root, ids=fitting_ids(cfg, spec, 'validation'))
    if run.main:
        print('the intervals are those that were fitted before with this checkpoint' if known.get('intervals')
              else no_intervals(cfg, model, record))
    return known.get('intervals', {}), known.get('fitted_on', {})


def figures(cfg, spec, record, table, others, groups, found):
    """Tables of a split with truth, end of the file name -> table; prints the summary.

    table: a row for each subject; others: the same of each baseline; groups: amyloid_status's, or None.
    """
    last = ('label_probability', 'ms_ssim_scales', 'qc', 'num_steps', 'samples', 'seconds')
    last = [c for c in last if c in table]
    tables = {'': table[[c for c in table if c not in last] + last]} | {f'_{name}': t for name, t in others.items()}
    tables['_summary'] = summary = metrics.summarise(table, others, cfg.seed)
    if cfg.label != 'unknown':
        summary['label_given'] = cfg.label
    if np.any(list(found.counts.values())):
        tables['_lesion_calibration'] = calibration_table(list(found.counts.values()))
    print(f'{len(table)} subjects of the {cfg.split} split, {record["checkpoint"]}, {cfg.sampler}; MS-SSIM over '
          f'{ms_ssim_scales(spec)} scales'
          + (f'; the label was given (--label {cfg.label})' if cfg.label != 'unknown' else ''))
    print(metrics.format_table(summary))
    if groups is not None:
        tables['_status'] = groups
        print(groups.set_index('score').T.to_string(float_format=lambda v: f'{v:.4g}'))
    return tables


def baselines(cfg, run, model, predict):
    """What the model is compared with on the same subjects: {name: predict}.

    The training set's mean image, the autoencoder's reconstruction of the truth (the ceiling of all that goes through
    it), the U-Net before stage 3 and the regression U-Net, where they have been trained.
    """
    there = model.aae or checkpoint_path(cfg, 'aae').exists()
    first = load_model(cfg, run, 'aae') if there else None  # not the decoder that stage 3 tuned
    if first and differing(first.prep, model.prep, source=False):  # a regression need not fit what lies beside it
        first = None
    mean_image = model.mean_image or (first.mean_image if first else None)

    def reconstruct(subject):
        batches = grid.batches(subject.mask, cfg.eval_batch, subject.spec.trim)
        return utils.in_batches(run, first.aae, batches, subject.target), None

    found = dict(mean=lambda subject: (mean_prediction(mean_image, subject), None)) if mean_image else {}
    found |= dict(aae=reconstruct) if first else {}
    others = dict(post=('unet', 'regression'), unet=('regression',)).get(model.stage, ())
    others = [stage for stage in others if checkpoint_path(cfg, stage).exists()]
    others = {name: load_model(cfg, run, name) for name in others}
    unlike = {name: differing(other.prep, model.prep) for name, other in others.items()}
    for name in [name for name, what in unlike.items() if what and run.main]:
        print(f'the {name} network is left out of the table: trained with another {", ".join(unlike[name])}')
    return found | {name: partial(predict, model=other) for name, other in others.items() if not unlike[name]}


def infer_file(cfg, run, model, spec):
    """Translate one new subject that is in no list: source file in, images in physical units on its grid out."""
    if not cfg.out:
        raise config.SettingError('--input needs --out DIR, the folder for the images')
    if cfg.label == 'true':
        raise config.SettingError('--label true reads data_info.csv, which does not know a new file; give its class')
    out, origin = Path(cfg.out), str(Path(cfg.input).resolve())
    files = dict(source=cfg.input, mask=cfg.input_mask, lesion=cfg.input_composite)
    if cfg.input_composite and spec.task != 'mri2pet':
        raise config.SettingError('--input_composite is of mri2pet; nothing here is measured in a given region')
    there = [out / f'{name}.nii.gz' for name in spec.targets if (out / f'{name}.nii.gz').exists()]
    if there and settings_of(out / 'prediction.json').get('source') != origin:
        raise config.SettingError(f'{there[0]} is there already and was not made from {cfg.input}; choose another '
                                 '--out')
    subject = dataset.load_subject(replace(spec, lesion=None), files=files, with_truth=False)
    print(*(f'Note: {note}' for note in subject.notes), sep='\n', end='\n' * bool(subject.notes))
    label = int(cfg.label) if cfg.label.isdigit() else None
    how = Sampling.of(cfg, spec).at(subject)
    pred, std = translate(run, model, subject.stacked, subject.id, how, label, subject.mask)
    qc, record = check_source(model, subject), prediction_record(cfg, model, spec)
    more = {} if (p := label_probability(run, model, subject.stacked)) is None else dict(label_probability=p)
    fits = known_intervals(cfg, model, record).get('intervals', {})
    said = number_record(predicted_row(subject, pred, std, spec, fits), spec)
    write_prediction(out, subject, pred, std, spec, record | more | dict(source=origin, qc=qc, intervals=fits) | said)
    for name, number in said.items():
        parts = number if isinstance(number, dict) else dict(value=number)
        known = f' (90 % interval {parts["low_90"]:.4g} .. {parts["high_90"]:.4g})' if 'low_90' in parts else ''
        print(f'{name} {parts["value"]:.4g}{known}')
    if not fits:
        print(no_intervals(cfg, model, record))
    if qc not in ('ok', ''):
        print(f'{subject.id}: the source is {qc}; do not trust the images')
    print(f'{", ".join(f"{name}.nii.gz" for name in spec.targets)} written to {cfg.out}')


def of_these_files(cfg):
    """Settings that say what files are like, not what the network was trained on: where given, they hold here."""
    given = dict(frame_interval=cfg.frame_interval is not None, resample=cfg.resample,
                 unit_scale=any(factor != 1 for factor in cfg.unit_scale.values()))
    return {name: getattr(cfg, name) for name, changed in given.items()
            if changed or cfg.origin[name] == 'command line'}


def main():
    which = 'which model: auto (the first that is there), post, unet or regression'
    cfg = config.load(__doc__, extra=dict(
        stage=('auto', which), only_model=(False, 'no baselines, no intervals but earlier ones'),
        compare=('', 'other experiments, NAME,NAME: their figures beside this one'),
        pool=('', 'experiments of a cross-validation, NAME,NAME: their test subjects together, into this one')))
    if cfg.stage not in ('auto', 'post', 'unet', 'regression'):
        raise config.SettingError(f"--stage '{cfg.stage}': {which}")
    if cfg.compare or cfg.pool:
        (compare if cfg.compare else pool)(cfg)
        return
    if not cfg.input and (lone := [name for name in ('input_mask', 'input_composite', 'out') if getattr(cfg, name)]):
        raise config.SettingError(f'--{lone[0]} is of one new subject: give its source, too, --input FILE')
    run, folder = utils.Run(cfg.device, cfg.precision, training=False), Path('result') / cfg.exp
    model = load_model(cfg, run, cfg.stage)
    check_task(cfg, model)
    spec = dataset.Spec.from_settings(cfg, **model.prep | of_these_files(cfg))
    check_sampling(cfg, model, spec)
    run.search_kernels(not spec.trim)
    if run.main:
        print('\n'.join([*cfg.changes(), f'device {run.describe()}', f'model {model.origin}']))
        if cfg.guidance != 1 and cfg.label == 'unknown':
            print(f'guidance {cfg.guidance:g} has no effect while the label is unknown')
        if model.regression is not None and (cfg.sampler != 'one_step' or cfg.samples != 1):
            print('sampler, num_steps and samples have no effect: a U-Net on the image grid does not sample')
        if model.skips_latent(cfg):
            print('the latent path is left out: in stage 3 it added nothing to the validation images')
        if not model.qc:
            print('sources are not checked: this checkpoint does not say what a good one looks like')
    if cfg.input:
        if run.main:
            infer_file(cfg, run, model, spec)
        return
    errors = infer_split(cfg, run, model, spec, folder)
    if errors:
        print(*errors if run.main else (), sep='\n', end='\n' * run.main)
        total = len(dataset.read_split(cfg.data_info, cfg.split))
        raise utils.RunError(f'{len(errors)} of {total} subjects could not be translated (listed above); '
                             'all others are done')


if __name__ == '__main__':
    utils.cli(main)
