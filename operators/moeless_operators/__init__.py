"""The Kubernetes operator: turns MoEModel and ExpertScalingPolicy objects into Ray services.

Imports neither torch nor ray: it talks to the Kubernetes API and to the gateway's admin API. No operator is here yet.
"""

__version__ = "0.1.0"
