#!/bin/sh
# The image's Apex stage: writes a wheel to the folder $1, or leaves it empty if WITH_APEX is not 1.
# PyPI's "apex" is an unrelated package, so the source is NVIDIA's repository at APEX_COMMIT.
set -eu

mkdir -p "$1"
case "${WITH_APEX:-0}" in
    0) echo "Apex: not built (WITH_APEX=0)"; exit 0 ;;
    1) ;;
    *) echo "build_apex.sh: WITH_APEX must be 0 or 1, not '$WITH_APEX'" >&2; exit 2 ;;
esac
if [ "$(printf %s "${APEX_COMMIT:-}" | grep -cE '^[0-9a-f]{40}$')" != 1 ]; then
    echo "build_apex.sh: APEX_COMMIT must be a whole commit id (40 hex digits)," \
        "not '${APEX_COMMIT:-}'" >&2
    exit 2
fi
for tool in git nvcc python3; do
    if ! command -v "$tool" >/dev/null; then
        echo "build_apex.sh: WITH_APEX=1 needs a CUDA base image with git, nvcc and torch" \
            "(--build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:YY.MM-py3); $tool is missing" >&2
        exit 2
    fi
done

git init --quiet /tmp/apex
git -C /tmp/apex fetch --quiet --depth 1 https://github.com/NVIDIA/apex "$APEX_COMMIT"
git -C /tmp/apex checkout --quiet FETCH_HEAD
if [ -n "${APEX_CUDA_ARCH_LIST:-}" ]; then export TORCH_CUDA_ARCH_LIST="$APEX_CUDA_ARCH_LIST"; fi
NVCC_APPEND_FLAGS="--threads 4" python3 -m pip wheel --no-deps --no-build-isolation \
    --config-settings "--build-option=--cpp_ext --cuda_ext --parallel 8" \
    --wheel-dir "$1" /tmp/apex
rm -rf /tmp/apex
