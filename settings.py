"""
What values the settings of config.py may have, and how the command line gives them. No need to edit this file.
"""

import ast
import difflib
import re

CHOICES = dict(
    task=('ctp2dwi', 'mri2pet'), precision=('auto', 'fp32', 'bf16', 'fp16'),
    spatial_dims=(2, 3), optimizer=('muon', 'adam'), predict=('v', 'z_0', 'eps'),
    schedule=('scaled_linear', 'linear', 'cosine'), loss_weight=('none', 'min_snr'), lambda_t=('constant', 'linear'),
    post_loss=('l1', 'l2_l1', 'lapt'), sampler=('one_step', 'ddim', 'ddpm'), split=('train', 'validation', 'test'))
KINDS = {  # whatever the constants are edited to; all others are strings
    int: 'seed spatial_dims context frames num_classes shift workers latent_channels aae_blocks unet_blocks '
         'cond_channels cond_width timesteps aae_steps unet_steps post_steps batch_size accumulate warmup eval_every '
         'save_every disc_start disc_ramp regression_steps num_steps samples eval_batch',
    float: 'frame_spacing frame_interval suvr_positive source_noise dropout last_step_share label_drop lr aae_lr '
           'post_lr grad_clip ema w_adversarial regression_lr regression_w_lesion w_diffusion w_image w_lesion w_head '
           'lesion_odds lesion_core lesion_floor post_last_step_share detail_lr_scale guidance',
    bool: 'resample flip trim normalise_latents detail_branch checkpointing regression lesion_head label_head '
          'tune_decoder mirror skip_latent',
    tuple: 'lesion_rule spacing image_size aae_channels disc_channels unet_channels unet_attention detail_channels '
           'regression_channels crop',
    dict: 'targets scaling unit_scale'}
KINDS = {name: kind for kind, names in KINDS.items() for name in names.split()}
MAY_BE_NONE = ('init_from pretrained mask lesion frames frame_spacing frame_interval crop input input_mask '
               'input_composite out').split()
ITEMS = dict(targets=(str,), scaling=(tuple, list), unit_scale=(int, float))
AT_MOST_1 = ('ema', 'last_step_share', 'post_last_step_share', 'label_drop', 'dropout', 'lesion_core')
POSITIVE = ('batch_size', 'accumulate', 'lr', 'aae_lr', 'regression_lr', 'post_lr', 'eval_every', 'save_every',
            'warmup', 'num_steps', 'samples', 'timesteps', 'latent_channels', 'cond_channels', 'cond_width',
            'eval_batch', 'grad_clip', 'aae_blocks', 'unet_blocks', 'frame_spacing', 'frame_interval', 'lesion_odds')


class SettingError(ValueError):
    """A setting that does not exist or has a wrong value; the message is one sentence for the user."""
    one_sentence = True


def unknown(name, known):
    """SettingError for a name that is none."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else '; --help lists them all'
    return SettingError(f"there is no setting '{name}'{hint}")


def check(name, value, default):
    """The value in the setting's type (an int becomes a float, a list a tuple); SettingError if it cannot be."""
    kind = KINDS.get(name, str)
    if value is None and name in MAY_BE_NONE:
        return None
    if (kind, type(value)) in ((float, int), (tuple, list), (str, int)):
        value = kind(value)
    if type(value) is not kind:
        like = f', as in {name} = {default!r},' if type(default) is kind else ','
        raise SettingError(f"setting '{name}' must be {kind.__name__}{like} not {value!r}")
    if name in CHOICES and value not in CHOICES[name]:
        near = difflib.get_close_matches(str(value), [str(c) for c in CHOICES[name]], n=1)
        raise SettingError(f"setting '{name}' is {value!r}, must be one of {', '.join(map(str, CHOICES[name]))}" +
                           (f"; did you mean '{near[0]}'?" if near else ''))
    if name in POSITIVE and not value > 0:
        raise SettingError(f"setting '{name}' is {value!r}, must be above 0")
    if kind in (int, float) and not 0 <= value <= (1 if name in AT_MOST_1 else float('inf')):
        raise SettingError(f"setting '{name}' is {value!r}, must {'be at most 1' if value > 0 else 'not be negative'}")
    if kind is dict and not all(type(v) in ITEMS[name] for v in value.values()):
        raise SettingError(f"setting '{name}' must hold {' or '.join(k.__name__ for k in ITEMS[name])}s: {default}")
    return value


def parse(name, text, default):
    """A command-line string as the setting's type."""
    kind = KINDS.get(name, str)
    if text == 'None' and name in MAY_BE_NONE:
        return None
    if kind is str:
        return check(name, text, default)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is tuple and type(value) is int:
        value = (value,)
    return check(name, value, default)


