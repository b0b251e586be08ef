# Builds the kernels. Run it through `make cuda` or `make emulation`, from the root.
#
#   cuda       $(LIBRARIES)/cuda/<source>.fatbin, where nvcc is found: machine code for each of CUBINS, and PTX for
#              later GPUs, of which the driver takes what suits, and of <source>_hopper.cu for sm_90a alone;
#              built_from.txt has the digests of the sources
#   emulation  build/cuda/libcuda_emulation.so: the same sources by the host's C++ compiler, for tests;
#              libcublas_emulation.so beside it: what they call of cuBLAS
# engine/cuda/kernels.py, which builds at first use what is not built here, looks in the same places.
NVCC ?= $(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
CXX ?= c++
CUBINS ?= 80 89 90a
PTX ?= 80
LIBRARIES ?= engine/_native
BUILD := build/cuda
SOURCES := $(wildcard native/cuda/*.cu)
NAMES := $(notdir $(SOURCES:.cu=))
HEADERS := $(wildcard native/cuda/*.h native/cuda/*.cuh) native/abi.h native/drawing.h

.PHONY: cuda emulation
.DELETE_ON_ERROR:

NVCC_FLAGS := -optf native/cuda/nvcc.flags -Inative -Inative/cuda -Werror all-warnings $(NVCCFLAGS)
machine_code = $(foreach arch,$(1),-gencode arch=compute_$(arch),code=sm_$(arch))
TARGETS := $(call machine_code,$(CUBINS)) $(foreach arch,$(PTX),-gencode arch=compute_$(arch),code=compute_$(arch))
BUILT := $(if $(filter 90a,$(CUBINS)),$(NAMES),$(filter-out %_hopper,$(NAMES)))
FATBINS := $(BUILT:%=$(LIBRARIES)/cuda/%.fatbin)

ifeq (,$(NVCC))
cuda:
	@echo 'no nvcc: the CUDA kernels are not built (put it on the PATH, or name it: make NVCC=... cuda)'
else
cuda: $(FATBINS)
	@cd $(LIBRARIES)/cuda && for file in *.fatbin; do \
	    case ' $(BUILT:%=%.fatbin) ' in *" $$file "*) ;; *) rm -f $$file ;; esac; done
	@(cd native && sha256sum $(patsubst native/%,%,$(SOURCES) $(HEADERS)) cuda/nvcc.flags) >$(LIBRARIES)/cuda/built_from.txt
endif

$(LIBRARIES)/cuda/%.fatbin: native/cuda/%.cu $(HEADERS) native/cuda/nvcc.flags native/cuda/build.mk
	@mkdir -p $(@D) && echo 'cuda: $<'
	@$(NVCC) $(NVCC_FLAGS) $(TARGETS) -fatbin $< -o $@
$(LIBRARIES)/cuda/%_hopper.fatbin: TARGETS := $(call machine_code,90a)

CXX_FLAGS := -std=c++17 -Inative -Inative/cuda -O2 -fPIC -pthread -fno-strict-aliasing -Wall -Wextra -Werror -Wno-unknown-pragmas $(CXXFLAGS)
OBJECTS := $(NAMES:%=$(BUILD)/%.o) $(BUILD)/emulation.o $(BUILD)/emulated_hopper.o

# These have other sources in them.
PERSISTENT := $(filter persistent_%,$(NAMES))
$(PERSISTENT:%=$(BUILD)/%.o) $(PERSISTENT:%=$(LIBRARIES)/cuda/%.fatbin): $(filter-out native/cuda/persistent_%,$(SOURCES))

emulation: $(BUILD)/libcuda_emulation.so $(BUILD)/libcublas_emulation.so

$(BUILD)/%.o: native/cuda/%.cu $(HEADERS)
	@mkdir -p $(@D) && echo 'emulation: $<'
	@$(CXX) $(CXX_FLAGS) -x c++ -c $< -o $@
$(BUILD)/%.o: native/cuda/%.cpp $(HEADERS)
	@mkdir -p $(@D) && echo 'emulation: $<'
	@$(CXX) $(CXX_FLAGS) -c $< -o $@
$(BUILD)/libcuda_emulation.so: $(OBJECTS)
$(BUILD)/libcublas_emulation.so: $(BUILD)/emulated_cublas.o
$(BUILD)/lib%.so:
	@$(CXX) -shared -pthread $^ -o $@.$$$$ && mv -f $@.$$$$ $@
