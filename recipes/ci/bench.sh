#!/usr/bin/env bash
# Start the server of this checkout, measure it, stop it. On stdout is the result alone; all else goes to stderr.
#
#   PORT    where the server listens, on 127.0.0.1
#   SERVER  the command that serves there
#   READY   a path that answers once the model is loaded
#   LOAD    options of ossquant bench
set -euo pipefail
port="${PORT:-8000}"
url="http://127.0.0.1:$port"
server="${SERVER:-llama-server -hf ggml-org/gpt-oss-20b-GGUF --port $port -c 65536 -np 16 -ngl 99}"
ready="${READY:-/health}"
load="${LOAD:---concurrency 1,16 --requests 64 --prompt-tokens 512 --new-tokens 128}"

answers() { curl --silent --fail --max-time 5 --output /dev/null "$url$ready"; }

if answers; then
    echo "another server answers at $url" >&2
    exit 6
fi
$server >&2 &
pid=$!
trap 'kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true' EXIT
for _ in $(seq 600); do
    answers && break
    kill -0 "$pid" 2>/dev/null || { echo "the server ended before it answered" >&2; exit 6; }
    sleep 1
done
# shellcheck disable=SC2086  # several options
ossquant bench "$url" $load --json
