#!/usr/bin/env bash
# The MLflow server of a cluster, on its head.
#
#   mlflow.sh start FOLDER   starts it unless it runs; database and artifacts in FOLDER. Returns at once.
#   mlflow.sh address        http://ADDRESS:PORT, by which all nodes reach it
#   mlflow.sh stop           ends it
#
# It listens at the private address of this machine only, and answers to that name and to a tunnel's.
set -euo pipefail
port=${MLFLOW_PORT:-5000}
pid_file=$HOME/raydino-mlflow.pid

address() { # as Ray finds it, so that it is the address that the workers know the head by
  python -c 'import ray.util; print(ray.util.get_node_ip_address())'
}

running() {
  [ -f "$pid_file" ] && grep -qs mlflow "/proc/$(cat "$pid_file")/cmdline"
}

case "${1:-}" in
start)
  folder=${2:?start needs the folder of the database and the artifacts}
  if running; then exit 0; fi
  mkdir -p "$folder/artifacts"
  host=$(address)
  # Job execution, which nothing here uses, would add six processes.
  export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
  # One process and no write-ahead log: sqlite on a network file system wants one writer.
  setsid nohup python -m mlflow server --host "$host" --port "$port" --workers 1 \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/artifacts" \
    --allowed-hosts "$host:$port,localhost:*,127.0.0.1:*" \
    --uvicorn-opts "--log-level warning" >"$HOME/raydino-mlflow.log" 2>&1 </dev/null &
  echo $! >"$pid_file"
  ;;
address) echo "http://$(address):$port" ;;
stop)
  if running; then kill -TERM -- "-$(cat "$pid_file")"; fi
  rm -f "$pid_file"
  ;;
*)
  echo "usage: mlflow.sh start FOLDER | address | stop" >&2
  exit 2
  ;;
esac
