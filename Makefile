# Every command that anyone needs. Each installs what it needs first, and takes no time when all is there.
# On a bare Debian 12, as root:  make test

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# What the demo runs beside the server: images are made and looked at with these.
DEMO_PACKAGES := busybox-static curl jq mmdebstrap mount procps squashfs-tools util-linux
# The guest lab: a small Debian with a stock kernel, made of the machine's own package sources, under QEMU.
LAB_PACKAGES := cpio erofs-utils iproute2 mmdebstrap qemu-system-x86 socat util-linux busybox-static
# What the tests run: a Ceph of their own, the storage daemon, makers of file systems, a compiler for odd binaries.
TEST_PACKAGES := $(DEMO_PACKAGES) btrfs-progs ceph-common ceph-mon ceph-osd e2fsprogs erofs-utils gcc git \
	iproute2 libc6-dev openssl qemu-block-extra qemu-system-common strace sudo tgt xfsprogs $(LAB_PACKAGES)

# What the benchmark runs: whom it measures the service against, and what it makes programs and images with.
BENCH_PACKAGES := bubblewrap ceph-common ceph-mon ceph-osd conmon crun erofs-utils gcc libc6-dev mmdebstrap mount podman procps \
	qemu-block-extra qemu-system-common runc squashfs-tools systemd-container util-linux

# Where `make install` puts things.
PREFIX := /opt/imageapi
UNITS := /etc/systemd/system

# PYTEST_ARGS narrows a run: make test PYTEST_ARGS="-x tests/linux"; so does BENCH_ARGS: make bench BENCH_ARGS="--only nest",
# of which the figure `guest` is measured in the guest lab.
PYTEST := $(BIN)/python -m pytest
# Where Python may not keep what it has compiled, each server would do it again, which takes 1 MB as well; a guest can never
# keep it, and takes ten times as long.
COMPILED := $(BIN)/python -m compileall -q src tests tools

.PHONY: help setup setup-dev install check test test-api test-faults test-drivers test-runtime test-quiet test-in-guests
.PHONY: test-drivers-in-guests test-nfs-in-guests test-pure lab soak demo bench bench-images flame lock clean .FORCE
.PHONY: demo-packages test-packages lab-packages bench-packages

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/stamp-run  ## Make .venv with the server in it: .venv/bin/imageapi-server.

setup-dev: $(VENV)/stamp-dev  ## The same, with what checks and tests it.

check: $(VENV)/stamp-dev  ## Lint and type-check.
	$(BIN)/ruff check
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

# Its parts work side by side, since most of the time each of them waits for something. None is in another's way: a run
# of tests leaves out of its looks at this machine what is another run's, and what runs in guests is of no concern to
# this machine's kernel. What needs a quiet machine comes when the others have ended. The longest shows how far it is;
# what the others say comes at the end. A narrowed run is one.
BESIDE := test-faults test-drivers test-runtime test-in-guests test-drivers-in-guests test-nfs-in-guests test-pure check
PARTS := test-quiet $(BESIDE)
test: $(VENV)/stamp-dev test-packages  ## Check, and run every test on the real kernel, and on a stock one in guests (needs root).
	$(COMPILED)
ifdef PYTEST_ARGS
	@$(MAKE) --no-print-directory check
	$(PYTEST) $(PYTEST_ARGS)
