#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces that a virtual cable joins, torchrun in each, one training.
#
#   sudo benchmarks/two_hosts.sh [--rows 32] [--batch-size 8] [--method lora] [--sharding none]
#
# Needs Linux, root, `ip` (iproute2) and what benchmarks.devices needs: artifacts/fetch_base, artifacts/split.
# The hosts have folders of their own and reach each other through the cable only. The same rows are then trained
# in one process. Prints a JSON object with the largest difference of the losses and the bytes that went through
# the cable; docs/benchmarks.md keeps the results. Everything it starts is ended by its id, also after an error.
set -euo pipefail

fail() { echo "two_hosts: $1" >&2; exit "${2:-1}"; }
[ "$(uname)" = Linux ] || fail "network namespaces are a part of Linux, and this is $(uname)" 2
[ "$(id -u)" = 0 ] || fail "only root can make network namespaces: run it with sudo" 2
command -v ip >/dev/null || fail "there is no ip: install iproute2" 2

python=${PYTHON:-python}
port=29500
mark=$$                        # in all names: another run of this script has other ones
hosts=(first second)
folder=$(mktemp -d)
pids=() made=()

end() {
  code=$?
  trap - EXIT INT TERM
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  for name in "${made[@]}"; do
    for pid in $(ip netns pids "$name"); do kill -9 "$pid" 2>/dev/null || true; done   # whatever they left
    ip netns delete "$name" || true                                                    # and its end of the cable
  done
  rm -rf "$folder"
  exit "$code"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for host in "${hosts[@]}"; do
  ip netns add "perennial-$mark-$host" || fail "this machine does not allow network namespaces (ip netns add)" 2
  made+=("perennial-$mark-$host")
done
ip link add "pa$mark" type veth peer name "pb$mark" || fail "this machine has no virtual cables (veth)" 2
ends=("pa$mark" "pb$mark") addresses=(10.231.77.1 10.231.77.2)
for number in 0 1; do
  name=${made[$number]}
  ip link set "${ends[$number]}" netns "$name"
  ip -n "$name" address add "${addresses[$number]}/30" dev "${ends[$number]}"
  ip -n "$name" link set "${ends[$number]}" up
  ip -n "$name" link set lo up
done

"$python" -m benchmarks.two_hosts prepare "$folder" "$@"

export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
for number in 0 1; do
  (
    cd "$folder/${hosts[$number]}"
    # Names of hosts do not resolve here, so torchrun is told who is the meeting point, and by which address.
    exec ip netns exec "${made[$number]}" env GLOO_SOCKET_IFNAME="${ends[$number]}" \
      "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id "$mark" \
      --rdzv-endpoint "${addresses[0]}:$port" --rdzv-conf "is_host=$((1 - number))" \
      --local-addr "${addresses[$number]}" -m stages.finetune
  ) >"$folder/${hosts[$number]}.log" 2>&1 &
  pids+=($!)
done
for number in 0 1; do
  wait "${pids[$number]}" || { tail -n 30 "$folder"/*.log >&2; fail "the training of two hosts failed"; }
done
pids=()
sent=$(ip -n "${made[0]}" -s -j link show "${ends[0]}")

(cd "$folder/one" && exec "$python" -m stages.finetune) >"$folder/one.log" 2>&1 &
pids=($!)
wait "${pids[0]}" || { tail -n 30 "$folder/one.log" >&2; fail "the training in one process failed"; }
pids=()
"$python" -m benchmarks.two_hosts compare "$folder" --link "$sent"
