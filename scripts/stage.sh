# shellcheck shell=bash
# Sourced by the other scripts: run a command under a heading, then say how many seconds it took.
# A failing command ends the script by `set -e`; writing `"$@" || …` here would switch that off inside functions.

running=
trap '[ -z "$running" ] || printf "== %s: FAILED ==\n" "$running" >&2' EXIT

stage() {
    local began=$SECONDS
    running=$1
    shift
    printf '\n== %s ==\n' "$running"
    "$@"
    printf '== %s: %s s ==\n' "$running" "$((SECONDS - began))"
    running=
}
