"""
Every setting of every script. Edit the constants below, or override one for a run: python train_unet.py --batch_size 8

Order of force: constants < preset < command line. The constants are the stroke demo; PRESETS holds what differs in the
others. Each run prints the values that are not the constant's and where they came from; --help lists them all.
"""

import difflib
import re
import sys
import types
from pathlib import Path

import settings
from settings import SettingError

# ------------------------------------------------------------------------------------------------------------------
# Experiment
task = 'ctp2dwi'                 # ctp2dwi (2D slices, stroke metrics) or mri2pet (3D volumes, amyloid metrics)
preset = 'ctp2dwi_demo'          # ctp2dwi_demo, mri2pet_demo, ctp2dwi, mri2pet, lapt, il_cldm: see PRESETS
exp = 'exp_1'                    # results go to result/<exp>
init_from = None                 # 'exp_1': take the earlier stages from that experiment instead of this one
pretrained = None                # 'exp_1': stages 1 and 2 start from that experiment's weights (fine-tuning)
device = 'auto'                  # auto, cpu, cuda or cuda:1
precision = 'auto'               # auto (bf16 where the device is fast in it), fp32, bf16, fp16 (CUDA, loss scaling)
seed = 0                         # one seed for weights, data order, noise and sampling

# Data
data_root = 'data/phantom_ctp2dwi'                 # {root} in the templates below
data_info = 'data/phantom_ctp2dwi/data_info'       # folder with train.txt, validation.txt, test.txt, data_info.csv
cache_dir = 'cache'                                # preprocessed arrays; may be deleted at any time
source = '{root}/{id}/ctp.nii.gz'                  # source image; * must match exactly one file
targets = {'dwi': '{root}/{id}/dwi.nii.gz', 'adc': '{root}/{id}/adc.nii.gz'}  # target images: name -> file
mask = '{root}/{id}/mask.nii.gz'                   # brain mask; None: source > 0, largest component, holes filled
lesion = '{root}/{id}/lesion.nii.gz'               # region of stage 3 and of figures (all zero: no lesion); or None
spatial_dims = 2                 # 2: axial slices, 3: volumes
spacing = (3, 3, None)           # mm of the working grid; None keeps an axis as it is
image_size = (64, 72)            # voxels of the working grid, multiples of 4; when memory runs out, lower it
context = 1                      # 2D: neighbouring slices on either side that the networks see beside each slice
frames = 15                      # time points of a 4D source; None for a 3D source
frame_spacing = None             # seconds between these time points; None: evenly over the whole of each scan
frame_interval = None            # seconds between the frames in the files; None: as each header says
resample = False                 # True brings all volumes of a subject onto the first target's grid by their affines
scaling = {'source': ('range', 0, 100), 'dwi': ('median', 0, 3), 'adc': ('range', 0, 3000)}  # or ('quantile', a, b)
unit_scale = {'source': 1, 'dwi': 1, 'adc': 1}     # factor on a file's values, e.g. 1e6 for an ADC in mm^2/s
num_classes = 0                  # number of label values in data_info.csv; 0: labels are not read
lesion_rule = (620, 1.25, 0.1)   # finds lesions in images: ADC below, DWI above so many medians, so many ml or more
suvr_positive = 1.11             # amyloid-positive: the true composite SUVR above this (depends on tracer, reference)
flip = True                      # augmentation: left-right flips
shift = 2                        # augmentation: shifts by up to this many voxels
source_noise = 0.0               # augmentation: noise on the scaled source (-1..1), a standard deviation up to this
trim = True                      # compute only in the box around the brain, slices of like size together
workers = 0                      # loading processes; 0: the training process reads the cache itself

# Networks
latent_channels = 20             # channels of the latent, a quarter of the image size along each axis
normalise_latents = True         # latents to mean 0, std 1 per channel over the training set
aae_channels = (16, 32, 64)      # widths at full, half and quarter resolution
aae_blocks = 1                   # residual blocks a level
disc_channels = (32, 64)         # widths of the patch discriminator
unet_channels = (48, 96)         # widths of the latent U-Net, one a level
unet_blocks = 1                  # residual blocks a level
unet_attention = ()              # levels with self-attention, 0 the finest (always in the middle)
cond_channels = 64               # channels of the encoded source
cond_width = 24                  # first width of the source encoder
dropout = 0.0                    # in the middle of the U-Net
detail_branch = True             # stage 3: add R(source, D(z_0_hat)), a U-Net on the image grid
detail_channels = (32, 64, 96)   # its widths, one a level; it starts as a regression U-Net of the same, if there is one
checkpointing = False            # recompute activations in the backward pass: less memory, about a third more time

