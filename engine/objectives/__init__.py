"""One file an objective; `contract.py` says what each must do."""
