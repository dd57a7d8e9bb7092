"""
An ischaemic stroke in a digital brain: what is occluded, what dies, and what CT perfusion and diffusion MRI see of it.

The perfusion model is that of digital perfusion phantoms (Riordan 2011; Fieselmann 2011, doi 10.1155/2011/467563);
diffusion is S_b = S_0 exp(-TE / T2) exp(-b ADC) with Rician noise. The infarct follows the perfusion deficit only in
part, as in patients.
"""

from dataclasses import replace

import numpy as np
from scipy import ndimage

# Territories in MNI mm, right side (the left is mirrored): artery -> branch -> points. A voxel belongs to the nearest
# point in coordinates that are drawn together along the rays of its hemisphere, so that borders run from the cortex
# inwards: wedges.
ARTERIES = {
    'M2 superior': {'frontobasal': [(38, 34, -10)], 'prefrontal': [(44, 32, 22)], 'precentral': [(46, 6, 40)],
                    'central': [(50, -12, 40)], 'anterior parietal': [(46, -30, 50)], 'insula': [(38, 10, 2)]},
    'M2 inferior': {'temporal pole': [(40, 10, -30)], 'anterior temporal': [(56, -6, -20)],
                    'middle temporal': [(60, -30, -4)], 'posterior temporal': [(54, -52, 6)],
                    'angular': [(46, -60, 32)], 'posterior parietal': [(38, -48, 52)],
                    'posterior insula': [(40, -14, 4)]},
    'deep': {'lenticulostriate': [(25, 4, 4), (24, -6, 10)], 'caudate': [(16, 12, 14)]},
    'ACA': {'orbital': [(8, 36, -18)], 'frontopolar': [(10, 60, 6)], 'callosomarginal': [(9, 42, 34)],
            'internal frontal': [(12, 16, 56)], 'paracentral': [(8, -26, 62)], 'precuneal': [(9, -56, 50)],
            'pericallosal': [(7, 10, 30)]},
    'PCA': {'inferior temporal': [(34, -24, -26), (40, -46, -18)], 'calcarine': [(12, -86, 4)],
            'parieto-occipital': [(14, -74, 26)], 'lateral occipital': [(30, -86, 6)], 'thalamic': [(13, -18, 8)],
            'splenial': [(10, -44, 14)]},
    'cerebellar': {'superior': [(26, -56, -26)], 'inferior': [(20, -66, -46)], 'brainstem': [(4, -28, -30)]}}
M1 = ('M2 superior', 'M2 inferior', 'deep')
OCCLUSIONS = {'M1': 0.17, 'M2 superior': 0.20, 'M2 inferior': 0.17, 'deep': 0.12, 'PCA': 0.08, 'ACA': 0.07,
              'branch': 0.19}

# Healthy, reduced, severely reduced: CBF ml/100ml/min, CBV ml/100ml, delay s. The mean transit time is CBV / CBF.
PERFUSION = {'gm': {'cbf': (53, 16, 5.3), 'cbv': (3.3, 3.0, 0.71), 'delay': (1, 4, 9)},
             'wm': {'cbf': (25, 7.5, 2.5), 'cbv': (1.9, 1.7, 0.42), 'delay': (1, 8, 12)}}
HU = {'gm': 35.0, 'wm': 29.0, 'csf': 12.0, 'vessel': 40.0}
CTP_NOISE = 3.5          # HU, standard deviation of one voxel of one frame
ECHO_TIME = 85.0         # ms
B_VALUE = 1000.0         # s/mm^2
# Fluid's share is that left after one repetition time; its T1 is the longest.
DENSITY, T2 = {'gm': 0.82, 'wm': 0.70, 'csf': 0.75}, {'gm': 95.0, 'wm': 75.0, 'csf': 1500.0}
ADC = {'gm': 890.0, 'deep': 750.0, 'wm': 700.0, 'csf': 3100.0}  # 1e-6 mm^2/s
DWI_NOISE = 1 / 30       # of white matter's mean b = 1000 signal


