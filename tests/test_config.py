"""The settings: order of force, names and types that are wrong, presets, --help."""
import re
import subprocess
import sys

import pytest

import config
import settings
from config import DEFAULTS, PRESETS, SettingError


def load(*words, **more):
    return config.load('', argv=list(words), **more)


def refused(*words):
    """The sentence that refuses some command-line words; it is one line."""
    with pytest.raises(SettingError) as caught:
        load(*words)
    text = str(caught.value)
    assert '\n' not in text and caught.value.one_sentence
    return text


def test_constants_then_preset_then_command_line():
    plain = load()
    assert plain.as_dict() == DEFAULTS and plain.changes() == []
    preset = load('--preset', 'mri2pet_demo')
    assert preset.task == 'mri2pet' and preset.spatial_dims == 3 and preset.batch_size == 4
    both = load('--batch_size', '3', '--preset', 'mri2pet_demo')  # in whatever order they are given
    assert both.batch_size == 3 and both.spatial_dims == 3
    assert both.origin['batch_size'] == 'command line'
    assert both.origin['spatial_dims'] == 'preset mri2pet_demo'
    assert both.origin['seed'] == 'config.py'


def test_changes_says_each_value_that_differs_and_where_it_came_from():
    lines = load('--preset', 'mri2pet_demo', '--batch_size', '3', '--seed', str(DEFAULTS['seed'])).changes()
    assert 'batch_size = 3 (command line)' in lines
    assert 'spatial_dims = 3 (preset mri2pet_demo)' in lines
    assert "preset = 'mri2pet_demo' (command line)" in lines
    assert not [line for line in lines if line.startswith('seed')]  # given, but the constant's value
    assert len(lines) == len(set(line.split(' = ')[0] for line in lines))


def test_both_ways_of_writing_a_setting():
    assert load('--batch_size=7').batch_size == load('--batch-size', '7').batch_size == 7
    assert load('--source={root}/a=b.nii').source == '{root}/a=b.nii'


def test_a_switch_may_say_true_or_false():
    extra = {'restart': (False, '')}
    for words, expected in (((), False), (('--restart',), True), (('--restart=True',), True),
                            (('--restart=False',), False), (('--restart', '--seed', '3'), True)):
        assert config.load('', list(words), extra).restart is expected
    with pytest.raises(SettingError, match='is a switch'):
        config.load('', ['--restart=no'], extra)


def test_an_unknown_name_names_the_nearest():
    assert refused('--bach_size', '4') == "there is no setting 'bach_size'; did you mean 'batch_size'?"
    assert "'num_steps'" in refused('--num_step', '4')
    assert "'mri2pet_demo'" in refused('--preset', 'mri2pet_dmo')
    assert '--help' in refused('--xqzzw', '4')
    assert "did you mean 'ddim'" in refused('--sampler', 'dim')
    assert 'no value' in refused('--batch_size')
    assert "'batch_size'" in refused('batch_size', '4')
    assert "did you mean 'restart'" in str(pytest.raises(SettingError, load, '--restrt',
                                                         extra={'restart': (False, '')}).value)


