# SPDX-License-Identifier: Apache-2.0
"""While testing, the shapes in the signatures of the operations on the pool are checked.

Only theirs: pytrees of weights are also made of shapes and specs, which are no arrays.
"""

import importlib.util

from jaxtyping import install_import_hook

if importlib.util.find_spec("beartype") is not None:
    install_import_hook("pallas_kernels", "beartype.beartype")
