/* A step of few rows by weights in f32; a cache in f32. */
#include "persistent.cuh"

ENTRY(persistent_f32, persistent, RESIDENT) { run_stages<struct dense<float>, float>(op, team); }
