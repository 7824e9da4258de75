# SPDX-License-Identifier: Apache-2.0
"""The HTTP routes, one file a subject."""
