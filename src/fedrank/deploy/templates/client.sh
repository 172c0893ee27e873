#!/usr/bin/env bash
# A site's two programs: the worker, which keeps model and rows loaded, and the SuperNode, which carries messages to it.
# Without words: both, each started again when it ends, until this is stopped (Ctrl-C, SIGTERM). `client.sh worker` and
# `client.sh supernode` are one of them, once. FEDRANK_BIN: the folder of fedrank's programs, where they are not on the
# path. FEDRANK_PORT: a free port of this machine, for the SuperNode's own processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH="${FEDRANK_BIN:+$FEDRANK_BIN:}$PATH"
# The last is in seconds; Flower's default of 1 would be waited for in every message.
export FLWR_HOME="$PWD/flower" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.25
command -v flower-supernode >/dev/null || { echo "client.sh: no flower-supernode on the path; set FEDRANK_BIN" >&2; exit 2; }
umask 077

# shellcheck disable=SC2329 # both are called by their names
worker() { exec fedrank site serve site.yaml; }

# shellcheck disable=SC2329
supernode() {
  exec flower-supernode --superlink @superlink@ @secure@ \
    --port "${FEDRANK_PORT:-@port@}" --node-config "site=\"$PWD/site.yaml\""
}

case "${1:-both}" in
  worker | supernode) "$1" ;;
  both) ;;
  *) echo "client.sh: $1 is neither worker nor supernode" >&2; exit 2 ;;
esac

# After a kill, the SuperLink takes a SuperNode again once it has missed two heartbeats: until then it is tried again.
# 2 is a mistake in the site file or in this one: trying again would not help.
keep() {
  local child code
  trap 'kill "$child" 2>/dev/null || true; wait "$child" || true; exit 0' TERM
  while :; do
    "$1" &
    child=$! code=0
    wait "$child" || code=$?
    [ "$code" != 2 ] || exit 2
    echo "client.sh: the $1 ended ($code); again in 5 s" >&2
    sleep 5 &
    child=$!
    wait "$child"
  done
}

keep worker &
keeping=$!
keep supernode &
keeping="$keeping $!"
stop() {
  trap '' INT TERM
  # shellcheck disable=SC2086 # two numbers
  kill $keeping 2>/dev/null || true
  wait || true
  exit "$1"
}
trap 'stop 0' INT TERM
code=0
wait -n || code=$?
stop "$code"
