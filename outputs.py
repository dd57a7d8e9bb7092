"""
What inference writes and says beside its figures: images, what they say of each subject, the record of how they were
made, and where older ones go.

Part of infer.py.
"""

import json
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch

import config
import dataset
import metrics
import quality
import utils
import volume
from evaluate import lesion_map, rule_map, std_maps
from experiment import read_table
from model import fingerprint
from translate import checkpoint_path, found_stage


def write_prediction(folder, subject, pred, std, spec, record):
    """images_of one subject as <name>.nii.gz, and prediction.json, which is the record."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images_of(subject, pred, std, spec, record.get('intervals', {})).items():
        if image is None:
            (folder / f'{name}.nii.gz').unlink(missing_ok=True)  # an earlier one's
        else:
            dataset.write_volume(folder / f'{name}.nii.gz', image, subject)
    utils.write_atomic(folder / 'prediction.json', lambda f: json.dump(record | dict(id=subject.id), f, indent=1), 'w')


def images_of(subject, pred, std, spec, intervals):
    """
    name -> (X, Y, Z) on the subject's own grid, None of what there is not for this subject:

      <target>              the prediction, in physical units
      <target>_std          its doubt, in the same unit
      <target>_half_90      half the width of its 90 % interval
      lesion_probability    of the lesion head
      lesion_rule           1 where the lesion rule finds one in the predictions
    """
    images, doubt = subject.to_native(pred), std_maps(subject, std, spec)
    for name in spec.targets:
        images[f'{name}_std'] = doubt[name] if std is not None else None
        half = quality.interval_half_width(doubt[name], intervals[name], 0.9) if name in intervals else None
        images[f'{name}_half_90'] = half * subject.native_mask if half is not None else None
    return images | dict(lesion_probability=lesion_map(subject, pred), lesion_rule=rule_map(subject, pred))


def prediction_record(cfg, model, spec):
    """What a prediction.json says: checkpoint, sampler, seed, label mode, units, how files became arrays."""
    units = {name: volume.unit_of(name, spec.scaling[name]) for name in spec.targets}
    decoder, aae = (model.aae.decoder, fingerprint(model.aae)) if model.aae else (None, None)
    nets = [net for net in (model.unet, decoder, model.detail, model.regression) if net is not None]
    way = dict(sampler=cfg.sampler, num_steps=1 if cfg.sampler == 'one_step' else cfg.num_steps, samples=cfg.samples,
               guidance=cfg.guidance, skip_latent=model.skips_latent(cfg))
    if model.regression is not None:  # which does not sample
        way = dict(sampler='none', num_steps=1, samples=1, guidance=1.0, skip_latent=False)
    return dict(checkpoint=model.origin, aae=aae, weights=fingerprint(torch.nn.ModuleList(nets)), exp=cfg.exp, **way,
                label=cfg.label, mirror=cfg.mirror, seed=cfg.seed, lesion_odds=cfg.lesion_odds,
                lesion_core=cfg.lesion_core, units=units,
                settings=spec.travel() | dict(lesion_rule=list(spec.lesion_rule)))


def settings_of(path):
    """What inference.json says, less what was fitted with it, or config.json; {} if it cannot be read."""
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there, or damaged: who knows
        return {}
    found = {name: value for name, value in found.items() if name not in ('intervals', 'fitted_on')}
    if 'settings' in found:
        found['settings'] = dict(lesion_rule=[620, 1.25, 0.1]) | found['settings']  # older ones do not say it
    return dict(skip_latent=False) | found


BASELINES = ('_mean', '_aae', '_unet', '_regression')
TABLES = ('', '_predictions', '_summary', '_status', '_lesion_calibration', *BASELINES, '_compare')


def tables_of(cfg):
    """What the names of a split's tables begin with: result/<exp>/test (validation_*.csv are training curves)."""
    return Path('result') / cfg.exp / (cfg.split if cfg.split == 'test' else f'infer_{cfg.split}')


