"""lm-eval's tasks through our engine, and our models under lm-eval's.

Nothing heavy is imported before it is used. Besides `bench`, which races against it, nothing else imports `lm_eval`.
"""
