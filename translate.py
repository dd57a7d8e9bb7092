"""
From source to prediction: the trained networks of an experiment, loaded from its checkpoints, and the way through them.

Part of infer.py: validation during training and batch inference both go through `translate`.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import grid
import utils
from diffusion import Diffusion, sample
from model import AAE, PixelUNet, UNet, fingerprint, latent_grid

CORE_REACH = 6  # mm: how far from a voxel that is surely a lesion lesion_odds count


@dataclass
class Model:
    """The networks of one experiment and what is needed to apply them; what it has not is None."""
    aae: AAE = None
    unet: UNet = None
    diffusion: Diffusion = None
    detail: PixelUNet = None
    regression: PixelUNet = None
    prep: dict = None        # dataset.Spec.travel(): task, geometry, scaling
    mean_image: dict = None  # the training set's mean target
    qc: dict = None          # what a good source looks like (quality.qc_fit)
    stage: str = 'aae'       # aae, unet, post or regression
    origin: str = ''         # which checkpoint, for people
    trained_on: frozenset = frozenset()  # whom all of these networks were trained on (stage.subject_keys)
    latent_adds: bool = True  # whether the latent path adds anything to the detail branch's images (post_train.py)

    def decode(self, z_0, source, features, shares=None, **how):
        """Latents (B, c, *s), source (B, C, *S), the U-Net's features -> images (B, K, *S): D(z_0), or g D(z_0) + R.

        shares and how (logit, odds, apart, chances): as PixelUNet takes them; what a head gives is None without one.
        """
        pred = self.aae.decode(z_0)
        if self.detail is not None:
            return self.detail(source, pred, features, shares=shares, **how)
        return (pred, None, None, None) if how.get('apart') else (pred, None) if how.get('logit') else pred

    @property
    def lesion_head(self):
        """Whether predictions have the probability of a lesion as a further channel."""
        net = self.regression or self.detail
        return net is not None and net.args['lesion_head']

    @property
    def prior(self):
        """The label head's LabelPrior, or None without one."""
        net = self.regression or self.detail
        return None if net is None else net.prior

    def shares(self, source, label=None, **how):
        """What of each class's image the label head takes for sources and labels (LabelPrior.shares), or None."""
        return None if self.prior is None else self.prior.shares(source, label, **how)

    def skips_latent(self, how):
        """Whether the detail branch alone makes the images (not if it is to sample); how: Sampling or settings."""
        asked = how.sampler != 'one_step' or how.samples != 1 or how.guidance != 1
        return how.skip_latent and not self.latent_adds and not asked

    def eval(self):
        for net in filter(None, (self.aae, self.unet, self.detail, self.regression)):
            net.eval()
        return self


@dataclass
class Sampling:
    """How to sample: the settings of infer.py of the same names."""
    sampler: str = 'one_step'
    num_steps: int = 50
    samples: int = 1
    guidance: float = 1.0
    seed: int = 0
    mirror: bool = False
    eval_batch: int = 32
    lesion_odds: float = 1.0
    lesion_core: float = 0.0
    reach: tuple = (1, 1, 1)  # CORE_REACH in voxels: slices, x, y of 2D items; x, y, z of volumes
    trim: bool = False        # as the network was trained (Spec.trim)
    skip_latent: bool = True

    @classmethod
    def of(cls, cfg, spec):
        return cls(cfg.sampler, cfg.num_steps, cfg.samples, cfg.guidance, cfg.seed, cfg.mirror, cfg.eval_batch,
                   cfg.lesion_odds, cfg.lesion_core, trim=spec.trim, skip_latent=cfg.skip_latent)

    def at(self, subject):
        """The same for one subject: CORE_REACH in its voxels, which `spacing` need not say."""
        size = np.linalg.norm(subject.grid[1][:3, :3], axis=0)
        voxels = [max(1, round(CORE_REACH / mm)) for mm in size]
        return replace(self, reach=(1, *voxels[:2]) if subject.spec.spatial_dims == 2 else tuple(voxels))


# ------------------------------------------------------------------------------------------------------------------
# Checkpoint -> model

OLDER = dict(context=0, trim=False)  # what a checkpoint means that does not say it

def places(cfg):
    """Where an experiment's checkpoints may lie: result/<exp>, result/<init_from>, and what that one began from."""
    found, exp = [Path('result') / cfg.exp], cfg.init_from
    while exp and Path('result') / exp not in found:
        found.append(Path('result') / exp)
        try:
            exp = json.loads((found[-1] / 'config.json').read_text()).get('init_from')
        except (OSError, ValueError, AttributeError):
            exp = None
    return found


