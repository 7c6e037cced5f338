"""Benchmark files in one directory, with a manifest of their digests, sources and licences.

A task file declares what it reads as a `Dataset`, lists it as its tasks' `datasets`, and calls `rows(dataset)`
and `digest(dataset)`; where nothing is there they raise a DataError that names the command which brings it. The
directory is `--data DIR`, else $GDN2_DATA, else the cache. Only `gdn2-eval data fetch` touches a network.
"""

from tasks.data.shelf import Located, digest, folder, locate, rows
from tasks.data.spec import Dataset, Kind, Row

__all__ = ["Dataset", "Kind", "Located", "Row", "digest", "folder", "locate", "rows"]