def draw_facts(rng, shifted=False):
    """The hidden facts of one patient; a shifted cohort has smaller occlusions and better collaterals."""
    kinds, share = zip(*OCCLUSIONS.items(), strict=True)
    share = np.array(share) * np.where(np.isin(kinds, ('M1',)) & shifted, 0.4, 1)
    site = str(rng.choice(kinds, p=share / share.sum()))
    facts = {'territory': site, 'side': str(rng.choice(['left', 'right'])),
             'age': float(np.clip(rng.normal(71, 10), 40, 93)),
             'collateral': float(rng.beta(2.4, 1.8) if not shifted else rng.beta(3, 1.5)),
             'hours': float(np.clip(rng.gamma(3, 1.3), 0.7, 14)),
             'recanalised': float(rng.uniform(0.6, 1) if rng.random() < 0.15 else 0),
             'chronic': float(rng.uniform(0.18, 0.42) if rng.random() < 0.2 else 0),
             'tolerance': float(rng.normal(0, 0.07)), 'lesion': bool(rng.random() >= 0.15),
             'leukoaraiosis': float(rng.gamma(1.5, 0.25)), 'frame_interval': 3.5}
    if site == 'branch':
        artery = str(rng.choice(('M2 superior', 'M2 inferior', 'PCA', 'ACA', 'deep')))
        branches = list(ARTERIES[artery])
        first = int(rng.integers(len(branches)))
        facts['territory'] = '/'.join([artery] + branches[first:first + int(rng.integers(1, 3))])
    facts['benign'] = not facts['lesion'] and bool(rng.random() < 0.5)  # oligaemia that nothing dies of
    if not (facts['lesion'] or facts['benign']):
        facts['territory'] = 'none'
    return facts


def territory(brain, rng, sites):
    """
    (X, Y, Z) float32 for each list of (artery, branch or None, side) in `sites`: signed distance in mm to the border of
    the territory, positive inside. All share one irregular partition of the brain.
    """
    shape = brain.mask.shape
    points = np.stack([(c + 4.5 * brain.field(rng, 26) + 1.8 * brain.field(rng, 9))[brain.mask] for c in brain.mni])
    nearest = {}
    for side in (1, -1):
        hub = np.array([26 * side, -14, 14], np.float32)[:, None]

        def draw_in(p, hub=hub):
            away = p - hub
            return away * (60 / (np.sqrt((away ** 2).sum(0)) + 22))
        near = draw_in(points)
        for artery, branches in ARTERIES.items():
            for branch, seeds in branches.items():
                best = np.inf
                for seed in seeds:
                    at = draw_in((np.array(seed) * (side, 1, 1) + rng.normal(0, 3, 3)).astype(np.float32)[:, None])
                    best = np.minimum(best, ((near - at) ** 2).sum(0))
                # The falx: no artery reaches over the midline.
                best = np.sqrt(best) + 2.0 * np.clip(-points[0] * side, 0, 10)
                nearest[artery, branch, side] = best
    depths = []
    for site in sites:
        chosen = [k for k in nearest if any(k[0] == a and b in (None, k[1]) and k[2] == s for a, b, s in site)]
        depth = np.full(shape, -60, np.float32)
        if chosen:
            inside = np.minimum.reduce([nearest[k] for k in chosen])
            outside = np.minimum.reduce([d for k, d in nearest.items() if k not in chosen])
            depth[brain.mask] = outside - inside
        depths.append(depth)
    return depths


def sites_of(name, side):
    """'M1', 'PCA/calcarine' or 'none' -> list of (artery, branch or None, side)."""
    side = 1 if side == 'right' else -1
    if name == 'none':
        return []
    if name == 'M1':
        return [(a, None, side) for a in M1]
    artery, *branches = name.split('/')
    return [(artery, b, side) for b in branches or [None]]


def sigmoid(x):
    """A soft step from 0 to 1."""
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def deep_grey(brain):
    """(X, Y, Z) in 0..1: how much of the grey matter here is thalamus or basal ganglia."""
    x, y, z = brain.mni
    return sigmoid(6 * (1 - np.sqrt(((np.abs(x) - 18) / 17) ** 2 + ((y + 5) / 30) ** 2 + ((z - 5) / 17) ** 2)))


