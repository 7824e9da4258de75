# SPDX-License-Identifier: Apache-2.0
"""HTTP, streaming, metrics and the web page, over `slora_jax`.

Imports `slora_jax` only; nothing imports it. Empty so far: use `slora generate` or `Engine`.
"""
