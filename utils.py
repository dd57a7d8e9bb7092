"""
Plumbing that knows no image: device, precision, processes, seeds, learning rate, weight average, checkpoints.

Randomness is keyed by (seed, rank, step) and schedules are functions of the step: all that a checkpoint must hold are
weights and optimisers.
"""

import contextlib
import copy
import errno
import gc
import hashlib
import math
import os
import pickle
import sys
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

BEST = dict(aae='CHECKPOINT_AAE', unet='CHECKPOINT_Unet', post='CHECKPOINT_Unet_post',
            regression='CHECKPOINT_regression')
LESION_MAP = 'lesion_probability.nii.gz'  # beside the images, where there is a lesion head
PATIENCE = timedelta(hours=2)  # how long a process waits for the others: the first one reads and caches all subjects

REMEDY = {number: f'; {text}' for text, numbers in {
    'free some space and run the same command again': (errno.ENOSPC, errno.EFBIG, errno.EDQUOT),
    'move away the file that is in the place of a folder': (errno.EEXIST, errno.ENOTDIR),
    'move away the folder that is in the place of this file': (errno.EISDIR,),
    'mend its rights or choose another place': (errno.EACCES, errno.EPERM, errno.EROFS)}.items() for number in numbers}
OUT_OF_MEMORY = ('out of memory: set accumulate (the effective batch stays) or checkpointing, lower eval_batch or '
                 'batch_size, or choose a smaller image_size')


class RunError(RuntimeError):
    """Something the user can mend; the message is one sentence."""
    one_sentence = True


def cli(main):
    """Run a script's main(): what the user can mend ends in one sentence on standard error and exit code 1."""
    said = None
    try:
        main()
    except (Exception, KeyboardInterrupt) as err:
        said = _sentence(err)
        if said is None:
            raise
    if said is not None:
        gc.collect()  # the failed run's progress bar ends before the sentence, not after it
        sys.exit(said)  # without taking leave of the other processes: they may wait for this one; torchrun ends them
    if dist.is_initialized():
        dist.destroy_process_group()