def checkpoint_path(cfg, stage):
    """The checkpoint of an earlier stage, from the first of its `places` that has it."""
    paths = [place / f'{utils.BEST[stage]}.pth.tar' for place in places(cfg)]
    return next((path for path in paths if path.exists()), paths[min(1, len(paths) - 1)])


def differing(theirs, ours, source=True):
    """Settings in which two ways to make arrays (Spec.travel()) differ for a network, with or without the source's."""
    names = ['spatial_dims', 'spacing', 'target_names', *['context', 'frames', 'frame_spacing'] * source]
    images = [*ours['target_names'], *['source'] * source]
    scaled = [f'scaling of {name}' for name in images if theirs['scaling'].get(name) != ours['scaling'].get(name)]
    return [name for name in names if theirs.get(name) != ours.get(name)] + scaled  # older files lack some


def load_aae(cfg, run):
    """The autoencoder of stage 1 -> (Model with only the aae, its checkpoint)."""
    path = checkpoint_path(cfg, 'aae')
    data = utils.load_checkpoint(path, 'aae')
    with utils.reading(path, 'run train_aae.py again'):
        aae = AAE(**data['args'])
        utils.load_weights(aae, data['net'], path)
        model = Model(run.place(aae).eval().requires_grad_(False), prep=OLDER | data['prep'],
                      mean_image=data['mean_image'], trained_on=frozenset(data.get('trained_on', ())))
        model.origin = f"{utils.BEST['aae']} at step {data['step']}"
    return model, data


def found_stage(cfg):
    """The first of post, unet and regression that has been trained, in the first of the `places` that has any."""
    for place in places(cfg):
        for stage in ('post', 'unet', 'regression'):
            if (place / f'{utils.BEST[stage]}.pth.tar').exists():
                return stage
    return 'unet'


def load_model(cfg, run, stage='auto'):
    """The model of a stage: 'post', 'unet', 'regression', 'aae', or 'auto' (found_stage). EMA weights.

    A regression needs no autoencoder, and has none. RunError if a checkpoint is missing or belongs to another one.
    """
    stage = found_stage(cfg) if stage == 'auto' else stage
    model = Model() if stage == 'regression' else load_aae(cfg, run)[0]
    if stage == 'aae':
        return model
    path = checkpoint_path(cfg, stage)
    data = utils.load_checkpoint(path, stage)
    with utils.reading(path, 'run the stage that writes it again'):
        return _add_networks(cfg, run, model, stage, path, data)


def _add_networks(cfg, run, model, stage, path, data):
    """The networks of a stage's checkpoint, beside the autoencoder they belong to."""
    if data.get('aae') and data['aae'] != fingerprint(model.aae):
        raise utils.RunError(f"{path} was trained on another autoencoder (fingerprint {data['aae']}) than "
                             f"{checkpoint_path(cfg, 'aae')} holds ({fingerprint(model.aae)}); "
                             'run train_unet.py --restart, then post_train.py --restart')
    before = checkpoint_path(cfg, 'unet')
    if stage == 'post' and data.get('unet') and before.exists():
        if data['unet'] != fingerprint(utils.load_checkpoint(before, 'unet')['net']):
            raise utils.RunError(f'{path} was trained from another U-Net than {before} holds now; run post_train.py '
                                 '--restart, or infer.py --stage unet')
    model.stage, model.qc = stage, data.get('qc')
    model.trained_on |= frozenset(data.get('trained_on', ()))
    model.origin = f"{utils.BEST[stage]} (EMA weights) at step {data['step']}"
    model.prep, model.latent_adds = OLDER | data['prep'], data.get('latent_adds', True)
    if stage == 'regression':
        model.mean_image = data.get('mean_image')  # older files have none
        model.regression = run.place(PixelUNet(**data['args']))
        utils.load_weights(model.regression, data['net'], path)
        return model.eval()
    model.unet = run.place(UNet(**data['args']), latent_grid(model.prep['image_size'] or ()))
    model.diffusion = Diffusion(**data['diffusion']).to(run.device)
    utils.load_weights(model.unet, data['net'], path)
    if data.get('decoder'):
        utils.load_weights(model.aae.decoder, data['decoder'], path)
    if data.get('detail'):
        model.detail = run.place(PixelUNet(**data['detail_args']))
        utils.load_weights(model.detail, data['detail'], path)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------
# Source -> prediction

