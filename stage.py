"""
One training stage's files in result/<exp>: lock, log, resuming, the best checkpoint, the CSV curves.

The training scripts keep their loops to themselves; `Stage` is what those loops have in common.
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
from tqdm import tqdm

from utils import BEST, RunError, load_checkpoint, load_weights, old_folder, reading, save_checkpoint, write_atomic

try:
    import fcntl
except ImportError:  # not on Windows: no lock there
    fcntl = None


# What the less obvious names in a last_ file's `fixed` mean, for messages.
MEANING = dict(lists='lists (fingerprint of train.txt and validation.txt)', aae='autoencoder (its fingerprint)',
               unet='U-Net of stage 2 (its fingerprint)', mask='a template for masks', lesion='a template for lesions')
# What a last_ file means that does not say it.
OLDER = dict(trim=False, source_noise=0.0, lesion_core=0.7, pretrained=None)
RENAMED = dict(regression_w_lesion='w_lesion')  # where an older one says it
AFTER = dict(aae=('unet', 'post'), unet=('post',))  # the stages that need just this checkpoint of a stage
DATA = 'resample', 'mask', 'lesion'             # which older ones do not say: taken to be as now


class CsvLog:
    """A CSV file of rows with a `step`; reopened, it drops the rows at or after the resumed step."""

    def __init__(self, path, fields, step):
        self.path, self.fields, rows = Path(path), fields, []
        if self.path.is_file():
            with open(self.path, newline='', encoding='utf-8', errors='replace') as f:
                reader = csv.DictReader(f)
                if step > 0 and 'step' not in (reader.fieldnames or ()):
                    raise RunError(f"{self.path} is damaged (it has no column 'step'); put it back or delete it")
                whole = (r for r in reader if None not in r.values() and (r['step'] or 'x').isdigit())
                rows = [r for r in whole if int(r['step']) < step]
        write_atomic(self.path, lambda f: self._write(f, rows, header=True), 'w')

    def _write(self, f, rows, header=False):
        writer = csv.DictWriter(f, self.fields, extrasaction='ignore')
        if header:
            writer.writeheader()
        writer.writerows(rows)

    def add(self, rows):
        rows = [{k: f'{v:.6g}' if isinstance(v, float) else v for k, v in r.items()} for r in rows]
        append(self.path, lambda f: self._write(f, rows))


def append(path, write):
    """write(file) at the end of a text file; an error (a full disk) says which file."""
    try:
        with open(path, 'a', newline='', encoding='utf-8') as f:
            write(f)
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from None


def lock(folder, name='.lock'):
    """Refuse a second run in the same folder; the lock dies with its process. Returns the open file, to be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        f = open(folder / name, 'a')
    except OSError as err:  # a file in its place, no right to write, a full disk
        raise RunError(f'{folder} cannot be used as result folder ({err.filename}: {err.strerror}); move away what is '
                       'in its place, mend its rights or choose another --exp') from None
    if fcntl:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f'{folder} is in use by another run; wait for it or choose another --exp') from None
        except OSError:  # a network file system without locks
            pass
        held = weakref.ref(f)  # loading processes outlive a killed run by seconds; they must not keep its lock
        os.register_at_fork(after_in_child=lambda: held() and held().close())
    return f


