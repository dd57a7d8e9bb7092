"""
Rows of benchmark.py: one subject translated, by each way there is.
"""

import statistics
from dataclasses import replace

import numpy as np

import config
import dataset
import utils
from model import PixelUNet
from timing import items_of, networks, repeat
from translate import Model, Sampling, translate


def extrapolate(sampler, wanted, measure, counts, rounds=3):
    """Seconds of `wanted` sampling steps from measure(steps) -> clock's result at two or one of the counts.

    Two counts are measured in turn, `rounds` times, and each one's median taken: other processes come and go.
    """
    few, many = min(counts), max(counts)
    runs = [{n: measure(n) for n in counts} for _ in range(rounds if few < many else 1)]
    found = {n: dict(runs[0][n], seconds_step=statistics.median(r[n]['seconds_step'] for r in runs)) for n in counts}
    row, note = dict(found[many]), ''
    total, tflop = row['seconds_step'], row['tflop']
    step = total / many
    if many != wanted:
        step, tflop_step = ((found[many][k] - found[few][k]) / (many - few) for k in ('seconds_step', 'tflop'))
        total, tflop = total + (wanted - many) * step, tflop + (wanted - many) * tflop_step
        note = f'{wanted} steps extrapolated from {few} and {many}'
    row.update(seconds_step=step, tflop=tflop, gflops=tflop * 1e3 / total, loading=None, seconds_subject=total)
    return dict(row, sampler=sampler, note=note)


def made_subject(cfg, items):
    """A made source (items, C, *S), noise in an ellipsoid of 0.8 of the grid's size, and its mask (items, 1, *S).

    Boxes around it are as large as those around the phantoms' brains, half of the grid in the mean of the slices.
    """
    whole = (items, *cfg.image_size) if cfg.spatial_dims == 2 else tuple(cfg.image_size)
    place = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1 for n in whole], indexing='ij'))
    if cfg.spatial_dims == 2:
        place[0] *= 0.8  # from end to end: all slices hold brain
    mask = ((place ** 2).sum(0) < 0.64).reshape(items, 1, *cfg.image_size).astype(np.float32)
    shape = items, dataset.Spec.from_settings(cfg).source_channels, *cfg.image_size
    noise = np.random.default_rng(0).normal(0, 0.3, shape)
    return np.where(mask > 0, noise, -1).astype(np.float32), mask


def sample_rows(preset, words=(), items=None, ddim=(50,), ddpm=(5, 15), **how):
    """One subject by each sampler that the preset's network allows; of `items` slices, scaled to the whole subject.

    As infer.py does it: mirrored, and in boxes around the brain, where the preset says so. one_step_latent: without
    detail branch and mirrored source. detail_alone: one_step where stage 3 found that the latent path adds nothing.
    image_grid: the U-Net on the image grid as a model of its own; _one_view: not mirrored. ddim, ddpm: numbers of
    steps that are measured; other than 50 and 1000 are extrapolated from two of them.
    """
    cfg = config.load('', ['--preset', preset, *words])
    run = utils.Run(cfg.device, cfg.precision, training=False)
    run.search_kernels(not cfg.trim)
    model = networks(run, cfg).eval()
    alone = PixelUNet(**dict(model.detail.args, with_image=False, feature_channels=0)) if model.detail else None
    alone = Model(regression=run.place(alone)).eval() if alone else None
    whole = items_of(cfg)
    items = items or whole
    source, mask = made_subject(cfg, items)

    def subject(name, steps):
        net = alone if name.startswith('image_grid') else model
        net = replace(model, detail=None) if name == 'one_step_latent' else net
        net = replace(model, latent_adds=False) if name == 'detail_alone' else net
        sampler = name if name in ('ddim', 'ddpm') else 'one_step'
        mirror = cfg.mirror and name not in ('one_step_latent', 'image_grid_one_view')
        way = Sampling(sampler, steps, mirror=mirror, eval_batch=cfg.eval_batch, trim=cfg.trim)
        more = {} if name in ('ddim', 'ddpm') else dict(least=3)  # the others are extrapolated from several rounds
        return repeat(lambda: translate(run, net, source, 'made', way, mask=mask), **how | more)

    plan = [] if cfg.predict == 'eps' else [(name, 1, (1,)) for name in ('one_step', 'one_step_latent')]
    plan += [('detail_alone', 1, (1,))] if alone and plan else []
    plan += [(name, 1, (1,)) for name in ('image_grid', 'image_grid_one_view')] if alone else []
    rows = []
    for name, wanted, counts in plan + [('ddim', 50, ddim), ('ddpm', cfg.timesteps, ddpm)]:
        row = extrapolate(name, wanted, lambda n, name=name: subject(name, n), counts)
        for key in ('seconds_subject', 'tflop'):
            row[key] *= whole / items
        if items != whole:
            row['note'] = '; '.join(filter(None, [row['note'], f'{items} slices, scaled to {whole}']))
        net = model.detail if name == 'detail_alone' else model.unet
        net = alone.regression if name.startswith('image_grid') else net
        rows.append(row | dict(batch=items, precision=run.precision,
                               parameters=sum(p.numel() for p in net.parameters())))
    return rows
