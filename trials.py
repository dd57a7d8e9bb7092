"""
What study.py runs: each training (or other way to sample) with its control, and the sets it is evaluated on.

Steps are set so that the recipes of one table take about the same CPU seconds; the tables state them.
"""

from dataclasses import dataclass
from pathlib import Path

FIGURES = Path('docs/study')
SETS = {'test': ('--seed', '2'), 'shifted': ('--seed', '3', '--kind', 'shifted'), 'fresh': ('--seed', '7')}
FEW = {'first10': ('test', 10)}  # the first so many subjects of a set: for what takes a minute a subject
OTHERS = ('--seed', '11', '--kind', 'shifted', '--split', '0.5,0.4,0.1')  # few training subjects, of another kind
SUBJECTS = {'stroke': (200, 60), 'amyloid': (192, 100)}  # phantoms for training and validation, and of each test set
TASKS = {'stroke': 'ctp2dwi', 'amyloid': 'mri2pet'}


@dataclass
class Trial:
    """One training (or none: only another way to sample), and how its networks are evaluated."""
    name: str                                       # task/name
    about: str
    stages: tuple = ()                              # commands: script and words
    start: str = ''                                 # the trial whose other stages it takes
    infer: str = ''                                 # words for infer.py
    seeds: tuple = (0,)
    sets: tuple = ('test',)                         # of SETS or FEW, or 'validation': that of the training phantoms
    few: bool = False                               # trained on the few of another kind, not on the usual subjects
    pretrained: str = ''                            # the trial whose weights its networks begin with
    subjects: int = 0                               # the first so many training subjects; 0: all; or more (study.data)
    intervals: bool = False                         # fitted on validation, judged on the sets

    task = property(lambda self: self.name.split('/')[0])
    label = property(lambda self: self.name.replace('/', '_'))

    def exp(self, seed):
        return f'study_{self.label}_{seed}'

    def file(self, seed, group):
        return FIGURES / f'{self.label}-{group}-{seed}.csv'

    def facts(self, seed):
        return FIGURES / f'{self.label}-{seed}.json'


AAE, UNET, POST = 'train_aae.py', 'train_unet.py', 'post_train.py'
REGRESSION = f'{UNET} --regression True'
CORE_7 = '--lesion_core 0.7'  # the default of then
ALL, THREE = (AAE, UNET, REGRESSION, POST), (0, 1, 2)
ALL_7 = (*ALL[:2], f'{ALL[2]} {CORE_7}', f'{POST} {CORE_7}')
BOTH, MORE, VALIDATION = ('test', 'shifted'), ('test', 'shifted', 'validation'), ('validation',)
WITH_FRESH = (*BOTH, 'fresh')
LATENT = f'{POST} --detail_branch False --post_steps 300'
WHOLE = '--trim False'  # on the whole grid
LONG = f'{REGRESSION} --regression_steps 2600 {WHOLE}'
PLAIN = f'{LONG} --lesion_head False'
WEIGHT = '--lesion_head False --regression_w_lesion 0.3'  # the rival with the lesion weight in its loss
BOXED = f'{REGRESSION} --regression_steps 4300'
FAR = f'{REGRESSION} --regression_steps 10000'
EVERYWHERE = '--lesion_odds 4 --lesion_core 0'
ODDS_6 = f'--lesion_odds 6 {CORE_7}'  # both the default of then
NOISE = '--source_noise 0.07'
POST_6 = f'{POST} {ODDS_6}'
LAPT_LOSS = '--post_loss lapt --w_diffusion 1 --w_image 0.01 --w_lesion 0.02'
LAPT = ('--predict eps --normalise_latents False --last_step_share 0 --latent_channels 3 --optimizer adam --context 0 '
        '--trim False')
ILCLDM = ('--predict eps --schedule linear --normalise_latents False --last_step_share 0 --latent_channels 1 '
          '--label_drop 0 --optimizer adam --trim False')
