#!/bin/sh
# Slurm's prolog and epilog for recordings: `dodoco template slurm` printed this. In slurm.conf, before anything that
# empties /dev/shm:
#
#     TaskProlog=/etc/slurm/dodoco.sh
#     Epilog=/etc/slurm/dodoco.sh
#
# TaskProlog gives all ranks of a step one run, which names them as one. Jobs archive their own recordings by
# starting with
#
#     srun dodoco run --archive "$HOME/dodoco-runs" -- vllm serve ...
#
# The epilog archives those of jobs whose `dodoco run` was killed too, each where it was meant to go.
# It never fails: a prolog or an epilog that does takes the node out of service.
command -v dodoco > /dev/null 2>&1 || exit 0
case "${SLURM_SCRIPT_CONTEXT:-}" in
prolog_task)
  # What TaskProlog prints becomes the environment of the task.
  [ -n "${DODOCO_RUN:-}" ] || echo "export DODOCO_RUN=slurm-${SLURM_JOB_ID:-0}-${SLURM_STEP_ID:-0}"
  ;;
epilog_slurmd)
  home=$(getent passwd "${SLURM_JOB_USER:-}" | cut -d: -f6)
  [ -n "$home" ] || exit 0
  # As the user of the job: recordings are private. Bounded: other jobs wait for the node.
  runuser -u "$SLURM_JOB_USER" -- env HOME="$home" timeout 60 \
    dodoco run --archive "$home/dodoco-runs" || true
  ;;
esac
exit 0
