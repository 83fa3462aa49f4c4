#!/usr/bin/env bash
# Takes down a cluster of machines of one's own: down.sh cluster/onprem.yaml
#
# `ray down` alone stops Ray on the head. On the other hosts some of its processes would stay, and MLflow on the head.
set -euo pipefail
file=${1:?usage: down.sh CLUSTER_FILE}

field() { # section and name; lists are printed with blanks
  python -c 'import sys, yaml
value = yaml.safe_load(open(sys.argv[1]))[sys.argv[2]][sys.argv[3]]
print(*(value if isinstance(value, list) else [value]))' "$file" "$1" "$2"
}

ray exec "$file" 'bash ~/raydino-mlflow.sh stop' || echo "the head does not answer: MLflow may still run there" >&2
user=$(field auth ssh_user)
key=$(field auth ssh_private_key)
for host in $(field provider worker_ips); do
  # a host that is off must not keep the others up
  ssh -n -i "${key/#\~/$HOME}" -o ConnectTimeout=20 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
    -o LogLevel=ERROR "$user@$host" '. ~/raydino/bin/activate; ray stop' ||
    echo "$host: Ray may still run there; run ray stop on it" >&2
done
ray down -y "$file"
