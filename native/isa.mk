# One row an instruction set: the library's name and what the compiler may use for it. Built where the compiler's
# target is x86-64; any other architecture builds `baseline` alone.
ISAS := baseline
ifneq (,$(findstring x86_64,$(shell $(CC) -dumpmachine)))
ISAS += avx2 avx512f avx512_vnni avx512_bf16 avx512_amx
endif

FLAGS_baseline    :=
FLAGS_avx2        := -mavx2 -mfma -mf16c
FLAGS_avx512f     := $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq
FLAGS_avx512_vnni := $(FLAGS_avx512f) -mavx512vnni
FLAGS_avx512_bf16 := $(FLAGS_avx512_vnni) -mavx512bf16
FLAGS_avx512_amx  := $(FLAGS_avx512_bf16) -mamx-tile -mamx-bf16 -mamx-int8
