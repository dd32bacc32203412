# shellcheck shell=bash
# The host where ranks meet, as a shell sees it. Sourced. What Python makes of MASTER_ADDR is in
# vqmoe_megatron/runtime/meeting_place.py.

# plain_host HOST: without blanks around it and the brackets that an IPv6 address has in a URL.
plain_host() {
    local host
    read -r host <<<"$1"
    if [[ "$host" == "["*"]" ]]; then host=${host:1:-1}; fi
    echo "$host"
}

# in_uri HOST: as it stands in a URL.
in_uri() {
    if [[ "$1" == *:* ]]; then echo "[$1]"; else echo "$1"; fi
}

# resolves HOST: this machine knows an address of it. A name service that is silent counts as no, and
# so does the address that stands for any machine: each node would seek rank 0 on itself.
resolves() {
    local found
    found=$(timeout 30 getent ahosts "$1") || return 1
    [[ "$1" != "*" && "$found" != "0.0.0.0 "* && "$found" != ":: "* ]]
}
