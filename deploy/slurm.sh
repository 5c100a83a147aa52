#!/bin/bash
# A sweep on nodes of a Slurm cluster:   sbatch deploy/slurm.sh SWEEP.yaml
#
# One step runs Ray on every node, its head on the first; the driver runs there too, in this batch script. The sweep
# file's store and out are URLs, or lie on a file system that all nodes share. Before the time is up, and on
# `scancel --batch --signal=TERM JOB`, the workers save their checkpoints; the same command goes on. A node that dies
# takes what its workers did since their last checkpoints along, not the job.
# An environment with saescale, on every node:   sbatch --export=ALL,SAESCALE_VENV=/shared/venv deploy/slurm.sh ...
#
# Tried with Slurm 22.05, two nodes of it on one machine (tests/cluster/test_slurm.py); on no cluster yet.
#
#SBATCH --job-name=saescale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --no-kill
#SBATCH --open-mode=append
set -euo pipefail
sweep="${1:?usage: sbatch deploy/slurm.sh SWEEP.yaml}"
if [[ -n "${SAESCALE_VENV:-}" ]]; then export PATH="$SAESCALE_VENV/bin:$PATH"; fi
for program in python ray saescale; do
    command -v "$program" >/dev/null && continue
    echo "slurm.sh: no $program on PATH; name an environment: sbatch --export=ALL,SAESCALE_VENV=/shared/venv ..." >&2
    exit 2
done

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The address of this node, the first, by which the last one sees it: its own name may mean loopback here.
RAY_HEAD="$(python - "${hosts[-1]}" <<'PYTHON'
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
    try:
        towards.connect((sys.argv[1], 9))
    except OSError as error:
        sys.exit(f"slurm.sh: the node {sys.argv[1]} has no address here: {error}")
    print(towards.getsockname()[0])
PYTHON
)"
# Three ports of this job alone: above those of Ray's workers (to 19999), below those of connections (from 32768).
RAY_PORT=$((20000 + SLURM_JOB_ID % 4000 * 3))
# A token of this job alone: in the environment, and on no command line.
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
# Nobody is served here: a node that is told to end does so at once.
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export RAY_HEAD RAY_PORT RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
export RAY_USAGE_STATS_ENABLED=0

driver="" step="" ended=""
# What this script started, and nothing else: `ray stop` would end every Ray of this user on the node.
finish() {
    if [[ -n "$driver" ]] && kill -TERM "$driver" 2>/dev/null; then wait "$driver" || true; fi
    # To what runs on the nodes, which clears up behind it; srun itself would kill it on a signal.
    scancel --quiet --signal=TERM "$SLURM_JOB_ID.0" 2>/dev/null || true
    for _ in {1..15}; do
        kill -0 "$step" 2>/dev/null || break
        sleep 1
    done
    kill -TERM "$step" 2>/dev/null || true
    wait "$step" 2>/dev/null || true
}
trap finish EXIT
trap 'ended=yes; [[ -z "$driver" ]] || kill -TERM "$driver" 2>/dev/null || true' TERM INT

# The same on every node: the first is the head, the others join it when it listens. The folder's name is short, since
# Unix sockets lie below it. Without its head a cluster is of no use, and the step ends.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --no-kill \
    --export=ALL bash -c '
    folder="$(mktemp -d "/tmp/ray-$SLURM_JOB_ID-XXXX")"
    trap "rm -rf $folder" EXIT
    trap "exit 143" TERM
    start=(ray start --block --log-color=false --temp-dir="$folder" --dashboard-agent-listen-port=0
        --num-cpus="${SLURM_CPUS_PER_TASK:-$(nproc)}" ${SLURM_GPUS_ON_NODE:+--num-gpus="$SLURM_GPUS_ON_NODE"})
    # Of the memory that the job has, where it is less than that of the node, which Ray would take for its own.
    mib="${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_CPU:-0} * ${SLURM_CPUS_PER_TASK:-1}))}"
    if ((mib > 0)); then start+=(--memory=$((mib * 943718)) --object-store-memory=$((mib * 104857))); fi
    if [[ "$SLURM_PROCID" == 0 ]]; then
        "${start[@]}" --head --port="$RAY_PORT" --node-ip-address="$RAY_HEAD" \
            --dashboard-port=$((RAY_PORT + 1)) --ray-client-server-port=$((RAY_PORT + 2)) || true
        scancel --quiet --signal=TERM "$SLURM_JOB_ID.$SLURM_STEP_ID"
        exit 1
    fi
    until (exec 3<>"/dev/tcp/$RAY_HEAD/$RAY_PORT") 2>/dev/null; do sleep 1; done
    "${start[@]}" --address="$RAY_HEAD:$RAY_PORT"
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