else
	@mkdir -p build && rm -f $(PARTS:%=build/%.log) build/*.failed
	@$(MAKE) --no-print-directory --keep-going --jobs test-api $(PARTS:%=log-of-%); status=$$?; \
		for part in $(PARTS); do echo "--- $$part"; cat build/$$part.log; done; \
		exit $$((status + $$(ls build | grep -c failed)))
endif

test-api:
	$(PYTEST) -m "not guest and not pure and not quiet" tests/api

test-faults:
	$(PYTEST) -m "not guest and not pure and not quiet" tests/faults

test-drivers:
	$(PYTEST) -m "not guest and not pure" tests/drivers tests/tutorial

test-runtime:
	$(PYTEST) -m "not guest and not pure" --ignore=tests/api --ignore=tests/faults --ignore=tests/drivers \
		--ignore=tests/tutorial

test-quiet:
	$(PYTEST) -m quiet

log-of-test-faults: | test-api
log-of-test-drivers: | log-of-test-in-guests
log-of-test-runtime: | log-of-test-drivers-in-guests
log-of-test-nfs-in-guests: | log-of-test-runtime
log-of-test-quiet: $(BESIDE:%=log-of-%) | test-api

test-in-guests:
	$(PYTEST) -m guest --ignore=tests/drivers

test-drivers-in-guests:
	$(PYTEST) -m guest --ignore=tests/drivers/nfs tests/drivers

test-nfs-in-guests:
	$(PYTEST) -m guest tests/drivers/nfs

log-of-%: .FORCE
	@$(MAKE) --no-print-directory $* >build/$*.log 2>&1 || touch build/$*.failed

test-pure: $(VENV)/stamp-dev  ## Run the tests that need neither root nor mounts: seconds.
	$(PYTEST) -m pure $(PYTEST_ARGS)

lab: $(VENV)/stamp-dev test-packages  ## Give you a shell in a guest with a stock kernel, a running server, and a store of each kind (needs root).
	PYTHONPATH=src:tests $(BIN)/python -m lab.guest

soak: $(VENV)/stamp-dev test-packages  ## Let clients work while processes die and the host changes, fails and fills up: SOAK_ARGS="--minutes 60 --seed 1" (needs root).
	PYTHONPATH=src:tests:. $(BIN)/python -m lab.soak $(SOAK_ARGS)

install:  ## Install the server into PREFIX (/opt/imageapi), with its units for systemd (needs root).
	@tools/find-python >/dev/null || tools/apt-install python3 python3-venv
	"$$(tools/find-python)" -m venv $(PREFIX)
	$(PREFIX)/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes --requirement requirements.lock
	$(PREFIX)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --no-index \
		--force-reinstall .
	mkdir -p $(UNITS)
	for unit in packaging/systemd/*; do sed 's:/opt/imageapi/:$(PREFIX)/:' $$unit >$(UNITS)/$${unit##*/}; done
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi

demo: $(VENV)/stamp-run demo-packages  ## Boot a small Debian from a block image through the API, and look around (needs root).
	$(BIN)/python -m tools.demo

bench: $(VENV)/stamp-dev bench-packages lab-packages  ## Measure speed and smallness beside bare system calls and other runtimes (needs root).
	$(COMPILED)
	PYTHONPATH=tests $(BIN)/python -m tools.bench $(BENCH_ARGS)

bench-images: $(VENV)/stamp-run bench-packages  ## Compare squashfs and EROFS, each with several compressions: size, and time to read (needs root).
	PYTHONPATH=src $(BIN)/python -m tools.bench_images $(BENCH_ARGS)

flame: $(VENV)/stamp-run bench-packages build/py-spy/bin/py-spy  ## Draw docs/flame.svg: where the processor time of creates and deletes goes (needs root).
	$(BIN)/python -m tools.bench.flame build/py-spy/bin/py-spy docs/flame.svg

lock: build/uv/bin/uv  ## Pin the newest allowed releases of all dependencies, with their hashes.
	$(COMPILE) --extra build pyproject.toml --output-file requirements.lock
	$(COMPILE) --extra build --extra dev --constraints requirements.lock pyproject.toml --output-file requirements-dev.lock

clean:  ## Remove what these commands made in this directory.
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -type d -exec rm -rf {} +

demo-packages:
	@tools/apt-install $(DEMO_PACKAGES)

test-packages:
	@tools/apt-install $(TEST_PACKAGES)

lab-packages:
	@tools/apt-install $(LAB_PACKAGES)

bench-packages:
	@tools/apt-install $(BENCH_PACKAGES)

# --- the virtual environment: a stamp is newer than the lock it was made from ---

$(VENV)/stamp-venv:
	@tools/find-python >/dev/null || tools/apt-install python3 python3-venv
	"$$(tools/find-python)" -m venv --clear $(VENV)
	@touch $@

# The package itself comes last, with the setuptools just installed: building it asks the network for nothing. It is
# compiled here, since not everybody lets Python do that: else each start would, which takes longer, and 4 MB.
$(VENV)/stamp-run: requirements.lock pyproject.toml | $(VENV)/stamp-venv
	$(PIP) install --require-hashes --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --no-index --editable .
	$(BIN)/python -m compileall -q src
	@touch $@

$(VENV)/stamp-dev: requirements-dev.lock $(VENV)/stamp-run
	$(PIP) install --require-hashes --requirement requirements-dev.lock
	@touch $@

# --- the locks ---

COMPILE = build/uv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command "make lock"

# Tools of ours that no other package should have to agree with, each in an environment of its own.
build/uv/bin/uv build/py-spy/bin/py-spy:
	@tools/find-python >/dev/null || tools/apt-install python3 python3-venv
	"$$(tools/find-python)" -m venv build/$(@F)
	build/$(@F)/bin/python -m pip --disable-pip-version-check --quiet install $(@F)
