#!/usr/bin/env bash
# The environment: makes .venv beside this file and installs requirements.txt into it; does nothing if that is done.
#
#   bash setup.sh        only this; then `source .venv/bin/activate`
#   source setup.sh      from demo.sh, test.sh and .ci/run: sets $here, the repository, and $python, the environment's
#
# Which PyTorch:
#   1. One that the calling python3 can import is kept: the environment sees that python's packages behind its own.
#   2. One that stands in .venv already is kept, so you may make .venv and install the build of your choice first.
#   3. Linux without an NVIDIA GPU: the CPU build, where pip finds it on this machine or in an index you configured.
#   4. Otherwise what pip takes by itself, which on Linux is a CUDA build of several GB.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
python=$venv/bin/python
setup_log=$here/.venv.log
torch_min='2.6'                 # as in requirements.txt
torch_cpu='torch==2.13.0+cpu'

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What the environment was made from; it is compared with what .venv/setup_done holds.
setup_state() {
    cksum < "$here/requirements.txt"
    "$python" -c 'import sys, importlib.util as util; print(sys.version_info[:2], bool(util.find_spec("torch")))'
}

setup_done() { [ -x "$python" ] && [ -e "$venv/setup_done" ] && [ "$(setup_state 2>&1)" = "$(cat "$venv/setup_done")" ]; }

usable_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; }

# The first name that is a Python of 3.11 or newer and can make environments (Debian splits ensurepip off).
find_python() {
    local name seen=''
    for name in python3 python3.13 python3.12 python3.11 python; do
        if usable_python "$name"; then
            if "$name" -c 'import ensurepip, venv' > /dev/null 2>&1; then
                base=$name
                return
            fi
            seen+="; $name lacks the venv module (on Debian and Ubuntu: apt-get install python3-venv)"
        elif "$name" -V > /dev/null 2>&1; then
            seen+="; $name is $("$name" -V 2>&1)"
        fi
    done
    die "needs Python 3.11 or newer with its venv module$seen."
}

# Prints the package folders of the Python named first, if it has a PyTorch that works and is new enough.
torch_folders() {
    "$1" - "$torch_min" 2> /dev/null <<'EOF'
import os
import sys

import torch

minimum = [int(part) for part in sys.argv[1].split('.')]
if [int(part) for part in torch.__version__.split('.')[:2]] < minimum:
    sys.exit(1)
print('\n'.join(p for p in sys.path if os.path.basename(p) in ('site-packages', 'dist-packages') and os.path.isdir(p)))
EOF
}

has_gpu() { compgen -G '/dev/nvidia[0-9]*' > /dev/null || nvidia-smi -L 2> /dev/null | grep -q GPU; }

# On a terminal pip shows its own progress; elsewhere the step's one line is enough. All it has to say is in the log.
# Without bytecode the set-up takes half the time: only what is used will be compiled, on first use.
pip_install() {
    set -- "$python" -m pip install --no-user --no-compile --disable-pip-version-check "$@"
    if [ -t 1 ]; then
        "$@" --log "$setup_log"
    else
        "$@" >> "$setup_log" 2>&1
    fi
}

make_venv() {
    local folders
    find_python
    say "making .venv with $("$base" -V 2>&1)"
    mkdir -p "$venv"
    : > "$venv/made_by_setup"   # first of all: one that is cut short from here on is made anew, any other is not ours to remove
    "$base" -m venv "$venv" >> "$setup_log" 2>&1 || die "python -m venv failed; see $setup_log."
    if folders=$(torch_folders "$base"); then
        # A .pth file rather than --system-site-packages: that option would miss the packages of a calling environment.
        printf '%s\n' "$folders" > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
        "$python" -m pip uninstall -y setuptools >> "$setup_log" 2>&1    # venv's own may be older than PyTorch demands
        say "keeping the PyTorch of $(command -v "$base")"
    fi
}

install() {
    local began=$SECONDS
    : > "$setup_log"
    if [ -e "$venv/made_by_setup" ] && { [ ! -e "$venv/setup_done" ] || ! usable_python "$python"; }; then
        rm -rf "$venv"
    fi
    if [ ! -e "$venv" ]; then
        make_venv
    elif ! usable_python "$python" || ! "$python" -m pip --version > /dev/null 2>&1; then
        die "$venv is not a working environment of Python 3.11 or newer with pip; move it away and try again."
    fi

    if ! torch_folders "$python" > /dev/null && [ "$(uname -s)" = Linux ] && ! has_gpu; then
        say "installing PyTorch, CPU build"
        if ! pip_install "$torch_cpu" 2>> "$setup_log"; then
            say "pip finds no CPU build of PyTorch and will fetch the ordinary one, several GB more than this machine needs;" \
                "to avoid that, stop now, install the CPU build in an environment of your own with the command that the" \
                "selector on the PyTorch web site gives, activate that environment and start again."
        fi
    fi
    say "installing the packages of requirements.txt"
    pip_install -r "$here/requirements.txt" || {
        [ -t 1 ] || grep ERROR "$setup_log" | tail -n 5 >&2
        die "pip failed; see $setup_log."
    }
    "$python" -c 'import matplotlib.pyplot, nibabel, nilearn.datasets, pandas, scipy.ndimage, scipy.stats, skimage.metrics
import sklearn.linear_model, sklearn.metrics, torch, tqdm
torch.ones(1).numpy()' ||
        die "a package is installed but cannot be imported (see above); remove .venv and try again."
    if has_gpu && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        say "note: this machine has an NVIDIA GPU, but PyTorch $("$python" -c 'import torch; print(torch.__version__)') cannot use it."
    fi
    setup_state > "$venv/setup_done.tmp"
    mv "$venv/setup_done.tmp" "$venv/setup_done"
    say "done in $((SECONDS - began)) s: PyTorch $("$python" -c 'import torch; print(torch.__version__)')"
}

# Runs install alone: two demos may be started at the same time. The lock goes with its process, however that ends.
install_locked() {
    lock=$venv.lock
    [ -w "$here" ] || die "cannot write to $here."
    if command -v flock > /dev/null; then
        exec 9> "$lock"
        flock -n 9 || { say "waiting for another set-up to end"; flock 9; }
    else
        until mkdir "$lock.d" 2> /dev/null; do
            local owner
            owner=$(cat "$lock.d/pid" 2> /dev/null || true)
            if [ -n "$owner" ] && ! kill -0 "$owner" 2> /dev/null; then rm -rf "$lock.d"; fi
            sleep 1
        done
        echo $$ > "$lock.d/pid"
        trap 'rm -rf "$lock.d"' EXIT
    fi
    setup_done || install
}

unset PYTHONHOME PYTHONDONTWRITEBYTECODE    # the second would compile the packages anew in every process
setup_done || (install_locked) || exit 1
