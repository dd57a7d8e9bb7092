"""
Plumbing that knows no image: device, precision, processes, seeds, learning rate, weight average, checkpoints, CSV logs.

A training stage uses `Run` (where and how to compute) and `Stage` (its files: resume, best checkpoint, curves). Randomness is keyed
by (seed, rank, step), schedules are functions of the step: the only things a checkpoint must hold are weights and optimisers.
"""

import contextlib
import copy
import csv
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows: no lock there
    fcntl = None


BEST = dict(aae='CHECKPOINT_AAE', unet='CHECKPOINT_Unet', post='CHECKPOINT_Unet_post', regression='CHECKPOINT_regression')


class RunError(RuntimeError):
    """Something the user can mend; the message is one sentence."""
    one_sentence = True


def cli(main):
    """Run a script's main(): what the user can mend ends in one sentence on standard error and exit code 1, not in a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('interrupted; run the same command again to go on')
    except torch.OutOfMemoryError:
        sys.exit('out of memory: lower batch_size or eval_batch, set accumulate or checkpointing, or choose a smaller image_size')
    except OSError as err:
        sys.exit(f"{err.filename or 'a file'}: {err.strerror or err}" + (
            '; free some space and run the same command again' if err.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else ''))
    except Exception as err:
        if not getattr(err, 'one_sentence', False):
            raise
        sys.exit(str(err))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------
# Device, precision, processes

def fast_bf16():
    """Whether this CPU multiplies bfloat16 in hardware."""
    try:
        flags = Path('/proc/cpuinfo').read_text()
    except OSError:
        return False
    return 'avx512_bf16' in flags or 'amx_bf16' in flags


class Run:
    """Where and how to compute: device, autocast, processes (torchrun), and the backward pass. One process is no special case."""

    def __init__(self, device='auto', precision='auto'):
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        local = int(os.environ.get('LOCAL_RANK', 0))
        if device == 'auto':
            device = f'cuda:{local}' if torch.cuda.is_available() else 'cpu'
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as err:
            raise RunError(f"device '{device}' cannot be used here: {str(err).splitlines()[0]}; use auto, cpu or cuda:N") from None
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo')
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        if precision == 'auto':
            fast = torch.cuda.is_bf16_supported() if self.device.type == 'cuda' else self.device.type == 'cpu' and fast_bf16()
            precision = 'bf16' if fast else 'fp32'
        if precision == 'fp16' and self.device.type != 'cuda':
            raise RunError(f"precision 'fp16' needs a CUDA device, not {self.device}; use bf16 or fp32")
        self.precision, self.main = precision, self.rank == 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == 'fp16')

    def autocast(self):
        """Context of the networks' forward passes; losses and the schedule are computed in float32 outside of it."""
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(self.precision, torch.float32)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != 'fp32')

    def describe(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else f'{torch.get_num_threads()} threads'
        return f'{self.device} ({name}), {self.precision}, {self.world} process{"es" * (self.world > 1)}'

    def place(self, net):
        """A network on the device, its convolutions channels-last: measured faster on CPU and CUDA, in 2D and 3D."""
        three_d = any(isinstance(m, torch.nn.Conv3d) for m in net.modules())
        return net.to(self.device, memory_format=torch.channels_last_3d if three_d else torch.channels_last)

    def to_device(self, batch):
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def mean(self, values):
        """Mean of a tensor over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def gather(self, rows):
        """Lists of Python objects from all processes, joined, on every process."""
        if self.world == 1:
            return list(rows)
        parts = [None] * self.world
        dist.all_gather_object(parts, list(rows))
        return [row for part in parts for row in part]

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def update(self, opt, clip):
        """Average gradients over the processes, clip their norm, step the optimiser; returns the norm."""
        params = [p for group in opt.param_groups for p in group['params']]
        if self.world > 1:
            flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params])
            self.mean(flat)
            for p, g in zip(params, flat.split([p.numel() for p in params])):
                p.grad = g.view_as(p)
        self.scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, clip)
        self.scaler.step(opt)
        opt.zero_grad(set_to_none=True)
        return norm

    def scaler_step(self):
        """After all updates of a step: adapt the loss scale (fp16 only)."""
        self.scaler.update()


@torch.no_grad()
def in_batches(run, net, batch_size, *arrays):
    """net over a few items at a time under autocast: NumPy arrays (N, ...) in, one float32 NumPy array (N, ...) out."""
    parts = []
    for i in range(0, len(arrays[0]), batch_size):
        with run.autocast():
            parts.append(net(*[torch.from_numpy(a[i:i + batch_size]).to(run.device) for a in arrays]).float().cpu())
    return torch.cat(parts).numpy()


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


def adam(params, **kwargs):
    """Fused AdamW without weight decay (it multiplies many small kernels into one)."""
    return torch.optim.AdamW(params, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True, **kwargs)


class EMA:
    """Exponential moving average of the parameters and buffers; its decay grows as (1 + step) / (10 + step) up to `decay`."""

    def __init__(self, net, decay):
        self.net, self.decay = copy.deepcopy(net).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, net, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - decay)
        for mine, theirs in zip(self.net.buffers(), net.buffers()):
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
    """The dict in a checkpoint of this kind. RunError (one sentence) if it is missing, damaged, foreign or unsafe; executes nothing."""
    path, maker = Path(path), {'aae': 'train_aae.py', 'unet': 'train_unet.py', 'post': 'post_train.py', 'regression': 'train_unet.py --regression True'}
    if not path.is_file():
        raise RunError(f'{path} does not exist; run python {maker.get(kind, "the stage before")} first (or set exp or init_from)')
    try:
        data = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise RunError(f'{path} is refused: it is damaged or holds more than plain tensors and numbers, and loading it could execute code') from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise RunError(f'{path} is truncated or not a checkpoint; delete it and run the stage that writes it again') from None
    found = data.get('kind') if isinstance(data, dict) else None
    if found != kind:
        raise RunError(f"{path} is not a checkpoint of kind '{kind}' of this software (found {found!r}); is the path right?")
    return data


def load_weights(net, state, path):
    """load_state_dict with one sentence instead of a list of keys."""
    try:
        net.load_state_dict(state)
    except RuntimeError as err:
        raise RunError(f'{path} holds a network of another shape: {str(err).splitlines()[1].strip()[:160]}') from None


class CsvLog:
    """A CSV file of rows with a `step`; reopened, it drops the rows at or after the resumed step."""

    def __init__(self, path, fields, step):
        self.path, self.fields, rows = Path(path), fields, []
        if self.path.is_file():
            with open(self.path, newline='', encoding='utf-8') as f:
                rows = [r for r in csv.DictReader(f) if None not in r.values() and (r['step'] or 'x').isdigit() and int(r['step']) < step]
        write_atomic(self.path, lambda f: self._write(f, rows, header=True), 'w')

    def _write(self, f, rows, header=False):
        writer = csv.DictWriter(f, self.fields, extrasaction='ignore')
        if header:
            writer.writeheader()
        writer.writerows(rows)

    def add(self, rows):
        with open(self.path, 'a', newline='', encoding='utf-8') as f:
            self._write(f, [{k: f'{v:.6g}' if isinstance(v, float) else v for k, v in r.items()} for r in rows])


def lock(folder):
    """Refuse a second run in the same folder; the lock dies with its process. Returns the open file, to be kept."""
    folder.mkdir(parents=True, exist_ok=True)
    f = open(folder / '.lock', 'a')
    if fcntl:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f'{folder} is in use by another run; wait for it or choose another --exp') from None
    return f


def git_state():
    """Commit and state of the code, or why it is not known."""
    try:
        call = dict(cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        commit = subprocess.run(['git', 'rev-parse', 'HEAD'], **call).stdout.strip()
        dirty = subprocess.run(['git', 'status', '--porcelain', '--untracked-files=no'], **call).stdout.strip()
        return (commit + (' with uncommitted changes' if dirty else '')) if commit else 'not under git'
    except (OSError, subprocess.SubprocessError):
        return 'git is not installed'


def old_folder(folder):
    """A fresh folder old_<n> for what is kept aside."""
    n = 1 + max([int(p.name[4:]) for p in folder.glob('old_*') if p.name[4:].isdigit()], default=0)
    (folder / f'old_{n}').mkdir(parents=True)
    return folder / f'old_{n}'


class Stage:
    """The files of one training stage in result/<exp>: lock, log, last_<name> for resuming, the best checkpoint, two CSV curves.

    fixed, more: the settings and facts that a resumed run must share with its last_ file. parts (given to `resume`): what has a
    state_dict. A loss term or gradient norm that is not finite stops the run before anything is saved.
    """

    def __init__(self, run, cfg, name, fixed, **more):
        self.run, self.cfg, self.name, self.folder = run, cfg, name, Path('result') / cfg.exp
        self.fixed = {key: getattr(cfg, key) for key in fixed} | dict(precision=run.precision, processes=run.world) | more
        self.fixed = json.loads(json.dumps(self.fixed))  # tuples become lists, as in the file
        self.state = dict(step=0, seconds=0.0, evaluated=-1, best=None, best_step=-1, best_row={}, base={})
        self.last = self.folder / f'last_{name}.pth.tar'
        if run.main:
            self.lock = lock(self.folder)
            if cfg.restart:
                self._set_aside()
        run.barrier()
        self.start = time.perf_counter()

    step = property(lambda self: self.state['step'])
    base = property(lambda self: self.state['base'])
    best_step = property(lambda self: self.state['best_step'])
    best_row = property(lambda self: ', '.join(f'{k} {v:.4g}' for k, v in self.state['best_row'].items()))

    def _set_aside(self):
        """--restart: move this stage's files into old_<n>/ instead of deleting them."""
        files = [f for f in (self.last, self.folder / f'{BEST[self.name]}.pth.tar', self.folder / f'loss_curve_{self.name}.csv',
                             self.folder / f'validation_{self.name}.csv') if f.exists()]
        if files:
            aside = old_folder(self.folder)
            for f in files:
                shutil.move(f, aside / f.name)
            self.log(f'--restart: the old run is kept in {aside}')

    def log(self, text):
        """Print and append to log.txt (main process)."""
        if self.run.main:
            tqdm.write(text)
            with open(self.folder / 'log.txt', 'a', encoding='utf-8') as f:
                f.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {self.name}: {text}\n')

    def describe(self, text):
        """Record what runs: the command, settings that are not the constants', config.json, git.txt."""
        if self.run.main:
            write_atomic(self.folder / 'config.json', lambda f: json.dump(self.cfg.as_dict(), f, indent=1), 'w')
            write_atomic(self.folder / 'git.txt', lambda f: f.write(git_state() + '\n'), 'w')
        for line in [' '.join([Path(sys.argv[0]).name, *sys.argv[1:]]), *self.cfg.changes(), f'device {self.run.describe()}', text]:
            self.log(line)

    def resume(self, steps, terms, metrics, epoch_steps, **parts):
        """Load last_<name> if it is there, check the fixed settings, open the CSVs. Returns False if the stage is finished already."""
        self.parts, self.steps, self.terms, self.epoch_steps, self.pending = parts, steps, terms, epoch_steps, []
        if self.last.exists():
            data = load_checkpoint(self.last, f'last_{self.name}')
            for key, value in self.fixed.items():
                old = data['fixed'].get(key)
                if old != value:
                    raise RunError(f"{self.last} was trained with {key} = {old!r}, now it is {value!r}; set it back, choose another --exp, "
                                   'or begin anew with --restart')
            for name, part in parts.items():
                if isinstance(part, torch.nn.Module):
                    load_weights(part, data['parts'][name], self.last)
                else:
                    part.load_state_dict(data['parts'][name])
            self.state = data['state']
            if self.step >= steps and self.state['evaluated'] >= steps:
                self.log(f'stage {self.name} is finished ({self.step} of {steps} steps); raise {self.name}_steps to go on, or --restart to begin anew')
                return False
            self.log(f'resuming stage {self.name} at step {self.step} of {steps}')
        if self.run.main:
            self.loss_csv = CsvLog(self.folder / f'loss_curve_{self.name}.csv', ['step', 'epoch', 'lr', *terms, 'seconds'], self.step)
            self.val_csv = CsvLog(self.folder / f'validation_{self.name}.csv', ['step', *metrics], self.state['evaluated'] + 1)
        self.start = time.perf_counter()
        self.bar = tqdm(total=steps, initial=self.step, desc=self.name, unit='step', disable=not self.run.main,
                        mininterval=0.5 if sys.stderr.isatty() else 15)
        return True

    def elapsed(self):
        """Seconds of this stage over all its runs."""
        return self.state['seconds'] + time.perf_counter() - self.start

    def record(self, step, lr, names, **values):
        """Note one step: its loss terms, tensors (B,) or scalars; names() gives the subjects of the batch. Written every ten steps."""
        values = {k: v.detach().float() for k, v in values.items()}
        self.pending.append((step, int(step / self.epoch_steps), lr, values, names, self.elapsed()))
        self.state['step'] = step + 1
        self.bar.update()
        if len(self.pending) >= 10:
            self.flush()

    def flush(self):
        """Check that every noted value is finite, then append the rows to the loss curve."""
        rows = []
        for step, epoch, lr, values, names, seconds in self.pending:
            for term, v in values.items():
                if not bool(torch.isfinite(v).all()) and not (term == 'grad_norm' and self.run.precision == 'fp16'):  # fp16: the scaler skips the step
                    who = names()
                    if v.ndim and len(who) == len(v):
                        who = [name for name, ok in zip(who, torch.isfinite(v).tolist()) if not ok]
                    raise RunError(f"stage {self.name}, step {step}: '{term}' is not finite (subjects {', '.join(dict.fromkeys(who))}); nothing was saved "
                                   'since; check these subjects with python dataset.py, lower the learning rate or use --precision fp32')
            means = self.run.mean(torch.stack([values[k].mean() for k in self.terms]))
            rows.append(dict(zip(self.terms, means.tolist()), step=step, epoch=epoch, lr=lr, seconds=seconds))
        if rows and self.run.main:
            self.loss_csv.add(rows)
            self.bar.set_postfix({k: f'{rows[-1][k]:.3g}' for k in self.terms[:3]})
        self.pending = []

    def must_evaluate(self, step):
        """Whether a validation is due: every eval_every steps, before the first step and after the last one."""
        return (step == self.steps or step % self.cfg.eval_every == 0) and self.state['evaluated'] < step

    def validated(self, step, row, score):
        """Append a validation row; row 0 is the network before this stage. Returns True if it is the best so far."""
        self.flush()
        if self.run.main:
            self.val_csv.add([dict(row, step=step)])
            self.log(f'step {step}: ' + ', '.join(f'{k} {v:.4g}' for k, v in row.items()))
        if step == 0:
            self.state['base'] = row
        better = self.state['best'] is None or score > self.state['best']
        if better:
            self.state.update(best=score, best_step=step, best_row=row)
        self.state['evaluated'] = step
        return better

    @contextlib.contextmanager
    def main_first(self):
        """The main process does it first (and fills a cache), the others after it."""
        if not self.run.main:
            self.run.barrier()
        yield
        if self.run.main:
            self.run.barrier()

    def save_best(self, **data):
        """Write the checkpoint for use: CHECKPOINT_*.pth.tar."""
        if self.run.main:
            save_checkpoint(self.folder / f'{BEST[self.name]}.pth.tar', dict(data, kind=self.name, step=self.step, validation=self.state['best_row']))

    def save_if_due(self, step):
        """After a validation and every save_every steps: everything needed to go on, in one file, written beside and moved."""
        if not (step == self.state['evaluated'] or step % self.cfg.save_every == 0):
            return
        self.flush()
        if self.run.main:
            save_checkpoint(self.last, dict(kind=f'last_{self.name}', state=dict(self.state, seconds=self.elapsed()), fixed=self.fixed,
                                            parts={k: p.state_dict() for k, p in self.parts.items()}))

    def close(self):
        """Say how the stage ended."""
        self.bar.close()
        self.log(f'stage {self.name} done: best at step {self.best_step} ({self.best_row}), {self.elapsed():.0f} s')