# Diffusion
predict = 'v'                    # v, z_0 or eps
schedule = 'scaled_linear'       # scaled_linear, linear or cosine; rescaled to zero terminal SNR for v and z_0
timesteps = 1000                 # T, time steps of the diffusion
loss_weight = 'none'             # none or min_snr
last_step_share = 0.15           # fraction of the training draws at t = T-1
label_drop = 0.3                 # probability that a label is replaced by "unknown" in training

# Training
aae_steps = 120                  # optimiser steps of stage 1
unet_steps = 120                 # of stage 2
post_steps = 75                  # of stage 3
batch_size = 16                  # samples a step and process; when memory runs out raise accumulate
accumulate = 1                   # gradient accumulation: steps of batch_size / accumulate samples at a time
optimizer = 'muon'               # muon (convolution kernels; AdamW for the rest) or adam
lr = 1e-3                        # peak learning rate of stage 2 (warm-up, then cosine to 1 %)
aae_lr = 1e-3                    # of stage 1 (the discriminator: a quarter)
post_lr = 5e-4                   # of stage 3
warmup = 50                      # steps of linear warm-up
grad_clip = 1.0                  # largest norm of the gradient
ema = 0.999                      # decay of the weight average, reached gradually
eval_every = 1000                # steps between validations
save_every = 250                 # steps between saves for resuming
w_adversarial = 1.0              # weight of the adversarial term against 100 x L1; 0 switches the discriminator off
disc_start = 40                  # the discriminator trains from step 0, its loss counts from this step on
disc_ramp = 40                   # ... and its weight rises over this many steps
regression = False               # train_unet.py: a U-Net on the image grid; stage 3's start, or a model of its own
regression_lr = 5e-4             # its peak learning rate
regression_channels = (32, 64, 96)  # its widths; with those of detail_channels stage 3 starts from it
regression_steps = 3400          # its steps
regression_w_lesion = 0.0        # its weight of the error in the lesion (its lesion head does without)

# Post-training
post_loss = 'l1'                 # l1; l2_l1: squared error in the mask, L1 in the lesion; lapt: LAPT's, see losses.py
lambda_t = 'constant'            # constant (1) or linear ((T-t)/T): weight of the pixel terms at time step t
w_diffusion = 0.1                # weight of the diffusion loss in stage 3
w_image = 0.5                    # weight of the error in the brain mask
w_lesion = 0.3                   # weight of the error in the lesion in stage 3
lesion_head = True               # detail branch, regression: a head decides where the lesion is; False: plain
w_head = 0.05                    # weight of its cross entropy with the lesion mask
lesion_odds = 8.0                # stage 3, inference: the image holds this many times the head's odds of a lesion
lesion_core = 0.9                # inference: the odds count within 6 mm of a voxel above this probability; 0: anywhere
label_head = True                # detail branch, regression of volumes with labels: one image a class; False: one image
lesion_floor = 0.1               # l1, l2_l1: a lesion below this share of the mask counts by its size, not fully
post_last_step_share = 0.95      # last_step_share of stage 3
detail_lr_scale = 0.1            # a detail branch that starts as the regression U-Net learns at post_lr times this
tune_decoder = True              # stage 3 also trains the decoder
crop = None                      # 3D: decode only a crop of this many voxels around the lesion, e.g. (64, 64, 64)

# Inference
split = 'test'                   # train, validation or test
sampler = 'one_step'             # one_step, ddim or ddpm
num_steps = 50                   # steps of ddim and ddpm
skip_latent = True               # one_step leaves the latent path out where stage 3 found that it adds nothing
samples = 1                      # latents averaged before decoding; their spread joins the std map
mirror = True                    # mean of the prediction and that of the left-right mirrored source: twice the time
guidance = 1.0                   # classifier-free guidance on the label; 1: off
label = 'unknown'                # unknown, true (read from data_info.csv, said in the summary) or a class number
eval_batch = 32                  # samples a forward pass without gradient
input = None                     # one new source file instead of a split
input_mask = None                # its brain mask
input_composite = None           # amyloid: the mask of the composite in which its SUVR is measured
out = None                       # output folder for --input
# ------------------------------------------------------------------------------------------------------------------

