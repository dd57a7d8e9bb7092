"""
Batches of a dataset.Cohort's samples: which ones, in which order, in which boxes; augmentation.
"""

from typing import NamedTuple

import numpy as np
import torch

from grid import by_size

BACKGROUND = {'source': -1, 'target': -1, 'mask': 0, 'lesion': 0}
WINDOW = 4   # steps whose samples are sorted by size with spec.trim


class Boxed(NamedTuple):
    """Samples to be read into boxes of one size: their numbers, where in each one's array its box starts, the size."""
    numbers: list
    starts: list
    size: tuple


def cut(image, start, box, background):
    """Fill a box (C, *size) from an image (C, *S), from `start` on; with background where it sticks out."""
    along = list(zip(start, box.shape[1:], image.shape[1:], strict=True))
    put = tuple(slice(max(0, -a), min(s, n - a)) for a, s, n in along)
    take = tuple(slice(max(0, a), min(n, a + s)) for a, s, n in along)
    if any(a < 0 or a + s > n for a, s, n in along):
        box.fill_(background)
    box[(slice(None), *put)] = image[(slice(None), *take)]


class _Batches:
    """Endless lists of sample numbers: the stream of permutations, one an epoch, cut into world * batch_size a step.

    trim: the samples of WINDOW steps sorted by size, cut likewise, the steps in random order, as Boxed.
    """

    def __init__(self, cohort, batch_size, seed, start_step, rank, world, shift):
        self.cohort, self.shift, self.seed, self.epochs = cohort, shift, seed % 2**32, {}
        self.step, self.batch = start_step, batch_size * world
        self.mine = slice(rank * batch_size, (rank + 1) * batch_size)

    def _stream(self, first, count):
        """Sample numbers at places first, first + 1, .. of the stream."""
        wanted = [divmod(place, len(self.cohort)) for place in range(first, first + count)]
        for epoch in {epoch for epoch, _ in wanted} - set(self.epochs):
            self.epochs[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self.cohort))
        self.epochs = {epoch: self.epochs[epoch] for epoch in self.epochs if epoch >= wanted[0][0]}
        return np.array([self.epochs[epoch][place] for epoch, place in wanted])

    def _window(self, number):
        """The samples of WINDOW steps, (WINDOW, batch): those of like size in one step."""
        numbers = self._stream(number * WINDOW * self.batch, WINDOW * self.batch)
        numbers = numbers[by_size(self.cohort.extents[numbers])]
        rng = np.random.default_rng((self.seed, number, WINDOW))
        return rng.permuted(rng.permutation(numbers.reshape(WINDOW, self.batch)), axis=1)

    def __iter__(self):
        window = None
        while True:
            if not self.cohort.spec.trim:
                yield self._stream(self.step * self.batch, self.batch)[self.mine].tolist()
            else:
                if window is None or self.step % WINDOW == 0:
                    window = self._window(self.step // WINDOW)
                rng = np.random.default_rng((self.seed, self.step, WINDOW, 1))
                boxed = self.cohort.boxed(window[self.step % WINDOW], self.shift, rng)
                yield Boxed(boxed.numbers[self.mine], boxed.starts[self.mine], boxed.size)
            self.step += 1


def loader(cohort, batch_size, seed, start_step, rank=0, world=1, workers=0, shift=0, pin=False):
    """Endless batches, a pure function of (seed, rank, step): a resumed run draws the same; workers only read ahead.

    With cohort.spec.trim a batch holds samples of like size in one box, each moved by up to `shift` voxels or more.
    pin: what workers read lies in pinned memory, from which it goes to a GPU without waiting.
    """
    batches = _Batches(cohort, batch_size, seed, start_step, rank, world, shift)
    if workers == 0:
        return map(cohort.__getitems__, batches)
    # Begun here, not at the first batch: it draws a random number, and the step's noise must not depend on that.
    return _raised(iter(torch.utils.data.DataLoader(_Reader(cohort), batch_sampler=batches, num_workers=workers,
                                                    collate_fn=_as_is, pin_memory=pin)))


class _Reader(torch.utils.data.Dataset):
    """A cohort whose errors for the user are handed on as data: raised in a loading process they become tracebacks."""

    def __init__(self, cohort):
        self.cohort = cohort

    def __getitems__(self, numbers):
        try:
            return self.cohort.__getitems__(numbers)
        except Exception as err:
            if not isinstance(err, OSError) and not getattr(err, 'one_sentence', False):
                raise
            return err


def _raised(batches):
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _as_is(batch):
    return batch


def augment(batch, generator, flip=True, shift=2, noise=0.0):
    """Left-right flip (first spatial axis), whole-voxel shifts up to `shift`: per sample, alike for all its arrays.

    noise: the source alone gets Gaussian noise, its standard deviation (source scaled to -1..1) drawn for each sample
    between 0 and this; the background stays what it is.
    """
    images = {name: batch[name] for name in BACKGROUND if name in batch}
    first = next(iter(images.values()))
    count, size = len(first), first.shape[2:]
    device = generator.device if generator is not None else 'cpu'
    flips = (torch.rand(count, generator=generator, device=device) < 0.5).tolist()
    shifts = torch.randint(-shift, shift + 1, (count, len(size)), generator=generator, device=device).tolist()
    moved = {name: torch.empty_like(image) for name, image in images.items()}
    for i in range(count):
        put = (slice(None), *(slice(max(0, s), n + min(0, s)) for s, n in zip(shifts[i], size, strict=True)))
        take = (slice(None), *(slice(max(0, -s), n + min(0, -s)) for s, n in zip(shifts[i], size, strict=True)))
        for name, image in images.items():
            part = image[i].flip(1) if flip and flips[i] else image[i]
            moved[name][i][put] = part[take]
            for axis, s in enumerate(shifts[i], start=1):
                if s:  # what came from beyond the border
                    moved[name][i].narrow(axis, 0 if s > 0 else size[axis - 1] + s, abs(s)).fill_(BACKGROUND[name])
    if noise:
        moved['source'] = _noisy(moved['source'], noise, generator)
    return {**batch, **moved}


def _noisy(source, at_most, generator):
    device = source.device if generator is None else generator.device
    level = at_most * torch.rand(len(source), *[1] * (source.ndim - 1), generator=generator, device=device)
    grain = torch.randn(source.shape, generator=generator, device=device)
    noisy = (source + (level * grain).to(source.device)).clamp(-0.9999, 1)  # not down to -1, which is the background
    return torch.where(source > -1, noisy, source)
