"""plot.py on made results: every figure and a self-contained page, whatever part of a run is there, for both tasks."""
import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from made_data import affine, amyloid_settings, settings, write_amyloid, write_stroke
from matplotlib.figure import Figure

import charts
import dataset
import evaluate
import experiment
import metrics
import montage
import plot
import quality
import status
import utils

STROKE_IDS = tuple(f's{i:02d}' for i in range(6))
FIGURES = {'montage.png', 'scatter.png', 'metrics.png', 'calibration.png', 'curves.png'}


# ----------------------------------------------------------------------------------------------------------------------
# A made result folder: what training and inference write

def write_curves(folder, stages=('aae', 'unet', 'post')):
    """Curves of the stages, settings, commit and log."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        step = np.arange(40)
        terms = {'loss': 2 * np.exp(-step / 20) + 0.1, 'adversarial': np.where(step > 20, -0.3, 0.0)}
        curve = dict(step=step, epoch=step // 10, lr=1e-3, **terms, grad_norm=1.0, seconds=step * 0.5)
        pd.DataFrame(curve).to_csv(folder / f'loss_curve_{stage}.csv', index=False)
        rows = dict(step=[0, 20, 40], psnr=[15, 20, 21.5], ssim=[0.3, 0.5, 0.6], mae=[0.2, 0.1, 0.08])
        pd.DataFrame(dict(rows, lesion_mae=[0.3, 0.2, 0.1])).to_csv(folder / f'validation_{stage}.csv', index=False)
    log = '2026-01-01 00:00:00 {0}: stage {0} done: best at step 40 (psnr 21.5), 9 s\n'
    (folder / 'log.txt').write_text(''.join(map(log.format, stages)))
    (folder / 'git.txt').write_text('0123456789abcdef\n')


def write_result(cfg, ids, noise=0.05, with_std=True, seed=0):
    """Predictions = truth + noise for subjects, their tables, and baselines with more noise; returns the folder."""
    folder, spec, rng = Path('result') / cfg.exp, dataset.Spec.from_settings(cfg), np.random.default_rng(seed)
    write_curves(folder)
    (folder / 'config.json').write_text(json.dumps(cfg.as_dict()))
    ranges = {target: dataset.scaling_range(spec, target) for target in spec.target_names}
    record = dict(checkpoint='CHECKPOINT_Unet_post (EMA weights) at step 40', sampler='ddim', num_steps=7, samples=3,
                  guidance=1.0, label='unknown', seed=0, units=dict.fromkeys(ranges, 'some unit'), split='test',
                  mirror=True)
    rows, scale = {name: [] for name in ('', 'unet', 'aae', 'mean')}, dict(unet=2.0, aae=0.5, mean=4.0)
    counts = []
    for id in ids:
        subject = dataset.load_subject(spec, id)
        truth, mask = subject.truth(), subject.native_mask
        for name, table in rows.items():
            width = {t: noise * scale.get(name, 1) * (hi - lo) for t, (lo, hi) in ranges.items()}
            noisy = {t: image + rng.normal(0, width[t], mask.shape) for t, image in truth.items()}
            pred = {t: np.clip(image, *ranges[t]) * mask for t, image in noisy.items()}
            row = metrics.subject_row(pred, truth, mask, subject.native_lesion, subject.spacing, ranges, spec.task,
                                      axis=subject.axial_axis)
            if not name:
                std = {t: np.where(mask, width[t], 0) * rng.uniform(0.6, 1.0, mask.shape) for t in pred}
                fit = {t: quality.interval_fit([pred[t]], [std[t]], [truth[t]], [mask]) for t in pred}
                for t in pred:
                    dataset.write_volume(folder / 'pred' / id / f'{t}.nii.gz', pred[t], subject)
                    if with_std:
                        dataset.write_volume(folder / 'pred' / id / f'{t}_std.nii.gz', std[t], subject)
                    cover = quality.interval_coverage(pred[t], std[t], truth[t], mask, fit[t])
                    row |= {f'{t}_{key}': value for key, value in cover.items()}
                if spec.task == 'ctp2dwi':
                    head = 0.9 * subject.native_lesion + 0.05 * mask
                    dataset.write_volume(folder / 'pred' / id / 'lesion_probability.nii.gz', head, subject)
                    counts.append(evaluate.calibration_counts(head, mask, subject.native_lesion))
                (folder / 'pred' / id / 'prediction.json').write_text(json.dumps(dict(record, id=id)))
            table.append(dict(ID=id, **row))
    tables = {name: pd.DataFrame(table) for name, table in rows.items()}
    test = tables.pop('').assign(qc='ok', num_steps=7, samples=3, seconds=0.1)
    if spec.task == 'mri2pet':
        line = status.classify(test['suvr_pred'], test['suvr_true'] > 1.11, test['suvr_pred'], test['suvr_true'] > 1.11)
        save(pd.DataFrame([dict(score='synthetic', **line)]), folder / 'test_status.csv')
        test['status_pred'] = (test['suvr_pred'] > line['threshold']).astype(int)
    save(test, folder / 'test.csv')
    if counts:
        save(evaluate.calibration_table(counts), folder / 'test_lesion_calibration.csv')
    for name, table in tables.items():
        save(table, folder / f'test_{name}.csv')
    save(metrics.summarise(test, tables, 0), folder / 'test_summary.csv')
    return folder


def save(table, path):
    table.to_csv(path, index=False, float_format='%.6g')


def make_stroke():
    """Six subjects, one of them without a lesion, and their results."""
    write_stroke(ids=STROKE_IDS)
    lesion = Path('data') / STROKE_IDS[2] / 'lesion.nii.gz'
    img = nib.load(lesion)
    nib.save(nib.Nifti1Image(np.zeros(img.shape, np.uint8), img.affine, img.header), lesion)
    return write_result(settings(), STROKE_IDS)


def make_amyloid():
    """Six subjects, three of them positive, and their results."""
    write_amyloid(ids=STROKE_IDS)
    for i, id in enumerate(STROKE_IDS):
        path = f'data/whole_Abeta/{id}.nii'
        img = nib.load(path)
        array = img.get_fdata(dtype=np.float32) * np.float32(0.75 + 0.08 * i)
        nib.save(nib.Nifti1Image(array, img.affine, img.header), path)
    return write_result(amyloid_settings(), STROKE_IDS)


def run_plot(monkeypatch, cfg):
    """plot.py with these settings, its pictures coarse to save time."""
    save_figure = Figure.savefig
    with monkeypatch.context() as patch:
        patch.setattr(Figure, 'savefig', lambda self, path, **more: save_figure(self, path, **{**more, 'dpi': 30}))
        patch.setattr(plot.config, 'load', lambda *_: cfg)
        plot.main()


class Page(HTMLParser):
    """What a page refers to, its tables as rows of text, and the values in data-value."""

    def __init__(self, path):
        super().__init__()
        self.links, self.rows, self.values, self.tags, self.text = [], [], [], [], ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs[name] for name in ('src', 'href') if name in attrs]
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')
            self.values += [attrs['data-value']] if 'data-value' in attrs else []
        self.cell = tag in ('td', 'th') or (tag == 'small' and self.cell)

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ('td', 'th')

    cell = False

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data


def check_page(folder):
    """The page is self-contained and its summary table equals the CSV; returns it."""
    page = Page(folder / 'report.html')
    raw = (folder / 'report.html').read_text(encoding='utf-8')
    assert page.links and all(link.startswith('data:image/png;base64,') for link in page.links)
    assert 'script' not in page.tags and 'link' not in page.tags and not re.search(r'https?:|url\(|@import', raw)
    assert len(raw) < 5e6
    with open(folder / 'test_summary.csv', newline='') as file:
        lines = list(csv.DictReader(file))
    expected = [float(line[f'{model}mean'] or 'nan') for line in lines for model in ('', 'unet_', 'aae_', 'mean_')]
    np.testing.assert_allclose([float(value) for value in page.values], expected, rtol=1e-5)
    shown = {row[0]: row for row in page.rows if row}
    for line in lines:
        row = shown[line['metric']]
        assert row[1] and row[2] == line['n']  # what it is, and its unit
        if not line['mean']:  # undefined for all subjects, as lesion_dice_2ml where all lesions are small
            continue
        mean = float(line['mean'])
        assert float(row[3].split()[0]) == pytest.approx(mean, rel=6e-4, abs=6e-5)
        assert float(row[3].split()[1]) == pytest.approx(float(line['ci_low']), rel=6e-4, abs=6e-5)
    return page


# ----------------------------------------------------------------------------------------------------------------------
# The whole of it

def test_stroke(monkeypatch, capsys):
    folder = make_stroke()
    stale = folder / 'fig' / 'montage_gone.png'
    stale.parent.mkdir()
    stale.write_bytes(b'old')
    (folder / 'fig' / 'mine.png').write_bytes(b'kept')
    run_plot(monkeypatch, settings())
    files = {path.name for path in (folder / 'fig').iterdir()} - {'mine.png'}
    assert FIGURES < files and not stale.exists() and (folder / 'fig' / 'mine.png').exists()
    assert f'montage_{STROKE_IDS[2]}.png' in files and len(files) == len(FIGURES) + 4
    printed = capsys.readouterr().out.split('\n')
    assert {Path(line).name for line in printed if line} == files | {'report.html'}
    page = check_page(folder)
    for text in ('0123456789abcdef', 'CHECKPOINT_Unet_post (EMA weights) at step 40', 'ddim, 7 steps, 3 samples',
                 'mean with the mirrored source',
                 'this task has no label', 'no lesion', 'stage 2, before post-training', 'that the lesion head gives'):
        assert text in page.text
    assert 'Not there' not in page.text
    assert ['image_size', '[16, 20]', '[64, 72]'] in page.rows


def test_amyloid(monkeypatch):
    folder = make_amyloid()
    run_plot(monkeypatch, amyloid_settings())
    files = {path.name for path in (folder / 'fig').iterdir()}
    assert FIGURES < files and len(files) == len(FIGURES) + 4
    page = check_page(folder)
    assert 'SUVR of the synthetic PET' in page.text and 'smallest error' in page.text
    assert ['label given to the network', 'unknown'] in page.rows and '--label' not in page.text
    summary = pd.read_csv(folder / 'test_summary.csv')
    save(summary.assign(label_given='true'), folder / 'test_summary.csv')
    cfg = amyloid_settings()
    plot.write_report(plot.make_spec(cfg, folder), plot.Experiment(cfg.exp), [], {})
    assert 'A label was given to the network at inference (--label true)' in Page(folder / 'report.html').text


@pytest.mark.parametrize('series', [{}, {'dwi': {'fitted': [(0.5, 0.4, 0.3, 0.5), (0.9, 0.8, 0.7, 1)]}}])
def test_how_often_the_lesion_head_is_right_is_drawn_beside_the_intervals(monkeypatch, tmp_path, series):
    kept = []
    monkeypatch.setattr(charts.plt, 'close', kept.append)
    p, share = np.array([0.05, 0.5, 0.95]), np.array([0.0, 0.4, 1.0])
    charts.draw_calibration(tmp_path / 'a.png', series, (p, share))
    charts.draw_calibration(tmp_path / 'b.png', {'dwi': {'fitted': [(0.5, 0.4, 0.3, 0.5)]}})
    both, alone = kept
    assert len(both.axes) == len(series) + 1 and len(alone.axes) == 1
    np.testing.assert_array_equal(both.axes[-1].lines[-1].get_xydata(), np.stack([p, share], 1))
    for figure in kept:
        charts.plt.figure(figure.number).clear()


def test_no_outline_of_the_lesion_rule_without_physical_units():
    folder, spec, ids = make_stroke(), dataset.Spec.from_settings(settings()), STROKE_IDS
    assert plot.load_case(spec, folder, ids[0])[1].found is not None
    spec.scaling = dict(spec.scaling, adc=('quantile', 0.005, 0.995))
    assert plot.load_case(spec, folder, ids[0])[1].found is None and 'rule_ml' not in plot.measure(spec, folder, ids[0])


def test_a_folder_with_nothing_but_curves(monkeypatch, capsys):
    write_stroke()
    write_curves(Path('result/exp_1'), stages=('aae', 'unet'))
    run_plot(monkeypatch, settings())
    assert [path.name for path in Path('result/exp_1/fig').iterdir()] == ['curves.png']
    out, page = capsys.readouterr().out, Page(Path('result/exp_1/report.html'))
    for text in ('stage post', 'python infer.py', 'test.csv'):
        assert text in out and text in page.text


def test_tables_without_images_and_images_without_truth(monkeypatch):
    folder = make_stroke()
    for path in folder.glob('test*.csv'):
        path.unlink()
    for id in STROKE_IDS:
        for name in ('dwi', 'adc', 'lesion'):
            (Path('data') / id / f'{name}.nii.gz').unlink()
    run_plot(monkeypatch, settings())
    files = {path.name for path in (folder / 'fig').iterdir()}
    assert files == {'montage.png', 'curves.png', *(f'montage_{id}.png' for id in STROKE_IDS[:4])}
    assert 'the first four subjects' in Page(folder / 'report.html').text

    shutil.rmtree(folder / 'pred')
    write_stroke(ids=STROKE_IDS)
    run_plot(monkeypatch, settings())
    assert {path.name for path in (folder / 'fig').iterdir()} == {'curves.png'}


def test_files_are_read_as_inference_read_them(monkeypatch, capsys):
    """Tested on a site that writes ADC in mm^2/s: infer.py was told so, and prediction.json says it."""
    folder = make_stroke()
    shutil.copy(folder / 'pred' / 's00' / 'adc.nii.gz', 'kept.nii.gz')
    told = dataset.Spec.from_settings(settings(), unit_scale=dict(source=1, dwi=1, adc=1e6)).travel()
    for id in STROKE_IDS:
        path = Path('data', id, 'adc.nii.gz')
        img = nib.load(path)
        nib.save(nib.Nifti1Image(img.get_fdata(dtype=np.float32) * 1e-6, img.affine, img.header), path)
        path = folder / 'pred' / id / 'prediction.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(settings=told)))
    run_plot(monkeypatch, settings())
    assert (folder / 'fig' / 'montage.png').exists() and 's00' not in capsys.readouterr().err


def test_a_subject_without_lesion_file_is_not_counted_in_the_scatter(monkeypatch, tmp_path):
    titles = []
    monkeypatch.setattr(charts.plt, 'close', lambda fig: titles.extend(ax.get_title() for ax in fig.axes))
    facts = pd.DataFrame(dict(ID=['a', 'b', 'c'], true_ml=[1.0, np.nan, 3.0], pred_ml=[2.0, np.nan, 3.0],
                              rule_ml=[1.0, np.nan, 3.0], true_adc=np.nan, pred_adc=np.nan))
    charts.draw_stroke_scatter(tmp_path / 'scatter.png', facts)
    assert len(titles) == 2 and 'n = 2, median |difference| 0.5 ml' in titles[0]


def test_the_intervals_of_the_lesion_volume_are_drawn_with_those_that_miss(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(charts.plt, 'close', lambda fig: drawn.extend(
        text.get_text() for text in fig.axes[-1].get_legend().get_texts()))
    facts = pd.DataFrame(dict(true_ml=[1.0, 3.0], pred_ml=[2.0, 3.0], rule_ml=[1.0, 3.0], true_adc=500.0,
                              pred_adc=600.0))
    head = pd.DataFrame(dict(lesion_ml=[1, 3, 9, np.nan], lesion_head_ml=[2, 3, 4, 5], lesion_head_ml_low=[0, 1, 3, 4],
                             lesion_head_ml_high=[4, 5, 5, 6]))
    charts.draw_stroke_scatter(tmp_path / 'scatter.png', facts, head)
    assert drawn == ['truth inside (n = 2)', 'truth outside (n = 1)']


def test_the_intervals_of_the_composite_lie_within_the_axes(monkeypatch, tmp_path):
    limits = []
    monkeypatch.setattr(charts.plt, 'close', lambda fig: limits.extend(fig.axes[0].get_ylim()))
    table = pd.DataFrame(dict(suvr_true=[1.0, 1.5], suvr_pred=[1.1, 1.4], suvr_pred_low=[0.7, 1.0],
                              suvr_pred_high=[1.5, 1.8]))
    charts.draw_amyloid_scatter(tmp_path / 'scatter.png', table, 1.11, None)
    assert limits == pytest.approx([0.65, 1.85])


def test_a_damaged_subject_is_left_out_and_said(monkeypatch, capsys):
    folder = make_stroke()
    for path in folder.glob('*_*.csv'):  # no curves, no summary: less to draw
        path.unlink()
    (folder / 'pred' / 's00' / 'adc.nii.gz').write_bytes(b'no image')
    dwi = nib.load(folder / 'pred' / 's01' / 'dwi.nii.gz')
    nib.save(nib.Nifti1Image(dwi.get_fdata(dtype=np.float32)[1:], dwi.affine), folder / 'pred' / 's01' / 'dwi.nii.gz')
    with pytest.raises(utils.RunError, match='2 of 6 subjects'):
        run_plot(monkeypatch, settings())
    errors, text = capsys.readouterr().err, Page(folder / 'report.html').text
    for id, why in (('s00', 'not NIfTI'), ('s01', 'not on the grid')):
        assert re.search(f'{id}: .*{why}', errors) and re.search(f'{id}: .*{why}', text)
    assert (folder / 'fig' / 'montage.png').exists()


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be shown is one sentence

def fails(*words):
    """plot.py as a script: exit code 1 and one sentence, which is returned."""
    script = Path(plot.__file__)
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_no_such_experiment():
    write_curves(Path('result/exp_7'))
    Path('result/exp_7/config.json').write_text('{}')
    assert re.search('no experiment result/exp_9 .*exp_7', fails('--exp', 'exp_9'))


@pytest.mark.parametrize('name, content, words', [
    (None, '', 'holds no training curve'),
    ('test.csv', 'ID,dwi_psnr\ns01,20\ns02,"3\n', 'test.csv is damaged'),
    ('test.csv', 'ID,dwi_psnr\ns01,many\n', "test.csv is damaged ('many' in line 2, column 'dwi_psnr')"),
    ('test_summary.csv', 'metric,n\npsnr,3\n', "no column 'mean'"),
    ('loss_curve_aae.csv', 'step,loss\n0,1\n1,2,3,4\n', 'loss_curve_aae.csv is damaged'),
    ('test.csv', b'\xff\xfe\x00\x01', 'test.csv is damaged'),
    ('config.json', '{"task": ', 'config.json is damaged'),
])
def test_damaged_files(name, content, words):
    folder = Path('result/exp_1')
    folder.mkdir(parents=True)
    if name:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(experiment.ExperimentError) as caught:
        experiment.Experiment('exp_1')
    assert words in str(caught.value) and caught.value.one_sentence


def test_positive_is_what_inference_had_else_the_setting():
    folder = Path('result/exp_1')
    write_curves(folder)
    assert experiment.Experiment('exp_1').positive == 1.11 and experiment.Experiment('exp_1', 1.3).positive == 1.3
    (folder / 'test_status.csv').write_text('score,auc\nsynthetic,0.7\n')  # of before it was a setting
    assert experiment.Experiment('exp_1', 1.3).positive == 1.11
    (folder / 'test_status.csv').write_text('score,auc,suvr_positive\nsynthetic,0.7,1.2\n')
    assert experiment.Experiment('exp_1', 1.3).positive == 1.2


def test_ids_that_pandas_takes_for_missing_and_ids_of_two_folders():
    folder = Path('result/exp_1')
    for id in ('NA', 'sub-01/ses-2'):
        (folder / 'pred' / id).mkdir(parents=True)
        (folder / 'pred' / id / 'prediction.json').write_text('{}')
    (folder / 'test.csv').write_text('ID,dwi_psnr\nNA,20\nsub-01/ses-2,21\n,\n')
    run = experiment.Experiment('exp_1')
    assert run.predicted == ['NA', 'sub-01/ses-2'] == list(run.test['ID'])


def test_a_curve_being_written_is_read_up_to_its_last_whole_line():
    write_curves(Path('result/exp_1'), stages=('aae',))
    path = Path('result/exp_1/loss_curve_aae.csv')
    whole = len(experiment.read_table(path, ['step'], ''))
    with open(path, 'a') as file:
        file.write('40,4,0.0')
    assert len(experiment.read_table(path, ['step'], '')) in (whole, whole + 1)


def test_settings_of_another_task(monkeypatch):
    folder = make_stroke()
    prep = dataset.Spec.from_settings(settings()).travel()
    utils.save_checkpoint(folder / 'CHECKPOINT_AAE.pth.tar', dict(kind='aae', prep=prep))
    with pytest.raises(utils.RunError, match='trained for the task ctp2dwi, but the settings are for mri2pet'):
        run_plot(monkeypatch, amyloid_settings('--exp', 'exp_1'))


# ----------------------------------------------------------------------------------------------------------------------
# Which way round

SHAPE = (11, 13, 7)


def marked_case(codes, angles=(0, 0, 0)):
    """A brain that fills the grid, with a marker at the right, front and top of the patient."""
    matrix = affine(codes, angles=angles)
    place = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing='ij'), -1) @ matrix[:3, :3].T
    place -= place.mean((0, 1, 2))
    marker = (place > 0.3 * place.max((0, 1, 2))).all(-1)
    assert marker.any()
    image, mask = np.where(marker, 1.0, 0.0), np.ones(SHAPE, bool)
    sources = [montage.Image('source', image + np.linspace(0, 0.1, SHAPE[2]))]
    return montage.Case('s', '', matrix, mask, sources, dict(adc=image), dict(adc=image), {}, marker, marker,
                        probability=image)


@pytest.mark.parametrize('codes', ['RAS', 'LAS', 'LPS', 'RPI', 'PSR', 'SAL'])
@pytest.mark.parametrize('plane', ['axial', 'coronal', 'sagittal'])
def test_patient_right_is_on_image_left(codes, plane):
    for angles in ((0, 0, 0), (9, -6, 11)):
        case = marked_case(codes, angles)
        view = montage.View(case, plane)
        rows, columns = np.nonzero(view(case.pred['adc']) > 0.5)
        height, width = view.mask.shape
        assert len(rows) and columns.mean() < width / 2 - 0.5 and rows.mean() < height / 2 - 0.5


def test_the_drawn_panels_are_not_turned(monkeypatch, tmp_path):
    kept, made = [], montage.Figure
    monkeypatch.setattr(montage, 'Figure', lambda **how: kept.append(made(**how)) or kept[-1])
    case = marked_case('LAS')
    windows = montage.Windows({'adc': (0, 1)}, {'adc': 1}, {'adc': 1})
    montage.draw_case(tmp_path / 'a.png', case, ['axial', 'coronal', 'sagittal'], windows, {'adc': ''}, ('a', 'b'))
    montage.draw_overview(tmp_path / 'b.png', [case], ['axial', 'coronal'], windows, {'adc': ''}, '', ('a', 'b'))
    panels = 0
    for figure in kept:
        for ax in figure.axes:
            image = ax.images[0].get_array() if ax.images and ax.texts else None
            if image is None or np.ptp(image) < 0.5:
                continue
            left, right, bottom, top = ax.images[0].get_extent()
            row, column = (np.argwhere(image > 0.5).mean(0) + 0.5) / image.shape
            place = ax.transData.transform((left + column * (right - left), top + row * (bottom - top)))
            x, y = ax.transAxes.inverted().transform(place)
            assert x < 0.45 and y > 0.55          # left half, upper half of the panel
            assert [text.get_text() for text in ax.texts] in (['R', 'L'], ['A', 'P'])
            panels += 1
    assert panels == 9 + 8


def test_the_slice_with_most_of_the_lesion():
    mask, lesion = np.ones(SHAPE, bool), np.zeros(SHAPE, bool)
    lesion[2:5, 3:6, 5] = lesion[2, 3, 1] = True
    assert montage.best_index(mask, lesion, 'axial', np.eye(4)) == 5
    assert montage.best_index(mask, lesion, 'axial', np.diag([1, 1, -1, 1])) == SHAPE[2] - 1 - 5
    assert montage.best_index(mask, None, 'axial', np.eye(4)) == SHAPE[2] // 2
    assert montage.best_index(mask, np.zeros(SHAPE, bool), 'coronal', np.eye(4)) == SHAPE[1] // 2


# ----------------------------------------------------------------------------------------------------------------------
# Rules

def test_choice_of_stroke_subjects():
    facts = pd.DataFrame(dict(ID=list('abcdef'), true_ml=[3.0, 0, 50, 0, 0.5, 8]))
    chosen, rule = plot.choose('ctp2dwi', facts, None, list('abcdef'))
    assert {id: title.split()[0] for id, title in chosen.items()} == dict(c='largest', a='median', e='smallest', b='no')
    assert 'median' in rule
    one = plot.choose('ctp2dwi', facts[2:3], None, ['c'])[0]
    assert list(one) == ['c']


def test_choice_of_amyloid_subjects():
    values = dict(suvr_true=[1.0, 1.05, 0.9, 1.3, 1.5], suvr_pred=[1.2, 1.0, 0.8, 1.31, 1.1])
    test = pd.DataFrame(dict(ID=list('abcde'), **values))
    chosen, _ = plot.choose('mri2pet', pd.DataFrame(), test, list('abcde'))
    assert list(chosen) == ['b', 'a', 'd', 'e']
    assert chosen['a'].startswith('negative, largest') and chosen['d'].startswith('positive, smallest')


def test_coverage_series():
    test = pd.DataFrame(dict(dwi_coverage_50=[0.4, 0.6], dwi_coverage_90=[0.9, 0.8], other_coverage_50=[1, 1],
                             dwi_lesion_coverage_50=[0.3, np.nan]))
    assert plot.coverage(test, ('dwi', 'adc')) == {
        'dwi': {'in the brain': [(0.5, 0.5, 0.4, 0.6), (0.9, pytest.approx(0.85), 0.8, 0.9)],
                'in the lesion': [(0.5, 0.3, 0.3, 0.3)]}}


def test_the_ceiling_is_of_the_same_subjects_as_the_dice_beside_it():
    test = pd.DataFrame(dict(lesion_dice_2ml=[0.5, np.nan, 0.7], lesion_dice_ceiling=[0.8, 0.1, 0.9]))
    assert plot.ceilings(test) == {'lesion_dice_2ml': pytest.approx(0.85)}
    assert plot.ceilings(None) == plot.ceilings(pd.DataFrame(dict(suvr_psnr=[1.0]))) == {}


def test_windows_are_the_same_for_true_and_synthetic_and_hold_the_lesion():
    case = marked_case('RAS')
    case.truth['adc'] = case.truth['adc'] * 2000.0 + 800
    spec = dataset.Spec(target_names=('adc',), scaling={'adc': ('range', 0, 3000)})
    windows = plot.make_windows([case], spec)
    assert windows.value['adc'] == (0, 2800) and windows.error['adc'] > 0


def test_no_curve_is_left_out_of_the_tradeoff(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(charts.plt, 'close', kept.append)
    curves = {f'recipe {i}': [((30 + i / 20, 29, 32), (0.07 + i / 500, 0.05, 0.1))] for i in range(9)}
    charts.draw_tradeoff(tmp_path / 'a.png', curves)
    figure, = kept
    whole, close = figure.axes
    assert [text.get_text() for text in whole.get_legend().get_texts()] == list(curves)
    assert len(close.lines) == len(curves)
    charts.plt.figure(figure.number).clear()
