#!/bin/sh
# signed-curl.sh METHOD TARGET [BODYFILE [CURL ARGUMENT...]]: one signed request, with openssl and curl.
# The target is sent byte for byte as given. BODYFILE is a regular file ('' for none): it is read twice.
# To have the functions in a script of your own: . ./signed-curl.sh

sha256() { openssl dgst -sha256 -binary; }
base64_line() { openssl base64 -A; }

# HMAC-SHA256 of stdin under $DOCKER_RUNNER_SHARED_SECRET, put together from its definition (RFC 2104): openssl takes a
# key on its command line only, where the process list shows it. printf is a part of the shell, and does not.
hmac() (
    secret() { printf %s "$DOCKER_RUNNER_SHARED_SECRET"; }
    hex() { od -An -v -tx1 | tr -d ' \n'; }
    key=$(secret | hex)
    [ ${#key} -le 128 ] || key=$(secret | sha256 | hex)
    while [ ${#key} -lt 128 ]; do key=${key}00; done
    pad() { # the key's 64 bytes, each XOR $1
        rest=$key
        while [ "$rest" ]; do
            after=${rest#??}
            printf "\\$(printf %03o $((0x${rest%"$after"} ^ $1)))"
            rest=$after
        done
    }
    { pad 0x5c; { pad 0x36; cat; } | sha256; } | sha256
)

# signature METHOD TARGET TIMESTAMP NONCE BODYHASH
signature() {
    printf '%s\n%s\n%s\n%s\n%s' "$(printf %s "$1" | tr '[:lower:]' '[:upper:]')" "$2" "$3" "$4" "$5" | hmac | base64_line
}

signed_curl() (
    : "${DOCKER_RUNNER_URL:?}" "${DOCKER_RUNNER_SHARED_SECRET:?}"
    method=$1 target=$2 body=${3:-}
    shift $(($# < 3 ? $# : 3))
    if [ "$body" ]; then
        [ -f "$body" ] || { echo "$body: not a regular file" >&2; exit 2; }
        case $body in *.json) type=application/json ;; *) type=application/x-tar ;; esac
        set -- --upload-file "$body" -H "Content-Type: $type" "$@"
    fi
    [ "$method" != HEAD ] || set -- --head "$@"
    [ -z "${DOCKER_RUNNER_KEY:-}" ] || set -- -H "X-DR-Key: $DOCKER_RUNNER_KEY" "$@"
    timestamp=$(date +%s%3N) nonce=$(openssl rand -hex 16) hash=$(sha256 <"${body:-/dev/null}" | base64_line)
    curl --silent --show-error --fail-with-body --globoff --request "$method" --request-target "$target" \
        -H "X-DR-Timestamp: $timestamp" -H "X-DR-Nonce: $nonce" -H "X-DR-Content-SHA256: $hash" \
        -H "X-DR-Signature: $(signature "$method" "$target" "$timestamp" "$nonce" "$hash")" "$@" "$DOCKER_RUNNER_URL/"
)

case $0 in *signed-curl.sh) signed_curl "$@" ;; esac
