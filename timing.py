"""
One row of benchmark.py, measured in a process of its own: a training step, a convolution. (A subject translated:
timed_inference.py.)

Training steps are those of train_aae.py, train_unet.py and post_train.py themselves: their main() runs with a clock in
place of the stage's files and made samples in place of the cohort's, and is stopped after a few steps.
"""

import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

import config
import dataset
import post_train
import train_aae
import train_unet
import utils
from diffusion import Diffusion
from model import AAE, PixelUNet, UNet, latent_grid
from prior import classes_of
from translate import Model

LATER = '--disc_start', '0', '--disc_ramp', '1', '--trim', 'False'
SCRIPTS = dict(aae=train_aae, unet=train_unet, post=post_train, regression=train_unet)


# ------------------------------------------------------------------------------------------------------------------
# What is measured

def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mb():
    """Peak memory of this process in MB: on CUDA what PyTorch allocated there, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:  # unlike ru_maxrss this does not begin with the parent's size
        line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmHWM'))
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e6


BASE = [peak_mb()]  # what the imports alone hold; measured again after further imports


def watch_memory(limit_gb):
    """End this process with exit code 77 before it holds more than limit_gb: others may need the machine."""
    def watch():
        while True:
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            if pages * os.sysconf('SC_PAGE_SIZE') > limit_gb * 1e9:
                os._exit(77)
            time.sleep(0.05)
    if limit_gb and Path('/proc/self/statm').exists():
        threading.Thread(target=watch, daemon=True).start()


# What PyTorch counts as 0: shapes -> FLOPs.
COUNTED = {
    torch.ops.aten.mkldnn_convolution: lambda x, w, *_, out_shape, **__: conv_flop_count(x, w, out_shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}


class Clock:
    """Seconds of repeated steps: the first counts FLOPs, `warm` more warm up, then at least `least` are timed.

    Call next() after each step; it is True when `least` are timed and `budget` seconds are spent. `loading` collects
    what the data pipeline took of the step under way. With `turns` each step after those waits for a line on standard
    input, and its seconds are printed (turns.py): not of steps that only try something out (trial).
    """

    turns = False

    def __init__(self, warm=1, least=3, budget=3.0, trial=False):
        self.turns = self.turns and not trial
        self.warm, self.least, self.budget = warm, least, budget
        self.seconds, self.loads, self.loading, self.flops, self.steps = [], [], 0.0, 0, 0
        self.counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
        self.counter.__enter__()
        self.began = time.perf_counter()

    def next(self):
        synchronise()
        took = time.perf_counter() - self.began
        if self.steps == 0:
            self.counter.__exit__(None, None, None)
            self.flops = self.counter.get_total_flops()
            self.counter = None
        elif self.steps > self.warm:
            self.seconds.append(took)
            self.loads.append(self.loading)
        self.steps, self.loading = self.steps + 1, 0.0
        if self.turns and self.steps > self.warm:
            print(f'TURN {took}', flush=True)
            if not sys.stdin.readline().strip():
                self.seconds, self.loads = self.seconds or [took], self.loads or [0.0]
                return True
            self.began = time.perf_counter()
            return False
        self.began = time.perf_counter()
        return len(self.seconds) >= self.least and sum(self.seconds) >= self.budget

    def result(self):
        step = statistics.median(self.seconds)
        return dict(seconds_step=step, steps=len(self.seconds), memory_mb=peak_mb(), memory_import_mb=BASE[-1],
                    tflop=self.flops / 1e12, gflops=self.flops / 1e9 / step,
                    loading=sum(self.loads) / sum(self.seconds))


def repeat(work, **how):
    """Clock work() alone."""
    clock = Clock(**how)
    work()
    while not clock.next():
        work()
    return clock.result()


# ------------------------------------------------------------------------------------------------------------------
# A training step of the project's own scripts

class Finished(Exception):
    """Enough steps were timed."""


class TimedStage:
    """Takes the place of stage.Stage: nothing is read or written, each recorded step is timed."""

    step, first_batch, base = 0, 0, {}

    def __init__(self, how):
        self.how = how

    def __call__(self, run, cfg, name, fixed, **more):
        self.precision = run.precision
        run.search_kernels(not cfg.trim)  # as stage.Stage does
        return self

    def main_first(self):
        return nullcontext()

    def builds_on(self, *whom):
        pass

    def start_from_pretrained(self, net, prep):
        return False

    def describe(self, text):
        self.text = text

    log = describe

    def resume(self, steps, terms, metrics, epoch_steps, **parts):
        nets = [parts[k] for k in ('aae', 'disc', 'unet', 'trained', 'net') if k in parts]
        self.parameters = sum(p.numel() for net in nets for p in net.parameters())
        self.clock = Clock(**self.how)
        return True

    def must_evaluate(self, step):
        return False

    def save_if_due(self, step):
        pass

    def record(self, step, lr, names, **values):
        values = [v.detach().float().mean() for v in values.values()]
        if not bool(torch.isfinite(torch.stack(values)).all()):  # as stage.Stage does every ten steps
            raise utils.RunError(f'step {step}: a loss is not finite')
        if self.clock.next():
            raise Finished


def made_cohort(folder, count):
    """dataset.Cohort over made samples: ellipsoids of noise with a small lesion, files of 4 slices or a volume."""
    class MadeCohort(dataset.Cohort):
        def __init__(self, spec, ids, labels=None):
            each = 4 if spec.spatial_dims == 2 else 1
            self.spec, self.size, files = spec, tuple(spec.image_size), -(-count // each)
            self.ids = [f'made_{i}' for i in range(files)]
            self.labels = [i % spec.num_classes if spec.num_classes else 0 for i in range(files)]
            self.source_channels, self.target_channels = spec.source_channels, len(spec.target_names)
            rng, self.files = np.random.default_rng(0), []
            place = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in self.size], indexing='ij'))
            mask = ((place ** 2).sum(0) < 0.8).astype(np.float32)
            lesion = (((place - 0.2) ** 2).sum(0) < 0.05).astype(np.float32)
            regions = np.broadcast_to(np.stack([mask, lesion]), (each, 2, *self.size))
            for i in range(files):
                images = rng.normal(0, 0.3, (each, (spec.frames or 1) + self.target_channels, *self.size))
                items = np.concatenate([np.where(mask > 0, images, -1), regions], axis=1)
                np.save(Path(folder) / f'{i}.npy', items.astype(np.float32))
                self.files.append(dataset._open_cache(Path(folder) / f'{i}.npy'))
            self.ends = np.arange(1, files + 1) * each
    return MadeCohort


def settings(preset, words=()):
    """Settings of a preset for one row: from the first step on as it is later, adversarial loss and all learning."""
    return config.load('', ['--preset', preset, *LATER, *words])


def networks(run, cfg):
    """The untrained networks of stage 3 as a Model."""
    place, channels = run.place, (dataset.Spec.from_settings(cfg).source_channels, len(cfg.targets))
    aae = place(AAE(cfg.spatial_dims, channels[1], cfg.latent_channels, cfg.aae_channels, cfg.aae_blocks))
    unet = place(UNet(cfg.spatial_dims, cfg.latent_channels, channels[0], cfg.unet_channels, cfg.unet_blocks,
                       cfg.unet_attention, cfg.cond_channels, cfg.cond_width, cfg.num_classes, cfg.dropout,
                       cfg.checkpointing), latent_grid(cfg.image_size))
    diffusion = Diffusion(cfg.predict, cfg.schedule, cfg.timesteps, cfg.loss_weight, cfg.last_step_share)
    detail = place(PixelUNet(cfg.spatial_dims, *channels, True, cfg.detail_channels,
                             feature_channels=unet.feature_channels, lesion_head=cfg.lesion_head,
                             classes=classes_of(cfg, cfg))) if cfg.detail_branch else None
    return Model(aae.eval().requires_grad_(False), unet, diffusion.to(run.device), detail,
                 prep=dataset.Spec.from_settings(cfg).travel())


def timed(function, stage):
    """The function, its seconds added to the loading of the step under way."""
    def call(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            stage.clock.loading += time.perf_counter() - began
    return call


def train_step(stage, preset, words=(), swap=None, **how):
    """Time the training steps of a stage's own script. swap: names in its module to replace, e.g. {'AAE': PlainAAE}."""
    module, timing = SCRIPTS[stage], TimedStage(how)
    cfg = settings(preset, words)
    argv = [f'{stage}.py', '--preset', preset, *LATER, *words] + ['--regression', 'True'] * (stage == 'regression')
    batches, sampling = dataset.loader, ['--sampler', 'ddim'] if cfg.predict == 'eps' else []

    def load_aae(cfg, run):
        model = networks(run, cfg)
        return Model(model.aae, prep=dataset.Spec.from_settings(cfg).travel()), dict(args=model.aae.args)

    def loader(*args, **kwargs):
        read = timed(batches(*args, **kwargs).__next__, timing)
        while True:
            yield read()

    with tempfile.TemporaryDirectory(prefix='benchmark_') as folder, ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, 'argv', argv + sampling))
        fakes = dict(Stage=timing, load_aae=load_aae, load_model=lambda cfg, run, stage: networks(run, cfg),
                     fit_quality=lambda *_: None) | (swap or {})
        for name, fake in fakes.items():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, fake))
        count = max(2, min(64, int(2e8 / (4 * (cfg.frames or 1) * np.prod(cfg.image_size)))))
        for name, fake in dict(Cohort=made_cohort(folder, count), loader=loader,
                               augment=timed(dataset.augment, timing), read_split=lambda *_: ['made'],
                               read_labels=lambda *_: {}).items():
            stack.enter_context(mock.patch.object(dataset, name, fake))
        try:
            module.main()
        except Finished:
            pass
    found = timing.clock.result() | dict(parameters=timing.parameters, batch=cfg.batch_size, precision=timing.precision)
    return found | dict(seconds_subject=found['seconds_step'] / cfg.batch_size * items_of(cfg))