@pytest.mark.parametrize('words, says', [
    (('--batch_size', 'four'), "'batch_size' must be int"),
    (('--targets', "{'dwi': '{id}', 'lesion': '{id}'}", '--scaling', str(dict.fromkeys(
        ('source', 'dwi', 'lesion'), ('range', 0, 1))), '--unit_scale', "{'source': 1, 'dwi': 1, 'lesion': 1}"),
     "targets has 'lesion', the name of another image"),
    (('--batch_size', '4.0'), "'batch_size' must be int"),
    (('--batch_size', '0'), 'above 0'),
    (('--batch_size', 'True'), "'batch_size' must be int"),
    (('--batch_size', 'None'), "'batch_size' must be int"),
    (('--lr', 'fast'), "'lr' must be float"),
    (('--lr', '-1'), 'above 0'),
    (('--lr', 'nan'), "'lr'"),
    (('--flip', '1'), "'flip' must be bool"),
    (('--flip', 'yes'), "'flip' must be bool"),
    (('--image_size', '64,72,1'), 'image_size'),
    (('--image_size', '(62, 72)'), 'multiples of 4'),
    (('--image_size', '(4, 72)'), 'multiples of 4'),
    (('--image_size', "('a', 'b')"), 'multiples of 4'),
    (('--spacing', '(3, 3)'), 'needs 3 values'),
    (('--preset', 'mri2pet_demo', '--context', '1'), 'is for slices'),
    (('--scaling', "{'source': ('range', 0, 100)}"), 'no entry for adc, dwi'),
    (('--scaling', "{'source': ('range', 9, 1), 'dwi': ('median', 0, 3), 'adc': ('range', 0, 1)}"), "'source'"),
    (('--targets', '{}'), 'targets is empty'),
    (('--batch_size', '6', '--accumulate', '4'), 'multiple of accumulate'),
    (('--predict', 'eps'), "'one_step' is refused"),
    (('--timesteps', '1', '--num_steps', '1'), 'must be 2 or more'),
    (('--unet_attention', '(2,)'), 'must name levels 0 to 1'),
    (('--crop', '(16, 16)'), 'is for volumes'),
    (('--lesion_rule', '(620, 1.25)'), 'must be three numbers'),
    (('--exp', '../elsewhere'), 'plain folder name'),
    (('--task', 'ct2mr'), 'must be one of ctp2dwi, mri2pet'),
    (('--aae_steps', '-5'), 'must not be negative'),
])
def test_wrong_values_are_refused_by_name(words, says):
    assert says in refused(*words)


def test_values_are_brought_to_the_settings_type():
    cfg = load('--lr', '1', '--image_size', '[64, 72]', '--unet_attention', '1', '--exp', '7', '--frames', 'None',
               '--mask', 'None')
    assert cfg.lr == 1.0 and type(cfg.lr) is float
    assert cfg.image_size == (64, 72) and cfg.unet_attention == (1,)
    assert cfg.exp == '7' and cfg.frames is None and cfg.mask is None


def test_labels_are_unknown_true_or_a_class():
    for label in ('unknown', 'true', '0', '1'):
        assert load('--preset', 'mri2pet_demo', '--label', label).label == label
    for label in ('2', '-1', 'positive', '1.0'):
        assert 'class number below num_classes = 2' in refused('--preset', 'mri2pet_demo', '--label', label)
    assert 'num_classes = 0' in refused('--label', '1')  # the stroke task has no labels


@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_loads_and_carries_its_own_place(preset):
    cfg = load('--preset', preset)
    assert cfg.preset == preset and set(PRESETS[preset]) <= set(DEFAULTS)
    for name, value in PRESETS[preset].items():
        assert getattr(cfg, name) == value
        assert type(getattr(cfg, name)) is type(settings.check(name, value, DEFAULTS[name]))
    if preset != config.preset:
        assert {'exp', 'data_root', 'data_info'} <= set(PRESETS[preset])
        assert cfg.exp not in [load('--preset', other).exp for other in PRESETS if other != preset]


def test_the_default_preset_changes_nothing():
    assert PRESETS[config.preset] == {}


def test_no_preset_is_changed_by_a_run():
    before = repr(PRESETS), repr(DEFAULTS)
    scaling = "{'source': ('range', 0, 1), 'suvr': ('range', 0, 2)}"
    load('--preset', 'mri2pet_demo', '--batch_size', '2', '--scaling', scaling)
    assert (repr(PRESETS), repr(DEFAULTS)) == before


