"""The table behind docs/FAULTS.md: what is done to a small trained experiment, and the command that meets it."""
import gzip
import json
import os
import pickle
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import made_data
import made_runs
import nibabel as nib
import numpy as np
import torch

TINY = shlex.join((*made_runs.STROKE, *made_runs.steps(2), '--precision', 'fp32'))
PET = shlex.join((*made_runs.AMYLOID, *made_runs.steps(2), '--precision', 'fp32',
                  '--data_root', 'pet', '--data_info', 'pet/data_info'))
NEW = '--exp new --init_from exp_1'


@dataclass
class Fault:
    """One line of the document. command: script and words, $TINY or $PET among them; it must end with `code`."""
    what: str
    command: str
    prepare: object = None   # called in the folder before
    limit: int = 0           # the largest file that may be written, in KiB (ulimit -f)
    env: dict = None
    before: str = ''         # Python that runs in the process before the script
    says: str = ''           # begin of the line to quote; the last line of standard error if empty
    code: int = 1

    def shown(self):
        """The command as one would type it."""
        words = [word if word[0] == '$' else f'"{word}"' if "'" in word else shlex.quote(word)
                 for word in shlex.split(self.command)]
        start = [f'{name}={value}' for name, value in (self.env or {}).items()]
        text = ' '.join([*start, 'bash' if self.command.startswith('demo.sh') else 'python', *words])
        return f'(ulimit -f {self.limit}; {text} > /dev/null)' if self.limit else text

    def words(self):
        return shlex.split(self.command.replace('$TINY', TINY).replace('$PET', PET))


# ----------------------------------------------------------------------------------------------------------------------
# What may happen to files

def write(path, text):
    def act():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return act


def both(*acts):
    def act():
        for one in acts:
            one()
    return act


def remove(path):
    return lambda: shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def instead(path, text=''):
    """A file in the place of a folder."""
    return lambda: (shutil.rmtree(path, ignore_errors=True), Path(path).write_text(text))


def folder(path):
    """A folder in the place of a file."""
    return lambda: (Path(path).unlink(missing_ok=True), Path(path).mkdir())


def copy(a, b):
    return lambda: (Path(b).parent.mkdir(parents=True, exist_ok=True), shutil.copy(a, b))


def half(path):
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:os.path.getsize(path) // 2])


def values(path, change, **how):
    """A NIfTI file with other values, on the same grid unless `how` says otherwise."""
    def act():
        img = nib.load(path)
        made_data.write(path, change(np.array(img.dataobj, np.float32)), **{'matrix': img.affine, **how})
    return act


