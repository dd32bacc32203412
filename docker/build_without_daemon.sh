#!/usr/bin/env bash
# Build docker/Dockerfile where no Docker daemon runs, and try the image: doctor and 10 steps.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: docker/build_without_daemon.sh [BUILDAH_OPTION ...]

Builds the CPU image with buildah (chroot isolation, so it also works inside a container), on a
Debian bookworm made with debootstrap. Then, as the image's own user: `vqmoe doctor`, a corpus, and
10 steps of recipes/quickstart.yaml on two ranks. Needs root, and on Debian
  apt-get install buildah debootstrap

environment
  IMAGE            name of the image                                (default localhost/vqmoe:cpu)
  BASE_IMAGE       build on this image instead of debootstrap's     (must hold python3)
  BASE_ARCHIVE     where debootstrap's base is kept as a .tar, and found again (default: not kept)
  DEBIAN_MIRROR    (default http://deb.debian.org/debian)
  STORE            folder for buildah's storage                     (default: buildah's own)
  STORAGE_DRIVER   buildah's storage driver                         (default vfs: works anywhere)
  TORCH_INDEX_URL  where torch comes from (default: PyTorch's CPU wheels, or the package sources
                   of pip's configuration here, if it names any)

example
  sudo STORE=/scratch/images docker/build_without_daemon.sh

exit codes: 0 built and trained, 2 usage or something missing, else that of the step which failed
HELP
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
fail() { echo "build_without_daemon.sh: $*" >&2; exit 2; }
(( $(id -u) == 0 )) || fail "needs root (chroot, debootstrap); you are $(id -un)"
needed=(buildah)
[[ -n "${BASE_IMAGE:-}" || -f "${BASE_ARCHIVE:-}" ]] || needed+=(debootstrap)
for tool in "${needed[@]}"; do
    command -v "$tool" >/dev/null || fail "needs $tool (Debian: apt-get install $tool)"
done

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=${IMAGE:-localhost/vqmoe:cpu}
base=${BASE_IMAGE:-localhost/vqmoe-base:bookworm}
work=$(mktemp -d "${TMPDIR:-/var/tmp}/vqmoe-image.XXXXXX")
storage=(--storage-driver "${STORAGE_DRIVER:-vfs}")
[[ -z "${STORE:-}" ]] || storage+=(--root "$STORE/root" --runroot "$STORE/run")
containers=()
b() { local command=$1; shift; buildah "${storage[@]}" "$command" "$@"; }
cleanup() {
    (( ${#containers[@]} == 0 )) || b rm "${containers[@]}" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap cleanup EXIT

if [[ -z "${BASE_IMAGE:-}" ]]; then
    archive=${BASE_ARCHIVE:-$work/base.tar}
    if [[ ! -f "$archive" ]]; then
        echo "== base: debootstrap bookworm"
        debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm \
            "$work/base" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" \
            >"$work/debootstrap.log" || { tail -n 20 "$work/debootstrap.log" >&2; exit 1; }
        rm -rf "$work/base/var/cache/apt/archives" "$work/base/var/lib/apt/lists"
        tar --numeric-owner -C "$work/base" -cf "$archive.part" . && mv "$archive.part" "$archive"
    fi
    containers=("$(b from scratch)")
    b add --quiet "${containers[0]}" "$archive" /
    b commit --quiet --rm "${containers[0]}" "$base"
fi

# pip inside finds packages where pip here does: its configuration, environment included, as one
# file, and the local folders that it names. Mounted during the build only.
{
    echo "[global]"
    { python3 -m pip config list || true; } | sed -nE "s/^[a-z:]+\.([a-z-]+)='(.*)'$/\1 = \2/p" |
        awk '!seen[$1]++' | sed 's/\\n/\n  /g'
} >"$work/pip.conf"
mounts=(-v "$work/pip.conf:/etc/pip.conf:ro")
[[ ! -d /etc/ssl/certs ]] || mounts+=(-v /etc/ssl/certs:/etc/ssl/certs:ro)
while read -r path; do  # a local index DIR/simple has its files in DIR
    [[ ! -e "$path" || "$path" == /etc/ssl/certs/* ]] || mounts+=(-v "$path:$path:ro")
done < <(grep -oE '/[^[:space:]]+' "$work/pip.conf" | sed -E 's|^/*|/|; s|/simple/?$||' | sort -u)
torch=https://download.pytorch.org/whl/cpu
grep -qE '^(find-links|(extra-)?index-url)' "$work/pip.conf" && torch=
torch=${TORCH_INDEX_URL-$torch}
echo "== build: $image on $base; torch from ${torch:-"the sources of pip's configuration"}"
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$repository/vqmoe_megatron/__init__.py")
b bud --isolation chroot --format docker --file "$repository/docker/Dockerfile" --tag "$image" \
    --build-arg BASE_IMAGE="$base" --build-arg VERSION="$version" \
    --build-arg TORCH_INDEX_URL="$torch" \
    --build-arg REVISION="$(git -C "$repository" rev-parse HEAD 2>/dev/null || echo unknown)" \
    --build-arg CREATED="$(date -u +%FT%TZ)" "${mounts[@]}" "$@" "$repository"

containers=("$(b from "$image")")
inside() { b run --isolation chroot "${containers[0]}" -- "$@"; }
echo "== inside: $(inside id)"
[[ $(inside id -u) == 10001 ]] || { echo "the image does not run as user 10001" >&2; exit 1; }
inside vqmoe doctor
inside vqmoe prepare stdlib --out data/stdlib
inside vqmoe pretrain recipes/quickstart.yaml --nproc 2 train.train_iters=10 \
    optimizer.lr_warmup_iters=2 train.output_dir=runs/smoke
inside cat runs/smoke/status.json