def occlude(brain, facts, rng):
    """
    Severity now (0 healthy, 0.5 reduced, 1 severe) and the share of tissue that is infarcted, each (X, Y, Z) float32.

    Collaterals keep flow up near the territory's border. What dies depends on the severity at its worst, on the time,
    on this patient's tolerance and on a random vulnerability; where a vessel is open again, flow is normal over dead
    tissue.
    """
    side = facts['side']
    site = sites_of(facts['territory'], side)
    artery, _, sign = site[rng.integers(len(site))] if site else ('deep', None, 1)
    reopened = [(artery, str(b), sign) for b in rng.choice(list(ARTERIES[artery]), 2)]
    other = sites_of(str(rng.choice(('M1', 'M2 superior', 'M2 inferior', 'PCA'))), str(rng.choice(('left', 'right'))))
    depth, open_again, chronic = territory(brain, rng, [site, reopened, other])
    deep, rough = deep_grey(brain), brain.field(rng, 14)

    # Collateral flow fades over `reach` mm from the border; deep arteries have no collaterals.
    reach = 3 + 15 * facts['collateral']
    inward = 1 - 0.75 * facts['collateral'] * np.exp(-np.clip(depth, 0, None) / reach) * (1 - 0.8 * deep)
    worst = sigmoid(depth / 1.2) * np.clip((1.06 - 0.60 * facts['collateral']) * inward + 0.10 * rough, 0, 1)
    if not facts['lesion']:
        worst = worst * (0.5 if facts['benign'] else 0)
    now = worst * (1 - facts['recanalised'] * sigmoid(open_again / 1.5))
    now = np.maximum(now, facts['chronic'] * sigmoid(chronic / 3))

    growth = 1 - np.exp(-facts['hours'] / (1.5 + 6 * facts['collateral']))
    threshold = 0.82 - 0.16 * growth + facts['tolerance']
    weak = 0.07 * brain.field(rng, 22) + 0.06 * brain.field(rng, 9) + 0.06 * deep + 0.04 * (brain.gm - brain.wm)
    doom = np.where((worst > 0.05) & brain.mask & (brain.csf < 0.4), worst + weak - 0.15 * sigmoid(-depth), -1)
    least = rng.lognormal(0.3, 0.8) / brain.voxel_ml  # voxels that are lost even behind the best collaterals
    if facts['lesion']:
        threshold = min(threshold, np.partition(doom.ravel(), -int(least) - 4)[-int(least) - 4])
    infarct = sigmoid((worst + weak - threshold) / 0.014) * sigmoid(depth / 0.8 + 1) * (worst > 0.05) * brain.mask
    infarct = infarct * facts['lesion']
    small, _ = ndimage.label(lesion_mask(brain, infarct))
    sizes = np.bincount(small.ravel()) * brain.voxel_ml
    # No specks: they are not what is seen in patients.
    infarct = np.where((sizes < 0.15)[small] & (small > 0), 0.3 * infarct, infarct)
    return now.astype(np.float32), infarct.astype(np.float32)


def lesion_mask(brain, infarct):
    """(X, Y, Z) bool: more than half of the voxel is infarcted tissue."""
    return infarct * (brain.gm + brain.wm) > 0.5 * brain.brain


def swell(brain, infarct):
    """The same brain, its sulci effaced by the swollen infarct: tissue takes most of the fluid's place beside it."""
    tissue = np.maximum(brain.gm + brain.wm, 1e-3)
    gone = 0.8 * infarct * brain.csf * np.minimum(tissue, 1)
    return replace(brain, gm=brain.gm * (1 + gone / tissue), wm=brain.wm * (1 + gone / tissue), csf=brain.csf - gone,
                   ventricle=np.minimum(brain.ventricle, brain.csf - gone))


