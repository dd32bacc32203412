# shellcheck shell=bash
# The host where ranks meet, as a shell sees it. Sourced. What Python makes of MASTER_ADDR is in
# vqmoe_megatron/runtime/meeting_place.py.

# plain_host HOST: without the brackets that an IPv6 address has in a URL.
plain_host() {
    local host=$1
    if [[ "$host" == "["*"]" ]]; then host=${host:1:-1}; fi
    echo "$host"
}

# in_uri HOST: as it stands in a URL.
in_uri() {
    if [[ "$1" == *:* ]]; then echo "[$1]"; else echo "$1"; fi
}

# resolves HOST: this machine knows an address of it. A name service that is silent counts as no.
resolves() { timeout 30 getent ahosts "$1" >/dev/null; }
