/* A step of few rows by weights in i8; a cache in bf16. */
#include "persistent.cuh"

ENTRY(persistent_i8, persistent, RESIDENT) { run_stages<struct quantised_as<i8>, struct bf16>(op, team); }