def _sentence(err):
    """What to tell of an error in one sentence; None if it is a fault of the software, whose traceback is needed."""
    if isinstance(err, KeyboardInterrupt):
        return 'interrupted; run the same command again to go on'
    if isinstance(err, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(err):
        return OUT_OF_MEMORY
    if isinstance(err, OSError):
        return f"{err.filename or 'a file'}: {err.strerror or err}" + REMEDY.get(err.errno, '')
    if getattr(err, 'one_sentence', False):
        return str(err)
    words = ('Connection closed by peer', 'Connection reset', 'Broken pipe', 'Timed out waiting', 'ncclRemoteError',
             'Socket')
    if dist.is_initialized() and isinstance(err, RuntimeError):
        if any(word in str(err) for word in words):
            return 'another process of this run has stopped; its sentence says why'
        if 'NCCL' in str(err):  # on all of them alike
            return f'the GPUs cannot work together: {str(err).strip().splitlines()[-1]} (NCCL_DEBUG=INFO says more)'
    return None


# ------------------------------------------------------------------------------------------------------------------
# Device, precision, processes

def _environment(name, default):
    """A number that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise RunError(f"the environment variable {name} is '{text}', not a number; unset it, or start with torchrun")
    return int(text)


def cpu_flags():
    """What this CPU can do, as Linux names it: {'avx2', 'avx512f', 'amx_bf16', ...}; empty where it does not say."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return set()
    return set(next((x for x in lines if x.startswith('flags')), ':').split(':')[1].split())


def fast_bf16():
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool(cpu_flags() & {'avx512_bf16', 'amx_bf16'})


def machine():
    """How fast a step is here, 'fast' (a GPU, AMX), 'bf16' (another CPU that is fast in it) or 'slow'; the threads."""
    fast = torch.cuda.is_available() or 'amx_bf16' in cpu_flags()
    return 'fast' if fast else 'bf16' if fast_bf16() else 'slow', torch.get_num_threads()


class Run:
    """Where and how to compute: device, autocast, processes (torchrun), backward. One process is no special case.

    training: False where nothing is trained, which only decides the memory format.
    """

    def __init__(self, device='auto', precision='auto', training=True):
        self.training = training
        self.rank, self.world, local = (_environment(name, default) for name, default in
                                        (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
        if device in ('auto', 'cuda') and torch.cuda.is_available():
            device = f'cuda:{local}'
        elif self.world > 1 and str(device).startswith('cuda:'):
            raise RunError(f"device '{device}' would be that of all {self.world} processes; leave device = 'auto'")
        device = 'cpu' if device == 'auto' else device
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as err:
            raise RunError(f"device '{device}' cannot be used here: {str(err).splitlines()[0]}; "
                           'use auto, cpu or cuda:N') from None
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
            self.search_kernels(True)
        # torchrun's one process, too, speaks to a group: the same code, whatever their number.
        many, alone = self.world > 1, timedelta(minutes=1)
        self.torchrun = many or 'TORCHELASTIC_RUN_ID' in os.environ
        if self.torchrun and not dist.is_initialized():
            try:
                dist.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo',
                                        timeout=PATIENCE if many else alone)
            except (RuntimeError, ValueError) as err:
                self.torchrun = False  # alone it needs no group: what torchrun set may be left from another process
                if many:
                    raise RunError(f'process {self.rank} of {self.world} cannot reach the others '
                                   f'({str(err).splitlines()[0]}); start the script with torchrun') from None
        if precision == 'auto':
            fast = (torch.cuda.is_bf16_supported(including_emulation=False) if self.device.type == 'cuda'
                    else self.device.type == 'cpu' and fast_bf16())
            precision = 'bf16' if fast else 'fp32'
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != 'fp32'
        if precision == 'fp16' and self.device.type != 'cuda':
            raise RunError(f"precision 'fp16' needs a CUDA device, not {self.device}; use bf16 or fp32")
        self.precision, self.main = precision, self.rank == 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == 'fp16')

    def autocast(self):
        """Context of the networks' forward passes; losses and the schedule are computed in float32 outside of it."""
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(self.precision, torch.float32)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != 'fp32')

    def describe(self):
        cuda = self.device.type == 'cuda'
        name = torch.cuda.get_device_name(self.device) if cuda else f'{torch.get_num_threads()} threads'
        return f'{self.device} ({name}), {self.precision}, {self.world} process{"es" * (self.world > 1)}'

    @staticmethod
    def search_kernels(on):
        """Whether cuDNN tries its kernels for each new size of input: not where there are many sizes (boxes)."""
        torch.backends.cudnn.benchmark = on

    def place(self, net, grid=()):
        """A network on the device, its convolutions channels-last: faster on a CPU, in 2D and 3D. On CUDA in half
        precision alone (not measured); there volumes need it: contiguous ones miss cuDNN in some versions of PyTorch.

        Not so on a CPU with AVX-512 where the grid that it works on, if told, has at most 2048 positions (group norm
        takes longer), nor without AVX-512 to train in 2D (the gradient of the weights takes half as long again, or
        more).
        """
        three_d = any(isinstance(m, torch.nn.Conv3d) for m in net.modules())
        small = grid and math.prod(grid) <= 2048
        slow = small if 'avx512f' in cpu_flags() else self.training and not three_d
        if slow if self.device.type == 'cpu' else self.precision == 'fp32':
            return net.to(self.device)
        return net.to(self.device, memory_format=torch.channels_last_3d if three_d else torch.channels_last)

    @torch.no_grad()
    def same_start(self, *nets):
        """The first process's weights for all: what each has computed from the data may differ between machines."""
        for net in nets if self.torchrun else ():
            for tensor in [*net.parameters(), *net.buffers()]:
                first = tensor.contiguous()
                dist.broadcast(first, 0)
                tensor.copy_(first)

    def to_device(self, batch):
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def mean(self, values):
        """Mean of a tensor over the processes."""
        if self.torchrun:
            dist.all_reduce(values)
            values /= self.world
        return values

    def gather(self, rows):
        """Lists of Python objects from all processes, joined, on every process."""
        if not self.torchrun:
            return list(rows)
        parts = [None] * self.world
        dist.all_gather_object(parts, list(rows))
        return [row for part in parts for row in part]

    def barrier(self):
        if self.torchrun:
            dist.barrier()

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def update(self, opt, clip):
        """Average gradients over the processes, clip their norm, step the optimiser; returns the norm."""
        params = [p for group in opt.param_groups for p in group['params']]
        if self.torchrun:
            flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params])
            self.mean(flat)
            for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.grad = torch.empty_like(p).copy_(g.view_as(p))  # strided like p: fused AdamW goes by memory
        self.scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, clip)
        self.scaler.step(opt)
        opt.zero_grad(set_to_none=True)
        return norm

    def scaler_step(self):
        """After all updates of a step: adapt the loss scale (fp16 only)."""
        self.scaler.update()


