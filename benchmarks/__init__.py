# SPDX-License-Identifier: Apache-2.0
"""How fast it is, and how fast the device could be; not packaged. See `README.md` for what to run."""
