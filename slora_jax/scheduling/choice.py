# SPDX-License-Identifier: Apache-2.0
"""From the name of a policy to the policy."""

from slora_jax.scheduling.clustering import AdapterClustering
from slora_jax.scheduling.cost_model import CostModel
from slora_jax.scheduling.early_abort import EarlyAbort
from slora_jax.scheduling.fairness import VirtualTokenCounter
from slora_jax.scheduling.options import SchedulingOptions
from slora_jax.scheduling.policies import ByPriority, LastComeFirstServed, Policy


def make_policy(options: SchedulingOptions, cost_model: CostModel, step_tokens: int) -> Policy:
    """The policy that `options.scheduling_policy` names.

    Args:
        options: its constants.
        cost_model: of the device that the scheduler serves.
        step_tokens: most tokens of a step.
    """
    match options.scheduling_policy:
        case "fcfs":
            return Policy(options)
        case "lcfs":
            return LastComeFirstServed(options)
        case "abort":
            return EarlyAbort(options, cost_model, step_tokens)
        case "cluster":
            return AdapterClustering(options)
        case "vtc":
            return VirtualTokenCounter(options)
        case "priority":
            return ByPriority(options)
