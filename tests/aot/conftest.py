# SPDX-License-Identifier: Apache-2.0
"""Set before JAX compiles the first kernel."""

import os

# The CUDA plugin looks for a driver when it is loaded; here there is none to find.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")  # registers and spills, to standard output
