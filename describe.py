"""
How hard a phantom data set is, measured from its files, beside the window in which the default settings must lie.

Prints one line a figure; describe() returns them, so that a test can hold them.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

THRESHOLDS = {'Tmax': np.arange(3, 14, 0.5), 'rCBF': np.arange(0.1, 0.8, 0.025)}  # s; share of the other side


def read(path):
    """Array (float32, turned to the nearest RAS) and the voxel's size in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    return image.get_fdata(dtype=np.float32), np.array(image.header.get_zooms()[:3])


def psnr(pred, truth, mask, high):
    """Peak signal-to-noise ratio in dB within the mask, both clipped to 0..high, the data range."""
    error = np.clip(pred[mask], 0, high) - np.clip(truth[mask], 0, high)
    return float(10 * np.log10(high ** 2 / np.mean(error.astype(float) ** 2)))


def dice(a, b):
    """Overlap of two masks; not a number where both are empty."""
    total = a.sum() + b.sum()
    return float(2 * (a & b).sum() / total) if total else np.nan


def lesion_rule(dwi, adc, mask, voxel_ml):
    """ADC < 620 and DWI > 1.25 times its in-mask median, in components of 0.1 ml or more."""
    parts, _ = ndimage.label((adc < 620) & (dwi > 1.25 * np.median(dwi[mask])) & mask, np.ones((3, 3, 3)))
    large = np.bincount(parts.ravel()) * voxel_ml >= 0.1 - 1e-6
    large[0] = False
    return large[parts]


def mirrored(volume, mask):
    """The volume flipped left to right about the mask's centre, to the nearest half voxel."""
    centre = np.nonzero(mask)[0].mean()
    shift = int(round(2 * centre)) - (mask.shape[0] - 1)
    return np.roll(volume[::-1], shift, 0)


def stroke_figures(folder, table):
    """One row a subject, read from its files, and the Dice of each perfusion threshold."""
    rows, dices = [], []
    for id in table.ID:
        at = folder / id
        (dwi, size), (adc, _), (mask, _), (lesion, _) = (read(at / f'{n}.nii.gz')
                                                         for n in ('dwi', 'adc', 'mask', 'lesion'))
        ctp, clean_dwi, clean_adc, cbf, tmax = (read(at / f'{n}.nii.gz')[0]
                                                for n in ('ctp', 'clean_dwi', 'clean_adc', 'clean_cbf', 'clean_tmax'))
        mask, lesion, ml = mask > 0, lesion > 0, float(np.prod(size)) / 1000
        white = mask & ~lesion & (cbf > 18) & (cbf < 29) & (clean_adc > 600) & (clean_adc < 760)
        median, found = np.median(dwi[mask]), lesion_rule(dwi, adc, mask, ml)
        row = {'white-matter SNR at b = 1000': clean_dwi[white].mean() / (dwi - clean_dwi)[white].std(),
               'CTP noise, HU a voxel': (ctp[..., 1] - ctp[..., 0])[mask].std() / np.sqrt(2),
               'CTP in-mask median, HU': np.median(ctp[mask]), 'ADC in-mask median': np.median(adc[mask]),
               'noise ceiling DWI, dB': psnr(dwi / median, clean_dwi / median, mask, 3),
               'noise ceiling ADC, dB': psnr(adc, clean_adc, mask, 3000),
               'lesion_ml': lesion.sum() * ml, 'rule_dice': dice(found, lesion) if lesion.any() else np.nan,
               'false_ml': found.sum() * ml if not lesion.any() else np.nan,
               'lesion DWI / median': np.median(dwi[lesion]) / median if lesion.any() else np.nan,
               'lesion ADC': np.median(adc[lesion]) if lesion.any() else np.nan}
        rows.append(row)
        if row['lesion_ml'] > 2:
            width = [3 / s for s in size]
            weight = ndimage.gaussian_filter(mask.astype(np.float32), width)
            flow = ndimage.gaussian_filter(cbf, width) / np.maximum(weight, 1e-3)
            other = mirrored(flow, mask)
            relative = np.where(mask & (other > 5), flow / np.maximum(other, 1e-3), 1)
            dices.append({'Tmax': [dice((tmax > t) & mask, lesion) for t in THRESHOLDS['Tmax']],
                          'rCBF': [dice((relative < t) & mask, lesion) for t in THRESHOLDS['rCBF']]})
    return pd.DataFrame(rows), {k: pd.Series(np.mean([d[k] for d in dices], 0), t) for k,
                                t in THRESHOLDS.items()} if dices else None


def amyloid_figures(folder, table):
    """One row a subject, read from its files."""
    rows = []
    for id in table.ID:
        pet, clean, mask, roi, mri = (read(folder / n / f'{id}.nii')[0]
                                      for n in ('whole_Abeta', 'clean_Abeta', 'mask', 'roi', 'whole_MRI'))
        mask, roi = mask > 0, roi > 0
        rows.append({'PET noise, share of the mean': (pet - clean)[mask].std() / clean[mask].mean(),
                     'SUVR in-mask median': np.median(pet[mask]),
                     'noise ceiling SUVR, dB': psnr(pet, clean, mask, 3), 'suvr': pet[roi].mean(),
                     **mri_volumes(mri, mask)})
    return pd.DataFrame(rows)


