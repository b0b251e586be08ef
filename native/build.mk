# Builds one library per row of isa.mk from the same sources. Run it through `make native`, from the root.
#
#   build/<key>/<isa>/<op>.o         objects. The key is a checksum of the compiler's version and all flags: switching
#                                    flags never mixes objects, and switching back compiles nothing
#   $(LIBRARIES)/libengine_<isa>.so  the libraries, replaced by renaming: a process that has one open keeps its own
#
#   CC, CFLAGS, LDFLAGS       as everywhere; the flags are added after the project's own
#   USE_FLASH_ATTENTION=0     leaves the flash attention kernel out
#   SANITIZE=1                AddressSanitizer and UndefinedBehaviorSanitizer
#   EMULATED=1                the rows for AVX-512 and AMX, for a CPU that has AVX2 (native/emulated_avx512.h): for tests
#   WERROR=1                  warnings are errors
#   LIBRARIES=engine/_native  where the libraries go
CC ?= cc
USE_FLASH_ATTENTION ?= 1
SANITIZE ?= 0
EMULATED ?= 0
WERROR ?= 0
LIBRARIES ?= engine/_native

.PHONY: all
.DELETE_ON_ERROR:
all:

comma := ,
hash := \#

# works(flags): the flags, if this compiler builds a shared library with them. -Werror turns "ignored" into "no".
PROBE := build/probe-$(shell echo $$PPID)
PROBE_LINES = '$(hash)ifdef _OPENMP' '$(hash)include <omp.h>' '$(hash)endif' 'int probe(int);' \
              'int probe(int x) { return x; }'
works = $(shell mkdir -p build && printf '%s\n' $(PROBE_LINES) >$(PROBE).c && \
          $(CC) -Werror -fPIC -shared $(1) $(PROBE).c -o $(PROBE).so >/dev/null 2>&1 && echo '$(1)'; rm -f $(PROBE).*)
all_that_work = $(foreach flag,$(1),$(call works,$(flag)))

ifeq (,$(call works,-std=c11))
$(error no C11 compiler: `$(CC)` is missing or does not work. Install gcc or clang, or name one: make CC=clang)
endif
VERSION := $(shell $(CC) --version 2>/dev/null | head -n 1)
OPENMP := $(call works,-fopenmp)

# Without this the micro-kernels' loops start wherever the functions before them end, and one more function in plan.c
# makes a prompt 5 % slower (Zen 3).
ALIGN := $(call works,-falign-functions=64)
FLAGS := -std=c11 -D_GNU_SOURCE -DUSE_FLASH_ATTENTION=$(USE_FLASH_ATTENTION) -Inative -O3 -fPIC $(OPENMP) \
         $(call all_that_work,-ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas) $(ALIGN)
LINK := -shared $(OPENMP) $(call works,-Wl$(comma)-z$(comma)nodelete)
ifneq (0,$(WERROR))
FLAGS += -Werror
endif
ifneq (0,$(SANITIZE))
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
FLAGS += -O1 -g -fno-omit-frame-pointer $(SANITIZERS)
LINK += $(SANITIZERS)
else
LINK += $(call works,-Wl$(comma)-z$(comma)defs)
endif
FLAGS += $(CFLAGS)
LINK += $(LDFLAGS)

include native/isa.mk
ifneq (0,$(EMULATED))
FLAGS += -DEMULATED -O1
ISAS := baseline $(filter avx512%,$(ISAS))
# -mamx-tile: -DEMULATED_amx_tile
features_of = $(subst -,_,$(patsubst -m%,%,$(filter -mavx512% -mamx%,$(FLAGS_$(1)))))
$(foreach isa,$(filter avx512%,$(ISAS)),$(eval FLAGS_$(isa) := \
    $(FLAGS_avx2) -include native/emulated_avx512.h $(addprefix -DEMULATED_,$(call features_of,$(isa)))))
endif
UNABLE := $(strip $(foreach isa,$(ISAS),$(if $(call works,-std=c11 $(FLAGS_$(isa))),,$(isa))))
ISAS := $(filter-out $(UNABLE),$(ISAS))

CONFIGURATION := $(CC) [$(VERSION)] $(FLAGS) [link: $(LINK)] $(foreach isa,$(ISAS),[$(isa): $(FLAGS_$(isa))])
KEY := $(firstword $(shell printf '%s' '$(CONFIGURATION)' | cksum))
BUILD := build/$(KEY)

# A source of native/avx512 stands in for its namesake of native/ in the avx512 rows.
PORTABLE := $(notdir $(wildcard native/*.c))
SHADOWS := $(notdir $(wildcard native/avx512/*.c))
ifneq (,$(filter-out $(PORTABLE),$(SHADOWS)))
$(error native/avx512 holds $(filter-out $(PORTABLE),$(SHADOWS)), which native/ does not)
endif
shadows_of = $(if $(filter avx512%,$(1)),$(SHADOWS))
sources_of = $(addprefix avx512/,$(call shadows_of,$(1))) $(filter-out $(call shadows_of,$(1)),$(PORTABLE))
objects_of = $(patsubst %.c,$(BUILD)/$(1)/%.o,$(call sources_of,$(1)))

# A list of the sources, touched when it changes: a source that was removed leaves the library, too.
SOURCE_LIST := $(BUILD)/sources.txt
$(shell mkdir -p $(BUILD); echo '$(PORTABLE) | $(SHADOWS)' >$(PROBE).list; \
    cmp -s $(PROBE).list $(SOURCE_LIST) && rm $(PROBE).list || mv $(PROBE).list $(SOURCE_LIST))

define RULES
$(BUILD)/$(1)/%.o: native/%.c
	@mkdir -p $$(@D) && echo '$(1): $$<'
	@$$(CC) $$(FLAGS) $$(FLAGS_$(1)) -MMD -MP -c $$< -o $$@

$(BUILD)/$(1)/libengine_$(1).so: $(call objects_of,$(1)) $(SOURCE_LIST)
	@$$(CC) $(call objects_of,$(1)) $$(LINK) -lm -o $$@

-include $(patsubst %.o,%.d,$(call objects_of,$(1)))
endef
$(foreach isa,$(ISAS),$(eval $(call RULES,$(isa))))

# Compiler and flags, in words, beside the libraries they made.
$(BUILD)/build.txt:
	@printf '%s\n' 'compiler: $(CC), $(VERSION)' 'flags: $(FLAGS)' $(foreach isa,$(ISAS),'$(isa): $(FLAGS_$(isa))') >$@
	$(if $(OPENMP),,@echo '$(CC) has no OpenMP: the libraries will run on one thread' >&2)
	$(if $(UNABLE),@echo '$(CC) cannot compile for $(UNABLE): left out' >&2)

BUILT := $(foreach isa,$(ISAS),$(BUILD)/$(isa)/libengine_$(isa).so) $(BUILD)/build.txt native/abi.h

all: $(BUILT)
	@mkdir -p $(LIBRARIES)
	@for file in $(BUILT); do \
	    to=$(LIBRARIES)/$${file##*/}; \
	    cmp -s $$file $$to || { cp $$file $$to.$$$$ && mv -f $$to.$$$$ $$to && echo "built $$to"; } || exit 1; \
	done
	@cd $(LIBRARIES) && rm -f why_no_native.txt && for file in libengine_*.so; do \
	    case ' $(ISAS:%=libengine_%.so) ' in *" $$file "*) ;; *) rm -f $$file ;; esac; \
	done
