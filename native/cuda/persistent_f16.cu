/* A step of few rows by weights in f16; a cache in f16. */
#include "persistent.cuh"

ENTRY(persistent_f16, persistent, RESIDENT) { run_stages<struct dense<struct f16>, struct f16>(op, team); }
