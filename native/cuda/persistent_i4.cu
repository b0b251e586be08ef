/* A step of few rows by weights in i4; a cache in bf16. */
#include "persistent.cuh"

ENTRY(persistent_i4, persistent, RESIDENT) { run_stages<struct quantised_as<i4>, struct bf16>(op, team); }