# ------------------------------------------------------------------------------------------------------------------
# A convolution, a cohort read

def items_of(cfg):
    """Samples of a subject: the slices with brain of 2D tasks (25, as the phantoms have), one volume in 3D."""
    return 25 if cfg.spatial_dims == 2 else 1


def peak_rows(size_2d=(192, 224), size_3d=(40, 48, 40), batch=4, **how):
    """GFLOP/s of 3x3(x3) convolutions 64 -> 64: 2D and 3D, fp32 and, where it is fast, bf16, both memory formats."""
    rows, fast = [], utils.Run().precision
    for dims, size in ((2, size_2d), (3, size_3d)):
        for precision in dict.fromkeys(('fp32', fast)):
            for layout in ('contiguous', 'channels_last'):
                row = repeat(peak_work(dims, precision, layout, size, batch), **how)
                rows.append(row | dict(name=f'peak/conv{dims}d/{precision}/{layout}', precision=precision,
                                       size='x'.join(map(str, size)), batch=batch, loading=None))
    return rows


def peak_work(dims, precision, layout, size, batch):
    """A function that does one such convolution."""
    device, dtype = utils.Run().device, torch.bfloat16 if precision == 'bf16' else torch.float32
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    form = dict(memory_format=last if layout == 'channels_last' else torch.contiguous_format)
    layer = (torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d)(64, 64, 3, padding=1).to(device, dtype, **form)
    x = torch.randn(batch, 64, *size, device=device).to(dtype).contiguous(**form)
    return torch.no_grad()(lambda: layer(x))


