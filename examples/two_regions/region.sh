#!/usr/bin/env bash
# One region's part of a run in two: region.sh east|west check|run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
region=${1:?east or west} what=${2:?check or run}
gpus=${GPUS:-8}
output=${OUTPUT:-$PWD/run}
[[ $region == east || $region == west ]] || { echo "wanted east or west, got $region" >&2; exit 2; }

if [[ ${NETWORK:-} != there ]] && ! ip link show "$region" >/dev/null 2>&1; then
  sudo wg-quick up "$PWD/$region.conf"
fi
# A problem that it finds ends this: it would end the run, in the middle of the night.
if [[ $region == west && $what == check ]]; then
  exec psyche-fast doctor --output "$output" --link 10.77.0.1
fi
psyche-fast doctor --output "$output"
if [[ $what == check ]]; then
  exec psyche-fast link --host 10.77.0.1 # until Ctrl-C: west asks it
fi

if [[ $region == east ]]; then
  # shellcheck disable=SC2086  # several arguments
  exec psyche-fast train --replicas 2 --data-parallelism "$gpus" --local-ranks "$gpus" \
    --host 10.77.0.1 --port 34567 --secret-file secret --max-restarts 5 \
    --distro --distro-quantization --model "${MODEL:?}" --data-path "${DATA:?}" \
    --output "$output" --checkpoint-every 500 --keep 3 ${ARGUMENTS:-}
else
  exec psyche-fast sidecar --main-host 10.77.0.1 --port 34567 --secret-file secret \
    --world-size "$((2 * gpus))" --start-rank "$gpus" --num-local-ranks "$gpus" \
    --backend nccl --max-restarts 1000
fi