def starting_noise(key, shape, k, device):
    """A function drawing noise (1, c, *s) for a subject's k-th sample, keyed by seed and subject, not by batch."""
    generator = torch.Generator().manual_seed(utils.seed_key('noise', *key, k))
    return lambda: torch.randn((1, *shape), generator=generator).to(device)


@torch.no_grad()
def translate(run, model, source, key, how, label=None, mask=None):
    """Translate the items of one subject: pred (N, K, *S), std (N, K, *S) or None, as scaled, from its Subject.stacked.

    With a lesion head pred has one channel more: the probability of a lesion, 0..1.

    All slices start from the same noise, keyed by `key` = subject ID. how.samples latents are averaged before decoding.
    how.mirror: all of it once more for the mirrored source, and the mean of both images. std^2 = (what the heads
    doubt)^2, see `doubt`, the mean of both + (half the difference of both images)^2 + the variance of the decoded
    samples; None without heads, mirroring and samples. label: class number, or None for unknown. mask (N, 1, *S): the
    brain, for how.trim; None: source > -1. ValueError if one_step is asked of an eps network.
    """
    source = torch.from_numpy(np.ascontiguousarray(source))
    mask = (source > -1).any(1, keepdim=True).numpy() if mask is None else mask
    images, doubts = _translate_view(run, model, source, mask, key, how, label)
    variance = [] if doubts is None else [doubts ** 2]
    if how.mirror:
        other, theirs = _translate_view(run, model, source.flip(2), mask[:, :, ::-1], key, how, label)
        variance = [] if doubts is None else [(doubts ** 2 + theirs.flip(2) ** 2) / 2]
        variance.append((images[0] - other[0].flip(2)) ** 2 / 4)
        images = (images + other.flip(3)) / 2
    if len(images) > 1:
        variance.append(images[1:].var(0))
    targets = images.shape[2] - model.lesion_head  # not the probability
    if not torch.isfinite(images).all():
        raise utils.RunError(f'{key}: the prediction is not finite; use --precision fp32, or train anew')
    return images[0].numpy(), sum(v[:, :targets] for v in variance).sqrt().numpy() if variance else None


def _translate_view(run, model, source, mask, key, how, label):
    """All items of a subject (N, C, *S) -> (1, N, K, *S), the prediction, after which, with how.samples = m > 1, come m
    samples; and the prediction's doubt (N, K, *S) or None."""
    whole = None
    for numbers, box in grid.batches(mask, how.eval_batch, how.trim):
        with run.autocast():
            images = _translate_items(model, source[(numbers, slice(None), *box)].to(run.device), key, how, label,
                                      source.shape[2:], box)
        whole = whole or [[_empty(x, source, value) for x, value in zip(image, EMPTY, strict=True)] for image in images]
        for image, parts in zip(whole, images, strict=True):
            for into, part in zip(image, parts, strict=True):
                if part is not None:
                    into[(numbers, slice(None), *box)] = part.float().cpu()
    return torch.stack([decide(*image[:3], how) for image in whole]), doubt(*whole[0][1:], how)


EMPTY = -1.0, 0.0, -30.0, 0.0  # healthy, change, logit, spread where nothing is computed: background, no lesion


def _empty(part, source, value):
    """What a network gives of all items of a source, with a value everywhere; None if it gives None."""
    return None if part is None else torch.full((len(source), part.shape[1], *source.shape[2:]), value)


