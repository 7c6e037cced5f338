"""The harness: plans, runs, records and reports evaluations."""
