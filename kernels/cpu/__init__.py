"""The operations as machine code for this processor, compiled by numba when first wanted and kept on disk."""
