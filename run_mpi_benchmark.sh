#!/bin/sh
# Times a model on one process and on NUM_PROCS ranks, side by side in the same rounds.
#
#   NUM_PROCS=2 PROMPT_LEN=512 ITERS=5 THREADS=1 MODEL=DIRECTORY ATTENTION=streaming ./run_mpi_benchmark.sh [OPTION...]
#
# THREADS are those of a rank; the one process has as many as all ranks together. METHOD is what each rank runs, without
# its `mpi+`; options go to demo.benchmark as they are.
set -eu
cd "$(dirname "$0")"
: "${NUM_PROCS:=2}" "${PROMPT_LEN:=512}" "${ITERS:=5}" "${THREADS:=1}" "${MODEL:=}" "${ATTENTION:=auto}"
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python3
MPIEXEC=$("$PYTHON" -c 'import pathlib, shutil, sys
beside = pathlib.Path(sys.executable).parent / "mpiexec"
print(beside if beside.exists() else shutil.which("mpiexec") or "")')
[ -n "$MPIEXEC" ] || { echo "run_mpi_benchmark.sh: there is no mpiexec: pip install 'rill-engine[mpi]'" >&2; exit 1; }
case ${METHOD:-} in
    "") METHODS=$("$PYTHON" -c 'from engine.device.cpu import available_isas as isas; i = isas()[-1]; print(f"{i},mpi+{i}")') ;;
    baseline) METHODS=baseline,mpi ;;
    *) METHODS=$METHOD,mpi+$METHOD ;;
esac
exec "$MPIEXEC" -n "$NUM_PROCS" "$PYTHON" -m mpi4py -m demo.benchmark ${MODEL:+"$MODEL"} -p "$PROMPT_LEN" -r "$ITERS" \
    --method "$METHODS" --rank-threads "$THREADS" --attention "$ATTENTION" "$@"
