"""
Amyloid in a digital brain: a T1-weighted MRI and a florbetapir-like PET image, standardised uptake value ratios (SUVR).

Cortical uptake is drawn first and met exactly: the noise-free image's composite over its whole cerebellum is the drawn
number. The label moves atrophy by less than people differ, so the MRI tells it only in part.
"""

import numpy as np
from scipy import ndimage

CUTOFF = 1.11            # composite SUVR above which a florbetapir scan is positive
PET_NOISE = 0.075        # of the mean in the mask
WHITE, CEREBELLUM_GM, CEREBELLUM_WM, FLUID = 1.6, 0.85, 1.35, 0.5


def draw_facts(rng, shifted=False):
    """The hidden facts of one person: status, cortical SUVR, atrophy, ventricles; a shifted cohort is younger."""
    label = int(rng.random() < 0.47)
    age = float(np.clip(rng.normal(68 if shifted else 73, 7), 55, 92))
    burden = float(rng.beta(1.6, 1.4)) if label else 0.0
    cortex = 1.15 + 0.60 * burden if label else float(np.clip(rng.normal(0.99, 0.045), 0.86, 1.075))
    shift = 0.25 * label + 1.0 * burden + 0.05 * (age - 73)
    return {'label': label, 'age': age, 'suvr_drawn': cortex, 'atrophy': float(0.75 * shift + rng.normal(0, 0.8)),
            'ventricles': float(0.8 * shift + rng.normal(0, 0.9) + 0.3), 'white': float(rng.normal(WHITE, 0.10)),
            'fwhm': float(rng.uniform(6, 8))}


def sigmoid(x):
    """A soft step from 0 to 1."""
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def regions(brain):
    """Soft maps (X, Y, Z) in 0..1: name -> map; `cerebellum` holds all that lies under the tentorium."""
    x, y, z = brain.mni
    x = np.abs(x)

    def box(value, low, high, soft=2.5):
        return sigmoid((value - low) / soft) * sigmoid((high - value) / soft)
    tent = -11 - 0.25 * x - 0.35 * np.clip(-y - 72, 0, None)
    cerebellum = sigmoid((tent - z) / 1.5) * sigmoid((-32 - y) / 1.5) * sigmoid((52 - x) / 2)
    stem = sigmoid((-8 - z) / 2) * sigmoid((14 - x) / 2) * box(y, -48, -12)
    above = (1 - cerebellum) * (1 - stem)
    inner = box(x, -1, 30) * box(y, -5, 24) * box(z, -15, 24)  # basal ganglia
    out = {'cerebellum': cerebellum, 'stem': stem * (1 - cerebellum),
           'frontal': above * sigmoid((y - 2) / 3) * sigmoid((z + 18 + 0.4 * (x - 20)) / 3) * (1 - inner),
           'cingulate': above * box(x, -1, 12) * (box(y, -60, 46) * box(z, 16, 46)
                                                  + box(y, 26, 48) * box(z, -8, 18)).clip(0, 1),
           'parietal': above * box(x, 24, 90) * box(y, -76, -22) * sigmoid((z - 24) / 3),
           'temporal': above * box(x, 42, 90) * box(y, -62, 12) * box(z, -30, 10),
           'occipital': above * sigmoid((-72 - y) / 4) * sigmoid((34 - z) / 4),
           'medial temporal': above * box(x, 10, 36) * box(y, -42, 10) * sigmoid((-6 - z) / 3),
           'striatum': above * box(x, 8, 32) * box(y, -14, 22) * box(z, -10, 20),
           'thalamus': above * box(x, -1, 20) * box(y, -32, -4) * box(z, -2, 18),
           'sensorimotor': above * box(y, -36, 0) * sigmoid((z - 30) / 3)}
    return out


