/* A step of few rows by weights in bf16; a cache in bf16. */
#include "persistent.cuh"

ENTRY(persistent_bf16, persistent, RESIDENT) { run_stages<struct dense<struct bf16>, struct bf16>(op, team); }
