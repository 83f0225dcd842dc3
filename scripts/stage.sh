# shellcheck shell=bash
# Sourced by the other scripts: run a command under a heading, then say how many seconds it took.

stage() {
    local heading=$1 began=$SECONDS
    shift
    printf '\n== %s ==\n' "$heading"
    "$@" || { printf '== %s: FAILED after %s s ==\n' "$heading" "$((SECONDS - began))" >&2; return 1; }
    printf '== %s: %s s ==\n' "$heading" "$((SECONDS - began))"
}
