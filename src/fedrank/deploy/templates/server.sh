#!/usr/bin/env bash
# The SuperLink, which plays runs, for this machine alone; and the gate, at which sites connect. The gate lets through what a
# site says, and no more: who reaches the SuperLink itself may submit apps. Both run until the SuperLink ends, or this is
# stopped (Ctrl-C, SIGTERM); a gate that ends is started again. FEDRANK_BIN: the folder of fedrank's programs, where they are
# not on the path. FEDRANK_LISTEN: the address to listen at.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH="${FEDRANK_BIN:+$FEDRANK_BIN:}$PATH"
# The last is in seconds; Flower's default of 1 would be waited for in every message.
export FLWR_HOME="$PWD/flower" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.25
command -v flower-superlink >/dev/null || { echo "server.sh: no flower-superlink on the path; set FEDRANK_BIN" >&2; exit 2; }
umask 077
mkdir -p flower runs

# How `flwr` on this machine reaches it.
cat >flower/config.toml <<END
[superlink]
default = "fedrank"

[superlink.fedrank]
address = "127.0.0.1:@inner@"
@connection@
END

listen=${FEDRANK_LISTEN:-@listen@}
answers() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }
# Whoever is there now would be taken for what is started here.
for at in "127.0.0.1 @inner@" "$listen @port@"; do
  # shellcheck disable=SC2086 # an address and a port
  if answers $at; then echo "server.sh: at ${at/ /, port } another program listens" >&2; exit 1; fi
done

flower-superlink --host 127.0.0.1 --port @inner@ --database flower/superlink.db \
  --disable-runtime-dependency-installation @secure@ &
running=$!
stop() {
  trap '' INT TERM
  # shellcheck disable=SC2086 # two numbers
  kill $running 2>/dev/null || true
  wait || true
  exit "${1:-0}"
}
trap stop INT TERM

# Until the program that was started last answers at this address; where it ends, with what it ends with.
await() {
  local code=0
  until answers "$1" "$2"; do
    kill -0 "$!" 2>/dev/null || break
    sleep 0.2
  done
  kill -0 "$!" 2>/dev/null && return
  wait "$!" || code=$?
  stop "$code"
}

await 127.0.0.1 @inner@
# The sites' public keys are registered once; the database remembers them. With their folder empty, nothing is.
for key in sites/*.pub; do
  [ -e "$key" ] || continue
  # The port for these orders opens a moment after the other.
  while said=$(flwr supernode register "$key" fedrank --format json 2>&1) || true; do
    case "$said" in
      *'SuperLink is unavailable'*) kill -0 "$running" 2>/dev/null || break ;;
      *) break ;;
    esac
    sleep 1
  done
  case "$said" in
    *'"success": true'*) echo "server.sh: $key is registered" ;;
    *'already in use'*) ;;
    *) echo "server.sh: $key cannot be registered: $said" >&2; stop 1 ;;
  esac
done
# It is what strangers can reach: where it ends it is started again, and the run goes on. 2 is a mistake in this file.
gate() {
  local child code
  trap 'kill "$child" 2>/dev/null || true; wait "$child" || true; exit 0' TERM
  while :; do
    fedrank deploy gate --host "$listen" --port @port@ --inner @inner@ @gate@ &
    child=$! code=0
    wait "$child" || code=$?
    [ "$code" != 2 ] || exit 2
    echo "server.sh: the gate ended ($code); again in 2 s" >&2
    sleep 2 &
    child=$!
    wait "$child"
  done
}
gate &
running="$running $!"
await "$listen" @port@
echo "server.sh: ready on port @port@"
code=0
# shellcheck disable=SC2086 # two numbers
wait -n $running || code=$?
stop "$code"
