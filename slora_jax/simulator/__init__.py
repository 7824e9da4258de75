# SPDX-License-Identifier: Apache-2.0
"""The scheduler under a virtual clock, a cost model for its device: to compare policies quickly.

No JAX, no weights: what is simulated is when things happen, not what they compute.
"""
