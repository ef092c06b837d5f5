# Every target sets up what it needs in .venv, on a machine that has only Python 3.10+ and make.
#   make serve [ARGS="--model DIR ..."]   the policy server on the embedded default model, and its page
#   make test                             the whole test suite
#   make demo                             server + simulated arm + a picture of what it does
#   make install                          what serves, simulates and trains, for README's other commands
#   make check                            lint, format, types, import contracts, generated code
#   make nano                             the embedded default model again, from nothing, in two hours

PYTHON ?= python3
BIN    := .venv/bin
# The CPU build where only that is to be had, the CUDA build elsewhere.
TORCH  ?= torch==2.13.0
# LIBERO's environments without the training stack that its metadata asks for.
LIBERO := hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1

serve: .venv/server.done
	$(BIN)/python -m policy_server serve --http-port 8080 $(ARGS)

install: .venv/trainer.done

test: .venv/dev.done
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

demo: .venv/sim.done
	$(BIN)/python -m sim demo $(ARGS)

check: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) protos
	git diff --exit-code -- "protos/*_pb2*"

# nano's recipe: demonstrations, cloning, corrections on the learner's own states, cloning.  An interrupted run goes on
# at the step it was in; the result is runs/nano/second/last.
NANO  := runs/nano
DEMOS := $(BIN)/python -m sim demos
SFT   := OMP_NUM_THREADS=1 $(BIN)/python -m rl_trainer sft --data $(NANO)/demos --ranks 2 --autocast --bin-smoothing 2

nano: $(NANO)/second.done

$(NANO)/demos.done: .venv/dev.done
	$(DEMOS) --out $(NANO)/demos/lift --suite robosuite --tasks 0 --episodes-per-task 240 --stride 2
	$(DEMOS) --out $(NANO)/demos/stack_can --suite robosuite --tasks 1 2 --episodes-per-task 120 --stride 4
	$(DEMOS) --out $(NANO)/demos/libero_goal --suite libero_goal --episodes-per-task 50 --stride 5
	$(DEMOS) --out $(NANO)/demos/libero_object --suite libero_object --episodes-per-task 60 --stride 5
	@touch $@

$(NANO)/first.done: $(NANO)/demos.done
	$(SFT) --out $(NANO)/first --minutes 25
	@touch $@

$(NANO)/corrections.done: CORRECT := $(DEMOS) --learner $(NANO)/first/last --seed 1
$(NANO)/corrections.done: $(NANO)/first.done
	$(CORRECT) --out $(NANO)/demos/lift_corrections --suite robosuite --tasks 0 --episodes-per-task 120 --stride 2
	$(CORRECT) --out $(NANO)/demos/libero_goal_corrections --suite libero_goal --episodes-per-task 30 --stride 5 --stretch-ticks 10 60
	$(CORRECT) --out $(NANO)/demos/libero_object_corrections --suite libero_object --episodes-per-task 40 --stride 5 --stretch-ticks 10 60
	@touch $@

$(NANO)/second.done: $(NANO)/corrections.done
	$(SFT) --out $(NANO)/second --init $(NANO)/first/last --learning-rate 8e-4 --minutes 42
	@touch $@

# The oldest generator that any supported environment accepts, in an environment of its own.
protos: .venv/protoc.done
	.venv/protoc/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. protos/*.proto
	.venv/protoc/bin/python -m grpc_tools.protoc -I. --grpc_python_out=. protos/policy.proto protos/rollout.proto protos/admin.proto protos/session.proto

.venv/base.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, got " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

.venv/server.done: .venv/base.done
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e '.[server]'
	@touch $@

.venv/sim.done: .venv/server.done | osmesa
	$(BIN)/python -m pip install --quiet -e '.[sim]'
	$(BIN)/python -m pip install --quiet --no-deps $(LIBERO)
	@touch $@

.venv/trainer.done: .venv/sim.done
	$(BIN)/python -m pip install --quiet -e '.[trainer,export]'
	@touch $@

.venv/dev.done: .venv/trainer.done | libusb chromium
	$(BIN)/python -m pip install --quiet -e '.[quantized,dev,franka,gamepad,openpi,realsense,serial-stop,so100,spacemouse,ur,uvc,view,xarm]'
	@touch $@

.venv/protoc.done:
	$(PYTHON) -m venv .venv/protoc
	.venv/protoc/bin/python -m pip install --quiet 'grpcio-tools==1.62.3' 'setuptools<81'
	@touch $@

# install(Debian's package): where it may.
install = { [ "$$(id -u)" = 0 ] && (apt-get install -y -qq $(1) || (apt-get update -qq && apt-get install -y -qq $(1))) >/dev/null; } \
	  || sudo -n apt-get install -y -qq $(1) >/dev/null 2>&1

# need(library, Debian's package of it): on Linux, installs what is missing where it may, and says so where it may not.
need = [ "$$(uname)" != Linux ] || PATH="$$PATH:/sbin" ldconfig -p | grep -q $(1) || $(call install,$(2)) \
	  || { echo "$(1) is missing: install it (Debian, Ubuntu: sudo apt-get install $(2)), then run make again"; exit 1; }

# Software rendering for a machine with neither GPU nor screen.
osmesa:
	@$(call need,libOSMesa,libosmesa6)

# pyrealsense2 is linked with it; tests that want it are skipped without it.
libusb:
	-@$(call need,libusb-1.0,libusb-1.0-0)

# Tests that look at the live page are skipped without it.
chromium:
	-@[ "$$(uname)" != Linux ] || command -v chromium >/dev/null || $(call install,chromium) \
	  || echo "chromium is missing: the live page is not tested"

.PHONY: serve install test demo check nano protos osmesa libusb chromium
