#!/usr/bin/env bash
# The SuperLink: sites connect to it, and it plays runs. It runs until it is stopped (Ctrl-C, SIGTERM).
# FEDRANK_BIN: the folder of fedrank's programs, where they are not on the path. FEDRANK_LISTEN: the address to listen at.
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
address = "127.0.0.1:@port@"
@connection@
END

flower-superlink --host "${FEDRANK_LISTEN:-0.0.0.0}" --port @port@ --database flower/superlink.db \
  --disable-runtime-dependency-installation @secure@ &
superlink=$!
stop() {
  trap '' INT TERM
  kill "$superlink" 2>/dev/null || true
  wait "$superlink" || true
  exit "${1:-0}"
}
trap stop INT TERM

# The sites' public keys are registered once; the database remembers them. With their folder empty, nothing is.
for key in sites/*.pub; do
  [ -e "$key" ] || continue
  until (exec 3<>/dev/tcp/127.0.0.1/@port@) 2>/dev/null; do
    kill -0 "$superlink" 2>/dev/null || stop 1
    sleep 0.2
  done
  said=$(flwr supernode register "$key" fedrank --format json 2>&1) || true
  case "$said" in
    *'"success": true'*) echo "server.sh: $key is registered" ;;
    *'already in use'*) ;;
    *) echo "server.sh: $key cannot be registered: $said" >&2; stop 1 ;;
  esac
done
echo "server.sh: ready on port @port@"
wait "$superlink"
