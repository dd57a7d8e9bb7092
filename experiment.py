"""
What a run wrote into result/<exp>, read for plot.py as far as it is there: curves, tables, settings.
"""

import json
import math
import re
from pathlib import Path

import pandas as pd

STAGES = ('aae', 'unet', 'post', 'regression')
SCRIPTS = dict(aae='train_aae.py', unet='train_unet.py', post='post_train.py',
               regression='train_unet.py --regression True')
MODELS = ('', 'unet', 'regression', 'aae', 'mean')     # this model, then its baselines, in this order
TEXT_COLUMNS = ('ID', 'metric', 'qc', 'score', 'label_given')
NA = dict(keep_default_na=False, na_values=['', 'nan'])  # to pandas an ID such as NA or None is a missing one


class ExperimentError(RuntimeError):
    """A result folder that cannot be read; the message is one sentence for the user."""
    one_sentence = True


def read_table(path, needs, remedy):
    """
    A CSV of a run; None if there is none or it holds no row. Raises ExperimentError naming the file if it is damaged.

    needs: columns that must be there; a row without them (the last one, cut short by a kill) is left out.
    """
    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT_COLUMNS, str), **NA)
    except ValueError as error:  # pandas' own errors, and text that is not UTF-8, are ValueErrors
        raise ExperimentError(f'{path} is damaged ({str(error).strip().splitlines()[0]}); {remedy}') from None
    lacking = [name for name in needs if name not in table]
    if lacking:
        raise ExperimentError(f"{path} is damaged (it has no column '{lacking[0]}'); {remedy}")
    for name in table.columns.difference(TEXT_COLUMNS):
        numbers = pd.to_numeric(table[name], errors='coerce')
        wrong = table.index[numbers.isna() & table[name].notna()]
        if len(wrong):
            text = str(table[name][wrong[0]])[:40]
            raise ExperimentError(f"{path} is damaged ('{text}' in line {wrong[0] + 2}, column '{name}'); {remedy}")
        table[name] = numbers
    table = table.dropna(subset=needs[:2])  # a line cut short by a kill; a figure undefined for all subjects stays
    return table if len(table) else None


