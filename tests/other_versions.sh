#!/usr/bin/env bash
# The tests of other_versions.txt at the other end of the supported versions: the oldest torch, the
# newest megatron-core, and nothing else but what the package requires: no MLflow, no matplotlib, no
# sentencepiece. Makes an environment of its own, .venv-other-versions, or uses the one there is.
#
#   tests/other_versions.sh [PYTHON] [PYTEST ARGUMENTS]     PYTHON: 3.12 or newer; default: looked for
#
# megatron-core from 0.17 on needs Python 3.12; where there is none this says so and ends with 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-other-versions
python=${1:-}
for found in python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    # a shim of pyenv is there without a Python behind it
    if [ -z "$python" ] && "$found" -c 'import ensurepip' 2>/dev/null; then python=$found; fi
done
if [ -z "$python" ]; then
    echo "other versions: skipped, no Python 3.12 or newer is here (make test-versions OTHER_PYTHON=...)"
    exit 0
fi
shift $(($# > 0))

extra=$(sed -n 's/^ *\(torch>=.*\)$/\1/p' setup.cfg) # torch>=2.11,<2.14
oldest=${extra%%,*}
oldest=torch==${oldest#*>=}.*
stamp=$venv/.complete-$(cat setup.cfg tests/other_versions.sh | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$oldest"
    before=$("$venv/bin/python" -m pip freeze --all | grep -i '^torch==')
    # numpy: the interpreter of torch 2.11's triton, which kernels are tested in, fails with 2.4
    "$venv/bin/python" -m pip install --quiet -e '.[test]' 'numpy<2.4'
    after=$("$venv/bin/python" -m pip freeze --all | grep -i '^torch==')
    if [ "$before" != "$after" ]; then
        echo "other versions: the package replaced $before by $after" >&2
        exit 1
    fi
    touch "$stamp"
fi
"$venv/bin/python" -m pip list --format freeze | grep -E '^(torch|megatron-core|numpy|triton)=='
"$venv/bin/vqmoe" doctor
grep -v '^ *#' tests/other_versions.txt | xargs "$venv/bin/python" -m pytest -n 2 --dist loadgroup "$@"