_MRI2PET_DATA = dict(
    task='mri2pet', source='{root}/whole_MRI/{id}.nii', targets={'suvr': '{root}/whole_Abeta/{id}.nii'},
    mask='{root}/mask/{id}.nii', lesion='{root}/roi/{id}.nii', w_lesion=0, lesion_head=False, trim=False,
    spatial_dims=3, context=0, frames=None, num_classes=2, unit_scale={'source': 1, 'suvr': 1},
    scaling={'source': ('quantile', 0.005, 0.995), 'suvr': ('range', 0, 3)})

PRESETS = {
    'ctp2dwi_demo': dict(),
    'mri2pet_demo': dict(
        _MRI2PET_DATA, exp='exp_mri2pet_demo', data_root='data/phantom_mri2pet',
        data_info='data/phantom_mri2pet/data_info',
        spacing=(4, 4, 4), image_size=(40, 48, 40), batch_size=4, eval_batch=4, aae_channels=(16, 32, 64),
        disc_channels=(16, 32), unet_channels=(64, 96), cond_width=16, cond_channels=32, detail_channels=(16, 32, 48),
        regression_channels=(16, 32, 48), regression_steps=600, aae_steps=100, unet_steps=150, post_steps=40,
        eval_every=150, save_every=150, disc_start=30, disc_ramp=30),
    # Full size, our recipe: LAPT's geometry and scale.
    'ctp2dwi': dict(
        exp='exp_ctp2dwi', data_root='data/ctp2dwi', data_info='data_info', spacing=(1, 1, None), image_size=(192, 224),
        aae_channels=(64, 128, 256), aae_blocks=2, disc_channels=(64, 128),
        unet_channels=(224, 448, 896), unet_attention=(1, 2),
        cond_channels=64, cond_width=64, detail_channels=(64, 128, 256),
        regression_channels=(64, 128, 256), regression_steps=200000, regression_lr=1e-4,
        aae_steps=100000, unet_steps=200000, post_steps=20000,
        batch_size=16, lr=1e-4, aae_lr=2e-4, post_lr=2e-5, warmup=1000, ema=0.9999, eval_every=5000, save_every=1000,
        disc_start=5000, disc_ramp=5000, shift=8),
    # Full size, our recipe: IL-CLDM's geometry and scale.
    'mri2pet': dict(
        _MRI2PET_DATA, exp='exp_mri2pet', data_root='data/mri2pet', data_info='data_info',
        spacing=(1, 1, 1), image_size=(160, 192, 160),
        latent_channels=4, aae_channels=(16, 32, 64), disc_channels=(16, 32),
        unet_channels=(128, 128, 256, 512), unet_attention=(3,),
        cond_channels=32, cond_width=16, detail_channels=(16, 32, 64),
        regression_channels=(16, 32, 64), regression_steps=100000, regression_lr=1e-4,
        aae_steps=50000, unet_steps=100000, post_steps=10000,
        batch_size=1, eval_batch=1, lr=1e-4, aae_lr=2e-4, post_lr=2e-5, warmup=1000, ema=0.9999,
        eval_every=5000, save_every=1000,
        disc_start=5000, disc_ramp=5000, shift=4, crop=(96, 96, 96), checkpointing=True),
    # The papers' own recipes. Departures of lapt: no vector quantisation (the latent is continuous), no perceptual
    # loss, slices at the given spacing, the source encoded by a small trained network to the latent grid, L1 x 100 as
    # reconstruction loss, no norms in the decoder at full resolution.
    'lapt': dict(
        exp='exp_lapt', data_root='data/ctp2dwi', data_info='data_info', spacing=(1, 1, None), image_size=(192, 224),
        scaling={'source': ('range', 0, 200), 'dwi': ('quantile', 0.005, 0.995), 'adc': ('quantile', 0.005, 0.995)},
        context=0, latent_channels=3, normalise_latents=False, aae_channels=(64, 128, 256), aae_blocks=2,
        disc_channels=(64, 128), unet_channels=(224, 896, 1792), unet_attention=(1, 2), cond_channels=15, cond_width=64,
        detail_branch=False, predict='eps', schedule='scaled_linear', last_step_share=0, label_drop=0,
        aae_steps=100000, unet_steps=200000, post_steps=20000, batch_size=6, lr=4.8e-5,
        aae_lr=4.5e-6 * 8, post_lr=1.2e-5, warmup=1, optimizer='adam', ema=0.9999, eval_every=10000, save_every=1000,
        disc_start=5000, disc_ramp=1, flip=False, shift=0, trim=False, post_loss='lapt', lambda_t='linear',
        w_diffusion=1.0, w_image=0.01, w_lesion=0.02, post_last_step_share=0, tune_decoder=False, sampler='ddim',
        mirror=False),
    # Departures of il_cldm: the label is known in training and absent at sampling as published, but through the learned
    # "unknown" embedding; stage 3 does not exist there (post_steps = 0); best checkpoint by psnr alone; 999 steps
    # become T; no norms in the decoder at full resolution.
    'il_cldm': dict(
        _MRI2PET_DATA, exp='exp_il_cldm', data_root='data/mri2pet', data_info='data_info',
        spacing=(1, 1, 1), image_size=(160, 192, 160),
        latent_channels=1, normalise_latents=False, aae_channels=(16, 32, 64), disc_channels=(16, 32),
        unet_channels=(128, 128, 256, 512), unet_attention=(3,), cond_channels=1, cond_width=16, detail_branch=False,
        predict='eps', schedule='linear', last_step_share=0, label_drop=0, aae_steps=50000, unet_steps=100000,
        post_steps=0, batch_size=1, eval_batch=1, lr=1e-4, aae_lr=1e-4, warmup=1, optimizer='adam', ema=0.9999,
        eval_every=25000, save_every=1000, disc_start=1000, disc_ramp=1, flip=False, shift=0, checkpointing=True,
        sampler='ddpm', num_steps=1000, mirror=False, w_diffusion=1.0, post_last_step_share=0),
}
# Your own data: PRESETS['mine'] = dict(PRESETS['ctp2dwi'], exp=..., data_root=..., data_info=...); README, Layouts.

