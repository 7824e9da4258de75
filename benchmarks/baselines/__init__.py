# SPDX-License-Identifier: Apache-2.0
"""The same workloads on other servers, where these are installed."""
