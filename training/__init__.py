# SPDX-License-Identifier: Apache-2.0
"""Scripts that train the weights shipped in `slora_jax/demo/assets`."""