def _translate_items(model, source, key, how, label, shape, box):
    """Source (n, C, *S) -> [(healthy, change, logit, spread)] of the prediction, and if how.samples > 1 of each sample.

    shape, box: the whole image's spatial shape and the part of it (slices) that the source is.
    """
    labels = None if label is None else torch.full((len(source),), label, device=source.device)
    mix = dict(shares=model.shares(source, labels), chances=model.shares(source, labels, power=1), apart=True)
    if model.regression is not None:
        return [model.regression(source, **mix)]
    if model.skips_latent(how):
        return [model.detail(source, **mix)]
    cond = model.unet.encode_source(source)
    factor = model.aae.factor
    part = tuple(slice(b.start // factor, b.start // factor + n // factor)
                 for b, n in zip(box, source.shape[2:], strict=True))
    shape = (model.aae.args['latent_channels'], *[n // factor for n in shape])
    samples = [_sample_latents(model, cond, starting_noise((how.seed, key), shape, k, source.device), part, how, label)
               for k in range(how.samples)]
    mean = [torch.stack(parts).mean(0) for parts in zip(*samples, strict=True)]
    return [model.decode(z_0, source, features, **mix)
            for z_0, features in ([mean, *samples] if how.samples > 1 else [mean])]


def decide(healthy, change, logit, how):
    """The images of all items of a subject (N, K, *S), and the lesion's probability as channel K + 1.

    healthy + q change (PixelUNet), q of `lesion_share`.
    """
    if logit is None:
        return healthy
    return torch.cat([healthy + lesion_share(logit, how) * change, logit.sigmoid()], dim=1)


def doubt(change, logit, spread, how):
    """How far the truth is from the images, by what the heads hold likely, (N, K, *S); None without a head.

    doubt^2 = change^2 (p (1 - q)^2 + (1 - p) q^2) + spread^2: with probability p there is a lesion, where the image
    holds the share q of its change; spread: the same of the classes of a label head (PixelUNet).
    """
    if logit is None:
        return spread
    p, q = logit.sigmoid(), lesion_share(logit, how)
    lesion = change.abs() * (p * (1 - q) ** 2 + (1 - p) * q ** 2).sqrt()
    return lesion if spread is None else torch.hypot(lesion, spread)


def lesion_share(logit, how):
    """q (N, 1, *S), which share of a lesion's change the images hold: sigmoid(logit + log(odds)).

    The odds count only near a voxel that is surely a lesion, p > how.lesion_core: at most how.reach voxels from it
    along each axis (slices of 2D items are an axis, the first). Elsewhere q = p: what might be a lesion, and is none in
    most cases, is not made one.
    """
    more = math.log(how.lesion_odds)
    if how.lesion_core > 0:
        volume = logit[None].movedim(2, 1) if logit.ndim == 4 else logit  # slices (N, 1, X, Y) -> (1, 1, N, X, Y)
        for axis, r in enumerate(how.reach, start=2):  # the largest within reach, one axis after the other
            lines = F.pad(volume, [0, 0] * (4 - axis) + [r, r], value=-math.inf)
            moved = [lines.narrow(axis, k, volume.shape[axis]) for k in range(2 * r + 1)]
            volume = reduce(torch.maximum, moved)
        more = more * (volume.view_as(logit).sigmoid() > how.lesion_core)
    return (logit + more).sigmoid()


def _sample_latents(model, cond, draw, part, how, label):
    """(z_0, the U-Net's features in the last step) of each item of a batch of slices (or volumes) of one subject.

    draw() gives noise for the whole image, part: which of it these items have (slices).
    """
    n, unet = len(cond), model.unet
    labels = None if label is None else torch.full((n,), label, device=cond.device)
    features = None

    def net(z_t, t):
        nonlocal features
        out, features = unet(z_t, t, cond=cond, label=labels, features=True)
        out = out.float()
        if how.guidance != 1 and labels is not None:
            unknown = unet(z_t, t, cond=cond).float()
            out = unknown + how.guidance * (out - unknown)
        return out

    def noise(z=None):
        return draw()[(..., *part)].expand(n, -1, *cond.shape[2:])

    return sample(model.diffusion, net, noise(), how.sampler, how.num_steps, noise), features


@torch.no_grad()
def label_probability(run, model, source):
    """The probability of each class from a subject's source alone (LabelPrior), as a list; None without label head."""
    if model.prior is None:
        return None
    return [round(p, 4) for p in model.prior(torch.from_numpy(source).to(run.device)).mean(0).tolist()]


def mean_prediction(mean_image, subject):
    """The training set's mean image on a subject's grid, slices matched by distance from the brain's middle one."""
    rows = np.flatnonzero(subject.mask.reshape(len(subject.mask), -1).any(1))
    image, offset = mean_image['image'].numpy(), mean_image['centre'] - int(rows[0] + rows[-1]) // 2
    image = image[np.clip(np.arange(len(subject.mask)) + offset, 0, len(image) - 1)]
    return _around_centre(image, subject.mask.shape[2:])


def _around_centre(image, size):
    """Images (N, K, *S) of another image_size, cut or filled with background around the centre to `size`."""
    for axis, n in enumerate(size, start=2):
        have = image.shape[axis]
        start = max(0, (have - n) // 2)
        image = np.take(image, range(start, start + min(n, have)), axis)
        before = (n - image.shape[axis]) // 2
        room = [(0, 0)] * axis + [(before, n - image.shape[axis] - before)] + [(0, 0)] * (image.ndim - axis - 1)
        image = np.pad(image, room, constant_values=-1)
    return image