_NO_SETTING = (types.ModuleType, type, types.FunctionType)
DEFAULTS = {k: v for k, v in list(globals().items()) if k[0].islower() and not isinstance(v, _NO_SETTING)}


class Settings(types.SimpleNamespace):
    """All settings as attributes. `origin[name]` is 'config.py', 'preset' or 'command line'."""

    def as_dict(self):
        return {name: getattr(self, name) for name in DEFAULTS}

    def changes(self):
        """Lines 'name = value (origin)' of all values that are not the constant's."""
        return [f'{name} = {getattr(self, name)!r} ({self.origin[name]})'
                for name in DEFAULTS if getattr(self, name) != DEFAULTS[name]]


def comments():
    """The trailing comment of each constant, read from this file."""
    found = re.findall(r'^([a-z_]+) = .*?  +# (.*)$', Path(__file__).read_text(encoding='utf-8'), flags=re.M)
    return {name: text for name, text in found if name in DEFAULTS}


def load(description='', argv=None, extra=None):
    """Settings from the constants, the preset and the command line (argv, default sys.argv[1:]).

    extra: {name: (default, help)} of flags that only one script has, as strings; a default of False makes it a switch.
    Raises SettingError for an unknown name, a wrong type or an impossible combination.
    """
    argv, extra = list(sys.argv[1:] if argv is None else argv), extra or {}
    if '--help' in argv or '-h' in argv:
        print(usage(description, extra))
        raise SystemExit(0)
    given, flags = settings.read_words(argv, DEFAULTS, extra)
    cfg = Settings(**DEFAULTS, **flags, origin={})
    chosen = settings.check('preset', given.get('preset', preset), preset)
    if chosen not in PRESETS:
        near = difflib.get_close_matches(chosen, PRESETS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f': {", ".join(PRESETS)}'
        raise SettingError(f"there is no preset '{chosen}'{hint}")
    for values, origin in ((DEFAULTS, 'config.py'), (PRESETS[chosen], f'preset {chosen}'), (given, 'command line')):
        for name, value in values.items():
            if name not in DEFAULTS:
                raise settings.unknown(name, DEFAULTS)
            setattr(cfg, name, settings.check(name, value, DEFAULTS[name]))
            cfg.origin[name] = origin
    cfg.preset = chosen
    settings.validate(cfg, DEFAULTS)
    return cfg


def usage(description, extra=None):
    """The text of --help: every setting, its default and its comment."""
    notes = comments()
    lines = [description.strip(), '', 'Settings (--name value; constants in config.py < preset < command line):']
    for name, (default, text) in (extra or {}).items():
        lines.append(f'  --{name:<21} {text} [{default}]')
    for name, value in DEFAULTS.items():
        shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + '...'
        lines.append(f'  --{name:<21} {notes.get(name, "")} [{shown}]')
    return '\n'.join(lines)
