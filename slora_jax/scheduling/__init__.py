# SPDX-License-Identifier: Apache-2.0
"""Who runs in the next step: the scheduler, its policies, and what a step costs. No JAX."""
