# Needs Python >= 3.10, pip and make; everything else is installed into $(VENV).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.installed

.PHONY: demo test docs readme clean

demo: $(DONE)  ## compare the teacher-free methods and their controls on the embedded digits
	$(BIN)/fastkdtf compare --data digits --out demo_out

test: $(DONE)  ## modules equal notebooks, notebooks are clean and run, tests pass
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist worksteal --durations 15

docs: $(DONE)  ## build the site in _docs/, check its links
	$(BIN)/python tools/docs.py

readme: $(DONE)  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/docs.py --readme

clean:  ## remove what was built ($(VENV) and demo_out stay)
	rm -rf _docs _proc build dist .pytest_cache .hypothesis
	find fastkdtf tests tools nbs -name __pycache__ -prune -exec rm -rf {} +

# pip chooses torch and torchvision together, so that they match. Where Python comes without ensurepip, our own pip installs pip.
$(DONE): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info<(3,10) and "fastkdtf needs Python >= 3.10; say which with make PYTHON=...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -e '.[dev,docs,dist]'
	touch $@