def perfusion_maps(brain, severity, rng):
    """Maps (X, Y, Z) of CBF, MTT (s) and delay (s), tissue within a voxel mixed by its fraction."""
    x = np.clip(severity, 0, 1) * 2
    tissue = np.maximum(brain.gm + brain.wm, 1e-3)
    share = {'gm': brain.gm / tissue, 'wm': brain.wm / tissue}
    flow = np.exp(0.10 * brain.texture + 0.08 * brain.field(rng, 20))

    def mix(row):
        return sum(f * np.exp(np.interp(x, (0, 1, 2), np.log(PERFUSION[name][row]))) for name, f in share.items())
    cbf, cbv = mix('cbf'), mix('cbv')
    return {'cbf': cbf * flow * tissue, 'mtt': 60 * cbv / np.maximum(cbf, 1e-3) * np.exp(0.06 * brain.field(rng, 15)),
            'delay': mix('delay') + 0.4 * brain.field(rng, 30)}


def enhancement(maps, times, arrival, width, peak):
    """
    HU(t) - baseline = CBF / 6000 * (AIF conv R)(t - delay), R = exp(-t / MTT), for voxels (N,): (N, T).

    AIF: gamma variate (t - t0)^3 exp(-(t - t0) / width) scaled to `peak` HU, with a broader recirculation of a tenth
    after it.
    """
    step = 0.1
    fine = np.arange(0, times[-1] + 1, step)

    def gamma(t, b):
        t = np.clip(t, 0, None)
        return (t / (3 * b)) ** 3 * np.exp(3 - t / b)
    aif = peak * (gamma(fine - arrival, width) + 0.12 * gamma(fine - arrival - 9, 3 * width))
    grid = np.geomspace(2, 24, 48)
    table = np.zeros((len(grid), len(fine)), np.float32)
    value = np.zeros(len(grid))
    for k in range(1, len(fine)):  # the convolution with an exponential, as a recursion
        value = value * np.exp(-step / grid) + step * aif[k]
        table[:, k] = value
    row = np.log(np.clip(maps['mtt'], 2, 24) / 2) / np.log(12) * (len(grid) - 1)
    column = np.clip((times[None] - maps['delay'][:, None]) / step, 0, None)
    curve = ndimage.map_coordinates(table, [np.broadcast_to(row[:, None], column.shape), column], order=1,
                                    mode='nearest', output=np.float32)
    at_vessel = np.interp(times[None] - 0.5 * maps['delay'][:, None], fine, aif)
    return maps['cbf'][:, None] / 6000 * curve, at_vessel


def ct_perfusion(brain, severity, infarct, facts, rng, frames=15, noise=CTP_NOISE):
    """(X, Y, Z, T) HU with noise, and the clean maps of CBF (ml/100ml/min) and Tmax (s, time to the residue's peak)."""
    maps = perfusion_maps(brain, severity, rng)
    inside = {k: v[brain.mask] for k, v in maps.items()}
    times = np.arange(frames) * facts['frame_interval']
    curves, vessel = enhancement(inside, times, rng.uniform(4, 8), rng.uniform(1.3, 1.8), rng.normal(400, 40))
    m = brain.mask
    spread = {'gm': 1.2, 'wm': 1.0}
    baseline = sum(getattr(brain, k)[m] * (HU[k] + spread.get(k, 0) * brain.texture[m]) for k in ('gm', 'wm', 'csf'))
    baseline += rng.normal(0, 0.8) + 0.6 * brain.field(rng, 40)[m]
    # 2.5 HU for each per cent of water taken up
    baseline -= 2.5 * (infarct * (brain.gm + brain.wm))[m] * (1.0 + 0.35 * min(facts['hours'], 8))
    share = 0.10 * brain.vessel[m] * brain.csf[m] + 0.15 * brain.vessel[m] * (1 - severity[m])
    share = np.clip(share, 0, 0.25)
    vessel = HU['vessel'] + vessel * (1 - 0.5 * severity[m])[:, None]
    clean = (baseline[:, None] + curves) * (1 - share[:, None]) + share[:, None] * vessel

    shape = brain.mask.shape
    grain = rng.standard_normal((frames, *shape), np.float32)
    image = np.zeros((*shape, frames), np.float32)
    image[m] = clean + noise * correlated(grain)[:, m].T
    tmax = np.where(m, maps['delay'] + 0.35 * (maps['mtt'] - 3.7), 0)
    return image, np.where(m, maps['cbf'], 0).astype(np.float32), np.clip(tmax, 0, None).astype(np.float32)