def some(value):
    def change(array):
        array[array.shape[0] // 2, array.shape[1] // 2, 0] = value
        return array
    return change


def checkpoint(path, change):
    """A checkpoint with other content."""
    def act():
        data = torch.load(path, weights_only=True)
        change(data)
        torch.save(data, path)
    return act


def without(path, key):
    return checkpoint(path, lambda data: data.pop(key))


def retrained(path):
    return checkpoint(path, lambda data: data['net'][min(data['net'])].add_(1))


def lists(**texts):
    """Other lists of subjects; s01 and s02 train, s03 validate, s04 tests."""
    return both(*[write(f'data/data_info/{name}.txt', text) for name, text in texts.items()])


class Harm:
    """A pickle that would create a file on loading."""

    def __reduce__(self):
        return os.mkdir, ('harm',)


def evil(path):
    return write(path, pickle.dumps(Harm()))


def hold_lock():
    """Another process that holds the lock of result/exp_1 until this one ends."""
    import fcntl
    global held
    held = open('result/exp_1/.lock', 'a')
    fcntl.flock(held, fcntl.LOCK_EX)


# A shell lets what it starts in the background ignore SIGINT, and its children inherit that.
INTERRUPT = '''import os, signal, utils
signal.signal(signal.SIGINT, signal.default_int_handler)
update = utils.EMA.update
def watched(self, net, step):
    os.kill(os.getpid(), signal.SIGINT)
utils.EMA.update = watched'''
NO_MEMORY = '''import torch, model
def forward(self, *args, **more): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB')
model.UNet.forward = forward'''

CTP, DWI, ADC, MASK, LESION = (f'data/s01/{name}.nii.gz' for name in ('ctp', 'dwi', 'adc', 'mask', 'lesion'))
AAE, UNET, POST = (f'result/exp_1/CHECKPOINT_{name}.pth.tar' for name in ('AAE', 'Unet', 'Unet_post'))
OTHER_AFFINE = made_data.affine('LAS', angles=(8, -5, 12), origin=(-10.0, 10.0, 5.0))

# ----------------------------------------------------------------------------------------------------------------------
# The table

SETTINGS = [
    Fault('a misspelt setting', 'train_aae.py $TINY --bacth_size 4'),
    Fault('a word instead of a number', 'train_unet.py $TINY --lr fast'),
    Fault('a setting without a value', 'train_unet.py $TINY --lr'),
    Fault('a setting without its dashes', 'infer.py $TINY lr=3'),
    Fault('a negative number of steps', 'train_aae.py $TINY --aae_steps -1'),
    Fault('an empty batch', 'train_aae.py $TINY --batch_size 0'),
    Fault('a number that is not one', 'train_unet.py $TINY --dropout nan'),
    Fault('a probability above 1', 'train_unet.py $TINY --label_drop 3.0'),
    Fault('a prediction that does not exist', 'train_unet.py $TINY --predict vv'),
    Fault('a preset that does not exist', 'plot.py --preset mri2pet_dmo'),
    Fault('an image size that 4 does not divide', 'train_aae.py $TINY --image_size (17,20)'),
    Fault('three sizes for two dimensions', 'train_aae.py $TINY --image_size (16,20,16)'),
    Fault('a voxel of no size', 'train_aae.py $TINY --spacing (0,3,None)'),
    Fault('two widths where three are needed', 'train_aae.py $TINY --aae_channels (8,8)'),
    Fault('a width of 0', 'train_unet.py $TINY --unet_channels (0,8)'),
    Fault('a width that is a word', 'train_unet.py $TINY --unet_channels "(\'a\',8)"'),
    Fault('a batch that accumulate does not divide', 'train_aae.py $TINY --accumulate 3'),
    Fault('a crop of two numbers in 3D', 'post_train.py $PET --crop (8,8)'),
    Fault('a scaling turned round', "train_aae.py $TINY --scaling \"{'source': ('range', 100, 0), 'dwi': ('median', "
          "0, 3), 'adc': ('range', 0, 3000)}\""),
    Fault('a scaling that lacks a target', "train_aae.py $TINY --scaling \"{'source': ('range', 0, 100)}\""),
    Fault('no target', 'train_aae.py $TINY --targets {}'),
    Fault('a target without a path', "train_aae.py $TINY --targets \"{'dwi': 3, 'adc': 4}\""),
    Fault('a label that no class has', 'infer.py $PET --label 7'),
    Fault('one step with eps', 'train_unet.py $TINY --predict eps'),
    Fault('more sampling steps than time steps', 'infer.py $TINY --sampler ddim --num_steps 5000'),
    Fault('an experiment outside result/', 'train_aae.py $TINY --exp ../elsewhere'),
    Fault('a device that does not exist', 'train_aae.py $TINY --device tpu'),
    Fault('fp16 on a CPU', 'train_aae.py $TINY --precision fp16'),
    Fault('RANK without torchrun', 'train_aae.py $TINY', env=dict(RANK='two')),
    Fault('WORLD_SIZE without torchrun', 'train_aae.py $TINY', env=dict(WORLD_SIZE='2')),
]

DATA = [
    Fault('a data folder that is not there', f'train_aae.py $TINY {NEW} --data_root nowhere'),
    Fault('no lists', f'train_aae.py $TINY {NEW} --data_info nowhere'),
    Fault('an empty list', f'train_aae.py $TINY {NEW}', lists(train='')),
    Fault('an ID in two lists', f'train_unet.py $TINY {NEW}', lists(validation='s01\n')),
    Fault('a patient in two lists', f'train_unet.py $TINY {NEW}',
          write('data/data_info/data_info.csv', 'ID,label,patient\ns01,1,p\ns02,0,q\ns03,0,p\ns04,1,r\n')),
    Fault('a list that is no text', f'train_aae.py $TINY {NEW}', write('data/data_info/train.txt', b's01\n\xff\xfe\n')),
    Fault('a table that is no text', f'train_aae.py $TINY {NEW}', write('data/data_info/data_info.csv', b'ID\n\xff\n')),
    Fault('a table without IDs', f'train_aae.py $TINY {NEW}', write('data/data_info/data_info.csv', 'name\ns01\n')),
    Fault('a subject without files', f'train_aae.py $TINY {NEW}', lists(train='s01\ns99\n')),
    Fault('a missing target', f'train_aae.py $TINY {NEW}', remove(DWI)),
    Fault('a validation subject without its targets', f'train_unet.py $TINY {NEW} --regression True',
          remove('data/s03/adc.nii.gz')),
    Fault('a table of patients without one of the subjects', f'train_aae.py $TINY {NEW}',
          write('data/data_info/data_info.csv', 'ID,label,patient\ns01,0,p\ns02,0,q\ns03,0,r\n')),
    Fault('two files for one template', f"train_aae.py $TINY {NEW} --mask '{{root}}/{{id}}/*.nii.gz'"),
    Fault('a template without {id}', f"train_aae.py $TINY {NEW} --mask '{{root}}/mask.nii.gz'"),
    Fault('a template with another word', f"train_aae.py $TINY {NEW} --mask '{{root}}/{{id}}/{{session}}.nii.gz'"),
    Fault('a truncated file', f'train_aae.py $TINY {NEW}', half(CTP)),
    Fault('an empty file', f'train_aae.py $TINY {NEW}', write(ADC, b'')),
    Fault('a file that is not NIfTI', f'train_aae.py $TINY {NEW}', write(ADC, gzip.compress(b'text ' * 200))),
    Fault('a folder in the place of a file', f'train_aae.py $TINY {NEW}', folder(DWI)),
    Fault('NaN in a source', f'train_aae.py $TINY {NEW}', values(CTP, some(np.nan))),
    Fault('infinity in a target', f'train_aae.py $TINY {NEW}', values(ADC, some(np.inf))),
    Fault('no frames', f'train_aae.py $TINY {NEW}', values(CTP, lambda a: a[..., 0])),
    Fault('a target with five dimensions', f'train_aae.py $TINY {NEW}',
          values(DWI, lambda a: np.repeat(np.repeat(a[..., None, None], 2, 3), 2, 4))),
    Fault('a target on another grid', f'train_aae.py $TINY {NEW}', values(ADC, lambda a: a, matrix=OTHER_AFFINE)),
    Fault('a target of another shape', f'train_aae.py $TINY {NEW}', values(ADC, lambda a: a[:-1])),
    Fault('a constant target', f'train_aae.py $TINY {NEW}', values(DWI, lambda a: 0 * a + 7)),
    Fault('an empty mask', f'train_aae.py $TINY {NEW}', values(MASK, lambda a: 0 * a)),
    Fault('a lesion that is not binary', f'train_aae.py $TINY {NEW}', values(LESION, lambda a: a * 0.7)),
    Fault('a lesion outside the mask', f'train_aae.py $TINY {NEW}', values(LESION, lambda a: 0 * a + 1)),
    Fault('ADC in mm^2/s', f'train_aae.py $TINY {NEW}', values(ADC, lambda a: a * 1e-6)),
    Fault('CT with 1024 added', f'train_aae.py $TINY {NEW}', values(CTP, lambda a: a + 1024)),
    Fault('a brain larger than image_size', f'train_aae.py $TINY {NEW} --image_size (8,12)'),
    Fault('a missing lesion in stage 3', 'post_train.py $TINY --exp new --init_from exp_1', remove(LESION)),
    Fault('a label that is missing', 'train_unet.py $PET --exp new --init_from exp_pet',
          write('pet/data_info/data_info.csv', 'ID,label\ns01,1\n')),
    Fault('no label that is known', 'train_unet.py $PET --exp new --init_from exp_pet',
          write('pet/data_info/data_info.csv', 'ID,label\ns01,unknown\ns02,unknown\n')),
    Fault('a picture of a damaged file', 'pictures.py $TINY --ids s01', half(CTP), says='s01: '),
    Fault('a crop of slices', 'post_train.py $TINY --crop 16,16'),
    Fault('attention at a level that is not there', 'train_unet.py $TINY --unet_attention 5'),
    Fault('a label out of range', 'train_unet.py $PET --exp new --init_from exp_pet',
          write('pet/data_info/data_info.csv', 'ID,label\ns01,1\ns02,5\n')),
    Fault('a cache inside the data', f'train_aae.py $TINY {NEW} --cache_dir data/cache'),
    Fault('a file in the place of the cache', f'train_aae.py $TINY {NEW}', instead('cache')),
    Fault('a full disk under the cache', f'train_aae.py $TINY {NEW} --cache_dir other', limit=8),
    Fault('the check of a damaged data set', 'dataset.py $TINY', both(half(CTP), values(ADC, lambda a: a * 1e-6)),
          says='s01: '),
    Fault('shares that do not sum to 1', 'dataset.py $TINY --make_splits 0.7,0.7,0.2'),
    Fault('too few folds', 'dataset.py $TINY --make_splits 2-fold'),
    Fault('lists that are there already', 'dataset.py $TINY --make_splits 0.7,0.1,0.2'),
    Fault('too few patients for three lists', 'dataset.py $TINY --make_splits 0.7,0.1,0.2 --data_root few '
          '--data_info few', copy(CTP, 'few/s01/ctp.nii.gz')),
]

STAGES = [
    Fault('a file in the place of result/', f'train_aae.py $TINY {NEW}', instead('result')),
    Fault('a file in the place of the result folder', f'train_aae.py $TINY {NEW}', instead('result/new')),
    Fault('a second run in the same folder', 'train_unet.py $TINY --unet_steps 3', hold_lock),
    Fault('no autoencoder yet', 'train_unet.py $TINY --exp new'),
    Fault('no U-Net yet', 'post_train.py $TINY --exp new', copy(AAE, 'result/new/CHECKPOINT_AAE.pth.tar')),
    Fault('an init_from that does not exist', 'train_unet.py $TINY --exp new --init_from exp_7'),
    Fault('a truncated last_ file', 'train_unet.py $TINY', half('result/exp_1/last_unet.pth.tar')),
    Fault('an empty last_ file', 'train_unet.py $TINY', write('result/exp_1/last_unet.pth.tar', b'')),
    Fault('a malicious last_ file', 'train_unet.py $TINY', evil('result/exp_1/last_unet.pth.tar')),
    Fault('the last_ file of another stage', 'train_unet.py $TINY',
          copy('result/exp_1/last_aae.pth.tar', 'result/exp_1/last_unet.pth.tar')),
    Fault('a last_ file of older software', 'train_unet.py $TINY',
          without('result/exp_1/last_unet.pth.tar', 'processes')),
    Fault('a last_ file with other optimisers', 'train_unet.py $TINY', checkpoint(
        'result/exp_1/last_unet.pth.tar', lambda d: d['parts'].update(opt=dict(state={}, param_groups=[])))),
    Fault('a folder in the place of a last_ file', 'train_unet.py $TINY', folder('result/exp_1/last_unet.pth.tar')),
    Fault('fewer steps than were made, and not evaluated', 'train_unet.py $TINY --unet_steps 1', checkpoint(
        'result/exp_1/last_unet.pth.tar', lambda d: d['state'].update(evaluated=0))),
    Fault('one GPU for two processes', f'train_unet.py $TINY {NEW} --device cuda:0', env=dict(WORLD_SIZE='2')),
    Fault('more sampling steps than the schedule has, in stage 3',
          f'post_train.py $TINY {NEW} --sampler ddim --num_steps 600',
          checkpoint(UNET, lambda d: d['diffusion'].update(timesteps=500))),
    Fault('another batch size', 'train_unet.py $TINY --batch_size 4'),
    Fault('other widths', 'train_unet.py $TINY --unet_channels (8,24)'),
    Fault('other lists', 'train_unet.py $TINY', lists(train='s01\n')),
    Fault('another precision', 'train_aae.py $TINY --precision bf16'),
    Fault('a retrained autoencoder under an unfinished U-Net', 'train_unet.py $TINY --unet_steps 4',
          retrained(AAE)),
    Fault('a retrained autoencoder under a finished U-Net', 'post_train.py $TINY --exp new --init_from exp_1',
          retrained(AAE)),
    Fault('a damaged regression U-Net from which stage 3 would start', f'post_train.py $TINY {NEW}',
          write('result/exp_1/CHECKPOINT_regression.pth.tar', 'weights')),
    Fault('an autoencoder of images on another spacing', f"train_unet.py $TINY {NEW} --spacing '(4, 4, None)'"),
    Fault('an autoencoder of older software', f'train_unet.py $TINY {NEW}', without(AAE, 'args')),
    Fault('an autoencoder with a network of another shape', f'train_unet.py $TINY {NEW}',
          checkpoint(AAE, lambda d: d['args'].update(latent_channels=5))),
    Fault('a curve that is no table', 'train_unet.py $TINY --unet_steps 4',
          write('result/exp_1/loss_curve_unet.csv', b'\x00\xff\n1,2\n')),
    Fault('a folder in the place of a curve', 'train_unet.py $TINY --unet_steps 4',
          folder('result/exp_1/validation_unet.csv')),
    Fault('a learning rate that blows up the loss',
          f'train_unet.py $TINY {NEW} --unet_steps 12 --lr 1e30 --eval_every 100'),
    Fault('the same in stage 1', 'train_aae.py $TINY --exp new --aae_steps 12 --aae_lr 1e30 --eval_every 100'),
    Fault('the same in stage 3', f'post_train.py $TINY {NEW} --post_steps 12 --post_lr 1e30 --eval_every 100'),
    Fault('a network that has blown up at a validation', f'train_unet.py $TINY {NEW} --unet_steps 12 --lr 1e30'),
    Fault('a full disk at the first checkpoint', f'train_unet.py $TINY {NEW}', limit=48),
    Fault('a full disk under the log', 'train_unet.py $TINY --unet_steps 4', limit=12,
          prepare=lambda: Path('result/exp_1/log.txt').write_text('x' * 12287)),
    Fault('a full disk under config.json', f'post_train.py $TINY {NEW}', limit=1),
    Fault('a lesion weight without lesions', f"post_train.py $TINY {NEW} --lesion None"),
    Fault('a lesion head without lesions', f'train_unet.py $TINY {NEW} --regression True --lesion None'),
    Fault('Ctrl-C', f'train_unet.py $TINY {NEW}', before=INTERRUPT),
    Fault('too little memory', f'train_unet.py $TINY {NEW}', before=NO_MEMORY),
]

INFER = [
    Fault('no checkpoint', 'infer.py $TINY --exp nothing'),
    Fault('a truncated checkpoint', 'infer.py $TINY', half(POST)),
    Fault('a malicious checkpoint', 'infer.py $TINY', evil(AAE)),
    Fault('text in the place of a checkpoint', 'infer.py $TINY', write(UNET, 'weights')),
    Fault('the checkpoint of another stage', 'infer.py $TINY --stage unet', copy(AAE, UNET)),
    Fault('a tensor instead of a checkpoint', 'infer.py $TINY', lambda: torch.save(torch.zeros(3), POST)),
    Fault('a checkpoint of older software', 'infer.py $TINY', without(POST, 'diffusion')),
    Fault('a checkpoint with settings of later software', 'infer.py $TINY', checkpoint(
        POST, lambda d: d['args'].update(rotary=True))),
    Fault('a retrained autoencoder', 'infer.py $TINY', retrained(AAE)),
    Fault('a retrained U-Net under stage 3', 'infer.py $TINY', retrained(UNET)),
    Fault('a model that does not exist', 'infer.py $TINY --stage best'),
    Fault('a split that does not exist', 'infer.py $TINY --split tset'),
    Fault('a subject that cannot be read', 'infer.py $TINY', half('data/s04/ctp.nii.gz'), says='s04: '),
    Fault('a validation subject that cannot be read', 'infer.py $TINY', half('data/s03/adc.nii.gz'), says='s03: ',
          code=0),
    Fault('a comparison with what was not translated', 'infer.py $TINY --compare plain'),
    Fault('a comparison with itself', 'infer.py $TINY --compare exp_1'),
    Fault('a comparison with a damaged table', 'infer.py $TINY --compare other', both(
        copy('result/exp_1/inference.json', 'result/other/inference.json'),
        write('result/other/test.csv', 'name,dwi_mae\ns04,1\n'))),
    Fault('folds of which one was not translated', 'infer.py $TINY --exp cv --pool exp_1,fold_2'),
    Fault('two folds with the same test subjects', 'infer.py $TINY --exp cv --pool exp_1,again', both(
        copy('result/exp_1/inference.json', 'result/again/inference.json'),
        copy('result/exp_1/test.csv', 'result/again/test.csv'))),
    Fault('labels that are asked for and not there', 'infer.py $PET --exp exp_pet --label true',
          remove('pet/data_info/data_info.csv')),
    Fault('a full disk under the results', 'infer.py $TINY', limit=1),
    Fault('a file in the place of pred/', 'infer.py $TINY', instead('result/exp_1/pred')),
    Fault('a target of which the settings know no file',
          "infer.py $TINY --targets \"{'dwi': '{root}/{id}/dwi.nii.gz'}\" "
          "--scaling \"{'source': ('range', 0, 100), 'dwi': ('median', 0, 3)}\""),
    Fault('a new file that is not there', 'infer.py $TINY --input new.nii.gz --out out'),
    Fault('a new file without --out', f'infer.py $TINY --input {CTP}'),
    Fault('a new file that is not NIfTI', 'infer.py $TINY --input new.nii.gz --out out', write('new.nii.gz', 'text')),
    Fault('a new file without frames', f'infer.py $TINY --input {DWI} --out out'),
    Fault('a new file that is DICOM', 'infer.py $TINY --input new.nii --out out',
          write('new.nii', bytes(128) + b'DICM' + bytes(400))),
    Fault('a new file in another unit', f'infer.py $TINY --input {CTP} --out out', values(CTP, lambda a: a + 1024)),
    Fault('a new file of zeros', f'infer.py $TINY --input {CTP} --out out', values(CTP, lambda a: 0 * a)),
    Fault('a mask on another grid', f'infer.py $TINY --input {CTP} --input_mask {MASK} --out out',
          values(MASK, lambda a: a, matrix=OTHER_AFFINE)),
    Fault('a mask that is not there', f'infer.py $TINY --input {CTP} --input_mask m.nii.gz --out out'),
    Fault('a mask that is an image', f'infer.py $TINY --input {CTP} --input_mask {DWI} --out out'),
    Fault('a mask without a new file', f'infer.py $TINY --input_mask {MASK}'),
    Fault('a composite for a stroke', f'infer.py $TINY --input {CTP} --input_composite {MASK} --out out'),
    Fault('a composite that is an image', 'infer.py $PET --exp exp_pet --input pet/whole_MRI/s01.nii '
          '--input_composite pet/whole_Abeta/s01.nii --out out'),
    Fault('a file in the place of --out', f'infer.py $TINY --input {CTP} --out out', instead('out')),
    Fault("another subject's images in --out", f'infer.py $TINY --input {CTP} --out out',
          write('out/dwi.nii.gz', 'image')),
    Fault('a true label for a new file',
          'infer.py $PET --exp exp_pet --input pet/whole_MRI/s01.nii --out out --label true'),
    Fault('a full disk under a new image', f'infer.py $TINY --input {CTP} --out out', limit=1),
]

REST = [
    Fault('an experiment that is not there', 'plot.py $TINY --exp exp_7'),
    Fault('an experiment with nothing in it', 'plot.py $TINY --exp empty', lambda: os.makedirs('result/empty')),
    Fault('a damaged curve', 'plot.py $TINY', write('result/exp_1/loss_curve_unet.csv', 'step,loss\n0,high\n')),
    Fault('a damaged config.json', 'plot.py $TINY', write('result/exp_1/config.json', '[1')),
    Fault('a damaged test table', 'plot.py $TINY', write('result/exp_1/test.csv', 'name,dwi_mae\ns04,1\n')),
    Fault('a damaged prediction', 'plot.py $TINY', half('result/exp_1/pred/s04/adc.nii.gz'), says='s04: '),
    Fault('a file in the place of fig/', 'plot.py $TINY', instead('result/exp_1/fig')),
    Fault('a full disk under the figures', 'plot.py $TINY', limit=1),
    Fault('a task that does not exist', 'phantom.py --task ct2mri --out new --subjects 8', code=2),
    Fault('no task', 'phantom.py --out new'),
    Fault('too few subjects', 'phantom.py --task ctp2dwi --out new --subjects 2'),
    Fault('a folder with other files', 'phantom.py --task ctp2dwi --out data --subjects 8'),
    Fault('a file in the place of the folder', 'phantom.py --task ctp2dwi --out new --subjects 8', instead('new')),
    Fault('other arguments than before', 'phantom.py --task ctp2dwi --out new --subjects 8', write(
        'new/phantom.json', json.dumps(dict(task='mri2pet', subjects=8, seed=1)))),
    Fault('a spacing of two numbers', 'phantom.py --task ctp2dwi --out new --subjects 8 --spacing 3,3'),
    Fault('a spacing of words', 'phantom.py --task ctp2dwi --out new --subjects 8 --spacing fine', code=2),
    Fault('a negative seed', 'phantom.py --task ctp2dwi --out new --subjects 8 --seed -1'),
    Fault('a full disk under the phantoms', 'phantom.py --task ctp2dwi --out new --subjects 8 --spacing 8,8,8 '
          '--workers 1', limit=1),
    Fault('phantoms that are not there', 'phantom.py --describe nowhere'),
    Fault('a demo that does not exist', 'demo.sh mri2pett', code=2),
    Fault('a demo of a preset that needs data', 'demo.sh lapt', code=2),
    Fault('a share of the steps above 1', 'demo.sh mri2pet_demo', env=dict(SHARE='2')),
    Fault('a setting of the demo that does not exist', 'demo.sh ctp2dwi_demo --aae_stepps 3'),
]

TABLE = {'Settings': SETTINGS, 'Data': DATA, 'Training': STAGES, 'Inference': INFER,
         'Figures, phantoms, demo': REST}
