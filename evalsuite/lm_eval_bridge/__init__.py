"""lm-eval's tasks through our engine, and our models under lm-eval's.

Nothing heavy is imported before it is used; `lm_eval` is imported in this package and nowhere else.
"""