def cohort_rows(counts=(2, 8), shape=(64, 76, 25), words=()):
    """Seconds to read and cache made stroke subjects (CT perfusion of 15 frames as .nii.gz), and the cache's size."""
    import nibabel as nib
    rng, rows, affine = np.random.default_rng(0), [], np.diag([3.0, 3.0, 5.0, 1.0])
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing='ij'))
    mask = ((place ** 2).sum(0) < 0.7).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix='benchmark_') as folder:
        for i in range(max(counts)):
            made = dict(ctp=(35, (*shape, 15)), dwi=(100, shape), adc=(800, shape))
            (Path(folder) / 'data' / str(i)).mkdir(parents=True)
            volumes = {k: rng.normal(mean, 0.1 * mean, s) * mask.reshape(*shape, *[1] * (len(s) - 3))
                       for k, (mean, s) in made.items()}
            lesion = (((place - 0.2) ** 2).sum(0) < 0.05).astype(np.float32)
            for name, volume in dict(volumes, mask=mask, lesion=mask * lesion).items():
                nib.save(nib.Nifti1Image(volume.astype(np.float32), affine), f'{folder}/data/{i}/{name}.nii.gz')
        for count in counts:
            cache = f'{folder}/cache_{count}'
            cfg = settings('ctp2dwi_demo', ['--data_root', f'{folder}/data', '--cache_dir', cache, *words])
            began = time.perf_counter()
            dataset.Cohort(dataset.Spec.from_settings(cfg), [str(i) for i in range(count)])
            took = time.perf_counter() - began
            size = sum(f.stat().st_size for f in Path(cache).iterdir()) / 1e6
            rows.append(dict(name=f'growth/subjects/{count}', seconds_step=took, seconds_subject=took / count,
                             memory_mb=peak_mb(), batch=count, steps=1, precision='fp32',
                             size='x'.join(map(str, shape)), note=f'preprocessing once; cache {size:.1f} MB'))
    return rows
