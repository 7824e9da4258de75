# SPDX-License-Identifier: Apache-2.0
"""Constants of `lora_delta`, by GPU."""

from pallas_kernels.lora_mosaic import Tuning

TUNING = {
    "NVIDIA H200": Tuning(parts=4, stages=4),
}