def keep_aside(folder, record, ids, stem):
    """Nothing is overwritten silently: results of other settings move to old_<n>; replacing the same ones is said.

    Of the same settings, too, the images of subjects that are not on the list (`ids`) any more move there, with the
    tables (stem: tables_of) that name them.
    """
    old = folder / 'inference.json'
    if not (folder / 'pred').exists():
        return None
    same = settings_of(old) == json.loads(json.dumps(record))
    when = datetime.fromtimestamp((folder / 'pred').stat().st_mtime).strftime('%Y-%m-%d %H:%M')
    if same:
        said = f'replacing the predictions of {when}, made with the same checkpoint and settings'
        pred = folder / 'pred'  # an ID may hold a /
        there = {path.parent for name in ('prediction.json', '*.nii.gz') for path in pred.rglob(name)} - {pred}
        gone = move_aside(folder, {str(path.relative_to(pred)) for path in there} - set(ids))
        for path in map(Path, (f'{stem}{end}.csv' for end in TABLES) if gone else ()):
            if path.exists():
                shutil.move(path, gone[0].parent / path.name)
        return said + (f'; those of {gone[1]} subjects that are not on the list now are in {gone[0]}' if gone else '')
    aside = utils.old_folder(folder)
    for path in [folder / 'pred', old, *folder.glob('test*.csv'), *folder.glob('infer_*.csv')]:
        if path.exists():
            shutil.move(path, aside / path.name)
    return f"predictions of {when}, made with other settings, are kept in {aside}"


def move_aside(folder, ids):
    """Move the images of these subjects from pred into a fresh old_<n>/pred; that folder and how many, or None."""
    there = [id for id in sorted(ids) if (folder / 'pred' / id).exists()]
    if not there:
        return None
    aside = utils.old_folder(folder) / 'pred'
    for id in there:
        (aside / id).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / 'pred' / id, aside / id)
    return aside, len(there)


def leave_only(stem, written, tables=None):
    """The tables of an earlier inference that this one did not write would pass for its own: they move to old_<n>.

    Not those of --compare, which is a command of its own, unless `tables` names them.
    """
    there = [Path(f'{stem}{end}.csv') for end in tables or TABLES[:-1] if f'{stem}{end}.csv' not in written]
    if there := [path for path in there if path.exists()]:
        aside = utils.old_folder(stem.parent)
        for path in there:
            shutil.move(path, aside / path.name)
        print(f'{", ".join(path.name for path in there)} of an earlier inference, not written now: kept in {aside}')


def save_table(table, path):
    utils.write_atomic(path, lambda f: table.to_csv(f, index=False, float_format='%.6g'), 'w')


def known_intervals(cfg, model, record):
    """What inference fitted with this checkpoint and sampler, here or beside the checkpoint: {intervals, fitted_on}, or
    {}; fitted_on: data_root and IDs of the subjects."""
    def way(said):  # less where the files were and what they were like
        files = dict.fromkeys(('unit_scale', 'resample', 'frame_interval', 'lesion_rule'))
        return said | dict(split='', data_root='', exp='', settings=said.get('settings', {}) | files)

    for folder in (Path('result') / cfg.exp, checkpoint_path(cfg, model.stage).parent):
        same = way(settings_of(folder / 'inference.json')) == way(json.loads(json.dumps(record)))
        said = json.loads((folder / 'inference.json').read_text()) if same else {}
        found = said.get('intervals')
        if found and all('half' in found.get(name, ()) for name in model.prep['target_names']):  # of this version
            return dict(intervals=found, fitted_on=said.get('fitted_on', {}))
    return {}


WAYS = 'sampler num_steps samples guidance skip_latent label mirror seed lesion_odds lesion_core'.split()


def no_intervals(cfg, model, record):
    """The sentence that says how to get intervals, where there are none; record: of this inference."""
    home = checkpoint_path(cfg, model.stage).parent
    last = settings_of(home / 'inference.json')
    other = [name for name in WAYS if last.get(name, record[name]) != record[name]]
    other = [f'{name} {last[name]}, not {record[name]}' for name in other]
    other = ['another checkpoint'] if last.get('weights', record['weights']) != record['weights'] else other
    preset = settings_of(home / 'config.json').get('preset', config.DEFAULTS['preset'])
    words = f' --preset {preset}' * (preset != config.DEFAULTS['preset'])
    words += f' --stage {model.stage}' * (found_stage(cfg) != model.stage)
    return (f'no intervals: python infer.py --exp {home.name}{words} fits them, on validation subjects with truth, for '
            'the same checkpoint and settings' + (f' (its last inference had {", ".join(other)})' if other else ''))