MONAI = 'monai_ldm.py --cpu_seconds 700 --only_validation'  # with a Python that has MONAI
DDIM = '--sampler ddim --num_steps 50'
PAPER_DDIM = f'{DDIM} --mirror False'
OLD_AAE, OLD_UNET = f'{AAE} {WHOLE}', f'{UNET} {WHOLE}'
OLD_REGRESSION = f'{REGRESSION} {WHOLE} --lesion_head False --regression_lr 1e-3 --regression_steps 1500'
HEAVY = f'{POST} --lesion_odds 1 --detail_lr_scale 0.5 --post_steps 150'
BEFORE = f'{POST} --lesion_head False --detail_lr_scale 0.5 --post_steps 300'
EARLIER = OLD_AAE, OLD_UNET, OLD_REGRESSION, BEFORE
OLD_START = f'{REGRESSION} --label_head False --regression_lr 1e-3 --regression_steps 900'
OLD_POST = f'{POST} --label_head False --detail_lr_scale 0.5 --post_steps 100'
STEPS_HALF = '--aae_steps 60', '--unet_steps 60', '--regression_steps 750', '--post_steps 150'
STEPS_DOUBLE = '--aae_steps 240', '--unet_steps 240', '--regression_steps 3000', '--post_steps 600'

TRIALS = [
    # Stroke. The rivals in boxes have the time of all stages of ours; those on the whole grid that of ours there.
    Trial('stroke/ours', "ours with lesion_core 0.7, the demo's settings of then", ALL_7, infer=CORE_7, seeds=THREE,
          sets=(*WITH_FRESH, *VALIDATION)),
    Trial('stroke/odds_6', 'ours, lesion_odds 6 in stage 3 and inference', (POST_6,), 'stroke/ours', ODDS_6,
          THREE, MORE),
    Trial('stroke/steps_2600', 'ours, 2600 steps of regression, odds 6',
          (AAE, UNET, f'{ALL_7[2]} --regression_steps 2600', POST_6), infer=ODDS_6, seeds=THREE,
          sets=MORE),
    Trial('stroke/untrimmed', 'ours on the whole grid, 2150 steps of regression, odds 6',
          (OLD_AAE, OLD_UNET, f'{ALL_7[2]} {WHOLE} --regression_steps 2150', POST_6), infer=ODDS_6,
          seeds=THREE, sets=MORE),
    Trial('stroke/start', 'the regression with lesion head that stage 3 starts from, the same odds', (), 'stroke/ours',
          f'--stage regression {CORE_7}', THREE, BOTH),
    Trial('stroke/odds_1', 'ours, lesion_odds 1 in inference', (), 'stroke/ours', '--lesion_odds 1', THREE, BOTH),
    Trial('stroke/odds_12', 'ours, lesion_odds 12 in inference', (), 'stroke/ours', f'--lesion_odds 12 {CORE_7}', THREE,
          BOTH),
    Trial('stroke/everywhere', 'ours on the whole grid with odds 4 everywhere, not only near a sure voxel',
          (f'{POST} {EVERYWHERE}',), 'stroke/untrimmed', EVERYWHERE, THREE, MORE),
    Trial('stroke/start_odds_1', 'the regression that ours on the whole grid starts from, lesion_odds 1', (),
          'stroke/untrimmed', '--stage regression --lesion_odds 1', THREE, BOTH),
    Trial('stroke/regression', 'regression U-Net, the same lesion weight, 2600 steps on the whole grid',
          (f'{LONG} {WEIGHT}',), 'stroke/untrimmed', '--stage regression', THREE, BOTH),
    Trial('stroke/regression_plain', 'regression U-Net, no lesion weight, 2600 steps on the whole grid',
          (PLAIN,), 'stroke/untrimmed', '--stage regression', THREE, BOTH),
    Trial('stroke/regression_boxed', 'regression U-Net, the same lesion weight, 4300 steps in boxes, equal time',
          (f'{BOXED} {WEIGHT}',), 'stroke/ours', '--stage regression', THREE, WITH_FRESH),
    Trial('stroke/plain_boxed', 'regression U-Net, no lesion weight, 4300 steps in boxes, equal time',
          (f'{BOXED} --lesion_head False',), 'stroke/ours', '--stage regression', THREE, WITH_FRESH),
    Trial('stroke/head_boxed', 'regression U-Net with our lesion head and odds, 4300 steps in boxes, equal time',
          (f'{BOXED} {CORE_7}',), 'stroke/ours', f'--stage regression {CORE_7}', THREE, WITH_FRESH),
    Trial('stroke/ours_long', 'ours, 9000 steps, lesion_core 0.7',
          (AAE, UNET, f'{ALL_7[2]} --regression_steps 9000', ALL_7[3]), infer=CORE_7, seeds=THREE,
          sets=BOTH),
    Trial('stroke/ours_long_odds_1', 'ours, 9000 steps, lesion_odds 1 in inference', (), 'stroke/ours_long',
          '--lesion_odds 1', THREE, BOTH),
    Trial('stroke/ours_long_sure', 'ours, 9000 steps of regression, in the time of 10000 of the rivals', (),
          'stroke/ours_long', '', THREE, BOTH),
    Trial('stroke/ours_long_odds_2', 'ours, 9000 steps, lesion_odds 2 in inference', (), 'stroke/ours_long',
          '--lesion_odds 2', THREE, BOTH),
    Trial('stroke/head_long', 'regression U-Net with our lesion head and odds, 10000 steps, lesion_core 0.7',
          (f'{FAR} {CORE_7}',), infer=f'--stage regression {CORE_7}', seeds=THREE, sets=BOTH),
    Trial('stroke/head_long_odds_1', 'regression U-Net with our lesion head, 10000 steps, lesion_odds 1', (),
          'stroke/head_long', '--stage regression --lesion_odds 1', THREE, BOTH),
    Trial('stroke/head_long_sure', 'regression U-Net with our lesion head and odds, 10000 steps in boxes', (),
          'stroke/head_long', '--stage regression', (0, 1), BOTH),
    Trial('stroke/head_long_odds_2', 'regression U-Net with our lesion head, 10000 steps, lesion_odds 2', (),
          'stroke/head_long', '--stage regression --lesion_odds 2', (0, 1), BOTH),
    Trial('stroke/head_long_many', 'the same, 944 training subjects instead of 144',
          (FAR,), infer='--stage regression', sets=BOTH, subjects=1000),
    Trial('stroke/head_long_many_odds_1', '944 training subjects, lesion_odds 1', (), 'stroke/head_long_many',
          '--stage regression --lesion_odds 1', sets=BOTH),
    Trial('stroke/weighted_long', 'regression U-Net, the same lesion weight, 10000 steps in boxes',
          (f'{FAR} {WEIGHT}',), infer='--stage regression', seeds=THREE, sets=BOTH),
    Trial('stroke/weighted_long_many', 'regression U-Net, the same lesion weight, 944 training subjects',
          (f'{FAR} {WEIGHT}',), infer='--stage regression', sets=BOTH, subjects=1000),
    Trial('stroke/plain_long_many', 'regression U-Net, no lesion weight, 944 training subjects',
          (f'{FAR} --lesion_head False',), infer='--stage regression', sets=BOTH, subjects=1000),
    Trial('stroke/plain_long', 'regression U-Net, no lesion weight, 10000 steps in boxes',
          (f'{FAR} --lesion_head False',), infer='--stage regression', seeds=THREE, sets=BOTH),
    Trial('stroke/regression_head', 'regression U-Net with our lesion head, odds 6, 2600 steps on the whole grid',
          (f'{LONG} {CORE_7}',), 'stroke/untrimmed', f'--stage regression {ODDS_6}', THREE, BOTH),
    Trial('stroke/no_head', 'ours on the whole grid without lesion head',
          (f'{REGRESSION} --lesion_head False {WHOLE} --regression_steps 2150',
           f'{POST} --lesion_head False'), 'stroke/untrimmed', sets=BOTH),
    Trial('stroke/head_odds_1', 'ours before the odds: the lesion weight alone moves the lesion',
          (OLD_AAE, OLD_UNET, f'{REGRESSION} {WHOLE} --regression_steps 1900', HEAVY),
          infer='--lesion_odds 1', seeds=THREE, sets=MORE),
    Trial('stroke/head_odds_1_weight_05', 'the same, w_lesion 0.5', (f'{HEAVY} --w_lesion 0.5',), 'stroke/head_odds_1',
          '--lesion_odds 1', sets=BOTH),
    Trial('stroke/regression_simple', 'plain regression, single slices, AdamW at 2e-3, not mirrored',
          (f'{PLAIN} --context 0 --optimizer adam --regression_lr 2e-3',), 'stroke/untrimmed',
          '--stage regression --mirror False'),
    Trial('stroke/stage2', 'the latent network before post-training', (), 'stroke/steps_2600', '--stage unet', THREE,
          BOTH),
    Trial('stroke/control', 'latent network trained on for 300 steps with w_image = w_lesion = 0',
          (f'{LATENT} --w_image 0 --w_lesion 0',), 'stroke/steps_2600', seeds=THREE, sets=BOTH),
    Trial('stroke/no_detail', 'post-training without detail branch, 300 steps', (LATENT,),
          'stroke/untrimmed', seeds=THREE),
    Trial('stroke/no_detail_weight_0', 'without detail branch, w_lesion 0', (f'{LATENT} --w_lesion 0',),
          'stroke/untrimmed'),
    Trial('stroke/no_detail_weight_2', 'without detail branch, w_lesion 2', (f'{LATENT} --w_lesion 2',),
          'stroke/untrimmed'),
    Trial('stroke/frozen_decoder', 'without detail branch, decoder not tuned', (f'{LATENT} --tune_decoder False',),
          'stroke/untrimmed'),
    Trial('stroke/lapt_loss', "without detail branch, LAPT's loss and weights", (f'{LATENT} {LAPT_LOSS}',),
          'stroke/untrimmed'),
    Trial('stroke/stage2_not_mirrored', 'the latent network before post-training, not mirrored', (), 'stroke/untrimmed',
          '--stage unet --mirror False'),
    Trial('stroke/latent_regression', 'regression of the latent: stage 2 at t = T-1 only, 2000 steps',
          (f'{OLD_UNET} --last_step_share 1 --unet_steps 2000',), 'stroke/untrimmed', '--stage unet'),
    Trial('stroke/lapt', "LAPT's recipe at the demo's size, 50 DDIM steps",
          (f'{AAE} {LAPT} {PAPER_DDIM} --aae_steps 300', f'{UNET} {LAPT} {PAPER_DDIM} --unet_steps 1200',
           f'{POST} {LAPT_LOSS} {PAPER_DDIM} --lambda_t linear --flip False --shift 0 --post_last_step_share 0 '
           '--tune_decoder False --detail_branch False --optimizer adam --post_steps 300 --post_lr 1e-4'), '',
          PAPER_DDIM),
    Trial('stroke/anew', 'ours, lesion_core 0.7', ALL_7, infer=CORE_7, seeds=THREE, sets=BOTH, intervals=True),
    Trial('stroke/sure', "ours, by the demo's settings", (POST,), 'stroke/anew', '', THREE, (*WITH_FRESH, *VALIDATION),
          intervals=True),
    Trial('stroke/sure_odds_1', 'ours, lesion_odds 1 in inference', (), 'stroke/sure', '--lesion_odds 1', THREE, BOTH),
    Trial('stroke/sure_odds_2', 'ours, lesion_odds 2 in inference', (), 'stroke/sure', '--lesion_odds 2', THREE, BOTH),
    Trial('stroke/sure_odds_12', 'ours, lesion_odds 12 in inference', (), 'stroke/sure', '--lesion_odds 12', THREE,
          BOTH),
    Trial('stroke/sure_start', 'the regression with lesion head that stage 3 starts from, the same odds', (),
          'stroke/sure', '--stage regression', THREE, WITH_FRESH),
    Trial('stroke/anew_start', 'the regression that stage 3 of ours starts from, without noise', (), 'stroke/anew',
          f'--stage regression {CORE_7}', THREE, BOTH),
    Trial('stroke/start_noise', 'regression U-Net of ours with noise on the source in training, lesion_core 0.7',
          (f'{REGRESSION} {NOISE} {CORE_7}',), infer=f'--stage regression {CORE_7}', seeds=THREE,
          sets=BOTH),
    Trial('stroke/start_noise_sure', 'regression U-Net of ours with noise on the source in training', (),
          'stroke/start_noise', '--stage regression', THREE, BOTH),
    Trial('stroke/anew_plain', 'regression U-Net, no lesion weight, 4300 steps: the difference of the mirrored views',
          (f'{BOXED} --lesion_head False',), infer='--stage regression', seeds=(0, 1), sets=BOTH,
          intervals=True),
    Trial('stroke/anew_one_width', 'the same, not mirrored: one width for all voxels', (), 'stroke/anew_plain',
          '--stage regression --mirror False', (0, 1), BOTH, intervals=True),
    Trial('stroke/monai', "MONAI's latent diffusion by its tutorial, 50 DDIM steps", (MONAI,), sets=BOTH),

    # Few subjects of another kind: what do phantoms teach that 30 patients cannot?
    Trial('stroke/phantoms', 'regression U-Net of ours, 144 subjects of the usual kind', (REGRESSION,),
          infer='--stage regression', seeds=THREE, sets=('shifted',)),
    Trial('stroke/few', 'regression U-Net of ours, 30 subjects of the kind of the set',
          (f'{REGRESSION} --eval_every 250',), infer='--stage regression', seeds=THREE, sets=('shifted',), few=True),
    Trial('stroke/few_pretrained', 'trained on the 144, then for 300 steps at 3e-5 on the 30',
          (f'{REGRESSION} --regression_steps 300 --regression_lr 3e-5 --eval_every 100',), infer='--stage regression',
          seeds=THREE, sets=('shifted',), few=True, pretrained='stroke/phantoms'),
    Trial('stroke/few_pretrained_core_5', 'the same networks, lesion_core 0.5', (), 'stroke/few_pretrained',
          '--stage regression --lesion_core 0.5', THREE, ('shifted',)),
    Trial('stroke/few_pretrained_lr_high', 'trained on the 144, then for 1000 steps at 5e-4 on the 30',
          (f'{REGRESSION} --regression_steps 1000 --eval_every 250',), infer='--stage regression',
          sets=('shifted',), few=True, pretrained='stroke/phantoms'),

    # Ours before the lesion head and at twice the regression's rate, and what was varied then.
    Trial('stroke/earlier', 'ours before the lesion head', EARLIER, seeds=THREE, sets=MORE),
    Trial('stroke/earlier_start', 'the plain regression that it starts from', (), 'stroke/earlier',
          '--stage regression', THREE, BOTH),
    Trial('stroke/weighted_lr_high', 'regression U-Net, the same lesion weight, equal time',
          (f'{LONG} {WEIGHT} --regression_lr 1e-3',), 'stroke/earlier', '--stage regression', THREE, BOTH),
    Trial('stroke/plain_lr_high', 'regression U-Net, no lesion weight, equal time', (f'{PLAIN} --regression_lr 1e-3',),
          'stroke/earlier', '--stage regression', THREE, MORE),
    Trial('stroke/plain_lr_2e3', 'the same at a rate of 2e-3', (f'{PLAIN} --regression_lr 2e-3',), 'stroke/earlier',
          '--stage regression', sets=VALIDATION),
    Trial('stroke/l2_l1', 'squared error in the mask (post_loss l2_l1)', (*EARLIER[:3], f'{BEFORE} --post_loss l2_l1'),
          seeds=THREE, sets=MORE),
    Trial('stroke/weight_05', 'w_lesion 0.5', (f'{BEFORE} --w_lesion 0.5',), 'stroke/earlier',
          sets=('test', 'validation')),
    Trial('stroke/weight_1', 'w_lesion 1', (f'{BEFORE} --w_lesion 1',), 'stroke/earlier'),
    Trial('stroke/from_weighted', 'from a regression with the lesion weight',
          (f'{OLD_REGRESSION} --regression_w_lesion 0.3', BEFORE), 'stroke/earlier', sets=VALIDATION),
    Trial('stroke/ddim2', '2 DDIM steps', (), 'stroke/earlier', '--sampler ddim --num_steps 2'),
    Trial('stroke/ddim5', '5 DDIM steps', (), 'stroke/earlier', '--sampler ddim --num_steps 5'),
    Trial('stroke/ddim10', '10 DDIM steps', (), 'stroke/earlier', '--sampler ddim --num_steps 10'),
    Trial('stroke/ddim50', '50 DDIM steps', (), 'stroke/earlier', DDIM),
    Trial('stroke/ddpm', '1000 DDPM steps', (), 'stroke/earlier', '--sampler ddpm --num_steps 1000', sets=('first10',)),
    Trial('stroke/samples4', 'one step, mean of 4 latents', (), 'stroke/earlier', '--samples 4'),
    Trial('stroke/samples16', 'one step, mean of 16 latents', (), 'stroke/earlier', '--samples 16'),
    Trial('stroke/not_mirrored', 'without the mean with the mirrored source', (), 'stroke/earlier', '--mirror False'),
    Trial('stroke/fp32', 'all stages and inference in fp32', tuple(f'{c} --precision fp32' for c in EARLIER), '',
          '--precision fp32'),
    Trial('stroke/subjects_10', '10 training subjects', EARLIER, subjects=10),
    Trial('stroke/subjects_30', '30 training subjects', EARLIER, subjects=30),
    Trial('stroke/steps_half', 'half of the steps', tuple(map(' '.join, zip(EARLIER, STEPS_HALF, strict=True)))),
    Trial('stroke/steps_double', 'twice the steps', tuple(map(' '.join, zip(EARLIER, STEPS_DOUBLE, strict=True)))),
    Trial('stroke/post_lr_half', 'half the learning rate for all of stage 3',
          (f'{BEFORE} --post_lr 2.5e-4 --detail_lr_scale 1',), 'stroke/earlier', sets=VALIDATION),
    Trial('stroke/post_lr_double', 'twice the learning rate, for the detail branch too',
          (f'{BEFORE} --post_lr 1e-3 --detail_lr_scale 1',), 'stroke/earlier', sets=VALIDATION),
    Trial('stroke/post_lr_half_weight_05', 'half the learning rate for all of stage 3, w_lesion 0.5',
          (f'{BEFORE} --post_lr 2.5e-4 --detail_lr_scale 1 --w_lesion 0.5',), 'stroke/earlier', sets=VALIDATION),
    Trial('stroke/detail_lr_1', 'the same learning rate for the detail branch', (f'{BEFORE} --detail_lr_scale 1',),
          'stroke/earlier', seeds=(0, 1), sets=VALIDATION),
    Trial('stroke/detail_lr_quarter_weight_05', 'a quarter of it for the detail branch, w_lesion 0.5',
          (f'{BEFORE} --detail_lr_scale 0.25 --w_lesion 0.5',), 'stroke/earlier', sets=VALIDATION),

    # Amyloid.
    Trial('amyloid/ours', "ours, by the demo's settings", ALL, seeds=THREE, sets=MORE),
    Trial('amyloid/start', 'the regression with label head that stage 3 starts from', (), 'amyloid/ours',
          '--stage regression', sets=BOTH),
    Trial('amyloid/steps_950', 'ours with 950 steps of regression instead of 600',
          (*ALL[:2], f'{REGRESSION} --regression_steps 950', POST), seeds=(0, 1), sets=MORE),
    Trial('amyloid/regression', 'regression U-Net on the image grid, 1300 steps',
          (f'{REGRESSION} --regression_steps 1300 --label_head False',), 'amyloid/ours', '--stage regression', THREE,
          MORE),
    Trial('amyloid/anew', 'ours, trained anew', ALL, seeds=THREE, sets=BOTH, intervals=True),
    Trial('amyloid/anew_plain', 'regression U-Net, no labels, 930 steps, equal time',
          (f'{REGRESSION} --regression_steps 930 --label_head False',), infer='--stage regression', seeds=THREE,
          sets=BOTH, intervals=True),
    Trial('amyloid/label_given', 'the true label given at inference', (), 'amyloid/ours', '--label true'),
    Trial('amyloid/il_cldm', "IL-CLDM's recipe at the demo's size, 50 DDIM steps",
          (f'{AAE} {ILCLDM} {PAPER_DDIM}', f'{UNET} {ILCLDM} {PAPER_DDIM} --unet_steps 1150'), '', PAPER_DDIM),

    # The same with all regressions at a rate of 1e-3.
    Trial('amyloid/lr_high', 'ours, 950 steps of regression at 1e-3',
          (*ALL[:2], f'{REGRESSION} --regression_steps 950 --regression_lr 1e-3', POST), seeds=THREE,
          sets=MORE),
    Trial('amyloid/lr_high_start', 'the regression with label head that stage 3 starts from', (), 'amyloid/lr_high',
          '--stage regression', THREE, BOTH),
    Trial('amyloid/lr_high_label_given', 'the true label given at inference', (), 'amyloid/lr_high', '--label true',
          THREE),
    Trial('amyloid/regression_lr_high', 'regression U-Net on the image grid, at 1e-3',
          (f'{REGRESSION} --regression_steps 1300 --label_head False --regression_lr 1e-3',), 'amyloid/lr_high',
          '--stage regression', THREE, MORE),

    # Ours before the label head: only the latent network reads the label.
    Trial('amyloid/earlier', 'ours before the label head', (*ALL[:2], OLD_START, OLD_POST), seeds=THREE, sets=MORE),
    Trial('amyloid/earlier_start', 'the plain regression that it starts from', (), 'amyloid/earlier',
          '--stage regression', THREE, BOTH),
    Trial('amyloid/no_label', 'labels never read', (f'{UNET} --num_classes 0', f'{OLD_POST} --num_classes 0'),
          'amyloid/earlier', seeds=THREE),
    Trial('amyloid/never_dropped', "IL-CLDM's way: label never dropped in training, absent at sampling",
          (f'{UNET} --label_drop 0', f'{OLD_POST} --label_drop 0'), 'amyloid/earlier', seeds=THREE),
    Trial('amyloid/stage2', 'its latent network before post-training', (), 'amyloid/earlier', '--stage unet'),
    Trial('amyloid/earlier_label_given', 'the true label given at inference', (), 'amyloid/earlier', '--label true',
          THREE),
    Trial('amyloid/guidance2', 'the true label given, guidance 2', (), 'amyloid/earlier', '--label true --guidance 2'),
    Trial('amyloid/guidance4', 'the true label given, guidance 4', (), 'amyloid/earlier', '--label true --guidance 4'),
    Trial('amyloid/control', 'latent network trained on with w_image = w_lesion = 0',
          (f'{LATENT} --w_image 0 --w_lesion 0',), 'amyloid/earlier'),
    Trial('amyloid/ddim50', '50 DDIM steps', (), 'amyloid/earlier', DDIM),
]
BY_NAME = {trial.name: trial for trial in TRIALS}