def read_words(argv, defaults, extra):
    """Command line -> (settings given, flags of this script); see config.load."""
    argv, given, flags = list(argv), {}, {name: default for name, (default, _) in extra.items()}
    while argv:
        word = argv.pop(0)
        if not word.startswith('--'):
            raise SettingError(f"'{word}' is not understood: settings are given as --name value")
        name, _, text = word[2:].partition('=')
        name = name.replace('-', '_')
        if name not in defaults and name not in extra:
            raise unknown(name, [*defaults, *extra])
        if name in extra and extra[name][0] is False:  # a switch: --restart, or --restart=False
            if text not in ('', 'True', 'False'):
                raise SettingError(f"--{name} is a switch: it takes True or False, not '{text}'")
            flags[name] = text != 'False'
            continue
        if '=' not in word:
            if not argv:
                raise SettingError(f"setting '{name}' has no value: --{name} VALUE")
            text = argv.pop(0)
        if name in extra:
            flags[name] = text
        else:
            given[name] = parse(name, text, defaults[name])
    return given, flags


def validate(cfg, defaults):
    """What one setting demands of another; SettingError otherwise."""
    dims = cfg.spatial_dims
    for name in ('spacing', 'image_size') + (('crop',) if cfg.crop else ()):
        n = 3 if name == 'spacing' else dims
        if len(getattr(cfg, name)) != n:
            raise SettingError(f'{name} = {getattr(cfg, name)} needs {n} values with spatial_dims = {dims}')
    if any(mm is not None and not (type(mm) in (int, float) and mm > 0) for mm in cfg.spacing):
        raise SettingError(f'spacing = {cfg.spacing} must be numbers of mm above 0, or None to keep an axis')
    for name in (name for name in KINDS if KINDS[name] is tuple and name.endswith('_channels')):
        widths, least = getattr(cfg, name), 3 if name == 'aae_channels' else 1
        wrong, more = any(type(w) is not int or w < 1 for w in widths), '' if name == 'aae_channels' else ' or more'
        if wrong or len(widths) < least or (not more and len(widths) > least):
            raise SettingError(f'{name} = {widths} must be {least}{more} numbers above 0, as in {defaults[name]}')
    for name in ('image_size', 'crop'):
        if any(type(n) is not int or n < 8 or n % 4 for n in getattr(cfg, name) or ()):
            raise SettingError(f'{name} = {getattr(cfg, name)} must be whole multiples of 4, at least 8: '
                               'the autoencoder divides by 4')
    for table in ('scaling', 'unit_scale'):
        missing = {'source', *cfg.targets} - set(getattr(cfg, table))
        if missing:
            raise SettingError(f"{table} has no entry for {', '.join(sorted(missing))}, "
                               f"only for {', '.join(getattr(cfg, table))}")
    for name, rule in cfg.scaling.items():
        if (len(rule) != 3 or rule[0] not in ('range', 'median', 'quantile')
                or not all(type(x) in (int, float) for x in rule[1:]) or not rule[1] < rule[2]):
            raise SettingError(f"scaling of '{name}' is {rule!r}, must be ('range', lo, hi), ('median', lo, hi) "
                               "or ('quantile', a, b)")
    taken = [name for name in cfg.targets if name in ('source', 'mask', 'lesion', 'lesion_probability', 'lesion_rule')
             or name.endswith(('_std', '_half_90')) or not re.fullmatch(r'[\w.-]+', name)]
    if taken:
        raise SettingError(f"targets has '{taken[0]}', the name of another image or no plain one; choose another")
    if not cfg.targets:
        raise SettingError('targets is empty: name at least one target image')
    if cfg.predict == 'eps' and cfg.sampler == 'one_step':
        raise SettingError("sampler 'one_step' is refused with predict 'eps' (at T-1 its error is multiplied by 84): "
                           'use --sampler ddim')
    if cfg.sampler != 'one_step' and cfg.num_steps > cfg.timesteps:
        raise SettingError(f'num_steps {cfg.num_steps} must be at most timesteps {cfg.timesteps}')
    if len(cfg.lesion_rule) != 3 or any(type(x) not in (int, float) or x < 0 for x in cfg.lesion_rule):
        raise SettingError(f'lesion_rule = {cfg.lesion_rule} must be three numbers, as in {defaults["lesion_rule"]}')
    if cfg.timesteps < 2:
        raise SettingError(f'timesteps = {cfg.timesteps} must be 2 or more')
    if any(type(level) is not int or not 0 <= level < len(cfg.unet_channels) for level in cfg.unet_attention):
        raise SettingError(f'unet_attention = {cfg.unet_attention} must name levels 0 to {len(cfg.unet_channels) - 1}, '
                           f'those of unet_channels = {cfg.unet_channels}')
    if cfg.crop and dims == 2:
        raise SettingError(f'crop = {cfg.crop} is for volumes: with spatial_dims = 2 set crop = None')
    if cfg.context and dims == 3:
        raise SettingError(f'context = {cfg.context} is for slices: with spatial_dims = 3 set context = 0')
    if cfg.batch_size % cfg.accumulate:
        raise SettingError(f'batch_size {cfg.batch_size} must be a multiple of accumulate {cfg.accumulate}')
    if cfg.label not in ('unknown', 'true') and not (cfg.label.isdigit() and int(cfg.label) < cfg.num_classes):
        raise SettingError(f"label '{cfg.label}' must be unknown, true or a class number below "
                           f'num_classes = {cfg.num_classes}')
    if not re.fullmatch(r'[\w.-]+', cfg.exp) or not cfg.exp.strip('.'):
        raise SettingError(f"exp '{cfg.exp}' must be a plain folder name")