def read_json(path):
    """A dict; {} if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ExperimentError(f'{path} is damaged; delete it and run the script that writes it again')
    return found


def read_text(path):
    return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


class Experiment:
    """
    The files of result/<exp>; what is not there is None or empty.

    losses, validations: stage -> table. test, predictions, summary, status: test.csv, test_predictions.csv and so on.
    lesion_head: test_lesion_calibration.csv. settings: config.json. predicted: IDs with a prediction. record: how they
    were made. best: stage -> step of its checkpoint.
    Raises ExperimentError if there is no such folder, nothing in it, or a damaged file.
    """

    def __init__(self, name, suvr_positive=1.11):
        self.name, self.folder, self.suvr_positive = name, Path('result') / name, suvr_positive
        if not self.folder.is_dir():
            others = sorted(path.parent.name for path in Path('result').glob('*/config.json'))
            there = f' (there are: {", ".join(others)})' if others else ''
            raise ExperimentError(f'there is no experiment {self.folder}{there}; choose another --exp, or begin with '
                                  'python train_aae.py (or train_unet.py --regression True)')
        self.losses, self.validations = {}, {}
        for stage in STAGES:
            for kind, tables in (('loss_curve', self.losses), ('validation', self.validations)):
                remedy = f'delete it, or begin anew with python {SCRIPTS[stage]} --restart'
                table = read_table(self.folder / f'{kind}_{stage}.csv', ['step'], remedy)
                if table is not None:
                    tables[stage] = table
        again = 'delete it and run python infer.py again'
        self.test = read_table(self.folder / 'test.csv', ['ID'], again)
        self.predictions = read_table(self.folder / 'test_predictions.csv', ['ID', 'qc'], again)
        self.summary = read_table(self.folder / 'test_summary.csv', ['metric', 'n', 'mean', 'ci_low', 'ci_high'], again)
        self.status = read_table(self.folder / 'test_status.csv', ['score'], again)
        self.lesion_head = read_table(self.folder / 'test_lesion_calibration.csv', ['mean_p', 'lesion_share'], again)
        self.settings = read_json(self.folder / 'config.json')
        pred = self.folder / 'pred'
        self.predicted = sorted(str(path.parent.relative_to(pred)) for path in pred.rglob('prediction.json'))
        first = self.predicted[0] if self.predicted else '-'
        self.record = read_json(self.folder / 'pred' / first / 'prediction.json')
        self.log, self.commit = read_text(self.folder / 'log.txt'), read_text(self.folder / 'git.txt').strip()
        done = re.findall(r' (\w+): stage \w+ done: best at step (\d+)', self.log)
        self.best = {stage: int(step) for stage, step in done}
        tables = (self.test, self.summary)
        if not (self.losses or self.validations or self.predicted) and all(table is None for table in tables):
            raise ExperimentError(f'{self.folder} holds no training curve, no table and no prediction; run python '
                                  'train_aae.py, or train_unet.py --regression True, first')

    @property
    def models(self):
        """'' for this model, then the baselines of the summary, unknown ones last."""
        found = [name[:-len('_ci_low')] for name in self.summary if name.endswith('_ci_low')]
        return sorted(['', *found], key=lambda name: MODELS.index(name) if name in MODELS else len(MODELS))

    @property
    def threshold(self):
        """The threshold of the synthetic SUVR, fitted on training + validation, or None."""
        if self.status is None or 'threshold' not in self.status:
            return None
        values = self.status.loc[self.status['score'] == 'synthetic', 'threshold'].dropna()
        return float(values.iloc[0]) if len(values) else None

    @property
    def positive(self):
        """The true SUVR above which a subject is amyloid-positive: as inference had it, else as the settings say."""
        if self.status is None:
            return self.suvr_positive
        return float(self.status['suvr_positive'].iloc[0]) if 'suvr_positive' in self.status else 1.11  # older tables

    def said_of(self, id):
        """What the images say of a subject, a title for it, from test_predictions.csv; '' if that has no number."""
        table = self.predictions
        row = {} if table is None else next(iter(table[table['ID'] == id].to_dict('records')), {})
        for name, known in (('lesion_head_ml', 'lesion head {:.3g} ml'), ('suvr_pred', 'composite SUVR {:.2f}')):
            value, low, high = (row.get(f'{name}{end}', math.nan) for end in ('', '_low', '_high'))
            if math.isfinite(value):
                interval = f'\n90 % interval {low:.3g} .. {high:.3g}' if math.isfinite(low) else ''
                return known.format(value) + interval
        return ''

    def data_root(self, given):
        """Where the files lie that inference read; `given` by the settings, if that is not known or not there."""
        root = self.record.get('data_root') or given
        if root == given or not Path(root).expanduser().is_dir():
            return given
        print(f'the images were made from {root}')
        return root

    def missing(self):
        """One line for each part that is not there."""
        stages = [stage for stage in STAGES[:3] if self.settings.get(f'{stage}_steps') != 0]
        if set(self.losses) == {'regression'} or self.predicted and not (self.losses or self.settings):
            stages = []  # a U-Net on the image grid, alone; or inference with another experiment's networks
        if self.settings.get('init_from'):
            stages = stages[-1:]  # the earlier ones are in that experiment
        stages = [stage for stage in stages if stage not in self.losses]
        lines = [f'training curves of stage {stage}: run python {SCRIPTS[stage]}' for stage in stages]
        if not self.predicted:
            lines.append('synthetic images (pred/): run python infer.py')
        if self.test is None or self.summary is None:
            lines.append('test.csv and test_summary.csv, the figures against the truth: '
                         + ('run python infer.py' if self.predictions is None else
                            'no subject has truth, or inference has not finished'))
        return lines
