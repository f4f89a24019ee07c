# Gates on the kernel's machine code, for every supported Triton and target. No GPU is needed.
# Each Triton is installed once into build/gates/triton-VERSION.

.PHONY: gates gates-accept

gates: $(STAMPS)/package $(STAMPS)/dev ## machine code of the kernel under three Tritons, and mutants that the gates must find
	$(BIN)/pytest tests/gates --durations=3

gates-accept: $(STAMPS)/package $(STAMPS)/dev ## store what the kernel costs now, here and in docs/kernel.md
	PYTHONPATH=tests/gates $(BIN)/python tests/gates/costs.py
