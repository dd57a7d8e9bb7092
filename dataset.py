"""
The data set: cached training samples of a list of subjects. Behind it: loader.py (batches, augmentation), subject.py
(one subject in and out), volume.py, grid.py (one volume), splits.py (which file is whose, in which split), check.py.

python dataset.py                            check every file of every split; a line per fault, exit 1 if there is one
python dataset.py --without_truth            the same of new subjects: sources, masks and composites alone
python dataset.py --make_splits 0.6,0.2,0.2  write train.txt, validation.txt, test.txt for the subjects that are found
python dataset.py --make_splits 5-fold       those of a cross-validation, in data_info_1 .. data_info_5
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from tqdm import tqdm

import check
import grid
from loader import BACKGROUND, Boxed, augment, cut, loader
from splits import find_ids, label_of, make_folds, make_splits, read_labels, read_lists, read_split, read_table
from subject import Spec, Subject, load_subject, scaling_range
from volume import DataError, failure, write_volume

__all__ = ['Spec', 'Subject', 'Cohort', 'DataError', 'BACKGROUND', 'load_subject', 'loader', 'augment', 'read_split',
           'read_labels', 'read_lists', 'make_splits', 'scaling_range', 'write_volume']

CACHE_VERSION = 2  # raise it when the preprocessing changes: older caches are then built anew


# ----------------------------------------------------------------------------------------------------------------------
# Training samples

class Cohort(torch.utils.data.Dataset):
    """
    The training samples of a list of subjects: slices with brain (2D) or subjects (3D), preprocessed once and cached.

    One .npy file a subject in spec.cache_dir, (n, C + K + 2, *S) float32: source, target, mask, lesion. Its name holds
    a hash of the files' sizes and times and of the settings, so that a change builds it anew. A sample is read from its
    place in the file, straight into the batch, rather than through np.memmap: mapped pages count as this process's
    memory, which would then grow with the cohort. With spec.context the slices beside it come with its source, as in
    Subject.stacked (slices with brain follow each other without a gap, else DataError).
    """

    def __init__(self, spec, ids, labels=None):
        root, cache = (os.path.realpath(os.path.expanduser(path)) for path in (spec.root, spec.cache_dir))
        if Path(cache).is_relative_to(root):
            raise DataError(f'cache_dir {spec.cache_dir} lies inside data_root {spec.root}; set cache_dir to a folder '
                            f'outside it.')
        if not ids:
            raise DataError('no subject to train on: the list is empty; write one ID a line.')
        self.spec, self.ids = spec, list(ids)
        self.labels = [(labels or {}).get(id, spec.num_classes) for id in self.ids]
        self.source_channels, self.target_channels = spec.source_channels, len(spec.target_names)
        _make_folder(cache)
        self.files = _build_all(spec, self.ids, cache)  # (path, offset, shape) of each subject
        self.ends = np.cumsum([shape[0] for _, _, shape in self.files])
        self.size = self.files[0][2][2:]

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, i):
        """Number of the subject and of its sample."""
        subject = int(np.searchsorted(self.ends, i, side='right'))
        return subject, int(i - (self.ends[subject - 1] if subject else 0))

    def id_of(self, i):
        return self.ids[self.locate(i)[0]]

    def names(self, index):
        """IDs of the subjects that samples (a tensor of their numbers) are of, for messages."""
        return [self.id_of(i) for i in index.tolist()]

    def subject_items(self, number):
        """All samples of one subject as a batch."""
        return self.__getitems__(range(int(self.ends[number - 1]) if number else 0, int(self.ends[number])))

    @cached_property
    def extents(self):
        """First voxel and end of each sample's mask along each axis, (len, dims, 2)."""
        found, mask = [], torch.empty(self.size)
        for path, offset, shape in self.files:
            with open(path, 'rb', buffering=0) as file:
                for sample in range(shape[0]):
                    file.seek(offset + ((sample + 1) * shape[1] - 2) * 4 * mask.numel())
                    _read_into(file, mask, path)
                    found.append(grid.extent(mask.numpy() > 0))
        return np.array(found)

    def boxed(self, numbers, shift=0, rng=None):
        """Boxed: the samples in the smallest box that holds each one's brain, at a random place in it (rng).

        The box has `shift` voxels more than the largest brain along each axis: so far, at least, all brains move.
        """
        extents = self.extents[numbers]
        size = grid.box_size(extents, self.size, shift)
        room = np.array(size) - (extents[..., 1] - extents[..., 0])
        moved = room // 2 if rng is None else rng.integers(0, room + 1)
        return Boxed([int(n) for n in numbers], (extents[..., 0] - moved).tolist(), size)

    def in_order(self, at_most):
        """All samples in lists of at most so many, to be read one by one; with spec.trim boxed, by size."""
        numbers = grid.by_size(self.extents) if self.spec.trim else np.arange(len(self))
        lists = [numbers[i:i + at_most] for i in range(0, len(self), at_most)]
        return [self.boxed(part) for part in lists] if self.spec.trim else lists

    def some(self, at_most=256):
        """A batch of samples spread evenly over the cohort, for statistics: at most 512 MB of large volumes."""
        each = 4 * (self.source_channels + self.target_channels + 2) * int(np.prod(self.size))
        count = min(at_most, len(self), max(2, 2 ** 29 // each))
        return self.__getitems__(np.linspace(0, len(self) - 1, count).astype(int))

    def mean_image(self):
        """The subjects' mean target: {'image': (N, K, *S) float32, 'centre': the slice at the brain's middle}.

        Slices of different subjects are matched by their distance from the middle one. A baseline that every model
        must beat.
        """
        lengths = np.diff([0, *self.ends])
        centre = int(max((n - 1) // 2 for n in lengths))
        total = torch.zeros(centre + int(max(n - (n - 1) // 2 for n in lengths)), self.target_channels, *self.size)
        count = torch.zeros(len(total))
        for j, n in enumerate(lengths):
            first = centre - (n - 1) // 2
            total[first:first + n] += self.subject_items(j)['target']
            count[first:first + n] += 1
        return dict(image=total / count.clamp(min=1).view(-1, *[1] * (total.ndim - 1)), centre=centre)

    def __getitem__(self, i):
        return {name: value[0] for name, value in self.__getitems__([i]).items()}

    def __getitems__(self, indices):
        """The batch of some samples: source (B, C, *S), target (B, K, *S), mask, lesion (B, 1, *S), label, index.

        indices: a list of numbers, or Boxed; S is then the size of the box.
        """
        boxed = indices if isinstance(indices, Boxed) else None
        numbers = [int(i) % len(self) for i in (boxed.numbers if boxed else indices)]
        channels = {'source': self.source_channels, 'target': self.target_channels, 'mask': 1, 'lesion': 1}
        size = boxed.size if boxed else self.size
        batch = {name: torch.empty((len(numbers), count, *size)) for name, count in channels.items()}
        whole = {name: torch.empty((count, *self.size)) for name, count in channels.items()} if boxed else None
        for row, number in enumerate(numbers):
            sample = {name: images[row] for name, images in batch.items()}
            self._read(number, whole or sample)
            if boxed:
                for name, box in sample.items():
                    cut(whole[name], boxed.starts[row], box, BACKGROUND[name])
        batch['label'] = torch.tensor([self.labels[self.locate(i)[0]] for i in numbers])
        batch['index'] = torch.tensor(numbers)
        return batch

    def _read(self, number, sample):
        """Read a sample into contiguous tensors: source (C, *S), target (K, *S), mask, lesion (1, *S)."""
        subject, place = self.locate(number)
        path, offset, shape = self.files[subject]
        k = self.spec.context
        sources = sample['source'].view(2 * k + 1, -1, *self.size)
        with open(path, 'rb', buffering=0) as file:
            for j in [*(j for j in range(2 * k + 1) if j != k), k]:  # the sample itself last: the rest follows it
                if not 0 <= place + j - k < shape[0]:
                    sources[j] = BACKGROUND['source']
                    continue
                file.seek(offset + (place + j - k) * 4 * int(np.prod(shape[1:])))
                _read_into(file, sources[j], path)
            for name in ('target', 'mask', 'lesion'):
                _read_into(file, sample[name], path)


def _read_into(file, tensor, path):
    """Fill a contiguous tensor from where the file stands."""
    view = memoryview(tensor.numpy()).cast('B')
    if file.readinto(view) != len(view):
        raise DataError(f'{path} is shorter than it was; delete it, it will be built anew.')


def _make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise DataError(f'cache_dir {path} cannot be made ({error.strerror}); set another cache_dir.') from error


def _cache_path(spec, id, cache):
    """Where a subject's samples are cached; another name for every change of a file or a setting."""
    settings = spec.travel() | dict(context=0)  # neighbours are put together on reading
    del settings['trim']
    key = [CACHE_VERSION, settings]
    for name in spec.names():
        path = os.path.abspath(spec.path(name, id))
        key.append([name, path, os.path.getsize(path), os.stat(path).st_mtime_ns])
    return os.path.join(cache, f'{quote(id, safe="")}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npy')


def _open_cache(path):
    """(path, offset, shape) of a complete cache file, else None."""
    try:
        with open(path, 'rb') as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
        complete = os.path.getsize(path) == offset + int(np.prod(shape)) * 4 and dtype == np.float32
        return (path, offset, shape) if complete else None
    except (OSError, ValueError):
        return None


def _build(spec, id, cache):
    """The cache file of one subject, built if it is not there: written beside and moved."""
    try:
        path = _cache_path(spec, id, cache)
    except DataError as error:
        raise DataError(f'{id}: {error}') from error
    found = _open_cache(path)
    if found:
        return found
    subject = load_subject(spec, id)
    lesion = subject.lesion if subject.lesion is not None else np.zeros_like(subject.mask)
    brain = subject.mask.any(axis=tuple(range(1, subject.mask.ndim)))
    if gap := check.gap(spec.path('mask', id) if spec.mask else f"{spec.path('source', id)} > 0", brain, spec.context):
        raise DataError(f'{id}: {gap}')
    parts = (subject.source, subject.target, subject.mask, lesion)
    samples = np.concatenate(parts, axis=1)[brain]
    beside = f'{path}.{uuid.uuid4().hex}.tmp'
    try:
        with open(beside, 'wb') as file:
            np.save(file, samples)
        os.replace(beside, path)
    except OSError as error:
        if os.path.exists(beside):
            os.remove(beside)
        why = f'{path} cannot be written ({failure(error)}); free space or set another cache_dir.'
        raise DataError(f'{id}: {why}') from error
    return _open_cache(path)


def _build_all(spec, ids, cache):
    """Cache files of all subjects, several at a time: unpacking and arithmetic leave the interpreter's lock."""
    for name in os.listdir(cache):  # what a killed run left half-written
        path = os.path.join(cache, name)
        with contextlib.suppress(OSError):  # another process may have cleared it
            if name.endswith('.tmp') and time.time() - os.path.getmtime(path) > 3600:
                os.remove(path)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    order = np.roll(np.arange(len(ids)), -len(ids) * rank // world)  # each process of torchrun starts elsewhere
    files = [None] * len(ids)
    with ThreadPoolExecutor(thread_count()) as pool:
        try:
            jobs = pool.map(lambda i: (i, _build(spec, ids[i], cache)), order)
            for i, found in tqdm(jobs, total=len(ids), desc='reading subjects', unit='', leave=False, delay=0.5):
                files[i] = found
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return files


def load_listed(spec, id):
    """A subject, with its truth if all of it is there. Without truth a composite that cannot be used is left out."""
    known = spec.has_truth(id)
    try:
        return load_subject(spec, id, with_truth=known)
    except DataError as error:
        if known or 'lesion' not in spec.names(with_truth=False):
            raise
        subject = load_subject(replace(spec, lesion=None), id, with_truth=False)
        subject.notes.append(f'no composite SUVR: {str(error).removeprefix(f"{id}: ")}')
        return subject


def thread_count():
    """Subjects read at a time: one a processor, but not so many that big files fill the memory."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)


# ----------------------------------------------------------------------------------------------------------------------
# The check

def inspect(spec, table, id, with_truth=True):
    """All that is wrong with one subject, and what the summary says of it; without truth: Spec.names, and no label."""
    found = dict(faults=[], volumes={})
    load_subject(spec, id, with_truth=with_truth, report=found)
    if spec.num_classes and with_truth:
        try:
            found['label'] = label_of(table.get(id), spec.num_classes, spec.data_info)
        except DataError as error:
            found['faults'].append(str(error))
    return found


def _write_splits(spec, shares, seed):
    """The three lists from the subjects whose files are all there."""
    complete = []
    for id in find_ids(spec.source, spec.root):
        try:
            complete += [id] if all(spec.path(name, id) for name in spec.names()) else []
        except DataError as error:
            print(f'  left out {id}: {error}')
    folds = re.fullmatch(r'(\d+)-fold', shares)
    made = (make_folds(complete, spec.data_info, int(folds[1]), seed) if folds
            else {spec.data_info: make_splits(complete, spec.data_info, shares, seed)})
    table = read_table(spec.data_info)
    patients = {table[id]['patient'] for id in complete if table.get(id, {}).get('patient')}
    said = f'of {len(patients)} patients' if patients else 'each a patient of its own: data_info.csv names none'
    print(f'  {len(complete)} subjects, {said}')
    for folder, lists in made.items():
        for split, names in lists.items():
            print(f'  {len(names)} subjects in {os.path.join(folder, split)}.txt')
    if min(len(lists['validation']) for lists in made.values()) < 9:
        print('  intervals of the lesion volume or SUVR need 9 validation subjects with truth: for more, move these '
              'lists away and give validation a larger share (or make fewer folds)')
    return 0


FLAGS = dict(
    make_splits=('', 'shares of train, validation and test, e.g. 0.6,0.2,0.2, or 5-fold: write the lists'),
    without_truth=(False, 'new subjects: their sources, masks and composites alone, of the lists that are there'))


def main(cfg):
    """Check the data set, or with --make_splits write its lists; exit code 0, or 1 if there is a fault."""
    spec = Spec.from_settings(cfg)
    for line in cfg.changes():
        if line.split(' = ')[0] in {'data_root', *Spec.__dataclass_fields__}:
            print(f'  {line}')
    if cfg.make_splits:
        return _write_splits(spec, cfg.make_splits, cfg.seed)
    lists, faults = read_lists(spec.data_info)
    if cfg.without_truth and any(lists.values()):  # of new subjects there is one list
        faults = [(name, text) for name, text in faults if lists.get(name.removesuffix('.txt'), [name])]
        lists = {split: ids for split, ids in lists.items() if ids}
    try:
        table = read_table(spec.data_info)
    except DataError:
        table = {}  # read_lists has said so
    known = {table.get(id, {}).get('label', '').lower() for id in lists.get('train', ())}
    if spec.num_classes and not cfg.without_truth and known == {'unknown'}:
        faults.append(('data_info.csv', f"{os.path.join(spec.data_info, 'data_info.csv')} knows the label of no "
                                        'training subject; add those that are known, or set num_classes = 0.'))
    return 1 if check.report(lists, faults, lambda id: inspect(spec, table, id, not cfg.without_truth), thread_count(),
                             spec) else 0


if __name__ == '__main__':
    import config
    from utils import cli
    cli(lambda: sys.exit(main(config.load(__doc__, extra=FLAGS))))
