# Each command sets everything that it needs up in .venv first:
#   make demo    a small model, trained and attacked      make test    all tests
#   make quick   the tests of the pure folders            make lint    style and types
#   make docs    the site, into site/                     make install, make clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICK := tests/core tests/texts tests/storage tests/words \
	tests/engine/test_tasks.py tests/engine/test_text_table.py

.PHONY: demo test quick lint docs install clean

demo: $(VENV)/.installed-run
	$(BIN)/sama-jax demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Under a minute: what whoever edits a statistic runs after every change.
quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 $(QUICK) $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# A broken link or a public name without a docstring fails.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# pip compiles to bytecode on one core, and all there is: half a minute more. What cannot be
# compiled (templates, say) is left, as pip leaves it.
define INSTALL
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '$(1)'
	-@$(BIN)/python -m compileall -qq -j 0 -x '/(tests?|models)/' $(VENV)/lib
endef

# Only what running needs; the demo works without torch.
$(VENV)/.installed-run: pyproject.toml constraints.txt | $(VENV)/.exists
	$(call INSTALL,.)
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/.exists
	$(call INSTALL,.[test])
	touch $@ $(VENV)/.installed-run

# basedpyright looks into what the tests need as well.
$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(call INSTALL,.[lint])
	touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/.exists
	$(call INSTALL,.[docs])
	touch $@ $(VENV)/.installed-run

$(VENV)/.exists:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

install: $(VENV)/.installed-run

clean:
	rm -rf $(VENV) runs dist build site