def mri(brain, rng, noise=0.025):
    """T1-weighted image (X, Y, Z) float32 in scanner units: contrast differs between people; a coil's bias field."""
    level = {'gm': 0.58 + rng.normal(0, 0.025), 'wm': 0.92 + rng.normal(0, 0.025), 'csf': 0.16 + rng.normal(0, 0.03)}
    image = sum(level[k] * getattr(brain, k) for k in level) * (1 + 0.035 * brain.texture)
    image = image * np.exp(0.10 * brain.field(rng, 90)) + noise * rng.standard_normal(image.shape)
    return np.where(brain.mask, np.clip(image, 0.01, None) * rng.uniform(300, 1200), 0).astype(np.float32)


def pet(brain, facts, rng, noise=PET_NOISE):
    """
    SUVR image with noise, the same without (float32), masks of composite and whole cerebellum (bool): (X, Y, Z).

    image = uptake without cortical amyloid + k * pattern, both blurred; k makes the composite over the whole cerebellum
    the drawn one.
    """
    area = regions(brain)
    composite = np.clip(area['frontal'] + area['cingulate'] + area['parietal'] + area['temporal'], 0, 1)
    roi = (brain.gm > 0.5) & (composite > 0.5) & brain.mask
    low, below = np.clip(1 - area['cerebellum'] - area['stem'], 0, 1), np.clip(area['cerebellum'] + area['stem'], 0, 1)

    # Where amyloid settles differs between people; occipital and medial temporal cortex have less, the cerebellum none.
    weight = 0.85 + 0.15 * composite
    for name, mean, sd in (('frontal', 1.05, 0.10), ('cingulate', 1.15, 0.10), ('parietal', 1.0, 0.12),
                           ('temporal', 0.95, 0.12), ('occipital', 0.5, 0.15), ('medial temporal', 0.4, 0.1),
                           ('striatum', 0.9, 0.2), ('thalamus', 0.45, 0.1), ('sensorimotor', 0.65, 0.1)):
        weight = weight * (1 - area[name]) + area[name] * max(0.05, rng.normal(mean, sd))
    weight = weight * (1 + 0.10 * brain.field(rng, 20))
    local = 1 + 0.03 * brain.texture + 0.04 * brain.field(rng, 18)
    rest = {'gm': 0.75 * low + CEREBELLUM_GM * below + 0.25 * area['thalamus'] + 0.2 * area['striatum'], 'csf': FLUID,
            'wm': (facts['white'] * low + CEREBELLUM_WM * area['cerebellum'] + 1.5 * area['stem']) * local}
    rest['gm'] = rest['gm'] * local
    base = sum(rest[k] * getattr(brain, k) for k in rest)
    extra = weight * brain.gm * low * (1 + 0.04 * brain.texture)

    width = [facts['fwhm'] / 2.355 / s for s in brain.spacing]
    base, extra = (ndimage.gaussian_filter(v, width) for v in (base, extra))
    # Scalp and skull take up some too: that makes good part of what the blur loses at the edge.
    hull = np.maximum(ndimage.gaussian_filter(brain.brain, width), 0.3)
    base, extra = base / np.sqrt(hull), extra / np.sqrt(hull)
    whole = (area['cerebellum'] > 0.5) & brain.mask & (brain.gm + brain.wm > 0.5)
    # (mean(base + k extra) in the roi) / (the same in the cerebellum) = drawn
    drawn = facts['suvr_drawn']
    k = (drawn * base[whole].mean() - base[roi].mean()) / (extra[roi].mean() - drawn * extra[whole].mean())
    clean = base + k * extra
    clean = np.where(brain.mask, clean / clean[whole].mean(), 0)

    grain = ndimage.gaussian_filter(rng.standard_normal(clean.shape), 0.45)
    grain /= grain.std()
    mean = clean[brain.mask].mean()
    image = clean + noise * np.sqrt(mean * np.maximum(clean, 0)) * grain
    return np.where(brain.mask, np.clip(image, 0, None), 0).astype(np.float32), clean.astype(np.float32), roi, whole
