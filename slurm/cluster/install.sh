#!/usr/bin/env bash
# Install the Debian packages that `make test-cluster` needs.
set -euo pipefail

packages=(slurm-wlm munge shellcheck buildah debootstrap)

usage() {
    cat <<HELP
usage: slurm/cluster/install.sh

Installs ${packages[*]} with apt-get; needs root and Debian 12 or Ubuntu 22.04 or newer.
slurm-wlm and munge make the virtual cluster, shellcheck reads the scripts, buildah and debootstrap
build the container image without a Docker daemon.

example
  sudo slurm/cluster/install.sh && eval "\$(sudo slurm/cluster/up.sh | tail -n1)"
HELP
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    usage
    exit 0
fi

missing=()
for package in "${packages[@]}"; do
    [[ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" == "install ok installed" ]] ||
        missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    echo "install.sh: ${packages[*]} are installed"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "install.sh: no apt-get here; install ${missing[*]} by other means" >&2
    exit 2
fi
if [[ $(id -u) -ne 0 ]]; then
    echo "install.sh: must be run as root to install ${missing[*]}" >&2
    exit 2
fi

export DEBIAN_FRONTEND=noninteractive
wait_for_lock=(-o DPkg::Lock::Timeout=300)
apt-get "${wait_for_lock[@]}" -qq update
apt-get "${wait_for_lock[@]}" -qq install -y --no-install-recommends "${missing[@]}"
