"""A look inside the memory: what a recurrent state kept of a needle, and what took the rest away. See README.md."""
