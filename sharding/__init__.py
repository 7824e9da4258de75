# SPDX-License-Identifier: Apache-2.0
"""Meshes, partition specs and the collectives of tensor-parallel LoRA.

Imports `jax` and `pallas_kernels` only. Empty so far: the engine runs on one device.
"""