@dataclass
class Found:
    """What is known of each translated subject, id -> value, besides its figures."""
    qc: dict = field(default_factory=dict)         # is the source like those of training? (check_source)
    notes: dict = field(default_factory=dict)      # what was remarked when its files were read
    predicted: dict = field(default_factory=dict)  # what the images say: volume or SUVR, with interval
    probable: dict = field(default_factory=dict)   # probability of each class (label_probability)
    volumes: dict = field(default_factory=dict)    # of the MRI, amyloid (mri_volumes)
    counts: dict = field(default_factory=dict)     # of the lesion head's calibration (calibration_counts)

    def gathered(self, run):
        """That of all processes."""
        return Found(**{name: dict(run.gather(found.items())) for name, found in vars(self).items()})


def write_record(folder, record):
    """How the images were made, for plot.py, --compare and inferences to come."""
    utils.write_atomic(folder / 'inference.json', lambda f: json.dump(record, f, indent=1), 'w')


def tell(cfg, spec, folder, ids, rows, without, found):
    """Print what was remarked of single subjects, and move aside earlier images of those not translated now."""
    noted = [f'{id}: {note}' for id, notes in sorted(found.notes.items()) for note in notes]
    if noted:
        print(*noted[:10], *[f'and {len(noted) - 10} more such notes'] * (len(noted) > 10), sep='\n')
    if old := move_aside(folder, set(ids) - set(found.qc)):
        print(f'earlier images of {old[1]} subjects that could not be translated now are in {old[0]}')
    flagged = [f'{id}: {text}' for id, text in sorted(found.qc.items()) if text not in ('ok', '')]
    if flagged:
        print(f'{len(flagged)} subjects have a source unlike the training set:', *flagged, sep='\n  ')
    surest = [row['lesion_head_max'] for row in found.predicted.values() if 'lesion_head_max' in row]
    if surest and max(surest) <= cfg.lesion_core and cfg.lesion_odds != 1:
        print(f'in none of the {len(surest)} subjects is the probability of a lesion above lesion_core '
              f'{cfg.lesion_core:g} (at most {max(surest):.2f}): lesion_odds changed little or nothing')
    if without:
        files = ', '.join(spec.targets[name].format(root=spec.root, id=without[0]) for name in spec.target_names)
        print(f'{len(without)} of {len(rows)} subjects have no truth, no figures: {", ".join(without[:10])}'
              f'{" .." * (len(without) > 10)} (looked for {files})')


def predictions(ids, found):
    """Table of what the images say of each subject of the list, with or without truth, qc last."""
    likely = {id: {f'label_probability_{c}': p for c, p in enumerate(found.probable.get(id, ()))} for id in ids}
    table = pd.DataFrame([dict(ID=id, qc=found.qc.get(id, 'not translated')) | found.predicted.get(id, {}) | likely[id]
                          for id in ids])
    return table[[name for name in table if name != 'qc'] + ['qc']]


# ------------------------------------------------------------------------------------------------------------------
# Tables of several experiments

def compare(cfg):
    """
    This experiment's table of subjects beside those of the experiments in cfg.compare, written to test_compare.csv.

    Columns as in test_summary.csv, other experiments in place of the baselines. RunError where a table is missing, or
    holds other subjects, or was made from another split or data_root.
    """
    name = tables_of(cfg).name
    tables = {}
    for exp in [cfg.exp, *_others(cfg, 'compare')]:
        tables[exp] = _figures_of(cfg, exp, f'{name}.csv')
        ids = set(tables[exp]['ID'])
        if apart := sorted(ids ^ set(tables[cfg.exp]['ID'])):
            raise utils.RunError(f'{apart[0]} ({len(apart)} subjects in all) is in one of the tables of {cfg.exp} and '
                                 f'{exp} only; translate the same subjects with both')
    summary = metrics.summarise(tables.pop(cfg.exp), tables, cfg.seed)
    path = Path('result') / cfg.exp / f'{name}_compare.csv'
    save_table(summary, path)
    print(metrics.format_table(summary))
    print(f'{path} written: this model is {cfg.exp}')