FIXED_NAMES = '''preset exp init_from device precision seed data_root data_info cache_dir source targets mask lesion
    spatial_dims spacing image_size frames resample scaling unit_scale num_classes latent_channels normalise_latents
    predict schedule loss_weight last_step_share label_drop aae_steps unet_steps post_steps batch_size lr eval_every
    save_every post_loss lambda_t w_image w_lesion tune_decoder detail_branch sampler num_steps samples guidance label
    regression'''.split()


def test_names_that_others_rely_on():
    assert set(FIXED_NAMES) <= set(DEFAULTS)
    assert list(PRESETS) == ['ctp2dwi_demo', 'mri2pet_demo', 'ctp2dwi', 'mri2pet', 'lapt', 'il_cldm']


def test_help_lists_every_setting_with_its_comment_and_default():
    text = config.usage('What it does.', {'restart': (False, 'begin anew')})
    notes = config.comments()
    for name, value in DEFAULTS.items():
        line = [line for line in text.splitlines() if re.match(rf'  --{name} ', line)]
        assert len(line) == 1, name
        assert len(notes.get(name, '')) > 8, f'{name} has no trailing comment'
        assert notes[name] in line[0] and repr(value)[:50] in line[0]
    assert '--restart' in text and 'begin anew' in text and text.startswith('What it does.')


def test_every_constant_is_one_line_with_one_comment(repo):
    """What --help reads: name = value  # comment."""
    block = (repo / 'config.py').read_text().split('# ---')[1]
    for line in block.splitlines():
        if '=' in line.split('#')[0]:
            assert re.match(r'[a-z_]+ = .*?  +# \S', line), line


@pytest.mark.parametrize('script', ['train_aae.py', 'train_unet.py', 'post_train.py', 'infer.py'])
def test_help_and_misspelling_on_the_command_line(script, repo):
    run = subprocess.run([sys.executable, repo / script, '--bach_size', '3'], capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ''
    assert run.stderr == "there is no setting 'bach_size'; did you mean 'batch_size'?\n"
    if script == 'train_aae.py':
        run = subprocess.run([sys.executable, repo / script, '--help'], capture_output=True, text=True)
        assert run.returncode == 0 and '--restart' in run.stdout and '--latent_channels' in run.stdout
        assert run.stderr == ''


def test_config_needs_no_torch(repo):
    code = "import sys, config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=repo).returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# Constants as a user edits them

def edited(monkeypatch, **constants):
    for name, value in constants.items():
        monkeypatch.setitem(DEFAULTS, name, value)


@pytest.mark.parametrize('name, value, text', [
    ('precision', 'bf-16', "'precision' is 'bf-16', must be one of"), ('predict', 'vv', "'predict' is 'vv'"),
    ('batch_size', 0, "'batch_size' is 0, must be above 0"), ('batch_size', '16', "'batch_size' must be int, not '16'"),
    ('ema', 1.5, "'ema' is 1.5, must be at most 1"), ('flip', 'yes', "'flip' must be bool, not 'yes'"),
    ('dropout', -0.1, "'dropout' is -0.1, must not be negative"), ('targets', {'dwi': 3}, "'targets' must hold strs")])
def test_edited_constants_are_checked(monkeypatch, name, value, text):
    edited(monkeypatch, **{name: value})
    assert text in refused()


def test_an_edited_constant_does_not_change_what_its_setting_may_be(monkeypatch):
    edited(monkeypatch, w_lesion=0, spacing=[1, 1, None], label=0, num_classes=2)
    cfg = load('--w_lesion', '0.3')
    assert cfg.w_lesion == 0.3 and cfg.spacing == (1, 1, None) and cfg.label == '0'
    assert type(load().w_lesion) is float
    assert load('--preset', 'lapt', '--label', 'unknown').w_lesion == 0.02


def test_every_setting_has_its_kind():
    for name, value in DEFAULTS.items():
        kind = settings.KINDS.get(name, str)
        assert type(value) is kind or value is None and name in settings.MAY_BE_NONE, name
    assert set(settings.KINDS) | set(settings.MAY_BE_NONE) <= set(DEFAULTS)