def git_state():
    """Commit and state of the code, or why it is not known."""
    try:
        call = dict(cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        commit = subprocess.run(['git', 'rev-parse', '--verify', 'HEAD'], **call).stdout.strip()
        dirty = subprocess.run(['git', 'status', '--porcelain', '--untracked-files=no'], **call).stdout.strip()
        return (commit + (' with uncommitted changes' if dirty else '')) if commit else 'not under git'
    except (OSError, subprocess.SubprocessError):
        return 'git is not installed'


def subject_keys(root, ids):
    """Whom a network was trained on, as its checkpoints say it: a set of hashes of folder and ID, no names."""
    folder = Path(root).expanduser().resolve()
    return {hashlib.sha256(f'{folder}/{id}'.encode()).hexdigest()[:16] for id in ids}


def needs_lesion(spec, wanted, what, off):
    """RunError if `what` needs lesion masks, is wanted and has no template for them; off: words that do without."""
    if wanted and spec.lesion is None:
        raise RunError(f'{what} needs the lesion template; set lesion, or {off}')


class Stage:
    """The files of one training stage in result/<exp>: lock, log, last_<name> for resuming, best checkpoint, curves.

    fixed, more: the settings and facts that a resumed run must share with its last_ file. parts (given to `resume`):
    what has a state_dict. A loss term or gradient norm that is not finite stops the run before anything is saved.
    """

    def __init__(self, run, cfg, name, fixed, **more):
        self.run, self.cfg, self.name, self.folder = run, cfg, name, Path('result') / cfg.exp
        run.search_kernels(not cfg.trim)
        self.fixed = {key: getattr(cfg, key) for key in fixed}
        self.fixed |= dict(precision=run.precision, resample=cfg.resample, mask=cfg.mask is not None,
                           lesion=cfg.lesion is not None) | more
        self.fixed = json.loads(json.dumps(self.fixed))  # tuples become lists, as in the file
        self.batch = cfg.batch_size * run.world  # the effective batch: samples a step over all processes
        self.state = dict(step=0, samples=0, seconds=0.0, evaluated=-1, best=None, best_step=-1, best_row={}, base={})
        self.last = self.folder / f'last_{name}.pth.tar'
        self.pretrained, self.trained_on, self.validated_on = None, set(), set()  # subject_keys
        if cfg.pretrained and name != 'post' and (cfg.restart or not self.last.exists()):  # else it goes on
            path = Path('result') / cfg.pretrained / f'{BEST[name]}.pth.tar'
            self.pretrained = path, load_checkpoint(path, name)  # before --restart moves anything
        if run.main:
            self.lock = lock(self.folder)
            for pattern in ('*.pth.tar', 'loss_curve_*', 'validation_*', 'config.json', 'git.txt'):
                for half in self.folder.glob(f'{pattern}.*.tmp'):  # what a killed run left half-written
                    half.unlink()
            if cfg.restart:
                self._set_aside()
        run.barrier()
        self.start = time.perf_counter()

    step = property(lambda self: self.state['step'])
    first_batch = property(lambda self: -(-self.state['samples'] // self.batch))  # where the data goes on
    base = property(lambda self: self.state['base'])
    best_step = property(lambda self: self.state['best_step'])
    best_row = property(lambda self: ', '.join(f'{k} {v:.4g}' for k, v in self.state['best_row'].items()))

    def _set_aside(self):
        """--restart: move this stage's files into old_<n>/ instead of deleting them."""
        names = (self.last.name, f'{BEST[self.name]}.pth.tar', f'loss_curve_{self.name}.csv',
                 f'validation_{self.name}.csv')
        files = [self.folder / name for name in names if (self.folder / name).exists()]
        if files:
            aside = old_folder(self.folder)
            for f in files:
                shutil.move(f, aside / f.name)
            self.log(f'--restart: the old run is kept in {aside}')

    def log(self, text):
        """Print and append to log.txt (main process)."""
        if self.run.main:
            tqdm.write(text)
            append(self.folder / 'log.txt',
                   lambda f: f.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {self.name}: {text}\n'))

    def describe(self, text):
        """Record what runs: the command, settings that are not the constants', config.json, git.txt."""
        if self.run.main:
            write_atomic(self.folder / 'config.json', lambda f: json.dump(self.cfg.as_dict(), f, indent=1), 'w')
            write_atomic(self.folder / 'git.txt', lambda f: f.write(git_state() + '\n'), 'w')
        command = ' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        batch = f'effective batch {self.batch} ({self.cfg.batch_size} a process)'
        for line in [command, *self.cfg.changes(), f'device {self.run.describe()}', f'{text}, {batch}']:
            self.log(line)

    def builds_on(self, train_ids, validation_ids, *earlier):
        """Note whom this stage is trained on, and the stages before it (subject_keys of each)."""
        self.trained_on |= subject_keys(self.cfg.data_root, train_ids)
        self.validated_on = subject_keys(self.cfg.data_root, validation_ids)
        self._builds_on(set().union(*earlier))

    def _builds_on(self, earlier):
        self.trained_on |= earlier
        if seen := self.validated_on & earlier:
            self.log(f'{len(seen)} of the {len(self.validated_on)} validation subjects are training subjects of the '
                     'networks that this stage builds on: their figures are too good; validate with others')

    def start_from_pretrained(self, net, prep):
        """With cfg.pretrained: give net the weights of that experiment's network of this stage. False if not.

        prep: Spec.travel(). RunError if that network has another shape or makes other targets.
        """
        if not self.pretrained:
            return False
        (path, data), self.pretrained = self.pretrained, None
        with reading(path, 'train it again'):
            load_weights(net, data['net'], path)
            theirs = {name: data['prep'].get(name) for name in prep}
        if theirs['target_names'] != prep['target_names']:
            raise RunError(f"{path} makes {', '.join(theirs['target_names'])}, the settings ask for "
                           f"{', '.join(prep['target_names'])}; the targets of both must be the same, in this order")
        self._builds_on(set(data.get('trained_on', ())))
        others = [name for name in ('spacing', 'frame_spacing', 'scaling') if theirs[name] != prep[name]]
        told = f'; {", ".join(others)} differ, to which the network has to adapt' if others else ''
        self.log(f'starts from {path} (step {data["step"]}){told}')
        return True

    def resume(self, steps, terms, metrics, epoch, **parts):
        """Load last_<name> if it is there, check the fixed settings, open the CSVs. False if the stage is finished.

        epoch: samples in the training set. The number of processes may have changed: the data goes on where it was.
        """
        self.parts, self.steps, self.terms, self.epoch, self.pending = parts, steps, terms, epoch, []
        if self.last.exists():
            with reading(self.last, 'choose another --exp, or begin anew with --restart'):
                self._load(load_checkpoint(self.last, f'last_{self.name}'))
        if len(set(self.run.gather([self.step]))) > 1:
            raise RunError(f'the processes do not see the same {self.last}; put result/ on a disk that all machines '
                           'share')
        if self.last.exists():
            if self.step >= steps and self.state['evaluated'] >= steps:
                self.log(f'stage {self.name} is finished ({self.step} of {steps} steps); raise {self.name}_steps '
                         'to go on, or --restart to begin anew')
                return False
            if self.step > steps:
                raise RunError(f'{self.last} is at step {self.step}, beyond the {steps} asked for, and was not '
                               f'evaluated there; set {self.name}_steps to {self.step} or more, or begin anew with '
                               '--restart')
            self.log(f'resuming stage {self.name} at step {self.step} of {steps}')
            self._keep_for_later_stages()
        if self.run.main:
            fields, metric_fields = ['step', 'epoch', 'lr', *terms, 'seconds'], ['step', *metrics]
            evaluated = self.state['evaluated']
            self.loss_csv = CsvLog(self.folder / f'loss_curve_{self.name}.csv', fields, self.step)
            self.val_csv = CsvLog(self.folder / f'validation_{self.name}.csv', metric_fields, evaluated + 1)
        self.start = time.perf_counter()
        self.bar = tqdm(total=steps, initial=self.step, desc=self.name, unit='step', disable=not self.run.main,
                        mininterval=0.5 if sys.stderr.isatty() else 15)
        return True

    def _keep_for_later_stages(self):
        """A finished stage that goes on: those after it were trained on its checkpoint as it is; keep it aside."""
        after = [BEST[name] for name in AFTER.get(self.name, ()) if (self.folder / f'{BEST[name]}.pth.tar').exists()]
        best = self.folder / f'{BEST[self.name]}.pth.tar'
        if after and best.exists() and self.run.main and self.state['evaluated'] >= self.step:
            aside = old_folder(self.folder)
            shutil.copy2(best, aside)
            self.log(f'{" and ".join(after)} belong to {BEST[self.name]} as it was, which is kept in {aside}: run the '
                     'later stages anew with --restart, or put it back')

    def _load(self, data):
        """Take over the state, networks and optimisers of a last_ file, if it was trained with the same settings."""
        batch, processes = data['fixed'].get('batch_size', self.cfg.batch_size), data['processes']
        for key, value in self.fixed.items():
            unsaid = data['fixed'].get(RENAMED.get(key), OLDER.get(key, value if key in DATA else None))
            old = data['fixed'].get(key, unsaid)
            if key == 'targets' and old == value and list(old) != list(value):  # the order of the channels
                old, value = list(old), list(value)
            if old != value and not (key == 'batch_size' and batch * processes == self.batch):
                raise RunError(f'{self.last} was trained with {MEANING.get(key, key)} = {old!r}, now it is {value!r}; '
                               'set it back, choose another --exp, or begin anew with --restart')
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                load_weights(part, data['parts'][name], self.last)
            else:
                part.load_state_dict(data['parts'][name])
        self.state = {key: data['state'][key] for key in self.state}
        self.trained_on |= set(data.get('trained_on', ()))
        if processes != self.run.world:
            self.log(f'{processes} process{"es" * (processes > 1)} before, {self.run.world} now: effective batch '
                     f'{batch * processes} before, {self.batch} now; the learning rate stays as it is, the noise of '
                     'each step differs from here on')

    def elapsed(self):
        """Seconds of this stage over all its runs."""
        return self.state['seconds'] + time.perf_counter() - self.start

    def record(self, step, lr, names, **values):
        """Note one step: its loss terms, tensors (B,) or scalars; names() gives the subjects. Written every ten."""
        values = {k: v.detach().float() for k, v in values.items()}
        self.pending.append((step, self.state['samples'] // self.epoch, lr, values, names, self.elapsed()))
        self.state.update(step=step + 1, samples=self.state['samples'] + self.batch)
        self.bar.update()
        if len(self.pending) >= 10:
            self.flush()

    def flush(self):
        """Check that every noted value is finite, then append the rows to the loss curve."""
        rows = []
        for step, epoch, lr, values, names, seconds in self.pending:
            for term, v in values.items():
                skipped = term == 'grad_norm' and self.run.precision == 'fp16'  # the loss scaler skips such a step
                if not skipped and not bool(torch.isfinite(v).all()):
                    who = names()
                    if v.ndim and len(who) == len(v):
                        who = [name for name, ok in zip(who, torch.isfinite(v).tolist(), strict=True) if not ok]
                    who = ', '.join(dict.fromkeys(who))
                    raise RunError(f"stage {self.name}, step {step}: '{term}' is not finite (subjects {who}); nothing "
                                   'was saved since; check these subjects with python dataset.py, lower the learning '
                                   'rate or use --precision fp32')
            means = self.run.mean(torch.stack([values[k].mean() for k in self.terms]))
            row = dict(zip(self.terms, means.tolist(), strict=True))
            rows.append(row | dict(step=step, epoch=epoch, lr=lr, seconds=seconds))
        if self.run.scaler.is_enabled() and self.run.scaler.get_scale() < 2 ** -10:
            raise RunError(f'stage {self.name}, step {self.step}: with fp16 the gradient stays infinite however small '
                           'the loss is scaled; nothing was saved since; use --precision bf16 or fp32')
        if rows and self.run.main:
            self.loss_csv.add(rows)
            self.bar.set_postfix({k: f'{rows[-1][k]:.3g}' for k in self.terms[:3]})
        self.pending = []

    def must_evaluate(self, step):
        """Whether a validation is due: every eval_every steps, before the first step and after the last one."""
        due = (step == self.steps or step % self.cfg.eval_every == 0) and self.state['evaluated'] < step
        if due:
            self.flush()  # a loss that is not finite is told by its step, not by a validation that fails
        return due

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
            facts = dict(kind=self.name, step=self.step, validation=self.state['best_row'],
                         trained_on=sorted(self.trained_on))
            save_checkpoint(self.folder / f'{BEST[self.name]}.pth.tar', data | facts)

    def save_if_due(self, step):
        """After a validation and every save_every steps: all that is needed to go on, in one file."""
        if not (step == self.state['evaluated'] or step % self.cfg.save_every == 0):
            return
        self.flush()
        if self.run.main:
            state = dict(self.state, seconds=self.elapsed())
            save_checkpoint(self.last, dict(kind=f'last_{self.name}', state=state, fixed=self.fixed,
                                            processes=self.run.world, trained_on=sorted(self.trained_on),
                                            parts={k: p.state_dict() for k, p in self.parts.items()}))

    def close(self):
        """Say how the stage ended."""
        self.bar.close()
        self.log(f'stage {self.name} done: best at step {self.best_step} ({self.best_row}), {self.elapsed():.0f} s')