def _others(cfg, flag):
    """The experiments that a flag names."""
    given = getattr(cfg, flag)
    others = [word.strip() for word in given.split(',')]
    if '' in others or cfg.exp in others or len(set(others)) < len(others):
        raise config.SettingError(f"--{flag} '{given}' must name other experiments than {cfg.exp}, each once, as in "
                                  'plain,weighted')
    return others


def _figures_of(cfg, exp, file):
    """A table of subjects of an experiment.

    RunError if it is missing, empty, or of another split or data_root, ExperimentError if it is damaged.
    """
    path = Path('result') / exp / file
    if not path.exists():
        if (path.parent / file.replace('.csv', '_predictions.csv')).exists():
            raise utils.RunError(f'{path} is missing: no subject there has truth, or inference has not finished')
        raise utils.RunError(f'{path} is missing; run python infer.py --exp {exp} first')
    how = settings_of(path.parent / 'inference.json')
    if (how.get('split'), how.get('data_root')) != (cfg.split, cfg.data_root):
        raise utils.RunError(f"{path} was not made from the split '{cfg.split}' of {cfg.data_root}; run python "
                             f'infer.py --exp {exp} again')
    rule = tuple(how.get('settings', {}).get('lesion_rule', cfg.lesion_rule))
    if rule != cfg.lesion_rule:
        raise utils.RunError(f'{path} was made with lesion_rule = {rule}, now it is {cfg.lesion_rule}; set it, or run '
                             f'python infer.py --exp {exp} again')
    again = f'run python infer.py --exp {exp} again'
    table = read_table(path, ['ID'], again)
    if table is None:
        raise utils.RunError(f'{path} holds no subject; {again}')
    return table


def pool(cfg):
    """
    The test subjects of several experiments, the folds of a cross-validation, as one table in this experiment's folder,
    with those of the baselines that all of them have: test.csv, test_<baseline>.csv, test_summary.csv.

    RunError as compare, or where a subject is in two of them.
    """
    stem, others = tables_of(cfg), _others(cfg, 'pool')
    if (stem.parent / 'pred').exists():
        raise utils.RunError(f'{stem.parent} has predictions of its own; pool the folds into another --exp')
    tables = [_figures_of(cfg, exp, f'{stem.name}.csv') for exp in others]
    ids = pd.concat(tables)['ID']
    if twice := sorted(ids[ids.duplicated()]):
        raise utils.RunError(f'{twice[0]} ({len(twice)} subjects in all) is a test subject of more than one of '
                             f'{", ".join(others)}; each must be in one test list')
    beside = [end[1:] for end in BASELINES
              if all((Path('result') / exp / f'{stem.name}{end}.csv').exists() for exp in others)]
    pooled = {name: pd.concat([_figures_of(cfg, exp, f'{stem.name}_{name}.csv') for exp in others]) for name in beside}
    table = pd.concat(tables).reset_index(drop=True)
    pooled = {name: rows.set_index('ID').reindex(table['ID']).reset_index() for name, rows in pooled.items()}
    summary = metrics.summarise(table, pooled, cfg.seed)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_record(stem.parent, dict(split=cfg.split, data_root=cfg.data_root, exp=cfg.exp, pooled=others,
                                   settings=dict(lesion_rule=list(cfg.lesion_rule))))
    written = {'': table, '_summary': summary} | {f'_{name}': rows for name, rows in pooled.items()}
    for end, rows in written.items():
        save_table(rows, f'{stem}{end}.csv')
    leave_only(stem, [f'{stem}{end}.csv' for end in written], TABLES)
    print(metrics.format_table(summary))
    print(f'{stem}.csv, {stem}_summary.csv written: {len(table)} subjects of {", ".join(others)}')
