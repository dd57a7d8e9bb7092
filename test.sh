#!/usr/bin/env bash
# The tests: bash test.sh [pytest arguments]. Those marked slow are left out, unless the arguments say otherwise (-m slow).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$here"
exec "$python" -m pytest -m 'not slow' "$@"
