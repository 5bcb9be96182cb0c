"""The pre-flight: from a model, a workload and a device to a verdict, before anything is run."""