@torch.no_grad()
def in_batches(run, net, batches, images):
    """net over images (N, C, *S) under autocast, float32 NumPy in and out; -1 where no batch has anything.

    batches: [(numbers, box)], box a tuple of slices (grid.batches).
    """
    found = np.full_like(images, -1)
    for numbers, box in batches:
        where = numbers, slice(None), *box
        with run.autocast():
            found[where] = net(torch.from_numpy(images[where]).to(run.device)).float().cpu().numpy()
    return found


def seed_key(*keys):
    """A 63-bit seed from any numbers and strings."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], 'little') >> 1


def seed_everything(*keys):
    """Seed torch by (seed, rank, step): a resumed run draws the same noise."""
    torch.manual_seed(seed_key(*keys))


# ------------------------------------------------------------------------------------------------------------------
# Schedules of the step

def lr_at(step, steps, peak, warmup):
    """Learning rate: linear warm-up, then a cosine from the peak down to 1 % of it."""
    warm = min(1, (step + 1) / warmup)
    return peak * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1, step / max(1, steps)))) / 2)


def set_lr(opt, lr):
    for group in opt.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1)


class EMA:
    """Moving average of parameters and copy of buffers; its decay grows as (1 + step) / (10 + step) up to `decay`."""

    def __init__(self, net, decay):
        self.net, self.decay = copy.deepcopy(net).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, net, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - decay)
        for mine, theirs in zip(self.net.buffers(), net.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self):
        return self.net.state_dict()

    def load_state_dict(self, state):
        self.net.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------------
# Files

def write_atomic(path, write, mode='wb'):
    """write(file) beside the path, then move: a killed job never leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with open(tmp, mode, **({} if 'b' in mode else dict(encoding='utf-8', newline=''))) as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from None
    except RuntimeError as err:  # torch.save reports a full disk like this
        raise RunError(f'{path}: could not be written ({str(err).splitlines()[0]}); is the disk full?') from None
    finally:
        tmp.unlink(missing_ok=True)


def save_checkpoint(path, data):
    """Plain tensors, numbers, strings, lists and dicts only, so that it loads with weights_only=True."""
    write_atomic(path, lambda f: torch.save(data, f))


def load_checkpoint(path, kind):
    """The dict in a checkpoint of this kind. RunError if missing, damaged, foreign or unsafe; executes nothing."""
    path, maker = Path(path), {'aae': 'train_aae.py', 'unet': 'train_unet.py', 'post': 'post_train.py',
                               'regression': 'train_unet.py --regression True'}
    if path.is_dir():
        raise RunError(f'{path} is a folder, not a checkpoint; move it away')
    if not path.is_file():
        raise RunError(f'{path} does not exist; run python {maker.get(kind, "the stage before")} first '
                       '(or set exp, init_from or pretrained)')
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load does not look at checksums
                    raise zipfile.BadZipFile
        data = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise RunError(f'{path} is refused: it is damaged or holds more than plain tensors and numbers, '
                       'and loading it could execute code') from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, zipfile.BadZipFile):
        raise RunError(f'{path} is truncated or not a checkpoint; delete it and run the stage that writes it '
                       'again') from None
    found = data.get('kind') if isinstance(data, dict) else None
    if found != kind:
        raise RunError(f"{path} is not a checkpoint of kind '{kind}' of this software (found {found!r}); "
                       'is the path right?')
    return data


def load_weights(net, state, path):
    """load_state_dict with one sentence instead of a list of keys."""
    try:
        net.load_state_dict(state)
    except RuntimeError as err:
        raise RunError(f'{path} holds a network of another shape: {str(err).splitlines()[1].strip()[:160]}') from None


@contextlib.contextmanager
def reading(path, remedy):
    """What another version of the software left out of a checkpoint, or added to it, becomes one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
        if getattr(err, 'one_sentence', False):
            raise
        raise RunError(f'{path} does not hold what this version of the software saves '
                       f'({type(err).__name__}: {" ".join(str(err).split())}); {remedy}') from None


def old_folder(folder):
    """A fresh folder old_<n> for what is kept aside."""
    n = 1 + max([int(p.name[4:]) for p in folder.glob('old_*') if p.name[4:].isdigit()], default=0)
    (folder / f'old_{n}').mkdir(parents=True)
    return folder / f'old_{n}'
