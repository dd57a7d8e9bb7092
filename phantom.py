"""
Make a data set of digital brain phantoms, written as NIfTI in the layout that config.py expects.

python phantom.py --task ctp2dwi --out data/phantom_ctp2dwi --subjects 96 --seed 1     CT perfusion, DWI, ADC, lesions
python phantom.py --task mri2pet --out data/phantom_mri2pet --subjects 96 --seed 1     T1 MRI and amyloid PET
python phantom.py --describe data/phantom_ctp2dwi                                      measures how hard a data set is

Beside the images stand the truth without noise (clean_*), phantom.csv with every subject's hidden facts, and data_info/
with the lists. Subject i depends on the seed and on i alone. Run again to go on after an interruption.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import amyloid
import anatomy
import describe
import stroke

SPACING = {'ctp2dwi': (3.0, 3.0, 5.0), 'mri2pet': (4.0, 4.0, 4.0)}
FIELD_OF_VIEW = {'ctp2dwi': (192, 216, 130), 'mri2pet': (168, 200, 168)}  # mm
ORIENTATIONS = ((1, 1, 1), (-1, 1, 1), (-1, -1, 1))                       # of the stored axes: RAS, LAS, LPS
KINDS = ('default', 'shifted')
FOLDERS = {'mri2pet': {'mri': 'whole_MRI', 'pet': 'whole_Abeta', 'mask': 'mask', 'roi': 'roi', 'clean': 'clean_Abeta'}}


class PhantomError(ValueError):
    """A mistake of the user, told in one sentence."""
    one_sentence = True


# ----------------------------------------------------------------------------------------------------------------------
# one subject

def stream(seed, index, part, kind):
    """The random numbers of one part of one subject."""
    return np.random.default_rng([seed, index, part, KINDS.index(kind)])


def stroke_subject(seed, index, spacing, kind='default'):
    """Images, facts and brain of patient `index`; images (X, Y, Z[, T]) on axes towards R, A, S."""
    shifted = kind == 'shifted'
    rng = stream(seed, index, 0, kind)
    facts = stroke.draw_facts(rng, shifted)
    age = (facts['age'] - 70) / 10
    shape = [int(round(f / s)) for f, s in zip(FIELD_OF_VIEW['ctp2dwi'], spacing, strict=True)]
    shape[2] += int(rng.integers(-1, 2))
    brain = anatomy.make_brain(stream(seed, index, 1, kind), shape, spacing, atrophy=0.6 * age + rng.normal(0, 0.6),
                               ventricles=0.6 * age + rng.normal(0.3, 0.8), deform=1.5 if shifted else 1.0, scale=0.95,
                               centre=(0, -18, 16))
    severity, infarct = stroke.occlude(brain, facts, stream(seed, index, 2, kind))
    brain = stroke.swell(brain, infarct)
    rng = stream(seed, index, 3, kind)
    louder = 1.4 if shifted else 1.0
    ctp, cbf, tmax = stroke.ct_perfusion(brain, severity, infarct, facts, rng, noise=stroke.CTP_NOISE * louder)
    dwi, adc, clean_dwi, clean_adc = stroke.diffusion(brain, infarct, facts, rng, noise=stroke.DWI_NOISE * louder)
    lesion = stroke.lesion_mask(brain, infarct)
    facts.update(lesion=bool(lesion.any()), lesion_ml=float(lesion.sum()) * brain.voxel_ml,
                 hypoperfused_ml=float((severity > 0.4)[brain.mask].sum()) * brain.voxel_ml)
    images = {'ctp': ctp, 'dwi': dwi, 'adc': adc, 'mask': brain.mask, 'lesion': lesion, 'clean_dwi': clean_dwi,
              'clean_adc': clean_adc, 'clean_cbf': cbf, 'clean_tmax': tmax}
    return images, facts, brain


def amyloid_brain(seed, index, spacing, kind='default', fine=None):
    """Facts and anatomy of person `index`: all that tissue volumes need."""
    rng = stream(seed, index, 0, kind)
    facts = amyloid.draw_facts(rng, kind == 'shifted')
    size = zip(FIELD_OF_VIEW['mri2pet'], spacing, strict=True)
    shape = [int(round(f / s)) + int(rng.integers(0, 4)) for f, s in size]
    look = dict(deform=1.5, scale=0.90) if kind == 'shifted' else dict(deform=1.0, scale=0.93)
    brain = anatomy.make_brain(stream(seed, index, 1, kind), shape, spacing, atrophy=facts['atrophy'],
                               ventricles=facts['ventricles'], tilt=2.0, fine=fine, **look)
    return facts, brain


def tissue_volumes(index, seed, spacing, kind):
    """Label and tissue volumes of person `index`, without any image."""
    facts, brain = amyloid_brain(seed, index, spacing, kind, fine=1)
    return {'label': facts['label'], 'suvr_drawn': facts['suvr_drawn'], 'ventricle_ml': brain.ventricle_ml,
            'gm_ml': brain.gm_ml, 'brain_ml': float(brain.mask.sum()) * brain.voxel_ml}


def amyloid_subject(seed, index, spacing, kind='default'):
    """Images, facts and brain of person `index`; images (X, Y, Z) on axes towards R, A, S."""
    facts, brain = amyloid_brain(seed, index, spacing, kind)
    rng = stream(seed, index, 3, kind)
    louder = 1.4 if kind == 'shifted' else 1.0
    mri = amyloid.mri(brain, rng, noise=0.025 * louder)
    noisy, clean, roi, whole = amyloid.pet(brain, facts, rng, noise=amyloid.PET_NOISE * louder)
    facts.update(suvr_clean=float(clean[roi].mean() / clean[whole].mean()),
                 suvr=float(noisy[roi].mean() / noisy[whole].mean()),
                 suvr_roi=float(noisy[roi].mean()), roi_ml=float(roi.sum()) * brain.voxel_ml)
    return {'mri': mri, 'pet': noisy, 'mask': brain.mask, 'roi': roi, 'clean': clean}, facts, brain


# ----------------------------------------------------------------------------------------------------------------------
# files

def paths_of(task, out, id):
    """Name of an image -> where it is written."""
    if task == 'ctp2dwi':
        names = ('ctp', 'dwi', 'adc', 'mask', 'lesion', 'clean_dwi', 'clean_adc', 'clean_cbf', 'clean_tmax')
        return {n: out / id / f'{n}.nii.gz' for n in names}
    return {n: out / folder / f'{id}.nii' for n, folder in FOLDERS[task].items()}


def write_image(path, array, affine, slope=1.0, interval=0.0):
    """Write one NIfTI file beside its name and move it; `slope` makes int16 of floats, `interval` is a frame's in s."""
    if slope != 1:
        array = np.round(array / slope).astype(np.int16)
    elif array.dtype == bool:
        array = array.astype(np.uint8)
    header = nib.Nifti1Image(array, affine).header
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header.set_xyzt_units('mm', 'sec')
    if array.ndim == 4:
        header['pixdim'][4] = interval
    header['magic'], header['vox_offset'], header['scl_slope'], header['scl_inter'] = b'n+1', 352, slope, 0
    data = header.binaryblock + bytes(4) + array.tobytes('F')
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + '.tmp')
    beside.write_bytes(gzip.compress(data, 1, mtime=0) if path.suffix == '.gz' else data)
    os.replace(beside, path)