def mri_volumes(mri, mask):
    """Shares of the brain: fluid in its middle, and grey; by two thresholds on the MRI over its bright quantile."""
    scaled = mri / np.quantile(mri[mask], 0.9)
    centre = np.array([np.mean(i) for i in np.nonzero(mask)])
    extent = np.array([np.ptp(i) + 1 for i in np.nonzero(mask)])
    away = [np.abs(i - c) / e for i, c, e in zip(np.indices(mask.shape), centre, extent, strict=True)]
    middle = mask & (away[0] < 0.2) & (away[1] < 0.25) & (away[2] < 0.25)
    return {'mri_ventricle': (scaled[middle] < 0.42).sum() / mask.sum(),
            'mri_grey': ((scaled > 0.42) & (scaled < 0.8))[mask].sum() / mask.sum()}


def status_auc(volumes, labels):
    """Cross-validated AUC of a logistic regression of the amyloid status on volumes (N, F)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    model = make_pipeline(StandardScaler(), LogisticRegression())
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(roc_auc_score(labels, cross_val_predict(model, volumes, labels, cv=folds, method='predict_proba')[:,
                                                                                                                   1]))


def describe(folder, volumes=None):
    """
    Measure the data set in `folder`, print and return {figure: (value, (low, high) or None)}.

    volumes : a table with label, ventricle_ml, gm_ml and brain_ml of many subjects (for the amyloid task's AUC)
    """
    folder = Path(folder)
    given = json.loads((folder / 'phantom.json').read_text())
    table = pd.read_csv(folder / 'phantom.csv')
    if given['task'] == 'ctp2dwi':
        out = describe_stroke(*stroke_figures(folder, table))
    else:
        out = describe_amyloid(amyloid_figures(folder, table), table.label, volumes)
    if given['kind'] != 'default':
        out = {name: (value, None) for name, (value, _) in out.items()}  # the windows are those of the default kind
    width = max(len(n) for n in out)
    print(f'{folder}: {given["task"]}, {len(table)} subjects, seed {given["seed"]}, kind {given["kind"]}')
    for name, (value, window) in out.items():
        note = f'   [{window[0]:g}, {window[1]:g}]' if window else ''
        outside = '  OUTSIDE' if window and not window[0] <= value <= window[1] else ''
        print(f'  {name:<{width}}  {value:8.3f}{note}{outside}')
    return out


def describe_stroke(rows, dices):
    """{figure: (value, window)} of the stroke task."""
    windows = {'white-matter SNR at b = 1000': (20, 40), 'CTP noise, HU a voxel': (3, 4),
               'CTP in-mask median, HU': (0, 100),
               'ADC in-mask median': (300, 2000), 'noise ceiling DWI, dB': None, 'noise ceiling ADC, dB': None,
               'lesion DWI / median': None, 'lesion ADC': None}
    out = {name: (rows[name].mean(), window) for name, window in windows.items()}
    for kind, sign in (('Tmax', '>'), ('rCBF', '<')) if dices else ():
        name = f'Dice of the best threshold, {kind} {sign} {dices[kind].idxmax():.3g}, lesions above 2 ml'
        out[name] = dices[kind].max(), (0.4, 0.7)
    out['Dice of the lesion rule on the real images'] = rows.rule_dice.mean(), (0.75, 1)
    out['Dice of the lesion rule, lesions above 2 ml'] = rows.rule_dice[rows.lesion_ml > 2].mean(), None
    out['false ml of the rule without a lesion'] = rows.false_ml.mean(), (0, 0.3)
    out['share of subjects without a lesion'] = (rows.lesion_ml == 0).mean(), (0.05, 0.3)
    for q in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1):
        value = rows.lesion_ml[rows.lesion_ml > 0].quantile(q)
        out[f'lesion volume ml, quantile {q:g}'] = value, (5, 40) if q == 0.5 else None
    return out


def describe_amyloid(rows, label, volumes):
    """{figure: (value, window)} of the amyloid task."""
    windows = {'PET noise, share of the mean': (0.05, 0.10), 'SUVR in-mask median': (0.3, 3),
               'noise ceiling SUVR, dB': None}
    out = {name: (rows[name].mean(), window) for name, window in windows.items()}
    out['share positive'] = label.mean(), (0.35, 0.6)
    out['composite SUVR, negative'] = rows.suvr[label == 0].mean(), (0.9, 1.08)
    out['composite SUVR, positive'] = rows.suvr[label == 1].mean(), (1.2, 1.7)
    out['share whose composite above 1.11 agrees with the label'] = ((rows.suvr > 1.11) == label).mean(), (0.97, 1)
    if min(np.bincount(label, minlength=2)) >= 5:
        out[f'status from thresholds on these {len(rows)} MRIs, AUC'] = status_auc(rows[['mri_ventricle', 'mri_grey']],
                                                                                   label), None
    if volumes is not None:
        ventricle, grey = volumes.ventricle_ml / volumes.brain_ml, volumes.gm_ml / volumes.brain_ml
        name = f'status from ventricle and grey-matter volumes of {len(volumes)} brains, AUC'
        out[name] = status_auc(np.stack([ventricle, grey], 1), volumes.label), (0.65, 0.80)
        positive = volumes[volumes.label == 1]
        correlation = positive.suvr_drawn.corr(ventricle[positive.index])
        out['correlation of SUVR and ventricles, positives'] = correlation, None
    return out
