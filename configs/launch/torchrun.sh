#!/bin/bash
# torchrun, with what lets ranks end a long iteration with a checkpoint after a signal to it, where the installed one has
# it: configs/launch/torchrun.sh --standalone --nproc-per-node 8 -m fastgrpo train configs/flux-fast-8xh100.yaml run.dir=runs/flux
set -euo pipefail

launch=("${PYTHON:-python}" -m torch.distributed.run)
known=$("${launch[@]}" --help)

# Signals that torchrun passes on to its ranks; without this one SIGUSR1 ends torchrun alone, and they train on.
if [[ $known == *--signals-to-handle* ]]; then
  launch+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
fi
# Seconds before ranks are killed; without it 30.
if [[ $known == *--shutdown-timeout* ]]; then
  launch+=(--shutdown-timeout "${SHUTDOWN_TIMEOUT:-1800}")
fi
# Ranks that torchrun starts again (--max-restarts) would find the addresses of those before in a store that it shares
# with them, and not each other.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${launch[@]}" "$@"