def write_subject(index, task, out, seed, spacing, kind):
    """Make and write subject `index` unless it is there; its facts, written last, say that it is complete."""
    id = f'sub-{index + 1:04d}'
    record, paths = out / 'facts' / f'{id}.json', paths_of(task, out, id)
    if record.exists() and all(p.exists() for p in paths.values()):
        return json.loads(record.read_text())
    make = stroke_subject if task == 'ctp2dwi' else amyloid_subject
    images, facts, brain = make(seed, index, spacing, kind)
    flips = ORIENTATIONS[stream(seed, index, 4, kind).integers(len(ORIENTATIONS))]
    shape = np.array(brain.mask.shape)
    turn = np.diag([*flips, 1.0])
    turn[:3, 3] = [n - 1 if f < 0 else 0 for n, f in zip(shape, flips, strict=True)]
    for name, image in images.items():
        image = np.flip(image, [a for a in range(3) if flips[a] < 0])
        write_image(paths[name], image, brain.affine @ turn, 0.05 if name == 'ctp' else 1.0,
                    facts.get('frame_interval', 0.0))
    facts = {'ID': id, 'label': int(facts.get('label', facts.get('lesion', 0))), **facts,
             'ventricle_ml': brain.ventricle_ml, 'gm_ml': brain.gm_ml,
             'brain_ml': float(brain.mask.sum()) * brain.voxel_ml}
    facts = {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
    write_text(record, json.dumps(facts))
    return facts


def write_text(path, text):
    """Write a small file beside its name and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + '.tmp').write_text(text)
    os.replace(path.with_name(path.name + '.tmp'), path)


def start_worker():
    """One thread a process: the processes are the parallelism, and on some CPUs a product rounds by its threads."""
    threadpool_limits(1)
    anatomy.template()


def make_data_set(task, out, subjects, seed, spacing=None, kind='default', split=(0.72, 0.12, 0.16), workers=None):
    """Write a whole data set; returns the table of facts, one row a subject. Raises PhantomError."""
    out = Path(out)
    spacing = tuple(spacing or SPACING[task])
    if subjects < 3:
        raise PhantomError(f'--subjects {subjects}: three lists need 3 subjects or more')
    if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
        raise PhantomError(f'--split {",".join(map(str, split))}: give three positive fractions that add up to 1, '
                           'such as 0.72,0.12,0.16')
    if len(spacing) != 3 or min(spacing) < 0.8 or max(spacing) > 8:
        raise PhantomError(f'--spacing {",".join(map(str, spacing))}: give three numbers between 0.8 and 8 mm')
    if seed < 0:
        raise PhantomError(f'--seed {seed}: a seed is 0 or more')
    given = dict(task=task, subjects=subjects, seed=seed, spacing=list(spacing), kind=kind, split=list(split))
    held = [max(1, round(f * subjects)) for f in split[1:]]
    if sum(held) >= subjects:
        raise PhantomError(f'--split {",".join(map(str, split))} leaves none of {subjects} subjects for training')
    try:
        claim(out, given)
        work = partial(write_subject, task=task, out=out, seed=seed, spacing=spacing, kind=kind)
        facts = list(tqdm(run(work, range(subjects), workers), total=subjects, desc=f'phantoms {task}', unit='subject',
                          disable=None))
        table = pd.DataFrame(facts)
        write_text(out / 'phantom.csv', table.to_csv(index=False))
        ids = list(table.ID)
        cuts = {'train': ids[:subjects - sum(held)], 'validation': ids[subjects - sum(held):subjects - held[1]],
                'test': ids[subjects - held[1]:]}
        for name, part in cuts.items():
            write_text(out / 'data_info' / f'{name}.txt', ''.join(f'{id}\n' for id in part))
        info = pd.DataFrame({'ID': ids, 'label': table.label, 'patient': [id.replace('sub', 'patient') for id in ids]})
        write_text(out / 'data_info' / 'data_info.csv', info.to_csv(index=False))
    except OSError as error:
        raise PhantomError(f'cannot write to {out}: {error.strerror or error}') from error
    return table


def claim(out, given):
    """Mark the folder as the data set of these arguments, unless it holds something else."""
    mark = out / 'phantom.json'
    if out.exists() and not out.is_dir():
        raise PhantomError(f'{out} is a file; give --out a folder')
    if mark.exists():
        found = read_mark(out)
        if found != given:
            other = ', '.join(f'{k} {found.get(k)} instead of {v}' for k, v in given.items() if found.get(k) != v)
            raise PhantomError(f'{out} holds a phantom data set made with other arguments ({other}); '
                               'choose another --out or remove it')
    elif out.exists() and any(p.name != 'phantom.json.tmp' for p in out.iterdir()):
        raise PhantomError(f'{out} is not empty and holds no phantom data set; choose another --out')
    else:
        write_text(mark, json.dumps(given))


def read_mark(folder):
    """The arguments a data set was made with."""
    mark = folder / 'phantom.json'
    if not mark.exists():
        raise PhantomError(f'{folder} holds no phantom data set: phantom.json is missing')
    try:
        return dict(json.loads(mark.read_text()))
    except (ValueError, TypeError) as error:
        raise PhantomError(f'{mark} is damaged; remove {folder} and make the data set anew') from error


def run(work, items, workers=None):
    """Results of work(item) in order, from `workers` processes (default: all cores)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    workers = min(workers or cores, len(items))
    if workers <= 1:
        for item in items:
            with threadpool_limits(1):
                result = work(item)
            yield result
        return
    anatomy.template()  # before the fork, so that the processes share it
    method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() and sys.platform != 'darwin' else 'spawn'
    with multiprocessing.get_context(method).Pool(workers, start_worker) as pool:
        yield from pool.imap(work, items)


def numbers(text):
    """'3,3,5' -> (3.0, 3.0, 5.0)"""
    return tuple(float(v) for v in text.split(','))


def main(argv=None):
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=list(SPACING), help='which pair of images')
    parser.add_argument('--out', type=Path, help='folder of the data set')
    parser.add_argument('--subjects', type=int, default=96, help='how many (default: 96)')
    parser.add_argument('--seed', type=int, default=1, help='another seed, other people (default: 1)')
    parser.add_argument('--kind', choices=KINDS, default='default',
                        help='shifted: more noise, smaller lesions, stronger deformation')
    parser.add_argument('--spacing', type=numbers, help='voxel size in mm, such as 3,3,5 (default) or 4,4,4')
    parser.add_argument('--split', type=numbers, default=(0.72, 0.12, 0.16),
                        help='train, validation, test (default: 0.72,0.12,0.16)')
    parser.add_argument('--workers', type=int, help='processes (default: all cores)')
    parser.add_argument('--describe', nargs='?', const=True, metavar='DIR',
                        help='measure a data set, after writing it if --task and --out are given')
    args = parser.parse_args(argv)
    try:
        if args.out is not None:
            if args.task is None:
                raise PhantomError('--out needs --task, ctp2dwi or mri2pet')
            make_data_set(args.task, args.out, args.subjects, args.seed, args.spacing, args.kind, args.split,
                          args.workers)
        elif args.describe in (None, True):
            raise PhantomError('give --task and --out to write a data set, or --describe DIR to measure one')
        if args.describe is not None:
            folder = args.out if args.describe is True else Path(args.describe)
            volumes, given = None, read_mark(folder)
            if not (folder / 'phantom.csv').exists():
                raise PhantomError(f'{folder} is not complete; run the command that made it again')
            if given['task'] == 'mri2pet':
                work = partial(tissue_volumes, seed=given['seed'], spacing=given['spacing'], kind=given['kind'])
                volumes = pd.DataFrame(tqdm(run(work, range(500), args.workers), total=500, desc='tissue volumes',
                                            unit='brain', disable=None))
            describe.describe(folder, volumes)
    except PhantomError as error:
        print(f'phantom.py: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
