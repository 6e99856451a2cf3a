#!/bin/bash
# Two nodes, one process on each; goes on by itself when its time was too short.
#     sbatch docs/cluster/slurm.sh [overrides]
#SBATCH --job-name=runner
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runner-%j.log
# A minute before the time is over SLURM sends SIGTERM to the processes (not to this
# script): the run is saved, and all exit with 130. RUN lies on a file system that all
# nodes share, and the job finds it there when it starts again.
RUN=${RUN:-$PWD/outputs/slurm-$SLURM_JOB_ID}
RUNNER=${RUNNER:-python -m runner}
EXPERIMENT=${EXPERIMENT:-mesh/data8}

if [ -f "$RUN/run.json" ]; then
    srun $RUNNER resume "$RUN" mesh.distributed=auto
else
    srun $RUNNER +experiment="$EXPERIMENT" hydra.run.dir="$RUN" mesh.distributed=auto "$@"
fi
code=$?
if [ $code -eq 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
