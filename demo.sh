#!/usr/bin/env bash
# From nothing to results on made data: environment, phantoms, all stages, inference, figures, the test table.
#
#   bash demo.sh                     stroke: CT perfusion to DWI and ADC (preset ctp2dwi_demo)
#   bash demo.sh mri2pet_demo        amyloid: T1 MRI to PET
#   bash demo.sh ctp2dwi_demo --exp exp_9 --seed 1      settings after the preset go to every stage
#
# Run it again to go on where it stopped. SUBJECTS=12 bash demo.sh makes fewer phantoms, SHARE=1 bash demo.sh takes all
# steps and subjects on a slow machine, too (after a short demo with an --exp, --data_root and --data_info of its own).
# Both tasks may run at once.
set -euo pipefail

case ${1:-} in
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    '' | -*) preset=ctp2dwi_demo ;;
    ctp2dwi_demo | mri2pet_demo) preset=$1; shift ;;
    *) echo "demo.sh: the demos are ctp2dwi_demo and mri2pet_demo, not '$1'; other presets need your own data: see config.py." >&2; exit 2 ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$here"
export PYTHONUNBUFFERED=1       # the stages' lines appear as they are printed, though they pass through tee
times=$(printf '%-12s %6d s' set-up "$SECONDS")

# stage NAME SCRIPT ARGUMENTS: runs one script, shows and logs what it prints, and notes the seconds.
stage() {
    local name=$1 began=$SECONDS
    shift
    printf '\n=== %s: python %s\n' "$name" "$*"
    if ! "$python" "$@" 2>&1 | tee "$logs/$name.log"; then
        printf '\ndemo.sh: the step %s failed; what it printed is in %s. Run the same command again to go on from there.\n' \
            "$name" "$logs/$name.log" >&2
        exit 1
    fi
    times+=$(printf '\n%-12s %6d s' "$name" $((SECONDS - began)))
}

# What the settings make of the preset and the arguments, in the last line: the task, the experiment, the data folder, the
# number of subjects and the steps of the stages: all of them with a GPU or AMX, else what fits into ten minutes or so.
# Of a share of the regression's steps the other stages have four times that share, and the phantoms, too.
settings=$("$python" -c '
import os
import sys
import config
import utils
SHARES = {"ctp2dwi": dict(bf16=1 / 2, slow=1 / 10), "mri2pet": dict(slow=1 / 10)}  # on two cores
SUBJECTS = {"ctp2dwi": 200, "mri2pet": 192}  # one volume a subject, where stroke has some 25 slices
try:
    cfg = config.load("demo", argv=sys.argv[1:])
    kind, threads = utils.machine()
    share = float(os.environ.get("SHARE") or min(1, SHARES[cfg.task].get(kind, 1) * threads / 2))
    if not 0 < share <= 1:
        raise ValueError
except config.SettingError as error:
    sys.exit(f"demo.sh: {error}")
except ValueError:
    sys.exit("demo.sh: SHARE must be a number above 0 and at most 1: the share of the regression steps to take.")
others = min(1, 4 * share)
steps = dict(aae_steps=others, unet_steps=others, regression_steps=share, post_steps=others)
words = [f"--{name} {max(1, round(getattr(cfg, name) * part))}" for name, part in steps.items()
         if part < 1 and cfg.origin[name] != "command line"]
print(cfg.task, cfg.exp, cfg.data_root, round(SUBJECTS[cfg.task] * others), " ".join(words), sep="\t")
' --preset "$preset" "$@") || exit 1
IFS=$'\t' read -r task exp data subjects steps <<< "${settings##*$'\n'}"
subjects=${SUBJECTS:-$subjects}
if [ -n "$steps" ]; then
    printf 'demo.sh: to end within ten minutes or so on this machine: %s subjects and %s. ' "$subjects" "$steps"
    printf 'All of them: SHARE=1 bash demo.sh %s --exp all --data_root data/all --data_info data/all/data_info\n' "$preset"
fi

logs=result/demo_$exp
mkdir -p "$logs"

# phantom.py makes what is missing, and refuses a folder that holds anything else.
stage phantom phantom.py --task "$task" --out "$data" --subjects "$subjects" --seed 1
# shellcheck disable=SC2086    # the steps are words
set -- --preset "$preset" $steps "$@"
stage train_aae train_aae.py "$@"
stage train_unet train_unet.py "$@"
stage regression train_unet.py --regression True "$@"
stage post_train post_train.py "$@"
stage infer infer.py --split test "$@"
stage plot plot.py "$@"

printf '\n=== test subjects: result/%s/test_summary.csv\n' "$exp"
"$python" -c '
import sys
import pandas
import metrics
print(metrics.format_table(pandas.read_csv(sys.argv[1])))
' "result/$exp/test_summary.csv"
printf '\n=== figures\n'
ls -d "$here/result/$exp"/fig/*.png "$here/result/$exp/report.html"
printf '\n=== time\n%s\n%-12s %6d s\n' "$times" 'in all' "$SECONDS"