def correlated(grain, weight=0.18):
    """White noise (N, X, Y, Z), slightly smoothed in the plane, of unit standard deviation again."""
    out = grain.copy()
    for axis in (1, 2):
        out = out + weight * (np.roll(out, 1, axis) + np.roll(out, -1, axis))
    return out / (1 + 2 * weight ** 2)


def diffusion(brain, infarct, facts, rng, noise=DWI_NOISE):
    """
    Diffusion-weighted image (b = 1000, scanner units) and ADC (1e-6 mm^2/s, fitted from the noisy b = 0 and b = 1000
    images), then the same two without noise: four (X, Y, Z) float32.
    """
    deep = deep_grey(brain)
    # Leukoaraiosis: old damage of white matter, beside the ventricles first.
    swollen = brain.field(rng, 14) - 1.9 + 1.3 * facts['leukoaraiosis'] + 2.2 * periventricular(brain)
    swollen = sigmoid(swollen / 0.25) * brain.wm ** 2
    adc = {'gm': ADC['gm'] + (ADC['deep'] - ADC['gm']) * deep, 'wm': ADC['wm'] + 160 * swollen, 'csf': ADC['csf']}
    person = 1 + rng.normal(0, 0.02)
    local = 1 - 0.035 * brain.texture + 0.025 * brain.field(rng, 20)
    # The infarct: its ADC varies between and within patients, its T2 rises slowly.
    core = np.clip(rng.uniform(390, 500) + 45 * brain.field(rng, 10), 340, 610)
    glow = np.clip(1.0 + 0.02 * facts['hours'] + 0.05 * brain.field(rng, 12), 1, 1.3)
    signals = [0.0, 0.0]
    for name in ('gm', 'wm', 'csf'):
        fraction = getattr(brain, name)
        s_0 = DENSITY[name] * np.exp(-ECHO_TIME / T2[name]) * (1 + (0.05 * brain.texture if name != 'csf' else 0))
        s_0 = s_0 * (1 + 0.35 * swollen) if name == 'wm' else s_0
        d = adc[name] * (person * local if name != 'csf' else 1.0)
        dying = infarct if name != 'csf' else 0
        for k, b in enumerate((0.0, B_VALUE)):
            alive = s_0 * np.exp(-b * d * 1e-6)
            dead = s_0 * glow * np.exp(-b * core * (1.06 if name == 'gm' else 1.0) * 1e-6)
            signals[k] = signals[k] + fraction * ((1 - dying) * alive + dying * dead)
    coil = np.exp(0.06 * brain.field(rng, 90))
    gain = rng.uniform(2000, 9000)
    clean = [np.where(brain.mask, s * coil * gain, 0) for s in signals]
    white = (brain.wm > 0.9) & brain.mask
    sd = noise * clean[1][white].mean()
    noisy = [np.hypot(s + sd * rng.standard_normal(s.shape), sd * rng.standard_normal(s.shape)) for s in clean]

    def fit(s_0, s_b):
        ratio = np.log(np.maximum(s_0, 1e-6) / np.maximum(s_b, 1e-6))
        return np.where(brain.mask, np.clip(ratio / B_VALUE * 1e6, 0, 4000), 0).astype(np.float32)
    return (np.where(brain.mask, noisy[1], 0).astype(np.float32), fit(*noisy), clean[1].astype(np.float32), fit(*clean))


def periventricular(brain):
    """(X, Y, Z), 1 beside the ventricles, fading over a few mm."""
    width = [5 / s for s in brain.spacing]
    return np.clip(3 * ndimage.gaussian_filter(brain.ventricle, width), 0, 1)
