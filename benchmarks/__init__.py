# SPDX-License-Identifier: Apache-2.0
"""How fast it is, and how fast the device could be. Not packaged.

`kernels` times the operations, `decode` whole steps of the engine; `report` writes their results
into the README.
"""
