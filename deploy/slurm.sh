#!/bin/bash
# A sweep on nodes of a Slurm cluster:   sbatch deploy/slurm.sh SWEEP.yaml
#
# One step runs Ray on every node, its head on the first; the driver runs there too, in this batch script. The sweep
# file's store and out are URLs, or lie on a file system that all nodes share. Before the time is up, and when the job is
# cancelled with `scancel --batch --signal=TERM JOB`, the workers save their checkpoints; the same command goes on.
# An environment with saescale, on every node:   sbatch --export=ALL,SAESCALE_VENV=/shared/venv deploy/slurm.sh ...
#
# Tried with two nodes as processes of one machine (tests/cluster/test_slurm.py), not on a Slurm cluster yet.
#
#SBATCH --job-name=saescale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --open-mode=append
set -euo pipefail
sweep="${1:?usage: sbatch deploy/slurm.sh SWEEP.yaml}"
if [[ -n "${SAESCALE_VENV:-}" ]]; then export PATH="$SAESCALE_VENV/bin:$PATH"; fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Ray wants an address.
read -r RAY_HEAD _ < <(getent ahostsv4 "${hosts[0]}")
# Three ports of this job alone: above those of Ray's workers (to 19999), below those that connections take (from 32768).
RAY_PORT=$((20000 + SLURM_JOB_ID % 4000 * 3))
# Short, since Unix sockets lie below it, and of this job alone.
RAY_FOLDER="$(mktemp -d "/tmp/ray-$SLURM_JOB_ID-XXXX")"
# A token of this job alone: in the environment, and on no command line.
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_HEAD RAY_PORT RAY_FOLDER RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

driver="" step="" ended=""
# What this script started, and nothing else: `ray stop` would end every Ray of this user on the node.
finish() {
    for process in $driver $step; do
        kill -TERM "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    rm -rf "$RAY_FOLDER"
}
trap finish EXIT
trap 'ended=yes; [[ -z "$driver" ]] || kill -TERM "$driver" 2>/dev/null || true' TERM INT

# The same on every node: the first is the head, the others join it when it listens.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL bash -c '
    has="--num-cpus=${SLURM_CPUS_PER_TASK:-$(nproc)} ${SLURM_GPUS_ON_NODE:+--num-gpus=$SLURM_GPUS_ON_NODE}"
    if [[ "$SLURM_PROCID" == 0 ]]; then
        exec ray start --head --block --port="$RAY_PORT" --node-ip-address="$RAY_HEAD" --temp-dir="$RAY_FOLDER" \
            --dashboard-port=$((RAY_PORT + 1)) --ray-client-server-port=$((RAY_PORT + 2)) \
            --dashboard-agent-listen-port=0 $has
    fi
    until (exec 3<>"/dev/tcp/$RAY_HEAD/$RAY_PORT") 2>/dev/null; do sleep 1; done
    exec ray start --block --address="$RAY_HEAD:$RAY_PORT" --dashboard-agent-listen-port=0 $has
' &
step=$!

# The driver plans for the workers that are there: it waits a while for all nodes, and goes on without those that fail.
python - "$RAY_HEAD" "$RAY_PORT" "$SLURM_JOB_NUM_NODES" "$step" <<'PYTHON' &
import os, socket, sys, time
host, port, nodes, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
until = time.monotonic() + 300
def listens():
    try:
        socket.create_connection((host, port), timeout=5).close()
        return True
    except OSError:
        return False
while not listens():
    try:
        os.kill(step, 0)
    except OSError:
        sys.exit("the step that runs Ray ended before its head was up")
    if time.monotonic() > until:
        sys.exit(f"the head of Ray on {host} is not up after 300 s")
    time.sleep(1)
import ray
ray.init(address=f"{host}:{port}", log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < nodes and time.monotonic() < until:
    time.sleep(1)
PYTHON
driver=$!
wait "$driver"
driver=""
if [[ -n "$ended" ]]; then exit 143; fi

saescale sweep "$sweep" --address "$RAY_HEAD:$RAY_PORT" &
driver=$!
status=0
wait "$driver" || status=$?
# A signal ends that wait, and the driver goes on: it lets the workers save.
while kill -0 "$driver" 2>/dev/null; do
    status=0
    wait "$driver" || status=$?
done
driver=""
exit "$status"
