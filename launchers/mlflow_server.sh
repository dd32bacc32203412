# shellcheck shell=bash
# An MLflow server of this job, and the file that tells its address while it answers. Sourced by
# slurm/mlflow.sbatch, after slurm_world.sh.
# shellcheck disable=SC2154  # the files of a job share their variables

# serve_mlflow ROOT FOLDER: until the server or the job ends. The database and the artifacts are in FOLDER.
serve_mlflow() {
    local root=$1 host port listen=0.0.0.0 tries=0 deadline
    folder=$(mkdir -p "$2" && cd "$2" && pwd)
    python=${PYTHON:-$root/.venv/bin/python}
    [[ -x "$python" ]] || python=python3
    host=$(plain_host "${VQMOE_MLFLOW_HOST:-$MASTER_ADDR}")
    resolves "$host" || refuse "VQMOE_MLFLOW_HOST=$host is no host that this node knows"
    if [[ "$host" == *:* ]]; then listen=::; fi
    host=$(in_uri "$host")
    port=${VQMOE_MLFLOW_PORT:-$((20000 + SLURM_JOB_ID * 16 % 12000))} # the same after a requeue
    uri=http://$host:$port

    # A server that was killed leaves its address behind.
    rm -f "$folder/uri"
    mapfile -t stores < <(store_uris "$root")
    ((${#stores[@]} == 2)) || refuse "$python cannot name the files in $folder; see above"
    # Only requests for these names are answered; /health answers to all.
    # One worker: SQLite has one writer, and uvicorn kills workers that answer late on a busy node.
    "$python" -m mlflow server --host "$listen" --port "$port" --workers 1 \
        --allowed-hosts "$host:$port,localhost:$port,127.0.0.1:$port" \
        --backend-store-uri "${stores[0]}" --artifacts-destination "${stores[1]}" &
    server=$!
    trap end_server EXIT
    trap 'exit 0' TERM USR1

    deadline=$((SECONDS + 300))
    until answers; do
        kill -0 "$server" 2>/dev/null || fail "the MLflow server ended; see above"
        ((SECONDS < deadline)) || fail "no answer at $uri in 300 s; if $host is not this node, set" \
            "VQMOE_MLFLOW_HOST"
        ((++tries % 15)) || echo "waiting for the MLflow server to answer at $uri"
        sleep 1
    done
    echo "$uri" >"$folder/uri.new" && mv "$folder/uri.new" "$folder/uri"
    echo "MLflow answers at $uri; its address is in $folder/uri"
    wait "$server"
}

fail() {
    echo "error: $*" >&2
    exit 1
}

# store_uris ROOT: two lines, the database's and the artifacts' URI; a path may hold what a URI may not.
store_uris() {
    PYTHONPATH=$1 "$python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

from vqmoe_megatron.track.mlflow.sqlite_uri import sqlite_uri

folder = Path(sys.argv[1])
print(sqlite_uri(folder / "mlflow.db"))
print((folder / "artifacts").as_uri())
PYTHON
}

answers() {
    "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' \
        "$uri/version" 2>/dev/null
}

end_server() {
    [[ "$(cat "$folder/uri" 2>/dev/null)" != "$uri" ]] || rm -f "$folder/uri" # else another server's
    kill -TERM "$server" 2>/dev/null || true
}
