"""lm-eval's command line with our models: python -m evalsuite.lm_eval_bridge run --model gdn2 --tasks piqa ..."""

import importlib

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    importlib.import_module("evalsuite.lm_eval_bridge.model")
    cli_evaluate()
