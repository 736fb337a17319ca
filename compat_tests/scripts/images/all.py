"""Run the scripts that are named, one after another."""

import importlib
import sys

for name in sys.argv[1:]:
    print("==", name)
    importlib.import_module(name)
